"""Nodes come and go while the router works: by its methods, and by the file that names them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from typing import TYPE_CHECKING

import aiohttp
import pytest
import pytest_asyncio

from rocket import Lsn, Reason, Role, Router, SessionToken
from rocket.consistency import Epoch
from rocket.errors import InvalidSetting
from rocket.lab.api.rides import SELECT_RIDE
from rocket.lab.api.users import UserFloors
from rocket.lab.shutdown import background
from rocket.topology.nodes_file import follow, read_nodes
from tests.routing.test_races import write_ride
from tests.support.program import running
from tests.support.servers import ROLES, dsns, until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping
    from pathlib import Path

    from rocket import Connection
    from rocket.cluster.cluster import LocalCluster

READS_A_SECOND = 200


def write_file(file: Path, nodes: Mapping[str, str]) -> None:
    """Put another file in the old one's place, whole."""
    draft = file.with_suffix(".new")
    draft.write_text("# NAME DSN\n\n" + "".join(f"{name} {dsn}\n" for name, dsn in nodes.items()))
    draft.rename(file)


@pytest_asyncio.fixture
async def followed(
    cluster: LocalCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[tuple[Router[str], Path]]:
    """A router with an observer at work, and the file of nodes that it follows: the primary and one replica."""
    monkeypatch.setattr("rocket.topology._POLL_S", 0.02)
    nodes = dsns(cluster, "primary", "replica0", who=ROLES["monitor"])
    file = tmp_path / "nodes"
    write_file(file, nodes)
    async with (
        await Router.open(nodes, UserFloors(), observer_interval_s=0.05) as router,
        background(follow(file, nodes, router), "nodes file"),
    ):
        await until(lambda: len(router.board.replicas) == 1 and router.board.primary is not None)
        yield router, file


async def test_the_file_is_read_at_once_when_that_is_asked_for(
    cluster: LocalCluster, followed: tuple[Router[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long it would be until the next look."""
    router, file = followed
    monkeypatch.setattr("rocket.topology._POLL_S", 600.0)
    asked = asyncio.Event()
    nodes = dsns(cluster, "primary", "replica0", "replica1", who=ROLES["monitor"])
    async with background(follow(file, {}, router, asked), "another follower"):
        await asyncio.sleep(0)  # it has begun to wait
        write_file(file, nodes)
        asked.set()
        await until(lambda: set(nodes) == known(router))


@pytest.mark.parametrize("workers", ["1", "2"])
async def test_hangup_has_the_file_read_again_and_ends_nothing(
    cluster: LocalCluster, kept_dir: Path, workers: str
) -> None:
    """By the program, or by each of its processes; those that it was not sent to die of it no more."""
    file = kept_dir / "nodes"
    write_file(file, dsns(cluster, "primary", "replica0"))
    flags = ("--no-cluster", "--no-simulator", "--api-port", "0", "--api-workers", workers)
    async with running(kept_dir, "-m", "rocket", "run-all", *flags, "--nodes-file", str(file)) as program:
        url = (await program.prints(r"ready after .*: (http://\S+)"))[1]
        write_file(file, dsns(cluster))
        program.process.send_signal(signal.SIGHUP)
        await program.prints("SIGHUP: looking again")
        async with asyncio.timeout(10), aiohttp.ClientSession() as http:
            while True:
                async with http.get(f"{url}/replicas") as response:
                    if "replica1" in await response.text():
                        break
                await asyncio.sleep(0.02)
        program.process.terminate()
        assert 0 == await program.ends()
    assert "died" not in program.output


def known(router: Router[str]) -> set[str]:
    """Return the names of the nodes that a router has connections for."""
    return {pool.name for pool in router.pools}


async def test_no_read_fails_while_nodes_come_and_go(
    cluster: LocalCluster, followed: tuple[Router[str], Path], email: str
) -> None:
    """Reads under way end where they are, with every node replaced, added and removed again and again."""
    router, file = followed
    ride_id = await write_ride(router, email)
    served: set[str] = set()
    read, stop = 0, asyncio.Event()

    async def client() -> None:
        nonlocal read
        token: SessionToken | None = None

        async def work(node: Connection) -> bool:
            row = await node.fetchrow(SELECT_RIDE, email, ride_id)
            await node.execute("SELECT pg_sleep(0.01)")
            return row is not None and row["id"] is not None

        while not stop.is_set():
            answer = await router.read(work, subject=email, token=token)
            assert answer.value
            token = answer.token
            served.add(answer.node)
            read += 1
            await asyncio.sleep(8 / READS_A_SECOND)

    direct = dsns(cluster, who=ROLES["monitor"])
    anew = {name: f"{dsn}&application_name=anew" for name, dsn in direct.items()}
    async with asyncio.TaskGroup() as group:
        clients = [group.create_task(client()) for _ in range(8)]
        for nodes in [
            direct,
            {"primary": direct["primary"]},
            anew,
            direct,
            {"primary": anew["primary"]},
            direct,
        ] * 2:
            await asyncio.sleep(0.1)
            write_file(file, nodes)
            await until(lambda nodes=nodes: known(router) == set(nodes))  # type: ignore[misc]
            await until(lambda nodes=nodes: len(router.board.replicas) == len(nodes) - 1)  # type: ignore[misc]
        stop.set()
    assert all(client.exception() is None for client in clients)
    assert {"replica0", "replica1"} <= served
    assert read > 100


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("primary", "line 1 is not NAME DSN"),
        ("primary mysql://u:hidden@h/d", "line 1: primary: its address must be a DSN"),
        ("a/b postgresql:///d", "line 1 is not NAME DSN"),
        ("# nothing\n", "it names no node"),
        ("replica0 {replica0}\n", "primary is the primary"),
        ("primary {primary}\nreplica7 postgresql://nobody:hidden@127.0.0.1:1/d\n", "no node can be reached"),
        ("primary {primary}\nreplica7 {primary}&sslmode=odd\n", "replica7: `sslmode` parameter must be one of"),
        ("primary {primary}\nprimary {primary}\n", "names primary twice"),
    ],
)
async def test_a_file_that_will_not_do_changes_nothing_and_is_one_line(
    cluster: LocalCluster,
    followed: tuple[Router[str], Path],
    caplog: pytest.LogCaptureFixture,
    text: str,
    words: str,
) -> None:
    """However often it is looked at; and the next good one is taken."""
    router, file = followed
    direct = dsns(cluster, who=ROLES["monitor"])
    caplog.set_level(logging.ERROR, "rocket.run")
    file.write_text(text.format(**direct))
    await until(lambda: bool(caplog.messages))
    await asyncio.sleep(0.1)  # for several more looks
    assert 1 == len(caplog.messages)
    assert words in caplog.messages[0]
    assert "hidden" not in caplog.messages[0]
    assert {"primary", "replica0"} == known(router)
    write_file(file, direct)
    await until(lambda: known(router) == set(direct))
    assert 1 == len(caplog.messages)


async def test_a_read_under_way_ends_where_it_is(followed: tuple[Router[str], Path], email: str) -> None:
    """A removal waits for it, and whoever comes meanwhile goes elsewhere."""
    router, _ = followed
    token = SessionToken(router.board.epoch or Epoch(""), Lsn(1))
    begun = asyncio.Event()

    async def slowly(node: Connection) -> None:
        begun.set()
        await node.execute("SELECT pg_sleep(0.3)")

    reading = asyncio.create_task(router.read(slowly, subject=email, token=token))
    await begun.wait()
    removing = asyncio.create_task(router.remove("replica0"))
    await asyncio.sleep(0)
    elsewhere = await router.read(lambda node: node.fetchval("SELECT 1"), subject=email, token=token)
    answer = await reading
    await removing
    assert ("primary", "replica0", Reason.CAUGHT_UP) == (elsewhere.node, answer.node, answer.reason)


async def test_a_removed_replica_is_forgotten(followed: tuple[Router[str], Path], email: str) -> None:
    """It has no status, no watch and no connection; asking for it again is a mistake."""
    router, _ = followed
    await write_ride(router, email)
    await router.remove("replica0")
    assert not router.board.replicas
    answer = await router.read(lambda node: node.fetchval("SELECT 1"), subject=email)
    assert Role.PRIMARY is answer.role
    with pytest.raises(KeyError):
        await router.remove("replica0")


async def test_a_node_whose_name_no_token_holds_is_not_added(followed: tuple[Router[str], Path]) -> None:
    """Nor is anything else changed."""
    router, _ = followed
    with pytest.raises(ValueError, match="is no name for a node"):
        await router.add("a~b", "postgresql:///x")
    assert {"primary", "replica0"} == known(router)


def test_a_file_that_is_not_there_is_told_of(tmp_path: Path) -> None:
    """By its name and the system's words."""
    with pytest.raises(InvalidSetting, match=r"cannot read .*nodes: No such file"):
        read_nodes(tmp_path / "nodes")
    with contextlib.suppress(OSError):
        (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
        with pytest.raises(InvalidSetting, match="it is no text"):
            read_nodes(tmp_path / "binary")
