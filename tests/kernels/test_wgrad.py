"""Weight gradients at the edges of steps, samples, tiles and ranges, and how a device is filled."""

from __future__ import annotations

import math

import pytest
import torch
from compare import assert_as_exact
from mutants import planted
from recurx.kernels import backward_tiles, tiles

DTYPES = (torch.bfloat16, torch.float32)


def randn(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def over_tokens(batch, rows, columns, seed, dtype, device):
    """[batch, rows, columns] whose neighbours in memory are rows, as a token-MLP has them; behind
    it lie large numbers, which a lost mask would add."""
    flat = torch.full((batch * columns * rows + 4096,), 1e4)
    flat[: batch * columns * rows] = randn(batch * columns * rows, seed=seed)
    flat = flat.to(device, dtype)
    return flat[: batch * columns * rows].view(batch, columns, rows).transpose(1, 2)


def rows_apart(batch, rows, columns, seed, dtype, device):
    """The same shape as part of wider rows of longer samples, with large numbers around."""
    whole = torch.full((batch, rows + 3, columns + 5), 1e4)
    whole[:, :rows, :columns] = randn(batch, rows, columns, seed=seed)
    return whole.to(device, dtype)[:, :rows, :columns]


def contiguous(batch, rows, columns, seed, dtype, device):
    """What counts as one sample of batch * rows rows; large numbers behind."""
    flat = torch.full((batch * rows * columns + 8192,), 1e4)
    flat[: batch * rows * columns] = randn(batch * rows * columns, seed=seed)
    return flat.to(device, dtype)[: batch * rows * columns].view(batch, rows, columns)


LAYOUTS = (
    (over_tokens, over_tokens), (over_tokens, contiguous), (contiguous, over_tokens),
    (rows_apart, rows_apart), (contiguous, rows_apart), (contiguous, contiguous),
)  # fmt: skip
# batch, rows, N, K and ranges: a step across the end of a sample, a range that ends inside one,
# the last range empty (4 steps in 3 ranges), no rows, a sample of one row, tiles not full.
SHAPES = (
    (3, 200, 40, 33, 2), (2, 100, 130, 16, 3), (1, 250, 16, 140, 1), (5, 1, 17, 16, 2),
    (0, 7, 16, 16, 2), (2, 128, 32, 48, 3),
)  # fmt: skip


def gradient(wgrad, d_out, x, split):
    partial = torch.full((split, d_out.shape[-1], x.shape[-1]), float("nan"), device=x.device)
    wgrad(d_out, x, partial, add=False)
    wgrad(d_out, x, partial, add=True)
    return partial


def judge(partial, d_out, x):
    d_out, x = (t.cpu().flatten(0, 1) for t in (d_out, x))
    plain = 2 * (d_out.float().T @ x.float())
    assert_as_exact(partial.sum(0), plain, 2 * (d_out.double().T @ x.double()), 4.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("d_layout, x_layout", LAYOUTS)
def test_edges(triton_device, d_layout, x_layout, shape, dtype):
    from recurx.kernels.wgrad import wgrad

    batch, rows, n, k, split = shape
    d_out = d_layout(batch, rows, n, 0, dtype, triton_device)
    x = x_layout(batch, rows, k, 1, dtype, triton_device)
    partial = gradient(wgrad, d_out, x, split)
    judge(partial, d_out, x)
    assert torch.equal(partial, gradient(wgrad, d_out, x, split))


def test_samples_that_lie_together_are_one(triton_device):
    """[B, R, N] without gaps has the bits of [B * R, N]: no step is left half empty."""
    from recurx.kernels.wgrad import launch_arguments, wgrad

    d_out, x = (contiguous(3, 97, n, n, torch.bfloat16, triton_device) for n in (48, 32))
    flat = [t.reshape(1, 3 * 97, -1) for t in (d_out, x)]
    assert torch.equal(gradient(wgrad, d_out, x, 2), gradient(wgrad, *flat, 2))
    partial = torch.empty(2, 48, 32, device=triton_device)
    args, constants, _ = launch_arguments(d_out, x, partial, False, 1 << 17)
    assert constants["FLAT"] and args[3:5] == (1, 291)


MUTANTS = {
    "samples all read the first": ("sample.to(tl.int64) * d_batch", "sample.to(tl.int64) * 0"),
    "mask of a sample's last step": ("< R - first) | EVEN", "< R - first) | True"),
    "last step of a range": ("(part + 1) * span)", "(part + 1) * span - 1)"),
    "range starts at the first step": ("range(part * span,", "range(0,"),
}


@pytest.mark.parametrize("bug", MUTANTS)
def test_bugs_are_rejected(triton_device, bug, tmp_path):
    mutant = planted("wgrad", *MUTANTS[bug], tmp_path)
    d_out = over_tokens(3, 200, 40, 0, torch.bfloat16, triton_device)
    x = over_tokens(3, 200, 33, 1, torch.bfloat16, triton_device)
    with pytest.raises(AssertionError, match="relative error"):
        judge(gradient(mutant.wgrad, d_out, x, 2), d_out, x)


def test_the_published_shapes_fill_the_waves():
    """TRM-att at B=768 in bf16: qkv, o, gate-up, down; SMs of an H100, A100, H100 PCIe, 5090."""
    for units, shared in ((132, 232448), (108, 166912), (114, 232448), (170, 101376)):
        for n, k in ((1536, 512), (512, 512), (3072, 512), (512, 1536)):
            m = 768 * 97
            tile = backward_tiles.wgrad_tile(m, n, k, 2, shared)
            split = backward_tiles.wgrad_split(m, n, k, tile, units)
            programs = math.ceil(n / tile.rows) * math.ceil(k / tile.cols) * split
            busy = programs / (math.ceil(programs / units) * units)
            assert busy >= 0.9, f"{n} x {k} on {units}: {programs} programs, {busy:.2f} busy"
            assert split * n * k * 4 <= backward_tiles.WGRAD_BYTES


def test_a_split_is_asked_of_the_device(monkeypatch):
    from recurx.kernels.wgrad import new_partial

    d_out, x = torch.empty(6000, 512, device="meta"), torch.empty(6000, 512, device="meta")
    splits = []
    for units in (64, 128, 320):
        monkeypatch.setattr(tiles, "multiprocessors", lambda device, units=units: units)
        splits.append(new_partial(d_out, x).shape[0])
    assert splits == [1, 2, 5]
