"""Makes real engine configurations and prints what came of each: `configs.py OUT.json`.

No engine is started. A process of its own, since making a configuration sets environment variables.
"""

from __future__ import annotations

import copy
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1", VLLM_CPU_KVCACHE_SPACE="1")

WEIGHTS = Path(__file__).parents[2] / "nwor_compile" / "demo" / "weights"
NGRAM = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 4}
STAGE = {"nwor": {"mode": "stage"}}
SLOT = "post_grad_custom_post_pass"
NAMED = {"inductor_passes": {SLOT: "nwor_compile.vllm_pass"}}

CASES: dict[str, dict[str, Any]] = {
    "flag": {"additional_config": STAGE},
    "off": {"additional_config": {"nwor": {"mode": "off"}}},
    "none": {},
    "enforce_eager": {"additional_config": STAGE, "enforce_eager": True},
    "named": {"compilation_config": NAMED},
    "named_as_option": {
        "compilation_config": {"inductor_compile_config": NAMED["inductor_passes"]}
    },
    "named_with_settings": {
        "compilation_config": NAMED,
        "additional_config": {"nwor": {"scv": "adaptive"}},
    },
    "named_against_flag": {
        "compilation_config": NAMED,
        "additional_config": {"nwor": {"mode": "off"}},
    },
    "named_against_environment": {
        "compilation_config": NAMED,
        "environment": {"VLLM_NWOR_MODE": "off"},
    },
    "named_in_another_slot": {
        "compilation_config": {"inductor_passes": {"nwor": "nwor_compile.vllm_pass"}}
    },
    "serve_named": {"argv": ["--compilation-config", json.dumps(NAMED)]},
    "serve_named_short": {"argv": [f"-cc.inductor_passes.{SLOT}=nwor_compile.vllm_pass"]},
    "serve_flag": {"argv": ["--additional-config", json.dumps(STAGE)]},
    "unknown_variable": {"environment": {"VLLM_NWOR_MOD": "stage"}},
    "another_uuid": {"additional_config": STAGE, "uuid": "as after a change of the pass"},
    "breakable": {
        "additional_config": STAGE,
        "environment": {"VLLM_USE_BREAKABLE_CUDAGRAPH": "1"},
    },
    "no_compilation": {"additional_config": STAGE, "compilation_config": {"mode": 0}},
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

    from nwor_compile.vllm_adapter.graph_pass import VllmNworPass

    options = {"speculative_config": NGRAM, **copy.deepcopy(options)}
    environment = options.pop("environment", {})
    os.environ.update(environment)
    uuid = VllmNworPass.uuid
    if "uuid" in options:
        changed = options.pop("uuid")
        VllmNworPass.uuid = lambda self: changed  # type: ignore[method-assign]
    try:
        if "argv" in options:
            config = from_command_line(options["argv"])
        else:
            config = EngineArgs(
                str(WEIGHTS / "target"), dtype="float32", max_model_len=256, **options
            ).create_engine_config()
        return {
            "worker": config.parallel_config.worker_cls,
            "passes": sorted(config.compilation_config.inductor_compile_config),
            "named": config.compilation_config.inductor_passes,
            "additional": config.additional_config,
            "hash": config.compute_hash(),
        }
    except Exception as error:  # noqa: BLE001  reported
        return {"error": f"{type(error).__name__}: {error}"}
    finally:
        VllmNworPass.uuid = uuid  # type: ignore[method-assign]
        for variable in environment:
            os.environ.pop(variable, None)


def from_command_line(argv: list[str]) -> Any:
    """As `vllm serve` makes its configuration."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    fixed = ["--model", str(WEIGHTS / "target"), "--dtype", "float32", "--max-model-len", "256"]
    fixed += ["--speculative-config", json.dumps(NGRAM)]
    return AsyncEngineArgs.from_cli_args(parser.parse_args([*fixed, *argv])).create_engine_config()


def main() -> None:
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    Path(sys.argv[1]).write_text(json.dumps({name: outcome(case) for name, case in CASES.items()}))


if __name__ == "__main__":
    main()
