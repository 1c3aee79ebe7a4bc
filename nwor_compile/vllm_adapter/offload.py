"""vLLM's OffloadingConnector with caches that tail blocks fit, and without a row that is missing.

See NOTE [offload]. vLLM makes it by name in the scheduler's process and in each worker's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector import OffloadingConnector

from nwor_compile.errors import ConfigError
from nwor_compile.vllm_adapter import patches

# Layouts whose rows follow each other, for those that the connector asks for: the names of 0.26
# and of later versions.
ROWS_FOLLOW = {"HND": "NHD", "LBHNC": "LBNHC"}


class NworOffloadingConnector(OffloadingConnector):
    """Stores what was computed, from caches in which a token's row is contiguous."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        if self.connector_scheduler is not None:
            patches.wrap(
                self.connector_scheduler,
                "OffloadingConnectorScheduler._calc_num_offloadable_tokens",
                leave_out_missing_rows,
            )

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        """The engine's blocks, without the tail blocks behind them.

        Raises ConfigError for a cache that is no tensor (a layer's state, not its rows).
        """
        config = self.connector_worker.kv_cache_config
        mine = dict(kv_caches)
        for group in config.kv_cache_groups:
            for name in group.layer_names:
                # [blocks, heads, rows, 2 * D]; kernels may cut a block into smaller ones.
                cache = kv_caches[name]
                if not isinstance(cache, Tensor):
                    raise ConfigError(f"layer {name}: its cache is no tensor of blocks and rows")
                blocks = config.num_blocks * group.kv_cache_spec.block_size // cache.shape[2]
                mine[name] = cache[:blocks]
        super().register_kv_caches(mine)

    @property
    def prefer_cross_layer_blocks(self) -> bool:
        """A cache for each layer, as without a connector."""
        return False

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: Any) -> str | None:
        """The connector's own layout with the tokens of a block before its heads.

        Raises ConfigError where the connector asks for a layout that has no such counterpart.
        """
        wanted = super().get_required_kvcache_layout(vllm_config)
        if wanted is None or wanted in ROWS_FOLLOW.values():
            return wanted
        if wanted not in ROWS_FOLLOW:
            raise ConfigError(
                f"NWOR cannot stage in caches of layout {wanted}, which the connector asks for; "
                "unset the nwor flag for this model"
            )
        return ROWS_FOLLOW[wanted]


def leave_out_missing_rows(
    original: Callable[..., int], req_status: Any, num_computed_tokens: int
) -> int:
    """How many tokens of a request may be stored: of a finished one, those that have rows.

    The row of the last sampled token was never computed; of an aborted request more may be missing.
    """
    request = req_status.req
    if request.is_finished():
        computed = min(request.num_computed_tokens, request.num_tokens - 1)
        num_computed_tokens = min(num_computed_tokens, computed)
    return original(req_status, num_computed_tokens)
