"""A model that is asked in another mode, or on another backend, than its attributes say.

Other threads may be calling it, so recurx's own models take both as arguments. One of other code is
changed and restored, by one `solve` at a time; who trains it meanwhile, trains in evaluation mode.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

from torch import nn

from recurx.errors import bad_argument
from recurx.forking import fork_lock

_changing = fork_lock()
_changed: list[nn.Module] = []  # from training to evaluation


@contextlib.contextmanager
def evaluating(model: Any, backend: str | None) -> Iterator[dict[str, Any]]:
    """Inside, calls of the ACT wrapper `model` with the keywords that this yields are evaluation,
    on `backend` (None: as the model says)."""
    if _takes_arguments(model):
        yield {"training": False, "backend": backend}
        return
    with contextlib.ExitStack() as until_done:
        with _changing:  # here it waits for others that change it
            training = [module for module in model.modules() if module.training]
            if training or backend is not None:
                until_done.enter_context(_changing)
            _changed.extend(training)
            model.eval()
            until_done.callback(_restore, training)
            until_done.enter_context(_running_on(model, backend))
        yield {}


def _restore(modules: list[nn.Module]) -> None:
    for module in modules:
        module.training = True
    del _changed[len(_changed) - len(modules) :]


# Nobody is left in a forked child who would do it.
os.register_at_fork(after_in_child=lambda: _restore(_changed[:]))


def _takes_arguments(model: Any) -> bool:
    """Whether all of it is recurx's own code, whatever its mode: that may be another thread's."""
    return all(
        "forward" not in vars(module)
        and type(module).__module__.startswith(("recurx.", "torch.nn.modules.container"))
        for module in model.modules()
    )


@contextlib.contextmanager
def _running_on(model: Any, backend: str | None) -> Iterator[None]:
    """Inside, the model's recursion runs on `backend` (None changes nothing)."""
    from recurx.models.inner import Inner
    from recurx.patching import patch
    from recurx.patching.handle import installed

    if backend is None:
        yield
    elif isinstance(model.inner, Inner):
        before, model.inner.backend = model.inner.backend, backend
        try:
            yield
        finally:
            model.inner.backend = before
    elif installed(model.inner, "forward") is not None:
        raise bad_argument(
            "solve", "backend", "None for a patched model", repr(backend),
            "It runs on the backend that recurx.patch(model, backend=...) was given.",
        )  # fmt: skip
    else:
        with patch(model, backend=backend):
            yield
