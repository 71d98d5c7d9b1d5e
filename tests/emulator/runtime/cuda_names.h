// cuda_names.h - the part of CUDA C++ that kernels use, for g++: keywords, vector types, built-in
// variables and functions. A kernel that needs another name gets it here.
#pragma once
#include <algorithm>
#include <cmath>

#include "emu.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __grid_constant__

#define threadIdx (emu::cur->tid)
#define blockIdx (emu::cur->bid)
#define blockDim (emu::cur->bdim)
#define gridDim (emu::cur->gdim)

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

__forceinline__ void __syncthreads() { emu::bar_sync(0, -1); }
inline void __syncwarp(uint32_t mask = 0xffffffffu) { emu::syncwarp(mask); }
inline void __threadfence() { emu::fence(emu::Scope::kGpu); }
inline void __threadfence_block() { emu::fence(emu::Scope::kCta); }

template <class T>
inline T emu_shfl(uint32_t mask, T value, int arg, emu::Shfl mode) {
  static_assert(sizeof(T) == 4, "32-bit values only");
  uint32_t bits;
  memcpy(&bits, &value, 4);
  bits = emu::shfl(mask, bits, arg, mode);
  memcpy(&value, &bits, 4);
  return value;
}
template <class T>
inline T __shfl_sync(uint32_t mask, T v, int lane) {
  return emu_shfl(mask, v, lane, emu::Shfl::kIdx);
}
template <class T>
inline T __shfl_up_sync(uint32_t mask, T v, int d) {
  return emu_shfl(mask, v, d, emu::Shfl::kUp);
}
template <class T>
inline T __shfl_down_sync(uint32_t mask, T v, int d) {
  return emu_shfl(mask, v, d, emu::Shfl::kDown);
}
template <class T>
inline T __shfl_xor_sync(uint32_t mask, T v, int m) {
  return emu_shfl(mask, v, m, emu::Shfl::kXor);
}
inline uint32_t __ballot_sync(uint32_t mask, bool p) { return emu::ballot(mask, p); }

inline float cospif(float x) { return float(std::cos(3.14159265358979323846 * x)); }
inline float sinpif(float x) { return float(std::sin(3.14159265358979323846 * x)); }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __expf(float x) { return std::exp(x); }
inline float __fdividef(float a, float b) { return a / b; }
template <class T>
inline T __ldg(const T* p) {
  emu::access_constant(p, sizeof *p);
  return *p;
}
using std::max;
using std::min;

// Atomics: between OS threads too; they order nothing, as CUDA has it.
inline unsigned atomicAdd(unsigned* p, unsigned v) {
  return emu::atomic_add(p, v, emu::Order::kRelaxed);
}
inline int atomicAdd(int* p, int v) {
  return int(atomicAdd(reinterpret_cast<unsigned*>(p), unsigned(v)));
}
