"""The benchmarks: one record each. A file in the form in which a benchmark is released, or its hub data set, is read by
the same code as any prompt file."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from megatron_sead.config.environment import expand_path
from megatron_sead.config.prompts import PromptSettings
from megatron_sead.errors import UserError
from megatron_sead.evaluation.groups import Groups, groups_of
from megatron_sead.prompts.folders import is_saved
from megatron_sead.prompts.problems import Problem, check_rows
from megatron_sead.prompts.rows import read_rows

# Behind every problem, unless the settings say otherwise
BOXED = "\n\nPlease reason step by step, and put your final answer within \\boxed{}."
FILES = (".jsonl", ".json", ".parquet")
NAME = re.compile(r"[A-Za-z0-9][\w.-]*", re.ASCII)  # also of a file


@dataclass(frozen=True)
class Benchmark:
    """Where its problems are, and how they are asked.

    Fields are those of the releases that there are, in the order in which they are looked for: the first that the
    first row has. GSM8K's rationales end with "#### 72", and Minerva's solutions hold the answer in their last box.
    """

    name: str
    title: str
    hub: str | None = None  # name of a data set
    subset: str | None = None
    split: str = "test"
    samples: int = 1  # answers a problem, whose mean counts; 1: the greedy one
    prompt_fields: tuple[str, ...] = ("problem", "question", "prompt")
    answer_fields: tuple[str, ...] = ("answer", "final_answer", "ground_truth", "solution")
    id_fields: tuple[str, ...] = ("id", "unique_id", "idx")
    path: str | None = None  # a file, where it is not the hub's


BENCHMARKS = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark("math500", "MATH-500", "HuggingFaceH4/MATH-500", id_fields=("unique_id", "id")),
        Benchmark("minerva_math", "Minerva Math", "math-ai/minervamath"),
        Benchmark("olympiadbench", "OlympiadBench", "math-ai/olympiadbench"),
        Benchmark("amc23", "AMC 2023", "math-ai/amc23", samples=32),
        Benchmark("aime24", "AIME 2024", "HuggingFaceH4/aime_2024", split="train", samples=32),
        Benchmark("aime25", "AIME 2025", "math-ai/aime25", samples=32),
        Benchmark("gsm8k", "GSM8K", "openai/gsm8k", subset="main"),
    )
}
PAPER = [name for name in BENCHMARKS if name != "gsm8k"]  # SEAD's six


def choose_benchmarks(given: Sequence[str], data: Path | None) -> list[Benchmark]:
    """The benchmarks that a command names, as ``NAME`` or ``NAME=PLACE``.

    Args:
        given: PLACE is a file, a folder with one, or a hub data set; without it a folder of the name in `data`, else
            the benchmark's own hub data set. With a place a name may be new: any file of problems with answers.
            Nothing: the paper's six.
        data: a folder with a folder a benchmark, as evaluation/data of Qwen2.5-Math.

    Raises:
        UserError: a name that is not known, a place that is not there, a benchmark that is named twice.
    """
    chosen: dict[str, Benchmark] = {}
    for text in given or PAPER:
        name, has_place, place = text.partition("=")
        benchmark = _record(name, is_own=bool(has_place))
        if benchmark.name in chosen:
            raise UserError(f"benchmark {name}: is named twice")
        if not has_place and data is not None:
            place = str(data / name)
            if not Path(place).exists():
                raise UserError(f"benchmark {name}: {place}: no such file or folder; name its place, {name}=PLACE")
        chosen[name] = replace(benchmark, path=_file(benchmark, place)) if place or has_place else benchmark
    return list(chosen.values())


def _record(name: str, *, is_own: bool) -> Benchmark:
    if name in BENCHMARKS:
        return BENCHMARKS[name]
    near = difflib.get_close_matches(name.lower(), BENCHMARKS, 1, 0.75)
    if near:
        raise UserError(f"benchmark {name}: unknown; did you mean {near[0]}?")
    if not is_own:
        raise UserError(
            f"benchmark {name}: unknown; must be one of {', '.join(BENCHMARKS)}, or NAME=FILE for problems of your own"
        )
    if NAME.fullmatch(name) is None:
        raise UserError(f"benchmark {name!r}: a name must be of letters, digits, dots, - and _")
    return Benchmark(name, name)


def _file(benchmark: Benchmark, place: str) -> str:
    """The file itself, the one in a folder of the benchmark's split, a saved data set, or a hub name as it is."""
    try:
        place = expand_path(place)
    except ValueError as error:
        raise UserError(f"benchmark {benchmark.name}={place}: {error}") from None
    folder = Path(place)
    if not folder.is_dir() or is_saved(folder):
        return place
    for split in dict.fromkeys(("test", benchmark.split)):
        files = [path for path in sorted(folder.rglob(f"{split}*")) if path.suffix in FILES and path.is_file()]
        if len(files) == 1:
            return str(files[0])
        if files:
            raise UserError(
                f"benchmark {benchmark.name}={place}: holds {files[0].name} and {files[1].name}; name one of them"
            )
    raise UserError(
        f"benchmark {benchmark.name}={place}: a folder without a file test{FILES[0]}, test.json or test.parquet"
    )


def read_benchmark(
    benchmark: Benchmark, template: Literal["chat", "plain"], instruction: str, limit: int | None
) -> tuple[PromptSettings, list[Problem], Groups]:
    """How the problems become prompts, the problems, and the groups that their rows put them into.

    Args:
        instruction: text behind every problem.
        limit: the first so many problems alone.

    Raises:
        UserError: names the file and what is wrong with it.
    """
    settings = PromptSettings(
        path=benchmark.path or str(benchmark.hub),
        split=benchmark.split,
        template=template,
        instruction=instruction,
        difficulty_field="",  # of the curriculum; benchmarks have words of their own under such names
        level_field="",
    )
    subset = benchmark.subset if benchmark.path is None else None
    rows = read_rows(settings.model_copy(update={"subset": subset}), benchmark.name)
    fields = {
        "prompt_field": benchmark.prompt_fields,
        "answer_field": benchmark.answer_fields,
        "id_field": benchmark.id_fields,
    }
    found = {
        setting: next((name for name in names if name in rows[0].fields), names[0]) for setting, names in fields.items()
    }
    settings, rows = settings.model_copy(update=found), rows[:limit]
    return settings, check_rows(rows, settings, benchmark.name), groups_of(rows)
