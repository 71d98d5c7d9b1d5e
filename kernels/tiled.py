"""The launches of a recursion over one slice of the batch, on buffers of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from recurx.operands import CosSin
from recurx.packed import PackedNets, device_words
from recurx.problem import Problem
from recurx.program import Program

from .block import Scratch, run_call
from .inject import form_call_input


class TiledSlice:
    """x, states and intermediates of `size` samples, and the launches of all calls on them.

    The last slice of a batch may hold fewer samples: the rest of the buffers then holds whatever
    was there, is computed and thrown away. Samples never meet, so this changes no result.
    """

    def __init__(
        self,
        problem: Problem,
        program: Program,
        packed: PackedNets,
        size: int,
        cos_sin: CosSin | None,
    ) -> None:
        device, dtype = packed.buffer.device, packed.buffer.dtype
        shape = (program.slots, size, problem.tokens, problem.hidden)
        # Zeros, not empty: what a first short slice leaves unset must not be NaN bit patterns that
        # trap a debugger.
        self._arena = torch.zeros(shape, dtype=dtype, device=device)
        self._words = device_words(program.table(packed.of_net), device)
        self._rows = program.rows
        self._packed = packed
        self._scratch = self._new_scratch(size, problem.tokens)
        self._cos_sin = None if cos_sin is None else tuple(torch.empty_like(t) for t in cos_sin)

    def _new_scratch(self, size: int, tokens: int) -> Any:
        elements = max(Scratch.elements(spec, size, tokens) for spec in self._packed.specs)
        return Scratch(elements, self._arena.dtype, self._arena.device)

    def set_tables(self, cos_sin: CosSin | None) -> None:
        """Take over the rotary tables: graphs hold the addresses of their own copy."""
        if cos_sin is not None:
            torch._foreach_copy_(list(self._cos_sin), list(cos_sin))

    def enter(self, tensors: Sequence[Tensor]) -> None:
        """Copy x and the states in; each may have fewer samples than the slice."""
        slots = [self._arena[n, : t.shape[0]] for n, t in enumerate(tensors)]
        torch._foreach_copy_(slots, list(tensors))

    def leave(self, tensors: Sequence[Tensor]) -> None:
        """Copy the states out."""
        slots = [self._arena[n + 1, : t.shape[0]] for n, t in enumerate(tensors)]
        torch._foreach_copy_(list(tensors), slots)

    def launch(self) -> None:
        """Every row of the program, kernel by kernel; allocates nothing, so it can be captured."""
        for number, row in enumerate(self._rows):
            if not row.is_identity:
                form_call_input(self._arena, self._words, number)
            if row.net is not None:
                first, last = self._packed.of_net[row.net]
                run_call(
                    self._arena[row.write],
                    self._packed.specs[first:last],
                    self._packed.blocks[first:last],
                    self._cos_sin,
                    self._scratch,
                )
