"""A circuit run written out: one head, one slot, one source at a time, without taps or stacking."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

Sources = dict[str, Tensor]


class Plain:
    """GPT-2 or Llama, taken apart by hand."""

    def __init__(self, module: Any, tokens: Tensor, real: Tensor | None = None) -> None:
        self.module, self.tokens = module, tokens
        self.real = torch.ones_like(tokens, dtype=torch.bool) if real is None else real
        self.gpt2 = module.config.model_type == "gpt2"
        self.config = module.config
        self.n_heads = module.config.num_attention_heads
        self.n_kv = getattr(module.config, "num_key_value_heads", None) or self.n_heads
        self.blocks = module.transformer.h if self.gpt2 else module.model.layers
        self.positions = torch.arange(tokens.shape[1])[None]

    def embed(self) -> Tensor:
        if self.gpt2:
            body = self.module.transformer
            return body.wte(self.tokens) + body.wpe(self.positions)
        return self.module.model.embed_tokens(self.tokens)

    @torch.no_grad()
    def run(self, out: Iterable[tuple[str, str, str]], corrupt: Sources) -> tuple[Tensor, Sources]:
        """Logits and what every node wrote, with these edges carrying what ``corrupt`` has."""
        removed = set(out)
        written: Sources = {"embed": self.embed()}
        constant = torch.zeros(self.config.hidden_size)

        def entering(target: str, slot: str) -> Tensor:
            parts = [
                corrupt[source] if (source, target, slot) in removed else value
                for source, value in written.items()
            ]
            return torch.stack(parts).sum(0) + constant

        for layer, block in enumerate(self.blocks):
            heads = {}
            for head in range(self.n_heads):
                name = f"L{layer}H{head}"
                inputs = [entering(name, slot) for slot in ("query", "key", "value")]
                heads[name] = self.head(block, head, *inputs)
            written.update(heads)
            constant = constant + self.output_bias(block)
            norm = block.ln_2 if self.gpt2 else block.post_attention_layernorm
            written[f"MLP{layer}"] = block.mlp(norm(entering(f"MLP{layer}", "mlp")))
        final = self.module.transformer.ln_f if self.gpt2 else self.module.model.norm
        return self.module.lm_head(final(entering("logits", "output"))), written

    def head(self, block: Any, head: int, at_q: Tensor, at_k: Tensor, at_v: Tensor) -> Tensor:
        """What one head writes, given the residual stream that enters each of its slots."""
        norm = block.ln_1 if self.gpt2 else block.input_layernorm
        own, shared = head, head * self.n_kv // self.n_heads
        q, k, v = (
            self.projected(block, norm(stream), which, own if which == 0 else shared)
            for which, stream in enumerate((at_q, at_k, at_v))
        )
        if not self.gpt2:
            cos, sin = self.module.model.rotary_emb(q, self.positions)
            q, k = (one[:, 0] for one in apply_rotary_pos_emb(q[:, None], k[:, None], cos, sin))
        scores = q @ k.mT / q.shape[-1] ** 0.5
        length = q.shape[1]
        seen = torch.ones(length, length, dtype=torch.bool).tril() & self.real[:, None]
        pattern = scores.masked_fill(~seen, -1e30).softmax(-1)
        return pattern @ v @ self.output(block, head)

    def projected(self, block: Any, stream: Tensor, which: int, head: int) -> Tensor:
        if self.gpt2:
            size = self.config.hidden_size // self.n_heads
            at = which * self.config.hidden_size + head * size
            layer = block.attn.c_attn
            return stream @ layer.weight[:, at : at + size] + layer.bias[at : at + size]
        layer = getattr(block.self_attn, ("q_proj", "k_proj", "v_proj")[which])
        size = self.config.head_dim
        rows = slice(head * size, (head + 1) * size)
        bias = 0 if layer.bias is None else layer.bias[rows]
        return stream @ layer.weight[rows].mT + bias

    def output(self, block: Any, head: int) -> Tensor:
        if self.gpt2:
            size = self.config.hidden_size // self.n_heads
            return block.attn.c_proj.weight[head * size : (head + 1) * size]
        size = self.config.head_dim
        return block.self_attn.o_proj.weight[:, head * size : (head + 1) * size].mT

    def output_bias(self, block: Any) -> Tensor | float:
        bias = block.attn.c_proj.bias if self.gpt2 else block.self_attn.o_proj.bias
        return 0.0 if bias is None else bias
