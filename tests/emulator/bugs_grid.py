"""Bugs planted in the grid kernel, all in one build: a variable says which of them is awake.

Each edit is an exact substitution whose new text holds BUG, which is true while that bug is awake;
so forty bugs cost one compilation. Edits are made one after another, in this order.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from . import asleep
from .build import KERNELS, Emulated, build
from .grid import FILES

RACE = r"race: (read|write) after (read|write)"
UNSET = rf"{RACE}|uninitialised"
WRONG = r"relative error"
SPLIT = r"calls in one launch differ from calls one by one"
PLAN = r"another plan gave other bits"

GRID, SIZES, PRODUCT, ATTEND, ROWS, TOKENS = (
    f"grid_sm80/{part}.cuh"
    for part in ("kernel", "layout", "product", "attention", "states", "token_mlp")
)


@dataclass(frozen=True)
class Bug:
    """`net`: which net of the test shows it (`net_of` in tests/emulator/test_emulator_grid.py)."""

    name: str
    file: str
    old: str
    new: str
    found: str
    net: str = "attention"


BUGS = [
    # ---- the grid barrier
    Bug(
        "the others do not wait",
        GRID,
        "      }\n    }\n    __syncthreads();\n",
        "      }\n    }\n    if (!BUG) __syncthreads();\n",
        RACE,
    ),
    Bug(
        "arrives before the others",
        GRID,
        "    __syncthreads();\n    target += gridDim.x;",
        "    if (!BUG) __syncthreads();\n    target += gridDim.x;",
        RACE,
    ),
    Bug(
        "waits for the first generation only",
        GRID,
        "target += gridDim.x;",
        "target = (BUG ? 0 : target) + gridDim.x;",
        RACE,
    ),
    Bug("no wait", GRID, "while (rx::ld", "while (!BUG && rx::ld", RACE),
    Bug(
        "watches without acquire",
        GRID,
        "rx::ld_acquire(arrived_g)",
        "(BUG ? atomicAdd(arrived_g, 0u) : rx::ld_acquire(arrived_g))",
        RACE,
    ),
    Bug("waits for one CTA too few", GRID, " < target) {", " + (BUG ? 1 : 0) < target) {", RACE),
    Bug(
        "arrives without release",
        GRID,
        "      rx::red_add_release(arrived_g, 1);",
        "      if (BUG) atomicAdd(arrived_g, 1u);\n      else rx::red_add_release(arrived_g, 1);",
        RACE,
    ),
    Bug(
        "no arrival",
        GRID,
        "else rx::red_add_release",
        "else if (!BUG) rx::red_add_release",
        "livelock",
    ),
    Bug(
        "no barrier between attention and O",
        GRID,
        "attention(block.heads);\n        barrier();",
        "attention(block.heads);\n        if (!BUG) barrier();",
        RACE,
    ),
    # ---- slices of weights
    Bug(
        "slice ends early",
        SIZES,
        "ceil_div(units * (mine + 1), columns)",
        "ceil_div(units * (mine + 1), columns) - BUG",
        WRONG,
    ),
    Bug(
        "slice begins a unit late",
        SIZES,
        "slice.first * w.unit_bytes(), bytes",
        "(slice.first + (BUG && b == 0 ? 1 : 0)) * w.unit_bytes(), bytes",
        WRONG,
    ),
    Bug(
        "slices lie over each other",
        SIZES,
        "if (fits) at += bytes;",
        "if (fits) at += BUG ? bytes / 2 : bytes;",
        rf"{WRONG}|{RACE}",
    ),
    Bug(
        "weights used before they came",
        GRID,
        "rx::cp_async_wait<0>();",
        "if (!BUG) rx::cp_async_wait<0>();",
        RACE,
    ),
    Bug(
        "row group misses its last tile",
        PRODUCT,
        "ceil_div(p.row_tiles - p.slice.group, p.slice.groups)",
        "(BUG ? p.row_tiles / p.slice.groups"
        " : ceil_div(p.row_tiles - p.slice.group, p.slice.groups))",
        rf"{WRONG}|uninitialised",
    ),
    # ---- sums of parts
    Bug(
        "a part of the depth is not added",
        PRODUCT,
        "other < splits; other++",
        "other < splits - (BUG ? 1 : 0); other++",
        WRONG,
    ),
    Bug(
        "parts in an order of the CTA's own",
        PRODUCT,
        "    mine += slot_bytes;",
        "    mine += slot_bytes;\n    if (BUG && blockIdx.x % 2)\n"
        "      mine = slots + (row * (splits - 1) + splits - 1 - other) * slot_bytes;",
        PLAN,
        "cancelling",
    ),
    Bug(
        "squares of one part only",
        PRODUCT,
        "squares[0] += more.x, squares[1] += more.y;",
        "if (!BUG) squares[0] += more.x, squares[1] += more.y;",
        WRONG,
    ),
    Bug(
        "parts read before they are there",
        PRODUCT,
        "  __syncthreads();\n  if (part > 0) return;",
        "  if (!BUG) __syncthreads();\n  if (part > 0) return;",
        UNSET,
    ),
    Bug(
        "parts written before they are read",
        PRODUCT,
        "if (p.splits > 1) __syncthreads();",
        "if (p.splits > 1 && !BUG) __syncthreads();",
        RACE,
    ),
    # ---- arithmetic of a stage
    Bug(
        "gate and up exchanged",
        PRODUCT,
        "swiglu(acc[0][e] * scale[e >> 1], acc[1][e]",
        "swiglu(acc[BUG][e] * scale[e >> 1], acc[!BUG][e]",
        WRONG,
    ),
    Bug("K is not rotated", PRODUCT, "part < 2 && r.cos", "part < 2 - BUG && r.cos", WRONG),
    Bug(
        "rotates by the next token's angle",
        PRODUCT,
        "min(token, r.tokens - 1)",
        "min(token + BUG, r.tokens - 1)",
        WRONG,
    ),
    Bug(
        "V is not transposed",
        PRODUCT,
        "    v = make_uint4(transpose_8x8(v.x)",
        "    if (!BUG) v = make_uint4(transpose_8x8(v.x)",
        WRONG,
    ),
    Bug(
        "both rows get the scale of the first",
        PRODUCT,
        "acc[n][e] *= scale[e >> 1]",
        "acc[n][e] *= scale[BUG ? 0 : e >> 1]",
        WRONG,
    ),
    Bug(
        "residual without its scale",
        PRODUCT,
        "scale_g ? scale_g[row] : 1.f",
        "scale_g && !BUG ? scale_g[row] : 1.f",
        WRONG,
    ),
    Bug(
        "rows before QKV keep their length",
        GRID,
        "block_call(n, b, b > 0, before)",
        "block_call(n, b, b > 0 && !BUG, before)",
        WRONG,
    ),
    # ---- attention
    Bug("mask one key short", ATTEND, "key < p.tokens", "key < p.tokens - BUG", WRONG),
    Bug("mask one key long", ATTEND, "key < p.tokens - ", "key < p.tokens + BUG - ", WRONG),
    Bug(
        "maxima are not waited for",
        ATTEND,
        "  __syncthreads();\n  if (has_keys) {",
        "  if (!BUG) __syncthreads();\n  if (has_keys) {",
        UNSET,
    ),
    Bug(
        "probabilities are not waited for",
        ATTEND,
        "  __syncthreads();\n  float total",
        "  if (!BUG) __syncthreads();\n  float total",
        UNSET,
    ),
    # ---- states and rows
    Bug(
        "z_H is read as it came in",
        GRID,
        "if (made >= 0) written |=",
        "if (made >= 0 && (c == r.num_calls || !BUG)) written |=",
        SPLIT,
    ),
    Bug(
        "the injected sum is added twice",
        ROWS,
        "sum[t][w] = add_bf16(sum[t][w], inject[t][w]);",
        "sum[t][w] = add_bf16(BUG ? add_bf16(sum[t][w], inject[t][w]) : sum[t][w], inject[t][w]);",
        WRONG,
    ),
    Bug(
        "an unwritten state is forgotten",
        GRID,
        "  copy_unwritten(r, written);",
        "  if (!BUG) copy_unwritten(r, written);",
        "changed z_",
    ),
    Bug(
        "rms over too many columns",
        ROWS,
        "float(z.width * 16) + eps",
        "float(z.width * 16 + (BUG ? 16 : 0)) + eps",
        WRONG,
    ),
    Bug(
        "sums of squares reused too early",
        ROWS,
        "  __syncthreads();  // the sums",
        "  if (!BUG) __syncthreads();  // the sums",
        RACE,
    ),
    Bug(
        "rms over the padded tokens",
        TOKENS,
        "row_scales(scale, squares, r.tokens, eps);",
        "row_scales(scale, squares, BUG ? z.token_tiles * 16 : r.tokens, eps);",
        WRONG,
        "token_mlp",
    ),
    Bug(
        "padded tokens enter the token product",
        ROWS,
        ">= tokens) scale[half] = 0.f;",
        ">= tokens && !BUG) scale[half] = 0.f;",
        WRONG,
        "mixed",
    ),
    Bug(
        "h^T with exchanged blocks",
        TOKENS,
        "make_uint4(y[0], y[2], y[1], y[3])",
        "make_uint4(y[0], y[BUG ? 1 : 2], y[BUG ? 2 : 1], y[3])",
        WRONG,
        "token_mlp",
    ),
]


def plant_all(folder: Path) -> Emulated:
    """Builds a copy of the sources with every bug asleep."""
    asleep.plant(folder, BUGS, "grid_sm80")
    sources = [folder / FILES[0], *(KERNELS / name for name in FILES[1:])]
    return Emulated(build(sources, True, ("-DRX_NO_FP8",)), True)


def wake(library: Emulated, bug: Bug | None) -> None:
    asleep.wake(library.library, BUGS, bug)
