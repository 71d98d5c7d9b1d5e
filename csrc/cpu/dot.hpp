// A product of pairs of bf16 for each lane of fp32: vdpbf16ps of AVX512_BF16, or BFDOT of aarch64,
// which rounds in its own way.
//
// Compiled for a processor without either, the bits of vdpbf16ps by plain code, so that the engine
// is tested on any machine: two fused multiply-adds, the odd element first, each rounded to nearest
// even; denormals count as zero and come out as zero.
#pragma once

#include "vec.hpp"

namespace rx::cpu::RX_ISA {

// The pair at p in every lane.
RX_INLINE V splat_pair(const bf16* p) {
  int32_t pair;
  memcpy(&pair, p, sizeof pair);
  return (V)(pair - VI{});
}

#if defined(__AVX512BF16__) && RX_VECTOR_WIDTH == 16 && !defined(RX_EMULATE_DOT)

RX_INLINE V dot(V acc, V a, V b) {
  return (V)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b);
}

#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC) && RX_VECTOR_WIDTH == 4

RX_INLINE V dot(V acc, V a, V b) {
  return (V)vbfdotq_f32((float32x4_t)acc, (bfloat16x8_t)a, (bfloat16x8_t)b);
}

#else

RX_INLINE V flushed(V v) {
  const VU u = (VU)v;
  return (V)((u & 0x7f800000u) != 0 ? u : u & 0x80000000u);
}

// A product of two bf16 is exact in fp32, so that rounding it first changes nothing (but where it
// leaves the range of normal numbers). NOTE: not inlined: 28 copies in every loop took g++ minutes.
static __attribute__((noinline)) void add_dot(V& acc, const V& a, const V& b) {
  const V odd = flushed((V)((VU)a & 0xffff0000u)) * flushed((V)((VU)b & 0xffff0000u));
  const V even = flushed((V)((VU)a << 16)) * flushed((V)((VU)b << 16));
  acc = flushed(flushed(flushed(acc) + odd) + even);
}
RX_INLINE V dot(V acc, V a, V b) {
  add_dot(acc, a, b);
  return acc;
}

#endif

}  // namespace rx::cpu::RX_ISA
