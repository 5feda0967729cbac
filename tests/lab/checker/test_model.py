"""Runs of a tiny model that never is stale hold; the same with one answer changed does not."""

from __future__ import annotations

import random
from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from rocket.lab.checker.check import Judgement, check
from rocket.lab.checker.findings import Rule
from rocket.lab.checker.history import Op, Outcome, Request
from tests.support.histories import failed, history_of, page, read, token, write

SESSIONS = ("s1", "more1", "bare1", "bare2", "s2", "bar1")
PAGE = 4
seeds = st.integers(0, 2**32)
thorough = settings(max_examples=150)


@dataclass(frozen=True)
class Commit:
    """A ride, from the moment when it can be seen."""

    moment: float
    user: str
    distance: float


def asked(choice: random.Random) -> list[Op]:
    """Return requests of sessions that take their time, side by side; what they answer comes later."""
    ops, distance = [], 0.0
    for session in SESSIONS:
        at = choice.random()
        for _ in range(choice.randint(1, 12)):
            done = at + choice.uniform(0.01, 2.0)
            kind = choice.choice(["write", "write", "fail", "unknown", "read", "page", "page"])
            distance = round(distance + 0.1, 1)
            if kind == "read":
                ops.append(read(session, at, 1, None, done=done))
            elif kind == "page":
                ops.append(page(session, at, done=done))
            else:
                made = write(session, at, 1, distance, done=done)
                ends = {"fail": (Outcome.FAIL, 503), "unknown": (Outcome.UNKNOWN, 504)}
                ops.append(failed(made, *ends[kind]) if kind in ends else made)
            at = done + choice.choice([0.0, choice.random()])
    return ops


def answered(seed: int) -> list[Op]:
    """Return a run in which each request happens at one moment between its two ends, on one register."""
    choice = random.Random(seed)
    ops = asked(choice)
    commits = []
    for op in ops:
        may_commit = {Outcome.OK: 1.0, Outcome.FAIL: 0.0, Outcome.UNKNOWN: 0.5}[op.outcome]
        if op.request is Request.WRITE and op.distance is not None and choice.random() < may_commit:
            latest = op.done + (30.0 if op.outcome is Outcome.UNKNOWN else 0.0)
            commits.append(Commit(choice.uniform(op.at, latest), op.user, op.distance))
    commits.sort(key=lambda commit: commit.moment)
    ids = {commit.distance: number for number, commit in enumerate(commits, start=1)}
    floors: dict[str, int] = {}
    answers = []
    for op in sorted(ops, key=lambda op: op.at):
        if op.outcome is not Outcome.OK:
            answers.append(op)
            continue
        # With what is known by the end: the latest moment at which it may have happened.
        moment = op.done if op.request is Request.WRITE else choice.uniform(op.at, op.done)
        shown = [
            (ids[commit.distance], commit.distance)
            for commit in reversed(commits)
            if commit.user == op.user and commit.moment <= moment
        ]
        if op.request is Request.WRITE:
            answer = replace(op, ride=ids[op.distance or 0.0])
        elif op.request is Request.LIST:
            answer = replace(op, rides=tuple(shown[:PAGE]), complete=len(shown) <= PAGE)
        else:
            ride = choice.randint(1, len(ids) + 1)
            distance = dict(shown).get(ride)
            answer = replace(op, ride=ride, distance=distance, status=404 if distance is None else 200)
        before = floors.get(op.session, 0)
        floors[op.session] = max(before, sum(commit.moment <= moment for commit in commits))
        got = token(f"0/{floors[op.session]:X}")
        answers.append(replace(answer, sent=token(f"0/{before:X}") if before and op.tokens else None, got=got))
    return answers


def pages(ops: list[Op]) -> list[Op]:
    """Return the pages that show rides."""
    return [op for op in ops if op.rides]


def expected(ops: list[Op], reading: Op) -> set[float]:
    """Return what an answer has to show, computed from the definition."""
    before = [
        op
        for op in ops
        if op.done <= reading.at
        and (op.session == reading.session if reading.tokens else op.user == reading.user and op.done < reading.at)
    ]
    written = {op.distance for op in before if op.request is Request.WRITE and op.outcome is Outcome.OK}
    seen = {distance for op in before if reading.tokens for distance in op.shown or ()}
    return {distance for distance in written | seen if distance is not None}


def changed(ops: list[Op], one: Op, **values: object) -> list[Op]:
    """Return the run with another answer."""
    return [replace(op, **values) if op is one else op for op in ops]


def convicted_of(ops: list[Op]) -> set[Rule]:
    """Return the rules that a run breaks."""
    verdict = check(history_of(*ops))
    assert (verdict.judgement is Judgement.VIOLATED) == bool(verdict.counts)
    return set(verdict.counts or {})


@thorough
@given(seeds)
def test_a_run_that_never_was_stale_holds(seed: int) -> None:
    """Whatever happened side by side."""
    verdict = check(history_of(*answered(seed)))

    assert (Judgement.HELD, ()) == (verdict.judgement, verdict.reasons)


@thorough
@given(seeds)
def test_a_ride_left_out_is_missed_only_if_it_was_expected(seed: int) -> None:
    """Of every page in turn, and every ride on it; a ride that was not expected may be left out."""
    ops = answered(seed)
    for one in pages(ops):
        due = expected(ops, one)
        for gone in one.rides or ():
            rest = tuple(ride for ride in one.rides or () if ride != gone)
            covered = bool(one.complete) or (bool(rest) and gone[0] > min(rest)[0])
            stale = {Rule.READ_YOUR_WRITES, Rule.MONOTONIC_READS}
            assert (gone[1] in due and covered) == bool(stale & convicted_of(changed(ops, one, rides=rest)))


@thorough
@given(seeds)
def test_a_single_read_that_finds_nothing_is_convicted_only_if_it_was_expected(seed: int) -> None:
    """The same for the other way to read."""
    ops = answered(seed)
    for one in ops:
        if one.request is Request.READ and one.distance is not None:
            rules = convicted_of(changed(ops, one, distance=None, status=404))
            assert (one.distance in expected(ops, one)) == bool(rules)


@thorough
@given(seeds)
def test_a_ride_with_another_distance_is_invented(seed: int) -> None:
    """However it came to be shown."""
    ops = answered(seed)
    for one in pages(ops):
        (ride, _), *others = one.rides or ()
        assert Rule.FOREIGN_OR_INVENTED in convicted_of(changed(ops, one, rides=((ride, 77_777.7), *others)))


@thorough
@given(seeds)
def test_a_ride_moved_to_another_user_is_foreign(seed: int) -> None:
    """Each page is shown to another user in turn."""
    ops = answered(seed)
    for one in pages(ops):
        for other in ops:
            if other.request is Request.LIST and other.user != one.user:
                moved = (*(other.rides or ()), (one.rides or ())[0])
                assert Rule.FOREIGN_OR_INVENTED in convicted_of(changed(ops, other, rides=moved))
                break


@thorough
@given(seeds)
def test_a_lower_floor_is_seen(seed: int) -> None:
    """Of every answer to a token in turn."""
    ops = answered(seed)
    for one in ops:
        if one.sent is not None and one.got is not None:
            assert {Rule.FLOORS_GO_BACK} == convicted_of(changed(ops, one, got=token("0/0")))
