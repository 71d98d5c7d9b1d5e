// Normal noise from a counter, the formula of recurx/noise.py.
#pragma once

#include <cstdint>

namespace rx::cpu {

// What the numbers are for, the last word of the counter.
constexpr uint32_t kStepNoise = 0, kCallNoise = 2, kDrops = 3;

struct NoiseOf {
  uint32_t entry, step, use;
};

// `count` standard normals, a multiple of 4, from the `quad`-th four of an entry's on.
void normals(NoiseOf which, uint64_t seed, uint32_t quad, float* out, long count);

}  // namespace rx::cpu
