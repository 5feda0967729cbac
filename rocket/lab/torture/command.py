"""The commands `torture` and `check`."""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING

from rocket.lab import logs
from rocket.lab.checker import check, goals, reader
from rocket.lab.checker.history import GarbledHistory
from rocket.lab.checker.report import as_json, report
from rocket.lab.checker.verdict import Judgement, Verdict
from rocket.lab.shutdown import run
from rocket.lab.torture.run import torture
from rocket.lab.torture.settings import TortureSettings

if TYPE_CHECKING:
    import argparse
    from pathlib import Path

_LOUD = ("rocket.lab.api", "rocket.router")
"""Loggers that would drown torture's own by a line for each read."""


def torture_and_judge(given: argparse.Namespace) -> int:
    """Torture as the command line says, and judge that; return the exit code."""
    settings = TortureSettings.read(given)
    logs.configure("text")
    for name in _LOUD:
        logging.getLogger(name).setLevel(logging.ERROR)
    print(f"seed {settings.seed}, history in {settings.history}", flush=True)
    if settings.failovers:
        from rocket.lab.torture.failovers import torture_failovers  # noqa: PLC0415 - it imports aiohttp

        run(torture_failovers(settings))
        found = list(goals.findings(reader.read_history(settings.history)))
        print("\n".join(f"{'    ' if one.good else '  ! '}{one.words}" for one in found), end="\n\n")
        exit_code = judge(settings.history, as_text=True)
        if exit_code == 0 and any(one.promised and not one.good for one in found):
            exit_code = Judgement.VIOLATED.exit_code
        last_words = goals.closing_words(found)
    else:
        run(torture(settings))
        exit_code = judge(settings.history, as_text=True)
        last_words = []
    if exit_code == 0 and not settings.keep and not last_words:
        settings.history.unlink()
    else:
        print(f"\nThe history is in {settings.history}; the seed was {settings.seed}.")
    if last_words:
        print("", *last_words, sep="\n")
    return exit_code


def judge(file: Path, *, as_text: bool) -> int:
    """Judge a history and print that; return the exit code."""
    try:
        verdict = check.check(reader.read_history(file))
    except GarbledHistory as error:
        verdict = Verdict(Judgement.VOID, reasons=(str(error),))
    print(report(verdict) if as_text else json.dumps(as_json(verdict), indent=2))
    return verdict.judgement.exit_code
