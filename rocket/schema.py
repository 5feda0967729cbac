"""The SQL for rocket's tables, which is that of `schema.sql`."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

_DEMONSTRATION = "-- The tables of the demonstration"
"""Begins the line after which nothing is needed by rocket itself."""

_PUBLISHED = """
-- Says it if these tables are published to subscribers, which may not have them.
DO $$
DECLARE
    found text;
BEGIN
    SELECT string_agg(DISTINCT quote_ident(pubname), ', ') INTO found
      FROM pg_publication_tables
      JOIN pg_namespace ON nspname = schemaname
      JOIN pg_class AS class ON relname = tablename AND relnamespace = pg_namespace.oid
     WHERE class.oid = ANY ('{epochs, covers, replica_statuses}'::regclass[]);
    IF found IS NOT NULL THEN
        RAISE WARNING 'published by %: the tables of rocket', found
            USING DETAIL = 'A subscriber without these tables stops at the first row that rocket writes.',
                  HINT = 'Run this SQL at each subscriber before rocket is started, or publish a list of tables.';
    END IF;
END
$$;
"""

_GRANTS = """
-- What rocket's role needs, unless it owns the tables.
GRANT SELECT, INSERT ON epochs, covers TO {role};
GRANT EXECUTE ON FUNCTION rocket_note_timeline() TO {role};
GRANT SELECT, INSERT, UPDATE, DELETE ON replica_statuses TO {role};

-- Lets it see when a replica has crashed and come back (a superuser may grant this).
GRANT pg_monitor TO {role};
"""
_DEMONSTRATION_GRANTS = """
-- The same for the demonstration.
GRANT SELECT, INSERT, UPDATE ON users TO {role};
GRANT SELECT, INSERT ON rides TO {role};
"""


def schema_sql() -> str:
    """Return the text of `schema.sql`: inside the package where it is installed, beside it in a checkout."""
    inside = resources.files("rocket").joinpath("schema.sql")
    found = inside if inside.is_file() else Path(__file__).parent.parent / "schema.sql"
    return found.read_text(encoding="utf-8")


def script(role: str | None = None, *, demonstration: bool = False) -> str:
    """Return the SQL of `tables` for psql, in a transaction, which fails if another table has one of the names."""
    return f"\\set ON_ERROR_STOP on\nBEGIN;\n\n{tables(role, demonstration=demonstration)}\nCOMMIT;\n"


def tables(role: str | None = None, *, demonstration: bool = False) -> str:
    """Return the SQL for rocket's own tables or, with the demonstration's, all; with the grants for a role."""
    everything = schema_sql()
    own, _, _ = everything.partition(_DEMONSTRATION)
    sql = (everything if demonstration else own).rstrip() + "\n" + _PUBLISHED
    if role is None:
        return sql
    quoted = '"' + role.replace('"', '""') + '"'
    grants = _GRANTS + _DEMONSTRATION_GRANTS if demonstration else _GRANTS
    return sql + grants.format(role=quoted)
