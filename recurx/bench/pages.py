"""Tables into documents: a pair of markers says which tables lie between them."""

from __future__ import annotations

from collections.abc import Sequence

from recurx.bench import reckoning
from recurx.bench.ratios import ratios
from recurx.bench.report import markdown
from recurx.bench.results import Result
from recurx.errors import InvalidArgument

BEGIN, END = "<!-- bench:begin", "<!-- bench:end -->"
RATIOS_BEGIN, RATIOS_END = "<!-- ratios:begin", "<!-- ratios:end -->"
RECKONED_BEGIN, RECKONED_END = "<!-- reckoned:begin", "<!-- reckoned:end -->"


def fill_in(text: str, results: Sequence[Result], where: str) -> str:
    """`text` with all tables between its markers made anew: `markdown`, `ratios`, what is reckoned
    for GPUs, or several of them.

    Raises:
        InvalidArgument: it has no markers, has them twice, or in the wrong order.
    """
    tables = {(BEGIN, END): markdown, (RATIOS_BEGIN, RATIOS_END): ratios}
    tables[RECKONED_BEGIN, RECKONED_END] = lambda _: reckoning.table()
    present = [pair for pair in tables if pair[0] in text or pair[1] in text]
    if not present:
        raise InvalidArgument(
            f"bench report: {where} needs one line '{BEGIN} -->' and after it one '{END}' for all "
            f"tables, or '{RATIOS_BEGIN} -->' and '{RATIOS_END}' for the table of ratios."
        )
    for pair in present:
        text = replace_between_markers(text, tables[pair](results), where, *pair)
    return text


def replace_between_markers(
    text: str, generated: str, where: str, begin: str = BEGIN, end: str = END
) -> str:
    """`text` with what lies between two markers replaced.

    Raises:
        InvalidArgument: the markers are missing, twice there, or in the wrong order.
    """
    first, last = text.find(begin), text.find(end)
    if text.count(begin) != 1 or text.count(end) != 1 or last < first:
        raise InvalidArgument(
            f"bench report: {where} needs one line '{begin} -->' and after it one '{end}'."
        )
    head_end = text.index("-->", first) + 3
    return f"{text[:head_end]}\n{generated}\n{text[last:]}"
