"""What `nwor_compile.vllm_pass` is: the name by which vLLM's compilation config asks for NWOR.

vLLM resolves a pass given as text with `__import__(module).__dict__[name]`, at the moment the
configuration is made. So only an attribute of a top-level module can be named, and it is there
before anything is known of the engine. The plugin puts the pass itself in the place of this one.
"""

from __future__ import annotations

from torch.fx import Graph

from nwor_compile.errors import ConfigError

NAME = "nwor_compile.vllm_pass"


def vllm_pass(graph: Graph) -> None:
    """Name this in vLLM's `--compilation-config`; it is never called when the plugin is loaded.

    Raises ConfigError: NWOR's plugin did not see the configuration.
    """
    del graph
    raise ConfigError(
        f"{NAME} was named in a compilation config that NWOR's plugin never saw; expected vLLM to "
        "load it: let VLLM_PLUGINS be unset or contain 'nwor', and make the configuration with "
        "EngineArgs (vllm serve and LLM do)"
    )
