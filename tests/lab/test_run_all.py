"""The program as its user runs it: in a process of its own, from the first line to the last."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import sys
from pathlib import Path

import pytest

from rocket.cluster.process import STOP_LADDER
from tests.support.program import (
    FREE_PORTS,
    READY_S,
    ROOT,
    assert_nothing_left,
    command,
    postmaster,
    run_all,
    running,
    servers,
)


async def test_run_shows_reads_from_several_replicas_and_ends_clean(kept_dir: Path) -> None:
    """The main job: traffic, a trace, no stale read, exit 0, nothing left."""
    async with run_all(kept_dir, "--simulator-rate", "60", "--duration", "3") as program:
        code = await program.ends()
    nodes = set(re.findall(r"Reading ride \d+ from server '(\w+)'", program.output))
    assert {"replica0", "replica1"} <= nodes
    assert " 0 stale reads" in program.output
    assert (0, "") == (code, program.errors)
    assert_nothing_left(kept_dir)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
async def test_signal_ends_it_in_order(kept_dir: Path, number: signal.Signals) -> None:
    """Ctrl-C, a service manager's stop and a terminal that is closed leave as little."""
    async with run_all(kept_dir) as program:
        await program.prints("Reading ride")
        program.process.send_signal(number)
        assert 0 == await program.ends(timeout_s=5)
    assert f"{number.name}: shutting down" in program.output
    assert_nothing_left(kept_dir)


async def test_a_terminal_that_is_closed_ends_a_cluster_in_order(kept_dir: Path) -> None:
    """A terminal sends it more than once, and does not mean to force anything."""
    async with running(kept_dir, str(ROOT / "cluster.py"), "up", "--replicas", "1", "--postgres-port", "0") as up:
        await up.prints("Ctrl-C ends it")
        for _ in range(3):
            up.process.send_signal(signal.SIGHUP)
        assert 0 == await up.ends(timeout_s=5)
    assert "SIGHUP: shutting down" in up.output
    assert "forc" not in up.output
    assert_nothing_left(kept_dir)


async def test_second_signal_forces_it(kept_dir: Path) -> None:
    """No server is waited for any longer: not one that cannot end, and not the primary, whose turn is after it."""
    data_dir = kept_dir / "data"
    async with run_all(kept_dir, "--no-simulator", "--data-dir", str(data_dir)) as program:
        await program.prints("ready after")
        children = postmaster(kept_dir, "replica0").children()
        checkpointer = next(each for each in children if "checkpointer" in " ".join(each.cmdline()))
        checkpointer.suspend()  # without it no shutdown comes to its end
        program.process.send_signal(signal.SIGINT)
        await program.prints("shutting down")
        program.process.send_signal(signal.SIGINT)
        await program.prints("forcing shutdown")
        stopped_s = float((await program.prints(r"servers stopped in ([\d.]+) s"))[1])
        await program.ends()
    patience_s = sum(timeout_s for number, timeout_s in STOP_LADDER if number != signal.SIGKILL)
    assert stopped_s < patience_s
    (log,) = data_dir.glob("**/primary/*.log")
    assert "received immediate shutdown request" in log.read_text()
    assert "received fast shutdown request" not in log.read_text()
    assert [] == servers(kept_dir)


async def test_end_of_its_reader_ends_it(kept_dir: Path) -> None:
    """As in `run-all | head`: no flood of errors, and nothing left."""
    process = await asyncio.create_subprocess_shell(
        f"{sys.executable} -m rocket run-all --replicas 1 {' '.join(FREE_PORTS)} | head -n 8",
        cwd=ROOT,
        env=os.environ | {"TMPDIR": str(kept_dir), "PYTHONUNBUFFERED": "1"},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(READY_S):
        output, errors = await process.communicate()
    assert 8 == len(output.splitlines())
    assert b"" == errors
    async with asyncio.timeout(10):
        while servers(kept_dir) or any(kept_dir.iterdir()):
            await asyncio.sleep(0.02)


async def test_signal_while_starting_leaves_nothing(kept_dir: Path) -> None:
    """There may be no server yet to stop."""
    async with run_all(kept_dir) as program:
        async with asyncio.timeout(READY_S):
            while not list(kept_dir.glob("*/tmp/data-*/primary/data.new/PG_VERSION")):
                await asyncio.sleep(0.005)
        program.process.send_signal(signal.SIGINT)
        assert 0 == await program.ends(timeout_s=5)
    assert_nothing_left(kept_dir)


async def test_killed_servers_come_back_while_it_runs(kept_dir: Path) -> None:
    """SIGKILL to a replica and to the primary: reads and writes go on, none is stale, the end is clean."""
    async with run_all(kept_dir, "--simulator-rate", "40") as program:
        await program.prints("Reading ride .* 'replica")
        for name in ("replica0", "primary"):
            postmaster(kept_dir, name).kill()
            await program.prints(f"{name} is back after", timeout_s=15)
            await program.prints("Reading ride .* 'replica", timeout_s=15)
        program.process.send_signal(signal.SIGINT)
        assert 0 == await program.ends(timeout_s=5)
    assert " 0 stale reads" in program.output
    assert_nothing_left(kept_dir)


async def test_failure_of_a_part_unwinds_it_with_exit_code_1(kept_dir: Path) -> None:
    """A server that can't be kept alive is not part of the game."""
    async with run_all(kept_dir, "--no-simulator") as program:
        await program.prints("ready after")
        server = postmaster(kept_dir, "primary")
        (Path(server.cwd()) / "global" / "pg_control").unlink()
        server.kill()
        assert 1 == await program.ends()
    assert "primary keeps dying" in program.errors
    assert_nothing_left(kept_dir)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process of its parent's death")
async def test_servers_follow_a_killed_program_and_the_next_start_clears_up(kept_dir: Path) -> None:
    """After SIGKILL; a halted one, which cannot follow, is ended by the next start."""
    async with run_all(kept_dir, "--no-simulator") as program:
        await program.prints("ready after")
        frozen = postmaster(kept_dir, "replica1")
        frozen.suspend()
        program.process.kill()
        await program.ends()
    async with asyncio.timeout(10):
        while any(process.pid != frozen.pid and process.ppid() != frozen.pid for process in servers(kept_dir)):
            await asyncio.sleep(0.02)
    async with run_all(kept_dir, "--duration", "0.1", "--no-simulator") as program:
        assert 0 == await program.ends()
    assert "the run of process" in program.output
    assert str(frozen.pid) in program.output
    assert_nothing_left(kept_dir)


async def test_parts_run_in_programs_of_their_own(kept_dir: Path) -> None:
    """A cluster by itself, the rest beside it, and commands from a third side."""
    cluster_py = str(ROOT / "cluster.py")
    async with running(kept_dir, cluster_py, "up", "--replicas", "1", "--postgres-port", "0") as cluster:
        await cluster.prints("psql -h")
        code, output = await command(
            kept_dir, "-m", "rocket", "run-all", "--no-cluster", "--api-port", "0",
            "--duration", "2", "--simulator-rate", "30",
        )  # fmt: skip
        assert 0 == code, output
        assert "from server 'replica0'" in output
        code, output = await command(kept_dir, cluster_py, "status")
        assert 0 == code
        assert re.search(r"replica0 +replica +up .* streaming", output)
        code, output = await command(kept_dir, cluster_py, "pause", "primary")
        assert 1 == code
        assert "only a replica replays" in output
        code, _ = await command(kept_dir, cluster_py, "down")
        assert 0 == code
        assert 0 == await cluster.ends(timeout_s=5)
    assert_nothing_left(kept_dir)
    code, output = await command(kept_dir, cluster_py, "status")
    assert (2, True) == (code, "no cluster" in output)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--replicas", "many"], "--replicas must be a whole number"),
        (["--postgres-bin", "/nonexistent"], "no Postgres server programs in /nonexistent"),
        (["--data-dir", "/proc/rocket"], "cannot use /proc/rocket as data directory"),
        (["--data-dir", "/"], "/ holds something that rocket did not make"),
        (["--host", "192.0.2.1"], "cannot listen on 192.0.2.1"),
        (["--no-cluster"], "no cluster of this user is running"),
        (["--no-cluster", "--no-api", "--no-observer", "--no-simulator"], "nothing left to run"),
        (["--nodes-file", "x", "--primary", "postgresql://x"], "--primary and --nodes-file both name the nodes"),
        (["--nodes-file", "x", "--replica", "r=postgresql://x"], "--replica and --nodes-file both name"),
        (["--max-wait=-1"], "or 0 for none, not '-1'"),
    ],
)
async def test_wrong_use_is_one_line_and_exit_code_2(kept_dir: Path, flags: list[str], words: str) -> None:
    """No traceback, and nothing made."""
    code, output = await command(kept_dir, "-m", "rocket", "run-all", *FREE_PORTS, *flags)
    assert 2 == code
    assert words in output
    assert 1 == len(output.splitlines())
    assert_nothing_left(kept_dir)


@pytest.mark.parametrize(
    ("program", "used"), [(("-m", "rocket", "run-all"), 2), (("-m", "rocket", "torture"), 64)]
)
async def test_a_flag_that_a_command_does_not_know_brings_that_commands_usage(
    kept_dir: Path, program: tuple[str, ...], used: int
) -> None:
    """Rather than that of the program, which has no flags."""
    code, output = await command(kept_dir, *program, "--replica-count", "3")
    assert used == code
    assert output.startswith(f"usage: python -m rocket {program[-1]} [-h]")
    assert output.endswith(f"rocket {program[-1]}: error: unrecognized arguments: --replica-count 3\n")


@pytest.mark.parametrize("program", [("-m", "rocket", "run-all"), ("cluster.py",), ("-m", "rocket", "cluster")])
async def test_the_help_names_exit_codes(kept_dir: Path, program: tuple[str, ...]) -> None:
    """And run-all's an example of how it is called."""
    code, output = await command(kept_dir, *program, "--help")
    assert 0 == code
    assert re.search(r"exit codes: 0 .*; 1 .*; 2 ", " ".join(output.split()), re.IGNORECASE)
    assert ("example:" in output) == (program[-1] == "run-all")


async def test_a_cluster_of_one_server_is_logged_as_one(kept_dir: Path) -> None:
    """No step that it does not take, and no plural."""
    flags = ("--replicas", "0", "--duration", "0.1", "--no-simulator")
    code, output = await command(kept_dir, "-m", "rocket", "run-all", *FREE_PORTS, *flags)
    assert 0 == code
    assert re.search(r"1 server up .*1 server stopped", output, re.DOTALL)
    assert "replica" not in output


@pytest.mark.parametrize(
    ("flags", "warned"),
    [
        (("--lease", "900ms"), ["--lease 0.9s"]),
        (("--observer-interval", "3s"), ["--lease 5s, --primary-lease 5s"]),
        (("--lease", "1s"), []),
    ],
)
async def test_a_lease_shorter_than_two_observer_intervals_brings_a_warning(
    kept_dir: Path, flags: tuple[str, ...], warned: list[str]
) -> None:
    """In one line, at the start: it works, after a fashion."""
    rest = ("--replicas", "0", "--duration", "0.1", "--no-simulator")
    code, output = await command(kept_dir, "-m", "rocket", "run-all", *FREE_PORTS, *rest, *flags)
    assert 0 == code
    assert warned == re.findall(r"WARNING: (--.*): shorter than two observer intervals", output)


@pytest.mark.parametrize("flag", ["--api-port", "--postgres-port"])
async def test_port_in_use_is_one_line_and_exit_code_2(kept_dir: Path, flag: str) -> None:
    """Said before any server is started, with the process that has it."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        code, output = await command(kept_dir, "-m", "rocket", "run-all", *FREE_PORTS, flag, port)
    assert 2 == code
    assert 1 == len(output.splitlines())
    assert port in output
    assert ("--api-port 0 takes any free one" in output) == (flag == "--api-port")
    assert f"process {os.getpid()}" in output
    assert_nothing_left(kept_dir)
