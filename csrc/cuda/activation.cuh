// activation.cuh - the gate of an MLP, where it is another than SwiGLU's (recurx/reference.py).
#pragma once
#include "api.h"
#include "rx/common.cuh"

namespace rx {

RX_DEVICE float activate(float x, int activation) {
  switch (activation) {
    case kRxGelu:
      return 0.5f * x * (1.f + erff(x * 0.70710678f));
    case kRxGeluTanh:
      // (1 + tanh u) / 2 = 1 / (1 + exp(-2 u)), u = sqrt(2 / pi) (x + 0.044715 x^3)
      return gated(x, 1.5957691f * (x + 0.044715f * x * x * x));
    case kRxRelu:
      return x < 0.f ? 0.f : x;  // NaN stays
    case kRxRelu2:
      return x < 0.f ? 0.f : x * x;
    case kRxSigmoid:
      return gated(1.f, x);
    default:
      return gated(x, x);
  }
}

// act(gate) * up of two neighbours, rounded. One after the other: the code is long.
RX_DEVICE uint32_t activate_pair(uint32_t gate, uint32_t up, int activation) {
  uint32_t pair = 0;
#pragma unroll 1
  for (int e = 0; e < 2; e++, gate >>= 16, up >>= 16) {
    const float x = activate(unpack_bf16(gate).x, activation) * unpack_bf16(up).x;
    pair = pair >> 16 | pack_bf16(0.f, x);
  }
  return pair;
}

}  // namespace rx
