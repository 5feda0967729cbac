"""The campaign: every wrong variant is convicted, and the unpatched code acquitted under the same faults."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tests.lab.torture.variants import TAKEN, UNPATCHED, VARIANTS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.lab.torture.variants import Conditions, Variant

HELD, VIOLATED = 0, 2
PASSED, FAILED = 0, 1
"""Of pytest."""
_LONGEST_RUN_S = 90.0
_BROKEN = re.compile(r"^Rules broken: (.*)\.$", re.MULTILINE)
_FAILURE = re.compile(r"^E +(.*)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Trial:
    """One run and its result."""

    name: str
    how: str
    """The faults, or the test."""
    seconds: float
    said: str
    """The rules broken, or the first line of what failed."""
    as_wanted: bool
    runs: int = 1

    def line(self) -> str:
        """Return its line of the table."""
        verdict = "acquitted" if self.name == UNPATCHED else "convicted"
        if not self.as_wanted:
            verdict = "NOT ACQUITTED" if self.name == UNPATCHED else "ESCAPED"
        elif self.runs > 1:
            verdict += f" at run {self.runs}"
        return f"{self.name:<44} {self.seconds:5.1f} s  {verdict:<20} {self.how}  {self.said}".rstrip()


def _run(arguments: Sequence[str]) -> tuple[int, str]:
    """Run `tests.lab.torture.variants` and return its exit code and all that it printed."""
    try:
        done = subprocess.run(
            [sys.executable, "-m", "tests.lab.torture.variants", *arguments],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, timeout=_LONGEST_RUN_S,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return -1, f"Rules broken: none within {_LONGEST_RUN_S:g} s."
    return done.returncode, done.stdout


def torture(name: str, conditions: Conditions, seeds: Sequence[int]) -> Trial:
    """Torture a variant until a run convicts it, with one seed after the other; or the unpatched code, once."""
    began = time.monotonic()
    said, as_wanted, runs = "", False, 0
    with tempfile.TemporaryDirectory(prefix="rocket-variants-") as directory:
        for seed in seeds:
            runs += 1
            history = Path(directory) / f"{seed}.jsonl"
            code, output = _run([
                name, "--", *conditions.flags(seed), "--history", str(history),
            ])  # fmt: skip
            broken = _BROKEN.search(output)
            said = broken[1] if broken else ""
            as_wanted = code == (HELD if name == UNPATCHED else VIOLATED)
            if name == UNPATCHED and not as_wanted:
                print(output, flush=True)
            if as_wanted:
                break
    return Trial(name, conditions.faults, time.monotonic() - began, said, as_wanted, runs)


def examine(name: str, tests: Sequence[str]) -> Trial:
    """Run tests on a variant, where one failure is enough, or on the unpatched code."""
    began = time.monotonic()
    code, output = _run([name, "--pytest", *tests])
    as_wanted = code == (PASSED if name == UNPATCHED else FAILED)
    if name == UNPATCHED and not as_wanted:
        print(output, flush=True)
    failure = _FAILURE.search(output)
    how = tests[0] if len(tests) == 1 else f"{len(tests)} tests"
    return Trial(name, how, time.monotonic() - began, failure[1] if failure else "", as_wanted)


def convict_all() -> int:
    """Try every variant and print the table; return 0 if all were convicted and the unpatched code was not."""
    began = time.monotonic()
    trials: list[Trial] = []

    def enter(trial: Trial) -> None:
        trials.append(trial)
        print(trial.line(), flush=True)

    for conditions in dict.fromkeys((TAKEN, *(variant.conditions for variant in VARIANTS.values()))):
        if conditions is not None:
            enter(torture(UNPATCHED, conditions, conditions.seeds[:1]))
    directed = [variant for variant in VARIANTS.values() if variant.conditions is None]
    enter(examine(UNPATCHED, sorted({_first(variant) for variant in directed})))
    for variant in VARIANTS.values():
        if variant.conditions is not None:
            enter(torture(variant.name, variant.conditions, variant.conditions.seeds))
        else:
            enter(examine(variant.name, [_first(variant)]))
    wrong = [trial for trial in trials if not trial.as_wanted]
    tortured = [trial for trial in trials if trial.name != UNPATCHED and VARIANTS[trial.name].conditions]
    at_once = sum(trial.as_wanted and trial.runs == 1 for trial in tortured)
    print(
        f"\n{len(VARIANTS)} variants; {len(wrong)} trials went wrong; torture convicted {at_once} of "
        f"{len(tortured)} with the first seed; {time.monotonic() - began:.0f} s"
    )
    return 1 if wrong else 0


def _first(variant: Variant) -> str:
    return variant.tests[0]
