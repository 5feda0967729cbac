"""A running system as text. Pure."""

from __future__ import annotations

import textwrap
import time
from typing import TYPE_CHECKING, NamedTuple

from rocket.lab.status.members import HEALTHY_STATES
from rocket.lab.text import NOTHING, aligned

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from rocket.lab.status.members import Member, Overview, Reads

_BOLD, _YELLOW, _PLAIN = "\x1b[1m", "\x1b[33m", "\x1b[0m"
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")
_STEPS = ((100, 1, "s"), (6000, 60, "m"), (360_000, 3600, "h"))
"""Upper bound in seconds, divisor and unit of an age; older ones are shown in days."""


# --- cells ---


def _text(number: int | None) -> str | None:
    return None if number is None else str(number)


def _decimal(number: float | None) -> str | None:
    return None if number is None else f"{number:.1f}"


def _size(size: float | None) -> str | None:
    if size is None:
        return None
    for unit in _UNITS:
        if size < 1000 or unit == _UNITS[-1]:  # noqa: PLR2004 - four places at most
            break
        size /= 1024
    return f"{size:.0f} {unit}" if unit == "B" or size >= 100 else f"{size:.1f} {unit}"  # noqa: PLR2004


def _age(seconds: float | None) -> str | None:
    if seconds is None:
        return None
    for below, unit_s, unit in _STEPS:
        if seconds < below:
            return f"{seconds / unit_s:.0f}{unit}"
    return f"{seconds / 86400:.0f}d"


def _connections(member: Member) -> str | None:
    if member.connections_in_use is None or member.connections_idle is None:
        return None
    return f"{member.connections_in_use}/{member.connections_in_use + member.connections_idle}"


# --- lines ---


class _Column(NamedTuple):
    heading: str
    cell: Callable[[Member], str | None]
    right: bool = True


_COLUMNS = (
    _Column("member", lambda member: member.name, right=False),
    _Column("port", lambda member: _text(member.port)),
    _Column("role", lambda member: member.role, right=False),
    _Column("state", lambda member: member.state, right=False),
    _Column("tl", lambda member: _text(member.timeline)),
    _Column("lsn", lambda member: member.lsn),
    _Column("lag", lambda member: _size(member.lag_bytes)),
    _Column("lag s", lambda member: _decimal(member.lag_seconds)),
    _Column("life", lambda member: _age(member.incarnation_age_seconds)),
    _Column("reads %", lambda member: _decimal(member.reads_percent)),
    _Column("conns", _connections),
)
_DISPENSABLE = ("port", "conns", "life", "tl")
"""Columns left out, in this order, while the table is wider than the terminal."""


def report(overview: Overview, *, width: int | None, colours: bool, timed: bool) -> list[str]:
    """Return the lines: a heading, the members, their reads, what is wrong.

    `width` is the terminal's; None: lines are not wrapped. `timed` puts the time of day before the heading.
    """
    if overview.snapshot.is_empty:
        return _wrapped(f"{_clock(overview.snapshot.at)}  {overview.snapshot.why_empty}", width)
    first, *rest = _table(overview.members, width)
    table = [_painted(first, _BOLD, colours)]
    table += [
        line if member.state in HEALTHY_STATES else _painted(line, _YELLOW, colours)
        for line, member in zip(rest, overview.members, strict=True)
    ]
    lines = [*_wrapped(_heading(overview, timed), width), *table]
    if overview.reads is not None:
        lines += _wrapped(_summary(overview.reads), width)
    for finding in () if overview.snapshot.api is None else overview.snapshot.api.findings:
        lines += (
            _painted(line, _YELLOW, colours) for line in _wrapped(f"{finding['code']}: {finding['text']}", width)
        )
    if overview.snapshot.cluster_error:
        lines += _wrapped(f"No ports, and no states of servers: {overview.snapshot.cluster_error}.", width)
    return lines


def _heading(overview: Overview, timed: bool) -> str:
    snapshot = overview.snapshot
    if overview.epoch is not None:
        parts = [f"epoch {overview.epoch} (timeline {overview.timeline or NOTHING})"]
    else:
        parts = [f"timeline {overview.timeline}"] if overview.timeline is not None else ["no primary known"]
    if snapshot.api is None:
        parts.append(f"no API at {snapshot.url} ({snapshot.api_error})")
    else:
        parts += [f"routing {snapshot.api.routing}", f"API {snapshot.url}"]
        if snapshot.workers is not None and snapshot.workers > 1:
            parts.append(f"reads of one of its {snapshot.workers} processes")
    return (f"{_clock(snapshot.at)}  " if timed else "") + ", ".join(parts)


def _summary(reads: Reads) -> str:
    span = "since the API's start" if reads.span_s is None else f"in {reads.span_s:.1f} s"
    parts = ["none"]
    if reads.total:
        parts = [f"{reads.total}, {100 * reads.by_replicas / reads.total:.1f} % by replicas"]
    if reads.fallbacks:
        reasons = ", ".join(f"{reason} {count}" for reason, count in reads.fallbacks.most_common())
        parts.append(f"{reads.fallbacks.total()} by the primary ({reasons})")
    if reads.unavailable:
        parts.append(f"{reads.unavailable} refused")
    return f"reads {span}: {'; '.join(parts)}"


def _table(members: Sequence[Member], width: int | None) -> list[str]:
    """Return heading and rows; if they are too wide, with narrower gaps, and then without dispensable columns."""
    columns = list(_COLUMNS)
    lines = _lines(columns, members, gap=2)
    for heading in (None, *_DISPENSABLE):
        if width is None or max(map(len, lines)) <= width:
            break
        columns = [column for column in columns if column.heading != heading]
        lines = _lines(columns, members, gap=1)
    return lines


def _lines(columns: Sequence[_Column], members: Sequence[Member], gap: int) -> list[str]:
    rows = [[column.heading for column in columns]]
    rows += [[_printable(column.cell(member) or NOTHING) for column in columns] for member in members]
    return aligned(rows, right=[place for place, column in enumerate(columns) if column.right], gap=gap)


def _wrapped(text: str, width: int | None) -> list[str]:
    if width is None:
        return [_printable(text)]
    return textwrap.wrap(_printable(text), width, subsequent_indent="  ", break_on_hyphens=False)


def _painted(line: str, colour: str, colours: bool) -> str:
    return f"{colour}{line}{_PLAIN}" if colours else line


def _printable(text: str) -> str:
    """Replace control characters, by which an API's response could control the terminal."""
    return "".join(sign if sign.isprintable() else "\N{REPLACEMENT CHARACTER}" for sign in text)


def _clock(at: float) -> str:
    return time.strftime("%H:%M:%S", time.localtime(at))
