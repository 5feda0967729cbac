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
_DEMONSTRATION_GRANTS = """
-- The same for the demonstration.
GRANT SELECT, INSERT, UPDATE ON users TO {role};
GRANT SELECT, INSERT ON rides TO {role};
"""


def schema_sql() -> str:
    """Return the text of `schema.sql`: inside the package once installed, beside it in a checkout."""
    inside = resources.files("rocket").joinpath("schema.sql")
    found = inside if inside.is_file() else Path(__file__).parent.parent / "schema.sql"
    return found.read_text(encoding="utf-8")


def script(role: str | None = None, *, demonstration: bool = False) -> str:
    """Return what `tables` does, for psql: all of it is made, or nothing where a name belongs to another table."""
    return f"\\set ON_ERROR_STOP on\nBEGIN;\n\n{tables(role, demonstration=demonstration)}\nCOMMIT;\n"


def tables(role: str | None = None, *, demonstration: bool = False) -> str:
    """Return what rocket needs in anybody's database, or the whole; with the grants for a role if one is named."""
    own, _, _ = (whole := schema_sql()).partition(_DEMONSTRATION)
    made = (whole if demonstration else own).rstrip() + "\n"
    if role is None:
        return made
    quoted = '"' + role.replace('"', '""') + '"'
    return (
        made + _GRANTS.format(role=quoted) + (_DEMONSTRATION_GRANTS.format(role=quoted) if demonstration else "")
    )
