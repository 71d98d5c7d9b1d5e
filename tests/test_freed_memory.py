"""Tensors whose memory was freed, as FSDP does between uses: named, and never read."""

from __future__ import annotations

import pytest
import torch

import recurx
from recurx import InvalidArgument, Schedule, ops
from recurx.problem import encode
from tests.factories import make_inputs, make_net, rope

SCHEDULE = Schedule.trm(1, 1)


def free(tensor: torch.Tensor, left: int = 0) -> None:
    tensor.untyped_storage().resize_(left)


def in_a_buffer(weight: torch.Tensor) -> torch.Tensor:
    """Not at the start of its storage: then the pointer of freed memory is not null."""
    return torch.cat([torch.zeros(64), weight.flatten()])[64:].view(weight.shape)


def arguments():
    x, carry = make_inputs(SCHEDULE)
    return make_net(), x, carry, rope()


LOST = {
    "weight 5": lambda net, x, carry, tables: free(net.weights[5]),
    "weight 2": lambda net, x, carry, tables: free(net.weights[2], net.weights[2].nbytes - 4),
    "weight 1": lambda net, x, carry, tables: free(net.weights[1]),
    "weight 3": lambda net, x, carry, tables: free(net.weights[3]),
    "`x`": lambda net, x, carry, tables: free(x),
    "z_H": lambda net, x, carry, tables: free(carry["z_H"]),
    "cos_sin (cos)": lambda net, x, carry, tables: free(tables[0]),
    "cos_sin (sin)": lambda net, x, carry, tables: free(tables[1]),
}


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("backend", ["eager", "cpu", "auto"])
@pytest.mark.parametrize("what", LOST)
def test_it_is_named(native, what: str, backend: str, autocast: bool) -> None:
    net, x, carry, tables = arguments()
    net.weights[1] = in_a_buffer(net.weights[1])
    net.weights[3] = net.weights[3].t().contiguous().t()

    def call():
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return recurx.recurse(SCHEDULE, {"L": net}, x, carry, backend=backend, cos_sin=tables)

    call()
    LOST[what](net, x, carry, tables)
    with pytest.raises(InvalidArgument, match="a storage of") as refused:
        call()
    assert what in str(refused.value)


def test_the_ops_and_the_backward_look_too(native) -> None:
    """What was there in the forward may be gone in the backward."""
    net, x, carry, tables = arguments()
    key = encode(SCHEDULE, (("L", net.spec),))
    weights = [weight.requires_grad_() for weight in net.weights]
    flat = x, list(carry.values()), weights, *tables, None, None
    out = ops.recurse_op(*flat, key, "cpu", 0, 2)
    free(weights[7])
    with pytest.raises(InvalidArgument, match="weight 7"):
        out[0].sum().backward()
    with pytest.raises(InvalidArgument, match="weight 7"):
        ops.recurse_op(*flat, key, "cpu", 0, 2)


def test_views_of_more_and_of_nothing_are_there(native) -> None:
    """A check of sizes may not refuse what only looks short: expanded, overlapping, empty."""
    net, x, carry, tables = arguments()
    net.weights[0] = net.weights[0][:1].expand(net.weights[0].shape)
    wide = torch.zeros(4, 13, 128)
    wide[..., 32:96] = torch.randn(4, 13, 64)
    x = wide[:3, :, 32:96]

    def call(x, carry):
        return recurx.recurse(SCHEDULE, {"L": net}, x, carry, backend="cpu", cos_sin=tables)["z_H"]

    copied = call(x.contiguous(), carry)
    assert torch.equal(call(x, carry), copied)
    none = {name: state[3:] for name, state in carry.items()}
    assert call(x[3:], none).shape == (0, 13, 64)


def test_solve_inside_the_engine_looks_too(native) -> None:
    from recurx.models import TRM, TRMConfig

    sizes = dict(hidden_size=64, num_heads=2, inner_multiple=32)
    model = TRM(TRMConfig.tiny(7, 13, **sizes), "cpu").eval()
    batch = {"inputs": torch.randint(0, 7, (2, 13))}
    recurx.solve(model, batch, max_steps=1)
    free(model.inner.L_level.layers[0].mlp.down_proj.weight)
    with pytest.raises(InvalidArgument, match="weight 3"):
        recurx.solve(model, batch, max_steps=1)
