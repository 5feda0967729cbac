"""The settings of a benchmark, from the command line."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from rocket.errors import InvalidSetting
from rocket.lab.bench.measures import MEASURES, VARIANTS, Pace
from rocket.lab.values import parse_duration, parse_path, parse_port, parse_whole

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Collection
    from pathlib import Path

_MAX_WARM_UP_S = 0.5
_STEADY = 4
"""How many quick rounds make a steady one."""
_MAX_PHASE_S = 600.0


@dataclass(frozen=True, slots=True)
class BenchSettings:
    """Which measures to take of which variants, and how."""

    rounds: int = 20
    seconds: float = 0.5
    connections: int = 8
    replicas: int = 5
    only: tuple[str, ...] = tuple(VARIANTS)
    measures: tuple[str, ...] = tuple(MEASURES)
    json: Path | None = None
    attach: bool = False
    data_dir: Path | None = None
    postgres_port: int | None = None
    postgres_bin: Path | None = None
    soak: int | None = None
    scale: bool = False

    @property
    def warm_up_s(self) -> float:
        """For how long a server is warmed up."""
        return min(_MAX_WARM_UP_S, self.seconds)

    def phases(self, pace: Pace) -> tuple[int, float]:
        """Return the number of rounds, and the seconds of a variant's turn in each."""
        match pace:
            case Pace.QUICK:
                return self.rounds, self.seconds
            case Pace.STEADY:
                return -(-self.rounds // _STEADY), self.seconds * _STEADY
            case Pace.ONCE:
                return 1, self.seconds * _STEADY

    @classmethod
    def read(cls, given: argparse.Namespace) -> Self:
        """Read the flags, and create the JSON file; raise `InvalidSetting` for what cannot be run."""
        values: dict[str, Any] = {"attach": given.attach, "scale": given.scale}
        for name, flag in _FLAGS.items():
            text = getattr(given, name)
            if text is not None:
                try:
                    values[name] = flag.read(text)
                except ValueError as error:
                    raise InvalidSetting(f"{_flag(name)} {error}, not {text!r}") from None
        settings = cls(**values)
        if not given.attach and values.keys() & {"data_dir", "postgres_port"}:
            raise InvalidSetting("--data-dir and --postgres-port name a running cluster: give --attach too")
        if given.attach and values.keys() & {"replicas", "postgres_bin"}:
            raise InvalidSetting("--replicas and --postgres-bin are not for a cluster that runs already")
        if given.scale and (given.attach or "soak" in values):
            raise InvalidSetting("--scale needs no cluster, and goes with --json alone")
        if not any(each.name in settings.only for name in settings.measures for each in MEASURES[name].variants):
            raise InvalidSetting("no variant of --only takes part in the --measures")
        if settings.json is not None:
            try:
                settings.json.touch()
            except OSError as error:
                raise InvalidSetting(f"--json: cannot write {settings.json}: {error.strerror}") from None
        return settings


# --- flags ---


class _Flag(NamedTuple):
    metavar: str
    read: Callable[[str], Any]
    what: str


def _whole(least: int, most: int) -> Callable[[str], int]:
    return lambda text: parse_whole(text, least, most)


def _seconds(text: str) -> float:
    seconds = parse_duration(text)
    if seconds > _MAX_PHASE_S:
        raise ValueError(f"must be at most {_MAX_PHASE_S:g}")
    return seconds


def _some_of(known: Collection[str]) -> Callable[[str], tuple[str, ...]]:
    def read(text: str) -> tuple[str, ...]:
        names = text.split(",")
        if unknown := [name for name in names if name not in known]:
            raise ValueError(f"has no {unknown[0]!r}: it must be some of {', '.join(known)}")
        return tuple(name for name in known if name in names)

    return read


_FLAGS = {
    "rounds": _Flag("N", _whole(1, 1000), "rounds of a measure with short turns (default: 20)"),
    "seconds": _Flag("S", _seconds, "how long a short turn lasts (default: 0.5)"),
    "connections": _Flag("N", _whole(1, 1000), "concurrent sessions (default: 8)"),
    "replicas": _Flag("N", _whole(1, 30), "replicas beside the primary (default: 5)"),
    "only": _Flag(
        "NAMES", _some_of(VARIANTS), f"variants, separated by commas: {', '.join(VARIANTS)} (default: all)"
    ),
    "measures": _Flag(
        "NAMES", _some_of(MEASURES), f"measures, separated by commas: {', '.join(MEASURES)} (default: all)"
    ),
    "json": _Flag("FILE", lambda text: parse_path(text).absolute(), "write every figure to this file"),
    "data_dir": _Flag("DIR", parse_path, "with --attach: the running cluster's data directory"),
    "postgres_port": _Flag("P", parse_port, "with --attach: a port of the running cluster"),
    "postgres_bin": _Flag("DIR", parse_path, "Postgres programs to use instead of those that come with rocket"),
    "soak": _Flag(
        "READS", _whole(10, 999_999_999), "instead of comparing: answer that many reads, and measure the memory"
    ),
}


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `bench` to a parser."""
    for name, flag in _FLAGS.items():
        parser.add_argument(_flag(name), metavar=flag.metavar, help=flag.what)
    parser.add_argument(
        "--attach", action="store_true", help="use a cluster that runs already; users and rides are left in it"
    )
    parser.add_argument(
        "--scale",
        action="store_true",
        help="instead of comparing: what a decision and an observer's round cost with up to 5000 replicas",
    )
