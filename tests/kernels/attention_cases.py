"""Attention with fields of blocks: the kernels' gradient, and PyTorch's."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from recurx import reference
from recurx.nets import rope_tables

FIELDS = {  # as `recurx.kernels.attention.Heads`; and whether there is a gate
    "grouped, causal window": (dict(kv_heads=2, causal=True, window=30), False),
    "norm, prefix, gate": (dict(kv_heads=4, causal=True, prefix=20, norm="rms", eps=1e-5), True),
    "grouped, layer norm, gate": (dict(kv_heads=1, window=50, norm="layer", eps=1e-5), True),
    "grouped, padding, gate": (dict(kv_heads=2, causal=True), True),
}
HEADS, HEAD_DIM = 4, 32


def randn(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def normed(qkv, norm="", kv_heads=HEADS, q_norm=None, k_norm=None, **_):
    """Q and K after their norms, as a kernel rounds them, V as it is."""
    if not norm:
        return qkv
    parts = list(qkv.split((HEADS, kv_heads, kv_heads), dim=2))
    for number, weight in enumerate((q_norm, k_norm)):
        wide = parts[number].double()
        wide = wide - wide.mean(-1, keepdim=True) if norm == "layer" else wide
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5) * weight.double()
        parts[number] = wide.to(qkv.dtype)
    return torch.cat(parts, dim=2)


def padding_of(name, tokens):
    """Every fifth key is padding, and so many of the first that their own rows see none."""
    if "padding" not in name:
        return None
    return (torch.arange(tokens) % 5 == 0) | (torch.arange(tokens) < 20)


def attend(qkv, gate, tables, padding, kv_heads=HEADS, causal=False, prefix=0, window=0, **_):
    """Of Q and K that are normed."""
    q, k, v = qkv.split((HEADS, kv_heads, kv_heads), dim=2)
    tables = [t.to(torch.promote_types(qkv.dtype, t.dtype)) for t in tables]
    q, k = (reference.rope_rotate(part, *tables) for part in (q, k))
    k, v = (t.repeat_interleave(HEADS // kv_heads, dim=2) for t in (k, v))
    i, j = torch.arange(q.shape[1])[:, None], torch.arange(q.shape[1])
    sees = (j <= i) | (j < prefix) if causal else (i >= 0) & (j >= 0)
    sees = sees & ((i - j).abs() < window) if window else sees
    sees = sees if padding is None else sees & ~padding
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=sees).transpose(1, 2)
    return mixed if gate is None else torch.sigmoid(gate).view_as(mixed) * mixed


def case(name, dtype, tokens):
    """Two functions: the kernels' gradient, by `attention_backward`, and PyTorch's, in a dtype."""
    from recurx.kernels.attention import Heads, attention

    fields, opens = FIELDS[name]
    kv = fields["kv_heads"]
    qkv = randn(1, tokens, HEADS + 2 * kv, HEAD_DIM, seed=0).to(dtype)
    d_out = randn(1, tokens, HEADS, HEAD_DIM, seed=1).to(dtype)
    gate = randn(1, tokens, HEADS * HEAD_DIM, seed=2).to(dtype) if opens else None
    if "norm" in fields:
        fields = {**fields, "q_norm": 1 + randn(HEAD_DIM, seed=3) / 4}
        fields["k_norm"] = 1 + randn(HEAD_DIM, seed=4) / 4
    tables, padding = rope_tables(tokens, HEAD_DIM), padding_of(name, tokens)

    def gradient(to):
        leaf = normed(qkv, **fields).to(to).requires_grad_()
        out = attend(leaf, None if gate is None else gate.to(to), tables, padding, **fields)
        return torch.autograd.grad(out, leaf, d_out.to(to))[0]

    def run(backward, device="cpu"):
        given, table, gates, d = (
            t if t is None else t.to(device) for t in (qkv, torch.stack(tables), gate, d_out)
        )
        heads = Heads(**{n: f.to(device) if torch.is_tensor(f) else f for n, f in fields.items()})
        lse = torch.empty(1, HEADS, tokens, device=device)
        how = dict(heads=heads, gate=gates)
        if padding is not None:
            how["unseen"] = padding[None].to(device)
        out = attention(given, cos_sin=tuple(table), lse=lse, **how)
        return backward(given, out, lse, d, tuple(table), rotated=False, **how).cpu()

    return run, gradient
