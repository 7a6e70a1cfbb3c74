#!/usr/bin/env bash
# Real clients against `moectl serve` on loopback. Packages go into a scratch folder, by version where one is
# asked for (OPENAI_PYTHON=3.57.0 ...). Needs python3 with pip and, for the agents, npm.
#
#   scripts/conformance.sh                   # everything
#   scripts/conformance.sh openai anthropic  # some: openai anthropic langchain schemathesis schema llama soak npm agents
#
# Without the network but for packages: all but `schema`, which clones openai/openai-openapi, unless
# OPENAI_OPENAPI names its openapi.json. SOAK_SECONDS=600 for a soak of ten minutes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

root=$PWD
checks=$root/scripts/conformance
scratch=${CONFORMANCE_SCRATCH:-$root/target/conformance}
moectl=${MOECTL:-$root/target/release/moectl}
wanted=("$@")
[[ ${#wanted[@]} -gt 0 ]] || wanted=(openai anthropic langchain schemathesis schema llama soak npm agents)
mkdir -p "$scratch"
server=
trap '[[ -z $server ]] || kill "$server" 2>/dev/null || true' EXIT

[[ -x $moectl ]] || cargo build --release --locked

# Starts a server with these flags; its address in $url.
start_server() {
  if [[ -n $server ]]; then
    kill "$server"
    wait "$server" || true
  fi
  local log=$scratch/server.log
  : >"$log"
  "$moectl" serve --port 0 "$@" >"$log" 2>"$scratch/server.err" &
  server=$!
  for _ in $(seq 100); do
    url=$(sed -n 's/^listening on //p' "$log")
    if [[ -n $url ]] && python3 "$checks/is_ready.py" "$url"; then
      return
    fi
    sleep 0.1
  done
  cat "$scratch/server.err" >&2
  return 1
}

wants() { [[ " ${wanted[*]} " == *" $1 "* ]]; }

python_packages() {
  [[ -x $scratch/venv/bin/python ]] || python3 -m venv "$scratch/venv"
  "$scratch/venv/bin/pip" install --quiet --disable-pip-version-check "$@"
}

npm_packages() {
  (cd "$scratch" && npm install --silent --no-audit --no-fund --prefix "$scratch" "$@")
}

# Of servers that want one.
key=sk-of-the-conformance-check
printf '%s\n' "$key" >"$scratch/keys"

failed=()
run() {
  local name=$1
  shift
  echo "==> $name"
  "$@" || failed+=("$name")
}

start_server --max-queue 512 --ctx 8k
if wants openai; then
  python_packages "openai${OPENAI_PYTHON:+==$OPENAI_PYTHON}"
  run openai "$scratch/venv/bin/python" "$checks/openai_python.py" "$url"
fi
if wants anthropic; then
  python_packages "anthropic${ANTHROPIC_PYTHON:+==$ANTHROPIC_PYTHON}"
  run anthropic "$scratch/venv/bin/python" "$checks/anthropic_python.py" "$url"
fi
if wants langchain; then
  python_packages langchain-openai langchain-tests pytest-asyncio
  langchain() {
    env SERVER="$url" MODEL="$1" "$scratch/venv/bin/python" -m pytest -q -rxXs -p no:cacheprovider \
      -o asyncio_mode=auto -o asyncio_default_test_loop_scope=session "$checks/langchain_standard.py"
  }
  run langchain langchain tiny
  start_server --script "$checks/langchain.json"
  run langchain-scripted langchain script
  start_server --max-queue 512 --ctx 8k
fi
if wants schemathesis; then
  python_packages schemathesis
  start_server --max-queue 512 --ctx 2k --api-key-file "$scratch/keys"
  run schemathesis "$scratch/venv/bin/schemathesis" run "$url/openapi.json" --max-examples 40 --exclude-path /moectl/live \
    --request-timeout 120 -H "authorization: Bearer $key" \
    --checks not_a_server_error,response_schema_conformance,content_type_conformance,status_code_conformance
  start_server --max-queue 512 --ctx 8k
fi
if wants schema; then
  description=${OPENAI_OPENAPI:-$scratch/openai-openapi/openapi.json}
  if [[ ! -f $description ]]; then
    git clone --quiet --depth 1 https://github.com/openai/openai-openapi "$scratch/openai-openapi"
  fi
  python_packages jsonschema
  run schema "$scratch/venv/bin/python" "$checks/openai_schema.py" "$url" "$description"
fi
if wants llama; then
  # Two at once: one with a key, and one with a small context and a listed origin.
  start_server --api-key-file "$scratch/keys"
  keyed=$server keyed_url=$url server=
  start_server --ctx 2k --cors-origin http://web.example
  run llama python3 "$checks/llama_cpp_cases.py" "$url" "$keyed_url" "$key"
  kill "$keyed"
  wait "$keyed" || true
  start_server --max-queue 512 --ctx 8k
fi
if wants soak; then
  run soak python3 "$checks/soak.py" "$url" "${SOAK_SECONDS:-60}" 200
fi
if wants npm; then
  npm_packages openai ai @ai-sdk/openai-compatible
  cp "$checks/openai_npm.mjs" "$scratch/"
  run npm node "$scratch/openai_npm.mjs" "$url"
fi
if wants agents; then
  npm_packages @openai/codex @anthropic-ai/claude-code opencode-ai @qwen-code/qwen-code
  # Newer npm leaves these out unless approved; both only put a binary in its place.
  (cd "$scratch" && node node_modules/@anthropic-ai/claude-code/install.cjs &&
    node node_modules/opencode-ai/postinstall.mjs) >/dev/null
  work=$scratch/work
  rm -rf "$work"
  mkdir -p "$work"
  sed "s|@FOLDER@|$work|g" "$checks/agents.json" >"$scratch/agents.json"
  start_server --script "$scratch/agents.json"
  for agent in codex claude opencode qwen; do
    run "$agent" "$checks/agent.sh" "$agent" "$url" "$work" "$scratch"
  done
fi

if [[ ${#failed[@]} -gt 0 ]]; then
  echo "failed: ${failed[*]}"
  exit 1
fi
echo "all passed"
