"""Small models: random ones with peaky attention, and one whose heads are written by hand."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from headscope.heads import ModelShape
from headscope.models.protocol import HeadModel
from headscope.views import HeadWeights, Norm, QueryKey, Rotation, Unembedding

_MADE: dict[str, HeadModel] = {}


def random_model(family: str) -> HeadModel:
    """A random model of one family, made once; biases and gains are random too."""
    if family not in _MADE:
        # Here, as they take seconds to import and the fast tests beside do without.
        from headscope.models.hf.model import HFModel
        from tests.circuits.families import FAMILIES

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
def family_model() -> Callable[[str], HeadModel]:
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
    unembedding = Unembedding(
        W_U=torch.eye(6, 18),
        b_U=None,
        gain=torch.ones(18),
        bias=torch.zeros(18),
        centred=False,
        epsilon=0.0,
    )
    parts = SimpleNamespace(
        embedding=torch.eye(6, 18),
        input_norm=lambda layer: Norm(torch.ones(18), torch.zeros(18), False, 0.0, divides=False),
        rotation=lambda layer: Rotation((), (), torch.zeros(0)),
        query_key=lambda layer: QueryKey(Rotation((), (), torch.zeros(0))),
        need_values=lambda layer: None,
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
