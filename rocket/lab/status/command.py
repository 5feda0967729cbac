"""The command `status`: its flags, the two sources it asks, and its output, once or repeatedly."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import sys
import time
from dataclasses import dataclass
from http import HTTPStatus
from http.client import responses
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import urlsplit

from rocket.cluster import control
from rocket.errors import InvalidSetting, RocketError, describe
from rocket.lab import settings as run_settings
from rocket.lab.loop import run
from rocket.lab.shutdown import shutdown_on_signals
from rocket.lab.status.members import ApiStatus, Overview, Snapshot
from rocket.lab.status.report import report
from rocket.lab.values import parse_duration

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from rocket.lab.client import Api
    from rocket.lab.status.members import Reads

OK = 0

_INTERVAL = "2s"
_API_TIMEOUT_S = 2.0
_CLUSTER_TIMEOUT_S = 10.0
"""The cluster waits almost as long for a server that accepts connections and does not answer."""

_ENTER, _LEAVE = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"
"""Switch to the alternate screen and hide the cursor, and back."""
_HOME, _TO_END_OF_LINE, _TO_END = "\x1b[H", "\x1b[K", "\x1b[J"


class NothingRunning(RocketError):
    """Neither an API nor a cluster was found; says where."""


# --- settings ---


@dataclass(frozen=True, slots=True)
class StatusSettings:
    """Which system to show, how often, and in which form."""

    url: str | None
    """The API's address as given; None: the cluster's API."""
    default_url: str
    """The API's address if the cluster does not know it."""
    data_dir: Path | None
    port: int | None
    """A port of the cluster, if one was given."""
    watch_s: float | None
    """Seconds between two snapshots; None: take one snapshot."""
    json: bool
    colours: bool
    """Whether a terminal may be shown colours."""

    @classmethod
    def read(cls, given: argparse.Namespace) -> Self:
        """Read the flags, and the environment for cluster and API; raise `InvalidSetting`."""
        settings = run_settings.load(given)
        try:
            watch_s = None if given.watch is None else parse_duration(given.watch)
        except ValueError as error:
            raise InvalidSetting(f"--watch {error}, not {given.watch!r}") from None
        return cls(
            url=None if given.url is None else _url(given.url),
            default_url=settings.url(settings.api_port),
            data_dir=settings.data_dir,
            port=settings.port_asked_for,
            watch_s=watch_s,
            json=given.json,
            colours=run_settings.colours_wanted(),
        )

    @property
    def names_cluster(self) -> bool:
        """Whether a cluster was given by its directory or port."""
        return self.data_dir is not None or self.port is not None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `status` to a parser."""
    parser.add_argument(
        "--watch",
        nargs="?",
        const=_INTERVAL,
        metavar="S",
        help=f"repeat every S seconds ({_INTERVAL} if no S is given) until Ctrl-C",
    )
    parser.add_argument("--json", action="store_true", help="print JSON; with --watch one object per line")
    parser.add_argument("--url", metavar="URL", help="the API's address (default: the address the cluster knows)")
    parser.add_argument("--data-dir", metavar="DIR", help="the running cluster's data directory")
    parser.add_argument("--postgres-port", metavar="P", help="a port of the running cluster")


def _url(text: str) -> str:
    try:
        parts = urlsplit(text)
        usable = parts.scheme in {"http", "https"} and parts.hostname and (parts.port is None or parts.port > 0)
    except ValueError:
        usable = False
    if not usable:
        raise InvalidSetting(f"--url must be an address like http://127.0.0.1:5005, not {text!r}")
    return text.rstrip("/")


# --- sources ---


class Sources:
    """The two sources of a snapshot: the API, and the control socket of the cluster."""

    def __init__(self, settings: StatusSettings, api: Api) -> None:
        self._settings = settings
        self._api = api

    async def snapshot(self) -> Snapshot:
        """Ask both sources; one that does not answer in time leaves an error in the snapshot."""
        run_dir, cluster_error, served = await self._find()
        url = self._settings.url or (served["url"] if served else self._settings.default_url)
        if run_dir and not self._is_of_cluster(url, served):
            run_dir, served = None, None
        (api, api_error), (nodes, error) = await asyncio.gather(self._ask_api(url), self._ask_cluster(run_dir))
        return Snapshot(
            at=round(time.time(), 3),
            url=url,
            workers=served["workers"] if served else None,
            api=api,
            api_error=api_error,
            nodes=nodes,
            cluster_error=cluster_error or error,
        )

    async def _find(self) -> tuple[Path | None, str | None, Mapping[str, Any] | None]:
        """Return the running cluster, why there is none, and what it says of the API that its program serves."""
        try:
            run_dir = control.find(self._settings.data_dir, self._settings.port)
            return run_dir, None, await control.ask(run_dir, "api", _API_TIMEOUT_S)
        except RocketError as error:
            api_only = self._settings.url is not None and not self._settings.names_cluster
            return None, None if api_only else describe(error), None

    def _is_of_cluster(self, url: str, served: Mapping[str, Any] | None) -> bool:
        """Return whether the API and the cluster that were found belong together."""
        if self._settings.url is None or self._settings.names_cluster:
            return True
        return served is not None and _host_and_port(served["url"]) == _host_and_port(url)

    async def _ask_cluster(self, run_dir: Path | None) -> tuple[Sequence[Mapping[str, Any]] | None, str | None]:
        if run_dir is None:
            return None, None
        try:
            return await control.ask(run_dir, "status", _CLUSTER_TIMEOUT_S), None
        except RocketError as error:
            return None, describe(error)

    async def _ask_api(self, url: str) -> tuple[ApiStatus | None, str | None]:
        try:
            answer = await self._api.get(f"{url}/replicas")
        except RocketError as error:
            return None, describe(error)
        if answer.status != HTTPStatus.OK:
            return None, f"it answers {answer.status} {responses.get(answer.status, '')}".rstrip()
        try:
            return ApiStatus.read(answer.json()), None
        except ValueError:
            return None, "not what rocket's API answers"


def _host_and_port(url: str) -> tuple[str, int | None]:
    parts = urlsplit(url)
    host = parts.hostname or ""
    return "127.0.0.1" if host == "localhost" else host, parts.port


# --- output ---


def show(given: argparse.Namespace) -> int:
    """Show the system once or repeatedly, as the command line says; return the exit code.

    Raise `NothingRunning` if the first snapshot is empty.
    """
    settings = StatusSettings.read(given)
    try:
        run(_show(settings))
    except BrokenPipeError:  # the reader has gone, as behind `| head`
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, sys.stdout.fileno())
        os.close(devnull)
    return OK


async def _show(settings: StatusSettings) -> None:
    from rocket.lab.client import Api  # noqa: PLC0415 - run-all starts faster without

    # By one connection, so that all snapshots count the reads of the same API process.
    async with Api(timeout_s=_API_TIMEOUT_S, connections=1) as api:
        sources = Sources(settings, api)
        if settings.watch_s is not None:
            with shutdown_on_signals():
                await _watch(settings, sources, settings.watch_s)
            return
        snapshot = await _first_snapshot(sources)
        _print(settings, Overview.of(snapshot, snapshot.api.reads if snapshot.api else None))


async def _first_snapshot(sources: Sources) -> Snapshot:
    snapshot = await sources.snapshot()
    if snapshot.is_empty:
        raise NothingRunning(snapshot.why_empty)
    return snapshot


async def _watch(settings: StatusSettings, sources: Sources, interval_s: float) -> None:
    """Show snapshots until cancelled; a system that ends meanwhile may start again."""
    counted: Reads | None = None
    counted_at = 0.0
    snapshot = await _first_snapshot(sources)
    on_screen = sys.stdout.isatty() and not settings.json
    with _alternate_screen() if on_screen else contextlib.nullcontext():
        while True:
            now = time.monotonic()
            reads = None
            if snapshot.api is not None:
                reads = snapshot.api.reads.since(counted, round(now - counted_at, 3))
                counted, counted_at = snapshot.api.reads, now
            _print(settings, Overview.of(snapshot, reads), on_screen=on_screen)
            await asyncio.sleep(interval_s)
            snapshot = await sources.snapshot()


@contextlib.contextmanager
def _alternate_screen() -> Iterator[None]:
    """Show the terminal's alternate screen, without a cursor, and restore its contents at the end."""
    print(_ENTER, end="", flush=True)
    try:
        yield
    finally:
        print(_LEAVE, end="", flush=True)


def _print(settings: StatusSettings, overview: Overview, *, on_screen: bool = False) -> None:
    watching = settings.watch_s is not None
    if settings.json:
        print(json.dumps(overview.as_json(), indent=None if watching else 2), flush=True)
        return
    terminal = shutil.get_terminal_size() if sys.stdout.isatty() else None
    lines = report(
        overview,
        width=terminal.columns if terminal else None,
        colours=terminal is not None and settings.colours,
        timed=watching,
    )
    if on_screen and terminal:
        screen = f"{_TO_END_OF_LINE}\n".join(lines[: terminal.lines])
        print(f"{_HOME}{screen}{_TO_END_OF_LINE}{_TO_END}", end="", flush=True)
    else:
        print("\n".join(lines) + ("\n" if watching else ""), flush=True)
