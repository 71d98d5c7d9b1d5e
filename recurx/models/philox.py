"""Philox 4x32 with 10 rounds (Salmon et al., SC 2011): random numbers from a counter."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

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
