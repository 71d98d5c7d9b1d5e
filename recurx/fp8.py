"""The FP8 format of weights: e4m3 codes with an fp32 scale for each output channel.

A weight [out, in] becomes codes [out, in] of one byte and scales [out]: w = code * scale, with the
largest code of a channel at 448. The weight that a net holds is exactly that product, so any
backend runs it; one that knows the format asks `are_quantized` and reads the codes themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
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


def quantize_weight(weight: Tensor) -> Codes:
    """[out, in] floating to e4m3, rounded to nearest even, a scale for each output channel."""
    wide = weight.detach().float()
    scales = wide.abs().amax(dim=1) / LARGEST
    scales = torch.where(scales > 0, scales, torch.ones_like(scales))
    return Codes((wide / scales[:, None]).to(torch.float8_e4m3fn), scales)


def register(weight: Tensor, codes: Codes) -> None:
    """Remember that `weight` is codes * scales; a copy of it is an ordinary weight."""
    weight._recurx_codes = codes  # type: ignore[attr-defined]


def registered(weight: Tensor) -> Codes | None:
    """What was registered; whether `weight` is still that product, `are_quantized` says."""
    codes: Codes | None = getattr(weight, "_recurx_codes", None)
    if codes is not None and codes.scales.device != weight.device:
        codes = Codes(codes.codes.to(weight.device), codes.scales.to(weight.device))
        register(weight, codes)
    return codes


def are_quantized(weights: Sequence[Tensor]) -> bool:
    """Whether each weight is the product of its codes now. Every element is compared, and the host
    waits for the device once, if all have codes."""
    both = [(weight.detach(), registered(weight)) for weight in weights]
    if any(codes is None or codes.codes.shape != weight.shape for weight, codes in both):
        return False
    return bool(torch.stack([(codes.dequantized() == w).all() for w, codes in both if codes]).all())
