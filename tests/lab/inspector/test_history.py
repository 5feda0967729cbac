"""The history that the inspector gives is one that `rocket check` judges."""

from __future__ import annotations

import asyncio
import threading
import time
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from rocket.lab.api.recorder import RequestRecord
from rocket.lab.checker import check, reader
from rocket.lab.checker.history import Outcome, Request
from rocket.lab.checker.verdict import Judgement, Rule
from rocket.lab.comparison import Routing
from rocket.lab.inspector import export, feed, inspector
from tests.support.inspected import DEADLINE_S
from tests.support.servers import paused
from tests.support.user import User

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from rocket.cluster.cluster import LocalCluster
    from rocket.lab.checker.history import History
    from rocket.lab.checker.verdict import Verdict
    from rocket.lab.comparison import ComparisonRouter
    from rocket.routing.observer import Observer
    from tests.support.inspected import Inspected


async def judged(inspected: Inspected, path: Path, last: int = 1000) -> tuple[History, Verdict]:
    """Take the history as its user does, and judge it."""
    file = path / "history.jsonl"
    async with inspected.client.get("/inspector/history", params={"last": last}) as response:
        assert 200 == response.status
        file.write_text(await response.text())
    history = reader.read_history(file)
    return history, check.check(history)


@pytest.fixture(autouse=True)
def _listening(inspected: Inspected) -> None:
    """A history holds what was done since somebody looked."""
    inspected.journal.listen()


async def test_traffic_without_a_flaw_breaks_no_rule(
    inspected: Inspected, observer: Observer, email: str, tmp_path: Path
) -> None:
    """Also with rides of one distance, concurrent requests, pages, old tokens, and clients without any."""
    user, bare = User(inspected.client, email), User(inspected.client, email, tokens=False)
    await user.join()
    rides = [await user.write(2.5), await user.write(2.5)]
    old = user.token
    rides += [await user.write(3.0), await bare.write(2.5)]
    for _ in range(3):
        await observer.run_once()
        await asyncio.gather(*(client.read(ride) for ride in rides for client in (user, bare)))
        await asyncio.gather(*(user.read(ride, old) for ride in rides[:2]))
        assert 200 == await user.page()
        await bare.page(limit=2)
        await user.page(limit=1, before=rides[-1])
    assert 404 == await user.read(rides[-1] + 1000)
    history, verdict = await judged(inspected, tmp_path)
    assert {} == verdict.counts
    assert all("garbled" not in reason for reason in verdict.reasons)
    assert 4 == sum(op.request is Request.WRITE and op.outcome is Outcome.OK for op in history.ops)


async def test_what_was_written_before_it_begins_is_not_held_against_anybody(
    inspected: Inspected, email: str, tmp_path: Path
) -> None:
    """A ride that is shown, and whose write is not told of, was written earlier."""
    user = User(inspected.client, email)
    await user.join()
    ride = await user.write()
    await user.read(ride)
    await user.page()
    history, verdict = await judged(inspected, tmp_path, last=2)
    assert {} == verdict.counts
    assert [Request.WRITE, Request.READ, Request.LIST] == [op.request for op in history.ops]
    assert Outcome.UNKNOWN is history.ops[0].outcome


async def test_a_stale_read_is_convicted(
    inspected: Inspected, router: ComparisonRouter, cluster: LocalCluster, email: str, tmp_path: Path
) -> None:
    """With the fault that stood behind it."""
    user = User(inspected.client, email)
    await user.join()
    await cluster.wait_for_catchup()
    await router.switch(Routing.RANDOM)
    assert 200 == (await inspected.order(command="pause", node="replica0"))[0]
    async with paused(cluster, "replica1"):
        assert 404 == await user.read(await user.write())
    assert 200 == (await inspected.order(command="resume", node="replica0"))[0]
    history, verdict = await judged(inspected, tmp_path)
    assert {Rule.READ_YOUR_WRITES: 1} == verdict.counts
    assert Judgement.VIOLATED is verdict.judgement
    (fault,) = history.faults
    assert ("pause", "replica0", True) == (fault.name, fault.node, fault.at < history.ops[-1].at < fault.until)


async def test_without_anybody_who_looks_nothing_is_kept(inspected: Inspected, email: str, tmp_path: Path) -> None:
    """Not before, and not once the last has gone; to ask for a history is to look."""
    inspected.journal.do_not_listen()
    user = User(inspected.client, email)
    await user.join()
    assert () == (await judged(inspected, tmp_path))[0].ops
    await user.write()
    assert 1 == len((await judged(inspected, tmp_path))[0].ops)
    inspected.journal.do_not_listen()
    assert () == (await judged(inspected, tmp_path))[0].ops


async def test_reads_go_on_while_a_history_is_made(
    inspected: Inspected, email: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is much work, and none for the event loop."""
    begun, served = threading.Event(), threading.Event()

    def slow_lines(*args: Any) -> Iterator[str]:
        begun.set()
        assert served.wait(DEADLINE_S / 4)
        yield from export.history_lines(*args)

    monkeypatch.setattr(inspector, "history_lines", slow_lines)
    user = User(inspected.client, email)
    await user.join()
    judging = asyncio.create_task(judged(inspected, tmp_path))
    async with asyncio.timeout(DEADLINE_S):
        while not begun.is_set():
            await asyncio.sleep(0.01)
        assert 404 == await user.read(1)
        served.set()
        assert {} == (await judging)[1].counts


async def test_who_asks_for_a_history_now_and_then_keeps_it_noting(
    inspected: Inspected, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each time for a minute."""
    passed_s = 0.0
    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + passed_s)
    monkeypatch.setattr(feed, "time", clock)
    for _ in range(3):
        await judged(inspected, tmp_path)
        passed_s += feed._STAYS_WARM_S - 5  # noqa: SLF001
        await asyncio.sleep(4 * feed.BEAT_S)
        assert inspected.journal.audience.witness is not None
    passed_s += 5
    async with asyncio.timeout(DEADLINE_S):
        while inspected.journal.audience.witness is not None:
            await asyncio.sleep(feed.BEAT_S)


async def test_of_an_error_the_words_are_kept_and_not_its_frames(
    inspected: Inspected, email: str, tmp_path: Path
) -> None:
    """Thousands are kept, and each frame holds whatever it worked with."""
    async with inspected.client.post(
        "/rides", json={"distance": 1}, headers={"Authorization": email}
    ) as response:  # of a user whom nobody knows
        assert 401 == response.status
    (told,) = [
        each for _, each in inspected.journal.since(inspected.journal.begin) if isinstance(each, RequestRecord)
    ]
    assert told.error is not None
    assert [None] * 3 == [told.error.__traceback__, told.error.__context__, told.error.__cause__]
    (op,) = (await judged(inspected, tmp_path))[0].ops
    assert (401, Outcome.FAIL, str(told.error)) == (op.status, op.outcome, op.error)
