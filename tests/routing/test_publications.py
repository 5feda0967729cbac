"""Rocket's tables in a database that is published: what `rocket schema` says, and what becomes of a subscriber."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from typing import TYPE_CHECKING

import pytest

from rocket import Router
from rocket.cluster.rejoin import bring_up
from rocket.cluster.supervisor import local_cluster
from rocket.lab.app import DATABASE
from rocket.schema import tables
from tests.routing.test_histories import sql
from tests.support.clusters import EVERY_POSTGRES, on, settings
from tests.support.servers import dsns

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    import asyncpg

    from rocket.cluster.cluster import LocalCluster
    from rocket.cluster.node import Node


@pytest.fixture
def cluster(request: pytest.FixtureRequest, postgres: str, cluster: LocalCluster) -> LocalCluster:
    """The cluster on the Postgres that a test asks for."""
    return on(request, postgres, cluster)


@contextlib.asynccontextmanager
async def fresh_database(node: Node) -> AsyncIterator[asyncpg.Connection[asyncpg.Record]]:
    """Connect to a database without any table."""
    name = f"published_{secrets.token_hex(4)}"
    await sql(node, f"CREATE DATABASE {name}")
    connection = await node.connect(name)
    try:
        yield connection
    finally:
        await connection.close()
        await sql(node, f"DROP DATABASE {name}")


@EVERY_POSTGRES
@pytest.mark.parametrize(
    ("publication", "warns"),
    [
        ("SELECT", False),
        ("CREATE PUBLICATION listed FOR TABLE kept", False),
        ("CREATE PUBLICATION everything FOR ALL TABLES", True),
        ('CREATE PUBLICATION "Public" FOR TABLES IN SCHEMA public', True),
        ("CREATE SCHEMA other; CREATE PUBLICATION elsewhere FOR TABLES IN SCHEMA other", False),
    ],
    ids=["none", "a list", "all tables", "the schema", "another schema"],
)
async def test_the_schema_warns_of_a_publication_that_has_its_tables(
    cluster: LocalCluster, publication: str, *, warns: bool
) -> None:
    """It names it, and what to do; when it is applied again as well."""
    said: list[asyncpg.PostgresLogMessage] = []
    async with fresh_database(cluster.primary) as owner:
        if "IN SCHEMA" in publication and owner.get_server_version().major < 15:
            pytest.skip("there is no such publication in Postgres 14")
        await owner.execute("CREATE TABLE kept (what text PRIMARY KEY)")
        await owner.execute(publication)
        owner.add_log_listener(lambda _, message: said.append(message))
        for _ in range(2):
            await owner.execute(tables())
    warnings = [message for message in said if message.severity_en == "WARNING"]
    assert warns == bool(warnings)
    for warning in warnings:
        assert warning.message in {
            "published by everything: the tables of rocket", 'published by "Public": the tables of rocket'
        }  # fmt: skip
        assert warning.hint is not None
        assert "at each subscriber" in warning.hint


async def stopped(primary: Node) -> None:
    """Wait until the subscriber has failed to apply a row for want of its table."""
    async with asyncio.timeout(20):
        while (
            'target relation "public.epochs" does not exist'
            not in (primary.data_dir.parent / "server.log").read_text()
        ):
            await asyncio.sleep(0.05)


async def count(subscriber: asyncpg.Connection[asyncpg.Record], wanted: int) -> None:
    """Wait until the subscriber has just that number of rows."""
    async with asyncio.timeout(20):
        while wanted != await subscriber.fetchval("SELECT count(*) FROM kept"):
            await asyncio.sleep(0.05)


@pytest.mark.superuser
async def test_a_subscriber_stops_without_the_tables_and_goes_on_with_them() -> None:
    """As the warning says; a router needs nothing for it."""
    async with local_cluster(settings(replicas=0, database=DATABASE, schema="")) as ours:
        primary = ours.primary
        await sql(
            primary,
            "ALTER SYSTEM SET wal_level = 'logical'",
            "ALTER SYSTEM SET wal_retrieve_retry_interval = 100",
        )
        await primary.stop()
        await bring_up(ours, primary)
        make = "CREATE TABLE kept (what text PRIMARY KEY)"
        publish = "CREATE PUBLICATION everything FOR ALL TABLES"
        slot = "SELECT pg_create_logical_replication_slot('everything', 'pgoutput')"
        await sql(primary, make, publish, slot)
        async with fresh_database(primary) as subscriber:
            await subscriber.execute(make)
            source = f"host={ours.socket_dir} port={primary.port} dbname={DATABASE} user=postgres"
            await subscriber.execute(
                f"CREATE SUBSCRIPTION everything CONNECTION '{source}' PUBLICATION everything"
                " WITH (create_slot = false, slot_name = 'everything')"
            )
            try:
                await sql(primary, "INSERT INTO kept VALUES ('before')")
                await count(subscriber, 1)
                await sql(primary, tables(), "SELECT 1")
                async with await Router.open(dsns(ours)):
                    await sql(primary, "INSERT INTO kept VALUES ('after')")
                await stopped(primary)
                assert 1 == await subscriber.fetchval("SELECT count(*) FROM kept")
                await subscriber.execute(tables())
                await count(subscriber, 2)
                assert 0 == await subscriber.fetchval("SELECT count(*) FROM epochs")
            finally:
                await subscriber.execute("DROP SUBSCRIPTION everything")
