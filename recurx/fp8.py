"""The formats of quantised weights: e4m3 or int8 codes, an fp32 scale for each output channel.

A weight [out, in] becomes codes [out, in] of one byte and scales [out]: w = code * scale, with the
largest code of a channel at 448 or 127. The weight that a net holds is exactly that product, so any
backend runs it; one that knows the format asks `are_quantized` and reads the codes themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

FP8, INT8 = torch.float8_e4m3fn, torch.int8
LARGEST = {FP8: 448.0, INT8: 127.0}  # e4m3: 1.75 * 2^8; beyond it the format has only NaN


@dataclass(frozen=True)
class Codes:
    """A quantised weight.

    Args:
        codes: [out, in] float8_e4m3fn or int8.
        scales: [out] fp32; the weight is codes * scales[:, None].
    """

    codes: Tensor
    scales: Tensor

    def dequantized(self) -> Tensor:
        """codes * scales, exactly, in fp32."""
        return self.codes.float() * self.scales[:, None]


def quantize_weight(weight: Tensor, dtype: torch.dtype = FP8) -> Codes:
    """[out, in] floating to codes, rounded to nearest even, a scale for each output channel."""
    wide = weight.detach().float()
    scales = wide.abs().amax(dim=1) / LARGEST[dtype]
    scales = torch.where(scales > 0, scales, torch.ones_like(scales))
    codes = wide / scales[:, None]
    return Codes((codes.round() if dtype is INT8 else codes).to(dtype), scales)


def register(weight: Tensor, codes: Codes) -> None:
    """Remember that `weight` is codes * scales; a copy of it is an ordinary weight."""
    weight._recurx_codes = codes  # type: ignore[attr-defined]


def registered(weight: Tensor) -> Codes | None:
    """What was registered; whether `weight` is still that product, `are_quantized` says."""
    codes: Codes | None = getattr(weight, "_recurx_codes", None)
    if codes is not None and codes.scales.device != weight.device:
        with torch.inference_mode(False):  # the next call may be outside
            codes = Codes(codes.codes.to(weight.device), codes.scales.to(weight.device))
        register(weight, codes)
    return codes


def have_codes(weights: Sequence[Tensor], dtype: torch.dtype) -> bool:
    """Whether codes of this type are registered for all, right or not."""
    known = [getattr(weight, "_recurx_codes", None) for weight in weights]
    return all(codes is not None and codes.codes.dtype is dtype for codes in known)


def are_quantized(weights: Sequence[Tensor], dtype: torch.dtype = FP8) -> bool:
    """Whether each weight is the product of its codes, of this type, now. Every element is
    compared, and the host waits for the device once, if all have codes."""
    both = [(weight.detach(), registered(weight)) for weight in weights]
    if not have_codes(weights, dtype) or any(c and c.codes.shape != w.shape for w, c in both):
        return False
    return bool(torch.stack([(codes.dequantized() == w).all() for w, codes in both if codes]).all())
