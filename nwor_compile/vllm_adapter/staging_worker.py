"""What the CPU worker and the GPU worker share: the hooks' life, and rank 0's counters."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from nwor_compile.vllm_adapter.metrics import PREFIX_VARIABLE
from nwor_compile.vllm_adapter.metrics_file import SnapshotWriter

if TYPE_CHECKING:
    from vllm.v1.worker.gpu_worker import Worker as _Worker

    from nwor_compile.vllm_adapter.runner import RunnerHooks
    from nwor_compile.window import Window
else:
    _Worker = object

log = logging.getLogger("nwor_compile")


class StagingWorker(_Worker):
    """Mixed into a worker of vLLM's that hooks its model runner in `init_device`.

    nwor: the hooks; None where nothing is staged.

    Tensor-parallel ranks commit the same rows, so rank 0 alone publishes: nothing is multiplied.
    Its bytes are those of its own share of the heads.
    """

    nwor: RunnerHooks | None = None
    _writer: SnapshotWriter | None = None

    def compile_or_warm_up_model(self) -> Any:
        """Capture the commit's graphs, warm up, then make sure that the rewritten graph is what
        ran. From here on the metrics exist, all zero."""
        hooks = self.nwor
        if hooks is None:
            return super().compile_or_warm_up_model()
        self._writer = self._open_metrics(hooks)
        try:
            hooks.warm_up(self._call_kernels)
            result = super().compile_or_warm_up_model()
            hooks.warmed_up()
        except BaseException:
            self._close_metrics(keep=False)
            raise
        self._show_metrics(hooks)
        return result

    def _call_kernels(self, window: Window) -> None:
        """Call the kernels of the window's layers, to be compiled with its own."""

    def sample_tokens(self, *args: Any, **kwargs: Any) -> Any:
        """A window is committed in here."""
        result = super().sample_tokens(*args, **kwargs)
        writer, hooks = self._writer, self.nwor
        if writer is not None and hooks is not None:
            if writer.window is not hooks.window:  # the caches were made anew
                self._close_metrics(keep=False)
                self._writer = self._open_metrics(hooks)
                self._show_metrics(hooks)
            else:
                writer.publish_host()
        return result

    def shutdown(self) -> None:
        """Stage nothing from here on: the next engine of this process may get the same memory."""
        try:
            if self.nwor is not None:
                self._close_metrics(keep=self.nwor.window is not None)
        finally:
            if self.nwor is not None:
                self.nwor.close()
            super().shutdown()

    def nwor_metrics(self) -> dict[str, Any]:
        """The window's counters; for `LLM.collective_rpc("nwor_metrics")`. Empty in mode `off`."""
        return {} if self.nwor is None else self.nwor.metrics()

    def _open_metrics(self, hooks: RunnerHooks) -> SnapshotWriter | None:
        window = hooks.window
        if window is None or self.rank != 0:
            return None
        if PREFIX_VARIABLE not in os.environ:
            log.warning(
                "NWOR: this worker has no %s (is it on another node than the server?); its "
                "counters are not on /metrics, only in collective_rpc('nwor_metrics')",
                PREFIX_VARIABLE,
            )
            return None
        parallel = self.vllm_config.parallel_config
        return SnapshotWriter(
            Path(os.environ[PREFIX_VARIABLE]),
            window,
            engine=getattr(parallel, "data_parallel_index", parallel.data_parallel_rank),
            model=str(self.vllm_config.model_config.served_model_name),
        )

    @torch.inference_mode()
    def _show_metrics(self, hooks: RunnerHooks) -> None:
        # vLLM's warm-up samples in inference mode, and the tensors made there can only be written
        # in it.
        if self._writer is None:
            return
        if hooks.window is None:  # refused after warm-up, and running direct
            self._close_metrics(keep=False)
        else:
            self._writer.show()

    @torch.inference_mode()
    def _close_metrics(self, *, keep: bool) -> None:
        if self._writer is not None:
            self._writer.close(keep=keep)
            self._writer = None
