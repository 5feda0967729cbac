"""The nodes of an existing cluster, by name and DSN, as they are written in flags, variables and files.

A DSN may hold a password, so no error here quotes one.
"""

from __future__ import annotations

import functools
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import SplitResult, parse_qsl, quote, urlencode, urlsplit, urlunsplit

from rocket.errors import InvalidSetting

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

PRIMARY = "primary"
"""The name of the node that is given as the primary; the node keeps it when its role changes."""

NODE_NAME = re.compile("[A-Za-z0-9_.-]{1,63}")
"""What a session token can hold."""
NODE_NAME_RULE = "1 to 63 of A-Z a-z 0-9 _ . -"
_SCHEMES = {"postgresql", "postgres"}
_LIKE = "a DSN like postgresql://user@host:5432/database"

_HARMLESS = {
    "channel_binding": {"prefer", "disable"},
    "gssdelegation": {"0"},
    "gssencmode": {"prefer", "disable"},
    "load_balance_hosts": {"disable"},
    "sslcertmode": {"allow"},
    "sslcompression": {"0"},
    "sslsni": {"1"},
}
"""Parameters of libpq that asyncpg does not know, with the values that it goes by all the same."""
_UNKNOWN = {
    *_HARMLESS, "hostaddr", "max_protocol_version", "min_protocol_version", "oauth_client_id",
    "oauth_client_secret", "oauth_issuer", "oauth_scope", "replication", "require_auth", "requirepeer",
    "requiressl", "scram_client_key", "scram_server_key", "servicefile", "sslcrldir", "sslkeylogfile",
}  # fmt: skip
"""Those that asyncpg does not know: it would take them for settings of the server."""
_NUMBERS = {
    "connect_timeout": 0,
    "keepalives": 1,
    "keepalives_count": 3,
    "keepalives_idle": 30,
    "keepalives_interval": 5,
    "tcp_user_timeout": 15_000,
}
"""Those that rocket honours itself, and what holds where they are not given: the other end's silence
shows within a minute."""
_FILES = ("sslrootcert", "sslcert", "sslkey", "sslcrl")


@dataclass(frozen=True, slots=True)
class Address:
    """What a DSN says, divided into what asyncpg understands and what is left to its caller."""

    dsn: str
    """For asyncpg, without the parameters that it would take for settings of the server."""
    application_name: str | None
    numbers: dict[str, int]
    """libpq's `connect_timeout` (seconds; 0: the caller's own), `keepalives` (1: on), `keepalives_count`,
    `keepalives_idle` and `keepalives_interval` (seconds) and `tcp_user_timeout` (milliseconds), each as it was
    given or as it is by default."""
    files: dict[str, Path]
    """The files of certificates and keys that are named, by parameter."""


@dataclass(frozen=True, slots=True)
class Node:
    """A node: where it is, and how much of the reads it is to take as a replica."""

    dsn: str = field(repr=False)
    """Its address, which may hold a password."""
    zone: str | None = None
    """Where it is in the network: reads prefer replicas of the zone that `Policy.zone` names."""
    weight: float = 1.0
    """How much of the reads it takes compared to others; 0: none, it is there to become the primary."""

    def __post_init__(self) -> None:
        """Raise `ValueError` for a weight that is none."""
        if not 0 <= self.weight <= _MOST_WEIGHT:
            raise ValueError(f"has a weight that is not between 0 and {_MOST_WEIGHT}")

    @classmethod
    def of(cls, given: str | Node) -> Node:
        """Return the node that is given, maybe by nothing but its DSN."""
        return given if isinstance(given, Node) else cls(given)


_MOST_WEIGHT = 1000


@functools.lru_cache(maxsize=256)
def read_dsn(text: str) -> Address:
    """Return what a DSN says; raise `ValueError`, which names a parameter of libpq that cannot be honoured.

    A parameter of an unknown name is a setting of the server, as asyncpg has it.
    """
    parts = urlsplit(text)
    given = dict(parse_qsl(parts.query))
    for name in sorted(given.keys() & _UNKNOWN):
        if given[name] not in _HARMLESS.get(name, ()):
            raise ValueError(f"has the parameter {name}, which asyncpg cannot honour like that: leave it out")
    numbers = dict(_NUMBERS)
    for name in given.keys() & _NUMBERS.keys():
        if not re.fullmatch("[0-9]{1,9}", given[name]):
            raise ValueError(f"has a {name} that is no whole number")
        numbers[name] = int(given[name])
    application_name = given.get("application_name") or given.get("fallback_application_name")
    files = {each: Path(given[each]).expanduser() for each in _FILES if given.get(each)}
    ours = {*_UNKNOWN, *_NUMBERS, "application_name", "fallback_application_name"}
    if given.keys() & ours:
        query = urlencode({each: value for each, value in given.items() if each not in ours}, quote_via=quote)
        text = urlunsplit(parts._replace(query=query))
    return Address(text, application_name, numbers, files)


def parse_dsn(text: str) -> str:
    """Read a DSN; raise `ValueError` if it is none."""
    try:
        parts = urlsplit(text)
        usable = parts.scheme in _SCHEMES and "://" in text and _is_whole(parts)
    except ValueError:  # its message may quote a part of the password
        usable = False
    if not usable or re.search(r"[\s\0#]", text):
        raise ValueError(f"must be {_LIKE}, with special characters (/, #, ?, @, spaces) as %XX")
    read_dsn(text)
    return text


def check_files(text: str) -> None:
    """Raise `ValueError` if a DSN names a file of certificates or keys that is not there."""
    for name, path in read_dsn(text).files.items():
        if not path.is_file():
            raise ValueError(f"has a {name} that is no file")


def _is_whole(parts: SplitResult) -> bool:
    """Return whether each part is what it seems, rather than a piece of a password with `@`, `/` or `?` in it."""
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
    """Read `NAME DSN`, one a line, and comments, which begin with #; raise `ValueError`."""
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

    ROCKET_PRIMARY holds the DSN of the node named "primary", and ROCKET_REPLICAS those of others, each as
    `NAME=DSN`, with spaces between them. Raise `InvalidSetting`, whose message quotes no DSN, since it may hold a
    password.
    """
    if not (primary := environment.get("ROCKET_PRIMARY")):
        raise InvalidSetting("ROCKET_PRIMARY must hold the DSN of the primary")
    variable = "ROCKET_PRIMARY"
    try:
        nodes = {PRIMARY: parse_dsn(primary)}
        variable = "ROCKET_REPLICAS"
        return nodes | dict(parse_replicas(environment.get(variable, "")))
    except ValueError as error:
        raise InvalidSetting(f"{variable} {error}") from None
