"""What the figures were measured with and on."""

from __future__ import annotations

import datetime as dt
import platform
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

import rocket

if TYPE_CHECKING:
    from rocket.lab.bench.settings import BenchSettings

_CPU_INFO = Path("/proc/cpuinfo")
_NOT_TOLD = {"json", "data_dir", "postgres_bin"}
"""Settings that say where things are on this machine."""


def describe(settings: BenchSettings) -> dict[str, object]:
    """Return what a reader has to know of the machine and of the run."""
    return {
        "rocket": rocket.__version__,
        "at": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "cores": psutil.cpu_count() or 1,
        "cpu": _cpu(),
        "load_average_1_min": psutil.getloadavg()[0],
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
        "settings": {name: value for name, value in asdict(settings).items() if name not in _NOT_TOLD},
    }


def _cpu() -> str:
    if _CPU_INFO.is_file():
        for line in _CPU_INFO.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
