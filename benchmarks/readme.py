"""Fills the README's quoted blocks from the records and examples; `--check` only compares.

After a new record: `python benchmarks/readme.py`.
What the tests run: `python benchmarks/readme.py --check`.
"""

from __future__ import annotations

import io
import json
import re
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from nwor_compile.bench import kernels_attention as attention
from nwor_compile.bench import kernels_rope as rope
from nwor_compile.bench import kernels_writes as writes
from nwor_compile.bench.engine_result import METRICS, EngineResult, Summary
from nwor_compile.bench.steps_plot import draw
from nwor_compile.bench.steps_record import Record
from nwor_compile.bench.steps_screen import tables
from nwor_compile.demo.result import DemoResult
from nwor_compile.demo.screen import Screen
from nwor_compile.demo.text import load_tokenizer

ROOT = Path(__file__).resolve().parent.parent
RECORDS = ROOT / "benchmarks" / "records"


def newest(prefix: str) -> Path:
    """The record of a kind with the latest date in its name.

    Raises FileNotFoundError naming the command that makes one.
    """
    return every(prefix)[-1]


def every(prefix: str) -> list[Path]:
    """The records of a kind, oldest first; raises as `newest`. Of a day, one whose name has more
    after the date is older."""
    found = sorted(RECORDS.glob(f"{prefix}-*.json"))
    if not found:
        raise FileNotFoundError(
            f"no {prefix} record in {RECORDS}; benchmarks/README.md has the command that makes one"
        )
    return found


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
_TAIL_WRITES = (writes.OPEN, writes.STAGE, writes.COMMIT, writes.STEP)
_ROPE = (rope.ALONE, rope.VLLM, rope.FUSED, rope.FUSED_TAIL)
_ATTENTION = (
    attention.FA3, attention.FA3_TAIL, attention.FUSED_TAIL, attention.FUSED_APART,
    attention.DIRECT_PATH,
)  # fmt: skip
# The staged path by the kernel that `auto` takes; records of before tail blocks have one alone.
_PATHS = {"FA3": attention.PATH_FA3, "fused": attention.PATH_FUSED, "": "staged path"}


def _gpu_table() -> str:
    path = newest("kernels-gpu")
    record = json.loads(path.read_text())
    machine = record["machine"]
    head = (
        f"On a GPU ({record['device']}, torch {machine['torch']}, Triton {record['triton']}, vLLM "
        f"{record['vllm']}, {machine['date']}; `{record['command']}`, `{path.relative_to(ROOT)}`), "
        "medians in µs over CUDA-graph replays that walk up to 32 layer caches, every competitor "
        "in one process; the record has spreads, floors and all points."
    )
    tables = (_attention_table, _writes_table, _rope_table, _scv_table, _moves_table)
    parts = [part for part in (table(record) for table in tables) if part]
    return "\n\n".join([head, *parts, _gpu_tests()])


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table without the columns that nothing was measured for."""
    cells = list(rows)
    kept = [i for i in range(len(columns)) if any(row[i] for row in cells)]
    lines = [[columns[i] for i in kept], ["---"] * len(kept)]
    lines += [[row[i] for i in kept] for row in cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


_RATIOS = ("ratio", "ratio_in_rope")
_ABOUT_TAIL = (
    "Attention, a layer. FA3 is vLLM's FlashAttention 3 at its best split count, over the written "
    "cache or, with the same bits, over prefix and tail blocks; fused is this package's kernel "
    "over the same blocks, verify the same with drafts in memory apart. A path is attention with "
    "all KV writing (FA3 path: direct write; staged path: open, stage and commit too, with the "
    "kernel that `auto` takes). Ratios are FA3 path over staged path, with a stage launch of its "
    "own and with staging in RoPE's kernel (what that path takes beyond RoPE alone); below 1 the "
    "staged path is slower:"
)
_ABOUT_APART = (
    "Attention, a layer. **This record is older than staging in tail blocks**, which is what vLLM "
    "runs with: its staged path is this package's kernel with drafts in memory apart, with a stage "
    "launch of its own. FA3 is vLLM's FlashAttention 3 at its best split count; a path is "
    "attention with all KV writing. A ratio below 1 means that the staged path is slower:"
)


def _attention_table(record: dict[str, Any]) -> str:
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in record["attention"]:
        groups.setdefault(row["group"], []).append(row)
    first, *others = groups
    rows = []
    for row in groups[first]:
        note = ", aliased" if row["aliased"] else ""
        took = [_median(row["runs"].get(name)) for name in _ATTENTION]
        chosen = row.get("chosen", "")
        path = _median(row["runs"].get(_PATHS[chosen]))
        ratios = [_ratio(row.get(name)) for name in _RATIOS]
        rows.append([row["case"] + note, f"{row['floor_us']:.1f}", *took, chosen, path, *ratios])
    columns = ("batch × context", "floor", *_ATTENTION, "`auto`", "staged path", "ratio", "in RoPE")
    tail = any(row.get("chosen") for row in record["attention"])
    about = _ABOUT_TAIL if tail else _ABOUT_APART
    ends = ("points", "lowest ratio", "highest ratio", "lowest in RoPE", "highest in RoPE")
    summary = _table(ends, filter(None, (_ends(name, groups[name]) for name in others)))
    return f"{about}\n\n{_table(columns, rows)}\n\nThe other points:\n\n{summary}"


def _ends(group: str, rows: list[dict[str, Any]]) -> list[str]:
    """A line of a group of points: the lowest ratios and the highest, and where they are."""
    cells = []
    for name in _RATIOS:
        known = [row for row in rows if row.get(name) is not None]
        known.sort(key=lambda row: float(row[name]))
        ends = (known[0], known[-1]) if known else ()
        cells += [f"{_ratio(row[name])} ({row['case']})" for row in ends] or ["", ""]
    counted = sum(row.get("ratio") is not None for row in rows)
    return [f"{group} ({counted})", *cells] if counted else []


def _writes_table(record: dict[str, Any]) -> str:
    ratio = "vLLM's writes over step"
    rows = (
        [
            str(row["rows"]),
            *(_median(row["runs"].get(name)) for name in (*_WRITES, *_TAIL_WRITES)),
            _ratio(row["ratios"].get("step")),
        ]
        for row in record["writes"]
    )
    about = "Writes, a step of 32 layers, by token rows."
    if any(writes.STEP in row["runs"] for row in record["writes"]):
        about += (
            " The columns of tail blocks have spans of one certain row and four drafts, and commit "
            "about 30 %:"
        )
    return f"{about}\n\n{_table(('rows', *_WRITES, *_TAIL_WRITES, ratio), rows)}"


def _rope_table(record: dict[str, Any]) -> str:
    if not record.get("rope"):
        return ""
    rows = (
        [
            str(row["rows"]), *(_median(row["runs"].get(name), 2) for name in _ROPE),
            _ratio(row["ratio"]), _ratio(row["tail_ratio"]),
        ]
        for row in record["rope"]
    )  # fmt: skip
    columns = ("rows", *_ROPE, "ratio", "ratio, tail blocks")
    bytes_ratio = record["rope"][0]["bytes_ratio"]
    about = (
        "RoPE with staging in its kernel, a layer; ratios are to RoPE alone, and staging (in "
        f"memory apart) moves {bytes_ratio:.2f} times its bytes:"
    )
    return f"{about}\n\n{_table(columns, rows)}"


def _scv_table(record: dict[str, Any]) -> str:
    device, host = list(record["scv"][0]["device"]), list(record["scv"][0]["host"])
    rows = (
        [
            str(row["requests"]),
            *(_median(row["device"][n]) if n in row["device"] else "" for n in device),
            *(_median(row["host"][n]) for n in host),
        ]
        for row in record["scv"]
    )  # fmt: skip
    columns = ("requests", *device, *(f"host: {name}" for name in host))
    about = "SCV and commit over 32 layers, device time and host time of the call:"
    return f"{about}\n\n{_table(columns, rows)}"


def _moves_table(record: dict[str, Any]) -> str:
    if not record.get("moves"):
        return ""
    rows = (
        [
            f"{row['drafts']}, {row['accepted']:.0%}", f"{row['direct']:.1f}",
            f"{row['staged']:.1f}", f"{row['parts']['copied in']:.1f}", f"{row['in_rope']:.1f}",
            f"{row['cache_rows_direct']:.1f}", f"{row['cache_rows_staged']:.1f}",
        ]
        for row in record["moves"]
    )  # fmt: skip
    columns = (
        "drafts, accepted", "direct", "staged", "of which copied into the tail block",
        "staged in RoPE", "direct, to the cache", "staged, to the cache",
    )  # fmt: skip
    about = (
        "Rows of K/V read and written with tail blocks, a request, step and layer, counted (on "
        "average over where in its block the first draft lies). Staging moves more than direct "
        "writes, not less; fewer rows reach the engine's blocks:"
    )
    return f"{about}\n\n{_table(columns, rows)}"


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _median(spread: dict[str, Any] | None, digits: int = 1) -> str:
    return "" if spread is None else f"{spread['median']:.{digits}f}"


def _gpu_tests() -> str:
    """How the GPU tests went, plainly and under the memory checker."""
    rows = []
    for prefix, how in (
        ("gpu-tests-kernels", ""), ("gpu-tests-windows", ""), ("gpu-stress", ""),
        ("gpu-tail-stress", ""),
        ("gpu-tests-captures", ""),
        ("gpu-window-memcheck", "memcheck"),
        ("gpu-decide-memcheck", "memcheck"),
        ("gpu-window-racecheck", "racecheck"),
        ("gpu-rope-memcheck", "memcheck"),
        ("gpu-memcheck", "memcheck, of kernels older than tail blocks"),
    ):  # fmt: skip
        path = newest(prefix)
        record = json.loads(path.read_text())
        counts = ", ".join(f"{number} {outcome}" for outcome, number in record["counts"].items())
        note = f"; {record['note']}" if set(record["counts"]) - {"passed", "skipped"} else ""
        date = record["date"].partition("T")[0]
        rows.append(
            [f"`{record['command']}`", how, counts + note, date, f"`{path.relative_to(ROOT)}`"]
        )
    head = ["command", "under compute-sanitizer", "outcome", "date", "record"]
    return f"GPU tests on the same device:\n\n{_table(head, rows)}"


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


def steps_block() -> str:
    """Decode steps of vLLM engines on a GPU, stock against staged, and how many cases are equal."""
    texts, shown, settled = [], set(), set()
    for path in reversed(every("vllm-gpu-steps")):
        record = Record.model_validate_json(path.read_text())
        fresh = (row for row in record.rows if row.key not in settled)
        new = [row for row in fresh if row.status != "void" or row.key not in shown]
        if not new:
            continue
        shown.update(row.key for row in new)
        settled.update(row.key for row in new if row.status != "void")
        table = tables(record.model_copy(update={"rows": new}))[0]
        kept = [i for i, n in enumerate(table.head) if n not in ("spread", "wall", "tokens/s")]
        rows = [[row[index] for index in kept] for row in table.rows]
        before = "" if not texts else "Points that this record lacks, or has as void: "
        texts.append(
            f"{before}`{record.commands[-1]}` ({record.device}, vLLM {record.versions['vllm']}, "
            f"`{path.relative_to(ROOT)}`):\n\n{_table([table.head[i] for i in kept], rows)}"
        )
    texts.append(_varied_steps())
    path = newest("vllm-gpu-matrix")
    cases = Counter(row["state"] for row in json.loads(path.read_text())["rows"])
    counts = ", ".join(f"{number} {state}" for state, number in cases.most_common())
    texts.append(
        f"Support matrix, engine cases of that run: {counts} (`{path.relative_to(ROOT)}`; "
        "[docs/vllm-cuda.md](docs/vllm-cuda.md) has each, and what was run or refused since)."
    )
    return "\n\n".join(texts)


def draw_steps(path: Path) -> None:
    """The picture of the same points: of each its newest row that is not void."""
    records = [Record.model_validate_json(each.read_text()) for each in every("vllm-gpu-steps")]
    rows = {row.key: row for record in records for row in record.rows if row.status == "ok"}
    draw(records[-1].model_copy(update={"rows": list(rows.values())}), path)


# Where two have the same point, the later run's is shown, but no void of few pairs in the place of
# a figure.
ENOUGH_PAIRS = 20
VARIED_STEPS = (
    "vllm-gpu-acceptance-steps", "vllm-gpu-varied-steps", "vllm-gpu-ranks-steps",
    "vllm-gpu-dims-steps", "vllm-gpu-host-steps", "vllm-gpu-large-steps",
)  # fmt: skip


def _varied_steps() -> str:
    """Ratios of the runs in which one thing is otherwise, a configuration a row."""
    paths = [path for prefix in VARIED_STEPS for path in every(prefix)]
    found: dict[str, dict[str, str]] = {}
    for path in paths:
        for row in Record.model_validate_json(path.read_text()).rows:
            ((mode, ratios),) = row.ratios.items()
            graphs = {n for windows in row.windows.values() for w in windows for n in w.graphs}
            middle = row.middle(mode)
            void = "void" if middle is None else f"void: {middle}"
            cell = str(ratios["step_ms"]) if row.status == "ok" else void
            cell += "" if graphs == {"FULL"} else ", no graph"
            cells = found.setdefault(row.configuration, {})
            point = f"{row.batch}x{row.context}"
            enough = row.status == "ok" or (middle is not None and middle.pairs >= ENOUGH_PAIRS)
            if enough or cells.get(point, "void").startswith("void"):
                cells[point] = cell
    points = sorted(
        {point for cells in found.values() for point in cells},
        key=lambda point: [int(number) for number in point.split("x")][::-1],
    )
    rows = [[name, *(cells.get(p, "") for p in points)] for name, cells in sorted(found.items())]
    names = ", ".join(f"`{path.relative_to(ROOT)}`" for path in paths)
    return (
        "One thing otherwise (`k`, the acceptance length, an fp8 cache, two GPUs, 1B and 8B dims), "
        "and points of the grid that were not run then, stock "
        "/ stage at requests x tokens; void: pairs of windows differ by more than 3 %, and the "
        "figure is the middle pair's (of several runs the last, but no void of fewer than "
        f"{ENOUGH_PAIRS} pairs in the place of another; {names}):"
        f"\n\n{_table(['configuration', *points], rows)}"
    )


BLOCKS: dict[str, Callable[[], str]] = {
    "demo": demo_block,
    "example": example_block,
    "engine": engine_block,
    "measured": measured_block,
    "steps": steps_block,
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
    """Fill README.md and draw its steps; with `--check` fail if it is out of date."""
    path = ROOT / "README.md"
    old = path.read_text()
    new = filled(old)
    if check and new != old:
        raise SystemExit("README.md is out of date: run python benchmarks/readme.py")
    if not check:
        path.write_text(new)
        draw_steps(ROOT / "docs" / "pictures" / "vllm-steps.png")


if __name__ == "__main__":
    typer.run(main)
