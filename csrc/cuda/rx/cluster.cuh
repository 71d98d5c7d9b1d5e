// cluster.cuh - sm_90: clusters, distributed shared memory, mbarriers, fences.
#pragma once
#include "common.cuh"

namespace rx {

// ---- the cluster
RX_DEVICE uint32_t cluster_rank() {
#ifdef RX_EMU
  return emu::cur->cta_rank;
#else
  uint32_t r;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
  return r;
#endif
}
RX_DEVICE void cluster_arrive() {
  RX_EITHER(emu::cluster_arrive(),
            asm volatile("barrier.cluster.arrive.release.aligned;" :: : "memory"));
}
RX_DEVICE void cluster_wait() {
  RX_EITHER(emu::cluster_wait(),
            asm volatile("barrier.cluster.wait.acquire.aligned;" :: : "memory"));
}

// ---- distributed shared memory
RX_DEVICE uint32_t mapa(uint32_t addr, uint32_t rank) {
#ifdef RX_EMU
  return emu::mapa(addr, rank);
#else
  uint32_t r;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(r) : "r"(addr), "r"(rank));
  return r;
#endif
}

// To the shared memory of a CTA of the cluster; addr comes from mapa().
#ifdef RX_EMU
template <class T>
inline void store_cluster(uint32_t addr, T v) {
  uint8_t* p = emu::shared_ptr(addr);
  if (addr % sizeof(T)) emu::die("st.shared::cluster: 0x%x is misaligned", addr);
  emu::access(p, sizeof v, true, "st.shared::cluster");
  memcpy(p, &v, sizeof v);
}
#endif
RX_DEVICE void st_cluster_v4(uint32_t addr, uint4 v) {
  RX_EITHER(store_cluster(addr, v),
            asm volatile("st.shared::cluster.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(addr), "r"(v.x),
                         "r"(v.y), "r"(v.z), "r"(v.w) : "memory"));
}

// ---- mbarriers: eight bytes of shared memory that count arrivals and bytes
RX_DEVICE void mbar_init(uint32_t bar, uint32_t arrivals) {
  RX_EITHER(
      emu::mbar_init(bar, arrivals),
      asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(arrivals) : "memory"));
}
// On the barrier of any CTA of the cluster; `bar` comes from mapa(). It releases at CTA scope
// alone: for barriers that hand back memory which this thread has read, or that wgmma has. A
// release at cluster scope is a MEMBAR.ALL.GPU, a stop of hundreds of cycles at every stage of a
// ring; nothing that the other CTA reads waits for it here.
RX_DEVICE void mbar_arrive_remote_reads(uint32_t bar) {
  RX_EITHER(emu::mbar_arrive(bar),
            asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(bar) : "memory"));
}
RX_DEVICE void mbar_arrive_expect_tx(uint32_t bar, uint32_t bytes) {
  RX_EITHER(emu::mbar_arrive_expect_tx(bar, bytes),
            asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar),
                         "r"(bytes) : "memory"));
}
// Waits for the end of the phase with this parity (the first phase has parity 0). Acquires at CTA
// scope alone: for what bulk copies bring, whose bytes the barrier itself counts, and for memory
// handed back. At cluster scope every wait also empties L1 (CCTL.IVALL).
RX_DEVICE void mbar_wait_copies(uint32_t bar, uint32_t parity) {
  RX_EITHER(emu::mbar_wait(bar, parity),
            asm volatile("{\n.reg .pred done;\nwait_%=:\n"
                         "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
                         "@!done bra wait_%=;\n}" ::"r"(bar),
                         "r"(parity) : "memory"));
}

// ---- fences
// Generic writes (st, cp.async) of this thread to this CTA's shared memory become visible to wgmma
// and bulk copies. For all memory it would be a MEMBAR.ALL.GPU.
RX_DEVICE void fence_proxy_async_shared() {
  RX_EITHER(emu::proxy_fence(), asm volatile("fence.proxy.async.shared::cta;" :: : "memory"));
}
// Generic writes to global memory that this thread made, or has acquired, become visible to bulk
// copies that it issues.
RX_DEVICE void fence_proxy_async_global() {
  RX_EITHER(emu::proxy_fence(), asm volatile("fence.proxy.async.global;" :: : "memory"));
}
// Initialised mbarriers become visible to the cluster, bulk copies included; then synchronise.
RX_DEVICE void fence_mbarrier_init() {
  RX_EITHER(emu::mbar_init_fence(),
            asm volatile("fence.mbarrier_init.release.cluster;" :: : "memory"));
}

}  // namespace rx
