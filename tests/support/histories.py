"""Histories made step by step: a run in which all is well, and what a test adds to it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from msgspec.structs import replace

from rocket.lab.checker.check import Judgement, check
from rocket.lab.checker.history import End, Fault, Healed, History, Op, Outcome, Request, Role, Run

if TYPE_CHECKING:
    from rocket.lab.checker.findings import Rule

NODES = ("primary", "replica0", "replica1")
RUN = Run(
    seed=1,
    duration_s=40.0,
    routing="never-stale",
    sessions=3,
    faults=("replay-paused",),
    nodes=NODES,
    started_at="2025-01-01T00:00:00+00:00",
)
EPOCH = "1-aaaaaaaa"
HEALED_AT = 100.0
LOST = "A promotion may have lost writes of this session."


def op(session: str, request: Request, at: float, **values: Any) -> Op:
    """Return an op of 10 ms that was answered by a replica; a session named `bare...` sends no tokens.

    Sessions that end in the same digit are of the same user.
    """
    given = {
        "user": f"user{session[-1]}@example.com",
        "tokens": not session.startswith("bare"),
        "done": at + 0.01,
        "outcome": Outcome.OK,
        "status": 200,
        "node": "replica0",
        "role": Role.REPLICA,
        "reason": "caught-up",
    }
    return Op(session=session, request=request, at=at, **{**given, **values})


def join(session: str, at: float, **values: Any) -> Op:
    """Return a `POST /users`."""
    return on_primary(op(session, Request.JOIN, at, **{"status": 201, "reason": "write", **values}))


def write(session: str, at: float, ride: int | None, distance: float, **values: Any) -> Op:
    """Return a `POST /rides`."""
    made = op(session, Request.WRITE, at, ride=ride, distance=distance, **{"status": 201, **values})
    return on_primary(replace(made, reason="write"))


def failed(made: Op, outcome: Outcome, status: int | None = None) -> Op:
    """Return the op with another end."""
    ride = None if made.request is Request.WRITE else made.ride
    return replace(made, outcome=outcome, status=status, ride=ride, node=None, role=None, reason=None)


def read(session: str, at: float, ride: int, distance: float | None, **values: Any) -> Op:
    """Return a `GET /rides/{id}`; without a distance it found nothing."""
    status = 404 if distance is None else 200
    return op(session, Request.READ, at, ride=ride, distance=distance, **{"status": status, **values})


def page(session: str, at: float, *rides: tuple[int, float], complete: bool = True, **values: Any) -> Op:
    """Return a `GET /rides`."""
    return op(session, Request.LIST, at, rides=rides, complete=complete, **values)


def on_primary(made: Op, reason: str | None = None) -> Op:
    """Return the op as the primary answers it."""
    return replace(made, node="primary", role=Role.PRIMARY, reason=reason or made.reason)


def token(write_floor: str, read_floor: str = "0/0", epoch: str = EPOCH) -> str:
    """Return a session token."""
    return f"1~{epoch}~{write_floor}~{read_floor}"


def promotion(at: float, until: float, *, lossy: bool = True) -> Fault:
    """Return a promotion."""
    return Fault(name="promotion-lossy" if lossy else "promotion", at=at, until=until, node="replica1")


FRAME: tuple[Op, ...] = (
    join("frame9", 0.0),
    write("frame9", 0.1, 900_001, 99_000.1),
    read("frame9", 0.2, 900_001, 99_000.1, reason="caught-up-after-wait"),
    read("frame9", 0.3, 900_001, 99_000.1, node="replica1"),
    on_primary(read("frame9", 0.4, 900_001, 99_000.1), "not-caught-up"),
    read("frame9", HEALED_AT + 1, 900_001, 99_000.1),
    read("frame9", HEALED_AT + 2, 900_001, 99_000.1, node="replica1"),
    read("frame9", HEALED_AT + 11, 900_001, 99_000.1),
)
"""Enough for a run to mean something."""
PAUSE = Fault(name="replay-paused", at=0.15, until=0.25, node="replica0")


def history_of(*added: Op | Fault, run: Run = RUN, frame: tuple[Op, ...] = FRAME) -> History:
    """Return a whole history: the frame and what is added."""
    met = [
        # Every fault that is added meets a request.
        op("other8", Request.LIST, one.at, done=one.until, rides=(), complete=True)
        for one in added
        if isinstance(one, Fault)
    ]
    met = [one if number == 0 else replace(one, session=f"other{number}8") for number, one in enumerate(met)]
    return History.of([run, *frame, *met, PAUSE, *added, Healed(at=HEALED_AT), End(at=HEALED_AT + 12)])


# --- verdicts ---


def convicted(history: History, rule: Rule, *ops: Op) -> None:
    """Check that exactly one rule was broken, once, and that the excerpt shows these operations alone."""
    verdict = check(history)
    assert Judgement.VIOLATED is verdict.judgement
    assert {rule: 1} == dict(verdict.counts or {})
    assert [ops] == [violation.ops for violation in verdict.violations]


def held(history: History) -> None:
    """Check that nothing is wrong with a history, nor missing in it."""
    verdict = check(history)
    assert (Judgement.HELD, (), ()) == (verdict.judgement, verdict.reasons, verdict.violations)


def void(history: History, reason: str) -> None:
    """Check that a run proves nothing, for one reason."""
    verdict = check(history)
    assert Judgement.VOID is verdict.judgement
    (given,) = verdict.reasons
    assert reason in given
