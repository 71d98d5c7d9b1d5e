"""Records every ATen operator of one step, with the module, backward node or range it runs in.

A `TorchDispatchMode` sees the operators, global module hooks and wrapped functions of
`recurx.reference` keep a stack of where they run, and the sequence numbers of autograd tie each
operator of the backward to the operator of the forward that it belongs to. Time is a partition: an
operator owns the time since the end of the one before it (Python, dispatch) and its own. The clock
stands still while the tracer keeps its books, so what inflates a traced step is the dispatch
alone; `Trace.lost` is what was taken out.
"""

from __future__ import annotations

import bisect
import contextlib
import threading
from collections.abc import Callable, Iterator
from time import perf_counter_ns
from typing import Any

import torch
from torch import nn
from torch.autograd.profiler import record_function
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils._python_dispatch import TorchDispatchMode

from recurx.bench.profiler import counts
from recurx.bench.profiler.fused import Split
from recurx.bench.profiler.records import BACKWARD, Op, Position, Trace, Where
from recurx.bench.profiler.roles import Roles
from recurx.bench.profiler.wrapped import wrapped_attention, wrapped_reference

MARK = "recurx#"  # record_function names, by which CUDA kernels find their operator

_UNMARKED = contextlib.nullcontext()
_active: Tracer | None = None


@contextlib.contextmanager
def stage(name: str) -> Iterator[None]:
    """A range of your own in a profiled step: what runs inside is a stage called `name`.

    Costs nothing while no profile is being made.
    """
    with contextlib.nullcontext() if _active is None else _active.at.range(Where("user", name)):
        yield


class Tracer(TorchDispatchMode):
    """Use `record`; this class is the dispatch mode behind it."""

    def __init__(self, roles: Roles, annotate: bool = False) -> None:
        """`annotate`: mark each operator for torch.profiler (CUDA)."""
        super().__init__()
        self.roles = roles
        self.ops: list[Op] = []
        self.lost = 0
        self.at = Position()
        self._annotate = annotate
        self._zero = self._last = 0
        self._thread = threading.get_ident()
        self._composite: dict[Any, bool] = {}
        self._sequence: list[int] = []  # first autograd sequence number after ...
        self._sequence_op: list[int] = []  # ... the operator of this index
        self._backward = False

    # ---- one step --------------------------------------------------------------------------

    def record(self, model: nn.Module, step: Callable[[], Any]) -> Trace:
        """Run `step` once and return what it did."""
        global _active
        with contextlib.ExitStack() as stack:
            for handle in (
                register_module_forward_pre_hook(self._enter_module),
                register_module_forward_hook(self._leave_module, always_call=True),
                register_optimizer_step_pre_hook(self._enter_optimizer),
                register_optimizer_step_post_hook(lambda *_: self.at.stack.pop()),
            ):
                stack.callback(handle.remove)
            stack.enter_context(wrapped_reference(self.at))
            stack.enter_context(wrapped_attention(self.at, self.roles.attentions, self.opaque))
            _active = self
            try:
                first = torch._C._autograd._get_sequence_nr()
                self._sequence, self._sequence_op = [first], [-1]
                self._zero = perf_counter_ns()
                with self:
                    step()
                wall = perf_counter_ns() - self._zero
            finally:
                _active = None
        tail = wall - self.lost - self._last
        if self.ops and tail > 0:  # what Python did after the last operator
            self._append(Op("(python)", Where(), self._last, wall - self.lost, 0, True, 0.0, 0))
        return Trace(self.ops, wall, self.lost, self.at.cycles, [op.ns for op in self.ops])

    # ---- where -----------------------------------------------------------------------------

    def _enter_module(self, module: nn.Module, args: Any) -> None:
        if threading.get_ident() != self._thread:
            return
        begin = perf_counter_ns()
        role = self.roles.of.get(id(module))
        self.at.stack.append(self.at.where if role is None else self._entered(role))
        self.lost += perf_counter_ns() - begin

    def _entered(self, role: Where) -> Where:
        if role.part == "inner":
            self.at.begin_recursion(self.roles.cycle)
        elif role.part in ("net", "foreign") and self.at.where.part != "foreign":
            self.at.call += 1  # (a patched loop of foreign code has counted it already)
        elif role.part in ("act", "loss", "module"):
            return role
        return self.at.inside(role.part, role.name, role.block)

    def _leave_module(self, module: nn.Module, args: Any, output: Any) -> None:
        if threading.get_ident() == self._thread and len(self.at.stack) > 1:
            self.at.stack.pop()

    def _enter_optimizer(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        self.at.stack.append(Where("optimizer", type(optimizer).__name__))

    # ---- operators ---------------------------------------------------------------------------

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._is_composite(func):  # inference mode hands composite operators over whole
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        # "mm" for aten.mm.default, "recurx::recurse" for an op outside aten
        name = func._schema.name.removeprefix("aten::")
        split = Split.of(name, func, args, kwargs)
        with self._mark():
            begin = perf_counter_ns()
            out = func(*args, **kwargs)
            end = perf_counter_ns()
        self._note(name, func, args, kwargs, out, begin, end, split)
        self.lost += perf_counter_ns() - end
        return out

    def _is_composite(self, func: Any) -> bool:
        """Whether the operator is made of others. NOTE: some (silu_backward) are so on exotic
        devices only, and have kernels of their own on CPU and CUDA."""
        if func not in self._composite:
            has_kernel, name = torch._C._dispatch_has_kernel_for_dispatch_key, func.name()
            self._composite[func] = has_kernel(name, "CompositeImplicitAutograd") and not any(
                has_kernel(name, key) for key in ("CPU", "CUDA")
            )
        return self._composite[func]

    def _note(
        self, name: str, func: Any, args: Any, kwargs: dict[str, Any], out: Any,
        begin: int, end: int, split: Split | None,
    ) -> None:  # fmt: skip
        free = name in counts.FREE or func.is_view
        flops, moved = (0.0, 0) if free else counts.work(name, args, kwargs, out)
        if split is not None:
            split.finish()
            flops = split.flops
        op = Op(name, self.at.where, self._last, self._now(end), end - begin, free, flops, moved)
        op.split = split
        node = torch._C._current_autograd_node()
        if node is not None:
            op.phase, op.where = BACKWARD, Where("gradients")
            sequence = node._sequence_nr()
            if sequence < 1 << 62:  # AccumulateGrad has the largest number there is
                op.origin = self._forward_op(sequence)
        elif op.where.part == "self_attn" and name == "mul":
            op.reads_table = any(
                t.untyped_storage().data_ptr() in self.roles.tables for t in counts.tensors_in(args)
            )
        op.sync = counts.sync_kind(name, args, kwargs, out)
        if op.sync:
            op.place = counts.source_place()
        self._append(op)
        if node is None:  # also without gradient: so runs the forward of an autograd.Function
            self._remember_sequence()

    def opaque(self, name: str, where: Where, run: Callable[[], Any]) -> Any:
        """Run a function that may launch work which no dispatcher sees; it becomes one operator."""
        before, begin = len(self.ops), perf_counter_ns()
        with self.at.range(where), self._mark():
            out = run()
        if len(self.ops) == before:
            end = perf_counter_ns()
            moved = sum(counts.nbytes(t) for t in counts.tensors_in(out))
            op = Op(name, where, self._last, self._now(end), end - begin, False, 0.0, moved)
            self._append(op)
        return out

    def _mark(self) -> contextlib.AbstractContextManager[Any]:
        """For torch.profiler, around the operator that comes next."""
        return record_function(f"{MARK}{len(self.ops)}") if self._annotate else _UNMARKED

    def _now(self, clock: int) -> int:
        return clock - self._zero - self.lost

    def _append(self, op: Op) -> None:
        self.ops.append(op)
        self._last = op.end

    def _remember_sequence(self) -> None:
        number = torch._C._autograd._get_sequence_nr()
        if number != self._sequence[-1]:
            self._sequence.append(number)
            self._sequence_op.append(len(self.ops) - 1)

    def _forward_op(self, sequence: int) -> int:
        """Index of the forward operator whose node has this number; -1 for older graphs."""
        if sequence < self._sequence[0]:
            return -1
        index = bisect.bisect_right(self._sequence, sequence)
        return self._sequence_op[index] if index < len(self._sequence_op) else -1
