"""Evidence for the proof of a bridge: its own pass, compared with the one headscope hooks."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from headscope.errors import UnsupportedModelError
from headscope.heads import ModelShape
from headscope.models.hf.evidence import dead_heads, own_answer, same_outputs, text_for
from headscope.models.hf.hooks import Call, after, hooked
from headscope.models.proof import Gap, LoadCheck, gap, logit_gap, rounding
from headscope.models.taps import Reads, TapView, at_final, at_layers

if TYPE_CHECKING:
    from headscope.models.bridge.model import BridgeModel


def proof_tokens(model: "BridgeModel") -> Int[Tensor, "1 pos"]:
    """A text of distinct tokens, longer than every window of the model that fits."""
    shape, config = model.shape, getattr(model.module, "config", None)
    local = [w for w in shape.windows if w is not None]
    if config is None or not hasattr(config, "get_text_config"):
        config = _NoConfig()
    return text_for(config, shape.d_vocab, shape.n_ctx, local).to(model.device)


class _NoConfig:
    """Config of a bridge whose model has none of transformers'."""

    def get_text_config(self) -> "_NoConfig":
        return self

    def to_dict(self) -> dict[str, Any]:
        return {}


@dataclass
class Look:
    """Reader that holds rows and head outputs against each other."""

    model: "BridgeModel"
    checks: list[LoadCheck] = field(default_factory=list)
    layers: list[int] = field(default_factory=list)
    last: Tensor | None = None

    def reads(self, shape: ModelShape) -> Reads:
        """Head outputs of all layers, and the last residual stream where the model shows it."""
        layers = at_layers(shape, self._check)
        return layers if self.model.layout.final is None else layers | at_final(self._end)

    def _check(self, view: TapView) -> None:
        """LoadCheck one layer."""
        shape, dtype = self.model.shape, self.model.dtype
        self.layers.append(view.layer)
        pattern, z = view.rows(torch.arange(view.n_queries)).pattern, view.z.float()
        where = f"of layer {view.layer}"
        if pattern.shape[1] != shape.n_heads or z.shape[2:] != (shape.n_heads, shape.d_head):
            self.checks.append(
                LoadCheck(f"heads {where} have another shape", Gap(float("inf"), 0.0))
            )
            return
        over = float((pattern.sum(-1) - 1).clamp_min(0).max() - pattern.clamp_max(0).min())
        self.checks.append(
            LoadCheck(
                "rows are at least 0 and sum to at most 1",
                Gap(over, rounding(dtype, pattern.shape[-1])),
                (),
                where,
            )
        )
        if self.model.layout.layers[view.layer].value is None:
            return
        values = view.values().float()
        averaged = pattern @ values.repeat_interleave(shape.n_heads // values.shape[1], 1)
        self.checks.append(
            LoadCheck(
                "rows x values = z",
                gap(averaged.transpose(1, 2), z, rounding(dtype, pattern.shape[-1])),
                ("values", "ov"),
                "changes its head outputs between the average of the values and the output "
                "projection (a gate or a norm), or keeps its values in another order than its "
                "heads, so values and OV circuits do not say what a head writes",
            )
        )

    def _end(self, residual: Float[Tensor, "batch pos d_model"]) -> None:
        self.last = residual


@torch.no_grad()
def watched_pass(
    model: "BridgeModel", tokens: Int[Tensor, "batch pos"]
) -> tuple[list[LoadCheck], tuple[str, ...]]:
    """Run the model alone and watched; compare everything."""
    if getattr(model.module, "config", None) is not None:
        plain = own_answer(model.module, {"input_ids": tokens, "use_cache": False}, model.name)
    else:
        plain = model.bridge(tokens, return_type="logits")
    look = Look(model)
    writes: dict[int, tuple[Tensor, Tensor]] = {}

    def wrote(layer: int) -> Callable[..., None]:
        def hook(_module: nn.Module, call: Call, output: Any) -> None:
            if isinstance(call.stream, Tensor) and isinstance(output, Tensor):
                writes[layer] = (call.stream, output)

        return hook

    attentions = {layer: model.parts.block(layer).attn for layer in model.layout.layers}
    projections = {layer: getattr(one, "o", None) for layer, one in attentions.items()}
    with hooked(
        after(projection, wrote(layer))
        for layer, projection in projections.items()
        if isinstance(projection, nn.Module)
    ):
        logits = model.run(tokens, reads=look.reads(model.shape), writes=same_outputs(model.shape))
        assert logits is not None  # noqa: S101  # they were asked for
    missing = sorted(set(model.layout.layers) - set(look.layers))
    checks = [
        *look.checks,
        LoadCheck(
            "every attention layer is seen",
            Gap(float("inf") if missing else 0.0, 0.0),
            (),
            f"layers {missing} never showed" if missing else "",
        ),
        LoadCheck(
            "logits = the model's own",
            gap(logits, plain, max(1e-4, rounding(model.dtype, model.shape.d_model))),
            (),
            "so what is seen is not what the model does",
        ),
    ]
    for layer, (z, written) in writes.items():
        checks.append(_projection(model, layer, z, written))
    checks += _unembedding(model, look, logits)
    return checks, dead_heads(model, {layer: z for layer, (z, _) in writes.items()})


def _projection(model: "BridgeModel", layer: int, z: Tensor, written: Tensor) -> LoadCheck:
    """Whether the output projection is its matrix; a multiplier behind it is not part of it."""
    what = "z @ W_O + bias = what the output projection returns"
    try:
        weights = model.weights(layer)
    except UnsupportedModelError as error:
        return LoadCheck(what, Gap(float("inf"), 0.0), ("linear_write", "ov"), str(error))
    weight = weights.W_O.float().flatten(0, 1)
    flat = z.float().reshape(*z.shape[:2], -1)
    if flat.shape[-1] != len(weight):
        return LoadCheck(
            what, Gap(float("inf"), 0.0), ("linear_write", "ov"), "has another W_O than it uses"
        )
    expected = flat @ weight + weights.b_O.float()
    return LoadCheck(
        what,
        gap(expected.reshape(written.shape), written, rounding(model.dtype, len(weight))),
        (),
        f"layer {layer} adds something to z @ W_O (an adapter, or quantised weights): merge the "
        "adapter first, or load the weights dequantised",
    )


def _unembedding(model: "BridgeModel", look: Look, logits: Tensor) -> list[LoadCheck]:
    """Whether final norm and unembedding make the logits."""
    if model.layout.final is None:
        return []
    what = "final norm and unembedding = the model's own logits"
    reason = "does more between its last residual stream and its logits than a norm and a matrix"
    if look.last is None:
        return [
            LoadCheck(what, Gap(float("inf"), 0.0), ("unembedding",), "never shows its last stream")
        ]
    allowed = max(1e-5, rounding(model.dtype, model.shape.d_model))
    try:
        found = logit_gap(model.unembedding, look.last, logits, allowed)
    except UnsupportedModelError as error:
        return [LoadCheck(what, Gap(float("inf"), 0.0), ("unembedding",), str(error))]
    return [LoadCheck(what, found, ("unembedding",), reason)]
