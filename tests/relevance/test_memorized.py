"""Memorised text: greedy decoding, gradients of parameters, and heads that look for rare tokens."""

import numpy as np
import pytest
import torch
from scipy.stats import kendalltau

import headscope as hs
from headscope.errors import InputError
from headscope.models.bundled import stories
from headscope.relevance.memorized import _tau
from tests.models import families
from tests.relevance.slow import bundled


@pytest.fixture(scope="module")
def found() -> hs.relevance.Memorized:
    return hs.relevance.memorized(bundled(), stories(3), prefix=20, length=3)


def test_known_spans_are_those_that_greedy_decoding_gives(found: hs.relevance.Memorized) -> None:
    model = bundled()
    ids = [model.tokenizer(text, add_special_tokens=False)["input_ids"] for text in stories(3)]
    assert 0 < found.known.sum() < len(found.spans)
    for span, known in list(zip(found.spans, found.known, strict=True))[:12]:
        own = ids[span.text][span.start : span.start + 23]
        text = [model.tokenizer.bos_token_id, *own[:20]]
        said = []
        for _ in range(3):
            said.append(int(model.forward(torch.tensor([[*text, *said]]))[0, -1].argmax()))
        right = next((n for n in range(3) if said[n] != own[20 + n]), 3)
        assert span.right == right
        assert known == (right == 3)
    assert found.broken.shape == (int(found.known.sum()), 20)
    assert found.broken.max() <= 3


@pytest.mark.parametrize("family", ["gpt2", "llama", "granite"])
def test_gradients_are_those_of_the_parameters(family: str) -> None:
    module, tokens = families.build(family), families.tokens(2)
    model = hs.load(module)
    made = hs.relevance.weight_gradients(model, hs.probes.from_tokens(tokens))[1]
    kept = [one.requires_grad for one in module.parameters()]
    for one in module.parameters():
        one.requires_grad_(True)
    logits = module(tokens).logits[:, :-1]
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
    width, d_head = model.shape.d_model, model.shape.d_head
    if family == "gpt2":
        attention = module.transformer.h[1].attn
        parts = attention.c_attn.weight.grad.chunk(3, 1)
        wanted = {
            n: p.reshape(width, -1, d_head).transpose(0, 1)
            for n, p in zip("QKV", parts, strict=True)
        }
        wanted["O"] = attention.c_proj.weight.grad.reshape(-1, d_head, width)
    else:
        attention = module.model.layers[1].self_attn
        wanted = {
            n: getattr(attention, f"{n.lower()}_proj").weight.grad.reshape(-1, d_head, width).mT
            for n in "QKV"
        }
        wanted["O"] = attention.o_proj.weight.grad.T.reshape(-1, d_head, width)
    for name, one in wanted.items():
        assert torch.allclose(made[name], one, atol=1e-5 * float(one.abs().max()) + 1e-6), name
    for one, before in zip(module.parameters(), kept, strict=True):
        one.requires_grad_(before)
        one.grad = None


def test_attention_by_inverse_frequency_has_tau_minus_one() -> None:
    counts = np.array([1, 5, 2, 9])
    assert _tau(1 / counts, counts) == pytest.approx(-1)
    assert _tau(counts.astype(float), counts) == pytest.approx(1)
    assert np.isnan(_tau(np.ones(4), counts))


def test_tau_is_scipys_with_ties() -> None:
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 4, 9)
    rows = rng.integers(0, 5, (2, 3, 9)).astype(float)
    wanted = [[kendalltau(row, counts).statistic for row in some] for some in rows]
    assert _tau(rows, counts) == pytest.approx(np.array(wanted))
    assert np.isnan(_tau(rows, np.full(9, 2))).all()


def test_rare_attention_counts_each_token_once_and_leaves_the_bos_out() -> None:
    model, start = bundled(), bundled().tokenizer.bos_token_id
    tokens = torch.tensor([[start, 7, 9, 7, 11, 13, 5], [start, 5, 7, 9, 9, 13, 15]])
    counts = torch.arange(model.shape.d_vocab)
    end = torch.nn.functional.one_hot(torch.tensor([6, 6]), 7).bool()
    probe = hs.probes.from_tokens(tokens, marks={"end": end})
    found = hs.relevance.rare_attention(model, probe, counts)
    acts = hs.capture.collect(model, probe)
    for example in range(2):
        row = acts[1].pattern[example, 2, 6, 1:].numpy()
        ids = tokens[example, 1:].numpy()
        kinds = sorted(set(ids.tolist()))
        mean = [row[ids == one].mean() for one in kinds]
        assert found.per_example[1, 2, example] == pytest.approx(kendalltau(mean, kinds).statistic)
    one_by_one = hs.relevance.rare_attention(model, probe, counts, batch_size=1)
    assert one_by_one.per_example == pytest.approx(found.per_example)
    twice = hs.probes.from_tokens(tokens, marks={"end": end | end.roll(1, 1)})
    with pytest.raises(InputError, match="one position marked 'end'"):
        hs.relevance.rare_attention(model, twice, counts)


def test_spans_of_one_text_are_a_cluster(found: hs.relevance.Memorized) -> None:
    clusters = found.heads["rare_attention"].design.clusters
    assert clusters is not None
    assert len(set(clusters)) <= 3 < len(clusters)


def test_gradients_do_not_depend_on_the_batch() -> None:
    model = hs.load(families.build("llama"))
    tokens = families.tokens(3)
    targets = tokens.roll(-1, 1)
    targets[:, -1] = targets[1, 3:] = -1
    targets[2] = -1
    probe = hs.probes.from_tokens(tokens, targets=targets)
    whole = hs.relevance.weight_gradients(model, probe)
    parts = hs.relevance.weight_gradients(model, probe, batch_size=1)
    for layer, values in whole.items():
        for name, one in values.items():
            assert torch.allclose(one, parts[layer][name], atol=1e-6), name
    nothing = hs.probes.from_tokens(tokens, targets=torch.full_like(tokens, -1))
    with pytest.raises(InputError, match="no targets"):
        hs.relevance.weight_gradients(model, nothing)


def test_scores_of_heads(found: hs.relevance.Memorized, tmp_path) -> None:  # noqa: ANN001
    assert list(found.heads) == ["rare_attention", "grad_Q", "grad_K", "grad_V", "grad_O"]
    rare = found.heads["rare_attention"]
    assert (np.abs(rare.mean) <= 1).all()
    assert rare.control_per_example is not None
    assert (found.heads["grad_O"].mean > 0).any()
    found.save(tmp_path / "found.safetensors")
    again = hs.relevance.Memorized.load(tmp_path / "found.safetensors")
    assert again.spans == found.spans
    assert len(found.to_pandas()) == len(found.spans)


def test_a_model_that_norms_its_queries_has_no_gradients() -> None:
    model = hs.load(families.build("qwen3"))
    texts = [[5, 6, 7, 5, 6, 7, 5, 6, 7, 8]]
    found = hs.relevance.memorized(model, texts, prefix=4, length=1, stride=1)
    assert np.isnan(found.heads["grad_O"].mean).all()


@pytest.mark.parametrize(
    ("texts", "given", "said"),
    [
        ([[1, 2, 3, 4]], {"prefix": 2, "length": 1}, "occurs twice"),
        ([[1, 1, 3]], {"prefix": 9, "length": 1}, "longest text has 3"),
        ([[1, 1, 999]], {"prefix": 1, "length": 1}, "token 999"),
        ([[1, 1, -7]], {"prefix": 1, "length": 1}, "token -7"),
        ([], {}, "at least one"),
        ("one text", {}, "list of texts"),
        ([[1, 1, 3]], {"prefix": 0}, "prefix=0"),
    ],
)
def test_a_corpus_that_says_nothing_is_refused(texts: list, given: dict, said: str) -> None:
    with pytest.raises(InputError, match=said):
        hs.relevance.memorized(hs.load(families.build("gpt2")), texts, **given)
