"""Anchors: pairs written out, gradients through whole patterns, sklearn's definition by hand."""

import numpy as np
import pytest
import torch

import headscope as hs
from headscope.errors import InputError
from headscope.models.taps import Tap
from headscope.relevance import pairwise_auc
from tests.models import families
from tests.relevance.slow import bundled

SHOWN = [
    ("cat", " Mary"), ("dog", " John"), ("store", " Mary"),
    ("park", " John"), ("box", " Mary"), ("road", " John"),
]  # fmt: skip
TEMPLATE = "the {text} and{label} ."


def probe_of(batch: int = 2) -> hs.Probe:
    """Five tokens, labels 7 and 9 shown at 1 and 3, the end at 5 of 7 positions."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(10, 60, (batch, 7), generator=generator)
    tokens[:, 1], tokens[:, 3] = 7, 9
    marks = {}
    for name, at in (("label_0", 1), ("label_1", 3), ("end", 5)):
        marks[name] = torch.zeros(batch, 7, dtype=torch.bool)
        marks[name][:, at] = True
    targets = torch.full_like(tokens, -1)
    targets[:, 5] = torch.tensor([7, 9] * (batch // 2))
    return hs.probes.from_tokens(tokens, marks=marks, targets=targets)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_oss"])
def test_flows_are_those_of_gradients_through_whole_patterns(family: str) -> None:
    model, probe = hs.load(families.build(family)), probe_of()
    found = hs.relevance.anchors(model, probe)
    patterns: dict[int, torch.Tensor] = {}

    def keep(view) -> None:  # noqa: ANN001
        patterns[view.layer] = view.value

    layers = model.shape.attention_layers
    logits = model.run(probe, reads={Tap("pattern", layer): keep for layer in layers}, grad=True)
    answers = probe.targets[:, 5]
    loss = torch.nn.functional.cross_entropy(logits[:, 5], answers, reduction="sum")
    slopes = torch.autograd.grad(loss, [patterns[layer] for layer in layers])
    for layer, slope in zip(layers, slopes, strict=True):
        gain = (slope * patterns[layer]).detach()
        for example in range(2):
            one = gain[example]
            into = [(q, k) for q in (1, 3) for k in range(q)]
            final = [(5, 1), (5, 3)]
            rest = [(q, k) for q in range(6) for k in range(q) if (q, k) not in {*into, *final}]
            for name, pairs in (
                ("text_to_label", into), ("label_to_final", final), ("other", rest)
            ):  # fmt: skip
                whole = np.mean([abs(float(one[:, q, k].sum())) for q, k in pairs])
                assert found.flows[name][layer, example] == pytest.approx(whole, rel=1e-3, abs=1e-6)
                head = np.mean([abs(float(one[1, q, k])) for q, k in pairs])
                mine = found.heads[name].per_example[layer, 1, example]
                assert mine == pytest.approx(head, rel=1e-3, abs=1e-6)


def test_a_batch_size_changes_nothing() -> None:
    model, probe = hs.load(families.build("gpt2")), probe_of(4)
    one, all_ = (hs.relevance.anchors(model, probe, batch_size=n) for n in (1, 4))
    assert one.flows["other"] == pytest.approx(all_.flows["other"], abs=1e-5)
    assert one.layer_auc == pytest.approx(all_.layer_auc, abs=1e-6, nan_ok=True)


def test_auc_of_two_and_of_three_classes() -> None:
    gen = np.random.default_rng(0)
    scores, chosen = gen.normal(size=(9, 3)), np.array([0, 1, 2] * 3)
    wanted = []
    for i, j in ((0, 1), (0, 2), (1, 2)):
        wins = [
            (b > a) + (b == a) / 2
            for a in (scores[chosen == i, j] - scores[chosen == i, i])
            for b in (scores[chosen == j, j] - scores[chosen == j, i])
        ]
        wanted.append(np.mean(wins))
    assert float(pairwise_auc(scores, chosen)) == pytest.approx(np.mean(wanted))
    assert float(pairwise_auc(np.zeros((4, 2)), np.array([0, 1, 0, 1]))) == 0.5
    assert np.isnan(pairwise_auc(np.zeros((4, 2)), np.zeros(4, int)))
    perfect = np.eye(3)[chosen]
    assert float(pairwise_auc(perfect, chosen)) == 1.0


def test_isolating_cuts_queries_off_and_the_control_cuts_as_many() -> None:
    cut = hs.relevance.CutOff(frozenset({0}), torch.tensor([[False, True, False]]))
    pattern = torch.rand(1, 2, 3, 3).tril()
    new = cut(0, pattern)
    assert torch.equal(new[:, :, [0, 2]], pattern[:, :, [0, 2]])
    assert new[0, :, 1].tolist() == [[0.0, 1.0, 0.0]] * 2
    found = hs.relevance.anchors(hs.load(families.build("gpt2")), probe_of(4), isolate=3)
    assert found.isolation is not None
    assert found.isolation["loss, label words, first 3 layers"] == pytest.approx(
        found.isolation["loss, label words, last 3 layers"]
    )
    assert len(found.isolation) == 8


def test_weights_at_zero_are_the_plain_model_and_learning_lowers_the_loss() -> None:
    model = bundled()
    probe = hs.probes.in_context(model, SHOWN, template=TEMPLATE, shots=2)
    learned = hs.relevance.reweight(model, probe, steps=4)
    rows = model.forward(probe.tokens, real=probe.real)[probe.mark("end")]
    labels = probe.tokens[0][probe.mark("label_0")[0]], probe.tokens[0][probe.mark("label_1")[0]]
    two = torch.stack([rows[:, int(one)] for one in labels], 1)
    plain = torch.nn.functional.cross_entropy(two, probe.facts["class"].long())
    assert learned.losses[0] == pytest.approx(float(plain), rel=1e-4)
    assert learned.losses[3] < learned.losses[0]
    assert learned.size.shape == (3, 4)


def test_prompts_hold_their_labels_and_not_the_query() -> None:
    model = bundled()
    probe = hs.probes.in_context(model, SHOWN, template=TEMPLATE, shots=4, seed=3)
    decode = model.tokenizer.decode
    for row in range(len(probe)):
        text = decode(probe.tokens[row][probe.real[row]])
        assert text.count(SHOWN[row][0]) == 1
        assert text.endswith(f"the {SHOWN[row][0]} and")
        assert decode([int(probe.targets[row].max())]) == SHOWN[row][1]
        for number, label in enumerate((" Mary", " John")):
            ids = probe.tokens[row][probe.mark(f"label_{number}")[row]]
            assert {decode([int(one)]) for one in ids} == {label}
            assert len(ids) == 2
        moved = probe.corrupt.tokens[row][probe.corrupt.mark("label")[row]]
        own = probe.tokens[row][probe.mark("label")[row]]
        assert sorted(moved) == sorted(own)
        assert not torch.equal(moved, own)
    again = hs.probes.in_context(model, SHOWN, template=TEMPLATE, shots=4, seed=3)
    assert torch.equal(again.tokens, probe.tokens)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            {"demonstrations": [("a", " Mary went"), ("b", " Mary went")], "shots": 1},
            "not a separate token",
        ),
        ({"demonstrations": [("a", " Mary"), ("b", " John")]}, "single example"),
        ({"queries": [("road", " Peter")]}, "no demonstration"),
        ({"template": "{label} {text}"}, "template"),
        ({"shots": 6}, "shots=6"),
        ({"batch": 9}, "batch=9"),
        ({"demonstrations": []}, "demonstrations= is empty"),
        ({"demonstrations": [("cat", "")]}, "pair of texts"),
    ],
)
def test_examples_that_make_no_prompt_are_refused(arguments: dict, said: str) -> None:
    given = {"demonstrations": SHOWN, "template": TEMPLATE, **arguments}
    with pytest.raises(InputError, match=said):
        hs.probes.in_context(bundled(), **given)


def test_probes_without_classes_are_refused() -> None:
    model = hs.load(families.build("gpt2"))
    with pytest.raises(InputError, match="label words of two classes"):
        hs.relevance.anchors(model, hs.probes.from_tokens(families.tokens(2)))
    probe = probe_of()
    probe.tokens[0, 1] = 8
    with pytest.raises(InputError, match="different tokens"):
        hs.relevance.anchors(model, probe)
    with pytest.raises(InputError, match="isolate=9"):
        hs.relevance.anchors(model, probe_of(), isolate=9)
    with pytest.raises(InputError, match="rate"):
        hs.relevance.reweight(model, probe_of(), rate=float("nan"))


def test_frozen_weights_give_the_same_flows() -> None:
    found = []
    for ask in (True, False):
        module = families.fresh("gpt2")
        for one in module.parameters():
            one.requires_grad_(ask)
        model = hs.load(module)
        tokens = families.tokens(4)
        tokens[:, 2], tokens[:, 4] = 5, 9
        at = torch.arange(tokens.shape[1])
        marks = {name: (at == n).expand(4, -1) for name, n in
                 (("label_0", 2), ("label_1", 4), ("end", 6))}  # fmt: skip
        targets = torch.full_like(tokens, -1)
        targets[:, 6] = torch.tensor([5, 9, 5, 9])
        probe = hs.probes.from_tokens(tokens, targets=targets, marks=marks)
        gradients = hs.relevance.weight_gradients(model, probe)[1]["V"]
        found.append((hs.relevance.anchors(model, probe).flows["other"], gradients))
        assert all(one.requires_grad == ask for one in module.parameters())
        assert all(one.grad is None for one in module.parameters())
    assert found[0][0] == pytest.approx(found[1][0])
    assert torch.allclose(found[0][1], found[1][1])
