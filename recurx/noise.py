"""Normal noise from a counter: the same for the same seed, entry, step and element, on any device.

Philox 4x32 with 10 rounds (Salmon et al. 2011), then Box-Muller; csrc/cuda/rx/random.cuh is the
same formula inside the CUDA engine. So a rollout can be repeated alone, in another batch or by
another backend.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_LOW = 0xFFFFFFFF  # words are kept in int64: products of two may wrap, their 64 bits are right
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def philox(counter: list[Tensor], seed: int) -> list[Tensor]:
    """Four random words in [0, 2^32) for each counter of four words (int64 tensors)."""
    a, b, c, d = counter
    key0, key1 = seed & _LOW, seed >> 32 & _LOW
    for _ in range(10):
        first, second = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]
        a, b, c, d = (
            (second >> 32 & _LOW) ^ b ^ key0,
            second & _LOW,
            (first >> 32 & _LOW) ^ d ^ key1,
            first & _LOW,
        )
        key0, key1 = key0 + _WEYL[0] & _LOW, key1 + _WEYL[1] & _LOW
    return [a, b, c, d]


def _box_muller(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    u = ((a >> 8).float() + 0.5) * 2.0**-24
    angle = (b >> 8).double() * (2 * math.pi * 2.0**-24)
    radius = torch.sqrt(-2.0 * torch.log(u))
    return radius * angle.cos().float(), radius * angle.sin().float()


def normals(entries: Tensor, step: int, shape: tuple[int, ...], seed: int) -> Tensor:
    """Standard normals [N, *shape] in fp32 for the entries [N] (int64) of a queue at one step.

    Args:
        entries: numbers of the queue's entries, each with a stream of its own.
        step: supervision steps taken before; below 2^32.
        shape: of one entry's noise.
        seed: below 2^64.
    """
    count = math.prod(shape)
    quads = torch.arange(-(-count // 4), device=entries.device)
    entry = entries.long()[:, None].expand(-1, len(quads))
    counter = [quads.expand_as(entry), entry, torch.full_like(entry, step), entry * 0]
    a, b, c, d = philox(counter, seed)
    found = torch.stack((*_box_muller(a, b), *_box_muller(c, d)), dim=-1)
    return found.flatten(1)[:, :count].reshape(len(entries), *shape)
