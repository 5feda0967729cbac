"""The rules of the house: imports, and words that stay out; `python -m tests.support.house PATH` prints those."""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

ROOT = Path(__file__).parents[2]

# --- imports ---


def module_name(path: Path) -> str:
    """Return the dotted name of a module below the root of the checkout."""
    parts = path.resolve().relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(source: str, package: str) -> Iterator[str]:
    """Return the dotted name of each import: at the top, in functions, for type checkers, by text.

    `from a import b` counts as `a.b`, whether that is a module or a name in one; a relative import is resolved
    against `package`.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", None)
            if called in {"import_module", "__import__"}:
                match node.args:
                    case [ast.Constant(value=str(name)), *_]:
                        yield name
                    case _:
                        yield "a module that is known only as the program runs"


def is_within(name: str, place: str) -> bool:
    """Return whether a dotted name is a place or lies below it."""
    return name == place or name.startswith(f"{place}.")


def circles(sources: Mapping[str, str]) -> list[list[str]]:
    """Return the circles of imports among modules, given by name; each as its modules in order of name."""
    edges: dict[str, set[str]] = {}
    for module, source in sources.items():
        package = module if any(is_within(other, f"{module}.") for other in sources) else module.rpartition(".")[0]
        edges[module] = set()
        for name in imported(source, package):
            target = name if name in sources else name.rpartition(".")[0]
            if target in sources and target != module:
                edges[module].add(target)
    reach = {module: _reachable(module, edges) for module in edges}
    found = {
        tuple(sorted(other for other in reach[module] if module in reach[other]))
        for module in edges
        if module in reach[module]
    }
    return [list(circle) for circle in sorted(found)]


def _reachable(start: str, edges: Mapping[str, Iterable[str]]) -> set[str]:
    seen: set[str] = set()
    waiting = list(edges[start])
    while waiting:
        module = waiting.pop()
        if module not in seen:
            seen.add(module)
            waiting.extend(edges[module])
    return seen


# --- words ---

NAMES_LEFT_BEHIND = {
    "reign": "epoch", "reigns": "epoch", "reigning": "current epoch", "office": "current primary",
    "standing": "resolved", "told": "record", "tale": "record", "witness": "recorder", "manners": "client_gone",
    "crowd": "in_flight", "doors": "access", "door": "access", "scene": "scenario_context", "rider": "api_client",
    "leash": "parent_watch", "owed": "expected", "debt": "expectation", "debts": "expectations",
    "lives": "incarnations", "betray": "is_shared_address", "admittance": "connect errors", "guarded": "reads",
    "unguarded": "comparison", "unfloored": "comparison", "making": "datadir", "mending": "rejoin",
    "detours": "upstream_overrides", "detour": "upstream_override", "hurry": "force", "hurried": "forced",
    "incidents": "fault intervals", "contender": "variant", "contenders": "variants", "sufficiency": "coverage",
    "looking": "sampling", "looks": "samples", "saw": "report_read_bound", "leaders": "patroni_faults",
    "unwinding": "shutdown_stack", "ending": "shutdown", "journal": "event_log",
}  # fmt: skip
"""Parts of names that the house once had, and what it says instead."""

_PROSE = (
    r"who(?:m|se)?ever", r"nobody(?:'s)?", r"somebody(?:'s)?", r"that one", r"so many", r"tells? whether",
    r"(?<!no )such(?! as\b)", r"reigns?", r"reigning", r"in office", r"into office", r"out of office",
    r"witness(?:es)?", r"told of", r"manners", r"crowds?", r"riders?", r"leash(?:es)?", r"owed", r"debts?",
    r"hurry", r"hurries", r"hurried", r"detours?", r"betrays?", r"sufficiency", r"contenders?", r"admittance",
    r"turned away", r"in words", r"comes? on top", r"has a say",
)  # fmt: skip
PROSE_LEFT_BEHIND = re.compile(rf"\b(?:{'|'.join(_PROSE)})\b", re.IGNORECASE)
"""Phrases that stay out of docstrings, comments, log lines, help and pages."""

ACCOUNT = '"nobody"'
"""A name that is not ours to choose: Unix' account without privileges."""


class Word(NamedTuple):
    """A word that should not be there."""

    path: Path
    line: int
    word: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.word}"


def words_left_behind(path: Path, text: str) -> list[Word]:
    """Return the words of the list in one file: in names and prose of Python, and in the lines of other files."""
    if path.suffix != ".py":
        return [
            Word(path, number, match[0])
            for number, line in enumerate(text.splitlines(), 1)
            for match in PROSE_LEFT_BEHIND.finditer(line)
        ]
    found = []
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.NAME:
            found += [
                Word(path, token.start[0], f"{token.string} ({NAMES_LEFT_BEHIND[part]})")
                for part in _parts_of(token.string)
                if part in NAMES_LEFT_BEHIND
            ]
        elif token.string == ACCOUNT:
            continue
        elif token.type in {tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", -1)}:
            for match in PROSE_LEFT_BEHIND.finditer(token.string):
                line = token.start[0] + token.string[: match.start()].count("\n")
                found.append(Word(path, line, match[0]))
    return found


def _parts_of(name: str) -> list[str]:
    """Split a name at underscores and capitals."""
    return [part.lower() for part in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)]


def main(arguments: list[str]) -> int:
    """Print the words of the list in files and folders; return 1 if there are any."""
    given = [Path(argument) for argument in arguments]
    files = [
        file for path in given for file in (sorted(path.rglob("*")) if path.is_dir() else [path])
        if file.suffix in {".py", ".md", ".sql", ".html", ".js"}
    ]  # fmt: skip
    found = [word for file in files for word in words_left_behind(file, file.read_text(encoding="utf-8"))]
    print(*found, sep="\n")
    print(f"{len(found)} words in {len({word.path for word in found})} files")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
