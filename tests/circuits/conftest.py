"""Small models: random ones with peaky attention, and one whose heads are written by hand."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from headscope.heads import ModelShape
from headscope.inputs import InputNorm, Rotation
from headscope.models.hf.model import HFModel
from headscope.models.protocol import HeadModel
from headscope.outputs import HeadWeights, Readout

D_VOCAB = 97
_SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_COMMON: dict[str, Any] = {
    "vocab_size": D_VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 160,
    "initializer_range": 0.4,
    **_SPECIAL,
}
_GROUPED = {**_COMMON, "num_key_value_heads": 2}
FAMILIES: dict[str, Callable[[], Any]] = {
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(
            vocab_size=D_VOCAB,
            n_embd=32,
            n_layer=3,
            n_head=4,
            n_positions=160,
            initializer_range=0.4,
            **_SPECIAL,
        )
    ),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_GROUPED)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**_GROUPED)),
    "gpt_neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**_COMMON)),
    "cohere": lambda: CohereForCausalLM(CohereConfig(**_GROUPED)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**_GROUPED, head_dim=8)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**_GROUPED, head_dim=8)),
}
_MADE: dict[str, HFModel] = {}


def random_model(family: str) -> HFModel:
    """A random model of one family, made once; biases and gains are random too."""
    if family not in _MADE:
        torch.manual_seed(0)
        module = FAMILIES[family]().eval()
        with torch.no_grad():
            for parameter in module.parameters():
                if parameter.ndim == 1:
                    parameter.add_(0.3 * torch.randn_like(parameter))
        model = HFModel.wrap(module)
        assert model is not None
        _MADE[family] = model
    return _MADE[family]


@pytest.fixture
def family_model() -> Callable[[str], HFModel]:
    return random_model


class HandWired(HeadModel):
    """Weights alone: two layers of two heads over one-hot tokens.

    Residual space: 6 token dimensions, 6 for "token before me", 6 spare. L0H0 copies the token of
    the position it attends to (the one before) into "token before me"; L1H0 looks with its token
    for a key whose "token before me" equals it, and copies that key's token to the logits: an
    induction pair by K-composition. L0H1 suppresses tokens; L1H1 does nothing.
    """

    name = "hand-wired"
    tokenizer = None
    path = "hf"
    revision = None
    device = torch.device("cpu")
    dtype = torch.float32

    limits: ClassVar[dict[str, str]] = {}
    shape = ModelShape(2, 2, 2, 18, 6, 6, None, (0, 1), (None, None))
    _token, _before, _nothing = (
        torch.eye(18, 6),
        torch.eye(18).roll(-6, 1)[:, :6],
        torch.zeros(18, 6),
    )
    _sides: ClassVar[dict[str, list[list[Tensor]]]] = {
        "Q": [[_nothing, _nothing], [_token, _nothing]],
        "K": [[_nothing, _nothing], [_before, _nothing]],
        "V": [[_token, _token], [_token, _nothing]],
        "O": [[_before, -_token], [_token, _nothing]],
    }
    readout = Readout(
        W_U=torch.eye(6, 18),
        b_U=None,
        gain=torch.ones(18),
        bias=torch.zeros(18),
        centred=False,
        epsilon=0.0,
    )
    parts = SimpleNamespace(
        embedding=torch.eye(6, 18),
        input_norm=lambda layer: InputNorm(
            torch.ones(18), torch.zeros(18), False, 0.0, divides=False
        ),
        rotation=lambda layer: Rotation((), (), torch.zeros(0)),
        first_mlp=lambda rows: torch.zeros_like(rows),
        layer_inputs=None,
    )

    def output_weights(self, layer: int) -> Tensor:
        return torch.stack(self._sides["O"][layer]).mT.contiguous()

    def weights(self, layer: int) -> HeadWeights:
        sides = {f"W_{name}": torch.stack(self._sides[name][layer]) for name in "QKV"}
        biases = {f"b_{name}": torch.zeros(2, 6) for name in "QKV"}
        return HeadWeights(**sides, W_O=self.output_weights(layer), **biases, b_O=torch.zeros(18))

    def digest(self) -> str:
        return "0" * 64


@pytest.fixture
def hand_wired() -> HandWired:
    return HandWired()
