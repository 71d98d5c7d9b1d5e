// Included before every source of a sanitized build (tests/cpu/sanitized.py).
#pragma once

#include <cstddef>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>

#include <mutex>
// All threads of a team carve the same memory, and the sanitizer checks what it just wrote.
inline std::mutex redzones;
#define RX_ALONE const std::lock_guard<std::mutex> alone(redzones)
#else
#define RX_ALONE (void)0
#define ASAN_POISON_MEMORY_REGION(p, size) ((void)(p), (void)(size))
#define ASAN_UNPOISON_MEMORY_REGION(p, size) ((void)(p), (void)(size))
#endif

// The bug that is on, of those that are planted; none is -1.
extern "C" int rx_planted;

// Takes [used, used + bytes) of `base`, or counts if that is null; where the next piece begins.
// What lies between the two is nobody's.
static inline size_t take_before_redzone(char* base, size_t used, size_t bytes) {
  const size_t next = (used + bytes + 63) / 64 * 64 + 64;
  if (base) {
    RX_ALONE;
    ASAN_UNPOISON_MEMORY_REGION(base + used, bytes);
    ASAN_POISON_MEMORY_REGION(base + used + bytes, next - used - bytes);
  }
  return next;
}

// Memory that an earlier call had in other pieces.
static inline void* without_redzones(void* data, size_t bytes) {
  ASAN_UNPOISON_MEMORY_REGION(data, bytes);
  return data;
}
