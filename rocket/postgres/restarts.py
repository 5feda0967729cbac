"""When a server that died is started again, and when no more."""

from __future__ import annotations

from collections import deque

_FIRST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 5.0
_MOST_DEATHS = 5
_WITHIN_S = 60.0


class RestartPolicy:
    """Counts one server's deaths: five failed starts in a row, or five deaths within a minute, are enough.

    A death that somebody asked for (a fault on demand) never counts. Has no clock of its own.
    """

    def __init__(self) -> None:
        self._deaths: deque[float] = deque(maxlen=_MOST_DEATHS)
        self._in_a_row = 0

    def pause_after_death(self, now: float, *, asked: bool) -> float | None:
        """Return the seconds to wait before the next start, growing from death to death; None: give up."""
        if asked:
            return _FIRST_PAUSE_S
        self._deaths.append(now)
        self._in_a_row += 1
        often = len(self._deaths) == _MOST_DEATHS and now - self._deaths[0] <= _WITHIN_S
        if often or self._in_a_row > _MOST_DEATHS:
            return None
        recent = sum(1 for death in self._deaths if now - death <= _WITHIN_S)
        return min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2.0 ** (recent - 1))

    def started(self) -> None:
        """Note a start that went well."""
        self._in_a_row = 0
