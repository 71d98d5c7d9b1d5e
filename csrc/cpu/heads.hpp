// What solving does to a state beside the recursion: heads read it, noise is added to it.
#pragma once

#include "vec.hpp"

namespace rx::cpu::RX_ISA {

// NOTE: D is a multiple of 32, so of 2 W for every W.
template <class State>
float head(const void* row, const void* weight, int width, float bias) {
  const State *a = (const State*)row, *b = (const State*)weight;
  V even{}, odd{};
  for (int i = 0; i < width; i += 2 * W) {
    even = fma(load(a + i), load(b + i), even);
    odd = fma(load(a + i + W), load(b + i + W), odd);
  }
  even = even + odd;
  float lanes[W], sum = 0.f;
  store(lanes, even);
  for (int i = 0; i < W; ++i) sum += lanes[i];
  State rounded;
  store_one(&rounded, sum + bias);
  return to_float(rounded);
}

template <class State>
void add_noise(void* state, const float* noise, float sigma, long count) {
  const State* type = nullptr;
  State* at = (State*)state;
  for (long i = 0; i < count; i += W)
    store(at + i, load(at + i) + round_as(type, splat(sigma) * load(noise + i)));
}

}  // namespace rx::cpu::RX_ISA
