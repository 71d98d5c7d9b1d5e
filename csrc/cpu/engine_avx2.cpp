// x86 with AVX2 and FMA: 6 rows x 16 columns fill 12 of the 16 registers.
#define RX_ISA avx2
#define RX_VECTOR_WIDTH 8
#define RX_ROW_TILE 6
#ifndef RX_L2_CHUNK_BYTES
#define RX_L2_CHUNK_BYTES (192 << 10)
#endif
#ifndef RX_GROUP_ROWS
#define RX_GROUP_ROWS 200
#endif

#include "engines.hpp"
#include "gemm.hpp"
#include "schedule.hpp"

namespace rx::cpu {
const Engine avx2_f32 = avx2::engine_of<avx2::VectorCore<float>>();
const Engine avx2_bf16 = avx2::engine_of<avx2::VectorCore<avx2::bf16>>();
}  // namespace rx::cpu
