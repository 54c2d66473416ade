"""The two architectures, at their random start."""

import math

import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

CONTEXT = 256
NAMES = ("tiny-gpt2", "tiny-llama")


def sinusoids(positions: int, width: int) -> torch.Tensor:
    """`[pos d_model]` sine and cosine waves, wavelengths from 2 pi to twice `positions`."""
    longest = math.log(2 * positions / (2 * math.pi))
    rates = torch.exp(-longest * torch.linspace(0, 1, width // 2))
    angles = torch.arange(positions)[:, None] * rates
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1)


def new_model(name: str, vocabulary_size: int, bos: int, seed: int) -> PreTrainedModel:
    """An untrained model: random weights, but for GPT-2's position embeddings.

    Those start as sinusoids (and are trained like everything else): 256 unrelated random vectors
    would need far more text until a head can tell which position comes before which.
    """
    torch.manual_seed(seed)
    special = {"bos_token_id": bos, "eos_token_id": bos, "pad_token_id": bos}
    if name == "tiny-gpt2":
        gpt2 = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=vocabulary_size,
                n_positions=CONTEXT,
                n_embd=128,
                n_layer=3,
                n_head=4,
                n_inner=256,
                activation_function="gelu_pytorch_tanh",
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
                initializer_range=0.08,
                **special,
            )
        )
        gpt2.transformer.wpe.weight.data.copy_(sinusoids(CONTEXT, 128))
        return _started(gpt2)
    if name == "tiny-llama":
        return _started(
            LlamaForCausalLM(
                LlamaConfig(
                    vocab_size=vocabulary_size,
                    max_position_embeddings=CONTEXT,
                    hidden_size=128,
                    num_hidden_layers=3,
                    num_attention_heads=8,
                    num_key_value_heads=2,
                    head_dim=32,
                    intermediate_size=192,
                    tie_word_embeddings=True,
                    initializer_range=0.08,
                    rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
                    **special,
                )
            )
        )
    raise ValueError(f"unknown model {name!r}: one of {', '.join(NAMES)}")


def _started(model: PreTrainedModel) -> PreTrainedModel:
    """Draw the weights so that a token's embedding is loud beside what untrained layers write.

    Otherwise the second layer reads mostly the first one's noise, and circuits of two layers
    take many times as long to form. The final norm starts small, for tied embeddings of length
    one would else give very sure, very wrong predictions.
    """
    loud, quiet = ("embed_tokens", "wte"), ("o_proj", "down_proj", "c_proj")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() < 2 or "wpe" in name:
                continue
            spread = 1.0 if any(part in name for part in loud) else 0.1
            spread = 0.03 if any(part in name for part in quiet) else spread
            parameter.normal_(0.0, spread)
        final = model.transformer.ln_f if hasattr(model, "transformer") else model.model.norm
        final.weight.fill_(0.15)
    return model
