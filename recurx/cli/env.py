"""`python -m recurx env`: facts for bug reports, grouped."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass

from recurx.options import option


@dataclass(frozen=True)
class Options:
    json: bool = option(False, "print one line of JSON instead")


def run(asked: Options) -> int:
    from recurx.cli import envinfo, output

    facts = envinfo.collect()
    if asked.json:
        output.json_line({"facts": [dataclasses.asdict(fact) for fact in facts]})
        return 0
    console = output.make_console()
    width = max(len(fact.name) for fact in facts)
    for group, found in itertools.groupby(facts, lambda fact: fact.group):
        console.print(group, style="bold")
        for fact in found:
            mark = " " if fact.ok else "!"
            console.print(f"  {mark} {fact.name:{width}}  {fact.value}", soft_wrap=True)
    return 0
