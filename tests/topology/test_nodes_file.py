"""Nodes come and go while the router works: by its methods, and by the file that lists them."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio

from rocket import Lsn, Node, Reason, Role, Router
from rocket.consistency import Epoch, SessionToken
from rocket.errors import InvalidSetting
from rocket.lab.app import DATABASE
from rocket.lab.shutdown import background
from rocket.topology.nodes_file import check_usable, follow, read_nodes
from tests.support.pages import run_example
from tests.support.servers import ROLES, dsns, until, write_nodes

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping
    from pathlib import Path

    from rocket import Connection
    from rocket.cluster.cluster import LocalCluster

READS_A_SECOND = 200
POLL_S = 0.02


@pytest_asyncio.fixture
async def followed(cluster: LocalCluster, tmp_path: Path) -> AsyncIterator[tuple[Router, Path]]:
    """A router with an observer at work, and the file of nodes that it follows: the primary and one replica."""
    nodes = dsns(cluster, "primary", "replica0", who=ROLES["monitor"])
    file = tmp_path / "nodes"
    write_nodes(file, nodes)
    async with (
        await Router.open(nodes, observer_interval_s=0.05) as router,
        background(follow(file, nodes, router, poll_s=POLL_S), "nodes file"),
    ):
        await until(lambda: len(router.board.replicas) == 1 and router.board.primary is not None)
        yield router, file


def known(router: Router) -> set[str]:
    """Return the names of the nodes that a router has connections for."""
    return {pool.name for pool in router.pools}


async def add_user(router: Router, email: str) -> None:
    """Write a row for reads to see."""

    async def work(node: Connection) -> None:
        await node.execute("INSERT INTO users (email) VALUES ($1)", email)

    await router.write(work, subject=email)


async def test_the_file_is_read_at_once_when_that_is_asked_for(
    cluster: LocalCluster, followed: tuple[Router, Path], tmp_path: Path
) -> None:
    """However long it would be until the next time."""
    router, _ = followed
    file = tmp_path / "other-nodes"
    asked = asyncio.Event()
    nodes = dsns(cluster, "primary", "replica0", who=ROLES["monitor"])
    async with background(follow(file, nodes, router, asked, poll_s=600.0), "another follower"):
        await asyncio.sleep(0)  # it has begun to wait
        write_nodes(file, nodes | dsns(cluster, "replica1", who=ROLES["monitor"]))
        asked.set()
        await until(lambda: known(router) == {"primary", "replica0", "replica1"})


async def test_no_read_fails_while_nodes_come_and_go(
    cluster: LocalCluster, followed: tuple[Router, Path], email: str
) -> None:
    """Reads under way end where they are, with every node replaced, added and removed again and again."""
    router, file = followed
    await add_user(router, email)
    served: set[str] = set()
    read, stop = 0, asyncio.Event()

    async def client() -> None:
        nonlocal read
        token: SessionToken | None = None

        async def work(node: Connection) -> bool:
            found = await node.fetchval("SELECT id FROM users WHERE email = $1", email)
            await node.execute("SELECT pg_sleep(0.01)")
            return found is not None

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
            write_nodes(file, nodes)
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
        ("primary {primary}\nreplica7 postgresql://app:hidden@127.0.0.1:1/d\n", "no node can be reached"),
        ("primary {primary}\nreplica7 {primary}&sslmode=odd\n", "replica7: `sslmode` parameter must be one of"),
        ("primary {primary}\nprimary {primary}\n", "names primary twice"),
    ],
)
async def test_an_unusable_file_changes_nothing_and_is_one_line(
    cluster: LocalCluster,
    followed: tuple[Router, Path],
    caplog: pytest.LogCaptureFixture,
    text: str,
    words: str,
) -> None:
    """However often it is read; and the next good one is taken."""
    router, file = followed
    direct = dsns(cluster, who=ROLES["monitor"])
    caplog.set_level(logging.ERROR, "rocket.topology")
    file.write_text(text.format(**direct))
    await until(lambda: bool(caplog.messages))
    await asyncio.sleep(5 * POLL_S)  # it is read several times more
    assert 1 == len(caplog.messages)
    assert words in caplog.messages[0]
    assert "hidden" not in caplog.messages[0]
    assert {"primary", "replica0"} == known(router)
    write_nodes(file, direct)
    await until(lambda: known(router) == set(direct))
    assert 1 == len(caplog.messages)


async def test_new_nodes_are_checked_as_the_caller_wants_it(
    cluster: LocalCluster, followed: tuple[Router, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A service may need tables of its own; nodes that it knows already are not checked again."""
    router, _ = followed
    checked: list[str] = []

    async def refuse(nodes: Mapping[str, str | Node]) -> None:
        checked.extend(nodes)
        raise InvalidSetting("they lack a table of mine")

    nodes = dsns(cluster, "primary", "replica0", who=ROLES["monitor"])
    file = tmp_path / "other-nodes"
    write_nodes(file, nodes | dsns(cluster, "replica1"))
    async with background(follow(file, nodes, router, check=refuse, poll_s=POLL_S), "another follower"):
        await until(lambda: "the nodes stay as they are: they lack a table of mine" in caplog.messages)
    assert {"replica1"} == set(checked)
    assert {"primary", "replica0"} == known(router)


async def test_a_read_under_way_ends_where_it_is(followed: tuple[Router, Path], email: str) -> None:
    """A removal waits for it, and reads that come meanwhile go elsewhere."""
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


async def test_a_removed_replica_is_forgotten(followed: tuple[Router, Path], email: str) -> None:
    """It has no status, no watch and no connection; asking for it again is a mistake."""
    router, _ = followed
    await add_user(router, email)
    await router.remove("replica0")
    assert not router.board.replicas
    answer = await router.read(lambda node: node.fetchval("SELECT 1"), subject=email)
    assert Role.PRIMARY is answer.role
    with pytest.raises(KeyError):
        await router.remove("replica0")


async def test_a_node_whose_name_no_token_holds_is_not_added(followed: tuple[Router, Path]) -> None:
    """Nor is anything else changed."""
    router, _ = followed
    with pytest.raises(ValueError, match="is no name for a node"):
        await router.add("a~b", "postgresql:///x")
    assert {"primary", "replica0"} == known(router)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    """With the system's reason."""
    with pytest.raises(InvalidSetting, match=r"cannot read .*nodes: No such file"):
        read_nodes(tmp_path / "nodes")
    with contextlib.suppress(OSError):
        (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
        with pytest.raises(InvalidSetting, match="it is not text in UTF-8"):
            read_nodes(tmp_path / "binary")


async def test_missing_tables_are_named_with_what_makes_them(cluster: LocalCluster) -> None:
    """Only those that a router uses itself."""
    await check_usable(dsns(cluster, who=ROLES["monitor"]))
    with pytest.raises(
        InvalidSetting,
        match=r"^primary has no table covers, epochs: `python -m rocket schema` prints",
    ):
        await check_usable({"primary": cluster.primary.dsn("postgres")})


async def test_what_the_file_lists_gets_options(
    cluster: LocalCluster, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A password by a function, say: asked for in the check, and by the router for each connection."""
    asked: list[str] = []

    def options(name: str, node: Node) -> Node:
        if name == "replica1":
            raise InvalidSetting("replica1 has no password")

        def password() -> str:
            asked.append(name)
            return cluster.password()

        return dataclasses.replace(node, password=password)

    by_tcp = {
        name: f"postgresql://postgres@127.0.0.1:{node.port}/{DATABASE}" for name, node in cluster.nodes.items()
    }
    file = tmp_path / "nodes"
    write_nodes(file, {"primary": by_tcp["primary"]})
    nodes = {name: options(name, Node(dsn)) for name, dsn in read_nodes(file).items()}
    async with (
        await Router.open(nodes, observer_interval_s=0.05) as router,
        background(follow(file, nodes, router, options=options, poll_s=POLL_S), "nodes file"),
    ):
        write_nodes(file, by_tcp)  # of which one cannot be had
        await until(lambda: "the nodes stay as they are: replica1 has no password" in caplog.messages)
        assert {"primary"} == known(router)
        write_nodes(file, {name: by_tcp[name] for name in ("primary", "replica0")})
        await until(lambda: len(router.board.replicas) == 1 and router.board.primary is not None)
        answer = await router.read(lambda node: node.fetchval("SELECT current_user::text"), subject="options")
    assert ("replica0", "postgres") == (answer.node, answer.value)
    assert {"primary", "replica0"} == set(asked)


async def test_the_page_shows_how_a_service_follows_a_file(cluster: LocalCluster, tmp_path: Path) -> None:
    """Its lines work as they are printed, but for the file's name."""
    file = tmp_path / "nodes"
    write_nodes(file, dsns(cluster, "primary", "replica0", who=ROLES["monitor"]))
    seen: list[set[str]] = []

    async def serve(router: Router) -> None:
        write_nodes(file, dsns(cluster, who=ROLES["monitor"]))
        await until(lambda: known(router) == set(cluster.nodes))
        seen.append(known(router))

    await run_example("existing-cluster.md", "read_nodes", {"/etc/app.nodes": str(file)}, serve=serve)
    assert [set(cluster.nodes)] == seen
