"""Configurations of TRM and HRM: frozen values with the official key names.

Four published systems are one configurable model here. What tells them apart is data: the
`Variant` (states, init buffers, nets, schedule) and the fields below.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch

from recurx.errors import bad_argument
from recurx.models.systems import VARIANTS
from recurx.schedule import FACTORS, Schedule
from recurx.specs import ATTENTION, TOKEN_MLP, BlockSpec

POS_ENCODINGS, FEEDBACKS = ("rope", "learned", "none"), ("", "softmax", "argmax")
DTYPES = ("bfloat16", "float32", "float16", "float64")

# Least and most of each whole number: far above any model, little enough for memory and time.
_RANGES = {
    "vocab_size": (1, 2**24), "seq_len": (1, 2**16), "H_cycles": (1, 4096), "L_cycles": (1, 4096),
    "H_layers": (0, 1024), "L_layers": (1, 1024), "hidden_size": (1, 2**16),
    "num_heads": (1, 2**16), "inner_multiple": (1, 2**16), "puzzle_emb_ndim": (0, 2**20),
    "puzzle_emb_len": (0, 2**16), "num_puzzle_identifiers": (1, 2**31 - 1),
    "batch_size": (1, 2**20), "halt_max_steps": (1, 2**20),
}  # fmt: skip
MOST_CALLS = 10_000  # of nets in a supervision step; published models have 21

# Keys of official configurations that say nothing about the model's arithmetic.
_OFFICIAL_EXTRAS = ("name", "loss", "causal")
# Their `arch.name` values: "recursive_reasoning.trm_singlez@Class" and the like.
_OFFICIAL_NAMES = {"trm_singlez": "single_z", "trm_hier6": "hier6", "trm": "trm", "hrm": "hrm"}


Self = TypeVar("Self", bound="ModelConfig")


@dataclass(frozen=True)
class ModelConfig:
    """All that makes a model, under the official names.

    Args:
        vocab_size: number of token ids, input and output.
        seq_len: tokens of a puzzle, without the prefix of the puzzle embedding.
        variant: "trm", "single_z", "hier6" or "hrm".
        H_cycles, L_cycles: cycles a supervision step, and low-level calls a cycle.
        H_layers, L_layers: blocks of the H net (HRM only) and of the L net.
        hidden_size, num_heads: D and H; D is a multiple of H.
        expansion: of the SwiGLUs: inner width = expansion * width * 2/3, rounded, then rounded up
            to a multiple of `inner_multiple` (official: 256).
        pos_encodings: "rope", "learned" or "none".
        mlp_t: token-MLP blocks instead of attention blocks.
        puzzle_emb_ndim: width of one puzzle's embedding; 0 for none.
        puzzle_emb_len: tokens that it fills before the puzzle; 0 for just enough of them.
        num_puzzle_identifiers: rows of the puzzle embedding.
        batch_size: largest training batch of the puzzle embedding (its local rows).
        halt_max_steps: supervision steps at most; evaluation always takes all of them.
        halt_exploration_prob: how often a training sample draws a minimum number of steps.
        no_ACT_continue: halt on q_halt > 0; False is HRM's Q-learning with a bootstrapped target.
        forward_dtype: dtype of states and activations; weights stay fp32 masters.
        grad_window: None for the published window, "full", or a number of calls.
        damping, scale, noise: factors of every step, see `recurx.Step`.
        block: fields of `recurx.BlockSpec` in which all blocks differ from TRM's, as text:
            "conv:2", or "norm:layer,placement:pre,biases:qkv+o". Their weights are then called
            `layers.N.weights.SLOT`. "dropout:0.1,drop_path:0.1" drops in training, and only there.
        feedback: what a supervision step hears of the last answer, added to x by a matrix of its
            own that starts at zero: its "softmax" (Sotaku), its "argmax" (priml), "" nothing.

    Raises:
        InvalidArgument: a value is of the wrong type or range; the message names it.
    """

    vocab_size: int
    seq_len: int
    variant: str = "trm"
    H_cycles: int = 3
    L_cycles: int = 6
    H_layers: int = 0
    L_layers: int = 2
    hidden_size: int = 512
    num_heads: int = 8
    expansion: float = 4.0
    inner_multiple: int = 256
    pos_encodings: str = "rope"
    mlp_t: bool = False
    puzzle_emb_ndim: int = 0
    puzzle_emb_len: int = 16
    num_puzzle_identifiers: int = 1
    batch_size: int = 1
    halt_max_steps: int = 16
    halt_exploration_prob: float = 0.1
    no_ACT_continue: bool = True
    forward_dtype: str = "bfloat16"
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    grad_window: int | str | None = None
    damping: float = 1.0
    scale: float = 1.0
    noise: float = 0.0
    block: str = ""
    feedback: str = ""

    ALLOWED_VARIANTS: ClassVar[tuple[str, ...]] = tuple(VARIANTS)

    def __post_init__(self) -> None:
        kinds = _kinds(type(self))
        check_values(type(self).__name__, vars(self), kinds)
        for name, kind in kinds.items():  # YAML and JSON write 3 as 3.0, and the other way round
            if kind in ("int", "float"):
                value = getattr(self, name)
                object.__setattr__(self, name, int(value) if kind == "int" else float(value))
        for name, fits, expected in self._bounds():
            if not fits:
                raise self._bad(name, expected, getattr(self, name))
        _ = self.schedule, self.block_spec  # checks of their own: L_cycles of hier6, block

    # ---- derived ---------------------------------------------------------------------------

    @property
    def prefix_len(self) -> int:
        """Tokens that the puzzle embedding puts before the puzzle (official: puzzle_emb_len)."""
        if self.puzzle_emb_ndim == 0:
            return 0
        return self.puzzle_emb_len or -(-self.puzzle_emb_ndim // self.hidden_size)

    @property
    def tokens(self) -> int:
        """T, the tokens of a state: prefix and puzzle."""
        return self.prefix_len + self.seq_len

    @property
    def dtype(self) -> torch.dtype:
        """`forward_dtype` as a torch.dtype."""
        dtype: torch.dtype = getattr(torch, self.forward_dtype)
        return dtype

    @property
    def schedule(self) -> Schedule:
        """The net calls of one supervision step."""
        plain = VARIANTS[self.variant].schedule(self.H_cycles, self.L_cycles, self.grad_window)
        factors = {name: getattr(self, name) for name in FACTORS}
        return plain if factors == FACTORS else plain.with_factors(**factors)

    @property
    def block_spec(self) -> BlockSpec:
        """Each of the blocks."""
        width = self.hidden_size
        if self.mlp_t:
            mixer = {"tokens": self.tokens, "token_inner": self.inner_width(self.tokens)}
        else:
            mixer = {"num_heads": self.num_heads}
        kind, inner = (TOKEN_MLP if self.mlp_t else ATTENTION), self.inner_width(width)
        plain = BlockSpec(kind, width, inner, **mixer, eps=self.rms_norm_eps)
        spec = plain.with_fields(self.block) if self.block else plain
        if spec.key_padding:
            raise self._bad("block", "no key_padding: a model has no mask of keys", self.block)
        return spec

    def inner_width(self, width: int) -> int:
        """Inner width F of a SwiGLU over `width`."""
        return inner_width(self.expansion, width, self.inner_multiple)

    def replace(self: Self, **changes: Any) -> Self:
        """A copy with some fields changed, validated again."""
        return dataclasses.replace(self, **_known(type(self), changes))

    # ---- reading and writing ---------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain values."""
        return dataclasses.asdict(self)

    def to_json(self) -> str:
        """One line of JSON; `from_json` reads it back."""
        return json.dumps(self.to_dict())

    @classmethod
    def from_json(cls: type[Self], text: str) -> Self:
        """The configuration that `to_json` wrote."""
        return cls.from_dict(json.loads(text))

    @classmethod
    def from_dict(cls: type[Self], values: Mapping[str, Any]) -> Self:
        """From plain values, those of an official configuration (`arch` section) included.

        The official `name` picks the variant; `loss` and `causal` are ignored; numbers may come
        as integral floats. An unknown key raises InvalidArgument.
        """
        values = dict(values)
        module = str(values.get("name", "")).partition("@")[0].rpartition(".")[2]
        if module in _OFFICIAL_NAMES:
            values.setdefault("variant", _OFFICIAL_NAMES[module])
        return cls(**_known(cls, {k: v for k, v in values.items() if k not in _OFFICIAL_EXTRAS}))

    # ---- checks ----------------------------------------------------------------------------

    def _bounds(self) -> Iterator[tuple[str, bool, str]]:
        """(field, whether it fits, what is expected); each may rely on those before it."""
        for name, choices in (
            ("variant", self.ALLOWED_VARIANTS),
            ("pos_encodings", POS_ENCODINGS),
            ("forward_dtype", DTYPES),
            ("feedback", FEEDBACKS),
        ):
            yield name, getattr(self, name) in choices, f"one of {', '.join(choices)}"
        for name in ("expansion", "rms_norm_eps", "rope_theta"):
            yield name, 0 < getattr(self, name) < 1e30, "a positive finite number"
        share = self.halt_exploration_prob
        yield "halt_exploration_prob", 0 <= share <= 1, "within 0..1"
        width, heads = self.hidden_size, self.num_heads
        calls = self.H_cycles * (self.L_cycles + 1)
        yield "L_cycles", calls <= MOST_CALLS, f"H_cycles x (L_cycles + 1) at most {MOST_CALLS}"
        widths = (width, self.tokens) if self.mlp_t else (width,)
        inner = [self.inner_width(wide) for wide in widths]
        around = f"inner widths within 1..{2**20}, not {inner} of {list(widths)}"
        yield "expansion", all(1 <= wide <= 2**20 for wide in inner), around
        yield "num_heads", self.mlp_t or width % heads == 0, f"a divisor of hidden_size={width}"
        turns = self.pos_encodings == "rope" and not self.mlp_t
        even = f"an even head_dim for rope, not {width // heads}"
        yield "num_heads", not turns or width // heads % 2 == 0, even
        yield "H_layers", self.variant != "hrm" or self.H_layers >= 1, "at least 1 for HRM"
        room = f"at most puzzle_emb_len x hidden_size = {self.prefix_len} x {width}"
        yield "puzzle_emb_ndim", self.puzzle_emb_ndim <= self.prefix_len * width, room

    def _bad(self, name: str, expected: str, got: object) -> Exception:
        return bad_argument(type(self).__name__, name, expected, repr(got))


@functools.cache
def _kinds(cls: type[ModelConfig]) -> dict[str, str]:
    return {field.name: str(field.type) for field in dataclasses.fields(cls)}


def check_values(
    op: str, values: Mapping[str, Any], kinds: Mapping[str, str] | None = None
) -> None:
    """Types and ranges of single fields, wherever they come from; other names are not looked at.

    Raises:
        InvalidArgument: naming the field, what was expected and what came.
    """
    for name, value in values.items():
        kind = (kinds or _kinds(ModelConfig)).get(name, "")
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        least, most = _RANGES.get(name, (1, 2**16))
        expected = ""
        if kind == "int" and not (number and value == value // 1):  # 3.0 too, and neither NaN
            expected = "an int"
        elif kind == "int" and not least <= value <= most:
            expected = f"at least {least}" if value < least else f"at most {most}"
        elif kind == "float" and not number:
            expected = "a number"
        elif kind in ("bool", "str") and type(value).__name__ != kind:
            expected = "True or False" if kind == "bool" else "a str"
        if expected:
            raise bad_argument(op, name, expected, repr(value)[:80])


def inner_width(expansion: float, width: int, multiple: int) -> int:
    """Inner width F of a SwiGLU: `expansion` * `width` * 2/3, rounded up to a `multiple`."""
    return -(-round(expansion * width * 2 / 3) // multiple) * multiple


def _known(cls: type[ModelConfig], values: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of `values`; refuses keys that are no fields of `cls`."""
    fields = _kinds(cls)
    for name in values.keys() - fields.keys():
        expected = f"one of the fields {', '.join(fields)}"
        raise bad_argument(cls.__name__, name, expected, "an unknown name")
    return dict(values)


@dataclass(frozen=True)
class TRMConfig(ModelConfig):
    """Configuration of a TRM (also single-z and hier6); the defaults are the published ones."""

    ALLOWED_VARIANTS: ClassVar[tuple[str, ...]] = ("trm", "single_z", "hier6")

    @classmethod
    def sudoku_att(cls, **changes: Any) -> TRMConfig:
        """Attention on 9x9 Sudoku: T = 97 (81 + 16), D = 512, 21 calls; 11 tokens (pad, 0..9)."""
        return cls(vocab_size=11, seq_len=81, puzzle_emb_ndim=512).replace(**changes)

    @classmethod
    def sudoku_mlp(cls, **changes: Any) -> TRMConfig:
        """Token-MLP blocks on 9x9 Sudoku, without position encodings: the best published TRM."""
        return cls.sudoku_att(mlp_t=True, pos_encodings="none").replace(**changes)

    @classmethod
    def maze(cls, **changes: Any) -> TRMConfig:
        """Attention on 30x30 mazes: T = 916, 15 calls; 6 tokens (pad and five symbols)."""
        return cls(vocab_size=6, seq_len=900, L_cycles=4, puzzle_emb_ndim=512).replace(**changes)

    @classmethod
    def arc(cls, **changes: Any) -> TRMConfig:
        """Attention on ARC-AGI grids: T = 916, 15 calls; 12 tokens (pad, end, ten colours).

        Give `num_puzzle_identifiers`: the rows of the puzzle embedding.
        """
        return cls(vocab_size=12, seq_len=900, L_cycles=4, puzzle_emb_ndim=512).replace(**changes)

    @classmethod
    def tiny(cls, vocab_size: int, seq_len: int, **changes: Any) -> TRMConfig:
        """A small fp32 TRM for laptops and tests: D = 64, two heads, no puzzle embedding."""
        return cls(
            vocab_size, seq_len, hidden_size=64, num_heads=2, inner_multiple=32,
            forward_dtype="float32",
        ).replace(**changes)  # fmt: skip


@dataclass(frozen=True)
class HRMConfig(ModelConfig):
    """Configuration of an HRM: two nets, 1-step gradient, Q-learning halting."""

    variant: str = "hrm"
    H_cycles: int = 2
    L_cycles: int = 2
    H_layers: int = 4
    L_layers: int = 4
    puzzle_emb_len: int = 0
    no_ACT_continue: bool = False

    ALLOWED_VARIANTS: ClassVar[tuple[str, ...]] = ("hrm",)

    @classmethod
    def sudoku(cls, **changes: Any) -> HRMConfig:
        """HRM on 9x9 Sudoku: T = 82 (81 + 1), D = 512, two nets of 4 blocks, 6 calls."""
        return cls(vocab_size=11, seq_len=81, puzzle_emb_ndim=512).replace(**changes)

    @classmethod
    def tiny(cls, vocab_size: int, seq_len: int, **changes: Any) -> HRMConfig:
        """A small fp32 HRM for laptops and tests: D = 64, two heads, two nets of one block."""
        return cls(
            vocab_size, seq_len, hidden_size=64, num_heads=2, inner_multiple=32,
            H_layers=1, L_layers=1, forward_dtype="float32",
        ).replace(**changes)  # fmt: skip


def config_class(variant: str | None) -> type[ModelConfig]:
    """The class of configurations of this variant; TRM's if nothing tells (None)."""
    return HRMConfig if variant == "hrm" else TRMConfig
