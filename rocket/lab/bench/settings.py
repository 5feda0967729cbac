"""What a benchmark is told on the command line."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from rocket.errors import InvalidSetting
from rocket.lab.bench.contenders import CONTENDERS
from rocket.lab.bench.measures import MEASURES, Pace
from rocket.lab.settings import parse_duration, parse_path, parse_port, parse_whole

if TYPE_CHECKING:
    import argparse
    from collections.abc import Collection, Iterator
    from pathlib import Path

_LONGEST_WARM_UP_S = 0.5
_STEADY = 4
"""So many rounds make one where phases have to be longer."""
_MOST_ROUNDS = 1000
_LONGEST_PHASE_S = 600.0
_MOST_CONNECTIONS = 1000
_MOST_REPLICAS = 30
_LONGEST_SOAK = 999_999_999

_FLAGS = {
    "rounds": ("N", "how often each contender has its turn, where it has short ones (default: 20)"),
    "seconds": ("S", "how long a short turn lasts (default: 0.5)"),
    "connections": ("N", "sessions at a time (default: 8)"),
    "replicas": ("N", "replicas beside the primary (default: 5)"),
    "only": ("NAMES", f"contenders, separated by commas: {', '.join(CONTENDERS)} (default: all)"),
    "measures": ("NAMES", f"measures, separated by commas: {', '.join(MEASURES)} (default: all)"),
    "json": ("FILE", "write every figure there"),
    "data-dir": ("DIR", "with --attach: the running cluster's data directory"),
    "postgres-port": ("P", "with --attach: a port of the running cluster"),
    "postgres-bin": ("DIR", "Postgres programs to use instead of those that come with rocket"),
    "soak": ("READS", "instead of comparing: that many reads of never-stale, and what they do to its memory"),
}


@dataclass(frozen=True, slots=True)
class BenchSettings:
    """What a run is made of."""

    rounds: int = 20
    seconds: float = 0.5
    connections: int = 8
    replicas: int = 5
    only: tuple[str, ...] = tuple(CONTENDERS)
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
        """How long a server is warmed up."""
        return min(_LONGEST_WARM_UP_S, self.seconds)

    def phases(self, pace: Pace) -> tuple[int, float]:
        """Return how many turns a contender has, and how many seconds each lasts."""
        match pace:
            case Pace.QUICK:
                return self.rounds, self.seconds
            case Pace.STEADY:
                return -(-self.rounds // _STEADY), self.seconds * _STEADY
            case Pace.ONCE:
                return 1, self.seconds * _STEADY

    @classmethod
    def read(cls, given: argparse.Namespace) -> Self:
        """Read what was given; raise `InvalidSetting` for what cannot be run, and make the JSON file."""
        default = cls()
        with _named("--rounds", given.rounds):
            rounds = parse_whole(given.rounds or str(default.rounds), 1, _MOST_ROUNDS)
        with _named("--seconds", given.seconds):
            seconds = parse_duration(given.seconds or str(default.seconds))
            if seconds > _LONGEST_PHASE_S:
                raise ValueError(f"must be at most {_LONGEST_PHASE_S:g}")
        with _named("--connections", given.connections):
            connections = parse_whole(given.connections or str(default.connections), 1, _MOST_CONNECTIONS)
        with _named("--replicas", given.replicas):
            replicas = parse_whole(given.replicas or str(default.replicas), 1, _MOST_REPLICAS)
        with _named("--postgres-port", given.postgres_port):
            postgres_port = None if given.postgres_port is None else parse_port(given.postgres_port)
        with _named("--data-dir", given.data_dir):
            data_dir = None if given.data_dir is None else parse_path(given.data_dir)
        with _named("--postgres-bin", given.postgres_bin):
            postgres_bin = None if given.postgres_bin is None else parse_path(given.postgres_bin)
        with _named("--soak", given.soak):
            soak = None if given.soak is None else parse_whole(given.soak, 10, _LONGEST_SOAK)
        if not given.attach and (data_dir is not None or postgres_port is not None):
            raise InvalidSetting("--data-dir and --postgres-port name a cluster that is there: give --attach too")
        if given.attach and (given.replicas is not None or postgres_bin is not None):
            raise InvalidSetting("a cluster that is there has the replicas and the programs that it has")
        if given.scale and (soak is not None or given.attach):
            raise InvalidSetting("--scale needs no cluster, and goes with --json alone")
        only, measures = _chosen("--only", given.only, CONTENDERS), _chosen("--measures", given.measures, MEASURES)
        if not any(each.name in only for measure in measures for each in MEASURES[measure].contenders):
            raise InvalidSetting("none of those in --only takes part in what --measures names")
        return cls(
            rounds=rounds,
            seconds=seconds,
            connections=connections,
            replicas=replicas,
            only=only,
            measures=measures,
            json=_file(given.json),
            attach=given.attach,
            data_dir=data_dir,
            postgres_port=postgres_port,
            postgres_bin=postgres_bin,
            soak=soak,
            scale=given.scale,
        )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give a parser the benchmark's flags."""
    for name, (metavar, what) in _FLAGS.items():
        parser.add_argument(f"--{name}", metavar=metavar, help=what)
    parser.add_argument(
        "--attach", action="store_true", help="use a cluster that runs already; users and rides are left in it"
    )
    parser.add_argument(
        "--scale",
        action="store_true",
        help="instead of comparing: what a decision and a round of the observer cost with up to 5000 replicas",
    )


@contextlib.contextmanager
def _named(flag: str, given: str | None) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise InvalidSetting(f"{flag} {error}, not {given!r}") from None


def _chosen(flag: str, given: str | None, known: Collection[str]) -> tuple[str, ...]:
    names = list(known) if given is None else given.split(",")
    for name in names:
        if name not in known:
            raise InvalidSetting(f"{flag}: there is no {name!r}, but {', '.join(known)}")
    return tuple(name for name in known if name in names)


def _file(given: str | None) -> Path | None:
    if given is None:
        return None
    with _named("--json", given):
        path = parse_path(given).absolute()
    try:
        path.touch()
    except OSError as error:
        raise InvalidSetting(f"--json: cannot write {path}: {error.strerror}") from None
    return path
