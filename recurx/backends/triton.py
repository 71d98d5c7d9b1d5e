"""backend="triton": the recursion in Triton kernels (kernels/), on NVIDIA and AMD GPUs.

Four ways to run; `LaunchPlan.pick` (recurx/plan/triton.py) predicts which, `auto` times them:

    tiled        slices of the batch, small enough that their activations stay in L2 for the whole
                 recursion; the kernels of all calls of a slice are captured in one CUDA graph
    library      the same, but PyTorch's own products with pointwise kernels between them
    graph        the same, but all is PyTorch's: what differs from TRM and HRM
    persistent   small nets: one launch, each program owns whole samples and runs every call

Weights are rounded to the states' dtype at every call, by one launch before the kernels or the
replay of a captured graph, always into the same buffers. `recurx.solve` rounds them once.

Inside somebody else's capture (of a whole training step, say) nothing kept is used: the rounding
and plain launches become part of that graph, and so do the buffers, which thus live as long as it.
As always with CUDA graphs, the same call must have run once before.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from recurx.backends import EVERY_FIELD, Backend, Window
from recurx.backends.graph_slice import GraphSlice
from recurx.backends.graphs import (
    Capture,
    Recording,
    RecordingCache,
    captured_outside,
    cuda_capture,
    stream_of,
)
from recurx.backends.weight_cache import WeightCache, frozen
from recurx.kernels.arena import slots_of
from recurx.kernels.fields import FIELDS, why_not_trained
from recurx.operands import Operands, Span
from recurx.packed import PackedNets
from recurx.plan.device import Device
from recurx.plan.launch import LaunchPlan
from recurx.plan.triton import why_no_kernel, why_not_tiled
from recurx.plan.triton_persistent import why_not as why_not_persistent
from recurx.problem import Problem
from recurx.program import lower
from recurx.schedule import FACTORS

MAX_TAPES = 16  # sets of nets kept rounded; a full-size TRM net is 14 MB in bf16
# Each holds a slice's activations (tens of MB) and its graph; a batch that shrinks in
# `recurx.solve` asks for one of each power of two.
MAX_RECORDINGS = 12
OLDEST = (3, 6)  # of Triton: the first whose code these kernels are tested with
DTYPES = (torch.bfloat16, torch.float32)


class Triton(Backend):
    name = "triton"
    device_types = ("cuda",)
    kinds = ("tiled", "library", "persistent", "graph")

    def __init__(self) -> None:
        self.tapes = WeightCache(MAX_TAPES)
        self.recordings = RecordingCache(MAX_RECORDINGS)

    @property
    def fields(self) -> frozenset[str]:  # type: ignore[override]
        every = self.kind in ("", "graph")
        return EVERY_FIELD if every else FIELDS.get(self.kind, frozenset()).union(FACTORS)

    def why_unavailable(self) -> str | None:
        if not torch.cuda.is_available():
            return "needs a GPU; torch sees none (no device, no driver, or a build without CUDA)"
        return why_no_triton()

    def why_unsupported(self, problem: Problem) -> str | None:
        if problem.dtype not in DTYPES:
            return f"runs float32 and bfloat16 states, not {problem.dtype}"
        if self.kind in ("", "graph") and problem.changed:
            return None
        if self.kind == "graph":
            return "graph: runs what differs from TRM and HRM; library has fewer kernels for these"
        if (why := why_no_kernel(problem)) is not None or self.kind in ("", "library"):
            return why
        if self.kind == "tiled":
            return why_not_tiled(problem)
        return why_not_persistent(problem, self.plan_device(problem.device_type))

    def plan(self, problem: Problem, device: torch.device) -> LaunchPlan:
        """How `run` would run it on `device`."""
        return _pick(problem, self.plan_device(device), self.name)

    def plan_device(self, device: torch.device | str) -> Device:
        return Device.of(device)

    def run(self, problem: Problem, operands: Operands, span: Span) -> list[Tensor]:
        x, states = operands.x.detach(), tuple(state.detach() for state in operands.states)
        if problem.batch == 0 or span.start == span.stop:
            return [state.clone() for state in states]
        operands = operands._replace(x=x, states=states, rope=operands.float_rope())
        plan = self.plan(_of_rung(problem) if frozen() else problem, x.device)
        with torch.cuda.device_of(x):  # Triton launches on the current device
            if plan.kind == "persistent":
                return self._run_persistent(plan, problem, operands, span)
            return self._run_sliced(plan, problem, operands, span)

    def window(self, problem: Problem) -> Window | None:
        from recurx.backends.triton_window import TritonWindow

        changed = bool(problem.changed_blocks)
        if self.kind in ("persistent", "graph") or (changed and self.kind == "tiled"):
            return None
        if problem.changed and (why_not_trained(problem) or why_no_kernel(problem)) is not None:
            return None
        library = self.kind == "library" or why_not_tiled(problem) is not None
        return TritonWindow(self.packed_nets, library, changed)

    def free(self) -> None:
        self.tapes.clear()
        self.recordings.clear()

    def packed_nets(
        self, problem: Problem, weights: Sequence[Tensor], kind: Callable[..., Any] = PackedNets
    ) -> Any:
        """The weights of all nets rounded to the problem's dtype, in buffers that stay."""
        device = weights[0].device if weights else torch.device(problem.device_type)

        def make(before: Any) -> Any:
            packed = kind(problem.nets, problem.dtype, device) if before is None else before
            return packed.fill(weights)

        if captured_outside(device):
            return make(None)
        # The buffers of a stream are written and read in its order alone.
        key = (kind, problem.nets, problem.dtype, device, stream_of(device))
        return self.tapes.get(key, weights, make)

    def _capture(self, device: torch.device) -> Capture | None:
        return None if captured_outside(device) else cuda_capture

    # ---- the ways ----------------------------------------------------------------------------

    def _run_sliced(
        self, plan: LaunchPlan, problem: Problem, operands: Operands, span: Span
    ) -> list[Tensor]:
        device, size, made_of = operands.x.device, int(plan["slice"]), _slices(plan.kind)
        packed = self.packed_nets(problem, operands.weights, made_of.weights)
        inside, capture = captured_outside(device), self._capture(device)

        def make() -> Recording:
            buffers = made_of(problem, span, packed, size, operands)
            return Recording(buffers, buffers.launch)

        calls: Any = lower(problem.schedule, span) if plan.kind != "graph" else (
            # It holds the numbers of its calls, and what PyTorch is set to.
            problem.schedule, span, torch.backends.cuda.matmul.allow_tf32
        )  # fmt: skip
        rope = operands.rope
        key = (
            plan.kind, problem.nets, calls, size, problem.tokens, problem.dtype, device, id(packed),
            rope and rope[0].shape, operands.seed is None or span, stream_of(device),
        )  # fmt: skip
        outputs = [torch.empty_like(state) for state in operands.states]
        with self.recordings.lock:
            recording = make() if inside else self.recordings.get(key, make)
            for first in range(0, problem.batch, size):
                live = slice(first, min(first + size, problem.batch))
                recording.buffers.enter(operands, live)
                recording.run(capture)
                recording.buffers.leave([tensor[live] for tensor in outputs])
        return outputs

    def _run_persistent(
        self, plan: LaunchPlan, problem: Problem, operands: Operands, span: Span
    ) -> list[Tensor]:
        from recurx.kernels.recursion import recursion

        packed = self.packed_nets(problem, operands.weights)
        inputs, program = (operands.x, *operands.states), lower(problem.schedule, span)
        arena = operands.x.new_empty(slots_of(program), *operands.x.shape)
        torch._foreach_copy_(list(arena[: len(inputs)]), list(inputs))
        recursion(arena, program, packed, operands.rope, dict(plan.settings), operands.seed)
        outputs = [torch.empty_like(state) for state in operands.states]
        torch._foreach_copy_(outputs, list(arena[1 : len(inputs)]))
        return outputs


def _slices(kind: str) -> Any:
    """What a kind of plan runs on a slice of the batch."""
    if kind == "graph":
        return GraphSlice
    if kind == "library":
        from recurx.kernels.library import LibrarySlice

        return LibrarySlice
    from recurx.kernels.tiled import TiledSlice

    return TiledSlice


@functools.lru_cache(maxsize=256)
def _of_rung(problem: Problem) -> Problem:
    """With the next power of two for a batch. In `recurx.solve` samples leave the batch one by one,
    and slices cut for each of its sizes would be as many graphs to capture."""
    return dataclasses.replace(problem, batch=1 << (problem.batch - 1).bit_length())


@functools.lru_cache(maxsize=256)
def _pick(problem: Problem, device: Device, name: str) -> LaunchPlan:
    """`LaunchPlan.pick`, remembered: it costs more than a launch."""
    return LaunchPlan.pick(problem, device, name)


@functools.cache
def why_no_triton() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "needs the package triton, which is not installed; CUDA builds of torch bring it"
    import triton

    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version < OLDEST:
        wanted = ".".join(map(str, OLDEST))
        return f"needs triton {wanted} or newer, this is {triton.__version__}"
    return None


BACKEND = Triton()
