"""`nwor bench engine` with the real CPU engine: the seeds' command line, shortened, of NWOR off and
stage, with synthetic acceptance and then resumed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pool import environment

from nwor_compile.demo.text import WEIGHTS

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.usefixtures("a_core"),
]

ARGUMENTS = (
    "--scenario", "short", "--requests", "3", "--batches", "1", "--draft-tokens", "4",
    "--temperature", "0.7", "--max-model-len", "128", "--nwor-modes", "off,stage",
    "--scv-modes", "graph",
    "--repeats", "2", "--max-tokens", "12", "--dtype", "float32",
    "--synthetic-acceptance-rates", "1,0.5,0.5,0",
)  # fmt: skip
# As the seeds set them; the modes are named twice there, and the options count.
VARIABLES = {
    "TARGET_MODEL": str(WEIGHTS / "target"),
    "DRAFT_MODEL": str(WEIGHTS / "draft"),
    "VLLM_NWOR_MODE": "stage",
    "VLLM_SCV_MODE": "off",
}


def bench(cache: str, folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "nwor_compile.cli", "bench", "engine", *ARGUMENTS]
    return subprocess.run(
        [*command, "--output", str(folder), *more],
        capture_output=True, text=True, timeout=1100, check=False,
        env=environment(cache, {"environment": VARIABLES}),
    )  # fmt: skip


@pytest.fixture(scope="module")
def run(
    tmp_path_factory: pytest.TempPathFactory, compile_cache: str
) -> tuple[Path, dict[str, Any], str]:
    folder = tmp_path_factory.mktemp("bench") / "out"
    done = bench(compile_cache, folder)
    logs = "".join(path.read_text()[-3000:] for path in folder.glob("logs/*"))
    assert done.returncode == 0, done.stdout + done.stderr + logs
    return folder, json.loads((folder / "result.json").read_text()), done.stdout


def test_both_engines_measured_every_row_in_turns(run: Any) -> None:
    _, result, text = run
    assert [(e["label"], e["status"]) for e in result["engines"]] == [
        ("off", "ok"), ("stage-graph", "ok"),
    ]  # fmt: skip
    assert [row["status"] for row in result["rows"]] == ["ok"] * 4
    assert result["engines"][0]["interleaved_with"] == ["stage-graph"]
    assert "ms per step" in text


def test_staged_writes_one_row_a_token_and_changes_no_token(run: Any) -> None:
    _, result, _ = run
    off, stage = result["summaries"]
    assert stage["same_tokens_as_off"] == "2 of 2 batches"
    assert stage["acceptance_per_position"] == off["acceptance_per_position"]
    counters = stage["counters"]
    assert counters["staged"] > counters["committed"] > 0
    assert counters["fallbacks"] == counters["error_windows"] == 0
    assert counters["cache_bytes"] < counters["direct_bytes"]
    for row in result["rows"]:
        figures = row["figures"]
        assert figures["tokens"] == 3 * 12
        assert figures["scheduled_rows"] > 3 * (32 + 12)  # prompts, tokens, rejected drafts
        if figures["nwor"] is not None:
            assert figures["nwor"]["staged"] == figures["draft_tokens"]
            assert figures["nwor"]["committed"] == figures["accepted_tokens"]
    assert stage["ratios"]["step_ms"]["repeats"] == 2
    assert result["engines"][1]["staging_memory_bytes"] > 0


def test_synthetic_acceptance_is_what_was_asked_for(run: Any) -> None:
    """The first draft always, the last one never; the two between stand or fall together."""
    _, result, text = run
    for summary in result["summaries"]:
        first, second, third, last = summary["acceptance_per_position"]
        assert (first, last) == (1.0, 0.0)
        assert 0 < second == third < 1
    assert any("CPU sampler is repaired" in note for note in result["notes"])
    assert "VLLM_NWOR_MODE is not used here" in text


def test_a_resumed_run_starts_no_engine(run: Any, compile_cache: str) -> None:
    folder, result, _ = run
    done = bench(compile_cache, folder, "--resume")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "starting vLLM" not in done.stdout
    again = json.loads((folder / "result.json").read_text())
    assert again["rows"] == result["rows"]
    assert {engine["status"] for engine in again["engines"]} == {"resumed"}
