"""The training file of a released set, and beside it what was left out and why.

Duplicates go before anything else is looked at: a set may hold a hundred copies of each problem.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from megatron_sead import __version__
from megatron_sead.config.prompts import PromptSettings
from megatron_sead.errors import UserError
from megatron_sead.files.outputs import require_free
from megatron_sead.grading.grader import GRADER_VERSION, Grader
from megatron_sead.preparation.candidates import (
    NO_ANSWER,
    NO_PROMPT,
    Candidate,
    Candidates,
    Fault,
    Rows,
    same_answers,
)
from megatron_sead.preparation.overlap import Benchmarks, read_benchmark
from megatron_sead.preparation.settings import PrepareSettings
from megatron_sead.prompts.exact_json import dumps
from megatron_sead.prompts.folders import require_outside
from megatron_sead.prompts.messages import Conversation, as_text, as_value, with_instruction
from megatron_sead.prompts.rows import stream_rows
from megatron_sead.wording import counted

KEPT, DUPLICATE, CONFLICT = "kept", "duplicate", "conflicting answers"
EXACT, NEAR, TOO_LONG = "in a benchmark", "near a benchmark", "too long"
REASONS = (DUPLICATE, NO_PROMPT, NO_ANSWER, CONFLICT, EXACT, NEAR, TOO_LONG)
FIRST_LOOK = 1000  # rows after which a set without a usable one is given up: a field is misnamed
TOLD_EVERY = 2000  # rows between two looks at the progress

Drop = Callable[..., None]


def prepare(settings: PrepareSettings, benchmarks: list[str], output: Path) -> None:
    """Write OUTPUT, OUTPUT.dropped.jsonl and OUTPUT.provenance.json; print a table. Nothing has its name before all is
    written.

    Args:
        benchmarks: files or hub names of sets that must not be trained on.

    Raises:
        UserError: input or benchmark that cannot be read, an output that exists, no prompt that is left.
        OSError: the disk refuses.
    """
    dropped, provenance = beside(output, "dropped.jsonl"), beside(output, "provenance.json")
    for path in (output, dropped, provenance):
        require_free(path)
    require_outside(output, settings.prompts.path, "input")
    too_long = _limit(settings)
    known, described = _read_benchmarks(settings, benchmarks)
    output.parent.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryFile(dir=output.parent) as spool,
        being_written(dropped, provenance, output) as (dropped_file, provenance_file, output_file),
        Grader() as grader,
        _progress() as show,
    ):
        writer = _Writer(output_file, dropped_file)
        # Prompts as they stand there: a run appends its instruction itself
        reading = settings.prompts.model_copy(update={"instruction": ""})
        candidates = Candidates(spool, reading, grader, writer.fault)
        _collect(candidates, writer, reading, show)
        _sift(candidates, writer, settings, known, too_long, grader, show)
        if not writer.problems[KEPT]:
            raise _nothing_left(writer, candidates.rows, reading)
        record = _provenance(settings, described, candidates, writer)
        provenance_file.write(json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    _print(output, candidates, writer, settings)


class _Writer:
    """Counts what is kept and dropped, in rows and in problems, and writes it."""

    def __init__(self, output: IO[str], dropped: IO[str]) -> None:
        self._output, self._dropped = output, dropped
        self.rows: Counter[str] = Counter()
        self.problems: Counter[str] = Counter()
        self.without: set[str] = set()  # fields that JSON cannot hold
        self.new_ids = 0
        self.first_fault = ""
        self._ids: set[str] = set()

    def fault(self, fault: Fault) -> None:
        self.first_fault = self.first_fault or fault.told
        self._count(fault.reason, 1)
        self._write(self._dropped, asdict(fault))

    def drop(self, reason: str, candidate: Candidate, rows: Rows, **more: Any) -> None:
        """A whole problem.

        Args:
            rows: all of its.
        """
        self._count(reason, len(rows))
        said = {"reason": reason, "place": candidate.place, "text": as_text(candidate.turns)}
        self._write(self._dropped, said | more | {"rows": list(rows)})

    def keep(self, candidate: Candidate, copies: Rows, turns: Conversation) -> None:
        """Its copies are dropped."""
        if copies:
            self.rows[DUPLICATE] += len(copies)
            self.problems[DUPLICATE] += 1
            said = {
                "reason": DUPLICATE,
                "place": candidate.place,
                "text": as_text(candidate.turns),
                "rows": list(copies),
            }
            self._write(self._dropped, said)
        self._count(KEPT, 1)
        row: dict[str, Any] = {"id": self._new_id(candidate.id, turns), "prompt": as_value(turns)}
        row["answer"] = candidate.answers[0] if len(candidate.answers) == 1 else list(candidate.answers)
        row |= {name: value for name in ("difficulty", "level") if (value := getattr(candidate, name)) is not None}
        self._write(self._output, row | {"source": {"place": candidate.place} | self._writable(candidate.rest)})

    def _new_id(self, given: str | None, turns: Conversation) -> str:
        """The row's own; of a row without one, or with that of another problem, one made of its text: the same
        whatever else is in the set."""
        if given is not None and given not in self._ids:
            self._ids.add(given)
            return given
        self.new_ids += given is not None
        made = hashlib.sha256(" ".join(as_text(turns).split()).encode()).hexdigest()[:16]
        while made in self._ids:  # two prompts that became one without their instructions
            made = hashlib.sha256(made.encode()).hexdigest()[:16]
        self._ids.add(made)
        return made

    def _writable(self, fields: dict[str, Any]) -> dict[str, Any]:
        kept = {}
        for name, value in fields.items():
            try:
                dumps(value)
            except TypeError:
                self.without.add(name)
            else:
                kept[name] = value
        return kept

    def _count(self, reason: str, rows: int) -> None:
        self.rows[reason] += rows
        self.problems[reason] += 1

    def _write(self, file: IO[str], row: dict[str, Any]) -> None:
        file.write(dumps(row) + "\n")


def _collect(candidates: Candidates, writer: _Writer, settings: PromptSettings, show: Callable[[str], None]) -> None:
    for row in stream_rows(settings, "input"):
        candidates.add(row)
        if candidates.rows % TOLD_EVERY == 0:
            show(f"{candidates.rows:,} rows read, {counted(len(candidates), 'problem')}")
        if candidates.rows == FIRST_LOOK and not len(candidates):
            raise _nothing_left(writer, candidates.rows, settings)


def _sift(
    candidates: Candidates,
    writer: _Writer,
    settings: PrepareSettings,
    benchmarks: Benchmarks,
    too_long: Callable[[str, Conversation], str | None],
    grader: Grader,
    show: Callable[[str], None],
) -> None:
    """Every problem is kept, or dropped for the first reason that there is."""
    for number, (candidate, copies, others) in enumerate(candidates, 1):
        if number % (TOLD_EVERY // 10) == 0:
            show(f"{number:,} of {counted(len(candidates), 'problem')} looked at")
        bare = candidates.shared.without(candidate.turns)
        all_rows = [*candidates.row_of(candidate), *copies]
        turns = bare if settings.drop_instruction else candidate.turns
        if any(not _same(grader, candidate.answers, other) for other in others):
            answers = {
                ", ".join(answers): place for answers, place in {candidate.answers: candidate.place, **others}.items()
            }
            writer.drop(CONFLICT, candidate, all_rows, answers=answers)
        elif (found := benchmarks.find(bare[-1].content)) is not None:
            told = {"benchmark": found.place, "benchmark_text": found.text, "share": round(found.share, 3)}
            writer.drop(EXACT if found.is_exact else NEAR, candidate, all_rows, **told)
        elif (told_length := too_long(candidate.place, turns)) is not None:
            writer.drop(TOO_LONG, candidate, all_rows, told=told_length)
        else:
            writer.keep(candidate, copies, turns)


def _same(grader: Grader, one: tuple[str, ...], other: tuple[str, ...]) -> bool:
    return same_answers(grader, one, other) and same_answers(grader, other, one)


def _limit(settings: PrepareSettings) -> Callable[[str, Conversation], str | None]:
    """Says how a prompt is too long; None: it is not."""
    model, prompts = settings.model, settings.prompts
    if model is None:
        return lambda place, turns: None
    from megatron_sead.prompts.dataset import prompt_tokens  # here: transformers takes seconds to import
    from megatron_sead.prompts.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(model, "model")
    limits = {"prompts.max_prompt_tokens": prompts.max_prompt_tokens, "the model's context": tokenizer.context_length}

    def too_long(place: str, turns: Conversation) -> str | None:
        count = len(prompt_tokens(with_instruction(turns, prompts.instruction), place, prompts, tokenizer))
        over = [f"{name}={most}" for name, most in limits.items() if most is not None and count > most]
        return f"{count} tokens, more than {' and '.join(over)}" if over else None

    return too_long


def _read_benchmarks(settings: PrepareSettings, paths: list[str]) -> tuple[Benchmarks, list[dict[str, Any]]]:
    known, described = Benchmarks(settings.overlap_ngram, settings.overlap_share), []
    for path in paths:
        count = 0
        for place, text in read_benchmark(path, settings.benchmark_field):
            known.add(place, text)
            count += 1
        described.append({"path": path, "problems": count} | _fingerprint(path))
    return known, described


def _fingerprint(path: str) -> dict[str, Any]:
    """Of a file; a hub data set has none but its rows."""
    if not os.path.isfile(path):
        return {}
    with open(path, "rb") as file:
        return {"bytes": os.path.getsize(path), "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _provenance(
    settings: PrepareSettings, benchmarks: list[dict[str, Any]], candidates: Candidates, writer: _Writer
) -> dict[str, Any]:
    """No dates: the same input and settings make the same file."""
    prompts = settings.prompts
    source = {"path": prompts.path, "rows": candidates.rows, "content": f"sha256 {candidates.content}"}
    return {
        "written_by": f"megatron_sead {__version__}, sead prepare",
        "input": source | _fingerprint(prompts.path),
        "counts": {
            reason: {"rows": writer.rows[reason], "problems": writer.problems[reason]} for reason in (KEPT, *REASONS)
        },
        "benchmarks": benchmarks,
        "every_prompt": {"begins": candidates.shared.begins, "ends": candidates.shared.ends},
        "settings": settings.model_dump(mode="json"),
        "grader_version": GRADER_VERSION,
    }


def _nothing_left(writer: _Writer, rows: int, settings: PromptSettings) -> UserError:
    counts = ", ".join(f"{writer.rows[reason]:,} {reason}" for reason in REASONS if writer.rows[reason])
    first = f"; the first: {writer.first_fault}" if writer.first_fault else ""
    return UserError(f"input={settings.path}: no prompt is left of {counted(rows, 'row')} ({counts}){first}")


def _print(output: Path, candidates: Candidates, writer: _Writer, settings: PrepareSettings) -> None:
    table = Table("", "rows", "problems", title=f"{settings.prompts.path}: {counted(candidates.rows, 'row')}")
    for reason in (*REASONS, KEPT):
        if writer.rows[reason] or reason == KEPT:
            table.add_row(reason, f"{writer.rows[reason]:,}", f"{writer.problems[reason]:,}")
    console = Console()
    console.print(table)
    begins, ends = (" ".join(lines.split()) for lines in (candidates.shared.begins, candidates.shared.ends))
    if (begins or ends) and not settings.drop_instruction:
        console.print(
            f"note: every prompt begins with {begins!r} and ends with {ends!r}: an instruction, which a run need not "
            "append; drop_instruction=true leaves it out",
            markup=False,
        )
    if writer.new_ids:
        console.print(f"note: {writer.new_ids} problems had the id of another; theirs are made of their texts")
    if writer.without:
        names = ", ".join(sorted(writer.without))
        console.print(f"note: left out, as JSON cannot hold it: {names}", markup=False)
    console.print(
        f"{output}: {counted(writer.problems[KEPT], 'prompt')}; what was dropped, and why, is in "
        f"{beside(output, 'dropped.jsonl').name}",
        markup=False,
        soft_wrap=True,
    )


def beside(output: Path, name: str) -> Path:
    return output.with_name(f"{output.name}.{name}")


@contextmanager
def being_written(*paths: Path) -> Iterator[list[IO[str]]]:
    """Files that get their names, in this order, when the body has ended; they vanish when it fails.

    Raises:
        UserError: something has one of the names meanwhile.
    """
    temporaries: list[Path] = []
    try:
        with ExitStack() as stack:
            files: list[IO[str]] = []
            for path in paths:
                temporary = path.with_name(f"{path.name}.{os.getpid()}.writing")
                require_free(temporary)
                temporaries.append(temporary)  # before it is there: an interrupt in between would leave it
                files.append(stack.enter_context(temporary.open("x", encoding="utf-8")))
            yield files
        for path in paths:
            require_free(path)
        for temporary, path in zip(temporaries, paths, strict=True):
            os.replace(temporary, path)
    finally:
        for temporary in temporaries:
            temporary.unlink(missing_ok=True)


@contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("reading", total=None)
        yield lambda text: bar.update(task, description=text)
