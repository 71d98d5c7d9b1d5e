"""Noise and dropout from a counter inside a kernel: recurx/noise.py says what they are and why.

Philox 4x32 with 10 rounds, then Box-Muller or a comparison. A counter of four words gives four
elements; here each element draws its own four words and uses two of them, or one, because elements
of a quad may lie in several threads.
"""

from __future__ import annotations

import math
import struct

import triton
import triton.language as tl

from recurx.noise import CALLS

USE = tl.constexpr(CALLS)


@triton.jit
def philox(a, b, c, d, seed):
    """Four random words of uint32 for a counter of four; seed a scalar of int64."""
    key0 = (seed & 0xFFFFFFFF).to(tl.uint32)
    key1 = ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    for _ in tl.static_range(10):
        first, second = tl.umulhi(a, 0xD2511F53), tl.umulhi(c, 0xCD9E8D57)
        b, d = second ^ b ^ key0, first ^ d ^ key1
        a, c = a * 0xD2511F53, c * 0xCD9E8D57
        a, b, c, d = b, c, d, a
        key0 += 0x9E3779B9
        key1 += 0xBB67AE85
    return a, b, c, d


@triton.jit
def _words_of_quad(seed, entry, number, element, use):
    zero = (element ^ element).to(tl.uint32)
    quad = (element >> 2).to(tl.uint32)
    counter = zero + entry.to(tl.uint32), zero + number.to(tl.uint32), zero + use
    return philox(quad, counter[0], counter[1], counter[2], seed)


@triton.jit
def kept(seed, entry, number, element, use, LEAST: tl.constexpr):
    """Whether each `element` of samples `entry` is not dropped; the arguments as below, `LEAST` of
    `kept_of`."""
    a, b, c, d = _words_of_quad(seed, entry, number, element, use)
    odd, second = (element & 1) != 0, (element & 2) != 0
    word = tl.where(second, tl.where(odd, d, c), tl.where(odd, b, a))
    return (word >> 8).to(tl.int32) >= LEAST


def kept_of(elements: float, samples: float) -> dict[str, float]:
    """Of shares that are dropped: the least 24 bits of a word that keep an element, or a sample,
    and by what factor all grows."""
    shares = struct.unpack("2f", struct.pack("2f", elements, samples))  # as PyTorch compares fp32
    least = [math.ceil(share * 2**24) for share in shares]
    grown = 1 / (1 - elements) * (1 / (1 - samples))
    return {"ELEMENTS": least[0], "SAMPLES": least[1], "GROWN": grown}


@triton.jit
def normal_numbers(seed, entry, number, element):
    """Standard normals in fp32: for each `element` of a sample, `entry` its number (they broadcast
    to int32), at call `number`."""
    a, b, c, d = _words_of_quad(seed, entry, number, element, USE)
    second = (element & 2) != 0
    return _box_muller(tl.where(second, c, a), tl.where(second, d, b), element & 1)


@triton.jit
def _box_muller(a, b, odd):
    """The cosine (`odd` 0) or sine of one pair. Quarters of a turn are taken off before the series,
    which on [-pi/4, pi/4] leaves out less than 2.5e-8; cos of the library keeps tables for large
    arguments in local memory."""
    u = ((a >> 8).to(tl.float32) + 0.5) * 5.9604644775390625e-8  # 24 bits in (0, 1)
    radius = tl.sqrt_rn(-2.0 * tl.log(u))
    half_turns = (b >> 8).to(tl.float32) * 1.1920928955078125e-7  # [0, 2)
    quarters = tl.floor(2.0 * half_turns + 0.5)
    x = (half_turns - 0.5 * quarters) * 3.14159265358979
    s = x * x
    cosine = 1.0 + s * (-0.5 + s * (1 / 24 + s * (-1 / 720 + s * (1 / 40320))))
    sine = x + x * s * (-1 / 6 + s * (1 / 120 + s * (-1 / 5040 + s * (1 / 362880))))
    turn = (quarters.to(tl.int32) + 3 * odd) & 3  # sin x = cos(x + 3 quarters)
    value = tl.where((turn & 1) == 0, cosine, sine)
    return radius * tl.where((turn == 1) | (turn == 2), -value, value)
