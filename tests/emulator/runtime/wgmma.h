// wgmma.h - the products of a warpgroup that are in flight.
#pragma once
#include "state.h"

namespace emu {

struct Accumulator {
  int n;
  std::vector<float> buffer;  // [64, n]
  std::array<float*, 128> registers;
  std::array<bool, 128> returned{};
  int returned_count = 0;
  uint32_t last = 0;  // number of the last product that adds to it
};

struct WgmmaOp {
  WgmmaArgs args;
  Accumulator* accumulator;
  std::vector<float> a_registers;  // A[64, 16] if it came from registers
  Event event;
  bool done = false;
};

struct Warpgroup {
  unsigned index = 0;  // within the CTA
  std::array<WgmmaArgs, 128> args;
  std::array<Thread*, 128> threads;
  unsigned arrived = 0, first = 0;
  std::vector<std::unique_ptr<WgmmaOp>> ops;
  size_t executed = 0;
  std::vector<std::unique_ptr<Accumulator>> accumulators;
};

}  // namespace emu
