"""`python -m recurx env`: facts for bug reports, grouped."""

from __future__ import annotations

import argparse
import dataclasses


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one line of JSON instead")


def run(arguments: argparse.Namespace) -> int:
    from recurx.cli import envinfo, output

    facts = envinfo.collect()
    if arguments.json:
        output.json_line({"facts": [dataclasses.asdict(fact) for fact in facts]})
        return 0
    console = output.make_console()
    group = None
    width = max(len(fact.name) for fact in facts)
    for fact in facts:
        if fact.group != group:
            group = fact.group
            console.print(f"[bold]{group}[/bold]")
        mark = " " if fact.ok else "!"
        console.print(f"  {mark} {fact.name:{width}}  {fact.value}", markup=False, soft_wrap=True)
    return 0
