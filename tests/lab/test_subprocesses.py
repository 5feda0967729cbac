"""Child processes: what parent and child send each other arrives, and no child outlives its parent."""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from rocket.errors import RocketError
from rocket.lab import subprocesses
from rocket.lab.subprocesses import FAILED, Parent, SubprocessFailed, child_process, run_child

if TYPE_CHECKING:
    from pathlib import Path

THIS = "tests.lab.test_subprocesses"
DEADLINE_S = 20.0


async def work(parent: Parent) -> None:
    """Be a child that does what it is asked for."""
    while True:
        match await parent.receive():
            case {"do": "echo", "text": text}:
                parent.send({"text": text})
            case {"do": "count", "to": int(most)}:
                for number in range(most):
                    parent.send({"number": number})
            case {"do": "fail", "of": str(why)}:
                raise RocketError(why)
            case {"do": "crash"}:
                raise AssertionError
            case {"do": "hang"}:
                time.sleep(3600)  # noqa: ASYNC251 - so that it reads nothing
            case {"do": "start a child"}:
                grandchild = await subprocesses.Subprocess.start("grandchild", THIS)
                await grandchild.ask({"do": "echo", "text": ""}, DEADLINE_S)  # from then on it follows us
                parent.send({"pid": grandchild.pid})
            case _:
                return


def gone(pid: int) -> bool:
    """Return whether a process has ended; as an orphan, its parent may not have taken note yet."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


async def until_gone(pid: int) -> None:
    """Wait until a process has ended."""
    async with asyncio.timeout(DEADLINE_S):
        while not gone(pid):
            await asyncio.sleep(0.01)


async def test_an_answer_is_that_of_the_question() -> None:
    """Also where it is long, and where lines and quotes are in it."""
    async with child_process("child", THIS) as child:
        for text in ("", "a\nb", '"é"', "x" * 500_000):
            assert {"text": text} == await child.ask({"do": "echo", "text": text}, DEADLINE_S)


async def test_messages_arrive_in_order_until_the_child_ends_by_itself() -> None:
    """Its end is an error, which says how it ended."""
    async with child_process("child 7", THIS) as child:
        child.send({"do": "count", "to": 100})
        child.send({"do": "end"})
        assert list(range(100)) == [(await child.receive())["number"] for _ in range(100)]
        with pytest.raises(SubprocessFailed, match=r"^child 7: exit code 0$"):
            await child.receive()
        assert 0 == child.exit_code
        child.send({"do": "nothing any more"})


async def test_an_error_of_ours_is_raised_in_the_parent() -> None:
    """In the child's words, and the child ends."""
    async with child_process("child", THIS) as child:
        with pytest.raises(SubprocessFailed, match=r"^child: no room$") as caught:
            await child.ask({"do": "fail", "of": "no room"}, DEADLINE_S)
        assert "no room" == caught.value.reason
        assert "exit code 1" == await child.ended()


@pytest.mark.parametrize(
    ("message", "number", "reason"),
    [("crash", None, "exit code 1"), ("hang", signal.SIGKILL, "by signal 9, SIGKILL")],
)
async def test_any_other_end_says_how(
    tmp_path: Path, message: str, number: signal.Signals | None, reason: str
) -> None:
    """By a bug of its own, or by a signal."""
    with (tmp_path / "output").open("wb") as output:
        async with child_process("child", THIS, output=output) as child:
            child.send({"do": message})
            if number is not None:
                child.signal(number)
            with pytest.raises(SubprocessFailed, match=f"^child: {reason}$"):
                await child.receive()
    assert ("AssertionError" in (tmp_path / "output").read_text()) == (number is None)


async def test_a_child_that_does_not_answer_is_given_up_and_killed() -> None:
    """It is asked to end first, and it is reaped."""
    async with asyncio.timeout(DEADLINE_S):
        child = await subprocesses.Subprocess.start("child", THIS)
        with pytest.raises(SubprocessFailed, match=r"^child: no answer within 0.05 s$"):
            await child.ask({"do": "hang"}, 0.05)
        child.signal(signal.SIGSTOP)
        assert "by signal 15, SIGTERM" == await child.stop()
    assert gone(child.pid)


async def test_a_program_that_does_not_exist_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one that cannot be executed."""
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(SubprocessFailed, match=r"^child: .*No such file"):
        await subprocesses.Subprocess.start("child", THIS)


@pytest.mark.parametrize("grandchild_halted", [False, True])
async def test_a_child_ends_with_its_parent(grandchild_halted: bool) -> None:
    """However the parent comes to its end, and also where the child reads nothing."""
    async with child_process("child", THIS) as child:
        pid: int = (await child.ask({"do": "start a child"}, DEADLINE_S))["pid"]
        assert not gone(pid)
        if grandchild_halted:
            psutil.Process(pid).suspend()
        child.kill()
        await until_gone(pid)


async def test_a_module_without_the_protocol_gets_sigterm_when_its_parent_is_gone(tmp_path: Path) -> None:
    """Its arguments are its own."""
    script = tmp_path / "stranger.py"
    script.write_text(
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(3))\n"
        "print(__name__, sys.argv[1:], flush=True)\n"
        "time.sleep(3600)\n"
    )
    log = tmp_path / "log"
    with log.open("wb") as output, pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(tmp_path))
        child = await subprocesses.Subprocess.start(
            "stranger", "rocket.lab.subprocesses", "stranger", "--flag", output=output
        )
    async with asyncio.timeout(DEADLINE_S):
        while not log.read_text():
            await asyncio.sleep(0.01)
    assert "__main__ ['--flag']\n" == log.read_text()
    child.close()
    assert "exit code 3" == await child.ended(DEADLINE_S)


async def test_a_module_that_is_not_started_by_its_parent_says_so() -> None:
    """By hand, say."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", THIS, stdin=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE
    )
    _, errors = await process.communicate()
    assert (FAILED, b"rocket: this module is started by rocket itself\n") == (process.returncode, errors)


def main(arguments: Any = None) -> int:
    """Be the child."""
    assert arguments is None
    return run_child(work)


if __name__ == "__main__":
    sys.exit(main())
