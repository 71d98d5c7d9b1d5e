"""backend="triton": the recursion in Triton kernels (kernels/), on NVIDIA and AMD GPUs.

Three ways to run; `LaunchPlan.pick` (recurx/plan/triton.py) predicts which, `auto` times them:

    tiled        slices of the batch, small enough that their activations stay in L2 for the whole
                 recursion; the kernels of all calls of a slice are captured in one CUDA graph
    library      the same, but PyTorch's own products with pointwise kernels between them
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
from collections.abc import Sequence

import torch
from torch import Tensor

from recurx.backends import Backend, Window
from recurx.backends.graphs import (
    Capture,
    Recording,
    RecordingCache,
    captured_outside,
    cuda_capture,
    stream_of,
)
from recurx.backends.weight_cache import WeightCache, frozen
from recurx.nets import ATTENTION
from recurx.operands import Operands, Span
from recurx.packed import PackedNets
from recurx.plan.count import blocks_of
from recurx.plan.device import Device
from recurx.plan.launch import LaunchPlan
from recurx.plan.triton import why_not_tiled
from recurx.plan.triton_persistent import why_not as why_not_persistent
from recurx.problem import Problem
from recurx.program import Program, lower

MAX_TAPES = 16  # sets of nets kept rounded; a full-size TRM net is 14 MB in bf16
# Each holds a slice's activations (tens of MB) and its graph; a batch that shrinks in
# `recurx.solve` asks for one of each power of two.
MAX_RECORDINGS = 12
OLDEST = (3, 6)  # of Triton: the first whose code these kernels are tested with
DTYPES = (torch.bfloat16, torch.float32)
HEAD_DIMS = (32, 64, 128)
MAX_TOKENS = 1024  # of attention
MAX_HIDDEN, MAX_MIXED = 4096, 2048  # D, and T of a token MLP, of kind "library"


class Triton(Backend):
    name = "triton"
    device_types = ("cuda",)
    kinds = ("tiled", "library", "persistent")

    def __init__(self) -> None:
        self.tapes = WeightCache(MAX_TAPES)
        self.recordings = RecordingCache(MAX_RECORDINGS)

    def why_unavailable(self) -> str | None:
        if not torch.cuda.is_available():
            return "needs a GPU; torch sees none (no device, no driver, or a build without CUDA)"
        return why_no_triton()

    def why_unsupported(self, problem: Problem) -> str | None:
        if problem.opaque:
            return f"cannot look inside the plain callable {problem.opaque[0]!r}"
        if problem.dtype not in DTYPES:
            return f"runs float32 and bfloat16 states, not {problem.dtype}"
        attends = any(block.kind == ATTENTION for block in blocks_of(problem))
        if problem.tokens > (most := MAX_TOKENS if attends else MAX_MIXED):
            return f"runs up to T={most} tokens, got T={problem.tokens}"
        if problem.hidden > MAX_HIDDEN:
            return f"runs up to D={MAX_HIDDEN}, got D={problem.hidden}"
        if self.kind == "tiled":
            return why_not_tiled(problem)
        if self.kind == "persistent":
            return why_not_persistent(problem, self.plan_device(problem.device_type))
        for name, spec in problem.nets:
            for block in spec.blocks:
                if block.kind == ATTENTION and block.head_dim not in HEAD_DIMS:
                    return f"needs head_dim in {HEAD_DIMS}, net {name!r} has {block.head_dim}"
        return None

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
        program = lower(problem.schedule, span)
        packed = self.packed_nets(problem, operands.weights)
        with torch.cuda.device_of(x):  # Triton launches on the current device
            if plan.kind == "persistent":
                return self._run_persistent(plan, program, packed, operands)
            return self._run_sliced(plan, problem, program, packed, operands)

    def window(self, problem: Problem) -> Window | None:
        from recurx.backends.triton_window import TritonWindow

        if self.kind == "persistent":
            return None
        library = self.kind == "library" or why_not_tiled(problem) is not None
        return TritonWindow(self.packed_nets, library)

    def free(self) -> None:
        self.tapes.clear()
        self.recordings.clear()

    def packed_nets(self, problem: Problem, weights: Sequence[Tensor]) -> PackedNets:
        """The weights of all nets rounded to the problem's dtype, in buffers that stay."""
        device = weights[0].device
        if captured_outside(device):
            return PackedNets(problem.nets, problem.dtype, device).fill(weights)

        def make(before: PackedNets | None) -> PackedNets:
            packed = PackedNets(problem.nets, problem.dtype, device) if before is None else before
            return packed.fill(weights)

        # The buffers of a stream are written and read in its order alone.
        key = (problem.nets, problem.dtype, device, stream_of(device))
        return self.tapes.get(key, weights, make)

    def _capture(self, device: torch.device) -> Capture | None:
        return None if captured_outside(device) else cuda_capture

    # ---- the ways ----------------------------------------------------------------------------

    def _run_sliced(
        self,
        plan: LaunchPlan,
        problem: Problem,
        program: Program,
        packed: PackedNets,
        operands: Operands,
    ) -> list[Tensor]:
        from recurx.kernels.library import LibrarySlice
        from recurx.kernels.tiled import TiledSlice

        device, cos_sin, size = operands.x.device, operands.rope, int(plan["slice"])
        inputs = (operands.x, *operands.states)
        outputs = [torch.empty_like(state) for state in operands.states]
        capture = self._capture(device)

        def make() -> Recording:
            kind = LibrarySlice if plan.kind == "library" else TiledSlice
            buffers = kind(problem, program, packed, size, cos_sin)
            return Recording(buffers, buffers.launch)

        key = (
            plan.kind, problem.nets, program, size, problem.tokens, problem.dtype, device,
            id(packed), cos_sin is None, stream_of(device),
        )  # fmt: skip
        with self.recordings.lock:
            inside = captured_outside(device)
            recording = make() if inside else self.recordings.get(key, make)
            part: TiledSlice = recording.buffers
            part.set_tables(cos_sin)
            for first in range(0, problem.batch, size):
                live = slice(first, min(first + size, problem.batch))
                part.enter([tensor[live] for tensor in inputs])
                recording.run(capture)
                part.leave([tensor[live] for tensor in outputs])
        return outputs

    def _run_persistent(
        self, plan: LaunchPlan, program: Program, packed: PackedNets, operands: Operands
    ) -> list[Tensor]:
        from recurx.kernels.recursion import recursion

        inputs = (operands.x, *operands.states)
        arena = operands.x.new_empty(program.slots, *operands.x.shape)
        torch._foreach_copy_(list(arena[: len(inputs)]), list(inputs))
        recursion(arena, program, packed, operands.rope, dict(plan.settings))
        outputs = [torch.empty_like(state) for state in operands.states]
        torch._foreach_copy_(outputs, list(arena[1 : len(inputs)]))
        return outputs


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


def forget() -> None:
    """Free the memory of rounded weights and captured graphs."""
    BACKEND.free()
