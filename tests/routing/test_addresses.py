"""Addresses as people have them: libpq's parameters, the environment, settings of the database, far servers."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import socket
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import asyncpg
import pytest

from rocket import READ_BOUND, Role, Router, Unavailable, report_read_bound
from rocket.cluster.cluster import ClusterSettings
from rocket.cluster.supervisor import local_cluster
from rocket.dsn import parse_dsn, read_dsn
from rocket.errors import NodesUnusable
from rocket.health import Code, examine
from rocket.lab.app import DATABASE
from rocket.lab.shutdown import background
from rocket.lab.torture.proxy import Mode, Proxy, socket_path
from rocket.routing.opening import connect
from tests.support.halting import HaltingLink
from tests.support.servers import dsns, role

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

    from rocket import Connection, Session
    from rocket.cluster.cluster import LocalCluster

DSN = "postgresql://app:a%2Fb@h1:1,h2/d"


def with_query(nodes: Mapping[str, str], query: str) -> dict[str, str]:
    """Return DSNs with more parameters."""
    return {name: f"{dsn}{'&' if '?' in dsn else '?'}{query}" for name, dsn in nodes.items()}


async def served_by(session: Session, wanted: Role, query: str = "SELECT 1", within_s: float = 10) -> Any:
    """Read until a node in this role serves; return what that read did."""
    async with asyncio.timeout(within_s):
        while True:
            value = await session.read(lambda db: db.fetchval(query))
            if session.last is not None and session.last.role is wanted:
                return value


async def one(db: Connection) -> object:
    """Write nothing."""
    return await db.fetchval("SELECT 1")


# --- parameters ---


@pytest.mark.parametrize(
    ("query", "left", "name"),
    [
        ("", "", None),
        ("sslmode=require&options=-c%20search_path%3Da", "sslmode=require&options=-c%20search_path%3Da", None),
        ("channel_binding=prefer&gssencmode=disable&sslmode=prefer", "sslmode=prefer", None),
        ("connect_timeout=7&keepalives_idle=9&host=/t%2Fx", "host=%2Ft%2Fx", None),
        ("application_name=check%20out&sslmode=allow", "sslmode=allow", "check out"),
        ("fallback_application_name=b", "", "b"),
    ],
)
def test_what_is_left_of_an_address_for_asyncpg(query: str, left: str, name: str | None) -> None:
    """It would take libpq's other parameters for settings of the server."""
    address = read_dsn(parse_dsn(f"{DSN}?{query}" if query else DSN))

    assert (address.dsn, address.application_name) == (f"{DSN}?{left}" if left else DSN, name)
    assert address.numbers["connect_timeout"] == (7 if "connect_timeout" in query else 0)
    assert address.numbers["keepalives_idle"] == (9 if "keepalives_idle" in query else 30)


@pytest.mark.parametrize(
    ("query", "named"),
    [
        ("channel_binding=require", "channel_binding"),
        ("gssencmode=require", "gssencmode"),
        ("load_balance_hosts=random", "load_balance_hosts"),
        ("require_auth=scram-sha-256", "require_auth"),
        ("hostaddr=127.0.0.1", "hostaddr"),
        ("connect_timeout=soon", "connect_timeout"),
        ("tcp_user_timeout=-1", "tcp_user_timeout"),
    ],
)
async def test_a_parameter_that_cannot_be_honoured_is_named(query: str, named: str) -> None:
    """And not taken for an address, or a table, that is wrong."""
    with pytest.raises(ValueError, match=f"primary: its address has .*{named}") as caught:
        await Router.open({"primary": f"{DSN}?{query}"})
    assert "a%2Fb" not in str(caught.value)


async def test_certificates_that_are_not_there_are_found_at_once(tmp_path: Path) -> None:
    """They would keep every connection from being opened."""
    missing = tmp_path / "root.crt"
    with pytest.raises(ValueError, match="sslrootcert that is no file"):
        await Router.open({"primary": f"{DSN}?sslmode=verify-full&sslrootcert={missing}"})
    with pytest.raises(ValueError, match="sslrootcert that is no file"):
        await Router.open({"primary": f"{DSN}?sslmode=verify-full&sslrootcert=system"})


async def test_libpqs_parameters_are_honoured_or_harmless(cluster: LocalCluster) -> None:
    """The application's name is its own."""
    query = "connect_timeout=5&keepalives=1&gssencmode=disable&channel_binding=prefer&application_name=checkout"
    async with await Router.open(with_query(dsns(cluster), query)) as router:
        session = router.session()
        await session.write(one)
        assert await served_by(session, Role.REPLICA, "SHOW application_name") == "checkout"


async def test_a_setting_that_the_server_does_not_have_is_what_is_wrong(cluster: LocalCluster) -> None:
    """Parameters of other clients are: no table is."""
    with pytest.raises(NodesUnusable, match='unrecognized configuration parameter "pool_max_conns"'):
        await Router.open(with_query(dsns(cluster), "pool_max_conns=10"))


async def test_the_environments_wish_for_a_role_is_not_for_nodes(
    cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A node may have any role."""
    monkeypatch.setenv("PGTARGETSESSIONATTRS", "read-write")
    async with await Router.open(dsns(cluster)) as router:
        session = router.session()
        await session.write(one)
        await served_by(session, Role.REPLICA)


async def test_the_local_cluster_does_not_look_at_another_projects_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Neither for the role of a server nor for certificates."""
    monkeypatch.setenv("PGTARGETSESSIONATTRS", "read-write")
    monkeypatch.setenv("PGSSLMODE", "verify-full")
    monkeypatch.setenv("PGSSLROOTCERT", "/nowhere/root.crt")
    async with asyncio.timeout(30), local_cluster(ClusterSettings(replicas=1, port=0)) as cluster:
        await cluster.wait_for_catchup()


# --- sockets ---


async def test_the_system_finds_out_when_the_other_end_is_gone(cluster: LocalCluster) -> None:
    """On each TCP connection, as the DSN says or within half a minute."""
    link = HaltingLink(socket_path(cluster.socket_dir, cluster.primary.port), role(), DATABASE)
    async with link.listening():
        for query, idle_s, gone_ms in (("", 30, 15_000), ("?keepalives_idle=7&tcp_user_timeout=900", 7, 900)):
            connection = await connect(f"{link.dsn}{query}")
            there = connection._transport.get_extra_info("socket")  # type: ignore[attr-defined]  # noqa: SLF001
            assert there.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
            assert there.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == idle_s
            assert there.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == gone_ms
            connection.terminate()


# --- settings of the database ---


async def test_replicas_serve_where_serializable_is_the_default(cluster: LocalCluster) -> None:
    """They answer no statement in that level; what work does to its session does not bring it back."""
    primary = await cluster.primary.connect()
    alter = f'ALTER DATABASE "{DATABASE}"'
    await primary.execute(f"{alter} SET default_transaction_isolation = 'serializable'")
    try:
        await cluster.wait_for_catchup()
        async with await Router.open(dsns(cluster)) as router:
            session = router.session()
            await session.write(one)
            for _ in range(3):
                query = "SELECT set_config('work_mem', '1MB', false)"
                assert await served_by(session, Role.REPLICA, query) == "1MB"
            isolation = await session.write(lambda db: db.fetchval("SHOW transaction_isolation"))
            assert isolation == "serializable"
    finally:
        await primary.execute(f"{alter} RESET default_transaction_isolation")
        await primary.close()
        await cluster.wait_for_catchup()


@pytest.mark.superuser
async def test_a_primary_that_was_made_read_only(cluster: LocalCluster, email: str) -> None:
    """As a provider does whose disk is full: writes say so, health does, and reads go on, with marks left over."""

    async def note(db: Connection) -> None:
        await db.execute("UPDATE users SET email = email WHERE false")

    async def turn(wanted: str) -> None:
        writable = {"default_transaction_read_only": "off"}
        admin = await asyncpg.connect(cluster.primary.dsn(DATABASE), server_settings=writable)
        await admin.execute(f"ALTER SYSTEM {wanted}")
        await admin.execute("SELECT pg_reload_conf()")
        await admin.close()

    async with await Router.open(dsns(cluster), observer_interval_s=0.1) as router:
        session = router.session(email)
        await session.write(note)
        await served_by(session, Role.REPLICA)
        await turn("SET default_transaction_read_only = on")
        try:
            for _ in range(30):  # before it was observed, and after
                with pytest.raises(Unavailable, match="takes no writes"):
                    await session.write(note)
                await router.session(email).read(one, on="primary")
                await asyncio.sleep(0.01)
            found = [finding.code for finding in (await examine(router)).degraded]
            assert [Code.PRIMARY_READ_ONLY] == found
        finally:
            await turn("RESET default_transaction_read_only")
        async with asyncio.timeout(5):
            while Code.PRIMARY_READ_ONLY in {finding.code for finding in (await examine(router)).degraded}:
                await asyncio.sleep(0.01)
        await session.write(note)


# --- far servers ---


async def with_its_bound(db: Connection) -> object:
    """Read one row, and hand over what it can have shown."""
    row = await db.fetchrow(f"SELECT 1 AS one, {READ_BOUND} AS bound")
    assert row is not None
    report_read_bound(db, row["bound"])
    return row["one"]


@contextlib.asynccontextmanager
async def far_replicas(
    cluster: LocalCluster, directory: Path, round_trip_s: float
) -> AsyncIterator[dict[str, str]]:
    """Put the replicas far away; give the addresses of all nodes."""
    nodes = dsns(cluster)
    async with contextlib.AsyncExitStack() as stack:
        for node in cluster.replicas:
            upstream = socket_path(cluster.socket_dir, node.port)
            link = Proxy(socket_path(directory, node.port), functools.partial(Path, upstream))
            await stack.enter_async_context(link.listening())
            link.turn(Mode.DELAYED, delay_s=round_trip_s / 2)
            nodes[node.name] = f"postgresql://{role()}@/{DATABASE}?host={directory}&port={node.port}"
        yield nodes


@pytest.mark.vouched
@pytest.mark.parametrize("round_trip_s", [0.02, 0.1, pytest.param(0.3, marks=pytest.mark.long)])
async def test_far_replicas_serve_after_the_first_second(
    cluster: LocalCluster, tmp_path: Path, round_trip_s: float
) -> None:
    """In one round trip where the bound is handed over with the read, and in two where it is not.

    Connections to them are there as soon as the router is.
    """
    reads: dict[bool, list[tuple[float, Role, float]]] = {False: [], True: []}

    async def keep_reading(session: Session, *, hands_over: bool) -> None:
        while (at := time.monotonic()) < began + 1.5 + 20 * round_trip_s:
            await session.read(with_its_bound if hands_over else one)
            assert session.last is not None
            reads[hands_over].append((at - began, session.last.role, time.monotonic() - at))

    async def keep_going_there() -> None:
        bare = await asyncpg.connect(nodes["replica0"])
        try:
            while True:
                at = time.monotonic()
                await bare.execute("SELECT 1")
                round_trips.append(time.monotonic() - at)
        finally:
            bare.terminate()

    round_trips: list[float] = []
    async with (
        far_replicas(cluster, tmp_path, round_trip_s) as nodes,
        await Router.open(nodes) as router,
        background(keep_going_there(), "a bare connection"),
    ):
        assert all(pool.idle for pool in router.pools if pool.name != "primary")
        began = time.monotonic()
        sessions = [router.session() for _ in range(4)]
        await asyncio.gather(*(session.write(one) for session in sessions))
        async with asyncio.TaskGroup() as group:
            for number, session in enumerate(sessions):
                group.create_task(keep_reading(session, hands_over=number % 2 == 0))

    for hands_over, most in ((True, 1.2), (False, 2.2)):
        later = [(role, took_s) for at, role, took_s in reads[hands_over] if at > 1]
        share = sum(role is Role.REPLICA for role, _ in later) / len(later)
        typical = statistics.median(took_s for _, took_s in later) / statistics.median(round_trips)
        assert share >= 0.95
        assert typical <= most, f"{typical:.2f} round trips"


# --- names that move ---


@pytest.mark.vouched
async def test_a_name_that_leads_to_another_server_is_followed(cluster: LocalCluster, tmp_path: Path) -> None:
    """While the former one lives on, and the observer's connection to it as well."""
    targets = [cluster.node("replica0"), cluster.node("replica1")]
    link = Proxy(socket_path(tmp_path, 5432), lambda: socket_path(cluster.socket_dir, targets[0].port))
    nodes = dsns(cluster, "primary") | {"reader": f"postgresql://{role()}@/{DATABASE}?host={tmp_path}&port=5432"}
    port = "SELECT current_setting('port')::int"
    async with link.listening(), await Router.open(nodes, observer_interval_s=0.1) as router:
        session = router.session()
        await session.write(one)
        assert await served_by(session, Role.REPLICA, port) == targets.pop(0).port
        async with asyncio.timeout(10):
            while await served_by(session, Role.REPLICA, port) != targets[0].port:
                router.pools[1].drop()  # as their lifetime would, or their server
        for _ in range(20):
            await session.read(one)
            assert Role.REPLICA is (session.last and session.last.role)
