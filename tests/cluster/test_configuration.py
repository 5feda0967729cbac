"""A server's settings arrive as they were meant, whatever the paths look like."""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rocket.cluster.datadir import server_configuration

if TYPE_CHECKING:
    from pathlib import Path

# A line as guc-file.l reads it: a name, and a value in single quotes, where a quote or backslash is doubled or
# escaped, and a line never ends inside.
LINE = re.compile(r"(?P<name>[a-z_]+) = '(?P<value>(?:[^'\\\n]|\\.|'')*)'")
ESCAPED = re.compile(r"''|\\([0-7]{1,3}|.)", re.DOTALL)
CONTROL = {"b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}

# A libpq connection string as conninfo_parse reads it: a backslash takes the sign behind it as it is.
PARAMETER = re.compile(r"\s*(?P<key>[a-z_]+)\s*=\s*'(?P<value>(?:[^'\\]|\\.)*)'", re.DOTALL)

ODD_PATHS = [
    "/run/plain",
    "/run/with space",
    "/run/it's",
    "/run/''",
    "/run/'",
    "/run/back\\slash",
    "/run/back\\n",
    "/run/ends in backslash\\",
    "/run/\\'",
    "/run/'\\",
    "/run/ # no comment",
    "/run/port=1 host='elsewhere'",
    "/run/tab\there",
    "/run/\N{SNOWMAN}",
    "/run/100%",
    "/run/$HOME",
    '/run/double"quoted"',
]


def configuration(
    *,
    name: str = "replica0",
    major: int = 18,
    port: int = 5434,
    socket_dir: str = "/run/sockets",
    upstream_port: int = 5433,
    apply_delay_ms: int = 0,
) -> str:
    """Return the text of a configuration file, of which a test says only what it is about."""
    return server_configuration(
        name=name,
        major=major,
        port=port,
        # A pure path has all that is needed, and is as odd on every machine.
        socket_dir=cast("Path", PurePosixPath(socket_dir)),
        upstream_port=upstream_port,
        apply_delay_ms=apply_delay_ms,
    )


def unescaped(match: re.Match[str]) -> str:
    """Return what one escape sequence of a configuration file stands for."""
    escaped = match[1]
    if escaped is None:
        return "'"
    if escaped[0] in "01234567":
        return chr(int(escaped, 8))
    return CONTROL.get(escaped, escaped)


def read(text: str) -> dict[str, str]:
    """Read a configuration file as Postgres does, and refuse a line that Postgres would refuse."""
    values = {}
    for line in text.split("\n"):
        if line and not line.startswith("#"):
            match = LINE.fullmatch(line)
            assert match, f"Postgres cannot read this line: {line}"
            values[match["name"]] = ESCAPED.sub(unescaped, match["value"])
    return values


def read_connection_string(text: str) -> dict[str, str]:
    """Read a connection string as libpq does, to its end."""
    values = {}
    position = 0
    while position < len(text):
        match = PARAMETER.match(text, position)
        assert match, f"libpq cannot read this: {text[position:]}"
        values[match["key"]] = re.sub(r"\\(.)", r"\1", match["value"], flags=re.DOTALL)
        position = match.end()
    return values


# Without line feeds, for which the format has an escape only.
PATHS = st.text(st.characters(codec="utf-8", exclude_characters="\0\n"), min_size=1).map("/run/{}".format)


@pytest.mark.parametrize("socket_dir", ODD_PATHS)
def test_an_odd_path_arrives_as_it_is(socket_dir: str) -> None:
    """Quotes, backslashes and spaces mean nothing to Postgres, where the sockets are concerned."""
    assert socket_dir == read(configuration(socket_dir=socket_dir))["unix_socket_directories"]


@pytest.mark.parametrize("socket_dir", ODD_PATHS)
def test_an_odd_path_arrives_in_libpq_through_both_kinds_of_quotes(socket_dir: str) -> None:
    """The connection string is quoted for libpq, and then once more for the file."""
    upstream = read_connection_string(read(configuration(socket_dir=socket_dir))["primary_conninfo"])

    assert {
        "host": socket_dir,
        "port": "5433",
        "user": "postgres",
        "application_name": "replica0",
    } == upstream


@given(socket_dir=PATHS)
@settings(max_examples=100)
def test_any_path_arrives_and_brings_no_setting_with_it(socket_dir: str) -> None:
    """No path ends the quotes early: the file has the same settings as with a plain one, in both places whole."""
    plain, odd = read(configuration()), read(configuration(socket_dir=socket_dir))
    path = str(PurePosixPath(socket_dir))

    assert plain.keys() == odd.keys()
    assert {"unix_socket_directories", "primary_conninfo"} >= {name for name in plain if plain[name] != odd[name]}
    assert path == odd["unix_socket_directories"]
    assert path == read_connection_string(odd["primary_conninfo"])["host"]


@pytest.mark.parametrize(("major", "known"), [(14, False), (15, False), (16, False), (17, False), (18, True)])
def test_a_version_gets_only_settings_that_it_has(major: int, known: bool) -> None:
    """Postgres does not start with a setting that came only with a later version; `io_method` came with 18."""
    assert known == ("io_method" in read(configuration(major=major)))


def test_versions_differ_in_nothing_else() -> None:
    """Settings that every supported version has are the same for all."""
    newest = read(configuration(major=18))
    del newest["io_method"]

    assert newest == read(configuration(major=14))


def test_each_server_gets_its_own_values() -> None:
    """Name, port, upstream and delay are those that were given."""
    values = read(configuration(name="replica3", port=6001, upstream_port=6000, apply_delay_ms=250))
    upstream = read_connection_string(values["primary_conninfo"])

    assert values["cluster_name"] == "replica3"
    assert values["port"] == "6001"
    assert values["recovery_min_apply_delay"] == "250ms"
    assert upstream["application_name"] == "replica3"
    assert upstream["port"] == "6000"


def test_nothing_listens_beyond_this_machine() -> None:
    """TCP is on the loopback address, and the socket is for the account alone."""
    values = read(configuration())

    assert values["listen_addresses"] == "127.0.0.1"
    assert values["unix_socket_permissions"] == "0700"


def test_each_setting_stands_once_and_carries_its_reason() -> None:
    """A reader of the file finds a comment above every setting, and no setting twice."""
    lines = configuration().split("\n")
    settings_at = [number for number, line in enumerate(lines) if " = " in line and not line.startswith("#")]
    names = [lines[number].split(" = ")[0] for number in settings_at]

    assert [lines[number] for number in settings_at if not re.match(r"# \S", lines[number - 1])] == []
    assert sorted(set(names)) == sorted(names)


def test_the_file_ends_with_a_line_end() -> None:
    """Something appended begins a line of its own."""
    assert configuration().endswith("'\n")
