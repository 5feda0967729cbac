"""The figures as people and programs read them. Pure: figures in, text or plain data out."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rocket.lab.bench.goals import SCALE, SOAK, findings, stale_reads
from rocket.lab.bench.measures import MEASURES

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from rocket.lab.bench.figures import Figures, Spread
    from rocket.lab.bench.goals import Finding

_COLUMNS = {
    "reads_per_s": ("reads/s", 0),
    "writes_per_s": ("writes/s", 0),
    "p50_ms": ("p50 ms", 2),
    "p99_ms": ("p99 ms", 2),
    "plain_p50_ms": ("plain p50 ms", 2),
    "plain_p99_ms": ("plain p99 ms", 2),
    "cpu_us_per_read": ("CPU µs/read", 0),
    "client_cpu_us_per_read": ("client's", 0),
    "cpu_percent": ("CPU %", 1),
    "replica_share_percent": ("by replicas %", 1),
    "primary_queries_per_read": ("primary queries/read", 2),
    "writes_beside_per_s": ("writes/s beside", 0),
    "resident_mib": ("resident MiB", 1),
    "choose_us": ("choose() µs", 2),
    "choose_one_caught_up_us": ("only the last one fit", 2),
    "publish_us": ("publish() µs", 2),
    "publish_and_choose_us": ("both", 2),
    "observe_round_us": ("observer's round µs", 0),
    "observe_per_replica_us": ("per replica", 1),
}
"""Heading and decimals of each figure that is shown as a median; a table's first one comes with its extremes."""
_WHAT = {
    **{measure.name: measure.what for measure in MEASURES.values()},
    SCALE: "the pure core by itself, and the observer of simulated nodes that answer at once",
    SOAK: "reads of never-stale, closed loop, in ten parts",
}
_GOALS = "goals; each ratio or difference is one within a round, and this the median (least to most) of the rounds"
_TOTALS = {"stale_reads": "stale", "failed_requests": "failed"}


def report(figures: Figures, about: Mapping[str, Any]) -> str:
    """Return a table for each measure, and what was to be reached, as plain text."""
    lines = [_heading(about)]
    for measure in figures.measures():
        lines += ["", f"{measure}: {_WHAT[measure]}", *aligned(_table(figures, measure))]
    found = list(findings(figures))
    if found:
        lines += ["", _GOALS, *aligned(_of_goals(found))]
    if stale := stale_reads(figures):
        lines += ["", f"STALE: {stale} reads of never-stale did not show what had been acknowledged."]
    return "\n".join(lines)


def _heading(about: Mapping[str, Any]) -> str:
    settings = about["settings"]
    parts = [f"{about['cores']} cores ({about['cpu']})", f"Python {about['python']}"]
    if "postgres" in about:
        parts += [f"Postgres {about['postgres']}", f"{about['replicas']} replicas"]
        parts += [f"{settings['connections']} connections"]
        parts += ["the API on a core of its own"] if about.get("api_has_a_core") else []
        if settings["soak"] is None:
            parts += [f"{settings['rounds']} rounds of {settings['seconds']:g} s each"]
    return ", ".join(parts)


def _table(figures: Figures, measure: str) -> Iterator[Sequence[str]]:
    contenders = figures.contenders(measure)
    medians = [
        name for name in _COLUMNS if any(figures.values(measure, contender, name) for contender in contenders)
    ]
    totals = [
        name for name in _TOTALS if any(figures.values(measure, contender, name) for contender in contenders)
    ]
    yield ["", *(_COLUMNS[name][0] for name in medians), *(_TOTALS[name] for name in totals)]
    for contender in contenders:
        cells = [contender]
        for place, name in enumerate(medians):
            spread = figures.spread(measure, contender, name)
            cells.append(_shown(spread, _COLUMNS[name][1], extremes=place == 0))
        for name in totals:
            counted = figures.values(measure, contender, name)
            cells.append(f"{sum(counted.values()):.0f}" if counted else "-")
        yield cells


def _of_goals(found: Iterable[Finding]) -> Iterator[Sequence[str]]:
    for finding in found:
        yield (
            finding.what,
            _shown(finding.spread, finding.decimals, extremes=True),
            f"{finding.relation} {finding.goal:g}{finding.unit}",
            "met" if finding.met else "MISSED",
        )


def _shown(spread: Spread | None, decimals: int, *, extremes: bool) -> str:
    if spread is None:
        return "-"
    median, least, most = (f"{round(value, decimals) + 0.0:,.{decimals}f}" for value in asdict(spread).values())
    return f"{median} ({least} to {most})" if extremes and least != most else median


def aligned(rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """Line up the cells: the first column to the left, figures to the right."""
    every = list(rows)
    widths = [max(len(row[column]) for row in every) for column in range(len(every[0]))]
    for row in every:
        cells = [
            f"{row[0]:{widths[0]}}",
            *(f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True)),
        ]
        yield ("  " + "  ".join(cells)).rstrip()


def as_json(figures: Figures, about: Mapping[str, Any]) -> dict[str, Any]:
    """Return everything for programs."""
    return {
        "about": dict(about),
        "rows": [asdict(row) for row in figures.rows],
        "medians": [
            {"measure": measure, "contender": contender, "figure": figure, **asdict(spread)}
            for (measure, contender, figure), spread in figures.summary()
        ],
        "goals": [{**asdict(finding), "met": finding.met} for finding in findings(figures)],
        "stale_reads": stale_reads(figures),
    }
