// A vector of RX_VECTOR_WIDTH floats and the few functions that the engine needs.
//
// Written with the vector extensions of GCC and Clang, so that the same source is SSE, NEON, AVX2
// or AVX-512 as the compiler flags say; intrinsics only where the extensions give slow code. Every
// translation unit has its own namespace RX_ISA: functions compiled with different flags must
// never be merged by the linker. For the same reason nothing here uses the standard library's
// templates.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#elif defined(__SSE2__)
#include <xmmintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"  // vectors wider than a register, when emulated
#endif

#define RX_INLINE static inline __attribute__((always_inline))

namespace rx::cpu::RX_ISA {

constexpr int W = RX_VECTOR_WIDTH;

typedef float V __attribute__((vector_size(W * 4)));
typedef int32_t VI __attribute__((vector_size(W * 4)));
typedef uint32_t VU __attribute__((vector_size(W * 4)));
typedef uint16_t VH __attribute__((vector_size(W * 2)));

struct bf16 {
  uint16_t bits;
};

RX_INLINE int imin(int a, int b) { return a < b ? a : b; }
RX_INLINE int imax(int a, int b) { return a > b ? a : b; }
RX_INLINE int ceil_div(int a, int b) { return (a + b - 1) / b; }
RX_INLINE int round_up(int a, int b) { return ceil_div(a, b) * b; }

// NOTE: x - 0 is x, which compilers know; x + 0 is not (-0), and costs an addition.
RX_INLINE V splat(float x) { return x - V{}; }

RX_INLINE V load(const float* p) {
  V v;
  memcpy(&v, p, sizeof v);
  return v;
}
RX_INLINE void store(float* p, V v) { memcpy(p, &v, sizeof v); }

RX_INLINE V widen(VH h) { return (V)(__builtin_convertvector(h, VU) << 16); }

RX_INLINE V load(const bf16* p) {
  VH h;
  memcpy(&h, p, sizeof h);
  return widen(h);
}

// Round to nearest even, NaN to the quiet NaN that PyTorch writes.
RX_INLINE VU bf16_bits(V v) {
  VU u = (VU)v;
  VU rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  return (VU)(v == v ? (VI)rounded : (VI)(VU{} + 0x7fc0));
}

RX_INLINE VH narrow(V v) {
#if defined(__AVX512BF16__) && RX_VECTOR_WIDTH == 16
  return (VH)_mm512_cvtneps_pbh((__m512)v);
#elif defined(__AVX2__) && RX_VECTOR_WIDTH == 8
  __m256i u = (__m256i)bf16_bits(v);
  return (VH)_mm_packus_epi32(_mm256_castsi256_si128(u), _mm256_extracti128_si256(u, 1));
#else
  return __builtin_convertvector(bf16_bits(v), VH);
#endif
}

RX_INLINE void store(bf16* p, V v) {
  const VH h = narrow(v);
  memcpy(p, &h, sizeof h);
}

// x as bf16 values that sum to it, the largest first: three hold the 24 bits of fp32.
template <int kParts>
RX_INLINE void cut(V x, VH (&parts)[kParts]) {
#pragma GCC unroll 4
  for (int i = 0; i < kParts; ++i) {
    parts[i] = narrow(x);
    x = x - widen(parts[i]);
  }
}

RX_INLINE float to_float(bf16 x) {
  uint32_t u = (uint32_t)x.bits << 16;
  float f;
  memcpy(&f, &u, 4);
  return f;
}
RX_INLINE float to_float(float x) { return x; }

RX_INLINE bf16 to_bf16(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  if (f != f) return bf16{0x7fc0};
  return bf16{(uint16_t)((u + 0x7fff + ((u >> 16) & 1)) >> 16)};
}
RX_INLINE void store_one(float* p, float f) { *p = f; }
RX_INLINE void store_one(bf16* p, float f) { *p = to_bf16(f); }

// Round to the state's type, as each addition of two states does.
RX_INLINE V round_as(const float*, V v) { return v; }
RX_INLINE V round_as(const bf16*, V v) { return (V)(bf16_bits(v) << 16); }

RX_INLINE V fma(V a, V b, V c) {
#if defined(__FMA__) && RX_VECTOR_WIDTH == 8
  return (V)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__AVX512F__) && RX_VECTOR_WIDTH == 16
  return (V)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__aarch64__) && RX_VECTOR_WIDTH == 4
  return (V)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}

// NaN in `x` passes, as in torch: NOTE the order of the arguments.
RX_INLINE V at_least(V bound, V x) {
#if defined(__AVX2__) && RX_VECTOR_WIDTH == 8
  return (V)_mm256_max_ps((__m256)bound, (__m256)x);
#elif defined(__AVX512F__) && RX_VECTOR_WIDTH == 16
  return (V)_mm512_max_ps((__m512)bound, (__m512)x);
#else
  return bound > x ? bound : x;
#endif
}
RX_INLINE V at_most(V bound, V x) {
#if defined(__AVX2__) && RX_VECTOR_WIDTH == 8
  return (V)_mm256_min_ps((__m256)bound, (__m256)x);
#elif defined(__AVX512F__) && RX_VECTOR_WIDTH == 16
  return (V)_mm512_min_ps((__m512)bound, (__m512)x);
#else
  return bound < x ? bound : x;
#endif
}

RX_INLINE V root(V x) {
#if defined(__AVX512F__) && RX_VECTOR_WIDTH == 16
  return (V)_mm512_sqrt_ps((__m512)x);
#elif defined(__AVX2__) && RX_VECTOR_WIDTH == 8
  return (V)_mm256_sqrt_ps((__m256)x);
#else
  for (int i = 0; i < W; ++i) x[i] = sqrtf(x[i]);
  return x;
#endif
}

RX_INLINE float reduce_add(V v) {
#if defined(__AVX512F__) && RX_VECTOR_WIDTH == 16
  return _mm512_reduce_add_ps((__m512)v);
#else
  float lane[W];
  memcpy(lane, &v, sizeof v);
  for (int n = W / 2; n; n /= 2)
    for (int i = 0; i < n; ++i) lane[i] += lane[i + n];
  return lane[0];
#endif
}

// NOTE: a NaN lane may be lost; the subtraction that follows brings it back.
RX_INLINE float reduce_max(V v) {
#if defined(__AVX512F__) && RX_VECTOR_WIDTH == 16
  return _mm512_reduce_max_ps((__m512)v);
#else
  float lane[W];
  memcpy(lane, &v, sizeof v);
  for (int n = W / 2; n; n /= 2)
    for (int i = 0; i < n; ++i) lane[i] = lane[i] > lane[i + n] ? lane[i] : lane[i + n];
  return lane[0];
#endif
}

// 2^x for x from -100 to 125 (clamped there: a weight of a softmax times a value is no denormal
// then, which costs a product a hundred times its time). Adding 1.5 * 2^23 leaves round(x) in the
// low bits of the mantissa; the polynomial gives 2^f on [-0.5, 0.5]. Relative error 2e-9 (degree 6)
// before rounding, or 7.5e-5 (degree 3), which is 1/50 of a bf16 rounding.
template <bool kCoarse>
RX_INLINE V exp2(V x) {
  x = at_most(splat(125.f), at_least(splat(-100.f), x));
  V t = x + 12582912.f;
  V f = x - (t - 12582912.f);
  V p;
  if (kCoarse) {
    p = fma(splat(0.0551716668f), f, splat(0.242611135f));
    p = fma(p, f, splat(0.693260987f));
    p = fma(p, f, splat(0.999928073f));
  } else {
    p = fma(splat(1.53458118e-4f), f, splat(1.33999314e-3f));
    p = fma(p, f, splat(9.61848896e-3f));
    p = fma(p, f, splat(0.0555032878f));
    p = fma(p, f, splat(0.240226469f));
    p = fma(p, f, splat(0.693147206f));
    p = fma(p, f, splat(1.f));
  }
  return (V)((VI)p + ((VI)t << 23));
}

template <bool kCoarse>
RX_INLINE V reciprocal(V x) {
#if defined(__AVX512F__) && RX_VECTOR_WIDTH == 16
  if (kCoarse) return (V)_mm512_rcp14_ps((__m512)x);
#endif
  return 1.f / x;
}

// Lanes of a and b in turn: the low halves, the high halves. NOTE: literal masks, or GCC
// scalarises.
#if RX_VECTOR_WIDTH == 4
#define RX_LOW 0, 4, 1, 5
#define RX_HIGH 2, 6, 3, 7
#elif RX_VECTOR_WIDTH == 8
#define RX_LOW 0, 8, 1, 9, 2, 10, 3, 11
#define RX_HIGH 4, 12, 5, 13, 6, 14, 7, 15
#else
#define RX_LOW 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define RX_HIGH 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#endif
#if defined(__clang__)
RX_INLINE V low_lanes(V a, V b) { return __builtin_shufflevector(a, b, RX_LOW); }
RX_INLINE V high_lanes(V a, V b) { return __builtin_shufflevector(a, b, RX_HIGH); }
#else
RX_INLINE V low_lanes(V a, V b) { return __builtin_shuffle(a, b, VI{RX_LOW}); }
RX_INLINE V high_lanes(V a, V b) { return __builtin_shuffle(a, b, VI{RX_HIGH}); }
#endif

// W x W, in registers. Each round rotates the bits of (row, lane) by one place; log2 W rounds swap
// row and lane.
RX_INLINE void transpose(V (&row)[W]) {
#pragma GCC unroll 4
  for (int rounds = 1; rounds < W; rounds *= 2) {
    V next[W];
#pragma GCC unroll 16
    for (int i = 0; i < W / 2; ++i) {
      next[2 * i] = low_lanes(row[i], row[i + W / 2]);
      next[2 * i + 1] = high_lanes(row[i], row[i + W / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) row[i] = next[i];
  }
}

RX_INLINE VI lane_numbers() {
#if RX_VECTOR_WIDTH == 4
  return VI{0, 1, 2, 3};
#elif RX_VECTOR_WIDTH == 8
  return VI{0, 1, 2, 3, 4, 5, 6, 7};
#else
  return VI{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
#endif
}

// While one lives its thread takes numbers below 2^-126 for zeros, and makes none: products of such
// gradients took 50 times as long, and bf16's instructions never know them.
class NoDenormals {
#if defined(__SSE2__)
 public:
  NoDenormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040); }
  ~NoDenormals() { _mm_setcsr(before_); }

 private:
  unsigned before_;
#elif defined(__aarch64__)
 public:
  NoDenormals() {
    asm volatile("mrs %0, fpcr" : "=r"(before_));
    asm volatile("msr fpcr, %0" : : "r"(before_ | 1ull << 24) : "memory");
  }
  ~NoDenormals() { asm volatile("msr fpcr, %0" : : "r"(before_) : "memory"); }

 private:
  uint64_t before_;
#endif
};

constexpr float kLog2e = 1.44269504f;

// silu(gate) * up, all scaled by the row's rms factor `scale`: one exponential, one division.
template <bool kCoarse>
RX_INLINE V swiglu(V gate, V up, float scale) {
  V e = exp2<kCoarse>(gate * (-kLog2e * scale));
  return (gate * up) * (scale * scale) * reciprocal<kCoarse>(e + 1.f);
}

}  // namespace rx::cpu::RX_ISA
