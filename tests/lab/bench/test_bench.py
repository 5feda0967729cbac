"""The benchmark as its user runs it: a short run, one on a running cluster, and every exit."""

from __future__ import annotations

import asyncio
import json
import signal
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from tests.support.program import ROOT, assert_nothing_left, command, running

if TYPE_CHECKING:
    from pathlib import Path

CLUSTER = str(ROOT / "cluster.py")


async def bench(kept_dir: Path, *flags: str) -> tuple[int, str]:
    """Run the benchmark to its end; return its exit code and output."""
    return await command(kept_dir, "-m", "rocket", "bench", *flags)


def by_variant(data: dict[str, Any], measure: str, figure: str) -> dict[str, float]:
    """Return a figure of the last round by variant."""
    return {
        row["variant"]: row["figures"][figure]
        for row in data["rows"]
        if row["measure"] == measure and figure in row["figures"]
    }


@pytest.mark.long
async def test_a_short_run_shows_what_the_guarantee_costs(kept_dir: Path) -> None:
    """Which nodes answer, what that costs the primary, and that no read is stale; as text and as JSON."""
    file = kept_dir / "bench.json"
    code, output = await bench(
        kept_dir, "--rounds", "1", "--seconds", "0.2", "--replicas", "1", "--measures", "queries,read-after-write",
        "--only", "article,never-stale,never-stale-no-token", "--json", str(file),
    )  # fmt: skip
    assert 0 == code, output
    data = json.loads(file.read_text())
    file.unlink()

    queries = by_variant(data, "queries", "primary_queries_per_read")
    assert queries["never-stale"] == pytest.approx(0, abs=0.1)
    assert 0 < queries["never-stale-no-token"] < 0.7  # a question serves several
    assert round(queries["article"], 1) >= 2
    shares = by_variant(data, "read-after-write", "replica_share_percent")
    assert shares["never-stale"] > shares["article"]
    for measure in ("queries", "read-after-write"):
        assert 0 == sum(by_variant(data, measure, "failed_requests").values())
    assert min(by_variant(data, "read-after-write", "p50_ms").values()) > 0
    assert (0, True) == (data["stale_reads"], data["about"]["finished"])
    assert "primary queries per read, article" in output
    assert_nothing_left(kept_dir)


async def test_global_reads_are_measured_beside_those_of_sessions(kept_dir: Path) -> None:
    """By the library alone: replicas serve them, a question serves many, and none is stale."""
    file = kept_dir / "bench.json"
    measures = ("global-reads", "global-reads-while-writing", "global-reads-alone")
    code, output = await bench(
        kept_dir, "--rounds", "1", "--seconds", "0.3", "--replicas", "2", "--measures", ",".join(measures),
        "--only", "any,never-stale,global", "--json", str(file),
    )  # fmt: skip
    assert 0 == code, output
    data = json.loads(file.read_text())
    file.unlink()

    for measure in measures:
        statements = by_variant(data, measure, "primary_statements_per_read")
        assert (0, 0) == (statements["any"], statements["never-stale"])
        assert 0 < statements["global"] < (1.1 if measure == "global-reads-alone" else 0.5)
        assert by_variant(data, measure, "replica_share_percent")["global"] > 50
        assert {"global": 0} == by_variant(data, measure, "stale_reads")
        assert {"any", "never-stale"} == by_variant(data, measure, "missed_reads").keys()
        assert min(by_variant(data, measure, "reads_per_s").values()) > 0
    alone = by_variant(data, "global-reads-alone", "p50_statements")
    assert 0 < alone["never-stale"] < alone["global"]
    assert "global reads while others write, by replicas" in output
    assert_nothing_left(kept_dir)


async def test_an_interrupted_run_resumes_the_replicas_of_a_running_cluster(kept_dir: Path) -> None:
    """Also while the benchmark has paused their replay."""
    async with running(kept_dir, CLUSTER, "up", "--replicas", "1", "--postgres-port", "0") as cluster:
        await cluster.prints("psql -h")
        async with running(
            kept_dir, "-m", "rocket", "bench", "--attach", "--seconds", "30",
            "--measures", "read-after-write-paused",
        ) as program:  # fmt: skip
            await cluster.prints("pause replica0")
            program.process.send_signal(signal.SIGINT)
            assert 1 == await program.ends(timeout_s=15)
        assert "Traceback" not in program.output
        code, output = await command(kept_dir, CLUSTER, "status", "--json")
        assert 0 == code
        assert [False, False] == [node["paused"] for node in json.loads(output)]
        assert [] == list(kept_dir.glob("*/bench-*"))
        cluster.process.send_signal(signal.SIGINT)
        assert 0 == await cluster.ends()
    assert_nothing_left(kept_dir)


async def test_no_process_outlives_it(kept_dir: Path) -> None:
    """Not even if it is killed, and cannot stop its children."""
    async with running(kept_dir, "-m", "rocket", "bench", "--soak", "10000", "--replicas", "1") as program:
        await program.prints("1000 of 10000 reads")
        parent = psutil.Process(program.process.pid)
        children = parent.children(recursive=True)
        program.process.kill()
        await program.process.wait()  # not for the end of its output, which children still hold
        gone, left = await asyncio.to_thread(psutil.wait_procs, children, timeout=15)
        for child in left:
            child.kill()
        assert (len(children), []) == (len(gone), left)
    code, _ = await command(
        kept_dir, CLUSTER, "up", "--replicas", "0", "--postgres-port", "0", "--duration", "0.1"
    )
    assert 0 == code
    assert_nothing_left(kept_dir)


async def test_many_replicas_cost_a_decision_nothing(kept_dir: Path) -> None:
    """Not timed here; it runs to its end, and measures every figure."""
    file = kept_dir / "scale.json"
    code, output = await bench(kept_dir, "--scale", "--json", str(file))

    assert 0 == code, output
    data = json.loads(file.read_text())
    assert {"5 replicas", "50 replicas", "500 replicas", "5000 replicas"} == set(
        by_variant(data, "scale", "observe_per_replica_us")
    )
    assert 2 == len(data["goals"])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--only", "pgpool"], "--only has no 'pgpool'"),
        (["--only", "bare", "--measures", "writes"], "no variant of --only takes part"),
        (["--rounds", "0"], "--rounds must be a whole number"),
        (["--seconds", "never"], "--seconds must be a time"),
        (["--json", "/nonexistent/file"], "cannot write /nonexistent/file"),
        (["--attach"], "no cluster of this user is running"),
        (["--postgres-port", "5433"], "give --attach too"),
        (["--against", "/nonexistent/python"], "--against: /nonexistent/python is not a program"),
        (["--scale", "--soak", "100"], "--scale needs no cluster"),
    ],
)
async def test_wrong_use_is_one_line_and_exit_code_2(kept_dir: Path, flags: list[str], words: str) -> None:
    """No traceback, and no files left."""
    code, output = await bench(kept_dir, *flags)

    assert 2 == code
    assert words in output
    assert 1 == len(output.splitlines())
    assert_nothing_left(kept_dir)
