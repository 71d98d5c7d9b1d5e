"""The plan of the grid kernel (csrc/cuda/grid_sm80/): which CTA multiplies what.

A product has `units` of output channels and `tiles` of rows. Its rows are dealt to g groups of
CTAs, its units to the CTAs of a group; so a CTA reads 1/g of the rows in each call, and keeps
g / CTAs of the weight in shared memory. What does not fit comes from L2 in each call, to a place
set aside for the largest slice, while the CTA is at other stages. g is chosen for each of the four
products of a block together, by the bytes that the busiest CTA reads and the products that it
forms. Sizes are those of csrc/cuda/grid_sm80/layout.cuh; a test compares them.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass

from recurx.nets import ATTENTION, BlockSpec
from recurx.plan.count import SIXTEENS, blocks_of, ceil_div, flops, why_not_heads
from recurx.plan.device import Device
from recurx.plan.launch import LaunchPlan, Work
from recurx.problem import Problem

MAX_TOKENS, MAX_HIDDEN = 128, 512
# Beyond, other kernels are predicted faster on every device: this one moves each row to many CTAs.
MAX_SAMPLES = 16
WARPS = 8
SLOTS = ("mixer_in", "mixer_out", "gate_up", "down")
GROUPS = (1, 2, 3, 4, 6, 8, 12, 16)
FIXED = 4864  # bytes of shared memory: sizes, the table of shares, two exchanges of row sums
PROBABILITIES = 4096
# Of what mma.sync reaches, the share that loads which are not hidden leave: an assumption, not
# measured.
EFFICIENCY = 0.5
# A stage waits for the flags of its row tiles: one CTA's store, its addition and another's look are
# round trips to L2 as in a barrier, but nobody waits for the slowest CTA, nor do all add to one
# word. In barriers; an assumption, not measured.
HANDOVER = 0.6
# Then it waits for its first rows: a round trip to L2, about half a barrier.
FIRST_LOAD = 0.5
# The share of all these waits behind which weights come in: an assumption, not measured.
HIDDEN = 0.5


@dataclass(frozen=True)
class Product:
    """One product: units of 16 (wide) or 8 output channels, depth and rows in tiles of 16."""

    units: int
    depth: int
    wide: bool
    tiles: int
    fp8: bool = False

    @property
    def units_a_pass(self) -> int:
        return 3 if self.wide else 4

    @property
    def unit_bytes(self) -> int:
        values = self.depth * (256 if self.wide else 128)
        return values + (64 if self.wide else 32) if self.fp8 else 2 * values


def products_of(
    block: BlockSpec, batch: int, tokens: int, fp8: bool = False
) -> tuple[Product, ...]:
    """The four products of a block on [B, T, D]: mixer in, mixer out, gate_up, down."""
    width, token_tiles = block.hidden // 16, ceil_div(tokens, 16)
    inner, token_inner = 32 * ceil_div(block.inner, 32), 32 * ceil_div(block.token_inner, 32)
    rows, columns = batch * token_tiles, batch * width
    if block.kind == ATTENTION:
        shapes = [(3 * width, width, rows), (2 * width, width, rows)]
    else:
        shapes = [(token_inner // 8, token_tiles, columns)]
        shapes += [(ceil_div(tokens, 8), token_inner // 16, columns)]
    shapes += [(inner // 8, width, rows), (2 * width, inner // 16, rows)]
    return tuple(
        Product(units, depth, slot % 2 == 0, tiles, fp8)
        for slot, (units, depth, tiles) in enumerate(shapes)
    )


@dataclass(frozen=True)
class Share:
    """What the busiest CTA has of a product whose rows are dealt to `groups` groups."""

    product: Product
    ctas: int
    groups: int

    @property
    def units(self) -> int:
        return ceil_div(self.product.units, self.ctas // self.groups)

    @property
    def tiles(self) -> int:
        return ceil_div(self.product.tiles, self.groups)

    @property
    def splits(self) -> int:
        """Warps that share a row tile's depth, so that none rests."""
        return next(s for s in (8, 4, 2, 1) if s * min(self.tiles, WARPS) <= WARPS)

    @property
    def weight_bytes(self) -> int:
        return self.units * self.product.unit_bytes

    @property
    def row_bytes(self) -> int:
        passes = ceil_div(self.units, self.product.units_a_pass)
        return passes * self.tiles * self.product.depth * 512

    @property
    def streamed_bytes(self) -> int:
        """Of the weight, read from L2: once for each round of rows that the warps take together."""
        return ceil_div(self.tiles * self.splits, WARPS) * self.weight_bytes

    @property
    def shared_bytes(self) -> int:
        """Of the weight, read from shared memory: each row tile meets all of it."""
        return self.tiles * self.weight_bytes

    @property
    def flops(self) -> float:
        channels = self.units * (16 if self.product.wide else 8)
        return 2.0 * self.tiles * channels * (self.product.depth * 256)

    def handover_bytes(self, splits: int) -> int:
        units = min(self.units, self.product.units_a_pass)
        return (WARPS - WARPS // splits) * (units * (1024 if self.product.wide else 512) + 256)


def why_not_grid(problem: Problem, device: Device) -> str | None:
    """What this kernel lacks for a problem that csrc/cuda takes in general; None: nothing."""
    if problem.batch > MAX_SAMPLES:
        return f"is for up to {MAX_SAMPLES} samples at once, got B={problem.batch}"
    if problem.tokens > MAX_TOKENS:
        return f"runs up to T={MAX_TOKENS} tokens, got T={problem.tokens}"
    if problem.hidden % 32 or problem.hidden > MAX_HIDDEN:
        return f"needs D to be a multiple of 32 up to {MAX_HIDDEN}, got D={problem.hidden}"
    return why_not_heads(problem, *SIXTEENS)


@functools.lru_cache(maxsize=256)
def grid_plans(problem: Problem, device: Device, fp8: bool = False) -> tuple[LaunchPlan, ...]:
    """The plan with the least predicted time, if the kernel runs the problem at all.

    Args:
        fp8: all weights are quantised (`recurx.quantize`).
    """
    if why_not_grid(problem, device) is not None or problem.batch == 0:
        return ()
    blocks = [products_of(b, problem.batch, problem.tokens, fp8) for b in blocks_of(problem)]
    ctas = device.units
    rate = device.flops(2) * device.mma_sync * EFFICIENCY / ctas
    seconds_a_byte = ctas / (device.l2_gbs * 1e9)

    # Not more groups than any product of this slot has row tiles, nor than there are CTAs.
    most = [min(ctas, max(block[slot].tiles for block in blocks)) for slot in range(4)]
    choices = [[g for g in GROUPS if g <= m] for m in most]
    handover, numbers = {}, {}
    for slot, g in [(slot, g) for slot, some in enumerate(choices) for g in some]:
        shares = {block[slot]: Share(block[slot], ctas, g) for block in blocks}
        handover[slot, g] = _handover(list(shares.values()))
        for product, s in shares.items():  # bytes of the weight, seconds, and more if it is read
            once = s.flops / rate + s.row_bytes * seconds_a_byte
            numbers[slot, g, product] = s.weight_bytes, once, s.streamed_bytes * seconds_a_byte

    waits = sum(stages_a_call([b.kind for b in spec.blocks]) for _, spec in problem.nets)
    hidden = HIDDEN * _wait_seconds(device, waits)

    def cost(groups: tuple[int, ...]) -> tuple[float, tuple[int, ...]]:
        """Seconds of the busiest CTA for one call of every block, without the waits."""
        first = FIXED + max(PROBABILITIES, *(handover[pair] for pair in enumerate(groups)))
        found = [numbers[slot, groups[slot], block[slot]] for block in blocks for slot in range(4)]
        staged, kept = _kept([size for size, _, _ in found], device.shared_bytes - first)
        total = sum(seconds for _, seconds, _ in found)
        rest = [each for each, is_kept in zip(found, kept, strict=True) if not is_kept]
        if staged:
            total += max(0.0, sum(size for size, _, _ in rest) * seconds_a_byte - hidden)
        else:
            total += sum(streamed for _, _, streamed in rest)
        return total, groups

    _, groups = min(cost(g) for g in itertools.product(*choices))
    return (_plan(problem, device, blocks, groups),)


def _slot(blocks: list[tuple[Product, ...]], ctas: int, slot: int, groups: int) -> list[Share]:
    """The shares of this slot's products, equal ones once."""
    products = dict.fromkeys(block[slot] for block in blocks)
    return [Share(product, ctas, groups) for product in products]


def _handover(shares: list[Share]) -> int:
    splits = min(share.splits for share in shares)
    return max(share.handover_bytes(splits) for share in shares)


def _splits(blocks: list[tuple[Product, ...]], ctas: int, groups: tuple[int, ...]) -> list[int]:
    slots = (_slot(blocks, ctas, slot, g) for slot, g in enumerate(groups))
    return [min(share.splits for share in shares) for shares in slots]


def fixed_shared_bytes(
    blocks: list[tuple[Product, ...]], ctas: int, groups: tuple[int, ...]
) -> int:
    """Shared memory of a CTA before its first weight."""
    slots = (_slot(blocks, ctas, slot, g) for slot, g in enumerate(groups))
    return FIXED + max(PROBABILITIES, *(_handover(shares) for shares in slots))


def _kept(sizes: list[int], free: int) -> tuple[bool, list[bool]]:
    """Whether a place for the largest slice is set aside, and which slices stay for good."""
    staged = sum(sizes) > free >= max(sizes)
    at, kept = max(sizes) if staged else 0, []
    for size in sizes:
        kept.append(at + size <= free)
        at += size if kept[-1] else 0
    return staged, kept


def _wait_seconds(device: Device, stages: float) -> float:
    return stages * (HANDOVER + FIRST_LOAD) * device.barrier_us * 1e-6


def _layout(
    blocks: list[tuple[Product, ...]], ctas: int, groups: tuple[int, ...], shared_bytes: int
) -> tuple[bool, list[tuple[Share, bool]]]:
    """Whether slices are staged; every product's share, and whether its slice is kept."""
    shares = [Share(p, ctas, groups[slot]) for block in blocks for slot, p in enumerate(block)]
    free = shared_bytes - fixed_shared_bytes(blocks, ctas, groups)
    staged, kept = _kept([share.weight_bytes for share in shares], free)
    return staged, list(zip(shares, kept, strict=True))


def stages_a_call(kinds: list[str]) -> int:
    """Stages, one after another, of a net call with blocks of these kinds: to enter, five a block,
    and one to turn to a token-MLP that is not first."""
    token_blocks = [number for number, kind in enumerate(kinds) if kind != ATTENTION]
    return 1 + 5 * len(kinds) + sum(number > 0 for number in token_blocks)


def _plan(
    problem: Problem, device: Device, blocks: list[tuple[Product, ...]], groups: tuple[int, ...]
) -> LaunchPlan:
    ctas, specs = device.units, dict(problem.nets)
    staged, layout = _layout(blocks, ctas, groups, device.shared_bytes)
    splits = _splits(blocks, ctas, groups)
    state_bytes = 2.0 * problem.batch * problem.tokens * problem.hidden
    first, ranges = 0, {}
    for name, spec in problem.nets:
        ranges[name] = layout[first : first + 4 * len(spec.blocks)]
        first += 4 * len(spec.blocks)
    padded = moved = stages = behind = shared = 0.0
    for step in problem.schedule.steps:
        for share, kept in ranges[step.net]:
            padded += ctas * share.flops
            again = share.weight_bytes if staged else share.streamed_bytes
            moved += ctas * (share.row_bytes + (0 if kept else again))
            behind += ctas * (again if staged and not kept else 0)
            shared += ctas * (share.shared_bytes if kept or staged else 0)
        for block in specs[step.net].blocks:
            token_tiles = ceil_div(problem.tokens, 16)
            if block.kind == ATTENTION:  # a CTA reads 16 queries, all keys and values of a head
                items = problem.batch * block.num_heads * token_tiles
                moved += ceil_div(items, ctas) * ctas * 32 * block.head_dim * (1 + 2 * token_tiles)
                padded += 4.0 * items * 16 * 16 * token_tiles * block.head_dim
        moved += state_bytes * (2 + len(step.reads))
        stages += stages_a_call([block.kind for block in specs[step.net].blocks])
    # Of the waits, those behind which weights come in count as traffic.
    waits = _wait_seconds(device, stages)
    waits -= min(HIDDEN * waits, behind / (device.l2_gbs * 1e9))
    work = Work(
        flops=flops(problem),
        padded_flops=padded,
        dram_bytes=state_bytes * (1 + 2 * len(problem.schedule.states)),
        l2_bytes=moved + sum(ctas * s.weight_bytes for s, kept in layout if kept),
        shared_bytes=shared + behind,
        launches=2,  # the memset of the flags, and the kernel
        barriers=waits * 1e6 / device.barrier_us,
        efficiency=device.mma_sync * EFFICIENCY,
        overlap=False,
    )
    kept = sum(s.weight_bytes for s, kept in layout if kept)
    whole = sum(s.weight_bytes for s, _ in layout)
    settings = (
        ("ctas", ctas),
        *((f"groups_{name}", g) for name, g in zip(SLOTS, groups, strict=True)),
        *((f"splits_{name}", s) for name, s in zip(SLOTS, splits, strict=True)),
        ("shared_bytes", device.shared_bytes),
        ("weights", "fp8" if layout[0][0].product.fp8 else "bf16"),
        ("stages", int(stages)),
    )
    why = (
        f"every call is spread over all {ctas} CTAs, which keep {kept // 1024} of their "
        f"{whole // 1024} KB of weights in shared memory; {int(stages)} stages wait by flags"
    )
    return LaunchPlan("cuda", "grid", settings, work, why)
