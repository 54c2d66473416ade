"""Losses of documents with and without heads; a corpus on disk, also after a kill; token losses."""

import json
import os
import signal
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
import torch

import headscope as hs
from headscope.errors import InputError
from headscope.retrieval import Corpus, in_context_score, influence, score_corpus, token_losses
from tests.models.families import VOCAB, build

TEXTS = [
    "The cat slept. The cat slept. The cat slept.",
    "One day the king walked to the river and the queen ran to the school.",
    "She",
    "The code of the red door is seven. The code of the red door is seven.",
    "",
]
HEADS = ["L2H0", "L2H1", "L2H2", "L2H3", "L2H5"]


def slow_losses(model: Any, text: str, edits: Any = ()) -> float:
    """Mean cross-entropy of one document, by a whole pass of its own."""
    ids = [model.tokenizer.bos_token_id, *model.tokenizer(text, add_special_tokens=False).input_ids]
    tokens = torch.tensor([ids])
    with torch.no_grad():
        logits = model.forward(tokens, edits=edits)[0, :-1]
    return float(torch.nn.functional.cross_entropy(logits, tokens[0, 1:]))


@pytest.fixture(scope="module")
def model() -> Any:
    return hs.load("tiny-llama")


def test_padded_batches_equal_one_at_a_time(model: Any) -> None:
    found = influence(model, TEXTS, HEADS, progress=False)
    alone = influence(model, TEXTS, HEADS, batch_size=1, progress=False)
    for name in ("base", "masked"):
        one, many = getattr(alone, name), getattr(found, name)
        np.testing.assert_allclose(many, one, rtol=1e-5)
    edits = (hs.edits.uniform(HEADS),)
    for row in (0, 1, 2, 3):
        assert found.base[row] == pytest.approx(slow_losses(model, TEXTS[row]), rel=1e-4)
        slow = slow_losses(model, TEXTS[row], edits)
        assert found.masked[row] == pytest.approx(slow, rel=1e-4)
        expected = (slow - slow_losses(model, TEXTS[row])) / slow_losses(model, TEXTS[row])
        assert found.score[row] == pytest.approx(expected, abs=1e-3)
    assert np.isnan(found.score[4])
    assert found.tokens[4] <= 1
    other = influence(model, TEXTS, HEADS, denominator="masked", progress=False)
    np.testing.assert_allclose(
        other.score[:4], (found.masked[:4] - found.base[:4]) / found.masked[:4]
    )


def test_texts_that_repeat_need_the_heads(model: Any) -> None:
    found = influence(model, TEXTS, HEADS, progress=False).score
    others = influence(model, TEXTS, ["L2H4", "L2H6"], progress=False).score
    assert min(found[0], found[3]) > 0.2
    assert max(others[0], others[3]) < 0.1
    cut = influence(model, TEXTS, HEADS, max_tokens=6, progress=False)
    assert cut.tokens.max() == 6


def write(path: Path, count: int) -> Path:
    lines = []
    for i in range(count):
        lines.append(json.dumps({"text": TEXTS[i % 4] * (1 + i % 3), "id": i}))
        lines += [""] if i % 5 == 0 else []
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_a_corpus_is_ranked_and_its_documents_come_along(model: Any, tmp_path: Path) -> None:
    corpus = write(tmp_path / "c.jsonl", 9)
    frame = score_corpus(model, corpus, HEADS, tmp_path / "out", part_size=4, progress=False)
    lines = corpus.read_text().splitlines()
    texts = [json.loads(line)["text"] for line in lines if line]
    expected = influence(model, texts, HEADS, progress=False)
    by_line = frame.sort_values("line")
    np.testing.assert_allclose(by_line.influence, expected.score, atol=1e-5)
    assert frame["rank"].tolist() == list(range(1, 10))
    assert (frame.influence.diff().dropna() <= 0).all()
    written = (tmp_path / "out" / "ranked.jsonl").read_text(encoding="utf-8")
    ranked = [json.loads(line) for line in written.splitlines()]
    assert [one["rank"] for one in ranked] == list(range(1, 10))
    assert ranked[0]["text"] == texts[int(expected.score.argmax())]
    saved = pandas.read_parquet(tmp_path / "out" / "ranked.parquet")
    assert saved.line.tolist() == frame.line.tolist()
    assert len(list((tmp_path / "out" / "parts").glob("*.parquet"))) == 3
    again = score_corpus(model, corpus, HEADS, tmp_path / "out", part_size=4, denominator="masked")
    assert len(list((tmp_path / "out" / "parts").glob("*.parquet"))) == 3  # nothing is run again
    assert (again.influence < 1).all()


CRASH = """
import sys
import headscope as hs
from headscope.retrieval import score_corpus
corpus = sys.modules["headscope.retrieval.influence"]
slow, count = corpus._write, 0
def dying(file, columns):
    global count
    slow(file, columns)
    count += 1
    print(count, flush=True)
    if count == 2:
        sys.stdin.read()  # wait to be killed
corpus._write = dying
score_corpus(hs.load("tiny-llama"), sys.argv[1], sys.argv[3:], sys.argv[2], part_size=4)
"""


def test_after_a_kill_only_what_is_missing_is_run(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus, out = write(tmp_path / "c.jsonl", 14), tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-c", CRASH, str(corpus), str(out), *HEADS],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert process.stdout is not None
    assert [process.stdout.readline() for _ in range(2)] == [b"1\n", b"2\n"]
    process.send_signal(signal.SIGKILL)
    process.wait()
    for pipe in (process.stdin, process.stdout):
        assert pipe is not None
        pipe.close()
    kept = {file: file.stat().st_mtime_ns for file in (out / "parts").glob("*.parquet")}
    assert len(kept) == 2
    assert not (out / "ranked.parquet").exists()
    run: list[int] = []
    module: Any = import_module("headscope.retrieval.influence")

    real = module.influence

    def counted(*args: Any, **options: Any) -> Any:
        run.append(len(args[1]))
        return real(*args, **options)

    monkeypatch.setattr(module, "influence", counted)
    frame = score_corpus(model, corpus, HEADS, out, part_size=4, progress=False)
    assert run == [4, 2]
    assert all(file.stat().st_mtime_ns == when for file, when in kept.items())
    whole = score_corpus(model, corpus, HEADS, tmp_path / "other", part_size=14, progress=False)
    np.testing.assert_allclose(frame.influence, whole.influence, atol=1e-5)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no document"),
        ('{"text": "a"}\n{"txt": "b"}\n', 'line 2: an object with a text under "text"'),
        ("{\n", "line 1: not a JSON object"),
        ("[1]\n", "line 1: an object"),
    ],
)
def test_a_bad_corpus_gets_a_sentence(
    model: Any, tmp_path: Path, content: str, message: str
) -> None:
    (tmp_path / "bad.jsonl").write_text(content)
    with pytest.raises(InputError, match=message):
        score_corpus(model, tmp_path / "bad.jsonl", HEADS, tmp_path / "out")
    with pytest.raises(InputError, match="cannot be read"):
        Corpus(tmp_path / "none.jsonl").check()


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_in_context_scores_equal_whole_passes(family: str) -> None:
    model: Any = hs.load(build(family), check=False)
    ids = torch.randint(3, VOCAB, (4, 20), generator=torch.Generator().manual_seed(7))
    real = torch.ones_like(ids, dtype=torch.bool)
    real[1, :3] = real[2, -2:] = False
    probe = hs.probes.from_tokens(ids, real=real)
    options: Any = {"early": (3, 5), "late": 14}
    found = in_context_score(model, probe, method="zero", progress=False, **options)

    def slow(edits: Any = ()) -> np.ndarray:
        with torch.no_grad():
            logits = model.forward(ids, real=real, edits=edits).float().log_softmax(-1)
        scores = []
        for row in range(4):
            first = int(real[row].int().argmax())
            of = [-float(logits[row, first + t - 1, ids[row, first + t]]) for t in range(1, 15)]
            scores.append(of[13] - np.mean(of[2:5]))  # token t stands at t - 1
        return np.array(scores)

    clean = slow()
    assert found.provenance.checks["score"] == pytest.approx(clean.mean(), abs=1e-3)
    for head in ("L0H0", "L1H2", "L2H3"):
        expected = slow((hs.edits.zero(head),)) - clean
        layer, number = hs.HeadIndex.parse(head)
        np.testing.assert_allclose(found.per_example[layer, number], expected, atol=2e-3)


def test_induction_heads_carry_in_context_learning(model: Any) -> None:
    probe = hs.probes.repeated_tokens(model, length=24, batch=8)
    options: Any = {"early": (6, 20), "late": (32, 46)}
    found = in_context_score(model, probe, progress=False, **options)
    assert found.provenance.checks["score"] < -4
    assert found.mean.max() > 0
    losses = token_losses(model, probe, {"masked": HEADS}, progress=False)
    assert losses.losses.shape == (2, 8, 49)
    np.testing.assert_allclose(
        losses.losses[:, :, 32:47].mean(2)[0] - losses.losses[:, :, 6:21].mean(2)[0],
        found.provenance.checks["scores"],
        atol=1e-3,
    )
    whole, masked = losses.score(10, 40).mean(1)
    assert whole < -4
    assert masked > whole + 1
    one = token_losses(model, probe, {"masked": HEADS}, batch_size=1, progress=False)
    np.testing.assert_allclose(one.losses, losses.losses, atol=1e-3)
    figure = hs.plots.token_losses(losses, window=3)
    assert [line.name for line in figure.data] == ["whole model", "masked"]
    assert figure.data[0].x[0] == 3
    with pytest.raises(InputError, match="tokens 1 to 48"):
        losses.score(50, 500)


def test_texts_that_are_too_short_are_refused(model: Any) -> None:
    probe = hs.probes.repeated_tokens(model, length=10, batch=2)
    with pytest.raises(InputError, match="token 500 is asked for and the shortest text has 21"):
        in_context_score(model, probe)
    with pytest.raises(InputError, match="early before late"):
        in_context_score(model, probe, early=8, late=(4, 6))
