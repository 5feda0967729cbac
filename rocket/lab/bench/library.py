"""The library by itself, without an API: many reads at a time, by what they ask for; and the measure `scale`.

The reads run in a child process, this module, which has a `Router`; `reads_process` starts it. `scale` measures
the cost of a decision and of an observer's round with many replicas, without Postgres.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import statistics
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import asyncpg

from rocket import READ_BOUND, Freshness, Policy, Role, Router, Unavailable, report_read_bound
from rocket.consistency import Board, Epoch, Incarnation, Lsn, PrimaryStatus, ReplicaStatus, SessionToken, choose
from rocket.lab.bench.figures import Row, percentile
from rocket.lab.bench.measures import GLOBAL, SCALE
from rocket.lab.bench.report import replicas
from rocket.lab.subprocesses import child_process, run_child
from rocket.routing.observer import Observer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping

    from rocket import Connection, Session
    from rocket.dsn import Node
    from rocket.lab.bench.figures import Figures
    from rocket.lab.bench.measures import LibraryMeasure, Variant
    from rocket.lab.subprocesses import Parent, Subprocess

_WRITERS = 4
"""Users who write, each over a connection of its own, past the router: as other programs do."""
_STATEMENTS = 51
_GRACE_S = 30.0
_MS = 1000
_INSERT_USER = """
    INSERT INTO users (email) VALUES ($1) ON CONFLICT (email) DO UPDATE SET email = excluded.email RETURNING id
"""
_INSERT_RIDE = "INSERT INTO rides (distance, user_id) VALUES (123.4, $1) RETURNING id"
_NEWEST = f"""
    SELECT coalesce((SELECT id FROM rides WHERE user_id = $1 ORDER BY id DESC LIMIT 1), 0) AS newest,
           {READ_BOUND} AS shown
"""  # noqa: S608 - our own text
_FLUSH_LSN = "SELECT pg_current_wal_flush_lsn()"

COUNTS = (5, 50, 500, 5000)
_EPOCH = Epoch("1-benchbench")
_FLOOR = Lsn(1_000_000)
_POLICY = Policy()
_BATCHES = 10
_BATCH_S = 0.01
_ROUNDS = 3
_NS, _US = 1_000_000_000, 1000
_STRIDE = 7919
"""Between the positions at which successive reads start to search; a prime, so that all positions occur."""

_log = logging.getLogger("rocket.bench")


# --- many reads at a time: the side of the benchmark ---


@dataclass(frozen=True, slots=True)
class ReadsJob:
    """Reads in a closed loop, each of the newest ride of a user that another program writes."""

    freshness: str
    """What they ask to be shown."""
    readers: int
    """How many at a time, each in a session that has written something and brings its token."""
    writes_per_s: float
    """How many rides are written meanwhile."""
    seconds: float


class ReadsProcess:
    """The process that reads, seen from its parent."""

    def __init__(self, process: Subprocess) -> None:
        self._process = process

    async def take(self, measure: LibraryMeasure, variant: Variant, seconds: float) -> dict[str, float]:
        """Take a measure of a variant for some seconds; raise `SubprocessFailed`."""
        asked = variant.freshness or str(Freshness.SESSION)
        job = ReadsJob(asked, measure.readers, measure.writes_per_s, seconds)
        figures: dict[str, float] = await self._process.ask(asdict(job), seconds + _GRACE_S)
        missed = figures.pop("missed")  # of which only global reads promise anything
        return {**figures, "stale_reads" if variant is GLOBAL else "missed_reads": missed}


@contextlib.asynccontextmanager
async def reads_process(
    nodes: Mapping[str, str], before_exec: Callable[[], None] | None
) -> AsyncIterator[ReadsProcess]:
    """Run the process, which calls `before_exec` first, for as long as the context lasts."""
    module = "rocket.lab.bench.library"
    async with child_process("process that reads", module, preexec_fn=before_exec) as process:
        await process.ask({"nodes": dict(nodes)}, _GRACE_S)
        yield ReadsProcess(process)


# --- its own side ---


class _Register:
    """The newest ride of each user who writes, as it was acknowledged."""

    def __init__(self, primary: asyncpg.Connection[Any], user: int) -> None:
        self.user = user
        self.newest = 0
        self._primary = primary

    async def write(self) -> None:
        self.newest = await self._primary.fetchval(_INSERT_RIDE, self.user)


class _Reads:
    """Runs jobs, one after the other, with one router."""

    def __init__(self, router: Router, registers: list[_Register], primary: asyncpg.Connection[Any]) -> None:
        self._router = router
        self._registers = registers
        self._primary = primary
        self._sessions: list[Session] = []

    async def take(self, job: ReadsJob) -> dict[str, float]:
        """Run a job and return its figures."""
        while len(self._sessions) < job.readers:
            session = self._router.session(f"bench {len(self._sessions)}")
            await session.write(_nothing)
            self._sessions.append(session)
        statement_ms = await self._statement_ms()
        took_s: list[float] = []
        count = Counter[str]()
        questions, cpu_s, began = self._router.flush_questions, time.process_time(), time.monotonic()
        until = began + job.seconds
        freshness = Freshness.parse(job.freshness)
        async with asyncio.TaskGroup() as group:
            for number, session in enumerate(self._sessions[: job.readers]):
                register = self._registers[number % _WRITERS]
                reading = _read(session, register, freshness, until, took_s=took_s, count=count)
                group.create_task(reading, name=f"read {number}")
            if job.writes_per_s:
                for register in self._registers:
                    group.create_task(_write(register, job.writes_per_s / _WRITERS, until, count), name="write")
        seconds, cpu_s = time.monotonic() - began, time.process_time() - cpu_s
        questions = self._router.flush_questions - questions
        reads, took_s = max(1, len(took_s)), sorted(took_s) or [0.0]
        further: dict[str, float] = {}
        if job.writes_per_s:
            further["writes_beside_per_s"] = count["written"] / seconds
        if job.readers == 1:
            further["p50_statements"] = percentile(took_s, 50) * _MS / statement_ms
        return {
            "reads_per_s": reads / seconds,
            "p50_ms": percentile(took_s, 50) * _MS,
            "p99_ms": percentile(took_s, 99) * _MS,
            "cpu_us_per_read": 1_000_000 * cpu_s / reads,
            "replica_share_percent": 100 * (1 - count["primary"] / reads),
            # A read on the primary may need one statement before its own.
            "primary_statements_per_read": (questions + 2 * count["primary"]) / reads,
            "statement_ms": statement_ms,
            "missed": count["missed"],
            "failed_requests": count["failed"],
            **further,
        }

    async def _statement_ms(self) -> float:
        """Return how long a statement on the primary takes: the median of some, one after the other."""
        took_s = []
        for _ in range(_STATEMENTS):
            began = time.perf_counter()
            await self._primary.fetchval(_FLUSH_LSN)
            took_s.append(time.perf_counter() - began)
        return statistics.median(took_s) * _MS


async def _nothing(primary: Connection) -> None:
    await primary.fetchval("SELECT 1")


async def _read(
    session: Session,
    register: _Register,
    freshness: Freshness,
    until: float,
    *,
    took_s: list[float],
    count: Counter[str],
) -> None:
    async def newest(node: Connection) -> int:
        row = await node.fetchrow(_NEWEST, register.user)
        assert row is not None  # noqa: S101 - it has no FROM
        report_read_bound(node, row["shown"])
        return int(row["newest"])

    while (began := time.monotonic()) < until:
        acknowledged = register.newest
        try:
            found = await session.read(newest, freshness=freshness)
        except Unavailable:
            count["failed"] += 1
            continue
        took_s.append(time.monotonic() - began)
        count["missed"] += found < acknowledged
        count["primary"] += session.last is not None and session.last.role is Role.PRIMARY


async def _write(register: _Register, per_s: float, until: float, count: Counter[str]) -> None:
    for due in itertools.takewhile(lambda due: due < until, itertools.count(time.monotonic(), 1 / per_s)):
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        await register.write()
        count["written"] += 1


async def _work(parent: Parent) -> None:
    """Run one job after the other; the process ends with its parent."""
    nodes: Mapping[str, str] = (await parent.receive())["nodes"]
    async with contextlib.AsyncExitStack() as stack:
        router = await stack.enter_async_context(await Router.open(nodes))
        primary_node = router.board.primary
        assert primary_node is not None  # noqa: S101 - `open` has waited for it
        connections = []
        for _ in range(_WRITERS + 1):
            connections.append(await asyncpg.connect(nodes[primary_node.name]))
            stack.callback(connections[-1].terminate)
        primary, *others = connections
        registers = []
        for number, connection in enumerate(others):
            user = await connection.fetchval(_INSERT_USER, f"writer{number}@bench.example")
            registers.append(_Register(connection, user))
            await registers[-1].write()
        parent.send({})
        reads = _Reads(router, registers, primary)
        while True:
            parent.send(await reads.take(ReadsJob(**await parent.receive())))


# --- many replicas ---


async def scale(figures: Figures) -> None:
    """Measure each number of replicas."""
    for count in COUNTS:
        costs = {**_decisions(count), **await _observation(count)}
        figures.add(Row(1, SCALE, replicas(count), costs))
        _log.info("%-14s  %8.2f µs to choose", replicas(count), costs["choose_us"])


# --- the decision ---


def _decisions(count: int) -> dict[str, float]:
    token = SessionToken(_EPOCH, _FLOOR)
    load = dict.fromkeys(_names(count), 0).__getitem__
    starts = itertools.count(0, _STRIDE)
    now = time.monotonic()

    def choosing(board: Board) -> Callable[[], object]:
        return lambda: choose(token, board, _POLICY, now=now, start=next(starts), load=load)

    all_caught_up = _board(count, now)
    statuses = itertools.cycle(all_caught_up.replicas)
    one_caught_up = _board(count, now, behind=range(1, count))

    def publish_and_choose() -> None:
        all_caught_up.publish(next(statuses))
        choose(token, all_caught_up, _POLICY, now=now, start=next(starts), load=load)

    return {
        "choose_us": _cost_us(choosing(all_caught_up)),
        "choose_one_caught_up_us": _cost_us(
            lambda: choose(token, one_caught_up, _POLICY, now=now, start=1, load=load)  # finds it last
        ),
        "publish_us": _cost_us(lambda: all_caught_up.publish(next(statuses))),
        "publish_and_choose_us": _cost_us(publish_and_choose),
    }


def _names(count: int) -> list[str]:
    return [f"replica{number}" for number in range(count)]


def _board(count: int, now: float, behind: range = range(0)) -> Board:
    board = Board()
    board.publish_primary(PrimaryStatus("primary", _FLOOR, now, _EPOCH))
    for number, name in enumerate(_names(count)):
        replay_lsn = Lsn(_FLOOR - 1) if number in behind else _FLOOR
        board.publish(
            ReplicaStatus(
                name,
                replay_lsn,
                Incarnation(f"1@{number}"),
                now,
                now,
                receive_lsn=replay_lsn,
                streaming=True,
                streamed_lsn=replay_lsn,
                epoch=_EPOCH,
            )
        )
    return board


def _cost_us(act: Callable[[], object]) -> float:
    """Return the cost of a call: the least mean of several batches, since any disturbance adds to it."""
    began_ns, calls = time.perf_counter_ns(), 0
    while time.perf_counter_ns() - began_ns < _BATCH_S * _NS:
        act()
        calls += 1
    means = []
    for _ in range(_BATCHES):
        began_ns = time.perf_counter_ns()
        for _ in range(calls):
            act()
        means.append((time.perf_counter_ns() - began_ns) / calls / _US)
    return min(means)


# --- the observer ---


class _SimulatedConnection:
    """A connection to a simulated node, which answers each query at once."""

    opened_at = 0.0
    direct = True

    def __init__(self, dsn: str) -> None:
        self._is_primary = dsn == "primary"
        self.to_replica = not self._is_primary
        self.incarnation = None if self._is_primary else Incarnation("1@1")
        self.epoch = _EPOCH if self._is_primary else None

    def get_server_pid(self) -> int:
        return 1

    def is_closed(self) -> bool:
        return False

    def terminate(self) -> None:
        pass

    async def fetchrow(self, _query: str, *_: object, **__: object) -> dict[str, object]:
        await asyncio.sleep(0)  # a real answer takes at least a turn of the loop
        return {
            "in_recovery": not self._is_primary,
            "replay_lsn": int(_FLOOR),
            "receive_lsn": int(_FLOOR),
            "streamed_timeline": 1,
            "receiver_is_hidden": False,
            "applied_timeline": 1,
            "epoch": _EPOCH,
            "flush_lsn": int(_FLOOR),
            "timeline": 1,
            "system_id": 1,
            "started": 1,
            "restarted": False,
            "read_only": False,
            "checkpoint_lsn": int(_FLOOR),
            "covered_lsn": None,
        }

    async def fetchval(self, _query: str, *_: object, **__: object) -> bool:
        await asyncio.sleep(0)
        return True

    async def execute(self, _query: str, *_: object, **__: object) -> None:
        await asyncio.sleep(0)


async def _connect(node: Node) -> Any:
    return _SimulatedConnection(node.dsn)


async def _observation(count: int) -> dict[str, float]:
    nodes = {name: name for name in ("primary", *_names(count))}
    board = Board()
    observer = Observer(nodes, board, interval_s=1.0, connect=_connect)
    await observer.run_once()
    if len(board.replicas) != count or board.epoch != _EPOCH:
        raise AssertionError("the observer did not accept the simulated replicas")
    if board.primary is None or board.primary_is_lost:
        raise AssertionError("the observer did not accept the simulated primary")
    took_s = []
    for _ in range(_ROUNDS):
        began = time.perf_counter()
        await observer.run_once()
        took_s.append(time.perf_counter() - began)
    observer.close()
    round_us = min(took_s) * 1_000_000
    return {"observe_round_us": round_us, "observe_per_replica_us": round_us / count}


if __name__ == "__main__":
    sys.exit(run_child(_work))
