// handover.cu - a ring between two warps, out through bulk stores: a place to plant bugs in.
//
// Warp 1 makes a buffer of kWords words a step, warp 0 stores it to global memory. Two buffers, and
// a pair of named barriers for each: full (1, 2) and empty (3, 4). The last buffer is also sent to
// the other CTA of the cluster, which stores it after its own.
#include "more_rx.cuh"
#include "rx/launch.cuh"

namespace handover {

constexpr int kSteps = 7, kWords = 128, kBytes = kWords * 4;

RX_DEVICE void make(uint32_t* ring, uint32_t rank) {
  for (int step = 0; step < kSteps; step++) {
    const int b = step & 1;
    if (step >= 2) rx::bar_sync(3 + b, 64);
    for (int i = threadIdx.x & 31; i < kWords; i += 32)
      ring[b * kWords + i] = (rank * kSteps + step) * 1000 + i;
    rx::fence_proxy_async();
    rx::bar_arrive(1 + b, 64);
  }
}

RX_DEVICE void send(uint32_t ring_s, uint32_t mail_s, uint32_t bar_s, uint32_t rank,
                    uint32_t* out_g) {
  for (int step = 0; step < kSteps; step++) {
    const int b = step & 1;
    rx::bar_sync(1 + b, 64);
    if (threadIdx.x == 0) {
      rx::bulk_store(out_g + (rank * (kSteps + 1) + step) * kWords, ring_s + b * kBytes, kBytes);
      rx::bulk_commit();
      rx::bulk_wait_read<1>();  // the buffer of the step before is free
    }
    __syncwarp();
    if (step >= 1 && step < kSteps - 1) rx::bar_arrive(3 + (b ^ 1), 64);
  }
  if (threadIdx.x == 0) {
    constexpr uint32_t kLast = (kSteps - 1) % 2 * kBytes;
    rx::bulk_to_cluster(rx::mapa(mail_s, rank ^ 1), ring_s + kLast, kBytes,
                        rx::mapa(bar_s, rank ^ 1));
    rx::mbar_wait(bar_s, 0);
    rx::bulk_store(out_g + (rank * (kSteps + 1) + kSteps) * kWords, mail_s, kBytes);
    rx::bulk_commit();
    rx::bulk_wait<0>();
  }
}

__global__ void kernel(uint32_t* out_g) {
  RX_DYN_SMEM(smem);
  const uint32_t ring_s = rx::smem_u32(smem), mail_s = ring_s + 2 * kBytes, bar_s = mail_s + kBytes;
  const uint32_t rank = rx::cluster_rank();
  if (threadIdx.x == 0) {
    rx::mbar_init(bar_s, 1);
    rx::fence_mbarrier_init();
    rx::mbar_arrive_expect_tx(bar_s, kBytes);
  }
  __syncwarp();
  rx::cluster_arrive();
  rx::cluster_wait();
  if (threadIdx.x < 32)
    send(ring_s, mail_s, bar_s, rank, out_g);
  else
    make(reinterpret_cast<uint32_t*>(smem), rank);
  __syncwarp();
  rx::cluster_arrive();
  rx::cluster_wait();  // the source of a copy to the other CTA stays until that copy is there
}

}  // namespace handover

extern "C" int rx_handover(uint32_t* out_g) {
  constexpr uint32_t kShared = 3 * handover::kBytes + 16;
  return rx::launch({"handover", dim3(2), dim3(64), kShared, 2}, nullptr, handover::kernel, out_g);
}
