"""A client of Patroni's REST API: all members that are known are asked, and the first answer counts."""

from __future__ import annotations

import asyncio
import base64
import ssl
import time
from typing import TYPE_CHECKING, NamedTuple, Self
from urllib.parse import urlsplit

import aiohttp

from rocket.errors import InvalidSetting, describe
from rocket.topology.patroni import NotPatroni, PatroniUnavailable, base_url, parse_cluster

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from rocket.topology.patroni import Listing

_HEAD_START_S = 0.1
"""For the member that answered last: usually it answers in time, and no other one needs to be asked."""
_REQUEST_TIMEOUT_S = 30.0
"""A switchover is answered when it is over."""
_LARGEST_BYTES = 2**20
"""Enough for thousands of members."""
_OK, _REFUSED, _BROKEN = 200, 400, 500


class Tls(NamedTuple):
    """The files by which the REST API is asked over TLS."""

    ca: str | Path | None = None
    """The certificates of the authority that signed the API's; None: those that the machine trusts."""
    certificate: str | Path | None = None
    """The client's certificate, in one file with its key; None: the API asks for none."""

    def context(self) -> ssl.SSLContext | bool:
        """Return what aiohttp takes as `ssl`; raise `InvalidSetting` for files that cannot be used."""
        if self == Tls():
            return True
        try:
            context = ssl.create_default_context(cafile=self.ca)
        except OSError as error:  # of which SSLError is a subclass
            raise InvalidSetting(f"cannot use {self.ca} as Patroni's CA: {_describe_unusable(error)}") from None
        if self.certificate is not None:
            try:
                # With a password given, OpenSSL does not ask the terminal for one: the wrong one is an error.
                context.load_cert_chain(self.certificate, password="")
            except OSError as error:
                raise InvalidSetting(
                    f"cannot use {self.certificate} as client certificate for Patroni: {_describe_unusable(error)}"
                ) from None
        return context


def _describe_unusable(error: OSError) -> str:
    if isinstance(error, ssl.SSLError):
        return "it has to be PEM, with an unencrypted key where one belongs to it"
    return error.strerror or str(error)


class RestClient:
    """Asks the REST APIs at the given addresses, and those that the members have named since.

    A member that does not answer within `answer_timeout_s` counts as down: it may be frozen, or cut off from its
    store. Raise `ValueError` for addresses that cannot be used, and `InvalidSetting` for certificates.
    """

    def __init__(self, urls: Iterable[str], tls: Tls | None = None, *, answer_timeout_s: float = 1.0) -> None:
        self._given = tuple(base_url(url) for url in urls)
        if not all(self._given):
            raise ValueError("urls must be addresses of REST APIs, like http://10.0.0.1:8008")
        self._answer_timeout_s = answer_timeout_s
        self._named: tuple[str, ...] = ()
        """The addresses that the members have named, first the one that answered last."""
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(ssl=(tls or Tls()).context()),
            timeout=aiohttp.ClientTimeout(total=answer_timeout_s),
            headers={"Accept-Encoding": "identity"},  # a compressed answer may unpack to any length
            auto_decompress=False,
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close every connection."""
        await self._session.close()

    async def listing(self) -> Listing:
        """Return the first answer; raise `PatroniUnavailable` if none comes in time.

        The member that answered last is asked first, and all others at once as soon as it fails or takes long.
        """
        return (await self._answers(enough=1))[0]

    async def newest_listings(self) -> tuple[Listing, ...]:
        """Ask every member; return the answers that know the newest timeline. Raise `PatroniUnavailable`.

        A member that is cut off from its store repeats for a while what it knew before.
        """
        listings = await self._answers(enough=None)
        newest = max(listing.timeline for listing in listings)
        return tuple(listing for listing in listings if listing.timeline == newest)

    async def request(self, url: str, action: str, login: tuple[str, str], **body: object) -> None:
        """Post an action (`switchover`, say) to one member; raise `PatroniUnavailable` if it fails."""
        headers = {"Authorization": "Basic " + base64.b64encode(":".join(login).encode()).decode()}
        timeout = aiohttp.ClientTimeout(total=_REQUEST_TIMEOUT_S)
        try:
            async with self._session.post(
                f"{url}/{action}", json=body, headers=headers, timeout=timeout
            ) as answer:
                if answer.status >= _REFUSED:
                    raise PatroniUnavailable(f"Patroni refuses {action}: {await answer.text()}")
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise PatroniUnavailable(f"Patroni did not answer to {action}: {describe(error)}") from None

    async def _answers(self, enough: int | None) -> list[Listing]:
        """Return at least one answer: the first `enough`, or all that come in time; raise `PatroniUnavailable`."""
        urls = list(dict.fromkeys((*self._named, *self._given)))
        no_answer = f"no answer within {self._answer_timeout_s:g} s"
        failures: dict[str, Exception] = {url: TimeoutError(no_answer) for url in urls}
        answers: dict[str, Listing] = {}

        async def attempt(url: str) -> None:
            try:
                answers[url] = await self._ask(url)
            except TimeoutError:
                return
            except (aiohttp.ClientError, OSError, ValueError) as error:
                failures[url] = error

        deadline = time.monotonic() + self._answer_timeout_s
        async with asyncio.TaskGroup() as group:

            def ask(some: list[str]) -> set[asyncio.Task[None]]:
                return {group.create_task(attempt(url), name=f"ask {_without_login(url)}") for url in some}

            pending = ask(urls[:1])
            if enough is not None:
                _, pending = await asyncio.wait(pending, timeout=_HEAD_START_S)
            if enough is None or len(answers) < enough:
                pending |= ask(urls[1:])
            while pending and len(answers) < (enough or len(urls)) and (left_s := deadline - time.monotonic()) > 0:
                _, pending = await asyncio.wait(pending, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
            for task in pending:
                task.cancel()
        if not answers:
            reasons = "; ".join(f"{_without_login(url)}: {describe(failure)}" for url, failure in failures.items())
            never = all(isinstance(failure, ValueError) for failure in failures.values())
            raise (NotPatroni if never else PatroniUnavailable)(f"Patroni does not answer ({reasons})")
        best = max(answers, key=lambda url: answers[url].timeline)
        named = (base_url(member.api_url) for member in answers[best].members)
        self._named = tuple(dict.fromkeys((best, *(one for one in named if one))))
        return list(answers.values())

    async def _ask(self, url: str) -> Listing:
        async with self._session.get(f"{url}/cluster") as answer:
            if answer.status >= _BROKEN:
                raise ConnectionError(f"it answers with status {answer.status}")
            if answer.status != _OK:
                raise ValueError(f"it answers with status {answer.status}")
            body = bytearray()
            async for piece in answer.content.iter_any():
                body += piece
                if len(body) > _LARGEST_BYTES:
                    raise ValueError("its answer is too long")
            return parse_cluster(bytes(body))


def _without_login(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"
