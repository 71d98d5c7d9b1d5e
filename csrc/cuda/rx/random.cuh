// random.cuh - normal numbers from a counter: the same for the same seed, whoever draws them when.
//
// Philox 4x32, 10 rounds (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), then
// Box-Muller. recurx/noise.py is the same formula in PyTorch.
#pragma once
#include <cmath>

#include "common.cuh"

namespace rx {

RX_DEVICE uint32_t mul_high(uint32_t a, uint32_t b) { return uint32_t(uint64_t(a) * b >> 32); }

RX_DEVICE uint4 philox(uint4 counter, uint2 key) {
#pragma unroll
  for (int round = 0; round < 10; round++) {
    const uint32_t high0 = mul_high(0xD2511F53u, counter.x), low0 = 0xD2511F53u * counter.x;
    const uint32_t high1 = mul_high(0xCD9E8D57u, counter.z), low1 = 0xCD9E8D57u * counter.z;
    counter = uint4{high1 ^ counter.y ^ key.x, low1, high0 ^ counter.w ^ key.y, low0};
    key.x += 0x9E3779B9u;
    key.y += 0xBB67AE85u;
  }
  return counter;
}

// Two independent standard normals from two random words.
RX_DEVICE float2 box_muller(uint32_t a, uint32_t b) {
  const float u = (float(a >> 8) + 0.5f) * 5.9604644775390625e-8f;  // 24 bits in (0, 1)
  const float half_turns = float(b >> 8) * (2 * 5.9604644775390625e-8f);
  const float radius = sqrtf(-2.f * logf(u));
  // cospif needs no table for large arguments, which cosf keeps in local memory.
  return make_float2(radius * cospif(half_turns), radius * sinpif(half_turns));
}

// Normals number 4 * counter.x .. 4 * counter.x + 3 of a stream.
RX_DEVICE float4 normals(uint4 counter, uint2 key) {
  const uint4 bits = philox(counter, key);
  const float2 a = box_muller(bits.x, bits.y), b = box_muller(bits.z, bits.w);
  return float4{a.x, a.y, b.x, b.y};
}

// The last word of a counter: what the numbers are for.
enum NoiseUse : uint32_t { kNoiseOfSteps = 0, kNoiseOfCalls = 2 };

// Normals number 2 * pair and the next of one call and entry: half of a quad.
RX_DEVICE float2 call_normals(uint32_t pair, uint32_t entry, uint32_t call, uint2 key) {
  const uint4 bits = philox(uint4{pair >> 1, entry, call, kNoiseOfCalls}, key);
  return pair & 1 ? box_muller(bits.z, bits.w) : box_muller(bits.x, bits.y);
}

}  // namespace rx
