"""What blocks add is recorded where the model computes it, and heads are exact parts of it."""

from functools import cache

import pytest
import torch
from torch import Tensor, nn

from headscope.errors import UnsupportedModelError
from headscope.models.bridge.model import bridge_over, wrap_bridge
from headscope.models.hf.hooks import after, hooked
from headscope.models.hf.measured import Watch, find_writers
from headscope.models.loading import load
from headscope.models.protocol import HeadModel
from headscope.models.taps import BlockStates, TapView
from tests.models import families
from tests.models.checks import difference, same_state, state
from tests.watching import watch

NOTHING = torch.empty(0, dtype=torch.long)


class Blocks:
    """Keeps every block and every layer's head outputs."""

    wants_final = True

    def __init__(self) -> None:
        self.states: dict[int, BlockStates] = {}
        self.z: dict[int, Tensor] = {}
        self.final = torch.empty(0)

    def on_layer(self, view: TapView) -> None:
        self.z[view.layer] = view.z.float()

    def on_block(self, states: BlockStates) -> None:
        assert states.layer in self.z  # the attention layer is shown before its block
        self.states[states.layer] = states

    def on_final(self, residual: Tensor) -> None:
        self.final = residual


@torch.no_grad()
def watched(model: HeadModel, kind: str = "none") -> Blocks:
    seen = Blocks()
    watch(model, families.tokens(), seen, real=families.padding(kind), logits_at=NOTHING)
    return seen


@cache
def bridged(family: str) -> HeadModel:
    return wrap_bridge(bridge_over(families.build(family)))


@pytest.mark.parametrize("family", [*families.HF_FAMILIES, *families.BRIDGE_FAMILIES])
def test_blocks_add_what_their_parts_write(family: str) -> None:
    model = load(families.build(family))
    before = state(model.module)
    seen = watched(model)
    assert same_state(before, state(model.module))
    assert list(seen.states) == list(range(model.shape.n_layers))
    entering = model.parts.layer_inputs(families.tokens(), [0])[0]
    for layer, one in seen.states.items():
        assert torch.equal(one.entering, entering)
        assert one.attention is not None
        assert one.head_sum is not None
        assert difference(one.entering + one.attention + one.mlp, one.leaving) < 1e-5
        writes = torch.einsum("bphe,hed->bphd", seen.z[layer], model.output_weights(layer).float())
        write = model.parts.attention_write(layer)
        scale = write.scale(one.head_sum)
        heads = write.vectors(writes, scale[..., None].expand(writes.shape[:-1])).sum(2)
        unit = torch.eye(model.shape.d_model)
        constant = torch.stack(
            [write.constant(row.expand_as(one.entering), scale) for row in unit], -1
        )
        assert difference(heads + constant, one.attention) < 1e-5
        entering = one.leaving
    assert torch.equal(seen.final.float(), entering)


PATHS = ("gpt2", "gpt_neox", "llama", "gemma2", "granite", "phi3", "cohere2", "gpt_oss")


@pytest.mark.parametrize("family", PATHS)
def test_both_paths_agree(family: str) -> None:
    fast, slow = watched(load(families.build(family)), "both"), watched(bridged(family), "both")
    real = families.padding("both")
    for layer, one in fast.states.items():
        other = slow.states[layer]
        for name in ("entering", "leaving", "attention", "mlp", "head_sum"):
            assert difference(getattr(other, name), getattr(one, name), real) < 1e-5, name


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "olmo2"])
def test_a_norm_after_attention_is_found(family: str) -> None:
    assert load(families.build(family)).parts.attention_write(0).norm is not None


def test_in_half_precision_the_same_modules_write() -> None:
    for family in ("llama", "gemma2", "granite"):
        model = load(families.fresh(family).bfloat16())
        seen = watched(model)
        for one in seen.states.values():
            assert one.attention is not None
            assert difference(one.entering + one.attention + one.mlp, one.leaving) < 2e-2


def test_a_block_that_is_no_sum_is_refused() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.projection, self.mlp = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            mixed: Tensor = x * torch.sigmoid(self.projection(x)) + self.mlp(x).square()
            return mixed

    block, seen = Gated(), Watch(copies=True)
    with hooked(after(module, seen.note) for module in block.modules()):
        block(torch.randn(2, 5, 8))
    assert len(seen.outputs) == 3
    with pytest.raises(UnsupportedModelError, match="cannot be split"):
        find_writers(seen, {0: (block, block.projection)})


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt"])
def test_blocks_of_the_first_padded_pass_are_shown_once(family: str) -> None:
    """How a family counts padding is measured by passes of its own, which nobody may see."""
    model = load(families.fresh(family))
    first = watched(model, "left")
    again = watched(model, "left")
    for layer, states in first.states.items():
        assert torch.equal(states.leaving, again.states[layer].leaving)
