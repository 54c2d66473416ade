"""A transformer-lens ``TransformerBridge`` seen head by head."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from headscope.base.result import Glance, Shown
from headscope.errors import UnsupportedModelError
from headscope.models.bridge.build import OWN_NAMES
from headscope.models.bridge.layout import BridgeLayout, find_bridge_layout
from headscope.models.bridge.parts import BridgeParts, bridge_weights
from headscope.models.bridge.passes import PassTaps, Scope
from headscope.models.hf.measured import logit_scale, measure_unembedding
from headscope.models.hf.taps import Pass, Tapped
from headscope.models.loading.proof import Proof
from headscope.models.parameters import Digest
from headscope.models.protocol import Edit, glance_of, unmeasured_write
from headscope.models.rotary import no_rotation
from headscope.models.running import accepted, need_gradients, padding
from headscope.models.taps import writes_of
from headscope.views import HeadWeights, Unembedding


class BridgeModel(Tapped, Shown):
    """A ``TransformerBridge`` whose attention patterns are computed whole, layer by layer.

    The bridge is used as it is: hooks of its owner stay, and act, during every pass.
    """

    path: Literal["hf", "bridge"] = "bridge"

    def __init__(
        self,
        bridge: Any,
        layout: BridgeLayout,
        *,
        tokenizer: Any | None = None,
        name: str | None = None,
        revision: str | None = None,
    ) -> None:
        """Keep the parts; use :func:`wrap_bridge` to find them."""
        self.bridge = bridge
        self.layout = layout
        self.tokenizer = tokenizer
        self.name = name or _name(bridge)
        self.revision = revision
        self.shape = layout.shape
        self.proof = Proof()
        self._digest = Digest()

    @property
    def module(self) -> Any:
        """The model under the bridge, with the bridge's components in it."""
        return self.bridge.original_model

    def glance(self) -> Glance:
        """Size, path and limits."""
        return glance_of(self)

    @property
    def device(self) -> torch.device:
        """Where token ids go."""
        device: torch.device = next(self.module.parameters()).device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights."""
        dtype: torch.dtype = next(self.module.parameters()).dtype
        return dtype

    @property
    def limits(self) -> Mapping[str, str]:
        """What this family cannot be asked, and why."""
        layers = self.layout.layers.values()
        limits = {
            "query_keys": f"transformer-lens does not show the queries and keys of {self.name} as "
            "attention uses them."
        }
        if (config := getattr(self.module, "config", None)) is not None:
            limits |= no_rotation(self.name, config)
        if any(parts.write_scale is None for parts in layers):
            limits["linear_write"] = (
                f"{self.name} applies a norm after attention, so a head's write into the residual "
                "stream is not z @ W_O."
            )
            limits |= unmeasured_write(self)
        if self.layout.final is None:
            limits["unembedding"] = f"{self.name} has no plain norm before its unembedding."
        if any(not parts.pattern_is_live and parts.kernel is None for parts in layers):
            limits["pattern_edit"] = (
                f"transformer-lens shows the attention patterns of {self.name} only after they "
                "were used, so that they cannot be edited."
            )
        if any(parts.value is None for parts in layers):
            limits["values"] = f"transformer-lens does not show the values of {self.name}."
        return limits | self.proof.limits

    @property
    def unembedding(self) -> Unembedding:
        """Final norm and unembedding, measured anew: weights may have been trained since."""
        if self.layout.final is None:
            raise UnsupportedModelError(self.limits["unembedding"])
        cap = getattr(self.bridge.cfg, "output_logits_soft_cap", None)
        config = getattr(self.module, "config", None)
        return measure_unembedding(
            self.bridge.unembed.original_component,
            self.bridge.ln_final.original_component,
            self.shape.d_model,
            logit_scale=1.0 if config is None else logit_scale(config),
            soft_cap=float(cap) if cap is not None and cap > 0 else None,
        )

    def output_weights(self, layer: int) -> Float[Tensor, "head d_head d_model"]:
        """``W_O`` as it reaches the residual stream, the family's multiplier included."""
        scale = self.layout.layers[layer].write_scale
        weight: Tensor = self.bridge.blocks[layer].attn.W_O.detach()
        return weight if scale is None else weight * scale

    def weights(self, layer: int) -> HeadWeights:
        """All attention weights of one layer; key/value heads not repeated."""
        return bridge_weights(self.bridge, layer)

    @cached_property
    def parts(self) -> BridgeParts:
        """What weight-level readings need besides the weights."""
        return BridgeParts(self)

    def digest(self) -> str:
        """SHA-256 that stands for all bytes of all weights as they are now.

        The same as of the transformers model that a bridge of headscope's own was built over.
        """
        weights = self.module.state_dict()
        own = getattr(self.module, OWN_NAMES, None)
        if own is not None:
            weights = {name.replace("._original_component", ""): w for name, w in weights.items()}
            weights = {name: weights[name] for name in own}
        return self._digest.of(weights)

    def attention_taps(self, run: Pass) -> AbstractContextManager[None]:
        """Scope in which attention runs with the taps of a pass.

        Queries are those after rotation where the family shows them so, else before; a query of
        zeros is uniform attention only without position biases (not in bloom).
        """
        return PassTaps(self.module, self.layout, run).attached()

    def compute(
        self,
        tokens: Int[Tensor, "batch pos"],
        real: Bool[Tensor, "batch pos"] | None,
        logits_at: Int[Tensor, " at"] | None,
        run: Pass,
    ) -> Float[Tensor, "batch at d_vocab"]:
        """Logits of a pass, in evaluation mode and in the model's own types."""
        padded = real is not None and not bool(real.all())
        mask = real.to(self.device) if real is not None and padded else None
        inputs = self._inputs(mask)
        if logits_at is not None and "logits_to_keep" in self._arguments:
            inputs["logits_to_keep"] = logits_at.to(self.device)
            logits_at = None
        run.real = mask
        if run.grad:
            need_gradients(self.module, self.name)
        with run.attached(), torch.set_grad_enabled(run.grad):
            logits: Tensor = self.bridge(tokens.to(self.device), return_type="logits", **inputs)
        return logits if logits_at is None else logits[:, logits_at.to(logits.device)]

    @property
    def final_entry(self) -> nn.Module | None:
        """Module whose input is the last residual stream; None where it cannot be told."""
        return self.layout.final

    def edited(self, edits: Sequence[Edit]) -> AbstractContextManager[None]:
        """Scope in which every pass of the bridge is edited, generation too; restored after."""
        _, writes = self.taps({}, writes_of(edits))
        return Scope(self.module, self.layout, writes).open()

    def _inputs(self, mask: Tensor | None) -> dict[str, Any]:
        inputs: dict[str, Any] = {"use_cache": False} if "use_cache" in self._arguments else {}
        if mask is not None:
            inputs |= padding(mask, self._arguments, turns_at=self.shape.turns_at)
        return inputs

    @cached_property
    def _arguments(self) -> frozenset[str]:
        return accepted(self.module)


def wrap_bridge(
    bridge: Any,
    *,
    name: str | None = None,
    tokenizer: Any | None = None,
    revision: str | None = None,
) -> BridgeModel:
    """See a ``TransformerBridge`` head by head.

    Args:
        bridge: the user's own, or one from :func:`headscope.models.bridge.build.bridge_over`.
        name: what to call it; default: what the bridge calls it.
        tokenizer: default: the bridge's own.
        revision: which version of the weights it holds.

    Raises:
        UnsupportedModelError: if its heads cannot be seen.
    """
    name = name or _name(bridge)
    try:
        layout = find_bridge_layout(bridge)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{name} is not supported: {error}") from error
    own = getattr(bridge, "tokenizer", None)
    chosen = own if tokenizer is None else tokenizer
    return BridgeModel(bridge, layout, tokenizer=chosen, name=name, revision=revision)


def _name(bridge: Any) -> str:
    return str(getattr(bridge.cfg, "model_name", None) or type(bridge.original_model).__name__)
