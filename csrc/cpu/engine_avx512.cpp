// x86 with AVX-512 F/BW/VL/DQ: 14 rows x 32 columns fill 28 of the 32 registers; 97 rows are 7
// tiles with one row of padding. The chunk and the prefetch were timed on a Granite Rapids, TRM-att
// and HRM at B=1: 128, 192, 256, 320 KB alike, 512 KB 10 % slower, without prefetch 15 % more.
#define RX_ISA avx512
#define RX_VECTOR_WIDTH 16
#define RX_ROW_TILE 14
#define RX_PREFETCH 1
#define RX_L2_CHUNK_BYTES (256 << 10)
#define RX_GROUP_ROWS 390

#include "engines.hpp"
#include "gemm.hpp"
#include "schedule.hpp"

namespace rx::cpu {
const Engine avx512_f32 = avx512::engine_of<avx512::VectorCore<float>>();
const Engine avx512_bf16 = avx512::engine_of<avx512::VectorCore<avx512::bf16>>();
}  // namespace rx::cpu
