// attention.cuh - h = rms(h + O(attention(rope(Q h), rope(K h), V h))).
//
// A head at a time in each CTA, whose warpgroups put K and V of their rows where both attend to all
// of them, or each to its own where it has a sample of its own. Scores, probabilities and Q stay in
// registers. The mixed head goes through shared memory, and to the peer, into O, which accumulates
// over all heads in registers.
#pragma once
#include "product.cuh"

namespace cluster_sm90a {

// Rotates the pairs (j, j + 32) of a head: d[4 * j + ..] are columns 8j.. of 64.
template <class P, int R>
RX_DEVICE void rope_rotate(const Consumer<P>& me, float (&d)[R]) {
  const RxRecursion& r = me.p.r;
  if (!r.cos) return;
#pragma unroll
  for (int e = 0; e < 2; e++) {
    // Rows beyond T are computed and never used: they take the angles of the last token.
    const int token = min(token_of(me.p, me.w * kRows) + me.row() + 8 * e, r.tokens - 1);
    const int first = token * kHeadDim + me.lane() % 4 * 2;
    auto pair = [&](const float* table_g, int column) {
      return *reinterpret_cast<const float2*>(table_g + first + column);
    };
#pragma unroll
    for (int j = 0; j < 4; j++) {
      const float2 cos0 = pair(r.cos, 8 * j), cos1 = pair(r.cos, 8 * j + 32);
      const float2 sin0 = pair(r.sin, 8 * j), sin1 = pair(r.sin, 8 * j + 32);
      float *lo = d + 4 * j + 2 * e, *hi = lo + 16;
      rx::rotate(lo[0], hi[0], cos0.x, sin0.x, cos1.x, sin1.x);
      rx::rotate(lo[1], hi[1], cos0.y, sin0.y, cos1.y, sin1.y);
    }
  }
}

// Accumulators of 16 columns as wgmma's operand A.
RX_DEVICE void as_operand(uint32_t (&a)[4], const float* d) {
#pragma unroll
  for (int i = 0; i < 4; i++) a[i] = rx::pack_bf16(d[2 * i], d[2 * i + 1]);
}

// My rows of K and V, for both warpgroups.
template <class P>
RX_DEVICE void store_keys(Consumer<P>& me, float (&kv)[64]) {
  me.store_chunks(me.at.exchange_tile(2 + me.w), kv + 32, 0, 8);
  rope_rotate(me, kv);  // now: its loads take the registers that V held
  me.store_chunks(me.at.exchange_tile(me.w), kv, 0, 8);
  me.hand_over();
}

// Scores of 64 keys from `first_key` on become exp((score - top) / sqrt(head_dim)), none for keys
// beyond T. `top` of both rows rises to include these keys; returns what sums over earlier keys
// must be multiplied by. A thread's part of the new sum goes to `sum`.
template <class P>
RX_DEVICE float2 exponentials(const Consumer<P>& me, float (&s)[32], int first_key, float (&top)[2],
                              float (&sum)[2]) {
  constexpr float kScale = 0.125f;
  const int key = first_key + me.lane() % 4 * 2;
  float correction[2];
#pragma unroll
  for (int e = 0; e < 2; e++) {
    float highest = top[e];
#pragma unroll
    for (int j = 0; j < 8; j++)
#pragma unroll
      for (int i = 0; i < 2; i++) {
        float& x = s[4 * j + 2 * e + i];
        if (key + 8 * j + i >= me.p.r.tokens) x = -INFINITY;
        highest = max(highest, x);
      }
    highest = rx::max_of_row(highest);
    correction[e] = __expf((top[e] - highest) * kScale);
    top[e] = highest;
    sum[e] *= correction[e];
#pragma unroll
    for (int j = 0; j < 8; j++)
#pragma unroll
      for (int i = 0; i < 2; i++) {
        float& x = s[4 * j + 2 * e + i];
        x = __expf((x - highest) * kScale);
        sum[e] += x;
      }
  }
  return make_float2(correction[0], correction[1]);
}

// softmax(q K^T / sqrt(head_dim)) V of this CTA's head into tile `mixed`.
// NOTE: 64 keys at a time, as 128 would need 16 registers more beside the accumulators of O, which
// are not there.
template <class P>
RX_DEVICE void attend(Consumer<P>& me, const uint32_t (&q)[4][4], uint32_t mixed) {
  const bool alone = me.p.samples > 1;  // the other warpgroup's rows are of another sample
  const int tile = alone ? me.w : 0;
  // Formed here, not outside of the loops over pairs and blocks, where they would be spilled.
  const uint32_t keys = rx::opaque(me.at.exchange_tile(tile));
  const uint32_t values = rx::opaque(me.at.exchange_tile(2 + tile));
  float top[2] = {-1e30f, -1e30f}, sum[2] = {0.f, 0.f};
  float2 correction;
  uint32_t probability[2][4][4];
#pragma unroll
  for (int part = 0; part < 2; part++) {  // the rows of one warpgroup
    if (part == 1 && alone) break;
    const uint32_t k = keys + uint32_t(part) * kTile;
    float s[32];
    me.clear(s);
    rx::wgmma_fence();
#pragma unroll
    for (int ks = 0; ks < 4; ks++) rx::wgmma<64>(s, q[ks], rx::wgmma_desc_128b(k + ks * 32), 1);
    rx::wgmma_commit();
    rx::wgmma_wait<0>();
    rx::wgmma_pin(s);
    correction = exponentials(me, s, part * kRows, top, sum);
#pragma unroll
    for (int ks = 0; ks < 4; ks++) as_operand(probability[part][ks], s + 8 * ks);
    rx::wgmma_pin(probability[part]);
  }
#pragma unroll
  for (int e = 0; e < 2; e++) sum[e] = __fdividef(1.f, rx::sum_of_row(sum[e]));
#pragma unroll
  for (int n = 0; n < 2; n++) {  // 32 columns: no room for the accumulators of 64
    float out[16];
    me.clear(out);
#pragma unroll
    for (int part = 0; part < 2; part++) {
      if (part == 1 && alone) break;
      const uint32_t v = values + uint32_t(part) * kTile + uint32_t(n) * 64;
      rx::wgmma_fence();
#pragma unroll
      for (int ks = 0; ks < 4; ks++)  // V is [keys][64]: N-major, 16 keys are 2048 bytes
        rx::wgmma<32, 1>(out, probability[part][ks], rx::wgmma_desc_128b_mn(v + ks * 2048, kTile),
                         1);
      rx::wgmma_commit();
      rx::wgmma_wait<0>();
      rx::wgmma_pin(out);
#pragma unroll
      for (int i = 0; i < 16; i++) {
        const int e = i / 2 % 2;
        out[i] *= part == 1 || alone ? sum[e] : e ? correction.y : correction.x;
      }
    }
    me.store_chunks(mixed, out, 4 * n, 4);
  }
}

template <class P>
RX_DEVICE void attention(Consumer<P>& me) {
  constexpr int kMixed = 1;  // place of the mixed heads
  const int pairs = me.block().heads / 2;
  float acc[P::kColumns / 2];
  me.clear(acc);
#pragma unroll 1
  for (int pair = 0; pair < pairs; pair++) {
    float kv[64];
    me.first(kv);
    if (pair > 0) {
      me.wait_exchanged();
      me.second(acc, kMixed);
    }
    me.ring.drain();
    rx::wgmma_pin(kv);
    if (pair > 0) {
      me.take();
      me.take_over();  // the other warpgroup has read the last K and V
    }
    store_keys(me, kv);

    float query[32];
    uint32_t q[4][4];
    me.query(query);
    me.ring.drain();
    rx::wgmma_pin(query);
    rope_rotate(me, query);
#pragma unroll
    for (int ks = 0; ks < 4; ks++) as_operand(q[ks], query + 8 * ks);
    rx::wgmma_pin(q);
    me.take_over();  // its K and V are there
    if (pair > 0) me.wait_taken();
    attend(me, q, me.at.own(kMixed, me.w));
    me.hand_over();
    me.send_tile(kMixed);
  }
  me.wait_exchanged();
  me.second(acc, kMixed);
  me.ring.drain();
  rx::wgmma_pin(acc);
  me.take_over();  // nobody reads K and V any more: the SwiGLU may use their place
  me.add_and_norm(acc, me.block().eps);
}

}  // namespace cluster_sm90a
