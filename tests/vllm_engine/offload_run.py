"""One CPU engine with vLLM's OffloadingConnector: `offload_run.py OPTIONS.json OUT.json`.

Options: nwor: settings or null; connector: true or false; fault: of `offload_faults.py`, or null.
Reports token ids, and what `StoreAudit.compare` finds.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.update(
    HF_HUB_OFFLINE="1",
    VLLM_NO_USAGE_STATS="1",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    OMP_NUM_THREADS="1",
    NUMBA_NUM_THREADS="1",
)
sys.path.append(str(Path(__file__).parents[1] / "vllm_gpu"))

CONNECTOR = {
    "kv_connector": "OffloadingConnector",
    "kv_role": "kv_both",
    "kv_connector_extra_config": {
        "cpu_bytes_to_use": 64 << 20,
        "offload_prompt_only": False,
        "spec_name": "HostSpec",
        "spec_module_path": "host_offload",
    },
}
REQUESTS, TOKENS = 10, 64


def prompts() -> list[list[int]]:
    """Every second one fills its blocks, so that its request ends with a block."""
    from matrix_engine import text_prompts

    found = text_prompts(REQUESTS)
    return [ids[: len(ids) // 32 * 32 or 20] if i % 2 else ids for i, ids in enumerate(found)]


def generate(llm: Any, texts: list[list[int]], tokens: int) -> list[list[int]]:
    from vllm import SamplingParams, TokensPrompt

    parameters = SamplingParams(
        temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False
    )
    asked = [TokensPrompt(prompt_token_ids=ids) for ids in texts]
    outputs = llm.generate(asked, parameters, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def main() -> None:
    """More tokens than the engine's blocks hold, then each text again with some of its answer."""
    import engine
    from offload_audit import StoreAudit
    from offload_faults import FAULTS

    options = json.loads(Path(sys.argv[1]).read_text())
    more: dict[str, Any] = {"max_model_len": 512}
    if options["connector"]:
        more["kv_transfer_config"] = CONNECTOR
    llm = engine.make({"method": "draft_model", "blocks": 40, "llm": more, "nwor": options["nwor"]})
    audit = StoreAudit(llm) if options["connector"] else None
    if options["fault"]:
        assert audit is not None
        FAULTS[options["fault"]](audit)
    texts = prompts()
    filled = generate(llm, texts, TOKENS)
    again = [
        generate(llm, [text + ids[:40]], 24)[0] for text, ids in zip(texts, filled, strict=True)
    ]
    report: dict[str, Any] = {"filled": filled, "again": again}
    if audit is not None:
        report["connector"] = type(audit.scheduler).__name__
        report["stores"] = audit.compare()
    if options["nwor"]:
        report["committed"] = llm.collective_rpc("nwor_metrics")[0]["nwor_total_committed"]
    Path(sys.argv[2]).write_text(json.dumps(report))


if __name__ == "__main__":
    main()
