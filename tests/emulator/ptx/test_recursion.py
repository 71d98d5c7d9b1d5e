"""kernels/recursion.py and kernels/inject.py from their PTX, the arena watched by the race checker.

In the persistent kernel threads of a block hand h over through global memory, so besides right
results the test is that no barrier may be missing: each is deleted in turn and must be missed.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="triton has no wheel for this platform")
from recurx.kernels.arena import rows_of, slots_of
from recurx.kernels.call_table import call_table

import recurx
from recurx import Schedule, reference
from recurx.nets import ATTENTION, TOKEN_MLP, BlockSpec, Net, NetSpec
from recurx.operands import Beside, Span
from recurx.packed import PackedNets, device_words
from recurx.program import lower
from tests.kernels.compare import assert_as_exact
from tests.kernels.mutants import planted

from .. import build

pytestmark = [
    pytest.mark.skipif(build.unavailable() is not None, reason=str(build.unavailable())),
    pytest.mark.slow,
]
TOKENS, HIDDEN, INNER = 13, 64, 48
SCHEDULE = Schedule.trm(1, 2)  # z_H + x is formed once; three calls, the last of one more read
# Both kinds of block in one net: one kernel, compiled once, that has every path.
SPEC = NetSpec(
    (
        BlockSpec(ATTENTION, HIDDEN, INNER, num_heads=1),
        BlockSpec(TOKEN_MLP, HIDDEN, INNER, tokens=TOKENS, token_inner=40),
    )
)
FACTORS = SCHEDULE.with_factors(damping=0.9, scale=0.7, noise=0.1)
SETTINGS = dict(rows=64, group=1, chunk=32, token_chunk=64, head_stages=1, stages=2, warps=4)


TOKEN_ONLY = NetSpec(SPEC.blocks[1:])  # half the code, with every barrier


class Case:
    """Two samples, so that one program is not the first; weights rounded to bf16."""

    def __init__(self, spec: NetSpec = SPEC, schedule: Schedule = SCHEDULE) -> None:
        self.spec, self.schedule = spec, schedule
        self.seed = torch.tensor([2**40 + 1, 2])
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator).bfloat16()

        shapes = [shape for block in spec.blocks for shape in block.weight_shapes]
        self.net = Net(spec, [draw(*shape) / shape[1] ** 0.5 for shape in shapes])
        self.x = draw(2, TOKENS, HIDDEN)
        self.carry = {name: draw(2, TOKENS, HIDDEN) for name in SCHEDULE.states}
        self.cos_sin = recurx.rope_tables(TOKENS, HIDDEN)
        self.program = lower(schedule, Span(0, len(schedule)))
        self.tape = PackedNets((("L", spec),), torch.bfloat16, self.x.device).fill(self.net.weights)

    def arena(self) -> torch.Tensor:
        arena = self.x.new_zeros(slots_of(self.program), *self.x.shape)
        arena[0] = self.x
        for slot, name in enumerate(SCHEDULE.states, 1):
            arena[slot] = self.carry[name]
        return arena

    def judge(self, arena: torch.Tensor) -> None:
        wide = Net(self.spec, [weight.double() for weight in self.net.weights])
        carry = {name: state.double() for name, state in self.carry.items()}
        rest = dict(cos_sin=self.cos_sin, seed=self.seed)
        exact = reference.run(self.schedule, {"L": wide}, self.x.double(), carry, **rest)
        plain = reference.run(self.schedule, {"L": self.net}, self.x, self.carry, **rest)
        for slot, name in enumerate(SCHEDULE.states, 1):
            assert_as_exact(arena[slot], plain[name], exact[name])


def emulate(module, case: Case, arch: str) -> torch.Tensor:
    from .triton_launch import emulating

    arena = case.arena()
    with emulating(arch, watch=(arena,)):
        module.recursion(arena, case.program, case.tape, case.cos_sin, SETTINGS, case.seed)
    return arena


# NOTE: tiles of fewer than 1024 values in bf16 (8 a thread) make Triton store one value from
# several warps; the checker calls that a race (it allows it within a warp only). Hence 64 x 64.
@pytest.mark.parametrize("arch", ["80", "90"])
def test_the_persistent_kernel(arch):
    from recurx.kernels import recursion

    case = Case()
    case.judge(emulate(recursion, case, arch))


@pytest.mark.parametrize("arch", ["80", "90"])
def test_the_persistent_kernel_with_factors(arch):
    from recurx.kernels import recursion

    case = Case(TOKEN_ONLY, FACTORS)
    case.judge(emulate(recursion, case, arch))


@pytest.mark.parametrize("arch", ["80", "90"])
def test_what_a_call_with_factors_writes(arch):
    """Damped and noisy, from raw rows: the bits of the reference but for the library's cosine."""
    from recurx.kernels.finish import finish_call

    from .triton_launch import emulating

    case = Case(schedule=FACTORS)
    arena, last = case.arena(), len(rows_of(case.program)) - 1
    words = device_words(call_table(case.program, case.tape.of_net), arena.device)
    row, step = rows_of(case.program)[last], FACTORS.steps[-1]
    raw = arena[row.place] = 3 * case.x
    squares = torch.stack([half.sum(-1).view(-1) for half in raw.float().square().chunk(2, -1)])
    before, stream = arena[row.write].clone(), torch.tensor([int(case.seed[0]), 5])
    with emulating(arch, watch=(arena,)):
        finish_call(
            arena[row.place], arena[row.write], words, last, stream=stream, squares=squares,
            eps=1e-5,
        )  # fmt: skip
    normed = reference.rms_norm(raw, 1e-5)
    want = reference.written(step, before, normed, Beside(stream, None, len(FACTORS) - 1), {})
    torch.testing.assert_close(arena[row.write], want, rtol=2**-7, atol=2**-9)
    assert not torch.equal(arena[row.write], before)


# Compilers so far let the thread that stores an element of h load it too, so that no barrier is
# needed; nothing promises that. Here rows are loaded upside down (so results are wrong), that is by
# other threads: then the barriers must be enough, and each be needed.
UPSIDE_DOWN = (
    "return tl.load(h_g + offset, mask=inside, other=0.0)",
    "offset = (live_rows - 1) * D + 2 * tl.arange(0, DP)[None, :] - offset\n"
    "    return tl.load(h_g + offset, mask=inside, other=0.0)",
)
# (The ones before a store are covered by those inside the norm's reduction and by program order.)
BARRIERS = {
    "after the call's input is stored": "        tl.debug_barrier()  # entered",
    "after h is stored": "    tl.debug_barrier()  # after: other threads read",
}


def test_barriers_order_what_threads_hand_over(tmp_path):
    emulate(planted("recursion", *UPSIDE_DOWN, tmp_path), Case(TOKEN_ONLY), "80")


@pytest.mark.parametrize("where", BARRIERS)
def test_a_missing_barrier_is_found(where, tmp_path):
    old = BARRIERS[where]
    deleted = (old, old.replace("tl.debug_barrier()", "pass"))
    mutant = planted("recursion", *UPSIDE_DOWN, tmp_path, deleted)
    with pytest.raises(build.EmulatorFault, match=r"race: .* 'watched 0'"):
        emulate(mutant, Case(TOKEN_ONLY), "80")


def test_the_sums_before_a_call():
    from recurx.kernels.inject import form_call_input

    from .triton_launch import emulating

    case = Case()
    arena = case.arena()
    words = device_words(call_table(case.program, case.tape.of_net), arena.device)
    with emulating("80", watch=(arena,)):
        form_call_input(arena, words, 0)  # z_H + x, kept
        form_call_input(arena, words, 1)  # z_L + kept
    inject = case.carry["z_H"] + case.x
    assert torch.equal(arena[3], inject)
    assert torch.equal(arena[1], case.carry["z_L"] + inject)


def test_a_state_that_was_left_raw():
    """It is normalised as it is summed, and where it lies, if the call writes another."""
    from recurx.kernels.inject import form_call_input

    from .triton_launch import emulating

    case = Case()
    arena = case.arena()
    words = device_words(call_table(case.program, case.tape.of_net), arena.device)
    rows = rows_of(case.program)
    before = next(n for n, row in enumerate(rows[:-1]) if rows[n + 1].write != row.write)
    left, after = rows[before].write, rows[before + 1]
    assert (after.state, after.inject) == ((after.write,), (left,))
    raw = arena[left] = 3 * case.x
    squares = torch.stack([half.sum(-1).view(-1) for half in raw.float().square().chunk(2, -1)])
    state = arena[after.write].clone()
    with emulating("80", watch=(arena,)):
        form_call_input(arena, words, before + 1, before=before, squares=squares, eps=1e-5)
    scale = torch.rsqrt(raw.double().square().mean(-1, keepdim=True) + 1e-5)
    torch.testing.assert_close(arena[left].double(), raw.double() * scale, rtol=2**-8, atol=0)
    assert torch.equal(arena[after.write], state + arena[left])
