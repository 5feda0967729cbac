"""The settings of a torture run, from the command line."""

from __future__ import annotations

import contextlib
import os
import secrets
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

from rocket.errors import InvalidSetting
from rocket.lab.settings import ROUTINGS
from rocket.lab.torture.faults import FAULTS
from rocket.lab.torture.patroni_faults import PATRONI_FAULTS
from rocket.lab.torture.schedule import plan
from rocket.lab.values import parse_duration, parse_one_of, parse_path, parse_wait, parse_whole

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
    "faults": ("NAMES", f"all, none, or of these, separated by commas: {', '.join(FAULTS)} (default: all)"),
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
    """The settings of a run."""

    seed: int
    duration_s: float
    """How long faults happen."""
    calm_s: float
    """How long traffic goes on after that. Less than ten seconds proves less: replicas may take ten to be back."""
    faults: tuple[str, ...]
    sessions: int
    routing: str
    replicas: int
    processes: int
    history: Path
    keep: bool
    """Whether the history was asked for, and is kept even if the run held."""
    postgres_bin: Path | None
    schedule: tuple[PlannedFault, ...]
    failovers: int = 0
    """How many faults there are on a cluster that Patroni runs; 0: the cluster is our own."""

    @classmethod
    def read(cls, given: argparse.Namespace) -> Self:
        """Read the flags and create the history's file; raise `InvalidSetting` for a run that is impossible."""
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
            processes = 1 if given.patroni else processes
        with _named("--failovers", given.failovers):
            failovers = parse_whole(given.failovers or "10", 1, _MOST_FAILOVERS) if given.patroni else 0
        faults = _faults(given, processes)
        try:
            schedule = () if given.patroni else plan(seed, duration_s, faults, replicas)
        except ValueError as error:
            raise InvalidSetting(f"no such run can be planned: {error}") from None
        return cls(
            seed=seed,
            duration_s=duration_s,
            calm_s=calm_s,
            faults=faults,
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
        help=f"on three members that Patroni runs; faults: {', '.join(PATRONI_FAULTS)}",
    )


def _faults(given: argparse.Namespace, processes: int) -> tuple[str, ...]:
    """Return the names of the faults, in order; `plan` refuses unknown ones."""
    alone = {name for name, kind in FAULTS.items() if kind.needs_processes and processes == 1}
    every = PATRONI_FAULTS if given.patroni else FAULTS.keys() - alone
    named = {None: every, "all": every, "none": ()}
    names = set(named[given.faults] if given.faults in named else given.faults.split(","))
    if missing := sorted(names & alone):
        raise InvalidSetting(f"{', '.join(missing)}: for that there have to be several --processes")
    if given.patroni and (not names or names - PATRONI_FAULTS.keys()):
        raise InvalidSetting(f"with --patroni there are the faults {', '.join(PATRONI_FAULTS)}")
    return tuple(sorted(names))


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
