"""Edits as values: what they touch and what they leave, on both paths, in scopes that restore."""

import pytest
import torch

import headscope as hs
from headscope import edits
from headscope.models.bridge.model import wrap_bridge
from headscope.models.hf.model import HFModel
from headscope.models.taps import TapView
from tests.ablation.helpers import model_of, probe_of
from tests.models import families
from tests.watching import watch

Z = torch.arange(2 * 3 * 4 * 2.0).view(2, 3, 4, 2) + 1


def test_zero_touches_only_its_heads() -> None:
    out = edits.zero(["L1H0", (1, 2)])(1, Z)
    assert not out[:, :, [0, 2]].any()
    assert torch.equal(out[:, :, [1, 3]], Z[:, :, [1, 3]])


def test_positions_limit_an_edit() -> None:
    where = torch.tensor([[False, True, False], [True, False, False]])
    out = edits.zero("1.3", positions=where)(1, Z)
    assert not out[where][:, 3].any()
    assert torch.equal(out[~where], Z[~where])
    query = Z.transpose(1, 2)
    turned = edits.uniform("1.3", positions=where)(1, query)
    assert torch.equal(turned.transpose(1, 2), out)


def test_donors_of_every_rank() -> None:
    mean, by_position, other = torch.randn(4, 2), torch.randn(3, 4, 2), torch.randn(2, 3, 4, 2)
    assert torch.equal(edits.mean("0.1", {0: mean})(0, Z)[0, 2, 1], mean[1])
    assert torch.equal(edits.mean_pos("0.1", {0: by_position})(0, Z)[1, :, 1], by_position[:, 1])
    assert torch.equal(edits.resample("0.1", {0: other})(0, Z)[:, :, 1], other[:, :, 1])
    assert torch.equal(edits.scale("0.1", 3.0)(0, Z)[:, :, 1], 3 * Z[:, :, 1])


def test_the_input_is_left_as_it_is() -> None:
    before = Z.clone()
    edits.zero("0.0")(0, Z)
    assert torch.equal(Z, before)


def test_scope() -> None:
    prefill, decode = edits.zero("0.0", scope="prefill"), edits.zero("0.0", scope="decode")
    assert not prefill(0, Z)[:, :, 0].any()
    assert not prefill(0, Z[:, :1])[:, :, 0].any()  # a prompt of one token is a prompt
    assert torch.equal(decode(0, Z), Z)
    step = edits.Span(first=7, count=3, prompt=8)  # however many positions a step runs
    assert not prefill.during(step)(0, Z)[:, 0, 0].any()
    assert torch.equal(prefill.during(step)(0, Z)[:, 1:], Z[:, 1:])
    assert not decode.during(step)(0, Z)[:, 1:, 0].any()
    assert torch.equal(decode.during(step)(0, Z)[:, 0], Z[:, 0])
    assert not prefill.during(edits.Span(8, 3, 8)).layers


def test_cut_gives_what_the_whole_gives() -> None:
    where = torch.tensor([[False, True, True], [False, False, True]])
    edit = edits.resample("0.1", {0: torch.randn(2, 3, 4, 2)}, positions=where)
    assert edit.first_position == 1
    part = edit.cut(slice(1, 2), first=1)
    assert torch.equal(part(0, Z[1:2, 1:]), edit(0, Z)[1:2, 1:])


def test_mistakes_are_named() -> None:
    with pytest.raises(hs.HeadscopeError, match="not a head"):
        edits.zero("head five")
    with pytest.raises(hs.HeadscopeError, match="names no heads"):
        edits.zero([])
    with pytest.raises(hs.HeadscopeError, match="no values for layer 2"):
        edits.mean(["0.1", "2.1"], {0: torch.zeros(4, 2)})
    with pytest.raises(hs.HeadscopeError, match="values for 5 positions"):
        edits.mean_pos("0.1", {0: torch.zeros(5, 4, 2)})(0, Z)


def test_stacked_variants_get_their_own_edits() -> None:
    variants = [(edits.zero("0.1"),), (), (edits.zero("0.2"), edits.scale("0.3", 2.0))]
    (stacked,) = edits.stack(variants)
    found = stacked(0, Z.repeat(3, 1, 1, 1))
    assert torch.equal(found, stacked.spread(0, Z))
    assert torch.equal(found[2:4], Z)
    assert torch.equal(found[:2], edits.zero("0.1")(0, Z))
    assert not stacked.covers(0, 4)
    full = edits.stack([(edits.zero([(0, h) for h in range(4)]),)])[0]
    assert full.covers(0, 4)


@pytest.mark.parametrize("family", ["gpt2", "llama", "cohere2"])
def test_both_paths_agree(family: str) -> None:
    model, probe = model_of(family), probe_of()
    assert isinstance(model, HFModel)
    bridge = wrap_bridge(model.bridge)
    shape = model.shape
    means = hs.ablation.head_means(model, probe)
    patterns = hs.ablation.head_values(model, probe.corrupt.tokens, site="pattern")
    values = hs.ablation.head_values(model, probe.corrupt.tokens, site="value")
    for edit in (
        edits.zero("L1H1"),
        edits.mean(["L0H2", "L2H3"], means),
        edits.uniform("L1H0"),
        edits.attend_to_first("L1H3", probe.real),
        edits.freeze_pattern("L0H1", patterns),
        edits.patch([(1, shape.n_kv_heads - 1)], values, site="value"),
        edits.scale("L2H0", 0.5, positions=probe.mark("late")),
    ):
        ours = model.forward(probe.tokens, edits=[edit])
        theirs = bridge.forward(probe.tokens, edits=[edit])
        assert (ours - theirs).abs().max() < 1e-5 * ours.abs().max(), edit.name


def test_uniform_is_the_mean_of_the_visible_values() -> None:
    model, probe = model_of("llama"), probe_of()
    values = hs.ablation.head_values(model, probe.tokens, site="value")[0]
    seen = {}

    class Watch:
        wants_final = False

        def on_layer(self, view: TapView) -> None:
            seen[view.layer] = view.z

        def on_final(self, residual: torch.Tensor) -> None: ...

    watch(model, probe.tokens, Watch(), edits=[edits.uniform("L0H3")])
    counts = torch.arange(1, 13).view(1, -1, 1)
    expected = values[:, 1].cumsum(1) / counts  # head 3 reads key/value head 1
    assert torch.allclose(seen[0][:, :, 3], expected, atol=1e-5)


def test_a_scope_over_generation_restores_everything() -> None:
    model = HFModel.wrap(families.fresh("llama"))
    assert model is not None
    prompt = families.tokens(1)
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    plain = model.module.generate(prompt, **settings)
    heads = model.shape.heads
    with model.edited([edits.zero(heads, scope="decode")]):
        decode = model.module.generate(prompt, **settings)
    with model.edited([edits.zero(heads)]):
        everywhere = model.module.generate(prompt, **settings)
    # The first new token comes from the prefill pass, which a decode edit leaves alone.
    assert decode[0, 12] == plain[0, 12]
    logits = model.forward(decode[:, :-1], edits=[edits.zero(heads)])
    assert everywhere[0, 12] == logits[0, 11].argmax()
    assert torch.equal(model.module.generate(prompt, **settings), plain)
    with pytest.raises(ZeroDivisionError), model.edited([edits.zero(heads)]):
        raise ZeroDivisionError
    assert torch.equal(model.module.generate(prompt, **settings), plain)
    assert model.module.config._attn_implementation == "eager"
