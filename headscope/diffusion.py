"""Cross-attention of diffusion models: text tokens that each head attends to, and ablation.

A UNet or DiT in diffusers reads a text through cross-attention: queries are positions in the image,
keys are tokens. Needs the extra ``diffusion``. One call is one denoising step.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from headscope.base.arguments import checked
from headscope.base.files import Saved
from headscope.base.options import is_out_of_memory
from headscope.base.result import Glance, Shown, Tabular, number, sizes
from headscope.base.specs import Provenance, ScoreSpec
from headscope.edits import Heads, head_list
from headscope.errors import HeadscopeError, InputError, UnsupportedModelError
from headscope.heads import HeadIndex
from headscope.models.running import own_types
from headscope.table import HeadScores

if TYPE_CHECKING:
    import pandas

_STACK = "cross"
_TEXT = "encoder_hidden_states"
_ROWS_BYTES = 1 << 27  # bytes of rows held at once
_TOKENS = ScoreSpec(
    "token_attention",
    unit="attention",
    bounds=(0.0, 1.0),
    alternative="two-sided",
    source="cross-attention maps by head, as in Park et al. 2025 (arXiv 2412.02237)",
    description="Attention from the image to the chosen text tokens, mean over image positions.",
)
_EFFECT = ScoreSpec(
    "prediction_change",
    unit="share",
    bounds=(0.0, None),
    source="ablation of cross-attention heads, one denoising step",
    description="Distance of the prediction from the clean one, relative to its norm.",
)
# Receives rows ``[batch head query token]`` and outputs ``[batch head query d_head]`` of some
# queries.
Reader = Callable[[int, Tensor, Tensor], None]


@dataclass(frozen=True)
class CrossLayer:
    """One cross-attention layer of a diffusion model.

    Attributes:
        name: name of the module.
        n_heads: number of query heads.
        d_head: size of a head.
    """

    name: str
    n_heads: int
    d_head: int


@dataclass(frozen=True, eq=False)
class Diffusion:
    """A denoiser with access to its cross-attention heads; layers are numbered in execution order.

    Attributes:
        module: diffusers module.
        layers: layers with cross-attention, which may have different numbers of heads.
    """

    module: Any
    layers: tuple[CrossLayer, ...]

    @property
    def name(self) -> str:
        """Class of the module."""
        return type(self.module).__name__

    @property
    def heads(self) -> tuple[HeadIndex, ...]:
        """Every head, such as ``X0H1``."""
        return tuple(
            HeadIndex(layer, head, _STACK)
            for layer, one in enumerate(self.layers)
            for head in range(one.n_heads)
        )

    def check(self, heads: Iterable[tuple[int, int]]) -> None:
        """Raise InputError for heads that the model does not have.

        Args:
            heads: layer and number of each head.

        Raises:
            InputError: if a head does not exist; the message names the first one.
        """
        for layer, head in heads:
            if not (layer < len(self.layers) and head < self.layers[layer].n_heads):
                raise InputError(
                    f"{self.name} has no head {HeadIndex(layer, head, _STACK)}: its "
                    "cross-attention layers have "
                    f"{', '.join(str(one.n_heads) for one in self.layers)} heads."
                )

    @torch.no_grad()
    def run(
        self,
        inputs: Mapping[str, Any],
        *,
        read: Reader | None = None,
        values: Mapping[tuple[int, int], Tensor] | None = None,
    ) -> Float[Tensor, "batch *place"]:
        """Run one prediction, with some heads' outputs replaced.

        Args:
            inputs: arguments of the module's ``forward``: latents, ``timestep``,
                ``encoder_hidden_states``.
            read: called per layer with exact rows and outputs of some queries.
            values: by layer and head, replacement ``[d_head]`` for the head's output before the
                output projection, at all positions.

        Raises:
            InputError: if there is no text, or a head does not exist.
        """
        self._check(inputs)
        self.check(values or {})
        try:
            with self._seen(read, values or {}):
                found: Tensor = self.module(**inputs, return_dict=False)[0]
        except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
            if is_out_of_memory(error) or isinstance(error, HeadscopeError):
                raise
            said = (str(error).splitlines() or [type(error).__name__])[0]
            raise InputError(f"{self.name} cannot read these inputs: {said[:150]}") from error
        return found

    def _check(self, inputs: Mapping[str, Any]) -> None:
        text = inputs.get(_TEXT)
        if not isinstance(text, Tensor) or text.ndim != 3:
            raise InputError(
                f"{self.name} needs {_TEXT!r} [batch token width], the embedded text that its "
                "cross-attention reads."
            )
        for name, value in inputs.items():
            shown = isinstance(value, Tensor) and value.is_floating_point()
            if shown and not bool(torch.isfinite(value).all()):
                raise InputError(f"{name!r} holds numbers that are not finite.")

    @contextmanager
    def _seen(
        self, read: Reader | None, values: Mapping[tuple[int, int], Tensor]
    ) -> Iterator[None]:
        """Scope in which cross-attention runs through headscope, in execution order."""
        attentions = [self.module.get_submodule(layer.name) for layer in self.layers]
        before = [attention.processor for attention in attentions]
        was: bool = self.module.training
        order: list[int] = []
        try:
            self.module.eval()
            for number, attention in enumerate(attentions):
                attention.processor = _Processor(number, read, values, order)
            yield
        finally:
            for attention, processor in zip(attentions, before, strict=True):
                attention.processor = processor
            self.module.train(was)
        if order != list(range(len(attentions))):
            raise UnsupportedModelError(
                f"{self.name} runs its cross-attention in the order {order}, so its layers cannot "
                "be numbered."
            )


@dataclass(frozen=True, eq=False)
class _Processor:
    """Plain multi-head cross-attention with the module's own matrices, with reads and edits."""

    number: int
    read: Reader | None
    values: Mapping[tuple[int, int], Tensor]
    order: list[int]

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *_others: Any,
        **_named: Any,
    ) -> Tensor:
        self.order.append(self.number)
        residual, shape = hidden_states, hidden_states.shape
        if len(shape) == 4:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
        text = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        if attn.norm_cross:
            text = attn.norm_encoder_hidden_states(text)
        heads = (attn.heads, -1)
        query, key, value = (
            made.unflatten(-1, heads).transpose(1, 2)
            for made in (attn.to_q(hidden_states), attn.to_k(text), attn.to_v(text))
        )
        query = query if attn.norm_q is None else attn.norm_q(query)
        key = key if attn.norm_k is None else attn.norm_k(key)
        mask = attention_mask
        if mask is not None:
            batch, tokens = text.shape[:2]
            mask = attn.prepare_attention_mask(mask, tokens, batch)
            mask = mask.view(batch, attn.heads, -1, mask.shape[-1])
        z = nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, scale=attn.scale
        )
        for (layer, head), new in self.values.items():
            if layer == self.number:
                z = z.clone()
                z[:, head] = new.to(z)
        if self.read is not None:
            self._read(query, key, mask, attn.scale, z)
        out = attn.to_out[1](attn.to_out[0](z.transpose(1, 2).flatten(2)))
        if len(shape) == 4:
            out = out.transpose(1, 2).reshape(shape)
        out = out + residual if attn.residual_connection else out
        found: Tensor = out / attn.rescale_output_factor
        return found

    def _read(
        self, query: Tensor, key: Tensor, mask: Tensor | None, scale: float, z: Tensor
    ) -> None:
        """Pass exact fp32 rows to the reader, a few queries at a time."""
        assert self.read is not None  # noqa: S101  # asked for where there is a reader
        row = 4 * query.shape[0] * query.shape[1] * key.shape[2]
        size = max(1, _ROWS_BYTES // row)
        for start in range(0, query.shape[2], size):
            part = slice(start, start + size)
            scores = query[:, :, part].float() @ key.float().mT * scale
            if mask is not None:
                scores = scores + (mask[:, :, part] if mask.shape[2] > 1 else mask).float()
            self.read(self.number, scores.softmax(-1), z[:, :, part])


@checked
def load(module: Any) -> Diffusion:
    """Wrap a diffusers denoiser, to access its cross-attention heads.

    Args:
        module: a UNet (``UNet2DConditionModel``) or a DiT with cross-attention
            (``PixArtTransformer2DModel``), e.g. ``pipeline.unet`` or ``pipeline.transformer``. It
            is not changed.

    Raises:
        InputError: if diffusers is not installed, or the module is not a diffusers model.
        UnsupportedModelError: if it has no plain cross-attention.

    Example:
        >>> hs.diffusion.load(torch.nn.Linear(2, 2))
        Traceback (most recent call last):
        headscope.errors.InputError: ...
    """
    try:
        from diffusers import ModelMixin
        from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
    except ImportError as error:
        raise InputError(
            "diffusion models need diffusers: pip install 'headscope[diffusion]'."
        ) from error
    if not isinstance(module, ModelMixin):
        raise InputError(
            f"a {type(module).__name__} is not a diffusers model: give pipeline.unet or "
            "pipeline.transformer."
        )
    found = [
        (name, one)
        for name, one in module.named_modules()
        if isinstance(one, Attention) and one.is_cross_attention
    ]
    if not found:
        raise UnsupportedModelError(
            f"{type(module).__name__} has no cross-attention: if it reads a text, text and image "
            "form one sequence."
        )
    for name, one in found:
        plain = type(one.processor) in (AttnProcessor, AttnProcessor2_0)
        if not plain or one.spatial_norm is not None or one.add_k_proj is not None:
            raise UnsupportedModelError(
                f"{type(module).__name__} computes {name} with {type(one.processor).__name__}, "
                "which does more than attention from image to text: remove adapters, and set "
                "diffusers' own processor."
            )
    # A UNet runs its down, middle and up blocks; its modules are listed in another order.
    place = {"down_blocks": 0, "mid_block": 1, "up_blocks": 2}
    found.sort(key=lambda one: place.get(one[0].split(".")[0], 0))
    return Diffusion(
        module,
        tuple(
            CrossLayer(name, int(one.heads), one.to_q.weight.shape[0] // int(one.heads))
            for name, one in found
        ),
    )


@dataclass(frozen=True, eq=False, repr=False)
class TokenAttention(Saved, Shown, Tabular):
    """Attention from the image to each text token, by head, mean over image positions.

    Attributes:
        weights: attention ``[batch layer head token]``, summing to 1 over tokens; NaN in layers
            with fewer heads.
        provenance: where it came from.
    """

    weights: Float[np.ndarray, "batch layer head token"]
    provenance: Provenance

    def glance(self) -> Glance:
        """Show which head attends to each token most."""
        mean = self.weights.mean(0)
        rows = []
        for token in range(mean.shape[-1]):
            layer, head = np.unravel_index(np.nanargmax(mean[..., token]), mean.shape[:2])
            most = HeadIndex(int(layer), int(head), _STACK)
            rows.append((str(token), str(most), number(float(mean[layer, head, token]))))
        return Glance(
            "Attention of the image to text tokens",
            [
                self.provenance.model or "",
                f"{len(self.weights)} examples",
                sizes(("layer", "head"), mean.shape[:2]),
            ],
            ("token", "head", "attention"),
            rows,
            hint="found.to(token), hs.plots.heatmap(found.to(token))",
        )

    def to_pandas(self) -> "pandas.DataFrame":
        """One row per head and token: mean attention over examples; absent heads left out."""
        import pandas

        mean = self.weights.mean(0)
        layers, heads, tokens = (~np.isnan(mean)).nonzero()
        named = [
            str(HeadIndex(int(one), int(two), _STACK))
            for one, two in zip(layers, heads, strict=True)
        ]
        return pandas.DataFrame(
            {"head": named, "token": tokens, "attention": mean[layers, heads, tokens]}
        )

    def to(self, tokens: int | Sequence[int]) -> HeadScores:
        """Total attention to some tokens, by head.

        Args:
            tokens: one or several positions in the text.

        Raises:
            InputError: if there is no such token.
        """
        chosen = [tokens] if isinstance(tokens, int) else list(tokens)
        count = self.weights.shape[-1]
        if not chosen or min(chosen) < 0 or max(chosen) >= count:
            raise InputError(f"tokens {chosen}: the text has tokens 0 to {count - 1}.")
        per_example = np.moveaxis(self.weights[..., sorted(set(chosen))].sum(-1), 0, 2)
        return HeadScores.from_examples(
            _TOKENS,
            per_example,
            kv_heads=per_example.shape[1],
            provenance=self.provenance,
        ).of_stack(_STACK)


def _empty(model: Diffusion, *more: int) -> Float[np.ndarray, "*any"]:
    """NaN array over all layers and heads."""
    most = max(layer.n_heads for layer in model.layers)
    return np.full((len(model.layers), most, *more), np.nan)


def _about(model: Diffusion, inputs: Mapping[str, Any], **facts: Any) -> Provenance:
    weight = next(model.module.parameters())
    probe = {"kind": "denoising step", "examples": len(inputs[_TEXT]), **facts}
    return Provenance(
        model=model.name,
        path="diffusers",
        dtype=str(weight.dtype).removeprefix("torch."),
        device=weight.device.type,
        probe=probe,
    )


@checked
@own_types()
def token_attention(model: Diffusion, inputs: Mapping[str, Any]) -> TokenAttention:
    """Attention from the image to each token of the text, by layer and head, in one pass.

    Args:
        model: model from :func:`load`.
        inputs: arguments of the module's ``forward``; see :meth:`Diffusion.run`.

    Raises:
        InputError: if there is no text.

    Example:
        >>> from diffusers import UNet2DConditionModel
        >>> small = {"sample_size": 4, "block_out_channels": (8,), "norm_num_groups": 4}
        >>> small |= {"layers_per_block": 1, "cross_attention_dim": 6, "attention_head_dim": 2}
        >>> small |= {"down_block_types": ("CrossAttnDownBlock2D",)}
        >>> unet = UNet2DConditionModel(**small, up_block_types=("CrossAttnUpBlock2D",))
        >>> model = hs.diffusion.load(unet.eval())
        >>> text = torch.randn(2, 5, 6)
        >>> inputs = {"sample": torch.randn(2, 4, 4, 4), "timestep": 9}
        >>> inputs["encoder_hidden_states"] = text
        >>> hs.diffusion.token_attention(model, inputs).weights.shape
        (2, 4, 2, 5)
    """
    sums: dict[int, Tensor] = {}
    places: dict[int, int] = {}

    def read(layer: int, rows: Tensor, _z: Tensor) -> None:
        sums[layer] = sums.get(layer, 0) + rows.sum(2)
        places[layer] = places.get(layer, 0) + rows.shape[2]

    model.run(inputs, read=read)
    batch, tokens = inputs[_TEXT].shape[:2]
    found = _empty(model, batch, tokens)
    for layer, total in sums.items():
        mean = (total / places[layer]).transpose(0, 1).double().cpu().numpy()
        found[layer, : mean.shape[0]] = mean
    return TokenAttention(np.moveaxis(found, 2, 0), _about(model, inputs))


@checked
@own_types()
def ablate_heads(
    model: Diffusion,
    inputs: Mapping[str, Any],
    method: str = "zero",
    heads: Heads | None = None,
) -> HeadScores:
    """Ablate each cross-attention head in turn, and measure the change in the prediction.

    Args:
        model: model from :func:`load`.
        inputs: arguments of the module's ``forward``; see :meth:`Diffusion.run`.
        method: ``zero``, or ``mean``: the head's mean over positions and examples of the clean
            pass.
        heads: heads to ablate. Default: all.

    Returns:
        ``|changed - clean| / |clean|`` of the prediction, by head and example.

    Raises:
        InputError: if a head or the method does not exist, or there is no text.

    Example:
        >>> from diffusers import UNet2DConditionModel
        >>> small = {"sample_size": 4, "block_out_channels": (8,), "norm_num_groups": 4}
        >>> small |= {"layers_per_block": 1, "cross_attention_dim": 6, "attention_head_dim": 2}
        >>> small |= {"down_block_types": ("CrossAttnDownBlock2D",)}
        >>> unet = UNet2DConditionModel(**small, up_block_types=("CrossAttnUpBlock2D",))
        >>> model = hs.diffusion.load(unet.eval())
        >>> text = torch.randn(2, 5, 6)
        >>> inputs = {"sample": torch.randn(2, 4, 4, 4), "timestep": 9}
        >>> inputs["encoder_hidden_states"] = text
        >>> hs.diffusion.ablate_heads(model, inputs).mean.shape
        (4, 2)
    """
    if method not in ("zero", "mean"):
        raise InputError(f"method={method!r} is unknown: 'zero' or 'mean'.")
    chosen = model.heads if heads is None else head_list(heads)
    if not chosen:
        raise InputError("no heads given: name at least one, or leave them out for all.")
    if other := [head for head in chosen if head.stack not in ("", _STACK)]:
        raise InputError(f"{model.name} is known by its cross-attention, and has no {other[0]}.")
    model.check(chosen)
    sums: dict[int, Tensor] = {}
    places: dict[int, int] = {}

    def read(layer: int, _rows: Tensor, z: Tensor) -> None:
        sums[layer] = sums.get(layer, 0) + z.float().sum((0, 2))
        places[layer] = places.get(layer, 0) + z.shape[0] * z.shape[2]

    clean = model.run(inputs, read=read if method == "mean" else None).flatten(1).double()
    found = _empty(model, len(clean))
    for layer, head in chosen:
        if method == "mean":
            new = sums[layer][head] / places[layer]
        else:
            new = torch.zeros(model.layers[layer].d_head)
        edited = model.run(inputs, values={(layer, head): new}).flatten(1).double()
        change = (edited - clean).norm(dim=1) / clean.norm(dim=1)
        found[layer, head] = change.cpu().numpy()
    return HeadScores.from_examples(
        _EFFECT,
        found,
        kv_heads=found.shape[1],
        provenance=_about(model, inputs, method=method),
    ).of_stack(_STACK)
