// Products of fp32 by AMX: each operand is cut into three bf16 (8 bits of the significand each, so
// that they sum to it exactly), and of their nine products six are formed. Those left out are below
// 2^-24 of a product, the rounding that fp32 itself has. A multiply-add then costs six of bf16,
// which AMX has at sixteen times the rate of fp32's.
//
//   a row of A: [chunks of kChunkSteps][rows][steps of 32 k][part][32]
//   a panel:    [steps of 32 k][part] as in pairs.hpp
//
// NOTE: an infinity has the parts inf and NaN, so its products are NaN; so are those of a number
// beyond 3.39e38, whose first part rounds to one. An element below 2^-110 loses bits of its last
// part, which AMX takes for zero.
#pragma once

#include "backward/pack_rows.hpp"
#include "gemm.hpp"
#include "gemm_amx.hpp"

namespace rx::cpu::RX_ISA {

constexpr int kSplitParts = 3;

// The largest product last, so that a number times a power of two is exact. Each differs from the
// one before in one operand, which is loaded.
struct SplitTiles : Bf16Tiles {
  static constexpr int kParts = 6;
  static constexpr int row_part(int i) { return i == 0 ? 2 : i < 3 ? 1 : 0; }
  static constexpr int panel_part(int i) { return i < 2 || i == 5 ? 0 : i == 4 ? 2 : 1; }
  static constexpr long kRowStep = kSplitParts * 64, kStep = kSplitParts * kPanelStep;
  static constexpr int kChunkSteps = 4;  // two row tiles of three parts are 24 KB
  static constexpr int kRowsAStep = 6;
};

struct SplitCore : VectorCore<float> {
  static constexpr int kSpareRows = AmxCore::kSpareRows;
  static constexpr long kChunkRow = SplitTiles::kChunkSteps * SplitTiles::kRowStep;
  static constexpr long kMostParts = 1 << 20;  // bytes of the rows that are cut at once, in L2

  struct Scratch : VectorCore<float>::Scratch {
    AmxCore::Scratch tiles;
    char* parts;
    long bytes;
  };
  static int chunks(int depth) { return ceil_div(depth, SplitTiles::kChunkSteps * kTileDepth); }
  // `rows`: 0 if there may be any number.
  template <class Carver>
  static Scratch carve_scratch(Carver& carver, int rows, int depth) {
    Scratch s{};
    s.tiles = AmxCore::carve_scratch(carver, rows, depth);
    const long row = chunks(depth) * kChunkRow, all = round_up(rows, 32) * row;
    s.bytes = rows && all < kMostParts ? all : kMostParts;
    if (s.bytes < 32 * row) s.bytes = 32 * row;
    s.parts = carver.template take<char>(s.bytes);
    return s;
  }
  static void enter(const Scratch& s) { AmxCore::enter(s.tiles); }
  static void leave() { AmxCore::leave(); }

  static long panel_bytes(const Linear& l) { return kSplitParts * PairPanels::panel_bytes(l); }
  static size_t linear_bytes(const Linear& l) { return (size_t)l.panels() * panel_bytes(l); }
  static const void* panel_at(const Linear& l, const void* weight, int panel) {
    return (const char*)weight + panel * panel_bytes(l);
  }

  // epilogue(panel) gives finish(row, v0, v1), called for every row of `rows`.
  template <class Epilogue>
  static __attribute__((noinline)) void gemm(const Scratch& s, Mat<float> a, Range rows,
                                             const Linear& l, const void* weight, Range panels,
                                             const void* next_weight, Epilogue epilogue) {
    const int most = (int)(s.bytes / (chunks(l.in) * kChunkRow)) / 32 * 32;
    for (Range some{rows.begin, 0}; some.begin < rows.end; some.begin = some.end) {
      some.end = imin(rows.end, some.begin + most);
      const int count = round_up(some.end - some.begin, 32);
      cut_rows(a, some, l.in, s.parts, count);
      const char* const parts = s.parts;
      const int first = some.begin;
      const auto row_at = [=](int row, int step) __attribute__((always_inline)) {
        return parts + ((long)step / SplitTiles::kChunkSteps * count + row - first) * kChunkRow;
      };
      AmxCore::multiply<SplitTiles>(s.tiles, row_at, kChunkRow, some, PairPanels::steps(l), weight,
                                    panel_bytes(l), panels,
                                    some.end < rows.end ? weight : next_weight, epilogue);
    }
  }

  // The parts of rows of `a`, zero from `depth` up to a whole step; `count` rows a chunk.
  static void cut_rows(Mat<float> a, Range rows, int depth, char* parts, int count) {
    constexpr int kChunk = SplitTiles::kChunkSteps * kTileDepth;
    for (int row = rows.begin; row < rows.end; ++row, parts += kChunkRow) {
      for (int k = 0; k < round_up(depth, kTileDepth); k += W) {
        char* const to = parts + (long)(k / kChunk) * count * kChunkRow +
                         k % kChunk / kTileDepth * SplitTiles::kRowStep +
                         k % kTileDepth * sizeof(bf16);
        VH of[kSplitParts];
        cut(k + W <= depth ? load(a.at(row, k)) : load_part(a.at(row, k), depth - k), of);
#pragma GCC unroll 4
        for (int i = 0; i < kSplitParts; ++i) memcpy(to + i * 64, &of[i], sizeof of[i]);
      }
    }
  }
};

template <>
struct RowPacker<SplitCore, void> : PartPanels<kSplitParts> {};

}  // namespace rx::cpu::RX_ISA
