// Rows of one head on their way into a window's attention, and of their gradients out of it: turned
// by the rotary tables, scaled and padded.
#pragma once

#include "../layout.hpp"

namespace rx::cpu::RX_ISA {

struct Rotary {
  int tokens, dim;
  const float *cos, *sin;  // [T, dim] or null
  bool by_vectors() const { return dim / 2 % W == 0; }
};

// to [T, wide] <- by * the rotation of from, zero from dim on: scratch may hold what another shape
// left there.
template <class T, class To>
static __attribute__((noinline)) void load_rows(const Rotary& by_angle, const T* from, long stride,
                                                float by, bool rotate, To* to, int wide) {
  const int dim = by_angle.dim, half = dim / 2;
  rotate = rotate && by_angle.cos;
  for (int row = 0; row < by_angle.tokens; ++row) {
    const T* const x = from + row * stride;
    To* const y = to + (long)row * wide;
    const float* const c = rotate ? by_angle.cos + (long)row * dim : nullptr;
    const float* const n = rotate ? by_angle.sin + (long)row * dim : nullptr;
    if (!rotate) {
      for (int j = 0; j < dim; j += W) store(y + j, load(x + j) * by);
    } else if (by_angle.by_vectors()) {
      for (int j = 0; j < half; j += W) {
        const V a = load(x + j), b = load(x + j + half);
        store(y + j, (a * load(c + j) - b * load(n + j)) * by);
        store(y + j + half, (b * load(c + j + half) + a * load(n + j + half)) * by);
      }
    } else {
      for (int j = 0; j < half; ++j) {
        const float a = to_float(x[j]), b = to_float(x[j + half]);
        store_one(y + j, (a * c[j] - b * n[j]) * by);
        store_one(y + j + half, (b * c[j + half] + a * n[j + half]) * by);
      }
    }
    for (int j = dim; j < wide; ++j) store_one(y + j, 0.f);
  }
}

// to [.., col..] <- by * the rotation's transpose of d [T, wide].
template <class Act>
static __attribute__((noinline)) void leave_rows(const Rotary& by_angle, const float* d, int wide,
                                                 float by, Mat<Act> to, int row0, int col,
                                                 bool rotate) {
  const int dim = by_angle.dim, half = dim / 2;
  const bool turned = rotate && by_angle.cos;
  for (int row = 0; row < by_angle.tokens; ++row) {
    const float* const g = d + (long)row * wide;
    const float* const c = turned ? by_angle.cos + (long)row * dim : nullptr;
    const float* const n = turned ? by_angle.sin + (long)row * dim : nullptr;
    if (!turned) {
      for (int j = 0; j < dim; j += W) store(to.at(row0 + row, col + j), load(g + j) * by);
    } else if (by_angle.by_vectors()) {
      for (int j = 0; j < half; j += W) {
        const V a = load(g + j), b = load(g + j + half);
        store(to.at(row0 + row, col + j), (a * load(c + j) + b * load(n + j + half)) * by);
        store(to.at(row0 + row, col + j + half), (b * load(c + j + half) - a * load(n + j)) * by);
      }
    } else {
      float y[256];
      for (int j = 0; j < half; ++j) {
        y[j] = (g[j] * c[j] + g[j + half] * n[j + half]) * by;
        y[j + half] = (g[j + half] * c[j + half] - g[j] * n[j]) * by;
      }
      for (int j = 0; j < dim; j += W) store(to.at(row0 + row, col + j), load(y + j));
    }
  }
}

// delta [T] <- the sums over a row of d_out * mixed, and d_out [T, wide] as attention reads it.
template <class T, class To>
static __attribute__((noinline)) void load_gradient(int tokens, int dim, const float* d_mixed,
                                                    const T* mixed, int hidden, To* d_out, int wide,
                                                    float* delta) {
  const To* type = nullptr;
  for (int row = 0; row < tokens; ++row) {
    V sum = {};
    To* const y = d_out + (long)row * wide;
    for (int j = 0; j < dim; j += W) {
      const V g = round_as(type, load(d_mixed + (long)row * hidden + j));
      store(y + j, g);
      sum = fma(g, load(mixed + (long)row * hidden + j), sum);
    }
    delta[row] = reduce_add(sum);
    for (int j = dim; j < wide; ++j) store_one(y + j, 0.f);
  }
}

}  // namespace rx::cpu::RX_ISA
