"""Real Hugging Face models whose heads are set by hand, so that what each one does is exact.

Residual stream: slots of one-hot vectors. Every position holds the same number of ones, so the
norms are a known multiple and their weights undo them: each block reads the plain one-hots.
A head's scores differ by at least 50 between the key that it wants and any other, so that
attention is 1 to fp32's last digit; a "uniform" head has all scores 0 and gives 1/(i+1).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from headscope.heads import HeadIndex, ModelShape


@dataclass(frozen=True)
class Handwired:
    """A model and what its heads do.

    ``previous_token`` writes the token before into its own slot. ``induction`` reads that slot,
    attends to the follower of the earlier occurrence (to itself where there is none) and raises
    that token's logit by ``gain``. ``anti_copy`` (GPT-2 only) attends to the token before and
    lowers its logit by 1. ``duplicate_token`` attends to the earlier occurrence, or itself. The
    others write nothing.
    """

    model: PreTrainedModel
    roles: Mapping[str, HeadIndex]
    bos: int = 0
    gain: float = 10.0
    name: str = "handwired"
    tokenizer: None = None
    shape: ModelShape = field(init=False)

    def __post_init__(self) -> None:
        """Say its shape, so that probes can be drawn for it."""
        config = self.model.config
        heads = config.num_attention_heads
        shape = ModelShape(
            n_layers=2,
            n_heads=heads,
            n_kv_heads=heads,
            d_model=config.hidden_size,
            d_head=getattr(config, "head_dim", None) or config.hidden_size // heads,
            d_vocab=config.vocab_size,
            n_ctx=config.max_position_embeddings,
            attention_layers=(0, 1),
            windows=(None, None),
        )
        object.__setattr__(self, "shape", shape)

    def patterns(self, tokens: Tensor, mask: Tensor | None = None) -> list[Tensor]:
        """Attention of each layer ``[batch head query key]``, by the model's eager attention."""
        self.model.set_attn_implementation("eager")
        with torch.no_grad():
            out = self.model(tokens, attention_mask=mask, output_attentions=True)
        return list(out.attentions)


GPT2_ROLES = {
    "previous_token": HeadIndex(0, 0),
    "duplicate_token": HeadIndex(0, 1),
    "first_token": HeadIndex(0, 2),
    "uniform": HeadIndex(0, 3),
    "current_token": HeadIndex(0, 4),
    "induction": HeadIndex(1, 0),
    "anti_copy": HeadIndex(1, 1),
}
LLAMA_ROLES = {
    "previous_token": HeadIndex(0, 0),
    "duplicate_token": HeadIndex(0, 1),
    "first_token": HeadIndex(0, 2),
    "current_token": HeadIndex(0, 3),
    "induction": HeadIndex(1, 0),
    "uniform": HeadIndex(1, 1),
}


def handwired_gpt2(size: int = 32, strength: float = 120.0) -> Handwired:
    """Build a GPT-2 of two layers with ``size`` tokens and as many positions.

    It works with and without a BOS (token 0) in front.
    """
    heads, d_head = 5, 2 * size
    width = heads * d_head
    config = GPT2Config(
        vocab_size=size, n_positions=size, n_embd=width, n_layer=2, n_head=heads, n_inner=8,
        bos_token_id=0, eos_token_id=0, tie_word_embeddings=False,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False).zero_()
    one = torch.eye(size)
    token, position, before, out, out_2 = (slice(n * size, (n + 1) * size) for n in range(5))
    body = model.transformer
    body.wte.weight[:, token] = one
    body.wpe.weight[:, position] = one
    by_token, by_position = slice(0, size), slice(size, 2 * size)  # dimensions of a head
    unit = strength * d_head**0.5  # a score of `strength` after the division by sqrt(d_head)
    earlier = torch.zeros(size, size)
    earlier[1:, :-1] = torch.eye(size - 1)  # position i asks for i - 1

    def head(layer: int, number: int, *, writes: slice | None = None, sign: float = 1.0) -> tuple:
        """Views of one head's W_Q, b_Q, W_K, with its value and output set."""
        attention = body.h[layer].attn
        at = slice(number * d_head, (number + 1) * d_head)
        parts = attention.c_attn.weight.view(width, 3, width)[..., at].unbind(1)
        parts[2][token, by_token] = one
        if writes is not None:
            attention.c_proj.weight[at][by_token, writes] = sign * one
        parts[1][position, by_position] = one
        return parts[0], attention.c_attn.bias[:width][at], parts[1]

    for layer, number in ((0, 0), (1, 1)):  # previous token
        writes, sign = (before, 1.0) if layer == 0 else (out_2, -1.0)
        w_q, _, _ = head(layer, number, writes=writes, sign=sign)
        w_q[position, by_position] = unit * earlier
    w_q, _, w_k = head(0, 1)  # duplicate token: the earlier one, and itself if there is none
    w_q[token, by_token], w_k[token, by_token] = unit * one, one
    w_q[position, by_position] = -unit / 2 * one
    for layer in (0, 1):
        _, b_q, _ = head(layer, 2)  # first token
        b_q[size] = unit
        w_q, _, _ = head(layer, 4)  # current token
        w_q[position, by_position] = unit * one
    w_q, b_q, w_k = head(1, 0, writes=out)  # induction
    w_q[token, by_token], w_k[before, by_token] = unit * one, one
    w_q[position, by_position] = unit / 2 * one
    b_q[size] = -2 * unit  # position 0 has no token before: what it holds there is its own
    for norm, ones, signed in (
        (body.h[0].ln_1, 2, 2),
        (body.h[1].ln_1, 3, 3),
        (body.ln_f, 5, 3),
    ):
        mean = signed / width
        norm.weight.fill_((ones / width - mean**2 + config.layer_norm_epsilon) ** 0.5)
        norm.bias.fill_(mean)
    built = Handwired(model, GPT2_ROLES)
    model.lm_head.weight[:, out], model.lm_head.weight[:, out_2] = built.gain * one, one
    return built


def handwired_llama(size: int = 32, context: int = 64, strength: float = 1000.0) -> Handwired:
    """Build a rotary Llama of two layers; every text must start with the BOS (token 0).

    Frequencies fall so fast that the first four rotary pairs tell positions apart and the
    pairs from the sixteenth on stand still: tokens are matched there.
    """
    heads, d_head, theta = 4, 128, 1e30
    config = LlamaConfig(
        vocab_size=size, hidden_size=3 * size, intermediate_size=8, num_hidden_layers=2,
        num_attention_heads=heads, num_key_value_heads=heads, head_dim=d_head,
        max_position_embeddings=context, attention_bias=True, tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False).zero_()
    one = torch.eye(size)
    token, before, out = (slice(n * size, (n + 1) * size) for n in range(3))
    body = model.model
    body.embed_tokens.weight[:, token] = one
    still = slice(16, 16 + size)
    pairs = torch.arange(4)
    unit = strength * d_head**0.5

    def head(layer: int, number: int, *, writes: slice | None = None) -> tuple:
        """Views of one head's W_Q, b_Q, W_K, with its value and output set."""
        attention = body.layers[layer].self_attn
        at = slice(number * d_head, (number + 1) * d_head)
        attention.v_proj.weight[at][still, token] = one
        if writes is not None:
            attention.o_proj.weight[writes, at.start + still.start : at.start + still.stop] = one
        attention.k_proj.bias[at][pairs] = 1.0
        q = attention.q_proj
        return q.weight[at], q.bias[at], attention.k_proj.weight[at]

    def look_back(b_q: Tensor, distance: int, weight: float) -> None:
        """Score ``weight * mean of cos((i - j - distance) f)`` over the four fast pairs."""
        angle = -distance * theta ** (-2 * pairs / d_head)
        b_q[pairs] = weight / 4 * angle.cos()
        b_q[pairs + d_head // 2] = weight / 4 * angle.sin()

    _, b_q, _ = head(0, 0, writes=before)  # previous token
    look_back(b_q, 1, unit)
    w_q, b_q, w_k = head(0, 1)  # duplicate token: the earlier one, and itself if there is none
    w_q[still, token], w_k[still, token] = unit * one, one
    look_back(b_q, 0, -unit / 2)
    _, b_q, w_k = head(0, 2)  # first token, which is the BOS
    b_q[still.start], w_k[still, token] = unit, one
    _, b_q, _ = head(0, 3)  # current token
    look_back(b_q, 0, unit)
    w_q, b_q, w_k = head(1, 0, writes=out)  # induction
    w_q[still, token], w_k[still, before] = unit * one, one
    look_back(b_q, 0, unit / 2)
    for norm, ones in (
        (body.layers[0].input_layernorm, 1),
        (body.layers[1].input_layernorm, 2),
        (body.norm, 3),
    ):
        norm.weight.fill_((ones / config.hidden_size + config.rms_norm_eps) ** 0.5)
    built = Handwired(model, LLAMA_ROLES)
    model.lm_head.weight[:, out] = built.gain * one
    return built
