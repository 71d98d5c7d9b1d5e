"""Bugs planted where h lies in scratch (owner_sm80/place.cuh), all in one build as bugs_grid.py."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from recurx.nets import ATTENTION, TOKEN_MLP

from . import asleep
from .owner import EmulatedCuda, emulate

PLACE, PRODUCT, RESIDUAL, TOKENS, TOP, OWNER, ATTEND, STATES = (
    f"owner_sm80/{part}.cuh"
    for part in (
        "place", "product", "residual", "token_mlp", "kernel", "owner", "attention", "states"
    )
)  # fmt: skip
SCRATCH = r"race: (read|write) after (read|write) at global memory 'memory of the backend'"
RACE = r"race: (read|write) after (read|write)|uninitialised shared memory"
WRONG = r"relative error"
GUARD = "    if constexpr (P::kInScratch) {\n      if (!inside"


@dataclass(frozen=True)
class Bug:
    """`kind`: of the blocks that show it. Two CTAs own a sample each and run interleaved;
    `stacked`: three short ones each, which lie in the rows of one CTA as where h is in shared
    memory."""

    name: str
    file: str
    old: str
    new: str
    found: str
    kind: str = ATTENTION
    stacked: bool = False


BUGS = [
    # ---- who may touch which fragment when
    Bug(
        "stale fragment: a product begins before h is written",
        RESIDUAL,
        "eps);\n  }\n  __syncthreads();\n}",
        "eps);\n  }\n  if (!BUG) __syncthreads();\n}",
        RACE,
    ),
    Bug(
        "h is written while others multiply it",
        TOP,
        "    __syncthreads();  // the operand",
        "    if (!BUG || mixes_tokens) __syncthreads();  // the operand",
        SCRATCH,
    ),
    Bug(
        "a neighbour's scratch",
        OWNER,
        "int64_t(blockIdx.x) * p.at.scratch_bytes",
        "int64_t(BUG ? 0 : blockIdx.x) * p.at.scratch_bytes",
        SCRATCH,
    ),
    Bug(
        "a part of the neighbour's scratch",
        OWNER,
        "p.at.scratch_bytes;",
        "(p.at.scratch_bytes - (BUG ? 512 : 0));",
        SCRATCH,
    ),
    Bug(
        "columns go back before all of their norm is there",
        PLACE,
        "      __syncwarp();  // the norm",
        "      if (!BUG) __syncwarp();  // the norm",
        RACE,
        TOKEN_MLP,
    ),
    Bug(
        "a neighbour warp's columns",
        PLACE,
        "d0(P::kInScratch ? o.warp * kRowTiles",
        "d0(P::kInScratch ? (BUG ? 0 : o.warp) * kRowTiles",
        RACE,
        TOKEN_MLP,
    ),
    Bug(
        "a product begins before the columns are back",
        TOKENS,
        "if constexpr (P::kInScratch) reset_scales(o);",
        "if (!BUG) reset_scales(o);",
        rf"{RACE}|{WRONG}",
        TOKEN_MLP,
    ),
    # ---- data
    Bug(
        "the fragment of the step before",
        PRODUCT,
        "load(step + 1, P",
        "load(step + !BUG, P",
        WRONG,
    ),
    Bug(
        "an update is lost",
        PLACE,
        "store(const Owner<P>& o) const {\n" + GUARD,
        "store(const Owner<P>& o) const {\n" + GUARD + " || BUG",
        WRONG,
    ),
    Bug(
        "halves of a row tile exchanged",
        PLACE,
        "(row >> 3 & 1);",
        "((row >> 3 & 1) ^ int(BUG));",
        WRONG,
    ),
    Bug(
        "norm's factor forgotten on the way in",
        PLACE,
        "rx::pack_bf16(x.x * scale, x.y * scale);",
        "rx::pack_bf16(x.x * (BUG ? 1 : scale), x.y * (BUG ? 1 : scale));",
        WRONG,
        TOKEN_MLP,
    ),
    # ---- samples stacked in the rows of one CTA
    Bug(
        "a packed neighbour leaks through the mask",
        ATTEND,
        "constexpr int kSteps = kHeadDim / 16;\n"
        "  const int first = i / o.p.at.sample_tiles * o.p.at.sample_tiles;",
        "constexpr int kSteps = kHeadDim / 16;\n"
        "  const int first = BUG ? 0 : i / o.p.at.sample_tiles * o.p.at.sample_tiles;",
        WRONG,
        stacked=True,
    ),
    Bug(
        "values of a packed neighbour",
        ATTEND,
        "of column tiles of V\n  const int first = i /",
        "of column tiles of V\n  const int first = BUG ? 0 : i /",
        WRONG,
        stacked=True,
    ),
    Bug(
        "the mask ends with the row tile, not with the sample",
        ATTEND,
        "(e & 1) >= o.p.r.tokens)",
        "(e & 1) >= (BUG ? o.p.at.sample_tiles * 16 : o.p.r.tokens))",
        WRONG,
        stacked=True,
    ),
    Bug(
        "a sample that straddles row tiles",
        STATES,
        "const int sample_rows = o.p.at.sample_tiles * 16;",
        "const int sample_rows = BUG ? o.p.r.tokens : o.p.at.sample_tiles * 16;",
        WRONG,
        stacked=True,
    ),
    Bug(
        "tokens count on from sample to sample",
        ATTEND,
        "tile = tile + 1 == sample_tiles ? 0 : tile + 1;",
        "tile = tile + 1 == sample_tiles && !BUG ? 0 : tile + 1;",
        WRONG,
        stacked=True,
    ),
]


def plant_all(folder: Path) -> EmulatedCuda:
    """Builds a copy of the sources with every bug asleep: D=64, three row tiles."""
    asleep.plant(folder, BUGS, "owner_sm80")
    return emulate(((64, 3, 1),), folder=folder, flags=("-O1", "-g1"))


def wake(cuda: EmulatedCuda, bug: Bug | None) -> None:
    asleep.wake(cuda.emulated.library, BUGS, bug)
