"""A router follows Patroni: real servers, and a REST API that says what a test wants."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import time
from typing import TYPE_CHECKING, NamedTuple

import pytest
import pytest_asyncio

from rocket import Node, Router
from rocket.errors import InvalidSetting
from rocket.lab.app import DATABASE
from rocket.lab.shutdown import background
from rocket.topology.patroni import Listing, Member, Topology
from rocket.topology.patroni_rest import RestClient
from tests.support.pages import run_example
from tests.support.patroni import FakePatroni, hanging, listed
from tests.support.servers import dsns, until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from rocket.cluster.cluster import LocalCluster

LEASE_S = 5.0


class Following(NamedTuple):
    """A router that observes, and a topology that has not been asked yet."""

    topology: Topology
    router: Router
    vetoed: asyncio.Event
    """Set when Patroni keeps a node from becoming the primary."""


def template(cluster: LocalCluster) -> str:
    """Return the DSN of a member, with placeholders."""
    return f"postgresql://postgres@{{host}}:{{port}}/{DATABASE}?passfile={cluster.password_file}"


@contextlib.asynccontextmanager
async def opened(cluster: LocalCluster, url: str, grace_s: float = 60.0) -> AsyncIterator[Following]:
    """Open a router without nodes, for a topology at `url`."""
    async with RestClient([url]) as client:
        topology = Topology(client, template(cluster), grace_s=grace_s)
        vetoed = asyncio.Event()

        async def may_be_primary(name: str) -> bool:
            allowed = await topology.may_be_primary(name)
            if not allowed:
                vetoed.set()
            return allowed

        async with await Router.open({}, may_be_primary=may_be_primary, observer_interval_s=0.02) as router:
            yield Following(topology, router, vetoed)


@pytest_asyncio.fixture
async def patroni() -> FakePatroni:
    """What lists the members."""
    return FakePatroni()


@pytest_asyncio.fixture
async def url(patroni: FakePatroni) -> AsyncIterator[str]:
    """Its address."""
    async with patroni.serving() as url:
        yield url


@pytest_asyncio.fixture
async def following(cluster: LocalCluster, url: str) -> AsyncIterator[Following]:
    """A router and its topology."""
    async with opened(cluster, url) as following:
        yield following


def names(router: Router) -> set[str]:
    """Return the nodes that a router has."""
    return {pool.name for pool in router.pools}


def replicas(router: Router) -> set[str]:
    """Return the replicas that a router may read from."""
    return {status.name for status in router.board.replicas}


def has_primary(router: Router) -> bool:
    """Return whether a router knows a primary that it may use."""
    return router.board.current_primary(time.monotonic(), LEASE_S) is not None


async def update_until_the_primary_is_dropped(following: Following) -> None:
    """Update again and again: an answer says nothing about a primary that was observed after the question."""
    async with asyncio.timeout(10):
        while has_primary(following.router):
            await following.topology.update(following.router)


async def stays_without_primary(following: Following) -> bool:
    """Return whether the primary, once more observed as one, is kept out.

    An observation that was under way when it was dropped brings it back, until the next update.
    """
    following.vetoed.clear()
    async with asyncio.timeout(10):
        while not following.vetoed.is_set():
            await following.topology.update(following.router)
            await asyncio.sleep(0.01)
    return not await following.router.primary_answers()


async def test_members_that_come_are_read_from(
    cluster: LocalCluster, patroni: FakePatroni, following: Following
) -> None:
    """The router connects to them, and their statuses show what they are."""
    topology, router, _ = following
    patroni.members = listed(cluster, "primary", "replica0")
    patroni.members[0]["role"] = "leader"
    await topology.update(router)
    assert {"primary", "replica0"} == names(router)
    await until(lambda: has_primary(router) and replicas(router) == {"replica0"})

    patroni.members += listed(cluster, "replica1")
    await topology.update(router)

    await until(lambda: replicas(router) == {"replica0", "replica1"})


async def test_members_get_options(cluster: LocalCluster, patroni: FakePatroni, url: str) -> None:
    """Those that are found at the start, and those that come; each once, though no two passwords are equal."""
    given: list[str] = []

    def options(name: str, node: Node) -> Node:
        given.append(name)
        return dataclasses.replace(node, password=functools.partial(cluster.password), zone="here")

    patroni.members = listed(cluster, "primary", "replica0") + listed(cluster, "replica1", noloadbalance=True)
    patroni.members[0]["role"] = "leader"
    async with RestClient([url]) as client:
        dsn = template(cluster).partition("?")[0]
        topology = Topology(client, dsn, options=options)
        found = await topology.find()
        assert {"primary": 1.0, "replica0": 1.0, "replica1": 0.0} == {
            name: node.weight for name, node in found.items()
        }
        assert {"here"} == {node.zone for node in found.values()}
        async with await Router.open(found, observer_interval_s=0.02) as router:
            await topology.update(router)
            assert ["primary", "replica0", "replica1"] == given
            await until(lambda: has_primary(router) and replicas(router) == {"replica0"})
            patroni.members = listed(cluster, "primary", "replica0", "replica1")
            patroni.members[0]["role"] = "leader"
            await topology.update(router)
            await until(lambda: replicas(router) == {"replica0", "replica1"})
    assert ["primary", "replica0", "replica1", "replica1"] == given


async def test_a_member_that_takes_no_reads_is_not_read_from(
    cluster: LocalCluster, patroni: FakePatroni, following: Following
) -> None:
    """Its tag may come and go while it runs."""
    topology, router, _ = following
    patroni.members = listed(cluster, "primary", "replica0") + listed(cluster, "replica1", noloadbalance=True)
    patroni.members[0]["role"] = "leader"
    await topology.update(router)
    assert {"primary", "replica0", "replica1"} == names(router)
    await until(lambda: replicas(router) == {"replica0"})

    patroni.members = listed(cluster, "primary", "replica0", "replica1")
    await topology.update(router)

    await until(lambda: replicas(router) == {"replica0", "replica1"})


async def test_a_hint_makes_no_node_the_primary(
    cluster: LocalCluster, patroni: FakePatroni, following: Following
) -> None:
    """Whichever node Patroni calls the leader: the servers show what they are."""
    topology, router, _ = following
    patroni.members = listed(cluster, "primary", "replica0")
    patroni.members[1]["role"] = "leader"
    await topology.update(router)
    await until(lambda: replicas(router) == {"replica0"})

    assert await stays_without_primary(following)
    assert router.board.primary is None


async def test_no_node_becomes_the_primary_against_patronis_word(
    cluster: LocalCluster, patroni: FakePatroni, following: Following
) -> None:
    """A leader that was frozen, and thaws before its Patroni does, is not the leader any more."""
    topology, router, _ = following
    patroni.members = listed(cluster, "primary", "replica0")
    patroni.members[0]["role"] = "leader"
    await topology.update(router)
    await until(lambda: has_primary(router))

    patroni.members[0]["role"], patroni.members[1]["role"] = "replica", "leader"
    router.board.forget("primary")  # as if it had been out of reach
    assert await stays_without_primary(following)

    patroni.members[0]["role"], patroni.members[1]["role"] = "leader", "replica"
    await until(lambda: has_primary(router))
    assert await router.primary_answers()

    patroni.members = None
    router.board.forget("primary")
    await until(lambda: has_primary(router))  # no answer is no veto


async def test_a_primary_that_patroni_no_longer_names_is_dropped(
    cluster: LocalCluster, patroni: FakePatroni, following: Following
) -> None:
    """Its successor may not be there yet, but what it takes now would be lost."""
    topology, router, _ = following
    patroni.members = listed(cluster, "primary", "replica0")
    patroni.members[0]["role"] = "leader"
    await topology.update(router)
    await until(lambda: has_primary(router))
    assert await router.primary_answers()

    patroni.members[0]["role"] = "replica"  # its lock has expired
    await update_until_the_primary_is_dropped(following)

    assert await stays_without_primary(following)


class SlowClient:
    """Lists no leader, and answers only after the router has observed its primary once more."""

    def __init__(self, router: Router) -> None:
        self.router = router

    async def listing(self) -> Listing:
        """Wait for a status of the primary, and return no member."""
        asked_at = time.monotonic()
        await until(
            lambda: self.router.board.primary is not None and self.router.board.primary.observed_at > asked_at
        )
        return Listing(())

    async def newest_listings(self) -> list[Listing]:
        """Return the same at once."""
        return [Listing(())]


async def test_a_primary_observed_after_the_question_is_not_dropped_by_the_answer(
    cluster: LocalCluster, patroni: FakePatroni, following: Following
) -> None:
    """It may have become the primary meanwhile, with Patroni's consent; the next answer decides."""
    topology, router, _ = following
    patroni.members = listed(cluster, "primary", "replica0")
    patroni.members[0]["role"] = "leader"
    await topology.update(router)
    await until(lambda: has_primary(router))

    await Topology(SlowClient(router), template(cluster)).update(router)

    assert has_primary(router)


async def test_an_outdated_answer_is_no_veto(
    cluster: LocalCluster, patroni: FakePatroni, url: str, following: Following
) -> None:
    """A member that is cut off from its store repeats for a while what it knew before: others know better."""
    topology, router, _ = following
    patroni.members = listed(cluster, "primary", "replica0", timeline=1)
    patroni.members[1]["role"] = "leader"
    newer = FakePatroni()
    newer.members = listed(cluster, "primary", "replica0", timeline=2)
    newer.members[0]["role"] = "leader"
    async with newer.serving() as newer_url:
        patroni.members[0]["api_url"] = f"{newer_url}/patroni"
        await topology.update(router)
        await until(lambda: has_primary(router))
        async with RestClient([url]) as client:  # which has heard the outdated answer alone
            outdated = Topology(client, template(cluster))
            await outdated.find()
            await outdated.update(router)
        assert await router.primary_answers()

        newer.members[0]["role"], newer.members[1]["role"] = "replica", "leader"
        await update_until_the_primary_is_dropped(following)
        assert await stays_without_primary(following)


async def test_while_patroni_is_paused_a_primary_may_do_without_a_leader(
    cluster: LocalCluster, patroni: FakePatroni, url: str
) -> None:
    """In maintenance mode a Patroni may be stopped: there is no failover, and its Postgres goes on."""
    async with opened(cluster, url, grace_s=0.0) as following:
        topology, router, _ = following
        patroni.members = listed(cluster, "primary", "replica0", "replica1")
        patroni.members[0]["role"] = "leader"
        await topology.update(router)
        await until(lambda: has_primary(router))

        patroni.paused, patroni.members = True, listed(cluster, "replica0")
        await topology.update(router)
        assert {"primary", "replica0", "replica1"} == names(router)
        assert await router.primary_answers()

        router.board.forget("primary")  # out of reach for a moment
        await topology.update(router)
        await until(lambda: has_primary(router))
        assert await router.primary_answers()

        patroni.members[0]["role"] = "leader"  # it has been promoted by hand
        await update_until_the_primary_is_dropped(following)
        assert await stays_without_primary(following)


async def test_without_an_answer_nothing_changes(
    cluster: LocalCluster, patroni: FakePatroni, following: Following
) -> None:
    """Without its store Patroni cannot say anything; the nodes are there all the same."""
    topology, router, _ = following
    patroni.members = listed(cluster, "primary", "replica0")
    await topology.update(router)
    patroni.members = None
    await topology.update(router)

    assert {"primary", "replica0"} == names(router)


async def test_a_member_that_is_missing_is_removed_only_after_a_while(
    cluster: LocalCluster, patroni: FakePatroni, url: str, following: Following
) -> None:
    """When a store comes back, its members appear one by one; and the current primary stays in any case."""
    topology, router, _ = following
    patroni.members = listed(cluster, "primary", "replica0", "replica1")
    patroni.members[0]["role"] = "leader"
    await topology.update(router)
    await until(lambda: has_primary(router))
    async with RestClient([url]) as client:
        impatient = Topology(client, template(cluster), grace_s=0.0)
        await impatient.find()

        patroni.members = listed(cluster, "replica0")
        await topology.update(router)
        assert {"primary", "replica0", "replica1"} == names(router)

        await impatient.update(router)
        assert {"primary", "replica0"} == names(router)

        patroni.members = listed(cluster, "primary", "replica0", "replica1")
        await impatient.update(router)
        assert {"primary", "replica0", "replica1"} == names(router)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"members": []' + " " * 2**20 + "}"], ids=["deep", "long"])
async def test_an_answer_that_is_not_patronis_counts_as_none(
    cluster: LocalCluster, patroni: FakePatroni, following: Following, text: str
) -> None:
    """Nodes stay, and none is kept from being the primary."""
    topology, router, _ = following
    patroni.members = listed(cluster, "primary", "replica0")
    await topology.update(router)
    patroni.text = text
    await topology.update(router)

    assert {"primary", "replica0"} == names(router)
    assert await topology.may_be_primary("primary")


class FailingClient:
    """Fails twice, and then lists one member."""

    def __init__(self, member: Member) -> None:
        self.failures = [ZeroDivisionError("one"), ZeroDivisionError("one")]
        self.answer = Listing((member,))

    async def listing(self) -> Listing:
        """Raise what is left to raise, and then return the answer."""
        if self.failures:
            raise self.failures.pop()
        return self.answer

    async def newest_listings(self) -> list[Listing]:
        """Return the same."""
        return [await self.listing()]


async def test_an_update_that_fails_ends_nothing(
    cluster: LocalCluster, following: Following, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever it fails of is logged, once, and the next one goes on."""
    client = FailingClient(Member("primary", "leader", "running", "127.0.0.1", cluster.primary.port, ""))
    topology = Topology(client, template(cluster), poll_s=0.001, min_pause_s=0.0)
    async with background(topology.follow(following.router), "topology"):
        await until(lambda: {"primary"} == names(following.router))

    assert 1 == sum("one" in record.getMessage() for record in caplog.records)


async def test_a_lost_node_has_patroni_asked_at_once(
    cluster: LocalCluster, patroni: FakePatroni, url: str, following: Following
) -> None:
    """However long it would be until the next time."""
    router = following.router
    patroni.members = listed(cluster, "primary", "replica0")
    async with RestClient([url]) as client:
        topology = Topology(client, template(cluster), poll_s=600.0, min_pause_s=0.0)
        async with background(topology.follow(router), "topology"):
            await until(lambda: replicas(router) == {"replica0"})
            patroni.members += listed(cluster, "replica1")
            router.board.forget("replica0")
            await until(lambda: replicas(router) == {"replica0", "replica1"})


async def test_a_member_that_cannot_be_used_is_named_once(
    cluster: LocalCluster, patroni: FakePatroni, following: Following, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing else says why it is not read from; its name cannot send escape sequences to the terminal."""
    topology, router, _ = following
    patroni.members = [*listed(cluster, "replica0"), listed(cluster, "replica1")[0] | {"name": "pg\x1bnode"}]
    await topology.update(router)
    await topology.update(router)

    assert {"replica0"} == names(router)
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert 1 == len([line for line in warnings if r"'pg\x1bnode'" in line])


async def test_members_that_hang_keep_no_primary_out(cluster: LocalCluster) -> None:
    """Their silence is no veto, and ends before the observer gives the node up."""
    with hanging(4) as urls:
        async with RestClient(urls) as client:
            topology = Topology(client, template(cluster))
            async with await Router.open(dsns(cluster), may_be_primary=topology.may_be_primary) as router:
                assert has_primary(router)


# --- at the start ---


async def found(url: str) -> set[str]:
    """Return the names of the nodes with which a router would be opened."""
    async with RestClient([url]) as client:
        return set(await Topology(client, "postgresql://postgres@{host}:{port}/app").find())


async def test_a_start_that_waiting_cannot_help_is_refused(
    patroni: FakePatroni, url: str, cluster: LocalCluster
) -> None:
    """In a line that says why."""
    with pytest.raises(InvalidSetting, match="lists no member"):
        await found(url)

    patroni.members = listed(cluster, "primary", "replica0")
    patroni.members[0] |= {"role": "leader", "name": "pg node"}
    with pytest.raises(InvalidSetting, match=r"'pg node'.*A-Z"):
        await found(url)

    patroni.members = listed(cluster, "primary", "replica0")
    assert {"primary", "replica0"} == await found(url)

    patroni.text = "<html>"
    with pytest.raises(InvalidSetting, match=r"no answer of Patroni's|Expecting value"):
        await found(url)


async def test_a_start_while_patroni_does_not_answer_waits_for_it(patroni: FakePatroni, url: str) -> None:
    """It may be the store that is down: a service that is restarted meanwhile needs no second restart."""
    patroni.members = None
    assert set() == await found(url)
    with hanging(1) as urls:
        assert set() == await found(*urls)


async def test_a_template_without_placeholders_is_refused() -> None:
    """Every member would be the same server."""
    async with RestClient(["http://127.0.0.1:9"]) as client:
        with pytest.raises(ValueError, match="dsn_template must be a DSN"):
            Topology(client, "postgresql://app@db1/app")


async def test_the_page_shows_how_a_service_follows_patroni(
    cluster: LocalCluster, patroni: FakePatroni, url: str
) -> None:
    """Its lines work as they are printed, but for the addresses."""
    patroni.members = listed(cluster, "primary", "replica0")
    patroni.members[0]["role"] = "leader"
    served: list[str] = []

    async def serve(router: Router) -> None:
        session = router.session("ann")
        await session.write(lambda db: db.execute("SELECT 1"))
        patroni.members = [*listed(cluster, "primary", "replica0", "replica1")]
        patroni.members[0]["role"] = "leader"
        await until(lambda: replicas(router) == {"replica0", "replica1"})
        served.append(str(await session.read(lambda db: db.fetchval("SELECT 2"))))

    addresses = {
        '"http://10.0.0.1:8008", "http://10.0.0.2:8008"': repr(url),
        "postgresql://app@{host}:{port}/app?passfile=/etc/app.pgpass": template(cluster),
    }
    await run_example("patroni.md", "Topology", addresses, serve=serve)
    assert ["2"] == served
