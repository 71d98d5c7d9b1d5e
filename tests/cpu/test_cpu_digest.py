"""The hash by which the CPU engine knows weights: of every bit, whatever the layout."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from recurx.backends import cpu

PUBLISHED = ((1536, 512), (512, 512), (3072, 512), (512, 1536))
ODD, SPREAD, MASK = 0x9FB21C651E98DF25, 0x9E3779B97F4A7C15, 2**64 - 1


def weights(*shapes: tuple[int, int], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator) for shape in shapes]


LAYOUTS = {
    "contiguous": lambda w: w.clone(),
    "transposed": lambda w: w.t().contiguous().t(),
    "rows of a wider one": lambda w: torch.cat([w, w], dim=1)[:, : w.shape[1]],
    "every second row": lambda w: w.repeat_interleave(2, 0)[::2],
    "every second element": lambda w: w.repeat_interleave(2, 1)[:, ::2],
    "in the middle": lambda w: torch.cat([torch.ones(7), w.flatten()])[7:].view(w.shape),
}


def sampled(some: list[Tensor]) -> int:
    """What the engine did before: 256 elements of each contiguous weight, and no others."""
    found = []
    for weight in some:
        if weight.is_contiguous():
            flat = weight.flatten()
            found += flat[:: flat.numel() // 256 + 1].tolist()
    return hash(tuple(found))


def unseen(some: list[Tensor], digest, step: int) -> list[tuple[int, int]]:
    """(weight, element) of which a changed bit leaves the digest as it was: each `step`-th, the
    first and the last."""
    before, missed = digest(some), []
    picks = np.random.default_rng(0)
    for number, weight in enumerate(some):
        count = weight.numel()
        for element in {*range(0, count, step), count - 1}:
            row, column = divmod(element, weight.shape[1])
            word = weight.data[row : row + 1, column : column + 1].view(torch.int32)
            bit = int(picks.integers(32))
            flip = 1 << bit if bit < 31 else -(2**31)
            word ^= flip
            if digest(some) == before:
                missed.append((number, element))
            word ^= flip
    assert digest(some) == before, "every bit is back"
    return missed


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_bit_of_any_element_changes_it(native: cpu.Cpu, layout: str) -> None:
    some = [LAYOUTS[layout](w) for w in weights((96, 64), (64, 64), (7, 515))]
    assert unseen(some, native._digest, 37) == []


def test_any_bit_of_a_published_net_changes_it(native: cpu.Cpu) -> None:
    assert unseen(weights(*PUBLISHED), native._digest, 1000) == []


def test_the_sample_of_before_fails_these(native: cpu.Cpu) -> None:
    assert len(unseen(weights(*PUBLISHED[:1]), sampled, 1000)) > 700
    assert len(unseen([LAYOUTS["transposed"](weights((96, 64))[0])], sampled, 37)) == 168


def test_structured_edits_change_it(native: cpu.Cpu) -> None:
    """What a weak hash cancels: signs, exchanged and repeated parts, values that move."""
    (w,) = weights((512, 256))
    edits = {
        "as it is": w,
        "negated": -w,
        "two signs": w * torch.where(torch.arange(256) < 2, -1.0, 1.0),
        "signs of a stripe apart": w * torch.where(torch.arange(256) % 128 == 0, -1.0, 1.0),
        "rows exchanged": w.roll(1, 0),
        "halves exchanged": w.roll(256, 0),
        "pieces exchanged": w.roll(128, 0),
        "columns exchanged": w.flip(1),
        "zero": w * 0,
        "a row twice": torch.cat([w[:1], w[:-1]]),
        "rounded": w.bfloat16().float(),
        **{f"scaled by {s}": w * s for s in (0.5, 2, 4, 1 + 2**-23)},
        **{f"head {k} pruned": w * (torch.arange(512)[:, None] // 64 != k) for k in range(8)},
    }
    found = {name: native._digest([edit.contiguous()]) for name, edit in edits.items()}
    assert len(set(found.values())) == len(found)
    two = weights((64, 64), (64, 64))
    assert native._digest(two) != native._digest(two[::-1])
    assert native._digest(two) != native._digest(two[:1])


def test_it_is_the_same_for_any_number_of_threads(native: cpu.Cpu) -> None:
    some = weights(*PUBLISHED)
    rows = [cpu._rows(w, []) for w in some]
    engine = native._engine()
    assert len({engine.cpu_digest(rows, threads) for threads in (1, 2, 3, 8, 10**6)}) == 1


def mixed(h: int) -> int:
    h = (h ^ h >> 32) * ODD & MASK
    h = (h ^ h >> 29) * SPREAD & MASK
    return h ^ h >> 32


def mirror(data: bytes) -> int:
    """csrc/cpu/hash.hpp of one piece, in numpy."""

    def absorb(state, words):
        state = state ^ words
        return (state << np.uint64(29) | state >> np.uint64(35)) * np.uint64(ODD)

    state = (np.arange(1, 65, dtype=np.uint64) * np.uint64(SPREAD)).reshape(8, 8)
    padded = data + bytes(-len(data) % 512)
    for stripe in np.frombuffer(padded, np.uint64).reshape(-1, 8, 8):
        state = absorb(state, stripe)
    first = state[0]
    for chain in state[1:]:
        first = absorb(first, chain)
    h = len(data)
    for lane in first.tolist():
        h = mixed(h ^ lane)
    return mixed(1 ^ h)  # one tensor of one piece


@pytest.mark.parametrize("size", [1, 8, 511, 512, 513, 4096, 100_003])
def test_it_is_the_written_one(native: cpu.Cpu, size: int) -> None:
    data = np.random.default_rng(size).integers(0, 256, size, dtype=np.uint8)
    rows = [(data.ctypes.data, 1, size, 0)]
    assert native._engine().cpu_digest(rows, 1) == mirror(data.tobytes())
