"""Schemathesis against the API on a real cluster: `python -m tests.lab.fuzz.openapi [--cases N] [--seed N]`.

It makes requests of all kinds, right and wrong, from what `/openapi.json` says, and holds every answer against it.
Exit code 0: no answer was a failure, and there were enough of them.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import sys
import tempfile
from pathlib import Path

import aiohttp

from rocket.lab.shutdown import run
from tests.lab.fuzz.testbed import errors_in, running_api

CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
    "missing_required_header",
    "unsupported_method",
    "allow_header_conformance",
    "ignored_auth",
    "use_after_free",
    "ensure_resource_availability",
)
EMAIL = "fuzz@example.com"
LONGEST_S = 300.0
FEWEST = 5000
HERE = Path(__file__).parents[3]


async def schemathesis(url: str, cases: int, seed: int | None, directory: str) -> tuple[int, str]:
    """Run it in a directory, where it keeps what it finds; return its exit code and what it said."""
    flags = ["--checks", ",".join(CHECKS), "--max-examples", str(cases), "--header", f"Authorization: {EMAIL}"]
    flags += ["--request-timeout", "10", "--continue-on-failure", "--no-color"]
    flags += ["--seed", str(seed)] if seed is not None else []
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "schemathesis.cli", "run", f"{url}/openapi.json", *flags,
        stdout=asyncio.subprocess.PIPE, cwd=directory,
        env={**os.environ, "PYTHONPATH": str(HERE), "SCHEMATHESIS_HOOKS": "tests.lab.fuzz.hooks"},
    )  # fmt: skip
    assert process.stdout is not None
    said = ""
    try:
        async with asyncio.timeout(LONGEST_S):
            async for line in process.stdout:
                said += line.decode(errors="replace")
                print(line.decode(errors="replace"), end="", flush=True)
            await process.wait()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return process.returncode or 0, said


async def fuzz(cases: int, seed: int | None) -> int:
    """Run it on a cluster of its own; return an exit code."""
    code, said, errors = 1, "", ["it did not come to its end"]  # if it is interrupted
    async with running_api() as (server, log):
        async with aiohttp.ClientSession(server.url) as session:
            (await session.post("/users", data={"email": EMAIL})).raise_for_status()
        with tempfile.TemporaryDirectory(prefix="rocket-fuzz-") as directory:
            code, said = await schemathesis(server.url, cases, seed, directory)
        errors = errors_in(log)
    made = sum(int(count) for count in re.findall(r"^  ([0-9]+) generated", said, re.MULTILINE))
    print(*errors[:20], sep="\n")
    print(f"{made} cases, of which {FEWEST} have to be; {len(errors)} errors in the API's log")
    return int(bool(code or errors or made < FEWEST))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.lab.fuzz.openapi", description=__doc__)
    parser.add_argument("--cases", type=int, default=450, help="for each operation in each phase, at the most")
    parser.add_argument("--seed", type=int)
    given = parser.parse_args()
    sys.exit(run(fuzz(given.cases, given.seed)))
