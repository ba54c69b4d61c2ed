"""A prompt set in a file that all ranks of a node map into memory: it is read and tokenized once, and held once."""

from __future__ import annotations

import json
import mmap
import os
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import overload

import numpy as np

from megatron_sead.prompts.dataset import Prompt


class PromptTable(Sequence[Prompt]):
    """Prompts by number; each is made when it is asked for. The file may be deleted once this is there.

    Raises:
        OSError: there is no such file.
    """

    def __init__(self, path: Path) -> None:
        with open(path, "rb") as file:
            self._file = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.longest, count = map(int, np.frombuffer(self._file, np.int64)[-2:])  # tokens of the longest for a model
        numbers = np.frombuffer(self._file, np.int64, 4 * count + 1, len(self._file) - 8 * (4 * count + 3))
        self._starts = numbers[: count + 1]
        self._difficulties = numbers[count + 1 : 2 * count + 1].view(np.float64)
        self._keys = numbers[2 * count + 1 : 3 * count + 1]  # of ids, sorted
        self._places = numbers[3 * count + 1 :]  # of these ids' prompts

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, index: int) -> Prompt: ...
    @overload
    def __getitem__(self, index: slice) -> list[Prompt]: ...
    def __getitem__(self, index: int | slice) -> Prompt | list[Prompt]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        return _prompt(self._file[self._starts[index] : self._starts[index + 1]])

    def __iter__(self) -> Iterator[Prompt]:
        return (self[number] for number in range(len(self)))

    @property
    def difficulties(self) -> list[float | None]:
        """One a prompt; None where it was never measured."""
        return [None if difficulty != difficulty else difficulty for difficulty in self._difficulties.tolist()]

    def find(self, prompt_id: str) -> int | None:
        """The number of the prompt with this id; None: there is none."""
        key = _key(prompt_id)
        at = int(np.searchsorted(self._keys, key))
        while at < len(self) and self._keys[at] == key:
            if self[int(self._places[at])].id == prompt_id:
                return int(self._places[at])
            at += 1
        return None


def write_table(prompts: Iterable[Prompt]) -> Path:
    """Write what `PromptTable` reads into a new file of the folder for temporary files (TMPDIR).

    Raises:
        OSError: the disk refuses; nothing is left then.
    """
    descriptor, name = tempfile.mkstemp(prefix="megatron_sead-prompts-")
    try:
        with os.fdopen(descriptor, "wb") as file:
            starts, difficulties, keys, longest = array("q", [0]), array("d"), array("q"), 0
            for prompt in prompts:
                record = _record(prompt)
                file.write(record)
                starts.append(starts[-1] + len(record))
                difficulties.append(float("nan") if prompt.difficulty is None else prompt.difficulty)
                keys.append(_key(prompt.id))
                longest = max(longest, len(prompt.student_token_ids), len(prompt.teacher_token_ids))
            file.write(b"\0" * (-starts[-1] % 8))
            order = np.argsort(np.frombuffer(keys, np.int64), kind="stable").astype(np.int64)
            for numbers in (starts, difficulties, np.frombuffer(keys, np.int64)[order], order):
                file.write(numbers.tobytes())
            file.write(np.array([longest, len(keys)], np.int64).tobytes())
    except BaseException:
        os.unlink(name)
        raise
    return Path(name)


def _record(prompt: Prompt) -> bytes:
    student, teacher = prompt.student_token_ids, prompt.teacher_token_ids
    differ = teacher != student
    fields = [prompt.id, prompt.text, prompt.answers, prompt.difficulty, prompt.level, len(student), differ]
    return json.dumps(fields).encode() + b"\n" + array("i", [*student, *teacher] if differ else student).tobytes()


def _prompt(record: bytes) -> Prompt:
    fields, _, tokens = record.partition(b"\n")
    name, text, answers, difficulty, level, length, differ = json.loads(fields)
    numbers = tuple(array("i", tokens))
    student = numbers[:length]
    return Prompt(name, text, tuple(answers), difficulty, level, student, numbers[length:] if differ else student)


def _key(prompt_id: str) -> int:
    return int.from_bytes(blake2b(prompt_id.encode(), digest_size=8).digest(), "little", signed=True)
