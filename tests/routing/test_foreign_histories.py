"""Tokens, floors and names of epochs that come from elsewhere: from other clusters, dumps, unknown epochs."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, cast

import pytest
import pytest_asyncio

from rocket import InvalidToken, Policy, Role, Router, Unavailable
from rocket.consistency import Epoch, Lsn, SessionToken
from rocket.lab.app import DATABASE
from rocket.routing.epochs import resolve_tokens
from tests.support.between import pgbouncer
from tests.support.servers import dsns, paused

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from rocket import Connection, Session
    from rocket.cluster.cluster import LocalCluster

BEAT_S = 0.05
ELSEWHERE = 42
"""The system identifier of some other cluster."""


@pytest_asyncio.fixture
async def opened(cluster: LocalCluster) -> AsyncIterator[Router]:
    """A router with a table of floors, which observes by itself."""
    policy = Policy(max_wait_s=1.0)
    async with await Router.open(dsns(cluster), policy=policy, observer_interval_s=BEAT_S) as router:
        yield router


@contextlib.asynccontextmanager
async def copied(cluster: LocalCluster, *epochs: str) -> AsyncIterator[None]:
    """Have the names of another cluster's epochs in the table, as a dump of it brings them."""
    admin = await cluster.primary.connect(DATABASE)
    for epoch in epochs:
        await admin.execute(
            "INSERT INTO epochs (system_id, timeline, epoch) VALUES ($1, $2, $3)",
            ELSEWHERE, int(epoch.partition("-")[0]), epoch,
        )  # fmt: skip
    await cluster.wait_for_catchup()
    try:
        yield
    finally:
        await admin.execute("DELETE FROM epochs WHERE system_id = $1", ELSEWHERE)
        await admin.close()


async def answer(db: Connection) -> int:
    """Read something."""
    return int(await db.fetchval("SELECT 1"))


async def own_epoch(session: Session) -> str:
    """Return the epoch of the cluster at hand."""
    await session.write(answer)
    assert session.token is not None
    return session.token.split("~")[1]


async def test_epochs_that_came_in_a_dump_are_none_of_this_clusters(cluster: LocalCluster, opened: Router) -> None:
    """Their positions are of another history; replicas are fit beside their rows, of a later timeline even."""
    timeline = (await own_epoch(opened.session("ann"))).partition("-")[0]
    theirs = f"{timeline}-cccccccccc"
    async with copied(cluster, theirs, "99-dddddddddd"), paused(cluster):
        session = opened.session("ann", f"1~{theirs}~0/1~0/1")
        assert 1 == await session.read(answer)
        assert session.last is not None
        assert Role.PRIMARY == session.last.role
        assert session.lost is not None
        assert (theirs, None, True) == (session.lost.epoch, session.lost.switch_lsn, session.lost.writes)
        assert theirs != (session.token or "").split("~")[1]
    async with (
        copied(cluster, theirs, "99-dddddddddd"),
        await Router.open(dsns(cluster), observer_interval_s=BEAT_S) as later,
        asyncio.timeout(15),
    ):
        fresh = later.session("ann")
        assert theirs != await own_epoch(fresh)
        while fresh.last is None or fresh.last.role is Role.PRIMARY:
            await fresh.read(answer)


async def test_what_was_written_in_an_epoch_that_is_unknown_here_may_be_lost(
    cluster: LocalCluster, opened: Router
) -> None:
    """Its primary was lost before any replica had got the epoch's name, and so with all that came after."""
    epoch = await own_epoch(opened.session("ann"))
    timeline, _, name = epoch.partition("-")
    unknown = SessionToken.parse(f"1~{timeline}-eeeeeeeeee~0/1~0/1")
    admin = cast("Connection", await cluster.primary.connect(DATABASE))
    # As if the current epoch were the next one, in a transaction that no observer sees: it would name another one.
    as_if = admin.transaction()
    await as_if.start()
    await admin.execute("UPDATE epochs SET timeline = timeline + 1 WHERE epoch = $1", epoch)
    resolved = await resolve_tokens([unknown], admin, Epoch(f"{int(timeline) + 1}-{name}"), is_last=True)
    await as_if.rollback()
    await admin.close()
    assert resolved.token is None
    assert resolved.lost is not None
    assert resolved.lost.writes


async def test_a_token_of_a_later_timeline_is_foreign_once_no_node_can_have_given_it_out(
    opened: Router,
) -> None:
    """Of a cluster that was made anew, say; as long as a node may be a later primary, that is unknown."""
    later = "1~99-aaaaaaaaaa~0/1~0/0"
    await opened.session("ann").write(answer)
    with pytest.raises(InvalidToken):
        await opened.session("ann", later).read(answer)
    with pytest.raises(InvalidToken):
        await opened.session("ann", later).write(answer)
    lenient = opened.session("ann", later, lenient=True)
    assert 1 == await lenient.read(answer)
    assert later not in (lenient.token or "")
    opened.policy = Policy(lease_s=0.0)  # no replica was observed lately
    with pytest.raises(Unavailable, match="later primary"):
        await opened.session("ann", later).read(answer)


async def test_a_foreign_token_hides_no_loss(cluster: LocalCluster, opened: Router) -> None:
    """It is dropped alone."""
    earlier, foreign = "0-aaaaaaaaaa", "1~1-ffffffffff~0/1~0/0"
    admin = await cluster.primary.connect(DATABASE)
    await admin.execute("INSERT INTO epochs (timeline, epoch) VALUES (0, $1)", earlier)

    try:
        given = [SessionToken(Epoch(earlier), Lsn(2**40)), SessionToken.parse(foreign)]
        session = opened.session("ann", given, lenient=True)
        assert 1 == await session.read(answer)
    finally:
        await admin.execute("DELETE FROM epochs WHERE timeline = 0")
        await admin.close()
    assert session.lost is not None
    assert earlier == session.lost.epoch


async def raises(_db: Connection) -> None:
    """Refuse, as a service does that finds nothing."""
    raise LookupError


async def cancels(_db: Connection) -> None:
    """Be cancelled, as by a client that hangs up."""
    raise asyncio.CancelledError


@pytest.mark.parametrize("inside", ["read", "write"])
@pytest.mark.parametrize(("work", "error"), [(raises, LookupError), (cancels, asyncio.CancelledError)])
async def test_a_loss_is_reported_by_work_that_raises(
    cluster: LocalCluster,
    opened: Router,
    inside: str,
    work: Callable[[Connection], Awaitable[None]],
    error: type[BaseException],
) -> None:
    """Its error may say that something is not there any more; the next answer reports the loss again."""
    earlier = "0-aaaaaaaaaa"
    admin = await cluster.primary.connect(DATABASE)
    await admin.execute("INSERT INTO epochs (timeline, epoch) VALUES (0, $1)", earlier)
    try:
        session = opened.session("ann", SessionToken(Epoch(earlier), Lsn(2**40)))
        with pytest.raises(error):
            await (session.read(work) if inside == "read" else session.write(work))
        after_error = session.lost
        session.lost = None
        assert 1 == await session.read(answer)
    finally:
        await admin.execute("DELETE FROM epochs WHERE timeline = 0")
        await admin.close()
    for lost in (after_error, session.lost):
        assert lost is not None
        assert earlier == lost.epoch


async def test_a_loss_is_reported_behind_a_pooler_to_a_role_that_may_not_read_the_history(
    cluster: LocalCluster,
) -> None:
    """Without the position, and without an error that would abort the transaction of the read."""
    earlier = "0-bbbbbbbbbb"
    admin = await cluster.primary.connect(DATABASE)
    await admin.execute("INSERT INTO epochs (timeline, epoch) VALUES (0, $1)", earlier)
    try:
        with pgbouncer(cluster, "rocket_plain") as nodes:
            async with await Router.open(nodes, observer_interval_s=BEAT_S) as router:
                session = router.session("ann", SessionToken(Epoch(earlier), Lsn(2**40)))
                assert 1 == await session.read(answer)
    finally:
        await admin.execute("DELETE FROM epochs WHERE timeline = 0")
        await admin.close()
    assert session.lost is not None
    assert (earlier, None) == (session.lost.epoch, session.lost.switch_lsn)
