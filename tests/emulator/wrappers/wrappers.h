// wrappers.h - one small kernel for every rx:: wrapper, for the emulator and for a real GPU alike.
//
// A kernel writes 32-bit words that depend on nothing but what the wrapper must do; products are of
// small integers, so that they are exact in any order. tests/golden/wrappers.npz keeps the words.
#pragma once
#include "more_rx.cuh"
#include "rx/launch.cuh"

namespace wrappers {

struct Entry {
  const char* name;
  int words;  // of output
  int (*run)(uint32_t* out_g, void* stream);
};

// Small integers, the same everywhere: no two rows or columns of a tile are alike.
RX_DEVICE int small(int i) { return int((uint32_t(i) * 2654435761u >> 20) % 9) - 4; }
RX_DEVICE uint16_t small_bf16(int i) { return uint16_t(rx::pack_bf16(float(small(i)), 0.f)); }
RX_DEVICE uint32_t bits(float f) {
  union {
    float value;
    uint32_t word;
  } u = {f};
  return u.word;
}

}  // namespace wrappers

// Defines the table of a file: its entries by index, as C functions.
#define RX_WRAPPER_TABLE(table)                                              \
  extern "C" int rx_wrapper_count() { return sizeof table / sizeof *table; } \
  extern "C" const char* rx_wrapper_name(int i) { return table[i].name; }    \
  extern "C" int rx_wrapper_words(int i) { return table[i].words; }          \
  extern "C" int rx_wrapper_run(int i, void* out_g, void* stream) {          \
    return table[i].run(static_cast<uint32_t*>(out_g), stream);              \
  }
