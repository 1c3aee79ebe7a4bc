"""NWOR in an unmodified vLLM. `plugin.register` is the entry point; see docs/vllm.md."""
