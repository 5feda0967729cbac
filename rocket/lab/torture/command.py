"""The commands `torture` and `check`."""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING

from rocket.lab import logs
from rocket.lab.checker.availability import failover_targets, missed_targets
from rocket.lab.checker.check import Judgement, Verdict, check
from rocket.lab.checker.history import GarbledHistory, read_history
from rocket.lab.checker.report import as_json, report
from rocket.lab.shutdown import run
from rocket.lab.torture.run import torture
from rocket.lab.torture.settings import TortureSettings

if TYPE_CHECKING:
    import argparse
    from pathlib import Path

    from rocket.lab.checker.availability import Target

_ONE_LINE_PER_READ = ("rocket.api", "rocket.router")
"""Loggers of which only errors are shown beside torture's own."""


def torture_and_judge(given: argparse.Namespace) -> int:
    """Torture as the command line says, and judge the history; return the exit code."""
    settings = TortureSettings.read(given)
    logs.configure("text")
    for name in _ONE_LINE_PER_READ:
        logging.getLogger(name).setLevel(logging.ERROR)
    print(f"seed {settings.seed}, history in {settings.history}", flush=True)
    run(torture(settings))
    targets: list[Target] = []
    if settings.patroni:
        targets = list(failover_targets(read_history(settings.history)))
        print("\n".join(f"{'    ' if target.met else '  ! '}{target.text}" for target in targets), end="\n\n")
    exit_code = judge(settings.history, as_text=True)
    if exit_code == 0 and any(target.promised and not target.met for target in targets):
        exit_code = Judgement.VIOLATED.exit_code
    missed = missed_targets(targets)
    if exit_code == 0 and not settings.keeps_history and not missed:
        settings.history.unlink()
    else:
        print(f"\nThe history is in {settings.history}; the seed was {settings.seed}.")
    if missed:
        print("", *missed, sep="\n")
    return exit_code


def judge(file: Path, *, as_text: bool) -> int:
    """Judge a history and print the verdict; return the exit code."""
    try:
        verdict = check(read_history(file))
    except GarbledHistory as error:
        verdict = Verdict(Judgement.VOID, reasons=(str(error),))
    print(report(verdict) if as_text else json.dumps(as_json(verdict), indent=2))
    return verdict.judgement.exit_code
