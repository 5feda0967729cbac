"""The command `status`: its flags, the two sources it asks, and its output, once or repeatedly."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import sys
import time
from dataclasses import dataclass
from http import HTTPStatus
from http.client import responses
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from rocket.cluster import control
from rocket.errors import RocketError, describe
from rocket.lab import logs
from rocket.lab.client import Api
from rocket.lab.settings import (
    CommandSettings,
    add_flags,
    colours_wanted,
    load,
    parse_duration,
    parse_yes_or_no,
    read_settings,
    setting,
)
from rocket.lab.shutdown import run, shutdown_on_signals
from rocket.lab.status.members import ApiStatus, Overview, Snapshot
from rocket.lab.status.report import report

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from rocket.lab.settings import Settings
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


def _parse_url(text: str) -> str:
    """Read the URL of an API."""
    try:
        parts = urlsplit(text)
        usable = parts.scheme in {"http", "https"} and parts.hostname and (parts.port is None or parts.port > 0)
    except ValueError:
        usable = False
    if not usable:
        raise ValueError("must be an address like http://127.0.0.1:5005")
    return text.rstrip("/")


@dataclass(frozen=True, slots=True, kw_only=True)
class StatusSettings(CommandSettings):
    """Which API to show, how often, and in which form; `Settings` say where the cluster is."""

    watch: float | None = setting(
        None, parse_duration, "S", f"repeat every S seconds ({_INTERVAL} if no S is given) until Ctrl-C",
        optional_value=_INTERVAL,
    )  # fmt: skip
    """Seconds between two snapshots; None: take one snapshot."""
    json: bool = setting(False, parse_yes_or_no, "", "print JSON; with --watch one object per line")
    url: str | None = setting(
        None, _parse_url, "URL", "the API's address (default: the address the cluster knows)"
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `status` to a parser."""
    add_flags(parser, StatusSettings)
    parser.add_argument("--data-dir", metavar="DIR", help="data directory of the running cluster")
    parser.add_argument("--postgres-port", metavar="P", help="a port of the running cluster")


# --- sources ---


class Sources:
    """The two sources of a snapshot: the API, and the control socket of the cluster."""

    def __init__(self, url: str | None, system: Settings, api: Api) -> None:
        self._url = url
        self._data_dir, self._port = system.data_dir, system.port_asked_for
        self._default_url = system.url(system.api_port)
        self._api = api

    async def snapshot(self) -> Snapshot:
        """Ask both sources; one that does not answer in time leaves an error in the snapshot."""
        run_dir, cluster_error, served = await self._find()
        url = self._url or (served["url"] if served else self._default_url)
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

    @property
    def _asks_cluster(self) -> bool:
        """Whether a cluster is shown even if it has nothing to do with the API."""
        return self._url is None or self._data_dir is not None or self._port is not None

    async def _find(self) -> tuple[Path | None, str | None, Mapping[str, Any] | None]:
        """Return the running cluster, why there is none, and what it says of the API that its program serves."""
        try:
            run_dir = control.find(self._data_dir, self._port)
            return run_dir, None, await control.ask(run_dir, "api", _API_TIMEOUT_S)
        except RocketError as error:
            return None, describe(error) if self._asks_cluster else None, None

    def _is_of_cluster(self, url: str, served: Mapping[str, Any] | None) -> bool:
        """Return whether the API and the cluster that were found belong together."""
        if self._asks_cluster:
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
    settings, system = read_settings(StatusSettings, given), load(given)
    try:
        run(_show(settings, system))
    except BrokenPipeError:  # the reader has gone, as behind `| head`
        logs.discard_output()
    return OK


async def _show(settings: StatusSettings, system: Settings) -> None:
    # By one connection, so that all snapshots count the reads of the same API process.
    async with Api(timeout_s=_API_TIMEOUT_S, connections=1) as api:
        sources = Sources(settings.url, system, api)
        if settings.watch is not None:
            with shutdown_on_signals():
                await _watch(settings, sources, settings.watch)
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
    watching = settings.watch is not None
    if settings.json:
        print(json.dumps(overview.as_json(), indent=None if watching else 2), flush=True)
        return
    terminal = shutil.get_terminal_size() if sys.stdout.isatty() else None
    lines = report(
        overview,
        width=terminal.columns if terminal else None,
        colours=terminal is not None and colours_wanted(),
        timed=watching,
    )
    if on_screen and terminal:
        screen = f"{_TO_END_OF_LINE}\n".join(lines[: terminal.lines])
        print(f"{_HOME}{screen}{_TO_END_OF_LINE}{_TO_END}", end="", flush=True)
    else:
        print("\n".join(lines) + ("\n" if watching else ""), flush=True)
