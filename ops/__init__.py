"""Custom ops of NWOR: `torch.ops.nwor.*`. This package knows torch only.

Importing it registers the ops; Triton is loaded when a kernel is first needed.
"""

if __name__ != "nwor_compile.ops":
    raise ImportError(
        f"expected to be imported as 'nwor_compile.ops', was imported as {__name__!r}: a second "
        "copy would register every op twice. Use `import nwor_compile.ops`."
    )

from nwor_compile.ops.attention import paged_attention, verify_attention
from nwor_compile.ops.cache_write import reshape_and_cache, stage_kv
from nwor_compile.ops.commit import cache_table, commit_kv
from nwor_compile.ops.counters import COUNTERS, counter_size
from nwor_compile.ops.library import OP_NAMES, implementation, set_implementation
from nwor_compile.ops.rope import rope_stage_kv, rotary_embedding
from nwor_compile.ops.rope_window import rope_stage_kv_window, rope_stage_kv_window_in_place
from nwor_compile.ops.scv import accept_mask
from nwor_compile.ops.staging import stage_kv_window, verify_attention_window

__all__ = [
    "COUNTERS",
    "OP_NAMES",
    "accept_mask",
    "cache_table",
    "commit_kv",
    "counter_size",
    "implementation",
    "paged_attention",
    "reshape_and_cache",
    "rope_stage_kv",
    "rope_stage_kv_window",
    "rope_stage_kv_window_in_place",
    "rotary_embedding",
    "set_implementation",
    "stage_kv",
    "stage_kv_window",
    "verify_attention",
    "verify_attention_window",
]
