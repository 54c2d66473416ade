"""What a researcher with a small chat model needs of needles, contrasts and pairs."""

import json
import sys
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import headscope as hs
from headscope.errors import HeadscopeError
from headscope.probes.needle_sets import DRAWN
from headscope.report.retrieval import retrieval_drawings, retrieval_sections
from headscope.report.sections import Words
from headscope.retrieval import decoded, follow, scan_grid, word_recall
from headscope.retrieval.follow import follow_both
from headscope.table.roles import find_roles
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
    probe = hs.probes.needle(model, 700, [0.0, 1.0], kind, per_cell=2)
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
    probe = hs.probes.needle(model, 300, [0.5], "numbers", per_cell=20, distractors=1, seed=3)
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
    probe = hs.probes.needle(model, 400, [0.2, 0.8], per_cell=1)
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
