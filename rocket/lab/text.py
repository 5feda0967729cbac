"""Tables of plain text."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

NOTHING = "-"
"""Stands in the cell of what is not known, or has no meaning there."""


def aligned(rows: Sequence[Sequence[str]], *, right: Collection[int] = (), gap: int = 2) -> list[str]:
    """Return a line for each row, its cells lined up to the left; those of the columns in `right` to the right."""
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    return [
        (" " * gap)
        .join(
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        .rstrip()
        for row in rows
    ]
