"""A transformer-lens ``TransformerBridge`` as a ``HeadModel``: construction and parts."""

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from headscope.base.batches import TOKENS, Batch
from headscope.base.result import Glance, Shown
from headscope.base.specs import portable
from headscope.errors import UnsupportedModelError
from headscope.models.bridge.layout import BridgeLayout, find_bridge_layout, tiny_bridge_tokens
from headscope.models.bridge.passes import EditScope, PassTaps
from headscope.models.hf.hooks import Hook, entering, leaving, unhooked
from headscope.models.hf.measured import (
    MeasuredParts,
    logit_scale,
    measure_norm,
    measure_unembedding,
)
from headscope.models.hf.taps import Pass, Tapped
from headscope.models.hf.transformers_api import make_eager
from headscope.models.proof import Proof, gap
from headscope.models.protocol import Edit, glance_of, unmeasured_write
from headscope.models.rotary import POSITIONS, find_rotation, no_rotation
from headscope.models.running import (
    Digest,
    accepted,
    all_weights,
    need_gradients,
    padding,
    pass_over,
)
from headscope.models.taps import writes_of
from headscope.views import HeadWeights, Norm, QueryKey, Rotation, Unembedding

_ROTARY = ("rotary", "rope")


class BridgeParts(MeasuredParts):
    """Parts of a :class:`headscope.models.bridge.model.BridgeModel`."""

    def __init__(self, model: Any) -> None:
        """Measure nothing yet."""
        super().__init__(model)
        self._rotations: dict[int, Rotation] = {}

    def input_norm(self, layer: int) -> Norm:
        """Norm between the residual stream and one layer's attention, checked on a tiny pass."""
        model = self.model
        norm = getattr(getattr(self.block(layer), "ln1", None), "original_component", None)
        if norm is not None:
            found = measure_norm(norm, model.shape.d_model, model.device)
            tokens = torch.arange(4)[None] % model.shape.d_vocab
            residual = self.layer_inputs(tokens, [layer])[layer].float()
            read = self._reads(tokens, [layer])[layer].float()
            if (found(residual) - read).norm() < 1e-2 * read.norm():
                return found
        raise UnsupportedModelError(
            f"{model.name}: what attention of layer {layer} reads is not a plain norm of the "
            "residual stream that transformer-lens shows."
        )

    def block(self, layer: int) -> nn.Module:
        """Module that is one layer, attention and MLP."""
        block: nn.Module = self.model.bridge.blocks[layer]
        return block

    def projection(self, layer: int) -> nn.Module:
        """Output projection of one layer's attention."""
        projection = getattr(getattr(self.block(layer), "attn", None), "o", None)
        if not isinstance(projection, nn.Module):
            raise UnsupportedModelError(
                f"transformer-lens does not show the output projection of layer {layer} of "
                f"{self.model.name}."
            )
        return projection

    def projection_bias(self, layer: int) -> Float[Tensor, " d_model"]:
        """Bias of that projection; zeros where it has none."""
        bias: Tensor = self.model.weights(layer).b_O
        return bias

    def tiny(self) -> Batch:
        """Two small texts."""
        ids = torch.arange(10) * 7 % max(self.model.shape.d_vocab - 1, 1)
        return Batch({TOKENS: ids.view(2, 5)}, {})

    def run(self, batch: Batch) -> None:
        """Run the model."""
        self.model.bridge(batch.tokens.to(self.model.device), return_type="logits")

    def query_key(self, layer: int) -> QueryKey:
        """Rotation of one layer; families with norms in between are refused."""
        return QueryKey(self.rotation(layer))

    def need_values(self, layer: int) -> None:
        """Refuse nothing: limits say where values are not what weights give."""

    def rotation(self, layer: int) -> Rotation:
        """Rotary positions of one layer, measured once."""
        if layer not in self._rotations:
            weights = self.model.weights(layer)
            self._rotations[layer] = self._rotation(*self._short_pass[layer], weights)
        return self._rotations[layer]

    @cached_property
    @torch.no_grad()
    def _short_pass(self) -> dict[int, tuple[Tensor, Tensor, Tensor]]:
        limit = self.model.shape.n_ctx or POSITIONS[-1] + 1
        at = [position for position in POSITIONS if position < limit]
        ids = torch.arange(2 * (at[-1] + 1)) * 7 % max(self.model.shape.d_vocab - 1, 1)
        return self.short_pass(ids.view(2, -1), at)

    def _rotation(self, read: Tensor, query: Tensor, key: Tensor, weights: HeadWeights) -> Rotation:
        vectors = []
        for used, weight, bias in (
            (query, weights.W_Q, weights.b_Q),
            (key, weights.W_K, weights.b_K),
        ):
            content = torch.einsum("bpd,hde->bhpe", read.float(), weight.float())
            content = content + bias.float()[:, None]
            vectors.append((content.flatten(0, 1), used.float().flatten(0, 1)))
        content, actual = (torch.cat(pair) for pair in zip(*vectors, strict=True))
        tolerance = 1e-6 if self.model.dtype in (torch.float32, torch.float64) else 1e-3
        found = find_rotation(content.cpu(), actual.cpu(), tolerance)
        if found is None:
            raise UnsupportedModelError(
                f"{self.model.name} changes its queries and keys by more than a rotation (a norm "
                "on them, as in qwen3 or gemma3), so how positions turn them cannot be measured, "
                "and no one matrix gives its attention scores: a qk_scorer reads the scores of "
                "a run, with their norms."
            )
        return found

    def short_pass(
        self, tokens: Int[Tensor, "batch pos"], at: list[int]
    ) -> dict[int, tuple[Tensor, Tensor, Tensor]]:
        """Attention's input, queries and keys per layer at some positions of one pass."""
        shape, rotary = self.model.shape, self._is_rotary()
        names = ("hook_rot_q", "hook_rot_k") if rotary else ("hook_q", "hook_k")
        heads = (shape.n_heads, shape.n_kv_heads)
        kept: dict[tuple[int, str], Tensor] = {}

        def keep(layer: int, name: str, count: int) -> Callable[[Tensor], None]:
            def kept_now(value: Tensor) -> None:
                whole = value if value.ndim == 4 else value.unflatten(-1, (count, -1))
                by_head = whole if whole.shape[1] == count and rotary else whole.transpose(1, 2)
                kept[layer, name] = by_head[:, :, at]

            return kept_now

        hooks = []
        for layer in shape.attention_layers:
            for name, count in zip(names, heads, strict=True):
                point = getattr(self.block(layer).attn, name, None)
                if isinstance(point, nn.Module):
                    hooks.append(leaving(point, keep(layer, name, count)))
        read = self._reads(tokens, shape.attention_layers, hooks)
        if any((layer, name) not in kept for layer in read for name in names):
            raise UnsupportedModelError(
                f"transformer-lens does not show the queries and keys of {self.model.name} as "
                "attention uses them."
            )
        return {
            layer: (x[:, at], kept[layer, names[0]], kept[layer, names[1]])
            for layer, x in read.items()
        }

    def _is_rotary(self) -> bool:
        kind = str(getattr(self.model.bridge.cfg, "positional_embedding_type", ""))
        return any(word in kind for word in _ROTARY)

    def _reads(self, tokens: Tensor, layers: Any, hooks: Sequence[Hook] = ()) -> dict[int, Tensor]:
        """What attention of these layers reads."""
        seen: dict[int, Tensor] = {}

        def keep(layer: int) -> Callable[[Tensor], None]:
            def entered(stream: Tensor) -> None:
                seen[layer] = stream.detach()

            return entered

        own = [entering(self.block(n).get_submodule("attn"), keep(n)) for n in layers]
        with torch.no_grad():
            self.watch(Batch({TOKENS: tokens}, {}), [*own, *hooks])
        return seen


def bridge_weights(bridge: Any, layer: int) -> HeadWeights:
    """Attention weights of one layer.

    ``q = x W_Q + b_Q`` with ``x`` the block's normalised input: before rotation, and before the
    query and key norms of families that have them (qwen3, gemma3, olmo2). ``z W_O + b_O`` is the
    output projection as it stands: before a norm after attention (gemma2, gemma3, olmo2) and
    before a residual multiplier (granite).

    Args:
        bridge: a ``TransformerBridge``.
        layer: the model's layer number.

    Raises:
        UnsupportedModelError: if the layer's weights cannot be split by heads.
    """
    try:
        attention = bridge.blocks[layer].attn
        matrices = {name: getattr(attention, name) for name in ("W_Q", "W_K", "W_V", "W_O")}
        biases = {name: getattr(attention, name) for name in ("b_Q", "b_K", "b_V", "b_O")}
    except (AttributeError, ValueError) as error:
        raise UnsupportedModelError(
            f"the attention weights of layer {layer} cannot be split by heads: {error}"
        ) from error
    if any(not isinstance(weight, Tensor) or weight.ndim != 3 for weight in matrices.values()):
        raise UnsupportedModelError(f"layer {layer} has no separate W_Q, W_K, W_V and W_O.")
    shapes = {
        "b_Q": matrices["W_Q"].shape[::2],
        "b_K": matrices["W_K"].shape[::2],
        "b_V": matrices["W_V"].shape[::2],
        "b_O": matrices["W_O"].shape[2:],
    }
    return HeadWeights(
        **{name: weight.detach() for name, weight in matrices.items()},
        **{name: _bias(biases[name], shape, matrices["W_O"]) for name, shape in shapes.items()},
    )


def _bias(bias: Tensor | None, shape: torch.Size, like: Tensor) -> Tensor:
    """Return the bias, zeros where the family has none."""
    return like.new_zeros(shape) if bias is None else bias.detach().reshape(shape)


# Largest difference between logits of bridge and model, relative to the largest logit. Half
# precision rounds at other places on the two ways; a wrong layout gives differences near 1.
_SAME = {torch.float32: 1e-3, torch.float64: 1e-6}
_SAME_HALF = 0.1

# Attribute of a module tree that says which weights it had before a bridge added views of them.
OWN_NAMES = "_headscope_weight_names"


def without_own_hooks(bridge: Any) -> AbstractContextManager[None]:
    """Context manager without the user's hooks on a bridge, which are edits of the model."""
    return unhooked(
        (point, handle.hook.id)
        for point in bridge.modules()
        for handle in getattr(point, "fwd_hooks", ())
        if not handle.is_permanent
    )


def bridge_over(module: Any) -> Any:
    """Build a ``TransformerBridge`` around a second module tree that shares the parameters.

    A bridge rewires the modules that it wraps, so it gets a tree of its own: an empty one of the
    same class, to which the first one's parameters and buffers are assigned. Fused projections
    whose heads lie interleaved (bloom, gpt_neox, phi3, falcon) are copied by transformer-lens.

    Args:
        module: a transformers model; left as it is.

    Raises:
        UnsupportedModelError: if transformer-lens cannot run it, or runs it differently.
    """
    name = module.config.name_or_path or type(module).__name__
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    try:
        tree = _second_tree(module)
        bridge = build_bridge_from_module(
            tree,
            architecture=type(module).__name__,
            hf_config=tree.config,
            tokenizer=None,
            model_name=name,
        )
        _check_same(module, bridge, name)
    except UnsupportedModelError:
        raise
    except Exception as error:  # whatever an adapter of another package stumbles over
        raise UnsupportedModelError(
            f"{name} ({module.config.model_type}) is not supported: transformer-lens cannot open "
            f"it ({type(error).__name__}: {' '.join(str(error).split())[:200]})."
        ) from error
    return bridge


def _second_tree(module: Any) -> Any:
    """Build a module tree of the same class over the same tensors."""
    from accelerate import init_empty_weights

    config = copy.deepcopy(module.config)
    make_eager(config)
    with init_empty_weights(include_buffers=False):
        tree = type(module)(config)
    weights = all_weights(module)
    tree.load_state_dict(weights, assign=True)
    setattr(tree, OWN_NAMES, tuple(weights))
    buffers = dict(module.named_buffers())
    for path, _ in list(tree.named_buffers()):
        owner, _, leaf = path.rpartition(".")
        tree.get_submodule(owner)._buffers[leaf] = buffers[path]
    return tree.eval()


@torch.no_grad()
def _check_same(module: Any, bridge: Any, name: str) -> None:
    """Refuse a bridge whose logits differ from those of the underlying model."""
    tokens = tiny_bridge_tokens(bridge)
    with pass_over(module):
        plain = module(input_ids=tokens, use_cache=False).logits
    with pass_over(bridge.original_model):
        try:
            seen = bridge(tokens, return_type="logits")
        except Exception as error:  # as above, while it runs
            raise UnsupportedModelError(
                f"{name} ({module.config.model_type}) is not supported: transformer-lens cannot "
                f"run it ({type(error).__name__}: {' '.join(str(error).split())[:200]})."
            ) from error
    found = gap(seen, plain, _SAME.get(module.dtype, _SAME_HALF))
    if not found.closed:
        raise UnsupportedModelError(
            f"{name} ({module.config.model_type}) is not supported: transformer-lens gives other "
            f"logits than transformers (by {found.size:.2g} of the largest)."
        )


class BridgeModel(Tapped, Shown, checks=False):
    """``TransformerBridge`` as a ``HeadModel``; patterns are computed whole, layer by layer.

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
        """Show size, path and limits."""
        return glance_of(self)

    @property
    def device(self) -> torch.device:
        """Device of the token ids."""
        device: torch.device = next(self.module.parameters()).device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights."""
        dtype: torch.dtype = next(self.module.parameters()).dtype
        return dtype

    @property
    def limits(self) -> Mapping[str, str]:
        """Analyses that do not apply to this family, with reasons."""
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
        """Final norm and unembedding, read each time, since weights may have changed."""
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
        """SHA-256 of the current weights.

        The same as of the transformers model that a bridge of headscope's own was built over.
        """
        weights = self.module.state_dict()
        own = getattr(self.module, OWN_NAMES, None)
        if own is not None:
            weights = {name.replace("._original_component", ""): w for name, w in weights.items()}
            weights = {name: weights[name] for name in own}
        return self._digest.of(weights)

    def attention_taps(self, run: Pass) -> AbstractContextManager[None]:
        """Context manager in which attention runs with the taps of a pass.

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
        """Module whose input is the last residual stream; None if it cannot be told."""
        return self.layout.final

    def edited(self, edits: Sequence[Edit]) -> AbstractContextManager[None]:
        """Context manager in which every pass of the bridge is edited, including generation."""
        _, writes = self.taps({}, writes_of(edits))
        return EditScope(self.module, self.layout, writes).open()

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
    """Wrap a ``TransformerBridge`` as a ``HeadModel``.

    Args:
        bridge: the user's own, or one from :func:`headscope.models.bridge.model.bridge_over`.
        name: what to call it; default: what the bridge calls it.
        tokenizer: default: the bridge's own.
        revision: version of the weights.

    Raises:
        UnsupportedModelError: if its heads cannot be seen.
    """
    name = portable(name or _name(bridge))
    try:
        layout = find_bridge_layout(bridge)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{name} is not supported: {error}") from error
    own = getattr(bridge, "tokenizer", None)
    chosen = own if tokenizer is None else tokenizer
    return BridgeModel(bridge, layout, tokenizer=chosen, name=name, revision=revision)


def _name(bridge: Any) -> str:
    return str(getattr(bridge.cfg, "model_name", None) or type(bridge.original_model).__name__)
