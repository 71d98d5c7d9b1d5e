"""What `recurse`, `explain` and `solve` do with nets that are proved, and that are not."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor

import recurx
from recurx import BackendUnavailable, UnsupportedModel, proof, readings
from recurx.models import TRMConfig
from recurx.models.layers import ReasoningNet
from tests import lookalike
from tests.hostile import models as twisted
from tests.hostile.edits import EDITS
from tests.proving import (
    ROPE,
    SCHEDULE,
    child,
    difference,
    forward_hook,
    instance_forward,
    is_known,
    parameter,
    pruned,
    stack,
)
from tests.proving import nothing_known as nothing_known


def inputs() -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(1)
    x, z_H, z_L = torch.randn(3, 2, 10, 32)
    return x, {"z_H": z_H, "z_L": z_L}


class NeedsInjection(lookalike.Stack):
    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, input_injection: Tensor, **kwargs: Any
    ) -> Tensor:
        return 2 * super().forward(hidden_states, input_injection, **kwargs)


class Masked(lookalike.Stack):
    def forward(self, h: Tensor, mask: Tensor, cos_sin: Any) -> Tensor:  # type: ignore[override]
        return super().forward(h, cos_sin=cos_sin)


@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.parametrize("kind", [lookalike.Stack, NeedsInjection])
def test_what_is_not_proved_runs_its_own_code(kind: type, backend: str) -> None:
    net = stack(quirks=frozenset({"scaled residual"}))
    net.__class__ = kind
    x, carry = inputs()
    zero = torch.zeros(1)
    own = recurx.recurse(
        SCHEDULE, {"L": lambda h: net(h, zero, cos_sin=ROPE)}, x, carry, backend="eager"
    )
    got = recurx.recurse(SCHEDULE, {"L": net}, x, carry, backend=backend, cos_sin=ROPE)
    assert torch.equal(got["z_H"], own["z_H"]) and torch.equal(got["z_L"], own["z_L"])


def test_a_fused_backend_refuses_what_is_not_proved_by_name() -> None:
    net = stack()
    parameter(net)
    x, carry = inputs()
    for more in ({"backend": "cpu"}, {"backend": "triton"}, {"save": "states"}):
        with pytest.raises(BackendUnavailable, match=r"L\.layers\.0` has a param") as error:
            recurx.recurse(SCHEDULE, {"L": net}, x, carry, cos_sin=ROPE, **more)
        assert 'backend="eager"' in str(error.value), "what to do next"


def test_what_cannot_be_called_is_refused() -> None:
    net = stack()
    net.__class__ = Masked
    x, carry = inputs()
    with pytest.raises(UnsupportedModel, match=r"takes other arguments.*lambda h: net\(h\)"):
        recurx.recurse(SCHEDULE, {"L": net}, x, carry, backend="eager", cos_sin=ROPE)


def test_own_nets_that_no_longer_are_themselves_are_refused() -> None:
    config = TRMConfig.tiny(vocab_size=7, seq_len=10, hidden_size=32, num_heads=2)
    for change in (forward_hook, pruned, child, parameter, instance_forward):
        net = ReasoningNet(config, num_layers=1)
        x, carry = inputs()
        recurx.recurse(SCHEDULE, {"L": net}, x, carry, backend="eager", cos_sin=ROPE)
        change(net)
        for backend in ("eager", "auto"):
            with pytest.raises(UnsupportedModel, match=r"layers\.0"):
                recurx.recurse(SCHEDULE, {"L": net}, x, carry, backend=backend, cos_sin=ROPE)


def test_rotary_tables_are_part_of_the_proof() -> None:
    """Code that turns by tables of its own where it is given none is no block without tables."""

    class Filled(lookalike.Layer):
        def forward(self, cos_sin: Any, hidden_states: Tensor) -> Tensor:
            tables = recurx.rope_tables(hidden_states.shape[1], 16) if cos_sin is None else cos_sin
            return super().forward(tables, hidden_states)

    net = stack()
    for layer in net.layers:
        layer.__class__ = Filled
    assert difference(net, rope=True) == "" and is_known(net)
    assert readings.read(net, False) is None
    assert "off by" in difference(net, rope=False)


def test_a_module_compiled_alone_is_looked_through() -> None:
    net = stack()
    compiled = torch.compile(net, backend="eager")
    x, carry = inputs()
    out = [
        recurx.recurse(SCHEDULE, {"L": each}, x, carry, backend="eager", cos_sin=ROPE)["z_H"]
        for each in (net, compiled)
    ]
    assert torch.equal(*out)
    compiled.register_forward_hook(lambda module, given, h: 2 * h)
    assert proof.without_compile(compiled) is compiled, "its hook would no longer run"


@pytest.mark.parametrize(
    "edit", ["twisted", "biased", "layer_wrapped", "eps_changed", "lora_inside"]
)
def test_compiled_code_is_compiled_anew_when_its_net_changes(edit: str) -> None:
    torch._dynamo.reset()
    model = twisted.model().eval()
    net, (x, carry) = model.model.inner.L_level, inputs()

    def run(z_H: Tensor) -> Tensor:
        states = {**carry, "z_H": z_H}
        return recurx.recurse(SCHEDULE, {"L": net}, x, states, cos_sin=ROPE)["z_H"]

    compiled = torch.compile(run, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(carry["z_H"]), run(carry["z_H"]))
        EDITS[edit](model, Random(5))
        torch.testing.assert_close(compiled(carry["z_H"]), run(carry["z_H"]))


def test_explain_says_what_differs() -> None:
    assert "may run fused" in recurx.explain(stack())
    assert "has a parameter `gain`" in recurx.explain(stack(quirks=frozenset({"gain"})))
    model = recurx.models.TRM(TRMConfig.tiny(vocab_size=7, seq_len=10))
    forward_hook(model.inner.L_level)
    assert "layers.0.mlp` has hooks" in recurx.explain(model)
    with pytest.raises(UnsupportedModel, match="has hooks"):
        recurx.solve(model, {"inputs": torch.zeros(1, 10, dtype=torch.int32)}, max_steps=1)
