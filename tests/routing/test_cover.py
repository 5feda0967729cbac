"""A cover: from then on every read sees what was committed before, with whatever token, in every process."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import sys
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio

from rocket import Freshness, Lsn, Reason, Role, Router, Unavailable, explain
from rocket.cluster import faults
from rocket.cluster.cluster import ClusterSettings
from rocket.cluster.promotion import promote
from rocket.cluster.supervisor import local_cluster, supervise
from rocket.lab.app import DATABASE
from rocket.lab.shutdown import background
from tests.support.clusters import fetch, received
from tests.support.program import spawned
from tests.support.servers import dsns, paused, schema, until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    import asyncpg

    from rocket import Answer, Connection
    from rocket.cluster.cluster import LocalCluster
    from rocket.cluster.node import Node
    from rocket.consistency import SessionToken

BEAT_S = 0.05
OTHERS_BEAT_S = 0.5
"""Long enough for observers with `BEAT_S`, on a busy machine as well."""
READS = 1000
AT_ONCE = 20
SESSIONS = 8
LATE_MS = 6000
"""How late replicas apply what is committed: the command takes its time as well."""


@pytest_asyncio.fixture
async def other(cluster: LocalCluster) -> AsyncIterator[asyncpg.Connection[Any]]:
    """Another program, which migrates, and knows nothing of rocket."""
    connection = await cluster.primary.connect(DATABASE)
    await connection.execute(
        "DROP TABLE IF EXISTS covered; CREATE TABLE covered (number int); INSERT INTO covered VALUES (1);"
        "GRANT ALL ON covered TO PUBLIC"
    )
    await cluster.wait_for_catchup()
    yield connection
    await connection.execute("DROP TABLE covered")
    await connection.close()


@pytest_asyncio.fixture
async def router(cluster: LocalCluster) -> AsyncIterator[Router]:
    """A router of a service that runs."""
    async with await Router.open(dsns(cluster), observer_interval_s=BEAT_S) as router:
        await router.wait_ready(replicas=2)
        yield router


async def columns(node: Connection) -> int:
    """Work that reads what a row has."""
    row = await node.fetchrow("SELECT * FROM covered")
    assert row is not None
    return len(row)


async def token_of_a_reader(router: Router) -> SessionToken:
    """Return the token of a session that has read on a replica, by which that replica may serve it again."""
    async with asyncio.timeout(10):
        while (answer := await router.read(columns, subject=None)).role is not Role.REPLICA:
            pass
    assert answer.token is not None
    return answer.token


async def read(router: Router, token: SessionToken, freshness: Freshness = Freshness.SESSION) -> Answer[int]:
    """Read with an older token."""
    return await router.read(columns, subject=None, token=token, freshness=freshness)


async def until_a_replica_serves(router: Router, token: SessionToken) -> None:
    """Read until a replica has caught up: no answer before is stale either."""
    async with asyncio.timeout(30):
        while Role.PRIMARY is (answer := await read(router, token)).role:
            assert 2 == answer.value
    assert 2 == answer.value


async def add_column(other: asyncpg.Connection[Any]) -> None:
    """Migrate."""
    await other.execute("ALTER TABLE covered ADD COLUMN more int")


async def test_readers_of_other_routers_see_what_was_committed(
    cluster: LocalCluster, router: Router, other: asyncpg.Connection[Any]
) -> None:
    """Before it a late replica serves them, rightly; after it the primary does, until a replica has caught up."""
    old = await token_of_a_reader(router)
    async with await Router.open(dsns(cluster), observer_interval_s=BEAT_S) as deploying:
        async with paused(cluster):
            await add_column(other)
            before = await read(router, old)
            assert (1, Role.REPLICA) == (before.value, before.role)
            lsn = await deploying.cover(beat_s=OTHERS_BEAT_S)
            for router_of_reader in (router, deploying):
                after = await read(router_of_reader, old)
                assert (2, Reason.NOT_CAUGHT_UP) == (after.value, after.reason)
                assert f"Floor {lsn}." in explain(after)
            within = await read(router, old, Freshness.within(3600))
            assert 2 == within.value
            assert 1 == (await read(router, old, Freshness.ANY)).value
        await until_a_replica_serves(router, old)


async def test_a_cover_is_kept_for_routers_that_begin_later(
    cluster: LocalCluster, router: Router, other: asyncpg.Connection[Any]
) -> None:
    """A process that is started after the deploy, and a client that was away meanwhile."""
    old = await token_of_a_reader(router)
    async with paused(cluster):
        await add_column(other)
        lsn = await router.cover(beat_s=BEAT_S)
        async with await Router.open(dsns(cluster)) as later:
            assert lsn == later.board.covered_lsn
            assert 2 == (await read(later, old)).value


async def test_what_was_committed_without_a_flush_is_covered(
    router: Router, other: asyncpg.Connection[Any]
) -> None:
    """With synchronous_commit off: the cover's own commits flush it."""
    await other.execute("SET synchronous_commit = off; UPDATE covered SET number = 2")
    inserted = Lsn.from_wire(await other.fetchval("SELECT pg_current_wal_insert_lsn()"))
    assert inserted <= await router.cover(beat_s=BEAT_S)


async def test_covers_do_not_end_each_other(router: Router) -> None:
    """Two at a time, and one after the other: the higher one counts."""
    lsns = await asyncio.gather(*(router.cover(beat_s=BEAT_S) for _ in range(5)))
    assert max(lsns) == router.board.covered_lsn
    assert max(lsns) <= await router.cover(beat_s=BEAT_S)


async def test_without_a_primary_nothing_is_covered(router: Router) -> None:
    """And it says so."""
    assert router.board.primary is not None
    await router.remove(router.board.primary.name)
    with pytest.raises(Unavailable):
        await router.cover(timeout=1)


async def test_a_router_that_does_not_see_it_says_so(cluster: LocalCluster, router: Router) -> None:
    """One whose board is not kept up to date."""
    board = type(router.board)()
    assert router.board.primary is not None
    board.publish_primary(router.board.primary)
    async with await Router.open(dsns(cluster), board=board) as blind:
        with pytest.raises(TimeoutError, match=r"stored, and not seen within 0\.5 s"):
            await blind.cover(timeout=0.5, beat_s=BEAT_S)


async def test_a_cover_does_not_outlive_its_epoch() -> None:
    """What is in the new epoch has all that is left of the former one, so replicas serve there at once."""
    settings = ClusterSettings(replicas=2, port=0, database=DATABASE, schema=schema())
    async with (
        local_cluster(settings) as cluster,
        background(supervise(cluster), "supervisor"),
        await Router.open(dsns(cluster), observer_interval_s=BEAT_S) as router,
    ):
        before = router.board.epoch
        lsn = await router.cover(beat_s=BEAT_S)
        assert lsn == router.board.covered_lsn
        await promote(cluster, "replica0")
        await until(lambda: router.board.epoch not in {None, before})
        assert Lsn(0) == router.board.covered_lsn
        session = router.session()
        await session.write(lambda db: db.execute("INSERT INTO users (email) VALUES ('a@b')"))
        await cluster.wait_for_catchup()
        await router.wait_ready(replicas=1)
        await session.read(lambda db: db.fetchval("SELECT count(*) FROM users"), max_wait=5)
        assert session.last is not None
        assert Role.REPLICA is session.last.role
        assert lsn < await router.cover(beat_s=BEAT_S)


@contextlib.asynccontextmanager
async def late(cluster: LocalCluster, other: asyncpg.Connection[Any]) -> AsyncIterator[None]:
    """Have replicas apply commits late, which they begin with some time after their settings have changed."""
    try:
        async with asyncio.timeout(30):
            for node in cluster.replicas:
                await faults.delay(node, LATE_MS, cluster.primary.port)
                while not await is_late(node, other):
                    pass
        yield
    finally:
        for node in cluster.replicas:
            await faults.delay(node, 0, cluster.primary.port)


async def is_late(node: Node, other: asyncpg.Connection[Any]) -> bool:
    """Return whether a commit is not applied a while after it was received."""
    await other.execute("UPDATE covered SET number = number + 1")
    lsn = str(Lsn.from_wire(await other.fetchval("SELECT pg_current_wal_flush_lsn()")))
    await received(node, lsn)
    await fetch(node, "SELECT pg_sleep(0.3)::text")
    return bool(await fetch(node, f"SELECT pg_last_wal_replay_lsn() < '{lsn}'::pg_lsn"))


# --- the command ---


async def covering(tmp_path: Path, nodes: dict[str, str], *flags: str) -> tuple[int, str]:
    """Run the command on nodes from the environment; return exit code and output."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("ROCKET_")}
    if nodes:
        replicas = " ".join(f"{name}={dsn}" for name, dsn in nodes.items() if name != "primary")
        env |= {"ROCKET_PRIMARY": nodes["primary"], "ROCKET_REPLICAS": replicas}
    env["PYTHONPATH"] = os.getcwd()  # noqa: PTH109 - where the checkout is
    async with spawned(sys.executable, "-m", "rocket", "cover", *flags, cwd=tmp_path, env=env) as program:
        return await program.ends(), program.output


def the_line(output: str) -> str:
    """Return the line that says what failed; beside it there are only warnings of the library."""
    assert "Traceback" not in output
    (line,) = (line for line in output.splitlines() if line.startswith("rocket: "))
    return line


async def test_the_command_says_how_far_replicas_are(
    cluster: LocalCluster, router: Router, other: asyncpg.Connection[Any], tmp_path: Path
) -> None:
    """In one line, with the LSN; it waits for them where that is asked for."""
    old = await token_of_a_reader(router)
    nodes = dsns(cluster)
    async with paused(cluster, "replica0"):
        await add_column(other)
        code, output = await covering(tmp_path, nodes)
        match = re.search(r"^covered (\S+): replica0 is \d+ bytes behind, replica1 has it$", output, re.MULTILINE)
        assert (0, True) == (code, match is not None), output
        assert match is not None
        assert Lsn.parse(match[1]) == router.board.covered_lsn
        assert 2 == (await read(router, old)).value
        code, output = await covering(tmp_path, nodes, "--wait-replicas", "--timeout", "500ms", "--beat", "50ms")
        assert 1 == code
        assert "not replayed everywhere in time: replica0 is" in the_line(output)
    code, output = await covering(tmp_path, nodes, "--wait-replicas", "--beat", "50ms")
    assert 0 == code
    assert re.search(r"^covered \S+: replica0 has it, replica1 has it$", output, re.MULTILINE), output


async def test_the_command_fails_in_a_line(cluster: LocalCluster, tmp_path: Path) -> None:
    """Without a primary, and without any node."""
    replica = dsns(cluster)["replica0"]
    code, output = await covering(tmp_path, {"primary": replica})
    assert (1, "rocket: no current primary is known") == (code, the_line(output))
    code, output = await covering(tmp_path, {})
    assert (2, "rocket: ROCKET_PRIMARY must hold the DSN of the primary\n") == (code, output)
    code, output = await covering(tmp_path, dsns(cluster), "--beat", "never")
    assert (2, True) == (code, "--beat must be a time" in output), output


async def test_a_deploy_whose_replicas_are_late(
    cluster: LocalCluster, router: Router, other: asyncpg.Connection[Any], tmp_path: Path
) -> None:
    """ADD COLUMN by another program, then the command; then a thousand reads with tokens from before it."""
    tokens = [await token_of_a_reader(router) for _ in range(SESSIONS)]
    async with late(cluster, other):
        await add_column(other)
        before = await read(router, tokens[0])
        assert (1, Role.REPLICA) == (before.value, before.role), explain(before)  # it would go on so
        code, output = await covering(tmp_path, dsns(cluster), "--beat", "200ms")
        assert 0 == code, output
        assert "bytes behind" in output
        served: Counter[tuple[int, Role]] = Counter()

        async def client(number: int) -> None:
            for _ in range(READS // AT_ONCE):
                session = router.session(token=tokens[number % SESSIONS])
                await session.read(lambda db: db.fetchval("SELECT more FROM covered"))
                answer = await read(router, tokens[number % SESSIONS])
                served[answer.value, answer.role] += 1

        async with asyncio.TaskGroup() as group:
            for number in range(AT_ONCE):
                group.create_task(client(number))
        assert READS == sum(served.values())
        assert {2} == {seen for seen, _ in served}
        assert served[2, Role.PRIMARY] > 0  # replicas were late, indeed
    await until_a_replica_serves(router, tokens[0])
