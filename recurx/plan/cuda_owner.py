"""Plans of backend "cuda": the kinds of recursion kernel, what each needs, and what fits.

    owner    one CTA owns a group of samples and runs every call (csrc/cuda/owner_sm80.cuh)
    grid     every call is spread over all multiprocessors (csrc/cuda/grid_sm80.cuh, cuda_grid.py)
    cluster  two CTAs of a cluster own a sample (csrc/cuda/cluster_sm90a.cuh, cuda_cluster.py)

The sizes here are those of csrc/cuda/owner/plan.cuh; a test compares them with the compiled ones.
"""

from __future__ import annotations

import torch

from recurx.nets import ATTENTION, BlockSpec, NetSpec
from recurx.plan.count import flops
from recurx.plan.cuda_cluster import cluster_plans, why_not_cluster
from recurx.plan.cuda_grid import grid_plans, why_not_grid
from recurx.plan.device import Device
from recurx.plan.launch import LaunchPlan, Work
from recurx.problem import Problem

# (hidden, row tiles of 16) that are compiled: RX_OWNER_PLANS of csrc/cuda/owner_sm80.cu.
OWNER_PLANS = (
    (64, 2), (64, 8), (128, 8), (256, 8), (384, 8), (512, 6), (512, 7), (512, 8),
)  # fmt: skip
HEAD_DIMS = (32, 64, 128)
MAX_STATES, MAX_READS, MAX_NETS, MAX_BLOCKS = 8, 8, 2, 8  # csrc/cuda/api.h
WARPS = 8
RING = 4 * WARPS * 1024  # bytes
FRAGMENT = 512
MIDDLE_CHUNK, TOKEN_CHUNK = 128, 32
# Share of the tensor cores' peak that mma.sync reaches, and of that what the L1 pipe, softmax and
# epilogues leave: published for Hopper and reckoned from the kernel's header, not measured.
MMA_SYNC = {8: 1.0, 9: 0.62, 10: 0.3, 12: 1.0}
KERNEL_EFFICIENCY = 0.85


Shapes = tuple[tuple[int, int], ...]


KINDS = (
    "owner",
    "grid",
    "cluster",
)


def candidates(
    problem: Problem,
    device: Device,
    compiled: Shapes = OWNER_PLANS,
    kinds: tuple[str, ...] = KINDS,
    fp8: bool = False,
) -> list[LaunchPlan]:
    """The plans that fit: an owner plan for each number of samples a CTA, one grid plan, a cluster
    plan for each size of a cluster.

    Args:
        compiled: the owner kernels that the build holds, as OWNER_PLANS.
        kinds: the kinds of kernel that the build holds.
        fp8: all weights are quantised; the grid kernel alone makes use of that.
    """
    if why_not_recursion(problem, device) is not None:
        return []
    found = []
    if "owner" in kinds and why_not_owner(problem, device, compiled) is None:
        found += [
            _owner_plan(problem, device, samples, tiles)
            for samples, tiles in _owner_shapes(problem, device, compiled)
        ]
    if "grid" in kinds:
        found += grid_plans(problem, device, fp8)
    if "cluster" in kinds:
        found += cluster_plans(problem, device)
    return found


def refusals(
    problem: Problem,
    device: Device,
    compiled: Shapes = OWNER_PLANS,
    kinds: tuple[str, ...] = KINDS,
) -> list[str]:
    """Why each kind does not run it; one sentence for all if none ever could."""
    general = why_not_recursion(problem, device)
    if general is not None:
        return [general]
    reasons = {
        "owner": why_not_owner(problem, device, compiled),
        "grid": why_not_grid(problem, device),
        "cluster": why_not_cluster(problem, device),
    }
    return [f"{kind}: {reasons[kind]}" for kind in kinds if reasons[kind] is not None]


def why_not_owner(problem: Problem, device: Device, compiled: Shapes = OWNER_PLANS) -> str | None:
    """One sentence saying what the owner kernel lacks for this problem on this device, or None."""
    reason = why_not_recursion(problem, device)
    if reason is not None:
        return reason
    widths = sorted({hidden for hidden, _ in compiled})
    if problem.hidden not in widths:
        return f"is compiled for D in {widths}, got D={problem.hidden}"
    for name, spec in problem.nets:
        for block in spec.blocks:
            if block.kind == ATTENTION and block.head_dim not in HEAD_DIMS:
                return f"needs head_dim in {HEAD_DIMS}, net {name!r} has {block.head_dim}"
    tiles = _tiles(compiled, problem.hidden, _ceil(problem.tokens, 16))
    if tiles is None:
        most = 16 * max(t for hidden, t in compiled if hidden == problem.hidden)
        return f"keeps up to T={most} tokens in shared memory, got T={problem.tokens}"
    if not _owner_shapes(problem, device, compiled):
        need = owner_shared_bytes(problem, 1, tiles)
        return (
            f"needs {need} bytes of shared memory for T={problem.tokens}, D={problem.hidden}, "
            f"{device.name} has {device.shared_bytes} a block"
        )
    return None


def why_not_recursion(problem: Problem, device: Device) -> str | None:
    """What no kernel of csrc/cuda takes: the limits of RxRecursion, dtype and device."""
    if problem.opaque:
        return f"cannot look inside the plain callable {problem.opaque[0]!r}"
    if device.kind != "cuda":
        return f"runs on CUDA devices, not on {device.name}"
    if device.capability < (8, 0):
        major, minor = device.capability
        return (
            f"needs compute capability 8.0 (bf16 tensor cores), {device.name} has {major}.{minor}"
        )
    if problem.dtype != torch.bfloat16:
        return f"runs bfloat16 states, not {problem.dtype} (the products are bf16 tensor cores)"
    schedule = problem.schedule
    if len(schedule.states) > MAX_STATES:
        return f"holds up to {MAX_STATES} states, the schedule has {len(schedule.states)}"
    if max(max(len(s.state), len(s.inject)) for s in schedule.steps) > MAX_READS:
        return f"adds up to {MAX_READS} states a sum, the schedule has a longer one"
    if len(problem.nets) > MAX_NETS:
        return f"holds up to {MAX_NETS} nets, the schedule calls {len(problem.nets)}"
    if any(len(spec.blocks) > MAX_BLOCKS for _, spec in problem.nets):
        return f"holds up to {MAX_BLOCKS} blocks a net"
    return None


# ---- sizes ---------------------------------------------------------------------------------


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def _tiles(compiled: Shapes, hidden: int, needed: int) -> int | None:
    """The smallest compiled number of row tiles that is enough."""
    return min((t for h, t in compiled if h == hidden and t >= needed), default=None)


def _unit(problem: Problem) -> int:
    """Columns of Q of the widest attention unit; 0 without attention."""
    dims = [b.head_dim for _, spec in problem.nets for b in spec.blocks if b.kind == ATTENTION]
    return 128 if 128 in dims else 64 if dims else 0


def owner_shared_bytes(problem: Problem, samples: int, tiles: int) -> int:
    """Shared memory of a CTA: h, K and V of a unit (or the sums in their place), ring, scales."""
    rows = (samples - 1) * 16 * _ceil(problem.tokens, 16) + problem.tokens
    blocks = 2 * tiles - 1 if rows <= 16 * tiles - 8 else 2 * tiles
    panels = 2 * blocks * (_unit(problem) // 8) * 128
    sums = WARPS * tiles * 16 * 4
    return blocks * (problem.hidden // 8) * 128 + max(panels, sums) + RING + tiles * 16 * 4


def _owner_shapes(problem: Problem, device: Device, compiled: Shapes) -> list[tuple[int, int]]:
    """(samples a CTA, row tiles) that fit the device and leave no CTA without a whole group."""
    each = _ceil(problem.tokens, 16)
    found = []
    for samples in range(1, 8 // each + 1):
        tiles = _tiles(compiled, problem.hidden, samples * each)
        if tiles is None or samples > max(1, problem.batch):
            continue
        if owner_shared_bytes(problem, samples, tiles) <= device.shared_bytes:
            found.append((samples, tiles))
    return found


def _token_columns(hidden: int, tiles: int) -> int:
    """Columns of h that the token MLP takes a pass."""
    return 16 * WARPS * (2 if hidden % 256 == 0 and tiles < 8 else 1)


def _block_values(block: BlockSpec, tiles: int, tokens: int, repeats: int) -> tuple[float, float]:
    """(FLOPs of `tiles` row tiles with padding, bytes of tape) of one block."""
    d, rows = block.hidden, 16 * tiles
    middle = MIDDLE_CHUNK * _ceil(block.inner, MIDDLE_CHUNK)
    # D = 64 keeps half of the warps busy in O and down, but the tape is as long.
    out = d if d % 256 == 0 else WARPS * 16 * _ceil(d, WARPS * 16)
    values, total = 2 * middle * d + out * middle, 2.0 * rows * (2 * middle * d + out * middle)
    if block.kind == ATTENTION:
        values += 3 * d * d + out * d
        total += 2.0 * rows * (3 * d * d + out * d) + 4.0 * rows * (16 * _ceil(tokens, 16)) * d
        return total, 2.0 * values
    each = 16 * _ceil(tokens, 16)
    inner = TOKEN_CHUNK * _ceil(block.token_inner, TOKEN_CHUNK)
    total += repeats * 2.0 * min(d, _token_columns(d, tiles)) * 3 * inner * each
    return total, 2.0 * (values + repeats * 3 * inner * each)


def _call_values(spec: NetSpec, samples: int, tiles: int, tokens: int) -> tuple[float, float]:
    """(FLOPs, bytes of tape) of one net call of one CTA."""
    d = spec.hidden
    repeats = samples * _ceil(d, _token_columns(d, tiles))
    each = [_block_values(block, tiles, tokens, repeats) for block in spec.blocks]
    return sum(f for f, _ in each), sum(b for _, b in each)


def _owner_plan(problem: Problem, device: Device, samples: int, tiles: int) -> LaunchPlan:
    groups = max(1, _ceil(problem.batch, samples))
    owners = min(groups, device.units)
    rounds = _ceil(groups, owners)
    specs = dict(problem.nets)
    each = {
        name: _call_values(spec, samples, tiles, problem.tokens) for name, spec in specs.items()
    }
    calls = [each[step.net] for step in problem.schedule.steps]
    # The last round is as long as the others, however few owners still work in it.
    padded = owners * rounds * sum(f for f, _ in calls)
    tape = owners * rounds * sum(b for _, b in calls)
    state_bytes = 2.0 * problem.batch * problem.tokens * problem.hidden
    reads = sum(len(step.reads) for step in problem.schedule.steps)
    work = Work(
        flops=flops(problem),
        padded_flops=padded,
        dram_bytes=state_bytes * (1 + 2 * len(problem.schedule.states)),
        l2_bytes=tape + state_bytes * reads,
        launches=1,
        parallel=owners,
        efficiency=MMA_SYNC.get(device.capability[0], 0.3) * KERNEL_EFFICIENCY,
    )
    settings = (
        ("owners", owners),
        ("samples", samples),
        ("tiles", tiles),
        ("shared_bytes", owner_shared_bytes(problem, samples, tiles)),
    )
    many = f"{samples} samples" if samples > 1 else "a sample"
    why = f"one CTA owns {many} for all {len(calls)} calls, the carry in its shared memory"
    if rounds > 1:
        why += f"; {groups} groups in {rounds} rounds"
    return LaunchPlan("cuda", "owner", settings, work, why)
