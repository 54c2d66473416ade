from collections.abc import Callable

import pytest
import torch

from headscope import circuits
from headscope.errors import InputError, UnsupportedModelError
from headscope.heads import HeadIndex
from headscope.models.hf.model import HFModel

ModelOf = Callable[[str], HFModel]
TOKENS = [5, 9, 44, 9, 60, 31, 8, 77]


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2", "gpt_neox", "cohere"])
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


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox", "cohere"])
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
    with pytest.raises(UnsupportedModelError, match="no one matrix"):
        circuits.trace(family_model("qwen3"), TOKENS, "L2H0", 7, 3)
