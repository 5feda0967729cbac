"""Runs a module as `python -m` does, while its standard input is open (`python -m rocket.lab.bench.leash MODULE`).

So what is measured ends, as by SIGTERM, with whoever started it, however that one came to its end.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import threading


def _hold() -> None:
    """Wait for the end of the input in a thread, which costs the program nothing."""
    while os.read(0, 1024):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    threading.Thread(target=_hold, name="leash", daemon=True).start()
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
