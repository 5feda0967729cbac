"""The two places that know something of a running system: its API, and its cluster's door."""

from __future__ import annotations

import asyncio
import os
import time
from http import HTTPStatus
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import aiohttp

from rocket.cluster import control
from rocket.errors import RocketError, describe
from rocket.lab.status.members import ApiStatus
from rocket.lab.status.overview import Look

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from rocket.lab.status.settings import StatusSettings

ANSWER_S = 2.0
_CLUSTER_ANSWER_S = 10.0
"""A server that takes connections and says nothing holds the cluster up for almost as long."""


class Sources:
    """Asks both, as often as it is told to. What it asked for by one connection, it asks for by that again."""

    def __init__(self, settings: StatusSettings, http: aiohttp.ClientSession) -> None:
        self._settings = settings
        self._http = http

    async def look(self) -> Look:
        """Ask everybody who knows something; who says nothing in time is told of, and not waited for."""
        run_dir, cluster_error, served = await self._find()
        url = self._settings.url or (served["url"] if served else self._settings.usual_url)
        if run_dir and not self._is_of_cluster(url, served):
            run_dir, served = None, None
        (api, api_error), (nodes, error) = await asyncio.gather(self._ask_api(url), self._ask_cluster(run_dir))
        return Look(
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
            return run_dir, None, await control.ask(run_dir, "api", ANSWER_S)
        except RocketError as error:
            asked_elsewhere = self._settings.url is not None and not self._settings.names_cluster
            return None, None if asked_elsewhere else describe(error), None

    def _is_of_cluster(self, url: str, served: Mapping[str, Any] | None) -> bool:
        """Tell whether an API and a cluster that were found belong together."""
        if self._settings.url is None or self._settings.names_cluster:
            return True
        return served is not None and _place(served["url"]) == _place(url)

    async def _ask_cluster(self, run_dir: Path | None) -> tuple[Sequence[Mapping[str, Any]] | None, str | None]:
        if run_dir is None:
            return None, None
        try:
            return await control.ask(run_dir, "status", _CLUSTER_ANSWER_S), None
        except RocketError as error:
            return None, describe(error)

    async def _ask_api(self, url: str) -> tuple[ApiStatus | None, str | None]:
        try:
            async with self._http.get(f"{url}/replicas") as response:
                if response.status != HTTPStatus.OK:
                    return None, f"it answers {response.status} {response.reason}"
                return ApiStatus.read(await response.json()), None
        except aiohttp.ClientConnectorError as error:
            return None, _why(error.os_error)
        except TimeoutError:
            return None, f"no answer within {ANSWER_S:g} s"
        except (aiohttp.ClientError, ValueError) as error:
            return None, describe(error)


def _why(error: OSError) -> str:
    """Say why there is no connection; asyncio tells, in place of the system's words, which call it was."""
    if error.errno is not None and error.errno > 0:
        return os.strerror(error.errno)
    return error.strerror or describe(error)


def _place(url: str) -> tuple[str, int | None]:
    parts = urlsplit(url)
    host = parts.hostname or ""
    return "127.0.0.1" if host == "localhost" else host, parts.port
