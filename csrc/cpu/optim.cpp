// Deals the weights of an optimizer's step out to threads.
#include <algorithm>

#include "dispatch.hpp"

namespace rx::cpu {
namespace {

constexpr long kLeast = 1 << 16;  // values a thread: fewer are done before a second one wakes
constexpr long kLine = 16;        // values of a cache line, which two threads do not share

// Whether weights share memory: one thread then takes them one after the other.
bool overlap(const std::vector<AdamTensor>& tensors) {
  std::vector<std::pair<const float*, const float*>> ranges;
  for (const AdamTensor& t : tensors) ranges.push_back({t.weight, t.weight + t.count});
  std::sort(ranges.begin(), ranges.end());
  for (size_t i = 1; i < ranges.size(); ++i)
    if (ranges[i].first < ranges[i - 1].second) return true;
  return false;
}

struct Job {
  const Engine& engine;
  const AdamRates& by;
  const std::vector<AdamTensor>& tensors;
  int threads;

  void work(int tid) {
    for (const AdamTensor& t : tensors) {
      const long lines = (t.count + kLine - 1) / kLine;
      engine.adam_atan2(by, t, std::min(t.count, lines * tid / threads * kLine),
                        std::min(t.count, lines * (tid + 1) / threads * kLine));
    }
  }
};

}  // namespace

void adam_atan2(const Engine& engine, const AdamRates& by, const std::vector<AdamTensor>& tensors,
                int threads) {
  long total = 0;
  for (const AdamTensor& t : tensors) total += t.count;
  threads = (int)std::min<long>(std::max(threads, 1), total / kLeast + 1);
  if (threads > 1 && overlap(tensors)) threads = 1;
  Job job{engine, by, tensors, threads};
  alone(threads, [](void* self, int tid) { ((Job*)self)->work(tid); }, &job);
}

}  // namespace rx::cpu
