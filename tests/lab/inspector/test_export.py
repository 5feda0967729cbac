"""The history that the inspector exports is one that `rocket check` judges."""

from __future__ import annotations

import asyncio
import threading
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rocket.lab.api.recorder import RequestRecord
from rocket.lab.checker.check import Judgement, check
from rocket.lab.checker.findings import Rule
from rocket.lab.checker.history import Outcome, Request, read_history
from rocket.lab.comparison import ComparisonRouter, Routing
from rocket.lab.inspector.export import history_lines
from rocket.lab.inspector.feed import BATCH_S
from tests.support.inspected import DEADLINE_S, QUICK, inspecting
from tests.support.servers import paused, until
from tests.support.user import User

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from pytest_aiohttp.plugin import AiohttpClient

    from rocket.cluster.cluster import LocalCluster
    from rocket.lab.checker.check import Verdict
    from rocket.lab.checker.history import History
    from rocket.routing.observer import Observer
    from tests.support.inspected import Inspected


async def judged(inspected: Inspected, path: Path, last: int = 1000) -> tuple[History, Verdict]:
    """Download the history as a user does, and judge it."""
    file = path / "history.jsonl"
    async with inspected.client.get("/inspector/history", params={"last": last}) as response:
        assert 200 == response.status
        file.write_text(await response.text())
    history = read_history(file)
    return history, check(history)


async def test_traffic_without_a_flaw_breaks_no_rule(
    inspected: Inspected, observer: Observer, email: str, tmp_path: Path
) -> None:
    """Also with rides of one distance, concurrent requests, pages, old tokens, and clients without tokens."""
    inspected.event_log.start_recording()
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


async def test_a_ride_written_before_the_history_begins_breaks_no_rule(
    inspected: Inspected, email: str, tmp_path: Path
) -> None:
    """A ride that is shown, but whose write was not recorded, was written earlier."""
    inspected.event_log.start_recording()
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
    """The history also holds the fault that caused it."""
    inspected.event_log.start_recording()
    user = User(inspected.client, email)
    await user.join()
    await cluster.wait_for_catchup()
    await router.switch(Routing.RANDOM)
    assert 200 == (await inspected.command(command="pause", node="replica0"))[0]
    async with paused(cluster, "replica1"):
        assert 404 == await user.read(await user.write())
    assert 200 == (await inspected.command(command="resume", node="replica0"))[0]
    history, verdict = await judged(inspected, tmp_path)
    assert {Rule.READ_YOUR_WRITES: 1} == verdict.counts
    assert Judgement.VIOLATED is verdict.judgement
    (fault,) = history.faults
    assert ("pause", "replica0", True) == (fault.name, fault.node, fault.at < history.ops[-1].at < fault.until)


async def test_without_a_viewer_nothing_is_recorded(inspected: Inspected, email: str, tmp_path: Path) -> None:
    """Neither before nor after; a client that asks for a history counts as a viewer."""
    user = User(inspected.client, email)
    await user.join()
    assert () == (await judged(inspected, tmp_path))[0].ops
    await user.write()
    assert 1 == len((await judged(inspected, tmp_path))[0].ops)
    inspected.event_log.stop_recording()
    assert () == (await judged(inspected, tmp_path))[0].ops


async def test_reads_continue_while_a_history_is_made(
    router: ComparisonRouter, cluster: LocalCluster, aiohttp_client: AiohttpClient, email: str, tmp_path: Path
) -> None:
    """It is a lot of work, and none for the event loop."""
    begun, served = threading.Event(), threading.Event()

    def slow_lines(*args: Any) -> Iterator[str]:
        begun.set()
        assert served.wait(DEADLINE_S / 4)
        yield from history_lines(*args)

    async with inspecting(router, cluster, aiohttp_client, history=slow_lines) as inspected:
        user = User(inspected.client, email)
        await user.join()
        async with asyncio.TaskGroup() as group:
            judging = group.create_task(judged(inspected, tmp_path), name="judging")
            await until(begun.is_set, DEADLINE_S)
            assert 404 == await user.read(1)
            served.set()
        assert {} == judging.result()[1].counts


async def test_a_client_that_asks_for_a_history_now_and_then_keeps_it_recording(
    router: ComparisonRouter, cluster: LocalCluster, aiohttp_client: AiohttpClient, tmp_path: Path
) -> None:
    """Each time for a minute."""
    passed_s = 0.0
    limits = replace(QUICK, idle_s=60.0, clock=lambda: time.monotonic() + passed_s)
    async with inspecting(router, cluster, aiohttp_client, limits=limits) as inspected:
        for _ in range(3):
            await judged(inspected, tmp_path)
            passed_s += limits.idle_s - 5
            await asyncio.sleep(4 * BATCH_S)  # for the feed to notice
            assert inspected.event_log.is_recording
        passed_s += 5
        await until(lambda: not inspected.event_log.is_recording, DEADLINE_S)


async def test_an_error_is_kept_without_its_frames(inspected: Inspected, email: str, tmp_path: Path) -> None:
    """Thousands are kept, and each frame holds everything it worked with."""
    inspected.event_log.start_recording()
    async with inspected.client.post(
        "/rides", json={"distance": 1}, headers={"Authorization": email}
    ) as response:  # of an unknown user
        assert 401 == response.status
    log = inspected.event_log
    (record,) = [entry for _, entry in log.since(log.begin) if isinstance(entry, RequestRecord)]
    assert record.error is not None
    assert [None] * 3 == [record.error.__traceback__, record.error.__context__, record.error.__cause__]
    (op,) = (await judged(inspected, tmp_path))[0].ops
    assert (401, Outcome.FAIL, str(record.error)) == (op.status, op.outcome, op.error)
