"""The worker class that a configured engine names in `worker_cls`."""

from __future__ import annotations

from typing import Any

from vllm.v1.worker.cpu_worker import CPUWorker

from nwor_compile.vllm_adapter.cpu_backend import use
from nwor_compile.vllm_adapter.metrics_worker import PublishesMetrics
from nwor_compile.vllm_adapter.runner import RunnerHooks
from nwor_compile.vllm_adapter.settings import requested


class NworCPUWorker(PublishesMetrics, CPUWorker):
    """vLLM's CPU worker with this package's attention backend and, in mode `stage`, with NWOR hooks
    on its model runner. Mode `off` keeps the backend, so that the two can be compared."""

    nwor: RunnerHooks | None = None

    def init_device(self) -> None:
        """Make the runner, then hook it. Layers look their backend up later, in load_model."""
        use()
        super().init_device()
        settings = requested(self.vllm_config.additional_config)
        if settings is not None and settings.mode == "stage":
            self.nwor = RunnerHooks(self.model_runner, self.vllm_config, settings)

    def compile_or_warm_up_model(self) -> Any:
        """Warm up, then make sure that the rewritten graph is what ran."""
        if self.nwor is not None:
            self.nwor.warm_up()
        result = super().compile_or_warm_up_model()
        if self.nwor is not None:
            self.nwor.warmed_up()
        return result

    def shutdown(self) -> None:
        """Take this engine's caches out of the registry: the next engine of this process may get
        the same memory."""
        if self.nwor is not None:
            self.nwor.close()
        super().shutdown()

    def nwor_metrics(self) -> dict[str, Any]:
        """The window's counters; for `LLM.collective_rpc("nwor_metrics")`. Empty in mode `off`."""
        return {} if self.nwor is None else self.nwor.metrics()
