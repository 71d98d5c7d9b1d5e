// What the backward of a variant does to rows and columns between its products.
//
// Each pass over rows is of a thread's own rows; each sum over rows of one column is one thread's,
// in one order, so that bits do not depend on their number.
#pragma once

#include "../pool.hpp"
#include "finishes.hpp"
#include "variant_space.hpp"

namespace rx::cpu::RX_ISA {

// Rows that are summed before their sum is added, twice: gradients of biases cancel, and in sums of
// 32 rows their errors were up to 1.5 times PyTorch's.
constexpr int kPartRows = 8, kMoreRows = 64;

// A gradient that rows are summed into: of a vector, or null where nobody wants it.
struct VectorGradient {
  float* data;
  bool fresh;  // nothing was added yet
};

// to.data[.. + col * stride] (+)= v, of lanes below `count`.
static __attribute__((noinline)) void add_strided(VectorGradient to, long at, long stride, V v,
                                                  int count) {
  float lane[W];
  store(lane, v);
  for (int i = 0; i < imin(W, count); ++i) {
    float* const p = to.data + at + i * stride;
    *p = to.fresh ? lane[i] : *p + lane[i];
  }
}

// to[col] (+)= by * the sum over `rows` rows of f(row, col), for col < width.
template <class F>
void sum_columns(const Team& team, int rows, int width, VectorGradient to, float by, F f) {
  if (!to.data) return;
  constexpr int kSide = 4;
  const Range own = share(round_up(width, W), team.tid, team.size, W);
  for (int first = own.begin; first < own.end; first += kSide * W) {
    const int sides = imin(kSide, (own.end - first) / W);
    V total[kSide] = {}, more[kSide] = {};
    for (int begin = 0; begin < rows; begin += kPartRows) {
      V part[kSide] = {};
      const int end = imin(rows, begin + kPartRows);
      for (int row = begin; row < end; ++row)
        for (int side = 0; side < sides; ++side) part[side] += f(row, first + side * W);
      for (int side = 0; side < sides; ++side) more[side] += part[side];
      if (end % kMoreRows && end < rows) continue;
      for (int side = 0; side < sides; ++side) total[side] += more[side], more[side] = V{};
    }
    for (int side = 0; side < sides; ++side)
      add_strided(to, first + side * W, 1, total[side] * by, width - first - side * W);
  }
}

// ---- norms --------------------------------------------------------------------------------------

// From the gradient d(row, col) of norm(x) to put(row, col, that of x), of `rows` rows of x(row,
// col); the gradients of its weight and bias on the way. All threads meet where columns are summed;
// d may be overwritten by put.
template <class X, class D, class Put>
void norm_backward(const Team& team, const RowNorm& n, int rows, float* stats, float* buffer, X x,
                   D d, Put put, VectorGradient weight = {}, VectorGradient bias = {}) {
  const Range own = share(rows, team.tid, team.size);
  const int wide = round_up(n.width, W), padded = round_up(n.width, kAlign);
  for (int row = own.begin; row < own.end; ++row) {
    for (int col = 0; col < wide; col += W) store(buffer + col, within(x(row, col), col, n.width));
    const RowStats s = n.stats(buffer);
    stats[2 * row] = s.mean;
    stats[2 * row + 1] = s.scale;
  }
  const auto hat = [=](int row, int col) __attribute__((always_inline)) {
    return (x(row, col) - stats[2 * row]) * stats[2 * row + 1];
  };
  if (weight.data || bias.data) {
    team.sync();
    sum_columns(team, rows, n.width, weight, 1.f,
                [=](int row, int col) { return d(row, col) * hat(row, col); });
    sum_columns(team, rows, n.width, bias, 1.f, d);
    team.sync();
  }
  for (int row = own.begin; row < own.end; ++row) {
    V sum{}, products{};
    for (int col = 0; col < wide; col += W) {
      V g = within(d(row, col), col, n.width);
      if (n.weight) g *= load(n.weight + col);
      store(buffer + col, g);
      sum += g;
      products = fma(g, within(hat(row, col), col, n.width), products);
    }
    const float mean = n.kind == Norm::layer ? reduce_add(sum) / n.width : 0.f;
    const float along = reduce_add(products) / n.width, scale = stats[2 * row + 1];
    for (int col = 0; col < padded; col += W) {
      V v{};
      if (col < wide) v = (load(buffer + col) - mean - hat(row, col) * along) * scale;
      put(row, col, within(v, col, n.width));
    }
  }
}

// ---- convolution -------------------------------------------------------------------------------

// Of `columns` of all samples, from x(row, col): d [rows, ld], the gradient of the result, becomes
// that of x; those of its weights are added, [channels, width] and [channels]. Columns are halves
// of `inner` channels, each padded.
struct ConvolutionBackward : Convolution {
  float *d_strip, *sums;

  template <bool kCoarse, class X>
  void backward(Range columns, X x, float* d, long d_ld, VectorGradient d_weight,
                VectorGradient d_bias, int inner) const {
    const int after = width - 1 - width / 2;  // steps from a token to the last that reads it
    float *const totals = sums, *const parts = sums + (width + 1) * kStrip;
    for (int first = columns.begin; first < columns.end; first += kStrip) {
      const int count = imin(kStrip, columns.end - first);
      memset(totals, 0, (size_t)(width + 1) * kStrip * sizeof(float));
      for (int sample = 0; sample < samples; ++sample) {
        float* const rows = d + (long)sample * tokens * d_ld + first;
        read(x, sample, first, count);
        memset(d_strip, 0, (size_t)(tokens + width) * kStrip * sizeof(float));
        memset(parts, 0, (size_t)(width + 1) * kStrip * sizeof(float));
        for (int t = 0; t < tokens; ++t)
          for (int c = 0; c < count; c += W) {
            V v = load(rows + t * d_ld + c);
            if (activates) v *= slope_of<kCoarse>(activation, at(t, c, first));
            store(d_strip + (t + after) * kStrip + c, v);
            for (int j = 0; j < width; ++j)
              add(parts + j * kStrip + c, v * load(strip + (t + j) * kStrip + c));
            add(parts + width * kStrip + c, v);
          }
        for (int i = 0; i < (width + 1) * kStrip; i += W) add(totals + i, load(parts + i));
        for (int t = 0; t < tokens; ++t)
          for (int c = 0; c < count; c += W) {
            V sum{};
            for (int j = 0; j < width; ++j)
              sum = fma(load(d_strip + (t + width - 1 - j) * kStrip + c),
                        load(weight + j * ld + first + c), sum);
            store(rows + t * d_ld + c, sum);
          }
      }
      for (int c = 0; c < count; c += W) {
        const int padded = round_up(inner, kAlign), in_half = (first + c) % padded;
        const int channel = (first + c) / padded * inner + in_half, real = inner - in_half;
        for (int j = 0; d_weight.data && j < width; ++j)
          add_strided(d_weight, (long)channel * width + j, width, load(totals + j * kStrip + c),
                      real);
        if (d_bias.data) add_strided(d_bias, channel, 1, load(totals + width * kStrip + c), real);
      }
    }
  }

 private:
  static void add(float* to, V v) { store(to, load(to) + v); }
};

}  // namespace rx::cpu::RX_ISA
