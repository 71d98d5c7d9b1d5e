"""The plan of the owner kernel (csrc/cuda/owner_sm80/): one CTA owns samples and runs every call.

A CTA owns a group of one or more samples, keeps their carry in shared memory and streams the whole
tape of weights from L2 at each call. Where shared memory is too small (99 KB a block: sm_86, sm_89,
sm_120) the carry lies in the CTA's scratch in L2. Sizes are those of
csrc/cuda/owner_sm80/layout.cuh; a test compares them with the compiled ones.
"""

from __future__ import annotations

from recurx.nets import ATTENTION, BlockSpec, NetSpec
from recurx.plan.count import ceil_div, flops, why_not_heads
from recurx.plan.device import Device
from recurx.plan.launch import LaunchPlan, Work
from recurx.problem import Problem

Shapes = tuple[tuple[int, ...], ...]

# (hidden, row tiles of 16) that are compiled, with a third 1 where h lies in scratch:
# RX_OWNER_PLANS of owner_sm80/launch.cu.
OWNER_PLANS: Shapes = (
    (64, 2), (64, 8), (128, 8), (256, 8), (384, 8), (512, 6), (512, 7), (512, 8),
    (512, 6, 1), (512, 7, 1), (512, 8, 1),
)  # fmt: skip
HEAD_DIMS = (32, 64, 128)
WARPS = 8
RING = 4 * WARPS * 1024  # bytes
MIDDLE_CHUNK, TOKEN_CHUNK = 128, 32
# Of what mma.sync reaches, the share that softmax and epilogues leave: reckoned in the kernel's
# header, not measured. On Hopper its operands from shared memory take as long, and longer than the
# cluster kernel's: 614k clocks a sample and call against 2 x 215k.
EFFICIENCY = 0.85


def why_not_owner(problem: Problem, device: Device, compiled: Shapes = OWNER_PLANS) -> str | None:
    """What this kernel lacks for a problem that csrc/cuda takes in general; None: nothing."""
    widths = sorted({hidden for hidden, *_ in compiled})
    if problem.hidden not in widths:
        return f"is compiled for D in {widths}, got D={problem.hidden}"
    if (why := why_not_heads(problem, HEAD_DIMS, f"in {HEAD_DIMS}")) is not None:
        return why
    each = ceil_div(problem.tokens, 16)
    tiles = _tiles(compiled, problem.hidden, each) or _tiles(compiled, problem.hidden, each, 1)
    if tiles is None:
        most = 16 * max(t for hidden, t, *_ in compiled if hidden == problem.hidden)
        return f"keeps up to T={most} tokens in a CTA, got T={problem.tokens}"
    if not _shapes(problem, device, compiled):
        need = shared_bytes(problem, 1, tiles)
        return (
            f"needs {need} bytes of shared memory for T={problem.tokens}, D={problem.hidden}, "
            f"{device.name} has {device.shared_bytes} a block"
        )
    return None


def owner_plans(
    problem: Problem, device: Device, compiled: Shapes = OWNER_PLANS
) -> list[LaunchPlan]:
    """One plan for each number of samples a CTA."""
    if why_not_owner(problem, device, compiled) is not None:
        return []
    return [_plan(problem, device, *shape) for shape in _shapes(problem, device, compiled)]


def _tiles(compiled: Shapes, hidden: int, needed: int, in_scratch: int = 0) -> int | None:
    """The smallest compiled number of row tiles that is enough."""
    places = ((h, t, int(place == [1])) for h, t, *place in compiled)
    return min(
        (t for h, t, p in places if h == hidden and t >= needed and p == in_scratch), default=None
    )


def _unit(problem: Problem) -> int:
    """Columns of Q of the widest attention unit; 0 without attention."""
    dims = [b.head_dim for _, spec in problem.nets for b in spec.blocks if b.kind == ATTENTION]
    return 128 if 128 in dims else 64 if dims else 0


def shared_bytes(problem: Problem, samples: int, tiles: int, in_scratch: int = 0) -> int:
    """Shared memory of a CTA: h, K and V of a unit (or the sums in their place), ring, scales.

    With h in scratch, the token MLP's columns of it take the place of K and V.
    """
    each, d = ceil_div(problem.tokens, 16), problem.hidden
    rows = (samples - 1) * 16 * each + problem.tokens
    blocks = 2 * tiles - 1 if rows <= 16 * tiles - 8 else 2 * tiles
    panels = 2 * blocks * (_unit(problem) // 8) * 128
    stage = max(panels, WARPS * tiles * 16 * 4)
    if in_scratch and any(b.kind != ATTENTION for _, spec in problem.nets for b in spec.blocks):
        stage = max(stage, min(blocks, 2 * each) * (_token_columns(d, tiles) // 8) * 128)
    h = 0 if in_scratch else blocks * (d // 8) * 128
    return h + stage + RING + tiles * 16 * 4


def _shapes(problem: Problem, device: Device, compiled: Shapes) -> list[tuple[int, int, int]]:
    """(samples a CTA, row tiles, place of h) that fit the device and leave no CTA without a whole
    group; h goes to scratch where shared memory does not hold that of one sample."""
    each = ceil_div(problem.tokens, 16)
    for in_scratch in (0, 1):
        found = []
        for samples in range(1, min(8 // each, max(1, problem.batch)) + 1):
            tiles = _tiles(compiled, problem.hidden, samples * each, in_scratch)
            if tiles is None:
                continue
            if shared_bytes(problem, samples, tiles, in_scratch) <= device.shared_bytes:
                found.append((samples, tiles, in_scratch))
        if found:
            return found
    return []


def _token_columns(hidden: int, tiles: int) -> int:
    """Columns of h that the token MLP takes a pass."""
    return 16 * WARPS * (2 if hidden % 256 == 0 and tiles < 8 else 1)


def _block_values(block: BlockSpec, tiles: int, tokens: int, repeats: int) -> tuple[float, float]:
    """(FLOPs of `tiles` row tiles with padding, bytes of tape) of one block."""
    d, rows = block.hidden, 16 * tiles
    middle = MIDDLE_CHUNK * ceil_div(block.inner, MIDDLE_CHUNK)
    # D = 64 keeps half of the warps busy in O and down, but the tape is as long.
    out = d if d % 256 == 0 else WARPS * 16 * ceil_div(d, WARPS * 16)
    values, total = 2 * middle * d + out * middle, 2.0 * rows * (2 * middle * d + out * middle)
    if block.kind == ATTENTION:
        values += 3 * d * d + out * d
        total += 2.0 * rows * (3 * d * d + out * d) + 4.0 * rows * (16 * ceil_div(tokens, 16)) * d
        return total, 2.0 * values
    each = 16 * ceil_div(tokens, 16)
    inner = TOKEN_CHUNK * ceil_div(block.token_inner, TOKEN_CHUNK)
    total += repeats * 2.0 * min(d, _token_columns(d, tiles)) * 3 * inner * each
    return total, 2.0 * (values + repeats * 3 * inner * each)


def _call_values(spec: NetSpec, samples: int, tiles: int, tokens: int) -> tuple[float, float]:
    """(FLOPs, bytes of tape) of one net call of one CTA."""
    d = spec.hidden
    repeats = samples * ceil_div(d, _token_columns(d, tiles))
    each = [_block_values(block, tiles, tokens, repeats) for block in spec.blocks]
    return sum(f for f, _ in each), sum(b for _, b in each)


def _scratch_bytes(spec: NetSpec, tiles: int) -> float:
    """What a net call of a CTA with h in scratch moves there, if its warps share what L1 holds."""
    d, uses = spec.hidden, 1 + ceil_div(spec.hidden, 256)  # O and down: written once, read a pass
    columns = 2 * d  # the input is formed, the state stored
    for block in spec.blocks:  # two updates of h, each read and written
        columns += d * (4 + ceil_div(block.inner, MIDDLE_CHUNK)) + uses * block.inner
        if block.kind == ATTENTION:
            columns += d * (uses + (d // 64 if block.head_dim < 128 else 3 * d // 128))
    return 2.0 * 16 * tiles * columns


def _plan(
    problem: Problem, device: Device, samples: int, tiles: int, in_scratch: int
) -> LaunchPlan:
    groups = max(1, ceil_div(problem.batch, samples))
    owners = min(groups, device.units)
    rounds = ceil_div(groups, owners)
    specs = dict(problem.nets)
    each = {
        name: _call_values(spec, samples, tiles, problem.tokens) for name, spec in specs.items()
    }
    calls = [each[step.net] for step in problem.schedule.steps]
    # The last round is as long as the others, however few owners still work in it.
    padded = owners * rounds * sum(f for f, _ in calls)
    tape = owners * rounds * sum(b for _, b in calls)
    if in_scratch:
        moved = {name: _scratch_bytes(spec, tiles) for name, spec in specs.items()}
        tape += owners * rounds * sum(moved[step.net] for step in problem.schedule.steps)
    state_bytes = 2.0 * problem.batch * problem.tokens * problem.hidden
    reads = sum(len(step.reads) for step in problem.schedule.steps)
    work = Work(
        flops=flops(problem),
        padded_flops=padded,
        dram_bytes=state_bytes * (1 + 2 * len(problem.schedule.states)),
        l2_bytes=tape + state_bytes * reads,
        # 128 values of a row of A serve 32 columns; weights go into the ring and out of it.
        shared_bytes=padded * (1 / 32 + 1 / (8 * tiles)),
        launches=1,
        parallel=owners,
        efficiency=device.mma_sync * EFFICIENCY,
    )
    settings = (
        ("owners", owners),
        ("samples", samples),
        ("tiles", tiles),
        ("in_scratch", in_scratch),
        ("shared_bytes", shared_bytes(problem, samples, tiles, in_scratch)),
    )
    many = f"{samples} samples" if samples > 1 else "a sample"
    where = "scratch in L2" if in_scratch else "shared memory"
    why = f"one CTA owns {many} for all {len(calls)} calls, the carry in its {where}"
    if in_scratch:  # 255 registers for each of 256 threads
        why += "; one CTA a multiprocessor, whose registers it fills"
    if rounds > 1:
        why += f"; {groups} groups in {rounds} rounds"
    return LaunchPlan("cuda", "owner", settings, work, why)
