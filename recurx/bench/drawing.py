"""What all pictures share: PNG and SVG files that read on light and on dark pages.

The background is transparent; text and axes are one grey with about equal contrast to white and to
a dark page, colours are mid-tones that colour-blind readers can tell apart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from recurx.errors import RecurxError

INK = "#737b85"  # 4.3 : 1 against white, 4.4 : 1 against #0d1117
BLUE, ORANGE = "#2a8fbd", "#c4682b"
# In this order for lines: neighbours differ in lightness or hue under every colour blindness.
COLOURS = (BLUE, ORANGE, "#a05fb4", "#4f9a5b", "#8a7d2b", "#d0557a")
PAGES = {"light": "#ffffff", "dark": "#0d1117"}
STYLE = {
    "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK, "xtick.color": INK,
    "ytick.color": INK, "font.size": 9, "svg.fonttype": "none", "svg.hashsalt": "recurx",
    "legend.frameon": False, "legend.labelcolor": INK,
    "axes.spines.top": False, "axes.spines.right": False,
}  # fmt: skip


def contrast(one: str, other: str) -> float:
    """Contrast ratio of two colours, 1 to 21 (WCAG 2, relative luminance)."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    bright, dim = sorted((luminance(one), luminance(other)), reverse=True)
    return (bright + 0.05) / (dim + 0.05)


def pyplot(wanted_by: str, otherwise: str) -> Any:
    """matplotlib.pyplot, drawing into files.

    Raises:
        RecurxError: matplotlib is not installed; the message names the extra.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise RecurxError(
            f"{wanted_by}: plots need matplotlib: pip install 'recurx[plot]', or {otherwise}."
        ) from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def save(
    plt: Any, stem: Path, size: tuple[float, float], fill: Callable[[Any], None]
) -> list[Path]:
    """Let `fill` draw into a figure of `size` inches; write `stem`.png and `stem`.svg."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    paths = [stem.with_name(f"{stem.name}.{kind}") for kind in ("png", "svg")]
    write(plt, paths, size, fill)
    return paths


def write(
    plt: Any, paths: Sequence[Path], size: tuple[float, float], fill: Callable[[Any], None]
) -> None:
    """Let `fill` draw into a figure of `size` inches; write it to each of `paths`, whose suffix
    says the kind of picture."""
    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=size)
        fill(figure)
        figure.tight_layout()
        for path in paths:
            # No date in the file: the same figures give the same bytes.
            metadata = {"Date": None} if path.suffix == ".svg" else None
            figure.savefig(path, transparent=True, dpi=160, metadata=metadata)
        plt.close(figure)
