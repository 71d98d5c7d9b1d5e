// aarch64: 12 rows x 8 columns fill 24 of the 32 registers. Never timed: chunk and group are those
// of AVX2.
#define RX_ISA neon
#define RX_VECTOR_WIDTH 4
#define RX_ROW_TILE 12
#define RX_L2_CHUNK_BYTES (192 << 10)
#define RX_GROUP_ROWS 200

#include "engines.hpp"
#include "gemm.hpp"
#include "schedule.hpp"

namespace rx::cpu {
const Engine neon_f32 = neon::engine_of<neon::VectorCore<float>>();
const Engine neon_bf16 = neon::engine_of<neon::VectorCore<neon::bf16>>();
}  // namespace rx::cpu
