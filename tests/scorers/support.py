"""Attention rows made by hand, and the slow obvious average over queries."""

import torch
from torch import Tensor

from headscope.probes import Probe, from_tokens
from headscope.scorers import Scorer
from headscope.views import AttentionRows


def visible_keys(real: Tensor, window: int | None = None) -> Tensor:
    """Causal order, window and padding; padding queries see themselves alone."""
    length = real.shape[1]
    query, key = torch.arange(length)[:, None], torch.arange(length)[None]
    order = (key <= query) & (query - key < (window or length))
    seen = order & real[:, None, :] & real[:, :, None]
    return seen | torch.eye(length, dtype=torch.bool) & ~real[:, :, None]


def rows_of(pattern: Tensor, visible: Tensor, queries: Tensor | None = None) -> AttentionRows:
    """Rows of some queries of a whole pattern ``[batch head query key]``."""
    chosen = torch.arange(pattern.shape[2]) if queries is None else queries
    return AttentionRows(0, chosen, pattern[:, :, chosen], visible[:, chosen])


def random_rows(
    probe: Probe, heads: int = 3, window: int | None = None, seed: int = 0
) -> AttentionRows:
    """Peaky random attention over what each query may see."""
    visible = visible_keys(probe.real, window)
    generator = torch.Generator().manual_seed(seed)
    scores = 3 * torch.randn(len(probe), heads, probe.length, probe.length, generator=generator)
    pattern = scores.masked_fill(~visible[:, None], -torch.inf).softmax(-1)
    return rows_of(pattern, visible)


def one_hot_rows(key_pos: Tensor) -> AttentionRows:
    """One head that looks at exactly one key per query, given as ``[batch query]``."""
    length = key_pos.shape[1]
    pattern = torch.nn.functional.one_hot(key_pos, length).float()[:, None]
    return rows_of(pattern, visible_keys(torch.ones_like(key_pos, dtype=torch.bool)))


def uniform_rows(batch: int, length: int) -> AttentionRows:
    """One head that spreads evenly."""
    visible = visible_keys(torch.ones(batch, length, dtype=torch.bool))
    pattern = visible / visible.sum(-1, keepdim=True)
    return rows_of(pattern[:, None], visible)


def repeated(length: int = 6, batch: int = 2, bos: bool = True) -> Probe:
    """``[BOS] R R`` of different tokens."""
    part = torch.stack([torch.randperm(50)[:length] + 1 for _ in range(batch)])
    start = torch.zeros(batch, int(bos), dtype=torch.long)
    return from_tokens(torch.cat([start, part, part], 1))


def averaged(scorer: Scorer, rows: AttentionRows, probe: Probe) -> Tensor:
    """Mean over the queries that count, per example and head; NaN values are left out."""
    values = scorer(rows, probe)
    chosen = scorer.queries(probe)[:, None, rows.query_pos].expand_as(values)
    return values.masked_fill(~chosen, torch.nan).nanmean(-1)
