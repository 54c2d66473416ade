"""Structural removal of heads: rows and columns of Q, K, V and O are cut out.

What a removal comes to, which rows of which matrices stay, is written down as data: a
:class:`Removal`, which is saved in the smaller model's config, as no config of transformers can say
different numbers of heads per layer. Reading applies the same removal to an empty model and then
lets transformers load the weights, which fit.
"""

import copy
from collections import Counter
from collections.abc import Iterable
from math import gcd
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from torch import Tensor, nn

from headscope.edits import zero
from headscope.errors import ModelLoadError, UnsupportedModelError
from headscope.heads import HeadIndex
from headscope.models.hf.hooks import Call, after, hooked
from headscope.models.hf.layout import arguments, body_of, shares_layers, tiny_batch
from headscope.models.hf.removed import Kept, LayerConfig, NoHeads, RepeatingLinear, reading_kept
from headscope.models.hf.weights import Owner, find_owners
from headscope.models.running import pass_over
from headscope.models.taps import writes_of

if TYPE_CHECKING:
    from headscope.models.hf.model import HFModel


# By attention module and matrix, the outputs that stay.
WeightRows = dict[tuple[str, str], Tensor]


class LayerRemoval(BaseModel):
    """What remains of one attention layer.

    Attributes:
        attention, projection: where the module is in the model, and its output projection in it.
        heads, kv_heads: those left, by old number; see :class:`headscope.models.hf.removed.Kept`.
        outputs: by input projection, how many outputs are left.
        blocks: by input projection, which block of d_head outputs stands at each place, where
            some repeat.
        returns: number of values that the attention module returns; None: a single tensor.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    attention: str
    projection: str
    heads: tuple[int, ...]
    kv_heads: tuple[int, ...]
    outputs: dict[str, int]
    blocks: dict[str, tuple[int, ...]]
    returns: int | None


class Removal(BaseModel):
    """What was removed from a model with ``n_heads`` heads a layer."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    n_heads: int
    n_kv_heads: int
    d_head: int
    layers: tuple[LayerRemoval, ...]

    @model_validator(mode="after")
    def _whole(self) -> "Removal":
        """Check what the modules will be told."""
        for layer in self.layers:
            heads, kv_heads = layer.heads, layer.kv_heads
            even = not heads if not kv_heads else len(heads) % len(kv_heads) == 0
            known = all(0 <= head < self.n_heads for head in heads)
            if not (even and known and all(0 <= kv < self.n_kv_heads for kv in kv_heads)):
                raise ValueError(f"the heads of {layer.attention} cannot be those that are named")
        return self


def removal_of(
    model: "HFModel", removed: tuple[HeadIndex, ...], owners: dict[int, dict[str, list[Owner]]]
) -> tuple[Removal, WeightRows]:
    """The removal, and which outputs of each input projection stay.

    Args:
        model: to remove heads from.
        removed: these.
        owners: from :func:`headscope.models.hf.weights.find_owners`.
    """
    shape = model.shape
    names = {module: name for name, module in model.module.named_modules()}
    layers: list[LayerRemoval] = []
    rows: WeightRows = {}
    for layer, parts in model.layout.layers.items():
        gone = {head.head for head in removed if head.layer == layer}
        heads = tuple(head for head in range(shape.n_heads) if head not in gone)
        if len(heads) == shape.n_heads:
            continue
        stored, given = _kv_heads(heads, shape.group_size)
        attention = names[parts.attention]
        outputs, blocks = {}, {}
        for name, owned in owners[layer].items():
            here = [
                i
                for i, (site, head) in enumerate(owned)
                if head in (heads if site == "query" else stored)
            ]
            rows[attention, name] = torch.tensor(here, dtype=torch.long)
            outputs[name] = len(here)
            if stored != given and heads:
                places = _blocks([owned[i] for i in here], given, shape.d_head)
                if len(places) * shape.d_head != len(here):
                    blocks[name] = places
        layers.append(
            LayerRemoval(
                attention=attention,
                projection=names[parts.projection].removeprefix(f"{attention}."),
                heads=heads,
                kv_heads=given,
                outputs=outputs,
                blocks=blocks,
                returns=_returns(model, parts.attention),
            )
        )
    kept = Removal(
        n_heads=shape.n_heads,
        n_kv_heads=shape.n_kv_heads,
        d_head=shape.d_head,
        layers=tuple(layers),
    )
    return kept, rows


def _kv_heads(heads: tuple[int, ...], group: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Key/value heads whose weights stay, and those that attention is given.

    Attention takes equally large groups. Where query heads went unevenly, the largest size that
    divides all groups is taken, and a key/value head stands once for each such part of its group.
    """
    counts = Counter(head // group for head in heads)
    size = gcd(*counts.values())
    stored = tuple(sorted(counts))
    return stored, tuple(kv for kv in stored for _ in range(counts[kv] // size))


def _blocks(owners: list[Owner], given: tuple[int, ...], d_head: int) -> tuple[int, ...]:
    """Which block of d_head outputs stands at each place, key/value heads repeated as given."""
    firsts = owners[::d_head]
    whole = [owner for owner in firsts for _ in range(d_head)] == owners
    if not whole:
        raise UnsupportedModelError(
            "it stores a head's rows apart, so grouped heads can only be removed by whole groups."
        )
    times = Counter(given)
    return tuple(
        i
        for i, (site, head) in enumerate(firsts)
        for _ in range(1 if site == "query" else times[head])
    )


def _returns(model: "HFModel", attention: nn.Module) -> int | None:
    found: list[int | None] = []

    def look(_module: nn.Module, _call: Call, output: Any) -> None:
        found.append(len(output) if isinstance(output, tuple) else None)

    with hooked([after(attention, look)]):
        model.answer(tiny_batch(model.module))
    return found[0]


# Under this name the removal stands in a config.
KEY = "headscope_removal"
# Names under which attention modules and configs of transformers keep their numbers of heads.
_HEADS = ("num_heads", "num_attention_heads")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads")
_GROUPS = ("num_key_value_groups",)
_WIDTHS = ("split_size",)
_PER_HEAD = ("sinks",)
_TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
_HALF_TOLERANCE = 5e-2


def pruned(model: "HFModel", heads: Iterable[HeadIndex]) -> Any:
    """A smaller copy of the model without these heads; see :func:`headscope.prune`."""
    removed = tuple(dict.fromkeys(model.shape.check(head) for head in heads))
    name, family = model.name, model.module.config.model_type
    if is_pruned(model.module.config):
        raise UnsupportedModelError(
            f"{name} was pruned already: prune the model that it came from, by all heads at once."
        )
    if shares_layers(model.layout):
        raise UnsupportedModelError(
            f"{name} ({family}) cannot be pruned: its layers share one set of weights, so a head "
            "cannot be removed from one of them alone. Ablate its heads instead."
        )
    owners = find_owners(model)
    _refuse_other_matrices(model, owners)
    plan, rows = removal_of(model, removed, owners)
    smaller = copy.deepcopy(model.module)
    _apply(smaller, plan, rows)
    setattr(smaller.config, KEY, plan.model_dump(mode="json"))
    if removed:
        _prove(model, smaller, removed, f"{name} ({family})")
    return smaller


def is_pruned(config: Any) -> bool:
    """Whether a config says that heads were removed."""
    return getattr(config, KEY, None) is not None


def read_pruned(folder: str | Path, config: Any, **options: Any) -> Any:
    """Load a model whose config says what was removed; ``options`` go to ``from_pretrained``.

    Raises:
        ModelLoadError: if the config does not fit the family.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    try:
        plan = Removal.model_validate(getattr(config, KEY))
        family = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    except (ValidationError, KeyError) as error:
        raise ModelLoadError(f"{folder} holds no pruned model that can be read: {error}") from error
    whole: Any = family[0] if isinstance(family, tuple) else family

    def start(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        whole.__init__(self, config, *args, **kwargs)
        try:
            _apply(self, plan, {})
        except (AttributeError, IndexError, RuntimeError) as error:
            raise ModelLoadError(f"{folder}: its config removes what is not there.") from error

    # transformers makes the object and then loads what fits: the removal goes in between.
    own: Any = type(whole.__name__, (whole,), {"__init__": start, "__module__": whole.__module__})
    try:
        model, found = own.from_pretrained(
            folder, config=config, output_loading_info=True, **options
        )
    except RuntimeError as error:
        raise ModelLoadError(f"{folder}: its weights are not those of its config.") from error
    if found["missing_keys"]:
        raise ModelLoadError(f"{folder} lacks weights: {sorted(found['missing_keys'])[0]} is one.")
    model.__class__ = whole
    return model.eval()


def _refuse_other_matrices(model: "HFModel", owners: dict[int, dict[str, list[Owner]]]) -> None:
    for layer, parts in model.layout.layers.items():
        modules = [parts.attention.get_submodule(name) for name in owners[layer]]
        for module in (*modules, parts.projection):
            if type(module).__name__ not in ("Linear", "Conv1D"):
                raise UnsupportedModelError(
                    f"{model.name} cannot be pruned: layer {layer} has a {type(module).__name__} "
                    "where a plain matrix should be; load it unquantised and without adapters."
                )


def _apply(model: Any, plan: Removal, rows: WeightRows) -> None:
    """Make the modules smaller; ``rows`` says which outputs stay, else the first ones do."""
    for layer in plan.layers:
        attention = model.get_submodule(layer.attention)
        if not layer.heads:
            if layer.projection not in dict(attention.named_modules()):
                raise UnsupportedModelError(
                    "its output projections stand beside the attention modules, so no layer can "
                    "lose all its heads: keep one of each."
                )
            silent = NoHeads(attention, layer.projection, layer.returns)
            model.set_submodule(layer.attention, silent)
            continue
        kept = Kept(layer.heads, layer.kv_heads, plan.n_heads, plan.n_kv_heads)
        attention.headscope_kept = kept
        for name, count in layer.outputs.items():
            module = attention.get_submodule(name)
            here = rows.get((layer.attention, name), torch.arange(count))
            _cut(module, here, out=True)
            if name in layer.blocks:
                module.__class__ = RepeatingLinear
                module.headscope_blocks = layer.blocks[name]
                module.headscope_d_head = plan.d_head
        _cut_projection(_projection(model, attention, layer.projection), kept, plan.d_head)
        _renumber(attention, kept, plan.d_head)


def _projection(model: Any, attention: Any, path: str) -> Any:
    """Output projection: in the attention module, or (bert) beside it, by its path in the model."""
    inside = dict(attention.named_modules())
    return inside[path] if path in inside else model.get_submodule(path)


def _cut(module: Any, index: Tensor, *, out: bool) -> None:
    """Keep some outputs or inputs of a matrix."""
    linear = isinstance(module, nn.Linear)
    axis = 0 if linear == out else 1
    place = index.to(module.weight.device)
    module.weight = _chosen(module.weight, axis, place)
    if out and module.bias is not None:
        module.bias = _chosen(module.bias, 0, place)
    names = ("out_features", "in_features") if linear else ("nf", "nx")
    setattr(module, names[0] if out else names[1], len(index))


def _chosen(parameter: nn.Parameter, axis: int, index: Tensor) -> nn.Parameter:
    value = parameter.detach().index_select(axis, index)
    return nn.Parameter(value, requires_grad=parameter.requires_grad)


def _cut_projection(projection: Any, kept: Kept, d_head: int) -> None:
    columns = torch.tensor(kept.heads)[:, None] * d_head + torch.arange(d_head)
    _cut(projection, columns.flatten(), out=False)
    projection.__class__ = reading_kept(type(projection))
    projection.headscope_kept = kept
    projection.headscope_width = len(columns.flatten())


def _renumber(attention: Any, kept: Kept, d_head: int) -> None:
    """Tell the attention module how many heads it has."""
    numbers = {
        **dict.fromkeys(_HEADS, len(kept.heads)),
        **dict.fromkeys(_KV_HEADS, len(kept.kv_heads)),
        **dict.fromkeys(_GROUPS, len(kept.heads) // len(kept.kv_heads)),
        **dict.fromkeys(_WIDTHS, len(kept.heads) * d_head),
    }
    for name, value in numbers.items():
        if isinstance(getattr(attention, name, None), int):
            setattr(attention, name, value)
    for name in _PER_HEAD:
        given = getattr(attention, name, None)
        if isinstance(given, nn.Parameter):
            place = torch.tensor(kept.heads, device=given.device)
            setattr(attention, name, _chosen(given, 0, place))
    if getattr(attention, "config", None) is not None:
        own = {name: numbers[name] for name in (*_HEADS[1:], *_KV_HEADS[:1])}
        attention.config = LayerConfig(attention.config, own)


@torch.no_grad()
def _prove(model: "HFModel", smaller: Any, removed: tuple[HeadIndex, ...], name: str) -> None:
    """Check that the smaller model's logits equal the whole one's with these heads at 0."""
    tiny = tiny_batch(model.module)
    said = model.answer(tiny, writes=writes_of((zero(removed),)))
    assert said is not None  # noqa: S101  # it was asked for
    wanted = said.float()
    try:
        with pass_over(smaller):
            inputs = arguments(smaller, tiny)
            speaker = smaller if model.has_logits else body_of(smaller)
            got = model.spread(speaker(**inputs), inputs).float()
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError) as error:
        raise UnsupportedModelError(
            f"{name} cannot be pruned: its attention does not run with fewer heads ({error})."
        ) from error
    limit = _TOLERANCE.get(model.dtype, _HALF_TOLERANCE) * max(1.0, float(wanted.abs().max()))
    if not float((got - wanted).abs().max()) <= limit:
        raise UnsupportedModelError(
            f"{name} cannot be pruned: without these heads its logits are not those of the model "
            "with their outputs at 0, so its attention uses numbers of heads that are not known."
        )
