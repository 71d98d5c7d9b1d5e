// owner.cuh - what every stage of the owner kernel sees: the CTA's memory and its addresses.
//
// h (place.cuh), K and V lie in shared memory as 8 x 8 matrices of 128 bytes, row block after row
// block: ldmatrix, plain or transposed, the stores of accumulators and 16-byte vectors are all free
// of bank conflicts without a swizzle. Where a warp's accumulators become the next product's A
// operand (Q, attention's output, the SwiGLU's middle), they go through the owner's scratch in L2
// as fragments: each lane writes and reads 16 bytes, 512 consecutive ones a warp.
//
// h holds un-normalised rows; row r stands for h[r] * scale[r]. Each product's epilogue applies the
// scale, so that no pass over h does nothing but normalise.
#pragma once
#include "ring.cuh"
#include "timeline.cuh"

namespace owner_sm80 {

using rx::max_of_row, rx::sum_of_row, rx::swiglu;

template <class P>
struct Owner {
  const Params& p;
  unsigned char* smem;
  Ring ring;
  Timeline timeline;
  int warp, lane;
  int first_bias = 0;  // of the block, in Params.biases

  RX_DEVICE Owner(const Params& params, unsigned char* shared)
      : p(params),
        smem(shared),
        ring(params, shared),
        timeline(params.r, int(blockIdx.x)),
        warp(int(threadIdx.x) >> 5),
        lane(int(threadIdx.x) & 31) {}

  // Called where a stage begins: else the compiler keeps addresses of all stages in registers from
  // the start of the kernel, and spills them.
  RX_DEVICE void forget_addresses() { warp = rx::opaque(warp), lane = rx::opaque(lane); }

  RX_DEVICE float* scales() const { return reinterpret_cast<float*>(smem + p.at.scales); }
  // Partial sums of squares, [warp][row]; they lie over K, which is dead by then.
  RX_DEVICE float* sums() const { return reinterpret_cast<float*>(smem + p.at.keys); }

  RX_DEVICE uint4* query_g() const { return scratch(p.at.query); }
  RX_DEVICE uint4* mixed_g() const { return scratch(p.at.mixed); }
  RX_DEVICE uint4* middle_g() const { return scratch(p.at.middle_at); }
  RX_DEVICE uint4* inject_g() const { return scratch(p.at.inject); }
  RX_DEVICE uint4* gate_g() const { return scratch(p.at.gate); }  // of activations but silu
  RX_DEVICE uint4* h_g() const { return scratch(p.at.h); }        // where h is in scratch
  // 16-byte vector of a scratch panel: this lane's registers of k16 column kt, row tile i.
  RX_DEVICE int fragment(int kt, int i) const { return (kt * P::kTiles + i) * 32 + lane; }

  // The bias of a matrix of the block at this lane's first accumulators of a pass; null: none. The
  // next column tile is 4 on.
  RX_DEVICE const float2* bias_g(int matrix, int first_tile) const {
    const float* table_g = p.biases[first_bias + matrix];
    if (!table_g) return nullptr;
    return reinterpret_cast<const float2*>(table_g) + first_tile * 4 + (lane & 3);
  }

  // False for rows 8..15 of the last row tile where they are padding that is not stored.
  RX_DEVICE bool is_stored(int i, int half) const {
    return !(half == 1 && i == P::kTiles - 1 && (p.at.row_blocks & 1));
  }

  // For ldmatrix: the address of this lane's row in 8 x 8 matrix (row tile i + half, column block).
  // In the place of a matrix that is not stored its neighbour is read: padding rows, of which
  // nothing is used.
  RX_DEVICE uint32_t row_address(uint32_t panel, int i, int half, int column_blocks,
                                 int column_block) const {
    const int block = 2 * i + (is_stored(i, half) ? half : 0);
    return rx::smem_u32(smem) + panel + uint32_t(block * column_blocks + column_block) * kMatrix +
           uint32_t(lane & 7) * 16;
  }

  // This lane's two accumulators of a row tile's half, in the column tile `column_block`.
  RX_DEVICE uint32_t* pair(uint32_t panel, int i, int half, int column_blocks,
                           int column_block) const {
    return reinterpret_cast<uint32_t*>(
        smem + panel + uint32_t((2 * i + half) * column_blocks + column_block) * kMatrix +
        uint32_t(lane) * 4);
  }

  // Row of this lane's accumulators in a row tile's half.
  RX_DEVICE int row(int i, int half) const { return i * 16 + half * 8 + (lane >> 2); }

 private:
  RX_DEVICE uint4* scratch(int64_t at) const {
    char* own = static_cast<char*>(p.r.scratch) + int64_t(blockIdx.x) * p.at.scratch_bytes;
    return reinterpret_cast<uint4*>(own + at);
  }
};

template <int kRows, int kColumns>
RX_DEVICE void clear(float (&acc)[kRows][kColumns][4]) {
#pragma unroll
  for (int i = 0; i < kRows; i++)
#pragma unroll
    for (int j = 0; j < kColumns; j++)
#pragma unroll
      for (int e = 0; e < 4; e++) acc[i][j][e] = 0.f;
}

// acc = acc * factor + bias of two neighbouring columns, times another factor in rows l / 4 and
// l / 4 + 8 of the column tile.
RX_DEVICE void add_bias(float (&acc)[4], float factor, float2 bias, float scale, float scale8) {
  acc[0] = acc[0] * factor + bias.x * scale, acc[1] = acc[1] * factor + bias.y * scale;
  acc[2] = acc[2] * factor + bias.x * scale8, acc[3] = acc[3] * factor + bias.y * scale8;
}

// acc = (acc + bias) * factor in the first column tiles; the bias of the same columns for all rows.
template <int kRows, int kColumns>
RX_DEVICE void add_columns(float (&acc)[kRows][kColumns][4], const float2* bias_g, float factor,
                           int tiles) {
  if (!bias_g && factor == 1.f) return;
#pragma unroll
  for (int j = 0; j < kColumns; j++) {
    if (j >= tiles) break;
    const float2 bias = bias_g ? bias_g[j * 4] : make_float2(0.f, 0.f);
#pragma unroll
    for (int i = 0; i < kRows; i++) add_bias(acc[i][j], factor, bias, factor, factor);
  }
}

}  // namespace owner_sm80
