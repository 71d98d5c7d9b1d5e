// token_mlp.cuh - h^T = rms(h^T + down(silu(gate h^T) * (up h^T))), over tokens.
//
// The rows of this product are channels, and a CTA has all tokens of those that it computes. A
// warpgroup takes 64 of them at a time; the tape of this part comes once for each pass.
//
// Nothing is transposed in memory: h as [tokens][64 channels] is wgmma's operand A, M-major, and
// the middle goes from accumulators to operand A in registers.
#pragma once
#include "attention.cuh"

namespace cluster_sm90a {

template <class P>
struct TokenMix {
  Consumer<P>& me;
  const Cta<P>& at;
  float acc[64];  // [64 channels][128 tokens]

  RX_DEVICE explicit TokenMix(Consumer<P>& me) : me(me), at(me.at) {}

  RX_DEVICE int group(int pass) const { return me.w + 2 * pass; }
  RX_DEVICE bool mine(int pass) const { return group(pass) < P::kGroups; }
  RX_DEVICE int count() const { return (P::kGroups + 1 - me.w) / 2; }
  // The tile of a group of mine with the tokens of warpgroup `of`.
  RX_DEVICE uint32_t tile(int pass, int of) const { return at.own_h(group(pass), of); }

  // 64 of the token middle. Half stages: [gate | up] for 32 tokens each, then down for 32 each.
  RX_DEVICE void round(int pass) {
    float gate_up[64];
    me.clear(gate_up);
#pragma unroll
    for (int k = 0; k < 4; k++) {
      const uint32_t b = me.ring.acquire();
      const uint32_t a = tile(pass, k / 2) + uint32_t(k % 2) * 4096;  // 16 tokens are 2048 bytes
      rx::wgmma_fence();
#pragma unroll
      for (int ks = 0; ks < 2; ks++)
        if (32 * k + 16 * ks < P::kTokens)
          rx::wgmma<128, 0, 1>(gate_up, rx::wgmma_desc_128b_mn(a + uint32_t(ks) * 2048, kTile),
                               rx::wgmma_desc_64b(b + uint32_t(ks) * 32), 1);
      me.ring.issued();
    }
    me.ring.drain();
    rx::wgmma_pin(gate_up);
    uint32_t middle[4][4];
#pragma unroll
    for (int j = 0; j < 32; j++) gate_up[j] = rx::swiglu(gate_up[j], gate_up[32 + j]);
#pragma unroll
    for (int k = 0; k < 4; k++) as_operand(middle[k], gate_up + 8 * k);
    rx::wgmma_pin(middle);
#pragma unroll
    for (int k = 0; k < 2; k++) {
      const uint32_t b = me.ring.acquire();
      rx::wgmma_fence();
#pragma unroll
      for (int ks = 0; ks < 2; ks++)
        rx::wgmma<128>(acc, middle[2 * k + ks], rx::wgmma_desc_64b(b + uint32_t(ks) * 32), 1);
      me.ring.issued();
    }
    me.ring.drain();
  }
  // The stages of a pass in which the other warpgroup alone computes.
  RX_DEVICE void skip(int stages) {
#pragma unroll 1
    for (; stages > 0; stages--) {
      me.ring.acquire();
      me.sync_warpgroup();  // no product has kept the warps together: all are here
      me.ring.release(me.ring.s);
      me.ring.advance();
    }
  }

  // Adds h^T, normalises each channel over its tokens, and puts it back where it was read.
  RX_DEVICE void add_and_norm(int pass, float eps) {
    const int tokens = me.p.r.tokens, lane = me.lane();
    // ldmatrix and stmatrix, transposed: four 8 x 8 matrices, tokens 8j and 8j + 8, of 16 channels.
    auto address = [&](int j) {
      const int token = j % 8 * 8 + lane / 16 * 8 + lane % 8, chunk = 2 * me.warp() + lane / 8 % 2;
      return tile(pass, j / 8) + rx::swizzle_128b(token, chunk);
    };
    float sum[2] = {0.f, 0.f};
#pragma unroll
    for (int j = 0; j < P::kTokens / 8; j += 2) {
      uint32_t h[4];
      rx::ldmatrix_x4_trans(h, address(j));
#pragma unroll
      for (int m = 0; m < 4; m++) {  // matrix: token group m / 2, channel row m % 2
        const float2 x = rx::unpack_bf16(h[m]);
        float* d = acc + 4 * (j + m / 2) + 2 * (m % 2);
        const int token = 8 * (j + m / 2) + lane % 4 * 2;
        d[0] += x.x, d[1] += x.y;
        sum[m % 2] +=
            (token < tokens ? d[0] * d[0] : 0.f) + (token + 1 < tokens ? d[1] * d[1] : 0.f);
      }
    }
    float scale[2];
#pragma unroll
    for (int e = 0; e < 2; e++) scale[e] = rsqrtf(rx::sum_of_row(sum[e]) / float(tokens) + eps);
#pragma unroll
    for (int j = 0; j < P::kTokens / 8; j += 2) {
      uint32_t h[4];
#pragma unroll
      for (int m = 0; m < 4; m++) {
        const float* d = acc + 4 * (j + m / 2) + 2 * (m % 2);
        h[m] = rx::pack_bf16(d[0] * scale[m % 2], d[1] * scale[m % 2]);
      }
      rx::stmatrix_x4_trans(address(j), h);
    }
  }

  // My channels have changed, in all rows: to the peer, and the peer's to me.
  RX_DEVICE void exchange_channels() {
    rx::fence_proxy_async_shared();
    me.sync_warpgroup();
    if (me.t() == 0) {
      me.announce_exchange(uint32_t(count()) * (kTile + P::kSecondTile));
#pragma unroll 1
      for (int i = 0; i < 2 * count(); i++) {
        const uint32_t tile_i = tile(i / 2, i % 2);
        me.send(tile_i, tile_i, at.tile_bytes(i % 2));
      }
    }
    me.wait_exchanged();
    me.sync_consumers();  // h is whole again, for both warpgroups
  }

  RX_DEVICE void run() {
    me.meet();
    me.sync_consumers();  // the rows of both warpgroups are there, and the peer has got mine
    const int rounds = P::tape().token_rounds(me.block());
#pragma unroll 1
    for (int pass = 0; pass < P::kTokenPasses; pass++) {
      if (!mine(pass)) {
        skip(6 * rounds);
        break;
      }
      me.clear(acc);
#pragma unroll 1
      for (int r = rounds; r > 0; r--) round(pass);
      me.sync_warpgroup();  // no warp's product reads h any more
      rx::wgmma_pin(acc);
      add_and_norm(pass, me.block().eps);
    }
    exchange_channels();
  }
};

}  // namespace cluster_sm90a
