"""The slow obvious version: whole eager patterns, one example, head and query at a time."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

Visible = tuple[int, int]


def eager_patterns(module: Any, tokens: Tensor) -> list[Tensor]:
    """Attention of each layer ``[batch head query key]``, by plain transformers."""
    module.set_attn_implementation("eager")
    with torch.no_grad():
        return list(module(tokens, output_attentions=True, use_cache=False).attentions)


def previous_token(row: Tensor, _ids: list[int], i: int, _first: int) -> float:
    return float(row[i - 1])


def induction(row: Tensor, ids: list[int], i: int, first_visible: int) -> float:
    keys = [j for j in range(1, i + 1) if ids[j - 1] == ids[i] and j - 1 < i]
    seen = [j for j in keys if j >= first_visible]
    return sum(float(row[j]) for j in seen) if seen else float("nan")


def duplicate_token(row: Tensor, ids: list[int], i: int, first_visible: int) -> float:
    seen = [j for j in range(i) if ids[j] == ids[i] and j >= first_visible]
    return sum(float(row[j]) for j in seen) if seen else float("nan")


def entropy(row: Tensor, _ids: list[int], i: int, _first: int) -> float:
    p = row[: i + 1].double()
    p = p / p.sum()
    return float(-(p * p.clamp_min(1e-300).log()).sum())


SLOW = {
    "previous_token": previous_token,
    "induction": induction,
    "duplicate_token": duplicate_token,
    "entropy": entropy,
}
REPEATED_ONLY = {"induction", "duplicate_token"}


def slow_scores(
    patterns: list[Tensor], tokens: Tensor, name: str, windows: tuple[int | None, ...]
) -> np.ndarray:
    """Values ``[layer head example]``: mean over queries, NaN left out."""
    layers, heads, batch = len(patterns), patterns[0].shape[1], len(tokens)
    out = np.full((layers, heads, batch), np.nan)
    for layer in range(layers):
        for head in range(heads):
            for example in range(batch):
                ids = tokens[example].tolist()
                values = []
                for i in range(1, len(ids)):
                    if name in REPEATED_ONLY and ids[i] not in ids[:i]:
                        continue
                    window = windows[layer]
                    first_visible = 0 if window is None else max(0, i - window + 1)
                    row = patterns[layer][example, head, i]
                    values.append(SLOW[name](row, ids, i, first_visible))
                known = [value for value in values if not np.isnan(value)]
                out[layer, head, example] = np.mean(known) if known else np.nan
    return out
