"""Timelines: where one primary's WAL ends and its successor's begins."""

from __future__ import annotations

from rocket.consistency.lsn import Lsn


def switch_point(history: str, timeline: int) -> Lsn | None:
    """Return the LSN at which a timeline was left, by the history file of a later one; None if that lacks it.

    What the timeline's primary wrote beyond that point is not part of the later timeline: it was lost.
    A history file has a line for each ancestor, `<timeline> <switch LSN> <reason>`, the oldest first; raise
    `ValueError` for a malformed line. A server that was promoted before it had reached an ancestor's end names
    that end all the same, and an earlier one for a later ancestor: the earliest counts.
    """
    found: list[Lsn] = []
    for line in history.splitlines():
        fields = line.partition("#")[0].split(maxsplit=2)
        if fields and (found or int(fields[0]) == timeline):
            found.append(Lsn.parse(fields[1] if len(fields) > 1 else ""))
    return min(found, default=None)
