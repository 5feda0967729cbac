"""The table of wrong variants is complete, and torture convicts one; `variants --all` convicts all of them."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, cast

import pytest

from rocket.lab.torture.faults import FAULTS
from rocket.lab.torture.schedule import plan
from tests.lab.torture.variants import VARIANTS, Variant, applied
from tests.support.program import ROOT, command

if TYPE_CHECKING:
    from pathlib import Path


def as_parameters() -> list[object]:
    """Return each variant under its name."""
    return [pytest.param(variant, id=variant.name) for variant in VARIANTS.values()]


class Recorder:
    """Records what a variant would patch."""

    def __init__(self) -> None:
        self.patched: list[tuple[object, str, object]] = []

    def setattr(self, target: object, name: str, _value: object) -> None:
        """Remember what is there."""
        self.patched.append((target, name, getattr(target, name)))


@pytest.mark.parametrize("variant", as_parameters())
def test_each_variant_names_what_convicts_it(variant: Variant) -> None:
    """Torture under conditions that can be planned, or tests that exist."""
    assert variant.rule.endswith(".")
    assert variant.conditions is not None or variant.tests
    if (conditions := variant.conditions) is not None:
        names = conditions.faults.split(",")
        assert set(names) <= FAULTS.keys()
        for seed in conditions.seeds:
            assert plan(seed, conditions.duration_s, names, conditions.replicas)
    for test in variant.tests:
        path, _, name = test.partition("::")
        module = importlib.import_module(path.removesuffix(".py").replace("/", "."))
        found: object = module
        for part in name.partition("[")[0].split("::"):
            found = getattr(found, part)
        assert callable(found)


async def test_the_tests_that_convict_are_collected(kept_dir: Path) -> None:
    """By their parameters as well, which a test may gain after it was named here."""
    tests = sorted({str(ROOT / test) for variant in VARIANTS.values() for test in variant.tests})
    code, output = await command(
        kept_dir, "-m", "pytest", "--collect-only", "-q", "-n0", f"--rootdir={ROOT}", *tests
    )
    assert code == 0, output


@pytest.mark.parametrize("variant", as_parameters())
def test_a_variant_ends_with_its_context(variant: Variant) -> None:
    """What it patches exists, and is restored afterwards."""
    recorder = Recorder()
    variant.apply(cast("pytest.MonkeyPatch", recorder))
    assert recorder.patched
    with applied(variant.name):
        assert all(getattr(target, name) is not real for target, name, real in recorder.patched)
    assert all(getattr(target, name) is real for target, name, real in recorder.patched)


async def test_torture_convicts_a_router_that_does_not_check(kept_dir: Path) -> None:
    """The real command, patched from outside, ends with the verdict; the excerpt names the rule."""
    code, output = await command(
        kept_dir, "-m", "tests.lab.torture.variants", "no-check", "--", "--calm", "0",
        "--faults", "replay-paused", "--duration", "2s", "--replicas", "2", "--seed", "1",
        "--history", str(kept_dir / "history.jsonl"),
    )  # fmt: skip

    assert 2 == code, output
    assert "read-your-writes" in output


async def test_wrong_use_is_no_verdict(kept_dir: Path) -> None:
    """An unknown name, or none at all, is exit code 64."""
    for arguments in ([], ["unknown"]):
        code, _ = await command(kept_dir, "-m", "tests.lab.torture.variants", *arguments)
        assert 64 == code
