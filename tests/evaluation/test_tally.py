"""The file of answers: each counts once, a cut line is dropped, what this command did not write is left as it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_sead.errors import UserError
from megatron_sead.evaluation.tally import Graded, Tally

MEASUREMENT = {"seed": 0, "samples": 2}
KEYS = [(prompt, sample) for prompt in ("a", "b\n\u2028") for sample in range(2)]
ANSWERS = [
    (Graded(prompt, sample, 3, finished=sample == 0, correct=False), "text\n\ud800\u2028") for prompt, sample in KEYS
]


def written(path: Path, count: int = 4) -> bytes:
    tally = Tally(path, MEASUREMENT, KEYS)
    tally.add(ANSWERS[:count])
    tally.close()
    return path.read_bytes()


def test_answers_come_back_as_they_were(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.jsonl"
    content = written(path)
    assert [json.loads(line)["response"] for line in content.split(b"\n")[1:-1]] == ["text\n\ud800\u2028"] * 4
    tally = Tally(path, MEASUREMENT, KEYS)
    assert list(tally.answers.items()) == [(key, graded) for key, (graded, _) in zip(KEYS, ANSWERS, strict=True)]
    tally.close()
    assert path.read_bytes() == content


def test_wherever_a_kill_cuts_the_file_what_was_whole_stays(tmp_path: Path) -> None:
    content = written(tmp_path / "whole.jsonl")
    path = tmp_path / "cut.jsonl"
    for length in range(len(content)):
        path.write_bytes(content[:length])
        tally = Tally(path, MEASUREMENT, KEYS)
        whole = max(0, content[:length].count(b"\n") - 1)
        assert list(tally.answers) == KEYS[:whole]
        tally.add(ANSWERS[whole:])
        tally.close()
        assert path.read_bytes() == content


LINE = b'{"prompt_id": "a", "sample": 0, "response": "", "tokens": 3, "finished": true, "correct": false}\n'


@pytest.mark.parametrize(
    ("added", "told"),
    [
        (LINE * 2, "line 3: damaged: sample 0 of prompt 'a' stands there twice"),
        (LINE.replace(b'"a"', b'"c"'), "line 2: damaged: sample 0 of prompt 'c' was never asked for"),
        (LINE.replace(b" 0,", b" 2,"), "line 2: damaged: sample 2 of prompt 'a' was never"),
        (LINE.replace(b" 0,", b" 0.0,"), "line 2: not written by this command, or damaged"),
        (LINE.replace(b" 0,", b" false,"), "line 2: not written"),
        (LINE.replace(b"true", b"1"), "line 2: not written"),
        (LINE.replace(b" 3,", b" -3,"), "line 2: not written"),
        (LINE.replace(b'""', b"null"), "line 2: not written"),
        (LINE.replace(b', "tokens": 3', b""), "line 2: not written"),
        (LINE.replace(b', "tokens"', b', "note": 1, "tokens"'), "line 2: not written"),
        (b"\0\0\0\n" + LINE, "line 2: not written"),
        (b"\xff\n", "line 2: not written"),
        (b"[]\n", "line 2: not written"),
        (b"\n" + LINE, "line 2: not written"),
        (LINE + b"my notes", "line 3: not written"),
        (b"[" * 100_000 + b"\n", "line 2: not written"),
    ],
    ids=repr,
)
def test_what_this_command_did_not_write_is_refused_and_left(tmp_path: Path, added: bytes, told: str) -> None:
    path = tmp_path / "a.jsonl"
    content = written(path, 0) + added
    path.write_bytes(content)
    with pytest.raises(UserError) as refused:
        Tally(path, MEASUREMENT, KEYS)
    assert str(refused.value).startswith(f"{path}, {told}")
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    "content", [b"my notes", b"my notes\n", b'{"a": 1}\n', b'{"measurement": 3}\n', b"\xff\n", b"\n"]
)
def test_a_file_of_somebody_else_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match="line 1: not written by this command"):
        Tally(path, MEASUREMENT, KEYS)
    assert path.read_bytes() == content


def test_what_was_begun_with_something_else_is_not_continued(tmp_path: Path) -> None:
    content = written(tmp_path / "a.jsonl")
    for other, told in (({"seed": 1, "samples": 2}, "seed=0, now 1"), ({"seed": 0}, "samples=2, now None")):
        with pytest.raises(UserError, match=f"was begun with {told}; use the same to continue"):
            Tally(tmp_path / "a.jsonl", other, KEYS)
    assert (tmp_path / "a.jsonl").read_bytes() == content
