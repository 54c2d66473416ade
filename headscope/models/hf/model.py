"""A transformers model seen head by head, on fused attention."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from headscope.base.glance import Glance, Shown
from headscope.base.stacks import MaskRule
from headscope.errors import UnsupportedModelError
from headscope.models.hf.interface import register
from headscope.models.hf.layout import Layout, find_layout, tiny_tokens
from headscope.models.hf.measured import find_unembedding
from headscope.models.hf.parts import HFParts
from headscope.models.hf.passes import AttentionTaps, Scope
from headscope.models.hf.removed import kept_in
from headscope.models.hf.taps import Pass, Tapped
from headscope.models.hf.weights import matrix
from headscope.models.loading.proof import Proof
from headscope.models.parameters import Digest, all_weights, runs_on
from headscope.models.protocol import Edit, glance_of, unmeasured_write
from headscope.models.rotary import no_rotation
from headscope.models.running import (
    accepted,
    answer,
    first_position,
    need_gradients,
    padding,
    pass_over,
)
from headscope.models.taps import Tap, writes_of
from headscope.views.outputs import HeadWeights, Unembedding


class HFModel(Tapped, Shown):
    """A ``PreTrainedModel`` whose attention goes through transformers' attention registry.

    The module is used as it is: nothing of it is changed between passes.

    Raises:
        UnsupportedModelError: from :meth:`wrap`, where the family cannot be taken apart.
    """

    path: Literal["hf", "bridge"] = "hf"

    def __init__(
        self,
        module: Any,
        layout: Layout,
        *,
        tokenizer: Any | None = None,
        name: str | None = None,
        revision: str | None = None,
    ) -> None:
        """Keep the parts; use :meth:`wrap` to find them."""
        self.module = module
        self.layout = layout
        self.tokenizer = tokenizer
        self.name = name or module.config.name_or_path or type(module).__name__
        self.revision = revision
        self.shape = layout.shape
        self.proof = Proof()
        self._digest = Digest()
        self._bridge: tuple[tuple[tuple[str, int], ...], Any] | None = None

    @classmethod
    def wrap(cls, module: Any, **facts: Any) -> "HFModel | None":
        """Take a model apart; None if its attention does not go through the registry."""
        register()
        layout = find_layout(module)
        return None if layout is None else cls(module, layout, **facts)

    def glance(self) -> Glance:
        """Size, path and limits."""
        return glance_of(self)

    @property
    def has_logits(self) -> bool:
        """Whether it gives a logit of every token at every position."""
        return self.layout.has_logits

    @property
    def speaker(self) -> Any:
        """Part whose outputs are read: the module, or its body where that gives no logits."""
        return self.module if self.layout.has_logits else self.module.base_model

    @property
    def mask(self) -> MaskRule:
        """Rule of the model's attention, windows of single layers apart."""
        return self.layout.mask

    @property
    def device(self) -> torch.device:
        """Where token ids go."""
        embedding = self.module.get_input_embeddings()
        return runs_on(embedding, embedding.weight)

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights."""
        dtype: torch.dtype = self.module.dtype
        return dtype

    @property
    def limits(self) -> Mapping[str, str]:
        """What this family cannot be asked, and why."""
        family = f"{self.name} ({self.module.config.model_type})"
        limits = no_rotation(self.name, self.module.config)
        if not self.mask.causal:
            limits["causal"] = (
                f"{family} reads texts in both directions, so it continues no text token by token."
            )
        if any(parts.write_scale is None for parts in self.layout.layers.values()):
            limits["linear_write"] = (
                f"{family} applies a norm after attention, or mixes its residual stream otherwise, "
                "so a head's write into the residual stream is not z @ W_O."
            )
            limits |= unmeasured_write(self)
        if not self.layout.has_logits:
            limits["logits"] = f"{family} has no language-model head, so it gives no logits."
            limits["unembedding"] = limits["logits"]
        elif self.layout.final_norm is None:
            limits["unembedding"] = f"{family} has no plain norm before its unembedding."
        elif self.layout.logit_map is None:
            limits["unembedding"] = (
                f"{family} makes its logits of the unembedding's outputs by more than a "
                "multiplier and a soft cap."
            )
        return limits | self.proof.limits

    @property
    def unembedding(self) -> Unembedding:
        """Final norm and unembedding, measured anew: weights may have been trained since."""
        if self.layout.final_norm is None or self.layout.logit_map is None:
            raise UnsupportedModelError(self.limits["unembedding"])
        return find_unembedding(
            self.module, self.layout.final_norm, self.shape.d_model, self.layout.logit_map
        )

    def output_weights(self, layer: int) -> Float[Tensor, "head d_head d_model"]:
        """``W_O`` as it reaches the residual stream, the family's multiplier included."""
        parts = self.layout.layers[layer]
        weight = matrix(parts.projection, self.shape.n_heads * self.shape.d_head)
        by_head = weight.reshape(-1, self.shape.d_head, weight.shape[-1])
        kept = kept_in(parts.projection)
        whole = by_head if kept is None else kept.spread(by_head, 0)
        return whole * (1.0 if parts.write_scale is None else parts.write_scale)

    @property
    def bridge(self) -> Any:
        """A transformer-lens ``TransformerBridge`` over the same parameter storage.

        Built when it is first asked for, and again where the model was given other parameters.
        """
        from headscope.models.bridge.build import bridge_over

        if self.shape.removed:
            raise UnsupportedModelError(
                f"{self.name} was pruned, and transformer-lens knows no model with different "
                "numbers of heads: bridge the model that it came from."
            )
        places = tuple((n, w.data_ptr()) for n, w in self.module.named_parameters())
        if self._bridge is None or self._bridge[0] != places:
            self._bridge = places, bridge_over(self.module)
        return self._bridge[1]

    def weights(self, layer: int) -> HeadWeights:
        """All attention weights of one layer; key/value heads not repeated.

        ``q = x W_Q + b_Q`` with ``x`` the block's normalised input: before rotation, and before
        the query and key norms of families that have them (qwen3, gemma3, olmo2). ``z W_O + b_O``
        is the output projection as it stands: before a norm after attention (gemma2, olmo2) and
        before a residual multiplier (granite). Read from the model's own matrices, and proved on
        its activations when a layer is first asked for.

        Raises:
            UnsupportedModelError: if the layer has none that its activations confirm.
        """
        return self.parts.weights(layer)

    @cached_property
    def parts(self) -> HFParts:
        """What weight-level readings need besides the weights."""
        return HFParts(self)

    def digest(self) -> str:
        """SHA-256 that stands for all bytes of all weights as they are now."""
        return self._digest.of(all_weights(self.module))

    def attention_taps(self, run: Pass) -> AbstractContextManager[None]:
        """Scope in which attention runs with the taps of a pass."""
        return AttentionTaps(run, self.layout).attached()

    def compute(
        self,
        tokens: Int[Tensor, "batch pos"],
        real: Bool[Tensor, "batch pos"] | None,
        logits_at: Int[Tensor, " at"] | None,
        run: Pass,
    ) -> Float[Tensor, "batch at d_vocab"]:
        """Logits of a pass, in evaluation mode and in the model's own types."""
        self.learn_padding(real)
        if run.grad:
            need_gradients(self.module, self.name)
        with run.attached(), torch.set_grad_enabled(run.grad):
            inputs = self._inputs(tokens, real)
            if run.stops and not (run.is_read(Tap("final_resid")) and self._norm_is_outside):
                self.module.base_model(**inputs)
                return torch.empty(len(tokens), 0, self.shape.n_logits)
            return self._logits(inputs, logits_at)

    @cached_property
    def _norm_is_outside(self) -> bool:
        """Whether the final norm belongs to the head of the model and not to its body."""
        return all(part is not self.layout.final_norm for part in self.module.base_model.modules())

    @property
    def final_uses(self) -> int:
        """How often a pass uses the final norm; the last time before the unembedding."""
        return self.layout.final_norm_uses

    @property
    def final_entry(self) -> nn.Module | None:
        """Module whose input is the last residual stream; None where it cannot be told."""
        return self.layout.final_norm

    def edited(self, edits: Sequence[Edit]) -> AbstractContextManager[None]:
        """Scope in which every pass of ``module`` is edited, generation too; restored after."""
        _, writes = self.taps({}, writes_of(edits))
        return Scope(self.module, self.layout, writes).open()

    def learn_padding(self, real: Bool[Tensor, "batch pos"] | None) -> None:
        """Measure how the family counts positions under padding, before a pass that needs it.

        Whoever hooks the model for a pass calls this first: it runs tiny passes of its own.

        Raises:
            UnsupportedModelError: if the family reads padded texts in another way.
        """
        if real is not None and not bool(real.all()):
            with pass_over(self.module):
                _ = self._first_position
                if not bool(real[:, 0].all()):
                    self._need_left_padding()
                if not bool(real[:, -1].all()):
                    self._need_right_padding()

    def _inputs(self, tokens: Tensor, real: Tensor | None) -> dict[str, Any]:
        tokens = tokens.to(self.device)
        if tokens.is_inference():  # made in inference mode, it could serve no gradient
            tokens = tokens.clone()
        inputs: dict[str, Any] = {"input_ids": tokens, "use_cache": False}
        # All real, it changes nothing, but keeps families from warning of padding.
        inputs["attention_mask"] = torch.ones_like(tokens)
        if real is not None and not bool(real.all()):
            inputs |= padding(
                real.to(self.device), self._arguments, self._first_position, self.shape.turns_at
            )
        return inputs

    @cached_property
    def _arguments(self) -> frozenset[str]:
        return accepted(self.speaker)

    @cached_property
    def _first_position(self) -> int:
        if "position_ids" not in self._arguments:
            return 0
        return first_position(self.speaker, tiny_tokens(self.module))

    def _need_left_padding(self) -> None:
        """Refuse texts with padding before them where the family reads them otherwise.

        Raises:
            UnsupportedModelError: if positions cannot be told apart from places (bart's decoder).
        """
        if self._shifts_on_the_left:
            raise UnsupportedModelError(
                f"{self.name} ({self.module.config.model_type}) reads a text otherwise when "
                "padding stands before it, as it counts places and not tokens: pad on the right."
            )

    def _need_right_padding(self) -> None:
        """Refuse texts with padding behind them where the family mixes tokens with what follows.

        Raises:
            UnsupportedModelError: if padding is read as text (mobilebert's trigrams).
        """
        if self._mixes_with_the_right:
            raise UnsupportedModelError(
                f"{self.name} ({self.module.config.model_type}) reads a text otherwise when "
                "padding stands behind it: give texts of one length."
            )

    @cached_property
    def _shifts_on_the_left(self) -> bool:
        return self._changes(before=3, behind=0)

    @cached_property
    def _mixes_with_the_right(self) -> bool:
        """Whether what stands behind a text changes it though it is padding."""
        return not self.mask.causal and self._changes(before=0, behind=3)

    @torch.no_grad()
    def _changes(self, before: int, behind: int) -> bool:
        """Whether so much padding before or behind a text changes what the model says of it."""
        tokens = tiny_tokens(self.module)[:1]
        wide = torch.cat([tokens[:, :before], tokens, tokens[:, :behind]], 1)
        real = torch.ones_like(wide, dtype=torch.bool)
        real[:, :before] = False
        real[:, before + tokens.shape[1] :] = False
        alone = answer(self.speaker(input_ids=tokens, use_cache=False)).float()
        given = padding(real, self._arguments, self._first_position)
        padded = answer(self.speaker(input_ids=wide, use_cache=False, **given)).float()
        padded = padded[:, before : before + tokens.shape[1]]
        allowed = 1e-3 if self.dtype in (torch.float32, torch.float64) else 0.1
        return not bool((padded - alone).abs().max() <= allowed * alone.abs().max())

    def _logits(self, inputs: dict[str, Any], logits_at: Tensor | None) -> Tensor:
        if logits_at is None:
            return answer(self.speaker(**inputs))
        if "logits_to_keep" in self._arguments:
            kept = logits_at.to(self.device)
            return answer(self.speaker(**inputs, logits_to_keep=kept))
        logits = answer(self.speaker(**inputs))
        return logits[:, logits_at.to(logits.device)]
