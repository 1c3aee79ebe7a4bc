"""Makes real engine configurations and prints what came of each: `configs.py OUT.json`.

No engine is started. A process of its own, since making a configuration sets environment variables.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1", VLLM_CPU_KVCACHE_SPACE="1")

WEIGHTS = Path(__file__).parents[2] / "nwor_compile" / "demo" / "weights"
NGRAM = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 4}
STAGE = {"nwor": {"mode": "stage"}}

CASES: dict[str, dict[str, Any]] = {
    "flag": {"additional_config": STAGE},
    "off": {"additional_config": {"nwor": {"mode": "off"}}},
    "none": {},
    "enforce_eager": {"additional_config": STAGE, "enforce_eager": True},
    "not_strict": {
        "additional_config": {"nwor": {"mode": "stage", "strict": False}},
        "enforce_eager": True,
    },
    "no_speculation": {"additional_config": STAGE, "speculative_config": None},
    "pipeline": {"additional_config": STAGE, "pipeline_parallel_size": 2},
    "kv_transfer": {
        "additional_config": STAGE,
        "kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"},
    },
    "fast_prefill": {"additional_config": STAGE, "kv_sharing_fast_prefill": True},
    "unknown_setting": {"additional_config": {"nwor": {"modus": "stage"}}},
    "conflict": {"additional_config": STAGE, "environment": {"VLLM_NWOR_MODE": "off"}},
    "environment": {"environment": {"VLLM_NWOR_MODE": "stage"}},
}


def outcome(options: dict[str, Any]) -> dict[str, Any]:
    from vllm.engine.arg_utils import EngineArgs

    options = {"speculative_config": dict(NGRAM), **options}
    environment = options.pop("environment", {})
    os.environ.update(environment)
    try:
        config = EngineArgs(
            str(WEIGHTS / "target"), dtype="float32", max_model_len=256, **options
        ).create_engine_config()
    except Exception as error:  # noqa: BLE001  reported
        return {"error": f"{type(error).__name__}: {error}"}
    finally:
        for variable in environment:
            del os.environ[variable]
    return {
        "worker": config.parallel_config.worker_cls,
        "passes": sorted(config.compilation_config.inductor_compile_config),
        "additional": config.additional_config,
        "hash": config.compute_hash(),
    }


def main() -> None:
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    Path(sys.argv[1]).write_text(json.dumps({name: outcome(case) for name, case in CASES.items()}))


if __name__ == "__main__":
    main()
