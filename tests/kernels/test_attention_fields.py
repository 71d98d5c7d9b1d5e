"""The backward of attention with fields of blocks, at lengths that take one kernel and two."""

from __future__ import annotations

import pytest
import torch
from mutants import planted
from recurx.kernels import tiles

from tests.kernels.attention_cases import FIELDS, HEADS, case
from tests.kernels.compare import assert_as_exact

BF16, FP32 = torch.bfloat16, torch.float32
# fp32 takes one kernel up to T=32, bf16 up to 128 on an sm_90 and 64 on an sm_80.
SHAPES = ((90, BF16, 97), (80, BF16, 97), (90, BF16, 150), (80, FP32, 25), (80, FP32, 40))


def judge(got, gradient, name):
    results, kv = (got, gradient(got.dtype), gradient(torch.float64)), FIELDS[name][0]["kv_heads"]
    for first, count in ((0, HEADS), (HEADS, kv), (HEADS + kv, kv)):  # d_q, d_k and d_v each
        parts = [t[:, :, first : first + count] for t in results]
        assert_as_exact(*parts, 1.25 if got.dtype == BF16 else 4.0)


@pytest.mark.parametrize("arch, dtype, tokens", SHAPES, ids=str)
@pytest.mark.parametrize("name", FIELDS)
def test_backward(triton_device, monkeypatch, name, arch, dtype, tokens):
    from recurx.kernels.attention_backward import attention_backward

    if triton_device == "cpu":
        monkeypatch.setattr(tiles, "shared_bytes", lambda device: tiles.SHARED_BYTES[arch])
    run, gradient = case(name, dtype, tokens)
    judge(run(attention_backward, triton_device), gradient, name)


BUGS = {
    "mask of the queries": ("p = tl.where(seen(", "p = tl.where((p >= 0) | seen(", 150,
                            "grouped, causal window"),
    "mask of the keys": ("tl.where(tl.trans(seen(", "tl.where((p >= 0) | tl.trans(seen(", 150,
                         "grouped, causal window"),
    "norm of the queries' keys": ("part == 0, NORM, EPS, k_norm", 'part == 0, "", EPS, k_norm', 150,
                                  "norm, prefix, gate"),
    "gate of the queries": ("_through_gate(d_mixed, gate + o_at, rows, e, o_stride, T)", "d_mixed",
                            150, "norm, prefix, gate"),
    "padding of the queries' keys": ("p = tl.where(padding[None, :] == 0", "p = tl.where(p >= 0",
                                     150, "grouped, padding, gate"),
    "padding of the keys": ("p = tl.where(padding[:, None] == 0", "p = tl.where(p >= 0", 150,
                            "grouped, padding, gate"),
    "heads that share a key are not added": ("d.unflatten(2, groups).sum(3)",
                                             "d.unflatten(2, groups)[:, :, :, 0]", 97,
                                             "grouped, causal window"),
    "K of another head": ("k_g = qkv + batch * T * stride + (H + head // (H // KV))",
                          "k_g = qkv + batch * T * stride + (H + head % KV)", 97,
                          "grouped, causal window"),
}  # fmt: skip


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bugs_are_rejected(triton_device, monkeypatch, bug, tmp_path):
    if triton_device == "cpu":
        monkeypatch.setattr(tiles, "shared_bytes", lambda device: tiles.SHARED_BYTES[90])
    old, new, tokens, name = BUGS[bug]
    mutant = planted("attention_backward", old, new, tmp_path)
    run, gradient = case(name, BF16, tokens)
    with pytest.raises(AssertionError, match="relative error"):
        judge(run(mutant.attention_backward, triton_device), gradient, name)
