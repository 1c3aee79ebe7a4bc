"""vLLM's names of the cache dtypes whose rows can be staged."""

PLAIN = ("auto", "bfloat16", "float16", "float32")
FP8 = ("fp8", "fp8_e4m3", "fp8_e5m2")
