"""Ports are reserved across processes, and directories are placed where the file system takes a hint."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from rocket.cluster.directories import PortReservations, RunDirectory, clear_up_dead_runs, port_is_free
from rocket.cluster.errors import PortInUse

if TYPE_CHECKING:
    from collections.abc import Iterator

# Not those that clusters of other tests take: they would be in the way.
RANGE = range(18000, 18060)

RESERVE = """
import json, sys
from rocket.cluster.directories import PortReservations

with PortReservations(range(18000, 18060)) as reservations:
    sys.stdin.readline()
    print(json.dumps([reservations.reserve_any() for _ in range(int(sys.argv[1]))]), flush=True)
    sys.stdin.readline()
"""


@contextlib.contextmanager
def reserving(count: int) -> Iterator[subprocess.Popen[str]]:
    """Run a program that reserves ports when it gets a line, and gives them back when it gets another one."""
    with subprocess.Popen(  # noqa: S603
        [sys.executable, "-c", RESERVE, str(count)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as program:
        try:
            yield program
        finally:
            program.kill()


def tell(program: subprocess.Popen[str]) -> None:
    """Send a line."""
    assert program.stdin is not None
    program.stdin.write("go on\n")
    program.stdin.flush()


def ports_of(program: subprocess.Popen[str]) -> set[int]:
    """Return the ports that a program has reserved."""
    assert program.stdout is not None
    return set(json.loads(program.stdout.readline()))


def test_programs_that_reserve_at_once_never_get_the_same_port() -> None:
    """Two take most of a range at the same time; a third gets one of what is left."""
    with reserving(25) as one, reserving(25) as other, PortReservations(RANGE) as reservations:
        for program in (one, other):
            tell(program)
        first, second = ports_of(one), ports_of(other)
        assert (25, 25, set()) == (len(first), len(second), first & second)
        assert reservations.reserve_any() in set(RANGE) - first - second
        taken = first.pop()
        with pytest.raises(PortInUse, match=f"port {taken} is in use"):
            reservations.reserve(taken)


@pytest.mark.parametrize("killed", [True, False])
def test_port_is_given_back(*, killed: bool) -> None:
    """Also by a program that was killed."""
    with reserving(1) as program, PortReservations(RANGE) as reservations:
        tell(program)
        [port] = ports_of(program)
        with pytest.raises(PortInUse):
            reservations.reserve(port)
        if killed:
            program.kill()
        else:
            tell(program)
        program.wait(10)
        reservations.reserve(port)


def test_reservations_end_with_their_context() -> None:
    """One program may have several, and none has a port twice."""
    with PortReservations(RANGE) as one:
        ports = {one.reserve_any() for _ in range(5)}
        assert 5 == len(ports)
        with PortReservations(sorted(ports)) as other, pytest.raises(PortInUse, match="no port from"):
            other.reserve_any()
    with PortReservations(sorted(ports)) as other:
        assert ports == {other.reserve_any() for _ in ports}


def test_port_of_another_program_is_not_reserved() -> None:
    """It holds no reservation, but the port."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert not port_is_free(port)
        with PortReservations([port]) as reservations:
            with pytest.raises(PortInUse, match="no port from"):
                reservations.reserve_any()
            with pytest.raises(PortInUse, match=f"port {port} is in use by process {os.getpid()}"):
                reservations.reserve(port)


def test_no_port_lies_beyond_the_largest() -> None:
    """Sixteen bits."""
    with PortReservations() as reservations, pytest.raises(PortInUse, match="65535 is the largest"):
        reservations.reserve(65536)


def test_reservations_leave_no_files() -> None:
    """Nor those of a program that was killed, once another one clears up."""
    locks = Path("/tmp") / f"rocket-ports-{os.getuid()}"  # noqa: S108 - where they are
    with reserving(1) as program:
        tell(program)
        [port] = ports_of(program)
        assert (locks / str(port)).exists()
        clear_up_dead_runs()
        assert (locks / str(port)).exists()
        program.kill()
        program.wait(10)
        assert (locks / str(port)).exists()
        clear_up_dead_runs()
        assert not (locks / str(port)).exists()


def attributes(directory: Path) -> str:
    """Return the attributes that lsattr(1) shows; none where the file system has none."""
    output = subprocess.run(["lsattr", "-d", directory], capture_output=True, text=True, check=False).stdout  # noqa: S603, S607
    return output.partition(" ")[0]


@pytest.fixture
def run_directory(kept_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RunDirectory]:
    """The directory of a run."""
    monkeypatch.setattr("tempfile.tempdir", str(kept_dir))
    run = RunDirectory.create(None)
    yield run
    run.remove()


def test_every_data_directory_has_a_name_of_its_own(run_directory: RunDirectory) -> None:
    """The file system places it by its name; nothing is made yet."""
    names = {run_directory.data_dir() for _ in range(5)}
    assert 5 == len(names)
    assert {run_directory.scratch} == {name.parent for name in names}
    assert [] == list(run_directory.scratch.iterdir())


def test_file_system_that_takes_no_hint_is_no_obstacle(run_directory: RunDirectory) -> None:
    """Nor is a directory that does not exist: making something in it fails later."""
    run_directory.scratch.rmdir()
    assert run_directory.scratch == run_directory.data_dir().parent


@pytest.mark.skipif(shutil.which("lsattr") is None, reason="lsattr(1) is not installed")
def test_data_directories_are_placed_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """The attribute `T` says so, on a disk that has attributes."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as directory:
        if "e" not in attributes(Path(directory)):  # as ext4 has it, and no other
            pytest.skip("no ext4 here")
        monkeypatch.setattr("tempfile.tempdir", directory)
        run = RunDirectory.create(None)
        assert "T" not in attributes(run.scratch)
        run.data_dir()
        assert "T" in attributes(run.scratch)
        run.remove()
