"""Normal noise from a counter: the same for the same seed, entry, step and element, on any device.

Philox (`recurx.models.philox`), then Box-Muller; csrc/cuda/rx/random.cuh is the same formula inside
the CUDA engine. So a rollout can be repeated alone, in another batch or by another backend.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from recurx.models.layers import CUT, LEFT, MASS
from recurx.models.philox import philox

_STEPS, _STARTS = 0, 1  # last word of the counter: what the numbers are for

_SIGMA = 1 / LEFT  # a cut normal of deviation 1: how H_init and L_init are drawn


def _box_muller(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    u = ((a >> 8).float() + 0.5) * 2.0**-24
    angle = (b >> 8).double() * (2 * math.pi * 2.0**-24)
    radius = torch.sqrt(-2.0 * torch.log(u.double())).float()
    return radius * angle.cos().float(), radius * angle.sin().float()


def normals(entries: Tensor, step: int, shape: tuple[int, ...], seed: int) -> Tensor:
    """Standard normals [N, *shape] in fp32 for the entries [N] (int64) of a queue at one step.

    Args:
        entries: numbers of the queue's entries, each with a stream of its own.
        step: supervision steps taken before; below 2^32.
        shape: of one entry's noise.
        seed: below 2^64.
    """
    a, b, c, d = _words(entries, step, _STEPS, shape, seed)
    found = torch.stack((*_box_muller(a, b), *_box_muller(c, d)), dim=-1)
    return _shaped(found, entries, shape)


def truncated_normals(entries: Tensor, state: int, shape: tuple[int, ...], seed: int) -> Tensor:
    """Random start states [N, *shape] in fp32: mean 0, deviation 1, none beyond 2.27.

    The distribution that the learned start was drawn from (a normal cut at two deviations), for
    every token and channel of its own; the numbers are never those of `normals`.

    Args:
        entries: as in `normals`.
        state: number of the state, which has a stream of its own; below 2^32.
        shape, seed: as in `normals`.
    """
    words = torch.stack(_words(entries, state, _STARTS, shape, seed), dim=-1)
    u = ((words >> 8).float() + 0.5) * 2.0**-24
    found = torch.erfinv((2 * u - 1) * MASS) * (math.sqrt(2) * _SIGMA)
    return _shaped(found.clamp(-CUT * _SIGMA, CUT * _SIGMA), entries, shape)


def _words(
    entries: Tensor, third: int, use: int, shape: tuple[int, ...], seed: int
) -> tuple[Tensor, ...]:
    """Four random words [N, quads] for every four elements of `shape`."""
    quads = torch.arange(-(-math.prod(shape) // 4), device=entries.device)
    entry = entries.long()[:, None].expand(-1, len(quads))
    last = torch.full_like(entry, use)
    return philox([quads.expand_as(entry), entry, torch.full_like(entry, third), last], seed)


def _shaped(found: Tensor, entries: Tensor, shape: tuple[int, ...]) -> Tensor:
    """[N, quads, 4] without the elements beyond `shape`."""
    return found.flatten(1)[:, : math.prod(shape)].reshape(len(entries), *shape)
