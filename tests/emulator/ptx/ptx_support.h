// ptx_support.h - the helpers that translated PTX calls: bit casts, the integer instructions that
// C++ has no operator for, checked memory accesses, atomics.
#pragma once
#include <dlfcn.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <string>
#include <type_traits>

#include "emu.h"

namespace ptx {

// ---- registers to values ------------------------------------------------------------------------
template <class To, class From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}
inline float from_f32(uint32_t bits) { return bit_cast<float>(bits); }
inline double from_f64(uint64_t bits) { return bit_cast<double>(bits); }
inline float from_bf16(uint16_t bits) { return emu::bf16_to_float(bits); }
inline uint32_t to_f32(float value) { return bit_cast<uint32_t>(value); }
inline uint64_t to_f64(double value) { return bit_cast<uint64_t>(value); }
inline uint16_t to_bf16(float value) { return emu::float_to_bf16(value); }
inline uint32_t pack_bf16(float low, float high) {
  return emu::float_to_bf16(low) | uint32_t(emu::float_to_bf16(high)) << 16;
}
template <class F, class... Bits>
inline uint32_t each_bf16(F f, Bits... bits) {
  return pack_bf16(f(from_bf16(uint16_t(bits))...), f(from_bf16(uint16_t(bits >> 16))...));
}
template <class T>
inline T saturate(T value) {  // NaN becomes 0
  return value > 0 ? std::min<T>(value, 1) : 0;
}
inline float nan_min(float a, float b) {
  return std::isnan(a) || std::isnan(b) ? NAN : std::fmin(a, b);
}
inline float nan_max(float a, float b) {
  return std::isnan(a) || std::isnan(b) ? NAN : std::fmax(a, b);
}
template <class T, class F>
inline T to_integer(F value) {  // PTX clamps, and NaN becomes 0
  if (std::isnan(value)) return 0;
  if (value <= F(std::numeric_limits<T>::min())) return std::numeric_limits<T>::min();
  if (value >= F(std::numeric_limits<T>::max())) return std::numeric_limits<T>::max();
  return T(value);
}

// ---- integers -----------------------------------------------------------------------------------
template <class T>
inline T absolute(T a) {
  return a < 0 ? T(-a) : a;
}
template <class T>
inline T divide(T a, T b) {
  return b ? T(a / b) : T(~T(0));
}  // by zero: unspecified in PTX
template <class T>
inline T remainder(T a, T b) {
  return b ? T(a % b) : a;
}
template <class T>
inline T shift_left(T a, uint32_t n) {
  return n >= 8 * sizeof(T) ? T(0) : T(a << n);
}
template <class T>
inline T shift_right(T a, uint32_t n) {
  constexpr uint32_t bits = 8 * sizeof(T);
  if (n >= bits) return std::is_signed<T>::value ? T(a >> (bits - 1)) : T(0);
  return T(a >> n);
}
template <class T>
inline T bit_field_extract(T a, uint32_t start, uint32_t length) {
  constexpr uint32_t bits = 8 * sizeof(T);
  start &= 255, length &= 255;
  if (!length) return 0;
  if (start >= bits) return std::is_signed<T>::value && a < 0 ? T(-1) : T(0);
  length = std::min(length, bits - start);
  return T(T(a << (bits - start - length)) >> (bits - length));
}
template <class T>
inline T bit_field_insert(T field, T into, uint32_t start, uint32_t length) {
  constexpr uint32_t bits = 8 * sizeof(T);
  start &= 255, length &= 255;
  if (start >= bits || !length) return into;
  T ones = length >= bits ? T(~T(0)) : T((T(1) << length) - 1);
  T mask = T(ones << start);
  return T((into & ~mask) | ((field << start) & mask));
}
template <class T>
inline T bit_reverse(T a) {
  T r = 0;
  for (unsigned n = 0; n < 8 * sizeof(T); n++) r = T(r << 1) | T(a >> n & 1);
  return r;
}
template <class T>
inline uint32_t leading_zeros(T a) {
  uint32_t n = 8 * sizeof(T);
  for (std::make_unsigned_t<T> rest = a; rest; rest >>= 1) n--;
  return n;
}
inline uint32_t permute(uint32_t a, uint32_t b, uint32_t selector) {
  uint64_t bytes = a | uint64_t(b) << 32;
  uint32_t r = 0;
  for (int n = 0; n < 4; n++) {
    uint32_t pick = selector >> 4 * n & 15;
    uint8_t byte = uint8_t(bytes >> 8 * (pick & 7));
    if (pick & 8) byte = byte & 0x80 ? 0xff : 0;  // the sign, replicated
    r |= uint32_t(byte) << 8 * n;
  }
  return r;
}
inline uint32_t logic3(uint32_t a, uint32_t b, uint32_t c, uint32_t table) {
  uint32_t r = 0;
  for (int n = 0; n < 8; n++)
    if (table >> n & 1) r |= (n & 4 ? a : ~a) & (n & 2 ? b : ~b) & (n & 1 ? c : ~c);
  return r;
}
inline uint32_t funnel_left(uint32_t low, uint32_t high, uint32_t n, bool clamp) {
  n = clamp ? std::min(n, 32u) : n & 31;
  return uint32_t((uint64_t(high) << 32 | low) << n >> 32);
}
inline uint32_t funnel_right(uint32_t low, uint32_t high, uint32_t n, bool clamp) {
  n = clamp ? std::min(n, 32u) : n & 31;
  return uint32_t((uint64_t(high) << 32 | low) >> n);
}

// ---- memory -------------------------------------------------------------------------------------
template <class... Values>
inline bool holds(const uint8_t* p, Values... values) {
  return (... && [&](auto value) {
    bool same = !memcmp(p, &value, sizeof value);
    p += sizeof value;
    return same;
  }(values));
}
inline void aligned(const void* p, size_t n) {
  if (uintptr_t(p) % n) emu::die("misaligned access of %zu bytes at %p", n, p);
}
template <class T>
inline T load(const uint8_t* p) {
  T value;
  memcpy(&value, p, sizeof value);
  return value;
}
template <class T, class V>
inline void store(uint8_t* p, V value) {
  T narrow = T(value);
  memcpy(p, &narrow, sizeof narrow);
}
template <class T, class F>
inline T atomic_update(uint8_t* at, F f) {  // clusters run on several OS threads
  using Bits = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;
  Bits* p = reinterpret_cast<Bits*>(at);
  Bits before = __atomic_load_n(p, __ATOMIC_SEQ_CST), after;
  do after = bit_cast<Bits>(T(f(bit_cast<T>(before))));
  while (
      !__atomic_compare_exchange_n(p, &before, after, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST));
  return bit_cast<T>(before);
}
#define PTX_ATOMIC(name, expression)                               \
  template <class T>                                               \
  inline T atomic_##name(uint8_t* p, T b) {                        \
    return atomic_update<T>(p, [b](T a) { return (expression); }); \
  }
PTX_ATOMIC(add, a + b)
PTX_ATOMIC(exch, ((void)a, b))
PTX_ATOMIC(min, a < b ? a : b)
PTX_ATOMIC(max, a > b ? a : b)
PTX_ATOMIC(and, a& b)
PTX_ATOMIC(or, a | b)
PTX_ATOMIC(xor, a ^ b)
PTX_ATOMIC(inc, a >= b ? 0 : a + 1)
PTX_ATOMIC(dec, a == 0 || a > b ? b : a - 1)
template <class T>
inline T atomic_cas(uint8_t* p, T expected, T value) {
  return atomic_update<T>(p, [=](T a) { return a == expected ? value : a; });
}

// ---- warps --------------------------------------------------------------------------------------
inline void whole_warp(uint32_t clamp_and_segments, bool up) {
  if (clamp_and_segments != (up ? 0u : 31u))
    emu::die("shfl: only segments of 32 lanes are emulated");
}

}  // namespace ptx

#ifdef PTX_STANDALONE
// A library of PTX alone. The C entry of a kernel: grid and block as three numbers each, CTAs a
// cluster, bytes of dynamic shared memory, and the parameters as the constant bank holds them.
// Returns 0, or 1 and last_error.
static std::string ptx_last_error;
extern "C" const char* rx_cuda_last_error() { return ptx_last_error.c_str(); }
#define PTX_ENTRY(kernel, static_bytes)                                                            \
  extern "C" int ptx_launch_##kernel(const unsigned* grid, const unsigned* block,                  \
                                     unsigned cluster, size_t shared, const uint8_t* parameters) { \
    emu::Launch l;                                                                                 \
    l.grid = dim3(grid[0], grid[1], grid[2]), l.block = dim3(block[0], block[1], block[2]);        \
    l.cluster = cluster, l.smem = shared, l.static_smem = static_bytes, l.name = #kernel;          \
    ptx_last_error.clear();                                                                        \
    try {                                                                                          \
      emu::launch(l, [&] { entry_##kernel(parameters); });                                         \
    } catch (const emu::Error& error) {                                                            \
      ptx_last_error = std::string(#kernel ": ") + error.what();                                   \
      return 1;                                                                                    \
    }                                                                                              \
    return 0;                                                                                      \
  }
#else
// PTX beside the C++ that launches it: rx::launch asks by the kernel's address, whose symbol is the
// name that nvcc gave the entry.
namespace ptx {
struct Entry {
  emu::PtxEntry run;
  size_t static_bytes;
};
inline std::map<std::string, Entry>& entries() {  // one for all translation units
  static std::map<std::string, Entry> all;
  return all;
}
static emu::PtxEntry find(const void* kernel, size_t* static_smem) {
  Dl_info info;
  if (!dladdr(kernel, &info) || !info.dli_sname) return nullptr;
  std::string name = info.dli_sname;
  const std::string here = "N3emu9TensorMapE",
                    there = "14CUtensorMap_st";  // the one type that differs
  for (size_t at; (at = name.find(here)) != name.npos;) name.replace(at, here.size(), there);
  auto found = entries().find(name);
  if (found == entries().end()) emu::die("no PTX of the kernel %s", name.c_str());
  *static_smem = found->second.static_bytes;
  return found->second.run;
}
struct Register {
  Register(const char* name, emu::PtxEntry run, size_t static_bytes) {
    entries()[name] = {run, static_bytes};
    emu::find_ptx = find;
  }
};
}  // namespace ptx
#define PTX_ENTRY(kernel, static_bytes) \
  static const ptx::Register register_##kernel(#kernel, entry_##kernel, static_bytes);
#endif
