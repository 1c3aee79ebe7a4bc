"""Fills the README's quoted blocks from the records and examples; `--check` only compares.

After a new record: `python benchmarks/readme.py`.
What the tests run: `python benchmarks/readme.py --check`.
"""

from __future__ import annotations

import io
import json
import re
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from nwor_compile.bench.engine_result import METRICS, EngineResult, Summary
from nwor_compile.demo.result import DemoResult
from nwor_compile.demo.screen import Screen
from nwor_compile.demo.text import load_tokenizer

ROOT = Path(__file__).resolve().parent.parent
RECORDS = ROOT / "benchmarks" / "records"


def newest(prefix: str) -> Path:
    """The record of a kind with the latest date in its name.

    Raises FileNotFoundError naming the command that makes one.
    """
    found = sorted(RECORDS.glob(f"{prefix}-*.json"))
    if not found:
        raise FileNotFoundError(
            f"no {prefix} record in {RECORDS}; benchmarks/README.md has the command that makes one"
        )
    return found[-1]


def demo_block() -> str:
    """The final table and verdict of the recorded demo run, as the demo prints them."""
    path = newest("demo-cpu")
    result = DemoResult.model_validate_json(path.read_text())
    text = io.StringIO()
    screen = Screen(Console(file=text, width=100, no_color=True), load_tokenizer())
    screen.table(result)
    screen.verdict(result)
    lines = [line.rstrip() for line in text.getvalue().strip("\n").splitlines()]
    return "\n".join(["```text", *lines, "```", "", f"(from `{path.relative_to(ROOT)}`)"])


def example_block() -> str:
    """The marked lines of examples/own_model.py."""
    source = (ROOT / "examples" / "own_model.py").read_text()
    part = re.search(r"# readme: begin\n(.*?) *# readme: end", source, re.DOTALL)
    if part is None:
        raise ValueError("examples/own_model.py has no part between '# readme: begin' and 'end'")
    return f"```python\n{textwrap.dedent(part.group(1)).rstrip()}\n```"


def measured_block() -> str:
    """CPU figures of the core benchmark, and the GPU figures of the kernels benchmark."""
    return f"{_core_table()}\n\n{_gpu_table()}"


def _core_table() -> str:
    path = newest("core-cpu")
    record = json.loads(path.read_text())
    machine, compiled = record["machine"], record["compile"]
    lines = [
        f"On a CPU ({machine['cpu']}, {machine['cores']} cores, torch {machine['torch']}, "
        f"{machine['date']}; `{record['command']}`, `{path.relative_to(ROOT)}`): the pass takes "
        f"{compiled['share']['median']:.2%} of `torch.compile`'s time on a "
        f"{compiled['layers']}-layer model. A window against direct writes, medians:",
        "",
        "| requests × drafts | direct, µs | window, µs | ratio (quartiles) |",
        "|---|---|---|---|",
    ]
    for row in record["windows"]:
        ratio = row["ratio"]
        lines.append(
            f"| {row['requests']} × {row['drafts']} | {row['direct_us']['median']:.0f} | "
            f"{row['window_us']['median']:.0f} | {ratio['median']:.2f} ({ratio['p25']:.2f} to "
            f"{ratio['p75']:.2f}) |"
        )
    return "\n".join(lines)


# What the README quotes of the kernels' record; the rest is in the record.
_WRITES = (
    "32 x vLLM's reshape_and_cache_flash", "32 x reshape_and_cache", "32 x stage_kv",
    "commit_kv, 30% accepted", "commit_kv, 100% accepted",
)  # fmt: skip
_ATTENTION = ("FA3", "verify", "FA3 path", "staged path")


def _gpu_table() -> str:
    path = newest("kernels-gpu")
    record = json.loads(path.read_text())
    machine = record["machine"]
    lines = [
        f"On a GPU ({record['device']}, torch {machine['torch']}, Triton {record['triton']}, vLLM "
        f"{record['vllm']}, {machine['date']}; `{record['command']}`, `{path.relative_to(ROOT)}`), "
        "medians in µs over CUDA-graph replays that walk up to 32 layer caches, every competitor "
        "in one process; the record has spreads, floors and all points. Writes, a step of 32 "
        "layers:",
        "",
        f"| rows | {' | '.join(_WRITES)} |",
        "|---" * (len(_WRITES) + 1) + "|",
    ]
    lines += [
        f"| {row['rows']} | " + " | ".join(_median(row["runs"].get(n)) for n in _WRITES) + " |"
        for row in record["writes"]
    ]
    lines += [
        "",
        "Attention, a layer. FA3 is vLLM's FlashAttention 3 at its best split count; a path is "
        "attention with all KV writing (FA3: direct write; staged: stage, and a layer's part of "
        "the commit). A ratio below 1 means that the staged path is slower:",
        "",
        f"| batch × context | floor | {' | '.join(_ATTENTION)} | ratio of paths |",
        "|---" * (len(_ATTENTION) + 3) + "|",
    ]
    first = record["attention"][0]["group"]
    for row in record["attention"]:
        if row["group"] != first:
            continue
        times = " | ".join(_median(row["runs"].get(name)) for name in _ATTENTION)
        note = ", aliased" if row["aliased"] else ""
        lines.append(f"| {row['case']}{note} | {row['floor_us']:.1f} | {times} | {_ratio(row)} |")
    lines += ["", "The other points, by their ratio of paths:", ""]
    lines += ["| points | lowest | highest |", "|---|---|---|", *_other_groups(record, first)]
    lines += ["", "SCV and commit over 32 layers, device time and host time of the call:", ""]
    device, host = list(record["scv"][0]["device"]), list(record["scv"][0]["host"])
    names = [*device, *(f"host: {name}" for name in host)]
    lines += [f"| requests | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for row in record["scv"]:
        cells = [row["device"][n] for n in device] + [row["host"][n] for n in host]
        lines.append(f"| {row['requests']} | " + " | ".join(map(_median, cells)) + " |")
    return "\n".join([*lines, "", _gpu_tests()])


def _ratio(row: dict[str, Any]) -> str:
    return "" if row["ratio"] is None else f"{row['ratio']:.2f}"


def _other_groups(record: dict[str, Any], first: str) -> list[str]:
    """A line a group of points: the lowest ratio and the highest, and where they are."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in record["attention"]:
        if row["group"] != first and row["ratio"] is not None:
            groups.setdefault(row["group"], []).append(row)
    lines = []
    for group, rows in groups.items():
        rows.sort(key=lambda row: row["ratio"])
        ends = (f"{_ratio(row)} ({row['case']})" for row in (rows[0], rows[-1]))
        lines.append(f"| {group} ({len(rows)}) | {' | '.join(ends)} |")
    return lines


def _median(spread: dict[str, Any] | None) -> str:
    return "" if spread is None else f"{spread['median']:.1f}"


def _gpu_tests() -> str:
    """How the GPU tests went, plainly and under the memory checker."""
    parts = []
    for prefix, how in (("gpu-tests", ""), ("gpu-memcheck", " under compute-sanitizer memcheck")):
        path = newest(prefix)
        record = json.loads(path.read_text())
        counts = ", ".join(f"{number} {outcome}" for outcome, number in record["counts"].items())
        parts.append(
            f"`{record['command']}`{how}: {counts} ({record['date']}, `{path.relative_to(ROOT)}`)"
        )
    return "GPU tests on the same device: " + "; ".join(parts) + "."


ENGINE_SPEED = ("step_ms", "token_ms", "tokens_per_second")
ENGINE_COLUMNS = (
    "accepted", "rows written (direct)",
    "KiB to the cache (direct)", "KiB via staging", "staging memory, KiB", "fallbacks",
    "tokens as `off`",
)  # fmt: skip


def engine_block() -> str:
    """vLLM's CPU engine, by NWOR and SCV mode."""
    path = newest("engine-cpu")
    result = EngineResult.model_validate_json(path.read_text())
    first = next(engine for engine in result.engines if engine.machine)
    machine = first.machine
    assert machine is not None  # noqa: S101  just asked for
    loads = [engine.machine.load_average[0] for engine in result.engines if engine.machine]
    # A machine that does several things at once times the others.
    speed = ENGINE_SPEED if max(loads) <= 2 * machine.cores else ()
    columns = ["NWOR-SCV", *(METRICS[name].title for name in speed), *ENGINE_COLUMNS]
    about_speed = "× is the ratio to `off` and its quartiles"
    if not speed:
        about_speed = "Times are in the record only: the machine was too busy for them to say much"
    options = result.options
    lines = [
        f"vLLM {first.vllm} on a CPU ({machine.cpu}, {machine.cores} cores at a load of "
        f"{min(loads):.0f} to {max(loads):.0f}, torch {machine.torch}, {machine.date}), "
        f"{result.target}, {options['requests']} requests a batch, {options['draft_tokens']} "
        f"drafts; `{result.command}`, "
        f"`{path.relative_to(ROOT)}`. Medians over {options['repeats']} repeats that take turns; "
        f"rows and bytes are those of one repeat. {about_speed}:",
        "",
        f"| {' | '.join(columns)} |",
        "|---" * len(columns) + "|",
    ]
    return "\n".join([*lines, *(_engine_row(result, each, speed) for each in result.summaries)])


def _engine_row(result: EngineResult, summary: Summary, speed: Sequence[str]) -> str:
    def cell(name: str) -> str:
        text = f"{summary.metrics[name].median:{METRICS[name].form}}"
        ratio = summary.ratios.get(name)
        if ratio is None:
            return text
        return f"{text}, ×{ratio.median:.2f} ({ratio.p25:.2f} to {ratio.p75:.2f})"

    def kib(name: str) -> str:
        known = name in summary.counters
        return f"{summary.counters[name] / summary.repeats / 1024:.0f}" if known else "-"

    rows = [f"{summary.metrics[name].median:.0f}" for name in ("rows_written", "rows_direct")]
    memory = next(e.staging_memory_bytes for e in result.engines if e.label == summary.label) or 0
    cells = [
        f"`{summary.label}`", *map(cell, speed),
        f"{summary.metrics['acceptance'].median:.1%}", f"{rows[0]} ({rows[1]})",
        f"{kib('cache_bytes')} ({kib('direct_bytes')})" if summary.counters else "-",
        kib("staging_bytes"), f"{memory / 1024:.0f}", str(summary.counters.get("fallbacks", "-")),
        summary.same_tokens_as_off or "-",
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


BLOCKS: dict[str, Callable[[], str]] = {
    "demo": demo_block,
    "example": example_block,
    "engine": engine_block,
    "measured": measured_block,
}


def filled(readme: str) -> str:
    """The README with every block made anew."""
    for name, make in BLOCKS.items():
        pattern = rf"(<!-- {name}:begin -->\n).*?(<!-- {name}:end -->)"
        if not re.search(pattern, readme, re.DOTALL):
            raise ValueError(f"README.md has no <!-- {name}:begin --> ... <!-- {name}:end -->")
        block = make()

        def put(match: re.Match[str], block: str = block) -> Any:
            return f"{match.group(1)}{block}\n{match.group(2)}"

        readme = re.sub(pattern, put, readme, flags=re.DOTALL)
    return readme


def main(check: Annotated[bool, typer.Option(help="compare, write nothing")] = False) -> None:
    """Fill README.md, or fail with `--check` if it is out of date."""
    path = ROOT / "README.md"
    old = path.read_text()
    new = filled(old)
    if check and new != old:
        raise SystemExit("README.md is out of date: run python benchmarks/readme.py")
    if not check:
        path.write_text(new)


if __name__ == "__main__":
    typer.run(main)
