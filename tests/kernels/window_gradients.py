"""Gradients of a window: by autograd, on the Triton backend, and how the second are judged.

In fp32 by cosine and norm against eager autograd; in bf16 by the distance to fp64, with that of
PyTorch's own bf16 as the measure.
"""

from __future__ import annotations

import contextlib

import torch
import torch.nn.functional as F

import recurx
from recurx import reference
from recurx.nets import Net
from tests.factories import rounded, wide
from tests.kernels.compare import ERROR_RATIO, relative_error


def loss_of(carry: dict) -> torch.Tensor:
    """Every entry of every state counts, with another weight."""
    total = 0.0
    for n, state in enumerate(carry.values()):
        wide_state = state.to(torch.promote_types(state.dtype, torch.float32))
        entries = state.shape[1] * state.shape[2]
        ramp = torch.linspace(-1, 1, entries, device=state.device).view(state.shape[1:])
        total = total + (wide_state * torch.roll(ramp.to(wide_state.dtype), n, 0)).square().sum()
    return total


@contextlib.contextmanager
def kept_by_autograd(*beside):
    """{address: bytes} of what autograd keeps of the calls inside, beside these tensors."""
    seen: dict[int, int] = {}

    def pack(tensor):
        seen[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield seen
    for tensor in beside:
        seen.pop(tensor.data_ptr(), None)


def gradients_of(run, schedule, nets, x, carry, into_carry=False):
    """Gradients of x and all weights, and of the carry, by name."""
    x = x.detach().clone().requires_grad_()
    carry = {name: s.detach().clone().requires_grad_(into_carry) for name, s in carry.items()}
    nets = {
        name: Net(net.spec, [w.detach().clone().requires_grad_() for w in net.weights])
        for name, net in nets.items()
    }
    leaves = {"x": x, **(carry if into_carry else {})}
    leaves |= {f"{name}[{i}]": w for name, net in nets.items() for i, w in enumerate(net.weights)}
    loss = loss_of(run(schedule, nets, x, carry))
    grads = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
    return dict(zip(leaves, grads, strict=True))


def autograd(cos_sin, seed=None, key_mask=None):
    """Plain PyTorch with the window cut by hand."""
    seed = torch.tensor([seed, 0]) if isinstance(seed, int) else seed

    def run(schedule, nets, x, carry):
        if schedule.detach_carry:
            carry = {name: state.detach() for name, state in carry.items()}
        with torch.no_grad():
            stop = schedule.grad_from
            before = reference.run(schedule, nets, x, carry, cos_sin, 0, stop, seed, key_mask)
        before = before if schedule.grad_from else carry
        how = dict(start=schedule.grad_from, seed=seed, key_mask=key_mask)
        return reference.run(schedule, nets, x, before, cos_sin, **how)

    return run


def on_triton(cos_sin, save="all", way="triton", **beside):
    def run(schedule, nets, x, carry):
        how = dict(backend=way, cos_sin=cos_sin, save=save, **beside)
        return recurx.recurse(schedule, nets, x, carry, **how)

    return run


def assert_close(got: dict, schedule, nets, x, carry, cos_sin, into_carry=False, **beside) -> None:
    """`got` against autograd; with fp32 states by cosine and norm, with bf16 through fp64."""
    arguments = dict(into_carry=into_carry)
    plain = gradients_of(autograd(cos_sin, **beside), schedule, nets, x, carry, **arguments)
    if x.dtype == torch.float32:
        for name, a in got.items():
            b = plain[name]
            assert a.dtype == b.dtype
            if not b.any():
                assert not a.any(), f"{name} should be zero"
                continue
            cosine = F.cosine_similarity(a.double().flatten(), b.double().flatten(), dim=0)
            assert cosine > 0.9999, f"gradient of {name}: cosine {cosine}"
            norm = (a.norm() / b.norm()).item()
            assert abs(norm - 1) < 1e-3, f"gradient of {name}: norm off by {norm}"
        return
    exact_nets = {name: rounded(net, x.dtype, torch.float64) for name, net in nets.items()}
    exact = gradients_of(
        autograd(cos_sin, **beside), schedule, exact_nets, x.double(), wide(carry), **arguments
    )
    # All gradients together: alone, a small matrix's error of one draw scatters by more than that,
    # and that of a single number, a sum whose terms cancel, by ten times; fp32 judges those. (Over
    # 24 draws of each variant theirs was 0.54 to 0.95 of PyTorch's.)
    used = [name for name in exact if exact[name].any() and exact[name].numel() > 1]
    ours, theirs = (
        sum(relative_error(g[name], exact[name]) ** 2 for name in used) ** 0.5 for g in (got, plain)
    )
    assert ours <= ERROR_RATIO * theirs, (
        f"gradients: relative error {ours:.3g}, PyTorch's {theirs:.3g}"
    )
