"""The README's table of CPU figures, from one result file: python -m bench.report FILE.json"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from bench.provenance import ROOT

COLUMNS = {  # variant -> heading
    "recurx": "recurx bf16",
    "recurx-fp32": "recurx fp32",
    "eager": "eager bf16",
    "eager-fp32": "eager fp32",
    "compile": "compile bf16",
    "compile-fp32": "compile fp32",
    "tuned": "tuned bf16",
}


def markdown(path: Path) -> str:
    """One row a case and batch: median ms, and in brackets how many times the best recurx's."""
    document = json.loads(path.read_text())
    facts, results = document["provenance"], document["results"]
    cpu, shown = facts["cpu"], path.resolve()
    shown = shown.relative_to(ROOT) if shown.is_relative_to(ROOT) else shown
    lines = [
        f"Median ms per supervision step with {document['threads']} threads, in brackets times the "
        "faster recurx row. "
        f"{cpu['model']} (family/model {cpu['family_model']}; {', '.join(cpu['flags'])}), "
        f"torch {facts['torch']}, commit {facts['commit'][:7]}, {facts['date'][:10]}; `{shown}`.",
        "",
        "| case | B | " + " | ".join(COLUMNS.values()) + " |",
        "|---|---|" + "---|" * len(COLUMNS),
    ]
    for result in results:
        times = {name: row.get("p50_ms") for name, row in result["rows"].items()}
        ours = min(t for t in (times.get("recurx"), times.get("recurx-fp32")) if t)
        cells = [cell(times.get(name), ours) for name in COLUMNS]
        lines.append(f"| {result['case']} | {result['batch']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def cell(time: float | None, ours: float) -> str:
    return "-" if time is None else f"{time:.0f} ({time / ours:.2f}x)"


if __name__ == "__main__":
    print(markdown(Path(sys.argv[1])))
