"""Attention that rotates Q and K as it loads them, forward and backward; one step and many."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from compare import assert_as_exact, relative_error
from mutants import planted
from recurx.kernels import tiles

from recurx import reference
from recurx.errors import InvalidArgument
from recurx.nets import rope_tables

DTYPES = (torch.bfloat16, torch.float32)
# batch, tokens, heads, head_dim: one pass with and without a mask, a step and a rest, whole steps
SHAPES = ((2, 97, 2, 64), (1, 16, 3, 32), (2, 1, 2, 64), (1, 65, 1, 128), (1, 200, 1, 64),
          (1, 192, 1, 32), (1, 128, 1, 64))  # fmt: skip


def randn(*shape, seed, scale=1.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def rotated(qkv, tables):
    if tables is None:
        return qkv
    q, k, v = qkv.chunk(3, dim=2)
    tables = [t.to(torch.promote_types(qkv.dtype, t.dtype)) for t in tables]
    return torch.cat([*(reference.rope_rotate(part, *tables) for part in (q, k)), v], dim=2)


def plain(qkv, tables):
    q, k, v = (part.transpose(1, 2) for part in rotated(qkv, tables).chunk(3, dim=2))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def judge(got, qkv, tables):
    qkv = qkv.cpu()
    assert_as_exact(got, plain(qkv, tables), plain(qkv.double(), tables))


def problem(batch, tokens, heads, head_dim, dtype, device):
    qkv = randn(batch, tokens, 3 * heads, head_dim, seed=0).to(dtype)
    tables = rope_tables(tokens, head_dim)
    return qkv.to(device), tables, tuple(t.to(device) for t in tables)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rotation_on_load(triton_device, shape, dtype):
    from recurx.kernels.attention import attention

    qkv, tables, on_device = problem(*shape, dtype, triton_device)
    lse = torch.empty(shape[0], shape[2], shape[1], device=triton_device)
    got = attention(qkv, cos_sin=on_device, lse=lse)
    judge(got, qkv, tables)
    turned = rotated(qkv.cpu(), tables).to(triton_device)
    same = attention(turned)
    # What is loaded has one rounding, the one that a rotated qkv in memory has; on a GPU a
    # multiply-add may round a few of them the other way.
    if triton_device == "cpu":
        assert torch.equal(got, same)
    assert_as_exact(got, same.cpu(), plain(turned.cpu().double(), None), 1.05)
    q, k, _ = (part.transpose(1, 2).double().cpu() for part in turned.chunk(3, dim=2))
    want = torch.logsumexp(q @ k.mT / shape[3] ** 0.5, -1) / math.log(2)
    torch.testing.assert_close(lse.double().cpu(), want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", [0, 40])
def test_keys_that_nobody_sees(triton_device, window, dtype):
    """In steps: none of the first keys, all, none at all; with a window rows see none of some."""
    from recurx.kernels.attention import Heads, attention

    qkv = randn(3, 200, 3, 64, seed=0).to(dtype)
    unseen = torch.arange(200) < torch.tensor([150, 0, 200])[:, None]
    heads = Heads(kv_heads=1, window=window)
    got = attention(qkv.to(triton_device), heads=heads, unseen=unseen.to(triton_device)).cpu()
    places = torch.arange(200)
    near = (places[:, None] - places).abs() < (window or 200)
    sees = (near & ~unseen[:, None])[:, None]
    exact, plain = (
        F.scaled_dot_product_attention(*parts.transpose(1, 2).chunk(3, dim=1), attn_mask=sees)
        for parts in (qkv.double(), qkv)
    )
    some = sees.any(-1, keepdim=True)
    assert not got[~some[:, 0, :, 0]].any() and some.any() and not some.all()
    exact, plain = (torch.where(some, t, 0).transpose(1, 2) for t in (exact, plain))
    assert_as_exact(got, plain, exact)


@pytest.mark.parametrize("tokens", [97, 130])
def test_large_scores(triton_device, tokens):
    """Scores far beyond what exp can take."""
    from recurx.kernels.attention import attention

    qkv = 30 * randn(1, tokens, 3, 64, seed=3).to(triton_device)
    judge(attention(qkv), qkv, None)


# ---- backward ----------------------------------------------------------------------------------
def gradient(qkv, tables, d_out):
    leaf = qkv.detach().clone().requires_grad_()
    return torch.autograd.grad(plain(leaf, tables), leaf, d_out)[0]


def backward_problem(batch, tokens, heads, head_dim, dtype, device):
    from recurx.kernels.attention import attention

    qkv, tables, on_device = problem(batch, tokens, heads, head_dim, dtype, device)
    d_out = randn(batch, tokens, heads, head_dim, seed=1).to(device, dtype)
    lse = torch.empty(batch, heads, tokens, device=device)
    out = attention(qkv, cos_sin=on_device, lse=lse)
    return tables, (qkv, out, lse, d_out, on_device)


def judge_backward(got, qkv, tables, d_out):
    heads = d_out.shape[2]
    exact = gradient(qkv.double(), tables, d_out.double())
    results = got.cpu(), gradient(qkv, tables, d_out), exact
    for part in range(0, 3 * heads, heads):  # d_q, d_k and d_v each
        parts = [t[:, :, part : part + heads] for t in results]
        assert_as_exact(*parts, 1.25 if qkv.dtype == torch.bfloat16 else 4.0)


BACKWARD = (
    (90, torch.bfloat16, (2, 97, 1, 64)), (80, torch.bfloat16, (1, 97, 2, 64)),
    (90, torch.bfloat16, (1, 200, 1, 32)), (80, torch.bfloat16, (1, 16, 3, 32)),
    (90, torch.bfloat16, (1, 128, 1, 64)), (80, torch.bfloat16, (1, 70, 1, 128)),
    (80, torch.float32, (1, 40, 2, 64)), (80, torch.float32, (1, 17, 1, 128)),
)  # fmt: skip


@pytest.mark.parametrize("arch, dtype, shape", BACKWARD, ids=str)
def test_backward_of_rotation_on_load(triton_device, monkeypatch, arch, dtype, shape):
    from recurx.kernels.attention_backward import attention_backward

    if triton_device == "cpu":
        monkeypatch.setattr(tiles, "shared_bytes", lambda device: tiles.SHARED_BYTES[arch])
    tables, given = backward_problem(*shape, dtype, triton_device)
    got = attention_backward(*given, rotated=False)
    judge_backward(got, given[0].cpu(), tables, given[3].cpu())
    turned = rotated(given[0].cpu(), tables).contiguous().to(triton_device)
    if triton_device == "cpu":
        assert torch.equal(got, attention_backward(turned, *given[1:], rotated=True))


# ---- planted bugs ------------------------------------------------------------------------------
FORWARD_BUGS = {
    "rotation dropped": ("    if ROTATE:\n", "    if False:\n"),
    "sign flipped": ("low * cos_low - high * sin_low", "low * cos_low + high * sin_low"),
    "offset of a tile ignored": ("load_rows(sin, tokens,", "load_rows(sin, tokens % 64,"),
    "halves of the tables swapped": ("(cos + HALF, tokens, j", "(cos, tokens ^ 1, j"),
    "last step without a mask": ("            if part == 1:\n", "            if False:\n"),
    "a step lost": ("range(part * (T", "range(COLS * (1 - part * PEEL) + part * (T"),
    "sum not rescaled": ("total * rescale +", "total +"),
    "mix not rescaled": ("acc * rescale[:, None]", "acc"),
    "scale of another head_dim": ('"SCALE": math', '"SCALE": 2**-0.5 * math'),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bug", FORWARD_BUGS)
def test_forward_bugs_are_rejected(triton_device, bug, dtype, tmp_path):
    mutant = planted("attention", *FORWARD_BUGS[bug], tmp_path)
    qkv, tables, on_device = problem(1, 150, 1, 64, dtype, triton_device)
    with pytest.raises(AssertionError, match="relative error"):
        judge(mutant.attention(qkv, cos_sin=on_device), qkv, tables)


BACKWARD_BUGS = {
    "queries not rotated": ("rows, stride, T, HALF, TURN, part", "rows, stride, T, HALF, 0, part"),
    "keys not rotated": ("keys, stride, T, HALF, TURN, T %", "keys, stride, T, HALF, 0, T %"),
    "gradient not rotated back": ('"ROTATE": cos_sin is not None', '"ROTATE": False'),
    "rotated twice": ('"TURN": turn', '"TURN": False'),
    "a step lost": ("range(part * (T - REST)", "range(32 + part * (T - REST - 32)"),
}


@pytest.mark.parametrize("tokens", [97, 150])
@pytest.mark.parametrize("bug", BACKWARD_BUGS)
def test_backward_bugs_are_rejected(triton_device, monkeypatch, bug, tokens, tmp_path):
    if triton_device == "cpu":
        monkeypatch.setattr(tiles, "shared_bytes", lambda device: tiles.SHARED_BYTES[90])
    mutant = planted("attention_backward", *BACKWARD_BUGS[bug], tmp_path)
    tables, given = backward_problem(1, tokens, 1, 64, torch.bfloat16, triton_device)
    with pytest.raises(AssertionError, match="relative error"):
        got = mutant.attention_backward(*given, rotated=False)
        judge_backward(got, given[0].cpu(), tables, given[3].cpu())


def test_an_unmasked_key_is_infinite(triton_device, monkeypatch, tmp_path):
    """Keys beyond T score 0; with a row whose scores are all far below that, p would be inf."""
    from recurx.kernels.attention import attention
    from recurx.kernels.attention_backward import attention_backward

    if triton_device == "cpu":
        monkeypatch.setattr(tiles, "shared_bytes", lambda device: tiles.SHARED_BYTES[90])
    bug = ("p = tl.where(keys", "p = p + 0 * tl.where(keys")
    mutant = planted("attention_backward", *bug, tmp_path)
    for tokens in (97, 150):
        qkv = torch.ones(1, tokens, 3, 64).mul_(8.0)
        qkv[:, :, 1] *= -8.0  # every score is -4096 before its scale
        qkv = (qkv + 0.01 * randn(1, tokens, 3, 64, seed=5)).to(triton_device, torch.bfloat16)
        lse = torch.empty(1, 1, tokens, device=triton_device)
        out = attention(qkv, lse=lse)
        given = (qkv, out, lse, torch.ones_like(out), None)
        assert torch.isfinite(attention_backward(*given)).all()
        assert not torch.isfinite(mutant.attention_backward(*given)).all()


def test_bad_tables_are_named(triton_device):
    from recurx.kernels.attention import attention

    qkv = torch.zeros(1, 4, 3, 32, device=triton_device)
    tables = [torch.zeros(4, 32, device=triton_device) for _ in range(2)]
    for bad in (tables[1][:3], tables[1].double(), torch.zeros(32, 4, device=triton_device).mT):
        with pytest.raises(InvalidArgument, match="`sin`"):
            attention(qkv, cos_sin=(tables[0], bad))
    assert relative_error(attention(qkv + 1, cos_sin=tuple(tables)), torch.ones(1, 4, 1, 32)) == 0
