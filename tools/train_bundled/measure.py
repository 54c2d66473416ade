"""Plain measurements with transformers alone: eager attention, logits, forward hooks.

Nothing of headscope's own measuring code is used, so that its results can be held against these.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from headscope.models.hf.transformers_api import attention_name

from .examples import Prompt

Head = tuple[int, int]
"""Layer and head."""


@torch.no_grad()
def patterns(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Attention of every head, `[layer batch head query key]`."""
    before = attention_name(model.config)
    model.set_attn_implementation("eager")
    found = model(input_ids=ids, use_cache=False, output_attentions=True).attentions
    model.set_attn_implementation(before)
    return torch.stack(found)


def previous_token_scores(pattern: torch.Tensor) -> torch.Tensor:
    """Mean attention to the token before, query 0 left out, `[layer head]`."""
    return pattern.diagonal(-1, -2, -1).mean((1, 3))


def induction_scores(pattern: torch.Tensor) -> torch.Tensor:
    """On `[BOS] R R`: mean attention of second-copy query i to key i - N + 1, `[layer head]`."""
    span = (pattern.shape[-1] - 1) // 2
    queries = torch.arange(span + 1, 2 * span + 1)
    return pattern[..., queries, queries - span + 1].mean((1, 3))


@torch.no_grad()
def half_losses(model: PreTrainedModel, ids: torch.Tensor) -> tuple[float, float]:
    """On `[BOS] R R`: mean loss of the first and of the second copy, without their first tokens."""
    logits = model(input_ids=ids, use_cache=False).logits
    losses = cross_entropy(logits[:, :-1].transpose(1, 2).float(), ids[:, 1:], reduction="none")
    span = (ids.shape[1] - 1) // 2
    return losses[:, 1:span].mean().item(), losses[:, span + 1 :].mean().item()


@torch.no_grad()
def answers(
    model: PreTrainedModel, prompts: list[Prompt], batch: int = 50
) -> tuple[torch.Tensor, torch.Tensor]:
    """For every prompt: is the answer likeliest, and its logit minus that of the wrong one."""
    right, margins = [], []
    for start in range(0, len(prompts), batch):
        part = prompts[start : start + batch]
        longest = max(len(prompt.ids) for prompt in part)
        ids = torch.tensor([prompt.ids + [0] * (longest - len(prompt.ids)) for prompt in part])
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
        for row, prompt in zip(logits, part, strict=True):
            last = row[len(prompt.ids) - 1]
            right.append(bool(last.argmax() == prompt.answer))
            margins.append(float(last[prompt.answer] - last[prompt.wrong]))
    return torch.tensor(right), torch.tensor(margins)


def _output_projections(model: PreTrainedModel) -> list[torch.nn.Module]:
    inner: Any = model
    if model.config.model_type == "gpt2":
        return [block.attn.c_proj for block in inner.transformer.h]
    return [layer.self_attn.o_proj for layer in inner.model.layers]


@contextmanager
def without_heads(model: PreTrainedModel, heads: Iterable[Head]) -> Iterator[None]:
    """Zero the outputs of these heads: their slices of the input of the output projections."""
    width = (
        model.config.head_dim
        if hasattr(model.config, "head_dim")
        else model.config.hidden_size // model.config.num_attention_heads
    )
    by_layer: dict[int, list[int]] = {}
    for layer, head in heads:
        by_layer.setdefault(layer, []).append(head)
    handles = []
    for layer, chosen in by_layer.items():

        def cut(
            _: torch.nn.Module, inputs: tuple[torch.Tensor, ...], chosen: list[int] = chosen
        ) -> tuple[torch.Tensor]:
            z = inputs[0].clone()
            for head in chosen:
                z[..., head * width : (head + 1) * width] = 0.0
            return (z,)

        handles.append(_output_projections(model)[layer].register_forward_pre_hook(cut))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
