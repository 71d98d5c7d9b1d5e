"""backend="cuda": the recursion kernels of csrc/cuda/, every call of the schedule in one launch.

`LaunchPlan.pick` chooses among the kinds of recurx/plan/cuda.py. States are bf16, forward only: in
training it runs the calls before the gradient window and hands the carry to backend triton, or to
PyTorch where there is no Triton.

Weights are rounded to bf16 and packed into a tape on the device, once, until a parameter changes.
A change shows in a tensor's address or `_version`. NOTE: an edit through `.data` shows in neither;
call `recurx.backends.cuda.forget()` after such surgery.
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

from recurx.backends import Backend, cuda_abi, cuda_grid
from recurx.backends.packed import WeightCache, device_words
from recurx.errors import (
    BackendUnavailable,
    CudaError,
    bad_argument,
    how_to_compile,
    no_compiled_module,
)
from recurx.fp8 import codes_of
from recurx.nets import ATTENTION, BlockSpec, Net
from recurx.operands import Operands, Span
from recurx.plan.cuda import KINDS, OWNER_PLANS, Shapes, candidates, refusals
from recurx.plan.device import Device
from recurx.plan.launch import LaunchPlan
from recurx.problem import Problem
from recurx.schedule import INPUT, Schedule

MAX_TAPES = 16  # nets kept packed; a full-size TRM net is 14 MB
ALIGNMENT = 16  # bytes: states are read 16 bytes at a time


class Cuda(Backend):
    name = "cuda"
    device_types = ("cuda",)
    window_of = "triton"  # the kernels here have no backward

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
        self._timeline: Timeline | None = None

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
        return None

    def why_unsupported(self, problem: Problem) -> str | None:
        device = self.plan_device(problem.device_type)
        if candidates(problem, device, self.owner_plans, self._kinds()):
            return None
        return "; ".join(refusals(problem, device, self.owner_plans, self._kinds()))

    def plan(
        self, problem: Problem, device: torch.device | str | None = None, fp8: bool = False
    ) -> LaunchPlan:
        """How `run` would run it on `device` (default: the current one).

        Args:
            fp8: with weights that `recurx.quantize` made.
        """
        device = self.plan_device(device or problem.device_type)
        return _pick(problem, device, self.owner_plans, self._kinds(), fp8)

    def _kinds(self) -> tuple[str, ...]:
        """Kinds of plan that the build holds; the owner kernels alone write a timeline."""
        library = self.library()
        kinds = KINDS if library is None else library.kinds
        return ("owner",) if self._timeline is not None else kinds

    def plan_device(self, device: torch.device | str) -> Device:
        return Device.of(device) if self._device is None else self._device

    # ---- run it ----------------------------------------------------------------------------

    def run(self, problem: Problem, operands: Operands, span: Span) -> list[Tensor]:
        check_inputs(problem, operands)
        x, states = operands.x, operands.states
        if span.start == span.stop or problem.batch == 0:
            return [state.clone(memory_format=torch.contiguous_format) for state in states]
        library = self.library()
        assert library is not None, "checked by why_unavailable"
        fp8 = all(codes_of(weight) is not None for weight in operands.weights)
        plan = self.plan(problem, x.device, fp8)
        with self.on(x.device) as stream:
            ready = operands._replace(
                x=_aligned(x.detach()), states=tuple(_aligned(s.detach()) for s in states)
            )
            outputs = [self.new(tuple(x.shape), x.dtype, x.device) for _ in states]
            p, kept = self.describe(plan.kind, problem, ready, outputs, span, stream, fp8)
            entry, settings, size = _launch(library, plan, p)
            scratch = self.new((size,), torch.uint8, x.device)
            p.scratch, p.scratch_bytes = scratch.data_ptr(), size
            with self._recorded(p, plan, x.device):
                library.call(entry, p, settings, stream)
            del kept  # until here: the stream orders what comes later after this launch
        return outputs

    def describe(
        self,
        kind: str,
        problem: Problem,
        operands: Operands,
        outputs: Sequence[Tensor],
        span: Span,
        stream: ctypes.c_void_p | None,
        fp8: bool = False,
    ) -> tuple[cuda_abi.Recursion, list[Tensor]]:
        """The RxRecursion of the calls of `span` without its scratch, and what it points to.

        Args:
            kind: of plan, which decides how weights are packed.
            fp8: the weights are quantised; the grid kernel reads their codes.
            operands: x and the states contiguous and aligned, as are the outputs.
        """
        library, x = self.library(), operands.x
        assert library is not None, "checked by why_unavailable"
        tables = [_aligned(table) for table in operands.float_rope() or ()]
        calls = _calls(problem, span, x.device)
        p = cuda_abi.Recursion(
            problem.batch, problem.tokens, problem.hidden, len(outputs), len(problem.nets),
            span.stop - span.start, calls=calls.data_ptr(), x=x.data_ptr(),
        )  # fmt: skip
        if tables:
            p.cos, p.sin = (table.data_ptr() for table in tables)
        for i, (state, out) in enumerate(zip(operands.states, outputs, strict=True)):
            p.states_in[i], p.states_out[i] = state.data_ptr(), out.data_ptr()
        tapes = [
            self._tape(library, kind, net, problem.tokens, x.device, stream, fp8)
            for net in problem.bind(operands.weights).values()
        ]
        for i, ((_, spec), tape) in enumerate(zip(problem.nets, tapes, strict=True)):
            p.nets[i].num_blocks, p.nets[i].tape = len(spec.blocks), tape.data_ptr()
            p.nets[i].blocks[: len(spec.blocks)] = [_block(block) for block in spec.blocks]
        return p, [x, *operands.states, *outputs, *tables, calls, *tapes]

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
        self,
        library: cuda_abi.Library,
        kind: str,
        net: Net,
        tokens: int,
        device: torch.device,
        stream: ctypes.c_void_p | None,
        fp8: bool,
    ) -> Tensor:
        """The packed weights of a net for a kind of kernel.

        Inside somebody's CUDA graph packing becomes part of it: a kept tape would hold the weights
        of the capture in every replay, and its memory may go when they change.
        """

        def make(_: Any) -> Tensor:
            if kind == "grid":
                return cuda_grid.pack(net.spec, net.weights, fp8)
            rounded = [w.detach().to(torch.bfloat16).contiguous() for w in net.weights]
            blocks = net.spec.blocks
            p = cuda_abi.Pack(net.spec.hidden, tokens, len(blocks))
            p.blocks[: len(blocks)] = [_block(block) for block in blocks]
            p.weights[: len(rounded)] = [weight.data_ptr() for weight in rounded]
            family = cuda_abi.FAMILIES[kind]
            size = library.bytes_of(f"rx_{family}_tape_bytes", p)
            tape = torch.empty(size, dtype=torch.uint8, device=device)
            p.tape = tape.data_ptr()
            library.call(f"rx_{family}_pack", p, stream)
            return tape

        if _captured_outside(device):
            return make(None)
        # The token MLP's tape depends on T, which its spec holds; attention's does not.
        key = (kind, fp8, net.spec) if kind == "grid" else (kind, net.spec)
        tape: Tensor = self.tapes.get(key, net.weights, make)
        return tape

    # ---- the in-kernel timeline ------------------------------------------------------------

    @contextlib.contextmanager
    def timeline(self, events_per_owner: int = 4096) -> Iterator[Timeline]:
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
        self._timeline = Timeline(events_per_owner)
        try:
            yield self._timeline
        finally:
            self._timeline = None

    @contextlib.contextmanager
    def _recorded(
        self, p: cuda_abi.Recursion, plan: LaunchPlan, device: torch.device
    ) -> Iterator[None]:
        if self._timeline is None:
            yield
            return
        size = plan["owners"] * self._timeline.events_per_owner * ctypes.sizeof(cuda_abi.Event)
        buffer = torch.zeros(size, dtype=torch.uint8, device=device)
        p.timeline, p.timeline_events = buffer.data_ptr(), self._timeline.events_per_owner
        yield
        self._timeline.buffers.append(buffer)


class Timeline:
    """What the launches of a `with backend.timeline()` block wrote."""

    def __init__(self, events_per_owner: int) -> None:
        self.events_per_owner = events_per_owner
        self.buffers: list[Tensor] = []

    @property
    def events(self) -> list[dict[str, int | str]]:
        """{"owner", "call", "block", "phase", "sample", "start_ns", "end_ns"} of each phase.

        Launch after launch, owner after owner, in the order of time. Waits for the device.
        """
        found = []
        for buffer in self.buffers:
            raw = buffer.cpu().numpy().tobytes()
            records = (
                cuda_abi.Event * (len(raw) // ctypes.sizeof(cuda_abi.Event))
            ).from_buffer_copy(raw)
            for index, event in enumerate(records):
                if event.end_ns:
                    found.append(
                        {
                            "owner": index // self.events_per_owner,
                            "call": event.call,
                            "block": event.block,
                            "phase": cuda_abi.PHASES[event.phase],
                            "sample": event.sample,
                            "start_ns": event.start_ns,
                            "end_ns": event.end_ns,
                        }
                    )
        return found

    def table(self) -> str:
        """Time and share of each phase, summed over owners, the longest first."""
        total: dict[str, int] = {}
        for event in self.events:
            phase, took = str(event["phase"]), int(event["end_ns"]) - int(event["start_ns"])
            total[phase] = total.get(phase, 0) + took
        whole = max(1, sum(total.values()))
        rows = sorted(total.items(), key=lambda item: -item[1])
        return "\n".join(
            ["| phase | us | share |", "|---|---|---|"]
            + [f"| {phase} | {ns / 1e3:.1f} | {ns / whole:.1%} |" for phase, ns in rows]
        )


# ---- from recurx's values to the C interface ----------------------------------------------


def check_inputs(problem: Problem, operands: Operands) -> None:
    """Everything a kernel takes on trust: number of states, shapes, dtype, one device.

    Raises:
        InvalidArgument: one of them is not as `problem` says.
    """
    x, states = operands.x, operands.states
    names = (INPUT, *problem.schedule.states)
    shape = (problem.batch, problem.tokens, problem.hidden)
    if len(states) + 1 != len(names):
        raise bad_argument("recurse", "carry", f"{len(names) - 1} states", len(states))
    for name, tensor in zip(names, (x, *states), strict=True):
        if tuple(tensor.shape) != shape or tensor.dtype != torch.bfloat16:
            expected = f"bfloat16 {list(shape)}"
            raise bad_argument("recurse", name, expected, f"{tensor.dtype} {list(tensor.shape)}")
        if tensor.device != x.device:
            raise bad_argument(
                "recurse", name, f"a tensor on {x.device}", f"one on {tensor.device}"
            )


def _launch(
    library: cuda_abi.Library, plan: LaunchPlan, p: cuda_abi.Recursion
) -> tuple[str, ctypes.Structure, int]:
    """The entry that runs a plan, the plan as its struct, and the bytes of scratch it needs."""
    family, settings = cuda_abi.FAMILIES[plan.kind], _settings(plan)
    size = library.bytes_of(f"rx_{family}_scratch_bytes", p, settings)
    return f"rx_{family}_run", settings, size


def _settings(plan: LaunchPlan) -> ctypes.Structure:
    if plan.kind == "grid":
        return cuda_grid.settings(plan)
    if plan.kind == "cluster":
        return cuda_abi.ClusterPlan(plan["cluster"])
    return cuda_abi.OwnerPlan(*(plan[name] for name in ("owners", "samples", "tiles")))


def _captured_outside(device: torch.device) -> bool:
    """Whether somebody is capturing a CUDA graph of which this call becomes a part."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _aligned(tensor: Tensor) -> Tensor:
    """Contiguous and 16-byte aligned: a view into the middle of a buffer is copied."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % ALIGNMENT else tensor


def _block(block: BlockSpec) -> cuda_abi.Block:
    token_mlp = block.kind != ATTENTION
    return cuda_abi.Block(token_mlp, block.inner, block.num_heads, block.token_inner, block.eps)


def _calls(problem: Problem, span: Span, device: torch.device) -> Tensor:
    """RxCall of the calls of `span`, as words on the device; made once."""
    nets = tuple(name for name, _ in problem.nets)
    return device_words(call_words(problem.schedule, nets, span), device)


@functools.lru_cache(maxsize=256)
def call_words(schedule: Schedule, nets: tuple[str, ...], span: Span) -> tuple[int, ...]:
    """The calls as the int32 words of RxCall; a state by its index in `schedule.states`, x last."""
    index = {name: i for i, name in enumerate((*schedule.states, INPUT))}
    words: list[int] = []
    for step in schedule.steps[span.start : span.stop]:
        call = cuda_abi.Call(
            nets.index(step.net), index[step.write], len(step.state), len(step.inject)
        )
        call.state[: len(step.state)] = [index[name] for name in step.state]
        call.inject[: len(step.inject)] = [index[name] for name in step.inject]
        words += (ctypes.c_int32 * (ctypes.sizeof(call) // 4)).from_buffer(call)
    return tuple(words)


@functools.lru_cache(maxsize=256)
def _pick(
    problem: Problem, device: Device, owner_plans: Shapes, kinds: tuple[str, ...], fp8: bool
) -> LaunchPlan:
    plans = candidates(problem, device, owner_plans, kinds, fp8)
    if not plans:
        reasons = "; ".join(refusals(problem, device, owner_plans, kinds))
        raise BackendUnavailable(f"recurx.recurse: backend 'cuda': {reasons}")
    return min(plans, key=lambda plan: (plan.seconds(device), plan.settings))


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


def forget() -> None:
    """Drop all packed weights, so that the next call packs anew."""
    BACKEND.tapes.clear()
