"""Evidence for the proof of a model: its own eager pass, compared with headscope's.

The first pass is the model alone, on eager attention, which is the definition of every family.
In the second, attention goes through headscope, and every attention layer is given what it was
given in the first, so that a difference belongs to the layer that shows it and rounding cannot
build up from layer to layer.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from headscope.base.batches import PIXELS, TOKENS, Batch
from headscope.errors import HeadscopeError, ModelLoadError, UnsupportedModelError
from headscope.heads import ModelShape
from headscope.models.attention import AttentionCall
from headscope.models.hf.hooks import Call, after, before, entering, hooked
from headscope.models.hf.interface import MaskFacts, made_masks, routed
from headscope.models.hf.layout import arguments, tiny_batch
from headscope.models.hf.measured import TURNS_BY_LENGTH
from headscope.models.hf.removed import heads_left
from headscope.models.hf.transformers_api import attention_named, visible_by
from headscope.models.hf.weights import bias, projection_matrix
from headscope.models.proof import Gap, LoadCheck, gap, logit_gap, rounding
from headscope.models.protocol import HeadModel
from headscope.models.running import answer, pass_over
from headscope.models.taps import Reads, Tap, TapView, Write, at_layers
from headscope.views import QueryKeys

if TYPE_CHECKING:
    from headscope.models.hf.model import HFModel

# Lengths of the text that a model is proved on.
SHORTEST, LONGEST = 64, 256
# Numbers of embeddings that a look at the masks of a longer text may cost.
_EMBEDDED = 1 << 28


@dataclass
class Plain:
    """The model's own pass: inputs of attention layers, outputs of projections, final states."""

    reads: dict[nn.Module, list[Tensor]] = field(default_factory=dict)
    writes: dict[nn.Module, list[Tensor]] = field(default_factory=dict)
    finals: list[Tensor] = field(default_factory=list)
    logits: Tensor = field(default_factory=lambda: torch.empty(0))


def proof_batch(model: "HFModel") -> Batch:
    """An image, or a text of distinct tokens longer than every window that fits.

    Special tokens of the config (images, padding) are left out where others are there.
    """
    if model.grid is not None:
        return tiny_batch(model.module).examples(slice(0, 1))
    local = [w for w in model.shape.windows if w is not None]
    text = text_for(model.module.config, model.shape.d_vocab, model.shape.n_ctx, local)
    return Batch({TOKENS: text.to(model.device)}, {})


def text_for(
    config: Any, d_vocab: int, n_ctx: int | None, windows: list[int]
) -> Int[Tensor, "1 pos"]:
    """See :func:`proof_batch`; also for models that are not seen yet."""
    text = config.get_text_config()
    sizes = [*windows, *_sizes(text)]
    length = max(SHORTEST, *(size + size // 2 + 2 for size in sizes if size < LONGEST - 2), 0)
    length = min(length, LONGEST, n_ctx or LONGEST)
    special = {value for c in (config, text) for value in _special(c)}
    ids = [at for at in range(d_vocab) if at not in special] if d_vocab < 4096 else None
    draw = torch.Generator().manual_seed(0)
    if ids:
        return torch.tensor(ids)[torch.randint(len(ids), (1, length), generator=draw)]
    return torch.randint(min(3, d_vocab - 1), min(d_vocab, 20_000), (1, length), generator=draw)


def _sizes(config: Any) -> Iterator[int]:
    """Numbers of a config that may be a window, a block, or an original length."""
    words = ("window", "chunk", "block", "local", "original")
    found = config.to_dict()
    nested = [value for value in found.values() if isinstance(value, dict)]
    for part in (found, *nested):
        for name, value in part.items():
            if isinstance(value, int) and value > 1 and any(word in str(name) for word in words):
                yield value


def _special(config: Any) -> Iterator[int]:
    for name, value in config.to_dict().items():
        if name.endswith("token_id") or name.endswith("token_index"):
            yield from (v for v in (value if isinstance(value, list) else [value]) if v is not None)


@torch.no_grad()
def plain_pass(model: "HFModel", batch: Batch) -> Plain:
    """Run the model alone on eager attention.

    Raises:
        ModelLoadError: if it does not run, or gives numbers that are not finite.
    """
    plain = Plain()

    def read(module: nn.Module, call: Call) -> None:
        if isinstance(call.stream, Tensor):
            plain.reads.setdefault(module, []).append(call.stream)

    def wrote(module: nn.Module, _call: Call, output: Any) -> None:
        plain.writes.setdefault(module, []).append(output)

    hooks = [
        hook
        for parts in model.layout.layers.values()
        for hook in (before(parts.attention, read), after(parts.projection, wrote))
    ]
    if model.layout.final_norm is not None:
        hooks.append(entering(model.layout.final_norm, plain.finals.append))
    with ExitStack() as stack:
        stack.enter_context(pass_over(model.module))
        stack.enter_context(hooked(hooks))
        stack.enter_context(attention_named(model.layout.configs, "eager"))
        plain.logits = own_answer(model.speaker, arguments(model.module, batch), model.name)
    return plain


def own_answer(module: Any, inputs: Mapping[str, Any], name: str) -> Tensor:
    """The model's own logits, or last hidden states.

    Raises:
        ModelLoadError: if it does not run, or they are not finite.
    """
    try:
        with pass_over(module):
            logits = answer(module(**inputs))
    except HeadscopeError:
        raise
    except Exception as error:  # config and weights may contradict each other in any way
        reason = " ".join(str(error).split())[:300]
        raise ModelLoadError(
            f"{name} does not run: {type(error).__name__} on {_said(inputs)} ({reason})."
        ) from error
    if not bool(torch.isfinite(logits).all()):
        raise ModelLoadError(
            f"{name} gives logits that are not finite: its weights hold NaN or infinite values, "
            "or its dtype is too narrow for them (try dtype='float32')."
        )
    return logits


def _said(inputs: Mapping[str, Any]) -> str:
    """What a model was given, in words."""
    if PIXELS in inputs:
        return f"images of the shape {tuple(inputs[PIXELS].shape[1:])}"
    return f"{inputs[TOKENS].numel()} tokens"


@dataclass
class Look:
    """Reader that holds rows, head outputs and their shapes against what they should be."""

    model: "HFModel"
    checks: list[LoadCheck] = field(default_factory=list)
    scores: dict[int, float] = field(default_factory=dict)

    def reads(self, shape: ModelShape) -> Reads:
        """Head outputs of all layers."""
        return at_layers(shape, self._check)

    def _check(self, view: TapView) -> None:
        """LoadCheck one layer."""
        shape, dtype = self.model.shape, self.model.dtype
        positions = torch.arange(view.n_queries)
        pattern = view.rows(positions).pattern
        values = view.values().float()
        z = view.z.float()
        where = f"of layer {view.layer}"
        if pattern.shape[1] != shape.n_heads or z.shape[2:] != (shape.n_heads, shape.d_head):
            self.checks.append(_failed(f"heads {where} have another shape than those before"))
            return
        total = pattern.sum(-1)
        over = float((total - 1).clamp_min(0).max() - pattern.clamp_max(0).min())
        allowed = rounding(torch.float32, pattern.shape[-1])
        self.checks.append(
            LoadCheck("rows are at least 0 and sum to at most 1", Gap(over, allowed), (), where)
        )
        seen = view.query_keys(positions)
        score = _largest_score(seen)
        self.scores[view.layer] = score
        averaged = torch.matmul(
            pattern, values.repeat_interleave(shape.n_heads // values.shape[1], 1)
        ).transpose(1, 2)
        self.checks.append(
            LoadCheck(
                "rows x values = z",
                gap(averaged, z, rounding(dtype, pattern.shape[-1], score)),
                ("values", "ov"),
                "changes its head outputs between the average of the values and the output "
                "projection (a gate or a norm), so values and OV circuits do not say what a head "
                "writes; scores of rows, ablation and direct logit attribution do",
            )
        )


def _largest_score(seen: QueryKeys) -> float:
    """Size of the largest attention score, before a soft cap."""
    query, key = seen.query, seen.key
    grouped = query.unflatten(1, (key.shape[1], -1)).flatten(2, 3)
    return float((grouped @ key.mT).abs().max() * abs(seen.scaling))


def _failed(what: str) -> LoadCheck:
    return LoadCheck(what, Gap(float("inf"), 0.0))


def same_outputs(shape: ModelShape) -> dict[Tap, Write]:
    """Writes of every layer's head outputs that change nothing."""
    return {Tap("z", layer): lambda z, _span: z.clone() for layer in shape.attention_layers}


@torch.no_grad()
def watched_pass(
    model: "HFModel", batch: Batch, plain: Plain
) -> tuple[list[LoadCheck], tuple[str, ...]]:
    """Run the model through headscope, layer by layer on what the plain pass read.

    Returns:
        What was compared, and other things that were seen, as sentences.
    """
    look = Look(model)
    writes: dict[nn.Module, list[tuple[Tensor, Tensor]]] = {}
    uses: dict[nn.Module, int] = {}

    def forced(module: nn.Module, call: Call) -> Call | None:
        at = uses[module] = uses.get(module, 0) + 1
        given = plain.reads.get(module, [])
        return None if at > len(given) else call.giving(given[at - 1])

    def wrote(module: nn.Module, call: Call, output: Any) -> None:
        writes.setdefault(module, []).append((call.stream, output))

    hooks = [
        hook
        for parts in model.layout.layers.values()
        for hook in (before(parts.attention, forced), after(parts.projection, wrote))
    ]
    with pass_over(model.module), hooked(hooks):
        same = same_outputs(model.shape)
        logits = model.answer(batch, reads=look.reads(model.shape), writes=same)
        assert logits is not None  # noqa: S101  # they were asked for
        logits = logits[:, 0] if plain.logits.ndim == 2 else logits  # one answer for an image
    checks = [*look.checks, _all_layers(model, look)]
    for layer, parts in model.layout.layers.items():
        alone, now = plain.writes.get(parts.projection, []), writes.get(parts.projection, [])
        if len(alone) != 1 or len(now) != 1:
            checks.append(
                _failed(f"the output projection of layer {layer} is used {len(now)} times a pass")
            )
            continue
        checks += _projection(model, layer, now[0], alone[0], look.scores.get(layer, 0.0))
    score = max(look.scores.values(), default=0.0)
    allowed = max(1e-4, rounding(model.dtype, 4 * len(model.layout.layers), score))
    if model.dtype == torch.float32:
        allowed = max(1e-4, min(1e-2, allowed))
    checks.append(
        LoadCheck(
            "logits = the model's own",
            gap(logits, plain.logits.to(logits.device), allowed),
            (),
            "so what is seen is not what the model does",
        )
    )
    checks += [*_unembedding(model, plain), *_rotation(model)]
    z = {layer: writes[parts.projection][0][0] for layer, parts in model.layout.layers.items()}
    return checks, dead_heads(model, z)


def dead_heads(model: HeadModel, z: Mapping[int, Tensor]) -> tuple[str, ...]:
    """Message that names heads whose output is always 0; None if there are none.

    Args:
        model: model whose output weights are read.
        z: what the output projection of each layer was given.
    """
    given_nothing, write_nothing = [], []
    for layer, values in z.items():
        given = values.reshape(*values.shape[:2], -1)
        silent = ~model.output_weights(layer).any(-1).any(-1)
        unread = torch.zeros_like(silent)
        # Where heads were removed, those that are left write.
        if given.shape[-1] == model.shape.n_heads * model.shape.d_head:
            heads = given.unflatten(-1, (model.shape.n_heads, -1)) != 0
            unread = ~heads.any(-1).flatten(0, 1).any(0).to(silent.device)
        both = torch.stack([unread, silent]).tolist()  # the host waits once a layer
        own = [head for head in model.shape.heads if head.layer == layer]
        given_nothing += [str(head) for head in own if both[0][head.head]]
        write_nothing += [str(head) for head in own if both[1][head.head]]
    names = list(dict.fromkeys([*given_nothing, *write_nothing]))
    if not names:
        return ()
    more = f" and {len(names) - 8} others" if len(names) > 8 else ""
    return (f"{', '.join(names[:8])}{more} write nothing: their outputs are 0 in the weights.",)


def _all_layers(model: "HFModel", look: Look) -> LoadCheck:
    missing = set(model.layout.layers) - set(look.scores)
    size = float("inf") if missing else 0.0
    return LoadCheck(
        "every attention layer is seen",
        Gap(size, 0.0),
        (),
        f"layers {sorted(missing)} never showed" if missing else "",
    )


def _projection(
    model: "HFModel",
    layer: int,
    now: tuple[Tensor, Tensor],
    before: Tensor,
    score: float,
) -> Iterator[LoadCheck]:
    """Whether the projection is its matrix, and writes what it writes without headscope."""
    z, written = now
    projection, shape = model.layout.layers[layer].projection, model.shape
    width = shape.n_heads * shape.d_head
    if heads_left(projection) is None:
        weight, constant = projection_matrix(projection, width), bias(projection, width)
        expected = z.float() @ weight.float()
        expected = expected if constant is None else expected + constant.float()
        yield LoadCheck(
            "z @ W_O + bias = what the output projection returns",
            gap(expected.reshape(written.shape), written, rounding(model.dtype, width)),
            (),
            f"layer {layer} adds something to z @ W_O (an adapter, or quantised weights): merge "
            "the adapter first (model.merge_and_unload()), or load the weights dequantised",
        )
    yield LoadCheck(
        "every layer attends as without headscope",
        gap(written, before, max(1e-5, rounding(model.dtype, z.shape[1], score))),
        (),
        f"attention of layer {layer} is masked, scaled or gated in a way that headscope does not "
        "see",
    )


def _unembedding(model: "HFModel", plain: Plain) -> Iterator[LoadCheck]:
    """Whether final norm and unembedding make the model's own logits."""
    what, costs = "final norm and unembedding = the model's own logits", ("unembedding",)
    if model.layout.final_norm is None or model.layout.logit_map is None:
        return
    reason = "does more between its last residual stream and its logits than a norm and a matrix"
    if len(plain.finals) != model.layout.final_norm_uses:
        yield LoadCheck(what, Gap(float("inf"), 0.0), costs, reason)
        return
    allowed = max(1e-5, rounding(model.dtype, model.shape.d_model))
    try:
        found = logit_gap(model.unembedding, plain.finals[-1], plain.logits, allowed)
    except UnsupportedModelError as error:
        yield LoadCheck(what, Gap(float("inf"), 0.0), costs, str(error))
        return
    yield LoadCheck(what, found, costs, reason)


def _rotation(model: "HFModel") -> Iterator[LoadCheck]:
    """Whether positions turn alike in texts of any length, where the config scales rotations.

    Others are measured when a rotation is asked for.
    """
    parameters = getattr(model.module.config.get_text_config(), "rope_parameters", None) or {}
    named = [parameters, *(value for value in parameters.values() if isinstance(value, dict))]
    if {kind.get("rope_type", "default") for kind in named} <= {"default"}:
        return
    size = float("inf") if model.parts.turns_by_length else 0.0
    what = "positions turn queries and keys alike in texts of any length"
    yield LoadCheck(what, Gap(size, 0.0), ("rotary",), TURNS_BY_LENGTH)


@torch.no_grad()
def long_masks(model: "HFModel", length: int) -> tuple[list[LoadCheck], tuple[str, ...]]:
    """Check the masks of windows that are longer than the proof's text.

    The masks that the model builds for a longer text are compared with their windows as they are
    created (the pass stops before its first block), and single rows of attention against a softmax
    over the keys that such a mask shows.
    """
    windows = sorted({w for w in model.shape.windows if w is not None and w >= length})
    checks, facts = [], []
    for window in windows:
        wanted = min(window + window // 2 + 2, model.shape.n_ctx or 2 * window)
        if wanted <= window or wanted * model.shape.d_model > _EMBEDDED:
            facts.append(f"its window of {window} is longer than any text that it was proved on.")
            continue
        masks = _masks_for(model, wanted)
        facts.append(f"its window of {window} was proved on masks for {wanted} tokens.")
        mine = [mask for mask in masks if mask.rule.window == window]
        checks += [_single_rows(model, mask, wanted) for mask in mine]
        if not mine:
            checks.append(_failed(f"no mask for {wanted} tokens has the window of {window}"))
    return checks, tuple(facts)


def _masks_for(model: "HFModel", length: int) -> list[MaskFacts]:
    """Masks that the model makes for a text of this length, before its first block runs."""
    ids = torch.full((1, length), min(3, model.shape.d_vocab - 1), device=model.device)

    def stop(_stream: Tensor) -> None:
        raise _Stopped

    def never(_module: nn.Module, _call: AttentionCall) -> Tensor:
        raise _Stopped

    with (
        hooked([entering(model.layout.blocks[0], stop)]),
        pass_over(model.module),
        routed(model.layout.configs, never),
        made_masks() as masks,
        suppress(_Stopped),
    ):
        mask = torch.ones_like(ids)
        model.module.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
    return masks


class _Stopped(Exception):  # noqa: N818  # not an error
    """Raised to stop a pass early once everything needed was seen."""


def _single_rows(model: "HFModel", mask: MaskFacts, length: int) -> LoadCheck:
    """Rows of three queries around the edge of a window, against a softmax over what is shown."""
    window = mask.rule.window or length
    draw = torch.Generator().manual_seed(0)
    query, key = (
        torch.randn(1, 1, length, model.shape.d_head, generator=draw).to(model.device)
        for _ in range(2)
    )
    at = torch.tensor([window - 1, min(window, length - 1), length - 1], device=model.device)
    keys = torch.arange(length, device=model.device)
    shown = visible_by(mask.function, 1, at, keys, use_vmap=mask.use_vmap)
    scores = (query[:, :, at] @ key.mT).masked_fill(~shown[:, None], float("-inf"))
    call = AttentionCall(0, query, key, key, 1.0, mask=mask.rule)
    return LoadCheck(
        "windows beyond the text of the proof, on single rows",
        gap(call.rows(at).pattern, scores.softmax(-1), 1e-5),
        (),
        f"its window of {window} is not what its mask shows at {length} tokens",
    )
