// The engines of this build, each defined in engine_<isa>.cpp.
#pragma once

#include "types.hpp"

namespace rx::cpu {

extern const Engine portable_f32, portable_bf16;
extern const Engine avx2_f32, avx2_bf16;
extern const Engine avx512_f32, avx512_bf16;
extern const Engine dot_bf16;                       // AVX512_BF16; fp32 states run on avx512 there
extern const Engine amx_bf16;                       // as well, or:
extern const Engine amx_f32;                        // AMX, by three parts of each fp32
extern const Engine vnni_int8_f32, vnni_int8_bf16;  // AVX512_VNNI
extern const Engine dot_int8;                       // and AVX512_BF16
extern const Engine amx_int8;                       // AMX-INT8
extern const Engine avx2_vnni_int8_f32, avx2_vnni_int8_bf16;  // AVX-VNNI
extern const Engine portable_int8_f32, portable_int8_bf16;
extern const Engine neon_f32, neon_bf16;
extern const Engine bfdot_bf16, bfmmla_bf16;  // fp32 states run on neon there

}  // namespace rx::cpu
