// What the window does to rows between its products: norms, their backward, and turning h over.
#pragma once

#include "pack_rows.hpp"

namespace rx::cpu::RX_ISA {

// to <- from, in the type and the chunks that products read.
template <class T, class Act>
RX_INLINE void to_operand(const T* from, int cols, Range rows, Mat<Act> to) {
  for (int row = rows.begin; row < rows.end; ++row)
    for (int col = 0; col < cols; col += W)
      store(to.at(row, col), load(from + (long)row * cols + col));
}

RX_INLINE float mean_square_scale(const float* x, int padded, int width, float eps) {
  V squares = {};
  for (int col = 0; col < padded; col += W) {
    const V v = load(x + col);
    squares = fma(v, v, squares);
  }
  return 1.f / sqrtf(reduce_add(squares) / width + eps);
}

// out <- rms(x), also as an operand of products; its scale is kept.
template <class T, class Act>
RX_INLINE void norm_rows(const float* x, int width, float eps, Range rows, T* out, Mat<Act> also,
                         float* scale) {
  for (int row = rows.begin; row < rows.end; ++row) {
    const float* const p = x + (long)row * width;
    const float by = mean_square_scale(p, width, width, eps);
    scale[row] = by;
    for (int col = 0; col < width; col += W) {
      const T* type = nullptr;
      const V y = round_as(type, load(p + col) * by);
      store(out + (long)row * width + col, y);
      store(also.at(row, col), y);
    }
  }
}

// d <- scale (d - y mean(d y)): from the gradient of y = rms(x) to that of x; also as an operand.
// `padded` columns, zero from `width` on. The y that was kept is rounded, so that its mean square
// is not quite 1 - eps scale^2: corrected, or what is left of a d along y would be rounding errors.
template <class Y, class Act>
RX_INLINE void norm_rows_backward(float* d, int padded, int width, float eps, Range rows, Y y,
                                  const float* scale, Mat<Act> also) {
  for (int row = rows.begin; row < rows.end; ++row) {
    float* const p = d + (long)row * padded;
    V products = {}, squares = {};
    for (int col = 0; col < padded; col += W) {
      products = fma(load(p + col), y(row, col), products);
      squares = fma(y(row, col), y(row, col), squares);
    }
    const float square = reduce_add(squares) / width;
    const float exact = 1.f - eps * scale[row] * scale[row];
    const float mean = square == 0.f ? 0.f : reduce_add(products) / width * (exact / square);
    for (int col = 0; col < padded; col += W) {
      const V v = (load(p + col) - y(row, col) * mean) * scale[row];
      store(p + col, v);
      store(also.at(row, col), v);
    }
  }
}

// ---- h^T: rows are (sample, column of h), columns are tokens, padded with zeros -----------------

// put(row, t, v): tokens t.. of the columns [columns) of h [samples x tokens, hidden].
template <class T, class Put>
RX_INLINE void turn_in(const T* h, int tokens, int hidden, Range columns, Put put) {
  for (int first = columns.begin; first < columns.end; first += W) {
    const T* const top = h + (long)(first / hidden) * tokens * hidden + first % hidden;
    for (int t = 0; t < round_up(tokens, kAlign); t += W) {
      V block[W];
      for (int j = 0; j < W; ++j)
        block[j] = t + j < tokens ? load(top + (long)(t + j) * hidden) : V{};
      transpose(block);
      for (int j = 0; j < W; ++j) put(first + j, t, block[j]);
    }
  }
}

// The same from rows that are read by from(row, col), `row0` the first.
template <class Rows, class Put>
RX_INLINE void turn_in(const Rows& from, long row0, int tokens, int hidden, Range columns,
                       Put put) {
  for (int first = columns.begin; first < columns.end; first += W) {
    const long top = row0 + (long)(first / hidden) * tokens;
    for (int t = 0; t < round_up(tokens, kAlign); t += W) {
      V block[W];
      for (int j = 0; j < W; ++j)
        block[j] = t + j < tokens ? from(top + t + j, first % hidden) : V{};
      transpose(block);
      for (int j = 0; j < W; ++j) put(first + j, t, block[j]);
    }
  }
}

// h <- get(row, t), the way back.
template <class T, class Get>
RX_INLINE void turn_out(T* h, int tokens, int hidden, Range columns, Get get) {
  for (int first = columns.begin; first < columns.end; first += W) {
    T* const top = h + (long)(first / hidden) * tokens * hidden + first % hidden;
    for (int t = 0; t < tokens; t += W) {
      V block[W];
      for (int j = 0; j < W; ++j) block[j] = get(first + j, t);
      transpose(block);
      for (int j = 0; j < imin(W, tokens - t); ++j) store(top + (long)(t + j) * hidden, block[j]);
    }
  }
}

}  // namespace rx::cpu::RX_ISA
