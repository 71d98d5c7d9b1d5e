"""Control flow, barriers, fences, votes and the cluster."""

from __future__ import annotations


def branch(f, i) -> str:
    return f"goto {f.label(i.operands[0])};"


def leave(f, i) -> str:
    return "return;"


def trap(f, i) -> str:
    return f'emu::die("trap at PTX line {i.line}");'


def barrier(f, i) -> str:
    """bar, barrier, bar.warp and barrier.cluster"""
    if i.has("cluster"):
        if i.has("wait"):
            return "emu::cluster_wait();"
        return "emu::cluster_arrive_relaxed();" if i.has("relaxed") else "emu::cluster_arrive();"
    if i.has("warp"):
        return f"emu::syncwarp({f.value(i, i.operands[0])});"
    if i.has("red"):
        raise i.error("barrier reduction is not translated")
    count = f.value(i, i.operands[1]) if len(i.operands) > 1 else "-1"
    name = "bar_arrive" if i.has("arrive") else "bar_sync"
    return f"emu::{name}({f.value(i, i.operands[0])}, {count});"


def scope(i, otherwise: str) -> str:
    """The scope that an instruction names, as the emulator's."""
    for word, name in (("cta", "kCta"), ("cluster", "kCluster"), ("gpu", "kGpu"), ("sys", "kGpu")):
        if i.has(word):
            return f"emu::Scope::{name}"
    return f"emu::Scope::{'kGpu' if i.has('gl') else otherwise}"


def site(i) -> str:
    """Says which instruction comes, for those that want all lanes of a warp at once."""
    barrier = i.opcode in ("bar", "barrier") and not i.has("warp")
    if i.has("aligned") or (barrier and i.opcode == "bar"):
        return f'emu::at("{i.opcode} at PTX line {i.line}"); '
    return "emu::at(nullptr); " if barrier else ""


def fence(f, i) -> str:
    if i.has("mbarrier_init"):
        return "emu::mbar_init_fence();"
    if i.has("proxy"):
        if not i.has("async", "async::generic", "alias"):
            raise i.error("proxy not known")
        return "emu::proxy_fence();"
    return f"emu::fence({scope(i, 'kGpu')});"


def mbarrier(f, i) -> str:
    kind = i.words[1]
    place = next(o for o in i.operands if o.startswith("["))
    bar = f"(uint32_t){f.address(i, place)}"
    after = [f.value(i, o) for o in i.operands[i.operands.index(place) + 1 :]]
    if kind == "init":
        return f"emu::mbar_init({bar}, {after[0]});"
    if kind == "inval":
        return f"emu::mbar_inval({bar});"
    if kind == "expect_tx":
        return f"emu::mbar_expect_tx({bar}, {after[0]});"
    if kind == "arrive":
        _no_state(i)
        if i.has("expect_tx"):
            return f"emu::mbar_arrive_expect_tx({bar}, {after[0]});"
        if i.has("relaxed"):
            raise i.error("a relaxed arrival is not translated")
        return f"emu::mbar_arrive({bar}, {after[0] if after else 1}, {scope(i, 'kCta')});"
    if kind in ("try_wait", "test_wait") and i.has("parity"):
        # try_wait may return early, but every use loops on it: waiting is the same.
        if i.has("relaxed"):
            raise i.error("a relaxed wait is not translated")
        arguments = f"{bar}, {after[0]}, {scope(i, 'kCta')}"
        wait = f"emu::mbar_wait({arguments});"
        if kind == "try_wait":
            return f"{wait} {f.set(i, i.operands[0], 'true')}"
        return f"emu::yield(); {f.set(i, i.operands[0], f'emu::mbar_test({arguments})')}"
    raise i.error("mbarrier operation not known")


def _no_state(i) -> None:
    """The phase token that arrive returns is not modelled: it must be discarded."""
    if not i.operands[0].startswith("[") and i.operands[0] != "_" and i.has("noComplete"):
        raise i.error("phase tokens are not translated")


def shuffle(f, i) -> str:
    """shfl.sync.mode.b32 d[|p], a, b, c, mask: whole warps only (c names no segments)"""
    mode = {"idx": "kIdx", "up": "kUp", "down": "kDown", "bfly": "kXor"}[i.words[2]]
    target, _, valid = i.operands[0].partition("|")
    a, b, c, mask = (f.value(i, o) for o in i.operands[1:])
    inside = {"kUp": f"emu::cur->lane >= {b}", "kDown": f"emu::cur->lane + {b} < 32"}
    parts = [f"ptx::whole_warp({c}, {int(mode == 'kUp')});"]
    if valid and valid != "_":
        parts.append(f.set(i, valid, inside.get(mode, "true")))
    parts.append(f.set(i, target, f"emu::shfl({mask}, {a}, {b}, emu::Shfl::{mode})"))
    return " ".join(parts)


def vote(f, i) -> str:
    predicate, mask = (f.value(i, o) for o in i.operands[1:])
    ballot = f"emu::ballot({mask}, {predicate})"
    forms = {"ballot": ballot, "any": f"{ballot} != 0", "all": f"{ballot} == (uint32_t)({mask})"}
    form = next((forms[w] for w in i.words if w in forms), None)
    if form is None:
        raise i.error("vote not known")
    return f.set(i, i.operands[0], form)


def elect(f, i) -> str:
    """elect.sync d|p, mask: the lowest lane of the mask"""
    lane, _, predicate = i.operands[0].partition("|")
    mask = f.value(i, i.operands[1])
    chosen = f"__builtin_ctz({mask})"
    return (
        f"{{ uint32_t chosen = {chosen}; {f.set(i, lane, 'chosen')} "
        f"{f.set(i, predicate, 'emu::cur->lane == chosen')} }}"
    )


def map_address(f, i) -> str:
    address, rank = (f.value(i, o) for o in i.operands[1:])
    if not i.has("shared::cluster"):
        raise i.error("only mapa.shared::cluster is translated")
    return f.set(i, i.operands[0], f"emu::mapa((uint32_t){address}, {rank})")


def registers(f, i) -> str:
    return f"emu::setmaxnreg({f.value(i, i.operands[0])}, {str(i.has('inc')).lower()});"


def none(f, i) -> str:
    return "(void)0;"


RULES = {
    "bra": branch,
    "ret": leave,
    "exit": leave,
    "trap": trap,
    "bar": barrier,
    "barrier": barrier,
    "fence": fence,
    "membar": fence,
    "mbarrier": mbarrier,
    "shfl": shuffle,
    "vote": vote,
    "elect": elect,
    "mapa": map_address,
    "setmaxnreg": registers,
    "nanosleep": lambda f, i: "emu::yield();",
    "griddepcontrol": none,  # one kernel runs at a time: what it depends on has ended
}
