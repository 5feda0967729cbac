"""The report for people and programs: tables, and targets that are met or missed."""

from __future__ import annotations

import json

import pytest

from rocket.lab.bench.figures import Figures, Row
from rocket.lab.bench.report import Finding, as_json, findings, report, stale_reads

ABOUT = {
    "cores": 2,
    "cpu": "some",
    "python": "3.11.0",
    "postgres": "18.4",
    "replicas": 5,
    "settings": {"connections": 8, "rounds": 2, "seconds": 1.5, "soak": None},
}


def reads(number: int, variant: str, per_s: float, stale: int = 0) -> Row:
    """Return a row of the measure `reads`."""
    figures = {
        "reads_per_s": per_s,
        "p99_ms": 1000 / per_s,
        "stale_reads": stale,
        "failed_requests": 0,
    }
    return Row(number, "reads", variant, figures)


FIGURES = Figures(
    [
        reads(1, "random", 1000, stale=7),
        reads(1, "never-stale", 960),
        reads(1, "never-stale-no-token", 500),
        reads(2, "random", 2000, stale=2),
        reads(2, "never-stale", 1800),
        reads(2, "never-stale-no-token", 900),
        Row(1, "queries", "never-stale", {"primary_queries_per_read": -0.0004}),
        Row(1, "queries", "never-stale-no-token", {"primary_queries_per_read": 0.504}),
    ]
)


def found(figures: Figures, what: str) -> Finding:
    """Return the only finding that begins with `what`."""
    (finding,) = (each for each in findings(figures) if each.what.startswith(what))
    return finding


@pytest.mark.parametrize(
    ("what", "met"),
    [
        ("reads/s, never-stale ÷ random", False),
        ("p99 of a read, never-stale ÷ random", True),
        ("primary queries per read, never-stale with tokens", True),
        ("primary queries per read, never-stale without", True),
    ],
)
def test_a_figure_is_compared_with_its_target_as_precisely_as_it_is_shown(what: str, met: bool) -> None:
    """0.93 is below 0.95; 0.504 transactions are a half."""
    assert met is found(FIGURES, what).met


def test_global_reads_are_compared_with_session_reads_of_the_same_round() -> None:
    """And what they miss is stale; what others miss is not."""
    rows = [
        Row(number, measure, variant, {
            "reads_per_s": 100 * number * factor, "p50_ms": number / factor, "replica_share_percent": 99.0,
            "p50_statements": 3.0 / factor,
            "primary_statements_per_read": 0.04, missing: count, "failed_requests": 0,
        })
        for number in (1, 2)
        for measure in ("global-reads", "global-reads-while-writing", "global-reads-alone")
        for variant, factor, missing, count in (
            ("never-stale", 1.0, "missed_reads", 5), ("global", 0.95, "stale_reads", 0),
        )
    ]  # fmt: skip
    figures = Figures(rows)

    assert found(figures, "reads/s, global reads ÷ session").met
    assert found(figures, "global reads, by replicas").met
    assert found(figures, "global reads while others write, statements on the primary").met
    assert found(figures, "p50 of a global read, minus").met
    assert found(figures, "p50 of a global read alone").met
    assert 0 == stale_reads(figures)
    figures.add(Row(3, "global-reads", "global", {"stale_reads": 1, "primary_statements_per_read": 0.5}))
    assert 1 == stale_reads(figures)
    session = Row(3, "global-reads-alone", "never-stale", {"p50_statements": 3.0})
    for statements, met in ((5.0, True), (5.1, False)):
        alone = Row(3, "global-reads-alone", "global", {"p50_statements": statements})
        assert met is found(Figures([alone, session]), "p50 of a global read alone").met


def test_what_was_not_measured_has_no_finding() -> None:
    """Nor has a run that was interrupted in its first round."""
    assert {"reads/s, never-stale ÷ random", "p99 of a read, never-stale ÷ random"} <= {
        finding.what for finding in findings(FIGURES)
    }
    assert not [finding for finding in findings(FIGURES) if "article" in finding.what]
    assert [] == list(findings(Figures()))


def test_the_report_can_be_read() -> None:
    """Medians with their extremes, totals, no minus sign before a zero."""
    lines = report(FIGURES, ABOUT).splitlines()

    assert (
        "2 cores (some), Python 3.11.0, Postgres 18.4, 5 replicas, 8 connections, 2 rounds of 1.5 s each"
        == lines[0]
    )
    cells = {line.split("  ")[1]: line.split() for line in lines if line.startswith("  ")}
    assert ["random", "1,500", "(1,000", "to", "2,000)", "0.75", "9", "0"] == cells["random"]
    assert ["never-stale", "0.00"] == cells["never-stale"]  # of the last measure
    assert ["0.930", "(0.900", "to", "0.960)", "≥", "0.95", "MISSED"] == cells["reads/s, never-stale ÷ random"][
        -7:
    ]
    assert not [line for line in lines if "-0.00" in line or line != line.rstrip()]


def test_a_stale_read_of_never_stale_is_reported_last() -> None:
    """Stale reads of `random` are expected."""
    broken = Figures([*FIGURES.rows, reads(3, "never-stale-no-token", 900, stale=2)])

    assert (0, 2) == (stale_reads(FIGURES), stale_reads(broken))
    assert "STALE" not in report(FIGURES, ABOUT)
    assert report(broken, ABOUT).splitlines()[-1].startswith("STALE: 2 reads")


def test_two_builds_are_compared_within_each_round() -> None:
    """By the variants that both took part with."""
    builds = Figures(
        [
            reads(1, "never-stale", 1000),
            reads(1, "never-stale (other build)", 2000),
            reads(2, "never-stale", 3000),
            reads(2, "never-stale (other build)", 2000),
        ]
    )
    (line,) = (line for line in report(builds, ABOUT).splitlines() if line.startswith("  reads, never-stale"))

    assert ["1.000", "(0.500", "to", "1.500)", "-", "-"] == line.split()[2:8]
    assert "this build" not in report(FIGURES, ABOUT)


def test_programs_get_everything() -> None:
    """Rows, medians and targets, as JSON without extensions."""
    data = json.loads(json.dumps(as_json(FIGURES, ABOUT), allow_nan=False))

    assert 8 == len(data["rows"])
    assert {"measure": "reads", "variant": "random", "figure": "reads_per_s", "median": 1500, "least": 1000,
            "most": 2000} in data["medians"]  # fmt: skip
    assert {False, True} == {goal["met"] for goal in data["goals"]}
    assert 0 == data["stale_reads"]
