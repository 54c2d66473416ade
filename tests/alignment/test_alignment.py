"""Alignment heads: a wired head, hand cases, and slow obvious versions of what is measured."""

from typing import Any

import numpy as np
import pytest
import torch
import transformers

import headscope as hs
from headscope.errors import InputError, UnsupportedModelError
from tests.models.encoders import CONFIGS, tokenizer, widened
from tests.models.seq2seq import both_sides, module_of

N = 6


def wired() -> Any:
    """A BART of one layer whose cross head 1 has target i look at source N-1-i."""
    torch.manual_seed(0)
    config = transformers.BartConfig(
        vocab_size=40, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=8, decoder_ffn_dim=8, pad_token_id=1,
        max_position_embeddings=16, bos_token_id=0, eos_token_id=2, decoder_start_token_id=2,
        init_std=0.3,
    )  # fmt: skip
    model = transformers.BartForConditionalGeneration(config).eval()
    body = model.model
    with torch.no_grad():
        for stack in (body.encoder, body.decoder):
            places = torch.zeros(18, 32)
            places[2 : 2 + 16, :16] = torch.eye(16)  # the table begins with two rows of its own
            stack.embed_positions.weight.copy_(places)
            layer = stack.layers[0]
            for part in (layer.self_attn.out_proj, layer.fc2):
                part.weight.zero_()
                part.bias.zero_()
        body.shared.weight[:, :16] = 0.0
        body.shared.weight[:, 16:] *= 0.01
        cross = body.decoder.layers[0].encoder_attn
        cross.q_proj.weight[16:] = 0.0
        cross.k_proj.weight[16:] = 0.0
        cross.q_proj.weight[16:, :16] = 2 * torch.eye(16)
        for place in range(N):
            cross.k_proj.weight[16 + place, N - 1 - place] = 2.0
    return model


def probe_of(model: Any, examples: int = 4) -> Any:
    draw = torch.Generator().manual_seed(3)
    ids = torch.randint(5, 39, (examples, N), generator=draw)
    return hs.probes.translation(model, ids, ids.flip(1))


REVERSED = [(at, N - 1 - at) for at in range(N)]


def test_the_wired_head_is_found() -> None:
    model = hs.load(wired())
    probe = probe_of(model, 8)
    table = hs.alignment.find(model, probe, links=[REVERSED] * 8)
    for score, value in (
        ("alignment_accuracy", 1.0),
        ("alignment_precision", 1.0),
        ("alignment_recall", 1.0),
        ("alignment_error", 0.0),
        ("monotonicity", -1.0),
    ):
        assert table[score]["X0H1"] == pytest.approx(value, abs=1e-9), score
    assert table["coverage"]["X0H1"] > 0.99
    assert table["source_end"]["X0H1"] == pytest.approx(1 / N, abs=0.01)
    assert table["path_mass"]["X0H1"] < 0.5  # its path runs backwards
    assert hs.alignment.heads(table) == [[0, 1]]
    assert hs.alignment.heads(table, 1) == [[0, 1]]
    assert hs.alignment.heads(table, 1, score="alignment_error") == [[0, 1]]
    assert list(table.stacks) == ["cross"]
    rows = hs.alignment.matrix(model, probe, hs.alignment.heads(table))
    assert rows[0].argmax(-1).tolist() == [N - 1 - at for at in range(N)]
    walked = hs.alignment.path(rows[0].flip(0))
    assert {(at, at) for at in range(N)} <= set(walked)
    assert (walked[0], walked[-1]) == ((0, 0), (N - 1, N - 1))


def test_without_links_a_head_that_follows_the_source_is_found() -> None:
    module = wired()
    cross = module.model.decoder.layers[0].encoder_attn
    with torch.no_grad():
        cross.k_proj.weight[16:] = 0.0
        for place in range(N):
            cross.k_proj.weight[16 + place, place] = 2.0
    model = hs.load(module)
    table = hs.alignment.find(model, probe_of(model, 8))
    assert "alignment_accuracy" not in table
    assert table["path_mass"]["X0H1"] > 0.95
    assert table["path_mass"].null[0, 1] < 0.8
    assert table["monotonicity"]["X0H1"] == pytest.approx(1.0)
    assert hs.alignment.heads(table, 1) == [[0, 1]]


@pytest.mark.parametrize("at", ["output", "input"])
def test_measures_are_those_of_plain_rows(at: Any) -> None:
    from scipy.stats import kendalltau

    model = hs.load(module_of("bart"))
    inputs = both_sides("bart")
    targets = inputs["decoder_input_ids"].roll(-1, 1)
    probe = hs.probes.from_batch(inputs, targets=targets)
    sure = [[(0, 1), (2, 2), (4, 3)], [(1, 1), (2, 0)]]
    possible = [[(0, 2), (1, 5)], [(3, 4)]]
    table = hs.alignment.find(model, probe, sure, possible, at=at)
    acts = hs.capture.collect(model, probe, stack="cross")
    for layer, head in ((0, 0), (1, 3)):
        values: dict[str, list[float]] = {}
        for example, (queries, keys) in enumerate(((10, 13), (7, 9))):
            rows = acts[layer].pattern[example, head, :queries, :keys].double().numpy()
            rows = rows if at == "output" else rows[1:]
            own = [(t, int(row.argmax())) for t, row in enumerate(rows)]
            S, P = set(sure[example]), {*sure[example], *possible[example]}
            A = {link for link in own if link[0] < len(rows) - 1}  # the last token has no link
            linked = {t for t, _ in P}
            values.setdefault("alignment_accuracy", []).append(len(A & P) / len(linked))
            values.setdefault("alignment_precision", []).append(len(A & P) / len(A))
            values.setdefault("alignment_recall", []).append(len(A & S) / len(S))
            values.setdefault("alignment_error", []).append(
                1 - (len(A & S) + len(A & P)) / (len(A) + len(S))
            )
            values.setdefault("monotonicity", []).append(
                kendalltau(range(len(own) - 1), [s for _, s in own[:-1]]).statistic
            )
            got = np.minimum(rows.sum(0)[:-1], 1)
            values.setdefault("coverage", []).append(got.mean())
            values.setdefault("source_end", []).append(rows[:, -1].mean())
            values.setdefault("path_mass", []).append(slow_path(rows) / len(rows))
        for name, expected in values.items():
            found = table[name].per_example[layer, head]
            np.testing.assert_allclose(found, expected, atol=1e-5, err_msg=name)


def slow_path(rows: np.ndarray) -> float:
    """Largest sum of a monotone path, by trying every step."""
    from functools import cache

    @cache
    def best(i: int, j: int) -> float:
        steps = [(i - 1, j - 1), (i - 1, j), (i, j - 1)]
        before = [best(a, b) for a, b in steps if a >= 0 and b >= 0]
        return float(rows[i, j]) + (max(before) if before else 0.0)

    return best(rows.shape[0] - 1, rows.shape[1] - 1)


def test_the_error_rate_of_a_hand_case() -> None:
    from headscope.alignment import _measures

    rows = np.zeros((1, 4, 3))
    for target, place in enumerate((0, 2, 1, 2)):
        rows[0, target, place] = 1.0
    sure = np.zeros((4, 3), dtype=bool)
    sure[[0, 1], [0, 1]] = True
    possible = sure.copy()
    possible[[1, 3], [2, 2]] = True
    found = _measures(rows, sure, possible)
    # A = 4 links, |A and S| = 1, |A and P| = 3, |S| = 2.
    assert found["alignment_error"][0] == pytest.approx(1 - (1 + 3) / (4 + 2))
    assert found["alignment_precision"][0] == 3 / 4
    assert found["alignment_recall"][0] == 1 / 2
    assert found["alignment_accuracy"][0] == 1.0  # targets 0, 1 and 3 have links


def test_random_heads_align_nothing() -> None:
    model = hs.load(module_of("bart"))
    draw = torch.Generator().manual_seed(5)
    ids = torch.randint(5, 95, (12, 9), generator=draw)
    probe = hs.probes.translation(model, ids, ids)
    links = [[(at, at) for at in range(9)]] * 12
    table = hs.alignment.find(model, probe, links)
    assert hs.alignment.heads(table) == []


def test_what_does_not_fit_is_a_sentence() -> None:
    model = hs.load(wired())
    probe = probe_of(model, 2)
    for refused, why in (
        (lambda: hs.alignment.find(model, probe, [[(0, 9)], []]), "link .* counted from 0"),
        (
            lambda: hs.alignment.find(model, probe, [[(0, 0)]]),
            "links for 1 examples, and the probe has 2",
        ),
        (lambda: hs.alignment.find(model, probe, torch.ones(2, 2, 2) > 0), "have shape"),
        (lambda: hs.alignment.find(model, probe, None, [[], []]), "give links too"),
        (lambda: hs.alignment.find(model, probe, at="mid"), "give 'output' or 'input'"),
        (lambda: hs.alignment.find(model, probe, draws=0), "random orders"),
        (lambda: hs.alignment.find(model, probe.source), "source"),
        (lambda: hs.alignment.matrix(model, probe, []), "no heads given"),
        (lambda: hs.alignment.matrix(model, probe, [[0, 7]]), "no head X0H7"),
        (lambda: hs.alignment.path(torch.zeros(0, 3)), "give a matrix"),
        (lambda: hs.alignment.find(hs.load("tiny-llama"), probe), "no stack 'cross'"),
    ):
        with pytest.raises(InputError, match=why):
            refused()


# Heads of concepts.

FRUIT, COLOUR, ANIMAL = range(10, 15), range(20, 25), range(30, 35)
WORDS = {
    name: [[one] for one in some]
    for name, some in (("fruit", FRUIT), ("colour", COLOUR), ("animal", ANIMAL))
}


def with_concepts(loved: int = 16) -> Any:
    """The wired model, whose head 0 looks at one of three directions that words have."""
    module = wired()
    cross = module.model.decoder.layers[0].encoder_attn
    with torch.no_grad():
        for number, some in enumerate((FRUIT, COLOUR, ANIMAL)):
            module.model.shared.weight[list(some), 16 + number] = 3.0
        cross.q_proj.weight[:16] = 0.0
        cross.q_proj.bias[:16] = 0.0
        cross.q_proj.bias[0] = 8.0
        cross.k_proj.weight[:16] = 0.0
        cross.k_proj.weight[0, loved] = 4.0
    return module


@pytest.mark.parametrize(("loved", "concept"), [(16, "fruit"), (18, "animal")])
def test_a_head_that_looks_at_one_concept_gets_all_its_votes(loved: int, concept: str) -> None:
    model = hs.load(with_concepts(loved))
    probe = probe_of(model, 6)
    found = hs.alignment.concepts(model, probe, WORDS, draws=3)
    row = found.concepts.index(concept)
    assert found.shares[row, 0] == 1.0
    assert found.votes == 18
    np.testing.assert_allclose(found.shares.sum(0), 1.0)
    # The other head looks at positions, which all words share.
    assert found.shares[:, 1].max() < 0.8
    np.testing.assert_allclose(found.relevance.sum(1), 2.0)  # a mean of 1 over two heads
    assert found.p_value[row, 0] == pytest.approx(1 / 40)
    assert found.p_value[:, 1].min() > 0.2
    assert found.top(concept, 1)[0][0] == hs.HeadIndex.parse("X0H0")
    again = hs.alignment.concepts(model, probe, WORDS, draws=3, batch_size=1)
    np.testing.assert_array_equal(again.shares, found.shares)
    np.testing.assert_array_equal(again.null, found.null)


def test_votes_are_those_of_a_slow_version() -> None:
    from headscope.alignment import _Lexicon

    model = hs.load(module_of("bart"))
    module = model.module.eval()
    probe = hs.probes.from_batch(both_sides("bart"))
    words = {"one": [[7], [8, 9]], "two": [[10, 11, 12]], "three": [[13], [14], [15, 16]]}
    found = hs.alignment.concepts(model, probe, words, draws=2, deals=1)
    flat = [one for some in words.values() for one in some]
    lexicon = _Lexicon.of(model.stack("cross"), model, words, crosses=True)
    expected = np.zeros_like(found.shares)
    queries: dict[int, torch.Tensor] = {}
    handles = [
        layer.encoder_attn.q_proj.register_forward_hook(
            lambda _m, _a, out, at=at: queries.__setitem__(at, out)
        )
        for at, layer in enumerate(module.model.decoder.layers)
    ]
    with torch.no_grad():
        module(**both_sides("bart"), use_cache=False)
        states = [module.model.encoder(torch.tensor([one])).last_hidden_state[0] for one in flat]
    for handle in handles:
        handle.remove()
    for at, layer in enumerate(module.model.decoder.layers):
        drawn = lexicon.drawn([0, 1], at, 2, seed=0)
        for example in range(2):
            for draw in range(2):
                chosen = drawn[example, draw].tolist()
                owner = [n for n, one in enumerate(chosen) for _ in flat[one]]
                with torch.no_grad():
                    keys = layer.encoder_attn.k_proj(torch.cat([states[one] for one in chosen]))
                for head in range(4):
                    part = slice(head * 8, head * 8 + 8)
                    asked = queries[at][example, probe.real[example], part]
                    rows = (asked @ keys[:, part].T / 8**0.5).softmax(-1).mean(0)
                    means = [
                        float(rows[[n == concept for n in owner]].mean()) for concept in range(3)
                    ]
                    expected[int(np.argmax(means)), at * 4 + head] += 1 / 4
    np.testing.assert_allclose(found.shares, expected)


def test_random_models_have_no_heads_of_concepts() -> None:
    model = hs.load(module_of("bart"))
    probe = hs.probes.from_batch(both_sides("bart"))
    draw = np.random.default_rng(0)
    hits = 0
    for seed in range(8):
        tokens = draw.permutation(np.arange(5, 95))[:30].reshape(3, 10)
        words = {str(n): [[int(one)] for one in some] for n, some in enumerate(tokens)}
        found = hs.alignment.concepts(model, probe, words, deals=19, draws=4, seed=seed)
        hits += bool((found.p_value <= 0.05).any())
    assert hits <= 2  # of 8, at a level of 5% each


def test_an_encoder_has_heads_of_concepts_and_rotary_positions_are_refused(tmp_path: Any) -> None:
    torch.manual_seed(0)
    bert = hs.load(widened(transformers.BertModel(CONFIGS["bert"]())), tokenizer=tokenizer())
    probe = hs.probes.text(bert, ["the cat sat on the mat ."])
    words = {"animals": ["cat", "dog", "bird"], "places": ["house", "store", "sky"]}
    found = hs.alignment.concepts(bert, probe, words, deals=3)
    assert found.shares.shape == (2, len(bert.shape.heads))
    found.save(tmp_path / "concepts")
    again = hs.table.ConceptHeads.load(tmp_path / "concepts")
    assert again.summary() == found.summary()
    assert len(again.to_pandas()) == found.shares.size
    with pytest.raises(InputError, match="two concepts"):
        hs.alignment.concepts(bert, probe, {"animals": ["cat"]})
    with pytest.raises(InputError, match="concept"):
        found.top("animal")
    rotary = hs.load("tiny-llama")
    with pytest.raises(UnsupportedModelError, match="rotary"):
        hs.alignment.concepts(rotary, hs.probes.from_tokens([[5, 6]]), {"a": [[1]], "b": [[2]]})


def test_scaled_keys_are_a_plain_hooks() -> None:
    module = module_of("bart")
    model = hs.load(module)
    inputs = both_sides("bart")
    probe = hs.probes.from_batch(inputs, targets=inputs["decoder_input_ids"].roll(-1, 1))
    keys = torch.zeros_like(probe.of_source.real)
    keys[:, 2:4] = True
    view = model.stack("cross")
    factor = {"X1H2": -2.0, "X0H1": 3.0}
    scaled = hs.interventions.ScaleKeys(keys, factor)
    found = hs.ablate_heads(view, probe, hs.metrics.loss, scaled)
    acts = hs.capture.collect(view, probe)
    for head, (layer, number) in (("X1H2", (1, 2)), ("X0H1", (0, 1))):
        attention = module.model.decoder.layers[layer].encoder_attn
        with torch.no_grad():
            states = module.model.encoder(
                inputs["input_ids"], attention_mask=inputs["attention_mask"]
            ).last_hidden_state
            value = attention.v_proj(states)[..., number * 8 : number * 8 + 8]
        pattern = acts[layer].pattern[:, number]
        added = (factor[head] - 1) * (pattern * keys[:, None]) @ value

        def change(_m: Any, args: Any, added: Any = added, number: int = number) -> Any:
            z = args[0].clone()
            z[..., number * 8 : number * 8 + 8] += added
            return (z, *args[1:])

        def loss(module: Any = module) -> Any:
            with torch.no_grad():
                logits = module(**inputs, use_cache=False).logits.log_softmax(-1)
            wanted = (probe.targets >= 0) & probe.real
            own = -logits.gather(-1, probe.targets.clamp_min(0)[..., None])[..., 0]
            return (own * wanted).sum(1) / wanted.sum(1)

        clean = loss()
        handle = attention.out_proj.register_forward_pre_hook(change)
        moved = loss() - clean
        handle.remove()
        np.testing.assert_allclose(found.per_example[layer, number], moved, atol=1e-4)
    assert found["X0H0"] == pytest.approx(0, abs=1e-6)  # a head without a factor keeps its own
    with pytest.raises(InputError, match="source position"):
        hs.ablate_heads(view, probe, hs.metrics.loss, hs.interventions.ScaleKeys(keys[:, :3]))
    with pytest.raises(InputError, match="finite"):
        hs.interventions.ScaleKeys("fruit", float("nan"))


def test_weakening_a_concept_in_its_head_takes_it_out_of_the_output() -> None:
    model = hs.load(with_concepts())
    draw = torch.Generator().manual_seed(5)
    ids = torch.randint(5, 10, (4, N), generator=draw)
    ids[:, 2] = torch.tensor([10, 11, 12, 13])
    probe = hs.probes.translation(
        model, ids, ids.flip(1), marks={"source": {"fruit": (ids >= 10) & (ids < 15)}}
    )
    found = hs.alignment.concepts(model, probe, WORDS)
    order = [head for head, _ in found.top("fruit")]
    view = model.stack("cross")
    weaker = hs.interventions.ScaleKeys("fruit", -2.0)
    both = [
        hs.ablate_cumulatively(view, probe, hs.metrics.kl_divergence, heads, weaker)
        for heads in (order, order[::-1])
    ]
    first = [float(one.mean[1]) for one in both]
    assert first[0] > 3 * first[1]  # the head of the concept moves the output most
    strength = hs.interventions.ScaleKeys("fruit", found.factors("fruit"))
    assert strength.factor[hs.HeadIndex.parse("X0H0")] > 1.5
    assert hs.ablate_heads(view, probe, hs.metrics.kl_divergence, strength)["X0H0"] > 0
