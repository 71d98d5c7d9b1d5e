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

GRID, SIZES, FLAGS, RING, PRODUCT, FINISH, ATTEND, ROWS, TOKENS = (
    f"grid_sm80/{part}.cuh"
    for part in (
        "kernel", "layout", "flags", "ring", "product", "finish", "attention", "states", "token_mlp"
    )
)  # fmt: skip


@dataclass(frozen=True)
class Bug:
    """`net`: which net of the test shows it (`net_of` in tests/emulator/test_emulator_grid.py);
    `cluster`: of so many CTAs."""

    name: str
    file: str
    old: str
    new: str
    found: str
    net: str = "attention"
    cluster: int = 1


BUGS = [
    # ---- flags
    Bug(
        "arrives without release",
        FLAGS,
        "if (lane_id() == 0) rx::red_add_release(flag_g, n);",
        "if (lane_id() || (BUG && atomicAdd(flag_g, n) + 1)) return;\n"
        "  rx::red_add_release(flag_g, n);",
        RACE,
    ),
    Bug(
        "arrives before the other lanes",
        FLAGS,
        "  __syncwarp();\n  if (lane",
        "  if (!BUG) __syncwarp();\n  if (lane",
        RACE,
    ),
    Bug("no arrival", FLAGS, "if (lane_id() || (", "if (lane_id() || BUG || (", "livelock"),
    Bug(
        "watches without acquire",
        FLAGS,
        "seen = rx::ld_acquire(flag_g);",
        "seen = BUG ? atomicAdd(const_cast<uint32_t*>(flag_g), 0u) : rx::ld_acquire(flag_g);",
        RACE,
    ),
    Bug("no wait", FLAGS, "while (seen < least)", "while (!BUG && seen < least)", RACE),
    Bug(
        "the other lanes do not wait",
        FLAGS,
        "    __syncwarp();\n    return seen;",
        "    if (!BUG) __syncwarp();\n    return seen;",
        RACE,
    ),
    Bug(
        "watches the tile before",
        FLAGS,
        "per.of(tile) * count",
        "per.of(BUG ? max(tile - 1, 0) : tile) * count",
        RACE,
    ),
    Bug("one arrival too few", FLAGS, "wait(tile, epoch);", "wait(tile, epoch - BUG);", RACE),
    Bug(
        "the epoch of the first call",
        GRID,
        "Needs needs = {rows_g(), epoch.rows,",
        "Needs needs = {rows_g(), BUG ? uint32_t(kWarps) : epoch.rows,",
        RACE,
    ),
    Bug(
        "residual before it is complete",
        GRID,
        "ready = done + 1;",
        "ready = BUG ? 0 : done + 1;",
        RACE,
    ),
    Bug(
        "K and V of one tile are waited for",
        ATTEND,
        "p.token_tiles, kOne}.wait(sample);",
        "BUG ? 1 : p.token_tiles, kOne}.wait(BUG ? first + query_tile : sample);",
        RACE,
    ),
    Bug("K and V in one buffer", GRID, "kv = attended & 1;", "kv = BUG ? 0 : attended & 1;", RACE),
    Bug(
        "O before the heads are mixed",
        GRID,
        "done += share.heads * kWarps,",
        "done += BUG ? 0 : share.heads * kWarps,",
        RACE,
    ),
    Bug(
        "rows are entered before they are there",
        ROWS,
        "Needs{flags_g, epoch, 1, kOne}.wait(tile);",
        "if (!BUG) Needs{flags_g, epoch, 1, kOne}.wait(tile);",
        RACE,
    ),
    Bug(
        "the injected sum does not wait for its state",
        ROWS,
        "after == late",
        "after == (late && !BUG)",
        SPLIT,
    ),
    Bug(
        "h^T of one tile is waited for",
        GRID,
        "needs.count = z.token_tiles, needs.per",
        "needs.count = BUG ? 1 : z.token_tiles, needs.per",
        RACE,
        "token_mlp",
    ),
    Bug(
        "h is not turned back yet",
        GRID,
        "needs.epoch = epoch.samples,",
        "needs.epoch = BUG ? 0 : epoch.samples,",
        RACE,
        "token_mlp",
    ),
    Bug(
        "both middles in one buffer",
        GRID,
        "middle = turned ? z.token_middle",
        "middle = turned && !BUG ? z.token_middle",
        RACE,
        "token_mlp",
    ),
    Bug(
        "the next stage takes shared memory at once",
        GRID,
        "next_stage() const { __syncthreads(); }",
        "next_stage() const { if (!BUG) __syncthreads(); }",
        RACE,
    ),
    # ---- slices of weights
    Bug(
        "slice ends early",
        SIZES,
        "ceil_div(units * (mine + 1), columns)",
        "ceil_div(units * (mine + 1), columns) - BUG",
        "livelock",
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
        "  rx::cp_async_wait<0>();\n  __syncthreads();\n}\n",
        "  if (!BUG) rx::cp_async_wait<0>();\n  __syncthreads();\n}\n",
        RACE,
    ),
    Bug(
        "staged weights used before they came",
        GRID,
        "if (!s.staged) return;",
        "if (BUG || !s.staged) return;",
        rf"{UNSET}|{PLAN}",
    ),
    Bug(
        "the next slice comes while one is read",
        GRID,
        "    __syncthreads();\n    if (s.staged) send_for(",
        "    if (!BUG) __syncthreads();\n    if (s.staged) send_for(",
        RACE,
    ),
    Bug(
        "the slice after the next one",
        GRID,
        "s.next < 0 ? upcoming : s.next",
        "BUG || s.next < 0 ? upcoming : s.next",
        rf"{UNSET}|{PLAN}",
    ),
    Bug(
        "row group misses its last tile",
        GRID,
        "ceil_div(rows - mine.group, mine.groups)",
        "(BUG ? rows / mine.groups : ceil_div(rows - mine.group, mine.groups))",
        "livelock",
    ),
    # ---- rows of a cluster
    Bug(
        "copies of what the proxy does not see",
        RING,
        "    if (lane_id() == 0) rx::fence_proxy_async_global();",
        "    if (!BUG && lane_id() == 0) rx::fence_proxy_async_global();",
        r"fence.proxy.async",
        cluster=2,
    ),
    Bug(
        "a chunk is sent before it was left",
        RING,
        "    rx::mbar_wait_copies(empty(chunk),",
        "    if (!BUG) rx::mbar_wait_copies(empty(chunk),",
        RACE,
        cluster=2,
    ),
    Bug(
        "a chunk is free when one CTA has left it",
        RING,
        "+ t), uint32_t(cluster));",
        "+ t), BUG ? 1 : uint32_t(cluster));",
        rf"{RACE}|deadlock|more arrivals",
        cluster=2,
    ),
    Bug(
        "a chunk is left before all lanes have it",
        RING,
        "    __syncwarp();\n    if (lane_id() == 0) rx::mbar_arrive_remote_reads",
        "    if (!BUG) __syncwarp();\n    if (lane_id() == 0) rx::mbar_arrive_remote_reads",
        RACE,
        cluster=2,
    ),
    Bug(
        "a chunk is handed back to oneself",
        RING,
        "rx::mapa(empty(taken), sender())",
        "rx::mapa(empty(taken), BUG ? rx::cluster_rank() : sender())",
        "deadlock|more arrivals",
        cluster=2,
    ),
    Bug(
        "rows for one CTA",
        RING,
        "uint16_t((1u << cluster) - 1)",
        "uint16_t(BUG ? 1u << sender() : (1u << cluster) - 1)",
        "deadlock",
        cluster=2,
    ),
    Bug(
        "parity of a send",
        RING,
        "~(chunk / kRingChunks) & 1",
        "(BUG ^ ~(chunk / kRingChunks)) & 1",
        "deadlock",
        cluster=2,
    ),
    Bug(
        "parity of what is taken",
        RING,
        "taken / kRingChunks & 1)",
        "(taken / kRingChunks + BUG) & 1)",
        rf"{UNSET}|deadlock",
        cluster=2,
    ),
    Bug(
        "chunks are counted anew in each product",
        RING,
        "    if (lane_id() == 0) rings.chunks[warp_id()] = taken;",
        "    if (!BUG && lane_id() == 0) rings.chunks[warp_id()] = taken;",
        rf"{UNSET}|deadlock",
        cluster=2,
    ),
    Bug(
        "barriers that copies do not know",
        RING,
        "    rx::fence_mbarrier_init();",
        "    if (!BUG) rx::fence_mbarrier_init();",
        "fence.mbarrier_init",
        cluster=2,
    ),
    Bug(
        "leaves while a peer hands back",
        RING,
        "close_rings() {\n  __syncwarp();",
        "close_rings() {\n  __syncwarp();\n  if (BUG) return;",
        "exit",
        cluster=2,
    ),
    Bug(
        "a CTA with fewer units sends for fewer rows",
        PRODUCT,
        "(kRing ? s.first + p.most : s.last)",
        "(kRing && !BUG ? s.first + p.most : s.last)",
        "deadlock|livelock",
        "token_mlp",
        cluster=2,
    ),
    Bug(
        "a cluster reads rows for nothing",
        GRID,
        "most = max(most, s.last - s.first);",
        "most = max(most, BUG ? slice_of<true>(plan, slot, units, 0).last : s.last - s.first);",
        RACE,
        "uneven",
        cluster=2,
    ),
    Bug(
        "a cluster over two row groups",
        SIZES,
        "s.group[slot] = cta / (kRing ? plan.cluster : 1)",
        "s.group[slot] = cta / (kRing && !BUG ? plan.cluster : 1)",
        rf"{RACE}|{UNSET}|{WRONG}|livelock|deadlock",
        cluster=2,
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
        "  rx::bar_sync(1 + row, splits * 32);\n  if (part > 0) return;",
        "  if (!BUG) rx::bar_sync(1 + row, splits * 32);\n  if (part > 0) return;",
        UNSET,
    ),
    Bug(
        "parts written before they are read",
        PRODUCT,
        "if (splits > 1) rx::bar_sync(",
        "if (splits > 1 && !BUG) rx::bar_sync(",
        RACE,
    ),
    # ---- arithmetic of a stage
    Bug(
        "gate and up exchanged",
        FINISH,
        "swiglu(acc[0][e] * scale[e >> 1], acc[1][e]",
        "swiglu(acc[BUG][e] * scale[e >> 1], acc[!BUG][e]",
        WRONG,
    ),
    Bug("K is not rotated", FINISH, "part < 2 && r.cos", "part < 2 - BUG && r.cos", WRONG),
    Bug(
        "rotates by the next token's angle",
        FINISH,
        "min(token + row * 8, r.tokens - 1)",
        "min(token + row * 8 + BUG, r.tokens - 1)",
        WRONG,
    ),
    Bug(
        "V is not transposed",
        FINISH,
        "    x = make_uint4(transpose_8x8(x.x)",
        "    if (!BUG) x = make_uint4(transpose_8x8(x.x)",
        WRONG,
    ),
    Bug(
        "both rows get the scale of the first",
        FINISH,
        "acc[n][e] *= scale[e >> 1]",
        "acc[n][e] *= scale[BUG ? 0 : e >> 1]",
        WRONG,
    ),
    Bug(
        "residual without its scale",
        FINISH,
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
        "if (last) written |=",
        "if (last && (c == r.num_calls || !BUG)) written |=",
        SPLIT,
    ),
    Bug(
        "the injected sum is added twice",
        ROWS,
        "sum[t][w] = rx::add_bf16(sum[t][w], inject[t][w]);",
        "sum[t][w] = rx::add_bf16("
        "BUG ? rx::add_bf16(sum[t][w], inject[t][w]) : sum[t][w], inject[t][w]);",
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
        "float(z.width * 16)) + eps",
        "float(z.width * 16 + (BUG ? 16 : 0))) + eps",
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
