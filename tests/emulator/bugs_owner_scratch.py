"""Bugs planted where h lies in scratch (owner_sm80/place.cuh), all in one build as bugs_grid.py."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from recurx.nets import ATTENTION, TOKEN_MLP

from . import asleep
from .owner import EmulatedCuda, emulate

PLACE, PRODUCT, RESIDUAL, TOKENS, TOP, OWNER = (
    f"owner_sm80/{part}.cuh"
    for part in ("place", "product", "residual", "token_mlp", "kernel", "owner")
)
SCRATCH = r"race: (read|write) after (read|write) at global memory 'memory of the backend'"
RACE = r"race: (read|write) after (read|write)|uninitialised shared memory"
WRONG = r"relative error"
GUARD = "    if constexpr (P::kInScratch) {\n      if (!inside"


@dataclass(frozen=True)
class Bug:
    """`kind`: of the blocks that show it. Two CTAs own a sample each and run interleaved."""

    name: str
    file: str
    old: str
    new: str
    found: str
    kind: str = ATTENTION


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
]


def plant_all(folder: Path) -> EmulatedCuda:
    """Builds a copy of the sources with every bug asleep: D=64, three row tiles."""
    asleep.plant(folder, BUGS, "owner_sm80")
    return emulate(((64, 3, 1),), folder=folder, flags=("-O1", "-g1"))


def wake(cuda: EmulatedCuda, bug: Bug | None) -> None:
    asleep.wake(cuda.emulated.library, BUGS, bug)
