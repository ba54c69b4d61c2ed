"""Reports of runs in every state: numbers are the run's, what is missing is a sentence, nothing of it is executed."""

from __future__ import annotations

import json
import os
import re
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from megatron_sead.commands.report import app
from megatron_sead.errors import UserError
from megatron_sead.html_report.findings import findings
from megatron_sead.html_report.page import page_of, report
from megatron_sead.html_report.run_directory import read_run
from megatron_sead.html_report.series import thinned
from megatron_sead.html_report.token_view import token_view
from megatron_sead.html_report.write import write_at_the_end, write_report
from tests.html_report.directories import metrics, rollout, token_record, write_run

MEGABYTES = 1e6
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)><!-- & \" ' {{ 7*7 }} \u2028"


class Seen(HTMLParser):
    """Elements of a page by name, and the text of scripts."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] == "script":
            self.scripts[-1] += data

    def data(self, name: str) -> Any:
        scripts = [attributes for tag, attributes in self.tags if tag == "script"]
        (place,) = [i for i, attributes in enumerate(scripts) if attributes.get("id") == name]
        return json.loads(self.scripts[place])


def html_of(directory: Path) -> str:
    return report([read_run(directory)])


def test_a_page_holds_its_runs_numbers(tmp_path: Path) -> None:
    page = Seen(html_of(write_run(tmp_path / "run")))
    figures, rollouts = page.data("figures"), page.data("rollouts-data")
    (loss,) = [t for t in figures["loss"]["traces"] if t["name"] == "loss, nats"]
    assert loss["x"] == list(range(30))
    assert loss["y"] == pytest.approx([1 / (1 + step) for step in range(30)], rel=1e-4)
    held = next(t for t in figures["learning"]["traces"] if t["name"] == "held-out, greedy")
    assert held["y"] == [0.4, 0.75] and held["x"] == [0, 30]
    paper = [[t["x"][-1] for t in figures["mass"]["traces"]]]
    assert paper == [[9.7, 58.4, 31.9]]
    first = rollouts["rollouts"][0]
    assert "".join(first["texts"]) == "The answer is 4<|end|>" and first["answers"] == ["4"]
    assert rollouts["texts"][""]["7"] == " other"


def test_every_figure_has_a_name_and_numbers_for_those_who_do_not_see_it(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run"))
    page, html = page_of(run), Seen(html_of(tmp_path / "run"))
    ids = {attributes.get("id") for _, attributes in html.tags}
    for figure in page.figures:
        assert figure.numbers and not figure.empty, figure.id
        assert f"{figure.id}-title" in ids
    assert {finding.rule.figure for finding in findings(run)} <= page.figure_ids


def test_a_page_asks_no_network_and_runs_no_code_of_others(tmp_path: Path) -> None:
    html = html_of(write_run(tmp_path / "run"))
    tags = Seen(html).tags
    policy = next(a["content"] for tag, a in tags if tag == "meta" and a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None and policy.startswith("default-src 'none'") and "eval" not in policy
    assert not [a for tag, a in tags if a.get("src") or (tag == "link" and a.get("href"))]


@pytest.mark.parametrize("place", ["question", "texts", "answers", "prompt_id", "level", "name", "setting"])
def test_markup_of_prompts_and_models_is_shown_and_never_becomes_markup(tmp_path: Path, place: str) -> None:
    clean = Seen(html_of(write_run(tmp_path / "clean")))
    changes: dict[str, Any] = {"texts": {"texts": (HOSTILE, "b")}, "answers": {"answers": [HOSTILE]}}.get(
        place, {place: HOSTILE}
    )
    shown = [rollout(**changes)] if place in ("question", "texts", "answers", "prompt_id", "level") else None
    directory = write_run(tmp_path / "hostile", rollouts=shown)
    if place == "setting":
        text = (directory / "config.yaml").read_text().replace("problems.jsonl", json.dumps(HOSTILE.rstrip("\u2028")))
        (directory / "config.yaml").write_text(text)
    run = read_run(directory)
    if place == "name":
        run.name = HOSTILE
    found = Seen(report([run]))
    count = [sum(tag in ("script", "img") for tag, _ in page.tags) for page in (clean, found)]
    assert count[0] == count[1] and "onerror" not in str(found.tags)
    if shown:
        assert HOSTILE in json.dumps(found.data("rollouts-data"), ensure_ascii=False).replace('\\"', '"')


def test_half_characters_and_right_to_left_text_are_kept(tmp_path: Path) -> None:
    texts = ("\ud83d", "👩\u200d🚀", "مرحبا", "\u202e", "\u200b")
    directory = write_run(tmp_path / "run", rollouts=[rollout(texts)])
    write_report([directory], tmp_path / "report.html")
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert Seen(html).data("rollouts-data")["rollouts"][0]["texts"] == list(texts)


STATES: dict[str, tuple[dict[str, Any], str]] = {
    "one step": ({"steps": 1, "token_steps": (0,)}, ""),
    "interrupted": ({"steps": 7, "planned": 30, "accuracy": None, "token_steps": (0,)}, "7 steps of 30 are recorded"),
    "replayed": ({"engine": "replay"}, "replayed"),
    "without tokens": ({"token_steps": ()}, "No tokens are recorded"),
    "nothing finite": ({"loss": None, "grad_norm": None, "forward_kl": None, "reverse_kl": None}, ""),
    "no step": ({"steps": 0, "planned": 30, "accuracy": None, "token_steps": ()}, "No step is recorded yet"),
}


@pytest.mark.parametrize("state", STATES)
def test_a_run_in_any_state_has_a_report(tmp_path: Path, state: str) -> None:
    settings, remark = STATES[state]
    directory = write_run(tmp_path / "run", **settings)
    assert remark in " ".join(page_of(read_run(directory)).remarks)
    assert html_of(directory).count("<figure ") == 18


def test_files_that_are_missing_or_damaged_are_told_and_the_rest_is_shown(tmp_path: Path) -> None:
    for name in ("config.yaml", "summary.json", "heldout.json", "starts.jsonl", "tokens/step-29.json"):
        directory = write_run(tmp_path / name.replace("/", "-"))
        whole = (directory / name).read_bytes()
        for damaged in (whole[: len(whole) // 3], b"", b"[" * 100_000, b"\xff\xfe\x00", b"[1]", b"null"):
            (directory / name).write_bytes(damaged)
            page = page_of(read_run(directory))
            assert page.remarks or damaged == b"" or name == "starts.jsonl", (name, damaged[:9])
            assert not next(f for f in page.figures if f.id == "loss").empty
        (directory / name).unlink()
        assert "<figure" in html_of(directory)


@pytest.mark.parametrize("wrong", ["text", [1], {"a": 1}, True, 10**400, float("nan"), float("inf"), -1e300])
def test_values_that_no_run_writes_break_nothing(tmp_path: Path, wrong: Any) -> None:
    directory = write_run(tmp_path / "run", **{name: wrong for name in metrics(0) if name != "step"})
    summary = json.loads((directory / "summary.json").read_text())
    summary["evaluation"]["after"]["greedy"] = wrong
    summary["evaluation"]["before"]["greedy"]["prompts"] = wrong
    summary["evaluation"]["before"]["greedy"]["standard_error"] = wrong
    (directory / "summary.json").write_text(json.dumps(summary))
    start = json.loads((directory / "starts.jsonl").read_text())
    (directory / "starts.jsonl").write_text(json.dumps(dict.fromkeys(start, wrong)) + "\n")
    assert "NaN" not in json.dumps(Seen(html_of(directory)).data("figures"))


DAMAGE: dict[str, Any] = {
    "config.yaml": ["a: &x {b: *x}", "seed: [1, 2]"],
    "heldout.json": ['{"prompts": 5}', '{"prompts": [1], "problems": [], "after": 3}'],
    "metrics.jsonl": [
        f'{{"step": {10**400}}}',
        '{"step": 0, "forward_kl": 9e99, "zone_a_forward_kl_share": 9e99, "zone_a_share": 1e-300}',
    ],
    "tokens": [
        {"all_tokens": {"forward_kl": float("nan")}},
        {"all_tokens": {"reverse_kl": 10**400}},
        {"rollout": {"forward_kl": float("inf")}},
        {"rollout": {"tokens": "abc"}},
        {"rollout": {"answers": 5}},
    ],
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_run_has_a_report_alone_and_beside_others(name: str, tmp_path: Path) -> None:
    for number, damage in enumerate(DAMAGE[name]):
        directory = write_run(tmp_path / str(number))
        if name == "tokens":
            record = token_record(0)
            for points, value in damage.get("all_tokens", {}).items():
                record["all_tokens"][points][0] = value
            for column, value in damage.get("rollout", {}).items():
                shown = record["rollouts"][0]
                shown[column] = [value, *shown[column][1:]] if column == "forward_kl" else value
            (directory / "tokens" / "step-0.json").write_text(json.dumps(record))
        else:
            (directory / name).write_text(damage)
        assert "NaN" not in json.dumps(Seen(html_of(directory)).data("figures"))
        assert "<figure" in report([read_run(directory), read_run(write_run(tmp_path / f"other-{number}"))])
        assert name != "tokens" or "step-0.json: is no record of tokens" in html_of(directory)


def test_of_a_step_that_was_done_again_the_last_line_counts(tmp_path: Path) -> None:
    directory = write_run(tmp_path / "run", steps=5, token_steps=())
    again = [json.dumps(metrics(step) | {"loss": 9.0}) for step in (3, 4, 5)]
    with open(directory / "metrics.jsonl", "a") as file:
        file.write("".join(line + "\n" for line in again) + '{"step": 6, "lo')
    run = read_run(directory)
    assert run.steps == [0, 1, 2, 3, 4, 5] and run.column("loss")[2:] == [pytest.approx(1 / 3), 9.0, 9.0, 9.0]
    assert any(remark.startswith("metrics.jsonl: 1 line") for remark in run.remarks)


def test_steps_without_a_line_and_a_clock_that_went_back_are_told(tmp_path: Path) -> None:
    directory = write_run(tmp_path / "run", steps=5, token_steps=())
    lines = [json.dumps(metrics(step) | {"seconds": 9.0 - step}) for step in (0, 2, 5)]
    (directory / "metrics.jsonl").write_text("\n".join(lines))
    told = " ".join(read_run(directory).remarks)
    assert "no line of 3 steps, first of step 1" in told and "clock went backwards" in told


def test_a_long_run_is_small_and_keeps_its_spikes(tmp_path: Path) -> None:
    directory = write_run(tmp_path / "run", steps=10_000, token_steps=())
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    lines[4567] = json.dumps(json.loads(lines[4567]) | {"grad_norm": 1000.0})
    (directory / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    began = time.process_time()
    html = html_of(directory)
    assert time.process_time() - began < 20 and len(html) < 5 * MEGABYTES
    phases = Seen(html).data("figures")["seconds"]["traces"]
    assert len(phases) == 4 and len({tuple(trace["x"]) for trace in phases}) == 1  # or the stack would jump
    assert (phases[0]["x"][0], phases[0]["x"][-1]) == (0, 9999)
    (norm,) = [t for t in Seen(html).data("figures")["loss"]["traces"] if t["name"] == "gradient norm"]
    assert len(norm["x"]) <= 1000 and norm["x"][norm["y"].index(1000)] == 4567


def test_thinning_keeps_ends_extremes_and_gaps() -> None:
    ys = [None if 300 <= x < 600 else float(x % 7) for x in range(5000)]
    ys[1234] = -50.0
    xs, found = thinned(range(5000), ys, 100)
    assert xs[0] == 0 and xs[-1] == 4999 and len(xs) <= 100
    assert found[xs.index(1234)] == -50 and None in found


def test_rollouts_fit_their_room_and_every_step_has_one_first() -> None:
    records = {step: token_record(step, [rollout(prompt_id=str(n)) for n in range(50)]) for step in range(20)}
    one = len(json.dumps(token_view({0: records[0]})["rollouts"][0]))
    view = token_view(records, room=30 * one)
    assert view["recorded"] == 1000 and 20 <= len(view["rollouts"]) <= 30
    assert {r["step"] for r in view["rollouts"]} == set(range(20))


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"student_stop_probability": 0.5}, "Stopping differs"),
        ({"truncated_share": 0.3}, "Responses are cut"),
        ({"repetition_share": 0.2}, "Responses repeat themselves"),
        ({"sampling_log_prob_difference": 0.5}, "Engine and trainer disagree"),
        ({"tau_teacher": 1e-4}, "Zone C is arbitrary"),
        ({"zone_a_forward_kl_share": 0.4}, "Zone A holds much to learn"),
        ({"confident_mismatch_rate": 0.2}, "Both sure, of different tokens"),
        ({"eligible_prompts": 300}, "The gate is stuck"),
        ({"skipped": True}, "Steps were skipped"),
        ({"accuracy": 0.1}, "Accuracy fell"),
    ],
)
def test_a_rule_asks_for_a_look_where_its_threshold_is_passed(
    tmp_path: Path, changes: dict[str, Any], rule: str
) -> None:
    fine, wrong = read_run(write_run(tmp_path / "fine")), read_run(write_run(tmp_path / "wrong", **changes))
    assert {finding.verdict for finding in findings(fine)} == {"fine"}
    assert [f.rule.name for f in findings(wrong) if f.verdict == "look"] == [rule]


def test_spikes_and_a_collapse_are_found(tmp_path: Path) -> None:
    directory = write_run(tmp_path / "run", token_steps=())
    lines = [metrics(step) | {"student_entropy": 1.0 / (1 + step) ** 2} for step in range(30)]
    lines[20]["grad_norm"] = 100.0
    (directory / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    found = {f.rule.name: f.measured for f in findings(read_run(directory)) if f.verdict == "look"}
    assert found.keys() == {"Student's entropy collapsed", "Gradients spike"}
    assert "first 20" in found["Gradients spike"]


def test_what_a_run_did_not_record_is_unknown_rather_than_fine(tmp_path: Path) -> None:
    directory = write_run(tmp_path / "run", token_steps=(), accuracy=None)
    (directory / "metrics.jsonl").write_text("".join(json.dumps({"step": s, "loss": 1.0}) + "\n" for s in range(30)))
    assert {f.verdict for f in findings(read_run(directory))} == {"unknown"}


def run_command(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        app([str(argument) for argument in arguments], prog_name="sead report")
    told = capsys.readouterr()
    return int(ended.value.code or 0), told.out, told.err


def test_the_command_writes_over_its_own_report_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run")
    for _ in range(2):
        code, out, _ = run_command(capsys, run)
        assert code == 0 and str(run / "report.html") in out
    (run / "report.html").write_text("<html>mine</html>")
    code, _, error = run_command(capsys, run)
    assert code == 2 and "is no report of this tool" in error
    assert (run / "report.html").read_text() == "<html>mine</html>"
    (tmp_path / "link.html").symlink_to(tmp_path / "nowhere.html")
    assert run_command(capsys, run, "--output", tmp_path / "link.html")[0] == 2


@pytest.mark.parametrize("given", ["nothing", "empty", "file", "loop", "n" * 300])
def test_what_is_no_run_is_told_in_one_line(tmp_path: Path, given: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to("loop")
    code, _, error = run_command(capsys, tmp_path / given)
    assert code == 2 and len(error.splitlines()) == 1 and str(tmp_path / given) in error


@pytest.mark.parametrize("place", ["n" * 300, "file/report.html", "pipe"])
def test_a_place_where_nothing_can_be_written_is_told_in_one_line(
    tmp_path: Path, place: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    os.mkfifo(tmp_path / "pipe")
    code, _, error = run_command(capsys, write_run(tmp_path / "run"), "--output", tmp_path / place)
    assert code == 2 and len(error.splitlines()) == 1 and str(tmp_path) in error


def test_a_report_that_cannot_be_written_does_not_fail_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = write_run(tmp_path / "run")
    (run / "report.html").write_text("mine")
    assert write_at_the_end(run) is None and "is no report" in caplog.text
    monkeypatch.setattr("megatron_sead.html_report.write.read_run", lambda directory: 1 / 0)
    (run / "report.html").unlink()
    assert write_at_the_end(run) is None and "division by zero" in caplog.text


def test_a_directory_is_no_place_for_a_report(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a directory"):
        write_report([write_run(tmp_path / "run")], tmp_path)


def test_the_page_has_one_of_each_id(tmp_path: Path) -> None:
    ids = re.findall(r'\bid="([^"]+)"', re.sub(r"(?s)<script.*?</script>", "", html_of(write_run(tmp_path / "run"))))
    assert len(ids) == len(set(ids))
