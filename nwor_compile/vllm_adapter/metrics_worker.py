"""The worker's part of the metrics: rank 0 publishes its counters after each step."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nwor_compile.vllm_adapter.metrics import PREFIX_VARIABLE
from nwor_compile.vllm_adapter.metrics_file import SnapshotWriter

if TYPE_CHECKING:
    from vllm.v1.worker.gpu_worker import Worker as _Worker
else:
    _Worker = object

log = logging.getLogger("nwor_compile")


class PublishesMetrics(_Worker):
    """Mixed into a worker of vLLM's that has its hooks in `nwor`.

    Tensor-parallel ranks commit the same rows, so rank 0 alone publishes: nothing is multiplied.
    Its bytes are those of its own share of the heads.
    """

    nwor: Any
    _writer: SnapshotWriter | None = None

    def compile_or_warm_up_model(self) -> Any:
        """From here on the metrics exist, all zero."""
        result = super().compile_or_warm_up_model()
        if self.rank == 0 and self._window() is not None and PREFIX_VARIABLE not in os.environ:
            log.warning(
                "NWOR: this worker has no %s (is it on another node than the server?); its "
                "counters are not on /metrics, only in collective_rpc('nwor_metrics')",
                PREFIX_VARIABLE,
            )
        self._publish()
        return result

    def sample_tokens(self, *args: Any, **kwargs: Any) -> Any:
        """A window is committed in here."""
        result = super().sample_tokens(*args, **kwargs)
        self._publish()
        return result

    def _window(self) -> Any:
        return None if self.nwor is None else self.nwor.window

    def _publish(self) -> None:
        window = self._window()
        if window is None and self._writer is not None:
            # Refused after warm-up, and running direct: without a file it is not taken for active.
            self._writer.path.unlink(missing_ok=True)
            self._writer = None
        if window is None or self.rank != 0 or PREFIX_VARIABLE not in os.environ:
            return
        if self._writer is None or self._writer.window is not window:
            parallel = self.vllm_config.parallel_config
            self._writer = SnapshotWriter(
                Path(os.environ[PREFIX_VARIABLE]),
                window,
                engine=getattr(parallel, "data_parallel_index", parallel.data_parallel_rank),
                model=str(self.vllm_config.model_config.served_model_name),
            )
        self._writer.publish()
