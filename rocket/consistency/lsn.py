"""Positions in the write-ahead log."""

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
