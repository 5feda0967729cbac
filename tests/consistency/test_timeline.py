"""Where one primary's WAL ends and its successor's begins, as history files tell it."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rocket.consistency import Lsn, switch_point

# As Postgres writes them: after the second line of a file it leaves an empty one.
SECOND = "1\t0/1725810\tno recovery target specified\n"
THIRD = "1\t0/1725810\tno recovery target specified\n\n2\t0/3000148\tno recovery target specified\n"


@pytest.mark.parametrize(
    ("history", "timeline", "switch_lsn"),
    [
        (SECOND, 1, "0/1725810"),
        (THIRD, 1, "0/1725810"),
        (THIRD, 2, "0/3000148"),
        ("11\t16/B374D848\tbefore 2026-01-01 00:00:00+00\n", 11, "16/B374D848"),
        ("1\t0/1725810", 1, "0/1725810"),
        ('  1   0/1725810   at restore point "1 0/1"\n', 1, "0/1725810"),
        ("# 1\t0/1\tan admin's note\n1\t0/1725810\t# 0/2\n", 1, "0/1725810"),
    ],
)
def test_a_timeline_ends_where_the_file_says(history: str, timeline: int, switch_lsn: str) -> None:
    """The second field of the timeline's own line, whatever the reason says."""
    assert Lsn.parse(switch_lsn) == switch_point(history, timeline)


@pytest.mark.parametrize(
    ("history", "timeline"),
    [
        ("", 1),
        ("\n\n# nothing\n", 1),
        (SECOND, 2),
        (SECOND, 17),
        (THIRD, 3),
        ("11\t0/1725810\treason\n", 1),
        ("2\t0/3000148\t1\n", 1),
    ],
)
def test_a_timeline_that_is_no_ancestor_ends_nowhere(history: str, timeline: int) -> None:
    """What it wrote is not part of this one at all."""
    assert switch_point(history, timeline) is None


@pytest.mark.parametrize(
    "history",
    [
        "one\t0/1725810\treason\n",
        "1\n",
        "1\t1725810\treason\n",
        "1\t0/172581G\treason\n",
        "1\t\treason\n",
        "1,0/1725810,reason\n",
        "<html>not found</html>",
    ],
)
def test_what_is_no_history_file_is_refused(history: str) -> None:
    """Rather than taken for a timeline that has lost nothing."""
    with pytest.raises(ValueError, match=r"invalid literal|not an LSN"):
        switch_point(history, 1)


@given(steps=st.lists(st.tuples(st.integers(1, 3), st.integers(1, 2**40)), min_size=1, max_size=6))
@settings(max_examples=100)
def test_each_ancestor_of_a_long_line_is_found(steps: list[tuple[int, int]]) -> None:
    """Timelines that were entered and written to end in the order in which they were entered."""
    timeline = lsn = 0
    ends: dict[int, Lsn] = {}
    for further, written in steps:
        timeline, lsn = timeline + further, lsn + written
        ends[timeline] = Lsn(lsn)
    history = "\n".join(f"{number}\t{end}\tno recovery target specified\n" for number, end in ends.items())

    for number in range(timeline + 2):
        assert ends.get(number) == switch_point(history, number)


def test_a_timeline_that_was_left_before_its_fork_was_reached_ends_there() -> None:
    """Promoted on its way to timeline 2, which it had not reached: what it lacks of timeline 1 was lost.

    Measured on Postgres 18.4: a replica that had timeline 1 up to 0/1706208, and the history file of timeline 2,
    was promoted and wrote this. It names the timeline that was aimed at beside the end of what there was.
    """
    history = "1\t0/1725810\tno recovery target specified\n\n2\t0/1706208\tno recovery target specified\n"

    assert Lsn.parse("0/1706208") == switch_point(history, 1)
