"""Where the nodes of a cluster that is already there are: names and DSNs, as people write them.

A DSN may hold a password, so no error here repeats what it was given.
"""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING
from urllib.parse import SplitResult, parse_qsl, urlsplit

from rocket.errors import InvalidSetting

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

PRIMARY = "primary"
"""The name of the node that is given as the primary; it keeps it, whatever becomes of its role."""

NODE_NAME = re.compile("[A-Za-z0-9_.-]{1,63}")
"""What a session token can hold."""
NODE_NAME_RULE = "1 to 63 of A-Z a-z 0-9 _ . -"
_SCHEMES = {"postgresql", "postgres"}
_LIKE = "a DSN like postgresql://user@host:5432/database"


def parse_dsn(text: str) -> str:
    """Read a DSN; raise `ValueError` for what cannot be one."""
    try:
        parts = urlsplit(text)
        usable = parts.scheme in _SCHEMES and "://" in text and _is_whole(parts)
    except ValueError:  # whose words may be a part of the password
        usable = False
    if not usable or re.search(r"[\s\0#]", text):
        raise ValueError(f"must be {_LIKE}, with what is special in it (/, #, ?, @, spaces) as %XX")
    return text


def _is_whole(parts: SplitResult) -> bool:
    """Tell whether each part is what it seems; not so where a password holds what ends the part before it."""
    user, at, hosts = parts.netloc.rpartition("@")
    if "@" in user or (not at and ":" in hosts and "@" in parts.path + parts.query):
        return False
    if parts.query:
        parse_qsl(parts.query, strict_parsing=True)
    return all(urlsplit(f"//{host}").port != 0 for host in hosts.split(","))


def parse_replicas(texts: str | Iterable[str]) -> tuple[tuple[str, str], ...]:
    """Read `NAME=DSN`, one or several with spaces between them; raise `ValueError`."""
    words = texts.split() if isinstance(texts, str) else [word for text in texts for word in text.split()]
    nodes: dict[str, str] = {}
    for word in words:
        name, separator, dsn = word.partition("=")
        if not separator or not NODE_NAME.fullmatch(name):
            raise ValueError(f"must be NAME=DSN, the name being {NODE_NAME_RULE}")
        _put(nodes, name, dsn)
    if PRIMARY in nodes:
        raise ValueError(f"must not name a replica {PRIMARY!r}")
    return tuple(nodes.items())


def parse_file(text: str) -> Mapping[str, str]:
    """Read `NAME DSN`, one a line; what follows a # at a line's beginning is a comment. Raise `ValueError`."""
    nodes: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        match line.split():
            case []:
                pass
            case [first, *_] if first.startswith("#"):
                pass
            case [name, dsn] if NODE_NAME.fullmatch(name):
                try:
                    _put(nodes, name, dsn)
                except ValueError as error:
                    raise ValueError(f"line {number}: {error}") from None
            case _:
                raise ValueError(f"line {number} is not NAME DSN, the name being {NODE_NAME_RULE}")
    if not nodes:
        raise ValueError("it names no node")
    return nodes


def _put(nodes: dict[str, str], name: str, dsn: str) -> None:
    if name in nodes:
        raise ValueError(f"names {name} twice")
    try:
        nodes[name] = parse_dsn(dsn)
    except ValueError as error:
        raise ValueError(f"{name}: its address {error}") from None


def nodes_from_environment(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the DSNs of nodes by name, as `rocket.Router.open` takes them.

    ROCKET_PRIMARY holds the DSN of the node that is called "primary", ROCKET_REPLICAS those of others, each as
    `NAME=DSN`, with spaces between them. Raise `InvalidSetting`, which quotes nothing, for the passwords' sake.
    """
    if not (primary := environment.get("ROCKET_PRIMARY")):
        raise InvalidSetting("ROCKET_PRIMARY must hold the DSN of the primary")
    nodes = {"primary": _address("ROCKET_PRIMARY", primary)}
    for number, item in enumerate(environment.get("ROCKET_REPLICAS", "").split(), 1):
        name, _, dsn = item.partition("=")
        if not NODE_NAME.fullmatch(name) or not dsn:
            raise InvalidSetting(
                f"ROCKET_REPLICAS must hold NAME=DSN with spaces between; number {number} is none"
            )
        if name in nodes:
            raise InvalidSetting(f"ROCKET_REPLICAS must name each node once; there are two of {name}")
        nodes[name] = _address(f"ROCKET_REPLICAS: the address of {name}", dsn)
    return nodes


def _address(of_what: str, text: str) -> str:
    try:
        return parse_dsn(text)
    except ValueError as error:
        raise InvalidSetting(f"{of_what} {error}") from None
