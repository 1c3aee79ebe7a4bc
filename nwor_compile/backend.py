"""Switching NWOR on for `torch.compile`: by options, or as the backend `nwor`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

from torch import Tensor
from torch.fx import GraphModule

from nwor_compile.config import NworConfig
from nwor_compile.errors import ConfigError
from nwor_compile.passes.nwor_pass import rewrite_module


def compile_options(config: NworConfig | None = None, **inductor_options: Any) -> dict[str, Any]:
    """Options for `torch.compile(model, options=...)`: Inductor with the NWOR pass.

    Args:
        config: settings; from the environment if None. Mode `off` adds no pass, so the graph and
            its cache key are those of a model that never heard of NWOR.
        inductor_options: other Inductor options, kept; a `post_grad_custom_pre_pass` of yours
            raises ConfigError, since Inductor has one place for it.
    """
    config = config if config is not None else NworConfig.load()
    if config.mode == "off":
        return inductor_options
    if inductor_options.get("post_grad_custom_pre_pass") is not None:
        raise ConfigError(
            "compile_options: post_grad_custom_pre_pass is taken by NWOR's pass; call "
            "nwor_compile.passes.NworPass from yours instead"
        )
    from nwor_compile.passes.inductor import NworPass  # slow to import

    return {**inductor_options, "post_grad_custom_pre_pass": NworPass(strict=config.strict)}


def nwor(
    module: GraphModule,
    example_inputs: Sequence[Tensor],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
) -> Callable[..., Any]:
    """The backend of `torch.compile(model, backend="nwor")`: the pass on Dynamo's graph, then
    Inductor.

    The pass runs whenever Dynamo compiles, also when Inductor then takes the (rewritten) graph
    from its cache. `options`: fields of `NworConfig`, plus any of Inductor's.
    """
    options = dict(options or {})
    fields = {name: options.pop(name) for name in list(options) if name in NworConfig.model_fields}
    config = NworConfig.load(**fields)
    if mode is not None:
        raise ConfigError(
            f"backend 'nwor': torch.compile(mode={mode!r}) is Inductor's shorthand for options; "
            "pass those options themselves"
        )
    if config.mode == "stage":
        rewrite_module(module, strict=config.strict, name="Dynamo graph")
    # Seconds to import: not before something is compiled.
    from torch._inductor.compile_fx import compile_fx

    compiled = compile_fx(module, list(example_inputs), config_patches=options)
    return cast("Callable[..., Any]", compiled)  # other types come from ahead-of-time compilation
