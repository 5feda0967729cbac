"""Addresses of Patroni as they are set, and its answer to GET /cluster, are read."""

from __future__ import annotations

import argparse
import json
from typing import Any

import pytest

from rocket.errors import InvalidSetting
from rocket.lab import settings
from rocket.topology.patroni import Member, fill_in, parse_cluster, parse_template, parse_urls

LEADER = {
    "name": "node1", "role": "leader", "state": "running", "api_url": "http://10.0.0.1:8008/patroni",
    "host": "10.0.0.1", "port": 5432, "timeline": 3,
}  # fmt: skip
REPLICA = {
    "name": "node2", "role": "replica", "state": "streaming", "api_url": "http://10.0.0.2:8008/patroni",
    "host": "10.0.0.2", "port": 5433, "timeline": 3, "lag": 16, "tags": {"noloadbalance": True},
}  # fmt: skip


def answer(*members: object) -> str:
    """Return an answer that lists these members."""
    return json.dumps({"members": members, "scope": "app"})


def test_members_are_read_as_patroni_lists_them() -> None:
    """With every detail, and which one is the leader."""
    leader, replica = parse_cluster(answer(LEADER, REPLICA)).members

    assert leader == Member(
        "node1", "leader", "running", "10.0.0.1", 5432, "http://10.0.0.1:8008/patroni", 3, None, True
    )
    assert replica == Member(
        "node2", "replica", "streaming", "10.0.0.2", 5433, "http://10.0.0.2:8008/patroni", 3, 16, False
    )
    assert [True, False] == [leader.is_leader, replica.is_leader]


@pytest.mark.parametrize(
    "change",
    [
        {"host": None},
        {"host": ""},
        {"port": 0},
        {"port": "5432"},
        {"name": "a b"},
        {"name": None},
        {"port": True},
        {"host": "h/d?passfile=/x#"},
    ],
)
def test_a_member_without_an_address_is_left_out(change: dict[str, Any]) -> None:
    """While its data is being cloned it has none; and what a token cannot hold is no name."""
    assert ["node1"] == [
        member.name for member in parse_cluster(answer(LEADER, REPLICA | change, "nonsense")).members
    ]


def test_details_that_patroni_leaves_out_stay_unknown() -> None:
    """A lag that is unknown to Patroni is unknown to us."""
    member = {"name": "node2", "host": "h", "lag": "unknown", "tags": None}

    assert (Member("node2", "", "", "h", 5432, ""),) == parse_cluster(answer(member)).members


def test_a_name_that_a_token_cannot_hold_is_unusable() -> None:
    """The leader's, too: no other member is the leader then."""
    listing = parse_cluster(answer(LEADER | {"name": "pg node"}, REPLICA))

    assert ["node2"] == [member.name for member in listing.members]
    assert ("pg node",) == listing.unusable
    assert "pg node" == listing.leader


def test_maintenance_mode_is_read() -> None:
    """Patroni mentions it only while it lasts."""
    assert not parse_cluster(answer(LEADER)).paused
    assert parse_cluster(json.dumps({"members": [LEADER], "pause": True})).paused


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"members": 1}', "<html>", "[" * 100_000])
def test_an_answer_that_is_not_patronis_is_refused(text: str) -> None:
    """A proxy's page, say."""
    with pytest.raises(ValueError):  # noqa: PT011 - whatever it says
        parse_cluster(text)


def test_a_template_is_filled_in_and_holds_what_it_holds() -> None:
    """Braces of a password stay what they are; an IPv6 address gets its brackets."""
    template = parse_template("postgresql://app:a%7Bb@{host}:{port}/app?sslmode=verify-full")

    assert "postgresql://app:a%7Bb@db1:5432/app?sslmode=verify-full" == fill_in(template, "db1", 5432)
    assert "postgresql://app:a%7Bb@[::1]:5432/app?sslmode=verify-full" == fill_in(template, "::1", 5432)


def test_addresses_of_rest_apis_are_read() -> None:
    """With what comes behind the port, or without."""
    assert ("http://a:8008", "https://u:p@b:8008") == parse_urls("http://a:8008/patroni, https://u:p@b:8008/")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("patroni", "secret"),
        ("patroni", "http://a:8008,"),
        ("patroni", "http://a:secret"),
        ("patroni_dsn", "postgresql://a:secret@b/c"),
        ("patroni_dsn", "secret@{host}:{port}"),
        ("patroni_dsn", "postgresql://a:secret@{host}:{port}/{port}"),
    ],
)
def test_a_wrong_setting_is_refused_without_being_repeated(name: str, value: str) -> None:
    """It may hold a password."""
    with pytest.raises(InvalidSetting, match=r"--patroni\S* must be") as caught:
        settings.load(argparse.Namespace(**{name: value}), {})

    assert "secret" not in str(caught.value)
