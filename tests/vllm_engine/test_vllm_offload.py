"""Offloading under NWOR: what is refused, what takes the connector's place, and real CPU engines
whose every stored block is recomputed (NOTE [offload])."""

from __future__ import annotations

import concurrent.futures
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pool import environment

from nwor_compile.vllm_adapter.offload_configure import (
    CONNECTOR,
    MODULE,
    OURS,
    connector_refusals,
    use_connector,
)


def config(device: str = "cuda", extra: dict[str, Any] | None = None, **changes: Any) -> Any:
    transfer = {
        "kv_connector": CONNECTOR,
        "kv_connector_module_path": None,
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"cpu_bytes_to_use": 1 << 20, **(extra or {})},
        **changes,
    }
    return SimpleNamespace(
        kv_transfer_config=SimpleNamespace(**transfer),
        device_config=SimpleNamespace(device_type=device),
    )


def test_no_connector_is_no_problem() -> None:
    plain = SimpleNamespace(kv_transfer_config=None)
    assert connector_refusals(plain) == []
    use_connector(plain)
    assert plain.kv_transfer_config is None


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_the_offloading_connector_is_accepted_and_replaced(device: str) -> None:
    found = config(device)
    given = found.kv_transfer_config
    assert connector_refusals(found) == []
    use_connector(found)
    assert found.kv_transfer_config.kv_connector == OURS
    assert found.kv_transfer_config.kv_connector_module_path == MODULE
    assert given.kv_connector == CONNECTOR  # another engine may be made of it
    assert connector_refusals(found) == []  # configured once more


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"kv_connector": "ExampleConnector"}, f"remove kv_transfer_config, or use {CONNECTOR}"),
        ({"kv_connector": "SimpleCPUOffloadConnector"}, "remove kv_transfer_config"),
        ({"kv_connector": "MultiConnector"}, "remove kv_transfer_config"),
        ({"kv_connector_module_path": "elsewhere"}, "remove kv_transfer_config"),
        ({"kv_role": "kv_producer"}, "use kv_both"),
        ({"extra": {"enable_cross_layers_blocks": "True"}}, "turn it off"),
        ({"extra": {"spec_name": "TieringOffloadingSpec"}}, "use CPUOffloadingSpec"),
    ],
)
def test_others_are_refused_by_name(changes: dict[str, Any], said: str) -> None:
    (reason,) = connector_refusals(config(**changes))
    assert said in reason


def request(tokens: int, computed: int, *, finished: bool) -> Any:
    return SimpleNamespace(
        num_tokens=tokens, num_computed_tokens=computed, is_finished=lambda: finished
    )


@pytest.mark.vllm
@pytest.mark.parametrize(
    ("tokens", "computed", "finished", "asked", "expected"),
    [
        (64, 63, True, 64, 63),  # vLLM issue 54193: the last token was sampled, not computed
        (64, 70, True, 64, 63),  # it was scheduled again, with drafts, before its end was known
        (64, 16, True, 64, 16),  # aborted in its prefill
        (64, 63, False, 64, 64),  # computed by the step that the job waits for
        (64, 32, True, 32, 32),
    ],
)
def test_rows_that_were_never_computed_are_not_stored(
    tokens: int, computed: int, finished: bool, asked: int, expected: int
) -> None:
    from nwor_compile.vllm_adapter.offload import leave_out_missing_rows

    status = SimpleNamespace(req=request(tokens, computed, finished=finished))
    assert leave_out_missing_rows(lambda _, count: count, status, asked) == expected


@pytest.mark.vllm
def test_layouts_are_those_whose_rows_follow_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector import (
        OffloadingConnector,
    )

    from nwor_compile.errors import ConfigError
    from nwor_compile.vllm_adapter.offload import NworOffloadingConnector

    def asks_for(layout: str | None) -> Any:
        monkeypatch.setattr(
            OffloadingConnector,
            "get_required_kvcache_layout",
            classmethod(lambda cls, vllm_config: layout),
        )
        return NworOffloadingConnector.get_required_kvcache_layout(None)

    given = (None, "HND", "NHD", "LBHNC", "LBNHC")
    assert [asks_for(layout) for layout in given] == [None, "NHD", "NHD", "LBNHC", "LBNHC"]
    with pytest.raises(ConfigError, match="BLHNC"):
        asks_for("BLHNC")


STAGE = {"mode": "stage"}
KINDS: dict[str, dict[str, Any]] = {
    "plain": {"nwor": None, "connector": False, "fault": None},
    "stage": {"nwor": STAGE, "connector": True, "fault": None},
    "stock": {"nwor": None, "connector": True, "fault": None},
    "before commit": {"nwor": STAGE, "connector": True, "fault": "before_commit"},
    "early": {"nwor": STAGE, "connector": True, "fault": "early"},
    "uncommitted": {"nwor": STAGE, "connector": True, "fault": "uncommitted"},
}


@pytest.fixture(scope="module")
def run(
    tmp_path_factory: pytest.TempPathFactory, compile_cache: str
) -> Iterator[Callable[[str], dict[str, Any]]]:
    """The report of an engine of a kind. All are started at once, two at a time."""
    folder = tmp_path_factory.mktemp("offload")

    def engine(kind: str) -> dict[str, Any]:
        options, out = folder / f"{kind}.json", folder / f"{kind}.out.json"
        options.write_text(json.dumps(KINDS[kind]))
        script = Path(__file__).with_name("offload_run.py")
        done = subprocess.run(
            [sys.executable, str(script), str(options), str(out)],
            env=environment(compile_cache, {}),
            capture_output=True, text=True, timeout=280, check=False,
        )  # fmt: skip
        assert out.exists(), done.stderr[-4000:]
        return dict(json.loads(out.read_text()))

    with concurrent.futures.ThreadPoolExecutor(2) as engines:
        reports = {kind: engines.submit(engine, kind) for kind in KINDS}
        yield lambda kind: reports[kind].result()


@pytest.mark.vllm
@pytest.mark.slow
def test_every_stored_block_is_what_its_tokens_make(run: Any) -> None:
    found = run("stage")
    stores = found["stores"]
    assert found["connector"] == OURS
    assert found["committed"] > 100
    assert stores["wrong_rows"] == 0
    assert stores["compared_rows"] == 32 * stores["stored_blocks"]
    assert stores["compared_generated"] > 100  # blocks that were speculated into
    assert stores["loaded_blocks"] > 0
    assert stores["waiting"] == 0
    # float32: rounding alone, and a row of another token is far away.
    assert stores["worst"] < 1e-4 < 0.1 < stores["another"]


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.parametrize("other", ["stock", "plain"])
def test_reloaded_prefixes_give_the_same_tokens(run: Any, other: str) -> None:
    mine, theirs = run("stage"), run(other)
    assert mine["filled"] == theirs["filled"]
    assert mine["again"] == theirs["again"]


@pytest.mark.vllm
@pytest.mark.slow
def test_a_step_stores_none_of_its_own_drafts(run: Any) -> None:
    """Copied between a step's forward and its commit, its own stores are right as well."""
    stores = run("before commit")["stores"]
    assert stores["wrong_rows"] == 0
    assert stores["compared_rows"] == run("stage")["stores"]["compared_rows"]


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.parametrize("fault", ["early", "uncommitted"])
def test_the_audit_finds_a_store_that_comes_too_soon(run: Any, fault: str) -> None:
    assert run(fault)["stores"]["wrong_rows"] > 50
