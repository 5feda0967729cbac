"""The settings of a benchmark, from the command line."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rocket.errors import InvalidSetting
from rocket.lab.bench.measures import MEASURES, VARIANTS, Pace
from rocket.lab.settings import (
    CommandSettings,
    add_flags,
    parse_duration,
    parse_path,
    parse_port,
    parse_whole,
    parse_yes_or_no,
    read_settings,
    setting,
)

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Collection
    from pathlib import Path

_MAX_WARM_UP_S = 0.5
_STEADY = 4
"""How many quick rounds make a steady one."""
_MAX_TURN_S = 600.0


def _whole(least: int, most: int) -> Callable[[str], int]:
    return lambda text: parse_whole(text, least, most)


def _seconds(text: str) -> float:
    seconds = parse_duration(text)
    if seconds > _MAX_TURN_S:
        raise ValueError(f"must be at most {_MAX_TURN_S:g}")
    return seconds


def _some_of(known: Collection[str]) -> Callable[[str], tuple[str, ...]]:
    def read(text: str) -> tuple[str, ...]:
        names = text.split(",")
        if unknown := [name for name in names if name not in known]:
            raise ValueError(f"has no {unknown[0]!r}: it must be some of {', '.join(known)}")
        return tuple(name for name in known if name in names)

    return read


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchSettings(CommandSettings):
    """Which measures to take of which variants, and how."""

    rounds: int = setting(20, _whole(1, 1000), "N", "turns of each variant in the measures of many short turns")
    seconds: float = setting(0.5, _seconds, "S", "length of a short turn")
    connections: int = setting(8, _whole(1, 1000), "N", "sessions at a time")
    replicas: int = setting(5, _whole(1, 30), "N", "replicas beside the primary")
    only: tuple[str, ...] = setting(
        tuple(VARIANTS), _some_of(VARIANTS), "NAMES", f"variants, separated by commas: {', '.join(VARIANTS)}",
        shown="all",
    )  # fmt: skip
    measures: tuple[str, ...] = setting(
        tuple(MEASURES), _some_of(MEASURES), "NAMES", f"measures, separated by commas: {', '.join(MEASURES)}",
        shown="all",
    )  # fmt: skip
    json: Path | None = setting(
        None, lambda text: parse_path(text).absolute(), "FILE", "write every figure to this file"
    )
    attach: bool = setting(False, parse_yes_or_no, "", "use a running cluster; users and rides stay in it")
    data_dir: Path | None = setting(
        None, parse_path, "DIR", "with --attach: data directory of the running cluster"
    )
    postgres_port: int | None = setting(None, parse_port, "P", "with --attach: a port of the running cluster")
    postgres_bin: Path | None = setting(
        None, parse_path, "DIR", "Postgres programs to use instead of those that come with rocket"
    )
    against: Path | None = setting(
        None, parse_path, "PYTHON",
        "measure another build of rocket too, the one that this Python interpreter imports, and compare them",
    )  # fmt: skip
    soak: int | None = setting(
        None, _whole(10, 999_999_999), "READS",
        "instead of comparing: this number of never-stale reads, and the memory they take",
    )  # fmt: skip
    scale: bool = setting(
        False, parse_yes_or_no, "",
        "instead of comparing: the cost of a decision and of a round of the observer with up to 5,000 replicas",
    )  # fmt: skip

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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `bench` to a parser."""
    add_flags(parser, BenchSettings)


def load(given: argparse.Namespace) -> BenchSettings:
    """Read the flags, and create the JSON file; raise `InvalidSetting` for what cannot be run."""
    settings = read_settings(BenchSettings, given)
    if not settings.attach and settings.given & {"data_dir", "postgres_port"}:
        raise InvalidSetting("--data-dir and --postgres-port name a running cluster: give --attach too")
    if settings.attach and settings.given & {"replicas", "postgres_bin"}:
        raise InvalidSetting("--replicas and --postgres-bin are for a cluster of its own: leave out --attach")
    if settings.scale and (settings.attach or settings.soak is not None):
        raise InvalidSetting("--scale needs no cluster, and goes with --json alone")
    if settings.against is not None and not os.access(settings.against, os.X_OK):
        raise InvalidSetting(f"--against: {settings.against} is not a program")
    if not any(each.name in settings.only for name in settings.measures for each in MEASURES[name].variants):
        raise InvalidSetting("no variant of --only takes part in the --measures")
    if settings.json is not None:
        try:
            settings.json.touch()
        except OSError as error:
            raise InvalidSetting(f"--json: cannot write {settings.json}: {error.strerror}") from None
    return settings
