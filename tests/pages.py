"""The Markdown of this repository, taken apart for tests: blocks of code, inline code, links."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# A comment on the line above a block says why it cannot run as it stands everywhere.
_MARK = re.compile(r"<!-- cannot run here: (.*) -->")
_GENERATED = re.compile(r"<!-- (\w+):begin.*?<!-- \1:end -->", re.DOTALL)
_FENCE = re.compile(r"^(`{3,})(\w*)\s*$")
_SPAN = re.compile(r"(`+)(.+?)\1", re.DOTALL)
_LINK = re.compile(r"\]\(([^)\s]+)\)")


@dataclass(frozen=True)
class Block:
    """One fenced block.

    Args:
        page: the document.
        line: number of the first line inside the fence, from 1.
        language: what the fence says.
        text: what is inside.
        reason: of the comment above, or None.
    """

    page: Path
    line: int
    language: str
    text: str
    reason: str | None

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


@cache
def tracked() -> tuple[str, ...]:
    """Every file of the repository, and every file that git would add; of an unpacked archive
    every file that is not hidden."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    if not (ROOT / ".git").exists():
        files = (path.relative_to(ROOT) for path in ROOT.rglob("*") if path.is_file())
        return tuple(str(f) for f in files if not any(part[0] == "." for part in f.parts))
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return tuple(name for name in done.stdout.splitlines() if (ROOT / name).is_file())


# Every document by its path.
PAGES = {name: ROOT / name for name in tracked() if name.endswith(".md")}


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a document, in order."""
    found, opened, before = [], None, ""
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        fence = _FENCE.match(line)
        if opened is None and fence:
            mark = _MARK.fullmatch(before.strip())
            opened = (number + 1, fence[2], mark[1] if mark else None)
            body: list[str] = []
        elif opened is not None and line.startswith("```"):
            start, language, reason = opened
            found.append(Block(page, start, language, "\n".join(body) + "\n", reason))
            opened = None
        elif opened is not None:
            body.append(line)
        before = line if line.strip() else before
    assert opened is None, f"{page}: the block that begins at line {opened} does not end"
    return found


def prose(page: Path) -> str:
    """The document without its blocks, comments and generated tables, line numbers kept."""
    lines, inside = [], False
    for line in page.read_text(encoding="utf-8").splitlines():
        fence = line.startswith("```")
        lines.append("" if inside or fence else line)
        inside ^= fence
    text = _GENERATED.sub(lambda found: "\n" * found[0].count("\n"), "\n".join(lines))
    return re.sub(r"<!--.*?-->", "", text)


def spans(page: Path) -> list[str]:
    """Inline code, as one line each; of blocks nothing."""
    return [" ".join(text.split()) for _, text in _SPAN.findall(prose(page))]


def links(page: Path) -> list[str]:
    """Targets of links and pictures."""
    return _LINK.findall(prose(page))
