"""Asks Patroni's REST API for its members: all that are known, and the first to answer is heard."""

from __future__ import annotations

import asyncio
import base64
import time
from typing import TYPE_CHECKING, Self

import aiohttp

from rocket.errors import RocketError, describe
from rocket.topology.patroni_addresses import base_url, without_secrets
from rocket.topology.patroni_members import parse_cluster
from rocket.topology.patroni_tls import Tls

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rocket.topology.patroni_members import Listing

_ANSWER_S = 1.0
"""In all. A member that is slower is as good as none: it may be frozen, or have no way to the store behind it."""
_HEAD_START_S = 0.1
"""Of who answered last: where that is enough, nobody else is troubled, and no question broken off."""
_ORDER_S = 30.0
"""A switchover is answered when it is over."""
_LARGEST = 2**20
"""Bytes: thousands of members."""
_OK, _REFUSED, _BROKEN = 200, 400, 500
_AS_IT_IS = {"Accept-Encoding": "identity"}
"""What is compressed may be of any length."""


class PatroniSilent(RocketError):
    """No member of Patroni's answered."""


class NotPatroni(PatroniSilent):
    """Something answers at each address, and nothing as Patroni would."""


class RestClient:
    """Asks the addresses that it was given, and those that the members have named since."""

    def __init__(self, urls: Iterable[str], tls: Tls | None = None) -> None:
        """Raise `InvalidSetting` for certificates that cannot be used."""
        self._given = tuple(urls)
        self._named: tuple[str, ...] = ()
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(ssl=(tls or Tls()).context()),
            timeout=aiohttp.ClientTimeout(total=_ANSWER_S),
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
        """Return what the first to answer says; raise `PatroniSilent` if none answers in time.

        Who answered last is asked first, and all others at once as soon as that fails or takes long.
        """
        return (await self._answers(enough=1))[0]

    async def newest(self) -> tuple[Listing, ...]:
        """Ask everybody; return what those say who know of the newest timeline. Raise `PatroniSilent`.

        A member that is cut off from its store says for a while what was there before.
        """
        listings = await self._answers(enough=None)
        newest = max(listing.timeline for listing in listings)
        return tuple(listing for listing in listings if listing.timeline == newest)

    async def _answers(self, enough: int | None) -> list[Listing]:
        """Return so many answers, or all that there are, in time: one at least, or raise `PatroniSilent`."""
        urls = list(dict.fromkeys((*self._named, *self._given)))
        failures: dict[str, Exception] = {url: TimeoutError(f"no answer within {_ANSWER_S:g} s") for url in urls}
        answers: dict[str, Listing] = {}

        async def attempt(url: str) -> None:
            try:
                answers[url] = await self._ask(url)
            except TimeoutError:
                return
            except (aiohttp.ClientError, OSError, ValueError) as error:
                failures[url] = error

        deadline = time.monotonic() + _ANSWER_S
        async with asyncio.TaskGroup() as group:

            def ask(some: list[str]) -> set[asyncio.Task[None]]:
                return {group.create_task(attempt(url), name=f"ask {without_secrets(url)}") for url in some}

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
            words = "; ".join(f"{without_secrets(url)}: {describe(failure)}" for url, failure in failures.items())
            strangers = all(isinstance(failure, ValueError) for failure in failures.values())
            raise (NotPatroni if strangers else PatroniSilent)(f"Patroni does not answer ({words})")
        best = max(answers, key=lambda url: answers[url].timeline)
        named = (base_url(member.api_url) for member in answers[best].members)
        self._named = tuple(dict.fromkeys((best, *(one for one in named if one))))
        return list(answers.values())

    async def order(self, url: str, what: str, login: tuple[str, str], **body: object) -> None:
        """Have the member at `url` do something; raise `PatroniSilent` if it refuses, or does not answer."""
        headers = {"Authorization": "Basic " + base64.b64encode(":".join(login).encode()).decode()}
        patience = aiohttp.ClientTimeout(total=_ORDER_S)
        try:
            async with self._session.post(f"{url}/{what}", json=body, headers=headers, timeout=patience) as answer:
                if answer.status >= _REFUSED:
                    raise PatroniSilent(f"Patroni refuses {what}: {await answer.text()}")
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise PatroniSilent(f"Patroni did not answer to {what}: {describe(error)}") from None

    async def _ask(self, url: str) -> Listing:
        async with self._session.get(f"{url}/cluster") as answer:
            if answer.status >= _BROKEN:
                raise ConnectionError(f"it answers with status {answer.status}")
            if answer.status != _OK:
                raise ValueError(f"it answers with status {answer.status}")
            body = bytearray()
            async for piece in answer.content.iter_any():
                body += piece
                if len(body) > _LARGEST:
                    raise ValueError("its answer is too long")
            return parse_cluster(bytes(body))
