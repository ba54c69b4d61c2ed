"""Rollouts by vLLM inside the training ranks: it sleeps while the student trains, and wakes to new weights."""

from __future__ import annotations

import gc
import math
import os
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar
from unittest.mock import patch
from uuid import uuid4

import numpy
import torch
import torch.distributed as dist
from pydantic import ValidationError

from megatron_sead.config.rollouts import VllmRollouts
from megatron_sead.errors import NotFiniteNumbers, UserError
from megatron_sead.models.family import read_config_fields
from megatron_sead.models.weight_tables import HEAD
from megatron_sead.models.weights import named_weights, tensor_shapes
from megatron_sead.rollouts.engine import (
    EngineContext,
    EngineFailed,
    GenerationRequest,
    Meanwhile,
    RanksUnreachable,
    Rollout,
    Sampling,
)
from megatron_sead.rollouts.new_weights import arriving
from megatron_sead.rollouts.sampling import request_seed
from megatron_sead.rollouts.sharing import gather_written, share_of

NEEDED = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}  # in this process: the weights need not travel
# Unless the user says otherwise: quiet, as it logs a page a rank; and without pinning this process, which also trains,
# to cores of vLLM's choice.
PREFERRED = {
    "VLLM_LOGGING_LEVEL": "CRITICAL",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
}
REPEATED = "repetition_detected"  # vLLM's reason
PATIENCE = timedelta(seconds=20)  # in which ranks that compute in step have failed alike
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
ValueT = TypeVar("ValueT")


class VllmEngine:
    """A replica is `tensor_parallel_size` neighbouring ranks with one copy of the model; replicas share the work.

    Args:
        settings: the run's group of settings.
        context: the model, and what ends a response. Its group holds all ranks that torchrun started; without one this
            process is alone.

    Raises:
        UserError: ranks that do not divide into replicas; a model, or memory, with which vLLM does not start.
    """

    has_weights = True

    def __init__(self, settings: VllmRollouts, context: EngineContext) -> None:
        self._group = context.group
        rank, size = (0, 1) if context.group is None else (context.group.rank(), context.group.size())
        shared = settings.tensor_parallel_size
        if size % shared:
            raise UserError(f"rollouts.tensor_parallel_size={shared}: must divide the number of ranks, {size}")
        self._replica, self._replicas = rank // shared, size // shared
        self._speaks = rank % shared == 0  # a replica's ranks all have the same responses
        self._seed = context.seed
        self._stop = sorted(context.stop_token_ids)
        self._repetition = (settings.repetition_period, settings.repetition_count)
        self._sampling = Sampling(settings.temperature, settings.top_p, settings.max_new_tokens)
        self._directory = context.directory
        self._sleeps_for_real = context.device.type == "cuda"  # on a CPU vLLM cannot
        self._asleep = False
        self._peers = _replica_group(size, shared, self._replica) if shared > 1 else None
        self._unreachable = False
        os.environ.update({**PREFERRED, **os.environ, **NEEDED})
        from vllm import LLM  # seconds, and it changes transformers' classes: only where a run uses it

        arguments = llm_arguments(settings, context, self._sleeps_for_real)
        with (
            _random_numbers_kept(context.device),
            _as_launched(rank, context.device),
            _shared_memory_of(None if self._sleeps_for_real else self._peers),
        ):
            self._llm: Any = self._guarded(lambda: LLM(str(context.directory), **arguments))
        if context.vocab_size not in (None, size := self._llm.model_config.get_vocab_size()):
            raise UserError(
                f"rollouts.engine='vllm': draws from all {size} tokens of {context.directory}, not from "
                f"{context.vocab_size} of them; take rollouts.engine=transformers"
            )
        # On a CPU vLLM keeps the matrices in another form alone, and computes with that
        (self._packed,) = self._llm.apply_model(lambda model: any(w.numel() == 0 for w in model.parameters()))

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the tensors that an update holds: what the files hold under a second name comes once."""
        return tensor_shapes(list(named_weights(SimpleNamespace(**read_config_fields(self._directory)))))

    def generate(
        self,
        requests: list[GenerationRequest],
        step: int,
        sampling: Sampling | None = None,
        meanwhile: Meanwhile | None = None,
    ) -> list[Rollout]:
        """Collective over the group: each rank passes the same requests and receives all rollouts, in their order.

        Raises:
            NotFiniteNumbers: on every rank: the model's logits are not finite for one of the prompts.
            EngineFailed: on every rank: vLLM could not write them.
        """
        mine = share_of(requests, self._replica, self._replicas)
        written: dict[int, Rollout] = {}
        problem: UserError | None = None
        try:
            rollouts = self._write([requests[i] for i in mine], step, sampling or self._sampling)
            written = dict(zip(mine, rollouts, strict=True))
        except RanksUnreachable:
            raise
        except UserError as error:  # the other replicas are still writing
            problem = error
        return gather_written(written if self._speaks else {}, problem, len(requests), self._group, meanwhile)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """New weights, copied in place; or a module at a time, where vLLM has packed what it computes with.

        Raises:
            ValueError: as `arriving` does.
            EngineFailed: vLLM does not take them.
        """
        with arriving(weights, self._shapes) as pairs:
            self._guarded(lambda: self._take_packed(pairs) if self._packed else self._take_in_place(pairs))
        if self._sleeps_for_real:
            self._guarded(lambda: self._llm.wake_up(tags=["kv_cache"]))

    def _take_in_place(self, pairs: Iterator[tuple[str, torch.Tensor]]) -> None:
        self._llm.apply_model(lambda model: model.load_weights(pairs))

    def _take_packed(self, pairs: Iterator[tuple[str, torch.Tensor]]) -> None:
        self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": pairs})
        if HEAD not in self._shapes:  # a head that is the embedding does not come, and vLLM packs what has come
            self._llm.apply_model(_pack_heads)

    def score(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Log-probabilities [len(token_ids) - 1] fp32 of each token after the first, given those before it."""
        from vllm import SamplingParams

        asked = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        (output,) = self._together(
            lambda: self._llm.generate([{"prompt_token_ids": list(token_ids)}], asked, use_tqdm=False)
        )
        rows = zip(output.prompt_logprobs[1:], token_ids[1:], strict=True)
        return torch.tensor([row[token].logprob for row, token in rows])

    def sleep(self) -> None:
        """Weights and cache are let go: new weights follow, and a copy on the host would cost as much time."""
        if self._sleeps_for_real and not self._asleep:
            self._guarded(lambda: self._llm.sleep(level=2))
            self._asleep = True

    def wake(self) -> None:
        """Room for the weights; the cache's is taken when they have come, and what brought them has gone."""
        if self._asleep:
            self._guarded(lambda: self._llm.wake_up(tags=["weights"]))
            self._asleep = False

    def close(self) -> None:
        """Give everything back, all but the ranks' process group, which is the trainer's."""
        if self._llm is None or self._unreachable:
            return
        from vllm.distributed import parallel_state

        # vLLM ends with torch.distributed.destroy_process_group(), whoever made the group
        ours = self._group is not None
        with patch.object(parallel_state, "destroy_distributed_environment", lambda: None) if ours else nullcontext():
            self._llm.llm_engine.engine_core.shutdown()
        self._llm = None
        gc.collect()

    def _write(self, requests: list[GenerationRequest], step: int, sampling: Sampling) -> list[Rollout]:
        prompts = [{"prompt_token_ids": list(request.prompt_token_ids)} for request in requests]
        parameters = [self._parameters(request, step, sampling) for request in requests]
        outputs = self._together(lambda: self._llm.generate(prompts, parameters, use_tqdm=False)) if requests else []
        return [_rollout(request, output.outputs[0]) for request, output in zip(requests, outputs, strict=True)]

    def _parameters(self, request: GenerationRequest, step: int, sampling: Sampling) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RepetitionDetectionParams

        period, count = self._repetition
        return SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_tokens=sampling.max_new_tokens,
            seed=request_seed(self._seed, step, request),
            logprobs=0,  # of the chosen token alone
            ignore_eos=True,  # what ends a response is the run's to say
            stop_token_ids=self._stop,
            repetition_detection=(
                None if period is None else RepetitionDetectionParams(max_pattern_size=period, min_count=count)
            ),
            detokenize=False,
        )

    def _together(self, call: Callable[[], ValueT]) -> ValueT:
        """What a call returns that the ranks of a replica compute in step.

        Raises:
            EngineFailed: vLLM's error on this rank, and no other waits for it within the call.
            RanksUnreachable: others do.
        """
        try:
            answer = self._guarded(call)
        except EngineFailed as error:
            self._meet(error)
            raise
        self._meet(None)
        return answer

    def _meet(self, problem: EngineFailed | None) -> None:
        """Wait for the other ranks of the replica; but not for long with a problem, which they may never hear of."""
        if self._peers is None:
            return
        all_there = dist.barrier(self._peers, async_op=True)
        assert all_there is not None  # None is for ranks outside of the group
        if problem is None:
            all_there.wait()
            return
        try:
            all_there.wait(PATIENCE)
        except RuntimeError:
            self._unreachable = True
            raise RanksUnreachable(
                f"{problem}; the other ranks with this copy of the model still wait in it for rank {dist.get_rank()}, "
                "so that nothing can be saved; the same command continues from what is saved already"
            ) from problem

    def _guarded(self, call: Callable[[], ValueT]) -> ValueT:
        """vLLM's errors are of many kinds, and its engine is of no use after one."""
        try:
            return call()
        except UserError:
            raise
        except Exception as error:
            # pydantic's first line only counts what is wrong
            told = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
            line = next(iter(told.splitlines()), "")
            raise EngineFailed(f"rollouts.engine='vllm': {type(error).__name__}: {line}") from error


def llm_arguments(settings: VllmRollouts, context: EngineContext, sleeps: bool) -> dict[str, Any]:
    """What LLM is told beside the model's directory."""
    return {
        "dtype": DTYPES[context.dtype],
        "seed": context.seed % 2**32,  # numpy takes no more; each request has its own
        "logprobs_mode": "raw_logprobs",  # before temperature and top_p, as the student's are
        "skip_tokenizer_init": True,  # requests are tokens, and so are responses
        "tensor_parallel_size": settings.tensor_parallel_size,
        "distributed_executor_backend": None if context.group is None else "external_launcher",
        "enable_sleep_mode": sleeps,
        # A prompt found there is computed in other pieces: the last bits would depend on who came first
        "enable_prefix_caching": False,
        "enforce_eager": settings.enforce_eager,
        "gpu_memory_utilization": settings.gpu_memory_utilization,
        "max_num_seqs": settings.batch_size,
        "max_model_len": context.max_length,
        "generation_config": "vllm",
        "use_tqdm_on_load": False,
    } | _limits(settings, context)


def _pack_heads(model: torch.nn.Module) -> None:
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    for module in model.modules():
        if isinstance(module, ParallelLMHead):
            module.quant_method.process_weights_after_loading(module)


def _replica_group(ranks: int, shared: int, replica: int) -> dist.ProcessGroup:
    """The ranks of this replica, over gloo. Collective over all ranks, each of which makes all groups."""
    groups = [dist.new_group(list(range(start, start + shared)), backend="gloo") for start in range(0, ranks, shared)]
    return groups[replica]


@contextmanager
def _as_launched(rank: int, device: torch.device) -> Iterator[None]:
    """vLLM asks torchrun's variables who it is, which another launcher, or none, may not have set."""
    local = os.environ.get("LOCAL_RANK", "0") if device.index is None else str(device.index)
    with patch.dict(os.environ, {"RANK": str(rank), "LOCAL_RANK": local}):
        yield


@contextmanager
def _shared_memory_of(peers: dist.ProcessGroup | None) -> Iterator[None]:
    """The memory over which a replica's ranks on a CPU compute: of a name that no other run has, and gone with them.

    vLLM names it by the numbers of its ranks. Two runs on a machine would write into the same memory, and what a killed
    run leaves behind would keep all later ones from starting. Collective over the replica; None: it shares nothing.
    """
    if peers is None:
        yield
        return
    from vllm.distributed.device_communicators.cpu_communicator import _CPUSHMDistributed as SharedMemory

    names = [f"vllm-{uuid4().hex}"]
    dist.broadcast_object_list(names, group=peers, group_src=0)
    with patch.object(SharedMemory, "make_group_name", staticmethod(lambda ranks: f"/{names[0]}-{ranks.unique_name}")):
        yield
    for name in Path("/dev/shm").glob(f"{names[0]}-*"):  # all ranks have opened it, and need no name any more
        name.unlink(missing_ok=True)


@contextmanager
def _random_numbers_kept(device: torch.device) -> Iterator[None]:
    """vLLM seeds this process anew when it starts; the student's numbers go on as if it had not."""
    python, array = random.getstate(), numpy.random.get_state()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield
    random.setstate(python)
    numpy.random.set_state(array)


def _limits(settings: VllmRollouts, context: EngineContext) -> dict[str, Any]:
    """What LLM is told of memory and of the tokens in a forward pass."""
    limits: dict[str, Any] = {"max_num_batched_tokens": settings.max_num_batched_tokens}
    if settings.kv_cache_memory_bytes is not None:
        limits["kv_cache_memory_bytes"] = settings.kv_cache_memory_bytes
    if context.device.type == "cpu" and context.max_length is not None:
        # Between two pieces of a prompt vLLM sets the request's random numbers back, which those of a CPU cannot be
        limits["enable_chunked_prefill"] = False
        limits["max_num_batched_tokens"] = max(settings.max_num_batched_tokens, context.max_length)
    return limits


def _rollout(request: GenerationRequest, written: Any) -> Rollout:
    tokens = tuple(written.token_ids)
    log_probs = tuple(row[token].logprob for row, token in zip(written.logprobs, tokens, strict=True))
    wrong = next((place for place, value in enumerate(log_probs) if value is None or not math.isfinite(value)), None)
    if wrong is not None:
        raise NotFiniteNumbers(
            f"rollout of prompt {request.prompt_id!r}: the model's logits of token {wrong} are not finite"
        )
    repeated = written.stop_reason == REPEATED
    finished = written.finish_reason == "stop" and not repeated
    return Rollout(request.prompt_id, request.sample, request.prompt_token_ids, tokens, finished, log_probs, repeated)


def make(settings: VllmRollouts, context: EngineContext) -> VllmEngine:
    """As the registry asks for it."""
    return VllmEngine(settings, context)
