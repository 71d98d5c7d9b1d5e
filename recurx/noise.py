"""Normal noise from a counter: the same for the same seed, entry, step and element, on any device.

Philox 4x32 with 10 rounds (Salmon et al., SC 2011), then Box-Muller; csrc/cuda/rx/random.cuh is the
same formula inside the CUDA engine. So a noisy call can be run again for its gradient, and a
rollout repeated alone, in another batch or by another backend.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

# Last word of the counter: what the numbers are for; DROPS and a multiple of 4: which branch.
STEPS, STARTS, CALLS, DROPS = 0, 1, 2, 3
DRAWN = ("dropout", "drop_path")  # fields of blocks that draw, in training alone
MOST = 1 - 2.0**-24  # that may be dropped: `chances` are multiples of that
TOGETHER = 1 << 16  # numbers drawn at once on a CPU: what is between stays in its cache
LOW = 0xFFFFFFFF  # words are kept in int64: products of two may wrap, their 64 bits are right
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def philox(counter: Sequence[Tensor | int], seed: Tensor | int) -> tuple[Tensor, ...]:
    """Four random words in [0, 2^32), as int64, for each counter of four such words.

    Args:
        counter: int64 tensors, of which one may be an int; they broadcast.
        seed: 64 bits: an int, or an int64 tensor on the device, 0-d.
    """
    a, b, c, d = counter
    key0, key1 = seed & LOW, seed >> 32 & LOW
    for _ in range(10):
        first, second = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]
        a, b, c, d = (
            (second >> 32 & LOW) ^ b ^ key0,
            second & LOW,
            (first >> 32 & LOW) ^ d ^ key1,
            first & LOW,
        )
        key0, key1 = key0 + _WEYL[0] & LOW, key1 + _WEYL[1] & LOW
    return a, b, c, d  # type: ignore[return-value]


def normals(
    entries: Tensor, step: int, shape: Sequence[int], seed: Tensor | int, use: int = STEPS
) -> Tensor:
    """Standard normals [N, *shape] in fp32 for the entries [N] (int64) of a queue at one step.

    Args:
        entries: numbers of the queue's entries, each with a stream of its own.
        step: supervision steps (or net calls) taken before; below 2^32.
        shape: of one entry's noise.
        seed: below 2^64.
        use: STEPS for noise between supervision steps, CALLS for that of net calls.
    """
    most = max(TOGETHER // max(math.prod(shape), 1), 1) if entries.is_cpu else len(entries)
    if len(entries) > most:
        return torch.cat([normals(some, step, shape, seed, use) for some in entries.split(most)])
    a, b, c, d = words(entries, step, use, shape, seed)
    found = torch.stack((*_box_muller(a, b), *_box_muller(c, d)), dim=-1)
    return shaped(found, shape)


def words(
    entries: Tensor, third: int, use: int, shape: Sequence[int], seed: Tensor | int
) -> tuple[Tensor, ...]:
    """Four random words [N, quads] for every four elements of `shape`."""
    quads = torch.arange(-(-math.prod(shape) // 4), device=entries.device)
    entry = (entries.long() & LOW)[:, None].expand(-1, len(quads))
    last = torch.full_like(entry, use)
    return philox([quads.expand_as(entry), entry, torch.full_like(entry, third), last], seed)


def chances(
    entries: Tensor, call: int, shape: Sequence[int], seed: Tensor | int, use: int
) -> Tensor:
    """Uniform in [0, 1), multiples of 2^-24, [N, *shape] in fp32; the arguments as of `normals`."""
    found = torch.stack(words(entries, call, use, shape, seed), dim=-1)
    return shaped(found >> 8, shape).float() * 2.0**-24


def shaped(found: Tensor, shape: Sequence[int]) -> Tensor:
    """[N, quads, 4] without the elements beyond `shape`."""
    return found.flatten(1)[:, : math.prod(shape)].reshape(len(found), *shape)


def _box_muller(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    u = ((a >> 8).float() + 0.5) * 2.0**-24
    angle = (b >> 8).double() * (2 * math.pi * 2.0**-24)
    radius = torch.sqrt(-2.0 * torch.log(u.double())).float()
    return radius * angle.cos().float(), radius * angle.sin().float()
