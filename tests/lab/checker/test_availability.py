"""Availability: replicas that resume, processes that die, and the targets of failovers that Patroni runs."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from rocket.lab.checker.availability import failover_targets, missed_targets, outages_of
from rocket.lab.checker.check import Judgement, check
from rocket.lab.checker.findings import Rule
from rocket.lab.checker.history import TAKEN_OVER, Fault, Op, Outcome, Role
from rocket.lab.checker.report import report
from tests.support.histories import (
    FRAME,
    HEALED_AT,
    RUN,
    convicted,
    failed,
    held,
    history_of,
    on_primary,
    op,
    read,
    token,
    void,
    write,
)

# --- replicas, once the faults are over ---


def test_replica_reads_resume() -> None:
    """On all replicas, within ten seconds."""
    late = tuple(
        replace(one, at=HEALED_AT + 10.5, done=HEALED_AT + 10.6) if one.at == HEALED_AT + 2 else one
        for one in FRAME
    )
    never = tuple(one for one in FRAME if one.at != HEALED_AT + 2)

    convicted(history_of(frame=late), Rule.NOT_RESUMED, late[-2])
    convicted(history_of(frame=never), Rule.NOT_RESUMED)
    held(history_of(frame=never, run=replace(RUN, nodes=("primary", "replica0"))))


def test_too_little_traffic_after_the_faults_proves_nothing() -> None:
    """Replicas that have not served yet may still do so."""
    short = tuple(one for one in FRAME if one.at < HEALED_AT + 2)

    void(history_of(frame=short), "traffic for 1.0 s only")
    held(history_of(frame=tuple(one for one in FRAME if one.at <= HEALED_AT + 2)))


# --- several processes of the API ---

SEVERAL = replace(RUN, processes=3)
SENT = token("0/10")


def fault(name: str, at: float, until: float, **detail: float | None) -> Fault:
    """Return something done to a process, met by a read."""
    return Fault(name=name, at=at, until=until, detail=detail)


def unanswered(at: float, status: int | None = 503, **values: object) -> Op:
    """Return a read with its session's token that failed."""
    return failed(replace(read("s1", at, 1, None, **values), sent=SENT), Outcome.FAIL, status)


def rules_broken(*added: Op | Fault, processes: int = 3) -> dict[Rule, int]:
    """Return how often each rule is broken in a run with these beside its frame."""
    return dict(check(history_of(*added, run=replace(SEVERAL, processes=processes))).counts or {})


@pytest.mark.parametrize("status", [None, 503])
def test_a_read_with_a_token_is_answered(status: int | None) -> None:
    """With several processes, whatever becomes of one of them."""
    assert {Rule.READ_NOT_ANSWERED: 1} == rules_broken(unanswered(20, status))
    assert {} == rules_broken(unanswered(20, status), processes=1)


def test_a_read_that_no_node_can_answer_is_excused() -> None:
    """The primary is away, or was until a moment ago; no other fault is an excuse."""
    assert {} == rules_broken(unanswered(20), fault("primary-killed", 18.5, 19))
    assert {Rule.READ_NOT_ANSWERED: 1} == rules_broken(unanswered(22), fault("primary-killed", 18.5, 19))
    assert {Rule.READ_NOT_ANSWERED: 1} == rules_broken(unanswered(20), fault("replica-killed", 19, 21))


def test_what_is_no_read_with_a_token_is_not_counted() -> None:
    """A read without a token needs the primary; a write may fail; a client that hangs up gets no answer."""
    without = replace(unanswered(20), sent=None)
    hung_up = replace(unanswered(21), outcome=Outcome.UNKNOWN, status=None)
    refused = failed(write("s1", 22, None, 9.9), Outcome.FAIL, 503)
    assert {} == rules_broken(without, hung_up, refused)


@pytest.mark.parametrize(
    ("name", "took_s", "broken"),
    [
        ("writer-killed", 0.4, False),
        ("writer-killed", 2.1, True),
        ("writer-killed", None, True),
        ("writer-frozen", 2.1, False),
        ("writer-frozen", 4.1, True),
    ],
)
def test_another_process_writes_the_table_in_time(name: str, took_s: float | None, *, broken: bool) -> None:
    """Two seconds after a death; a little longer where the primary has to find out."""
    hit = fault(name, 20, 25, **{TAKEN_OVER: took_s})
    met = replace(read("s1", 21, 1, None), done=21.1)
    assert ({Rule.NOT_TAKEN_OVER: 1} if broken else {}) == rules_broken(hit, met)


def test_figures_tell_what_was_noticed() -> None:
    """What was sent again, what failed with and without an excuse, and how long no process wrote."""
    history = history_of(
        fault("primary-killed", 30, 31),
        fault("writer-killed", 40, 41, **{TAKEN_OVER: 0.5}),
        unanswered(20),
        unanswered(30.5),
        replace(read("s1", 41, 1, None), sent=SENT, again=True),
        run=SEVERAL,
    )
    outages = outages_of(history)
    assert outages is not None
    assert (1, 2, 1) == (outages.again, outages.not_answered, outages.excused)
    assert {"writer-killed": (0.5,)} == outages.taken_over_s
    verdict = check(history)
    assert Judgement.VIOLATED is verdict.judgement
    assert "writer-killed: new writer" in report(verdict)
    assert outages_of(history_of()) is None


# --- a cluster that Patroni runs ---

PROMOTED = {"leader": "primary", "at": 30.0, "fork": "0/20"}


def patroni_fault(name: str, **detail: Any) -> Fault:
    """Return a fault of node1, from 10 s to 40 s."""
    return Fault(name=name, at=10.0, until=40.0, node="node1", detail=detail)


def targets(*added: Op | Fault) -> dict[str, bool]:
    """Return the targets of a run, and whether each was met."""
    return {target.text: target.met for target in failover_targets(history_of(*added))}


def test_a_reinit_is_over_when_the_replica_is_read_from_again() -> None:
    """What it answered before it was made anew does not count."""
    made_anew = patroni_fault("reinit", promoted=[], cloned=12.0)
    early, late = (replace(read("s1", at, 1, None), node="node1") for at in (11.0, 15.0))

    assert targets(made_anew, early, late)["reinit of node1: read from again 5.01 s after that was asked for"]
    assert not targets(made_anew, early)["reinit of node1: read from again never"]


def test_an_old_leader_that_is_cut_off_answers_nothing_as_the_primary() -> None:
    """From the moment on at which it has a successor; as a replica it may."""
    cut_off = patroni_fault("partition", promoted=[], succeeded=31.0)
    before, after = (replace(on_primary(read("s1", at, 1, None)), node="node1") for at in (30.0, 35.0))
    as_replica = replace(after, role=Role.REPLICA)

    assert targets(cut_off, before, as_replica)["cut-off old leader node1: answered 0 as the primary"]
    assert not targets(cut_off, after)["cut-off old leader node1: answered 1 as the primary"]


def refused(sent: str, at: float = 20.0) -> Op:
    """Return a read with this token that was refused."""
    return failed(replace(read("s1", at, 1, None), sent=sent), Outcome.FAIL, 503)


def share(*added: Op | Fault) -> str:
    """Return the line on the share of reads answered."""
    return next(text for text in targets(*added) if text.startswith("reads answered"))


def test_a_floor_that_no_node_left_has_reached_need_not_be_answered() -> None:
    """The only replicas were cut off from the leader: until there is a new one, a 503 is what is promised."""
    cut_off = patroni_fault("partition", promoted=[PROMOTED])
    everything = share(cut_off)

    assert everything == share(cut_off, refused(token("0/21")))
    assert everything == share(cut_off, refused(token("0/10", "0/21")))
    assert everything == share(cut_off, refused(f"{token('0/10')}, {token('0/21')}"))
    assert everything != share(cut_off, refused(token("0/20", "0/20")))
    assert everything != share(cut_off, refused(token("0/20", "0/21") + "~node2~1@1"))
    assert everything != share(cut_off, refused(token("0/21"), at=31.5))


def test_a_target_that_was_missed_is_in_the_last_lines() -> None:
    """What is promised is not among them: there the exit code says it."""
    slow = patroni_fault("leader-killed", promoted=[PROMOTED])
    late = replace(write("s1", 32.0, 1, 1.0), node="primary")
    old = replace(on_primary(op("s1", read("s1", 0, 1, None).request, 35.0)), node="node1")

    found = list(failover_targets(history_of(slow, late)))
    assert [
        "TARGETS MISSED: 1 of 2. The guarantee does not cover them, nor does the exit code:",
        "  ! leader-killed of node1: writes back 2.01 s after Patroni's promotion of primary",
    ] == missed_targets(found)
    assert [] == missed_targets(
        list(failover_targets(history_of(patroni_fault("partition", promoted=[], succeeded=31.0), old)))
    )
