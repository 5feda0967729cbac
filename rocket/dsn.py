"""The nodes of an existing cluster, by name and DSN, as they are written in flags, variables and files.

A DSN may hold a password, so no error here quotes one.
"""

from __future__ import annotations

import functools
import os
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import SplitResult, parse_qsl, quote, unquote, urlencode, urlsplit, urlunsplit

from rocket.errors import InvalidSetting

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Mapping
    from ssl import SSLContext

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
    """A node: where it is, how connections to it are opened, and how many reads it is to take as a replica.

    Whatever fails in opening a connection is the node's failure: reads go elsewhere. Of what `password` and
    `connect` raise only the kind is repeated, since the text may hold a secret.
    """

    dsn: str = field(repr=False)
    """Its address, which may hold a password."""
    zone: str | None = None
    """Where it is in the network: reads prefer replicas of the zone that `Policy.zone` names."""
    weight: float = 1.0
    """How much of the reads it takes compared to others; 0: none, it is there to become the primary."""
    password: str | Callable[[], str | Awaitable[str]] | None = field(default=None, repr=False)
    """In place of the DSN's; a function, or a coroutine function, is called anew for each connection: for tokens
    that expire. It must not block."""
    ssl: SSLContext | str | bool | None = None
    """What `asyncpg.connect` takes as `ssl`, in place of the DSN's `sslmode`."""
    settings: Mapping[str, str] = field(default_factory=dict, repr=False, hash=False)
    """The server's settings in each session, as `search_path` or `statement_timeout`; what work sets in their
    place does not last."""
    connect: Callable[..., Awaitable[object]] | None = None
    """Opens a connection in place of `asyncpg.connect`, and is given what that would be: the DSN, and keyword
    arguments, among them the `connection_class` that the connection must be of."""

    def __post_init__(self) -> None:
        """Raise `ValueError` for a weight that is none, and for settings that are no text."""
        object.__setattr__(self, "settings", dict(self.settings))
        for name, value in self.settings.items():
            if not all(isinstance(each, str) for each in (name, value)):
                raise ValueError(f"has a setting, {name}, that is no text")
        if not 0 <= self.weight <= _MOST_WEIGHT:
            raise ValueError(f"has a weight that is not between 0 and {_MOST_WEIGHT}")

    @classmethod
    def of(cls, given: str | Node) -> Node:
        """Return the node that is given, maybe by nothing but its DSN."""
        return given if isinstance(given, Node) else cls(given)

    @classmethod
    def by_name(cls, given: str | Node | Mapping[str, str | Node]) -> dict[str, Node]:
        """Return nodes by name; of one address with several hosts, each host is a node.

        Raise `ValueError` as `nodes_from_hosts` does.
        """
        if isinstance(given, (str, Node)):
            node = cls.of(given)
            try:
                return {name: replace(node, dsn=dsn) for name, dsn in nodes_from_hosts(node.dsn).items()}
            except ValueError as error:
                raise ValueError(f"the nodes' address {error}") from None
        return {name: cls.of(node) for name, node in given.items()}


_MOST_WEIGHT = 1000


def as_listed(_name: str, node: Node) -> Node:
    """Return a node as a file or Patroni lists it, without any option."""
    return node


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
    _check_form(text)
    read_dsn(text)
    return text


def _check_form(text: str) -> None:
    try:
        parts = urlsplit(text)
        usable = parts.scheme in _SCHEMES and "://" in text and _is_whole(parts)
    except ValueError:  # its message may quote a part of the password
        usable = False
    if not usable or re.search(r"[\s\0#]", text):
        raise ValueError(f"must be {_LIKE}, with special characters (/, #, ?, @, spaces) as %XX")


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


_OF_ONE_CONNECTION = {"host", "port", "target_session_attrs", "load_balance_hosts"}
"""The parameters that say which one of several hosts a connection is to lead to: rocket uses them all."""


def nodes_from_hosts(text: str) -> dict[str, str]:
    """Return the DSNs of nodes by name, one for each host of a DSN as libpq has it: `postgresql://h1,h2:5433/app`.

    A node is named after its host: with `-` in place of what a name cannot hold, and, where several are on one
    host, of its port as well. Raise `ValueError`, which never repeats the DSN.
    """
    _check_form(text)
    parts = urlsplit(text)
    query = dict(parse_qsl(parts.query))
    user, at, in_front = parts.netloc.rpartition("@")
    hosts = [unquote(host) for host in in_front.split(",")] if in_front else query.get("host", "").split(",")
    ports = query.get("port", "").split(",")
    if not all(hosts):
        raise ValueError("must name each host, for each to be a node")
    if len(ports) not in {1, len(hosts)}:
        raise ValueError("must have one port, or one for each host")
    places = [
        (host, port or own)
        for (host, own), port in zip(map(_divide, hosts), ports * (len(hosts) // len(ports)), strict=True)
    ]
    query = {name: value for name, value in query.items() if name not in _OF_ONE_CONNECTION}
    nodes: dict[str, str] = {}
    for host, port in places:
        is_alone = [other for other, _ in places].count(host) == 1
        name = re.sub("[^A-Za-z0-9_.-]+", "-", host if is_alone else f"{host}-{port}").strip("-")
        if not NODE_NAME.fullmatch(name):
            raise ValueError(f"has a host that makes no name ({NODE_NAME_RULE}): give each node one of its own")
        there = f"[{host}]" if ":" in host else quote(host, safe="")
        netloc = f"{user}{at}{there}{port and f':{port}'}"
        _put(nodes, name, urlunsplit(parts._replace(netloc=netloc, query=urlencode(query, quote_via=quote))))
    return nodes


def _divide(host: str) -> tuple[str, str]:
    """Return a host, which may be the directory of a socket or an IPv6 address in brackets, and its port."""
    match = re.fullmatch(r"(/.*|\[.*\]|[^:]*)(?::([0-9]+))?", host)
    if match is None:
        raise ValueError("must have IPv6 addresses in brackets, and ports that are numbers")
    return match[1].strip("[]"), match[2] or ""


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
    `NAME=DSN`, with spaces between them. Or ROCKET_NODES holds one DSN with the hosts of all nodes, whatever
    their roles are. Raise `InvalidSetting`, whose message quotes no DSN, since it may hold a password.
    """
    if hosts := environment.get("ROCKET_NODES"):
        if environment.get("ROCKET_PRIMARY") or environment.get("ROCKET_REPLICAS"):
            raise InvalidSetting("ROCKET_NODES holds all nodes: leave out ROCKET_PRIMARY and ROCKET_REPLICAS")
        try:
            return nodes_from_hosts(hosts)
        except ValueError as error:
            raise InvalidSetting(f"ROCKET_NODES {error}") from None
    if not (primary := environment.get("ROCKET_PRIMARY")):
        raise InvalidSetting("ROCKET_PRIMARY must hold the DSN of the primary")
    variable = "ROCKET_PRIMARY"
    try:
        nodes = {PRIMARY: parse_dsn(primary)}
        variable = "ROCKET_REPLICAS"
        return nodes | dict(parse_replicas(environment.get(variable, "")))
    except ValueError as error:
        raise InvalidSetting(f"{variable} {error}") from None
