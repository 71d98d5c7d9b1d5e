// Cuts tensors into pieces, which threads hash, and puts the hashes together in their order.
#include "hash.hpp"

#include <algorithm>
#include <cstring>

#include "dispatch.hpp"

namespace rx::cpu {
namespace {

constexpr size_t kPiece = 256 << 10;  // bytes; a multiple of a stripe
constexpr size_t kLeast = 1 << 20;    // bytes a thread: less is read before a second one wakes

using Piece = Rows;  // of one tensor, kPiece bytes at most

using Digest = uint64_t (*)(const char*, size_t);

Digest fastest() {
#if defined(RX_HAVE_AVX512)
  for (const std::string& isa : usable_isas())
    if (isa == "avx512") return digest_avx512;
#endif
  return digest_portable;
}

struct Job {
  Digest digest_of;
  const std::vector<Piece>& pieces;
  std::vector<uint64_t> hashes;
  int threads;

  void work(int tid) {
    const size_t count = pieces.size();
    std::vector<char> gathered;
    for (size_t i = count * tid / threads; i < count * (tid + 1) / threads; ++i) {
      const Piece& piece = pieces[i];
      const char* data = (const char*)piece.data;
      if (piece.rows > 1) {
        gathered.resize(kPiece);
        for (size_t row = 0; row < piece.rows; ++row)
          std::memcpy(&gathered[row * piece.bytes], data + row * piece.stride, piece.bytes);
        data = gathered.data();
      }
      hashes[i] = digest_of(data, piece.rows * piece.bytes);
    }
  }
};

}  // namespace

uint64_t digest_portable(const char* data, size_t bytes) { return digest_piece(data, bytes); }

uint64_t digest(const std::vector<Rows>& tensors, int threads) {
  static const Digest digest_of = fastest();
  std::vector<Piece> pieces;
  size_t total = 0;
  for (const Rows& all : tensors) {
    total += all.rows * all.bytes;
    const size_t step = std::max<size_t>(1, kPiece / std::max<size_t>(1, all.bytes));
    for (size_t row = 0; row < all.rows; row += step) {
      const char* data = (const char*)all.data + row * all.stride;
      const size_t rows = std::min(step, all.rows - row);
      for (size_t at = 0; at < all.bytes; at += kPiece)
        pieces.push_back({data + at, rows, std::min(kPiece, all.bytes - at), all.stride});
    }
  }
  threads = (int)std::min((size_t)std::max(threads, 1), total / kLeast + 1);
  Job job{digest_of, pieces, std::vector<uint64_t>(pieces.size()), threads};
  alone(threads, [](void* self, int tid) { ((Job*)self)->work(tid); }, &job);
  uint64_t hash = tensors.size();
  for (uint64_t each : job.hashes) hash = mixed(hash ^ each);
  return hash;
}

}  // namespace rx::cpu
