#!/usr/bin/env bash
# One agent's turn with a tool: `agent.sh NAME URL WORK SCRATCH`. It must write WORK/hello.txt and say so.
set -euo pipefail
agent=$1 url=$2 work=$3 scratch=$4
task="Write the word hello into the file hello.txt in this folder."
home=$scratch/home-$agent
bin=$scratch/node_modules/.bin
rm -rf "$home" "$work"
mkdir -p "$home" "$work"
cd "$work"
out=$scratch/$agent.log
common=(env -i "PATH=$PATH" "HOME=$home" TERM=dumb "XDG_CONFIG_HOME=$home/.config" "XDG_DATA_HOME=$home/.local/share"
  "XDG_CACHE_HOME=$home/.cache" "XDG_STATE_HOME=$home/.local/state")
case $agent in
  codex)
    "${common[@]}" timeout 120 "$bin/codex" exec --skip-git-repo-check \
      --dangerously-bypass-approvals-and-sandbox -m tiny -c model_provider=local \
      -c "model_providers.local={name=\"local\", base_url=\"$url/v1\", wire_api=\"responses\"}" \
      "$task" </dev/null >"$out" 2>&1 ;;
  claude)
    "${common[@]}" ANTHROPIC_BASE_URL="$url" ANTHROPIC_API_KEY=none DISABLE_TELEMETRY=1 \
      CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC=1 timeout 120 "$bin/claude" -p "$task" \
      --permission-mode acceptEdits </dev/null >"$out" 2>&1 ;;
  opencode)
    cat >opencode.json <<JSON
{"provider": {"local": {"npm": "@ai-sdk/openai-compatible", "options": {"baseURL": "$url/v1"},
  "models": {"tiny": {}}}}, "model": "local/tiny", "autoupdate": false, "share": "disabled"}
JSON
    "${common[@]}" timeout 120 "$bin/opencode" run -m local/tiny "$task" </dev/null >"$out" 2>&1 ;;
  qwen)
    "${common[@]}" OPENAI_BASE_URL="$url/v1" OPENAI_API_KEY=none OPENAI_MODEL=tiny \
      timeout 120 "$bin/qwen" --auth-type openai --yolo -p "$task" </dev/null >"$out" 2>&1 ;;
esac || { echo "$agent: exit $?"; tail -20 "$out"; exit 1; }
if [[ $(cat hello.txt 2>/dev/null) != hello ]] || ! grep -q "ALL DONE" "$out"; then
  echo "$agent: no file, or no last word"
  tail -20 "$out"
  exit 1
fi
echo "$agent: wrote the file and said so"
