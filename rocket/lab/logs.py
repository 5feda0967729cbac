"""The program's log: one line a record, for people or for programs, written without waiting for a reader."""

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
from contextvars import ContextVar
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from collections.abc import Callable

REQUEST_ID: ContextVar[str | None] = ContextVar("REQUEST_ID", default=None)
"""The id of the request that is being answered; None outside of requests, and where requests have no ids."""

MOST_WAITING = 10_000
"""Lines that wait for a reader, about a megabyte; further ones are dropped, and counted."""

_PREFIX = "rocket."
_PIECE = 1000
"""Characters that are written at once: a pipe that accepts any has room for 4,096 bytes."""
_RETRY_S = 0.05
_CLOSE_TIMEOUT_MS = 200
"""How long `close` waits for a reader, for each piece."""
_SUPPRESSED_S = 5.0
"""For this long after one line, further lines of its kind are only counted."""
_MOST_KINDS = 1000

_log = logging.getLogger("rocket.log")


class _TextFormatter(logging.Formatter):
    """`12:00:01.123 api        Reading ride 96 from server 'replica0'`; a worker adds its number: `api/2`."""

    def __init__(self, worker: int | None) -> None:
        super().__init__()
        self._suffix = "" if worker is None else f"/{worker}"
        self._clock = (0, "")
        """The last second, and its text: most lines are of the same second as the line before."""

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
    """One object a line, with the id of the request that it is about and the record's own `fields`."""

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
    """Shows one line now and then of the lines with the same `alike`, and in it how many were suppressed.

    During an outage there is at least one for every request.
    """

    def __init__(self) -> None:
        super().__init__()
        self._last: dict[tuple[str, str], tuple[float, int]] = {}
        """When one was shown, and how many have been suppressed since."""

    def filter(self, record: logging.LogRecord) -> bool:
        alike = getattr(record, "alike", None)
        if alike is None:
            return True
        key = (record.name, alike)
        shown_at, suppressed = self._last.get(key, (-math.inf, 0))
        if shown_at <= record.created < shown_at + _SUPPRESSED_S:
            self._last[key] = (shown_at, suppressed + 1)
            return False
        if len(self._last) >= _MOST_KINDS:
            self._last.clear()
        self._last[key] = (record.created, 0)
        if suppressed:
            record.msg += f" (and {suppressed} more since the last line of that kind)"
        return True


class _Handler(logging.StreamHandler[TextIO]):
    """Writes to standard output, and never waits for its reader: a pager, say, or a terminal that is halted.

    Lines wait in a queue with a bound instead. When the reader is gone (`| head`), the program ends by SIGTERM.
    A QueueHandler with a QueueListener would do the same by a thread; it took 10 to 20 microseconds more of CPU a
    line, which is some percent of a read.
    """

    def __init__(self, stream: TextIO, most_waiting: int) -> None:
        super().__init__(stream)
        self._most_waiting = most_waiting
        self._waiting: deque[str] = deque()
        self._dropped = 0
        self._retrying_on: asyncio.AbstractEventLoop | None = None
        output = select.poll()
        self._accepts: Callable[[int], object] = output.poll
        try:
            output.register(self.stream.fileno(), select.POLLOUT)
        except (OSError, ValueError, AttributeError):  # it is no file, or closed
            self._accepts = lambda _timeout_ms: True

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line, or add it to the queue."""
        try:
            line = f"{self.format(record)}\n"
            if len(line) <= _PIECE and not self._waiting and self._accepts(0):
                self.stream.write(line)
                self.flush()
            elif len(self._waiting) < self._most_waiting:
                self._waiting.extend(line[start : start + _PIECE] for start in range(0, len(line), _PIECE))
                self._write_waiting(0)
            else:
                self._dropped += 1
        except Exception:  # noqa: BLE001 - as every handler does
            self.handleError(record)

    def _retry_later(self) -> None:
        with contextlib.suppress(RuntimeError):  # without a loop, the next line or `close` tries again
            loop = asyncio.get_running_loop()
            if self._retrying_on is not loop:
                self._retrying_on = loop
                loop.call_later(_RETRY_S, self._retry)

    def _retry(self) -> None:
        self._retrying_on = None
        with self.lock or contextlib.nullcontext():
            try:
                self._write_waiting(0)
            except OSError:
                self.handleError(logging.makeLogRecord({}))

    def _write_waiting(self, timeout_ms: int) -> None:
        """Write as much of the queue as is accepted."""
        while self._waiting and self._accepts(timeout_ms):
            self.stream.write(self._waiting.popleft())
            self.flush()
        if self._waiting:
            self._retry_later()
        elif self._dropped:
            dropped, self._dropped = self._dropped, 0
            _log.warning("%d lines of this log were dropped, since they were not read", dropped)

    def close(self) -> None:
        """Write the rest of the queue, if it is accepted."""
        if self._waiting:
            with contextlib.suppress(OSError, ValueError):
                self._write_waiting(_CLOSE_TIMEOUT_MS)
        super().close()

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        if not isinstance(sys.exc_info()[1], BrokenPipeError):
            super().handleError(record)
            return
        discard_output()
        signal.raise_signal(signal.SIGTERM)


def discard_output() -> None:
    """Discard what is still printed to standard output, by Python at its end as well: its reader is gone."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def configure(log_format: str, *, worker: int | None = None, most_waiting: int = MOST_WAITING) -> None:
    """Send the program's log to standard output, in this format, with the number of the worker, if it is one."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A file name that is not UTF-8 does not cost the line that contains it.
        sys.stdout.reconfigure(errors="backslashreplace")
    # No format shows these, so they need not be found out for each line ("Optimization" in logging's manual).
    logging._srcfile = None  # noqa: SLF001
    logging.logThreads = logging.logMultiprocessing = logging.logProcesses = False
    handler = _Handler(sys.stdout, most_waiting)
    handler.setFormatter(_JsonFormatter(worker) if log_format == "json" else _TextFormatter(worker))
    handler.addFilter(_Alike())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("rocket").setLevel(logging.INFO)


def _part(record: logging.LogRecord) -> str:
    return record.name.removeprefix(_PREFIX)
