"""A running system as text."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from rocket.lab.status.members import ApiStatus, Overview, Snapshot
from rocket.lab.status.report import report
from tests.support.members import NOW, api_body, node, replica_status

NODES = (node("primary"), node("replica0", port=5434, lag_bytes=1_234_567), node("replica1", paused=True))


def snapshot(body: dict[str, Any] | None, *nodes: dict[str, Any], **others: Any) -> Snapshot:
    """Return a snapshot of the API's response and the cluster's nodes; either may be missing."""
    return replace(
        Snapshot(
            at=NOW,
            url="http://127.0.0.1:5005",
            workers=1,
            api=None if body is None else ApiStatus.read(body),
            api_error="Connection refused" if body is None else None,
            nodes=nodes or None,
            cluster_error=None,
        ),
        **others,
    )


def lines(found: Snapshot, width: int | None = None, *, colours: bool = False) -> list[str]:
    """Return the report on a snapshot, with shares since the API's start."""
    overview = Overview.of(found, found.api.reads if found.api else None)
    return report(overview, width=width, colours=colours, timed=False)


def test_a_system_is_shown_whole() -> None:
    """A heading, a line per member, and which nodes answer its reads."""
    assert [
        "epoch 1-aaaaaaaaaa (timeline 1), routing never-stale, API http://127.0.0.1:5005",
        "member    port  role     state      tl   lsn      lag  lag s  life  reads %  conns",
        "primary   5433  primary  up          1  0/20        -      -     -     25.0    1/3",
        "replica0  5434  replica  streaming   1  0/20  1.2 MiB    0.5   10s     75.0    1/3",
        "replica1  5433  replica  paused      1  0/20      0 B      -     -      0.0    1/3",
        "reads since the API's start: 4, 75.0 % by replicas; 1 by the primary (not-caught-up 1); 2 refused",
    ] == lines(snapshot(api_body(replica_status("replica0")), *NODES))


def test_what_is_wrong_is_said_last() -> None:
    """With the code that alerts go by, and wrapped like all else."""
    body = api_body(replica_status("replica0"))
    body["findings"] = [{"code": "no-replica-fit", "text": "no replica may serve (replica0: too-far-behind)"}]

    assert "no-replica-fit: no replica may serve (replica0: too-far-behind)" == lines(snapshot(body, *NODES))[-1]
    assert "  (replica0: too-far-behind)" == lines(snapshot(body, *NODES), 40)[-1]


def test_a_terminal_of_80_columns_is_enough() -> None:
    """It shows all columns with narrower gaps; a narrower one drops the least important columns."""
    at_80 = lines(snapshot(api_body(replica_status("replica0")), *NODES), 80)
    at_60 = lines(snapshot(api_body(replica_status("replica0")), *NODES), 60)

    assert max(map(len, at_80)) <= 80
    assert "member   port role    state     tl  lsn     lag lag s life reads % conns" in at_80
    assert max(map(len, at_60)) <= 60
    assert "member   role    state     tl  lsn     lag lag s reads %" in at_60
    assert {"primary", "replica0", "replica1"} <= {line.split()[0] for line in at_60}


def test_a_source_that_does_not_answer_is_named() -> None:
    """What the other source knows is shown."""
    without_api = lines(snapshot(None, *NODES))
    without_cluster = lines(snapshot(api_body(), cluster_error="several clusters are running"))

    assert "timeline 1, no API at http://127.0.0.1:5005 (Connection refused)" == without_api[0]
    assert without_api[2].startswith("primary   5433  primary  up")
    assert 5 == len(without_api)
    assert "No ports, and no states of servers: several clusters are running." == without_cluster[-1]


def test_a_system_that_has_ended_takes_one_line() -> None:
    """`--watch` goes on."""
    (line,) = lines(snapshot(None, cluster_error="no cluster is running"))

    assert line.endswith("no API at http://127.0.0.1:5005 (Connection refused), and no cluster is running")


def test_reads_of_one_process_are_not_taken_for_all() -> None:
    """Processes that share a port count separately."""
    assert lines(snapshot(api_body(), workers=3))[0].endswith("reads of one of its 3 processes")


def test_colours_mark_only_unhealthy_members() -> None:
    """And the heading; without colours there is no escape sequence at all."""
    painted = lines(snapshot(api_body(replica_status("replica0")), *NODES), colours=True)

    assert ["\x1b[1mmember", "primary", "replica0", "\x1b[33mreplica1"] == [
        line.split()[0] for line in painted[1:5]
    ]
    assert "\x1b" not in "".join(lines(snapshot(api_body(replica_status("replica0")), *NODES)))


def test_a_response_cannot_control_the_terminal() -> None:
    """Any server may listen at the address given by `--url`."""
    body = api_body() | {"routing": "\x1b[2J", "fallbacks": {"\x1b]0;x\x07": 1}}
    body["connections"]["\x1b[31m"] = {"in_use": 0, "idle": 0}

    assert "\x1b" not in "".join(lines(snapshot(body)))


def test_programs_get_every_key_whatever_is_known() -> None:
    """Unknown values are null."""
    whole = Overview.of(
        snapshot(api_body(replica_status("replica0")), *NODES), ApiStatus.read(api_body()).reads
    ).as_json()
    nothing = Overview.of(snapshot(None), None).as_json()

    assert list(whole) == list(nothing)
    assert ([], None, None) == (nothing["members"], nothing["reads"], nothing["routing"])
    assert {"total": 4, "by_replicas": 3, "unavailable": 2}.items() <= whole["reads"].items()
    assert ("1-aaaaaaaaaa", 1, True) == (whole["epoch"], whole["timeline"], whole["cluster"]["found"])
