"""FLOPs and values moved by a net call, stage by stage: what the mathematics asks for.

    stages(spec, batch, tokens)   the stages of one call of a net
    step_stages(problem)          all calls of a recursion, equal stages added up

Rows below are M = B * T. A product of [M, K] with [N, K] counts 2 M N K.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterable
from typing import NamedTuple

from recurx.nets import ATTENTION, BlockSpec, NetSpec
from recurx.problem import Problem

PRODUCTS = ("qkv", "attention", "o", "gate_up", "down", "t_gate_up", "t_down")


# Head dims of kernels whose tiles are 16 wide, and how to say so.
SIXTEENS = range(16, 129, 16), "to be a multiple of 16 up to 128"


def why_not_heads(problem: Problem, fits: Container[int], said: str) -> str | None:
    """One sentence, where some head_dim does not fit."""
    for name, spec in problem.nets:
        for block in spec.blocks:
            if block.kind == ATTENTION and block.head_dim not in fits:
                return f"needs head_dim {said}, net {name!r} has {block.head_dim}"
    return None


class Stage(NamedTuple):
    """One stage: FLOPs, and how many values it reads and writes if it stands alone.

    `weights` are values of parameters, `reads` and `writes` values of activations.
    """

    name: str
    flops: float
    weights: int = 0
    reads: int = 0
    writes: int = 0


def round_up(n: int, to: int) -> int:
    """The next multiple of `to`."""
    return -(-n // to) * to


def _swiglu(prefix: str, rows: int, width: int, inner: int) -> list[Stage]:
    """gate-up, activation, down and residual + rms of `rows` rows of `width` values."""
    m, d, f = rows, width, inner
    return [
        Stage(f"{prefix}gate_up", 4 * m * d * f, 2 * d * f, m * d, 2 * m * f),
        Stage(f"{prefix}swiglu", 5 * m * f, 0, 2 * m * f, m * f),
        Stage(f"{prefix}down", 2 * m * d * f, d * f, m * f, m * d),
        Stage(f"{prefix}norm", 5 * m * d, 0, 2 * m * d, m * d),
    ]


def block_stages(block: BlockSpec, batch: int, tokens: int) -> list[Stage]:
    """The stages of one block on [B, T, D], in order; the profiler uses these names too."""
    d, m = block.hidden, batch * tokens
    if block.changed:
        return _variant_stages(block, m, tokens)
    if block.kind != ATTENTION:
        mixer = _swiglu("t_", batch * d, tokens, block.token_inner)
    else:
        scores = batch * block.num_heads * tokens * tokens
        mixer = [
            Stage("qkv", 6 * m * d * d, 3 * d * d, m * d, 3 * m * d),
            Stage("rope", 6 * m * d, 0, 2 * m * d, 2 * m * d),
            Stage("attention", 4 * scores * block.head_dim + 5 * scores, 0, 3 * m * d, m * d),
            Stage("o", 2 * m * d * d, d * d, m * d, m * d),
            Stage("norm", 5 * m * d, 0, 2 * m * d, m * d),
        ]
    return mixer + _swiglu("", m, d, block.inner)


def _variant_stages(block: BlockSpec, m: int, tokens: int) -> list[Stage]:
    """Its products, attention over whole lines, and one elementwise pass for each sublayer."""
    d, found = block.hidden, []
    for name, rows, columns in block.products:
        n = m * d // tokens if name.startswith("t_") else m  # rows that it multiplies
        weights = rows * columns
        found.append(Stage(name, 2 * n * weights, weights, n * columns, n * rows))
    if block.kind == ATTENTION:
        width = block.num_heads * block.head_dim
        flops = m * block.line(tokens) * (4 * width + 5 * block.num_heads)
        found.append(Stage("attention", flops, 0, 3 * m * width, m * width))
    found.append(Stage("swiglu", 5 * m * block.inner, 0, 2 * m * block.inner, m * block.inner))
    return [*found, Stage("norm", 10 * m * d, 0, 4 * m * d, 2 * m * d)]


def stages(spec: NetSpec, batch: int, tokens: int) -> list[Stage]:
    """The stages of one call of a net, equal ones of its blocks added up, in order."""
    return merged(s for block in spec.blocks for s in block_stages(block, batch, tokens))


def step_stages(problem: Problem) -> list[Stage]:
    """All stages of the recursion, "inject" (the sums that form each call's input) first."""
    specs = dict(problem.nets)
    values = problem.batch * problem.tokens * problem.hidden
    found: list[Stage] = []
    for step in problem.schedule.steps:
        terms = len(step.reads)
        found.append(Stage("inject", (terms - 1) * values, 0, terms * values, values))
        if step.net in specs:
            found += stages(specs[step.net], problem.batch, problem.tokens)
    return merged(found)


def merged(found: Iterable[Stage]) -> list[Stage]:
    """Stages of equal name added up, in the order of their first appearance."""
    total: dict[str, Stage] = {}
    for stage in found:
        before = total.get(stage.name, Stage(stage.name, 0))
        sums = (a + b for a, b in zip(before[1:], stage[1:], strict=True))
        total[stage.name] = Stage(stage.name, *sums)
    return list(total.values())


def ceil_div(a: int, b: int) -> int:
    """a / b rounded up: tiles of b that hold a."""
    return -(-a // b)


def blocks_of(problem: Problem) -> list[BlockSpec]:
    """The blocks of every net that the recursion calls, each net once."""
    return [block for _, spec in problem.nets for block in spec.blocks]


def called_blocks(problem: Problem) -> list[BlockSpec]:
    """The blocks of all calls, in order; none of a net of foreign code."""
    specs = dict(problem.nets)
    called = (specs[step.net] for step in problem.schedule.steps if step.net in specs)
    return [block for spec in called for block in spec.blocks]


def flops(problem: Problem) -> float:
    """FLOPs of the recursion."""
    return sum(stage.flops for stage in step_stages(problem))


def weight_values(problem: Problem) -> int:
    """Parameters of all nets that the recursion calls, each counted once."""
    shapes = (shape for block in blocks_of(problem) for shape in block.weight_shapes)
    return sum(map(math.prod, shapes))
