"""backend="cpu": the compiled engine (csrc/cpu/). The whole recursion is one call into C++.

Weights are packed into the engine's panels, in the states' dtype, and kept. At every call a hash of
all their bytes (csrc/cpu/hash.hpp) tells whether they are still the same; packing anew would take
sixteen times as long. `recurx.solve` takes the hash once.
"""

from __future__ import annotations

import functools
import math
import os
import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from recurx import fp8
from recurx.backends import EVERY_FIELD, Backend
from recurx.backends.cpu_window import (  # fmt: skip
    CpuWindow,
    Learned,
    addresses,
    beside_of,
    fields_of,
    plain_weight,
)
from recurx.backends.weight_cache import WeightCache
from recurx.errors import no_compiled_module
from recurx.forking import lazy
from recurx.nets import Net, NetSpec, numbers_of
from recurx.operands import Operands, Span
from recurx.plan.count import SIXTEENS, blocks_of, why_not_heads
from recurx.plan.cpu import engine_threads
from recurx.problem import Problem
from recurx.program import PLAIN, lower

MAX_PACKED = 16  # nets kept packed; a full-size TRM net is 14 MB in bf16, 27 MB in fp32
MAX_TOKENS = 4096
DTYPES = (torch.float32, torch.bfloat16)


def _load() -> tuple[ModuleType | None, str]:
    """The compiled module, or why there is none."""
    try:
        from recurx import _C
    except ImportError as error:
        return None, no_compiled_module(error)
    if not hasattr(_C, "cpu_solve"):
        return None, "needs a recurx._C with the CPU engine; rebuild it"
    return _C, ""


def _pack(
    module: ModuleType, spec: NetSpec, weights: Sequence[Tensor], bf16: bool, isa: str, int8: bool,
    _: Any,
) -> Any:  # fmt: skip
    """`int8`: the codes of the weights, or None if a weight is no longer what they say."""
    own, scales = Net(spec, weights).weights, []  # checked here
    if int8 and not fp8.are_quantized(own, fp8.INT8):
        return None
    plain = [plain_weight(weight) for weight in own]
    if int8:
        codes = [each for each in map(fp8.registered, own) if each is not None]
        plain = [each.codes.contiguous() for each in codes]
        scales = [each.scales.contiguous() for each in codes]
    blocks, variants = [numbers_of(block) for block in spec.blocks], []
    if spec.changed:
        for block in spec.blocks:
            variants.append((fields_of(block), [name for name, _ in block.slots]))
    pointers = [(w.data_ptr(), w.dtype == torch.bfloat16) for w in plain]
    return module.cpu_pack(blocks, pointers, bf16, isa, [s.data_ptr() for s in scales], variants)


def _rows(weight: Tensor, copies: list[Tensor]) -> tuple[int, int, int, int]:
    """A matrix as (address, rows, bytes of a row, bytes from row to row), in any order of axes."""
    if not weight.is_contiguous():
        for matrix in (weight, weight.mT) if weight.ndim == 2 else ():
            if matrix.stride(1) == 1:
                size, (rows, columns) = matrix.itemsize, matrix.shape
                return matrix.data_ptr(), rows, columns * size, matrix.stride(0) * size
        weight = weight.detach().contiguous()
        copies.append(weight)
    return weight.data_ptr(), 1, weight.nbytes, 0


class _Ready(NamedTuple):
    """What a call needs beside its tensors."""

    program: Any  # of the compiled module
    nets: tuple[tuple[NetSpec, slice], ...]  # the weights of each net in the flat list
    shape: tuple[int, int, int]
    rows: int  # B * T
    weights: int  # values of all weights that the calls read, each call's counted
    threads: int  # how many there are
    learned: list[tuple[int, bool, int]]  # step, whether its scale, which weight


class Cpu(Backend):
    name = "cpu"
    device_types = ("cpu",)
    fields = EVERY_FIELD

    def __init__(self, module: ModuleType | None = None) -> None:
        """`module`: a build of the engine other than recurx._C (tests run emulated engines)."""
        self._given = module
        self.packed = WeightCache(MAX_PACKED, self._digest)
        self._window = CpuWindow(functools.partial(self._begin, int8=False), self._engine)
        self._ready = functools.lru_cache(maxsize=256)(self._prepare)

    @lazy
    def _found(self) -> tuple[ModuleType | None, str]:
        """The compiled module, or why there is none."""
        return _load() if self._given is None else (self._given, "")

    def _engine(self) -> ModuleType:
        module, _ = self._found
        assert module is not None, "checked by why_unavailable"
        return module

    def _digest(self, weights: Sequence[Tensor]) -> int:
        """A hash of every element, whoever wrote it."""
        copies: list[Tensor] = []  # alive until they are read
        rows = [_rows(weight, copies) for weight in weights]
        digest: int = self._engine().cpu_digest(rows, torch.get_num_threads())
        return digest

    def why_unavailable(self) -> str | None:
        module, missing = self._found
        if module is None:
            return missing
        try:
            module.cpu_isa()
        except RuntimeError as error:  # once: the same line says it each time
            if "RECURX_CPU_ISA" in str(error):
                warnings.warn(f"recurx: backend cpu is out: {error}", RuntimeWarning, stacklevel=1)
            return f"cannot run: {error}"
        return None

    def why_unsupported(self, problem: Problem) -> str | None:
        if problem.dtype not in DTYPES:
            return f"runs float32 and bfloat16 states, not {problem.dtype}"
        if problem.hidden % 32:
            return f"needs D to be a multiple of 32, got D={problem.hidden}"
        if problem.tokens > MAX_TOKENS:
            return f"runs up to T={MAX_TOKENS} tokens, got T={problem.tokens}"
        for block in blocks_of(problem):
            if block.conv_dtype and getattr(torch, block.conv_dtype) is not problem.dtype:
                return f"computes convolutions in the states' dtype, not {block.conv_dtype}"
        return why_not_heads(problem, *SIXTEENS)

    def why_not_int8(self) -> str | None:
        """Why products of int8 are not faster than those of bf16 here, or None if they are."""
        isa = self._engine().cpu_isa()
        no = f"has no instruction for products of int8 here (VNNI, AMX-INT8), as {isa}"
        return None if self._engine().cpu_has_int8(isa) else no

    def run(self, problem: Problem, operands: Operands, span: Span) -> list[Tensor]:
        module, head, threads, learned = self._begin(problem, operands, span)
        inputs = [state.contiguous() for state in (operands.x, *operands.states)]
        outputs = [torch.empty_like(state) for state in inputs[1:]]
        rope = operands.float_rope() or (None, None)
        module.cpu_run(
            *head, addresses(inputs), [0, *addresses(outputs)], *addresses(rope), threads,
            beside_of(operands, learned),
        )  # fmt: skip
        return outputs

    def window(self, problem: Problem) -> CpuWindow:
        return self._window

    def _begin(
        self, problem: Problem, operands: Operands, span: Span, int8: bool = True
    ) -> tuple[ModuleType, tuple[Any, ...], int, list[Learned]]:
        """The module, the first arguments of its calls, how many threads they take, and learned
        factors; with `int8` nets of `recurx.quantize` run as such."""
        module = self._engine()
        ready = self._ready(problem, span, torch.get_num_threads())
        nets = self._nets(problem, operands, ready, int8)
        threads = engine_threads(ready.rows, ready.weights, ready.threads)
        values = [operands.weights[at].detach().float().contiguous() for *_, at in ready.learned]
        learned = [(*of, each) for of, each in zip(ready.learned, values, strict=True)]
        return module, (nets, ready.program, ready.shape), threads, learned

    def solve(
        self, problem: Problem, operands: Operands, how: dict[str, Any], progress: Any = None
    ) -> None:
        """Refine a queue of rows inside the engine (csrc/cpu/solve.cpp): every row of x.

        Args:
            problem: of all rows; the recursion is one supervision step.
            operands: x [N, T, D]; as states, their starts: [T, D], or [N, T, D] each.
            how: the fields of `Solving` in csrc/cpu/dispatch.hpp; tensors as their addresses.
            progress: called now and then with the number of rows that ended, or None.
        """
        ready = self._ready(problem, Span(0, len(problem.schedule)), torch.get_num_threads())
        rope = operands.float_rope()
        self._engine().cpu_solve(
            self._nets(problem, operands, ready, True), ready.program, ready.shape,
            addresses((operands.x, *operands.states)), *addresses(rope or (None, None)),
            min(ready.threads, problem.batch), how, progress,
        )  # fmt: skip

    def _nets(self, problem: Problem, operands: Operands, ready: _Ready, int8: bool) -> list[Any]:
        """The packed nets."""
        module, packed = self._engine(), []
        isa, bf16 = module.cpu_isa(), problem.dtype is torch.bfloat16
        int8 = int8 and not problem.changed_blocks  # products of variants are not
        int8 = int8 and fp8.have_codes(operands.weights, fp8.INT8)
        for spec, cut in ready.nets:
            weights = operands.weights[cut]
            make = functools.partial(_pack, module, spec, weights, bf16, isa, int8)
            packed.append(self.packed.get((spec, bf16, isa, int8), weights, make))
        return self._nets(problem, operands, ready, False) if None in packed else packed

    def _prepare(self, problem: Problem, span: Span, threads: int) -> _Ready:
        calls = lower(problem.schedule, span).calls
        order = [name for name, _ in problem.nets]
        steps = [
            (
                order.index(call.net), call.write, call.state, call.inject,
                0 if call.shared is None else 1 if call.forms else 2,
            )
            for call in calls
        ]  # fmt: skip
        sizes = {
            name: sum(math.prod(shape) for b in spec.blocks for shape in b.weight_shapes)
            for name, spec in problem.nets
        }
        numbered = enumerate((call.factors or PLAIN for call in calls), span.start)
        factors = [(f.keep, f.damping, f.scale, f.noise, number) for number, f in numbered]
        where = dict(zip(order, problem.cuts, strict=True))
        learned = [
            (number, factor == "scale", where[name].start)
            for number, step in enumerate(problem.schedule.steps[span.start : span.stop])
            for factor, name in step.learned.items()
        ]
        names = {step.net for step in problem.schedule.steps}
        return _Ready(
            self._engine().Program(steps, factors * bool(problem.changed)),
            tuple((spec, where[name]) for name, spec in problem.nets if name in names),
            (problem.batch, problem.tokens, problem.hidden),
            problem.batch * problem.tokens,
            sum(sizes[call.net] for call in calls),
            max(1, min(threads, os.cpu_count() or 1)),
            learned,
        )


BACKEND = Cpu()
