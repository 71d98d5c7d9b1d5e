// race.cpp - the shadow of memory: every access is compared with the earlier ones it conflicts
// with.
#include <dlfcn.h>

#include "clocks.h"
#include "state.h"

namespace emu {

namespace {
struct Watched {
  const uint8_t* base;
  size_t bytes;
  std::string name;
};
std::vector<Watched> watched;
}  // namespace

void watch(const void* base, size_t bytes, const char* name) {
  watched.push_back({static_cast<const uint8_t*>(base), bytes, name});
}
void unwatch_all() { watched.clear(); }
bool watching() { return !watched.empty(); }

void Cell::copy_from(const Cell& c) {
  write = c.write, initialised = c.initialised, read[0] = c.read[0], read[1] = c.read[1];
  more_reads = c.more_reads ? std::make_unique<std::vector<Event>>(*c.more_reads) : nullptr;
}

void RaceChecker::start_shadow() {
  auto cover = [](const uint8_t* p, size_t n) {
    Shadow s;
    s.base = reinterpret_cast<const uint8_t*>(uintptr_t(p) / kPiece * kPiece);
    s.bytes = size_t(p + n - s.base);
    s.pieces = std::vector<Piece>(s.bytes / kPiece + 1);
    return s;
  };
  for (Cta& c : gang_->ctas) {
    shared_.push_back(cover(c.smem, c.end));
    shared_.back().cta = &c;
  }
  for (auto& w : watched) {
    global_.push_back(cover(w.base, w.bytes));
    global_.back().name = w.name.c_str();
    for (Piece& p : global_.back().pieces) p.cell.initialised = true;
  }
}

Shadow* RaceChecker::shadow_of(const void* p) {
  const uint8_t* at = static_cast<const uint8_t*>(p);
  size_t offset = size_t(at - gang_->ctas[0].smem);
  if (offset < gang_->ctas.size() * kWindow) return &shared_[offset / kWindow];
  for (Shadow& s : global_)
    if (size_t(at - s.base) < s.bytes) return &s;
  return nullptr;
}

void RaceChecker::touch(const void* p, size_t n, bool write, const Event& e, const View& view) {
  if (!on) return;
  Shadow* shadow = shadow_of(p);
  if (!shadow) return;
  const uint8_t* at = static_cast<const uint8_t*>(p);
  size_t first = size_t(at - shadow->base), last = std::min(first + n, shadow->bytes);
  for (size_t i = first; i < last;) {
    size_t in_piece = i % kPiece, take = std::min<size_t>(kPiece - in_piece, last - i);
    touch_piece(shadow->pieces[i / kPiece], kPiece, unsigned(in_piece), unsigned(take), write, e,
                view, shadow->base + i);
    i += take;
  }
}

void RaceChecker::touch_piece(Piece& piece, unsigned size, unsigned from, unsigned n, bool write,
                              const Event& e, const View& view, const uint8_t* at) {
  if (!piece.split && n == size) {
    write ? check_write(piece.cell, e, view, at) : check_read(piece.cell, e, view, at);
    return;
  }
  unsigned part = size / 4;
  if (!piece.split) {
    if (!piece.parts) piece.parts = std::make_unique<Piece[]>(4);
    for (unsigned i = 0; i < 4; i++) {
      piece.parts[i].cell.copy_from(piece.cell);
      piece.parts[i].split = false;
    }
    piece.split = true;
  }
  for (unsigned i = from; i < from + n;) {
    unsigned in_part = i % part, take = std::min(part - in_part, from + n - i);
    touch_piece(piece.parts[i / part], part, in_part, take, write, e, view, at + (i - from));
    i += take;
  }
  if (write && n == size) {  // one event covers all of it again
    piece.cell.copy_from(piece.parts[0].cell);
    piece.split = false;
  }
}

// The same value, by the same instruction, from lanes of one warp: compilers do not bother to
// choose one of them. Nor do Triton's among warps that hold copies of a row's sum: there it is the
// whole CTA (`copies_may_write`).
static bool same_store(const Event& e, const Event& before) {
  if (!e.unchanged || e.kind != Kind::kGeneric || before.kind != Kind::kGeneric ||
      e.where != before.where)
    return false;
  if (gang->config.copies_may_write)
    return gang->threads[e.actor].cta == gang->threads[before.actor].cta;
  return e.actor / 32 == before.actor / 32;
}

void RaceChecker::check_write(Cell& c, const Event& e, const View& view, const uint8_t* at) {
  const bool laxly = is_own(c.write, at);
  if (c.write.clock && !(laxly ? used(c.write, view) : known(c.write, view)) &&
      !same_store(e, c.write))
    report("race: write after write", at, e, c.write);
  auto check = [&](const Event& r) {
    if (r.constant) report("write to memory that ld.global.nc has read in this launch", at, e, r);
    if (!used(r, view)) report("race: write after read", at, e, r);
  };
  for (Event& r : c.read)
    if (r.clock) check(r);
  if (c.more_reads) {
    for (Event& r : *c.more_reads) check(r);
    c.more_reads.reset();
  }
  check_proxy(c, e, view, at, laxly);
  c.write = e;
  c.initialised = true;
  c.read[0].clock = c.read[1].clock = 0;
}

void RaceChecker::check_read(Cell& c, const Event& e, const View& view, const uint8_t* at) {
  if (!c.initialised) report("read of uninitialised shared memory", at, e, {});
  if (e.constant && c.write.clock)
    report("ld.global.nc of memory that this launch has written", at, e, c.write);
  if (c.write.clock && !known(c.write, view))
    report(stale(e, c.write, at) ? "race: read after write, stale L1: plain load of data written "
                                   "by another CTA without a gpu-scope acquire by this thread's CTA"
                                 : "race: read after write",
           at, e, c.write);
  check_proxy(c, e, view, at, false);
  // A read that this one comes after need not be kept: what races with it races with this one.
  for (Event& r : c.read)
    if (!r.clock || (r.actor == e.actor && r.kind == e.kind) || known(r, view)) {
      r = e;
      return;
    }
  if (!c.more_reads) c.more_reads = std::make_unique<std::vector<Event>>();
  for (Event& r : *c.more_reads)
    if ((r.actor == e.actor && r.kind == e.kind) || known(r, view)) {
      r = e;
      return;
    }
  c.more_reads->push_back(e);
}

// A bulk copy, or a store of a thread to the shared memory of its own CTA.
bool RaceChecker::is_own(const Event& write, const uint8_t* at) const {
  if (write.kind == Kind::kAsync) return true;
  const size_t offset = size_t(at - gang_->ctas[0].smem);
  return offset < gang_->ctas.size() * kWindow &&
         &gang_->ctas[offset / kWindow] == gang_->threads[write.actor].cta;
}

// Has the CTA read a flag that says the data is there, but not so that its L1 was emptied?
bool RaceChecker::stale(const Event& e, const Event& write, const uint8_t* at) const {
  if (e.kind != Kind::kGeneric || write.kind != Kind::kGeneric) return false;
  const Cta* mine = gang_->threads[e.actor].cta;
  const bool is_global = size_t(at - gang_->ctas[0].smem) >= gang_->ctas.size() * kWindow;
  return is_global && gang_->threads[write.actor].cta != mine && !mine->seen.empty() &&
         mine->seen[write.actor] >= write.clock;
}

// Generic writes reach the async proxy (wgmma, bulk copies) only through fence.proxy.async, made by
// the thread that wrote.
void RaceChecker::check_proxy(const Cell& c, const Event& e, const View& view, const uint8_t* at,
                              bool laxly) {
  if (!gang_->config.proxies) return;
  if (e.kind != Kind::kAsync || !c.write.clock || c.write.kind == Kind::kAsync) return;
  if (!fenced(c.write, view) && !(laxly && view.reads() && fenced(c.write, View(view.reads()))))
    report("missing fence.proxy.async after a generic write", at, e, c.write);
}

void RaceChecker::check_mbarrier_init(const uint8_t* bar, const Thread* t, const char* op) {
  Shadow* s = shadow_of(bar);
  const Piece* p = &s->pieces[size_t(bar - s->base) / kPiece];
  size_t in_piece = size_t(bar - s->base) % kPiece;
  if (p->split) p = &p->parts[in_piece / 4];
  const Event& init = (p->split ? p->parts[0] : *p).cell.write;
  if (!known(init, row(t)))
    report("race: mbarrier used before its initialisation is visible", bar,
           thread_event(t, named(op)), init);
}

// A CTA leaves: what other CTAs and the copy engines did to its shared memory must be over, as far
// as its own threads know.
void RaceChecker::exit_check(const Cta& cta) {
  if (!on) return;
  View view(cta.exit_clocks.v.data(), &cta.exit_clocks.reads);
  auto outside = [&](const Event& e) {
    bool own_thread = e.actor >= cta.first_thread && e.actor < cta.first_thread + cta.thread_count;
    return e.clock && !own_thread && !used(e, view);
  };
  std::function<void(const Piece&, unsigned, const uint8_t*)> visit =
      [&](const Piece& p, unsigned size, const uint8_t* at) {
        if (p.split) {
          for (unsigned i = 0; i < 4; i++) visit(p.parts[i], size / 4, at + i * (size / 4));
          return;
        }
        const char* fault = "race: the CTA may exit before this access to its shared memory";
        Event exit{1, uint16_t(cta.first_thread), Kind::kGeneric, named("exit")};
        if (outside(p.cell.write)) report(fault, at, exit, p.cell.write);
        for (const Event& r : p.cell.read)
          if (outside(r)) report(fault, at, exit, r);
        if (p.cell.more_reads)
          for (const Event& r : *p.cell.more_reads)
            if (outside(r)) report(fault, at, exit, r);
      };
  const Shadow& s = shared_[cta.index];
  for (size_t i = 0; i < s.pieces.size(); i++) visit(s.pieces[i], kPiece, s.base + i * kPiece);
}

// ---- reports
std::string describe_location(const void* p) {
  char text[160];
  const uint8_t* at = static_cast<const uint8_t*>(p);
  size_t offset = size_t(at - gang->ctas[0].smem);
  if (offset < gang->ctas.size() * kWindow) {
    const Cta& c = gang->ctas[offset / kWindow];
    snprintf(text, sizeof text, "cta %u dynamic shared memory byte %ld", c.bid_x,
             long(offset % kWindow) - long(c.dyn));
    return text;
  }
  Shadow* s = gang->race.on ? gang->race.shadow_of(p) : nullptr;
  if (!s) return "global memory";
  snprintf(text, sizeof text, "global memory '%s' byte %ld", s->name, long(at - s->base));
  return text;
}

std::string describe_code(uint64_t where) {
  if (where >> 63) return reinterpret_cast<const char*>(where & ~(1ull << 63));
  Dl_info info;
  char text[300];
  if (!dladdr(reinterpret_cast<void*>(where), &info) || !info.dli_fname) return "unknown code";
  snprintf(text, sizeof text, "<%s+0x%lx>", info.dli_fname,
           long(where - reinterpret_cast<uint64_t>(info.dli_fbase)));
  return text;
}

std::string RaceChecker::describe(const Event& e) const {
  std::string what = describe_code(e.where), who;
  auto thread = [](const Thread& t) {
    return "cta " + std::to_string(t.cta->bid_x) + " thread " + std::to_string(t.tid.x);
  };
  if (e.actor < first_warpgroup_) {
    who = thread(gang_->threads[e.actor]);
  } else if (e.actor < first_slot_) {
    unsigned per_cta = unsigned(gang_->ctas[0].warpgroups.size()), g = e.actor - first_warpgroup_;
    who = "cta " + std::to_string(gang_->ctas[g / per_cta].bid_x) + " warpgroup " +
          std::to_string(g % per_cta);
  } else {
    who = "a copy issued by " + thread(*slot_owner_[e.actor - first_slot_]);
  }
  return who + " (" + what + ")";
}

void RaceChecker::report(const char* fault, const uint8_t* at, const Event& now,
                         const Event& before) {
  std::string text = std::string(fault) + " at " + describe_location(at) + ": " + describe(now);
  if (before.clock) text += " against earlier " + describe(before);
  die("%s", text.c_str());
}

}  // namespace emu
