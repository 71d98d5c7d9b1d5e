"""`recurx.train.swap`: the rest of a training step, in place, in official code.

    handle = recurx.train.swap(model, *optimizers, ema_helper)   # any of them, in any order
    print(handle.report)                                        # what was swapped, what not, why
    handle.remove()                                             # the originals again

Swapped are the stablemax loss of a loss head (no fp64), AdamATan2 (one launch), the sparse sign SGD
of puzzle embeddings (no `unique`), and the weight average (one launch); after it the official step
can be captured, see `CapturedStep`. Things are recognised by their structure and, where they can be
tried, by their numbers, never by their names.
"""

from __future__ import annotations

import copy
import importlib.util
import sys
from collections.abc import Callable, Iterator
from types import MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from recurx.errors import UnsupportedModel
from recurx.models.losses import stablemax_cross_entropy
from recurx.models.stablemax import fused_stablemax_cross_entropy
from recurx.patching.handle import Entry, PatchHandle
from recurx.probing import random_state
from recurx.train import optim
from recurx.train.ema import move_

_KNOWN = "a loss head with a stablemax `loss_fn`, AdamATan2, Muon, sparse sign SGD, an EMA helper"
Change = tuple[Any, str, Any]  # owner, attribute, its new value
Verdict = tuple[str, tuple[str, Any] | None]  # what is swapped or why not; attribute and new value
_ADAM, _SIGN_SGD = {"lr", "betas", "weight_decay"}, {"lr", "weight_decay", "world_size"}


def swap(*things: Any) -> PatchHandle:
    """Replace the loss, optimisers and average of an official training loop by recurx's.

    Args:
        things: modules (anything with loss heads in their tree, compiled or not), optimizers, EMA
            helpers.

    Returns:
        A handle: `.report` says what was swapped and what not and why, `.remove()` restores; it is
        a context manager too.

    Raises:
        UnsupportedModel: one of them holds nothing that recurx knows; nothing was changed.
    """
    handle = PatchHandle()
    ready: list[Change] = []
    for thing in things:
        before = len(ready)
        for where, part, (why, change) in _parts(thing):
            handle.note(Entry(where, type(part).__name__, change is not None, (why,)))
            if change is not None:
                ready.append((part, *change))
        if len(ready) == before:
            lines = [f"recurx.train.swap: nothing to swap in {type(thing).__name__}."]
            lines += [str(entry) for entry in handle.report.refused]
            raise UnsupportedModel("\n".join([*lines, f"  Known: {_KNOWN}."]))
    for owner, name, value in ready:  # all or nothing: no error comes after this line
        handle.put(owner, name, value)
    return handle


def provide_adam_atan2() -> None:
    """Let `from adam_atan2 import AdamATan2` give recurx's where that package is not installed.

    Call it before importing official training code; the real package, which must be built for a
    GPU, is left alone where it is installed.
    """
    if "adam_atan2" in sys.modules or importlib.util.find_spec("adam_atan2") is not None:
        return
    module = ModuleType("adam_atan2", "recurx's AdamATan2 under the name official code imports.")
    module.AdamATan2 = optim.AdamATan2  # type: ignore[attr-defined]
    sys.modules["adam_atan2"] = module


def _parts(thing: Any) -> Iterator[tuple[str, Any, Verdict]]:
    """(where, part, verdict) of each part of `thing` that may be swapped."""
    if isinstance(thing, torch.optim.Optimizer):
        yield "", thing, _optimizer(thing)
    elif not isinstance(thing, nn.Module):
        yield "", thing, _average(thing)
    else:
        for where, module in thing.named_modules():
            # torch.compile's wrapper shows the attributes of what it wraps, which is found too
            if callable(getattr(module, "loss_fn", None)) and "_orig_mod" not in module._modules:
                yield where, module, _loss(module)


def _loss(module: nn.Module) -> Verdict:
    difference = _not_stablemax(module.loss_fn)
    if difference is not None:
        return f"loss_fn {difference}", None
    change = ("loss_fn", fused_stablemax_cross_entropy)
    return "loss_fn: stablemax cross-entropy, no fp64", change


def _not_stablemax(loss: Callable[..., Tensor]) -> str | None:
    """None if `loss` is stablemax cross-entropy, else what differs; tried on 48 tokens."""
    if loss is fused_stablemax_cross_entropy:
        return "is recurx's already"
    logits = torch.linspace(-9, 9, 48 * 5).view(4, 12, 5).sin() * 6
    labels = torch.arange(48).view(4, 12) % 5
    labels[0, :3] = -100
    logits.requires_grad_()
    drawn = random_state(logits.device)
    weight, want = torch.linspace(0.5, 2, 48).view(4, 12), stablemax_cross_entropy(logits, labels)
    try:
        got = loss(logits, labels, ignore_index=-100)
        if not isinstance(got, Tensor) or got.shape != want.shape:
            return "does not give one value a token"
        grads = [torch.autograd.grad((t * weight).sum(), logits)[0] for t in (got, want)]
    except Exception as error:  # foreign code may raise anything; then it is no such loss
        return f"cannot be called as loss(logits, labels, ignore_index=): {error}"
    error = max(
        (ours.double() - theirs).abs().max().item() for ours, theirs in ((got, want), grads)
    )
    if random_state(logits.device) != drawn:
        return "draws random numbers"
    return None if error < 1e-5 else f"is not stablemax cross-entropy: differs by {error:.3g}"


def _optimizer(optimizer: torch.optim.Optimizer) -> Verdict:
    if isinstance(optimizer, (optim.AdamATan2, optim.SparseSignSGD, optim.Muon)):
        return "it is recurx's already", None
    settings = [set(group) - {"params", "initial_lr"} for group in optimizer.param_groups]
    if optim.reads_the_rate(optimizer):
        rule, what = optim.muon_, "Muon, which never reads the device"
    elif all(keys == _SIGN_SGD for keys in settings):
        try:
            for group in optimizer.param_groups:
                optim.embedding_buffers(group["params"])
        except ValueError as error:
            return str(error), None
        rule, what = optim.sparse_sign_sgd_, "sparse sign SGD"
    elif all(keys == _ADAM for keys in settings):
        difference = _not_adam_atan2(optimizer)
        if difference is not None:
            return difference, None
        rule, what = optim.adam_atan2_, "AdamATan2, one launch"
    else:
        return f"has the settings {sorted(set().union(*settings))}", None
    return f"step: {what}", ("step", MethodType(optim.stepping(rule), optimizer))


def _not_adam_atan2(optimizer: torch.optim.Optimizer) -> str | None:
    """None if two steps of a new one, on the device of its weights, are those of AdamATan2."""
    keys = set().union(*(state.keys() for state in optimizer.state.values()))
    if keys - {"step", "exp_avg", "exp_avg_sq"}:
        return f"keeps {sorted(keys)} of a weight"
    device = optimizer.param_groups[0]["params"][0].device
    weights = []
    for cls in (type(optimizer), optim.AdamATan2):
        weight = nn.Parameter(torch.linspace(-1, 1, 64, device=device))
        try:
            new = cls([weight], lr=0.1, betas=(0.8, 0.9), weight_decay=0.3)
            for scale in (1.0, -0.3):
                weight.grad = scale * torch.linspace(-2, 3, 64, device=device).cos()
                new.step()
        except Exception as error:  # foreign code may raise anything; then nothing is known of it
            return f"cannot be tried on a small weight: {error}"
        weights.append(weight.detach())
    error = (weights[0] - weights[1]).abs().max().item()
    return None if error < 1e-5 else f"is not AdamATan2: two steps differ by {error:.3g}"


def _average(helper: Any) -> Verdict:
    shadow, decay = getattr(helper, "shadow", None), getattr(helper, "mu", None)
    if not isinstance(shadow, dict) or not isinstance(decay, float):
        return "it has no `shadow` dict and decay `mu`", None
    if not callable(getattr(helper, "update", None)):
        return "it has no `update(module)`", None
    twin, tiny = copy.copy(helper), nn.ParameterList([torch.linspace(-1, 1, 6), torch.ones(2)])
    twin.shadow = {name: torch.full_like(p, 2) for name, p in tiny.named_parameters()}
    try:
        type(helper).update(twin, tiny)
        wanted = [2 * decay + (1 - decay) * p.detach() for p in tiny]
        pairs = zip(twin.shadow.values(), wanted, strict=True)
        if not all(torch.allclose(*pair, rtol=1e-5, atol=1e-6) for pair in pairs):
            return "`update` is not mu * average + (1 - mu) * weight", None
    except Exception as error:  # foreign code may raise anything; then nothing is known of it
        return f"`update` cannot be tried on a small module: {error}", None
    tables: Any = None

    @torch.no_grad()
    def update(self: Any, module: nn.Module) -> None:
        nonlocal tables
        if isinstance(module, nn.DataParallel):
            module = module.module
        named = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
        averages = [self.shadow[name].data for name, _ in named]
        tables = move_(averages, [p.detach() for _, p in named], 1.0 - self.mu, tables)

    change = ("update", MethodType(update, helper))
    return "update: the average of all weights, one launch", change
