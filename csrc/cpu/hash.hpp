// A hash of all bytes of some tensors: whatever wrote to a weight, and however, the hash tells.
//
// Every round is a bijection of the word that goes in, and so is every step after it: a change
// within one aligned word of 8 bytes always changes the hash, any other but once in 2^64 times.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace rx::cpu {

// `rows` stretches of `bytes` that start `stride` bytes apart.
struct Rows {
  const void* data;
  size_t rows, bytes, stride;
};

// Uses up to `threads` threads where there is enough to read; the same for any number of them.
uint64_t digest(const std::vector<Rows>& tensors, int threads);

// ---- a piece of contiguous memory, compiled for each instruction set that gains by it ----

uint64_t digest_portable(const char* data, size_t bytes);
uint64_t digest_avx512(const char* data, size_t bytes);

namespace {  // a copy of its own in each file that includes this

// Eight vectors in flight hide the latency of the product; a vector is eight lanes of a word.
constexpr size_t kChains = 8, kVector = 64, kStripe = kChains * kVector;
constexpr uint64_t kOdd = 0x9fb21c651e98df25ull;
// The hardware prefetcher stops at the end of a page of 4 KB, and its start-up costs a third of it.
constexpr size_t kAhead = 4096;
typedef uint64_t Lanes __attribute__((vector_size(kVector)));

inline uint64_t mixed(uint64_t h) {
  h = (h ^ h >> 32) * kOdd;
  h = (h ^ h >> 29) * 0x9e3779b97f4a7c15ull;
  return h ^ h >> 32;
}

inline void absorb(Lanes& state, const Lanes& word) {
  state ^= word;
  state = (state << 29 | state >> 35) * kOdd;
}

inline void absorb_stripe(Lanes* state, const char* data) {
  for (size_t c = 0; c < kChains; ++c) {
    Lanes word;
    __builtin_memcpy(&word, data + c * kVector, kVector);
    absorb(state[c], word);
  }
}

inline uint64_t digest_piece(const char* data, size_t bytes) {
  Lanes state[kChains];
  for (size_t i = 0; i < kChains * 8; ++i) state[i / 8][i % 8] = (i + 1) * 0x9e3779b97f4a7c15ull;
  const char* const last = data + bytes / kStripe * kStripe;
  const size_t rest = bytes % kStripe;
  for (; data != last; data += kStripe) {
    for (size_t line = 0; line < kStripe; line += 64) __builtin_prefetch(data + kAhead + line);
    absorb_stripe(state, data);
  }
  if (rest) {
    alignas(kVector) char padded[kStripe] = {};
    __builtin_memcpy(padded, data, rest);
    absorb_stripe(state, padded);
  }
  for (size_t c = 1; c < kChains; ++c) absorb(state[0], state[c]);
  uint64_t hash = bytes;
  for (int lane = 0; lane < 8; ++lane) hash = mixed(hash ^ state[0][lane]);
  return hash;
}

}  // namespace
}  // namespace rx::cpu
