// Products without AMX: fp32 activations, weights stored in the state's type (fp32 or bf16).
//
//   C[row, pair] = sum_k A[row, k] * B[k, pair]          then an epilogue on each pair of vectors
//
// A row tile of A (kRows x 512 floats) stays in L1 while packed panels stream linearly from L2; a
// chunk of panels small enough for L2 serves all row tiles before the next one is touched. bf16 is
// storage only: two columns share a 32-bit lane and are split by one shift and one mask.
#pragma once

#include "attention.hpp"

namespace rx::cpu::RX_ISA {

constexpr long kChunkBytes = RX_L2_CHUNK_BYTES;  // panels per chunk: about half of L2

template <class StateType>
struct VectorCore {
  using State = StateType;
  using Act = float;
  using Weight = State;
  // Products are summed over this depth, then the sums: the rounding error of one fp32 sum over
  // 512 is 1.7x that of PyTorch's blocked products. bf16 weights have far larger errors.
  static constexpr int kSum = sizeof(State) == 4 ? 128 : kDepth;
  static constexpr bool kVariants = true;
  static constexpr bool kCoarse = false;  // exponentials and reciprocals to fp32 accuracy
  static constexpr int kSpareRows = kRows;
  static constexpr int kHeadAlign = kPanel;  // heads are padded to this many columns

  struct Scratch {
    float* partial;  // accumulators of a chunk of panels, between K chunks
  };
  static constexpr int kMaxChunk = 64;  // panels
  template <class Carver>
  static Scratch carve_scratch(Carver& carver, int, int) {
    return {carver.template take<float>(kMaxChunk * kRows * kPanel)};
  }

  // The next chunk, in steps of k that read kLines lines of this one in every row tile. With
  // AVX-512 products would wait for a server's last cache; elsewhere the processor's own prefetcher
  // follows these streams.
  static Ahead ahead_of(const Weight* next, long count, int rows) {
    const int kLines = imax(1, kPanel * sizeof(Weight) / 64);
    const int period = imax(1, ceil_div(rows, kRows) / kLines);
    return {(const char*)next, (const char*)(next + count), period, period};
  }

  static void enter(const Scratch&) {}
  static void leave() {}

  static size_t attention_bytes(int tokens, int head_stride) {
    return (size_t)round_up(tokens, kPanel) * (head_stride + kRows) * sizeof(float);
  }
  template <class Seen = SeesAll>
  static void attend(const Scratch&, char* memory, const float* q, const float* k, const float* v,
                     int stride, int T, int dim, Range rows, Mat<float> mixed, int row0, int col,
                     Seen seen = {}) {
    attend_head((float*)memory, q, k, v, stride, T, dim, rows, mixed, row0, col, seen);
  }

  static size_t linear_bytes(const Linear& l) {
    return (size_t)l.panels() * kPanel * l.in * sizeof(Weight);
  }

  static const void* panel_at(const Linear& l, const void* weight, int panel) {
    return (const Weight*)weight + (long)panel * l.in * kPanel;
  }

  // epilogue(panel) gives finish(row, v0, v1), called for every row of `rows`.
  template <class Epilogue>
  static __attribute__((noinline)) void gemm(const Scratch& scratch, Mat<float> a, Range rows,
                                             const Linear& l, const void* weight, Range panels,
                                             const void* next_weight, Epilogue epilogue) {
    const Weight* w = (const Weight*)weight;
    const long panel_size = (long)l.in * kPanel;
    const int per_chunk =
        imax(1, imin(kMaxChunk, (int)(kChunkBytes / (panel_size * sizeof(Weight)))));
    for (int first = panels.begin; first < panels.end; first += per_chunk) {
      const int last = imin(panels.end, first + per_chunk);
#if RX_PREFETCH
      const Weight* const after =
          last < panels.end ? w + last * panel_size : (const Weight*)next_weight;
      Ahead ahead = ahead_of(after, per_chunk * panel_size, rows.end - rows.begin);
#else
      Nothing ahead;
#endif
      for_row_tiles(rows.begin, rows.end, [&](int row, auto m) __attribute__((always_inline)) {
        constexpr int kM = decltype(m)::value;
        for (int k = 0; k < l.in; k += kDepth) {
          const int depth = imin(kDepth, l.in - k);
          for (int panel = first; panel < last; ++panel) {
            const Weight* b = w + panel * panel_size + (long)k * kPanel;
            float* partial = scratch.partial + (panel - first) * kM * kPanel;
            V acc[kM][2];
            for (int s = 0; s < depth; s += kSum) {
              clear(acc);
              accumulate(a.at(row, k + s), a.ld, PanelReader<Weight>::at(b + (long)s * kPanel),
                         imin(kSum, depth - s), acc, ahead);
              if (k + s > 0) add_tile(acc, partial);
              if (s + kSum < depth) store_tile(partial, acc, kPanel);
            }
            if (k + depth < l.in) {
              store_tile(partial, acc, kPanel);
            } else {
              auto finish = epilogue(panel);
#pragma GCC unroll 16
              for (int r = 0; r < kM; ++r) finish(row + r, acc[r][0], acc[r][1]);
            }
          }
        }
      });
    }
  }
};

}  // namespace rx::cpu::RX_ISA
