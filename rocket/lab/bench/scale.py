"""The measure `scale`: the cost of a decision and of an observer's round with many replicas, without Postgres."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from typing import TYPE_CHECKING, Any

from rocket import Policy
from rocket.consistency import Board, Epoch, Incarnation, Lsn, PrimaryStatus, ReplicaStatus, SessionToken, choose
from rocket.lab.bench.figures import Row
from rocket.lab.bench.measures import SCALE
from rocket.lab.bench.report import replicas
from rocket.routing.observer import Observer

if TYPE_CHECKING:
    from collections.abc import Callable

    from rocket.dsn import Node
    from rocket.lab.bench.figures import Figures

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
