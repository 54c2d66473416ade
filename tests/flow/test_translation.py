"""Source contribution and the decoder lens: sum rules, planted cases, plain passes."""

from typing import Any

import numpy as np
import pytest
import torch

import headscope as hs
from headscope.errors import InputError
from headscope.flow.contributions import moved_by_head, vectors_of
from headscope.models.bundled import tasks
from headscope.models.hf.sublayers import arounds, keeping_streams, sublayer
from tests.models.seq2seq import both_sides, module_of

FAMILIES = ("t5", "bart", "marian", "pegasus", "whisper")


def probe_of(name: str) -> Any:
    sides = both_sides(name)
    return hs.probes.from_batch(sides, targets=sides["decoder_input_ids"])


@pytest.mark.parametrize("name", FAMILIES)
def test_vectors_and_residual_sum_to_what_follows_attention(name: str) -> None:
    """In every stack, against what the model's own modules were given."""
    model, probe = hs.load(module_of(name)), probe_of(name)
    for stack in ("encoder", "decoder", "cross"):
        view = model.stack(stack)
        known, kept, sums, given = arounds(view), {}, {}, {}
        handles = [
            one.behind.register_forward_pre_hook(
                lambda _m, args, layer=layer, given=given: given.__setitem__(layer, args[0])
            )
            for layer, one in known.items()
            if one.behind is not None
        ]

        def read(seen: Any) -> None:
            moved = moved_by_head(seen, view.output_weights(seen.layer))  # noqa: B023
            at = torch.arange(seen.n_queries)
            parts = torch.stack([vectors_of(seen, one, at, n) for n, one in enumerate(moved)])
            constant = sublayer(view, known[seen.layer], seen.layer).bias  # noqa: B023
            sums[seen.layer] = parts.sum(2) + constant + kept[seen.layer]  # noqa: B023
            z = torch.einsum(
                "bqhd,hdm->bqm",
                seen.z,
                view.output_weights(seen.layer),  # noqa: B023
            )
            torch.testing.assert_close(parts.sum(2), z, atol=1e-4, rtol=1e-4)

        with keeping_streams(view, kept, known):
            view.run(probe, reads={("z", layer): read for layer in known})
        for handle in handles:
            handle.remove()
        assert set(sums) == {0, 1}
        for layer, whole in given.items():
            torch.testing.assert_close(sums[layer], whole, atol=1e-3, rtol=1e-4)
        assert bool(given) == (name in ("bart", "marian"))


@pytest.mark.parametrize("name", FAMILIES)
def test_rows_of_source_and_prefix_sum_to_one(name: str) -> None:
    model, probe = hs.load(module_of(name)), probe_of(name)
    found = hs.flow.source_contribution(model, probe)
    whole = found.source.sum(-1) + found.prefix.sum(-1)
    np.testing.assert_allclose(whole[found.real], 1.0, atol=1e-5)
    assert np.isnan(found.share[~found.real]).all()
    assert (np.triu(found.prefix[0], 1) == 0).all()  # nothing comes from later tokens
    if name != "whisper":
        assert (found.source[1][:, ~found.read[1]] == 0).all()
    again = hs.flow.source_contribution(model, probe, batch_size=1)
    np.testing.assert_allclose(again.source, found.source, atol=1e-5)


def test_without_values_of_the_source_everything_comes_from_the_prefix() -> None:
    module = module_of("bart")
    with torch.no_grad():
        for layer in module.model.decoder.layers:
            for part in (layer.encoder_attn.v_proj, layer.encoder_attn.out_proj):
                part.weight.zero_()
                part.bias.zero_()
    found = hs.flow.source_contribution(hs.load(module), probe_of("bart"))
    np.testing.assert_allclose(found.share[found.real], 0.0, atol=1e-6)
    with torch.no_grad():  # and with nothing moved in self-attention, from each token itself
        for layer in module.model.decoder.layers:
            for part in (layer.self_attn.v_proj, layer.self_attn.out_proj):
                part.weight.zero_()
                part.bias.zero_()
    own = hs.flow.source_contribution(hs.load(module), probe_of("bart")).prefix[0]
    np.testing.assert_allclose(own, np.eye(len(own)), atol=1e-6)


def test_contributions_of_the_reversing_model_align_it() -> None:
    model, drawn = hs.load("tiny-marian"), tasks.orders(16, 8)
    probe = hs.probes.translation(model, drawn.sources, drawn.targets)
    found = hs.flow.source_contribution(model, probe)
    hits = [
        found.source[number, target].argmax() == source
        for number, links in enumerate(drawn.links)
        for target, source in links
    ]
    assert np.mean(hits) > 0.6  # a source token in eight by chance
    assert len(found.to_pandas()) == int(found.real.sum())
    assert "share of the source" in found.summary()


@pytest.mark.parametrize("name", FAMILIES)
def test_the_last_layer_is_the_model_itself(name: str) -> None:
    model, probe = hs.load(module_of(name)), probe_of(name)
    lens = hs.lens.decoder_lens(model, probe)
    assert lens.layers == (0, 1, 2)
    logits = model.run(probe).float()
    loss = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), probe.targets.clamp_min(0).flatten(), reduction="none"
    ).view_as(probe.targets)
    slow = [float(row[mark].mean()) for row, mark in zip(loss, probe.real, strict=True)]
    np.testing.assert_allclose(lens.loss[-1], slow, rtol=1e-4)
    assert np.abs(lens.loss[0] - lens.loss[-1]).max() > 1e-3
    alone = hs.lens.decoder_lens(model, probe, layers=[2], batch_size=1)
    np.testing.assert_allclose(alone.loss[0], lens.loss[-1], rtol=1e-4)


def test_a_layer_that_does_nothing_changes_nothing() -> None:
    module = module_of("pegasus")  # norms first, so that nothing added is the identity
    with torch.no_grad():
        for part in (module.model.encoder.layers[1].self_attn.out_proj,
                     module.model.encoder.layers[1].fc2):  # fmt: skip
            part.weight.zero_()
            part.bias.zero_()
    lens = hs.lens.decoder_lens(hs.load(module), probe_of("pegasus"))
    np.testing.assert_allclose(lens.loss[1], lens.loss[2], rtol=1e-5)
    assert np.abs(lens.loss[0] - lens.loss[2]).max() > 1e-3


def test_texts_are_those_of_generation() -> None:
    model, drawn = hs.load("tiny-marian"), tasks.orders(5, 8)
    probe = hs.probes.translation(model, drawn.sources, drawn.targets)
    lens = hs.lens.decoder_lens(model, probe, length=11)
    generated = hs.probes.translation(model, drawn.sources)
    said = [
        model.tokenizer.decode(row[row >= 0], skip_special_tokens=True)
        for row in generated.targets.where(generated.real, -1)
    ]
    assert list(lens.texts[-1]) == said
    assert lens.right[-1].mean() > 0.95
    assert lens.right[0].mean() < 0.8


def test_what_does_not_fit_is_refused_in_a_sentence() -> None:
    model, probe = hs.load(module_of("bart")), probe_of("bart")
    with pytest.raises(InputError, match="has layers 0 to 2, not 3"):
        hs.lens.decoder_lens(model, probe, layers=[3])
    decoder = hs.load("tiny-gpt2")
    text = hs.probes.repeated_tokens(decoder, length=4, batch=2)
    with pytest.raises(InputError, match="is not an encoder-decoder"):
        hs.flow.source_contribution(decoder, text)
    for reading in (hs.flow.source_contribution, hs.lens.decoder_lens):
        with pytest.raises(InputError, match="has no source"):
            reading(model, text)
