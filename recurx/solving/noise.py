"""Random starts from the counter of `recurx.noise`, and its normals under one name."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from recurx.models.layers import CUT, LEFT, MASS
from recurx.noise import STARTS, normals, philox, shaped, words

__all__ = ["normals", "philox", "truncated_normals"]

_SIGMA = 1 / LEFT  # a cut normal of deviation 1: how H_init and L_init are drawn


def truncated_normals(entries: Tensor, state: int, shape: tuple[int, ...], seed: int) -> Tensor:
    """Random start states [N, *shape] in fp32: mean 0, deviation 1, none beyond 2.27.

    The distribution that the learned start was drawn from (a normal cut at two deviations), for
    every token and channel of its own; the numbers are never those of `normals`.

    Args:
        entries: as in `recurx.noise.normals`.
        state: number of the state, which has a stream of its own; below 2^32.
        shape, seed: as there.
    """
    drawn = torch.stack(words(entries, state, STARTS, shape, seed), dim=-1)
    u = ((drawn >> 8).float() + 0.5) * 2.0**-24
    found = torch.erfinv((2 * u - 1) * MASS) * (math.sqrt(2) * _SIGMA)
    return shaped(found.clamp(-CUT * _SIGMA, CUT * _SIGMA), shape)
