"""Every engine that a test may ask for, by name; `engine.py` says what the options mean.

`nwor` goes into additional_config and `phases` are run in order, see `phases.py`.
"""

from __future__ import annotations

from typing import Any

# Long enough for the model to repeat itself, so that n-grams are found.
REPEATING = [60, 30, 1, 70, 2, 40]

ENGINES: dict[str, dict[str, Any]] = {
    "stage": {
        "nwor": {"mode": "stage"},
        "method": "draft_model",
        "phases": [
            "greedy", "prefix_hits", "temperature", "logprobs", "aborts", "direct",
            "direct_temperature", "naive", "poison", "early_write", "early_write_poisoned",
            "tampered", "error_flag", "one_layer_fails", "structured", "direct_structured",
            "scv_off", "scv_adaptive", "profiled",
        ],
    },
    "off": {
        "nwor": {"mode": "off"},
        "method": "draft_model",
        "phases": ["greedy", "temperature", "logprobs"],
    },
    # The model split over two ranks; the workers and their hooks are processes of their own. SCV
    # mode by environment.
    "stage_ranks": {
        "nwor": {"mode": "stage"},
        "method": "draft_model",
        "ranks": 2,
        "environment": {"VLLM_SCV_MODE": "adaptive"},
        "phases": ["split", "split_direct", "split_error", "split_error_alone"],
    },
    "off_ranks": {
        "nwor": {"mode": "off"},
        "method": "draft_model",
        "ranks": 2,
        "phases": ["split"],
    },
    # More layers than the target has, numbered after its own.
    "eagle": {
        "nwor": {"mode": "stage"},
        "method": "eagle",
        "drafter_layers": 5,
        "phases": ["greedy", "direct", "logprobs", "aborts"],
    },
    # Few blocks: four requests do not fit at once, so some are preempted.
    "ngram": {
        "nwor": {"mode": "stage"},
        "method": "ngram",
        "blocks": 10,
        "limits": REPEATING,
        "phases": ["greedy", "direct"],
    },
    "bf16": {
        "nwor": {"mode": "stage"},
        "method": "draft_model",
        "llm": {"dtype": "bfloat16"},
        "phases": ["greedy", "direct"],
    },
    "fp8_e4m3": {
        "nwor": {"mode": "stage"},
        "method": "ngram",
        "limits": REPEATING,
        "llm": {"kv_cache_dtype": "fp8_e4m3"},
        "phases": ["greedy", "direct"],
    },
    # Every layer sees the last 48 tokens; and the other fp8.
    "sliding": {
        "nwor": {"mode": "stage"},
        "method": "ngram",
        "limits": REPEATING,
        "llm": {
            "hf_overrides": {"layer_types": ["sliding_attention"] * 4, "sliding_window": 48},
            "dtype": "bfloat16",
            "kv_cache_dtype": "fp8_e5m2",
        },
        "phases": ["greedy", "direct"],
    },
    # Two KV-cache groups, whose layers share memory.
    "hybrid": {
        "nwor": {"mode": "stage"},
        "method": "ngram",
        "limits": REPEATING,
        "llm": {
            "hf_overrides": {
                "layer_types": ["full_attention", "sliding_attention"] * 2,
                "sliding_window": 48,
            }
        },
        "phases": ["greedy", "direct"],
    },
    "plain": {"nwor": {"mode": "off"}, "method": "none", "phases": ["greedy"]},
}  # fmt: skip
