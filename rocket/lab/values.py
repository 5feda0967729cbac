"""Reads what settings are given as: times, sizes, numbers, words. What cannot be read is a `ValueError`."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

_LARGEST_PORT = 65535
_MOST_REPLICAS = 30
_MOST_WORKERS = 16
"""Each has up to eleven connections to every node, and a node of a local cluster takes 200."""
_SIZES = {"B": 1, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}
_DURATION = re.compile(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+) *(ms|s|min|h)?")
_SECONDS = {"ms": 0.001, None: 1.0, "s": 1.0, "min": 60.0, "h": 3600.0}
_SIZE = re.compile(r"([0-9]{1,18}) *([A-Za-z]+)")
_RATE = re.compile(r"[0-9]{1,6}(?:\.[0-9]{0,24})?(?:e-[0-9]{1,2})?|\.[0-9]{1,24}")


class MaxLag(NamedTuple):
    """How far behind a replica may be and still serve: bytes or seconds, one of the two."""

    bytes: int | None
    seconds: float | None


def parse_port(text: str) -> int:
    """Read a TCP port; 0 stands for any free one."""
    return parse_whole(text, 0, _LARGEST_PORT)


def parse_replica_count(text: str) -> int:
    """Read how many replicas there shall be."""
    return parse_whole(text, 0, _MOST_REPLICAS)


def parse_worker_count(text: str) -> int:
    """Read how many processes of the API there shall be."""
    return parse_whole(text, 1, _MOST_WORKERS)


def parse_whole(text: str, least: int, most: int) -> int:
    """Read a whole number within bounds."""
    if not re.fullmatch(r"[0-9]{1,9}", text) or not least <= int(text) <= most:
        raise ValueError(f"must be a whole number from {least} to {most}")
    return int(text)


def parse_duration(text: str) -> float:
    """Read a time like `0.5`, `20ms`, `5s` or `2min` as seconds, more than none."""
    match = _DURATION.fullmatch(text)
    seconds = float(match[1]) * _SECONDS[match[2]] if match else 0.0
    if not 0 < seconds < math.inf:
        raise ValueError("must be a time above zero, like 0.5, 20ms, 5s or 2min")
    return seconds


def parse_wait(text: str) -> float:
    """Read a time that may be none at all."""
    try:
        return 0.0 if text == "0" else parse_duration(text)
    except ValueError as error:
        raise ValueError(f"{error}, or 0 for none") from None


def parse_rate(text: str) -> float:
    """Read a number of things a second."""
    value = float(text) if _RATE.fullmatch(text) else 0.0
    if not 0 < value <= 10_000:  # noqa: PLR2004 - beyond it, it is not the API that is measured
        raise ValueError("must be a number above 0, at most 10000")
    return value


def parse_max_lag(text: str) -> MaxLag:
    """Read a bound on lag: bytes like `16MiB`, or seconds like `5s`."""
    size = _SIZE.fullmatch(text)
    if size and size[2].upper() in _SIZES:
        return MaxLag(int(size[1]) * _SIZES[size[2].upper()], None)
    match = _DURATION.fullmatch(text)
    if match and match[2] and (seconds := parse_duration(text)):
        return MaxLag(None, seconds)
    raise ValueError("must be a number of bytes like 16MiB, or a time like 5s")


def parse_one_of(*choices: str) -> Callable[[str], str]:
    """Return a reader that takes one of these words."""

    def read(text: str) -> str:
        if text not in choices:
            raise ValueError(f"must be one of {', '.join(choices)}")
        return text

    return read


def parse_yes_or_no(text: str) -> bool:
    """Read a switch."""
    return parse_one_of("yes", "no")(text) == "yes"


def parse_text(value: str) -> str:
    """Read a text that is not empty."""
    if not value:
        raise ValueError("must not be empty")
    return value


def parse_token(value: str) -> str:
    """Read a secret that goes into a header and a cookie."""
    if not re.fullmatch(r"[A-Za-z0-9_.~-]{8,200}", value):
        raise ValueError("must be 8 to 200 of A-Z a-z 0-9 _ . ~ -")
    return value


def parse_path(value: str) -> Path:
    """Read a path."""
    if "\0" in value:
        raise ValueError("must not hold a NUL byte")
    try:
        return Path(parse_text(value)).expanduser()
    except RuntimeError as error:  # ~somebody who does not exist
        raise ValueError(f"cannot be used: {error}") from None
