"""The command `status`."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import sys
import time
from typing import TYPE_CHECKING

import aiohttp

from rocket.errors import RocketError
from rocket.lab import logs
from rocket.lab.shutdown import run, shutdown_on_signals
from rocket.lab.status.overview import Overview
from rocket.lab.status.report import report
from rocket.lab.status.settings import StatusSettings
from rocket.lab.status.sources import ANSWER_S, Sources

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    from rocket.lab.status.members import Reads
    from rocket.lab.status.overview import Look

OK = 0

_ENTER, _LEAVE = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"
"""To a screen of its own without a cursor, and back."""
_HOME, _TO_END_OF_LINE, _TO_END = "\x1b[H", "\x1b[K", "\x1b[J"


class NothingRunning(RocketError):
    """Neither an API nor a cluster was found; says where."""


def show(given: argparse.Namespace) -> int:
    """Show what the command line asks for, once or again and again; return the exit code.

    Raise `NothingRunning` if there was nothing to be seen at the first look.
    """
    settings = StatusSettings.read(given)
    try:
        run(_show(settings))
    except BrokenPipeError:  # nobody reads any more, as behind `| head`
        logs.discard_output()
    return OK


async def _show(settings: StatusSettings) -> None:
    connector = aiohttp.TCPConnector(limit=1)  # so that it is one process of the API whose counts go on
    timeout = aiohttp.ClientTimeout(total=ANSWER_S)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as http:
        sources = Sources(settings, http)
        if settings.watch_s is not None:
            with shutdown_on_signals():
                await _watch(settings, sources, settings.watch_s)
            return
        look = await _first_look(sources)
        _print(settings, Overview.of(look, look.api.reads if look.api else None))


async def _first_look(sources: Sources) -> Look:
    look = await sources.look()
    if look.is_blank:
        raise NothingRunning(look.why_blank)
    return look


async def _watch(settings: StatusSettings, sources: Sources, every_s: float) -> None:
    """Look again and again; what went away may come back."""
    counted: Reads | None = None
    counted_at = 0.0
    look = await _first_look(sources)
    on_screen = sys.stdout.isatty() and not settings.json
    with _screen() if on_screen else contextlib.nullcontext():
        while True:
            now = time.monotonic()
            reads = None
            if look.api is not None:
                reads = look.api.reads.since(counted, round(now - counted_at, 3))
                counted, counted_at = look.api.reads, now
            _print(settings, Overview.of(look, reads), on_screen=on_screen)
            await asyncio.sleep(every_s)
            look = await sources.look()


@contextlib.contextmanager
def _screen() -> Iterator[None]:
    """Give the terminal another screen, without a cursor, and then back what it showed before."""
    print(_ENTER, end="", flush=True)
    try:
        yield
    finally:
        print(_LEAVE, end="", flush=True)


def _print(settings: StatusSettings, overview: Overview, *, on_screen: bool = False) -> None:
    watched = settings.watch_s is not None
    if settings.json:
        print(json.dumps(overview.as_json(), indent=None if watched else 2), flush=True)
        return
    terminal = shutil.get_terminal_size() if sys.stdout.isatty() else None
    lines = report(
        overview,
        width=terminal.columns if terminal else None,
        colours=terminal is not None and settings.colours,
        timed=watched,
    )
    if on_screen and terminal:
        every_line = f"{_TO_END_OF_LINE}\n".join(lines[: terminal.lines])
        print(f"{_HOME}{every_line}{_TO_END_OF_LINE}{_TO_END}", end="", flush=True)
    else:
        print("\n".join(lines) + ("\n" if watched else ""), flush=True)
