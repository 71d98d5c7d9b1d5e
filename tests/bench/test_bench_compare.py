"""`bench compare`: sees a planted slowdown of 10 %, stays quiet on noise."""

from __future__ import annotations

import json

import pytest
from documents import CPU, document, noisy, row, untimed, write

from recurx.bench import compare
from recurx.bench.results import Key
from recurx.commands import main
from recurx.errors import InvalidArgument

OURS, EAGER = "recurx-cpu/fp32", "eager/fp32"


def pair(tmp_path, before, after):
    old = write(tmp_path / "a.json", document(before))
    new = write(tmp_path / "b.json", document(after, date="2026-01-03T00:00:00+00:00"))
    return old, new


def verdicts(tmp_path, before, after):
    found = compare.compare(*pair(tmp_path, before, after))
    return {d.key.variant: d.verdict for d in found}


@pytest.mark.parametrize("seed", range(10))
def test_a_planted_slowdown_of_a_tenth_is_seen(tmp_path, seed):
    before = [row(OURS, noisy(100, seed)), row(EAGER, noisy(300, 100 + seed))]
    after = [row(OURS, noisy(110, 200 + seed)), row(EAGER, noisy(300, 300 + seed))]
    assert verdicts(tmp_path, before, after) == {OURS: "slower", EAGER: "same"}
    assert verdicts(tmp_path, after, before)[OURS] == "faster"


def test_noise_is_not_taken_for_a_change(tmp_path):
    seeds = range(100)
    before = [row(f"recurx-n{s}/fp32", noisy(100, s)) for s in seeds]
    after = [row(f"recurx-n{s}/fp32", noisy(100, 1000 + s)) for s in seeds]
    found = verdicts(tmp_path, before, after).values()
    assert sum(verdict != "same" for verdict in found) <= 1


def test_a_slowdown_within_the_spread_of_few_rounds_is_no_verdict(tmp_path):
    before, after = [row(OURS, [90, 100, 120])], [row(OURS, [95, 110, 125])]
    (d,) = compare.compare(*pair(tmp_path, before, after))
    assert d.verdict == "same" and d.how == "p20 to p80" and d.low < 1 < d.high
    after = [row(OURS, [130, 140, 150])]
    assert verdicts(tmp_path, before, after) == {OURS: "slower"}


def test_two_devices_are_refused(tmp_path):
    old = write(tmp_path / "a.json", document([row(OURS, [1.0])]))
    other = {**CPU, "model": "Another CPU"}
    new = write(tmp_path / "b.json", document([row(OURS, [1.0])], cpu=other))
    with pytest.raises(InvalidArgument, match=r"Another CPU.*--force"):
        compare.compare(old, new)
    assert compare.compare(old, new, force=True)[0].ratio == 1
    with pytest.raises(InvalidArgument, match="no timed row in common"):
        compare.compare(old, write(tmp_path / "c.json", document([row(EAGER, [1.0])])))


def test_each_row_meets_the_newest_earlier_one_of_its_device(tmp_path):
    def made(day, rows, **more):
        made = document(rows, date=f"2026-01-{day:02}T00:00:00+00:00", **more)
        return write(tmp_path / f"{day}.json", made)

    both = [row(OURS, [1.0]), row(EAGER, [2.0])]
    first, second = made(1, both), made(2, [row(OURS, [3.0])])
    other = made(3, [row(OURS, [9.0])], cpu={**CPU, "model": "Another CPU"})
    last = made(4, both)
    known = [first, second, other, last]
    before, after = compare.newest_two(known, known)
    assert after is last
    assert {key.variant: r["p50_ms"] for key, r in before.timed().items()} == {OURS: 3, EAGER: 2}
    assert "1.json" in str(before.path) and "2.json" in str(before.path)
    assert compare.newest_two([second], known)[0].timed().keys() == second.timed().keys()
    with pytest.raises(InvalidArgument, match=r"older than .*1\.json"):
        compare.newest_two([first], known)


def test_a_slower_machine_is_no_slower_recurx(tmp_path):
    """The guard speaks of what eager PyTorch's own change leaves."""
    before = [row(OURS, noisy(100, 1)), row(EAGER, noisy(300, 2))]
    machine = [row(OURS, noisy(130, 3)), row(EAGER, noisy(390, 4))]
    ours = [row(OURS, noisy(150, 3)), row(EAGER, noisy(390, 4))]
    verdicts = []
    for after in (machine, ours):
        found = compare.compare(*pair(tmp_path, before, after))
        assert found[0].verdict == "slower"
        verdicts.append([len(rows) for rows in compare.beyond_the_machine(found)])
    assert verdicts == [[0, 0], [1, 0]]


def test_a_row_that_lost_its_time_is_told(tmp_path):
    before = [row(OURS, [1.0]), row(EAGER, [2.0])]
    after = [untimed(OURS, "wrong", "one call: drift 1"), row(EAGER, [2.0])]
    assert compare.lost(*pair(tmp_path, before, after)) == [
        (Key("trm-att", "step", 1, OURS), "one call: drift 1")
    ]


def test_the_command(tmp_path, capsys):
    before = [row(OURS, noisy(100, 1)), row(EAGER, noisy(300, 2))]
    after = [row(OURS, noisy(120, 3)), row(EAGER, noisy(330, 4))]
    old, new = (str(result.path) for result in pair(tmp_path, before, after))
    assert main(["bench", "compare", old, new]) == 0
    printed = capsys.readouterr().out
    assert (
        "SLOWER" in printed and "recurx: 1 rows slower, 0 faster in B than the machine" in printed
    )
    assert "eager rows moved by 1.1" in printed  # the machine got slower, too
    assert main(["bench", "compare", old, new, "--fail"]) == 1
    assert main(["bench", "compare", new, old, "--fail"]) == 0
    assert main(["bench", "compare", old, new, new]) == 2
    (tmp_path / "broken.json").write_text(json.dumps({"schema": 1}))
    assert main(["bench", "compare", old, str(tmp_path / "broken.json")]) == 2
    assert "expected schema 2, got 1" in capsys.readouterr().err
