"""Tables of plain text."""

from __future__ import annotations

from rocket.lab.text import aligned


def test_cells_stand_below_each_other() -> None:
    """Text to the left, figures to the right, and nothing behind the last sign of a line."""
    rows = [["name", "lag", "state"], ["a", "10", "up"], ["replica", "9", ""]]

    assert ["name     lag  state", "a         10  up", "replica    9"] == aligned(rows, right={1})
    assert ["name    lag state", "a       10  up", "replica 9"] == aligned(rows, gap=1)
