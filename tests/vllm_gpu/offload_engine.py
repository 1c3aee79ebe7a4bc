"""One engine that may offload, driven by JSON lines: `offload_engine.py OPTIONS.json`.

As `engine_process.py`. Further option: fault, of `offload_faults.py`. Further command: `compare`,
answered with what `StoreAudit.compare` finds.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import engine_process
from offload_audit import StoreAudit
from offload_faults import FAULTS


class OffloadEngine(engine_process.Engine):
    """An engine whose stores are audited, if it has a connector."""

    def __init__(self, options: dict[str, Any], folder: Path) -> None:
        super().__init__(options, folder)
        self.stores = StoreAudit(self.llm) if "kv_transfer_config" in options["llm"] else None
        if options.get("fault"):
            if self.stores is None:
                raise ValueError("a fault of offloading needs a kv_transfer_config")
            FAULTS[options["fault"]](self.stores)

    def facts(self) -> dict[str, Any]:
        """What was started."""
        connector = None
        if self.stores is not None:
            connector = type(self.stores.scheduler).__name__
        return {**super().facts(), "connector": connector}

    def answer(self, command: dict[str, Any]) -> dict[str, Any]:
        """What one command asks for."""
        if command.get("compare"):
            return {} if self.stores is None else self.stores.compare()
        if self.stores is None:
            return {**self.generate(command), "loaded_blocks": 0}
        # Not vLLM's counter of external hits: in 0.26 an LLM drops the counts of every step without
        # an output (`LLMEngine.step`), such as one that only starts a load.
        before = self.stores.totals["loaded_blocks"]
        result = self.generate(command)
        return {**result, "loaded_blocks": self.stores.totals["loaded_blocks"] - before}


def main() -> None:
    """Keep the answers' pipe to ourselves; file descriptor 1 becomes stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    options = json.loads(Path(sys.argv[1]).read_text())
    with tempfile.TemporaryDirectory() as folder:
        engine = OffloadEngine(options, Path(folder))
        print(json.dumps(engine.facts()), file=answers, flush=True)
        for line in sys.stdin:
            print(json.dumps(engine.answer(json.loads(line))), file=answers, flush=True)
        engine.llm.llm_engine.engine_core.shutdown()


if __name__ == "__main__":
    main()
