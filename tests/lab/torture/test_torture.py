"""Torture by its command: a short run with a fixed seed, a wrong routing convicted, and the interrupted run."""

from __future__ import annotations

import re
import signal
from typing import TYPE_CHECKING

import pytest

from rocket.lab.checker.history import read_history
from tests.support.program import assert_nothing_left, command, running

if TYPE_CHECKING:
    from pathlib import Path

FAULTS = (
    "replay-paused,replica-killed,backend-killed,link-cut,primary-killed,promotion,promotion-lossy,clients-hang-up"
)


async def torture(kept_dir: Path, *flags: str) -> tuple[int, str]:
    """Run torture to its end and return its exit code and what it printed."""
    return await command(kept_dir, "-m", "rocket", "torture", *flags)


@pytest.mark.long
async def test_the_guarantee_holds_under_fire(kept_dir: Path) -> None:
    """Crashes, promotions, a lost tail and cut links: no read is stale, and nothing is left behind.

    Each fault is logged as it happens.
    """
    code, output = await torture(kept_dir, "--duration", "9", "--calm", "5", "--seed", "1", "--faults", FAULTS)

    assert 0 == code, output
    assert "HELD" in output
    seconds = [float(said) for said in re.findall(r"torture +([0-9.]+) s  ", output)]
    assert sorted(seconds) == seconds
    assert all(re.search(rf" s  {fault}\b", output) for fault in FAULTS.split(","))
    assert re.search(r" s  the last fault is healed.*: 5 s of calm", output)
    assert_nothing_left(kept_dir)


async def test_routing_at_random_is_convicted(kept_dir: Path) -> None:
    """The checker finds the stale reads, and the history is kept."""
    history = kept_dir / "history.jsonl"
    code, output = await torture(
        kept_dir, "--duration", "3", "--seed", "1", "--faults", "replay-paused", "--routing", "random",
        "--replicas", "2", "--calm", "0", "--history", str(history),
    )  # fmt: skip

    assert 2 == code, output
    assert "read-your-writes" in output
    code, output = await command(kept_dir, "-m", "rocket", "check", str(history))
    assert (2, True) == (code, "VIOLATED" in output)


async def test_an_interrupted_run_is_void(kept_dir: Path) -> None:
    """Ctrl-C shuts it down: the history until then is judged, and proves nothing."""
    history = kept_dir / "history.jsonl"
    async with running(
        kept_dir,
        "-m",
        "rocket",
        "torture",
        "--replicas",
        "2",
        "--faults",
        "link-delayed",
        "--history",
        str(history),
    ) as program:
        await program.prints("link-delayed")
        program.process.send_signal(signal.SIGINT)
        assert 3 == await program.ends(timeout_s=15)
    assert "the run was cut off" in program.output
    assert read_history(history).ops
    history.unlink()
    assert_nothing_left(kept_dir)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--faults", "sunshine"], "there is no fault sunshine"),
        (["--duration", "1s"], "need"),
        (["--duration", "soon"], "--duration must be a time"),
        (["--seed", "x"], "--seed must be a whole number"),
        (["--freshness", "stale"], "or mixed"),
        (["--routing", "lucky"], "--routing must be one of"),
        (["--history", "/nonexistent/file"], "cannot write /nonexistent/file"),
        (["--speed", "1"], "unrecognized arguments"),
        (["--processes", "17"], "--processes must be a whole number"),
        (["--faults", "writer-killed"], "for that there have to be several --processes"),
    ],
)
async def test_wrong_use_is_exit_code_64(kept_dir: Path, flags: list[str], words: str) -> None:
    """It cannot be taken for a verdict, and nothing is started."""
    code, output = await torture(kept_dir, *flags)

    assert 64 == code
    assert words in output
    assert_nothing_left(kept_dir)
