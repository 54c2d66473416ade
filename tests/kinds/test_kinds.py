"""The catalogue: planted heads are named, others are not; random weights name next to nothing."""

from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import headscope as hs
from headscope.errors import InputError
from headscope.heads import HeadIndex
from headscope.kinds import KINDS, UNASKED, AskedModel, Criterion, Kind, measures
from headscope.models.protocol import HeadModel
from tests.handwired import handwired_gpt2

# Those that run long texts, which no tiny model without training answers.
SLOW = {"retrieval", "query_focused_retrieval"}


@cache
def bundled() -> HeadModel:
    return hs.load()


@cache
def random_model(seed: int) -> HeadModel:
    """Random weights behind the bundled model's tokenizer, with attention far from flat."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=bundled().shape.d_vocab, n_embd=48, n_layer=3, n_head=4, n_positions=256,
        initializer_range=0.3, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return hs.load(GPT2LMHeadModel(config).eval(), tokenizer=bundled().tokenizer)


def test_there_are_forty_kinds_and_each_says_all_of_itself() -> None:
    assert len(KINDS) >= 40
    for kind in KINDS.values():
        assert all((kind.said, kind.probe, kind.control, kind.source, kind.weakness)), kind.name
    assert not set(KINDS) & {one.name for one in UNASKED}
    assert all(one.reason.endswith(".") for one in UNASKED)


def test_planted_heads_are_named_and_others_are_not() -> None:
    planted = handwired_gpt2()
    names = ["previous_token", "duplicate_token", "current_token", "induction", "positional"]
    found = hs.kinds.survey(hs.load(planted.model), names, confirm=False)
    assert set(found.named("previous_token")) == {HeadIndex(0, 0), HeadIndex(1, 1)}
    assert found.named("duplicate_token") == (planted.roles["duplicate_token"],)
    assert found.named("induction") == (planted.roles["induction"],)
    # The duplicate and the induction head rest on their own token where they find nothing.
    resting = {planted.roles["duplicate_token"], planted.roles["induction"]}
    assert set(found.named("current_token")) == {HeadIndex(0, 4), HeadIndex(1, 4), *resting}
    assert found.named("positional") == ()
    assert found.of("L0H0") == ("previous_token",)


def test_a_planted_induction_head_is_confirmed_by_ablation() -> None:
    made = hs.compiled.induction(tokens=16, length=33, rotation_seed=1, noise_heads=2)
    found = hs.kinds.survey(made.model, ["previous_token", "induction"])
    (induction,) = made.truth.roles["induction"]
    (previous,) = made.truth.roles["previous_token"]
    assert found.named("induction") == (induction,)
    assert found.named("previous_token") == (previous,)
    assert all(one.confirmed for one in found.findings)
    assert all(one.effect > 0 for one in found.findings)


def test_the_clearest_heads_of_a_kind_are_ablated_as_many_as_asked() -> None:
    model = hs.load(handwired_gpt2().model)
    found = hs.kinds.survey(model, ["previous_token"], most=1).findings
    assert [one.confirmed is None for one in found] == [False, True]
    with pytest.raises(InputError, match="most=0"):
        hs.kinds.survey(model, most=0)


def test_copying_and_suppression_are_told_apart() -> None:
    planted = handwired_gpt2()
    found = hs.kinds.survey(hs.load(planted.model), ["copying", "copy_suppression"], confirm=False)
    assert found.named("copy_suppression") == (planted.roles["anti_copy"],)
    assert found.named("copying") == (planted.roles["induction"],)


def test_random_weights_name_next_to_nothing() -> None:
    asked = [name for name in KINDS if name not in SLOW]
    found = hs.kinds.survey(random_model(0), asked, confirm=False)
    assert len(found.asked) > 18
    assert found.share_named <= 0.05


def test_weights_of_a_successor_program_are_read() -> None:
    made = hs.compiled.from_library("successor")
    order = [(n, n + 1) for n in range(1, 5)]
    found = hs.kinds.relation_scores(made.model, [order])
    (head,) = made.truth.roles["successor"]
    assert found.mean[head] == 1.0
    assert found.null[head] == pytest.approx(1 / 4)
    backwards = hs.kinds.relation_scores(made.model, [[(b, a) for a, b in order]])
    assert backwards.mean[head] < 0.5


def test_relation_scores_are_those_of_the_formula() -> None:
    model = bundled()
    pairs = [(5, 9), (7, 11), (9, 5), (11, 30)]
    found = hs.kinds.relation_scores(model, [pairs])
    module = model.module.transformer
    answers = [5, 9, 11, 30]
    for layer, head in ((0, 1), (2, 3)):
        block = module.h[layer]
        e = module.wte.weight[[a for a, _ in pairs]]
        x = e if layer == 0 else e + module.h[0].mlp(module.h[0].ln_2(e))
        v = (block.ln_1(x) @ block.attn.c_attn.weight + block.attn.c_attn.bias)[:, 256:]
        write = v[:, 32 * head : 32 * head + 32] @ block.attn.c_proj.weight[32 * head :][:32]
        write = (write - write.mean(-1, keepdim=True)) * module.ln_f.weight
        best = (write @ model.module.lm_head.weight[answers].T).argmax(-1)
        wanted = np.mean([answers[int(i)] == b for i, (_, b) in zip(best, pairs, strict=True)])
        if layer == 0:  # above it the first block's own input may differ in bias terms
            assert found.mean[layer, head] == pytest.approx(wanted)


def test_a_kind_is_named_only_if_all_criteria_hold() -> None:
    low, high = np.full((3, 4), 0.9), np.full((3, 4), 0.1)
    sure = np.full((3, 4), 1e-6)

    def measure(_asked: AskedModel) -> list[Criterion]:
        first = low.copy()
        first[1, 2] = 0.2
        return [Criterion("a", first, 0.5, sure), Criterion("b", high, 0.1)]

    kind = Kind("mine", "does", "none", "none", measure, "ours", "none")
    found = hs.kinds.survey(bundled(), kind, confirm=False)
    assert len(found.findings) == 11
    assert HeadIndex(1, 2) not in found.named("mine")
    unsure = [Criterion("a", low, 0.5, np.full((3, 4), 0.2))]
    doubt = Kind("doubt", "does", "none", "none", lambda _: unsure, "ours", "none")
    assert not hs.kinds.survey(bundled(), doubt, confirm=False).findings


def test_one_sided_p_values() -> None:
    drawn = np.random.default_rng(0).normal(0.5, 1, size=12)
    scores = hs.HeadScores.from_effects("x", np.stack([drawn, -drawn])[None], kv_heads=1)
    up, down = hs.kinds.one_sided(scores, 1)[0], hs.kinds.one_sided(scores, -1)[0]
    assert up[0] == pytest.approx(scores.p_value[0, 0] / 2)
    assert down[1] == pytest.approx(up[0])
    assert up + down == pytest.approx([1, 1])


def test_what_cannot_be_asked_is_said() -> None:
    found = hs.kinds.survey(hs.load(handwired_gpt2().model), ["name_mover", "next_token"])
    assert "no tokenizer" in found.left_out["name_mover"]
    assert "left to right" in found.left_out["next_token"]
    assert not found.findings
    with pytest.raises(InputError, match="did you mean 'induction'"):
        hs.kinds.survey(bundled(), "inducton")
    with pytest.raises(InputError, match="maze"):
        hs.kinds.survey(bundled(), "adjacency")
    with pytest.raises(InputError, match="alpha"):
        hs.kinds.survey(bundled(), "induction", alpha=2.0)
    with pytest.raises(InputError, match="no kinds"):
        hs.kinds.survey(bundled(), [])
    with pytest.raises(InputError, match="two distinct"):
        hs.kinds.relation_scores(bundled(), [[(1, 2), (3, 2)]])


def test_the_table_is_kept_and_shown(tmp_path) -> None:  # noqa: ANN001
    found = hs.kinds.survey(bundled(), ["induction", "next_token"])
    found.save(tmp_path / "kinds.safetensors")
    again = hs.kinds.KindTable.load(tmp_path / "kinds.safetensors")
    assert again.findings == found.findings
    assert again.summary() == found.summary()
    assert "not asked, next_token" in found.summary()
    assert list(found.to_pandas()["kind"].unique()) == ["induction"]
    assert found.sections()[0].title == "which heads are what"


def test_statements_of_both_halves_share_no_name() -> None:
    texts = measures.statements(bundled())
    assert texts.clusters[:5] == (0, 1, 0, 1, 2)  # clusters at odd places are rows at odd places
    decode = bundled().tokenizer.decode
    halves = [set(), set()]
    for probe in (texts.high, texts.low):
        for row in range(len(probe)):
            text = decode(probe.tokens[row][probe.real[row]])
            halves[row % 2] |= {one for one in text.replace(".", "").split() if one[0].isupper()}
    assert halves[0] & halves[1] <= {"The", "<|bos|>The"}


def swapped_words(rows: int = 48) -> tuple[Kind, Kind]:
    """Kinds whose classes are told by which of two words comes first, and by the words."""
    good, bad = torch.arange(10, 10 + rows), torch.arange(100, 100 + rows)
    filler, end = torch.full_like(good, 5), torch.full_like(good, 6)
    ends = torch.zeros(rows, 5, dtype=torch.bool)
    ends[:, 4] = True

    def probe(second: torch.Tensor, third: torch.Tensor) -> hs.Probe:
        made = hs.probes.from_tokens(torch.stack([filler, second, filler, third, end], 1))
        return replace(made, marks={"end": ends})

    clusters = tuple(range(rows))
    order = measures.LabelledTexts(probe(good, bad), probe(bad, good), clusters)
    words = measures.LabelledTexts(probe(good, good), probe(bad, bad), clusters)
    first, second = (
        Kind(
            name, "does", "none", "none", measures.told_apart(lambda _, t=texts: t), "ours", "none"
        )
        for name, texts in (("order", order), ("words", words))
    )
    return first, second


def reading_model() -> HeadModel:
    """Heads that all attend evenly, but for L0H2, which attends to the second token.

    Embeddings of good and bad words differ along one direction. Positions add the same length to
    all of them, so that a norm scales all alike and even attention knows no order.
    """
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=200, n_embd=48, n_layer=1, n_head=4, n_positions=8, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    module, d_head = GPT2LMHeadModel(config).eval(), 12
    label, place = torch.zeros(48), torch.zeros(48)
    label[:2] = torch.tensor([1.0, -1.0])
    place[2:4] = torch.tensor([3.0, -3.0])
    block = module.transformer.h[0].attn
    with torch.no_grad():
        table = torch.randn(200, 48) * 0.5
        table[:, :4] = 0
        table = table - table.mean(-1, keepdim=True)
        table[:, :4] = 0
        table[10:100] += label
        table[100:] -= label
        table[10:] -= table[10:].mean(-1, keepdim=True)
        module.transformer.wte.weight.copy_(table)
        module.transformer.wpe.weight.copy_(-place.expand(8, 48))
        module.transformer.wpe.weight[1] = place
        block.c_attn.weight[:, :96] = 0
        block.c_attn.weight[:, 96:] = torch.randn(48, 48) / 7
        block.c_attn.bias.zero_()
        block.c_attn.weight[:, 48 + 2 * d_head] = place
        block.c_attn.bias[2 * d_head] = 10.0
    return hs.load(module)


def test_a_head_that_reads_more_than_the_words_is_named_and_no_other_one() -> None:
    order, words = swapped_words()
    found = hs.kinds.survey(reading_model(), [order, words], confirm=False)
    assert found.named("order") == (HeadIndex(0, 2),)
    # Every head tells the words apart, above the threshold, and none is named for it.
    assert (found.values["words"] >= 0.8).all()
    assert found.named("words") == ()


def test_random_outputs_tell_nothing_apart() -> None:
    draw = torch.Generator().manual_seed(1)
    high, low = (torch.randn(64, 20, 10, 16, generator=draw) for _ in range(2))
    words = [torch.randn(64, 1, 1, 40, generator=draw) for _ in range(2)]
    clusters = tuple(at // 2 for at in range(64))
    area, lead, _ = measures.separations((high, low), (words[0], words[1]), clusters, 10)
    assert area.p is not None
    assert lead.p is not None
    assert np.mean(area.p < 0.05) < 0.09  # a level of 5%, 200 heads
    assert abs(area.value.mean() - 0.5) < 0.02
    # One planted head passes all three conditions, and it alone.
    high[:, 3, 4, 0] += 6.0
    criteria = measures.separations((high, low), (words[0], words[1]), clusters, 10)
    holds = np.all([one.value >= one.least for one in criteria], 0)
    holds &= np.max([one.p for one in criteria if one.p is not None], 0) < 0.001
    assert np.argwhere(holds).tolist() == [[3, 4]]


def test_placements_are_the_area_and_its_error() -> None:
    from scipy.stats import mannwhitneyu

    draw = torch.Generator().manual_seed(2)
    high, low = (torch.randn(40, 1, 1, 3, generator=draw) for _ in range(2))
    high = high + 0.7
    values, held = hs.kinds.placements(high, low, tuple(range(40)))
    vector = hs.steering.direction(high[::2], low[::2], "probe")[0, 0]
    scores = np.concatenate([(one[1::2, 0, 0] @ vector).numpy() for one in (high, low)])
    assert values.mean() == pytest.approx(mannwhitneyu(scores[:20], scores[20:]).statistic / 400)
    assert held == tuple(range(1, 40, 2))
    # DeLong's variance with covariances of placements, written out.
    up, down = scores[:20], scores[20:]
    wins = (up[:, None] > down) + 0.5 * (up[:, None] == down)
    s = np.cov(wins.mean(1), wins.mean(0))
    assert values.var(ddof=1) == pytest.approx(s[0, 0] + s[1, 1] + 2 * s[0, 1])


def test_the_words_alone_tell_neither_statements_nor_opinions() -> None:
    for made in (measures.statements(bundled()), measures.opinions(bundled())):
        both = [hs.kinds.mean_embedding(bundled(), one) for one in (made.high, made.low)]
        high, low = (one - one.mean(0) for one in both)
        counts = [
            torch.bincount(one.tokens[one.real], minlength=bundled().shape.d_vocab)
            for one in (made.high, made.low)
        ]
        assert torch.equal(*counts)
        assert max(made.clusters) >= 21
        assert len(high) == len(low) == len(made.clusters)


def test_a_kind_without_a_p_value_is_refused() -> None:
    def measure(_asked: AskedModel) -> list[Criterion]:
        return [Criterion("a", np.ones((3, 4)), 0.5)]

    with pytest.raises(InputError, match="'sure' has no criterion with a p-value"):
        hs.kinds.survey(bundled(), Kind("sure", "does", "none", "none", measure, "ours", "none"))


def test_the_final_norm_is_taken_out_of_what_backups_take_over() -> None:
    # Effects of heads that did not change what they write grow by the norm alone: none is left.
    model = bundled()
    probe = hs.probes.pairs(model, "ioi", batch=8, seed=1)
    gone = [HeadIndex(1, 1), HeadIndex(1, 2)]

    def effects() -> np.ndarray:
        return hs.score(model, probe, "direct_logit_difference")[
            "direct_logit_difference"
        ].per_example

    before = effects()
    with model.edited([hs.edits.zero(gone)]):
        after = effects()
    assert np.abs(after[0] - before[0]).max() > 1e-3
    fixed = hs.kinds.without_norm(before, after, gone)
    assert fixed[0] == pytest.approx(before[0], abs=1e-4)
    assert fixed[1, [0, 3]] == pytest.approx(before[1, [0, 3]], abs=1e-4)
    assert np.abs(fixed[2] - before[2]).max() > 1e-3  # these read the ablated layer


class _Reading:
    """Reads tokens as a tokenizer does that leaves the space of a first token out."""

    def __init__(self, texts: dict[int, str]) -> None:
        self._texts = texts

    def batch_decode(self, rows: list[list[int]]) -> list[str]:
        return [self._joined(row) for row in rows]

    def _joined(self, row: list[int]) -> str:
        first, *rest = (self._texts[one] for one in row)
        whole = first + "".join(one.removeprefix("##") for one in rest)
        return whole.replace("\u2581", " ").removeprefix(" ")


@pytest.mark.parametrize(
    "texts",
    [
        {1: "\u2581the", 2: "\u2581play", 3: "ing", 4: "s", 5: "."},
        {1: "\u2581the", 2: "\u2581play", 3: "##ing", 4: "##s", 5: "."},
    ],
    ids=["sentencepiece", "wordpiece"],
)
def test_pieces_of_words_whatever_the_tokenizer_writes(
    texts: dict[int, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measures, "need_tokenizer", lambda *_: _Reading(texts))
    probe = hs.probes.from_tokens(torch.tensor([[1, 2, 3, 4, 5, 1, 1]]))
    assert measures.pieces(bundled(), probe) == [(0, 2, 1), (0, 3, 1), (0, 3, 2)]


def test_kinds_of_a_probe_share_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    model, passes = bundled(), []
    run = type(model).run
    monkeypatch.setattr(type(model), "run", lambda *a, **b: (passes.append(1), run(*a, **b))[1])

    def count(*names: str) -> int:
        passes.clear()
        hs.kinds.survey(model, names, confirm=False)
        return len(passes)

    assert count("positional", "current_token", "copying") == count("current_token")
    assert count("name_mover", "negative_name_mover", "s_inhibition") == count("s_inhibition")
    assert count("correct_letter", "constant_letter", "single_letter") == count("single_letter")


def test_a_survey_goes_on_where_it_was_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["induction", "previous_token", "name_mover", "next_token"]
    whole = hs.kinds.survey(bundled(), names)
    with monkeypatch.context() as stopped:
        stopped.setattr(KINDS["name_mover"].__class__, "lacking", _stop_at_name_mover)
        with pytest.raises(KeyboardInterrupt):
            hs.kinds.survey(bundled(), names, folder=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    first = sorted(tmp_path.glob("induction-heads-*"))[0].stat().st_mtime_ns
    again = hs.kinds.survey(bundled(), names, folder=tmp_path)
    assert again.findings == whole.findings
    assert again.summary() == whole.summary()
    assert sorted(tmp_path.glob("induction-heads-*"))[0].stat().st_mtime_ns == first
    # All is there now: nothing runs. A damaged part is made again; another seed is another survey.
    kept = {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
    victim = sorted(tmp_path.glob("previous_token-heads-*"))[0]
    victim.write_bytes(victim.read_bytes()[:20])
    assert hs.kinds.survey(bundled(), names, folder=tmp_path).findings == whole.findings
    assert [file for file, at in kept.items() if file.stat().st_mtime_ns != at] == [victim]
    hs.kinds.survey(bundled(), ["induction"], seed=1, confirm=False, folder=tmp_path)
    assert len(list(tmp_path.iterdir())) == len(kept) + 1


def _stop_at_name_mover(kind: Kind, _model: HeadModel) -> str:
    if kind.name == "name_mover":
        raise KeyboardInterrupt
    return ""


def test_words_that_a_tokenizer_does_not_know_are_not_one_token() -> None:
    # They are all the same token: successors, relations and answers would be of nothing.
    from tests.kinds.test_planted import SPACE, _reads

    config = GPT2Config(vocab_size=8, n_embd=8, n_layer=1, n_head=1, n_positions=32)
    model = hs.load(
        GPT2LMHeadModel(config).eval(), tokenizer=_reads(["and", "Mary", SPACE + "Mary"])
    )
    assert measures.token_of(model, "Mary") is not None
    assert measures.token_of(model, "Sunday") is None
    found = hs.kinds.survey(model, ["successor", "name_mover", "context"])
    assert set(found.left_out) == {"successor", "name_mover", "context"}
    assert "no order" in found.left_out["successor"]
    with pytest.raises(InputError, match=r"\d of our names"):
        hs.probes.pairs(model, "ioi")


def test_tasks_that_do_not_fit_a_kind_are_refused() -> None:
    probe = hs.probes.repeated_tokens(bundled(), length=6, batch=4)
    end = (torch.arange(probe.length) == 12).expand(4, -1)
    marked = replace(probe, marks={**probe.marks, "end": end})
    for groups in ([0, 1], [0, 0, 0, 0]):
        with pytest.raises(InputError, match="a number for each"):
            hs.kinds.clustering(marked, "first_copy", groups)
    with pytest.raises(InputError, match="no mark 'few'"):
        hs.kinds.clustering(marked, "few", [0, 1, 0, 1])
    with pytest.raises(InputError, match="least=2"):
        hs.kinds.of_relation("mine", probe, [[(3, 1)]] * 4, least=2.0)
    with pytest.raises(InputError, match="steady=0"):
        hs.kinds.of_relation("mine", probe, [[(3, 1)]] * 4, steady=0.0)


def test_the_share_of_variance_between_groups_by_hand() -> None:
    drawn = np.random.default_rng(0)
    z = drawn.normal(size=(30, 2, 3, 4))
    groups = np.repeat([0, 1, 2], 10)
    z[groups == 1, 1, 2] += 5.0
    ratio, p = hs.kinds.cluster_ratio(z, groups, 0)
    for head in ((0, 1), (1, 2)):
        one = z[:, *head]
        total = ((one - one.mean(0)) ** 2).sum()
        within = sum(((one[groups == g] - one[groups == g].mean(0)) ** 2).sum() for g in range(3))
        assert ratio[head] == pytest.approx(1 - within / total)
    assert p[1, 2] == 0.001
    assert p[0].min() > 0.001
    assert np.isnan(hs.kinds.cluster_ratio(np.ones((4, 1, 1, 2)), np.array([0, 0, 1, 1]), 0)[0])
