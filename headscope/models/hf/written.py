"""Write given weights into real transformers models: GPT-2 and Llama classes, head by head."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

# Base of the rotary frequencies: so large that only the first quarter of the planes turns.
ROTARY_BASE = 1e30


@dataclass(frozen=True, eq=False)
class WrittenLayer:
    """Weights of one block. Keys and values are per key/value head; vectors are rows.

    Attributes:
        W_Q, W_K, W_V, W_O: attention weights.
        b_Q, b_K: biases of queries and keys (the rotary planes of Llama use them).
        W_in, b_in, W_out: a ReLU MLP, ``relu(x W_in + b_in) W_out``.
        norm_1, norm_2: multipliers of the norms before attention and before the MLP.
    """

    W_Q: Float[Tensor, "head d_model d_head"]
    W_K: Float[Tensor, "kv_head d_model d_head"]
    W_V: Float[Tensor, "kv_head d_model d_head"]
    W_O: Float[Tensor, "head d_head d_model"]
    b_Q: Float[Tensor, "head d_head"]
    b_K: Float[Tensor, "kv_head d_head"]
    W_in: Float[Tensor, "d_model d_mlp"]
    b_in: Float[Tensor, " d_mlp"]
    W_out: Float[Tensor, "d_mlp d_model"]
    norm_1: float
    norm_2: float


@dataclass(frozen=True, eq=False)
class WrittenModel:
    """Weights of a whole model; ``positions`` is None for a rotary one."""

    embedding: Float[Tensor, "d_vocab d_model"]
    positions: Float[Tensor, "pos d_model"] | None
    layers: Sequence[WrittenLayer]
    norm: float
    unembedding: Float[Tensor, "d_vocab d_model"]


def rotary_frequencies(d_head: int) -> Float[Tensor, " plane"]:
    """Return the angle by which one position turns each rotary plane of a written Llama."""
    return ROTARY_BASE ** (-2 * torch.arange(d_head // 2, dtype=torch.float64) / d_head)


def gpt2(weights: WrittenModel, length: int) -> Any:
    """Build a ``GPT2LMHeadModel`` with these weights; every layer has the same head size.

    Args:
        weights: with ``positions``; ``d_model = n_heads * d_head``.
        length: context length.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    first, d_mlp = weights.layers[0], _d_mlp(weights)
    config = GPT2Config(
        vocab_size=len(weights.embedding), n_positions=length, n_embd=weights.embedding.shape[1],
        n_layer=len(weights.layers), n_head=len(first.W_Q), n_inner=d_mlp,
        activation_function="relu", tie_word_embeddings=False, bos_token_id=0, eos_token_id=0,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    model = _zeros(GPT2LMHeadModel(config))
    body, unit = model.transformer, first.W_Q.shape[2] ** 0.5
    _put(body.wte.weight, weights.embedding)
    if weights.positions is not None:
        _put(body.wpe.weight, weights.positions)
    for block, layer in zip(body.h, weights.layers, strict=True):
        reads = [layer.W_Q * unit, layer.W_K, layer.W_V]
        fused = torch.cat([part.transpose(0, 1).flatten(1) for part in reads], 1)
        _put(block.attn.c_attn.weight, fused)
        biases = torch.cat([layer.b_Q.flatten() * unit, layer.b_K.flatten()])
        _put(block.attn.c_attn.bias[: len(biases)], biases)
        _put(block.attn.c_proj.weight, layer.W_O.flatten(0, 1))
        units = len(layer.b_in)
        _put(block.mlp.c_fc.weight[:, :units], layer.W_in)
        _put(block.mlp.c_fc.bias[:units], layer.b_in)
        _put(block.mlp.c_proj.weight[:units], layer.W_out)
        block.ln_1.weight.fill_(layer.norm_1)
        block.ln_2.weight.fill_(layer.norm_2)
    body.ln_f.weight.fill_(weights.norm)
    _put(model.lm_head.weight, weights.unembedding)
    return model


def llama(weights: WrittenModel, length: int) -> Any:
    """Build a ``LlamaForCausalLM`` with these weights; key/value heads may be fewer than heads.

    Args:
        weights: without ``positions``; the planes that turn are those of
            :func:`rotary_frequencies`.
        length: context length.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    first, d_mlp = weights.layers[0], _d_mlp(weights)
    d_model, d_head = first.W_Q.shape[1:]
    config = LlamaConfig(
        vocab_size=len(weights.embedding), hidden_size=d_model, head_dim=d_head,
        intermediate_size=d_mlp, num_hidden_layers=len(weights.layers),
        num_attention_heads=len(first.W_Q), num_key_value_heads=len(first.W_K),
        max_position_embeddings=length, attention_bias=True, mlp_bias=True, hidden_act="relu",
        tie_word_embeddings=False, bos_token_id=0, eos_token_id=0,
        rope_parameters={"rope_type": "default", "rope_theta": ROTARY_BASE},
    )  # fmt: skip
    model = _zeros(LlamaForCausalLM(config))
    body, unit = model.model, d_head**0.5
    _put(body.embed_tokens.weight, weights.embedding)
    for block, layer in zip(body.layers, weights.layers, strict=True):
        attention, mlp = block.self_attn, block.mlp
        _put(attention.q_proj.weight, _stacked(layer.W_Q) * unit)
        _put(attention.k_proj.weight, _stacked(layer.W_K))
        _put(attention.v_proj.weight, _stacked(layer.W_V))
        _put(attention.q_proj.bias, layer.b_Q.flatten() * unit)
        _put(attention.k_proj.bias, layer.b_K.flatten())
        _put(attention.o_proj.weight, layer.W_O.flatten(0, 1).T)
        units = len(layer.b_in)
        _put(mlp.gate_proj.weight[:units], layer.W_in.T)
        _put(mlp.gate_proj.bias[:units], layer.b_in)
        mlp.up_proj.bias.fill_(1.0)  # the gate alone decides
        _put(mlp.down_proj.weight[:, :units], layer.W_out.T)
        block.input_layernorm.weight.fill_(layer.norm_1)
        block.post_attention_layernorm.weight.fill_(layer.norm_2)
    body.norm.weight.fill_(weights.norm)
    _put(model.lm_head.weight, weights.unembedding)
    return model


def _d_mlp(weights: WrittenModel) -> int:
    """Units of the widest MLP; the others of a narrower one stay 0."""
    return max(len(layer.b_in) for layer in weights.layers)


def _zeros(model: Any) -> Any:
    for parameter in model.parameters():
        parameter.requires_grad_(False).zero_()
    return model.eval()


def _put(target: Tensor | nn.Parameter, values: Tensor) -> None:
    target.copy_(values.to(target.dtype))


def _stacked(weight: Float[Tensor, "head d_model d_head"]) -> Float[Tensor, "row d_model"]:
    """Return projection rows, head after head, as ``nn.Linear`` holds them."""
    return weight.mT.flatten(0, 1)
