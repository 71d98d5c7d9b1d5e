// aarch64 with BFMMLA (Graviton 3, Grace): the core of engine_neon_bf16.cpp with twice the work an
// instruction. Never timed: see engine_neon.cpp.
#define RX_ISA bfmmla
#define RX_BFMMLA 1
#define RX_VECTOR_WIDTH 4
#define RX_ROW_TILE 12
#define RX_L2_CHUNK_BYTES (192 << 10)
#define RX_GROUP_ROWS 200

#include "engines.hpp"
#include "gemm_dot.hpp"
#include "schedule.hpp"

namespace rx::cpu {
const Engine bfmmla_bf16 = bfmmla::engine_of<bfmmla::DotCore>();
}  // namespace rx::cpu
