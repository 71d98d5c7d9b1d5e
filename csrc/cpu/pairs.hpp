// What cores of bf16 instructions share: operands in pairs along the depth, as AMX, AVX512_BF16 and
// BFDOT take them, and the prefetch of what comes next.
//
//   a tile of B: [16 pairs of k][W columns][2], 1 KB at W = 16
//   a panel:     [steps of 32 k][2 sides] tiles
#pragma once

#include "layout.hpp"

namespace rx::cpu::RX_ISA {

constexpr int kTileDepth = 32;  // k of one tile: 16 pairs of bf16
constexpr int kTileBytes = kTileDepth * W * 2;
constexpr int kPanelStep = 2 * kTileBytes;  // bytes of a panel for one tile depth

// Packed weights: the part of a Core that is the same for all.
struct PairPanels {
  static constexpr bool kVariants = true;
  static int steps(const Linear& l) { return ceil_div(l.in, kTileDepth); }
  static long panel_bytes(const Linear& l) { return (long)steps(l) * kPanelStep; }
  static size_t linear_bytes(const Linear& l) { return (size_t)l.panels() * panel_bytes(l); }
  static const void* panel_at(const Linear& l, const void* weight, int panel) {
    return (const char*)weight + panel * panel_bytes(l);
  }
};

// Lines that products touch later, fetched into L2 meanwhile: some for each step of the depth.
struct Prefetcher {
  const char* p;
  int lines;
  void step() {
    for (int i = 0; i < lines; ++i) __builtin_prefetch(p + i * 64, 0, 2);
    p += lines * 64;
  }
};

// Keys and values of one head of one sample as tiles of B.
struct HeadTiles {
  int T, dim, stride;
  int depth_steps;   // tile depths of head_dim
  int key_steps;     // tile depths of T
  int key_tiles;     // tiles of W keys
  int column_tiles;  // tiles of W columns of v
  char *keys, *values;

  // Takes its place from `memory`, which moves on.
  HeadTiles(char*& memory, int T, int dim, int stride) : T(T), dim(dim), stride(stride) {
    depth_steps = ceil_div(dim, kTileDepth);
    key_steps = ceil_div(T, kTileDepth);
    key_tiles = ceil_div(T, W);
    column_tiles = dim / W;
    keys = memory;
    values = keys + (size_t)key_steps * (kTileDepth / W) * depth_steps * kTileBytes;
    memory = values + (size_t)key_steps * column_tiles * kTileBytes;
  }
  static size_t bytes(int T, int head_stride) {
    return (size_t)round_up(T, kTileDepth) * head_stride * 4;
  }

  // keys: [tile of W keys][pair of dims][key]: W x W transposes of pairs.
  void pack_keys(const bf16* k) const {
    for (int tile = 0; tile < kTileDepth / W * key_steps; ++tile) {
      float* out = (float*)(keys + (long)tile * depth_steps * kTileBytes);
      for (int d = 0; d < depth_steps * kTileDepth; d += 2 * W, out += W * W) {
        V block[W];
        for (int i = 0; i < W; ++i) {
          const int key = tile * W + i;
          block[i] = key < T ? load((const float*)(k + (long)key * stride + d)) : V{};
        }
        transpose(block);
        for (int i = 0; i < W; ++i) store(out + i * W, block[i]);
      }
    }
  }

  // values: [step of 32 keys][tile of W columns][pair of keys][column][key of the pair]
  void pack_values(const bf16* v) const {
    for (int step = 0; step < key_steps; ++step) {
      for (int tile = 0; tile < column_tiles; ++tile) {
        float* const out = (float*)(values + (long)(step * column_tiles + tile) * kTileBytes);
        for (int pair = 0; pair < 16; ++pair) {
          const int key = step * kTileDepth + 2 * pair;
          const bf16* const p = v + (long)key * stride + tile * W;
          const VU even = key < T ? (VU)load(p) >> 16 : VU{};
          const VU odd = key + 1 < T ? (VU)load(p + stride) : VU{};
          store(out + pair * W, (V)(even | odd));
        }
      }
    }
  }
};

}  // namespace rx::cpu::RX_ISA
