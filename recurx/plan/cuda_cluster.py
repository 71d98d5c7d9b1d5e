"""The plan of the cluster kernel (csrc/cuda/cluster_sm90a/): two CTAs on Hopper share 128 rows.

They hold a sample, or as many as fit. Each has all rows and computes half of the columns, from half
of the tape. A cluster of 2, 4 or 8 CTAs shares one multicast tape of weights, so a larger cluster
reads less from L2; but its CTAs must sit on one GPC, and a device has fewer places for it.
"""

from __future__ import annotations

from recurx.nets import ATTENTION, BlockSpec
from recurx.plan.count import ceil_div, flops, why_not_heads
from recurx.plan.device import Device
from recurx.plan.launch import LaunchPlan, Work
from recurx.problem import Problem

WIDTHS = (128, 256, 384, 512)
ROWS, HEAD_DIM, MAX_TOKENS = 64, 64, 128
MIDDLE, TOKEN_MIDDLE = 128, 64  # columns of the middles a round
STAGE = 16384  # bytes of the tape
MAX_CALLS = 65535
CLUSTERS = (2, 4, 8)
# Multiprocessors of a GPC that clusters of more than two can count on, where the driver was not
# asked: some have 18, one has fewer (an H100 of 132 runs 15 clusters of 8 at once, not 16).
GPC = 16
# Share of the peak that waits for the exchange, softmax and the epilogues leave to wgmma: reckoned
# phase by phase in its kernel.cuh, not measured.
EFFICIENCY = 0.85


def why_not_cluster(problem: Problem, device: Device) -> str | None:
    """What this kernel lacks for a problem that csrc/cuda takes in general; None: nothing."""
    if device.capability[0] != 9:
        major, minor = device.capability
        return (
            f"is Hopper's alone (wgmma, compute capability 9.0), {device.name} has {major}.{minor}"
        )
    if problem.hidden not in WIDTHS:
        return f"is compiled for D in {list(WIDTHS)}, got D={problem.hidden}"
    if problem.tokens > MAX_TOKENS:
        return f"keeps up to T={MAX_TOKENS} tokens in two CTAs, got T={problem.tokens}"
    if len(problem.schedule.steps) > MAX_CALLS:
        return f"runs up to {MAX_CALLS} calls, got {len(problem.schedule.steps)}"
    return why_not_heads(problem, (HEAD_DIM,), f"{HEAD_DIM}")


def cluster_plans(problem: Problem, device: Device) -> list[LaunchPlan]:
    """One plan for each size of the cluster that the batch can fill."""
    if why_not_cluster(problem, device) is not None:
        return []
    return [
        _plan(problem, device, cluster)
        for cluster in CLUSTERS
        if cluster == 2 or cluster <= 2 * ceil_div(problem.batch, samples_together(problem))
    ]


def samples_together(problem: Problem) -> int:
    """Samples of two CTAs, as packed_samples of cluster_sm90a/layout.cuh; a token mix takes one."""
    mixes = any(block.kind != ATTENTION for _, spec in problem.nets for block in spec.blocks)
    return 1 if mixes or problem.tokens > ROWS else 2


def block_stages(block: BlockSpec) -> int:
    """Stages of a block's tape, as struct Tape of cluster_sm90a/layout.cuh counts them."""
    d = block.hidden
    first, query, second = d // 32, d // 64, 8 if d > 256 else d // 64
    mixer = _token_stages(block)
    if block.kind == ATTENTION:
        mixer = block.num_heads // 2 * (first + query + second)
    return mixer + ceil_div(block.inner, MIDDLE) * (first + second)


def _token_stages(block: BlockSpec) -> int:
    if block.kind == ATTENTION:
        return 0
    return 3 * ceil_div(block.token_inner, TOKEN_MIDDLE)


def _taken(block: BlockSpec) -> int:
    """Bytes of a block's tape that a CTA takes in: half of it, but all of the token mix's part, as
    often as its two warpgroups need for the CTA's channels, 64 each."""
    token, passes = _token_stages(block), ceil_div(block.hidden // 128, 2)
    return STAGE * passes * token + STAGE // 2 * (block_stages(block) - token)


def _block_work(block: BlockSpec, samples: int) -> tuple[float, float]:
    """(FLOPs, bytes of wgmma's operands in shared memory) of a CTA: half of the columns, for two
    warpgroups of 64 rows."""
    d = block.hidden
    middle = MIDDLE * ceil_div(block.inner, MIDDLE)
    # (FLOPs, N of the product): 64 rows and N columns of K values are 2 (64 + N) K bytes.
    products = [(4.0 * ROWS * middle * d, 128), (2.0 * ROWS * middle * d, d // 2)]
    if block.kind == ATTENTION:
        products += [(4.0 * ROWS * d * d, 128), (2.0 * ROWS * d * d, 64)]  # K and V, Q
        products += [(2.0 * ROWS * d * d, d // 2)]  # O, then attention
        products += [(8.0 / samples * ROWS * ROWS * d, 128)]
    else:
        tokens = TOKEN_MIDDLE * ceil_div(block.token_inner, TOKEN_MIDDLE)
        products += [(6.0 * ROWS * tokens * d, 128)]
    flops = sum(f for f, _ in products)
    return flops, sum(f * (ROWS + n) / (ROWS * n) for f, n in products)


def places(device: Device, hidden: int, cluster: int) -> int:
    """Clusters that run at once."""
    asked = {(width, size): count for width, size, count in device.clusters}
    assumed = device.units // 2 if cluster == 2 else device.units // GPC * (GPC // cluster) - 1
    return max(1, asked.get((hidden, cluster), assumed))


def _plan(problem: Problem, device: Device, cluster: int) -> LaunchPlan:
    samples = samples_together(problem)
    clusters = max(1, ceil_div(2 * ceil_div(problem.batch, samples), cluster))
    busy = min(clusters, places(device, problem.hidden, cluster))
    rounds = ceil_div(clusters, busy)
    specs = dict(problem.nets)
    nets = [specs[step.net] for step in problem.schedule.steps]
    each = [_block_work(block, samples) for spec in nets for block in spec.blocks]
    ctas = busy * rounds * cluster  # the last round is as long as the others, however few it has
    tape = sum(_taken(block) for spec in nets for block in spec.blocks)
    state_bytes = 2.0 * problem.batch * problem.tokens * problem.hidden
    reads = sum(len(step.reads) for step in problem.schedule.steps)
    work = Work(
        flops=flops(problem),
        padded_flops=ctas * sum(f for f, _ in each),
        shared_bytes=ctas * (sum(b for _, b in each) + tape),
        dram_bytes=state_bytes * (1 + 2 * len(problem.schedule.states)),
        l2_bytes=busy * rounds * 2 * tape + state_bytes * reads,
        launches=1,
        parallel=busy * cluster,
        efficiency=EFFICIENCY,
    )
    many = f"{samples} samples" if samples > 1 else "a sample"
    rows = ceil_div(100 * samples * problem.tokens, 2 * ROWS)
    why = (
        f"two CTAs own {many} for all {len(nets)} calls, half of the columns each, "
        f"{cluster} share one multicast tape of weights; {rows} % of the rows are used"
    )
    if rounds > 1:
        why += f"; {clusters} clusters in {rounds} rounds"
    settings = (("cluster", cluster), ("samples", samples))
    return LaunchPlan("cuda", "cluster", settings, work, why)
