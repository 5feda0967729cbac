"""The command as its user runs it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio

from rocket.cluster import control
from tests.support.program import ROOT, command, run_all, running
from tests.support.servers import TEMPORARY, paused

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from aiohttp import web
    from aiohttp.test_utils import TestClient

    from rocket.cluster.cluster import LocalCluster
    from rocket.routing.observer import Observer

TIMEOUT_S = 15.0


@pytest_asyncio.fixture
async def system(
    cluster: LocalCluster, client: TestClient[web.Request, web.Application], observer: Observer
) -> AsyncIterator[tuple[str, ...]]:
    """Run a cluster with a control socket, and an API that has observed it; return the flags that find them."""
    await cluster.wait_for_catchup()
    await observer.run_once()
    api = {"url": str(client.make_url("")).rstrip("/"), "workers": 1}
    async with control.listening(cluster, lambda: None, api=api):
        yield "--data-dir", str(cluster.data_dir)


async def status(*flags: str) -> tuple[int, str]:
    """Run the command to its end; return exit code and output."""
    return await command(Path(TEMPORARY), "-m", "rocket", "status", *flags)


async def test_a_running_system_is_shown(
    system: tuple[str, ...], cluster: LocalCluster, client: TestClient[web.Request, web.Application], email: str
) -> None:
    """The cluster knows the API's address, and the API which nodes answered the reads."""
    await client.post("/users", json={"email": email})
    async with paused(cluster, "replica1"):
        await client.post("/rides", data={"distance": "1"}, headers={"Authorization": email})
        assert 200 == (await client.get("/rides", headers={"Authorization": email})).status
        code, output = await status(*system)
    assert 0 == code, output
    heading, columns, *rows, summary = output.splitlines()
    assert heading.endswith(f"routing never-stale, API {str(client.make_url('')).rstrip('/')}")
    assert ["member", "port", "role", "state"] == columns.split()[:4]
    ports = [str(node.port) for node in cluster.nodes.values()]
    assert [
        ["primary", ports[0], "primary", "up"],
        ["replica0", ports[1], "replica", "streaming"],
        ["replica1", ports[2], "replica", "paused"],
    ] == [row.split()[:4] for row in rows]
    assert "reads since the API's start: 1, 0.0 % by replicas; 1 by the primary (not-caught-up 1)" == summary


async def test_programs_get_the_same(system: tuple[str, ...], cluster: LocalCluster) -> None:
    """One object, in which each replica has an incarnation of its own."""
    code, output = await status("--json", *system)
    assert 0 == code, output
    shown = json.loads(output)
    assert list(cluster.nodes) == [member["name"] for member in shown["members"]]
    assert all(0 < member["incarnation_age_seconds"] < 3600 for member in shown["members"][1:])
    assert {"total": 0, "span_seconds": None}.items() <= shown["reads"].items()


async def test_an_address_alone_is_asked_alone(
    client: TestClient[web.Request, web.Application], cluster: LocalCluster, unused_tcp_port: int
) -> None:
    """A cluster that may have nothing to do with the API is left out."""
    async with control.listening(cluster, lambda: None):
        code, output = await status("--json", "--url", str(client.make_url("")))
    assert 0 == code, output
    shown = json.loads(output)
    assert (False, [None] * 3) == (shown["cluster"]["found"], [member["port"] for member in shown["members"]])
    url = f"http://127.0.0.1:{unused_tcp_port}"
    assert (1, f"rocket: no API at {url} (Connection refused)\n") == await status("--url", url)


async def test_watch_follows_a_system_that_ends_and_starts_again(kept_dir: Path) -> None:
    """On whichever ports, snapshot after snapshot, until a signal."""
    async with running(kept_dir, "-m", "rocket", "status", "--watch") as nothing:
        assert 1 == await nothing.ends()
    assert "no API at" in nothing.errors
    async with run_all(kept_dir, "--no-simulator") as program:
        await program.prints("ready after")
        async with running(kept_dir, "-m", "rocket", "status", "--watch", "0.2") as watching:
            await watching.prints("reads since the API's start: none", TIMEOUT_S)
            await watching.prints("reads in .* s: none", TIMEOUT_S)
            program.process.send_signal(signal.SIGINT)
            assert 0 == await program.ends(timeout_s=5)
            await watching.prints("no API at .* and no cluster", TIMEOUT_S)
            async with run_all(kept_dir, "--no-simulator") as again:
                url = (await again.prints(r"ready after .*: (http://[^ ]+)"))[1]
                await watching.prints(f"routing never-stale, API {url}", TIMEOUT_S)
                watching.process.send_signal(signal.SIGINT)
                assert (0, "") == (await watching.ends(timeout_s=5), watching.errors)


@contextlib.contextmanager
def terminal() -> Iterator[tuple[int, int]]:
    """Open a pseudo-terminal; yield the end to read from, and the end for programs to write to."""
    ends = os.openpty()
    try:
        yield ends
    finally:
        for end in ends:
            os.close(end)


async def test_a_terminal_is_restored(system: tuple[str, ...]) -> None:
    """`--watch` draws in place on the alternate screen, without a cursor, until Ctrl-C."""
    with terminal() as (reading_end, program_end):
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "rocket", "status", "--watch", "0.1", *system,
            cwd=ROOT, env=os.environ | {"TMPDIR": TEMPORARY, "TERM": "xterm", "NO_COLOR": "1"},
            stdout=program_end, stderr=program_end,
        )  # fmt: skip
        output = ""
        async with asyncio.timeout(TIMEOUT_S):
            while output.count("\x1b[H") < 2:
                output += (await asyncio.to_thread(os.read, reading_end, 65536)).decode()
            process.send_signal(signal.SIGINT)
            assert 0 == await process.wait()
            os.write(program_end, b"end")
            while not output.endswith("end"):
                output += (await asyncio.to_thread(os.read, reading_end, 65536)).decode()
    assert output.startswith("\x1b[?1049h\x1b[?25l\x1b[H")
    assert output.endswith("\x1b[?25h\x1b[?1049lend")
    assert "\x1b[1m" not in output


async def test_the_end_of_its_reader_ends_it(system: tuple[str, ...]) -> None:
    """As in `status --watch | head`: without an error message."""
    process = await asyncio.create_subprocess_shell(
        f"{sys.executable} -m rocket status --watch 0.1 --json {' '.join(system)} | head -n 2",
        cwd=ROOT,
        env=os.environ | {"TMPDIR": TEMPORARY},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(TIMEOUT_S):
        output, errors = await process.communicate()
    assert [True, True] == [json.loads(line)["cluster"]["found"] for line in output.splitlines()]
    assert b"" == errors


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--watch", "never"], "--watch must be a time above zero"),
        (["--url", "nowhere"], "--url must be an address like"),
        (["--url", "http://h:99999"], "--url must be an address like"),
        (["--postgres-port", "x"], "--postgres-port must be a whole number"),
    ],
)
async def test_wrong_use_is_one_line_and_exit_code_2(flags: list[str], words: str) -> None:
    """No traceback."""
    code, output = await status(*flags)
    assert (2, True, 1) == (code, words in output, len(output.splitlines()))
