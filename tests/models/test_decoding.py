"""Generation step by step equals whole passes over the growing text."""

import pytest
import torch
from torch import Tensor

import headscope as hs
from headscope.models.bridge.model import bridge_over, wrap_bridge
from headscope.models.decoding import decoding
from headscope.models.protocol import HeadModel
from headscope.models.taps import TapView
from tests.models.families import build, fresh, padding, tokens
from tests.watching import reads_of

FAMILIES = ["gpt2", "llama", "mistral", "gemma2", "gpt_oss", "qwen3", "opt", "gpt_neox", "phi3"]


class Rows:
    """Keeps the newest query's rows."""

    wants_final = False

    def __init__(self, position: int) -> None:
        self.position, self.rows = position, dict[int, Tensor]()

    def on_layer(self, view: TapView) -> None:
        self.rows[view.layer] = view.rows(torch.tensor([self.position])).pattern[:, :, 0]

    def on_final(self, residual: Tensor) -> None:
        """Nothing is kept."""


def stepped(model: HeadModel, real: Tensor | None = None) -> list[tuple[Tensor, dict[int, Tensor]]]:
    """Greedy logits and rows of four steps, after a prompt of eight."""
    text, given = decoding(model, real), tokens()[:, :8]
    out = []
    for _ in range(4):
        seen = Rows(text.length + given.shape[1] - 1)
        logits = text.step(given, reads=reads_of(model.shape, seen))
        out.append((logits, seen.rows))
        given = logits.argmax(-1)[:, None].cpu()
    return out


@pytest.mark.parametrize("family", FAMILIES)
def test_steps_equal_eager_whole_passes(family: str) -> None:
    module = fresh(family)
    steps = stepped(hs.load(build(family), check=False))
    text = tokens()[:, :8]
    module.set_attn_implementation("eager")
    for logits, rows in steps:
        with torch.no_grad():
            plain = module(text, output_attentions=True, use_cache=False)
        torch.testing.assert_close(logits, plain.logits[:, -1], atol=2e-3, rtol=1e-3)
        for layer, row in rows.items():
            expected = plain.attentions[layer][:, :, -1]
            torch.testing.assert_close(row, expected, atol=1e-3, rtol=1e-3)
            assert row.argmax(-1).equal(expected.argmax(-1))
        text = torch.cat([text, plain.logits[:, -1].argmax(-1)[:, None]], 1)


@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral"])
def test_left_padding_changes_nothing(family: str) -> None:
    model = hs.load(build(family), check=False)
    real = padding("left")
    assert real is not None
    text, given = decoding(model, real), tokens()
    padded = [text.step(given)]
    padded += [text.step(given[:, :1])]
    for row in range(len(given)):
        alone = decoding(model)
        first = alone.step(given[row : row + 1][:, real[row]])
        then = alone.step(given[row : row + 1, :1])
        torch.testing.assert_close(padded[0][row : row + 1], first, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(padded[1][row : row + 1], then, atol=1e-3, rtol=1e-3)


def test_both_paths_agree() -> None:
    module = build("llama")
    fast = stepped(hs.load(module, check=False))
    slow = stepped(wrap_bridge(bridge_over(module), name="llama"))
    for (logits, rows), (other, other_rows) in zip(fast, slow, strict=True):
        torch.testing.assert_close(logits, other, atol=2e-3, rtol=1e-3)
        for layer, row in rows.items():
            torch.testing.assert_close(row, other_rows[layer], atol=1e-3, rtol=1e-3)


def test_edits_act_on_the_steps_that_they_name() -> None:
    model = hs.load(build("llama"), check=False)
    edit = hs.edits.HeadEdit.at("zero", ["L1H2"], scope="decode")
    plain, edited = decoding(model), decoding(model)
    prompt = tokens()[:, :8]
    assert plain.step(prompt).equal(edited.step(prompt, edits=[edit]))
    following = tokens()[:, 8:9]
    assert not plain.step(following).equal(edited.step(following, edits=[edit]))


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_a_first_layer_without_heads_counts_positions_too(family: str) -> None:
    whole = hs.load(build(family), check=False)
    model = hs.load(hs.prune(whole, [head for head in whole.shape.heads if head.layer == 0]))
    text, read = decoding(model), tokens()[:2, :9]
    found = [text.step(read[:, :6]), *(text.step(read[:, i : i + 1]) for i in range(6, 9))]
    with torch.no_grad():
        expected = model.forward(read, logits_at=torch.arange(5, 9))
    torch.testing.assert_close(torch.stack(found, 1), expected, atol=1e-4, rtol=1e-4)


def test_gpt2_is_never_left_to_guess_the_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    module = fresh("gpt2")
    module.config.pad_token_id = 0
    missing: list[bool] = []

    def warn(ids: Tensor, mask: Tensor | None) -> None:
        missing.append(mask is None and 0 in ids[:, [-1, 0]])

    monkeypatch.setattr(module.transformer, "warn_if_padding_and_no_attention_mask", warn)
    model = hs.load(module)
    read = torch.tensor([[0, 5, 9, 0]])
    decoding(model).step(read)
    model.forward(read)
    hs.lens.attribute(model, read[0])
    assert len(missing) > 5
    assert not any(missing)
