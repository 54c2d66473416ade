"""Pruned models: smaller, equal to zero ablation, saved and read again, on every family."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import headscope as hs
from headscope.edits import zero
from headscope.errors import HeadscopeError, InputError, ModelLoadError, UnsupportedModelError
from headscope.heads import HeadIndex
from headscope.pruning import load_pruned, prune
from tests.ablation.helpers import model_of, probe_of
from tests.models import families

JOINT_NORM = {"olmo2"}
FAMILIES = [family for family in families.HF_FAMILIES if family not in JOINT_NORM]
GROUPED = [f for f in FAMILIES if families.HF_FAMILIES[f].get("num_key_value_heads") == 2]

BIASED = {"gpt2", "gpt_neox", "llama", "qwen2", "gpt_oss", "starcoder2", "opt"}  # Q, K and V

# Unevenly, so that groups of two query heads lose one, both or none; and without first layer.
SETS = {
    "uneven": ["L0H0", "L1H3", "L2H1", "L2H2"],
    "layers": ["L0H0", "L0H1", "L0H2", "L0H3", "L2H2", "L2H3"],
}


def gap(a: Tensor, b: Tensor, real: Tensor | None = None) -> float:
    """Largest difference, as a share of the largest number."""
    kept = slice(None) if real is None else real
    return float((a - b)[kept].abs().max() / b[kept].abs().max())


@pytest.mark.parametrize("heads", SETS.values(), ids=SETS)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_equals_zero_ablation_and_survives_a_folder(
    family: str, heads: list[str], tmp_path: Path
) -> None:
    model, real = model_of(family), families.padding("both")
    smaller = prune(model, heads)
    smaller.save_pretrained(tmp_path)
    again = hs.load(tmp_path)
    tokens = families.tokens()
    wanted = model.forward(tokens, edits=(zero(heads),))
    assert gap(smaller(input_ids=tokens, use_cache=False).logits, wanted) < 1e-5
    wanted = model.forward(tokens, real=real, edits=(zero(heads),))
    assert gap(again.forward(tokens, real=real), wanted, real) < 1e-5
    assert gap(model.forward(tokens, real=real), wanted, real) > 1e-2  # they did something
    assert again.module.state_dict().keys() == smaller.state_dict().keys()
    for name, weight in smaller.state_dict().items():
        assert torch.equal(again.module.state_dict()[name], weight), name


@pytest.mark.parametrize(
    "family", ["gpt2", "gpt_neox", "llama", "mistral", "gemma3_text", "phi3", "opt", "gpt_oss"]
)
@torch.no_grad()
def test_generates_with_a_cache(family: str) -> None:
    smaller = prune(model_of(family), SETS["layers"])
    text, whole = families.tokens()[:2], families.tokens()
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    cached = smaller.generate(text, use_cache=True, **options)
    assert torch.equal(cached, smaller.generate(text, use_cache=False, **options))
    first = smaller(input_ids=whole[:, :7], use_cache=True)
    second = smaller(input_ids=whole[:, 7:], past_key_values=first.past_key_values)
    parts = torch.cat([first.logits, second.logits], 1)
    assert gap(parts, smaller(input_ids=whole, use_cache=False).logits) < 1e-5


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "phi3"])
def test_a_pruned_model_is_seen_under_its_old_numbers(family: str) -> None:
    model, heads, probe = model_of(family), SETS["layers"], probe_of("left")
    smaller = hs.load(prune(model, heads))
    assert smaller.shape.heads == tuple(h for h in model.shape.heads if str(h) not in heads)
    assert smaller.shape.attention_layers == (1, 2)
    entropy = hs.score(smaller, probe, ["entropy"])["entropy"]
    present = [HeadIndex(*at) for at in np.argwhere(entropy.present).tolist()]
    assert present == list(smaller.shape.heads)
    alone = hs.ablate_heads(smaller, probe, hs.metrics.loss, "zero")
    groups = {str(head): [*heads, head] for head in smaller.shape.heads} | {"none": heads}
    together = hs.ablate_groups(model, probe, hs.metrics.loss, groups, "zero").mean
    for head, effect in zip(smaller.shape.heads, together, strict=False):
        assert alone[head] == pytest.approx(effect - together[-1], abs=1e-5)
    with pytest.raises(InputError, match="L2H2 was pruned"):
        hs.ablate_heads(smaller, probe, hs.metrics.loss, heads="L2H2")


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_and_columns_are_gone(family: str) -> None:
    model = model_of(family)
    shape, bias = model.shape, family in BIASED
    column = shape.d_head * shape.d_model  # what one head has of one matrix
    query = 2 * column + bias * shape.d_head + (family == "gpt_oss")  # the last one is its sink
    key_value = 2 * column + 2 * bias * shape.d_head
    before = sum(p.numel() for p in model.module.parameters())
    alone = before - sum(p.numel() for p in prune(model, "L1H2").parameters())
    assert alone == query + key_value * (shape.group_size == 1)
    if shape.n_kv_heads > 1:
        group = [f"L0H{h}" for h in range(shape.group_size)]
        gone = before - sum(p.numel() for p in prune(model, group).parameters())
        assert gone == shape.group_size * query + key_value


@pytest.mark.parametrize("family", GROUPED)
def test_key_value_heads_go_with_their_whole_group_only(family: str) -> None:
    model = model_of(family)
    both = prune(model, ["L0H2", "L0H3"])
    one = prune(model, ["L0H2"])
    cached = [m(input_ids=families.tokens(), use_cache=True).past_key_values for m in (both, one)]
    assert cached[0].layers[0].keys.shape[1] == 1
    assert cached[1].layers[0].keys.shape[1] == 3  # 2 + 1 query heads: groups of one
    assert cached[1].layers[1].keys.shape[1] == 2


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt"])
def test_the_model_itself_stays_as_it_was(family: str) -> None:
    model = hs.load(families.fresh(family))
    before, config = copy.deepcopy(model.module.state_dict()), model.module.config.to_dict()
    smaller = prune(model, SETS["uneven"])
    with torch.no_grad():
        for parameter in smaller.parameters():
            parameter.zero_()
    assert model.module.config.to_dict() == config
    for name, weight in model.module.state_dict().items():
        assert torch.equal(weight, before[name]), name


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "phi3"])
@torch.no_grad()
def test_follows_the_attention_that_is_set(family: str, implementation: str) -> None:
    model = model_of(family)
    smaller = prune(model, SETS["uneven"])
    smaller.set_attn_implementation(implementation)
    real = families.padding("right")
    assert real is not None
    tokens = families.tokens()
    got = smaller(input_ids=tokens, attention_mask=real.long()).logits
    wanted = model.forward(tokens, real=real, edits=(zero(SETS["uneven"]),))
    assert gap(got, wanted, real) < 1e-5


def test_a_pruned_model_learns() -> None:
    smaller = prune(model_of("llama"), SETS["layers"])
    smaller(input_ids=families.tokens(), labels=families.tokens()).loss.backward()
    learned = {name for name, p in smaller.named_parameters() if p.grad is not None}
    attention = [f"model.layers.{i}.self_attn.{m}_proj.weight" for i in (1, 2) for m in "qkvo"]
    assert learned >= set(attention)


@torch.no_grad()
def test_half_precision_and_no_head_at_all() -> None:
    module = families.fresh("llama").to(torch.bfloat16)
    model = hs.load(module)
    smaller = prune(model, SETS["uneven"])
    assert smaller.dtype == torch.bfloat16
    wanted = model.forward(families.tokens(), edits=(zero(SETS["uneven"]),))
    assert gap(smaller(input_ids=families.tokens()).logits, wanted) < 5e-2
    empty = prune(model_of("gpt2"), model_of("gpt2").shape.heads)
    off = model_of("gpt2").forward(families.tokens(), edits=(zero(model_of("gpt2").shape.heads),))
    assert gap(empty(input_ids=families.tokens()).logits, off) < 1e-6
    with pytest.raises(UnsupportedModelError, match="all its heads were pruned"):
        hs.load(empty)


def test_what_cannot_be_done_is_said() -> None:
    with pytest.raises(UnsupportedModelError, match=r"olmo2.*over all heads together"):
        prune(model_of("olmo2"), "L0H0")
    with pytest.raises(UnsupportedModelError, match="attention registry"):
        prune(model_of("gptj"), "L0H0")
    with pytest.raises(InputError, match="no head L9H0"):
        prune(model_of("gpt2"), "L9H0")
    smaller = hs.load(prune(model_of("gpt2"), "L0H0"))
    with pytest.raises(UnsupportedModelError, match="pruned already"):
        prune(smaller, "L0H1")
    with pytest.raises(UnsupportedModelError, match="was pruned"):
        smaller.bridge  # noqa: B018


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_weights_of_a_pruned_model_are_those_that_are_left(family: str) -> None:
    whole, gone = model_of(family), [HeadIndex(0, 1), HeadIndex(0, 3), HeadIndex(2, 0)]
    smaller = hs.load(prune(whole, gone))
    for layer in range(3):
        before, after = whole.weights(layer), smaller.weights(layer)
        kept = [head for head in range(4) if HeadIndex(layer, head) not in gone]
        for name in ("W_Q", "b_Q", "W_O"):
            assert gap(getattr(after, name)[kept], getattr(before, name)[kept]) < 1e-6
        shared = sorted({whole.shape.kv_head(head) for head in kept})
        for name in ("W_K", "W_V", "b_K", "b_V"):
            assert gap(getattr(after, name)[shared], getattr(before, name)[shared]) < 1e-6
        lost = sorted(set(range(4)) - set(kept))
        assert not after.W_Q[lost].any()
        assert not after.W_O[lost].any()


def test_damaged_and_foreign_folders(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no model"):
        load_pruned(tmp_path / "nowhere")
    whole, smaller = tmp_path / "whole", tmp_path / "smaller"
    model_of("llama").module.save_pretrained(whole)
    with pytest.raises(InputError, match="never pruned"):
        load_pruned(whole)
    prune(model_of("llama"), SETS["uneven"]).save_pretrained(smaller)
    assert type(load_pruned(smaller)) is type(model_of("llama").module)
    config = (smaller / "config.json").read_text()
    (smaller / "config.json").write_text(config.replace('"q_proj": 36', '"q_proj": 24', 1))
    with pytest.raises(ModelLoadError, match="weights are not those"):
        load_pruned(smaller)
    (smaller / "config.json").write_text(config.replace('"n_heads"', '"heads"'))
    with pytest.raises(HeadscopeError, match="no pruned model that can be read"):
        hs.load(smaller)
