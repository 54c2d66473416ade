"""Encoders against plain transformers: rows, outputs, ablation, padding, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import headscope as hs
from headscope.base.stacks import MaskRule
from headscope.errors import InputError, UnsupportedModelError
from tests.models.encoders import (
    CONFIGS,
    CONTEXT,
    HEADS,
    LAYERS,
    VOCAB,
    eager_rows,
    encoder,
    plain,
    text_of,
    tokenizer,
    widened,
)

FAMILIES = sorted(CONFIGS)
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def loaded() -> dict[str, Any]:
    return {name: hs.load(encoder(name)) for name in FAMILIES}


def padded(side: str) -> tuple[Tensor, Tensor]:
    """Two texts of 90 and 61 tokens."""
    tokens = text_of(90)
    real = torch.ones_like(tokens, dtype=torch.bool)
    if side == "right":
        real[1, 61:] = False
    if side == "left":
        real[1, :29] = False
    return tokens.masked_fill(~real, 0), real


def own_inputs(tokens: Tensor, example: int, real: Tensor) -> dict[str, Tensor]:
    """One example without its padding, as the model reads it by itself."""
    alone = tokens[example, real[example]][None]
    return {"input_ids": alone, "attention_mask": torch.ones_like(alone)}


@pytest.mark.parametrize("side", ["none", "right", "left"])
@pytest.mark.parametrize("name", FAMILIES)
def test_rows_and_outputs_are_the_models_own(loaded: dict[str, Any], name: str, side: str) -> None:
    model = loaded[name]
    tokens, real = padded(side)
    acts = hs.capture.collect(model, hs.probes.from_tokens(tokens, real))
    for example in range(2):
        shown = real[example].nonzero().squeeze(1)
        inputs = own_inputs(tokens, example, real)
        patterns = eager_rows(model.module, **inputs)
        _, outputs = plain(model.module, **inputs)
        for layer in range(LAYERS):
            pattern = acts[layer].pattern[example][:, shown][..., shown]
            torch.testing.assert_close(pattern, patterns[layer][0], atol=TOLERANCE, rtol=0)
            z = acts[layer].z[example, shown]
            size = float(outputs[layer].abs().max())
            torch.testing.assert_close(z, outputs[layer][0], atol=TOLERANCE * size, rtol=0)


def test_attention_of_the_test_models_is_far_from_flat(loaded: dict[str, Any]) -> None:
    for model in loaded.values():
        acts = hs.capture.collect(model, hs.probes.from_tokens(text_of(40)))
        pattern = acts[0].pattern
        assert float(pattern.amax(-1).median()) > 0.2
        assert float(pattern.triu(1).sum(-1).mean()) > 0.2  # much of it lies on later keys


@pytest.mark.parametrize("name", FAMILIES)
def test_ablations_are_those_of_plain_hooks(loaded: dict[str, Any], name: str) -> None:
    model = loaded[name]
    tokens, real = padded("right")
    targets = torch.full_like(tokens, -1)
    targets[0, [5, 70]], targets[1, 12] = torch.tensor([7, 9]), 11
    probe = hs.probes.from_tokens(tokens.masked_fill(targets >= 0, 4), real, targets=targets)
    scores = hs.ablate_heads(model, probe, hs.metrics.loss, "zero")
    for head in ((0, 1), (1, 3), (LAYERS - 1, 0)):
        effects = []
        for example in range(2):
            inputs = own_inputs(probe.tokens, example, real)
            at = (targets[example] >= 0).nonzero().squeeze(1)
            losses = [
                torch.nn.functional.cross_entropy(logits[0, at].double(), targets[example, at])
                for logits in (plain(model.module, off, **inputs)[0] for off in ([head], []))
            ]
            effects.append(float(losses[0] - losses[1]))
        assert scores.mean[head] == pytest.approx(sum(effects) / 2, abs=2e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_made_only_at_the_positions_asked_for(
    loaded: dict[str, Any], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokens = loaded[name], text_of(40)
    at, rows = torch.tensor([3, 17]), list[int]()
    unembed = torch.nn.functional.linear

    def counting(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if weight.shape[0] == VOCAB:
            rows.append(x.shape[-2])
        return unembed(x, weight, bias)

    whole = model.module(input_ids=tokens).logits[:, at].detach()
    model.run(hs.probes.from_tokens(tokens), logits_at=at)  # the head is proved in the first run
    monkeypatch.setattr(torch.nn.functional, "linear", counting)
    found = model.run(hs.probes.from_tokens(tokens), logits_at=at)
    assert rows == [2]
    allowed = 1e-6 * float(whole.abs().max())
    torch.testing.assert_close(found, whole, rtol=1e-6, atol=allowed)


def test_a_head_that_mixes_positions_is_given_them_all() -> None:
    module = encoder("bert")
    head = module.cls.forward
    module.cls.forward = lambda x: head(x + x.roll(1, 1))
    model, tokens, at = hs.load(module), text_of(40), torch.tensor([3, 17])
    assert model._pointwise_head is None
    found = model.run(hs.probes.from_tokens(tokens), logits_at=at)
    torch.testing.assert_close(found, module(input_ids=tokens).logits[:, at])


@pytest.mark.parametrize("name", ["bert", "modernbert", "esm"])
def test_models_pass_the_shipped_checks(loaded: dict[str, Any], name: str) -> None:
    report = hs.testing.check_model(loaded[name], raises=False)
    assert not report.failed, str(report)
    limited = set(report.limited)
    assert {"unembedding"} <= limited <= {
        "write", "unembedding", "attribution", "OV circuit", "QK circuit",
    }  # fmt: skip


def test_stacks_say_what_is_seen(loaded: dict[str, Any]) -> None:
    (stack,) = loaded["bert"].stacks.values()
    assert (stack.name, stack.mask, str(stack.head(1, 2))) == (
        "",
        MaskRule("bidirectional"),
        "L1H2",
    )
    assert loaded["modernbert"].stacks[""].windows == (None, 6, 6)
    assert not loaded["modernbert"].stacks[""].mask.causal


def test_a_table_of_positions_may_begin_with_padding(loaded: dict[str, Any]) -> None:
    for name, first in (("bert", 0), ("roberta", 2), ("xlm-roberta", 2)):
        model = loaded[name]
        assert model.shape.n_ctx == CONTEXT - first
        whole = hs.probes.from_tokens(text_of(CONTEXT - first, batch=1))
        assert hs.capture.collect(model, whole, layers=[0])[0].pattern.shape[-1] == CONTEXT - first
        with pytest.raises(InputError, match="sees at most"):
            hs.score(model, hs.probes.from_tokens(text_of(CONTEXT - first + 1)), "entropy")


@pytest.fixture(scope="module")
def bert() -> Any:
    return hs.load(encoder("bert"), tokenizer=tokenizer())


TEXTS = ["the cat sat on the mat .", "the dog ran fast to the big red house and saw a bird !"]


def test_probes_stand_between_cls_and_sep(bert: Any) -> None:
    probe = hs.probes.text(bert, TEXTS)
    for row, last in zip(probe.tokens, probe.last.tolist(), strict=True):
        assert (int(row[0]), int(row[last])) == (2, 3)
    assert probe.mark("separator").nonzero().tolist() == [
        [0, int(probe.last[0])],
        [1, int(probe.last[1])],
    ]
    assert not (probe.targets >= 0).any()
    assert probe.control is not None
    assert torch.equal(probe.control.mark("separator"), probe.mark("separator"))
    assert torch.equal(probe.control.tokens[probe.mark("separator")], torch.tensor([3, 3]))
    cut = hs.probes.text(bert, TEXTS, length=5)
    assert cut.tokens[:, 0].tolist() == [2] * len(cut)
    assert cut.tokens[:, 4].tolist() == [3] * len(cut)
    bare = hs.probes.text(bert, TEXTS, bos=False)
    assert not torch.isin(bare.tokens[bare.real], torch.tensor([2, 3])).any()
    twice = hs.probes.repeated_tokens(bert, length=6, batch=3)
    assert twice.length == 14
    assert torch.equal(twice.tokens[:, 1:7], twice.tokens[:, 7:13])
    assert twice.tokens[:, 13].tolist() == [3, 3, 3]
    assert twice.mark("second_copy").sum(1).tolist() == [6, 6, 6]
    assert not (twice.targets >= 0).any()


def test_hidden_tokens_are_the_targets_at_their_own_places(bert: Any) -> None:
    whole = hs.probes.text(bert, TEXTS)
    probe = hs.probes.masked(bert, TEXTS, 3, seed=1)
    hidden = probe.mark("masked")
    assert hidden.sum(1).tolist() == [3, 3]
    assert (probe.tokens[hidden] == 4).all()
    assert torch.equal(probe.tokens[~hidden], whole.tokens[~hidden])
    assert torch.equal(probe.targets[hidden], whole.tokens[hidden])
    assert (probe.targets[~hidden] == -1).all()
    assert not hidden[whole.tokens < 5].any()
    assert torch.equal(probe.structure, whole.structure)
    again = hs.probes.masked(bert, whole, 3, seed=1)
    assert torch.equal(again.tokens, probe.tokens)
    share = hs.probes.masked(bert, TEXTS)
    assert share.mark("masked").sum(1).tolist() == [1, 2]
    marked = hs.probes.masked(bert, whole, 1, at="delimiter")
    assert not (marked.mark("masked") & ~whole.mark("delimiter")).any()


def test_the_loss_of_hidden_tokens_is_not_shifted(bert: Any) -> None:
    probe = hs.probes.masked(bert, TEXTS, 2)
    with torch.no_grad():
        logits = bert.module(
            input_ids=probe.tokens, attention_mask=probe.real.long()
        ).logits.double()
    expected = [
        float(torch.nn.functional.cross_entropy(logits[b][at], probe.targets[b][at]))
        for b, at in enumerate(probe.mark("masked"))
    ]
    own = hs.metrics.loss(bert.forward(probe.tokens, real=probe.real), probe)
    assert own.tolist() == pytest.approx(expected, abs=1e-5)


def test_a_plain_scan_scores_what_makes_sense(bert: Any) -> None:
    table = hs.score(bert)
    assert set(table) == {
        "previous_token", "next_token", "current_token", "duplicate_token", "first_token",
        "delimiter", "separator", "local_window", "attention_distance", "entropy",
    }  # fmt: skip
    probe = hs.probes.text(bert, TEXTS)
    scores = hs.score(bert, probe, ["next_token", "separator", "entropy"], batch_size=1)
    acts = hs.capture.collect(bert, probe)
    for name, value in (("next_token", 1), ("separator", None)):
        by_example = []
        for b in range(2):
            last = int(probe.last[b])
            rows = acts[1].pattern[b]
            queries = range(1, last if name == "next_token" else last + 1)
            keys = [i + value if value else last for i in queries]
            by_example.append(rows[:, list(queries), keys].mean(-1))
        expected = torch.stack(by_example).mean(0)
        torch.testing.assert_close(
            torch.tensor(scores[name].mean[1]).float(), expected, atol=1e-6, rtol=1e-5
        )


REFUSED = {
    "induction": lambda m: hs.score(m, scorers="induction"),
    "retrieval": lambda m: hs.score(m, scorers="retrieval"),
    "needle": lambda m: hs.probes.needle(m),
    "pairs": lambda m: hs.probes.pairs(m, "ioi"),
    "generate": lambda m: hs.retrieval.follow(m, hs.probes.text(m, TEXTS)),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_asks_for_the_next_token_is_refused(bert: Any, what: str) -> None:
    with pytest.raises(UnsupportedModelError, match="both directions"):
        REFUSED[what](bert)


def test_targets_that_the_model_sees_are_refused(bert: Any) -> None:
    shifted = hs.probes.from_tokens([[2, 6, 7, 8, 3]])
    with pytest.raises(InputError, match=r"sees.*hs\.probes\.masked"):
        hs.ablate_heads(bert, shifted, hs.metrics.loss)
    with pytest.raises(InputError, match="nothing to read"):
        hs.ablate_heads(bert, hs.probes.text(bert, TEXTS), hs.metrics.loss)
    with pytest.raises(UnsupportedModelError, match="left to right"):
        hs.probes.masked(hs.load(), TEXTS)
    with pytest.raises(InputError, match="example 1 has 7 tokens that may be hidden, and 9"):
        hs.probes.masked(bert, TEXTS, 9)
    with pytest.raises(InputError, match="no tokenizer"):
        hs.probes.masked(hs.load(encoder("bert")), hs.probes.from_tokens([[1, 2]]))


def test_a_folder_opens_with_the_head_that_it_was_saved_with(tmp_path: Path, bert: Any) -> None:
    bert.module.save_pretrained(tmp_path)
    bert.tokenizer.save_pretrained(tmp_path)
    again = hs.load(tmp_path)
    assert type(again.module).__name__ == "BertForMaskedLM"
    tokens = text_of(30)
    torch.testing.assert_close(again.forward(tokens), bert.forward(tokens))
    decoder = transformers.BertLMHeadModel(
        transformers.BertConfig(
            vocab_size=VOCAB, hidden_size=16, num_hidden_layers=1, num_attention_heads=HEADS,
            intermediate_size=16, is_decoder=True,
        )
    )  # fmt: skip
    decoder.save_pretrained(tmp_path / "decoder")
    assert hs.load(tmp_path / "decoder").stacks[""].mask.causal


HEADLESS = {
    "bare": transformers.BertModel,
    "classifier": transformers.BertForSequenceClassification,
    "tagger": transformers.BertForTokenClassification,
    "answerer": transformers.BertForQuestionAnswering,
}


@pytest.mark.parametrize("name", HEADLESS)
def test_without_a_language_model_head_all_but_logits_works(name: str) -> None:
    torch.manual_seed(3)
    module = widened(HEADLESS[name](CONFIGS["bert"]()))
    model = hs.load(module)
    tokens, real = padded("left")
    probe = hs.probes.from_tokens(tokens, real)
    acts = hs.capture.collect(model, probe)
    body = module.base_model
    for example in range(2):
        shown = real[example].nonzero().squeeze(1)
        for layer, pattern in enumerate(eager_rows(body, **own_inputs(tokens, example, real))):
            seen = acts[layer].pattern[example][:, shown][..., shown]
            torch.testing.assert_close(seen, pattern[0], atol=TOLERANCE, rtol=0)
    assert hs.score(model, probe, "entropy").shape == (LAYERS, HEADS)
    for metric in (hs.metrics.kl_divergence, lambda logits, _probe: logits.sum((1, 2))):
        with pytest.raises(UnsupportedModelError, match="has no language-model head"):
            hs.ablate_heads(model, probe, metric)
    with pytest.raises(UnsupportedModelError, match="has no language-model head"):
        model.forward(tokens)


def test_a_bare_model_passes_the_shipped_checks() -> None:
    torch.manual_seed(3)
    report = hs.testing.check_model(
        hs.load(widened(transformers.BertForSequenceClassification(CONFIGS["bert"]()))),
        raises=False,
    )
    assert not report.failed, str(report)
    assert {"logits", "rows", "head outputs", "padding left", "padding right"} <= set(report.passed)


def test_a_folder_of_a_bare_model_opens_bare(tmp_path: Path) -> None:
    torch.manual_seed(3)
    widened(transformers.BertModel(CONFIGS["bert"]())).save_pretrained(tmp_path)
    model = hs.load(tmp_path)
    assert type(model.module).__name__ == "BertModel"
    assert "logits" in model.limits


_NO_ROWS = {
    "albert": (transformers.AlbertConfig, "share one set of weights"),
    "mpnet": (transformers.MPNetConfig, "code of its own"),
    "deberta-v2": (transformers.DebertaV2Config, "code of its own"),
}


@pytest.mark.parametrize("name", _NO_ROWS)
def test_what_has_no_row_per_head_is_refused_with_the_reason(name: str) -> None:
    config, reason = _NO_ROWS[name]
    sizes = {"vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "intermediate_size": 16}
    module = transformers.AutoModelForMaskedLM.from_config(config(**sizes)).eval()
    with pytest.raises(UnsupportedModelError, match=reason) as refusal:
        hs.load(module)
    assert str(refusal.value).count("is not supported") == 1


def test_padding_that_is_read_as_text_is_refused() -> None:
    """mobilebert joins every token's embedding with those of its neighbours, padding included."""
    config = transformers.MobileBertConfig(
        vocab_size=VOCAB, hidden_size=32, embedding_size=16, intra_bottleneck_size=16,
        num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
    )  # fmt: skip
    torch.manual_seed(0)
    model = hs.load(widened(transformers.MobileBertForMaskedLM(config)))
    for side, words in (("right", "stands behind it"), ("left", "stands before it")):
        tokens, real = padded(side)
        with pytest.raises(UnsupportedModelError, match=words):
            hs.score(model, hs.probes.from_tokens(tokens, real), "entropy")
    assert hs.score(model, hs.probes.from_tokens(text_of(20)), "entropy")["entropy"].n.min() == 2


def test_one_head_of_an_encoder_is_explained(bert: Any) -> None:
    said = hs.explain("L1H2", bert)
    assert said.scan is not None
    assert "next_token" in said.scan
    (effect,) = said.effects
    assert effect.provenance.probe["kind"] == "masked"
    assert said.attention is not None
    assert not hs.explain("L1H2", hs.load(encoder("bert"))).effects  # no mask token is known
