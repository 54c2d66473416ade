"""What a researcher with a small chat model needs of needles, contrasts and pairs."""

import json
import re
import sys
from dataclasses import replace
from functools import lru_cache
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import headscope as hs
from headscope.base.result import Words
from headscope.errors import HeadscopeError, InputError
from headscope.probes import Needle
from headscope.probes.needle import DRAWN
from headscope.probes.pairs import CAPITALS, NAMES, TASKS
from headscope.report.sections import retrieval_drawings, retrieval_sections
from headscope.retrieval import (
    Contrast,
    contradictions,
    decoded,
    decore,
    faithfulness,
    follow,
    scan_grid,
    word_recall,
)
from headscope.retrieval.follow import follow_both
from headscope.table.kinds import find_roles
from tests.cli.support import run
from tests.probes.support import Reader, shape_of, small_tokenizer

CHAT = (
    "{{ bos_token }}{% for m in messages %}{{ '[' + m['role'] + ']\n' + m['content'] + eos_token "
    "+ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '[assistant]\n' }}{% endif %}"
)


def chat_tokenizer(chat: bool = True) -> Any:
    base = small_tokenizer(True, "all")
    tokenizer = type(base)(
        tokenizer_object=base.backend_tokenizer,
        bos_token="<s>",  # noqa: S106
        eos_token="<reserved>",  # noqa: S106
    )
    if chat:
        tokenizer.chat_template = CHAT
    return tokenizer


def tiny(chat: bool = True, n_ctx: int = 1024, seed: int = 0) -> Any:
    """A peaky random llama with a byte-level tokenizer; with a chat template if wanted."""
    tokenizer = chat_tokenizer(chat)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=n_ctx,
        initializer_range=0.4,
    )
    return hs.load(LlamaForCausalLM(config).eval(), tokenizer=tokenizer, check=False)


class Scripted:
    """A model that generates given replies, one by one, whatever it computes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, model: Any, replies: list[str]) -> None:
        from headscope.models.decoding import decoding

        self.replies = iter(replies)
        self.started = 0
        end = model.tokenizer.eos_token_id
        outer = self

        class Steps:
            def __init__(self, model: Any, real: Any = None) -> None:
                self.inner = decoding(model, real)
                outer.started += 1
                said = model.tokenizer(next(outer.replies), add_special_tokens=False)["input_ids"]
                self.said = iter([*said, *[end] * 100])

            @property
            def length(self) -> int:
                return self.inner.length

            def step(self, tokens: Any, **options: Any) -> Any:
                logits = self.inner.step(tokens, **options)
                return torch.nn.functional.one_hot(
                    torch.tensor([next(self.said)] * len(logits)), logits.shape[1]
                ).float()

        monkeypatch.setattr(sys.modules[follow.__module__], "decoding", Steps)


def text_of(model: Any, probe: hs.Probe, row: int = 0) -> str:
    return str(model.tokenizer.decode(probe.tokens[row][probe.real[row]]))


def reader(chat: bool) -> Reader:
    return Reader(chat_tokenizer(chat), shape_of(1008, None))


def test_e1_a_chat_model_is_asked_for_numbers_as_a_question() -> None:
    model = reader(chat=True)
    probe = hs.probes.needle(model, 400, [0.5], per_cell=1)
    assert probe.settings["needles"] == "numbers"
    text = text_of(model, probe)
    assert "Question: What is the magic number of" in text
    for needles in ("facts", "numbers", "several", "hops"):
        probe = hs.probes.needle(model, 700, [0.5], needles, per_cell=1)
        assert probe.settings["cloze"] is False
        end = int(probe.mark("end")[0].int().argmax())
        prompt = str(model.tokenizer.decode(probe.tokens[0, : end + 1]))
        assert prompt.rstrip().endswith("[assistant]")
        assert "? <reserved>" in prompt or "?<reserved>" in prompt
        answer = str(model.tokenizer.decode(probe.tokens[0][probe.mark("answer")[0]])).strip()
        reply = text_of(model, probe).split("[assistant]\n")[-1].strip()
        assert reply.endswith(answer)
        lead = reply.removesuffix(answer)
        assert len(lead) > 10  # the reply restates the question before it answers
        first = int(probe.mark("answer")[0].int().argmax())
        assert int((probe.targets[0, : first - 1] >= 0).sum()) == 0


def test_e1_without_a_template_facts_are_completed() -> None:
    for model, options in ((reader(chat=False), {}), (reader(chat=True), {"chat": False})):
        probe = hs.probes.needle(model, 400, [0.5], per_cell=1, **options)
        assert probe.settings["needles"] == "facts"
        assert probe.settings["cloze"] is True
        assert "[assistant]" not in text_of(model, probe)
        assert int(probe.mark("answer").sum()) == int((probe.targets >= 0).sum())


def test_e1_the_answer_is_searched_in_the_whole_reply(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    probe = hs.probes.needle(model, 400, [0.3], per_cell=2, control="removed")
    answers = [
        "".join(map(model.tokenizer.decode, [probe.tokens[i][probe.mark("needle_answer")[i]]]))
        for i in range(2)
    ]
    replies = [
        f"I read the text.\n\nThe magic number is **{answers[0].strip()}**.",
        "The magic number is 1.",
    ]
    Scripted(monkeypatch, model, replies)
    runs = follow(model, probe, batch_size=1, new_tokens=200, progress=False)
    assert runs.recall.tolist() == [1.0, 0.0]
    assert runs.runs[0].response.strip() == replies[0]
    assert runs.runs[0].answer.strip() == answers[0].strip()


def test_e1_enough_steps_for_a_chat_model_whatever_the_needles(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny()
    probe = hs.probes.needle(model, 400, [0.5], "facts", per_cell=1)
    Scripted(monkeypatch, model, ["a" * 30 + "?"])
    assert len(follow(model, probe, progress=False).runs[0].tokens) > 20


def test_e1_digits_in_groups_are_one_number() -> None:
    assert word_recall("48213", "It is 48,213.") == 1
    assert word_recall("48213", "48'213") == 1
    assert word_recall("48213", "48, 213") == 0
    assert word_recall("12, 13", "12,13") == 1
    assert word_recall("1234", "12,345") == 0


def test_e1_where_nothing_is_answered_replies_and_a_hint_are_shown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny()
    probe = hs.probes.needle(model, 400, [0.5], "hops", per_cell=1)
    Scripted(monkeypatch, model, ["The town is far away."] * 2)
    with pytest.raises(HeadscopeError) as error:
        decoded(model, probe, progress=False)
    assert "The town is far away." in str(error.value)
    assert "number needles" in str(error.value)
    assert "chat=False" in str(error.value)
    Scripted(monkeypatch, model, ["The town is far away."] * 2)
    found = scan_grid(model, 400, [0.5], "hops", per_cell=1, progress=False).retrieval
    assert "The town is far away." in found.hint()
    assert "--no-chat" in found.hint()
    answer = found.runs.runs[0].answer.strip()
    assert f"asked for: {answer}" in found.hint()


@pytest.mark.parametrize("options", [(), ("--no-chat",)])
def test_e1_the_command_says_what_was_answered(tmp_path: Path, options: tuple[str, ...]) -> None:
    place = tmp_path / "model"
    model = tiny()
    model.module.save_pretrained(place)
    model.tokenizer.save_pretrained(place)
    out = tmp_path / "out"
    size = ("--lengths", "400", "--depths", "0.5", "--per-cell", "1", "--new-tokens", "3")
    printed = run("retrieval", place, *size, *options, "--out", out)
    assert "Replies:" in printed
    settings = json.loads((out / "run.json").read_text())["settings"]
    assert settings["chat"] is (not options)
    assert settings["needles"] == ("facts" if options else "numbers")
    line = json.loads((out / "responses.jsonl").read_text().splitlines()[0])
    assert line["answer"]
    assert "Replies:" in (out / "index.html").read_text()


def test_e9_the_page_tells_one_story() -> None:
    model = hs.load("tiny-llama")
    found = scan_grid(model, [64, 96], [0, 0.5, 1], per_cell=1, progress=False).retrieval
    scores = found.by_set
    above = int((scores.mean > 0.1).sum())
    beyond = int((scores.significant() & (scores.mean > 0.1)).sum())
    assert above == len(found.heads()) > 0
    drawn = retrieval_drawings(scores, found.recall_grid(), {})
    sections = retrieval_sections(scores, found.recall_grid(), {}, drawn, str(found))
    words = next(block.text for block in sections[0].blocks if isinstance(block, Words))
    for said in (str(found), words):
        assert f"{above} retrieval heads of" in said
        assert f"{beyond} of them beyond chance" in said


def test_e9_heads_above_a_threshold_that_no_test_can_name_are_not_denied() -> None:
    values = np.zeros((1, 4, 2))
    values[0, 0] = [0.9, 0.2]
    values[0, 1] = [0.3, 0.0]
    made: dict[str, Any] = {"unit": "share", "bounds": (0.0, 1.0), "threshold": 0.1}
    scores = hs.HeadScores.from_examples(
        "retrieval_set", values, kv_heads=4, control_per_example=np.zeros((1, 4, 2)), **made
    )
    if scores.significant().any():
        pytest.skip("two examples are enough for this test")
    said = str(find_roles([scores], 0.05)[0])
    assert "2 above 0.1" in said
    none = hs.HeadScores.from_examples(
        "retrieval_set", values * 0, kv_heads=4, control_per_example=np.zeros((1, 4, 2)), **made
    )
    assert "above" not in str(find_roles([none], 0.05)[0])


@pytest.mark.parametrize("kind", ["numbers", "several"])
def test_e10_a_distractor_has_the_answers_digits_in_another_order(kind: str) -> None:
    for seed in range(50):
        drawn = DRAWN[kind](Random(seed))
        asked, rival = next(drawn), next(drawn)
        for one, other in zip(asked.parts, rival.parts, strict=True):
            assert one != other
            assert sorted(one) == sorted(other)
            assert len(other) == 5
            assert other[0] != "0"


@pytest.mark.parametrize("kind", ["numbers", "several"])
def test_e10_the_control_is_the_same_text_with_the_distractor_marked(kind: str) -> None:
    model = reader(chat=True)
    probe = hs.probes.needle(model, 700, [0.0, 1.0], kind, per_cell=2, control="distractor")
    control = probe.control
    assert control is not None
    assert probe.settings["control"] == "distractor"
    assert control.tokens.equal(probe.tokens)
    assert control.targets.equal(probe.targets)
    for name in ("end", "answering", "question"):
        assert control.mark(name).equal(probe.mark(name))
    for row in range(len(probe)):
        own, other = (
            str(model.tokenizer.decode(one.tokens[row][one.mark("needle_answer")[row]]))
            for one in (probe, control)
        )
        assert sorted(own) == sorted(other)
        assert own != other
        assert not (control.mark("needle")[row] & probe.mark("needle")[row]).any()
        assert (control.mark("needle")[row] & ~probe.mark("distractor")[row]).sum() == 0


def test_e10_a_head_that_looks_for_equal_digits_has_a_null_as_high_as_its_score() -> None:
    """Attention spread evenly over every earlier copy of the query's token, by hand."""
    model = reader(chat=True)
    probe = hs.probes.needle(
        model, 300, [0.5], "numbers", per_cell=20, distractors=1, seed=3, control="distractor"
    )
    control = probe.control
    assert control is not None
    shares = []
    for one in (probe, control):
        found = []
        for row in range(len(one)):
            for query in one.mark("answering")[row].nonzero().flatten().tolist():
                same = one.tokens[row, :query] == one.tokens[row, query]
                copies = same & (one.tokens[row, :query] == one.targets[row, query])
                inside = copies & one.mark("needle_answer")[row, :query]
                found.append(float(inside.sum() / same.sum().clamp_min(1)))
        shares.append(float(np.mean(found)))
    assert shares[0] > 0.01  # the fault: repeated digits look like copying
    assert shares[1] == pytest.approx(shares[0], rel=1e-6)


def test_e10_the_control_takes_no_second_run(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    probe = hs.probes.needle(model, 400, [0.2, 0.8], per_cell=1, control="distractor")
    script = Scripted(monkeypatch, model, ["4 8 2", "1 3 5"])
    runs, control = both_of(model, probe)
    assert script.started == 2
    monkeypatch.undo()
    assert control is not None
    assert probe.control is not None
    assert [one.tokens for one in control.runs] == [one.tokens for one in runs.runs]
    once, both = (
        follow(model, probe.control, new_tokens=4, progress=False),
        follow_both(model, probe, new_tokens=4),
    )
    for one, other in zip(once.runs, both[1].runs if both[1] else (), strict=True):
        assert one.tokens == other.tokens
        assert one.needle == other.needle
        assert (one.copied == other.copied).all()
        assert one.answer == other.answer


def both_of(model: Any, probe: hs.Probe, **options: Any) -> Any:
    return follow_both(model, probe, progress=False, batch_size=1, **options)


CITIES = (("France", "Rome"), ("Italy", "Oslo"), ("Spain", "Lima"))
COUNTRIES = [
    Needle((f"The capital of {one} is {city}.",), f"What is the capital of {one}?", city, (city,))
    for one, city in CITIES
]


def prefer(monkeypatch: pytest.MonkeyPatch, model: Any, *words: str) -> None:
    """Let the model hold these tokens likeliest, the first most, whatever it reads."""
    real = type(model).forward

    def forward(self: Any, tokens: Any, **options: Any) -> Any:
        logits = real(self, tokens, **options).clone()
        for rank, word in enumerate(words):
            ids = model.tokenizer(word, add_special_tokens=False)["input_ids"]
            logits[..., ids[0]] = 1000.0 - rank
        return logits

    monkeypatch.setattr(type(model), "forward", forward)


@pytest.mark.parametrize("needles", [None, "capitals", COUNTRIES])
def test_e2_foils_are_words_never_special_tokens(
    monkeypatch: pytest.MonkeyPatch, needles: Any
) -> None:
    model = tiny()
    prefer(monkeypatch, model, "<reserved>", "<s>", ".", "\n", "q")
    probe = contradictions(model, needles, examples=3, length=400)
    assert probe.foils is not None
    foils = probe.foils[probe.foils >= 0]
    assert len(foils) == len(probe)
    assert {model.tokenizer.decode([one]) for one in foils.tolist()} == {"q"}


def test_e2_questions_are_asked_in_the_template(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    asked: list[str] = []
    real = type(model).forward

    def forward(self: Any, tokens: Any, **options: Any) -> Any:
        asked.extend(map(model.tokenizer.decode, tokens))
        return real(self, tokens, **options)

    monkeypatch.setattr(type(model), "forward", forward)
    contradictions(model, COUNTRIES, examples=3, length=400)
    assert len(asked) == 3
    for text, (country, _) in zip(asked, CITIES, strict=True):
        assert "[user]" in text
        assert f"What is the capital of {country}?" in text
        assert "text above" not in text  # there is none
        assert text.split("[assistant]\n")[1].strip() == f"The capital of {country} is"
    asked.clear()
    contradictions(model, COUNTRIES, examples=3, length=400, chat=False)
    assert all(text.rstrip().endswith("Answer:") and "[user]" not in text for text in asked)


def test_e2_a_void_comparison_is_refused() -> None:
    model = tiny()
    probe = contradictions(model, COUNTRIES, examples=3, length=400)
    with pytest.raises(HeadscopeError, match="nothing to compare"):
        faithfulness(model, probe, ["L1H0"], alphas=[])
    assert probe.foils is not None
    special = probe.foils.masked_fill(probe.foils >= 0, model.tokenizer.eos_token_id)
    with pytest.raises(InputError, match="special token"):
        faithfulness(model, replace(probe, foils=special), ["L1H0"])


def test_e2_arms_go_on_from_where_the_answer_begins() -> None:
    model = tiny()
    probe = contradictions(model, COUNTRIES, examples=3, length=400)
    assert probe.foils is not None
    begins = [int((row >= 0).nonzero()[0]) for row in probe.foils]
    own = []
    for row, at in enumerate(begins):
        with torch.no_grad():
            own.append(int(model.forward(probe.tokens[row : row + 1, : at + 1])[0, -1].argmax()))
    foils = torch.full_like(probe.tokens, -1)
    foils[torch.arange(3), torch.tensor(begins)] = torch.tensor(own)
    found = faithfulness(model, replace(probe, foils=foils), ["L1H0"], alphas=[0.5])
    assert found.own[0].all()
    assert np.isfinite(found.margin).all()
    assert [one.strip() for one in found.answers] == [city for _, city in CITIES]


def test_e3_a_contrast_has_a_cap_and_a_plausibility_cut() -> None:
    torch.manual_seed(0)
    base, masked = 3 * torch.randn(8, 500), 3 * torch.randn(8, 500)
    mixed = Contrast()(base, masked)
    share = base.softmax(1) / base.softmax(1).amax(1, keepdim=True)
    assert torch.equal(mixed.scores.isfinite(), share >= 0.1)
    assert mixed.alpha is not None
    assert mixed.alpha.max() == 1
    kept = share.gather(1, mixed.scores.argmax(1)[:, None])
    assert kept.min() >= 0.1
    paper = Contrast.published()(base, masked)
    own, other = base.log_softmax(1), masked.log_softmax(1)
    entropy = -(own.exp() * own).sum(1)
    assert entropy.min() > 1
    torch.testing.assert_close(paper.alpha, entropy)
    torch.testing.assert_close(paper.scores, own + entropy[:, None] * (own - other))
    assert Contrast(2.5)(base, masked).alpha.tolist() == [2.5] * 8
    assert torch.equal(Contrast(plausible=1)(base, masked).scores.argmax(1), base.argmax(1))
    with pytest.raises(InputError, match="plausible=2"):
        Contrast(plausible=2)


def test_e3_decore_says_only_what_the_model_holds_plausible() -> None:
    model = tiny(chat=False, seed=3)
    prompt = torch.randint(2, 500, (3, 12), generator=torch.Generator().manual_seed(1))
    said = decore(model, prompt, ["L0H0", "L1H1", "L1H2"], new_tokens=6, progress=False)
    assert max(max(row) for row in said.alphas) <= 1
    for row, tokens in enumerate(said.tokens):
        text = prompt[row].tolist()
        for token in tokens:
            with torch.no_grad():
                shares = model.forward(torch.tensor([text]))[0, -1].float().softmax(0)
            assert shares[token] >= 0.0999 * shares.max()
            text.append(token)
    free = decore(
        model, prompt, ["L0H0", "L1H1", "L1H2"], most=None, plausible=0, new_tokens=6,
        progress=False,
    )  # fmt: skip
    assert free.tokens != said.tokens
    assert max(max(row) for row in free.alphas) > 1


WORD = r" ?[A-Za-z]+| ?\d|[^\w ]| +"


@lru_cache
def word_reader() -> Any:
    """A word-level tokenizer that has every word of the tasks, and digits, as single tokens."""
    words: set[str] = set()
    for task in TASKS.values():
        for pair in islice(task(Random(0)), 3000):
            for text in (
                pair.clean,
                pair.corrupt,
                pair.clean + pair.answer,
                pair.clean + pair.foil,
            ):
                words.update(re.findall(r" ?[A-Za-z]+| ?\d|[^\w ]| +", text))
    tokenizer = Tokenizer(
        WordLevel({word: i for i, word in enumerate(["<u>", *sorted(words)])}, "<u>")
    )
    tokenizer.pre_tokenizer = Split(Regex(r" ?[A-Za-z]+| ?\d|[^\w ]| +"), "isolated")
    tokenizer.decoder = Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<u>")  # noqa: S106


def word_model(seed: int = 0) -> Any:
    tokenizer = word_reader()
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
        initializer_range=0.4,
    )  # fmt: skip
    return hs.load(LlamaForCausalLM(config).eval(), tokenizer=tokenizer, check=False)


@pytest.mark.parametrize("task", sorted(TASKS))
def test_e15_every_task_is_aligned_with_single_token_answers(task: str) -> None:
    model = word_model()
    probe = hs.probes.pairs(model, task, batch=12, seed=1)
    other = probe.corrupt
    assert other is not None
    assert probe.foils is not None
    assert other.foils is not None
    assert probe.tokens.shape == other.tokens.shape
    both = torch.cat([probe.tokens, other.tokens], 1)
    assert len({tuple(row) for row in both.tolist()}) == 12
    flipped = bool(probe.settings["flipped"])
    end = probe.length - 1
    assert probe.mark("end").int().argmax(1).eq(end).all()
    right, wrong = probe.targets[:, end], probe.foils[:, end]
    assert (right != wrong).all()
    assert other.targets[:, end].equal(wrong if flipped else right)
    assert other.foils[:, end].equal(right if flipped else wrong)
    changed = (probe.tokens != other.tokens).sum(1)
    assert (changed > 0).all()
    assert (changed <= 2).all()
    assert hs.probes.pairs(model, task, batch=12, seed=1).tokens.equal(probe.tokens)
    assert not hs.probes.pairs(model, task, batch=12, seed=2).tokens.equal(probe.tokens)
    assert hs.probes.pairs(model, task.replace("_", "-"), batch=12, seed=1).name == task


def words_of(task: str, row: int) -> tuple[str, str, str, str, dict[str, str]]:
    """Clean and corrupt text, answer, foil and the words of the marks of one example."""
    model = word_model()
    probe = hs.probes.pairs(model, task, batch=12)
    decode = model.tokenizer.decode
    assert probe.corrupt is not None
    assert probe.foils is not None
    marks = {name: decode(probe.tokens[row][at[row]]).strip() for name, at in probe.marks.items()}
    texts = (decode(one.tokens[row]) for one in (probe, probe.corrupt))
    said = (decode([int(one[row, -1])]).strip() for one in (probe.targets, probe.foils))
    return (*texts, *said, marks)


@pytest.mark.parametrize("row", range(12))
def test_e15_answers_are_right(row: int) -> None:
    clean, corrupt, answer, foil, marks = words_of("greater_than", row)
    year = int(re.findall(r"\d{4}", clean)[0][2:])
    assert int(answer) > year // 10 > int(foil)  # this tokenizer reads digit by digit
    assert re.findall(r"\d{4}", corrupt)[0].endswith("01")
    assert marks["year"] == str(year)
    clean, corrupt, answer, foil, marks = words_of("agreement", row)
    plural = marks["subject"].endswith("s")
    assert (answer in ("are", "were", "have")) == plural
    assert (foil in ("are", "were", "have")) != plural
    assert marks["attractor"].endswith("s") != plural
    assert clean.endswith(marks["attractor"])
    clean, corrupt, answer, foil, marks = words_of("docstring", row)
    named = re.findall(r"\w+", clean[clean.index("(") : clean.index(")")])
    assert (answer, foil) == (named[3], named[4])
    assert named[1:3] == re.findall(r":param (\w+):", clean)
    assert [marks[name] for name in ("documented", "argument", "other")] == named[2:5]
    clean, corrupt, answer, foil, marks = words_of("colour_objects", row)
    told = {b: a for a, b in re.findall(r"an? (\w+) (\w+)", clean)}
    assert told[clean.split()[-5]] == answer == marks["colour"]
    assert told[corrupt.split()[-5]] == foil
    assert marks["asked"] == marks["object"] == clean.split()[-5]
    clean, corrupt, answer, foil, marks = words_of("capital_of", row)
    assert CAPITALS[marks["country"]] == answer
    assert any(country in corrupt and CAPITALS[country] == foil for country in CAPITALS)


def test_e15_the_models_accuracy_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    model = word_model()
    probe = hs.probes.pairs(model, "capital_of", batch=12)
    assert probe.foils is not None
    assert probe.corrupt is not None
    with torch.no_grad():
        logits = model.module(probe.tokens).logits[:, -1]
        other = model.module(probe.corrupt.tokens).logits[:, -1]
    rows = torch.arange(12)
    target, foil = probe.targets[:, -1], probe.foils[:, -1]
    right = logits[rows, target] > logits[rows, foil]
    assert probe.facts["right"].bool().equal(right)
    assert probe.settings["accuracy"] == pytest.approx(float(right.float().mean()))
    theirs = (other[rows, foil] > other[rows, target]).float().mean()
    assert probe.settings["accuracy_corrupt"] == pytest.approx(float(theirs))
    assert 0 < float(right.float().mean()) < 1
    neutral = hs.probes.pairs(model, "greater_than", batch=4)
    assert "accuracy_corrupt" not in neutral.settings
    alone = Reader(word_reader(), shape_of(len(word_reader())))
    assert "accuracy" not in hs.probes.pairs(alone, "capital_of", batch=4).settings


def test_e15_what_a_tokenizer_cannot_do_is_said() -> None:
    model = reader(chat=False)
    with pytest.raises(InputError, match="from_jsonl"):
        hs.probes.pairs(model, "capital_of")
    with pytest.raises(InputError, match=r"give batch=\d+ or fewer"):
        hs.probes.pairs(word_model(), "capital_of", batch=3000)
    with pytest.raises(InputError, match="agreement"):
        hs.probes.pairs(word_model(), "agrement")
    with pytest.raises(InputError, match="no option 'corrupt'"):
        hs.probes.pairs(word_model(), "agreement", corrupt="third")
    assert set(NAMES) == {"ioi", *TASKS}


def jsonl(folder: Path, *lines: dict[str, Any]) -> Path:
    file = folder / "pairs.jsonl"
    file.write_text("\n".join(json.dumps(line) for line in lines), "utf-8")
    return file


PAIR = {
    "clean": "The capital of France is the city of",
    "corrupt": "The capital of Italy is the city of",
    "answer": " Paris",
    "foil": " Rome",
}


@pytest.mark.parametrize("own", [True, False])
def test_e15_pairs_of_ones_own_come_from_a_file(tmp_path: Path, own: bool) -> None:
    model = word_model()
    line = PAIR | ({"corrupt_answer": " Rome", "corrupt_foil": " Paris"} if own else {})
    place = [PAIR["clean"].index("France"), PAIR["clean"].index("France") + 6]
    probe = hs.probes.from_jsonl(model, jsonl(tmp_path, line | {"marks": {"country": place}}))
    other = probe.corrupt
    decode = model.tokenizer.decode
    assert other is not None
    assert probe.foils is not None
    assert other.foils is not None
    assert decode(probe.tokens[0]) == PAIR["clean"]
    assert decode(other.tokens[0]) == PAIR["corrupt"]
    said = [decode([int(one[0, -1])]) for one in (probe.targets, probe.foils)]
    theirs = [decode([int(one[0, -1])]) for one in (other.targets, other.foils)]
    assert said == [" Paris", " Rome"]
    assert theirs == (said[::-1] if own else said)
    assert decode(other.tokens[0][other.mark("country")[0]]) == " Italy"
    assert "accuracy" in probe.settings
    assert ("accuracy_corrupt" in probe.settings) == own
    grid = hs.patch_activations(model, probe, hs.metrics.logit_difference)
    assert np.isfinite(np.asarray(grid.mean)).any()


def test_e15_bad_pairs_get_a_sentence(tmp_path: Path) -> None:
    model = word_model()
    for line, message in (
        (PAIR | {"corrupt": "The capital of Italy"}, r"4 tokens and its clean one 8"),
        (PAIR | {"corrupt": PAIR["clean"]}, "is the clean one"),
        (PAIR | {"text": "The"}, "an alias of 'text'"),
        ({"text": "The city", "corrupt_answer": " of"}, "needs a 'corrupt' text"),
        (PAIR | {"corrupt_foil": " Rome"}, "needs a corrupt_answer"),
        (PAIR | {"corrupt_answer": " Rome"}, "are the same token"),
        (PAIR | {"corrupt": 3}, "not a string"),
    ):
        with pytest.raises(InputError, match=message):
            hs.probes.from_jsonl(model, jsonl(tmp_path, line))
    with pytest.raises(InputError, match="prompt 2 has none"):
        hs.probes.from_jsonl(model, jsonl(tmp_path, PAIR, {"text": "The city of"}))


@pytest.mark.parametrize("left", [True, False])
def test_observers_see_no_pass_that_measures_padding(left: bool) -> None:
    """The first padded pass of a model is the same as the second."""
    probes = []
    torch.manual_seed(0)
    tokens = torch.randint(2, 500, (2, 9))
    real = torch.ones_like(tokens, dtype=torch.bool)
    real[1, slice(0, 4) if left else slice(5, None)] = False
    probe = hs.probes.from_tokens(tokens, real)
    model = tiny(chat=False)
    for _ in range(2):
        probes.append(hs.score(model, probe, ["previous_token"])["previous_token"].per_example)
    np.testing.assert_array_equal(probes[0], probes[1])
