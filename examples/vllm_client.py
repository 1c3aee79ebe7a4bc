"""Streams a completion from a server that runs with NWOR, then prints the server's counters.

    examples/vllm_serve.sh &
    python examples/vllm_client.py
    python examples/vllm_client.py --url http://localhost:8000 --prompt "And the LORD said"

Needs the openai package.
"""

from __future__ import annotations

import argparse
import urllib.request

from openai import OpenAI
from prometheus_client.parser import text_string_to_metric_families

SHOWN = ("staged", "committed", "rejected", "windows", "acceptance_rate", "fallback_count")


def counters(url: str) -> dict[str, float]:
    """NWOR's counters on /metrics, summed over engines; without those by position."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=60) as answer:
        text = answer.read().decode()
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name.startswith("vllm:nwor_") and "position" not in sample.labels:
                found[sample.name] = found.get(sample.name, 0.0) + sample.value
    return found


def main() -> None:
    """Stream, then count."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--url", default="http://localhost:8000")
    parser.add_argument("--prompt", default="And it came to pass in those days, that")
    parser.add_argument("--max-tokens", type=int, default=60)
    given = parser.parse_args()
    with OpenAI(base_url=f"{given.url}/v1", api_key="none") as client:
        model = client.models.list().data[0].id
        print(given.prompt, end="", flush=True)
        for chunk in client.completions.create(
            model=model, prompt=given.prompt, max_tokens=given.max_tokens, temperature=0,
            stream=True,
        ):  # fmt: skip
            if chunk.choices:
                print(chunk.choices[0].text, end="", flush=True)
    print()
    for name, value in sorted(counters(given.url).items()):
        if any(word in name for word in SHOWN):
            print(f"{name} {value:g}")


if __name__ == "__main__":
    main()
