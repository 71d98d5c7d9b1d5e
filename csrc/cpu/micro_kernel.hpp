// The inner loop of every product without AMX: kM rows x one panel, accumulators in registers.
#pragma once

#include "layout.hpp"

namespace rx::cpu::RX_ISA {

constexpr int kRows = RX_ROW_TILE;  // rows x 2 accumulators fill the register file

struct PairPtr {  // two separate vectors of fp32 columns
  const float* p;
  long ld;
  void read(long k, V& b0, V& b1) const {
    b0 = load(p + k * ld);
    b1 = load(p + k * ld + W);
  }
};

struct PackedPairs {  // bf16 of column j in the low half of lane j, of its partner in the high half
  const bf16* p;
  void read(long k, V& b0, V& b1) const {
    VU u;
    memcpy(&u, p + k * kPanel, sizeof u);
    b0 = (V)(u << 16);
    b1 = (V)(u & 0xffff0000u);
  }
};

template <class T>
struct PanelReader;
template <>
struct PanelReader<float> {
  static PairPtr at(const float* p) { return {p, kPanel}; }
};
template <>
struct PanelReader<bf16> {
  static PackedPairs at(const bf16* p) { return {p}; }
};

// Lines that products touch later, fetched into L2 one by one meanwhile: a step for each k.
struct Ahead {
  const char *next, *end;
  int period;  // steps from one line to the next
  int wait;
  void step() {
    if (--wait > 0 || next >= end) return;
    __builtin_prefetch(next, 0, 2);
    next += 64;
    wait = period;
  }
};
struct Nothing {
  void step() {}
};

// acc[r] += A[r, 0..depth) * B, for kM rows.
template <int kM, class B, class Beside>
RX_INLINE void accumulate(const float* a, long lda, B b, int depth, V (&acc)[kM][2],
                          Beside& beside) {
  for (int k = 0; k < depth; ++k) {
    V b0, b1;
    b.read(k, b0, b1);
    beside.step();
#pragma GCC unroll 16
    for (int r = 0; r < kM; ++r) {
      V x = splat(a[r * lda + k]);
      acc[r][0] = fma(x, b0, acc[r][0]);
      acc[r][1] = fma(x, b1, acc[r][1]);
    }
  }
}

template <int kM, class B>
RX_INLINE void accumulate(const float* a, long lda, B b, int depth, V (&acc)[kM][2]) {
  Nothing nothing;
  accumulate(a, lda, b, depth, acc, nothing);
}

template <int kM, int kN>
RX_INLINE void clear(V (&acc)[kM][kN]) {
#pragma GCC unroll 16
  for (int r = 0; r < kM; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < kN; ++v) acc[r][v] = V{};
}

template <int kM, int kN>
RX_INLINE void store_tile(float* out, const V (&acc)[kM][kN], long ld) {
#pragma GCC unroll 16
  for (int r = 0; r < kM; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < kN; ++v) store(out + r * ld + v * W, acc[r][v]);
}

template <int kM>
RX_INLINE void add_tile(V (&acc)[kM][2], const float* in) {
#pragma GCC unroll 16
  for (int r = 0; r < kM; ++r) {
    acc[r][0] += load(in + r * kPanel);
    acc[r][1] += load(in + r * kPanel + W);
  }
}

// Calls tile(row, rows as a compile-time constant) over rows [begin, end), by tiles of kRows and
// kRows - 1 rows so that few rows are padding, or by one or two of kFewRows (17 are 9 + 8, not
// 13 + 4). NOTE: the last tile may run up to kRows - 1 rows
// over; every activation buffer has that many rows to spare.
template <int kM>
struct Rows {
  static constexpr int value = kM;
};
constexpr int kFewRows = 5 * kRows / 8 + 1;
template <class Tile>
RX_INLINE void for_row_tiles(int begin, int end, Tile tile) {
  const int rows = end - begin;
  if (rows <= kFewRows || (rows > kRows && rows <= 2 * kFewRows)) {
    for (int row = begin; row < end; row += kFewRows) tile(row, Rows<kFewRows>());
    return;
  }
  int tiles = ceil_div(end - begin, kRows);
  int shorter = imin(tiles, tiles * kRows - (end - begin));
  for (int i = 0, row = begin; i < tiles; ++i) {
    if (i < tiles - shorter) {
      tile(row, Rows<kRows>());
      row += kRows;
    } else {
      tile(row, Rows<kRows - 1>());
      row += kRows - 1;
    }
  }
}

}  // namespace rx::cpu::RX_ISA
