// solve.cuh - the queue in the cluster kernel: two CTAs deal with the slots of their samples.
//
// All CTAs of a cluster use the same tape at the same time, so their samples take their steps
// together: a cluster goes on while any of its slots has an entry, and an idle slot is computed
// with the others. Which entry a slot has next is decided by one thread, of the first of its two
// CTAs, and told to all CTAs of the cluster; each has a copy of all slots in its shared memory.
//
// x and the states are read and written by the threads that own a part of them, as in a call
// (states.cuh); the heads alone read whole rows, behind a barrier of the cluster.
#pragma once
#include "../solve.cuh"
#include "product.cuh"
#include "states.cuh"

namespace cluster_sm90a {

RX_DEVICE void sync_cluster() {
  rx::cluster_arrive();
  rx::cluster_wait();
}

template <class P>
struct Queue {
  static constexpr int kWarps = 8;  // of consumers

  const Params& p;
  const Cta<P>& at;

  RX_DEVICE bool solves() const { return p.solve.entries > 0; }
  RX_DEVICE int slots() const { return rx::opaque(at.cluster) / 2 * p.samples; }
  RX_DEVICE rx::Slot& slot(int i) const {  // of the cluster's, in my shared memory
    return reinterpret_cast<rx::Slot*>(at.smem + P::kSlots)[i];
  }
  RX_DEVICE int mine() const { return int(at.rank() / 2) * p.samples; }  // my first
  // Of the batch: where the sample of a slot of mine lies.
  RX_DEVICE int place(int sample) const { return at.pair() * p.samples + sample; }
  // The one warp that deals with the slots of two CTAs; its first lane decides.
  RX_DEVICE bool leads() const {
    return at.half() == 0 && rx::opaque(threadIdx.x) / 32 == kProducers / 32;
  }

  // A slot of mine is `now`, for all CTAs. By one thread, a cluster barrier on either side.
  RX_DEVICE void tell(int sample, const rx::Slot& now) const {
    const uint32_t to = at.smem_s + P::kSlots + uint32_t((mine() + sample) * sizeof(rx::Slot));
#pragma unroll 1
    for (int cta = 0; cta < at.cluster; cta++)
      rx::st_cluster_v4(rx::mapa(to, uint32_t(cta)),
                        make_uint4(uint32_t(now.entry), uint32_t(now.steps), 0, 0));
  }
  RX_DEVICE void fill() const {
    if (!leads() || rx::opaque(threadIdx.x) % 32) return;
#pragma unroll 1
    for (int i = 0; i < p.samples; i++) tell(i, rx::fresh_slot(p.solve));
  }
  // Whether any slot has an entry: the same for all threads of the cluster.
  RX_DEVICE bool goes_on() const {
    bool any = false;
#pragma unroll 1
    for (int i = 0; i < slots(); i++) any |= slot(i).entry >= 0;
    return any;
  }

  // By the consumers: the sample of a fresh entry, and noise.
  RX_DEVICE void begin_step(const States<P>& states) const {
    states.each([&](uint32_t, size_t offset, bool exists, int row) {
      const int sample = sample_of(p, row);
      const rx::Slot now = slot(mine() + sample);
      if (!exists || now.entry < 0) return;
      const int first = place(sample) * p.r.tokens * (P::kHidden / 8);
      rx::enter_step(p.r, p.solve, place(sample), now, int(offset / 8) - first);
    });
  }
  // By the consumers: answers of half of the rows, q of each sample, and what comes next in its
  // slot.
  RX_DEVICE void end_step() const {
    __syncwarp();
    sync_cluster();  // the states are written
    const int warp = int(rx::opaque(threadIdx.x) - kProducers) / 32, first = int(at.half()) * kRows;
#pragma unroll 1
    for (int row = first + warp; row < first + kRows; row += kWarps) {
      const int sample = sample_of(p, row), token = token_of(p, row);
      const rx::Slot now = slot(mine() + sample);
      if (now.entry < 0 || token < p.solve.prefix || token >= p.r.tokens) continue;
      rx::answer_token(p.r, p.solve, rx::answer_rows(p.r, p.solve, place(sample)), now, token);
    }
    __syncwarp();
    sync_cluster();  // all have read the slots and the answers
#pragma unroll 1
    for (int i = 0; leads() && i < p.samples; i++) {
      rx::Slot now = slot(mine() + i);
      if (now.entry < 0) continue;
      rx::read_q(p.r, p.solve, rx::answer_rows(p.r, p.solve, place(i)), now);
      __syncwarp();  // all lanes have read the slot
      if (rx::opaque(threadIdx.x) % 32) continue;
      rx::leave_step(p.solve, now);
      tell(i, now);
    }
    __syncwarp();
    sync_cluster();  // the slots have come
  }
  // By all other threads, in step with it.
  RX_DEVICE void follow_step() const {
    __syncwarp();
    for (int i = 0; i < 3; i++) sync_cluster();
  }
};

}  // namespace cluster_sm90a
