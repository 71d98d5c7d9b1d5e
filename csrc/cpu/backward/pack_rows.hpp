// A row-major matrix as the weight of a product that sums over its rows: C = A X, X [depth, cols].
//
// This is how the backward multiplies by a weight as PyTorch holds it (dx = dy W), and how it sums
// over rows (dW = dy^T x). Each core has its own panels; those of gemm.hpp hold a row's columns.
#pragma once

#include "../layout.hpp"

namespace rx::cpu::RX_ISA {

// The first `count` of W values, then zeros. NOTE: not inlined, or every tile of every product has
// its copy for each row.
template <class T>
static __attribute__((noinline)) V load_part(const T* p, int count) {
  float lane[W] = {};
  for (int i = 0; i < count; ++i) lane[i] = to_float(p[i]);
  return load(lane);
}

// W values as bf16, each in the low half of a lane.
RX_INLINE VU pair_bits(const float* p) { return bf16_bits(load(p)); }
RX_INLINE VU pair_bits(const bf16* p) {
  VH h;
  memcpy(&h, p, sizeof h);
  return __builtin_convertvector(h, VU);
}

// Rows of a matrix by vectors of columns.
template <class T>
struct RowsOf {
  const T* data;
  long ld;
  int cols;  // those that are real; reads past them give zeros
  V operator()(long row, int col) const {
    const T* p = data + row * ld + col;
    return col + W <= cols ? load(p) : load_part(p, cols - col);
  }
  void prefetch(long row, int col) const {
    const char* const p = (const char*)data + (row * ld + col) * (long)sizeof(T);
    __builtin_prefetch(p);
    __builtin_prefetch(p + 64);
  }
  VU bits(long row, int col) const {
    const T* p = data + row * ld + col;
    return col + W <= cols ? pair_bits(p) : bf16_bits(load_part(p, cols - col));
  }
};
template <class T>
struct RowsOfMat {
  Mat<T> m;
  V operator()(long row, int col) const { return load(m.at(row, col)); }
  VU bits(long row, int col) const { return pair_bits(m.at(row, col)); }
};

// The product of depth `depth` with plain columns.
RX_INLINE Linear over_rows(int depth, int cols) { return {Columns::plain, depth, cols, {}}; }

// ---- panels of VectorCore: [depth][columns], fp32 as they are, bf16 with both sides in a lane
// ----

RX_INLINE void store_pair(float* p, V v0, V v1) {
  store(p, v0);
  store(p + W, v1);
}
RX_INLINE void store_pair(bf16* p, V v0, V v1) {
  const VU both = bf16_bits(v0) | bf16_bits(v1) << 16;
  memcpy(p, &both, sizeof both);
}

template <class Weight>
struct FlatPanels {
  static constexpr bool kAtUse = true;
  static Weight* row(const Linear& l, void* weight, int panel, int k) {
    return (Weight*)weight + ((long)panel * l.in + k) * kPanel;
  }
  // A panel takes one or two lines of each row, which processors do not foresee.
  static constexpr int kAhead = 16;
  template <class Source>
  static auto fetch(const Source& x, long row, int col, int) -> decltype(x.prefetch(row, col)) {
    x.prefetch(row, col);
  }
  template <class Source>
  static void fetch(const Source&, long, int, long) {}

  // Writes rows [0, count) of `x` at depth `first` of a panel.
  template <class Source>
  static void run(const Linear& l, void* weight, int panel, int first, int count, Source x) {
    const int col = panel * kPanel;
    for (int r = 0; r < count; ++r) {
      fetch(x, r + kAhead, col, 0);
      store_pair(row(l, weight, panel, first + r), x(r, col), x(r, col + W));
    }
  }
  // Once all rows are there: what the core reads beyond them.
  static void finish(const Linear&, void*, int) {}
};

// ---- panels of cores of bf16 instructions: [32 k][part][side][pair of k][column][k of the pair]
// --------

// Sources that know their bits need no rounding.
template <class Source>
RX_INLINE auto bits_of(const Source& x, long row, int col, int) -> decltype(x.bits(row, col)) {
  return x.bits(row, col);
}
template <class Source>
RX_INLINE VU bits_of(const Source& x, long row, int col, long) {
  return bf16_bits(x(row, col));
}

// The bits of kParts bf16 values whose sum is an element, the largest first.
template <int kParts, class Source>
RX_INLINE void parts_of(const Source& x, long row, int col, VU (&parts)[kParts]) {
  if constexpr (kParts == 1) {
    parts[0] = bits_of(x, row, col, 0);
  } else {
    VH of[kParts];
    cut(x(row, col), of);
#pragma GCC unroll 4
    for (int i = 0; i < kParts; ++i) parts[i] = __builtin_convertvector(of[i], VU);
  }
}

template <int kParts>
struct PartPanels {
  static constexpr bool kAtUse = kParts > 1;  // three parts are larger than what they are made of
  static constexpr int kStep = 32;
  static constexpr long kPart = 2 * kStep * W;  // elements from one part to the next
  static bf16* pairs(const Linear& l, void* weight, int panel, int side, int k) {
    const long step = (long)panel * ceil_div(l.in, kStep) + k / kStep;
    return (bf16*)weight + step * kParts * kPart + (side * (kStep / 2) + k % kStep / 2) * 2 * W;
  }
  template <class Source>
  static void run(const Linear& l, void* weight, int panel, int first, int count, Source x) {
    const int col = panel * kPanel;
    for (int r = 0; r < count;) {
      const int k = first + r;
      const bool whole = k % 2 == 0 && r + 1 < count;
      for (int side = 0; side < 2; ++side) {
        VU one[kParts], other[kParts];
        parts_of(x, r, col + side * W, one);
        if (whole) parts_of(x, r + 1, col + side * W, other);
        for (int i = 0; i < kParts; ++i) {
          bf16* const p = pairs(l, weight, panel, side, k) + i * kPart;
          VU both;
          if (whole) {
            both = one[i] | other[i] << 16;
          } else {  // the other half of the pair came or comes with another stretch of rows
            memcpy(&both, p, sizeof both);
            both = k % 2 ? (both & 0xffffu) | one[i] << 16 : (both & 0xffff0000u) | one[i];
          }
          memcpy(p, &both, sizeof both);
        }
      }
      r += whole ? 2 : 1;
    }
  }
  static void finish(const Linear& l, void* weight, int panel) {
    run(l, weight, panel, l.in, round_up(l.in, kStep) - l.in, [](long, int) { return V{}; });
  }

  // All panels of x^T: rows of x [l.out, l.in] as columns. Its columns are zero from l.in to kStep.
  static void columns(const Linear& l, const bf16* x, long ld, char* to) {
    for (int panel = 0; panel < l.panels(); ++panel)
      for (int side = 0; side < 2; ++side)
        for (int k = 0; k < l.in; k += 2 * W) {
          const int first = panel * kPanel + side * W;
          V block[W];
          for (int i = 0; i < W; ++i)
            block[i] = first + i < l.out ? load((const float*)(x + (first + i) * ld + k)) : V{};
          transpose(block);
          bf16* const out = pairs(l, to, panel, side, k);
          for (int i = 0; i < W; ++i) store((float*)(out + i * 2 * W), block[i]);
        }
  }
};

using PairedPanels = PartPanels<1>;

// to [cols, depth] <- from [count, cols]^T, zero beyond `count` up to a multiple of 2 W. In pairs
// of rows, which are lanes of 32 bits.
static __attribute__((noinline)) void turn_pairs(const bf16* from, long ld, int count, int cols,
                                                 bf16* to, long to_ld) {
  for (int r = 0; r < count; r += 2 * W)
    for (int col = 0; col < cols; col += W) {
      V block[W];
      for (int i = 0; i < W; ++i) {
        const bf16* const p = from + (r + 2 * i) * ld + col;
        const VU even = r + 2 * i < count ? pair_bits(p) : VU{};
        const VU odd = r + 2 * i + 1 < count ? pair_bits(p + ld) : VU{};
        block[i] = (V)(even | odd << 16);
      }
      transpose(block);
      for (int i = 0; i < W; ++i) store((float*)(to + (col + i) * to_ld + r), block[i]);
    }
}

template <class>
struct Exists {
  using type = void;
};
template <class Core, class = void>
struct RowPacker : PairedPanels {};
template <class Core>
struct RowPacker<Core, typename Exists<typename Core::Weight>::type>
    : FlatPanels<typename Core::Weight> {};

// A weight [out, in] as the forward multiplies by it, x W^T: its columns as rows, by W x W blocks.
template <class Core, class T>
RX_INLINE void pack_columns(const Linear& l, const T* data, int panel, void* out) {
  const RowsOf<T> rows{data, l.in, l.in};
  for (int k = 0; k < l.in; k += W) {
    V block[2][W];
    for (int side = 0; side < 2; ++side) {
      for (int lane = 0; lane < W; ++lane) {
        const int row = l.source(panel, side, lane);
        block[side][lane] = row < 0 ? V{} : rows(row, k);
      }
      transpose(block[side]);
    }
    RowPacker<Core>::run(l, out, panel, k, imin(W, l.in - k),
                         [&](long r, int col) { return block[col / W % 2][r]; });
  }
  RowPacker<Core>::finish(l, out, panel);
}

template <class Core>
void pack_linear(const Linear& l, const RawWeight& raw, void* out) {
  for (int panel = 0; panel < l.panels(); ++panel) {
    if (raw.dtype == Dtype::f32) {
      pack_columns<Core>(l, (const float*)raw.data, panel, out);
    } else {
      pack_columns<Core>(l, (const bf16*)raw.data, panel, out);
    }
  }
}

}  // namespace rx::cpu::RX_ISA
