"""The report on a run: a table for each measure, and the targets met and missed. Pure."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from rocket.lab.bench.figures import Spread, difference, ratio
from rocket.lab.bench.measures import (
    ARTICLE,
    GLOBAL,
    GLOBAL_READS,
    GLOBAL_READS_ALONE,
    GLOBAL_READS_WHILE_WRITING,
    IDLE,
    INSPECTOR,
    MAX_WAIT_MS,
    MEASURES,
    NEVER_STALE,
    NO_INSPECTOR,
    OTHER_BUILD,
    PAUSED,
    PRIMARY,
    QUERIES,
    RANDOM,
    READ_AFTER_WRITE,
    READS,
    READS_WHILE_WRITING,
    SCALE,
    SOAK,
    TOKENLESS,
    WRITES,
)
from rocket.lab.text import NOTHING, aligned

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from rocket.lab.bench.figures import Figures

_AT_LEAST, _AT_MOST, _EXACTLY = "≥", "≤", "="

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
    "primary_statements_per_read": ("primary statements/read", 3),
    "statement_ms": ("a statement ms", 3),
    "p50_statements": ("p50 in statements", 2),
    "writes_beside_per_s": ("background writes/s", 0),
    "resident_mib": ("resident MiB", 1),
    "choose_us": ("choose() µs", 2),
    "choose_one_caught_up_us": ("one caught up", 2),
    "publish_us": ("publish() µs", 2),
    "publish_and_choose_us": ("both", 2),
    "observe_round_us": ("observer's round µs", 0),
    "observe_per_replica_us": ("per replica", 1),
}
"""Heading and decimals of each figure whose median is shown; a table's first figure comes with its extremes."""
_TOTALS = {"stale_reads": "stale", "missed_reads": "missed", "failed_requests": "failed"}
_WHAT = {
    **{measure.name: measure.what for measure in MEASURES.values()},
    SCALE: "the decision by itself, and the observer with simulated nodes that answer at once",
    SOAK: "reads of never-stale, closed loop, in ten parts",
}
_COMPARED = {
    "reads/s": "reads_per_s",
    "writes/s": "writes_per_s",
    "p50": "p50_ms",
    "p99": "p99_ms",
    "CPU/read": "cpu_us_per_read",
}
"""Heading and name of each figure by which two builds are compared."""
_BUILDS = (
    "this build ÷ the other build; each ratio is within a round, shown as median (least to most) of the rounds"
)
_TARGETS = "targets; ratios and differences are within a round, shown as median (least to most) of the rounds"


def replicas(count: int) -> str:
    """Return what stands in place of a variant in `scale`, which compares numbers of replicas."""
    return f"{count} replicas"


# --- targets ---


@dataclass(frozen=True, slots=True)
class Finding:
    """A figure that has a target."""

    what: str
    spread: Spread
    """Over the rounds; its median is compared with the target."""
    relation: str
    target: float
    decimals: int
    unit: str = ""

    @property
    def met(self) -> bool:
        """Whether the median, rounded as it is shown, meets the target."""
        value = round(self.spread.median, self.decimals)
        met = {_AT_LEAST: value >= self.target, _AT_MOST: value <= self.target, _EXACTLY: value == self.target}
        return met[self.relation]


def findings(figures: Figures) -> Iterator[Finding]:
    """Yield a finding for each target that the figures can be compared with."""
    for finding in (
        *_about_reads(figures),
        *_about_global_reads(figures),
        *_about_reads_after_writes(figures),
        *_about_writes_and_cost(figures),
        *_about_size(figures),
    ):
        if finding is not None:
            yield finding


def stale_reads(figures: Figures) -> int:
    """Return how many reads broke the guarantee."""
    return int(
        sum(
            figures.total(measure, variant.name, "stale_reads")
            for measure in figures.measures()
            for variant in (NEVER_STALE, TOKENLESS, GLOBAL)
        )
    )


def _about_reads(figures: Figures) -> Iterator[Finding | None]:
    for what, other, figure, relation, target in (
        ("reads/s, never-stale ÷ random", RANDOM, "reads_per_s", _AT_LEAST, 0.95),
        ("p99 of a read, never-stale ÷ random", RANDOM, "p99_ms", _AT_MOST, 1.2),
        ("reads/s, never-stale ÷ article", ARTICLE, "reads_per_s", _AT_LEAST, 2.0),
    ):
        spread = figures.compared((READS.name, NEVER_STALE.name, figure), (READS.name, other.name, figure), ratio)
        yield _finding(what, spread, relation, target)
    spread = figures.compared(
        (READS_WHILE_WRITING.name, NEVER_STALE.name, "reads_per_s"),
        (READS_WHILE_WRITING.name, RANDOM.name, "reads_per_s"),
        ratio,
    )
    yield _finding("reads/s while others write, never-stale ÷ random", spread, _AT_LEAST, 0.9)
    spread = figures.compared(
        (INSPECTOR.name, NEVER_STALE.name, "reads_per_s"),
        (INSPECTOR.name, NO_INSPECTOR.name, "reads_per_s"),
        ratio,
    )
    yield _finding("reads/s, with an inspector that has no viewer ÷ without one", spread, _AT_LEAST, 0.98)
    for what, variant, relation, target in (
        ("primary queries per read, never-stale with tokens", NEVER_STALE, _AT_MOST, 0.0),
        ("primary queries per read, never-stale without", TOKENLESS, _AT_MOST, 0.5),
        ("primary queries per read, article", ARTICLE, _AT_LEAST, 2.0),
    ):
        spread = figures.spread(QUERIES.name, variant.name, "primary_queries_per_read")
        yield _finding(what, spread, relation, target, decimals=2)


def _about_global_reads(figures: Figures) -> Iterator[Finding | None]:
    one, session = GLOBAL.name, NEVER_STALE.name
    for measure, when in ((GLOBAL_READS.name, ""), (GLOBAL_READS_WHILE_WRITING.name, " while others write")):
        share = figures.spread(measure, one, "replica_share_percent")
        yield _finding(f"global reads{when}, by replicas", share, _AT_LEAST, 90.0, decimals=1, unit=" %")
        statements = figures.spread(measure, one, "primary_statements_per_read")
        yield _finding(f"global reads{when}, statements on the primary a read", statements, _AT_MOST, 0.07)
        later = figures.compared((measure, one, "p50_ms"), (measure, session, "p50_ms"), difference)
        yield _finding(
            f"p50 of a global read{when}, minus a session read's", later, _AT_MOST, 2.0, decimals=2, unit=" ms"
        )
        rate = figures.compared((measure, one, "reads_per_s"), (measure, session, "reads_per_s"), ratio)
        yield _finding(f"reads/s{when}, global reads ÷ session reads", rate, _AT_LEAST, 0.9)
    alone = GLOBAL_READS_ALONE.name
    longer = figures.compared((alone, one, "p50_statements"), (alone, session, "p50_statements"), difference)
    what = "p50 of a global read alone, minus a session read's, in the time of a statement on the primary"
    yield _finding(what, longer, _AT_MOST, 2.0, decimals=2)


def _about_reads_after_writes(figures: Figures) -> Iterator[Finding | None]:
    rocket = NEVER_STALE.name
    share = figures.spread(READ_AFTER_WRITE.name, rocket, "replica_share_percent")
    yield _finding("reads right after the write, by replicas", share, _AT_LEAST, 95.0, decimals=1, unit=" %")
    for what, one, other, target in (
        (
            "p50 of a read right after the write, minus a plain read's",
            (READ_AFTER_WRITE.name, rocket, "p50_ms"),
            (READ_AFTER_WRITE.name, rocket, "plain_p50_ms"),
            3.0,
        ),
        (
            "p50 of the same with replay paused, minus the primary's",
            (PAUSED.name, rocket, "p50_ms"),
            (PAUSED.name, PRIMARY.name, "p50_ms"),
            MAX_WAIT_MS + 2.0,
        ),
        (
            "p99 of the same with replay paused, minus the primary's",
            (PAUSED.name, rocket, "p99_ms"),
            (PAUSED.name, PRIMARY.name, "p99_ms"),
            MAX_WAIT_MS + 2.0,
        ),
    ):
        yield _finding(what, figures.compared(one, other, difference), _AT_MOST, target, decimals=1, unit=" ms")


def _about_writes_and_cost(figures: Figures) -> Iterator[Finding | None]:
    writes = figures.compared(
        (WRITES.name, NEVER_STALE.name, "p50_ms"), (WRITES.name, PRIMARY.name, "p50_ms"), ratio
    )
    yield _finding("p50 of a write, never-stale ÷ primary", writes, _AT_MOST, 1.5)
    idle = figures.spread(QUERIES.name, IDLE.name, "cpu_percent")
    yield _finding("share of a core that an idle API takes", idle, _AT_MOST, 2.0, decimals=1, unit=" %")
    if any(figures.values(measure, NEVER_STALE.name, "stale_reads") for measure in figures.measures()):
        stale = Spread.of([stale_reads(figures)])
        yield _finding("stale reads of never-stale, in all", stale, _EXACTLY, 0.0, decimals=0)


def _about_size(figures: Figures) -> Iterator[Finding | None]:
    growth = figures.compared((SCALE, replicas(5000), "choose_us"), (SCALE, replicas(5), "choose_us"), ratio)
    yield _finding("choose(), 5000 replicas ÷ 5", growth, _AT_MOST, 3.0)
    cost = figures.spread(SCALE, replicas(500), "choose_us")
    yield _finding("choose(), 500 replicas", cost, _AT_MOST, 10.0, decimals=2, unit=" µs")
    sizes = list(figures.values(SOAK, NEVER_STALE.name, "resident_mib").values())
    if len(sizes) > 1:
        growth = Spread.of([sizes[-1] / sizes[0]])
        yield _finding("resident size, at the end ÷ after the first tenth", growth, _AT_MOST, 1.05)


def _finding(
    what: str, spread: Spread | None, relation: str, target: float, *, decimals: int = 3, unit: str = ""
) -> Finding | None:
    return None if spread is None else Finding(what, spread, relation, target, decimals, unit)


# --- for people ---


def report(figures: Figures, about: Mapping[str, Any]) -> str:
    """Return a table for each measure, and the targets, as plain text."""
    lines = [_heading(about)]
    for measure in figures.measures():
        lines += ["", f"{measure}: {_WHAT[measure]}", *_lines(_table(figures, measure))]
    if builds := list(_builds(figures)):
        lines += ["", _BUILDS, *_lines([("", *_COMPARED), *builds])]
    found = list(findings(figures))
    if found:
        lines += ["", _TARGETS, *_lines(_targets(found))]
    if stale := stale_reads(figures):
        lines += ["", f"STALE: {stale} reads of never-stale did not show an acknowledged write."]
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
    variants = figures.variants(measure)

    def measured(names: Iterable[str]) -> list[str]:
        return [name for name in names if any(figures.values(measure, variant, name) for variant in variants)]

    medians, totals = measured(_COLUMNS), measured(_TOTALS)
    yield ["", *(_COLUMNS[name][0] for name in medians), *(_TOTALS[name] for name in totals)]
    for variant in variants:
        cells = [variant]
        for place, name in enumerate(medians):
            spread = figures.spread(measure, variant, name)
            cells.append(_shown(spread, _COLUMNS[name][1], extremes=place == 0))
        for name in totals:
            counted = figures.values(measure, variant, name)
            cells.append(f"{sum(counted.values()):.0f}" if counted else NOTHING)
        yield cells


def _builds(figures: Figures) -> Iterator[Sequence[str]]:
    for measure in figures.measures():
        for other in figures.variants(measure):
            variant = other.removesuffix(OTHER_BUILD)
            spreads = [
                figures.compared((measure, variant, name), (measure, other, name), ratio)
                for name in _COMPARED.values()
            ]
            if variant != other and any(spreads):
                yield f"{measure}, {variant}", *(_shown(spread, 3, extremes=True) for spread in spreads)


def _targets(found: Iterable[Finding]) -> Iterator[Sequence[str]]:
    for finding in found:
        yield (
            finding.what,
            _shown(finding.spread, finding.decimals, extremes=True),
            f"{finding.relation} {finding.target:g}{finding.unit}",
            "met" if finding.met else "MISSED",
        )


def _shown(spread: Spread | None, decimals: int, *, extremes: bool) -> str:
    if spread is None:
        return NOTHING
    median, least, most = (f"{round(value, decimals) + 0.0:,.{decimals}f}" for value in asdict(spread).values())
    return f"{median} ({least} to {most})" if extremes and least != most else median


def _lines(rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """Yield an indented line for each row, with all columns but the first aligned to the right."""
    every = list(rows)
    return (f"  {line}" for line in aligned(every, right=range(1, len(every[0]))))


# --- for programs ---


def as_json(figures: Figures, about: Mapping[str, Any]) -> dict[str, Any]:
    """Return everything for programs."""
    return {
        "about": dict(about),
        "rows": [asdict(row) for row in figures.rows],
        "medians": [
            {"measure": measure, "variant": variant, "figure": figure, **asdict(spread)}
            for (measure, variant, figure), spread in figures.summary()
        ],
        "goals": [
            {
                "what": finding.what,
                "spread": asdict(finding.spread),
                "relation": finding.relation,
                "goal": finding.target,
                "decimals": finding.decimals,
                "unit": finding.unit,
                "met": finding.met,
            }
            for finding in findings(figures)
        ],
        "stale_reads": stale_reads(figures),
    }
