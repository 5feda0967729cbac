"""Python that the pages of `docs/` show, run as it stands there."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

DOCS = Path(__file__).parents[2] / "docs"


async def run_example(page: str, word: str, replacements: Mapping[str, str], **names: object) -> None:
    """Run the one block of Python on a page that holds `word`, with each text of `replacements` replaced.

    It may await; `names` are what the block uses and does not define.
    """
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL)
    (text,) = [block for block in blocks if word in block]
    for old, new in replacements.items():
        assert old in text
        text = text.replace(old, new)
    code = compile(text, page, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    running = eval(code, names)  # noqa: S307 - a page of ours
    if inspect.iscoroutine(running):
        await running
