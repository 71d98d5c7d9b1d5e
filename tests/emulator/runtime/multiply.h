// multiply.h - the arithmetic of the tensor-core instructions.
#pragma once
#include <cstring>

namespace emu {

// D[m, n] += A[m, 16] * B[16, n], fp32, row-major, rows of D and B `pitch` apart; m and n are
// multiples of 8. Eight accumulator rows stay in registers, which compilers do not manage from
// plain loops.
typedef float Eight __attribute__((vector_size(32)));
inline void multiply_add(float* D, const float* A, const float* B, int m, int n, int pitch) {
  for (int j = 0; j < n; j += 8)
    for (int i = 0; i < m; i += 8) {
      Eight acc[8];
      for (int r = 0; r < 8; r++) memcpy(&acc[r], D + (i + r) * pitch + j, 32);
      for (int k = 0; k < 16; k++) {
        Eight b;
        memcpy(&b, B + k * pitch + j, 32);
        for (int r = 0; r < 8; r++) acc[r] += A[(i + r) * 16 + k] * b;
      }
      for (int r = 0; r < 8; r++) memcpy(D + (i + r) * pitch + j, &acc[r], 32);
    }
}

}  // namespace emu
