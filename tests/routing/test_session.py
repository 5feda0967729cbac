"""Sessions on a router that observes by itself."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import secrets
import subprocess
from typing import TYPE_CHECKING, Any, TypeVar

import pytest
import pytest_asyncio

from rocket import (
    InvalidToken,
    Policy,
    Reason,
    Role,
    Router,
    Unavailable,
    WriteInRead,
    explain,
    nodes_from_environment,
)
from rocket.cluster.binaries import SUPERUSER
from rocket.consistency import SessionToken
from rocket.errors import InvalidSetting, NodesUnusable, TablesUnusable
from rocket.lab.app import DATABASE
from rocket.routing.observer import Observer
from rocket.schema import script
from tests.support.between import pgbouncer
from tests.support.commits import GATES, gates
from tests.support.servers import dsns, paused

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    import asyncpg

    from rocket import Connection
    from rocket.cluster.cluster import LocalCluster

ResultT = TypeVar("ResultT")

FOREIGN = "1~1-aaaaaaaaaa~0/1~0/0"
"""A token of another cluster."""
BEAT_S = 0.05
DEADLINE_S = 15.0


class Notes:
    """A table of its own for a test."""

    def __init__(self) -> None:
        self.table = f"notes_{secrets.token_hex(4)}"

    async def make(self, db: asyncpg.Connection[Any]) -> None:
        """Make the table, for everybody."""
        await db.execute(f"CREATE TABLE {self.table} (id int)")
        await db.execute(f"GRANT ALL ON {self.table} TO PUBLIC")

    async def add(self, db: Connection) -> None:
        """Write a row."""
        await db.execute(f"INSERT INTO {self.table} VALUES (1)")  # noqa: S608

    async def count(self, db: Connection) -> int:
        """Return how many rows are seen."""
        found: int = await db.fetchval(f"SELECT count(*)::int FROM {self.table}")  # noqa: S608
        return found


@pytest_asyncio.fixture
async def opened(cluster: LocalCluster) -> AsyncIterator[Router]:
    """A router that was opened by one call."""
    policy = Policy(max_wait_s=1.0)
    async with await Router.open(dsns(cluster), policy=policy, observer_interval_s=BEAT_S) as router:
        yield router


@pytest_asyncio.fixture
async def notes(cluster: LocalCluster) -> Notes:
    """An empty table, on each node."""
    notes = Notes()
    admin = await cluster.primary.connect(DATABASE)
    await notes.make(admin)
    await admin.close()
    await cluster.wait_for_catchup()
    return notes


async def test_a_session_sees_what_it_wrote_and_says_how(opened: Router, notes: Notes) -> None:
    """The first reads find a board; nothing has to be done for the floor; the token carries it elsewhere."""
    session = opened.session("ann")
    for number in range(1, 6):
        await session.write(notes.add)
        assert number == await session.read(notes.count)
    assert session.last is not None
    assert Role.REPLICA == session.last.role
    words = explain(session.last)
    assert words.startswith("Floor ")
    assert f"{session.last.node} " in words
    assert words.endswith("and served the read.")
    elsewhere = opened.session("ann", session.token)  # a job, say, that got it with its payload
    assert 5 == await elsewhere.read(notes.count)


async def test_concurrent_requests_of_a_session_lose_no_floor(opened: Router, notes: Notes) -> None:
    """An answer that comes late does not take back what another one has brought."""
    session = opened.session("ann")
    go_on = asyncio.Event()

    async def held(db: Connection) -> int:
        found = await notes.count(db)
        await go_on.wait()
        return found

    slow = asyncio.create_task(session.read(held))
    await asyncio.sleep(0)
    await session.write(notes.add)
    covered = SessionToken.parse(session.token or "").write_floor
    go_on.set()
    await slow
    assert covered <= SessionToken.parse(session.token or "").write_floor
    assert 1 == await session.read(notes.count)


async def test_without_a_token_a_read_sees_all_that_was_acknowledged(
    cluster: LocalCluster, opened: Router, notes: Notes
) -> None:
    """Replicas serve it; where they are late, the primary does, and what it shows is in the token from then on."""
    for number in range(1, 4):
        await opened.session("ann").write(notes.add)
        for subject in ("ann", "bob, who never wrote", None):
            anew = opened.session(subject)
            assert number == await anew.read(notes.count)
            assert anew.last is not None
            assert Role.REPLICA == anew.last.role
    async with paused(cluster):
        await opened.session("ann").write(notes.add)
        anew = opened.session("bob")
        for _ in range(2):
            assert 4 == await anew.read(notes.count)
            assert anew.last is not None
            assert (Role.PRIMARY, Reason.NOT_CAUGHT_UP) == (anew.last.role, anew.last.reason)


async def test_work_that_writes_is_refused_by_read(cluster: LocalCluster, opened: Router, notes: Notes) -> None:
    """On a replica as on the primary, where the connection takes writes again afterwards."""
    on_replica, on_primary = opened.session("ann"), opened.session()
    await on_replica.write(notes.add)
    await on_replica.read(notes.count)
    for session in (on_replica, on_primary):
        with pytest.raises(WriteInRead, match="session's write"):
            await session.read(notes.add)
    async with paused(cluster):
        for _ in range(3):
            await on_primary.write(notes.add)
            assert "on" == await opened.session().read(
                lambda db: db.fetchval("SHOW default_transaction_read_only")
            )
    assert 4 == await on_primary.read(notes.count)


async def test_work_that_writes_is_refused_behind_a_pooler_too(cluster: LocalCluster) -> None:
    """The client that gets the session next can write in it."""
    notes = Notes()
    with pgbouncer(cluster, SUPERUSER) as nodes:
        async with await Router.open(nodes, observer_interval_s=BEAT_S) as router:
            await router.session("ann").write(notes.make)
            for _ in range(3):
                with pytest.raises(WriteInRead):
                    await router.session("ann").read(notes.add)
                await router.session("ann").write(notes.add)
            assert 3 == await router.session("ann").read(notes.count, on="primary")


async def test_an_invalid_token_is_refused_or_dropped(opened: Router, notes: Notes) -> None:
    """Garbage at once, what is foreign once the primary has said so; a lenient session begins anew."""
    with pytest.raises(InvalidToken):
        opened.session("ann", "garbage")
    with pytest.raises(InvalidToken):
        await opened.session("ann", FOREIGN).read(notes.count)
    for bad in ("garbage", FOREIGN):
        session = opened.session("ann", bad, lenient=True)
        assert 0 == await session.read(notes.count)
        assert session.token is not None
        assert FOREIGN not in session.token


async def test_a_foreign_token_takes_no_other_with_it(cluster: LocalCluster, opened: Router, notes: Notes) -> None:
    """Among a browser's cookies, say: what the session wrote before it had a name is covered all the same."""
    await opened.session("ann").write(notes.add)
    await cluster.wait_for_catchup()
    async with paused(cluster):
        unnamed = opened.session()
        await unnamed.write(notes.add)
        session = opened.session("ann", [FOREIGN, unnamed.token or ""], lenient=True)
        assert 2 == await session.read(notes.count)
        assert session.token is not None
        assert FOREIGN not in session.token


async def waits_for_a_lock(admin: asyncpg.Connection[asyncpg.Record]) -> bool:
    """Return whether an advisory lock is waited for."""
    found = await admin.fetchval(
        f"SELECT EXISTS (SELECT FROM pg_locks WHERE locktype = 'advisory' AND NOT granted AND classid <> {GATES})"  # noqa: S608
    )
    return bool(found)


@pytest.mark.parametrize("how", ["read", "write"])
@pytest.mark.parametrize("subject", ["ann", None])
async def test_on_the_primary_after_a_replica_a_session_waits_for_commits_under_way(
    *, cluster: LocalCluster, opened: Router, notes: Notes, subject: str | None, how: str
) -> None:
    """A replica may have shown them already, also a subject's first (design fact F13)."""
    reader = opened.session(subject)
    await reader.read(notes.count)  # by the primary, maybe
    await opened.session("another").write(notes.add)
    while reader.last is None or reader.last.role is not Role.REPLICA:
        await reader.read(notes.count)
    admin = await cluster.primary.connect(DATABASE)
    async with (
        gates(cluster) as held,
        await held.on(Router).open(dsns(cluster), observer_interval_s=BEAT_S) as writers,
        paused(cluster),
    ):
        opened.policy = Policy(lease_s=0.0)  # no replica will do
        writing = asyncio.create_task(writers.session(subject).write(notes.add))
        await held.wait(1)
        reading = asyncio.create_task(reader.read(notes.count) if how == "read" else reader.write(notes.count))
        async with asyncio.timeout(DEADLINE_S):
            while not await waits_for_a_lock(admin):
                assert not reading.done()
        await held.open(0)
        await writing
        assert 2 == await reading
    await admin.close()


async def test_behind_a_pooler_a_read_on_the_primary_holds_no_write_up(cluster: LocalCluster) -> None:
    """It waits for those under way, by a lock that would otherwise be held for as long as it takes."""
    with pgbouncer(cluster, SUPERUSER) as nodes:
        async with await Router.open(nodes, observer_interval_s=BEAT_S) as router:
            reader = router.session("ann")
            await reader.write(lambda db: db.fetchval("SELECT pg_logical_emit_message(true, 'test', '')"))
            async with asyncio.timeout(DEADLINE_S):
                while reader.last is None or "primary" == reader.last.node:
                    await reader.read(lambda db: db.fetchval("SELECT 1"))
            router.policy = Policy(lease_s=0.0)  # no replica will do
            begun, written = asyncio.Event(), asyncio.Event()

            async def slow(db: Connection) -> int:
                begun.set()
                await written.wait()
                return int(await db.fetchval("SELECT 1"))

            reading = asyncio.create_task(reader.read(slow))
            await asyncio.wait_for(begun.wait(), DEADLINE_S)
            await router.session("ann").write(lambda db: db.fetchval("SELECT 1"))
            written.set()
            assert 1 == await reading
            assert "primary" == reader.last.node


async def test_several_routers_on_plain_asyncio(cluster: LocalCluster) -> None:
    """Nothing is shared between them, and no loop is preferred; no task is left behind."""

    async def use() -> set[str]:
        async with await Router.open(dsns(cluster)) as one, await Router.open(dsns(cluster)) as other:
            assert 1 == await one.session().read(lambda db: db.fetchval("SELECT 1"))
            assert 2 == await other.session().write(lambda db: db.fetchval("SELECT 2"))
            await one.aclose()
        return {task.get_name() for task in asyncio.all_tasks()} - {"main"}

    async def main() -> set[str]:
        return await asyncio.create_task(use(), name="main")

    def run() -> set[str]:
        with asyncio.Runner(loop_factory=asyncio.new_event_loop) as runner:
            return runner.run(main())

    left = await asyncio.to_thread(run)
    assert "rocket observer" not in left


async def test_nodes_that_are_down_do_not_keep_a_router_from_opening() -> None:
    """Nor is anything answered then, and why is told."""
    async with await Router.open({"primary": "postgresql://x@/x?host=/nowhere"}) as router:
        with pytest.raises(Unavailable) as caught:
            await router.session().read(lambda db: db.fetchval("SELECT 1"))
    said = explain(caught.value)
    assert " No node answered: no current primary is known (primary: " in said
    assert said.endswith("No such file or directory).")


async def test_each_connection_can_be_prepared_for_work(cluster: LocalCluster) -> None:
    """By type codecs, say: on replicas as on the primary, after a reset as well."""

    async def with_json(db: Connection) -> None:
        await db.set_type_codec("jsonb", schema="pg_catalog", encoder=json.dumps, decoder=json.loads)

    async def ask(db: Connection) -> object:
        return await db.fetchval("SELECT '{\"a\": [1]}'::jsonb")

    async with await Router.open(dsns(cluster), observer_interval_s=BEAT_S, init=with_json) as router:
        session = router.session("ann")
        for _ in range(3):
            assert {"a": [1]} == await session.write(ask)
        while session.last is None or session.last.role is not Role.REPLICA:
            assert {"a": [1]} == await session.read(ask)


async def test_a_closed_router_says_so(cluster: LocalCluster) -> None:
    """It is a mistake of the caller's, and no outage: asking again later would not help."""
    async with await Router.open(dsns(cluster)) as router:
        session = router.session()
        await session.write(lambda db: db.fetchval("SELECT 1"))
    with pytest.raises(RuntimeError, match="the router is closed"):
        await session.read(lambda db: db.fetchval("SELECT 1"))
    with pytest.raises(RuntimeError, match="the router is closed"):
        await session.write(lambda db: db.fetchval("SELECT 1"))


def test_before_any_answer_there_is_little_to_explain() -> None:
    """`Session.last` may be handed over at any time."""
    assert "Nothing was read or written yet." == explain(None)


async def test_a_router_of_no_nodes_is_refused() -> None:
    """There is nothing that it could ever do."""
    with pytest.raises(ValueError, match="there must be a node"):
        await Router.open({})


def spoiled(dsn: str, how: str) -> str:
    """Return an address with one thing wrong."""
    match how:
        case "no database":
            return dsn.replace(f"/{DATABASE}", "/not-there")
        case "no role":
            return re.sub("//[a-z_]+@", "//rocket_not_there@", dsn)
        case "odd sslmode":
            return f"{dsn}&sslmode=odd"
    return "postgresql://x@/x?host=/nowhere"


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("no database", 'database "not-there" does not exist'),
        ("no role", 'role "rocket_not_there" does not exist'),
        ("odd sslmode", "`sslmode` parameter must be one of"),
    ],
)
async def test_what_will_never_do_is_reported_when_a_router_is_opened(
    cluster: LocalCluster, how: str, words: str
) -> None:
    """Of each node; what is merely down, or one node that will do, is reason enough to open it."""
    nodes = dsns(cluster)
    wrong = {name: spoiled(dsn, how) for name, dsn in nodes.items()}
    with pytest.raises(NodesUnusable) as caught:
        await Router.open(wrong)
    assert len(nodes) == str(caught.value).count(words)
    assert all(f"{name}: " in str(caught.value) for name in nodes)
    async with await Router.open(wrong | {"replica0": spoiled("", "down")}):
        pass
    async with await Router.open(wrong | {"primary": nodes["primary"]}) as router:
        assert 1 == await router.session().read(lambda db: db.fetchval("SELECT 1"))


async def test_an_observer_that_dies_is_heard(
    cluster: LocalCluster, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In `observing`, and in the log."""

    async def die(_self: Observer) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(Observer, "run", die)
    with caplog.at_level(logging.ERROR, "rocket.observer"):
        async with await Router.open(dsns(cluster)) as router:
            with pytest.raises(RuntimeError, match="a bug"):
                await router.observing()
    assert "the observer died" in caplog.text


@pytest.mark.parametrize(
    ("theirs", "words"),
    [
        ("epochs (id int)", "column .* does not exist"),
        ("epochs (system_id bigint, timeline int, epoch text)", "column .* does not exist"),
        ("epochs (system_id bigint, timeline int, epoch text, generation int)", "column .* does not exist"),
        ("epochs (system_id bigint, timeline text, epoch text)", "operator does not exist"),
    ],
)
async def test_a_table_of_somebody_elses_stays_as_it_is(cluster: LocalCluster, theirs: str, words: str) -> None:
    """What `rocket schema` prints makes nothing beside it, and a router says whose fault it is."""
    name = f"taken{secrets.token_hex(4)}"
    admin = await cluster.primary.connect(DATABASE)
    await admin.execute(f"CREATE DATABASE {name}")
    owner = await cluster.primary.connect(name)
    try:
        await owner.execute(f"CREATE TABLE {theirs}")
        code, said = await asyncio.to_thread(psql, cluster, name, script())
        assert (3, 1) == (code, said.count("ERROR"))
        made = await owner.fetch("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")
        assert ["epochs"] == [row["tablename"] for row in made]
        with pytest.raises(TablesUnusable, match=rf"primary has the name of one of rocket's.*{words}"):
            await Router.open({"primary": cluster.primary.dsn(name)})
    finally:
        await owner.close()
        await admin.execute(f"DROP DATABASE {name} WITH (FORCE)")
        await admin.close()


def psql(cluster: LocalCluster, database: str, text: str) -> tuple[int, str]:
    """Have psql run a script, as a reader of the README does; return exit code and errors."""
    program = cluster.primary.installation.binaries.program("psql")
    done = subprocess.run(  # noqa: S603 - our own
        [program, "-qX", cluster.primary.dsn(database)], input=text, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stderr


async def test_a_database_without_the_tables_says_what_to_run_and_that_suffices(cluster: LocalCluster) -> None:
    """As a role that is no superuser, by what `rocket schema --role` prints, applied twice."""
    name = f"bare{secrets.token_hex(4)}"
    admin = await cluster.primary.connect(DATABASE)
    await admin.execute(f"CREATE DATABASE {name}; ")
    await admin.execute(f'CREATE ROLE "{name} ""x""" LOGIN')
    nodes = {node: cluster.node(node).dsn(name) for node in cluster.nodes}
    with pytest.raises(TablesUnusable, match="python -m rocket schema"):
        await Router.open(nodes)
    owner = await cluster.primary.connect(name)
    for _ in range(2):
        assert 0 == (await asyncio.to_thread(psql, cluster, name, script(f'{name} "x"')))[0]
        await owner.execute("DROP TABLE IF EXISTS covers")  # as an earlier version left it
        with pytest.raises(TablesUnusable, match=r"lacks rocket's tables.*covers"):
            await Router.open(nodes)
    assert 0 == (await asyncio.to_thread(psql, cluster, name, script(f'{name} "x"')))[0]
    assert not await owner.fetchval("SELECT to_regclass('users') IS NOT NULL")
    granted = await owner.fetch(
        "SELECT table_name || ' ' || string_agg(privilege_type, ' ' ORDER BY privilege_type) AS what"
        "  FROM information_schema.role_table_grants WHERE grantee = $1 GROUP BY table_name ORDER BY 1",
        f'{name} "x"',
    )
    assert {
        "covers INSERT SELECT",
        "epochs INSERT SELECT",
        "replica_statuses DELETE INSERT SELECT UPDATE",
    } == {row["what"] for row in granted}
    await owner.close()
    await cluster.wait_for_catchup()
    async with await Router.open(nodes) as router:
        assert 1 == await router.session().write(lambda db: db.fetchval("SELECT 1"))
    await admin.execute(f"DROP DATABASE {name} WITH (FORCE)")
    await admin.execute(f'DROP ROLE "{name} ""x"""')
    await admin.close()


def test_nodes_come_from_the_environment() -> None:
    """A DSN may hold equals signs."""
    environment = {
        "ROCKET_PRIMARY": "postgresql://p",
        "ROCKET_REPLICAS": " r0=postgresql://r?a=b  r1=postgres://x ",
    }
    expected = {"primary": "postgresql://p", "r0": "postgresql://r?a=b", "r1": "postgres://x"}
    assert expected == nodes_from_environment(environment)


@pytest.mark.parametrize(
    "replicas",
    ["postgresql://u:secret@h/d?a=b", "r0=", "r0=secret", "r0=postgres://x r0=postgres://x", "primary=secret"],
)
def test_wrong_nodes_in_the_environment_are_reported_without_their_secrets(replicas: str) -> None:
    """There is a password in it, perhaps."""
    with pytest.raises(InvalidSetting) as caught:
        nodes_from_environment({"ROCKET_PRIMARY": "postgresql://p", "ROCKET_REPLICAS": replicas})
    assert "secret" not in str(caught.value)
    with pytest.raises(InvalidSetting, match="ROCKET_PRIMARY"):
        nodes_from_environment({})
