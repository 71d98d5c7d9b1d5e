// mbarrier.cpp - barriers in shared memory that count arrivals and bytes.
#include "state.h"

namespace emu {

// The eight bytes in shared memory hold the object's number and a mark, so that a barrier that was
// never initialised or was written over is recognised.
static constexpr uint64_t kMark = 0xB0A0'0000'0000'0000;

Mbarrier& mbarrier_at(uint8_t* p) {
  uint64_t stored;
  memcpy(&stored, p, 8);
  uint64_t index = stored ^ kMark;
  if (index >= gang->mbarriers.size() || gang->mbarriers[index].where != p)
    die("no mbarrier at %s: not initialised, or written over", describe_location(p).c_str());
  if (!gang->mbarriers[index].valid)
    die("mbarrier at %s was invalidated", describe_location(p).c_str());
  return gang->mbarriers[index];
}

static uint8_t* checked_address(uint32_t bar) {
  if (bar & 7) die("mbarrier address 0x%x is not 8-byte aligned", bar);
  return shared_ptr(bar);
}

void mbar_init(uint32_t bar, uint32_t count) {
  uint8_t* p = checked_address(bar);
  if (count == 0 || count >= 1u << 20) die("mbarrier.init: count %u outside 1..2^20-1", count);
  Thread* me = self();
  access(p, 8, true, "mbarrier.init");
  uint64_t stored = kMark ^ gang->mbarriers.size();
  memcpy(p, &stored, 8);
  Mbarrier& m = gang->mbarriers.emplace_back();
  m.where = p;
  m.cta = me->cta;
  m.init_thread = me->id;
  m.init_clock = gang->race.now(me);
  m.expected = m.pending = count;
}

void mbar_inval(uint32_t bar) {
  Mbarrier& m = mbarrier_at(checked_address(bar));
  mbarrier_use(m, "mbarrier.inval");
  m.valid = false;
  access(m.where, 8, true, "mbarrier.inval");
}

// What fence.mbarrier_init adds to a release: copies issued by other CTAs may complete on my
// barriers.
void mbar_init_fence() { gang->race.mbarrier_init_fence(self()); }

static void complete_if_full(Mbarrier& m) {
  if (m.pending || m.tx) return;
  m.phase++;
  m.pending = m.expected;
  auto hand_over = [](Published& from, Published& to) {
    std::swap(to.v, from.v), std::swap(to.reads, from.reads);
    from.v.clear(), from.reads.clear();
  };
  hand_over(m.clocks, m.done_clocks), hand_over(m.far, m.done_far);
  wake(m.waiting);
}

// Every use of the object must come after its initialisation in the happens-before order. A copy
// uses it until its bytes have come, which the shadow of those bytes keeps track of.
void mbarrier_use(Mbarrier& m, const char* op, bool by_copy) {
  Thread* me = self();
  if (!m.cta->live) die("%s on an mbarrier of cta %u, which has exited", op, m.cta->bid_x);
  if (!gang->race.on) return;
  gang->race.check_mbarrier_init(m.where, me, op);
  if (m.cta != me->cta && !by_copy) m.remote[me->id] = gang->race.now(me);
}

void mbar_arrive(uint32_t bar, uint32_t n, Scope scope) {
  Mbarrier& m = mbarrier_at(checked_address(bar));
  mbarrier_use(m, "mbarrier.arrive");
  if (m.pending < n)
    die("mbarrier at %s: more arrivals in a phase than its count %u",
        describe_location(m.where).c_str(), m.expected);
  if (m.cta == self()->cta)
    gang->race.release(self(), m.clocks);
  else if (scope == Scope::kCta)
    gang->race.release_reads(self(), m.clocks);
  else
    gang->race.release(self(), m.far);
  m.pending -= n;
  complete_if_full(m);
}

static void change_tx(Mbarrier& m, int64_t by) {
  m.tx += by;
  if (m.tx >= 1 << 20 || m.tx <= -(1 << 20))
    die("mbarrier at %s: byte count %ld out of range", describe_location(m.where).c_str(),
        long(m.tx));
}

void mbar_expect_tx(uint32_t bar, uint32_t bytes) {
  Mbarrier& m = mbarrier_at(checked_address(bar));
  mbarrier_use(m, "mbarrier.expect_tx");
  change_tx(m, bytes);
}

void mbar_arrive_expect_tx(uint32_t bar, uint32_t bytes) {
  mbar_expect_tx(bar, bytes);
  mbar_arrive(bar);
}

void mbarrier_complete_tx(Mbarrier& m, uint32_t bytes, Event e) {
  change_tx(m, -int64_t(bytes));
  gang->race.completed(m.clocks, e);
  complete_if_full(m);
}

bool mbar_test(uint32_t bar, uint32_t parity, Scope scope) {
  Mbarrier& m = mbarrier_at(checked_address(bar));
  mbarrier_use(m, "mbarrier.try_wait");
  if ((m.phase & 1) == (parity & 1)) return false;
  gang->race.acquire(self(), m.done_clocks);
  if (scope == Scope::kCta)
    gang->race.acquire_reads(self(), m.done_far);
  else
    gang->race.acquire(self(), m.done_far);
  return true;
}

void mbar_wait(uint32_t bar, uint32_t parity, Scope scope) {
  if (parity > 1) die("mbarrier wait: parity %u", parity);
  while (!mbar_test(bar, parity, scope)) {
    mbarrier_at(shared_ptr(bar)).waiting.push_back(self());
    block({Wait::kMbarrier, "mbarrier.try_wait", bar, parity});
  }
}

void mbarrier_exit_check(const Cta& cta) {
  for (const Mbarrier& m : gang->mbarriers) {
    if (m.cta != &cta) continue;
    for (auto [thread, clock] : m.remote)
      if (cta.exit_clocks.v[thread] < clock)
        die("race: cta %u may exit before cta %u thread %u has used its mbarrier at %s", cta.bid_x,
            gang->threads[thread].cta->bid_x, gang->threads[thread].tid.x,
            describe_location(m.where).c_str());
  }
}

}  // namespace emu
