"""The step under torch.compile(fullgraph=True) and autocast, on every backend that is here."""

from __future__ import annotations

import contextlib

import pytest
import torch

from recurx import tasks
from recurx.models import TRM, ACTLossHead, Exploration
from tests.train.simulated import BACKENDS, on
from tests.train.test_train import tiny


def head_for(backend: str, dtype: str = "float32") -> ACTLossHead:
    settings = tiny(model={"forward_dtype": dtype, "hidden_size": 32, "H_cycles": 2, "L_cycles": 1})
    config = settings.model_config(tasks.get(settings.task))
    torch.manual_seed(0)
    model = TRM(config, backend)
    model.exploration = Exploration(3)
    with torch.no_grad():
        model.inner.q_head.weight.normal_()
    return ACTLossHead(model, "fused_stablemax_cross_entropy")


def batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(1, 5, (6, 5), generator=generator)
    ids = torch.zeros(6, dtype=torch.int32)
    return {"inputs": tokens, "labels": tokens.sort(-1).values, "puzzle_identifiers": ids}


def two_steps(head: ACTLossHead, call) -> list[torch.Tensor]:
    data, found = batch(), []
    carry = head.initial_carry(data)
    for _ in range(2):
        carry, loss, metrics, _, _ = call(carry=carry, batch=data)
        loss.backward()
        found += [loss.detach(), carry.halted, carry.steps, metrics["count"]]
        found += [*carry.inner_carry.values()]
    return found + [p.grad for p in head.parameters()] + [head.model.exploration.state]


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_the_loss_head_traces_whole_and_gives_the_same_step(backend: str) -> None:
    with on(backend) as ran:
        plain, traced = head_for(backend), head_for(backend)
        want = two_steps(plain, plain)
        compiled = torch.compile(traced, fullgraph=True, backend="aot_eager")
        got = two_steps(traced, compiled)
    for index, (a, b) in enumerate(zip(got, want, strict=True)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=f"value {index}")
    assert plain.model.exploration.state[1] == 2
    assert len(ran) == 4, "each of four steps runs on the engine"


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_runs_the_recursion_in_bf16(backend: str) -> None:
    """The fp32 model under autocast is the bf16 recursion: near the bf16 model, far from fp32's."""
    losses, grads = {}, {}
    for name, dtype, cast in (
        ("fp32", "float32", False), ("autocast", "float32", True), ("bf16", "bfloat16", False)
    ):  # fmt: skip
        with on(backend):
            head = head_for(backend, dtype)
            data = batch()
            carry = head.initial_carry(data)
            context = torch.autocast("cpu", torch.bfloat16) if cast else contextlib.nullcontext()
            with context:
                carry, loss, *_ = head(carry=carry, batch=data)
            loss.backward()
        losses[name] = loss.detach().double()
        grads[name] = torch.cat([p.grad.flatten().double() for p in head.parameters()])
        state = next(iter(carry.inner_carry.values()))
        assert state.dtype == getattr(torch, dtype)
    cosine = torch.nn.functional.cosine_similarity
    assert cosine(grads["autocast"], grads["fp32"], dim=0) > 0.99
    assert losses["autocast"] != losses["fp32"]
    # bf16's own distance is the yardstick; that of one number can be nearly 0 by chance, as the
    # loss's is on AMX, so a sixteenth of bf16's rounding (2^-8) is allowed beside it.
    for found, least in ((grads, 0.0), (losses, 2**-12 * losses["fp32"])):
        drift = (found["bf16"] - found["fp32"]).norm()
        assert (found["autocast"] - found["fp32"]).norm() < 4 * drift + least
