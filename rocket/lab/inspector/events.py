"""The events that viewers receive, as objects for JSON. Times are milliseconds since the event log's zero."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

from rocket import Freshness, Lsn
from rocket.consistency import Reason, obstacle
from rocket.errors import describe
from rocket.lab.api.recorder import Asked
from rocket.lab.checker.history import Outcome
from rocket.lab.comparison import Routing
from rocket.lab.inspector.event_log import outcome_of, page_of, replayed_lsn, ride_of, status_of
from rocket.routing.explain import candidates_of, floor_of, sentences_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from rocket import Policy
    from rocket.consistency import Board, PrimaryStatus, ReplicaStatus, SessionToken
    from rocket.lab.api.recorder import RequestRecord
    from rocket.lab.inspector.checker import StaleRead
    from rocket.lab.inspector.event_log import CommandDone, TrackedSession
    from rocket.routing.answer import Route
    from rocket.routing.explain import Candidate

    Clock = Callable[[float], float]
    Event = dict[str, Any]
    Sample = tuple[float, ReplicaStatus]

# --- requests ---


def read_event(  # noqa: PLR0917 - what it is made of
    record: RequestRecord, session: TrackedSession, routing: Routing, board: Board, policy: Policy, ms: Clock
) -> Event:
    """Return the event of a read or a list."""
    answer = record.answer
    route = getattr(record.error, "route", None) if answer is None else answer.route
    checked = routing is Routing.NEVER_STALE
    goes_by_floor = checked or routing is Routing.ARTICLE
    freshness = floor = write_floor = read_floor = None
    candidates: Sequence[Candidate] = ()
    if route is not None:
        candidates = _candidates(route, board, policy, checked=checked)
        freshness = str(route.freshness) if checked else None
        if goes_by_floor:
            floor = floor_of(route, None if answer is None else answer.node)
        if goes_by_floor and route.tokens:
            write_floor, read_floor = route.tokens[0].write_floor, route.tokens[0].read_floor
    waited_ms = None if route is None or route.waited_s is None else round(route.waited_s * 1000, 3)
    page = page_of(record)
    answered = record.request is Asked.READ and answer is not None and record.error is None
    return {
        "kind": "read",
        **_request_fields(record, session, routing, ms),
        "decided": ms(route.decided_at) if route is not None and route.decided_at else None,
        "role": None if answer is None else answer.role,
        "reason": None if answer is None else answer.reason,
        "freshness": freshness,
        "floor": _lsn(floor),
        "floor_from": None if route is None or floor is None else _origin_of_floor(route, routing),
        "write_floor": _lsn(write_floor),
        "read_floor": _lsn(read_floor),
        "candidates": [
            {
                "name": one.name,
                "replay_lsn": str(one.replay_lsn),
                "vouched_lsn": str(one.vouched_lsn),
                "behind": one.behind,
                "obstacle": one.obstacle,
            }
            for one in candidates
        ],
        "tried": [{"node": name, "error": why} for name, why in (route.failed.items() if route else ())],
        "waited_ms": waited_ms,
        "replayed_lsn": _lsn(replayed_lsn(record)),
        "ride": record.detail if record.request is Asked.READ else None,
        "found": (ride_of(record) is not None) if answered else None,
        "rides": None if page is None else len(page.rides),
        "explanation": explain_read(record, routing, floor, candidates),
    }


def _origin_of_floor(route: Route, routing: Routing) -> str:
    """Return where a read's floor came from: the session's `token`, the `user`'s row, or the `primary`.

    The last is what that had flushed when it was asked, after the read had begun; it lies beyond all tokens of the
    same epoch.
    """
    if routing is Routing.ARTICLE:
        return "user"
    return "primary" if route.freshness is Freshness.GLOBAL and route.required is not None else "token"


def write_event(record: RequestRecord, session: TrackedSession, routing: Routing, ms: Clock) -> Event:
    """Return the event of a write, which may be that of a user."""
    lsn = None
    if record.error is None and record.answer is not None and record.answer.token is not None:
        lsn = record.answer.token.write_floor
    ride = ride_of(record)
    distance = ride[1] if ride else record.detail
    return {
        "kind": "write",
        **_request_fields(record, session, routing, ms),
        "lsn": _lsn(lsn),
        "ride": ride[0] if ride else None,
        "distance": None if distance is None else round(distance, 1),
        "explanation": explain_write(record, lsn),
    }


def _request_fields(record: RequestRecord, session: TrackedSession, routing: Routing, ms: Clock) -> Event:
    answer = record.answer
    return {
        "t": ms(record.done),
        "session": session.name,
        "subject": record.subject,
        "request": record.request,
        "at": ms(record.at),
        "done": ms(record.done),
        "outcome": outcome_of(record),
        "status": int(status_of(record)),
        "node": None if answer is None else answer.node,
        "routing": routing,
        "sent": tokens_text(record.sent),
        "got": None if answer is None or answer.token is None else str(answer.token),
        "error": None if record.error is None else describe(record.error),
    }


def tokens_text(tokens: Sequence[str]) -> str | None:
    """Return tokens as a client sends them; None if there are none."""
    return ", ".join(tokens) or None


def _candidates(route: Route, board: Board, policy: Policy, *, checked: bool) -> Sequence[Candidate]:
    """Return the replicas among which a read was decided, with what kept each from serving it.

    `board` is as it was at about that time. Under a routing that checks nothing, every replica may serve.
    """

    def obstacle_of(status: ReplicaStatus, token: SessionToken) -> Reason | None:
        return obstacle(status, token, board, policy, route.decided_at) if checked else None

    return candidates_of(route, obstacle_of)


def stale_event(stale: StaleRead, read: Event) -> Event:
    """Return the event that calls a read stale."""
    return {
        "kind": "stale",
        "t": read["t"],
        "read": read["id"],
        "node": read["node"],
        "role": read["role"],
        "session": read["session"],
        "at": read["at"],
        "done": read["done"],
        "text": stale.text,
    }


# --- explanations ---

_SUBJECTS = {Asked.JOIN: "The user", Asked.WRITE: "The ride"}


def explain_read(
    record: RequestRecord, routing: Routing, floor: Lsn | None, candidates: Sequence[Candidate]
) -> str:
    """Return a few sentences on where a read went, and why."""
    answer = record.answer
    route = getattr(record.error, "route", None) if answer is None else answer.route
    by_table = routing is Routing.ARTICLE
    sentences = sentences_of(answer, route, floor, candidates, error=record.error, by_table=by_table)
    return " ".join(sentences if answer is None else [*sentences, *_explain_result(record)])


def _explain_result(record: RequestRecord) -> list[str]:
    if record.error is not None:
        return [f"The node did not know the user: {describe(record.error)}"]
    if record.request is Asked.READ:
        return [] if ride_of(record) else ["The ride was not found."]
    page = page_of(record)
    return [] if page is None else [f"The page held {len(page.rides)} ride{'' if len(page.rides) == 1 else 's'}."]


def explain_write(record: RequestRecord, lsn: Lsn | None) -> str:
    """Return a sentence on the outcome of a write."""
    subject, answer = _SUBJECTS[record.request], record.answer
    match outcome_of(record):
        case Outcome.UNKNOWN:
            return f"{subject} may have been written, or not: {_cause(record)}."
        case Outcome.FAIL:
            return f"{subject} was not written: {_cause(record)}."
    node = "" if answer is None else f" on {answer.node}"
    floor = "no floor was recorded" if lsn is None else f"flushed up to {lsn}, which is now the session's floor"
    return f"{subject} was committed{node}; {floor}."


def _cause(record: RequestRecord) -> str:
    return describe(record.error).removesuffix(".") if record.error else "the cause is unknown"


# --- nodes ---


def replica_event(status: ReplicaStatus, at: float, board: Board, ms: Clock) -> Event:
    """Return the event of a replica's status, which is on `board` by now."""
    lag_s = board.lag_seconds(status, status.answered_at)
    return {
        "kind": "replica",
        "t": ms(at),
        "name": status.name,
        "replay_lsn": str(status.replay_lsn),
        "receive_lsn": _lsn(status.receive_lsn),
        "incarnation": status.incarnation,
        "epoch": status.epoch,
        "streaming": status.streaming,
        "lag_bytes": board.lag_bytes(status),
        "lag_ms": None if lag_s is None else round(lag_s * 1000, 3),
        "asked": ms(status.observed_at),
        "answered": ms(status.answered_at),
    }


def primary_event(status: PrimaryStatus, at: float, ms: Clock, *, lost: bool) -> Event:
    """Return the event of the primary's status.

    With `lost` it is the last one: the node no longer answers as the primary.
    """
    return {
        "kind": "primary",
        "t": ms(at),
        "name": status.name,
        "flush_lsn": str(status.flush_lsn),
        "epoch": status.epoch,
        "asked": ms(status.observed_at),
        "lost": lost,
    }


def fault_event(entry: CommandDone, ms: Clock) -> Event:
    """Return the event of a command that the cluster carried out, or failed to."""
    done = entry.done
    return {
        "kind": "fault",
        "t": ms(entry.at),
        "name": done.command,
        "node": done.node,
        "said": done.said,
        "ok": done.ok,
        "began": ms(done.began),
        "delay_ms": done.delay_ms,
    }


def _lsn(lsn: Lsn | None) -> str | None:
    return None if lsn is None or lsn == Lsn.PENDING else str(lsn)


_UNCHANGED_S = 0.1
"""An unchanged status is sent this often."""
_PER_BATCH = 20
"""Statuses of all replicas between two batches."""


class StatusSampler:
    """Thins out replica statuses, of which there are a thousand a second while reads wait.

    It drops statuses that are unchanged, except the last one before each change: the change lies between the two.
    """

    def __init__(self) -> None:
        self._sent: dict[str, Sample] = {}
        self._held: dict[str, Sample] = {}
        self._allowance = _PER_BATCH

    def refill(self) -> None:
        """Begin another batch."""
        self._allowance = _PER_BATCH

    def sample(self, status: ReplicaStatus, at: float) -> list[Sample]:
        """Take in a status and return those to send now."""
        before = self._sent.get(status.name)
        sample = (at, status)
        held = self._held.pop(status.name, None)
        changed = before is None or _state_of(before[1]) != _state_of(status)
        if self._allowance < 1 or not (changed or before is None or at - before[0] >= _UNCHANGED_S):
            self._held[status.name] = sample
            return []
        samples = [held, sample] if held is not None and changed else [sample]
        self._allowance -= len(samples)
        self._sent[status.name] = sample
        return samples

    def forget(self, name: str) -> None:
        """Treat the next status of a replica as its first one."""
        self._sent.pop(name, None)
        self._held.pop(name, None)


def _state_of(status: ReplicaStatus) -> tuple[object, ...]:
    return status.replay_lsn, status.receive_lsn, status.streaming, status.incarnation, status.epoch


# --- figures ---

_LATEST_READS = 2000
_LATENCY_WINDOW_S = 5.0


class Latencies:
    """Latencies of the latest reads."""

    def __init__(self) -> None:
        self._latest: deque[tuple[float, float]] = deque(maxlen=_LATEST_READS)

    def add(self, record: RequestRecord) -> None:
        """Take in a read."""
        self._latest.append((record.done, record.done - record.at))

    def percentiles(self, now: float) -> dict[str, float | None]:
        """Return p50 and p99 in milliseconds."""
        while self._latest and self._latest[0][0] < now - _LATENCY_WINDOW_S:
            self._latest.popleft()
        latencies_s = sorted(latency_s for _, latency_s in self._latest)
        last = len(latencies_s) - 1
        return {
            name: round(latencies_s[min(last, int(len(latencies_s) * share))] * 1000, 3) if latencies_s else None
            for name, share in (("p50_ms", 0.5), ("p99_ms", 0.99))
        }


def totals(counts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the totals of a tick from what the API has counted since its start."""
    reasons, writes = counts["reasons"], counts["writes"]
    return {
        "reads": counts["reads"],
        "reasons": reasons,
        "writes": writes.get("committed", 0),
        "failed": counts["reads_unavailable"] + writes.get("unavailable", 0) + writes.get("unknown", 0),
        "waited": reasons.get(Reason.WAITED, 0),
        "retried": reasons.get(Reason.RETRIED, 0),
        "fallbacks": sum(counts["fallbacks"].values()),
    }
