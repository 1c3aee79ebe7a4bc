"""vLLM's OffloadingConnector in a staged engine: which settings of it are supported, and the
subclass that takes its place (`offload.py`).

NOTE [offload]: why every block that it copies to the host holds committed rows alone.

1. Which rows. The scheduler makes the store jobs of step N while it schedules N, for tokens whose
   ids it knows then: a block is keyed by the hash of its ids, and the count is cut at `num_tokens`.
   No draft of step N is among them. So a job of step N covers rows that are certain in N, which
   the forward writes to the cache, and drafts that were accepted before N.
2. When. The worker keeps the jobs of step N until the start of step N + 1, and the copy's stream
   waits for the main stream as it is then. The commits of N and of all steps before it are launches
   on the main stream, in `sample`. Jobs that are flushed before the forward of their own step, for
   their blocks are handed on in it, are those of finished requests; a request is finished when the
   output of its last step was read, and that step's commit came before its output.
3. Blocks that are handed on. With several batches in flight a freed block stays out of the pool
   until the output of the last step that may write it was read (`defer_block_free`), and a step's
   commit precedes its output. So no commit lands in a block that was loaded from the host since.
4. The last token. Its row is computed by the step after it, which a finished request does not get;
   stock 0.26 counts it as stored (vLLM issue 54193; PR 54288 fixed it after 0.31). With NWOR its
   slot would hold whatever was there before. `offload.py` cuts the count as the fix does.
5. Which memory. The connector copies whole blocks below the scheduler's `num_blocks`; the tail
   blocks behind them are never among them. It asks for caches in which the heads of a block come
   before its tokens, and vLLM's V1 runner would put all layers of a block together for it. It needs
   neither, and tail blocks need rows that follow each other: the subclass asks for that.

A connector that saves rows from inside the forward (`save_kv_layer`) breaks 2 and stays refused.
The drafter's own layers are stored as vLLM left them: NWOR stages the target's alone.
"""

from __future__ import annotations

import copy
from typing import Any

CONNECTOR = "OffloadingConnector"
OURS, MODULE = "NworOffloadingConnector", "nwor_compile.vllm_adapter.offload"
SPEC = "CPUOffloadingSpec"


def connector_refusals(config: Any) -> list[str]:
    """Why the configuration's KV connector cannot be used; empty if it can, or if there is none."""
    given = config.kv_transfer_config
    if given is None:
        return []
    name = getattr(given, "kv_connector", None)
    module = getattr(given, "kv_connector_module_path", None)
    if (name, module) not in ((CONNECTOR, None), (OURS, MODULE)):
        return [
            "KV connectors may save a layer's rows before the commit; remove kv_transfer_config, "
            f"or use {CONNECTOR}, which does not"
        ]
    found, extra = [], given.kv_connector_extra_config
    if given.kv_role != "kv_both":
        found.append(f"{CONNECTOR} with kv_role {given.kv_role} never ran; use kv_both")
    if str(extra.get("enable_cross_layers_blocks", False)).lower() == "true":
        found.append(
            "enable_cross_layers_blocks puts all layers of a block together, so rows do not follow "
            "each other; turn it off"
        )
    # On a CPU there are no streams: whatever copies does so after the commit.
    spec = extra.get("spec_name", SPEC)
    if config.device_config.device_type != "cpu" and spec != SPEC:
        found.append(f"offloading by {spec} never ran; use {SPEC}")
    return found


def use_connector(config: Any) -> None:
    """Put this package's subclass in the place of the connector, if there is one."""
    if config.kv_transfer_config is None:
        return
    # A copy: what came in may be another engine's too.
    config.kv_transfer_config = copy.copy(config.kv_transfer_config)
    config.kv_transfer_config.kv_connector = OURS
    config.kv_transfer_config.kv_connector_module_path = MODULE
