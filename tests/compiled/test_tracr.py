"""Models that tracr compiled: a truth that no line of headscope had a hand in.

The weights are data, see tracr/README.md. They go into a GPT-2 without norms, with two heads of
random queries and keys beside tracr's one, which write nothing.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import headscope as hs

FILE = Path(__file__).parent / "tracr" / "programs.npz"
HEADS = 3


@cache
def stored() -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    with np.load(FILE) as arrays:
        found = dict(arrays)
    return found, json.loads(bytes(found.pop("facts")))


def module(name: str) -> GPT2LMHeadModel:
    """A GPT-2 with tracr's weights; its logits are the output variable's coordinates."""
    arrays, facts = stored()
    w = {k.removeprefix(f"{name}/"): v for k, v in arrays.items() if k.startswith(f"{name}/")}
    labels, layers, d_head = (facts[name][fact] for fact in ("residual", "layers", "d_head"))
    d_model = HEADS * d_head
    said = [f"{out}_" for out in ("induction", "frac_prevs")]
    shown = [at for at, label in enumerate(labels) if label.startswith(tuple(said))]
    config = GPT2Config(
        vocab_size=len(facts[name]["input"]), n_positions=9, n_embd=d_model, n_layer=layers,
        n_head=HEADS, n_inner=w["transformer/layer_0/mlp/linear_1/w"].shape[1],
        activation_function="relu", tie_word_embeddings=False, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).eval()
    draw = torch.Generator().manual_seed(0)

    def put(target: torch.Tensor, name: str) -> None:
        value = torch.from_numpy(w[name])
        assert all(a >= b for a, b in zip(target.shape, value.shape, strict=True))
        target[tuple(slice(0, size) for size in value.shape)] = value

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        put(model.transformer.wte.weight, "token_embed/embeddings")
        put(model.transformer.wpe.weight, "pos_embed/embeddings")
        for number, block in enumerate(model.transformer.h):
            block.ln_1, block.ln_2 = nn.Identity(), nn.Identity()
            at = f"transformer/layer_{number}"
            for place, part in enumerate(("query", "key", "value")):
                own = block.attn.c_attn.weight[:, place * d_model : (place + 1) * d_model]
                if part != "value":
                    noise = torch.randn(d_model, d_model - d_head, generator=draw)
                    own[:, d_head:] = noise
                put(own, f"{at}/attn/{part}/w")
                bias = block.attn.c_attn.bias[place * d_model : (place + 1) * d_model]
                put(bias, f"{at}/attn/{part}/b")
            put(block.attn.c_proj.weight, f"{at}/attn/linear/w")
            put(block.attn.c_proj.bias, f"{at}/attn/linear/b")
            for layer, part in ((block.mlp.c_fc, "linear_1"), (block.mlp.c_proj, "linear_2")):
                put(layer.weight, f"{at}/mlp/{part}/w")
                put(layer.bias, f"{at}/mlp/{part}/b")
        model.transformer.ln_f = nn.Identity()
        for token, label in enumerate(labels[at] for at in shown):
            row = facts[name]["input"].get(label.rpartition(":")[2], token)
            model.lm_head.weight[row, labels.index(label)] = 10.0
    return model


def tokens_of(name: str, number: int) -> torch.Tensor:
    facts = stored()[1][name]
    return torch.tensor([[facts["input"][one] for one in facts["runs"][number]["text"]]])


@pytest.mark.parametrize("name", ["induction", "frac_prevs"])
def test_it_is_the_model_that_tracr_made(name: str) -> None:
    arrays, facts = stored()
    model = module(name)
    for number in range(len(facts[name]["runs"])):
        tokens = tokens_of(name, number)
        with torch.no_grad():
            model.set_attn_implementation("eager")
            out = model(tokens, output_hidden_states=True, output_attentions=True)
        states = arrays[f"{name}/runs/{number}/residuals"]  # after every attention and MLP
        for layer in range(facts[name]["layers"]):
            own = out.hidden_states[layer + 1][0, :, : states.shape[-1]]
            np.testing.assert_allclose(own, states[2 * layer + 1], atol=1e-5)
            scores = torch.from_numpy(arrays[f"{name}/runs/{number}/attn_logits"][layer, 0])
            hidden = torch.ones_like(scores, dtype=torch.bool).triu(1)
            rows = scores.masked_fill(hidden, float("-inf")).softmax(-1)
            np.testing.assert_allclose(out.attentions[layer][0, 0], rows, atol=1e-5)


def test_its_heads_are_named() -> None:
    model = hs.load(module("induction"))
    words = [[1, 2, 3, 5], [5, 3, 1, 2], [2, 5, 1, 3], [3, 1, 5, 2]]
    probe = hs.probes.from_tokens(torch.tensor([[0, *word, *word] for word in words]))
    table = hs.score(model, probe, ["previous_token", "induction", "density"])
    ((head, value),) = table.top("previous_token", 1)
    assert (str(head), value) == ("L0H0", pytest.approx(1.0, abs=1e-4))
    ((head, value),) = table.top("induction", 1)
    assert str(head) == "L1H0"
    assert value == pytest.approx(1.0, abs=1e-4)
    used = {"L0H0", "L1H0"}
    clean = model.forward(probe.tokens)
    for one in model.shape.heads:
        changed = model.forward(probe.tokens, edits=[hs.edits.zero([one])])
        assert (float((changed - clean).abs().max()) > 0.5) == (str(one) in used), one


def test_its_composition_is_found_by_weights_and_by_edges() -> None:
    model = hs.load(module("induction"))
    heads = {letter: hs.circuits.composition(model, letter).values for letter in "QKV"}
    size = {letter: float(values[0, 0, 1, 0]) for letter, values in heads.items()}
    assert size["K"] > 0.3
    assert size["Q"] < 1e-6
    assert size["V"] < 1e-6
    assert float(heads["K"][0, 1:, 1].max()) < 1e-6  # heads that write nothing
    words = [[1, 2, 3, 5], [5, 3, 1, 2]]
    probe = hs.probes.from_tokens(torch.tensor([[0, *word, *word] for word in words]))
    graph = hs.edges.attribute(model, probe, hs.metrics.loss, "exact", ablation="zero")
    found = {
        (edge.source, edge.target, edge.slot)
        for edge, value in graph.scores.items()
        if abs(value) > 1e-3
    }
    assert ("L0H0", "L1H0", "key") in found
    assert ("L1H0", "logits", "output") in found
    assert not {edge for edge in found if edge[0] in ("L0H1", "L0H2", "L1H1", "L1H2")}
