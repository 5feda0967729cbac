"""Each read says how fresh it has to be: for its session, for all sessions, within some seconds, or not at all."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import TYPE_CHECKING, Any

import asyncpg
import pytest
import pytest_asyncio

from rocket import Freshness, Policy, Reason, Role, Router, Unavailable, explain
from rocket.consistency import Epoch, Lsn, SessionToken
from rocket.lab.app import DATABASE
from rocket.routing.catchup import FlushQuestion
from tests.support.servers import dsns, paused, until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from rocket import Connection, Session
    from rocket.cluster.cluster import LocalCluster

GLOBAL, ANY, within = Freshness.GLOBAL, Freshness.ANY, Freshness.within
BEAT_S = 0.05


@pytest_asyncio.fixture
async def router(cluster: LocalCluster) -> AsyncIterator[Router]:
    """A router that observes often, and keeps no floors."""
    await cluster.wait_for_catchup()
    async with await Router.open(dsns(cluster), observer_interval_s=BEAT_S) as router:
        await until(lambda: len(router.board.replicas) == 2)
        yield router


@pytest_asyncio.fixture
async def other(cluster: LocalCluster) -> AsyncIterator[asyncpg.Connection[Any]]:
    """Another program, which writes into a table of its own, and knows nothing of rocket."""
    connection = await cluster.primary.connect(DATABASE)
    await connection.execute(
        "DROP TABLE IF EXISTS freshness; CREATE TABLE freshness (number int); GRANT ALL ON freshness TO PUBLIC"
    )
    await cluster.wait_for_catchup()
    yield connection
    await connection.execute("DROP TABLE freshness")
    await connection.close()


async def count(node: Connection) -> int:
    """Work that reads."""
    return int(await node.fetchval("SELECT count(*) FROM freshness"))


async def write(other: asyncpg.Connection[Any]) -> None:
    """Have the other program commit one more row."""
    await other.execute("INSERT INTO freshness VALUES (1)")


async def until_older(router: Router, seconds: float) -> None:
    """Wait until no replica is known to show what was committed so long ago."""
    ages_s = router.board.age_s
    await until(lambda: all((ages_s(one, time.monotonic()) or 0) > seconds for one in router.board.replicas))


def where(session: Session) -> tuple[Role, Reason]:
    """Return where the session's last read was, and why."""
    assert session.last is not None
    return session.last.role, session.last.reason


class TestGlobal:
    """A read that sees all that anybody was told is committed before it began."""

    async def test_it_sees_what_others_have_committed(
        self, router: Router, other: asyncpg.Connection[Any]
    ) -> None:
        """On replicas, without a token, each time."""
        roles = []
        for number in range(1, 41):
            await write(other)
            session = router.session()
            assert number == await session.read(count, freshness=GLOBAL)
            roles.append(where(session)[0])
        assert roles.count(Role.REPLICA) > 30

    async def test_a_sessions_default_is_for_reads_that_say_nothing(
        self, router: Router, other: asyncpg.Connection[Any], cluster: LocalCluster
    ) -> None:
        """Replicas are late: only the primary shows it, and only to who asks for it."""
        session = router.session(freshness=GLOBAL)
        before = await session.read(count)
        async with paused(cluster):
            await write(other)
            assert before + 1 == await session.read(count)
            assert (Role.PRIMARY, Reason.NOT_CAUGHT_UP) == where(session)
            assert before == await router.session().read(count, freshness=ANY)

    async def test_later_reads_of_the_session_do_not_go_back(
        self, router: Router, other: asyncpg.Connection[Any], cluster: LocalCluster
    ) -> None:
        """What it has seen is in the token from then on."""
        session = router.session()
        async with paused(cluster):
            await write(other)
            seen = await session.read(count, freshness=GLOBAL)
            later = router.session(token=session.token)
            assert seen == await later.read(count)
            assert Reason.NOT_CAUGHT_UP is where(later)[1]

    async def test_many_reads_at_once_are_right_each(self, router: Router, other: asyncpg.Connection[Any]) -> None:
        """They share questions to the primary, and each sees what was committed before it began."""
        committed = 0
        at_once = asyncio.Semaphore(80)  # fewer than may wait for a node

        async def read() -> None:
            async with at_once:
                at_least = committed
                assert at_least <= await router.session().read(count, freshness=GLOBAL)

        async with asyncio.TaskGroup() as group:
            for _ in range(10):
                for _ in range(20):
                    group.create_task(read(), name="read")
                await write(other)
                committed += 1

    async def test_without_a_primary_none_can_say(self, router: Router) -> None:
        """An answer of replicas would be a guess."""
        primary = router.board.primary
        assert primary is not None
        await router.remove(primary.name)
        with pytest.raises(Unavailable):
            await router.session().read(count, freshness=GLOBAL, timeout=1)

    async def test_a_router_that_is_closed_leaves_no_question(self, cluster: LocalCluster) -> None:
        """Reads that wait for an answer end with it."""
        async with await Router.open(dsns(cluster), observer_interval_s=BEAT_S) as router:
            reading = asyncio.create_task(router.session().read(count, freshness=GLOBAL))
            await asyncio.sleep(0)
        with contextlib.suppress(Unavailable, asyncpg.PostgresError, RuntimeError, asyncio.CancelledError):
            await asyncio.wait_for(reading, 5)
        assert not [task for task in asyncio.all_tasks() if task.get_name() == "ask for the flush LSN"]


class TestTheQuestion:
    """One question at a time serves all who came before it began."""

    @staticmethod
    def token(number: int) -> SessionToken:
        """Return an answer that can be told from others."""
        return SessionToken(Epoch("1-abcdefgh"), Lsn(0), Lsn(number))

    async def test_who_comes_while_one_is_under_way_gets_the_next(self) -> None:
        """The one under way may have been answered before."""
        gates = [asyncio.Event() for _ in range(3)]
        begun = 0

        async def ask() -> SessionToken:
            nonlocal begun
            begun += 1
            number = begun
            await gates[number - 1].wait()
            return self.token(number)

        question = FlushQuestion(ask)
        first = [asyncio.create_task(question.answer()) for _ in range(3)]
        await until(lambda: begun == 1)
        later = [asyncio.create_task(question.answer()) for _ in range(3)]
        await asyncio.sleep(0)
        gates[0].set()
        assert [self.token(1)] * 3 == await asyncio.gather(*first)
        await until(lambda: begun == 2)
        assert not any(task.done() for task in later)
        last = asyncio.create_task(question.answer())
        await asyncio.sleep(0)
        gates[1].set()
        gates[2].set()
        assert [self.token(2)] * 3 == await asyncio.gather(*later)
        assert self.token(3) == await last
        assert 3 == question.asked

    async def test_many_at_a_time_ask_half_as_often(self) -> None:
        """After a question that others wait for there is a pause, and who comes in it is served with them."""
        gates = [asyncio.Event() for _ in range(2)]
        begun: list[float] = []

        async def ask() -> SessionToken:
            begun.append(time.monotonic())
            await gates[len(begun) - 1].wait()
            return self.token(len(begun))

        question = FlushQuestion(ask, longest_pause_s=10.0)
        first = asyncio.create_task(question.answer())
        await until(lambda: bool(begun))
        second = asyncio.create_task(question.answer())
        await until(lambda: time.monotonic() - begun[0] > 0.1)
        gates[0].set()
        await first
        answered_at = time.monotonic()
        third = asyncio.create_task(question.answer())
        gates[1].set()
        assert [self.token(2)] * 2 == [await second, await third]
        assert 2 == question.asked
        assert begun[1] - answered_at > 0.09

    async def test_who_is_cancelled_takes_it_from_no_other(self) -> None:
        """Also who came first."""
        gate = asyncio.Event()

        async def ask() -> SessionToken:
            await gate.wait()
            return self.token(1)

        question = FlushQuestion(ask)
        first, second = (asyncio.create_task(question.answer()) for _ in range(2))
        await asyncio.sleep(0)
        first.cancel()
        await asyncio.sleep(0)
        gate.set()
        assert self.token(1) == await second

    async def test_a_failure_is_of_those_who_asked(self) -> None:
        """The next question is asked all the same."""
        outcomes = [OSError("away"), None]

        async def ask() -> SessionToken:
            await asyncio.sleep(0)
            if (error := outcomes.pop(0)) is not None:
                raise error
            return self.token(2)

        question = FlushQuestion(ask)
        first = asyncio.create_task(question.answer())
        await until(lambda: len(outcomes) == 1)
        second = asyncio.create_task(question.answer())
        with pytest.raises(OSError, match="away"):
            await first
        assert self.token(2) == await second

    async def test_it_ends_when_it_is_closed(self) -> None:
        """None waits for an answer that does not come."""

        async def ask() -> SessionToken:
            await asyncio.Event().wait()
            raise AssertionError

        question = FlushQuestion(ask)
        first = asyncio.create_task(question.answer())
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        second = asyncio.create_task(question.answer())
        await asyncio.sleep(0)
        await question.close()
        assert {first, second} == (await asyncio.wait({first, second}, timeout=1))[0]


class TestWithin:
    """A read that may miss what was committed in the last seconds."""

    @pytest.mark.usefixtures("other")
    async def test_it_may_miss_what_the_session_wrote(self, router: Router, cluster: LocalCluster) -> None:
        """A late replica serves it for so long, and no longer."""
        session = router.session()
        async with paused(cluster):
            await session.write(lambda db: db.execute("INSERT INTO freshness VALUES (1)"))
            assert 0 == await session.read(count, freshness=within(60))
            assert Role.REPLICA is where(session)[0]
            await until_older(router, 0.2)
            assert 1 == await session.read(count, freshness=within(0.2))
            assert (Role.PRIMARY, Reason.TOO_FAR_BEHIND) == where(session)

    async def test_it_does_not_go_back(
        self, router: Router, other: asyncpg.Connection[Any], cluster: LocalCluster
    ) -> None:
        """What the session has seen it sees, and what it has written it sees again without `within`."""
        session = router.session()
        async with paused(cluster):
            await write(other)
            assert 1 == await session.read(count, on="primary")
            assert 1 == await session.read(count, freshness=within(60))
            await session.write(lambda db: db.execute("INSERT INTO freshness VALUES (1)"))
            assert 2 == await session.read(count)

    @pytest.mark.usefixtures("other")
    async def test_a_quiet_cluster_is_fresh(self, router: Router) -> None:
        """As fresh as the last beat that came through, not as the last commit."""
        quiet_since = time.monotonic()
        await until(lambda: time.monotonic() - quiet_since > 1)
        session = router.session()
        assert 0 == await session.read(count, freshness=within(1))
        assert Role.REPLICA is where(session)[0]

    async def test_a_policy_may_ask_for_it_everywhere(
        self, router: Router, other: asyncpg.Connection[Any], cluster: LocalCluster
    ) -> None:
        """Then it holds for all reads."""
        session = router.session()
        await session.read(count, freshness=GLOBAL)
        router.policy = Policy(max_age_s=0.2)
        async with paused(cluster):
            await write(other)
            await until_older(router, 0.2)
            assert 1 == await session.read(count)


class TestAny:
    """A read that any node may serve."""

    @pytest.mark.usefixtures("other")
    async def test_it_is_served_without_a_primary_and_leaves_the_token_alone(self, router: Router) -> None:
        """Whatever the token says."""
        token = str(SessionToken(Epoch("1-foreign0"), Lsn.parse("FFFFFFF0/0")))
        session = router.session(None, token)
        primary = router.board.primary
        assert primary is not None
        await router.remove(primary.name)
        assert 0 == await session.read(count, freshness=ANY)
        assert (Role.REPLICA, Reason.UNCHECKED) == where(session)
        assert token == session.token

    @pytest.mark.usefixtures("other")
    async def test_an_error_of_work_leaves_it_alone_as_well(self, router: Router) -> None:
        """Work that raises has shown something, of which nothing is promised."""
        session = router.session()
        await session.write(lambda db: db.execute("SELECT 1"))
        token = session.token

        async def refuse(node: Connection) -> None:
            raise LookupError(await count(node))

        with pytest.raises(LookupError):
            await session.read(refuse, freshness=ANY)
        assert token == session.token


async def test_what_a_read_asked_for_is_explained(
    router: Router, other: asyncpg.Connection[Any], cluster: LocalCluster
) -> None:
    """In the words of `explain`, with the floor that followed from it."""
    session = router.session()
    explained = []
    async with paused(cluster):
        await write(other)
        for options in ({"freshness": GLOBAL}, {"freshness": within(60)}, {"freshness": ANY}, {"on": "primary"}):
            await session.read(count, **options)
            explained.append(explain(session.last))
    everything, recent, anything, primary = explained
    assert everything.startswith("It was to see all that was committed when it began. Floor ")
    assert everything.endswith("No replica was there, also after 200 ms: the primary served the read.") or (
        "behind" in everything
    )
    assert recent.startswith("It asked for nothing older than 60 s. Floor ")
    assert anything.startswith("It asked for any node. replica")
    assert anything.endswith("was up: it served the read, unchecked.")
    assert "It was to go to the primary: the primary served the read." == primary


class TestOptions:
    """What a single read may ask for besides."""

    async def test_a_long_report_has_the_time_that_it_asks_for(self, router: Router) -> None:
        """It runs once, on one replica; without `timeout` it would be taken for a node that fails."""
        runs = []

        async def report(node: Connection) -> None:
            runs.append(node)
            await node.execute("SELECT pg_sleep(1.3)")

        session = router.session()
        await session.write(lambda db: db.execute("SELECT 1"))
        await session.read(report, timeout=4)
        assert (1, Role.REPLICA) == (len(runs), where(session)[0])

    async def test_a_short_time_is_kept(self, router: Router) -> None:
        """A call that has to be quick ends in time, on whichever node."""
        began = time.monotonic()
        with pytest.raises(Unavailable):
            await router.session().read(
                lambda node: node.execute("SELECT pg_sleep(3)"), freshness=ANY, timeout=0.3
            )
        assert time.monotonic() - began < 2

    async def test_a_read_may_ask_for_the_primary(self, router: Router) -> None:
        """Also where replicas would do."""
        session = router.session()
        await session.write(lambda db: db.execute("SELECT 1"))
        await session.read(lambda node: node.execute("SELECT 1"), on="primary")
        assert (Role.PRIMARY, Reason.ASKED) == where(session)

    @pytest.mark.usefixtures("other")
    async def test_a_read_may_wait_longer_than_others(self, router: Router, cluster: LocalCluster) -> None:
        """And so be served by a replica that is late."""
        session = router.session()
        async with paused(cluster):
            await session.write(lambda db: db.execute("INSERT INTO freshness VALUES (1)"))
            began = time.monotonic()
            reading = asyncio.create_task(session.read(count, max_wait=5, timeout=8))
            await until(lambda: time.monotonic() - began > 0.1)
            assert not reading.done()
        assert 1 == await reading
        assert Reason.WAITED is where(session)[1]

    @pytest.mark.parametrize(
        ("options", "error"),
        [
            ({"timeout": 0}, ValueError),
            ({"timeout": float("inf")}, ValueError),
            ({"max_wait": -1}, ValueError),
            ({"on": "replica"}, ValueError),
            ({"freshness": "global"}, ValueError),
            ({"fresh": GLOBAL}, TypeError),
        ],
    )
    async def test_what_is_no_option_is_refused(
        self, router: Router, options: dict[str, Any], error: type[Exception]
    ) -> None:
        """By name, before anything is asked."""
        with pytest.raises(error, match=next(iter(options))):
            await router.session().read(count, **options)


@pytest.mark.parametrize("text", ["session", "global", "any", "within 10s", "within 0.5s"])
def test_its_text_is_read_again(text: str) -> None:
    """As headers and flags have it."""
    assert text == str(Freshness.parse(text))


@pytest.mark.parametrize(
    "text", ["", "Session", "within", "within 0s", "within -1s", "within 10", "10s", "within 1e9s"]
)
def test_other_texts_are_refused(text: str) -> None:
    """None is guessed at."""
    with pytest.raises(ValueError, match="session, global, any"):
        Freshness.parse(text)


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf")])
def test_seconds_must_be_some(seconds: float) -> None:
    """Within no time nothing is fresh."""
    with pytest.raises(ValueError, match="within some seconds"):
        within(seconds)
