// product.cuh - acc[rows, columns of the warp] += A W^T, the weights from the ring.
//
// Every warp multiplies all rows with its own columns: a weight fragment is read once by one warp,
// an A fragment by all eight. A comes from h in shared memory or from fragments in scratch.
#pragma once
#include "place.cuh"

namespace owner_sm80 {

// A step's weights of this warp: kColumns tiles of 8 columns by 16 of k.
template <int kColumns>
struct Weights {
  uint32_t pairs[(kColumns + 1) / 2][4];  // two column tiles each; the last may hold one

  RX_DEVICE void load(const unsigned char* warp_slot, int lane) {
#pragma unroll
    for (int j = 0; j < kColumns / 2; j++) {
      const uint4 v = *reinterpret_cast<const uint4*>(warp_slot + j * kFragment + lane * 16);
      pairs[j][0] = v.x, pairs[j][1] = v.y, pairs[j][2] = v.z, pairs[j][3] = v.w;
    }
    if constexpr (kColumns % 2) {
      constexpr int j = kColumns / 2;
      const uint2 v = *reinterpret_cast<const uint2*>(warp_slot + j * kFragment + lane * 8);
      pairs[j][0] = v.x, pairs[j][1] = v.y;
    }
  }
};
// One row tile.
template <int kColumns>
RX_DEVICE void multiply(float (&acc)[kColumns][4], const uint32_t (&a)[4],
                        const Weights<kColumns>& w) {
#pragma unroll
  for (int j = 0; j + 1 < kColumns; j += 2)
    rx::mma_m16n16k16(acc[j], acc[j + 1], a, w.pairs[j / 2]);
  if constexpr (kColumns % 2) {
    constexpr int j = kColumns - 1;
    rx::mma_m16n8k16(acc[j], a, w.pairs[j / 2][0], w.pairs[j / 2][1]);
  }
}

// Two row tiles.
template <int kColumns>
RX_DEVICE void multiply(float (&acc0)[kColumns][4], float (&acc1)[kColumns][4],
                        const uint32_t (&a0)[4], const uint32_t (&a1)[4],
                        const Weights<kColumns>& w) {
#pragma unroll
  for (int j = 0; j + 1 < kColumns; j += 2)
    rx::mma_m32n16k16(acc0[j], acc0[j + 1], acc1[j], acc1[j + 1], a0, a1, w.pairs[j / 2]);
  if constexpr (kColumns % 2) {
    constexpr int j = kColumns - 1;
    rx::mma_m32n8k16(acc0[j], acc1[j], a0, a1, w.pairs[j / 2][0], w.pairs[j / 2][1]);
  }
}

// acc += h W^T with h in shared memory: K is hidden.
template <class P, int kColumns>
RX_DEVICE void multiply_shared(Owner<P>& o, float (&acc)[P::kTiles][kColumns][4]) {
  const int half = o.lane >> 3 & 1, column = o.lane >> 4;  // which matrix of the fragment
  uint32_t a_s = o.row_address(0, 0, half, P::kColumnBlocks, column);
  // From tile 0 to the last one, whose second half may not be stored.
  const uint32_t last = o.row_address(0, P::kTiles - 1, half, P::kColumnBlocks, column) - a_s;
  auto load = [&](uint32_t (&a)[4], int i) {
    constexpr uint32_t kTile = 2 * P::kColumnBlocks * kMatrix;
    rx::ldmatrix_x4(a, a_s + (i == P::kTiles - 1 ? last : uint32_t(i) * kTile));
  };
#pragma unroll 1  // unrolled, the weights of several steps are loaded at once, and others spill
  for (int step = 0; step < P::kSteps; step++) {
    Weights<kColumns> w;
    w.load(o.smem + o.ring.acquire(), o.lane);
#pragma unroll
    for (int i = 0; i + 1 < P::kTiles; i += 2) {
      uint32_t a0[4], a1[4];
      load(a0, i), load(a1, i + 1);
      multiply(acc[i], acc[i + 1], a0, a1, w);
    }
    if constexpr (P::kTiles % 2) {
      uint32_t a[4];
      load(a, P::kTiles - 1);
      multiply(acc[P::kTiles - 1], a, w);
    }
    a_s += 2 * kMatrix;
  }
}

// acc += A W^T with A in scratch: K is 16 * steps. The fragments of the next step are asked for as
// soon as those of this one are used, most of a step ahead.
template <class P, int kColumns>
RX_DEVICE void multiply_scratch(Owner<P>& o, float (&acc)[P::kTiles][kColumns][4], const uint4* a_g,
                                int steps) {
  uint32_t a[P::kTiles][4];
  auto load = [&](int step, int i) {
    const uint4 v = a_g[o.fragment(step, i)];
    a[i][0] = v.x, a[i][1] = v.y, a[i][2] = v.z, a[i][3] = v.w;
  };
#pragma unroll
  for (int i = 0; i < P::kTiles; i++) load(0, i);
#pragma unroll 1
  for (int step = 0; step < steps; step++) {
    const bool more = step + 1 < steps;
    Weights<kColumns> w;
    w.load(o.smem + o.ring.acquire(), o.lane);
#pragma unroll
    for (int i = 0; i + 1 < P::kTiles; i += 2) {
      multiply(acc[i], acc[i + 1], a[i], a[i + 1], w);
      if (more) load(step + 1, i), load(step + 1, i + 1);
    }
    if constexpr (P::kTiles % 2) {
      multiply(acc[P::kTiles - 1], a[P::kTiles - 1], w);
      if (more) load(step + 1, P::kTiles - 1);
    }
  }
}

// acc += h W^T, wherever h is.
template <class P, int kColumns>
RX_DEVICE void multiply_h(Owner<P>& o, float (&acc)[P::kTiles][kColumns][4]) {
  if constexpr (P::kInScratch)
    multiply_scratch(o, acc, o.h_g(), P::kSteps);
  else
    multiply_shared(o, acc);
}

// acc = (acc + bias) * factor, with the bias of these columns. Rows of a product of h have no
// factor, and their bias is divided by the row's scale, which the epilogue multiplies by.
template <bool kOfH, class P, int kColumns>
RX_DEVICE void add_bias(Owner<P>& o, float (&acc)[P::kTiles][kColumns][4], int matrix, int pass,
                        float factor = 1.f) {
  const float2* bias_g = o.bias_g(matrix, (pass * kWarps + o.warp) * kColumns);
  if (!bias_g && (kOfH || factor == 1.f)) return;
#pragma unroll
  for (int i = 0; i < P::kTiles; i++) {
    if (i >= o.p.at.tiles) break;
    float rms[2] = {factor, factor};
    if constexpr (kOfH)
      for (int half = 0; half < 2; half++) rms[half] = __fdividef(1.f, o.scales()[o.row(i, half)]);
#pragma unroll
    for (int j = 0; j < kColumns; j++) {
      const float2 bias = kOfH || bias_g ? bias_g[j * 4] : make_float2(0.f, 0.f);
      add_bias(acc[i][j], kOfH ? 1.f : factor, bias, rms[0], rms[1]);
    }
  }
}

}  // namespace owner_sm80
