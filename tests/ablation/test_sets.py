"""Groups, growing sets, pairs; activation patching and path patching."""

import numpy as np
import pytest
import torch

import headscope as hs
from headscope import edits
from headscope.ablation.patching import Entry
from tests.ablation.helpers import model_of, probe_of, whole_pass

difference = hs.metrics.logit_difference


def test_groups_and_curves() -> None:
    model, probe = model_of("llama"), probe_of()
    groups = {"none": [], "two": ["L0H1", "L2H3"], "all": model.shape.heads}
    found = hs.ablate_groups(model, probe, difference, groups, "zero")
    clean = whole_pass(model, probe, ())
    for name, effect in zip(groups, found.per_example, strict=True):
        edit = [edits.zero(groups[name])] if groups[name] else []
        assert effect == pytest.approx(whole_pass(model, probe, edit) - clean, abs=2e-5)
    assert found.unedited == pytest.approx(clean, abs=1e-5)
    curve = hs.ablate_cumulatively(model, probe, difference, ["L0H1", "L2H3", "L1H0"], "zero")
    assert curve.labels == (("0", "1", "2", "3"),)
    assert not curve.mean[0]
    assert curve.per_example[2] == pytest.approx(found.per_example[1], abs=1e-5)
    assert curve.top(1)[0][0] in "0123"
    assert list(curve.to_pandas()) == ["group", "mean", "sem", "p_value"]


def test_interactions() -> None:
    model, probe = model_of("llama"), probe_of()
    heads = ["L0H1", "L1H2", "L1H3"]
    found = hs.interactions(model, probe, difference, heads, "zero")
    alone = hs.ablate_heads(model, probe, difference, "zero")
    both = hs.ablate_groups(model, probe, difference, {"ab": heads[:2]}, "zero").mean[0]
    expected = both - alone["L0H1"] - alone["L1H2"]
    assert found.values[0, 1, 1, 2] == pytest.approx(expected, abs=2e-5)
    assert found.values[1, 2, 0, 1] == found.values[0, 1, 1, 2]
    assert np.isfinite(found.values).sum() == 6
    with pytest.raises(hs.HeadscopeError, match="at least two"):
        hs.interactions(model, probe, difference, "L0H1")


@pytest.mark.parametrize("site", ["z", "query", "key", "value", "pattern"])
@pytest.mark.parametrize("family", ["llama", "cohere2"])
def test_patching_each_site(family: str, site: edits.HeadSite) -> None:
    model, probe = model_of(family), probe_of()
    assert probe.corrupt is not None
    found = hs.patch_activations(model, probe, difference, site=site)
    donors = hs.ablation.head_values(model, probe.corrupt.tokens, site=site)
    clean = whole_pass(model, probe, ())
    for layer, head in np.ndindex(found.mean.shape):
        edit = edits.patch((layer, head), donors, site=site)
        effect = whole_pass(model, probe, [edit]) - clean
        assert found.per_example[layer, head] == pytest.approx(effect, abs=2e-5)
    assert found.axes == ("layer", "kv_head" if site in ("key", "value") else "head")
    assert found.pair is not None
    assert found.pair[0] == pytest.approx(clean, abs=1e-5)


@pytest.mark.parametrize("padding", ["none", "left"])
def test_patching_layer_by_position(padding: str) -> None:
    model, probe = model_of("mistral"), probe_of(padding)
    assert probe.corrupt is not None
    found = hs.patch_activations(
        model, probe, difference, ("layer", "position"), direction="denoise"
    )
    donors = hs.ablation.head_values(model, probe.tokens, probe.real)
    start = whole_pass(model, probe.corrupt, ())
    for layer, position in ((0, 7), (1, 8), (2, 11), (0, 2)):
        where = torch.zeros_like(probe.real)
        where[:, position] = True
        edit = edits.patch([(layer, h) for h in range(4)], donors, positions=where)
        effect = whole_pass(model, probe.corrupt, [edit]) - start
        assert found.per_example[layer, position] == pytest.approx(effect, abs=2e-5)
    # Nothing differs before the corrupt positions, nor is the first layer different after them.
    assert np.abs(found.mean[:, :7]).max() < 1e-5
    marks = hs.patch_activations(
        model, probe, difference, ("layer", "head", "position"), positions=["late", "end"]
    )
    assert marks.labels[2] == ("late", "end")
    assert marks.mean.shape == (3, 4, 2)


def test_patching_everything_gives_the_other_run() -> None:
    model, probe = model_of("llama"), probe_of()
    assert probe.corrupt is not None
    found = hs.patch_activations(model, probe, difference)
    other = whole_pass(model, probe.corrupt, ())
    assert found.pair is not None
    assert found.pair[1] == pytest.approx(other, abs=1e-5)
    assert found.normalised().shape == (3, 4)
    with pytest.raises(hs.HeadscopeError, match="needs a pair"):
        hs.patch_activations(model, probe.corrupt, difference)


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "bloom"])
def test_direct_paths_to_the_logits(family: str) -> None:
    model, probe = model_of(family), probe_of()
    assert probe.corrupt is not None
    found = hs.path_patch(model, probe, difference)
    clean = whole_pass(model, probe, ())
    corrupt = hs.ablation.head_values(model, probe.corrupt.tokens)
    kept = hs.ablation.head_values(model, probe.tokens)
    for sender in (hs.HeadIndex(0, 1), hs.HeadIndex(1, 2), hs.HeadIndex(2, 3)):
        above = [head for head in model.shape.heads if head.layer > sender.layer]
        frozen = [edits.patch(above, kept)] if above else []
        effect = whole_pass(model, probe, [edits.patch([sender], corrupt), *frozen]) - clean
        assert found.per_example[sender] == pytest.approx(effect, abs=2e-5)


@pytest.mark.parametrize("entry", ["query", "key", "value"])
def test_paths_to_a_head(entry: Entry) -> None:
    model, probe = model_of("llama"), probe_of()
    assert probe.corrupt is not None
    receiver, sender = hs.HeadIndex(2, 3), hs.HeadIndex(0, 1)
    found = hs.path_patch(model, probe, difference, [receiver], entry)
    corrupt = hs.ablation.head_values(model, probe.corrupt.tokens)
    kept = hs.ablation.head_values(model, probe.tokens)
    middle = [(1, head) for head in range(4)]
    seen = {}

    class Keep:
        site, layers = entry, frozenset({2})

        def __call__(self, layer: int, value: torch.Tensor) -> torch.Tensor:
            seen[layer] = value.clone()
            return value

    sent = [edits.patch([sender], corrupt), edits.patch(middle, kept), Keep()]
    whole_pass(model, probe, sent)
    head = 3 if entry == "query" else 1
    final = [edits.patch((2, head), seen, site=entry)]
    effect = whole_pass(model, probe, final) - whole_pass(model, probe, ())
    assert found.per_example[sender] == pytest.approx(effect, abs=2e-5)
    assert np.isnan(found.mean[2]).all()
    with pytest.raises(hs.HeadscopeError, match="no path leads"):
        hs.path_patch(model, probe, difference, "L0H0")
