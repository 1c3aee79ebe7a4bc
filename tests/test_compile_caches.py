"""Compile caches on disk never serve a graph that was made under another configuration."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# One process: compile the same model by options and by backend, in the mode of the environment.
PROCESS = """
import json, torch, graphs, nwor_compile
from nwor_compile import NworConfig, Window
from nwor_compile.ops.staging import executions
from torch._dynamo.utils import counters

def model(step, key_cache, value_cache):
    return graphs.layer(step, key_cache, value_cache) * 2

found = {}
for kind in ("options", "backend"):
    torch._dynamo.reset()
    counters.clear()
    if kind == "options":
        run = torch.compile(model, options=nwor_compile.compile_options())
    else:
        run = torch.compile(model, backend="nwor")
    step, caches = graphs.verify_step(), graphs.make_caches()
    before = [cache.clone() for cache in caches]
    want = model(step, *[cache.clone() for cache in caches])
    window = Window(
        {"layer": tuple(caches)}, max_requests=2, max_drafts=2, max_tokens=8,
        config=NworConfig(mode="stage", scv="off"),
    )
    executed, reports = executions(), len(nwor_compile.last_reports())
    with torch.no_grad(), window.step(torch.tensor(graphs.DRAFTS), step.starts, step.slots):
        out = run(step, *caches)
        slot = int(step.slots[1])
        place = slot // graphs.BLOCK, slot % graphs.BLOCK
        reached = [not torch.equal(a[place], b[place]) for a, b in zip(caches, before)]
    found[kind] = {
        "right": torch.equal(out, want),
        "executed": executions() - executed,
        "draft reached the cache": reached,
        "reports": len(nwor_compile.last_reports()) - reports,
        "hits": counters["inductor"]["fxgraph_cache_hit"]
        + counters["aot_autograd"]["autograd_cache_hit"],
    }
    window.close()
print(json.dumps(found))
"""


def run(mode: str, cache: Path) -> dict[str, dict[str, object]]:
    environment = dict(os.environ) | {
        "VLLM_NWOR_MODE": mode,
        "TORCHINDUCTOR_CACHE_DIR": str(cache),
        "TORCHINDUCTOR_FX_GRAPH_CACHE": "1",
        "TORCHINDUCTOR_AUTOGRAD_CACHE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(__file__).parent),
    }
    result = subprocess.run(
        [sys.executable, "-c", PROCESS], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    found: dict[str, dict[str, object]] = json.loads(result.stdout.splitlines()[-1])
    return found


@pytest.mark.slow
def test_each_process_runs_the_graph_of_its_own_mode(tmp_path: Path) -> None:
    results = [(mode, run(mode, tmp_path)) for mode in ("off", "stage", "off", "stage")]
    for number, (mode, found) in enumerate(results):
        for kind, result in found.items():
            where = f"process {number + 1} ({mode}), {kind}: {result}"
            assert result["right"], where
            assert result["executed"] == (1 if mode == "stage" else 0), where
            assert result["draft reached the cache"] == [mode == "off"] * 2, where
    # The last two processes took their graphs from the caches, or this proved nothing.
    for _, found in results[2:]:
        assert all(int(str(result["hits"])) > 0 for result in found.values()), results
    # Inductor's pass did not even run there; the backend's runs on Dynamo's graph every time.
    warm = results[3][1]
    assert warm["options"]["reports"] == 0
    assert warm["backend"]["reports"] == 1
    # The first staged graph of a kind was not taken for the direct one.
    assert results[1][1]["options"]["hits"] == 0
