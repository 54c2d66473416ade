"""On a real language model: headscope's numbers are plain transformers' numbers, and stay.

``figures.json`` holds what came out; a figure that moves is a change of method, to be explained
in the commit that changes it.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

import headscope as hs
from headscope.models.protocol import HeadModel

_TEXTS = [
    "The river runs from the mountains to the sea, and the towns along the river live from it.",
    "When the library opened again, the librarian put every book back where readers had left it.",
    "My grandmother baked bread every Sunday, and the whole street came to buy a loaf of it.",
    "The committee will meet on Monday to decide whether the bridge should be repaired this year.",
    "A good teacher asks questions to which she does not yet know the answer, and then listens.",
    "After the storm the fishermen counted their boats and found that two of them were missing.",
    "Copper conducts electricity better than iron, which is why most wires are made of it.",
    "He wrote to his brother once a month, and his brother wrote back once a year, at Christmas.",
]


@pytest.fixture(scope="module")
def induction(model: HeadModel, probe: hs.Probe) -> hs.HeadScores:
    return hs.score(model, probe, ["induction"])["induction"]


@pytest.fixture(scope="module")
def strongest(induction: hs.HeadScores) -> list[hs.HeadIndex]:
    return [head for head, _ in induction.top(4)]


def test_streamed_scores_equal_eager_attention(
    eager: Any, induction: hs.HeadScores, probe: hs.Probe
) -> None:
    with torch.no_grad():
        patterns = eager(probe.tokens, output_attentions=True).attentions
    length = probe.length // 2  # of one copy: this model has no first token of its own
    queries = torch.arange(length, probe.length)
    expected = torch.stack(
        [one[:, :, queries, queries - length + 1].mean((0, 2)) for one in patterns]
    )
    np.testing.assert_allclose(induction.mean, expected.numpy(), atol=1e-5)


def test_zero_ablation_equals_plain_hooks(
    eager: Any, model: HeadModel, probe: hs.Probe, strongest: list[hs.HeadIndex]
) -> None:
    found = hs.ablate_heads(model, probe, hs.metrics.loss, "zero", heads=strongest[:2])
    clean = _losses(eager, probe)
    for head in strongest[:2]:
        size = eager.config.hidden_size // eager.config.num_attention_heads
        part = slice(head.head * size, (head.head + 1) * size)

        def cut(_module: Any, args: tuple[torch.Tensor, ...], part: slice = part) -> Any:
            z = args[0].clone()
            z[..., part] = 0
            return (z, *args[1:])

        projection = eager.model.layers[head.layer].self_attn.o_proj
        handle = projection.register_forward_pre_hook(cut)
        try:
            effect = float((_losses(eager, probe) - clean).mean())
        finally:
            handle.remove()
        assert found.mean[head.layer, head.head] == pytest.approx(effect, abs=1e-4)


def _losses(eager: Any, probe: hs.Probe) -> torch.Tensor:
    """Loss of every example over the tokens that the probe asks for."""
    with torch.no_grad():
        logits = eager(probe.tokens).logits.log_softmax(-1)
    wanted = probe.targets >= 0
    own = -logits.gather(-1, probe.targets.clamp_min(0)[..., None])[..., 0]
    return (own * wanted).sum(1) / wanted.sum(1)


def test_induction_heads_matter_for_repeated_text(
    model: HeadModel,
    probe: hs.Probe,
    induction: hs.HeadScores,
    strongest: list[hs.HeadIndex],
    stays: Callable[..., None],
) -> None:
    said_again = probe.targets.where(probe.mark("second_copy"), -1)
    others = [head for head in model.shape.heads if induction.mean[head] < 0.1]
    rng = np.random.default_rng(0)
    random = {
        f"random {draw}": [others[at] for at in rng.choice(len(others), 4, replace=False)]
        for draw in range(3)
    }
    effects = hs.ablate_groups(
        model,
        replace(probe, targets=said_again, control=None),
        hs.metrics.loss,
        {"induction": strongest, **random},
        "mean",
    )
    rise = dict(zip(effects.labels[0], effects.mean.tolist(), strict=True))
    assert rise["induction"] > 2  # nats a token
    assert max(abs(rise[name]) for name in random) < 0.1
    stays("strongest_induction", [str(head) for head in strongest])
    for head in strongest:
        stays(f"induction_{head}", float(induction.mean[head]))
    stays("loss_without_induction", rise["induction"])
    stays("loss_with_all", float(np.mean(effects.unedited)))


def test_needles_in_chats_are_answered_and_looked_up(
    model: HeadModel, eager: Any, stays: Callable[..., None]
) -> None:
    probe = hs.probes.needle(model, lengths=128, depths=2, per_cell=1, seed=0)
    assert model.tokenizer.decode(probe.tokens[0]).count("<|im_start|>") >= 2
    found = hs.retrieval.decoded(model, probe, null=False)
    assert found.runs.accuracy == 1
    for row, run in enumerate(found.runs.runs):
        asked = probe.tokens[row][probe.real[row]][None]
        asked = asked[:, : int(probe.mark("end")[row][probe.real[row]].int().argmax()) + 1]
        said = eager.generate(asked, max_new_tokens=len(run.tokens), do_sample=False)
        assert tuple(said[0, asked.shape[1] :].tolist()) == run.tokens
    stays("retrieval", [str(head) for head, _ in found.by_set.top(2)])
    scores = hs.score(model, probe, ["needle_mass"])["needle_mass"]
    stays("needle_mass_L18H6", float(scores.mean[18, 6]))


def test_the_logit_lens_reads_every_layer_as_the_model_reads_its_last(
    model: HeadModel, eager: Any
) -> None:
    ids = model.tokenizer(_TEXTS[0])["input_ids"]
    grid = hs.lens.logit_lens(model, ids)
    with torch.no_grad():
        out = eager(torch.tensor([ids]), output_hidden_states=True)
        middle = eager.lm_head(eager.model.norm(out.hidden_states[15][0]))
    assert float(grid.kl[-1].max()) < 1e-4
    assert grid.ids[-1, :, 0].tolist() == out.logits[0].argmax(-1).tolist()
    last, at_15 = (one.log_softmax(-1) for one in (out.logits[0], middle))
    away = (last.exp() * (last - at_15)).sum(-1)
    np.testing.assert_allclose(grid.kl[15], away.numpy(), atol=1e-4, rtol=1e-4)


def test_a_tuned_lens_is_nearer_on_text_that_it_has_not_seen(model: HeadModel) -> None:
    probe = hs.probes.text(model, _TEXTS)
    report = hs.lens.tuned_lens(model, probe, steps=4, tokens=16, seed=0).report
    assert report.learned[:10].mean() < report.plain[:10].mean()


def test_a_pruned_model_is_the_ablated_one(
    model: HeadModel, probe: hs.Probe, strongest: list[hs.HeadIndex]
) -> None:
    layer = strongest[0].layer
    group = [(layer, head) for head in range(model.shape.group_size)]  # all of one key/value head
    smaller = hs.load(hs.prune(model, group))
    with model.edited([hs.edits.zero(group)]):
        expected = model.module(probe.tokens).logits.detach()
    found = smaller.module(probe.tokens).logits.detach()
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-4)
    parameters = [sum(p.numel() for p in one.module.parameters()) for one in (smaller, model)]
    assert parameters[0] < parameters[1]


def test_weights_of_the_file_are_its_blocks_undone(model: HeadModel, file: Path) -> None:
    from gguf import GGUFReader
    from gguf.quants import dequantize

    tensors = {one.name: one for one in GGUFReader(file).tensors}
    state = model.module.state_dict()
    layer, heads, kv_heads = "model.layers.7.", model.shape.n_heads, model.shape.n_kv_heads
    for name, stored, turned in (
        ("mlp.down_proj", "ffn_down", None),
        ("self_attn.v_proj", "attn_v", None),
        ("self_attn.q_proj", "attn_q", heads),
        ("self_attn.k_proj", "attn_k", kv_heads),
    ):
        one = tensors[f"blk.7.{stored}.weight"]
        value = dequantize(one.data, one.tensor_type)
        if turned:  # llama.cpp rotates neighbours, transformers halves: even rows first
            value = (
                value.reshape(turned, -1, 2, value.shape[-1]).swapaxes(1, 2).reshape(value.shape)
            )
        np.testing.assert_array_equal(state[f"{layer}{name}.weight"].numpy(), value)


def test_the_file_equals_the_folder(
    model: HeadModel, folder: Path, probe: hs.Probe, induction: hs.HeadScores
) -> None:
    other = hs.load(folder)
    mine = model.module.state_dict()
    for name, value in other.module.state_dict().items():
        torch.testing.assert_close(value, mine[name], atol=0, rtol=0)  # stored, not computed
    again = hs.score(other, probe, ["induction"])["induction"]
    np.testing.assert_allclose(again.mean, induction.mean, atol=1e-6)
    said = [one.tokenizer(_TEXTS[1])["input_ids"] for one in (model, other)]
    assert said[0] == said[1]
    turn = [{"role": "user", "content": "Who opened the library?"}]
    chats = [one.tokenizer.apply_chat_template(turn, tokenize=False) for one in (model, other)]
    assert chats[0] == chats[1]


def test_half_precision_ranks_heads_alike(
    folder: Path, probe: hs.Probe, induction: hs.HeadScores, strongest: list[hs.HeadIndex]
) -> None:
    half = hs.score(hs.load(folder, dtype="bf16"), probe, ["induction"])["induction"]
    assert spearmanr(half.mean.ravel(), induction.mean.ravel()).statistic > 0.98
    assert {head for head, _ in half.top(4)} == set(strongest)
    assert np.abs(half.mean - induction.mean).max() < 4 * torch.finfo(torch.bfloat16).eps
