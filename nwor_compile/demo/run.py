"""`nwor demo`: the runs, their comparison, and the command."""

from __future__ import annotations

import time
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Literal

import typer
from pydantic import ValidationError
from rich.console import Console

import nwor_compile
from nwor_compile.demo.checks import all_checks
from nwor_compile.demo.compiled import Runner
from nwor_compile.demo.drafters import Drafter, ModelDrafter, NgramDrafter
from nwor_compile.demo.engine import Engine, Mode, Settings
from nwor_compile.demo.model import PLAIN, STAGED, Llama
from nwor_compile.demo.paged import PagedCache
from nwor_compile.demo.process import environment, one_thread, peak_rss, warnings_once
from nwor_compile.demo.result import (
    CompileSummary,
    DemoOptions,
    DemoResult,
    PassSummary,
    RunResult,
    Scenario,
)
from nwor_compile.demo.screen import Screen
from nwor_compile.demo.text import (
    held_out_prompts,
    load_tokenizer,
    make_requests,
    weights_folder,
)
from nwor_compile.ops.staging import executions

BLOCK_SIZE = 16
CHUNK = 24  # prompt tokens of one request in a step: prompts take several steps
SHOWN = 2  # requests whose text is shown


class Demo:
    """The models, compiled once, and the runs over them."""

    def __init__(self, options: DemoOptions, screen: Screen, prompts: list[list[int]]) -> None:
        self.options, self.screen, self.prompts = options, screen, prompts
        folder = weights_folder()
        self.target = Llama.load(folder / "target", STAGED if options.eager else PLAIN)
        self.draft = Llama.load(folder / "draft")
        self.run_target = Runner(self.target, nwor=True, eager=options.eager)
        self.run_draft = Runner(self.draft, nwor=False, eager=options.eager)
        longest = max(map(len, prompts)) + options.max_new_tokens + options.draft_tokens
        self.width = -(-longest // BLOCK_SIZE)
        if self.width * BLOCK_SIZE > self.target.config.max_position_embeddings:
            raise ValueError(
                f"{longest} positions are more than the model's "
                f"{self.target.config.max_position_embeddings}: lower max_new_tokens"
            )

    def cache(self, model: Llama) -> PagedCache:
        """An empty cache, of one shape for all runs."""
        return PagedCache(
            model.config,
            num_blocks=self.width * self.options.requests + 4,
            block_size=BLOCK_SIZE,
            table_width=self.width,
            seed=self.options.seed,
        )

    def compile(self) -> PassSummary:
        """Compile what the runs need; say what the pass did."""
        known = {id(report) for report in nwor_compile.last_reports()}
        rows = self.options.requests
        context = nullcontext(print) if self.options.eager else self.screen.compiling()
        with context as show:
            for runner, name, drafts in (
                (self.run_target, "target", self.options.draft_tokens),
                (self.run_draft, "draft", 0),
            ):
                if name == "draft" and self.options.drafter == "ngram":
                    continue
                if not self.options.eager:
                    show(f"compiling the {name} model")
                runner.warm_up(self.cache(runner.model), rows, drafts)
        reports = [r for r in nwor_compile.last_reports() if id(r) not in known]
        rewritten = [d for report in reports for d in report.rewritten]
        summary = PassSummary(
            writes_rewritten=len(rewritten),
            readers_rewritten=sum(len(d.readers) for d in rewritten),
            staged=[f"{d.node} ({d.op}), read by {', '.join(d.readers)}" for d in rewritten],
            refused=[f"{d.node}: {d.reason}" for report in reports for d in report.refused],
            seconds=sum(report.seconds for report in reports),
            report="\n".join(str(report) for report in reports),
        )
        self._announce(summary)
        return summary

    def _announce(self, summary: PassSummary) -> None:
        if self.options.eager:
            self.screen.say("not compiled: the staged ops are called by hand, no pass ran")
            return
        self.screen.say(
            f"compiled in {self.run_target.compile_seconds:.1f} s (target) and "
            f"{self.run_draft.compile_seconds:.1f} s (draft)"
        )
        self.screen.say(
            f"NWOR pass, {summary.seconds * 1e3:.0f} ms: {summary.writes_rewritten} cache writes "
            f"and {summary.readers_rewritten} readers rewritten, {len(summary.refused)} refused"
        )
        for line in summary.staged + summary.refused:
            self.screen.say(f"  {line}")

    def run(
        self, mode: Mode, drafter: str = "", temperature: float = 0.0, title: str = ""
    ) -> RunResult:
        """One run over fresh requests and caches; with a title its text is shown."""
        options = self.options
        settings = Settings(
            rows=options.requests,
            max_drafts=options.draft_tokens,
            chunk=CHUNK,
            temperature=temperature,
            seed=options.seed,
            scv=options.scv,
            poison=options.poison if mode is Mode.STAGED else "off",
        )
        shown = self.screen.transcript(title, self.prompts[:SHOWN]) if title else nullcontext(None)
        with shown as observer:
            engine = Engine(
                self.run_target, self.target, self.cache(self.target),
                self._drafter(drafter, temperature), mode, settings, observer,
            )  # fmt: skip
            return engine.run(make_requests(self.prompts, options.max_new_tokens))

    def _drafter(self, name: str, temperature: float) -> Drafter | None:
        if name == "ngram":
            return NgramDrafter(self.options.draft_tokens)
        if name == "model":
            return ModelDrafter(
                self.run_draft,
                self.cache(self.draft),
                max_drafts=self.options.draft_tokens,
                temperature=temperature,
                seed=self.options.seed,
            )
        return None

    def scenarios(self) -> list[tuple[str, float]]:
        """Drafter and temperature of each comparison."""
        name, warm = self.options.drafter, self.options.temperature
        greedy = [("model", 0.0)] if name != "ngram" else [("ngram", 0.0)]
        warmer = [(greedy[0][0], warm)] if warm > 0 else []
        return greedy + warmer + ([("ngram", 0.0)] if name == "both" else [])


def run_demo(options: DemoOptions, console: Console | None = None) -> DemoResult:
    """Run everything, print it, and return every figure. Runs torch on one thread meanwhile."""
    start = time.perf_counter()
    screen = Screen(console or Console(), load_tokenizer(weights_folder()))
    prompts = held_out_prompts(screen.tokenizer, options.requests)
    with one_thread(), warnings_once(screen):
        demo = Demo(options, screen, prompts)
        rewrite = demo.compile()
        staged_before = executions()
        plain = demo.run(Mode.PLAIN)
        scenarios = []
        for index, (drafter, temperature) in enumerate(demo.scenarios()):
            direct = demo.run(Mode.DIRECT, drafter, temperature)
            title = f"staged, {drafter} drafter, greedy" if index == 0 else ""
            staged = demo.run(Mode.STAGED, drafter, temperature, title)
            scenario = Scenario(
                drafter=drafter, temperature=temperature, direct=direct, staged=staged
            )
            scenarios.append(scenario)
            screen.say(
                f"{scenario.name}: {direct.emitted} tokens in {direct.steps} steps "
                f"(without speculation {plain.steps})"
            )
        stale = demo.run(Mode.NAIVE, demo.scenarios()[0][0]) if options.show_stale else None
    result = DemoResult(
        options=options,
        scenarios=scenarios,
        plain=plain,
        stale=stale,
        rewrite=rewrite,
        compiled=CompileSummary(
            eager=options.eager,
            target_graphs=demo.run_target.graphs,
            draft_graphs=demo.run_draft.graphs,
            target_seconds=demo.run_target.compile_seconds,
            draft_seconds=demo.run_draft.compile_seconds,
            staged_executions=executions() - staged_before,
        ),
        seconds=time.perf_counter() - start,
        peak_rss_bytes=peak_rss(),
        environment=environment(),
    )
    result.checks = all_checks(result)
    screen.stale(result)
    screen.table(result)
    screen.verdict(result)
    return result


def demo(
    drafter: Annotated[
        Literal["model", "ngram", "both"], typer.Option(help="Who proposes the draft tokens.")
    ] = "both",
    draft_tokens: Annotated[int, typer.Option(help="Most drafts of a request in a step.")] = 4,
    temperature: Annotated[
        float, typer.Option(help="Sample at this temperature too; 0 decodes greedily alone.")
    ] = 0.7,
    requests: Annotated[int, typer.Option(help="Prompts served together.")] = 4,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate for each.")] = 56,
    seed: Annotated[int, typer.Option(help="Of the sampled numbers and the cache's layout.")] = 0,
    show_stale: Annotated[
        bool, typer.Option("--show-stale", help="Also stage naively, invisible to attention.")
    ] = False,
    scv: Annotated[
        Literal["off", "graph", "adaptive"], typer.Option(help="How acceptance is validated.")
    ] = "graph",
    poison: Annotated[
        Literal["off", "nan", "large"],
        typer.Option(help="Fill the open draft slots of the staged runs until their commit."),
    ] = "off",
    eager: Annotated[
        bool, typer.Option("--eager", help="Do not compile (no C++ compiler at hand).")
    ] = False,
    json: Annotated[Path | None, typer.Option(help="Write every figure to this file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw rows and bytes into this file.")] = None,
) -> None:
    """Speculative decoding of real text: direct cache writes against staged ones."""
    try:
        options = DemoOptions(
            drafter=drafter, draft_tokens=draft_tokens, temperature=temperature, requests=requests,
            max_new_tokens=max_new_tokens, seed=seed, show_stale=show_stale, scv=scv,
            poison=poison, eager=eager,
        )  # fmt: skip
    except ValidationError as error:
        first = error.errors()[0]
        name = "--" + str(first["loc"][0]).replace("_", "-")
        raise typer.BadParameter(f"{name}: {first['msg']}, got {first['input']!r}") from None
    result = run_demo(options)
    if json is not None:
        json.write_text(result.model_dump_json(indent=2) + "\n")
    if plot is not None:
        from nwor_compile.demo.plot import draw

        draw(result, plot)
    if not result.ok:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(demo)
