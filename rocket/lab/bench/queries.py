"""How many transactions a read costs the primary, as the primary counts them. Pure.

The primary does not tell whose they were, so of all that it counted in a server's life what it counted in the life
of a server that was asked nothing for as long is taken away: that is the observer's share, and the start's.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from rocket.lab.bench.contenders import BARE, IDLE

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from rocket.lab.bench.figures import Row

_COUNTED = "primary_transactions"


def with_queries_per_read(rows: Iterable[Row]) -> Iterator[Row]:
    """Add the figure to the rows of one measure and one round, where there is what it takes."""
    every = list(rows)
    unasked = next((row.figures.get(_COUNTED) for row in every if row.contender == IDLE.name), None)
    for row in every:
        counted, reads = row.figures.get(_COUNTED), row.figures.get("reads")
        if row.contender == BARE.name or unasked is None or counted is None or not reads:
            yield row
        else:
            yield replace(row, figures={**row.figures, "primary_queries_per_read": (counted - unasked) / reads})
