"""A router's nodes as Patroni lists them: read, and followed while the router is open.

Patroni's answers are hints. The servers themselves show which node is the primary and which replica is fit for a
read, so an answer that is wrong, late or missing costs time, and never makes a read stale.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import re
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit

from rocket.dsn import NODE_NAME, NODE_NAME_RULE, Node, as_listed, parse_dsn
from rocket.errors import InvalidSetting, RocketError, describe

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from rocket import Router

_log = logging.getLogger("rocket.patroni")


class PatroniUnavailable(RocketError):
    """No member's REST API answered in time, or one refused a request."""


class NotPatroni(PatroniUnavailable):
    """Something answers at each address, and it is not Patroni's REST API."""


# --- addresses ---

_HOST, _PORT = "{host}", "{port}"
"""Placeholders, in the template of a DSN, for where a member's Postgres is."""


def parse_urls(text: str) -> tuple[str, ...]:
    """Return the addresses of REST APIs that are separated by commas; raise `ValueError`."""
    urls = tuple(base_url(one.strip()) for one in text.split(","))
    if not all(urls):
        raise ValueError("must be the address of a member's REST API, like http://10.0.0.1:8008, or several")
    return urls


def parse_template(text: str) -> str:
    """Return a DSN that holds `{host}` and `{port}` in place of a member's; raise `ValueError`."""
    if text.count(_HOST) != 1 or text.count(_PORT) != 1:
        raise ValueError("must be a DSN with {host} and {port} in it, like postgresql://rocket@{host}:{port}/app")
    parse_dsn(fill_in(text, "localhost", 5432))
    return text


def fill_in(template: str, host: str, port: int) -> str:
    """Return the DSN of a member."""
    return template.replace(_HOST, f"[{host}]" if ":" in host else host).replace(_PORT, str(port))


def base_url(text: str) -> str:
    """Return scheme, host and port of an address by HTTP; "" if it is not one."""
    try:
        parts = urlsplit(text)
        usable = parts.scheme in {"http", "https"} and parts.hostname and parts.port != 0
    except ValueError:
        return ""
    return f"{parts.scheme}://{parts.netloc}" if usable else ""


# --- the answer to GET /cluster ---

_HOST_NAME = re.compile(r"[A-Za-z0-9_.:%-]{1,255}")
"""A host, with nothing in it that would end the host's part of a DSN."""
_LEADER_ROLES = {"leader", "master", "standby_leader"}
"""`master` was Patroni's word until version 3."""
_LARGEST_PORT = 65535
_POSTGRES_PORT = 5432


@dataclass(frozen=True, slots=True)
class Member:
    """One member, as Patroni lists it."""

    name: str
    role: str
    """`leader`, `standby_leader`, `sync_standby`, `quorum_standby` or `replica`."""
    state: str
    """`running`, `streaming`, `starting`, `stopped`, `creating replica`, and more."""
    host: str
    port: int
    """Of its Postgres."""
    api_url: str
    timeline: int | None = None
    lag_bytes: int | None = None
    """As Patroni measures it: WAL that the member has not received."""
    takes_reads: bool = True
    """Whether it lacks the tag `noloadbalance`."""

    @property
    def is_leader(self) -> bool:
        """Whether Patroni lists it as the leader."""
        return self.role in _LEADER_ROLES


@dataclass(frozen=True, slots=True)
class Listing:
    """Patroni's members at one moment, as one of them knows."""

    members: tuple[Member, ...]
    """Those with an address, and with a name that a session token can hold."""
    leader: str | None = None
    """The leader's name, also of one that is not among `members`."""
    unusable: tuple[str, ...] = ()
    """Names that a token cannot hold: these members are not used."""
    paused: bool = False
    """Whether Patroni is in maintenance mode (`patronictl pause`), in which a primary may lack the leader lock."""

    @property
    def timeline(self) -> int:
        """The newest timeline in it; of two listings, the one with the older is outdated."""
        return max((member.timeline or 0 for member in self.members), default=0)

    def allows_primary(self, name: str) -> bool:
        """Return whether this member is the leader, or may be the primary because there is none in a pause."""
        return self.leader == name or (self.paused and self.leader is None)


def parse_cluster(text: str | bytes) -> Listing:
    """Return what `GET /cluster` answered; raise `ValueError` if Patroni did not write it.

    Details that it leaves out stay unknown.
    """
    try:
        answer = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(answer, dict) or not isinstance(answer.get("members"), list):
        raise ValueError("it is no answer of Patroni's /cluster")  # noqa: TRY004 - wrong text, not a wrong type
    named = [one for one in answer["members"] if isinstance(one, dict) and isinstance(one.get("name"), str)]
    return Listing(
        tuple(_member(one) for one in named if _is_usable(one)),
        leader=next((one["name"] for one in named if one.get("role") in _LEADER_ROLES), None),
        unusable=tuple(one["name"] for one in named if not NODE_NAME.fullmatch(one["name"])),
        paused=answer.get("pause") is True,
    )


def _is_usable(one: dict[str, Any]) -> bool:
    """Return whether a member can be connected to: while its data is being cloned it may have no address."""
    return (
        NODE_NAME.fullmatch(one["name"]) is not None
        and isinstance(one.get("host"), str)
        and _HOST_NAME.fullmatch(one["host"]) is not None
        and _whole_number(one.get("port", _POSTGRES_PORT)) in range(1, _LARGEST_PORT + 1)
    )


def _member(one: dict[str, Any]) -> Member:
    tags = one.get("tags")
    return Member(
        name=one["name"],
        role=str(one.get("role", "")),
        state=str(one.get("state", "")),
        host=one["host"],
        port=one.get("port", _POSTGRES_PORT),
        api_url=str(one.get("api_url", "")),
        timeline=_whole_number(one.get("timeline")),
        lag_bytes=_whole_number(one.get("lag")),  # "unknown", where Patroni does not know
        takes_reads=not (isinstance(tags, dict) and tags.get("noloadbalance")),
    )


def _whole_number(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


# --- following ---


class Client(Protocol):
    """Asks Patroni; `rocket.topology.patroni_rest.RestClient` does by its REST API."""

    async def listing(self) -> Listing:
        """Return the first member's answer; raise `PatroniUnavailable` if none comes in time."""

    async def newest_listings(self) -> Iterable[Listing]:
        """Ask every member; return the answers that know the newest timeline. Raise `PatroniUnavailable`."""


class Topology:
    """Keeps a router's nodes in line with Patroni's members, and vetoes a primary that Patroni does not name.

    `dsn_template` is the DSN of a member's database with `{host}` and `{port}` in it (else `ValueError`).
    `nodes` is what `find` has returned elsewhere, in a parent process for example. `options` is called with each
    member's name and node, when that is found or has changed, and returns the node that the router gets: with a
    password, a zone and so on. `follow` asks every `poll_s` seconds, and at once when a node is lost, but at least
    `min_pause_s` after the answer before. A member that has been missing for `grace_s` seconds is removed: when a
    store comes back, its members appear one by one.
    """

    def __init__(
        self,
        client: Client,
        dsn_template: str,
        nodes: Mapping[str, str | Node] | None = None,
        *,
        options: Callable[[str, Node], Node] = as_listed,
        poll_s: float = 1.0,
        min_pause_s: float = 0.2,
        grace_s: float = 60.0,
    ) -> None:
        try:
            self._template = parse_template(dsn_template)
        except ValueError as error:
            raise ValueError(f"dsn_template {error}") from None
        self._client = client
        self._poll_s = poll_s
        self._min_pause_s = min_pause_s
        self._grace_s = grace_s
        self._options = options
        self._known = {name: Node(Node.of(node).dsn) for name, node in (nodes or {}).items()}
        """The nodes as they were listed, without `options`, which need not give equal ones twice."""
        self._missing_since: dict[str, float] = {}
        self._leader: str | None = None
        self._unavailable = nodes is not None and not nodes
        """Whether Patroni did not answer when it was last asked, which was logged then."""
        self._unusable: set[str] = set()
        """The members whose names were reported as unusable."""
        self._node_lost = asyncio.Event()

    async def find(self) -> dict[str, Node]:
        """Return the members by name, with their options; none, with a warning, while Patroni does not answer.

        Raise `InvalidSetting` if waiting cannot help: Patroni is not at any address, no member has an address, or
        a token cannot hold the leader's name.
        """
        try:
            listing = await self._client.listing()
        except NotPatroni as error:
            raise InvalidSetting(str(error)) from None
        except PatroniUnavailable as error:
            _log.warning("%s: there is no node until it does", error)
            self._unavailable = True
            return {}
        if listing.leader in listing.unusable:
            raise InvalidSetting(f"Patroni's leader is {listing.leader!r}: its name has to be {NODE_NAME_RULE}")
        if not listing.members:
            raise InvalidSetting("Patroni lists no member that has an address")
        self._known = self._nodes_in(listing)
        return {name: self._options(name, node) for name, node in self._known.items()}

    async def may_be_primary(self, name: str) -> bool:
        """Return False if Patroni names another primary, or none; True while it does not answer.

        An old leader that was frozen, and thaws before its Patroni does, still reports that it is the primary.
        """
        try:
            listing = await self._client.listing()
            return listing.allows_primary(name) or await self._newest_allow_primary(name)
        except PatroniUnavailable:
            return True

    async def follow(self, router: Router) -> None:
        """Update a router again and again, until cancelled; an update that fails is logged, and ends nothing."""

        def note_loss(_name: str) -> None:
            self._node_lost.set()

        router.board.on_gone.append(note_loss)
        failure = ""
        try:
            while True:
                try:
                    await self.update(router)
                except Exception as error:  # noqa: BLE001 - logged with its traceback
                    if failure != repr(error):  # once, not at every update
                        failure = repr(error)
                        _log.exception("the nodes stay as they are: %s", describe(error))
                else:
                    failure = ""
                await asyncio.sleep(self._min_pause_s)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._poll_s):
                        await self._node_lost.wait()
        finally:
            router.board.on_gone.remove(note_loss)

    async def update(self, router: Router) -> None:
        """Ask Patroni once, and apply its answer to a router; without an answer nothing changes."""
        self._node_lost.clear()
        asked_at = time.monotonic()
        try:
            listing = await self._client.listing()
            vetoed = await self._vetoed_primary(router, listing)
        except PatroniUnavailable as error:
            if not self._unavailable:
                _log.warning("%s: the nodes stay as they are", error)
            self._unavailable = True
            return
        if self._unavailable:
            _log.info("Patroni answers again")
            self._unavailable = False
        for name in set(listing.unusable) - self._unusable:
            _log.warning("%r is not used: a member's name has to be %s", name, NODE_NAME_RULE)
            self._unusable.add(name)
        self._report_leader(listing)
        primary = router.board.primary
        if primary is not None and primary.name == vetoed and primary.observed_at < asked_at:
            router.board.forget(primary.name)  # what it acknowledged now would be lost
        wanted = self._nodes_in(listing)
        await self._add(router, wanted)
        if not listing.paused:  # in a pause, a member that is not listed may run without its Patroni
            await self._remove(router, wanted, time.monotonic())

    def _nodes_in(self, listing: Listing) -> dict[str, Node]:
        return {
            member.name: Node(
                fill_in(self._template, member.host, member.port), weight=1.0 if member.takes_reads else 0.0
            )
            for member in listing.members
        }

    async def _newest_allow_primary(self, name: str) -> bool:
        """Return whether a veto is outdated: it may come from a member that is cut off, so every one is asked."""
        return all(listing.allows_primary(name) for listing in await self._client.newest_listings())

    async def _vetoed_primary(self, router: Router, listing: Listing) -> str | None:
        """Return the primary's name if Patroni names another primary, or none."""
        primary = router.board.primary
        if (
            primary is None
            or listing.allows_primary(primary.name)
            or await self._newest_allow_primary(primary.name)
        ):
            return None
        return primary.name

    def _report_leader(self, listing: Listing) -> None:
        if (leader := listing.leader) == self._leader:
            return
        self._leader = leader
        paused = ", and it is paused" if listing.paused else ""
        if leader is None:
            _log.info("Patroni has no leader%s", paused)
        else:
            _log.info("Patroni's leader is %s%s", repr(leader) if leader in listing.unusable else leader, paused)

    async def _add(self, router: Router, wanted: Mapping[str, Node]) -> None:
        """Add the members that are new, and those whose address or tag has changed."""
        for name, node in wanted.items():
            if node != (before := self._known.get(name)):
                change = "is new" if before is None else "has moved" if before.dsn != node.dsn else "stays"
                _log.info("%s %s%s", name, change, "" if node.weight else ", and takes no reads")
                await router.add(name, self._options(name, node))
                self._known[name] = node

    async def _remove(self, router: Router, wanted: Mapping[str, Node], now: float) -> None:
        """Remove the nodes that have been missing for long, but never the current primary."""
        self._missing_since = {
            name: self._missing_since.get(name, now) for name in self._known if name not in wanted
        }
        primary = router.board.primary
        for name, since in self._missing_since.items():
            if now - since >= self._grace_s and (primary is None or primary.name != name):
                _log.info("%s is gone", name)
                await router.remove(name)
                del self._known[name]
