"""The command `nwor`. What a command needs is imported when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

app = typer.Typer(
    name="nwor",
    help="No-Write-On-Reject KV caching for speculative decoding.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)


class _EngineByDefault(TyperGroup):
    """`nwor bench` alone, or with options only, is `nwor bench engine`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args or (args[0].startswith("-") and args[0] != "--help"):
            args = ["engine", *args]
        return super().parse_args(ctx, args)


bench = typer.Typer(
    help="Measure, with a baseline in the same run. Without a command: engine.",
    cls=_EngineByDefault,
    add_completion=False,
)
app.add_typer(bench, name="bench")

# Commands whose own parser takes the arguments: theirs are not known until they are imported.
_PASS_THROUGH = {"allow_extra_args": True, "ignore_unknown_options": True}


def _show_version(wanted: bool) -> None:
    if wanted:
        from nwor_compile import __version__

        typer.echo(f"nwor-compile {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """No-Write-On-Reject KV caching for speculative decoding."""


@app.command("demo", add_help_option=False, context_settings=_PASS_THROUGH)
def demo_command(ctx: typer.Context) -> None:
    """Speculative decoding of real text: direct writes against staged ones."""
    try:
        from nwor_compile.demo.run import demo
    except ImportError as error:
        typer.echo(
            f"nwor demo cannot start: {error}. Reinstall the package with its dependencies "
            "(`pip install nwor-compile`); `nwor doctor` says what is missing.",
            err=True,
        )
        raise typer.Exit(1) from error
    inner = typer.Typer(add_completion=False, pretty_exceptions_show_locals=False)
    inner.command()(demo)
    inner(args=list(ctx.args), prog_name="nwor demo")


@app.command("doctor")
def doctor_command(
    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODULE:FUNCTION",
            help="A factory that returns (model, example_inputs): what would be staged in it?",
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="Do not compile the sample model with Inductor.")
    ] = False,
    vllm: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="What would a vLLM engine of this model stage? `tiny`: this package's models.",
        ),
    ] = None,
    speculative_config: Annotated[
        str | None, typer.Option(metavar="JSON", help="With --vllm: as for `vllm serve`.")
    ] = None,
    additional_config: Annotated[
        str | None, typer.Option(metavar="JSON", help="With --vllm: as for `vllm serve`.")
    ] = None,
    start_engine: Annotated[
        bool, typer.Option("--start-engine", help="With --vllm: start it, with random weights.")
    ] = False,
) -> None:
    """Versions, compiler, devices, ops, settings, and what would be staged or refused and why.

    Exit code 1, with advice, when something that is needed is missing.
    """
    from rich.console import Console

    from nwor_compile.doctor import EngineQuestion, diagnose, show

    engine = None
    if vllm is not None:
        engine = EngineQuestion(vllm, speculative_config, additional_config, start_engine)
    found = diagnose(model, compile_sample=not quick, engine=engine)
    if json:
        typer.echo(found.model_dump_json(indent=2))
    else:
        show(found, Console())
    raise typer.Exit(0 if found.healthy else 1)


@bench.command("core")
def bench_core(
    json: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write every figure to a file.")
    ] = None,
    layers: Annotated[int, typer.Option(min=1, help="Layers of both benchmarks.")] = 32,
    compiles: Annotated[int, typer.Option(min=1, help="Compilations of the model.")] = 3,
    repeats: Annotated[int, typer.Option(min=3, help="Repeats of each window size.")] = 30,
) -> None:
    """On the CPU: the pass's share of compile time, and a window against direct writes."""
    from rich.console import Console

    from nwor_compile.bench.core import run, show

    record = run(layers=layers, compiles=compiles, repeats=repeats)
    show(record, Console())
    if json is not None:
        json.parent.mkdir(parents=True, exist_ok=True)
        json.write_text(record.model_dump_json(indent=2) + "\n")


@bench.command("kernels")
def bench_kernels(
    json: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write every figure to a file.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE", help="Draw the ratios (.png, .svg).")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A few points of each group.")] = False,
    only: Annotated[
        str | None,
        typer.Option(
            metavar="GROUP", help="`writes`, `rope`, `scv`, `attention`, or a group of its points."
        ),
    ] = None,
) -> None:
    """On a CUDA GPU: the staged path beside vLLM's kernels, if vLLM is installed, and the floor."""
    from rich.console import Console

    from nwor_compile.bench import kernels
    from nwor_compile.bench.kernels_screen import show

    console = Console()
    options = [f"--json {json.name}" if json else "", f"--plot {plot.name}" if plot else ""]
    options += ["--quick" if quick else "", f"--only '{only}'" if only else ""]
    try:
        record = kernels.run(
            quick=quick,
            only=only,
            command=" ".join(["nwor bench kernels", *filter(None, options)]),
            progress=lambda text: console.print(text, style="dim"),
            save=lambda record: None if json is None else kernels.write(record, json),
        )
    except RuntimeError as error:
        typer.echo(f"{error}", err=True)
        raise typer.Exit(1) from error
    show(record, console)
    if plot is not None:
        from nwor_compile.bench.kernels_plot import draw

        draw(record, plot)


@bench.command("engine", add_help_option=False, context_settings=_PASS_THROUGH)
def bench_engine_command(ctx: typer.Context) -> None:
    """In vLLM: every NWOR x SCV mode of one model, side by side."""
    from nwor_compile.bench.engine import bench_engine

    inner = typer.Typer(add_completion=False, pretty_exceptions_show_locals=False)
    inner.command()(bench_engine)
    inner(args=list(ctx.args), prog_name="nwor bench engine")


@bench.command("steps", add_help_option=False, context_settings=_PASS_THROUGH)
def bench_steps_command(ctx: typer.Context) -> None:
    """In vLLM on a GPU: time of a decode step, stock against NWOR, by batch and context."""
    from nwor_compile.bench.steps import bench_steps

    inner = typer.Typer(add_completion=False, pretty_exceptions_show_locals=False)
    inner.command()(bench_steps)
    inner(args=list(ctx.args), prog_name="nwor bench steps")


if __name__ == "__main__":
    app()
