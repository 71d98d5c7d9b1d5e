// state.h - everything the emulator knows about a running gang of CTAs.
//
//   Gang      the CTAs that one OS thread schedules: a cluster, or a whole cooperative grid
//   Cluster   barrier state shared by the CTAs of a cluster
//   Cta       a shared-memory window, named barriers, warps, warpgroups
//   Warp      32 lanes and the rendezvous of their collectives
//   Thread    one CUDA thread: a fiber
// Each part is filled in by the file named after it.
#pragma once
#include <array>
#include <deque>
#include <functional>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "clocks.h"
#include "emu.h"

namespace emu {

constexpr size_t kWindow = 1 << 18;  // host bytes per CTA window, more than any GPU has
constexpr unsigned kBulkSlots = 64;  // bulk copies in flight that the race checker tells apart

struct Gang;
struct Cluster;
struct Cta;
struct Warp;
struct Warpgroup;

// ---- what a thread waits for, said in the deadlock report
struct Wait {
  enum Kind {
    kNothing,
    kCollective,
    kBarrier,
    kClusterBarrier,
    kMbarrier,
    kWgmma,
    kRegisters
  } kind = kNothing;
  const char* op = "";
  uint32_t a = 0, b = 0;  // lane mask | barrier id, count | barrier address, parity
};

// ---- asynchronous copies, in the groups that a thread commits
struct Copy {
  uint8_t* dst;
  const uint8_t* src;
  uint32_t bytes, zeros;  // `zeros` bytes follow the copied ones
  Event event;            // cp.async: of both; bulk store: of reading the source
  bool done = false;
  Event write_event = {};  // bulk store: of writing global memory
};
// Operations in the order of issue; a commit ends a group. Storage is reused, for cp.async is
// frequent.
template <class Op>
struct Groups {
  std::vector<Op> ops;         // from `first` on: not yet waited for
  std::vector<uint32_t> ends;  // of the committed groups, as positions in `ops`
  size_t first = 0, first_group = 0;

  void add(const Op& op) { ops.push_back(op); }
  void commit() { ends.push_back(uint32_t(ops.size())); }
  size_t committed() const { return ends.size() - first_group; }
  size_t open() const { return ops.size() - (ends.empty() ? 0 : ends.back()); }
  template <class F>
  void pop_group(F f) {
    for (; first < ends[first_group]; first++) f(ops[first]);
    if (++first_group == ends.size() && first == ops.size()) {
      ops.clear(), ends.clear();
      first = first_group = 0;
    } else if (first > 1024) {
      forget_waited();
    }
  }

 private:
  void forget_waited() {
    ops.erase(ops.begin(), ops.begin() + long(first));
    ends.erase(ends.begin(), ends.begin() + long(first_group));
    for (uint32_t& e : ends) e -= uint32_t(first);
    first = first_group = 0;
  }
};

struct Thread : ThreadContext {
  unsigned id = 0;  // within the gang; also its actor id in vector clocks
  Cta* cta = nullptr;
  Warp* home = nullptr;
  void* sp = nullptr;
  bool done = false;
  Wait wait;
  Groups<Copy> cp_async, bulk_stores;
  uint32_t cp_commits = 0;
  Groups<uint32_t> wgmmas;  // op numbers within the warpgroup
  bool wgmma_fenced = false, cluster_arrived = false;
  unsigned cluster_phase = 0;
  OrderMarks marks;            // proxy fences and cp.async waits, see clocks.h
  uint32_t aligned_count = 0;  // .aligned instructions so far
  uint64_t site = 0;           // of the next one, see at()
};

struct Rendezvous {
  uint32_t mask = 0, arrived = 0;
  const char* op = nullptr;
  std::function<void(Warp&, Rendezvous&)> work;
  std::array<void*, 32> arg;
};
struct AlignedStep {  // an .aligned instruction and the lanes that have come to it
  uint64_t where;
  const char* op;
  uint32_t lanes, first_lane;
};
struct BankInstruction {  // see banks.cpp
  uint32_t lanes = 0;
  unsigned bytes = 0;
  std::array<uint32_t, 32> offset;
};
struct BankSite {
  std::array<uint32_t, 32> executed{};
  uint32_t counted = 0;
  std::deque<BankInstruction> open;
};

struct Warp {
  std::array<Thread*, 32> lane{};
  uint32_t live = 0, ready = 0;
  unsigned first_lane = 0;  // where the search for a ready lane starts
  int run_index = -1;       // position in the list of runnable warps
  bool starved = false;     // the random scheduler avoids it for a while
  std::array<Rendezvous, 4> rendezvous;
  std::unordered_map<uint64_t, BankSite> bank_sites;  // by place in the code
  std::deque<AlignedStep> aligned;  // from step number `aligned_done` on: not yet done by all lanes
  uint32_t aligned_done = 0;
  // Operands and results of mma and ldmatrix. Each lane writes and reads its own elements, so that
  // the lane that does the work need not visit the other lanes' stacks.
  alignas(32) float a[32][16], b[16 * 16], d[32 * 16];
  uint32_t words[32][4];
};

struct NamedBarrier {
  int arrived = 0, expected = 0;
  Published clocks;
  std::vector<Thread*> waiting;
};

struct RegisterShare {  // setmaxnreg: registers a thread
  int held = 0, wanted = 0;
  std::vector<Thread*> waiting;
};

struct Cta {
  Cluster* cluster = nullptr;
  unsigned rank = 0, index = 0, bid_x = 0;  // within the cluster, the gang, the grid
  uint8_t* smem = nullptr;                  // host address of shared offset 0
  size_t dyn = 0, end = 0;  // offsets of dynamic shared memory and of the first byte after it
  unsigned live = 0;
  unsigned first_thread = 0, thread_count = 0;
  std::array<NamedBarrier, 16> barriers;
  std::vector<Warp> warps;
  std::vector<std::unique_ptr<Warpgroup>> warpgroups;
  std::vector<RegisterShare> registers;  // of each warpgroup
  Published exit_clocks;
  std::vector<Clock> seen;  // released by others and read here without an acquire, see stale()
  uint64_t time_ns = 0;     // see global_time_ns()
};

struct Cluster {
  std::vector<Cta*> ctas;
  unsigned live = 0, arrived = 0, phase = 0;
  Published clocks, done_clocks;
  std::vector<Thread*> waiting;
};

struct Mbarrier {
  uint8_t* where;
  Cta* cta;
  unsigned init_thread;
  Clock init_clock;
  bool valid = true;
  uint32_t expected, pending, phase = 0;
  int64_t tx = 0;
  // Of this phase and of the last: `far` are arrivals of other CTAs at cluster scope.
  Published clocks, done_clocks, far, done_far;
  std::vector<Thread*> waiting;
  std::unordered_map<uint32_t, Clock> remote;  // last use by each thread of another CTA
};

struct Gang {
  const Launch* launch = nullptr;
  Config config;  // as it was at the launch
  const std::function<void()>* body = nullptr;
  std::vector<Thread> threads;
  std::vector<Cta> ctas;
  std::vector<Cluster> clusters;
  unsigned live = 0;
  std::string error;
  Stats stats{};

  // scheduler
  void* host_sp = nullptr;
  std::vector<Warp*> runnable;
  Warp* current = nullptr;
  unsigned round_robin = 0, until_starve = 0;
  uint64_t rng = 1;
  uint32_t random() {
    rng ^= rng << 13, rng ^= rng >> 7, rng ^= rng << 17;
    return uint32_t(rng >> 16);
  }

  std::vector<std::function<void()>> in_flight;  // asynchronous work not yet carried out
  std::deque<Mbarrier> mbarriers;
  std::unordered_map<const void*, Scoped> sync_variables;  // atomics
  RaceChecker race;
};

extern __thread Gang* gang;
inline Thread* self() { return static_cast<Thread*>(cur); }

// scheduler.cpp
void make_ready(Thread*);
void wake(std::vector<Thread*>&);
void block(const Wait&);
bool run_one_async();
void start_fiber(Thread*, uint8_t* stack_top);
void run_to_end(Gang&);

// async.cpp: does this asynchronous operation happen at once, or later?
bool happens_now();
void later(std::function<void()>);
void finish_copies(Thread*);

// others
void window_check(const uint8_t* p, size_t n,
                  const char* what);  // inside shared memory of a live CTA
bool watching();
void count_banks(uint32_t offset, size_t bytes, uint64_t where);
void finish_banks(Warp&);
uint8_t* shared_in(Cluster&, unsigned rank, uint32_t addr);
void barrier_thread_exit(Thread*);
void aligned(const char* op, const void* caller);
void warp_thread_exit(Warp&);
Mbarrier& mbarrier_at(uint8_t*);
void mbarrier_use(Mbarrier&, const char* op, bool by_copy = false);
void mbarrier_complete_tx(Mbarrier&, uint32_t bytes, Event);
void mbarrier_exit_check(const Cta&);
std::string describe_wait(const Thread&);
std::string describe_code(uint64_t where);
std::string describe_location(const void*);

}  // namespace emu
