"""Positions in the write-ahead log, and where one timeline of it ends and the next begins."""

from __future__ import annotations

import functools
import re
from typing import ClassVar, Self

_TEXT = re.compile(r"([0-9A-Fa-f]{1,8})/([0-9A-Fa-f]{1,8})")


class Lsn(int):
    """A log sequence number: a byte position in the write-ahead log, written `16/B374D848` by Postgres.

    It is an `int`, so it compares as a number (never as text), and the difference of two is a number of bytes.
    """

    __slots__ = ()

    PENDING: ClassVar[Lsn]
    """Stands for "the commit LSN is not known yet": above every position that a replica can reach."""

    def __new__(cls, value: int) -> Self:
        """Take a byte position; raise `ValueError` outside of 64 bits."""
        if not 0 <= value < 1 << 64:
            raise ValueError(f"an LSN has 64 bits, not {value!r}")
        return super().__new__(cls, value)

    @staticmethod
    @functools.lru_cache(maxsize=1024)
    def parse(text: str) -> Lsn:
        """Read Postgres' own form, `XXXXXXXX/XXXXXXXX` in hexadecimal; raise `ValueError` for all else."""
        match = _TEXT.fullmatch(text)
        if match is None:
            raise ValueError(f"not an LSN: {text!r}")
        return Lsn((int(match[1], 16) << 32) | int(match[2], 16))

    @classmethod
    def from_wire(cls, value: int) -> Self:
        """Take what asyncpg returns for a `pg_lsn`: it reads the 64 bits as a signed number."""
        return cls(value & 0xFFFFFFFF_FFFFFFFF)

    @property
    def wire(self) -> int:
        """What asyncpg takes for a `pg_lsn`."""
        return self - (1 << 64) if self >= 1 << 63 else int(self)

    def __str__(self) -> str:
        return f"{self >> 32:X}/{self & 0xFFFFFFFF:X}"

    def __repr__(self) -> str:
        return f"Lsn.parse({str(self)!r})"


Lsn.PENDING = Lsn.parse("FFFFFFFF/FFFFFFFF")


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
