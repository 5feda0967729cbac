"""How nodes are connected to: rotating passwords, TLS, settings, hooks, many hosts; and when they are ready."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import re
import shutil
import ssl
import subprocess
import time
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

import asyncpg
import pytest
import pytest_asyncio

from rocket import Limits, Node, Role, Router, Unavailable, nodes_from_environment
from rocket.cluster.cluster import ClusterSettings
from rocket.cluster.supervisor import local_cluster
from rocket.dsn import nodes_from_hosts
from rocket.errors import InvalidSetting
from rocket.health import Code, examine
from rocket.lab.app import DATABASE
from rocket.lab.torture.proxy import socket_path
from rocket.routing.connection import NodeConnection
from rocket.routing.opening import connect, still_runs
from rocket.routing.pool import NodePool
from tests.support.halting import HaltingLink
from tests.support.servers import dsns, role, schema, until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from rocket import Connection, Session
    from rocket.cluster.cluster import LocalCluster

SECRET = "hunter2-token"  # noqa: S105 - it must show nowhere


async def one(db: Connection) -> object:
    """Neither read nor write anything."""
    return await db.fetchval("SELECT 1")


async def served_by_replica(session: Session, name: str | None = None, query: str = "SELECT 1") -> Any:
    """Read until a replica (of this name) serves; return what that read did."""
    async with asyncio.timeout(10):
        while True:
            value = await session.read(lambda db: db.fetchval(query))
            if session.last is not None and session.last.role is Role.REPLICA:
                if name in {None, session.last.node}:
                    return value
                await asyncio.sleep(0.01)


def with_options(nodes: dict[str, str], *names: str, **options: Any) -> dict[str, str | Node]:
    """Return nodes of which some (all, if none is named) have options."""
    return {name: Node(dsn, **options) if name in (names or nodes) else dsn for name, dsn in nodes.items()}


def links_to(cluster: LocalCluster, *names: str) -> list[HaltingLink]:
    """Return links to nodes, over TCP."""
    return [
        HaltingLink(socket_path(cluster.socket_dir, cluster.node(name).port), role(), DATABASE) for name in names
    ]


# --- the value ---


def test_a_node_shows_no_secret_and_can_be_compared() -> None:
    """Those who follow a cluster compare nodes; a log may hold one."""

    def password() -> str:
        return SECRET

    node = Node(f"postgresql://a:{SECRET}@h/d", password=password, settings={"app.key": SECRET})

    assert SECRET not in repr(node)
    assert SECRET not in repr(Node("postgresql://h/d", password=SECRET))
    assert node == dataclasses.replace(node)
    assert hash(node) == hash(dataclasses.replace(node))
    assert node != dataclasses.replace(node, settings={})
    with pytest.raises(ValueError, match="statement_timeout, that is no text"):
        Node("postgresql://h/d", settings={"statement_timeout": 5})  # type: ignore[dict-item]


# --- passwords ---


@contextlib.asynccontextmanager
async def rotating_role(cluster: LocalCluster) -> AsyncIterator[Callable[[str], Any]]:
    """Make a role that has to give a password by TCP, and give what changes it, everywhere."""
    admin = await cluster.primary.connect(DATABASE)

    async def rotate(password: str) -> None:
        await admin.execute(f"ALTER ROLE rocket_rotating PASSWORD '{password}'")
        await cluster.wait_for_catchup()

    await admin.execute("CREATE ROLE rocket_rotating LOGIN IN ROLE rocket_monitor")
    try:
        yield rotate
    finally:
        await admin.execute("DROP ROLE rocket_rotating")
        await admin.close()
        await cluster.wait_for_catchup()


@pytest.mark.superuser
@pytest.mark.parametrize("is_coroutine", [False, True])
async def test_a_password_is_asked_for_at_each_connection(cluster: LocalCluster, *, is_coroutine: bool) -> None:
    """As tokens that expire are: what was right for the last connection is refused for the next."""
    given = "first"

    def password() -> str:
        return given

    async def slow_password() -> str:
        await asyncio.sleep(0)
        return given

    async with rotating_role(cluster) as rotate:
        await rotate("first")
        nodes = {
            name: Node(
                f"postgresql://rocket_rotating:wrong@127.0.0.1:{node.port}/{DATABASE}",
                password=slow_password if is_coroutine else password,
            )
            for name, node in cluster.nodes.items()
        }
        async with await Router.open(nodes, observer_interval_s=0.1) as router:
            session = router.session()
            await session.write(one)
            assert await served_by_replica(session, query="SELECT current_user::text") == "rocket_rotating"

            await rotate("second")
            for pool in router.pools:
                pool.drop()
            with pytest.raises(Unavailable):
                await session.write(one)
            assert "password authentication failed" in router.left_alone["primary"]

            given = "second"
            await router.wait_ready(replicas=2)
            await session.write(one)


@pytest.mark.parametrize("kind", [RuntimeError, OSError, asyncio.CancelledError])
async def test_health_says_that_a_password_cannot_be_had_and_no_more(
    cluster: LocalCluster, caplog: pytest.LogCaptureFixture, kind: type[BaseException]
) -> None:
    """What the function raised may quote a request with its credentials."""
    asked = 0

    def password() -> str:
        nonlocal asked
        asked += 1
        if asked > 1:  # after the observer's
            raise kind(f"GET https://iam/?key={SECRET}")
        return "any"

    nodes = with_options(dsns(cluster), "replica0", password=password)
    async with await Router.open(nodes, limits=Limits(warm=0)) as router:
        session = router.session()
        await session.write(one)
        for _ in range(20):  # none is bound to the other replica
            await served_by_replica(router.session(None, session.token), "replica1")
        await until(lambda: "replica0" in router.left_alone)
        findings = {finding.code: finding.text for finding in (await examine(router)).degraded}
        assert f"replica0: the node's `password` has failed: {kind.__name__}" in findings[Code.NODE_CLOSED]
        with pytest.raises(
            TimeoutError, match=f"1 of 2 replicas.*replica0: .*has failed: {kind.__name__}"
        ) as late:
            await router.wait_ready(replicas=2, timeout=0.1)
    assert SECRET not in f"{findings} {caplog.text} {late.value}"

    with caplog.at_level("DEBUG"):
        async with await Router.open(with_options(dsns(cluster), password=password)) as router:
            with pytest.raises(Unavailable, match=f"has failed: {kind.__name__}") as caught:
                await router.session().write(one)
    assert SECRET not in f"{caught.value} {caplog.text}"


async def test_a_password_that_does_not_come_is_not_waited_for(cluster: LocalCluster) -> None:
    """The node's time for connecting is over then; the others serve."""
    given_up = 0

    async def password() -> str:
        nonlocal given_up
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            given_up += 1
            raise
        return ""

    nodes = dsns(cluster)
    nodes["replica0"] += "&connect_timeout=1"
    async with await Router.open(with_options(nodes, "replica0", password=password)) as router:
        await router.wait_ready()
        session = router.session()
        await session.write(one)
        await served_by_replica(session, "replica1")
        with pytest.raises(TimeoutError, match="replica0: TimeoutError"):
            await router.wait_ready(replicas=2, timeout=0.1)
    assert given_up >= 2


# --- settings, TLS, hooks ---


async def test_settings_outlast_what_work_sets(cluster: LocalCluster) -> None:
    """On the primary and on replicas, where a reset brings them back."""
    settings = {"statement_timeout": "7s", "search_path": "public, pg_catalog"}
    show = "SELECT current_setting('statement_timeout') || ' ' || current_setting('search_path')"
    async with await Router.open(with_options(dsns(cluster), settings=settings)) as router:
        session = router.session()
        for _ in range(3):
            await session.write(
                lambda db: db.execute("SET statement_timeout = '1s'; SET search_path = pg_catalog")
            )
            assert await session.write(lambda db: db.fetchval(show)) == "7s public, pg_catalog"
            change = "SELECT set_config('statement_timeout', '2s', false)"
            assert await served_by_replica(session, query=change) == "2s"
            assert await served_by_replica(session, query=show) == "7s public, pg_catalog"


async def test_a_context_for_tls_holds_in_place_of_the_addresses_mode(cluster: LocalCluster) -> None:
    """A server that has no TLS is not talked to then."""
    (link,) = links_to(cluster, "replica0")
    async with link.listening():
        (await connect(link.dsn)).terminate()
        for given in (ssl.create_default_context(), "require", True):
            with pytest.raises(ConnectionError, match="rejected SSL upgrade"):
                await connect(Node(f"{link.dsn}?sslmode=disable", ssl=given))


@pytest.mark.superuser
async def test_tls_with_a_context(system_cluster: LocalCluster, tmp_path: Path) -> None:
    """The server's certificate is checked as the context says, by pools and observer alike."""
    if (openssl := shutil.which("openssl")) is None:
        pytest.skip("needs openssl, to make a certificate")
    node = system_cluster.primary
    key, certificate = tmp_path / "server.key", tmp_path / "server.crt"
    subject = ("-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1")
    new = (
        openssl,
        "req",
        "-x509",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-days",
        "1",
        "-keyout",
        key,
        "-out",
        certificate,
    )
    subprocess.run([*new, *subject], check=True, capture_output=True)  # noqa: S603, ASYNC221 - of ours, at once
    owner = node.data_dir.stat()
    for file in (key, certificate):
        there = node.data_dir / file.name
        there.write_bytes(file.read_bytes())
        there.chmod(0o600)
        os.chown(there, owner.st_uid, owner.st_gid)
    admin = await node.connect(DATABASE)
    await admin.execute("ALTER SYSTEM SET ssl = on")
    await admin.execute("SELECT pg_reload_conf()")
    try:
        dsn = node.tcp_dsn(DATABASE, system_cluster.password())
        context = ssl.create_default_context(cafile=str(certificate))
        async with asyncio.timeout(5):
            while not await admin.fetchval("SELECT current_setting('ssl')::bool"):
                await asyncio.sleep(0.01)
        async with await Router.open({"primary": Node(dsn, ssl=context)}) as router:
            await router.wait_ready(replicas=0)
            in_tls = (
                "SELECT count(*) FROM pg_stat_ssl JOIN pg_stat_activity USING (pid) WHERE ssl AND datname = $1"
            )
            assert await admin.fetchval(in_tls, DATABASE) >= 2  # the pool's, and the observer's
        with pytest.raises(ssl.SSLCertVerificationError):
            await connect(Node(dsn, ssl=ssl.create_default_context()))
    finally:
        await admin.execute("ALTER SYSTEM RESET ssl")
        await admin.execute("SELECT pg_reload_conf()")
        await admin.close()


async def test_a_hook_opens_all_connections(cluster: LocalCluster) -> None:
    """Those of pool and observer, and those with which a COMMIT is looked at."""
    opened: list[dict[str, Any]] = []

    async def open_one(dsn: str, **options: Any) -> object:
        opened.append(options)
        return await asyncpg.connect(dsn, **options)

    nodes = with_options(dsns(cluster), connect=open_one)
    async with await Router.open(nodes) as router:
        await router.wait_ready(replicas=2)
        session = router.session()
        await session.write(one)
        await served_by_replica(session)
        names = [options["server_settings"]["application_name"] for options in opened]
        assert names.count("rocket") >= 3
        assert {name for name in names if name != "rocket"} == {f"rocket observer, process {os.getpid()}"}
        assert {options["connection_class"] for options in opened} == {NodeConnection}
        assert not any({"password", "ssl"} & options.keys() for options in opened)  # the hook's own may be given
        opened.clear()
        assert await still_runs(Node.of(nodes["primary"]), 0) is False
        assert len(opened) == 1


async def test_what_a_hook_does_wrong_is_the_nodes_failure(cluster: LocalCluster) -> None:
    """Without the text of its error; a server's own is repeated."""
    dsn = dsns(cluster)["replica0"]
    plain = []

    async def of_another_class(dsn: str, **options: Any) -> object:
        plain.append(await asyncpg.connect(dsn, **options | {"connection_class": asyncpg.Connection}))
        return plain[-1]

    async def fails(_dsn: str, **_: Any) -> object:
        raise KeyError(SECRET)

    async def elsewhere(dsn: str, **options: Any) -> object:
        return await asyncpg.connect(dsn, database="nowhere", **options)

    async def fails_elsewhere() -> str:  # a store of passwords in Postgres, say
        await asyncpg.connect(dsn, database="nowhere")
        return ""

    with pytest.raises(ConnectionError, match="no connection of the `connection_class`"):
        await connect(Node(dsn, connect=of_another_class))
    assert plain[0].is_closed()
    with pytest.raises(ConnectionError, match=r"^the node's `connect` has failed: KeyError$") as caught:
        await connect(Node(dsn, connect=fails))
    assert caught.value.__cause__ is None
    with pytest.raises(asyncpg.InvalidCatalogNameError):
        await connect(Node(dsn, connect=elsewhere))
    with pytest.raises(ConnectionError, match=r"`password` has failed: InvalidCatalogNameError$"):
        await connect(Node(dsn, password=fails_elsewhere))
    with pytest.raises(ConnectionError, match="`password` has failed: TypeError"):
        await connect(Node(dsn, password=lambda: None))  # type: ignore[arg-type,return-value]


# --- several hosts ---


@pytest.mark.parametrize(
    ("dsn", "nodes"),
    [
        ("postgresql://h1/d", {"h1": "postgresql://h1/d"}),
        (
            "postgresql://u:a%2Fb@h1,h2:5433,h3/d?sslmode=require&target_session_attrs=read-write",
            {
                "h1": "postgresql://u:a%2Fb@h1/d?sslmode=require",
                "h2": "postgresql://u:a%2Fb@h2:5433/d?sslmode=require",
                "h3": "postgresql://u:a%2Fb@h3/d?sslmode=require",
            },
        ),
        (
            "postgres://h:1,h:2,10.0.0.1/d?load_balance_hosts=random",
            {"h-1": "postgres://h:1/d", "h-2": "postgres://h:2/d", "10.0.0.1": "postgres://10.0.0.1/d"},
        ),
        (
            "postgresql://u@/d?host=h1,h2&port=5433",
            {"h1": "postgresql://u@h1:5433/d", "h2": "postgresql://u@h2:5433/d"},
        ),
        (
            "postgresql://u@h1,h2/d?port=1,2",
            {"h1": "postgresql://u@h1:1/d", "h2": "postgresql://u@h2:2/d"},
        ),
        (
            "postgresql://u@/d?host=/run/pg,/run/pg&port=1,2",
            {"run-pg-1": "postgresql://u@%2Frun%2Fpg:1/d", "run-pg-2": "postgresql://u@%2Frun%2Fpg:2/d"},
        ),
        (
            "postgresql://[fe80::1],[fe80::2]:5/d",
            {"fe80-1": "postgresql://[fe80::1]/d", "fe80-2": "postgresql://[fe80::2]:5/d"},
        ),
    ],
)
def test_each_host_of_an_address_is_a_node(dsn: str, nodes: dict[str, str]) -> None:
    """Named after the host, and its port where that tells it from others."""
    assert nodes_from_hosts(dsn) == nodes
    assert nodes_from_environment({"ROCKET_NODES": dsn}) == nodes
    with pytest.raises(InvalidSetting, match="leave out ROCKET_PRIMARY"):
        nodes_from_environment({"ROCKET_NODES": dsn, "ROCKET_PRIMARY": dsn})


@pytest.mark.parametrize(
    ("dsn", "why"),
    [
        (f"postgresql://u:{SECRET}@/d", "must name each host"),
        (f"postgresql://u:{SECRET}@h1,,h2/d", "must name each host"),
        (f"postgresql://u:{SECRET}@h1,h2,h3/d?port=1,2", "one port, or one for each"),
        (f"postgresql://u:{SECRET}@h1,h1/d", "names h1- ?twice|names h1 twice"),
        (f"postgresql://u:{SECRET}@h1,h2/d?hostaddr=10.0.0.1", "h1: its address has the parameter hostaddr"),
        (f"postgresql://u:{SECRET}@h1,h2/d?port=soon", "h1: its address must be"),
        (f"postgresql://u:{SECRET}@{64 * 'h'}/d", "a host that makes no name"),
        (f"postgresql://u:{SECRET}@/d?host=::1,::2", "IPv6 addresses in brackets"),
        (f"h1,h2:{SECRET}", "must be a DSN"),
    ],
)
async def test_hosts_that_cannot_be_nodes_are_named(dsn: str, why: str) -> None:
    """And the address, which may hold a password, is not."""
    for given in (dsn, Node(dsn)):
        with pytest.raises(ValueError, match=why) as caught:
            await Router.open(given)
        assert str(caught.value).startswith("the nodes' address ")
        assert SECRET not in str(caught.value)
    with pytest.raises(InvalidSetting, match=f"ROCKET_NODES .*({why})"):
        nodes_from_environment({"ROCKET_NODES": dsn})


@pytest_asyncio.fixture
async def unsupervised() -> AsyncIterator[LocalCluster]:
    """A cluster of which no supervisor keeps the order."""
    settings = ClusterSettings(replicas=2, port=0, database=DATABASE, schema=schema())
    async with local_cluster(settings) as cluster:
        await cluster.wait_for_catchup()
        yield cluster


async def test_roles_of_hosts_are_found_and_followed(unsupervised: LocalCluster) -> None:
    """The address says of none what it is; what it wants of a single connection does not count."""
    cluster = unsupervised
    hosts = ",".join(f"127.0.0.1:{node.port}" for node in reversed(cluster.nodes.values()))
    node = Node(
        f"postgresql://postgres@{hosts}/{DATABASE}?target_session_attrs=standby", password=cluster.password
    )
    async with await Router.open(node, observer_interval_s=0.1) as router:
        await router.wait_ready(replicas=2)
        session = router.session()
        await session.write(one)
        assert session.last is not None
        assert session.last.node == f"127.0.0.1-{cluster.primary.port}"
        await served_by_replica(session)

        await cluster.primary.stop()
        admin = await cluster.node("replica0").connect(DATABASE)
        assert await admin.fetchval("SELECT pg_promote(true, 30)")
        await admin.close()
        await router.wait_ready(replicas=0)
        await session.write(one)
        assert session.last.node == f"127.0.0.1-{cluster.node('replica0').port}"
        await until(lambda: [True, False] == [router.pools[place].has_idle for place in (1, 2)])


async def test_an_address_of_several_hosts_may_be_that_of_one_node(cluster: LocalCluster) -> None:
    """As libpq has it: the first that answers is the node."""
    (link,) = links_to(cluster, "replica0")
    async with link.listening():
        dead_port = urlsplit(link.dsn).port
    port = cluster.node("replica1").port
    at = f"postgresql://postgres:{quote(cluster.password(), safe='')}@127.0.0.1"
    nodes = dsns(cluster, "primary") | {"either": f"{at}:{dead_port},127.0.0.1:{port}/{DATABASE}"}
    async with await Router.open(nodes) as router:
        session = router.session()
        await session.write(one)
        assert await served_by_replica(session, "either", "SELECT current_setting('port')::int") == port


# --- ready ---


async def test_ready_means_that_connections_are_open(cluster: LocalCluster) -> None:
    """Also where none is kept open."""
    async with await Router.open(dsns(cluster), limits=Limits(warm=0)) as router:
        assert [0, 0, 0] == [pool.idle for pool in router.pools]
        await router.wait_ready(replicas=2)
        assert [1, 1, 1] == [pool.idle for pool in router.pools]
        await router.wait_ready()
        with pytest.raises(ValueError, match="one primary"):
            await router.wait_ready(primaries=2)
        with pytest.raises(TimeoutError, match=r"^not ready after 0.1 s: 2 of 3 replicas may serve$"):
            await router.wait_ready(replicas=3, timeout=0.1)
    with pytest.raises(RuntimeError, match="closed"):
        await router.wait_ready()


async def test_a_router_of_nodes_that_are_all_down_gets_ready(cluster: LocalCluster) -> None:
    """As soon as they are up; until then what is missing is said, and why."""
    names = ("primary", "replica0")
    links = links_to(cluster, *names)
    for link in links:
        async with link.listening():
            pass
    nodes = {name: link.dsn for name, link in zip(names, links, strict=True)}
    async with await Router.open(nodes, observer_interval_s=0.05) as router:
        with pytest.raises(TimeoutError) as caught:
            await router.wait_ready(timeout=0.2)
        why = "no current primary is known .*primary: .*refused.*; 0 of 1 replicas may serve .*replica0: .*refused"
        assert re.search(why, str(caught.value).replace("Connect call failed", "refused"))

        waiting = asyncio.create_task(router.wait_ready())
        async with links[0].listening(nodes["primary"]):
            await router.wait_ready(replicas=0)
            assert not waiting.done()
            with pytest.raises(
                TimeoutError, match=r"^not ready after 0.1 s: 0 of 1 replicas may serve \(replica0: "
            ):
                await router.wait_ready(timeout=0.1)
            async with links[1].listening(nodes["replica0"]):
                await waiting
                session = router.session()
                await session.write(one)
                await served_by_replica(session, "replica0")


async def test_a_primary_that_lets_no_more_in_is_not_ready(cluster: LocalCluster) -> None:
    """Though the observer's connection to it is well."""
    asked = 0

    def password() -> str:
        nonlocal asked
        asked += 1
        if asked > 1:
            raise RuntimeError
        return "any"

    nodes = with_options(dsns(cluster), "primary", password=password)
    async with await Router.open(nodes, limits=Limits(warm=0)) as router:
        await router.wait_ready(primaries=0, replicas=2)
        with pytest.raises(
            TimeoutError, match=r"s: the primary, primary, does not answer \(the node's `password`"
        ):
            await router.wait_ready(timeout=0.5)


# --- bounds of pools ---


async def test_warm_connections_are_opened_again_when_they_end(cluster: LocalCluster) -> None:
    """In the background, before they are needed; not once they were dropped, until the node may serve again."""
    pool = NodePool("primary", dsns(cluster)["primary"], Limits(warm=3))
    pool.warm_up()
    await until(lambda: pool.idle == 3)
    async with pool.lease() as connection:
        first = connection.get_server_pid()
        assert pool.idle == 2
    admin = await cluster.primary.connect(DATABASE)
    await admin.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'rocket' AND pid <> $1",
        admin.get_server_pid(),
    )
    await admin.close()
    await until(lambda: not pool.has_idle or pool.idle < 3)
    await until(lambda: pool.idle == 3)
    async with pool.lease() as connection:
        assert connection.get_server_pid() != first
    pool.drop()
    await asyncio.sleep(0.2)
    assert pool.idle == 0
    pool.warm_up()
    await until(lambda: pool.idle == 3)
    await pool.close(1)
    await asyncio.sleep(0.2)
    assert pool.idle == 0


async def test_warm_connections_that_end_at_once_are_opened_ever_more_rarely(cluster: LocalCluster) -> None:
    """As those are that a node refuses."""
    opened: list[float] = []

    async def short_lived(dsn: str, **options: Any) -> object:
        connection = await asyncpg.connect(dsn, **options)
        opened.append(time.monotonic())
        asyncio.get_running_loop().call_later(0.05, connection.terminate)
        return connection

    pool = NodePool("primary", Node(dsns(cluster)["primary"], connect=short_lived), Limits(warm=1))
    pool.warm_up()
    await until(lambda: len(opened) == 5)
    await pool.close(1)
    assert opened[-1] - opened[0] > 0.5 * (0.1 + 0.2 + 0.4 + 0.8)


async def test_idle_and_old_connections_are_closed(cluster: LocalCluster) -> None:
    """All but the warm ones, and those that are old once they are given back; 0 is for ever."""
    dsn = dsns(cluster)["primary"]

    async def use(pool: NodePool, count: int) -> set[int]:
        async with contextlib.AsyncExitStack() as stack:
            lent = [await stack.enter_async_context(pool.lease()) for _ in range(count)]
            return {connection.get_server_pid() for connection in lent}

    pool = NodePool("primary", dsn, Limits(warm=1, idle_s=0.1))
    pool.warm_up()
    await use(pool, 3)
    assert pool.idle >= 3
    await until(lambda: pool.idle == 1)
    await pool.close(1)

    pool = NodePool("primary", dsn, Limits(warm=1, lifetime_s=0.001))
    pool.warm_up()
    pids = await use(pool, 1)
    await until(lambda: pool.idle == 1)  # a warm one in its place
    assert pids.isdisjoint(await use(pool, 1))
    await pool.close(1)

    pool = NodePool("primary", dsn, Limits(warm=0, idle_s=0, lifetime_s=0))
    pids = await use(pool, 2)
    await asyncio.sleep(0.15)
    assert await use(pool, 2) == pids
    await pool.close(1)
