"""A hint to the file system, which makes nothing, and whose refusal is no obstacle."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from rocket.cluster.placement import apart


def attributes(directory: Path) -> str:
    """Return the attributes that lsattr(1) shows; none where the file system has none."""
    said = subprocess.run(["lsattr", "-d", directory], capture_output=True, text=True, check=False).stdout  # noqa: S603, S607
    return said.partition(" ")[0]


def test_every_name_is_another_one(kept_dir: Path) -> None:
    """The file system goes by the name; nothing is made yet."""
    names = {apart(kept_dir) for _ in range(5)}
    assert 5 == len(names)
    assert {kept_dir} == {name.parent for name in names}
    assert [] == list(kept_dir.iterdir())


@pytest.mark.parametrize("parent", ["/proc/self", "/nowhere"])
def test_file_system_that_takes_no_hint_is_no_obstacle(parent: str) -> None:
    """Nor is a directory that is not there: whoever makes something in it will hear of that."""
    assert Path(parent) == apart(Path(parent)).parent


@pytest.mark.skipif(shutil.which("lsattr") is None, reason="lsattr(1) is not installed")
def test_what_is_made_there_has_nothing_to_do_with_each_other() -> None:
    """The attribute `T` says so, on a disk that has attributes."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as directory:
        parent = Path(directory)
        if "e" not in attributes(parent):  # as ext4 has it, and no other
            pytest.skip("no ext4 here")
        assert "T" not in attributes(parent)
        apart(parent)
        assert "T" in attributes(parent)
