"""The command `bench`."""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING

from rocket.lab import logs
from rocket.lab.bench import machine
from rocket.lab.bench.figures import Figures
from rocket.lab.bench.goals import stale_reads
from rocket.lab.bench.report import as_json, report
from rocket.lab.bench.run import bench
from rocket.lab.bench.settings import BenchSettings
from rocket.lab.shutdown import run

if TYPE_CHECKING:
    import argparse

OK, FAILED = 0, 1
"""Exit codes: measured, whatever it says; a part failed, or a read of never-stale was stale."""


def measure(given: argparse.Namespace) -> int:
    """Measure what the command line says, and print it, also when it is cut off; return the exit code."""
    settings = BenchSettings.read(given)
    logs.configure("text")
    logging.getLogger("rocket.control").setLevel(logging.WARNING)  # it pauses and resumes by itself
    figures, about = Figures(), machine.describe(settings)
    finished = False
    try:
        finished = run(bench(settings, figures, about))
    finally:
        about["finished"] = finished
        if figures.rows:
            print(f"\n{report(figures, about)}")
        if settings.json is not None:
            settings.json.write_text(json.dumps(as_json(figures, about), indent=2) + "\n")
    return OK if finished and not stale_reads(figures) else FAILED
