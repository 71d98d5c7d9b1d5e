// Four products of int8 for each lane of int32: vpdpbusd of AVX512_VNNI and AVX-VNNI, by plain code
// elsewhere. All are exact modulo 2^32, so that every processor has the same sums.
#pragma once

#include "vec.hpp"

namespace rx::cpu::RX_ISA {

RX_INLINE VI load_lanes(const void* p) {
  VI v;
  memcpy(&v, p, sizeof v);
  return v;
}

// The four bytes at p in every lane.
RX_INLINE VI splat_quad(const uint8_t* p) {
  int32_t quad;
  memcpy(&quad, p, sizeof quad);
  return quad - VI{};
}

// acc + sum of the four unsigned bytes of a lane of `a` times the signed ones of `b`.
#if defined(__AVX512VNNI__) && RX_VECTOR_WIDTH == 16 && !defined(RX_EMULATE_DOT)
RX_INLINE VI dot_quad(VI acc, VI a, VI b) {
  return (VI)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)a, (__m512i)b);
}
#elif defined(__AVXVNNI__) && RX_VECTOR_WIDTH == 8 && !defined(RX_EMULATE_DOT)
RX_INLINE VI dot_quad(VI acc, VI a, VI b) {
  return (VI)_mm256_dpbusd_avx_epi32((__m256i)acc, (__m256i)a, (__m256i)b);
}
#else
// NOTE: not inlined, as in dot.hpp.
static __attribute__((noinline)) void add_quad(VI& acc, const VI& a, const VI& b) {
  VU sum = (VU)acc;
  for (int byte = 0; byte < 4; ++byte)
    sum += ((VU)a >> 8 * byte & 255) * (VU)((VI)((VU)b << (24 - 8 * byte)) >> 24);
  acc = (VI)sum;
}
RX_INLINE VI dot_quad(VI acc, VI a, VI b) {
  add_quad(acc, a, b);
  return acc;
}
#endif

// W values in [-127, 127] as bytes, 128 added.
RX_INLINE void store_codes(uint8_t* out, VI codes) {
  typedef uint8_t Bytes __attribute__((vector_size(W)));
#if defined(__AVX512F__) && RX_VECTOR_WIDTH == 16
  const Bytes bytes = (Bytes)_mm512_cvtepi32_epi8((__m512i)(codes + 128));
#else
  const Bytes bytes = __builtin_convertvector(codes + 128, Bytes);
#endif
  memcpy(out, &bytes, sizeof bytes);
}

}  // namespace rx::cpu::RX_ISA
