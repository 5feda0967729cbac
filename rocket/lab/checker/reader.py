"""Reading a history back, and refusing what is not one."""

from __future__ import annotations

import json
import math
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from rocket.errors import describe
from rocket.lab.checker.history import (
    VERSION,
    End,
    Entry,
    Fault,
    GarbledHistory,
    Healed,
    History,
    HistoryNotFound,
    Op,
    Outcome,
    Request,
    Role,
    Run,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

ValueT = TypeVar("ValueT")

_SUCCESS = {
    Request.JOIN: {200, 201},
    Request.WRITE: {201},
    Request.READ: {200, 404},
    Request.LIST: {200},
}
_OF_ONE_RIDE = {Request.WRITE, Request.READ}
_NOT_FOUND = 404


def read_history(path: Path) -> History:
    """Read a file; raise `HistoryNotFound` if it cannot be opened, `GarbledHistory` if it is no whole history."""
    entries = []
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                try:
                    entries.append(parse_line(line))
                except GarbledHistory as error:
                    cut = "" if line.endswith(b"\n") else "cut off, or "
                    raise GarbledHistory(f"line {number} is {cut}garbled: {error}") from None
    except OSError as error:
        raise HistoryNotFound(f"cannot read the history '{path}': {error.strerror or describe(error)}") from None
    return History.of(entries)


def parse_line(line: str | bytes) -> Entry:
    """Read one line; raise `GarbledHistory` for whatever `line_of` does not write."""
    try:
        values = json.loads(line, parse_constant=_refuse)
    except (ValueError, RecursionError):
        raise GarbledHistory("not JSON") from None
    kind = values.pop("kind", None) if isinstance(values, dict) else None
    if not isinstance(kind, str) or kind not in _KINDS:
        raise GarbledHistory("not an object of a known kind")
    make, readers = _KINDS[kind]
    if values.keys() != readers.keys():
        raise GarbledHistory(f"fields missing or unknown: {', '.join(sorted(values.keys() ^ readers.keys()))}")
    for name, read in readers.items():
        try:
            values[name] = read(values[name])
        except (ValueError, OverflowError):
            raise GarbledHistory(f"wrong value of '{name}'") from None
    entry: Entry = make(**values)
    contradiction = _contradiction(entry)
    if contradiction:
        raise GarbledHistory(contradiction)
    return entry


def _contradiction(entry: Entry) -> str | None:
    if isinstance(entry, Run) and entry.version != VERSION:
        return f"version {entry.version} of the format is not known here, only {VERSION}"
    if isinstance(entry, Fault) and entry.until < entry.at:
        return "over before it began"
    return _contradiction_of_op(entry) if isinstance(entry, Op) else None


def _contradiction_of_op(op: Op) -> str | None:
    read, found_nothing = op.request is Request.READ, op.status == _NOT_FOUND
    ok = op.outcome is Outcome.OK
    contradictions = {
        "done before it began": op.done < op.at,
        "a write without its distance": op.request is Request.WRITE and op.distance is None,
        "a ride that was not found is an answer, so 'ok'": read and found_nothing and not ok,
        f"'ok' with status {op.status}": ok and op.status not in _SUCCESS[op.request],
        "a ride without its id": ok and op.request in _OF_ONE_RIDE and op.ride is None,
        "a ride that was read has a distance, and one that was not found has none": (
            ok and read and (op.distance is None) != found_nothing
        ),
        "a page without its rides, or not saying whether it is complete": (
            ok and op.request is Request.LIST and (op.rides is None or op.complete is None)
        ),
    }
    return next((what for what, so in contradictions.items() if so), None)


# --- values ---


class _Wrong(ValueError):
    """The value is not of the kind that its field holds; the caller says which field that is."""


def _refuse(_: str) -> NoReturn:
    raise _Wrong


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise _Wrong
    if not value.isascii():
        value.encode()  # half a surrogate pair could not be shown to anybody
    return value


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise _Wrong
    return float(value)


def _whole(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise _Wrong
    return value


def _flag(value: object) -> bool:
    if not isinstance(value, bool):
        raise _Wrong
    return value


def _distance(value: object) -> float:
    return round(_number(value), 1)


def _texts(value: object) -> tuple[str, ...]:
    return tuple(_text(one) for one in _list(value))


def _rides(value: object) -> tuple[tuple[int, float], ...]:
    try:
        return tuple([_ride(*_list(one)) for one in _list(value)])
    except TypeError:  # not two values, or such as cannot be told apart
        raise _Wrong from None


@lru_cache(maxsize=1 << 18, typed=True)
def _ride(ride: object, distance: object) -> tuple[int, float]:
    """Return a ride on a page; most are there on many pages, and kept once."""
    return _whole(ride), _distance(distance)


def _list(value: object) -> list[object]:
    if not isinstance(value, list):
        raise _Wrong
    return value


def _object(value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _Wrong
    json.dumps(value, ensure_ascii=False).encode()
    return value


def _one_of(kind: Callable[[Any], ValueT]) -> Callable[[object], ValueT]:
    return kind


def _or_none(read: Callable[[object], ValueT]) -> Callable[[object], ValueT | None]:
    return lambda value: None if value is None else read(value)


_KINDS: Mapping[str, tuple[Callable[..., Entry], Mapping[str, Callable[[object], Any]]]] = {
    Run.KIND: (
        Run,
        {
            "version": _whole,
            "seed": _whole,
            "duration_s": _number,
            "routing": _text,
            "sessions": _whole,
            "faults": _texts,
            "nodes": _texts,
            "processes": _whole,
            "started_at": _text,
        },
    ),
    Op.KIND: (
        Op,
        {
            "session": _text,
            "user": _text,
            "tokens": _flag,
            "request": _one_of(Request),
            "at": _number,
            "done": _number,
            "outcome": _one_of(Outcome),
            "status": _or_none(_whole),
            "node": _or_none(_text),
            "role": _or_none(_one_of(Role)),
            "reason": _or_none(_text),
            "sent": _or_none(_text),
            "got": _or_none(_text),
            "ride": _or_none(_whole),
            "distance": _or_none(_distance),
            "rides": _or_none(_rides),
            "complete": _or_none(_flag),
            "lost": _or_none(_text),
            "error": _or_none(_text),
            "again": _flag,
        },
    ),
    Fault.KIND: (
        Fault,
        {"name": _text, "node": _or_none(_text), "at": _number, "until": _number, "detail": _object},
    ),
    Healed.KIND: (Healed, {"at": _number}),
    End.KIND: (End, {"at": _number, "leaked": _texts}),
}
