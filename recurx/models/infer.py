"""Which model a state_dict belongs to: its configuration from names and shapes.

Head count, cycles and sequence length leave no trace in the shapes: they come from the caller, else
from the published configurations, and each such assumption is written down.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from recurx.errors import CheckpointError
from recurx.models.act import RecursiveModel, build_model
from recurx.models.config import ModelConfig, config_class, inner_width

Shapes = Mapping[str, tuple[int, ...]]

TABLE = "inner.puzzle_emb.weights"
_EMBED = "inner.embed_tokens.embedding_weight"
_BLOCK = "inner.L_level.layers.0"
# vocabulary of a published task -> (task, seq_len, TRM's L_cycles there)
_TASKS = {11: ("Sudoku", 81, 6), 12: ("ARC-AGI", 900, 4), 6: ("Maze", 900, 4)}
_HEAD_DIM = 64  # of every published model
SMALL = 10**7  # parameters that are made only to name what does not fit


def infer_config(
    state: Mapping[str, Tensor], known: Mapping[str, Any]
) -> tuple[ModelConfig, dict[str, str]]:
    """The configuration of a state_dict (names without wrapper prefixes).

    Args:
        state: tensors under the names `inner.*`.
        known: fields that are known already.

    Returns:
        The configuration, and {field: where the assumption comes from} for what is not certain.

    Raises:
        CheckpointError: the names are not those of a TRM or HRM, nothing tells a field, or `known`
            contradicts names or shapes.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if _EMBED not in shapes or len(shapes[_EMBED]) != 2:
        raise CheckpointError(
            f"no [vocab, hidden] tensor {_EMBED!r}: these are not the weights of a TRM or HRM. "
            f"Names found: {_few(sorted(shapes))}."
        )
    variant = _variant(shapes)
    fields = _certain(shapes, variant, state)
    for name in fields.keys() & known.keys() - {"forward_dtype"}:
        if known[name] != fields[name]:
            raise CheckpointError(
                f"its tensors say {name}={fields[name]!r}, and {name}={known[name]!r} was passed "
                f"(or is in its metadata or all_config.yaml). Leave it out, or take another file."
            )
    assumed: dict[str, str] = {}
    for name, (value, why) in _assumptions(shapes, fields, known, variant).items():
        if name not in known:
            fields[name], assumed[name] = value, why
    if "expansion" not in known:
        fields |= _expansion(shapes, fields["hidden_size"], known)
    if "forward_dtype" in known:  # a choice: weights are masters, and start states are cast
        fields["forward_dtype"] = known["forward_dtype"]
    return config_class(variant).from_dict({**known, **fields}), assumed


def _variant(shapes: Shapes) -> str:
    if any(name.startswith("inner.H_level.") for name in shapes):
        return "hrm"
    if "inner.L1_init" in shapes:
        return "hier6"
    return "trm" if "inner.H_init" in shapes else "single_z"


def _certain(shapes: Shapes, variant: str, state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Fields that names, shapes and dtypes fix."""
    vocab, hidden = shapes[_EMBED]
    fields: dict[str, Any] = {
        "variant": variant,
        "vocab_size": vocab,
        "hidden_size": hidden,
        "L_layers": _layers(shapes, "L_level"),
        "mlp_t": any(".mlp_t." in name for name in shapes),
    }
    if variant == "hrm":
        fields["H_layers"] = _layers(shapes, "H_level")
    start = state.get("inner.L_init", state.get("inner.L1_init"))
    if start is not None:
        fields["forward_dtype"] = str(start.dtype).removeprefix("torch.")
    table = shapes.get(TABLE)
    fields["puzzle_emb_ndim"] = table[1] if table else 0
    if table:
        fields["num_puzzle_identifiers"] = table[0]
    if "inner.embed_pos.embedding_weight" in shapes:
        fields["pos_encodings"] = "learned"
    return fields


def _assumptions(
    shapes: Shapes, fields: dict[str, Any], known: Mapping[str, Any], variant: str
) -> dict[str, tuple[Any, str]]:
    """{field: (value, why)} for what the shapes leave open."""
    hidden, vocab, published = fields["hidden_size"], fields["vocab_size"], config_class(variant)
    task, seq_len, l_cycles = _TASKS.get(vocab, ("?", None, published.L_cycles))
    by_vocab = f"vocab_size={vocab}: that of {task}"
    out: dict[str, tuple[Any, str]] = {"H_cycles": (published.H_cycles, "as published")}
    if variant == "hrm":
        out["L_cycles"] = published.L_cycles, "as published"
    else:
        low = published.L_cycles if variant == "hier6" else l_cycles
        out["L_cycles"] = low, by_vocab if task != "?" else "as published for Sudoku"
    if not fields["mlp_t"]:
        out["num_heads"] = max(1, hidden // _HEAD_DIM), "head_dim 64, as published"
    if "pos_encodings" not in fields:
        value, kind = ("none", "token-MLP") if fields["mlp_t"] else ("rope", "attention")
        out["pos_encodings"] = value, f"as published for {kind} blocks"

    prefix = 0
    if fields["puzzle_emb_ndim"]:
        length = known.get("puzzle_emb_len", published.puzzle_emb_len)
        out["puzzle_emb_len"] = length, "as published (0: just enough tokens)"
        prefix = length or -(-fields["puzzle_emb_ndim"] // hidden)
    # T, where a weight has that length.
    for name in (f"{_BLOCK}.mlp_t.down_proj.weight", "inner.embed_pos.embedding_weight"):
        if name in shapes:
            tokens = shapes[name][0]
            out["seq_len"] = tokens - prefix, f"{tokens} tokens less a prefix of {prefix}"
            return out
    if seq_len is not None:
        out["seq_len"] = seq_len, by_vocab
    elif "seq_len" not in known:
        raise CheckpointError(
            f"nothing in the checkpoint tells seq_len (vocab_size={vocab} is of no published "
            f"task). Pass it: load_checkpoint(path, seq_len=...)."
        )
    return out


def _expansion(shapes: Shapes, hidden: int, known: Mapping[str, Any]) -> dict[str, Any]:
    """`expansion` and `inner_multiple` that give the SwiGLU widths seen, the published ones first.

    Many do; they make the same model. If none does, the comparison of shapes names the mismatch.
    """
    inner = shapes.get(f"{_BLOCK}.mlp.down_proj.weight", (hidden, 0))[1]
    token = shapes.get(f"{_BLOCK}.mlp_t.down_proj.weight")
    seen = [(hidden, inner), *([token] if token else [])]
    multiples = [known["inner_multiple"]] if "inner_multiple" in known else [256, 128, 64, 32, 16]
    for multiple in multiples:
        for expansion in (4.0, 2.0, 8 / 3, 3.0, 8.0, 1.5 * inner / hidden):
            if all(inner_width(expansion, width, multiple) == found for width, found in seen):
                return {"expansion": expansion, "inner_multiple": multiple}
    return {}


def _layers(shapes: Shapes, level: str) -> int:
    prefix = f"inner.{level}.layers."
    return max(1, len({n.split(".")[3] for n in shapes if n.startswith(prefix)}))


def check_names_and_shapes(config: ModelConfig, state: Mapping[str, Tensor]) -> None:
    """Compare a state_dict with what a model of `config` has.

    Raises:
        CheckpointError: naming missing, unexpected and mismatched keys with their shapes.
    """
    # NOTE: not on the meta device, which imports 900 modules of torch (150 MB, seconds).
    numbers, most = _parameters(config), 2 * sum(tensor.numel() for tensor in state.values())
    if numbers > most + SMALL:
        raise CheckpointError(f"{config!r} has {numbers:,} parameters, the file at most {most:,}.")
    model = untrained(config.replace(batch_size=1))
    want = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if TABLE in want:
        want[TABLE] = (config.num_puzzle_identifiers, config.puzzle_emb_ndim)
    problems = [f"missing {n!r} {list(s)}" for n, s in want.items() if n not in state]
    problems += [f"unexpected {n!r} {list(state[n].shape)}" for n in state if n not in want]
    problems += [
        f"{n!r} is {list(state[n].shape)}, expected {list(s)}"
        for n, s in want.items()
        if n in state and tuple(state[n].shape) != s
    ]
    if problems:
        raise CheckpointError(f"it does not fit {config!r}: {_few(problems)}.")


def _parameters(config: ModelConfig) -> int:
    """About how many numbers the nets of a model hold, before any is made."""
    width, tokens = config.hidden_size, config.tokens
    mlp = 3 * width * config.inner_width(width)
    mixer = 3 * tokens * config.inner_width(tokens) if config.mlp_t else 4 * width * width
    return (config.L_layers + config.H_layers) * (mlp + mixer) + 2 * config.vocab_size * width


def untrained(config: ModelConfig, backend: str = "auto") -> RecursiveModel:
    """A fresh model on the CPU, its puzzle table one row; leaves the random state as it was."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        model = build_model(config.replace(num_puzzle_identifiers=1), backend)
    model.config = model.inner.config = config
    return model


def _few(items: list[str], limit: int = 6) -> str:
    rest = len(items) - limit
    return "; ".join(items[:limit]) + (f"; and {rest} more" if rest > 0 else "")
