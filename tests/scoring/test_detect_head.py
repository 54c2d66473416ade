"""The scorers of scorers/patterns.py against transformer-lens itself, option by option."""

from typing import Any

import numpy as np
import pytest
import torch
from transformer_lens.head_detector import detect_head

import headscope as hs
from headscope.models.bridge.model import bridge_over
from headscope.probes.probe import Probe
from headscope.scorer import all_queries
from headscope.scorers import CATALOGUE, Scorer
from headscope.views import AttentionRows
from tests.models.families import build

HEADS = ("previous_token", "duplicate_token", "induction")


def texts() -> torch.Tensor:
    """Tokens with repetitions, and the same token twice in a row."""
    generator = torch.Generator().manual_seed(5)
    return torch.randint(3, 12, (4, 20), generator=generator)


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def pair(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """One model as headscope and as transformer-lens see it."""
    module = build(request.param)
    bridge = bridge_over(module)
    bridge.to_tokens = lambda ids, **_: ids  # detect_head takes text; these are ids already
    return hs.load(module), bridge


def theirs(bridge: Any, head: str, **options: bool) -> np.ndarray:
    with torch.no_grad():
        scores = [detect_head(bridge, row[None], f"{head}_head", **options) for row in texts()]
    return torch.stack(scores, -1).numpy()


@pytest.mark.parametrize("head", HEADS)
def test_equal_without_options(pair: tuple[Any, Any], head: str) -> None:
    model, bridge = pair
    name = f"detect_head_{head}"
    ours = hs.score(model, hs.probes.from_tokens(texts()), [name], progress=False)[name]
    np.testing.assert_allclose(ours.per_example, theirs(bridge, head), atol=1e-5)


def masked(head: str, drop: str) -> tuple[Scorer, Scorer]:
    """Mass on a head's targets, and mass in all, without column 0 or without the diagonal."""

    def dropped(rows: AttentionRows) -> torch.Tensor:
        keys = torch.arange(rows.pattern.shape[-1])
        gone = keys[None] == (0 if drop == "exclude_bos" else rows.query_pos[:, None])
        return gone.expand(len(rows.query_pos), -1)

    def cut(rows: AttentionRows) -> AttentionRows:
        kept = rows.pattern.masked_fill(dropped(rows)[None, None], 0)
        return AttentionRows(rows.layer, rows.query_pos, kept, rows.visible)

    @hs.row_scorer(name="hit", queries=all_queries, control=None)
    def hit(rows: AttentionRows, probe: Probe) -> torch.Tensor:
        return CATALOGUE[f"detect_head_{head}"].function(cut(rows), probe)

    @hs.row_scorer(name="all", queries=all_queries, control=None)
    def total(rows: AttentionRows, probe: Probe) -> torch.Tensor:
        return cut(rows).pattern.sum(-1)

    return hit, total


@pytest.mark.parametrize("option", ["exclude_bos", "exclude_current_token"])
@pytest.mark.parametrize("head", HEADS)
def test_equal_with_options(pair: tuple[Any, Any], head: str, option: str) -> None:
    """An exclusion makes a ratio of sums: of two scores, whose counts cancel."""
    model, bridge = pair
    scored = hs.score(
        model, hs.probes.from_tokens(texts()), list(masked(head, option)), progress=False
    )
    ours = scored["hit"].per_example / scored["all"].per_example
    np.testing.assert_allclose(ours, theirs(bridge, head, **{option: True}), atol=1e-5)
