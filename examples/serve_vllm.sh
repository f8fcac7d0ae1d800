#!/usr/bin/env bash
# Serve a quantized checkpoint with vLLM's OpenAI-compatible server and ask it one question.
#
#   bash examples/serve_vllm.sh my-model-w4 [question]
#
# Needs vllm (https://docs.vllm.ai), not lowbit. vLLM finds the format in the checkpoint's config.json.
set -euo pipefail
model=${1:?give the folder or hub id of a checkpoint}
question=${2:-Why is the sky blue?}
port=${PORT:-8000}
name=$(basename "$model")

vllm serve "$model" --served-model-name "$name" --port "$port" --max-model-len "${CONTEXT:-4096}" &
server=$!
trap 'kill "$server" 2>/dev/null || true' EXIT

until curl --silent --fail --output /dev/null "http://localhost:$port/health"; do
  kill -0 "$server" 2>/dev/null || { echo "vllm has stopped: see above" >&2; exit 1; }
  sleep 2
done
body=$(MODEL=$name QUESTION=$question python3 -c '
import json, os
messages = [{"role": "user", "content": os.environ["QUESTION"]}]
print(json.dumps({"model": os.environ["MODEL"], "messages": messages, "max_tokens": 128}))')
curl --silent --fail "http://localhost:$port/v1/chat/completions" \
  --header 'Content-Type: application/json' --data "$body"
echo
