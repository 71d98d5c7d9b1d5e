"""The plan of the grid kernel (csrc/cuda/grid_sm80/): which CTA multiplies what.

A product has `units` of output channels and `tiles` of rows. Its rows are dealt to g groups of
CTAs, its units to the CTAs of a group; so a CTA reads 1/g of the rows in each call, and keeps
g / CTAs of the weight in shared memory. What does not fit comes from L2 in each call, to a place
set aside for the largest slice, while the CTA is at other stages. On Hopper the CTAs of a cluster
may get their rows at once, through rings in shared memory. g is chosen for each of the four
products of a block together, by the bytes that the busiest CTA reads and the products that it
forms. Sizes are those of csrc/cuda/grid_sm80/layout.cuh; a test compares them.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass

from recurx.nets import ATTENTION, BlockSpec, NetSpec
from recurx.plan.count import SIXTEENS, blocks_of, ceil_div, flops, why_not_heads
from recurx.plan.cuda_cluster import CLUSTERS, places
from recurx.plan.device import Device
from recurx.plan.launch import SHARED, LaunchPlan, Work
from recurx.problem import Problem

MAX_TOKENS, MAX_HIDDEN = 128, 512
# Beyond, other kernels are predicted faster on every device: this one moves each row to many CTAs.
MAX_SAMPLES = 16
WARPS = 8
SLOTS = ("mixer_in", "mixer_out", "gate_up", "down")
GROUPS = (1, 2, 3, 4, 6, 8, 12, 16)
FIXED = 4864  # bytes of shared memory: sizes, the table of shares, two exchanges of row sums
PROBABILITIES = 4096
RINGS = 66432  # of rows, in a cluster
# Of what mma.sync reaches, the share that loads which are not hidden leave: an assumption, not
# measured.
EFFICIENCY = 0.5
# A stage waits for the flags of its row tiles: one CTA's store, its addition and another's look are
# round trips to L2 as in a barrier, but nobody waits for the slowest CTA, nor do all add to one
# word. In barriers; an assumption, not measured.
HANDOVER = 0.6
# Then it waits for its first rows: a round trip to L2, about half a barrier. Assumptions, too.
FIRST_LOAD = 0.5
COPY = 0.2  # a cluster's copies come so much later than loads, in each product
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


Products = tuple[Product, ...]
Cut = tuple[int, int]  # CTAs, and those of a cluster
Groups = tuple[int, ...]


def products_of(block: BlockSpec, batch: int, tokens: int, fp8: bool = False) -> Products:
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
    wide = (True, False, True, False)
    return tuple(Product(u, d, w, t, fp8) for (u, d, t), w in zip(shapes, wide, strict=True))


@dataclass(frozen=True)
class Share:
    """What the busiest CTA has of a product whose rows are dealt to `groups` groups."""

    product: Product
    ctas: int
    cluster: int
    groups: int

    @property
    def units(self) -> int:
        columns = self.ctas // self.cluster // self.groups * self.cluster
        return ceil_div(self.product.units, columns)

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
        """Of the weight, which each row tile meets; rows of a cluster pass twice, others once."""
        return self.tiles * self.weight_bytes + (self.row_bytes if self.cluster > 1 else 0)

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
    fits = {1: device.units}
    if device.capability == (9, 0):
        fits |= {c: min(places(device, problem.hidden, c), device.units // c) for c in CLUSTERS}
    plans = [_best(problem, device, blocks, (n * c, c)) for c, n in fits.items() if n]
    return (min(plans, key=lambda plan: plan.seconds(device)),)


def _best(problem: Problem, device: Device, blocks: list[Products], cut: Cut) -> LaunchPlan:
    """That with the row groups of least predicted time."""
    clusters = cut[0] // cut[1]
    rate = device.flops(2) * device.mma_sync * EFFICIENCY / device.units
    shared_rate = device.shared_gbs * 1e9 * SHARED / device.units
    seconds_a_byte = device.units / (device.l2_gbs * 1e9)
    # Not more groups than any product of this slot has row tiles, nor than there are clusters.
    most = [min(clusters, max(block[slot].tiles for block in blocks)) for slot in range(4)]
    choices = [[g for g in GROUPS if g <= m] for m in most]
    handover, numbers = {}, {}
    for slot, g in [(slot, g) for slot, some in enumerate(choices) for g in some]:
        shares = {block[slot]: Share(block[slot], *cut, g) for block in blocks}
        handover[slot, g] = _handover(list(shares.values()))
        for product, s in shares.items():  # bytes of the weight, seconds, and more if it is read
            once = max(s.flops / rate, s.shared_bytes / shared_rate)
            once += _row_traffic(s, device) * seconds_a_byte
            numbers[slot, g, product] = s.weight_bytes, once, s.streamed_bytes * seconds_a_byte

    waits = sum(_stages(spec, cut)[1] for _, spec in problem.nets)
    hidden = HIDDEN * waits * device.barrier_us * 1e-6
    fixed = FIXED + (RINGS if cut[1] > 1 else 0)

    def cost(groups: Groups) -> tuple[float, Groups]:
        """Seconds of the busiest CTA for one call of every block, without the waits."""
        first = fixed + max(PROBABILITIES, *(handover[pair] for pair in enumerate(groups)))
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
    return _plan(problem, device, blocks, cut, groups)


def _slots(blocks: list[Products], cut: Cut, groups: Groups) -> list[list[Share]]:
    """The shares of each slot's products."""
    return [[Share(block[i], *cut, g) for block in blocks] for i, g in enumerate(groups)]


def _handover(shares: list[Share]) -> int:
    splits = min(share.splits for share in shares)
    return max(share.handover_bytes(splits) for share in shares)


def fixed_shared_bytes(blocks: list[Products], cut: Cut, groups: Groups) -> int:
    """Shared memory of a CTA before its first weight."""
    most = max(PROBABILITIES, *map(_handover, _slots(blocks, cut, groups)))
    return FIXED + (RINGS if cut[1] > 1 else 0) + most


def _row_traffic(share: Share, device: Device) -> float:
    """Bytes of rows that L2 sends for a CTA. To a cluster it sends them once, but no multiprocessor
    takes in more than 64 bytes a clock, half of what its shared memory does."""
    least = 2 * device.l2_gbs / device.shared_gbs if share.cluster > 1 else 0.0
    return share.row_bytes * max(1 / share.cluster, least)


def _kept(sizes: list[int], free: int) -> tuple[bool, list[bool]]:
    """Whether a place for the largest slice is set aside, and which slices stay for good."""
    staged = sum(sizes) > free >= max(sizes)
    at, kept = max(sizes) if staged else 0, []
    for size in sizes:
        kept.append(at + size <= free)
        at += size if kept[-1] else 0
    return staged, kept


def _stages(spec: NetSpec, cut: Cut) -> tuple[int, float]:
    """Stages, one after another, of a net call, and for how many barriers they wait: to enter, five
    a block, and one to turn to a token-MLP that is not first."""
    stages = 1 + 5 * len(spec.blocks) + sum(b.kind != ATTENTION for b in spec.blocks[1:])
    copies = 4 * len(spec.blocks) if cut[1] > 1 else 0
    return stages, stages * (HANDOVER + FIRST_LOAD) + copies * COPY


def _plan(
    problem: Problem, device: Device, blocks: list[Products], cut: Cut, groups: Groups
) -> LaunchPlan:
    (ctas, cluster), specs = cut, dict(problem.nets)
    shares = [Share(p, *cut, groups[slot]) for block in blocks for slot, p in enumerate(block)]
    free = device.shared_bytes - fixed_shared_bytes(blocks, cut, groups)
    staged, keeps = _kept([share.weight_bytes for share in shares], free)
    layout = list(zip(shares, keeps, strict=True))  # of each product, and whether it is kept
    state_bytes = 2.0 * problem.batch * problem.tokens * problem.hidden
    left, stages = iter(layout), 0
    ranges = {name: list(itertools.islice(left, 4 * len(s.blocks))) for name, s in problem.nets}
    padded = moved = waits = behind = shared = 0.0
    for step in problem.schedule.steps:
        for share, kept in ranges[step.net]:
            padded += ctas * share.flops
            again = share.weight_bytes if staged else share.streamed_bytes
            moved += ctas * (_row_traffic(share, device) + (0 if kept else again))
            behind += ctas * (again if staged and not kept else 0)
            shared += ctas * (share.shared_bytes if kept or staged else 0)
        for block in specs[step.net].blocks:
            token_tiles = ceil_div(problem.tokens, 16)
            if block.kind == ATTENTION:  # a CTA reads 16 queries, all keys and values of a head
                items = problem.batch * block.num_heads * token_tiles
                moved += ceil_div(items, ctas) * ctas * 32 * block.head_dim * (1 + 2 * token_tiles)
                padded += 4.0 * items * 16 * 16 * token_tiles * block.head_dim
        moved += state_bytes * (2 + len(step.reads))
        more, wait = _stages(specs[step.net], cut)
        stages, waits = stages + more, waits + wait
    kept_bytes = sum(s.weight_bytes for s, kept in layout if kept)
    # Of the waits, those behind which weights come in count as traffic.
    waits -= min(HIDDEN * waits, behind / (device.l2_gbs * 1e3 * device.barrier_us))
    work = Work(
        flops(problem), padded, dram_bytes=state_bytes * (1 + 2 * len(problem.schedule.states)),
        l2_bytes=moved + ctas * kept_bytes, shared_bytes=shared + behind,
        launches=2,  # the memset of the flags, and the kernel
        barriers=waits, efficiency=device.mma_sync * EFFICIENCY, parallel=ctas, overlap=False,
    )  # fmt: skip
    splits = [min(share.splits for share in some) for some in _slots(blocks, cut, groups)]
    settings = (
        ("ctas", ctas),
        *((f"groups_{name}", g) for name, g in zip(SLOTS, groups, strict=True)),
        *((f"splits_{name}", s) for name, s in zip(SLOTS, splits, strict=True)),
        ("cluster", cluster),
        ("shared_bytes", device.shared_bytes),
        ("weights", "fp8" if layout[0][0].product.fp8 else "bf16"),
        ("stages", stages),
    )
    why = (
        f"every call is spread over {ctas} CTAs, which keep {kept_bytes // 1024} of their "
        f"{sum(s.weight_bytes for s in shares) // 1024} KB of weights in shared memory; "
        f"{stages} stages wait by flags" + f"; {cluster} CTAs get rows at once" * (cluster > 1)
    )
    return LaunchPlan("cuda", "grid", settings, work, why)
