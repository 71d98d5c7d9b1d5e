// token_mlp.cuh - h^T = rms(h^T + down(silu(gate h^T) * (up h^T))), over tokens.
//
// The rows of this product are channels, and a row needs the tokens of both CTAs. Each CTA takes
// the channels [half * hidden / 2, ...) for all tokens: the peer's 64 rows of them come by bulk
// copies and go back changed, hidden x 128 bytes each way. To compute all channels in both CTAs
// instead would save one of the two trips (2 x 32 KB at 512 wide, some 2 us a block) and double a
// product that is a quarter of the block.
//
// Nothing is transposed in memory: h as [tokens][64 channels] is wgmma's operand A, M-major, and
// the middle goes from accumulators to operand A in registers. A warpgroup has the groups of 64
// channels w, w + 2; both warpgroups use every stage of this part of the tape.
#pragma once
#include "attention.cuh"

namespace cluster_sm90a {

template <class P>
struct TokenMix {
  static constexpr int kGroups = P::kColumns / 64;  // of channels, a CTA
  static constexpr int kMine = (kGroups + 1) / 2;   // a warpgroup, at most

  Consumer<P>& me;
  const Cta<P>& at;
  float acc[kMine][64];  // [64 channels][128 tokens]

  RX_DEVICE explicit TokenMix(Consumer<P>& me) : me(me), at(me.at) {}

  RX_DEVICE int group(int i) const { return me.w + 2 * i; }
  RX_DEVICE bool mine(int i) const { return 2 * i + 1 < kGroups || group(i) < kGroups; }
  RX_DEVICE int count() const { return (kGroups + 1 - me.w) / 2; }
  // The tile of my group i with the tokens of half `of`: in h, or where the peer's rows came.
  RX_DEVICE uint32_t tile(int i, uint32_t of) const {
    return of == at.half() ? at.h(int(at.half()) * kGroups + group(i))
                           : at.exchange_tile(group(i), at.half());
  }

  // My rows of the peer's channels go there, its rows of mine come.
  RX_DEVICE void send_rows() {
    me.wait_exchange_free();
    if (me.t() == 0) {
      me.announce_exchange(uint32_t(count()) * kTile);
      if (me.w == 0) rx::mbar_arrive_expect_tx(at.returned(), kGroups * kTile);
      for (int g = me.w; g < kGroups; g += 2)
        rx::bulk_to_cluster(rx::mapa(at.exchange_tile(g, at.half() ^ 1), at.peer()),
                            at.h(int(at.half() ^ 1) * kGroups + g), kTile,
                            rx::mapa(at.exchanged(me.w), at.peer()));
    }
    me.wait_exchanged();
  }
  RX_DEVICE void return_rows() {
    rx::fence_proxy_async_shared();
    me.sync_warpgroup();
    if (me.t() == 0)
      for (int g = me.w; g < kGroups; g += 2)
        rx::bulk_to_cluster(rx::mapa(at.h(int(at.half()) * kGroups + g), at.peer()),
                            at.exchange_tile(g, at.half()), kTile,
                            rx::mapa(at.returned(), at.peer()));
    rx::mbar_wait_copies(at.returned(), me.returns++ & 1);
    me.sync_consumers();  // h is whole again, for both warpgroups
  }

  // 64 of the token middle for all groups. Stages: [gate | up] for tokens 0-63, for 64-127, down.
  RX_DEVICE void round() {
    uint32_t weights[3];
    const int first = me.ring.s;
    for (int i = 0; i < 3; i++) weights[i] = me.ring.acquire(), me.ring.advance();
    float gate_up[64];
#pragma unroll
    for (int i = 0; i < kMine; i++) {
      if (!mine(i)) break;
      me.clear(gate_up);
      rx::wgmma_fence();
#pragma unroll
      for (int k = 0; k < 8; k++) {  // 16 tokens
        const uint32_t a = tile(i, uint32_t(k / 4)) + uint32_t(k % 4) * 2048;
        const uint32_t b = weights[k / 4] + uint32_t(k / 2 % 2) * kHalfStage + uint32_t(k % 2) * 32;
        rx::wgmma<128, 0, 1>(gate_up, rx::wgmma_desc_128b_mn(a, kTile), rx::wgmma_desc_64b(b), 1);
      }
      rx::wgmma_commit();
      rx::wgmma_wait<0>();
      rx::wgmma_pin(gate_up);
      uint32_t middle[4][4];
#pragma unroll
      for (int j = 0; j < 32; j++) gate_up[j] = silu(gate_up[j]) * gate_up[32 + j];
#pragma unroll
      for (int k = 0; k < 4; k++) as_operand(middle[k], gate_up + 8 * k);
      rx::wgmma_pin(middle);
      rx::wgmma_fence();
#pragma unroll
      for (int k = 0; k < 4; k++)
        rx::wgmma<128>(acc[i], middle[k],
                       rx::wgmma_desc_64b(weights[2] + k / 2 * kHalfStage + k % 2 * 32), 1);
      rx::wgmma_commit();
      rx::wgmma_wait<0>();  // not later: `middle` and the next gate_up do not fit beside acc
    }
    if (!mine(0)) me.sync_warpgroup();  // no product has kept the warps together: all are here
    for (int i = 0; i < 3; i++) me.ring.release((first + i) % P::kStages);
  }

  // Adds h^T, normalises each channel over its tokens, and puts it back where it was read.
  RX_DEVICE void add_and_norm(int i, float eps) {
    const int tokens = me.p.r.tokens, lane = me.lane();
    // ldmatrix and stmatrix, transposed: four 8 x 8 matrices, tokens 8j and 8j + 8, of 16 channels.
    auto address = [&](int j) {
      const int token = j % 8 * 8 + lane / 16 * 8 + lane % 8, chunk = 2 * me.warp() + lane / 8 % 2;
      return tile(i, uint32_t(j / 8)) + rx::swizzle_128b(token, chunk);
    };
    float sum[2] = {0.f, 0.f};
#pragma unroll
    for (int j = 0; j < 16; j += 2) {
      uint32_t h[4];
      rx::ldmatrix_x4_trans(h, address(j));
#pragma unroll
      for (int m = 0; m < 4; m++) {  // matrix: token group m / 2, channel row m % 2
        const float2 x = rx::unpack_bf16(h[m]);
        float* d = acc[i] + 4 * (j + m / 2) + 2 * (m % 2);
        const int token = 8 * (j + m / 2) + lane % 4 * 2;
        d[0] += x.x, d[1] += x.y;
        sum[m % 2] +=
            (token < tokens ? d[0] * d[0] : 0.f) + (token + 1 < tokens ? d[1] * d[1] : 0.f);
      }
    }
    float scale[2];
#pragma unroll
    for (int e = 0; e < 2; e++) {
      sum[e] += __shfl_xor_sync(rx::kFullWarp, sum[e], 1);
      sum[e] += __shfl_xor_sync(rx::kFullWarp, sum[e], 2);
      scale[e] = rsqrtf(sum[e] / float(tokens) + eps);
    }
#pragma unroll
    for (int j = 0; j < 16; j += 2) {
      uint32_t h[4];
#pragma unroll
      for (int m = 0; m < 4; m++) {
        const float* d = acc[i] + 4 * (j + m / 2) + 2 * (m % 2);
        h[m] = rx::pack_bf16(d[0] * scale[m % 2], d[1] * scale[m % 2]);
      }
      rx::stmatrix_x4_trans(address(j), h);
    }
  }

  RX_DEVICE void run() {
    send_rows();
#pragma unroll
    for (int i = 0; i < kMine; i++) me.clear(acc[i]);
#pragma unroll 1
    for (int r = P::tape().token_rounds(me.block()); r > 0; r--) round();
    me.sync_warpgroup();  // no warp's product reads h any more
#pragma unroll
    for (int i = 0; i < kMine; i++) {
      if (!mine(i)) break;
      rx::wgmma_pin(acc[i]);
      add_and_norm(i, me.block().eps);
    }
    return_rows();
  }
};

}  // namespace cluster_sm90a
