"""The gradient window in the CPU engine (csrc/cpu/backward/): one call forward, one backward.

What is kept from the forward to the backward, in units of D numbers a row, call and block (D =
hidden; one published attention block of inner width 3 D, B * T rows):

    save="all"      h, q, k, v, mixed, mid, gate and up: 12; nothing but silu(gate) * up and the
                    softmax is computed again
    save="block"    h: 1; the block is computed again up to its last product
    save="states"   nothing; the window runs once more in the backward, a slice of samples at a time

In a window numbers below 2^-126 count as zeros, which in bf16 they always do.

To each comes the result of each call, what learned factors multiply, and a few fp32 numbers a row.
csrc/cpu/backward/kept.hpp says
what a block keeps, also of one whose fields are not TRM's, and where it lies.
"""

from __future__ import annotations

import functools
import math
import mmap
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from recurx.backends import Window
from recurx.forking import fork_lock
from recurx.nets import BlockSpec, numbers_of
from recurx.operands import Operands, Span
from recurx.problem import Problem
from recurx.program import lower

SAVES = ("all", "block", "states")  # numbered as the engine does
LEAST_SPARE, MOST_SPARE = 1 << 22, 1 << 29  # bytes of memory to use again, and of all that waits
SLOW_TOUCH = 2e-3  # seconds of a page of 2 MB; others take 0.1 to 0.4 ms
_slow: list[float] = []  # those first touches
_spare: list[mmap.mmap] = []  # oldest first
_taking = fork_lock()

# Of a factor: the step, whether its scale, which weight, and the values, [D] in fp32.
Learned = tuple[int, bool, int, Tensor]
# Of (problem, operands, span): the module, the first arguments of its window calls, the threads.
Begin = Callable[[Problem, Operands, Span], tuple[Any, tuple[Any, ...], int, list[Learned]]]


class CpuWindow(Window):
    """`begin` packs the weights of the forward; the backward reads the masters themselves."""

    own_forward = True

    def __init__(self, begin: Begin, module: Callable[[], Any]) -> None:
        self._begin, self._module = begin, module

    def kept(
        self, problem: Problem, span: Span, save: str
    ) -> list[tuple[tuple[int, ...], torch.dtype]]:
        if save == "states":
            return []
        tokens, specs = int(problem.tokens), dict(problem.nets)  # T may be a symbol, while traced
        module, values, floats = self._module(), 0, 0
        steps = problem.schedule.steps[span.start : span.stop]
        for call, step in zip(lower(problem.schedule, span).calls, steps, strict=True):
            values += tokens * problem.hidden * (1 + len(step.learned))
            for block in specs[call.net].blocks:
                more = _kept_of(module, block, tokens, save)
                values, floats = values + more[0], floats + more[1]
        batch = problem.batch
        return [((batch, values), problem.dtype), ((batch, floats), torch.float32)]

    def forward(
        self, problem: Problem, operands: Operands, span: Span, save: str
    ) -> tuple[list[Tensor], list[Tensor]]:
        module, head, threads, learned = self._begin(problem, operands, span)
        kept = [_used_again(module, *each) for each in self.kept(problem, span, save)]
        outs = [torch.empty_like(state) for state in operands.states]
        inputs, rope = [operands.x, *operands.states], operands.float_rope()
        module.cpu_window_forward(
            *head, addresses(inputs), [0, *addresses(outs)], *addresses(rope or (None, None)),
            SAVES.index(save), _places(kept), threads, beside_of(operands, learned),
        )  # fmt: skip
        return outs, kept

    def backward(
        self, problem: Problem, operands: Operands, span: Span, save: str, outs: Sequence[Tensor],
        kept: Sequence[Tensor], d_outs: Sequence[Tensor | None], wants: Sequence[bool],
    ) -> list[Tensor | None]:  # fmt: skip
        module, head, threads, learned = self._begin(problem, operands, span)
        entered, rope = [operands.x, *operands.states], operands.float_rope() or (None, None)
        d_in = [
            torch.empty_like(t) if want else None for t, want in zip(entered, wants, strict=False)
        ]
        d_outs = [None if d is None else d.contiguous() for d in d_outs]
        masters, own = operands.weights, problem.cuts[len(head[0]) - 1].stop  # then factors
        d_weights = [
            _fresh(module, w.shape, torch.float32) if want else None
            for w, want in zip(masters, wants[len(entered) :], strict=True)
        ]
        for d in d_weights[own:]:
            if d is not None:
                d.zero_()
        plain = [plain_weight(w) for w in masters[:own]]
        module.cpu_window_backward(
            *head, addresses(entered), *addresses(rope), SAVES.index(save), _places(kept),
            [(w.data_ptr(), w.dtype == torch.bfloat16) for w in plain], [0, *addresses(d_outs)],
            addresses(d_in), addresses(d_weights[:own]), threads,
            beside_of(operands, learned, d_weights),
        )  # fmt: skip
        return [
            *d_in,
            *(d if d is None else d.to(w.dtype) for d, w in zip(d_weights, masters, strict=True)),
        ]


def beside_of(
    operands: Operands, learned: Sequence[Learned], d_weights: Sequence[Tensor | None] | None = None
) -> tuple[Any, ...]:
    """What a call reads beside states and weights, and where gradients of factors are added."""
    mask, into = operands.key_mask, d_weights or [None] * len(operands.weights)
    factors = [(*which, *addresses((each, into[at]))) for *which, at, each in learned]
    return *operands.numbers(), *addresses((mask,)), factors


def plain_weight(weight: Tensor) -> Tensor:
    """A weight as the engine reads it: fp32 or bf16, contiguous."""
    weight = weight.detach()
    known = weight.dtype in (torch.float32, torch.bfloat16)
    return (weight if known else weight.float()).contiguous()


def fields_of(block: BlockSpec) -> dict[str, Any]:
    """In what a block differs from those of TRM and HRM, as the engine takes it."""
    return {name: getattr(block, name) for name in block.changed}


@functools.lru_cache(maxsize=256)  # asked at every step of training
def _kept_of(module: Any, block: BlockSpec, tokens: int, save: str) -> tuple[int, int]:
    """What the engine keeps of one sample for a call of a block: values of the states, floats."""
    return module.cpu_window_kept(numbers_of(block), fields_of(block), tokens, SAVES.index(save))


def _fresh(module: Any, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    made = torch.empty(shape, dtype=dtype)
    return made if _slow else _on_huge_pages(module, made)


def _on_huge_pages(module: Any, made: Tensor) -> Tensor:
    """Where a virtual machine's host takes free memory back, a fresh page of 2 MB took 10 ms: there
    gradients stay on small pages."""
    seconds = module.cpu_on_huge_pages(made.data_ptr(), made.nbytes)
    if seconds > SLOW_TOUCH:
        _slow[:] = [seconds]
    return made


def _used_again(module: Any, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Memory that an earlier call gave back, if it fits: the first touch of new pages took a sixth
    of a window (B=8, bf16 with AMX, one thread), or 50 ms beside 66 (60 MB on a Zen 4's VM)."""
    nbytes = math.prod(shape) * dtype.itemsize
    if not LEAST_SPARE <= nbytes <= MOST_SPARE:
        return _fresh(module, shape, dtype)
    with _taking:
        fits = [each for each in _spare if nbytes <= len(each) <= nbytes * 5 // 4]
        memory = fits[0] if fits else mmap.mmap(-1, nbytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        _spare[:] = [each for each in _spare if each is not memory]
    made = torch.frombuffer(memory, dtype=dtype, count=math.prod(shape)).view(*shape)
    made = made if fits else _on_huge_pages(module, made)
    weakref.finalize(made.untyped_storage(), _give_back, memory).atexit = False
    return made


def _give_back(memory: mmap.mmap) -> None:
    _spare.append(memory)  # without a lock: it runs wherever the last tensor dies
    while sum(map(len, list(_spare))) > MOST_SPARE:
        del _spare[:1]


def addresses(tensors: Sequence[Tensor | None]) -> list[int]:
    return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]


def _places(kept: Sequence[Tensor]) -> tuple[int, int, int, int]:
    if not kept:
        return 0, 0, 0, 0
    values, floats = kept
    return values.data_ptr(), values.numel(), floats.data_ptr(), floats.numel()
