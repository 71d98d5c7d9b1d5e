// Any processor: 128-bit vectors, which every compiler lowers to SSE2, NEON or plain code.
#define RX_ISA portable
#define RX_VECTOR_WIDTH 4
#define RX_ROW_TILE 4
#define RX_L2_CHUNK_BYTES (128 << 10)
#define RX_GROUP_ROWS 100

#include "engines.hpp"
#include "gemm.hpp"
#include "gemm_int8.hpp"
#include "schedule.hpp"

namespace rx::cpu {
const Engine portable_f32 = portable::engine_of<portable::VectorCore<float>>();
const Engine portable_bf16 = portable::engine_of<portable::VectorCore<portable::bf16>>();
const Engine portable_int8_f32 =
    portable::engine_without_window<portable::Int8Core<portable::VectorCore<float>>>();
const Engine portable_int8_bf16 =
    portable::engine_without_window<portable::Int8Core<portable::VectorCore<portable::bf16>>>();
}  // namespace rx::cpu
