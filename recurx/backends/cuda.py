"""backend="cuda": the recursion kernels of csrc/cuda/, every call of the schedule in one launch.

`LaunchPlan.pick` chooses among the kinds of recurx/plan/cuda.py. States are bf16, forward only: in
training it runs the calls before the gradient window, which is backend triton's or PyTorch's.

Weights are packed into a tape on the device at every call, by two launches, because nothing tells
whether somebody wrote to them; `recurx.solve` packs them once.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import threading
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from recurx.backends import Backend, cuda_abi, cuda_grid, unknown_fields
from recurx.backends.cuda_launch import Launch, blocks, call_words, check_inputs, describe
from recurx.backends.cuda_timeline import KernelTimeline
from recurx.backends.graphs import captured_outside
from recurx.backends.weight_cache import WeightCache
from recurx.errors import BackendUnavailable, CudaError, how_to_compile, no_compiled_module
from recurx.fp8 import are_quantized, registered
from recurx.nets import WEIGHT_NAMES, Net, NetSpec
from recurx.operands import Operands, Span
from recurx.packed import device_words, round_into
from recurx.plan.cuda import FIELDS, KINDS, OWNER_PLANS, QUEUES, Shapes, candidates, refusals
from recurx.plan.device import Device
from recurx.plan.launch import LaunchPlan
from recurx.problem import Problem

MAX_TAPES = 16  # nets kept packed; a full-size TRM net is 14 MB
ALIGNMENT = 16  # bytes: states are read 16 bytes at a time


class Cuda(Backend):
    name = "cuda"
    device_types = ("cuda",)
    window_of = "triton"  # the kernels here have no backward
    kinds = KINDS
    fields = frozenset().union(*FIELDS.values())  # each kind refuses those that it does not run
    _timeline: KernelTimeline | None = None  # of the class: a restricted copy records, too

    def __init__(
        self,
        source: ModuleType | ctypes.CDLL | None = None,
        device: Device | None = None,
        owner_plans: Shapes = OWNER_PLANS,
    ) -> None:
        """The backend over recurx._C, or over a build that runs on the CPU.

        Args:
            source: a library other than recurx._C; it gets CPU tensors (an emulated build).
            device: what plans are made for, with `source`.
            owner_plans: the owner kernels in `source`, (hidden, row tiles) each.
        """
        self._source, self._device, self.owner_plans = source, device, owner_plans
        self._lock = threading.Lock()
        self._library: cuda_abi.Library | None = None
        self._missing: str | None = None
        self.tapes = WeightCache(MAX_TAPES)
        self.exact = WeightCache(MAX_TAPES)  # whether weights are the products of their FP8 codes
        # What does not depend on the tensors is found out once, and looked up after that.
        remember = functools.lru_cache(maxsize=256)
        self._pick = remember(self._find_plan)
        self._described = remember(self._find_description)
        self._launch = remember(self._find_launch)

    # ---- can it run ------------------------------------------------------------------------

    def runs_on(self, device_type: str) -> bool:
        return device_type == ("cuda" if self._source is None else "cpu")

    def library(self) -> cuda_abi.Library | None:
        """The compiled kernels; None if there are none (see `why_unavailable`)."""
        with self._lock:
            if self._library is None and self._missing is None:
                try:
                    source = _compiled_module() if self._source is None else self._source
                    self._library = cuda_abi.Library(source)
                except (ImportError, CudaError) as error:
                    self._missing = str(error)
            return self._library

    def why_unavailable(self) -> str | None:
        if self.library() is None:
            return self._missing
        if self._source is None and not torch.cuda.is_available():
            return "needs an NVIDIA GPU; torch sees none (no device, no driver, or a CPU build)"
        return _why_no_driver(self._source or _compiled_module())

    def why_unsupported(self, problem: Problem) -> str | None:
        found = self._pick(problem, problem.device_type, self._kinds(), False)
        return found if isinstance(found, str) else None

    def plan(
        self, problem: Problem, device: torch.device | str | None = None, fp8: bool = False
    ) -> LaunchPlan:
        """How `run` would run it on `device` (default: the current one); with `fp8`, of weights
        that `recurx.quantize` made.

        Raises:
            BackendUnavailable: nothing fits; the message gives the reason of each kind.
        """
        found = self._pick(problem, device or problem.device_type, self._kinds(), fp8)
        if isinstance(found, str):
            raise BackendUnavailable(f"recurx.recurse: backend 'cuda': {found}")
        return found

    def queue_plan(self, problem: Problem, device: torch.device) -> LaunchPlan:
        """The plan that solves a queue of `problem.batch` samples; raises as `plan` does."""
        kinds = tuple(kind for kind in self._kinds() if kind in QUEUES)
        found = self.why_unavailable() or unknown_fields(self, problem)
        if "noise" in problem.schedule.changed:  # drawn by a sample's place, which a slot has not
            found = found or "does not run steps with noise"
        found = found or self._pick(problem, device, kinds, False)
        if isinstance(found, str):
            raise BackendUnavailable(f"recurx.solve: backend 'cuda' {found}")
        return found

    def _kinds(self) -> tuple[str, ...]:
        """Kinds of plan that the build holds; the owner kernels alone write a timeline."""
        library = self.library()
        kinds = KINDS if library is None else library.kinds
        if self._timeline is not None:
            return ("owner",)
        return tuple(kind for kind in kinds if self.kind in ("", kind))

    def plan_device(self, device: torch.device | str) -> Device:
        return Device.of(device) if self._device is None else self._device

    def _find_plan(
        self, problem: Problem, at: torch.device | str, kinds: tuple[str, ...], fp8: bool
    ) -> LaunchPlan | str:
        """The best plan, or why there is none."""
        device = self.plan_device(at)
        plans = candidates(problem, device, self.owner_plans, kinds, fp8)
        if not plans:
            return "; ".join(refusals(problem, device, self.owner_plans, kinds))
        return min(plans, key=lambda plan: plan.order(device))

    def free(self) -> None:
        self.tapes.clear()

    # ---- run it ----------------------------------------------------------------------------

    def run(self, problem: Problem, operands: Operands, span: Span) -> list[Tensor]:
        check_inputs(problem, operands)
        x, states, device = operands.x, operands.states, operands.x.device
        if span.start == span.stop or problem.batch == 0:
            return [state.clone(memory_format=torch.contiguous_format) for state in states]
        library = self.library()
        assert library is not None, "checked by why_unavailable"
        fp8 = self._quantized(operands.weights)
        plan = self.plan(problem, device, fp8)
        launch = self._launch(problem, span, plan)
        with self.on(device) as stream:
            ready = operands._replace(x=_aligned(x), states=tuple(map(_aligned, states)))
            outputs = [self.new(x.shape, x.dtype, device) for _ in states]
            p, kept = self.describe(plan.kind, problem, ready, outputs, span, stream, fp8)
            scratch = self.new((launch.scratch_bytes,), torch.uint8, device)
            p.scratch, p.scratch_bytes = scratch.data_ptr(), launch.scratch_bytes
            if self._timeline is not None:
                self._timeline.record(p, plan["owners"], device)
            library.call(launch.entry, p, launch.settings, stream)
            del kept  # until here: the stream orders what comes later after this launch
        return outputs

    def describe(
        self, kind: str, problem: Problem, operands: Operands, outputs: Sequence[Tensor],
        span: Span, stream: ctypes.c_void_p | None, fp8: bool = False,
    ) -> tuple[cuda_abi.RxRecursion, list[Tensor]]:  # fmt: skip
        """The RxRecursion of the calls of `span` without its scratch, and what it points to.

        `kind` of plan decides how weights are packed; with `fp8` the grid kernel reads their codes.
        x, the states and the outputs are contiguous and aligned.
        """
        x, rope = operands.x, operands.float_rope()
        sizes, calls = self._described(problem, span, x.device)
        p = cuda_abi.RxRecursion.from_buffer_copy(sizes)
        p.x = x.data_ptr()
        tables = [_aligned(table) for table in rope or ()]
        if tables:
            p.cos, p.sin = (table.data_ptr() for table in tables)
        p.seed = None if operands.seed is None else operands.seed.data_ptr()
        states_in, states_out, nets = p.states_in, p.states_out, p.nets
        for i, (state, out) in enumerate(zip(operands.states, outputs, strict=True)):
            states_in[i], states_out[i] = state.data_ptr(), out.data_ptr()
        tapes = []
        for net, (_, spec), cut in zip(nets, problem.nets, problem.cuts, strict=False):
            tapes.append(self._tape(kind, spec, operands.weights[cut], problem.tokens, stream, fp8))
            net.tape = tapes[-1].data_ptr()
        return p, [x, *operands.states, *outputs, *tables, calls, *tapes]

    def _find_description(
        self, problem: Problem, span: Span, device: torch.device
    ) -> tuple[cuda_abi.RxRecursion, Tensor]:
        """An RxRecursion that points to the calls alone, and those, on `device`."""
        p, calls = describe(problem, span), device_words(call_words(problem, span), device)
        p.calls = calls.data_ptr()
        return p, calls

    def _find_launch(self, problem: Problem, span: Span, plan: LaunchPlan) -> Launch:
        return Launch.of(self.library(), plan, describe(problem, span))  # type: ignore[arg-type]

    def new(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Uninitialised memory that a kernel writes."""
        return torch.empty(shape, dtype=dtype, device=device)

    @contextlib.contextmanager
    def on(self, device: torch.device) -> Iterator[ctypes.c_void_p | None]:
        """The current stream of `device`, which is current inside; None for an emulated build."""
        if self._source is not None:
            yield None
            return
        with torch.cuda.device(device):
            yield ctypes.c_void_p(torch.cuda.current_stream(device).cuda_stream)

    def _tape(
        self, kind: str, spec: NetSpec, weights: Sequence[Tensor], tokens: int,
        stream: ctypes.c_void_p | None, fp8: bool,
    ) -> Tensor:  # fmt: skip
        """The packed weights of a net for a kind of kernel.

        Inside somebody's CUDA graph packing becomes part of it, and so does a tape of its own.
        """
        fp8, device = fp8 and kind == "grid", weights[0].device
        captured = captured_outside(device)

        def make(before: Any) -> Any:
            """(what fills a tape, the tape)"""
            if before is not None:
                fill = before[0]
            elif kind == "grid":
                pack = functools.partial(cuda_grid.pack, spec, fp8=fp8)
                fill = pack if fp8 or captured else cuda_grid.packer(spec, device)
            else:
                fill = self._packer(kind, Net(spec, weights), tokens, stream)
            return fill, fill(weights)

        if captured:
            return make(None)[1]  # type: ignore[no-any-return]
        # The token MLP's tape depends on T, which its spec holds; attention's does not.
        key = kind, fp8, spec, getattr(stream, "value", None)
        return self.tapes.get(key, weights, make)[1]  # type: ignore[no-any-return]

    def _packer(self, kind: str, net: Net, tokens: int, stream: ctypes.c_void_p | None) -> Any:
        """Rounds weights to bf16 by one launch, and packs them by a kernel of the family."""
        library = self.library()
        assert library is not None, "checked by why_unavailable"
        rounded = [w.new_empty(w.shape, dtype=torch.bfloat16) for w in net.weights]
        p = cuda_abi.RxPack(net.spec.hidden, tokens, len(net.spec.blocks))
        p.blocks[: p.num_blocks] = blocks(net.spec)
        for i, (block, held) in enumerate(net.spec.by_block(rounded)):
            at = {name: w.data_ptr() for (name, _), w in zip(block.slots, held, strict=True)}
            for k, name in enumerate(WEIGHT_NAMES[block.kind], 4 * i):
                p.weights[k], p.biases[k] = at[name], at.get(f"{name}_bias")
        family = cuda_abi.FAMILIES[kind]
        size = library.bytes_of(f"rx_{family}_tape_bytes", p)
        tape = torch.empty(size, dtype=torch.uint8, device=rounded[0].device)
        p.tape = tape.data_ptr()

        def fill(weights: Sequence[Tensor]) -> Tensor:
            round_into(rounded, weights)
            library.call(f"rx_{family}_pack", p, stream)
            return tape

        return fill

    def _quantized(self, weights: Sequence[Tensor]) -> bool:
        """Whether the kernel may read codes. Not inside somebody's CUDA graph: there the host
        cannot ask, and a replay would not see a weight that is no longer the product of its."""
        if captured_outside(weights[0].device) or any(registered(w) is None for w in weights):
            return False
        quantized: bool = self.exact.get("fp8", weights, lambda _: are_quantized(weights))
        return quantized

    # ---- the in-kernel timeline ------------------------------------------------------------

    @contextlib.contextmanager
    def timeline(self, events_per_owner: int = 4096) -> Iterator[KernelTimeline]:
        """Inside, launches record when which phase ran; read `.events` after the block.

        Raises:
            CudaError: the kernels were built without RECURX_TIMELINE=1.
        """
        library = self.library()
        if library is None or not library.has_timeline:
            raise CudaError(
                "recurx: these kernels record no timeline; build with "
                "RECURX_TIMELINE=1 python csrc/native_build.py"
            )
        Cuda._timeline = timeline = KernelTimeline(events_per_owner)
        try:
            yield timeline
        finally:
            Cuda._timeline = None


def _aligned(tensor: Tensor) -> Tensor:
    """Contiguous and 16-byte aligned: a view into the middle of a buffer is copied."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % ALIGNMENT else tensor


@functools.cache
def _why_no_driver(source: Any) -> str | None:
    """Why the driver cannot run the kernels of a build, whose CUDA runtime asks for its version."""
    if not hasattr(source, "cuda_devices"):
        return None
    count, driver, runtime, reason = source.cuda_devices()
    if count:
        return None
    if driver // 1000 >= runtime // 1000:
        return f"finds no device: {reason}"
    had, needs = (f"CUDA {v // 1000}.{v % 1000 // 10}" for v in (driver, runtime))
    return (
        f"is built with {needs}, and the driver here is for {had}: install a newer one (CUDA 13 "
        "came with driver 580), or build recurx with a toolkit that the driver knows"
    )


def _compiled_module() -> ModuleType:
    try:
        from recurx import _C
    except ImportError as error:
        raise ImportError(no_compiled_module(error)) from None
    if not hasattr(_C, "cuda_entries"):
        raise ImportError(
            f"needs a recurx._C with CUDA kernels; {how_to_compile('nvcc', 'RECURX_CUDA=1 ')}"
        )
    return _C


BACKEND = Cuda()
