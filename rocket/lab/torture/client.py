"""A client process: `python -m rocket.lab.torture.client`, told what to do line by line on its standard input.

The first line holds its `Job`, as JSON; later ones `{"do": "flood", "sessions": 50, "until": 12.5}`,
`{"do": "hang-up", "until": 12.5}` and `{"do": "end"}`. It prints a line of counts twice a second. It ends when its
input ends, so that it does not outlive whoever started it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from pathlib import Path

import aiohttp

from rocket.errors import unwrapping_group
from rocket.lab.checker.history import HistoryWriter
from rocket.lab.shutdown import run
from rocket.lab.torture.workload import Job, Workload

_COUNTS_S = 0.5
_LONGEST_LINE = 2**20


async def _standard_input() -> asyncio.StreamReader:
    reader = asyncio.StreamReader(limit=_LONGEST_LINE)
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    return reader


async def _obey(lines: asyncio.StreamReader, workload: Workload, group: asyncio.TaskGroup) -> None:
    """Do what is asked for until the end is."""
    while line := await lines.readline():
        match json.loads(line):
            case {"do": "flood", "sessions": int(sessions), "until": until}:
                group.create_task(workload.flood(sessions, until), name="flood")
            case {"do": "hang-up", "until": until}:
                workload.hang_up_until = until
            case _:
                return


def _tell(workload: Workload) -> None:
    sys.stdout.write(json.dumps(workload.counts) + "\n")
    sys.stdout.flush()


async def _count(workload: Workload) -> None:
    """Tell how far it is, and end when there is nobody to tell."""
    parent = os.getppid()
    while os.getppid() == parent:
        _tell(workload)
        await asyncio.sleep(_COUNTS_S)
    raise ConnectionResetError("whoever started this is gone")


async def work() -> None:
    """Make traffic until told to end."""
    lines = await _standard_input()
    orders = Job(**json.loads(await lines.readline()))
    connector = aiohttp.TCPConnector(limit=0)
    with HistoryWriter(Path(orders.history)) as history:
        fresh = aiohttp.TCPConnector(limit=0, force_close=True)
        async with (
            aiohttp.ClientSession(orders.url, connector=connector) as http,
            aiohttp.ClientSession(orders.url, connector=fresh) as anew,
        ):
            workload = Workload(orders, http, anew, history)
            with contextlib.suppress(_Ended), unwrapping_group():
                async with asyncio.TaskGroup() as group:
                    group.create_task(workload.run(), name="sessions")
                    group.create_task(_count(workload), name="counts")
                    await _obey(lines, workload, group)
                    raise _Ended
        _tell(workload)


class _Ended(Exception):
    """The end was asked for."""


def main() -> None:
    """Run until told to end."""
    run(work())


if __name__ == "__main__":
    main()
