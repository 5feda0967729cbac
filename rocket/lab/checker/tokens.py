"""What the session tokens of a history must keep to."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

from rocket.consistency import Lsn, SessionToken
from rocket.lab.checker.verdict import Rule

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rocket.lab.checker.history import Op
    from rocket.lab.checker.verdict import Findings


def look_at_tokens(session: Sequence[Op], findings: Findings) -> None:
    """Find tokens handed to a session that are none, or say less than those before them."""
    latest: tuple[int, Op] | None = None
    for op in session:
        if op.got is None:
            continue
        got = _parsed(op.got)
        if got is None:
            findings.add(
                Rule.MALFORMED_TOKEN, f"Session {op.session} was given '{op.got}', which is no session token.", op
            )
            continue
        sent = None if op.sent is None else _parsed(op.sent)
        if sent is not None and sent.epoch == got.epoch:
            _compare(op, sent, got, findings)
        if not op.tokens:
            continue  # each of its requests stands for itself
        if latest is not None and got.timeline < latest[0]:
            findings.add(
                Rule.FLOORS_GO_BACK,
                f"Session {op.session} was given a token of timeline {got.timeline} after one of {latest[0]}.",
                latest[1],
                op,
            )
        else:
            latest = got.timeline, op


def _compare(op: Op, sent: SessionToken, got: SessionToken, findings: Findings) -> None:
    # A part that was unknown asked for the very same replica, or the primary: it may end at any LSN.
    known = max(
        (floor for floor in (sent.write_floor, sent.read_floor) if floor not in {None, Lsn.PENDING}),
        default=Lsn(0),
    )
    highest = got.highest_floor
    if sent.write_floor != Lsn.PENDING and got.write_floor < sent.write_floor:
        fall = f"The write floor of session {op.session} fell from {sent.write_floor} to {got.write_floor}."
    elif highest < known:
        fall = f"The higher of the floors of session {op.session} fell from {known} to {highest}."
    else:
        return
    findings.add(Rule.FLOORS_GO_BACK, fall, op)


@lru_cache(maxsize=4096)
def _parsed(text: str) -> SessionToken | None:
    try:
        return SessionToken.parse(text)
    except ValueError:
        return None
