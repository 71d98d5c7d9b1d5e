"""The launches of a recursion over one slice of the batch, on buffers of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from recurx.operands import Operands, Span
from recurx.packed import PackedNets, device_words
from recurx.problem import Problem
from recurx.program import lower

from .arena import Row, rows_of, slots_of
from .block import Scratch, run_call
from .call_table import call_table
from .finish import finish_call
from .inject import form_call_input
from .rms import normalise


class TiledSlice:
    """x, states and intermediates of `size` samples, and the launches of all calls on them.

    The last slice of a batch may hold fewer samples: the rest of the buffers then holds whatever
    was there, is computed and thrown away. Samples never meet, so this changes no result.
    """

    weights = PackedNets

    def __init__(
        self, problem: Problem, span: Span, packed: PackedNets, size: int, like: Operands
    ) -> None:
        device, dtype = packed.buffer.device, packed.buffer.dtype
        program, cos_sin = lower(problem.schedule, span), like.rope
        shape = (slots_of(program), size, problem.tokens, problem.hidden)
        # Zeros, not empty: what a first short slice leaves unset must not be NaN bit patterns that
        # trap a debugger.
        self._arena = torch.zeros(shape, dtype=dtype, device=device)
        self._words = device_words(call_table(program, packed.of_net), device)
        self._rows = rows_of(program)
        self._packed = packed
        self._scratch = self._new_scratch(size, problem.tokens)
        self._cos_sin = None if cos_sin is None else tuple(torch.empty_like(t) for t in cos_sin)
        self._stream = None if like.seed is None else torch.zeros_like(like.seed)

    def _new_scratch(self, size: int, tokens: int) -> Any:
        elements = max(Scratch.elements(spec, size, tokens) for spec in self._packed.specs)
        return Scratch(elements, self._arena[0])

    def enter(self, operands: Operands, live: slice) -> None:
        """Copy x and the states of some samples in, and with the first ones the rotary tables:
        graphs hold the addresses of their own copy. What is drawn counts on from those samples."""
        if operands.rope is not None and live.start == 0:
            torch._foreach_copy_(list(self._cos_sin), list(operands.rope))
        if self._stream is not None:
            self._stream.copy_(operands.seed)
            self._stream[1].add_(live.start)
        tensors = [tensor[live] for tensor in (operands.x, *operands.states)]
        slots = [self._arena[n, : len(t)] for n, t in enumerate(tensors)]
        torch._foreach_copy_(slots, tensors)

    def leave(self, tensors: Sequence[Tensor]) -> None:
        """Copy the states out."""
        slots = [self._arena[n + 1, : t.shape[0]] for n, t in enumerate(tensors)]
        torch._foreach_copy_(list(tensors), slots)

    def launch(self) -> None:
        """Every row of the program, kernel by kernel; allocates nothing, so it can be captured.

        What a call leaves is raw until the next row's input is formed, or until the end.
        """
        squares, before, eps = None, 0, 0.0  # of the slot that is raw, which row `before` wrote
        for number, row in enumerate(self._rows):
            if squares is not None or not row.is_identity:
                form_call_input(
                    self._arena, self._words, number, before=before, squares=squares, eps=eps,
                    scaled=row.factors is not None,
                )  # fmt: skip
                squares = None
            if row.net is not None:
                first, last = self._packed.of_net[row.net]
                specs = self._packed.specs[first:last]
                run_call(
                    self._arena[row.place], specs, self._packed.blocks[first:last],
                    self._cos_sin, self._scratch,
                )  # fmt: skip
                squares, before, eps = self._scratch.squares, number, specs[-1].eps
            if row.finishes:
                self._finish(number, row, squares, eps)
                squares = None
        if squares is not None:
            normalise(self._arena[self._rows[before].write], squares, eps=eps)

    def _finish(
        self, number: int, row: Row, squares: Tensor | None, eps: float, share: Tensor | None = None
    ) -> None:
        stream = self._stream if row.factors is not None and row.factors.noise else None
        finish_call(
            self._arena[row.place], self._arena[row.write], self._words, number, stream=stream,
            squares=squares, eps=eps, share=share,
        )  # fmt: skip
