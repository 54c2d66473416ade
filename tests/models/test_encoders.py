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


@pytest.mark.parametrize("name", ["bert", "modernbert", "esm", "albert", "mpnet"])
def test_models_pass_the_shipped_checks(loaded: dict[str, Any], name: str) -> None:
    report = hs.testing.check_model(loaded[name], raises=False)
    assert not report.failed, str(report)
    limited = set(report.limited)
    assert {"unembedding"} <= limited <= {
        "write", "unembedding", "attribution", "OV circuit", "QK circuit", "pruning",
    }  # fmt: skip


@pytest.fixture
def shared() -> Any:
    """An albert of two groups of two layers, each group run two times, as it is."""
    config = CONFIGS["albert"]()
    config.inner_group_num, config.num_hidden_layers = 2, 4
    torch.manual_seed(1)
    module = widened(transformers.AlbertForMaskedLM(config))
    with torch.no_grad():  # else eight layers make all tokens alike, and rows flat
        for name, weight in module.named_parameters():
            weight.mul_(0.3 if "attention.dense" in name else 2.0 if "query" in name else 1.0)
    return module


def counted(module: Any, at: int, head: int, **inputs: Tensor) -> Tensor:
    """Logits of an albert as it is, with a head's output at 0 in one run of the shared layers."""
    runs = [0]

    def before(_module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        z = args[0].unflatten(-1, (HEADS, -1)).clone()
        z[:, :, head] *= runs[0] != at
        runs[0] += 1
        return (z.flatten(-2),)

    dense = [part for name, part in module.named_modules() if name.endswith("attention.dense")]
    handles = [part.register_forward_pre_hook(before) for part in dense]
    with torch.no_grad():
        logits: Tensor = module(**inputs).logits
    for handle in handles:
        handle.remove()
    assert runs == [8]  # 4 runs of groups, of 2 layers each
    return logits


def test_every_run_of_shared_layers_is_a_layer(shared: Any) -> None:
    model, tokens = hs.load(shared), text_of(40)
    assert model.shape.n_layers == 8
    patterns = eager_rows(shared, input_ids=tokens)
    acts = hs.capture.collect(model, hs.probes.from_tokens(tokens))
    for layer in range(8):
        found = acts[layer].pattern
        torch.testing.assert_close(found, patterns[layer], atol=TOLERANCE, rtol=0)
        assert layer == 0 or float((found - acts[layer - 1].pattern).abs().max()) > 0.1
    for layer, head in ((0, 1), (3, 2), (7, 0)):
        expected = counted(shared, layer, head, input_ids=tokens)
        with model.edited([hs.edits.zero([(layer, head)])]):
            found = model.forward(tokens)
        size = float(expected.abs().max())
        torch.testing.assert_close(found, expected, atol=TOLERANCE * size, rtol=0)


def test_shared_layers_have_shared_weights_and_leave_the_model_as_it_was(shared: Any) -> None:
    whole = {name: value.clone() for name, value in shared.state_dict().items()}
    model = hs.load(shared)
    first, third, fifth = (model.weights(layer).W_Q.clone() for layer in (0, 2, 4))
    assert torch.equal(first, third)
    assert not torch.equal(first, fifth)
    assert sum(p.numel() for p in model.module.parameters()) == shared.num_parameters()
    assert shared.state_dict().keys() == whole.keys()
    assert shared.config.num_hidden_groups == 2
    with torch.no_grad():
        shared.albert.encoder.albert_layer_groups[1].albert_layers[0].attention.query.weight.mul_(2)
    assert torch.equal(model.weights(4).W_Q, 2 * fifth)
    with pytest.raises(UnsupportedModelError, match="share one set of weights"):
        hs.prune(model, ["L0H0"])


def test_the_bias_of_relative_positions_is_part_of_the_rows(loaded: dict[str, Any]) -> None:
    module, tokens = loaded["mpnet"].module, text_of(40)
    (before,) = eager_rows(module, input_ids=tokens)[:1]
    table = module.mpnet.encoder.relative_attention_bias.weight
    own, at = table.detach().clone(), torch.arange(40)
    with torch.no_grad():
        table[1] += 5  # bucket of the key before a query
    rows = hs.capture.collect(loaded["mpnet"], hs.probes.from_tokens(tokens))[0].pattern
    with torch.no_grad():
        table.copy_(own)
    previous = before[:, :, at[1:], at[:-1]]
    raised = previous * torch.e**5
    expected = raised / (1 - previous + raised)
    torch.testing.assert_close(rows[:, :, at[1:], at[:-1]], expected, atol=TOLERANCE, rtol=0)


def test_attention_of_a_familys_own_code_is_left_as_it_was(loaded: dict[str, Any]) -> None:
    model, tokens = loaded["mpnet"], text_of(30)
    module = model.module
    assert not any("forward" in part.__dict__ for part in module.modules())
    alone = module(input_ids=tokens).logits.detach()
    with model.edited([hs.edits.zero(["L1H1"])]):
        edited = module(input_ids=tokens).logits.detach()
    assert float((edited - alone).abs().max()) > 0.1
    expected, _ = plain(module, [(1, 1)], input_ids=tokens)
    torch.testing.assert_close(edited, expected, atol=TOLERANCE * float(alone.abs().max()), rtol=0)
    torch.testing.assert_close(module(input_ids=tokens).logits.detach(), alone)


def test_circuits_of_own_code_are_products_of_its_weights(loaded: dict[str, Any]) -> None:
    model = loaded["mpnet"]
    own = model.module.mpnet.encoder.layer[1].attention.attn
    query, key = (one.weight.unflatten(0, (HEADS, -1)) for one in (own.q, own.k))
    expected = torch.einsum("hdm,hdn->hmn", query, key).detach()
    factors = hs.circuits.qk(model, fold_norm=False)
    for head in range(HEADS):
        found = factors.explicit((1, head))
        torch.testing.assert_close(found, expected[head], atol=1e-4, rtol=1e-4)


def test_heads_of_own_code_are_not_removed(loaded: dict[str, Any]) -> None:
    for name in ("megatron-bert", "mpnet"):
        with pytest.raises(UnsupportedModelError, match="does not run with fewer heads"):
            hs.prune(loaded[name], ["L0H1"])


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


_TINY = {
    "vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 16,
}  # fmt: skip
_HRM = {"num_layers_per_stack": 1, "H_cycles": 2, "L_cycles": 2, "num_key_value_heads": 2}
_NO_ROWS = {
    "deberta": (lambda: transformers.DebertaConfig(**_TINY), "code of its own"),
    "deberta-v2": (lambda: transformers.DebertaV2Config(**_TINY), "code of its own"),
    "convbert": (lambda: transformers.ConvBertConfig(**_TINY), "code of its own"),
    "longformer": (lambda: transformers.LongformerConfig(**_TINY), "more of the mask"),
    "big_bird": (lambda: transformers.BigBirdConfig(**_TINY), "code of its own"),
    "xlm": (
        lambda: transformers.XLMConfig(vocab_size=VOCAB, emb_dim=16, n_layers=2, n_heads=2),
        "it calls expand_as",
    ),
    "hrm_text": (
        lambda: transformers.HrmTextConfig(**(_TINY | _HRM)), "share one set of weights",
    ),
    "jetmoe": (
        lambda: transformers.JetMoeConfig(
            **_TINY, kv_channels=8, num_key_value_heads=1, num_local_experts=2
        ),
        "heads are routed",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", _NO_ROWS)
def test_what_has_no_row_per_head_is_refused_with_the_reason(name: str) -> None:
    config, reason = _NO_ROWS[name]
    auto: Any = transformers.AutoModelForMaskedLM
    auto = transformers.AutoModelForCausalLM if name in ("hrm_text", "jetmoe") else auto
    module = auto.from_config(config()).eval()
    with pytest.raises(UnsupportedModelError, match=reason) as refusal:
        hs.load(module)
    assert str(refusal.value).count("is not supported") == 1


def test_a_bias_that_depends_on_the_text_is_refused() -> None:
    """It would be in the rows, and in no product of weights."""
    module = encoder("mpnet")
    table = module.mpnet.encoder.compute_position_bias
    module.mpnet.encoder.compute_position_bias = lambda x: table(x) + x.sum(-1)[:, None, None]
    with pytest.raises(UnsupportedModelError, match="depends on the text"):
        hs.load(module)
    module.mpnet.encoder.compute_position_bias = lambda x: table(x).tril() - 1e9 * (table(x) == 0)
    module.mpnet.encoder.relative_attention_bias.weight.data[0] = 0
    with pytest.raises(UnsupportedModelError, match="mask of its own"):
        hs.load(module)


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
