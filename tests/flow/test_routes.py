"""Information flow routes: closed forms, conservation over cuts, and the obvious slow way."""

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import headscope as hs
from headscope.errors import InputError
from headscope.flow.routes import reads_past_attention
from headscope.models.protocol import HeadModel
from headscope.table import Routes
from tests.flow import slow
from tests.handwired import handwired_gpt2
from tests.models import families

SOME = ["gpt2", "llama", "gemma2", "gpt_neox", "granite", "gpt_oss", "bloom", "falcon"]
PARALLEL = {"gpt_neox", "falcon", "cohere2", "gptj"}


@cache
def model_of(family: str) -> HeadModel:
    return hs.load(families.build(family))


def tokens_of(length: int = 7) -> Tensor:
    return families.tokens()[0, :length]


def test_shares_of_parts_have_a_closed_form() -> None:
    shares = hs.flow.proximity_shares
    assert shares(torch.tensor([[3.0, 0.0], [0.0, 1.0]])).tolist() == [0.75, 0.25]
    assert shares(torch.tensor([[3.0, 0.0], [-1.0, 0.0]])).tolist() == [1.0, 0.0]
    parts = torch.rand(5, 8, generator=torch.Generator().manual_seed(0))
    wanted = parts.sum(1) / parts.sum()
    assert shares(parts).tolist() == pytest.approx(wanted.tolist(), abs=1e-6)
    assert shares(7 * parts).tolist() == pytest.approx(wanted.tolist(), abs=1e-6)


def test_parts_may_be_split_only_where_none_is_negative() -> None:
    shares = hs.flow.proximity_shares
    parts = torch.rand(4, 6, generator=torch.Generator().manual_seed(0))
    split = torch.cat([parts[:1] * 0.3, parts[:1] * 0.7, parts[1:]])
    assert float(shares(split)[:2].sum()) == pytest.approx(float(shares(parts)[0]), abs=1e-6)
    signed = torch.tensor([[3.0, 0.0], [-2.0, 0.0], [0.0, 1.0]])  # the first shoots past the whole
    assert shares(signed).tolist() == [0, 0, 1]
    apart = torch.cat([signed[:1] * 0.5, signed[:1] * 0.5, signed[1:]])
    assert shares(apart).tolist() == [0.25, 0.25, 0, 0.5]


def test_shares_change_with_a_rotation() -> None:
    parts = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
    turn = torch.tensor([[0.6, 0.8], [-0.8, 0.6]])
    assert abs(float(hs.flow.proximity_shares(parts @ turn)[0]) - 0.75) > 0.05


def test_where_every_part_leads_away_the_nearest_has_all() -> None:
    parts = torch.tensor([[1.0, 1.0, -3.0], [1.0, -3.0, 1.0], [-3.0, 1.2, 1.0], [0.0, 0.0, 0.0]])
    shares = hs.flow.proximity_shares(parts)
    assert shares.sum() == 1
    assert shares.tolist().index(1.0) != 3  # not what is nothing


def induction_toy() -> HeadModel:
    """Handwired slots token, position, previous, output; only the induction pair writes."""
    built = handwired_gpt2(16)
    with torch.no_grad():
        width, d_head = built.model.config.n_embd, 32
        anti_copy = built.model.transformer.h[1].attn.c_proj.weight[d_head : 2 * d_head]
        anti_copy.zero_()
        final = built.model.transformer.ln_f
        mean = 4 / width
        final.weight.fill_((4 / width - mean**2 + 1e-5) ** 0.5)
        final.bias.fill_(mean)
    return hs.load(built.model)


@pytest.mark.parametrize("threshold", [0.0, 0.1])
def test_the_induction_pair_carries_a_quarter_and_a_third(threshold: float) -> None:
    model = induction_toy()
    found = hs.flow.routes(model, [0, 3, 5, 2, 6, 1, 4, 3], part_threshold=threshold)
    wanted = np.zeros((2, 5))
    wanted[1, 0], wanted[0, 0] = 1 / 4, 1 / 3
    assert found.head_flow == pytest.approx(wanted, abs=1e-5)
    assert found.on_route.tolist() == (wanted > 0).tolist()
    # token, position and output of the target; what stood before it; what stood there before.
    tokens = np.zeros(8)
    tokens[[7, 2, 6, 1]] = [3 / 4 * 2 / 3, 1 / 4 * 2 / 3, 3 / 4 / 3, 1 / 4 / 3]
    assert found.token_flow == pytest.approx(tokens, abs=1e-5)
    heads = [edge.heads for edge in found.edges if edge.kind == "attention"]
    assert sorted(str(head) for one in heads for head in one) == ["L0H0", "L0H0", "L1H0"]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_compiled_programs_are_traced_through_their_heads(family: str) -> None:
    made = hs.compiled.induction(family=family, noise_heads=1, rotation_seed=None)
    found = hs.flow.routes(
        made.model, [0, 3, 5, 2, 6, 1, 4, 3], part_threshold=0.0, edge_threshold=0.0
    )
    known = {head for heads in made.truth.roles.values() for head in heads}
    assert {head for head, _ in found.top(2)} == known


@pytest.mark.parametrize("least", [0.0, 0.05])
@pytest.mark.parametrize("family", SOME)
def test_flow_through_heads_is_the_slow_way(family: str, least: float) -> None:
    model = model_of(family)
    found = hs.flow.routes(model, tokens_of(), part_threshold=least, memory=20_000)
    assert found.parallel == (family in PARALLEL)
    flow, tokens = slow.head_flow(model, tokens_of(), found.parallel, least)
    assert found.head_flow == pytest.approx(flow, abs=2e-4)
    assert found.token_flow == pytest.approx(tokens, abs=2e-4)


@pytest.mark.parametrize("family", [*SOME, "cohere2", "gptj", "olmo2", "qwen3", "opt"])
def test_importance_is_conserved_over_every_cut(family: str) -> None:
    model = model_of(family)
    for least in (0.0, 0.02, 0.3):
        found = hs.flow.routes(model, tokens_of(), part_threshold=least, edge_threshold=0.0)
        assert found.parallel == (family in PARALLEL)
        assert found.cuts == pytest.approx(1, abs=1e-5)
        for layer in range(model.shape.n_layers):
            into = [edge for edge in found.edges if edge.target.layer == layer]
            crossing = [
                edge
                for edge in into
                if edge.kind in ("attention", "residual", "bias")
                or (found.parallel and edge.kind == "reads")
            ]
            ended = found.bias[layer + 1 :].sum()
            assert sum(edge.importance for edge in crossing) + ended == pytest.approx(1, abs=1e-5)
            heads = np.zeros(model.shape.n_heads)
            for edge in crossing:
                assert sum(edge.heads.values()) == pytest.approx(
                    edge.weight if edge.kind == "attention" else 0, abs=1e-6
                )
                for head, share in edge.heads.items():
                    heads[head.head] += share / edge.weight * edge.importance
            assert heads == pytest.approx(found.head_flow[layer], abs=1e-5)


def test_every_weight_into_a_node_sums_to_one() -> None:
    found = hs.flow.routes(model_of("llama"), tokens_of(), edge_threshold=0.0)
    into: dict[object, float] = {}
    for edge in found.edges:
        into[edge.target] = into.get(edge.target, 0.0) + edge.weight
    assert list(into.values()) == pytest.approx([1.0] * len(into), abs=1e-5)


def test_weak_heads_vanish_under_one_threshold_and_survive_the_other() -> None:
    module = families.fresh("gpt2")
    with torch.no_grad():  # four heads that do the same, each too weak alone
        attention = module.transformer.h[2].attn
        for part in range(3):
            columns = attention.c_attn.weight[:, 32 * part : 32 * (part + 1)]
            columns.copy_(columns[:, :8].repeat(1, 4))
            biases = attention.c_attn.bias[32 * part : 32 * (part + 1)]
            biases.copy_(biases[:8].repeat(4))
        attention.c_proj.weight.copy_(0.1 * attention.c_proj.weight[:8].repeat(4, 1))
    model = hs.load(module)
    whole = hs.flow.routes(model, tokens_of(), part_threshold=0.0, edge_threshold=0.0)
    edges = [edge for edge in whole.edges if edge.kind == "attention" and edge.source.layer == 1]
    strongest = max(edges, key=lambda edge: edge.weight)
    single = max(strongest.heads.values())
    between = (single + strongest.weight) / 2
    drawn = hs.flow.routes(model, tokens_of(), part_threshold=0.0, edge_threshold=between)
    assert strongest.source in {edge.source for edge in drawn.edges if edge.kind == "attention"}
    assert not drawn.on_route[2].any()  # none of them alone
    cut = hs.flow.routes(model, tokens_of(), part_threshold=between, edge_threshold=0.0)
    assert cut.head_flow[2].sum() == 0


def test_edges_above_the_threshold_join_the_target() -> None:
    found = hs.flow.routes(model_of("gpt2"), tokens_of(), edge_threshold=0.1)
    assert min(edge.weight for edge in found.edges) >= 0.1
    known = {(found.edges[0].target.site, found.position)}
    reached = {edge.target for edge in found.edges if edge.target.site == "resid_post"}
    assert known == {("resid_post", 6)}
    top = {node for node in reached if node.layer == 2}
    assert {node.pos for node in top} == {6}
    sources = {edge.source for edge in found.edges}
    below = {edge.target for edge in found.edges if edge.target.layer < 2}
    assert below <= sources  # each was led to from above


def test_a_target_in_the_middle_sees_nothing_after_it() -> None:
    model = model_of("llama")
    found = hs.flow.routes(model, tokens_of(9), position=4)
    alone = hs.flow.routes(model, tokens_of(5))
    assert found.head_flow == pytest.approx(alone.head_flow, abs=1e-5)
    assert found.tokens == alone.tokens


def test_scores_over_a_probe_are_those_of_its_texts() -> None:
    model = model_of("llama")
    probe = hs.probes.from_tokens(families.tokens()[:3])
    found = hs.flow.route_scores(model, probe, part_threshold=0.02, edge_threshold=0.05)
    for example in range(3):
        one = hs.flow.routes(model, probe.tokens[example], part_threshold=0.02, edge_threshold=0.05)
        assert found["flow"].per_example[..., example] == pytest.approx(one.head_flow, abs=1e-6)
        assert found["on_route"].per_example[..., example].tolist() == one.on_route.tolist()
    assert np.isfinite(found["flow"].sem).all()


def test_half_precision_flows_alike() -> None:
    half = families.fresh("llama").to(torch.bfloat16)
    found = hs.flow.routes(hs.load(half), tokens_of())
    whole = hs.flow.routes(hs.load(half.float()), tokens_of())
    assert found.cuts == pytest.approx(1, abs=1e-5)
    assert found.head_flow == pytest.approx(whole.head_flow, abs=0.08)


def test_blocks_say_themselves_whether_they_are_parallel() -> None:
    found = {name for name in ("gpt2", "falcon", "falcon_heads", "gptj", "cohere2", "bloom")
             if reads_past_attention(model_of(name))}  # fmt: skip
    assert found == {"falcon", "gptj", "cohere2"}


def test_routes_are_saved_and_read(tmp_path: Path) -> None:
    found = hs.flow.routes(model_of("gpt2"), tokens_of())
    found.save(tmp_path / "routes.safetensors")
    assert Routes.load(tmp_path / "routes.safetensors").edges == found.edges
    frame = found.to_pandas()
    assert len(frame) == len(found.edges)
    assert {"kind", "source_site", "target_pos", "weight", "heads"} <= set(frame.columns)


def test_what_cannot_be_traced_is_refused_in_a_sentence() -> None:
    model = model_of("gpt2")
    probe = hs.probes.from_tokens(families.tokens())
    cases = {
        "part_threshold=1.0: give": lambda: hs.flow.routes(model, [3, 4], part_threshold=1.0),
        "edge_threshold=-0.1: give": lambda: hs.flow.routes(model, [3, 4], edge_threshold=-0.1),
        "the prompt is empty": lambda: hs.flow.routes(model, []),
        "has no tokenizer": lambda: hs.flow.routes(model, "text"),
        "positions 0 to 1": lambda: hs.flow.routes(model, [3, 4], position=5),
        "no token 99": lambda: hs.flow.routes(model, [3, 99]),
        "no mark 'end'": lambda: hs.flow.route_scores(model, probe, at="end"),
        "no position is a target": lambda: hs.flow.route_scores(model, probe, at=~probe.real),
    }
    for message, call in cases.items():
        with pytest.raises(InputError, match=message):
            call()
