// What a step makes of its call's result beside writing it: damping, and noise from a counter.
//
//   write <- keep * write + share * result + noise * normals      each operation rounded as a state
#pragma once

#include "heads.hpp"
#include "noise.hpp"

namespace rx::cpu::RX_ISA {

RX_INLINE bool is_plain(const Step& step) {
  return step.share == 1.f && step.noise == 0.f && !step.share_each;
}

// keep * before + share * y of columns from `col` on; `type` null, of the states.
template <class State>
RX_INLINE V damped(const State* type, const Step& step, V before, V y, int col = 0) {
  if (step.share_each) {  // in fp32, as PyTorch multiplies by a vector of it
    const V share = load(step.share_each + col);
    return round_as(type, before * (1.f - share) + y * share);
  }
  if (step.share == 1.f) return y;
  return round_as(type, before * step.keep) + round_as(type, y * step.share);
}

// ---- noise: recurx/noise.py, W fours of numbers at once
// ------------------------------------------

typedef uint64_t VU64 __attribute__((vector_size(W * 4)));

// Both halves of x * by: of the even lanes' products, and of the odd ones'.
RX_INLINE void wide_product(VU x, uint32_t by, VU& low, VU& high) {
#if defined(__AVX512F__) && RX_VECTOR_WIDTH == 16
  const __m512i m = _mm512_set1_epi32((int)by);
  const VU64 even = (VU64)_mm512_mul_epu32((__m512i)x, m);
  const VU64 odd = (VU64)_mm512_mul_epu32((__m512i)((VU64)x >> 32), m);
#elif defined(__AVX2__) && RX_VECTOR_WIDTH == 8
  const __m256i m = _mm256_set1_epi32((int)by);
  const VU64 even = (VU64)_mm256_mul_epu32((__m256i)x, m);
  const VU64 odd = (VU64)_mm256_mul_epu32((__m256i)((VU64)x >> 32), m);
#else
  const VU64 even = ((VU64)x & 0xffffffffu) * by, odd = ((VU64)x >> 32) * by;
#endif
  low = (VU)((even & 0xffffffffu) | odd << 32);
  high = (VU)(even >> 32 | (odd & 0xffffffff00000000u));
}

struct FourWords {
  VU w[4];
};

// Philox 4x32 with 10 rounds.
RX_INLINE FourWords philox(FourWords counter, uint64_t seed) {
  uint32_t key0 = (uint32_t)seed, key1 = (uint32_t)(seed >> 32);
  VU* const w = counter.w;
  for (int round = 0; round < 10; ++round) {
    VU low_a, high_a, low_c, high_c;
    wide_product(w[0], 0xD2511F53u, low_a, high_a);
    wide_product(w[2], 0xCD9E8D57u, low_c, high_c);
    counter = {{high_c ^ w[1] ^ key0, low_c, high_a ^ w[3] ^ key1, low_a}};
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return counter;
}

// sqrt(-2 ln u) for u in (0, 1]: m = u / 2^e in [sqrt 1/2, sqrt 2), ln m by Cephes' polynomial.
RX_INLINE V radius_of(V u) {
  const VI bits = (VI)u + (0x3f800000 - 0x3f3504f3);
  const V e = __builtin_convertvector((bits >> 23) - 127, V);
  const V f = (V)((bits & 0x7fffff) + 0x3f3504f3) - 1.f;
  V p = fma(splat(7.0376836292e-2f), f, splat(-1.1514610310e-1f));
  p = fma(p, f, splat(1.1676998740e-1f));
  p = fma(p, f, splat(-1.2420140846e-1f));
  p = fma(p, f, splat(1.4249322787e-1f));
  p = fma(p, f, splat(-1.6668057665e-1f));
  p = fma(p, f, splat(2.0000714765e-1f));
  p = fma(p, f, splat(-2.4999993993e-1f));
  p = fma(p, f, splat(3.3333331174e-1f));
  const V ln = fma(e, splat(0.693147181f), f - f * f * fma(p, -f, splat(0.5f)));
  return root(at_least(V{}, ln * -2.f));
}

// The numbers that four vectors hold of lane after lane, in their order.
RX_INLINE void store_fours(const V (&n)[4], float* to) {
  const V even_low = low_lanes(n[0], n[2]), even_high = high_lanes(n[0], n[2]);
  const V odd_low = low_lanes(n[1], n[3]), odd_high = high_lanes(n[1], n[3]);
  store(to, low_lanes(even_low, odd_low));
  store(to + W, high_lanes(even_low, odd_low));
  store(to + 2 * W, low_lanes(even_high, odd_high));
  store(to + 3 * W, high_lanes(even_high, odd_high));
}

// Two normals of each lane.
RX_INLINE void box_muller(VU a, VU b, V& first, V& second) {
  const V u = (__builtin_convertvector((VI)(a >> 8), V) + 0.5f) * 5.9604644775390625e-8f;
  const V radius = radius_of(u);
  const V turns = __builtin_convertvector((VI)(b >> 8), V) * 2.384185791015625e-7f;  // quarters
  const VI quarter = __builtin_convertvector(turns + 0.5f, VI);                      // nearest
  const V x = (turns - __builtin_convertvector(quarter, V)) * 1.57079633f, xx = x * x;
  V s = fma(splat(-1.9515295891e-4f), xx, splat(8.3321608736e-3f));
  s = fma(fma(s, xx, splat(-1.6666654611e-1f)) * xx, x, x);
  V c = fma(splat(2.443315711809948e-5f), xx, splat(-1.388731625493765e-3f));
  c = fma(fma(c, xx, splat(4.166664568298827e-2f)) * xx, xx, 1.f - xx * 0.5f);
  const VI odd = (quarter & 1) != 0;
  const V cosine = odd ? s : c, sine = odd ? c : s;
  first = radius * (V)((VI)cosine ^ ((quarter + 1) & 2) << 30);
  second = radius * (V)((VI)sine ^ (quarter & 2) << 30);
}

// row[0..width) += noise * normals of one sample's row, rounded as a state.
template <class State>
static __attribute__((noinline)) void add_call_noise(const Step& step, uint64_t seed, long sample,
                                                     long first, State* row, int width) {
  const VU quads = (VU)lane_numbers() + (uint32_t)(first / 4);
  float numbers[4 * W];
  for (int col = 0; col < width; col += 4 * W) {
    const VU zero{};
    const FourWords words = philox({{quads + (uint32_t)(col / 4), zero + (uint32_t)sample,
                                     zero + (uint32_t)step.number, zero + kCallNoise}},
                                   seed);
    V n[4];
    box_muller(words.w[0], words.w[1], n[0], n[1]);
    box_muller(words.w[2], words.w[3], n[2], n[3]);
    store_fours(n, numbers);
    add_noise<State>(row + col, numbers, step.noise, imin(4 * W, width - col));
  }
}

}  // namespace rx::cpu::RX_ISA
