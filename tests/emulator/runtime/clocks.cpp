// clocks.cpp - vector clocks: what each actor knows of the others.
#include "clocks.h"

#include "state.h"

namespace emu {

void max_into(std::vector<Clock>& into, const Clock* from, size_t n) {
  if (into.empty()) into.assign(n, 0);
  Clock* a = into.data();
  for (size_t i = 0; i < n; i++) a[i] = a[i] > from[i] ? a[i] : from[i];
}

void RaceChecker::start(Gang& g) {
  gang_ = &g;
  on = gang->config.race;
  size_t warpgroups = 0;
  for (Cta& c : g.ctas) warpgroups += c.warpgroups.size();
  first_warpgroup_ = unsigned(g.threads.size());
  first_slot_ = unsigned(first_warpgroup_ + warpgroups);
  actors_ = first_slot_ + kBulkSlots;
  reader_may_fence_ = gang->config.reader_may_fence;
  width_ = reader_may_fence_ ? 2 * actors_ : actors_;
  if (!on) return;
  if (actors_ > 16384)
    die("%zu threads scheduled together are too many for the race checker: use a smaller grid",
        g.threads.size());
  rows_.assign(size_t(first_warpgroup_) * width_, 0);
  for (unsigned t = 0; t < first_warpgroup_; t++) rows_[size_t(t) * width_ + t] = 1;
  async_clock_.assign(actors_ - first_warpgroup_, 0);
  slot_owner_.assign(kBulkSlots, nullptr);
  start_shadow();
}

Clock* RaceChecker::row(const Thread* t) { return on ? &rows_[size_t(t->id) * width_] : nullptr; }
View RaceChecker::view(const Thread* t) { return View(row(t), &t->marks.reads); }
Clock RaceChecker::now(const Thread* t) { return on ? row(t)[t->id] : 1; }

void RaceChecker::release(Thread* t, Published& p) {
  if (!on) return;
  max_into(p.v, row(t), width_);
  if (!t->marks.reads.empty()) max_into(p.reads, t->marks.reads.data(), width_);
  row(t)[t->id]++;
}

void RaceChecker::release_reads(Thread* t, Published& p) {
  if (!on) return;
  max_into(p.reads, row(t), width_);
  if (!t->marks.reads.empty()) max_into(p.reads, t->marks.reads.data(), width_);
  row(t)[t->id]++;
}

void RaceChecker::release_relaxed(Thread* t, Published& p, Scope scope) {
  if (!on) return;
  const std::vector<Clock>& fenced = t->marks.fence_view[int(scope)];
  if (!fenced.empty()) max_into(p.v, fenced.data(), width_);
}

void RaceChecker::acquire(Thread* t, const Published& p) {
  if (!on) return;
  if (!p.reads.empty()) max_into(t->marks.reads, p.reads.data(), width_);
  if (p.v.empty()) return;
  Clock* mine = row(t);
  const Clock* theirs = p.v.data();
  for (unsigned i = 0; i < width_; i++) mine[i] = mine[i] > theirs[i] ? mine[i] : theirs[i];
}

void RaceChecker::acquire_reads(Thread* t, const Published& p) {
  if (!on) return;
  if (!p.v.empty()) max_into(t->marks.reads, p.v.data(), width_);
  if (!p.reads.empty()) max_into(t->marks.reads, p.reads.data(), width_);
}

// The set of threads that a scope holds, by the thing that is theirs; a cluster of one is its CTA.
static const void* domain(const Thread* t, Scope scope) {
  const Cluster* cluster = t->cta->cluster;
  if (scope == Scope::kGpu) return nullptr;
  return scope == Scope::kCta || cluster->ctas.size() == 1 ? static_cast<const void*>(t->cta)
                                                           : cluster;
}

// An atomic, an ld.acquire or an st.release. Relaxed ones carry what the last fence before them
// made visible, and are acquired by the next fence.
void RaceChecker::access_variable(Thread* t, Scoped& at, Order order, Scope scope) {
  const bool acquires = order == Order::kAcquire || order == Order::kAcqRel;
  const bool releases = order == Order::kRelease || order == Order::kAcqRel;
  auto each_domain = [&](auto f) {
    const void* last = t;  // no domain
    for (int s = 0; s <= int(scope); s++) {
      const void* d = domain(t, Scope(s));
      if (d != last) f(Scope(s), d);
      last = d;
    }
  };
  each_domain([&](Scope s, const void* d) {
    auto found = at.of.find(d);
    if (found == at.of.end()) return;
    if (acquires)
      acquire(t, found->second);
    else if (!found->second.v.empty())
      max_into(t->marks.relaxed_acquired[int(s)].v, found->second.v.data(), width_);
  });
  auto wide = at.of.find(nullptr);
  if ((!acquires || scope != Scope::kGpu) && wide != at.of.end() && !wide->second.v.empty())
    max_into(t->cta->seen, wide->second.v.data(), width_);
  bool fenced = releases;
  for (const auto& v : t->marks.fence_view) fenced |= !v.empty();
  if (!fenced) return;
  const Clock before = now(t);
  each_domain([&](Scope s, const void* d) {
    if (!releases) return release_relaxed(t, at.of[d], s);
    release(t, at.of[d]);
    row(t)[t->id] = before;
  });
  row(t)[t->id] = before + releases;
}

void RaceChecker::proxy_fence(Thread* t) {
  if (!on) return;
  t->marks.proxy_fences.push_back(now(t));
  if (reader_may_fence_) std::copy_n(row(t), actors_, row(t) + actors_);
  row(t)[t->id]++;
}

void RaceChecker::memory_fence(Thread* t, Scope scope) {
  if (!on) return;
  for (int s = 0; s <= int(scope); s++) acquire(t, t->marks.relaxed_acquired[s]);
  for (int s = 0; s <= int(scope); s++) t->marks.fence_view[s].assign(row(t), row(t) + width_);
  row(t)[t->id]++;
}

void RaceChecker::mbarrier_init_fence(Thread* t) {
  if (!on) return;
  t->marks.init_fences.push_back(now(t));
  memory_fence(t, Scope::kCluster);
}

// Was what `thread` initialised at `init` fenced, as far as the user knows?
bool RaceChecker::init_fenced(unsigned thread, Clock init, const Thread* user) const {
  if (!on) return true;
  const auto& fences = gang_->threads[thread].marks.init_fences;
  auto fence = std::lower_bound(fences.begin(), fences.end(), init);
  return fence != fences.end() && *fence <= rows_[size_t(user->id) * width_ + thread];
}

void RaceChecker::cp_async_waited(Thread* t, size_t groups) {
  if (!on || groups <= t->marks.cp_waits.size()) return;
  row(t)[t->id]++;
  t->marks.cp_waits.resize(groups, now(t));
}

void RaceChecker::completed(Published& p, Event e) {
  if (!on) return;
  if (p.v.empty()) p.v.assign(width_, 0);
  p.v[e.actor] = std::max(p.v[e.actor], e.clock);
}

void RaceChecker::completed(Thread* t, Event e) {
  if (on) row(t)[e.actor] = std::max(row(t)[e.actor], e.clock);
}

Event RaceChecker::thread_event(const Thread* t, uint64_t where) {
  return {now(t), uint16_t(t->id), Kind::kGeneric, where};
}

Event RaceChecker::cp_async_event(const Thread* t, const char* what) {
  return {t->cp_commits + 1, uint16_t(t->id), Kind::kCpAsync, named(what)};
}

Event RaceChecker::wgmma_event(const Cta& cta, unsigned warpgroup, const char* what) {
  unsigned actor = first_warpgroup_ + cta.index * unsigned(cta.warpgroups.size()) + warpgroup;
  if (!on) return {};
  return {++async_clock_[actor - first_warpgroup_], uint16_t(actor), Kind::kAsync, named(what)};
}

// A slot may serve again once the issuer knows of the last copy made through it: then whoever knows
// the new copy knows the old one too. If no slot is free the oldest is taken, which can hide a race
// and never invents one.
Event RaceChecker::bulk_event(const Thread* t, const char* what) {
  if (!on) return {};
  const Clock* mine = row(t);
  unsigned slot = next_slot_;
  for (unsigned i = 0; i < kBulkSlots; i++) {
    unsigned s = (next_slot_ + i) % kBulkSlots, actor = first_slot_ + s;
    if (mine[actor] < async_clock_[actor - first_warpgroup_]) continue;
    slot = s;
    break;
  }
  next_slot_ = (slot + 1) % kBulkSlots;
  slot_owner_[slot] = t;
  unsigned actor = first_slot_ + slot;
  return {++async_clock_[actor - first_warpgroup_], uint16_t(actor), Kind::kAsync, named(what)};
}

bool RaceChecker::cp_async_known(const Event& e, const View& view) const {
  const auto& waits = gang_->threads[e.actor].marks.cp_waits;
  return e.clock <= waits.size() && view.of(e.actor) >= waits[e.clock - 1];
}

// Has the writer (or, if that is allowed, a reader) made `e` visible to the async proxy, and does
// the view know that it has?
bool RaceChecker::fenced(const Event& e, const View& view) const {
  const OrderMarks& marks = gang_->threads[e.actor].marks;
  Clock written = e.clock;
  if (e.kind == Kind::kCpAsync) {
    if (e.clock > marks.cp_waits.size()) return false;
    written = marks.cp_waits[e.clock - 1];
  }
  if (reader_may_fence_) return view.of(actors_ + e.actor) >= written;
  auto fence = std::lower_bound(marks.proxy_fences.begin(), marks.proxy_fences.end(), written);
  return fence != marks.proxy_fences.end() && *fence <= view.of(e.actor);
}

}  // namespace emu
