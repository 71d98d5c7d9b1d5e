// product.cuh - a consumer warpgroup: its products over the tape, what it exchanges, norms.
//
// Warpgroup w has the rows 64w .. of the two CTAs. Of everything its CTA computes half, and the
// warpgroup of the same rows in the other CTA the other half: head 2p + c, 64 columns of each 128
// of the middle, and the columns [c * hidden / 2, ...) of what is added to h. What the next product
// needs of the peer's half comes by bulk copies between their shared memories, tile by tile.
// Accumulators: rx/wgmma.cuh.
#pragma once
#include "ring.cuh"

namespace cluster_sm90a {

// Named barriers: 0 is __syncthreads.
constexpr int kBarWarpgroup = 1;  // and 2
constexpr int kBarConsumers = 3;
constexpr int kBarHandover = 4;  // 4 to 7

template <class P>
struct Consumer {
  const Params& p;
  const Cta<P>& at;
  const int w;  // warpgroup
  Ring<P> ring;
  uint32_t handovers = 0, exchanges = 0, takes = 0;

  RX_DEVICE Consumer(const Params& p, const Cta<P>& at)
      : p(p),
        at(at),
        // Through a shuffle, so that the compiler knows it to be the same in a warp.
        w(__shfl_sync(rx::kFullWarp, int(rx::opaque(threadIdx.x)) / 128 - 1, 0)),
        ring{at} {}
  RX_DEVICE Consumer(const Consumer& before) : Consumer(before.p, before.at) { go_on_from(before); }
  RX_DEVICE void go_on_from(const Consumer& other) {
    ring.s = other.ring.s, ring.parity = other.ring.parity;
    handovers = other.handovers, exchanges = other.exchanges, takes = other.takes;
  }

  RX_DEVICE int t() const { return thread_of_warpgroup(); }
  RX_DEVICE int lane() const { return t() % 32; }
  RX_DEVICE int warp() const { return t() / 32; }  // of the warpgroup
  // Of my accumulators in the warpgroup's 64; the others are 8 below.
  RX_DEVICE int row() const { return t() / 32 * 16 + t() % 32 / 4; }
  RX_DEVICE bool has_rows() const { return P::kTokens == 128 || w == 0 || warp() < 3; }

  // ---- What the loops over calls and blocks need again later. Each thread keeps its own in shared
  // memory: beside 192 accumulators there is no register for it.
  struct Progress {
    int call, net, block;
    uint32_t written;  // states that live in states_out
  };
  RX_DEVICE uint32_t progress_at() const {
    return at.smem_s + P::kProgress + uint32_t(w * 128 + t()) * 4;
  }
  RX_DEVICE void keep(const Progress& now) const {
    at.word(progress_at()) = uint32_t(now.call) | now.written << 16 | uint32_t(now.net) << 24 |
                             uint32_t(now.block) << 28;
  }
  RX_DEVICE Progress progress() const {
    const uint32_t mine = rx::opaque(at.word(progress_at()));
    // Through a shuffle, so that the compiler knows it to be the same in a warp.
    const uint32_t v = __shfl_sync(rx::kFullWarp, mine, 0);
    return {int(v & 0xffff), int(v >> 24 & 15), int(v >> 28), v >> 16 & 255};
  }
  RX_DEVICE const RxBlock& block() const {
    const Progress now = progress();
    return p.r.nets[now.net].blocks[now.block];
  }

  RX_DEVICE void sync_warpgroup() const { rx::bar_sync(kBarWarpgroup + w, 128); }
  RX_DEVICE void sync_consumers() const { rx::bar_sync(kBarConsumers, 256); }

  // ---- A warpgroup tells the other that K and V are there, or read, and may run on until it needs
  // to hear the same. Two barriers a direction take turns: the next may begin before the last ends.
  RX_DEVICE void hand_over() const {  // what this warpgroup wrote for wgmma
    rx::fence_proxy_async_shared();
    sync_warpgroup();
    rx::bar_arrive(kBarHandover + int(handovers % 2) * 2 + w, 256);
  }
  RX_DEVICE void take_over() {
    rx::bar_sync(kBarHandover + int(handovers % 2) * 2 + (w ^ 1), 256);
    handovers++;
  }

  // ---- Exchanges with the same warpgroup of the peer, at the same points of the call. Nobody
  // begins one before what it was sent last has come, but what it sent itself may be under way
  // still: two barriers take turns.
  RX_DEVICE uint32_t exchanged() const { return at.exchanged(int(exchanges % 2) * 2 + w); }
  // By one thread: `bytes` will come to this warpgroup from the peer's, and I am about to send. The
  // arrival there says that what this warpgroup did before is over: a copy's completion alone does
  // not.
  RX_DEVICE void announce_exchange(uint32_t bytes) const {
    rx::mbar_arrive_expect_tx(exchanged(), bytes);
    rx::mbar_arrive_remote_reads(rx::mapa(exchanged(), at.peer()));
  }
  RX_DEVICE void wait_exchanged() {
    rx::mbar_wait_copies(exchanged(), exchanges / 2 & 1);
    exchanges++;
  }
  // An exchange of nothing: the peer has got what I sent last, so I may write where it came from.
  RX_DEVICE void meet() {
    if (t() == 0) announce_exchange(0);
    wait_exchanged();
  }
  // By one thread, between announce_exchange and wait_exchanged.
  RX_DEVICE void send(uint32_t from, uint32_t to, uint32_t bytes) const {
    rx::bulk_to_cluster(rx::mapa(to, at.peer()), from, bytes, rx::mapa(exchanged(), at.peer()));
  }
  // My tile of a place to the peer's.
  RX_DEVICE void send_tile(int place) const {
    rx::fence_proxy_async_shared();
    sync_warpgroup();
    if (t() != 0) return;
    announce_exchange(kTile);
    send(at.own(place, w), at.theirs(place, w), kTile);
  }
  // My columns of h, which this warpgroup has written, to the peer, and the peer's to me.
  RX_DEVICE void exchange_h() {
    rx::fence_proxy_async_shared();
    sync_warpgroup();
    if (t() == 0) {
      const uint32_t bytes = P::kGroups * at.tile_bytes(w);
      announce_exchange(bytes);
      send(at.own_h(0, w), at.own_h(0, w), bytes);
    }
    wait_exchanged();
  }
  // ---- Mixed heads of the peer are taken one by one: its tile is free again once it was said so.
  RX_DEVICE void take() const {
    if (t() == 0) rx::mbar_arrive_remote_reads(rx::mapa(at.taken(w), at.peer()));
  }
  RX_DEVICE void wait_taken() {
    rx::mbar_wait_copies(at.taken(w), takes & 1);
    takes++;
  }

  // Accumulators of products to come. NOTE: a product that starts by scale_d = 0 would spare the
  // zeros, but leaves the array undefined before: in a loop it then lives all round (spills), and
  // among products in flight ptxas serialises these (C7515).
  template <int R>
  RX_DEVICE static void clear(float (&acc)[R]) {
#pragma unroll
    for (int i = 0; i < R; i++) acc[i] = 0.f;
    rx::wgmma_pin(acc);
  }

  // ---- products. A of `first` and `query` is h, its tile of 64 columns k at at.h(k, w).
  RX_DEVICE void first(float (&acc)[64]) {
    clear(acc);
#pragma unroll 1
    for (int k = 0; k < P::tape().first(); k++) {
      const uint32_t b = ring.acquire(), a = at.h(k / 2, w) + uint32_t(k % 2) * 64;
      rx::wgmma_fence();
#pragma unroll
      for (int ks = 0; ks < 2; ks++)
        rx::wgmma<128>(acc, rx::wgmma_desc_128b(a + ks * 32), rx::wgmma_desc_64b(b + ks * 32), 1);
      ring.issued();
    }
  }
  RX_DEVICE void query(float (&acc)[32]) {
    clear(acc);
#pragma unroll 1
    for (int k = 0; k < P::tape().query(); k++) {
      const uint32_t b = ring.acquire();
      rx::wgmma_fence();
#pragma unroll
      for (int ks = 0; ks < 4; ks++)
        rx::wgmma<64>(acc, rx::wgmma_desc_128b(at.h(k, w) + ks * 32),
                      rx::wgmma_desc_64b(b + ks / 2 * (kHalfStage / 2) + ks % 2 * 32), 1);
      ring.issued();
    }
  }
  // acc += A[64, 128] W^T, A in two tiles of 64 columns: mine and the peer's of a place.
  RX_DEVICE void second(float (&acc)[P::kColumns / 2], int place) {
    constexpr uint32_t kUnit = P::tape().unit();
    constexpr int kSteps = int(kHalfStage / kUnit);  // of 16 columns, a half stage
    const bool mine_first = at.half() == 0;
    const uint32_t own = at.own(place, w), theirs = at.theirs(place, w);
    const uint32_t a0 = mine_first ? own : theirs, a1 = mine_first ? theirs : own;
#pragma unroll 1
    for (int s = 0; s < P::tape().second(); s++) {
      const uint32_t b = ring.acquire();
      rx::wgmma_fence();
#pragma unroll
      for (int i = 0; i < kSteps; i++) {
        const int k = s * kSteps + i;
        const uint32_t a = (k < 4 ? a0 : a1) + uint32_t(k % 4) * 32;
        rx::wgmma<P::kColumns>(acc, rx::wgmma_desc_128b(a),
                               rx::wgmma_desc_32b(b + uint32_t(i) * kUnit), 1);
      }
      ring.issued();
    }
  }

  // ---- Where my accumulators of chunk j (columns 8j..8j+7), row + 8e, lie in a tile of 64
  // columns: (place(tile) ^ j * 16) + 1024 * e, the 128-byte swizzle.
  RX_DEVICE uint32_t place(uint32_t tile) const {
    const int r = row();
    return tile + uint32_t(r * 128 + r % 8 * 16 + lane() % 4 * 4);
  }
  // acc[4 * j + ..] becomes chunk j0 + j.
  RX_DEVICE void store_chunks(uint32_t tile, const float* acc, int j0, int count) const {
    const uint32_t mine = place(tile);
#pragma unroll
    for (int j = 0; j < count; j++)
#pragma unroll
      for (int e = 0; e < 2; e++)
        at.word((mine ^ uint32_t(j0 + j) * 16) + 1024 * e) =
            rx::pack_bf16(acc[4 * j + 2 * e], acc[4 * j + 2 * e + 1]);
  }

  // h = rms(h + acc) over the columns of both CTAs, in place; then this warpgroup may read h.
  // NOTE: the exchange of sums also keeps h, in both CTAs, until no product reads it any more.
  RX_DEVICE void add_and_norm(float (&acc)[P::kColumns / 2], float eps) {
    constexpr int kChunks = P::kColumns / 8;
    const uint32_t mine = place(at.own_h(0, w)), tile_bytes = at.tile_bytes(w);
    auto chunk = [&](int e, int j) {
      return (mine ^ uint32_t(j % 8) * 16) + uint32_t(j / 8) * tile_bytes + 1024 * e;
    };
    // [mine, the peer's][warpgroup][row]
    float* sums_s = reinterpret_cast<float*>(at.smem + P::kSums) + w * kRows;
    float sum[2] = {0.f, 0.f};
#pragma unroll
    for (int j = 0; j < kChunks; j++)
#pragma unroll
      for (int e = 0; e < 2; e++) {
        if (!has_rows()) continue;
        const float2 h = rx::unpack_bf16(at.word(chunk(e, j)));
        float &lo = acc[4 * j + 2 * e], &hi = acc[4 * j + 2 * e + 1];
        lo += h.x, hi += h.y;
        sum[e] += lo * lo + hi * hi;
      }
#pragma unroll
    for (int e = 0; e < 2; e++) {
      sum[e] = rx::sum_of_row(sum[e]);
      if (lane() % 4 == 0) sums_s[row() + 8 * e] = sum[e];
    }
    rx::fence_proxy_async_shared();
    sync_warpgroup();
    if (t() == 0) {
      const uint32_t sums = at.smem_s + P::kSums + uint32_t(w * kRows * 4);
      announce_exchange(kRows * 4);
      send(sums, sums + 2 * kRows * 4, kRows * 4);
    }
    wait_exchanged();
    float scale[2];
#pragma unroll
    for (int e = 0; e < 2; e++) {
      const float both = sums_s[row() + 8 * e] + sums_s[2 * kRows + row() + 8 * e];
      scale[e] = rsqrtf(both * (1.f / P::kHidden) + eps);
    }
#pragma unroll
    for (int j = 0; j < kChunks; j++)
#pragma unroll
      for (int e = 0; e < 2; e++)
        if (has_rows())
          at.word(chunk(e, j)) =
              rx::pack_bf16(acc[4 * j + 2 * e] * scale[e], acc[4 * j + 2 * e + 1] * scale[e]);
    exchange_h();
  }
};

// h = rms(h + down(silu(gate h) * (up h))). The middle passes through the exchange area, 128
// columns a round, two rounds in turn: gate and up of a round run before down of the last, so a
// tile that is sent has arrived by then. The peer sends the next but one when it has mine of the
// next, which I send after down of this one: nothing else says that its place is free.
template <class P>
RX_DEVICE void swiglu(Consumer<P>& me) {
  const int rounds = P::tape().rounds(me.block());
  auto place = [](int round) { return round % 2; };
  float acc[P::kColumns / 2], gate_up[64];
  auto down = [&](int round) {
    me.wait_exchanged();
    me.second(acc, place(round));
  };
  me.clear(acc);
#pragma unroll 1
  for (int round = 0; round < rounds; round++) {
    me.first(gate_up);
    if (round > 0) down(round - 1);
    me.ring.drain();
    rx::wgmma_pin(gate_up);
#pragma unroll
    for (int i = 0; i < 32; i++) gate_up[i] = rx::swiglu(gate_up[i], gate_up[32 + i]);
    me.store_chunks(me.at.own(place(round), me.w), gate_up, 0, 8);
    me.send_tile(place(round));
  }
  down(rounds - 1);
  me.ring.drain();
  rx::wgmma_pin(acc);
  me.add_and_norm(acc, me.block().eps);
}

}  // namespace cluster_sm90a
