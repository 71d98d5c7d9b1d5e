"""The FP8 format of weights: e4m3 codes with an fp32 scale for each output channel.

A weight [out, in] becomes codes [out, in] of one byte and scales [out]: w = code * scale, with the
largest code of a channel at 448. The weight that a net holds is exactly that product, so any
backend runs it; one that knows the format asks `codes_of` and reads the codes themselves.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch
from torch import Tensor

LARGEST = 448.0  # of e4m3: 1.75 * 2^8; beyond it the format has only NaN


@dataclass(frozen=True)
class Codes:
    """A quantised weight.

    Args:
        codes: [out, in] float8_e4m3fn.
        scales: [out] fp32; the weight is codes * scales[:, None].
    """

    codes: Tensor
    scales: Tensor

    def dequantized(self) -> Tensor:
        """codes * scales, exactly, in fp32."""
        return self.codes.float() * self.scales[:, None]


# Codes of the parameters that `quantize` made. A tensor counts as quantised as long as nobody
# writes to it; an id may be used again, hence the weak reference.
_known: dict[int, tuple[weakref.ref[Tensor], int, Codes]] = {}


def quantize_weight(weight: Tensor) -> Codes:
    """[out, in] floating to e4m3, rounded to nearest even, a scale for each output channel."""
    wide = weight.detach().float()
    scales = wide.abs().amax(dim=1) / LARGEST
    scales = torch.where(scales > 0, scales, torch.ones_like(scales))
    return Codes((wide / scales[:, None]).to(torch.float8_e4m3fn), scales)


def register(weight: Tensor, codes: Codes) -> None:
    """Remember that `weight` is codes * scales, until it is written to or dies."""
    key = id(weight)
    ref = weakref.ref(weight, lambda _: _known.pop(key, None))
    _known[key] = (ref, weight._version, codes)


def codes_of(weight: Tensor) -> Codes | None:
    """The codes of a quantised weight; None for any other, and after a change."""
    found = _known.get(id(weight))
    if found is None or found[0]() is not weight or found[1] != weight._version:
        return None
    return found[2]
