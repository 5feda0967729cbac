"""Which nodes there are, as Patroni has it: asked again and again, and at once when a node is lost.

It is a hint. Which node is the primary and which replica may serve whom is found out from the servers themselves:
what is wrong here, or late, or missing, costs time and makes no answer wrong.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from rocket.errors import InvalidSetting, describe
from rocket.topology.patroni_addresses import filled_in
from rocket.topology.patroni_members import NAME_IN_WORDS
from rocket.topology.patroni_rest import NotPatroni, PatroniSilent, RestClient

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from rocket import Router
    from rocket.topology.patroni_members import Listing, Member
    from rocket.topology.patroni_tls import Tls

_POLL_S = 1.0
"""Between two looks while all is well."""
_BREATH_S = 0.2
"""Between two looks at least, however many nodes are lost."""
_GRACE_S = 60.0
"""How long a node may be missing before it is let go: when a store comes back, its members do so one by one."""

_log = logging.getLogger("rocket.patroni")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a node is, and whether it is there to be read from."""

    dsn: str
    takes_reads: bool = True


def places(members: Iterable[Member], template: str) -> dict[str, Place]:
    """Return where the nodes are, by their names at Patroni."""
    return {
        member.name: Place(filled_in(template, member.host, member.port), member.takes_reads) for member in members
    }


async def find(urls: Iterable[str], template: str, tls: Tls | None = None) -> dict[str, str]:
    """Return the DSNs of the members that there are now; none, with a warning, while Patroni is silent.

    Raise `InvalidSetting` where nothing comes of waiting: something else answers there, or it leads nowhere.
    """
    try:
        async with RestClient(urls, tls) as client:
            listing = await client.listing()
    except NotPatroni as stranger:
        raise InvalidSetting(str(stranger)) from None
    except PatroniSilent as silence:
        _log.warning("%s: there is no node until it does", silence)
        return {}
    if listing.leader in listing.unusable:
        raise InvalidSetting(f"Patroni's leader is {listing.leader!r}: its name has to be {NAME_IN_WORDS}")
    if not listing.members:
        raise InvalidSetting("Patroni lists no member that has an address")
    return {name: place.dsn for name, place in places(listing.members, template).items()}


class Topology:
    """Has a router go along with Patroni: members come, move, lose and get back their reads, and go."""

    def __init__(
        self, urls: Iterable[str], template: str, nodes: Mapping[str, str], tls: Tls | None = None
    ) -> None:
        self._client = RestClient(urls, tls)
        self._template = template
        self._known = {name: Place(dsn) for name, dsn in nodes.items()}
        self._router: Router
        self._missing_since: dict[str, float] = {}
        self._leader: str | None = None
        self._silent = not nodes
        """Whether it was when it was last asked, and that was said."""
        self._named: set[str] = set()
        """The members of whom it was said that their names will not do."""
        self._lost = asyncio.Event()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.close()

    def attend(self, router: Router) -> None:
        """Have this router go along; it was opened with the same nodes, and with our `may_be_primary`."""
        self._router = router
        router.board.on_gone.append(self._note)

    def _note(self, _name: str) -> None:
        self._lost.set()

    async def run(self) -> None:
        """Go along for ever; Patroni's silence changes nothing, and neither does whatever a look fails of."""
        complaint = ""
        while True:
            try:
                await self.look()
            except Exception as error:  # noqa: BLE001 - logged with its traceback
                if complaint != repr(error):  # once, not at every look
                    complaint = repr(error)
                    _log.exception("the nodes stay as they are: %s", describe(error))
            else:
                complaint = ""
            await asyncio.sleep(_BREATH_S)
            try:
                async with asyncio.timeout(_POLL_S):
                    await self._lost.wait()
            except TimeoutError:
                continue

    async def may_be_primary(self, name: str) -> bool:
        """Tell whether Patroni knows of nobody else who leads, nor that nobody does; its silence says nothing.

        An old leader that was halted, and goes on before its Patroni does, still takes itself for the primary.
        """
        try:
            listing = await self._client.listing()
            return listing.allows_primary(name) or await self._others_let_lead(name)
        except PatroniSilent:
            return True

    async def look(self) -> None:
        """Ask once, and go along with the answer."""
        self._lost.clear()
        asked_at = time.monotonic()
        try:
            listing = await self._client.listing()
            dropped = await self._dropped(listing)
        except PatroniSilent as silence:
            if not self._silent:
                _log.warning("%s: the nodes stay as they are", silence)
            self._silent = True
            return
        if self._silent:
            _log.info("Patroni answers again")
            self._silent = False
        for name in set(listing.unusable) - self._named:
            _log.warning("%r is left out: a member's name has to be %s", name, NAME_IN_WORDS)
            self._named.add(name)
        self._go_by_leader(listing, dropped, asked_at)
        wanted = places(listing.members, self._template)
        await self._take_in(wanted)
        if not listing.paused:  # what is not listed may run without its Patroni
            await self._let_go(wanted, time.monotonic())

    async def _others_let_lead(self, name: str) -> bool:
        """Tell whether a veto is outdated: everybody is asked, since it may be of somebody who is cut off."""
        return all(listing.allows_primary(name) for listing in await self._client.newest())

    async def _dropped(self, listing: Listing) -> str | None:
        """Return the primary's name, if Patroni no longer takes it for the leader."""
        primary = self._router.board.primary
        if primary is None or listing.allows_primary(primary.name) or await self._others_let_lead(primary.name):
            return None
        return primary.name

    def _go_by_leader(self, listing: Listing, dropped: str | None, asked_at: float) -> None:
        """Have a primary leave its office that was dropped: what it took now would be lost."""
        if (leader := listing.leader) != self._leader:
            shown = repr(leader) if leader in listing.unusable else leader
            _log.info(
                "Patroni's leader is %s%s", shown or "nobody", ", and it is paused" if listing.paused else ""
            )
        self._leader = leader
        primary = self._router.board.primary
        if primary is not None and primary.name == dropped and primary.observed_at < asked_at:
            self._router.board.forget(primary.name)

    async def _take_in(self, wanted: Mapping[str, Place]) -> None:
        for name, place in wanted.items():
            if place != (before := self._known.get(name)):
                what = "is new" if before is None else "has moved" if before.dsn != place.dsn else "stays"
                _log.info("%s %s%s", name, what, "" if place.takes_reads else ", and takes no reads")
                await self._router.add(name, place.dsn, takes_reads=place.takes_reads)
                self._known[name] = place

    async def _let_go(self, wanted: Mapping[str, Place], now: float) -> None:
        """Let go of what has been missing for long; the primary in office stays, whatever Patroni says."""
        self._missing_since = {
            name: self._missing_since.get(name, now) for name in self._known if name not in wanted
        }
        primary = self._router.board.primary
        for name, since in self._missing_since.items():
            if now - since > _GRACE_S and (primary is None or primary.name != name):
                _log.info("%s is gone", name)
                await self._router.remove(name)
                del self._known[name]
