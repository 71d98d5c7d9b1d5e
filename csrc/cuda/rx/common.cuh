// common.cuh - what the wrappers and the kernels share: memory declarations, bf16, named constants.
#pragma once
#include <cstddef>
#include <cstdint>

#ifdef RX_EMU
#include "cuda_names.h"
#define RX_EITHER(emulated, ...) emulated
#define RX_DYN_SMEM(name) unsigned char* name = emu::dyn_smem()
#else
#include <cuda_runtime.h>
#define RX_EITHER(emulated, ...) __VA_ARGS__
#define RX_DYN_SMEM(name) extern __shared__ __align__(1024) unsigned char name[]
#endif
#define RX_DEVICE __device__ __forceinline__
#define RX_BOTH __host__ __device__ inline

namespace rx {

constexpr uint32_t kFullWarp = 0xffffffffu;
constexpr uint32_t kMaxSharedSm90 = 227 * 1024;  // bytes a CTA may ask for: sm_90, sm_100

using bf16 = uint16_t;  // storage only; arithmetic is fp32

RX_BOTH constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }
RX_BOTH constexpr int round_up(int a, int b) { return ceil_div(a, b) * b; }

RX_DEVICE uint32_t smem_u32(const void* p) {
  return RX_EITHER(emu::cvta_shared(p), (uint32_t)__cvta_generic_to_shared(p));
}

// Two floats, rounded to nearest even, as bf16 in the low and the high half.
RX_DEVICE uint32_t pack_bf16(float lo, float hi) {
#ifdef RX_EMU
  return emu::float_to_bf16(lo) | uint32_t(emu::float_to_bf16(hi)) << 16;
#else
  uint32_t r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
  return r;
#endif
}

RX_DEVICE float2 unpack_bf16(uint32_t v) {
  union {
    uint32_t bits;
    float value;
  } lo = {v << 16}, hi = {v & 0xffff0000u};
  return make_float2(lo.value, hi.value);
}

// The sums of two pairs, rounded.
RX_DEVICE uint32_t add_bf16(uint32_t a, uint32_t b) {
  const float2 x = unpack_bf16(a), y = unpack_bf16(b);
  return pack_bf16(x.x + y.x, x.y + y.y);
}

// lo and hi are the columns j and j + head_dim / 2 of a row of q or k, with the table's values
// there.
RX_DEVICE void rotate(float& lo, float& hi, float cos_lo, float sin_lo, float cos_hi,
                      float sin_hi) {
  const float x = lo, y = hi;
  lo = x * cos_lo - y * sin_lo;
  hi = y * cos_hi + x * sin_hi;
}

// x * sigmoid(y)
RX_DEVICE float gated(float x, float y) { return __fdividef(x, 1.f + __expf(-y)); }
RX_DEVICE float swiglu(float gate, float up) { return gated(gate, gate) * up; }

// The same value, of which the compiler knows nothing: what is derived from it is not computed
// ahead of a loop and kept in a register throughout. For 32-bit integers.
template <class T>
RX_DEVICE T opaque(T x) {
#ifndef RX_EMU
  asm volatile("" : "+r"(x));
#endif
  return x;
}

// Nanoseconds of a clock that all SMs share; in the emulator a count of the times it was asked.
RX_DEVICE uint64_t global_time_ns() {
#ifdef RX_EMU
  return emu::global_time_ns();
#else
  uint64_t t;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(t));
  return t;
#endif
}

RX_DEVICE void bar_sync(int id, int threads) {
  RX_EITHER(emu::bar_sync(id, threads),
            asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"));
}
RX_DEVICE void bar_arrive(int id, int threads) {
  RX_EITHER(emu::bar_arrive(id, threads),
            asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory"));
}

}  // namespace rx
