"""Which verdict wins, which violations are shown, and histories that contradict themselves."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from rocket.lab.checker.check import Judgement, check
from rocket.lab.checker.findings import Rule
from rocket.lab.checker.history import Fault, Op
from tests.support.histories import convicted, held, history_of, page, promotion, read, void, write


def test_a_violation_wins_over_void() -> None:
    """A stale read is one even where the run is cut off."""
    written, stale = write("s1", 1.0, 7, 0.7), read("s1", 2.0, 7, None)

    verdict = check(replace(history_of(written, stale), end=None))

    assert Judgement.VIOLATED is verdict.judgement
    assert 1 == len(verdict.reasons)


@pytest.mark.parametrize(
    ("ops", "reason"),
    [
        ((page("s1", 1.0, done=2.0), page("s1", 1.5)), "while its request of 1.000000 s was under way"),
        ((write("s1", 1.0, 7, 0.7), write("s2", 2.0, 8, 0.7)), "two writes of the distance 0.7"),
        ((page("s1", 1.0), page("s1", 2.0, user="else@example.com")), "several users"),
        ((page("s1", 1.0), page("s1", 2.0, tokens=False)), "only at times"),
    ],
)
def test_a_history_that_contradicts_itself_is_void(ops: tuple[Op, ...], reason: str) -> None:
    """Nothing follows from it, not even a violation."""
    void(history_of(*ops, read("s1", 9.0, 7, None)), reason)
    held(history_of(page("s1", 1.0, done=1.5), page("s1", 1.5)))


def test_a_run_leaves_nothing_behind() -> None:
    """Each thing that it does is a violation."""
    history = history_of()
    assert history.end is not None

    convicted(replace(history, end=replace(history.end, leaked=("a postgres process",))), Rule.LEAKED)


def test_all_violations_are_counted_and_a_handful_are_shown_the_shortest_first() -> None:
    """Of each rule at least one."""
    written = write("s1", 1.0, 7, 0.7)
    stale = [read("s1", 2.0 + number, 7, None) for number in range(50)]
    invented = page("s2", 60.0, (8, 0.8))

    verdict = check(history_of(written, *stale, invented))

    assert {Rule.READ_YOUR_WRITES: 50, Rule.FOREIGN_OR_INVENTED: 1} == dict(verdict.counts or {})
    assert [(written, stale[0]), (invented,)] == [violation.ops for violation in verdict.violations[:2]]
    assert 3 == len(verdict.violations)


def test_the_shortest_of_all_is_shown_first() -> None:
    """Not the first that was found."""
    long_ago, lately = write("s1", 1.0, 7, 0.7), write("s1", 20.0, 8, 0.8)
    stale, stale_soon = read("s1", 10.0, 7, None), read("s1", 20.5, 8, None)

    verdict = check(history_of(long_ago, stale, lately, stale_soon))

    assert [(lately, stale_soon), (long_ago, stale)] == [violation.ops for violation in verdict.violations]


def test_the_faults_meanwhile_are_in_the_excerpt() -> None:
    """Those that were on during one of its operations, and the promotions in between."""
    written, gone = write("s1", 1.0, 7, 0.7), read("s1", 9.0, 7, None)
    pause = Fault(name="replay-paused", at=8.0, until=9.005, node="replica0")
    over = Fault(name="replay-paused", at=5.0, until=6.0, node="replica0")
    promoted = promotion(2.0, 3.0)

    (violation,) = check(history_of(written, gone, pause, over, promoted)).violations

    assert (promoted, pause) == violation.faults
