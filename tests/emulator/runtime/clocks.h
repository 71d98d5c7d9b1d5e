// clocks.h - happens-before: vector clocks, events, and the shadow of memory.
//
// Every actor has a clock: each thread, each warpgroup (for its wgmma), and a pool of slots for
// bulk copies. A thread's row V says, for each actor, up to which clock it knows that actor's past.
// A release (barrier, mbarrier arrive, ...) publishes V and ends the thread's epoch; an acquire
// takes the maximum. An access by (actor, clock) is ordered before mine if V[actor] >= clock.
//
// Two facts need no clocks of their own, because a thread's own epoch dates them (OrderMarks):
//   cp.async   group g of thread t is complete for whoever knows the epoch in which t waited for g
//   fence.proxy.async   writes of t up to epoch e are visible to the async proxy for whoever knows
//                       an epoch of t in which t fenced, at or after e
//
// Scopes: a release is filed under the sets of threads that its scope holds (its CTA, its cluster,
// all), an acquire looks into those that its own scope holds, so the two meet only where each scope
// holds the other thread. What a thread has acquired it passes on at any scope, as PTX has it
// (causality is transitive).
// An mbarrier is laxer in one respect. Libraries and this project hand memory back to another CTA
// by arrivals at CTA scope, since the thread has used what it has read. Such an arrival, and a wait
// at CTA scope for a wider one, carries `reads`: clocks that excuse a write over what was read,
// over a bulk copy that was waited for, and over what a CTA stored in its own shared memory (an SM
// carries out its own stores there in order). They let nobody read anything.
#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <unordered_map>
#include <vector>

#include "emu.h"

namespace emu {

using Clock = uint32_t;
struct Thread;
struct Cta;
struct Gang;

enum class Kind : uint8_t {
  kGeneric,  // ld, st, ldmatrix, mbarrier.init: actor = thread
  kCpAsync,  // actor = thread, clock = number of its commit group
  kAsync,    // wgmma, bulk copies: actor = warpgroup or slot; goes through the async proxy
};
struct Event {
  Clock clock = 0;  // 0: none
  uint16_t actor = 0;
  Kind kind = Kind::kGeneric;
  uint64_t where = 0;      // code address, or named()
  bool unchanged = false;  // a write of the bytes that were there
  bool constant = false;   // ld.global.nc
};

struct Published {  // what a synchronisation object carries from its releasers to its acquirers
  std::vector<Clock> v, reads;
};
struct Scoped {  // a synchronisation variable: by CTA, by cluster, and null for all
  std::unordered_map<const void*, Published> of;
};

struct OrderMarks {
  std::vector<Clock> proxy_fences;  // epochs that ended with fence.proxy.async, ascending
  std::vector<Clock> init_fences;   // the same for fence.mbarrier_init
  std::vector<Clock> cp_waits;      // cp_waits[g]: epoch after the wait for group g, ascending
  // By scope: V at the last memory fence, published by relaxed operations, and the clocks that
  // relaxed loads read, taken over at the next fence.
  std::vector<Clock> fence_view[3];
  Published relaxed_acquired[3];
  std::vector<Clock> reads;  // what others are known to have read, beyond V
};

// What all threads of a warpgroup know: the least of their clocks, looked up when first asked for.
struct WarpgroupView {
  std::vector<const Clock*> rows;
  std::unordered_map<unsigned, Clock> least;
};

// What the issuer of an access knows: a thread's row, or a warpgroup.
class View {
 public:
  View(const Clock* row, const std::vector<Clock>* reads = nullptr) : row_(row) {
    if (reads && !reads->empty()) reads_ = reads->data();
  }
  View(WarpgroupView& group) : group_(&group) {}
  Clock of(unsigned actor) const {
    if (row_) return row_[actor];
    auto [it, fresh] = group_->least.try_emplace(actor, ~0u);
    if (fresh)
      for (const Clock* r : group_->rows) it->second = std::min(it->second, r[actor]);
    return it->second;
  }

  const Clock* reads() const { return reads_; }

 private:
  const Clock *row_ = nullptr, *reads_ = nullptr;
  WarpgroupView* group_ = nullptr;
};

// Shadow of one aligned piece of memory: its last write, and the reads since that no later read
// succeeds. Pieces of 16 bytes split into 4, and those into single bytes, where accesses are
// smaller.
struct Cell {
  Event write;
  bool initialised = false;
  Event read[2];
  std::unique_ptr<std::vector<Event>> more_reads;
  void copy_from(const Cell&);
};
struct Piece {
  Cell cell;
  bool split = false;
  std::unique_ptr<Piece[]> parts;
};
constexpr unsigned kPiece = 16;

struct Shadow {
  const uint8_t* base = nullptr;
  size_t bytes = 0;
  const Cta* cta = nullptr;  // null: watched global memory
  const char* name = "";
  std::vector<Piece> pieces;
};

class RaceChecker {
 public:
  bool on = false;
  void start(Gang&);

  // clocks
  void release(Thread*, Published&);
  void release_relaxed(Thread*, Published&, Scope);  // publishes what the last fence made visible
  void acquire(Thread*, const Published&);
  void release_reads(Thread*, Published&);
  void acquire_reads(Thread*, const Published&);
  void access_variable(Thread*, Scoped&, Order, Scope);
  void proxy_fence(Thread*);
  void memory_fence(Thread*, Scope);
  void mbarrier_init_fence(Thread*);
  bool init_fenced(unsigned thread, Clock init, const Thread* user) const;
  void cp_async_waited(Thread*, size_t groups);
  void completed(Published&, Event);  // an asynchronous operation signals an object
  void completed(Thread*, Event);     // ... or is waited for by a thread
  Clock* row(const Thread*);
  View view(const Thread*);
  Clock now(const Thread*);

  // events
  Event thread_event(const Thread*, uint64_t where);
  Event cp_async_event(const Thread*, const char* what);
  Event bulk_event(const Thread*, const char* what);
  Event wgmma_event(const Cta&, unsigned warpgroup, const char* what);

  // memory
  void touch(const void* p, size_t n, bool write, const Event&, const View&);
  bool known(const Event& e, const View& view) const {
    return e.kind == Kind::kCpAsync ? cp_async_known(e, view) : view.of(e.actor) >= e.clock;
  }
  // The same for an event that a write may follow once it is known to be over, see `reads`.
  bool used(const Event& e, const View& view) const {
    return known(e, view) || (view.reads() && known(e, View(view.reads())));
  }
  void check_mbarrier_init(const uint8_t* bar, const Thread*, const char* op);
  void exit_check(const Cta&);
  Shadow* shadow_of(const void*);

 private:
  Gang* gang_ = nullptr;
  // A row is one clock an actor; where readers may fence, it goes on with one more an actor: up to
  // which clock its writes are known to be visible to the async proxy.
  unsigned actors_ = 0, width_ = 0;
  bool reader_may_fence_ = false;
  unsigned first_warpgroup_ = 0, first_slot_ = 0, next_slot_ = 0;
  std::vector<Clock> rows_;
  std::vector<Clock> async_clock_;  // warpgroups and slots
  std::vector<const Thread*> slot_owner_;
  std::vector<Shadow> shared_, global_;

  void start_shadow();
  bool cp_async_known(const Event&, const View&) const;
  bool fenced(const Event&, const View&) const;
  void touch_piece(Piece&, unsigned size, unsigned from, unsigned n, bool write, const Event&,
                   const View&, const uint8_t* at);
  void check_write(Cell&, const Event&, const View&, const uint8_t* at);
  void check_read(Cell&, const Event&, const View&, const uint8_t* at);
  void check_proxy(const Cell&, const Event&, const View&, const uint8_t* at, bool laxly);
  bool is_own(const Event&, const uint8_t* at) const;
  bool stale(const Event&, const Event& write, const uint8_t* at) const;
  [[noreturn]] void report(const char* fault, const uint8_t* at, const Event& now,
                           const Event& before);
  std::string describe(const Event&) const;
};

// A name in the place of a code address; the top bit tells them apart.
inline uint64_t named(const char* what) { return uint64_t(what) | 1ull << 63; }
void max_into(std::vector<Clock>& into, const Clock* from, size_t n);

}  // namespace emu
