// Attention of one head of one sample in a window, forward and backward, in fp32.
//
// q, k and v are kept as they were projected; they are rotated where they are loaded, and the
// gradients are rotated back where they leave. Of the softmax only log2(sum of 2^scores) is kept, a
// number a row. q is scaled so that scores come out in base 2.
#pragma once

#include "../micro_kernel.hpp"
#include "../softmax.hpp"
#include "head_rows.hpp"

namespace rx::cpu::RX_ISA {

constexpr int kQueries = 4 * kRows;  // query rows whose scores the backward holds at once

// acc[r] += A[0..depth, r] * B: as accumulate(), with A transposed.
template <int kM, class B>
RX_INLINE void accumulate_columns(const float* a, long lda, B b, int depth, V (&acc)[kM][2]) {
  for (int k = 0; k < depth; ++k) {
    V b0, b1;
    b.read(k, b0, b1);
#pragma GCC unroll 16
    for (int r = 0; r < kM; ++r) {
      V x = splat(a[k * lda + r]);
      acc[r][0] = fma(x, b0, acc[r][0]);
      acc[r][1] = fma(x, b1, acc[r][1]);
    }
  }
}

struct HeadScratch {
  float *q, *k, *v, *d_out;    // [padded][wide]
  float *k_panels, *v_panels;  // [padded / kPanel][wide][kPanel]
  float *d_q, *d_k, *d_v;      // [padded][wide]
  float *p, *d_s;              // [kQueries + kRows][padded]
  float* delta;                // [padded]: sum of d_out * out of each row

  template <class Carver>
  static HeadScratch carve(Carver& c, int tokens, int head_dim) {
    const size_t padded = round_up(tokens, kPanel) + kPanel, wide = round_up(head_dim, kPanel);
    HeadScratch s;
    float** const whole[] = {&s.q,        &s.k,   &s.v,   &s.d_out, &s.k_panels,
                             &s.v_panels, &s.d_q, &s.d_k, &s.d_v};
    for (float** m : whole) *m = c.template take<float>(padded * wide);
    s.p = c.template take<float>((kQueries + kRows) * padded);
    s.d_s = c.template take<float>((kQueries + kRows) * padded);
    s.delta = c.template take<float>(padded);
    return s;
  }
};

template <class Core>
struct VectorHead {
  using Scratch = HeadScratch;
  using T = typename Core::State;

  const typename Core::Scratch& gemm;
  const HeadScratch& s;
  int tokens, dim;
  const float *cos, *sin;  // [T, dim] or null

  int padded() const { return round_up(tokens, kPanel); }
  int wide() const { return round_up(dim, kPanel); }
  float scale() const { return 1.f / sqrtf((float)dim); }
  Rotary turn() const { return {tokens, dim, cos, sin}; }

  // mixed <- softmax(q k^T) v, kept and as an operand; qkv [T, 3D] and mixed [T, D] from this
  // head's first column on; lse [T, H] from this head on.
  template <class Act, class Seen = SeesAll>
  void forward(const T* qkv, int hidden, T* mixed, Mat<Act> also, int row0, int col, float* lse,
               int heads, Seen seen = {}) {
    load_all(qkv, hidden);
    to_panels(s.k, s.k_panels);
    for_row_tiles(0, tokens, [&](int row, auto m) __attribute__((always_inline)) {
      constexpr int kM = decltype(m)::value;
      times_panels<kM>(s.q + (long)row * wide(), s.k_panels, s.p);
      float inverse[kM];
      for (int r = 0; r < imin(kM, tokens - row); ++r) {
        float* const p = s.p + (long)r * padded();
        float top;
        inverse[r] = seen.template softmax<false>(p, p, row + r, tokens, &top);
        lse[(long)(row + r) * heads] = top - log2f(inverse[r]);
      }
      for (int d = 0; d < wide(); d += kPanel) {
        V acc[kM][2];
        clear(acc);
        accumulate(s.p, padded(), PairPtr{s.v + d, wide()}, tokens, acc);
        for (int r = 0; r < imin(kM, tokens - row); ++r) {
          for (int side = 0; side < 2; ++side) {
            if (d + side * W >= dim) continue;
            const T* type = nullptr;
            const V v = round_as(type, acc[r][side] * inverse[r]);
            store(mixed + (long)(row + r) * hidden + d + side * W, v);
            store(also.at(row0 + row + r, col + d + side * W), v);
          }
        }
      }
    });
  }

  // The gradients of q, k and v as projected, from that of mixed; [T, D] rows from this head on.
  template <class Act, class Seen = SeesAll>
  void backward(const T* qkv, int hidden, const T* mixed, const float* lse, int heads,
                const float* d_mixed, Mat<Act> d_qkv, int row0, int col, Seen seen = {}) {
    load_all(qkv, hidden);
    load_gradient(tokens, dim, d_mixed, mixed, hidden, s.d_out, wide(), s.delta);
    to_panels(s.k, s.k_panels);
    to_panels(s.v, s.v_panels);
    memset(s.d_k, 0, (size_t)padded() * wide() * sizeof(float));
    memset(s.d_v, 0, (size_t)padded() * wide() * sizeof(float));
    for (int first = 0; first < tokens; first += kQueries)
      some_queries(first, imin(kQueries, tokens - first), lse, heads, seen);
    leave_rows(turn(), s.d_q, wide(), scale(), d_qkv, row0, col, true);
    // s.q has the scale already
    leave_rows(turn(), s.d_k, wide(), 1.f / kLog2e, d_qkv, row0, hidden + col, true);
    leave_rows(turn(), s.d_v, wide(), 1.f, d_qkv, row0, 2 * hidden + col, false);
  }

 private:
  void load_all(const T* qkv, int hidden) {
    load_rows(turn(), qkv, 3L * hidden, scale() * kLog2e, true, s.q, wide());
    load_rows(turn(), qkv + hidden, 3L * hidden, 1.f, true, s.k, wide());
    load_rows(turn(), qkv + 2 * hidden, 3L * hidden, 1.f, false, s.v, wide());
  }

  // [T, dim] -> [T / kPanel][dim][kPanel]
  void to_panels(const float* from, float* to) {
    for (int key = 0; key < padded(); key += W)
      for (int d = 0; d < wide(); d += W) {
        V block[W];
        for (int i = 0; i < W; ++i)
          block[i] = key + i < tokens ? load(from + (long)(key + i) * wide() + d) : V{};
        transpose(block);
        float* const out = to + (long)(key / kPanel * wide() + d) * kPanel + key % kPanel;
        for (int i = 0; i < W; ++i) store(out + i * kPanel, block[i]);
      }
  }

  // out [kM, padded] <- kM rows of a times panels
  template <int kM>
  void times_panels(const float* a, const float* panels, float* out) const {
    for (int first = 0; first < padded(); first += kPanel) {
      V acc[kM][2];
      clear(acc);
      accumulate(a, wide(), PairPtr{panels + (long)first * wide(), kPanel}, wide(), acc);
      store_tile(out + first, acc, padded());
    }
  }

  // The share of queries [first, first + count) in all three gradients.
  template <class Seen>
  void some_queries(int first, int count, const float* lse, int heads, Seen seen) {
    for_row_tiles(0, count, [&](int row, auto m) __attribute__((always_inline)) {
      constexpr int kM = decltype(m)::value;
      float *const p = s.p + (long)row * padded(), *const d_s = s.d_s + (long)row * padded();
      times_panels<kM>(s.q + (long)(first + row) * wide(), s.k_panels, p);
      times_panels<kM>(s.d_out + (long)(first + row) * wide(), s.v_panels, d_s);
      for (int r = 0; r < imin(kM, count - row); ++r) {
        const float top = lse[(long)(first + row + r) * heads], delta = s.delta[first + row + r];
        for (int i = r * padded(); i < (r + 1) * padded(); i += W) {
          const VI query = VI{} + (first + row + r), key = lane_numbers() + (i - r * padded());
          const V weight = seen.kept(exp2<false>(load(p + i) - top), query, key);
          store(p + i, weight);
          store(d_s + i, weight * (load(d_s + i) - delta));
        }
      }
    });
    for_row_tiles(0, count, [&](int row, auto m) __attribute__((always_inline)) {
      constexpr int kM = decltype(m)::value;
      for (int d = 0; d < wide(); d += kPanel) {
        V acc[kM][2];
        clear(acc);
        accumulate(s.d_s + (long)row * padded(), padded(), PairPtr{s.k + d, wide()}, tokens, acc);
        store_tile(s.d_q + (long)(first + row) * wide() + d, acc, wide());
      }
    });
    add_over_queries(s.d_s, s.q + (long)first * wide(), count, s.d_k);
    add_over_queries(s.p, s.d_out + (long)first * wide(), count, s.d_v);
  }

  // sum [tokens, wide] += a^T b over `count` queries
  void add_over_queries(const float* a, const float* b, int count, float* sum) {
    for_row_tiles(0, tokens, [&](int row, auto m) __attribute__((always_inline)) {
      constexpr int kM = decltype(m)::value;
      for (int d = 0; d < wide(); d += kPanel) {
        V acc[kM][2];
        clear(acc);
        accumulate_columns(a + row, padded(), PairPtr{b + d, wide()}, count, acc);
        float* const out = sum + (long)row * wide() + d;
#pragma GCC unroll 16
        for (int r = 0; r < kM; ++r) {
          acc[r][0] += load(out + r * wide());
          acc[r][1] += load(out + r * wide() + W);
        }
        store_tile(out, acc, wide());
      }
    });
  }
};

}  // namespace rx::cpu::RX_ISA
