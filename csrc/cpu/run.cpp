// Deals the samples of a batch out to threads, and keeps their scratch between calls.
#include <pthread.h>
#include <sched.h>
#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>

#include "machine.hpp"

namespace rx::cpu {

constexpr size_t kHugePage = 2 << 20;

// Zeroed, on huge pages where the system has them: panels stream without TLB misses.
void* allocate(size_t bytes) {
  const size_t alignment = bytes >= kHugePage ? kHugePage : 64;
  bytes = (bytes + alignment - 1) / alignment * alignment;
  void* p = std::aligned_alloc(alignment, bytes);
  if (!p) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
  if (alignment == kHugePage) madvise(p, bytes, MADV_HUGEPAGE);
#endif
  std::memset(p, 0, bytes);
  return p;
}

double on_huge_pages(void* data, size_t bytes) {
#if defined(MADV_HUGEPAGE)
  const uintptr_t begin = ((uintptr_t)data + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t end = ((uintptr_t)data + bytes) / kHugePage * kHugePage;
  if (begin >= end) return 0;
  madvise((void*)begin, end - begin, MADV_HUGEPAGE);
  const auto before = std::chrono::steady_clock::now();
  *(volatile char*)begin = 0;
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - before).count();
#else
  return 0;
#endif
}

namespace {

// A forked child starts anew: the lock it inherits may be held for ever.
Machine* machine = new Machine;
const int renewed_by_fork = pthread_atfork(nullptr, nullptr, [] { machine = new Machine; });

struct Deal {
  Machine& machine;
  Stop& stop;
  const Engine& engine;
  const Recursion& recursion;
  int threads;
  int groups = 0, grouped = 0;  // samples [0, grouped) go one group to a thread
  int teams = 0;                // the rest: one sample a team of threads
  std::atomic<int> next{0}, finished{0};
  std::vector<Barrier> barriers;
  std::vector<void*> scratch;  // of each thread; a team uses that of its first thread
  std::vector<Clock> clocks;

  Deal(Machine& m, Stop& s, const Engine& e, const Recursion& r, int n)
      : machine(m),
        stop(s),
        engine(e),
        recursion(r),
        threads(n),
        barriers(n),
        scratch(n),
        clocks(n) {
    const int each = r.batch / n;
    grouped = each * n;
    teams = r.batch - grouped;
    const int limit = std::max(1, e.group_rows / r.tokens);
    groups = n * ((each + limit - 1) / limit);
  }

  int team_of(int tid) const { return (int)((long)tid * teams / threads); }
  int first_thread(int team) const { return (team * threads + teams - 1) / teams; }
  int group_begin(int group) const { return (int)((long)grouped * group / groups); }

  void reserve() {
    std::vector<Scratch>& kept = machine.scratch;
    kept.resize(std::max<size_t>(kept.size(), threads));
    int largest = 0;
    for (int g = 0; g < groups; ++g)
      largest = std::max(largest, group_begin(g + 1) - group_begin(g));
    const size_t alone = largest ? engine.scratch_bytes(recursion, largest, 1) : 0;
    const size_t team =
        teams ? engine.scratch_bytes(recursion, 1, (threads + teams - 1) / teams) : 0;
    for (int t = 0; t < threads; ++t) {
      const bool leads = teams > 0 && first_thread(team_of(t)) == t;
      const size_t bytes = std::max(alone, leads ? team : 0);
      scratch[t] = bytes ? kept[t].at_least(bytes) : nullptr;
    }
    for (Clock& clock : clocks) clock.on = machine.profiling;
  }

  void work(int tid) {
    clocks[tid].start();
    take_groups(tid);
    if (teams > 0) join_team(tid);
    finished.fetch_add(1, std::memory_order_relaxed);
    if (tid == 0) look_until(finished, threads, stop);
  }

  void take_groups(int tid) {
    const Team self{0, 1, nullptr, &clocks[tid], &stop, tid == 0};
    for (int g = next++; g < groups; g = next++) {
      const int first = group_begin(g), last = group_begin(g + 1);
      engine.run_group(recursion, self, first, last - first, scratch[tid]);
    }
  }

  void join_team(int tid) {
    const int team = team_of(tid), first = first_thread(team);
    const Team member{tid - first,     first_thread(team + 1) - first,
                      &barriers[team], &clocks[tid],
                      &stop,           tid == 0};
    member.sync();  // the first thread still used its scratch for its own groups
    engine.run_group(recursion, member, grouped + team, 1, scratch[first]);
  }
};

thread_local bool running = false;

}  // namespace

Running::Running() { running = true; }
Running::~Running() { running = false; }
bool Running::now() { return running; }

Machine& the_machine() { return *machine; }

// The lock of the machine; without it if the caller wants to stop before another one is done.
std::unique_lock<std::timed_mutex> locked(Machine& owner, Stop& stop) {
  std::unique_lock<std::timed_mutex> lock(owner.lock, std::try_to_lock);
  // Of the system clock: the call of the steady one asks for a newer C library.
  const auto later = [] {
    return std::chrono::system_clock::now() + std::chrono::milliseconds(50);
  };
  while (!lock && !stop.raised())
    if (!lock.try_lock_until(later())) stop.look();
  return lock;
}

void add_clocks(Machine& owner, const std::vector<Clock>& clocks) {
  for (const Clock& clock : clocks)
    for (int i = 0; i < (int)Phase::count; ++i) owner.phase_ns[i] += clock.nanoseconds[i];
}

void look_until(const std::atomic<int>& finished, int threads, Stop& stop) {
  while (finished.load(std::memory_order_relaxed) < threads) {
    stop.look();
    sched_yield();
  }
}

bool run(const Engine& engine, const Recursion& recursion, int threads, bool (*wanted)()) {
  check(engine, recursion, threads);
  if (recursion.batch == 0) return true;
  return on_machine(wanted, threads, [&](Machine& owner, Stop& stop, int count) {
    Deal deal(owner, stop, engine, recursion, count);
    deal.reserve();
    parallel(count, [](void* self, int tid) { ((Deal*)self)->work(tid); }, &deal);
    add_clocks(owner, deal.clocks);
  });
}

void alone(int threads, Work work, void* context) {
  if (threads == 1 || running) {  // (inside a call's `wanted` this thread has the machine already)
    for (int tid = 0; tid < threads; ++tid) work(context, tid);
    return;
  }
  std::lock_guard<std::timed_mutex> lock(machine->lock);
  parallel(threads, work, context);
}

void set_profiling(bool on) {
  std::lock_guard<std::timed_mutex> lock(machine->lock);
  machine->profiling = on;
  for (int64_t& ns : machine->phase_ns) ns = 0;
}

std::vector<double> phase_seconds() {
  std::lock_guard<std::timed_mutex> lock(machine->lock);
  std::vector<double> seconds;
  for (int64_t ns : machine->phase_ns) seconds.push_back((double)ns * 1e-9);
  return seconds;
}

size_t scratch_held() {
  std::lock_guard<std::timed_mutex> lock(machine->lock);
  size_t total = machine->window.bytes;
  for (const Scratch& scratch : machine->scratch) total += scratch.bytes;
  return total;
}

}  // namespace rx::cpu
