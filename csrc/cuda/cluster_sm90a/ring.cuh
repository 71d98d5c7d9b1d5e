// ring.cuh - a CTA's place in its cluster, and the ring through which the tape comes.
//
// All CTAs of a cluster use the same stages of the same tape in the same order. Each fetches its
// share of every stage and multicasts it to all, so the tape crosses from L2 once a cluster. A
// stage is sent when every warpgroup of every CTA has left what was there before.
#pragma once
#include "../rx/rx.cuh"
#include "layout.cuh"

namespace cluster_sm90a {

struct Params {
  RxRecursion r;
  int stages[kRxMaxNets];  // of each net's tape
  int cluster;             // CTAs; two work on a sample
};

template <class P>
struct Cta {
  unsigned char* smem;
  uint32_t smem_s;
  int cluster;

  RX_DEVICE Cta(unsigned char* smem, const Params& p)
      : smem(smem), smem_s(rx::smem_u32(smem)), cluster(p.cluster) {}

  // Read again at every use: special registers cost less than a register of a consumer.
  RX_DEVICE uint32_t rank() const { return rx::cluster_rank(); }
  RX_DEVICE uint32_t half() const { return rank() % 2; }  // which 64 rows of the sample are mine
  RX_DEVICE uint32_t peer() const { return rank() ^ 1; }  // has the others
  RX_DEVICE int sample() const { return int(blockIdx.x / 2); }
  RX_DEVICE uint32_t full(int s) const { return smem_s + P::kFull + 8 * s; }
  RX_DEVICE uint32_t empty(int s) const { return smem_s + P::kEmpty + 8 * s; }
  RX_DEVICE uint32_t exchanged(int w) const { return smem_s + P::kExchanged + 8 * w; }
  RX_DEVICE uint32_t exchange_free() const { return smem_s + P::kExchangeFree; }
  RX_DEVICE uint32_t returned() const { return smem_s + P::kReturned; }

  RX_DEVICE uint32_t stage(int s) const { return smem_s + P::kRing + uint32_t(s) * kStage; }
  RX_DEVICE uint32_t h(int tile) const { return smem_s + P::kH + uint32_t(tile) * kTile; }
  // Pair i of the exchange area, the tile for the rows of half `of`. A pair is 128 rows of one
  // operand: K of head w is pair w, V pair w + 2. What a CTA puts there for its own use goes where
  // it does not send from, which is the half of the peer's rows.
  RX_DEVICE uint32_t exchange_tile(int i, uint32_t of) const {
    return smem_s + P::kExchange + uint32_t(2 * i) * kTile + of * kTile;
  }
  RX_DEVICE uint32_t& word(uint32_t at) const {  // of my shared memory
    return *reinterpret_cast<uint32_t*>(smem + (at - smem_s));
  }
  RX_DEVICE uint4& vector(uint32_t at) const {
    return *reinterpret_cast<uint4*>(smem + (at - smem_s));
  }
};

template <class P>
RX_DEVICE void init_barriers(const Cta<P>& at) {
  for (int s = 0; s < P::kStages; s++) {
    rx::mbar_init(at.full(s), 1);
    rx::mbar_init(at.empty(s), 2 * at.cluster);
  }
  for (int w = 0; w < 2; w++) rx::mbar_init(at.exchanged(w), 2);  // me for the bytes, the peer
  rx::mbar_init(at.exchange_free(), 4);  // two warpgroups, mine and the peer's
  rx::mbar_init(at.returned(), 1);
  rx::fence_mbarrier_init();
}

// One thread: the tape of every call, front to back, with no bubble between calls.
template <class P>
RX_DEVICE void produce(const Cta<P>& at, const Params& p) {
  const uint32_t share = kStage / uint32_t(at.cluster), mine = share * at.rank();
  const uint16_t all = uint16_t((1u << at.cluster) - 1);
  int s = 0;
  uint32_t parity = 1;  // waits pass at once in the first round
  for (int c = 0; c < p.r.num_calls; c++) {
    const int net = p.r.calls[c].net;
    const auto* tape_g = static_cast<const unsigned char*>(p.r.nets[net].tape) + mine;
    for (int i = 0; i < p.stages[net]; i++, tape_g += kStage) {
      rx::mbar_wait_copies(at.empty(s), parity);
      rx::mbar_arrive_expect_tx(at.full(s), kStage);
      rx::bulk_load_multicast(at.stage(s) + mine, tape_g, share, at.full(s), all);
      if (++s == P::kStages) s = 0, parity ^= 1;
    }
  }
}

// NOTE: asked again at every use, for what follows from it must not hold registers meanwhile.
RX_DEVICE int thread_of_warpgroup() { return int(rx::opaque(threadIdx.x) % 128); }

// A consumer warpgroup's end of the ring. A stage is released once the products that read it are
// done, which is known when those of the next stage have been issued: the tensor cores never wait.
template <class P>
struct Ring {
  const Cta<P>& at;
  int s = 0, pending = -1;
  uint32_t parity = 0;

  RX_DEVICE uint32_t acquire() {
    rx::mbar_wait_copies(at.full(s), parity);
    return at.stage(s);
  }
  RX_DEVICE void release(int stage) {
    const int t = thread_of_warpgroup();
    if (t < at.cluster) rx::mbar_arrive_remote_reads(rx::mapa(at.empty(stage), uint32_t(t)));
  }
  RX_DEVICE void advance() {
    if (++s == P::kStages) s = 0, parity ^= 1;
  }
  // The products that read stage s have been issued.
  RX_DEVICE void issued() {
    rx::wgmma_commit();
    rx::wgmma_wait<1>();
    if (pending >= 0) release(pending);
    pending = s;
    advance();
  }
  // All products are done.
  RX_DEVICE void drain() {
    rx::wgmma_wait<0>();
    if (pending >= 0) release(pending);
    pending = -1;
  }
};

}  // namespace cluster_sm90a
