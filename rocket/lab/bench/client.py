"""The load process: `python -m rocket.lab.bench.client`, told what to do line by line on its standard input.

Each line holds `Job` as JSON and is answered by a line, its `Tally` or `{"error": "..."}`. It ends when its
input ends, in the middle of a load if need be, so that it does not outlive whoever started it.
"""

from __future__ import annotations

import asyncio
import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

from rocket.errors import RocketError, describe
from rocket.lab.bench.load import Load
from rocket.lab.bench.orders import Job, Kind
from rocket.lab.shutdown import run

if TYPE_CHECKING:
    from collections.abc import Mapping

_LONGEST_LINE = 2**20


async def _standard_input() -> asyncio.StreamReader:
    reader = asyncio.StreamReader(limit=_LONGEST_LINE)
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    return reader


async def _carry_out(load: Load, orders: Job) -> Mapping[str, object]:
    try:
        if orders.kind is Kind.JOIN:
            await load.join(orders)
            return {}
        return asdict(await load.run(orders))
    except RocketError as error:
        return {"error": describe(error)}


async def work() -> None:
    """Carry out one order after the other until there is nobody who gives any."""
    lines, load = await _standard_input(), Load()
    line = asyncio.ensure_future(lines.readline())
    while text := await line:
        said = json.loads(text)
        orders = Job(**{**said, "kind": Kind(said["kind"])})
        line = asyncio.ensure_future(lines.readline())
        done = asyncio.ensure_future(_carry_out(load, orders))
        await asyncio.wait({line, done}, return_when=asyncio.FIRST_COMPLETED)
        if not done.done():  # the next order comes when this one is answered: it is the end of all
            done.cancel()
            return
        sys.stdout.write(json.dumps(done.result()) + "\n")
        sys.stdout.flush()


def main() -> None:
    """Run until told to end."""
    run(work())


if __name__ == "__main__":
    main()
