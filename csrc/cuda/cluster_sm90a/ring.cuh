// ring.cuh - a CTA's place in its cluster, and the ring through which the tape comes.
//
// CTA 0 of each sample uses one half of every stage of the tape, CTA 1 the other. The CTAs of a
// cluster with the same half fetch a share of it each and multicast it to all of them, so the tape
// crosses from L2 once a cluster. A half stage is sent when every warpgroup of all these CTAs has
// left what was there before.
#pragma once
#include "../rx/rx.cuh"
#include "layout.cuh"

namespace cluster_sm90a {

// A part of a tape: of each stage my half, or all of it.
struct Part {
  uint32_t offset;
  int32_t half_stages, whole;
};
// A block has the passes of its token mix, and the rest; a part of no length ends a net's.
constexpr int kMaxParts = kRxMaxBlocks * 3 + 1;

struct Params {
  RxRecursion r;
  RxSolve solve;                       // entries 0: one recursion on every sample of the batch
  int cluster;                         // CTAs; two work on `samples`
  int samples;                         // 1, or 2 of a warpgroup's rows each
  Part parts[kRxMaxNets * kMaxParts];  // of net n from n * kMaxParts on
};

// Which of the samples of two CTAs a row belongs to, and its token there; some are beyond T.
RX_DEVICE int sample_of(const Params& p, int row) { return row / kRows * (p.samples - 1); }
RX_DEVICE int token_of(const Params& p, int row) { return row - sample_of(p, row) * kRows; }

template <class P>
struct Cta {
  unsigned char* smem;
  uint32_t smem_s;
  int cluster;

  RX_DEVICE Cta(unsigned char* smem, const Params& p)
      : smem(smem), smem_s(rx::smem_u32(smem)), cluster(p.cluster) {}

  // Read again at every use: special registers cost less than a register of a consumer.
  RX_DEVICE uint32_t rank() const { return rx::cluster_rank(); }
  RX_DEVICE uint32_t half() const { return rank() % 2; }  // which columns of the sample are mine
  RX_DEVICE uint32_t peer() const { return rank() ^ 1; }  // has the others
  RX_DEVICE int pair() const { return int(rx::opaque(blockIdx.x) / 2); }  // with my peer
  RX_DEVICE uint32_t full(int s) const { return smem_s + P::kFull + 8 * s; }
  RX_DEVICE uint32_t empty(int s) const { return smem_s + P::kEmpty + 8 * s; }
  RX_DEVICE uint32_t exchanged(int i) const { return smem_s + P::kExchanged + 8 * i; }
  RX_DEVICE uint32_t taken(int w) const { return smem_s + P::kTaken + 8 * w; }

  RX_DEVICE uint32_t stage(int s) const { return smem_s + P::kRing + uint32_t(s) * kHalfStage; }
  RX_DEVICE static uint32_t tile_bytes(int w) { return w ? P::kSecondTile : kTile; }
  // 64 columns of h, the rows of warpgroup w.
  RX_DEVICE uint32_t h(int column, int w) const {
    return smem_s + P::kH + (w ? P::kTiles * kTile : 0) + uint32_t(column) * tile_bytes(w);
  }
  RX_DEVICE uint32_t own_h(int column, int w) const {  // of the columns that I compute
    return h(int(half()) * P::kGroups + column, w);
  }
  // The exchange area. A head's K is tiles 0 and 1, the rows of either warpgroup, its V 2 and 3.
  // Rows of a warpgroup that both CTAs need, mixed heads or the middle, lie in two places in turn:
  // those of this CTA and those that come from the peer. Place 0 is where K and V of the same
  // warpgroup lie, place 1 is for mixed heads.
  RX_DEVICE uint32_t exchange_tile(int i) const {
    return smem_s + P::kExchange + uint32_t(i) * kTile;
  }
  RX_DEVICE uint32_t own(int place, int w) const { return exchange_tile(4 * place + w); }
  RX_DEVICE uint32_t theirs(int place, int w) const { return exchange_tile(4 * place + 2 + w); }
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
    rx::mbar_init(at.empty(s), at.cluster);  // two warpgroups of half of the CTAs
  }
  for (int i = 0; i < 4; i++) rx::mbar_init(at.exchanged(i), 2);  // me for the bytes, the peer
  for (int w = 0; w < 2; w++) rx::mbar_init(at.taken(w), 1);
  rx::fence_mbarrier_init();
}

// One thread: the tape of every call, front to back, with no bubble between calls.
template <class P>
struct Producer {
  const Cta<P>& at;
  const Params& p;
  int s = 0;
  uint32_t parity = 1;  // waits pass at once in the first round

  RX_DEVICE void stream(const void* tape_g, const Part& part) {
    // Opaque: 24 registers do not hold what would be kept from part to part.
    const uint32_t cluster = uint32_t(rx::opaque(at.cluster)), share = kHalfStage / (cluster / 2);
    const uint32_t mine = share * (at.rank() / 2);
    const uint16_t same = uint16_t((0x55u & ((1u << cluster) - 1)) << at.half());
    const auto* from_g = static_cast<const unsigned char*>(tape_g) + part.offset + mine +
                         (part.whole ? 0 : at.half() * kHalfStage);
#pragma unroll 1
    for (int i = part.half_stages; i > 0; i--, from_g += part.whole ? kHalfStage : kStage) {
      rx::mbar_wait_copies(at.empty(s), parity);
      rx::mbar_arrive_expect_tx(at.full(s), kHalfStage);
      rx::bulk_load_multicast(at.stage(s) + mine, from_g, share, at.full(s), same);
      if (++s == P::kStages) s = 0, parity ^= 1;
    }
  }
  RX_DEVICE void run() {
#pragma unroll 1
    for (int c = 0; c < p.r.num_calls; c++) {
      const int net = p.r.calls[c].net;
#pragma unroll 1
      for (int i = net * kMaxParts; p.parts[i].half_stages > 0; i++)
        stream(p.r.nets[net].tape, p.parts[i]);
    }
  }
};

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
    if (t < at.cluster && uint32_t(t) % 2 == at.half())
      rx::mbar_arrive_remote_reads(rx::mapa(at.empty(stage), uint32_t(t)));
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
