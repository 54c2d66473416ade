"""Where the parts of a ``TransformerBridge`` are, found by watching one tiny forward pass.

transformer-lens gives every family the same hook names, but which of them fire, in which order
and with which shapes differs. What is relied on here was seen to fire.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from headscope.errors import UnsupportedModelError
from headscope.heads import ModelShape
from headscope.models.hf.hooks import after, hooked, leaving
from headscope.models.hf.measured import Watch, write_scales
from headscope.models.hf.transformers_api import ATTENTION_METHOD
from headscope.models.rotary import turning_length

# Tokens of the watched pass: two examples, so that no axis is mistaken for another.
_BATCH, _LENGTH = 2, 5


@dataclass(frozen=True, eq=False)
class BridgeLayer:
    """Hook points and modules of one attention layer.

    Attributes:
        pattern: softmax rows ``[batch head query key]`` pass through it.
        pattern_is_live: a pattern changed there changes the output; otherwise it is only shown,
            after the layer has used it.
        z: the output projection's input.
        query: queries, after rotation where ``query_is_rotated``; None if they are not shown.
        value: value projections; None if they are not shown.
        kernel: a module whose ``_attn`` computes this layer's attention, where the pattern is not
            live; edits of queries and patterns then go in there.
        write_scale: multiplier of ``z @ W_O`` on its way into the residual stream; None if the
            write is not linear in ``z``.
    """

    layer: int
    block: nn.Module
    attention: nn.Module
    pattern: nn.Module
    pattern_is_live: bool
    z: nn.Module
    query: nn.Module | None
    query_is_rotated: bool
    value: nn.Module | None
    kernel: nn.Module | None
    write_scale: float | None


@dataclass(frozen=True, eq=False)
class BridgeLayout:
    """Parts of a bridge, the shape of its attention stack, and where its final norm is entered."""

    shape: ModelShape
    layers: dict[int, BridgeLayer]
    final: nn.Module | None


@dataclass
class _Seen:
    """Hook points of one layer, in the order in which they fired, with what they carried."""

    values: dict[str, Tensor] = field(default_factory=dict)

    def order(self, name: str) -> int:
        return list(self.values).index(name)


def find_bridge_layout(bridge: Any) -> BridgeLayout:
    """Find the parts of a causal language model under transformer-lens.

    Raises:
        UnsupportedModelError: if its heads cannot be seen.
    """
    if not isinstance(getattr(bridge, "blocks", None), nn.ModuleList):
        raise UnsupportedModelError("transformer-lens does not see it as one stack of blocks.")
    blocks = dict(bridge.blocks_with("attn"))
    if not blocks:
        raise UnsupportedModelError("none of its blocks has attention that transformer-lens shows.")
    seen, watch, n_logits = _watch(bridge, blocks)
    shape = _shape(bridge, seen, {layer: block.attn for layer, block in blocks.items()}, n_logits)
    scales = write_scales(watch, {layer: (block, block.attn) for layer, block in blocks.items()})
    layers = {
        layer: _layer(layer, block, seen[layer], scales[layer]) for layer, block in blocks.items()
    }
    final = getattr(getattr(bridge, "ln_final", None), "hook_in", None)
    return BridgeLayout(shape, layers, final)


def tiny_bridge_tokens(bridge: Any) -> Tensor:
    """Return a small batch of distinct valid token ids on the bridge's input device."""
    ids = torch.arange(_BATCH * _LENGTH) * 7 % max(int(bridge.cfg.d_vocab) - 1, 1)
    return ids.view(_BATCH, _LENGTH).to(next(bridge.original_model.parameters()).device)


def _watch(bridge: Any, blocks: dict[int, Any]) -> tuple[dict[int, _Seen], Watch, int]:
    """Run a few tokens; note what passes the hook points and modules, and the number of logits."""
    seen = {layer: _Seen() for layer in blocks}
    watch = Watch()

    def note(layer: int, name: str) -> Callable[[Tensor], None]:
        def noted(value: Tensor) -> None:
            seen[layer].values[name] = value

        return noted

    hooks = []
    for layer, block in blocks.items():
        for name in ("hook_pattern", "hook_z", "hook_q", "hook_rot_q", "hook_k", "hook_v"):
            point = getattr(block.attn, name, None)
            if isinstance(point, nn.Module):
                hooks.append(leaving(point, note(layer, name)))
        hooks += [after(module, watch.note) for module in block.modules()]
    with hooked(hooks), torch.no_grad():
        logits: Tensor = bridge(tiny_bridge_tokens(bridge), return_type="logits")
    for block in blocks.values():
        projection = getattr(block.attn, "o", None)
        if projection in watch.outputs:
            watch.writes[block.attn] = watch.outputs[projection]
    return seen, watch, logits.shape[-1]


def _layer(layer: int, block: Any, seen: _Seen, scale: float | None) -> BridgeLayer:
    attention = block.attn
    live = seen.order("hook_pattern") < seen.order("hook_z")
    rotated = "hook_rot_q" in seen.values
    kernel = attention.original_component
    query = attention.hook_rot_q if rotated else getattr(attention, "hook_q", None)
    return BridgeLayer(
        layer=layer,
        block=block,
        attention=attention,
        pattern=attention.hook_pattern,
        pattern_is_live=live,
        z=attention.hook_z,
        query=query if rotated or "hook_q" in seen.values else None,
        query_is_rotated=rotated,
        value=attention.hook_v if "hook_v" in seen.values else None,
        kernel=kernel if not live and callable(getattr(kernel, ATTENTION_METHOD, None)) else None,
        write_scale=scale,
    )


def _shape(
    bridge: Any, seen: dict[int, _Seen], attentions: dict[int, Any], n_logits: int
) -> ModelShape:
    kinds = set()
    for layer, found in seen.items():
        if "hook_pattern" not in found.values or "hook_z" not in found.values:
            raise UnsupportedModelError(
                f"transformer-lens shows no attention pattern or no head outputs in layer {layer}."
            )
        pattern, z = found.values["hook_pattern"], found.values["hook_z"]
        if pattern.ndim != 4 or not bool((pattern.float().triu(1).abs() <= 1e-4).all()):
            raise UnsupportedModelError("its attention is not causal (an encoder).")
        n_heads = pattern.shape[1]
        width = z.shape[2:].numel()
        kv_width = found.values["hook_v"].shape[2:].numel() if "hook_v" in found.values else width
        query = found.values.get("hook_rot_q")
        if query is not None and query.shape[-1] != width // n_heads:
            raise UnsupportedModelError(
                "it uses multi-head latent attention, whose queries and values differ in size."
            )
        kinds.add((n_heads, kv_width * n_heads // width, width // n_heads))
    if len(kinds) != 1:
        raise UnsupportedModelError("its layers differ in their number or size of heads.")
    n_heads, n_kv_heads, d_head = next(iter(kinds))
    n_layers = len(bridge.blocks)
    return ModelShape(
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        d_model=int(bridge.cfg.d_model),
        d_head=d_head,
        d_vocab=_d_vocab(bridge),
        d_vocab_out=None if n_logits == _d_vocab(bridge) else n_logits,
        n_ctx=_n_ctx(bridge),
        turns_at=turning_length(_config(bridge)),
        attention_layers=tuple(sorted(attentions)),
        windows=tuple(_window(_config(bridge), layer) for layer in range(n_layers)),
    )


def _config(bridge: Any) -> Any:
    """Config of the underlying model, transformer-lens' own where that has none."""
    config = getattr(bridge.original_model, "config", None)
    return bridge.cfg if config is None else config.get_text_config()


def _d_vocab(bridge: Any) -> int:
    """Tokens that go in: rows of the embedding, where transformers shows it."""
    ask = getattr(bridge.original_model, "get_input_embeddings", None)
    weight = getattr(ask() if callable(ask) else None, "weight", None)
    return len(weight) if isinstance(weight, Tensor) else int(bridge.cfg.d_vocab)


def _n_ctx(bridge: Any) -> int | None:
    config = _config(bridge)
    n_ctx = getattr(config, "max_position_embeddings", None)
    return getattr(config, "n_ctx", None) if config is bridge.cfg else n_ctx


def _window(config: Any, layer: int) -> int | None:
    """How many keys back a layer sees, itself included, as its config says."""
    local = getattr(config, "attention_layers", None)  # gpt_neo
    if local is not None:
        return int(config.window_size) if local[layer] == "local" else None
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if window is None or getattr(config, "use_sliding_window", True) is False:
        return None
    if kinds is not None and kinds[layer] != "sliding_attention":
        return None
    return int(window)
