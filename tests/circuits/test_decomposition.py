from collections.abc import Callable

import pytest
import torch

import headscope as hs
from headscope import circuits
from headscope.errors import InputError, UnsupportedModelError
from headscope.heads import HeadIndex
from headscope.models.hf.model import HFModel
from tests.circuits.conftest import random_model
from tools.tiny_models import tiny_model

ModelOf = Callable[[str], HFModel]
TOKENS = [5, 9, 44, 9, 60, 31, 8, 77]


NORMED = ["qwen3", "olmo2", "persimmon", "gemma2"]


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2", "gpt_neox", "cohere", *NORMED])
def test_products_sum_to_the_models_own_score(family: str, family_model: ModelOf) -> None:
    from tests.circuits.test_ov_qk import attention_calls

    model = family_model(family)
    recording = circuits.record(model, TOKENS)
    call = attention_calls(model, torch.tensor([TOKENS]))[2]
    for head in range(4):
        kv = model.shape.kv_head(head)
        parts = circuits.score_parts(model, recording, (2, head), 6, 2)
        expected = float(call.query[0, head, 6] @ call.key[0, kv, 2])
        assert parts.score == pytest.approx(expected, rel=1e-3, abs=1e-2)
        assert float(parts.products.sum()) == pytest.approx(parts.score, rel=1e-4)
        assert abs(parts.kept_score) >= 0.7 * abs(parts.score) - 1e-4
        assert parts.kept_score * parts.score > 0


def test_kept_components_are_the_fewest(family_model: ModelOf) -> None:
    model = family_model("llama")
    recording = circuits.record(model, TOKENS)
    parts = circuits.score_parts(model, recording, "L1H1", 5, 3, share=0.5)
    shorter = float(parts.products[parts.kept[:-1]].sum())
    assert abs(shorter) < 0.5 * abs(parts.score)
    every = circuits.score_parts(model, recording, "L1H1", 5, 3, share=1.0)
    assert abs(every.kept_score) >= abs(every.score) - 1e-4


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox", "cohere", *NORMED])
def test_suppliers_and_constant_sum_to_the_kept_score(family: str, family_model: ModelOf) -> None:
    model = family_model(family)
    recording = circuits.record(model, TOKENS)
    parts = circuits.score_parts(model, recording, "L2H3", 7, 3)
    edges = circuits.suppliers(model, recording, parts)
    for side, constant in zip(("query", "key"), parts.constants, strict=True):
        found = [edge for edge in edges if edge.side == side]
        assert len(found) == 2 * 4 + 1
        total = sum(edge.contribution for edge in found) + constant
        assert total == pytest.approx(parts.kept_score, rel=1e-3, abs=1e-2)


def test_trace_follows_heads_that_fire(family_model: ModelOf) -> None:
    model = family_model("llama")
    edges = circuits.trace(model, TOKENS, "L2H0", 7, 3, firing=0.3)
    assert edges[0].reader == HeadIndex(2, 0)
    recording = circuits.record(model, TOKENS)
    traced = {(edge.reader, edge.query, edge.key) for edge in edges}
    for edge in edges:
        assert edge.writer is None or edge.writer.layer < edge.reader.layer
        assert edge.position == (edge.query if edge.side == "query" else edge.key)
        if edge.writer is not None and edge.writer.layer > 0:
            row = recording.attends[edge.writer.layer][edge.writer.head, edge.position]
            target = int(row.argmax())
            fires = float(row[target]) >= 0.3 and target != 0
            assert ((edge.writer, edge.position, target) in traced) == fires


def test_wrong_positions_and_families_are_refused(family_model: ModelOf) -> None:
    model = family_model("llama")
    recording = circuits.record(model, TOKENS)
    with pytest.raises(InputError, match="cannot attend"):
        circuits.score_parts(model, recording, "L1H0", 2, 5)
    clipped = hs.load(tiny_model("dbrx"))
    with pytest.raises(UnsupportedModelError, match="by more than a norm, a rotation"):
        circuits.trace(clipped, [token % 60 for token in TOKENS], "L2H0", 7, 3)


def test_what_a_head_supplies_behind_a_norm_is_what_the_stream_loses_without_it() -> None:
    """The scale of gemma2's norm after attention is held: without it, all of them would change."""
    model = random_model("gemma2")
    recording = circuits.record(model, TOKENS)
    parts = circuits.score_parts(model, recording, "L1H0", 7, 3)
    edge = next(e for e in circuits.suppliers(model, recording, parts) if e.writer == (0, 2))
    norm = model.module.model.layers[0].post_attention_layernorm
    W_O = model.output_weights(0)
    write = recording.z[0][7, 2] @ W_O[2]
    whole = torch.einsum("hd,hdm->m", recording.z[0][7], W_O)
    added = write / (whole.square().mean() + norm.eps).sqrt() * (1 + norm.weight.detach())
    assert edge.contribution == pytest.approx(float(added @ parts.along_query), rel=1e-4)
