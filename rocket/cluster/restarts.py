"""When a server that died is started again, and when no more."""

from __future__ import annotations

from collections import deque

_FIRST_PAUSE_S = 0.1
_ENOUGH = 5
_DUBIOUS_STARTS = 2
_DUBIOUS_DEATHS = 3
_WITHIN_S = 60.0


class RestartPolicy:
    """Counts one server's deaths: five failed starts in a row, or five deaths within a minute, are enough.

    A death that somebody asked for (a fault on demand) never counts. Has no clock of its own.
    """

    def __init__(self) -> None:
        self._deaths: deque[float] = deque(maxlen=_ENOUGH)
        self._failed_starts = 0
        self._recent = 0

    @property
    def dubious(self) -> bool:
        """Whether it may be the directory that is at fault: two failed starts in a row, or three deaths.

        Deaths within a minute, that is; and whatever somebody asked for says nothing of that.
        """
        return self._failed_starts >= _DUBIOUS_STARTS or self._recent >= _DUBIOUS_DEATHS

    def after_death(self, now: float, *, asked: bool) -> float | None:
        """Return the seconds to wait before the next start, growing from death to death; None: give up."""
        if asked:
            self._recent = 0
            return _FIRST_PAUSE_S
        self._deaths.append(now)
        self._recent = sum(1 for death in self._deaths if now - death <= _WITHIN_S)
        return None if self._recent == _ENOUGH else _FIRST_PAUSE_S * 2.0 ** (self._recent - 1)

    def after_failed_start(self, *, asked: bool) -> float | None:
        """Return the same after a start that ended in the server's death, or never came to its end."""
        if asked:
            return _FIRST_PAUSE_S
        self._failed_starts += 1
        return None if self._failed_starts == _ENOUGH else _FIRST_PAUSE_S * 2.0**self._failed_starts

    def started(self) -> None:
        """Note a start that went well."""
        self._failed_starts = 0
