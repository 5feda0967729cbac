"""The router goes along with what Patroni says: real servers, and a REST API that says what a test wants."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import time
from typing import TYPE_CHECKING

import aiohttp
import pytest
import pytest_asyncio
from aiohttp import web
from aiohttp.test_utils import TestServer

from rocket import Policy, Router
from rocket.errors import InvalidSetting
from rocket.lab import app
from rocket.lab.api.users import UserFloors
from rocket.lab.app import DATABASE
from rocket.lab.settings import Settings
from rocket.lab.shutdown import Shutdown, ShutdownStack, background
from rocket.routing.observer import Observer
from rocket.topology import patroni
from rocket.topology.patroni import Topology
from rocket.topology.patroni_rest import PatroniSilent, RestClient
from tests.support.servers import dsns

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Mapping

    from rocket.cluster.cluster import LocalCluster
    from rocket.consistency import Board

ANSWER_S = 1.0
"""How long Patroni may take to answer."""


class Rest:
    """A REST API that lists what it is told to; None: it is broken."""

    def __init__(self) -> None:
        self.members: list[dict[str, object]] | None = []
        self.paused = False
        self.text: str | None = None
        """What is said in place of that."""

    async def cluster(self, _request: web.Request) -> web.Response:
        """Answer `GET /cluster`."""
        if self.members is None:
            return web.Response(status=503, text="no store")
        if self.text is not None:
            return web.Response(text=self.text, content_type="application/json")
        return web.json_response({"members": self.members} | ({"pause": True} if self.paused else {}))


@pytest_asyncio.fixture
async def rest() -> Rest:
    """What says where the members are."""
    return Rest()


@pytest_asyncio.fixture
async def url(rest: Rest) -> AsyncIterator[str]:
    """Where it does."""
    app = web.Application()
    app.router.add_get("/cluster", rest.cluster)
    async with TestServer(app) as server:
        yield str(server.make_url("")).rstrip("/")


def listed(cluster: LocalCluster, *names: str, timeline: int = 1, **tags: object) -> list[dict[str, object]]:
    """Return nodes of a cluster as members."""
    same: dict[str, object] = {"host": "127.0.0.1", "role": "replica", "timeline": timeline, "tags": tags}
    return [same | {"name": name, "port": cluster.node(name).port} for name in names]


class Veto:
    """Accepts every primary, until it has a topology to ask."""

    topology: Topology | None = None

    async def __call__(self, name: str) -> bool:
        """Return whether a node may be the primary."""
        return self.topology is None or await self.topology.may_be_primary(name)


@pytest.fixture
def veto() -> Veto:
    """The veto of the observer of `followed`."""
    return Veto()


@pytest_asyncio.fixture
async def followed(
    cluster: LocalCluster, board: Board, url: str, veto: Veto
) -> AsyncIterator[tuple[Topology, Router, Observer]]:
    """A topology, not yet looked at, with a router and an observer that know no node."""
    template = f"postgresql://postgres@{{host}}:{{port}}/{DATABASE}?passfile={cluster.password_file}"
    observer = Observer({}, board, interval_s=0.05, may_be_primary=veto)  # which asks when the test says so
    async with contextlib.AsyncExitStack() as stack:
        stack.callback(observer.close)
        router = await stack.enter_async_context(
            await Router.open({}, UserFloors(), policy=Policy(), observer=observer)
        )
        following = await stack.enter_async_context(Topology([url], template, {}))
        following.attend(router)
        yield following, router, observer


Followed = tuple[Topology, Router, Observer]


def names(router: Router) -> set[str]:
    """Return the nodes that a router has."""
    return {pool.name for pool in router.pools}


async def test_members_that_come_are_read_from(cluster: LocalCluster, rest: Rest, followed: Followed) -> None:
    """They get a pool, and their statuses tell what they are."""
    following, router, observer = followed
    rest.members = listed(cluster, "primary", "replica0")
    await following.look()
    await observer.run_once()
    assert {"primary", "replica0"} == names(router)

    rest.members += listed(cluster, "replica1")
    await following.look()
    await observer.run_once()

    assert {"replica0", "replica1"} == {status.name for status in router.board.replicas}


async def test_a_member_that_takes_no_reads_is_not_read_from(
    cluster: LocalCluster, rest: Rest, followed: Followed
) -> None:
    """Its tag may come and go while it runs."""
    following, router, observer = followed
    rest.members = listed(cluster, "primary", "replica0") + listed(cluster, "replica1", noloadbalance=True)
    await following.look()
    await observer.run_once()
    assert {"replica0"} == {status.name for status in router.board.replicas}

    rest.members = listed(cluster, "primary", "replica0", "replica1")
    await following.look()
    await observer.run_once()

    assert {"replica0", "replica1"} == {status.name for status in router.board.replicas}


async def test_a_hint_makes_nobody_the_primary(cluster: LocalCluster, rest: Rest, followed: Followed) -> None:
    """Patroni may call leader whom it likes: the servers say what they are."""
    following, router, observer = followed
    rest.members = listed(cluster, "primary", "replica0")
    rest.members[1]["role"] = "leader"
    await following.look()
    await observer.run_once()

    assert router.board.primary is not None
    assert "replica0" != router.board.primary.name


async def test_nobody_comes_into_office_against_patronis_word(
    cluster: LocalCluster, rest: Rest, followed: Followed, veto: Veto
) -> None:
    """A leader that was halted, and goes on before its Patroni does, is not the leader any more."""
    following, router, observer = followed
    veto.topology = following
    rest.members = listed(cluster, "primary", "replica0")
    rest.members[1]["role"] = "leader"
    await following.look()
    router.board.forget("primary")  # as if it had been out of reach
    await observer.run_once()
    assert not await router.primary_answers()

    rest.members[0]["role"], rest.members[1]["role"] = "leader", "replica"
    await observer.run_once()
    assert await router.primary_answers()

    rest.members = None
    router.board.forget("primary")
    await observer.run_once()
    assert await router.primary_answers()  # silence is no word


async def test_a_primary_that_patroni_dropped_leaves_its_office(
    cluster: LocalCluster, rest: Rest, followed: Followed, veto: Veto
) -> None:
    """Its successor may not be there yet, but what it takes now would be lost."""
    following, router, observer = followed
    veto.topology = following
    rest.members = listed(cluster, "primary", "replica0")
    rest.members[0]["role"] = "leader"
    await following.look()
    await observer.run_once()
    assert await router.primary_answers()

    rest.members[0]["role"] = "replica"  # its lock has expired
    await following.look()

    assert not await router.primary_answers()


async def test_an_outdated_answer_is_no_veto(
    cluster: LocalCluster, rest: Rest, followed: Followed, veto: Veto
) -> None:
    """A member that is cut off from its store says for a while what was there before: others know better."""
    following, router, observer = followed
    veto.topology = following
    rest.members = listed(cluster, "primary", "replica0", timeline=1)
    rest.members[1]["role"] = "leader"
    newer = Rest()
    newer.members = listed(cluster, "primary", "replica0", timeline=2)
    newer.members[0]["role"] = "leader"
    app = web.Application()
    app.router.add_get("/cluster", newer.cluster)
    async with TestServer(app) as server:
        rest.members[0]["api_url"] = str(server.make_url("/patroni"))
        await following.look()
        router.board.forget("primary")
        await observer.run_once()
        assert await router.primary_answers()
        await following.look()
        assert await router.primary_answers()

        newer.members[0]["role"], newer.members[1]["role"] = "replica", "leader"
        await following.look()
        assert not await router.primary_answers()


async def test_while_patroni_is_paused_a_primary_may_do_without_a_leader(
    cluster: LocalCluster, rest: Rest, followed: Followed, veto: Veto, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In maintenance mode its Patroni may be stopped: nobody takes over, and Postgres goes on."""
    following, router, observer = followed
    veto.topology = following
    monkeypatch.setattr(patroni, "_GRACE_S", -1.0)
    rest.members = listed(cluster, "primary", "replica0")
    rest.members[0]["role"] = "leader"
    await following.look()
    await observer.run_once()

    rest.paused, rest.members = True, listed(cluster, "replica0")
    await following.look()
    assert await router.primary_answers()

    router.board.forget("primary")  # out of reach for a moment
    await following.look()
    await observer.run_once()
    assert await router.primary_answers()

    rest.members[0]["role"] = "leader"  # somebody has been promoted by hand
    await following.look()
    assert not await router.primary_answers()
    await observer.run_once()
    assert not await router.primary_answers()


async def test_silence_changes_nothing(cluster: LocalCluster, rest: Rest, followed: Followed) -> None:
    """Without its store Patroni cannot say anything; the nodes are there all the same."""
    following, router, _ = followed
    rest.members = listed(cluster, "primary", "replica0")
    await following.look()
    rest.members = None
    await following.look()

    assert {"primary", "replica0"} == names(router)


async def test_a_member_that_is_missing_is_let_go_only_after_a_while(
    cluster: LocalCluster, rest: Rest, followed: Followed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When a store comes back, its members do so one by one; and the primary in office stays in any case."""
    following, router, observer = followed
    rest.members = listed(cluster, "primary", "replica0", "replica1")
    await following.look()
    await observer.run_once()
    rest.members = listed(cluster, "replica0")
    await following.look()
    assert {"primary", "replica0", "replica1"} == names(router)

    monkeypatch.setattr(patroni, "_GRACE_S", -1.0)
    await following.look()
    assert {"primary", "replica0"} == names(router)

    rest.members = listed(cluster, "primary", "replica0", "replica1")
    await following.look()
    assert {"primary", "replica0", "replica1"} == names(router)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"members": []' + " " * 2**20 + "}"], ids=["deep", "long"])
async def test_what_is_no_cluster_is_as_good_as_silence(
    cluster: LocalCluster, rest: Rest, followed: Followed, text: str
) -> None:
    """Whatever answers there: nodes stay, and nobody is kept from leading."""
    following, router, _ = followed
    rest.members = listed(cluster, "primary", "replica0")
    await following.look()
    rest.text = text
    await following.look()

    assert {"primary", "replica0"} == names(router)
    assert await following.may_be_primary("primary")


async def test_a_look_that_fails_ends_nothing(
    cluster: LocalCluster,
    rest: Rest,
    followed: Followed,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Whatever it fails of is logged, once, and the next one goes on."""
    following, router, _ = followed
    looks = iter([ZeroDivisionError("one"), ZeroDivisionError("one"), None])
    took_in = asyncio.Event()

    async def look_or_fail() -> None:
        if (failure := next(looks, None)) is not None:
            raise failure
        await Topology.look(following)
        took_in.set()

    monkeypatch.setattr(patroni, "_POLL_S", 0.001)
    monkeypatch.setattr(patroni, "_BREATH_S", 0.0)
    monkeypatch.setattr(following, "look", look_or_fail)
    rest.members = listed(cluster, "primary")
    async with background(following.run(), "topology"), asyncio.timeout(5):
        await took_in.wait()

    assert {"primary"} == names(router)
    assert 1 == sum("one" in record.getMessage() for record in caplog.records)


async def test_a_member_that_cannot_be_used_is_named_once(
    cluster: LocalCluster, rest: Rest, followed: Followed, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing else tells why it is not read from; its name does not steer the terminal."""
    following, router, _ = followed
    rest.members = [*listed(cluster, "replica0"), listed(cluster, "replica1")[0] | {"name": "pg\x1bnode"}]
    await following.look()
    await following.look()

    assert {"replica0"} == names(router)
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert 1 == len([line for line in warnings if r"'pg\x1bnode'" in line])


async def start(url: str) -> Mapping[str, str]:
    """Return the nodes with which `run-all --patroni` would start."""
    settings = Settings(patroni=(url,), patroni_dsn="postgresql://postgres@{host}:{port}/app")
    return await app.nodes_of(settings) or {}


async def test_a_start_that_cannot_lead_anywhere_is_refused(rest: Rest, url: str, cluster: LocalCluster) -> None:
    """In a line that says why."""
    with pytest.raises(InvalidSetting, match="lists no member"):
        await start(url)

    rest.members = listed(cluster, "primary", "replica0")
    rest.members[0] |= {"role": "leader", "name": "pg node"}
    with pytest.raises(InvalidSetting, match=r"'pg node'.*A-Z"):
        await start(url)

    rest.members = listed(cluster, "primary", "replica0")
    assert {"primary", "replica0"} == set(await start(url))

    rest.text = "<html>"
    with pytest.raises(InvalidSetting, match=r"no answer of Patroni's|Expecting value"):
        await start(url)


async def test_a_start_while_patroni_is_silent_waits_for_its_word(rest: Rest, url: str) -> None:
    """It may be the store that is down: whoever restarts the API meanwhile need not do it again."""
    rest.members = None
    assert {} == await start(url)
    with hanging(1) as urls:
        assert {} == await start(*urls)


async def test_an_api_that_starts_while_patroni_is_silent_serves_as_soon_as_it_speaks(
    cluster: LocalCluster, rest: Rest, url: str
) -> None:
    """Until then it says that it is not ready."""
    rest.members = None
    task = asyncio.current_task()
    assert task is not None
    template = f"postgresql://postgres@{{host}}:{{port}}/{DATABASE}?passfile={cluster.password_file}"
    settings = Settings(api_port=0, patroni=(url,), patroni_dsn=template)
    ending = Shutdown(task)
    async with ShutdownStack(ending) as stack:
        api = await app.attached(settings, ending, stack)
        http = await stack.enter_async_context(aiohttp.ClientSession(api))
        assert 503 == (await http.get("/readyz")).status
        assert 200 == (await http.get("/inspector")).status

        rest.members = listed(cluster, "primary", "replica0")
        rest.members[0]["role"] = "leader"
        async with asyncio.timeout(10):
            while (await http.get("/readyz")).status != 200:
                await asyncio.sleep(0.05)
            while "replica0" not in await (await http.get("/replicas")).text():
                await asyncio.sleep(0.05)
        async with http.get("/inspector/events") as events:
            *_, hello = [await events.content.readline() for _ in range(3)]
            assert ["primary", "replica0"] == json.loads(hello.removeprefix(b"data: "))["nodes"]


async def test_whoever_answers_is_asked(cluster: LocalCluster, rest: Rest, url: str) -> None:
    """One member is enough, and those that it names are asked where it is gone."""
    rest.members = listed(cluster, "replica0")
    rest.members[0]["api_url"] = f"{url}/patroni"
    nowhere = "http://127.0.0.1:9"
    async with RestClient([nowhere, url]) as client:
        assert ["replica0"] == [member.name for member in (await client.listing()).members]
    async with RestClient([nowhere]) as client:
        with pytest.raises(PatroniSilent, match=nowhere):
            await client.listing()


@contextlib.contextmanager
def hanging(number: int) -> Iterator[list[str]]:
    """Give addresses at which connections are taken, and nothing is ever answered."""
    with contextlib.ExitStack() as stack:
        listening = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(number)]
        yield [f"http://127.0.0.1:{one.getsockname()[1]}" for one in listening]


async def test_members_that_hang_hold_nobody_up(cluster: LocalCluster, rest: Rest, url: str) -> None:
    """However many there are: one that answers is heard long before they are given up."""
    rest.members = listed(cluster, "replica0")
    with hanging(4) as urls:
        async with RestClient([*urls, url]) as client:
            asked_at = time.monotonic()
            assert ["replica0"] == [member.name for member in (await client.listing()).members]
            assert time.monotonic() - asked_at < ANSWER_S

        async with RestClient(urls) as client:
            asked_at = time.monotonic()
            with pytest.raises(PatroniSilent, match="no answer"):
                await client.listing()
            assert time.monotonic() - asked_at < ANSWER_S + 0.5


async def test_members_that_hang_keep_no_primary_out(cluster: LocalCluster, board: Board) -> None:
    """Their silence is no veto, and is not waited for until the look itself is given up."""
    with hanging(4) as urls:
        async with Topology(urls, "", {}) as following:
            observer = Observer(dsns(cluster), board, interval_s=0.05, may_be_primary=following.may_be_primary)
            board.forget("primary")
            await observer.run_once()
            observer.close()

    assert board.current_primary(time.monotonic(), 5.0) is not None
    assert {} == observer.failures()
