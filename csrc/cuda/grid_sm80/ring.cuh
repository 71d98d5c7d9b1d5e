// ring.cuh - sm_90: rows of a product come to shared memory once for the CTAs of a cluster.
//
// Those multiply the same rows by other weights, warp w of each the same depth of the same tiles.
// So a warp has a ring of its own: chunks of four tiles in the order of use, which warp w of CTA
// w % cluster sends to warp w of all by one multicast copy each, as soon as all of them have left
// what was there. Every CTA sends for as many warps, and no warp waits for another of its CTA.
//
// Nobody waits for a ring of waits: warps of one number go through the same chunks in the same
// order, whatever units their CTAs have, and a chunk that was sent needs nobody to arrive. A CTA
// without units in a pass takes the rows of its peers, too, but no cluster reads rows for nothing:
// they may be written again when all of their units are counted (flags.cuh).
#pragma once
#include "../rx/rx.cuh"
#include "flags.cuh"

namespace grid_sm80 {

// Once, by all threads of the CTAs of a cluster.
RX_DEVICE void open_rings(Rings& rings, int cluster) {
  const int t = int(threadIdx.x);
  if (t < kWarps) rings.chunks[t] = 0;
  if (t < kWarps * kRingChunks) {
    rx::mbar_init(rx::smem_u32(rings.full[0] + t), 1);
    rx::mbar_init(rx::smem_u32(rings.empty[0] + t), uint32_t(cluster));
    rx::fence_mbarrier_init();
  }
  __syncwarp();
  rx::cluster_arrive();
  rx::cluster_wait();
}

// No CTA leaves while another may hand a chunk back to it.
RX_DEVICE void close_rings() {
  __syncwarp();
  rx::cluster_arrive();
  rx::cluster_wait();
}

// The rows of one tile on their way to this warp.
struct Ring {
  Rings& rings;
  int cluster;
  uint32_t sent, taken;  // chunks so far, of all tiles

  RX_DEVICE Ring(Rings& rings, int cluster)
      : rings(rings), cluster(cluster), sent(rings.chunks[warp_id()]), taken(sent) {
    // The tile was written by stores, which copies do not see by its flag alone.
    if (lane_id() == 0) rx::fence_proxy_async_global();
  }

  RX_DEVICE uint32_t full(uint32_t chunk) const {
    return rx::smem_u32(&rings.full[warp_id()][chunk % kRingChunks]);
  }
  RX_DEVICE uint32_t empty(uint32_t chunk) const {
    return rx::smem_u32(&rings.empty[warp_id()][chunk % kRingChunks]);
  }
  RX_DEVICE uint32_t sender() const { return uint32_t(warp_id() & (cluster - 1)); }

  // The next chunk is sent for, and sent by whose turn it is.
  RX_DEVICE void send(const uint4* tiles_g, int tiles) {
    const uint32_t chunk = sent++;
    if (lane_id() > 0) return;
    const uint32_t bytes = uint32_t(tiles) * kTileBytes;
    rx::mbar_arrive_expect_tx(full(chunk), bytes);
    if (sender() != rx::cluster_rank()) return;
    rx::mbar_wait_copies(empty(chunk), ~(chunk / kRingChunks) & 1);  // passes in the first round
    rx::bulk_load_multicast(rx::smem_u32(rings.rows[warp_id()][chunk % kRingChunks]), tiles_g,
                            bytes, full(chunk), uint16_t((1u << cluster) - 1));
  }
  // Takes the next chunk, and hands its place back.
  RX_DEVICE void take(uint4 (&a)[kChunkTiles], int tiles) {
    rx::mbar_wait_copies(full(taken), taken / kRingChunks & 1);
    const uint4* rows_s =
        reinterpret_cast<const uint4*>(rings.rows[warp_id()][taken % kRingChunks]) + lane_id();
#pragma unroll
    for (int i = 0; i < kChunkTiles; i++) {
      a[i] = make_uint4(0, 0, 0, 0);
      if (i < tiles) a[i] = rows_s[i * 32];
    }
    __syncwarp();
    if (lane_id() == 0) rx::mbar_arrive_remote_reads(rx::mapa(empty(taken), sender()));
    taken++;
  }
  RX_DEVICE void close() const {
    __syncwarp();
    if (lane_id() == 0) rings.chunks[warp_id()] = taken;
    __syncwarp();
  }
};

}  // namespace grid_sm80
