#!/usr/bin/env bash
# FastAPI 0.165.0, Starlette 1.10.0, uvicorn 0.54.0: what a dependency does behind its `yield`, where most put the commit,
# runs after the response has been sent. A client that was answered 201 and reads at once does not find its row; and if the
# commit fails, the 201 is out already. (From 0.106 to 0.117 it ran before.)
#
# One would have guessed: the dependency wraps the request, so that a response says what came of the commit.
set -euo pipefail
me=$(cd "$(dirname "$0")" && pwd)/$(basename "$0")
umask 022
export LC_ALL=C
unset "${!PG@}" # nothing of the caller's settings
cd /
work=$(mktemp -d) && chmod 755 "$work"
stop() {
  local status=$?
  rm -rf "$work"
  [ "$status" -eq 0 ] || echo "NOT as described, or not seen: exit code $status"
}
trap stop EXIT
trap 'exit 130' INT TERM HUP

python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -qq --disable-pip-version-check 'fastapi==0.165.0' 'starlette==1.10.0' 'uvicorn==0.54.0' 'httpx==0.28.1'

sed -n '2,/^[^#]/{/^#/s/^# \{0,1\}//p}' "$me"
echo "--- seen now:"
timeout 50 "$work/venv/bin/python" - <<'PYTHON'
import asyncio, sys, threading, time
import httpx, uvicorn
from fastapi import Depends, FastAPI

app, committed = FastAPI(), []

async def transaction():
    staged = []
    yield staged
    await asyncio.sleep(0.3)  # a COMMIT takes its time
    committed.extend(staged)

async def refused():
    yield
    raise RuntimeError("COMMIT failed")

@app.post("/rows", status_code=201)
async def add(staged: list = Depends(transaction)):
    staged.append("row")
    return "added"

@app.post("/refused", status_code=201)
async def add_in_vain(_: None = Depends(refused)):
    return "added"

@app.get("/rows")
async def rows():
    return committed

server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level=60))
thread = threading.Thread(target=server.run, daemon=True)
thread.start()
while not server.started:
    time.sleep(0.05)
port = server.servers[0].sockets[0].getsockname()[1]
with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=5) as client:
    added = client.post("/rows").status_code
    at_once = client.get("/rows").json()
    time.sleep(0.6)
    later = client.get("/rows").json()
    in_vain = client.post("/refused").status_code
server.should_exit = True
thread.join(5)
print(f"POST: {added}, a GET right after it: {at_once}, later: {later}; a POST whose commit fails: {in_vain}")
sys.exit((added, at_once, later, in_vain) != (201, [], ["row"], 201))
PYTHON

echo "as described"
