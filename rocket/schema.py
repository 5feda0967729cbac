"""The SQL that makes rocket's tables; `schema.sql` is its one source."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

_DEMONSTRATION = "-- The tables of the demonstration"
"""Begins the line behind which there is nothing that rocket itself needs."""

_GRANTS = """
-- What rocket's role needs, unless it owns the tables.
GRANT SELECT, INSERT ON epochs TO {role};
GRANT TRUNCATE ON epoch_marker TO {role};
GRANT SELECT, INSERT, UPDATE, DELETE ON replica_statuses, rocket_floors TO {role};

-- Lets it see when a replica has crashed and come back (a superuser may grant this).
GRANT pg_monitor TO {role};
"""


def schema_sql() -> str:
    """Return the text of `schema.sql`: beside the package in a checkout, inside it once installed."""
    beside = Path(__file__).parent.parent / "schema.sql"
    if beside.is_file():
        return beside.read_text(encoding="utf-8")
    return resources.files("rocket").joinpath("schema.sql").read_text(encoding="utf-8")


def own_tables(role: str | None = None) -> str:
    """Return the part that rocket needs in anybody's database, with the grants for a role if one is named."""
    tables = schema_sql().partition(_DEMONSTRATION)[0].rstrip() + "\n"
    if role is None:
        return tables
    quoted = role.replace('"', '""')
    return tables + _GRANTS.format(role=f'"{quoted}"')
