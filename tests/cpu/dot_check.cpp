// The bits of dot() (csrc/cpu/dot.hpp) over many operands, by the instruction or, compiled with
// RX_EMULATE_DOT, by plain code. Prints a hash of all results for each kind of operands.
#define RX_ISA dot_check
#define RX_VECTOR_WIDTH 16
#include <cstdio>

#include "cpu/dot.hpp"

using namespace rx::cpu::dot_check;

int main() {
  uint64_t state = 88172645463325252ull;
  const auto next = [&] {
    state ^= state << 13;
    state ^= state >> 7;
    return state ^= state << 17;
  };
  // Exponents of a few powers around one, where sums cancel; and of tiny numbers and denormals.
  const struct {
    const char* name;
    int low, span;
  } kinds[] = {{"ordinary", 119, 16}, {"tiny", 0, 80}};
  for (const auto& kind : kinds) {
    const auto number = [&](int fraction_bits) {
      const uint64_t bits = next();
      const uint32_t exponent = kind.low + (uint32_t)(bits >> 40) % kind.span;
      const uint32_t fraction = (uint32_t)bits & 0x7fffff & ~((1u << (23 - fraction_bits)) - 1);
      return (uint32_t)(bits >> 63) << 31 | exponent << 23 | fraction;
    };
    uint64_t hash = 1469598103934665603ull;
    for (int i = 0; i < 125000; ++i) {  // 2,000,000 lanes
      VU acc, a, b;
      for (int lane = 0; lane < W; ++lane) {
        acc[lane] = number(23);
        a[lane] = number(7) | number(7) >> 16;
        b[lane] = number(7) | number(7) >> 16;
      }
      const VU got = (VU)dot((V)acc, (V)a, (V)b);
      for (int lane = 0; lane < W; ++lane) hash = (hash ^ got[lane]) * 1099511628211ull;
    }
    std::printf("%s %016llx\n", kind.name, (unsigned long long)hash);
  }
}
