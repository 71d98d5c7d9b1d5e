"""recurx.models against the official code at equal weights: the same bits.

These tests need checkouts of the official repositories, see `tests/official.py`. What they pin
without one is kept by tests/models/test_models.py (bookkeeping) and tests/test_reference.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from recurx.models import HRM, TRM, ACTLossHead
from recurx.models.act import RecursiveModel
from tests import official

CASES = [
    ("trm", {}),
    ("trm", {"mlp_t": True, "pos_encodings": "none"}),
    ("trm", {"pos_encodings": "learned"}),
    ("trm", {"puzzle_emb_ndim": 100}),
    ("single_z", {}),
    ("single_z", {"mlp_t": True, "pos_encodings": "none"}),
    ("hier6", {}),
    ("hrm", {}),
    ("hrm", {"H_cycles": 1, "L_cycles": 1}),
    ("hrm", {"pos_encodings": "learned"}),
    ("hrm_in_trm", {"mlp_t": True}),
]
NAMES = [
    f"{system}-{'-'.join(f'{k}={v}' for k, v in changes.items())}" for system, changes in CASES
]
EVERY_CASE = pytest.mark.parametrize("system,changes", CASES, ids=NAMES)
BOTH_DTYPES = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])


def build_ours(system: str, config: dict[str, Any], backend: str = "eager") -> RecursiveModel:
    variant = "hrm" if system.startswith("hrm") else system
    return (HRM if variant == "hrm" else TRM)({**config, "variant": variant}, backend=backend)


def pair(system: str, changes: dict[str, Any], dtype: str) -> tuple[nn.Module, RecursiveModel]:
    """An official model with all weights random (its heads start at zero), and ours with them."""
    parts = official.load(system)
    config = official.config(system, **changes, forward_dtype=dtype)
    torch.manual_seed(0)
    theirs = parts["model"](config)
    ours = build_ours(system, config)
    with torch.no_grad():
        theirs.inner.q_head.weight.normal_()
        if config["puzzle_emb_ndim"]:
            theirs.inner.puzzle_emb.weights.normal_()
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def as_states(ours: RecursiveModel, carry: Any) -> dict[str, Tensor]:
    """An official inner carry under our state names (single-z calls its only state z_L)."""
    tensors = official.states(carry)
    return {"z": tensors["z_L"]} if ours.config.variant == "single_z" else tensors


def random_carry(theirs: nn.Module, batch_size: int) -> Any:
    carry = theirs.inner.empty_carry(batch_size)
    for index, state in enumerate(vars(carry).values()):
        generator = torch.Generator().manual_seed(index)
        state.copy_(torch.randn(state.shape, generator=generator))
    return carry


def gradients(model: nn.Module) -> dict[str, Tensor]:
    grads = {name: p.grad for name, p in model.named_parameters()}
    if hasattr(model.inner, "puzzle_emb"):
        grads["puzzle_emb"] = model.inner.puzzle_emb.local_weights.grad
    return grads


@EVERY_CASE
@BOTH_DTYPES
def test_one_step_and_every_gradient_have_the_same_bits(
    system: str, changes: dict[str, Any], dtype: str
) -> None:
    theirs, ours = pair(system, changes, dtype)
    batch, carry = official.batch(), random_carry(theirs, 4)
    results = []
    for model, states in ((theirs, carry), (ours, as_states(ours, carry))):
        new, logits, (q_halt, q_continue) = model.inner(states, batch)
        weight = torch.linspace(-1, 1, logits.numel()).view(logits.shape)
        (
            (logits.float() * weight).sum() + q_halt.sum() - 0.3 * q_continue.square().sum()
        ).backward()
        results.append((new, logits, q_halt, q_continue))
    (new, *heads), (our_new, *our_heads) = results
    for name, got, want in zip(("logits", "q_halt", "q_continue"), our_heads, heads, strict=True):
        assert torch.equal(got, want), f"{name} differs by {(got - want).abs().max()}"
    assert our_new.keys() == as_states(ours, new).keys()
    for name, want in as_states(ours, new).items():
        assert torch.equal(our_new[name], want), f"state {name}"
        assert not our_new[name].requires_grad
    our_grads = gradients(ours)
    for name, want in gradients(theirs).items():
        assert want is not None and torch.equal(our_grads[name], want), f"gradient of {name}"


@EVERY_CASE
def test_one_seed_gives_one_initialisation(system: str, changes: dict[str, Any]) -> None:
    parts = official.load(system)
    config = official.config(system, **changes)
    torch.manual_seed(3)
    theirs = parts["model"](config).state_dict()
    torch.manual_seed(3)
    ours = build_ours(system, config).state_dict()
    assert list(ours) == list(theirs)
    for name, want in theirs.items():
        torch.testing.assert_close(ours[name], want, rtol=1e-6, atol=1e-7, msg=name)


@pytest.mark.parametrize("system", ["trm", "hrm"])
@pytest.mark.parametrize("training", [True, False])
def test_halting_exploration_and_replacement_go_alike(system: str, training: bool) -> None:
    theirs, ours = pair(system, {}, "float32")
    heads = (official.load(system)["loss"](theirs, "stablemax_cross_entropy"), ACTLossHead(ours))
    keys = ["logits", "q_halt_logits"]
    traces: list[list[Tensor]] = []
    depths: set[int] = set()
    for head in heads:
        head.train(training)
        torch.manual_seed(11)
        carry = head.initial_carry(official.batch())
        trace = []
        for step in range(6):
            carry, loss, metrics, out, done = head(
                return_keys=keys, carry=carry, batch=official.batch(seed=step)
            )
            loss.backward()
            depths |= set(carry.steps[carry.halted].tolist())
            trace += [carry.steps, carry.halted, done, carry.current_data["inputs"]]
            trace += [loss.detach(), *(metrics[k] for k in sorted(metrics))]
            trace += [out[k] for k in keys]
        traces.append([*trace, *(g for g in gradients(head.model).values() if g is not None)])
    assert len(depths) > 1 if training else depths == {4}, "samples must halt at many depths"
    for index, (want, got) in enumerate(zip(*traces, strict=True)):
        torch.testing.assert_close(
            got.double(), want.double(), rtol=1e-6, atol=1e-7, msg=f"value {index} of the trace"
        )
