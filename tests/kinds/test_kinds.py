"""The catalogue: planted heads are named, others are not; random weights name next to nothing."""

from functools import cache

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import headscope as hs
from headscope.errors import InputError
from headscope.heads import HeadIndex
from headscope.kinds import KINDS, UNASKED, AskedModel, Criterion, Kind, words
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
    with pytest.raises(InputError, match="two different"):
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
    true, false = words.statements(bundled())
    decode = bundled().tokenizer.decode
    halves = [set(), set()]
    for probe in (true, false):
        for row in range(len(probe)):
            text = decode(probe.tokens[row][probe.real[row]])
            halves[row % 2] |= {one for one in text.replace(".", "").split() if one[0].isupper()}
    assert halves[0] & halves[1] <= {"The", "<|bos|>The"}
