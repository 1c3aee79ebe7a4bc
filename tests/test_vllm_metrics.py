"""How the counters leave a vLLM engine, without vLLM: the file, the collector, the report."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from prometheus_client import REGISTRY, CollectorRegistry
from prometheus_client.multiprocess import MultiProcessCollector
from torch.utils._python_dispatch import TorchDispatchMode
from window_support import ALL, SOME, Rig, rig

from nwor_compile.errors import WindowInputError, WindowOrderError
from nwor_compile.metrics import GAUGES, Metrics
from nwor_compile.vllm_adapter import metrics, metrics_file
from nwor_compile.vllm_adapter.metrics_file import PAGE, SnapshotWriter, read, read_all
from nwor_compile.vllm_adapter.staging_worker import StagingWorker


@pytest.fixture
def prefix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """This process has an engine that was asked to stage."""
    where = tmp_path / "engine"
    monkeypatch.setenv(metrics.PREFIX_VARIABLE, str(where))
    monkeypatch.setattr(metrics._collector, "model", "tiny")
    return where


@pytest.fixture
def staging() -> Iterator[Rig]:
    with rig(layers=3) as r:
        yield r


def writer(prefix: Path, r: Rig, engine: int = 0) -> SnapshotWriter:
    made = SnapshotWriter(prefix, r.window, engine=engine, model="tiny")
    made.show()
    return made


def scrape() -> dict[str, dict[tuple[str, ...], float]]:
    registry = CollectorRegistry()
    registry.register(metrics._collector)
    found: dict[str, dict[tuple[str, ...], float]] = {}
    for family in registry.collect():
        for sample in family.samples:
            found.setdefault(sample.name, {})[tuple(sample.labels.values())] = sample.value
    return found


def test_the_file_holds_the_window_as_of_the_last_commit(prefix: Path, staging: Rig) -> None:
    file = writer(prefix, staging)
    assert read(file.path).metrics().nwor_windows == 0
    staging.run(SOME)
    file.publish_host()
    assert read(file.path).metrics().nwor_windows == 1
    assert read(file.path).metrics() == staging.window.metrics()
    staging.window.tensors.counters.zero_()
    file.publish()
    assert read(file.path).metrics().nwor_windows == 0


def test_the_report_survives_the_window(prefix: Path) -> None:
    with rig(layers=3) as r:
        file = writer(prefix, r)
        r.run(SOME)
        file.publish_host()
        expected = r.window.metrics()
    del file
    assert metrics.last_report() == expected


def test_a_new_window_starts_from_zero(prefix: Path) -> None:
    for _ in range(2):
        with rig(layers=3) as r:
            file = writer(prefix, r)
            assert read(file.path).metrics().nwor_windows == 0
            r.run(SOME)
    report = metrics.last_report()
    assert report is not None
    assert report.nwor_windows == 1


def test_the_collector_serves_every_metric_with_vllms_labels(prefix: Path, staging: Rig) -> None:
    file = writer(prefix, staging)
    staging.run(SOME)
    file.publish_host()
    served = scrape()
    assert served.pop("vllm:nwor_active") == {("tiny",): 1}
    values = staging.window.metrics().model_dump()
    assert len(served) == len(values)
    for name, value in values.items():
        samples = served[f"vllm:{name}" if name in GAUGES else f"vllm:{name}_total"]
        if isinstance(value, list):
            assert samples == {("tiny", "0", str(k)): v for k, v in enumerate(value)}
        else:
            assert samples == {("tiny", "0"): value}


def test_data_parallel_engines_are_told_apart_and_the_report_adds_them(
    prefix: Path, staging: Rig
) -> None:
    with rig(layers=3) as other:
        writer(prefix, staging, 0)
        writer(prefix, other, 1)
        for r in (staging, other):
            r.run(SOME)
        other.run(ALL)
    assert scrape()["vllm:nwor_total_staged_total"] == {("tiny", "0"): 9, ("tiny", "1"): 18}
    report = metrics.last_report()
    assert report is not None
    assert report.nwor_total_staged == 27
    assert report.nwor_acceptance_rate == report.nwor_total_committed / 27


def test_an_engine_that_was_asked_to_stage_and_does_not_is_visible(prefix: Path) -> None:
    settings = {"nwor": {"mode": "stage", "strict": False}}
    served = SimpleNamespace(served_model_name="tiny")
    config = SimpleNamespace(
        additional_config=settings, model_config=served, parallel_config=SimpleNamespace()
    )
    metrics.serve(config, refused=["enforce_eager", "no speculative_config"])
    assert scrape() == {
        "vllm:nwor_active": {("tiny",): 0},
        "vllm:nwor_refused_total": {("tiny",): 2},
    }
    assert metrics.last_report() is None


def test_nothing_is_served_where_staging_was_not_asked_for(
    prefix: Path, staging: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor are the counters of the engine before."""
    writer(prefix, staging)
    monkeypatch.delenv("VLLM_NWOR_MODE", raising=False)
    metrics.serve(SimpleNamespace(additional_config={"nwor": {"mode": "off"}}))
    assert scrape() == {}
    assert metrics.last_report() is None


def test_the_collector_survives_what_vllm_does_at_engine_start() -> None:
    """vLLM unregisters every collector that has a `_name` beginning with `vllm:`."""
    assert not hasattr(metrics._collector, "_name")


def test_registering_twice_is_registering_once(prefix: Path, staging: Rig) -> None:
    writer(prefix, staging)
    for _ in range(2):
        metrics._register()
    names = [family.name for family in REGISTRY.collect() if family.name.startswith("vllm:")]
    assert len(names) == len(set(names)) == len(Metrics.model_fields) + 1


def test_several_api_servers_serve_it_too(prefix: Path, staging: Rig, tmp_path: Path) -> None:
    """Each scrape of theirs makes a registry with nothing but a MultiProcessCollector."""
    writer(prefix, staging)
    metrics._register()
    registry = CollectorRegistry()
    MultiProcessCollector(registry, path=str(tmp_path))
    assert registry.get_sample_value("vllm:nwor_active", {"model_name": "tiny"}) == 1


def test_a_file_is_whole_or_not_there(prefix: Path, staging: Rig) -> None:
    file = writer(prefix, staging)
    assert len(read_all(prefix)) == 1
    assert file.path.stat().st_size > PAGE
    assert [path.name for path in prefix.parent.iterdir()] == ["engine-0.nwor"]


def test_readers_find_it_when_it_is_shown_with_the_counters_of_then(
    prefix: Path, staging: Rig
) -> None:
    file = SnapshotWriter(prefix, staging.window, engine=0, model="tiny")
    staging.run(SOME)
    assert read_all(prefix) == []
    staging.window.tensors.counters.zero_()
    file.show()
    (found,) = read_all(prefix)
    assert found.metrics().nwor_windows == 0


def test_closing_writes_what_an_aborted_window_counted_and_lets_the_window_go(
    prefix: Path, staging: Rig
) -> None:
    file = writer(prefix, staging)
    staging.begin()
    staging.window.abort()
    expected = staging.window.metrics()
    assert expected.nwor_certain_rows > 0
    file.close(keep=True)
    assert metrics.last_report() == expected
    assert staging.window.tensors.mirrors == []
    staging.run(SOME)
    assert metrics.last_report() == expected


class Worker:
    """As much of vLLM's worker as the mix-in builds on; its warm-up and its step run a window."""

    def __init__(self, r: Rig, rank: int) -> None:
        self.rig, self.rank = r, rank
        self.nwor: Any = Hooks(r)
        self.vllm_config = SimpleNamespace(
            parallel_config=SimpleNamespace(data_parallel_index=3, data_parallel_rank=0),
            model_config=SimpleNamespace(served_model_name="tiny"),
        )

    fails = False

    @torch.inference_mode()
    def compile_or_warm_up_model(self) -> float:
        self.rig.run(SOME)
        if self.fails:
            raise RuntimeError("no memory")
        return 1.5

    def sample_tokens(self, grammar: Any) -> str:
        self.rig.run(SOME)
        return f"sampled {grammar}"

    def shutdown(self) -> None:
        self.rig.window.close()


class Hooks:
    """As much of `RunnerHooks`; vLLM's warm-up refuses the window if `refuses`."""

    def __init__(self, r: Rig, *, refuses: bool = False) -> None:
        self.window: Any = r.window
        self.refuses = refuses
        self.mirrors = 0
        self.calls: list[str] = []

    def warm_up(self, others: Callable[[Any], None]) -> None:
        self.calls.append("warm_up")
        others(self.window)
        self.mirrors = len(self.window.tensors.mirrors)  # graphs of a GPU are captured now

    def warmed_up(self) -> None:
        self.calls.append("warmed_up")
        self.window.tensors.counters.zero_()
        if self.refuses:
            self.window = None

    def metrics(self) -> dict[str, int]:
        return {"nwor_windows": 1}

    def close(self) -> None:
        self.calls.append("close")


class MixedWorker(StagingWorker, Worker):
    nwor: Any

    def _call_kernels(self, window: Any) -> None:
        assert window is self.nwor.window
        self.nwor.calls.append("kernels")


def test_rank_0_alone_publishes(prefix: Path, staging: Rig) -> None:
    """Every tensor-parallel rank commits the same rows: they count once."""
    with rig(layers=3) as other:
        workers = [MixedWorker(r, rank) for rank, r in enumerate((staging, other))]
        for worker in workers:
            assert worker.compile_or_warm_up_model() == 1.5
        assert [worker.nwor.mirrors for worker in workers] == [1, 0]
        assert workers[1].sample_tokens("x") == "sampled x"
        assert [each.metrics().nwor_windows for each in read_all(prefix)] == [0]
        workers[0].sample_tokens(None)
        (found,) = read_all(prefix)
        assert found.engine == 3
        assert found.metrics() == staging.window.metrics()
        for worker in workers:
            worker.shutdown()
        assert metrics.last_report() == staging.window.metrics()


def test_a_worker_warms_its_hooks_up_and_closes_them(prefix: Path, staging: Rig) -> None:
    worker = MixedWorker(staging, 0)
    worker.compile_or_warm_up_model()
    assert worker.nwor_metrics() == {"nwor_windows": 1}
    worker.shutdown()
    assert worker.nwor.calls == ["warm_up", "kernels", "warmed_up", "close"]
    assert worker._writer is None  # it holds the window, and so the caches


@pytest.mark.parametrize("where", ["warm_up", "vllm", "warmed_up"])
def test_an_engine_that_did_not_start_leaves_no_file(
    prefix: Path, staging: Rig, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = MixedWorker(staging, 0)

    def fail(*given: object) -> None:
        raise RuntimeError("no memory")

    if where == "vllm":
        worker.fails = True
    else:
        monkeypatch.setattr(worker.nwor, where, fail)
    with pytest.raises(RuntimeError, match="no memory"):
        worker.compile_or_warm_up_model()
    assert list(prefix.parent.iterdir()) == []
    assert metrics.last_report() is None


def test_caches_made_anew_are_followed(prefix: Path, staging: Rig) -> None:
    worker = MixedWorker(staging, 0)
    worker.compile_or_warm_up_model()
    worker.sample_tokens(None)
    with rig(layers=3) as r:
        worker.rig, worker.nwor.window = r, r.window
        for windows in (1, 2):
            worker.sample_tokens(None)
            (found,) = read_all(prefix)
            assert found.metrics() == r.window.metrics()
            assert found.metrics().nwor_windows == windows
    assert staging.window.tensors.mirrors == []
    worker.nwor.window = None
    worker.rig = staging
    worker.sample_tokens(None)
    assert read_all(prefix) == []


def test_a_worker_without_hooks_is_vllms(prefix: Path, staging: Rig) -> None:
    worker = MixedWorker(staging, 0)
    worker.nwor = None
    assert worker.compile_or_warm_up_model() == 1.5
    assert worker.sample_tokens("x") == "sampled x"
    assert worker.nwor_metrics() == {}
    assert read_all(prefix) == []
    worker.shutdown()


def test_what_warm_up_refuses_is_not_taken_for_active(prefix: Path, staging: Rig) -> None:
    worker = MixedWorker(staging, 0)
    worker.nwor = Hooks(staging, refuses=True)
    worker.compile_or_warm_up_model()
    assert read_all(prefix) == []
    assert worker.sample_tokens("x") == "sampled x"
    assert scrape()["vllm:nwor_active"] == {("tiny",): 0}


def test_a_worker_without_the_variable_says_so(
    staging: Rig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv(metrics.PREFIX_VARIABLE, raising=False)
    MixedWorker(staging, 0).compile_or_warm_up_model()
    assert "collective_rpc('nwor_metrics')" in caplog.text


class Operations(TorchDispatchMode):
    """Names of the ops that ran, and whether each copy may be waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        non_blocking = func is torch.ops.aten.copy_.default and True in args[2:]
        self.names.append(func.name() + " non_blocking" * non_blocking)
        return func(*args, **(kwargs or {}))


def test_publishing_waits_for_nothing(prefix: Path, staging: Rig) -> None:
    """One copy in the commit that nobody waits for; no number is read back, and the rest is
    Python's."""
    file = writer(prefix, staging)
    with Operations() as seen:
        staging.run(SOME)
    mirrored = [name for name in seen.names if name == "aten::copy_ non_blocking"]
    assert len(mirrored) == 1
    with Operations() as seen:
        file.publish_host()
    assert seen.names == []


def test_a_mirror_fits_and_comes_before_the_graphs(staging: Rig) -> None:
    window = staging.window
    size = window.tensors.counters.numel()
    for wrong in (torch.zeros(size + 1, dtype=torch.int64), torch.zeros(size)):
        with pytest.raises(WindowInputError, match=rf"expected int64 \[{size}\] on the host"):
            window.mirror_counters(wrong)
    right = torch.zeros(size, dtype=torch.int64)
    staging.begin()
    with pytest.raises(WindowOrderError, match="a window is open"):
        window.mirror_counters(right)
    window.abort()
    window.validator.graphs[1] = None  # type: ignore[assignment]
    with pytest.raises(WindowOrderError, match="before warm_up"):
        window.mirror_counters(right)
    window.validator.graphs.clear()
    assert window.tensors.mirrors == []
    strided = torch.zeros(2 * size, dtype=torch.int64)[::2]
    with pytest.raises(WindowInputError, match=r"contiguous, got .* strides \(2,\)"):
        window.mirror_counters(strided)
    window.mirror_counters(right)
    with pytest.raises(WindowOrderError, match="this window has a mirror"):
        window.mirror_counters(torch.zeros_like(right))
    window.validator.graphs[1] = None  # type: ignore[assignment]
    window.stop_mirror()
    assert window.tensors.mirrors == []
    assert window.validator.graphs == {}  # one of them would go on copying
    window.mirror_counters(right)


def test_a_mapped_file_is_registered_for_as_long_as_it_is_mapped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or CUDA would refuse the next engine's file, where it is mapped at the same address."""
    registered: dict[int, int] = {}

    class Cudart:
        def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
            registered[address] = size
            return 0

        def cudaHostUnregister(self, address: int) -> int:
            del registered[address]
            return 0

    monkeypatch.setattr(torch.cuda, "cudart", Cudart)
    path = tmp_path / "file"
    path.write_bytes(bytes(64))
    words = np.memmap(path, np.int64, "r+", shape=(8,))
    unpin: Any = metrics_file._pin(words)
    assert registered == {words.ctypes.data: 64}
    assert not unpin.atexit
    unpin()
    assert registered == {}
    unpin = metrics_file._pin(words)
    tensor = torch.from_numpy(words)[2:]
    del words
    gc.collect()
    assert len(registered) == 1
    del tensor
    gc.collect()
    assert registered == {}


def test_a_file_made_in_inference_mode_is_written_outside_of_it(prefix: Path, staging: Rig) -> None:
    with torch.inference_mode():
        writer(prefix, staging)
    staging.run(SOME)
    (found,) = read_all(prefix)
    assert found.metrics().nwor_windows == 1
