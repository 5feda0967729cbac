"""The settings of a torture run, from the command line."""

from __future__ import annotations

import os
import secrets
import tempfile
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Self

from rocket.errors import InvalidSetting
from rocket.lab.checker.history import MIXED
from rocket.lab.settings import (
    ROUTINGS,
    CommandSettings,
    add_flags,
    parse_duration,
    parse_freshness,
    parse_one_of,
    parse_path,
    parse_wait,
    parse_whole,
    parse_yes_or_no,
    read_settings,
    setting,
)
from rocket.lab.torture.faults import FAULTS
from rocket.lab.torture.patroni_faults import PATRONI_FAULTS
from rocket.lab.torture.schedule import plan

if TYPE_CHECKING:
    import argparse

    from rocket.lab.torture.schedule import PlannedFault

_MAX_SEED = 999_999_999


def _parse_names(text: str) -> tuple[str, ...]:
    """Read names separated by commas; `all` and `none` stand for themselves."""
    return tuple(text.split(","))


def _parse_freshness(text: str) -> str:
    """Read what reads ask for: one thing, or all that there is."""
    try:
        return MIXED if text == MIXED else parse_freshness(text)
    except ValueError as error:
        raise ValueError(f"{error}; or {MIXED}") from None


@dataclass(frozen=True, slots=True)
class TortureSettings(CommandSettings):
    """The settings of a run; `read` returns them complete."""

    seed: int = setting(
        None, partial(parse_whole, least=0, most=_MAX_SEED), "N", "of the faults' schedule", shown="random"
    )
    duration: float = setting(
        60.0, parse_duration, "S",
        "for how long faults are planned; they end later if healing takes long: each comes once",
    )  # fmt: skip
    calm: float = setting(
        12.0, parse_wait, "S", "how long traffic goes on without any: replicas have to be back within 10 s"
    )
    faults: tuple[str, ...] = setting(
        ("all",), _parse_names, "NAMES", f"all, none, or of these, separated by commas: {', '.join(FAULTS)}",
        shown="all",
    )  # fmt: skip
    sessions: int = setting(24, partial(parse_whole, least=1, most=1000), "N", "clients at a time")
    routing: str = setting(
        ROUTINGS[0], parse_one_of(*ROUTINGS), "HOW", "never-stale; or, to see it convicted: article, random"
    )
    freshness: str = setting(
        MIXED, _parse_freshness, "HOW",
        f"what reads ask to be shown: session, global, any, 'within 10s' or another time, or {MIXED}",
    )  # fmt: skip
    replicas: int = setting(4, partial(parse_whole, least=0, most=20), "N", "replicas beside the primary")
    processes: int = setting(
        1, partial(parse_whole, least=1, most=16), "N",
        "processes of the API, up to 16; with several, they are killed and frozen, too",
    )  # fmt: skip
    failovers: int = setting(
        10, partial(parse_whole, least=1, most=1000), "N", "with --patroni: how many faults there are"
    )
    history: Path = setting(
        None, parse_path, "FILE", "where it is recorded", shown="a temporary file, kept unless it held"
    )
    postgres_bin: Path | None = setting(
        None, parse_path, "DIR", "Postgres programs to use instead of those that come with rocket"
    )
    patroni: bool = setting(
        False, parse_yes_or_no, "", f"on three members that Patroni runs; faults: {', '.join(PATRONI_FAULTS)}"
    )
    schedule: tuple[PlannedFault, ...] = ()
    """The faults of our own cluster, in time."""

    @classmethod
    def read(cls, given: argparse.Namespace) -> Self:
        """Read the flags and create the history's file; raise `InvalidSetting` for a run that is impossible."""
        settings = read_settings(cls, given)
        if "seed" not in settings.given:
            settings = replace(settings, seed=secrets.randbelow(_MAX_SEED))
        if settings.patroni:
            settings = replace(settings, processes=1)
        faults = _faults(settings)
        planned = () if settings.patroni else faults
        try:
            schedule = plan(settings.seed, settings.duration, planned, settings.replicas)
        except ValueError as error:
            raise InvalidSetting(f"no such run can be planned: {error}") from None
        return replace(settings, faults=faults, schedule=schedule, history=_create(settings.history))

    @property
    def keeps_history(self) -> bool:
        """Whether the history is kept even if the run held, since its file was named."""
        return "history" in self.given


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give a parser torture's flags."""
    add_flags(parser, TortureSettings)


def _faults(settings: TortureSettings) -> tuple[str, ...]:
    """Return the names of the faults, in order; `plan` refuses unknown ones."""
    unavailable = {name for name, kind in FAULTS.items() if kind.needs_processes and settings.processes == 1}
    names = set(settings.faults)
    if names == {"all"}:
        by_name = {name for name, kind in FAULTS.items() if kind.by_name}
        names = set(PATRONI_FAULTS if settings.patroni else FAULTS.keys() - unavailable - by_name)
    elif names == {"none"}:
        names = set()
    if missing := sorted(names & unavailable):
        raise InvalidSetting(f"{', '.join(missing)}: for that there have to be several --processes")
    if settings.patroni and (not names or names - PATRONI_FAULTS.keys()):
        raise InvalidSetting(f"with --patroni there are the faults {', '.join(PATRONI_FAULTS)}")
    return tuple(sorted(names))


def _create(path: Path | None) -> Path:
    """Create the history's file, by default a temporary one, and return its path."""
    if path is None:
        descriptor, name = tempfile.mkstemp(prefix="rocket-torture-", suffix=".jsonl")
        os.close(descriptor)
        return Path(name)
    path = path.absolute()
    try:
        path.touch()
    except OSError as error:
        raise InvalidSetting(f"--history: cannot write {path}: {error.strerror}") from None
    return path
