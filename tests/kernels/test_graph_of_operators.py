"""Kind "graph" of backend "triton": the reference on fixed buffers, for what differs from TRM's.

A tape stands for the CUDA graph: it repeats the recorded operations and nothing that the host did.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from simulate import triton_on_cpu

import recurx
from recurx import Schedule, backends, reference
from recurx.plan import DEVICES
from recurx.plan.launch import LaunchPlan
from recurx.specs import ATTENTION, BlockSpec, NetSpec
from tests.train.guards import Tape, no_host_sync
from tests.variants import TOKENS, VARIANTS, WIDTH, net_of, spec_of, tables_of

NOISY = Schedule.trm(2, 1).with_factors(damping=0.9, scale=0.8, noise=0.1)
CLASSIC = BlockSpec(ATTENTION, WIDTH, 48, 4)


def states(batch: int, dtype: torch.dtype, seed: int) -> tuple[torch.Tensor, dict]:
    generator = torch.Generator().manual_seed(seed)
    x, z_l, z_h = torch.randn(3, batch, TOKENS, WIDTH, generator=generator).to(dtype)
    return x, {"z_L": z_l, "z_H": z_h}


def expected(net, x, carry, tables, seed):
    with torch.no_grad():
        return reference.run(NOISY, {"L": net}, x, carry, tables, seed=torch.tensor([seed, 0]))


DROPPING = dataclasses.replace(CLASSIC, dropout=0.2, drop_path=0.3)
LOW = ("TRM, damped", "ConvSwiGLU", "pre-LayerNorm, ReLU")
CASES = [(n, torch.float32) for n in (*sorted(VARIANTS), "TRM, damped", "TRM, dropping")]


@pytest.mark.parametrize(("name", "dtype"), CASES + [(name, torch.bfloat16) for name in LOW])
def test_it_is_the_reference_whatever_is_replayed(name: str, dtype: torch.dtype) -> None:
    """Other states, weights, tables and seeds at each call; five samples in slices of two."""
    spec = spec_of(name) if name in VARIANTS else {"TRM, dropping": DROPPING}.get(name, CLASSIC)
    net, tables = net_of(spec, spec), tables_of(spec)
    with triton_on_cpu("graph", slice=2, capture=Tape().capture):
        for call in range(3):
            x, carry = states(5, dtype, call)
            for weight in net.weights:
                weight.mul_(1.01)
            if tables is not None:
                tables = tables[0] * 1.02, tables[1]
            got = recurx.recurse(
                NOISY, {"L": net}, x, carry, backend="triton", cos_sin=tables, seed=call
            )
            want = expected(net, x, carry, tables, call)
            for state in want:
                torch.testing.assert_close(got[state], want[state], rtol=0, atol=0)


def test_noise_of_a_slice_is_that_of_its_samples(monkeypatch) -> None:
    """The number of the first sample, were it left out, would be that of the first slice."""
    from recurx.backends import graph_slice

    def kept(self, operands, live, enter=graph_slice.GraphSlice.enter):
        enter(self, operands, live)
        self._seed[1] = 0

    monkeypatch.setattr(graph_slice.GraphSlice, "enter", kept)
    net, tables = net_of(CLASSIC), tables_of(CLASSIC)
    x, carry = states(6, torch.float32, 0)
    want = expected(net, x, carry, tables, 1)["z_H"]
    with triton_on_cpu("graph", slice=2, capture=Tape().capture):
        got = recurx.recurse(NOISY, {"L": net}, x, carry, backend="triton", cos_sin=tables, seed=1)
    assert not torch.allclose(got["z_H"], want)


def test_key_masks_of_a_slice_are_those_of_its_samples() -> None:
    """Other masks at each call, five samples in slices of two."""
    spec = dataclasses.replace(CLASSIC, key_padding=True)
    net, tables, draw = net_of(spec), tables_of(spec), torch.Generator().manual_seed(0)
    with triton_on_cpu("graph", slice=2, capture=Tape().capture):
        for call in range(3):
            x, carry = states(5, torch.float32, call)
            mask = torch.rand(5, TOKENS, generator=draw) < 0.5
            how = dict(cos_sin=tables, seed=call, key_mask=mask)
            got, want = (
                recurx.recurse(NOISY, {"L": net}, x, carry, backend=backend, **how)
                for backend in ("triton", "eager")
            )
            for state in want:
                torch.testing.assert_close(got[state], want[state], rtol=0, atol=0)


def test_a_launch_never_waits_for_the_device() -> None:
    for name in sorted(VARIANTS):
        spec = spec_of(name)
        net, tables = net_of(spec), tables_of(spec)
        x, carry = states(2, torch.float32, 0)
        seed = torch.tensor([1, 0])
        with no_host_sync(), torch.no_grad():
            reference.run(NOISY, {"L": net}, x, carry, tables, seed=seed)


def test_it_is_planned_for_these() -> None:
    def problem(spec: BlockSpec, schedule: Schedule) -> recurx.Problem:
        net = (("L", NetSpec((spec,))),)
        return recurx.Problem(schedule, net, 200, TOKENS, WIDTH, torch.bfloat16, "cuda", True)

    plan = LaunchPlan.pick(problem(spec_of("ConvSwiGLU"), NOISY), DEVICES["h100"], "triton")
    assert (plan.kind, plan["slice"], plan.work.from_python) == ("graph", 100, False)
    wide = dataclasses.replace(CLASSIC, num_heads=1)  # heads that kernels have
    plain = LaunchPlan.pick(problem(wide, Schedule.trm(2, 1)), DEVICES["h100"], "triton")
    assert plain.kind != "graph"
    damped, both = problem(wide, NOISY), problem(spec_of("ConvSwiGLU"), NOISY)
    assert LaunchPlan.pick(damped, DEVICES["h100"], "triton").kind != "graph"
    assert LaunchPlan.pick(damped, DEVICES["h100"], "triton/graph").kind == "graph"
    for kind in ("tiled", "library", "persistent"):
        backend = backends.get(f"triton/{kind}")
        assert backends.unknown_fields(backend, damped) is None
        said = str(backends.unknown_fields(backend, both))
        assert ("of block 0 of net 'L'" in said) != (kind == "library"), said
    assert backends.unknown_fields(backends.get("triton"), damped) is None


def test_training_runs_on_pytorch_and_says_so() -> None:
    net = net_of(spec_of("ConvSwiGLU"))
    for weight in net.weights:
        weight.requires_grad_()
    x, carry = states(2, torch.float32, 0)
    want = recurx.recurse(NOISY, {"L": net}, x, carry, backend="eager", seed=1)["z_H"]
    with triton_on_cpu("graph"):
        got = recurx.recurse(NOISY, {"L": net}, x, carry, backend="triton", seed=1)["z_H"]
    grads = [torch.autograd.grad(out.square().sum(), net.weights) for out in (got, want)]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
