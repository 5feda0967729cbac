"""Makes of the journal what viewers are told: once for all of them, and only while somebody looks."""

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
from rocket.lab.inspector.event_log import Faulted, Gone, Paced, Seen, Staged, Switched
from rocket.lab.inspector.figures import Latencies, totals
from rocket.lab.inspector.looks import Looks
from rocket.lab.inspector.sessions import Sessions

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from rocket.lab.api.metrics import Metrics
    from rocket.lab.comparison import ComparisonRouter, Routing
    from rocket.lab.inspector.event_log import EventLog, Happening
    from rocket.lab.inspector.events import Event

BEAT_S = 0.05
"""Between two batches."""
_TICK_S = 1.0
_STAYS_WARM_S = 60.0
"""How long it goes on when nobody looks any more, so that who was cut off finds what they have missed."""
KEPT = 8192
"""Events that who comes back can be told."""
_REQUESTS_PER_S = 600.0
_REQUESTS_AT_ONCE = 60.0

_log = logging.getLogger("rocket.inspector")


class Feed:
    """The events, numbered from 1 on. The numbers go on for as long as the program runs."""

    def __init__(self, journal: EventLog, router: ComparisonRouter, metrics: Metrics) -> None:
        self.states: Callable[[], tuple[float, object] | None] = lambda: None
        """Gives what is known of the nodes of a cluster that rocket runs."""
        self.last = 0
        """The number of the last event."""
        self.viewers = 0
        self._last_wanted = time.monotonic()
        """When the last viewer went."""
        self._journal = journal
        self._router = router
        self._metrics = metrics
        self._kept: deque[str] = deque(maxlen=KEPT)
        self._wanted = asyncio.Event()
        self._news = asyncio.Event()
        self._start_anew()

    def _start_anew(self) -> None:
        """Begin with the present; what was told before is forgotten, and a number stands for what was missed."""
        self._kept.clear()
        self.last += 1
        self._next = self._journal.end
        self._sessions = Sessions()
        self._checker = Checker(time.monotonic())
        self._stale: Counter[Routing] = Counter()
        self._latencies = Latencies()
        self._looks = Looks()
        self._board = Board()
        self._routings: deque[tuple[float, Routing]] = deque([(0.0, self._router.routing)], maxlen=8)
        self._allowance, self._skipped = _REQUESTS_AT_ONCE, 0

    # --- for viewers ---

    @property
    def first(self) -> int:
        """The number of the oldest event that can still be told."""
        return self.last - len(self._kept) + 1

    def look(self) -> None:
        """Count one more viewer; whoever comes first starts it."""
        self.viewers += 1
        if not self._wanted.is_set():
            self._start_anew()
            self._wanted.set()
            self._journal.listen()
            board = self._router.board
            for status in (board.primary, *board.replicas):
                if status is not None:
                    self._take(Seen(time.monotonic(), status), 0)

    def look_away(self) -> None:
        """Count one viewer less."""
        self.viewers -= 1
        self._last_wanted = time.monotonic()

    def after(self, number: int) -> Sequence[str]:
        """Return the events behind one, each as JSON."""
        fresh = list(itertools.islice(reversed(self._kept), self.last - number))
        fresh.reverse()
        return fresh

    async def news(self, timeout_s: float) -> bool:
        """Wait for new events; False when that takes longer."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._news.wait()
        except TimeoutError:
            return False
        return True

    def wake(self) -> None:
        """Wake who waits for news."""
        self._news.set()
        self._news = asyncio.Event()

    async def wanted(self) -> None:
        """Wait until somebody looks."""
        await self._wanted.wait()

    # --- its work ---

    async def run(self) -> None:
        """Follow the journal while somebody looks; never returns."""
        while True:
            await self._wanted.wait()
            last_tick = time.monotonic()
            while (now := time.monotonic()) - self._last_wanted < _STAYS_WARM_S or self.viewers:
                before = self.last
                self.follow()
                if now - last_tick >= _TICK_S:
                    last_tick = now
                    self._emit(self._tick(now))
                if self.last != before:
                    self.wake()
                await asyncio.sleep(BEAT_S)
            self._wanted.clear()
            self._kept.clear()
            self._journal.do_not_listen()

    def follow(self) -> None:
        """Take in what has been noted since."""
        self._allowance = min(_REQUESTS_AT_ONCE, self._allowance + _REQUESTS_PER_S * BEAT_S)
        self._looks.refill()
        begin = self._journal.begin
        if self._next.requests < begin.requests or self._next.others < begin.others:
            self._start_anew()  # more happened since the last look than the journal holds
        first, self._next = self._next, self._journal.end
        for number, happening in self._journal.since(first):
            try:
                self._take(happening, number)
            except Exception:  # noqa: BLE001 - whoever looks shall never end what they look at
                _log.exception("the inspector cannot make anything of %r", happening)
        if self._skipped:
            self._emit({"kind": "skipped", "t": self._journal.ms(time.monotonic()), "count": self._skipped})
            self._skipped = 0

    def _take(self, happening: Happening, number: int) -> None:
        ms = self._journal.ms
        match happening:
            case RequestRecord():
                self._take_request(happening, number)
            case Seen():
                self._take_look(happening)
            case Gone():
                self._take_loss(happening)
            case Switched(at, routing, before):
                self._routings.append((at, routing))
                self._checker.forget_what_was_shown(at)
                self._emit({"kind": "routing", "t": ms(at), "routing": routing, "before": before})
            case Faulted():
                self._emit(events.fault_event(happening, ms))
            case Paced(at, rate):
                self._emit({"kind": "simulator", "t": ms(at), "rate": rate})
            case Staged(at, name, phase, text):
                self._emit({"kind": "scenario", "t": ms(at), "name": name, "phase": phase, "text": text})

    def _take_look(self, seen: Seen) -> None:
        if isinstance(seen.status, PrimaryStatus):
            self._board.publish_primary(seen.status)
            self._emit(events.primary_event(seen.status, seen.at, self._journal.ms, lost=False))
            return
        self._board.publish(seen.status)
        for at, status in self._looks.worth_telling(seen.status, seen.at):
            self._emit(events.replica_event(status, at, self._board, self._journal.ms))

    def _take_loss(self, gone: Gone) -> None:
        primary = self._board.primary
        self._board.forget(gone.name)
        self._looks.forget(gone.name)
        if primary is not None and primary.name == gone.name:
            self._emit(events.primary_event(primary, gone.at, self._journal.ms, lost=True))
        else:
            self._emit({"kind": "gone", "t": self._journal.ms(gone.at), "name": gone.name})

    def _take_request(self, told: RequestRecord, number: int) -> None:
        session = self._sessions.of(told, number)
        stale = self._checker.look_at(told, session, self._board.epoch)
        is_read = told.request in {Asked.READ, Asked.LIST}
        if is_read:
            self._latencies.add(told)
        if self._allowance < 1 and stale is None:
            self._skipped += 1
            return
        self._allowance -= 1
        routing = next((each for at, each in reversed(self._routings) if at <= told.at), self._routings[0][1])
        if not is_read:
            self._emit(events.write_event(told, session, routing, self._journal.ms))
            return
        read = events.read_event(told, session, routing, self._board, self._router.policy, self._journal.ms)
        self._emit(read)
        if stale is not None:
            self._stale[routing] += 1
            self._emit(events.stale_event(stale, read))

    def _tick(self, now: float) -> Event:
        asked_at, states = self.states() or (now, None)
        return {
            "kind": "tick",
            "t": self._journal.ms(now),
            **totals(self._metrics.counts()),
            "connections": {pool.name: {"in_use": pool.in_use, "idle": pool.idle} for pool in self._router.pools},
            **self._latencies.percentiles(now),
            "stale": self._stale.total(),
            "stale_by_routing": self._stale,
            "checked": self._checker.checked,
            "states": states,
            "states_at": self._journal.ms(asked_at),
        }

    def _emit(self, event: dict[str, Any]) -> None:
        self.last += 1
        event["id"] = self.last
        self._kept.append(json.dumps(event, separators=(",", ":")))
