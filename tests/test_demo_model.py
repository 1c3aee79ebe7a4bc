"""The demo's model computes what transformers computes, through pages and without."""

import json
from typing import Any

import pytest
import torch
from transformers import LlamaConfig as HfConfig
from transformers import LlamaForCausalLM

from nwor_compile.demo.compiled import Runner
from nwor_compile.demo.model import Llama, LlamaConfig
from nwor_compile.demo.paged import PagedCache
from nwor_compile.demo.schedule import Request, Scheduler, build_batch
from nwor_compile.demo.text import WEIGHTS

# Both compute in float32 and add up in another order: a few ulps of logits of size 1 to 20.
ATOL = 2e-4


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "tie_word_embeddings": True, "max_position_embeddings": 128, "initializer_range": 0.2,
        "rope_theta": 500.0,
    }  # fmt: skip
    model: Any = LlamaForCausalLM(HfConfig(**settings))
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def hf_logits(folder, tokens):
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0]


def test_dense_logits_equal_transformers(checkpoint):
    tokens = torch.randint(61, (40,), generator=torch.Generator().manual_seed(1)).tolist()
    model = Llama.load(checkpoint)
    assert model.config.rope_theta == 500.0
    logits, rows = model.dense(torch.tensor(tokens))
    torch.testing.assert_close(logits, hf_logits(checkpoint, tokens), atol=ATOL, rtol=1e-4)
    assert len(rows) == 3
    assert rows[0][0].shape == (40, 2, 16)


def test_shipped_target_equals_transformers():
    tokens = list(range(20, 60))
    logits, _ = Llama.load(WEIGHTS / "target").dense(torch.tensor(tokens))
    expected = hf_logits(WEIGHTS / "target", tokens)
    torch.testing.assert_close(logits, expected, atol=ATOL, rtol=1e-4)


def test_paged_logits_equal_transformers_in_chunks_of_a_mixed_batch(checkpoint):
    source = torch.Generator().manual_seed(2)
    prompts = [torch.randint(61, (n,), generator=source).tolist() for n in (1, 9, 23)]
    model = Llama.load(checkpoint)
    cache = PagedCache(model.config, num_blocks=20, block_size=4, table_width=6, seed=3)
    requests = [Request(i, prompt, 1, arrival=i) for i, prompt in enumerate(prompts)]
    scheduler = Scheduler(requests, rows=3, chunk=7)
    got: dict[int, list[torch.Tensor]] = {i: [] for i in range(3)}
    run = Runner(model, nwor=False, eager=True)
    while not scheduler.done:
        spans = scheduler.next_spans()
        batch = build_batch(spans, cache, 0)
        logits = run(batch, cache)
        for row, span in enumerate(spans):
            if span is not None:
                start, stop = batch.query_start_loc[row : row + 2].tolist()
                got[span.request.id].append(logits[start:stop])
                span.request.computed = span.stop
                if span.samples:
                    scheduler.finish(span.request)
    for index, prompt in enumerate(prompts):
        expected = hf_logits(checkpoint, prompt)
        torch.testing.assert_close(torch.cat(got[index]), expected, atol=ATOL, rtol=1e-4)


def test_a_config_that_the_model_cannot_run_is_refused(tmp_path):
    raw = json.loads((WEIGHTS / "target" / "config.json").read_text())
    path = tmp_path / "config.json"
    for change, message in (
        ({"model_type": "mistral"}, "model_type='mistral'"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "rope_type='llama3'"),
        ({"tie_word_embeddings": False}, "tied embeddings"),
    ):
        path.write_text(json.dumps(raw | change))
        with pytest.raises(ValueError, match=message):
            LlamaConfig.load(path)
