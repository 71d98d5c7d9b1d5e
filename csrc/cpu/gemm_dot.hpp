// Products with AVX512_BF16's vdpbf16ps or aarch64's BFDOT: bf16 activations and weights, fp32
// accumulators, in AMX's packed layout.
//
//   C[row, column] += A[row, 2k] * B[2k, column] + A[row, 2k + 1] * B[2k + 1, column]
//
// The accumulators of kRows x one panel stay in registers over the whole depth: the error of such a
// sum is that of a chain of fp32 additions, 6e-7 at 1,536, far below a rounding to bf16. A chunk of
// panels lies in L2 while all row tiles use it, and the next chunk is prefetched meanwhile.
#pragma once

#include "attention_dot.hpp"

namespace rx::cpu::RX_ISA {

struct DotCore : PairPanels {
  using State = bf16;
  using Act = bf16;
  static constexpr bool kCoarse = true;  // errors well below a bf16 rounding are free
  static constexpr int kSpareRows = kRows;
  static constexpr int kHeadAlign = kTileDepth;

  struct Scratch {};
  template <class Carver>
  static Scratch carve_scratch(Carver&, int, int) {
    return {};
  }
  static void enter(const Scratch&) {}
  static void leave() {}

  // epilogue(panel) gives finish(row, v0, v1), called for every row of `rows`.
  template <class Epilogue>
  static __attribute__((noinline)) void gemm(const Scratch&, Mat<bf16> a, Range rows,
                                             const Linear& l, const void* weight, Range panels,
                                             const void* next_weight, Epilogue epilogue) {
    if (rows.begin >= rows.end) return;
    const char* const w = (const char*)weight;
    const long panel_size = panel_bytes(l);
    const int per_chunk = imax(1, (int)(RX_L2_CHUNK_BYTES / panel_size));
    const int lines = ceil_div(kPanelStep / 64, ceil_div(rows.end - rows.begin, kRows));
    for (int first = panels.begin; first < panels.end; first += per_chunk) {
      const int last = imin(panels.end, first + per_chunk);
      const bool more = last < panels.end;
      Prefetcher prefetch{more ? w + last * panel_size : (const char*)next_weight, lines};
      for_row_tiles(rows.begin, rows.end, [&](int row, auto m) __attribute__((always_inline)) {
        constexpr int kM = decltype(m)::value;
        for (int panel = first; panel < last; ++panel) {
          const char* b = w + panel * panel_size;
          V acc[kM][2];
          clear(acc);
          for (int k = 0; k < l.in; k += kDepth, b += kDepth / kTileDepth * kPanelStep)
            accumulate_pairs(a.at(row, k), a.ld, b, kTileBytes, kPanelStep,
                             ceil_div(imin(kDepth, l.in - k), 2), acc, prefetch);
          auto finish = epilogue(panel);
#pragma GCC unroll 16
          for (int r = 0; r < kM; ++r) finish(row + r, acc[r][0], acc[r][1]);
        }
      });
    }
  }

  static size_t attention_bytes(int tokens, int head_stride) {
    return HeadTiles::bytes(tokens, head_stride) + (size_t)kRows * round_up(tokens, W) * 4;
  }
  template <class Seen = SeesAll>
  static void attend(const Scratch&, char* memory, const bf16* q, const bf16* k, const bf16* v,
                     int stride, int T, int dim, Range rows, Mat<bf16> mixed, int row0, int col,
                     Seen seen = {}, float* lse = nullptr, int heads = 0) {
    attend_pairs(memory, q, k, v, stride, T, dim, rows, mixed, row0, col, lse, heads, seen);
  }
};

}  // namespace rx::cpu::RX_ISA
