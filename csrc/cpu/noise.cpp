// Philox 4x32, 10 rounds, then Box-Muller.
#include "noise.hpp"

#include <cmath>

namespace rx::cpu {
namespace {

struct Words {
  uint32_t w[4];
};

Words philox(Words counter, uint64_t seed) {
  uint32_t key0 = (uint32_t)seed, key1 = (uint32_t)(seed >> 32);
  uint32_t* w = counter.w;
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = (uint64_t)w[0] * 0xD2511F53u, c = (uint64_t)w[2] * 0xCD9E8D57u;
    counter = {(uint32_t)(c >> 32) ^ w[1] ^ key0, (uint32_t)c, (uint32_t)(a >> 32) ^ w[3] ^ key1,
               (uint32_t)a};
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return counter;
}

void box_muller(uint32_t a, uint32_t b, float* out) {
  const float u = ((float)(a >> 8) + 0.5f) * 5.9604644775390625e-8f;
  const double angle = (double)(b >> 8) * (2 * M_PI * 5.9604644775390625e-8);
  const float radius = (float)std::sqrt(-2.0 * std::log((double)u));
  out[0] = radius * (float)std::cos(angle);
  out[1] = radius * (float)std::sin(angle);
}

}  // namespace

void normals(NoiseOf which, uint64_t seed, uint32_t quad, float* out, long count) {
  for (long i = 0; i < count / 4; ++i) {
    const Words bits = philox({quad + (uint32_t)i, which.entry, which.step, which.use}, seed);
    box_muller(bits.w[0], bits.w[1], out + 4 * i);
    box_muller(bits.w[2], bits.w[3], out + 4 * i + 2);
  }
}

}  // namespace rx::cpu
