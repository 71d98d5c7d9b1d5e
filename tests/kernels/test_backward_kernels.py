"""Each backward kernel against autograd: fp64 decides, plain PyTorch's own error is the measure."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from compare import assert_as_exact, relative_error

from recurx import reference
from recurx.nets import rope_tables

DTYPES = (torch.bfloat16, torch.float32)
EPS = 1e-5


def randn(*shape, seed, scale=1.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def gradients(formula, operands, d_out, *rest):
    """Autograd's gradients of the formula with respect to every operand, in their dtype."""
    leaves = [t.detach().clone().requires_grad_() for t in operands]
    return torch.autograd.grad(formula(*leaves, *rest), leaves, d_out, materialize_grads=True)


def close(got, plain, exact):
    """bf16: no further from fp64 than PyTorch's bf16 times 1.25. fp32: to 1e-5 in the 2-norm, so a
    cosine above 0.9999 and the norm with it."""
    if plain.dtype == torch.float32:
        error = relative_error(got, exact)
        assert error < 1e-5, f"relative error {error:.3g}, allowed 1e-5"
    else:
        assert_as_exact(got, plain, exact)


def judge(got, formula, operands, d_out, *rest):
    """The gradient of the first operand against autograd's."""
    operands, d_out = [t.cpu() for t in operands], d_out.cpu()
    exact = gradients(formula, [t.double() for t in operands], d_out.double(), *rest)[0]
    close(got.cpu(), gradients(formula, operands, d_out, *rest)[0], exact)


def padded(w):
    """The same matrix with rows that lie further apart, and NaN between them."""
    apart = torch.full((w.shape[0], w.shape[1] + 16), float("nan"), dtype=w.dtype, device=w.device)
    apart[:, : w.shape[1]] = w
    return apart[:, : w.shape[1]]


# ---- rms ---------------------------------------------------------------------------------------
def rms(x):
    return reference.rms_norm(x, EPS)


def kept_by_forward(x):
    """y = rms(x), rounded, and the factor of each row, as the forward kernel keeps them."""
    wide = x.double()
    scale = torch.rsqrt(wide.square().mean(-1) + EPS)
    return (wide * scale[..., None]).to(x.dtype), scale.float().contiguous()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape, over_tokens", [((67, 96), False), ((2, 33, 64), True)])
def test_rms_backward(triton_device, shape, over_tokens, dtype):
    from recurx.kernels.rms_backward import rms_backward

    x, d_out = (randn(*shape, seed=s).to(triton_device, dtype) for s in (0, 1))
    if over_tokens:  # [B, T, D] seen as [B, D, T]
        x, d_out = x.transpose(1, 2), d_out.transpose(1, 2)
    y, scale = kept_by_forward(x)
    got = rms_backward(y, scale, d_out)
    assert got.stride() == d_out.stride()
    judge(got, rms, (x,), d_out)
    assert rms_backward(y, scale, d_out, out=d_out) is d_out and torch.equal(d_out, got)


# ---- data gradients ----------------------------------------------------------------------------
def residual_linear(x, w):
    return x + x @ w.T


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m, n, k", [(67, 96, 160), (5, 768, 32), (130, 384, 48)])
def test_dgrad(triton_device, m, n, k, dtype):
    from recurx.kernels.linear import dgrad

    w = randn(k, n, seed=0, scale=n**-0.5).to(triton_device, dtype)
    d_out = randn(m, k, seed=1).to(triton_device, dtype)
    judge(dgrad(d_out, w), lambda x, w: x @ w.T, (torch.zeros(m, n, dtype=dtype), w), d_out)
    residual = randn(m, n, seed=2).to(triton_device, dtype)
    exact = residual.double().cpu() + d_out.double().cpu() @ w.double().cpu()
    plain = residual.cpu() + d_out.cpu() @ w.cpu()
    assert_as_exact(dgrad(d_out, w, residual=residual), plain, exact, 1.5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dgrad_over_tokens_writes_through_strides(triton_device, dtype):
    from recurx.kernels.linear import dgrad

    w = padded(randn(64, 33, seed=0, scale=0.2).to(triton_device, dtype))  # [2F, T]
    d_out = randn(2, 48, 64, seed=1).to(triton_device, dtype)  # [B, D, 2F]
    residual = randn(2, 33, 48, seed=2).to(triton_device, dtype).transpose(1, 2)
    got = dgrad(d_out, w, residual=residual)
    assert got.stride() == residual.stride()
    exact = residual.double().cpu() + d_out.double().cpu() @ w.double().cpu()
    assert_as_exact(got, residual.cpu() + d_out.cpu() @ w.cpu(), exact, 1.5)


# ---- swiglu ------------------------------------------------------------------------------------
def swiglu(x, gate_up, down):
    return reference.swiglu(x, gate_up, down)


def mid_of(x, gate_up, down):
    gate, up = (x @ gate_up.T).chunk(2, dim=-1)
    return F.silu(gate) * up


def d_gate_up_of(x, gate_up, down, d_out):
    """Gradient of the gate-up product: that of an offset added to it."""

    def with_offset(offset):
        gate, up = (x @ gate_up.T + offset).chunk(2, dim=-1)
        return (F.silu(gate) * up) @ down.T

    offset = torch.zeros(*x.shape[:-1], gate_up.shape[0], dtype=x.dtype, requires_grad=True)
    return torch.autograd.grad(with_offset(offset), offset, d_out)[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m, n, f", [(67, 96, 80), (5, 384, 64), (2, 33, 48)])
def test_swiglu_backward(triton_device, m, n, f, dtype):
    from recurx.kernels.swiglu_backward import swiglu_backward

    over_tokens = n == 33
    shape = (m, n, 40) if over_tokens else (m, n)
    x, d_out = (randn(*shape, seed=s).to(triton_device, dtype) for s in (0, 1))
    if over_tokens:
        x, d_out = x.transpose(1, 2), d_out.transpose(1, 2)
    gate_up = randn(2 * f, n, seed=2, scale=n**-0.5).to(triton_device, dtype)
    down = randn(n, f, seed=3, scale=f**-0.5).to(triton_device, dtype)
    d_gate_up, mid = swiglu_backward(x, padded(gate_up), padded(down), d_out)
    operands = [t.cpu() for t in (x, gate_up, down, d_out)]
    wide = [t.double() for t in operands]
    assert_as_exact(mid, mid_of(*operands[:3]), mid_of(*wide[:3]))
    assert_as_exact(d_gate_up, d_gate_up_of(*operands), d_gate_up_of(*wide))


# ---- attention ---------------------------------------------------------------------------------
def attention_of_unrotated(qkv, cos_sin):
    q, k, v = qkv.chunk(3, dim=2)
    if cos_sin is not None:
        tables = [t.to(torch.promote_types(qkv.dtype, t.dtype)) for t in cos_sin]
        q, k = (reference.rope_rotate(part, *tables) for part in (q, k))
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def rotated(qkv, cos_sin):
    if cos_sin is None:
        return qkv
    q, k, v = qkv.chunk(3, dim=2)
    return torch.cat([*(reference.rope_rotate(part, *cos_sin) for part in (q, k)), v], dim=2)


def attention_problem(batch, tokens, heads, head_dim, dtype, device, rotate=True):
    from recurx.kernels.attention import attention

    qkv = randn(batch, tokens, 3 * heads, head_dim, seed=0).to(dtype)
    d_out = randn(batch, tokens, heads, head_dim, seed=1).to(dtype)
    tables = rope_tables(tokens, head_dim) if rotate else None
    turned = rotated(qkv, tables).contiguous().to(device)
    lse = torch.empty(batch, heads, tokens, device=device)
    out = attention(turned, lse=lse)
    on_device = tuple(t.to(device) for t in tables) if rotate else None
    return qkv, d_out, tables, (turned, out, lse, d_out.to(device), on_device)


# On an sm_90 one kernel up to T=128 (bf16; T=32 in fp32), on an sm_80 up to T=64; then two.
@pytest.mark.parametrize(
    "arch, dtype, batch, tokens, heads, head_dim, rotate",
    [
        (90, torch.bfloat16, 2, 97, 1, 64, True), (80, torch.bfloat16, 1, 97, 2, 64, True),
        (90, torch.bfloat16, 1, 150, 1, 32, True), (80, torch.bfloat16, 1, 16, 3, 32, True),
        (90, torch.bfloat16, 1, 70, 1, 128, True), (80, torch.bfloat16, 1, 33, 1, 128, True),
        (90, torch.bfloat16, 2, 1, 2, 64, True), (80, torch.float32, 2, 1, 1, 32, True),
        (80, torch.float32, 1, 40, 2, 64, True), (80, torch.float32, 1, 17, 1, 128, False),
    ],
)  # fmt: skip
def test_attention_backward(
    triton_device, monkeypatch, arch, dtype, batch, tokens, heads, head_dim, rotate
):
    from recurx.kernels import tiles
    from recurx.kernels.attention_backward import attention_backward

    if triton_device == "cpu":
        monkeypatch.setattr(tiles, "shared_bytes", lambda device: tiles.SHARED_BYTES[arch])

    qkv, d_out, tables, given = attention_problem(
        batch, tokens, heads, head_dim, dtype, triton_device, rotate
    )
    got = attention_backward(*given).cpu()
    exact = gradients(attention_of_unrotated, (qkv.double(),), d_out.double(), tables)[0]
    plain = gradients(attention_of_unrotated, (qkv,), d_out, tables)[0]
    if tokens == 1:  # one key: the scores have no gradient, rounding aside
        assert got[:, :, : 2 * heads].abs().max() < 1e-2
        got, plain, exact = (t[:, :, 2 * heads :] for t in (got, plain, exact))
    for part in range(0, got.shape[2], heads):  # d_q, d_k and d_v each
        close(*(t[:, :, part : part + heads] for t in (got, plain, exact)))


# ---- weight gradients --------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m, n, k", [(67, 96, 160), (1, 32, 48), (1300, 48, 32), (0, 32, 16)])
def test_wgrad_adds_up_over_calls(triton_device, m, n, k, dtype):
    from recurx.kernels.wgrad import new_partial, wgrad, wgrad_sum

    d_outs = [randn(m, n, seed=s).to(triton_device, dtype) for s in (0, 1)]
    xs = [randn(m, k, seed=s).to(triton_device, dtype) for s in (2, 3)]
    partial = new_partial(d_outs[0], xs[0])
    assert partial.shape[0] == (2 if m == 1300 else 1)
    partial.fill_(float("nan"))
    for call in range(2):
        wgrad(d_outs[call], xs[call], partial, add=call > 0)
    got = wgrad_sum(partial, torch.float32)
    assert got.dtype == torch.float32
    exact = sum(d.double().T @ x.double() for d, x in zip(d_outs, xs, strict=True)).cpu()
    plain = sum(d.float().T @ x.float() for d, x in zip(d_outs, xs, strict=True)).cpu()
    # bf16 operands, fp32 sums: an fp32 error, far below what a bf16 gradient would have.
    assert_as_exact(got, plain, exact, 4.0)
    again = new_partial(d_outs[0], xs[0])
    for call in range(2):
        wgrad(d_outs[call], xs[call], again, add=call > 0)
    assert torch.equal(partial, again)
    assert wgrad_sum(partial, torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_wgrad_through_strides(triton_device, dtype):
    from recurx.kernels.wgrad import new_partial, wgrad, wgrad_sum

    d_out = randn(2, 48, 64, seed=0).to(triton_device, dtype)
    x = randn(2, 33, 48, seed=1).to(triton_device, dtype).transpose(1, 2)
    for a, b in ((d_out, x), (x, d_out)):
        partial = new_partial(a, b)
        wgrad(a, b, partial, add=False)
        exact = a.double().cpu().flatten(0, 1).T @ b.double().cpu().flatten(0, 1)
        plain = a.float().cpu().flatten(0, 1).T @ b.float().cpu().flatten(0, 1)
        assert_as_exact(wgrad_sum(partial, torch.float32), plain, exact, 4.0)


# ---- planted bugs: what the criteria above must reject ------------------------------------------
def d_heads_without_rope_backward(got, tables):
    """Rotate forward again what the kernel rotated back."""
    return rotated(got, tables)


def swap_thirds(got, first, second):
    parts = list(got.chunk(3, dim=2))
    parts[first], parts[second] = parts[second], parts[first]
    return torch.cat(parts, dim=2)


ATTENTION_BUGS = {
    "rope backward dropped": d_heads_without_rope_backward,
    "d_k and d_v swapped": lambda got, tables: swap_thirds(got, 1, 2),
    "scale of d_q dropped": lambda got, tables: torch.cat([got[:, :, :2] * 8, got[:, :, 2:]], 2),
    "last token masked": lambda got, tables: torch.cat([got[:, :-1], 0 * got[:, -1:]], 1),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bug", ATTENTION_BUGS)
def test_attention_bugs_are_rejected(bug, dtype):
    qkv, tables = randn(2, 33, 6, 64, seed=0).to(dtype), rope_tables(33, 64)
    d_out = randn(2, 33, 2, 64, seed=1).to(dtype)
    exact = gradients(attention_of_unrotated, (qkv.double(),), d_out.double(), tables)[0]
    plain = gradients(attention_of_unrotated, (qkv,), d_out, tables)[0]
    close(plain, plain, exact)
    with pytest.raises(AssertionError, match="relative error"):
        close(ATTENTION_BUGS[bug](plain, tables), plain, exact)


def without(tensor, dim, count):
    """The tensor with its last `count` entries along `dim` set to zero: a mask that is short."""
    kept = tensor.clone()
    kept.narrow(dim, tensor.shape[dim] - count, count).zero_()
    return kept


PRODUCT_BUGS = {
    "gate and up swapped": lambda x, gu, down, d: d_gate_up_of(x, gu, down, d).roll(80, -1),
    "silu' without its second term": lambda x, gu, down, d: (
        d_gate_up_of(x, gu, down, d) * (1 + 0.05 * (torch.arange(160) < 80)).to(x.dtype)
    ),
    "last row masked": lambda x, gu, down, d: without(d_gate_up_of(x, gu, down, d), 0, 1),
    "last slab of the sum dropped": lambda x, gu, down, d: d_gate_up_of(
        x, gu, down, without(d, 1, 16)
    ),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bug", PRODUCT_BUGS)
def test_swiglu_bugs_are_rejected(bug, dtype):
    x, d_out = (randn(33, 96, seed=s).to(dtype) for s in (0, 1))
    gate_up = randn(160, 96, seed=2, scale=0.1).to(dtype)
    down = randn(96, 80, seed=3, scale=0.1).to(dtype)
    exact = d_gate_up_of(*(t.double() for t in (x, gate_up, down, d_out)))
    plain = d_gate_up_of(x, gate_up, down, d_out)
    close(plain, plain, exact)
    with pytest.raises(AssertionError, match="relative error"):
        close(PRODUCT_BUGS[bug](x, gate_up, down, d_out), plain, exact)


RMS_BUGS = {
    "residual path missing": lambda y, s, d, r: reference_rms(y, s, d - r),
    "projection missing": lambda y, s, d, r: s * d,
    "mean over the padded width": lambda y, s, d, r: s * (d - y * (d * y).sum(-1, True) / 128),
}


def reference_rms(y, scale, d):
    return scale * (d - y * (d * y).mean(-1, keepdim=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bug", RMS_BUGS)
def test_rms_bugs_are_rejected(bug, dtype):
    x, residual, rest = (randn(33, 96, seed=s).to(dtype) for s in (0, 1, 2))
    d = residual + rest
    y, scale = kept_by_forward(x)
    y, scale = y.float(), scale[:, None]
    exact = gradients(rms, (x.double(),), d.double())[0]
    plain = gradients(rms, (x,), d)[0]
    close(reference_rms(y, scale, d.float()).to(dtype), plain, exact)
    with pytest.raises(AssertionError, match="relative error"):
        close(RMS_BUGS[bug](y, scale, d.float(), residual.float()).to(dtype), plain, exact)


def test_a_missing_split_of_a_weight_gradient_is_rejected(triton_device):
    from recurx.kernels.wgrad import new_partial, wgrad, wgrad_sum

    d_out, x = (randn(1300, n, seed=n).to(triton_device) for n in (48, 32))
    partial = new_partial(d_out, x)
    wgrad(d_out, x, partial, add=False)
    exact = (d_out.double().T @ x.double()).cpu()
    assert relative_error(wgrad_sum(partial, torch.float32), exact) < 1e-6
    assert relative_error(wgrad_sum(partial[:1], torch.float32), exact) > 0.1
