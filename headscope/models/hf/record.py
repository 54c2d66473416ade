"""What one clean pass leaves behind, so that parts of it can be run again with changes."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from headscope.heads import ModelShape
from headscope.models.hf.hooks import Call, after, before, hooked
from headscope.models.hf.interface import mask_facts, with_facts
from headscope.models.hf.spans import replaced as put_in_place
from headscope.models.running import MEASURING, held, pass_over, use_of
from headscope.models.taps import Reads, TapView, Texts, at_final, at_layers

if TYPE_CHECKING:
    from headscope.models.hf.model import HFModel


@dataclass
class Recording:
    """One clean pass over a batch.

    Attributes:
        blocks: how each block was called.
        z: head outputs before the output projection, by layer.
        key, value: as attention used them, by layer.
        returns: by layer, how many values the attention module returns; None: one bare tensor.
        final: what enters the final norm.
    """

    batch: int
    length: int
    real: Bool[Tensor, "batch pos"] | None = None
    blocks: list[Call] = field(default_factory=list)
    z: dict[int, Float[Tensor, "batch pos head d_head"]] = field(default_factory=dict)
    key: dict[int, Float[Tensor, "batch kv_head pos d_head"]] = field(default_factory=dict)
    value: dict[int, Float[Tensor, "batch kv_head pos d_head"]] = field(default_factory=dict)
    returns: dict[int, int | None] = field(default_factory=dict)
    final: Tensor = field(default_factory=lambda: torch.empty(0))

    def is_padding_mask(self, value: Tensor) -> bool:
        """Whether a tensor says which keys are padding, and not something of each position."""
        if self.real is None or value.shape != self.real.shape or value.is_floating_point():
            return False
        return torch.equal(value.bool(), self.real.to(value.device))

    def reads(self, shape: ModelShape) -> Reads:
        """What is kept of the pass."""

        def kept_in(found: dict[int, Tensor]) -> Callable[[TapView], None]:
            return lambda view: found.update({view.layer: view.value})

        sites = {"z": self.z, "key": self.key, "value": self.value}
        kept = [at_layers(shape, kept_in(found), site) for site, found in sites.items()]
        return kept[0] | kept[1] | kept[2] | at_final(self._end)

    def _end(self, residual: Float[Tensor, "batch pos d_model"]) -> None:
        self.final = residual


@torch.no_grad()
def record(
    model: "HFModel", tokens: Int[Tensor, "batch pos"], real: Bool[Tensor, "batch pos"] | None
) -> Recording:
    """Run a batch once, cleanly, and keep what a replay needs."""
    model.learn_padding(real)
    recording = Recording(len(tokens), tokens.shape[1], real)
    with ExitStack() as hooks:
        hooks.enter_context(pass_over(model.module))
        hooks.enter_context(quick_activations(model))
        at_block = _at_block(model.module, recording)
        hooks.enter_context(hooked(before(block, at_block) for block in model.layout.blocks))
        attentions = model.layout.layers.items()
        hooks.enter_context(
            hooked(
                after(one.attention, _at_attention(recording, layer)) for layer, one in attentions
            )
        )
        nothing = torch.empty(0, dtype=torch.long)
        model.run(Texts(tokens, real), reads=recording.reads(model.shape), logits_at=nothing)
    return recording


def _at_block(model: nn.Module, recording: Recording) -> Callable[[nn.Module, Call], None]:
    use = use_of(model)

    def hook(_module: nn.Module, call: Call) -> None:
        if use.running() is not MEASURING:  # how the family counts padding, before the pass
            recording.blocks.append(call)

    return hook


def _at_attention(recording: Recording, layer: int) -> Callable[..., None]:
    def hook(_module: nn.Module, _call: Call, output: Any) -> None:
        recording.returns[layer] = len(output) if isinstance(output, tuple) else None

    return hook


def fitted(value: Any, recording: Recording, copies: int, first: int) -> Any:
    """A block's argument for a batch stacked ``copies`` times, from position ``first`` on.

    Tensors whose first axis is the batch are repeated; those whose next axis (or only axis) is
    the position are cut, but for the padding mask, which speaks of keys and stays whole.
    """
    if isinstance(value, tuple | list):
        return type(value)(fitted(one, recording, copies, first) for one in value)
    if isinstance(value, dict):
        return {key: fitted(one, recording, copies, first) for key, one in value.items()}
    if not isinstance(value, Tensor) or value.ndim == 0:
        return value
    if (facts := mask_facts(value)) is not None:  # it speaks of keys, and says so itself
        return with_facts(repeated(value, copies), facts)
    if value.ndim == 1:
        return value[first:] if len(value) == recording.length else value
    if value.shape[1] == recording.length and not recording.is_padding_mask(value):
        value = value[:, first:]
    return value if value.shape[0] != recording.batch else repeated(value, copies)


def repeated(value: Tensor, copies: int) -> Tensor:
    """The batch axis repeated, whole batches one after the other."""
    if copies == 1:
        return value
    spread = value.unsqueeze(0).expand(copies, *value.shape)
    return spread.reshape(-1, *value.shape[1:])


def replaced(module: nn.Module, forward: Callable[..., Any]) -> AbstractContextManager[None]:
    """Let another function stand in for a module's forward, within a scope."""
    return put_in_place(module, "forward", forward)


@contextmanager
def quick_activations(model: "HFModel") -> Iterator[None]:
    """Within a scope, run the tanh form of GELU in one fused kernel, equal to 2e-7.

    transformers writes it out in eight passes over memory, about 15% of a block on a CPU.
    """
    from transformers.activations import FastGELUActivation, NewGELUActivation

    fused = torch.nn.GELU(approximate="tanh")
    with held(model.module), ExitStack() as stack:
        for module in set(model.layout.blocks.modules()):
            if type(module) in (NewGELUActivation, FastGELUActivation):
                stack.enter_context(replaced(module, fused.forward))
        yield
