// Activation functions of variants, chosen at run time.
#pragma once

#include "vec.hpp"

namespace rx::cpu::RX_ISA {

template <bool kCoarse>
RX_INLINE V sigmoid(V x) {
  return reciprocal<kCoarse>(exp2<kCoarse>(x * -kLog2e) + 1.f);
}

// Phi(x): erfc(z) / 2 = exp(-z^2 + P(t)) with z = |x| / sqrt 2, t = 1 / (1 + z / 2), to 1.2e-7 of
// itself (W. J. Cody's form, Numerical Recipes 6.2).
template <bool kCoarse>
RX_INLINE V normal_cdf(V x) {
  const V z = at_least(-x, x) * 0.70710678f;
  const V t = 1.f / (z * 0.5f + 1.f);
  V p = fma(splat(0.17087277f), t, splat(-0.82215223f));
  p = fma(p, t, splat(1.48851587f));
  p = fma(p, t, splat(-1.13520398f));
  p = fma(p, t, splat(0.27886807f));
  p = fma(p, t, splat(-0.18628806f));
  p = fma(p, t, splat(0.09678418f));
  p = fma(p, t, splat(0.37409196f));
  p = fma(p, t, splat(1.00002368f));
  p = fma(p, t, splat(-1.26551223f));
  const V tail = t * exp2<kCoarse>((p - z * z) * kLog2e) * 0.5f;
  return x > V{} ? 1.f - tail : tail;
}

template <bool kCoarse>
RX_INLINE V activated(Activation how, V x) {
  switch (how) {
    case Activation::silu:
      return x * sigmoid<kCoarse>(x);
    case Activation::gelu:
      return x * normal_cdf<kCoarse>(x);
    case Activation::gelu_tanh:  // (1 + tanh(y)) / 2 = sigmoid(2 y)
      return x * sigmoid<kCoarse>(x * 1.59576912f * fma(x * x, splat(0.044715f), splat(1.f)));
    case Activation::relu:
      return at_least(V{}, x);
    case Activation::relu2:
      return at_least(V{}, x) * at_least(V{}, x);
    default:
      return sigmoid<kCoarse>(x);
  }
}

// The derivative of `activated`.
template <bool kCoarse>
RX_INLINE V slope_of(Activation how, V x) {
  switch (how) {
    case Activation::silu: {
      const V s = sigmoid<kCoarse>(x);
      return fma(x * s, 1.f - s, s);
    }
    case Activation::gelu:
      return fma(x * 0.39894228f, exp2<kCoarse>(x * x * (-0.5f * kLog2e)), normal_cdf<kCoarse>(x));
    case Activation::gelu_tanh: {
      const V s = sigmoid<kCoarse>(x * 1.59576912f * fma(x * x, splat(0.044715f), splat(1.f)));
      const V inner = fma(x * x, splat(0.134145f), splat(1.f)) * 1.59576912f;
      return fma(x * s * (1.f - s), inner, s);
    }
    case Activation::relu:
      return x > V{} ? splat(1.f) : V{};
    case Activation::relu2:
      return at_least(V{}, x) * 2.f;
    default: {
      const V s = sigmoid<kCoarse>(x);
      return s * (1.f - s);
    }
  }
}

}  // namespace rx::cpu::RX_ISA
