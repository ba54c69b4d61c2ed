"""Saving a run and continuing it: weights, optimizer, schedule, generators, and the run's own state.

A checkpoint is a folder ``step-00000050`` of Megatron-Core's ``torch_dist`` format, readable under any layout, with
``run_state.pt`` (plain values), ``inputs.json`` (fingerprints) and ``manifest.json``. It is written as
``.step-00000050`` and renamed when whole, so a folder with a checkpoint's name is whole unless something happened to
it since; that is checked before it is read.
"""

from __future__ import annotations

import itertools
import json
import logging
import queue
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import megatron.core
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.strategies import filesystem_async
from torch.distributed.checkpoint import CheckpointException

from megatron_sead.checkpoints.manifest import (
    FILE_NAME,
    STEP,
    Damage,
    Manifest,
    compare_file,
    describe_files,
    find_damage,
    from_all_ranks,
    from_first_rank,
    read_manifest,
    write_manifest,
)
from megatron_sead.checkpoints.optimizer_state import give_every_parameter_a_state, loading_into
from megatron_sead.checkpoints.random_state import random_state, restore_random_state
from megatron_sead.checkpoints.torch_dist_reader import TorchDistCheckpoint, plain_values, restricted_loading
from megatron_sead.errors import UserError
from megatron_sead.files.durable import rename_directory
from megatron_sead.files.outputs import delete_unfinished
from megatron_sead.parallel.context import ParallelContext
from megatron_sead.wording import counted

log = logging.getLogger(__name__)

STATE_FILE = "run_state.pt"
INPUTS_FILE = "inputs.json"


class CheckpointStore:
    """The checkpoints of one run. Every method is collective over all ranks.

    Args:
        directory: holds them, shared by all ranks; made when first needed.
        keep: so many stay on disk.
        files: saves and loads tensors, as Megatron-Core's `dist_checkpointing` does.
    """

    def __init__(self, directory: Path, keep: int, parallel: ParallelContext, files: Any = dist_checkpointing) -> None:
        self.directory = directory
        self.keep = keep
        self.parallel = parallel
        self._files = files
        self.damaged: set[str] = set()  # names, known since `load_latest`

    def save(
        self,
        step: int,
        chunks: list[Any],
        optimizer: Any,
        scheduler: Any,
        state: dict[str, Any],
        inputs: dict[str, Any],
    ) -> None:
        """Write a checkpoint; then delete the files of all but the newest `keep`, and of those found damaged.

        Args:
            step: steps done.
            chunks: this rank's model chunks, without DDP.
            state: numbers, strings, tensors, in lists, tuples and dictionaries. The first rank's is written.
            inputs: JSON, what the run computes from, for `recorded_inputs`. The first rank's is written.

        Raises:
            UserError: the disk is full or refuses.
        """
        name = f"step-{step:08d}"
        temporary = self.directory / f".{name}"
        self._on_first_rank(lambda: self._clear_for(temporary))
        give_every_parameter_a_state(optimizer)
        content = self._sharded_model(chunks)
        content["optimizer"] = optimizer.sharded_state_dict(content, metadata=self._format())
        _start_no_manager_process()
        try:
            self._files.save(content, str(temporary))
        except OSError as error:
            raise self._refusal(error) from error
        except CheckpointException as error:  # on every rank: what the writers of some ranks met, a full disk mostly
            first, _ = next(iter(error.failures.values()))
            raise self._refusal(first) from error
        plain = {"state": state, "scheduler": scheduler.state_dict()}
        generators = from_all_ranks(random_state(), self.parallel.control)
        self._on_first_rank(lambda: torch.save(plain | {"generators": generators}, temporary / STATE_FILE))
        self._on_first_rank(lambda: _write_text(temporary / INPUTS_FILE, json.dumps(inputs)))
        files = describe_files(temporary, self.parallel.control)
        manifest = Manifest(step, megatron.core.__version__, _layout(self.parallel), files)
        self._on_first_rank(lambda: self._finish(temporary, manifest))

    def load_latest(self, chunks: list[Any], optimizer: Any, scheduler: Any) -> dict[str, Any] | None:
        """Continue from the newest whole checkpoint: fills chunks, optimizer, scheduler and generators.

        A damaged one is passed over, with a line in the log. Generators continue under the layout that saved them;
        under another they stay as they are.

        Returns:
            The state that `save` was given; None when the run has no checkpoint yet.

        Raises:
            UserError: there are checkpoints, and none is whole; or the newest whole one needs a newer Megatron-Core.
        """
        found = self._newest_whole()
        if found is None:
            return None
        path, manifest = found
        _refuse_newer_megatron(path, manifest)
        plain = plain_values(path / STATE_FILE)
        with self._only_refusals(path), restricted_loading():
            self.fill(path, chunks, optimizer)
        with self._only_refusals(path, ValueError, RuntimeError):
            scheduler.load_state_dict(plain["scheduler"])
            if manifest.layout == _layout(self.parallel):
                restore_random_state(plain["generators"][self.parallel.rank])
            state: dict[str, Any] = plain["state"]
        self._log("loaded checkpoint %s", path)
        return state

    def fill(self, path: Path, chunks: list[Any], optimizer: Any) -> None:
        """The tensors of a checkpoint into chunks and optimizer."""
        with loading_into(optimizer):
            content = self._sharded_model(chunks)
            content["optimizer"] = optimizer.sharded_state_dict(content, is_loading=True, metadata=self._format())
            loaded = self._files.load(content, str(path))
            for number, chunk in enumerate(chunks):
                chunk.load_state_dict(loaded[f"model{number}"])
            optimizer.load_state_dict(loaded["optimizer"])

    @contextmanager
    def _only_refusals(self, path: Path, *more: type[Exception]) -> Iterator[None]:
        """Turn what reading malformed values can raise into a refusal of the files: checksums do not see who wrote
        them."""
        try:
            yield
        except (LookupError, TypeError, AttributeError, CheckpointingException, CheckpointException, *more) as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            raise UserError(
                f"{path}: is not a checkpoint of this run ({reason}); restore it from a copy, or delete the folder to "
                "continue from the one before it"
            ) from error

    def newest(self) -> Path | None:
        """The newest checkpoint, unread. Collective."""
        names, _ = from_first_rank(self._names(), self.parallel.control)
        return self.directory / names[0] if names else None

    def recorded_inputs(self) -> tuple[str, dict[str, Any] | None]:
        """Name and inputs of the newest checkpoint whose inputs can be read; no tensor is. None: there is none, or it
        is older than they are."""
        found: tuple[str, dict[str, Any] | None] = ("", None)
        if self.parallel.rank == 0:
            found = next(filter(None, (_read_inputs(self.directory / name) for name in self._names()[0])), found)
        return from_first_rank(found, self.parallel.control)

    def _newest_whole(self) -> tuple[Path, Manifest] | None:
        """Find the newest whole checkpoint, the same on every rank: the first rank reads manifests, all ranks read the
        files."""
        names, leftovers = from_first_rank(self._names(), self.parallel.control)
        for name in leftovers:
            self._log("checkpoint %s: was not written to the end; ignored", self.directory / name)
        problems = []
        for name in names:
            path = self.directory / name
            manifest, problem = from_first_rank(_try_manifest(path), self.parallel.control)
            if manifest is not None:
                problem = find_damage(path, manifest, self.parallel.control)
                if problem is None:
                    problem = from_first_rank(self._refused(path), self.parallel.control)
                if problem is None:
                    return path, manifest
            self.damaged.add(name)
            problems.append(f"{name}: {problem}")
            self._log("checkpoint %s is damaged (%s); trying the one before it", path, problem)
        if problems:
            raise UserError(
                f"{self.directory}: of {counted(len(problems), 'checkpoint')} none is whole ({'; '.join(problems)}); "
                "restore one from a copy, or delete the folder to start over"
            )
        return None

    def _refused(self, path: Path) -> str | None:
        """Why the first rank refuses to unpickle files whose checksums fit: anybody can make a manifest that fits."""
        if self.parallel.rank != 0:
            return None
        try:
            TorchDistCheckpoint(path).check_objects()
            for name in ("common.pt", STATE_FILE):  # Megatron-Core 0.19 writes no common.pt
                if (path / name).exists():
                    plain_values(path / name)
        except UserError as refusal:
            return str(refusal)
        return None

    def _names(self) -> tuple[list[str], list[str]]:
        """Checkpoints, newest first, and folders that were not finished."""
        entries = [entry.name for entry in self.directory.iterdir()] if self.directory.is_dir() else []
        checkpoints = [name for name in entries if STEP.fullmatch(name)]
        leftovers = [name for name in entries if name.startswith(".") and STEP.fullmatch(name[1:])]
        return sorted(checkpoints, key=lambda name: int(name[5:]), reverse=True), sorted(leftovers)

    def _clear_for(self, temporary: Path) -> None:
        for name in self._names()[1]:
            path = self.directory / name
            delete_unfinished(path)
            _move_aside(path)
        temporary.mkdir(parents=True)

    def _finish(self, temporary: Path, manifest: Manifest) -> None:
        """Make the temporary folder a checkpoint and delete older ones, on the first rank."""
        write_manifest(temporary, manifest)
        path = self.directory / temporary.name[1:]
        if path.exists():  # damaged, and reached again
            self._delete(path)
        _move_aside(path)
        rename_directory(temporary, path)
        self.damaged.discard(path.name)
        others = [name for name in self._names()[0] if name != path.name]
        whole = [name for name in others if name not in self.damaged and (self.directory / name / FILE_NAME).exists()]
        for name in [*whole[self.keep - 1 :], *self.damaged.intersection(others)]:
            self._delete(self.directory / name)
        self._log("saved checkpoint %s", path)

    def _delete(self, path: Path) -> None:
        """Delete the files that the manifest names, and the folder if it holds no others. Without a manifest nothing
        goes."""
        manifest, _ = _try_manifest(path)
        if manifest is None:
            return
        for name in [*manifest.files, FILE_NAME]:
            if Path(name).name == name:  # a manifest is a file that anybody can write
                (path / name).unlink(missing_ok=True)
        try:
            path.rmdir()
        except OSError:
            self._log("checkpoint %s: deleted, but for files that no run wrote", path)

    def _sharded_model(self, chunks: list[Any]) -> dict[str, Any]:
        return {
            f"model{number}": chunk.sharded_state_dict(metadata=self._format()) for number, chunk in enumerate(chunks)
        }

    def _format(self) -> dict[str, Any]:
        """Megatron's name for the format that any layout can read. It is a new dictionary each time: Megatron writes
        into it."""
        return {"distrib_optim_sharding_type": "fully_reshardable", "dp_cp_group": self.parallel.dp_with_cp}

    def _on_first_rank(self, action: Callable[[], None]) -> None:
        """Do something on the first rank. Every rank goes on when it is done, or raises what the disk refused."""
        refusal = None
        if self.parallel.rank == 0:
            try:
                action()
            except OSError as error:
                refusal = self._refusal(error)
        refusal = from_first_rank(refusal, self.parallel.control)
        if refusal is not None:
            raise refusal

    def _refusal(self, error: BaseException) -> UserError:
        reason = " ".join(str(error).split())
        free = shutil.disk_usage(self.directory).free if self.directory.is_dir() else 0
        return UserError(
            f"{self.directory}: the checkpoint cannot be written ({reason}; {free:,} bytes are free there); "
            "older ones are as they were"
        )

    def _log(self, message: str, *values: Any) -> None:
        if self.parallel.rank == 0:
            log.info(message, *values)


def _start_no_manager_process() -> None:
    """Megatron collects the results of a save through a process of its own, for saving in the background. A save that
    waits needs none: it costs a second, and outlives a rank that is killed, holding the pipes that a caller reads."""
    if getattr(filesystem_async, "_results_queue", ...) is None:
        filesystem_async._results_queue = queue.Queue()


def _layout(parallel: ParallelContext) -> dict[str, int]:
    sizes = {"tensor": parallel.tp_size, "pipeline": parallel.pp_size}
    if parallel.cp_size > 1:
        sizes["context"] = parallel.cp_size
    return sizes | {"virtual": parallel.chunks, "data": parallel.dp_size}


def _move_aside(path: Path) -> None:
    """Rename a folder that still holds files that no run wrote, if there is one."""
    if path.exists():
        names = itertools.chain([f"{path.name}.kept"], (f"{path.name}.kept-{number}" for number in itertools.count(2)))
        path.rename(next(place for place in map(path.with_name, names) if not place.exists()))


def _try_manifest(path: Path) -> tuple[Manifest | None, str | None]:
    try:
        return read_manifest(path), None
    except Damage as damage:
        return None, str(damage)


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _read_inputs(path: Path) -> tuple[str, dict[str, Any] | None] | None:
    """Name and recorded inputs of a checkpoint; None where it is damaged."""
    manifest, _ = _try_manifest(path)
    if manifest is None:
        return None
    if INPUTS_FILE not in manifest.files:
        log.info("checkpoint %s holds no inputs to compare: they are taken to be the same", path)
        return path.name, None
    if compare_file(path / INPUTS_FILE, *manifest.files[INPUTS_FILE]) is not None:
        return None
    try:
        inputs = json.loads((path / INPUTS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return (path.name, inputs) if isinstance(inputs, dict) else None


def _refuse_newer_megatron(path: Path, manifest: Manifest) -> None:
    """Megatron-Core reads what older releases wrote, and fails on newer ones in ways that name no cause."""
    here = megatron.core.__version__
    if _release(manifest.megatron_core) > _release(here):
        raise UserError(
            f"{path}: was written by megatron-core {manifest.megatron_core}, which {here} cannot read; "
            f"install megatron-core {manifest.megatron_core} or newer to continue this run"
        )


def _release(version: str) -> tuple[int, ...]:
    """(major, minor): patch releases keep the format."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])
