// What a variant does to rows between its products: one epilogue for all of them, norms with
// weights, and the end of a sublayer. Rows are worked on as fp32 in a buffer of the thread.
#pragma once

#include "activations.hpp"
#include "workspace.hpp"

namespace rx::cpu::RX_ISA {

// ---- the epilogue ------------------------------------------------------------------------------

// What becomes of the two vectors of a panel: with their bias they are stored; or activated and
// stored; or the first, activated, times the second is; or what is there is multiplied by sigmoid.
enum class After { store, activate, gated, multiply };

template <class Act>
struct Finish {
  After after;
  Activation activation;
  Act *p0, *p1;
  long ld0, ld1;               // elements between rows
  const float *bias0, *bias1;  // null for none
  const int* place;            // where a row goes, or null
};

// NOTE: not inlined, so that the products of all variants are one function: see NOTES.md.
template <class Core>
static __attribute__((noinline)) void finish_row(const Finish<typename Core::Act>& f, int row, V v0,
                                                 V v1) {
  constexpr bool kCoarse = Core::kCoarse;
  const long at = f.place ? f.place[row] : row;
  typename Core::Act *const p0 = f.p0 + at * f.ld0, *const p1 = f.p1 + at * f.ld1;
  if (f.bias0) {
    v0 += load(f.bias0);
    v1 += load(f.bias1);
  }
  switch (f.after) {
    case After::gated:
      store(p0, activated<kCoarse>(f.activation, v0) * v1);
      return;
    case After::activate:
      v0 = activated<kCoarse>(f.activation, v0);
      v1 = activated<kCoarse>(f.activation, v1);
      break;
    case After::multiply:
      v0 = sigmoid<kCoarse>(v0) * load(p0);
      v1 = sigmoid<kCoarse>(v1) * load(p1);
      break;
    default:
      break;
  }
  store(p0, v0);
  store(p1, v1);
}

// ---- rows ---------------------------------------------------------------------------------------

// Zeros in the lanes from column `width` on.
RX_INLINE V within(V x, int col, int width) {
  if (col + W <= width) return x;
  return lane_numbers() + col < width ? x : V{};
}

template <class Act>
RX_INLINE void load_row(Mat<Act> from, long row, int width, float* to) {
  for (int col = 0; col < round_up(width, kAlign); col += W)
    store(to + col, within(load(from.at(row, col)), col, width));
}

template <class Act>
RX_INLINE void store_row(const float* from, int width, Mat<Act> to, long row) {
  for (int col = 0; col < round_up(width, kAlign); col += W)
    store(to.at(row, col), load(from + col));
}

struct RowStats {
  float mean, scale;
};

// A norm over `width` values; weights of round_up(width, kAlign), or null.
struct RowNorm {
  Norm kind;
  int width;
  float eps;
  const float *weight, *bias;

  // Of a row with zeros after it.
  RowStats stats(const float* x) const {
    RowStats s{0.f, 0.f};
    if (kind == Norm::layer) {
      V sum{};
      for (int col = 0; col < width; col += W) sum += load(x + col);
      s.mean = reduce_add(sum) / width;
    }
    V squares{};
    for (int col = 0; col < width; col += W) {
      const V v = within(load(x + col) - s.mean, col, width);
      squares = fma(v, v, squares);
    }
    s.scale = 1.f / sqrtf(reduce_add(squares) / width + eps);
    return s;
  }

  // In place; zeros come after the row.
  __attribute__((noinline)) void apply(float* x) const {
    const RowStats s = stats(x);
    for (int col = 0; col < round_up(width, W); col += W) {
      V v = (load(x + col) - s.mean) * s.scale;
      if (weight) v *= load(weight + col);
      if (bias) v += load(bias + col);
      store(x + col, within(v, col, width));
    }
  }
};

// The norm of a block that has its weight in vector `weight`, and its bias in the next if it may.
RX_INLINE RowNorm norm_of(const PackedBlock& block, Norm kind, int width, int weight) {
  const bool biased = weight != q_norm && weight != k_norm && weight < attn_norm;
  return {kind, width, block.shape.eps, block.vector[weight],
          biased ? block.vector[weight + 1] : nullptr};
}

// The factor of an operand of a residual sum: one for all columns, or one a column.
struct Factor {
  float one;
  const float* each;  // [width] instead of `one`, or null

  V at(int col) const { return each ? load(each + col) : splat(one); }
  bool matters() const { return each || one != 1.f; }
};

// a h + s f and its norms, as a placement has them.
struct SublayerEnd {
  Placement placement;
  RowNorm norm, out_norm;
  Factor scale, skip;
  Drops drops;

  // x <- what leaves a sublayer that the row h(col) entered and whose result is x, zeros after it.
  // Rows are counted from the block's first sample on; they are columns of h if `turned`.
  template <class H>
  void finish(float* x, H h, long row, bool turned) const {
    const int width = norm.width;
    if (placement == Placement::sandwich) out_norm.apply(x);
    if (drops.matter()) turned ? drops.of_column(row, x) : drops.of_row(row, x);
    for (int col = 0; col < width; col += W) {
      const V kept = h(col) * skip.at(col);
      store(x + col, within(fma(load(x + col), scale.at(col), kept), col, width));
    }
    if (placement == Placement::post) norm.apply(x);
  }

  // to[row] <- what leaves of h[row] and f[f_row]; `column` not -1: the column of h that this is.
  template <class Act>
  void run(Mat<Act> h, Mat<Act> f, long row, long f_row, Mat<Act> to, float* x,
           long column = -1) const {
    load_row(f, f_row, norm.width, x);
    finish(
        x, [&](int col) { return load(h.at(row, col)); }, column < 0 ? row : column, column >= 0);
    store_row(x, norm.width, to, row);
  }
};

// Of sublayer 1, the mixer, or 2, the MLP over D.
RX_INLINE SublayerEnd end_of(const PackedBlock& block, int number, int width,
                             const Drops& drops = {}) {
  const Variant& v = block.shape.variant;
  const int weight = number == 1 ? norm1 : norm2, scale = number == 1 ? scale1 : scale2;
  return {v.placement,
          norm_of(block, v.norm, width, weight),
          norm_of(block, v.norm, width, weight + 2),
          {v.residual_scale, block.vector[scale]},
          {v.skip_scale, block.vector[number == 1 ? skip1 : skip2]},
          drops};
}

// place[row] <- where a row lies when the tokens of a column of the grid are neighbours.
RX_INLINE void find_places(int grid_rows, int grid_columns, int rows, int rows_pad, int* place) {
  for (int row = 0; row < rows_pad; ++row) {
    const int t = row % (grid_rows * grid_columns);
    place[row] = row < rows ? row - t + t % grid_columns * grid_rows + t / grid_columns : row;
  }
}

// ---- convolution -------------------------------------------------------------------------------

constexpr int kStrip = 4 * W;  // columns that are convolved at once

// act(bias[c] + sum_j weight[j][c] x[t - width / 2 + j, c]) of each sample's tokens, zeros outside.
struct Convolution {
  int samples, tokens, width;
  const float *weight, *bias;
  long ld;  // of weight: floats between taps
  bool activates;
  Activation activation;
  float* strip;  // [tokens + width][kStrip]

  // put(row, col, result) for all rows of `columns`; it may overwrite what x(row, col) read.
  template <bool kCoarse, class X, class Put>
  __attribute__((noinline)) void forward(Range columns, X x, Put put) const {
    const Convolution c = *this;  // a store might change members, as far as a compiler knows
    for (int sample = 0; sample < c.samples; ++sample)
      for (int first = columns.begin; first < columns.end; first += kStrip) {
        const int count = imin(kStrip, columns.end - first);
        c.read(x, sample, first, count);
        for (int t = 0; t < c.tokens; ++t)
          for (int i = 0; i < count; i += W) {
            const V v = c.at(t, i, first);
            put((long)sample * c.tokens + t, first + i,
                c.activates ? activated<kCoarse>(c.activation, v) : v);
          }
      }
  }

  V at(int t, int c, int first) const {
    V sum = load(bias + first + c);
    for (int j = 0; j < width; ++j)
      sum = fma(load(strip + (t + j) * kStrip + c), load(weight + j * ld + first + c), sum);
    return sum;
  }
  // strip <- x with its zeros on both sides.
  template <class X>
  void read(X x, int sample, int first, int count) const {
    const int before = width / 2;
    for (int t = 0; t < tokens + width; ++t) {
      const bool inside = t >= before && t < before + tokens;
      for (int c = 0; c < count; c += W)
        store(strip + t * kStrip + c,
              inside ? x((long)sample * tokens + t - before, first + c) : V{});
    }
  }
};

}  // namespace rx::cpu::RX_ISA
