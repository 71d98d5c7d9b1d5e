"""The rows of a program as int32 words, which kernels read: what is added, run and written is data.

    a row       first block, one past the last, place, where its reads start, number of states, of
                injects, where its factors start, slot that is written
    reads       the slots that the rows read
    factors     scale, keep, damping, noise as the bits of fp32, and the call's number

`place` is the slot in which the input is formed and the net runs (recurx/program.py); where it is
not the one that is written, the call is damped. Factors start at 0 where no row has any; else every
row has some. What is learned is not among them: kernels read it where it lies, [D].
"""

from __future__ import annotations

import struct
from collections.abc import Mapping

import triton
import triton.language as tl

from recurx.program import PLAIN, Program

from .arena import rows_of

# Words a row: a multiple of 16 bytes, so that Triton compiles one kernel for all rows.
ROW = 8


def call_table(program: Program, blocks: Mapping[str, tuple[int, int]]) -> tuple[int, ...]:
    """The words; `blocks` says which blocks (first, one past the last) make up each net."""
    words: list[int] = []
    reads: list[int] = []
    factors: list[int] = []
    ends = ROW * len(rows_of(program)) + sum(len(r.state) + len(r.inject) for r in rows_of(program))
    has_factors = any(row.factors for row in rows_of(program))
    for row in rows_of(program):
        first, last = (0, 0) if row.net is None else blocks[row.net]
        at = ROW * len(rows_of(program)) + len(reads)
        words += [first, last, row.place, at, len(row.state), len(row.inject)]
        words += [ends + len(factors) if has_factors else 0, row.write]
        reads += [*row.state, *row.inject]
        if has_factors:
            *values, number, _ = row.factors or PLAIN
            factors += [*struct.unpack("4i", struct.pack("4f", *values)), number]
    return tuple(words + reads + factors)


@triton.jit
def load_factor(table, row, number: tl.constexpr):
    """Factor `number` (0 scale, 1 keep, 2 damping, 3 noise) of the row at `row`, a scalar."""
    return tl.load(table + tl.load(row + 6) + number).to(tl.float32, bitcast=True)


@triton.jit
def learned(factor, D: tl.constexpr, COLS: tl.constexpr):
    """The values of a learned factor, float32 [D], beside rows."""
    cols = tl.arange(0, COLS)[None, :]
    return tl.load(factor + cols, mask=cols < D, other=0.0)


@triton.jit
def load_number(table, row):
    """The number of the call, for its noise."""
    return tl.load(table + tl.load(row + 6) + 4)
