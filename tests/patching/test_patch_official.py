"""recurx.patch on the official code itself, in the way that its training loop uses it.

Needs checkouts, see `tests/official.py`; tests/patching/test_patch.py covers the same without them.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import recurx
from recurx.patching.handle import installed
from tests import official

CASES = [
    ("trm", {}),
    ("trm", {"mlp_t": True, "pos_encodings": "none"}),
    ("trm", {"mlp_t": True}),
    ("trm", {"pos_encodings": "learned"}),
    ("single_z", {}),
    ("single_z", {"mlp_t": True, "pos_encodings": "none"}),
    ("hier6", {}),
    ("hier6", {"mlp_t": True, "pos_encodings": "none"}),
    ("hrm", {}),
    ("hrm_in_trm", {}),
    ("hrm_in_trm", {"mlp_t": True}),
]
NAMES = [", ".join([system, *(f"{k}={v}" for k, v in fields.items())]) for system, fields in CASES]
EVERY_CASE = pytest.mark.parametrize("system,fields", CASES, ids=NAMES)


def build(parts: dict[str, Any], system: str, **fields: Any) -> nn.Module:
    torch.manual_seed(0)
    model = parts["model"](official.config(system, **fields))
    with torch.no_grad():  # both start at zero, which would hide a fault
        model.inner.q_head.weight.normal_()
        model.inner.puzzle_emb.weights.normal_()
    return parts["loss"](model, "stablemax_cross_entropy")


def inner_of(head: nn.Module) -> nn.Module:
    return next(m for m in head.modules() if hasattr(m, "L_level") and hasattr(m, "lm_head"))


def train(head: nn.Module, steps: int = 4) -> list[Tensor]:
    """Carries, losses, logits and gradients of some supervision steps, samples replaced."""
    torch.manual_seed(7)
    head.zero_grad()
    carry = head.initial_carry(official.batch())
    trace: list[Tensor] = []
    for step in range(steps):
        carry, loss, _, out, _ = head(
            return_keys=["logits", "q_halt_logits"], carry=carry, batch=official.batch(seed=step)
        )
        loss.backward()
        trace += [loss.detach(), *out.values(), carry.steps, carry.halted]
        trace += official.states(carry.inner_carry).values()
    trace += [p.grad.clone() for p in head.parameters()]
    trace.append(inner_of(head).puzzle_emb.local_weights.grad.clone())
    return trace


def same(got: list[Tensor], want: list[Tensor]) -> None:
    assert len(got) == len(want)
    for index, (a, b) in enumerate(zip(got, want, strict=True)):
        assert torch.equal(a, b), f"value {index} of the trace: {(a - b).abs().max()}"


@EVERY_CASE
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_patched_training_has_the_same_bits(
    system: str, fields: dict[str, Any], dtype: str
) -> None:
    head = build(official.load(system), system, forward_dtype=dtype, **fields)
    want, names = train(head), list(head.state_dict())
    puzzles = inner_of(head).puzzle_emb.local_weights
    puzzles.grad = None
    handle = recurx.patch(head, backend="eager")
    assert "bit-identical" in str(handle.report)
    same(train(head), want)
    assert list(head.state_dict()) == names
    handle.remove()
    puzzles.grad = None
    same(train(head), want)


@pytest.mark.parametrize("system", ["trm", "hrm"])
def test_evaluation_on_an_ema_copy(system: str) -> None:
    """As the official loop does it: copy the patched model, load averaged weights, evaluate."""
    head = build(official.load(system), system)
    plain = copy.deepcopy(head)
    recurx.patch(head, backend="eager")
    results = []
    for model in (head, plain):
        copied = copy.deepcopy(model)
        for name, parameter in copied.named_parameters():
            torch.manual_seed(len(name))
            parameter.data.copy_(torch.randn_like(parameter) * 0.1)
        copied.eval()
        with torch.inference_mode():
            carry = copied.initial_carry(official.batch())
            for _ in range(4):
                carry, _, _, out, done = copied(
                    return_keys=["logits"], carry=carry, batch=official.batch()
                )
        assert done
        results.append(out["logits"])
    assert installed(inner_of(copied), "forward") is None
    assert torch.equal(*results)


def test_compiled_as_the_official_loop_does() -> None:
    # TRM only: Dynamo remembers modules by name for good, and HRM's have the same names.
    system = "trm"
    torch._dynamo.reset()
    with official.importable(system):  # torch.compile looks the module up again
        head = build(official.import_parts(system), system, L_layers=1).eval()
        batch = official.batch()

        def answer(model: nn.Module) -> Tensor:
            with torch.no_grad():
                carry = model.initial_carry(batch)
                return model(return_keys=["logits"], carry=carry, batch=batch)[3]["logits"]

        want = answer(head)
        compiled = torch.compile(head, backend="eager")
        torch.testing.assert_close(answer(compiled), want)
        with recurx.patch(compiled) as handle:
            assert [entry.where for entry in handle.report.patched] == ["_orig_mod.model.inner"]
            torch.testing.assert_close(answer(compiled), want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("system", ["trm", "hrm"])
def test_the_imported_official_module(system: str) -> None:
    parts = official.load(system)
    want = train(build(parts, system))
    with recurx.patch(parts["module"], backend="eager") as handle:
        head = build(parts, system)
        assert installed(inner_of(head), "forward") is not None
        same(train(head), want)
        assert len(handle.report.patched) == 2
    assert installed(inner_of(head), "forward") is None
