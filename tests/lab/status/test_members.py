"""What API and cluster say of each member, put together."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from rocket.lab.status.members import ApiStatus, Member, Reads, members

NOW = 2_000.0
EPOCH = "1-aaaaaaaaaa"


def node(name: str, **others: object) -> dict[str, Any]:
    """What the cluster says of a node: of a replica that streams, unless told otherwise."""
    role = "primary" if name == "primary" else "replica"
    return {
        "name": name, "role": role, "state": "up", "pid": 1, "port": 5433, "timeline": 1, "lsn": "0/20",
        "lag_bytes": None if role == "primary" else 0, "paused": False, "delay_ms": 0,
        "receiver": None if role == "primary" else "streaming",
    } | others  # fmt: skip


def seen(name: str, **others: object) -> dict[str, Any]:
    """What the API says of a replica."""
    return {
        "name": name, "replay_lsn": "0/10", "streaming": True, "incarnation": "7@1990000000", "epoch": EPOCH,
        "lag_bytes": 16, "lag_seconds": 0.5,
    } | others  # fmt: skip


def answer(*replicas: dict[str, Any], primary: str | None = "primary", lost: bool = False) -> dict[str, Any]:
    """What the API answers, with the primary and two replicas among its nodes."""
    return {
        "pid": 1,
        "routing": "never-stale",
        "primary": None
        if primary is None
        else {"name": primary, "flush_lsn": "0/18", "epoch": EPOCH, "lost": lost},
        "replicas": list(replicas),
        "reads": {"replica0": 3, "primary": 1},
        "reasons": {"caught-up": 3, "not-caught-up": 1},
        "fallbacks": {"not-caught-up": 1},
        "reads_unavailable": 2,
        "connections": {name: {"in_use": 1, "idle": 2} for name in ("primary", "replica0", "replica1")},
    }


def rows(said: dict[str, Any] | None, *nodes: dict[str, Any]) -> dict[str, Member]:
    """Return the members by name."""
    api = None if said is None else ApiStatus.read(said)
    return {member.name: member for member in members(api, nodes, api.reads if api else None, NOW)}


def test_each_source_tells_what_it_knows() -> None:
    """Ports and positions of this moment from the cluster; lives, seconds, reads and connections from the API."""
    found = rows(answer(seen("replica0")), node("primary"), node("replica0", port=5434), node("replica1"))

    assert Member(
        name="replica0", port=5434, role="replica", state="streaming", timeline=1, lsn="0/20",
        lag_bytes=0, lag_seconds=0.5, incarnation="7@1990000000", incarnation_age_seconds=10.0,
        reads=3, reads_percent=75.0, connections_in_use=1, connections_idle=2,
    ) == found["replica0"]  # fmt: skip
    assert ("primary", "up", "0/20", 25.0) == (
        found["primary"].role, found["primary"].state, found["primary"].lsn, found["primary"].reads_percent,
    )  # fmt: skip
    assert ["primary", "replica0", "replica1"] == list(found)


def test_the_api_alone_is_enough() -> None:
    """Of a cluster that somebody else runs, all that the router goes by is shown."""
    found = rows(answer(seen("replica0", streaming=False)))

    assert ("primary", "up", 1, "0/18", None) == (
        found["primary"].role, found["primary"].state, found["primary"].timeline, found["primary"].lsn,
        found["primary"].port,
    )  # fmt: skip
    assert ("replica", "not streaming", "0/10", 16) == (
        found["replica0"].role, found["replica0"].state, found["replica0"].lsn, found["replica0"].lag_bytes,
    )  # fmt: skip
    assert (None, "not seen", None) == (found["replica1"].role, found["replica1"].state, found["replica1"].lsn)


def test_the_cluster_alone_is_enough() -> None:
    """Without an API nobody has read."""
    found = rows(None, node("primary"), node("replica0"))["replica0"]

    assert ("replica", "streaming", "0/20", 0) == (found.role, found.state, found.lsn, found.lag_bytes)
    assert [None] * 4 == [found.reads, found.reads_percent, found.lag_seconds, found.connections_in_use]


@pytest.mark.parametrize(
    ("told", "state"),
    [
        ({}, "streaming"),
        ({"paused": True}, "paused"),
        ({"delay_ms": 300}, "300 ms late"),
        ({"receiver": None}, "not streaming"),
        ({"state": "frozen", "lsn": None}, "frozen"),
        ({"state": "rewinding", "lsn": None}, "rewinding"),
        ({"state": "restarting", "paused": True}, "restarting"),
        ({"lsn": None}, "no answer"),
    ],
)
def test_states_are_those_of_the_servers(told: dict[str, Any], state: str) -> None:
    """Whoever runs a server knows it by other signs than its answers."""
    assert state == rows(answer(), node("primary"), node("replica0", **told))["replica0"].state


@pytest.mark.parametrize(
    ("said", "nodes", "roles"),
    [
        # A promotion that rocket did not make: the API has asked the servers.
        (answer(primary="replica0"), [node("primary"), node("replica0")], ("old primary", "primary")),
        # One that rocket makes: the API has not seen it yet.
        (
            answer(seen("replica0"), lost=True),
            [node("primary", role="replica"), node("replica0", role="primary")],
            ("replica", "primary"),
        ),
        (answer(seen("replica0"), lost=True), [], ("primary", "replica")),
        (answer(seen("replica0"), primary=None), [], (None, "replica")),
    ],
)
def test_there_is_one_primary_at_most(
    said: dict[str, Any], nodes: list[dict[str, Any]], roles: tuple[str | None, str | None]
) -> None:
    """Also where API and cluster do not agree, for a moment or for long."""
    found = rows(said, *nodes)

    assert roles == (found["primary"].role, found["replica0"].role)


def test_a_primary_that_does_not_answer_is_lost() -> None:
    """What was last seen of it stays, since lag is measured against it."""
    found = rows(answer(lost=True))["primary"]

    assert ("lost", "0/18") == (found.state, found.lsn)


def test_reads_since_the_last_look_are_what_came_on_top() -> None:
    """Of every kind."""
    before = ApiStatus.read(answer()).reads
    now = Reads(1, Counter(replica0=5, primary=1), Counter(), Counter({"not-caught-up": 1}), 3)
    since = now.since(before, 2.0)

    assert (Counter(replica0=2), 2, 2, 1, 2.0) == (
        since.by_node, since.total, since.by_replicas, since.unavailable, since.span_s,
    )  # fmt: skip
    assert 0 == now.since(now, 2.0).total


def test_reads_of_another_process_are_not_compared() -> None:
    """It counts from its own beginning."""
    before = ApiStatus.read(answer()).reads
    now = Reads(2, Counter(replica0=5), Counter(), Counter(), 0)

    assert now == now.since(before, 2.0)
    assert now == now.since(None, 2.0)


@pytest.mark.parametrize("said", [None, [], {}, "x", {"pid": None}, {**answer(), "replicas": 7}])
def test_what_another_program_answers_is_told_apart(said: object) -> None:
    """Something else may listen at the API's port."""
    with pytest.raises(ValueError, match="not what rocket's API answers"):
        ApiStatus.read(said)
