// AdamATan2 in one pass over memory: formula and polynomial are those of kernels/adam_atan2.py.
#pragma once

#include "vec.hpp"

namespace rx::cpu::RX_ISA {

// atan2(y, x) for x >= 0, 0 where both are 0.
RX_INLINE V atan2_right(V y, V x) {
  constexpr float kSeries[] = {
      0.0028498863199071696f, -0.016068615788745987f, 0.04269149792840053f,
      -0.07504292739031096f,  0.10640933184947396f,   -0.14203644253611142f,
      0.19992619365199768f,   -0.3333307334380136f,   0.9999999847656758f,
  };
  constexpr float kHalfPi = 1.57079632679489662f;
  const V tall = (V)((VU)y & 0x7fffffffu);
  const V small = tall > x ? x : tall, large = tall > x ? tall : x;
  const V one = small == V{} ? V{} : splat(1.f);  // of equal ones, infinities too
  const V a = small == large ? one : small / large, square = a * a;
  V p = splat(kSeries[0]);
#pragma GCC unroll 8
  for (int i = 1; i < 9; ++i) p = fma(p, square, splat(kSeries[i]));
  const V flat = a * p, angle = tall > x ? kHalfPi - flat : flat;
  return y < V{} ? -angle : angle;
}

RX_INLINE void step_lanes(const AdamRates& by, const AdamTensor& t, V g, V& w, V& m, V& v) {
  m = fma(splat(by.mean_share), g - m, m);
  v = fma(by.square_share * g, g, by.square_keep * v);
  w = fma(splat(-by.lr), atan2_right(m / t.mean_by, root(v / t.square_by)), by.keep * w);
}

// Elements [begin, end) of a tensor.
static inline void adam_atan2(const AdamRates& by, const AdamTensor& t, long begin, long end) {
  long i = begin;
  for (; i + W <= end; i += W) {
    V w = load(t.weight + i), m = load(t.mean + i), v = load(t.square + i);
    step_lanes(by, t, load(t.gradient + i), w, m, v);
    store(t.weight + i, w);
    store(t.mean + i, m);
    store(t.square + i, v);
  }
  if (i == end) return;
  float lanes[4][W] = {};
  float* const from[4] = {t.weight, t.mean, t.square, (float*)t.gradient};
  for (int k = 0; k < 4; ++k) memcpy(lanes[k], from[k] + i, (end - i) * sizeof(float));
  V w = load(lanes[0]), m = load(lanes[1]), v = load(lanes[2]);
  step_lanes(by, t, load(lanes[3]), w, m, v);
  store(lanes[0], w);
  store(lanes[1], m);
  store(lanes[2], v);
  for (int k = 0; k < 3; ++k) memcpy(from[k] + i, lanes[k], (end - i) * sizeof(float));
}

}  // namespace rx::cpu::RX_ISA
