"""Members, combined from what the API and the cluster say of each node."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from rocket.lab.status.members import ApiStatus, Member, Reads, members
from tests.support.members import NOW, api_body, node, replica_status


def by_name(body: dict[str, Any] | None, *nodes: dict[str, Any]) -> dict[str, Member]:
    """Return the members by name."""
    api = None if body is None else ApiStatus.read(body)
    return {member.name: member for member in members(api, nodes, api.reads if api else None, NOW)}


def test_each_source_contributes_what_it_knows() -> None:
    """Current ports and LSNs from the cluster; incarnations, seconds, reads and connections from the API."""
    found = by_name(
        api_body(replica_status("replica0")), node("primary"), node("replica0", port=5434), node("replica1")
    )

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
    """Of a cluster that rocket does not run, everything the router relies on is shown."""
    found = by_name(api_body(replica_status("replica0", streaming=False)))

    assert ("primary", "up", 1, "0/18", None) == (
        found["primary"].role, found["primary"].state, found["primary"].timeline, found["primary"].lsn,
        found["primary"].port,
    )  # fmt: skip
    assert ("replica", "not streaming", "0/10", 16) == (
        found["replica0"].role, found["replica0"].state, found["replica0"].lsn, found["replica0"].lag_bytes,
    )  # fmt: skip
    assert (None, "not seen", None) == (found["replica1"].role, found["replica1"].state, found["replica1"].lsn)


def test_the_cluster_alone_is_enough() -> None:
    """Without an API there are no reads to show."""
    found = by_name(None, node("primary"), node("replica0"))["replica0"]

    assert ("replica", "streaming", "0/20", 0) == (found.role, found.state, found.lsn, found.lag_bytes)
    assert [None] * 4 == [found.reads, found.reads_percent, found.lag_seconds, found.connections_in_use]


@pytest.mark.parametrize(
    ("description", "state"),
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
def test_states_are_those_of_the_servers(description: dict[str, Any], state: str) -> None:
    """The cluster, which runs a server, knows its state even if it does not answer."""
    assert state == by_name(api_body(), node("primary"), node("replica0", **description))["replica0"].state


@pytest.mark.parametrize(
    ("body", "nodes", "roles"),
    [
        # A promotion that rocket did not make: the API has asked the servers.
        (api_body(primary="replica0"), [node("primary"), node("replica0")], ("old primary", "primary")),
        # A promotion by rocket that the API has not seen yet.
        (
            api_body(replica_status("replica0"), lost=True),
            [node("primary", role="replica"), node("replica0", role="primary")],
            ("replica", "primary"),
        ),
        (api_body(replica_status("replica0"), lost=True), [], ("primary", "replica")),
        (api_body(replica_status("replica0"), primary=None), [], (None, "replica")),
    ],
)
def test_there_is_one_primary_at_most(
    body: dict[str, Any], nodes: list[dict[str, Any]], roles: tuple[str | None, str | None]
) -> None:
    """Also while API and cluster disagree, briefly or for long."""
    found = by_name(body, *nodes)

    assert roles == (found["primary"].role, found["replica0"].role)


def test_a_primary_that_does_not_answer_is_lost() -> None:
    """Its last known LSN stays, since lag is measured against it."""
    found = by_name(api_body(lost=True))["primary"]

    assert ("lost", "0/18") == (found.state, found.lsn)


def test_reads_since_a_snapshot_are_those_counted_after_it() -> None:
    """Of every kind."""
    before = ApiStatus.read(api_body()).reads
    now = Reads(1, Counter(replica0=5, primary=1), Counter(), Counter({"not-caught-up": 1}), 3)
    since = now.since(before, 2.0)

    assert (Counter(replica0=2), 2, 2, 1, 2.0) == (
        since.by_node, since.total, since.by_replicas, since.unavailable, since.span_s,
    )  # fmt: skip
    assert 0 == now.since(now, 2.0).total


def test_reads_of_another_process_are_not_compared() -> None:
    """Each process counts from its own start."""
    before = ApiStatus.read(api_body()).reads
    now = Reads(2, Counter(replica0=5), Counter(), Counter(), 0)

    assert now == now.since(before, 2.0)
    assert now == now.since(None, 2.0)


@pytest.mark.parametrize("body", [None, [], {}, "x", {"pid": None}, {**api_body(), "replicas": 7}])
def test_the_response_of_another_program_is_rejected(body: object) -> None:
    """Another program may listen on the API's port."""
    with pytest.raises(ValueError, match="not what rocket's API answers"):
        ApiStatus.read(body)
