// bulk.cuh - sm_90: copies that one thread issues and an mbarrier completes.
//
// Sizes and addresses are multiples of 16. A multicast copy writes the same shared offset in every
// CTA of the mask and completes on the barrier at the same offset there.
#pragma once
#include "common.cuh"

namespace rx {

RX_DEVICE void bulk_load_multicast(uint32_t dst, const void* src, uint32_t bytes, uint32_t bar,
                                   uint16_t cta_mask) {
  RX_EITHER(emu::bulk_load(dst, src, bytes, bar, cta_mask),
            asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"
                         ".multicast::cluster [%0], [%1], %2, [%3], %4;" ::"r"(dst),
                         "l"(src), "r"(bytes), "r"(bar), "h"(cta_mask) : "memory"));
}
// From my shared memory to that of a CTA of the cluster; dst and bar come from mapa().
RX_DEVICE void bulk_to_cluster(uint32_t dst, uint32_t src, uint32_t bytes, uint32_t bar) {
  RX_EITHER(emu::bulk_to_cluster(dst, src, bytes, bar),
            asm volatile("cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes "
                         "[%0], [%1], %2, [%3];" ::"r"(dst),
                         "r"(src), "r"(bytes), "r"(bar) : "memory"));
}
}  // namespace rx
