"""Turns log entries into events: once for all viewers, and only while there are viewers."""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import time
from collections import Counter, deque
from typing import TYPE_CHECKING, Any

from rocket.consistency import Board, PrimaryStatus
from rocket.lab.api.recorder import Asked, RequestRecord
from rocket.lab.inspector import events
from rocket.lab.inspector.checker import Checker
from rocket.lab.inspector.event_log import (
    CommandDone,
    RateChanged,
    RoutingChanged,
    ScenarioStep,
    SessionTracker,
    StatusGone,
    StatusSeen,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from rocket.lab.api.status import Metrics
    from rocket.lab.comparison import ComparisonRouter, Routing
    from rocket.lab.inspector.event_log import EventLog, LogEntry
    from rocket.lab.inspector.events import Event

BATCH_S = 0.05
"""Between two batches."""
CAPACITY = 8192
"""Events that are kept for viewers who reconnect."""
_REQUESTS_PER_S = 600.0
_REQUESTS_AT_ONCE = 60.0

_log = logging.getLogger("rocket.inspector")


class Feed:
    """The events, numbered from 1. Numbers keep rising for as long as the program runs."""

    def __init__(
        self,
        event_log: EventLog,
        router: ComparisonRouter,
        metrics: Metrics,
        node_states: Callable[[], tuple[float, object] | None],
        *,
        tick_s: float,
        idle_s: float,
        clock: Callable[[], float],
    ) -> None:
        """Prepare a feed that sends totals every `tick_s`, and stops `idle_s` after its last viewer has left.

        `node_states` returns what is known of the nodes of a cluster that this program runs, and since when.
        """
        self.last = 0
        """The number of the last event."""
        self.viewers = 0
        self._event_log = event_log
        self._router = router
        self._metrics = metrics
        self._node_states = node_states
        self._tick_s = tick_s
        self._idle_s = idle_s
        self._clock = clock
        self._last_viewed = clock()
        """When the last viewer left."""
        self._kept: deque[str] = deque(maxlen=CAPACITY)
        self._viewed = asyncio.Event()
        self._fresh = asyncio.Event()
        self._reset()

    def _reset(self) -> None:
        """Forget earlier events and begin with the present; one unused number stands for what was missed."""
        self._kept.clear()
        self.last += 1
        self._next = self._event_log.end
        self._sessions = SessionTracker()
        self._checker = Checker(time.monotonic())
        self._stale: Counter[Routing] = Counter()
        self._latencies = events.Latencies()
        self._sampler = events.StatusSampler()
        self._board = Board()
        self._routings: deque[tuple[float, Routing]] = deque([(0.0, self._router.routing)], maxlen=8)
        self._allowance, self._skipped = _REQUESTS_AT_ONCE, 0

    # --- for viewers ---

    @property
    def first(self) -> int:
        """The number of the oldest event that is kept."""
        return self.last - len(self._kept) + 1

    def add_viewer(self) -> None:
        """Count one more viewer; the first one starts the feed."""
        self.viewers += 1
        if not self._viewed.is_set():
            self._reset()
            self._viewed.set()
            self._event_log.start_recording()
            board = self._router.board
            for status in (board.primary, *board.replicas):
                if status is not None:
                    self._take(StatusSeen(time.monotonic(), status), 0)

    def remove_viewer(self) -> None:
        """Count one viewer less."""
        self.viewers -= 1
        self._last_viewed = self._clock()

    def after(self, number: int) -> Sequence[str]:
        """Return the events after a number, each as JSON."""
        fresh = list(itertools.islice(reversed(self._kept), self.last - number))
        fresh.reverse()
        return fresh

    async def wait_for_events(self, timeout_s: float) -> bool:
        """Wait for new events; return False after the timeout."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._fresh.wait()
        except TimeoutError:
            return False
        return True

    def wake(self) -> None:
        """Wake those who wait for events."""
        self._fresh.set()
        self._fresh = asyncio.Event()

    async def wait_for_viewer(self) -> None:
        """Wait until there is a viewer."""
        await self._viewed.wait()

    # --- its work ---

    async def run(self) -> None:
        """Follow the log while there are viewers; never returns."""
        while True:
            await self._viewed.wait()
            last_tick = self._clock()
            while (now := self._clock()) - self._last_viewed < self._idle_s or self.viewers:
                before = self.last
                self.follow()
                if now - last_tick >= self._tick_s:
                    last_tick = now
                    self._emit(self._tick(time.monotonic()))
                if self.last != before:
                    self.wake()
                await asyncio.sleep(BATCH_S)
            self._viewed.clear()
            self._kept.clear()
            self._event_log.stop_recording()

    def follow(self) -> None:
        """Make events of what was logged since the last call."""
        self._allowance = min(_REQUESTS_AT_ONCE, self._allowance + _REQUESTS_PER_S * BATCH_S)
        self._sampler.refill()
        begin = self._event_log.begin
        if self._next.requests < begin.requests or self._next.others < begin.others:
            self._reset()  # more was logged since the last call than the log keeps
        first, self._next = self._next, self._event_log.end
        for number, entry in self._event_log.since(first):
            try:
                self._take(entry, number)
            except Exception:  # noqa: BLE001 - a viewer must never end what it views
                _log.exception("the inspector cannot make an event of %r", entry)
        if self._skipped:
            self._emit({"kind": "skipped", "t": self._event_log.ms(time.monotonic()), "count": self._skipped})
            self._skipped = 0

    def _take(self, entry: LogEntry, number: int) -> None:
        ms = self._event_log.ms
        match entry:
            case RequestRecord():
                self._take_request(entry, number)
            case StatusSeen():
                self._take_status(entry)
            case StatusGone():
                self._take_loss(entry)
            case RoutingChanged(at, routing, before):
                self._routings.append((at, routing))
                self._checker.forget_shown(at)
                self._emit({"kind": "routing", "t": ms(at), "routing": routing, "before": before})
            case CommandDone():
                self._emit(events.fault_event(entry, ms))
            case RateChanged(at, rate):
                self._emit({"kind": "simulator", "t": ms(at), "rate": rate})
            case ScenarioStep(at, name, phase, text):
                self._emit({"kind": "scenario", "t": ms(at), "name": name, "phase": phase, "text": text})

    def _take_status(self, seen: StatusSeen) -> None:
        if isinstance(seen.status, PrimaryStatus):
            self._board.publish_primary(seen.status)
            self._emit(events.primary_event(seen.status, seen.at, self._event_log.ms, lost=False))
            return
        self._board.publish(seen.status)
        for at, status in self._sampler.sample(seen.status, seen.at):
            self._emit(events.replica_event(status, at, self._board, self._event_log.ms))

    def _take_loss(self, gone: StatusGone) -> None:
        primary = self._board.primary
        self._board.forget(gone.name)
        self._sampler.forget(gone.name)
        if primary is not None and primary.name == gone.name:
            self._emit(events.primary_event(primary, gone.at, self._event_log.ms, lost=True))
        else:
            self._emit({"kind": "gone", "t": self._event_log.ms(gone.at), "name": gone.name})

    def _take_request(self, record: RequestRecord, number: int) -> None:
        session = self._sessions.session_of(record, number)
        stale = self._checker.check(record, session, self._board.epoch)
        is_read = record.request in {Asked.READ, Asked.LIST}
        if is_read:
            self._latencies.add(record)
        if self._allowance < 1 and stale is None:
            self._skipped += 1
            return
        self._allowance -= 1
        routing = next((each for at, each in reversed(self._routings) if at <= record.at), self._routings[0][1])
        ms = self._event_log.ms
        if not is_read:
            self._emit(events.write_event(record, session, routing, ms))
            return
        read = events.read_event(record, session, routing, self._board, self._router.policy, ms)
        self._emit(read)
        if stale is not None:
            self._stale[routing] += 1
            self._emit(events.stale_event(stale, read))

    def _tick(self, now: float) -> Event:
        asked_at, states = self._node_states() or (now, None)
        return {
            "kind": "tick",
            "t": self._event_log.ms(now),
            **events.totals(self._metrics.counts()),
            "connections": {pool.name: {"in_use": pool.in_use, "idle": pool.idle} for pool in self._router.pools},
            **self._latencies.percentiles(now),
            "stale": self._stale.total(),
            "stale_by_routing": self._stale,
            "checked": self._checker.checked,
            "states": states,
            "states_at": self._event_log.ms(asked_at),
        }

    def _emit(self, event: dict[str, Any]) -> None:
        self.last += 1
        event["id"] = self.last
        self._kept.append(json.dumps(event, separators=(",", ":")))
