"""The runs of a comparison, several at a time. What has ended is not run again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from training_run import train

from megatron_sead.config.run import dump_config, load_config
from megatron_sead.errors import UserError
from megatron_sead.files.durable import replace_text
from megatron_sead.files.outputs import require_free
from megatron_sead.html_report.run_directory import read_run
from megatron_sead.prompts.exact_json import dumps
from megatron_sead.prompts.rows import read_rows
from method_study.study import SELECTION, TRAINING, Asked, Study, counted, trial

MOST_BEYOND = 3
Say = Callable[[str], None]
Chosen = dict[str, dict[float, float]]  # by method and learning rate: accuracy on the selection's problems


def require_folder(place: Path) -> None:
    """Raises UserError where it is something else."""
    if place.exists() and not place.is_dir():
        raise UserError(f"{place}: is a file; must be a directory, or not exist yet")


def require_possible(study: Study, work: Path) -> None:
    """Every method's and reading's settings, before hours are spent on others'.

    Raises:
        UserError: they are no run's.
    """
    require_folder(work)
    for horizon in study.horizons:
        for name in study.names_at(horizon):
            load_config(
                study.config, counted(study, work, name, study.rates.tried[0], horizon, study.seeds[0]).settings
            )


def choose_rates(study: Study, work: Path, at_once: int, say: Say) -> Chosen:
    """By method and learning rate: accuracy of sampled answers to the selection's problems, mean over seeds.

    Where the highest or lowest of the rates is the best, twice or half of it is tried, too, up to `MOST_BEYOND` times.
    """
    set_problems_apart(study, work)
    found: Chosen = {method: {} for method in study.methods}
    wanted = {method: list(study.rates.tried) for method in study.methods}
    for _ in range(1 + MOST_BEYOND):
        of = {
            (method, rate): [trial(study, work, method, rate, seed) for seed in study.rates.seeds]
            for method, rates in wanted.items()
            for rate in rates
        }
        take(study, [asked for trials in of.values() for asked in trials], at_once, say)
        for (method, rate), trials in of.items():
            found[method][rate] = sum(accuracy(asked.output) for asked in trials) / len(trials)
        wanted = {method: beyond(by_rate) for method, by_rate in found.items()}
    return found


def beyond(by_rate: dict[float, float]) -> list[float]:
    """What to try next, since the best rate is the last on a side; nothing where it lies between two others."""
    chosen = best(by_rate)
    return [2 * chosen] * (chosen == max(by_rate)) + [chosen / 2] * (chosen == min(by_rate))


def best(by_rate: dict[float, float]) -> float:
    """The learning rate with the highest accuracy; of like ones the least."""
    return max(sorted(by_rate), key=lambda rate: by_rate[rate])


def run_methods(study: Study, work: Path, rates: dict[str, float], at_once: int, say: Say) -> None:
    """Every method, horizon and seed; whole sets of methods first, so that what is there early can be compared."""
    take(
        study,
        [
            counted(study, work, name, rates[study.method_of(name)], horizon, seed)
            for horizon in study.horizons
            for seed in study.seeds
            for name in study.names_at(horizon)
        ],
        at_once,
        say,
    )


def take(study: Study, runs: Sequence[Asked], at_once: int, say: Say) -> None:
    """Those that have not ended yet; one that was stopped goes on.

    Raises:
        UserError: a run ended with an error. Those under way come to their end, and no other begins.
    """
    left = [asked for asked in runs if not _has_ended(study, asked)]
    with ThreadPoolExecutor(at_once) as pool:
        waiting = {pool.submit(_run, study, asked): asked for asked in left}
        try:
            for number, done in enumerate(as_completed(waiting), 1):
                done.result()
                output = waiting[done].output
                say(f"[{number}/{len(left)}] {output.parent.name}/{output.name}: sampled {accuracy(output):.3f}")
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _has_ended(study: Study, asked: Asked) -> bool:
    """Is it there, and the same run?"""
    if not (asked.output / "summary.json").exists():
        return False
    recorded, settings = asked.output / "config.yaml", load_config(study.config, asked.settings)
    if not recorded.is_file() or recorded.read_bytes() != dump_config(settings).encode():
        raise UserError(f"{asked.output}: was run with other settings; choose another folder, or move it away")
    return True


def accuracy(run: Path, kind: str = "sampled") -> float:
    """On the run's own held-out problems, after training."""
    found = read_run(run).accuracy("after", kind)
    if found is None:
        raise UserError(f"{run}: has no {kind} accuracy after training")
    return found.mean


def _run(study: Study, asked: Asked) -> None:
    done = train(study.config, 1, asked.settings)
    if done.returncode or not (asked.output / "summary.json").exists():
        told = done.stderr.strip().splitlines()[-1:] or ["it was stopped"]
        raise UserError(f"{asked.output}: ended with code {done.returncode}: {told[0]}")


def set_problems_apart(study: Study, work: Path) -> None:
    """Of the training prompts the last of each level become the selection's problems; the others stay."""
    prompts = load_config(study.config, [*study.settings, f"output={work}"]).prompts
    count, left, apart = study.rates.problems_of_each_level, list[str](), list[str]()
    taken = Counter[str]()
    for row in reversed(read_rows(prompts)):
        level = str(row.value(prompts.level_field, None))
        taken[level] += 1
        (apart if taken[level] <= count else left).append(dumps(row.fields) + "\n")
    if not left:
        raise UserError(f"rates.problems_of_each_level={count}: {prompts.path} has no prompt left to train on")
    work.mkdir(parents=True, exist_ok=True)
    for name, lines in ((TRAINING, left), (SELECTION, apart)):
        text = "".join(reversed(lines))
        require_free(work / name, own=text)
        replace_text(work / name, text)
