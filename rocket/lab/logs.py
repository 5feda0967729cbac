"""How the program's log looks."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import logging
import math
import os
import select
import signal
import sys
import time
from collections import deque
from typing import TYPE_CHECKING, TextIO

from rocket.lab.request_id import REQUEST_ID

if TYPE_CHECKING:
    from collections.abc import Callable

_PREFIX = "rocket."
_MOST_WAITING = 10_000
"""Lines, a megabyte perhaps."""
_PIECE = 1000
"""Characters that a pipe which has room for any takes at once: it then has room for 4,096 bytes."""
_AGAIN_S = 0.05
_LAST_PATIENCE_MS = 200
"""How long the end waits for a reader, for each piece that he takes."""

_log = logging.getLogger("rocket.log")

_HELD_BACK_S = 5.0
"""For so long, lines that are alike are counted only."""
_KINDS = 1000
"""Of lines that are told apart, at most."""


class _TextFormatter(logging.Formatter):
    """`12:00:01.123 api        Reading ride 96 from server 'replica0'`; by a worker, its number: `api/2`."""

    def __init__(self, worker: int | None) -> None:
        super().__init__()
        self._suffix = "" if worker is None else f"/{worker}"
        self._clock = (0, "")
        """The last second, and how it is written: most lines are of the same one as the line before."""

    def format(self, record: logging.LogRecord) -> str:
        second, clock = self._clock
        if second != int(record.created):
            second = int(record.created)
            clock = time.strftime("%H:%M:%S", time.localtime(second))
            self._clock = (second, clock)
        part = _part(record) + self._suffix
        mark = "" if record.levelno <= logging.INFO else f"{record.levelname}: "
        line = f"{clock}.{int(record.msecs):03d} {part:<10} {mark}{record.getMessage()}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class _JsonFormatter(logging.Formatter):
    """One object a line; with the id of the request that it is about, and whatever `fields` the record brings."""

    def __init__(self, worker: int | None) -> None:
        super().__init__()
        self._worker = {} if worker is None else {"worker": worker}
        self._encode = json.JSONEncoder(ensure_ascii=False).encode

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, object] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "part": _part(record),
            **self._worker,
            "message": record.getMessage(),
        }
        if (request_id := REQUEST_ID.get()) is not None:
            entry["request_id"] = request_id
        entry.update(getattr(record, "fields", ()))
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return self._encode(entry)


class _Alike(logging.Filter):
    """Lets the first pass of the lines that their logger calls `alike`, then one every while, which says how many.

    During an outage there is at least one for every request.
    """

    def __init__(self) -> None:
        super().__init__()
        self._last: dict[tuple[str, str], tuple[float, int]] = {}
        """When one was let pass, and how many have been held back since."""

    def filter(self, record: logging.LogRecord) -> bool:
        alike = getattr(record, "alike", None)
        if alike is None:
            return True
        key = (record.name, alike)
        passed_at, held_back = self._last.get(key, (-math.inf, 0))
        if passed_at <= record.created < passed_at + _HELD_BACK_S:
            self._last[key] = (passed_at, held_back + 1)
            return False
        if len(self._last) >= _KINDS:
            self._last.clear()
        self._last[key] = (record.created, 0)
        if held_back:
            record.msg += f" (and {held_back} more since the last line of that kind)"
        return True


class _Handler(logging.StreamHandler[TextIO]):
    """Writes to standard output, and never waits for whoever reads it: a pager, say, or a terminal that is halted.

    Lines wait instead, up to a number. When nobody reads any more (`| head`), the program ends as it should.
    """

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self._waiting: deque[str] = deque()
        self._dropped = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        """On which it is tried again, if it is."""
        output = select.poll()
        self._takes: Callable[[int], object] = output.poll
        try:
            output.register(self.stream.fileno(), select.POLLOUT)
        except (OSError, ValueError, AttributeError):  # it is no file, or closed
            self._takes = lambda _timeout_ms: True

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line, or have it wait."""
        try:
            line = f"{self.format(record)}\n"
            if len(line) <= _PIECE and not self._waiting and self._takes(0):
                self.stream.write(line)
                self.flush()
            elif len(self._waiting) < _MOST_WAITING:
                self._waiting.extend(line[start : start + _PIECE] for start in range(0, len(line), _PIECE))
                self._catch_up(0)
            else:
                self._dropped += 1
        except Exception:  # noqa: BLE001 - as every handler does
            self.handleError(record)

    def _try_again(self) -> None:
        with contextlib.suppress(RuntimeError):  # no loop: the next line, or the end, sees to it
            loop = asyncio.get_running_loop()
            if self._loop is not loop:
                self._loop = loop
                loop.call_later(_AGAIN_S, self._tried_again)

    def _tried_again(self) -> None:
        self._loop = None
        with self.lock or contextlib.nullcontext():
            try:
                self._catch_up(0)
            except OSError:
                self.handleError(logging.makeLogRecord({}))

    def _catch_up(self, patience_ms: int) -> None:
        """Write what waits, as far as it is taken."""
        while self._waiting and self._takes(patience_ms):
            self.stream.write(self._waiting.popleft())
            self.flush()
        if self._waiting:
            self._try_again()
        elif self._dropped:
            dropped, self._dropped = self._dropped, 0
            _log.warning("%d lines of this log were dropped, since nobody read it", dropped)

    def close(self) -> None:
        """Write what waits, unless nobody takes it."""
        if self._waiting:
            with contextlib.suppress(OSError, ValueError):
                self._catch_up(_LAST_PATIENCE_MS)
        super().close()

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        if not isinstance(sys.exc_info()[1], BrokenPipeError):
            super().handleError(record)
            return
        # Whatever is still to be said goes nowhere, also what Python flushes at its end.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
        signal.raise_signal(signal.SIGTERM)


def configure(log_format: str, *, worker: int | None = None) -> None:
    """Send the program's log to standard output, marked with the number of the worker that this process is."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A file name that is not UTF-8 shall not cost the line that names it.
        sys.stdout.reconfigure(errors="backslashreplace")
    # What no line of ours tells need not be found out for each of them (see "Optimization" in logging's manual).
    logging._srcfile = None  # noqa: SLF001
    logging.logThreads = logging.logMultiprocessing = logging.logProcesses = False
    handler = _Handler(sys.stdout)
    handler.setFormatter(_JsonFormatter(worker) if log_format == "json" else _TextFormatter(worker))
    handler.addFilter(_Alike())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("rocket").setLevel(logging.INFO)


def _part(record: logging.LogRecord) -> str:
    return record.name.removeprefix(_PREFIX)
