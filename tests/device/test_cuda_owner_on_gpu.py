"""backend="cuda" on the hardware: right by the numerics of every backend; the same bits again."""

from __future__ import annotations

import pytest
import torch
from device_sizes import PUBLISHED, RERUNS, SMALL, waves

import recurx
from recurx import Schedule, Step, backends, reference
from recurx.nets import ATTENTION, KINDS, TOKEN_MLP, Net
from recurx.problem import Problem
from tests.factories import make_inputs, make_net, rope, rounded, wide
from tests.kernels.compare import assert_as_exact

pytestmark = pytest.mark.gpu
BF16 = torch.bfloat16
# kind, B, T, D, inner, heads, token inner: published sizes, small ones, more samples than CTAs.
# The last ones have fields of variants.
CASES = {
    "trm-att": (ATTENTION, 3, 97, 512, 1536, 8, 0),
    "trm-mlp": (TOKEN_MLP, 3, 97, 512, 1536, 8, 512),
    "hrm size": (ATTENTION, 300, 82, 512, 1536, 8, 0),
    "small": (ATTENTION, 5, 17, 64, 256, 2, 0),
    "128": (TOKEN_MLP, 70, 33, 128, 512, 2, 128),
    "384": (ATTENTION, 2, 60, 384, 1024, 6, 0),
    "trm-att, fields": (
        ATTENTION, 3, 97, 512, 1536, 8, 0,
        dict(residual_scale=0.5, activation="gelu", kv_heads=2, biases=("qkv", "gate_up", "down")),
    ),
    "small mlp, fields": (
        TOKEN_MLP, 5, 17, 64, 256, 2, 32,
        dict(residual_scale=0.5, activation="relu2", biases=("t_gate_up", "t_down", "down")),
    ),
}  # fmt: skip
if SMALL:
    CASES = {name: case for name, case in CASES.items() if case[3] < 384}


def on_gpu(net: Net) -> Net:
    return Net(net.spec, [w.cuda() for w in net.weights])


def inputs(case: tuple, schedule: Schedule):  # type: ignore[no-untyped-def]
    kind, batch, tokens, hidden, inner, heads, token_inner, *fields = case
    nets = {
        name: make_net(
            kind, tokens=tokens, hidden=hidden, heads=heads, inner=inner, token_inner=token_inner,
            seed=seed, **dict(*fields),
        )
        for seed, name in enumerate(schedule.nets)
    }  # fmt: skip
    nets = {name: on_gpu(rounded(net, BF16, torch.float32)) for name, net in nets.items()}
    x, carry = make_inputs(schedule, batch=batch, tokens=tokens, hidden=hidden, dtype=BF16)
    tables = tuple(table.cuda() for table in rope(tokens, hidden, heads))
    return nets, x.cuda(), {name: state.cuda() for name, state in carry.items()}, tables


def refuse_or(case: tuple, schedule: Schedule, nets: dict[str, Net]) -> None:
    _, batch, tokens, hidden, *_ = case
    specs = tuple((name, net.spec) for name, net in nets.items())
    problem = Problem(schedule, specs, batch, tokens, hidden, BF16, "cuda", True)
    reason = backends.why_not("cuda", problem)
    if reason is not None:
        assert "bytes of shared memory" in reason, reason
        pytest.skip(f"this device is too small: {reason}")


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_one_call_against_fp64(case: tuple) -> None:
    schedule = Schedule((Step("L", "z_L", ("z_L",), ("z_H", "x")),))
    nets, x, carry, tables = inputs(case, schedule)
    refuse_or(case, schedule, nets)
    got = recurx.recurse(schedule, nets, x, carry, backend="cuda", cos_sin=tables)
    exact_nets = {name: rounded(net, BF16, torch.float64) for name, net in nets.items()}
    exact = reference.run(schedule, exact_nets, x.double(), wide(carry), tables)
    plain = reference.run(schedule, nets, x, carry, tables)
    assert_as_exact(got["z_L"].cpu(), plain["z_L"].cpu(), exact["z_L"].cpu())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("schedule", [Schedule.trm(3, 6), Schedule.hrm(2, 2), Schedule.hier(6, 1)])
def test_a_launch_of_many_calls_is_many_launches_of_one(schedule: Schedule, kind: str) -> None:
    case = (kind, 4, *PUBLISHED.values())
    nets, x, carry, tables = inputs(case, schedule)
    refuse_or(case, schedule, nets)
    whole = recurx.recurse(schedule, nets, x, carry, backend="cuda", cos_sin=tables)
    for k in range(len(schedule)):
        carry = recurx.recurse(
            schedule, nets, x, carry, backend="cuda", cos_sin=tables, start_from=k,
            stop_after=k + 1,
        )  # fmt: skip
    for name in schedule.states:
        assert torch.equal(whole[name], carry[name]), name


@pytest.mark.parametrize("kind", KINDS)
def test_reruns_are_bit_equal(kind: str) -> None:
    """RECURX_RERUNS launches, one sample more than there are multiprocessors."""
    schedule = Schedule.trm(1, 1)
    case = (kind, waves(1), 33, 128, 256, 2, 64)
    nets, x, carry, tables = inputs(case, schedule)
    first = recurx.recurse(schedule, nets, x, carry, backend="cuda", cos_sin=tables)["z_H"]
    differing = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(RERUNS):
        again = recurx.recurse(schedule, nets, x, carry, backend="cuda", cos_sin=tables)["z_H"]
        differing += (again != first).any()
    assert not differing.item(), f"{differing.item()} of {RERUNS} reruns differ"


def test_launch_errors_carry_the_name_of_the_cuda_error() -> None:
    from recurx.backends import cuda, cuda_abi
    from recurx.errors import CudaError

    library = cuda.BACKEND.library()
    assert library is not None
    p = cuda_abi.RxRecursion(1, 40, 512, 1, 1, 1, scratch_bytes=1 << 40)
    p.nets[0].num_blocks = 1
    p.nets[0].blocks[0] = cuda_abi.RxBlock(0, 64, 4, 0, 1e-5)
    # 8 tiles of D = 512 with heads of 128: more shared memory than any device has.
    plan = cuda_abi.RxOwnerPlan(1, 2, 8)
    with pytest.raises(CudaError, match=r"owner_sm80.*cudaError\w+"):
        library.call("rx_owner_sm80_run", p, plan, None)
