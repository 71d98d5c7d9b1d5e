"""The cluster recursion of Hopper is right in the emulator, and nothing in it is reported."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
import torch

from emulator import bugs_cluster
from emulator.build import EmulatorFault, load_kernels, unavailable
from emulator.cluster_recursion import (
    ATT,
    FILES,
    HEAD_DIM,
    MLP,
    NAN,
    SCHEDULES,
    Case,
    Shape,
    error,
    outcome,
    rope_tables,
)
from emulator.gemm_residual_rms import from_bf16
from recurx import reference
from recurx.backends.cuda_abi import Library, RxClusterPlan
from recurx.nets import ATTENTION, TOKEN_MLP, BlockSpec, Net, NetSpec
from recurx.schedule import INPUT, Schedule, Step

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))

# Ragged tokens on either side of the first CTA's 64, one and two pairs of heads, one and several
# rounds, a cluster with no second sample, a mix of both kinds of block.
SMALL = [
    Shape((ATT,), tokens=17, cluster=4),
    Shape((ATT,), tokens=70, inner=200),
    Shape((ATT, ATT), tokens=97),
    Shape((ATT,), hidden=256, tokens=128, inner=384),
    Shape((MLP,), tokens=17, batch=2, cluster=4),
    Shape((MLP,), hidden=256, tokens=70, token_inner=100),
    Shape((MLP, MLP), tokens=97, token_inner=128),
    Shape((ATT, MLP), tokens=65),
    Shape((MLP, ATT), tokens=64, schedule="single_z", rope=False),
    # Packed, two to eight samples in two CTAs, the last ones not full.
    Shape((ATT, ATT), tokens=42, batch=3, cluster=4, schedule="trm"),
    Shape((ATT,), hidden=256, tokens=20, batch=7, schedule="hrm"),
    Shape((ATT,), tokens=16, batch=9, cluster=4, schedule="single_z"),
    Shape((ATT,), tokens=64, batch=3, cluster=4),
]
# The planted races are found under each of two seeds: three for every shape, ten where both kinds
# of block are, and where samples share two CTAs.
TEN_SEEDS = [SMALL[7], SMALL[9]]
FULL = [
    Shape((ATT, ATT), 512, 97, 1536),
    Shape((MLP, MLP), 512, 97, 1536, 512),
    Shape((ATT, ATT), 512, 52, 1536, batch=2),
    Shape((ATT,), 512, 12, 1536, batch=7),  # in 112 rows
]


@pytest.fixture(scope="module")
def library():
    return load_kernels(FILES, checked=True)


def runs(library, case, seeds, factor=1.25):
    outs = []
    for seed in seeds:
        library.configure(seed=seed)
        outs.append(case.run(library))
        fault = case.compare(outs[-1], factor)
        assert fault is None, f"seed {seed}: {fault}"
    for out in outs[1:]:
        assert all(map(np.array_equal, out, outs[0])), "another schedule gave other bits"


@pytest.mark.slow
@pytest.mark.parametrize("shape", SMALL, ids=str)
def test_right_and_clean_under_all_seeds(library, shape):
    runs(library, Case(shape), range(1, 11 if shape in TEN_SEEDS else 4))


@pytest.mark.parametrize("kind", [ATT, MLP])
def test_right_and_clean(library, kind):
    runs(library, Case(Shape((kind,), tokens=70, schedule="trm")), [1, 2])


@pytest.mark.slow
@pytest.mark.parametrize("shape", FULL, ids=str)
def test_a_full_size_call(library, shape):
    runs(library, Case(shape), [1])


@pytest.mark.slow
def test_width_384(library):
    runs(library, Case(Shape((ATT, MLP), 384, 97, 256, 128)), [1])


@pytest.mark.parametrize("kinds, batch", [((ATT,), 3), ((MLP,), 1)])
@pytest.mark.parametrize("schedule", ["trm", "hrm", "single_z"])
def test_every_call_by_itself(library, kinds, batch, schedule):
    """Two samples of attention share two CTAs."""
    case = Case(Shape(kinds, tokens=33, batch=batch, schedule=schedule))
    library.configure(seed=1)
    for k, (call, one) in enumerate(case.one_call_each()):
        assert one.compare(one.run(library)) is None, f"call {k}: {call}"


@pytest.mark.parametrize("policy", [0, 1], ids=["eager", "lazy"])
def test_copies_may_be_early_or_late(library, policy):
    library.configure(**{"async": policy})
    for kind in (ATT, MLP):
        runs(library, Case(Shape((kind,), tokens=70, batch=2, cluster=4)), [1])
    library.configure(**{"async": 2})


def test_threads_may_be_switched_at_every_access(library):
    library.configure(yield_chance=0.5)
    runs(library, Case(Shape((ATT, MLP), tokens=70)), [1])
    library.configure(yield_chance=0)


def test_clusters_of_all_sizes_give_the_same_bits(library):
    outs = []
    for cluster in (2, 4, 8):
        case = Case(Shape((ATT, MLP), tokens=20, batch=3, cluster=cluster))
        outs.append(case.run(library))
    for out in outs[1:]:
        assert all(map(np.array_equal, out, outs[0]))


def test_samples_that_share_two_ctas_do_not_meet(library):
    """Equal ones have equal bits on either side, and one that is not finite spoils itself alone."""
    case = Case(Shape((ATT, ATT), tokens=42, batch=2))
    for tensor in (case.x, *case.states):
        tensor[1] = tensor[0]
    outs, clean = case.run(library), case.x[0].copy()
    assert all(np.array_equal(out[0], out[1]) for out in outs)
    for spoiled in (0, 1):
        case.x[:] = clean
        case.x[spoiled] = NAN
        found = case.run(library)
        assert np.isnan(from_bf16(found[1][spoiled])).all()
        assert np.array_equal(found[1][1 - spoiled], outs[1][0])


def test_same_bits_without_the_race_checker(library):
    case = Case(Shape((ATT, MLP), tokens=70))
    plain = load_kernels(FILES, checked=False)
    assert all(map(np.array_equal, case.run(plain), case.run(library)))


REFUSED = [
    (Shape(hidden=192), "hidden is 192; compiled are 128 256 384 512"),
    (Shape(tokens=129), "tokens is 129; two CTAs hold 1 to 128"),
    (Shape(cluster=3), "cluster is 3; 2, 4 or 8 CTAs are possible"),
]


@pytest.mark.parametrize("shape, message", REFUSED, ids=lambda v: "" if isinstance(v, str) else "-")
def test_what_does_not_fit_is_refused(library, shape, message):
    with pytest.raises(EmulatorFault, match=message):
        Case(shape).run(library)


def test_heads_of_another_width_are_refused(library):
    case = Case(Shape())
    (r, _), keep = case.arguments(library, case.states)
    keep[0].nets[0].blocks[0].heads = 4
    entry = library.library.rx_cluster_sm90a_run
    assert entry(r, ctypes.byref(RxClusterPlan(2)), None) != 0
    with pytest.raises(EmulatorFault, match="heads is 4 at hidden 128; a head is 64 wide"):
        library.call("rx_cluster_sm90a_run", r, ctypes.byref(RxClusterPlan(2)), None)


def test_structs_are_laid_out_as_in_c(library):
    assert Library(library.library).kinds == ("cluster",)


# ---- the yardstick


def in_torch(case: Case, dtype: torch.dtype) -> list[np.ndarray]:
    """The case by recurx/reference.py."""
    shape = case.shape

    def tensor(bits):
        return torch.from_numpy(from_bf16(bits)).to(dtype)

    names = [f"s{i}" for i in range(shape.states)]
    steps = tuple(
        Step(
            f"net{call.net}",
            names[call.write],
            state=tuple(INPUT if v == "x" else names[v] for v in call.state),
            inject=tuple(INPUT if v == "x" else names[v] for v in call.inject),
        )
        for call in SCHEDULES[shape.schedule]
    )
    specs = [
        BlockSpec(ATTENTION, shape.hidden, shape.inner, num_heads=shape.hidden // HEAD_DIM)
        if kind == ATT
        else BlockSpec(
            TOKEN_MLP, shape.hidden, shape.inner, tokens=shape.tokens, token_inner=shape.token_inner
        )
        for kind in shape.kinds
    ]
    nets = {
        f"net{n}": Net(NetSpec(tuple(specs)), [tensor(w) for block in net for w in block])
        for n, net in enumerate(case.weights)
    }
    carry = {name: tensor(bits) for name, bits in zip(names, case.states, strict=True)}
    tables = tuple(torch.from_numpy(table) for table in rope_tables(shape.tokens))
    cos_sin = tables if shape.rope else None
    with torch.no_grad():
        out = reference.run(Schedule(steps), nets, tensor(case.x), carry, cos_sin)
    return [out[name].double().numpy() for name in names]


@pytest.mark.parametrize("kinds", [(ATT,), (MLP,)])
def test_the_yardstick_is_pytorch(kinds):
    """fp64 is the reference's, and plain bf16 is as far from it as PyTorch's bf16."""
    case = Case(Shape(kinds, tokens=70, schedule="trm"))
    for got, want in zip(case.want, in_torch(case, torch.float64), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-9)
    plain = in_torch(case, torch.bfloat16)
    for theirs, want, (rms, _) in zip(plain, case.want, case.plain_error, strict=True):
        assert rms <= 1.1 * error(theirs, want)[0]


# ---- planted bugs


@pytest.fixture(scope="module")
def buggy(tmp_path_factory):
    return bugs_cluster.plant_all(tmp_path_factory.mktemp("cluster") / "cuda")


@pytest.mark.slow
def test_with_all_bugs_asleep_it_is_right(buggy):
    bugs_cluster.wake(buggy, None)
    for shape in {bug.shape for bug in bugs_cluster.BUGS}:
        assert outcome(buggy, Case(shape), seed=1) == "right"


@pytest.mark.slow
@pytest.mark.parametrize("bug", bugs_cluster.BUGS, ids=lambda bug: bug.name)
def test_a_planted_bug_is_found(buggy, bug):
    bugs_cluster.wake(buggy, bug)
    missed = bug.missed(buggy, Case(bug.shape))
    assert not missed, f"did not report {bug.found!r}, but: {missed[0]}"
