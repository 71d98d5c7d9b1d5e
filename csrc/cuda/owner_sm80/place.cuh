// place.cuh - where h lies: in shared memory, or where that is too small (99 KB) in the owner's
// scratch in L2.
//
// In scratch h is fragments, as the other operands there are: word 2 * (column block & 1) + half of
// lane l in fragment (k16 column, row tile) holds row l / 4 + 8 * half, columns 2 * (l & 3) and the
// next. A product then loads its A operand by 16 bytes a lane, and no ldmatrix is needed. All rows
// of all tiles exist.
//
// Only threads of one CTA share a scratch, so the barriers that order h in shared memory order it
// there, too: bar.sync orders global memory for the CTA, whose threads have one L1.
#pragma once
#include "owner.cuh"

namespace owner_sm80 {

// Rows of 8 that hold something: in scratch also those that shared memory leaves out.
template <class P>
RX_DEVICE int row_blocks(const Owner<P>& o) {
  return P::kInScratch ? 2 * P::kTiles : o.p.at.row_blocks;
}

// The word of h in scratch that holds this row's columns 8 * column_block + 2 * t and the next.
template <class P>
RX_DEVICE uint32_t* word_of_h(const Owner<P>& o, int row, int column_block, int t) {
  const int fragment = (column_block >> 1) * P::kTiles + (row >> 4);
  const int word = (column_block & 1) * 2 + (row >> 3 & 1);
  return reinterpret_cast<uint32_t*>(o.h_g()) + (fragment * 32 + (row & 7) * 4 + t) * 4 + word;
}

// Eight columns of a row of h, the vector at byte offset `at` where h is in shared memory.
template <class P>
RX_DEVICE uint4 load_vector(const Owner<P>& o, int row, uint32_t at, int column) {
  if constexpr (P::kInScratch) {
    const uint32_t* word = word_of_h(o, row, column / 8, 0);
    return make_uint4(word[0], word[4], word[8], word[12]);
  } else {
    return *reinterpret_cast<const uint4*>(o.smem + at);
  }
}
template <class P>
RX_DEVICE void store_vector(const Owner<P>& o, int row, uint32_t at, int column, uint4 x) {
  if constexpr (P::kInScratch) {
    uint32_t* word = word_of_h(o, row, column / 8, 0);
    word[0] = x.x, word[4] = x.y, word[8] = x.z, word[12] = x.w;
  } else {
    *reinterpret_cast<uint4*>(o.smem + at) = x;
  }
}

// What a warp adds a pass to in one row tile of h: column tiles block0 to block0 + kOutTiles - 1.
// From scratch it comes in whole fragments and goes back so.
template <class P>
struct ResidualTile {
  static constexpr int kFragments = P::kInScratch ? P::kOutTiles / 2 : 1;
  uint32_t word[kFragments][4];
  const int i, block0;
  const bool inside;  // 64 columns keep four warps busy

  RX_DEVICE uint4* fragment_g(const Owner<P>& o, int f) const {
    return o.h_g() + o.fragment(block0 / 2 + f, i);
  }
  RX_DEVICE ResidualTile(const Owner<P>& o, int row_tile, int first_block)
      : i(row_tile), block0(first_block), inside(first_block < P::kColumnBlocks) {
    if constexpr (P::kInScratch) {
      if (!inside) return;
#pragma unroll
      for (int f = 0; f < kFragments; f++) {
        const uint4 v = *fragment_g(o, f);
        word[f][0] = v.x, word[f][1] = v.y, word[f][2] = v.z, word[f][3] = v.w;
      }
    }
  }
  RX_DEVICE uint32_t& at(const Owner<P>& o, int half, int j) {
    if constexpr (P::kInScratch)
      return word[j / 2][j % 2 * 2 + half];
    else
      return *o.pair(0, i, half, P::kColumnBlocks, block0 + j);
  }
  RX_DEVICE void store(const Owner<P>& o) const {
    if constexpr (P::kInScratch) {
      if (!inside) return;
#pragma unroll
      for (int f = 0; f < kFragments; f++)
        *fragment_g(o, f) = make_uint4(word[f][0], word[f][1], word[f][2], word[f][3]);
    }
  }
};

// The columns of h that a warp takes in a pass of the token MLP, as 8 x 8 matrices in shared
// memory: a part of h there, or a copy of a part of h in scratch, which is the warp's own.
template <class P>
struct TokenColumns {
  static constexpr int kRowTiles = token_row_tiles(P::kHidden, P::kTiles);
  static constexpr int kBlocks = P::kInScratch ? 2 * kWarps * kRowTiles : P::kColumnBlocks;
  uint32_t panel;             // byte offset
  int first, d0;              // first row tile, and tile of 16 columns, in the panel
  int row_tile, column_tile;  // the same in h

  RX_DEVICE TokenColumns(const Owner<P>& o, int pass, int first_tile)
      : panel(P::kInScratch ? o.p.at.keys : 0),
        first(P::kInScratch ? 0 : first_tile),
        d0(P::kInScratch ? o.warp * kRowTiles : (pass * kWarps + o.warp) * kRowTiles),
        row_tile(first_tile),
        column_tile((pass * kWarps + o.warp) * kRowTiles) {}

  // Rows 8..15 of the sample's last tile may have no place in the panel.
  RX_DEVICE uint32_t* pair(const Owner<P>& o, int k, int m, int word) const {
    return o.pair(panel, k, word & 1, kBlocks, 2 * (d0 + m) + (word >> 1));
  }

  // From h in scratch, with the norm's factor applied.
  RX_DEVICE void copy_in(const Owner<P>& o) const {
    if constexpr (P::kInScratch) {
#pragma unroll 1
      for (int k = 0; k < o.p.at.sample_tiles; k++)
#pragma unroll
        for (int m = 0; m < kRowTiles; m++) {
          const uint4 v = o.h_g()[o.fragment(column_tile + m, row_tile + k)];
          const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
          for (int w = 0; w < 4; w++) {
            if (!o.is_stored(k, w & 1)) continue;
            const float scale = o.scales()[o.row(row_tile + k, w & 1)];
            const float2 x = rx::unpack_bf16(words[w]);
            *pair(o, k, m, w) = rx::pack_bf16(x.x * scale, x.y * scale);
          }
        }
    }
  }
  RX_DEVICE void copy_out(const Owner<P>& o) const {
    if constexpr (P::kInScratch) {
      __syncwarp();  // the norm went by columns, a fragment goes by rows
#pragma unroll 1
      for (int k = 0; k < o.p.at.sample_tiles; k++)
#pragma unroll
        for (int m = 0; m < kRowTiles; m++) {
          uint32_t words[4];
#pragma unroll
          for (int w = 0; w < 4; w++) words[w] = o.is_stored(k, w & 1) ? *pair(o, k, m, w) : 0u;
          o.h_g()[o.fragment(column_tile + m, row_tile + k)] =
              make_uint4(words[0], words[1], words[2], words[3]);
        }
    }
  }
};

}  // namespace owner_sm80
