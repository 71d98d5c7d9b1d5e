"""Names of weights as files have them, under wrappers of the moment, and the official names.

`torch.compile`, DDP, FSDP, Lightning, loss heads and averages each put a part of their own into the
names, in any nesting. A file may hold a net twice, as it was trained and as its average: which of
the two is meant is the reader's choice.
"""

from __future__ import annotations

from collections.abc import Iterable

from recurx.errors import CheckpointError

_WRAPPERS = {
    "_orig_mod", "module", "model", "net", "online_model", "_fsdp_wrapped_module",
    "_forward_module", "_checkpoint_wrapped_module",
}  # fmt: skip
_AVERAGES = {"ema_model", "ema", "averaged_model"}
AVERAGE = "ema_model"  # what a reader puts before the names of an average that has none
_COUNTERS = {"n_averaged", "initted", "step"}  # of torch's AveragedModel and of ema-pytorch


def official_name(name: str) -> str:
    """The name without the parts that wrappers add."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS | _AVERAGES)


def official_names(path: object, stored: Iterable[str], ema: bool | None) -> dict[str, str]:
    """{official name: name in the file}.

    Args:
        path: the file, for messages.
        stored: the names in it.
        ema: True takes the average of a weight where there is one, False never; None refuses a
            file that holds both.

    Raises:
        CheckpointError: two names mean the same weight, both are there and `ema` is None, or there
            is not what `ema` asks for.
    """
    plain: dict[str, str] = {}
    averages: dict[str, str] = {}
    stored = [name for name in stored if official_name(name) not in _COUNTERS]
    bare = any(official_name(name) == "embed_tokens.embedding_weight" for name in stored)
    for name in stored:
        official = f"inner.{official_name(name)}" if bare else official_name(name)
        names = plain if _AVERAGES.isdisjoint(name.split(".")) else averages
        if official in names:
            raise CheckpointError(
                f"{path}: keys {names[official]!r} and {name!r} both mean {official!r}."
            )
        names[official] = name
    both = next((official for official in averages if official in plain), None)
    if both is not None and ema is None:
        raise CheckpointError(
            f"{path}: holds weights as trained and their average, as {plain[both]!r} and "
            f"{averages[both]!r}. Pass ema=True for the average, which TRM is evaluated with, or "
            f"ema=False."
        )
    if ema is not None and not (averages if ema else plain):
        raise CheckpointError(
            f"{path}: ema={ema} was asked for, and it holds {'no' if ema else 'only an'} average."
        )
    return plain if ema is False else {**plain, **averages}
