"""``HFModel``: a transformers model on fused attention as a ``HeadModel``."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from headscope.base.batches import PIXELS, SEGMENTS, TOKENS, TURNS, Batch
from headscope.base.result import Glance, Shown
from headscope.base.specs import portable
from headscope.base.stacks import ImageKeys, MaskRule, PatchGrid
from headscope.errors import HeadscopeError, InputError, UnsupportedModelError
from headscope.models.hf.hooks import Call, after, before, entering, hooked
from headscope.models.hf.images import image_boxes, need_own_images
from headscope.models.hf.interface import register
from headscope.models.hf.layout import (
    Layout,
    arguments,
    body_of,
    device_of,
    find_layout,
    image_arguments,
    tiny_batch,
    tiny_tokens,
    unrolled,
)
from headscope.models.hf.measured import (
    LogitMap,
    Watch,
    find_unembedding,
    is_pointwise,
    measure_norm,
)
from headscope.models.hf.parts import HFParts
from headscope.models.hf.passes import AttentionTaps, EditScope
from headscope.models.hf.removed import heads_left
from headscope.models.hf.taps import Pass, Tapped
from headscope.models.hf.weights import projection_matrix
from headscope.models.proof import Proof
from headscope.models.protocol import Edit, glance_of, unmeasured_write
from headscope.models.rotary import no_rotation
from headscope.models.running import (
    Digest,
    accepted,
    all_weights,
    answer,
    first_number,
    need_gradients,
    padding,
    pass_over,
)
from headscope.models.taps import Tap, Texts, writes_of
from headscope.views import HeadWeights, Unembedding


def own_vector(output: Any) -> Tensor | None:
    """Embedding that a model itself returns for a whole example; None if it returns none."""
    for name in ("image_embeds", "text_embeds", "pooler_output"):
        found = getattr(output, name, None)
        if isinstance(found, Tensor) and found.ndim == 2:
            return found
    return None


def pooled(
    output: Any, real: Bool[Tensor, "batch pos"] | Int[Tensor, "batch pos"] | None, pooling: str
) -> Float[Tensor, "batch width"]:
    """One pooled vector per example.

    Args:
        output: output of a model without a head.
        real: 0 at padding; None if there is none.
        pooling: ``own``, ``first`` or ``mean``.
    """
    if pooling == "own":
        found = own_vector(output)
        assert found is not None  # noqa: S101  # looked for before
        return found
    states: Tensor = output.last_hidden_state
    shown = torch.ones(states.shape[:2], device=states.device) if real is None else real
    if pooling == "first":
        at = shown.int().argmax(1)
        return states[torch.arange(len(states), device=states.device), at]
    weight = shown.to(states)[..., None]
    return (states * weight).sum(1) / weight.sum(1)


@dataclass(frozen=True, eq=False)
class TextEmbeddings:
    """Embeddings of texts that those of images are compared with: ``scale * cosine + bias``."""

    names: tuple[str, ...]
    texts: Float[Tensor, "text width"]
    scale: float
    bias: float

    def __call__(self, found: Float[Tensor, "batch width"]) -> Float[Tensor, "batch text"]:
        """Logit of every text."""
        normal = nn.functional.normalize
        texts = normal(self.texts.to(found), dim=-1)
        return self.scale * normal(found, dim=-1) @ texts.T + self.bias


def _of_images(family: str) -> dict[str, str]:
    """Analyses that do not apply to models of images."""
    return {
        "causal": f"{family} reads images, so it continues no text token by token.",
        "text": f"{family} reads images, whose positions are patches and not tokens of a text.",
        "embedding": f"{family} reads images, so it has no embedding of tokens.",
        "rotary": f"{family} reads images, whose positions are places in two dimensions.",
    }


class HFModel(Tapped, Shown, checks=False):
    """A ``PreTrainedModel`` whose attention goes through transformers' attention registry.

    The module is used as it is: nothing of it is changed between passes. Of a model that runs
    the same layers again and again (albert), ``module`` is a copy with a layer for every run, which
    shares the parameters.

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
        image_processor: Mapping[str, Any] | None = None,
    ) -> None:
        """Keep the parts; use :meth:`wrap` to find them."""
        self.image_processor = image_processor
        # Which vector of a whole example stands for logits, and the part that gives it.
        self.pooling: str | None = None
        self.body: Any = None
        # What embeddings are compared with to make logits; None: nothing.
        self.against: TextEmbeddings | None = None
        self._embedded: dict[str | None, HFModel] = {}
        self.module = module
        self.layout = layout
        self.tokenizer = tokenizer
        self.name: str = portable(name or module.config.name_or_path or type(module).__name__)
        self.revision = revision
        self.shape = layout.shape
        self.proof = Proof()
        self._digest = Digest()
        self._bridge: tuple[tuple[tuple[str, int], ...], Any] | None = None

    @classmethod
    def wrap(cls, module: Any, *, own_code: bool = False, **facts: Any) -> "HFModel | None":
        """Wrap a model; None if its attention cannot be routed.

        Args:
            module: a transformers model.
            own_code: its attention does not go through the registry; look into its own code.
            facts: see :meth:`__init__`.
        """
        register()
        module = unrolled(module)
        layout = find_layout(module, own_code)
        return None if layout is None else cls(module, layout, **facts)

    def glance(self) -> Glance:
        """Size, path and limits."""
        return glance_of(self)

    def blocks_before(self, layer: int) -> tuple[nn.Module, ...]:
        """Modules of the layers before a layer.

        Args:
            layer: layer that they precede.
        """
        return tuple(self.layout.blocks[:layer])

    @property
    def has_logits(self) -> bool:
        """Whether the model returns a logit for every token at every position."""
        return self.layout.has_logits

    @property
    def speaker(self) -> Any:
        """Part whose outputs are read: the module, or its body if that returns no logits."""
        if self.body is not None:
            return self.body
        return self.module if self.layout.has_logits else body_of(self.module)

    @property
    def grid(self) -> PatchGrid | None:
        """Patch grid of its images; None if it reads texts."""
        return self.layout.grid

    @property
    def classes(self) -> dict[str, int]:
        """Number of every class of images that has a name."""
        if self.against is not None:
            return {name: number for number, name in enumerate(self.against.names)}
        named = getattr(self.module.config, "label2id", None) or {}
        known = self.grid is not None and self.layout.has_logits
        return {str(name): int(number) for name, number in named.items()} if known else {}

    @property
    def mask(self) -> MaskRule:
        """Visibility rule of the model's attention, apart from single layers' windows."""
        return self.layout.mask

    @property
    def device(self) -> torch.device:
        """Device of the token ids."""
        return device_of(self.module)

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights."""
        dtype: torch.dtype = self.module.dtype
        return dtype

    @property
    def limits(self) -> Mapping[str, str]:
        """Analyses that do not apply to this family, with reasons."""
        family = f"{self.name} ({self.module.config.model_type})"
        limits = no_rotation(self.name, self.module.config)
        if self.grid is not None:
            limits |= _of_images(family)
        elif not self.mask.causal:
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
            head = "language-model" if self.grid is None else "classification"
            limits["logits"] = (
                f"{family} has no {head} head, so it gives no logits (metrics of embeddings, such "
                "as hs.metrics.embedding_cosine, need none)."
            )
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
        """Final norm and unembedding, read each time, since weights may have changed."""
        if self.layout.final_norm is None or self.layout.logit_map is None:
            raise UnsupportedModelError(self.limits["unembedding"])
        return find_unembedding(
            self.layout.unembedding,
            self.layout.final_norm,
            self.shape.d_model,
            self.layout.logit_map,
        )

    def output_weights(self, layer: int) -> Float[Tensor, "head d_head d_model"]:
        """``W_O`` as it reaches the residual stream, multiplier and layer scale included."""
        parts = self.layout.layers[layer]
        weight = projection_matrix(parts.projection, self.shape.n_heads * self.shape.d_head)
        by_head = weight.reshape(-1, self.shape.d_head, weight.shape[-1])
        kept = heads_left(parts.projection)
        whole = by_head if kept is None else kept.spread(by_head, 0)
        channels = self.layout.channel_scale(layer)
        whole = whole if channels is None else whole * channels.to(whole.device)
        return whole * (1.0 if parts.write_scale is None else parts.write_scale)

    @property
    def bridge(self) -> Any:
        """A transformer-lens ``TransformerBridge`` over the same parameter storage.

        Built when it is first asked for, and again where the model was given other parameters.
        """
        from headscope.models.bridge.model import bridge_over

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
        """SHA-256 of the current weights."""
        return self._digest.of(all_weights(self.module))

    def attention_taps(self, run: Pass) -> AbstractContextManager[None]:
        """Context manager in which attention runs with the taps of a pass."""
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
        head = self._head_of_rows(run, logits_at)
        seen = self._says_misfits() if self.grid is None and PIXELS in run.inputs else nullcontext()
        with seen, run.attached(), torch.set_grad_enabled(run.grad):
            inputs = self._inputs(tokens, real, run.inputs)
            if run.stops and not (run.is_read(Tap("final_resid")) and self._norm_is_outside):
                body_of(self.module)(**inputs)
                return torch.empty(len(tokens), 0, self.shape.n_logits)
            return self._logits(inputs, logits_at, head)

    @contextmanager
    def _says_misfits(self) -> Iterator[None]:
        """Say in one sentence where images do not fit into the tokens that stand for them."""
        try:
            yield
        except HeadscopeError:
            raise
        except ValueError as error:
            raise InputError(
                f"{self.name} cannot put these images into these texts: {error}"
            ) from error

    @cached_property
    def _norm_is_outside(self) -> bool:
        """Whether the final norm belongs to the head of the model and not to its body."""
        return all(part is not self.layout.final_norm for part in self.module.base_model.modules())

    @property
    def final_uses(self) -> int:
        """How often a pass uses the final norm; the last use is before the unembedding."""
        return self.layout.final_norm_uses

    @property
    def final_entry(self) -> nn.Module | None:
        """Module whose input is the last residual stream; None if it cannot be told."""
        return self.layout.final_norm

    def edited(self, edits: Sequence[Edit]) -> AbstractContextManager[None]:
        """Context manager in which every pass of ``module`` is edited, including generation."""
        _, writes = self.taps({}, writes_of(edits))
        return EditScope(self.module, self.layout, writes).open()

    def learn_padding(self, real: Bool[Tensor, "batch pos"] | None) -> None:
        """Measure how the family counts positions under padding, when a pass needs it.

        Call this before hooking the model for a pass: it runs tiny passes itself.

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

    def _inputs(
        self, tokens: Tensor, real: Tensor | None, beside: Mapping[str, Tensor]
    ) -> dict[str, Any]:
        if self.grid is not None:
            return arguments(self.module, Batch(beside, {}))
        tokens = tokens.to(self.device)
        if tokens.is_inference():  # made in inference mode, it could serve no gradient
            tokens = tokens.clone()
        inputs: dict[str, Any] = {"input_ids": tokens, "use_cache": False}
        # All real, it changes nothing, but keeps families from warning of padding.
        inputs["attention_mask"] = torch.ones_like(tokens)
        if PIXELS in beside:  # the family itself says where in time and space each token stands
            shown = inputs["attention_mask"] if real is None else real.long().to(self.device)
            images = image_arguments(self.module, beside, self.device)
            return {**inputs, "attention_mask": shown, **images}
        if real is not None and not bool(real.all()):
            inputs |= padding(
                real.to(self.device), self._arguments, self._first_position, self.shape.turns_at
            )
        return inputs

    @cached_property
    def image_token(self) -> int | None:
        """Token that stands for a piece of an image; None if it reads texts or images alone."""
        token = getattr(self.module.config, "image_token_id", None)
        sees = self.grid is None and PIXELS in self._arguments
        return int(token) if sees and isinstance(token, int) else None

    def need_images(self, texts: Texts) -> None:
        """Refuse texts with images that the model cannot read, before it runs.

        Raises:
            InputError: if it reads texts alone, an input is unknown to it, or no token stands for
                the images.
            UnsupportedModelError: if padding stands before them and positions are counted.
        """
        token = self.image_token
        if token is None:
            super().need_images(texts)
            return
        if unknown := sorted(set(texts.inputs) - self._arguments):
            raise InputError(f"{self.name} reads images without {unknown[0]!r}: leave it out.")
        if not bool(texts.tokens.eq(token).any(1).all()):
            raise InputError(
                f"the probe holds images, and a text of it has no token {token} that "
                f"stands for them in {self.name}: make texts with the model's own processor."
            )
        need_own_images(self.module.config, texts, token)
        padded = texts.real is not None and not bool(texts.real[:, 0].all())
        if padded and "rotary" in self.limits:
            raise UnsupportedModelError(
                f"{self.name} counts positions, which padding before a text with images moves: "
                "pad on the right."
            )

    def check_batch(self, texts: Texts) -> None:
        """Refuse a batch that the model cannot read, before it runs.

        Raises:
            InputError: if the family reads it in two ways, by the kind of attention that computes
                it (paligemma without segments: causal under eager, in both directions under sdpa).
        """
        alone = texts.tokens.shape[1] == 1  # one token sees itself alone, in either way
        if self._needs_segments and SEGMENTS not in texts.inputs and not alone:
            raise InputError(
                f"{self.name} (paligemma) reads texts without {SEGMENTS!r} from left to right with "
                "eager attention and in both directions with sdpa: give every text an image, and "
                f"{SEGMENTS!r}, 0 at the prompt and 1 at what follows it."
            )

    @property
    def _needs_segments(self) -> bool:
        return self.module.config.model_type == "paligemma" and self.image_token is not None

    def image_boxes(
        self, texts: Texts, sizes: Any = None, tiles: Any = None, processor: Any = None
    ) -> ImageKeys:
        """Which piece of which picture each position stands for; see ``hs.vision.image_keys``.

        Raises:
            InputError: if the inputs do not fit the model.
            UnsupportedModelError: if it does not read texts with images, or its order of pieces is
                not known.
        """
        if self.image_token is None:
            raise UnsupportedModelError(f"{self.name} does not read texts with images in them.")
        known = self.image_processor if processor is None else processor
        self.need_images(texts)
        return image_boxes(self.module.config, texts, self.image_token, sizes, tiles, known)

    def continued(self, texts: Texts, tokens: Int[Tensor, "batch new"]) -> Texts:
        """The same texts with further tokens and their other inputs.

        Args:
            texts: without padding behind them.
            tokens: tokens that follow.
        """
        length, device = texts.tokens.shape[1], texts.tokens.device
        grown = torch.cat([texts.tokens, tokens.to(device)], 1)
        more = (0, tokens.shape[1])
        real = None if texts.real is None else nn.functional.pad(texts.real, more, value=True)
        # What follows a prefix that sees itself (paligemma) does not belong to it.
        behind = {SEGMENTS: int(self._needs_segments)}
        inputs = {
            name: nn.functional.pad(value, more, value=behind.get(name, 0))
            if name in (SEGMENTS, TURNS) and value.shape[1:] == (length,)
            else value
            for name, value in texts.inputs.items()
        }
        return Texts(grown, real, inputs)

    @cached_property
    def _arguments(self) -> frozenset[str]:
        return accepted(self.speaker)

    @cached_property
    def _first_position(self) -> int:
        if "position_ids" not in self._arguments:
            return 0
        return first_number(self.speaker, tiny_tokens(self.module))

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

    def _head_of_rows(self, run: Pass, logits_at: Tensor | None) -> nn.Module | None:
        """Head that can be given only the positions of a pass whose logits are asked for."""
        final = Tap("final_resid")  # of some models inside the head, where all positions are read
        if logits_at is None or run.is_read(final) or final in run.writes:
            return None
        return None if "logits_to_keep" in self._arguments else self._pointwise_head

    @cached_property
    @torch.no_grad()
    def _pointwise_head(self) -> nn.Module | None:
        """Module that makes logits of the body's output, if it does so at each position alone.

        Proved by a tiny pass: given one position, it gives that position's logits. None if there is
        no such module, as in models whose head reads several positions.
        """
        body, entered = body_of(self.module), list[nn.Module]()
        if self.speaker is not self.module or body is self.module or self.grid is not None:
            return None
        states = list[Tensor]()

        def keep(_module: nn.Module, _call: Call, output: Any) -> None:
            states.append(output[0])

        def note(module: nn.Module, call: Call) -> None:
            if any(call.stream is state for state in states):
                entered.append(module)

        inside = {self.module, *body.modules()}
        heads = [one for one in self.module.modules() if one not in inside]
        tiny = arguments(self.module, tiny_batch(self.module))

        def speak() -> Tensor:
            return answer(self.module(**tiny))

        with pass_over(self.module):
            with hooked([after(body, keep), *(before(one, note) for one in heads)]):
                whole = speak()
            if not entered or whole.ndim != 3:
                return None
            return entered[0] if is_pointwise(entered[0], speak, whole) else None

    def _logits(
        self, inputs: dict[str, Any], logits_at: Tensor | None, head: nn.Module | None
    ) -> Tensor:
        if logits_at is None:
            return self.spread(self.speaker(**inputs), inputs)
        if "logits_to_keep" in self._arguments and self.pooling is None:
            kept = logits_at.to(self.device)
            return answer(self.speaker(**inputs, logits_to_keep=kept))
        if head is not None:
            with hooked([entering(head, lambda stream: stream[:, logits_at.to(stream.device)])]):
                return answer(self.speaker(**inputs))
        logits = self.spread(self.speaker(**inputs), inputs)
        return logits[:, logits_at.to(logits.device)]

    def spread(self, output: Any, inputs: Mapping[str, Any]) -> Float[Tensor, "batch pos width"]:
        """Output at every position; the embedding of a whole example is repeated at all of them.

        Args:
            output: output of the module that is read.
            inputs: what it was given.
        """
        real = inputs.get("attention_mask")
        found = answer(output) if self.pooling is None else pooled(output, real, self.pooling)
        found = found if self.against is None else self.against(found)
        if found.ndim == 3:
            return found
        length = self.grid.length if self.grid is not None else inputs[TOKENS].shape[1]
        return found[:, None].expand(-1, length, -1)

    @torch.no_grad()
    def embedding_map(self) -> Unembedding:
        """Map from the last residual stream at the first position to the example's embedding.

        Final norm and projection as an unembedding, whose outputs are the parts of the vector.
        Found in one tiny pass, if nothing else is in between.

        Raises:
            UnsupportedModelError: if something does (attention pooling, a pooler's tanh).
        """
        watch = Watch()
        with (
            pass_over(self.module),
            hooked(after(one, watch.note) for one in self.module.modules()),
        ):
            output = self.module(**arguments(self.module, tiny_batch(self.module)))
        own, last = own_vector(output), watch.outputs.get(self.layout.blocks[-1])
        made = [
            (one, given)
            for one, found in watch.outputs.items()
            if own is not None
            and getattr(getattr(one, "weight", None), "ndim", 0) == 2
            and (given := watch.inputs.get(one)) is not None
            and torch.equal(found, own)
        ]
        head, read = made[-1] if made else (None, own)
        norms = [
            one
            for one, found in watch.outputs.items()
            if getattr(getattr(one, "weight", None), "ndim", 0) == 1
            and read is not None
            and torch.equal(found if found.ndim == read.ndim else found[:, 0], read)
        ]
        entered = watch.inputs.get(norms[-1]) if norms else None
        if (
            entered is None
            or last is None
            or not torch.equal(entered, last if entered.ndim == last.ndim else last[:, 0])
        ):
            raise UnsupportedModelError(
                f"{self.name} ({self.module.config.model_type}) makes its embedding of a whole "
                "example by more than a norm of the first position and a matrix."
            )
        if head is not None:
            return find_unembedding(head, norms[-1], self.shape.d_model, LogitMap(1.0, None))
        norm = measure_norm(norms[-1], self.shape.d_model, last.device)
        every = torch.eye(self.shape.d_model, device=last.device)
        return Unembedding(every, None, norm.gain, norm.bias, norm.centred, norm.epsilon)

    @torch.no_grad()
    def embedded(self, pooling: str | None = None) -> "HFModel":
        """The same model with embeddings of whole examples in place of logits.

        Args:
            pooling: how the vector is pooled; see :class:`headscope.metrics.EmbeddingMetric`.

        Raises:
            UnsupportedModelError: if the model does not give that one.
        """
        if pooling in self._embedded:
            return self._embedded[pooling]
        tiny = arguments(self.module, tiny_batch(self.module))
        with pass_over(self.module):
            body = self.module
            output = body(**tiny)
            if getattr(output, "last_hidden_state", None) is None:
                body = body_of(self.module)
                output = body(**tiny)
        own = own_vector(output)
        whole = self.grid is not None or self.mask.causal
        chosen = pooling or (
            "own" if own is not None and whole else "mean" if self.grid is None else "first"
        )
        if chosen == "own" and own is None:
            raise UnsupportedModelError(
                f"{self.name} ({self.module.config.model_type}) returns no vector of a whole "
                "example: take pooled('first') or pooled('mean')."
            )
        made = self._giving(pooled(output, None, chosen).shape[-1])
        made.pooling, made.body, made.against = chosen, body, None
        made._embedded = self._embedded
        self._embedded[pooling] = made
        return made

    def _giving(self, width: int) -> "HFModel":
        """A copy whose logits are so many numbers, which are not made by an unembedding."""
        made = copy.copy(self)
        for name in ("_arguments", "parts", "_norm_is_outside", "image_token"):
            made.__dict__.pop(name, None)
        made.layout = replace(
            self.layout,
            shape=replace(self.shape, d_vocab_out=width),
            has_logits=True,
            final_norm=None,
            logit_map=None,
        )
        made.shape = made.layout.shape
        return made

    def classifying(
        self, names: Sequence[str], texts: Float[Tensor, "text width"], scale: float, bias: float
    ) -> "HFModel":
        """The same model, whose logits are what its embeddings make of those of texts.

        Args:
            names: names of the texts.
            texts: their embeddings.
            scale: multiplier of the cosines.
            bias: added to all.

        Raises:
            InputError: if the embeddings are of another width.
        """
        own = self.embedded()
        if texts.shape[-1] != own.shape.n_logits:
            raise InputError(
                f"the texts have {texts.shape[-1]} numbers each, and the embeddings of {self.name} "
                f"{own.shape.n_logits}: embed them with the other half of the same model."
            )
        made = own._giving(len(names))
        made.against = TextEmbeddings(tuple(names), texts, scale, bias)
        made.name = f"{self.name} against {len(names)} texts"
        return made
