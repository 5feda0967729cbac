"""How fresh a read has to be: what it must see, at the least, and of whom."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import ClassVar

_WITHIN = re.compile(r"within ?([0-9]{1,9}(?:\.[0-9]{1,9})?) ?s")


@dataclass(frozen=True, slots=True)
class Freshness:
    """What a read has to see: `SESSION`, `GLOBAL`, `ANY`, or `within` some seconds."""

    SESSION: ClassVar[Freshness]
    """All that the session has written and seen; `GLOBAL` where it has no token yet. The default."""
    GLOBAL: ClassVar[Freshness]
    """That, and all that anybody was told is committed before the read began.

    So reads of any sessions that follow each other never go back, as long as replicas serve them.
    """
    ANY: ClassVar[Freshness]
    """Nothing: whichever node is up serves it, however far behind. It leaves the session's token as it is."""

    name: str
    """`session`, `global`, `any` or `within`."""
    max_age_s: float | None = None
    """With `within`: all that was committed that many seconds before the read began."""

    @staticmethod
    def within(seconds: float) -> Freshness:
        """Return what asks for all that was committed `seconds` before the read began, and all that it has seen.

        What the session has *written* since may be missing, and what its writes have shown. Raise `ValueError` for
        what is no positive number.
        """
        if not (0 < seconds < math.inf):
            raise ValueError(f"a read must be fresh within some seconds, not {seconds!r}")
        return Freshness("within", seconds)

    @staticmethod
    def parse(text: str) -> Freshness:
        """Return what `str` gives for one: `session`, `global`, `any`, `within 10s`; raise `ValueError`."""
        if (known := _BY_NAME.get(text)) is not None:
            return known
        if (match := _WITHIN.fullmatch(text)) is None or not float(match[1]):
            raise ValueError("must be session, global, any, or within some seconds: within 10s")
        return Freshness.within(float(match[1]))

    def __str__(self) -> str:
        return self.name if self.max_age_s is None else f"within {self.max_age_s:g}s"


Freshness.SESSION = Freshness("session")
Freshness.GLOBAL = Freshness("global")
Freshness.ANY = Freshness("any")
_BY_NAME = {each.name: each for each in (Freshness.SESSION, Freshness.GLOBAL, Freshness.ANY)}
