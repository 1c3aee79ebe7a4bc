"""An EAGLE head for this repository's tiny target: trained here, and grown for the tests.

    python tests/vllm_engine/eagle_head.py            # two minutes on two cores; needs transformers

It trains on text that the target itself samples, so no data is needed, and writes `eagle/`. The
head is what vLLM's `EagleLlamaForCausalLM` loads: `fc` over the next token's embedding and the
target's last hidden state, then decoder layers of which the first has no input norm; embedding and
lm_head are the target's.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

HERE = Path(__file__).parent
TARGET = HERE.parents[1] / "nwor_compile" / "demo" / "weights" / "target"
HEAD = HERE / "eagle"
STEPS, BATCH, LENGTH = 1200, 16, 128
SHAPE: dict[str, Any] = {"num_hidden_layers": 1, "intermediate_size": 64}


def grow(layers: int, folder: Path) -> Path:
    """Write the head with `layers` layers to `folder` and return it.

    The further layers project to zero, so they change nothing and the acceptance stays; but each
    has a KV cache of its own, numbered after the target's layers.
    """
    weights = load_file(HEAD / "model.safetensors")
    for index in range(1, layers):
        for name in [n for n in weights if n.startswith("layers.0.")]:
            zero = name.endswith(("o_proj.weight", "down_proj.weight"))
            copy = torch.zeros_like(weights[name]) if zero else weights[name].clone()
            weights[name.replace("layers.0.", f"layers.{index}.")] = copy
        norm = weights["layers.0.post_attention_layernorm.weight"]
        weights[f"layers.{index}.input_layernorm.weight"] = torch.ones_like(norm)
    config = json.loads((HEAD / "config.json").read_text())
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": layers}))
    save_file(weights, folder / "model.safetensors")
    return folder


class Head(nn.Module):
    """The forward pass of vLLM's EAGLE head, on whole sequences."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

        self.fc = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.layers = nn.ModuleList([LlamaDecoderLayer(config, 0)])
        self.layers[0].input_layernorm = nn.Identity()
        self.rotary = LlamaRotaryEmbedding(config)

    def forward(self, embedded: Tensor, hidden: Tensor) -> Tensor:
        """Embeddings of tokens 1.., hidden states of tokens 0.. `[B, T, H]`; hidden states 1.. ."""
        x = self.fc(torch.cat((embedded, hidden), -1))
        positions = torch.arange(x.shape[1])[None]
        out = self.layers[0](x, attention_mask=None, position_embeddings=self.rotary(x, positions))
        return out[0] if isinstance(out, tuple) else out


def train() -> None:
    """Train the head and write `eagle/`."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    target = LlamaForCausalLM.from_pretrained(TARGET, dtype=torch.float32).eval()
    config = target.config.__class__(**{**target.config.to_dict(), **SHAPE})
    config._attn_implementation = "sdpa"
    head = Head(config)
    embed, lm_head = target.model.embed_tokens, target.lm_head
    optimiser = torch.optim.AdamW(head.parameters(), lr=2e-3, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, STEPS, pct_start=0.05)
    pool: list[Tensor] = []
    for step in range(STEPS):
        if step % 100 == 0:
            start = torch.randint(1, config.vocab_size, (BATCH * 8, 1))
            pool.append(
                target.generate(start, do_sample=True, max_new_tokens=LENGTH, pad_token_id=0)
            )
        text = pool[int(torch.randint(len(pool), ()))]
        ids = text[torch.randperm(len(text))[:BATCH]]
        with torch.no_grad():
            hidden = target.model(ids).last_hidden_state
            embedded, wanted = embed(ids[:, 1:]), hidden[:, 1:]
            probabilities = lm_head(wanted).softmax(-1)
        # Twice: on the target's hidden states, and on the head's own, as drafts 2 and later are.
        given, loss = hidden[:, :-1], torch.zeros(())
        for _ in range(2):
            out = head(embedded, given)
            logs = lm_head(out).log_softmax(-1)
            loss = loss - (probabilities * logs).sum(-1).mean() + F.smooth_l1_loss(out, wanted)
            given = torch.cat((hidden[:, :1], out[:, :-1]), 1)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(head.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if step % 50 == 0 or step == STEPS - 1:
            same = (lm_head(out).argmax(-1) == probabilities.argmax(-1)).float().mean()
            print(f"step {step}: loss {loss.item():.3f}, agreement {same:.2f}", flush=True)
    HEAD.mkdir(exist_ok=True)
    weights = {
        name: value.to(torch.bfloat16).contiguous() for name, value in head.state_dict().items()
    }
    save_file(weights, HEAD / "model.safetensors")
    kept = {**config.to_dict(), "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"}
    kept.pop("_name_or_path", None)  # a path of the machine that trained it
    (HEAD / "config.json").write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    train()
