// AMX tiles: eight registers of up to 16 rows x 64 bytes. Tiles 0-3 accumulate, 4 and 5 hold rows
// of A, 6 and 7 hold panels of B (16 pairs of k x 16 columns).
//
// With RX_EMULATE_AMX each function has a plain body instead, so that the engine's control flow is
// tested on any machine. NOTE: inline assembly rather than the compiler's intrinsics: those of
// g++ 12 lack memory clobbers, and lose the configuration and stores of vectors before tile loads.
#pragma once

#include "pairs.hpp"

namespace rx::cpu::RX_ISA {

struct TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t column_bytes[16] = {};
  uint8_t rows[16] = {};
};

#if defined(RX_EMULATE_AMX)

struct Tiles {
  int rows[8];
  alignas(64) char data[8][16][64];
};
inline thread_local Tiles tiles;

// A and the accumulators get `rows` rows; B always has 16.
RX_INLINE void tile_configure(int rows) {
  for (int i = 0; i < 8; ++i) tiles.rows[i] = i < 6 ? rows : 16;
  memset(tiles.data, 0, sizeof tiles.data);
}
RX_INLINE void tile_release() { memset(&tiles, 0, sizeof tiles); }

template <int kTile>
RX_INLINE void tile_zero() {
  memset(tiles.data[kTile], 0, sizeof tiles.data[kTile]);
}
template <int kTile>
RX_INLINE void tile_load(const void* p, long stride) {
  tile_zero<kTile>();
  for (int r = 0; r < tiles.rows[kTile]; ++r)
    memcpy(tiles.data[kTile][r], (const char*)p + r * stride, 64);
}
template <int kTile>
RX_INLINE void tile_stream(const void* p, long stride) {
  tile_load<kTile>(p, stride);
}
template <int kTile>
RX_INLINE void tile_store(void* p, long stride) {
  for (int r = 0; r < tiles.rows[kTile]; ++r)
    memcpy((char*)p + r * stride, tiles.data[kTile][r], 64);
}
// Even and odd k are summed by themselves, from zero, and both then added (Intel's SDM, TDPBF16PS).
template <int kC, int kA, int kB>
RX_INLINE void tile_dot() {
  for (int m = 0; m < tiles.rows[kC]; ++m) {
    float c[16], even[16] = {}, odd[16] = {};
    bf16 a[32], b[32];
    memcpy(c, tiles.data[kC][m], 64);
    memcpy(a, tiles.data[kA][m], 64);
    for (int pair = 0; pair < 16; ++pair) {
      memcpy(b, tiles.data[kB][pair], 64);
      for (int n = 0; n < 16; ++n) {
        even[n] += to_float(a[2 * pair]) * to_float(b[2 * n]);
        odd[n] += to_float(a[2 * pair + 1]) * to_float(b[2 * n + 1]);
      }
    }
    for (int n = 0; n < 16; ++n) c[n] += even[n] + odd[n];
    memcpy(tiles.data[kC][m], c, 64);
  }
}
template <int kC, int kA, int kB>
RX_INLINE void tile_dot_int8() {
  for (int m = 0; m < tiles.rows[kC]; ++m) {
    uint32_t c[16];
    memcpy(c, tiles.data[kC][m], 64);
    for (int k = 0; k < 64; ++k)
      for (int n = 0; n < 16; ++n)
        c[n] += (uint32_t)(uint8_t)tiles.data[kA][m][k] *
                (uint32_t)(int8_t)tiles.data[kB][k / 4][4 * n + k % 4];
    memcpy(tiles.data[kC][m], c, 64);
  }
}

#else

RX_INLINE void tile_configure(int rows) {
  TileConfig config;
  for (int i = 0; i < 8; ++i) {
    config.column_bytes[i] = 64;
    config.rows[i] = (uint8_t)(i < 6 ? rows : 16);
  }
  asm volatile("ldtilecfg %0" ::"m"(config) : "memory");
}
RX_INLINE void tile_release() { asm volatile("tilerelease" ::: "memory"); }

template <int kTile>
RX_INLINE void tile_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
}
template <int kTile>
RX_INLINE void tile_load(const void* p, long stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(kTile) : "memory");
}
// The same, with a hint not to keep the lines in L1.
template <int kTile>
RX_INLINE void tile_stream(const void* p, long stride) {
  asm volatile("tileloaddt1 (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(kTile) : "memory");
}
template <int kTile>
RX_INLINE void tile_store(void* p, long stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(stride), "i"(kTile) : "memory");
}
// C += A B, 32 deep
template <int kC, int kA, int kB>
RX_INLINE void tile_dot() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kC), "i"(kA), "i"(kB));
}
// C += A B, 64 deep: unsigned bytes by signed ones, modulo 2^32.
template <int kC, int kA, int kB>
RX_INLINE void tile_dot_int8() {
  asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kC), "i"(kA), "i"(kB));
}

#endif

// Rows of a tile for a product of `rows` rows. A product of a tile takes about 4.2, 4.3, 4.5, 4.7
// and 5 time units at up to 12, 13, 14, 15 and 16 rows (measured on Granite Rapids), and tiles
// work in pairs: 97 rows are 7 tiles of 14, 388 are 26 of 15.
RX_INLINE int tile_rows(int rows) {
  constexpr float kCost[] = {4.2f, 4.2f, 4.2f, 4.2f, 4.33f, 4.46f, 4.7f, 5.f};  // 9 to 16 rows
  if (rows <= 16) return rows;
  int best = 16;
  float least = INFINITY;
  for (int r = 9; r <= 16; ++r) {
    const int count = ceil_div(rows, r);
    const float cost = count * kCost[r - 9] + count % 2;
    if (cost < least) {
      least = cost;
      best = r;
    }
  }
  return best;
}

}  // namespace rx::cpu::RX_ISA
