"""What a viewer is told of a happening, as an object for JSON. Times are milliseconds since the journal's zero."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rocket import Lsn
from rocket.errors import describe
from rocket.lab.api.recorder import Asked
from rocket.lab.comparison import Routing
from rocket.lab.inspector.candidates import candidates_with_obstacles
from rocket.lab.inspector.told import outcome_of, page_of, ride_of, shown_lsn, status_of
from rocket.lab.inspector.words import words_of_read, words_of_write
from rocket.routing.explain import floor_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from rocket import Policy
    from rocket.consistency import Board, PrimaryStatus, ReplicaStatus, SessionToken
    from rocket.lab.api.recorder import RequestRecord
    from rocket.lab.inspector.checker import Stale
    from rocket.lab.inspector.event_log import Faulted
    from rocket.lab.inspector.sessions import Session

    Clock = Callable[[float], float]
    Event = dict[str, Any]


def read_event(  # noqa: PLR0917 - what it is made of
    told: RequestRecord, session: Session, routing: Routing, board: Board, policy: Policy, ms: Clock
) -> Event:
    """Tell of a read or a list."""
    answer = told.answer
    route = getattr(told.error, "route", None) if answer is None else answer.route
    guarded = routing is Routing.NEVER_STALE
    goes_by_floor = guarded or routing is Routing.ARTICLE
    floor = write_floor = read_floor = None
    candidates: Sequence[Any] = ()
    if route is not None:
        candidates = candidates_with_obstacles(route, board, policy, guarded=guarded)
        if goes_by_floor:
            floor = floor_of(route, None if answer is None else answer.node)
        if goes_by_floor and route.tokens:
            write_floor, read_floor = route.tokens[0].write_floor, route.tokens[0].read_floor
    waited_ms = None if route is None or route.waited_s is None else round(route.waited_s * 1000, 3)
    page = page_of(told)
    found = told.request is Asked.READ and answer is not None and told.error is None
    return {
        "kind": "read",
        **_asked(told, session, routing, ms),
        "decided": ms(route.decided_at) if route is not None and route.decided_at else None,
        "role": None if answer is None else answer.role,
        "reason": None if answer is None else answer.reason,
        "floor": _lsn(floor),
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
        "shown_lsn": _lsn(shown_lsn(told)),
        "ride": told.detail if told.request is Asked.READ else None,
        "found": (ride_of(told) is not None) if found else None,
        "rides": None if page is None else len(page.rides),
        "words": words_of_read(told, routing, floor, candidates),
    }


def write_event(told: RequestRecord, session: Session, routing: Routing, ms: Clock) -> Event:
    """Tell of a write, or of a user who joined."""
    lsn = None
    if told.error is None and told.answer is not None and told.answer.token is not None:
        lsn = told.answer.token.write_floor
    ride = ride_of(told)
    distance = ride[1] if ride else told.detail
    return {
        "kind": "write",
        **_asked(told, session, routing, ms),
        "lsn": _lsn(lsn),
        "ride": ride[0] if ride else None,
        "distance": None if distance is None else round(distance, 1),
        "words": words_of_write(told, lsn),
    }


def _asked(told: RequestRecord, session: Session, routing: Routing, ms: Clock) -> Event:
    answer = told.answer
    return {
        "t": ms(told.done),
        "session": session.name,
        "subject": told.subject,
        "request": told.request,
        "at": ms(told.at),
        "done": ms(told.done),
        "outcome": outcome_of(told),
        "status": int(status_of(told)),
        "node": None if answer is None else answer.node,
        "routing": routing,
        "sent": tokens_text(told.sent),
        "got": None if answer is None or answer.token is None else str(answer.token),
        "error": None if told.error is None else describe(told.error),
    }


def tokens_text(tokens: Sequence[SessionToken]) -> str | None:
    """Return tokens as a client sends them; None if there are none."""
    return ", ".join(map(str, tokens)) or None


def replica_event(status: ReplicaStatus, at: float, board: Board, ms: Clock) -> Event:
    """Tell of a look at a replica that is on `board` by now."""
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
    """Tell of a look at the primary; `lost`: of the last one, since it does not answer as one any more."""
    return {
        "kind": "primary",
        "t": ms(at),
        "name": status.name,
        "flush_lsn": str(status.flush_lsn),
        "epoch": status.epoch,
        "asked": ms(status.observed_at),
        "lost": lost,
    }


def fault_event(fault: Faulted, ms: Clock) -> Event:
    """Tell of something that was done to the cluster."""
    done = fault.done
    return {
        "kind": "fault",
        "t": ms(fault.at),
        "name": done.command,
        "node": done.node,
        "said": done.said,
        "ok": done.ok,
        "began": ms(done.began),
        "delay_ms": done.delay_ms,
    }


def stale_event(stale: Stale, read: Event) -> Event:
    """Tell that a read was stale."""
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


def _lsn(lsn: Lsn | None) -> str | None:
    return None if lsn is None or lsn == Lsn.PENDING else str(lsn)
