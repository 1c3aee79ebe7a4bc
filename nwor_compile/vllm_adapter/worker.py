"""The worker class that a configured engine names in `worker_cls`."""

from __future__ import annotations

from typing import Any

from vllm.v1.worker.cpu_worker import CPUWorker

from nwor_compile.vllm_adapter.cpu_backend import use
from nwor_compile.vllm_adapter.runner import RunnerHooks

# Layers look their backend up when the model is built, in this process.
use()


class NworCPUWorker(CPUWorker):
    """vLLM's CPU worker with NWOR hooks on its model runner."""

    def init_device(self) -> None:
        """Make the runner, then hook it."""
        super().init_device()
        self.nwor = RunnerHooks(self.model_runner, self.vllm_config)

    def compile_or_warm_up_model(self) -> Any:
        """Warm up, then make sure that the rewritten graph is what ran."""
        result = super().compile_or_warm_up_model()
        self.nwor.check_executed()
        return result

    def nwor_metrics(self) -> dict[str, Any]:
        """The window's counters; for `LLM.collective_rpc("nwor_metrics")`."""
        return self.nwor.metrics()
