"""The worker class that a configured engine names in `worker_cls`."""

from __future__ import annotations

from vllm.v1.worker.cpu_worker import CPUWorker

from nwor_compile.vllm_adapter.cpu_backend import use
from nwor_compile.vllm_adapter.runner import RunnerHooks
from nwor_compile.vllm_adapter.settings import requested
from nwor_compile.vllm_adapter.staging_worker import StagingWorker


class NworCPUWorker(StagingWorker, CPUWorker):
    """vLLM's CPU worker with this package's attention backend and, in mode `stage`, with NWOR hooks
    on its model runner. Mode `off` keeps the backend, so that the two can be compared."""

    def init_device(self) -> None:
        """Make the runner, then hook it. Layers look their backend up later, in load_model."""
        use()
        super().init_device()
        settings = requested(self.vllm_config.additional_config)
        if settings is not None and settings.mode == "stage":
            self.nwor = RunnerHooks(self.model_runner, self.vllm_config, settings)
