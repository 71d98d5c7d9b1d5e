"""`python -m recurx experiment exit`: the verdict by hand, and the command at a size of seconds."""

from __future__ import annotations

import json

from recurx.commands import main
from recurx.experiments import exit as early


def net(*rules: tuple[str, float, float]) -> dict:
    rows = [
        {"name": name, "exact": exact, "steps_mean": 2.0, "seconds": 8 / speed, "speedup": speed}
        for name, exact, speed in rules
    ]
    return {"exits": rows, "points": [], "seed": 0}


def verdict(*nets: dict) -> dict:
    return early._verdict(early._rows(list(nets)))


def test_the_verdict_takes_the_fastest_rule_that_solves_no_fewer_with_every_seed() -> None:
    first = net(("fixed", 0.9, 1.0), ("rash", 0.95, 9.0), ("good", 0.9, 4.0), ("slow", 0.95, 2.0))
    second = net(("fixed", 0.9, 1.0), ("rash", 0.89, 9.0), ("good", 0.92, 3.5), ("slow", 0.9, 2.0))
    found = verdict(first, second)
    assert found["holds"] and found["findings"][0].startswith("good: 91.0% exact")
    assert "4.0 and 3.5 times as fast as fixed with 90.0%" in found["findings"][0]


def test_the_verdict_can_fail() -> None:
    slow = net(("fixed", 0.9, 1.0), ("good", 0.9, 2.9))
    assert not verdict(net(("fixed", 0.9, 1.0), ("good", 0.9, 4.0)), slow)["holds"]
    assert not verdict(net(("fixed", 0.0, 1.0), ("good", 0.0, 4.0)))["holds"]  # nothing learned
    worse = verdict(net(("fixed", 0.9, 1.0), ("rash", 0.5, 9.0)))
    assert not worse["holds"] and "no rule solved as many" in worse["findings"][0]


def test_the_command_measures_every_rule(tmp_path, capsys) -> None:
    words = ["experiment", "exit", "--task", "sort:length=4,values=3", "--seeds", "1", "--json"]
    words += ["--steps", "2", "--count", "8", "--rounds", "1", "--out", str(tmp_path)]
    assert main(words) == 0
    printed = "".join(capsys.readouterr()[::-1])  # JSON is all of stdout
    result = json.loads(printed.splitlines()[-1])
    names = [row["name"] for row in result["rows"]]
    assert names[0] == "always 16 steps" and len(names) == 7 and all(n in printed for n in names)
    assert [p["max_steps"] for p in result["nets"][0]["points"]] == [1, 2, 4, 8, 16, 32]
    assert not result["holds"] and (tmp_path / "plot.png").stat().st_size > 10_000
    assert main([*words, "--redraw"]) == 0
