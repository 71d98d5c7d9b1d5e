"""Fields of blocks in the owner kernel, in the emulator: scale, activation, K/V heads, biases."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch

from emulator import asleep
from emulator.build import unavailable
from emulator.owner import EmulatedCuda, emulate
from recurx import Problem, Schedule, Step, backends, reference
from recurx.backends.cuda import Cuda
from recurx.nets import ATTENTION, TOKEN_MLP, WEIGHT_NAMES, Net
from recurx.plan import DEVICES
from recurx.plan.cuda import FIELDS, KINDS, refusals
from recurx.specs import BlockSpec, NetSpec
from tests.factories import make_inputs, make_net, rope
from tests.test_numerics import teacher_forced

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))

BF16 = torch.bfloat16
SIZE = dict(tokens=17, hidden=64)
ONE_CALL = Schedule((Step("L", "z_L", ("z_L",), ("z_H", "x")),))


def all_of(kind: str, activation: str) -> dict[str, Any]:
    """Every field at once."""
    groups = dict(kv_heads=1) if kind == ATTENTION else {}
    return dict(residual_scale=-0.7, activation=activation, biases=WEIGHT_NAMES[kind], **groups)


ALONE = [(ATTENTION, dict(kv_heads=1))]
TOGETHER = []
for each in (ATTENTION, TOKEN_MLP):
    ALONE += [(each, dict(residual_scale=0.5)), (each, dict(activation="gelu"))]
    ALONE += [(each, dict(biases=WEIGHT_NAMES[each]))]
    TOGETHER += [(each, all_of(each, a)) for a in ("gelu_tanh", "relu", "relu2", "sigmoid")]
IN_SHARED, IN_SCRATCH = (64, 2), (64, 2, 1)  # where h lies


@pytest.fixture(scope="module")
def owner() -> EmulatedCuda:
    return emulate((IN_SHARED, IN_SCRATCH))  # as in test_cuda_factors.py


def at(owner: EmulatedCuda, place: tuple[int, ...]) -> EmulatedCuda:
    owner.emulated.configure(seed=1)
    return EmulatedCuda(owner.emulated, (place,), DEVICES["a100"])


@pytest.mark.parametrize(
    "place, kind, fields",
    [(IN_SHARED, *case) for case in ALONE + TOGETHER] + [(IN_SCRATCH, *case) for case in TOGETHER],
    ids=str,
)
def test_one_call_is_right(
    owner: EmulatedCuda, place: tuple[int, ...], kind: str, fields: dict[str, Any]
) -> None:
    net = make_net(kind, tokens=17, blocks=1, **fields)
    teacher_forced(at(owner, place), ONE_CALL, {"L": net}, BF16, **SIZE)


def mixed() -> dict[str, Net]:
    """Two nets whose blocks differ: a block's fields and biases are its own."""
    plain, tokens = BlockSpec(ATTENTION, 64, 96, 2), dict(tokens=17, token_inner=40)
    varied = BlockSpec(ATTENTION, 64, 96, 2, **all_of(ATTENTION, "gelu"))
    some = BlockSpec(ATTENTION, 64, 160, 2, activation="relu", biases=("o", "gate_up"))
    mlp = BlockSpec(TOKEN_MLP, 64, 96, **tokens, **all_of(TOKEN_MLP, "sigmoid"))
    nets = {"L": (plain, varied, mlp), "H": (some, mlp)}
    generator = torch.Generator().manual_seed(0)
    return {
        name: Net(
            NetSpec(specs),
            [
                torch.randn(shape, generator=generator) / (*shape, 4)[1] ** 0.5
                for spec in specs
                for shape in spec.weight_shapes
            ],
        )
        for name, specs in nets.items()
    }


@pytest.mark.parametrize("place", [IN_SHARED, IN_SCRATCH], ids=str)
def test_every_block_has_its_own_fields_under_every_seed(
    owner: EmulatedCuda, place: tuple[int, ...]
) -> None:
    """Right call by call; one launch gives the bits of many, whoever runs first, and no race."""
    checked = at(owner, place)
    schedule, nets, tables = Schedule.hrm(1, 1), mixed(), rope(17)
    teacher_forced(checked, schedule, nets, BF16, **SIZE)
    x, start = make_inputs(schedule, batch=3, tokens=17, dtype=BF16)
    wholes = []
    for seed in (1, 2, 3):
        checked.emulated.configure(seed=seed)
        wholes.append(checked(schedule, nets, x, start, tables))
    for k in range(len(schedule)):
        start = checked(schedule, nets, x, start, tables, k, k + 1)
    for name in schedule.states:
        assert all(torch.equal(whole[name], start[name]) for whole in wholes), name


# ---- planted bugs --------------------------------------------------------------------------------

PACK, ATTEND = "owner_sm80/pack.cu", "owner_sm80/attention.cuh"
RESIDUAL, PRODUCT = "owner_sm80/residual.cuh", "owner_sm80/product.cuh"
TOKENS, MLP, LAUNCH = "owner_sm80/token_mlp.cuh", "owner_sm80/mlp.cuh", "owner_sm80/launch.cu"
KERNEL, ACTIVATION = "owner_sm80/kernel.cuh", "activation.cuh"


class Bug(NamedTuple):
    name: str
    kind: str
    file: str
    old: str
    new: str


BUGS = [
    Bug("the scale is that of one half alone", ATTENTION, RESIDUAL,
        "pass, b.residual_scale)", "pass, BUG && matrix == 3 ? 1.f : b.residual_scale)"),
    Bug("no bias of what is added to h", ATTENTION, PRODUCT,
        "kOfH || bias_g ?", "kOfH || (bias_g && !BUG) ?"),
    Bug("no scale of the token MLP", TOKEN_MLP, TOKENS,
        "o.bias_g(1, 0), b.residual_scale", "o.bias_g(1, 0), BUG ? 1.f : b.residual_scale"),
    Bug("the activation is ignored", ATTENTION, MLP,
        "b.activation == kRxSilu)", "b.activation == kRxSilu || BUG)"),
    Bug("the token MLP's activation is ignored", TOKEN_MLP, TOKENS,
        "if (activation != kRxSilu)", "if (activation != kRxSilu && !BUG)"),
    Bug("silu for gelu", ATTENTION, ACTIVATION,
        "return 0.5f * x * (1.f + erff(x * 0.70710678f));",
        "return BUG ? gated(x, x) : 0.5f * x * (1.f + erff(x * 0.70710678f));"),
    Bug("words of another place", ATTENTION, MLP,
        "gate = make_uint4(gate.y, gate.z, gate.w, gate.x);",
        "gate = BUG ? gate : make_uint4(gate.y, gate.z, gate.w, gate.x);"),
    Bug("gate and up change places", ATTENTION, MLP,
        "rx::activate_pair(gate.x, up.x, activation)",
        "rx::activate_pair(BUG ? up.x : gate.x, BUG ? gate.x : up.x, activation)"),
    Bug("gate and up of the token MLP change places", TOKEN_MLP, TOKENS,
        "rx::activate_pair(gate[0], up[0], activation)",
        "rx::activate_pair(BUG ? up[0] : gate[0], BUG ? gate[0] : up[0], activation)"),
    Bug("each head takes the K/V head of its number", ATTENTION, PACK,
        "head / j.group * j.head_dim", "(BUG ? head : head / j.group) * j.head_dim"),
    Bug("V where K of the next group would be", ATTENTION, PACK,
        "(part - 1) * width", "(part - 1) * (BUG ? j.head_dim / 2 : width)"),
    Bug("a bias on the rows after it", ATTENTION, PACK,
        "const int column = value & 7,", "const int column = (value + (BUG ? 1 : 0)) & 7,"),
    Bug("the bias of another pass", ATTENTION, PACK,
        "int step = pass * (", "int step = (BUG ? 0 : pass) * ("),
    Bug("the bias of the first step for all", TOKEN_MLP, TOKENS,
        "o.bias_g(0, step * 4)", "o.bias_g(0, BUG ? 0 : step * 4)"),
    Bug("a token has the bias of the one two before", TOKEN_MLP, TOKENS,
        "add_columns(out, o.bias_g(1, 0)", "add_columns(out, o.bias_g(1, 0) - (BUG ? 1 : 0)"),
    Bug("the bias is normed, too", ATTENTION, PRODUCT,
        "__fdividef(1.f, o", "__fdividef(1.f, BUG ? 1.f : o"),
    Bug("the biases of the first block for all", ATTENTION, KERNEL,
        "kMaxBiases + block * 4", "kMaxBiases + (BUG ? 0 : block) * 4"),
    Bug("the biases of the first net for all", ATTENTION, LAUNCH,
        "params.biases + n * kMaxBiases", "params.biases + (BUG ? 0 : n) * kMaxBiases"),
]  # fmt: skip


@pytest.fixture(scope="module")
def buggy(tmp_path_factory: pytest.TempPathFactory) -> EmulatedCuda:
    folder = tmp_path_factory.mktemp("fields") / "cuda"
    asleep.plant(folder, BUGS, "owner_sm80")
    return emulate(((64, 2),), checked=False, folder=folder, flags=("-O1", "-g0"), copied=2)


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_planted_bugs_are_found(buggy: EmulatedCuda, bug: Bug) -> None:
    asleep.wake(buggy.emulated.library, BUGS, bug)
    assert not off(buggy, bug.kind) <= 0.05  # NaN is found, too


@pytest.mark.parametrize("kind", [ATTENTION, TOKEN_MLP])
def test_with_all_bugs_asleep_it_is_near(buggy: EmulatedCuda, kind: str) -> None:
    asleep.wake(buggy.emulated.library, BUGS, None)
    assert off(buggy, kind) < 0.02


def off(cuda: EmulatedCuda, kind: str) -> float:
    """How far two calls of two nets of two blocks are from the reference in fp64."""
    schedule = Schedule((Step("L", "a", ("a",), ("x",)), Step("H", "b", ("b",), ("x",))))
    nets = {}
    for seed, name in enumerate(schedule.nets):
        nets[name] = make_net(kind, tokens=17, inner=256, seed=seed, **all_of(kind, "gelu"))
    x, carry = make_inputs(schedule, batch=2, tokens=17, dtype=BF16)
    got = cuda(schedule, nets, x, carry, rope(17))
    exact = {name: Net(net.spec, [w.bfloat16().double() for w in net.weights])
             for name, net in nets.items()}  # fmt: skip
    wide = {name: state.double() for name, state in carry.items()}
    want = reference.run(schedule, exact, x.double(), wide, rope(17))
    return max(float((got[n] - want[n]).norm() / want[n].norm()) for n in carry)


# ---- who runs it ---------------------------------------------------------------------------------


def test_each_kind_names_the_field_that_it_does_not_run() -> None:
    cuda, h100 = Cuda(device=DEVICES["h100"]), DEVICES["h100"]
    every = {**all_of(ATTENTION, "gelu"), "qk_norm": "rms"}
    for field, value in every.items():
        spec = NetSpec((BlockSpec(ATTENTION, 128, 128, 2, **{field: value}),))
        problem = Problem(ONE_CALL, (("L", spec),), 2, 13, 128, BF16, "cuda", True)
        said = f"does not run {field}={value!r} of block 0 of net 'L'"
        anyone = any(field in fields for fields in FIELDS.values())
        assert backends.unknown_fields(cuda, problem) == (None if anyone else said)
        for kind in KINDS:
            expected = [] if field in FIELDS[kind] else [f"{kind}: {said}"]
            assert refusals(problem, h100, kinds=(kind,)) == expected
    assert set(FIELDS["owner"]) >= set(all_of(ATTENTION, "gelu"))
