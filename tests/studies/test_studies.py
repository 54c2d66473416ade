"""Studies: verdicts on planted truth and on random weights, resuming, pages, a user's own file."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import binomtest, spearmanr
from scipy.stats import t as student
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

import headscope as hs
from docs.pages.studies import study_pages
from headscope.compiled import Feature, Head, Lookup
from headscope.errors import InputError, UnsupportedModelError
from headscope.heads import HeadIndex
from headscope.models import bundled
from headscope.models.protocol import HeadModel
from headscope.studies import Claim, Evidence, Study, StudyResult, StudySetting, paired
from headscope.studies.forms import _CONCEPTS, _TOLD, _WRITTEN, _discs, _names
from headscope.studies.readings import _MEANINGS
from headscope.studies.study import (
    against_random_sets,
    answered,
    beyond_sets,
    need_skill,
    over_heads,
    prose,
    random_heads,
    rank_correlation,
    unpaired,
)
from tests.cli.support import run, sentence
from tests.models import seq2seq, vision

LOUD = Evidence(1.0, 0.0, 0.9, 1.1, 10, "all heads")


def untrained(name: str, folder: Path, seed: int) -> HeadModel:
    """A bundled model's architecture and tokenizer with random weights that attend sharply."""
    home = bundled.folder(name)
    config = AutoConfig.from_pretrained(home)
    config.initializer_range = 0.4
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(home).save_pretrained(folder)
    return hs.load(folder)


def study_of(*asks: Any) -> Study:
    """A study whose claims are these functions."""
    claims = tuple(
        Claim(f"c{number}", f"Claim {number}.", "a number", "chance", ask, 0.5)
        for number, ask in enumerate(asks)
    )
    return Study("mine", "A study", "Nobody et al.", claims, "Nothing.")


@pytest.mark.parametrize("name", ["tiny-gpt2", "tiny-llama"])
def test_random_weights_never_give_holds(name: str, tmp_path: Path) -> None:
    model = untrained(name, tmp_path / "random", seed=3)
    for result in hs.studies.run_all(model, fast=True).values():
        held = [one for one in result.answers if one.verdict == "holds"]
        assert not held, held
        assert all(one.because for one in result.answers if one.verdict == "cannot be asked")


# What the bundled models were trained to do, and what their architecture rules out.
KNOWN = {
    "tiny-gpt2": {
        "induction-heads": {"pattern": "holds", "needed": "holds"},
        "composition": {"previous-token": "holds"},
        "circuit-discovery": {"faithful": "holds", "stable": "holds"},
        "position-and-context": {"share": "holds", "previous": "holds"},
        "rotary-dimensions": {"slow": "cannot be asked"},
        "grouped-queries": {"alike": "cannot be asked"},
        "alignment-heads": {"aligned": "cannot be asked"},
        "vision-locality": {"neighbours": "cannot be asked"},
    },
    "tiny-llama": {
        "induction-heads": {"pattern": "holds"},
        "composition": {"previous-token": "holds", "k-composition": "holds"},
        "retrieval-heads": {"copies": "holds"},
        "catalogue": {"needed": "holds"},
        "multiple-choice": {"letter": "cannot be asked"},
        "rotary-dimensions": {"previous": "holds"},
        "atman": {"source": "holds"},
        "sixteen-heads": {"importance": "holds", "redundant": "holds"},
        "emergence": {"together": "cannot be asked"},
        "maps": {"relation": "cannot be asked"},
    },
}


@pytest.mark.parametrize("name", ["tiny-gpt2", "tiny-llama"])
def test_every_study_answers_for_a_bundled_model(name: str) -> None:
    results = hs.studies.run_all(hs.load(name), fast=True)
    assert list(results) == list(hs.studies.list())
    asked = [
        study
        for study, result in results.items()
        if any(one.verdict != "cannot be asked" for one in result.answers)
    ]
    assert len(asked) >= 30
    for study, verdicts in KNOWN[name].items():
        assert {one: results[study].verdicts[one] for one in verdicts} == verdicts, study
    for result in results.values():
        for one in result.answers:
            if one.verdict != "cannot be asked":
                assert math.isfinite(one.value)
                assert math.isfinite(one.control)
                assert one.low <= one.high
                assert (one.verdict == "holds") == (one.low > one.least)


def test_models_of_other_forms_are_asked_what_they_can_be_asked() -> None:
    crossing = hs.load(seq2seq.module_of("bart"))
    aligned = hs.studies.run("alignment-heads", crossing, fast=True)["aligned"]
    assert aligned.verdict == "does not hold"  # random weights
    assert aligned.because.startswith("X")
    trained = hs.studies.run("alignment-heads", hs.load("tiny-marian"), fast=True)
    assert trained.verdicts == {"aligned": "holds"}
    # It finds its words by their places, so that it reads any source alike.
    detached = hs.studies.run("translation-sources", hs.load("tiny-marian"), fast=True)
    assert detached.verdicts == {"detached": "does not hold"}
    untold = hs.studies.run("translation-sources", crossing, fast=True)["detached"]
    assert "no more likely" in untold.because
    seeing = hs.load(vision.BUILDS["vit"]().eval())
    results = hs.studies.run_all(seeing, fast=True)
    assert results["vision-locality"].verdicts == {
        "neighbours": "does not hold",
        "widening": "does not hold",
    }
    for study, claim in (("alignment-heads", "aligned"), ("translation-sources", "detached")):
        assert "no cross-attention" in results[study][claim].because
    assert "no pictures" in results["class-space"]["identified"].because
    drawn = hs.load("tiny-vit")
    found = hs.studies.run_all(drawn, fast=True, studies=["vit-importance", "class-space"])
    assert found["class-space"].verdicts == {"identified": "holds"}
    assert found["vit-importance"]["object"].value > found["vit-importance"]["object"].control
    left = [one for result in results.values() for one in result.answers if not one.because]
    assert not left


def test_there_are_thirty_studies_of_different_papers() -> None:
    assert len(hs.studies.list()) >= 30
    for study in hs.studies.STUDIES.values():
        assert study.paper
        assert study.about
        for claim in study.claims:
            assert all((claim.statement, claim.value, claim.control, claim.unit or claim.value))


def test_claims_of_a_run_share_what_they_make_and_what_is_refused() -> None:
    setting, made = StudySetting(), []

    def make() -> int:
        made.append(1)
        return len(made)

    assert setting.share(("x", 1), make) == setting.share(("x", 1), make) == 1
    assert setting.share(("x", 2), make) == 2

    def refuse() -> int:
        made.append(1)
        raise UnsupportedModelError("no.")

    for _ in range(2):
        with pytest.raises(UnsupportedModelError, match=r"no\."):
            setting.share(("y",), refuse)
    assert len(made) == 3
    assert StudySetting() == setting


def test_rank_correlation_is_scipys_with_bonett_and_wrights_interval() -> None:
    draw = np.random.default_rng(0)
    x = draw.normal(size=40)
    y = x + draw.normal(size=40)
    found = rank_correlation(x, np.where(np.arange(40) < 2, np.nan, y))
    r = float(spearmanr(x[2:], y[2:]).statistic)
    half = 2.575829 * math.sqrt((1 + r * r / 2) / 35)
    assert found.value == pytest.approx(r)
    assert (found.low, found.high) == pytest.approx(
        (math.tanh(math.atanh(r) - half), math.tanh(math.atanh(r) + half)), rel=1e-5
    )
    assert found.n == 38
    with pytest.raises(UnsupportedModelError, match="too few"):
        rank_correlation(x[:5], y[:5])


def test_unpaired_evidence_has_welchs_interval() -> None:
    a, b = np.array([1.0, 2.0, 4.0, 3.0]), np.array([0.0, 1.0, 0.5, np.nan])
    found = unpaired(a, b)
    variances = a.var(ddof=1) / 4, b[:3].var(ddof=1) / 3
    error = sum(variances)
    freedom = error**2 / (variances[0] ** 2 / 3 + variances[1] ** 2 / 2)
    half = float(student.ppf(0.995, freedom)) * math.sqrt(error)
    assert (found.value, found.control, found.n) == (2.5, 0.5, 7)
    assert (found.low, found.high) == pytest.approx((2 - half, 2 + half))


def test_the_cost_is_told_before_the_start(tmp_path: Path) -> None:
    model, names = hs.load(), ["composition", "attention-sinks"]
    whole = hs.studies.cost(model, names)
    short = hs.studies.cost(model, names, fast=True)
    assert whole.claims == short.claims == 3
    assert not whole.unknown
    assert whole.forwards > 0
    assert 0 < short.seconds < 60
    hs.studies.run("composition", model, tmp_path, fast=True)
    assert hs.studies.cost(model, names, fast=True, out=tmp_path).claims == 1
    mine = study_of(lambda model, setting: LOUD)
    assert "is unknown" in str(hs.studies.cost(model, [mine]))
    every = [f"{s}/{c.name}" for s, one in hs.studies.STUDIES.items() for c in one.claims]
    costs = json.loads((Path(hs.studies.__file__).parent / "costs.json").read_text())
    assert set(costs["fast"]) == set(every)
    for form in costs.values():
        assert set(form) <= set(every)


def test_passages_of_two_halves_share_none(tmp_path: Path) -> None:
    model, setting = untrained("tiny-gpt2", tmp_path / "random", seed=0), StudySetting()
    first, second = (
        {tuple(row) for row in prose(model, setting, seed=seed, length=24).tokens.tolist()}
        for seed in range(2)
    )
    assert min(len(first), len(second)) >= 12
    assert not first & second


def test_planted_heads_are_found_and_missing_ones_are_not() -> None:
    planted = hs.compiled.induction(rotation_seed=1).model
    assert hs.studies.run("induction-heads", planted, fast=True)["pattern"].verdict == "holds"
    found = hs.studies.run("composition", planted, fast=True)
    assert found["previous-token"].verdict == "holds"
    assert "L0H0" in found["previous-token"].because
    without = hs.compiled.from_library("copy").model
    assert hs.studies.run("induction-heads", without, fast=True).verdicts == {
        "pattern": "does not hold",
        "needed": "cannot be asked",
        "in-context": "cannot be asked",
    }
    assert hs.studies.run("composition", without, fast=True).verdicts == {
        "previous-token": "does not hold",
        "k-composition": "cannot be asked",
    }


def test_the_bundled_model_has_induction_heads_that_it_needs() -> None:
    result = hs.studies.run("induction-heads", hs.load(), fast=True)
    assert result.verdicts["pattern"] == result.verdicts["needed"] == "holds"
    table = hs.score(hs.load(), scorers=["induction"])
    assert str(table.top("induction", 1)[0][0]) in result["pattern"].because


def test_the_verdict_is_the_interval_against_what_counts() -> None:
    claim = Claim("x", "X.", "x", "chance", lambda model, setting: LOUD, least=0.1)
    for low, verdict in ((0.11, "holds"), (0.1, "does not hold"), (-1.0, "does not hold")):
        assert answered(claim, replace(LOUD, low=low)).verdict == verdict
    assert answered(claim, replace(LOUD, low=math.nan)).verdict == "cannot be asked"


def test_paired_evidence_is_the_interval_of_the_differences() -> None:
    values, control = np.array([1.0, 2.0, 3.0, np.nan]), np.array([0.5, 1.0, 2.5, 1.0])
    found = paired(values, control)
    assert (found.value, found.control, found.n) == (2.0, pytest.approx(4 / 3), 3)
    difference = np.array([0.5, 1.0, 0.5])
    half = 9.925 * difference.std(ddof=1) / math.sqrt(3)  # t, 2 degrees of freedom, 99 %
    assert found.low <= difference.mean() - half + 1e-3
    assert found.high >= difference.mean() + half - 1e-3
    less = paired(values, control, less=True)
    assert less.high <= -found.low + 1e-9
    assert paired(np.array([1.0]), np.array([0.0])).n == 1
    assert math.isnan(paired(np.array([1.0]), np.array([0.0])).low)


def test_evidence_of_yes_and_no_has_exact_intervals() -> None:
    yes = np.array([1.0] * 16 + [0.0] * 4)
    against = paired(yes, np.full(20, 0.5))
    share = binomtest(16, 20).proportion_ci(0.99, "exact")
    assert (against.low, against.high) == pytest.approx((share.low - 0.5, share.high - 0.5))
    control = np.array([1.0] * 4 + [0.0] * 15 + [1.0])
    found = paired(yes, control)  # 12 become yes, 1 becomes no
    up, down = (binomtest(one, 20).proportion_ci(0.995, "exact") for one in (12, 1))
    assert (found.low, found.high) == pytest.approx((up.low - down.high, up.high - down.low))
    less = paired(control, yes, less=True)
    assert (less.low, less.high) == pytest.approx((found.low, found.high))
    assert paired(np.ones(12), np.zeros(12)).low == pytest.approx(0.005 ** (1 / 12))


def test_skill_is_asked_before_anything_is_said_of_predictions(tmp_path: Path) -> None:
    model = untrained("tiny-gpt2", tmp_path / "random", seed=0)
    probe = prose(model, StudySetting(fast=True), seed=0, length=32)
    with pytest.raises(UnsupportedModelError, match="no better than chance"):
        need_skill(model, probe)
    able = hs.load()
    losses = need_skill(able, prose(able, StudySetting(fast=True), seed=0, length=32))
    assert losses.mean() < math.log(able.shape.d_vocab)


def test_a_run_continues_where_it_stopped(tmp_path: Path) -> None:
    asked: list[str] = []

    def first(model: HeadModel, setting: StudySetting) -> Evidence:
        asked.append("first")
        return LOUD

    def second(model: HeadModel, setting: StudySetting) -> Evidence:
        asked.append("second")
        if len(asked) == 2:
            raise KeyboardInterrupt
        return replace(LOUD, low=0.1)

    model, study = hs.load(), study_of(first, second)
    with pytest.raises(KeyboardInterrupt):
        hs.studies.run(study, model, tmp_path)
    result = hs.studies.run(study, model, tmp_path)
    assert asked == ["first", "second", "second"]
    assert result.verdicts == {"c0": "holds", "c1": "does not hold"}
    again = hs.studies.run(study, model, tmp_path)
    assert len(asked) == 3
    assert again.to_pandas().equals(result.to_pandas())
    kept = StudyResult.load(tmp_path / "studies" / "mine" / "result.safetensors")
    assert kept.answers == result.answers
    assert kept.provenance.weight_digest == model.digest()


def test_answers_of_another_seed_or_model_are_not_taken_over(tmp_path: Path) -> None:
    study = study_of(lambda model, setting: LOUD)
    hs.studies.run(study, hs.load(), tmp_path)
    for other, seed in (("tiny-gpt2", 1), ("tiny-llama", 0)):
        with pytest.raises(InputError, match="another run"):
            hs.studies.run(study, hs.load(other), tmp_path, seed=seed)
    hs.studies.run(study, hs.load("tiny-llama"), tmp_path, overwrite=True)
    assert "tiny-llama" in (tmp_path / "index.html").read_text("utf-8")


def test_a_damaged_answer_is_named(tmp_path: Path) -> None:
    study = study_of(lambda model, setting: LOUD)
    hs.studies.run(study, hs.load(), tmp_path)
    (tmp_path / "studies" / "mine" / "c0.json").write_text("{}")
    with pytest.raises(InputError, match=r"c0\.json holds no answer"):
        hs.studies.run(study, hs.load(), tmp_path)


def test_what_cannot_be_asked_says_why_and_does_not_stop_the_rest() -> None:
    def refused(model: HeadModel, setting: StudySetting) -> Evidence:
        raise UnsupportedModelError("it has no ears.")

    result = hs.studies.run(study_of(refused, lambda model, setting: LOUD), hs.load())
    assert [one.verdict for one in result.answers] == ["cannot be asked", "holds"]
    assert "no ears" in result["c0"].because


def test_the_page_of_a_folder_joins_its_studies_and_needs_no_network(tmp_path: Path) -> None:
    for study in ("low-rank", "attention-sinks"):
        hs.studies.run(study, hs.load(), tmp_path, fast=True)
    page = (tmp_path / "index.html").read_text("utf-8")
    for words in ("low-rank", "attention-sinks", "holds", "Bhojanapalli", "What is known about"):
        assert words in page
    assert 'src="http' not in page
    assert "Content-Security-Policy" in page


def test_a_users_file_is_a_study(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "from headscope.studies import Claim, Evidence, Study\n"
        "def ask(model, setting):\n"
        "    return Evidence(float(model.shape.n_layers), 0.0, 1.0, 9.0, 5)\n"
        "STUDY = Study('depth', 'Depth', 'me', (Claim('deep', 'It is deep.', 'layers', '0', ask),),"
        " 'Counts.')\n"
    )
    assert hs.studies.run(file, hs.load()).verdicts == {"deep": "holds"}
    file.write_text("x = 1\n")
    with pytest.raises(InputError, match="defines no STUDY"):
        hs.studies.show(file)
    with pytest.raises(InputError, match="no file"):
        hs.studies.show(tmp_path / "none.py")


def test_an_unknown_study_is_named_with_the_nearest() -> None:
    with pytest.raises(InputError, match="induction-heads"):
        hs.studies.show("induction-head")
    with pytest.raises(InputError, match="at least one"):
        Study("empty", "", "", (), "")


def test_the_command_lists_shows_and_runs(tmp_path: Path) -> None:
    assert "retrieval-heads" in run("study", "list")
    assert "Bhojanapalli" in run("study", "show", "low-rank")
    command = ("study", "run", "low-rank", "tiny-gpt2", "--fast", "--json")
    rows = json.loads(run(*command, "--out", tmp_path / "out"))
    assert {row["claim"] for row in rows} == {"ov", "qk"}
    assert (tmp_path / "out" / "index.html").exists()
    assert "none" in sentence("study", "run", "none", "tiny-gpt2")


def test_every_study_has_a_page_that_states_its_claims() -> None:
    pages = study_pages()
    for name, study in hs.studies.STUDIES.items():
        page = pages[f"studies/{name}.md"]
        assert f"`{name}`" in page
        assert study.paper in page
        assert f"({name}.md)" in pages["studies/index.md"]
        for claim in study.claims:
            assert claim.statement in page
            assert f"{claim.least:g}" in page


def bit_adder(alike: bool) -> HeadModel:
    """Adds the first five of twelve bits: by one head that reads them alike, or a head for each."""
    first = range(5)
    if alike:
        where = hs.compiled.table("first five", {11: list(first)})
        heads = [Head(0, "position", "position", where, "bit", "share")]
        cuts = tuple((2 * count + 1) / 10 for count in first)
        lookup = Lookup(0, ("share",), "answer", 2, lambda count: count % 2, cuts)
    else:
        wheres = [hs.compiled.table(f"bit {at}", {11: [at]}) for at in first]
        heads = [Head(0, "position", "position", wheres[at], "token", f"b{at}") for at in first]
        names = tuple(f"b{at}" for at in first)
        lookup = Lookup(0, names, "answer", 2, lambda *bits: sum(bits) % 2)
    bit = Feature("bit", (0.0, 1.0))
    made = hs.compiled.program(
        heads, tokens=2, length=12, outputs=["answer"], lookups=[lookup], features=[bit]
    )
    return made.model


def test_a_head_that_adds_bits_alike_is_told_from_heads_that_read_one_each() -> None:
    found = hs.studies.run("clustering-head", bit_adder(alike=True), fast=True)
    assert found.verdicts == {"even": "holds", "clusters": "holds"}
    assert found["even"].value == pytest.approx(1.0, abs=1e-3)
    assert found["clusters"].value == pytest.approx(1.0, abs=1e-3)
    assert "L0H0" in found["even"].because
    apart = hs.studies.run("clustering-head", bit_adder(alike=False), fast=True)
    assert apart.verdicts == {"even": "does not hold", "clusters": "does not hold"}
    assert apart["even"].value == pytest.approx(0.2, abs=1e-3)  # one of five bits
    assert "chance: 50%" in hs.studies.run("clustering-head", hs.load())["even"].because


def test_induction_finds_half_of_the_neighbours_in_a_maze() -> None:
    induction = hs.compiled.induction(tokens=16, length=32).model
    assert hs.studies.run("maze-adjacency", induction, fast=True).verdicts == {
        "neighbours": "holds",
        "listed-before": "does not hold",
    }
    before = Head(0, "position", "position", hs.compiled.offset(1), "token", "before")
    own = Head(
        1, "token", "token", hs.compiled.same(), "before", "partner", "last", others_only=True
    )
    look = Head(2, "partner", "token", hs.compiled.same(), "token", "answer", "last")
    both = hs.compiled.program([before, own, look], tokens=16, length=32, outputs=["answer"])
    found = hs.studies.run("maze-adjacency", both.model, fast=True)
    assert found.verdicts == {"neighbours": "holds", "listed-before": "holds"}
    assert "L2H0" in found["listed-before"].because
    copying = hs.compiled.compiled(hs.compiled.library.copy_program(16, 32)).model
    assert set(hs.studies.run("maze-adjacency", copying, fast=True).verdicts.values()) == {
        "does not hold"
    }


def translator(*, through_english: bool, count: int = 20) -> HeadModel:
    """Translates French words into German, by way of English or with nothing in between."""
    known = _MEANINGS[:count]
    words = ["[BOS]", "[UNK]", "Français:", "-", "Deutsch:", *(one for row in known for one in row)]
    ids = {word: number for number, word in enumerate(words)}
    made = Tokenizer(WordLevel(ids, unk_token="[UNK]"))  # noqa: S106
    made.pre_tokenizer = WhitespaceSplit()
    special = {"bos_token": "[BOS]", "unk_token": "[UNK]"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, **special)
    english = {ids[french]: ids[english] for english, french, _ in known}
    german = {ids[english]: ids[german] for english, _, german in known}
    head = Head(0, "position", "position", hs.compiled.offset(2), "token", "source")
    size = len(words)
    lookups = [
        Lookup(0, ("source",), "english", size, lambda word: english.get(word, 0)),
        Lookup(1, ("english",), "german", size, lambda word: german.get(word, 0)),
        Lookup(1, ("english",), "again", size, lambda word: german.get(word, 0)),
    ]
    outputs = ["english", "german", "again"] if through_english else ["german"]
    model = hs.compiled.program([head], tokens=size, length=64, outputs=outputs, lookups=lookups)
    return hs.load(model.module, tokenizer=tokenizer)


def test_a_translation_by_way_of_english_is_seen_in_the_middle() -> None:
    found = hs.studies.run("latent-language", translator(through_english=True), fast=True)
    assert found.verdicts == {"english": "holds"}
    assert "after L0" in found["english"].because
    direct = hs.studies.run("latent-language", translator(through_english=False), fast=True)
    assert direct.verdicts == {"english": "does not hold"}
    few = translator(through_english=True, count=8)
    said = hs.studies.run("latent-language", few, fast=True)["english"].because
    assert said == (
        "8 of 40 words are single tokens of its tokenizer in English and in German: this study "
        "needs 12."
    )


def clip_of_colours(*, seed: int = 0, swapped: bool = False) -> Any:
    """Pictures' colour in L0H0, their place in L0H1, and texts that name both in the same space.

    Streams hold what they say and its opposite, so that norms only scale. Texts are what the heads
    write for their colour or place; ``swapped`` gives each colour the text of the next.
    """
    torch.manual_seed(seed)
    words = sorted(
        {
            word
            for kind in _TOLD
            for name in _names(kind)
            for word in _TOLD[kind].format(name).split()
        }
    )
    ids = {word: number for number, word in enumerate(["[BOS]", "[EOS]", "[PAD]", *words])}
    wide = {
        "hidden_size": 14,
        "intermediate_size": 4,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
    }
    config = CLIPConfig(
        vision_config={**wide, "image_size": 24, "patch_size": 8},
        text_config={
            **wide,
            "vocab_size": len(ids),
            "eos_token_id": 1,
            "bos_token_id": 0,
            "pad_token_id": 2,
            "max_position_embeddings": 16,
        },
        projection_dim=5,
    )
    module = CLIPModel(config).eval()
    for name, weight in module.named_parameters():
        weight.requires_grad_(False)
        if weight.ndim > 1 or name.endswith("bias") or "class_embedding" in name:
            weight.zero_()
    constant = torch.tensor([0.0] * 10 + [1.0, -1.0, 0.0, 0.0])
    first = torch.tensor([0.0] * 10 + [1.0, -1.0, 1.0, -1.0])

    def both(rows: Tensor) -> Tensor:
        """Five numbers and their opposites, and the constant."""
        return torch.cat([rows, -rows, torch.zeros(*rows.shape[:-1], 4)], -1) + constant

    sees = module.vision_model
    for channel in range(3):
        filters = sees.embeddings.patch_embedding.weight
        filters[channel, channel], filters[channel + 5, channel] = 1 / 64, -1 / 64
    turns = [2 * math.pi * place / 9 for place in range(9)]
    grid = torch.tensor([[0, 0, 0, 0.1 * math.sin(a), 0.1 * math.cos(a)] for a in turns])
    sees.embeddings.position_embedding.weight.copy_(torch.cat([first[None], both(grid)]))
    block = sees.encoder.layers[0].self_attn
    for head in range(2):  # the class token looks at what is bright
        block.q_proj.weight[7 * head, 10] = 100.0
        block.k_proj.weight[7 * head, :3], block.k_proj.weight[7 * head, 12] = 10.0, -100.0
    for at in range(3):
        block.v_proj.weight[at, at] = 1.0
        block.out_proj.weight[at, at], block.out_proj.weight[at + 5, at] = 1.0, -1.0
    for at in range(2):
        block.v_proj.weight[7 + at, 3 + at] = 1.0
        block.out_proj.weight[3 + at, 7 + at], block.out_proj.weight[8 + at, 7 + at] = 1.0, -1.0
    reads = module.text_model
    attends = reads.encoder.layers[0].self_attn
    attends.v_proj.weight.copy_(torch.eye(14))
    attends.out_proj.weight.copy_(torch.eye(14))
    for projection in (module.visual_projection, module.text_projection):
        projection.weight[:, :5] = torch.eye(5)
    special = {"bos_token": "[BOS]", "eos_token": "[EOS]", "pad_token": "[PAD]"}
    made = Tokenizer(WordLevel(ids, unk_token="[PAD]"))  # noqa: S106
    made.pre_tokenizer = WhitespaceSplit()
    made.post_processor = TemplateProcessing(
        single="[BOS] $A [EOS]", special_tokens=[("[BOS]", 0), ("[EOS]", 1)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, **special)
    clip = hs.vision.clip(module, tokenizer=tokenizer)
    pictures, labels = _discs(StudySetting(), 7)
    writes = hs.vision.contributions(clip.vision, hs.probes.images(clip.vision, pictures)).heads
    vectors = torch.zeros(len(ids), 5)
    for head, kind in enumerate(_TOLD):
        own = writes[:, 0, head] - writes[:, 0, head].mean(0)
        for number, name in enumerate(_names(kind)):
            mean = torch.from_numpy(own[labels[kind] == number].mean(0))
            told = _names(kind)[(number + 1) % len(_names(kind))] if swapped else name
            vectors[ids[told]] = torch.nn.functional.normalize(mean, dim=0)
    reads.embeddings.token_embedding.weight.copy_(both(vectors))
    return clip


def test_heads_of_clip_that_tell_colour_and_place_are_found() -> None:
    clip = clip_of_colours()
    found = hs.studies.run("clip-text-span", clip, fast=True)
    assert set(found.verdicts.values()) == {"holds"}, found
    assert found["colour"].because == "L0H0"
    assert found["place"].because == "L0H1"
    swapped = hs.studies.run("clip-text-span", clip_of_colours(swapped=True), fast=True)
    assert swapped.verdicts["colour"] == swapped.verdicts["place"] == "does not hold"
    assert "no head of it names" in swapped["specialised"].because


def unet_of_concepts(*, seed: int = 0, planted: bool = True) -> tuple[Any, Callable[[str], Tensor]]:
    """A UNet whose first head's keys read the direction of animals, and an embedding of words.

    A word is its concept's direction and three times as much of its own.
    """
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(seed)
    module = diffusers.UNet2DConditionModel(
        sample_size=4, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8,),
        norm_num_groups=4, cross_attention_dim=64, attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",),
    ).eval()  # fmt: skip
    concepts = list(_CONCEPTS)
    own = {word: number for number, word in enumerate(" ".join(_CONCEPTS.values()).split())}
    drawn = torch.randn(len(own), 56, generator=torch.Generator().manual_seed(seed))
    layer = module.down_blocks[0].attentions[0].transformer_blocks[0].attn2
    with torch.no_grad():
        for name, weight in module.named_parameters():
            if weight.ndim == 2 and "attn" in name:
                weight.normal_(0, 0.4)
        if planted:  # the score of a key is its animal part, whatever the query
            size = layer.to_k.weight.shape[0] // layer.heads
            layer.to_q.weight[:size], layer.to_k.weight[:size] = 0, 0
            layer.to_k.weight[0, concepts.index("animals")] = 50.0
            layer.to_q.weight[0] = 1.0
            block = module.down_blocks[0].attentions[0].transformer_blocks[0]
            block.norm2.weight.zero_()
            block.norm2.bias.fill_(1.0)

    def read(word: str) -> Tensor:
        concept = next(at for at, one in enumerate(_CONCEPTS.values()) if word in one.split())
        unit = torch.nn.functional.normalize(drawn[own[word]], dim=0)
        return torch.cat([torch.eye(8)[concept], 3 * unit])[None]

    return hs.diffusion.load(module), read


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_a_head_that_votes_for_animals_is_told_from_heads_that_read_any_direction() -> None:
    model, read = unet_of_concepts()
    found = hs.studies.run("cross-attention-relevance", model, fast=True, given={"read": read})
    assert found.verdicts == {"votes": "holds"}
    assert found["votes"].because == "X0H0, animals"
    other, read = unet_of_concepts(seed=1, planted=False)
    wild = hs.studies.run("cross-attention-relevance", other, fast=True, given={"read": read})
    assert wild.verdicts == {"votes": "does not hold"}
    untold = hs.studies.run("cross-attention-relevance", model, fast=True)["votes"].because
    assert untold.startswith("it takes a function that embeds a word")
    asked = hs.studies.run("cross-attention-relevance", hs.load(), fast=True)["votes"].because
    assert "pip install 'headscope[diffusion]'" in asked


class Reader:
    """A processor for a tower of 64 x 64 pixels and texts that are split at blanks."""

    image_token = "<image>"  # noqa: S105

    def __init__(self) -> None:
        words = ["<s>", "<image>", "red:", "blue:", *_WRITTEN]
        self.ids = {word: number for number, word in enumerate(words)}
        square = {"height": 64, "width": 64}
        self.image_processor = LlavaImageProcessorPil(
            size={"shortest_edge": 64}, crop_size=square, resample=4
        )

    def tokenizer(self, text: str, **_settings: Any) -> dict[str, list[int]]:
        return {"input_ids": [self.ids.get(word, 0) for word in text.split()]}

    def __call__(self, text: list[str], images: list[list[Any]], **_settings: Any) -> Any:
        ids = [self.tokenizer(one.replace("<image>", "<image> " * 64))["input_ids"] for one in text]
        pixels = self.image_processor([one for row in images for one in row], return_tensors="pt")
        return {"input_ids": torch.tensor(ids), "pixel_values": pixels["pixel_values"]}


def reading_model(processor: Reader, *, planted: bool, seed: int = 0) -> HeadModel:
    """A LLaVA whose L1H2 looks for ink of the colour that the last word of the question names."""
    torch.manual_seed(seed)
    small = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4}
    vision = CLIPVisionConfig(**small, num_hidden_layers=2, image_size=64, patch_size=8)
    text = LlamaConfig(
        **small, num_hidden_layers=2, vocab_size=len(processor.ids), num_key_value_heads=2,
        max_position_embeddings=128,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=1, image_seq_length=64
    )
    module = LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, weight in module.named_parameters():
            if weight.ndim > 1:
                weight.normal_(0, 0.3)
            if planted and name.endswith(
                ("out_proj.weight", "fc2.weight", "o_proj.weight", "down_proj.weight")
            ):
                weight.zero_()
        if planted:
            tower, model = module.model.vision_tower, module.model.language_model
            tower.embeddings.position_embedding.weight.zero_()
            tower.embeddings.position_embedding.weight[:, 2:4] = torch.tensor([3.0, -3.0])
            ink = tower.embeddings.patch_embedding.weight
            ink.zero_()
            ink[0, 0], ink[0, 2] = 1 / 64, -1 / 64  # red less blue, mean of a patch
            between = module.model.multi_modal_projector
            for weight in (
                between.linear_1.weight,
                between.linear_2.weight,
                model.embed_tokens.weight,
            ):
                weight.zero_()
            between.linear_1.weight[0, 0], between.linear_1.weight[1, 0] = 20.0, -20.0
            between.linear_2.weight[4, 0] = between.linear_2.weight[5, 1] = 1.0
            between.linear_2.bias[8] = 1.0
            model.embed_tokens.weight[:, 8] = 1.0
            model.embed_tokens.weight[processor.ids["red:"], 6] = 1.0
            model.embed_tokens.weight[processor.ids["blue:"], 7] = 1.0
            attends = model.layers[1].self_attn  # planes 3 and 7 hardly turn
            query, key = attends.q_proj.weight[16:24], attends.k_proj.weight[8:16]
            query.zero_(), key.zero_()
            query[3, 6] = query[7, 7] = key[3, 4] = key[7, 5] = 10.0
    return hs.load(module, check=False)


def test_a_head_that_looks_at_the_word_that_is_asked_for_is_found() -> None:
    processor = Reader()
    given = {"processor": processor}
    found = hs.studies.run(
        "ocr-heads", reading_model(processor, planted=True), fast=True, given=given
    )
    assert found.verdicts == {"reads": "holds"}
    assert found["reads"].because == "L1H2"
    for seed in range(3):
        wild = reading_model(processor, planted=False, seed=seed)
        none = hs.studies.run("ocr-heads", wild, fast=True, given=given)
        assert none.verdicts == {"reads": "does not hold"}
    untold = hs.studies.run("ocr-heads", wild, fast=True)["reads"].because
    assert (
        untold == "it takes the processor that comes with the model: pass given={'processor': ...}."
    )
    assert "no texts with images" in hs.studies.run("ocr-heads", hs.load())["reads"].because


def test_a_mean_over_heads_has_the_wider_interval_of_texts_and_heads() -> None:
    draw = np.random.default_rng(0)
    heads, texts = draw.normal(size=(12, 1)), 0.1 * draw.normal(size=(1, 20))
    for values in (3 * heads + texts, 0.01 * heads + 10 * texts):
        found = over_heads(values.reshape(3, 4, 20), np.zeros(20))
        by_text, by_head = (paired(values.mean(at), np.zeros(20 - 8 * at)) for at in (0, 1))
        assert found.value == pytest.approx(values.mean())
        assert (found.low, found.high) == pytest.approx(
            (min(by_text.low, by_head.low), max(by_text.high, by_head.high))
        )
        assert found.n == 20


def test_heads_do_not_stand_out_where_one_random_set_harms_as_much() -> None:
    harm = np.tile(np.linspace(0.5, 0.6, 16), (4, 1))
    sets = harm[1:] - np.array([[0.5], [0.5], [0.0]])  # the last one harms as much
    found = beyond_sets(harm[0], sets)
    assert paired(harm[0], sets.mean(0)).low > 0.3
    assert found.low == pytest.approx(0.0)
    assert beyond_sets(harm[0], sets[:2]).low == pytest.approx(0.5)


def test_examples_of_a_cluster_count_once() -> None:
    values = np.array([0.2, 0.4, 0.9, 0.7, 0.5, 0.1])
    labels = [0, 0, 1, 1, 2, 2]
    found = paired(values, np.zeros(6), clusters=labels)
    once = paired(values.reshape(3, 2).mean(1), np.zeros(3))
    assert (found.low, found.high, found.n) == pytest.approx((once.low, once.high, 3))


def test_a_rank_correlation_of_noisy_texts_is_no_surer_than_its_texts() -> None:
    draw = np.random.default_rng(0)
    first = np.arange(200.0)
    by_text = first[:, None] * np.array([-1.0, -1.0, 2.0, 2.0, -1.0, 0.5])
    by_text += draw.normal(size=by_text.shape)
    alone = rank_correlation(first, by_text.mean(1))
    found = rank_correlation(first, by_text.mean(1), by_text=by_text)
    assert alone.low > 0.9
    assert found.low < 0
    with pytest.raises(UnsupportedModelError, match="3 layers are too few"):
        rank_correlation(first[:3], first[:3], of="layers")


def test_ablations_are_held_against_sets_with_the_error_of_their_mean() -> None:
    model = hs.load()
    probe = hs.probes.repeated_tokens(model, length=16, batch=6, seed=3)
    heads = [HeadIndex(2, 1)]
    asked = {"scale": 1.0, "sign": 1.0, "seed": 0}
    found = against_random_sets(model, probe, hs.metrics.loss, heads, **asked)
    groups = {str(number): one for number, one in enumerate(random_heads(model, heads, 40, 0))}
    assert all(heads[0] not in one for one in groups.values())
    effects = hs.ablate_groups(model, probe, hs.metrics.loss, {"chosen": heads, **groups})
    harm = effects.per_example
    plain = paired(harm[0], harm[1:].mean(0))
    error = float(student.ppf(0.995, 39)) * harm[1:].mean(1).std(ddof=1) / math.sqrt(40)
    middle = plain.value - plain.control
    assert found.value - found.control == pytest.approx(middle, rel=1e-5)
    assert found.low == pytest.approx(middle - math.hypot(middle - plain.low, error), rel=1e-4)
    assert found.high == pytest.approx(middle + math.hypot(plain.high - middle, error), rel=1e-4)
