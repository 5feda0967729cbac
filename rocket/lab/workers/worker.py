"""A worker: `python -m rocket.lab.workers.worker`, started by the program whose API it is a part of.

Its standard input is a socket to that program. There it gets its `Job`, as one line, and answers
`{"ready": true}` or `{"failed": "..."}`. At SIGTERM it drains and ends; when its input ends, it does so at once,
and thus does not outlive whoever started it.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import logging
import os
import signal
import socket
import sys
from contextlib import nullcontext

from rocket.errors import RocketError
from rocket.lab import logs
from rocket.lab.loop import run
from rocket.lab.serving import serving
from rocket.lab.shutdown import ShutdownStack, background, shutdown_on_signals
from rocket.lab.workers.orders import Job

OK, FAILED = 0, 1
"""Exit codes: it was asked to end; it could not go on."""

_PR_SET_PDEATHSIG = 1
_STANDARD_INPUT = 0
_ORDERS_S = 10.0
_LONGEST_LINE = 2**20


async def work(inherited: socket.socket) -> int:
    """Serve until told to end; return the exit code."""
    lines, reports = await asyncio.open_unix_connection(sock=inherited, limit=_LONGEST_LINE)
    async with asyncio.timeout(_ORDERS_S):
        orders = Job.read(await lines.readline())
    logs.configure(orders.log_format, worker=orders.number)
    for name, level in orders.log_levels.items():
        logging.getLogger(name).setLevel(level)
    logging.getLogger("rocket.run").setLevel(logging.WARNING)  # the program says itself what it does
    listening = nullcontext() if orders.listener is None else socket.socket(fileno=orders.listener)
    try:
        with listening as listener, shutdown_on_signals() as ending:
            async with ShutdownStack(ending) as stack:
                await stack.enter_async_context(background(_end_with(lines), "the program's life"))
                await stack.enter_async_context(serving(orders.service, listener, ending))
                reports.write(b'{"ready": true}\n')
                await asyncio.Event().wait()  # the end comes as a cancellation
    except (RocketError, OSError) as error:  # what is wrong with the machine, rather than with us
        reports.write(json.dumps({"failed": str(error)}).encode() + b"\n")
        return FAILED
    else:
        return OK
    finally:
        reports.close()


async def _end_with(lines: asyncio.StreamReader) -> None:
    """End this process as soon as the program is gone: nobody is left to take it down, nor to answer for."""
    await lines.read()
    os._exit(FAILED)


def _die_with_parent() -> None:
    """Have the system end this process with the program: a halted one reads no end of its input."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def main() -> int:
    """Run until told to end; return the exit code."""
    _die_with_parent()
    try:
        inherited = socket.socket(fileno=_STANDARD_INPUT)
    except OSError:
        sys.stderr.write("rocket: workers are started by `python -m rocket run-all --api-workers N`\n")
        return FAILED
    return run(work(inherited))


if __name__ == "__main__":
    sys.exit(main())
