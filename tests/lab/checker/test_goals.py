"""What is expected beyond the rules of a run on a cluster that Patroni runs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from rocket.lab.checker.goals import closing_words, findings
from rocket.lab.checker.history import Fault, Op, Outcome, Role
from tests.lab.checker.stories import failed, on_primary, op, read, story, token, write

PROMOTED = {"leader": "primary", "at": 30.0, "fork": "0/20"}


def fault(name: str, **detail: Any) -> Fault:
    """Return a fault of node1, from 10 s to 40 s."""
    return Fault(name=name, at=10.0, until=40.0, node="node1", detail=detail)


def told(*added: Op | Fault) -> dict[str, bool]:
    """Return what is found, and whether it is good."""
    return {one.words: one.good for one in findings(story(*added))}


def test_a_reinit_is_over_when_the_replica_is_read_from_again() -> None:
    """What it answered before it was made anew does not count."""
    made_anew = fault("reinit", promoted=[], cloned=12.0)
    early, late = (replace(read("s1", at, 1, None), node="node1") for at in (11.0, 15.0))

    assert told(made_anew, early, late)["reinit of node1: read from again 5.01 s after that was asked for"]
    assert not told(made_anew, early)["reinit of node1: read from again never"]


def test_an_old_leader_that_is_cut_off_answers_nothing_as_the_primary() -> None:
    """From the moment on at which it has a successor; as a replica it may."""
    cut_off = fault("partition", promoted=[], succeeded=31.0)
    before, after = (replace(on_primary(read("s1", at, 1, None)), node="node1") for at in (30.0, 35.0))
    as_replica = replace(after, role=Role.REPLICA)

    assert told(cut_off, before, as_replica)["cut-off old leader node1: answered 0 as the primary"]
    assert not told(cut_off, after)["cut-off old leader node1: answered 1 as the primary"]


def unanswered(sent: str, at: float = 20.0) -> Op:
    """Return a read with this token that was refused."""
    return failed(replace(read("s1", at, 1, None), sent=sent), Outcome.FAIL, 503)


def share(*added: Op | Fault) -> str:
    """Return what is said of the reads."""
    return next(words for words in told(*added) if words.startswith("reads answered"))


def test_what_nobody_has_who_is_left_need_not_be_answered() -> None:
    """Its only replicas were cut off from the leader: until there is a new one, a 503 is what is promised."""
    cut_off = fault("partition", promoted=[PROMOTED])
    everything = share(cut_off)

    assert everything == share(cut_off, unanswered(token("0/21")))
    assert everything == share(cut_off, unanswered(token("0/10", "0/21")))
    assert everything == share(cut_off, unanswered(f"{token('0/10')}, {token('0/21')}"))
    assert everything != share(cut_off, unanswered(token("0/20", "0/20")))
    assert everything != share(cut_off, unanswered(token("0/20", "0/21") + "~node2~1@1"))
    assert everything != share(cut_off, unanswered(token("0/21"), at=31.5))


def test_a_goal_that_was_missed_is_said_last() -> None:
    """Of what is promised, the exit code tells."""
    slow = fault("leader-killed", promoted=[PROMOTED])
    late = replace(write("s1", 32.0, 1, 1.0), node="primary")
    old = replace(on_primary(op("s1", read("s1", 0, 1, None).request, 35.0)), node="node1")

    found = list(findings(story(slow, late)))
    assert [
        "GOALS MISSED: 1 of 2. They are no part of the guarantee, and change no exit code:",
        "  ! leader-killed of node1: writes back 2.01 s after Patroni's promotion of primary",
    ] == closing_words(found)
    assert [] == closing_words(list(findings(story(fault("partition", promoted=[], succeeded=31.0), old))))
