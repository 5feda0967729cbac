"""The command `bench`."""

from __future__ import annotations

import datetime as dt
import json
import logging
import platform
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

import rocket
from rocket.lab import logs
from rocket.lab.bench.figures import Figures
from rocket.lab.bench.report import as_json, report, stale_reads
from rocket.lab.bench.run import bench
from rocket.lab.bench.settings import load
from rocket.lab.shutdown import run

if TYPE_CHECKING:
    import argparse

    from rocket.lab.bench.settings import BenchSettings

OK, FAILED = 0, 1
"""Exit codes: measured, whatever the figures; a part failed, or a read of never-stale was stale."""

_CPU_INFO = Path("/proc/cpuinfo")
_UNSAID = {"json", "data_dir", "postgres_bin", "against", "given"}
"""Settings that say nothing about the figures: paths on this machine, and which of the others were given."""


def measure(given: argparse.Namespace) -> int:
    """Run the benchmark and print its report, also if it is interrupted; return the exit code."""
    settings = load(given)
    logs.configure("text")
    logging.getLogger("rocket.control").setLevel(logging.WARNING)  # a measure pauses and resumes replicas itself
    figures, about = Figures(), _about(settings)
    complete = False
    try:
        complete = run(bench(settings, figures, about))
    finally:
        about["finished"] = complete
        if figures.rows:
            print(f"\n{report(figures, about)}")
        if settings.json is not None:
            settings.json.write_text(json.dumps(as_json(figures, about), indent=2) + "\n")
    return OK if complete and not stale_reads(figures) else FAILED


def _about(settings: BenchSettings) -> dict[str, object]:
    """Return what a reader of the figures needs to know of the machine and the run."""
    return {
        "rocket": rocket.__version__,
        "at": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "cores": psutil.cpu_count() or 1,
        "cpu": _cpu(),
        "load_average_1_min": psutil.getloadavg()[0],
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
        "settings": {name: value for name, value in asdict(settings).items() if name not in _UNSAID},
    }


def _cpu() -> str:
    if _CPU_INFO.is_file():
        for line in _CPU_INFO.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
