// Products with AMX: bf16 activations and weights, fp32 accumulators.
//
// Two row tiles x one panel (two column tiles) at a time. A row group (two tiles x 512 deep, 28 to
// 32 KB) stays in L1 while packed panels stream linearly from L2 with the T1 hint: 95 % of the tile
// rate, against 65-75 % for the textbook order, whose B panel and A stream overflow L1.
//
// Nothing waits for a tile store: the accumulators of a block are stored between the first
// products of the next one, and its epilogue runs row by row inside the next one's k loop, where
// the vector units idle. The panels of the next chunk are prefetched into L2 meanwhile.
#pragma once

#include "attention_amx.hpp"
#include "tile.hpp"

namespace rx::cpu::RX_ISA {

constexpr int kBlockBytes = 4 * kTileBytes;  // accumulators of a block

// A block whose accumulators are still in tiles 0-3.
struct Pending {
  char* tile = nullptr;  // where they go; null: there is none
  int panel = 0, row = 0, tiles = 0;
  bool finish = false;  // whether this was the last K chunk
};

// A product whose operands have one part each: a step multiplies one tile of a row by one of B.
struct OnePart {
  static constexpr int kParts = 1;
  static constexpr int row_part(int) { return 0; }
  static constexpr int panel_part(int) { return 0; }
  static constexpr long kRowStep = 64, kStep = kPanelStep;  // bytes of a row and a panel a step
  static constexpr int kChunkSteps = kDepth / kTileDepth;   // whose row tiles stay in L1
};

// What a tile of B is, of kPanelStep bytes of a panel, and how it is multiplied.
struct Bf16Tiles : OnePart {  // [16 pairs of k][16 columns][2], one side after the other
  static constexpr long kLine = 64, kOtherSide = kTileBytes;
  static constexpr int kRowsAStep = 1;  // of the pending block, finished meanwhile
  template <int kC, int kA, int kB>
  RX_INLINE void dot() {
    tile_dot<kC, kA, kB>();
  }
};

struct Block2x2 {
  const char *a0, *a1;  // row tiles
  long lda;             // bytes
  const char* b;        // panel
  int steps;
  const char* partial;  // accumulators of the K chunks before, or null
  int rows;             // of a tile
};

// Operands of a part of a step; those of the part before stay where they are.
template <class Tiles, bool kTwo, int kPart>
RX_INLINE void load_operands(const Block2x2& block, int step) {
  constexpr int kRow = Tiles::row_part(kPart), kPanelPart = Tiles::panel_part(kPart);
  constexpr bool kNewA = kPart == 0 || kRow != Tiles::row_part(kPart - 1);
  constexpr bool kNewB = kPart == 0 || kPanelPart != Tiles::panel_part(kPart - 1);
  const char* const b = block.b + step * Tiles::kStep + kPanelPart * kPanelStep;
  const long a = step * Tiles::kRowStep + kRow * 64;
  if (kNewB) tile_stream<6>(b, Tiles::kLine);
  if (kNewA) tile_load<4>(block.a0 + a, block.lda);
  if (kNewA && kTwo) tile_load<5>(block.a1 + a, block.lda);
  if (kNewB) tile_stream<7>(b + Tiles::kOtherSide, Tiles::kLine);
}

// Tiles 0-3 += the parts of a step from kPart on.
template <class Tiles, bool kTwo, int kPart>
RX_INLINE void multiply_parts(const Block2x2& block, int step) {
  if constexpr (kPart < Tiles::kParts) {
    load_operands<Tiles, kTwo, kPart>(block, step);
    Tiles::template dot<0, 4, 6>();
    Tiles::template dot<1, 4, 7>();
    if (kTwo) {
      Tiles::template dot<2, 5, 6>();
      Tiles::template dot<3, 5, 7>();
    }
    multiply_parts<Tiles, kTwo, kPart + 1>(block, step);
  }
}

// Store what the pending block left in tile kC, then start the new sum there.
template <class Tiles, int kC, int kA, int kB>
RX_INLINE void turn_over(const Block2x2& block, const Pending& pending) {
  if (pending.tile && (kC < 2 || pending.tiles == 2))
    tile_store<kC>(pending.tile + kC * kTileBytes, 64);
  if (kA == 0) return;  // only stores
  if (block.partial) {
    tile_load<kC>(block.partial + kC * kTileBytes, 64);
  } else {
    tile_zero<kC>();
  }
  Tiles::template dot<kC, kA, kB>();
}

template <class Finish>
RX_INLINE void finish_row(const Pending& pending, int rows, int r, Finish& finish) {
  const float* tile = (const float*)pending.tile + r * 16;
  constexpr int kNext = kTileBytes / sizeof(float);
  finish(pending.row + r, load(tile), load(tile + kNext));
  if (pending.tiles == 2)
    finish(pending.row + rows + r, load(tile + 2 * kNext), load(tile + 3 * kNext));
}

// Tiles 0-3 <- the block's products; meanwhile stores and finishes the pending block.
template <class Tiles, bool kTwo, class Finish>
RX_INLINE void multiply_block(const Block2x2& block, const Pending& pending, Prefetcher& prefetch,
                              Finish finish) {
  load_operands<Tiles, kTwo, 0>(block, 0);
  turn_over<Tiles, 0, 4, 6>(block, pending);
  turn_over<Tiles, 1, 4, 7>(block, pending);
  turn_over<Tiles, 2, kTwo ? 5 : 0, 6>(block, pending);
  turn_over<Tiles, 3, kTwo ? 5 : 0, 7>(block, pending);
  multiply_parts<Tiles, kTwo, 1>(block, 0);
  prefetch.step();
  int row = 0;
  for (int step = 1; step < block.steps; ++step) {
    multiply_parts<Tiles, kTwo, 0>(block, step);
    prefetch.step();
    // From the second product on, when the stores above have landed.
    for (int i = 0; i < Tiles::kRowsAStep; ++i)
      if (pending.finish && step * Tiles::kParts > 1 && row < block.rows)
        finish_row(pending, block.rows, row++, finish);
  }
  if (pending.finish)
    for (; row < block.rows; ++row) finish_row(pending, block.rows, row, finish);
}

struct AmxCore : PairPanels {
  using State = bf16;
  using Act = bf16;
  static constexpr bool kCoarse = true;  // errors well below a bf16 rounding are free
  static constexpr int kSpareRows = 32;  // a pair of tiles
  static constexpr int kHeadAlign = kTileDepth;

  struct Scratch {
    char* partial;       // [kMaxChunk] blocks: sums between K chunks
    char* turn;          // two blocks, used in turn
    int* tile_rows_set;  // rows that the tiles are configured for, 0 for none
  };
  static constexpr int kMaxChunk = 64;  // panels

  template <class Carver>
  static Scratch carve_scratch(Carver& carver, int, int) {
    Scratch s;
    s.partial = carver.template take<char>(kMaxChunk * kBlockBytes);
    s.turn = carver.template take<char>(2 * kBlockBytes);
    s.tile_rows_set = carver.template take<int>(1);
    return s;
  }

  static void enter(const Scratch& s) { *s.tile_rows_set = 0; }
  static void leave() { tile_release(); }

  static void configure(const Scratch& s, int rows) {
    if (*s.tile_rows_set == rows) return;
    tile_configure(rows);
    *s.tile_rows_set = rows;
  }

  // epilogue(panel) gives finish(row, v0, v1), called for every row of `rows`.
  template <class Epilogue>
  static __attribute__((noinline)) void gemm(const Scratch& scratch, Mat<bf16> a, Range rows,
                                             const Linear& l, const void* weight, Range panels,
                                             const void* next_weight, Epilogue epilogue) {
    const auto row_at = [=](int row, int step) __attribute__((always_inline)) {
      return (const char*)a.at(row, step * kTileDepth);
    };
    multiply<Bf16Tiles>(scratch, row_at, a.ld * (long)sizeof(bf16), rows, steps(l), weight,
                        panel_bytes(l), panels, next_weight, epilogue);
  }

  // A product of row_at(row, step), `lda` bytes between rows, by panels of all_steps tiles.
  template <class Tiles, class RowAt, class Epilogue>
  RX_INLINE void multiply(const Scratch& scratch, RowAt row_at, long lda, Range rows, int all_steps,
                          const void* weight, long panel_size, Range panels,
                          const void* next_weight, Epilogue epilogue) {
    if (rows.begin >= rows.end || panels.begin >= panels.end) return;
    const char* const w = (const char*)weight;
    const int R = tile_rows(rows.end - rows.begin), tiles = ceil_div(rows.end - rows.begin, R);
    constexpr int kChunkSteps = Tiles::kChunkSteps;
    const int per_chunk = imax(1, imin(kMaxChunk, (int)(RX_L2_CHUNK_BYTES / panel_size)));
    const int prefetch_lines = ceil_div((int)Tiles::kStep / 64, ceil_div(tiles, 2));
    configure(scratch, R);

    Pending pending;
    int turn = 0;
    for (int first = panels.begin; first < panels.end; first += per_chunk) {
      const int last = imin(panels.end, first + per_chunk);
      const bool more = last < panels.end;
      Prefetcher prefetch{more ? w + last * panel_size : (const char*)next_weight, prefetch_lines};
      for (int tile = 0; tile < tiles; tile += 2) {
        const int row = rows.begin + tile * R;
        const bool two = tile + 1 < tiles;
        for (int step = 0; step < all_steps; step += kChunkSteps) {
          const int depth = imin(kChunkSteps, all_steps - step);
          const bool whole = depth == all_steps, final = step + depth == all_steps;
          const char* const a0 = row_at(row, step);
          for (int panel = first; panel < last; ++panel) {
            char* const sums = whole ? scratch.turn + (turn ^= 1) * kBlockBytes
                                     : scratch.partial + (panel - first) * kBlockBytes;
            const Block2x2 block{a0,    a0 + R * lda,
                                 lda,   w + panel * panel_size + step * Tiles::kStep,
                                 depth, step > 0 ? sums : nullptr,
                                 R};
            if (two) {
              multiply_block<Tiles, true>(block, pending, prefetch, epilogue(pending.panel));
            } else {
              multiply_block<Tiles, false>(block, pending, prefetch, epilogue(pending.panel));
            }
            pending = {sums, panel, row, two ? 2 : 1, final};
          }
        }
      }
    }
    const Block2x2 none{};
    turn_over<Tiles, 0, 0, 0>(none, pending);
    turn_over<Tiles, 1, 0, 0>(none, pending);
    turn_over<Tiles, 2, 0, 0>(none, pending);
    turn_over<Tiles, 3, 0, 0>(none, pending);
    auto finish = epilogue(pending.panel);
    for (int r = 0; r < R; ++r) finish_row(pending, R, r, finish);
  }

  static size_t attention_bytes(int tokens, int head_stride) {
    return AmxAttention::bytes(tokens, head_stride);
  }
  template <class Seen = SeesAll>
  static void attend(const Scratch& scratch, char* memory, bf16* q, bf16* k, const bf16* v,
                     int stride, int T, int dim, Range rows, Mat<bf16> mixed, int row0, int col,
                     Seen seen = {}, float* lse = nullptr, int heads = 0) {
    if (rows.begin >= rows.end) return;
    const int R = tile_rows(rows.end - rows.begin);
    configure(scratch, R);
    AmxAttention(memory, T, dim, stride, R).run(q, k, v, rows, mixed, row0, col, lse, heads, seen);
  }
};

}  // namespace rx::cpu::RX_ISA
