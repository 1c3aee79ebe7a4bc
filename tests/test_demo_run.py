"""The demo from end to end: compiled, what it prints, what it writes, and how it fails."""

import io
import json

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from nwor_compile.demo.checks import all_checks
from nwor_compile.demo.plot import CACHE_ROWS, MOVED_ROWS, draw, per_token
from nwor_compile.demo.result import DemoOptions
from nwor_compile.demo.run import demo, run_demo

app = typer.Typer()
app.command()(demo)


@pytest.fixture(scope="module")
def compiled():
    """One small compiled run: (result, printed text)."""
    out = io.StringIO()
    options = DemoOptions(requests=2, max_new_tokens=14, show_stale=True, poison="nan")
    result = run_demo(options, Console(file=out, width=100))
    return result, out.getvalue()


def test_compiled_run_passes_every_check(compiled):
    result, _ = compiled
    assert [check for check in result.checks if not check.ok] == []
    assert len(result.checks) > 20


def test_compiled_run_was_rewritten_once_and_fell_back_never(compiled):
    result, _ = compiled
    assert (result.rewrite.writes_rewritten, result.rewrite.readers_rewritten) == (4, 4)
    assert result.rewrite.refused == []
    assert (result.compiled.target_graphs, result.compiled.draft_graphs) == (1, 1)
    assert result.compiled.recompiles == 0
    assert result.compiled.staged_executions > 0
    assert sum(s.direct.fallbacks + s.staged.fallbacks for s in result.scenarios) == 0


def test_compiled_run_keeps_rejected_rows_out(compiled):
    result, _ = compiled
    assert sum(s.direct.audit.rejected_rows for s in result.scenarios) > 0
    assert sum(s.staged.audit.rejected_rows for s in result.scenarios) == 0
    assert all(s.staged.rows_per_token == 1.0 for s in result.scenarios)
    assert result.scenarios[0].staged.tokens == result.plain.tokens


def test_stale_run_differs(compiled):
    result, text = compiled
    assert result.stale is not None
    assert result.stale.tokens != result.plain.tokens
    assert result.stale.audit.wrong_rows > 0
    assert "naive staging: " in text


def test_screen_without_a_terminal_is_plain_text(compiled):
    _, text = compiled
    assert "\x1b" not in text
    assert "4 cache writes and 4 readers rewritten, 0 refused" in text
    assert "[-rejected draft-]" in text
    assert "compiled graphs: 1 target, 1 draft, 0 recompiles" in text
    assert "peak memory" in text
    assert text.rstrip().splitlines()[-1].startswith("PASS: ")


def test_json_has_every_figure(compiled):
    result, _ = compiled
    data = json.loads(result.model_dump_json())
    assert data["ok"] is True
    assert data["environment"]["torch"]
    assert data["peak_rss_bytes"] < 2 * 2**30
    assert data["compiled"]["recompiles"] == 0
    staged = data["scenarios"][0]["staged"]
    for name in ("tokens", "acceptance", "acceptance_per_position", "rows_per_token",
                 "cache_bytes", "staging_bytes", "fallbacks", "seconds"):  # fmt: skip
        assert staged[name] not in (None, [], {}), name
    assert staged["audit"]["rejected_rows"] == 0
    assert staged["metrics"]["nwor_total_staged"] == staged["drafted"]
    assert data["scenarios"][0]["direct"]["metrics"]["nwor_certain_rows"] > 0


def test_a_broken_run_fails_its_checks(compiled):
    result, _ = compiled
    broken = result.model_copy(deep=True)
    broken.scenarios[0].staged.tokens[0][3] += 1
    broken.scenarios[1].staged.audit.rejected_rows = 1
    broken.compiled.target_graphs = 2
    failed = [check.name for check in all_checks(broken) if not check.ok]
    assert any("token ids equal" in name for name in failed)
    assert any("no rejected row" in name for name in failed)
    assert any("no recompile" in name for name in failed)


def test_plot_is_drawn(compiled, tmp_path):
    result, _ = compiled
    path = tmp_path / "plot.svg"
    draw(result, path)
    assert path.stat().st_size > 1000


def test_cost_model_at_its_corners():
    assert per_token(CACHE_ROWS["direct"], 4, 0.0) == 5
    assert per_token(CACHE_ROWS["direct"], 4, 1.0) == 1
    assert per_token(CACHE_ROWS["staged"], 4, 0.3) == 1
    # In rows moved, staging costs more than direct writes at any acceptance but 0.
    assert per_token(MOVED_ROWS["staged"], 4, 0.0) == per_token(MOVED_ROWS["direct"], 4, 0.0)
    assert per_token(MOVED_ROWS["staged"], 4, 0.5) > per_token(MOVED_ROWS["direct"], 4, 0.5)
    fused = MOVED_ROWS["staged, fused into RoPE"]
    assert per_token(fused, 4, 0.4) < per_token(MOVED_ROWS["direct"], 4, 0.4)


def test_command_writes_its_files_and_exits_zero(tmp_path):
    files = [tmp_path / "out.json", tmp_path / "out.png"]
    arguments = ["--eager", "--requests", "2", "--max-new-tokens", "16", "--temperature", "0"]
    arguments += ["--drafter", "model", "--json", str(files[0]), "--plot", str(files[1])]
    outcome = CliRunner().invoke(app, arguments)
    assert outcome.exit_code == 0, outcome.output
    assert json.loads(files[0].read_text())["ok"] is True
    assert files[1].stat().st_size > 1000


def test_command_exits_one_when_a_check_fails(monkeypatch):
    from nwor_compile.demo import run

    monkeypatch.setattr(run, "all_checks", lambda result: [run_check()])
    arguments = ["--eager", "--requests", "1", "--max-new-tokens", "4", "--temperature", "0"]
    outcome = CliRunner().invoke(app, [*arguments, "--drafter", "ngram"])
    assert outcome.exit_code == 1
    assert "FAIL" in outcome.output


def run_check():
    from nwor_compile.demo.result import Check

    return Check(name="planted", ok=False, detail="of this test")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--draft-tokens", "0"], "--draft-tokens"),
        (["--temperature", "-1"], "--temperature"),
        (["--max-new-tokens", "1"], "--max-new-tokens"),
    ],
)
def test_a_bad_option_is_named(arguments, message):
    outcome = CliRunner().invoke(app, arguments)
    assert outcome.exit_code == 2
    assert message in outcome.output
