"""The verdict as text and as JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import msgspec

from rocket.lab.checker.history import READS, Op, Outcome, Request

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from rocket.lab.checker.availability import Outages
    from rocket.lab.checker.check import Verdict
    from rocket.lab.checker.coverage import Figures
    from rocket.lab.checker.findings import Violation
    from rocket.lab.checker.history import Fault

_ASKED = {
    Request.JOIN: "POST /users",
    Request.WRITE: "POST /rides",
    Request.READ: "GET /rides/{ride}",
    Request.LIST: "GET /rides",
}
_LAST_WORDS = {
    "held": "HELD: no read was stale, and nothing was lost in silence.",
    "violated": "VIOLATED: the guarantee was broken.",
    "void": "VOID: this run proves nothing.",
}
_RIDES_NAMED = 8
_INDENT = "      "


def report(verdict: Verdict) -> str:
    """Return the table, the excerpts and the verdict as plain text."""
    lines: list[str] = []
    if verdict.figures is not None:
        lines += [*_columns(_table(verdict.figures)), ""]
    for number, violation in enumerate(verdict.violations, start=1):
        lines += [f"Violation {number} ({violation.rule}): {violation.sentence}", *excerpt(violation), ""]
    counts = verdict.counts or {}
    if counts:
        broken = ", ".join(f"{rule} {counts[rule]} times" for rule in sorted(counts))
        lines += [f"Rules broken: {broken}.", ""]
    if verdict.reasons:
        lines += ["By itself the run would prove nothing:" if counts else "Why it proves nothing:"]
        lines += [*(f"  - {reason}" for reason in verdict.reasons), ""]
    lines.append(_LAST_WORDS[verdict.judgement])
    return "\n".join(map(_printable, lines))


def as_json(verdict: Verdict) -> dict[str, Any]:
    """Return the same as an object of JSON."""
    return {
        "verdict": verdict.judgement,
        "exit_code": verdict.judgement.exit_code,
        "reasons": list(verdict.reasons),
        "counts": dict(verdict.counts or {}),
        "violations": [_violation_as_json(violation) for violation in verdict.violations],
        "figures": None if verdict.figures is None else _figures_as_json(verdict.figures),
    }


def excerpt(violation: Violation) -> list[str]:
    """Return the operations and faults that show a violation, line by line in the order of time."""
    events: list[tuple[float, list[str]]] = [(op.at, list(_of_op(op, violation.about))) for op in violation.ops]
    events += [(fault.at, [_of_fault(fault)]) for fault in violation.faults]
    return [line for _, lines in sorted(events) for line in lines]


def _of_op(op: Op, about: float | None) -> Iterator[str]:
    asked = _ASKED[op.request].format(ride=op.ride)
    asked += f" by the library, work {op.work}" if op.work else ""
    asked += f" ({op.freshness})" if op.freshness else ""
    asked += f" distance={op.distance:.1f}" if op.request is Request.WRITE and op.distance is not None else ""
    yield f"  {_stretch(op.at, op.done)}  {op.session}  {asked}  ->  {_answer(op, about)}"
    yield f"{_INDENT}{op.user}, {'with' if op.tokens else 'without'} tokens; {_route(op)}"
    if op.sent or op.got:
        yield f"{_INDENT}sent {op.sent or 'no token'}, got {op.got or 'none'}"
    if op.lost:
        yield f"{_INDENT}told: {op.lost}"
    if op.error:
        yield f"{_INDENT}error: {op.error}"


def _answer(op: Op, about: float | None) -> str:
    said = f"{op.outcome}" + (f" {op.status}" if op.status is not None else "")
    said += f", {op.raised}" if op.raised else ""
    if op.outcome is not Outcome.OK or op.request is Request.JOIN:
        return said
    if op.request is Request.WRITE:
        return f"{said}, ride {op.ride}"
    shown = [f"{ride} ({distance:.1f})" for ride, distance in op.rides or ()]
    if op.request is Request.READ:
        return f"{said}, nothing there" if op.distance is None else f"{said}, distance {op.distance:.1f}"
    rest = f" and {len(shown) - _RIDES_NAMED} more" if len(shown) > _RIDES_NAMED else ""
    all_of_them = "all rides" if op.complete else "newest rides"
    among = "" if about is None else f"; {'with' if about in (op.shown or ()) else 'without'} {about:.1f}"
    return f"{said}, {all_of_them}: {', '.join(shown[:_RIDES_NAMED]) or 'none'}{rest}{among}"


def _route(op: Op) -> str:
    if op.node is None:
        return "no node named"
    as_what = "" if op.role is None or op.node == op.role else f" as {op.role}"
    return f"by {op.node}{as_what}" + (f" ({op.reason})" if op.reason else "")


def _of_fault(fault: Fault) -> str:
    where = f" on {fault.node}" if fault.node else ""
    return f"  {_stretch(fault.at, fault.until)}  fault: {fault.name}{where}"


def _stretch(since: float, until: float) -> str:
    return f"{since:10.4f} - {until:10.4f} s"


# --- the table ---


def _table(figures: Figures) -> Iterator[tuple[str, str, str]]:
    """Yield the rows: what, of which kind, how much."""
    yield "requests", f"in {figures.span_s:.1f} s", f"{figures.ops}"
    yield from _of_reads(figures)
    for reason, count in sorted(figures.fallbacks.items()):
        yield "fallbacks to the primary", reason, f"{count}"
    yield "reads that waited", "and were served by a replica", f"{figures.waits}"
    for outcome in Outcome:
        yield "writes", outcome, f"{figures.requests.get((Request.WRITE, outcome), 0)}"
    for outcome in (Outcome.FAIL, Outcome.UNKNOWN):
        count = sum(figures.requests.get((request, outcome), 0) for request in READS)
        yield "reads not answered", outcome, f"{count}"
    yield "rides lost by promotion", "and reported", f"{figures.lost_and_reported}"
    yield "rides lost by promotion", "of sessions without tokens", f"{figures.lost_without_token}"
    for (work, outcome), count in sorted(figures.library.items()):
        yield "through the library", f"{work}: {outcome}", f"{count}"
    for how, count in sorted(figures.raised.items()):
        yield "answers by work that raised", how, f"{count}"
    if figures.outages is not None:
        yield from _of_outages(figures.outages)
    for name, fault in figures.faults.items():
        yield "faults", name, f"{fault.times} (met by {fault.ops_overlapped} requests)"
    if figures.read_p50_ms is not None and figures.read_p99_ms is not None:
        yield "read latency", "p50", f"{figures.read_p50_ms:.1f} ms"
        yield "read latency", "p99", f"{figures.read_p99_ms:.1f} ms"
    yield "longest stretch", "without a read answered", f"{figures.longest_without_read_s:.2f} s"


def _of_reads(figures: Figures) -> Iterator[tuple[str, str, str]]:
    read = sum(figures.reads.values())
    for (node, role), count in sorted(figures.reads.items()):
        yield "reads answered", node if node == role else f"{node} as {role}", f"{count} ({_share(count, read)})"
    for asked, (by_replicas, count) in figures.asked.items():
        yield "by replicas, of reads that asked for", asked, f"{_share(by_replicas, count)} of {count}"


def _of_outages(outages: Outages) -> Iterator[tuple[str, str, str]]:
    yield "reads with tokens", "sent again, the connection lost", f"{outages.again}"
    yield "reads with tokens", "not answered", f"{outages.not_answered - outages.excused}"
    yield "reads with tokens", "refused, primary away or API flooded", f"{outages.excused}"
    for name, took_s in outages.taken_over_s.items():
        middle = took_s[len(took_s) // 2]
        yield f"{name}: new writer", "median, longest", f"{middle:.2f} s, {took_s[-1]:.2f} s"


def _share(count: int, whole: int) -> str:
    return f"{100 * count / whole:.1f} %"


def _columns(rows: Iterable[tuple[str, str, str]]) -> Iterator[str]:
    """Line up the cells; a row's first cell is left out where it repeats the one above."""
    all_rows = list(rows)
    first, second = (max(len(row[column]) for row in all_rows) for column in (0, 1))
    above = ""
    for what, kind, count in all_rows:
        yield f"{'' if what == above else what:{first}}  {kind:{second}}  {count}"
        above = what


def _violation_as_json(violation: Violation) -> dict[str, Any]:
    return {
        "rule": violation.rule,
        "sentence": violation.sentence,
        "ops": [msgspec.structs.asdict(op) for op in violation.ops],
        "faults": [msgspec.structs.asdict(fault) for fault in violation.faults],
        "about": violation.about,
    }


def _figures_as_json(figures: Figures) -> dict[str, Any]:
    values = asdict(figures)
    values["requests"] = {f"{request} {outcome}": count for (request, outcome), count in figures.requests.items()}
    values["library"] = {f"{work} {outcome}": count for (work, outcome), count in figures.library.items()}
    values["reads"] = {f"{node} as {role}": count for (node, role), count in figures.reads.items()}
    return values


def _printable(line: str) -> str:
    """Replace control characters, with which a server's or client's text could steer the terminal."""
    return "".join(sign if sign.isprintable() else "\N{REPLACEMENT CHARACTER}" for sign in line)
