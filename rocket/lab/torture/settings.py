"""What a torture run is told on the command line."""

from __future__ import annotations

import contextlib
import os
import secrets
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

from rocket.errors import InvalidSetting
from rocket.lab.checker.history import OF_PATRONI
from rocket.lab.settings import ROUTINGS, parse_duration, parse_one_of, parse_path, parse_wait, parse_whole
from rocket.lab.torture.schedule import KINDS, OF_PROCESSES, plan

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    from rocket.lab.torture.schedule import PlannedFault

_LARGEST_SEED = 999_999_999
_MOST_SESSIONS = 1000
_MOST_REPLICAS = 20
_MOST_PROCESSES = 16
_MOST_FAILOVERS = 1000

_FLAGS = {
    "seed": ("N", "of the faults' schedule (default: random)"),
    "duration": (
        "S",
        "for how long faults are planned; they end later if healing takes long: each comes once (default: 60s)",
    ),
    "calm": ("S", "how long traffic goes on without any: replicas have to be back within 10 s (default: 12s)"),
    "faults": ("NAMES", f"all, none, or of these, separated by commas: {', '.join(KINDS)} (default: all)"),
    "sessions": ("N", "clients at a time (default: 24)"),
    "routing": ("HOW", "never-stale; or, to see it convicted: article, random (default: never-stale)"),
    "replicas": ("N", "replicas beside the primary (default: 4)"),
    "processes": (
        "N",
        "processes of the API, up to 16; with several, they are killed and frozen, too (default: 1)",
    ),
    "failovers": ("N", "with --patroni: how many faults there are (default: 10)"),
    "history": ("FILE", "where it is recorded (default: a temporary file, kept unless it held)"),
    "postgres-bin": ("DIR", "Postgres programs to use instead of those that come with rocket"),
}


@dataclass(frozen=True, slots=True)
class TortureSettings:
    """What a run is made of."""

    seed: int
    duration_s: float
    """How long faults happen."""
    calm_s: float
    """How long traffic goes on after that. Less than ten seconds proves less: replicas may take so long."""
    faults: tuple[str, ...]
    sessions: int
    routing: str
    replicas: int
    processes: int
    history: Path
    keep: bool
    """Whether the history was asked for, and is kept whatever it says."""
    postgres_bin: Path | None
    schedule: tuple[PlannedFault, ...]
    failovers: int = 0
    """On a cluster of Patroni's, how many faults there are; 0: on one of our own."""

    @classmethod
    def read(cls, given: argparse.Namespace) -> Self:
        """Read what was given; raise `InvalidSetting` for what cannot be run, and make the history's file."""
        with _named("--seed", given.seed):
            seed = (
                secrets.randbelow(_LARGEST_SEED)
                if given.seed is None
                else parse_whole(given.seed, 0, _LARGEST_SEED)
            )
        with _named("--duration", given.duration):
            duration_s = parse_duration(given.duration or "60s")
        with _named("--calm", given.calm):
            calm_s = parse_wait(given.calm or "12s")
        with _named("--sessions", given.sessions):
            sessions = parse_whole(given.sessions or "24", 1, _MOST_SESSIONS)
        with _named("--routing", given.routing):
            routing = parse_one_of(*ROUTINGS)(given.routing or ROUTINGS[0])
        with _named("--replicas", given.replicas):
            replicas = parse_whole(given.replicas or "4", 0, _MOST_REPLICAS)
        with _named("--postgres-bin", given.postgres_bin):
            postgres_bin = None if given.postgres_bin is None else parse_path(given.postgres_bin)
        with _named("--processes", given.processes):
            processes = parse_whole(given.processes or "1", 1, _MOST_PROCESSES)
        with _named("--failovers", given.failovers):
            failovers = parse_whole(given.failovers or "10", 1, _MOST_FAILOVERS) if given.patroni else 0
        every = tuple(name for name in KINDS if processes > 1 or name not in OF_PROCESSES)
        kinds = OF_PATRONI if given.patroni else every
        named = {None: kinds, "all": kinds, "none": ()}
        faults = named[given.faults] if given.faults in named else tuple(given.faults.split(","))
        if processes == 1 and (alone := OF_PROCESSES & set(faults)):
            raise InvalidSetting(f"{', '.join(sorted(alone))}: for that there have to be several --processes")
        try:
            schedule = plan(seed, duration_s, () if given.patroni else faults, replicas)
        except ValueError as error:
            raise InvalidSetting(f"no such run can be planned: {error}") from None
        if given.patroni and (not faults or set(faults) - set(OF_PATRONI)):
            raise InvalidSetting(f"with --patroni there are the faults {', '.join(OF_PATRONI)}")
        return cls(
            seed=seed,
            duration_s=duration_s,
            calm_s=calm_s,
            faults=tuple(sorted(set(faults))),
            sessions=sessions,
            routing=routing,
            replicas=replicas,
            processes=processes,
            history=_history(given.history),
            keep=given.history is not None,
            postgres_bin=postgres_bin,
            schedule=schedule,
            failovers=failovers,
        )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give a parser torture's flags."""
    for name, (metavar, what) in _FLAGS.items():
        parser.add_argument(f"--{name}", metavar=metavar, help=what)
    parser.add_argument(
        "--patroni",
        action="store_true",
        help=f"on three members that Patroni runs; faults: {', '.join(OF_PATRONI)}",
    )


@contextlib.contextmanager
def _named(flag: str, given: str | None) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise InvalidSetting(f"{flag} {error}, not {given!r}") from None


def _history(given: str | None) -> Path:
    if given is None:
        descriptor, name = tempfile.mkstemp(prefix="rocket-torture-", suffix=".jsonl")
        os.close(descriptor)
        return Path(name)
    with _named("--history", given):
        path = parse_path(given).absolute()
    try:
        path.touch()
    except OSError as error:
        raise InvalidSetting(f"--history: cannot write {path}: {error.strerror}") from None
    return path
