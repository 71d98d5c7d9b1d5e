"""Options, each stated once: a field of a dataclass says what it means, its default and its form.

    @dataclass(frozen=True)
    class Rules:
        max_steps: int = option(16, "supervision steps a puzzle may take", least=1)

`Rules.max_steps` is that default, for signatures; `recurx.cli.options` makes command lines of such
classes and reads them back. A subclass that gives a field another default keeps the rest. Packages
of the kind (tyro, simple-parsing, jsonargparse) would change flags that users know, say of booleans
and of `--halt none`, for a dependency more: what recurx needs of them is a hundred lines.
"""

from __future__ import annotations

import dataclasses
from dataclasses import is_dataclass
from typing import Any


def option(default: Any, help: str, **form: Any) -> Any:
    """A field that is an option.

    Args:
        default: its value if nobody says one; a tuple takes several.
        help: what it means, in a sentence without its default, unless that needs words.
        form: of the command line, where the name and the default's type do not say it: "least", the
            smallest of whole numbers N, and "most"; "flag", a name that is not the field's ("" for
            an argument without one); and what argparse calls "type", "choices" (None is said as
            "none"), "metavar", "nargs", "const" and "action".
    """
    return dataclasses.field(default=default, metadata={"help": help, **form})


def file(help: str, metavar: str = "FILE", type: Any = str) -> Any:
    """An option that is a path, or nothing."""
    return option(None, help, metavar=metavar, type=type)


def stated(kind: type) -> dict[str, tuple[Any, dict[str, Any]]]:
    """{name: (default, help and form)} of the options of a dataclass, its own before inherited."""
    found, depth = {}, {}
    for field in dataclasses.fields(kind):
        owners = [owner.__dataclass_fields__ for owner in kind.__mro__ if is_dataclass(owner)]
        known = [fields[field.name].metadata for fields in owners if field.name in fields]
        about = next((metadata for metadata in known if "help" in metadata), None)
        if about is not None:
            found[field.name] = (field.default, dict(about))
            depth[field.name] = len(known)
    return dict(sorted(found.items(), key=lambda item: depth[item[0]]))
