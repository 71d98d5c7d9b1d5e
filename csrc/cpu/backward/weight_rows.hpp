// Weights as the backward multiplies by them, dx = dy W: row by row, as PyTorch holds them.
#pragma once

#include "pack_rows.hpp"

namespace rx::cpu::RX_ISA {

// Of a gradient's row: what rows of several panels' width leave of an L2.
constexpr int kSliceBytes = 2048;

// A product of a block as its gradient sees it. Gate and up rows are padded, each to kAlign.
struct Product {
  int in, out;   // as in the weight [out, in]
  bool gate_up;  // two halves
  bool adds;     // whether dx is added to what is there
  int half() const { return gate_up ? out / 2 : out; }
  int padded_half() const { return round_up(half(), kAlign); }
  int padded_out() const { return gate_up ? 2 * padded_half() : padded_half(); }
  // dx = dy W sums over the rows of the weight.
  int depth() const { return gate_up ? padded_out() : out; }
  // A deep sum that is added goes slice by slice, so that the rows of dy stay in L2 while the
  // weight streams through: a multiple of kDepth, unless it is all.
  template <class Core>
  int slice_depth() const {
    constexpr int kMost = kSliceBytes / sizeof(typename Core::Act);
    static_assert(kMost % kDepth == 0, "slices begin where a chunk of columns does");
    return adds ? imin(depth(), kMost) : depth();
  }
  // Of the slice that begins at row `begin`.
  template <class Core>
  Linear slice(int begin) const {
    return over_rows(imin(slice_depth<Core>(), depth() - begin), in);
  }
};
RX_INLINE Product product_of(const BlockShape& s, int which) {
  const Linear l = linear_of(s, which);
  return {l.in, l.out, l.columns == Columns::gate_up, which == mixer_in || which == gate_up};
}

// Panel `panel` of the slice at `begin` of a weight, as panel `at` of `to`.
template <class Core, class T>
RX_INLINE void pack_slice(const Product& p, int begin, const T* data, int panel, void* to, int at) {
  const Linear l = p.template slice<Core>(begin);
  const int skipped = (panel - at) * kPanel;  // columns
  const int period = p.gate_up ? p.padded_half() : p.depth();
  for (int k = begin; k < begin + l.in;) {
    const int part = k / period, row = k % period;
    const int padding = imax(k, part * period + p.half());
    const int end = imin(begin + l.in, (part + 1) * period), real = imin(padding, end);
    const RowsOf<T> rows{data + ((long)part * p.half() + row) * p.in + skipped, p.in,
                         p.in - skipped};
    RowPacker<Core>::run(l, to, at, k - begin, real - k, rows);
    RowPacker<Core>::run(l, to, at, real - begin, end - real, [](long, int) { return V{}; });
    k = end;
  }
  RowPacker<Core>::finish(l, to, at);
}

template <class Core>
void pack_panel(const Product& p, int begin, const RawWeight& raw, int panel, void* to, int at) {
  if (raw.dtype == Dtype::f32) {
    pack_slice<Core>(p, begin, (const float*)raw.data, panel, to, at);
  } else {
    pack_slice<Core>(p, begin, (const bf16*)raw.data, panel, to, at);
  }
}

// Whether panels are packed where a product reads them, a few at a time: what would need as much
// memory as the weights. What is rounded to pairs of bf16 is packed once.
template <class Core>
constexpr bool packs_at_use() {
  return RowPacker<Core>::kAtUse;
}

// Panels of one product that are packed at once.
template <class Core>
RX_INLINE int panels_at_once(const Linear& l) {
  const long one = Core::linear_bytes(l) / l.panels();
  return imax(1, (int)(RX_L2_CHUNK_BYTES / one));
}

}  // namespace rx::cpu::RX_ISA
