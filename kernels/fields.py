"""Which fields of blocks, beside TRM's and HRM's, and whether learned factors of steps each plan of
backend "triton" has kernels for.

Plans read this, so nothing here imports triton. What is not here runs by kind "graph", which
replays the reference as one CUDA graph.
"""

from __future__ import annotations

import torch

from recurx.problem import Problem
from recurx.schedule import FACTORS, LEARNED

# By the plan's kind; a kind that is not here has kernels for none.
FIELDS: dict[str, frozenset[str]] = {
    "library": frozenset((
        "kind", "norm", "norm_weight", "norm_bias", "placement", "token_norm", "residual_scale",
        "learned_scale", "skip_scale", "learned_skip", "biases", "kv_heads", "head_size", "mask",
        "prefix", "window", "qk_norm", "qk_norm_weight", "attn_gate", "attn_norm",
        "attn_norm_weight", "activation", "gated", "inner_norm", "inner_norm_weight",
        "inner_norm_tokens", "inner_norm_of", "conv", "conv_of", "conv_dtype",
        "dropout", "drop_path", "key_padding", "axial", LEARNED,
    )),
}  # fmt: skip
# Fields in which blocks of a gradient window may differ, and factors of its steps: all but these.
UNTRAINED = frozenset(("axial", LEARNED))
TRAINED: frozenset[str] = FIELDS["library"].union(FACTORS) - UNTRAINED
# Values of a row, over D or F and over T, that a program holds: 64 a thread, 3 operands.
MAX_ROW, MAX_ROW_OVER_T = 4096, 2048


def why_not_trained(problem: Problem) -> str | None:
    """One sentence: which field of a block or step, or which value, has no backward in kernels."""
    for block in (block for _, spec in problem.nets for block in spec.blocks):
        if block.conv_dtype and getattr(torch, block.conv_dtype) != problem.dtype:
            return f"trains convolutions in the states' dtype, not conv_dtype={block.conv_dtype}"
    return problem.unknown(TRAINED)


def why_not(problem: Problem) -> str | None:
    """One sentence: which field of a block or step, or which value of one, kind "library" does not
    run."""
    if (unknown := problem.unknown(FIELDS["library"].union(FACTORS))) is not None:
        return f"{unknown}, but by kind graph"
    for block in (block for _, spec in problem.nets for block in spec.blocks):
        if block.conv_dtype == "float32" and problem.dtype != torch.float32:
            return f"runs no convolution wider than the states, conv_dtype={block.conv_dtype}"
        rows = {
            "attn_norm": block.num_heads * block.head_dim if block.attn_norm else 0,
            "inner_norm": block.inner if block.inner_norm else 0,
            "inner_norm_tokens": block.token_inner if block.inner_norm_tokens else 0,
        }
        for name, width in rows.items():
            most = MAX_ROW_OVER_T if name == "inner_norm_tokens" else MAX_ROW
            if width > most:
                return f"runs {name} of up to {most} values, got {width}"
    return None
