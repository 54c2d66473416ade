"""Layout of a transformers model's parts, found by watching one tiny forward pass.

No family is known by name. Attention layers are the modules that call the attention registry;
the output projection is the matrix that then acts inside such a module and makes what the module
returns, with all that is wrapped around it; the final norm is the module whose output enters the
unembedding; whether heads write ``z @ W_O`` into the residual stream, and with which multiplier,
is measured, and so is what happens to logits behind the unembedding.
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from headscope.base.batches import GRID, PATCHES, PIXELS, TEXT, TINY, TOKENS, Batch
from headscope.base.stacks import CAUSAL, MaskRule, PatchGrid
from headscope.errors import UnsupportedModelError
from headscope.heads import HeadIndex, ModelShape
from headscope.models.attention import AttentionCall, fused
from headscope.models.hf.hooks import Call, after, entering, hooked
from headscope.models.hf.interface import OwnCode, own_attention, routed
from headscope.models.hf.measured import (
    LogitMap,
    Watch,
    channel_scales,
    measure_logit_map,
    ramp,
    write_scales,
)
from headscope.models.hf.removed import NoHeads, heads_left
from headscope.models.hf.transformers_api import SHARED_GROUPS, takes_attention_functions
from headscope.models.rotary import turning_length
from headscope.models.running import Finished, accepted, answer, pass_over, runs_on


@dataclass(frozen=True, eq=False)
class LayerParts:
    """Modules of one attention layer.

    ``write_scale`` multiplies ``z @ W_O`` on its way into the residual stream; None if the write is
    not linear in ``z`` (a norm after attention). ``channel_scale`` names a vector of the block that
    multiplies it too, channel by channel (layer scale). ``input_norm`` makes attention's input of
    the block's; None if attention reads the block's input itself (``reads_residual``) or something
    that is not a plain norm of it.
    """

    layer: int
    attention: nn.Module
    projection: nn.Module
    write_scale: float | None
    input_norm: nn.Module | None
    reads_residual: bool
    channel_scale: str | None = None


@dataclass(frozen=True, eq=False)
class Layout:
    """Parts of a model and the shape of its attention stack.

    Attributes:
        final_norm: norm before the unembedding; None if there is no plain one.
        final_norm_uses: how often a pass calls it; the last call is the one before the unembedding
            (nanochat also sends its embedding through it).
        logit_map: what makes logits of the unembedding's outputs; None if that is not known.
        mask: rule of all layers, windows apart.
        has_logits: whether it gives a logit of every token at every position, or of every class.
        unembedding: matrix that makes logits; None if there is none.
        grid: how images are cut into positions; None in a model of texts.
    """

    shape: ModelShape
    layers: dict[int, LayerParts]
    blocks: nn.ModuleList
    final_norm: nn.Module | None
    configs: tuple[Any, ...]
    final_norm_uses: int = 1
    logit_map: LogitMap | None = None
    mask: MaskRule = CAUSAL
    has_logits: bool = True
    unembedding: Any = None
    grid: PatchGrid | None = None

    def channel_scale(self, layer: int) -> Tensor | None:
        """Learned vector that multiplies ``z @ W_O`` of a layer as it is now; None without one."""
        name = self.layers[layer].channel_scale
        return None if name is None else self.blocks[layer].get_parameter(name).detach()

    def by_attention(self) -> dict[nn.Module, LayerParts]:
        """Layer parts by the module that calls attention."""
        return {parts.attention: parts for parts in self.layers.values()}


def find_layout(model: Any, own_code: bool = False) -> Layout | None:
    """Find the parts of a language model; None if its attention cannot be routed.

    Args:
        model: a transformers model.
        own_code: also look into attention that is the family's own code.

    Raises:
        UnsupportedModelError: if the family cannot be taken apart by heads at all.
    """
    if not takes_attention_functions(model) and not own_code:
        return None
    reads = getattr(model, "main_input_name", TOKENS)
    if reads not in (TOKENS, PIXELS):
        raise UnsupportedModelError(
            f"it reads {reads}, and headscope gives a model token ids or images."
        )
    _refuse_towers(model)
    tiny = tiny_batch(model)
    own = _own_code(model, tiny) if own_code else ()
    if own_code and not own:
        return None
    held = (c for m in model.modules() if (c := getattr(m, "config", None)))
    configs = (*{id(c): c for c in held}.values(), *own)
    watch, logits, has_logits = _watch(model, configs, tiny)
    if not watch.calls:
        if any(isinstance(module, NoHeads) for module in model.modules()):
            raise UnsupportedModelError("all its heads were pruned: there is nothing to see.")
        return None
    _refuse_biases([call for _, call in watch.calls], own_code)
    names = {module: name for name, module in model.named_modules()}
    blocks, numbers = number_layers(model, [module for module, _ in watch.calls], names, watch.uses)
    choose_projections(watch, names)
    _refuse_windows(watch, tiny)
    shape = _shape(model, watch, blocks, numbers, logits)
    layers = {}
    width = shape.n_heads * shape.d_head
    for module, _ in watch.calls:
        given = watch.inputs.get(watch.projections.get(module, module))
        given = given if module in watch.projections else None
        whole = given if given is not None and given.shape[-1] == width else None
        in_order = whole is not None and whole.shape[:-1] == (TINY[0], watch.calls[0][1].n_queries)
        if not in_order and _is_routed(module):
            raise UnsupportedModelError(
                "its heads are routed (a mixture of attention heads): which query and output "
                "matrices a head uses differs from token to token, so what reads its outputs is "
                "not a matrix, and a head is not a fixed part of the model."
            )
        if whole is None:
            return None
        if not in_order:
            raise UnsupportedModelError(
                "what reads its head outputs takes them out of their order of examples and "
                "positions (e.g. a mixture of experts) and is not a matrix, so there is no W_O."
            )
    placed = {n: (blocks[n], m) for (m, _), n in zip(watch.calls, numbers, strict=True)}
    scales, channels = write_scales(watch, placed), dict[int, str | None]()
    if any(scale is None for scale in scales.values()):
        channels = channel_scales(watch, placed)
        scales |= {n: 1.0 for n, name in channels.items() if name is not None}
    for (module, _), number in zip(watch.calls, numbers, strict=True):
        norm, plain = _input_norm(watch, blocks[number], module)
        layers[number] = LayerParts(
            number,
            module,
            watch.projections[module],
            scales[number],
            norm,
            plain,
            channels.get(number),
        )
    head = _unembedding(model) if tiny.sequence == TEXT else _classifier(watch, logits)
    final = find_final_norm(head, watch, blocks)
    return Layout(
        shape,
        layers,
        blocks,
        final,
        (*_around(model, [module for module, _ in watch.calls]), *own),
        final_norm_uses=1 if final is None else watch.uses[final],
        logit_map=_logit_map(logits, head),
        mask=_mask_rule([call for _, call in watch.calls]),
        has_logits=has_logits,
        unembedding=head,
        grid=None if tiny.sequence == TEXT else _grid(model, blocks[numbers[0]], shape),
    )


def _is_routed(attention: nn.Module) -> bool:
    """Whether a matrix of attention is chosen among several: one weight holds them all."""
    parts = (one for one in attention.modules() if not isinstance(one, nn.Conv1d))
    return any(weight.ndim == 3 for one in parts for weight in one.parameters(recurse=False))


def _own_code(model: Any, tiny: Batch) -> tuple[OwnCode, ...]:
    """Modules in whose own code attention is computed, if there are any and they run."""
    kind = getattr(model.config, "attention_type", None)
    if isinstance(kind, str) and kind != "original_full":
        return ()  # big_bird changes its modules for good when it meets a short text

    def run() -> None:
        with pass_over(model):
            model(**arguments(model, tiny))

    try:
        modules = own_attention(model, run)
    except Exception:  # code of any family; what it cannot run on is said by what comes next
        return ()
    return (OwnCode(modules),) if modules else ()


def _around(model: Any, attentions: list[nn.Module]) -> tuple[Any, ...]:
    """Configs of attention modules and of what they are in: not those of a tower beside them."""
    names = {module: name for name, module in model.named_modules()}
    paths = [f"{names[one]}." for one in attentions]
    found = (
        config
        for module, name in names.items()
        if (config := getattr(module, "config", None)) is not None
        and (not name or any(path.startswith(f"{name}.") for path in paths))
    )
    return tuple({id(config): config for config in found}.values())


def _logit_map(logits: tuple[Tensor, Tensor] | None, head: Any) -> LogitMap | None:
    """What happens to the unembedding's outputs; identity if they are the logits."""
    if logits is None or head is None:
        return None
    entered, made = logits
    return LogitMap(1.0, None) if entered is made else measure_logit_map(entered, made)


def _refuse_towers(model: Any) -> None:
    """Refuse two models side by side, one for images and one for texts (clip).

    Raises:
        UnsupportedModelError: naming both.
    """
    sees, reads = (getattr(model, name, None) for name in ("vision_model", "text_model"))
    compared = hasattr(model, "logit_scale")
    if compared and isinstance(sees, nn.Module) and isinstance(reads, nn.Module):
        raise UnsupportedModelError(
            "it is two models side by side, one of images and one of texts, each with layers of "
            "its own: hs.vision.clip(model) loads both, with what makes their embeddings, and "
            "hs.load(model.vision_model) or hs.load(model.text_model) one of them."
        )


def halves(model: Any) -> tuple[Any, Any]:
    """Both halves of a model of images and texts (clip, siglip), as models of their own.

    They share the parameters; where a projection makes the embedding of a half, it comes along.

    Args:
        model: a transformers model with both.

    Raises:
        UnsupportedModelError: if it is not of that kind.
    """
    found = []
    for tower, projection in (
        ("vision_model", "visual_projection"),
        ("text_model", "text_projection"),
    ):
        half = getattr(model, tower, None)
        if not isinstance(half, nn.Module) or not hasattr(model, "logit_scale"):
            raise UnsupportedModelError("it is not a model of images beside one of texts.")
        made = half
        if isinstance(matrix := getattr(model, projection, None), nn.Module):
            kind = getattr(transformers, f"{type(half).__name__}WithProjection", None)
            if kind is None:
                raise UnsupportedModelError(
                    "transformers has no model of its halves with their projections."
                )
            with torch.device("meta"):
                made = kind(half.config)
            made.config = half.config
            setattr(made, tower, half)
            setattr(made, projection, matrix)
        found.append(made.eval() if not model.training else made)
    return found[0], found[1]


def unrolled(model: Any) -> Any:
    """The same model with a module for every run of shared layers (albert); others as they are.

    Layer n is the n-th run in a pass. The modules share the parameters of the model, which stays as
    it is: what changes its weights in place changes both.

    Args:
        model: a transformers model.
    """
    holder = next((one for one in model.modules() if hasattr(one, SHARED_GROUPS)), None)
    if holder is None or not isinstance(groups := getattr(holder, SHARED_GROUPS), nn.ModuleList):
        return model
    runs = model.config.num_hidden_layers
    shared: list[Any] = list(groups)
    order = [int(run / (runs / len(groups))) for run in range(runs)]
    kept: dict[int, Any] = {id(one): one for one in (*model.parameters(), *model.buffers())}
    made = copy.deepcopy(model, dict(kept))
    kept[id(model.config)] = made.config
    blocks = nn.ModuleList()
    for number in order:
        for place in range(len(shared[number].albert_layers)):
            block = copy.deepcopy(shared[number], dict(kept))
            block.albert_layers = nn.ModuleList([block.albert_layers[place]])
            blocks.append(block)
    setattr(made.get_submodule(_path(model, holder)), SHARED_GROUPS, blocks)
    made.config.num_hidden_layers = made.config.num_hidden_groups = len(blocks)
    made.config.inner_group_num = 1
    return made


def _path(model: nn.Module, part: nn.Module) -> str:
    """Name of a part of a model."""
    return next(str(name) for name, one in model.named_modules() if one is part)


def shares_layers(layout: Layout) -> bool:
    """Whether some layers have the same parameters and no others."""
    held = [frozenset(id(one) for one in block.parameters()) for block in layout.blocks]
    return len(set(held)) < len(held)


def _refuse_windows(watch: Watch, tiny: Batch) -> None:
    """Refuse attention whose examples are windows of an image.

    Raises:
        UnsupportedModelError: where they are.
    """
    counts = {(call.query.shape[0], call.n_queries) for _, call in watch.calls}
    if tiny.sequence != TEXT and (len(counts) > 1 or next(iter(counts))[0] != TINY[0]):
        raise UnsupportedModelError(_WINDOWS)


def body_of(model: Any) -> Any:
    """The model without its LM head; the model itself if that part takes no inputs."""
    body = getattr(model, "base_model", model)
    reads = getattr(model, "main_input_name", TOKENS)
    return body if reads in accepted(body) else model


def _vision_config(model: Any) -> Any:
    """Config that tells sizes of images, that of the tower in a model of two."""
    return getattr(model.config, "vision_config", None) or model.config


# Why swin and its like are refused.
_WINDOWS = (
    "its attention runs within windows of patches, or on fewer and fewer of them from layer to "
    "layer, so a head has no row over the patches of a whole image."
)


def tiny_images(model: Any) -> Batch:
    """Two small noise images of the model's input size.

    Raises:
        UnsupportedModelError: if its config does not tell that size.
    """
    config = _vision_config(model)
    if isinstance(getattr(config, "window_size", None), int | list | tuple):
        raise UnsupportedModelError(_WINDOWS)
    size = _pair(getattr(config, "image_size", None))
    if size is None:
        raise UnsupportedModelError(
            "its config has no image_size, so that headscope cannot tell which images it reads."
        )
    channels = getattr(config, "num_channels", None) or 3
    draw = torch.Generator().manual_seed(0)
    pixels = torch.randn(TINY[0], channels, *size, generator=draw, dtype=torch.float32)
    return Batch({PIXELS: pixels.to(device_of(model), model.dtype)}, {})


def _pair(size: Any) -> tuple[int, int] | None:
    """Height and width of what a config gives as a number or as two."""
    if isinstance(size, int):
        return size, size
    if isinstance(size, list | tuple) and len(size) == 2 and all(isinstance(n, int) for n in size):
        return size[0], size[1]
    return None


def _reading(model: Any) -> tuple[nn.Module, Tensor]:
    """Module with a weight that inputs come to first, and that weight."""
    try:
        first = model.get_input_embeddings()
    except NotImplementedError:  # as some classifiers of images; what reads pixels comes first
        first = model
    for module in first.modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor):
            return module, weight
    raise UnsupportedModelError("what reads its inputs has no weight.")


def device_of(model: Any) -> torch.device:
    """Device that a module expects its inputs on."""
    return runs_on(*_reading(model))


def arguments(model: Any, batch: Batch) -> dict[str, Any]:
    """How a module is called with a batch that has no padding.

    Args:
        model: a transformers model.
        batch: batch of texts or images.
    """
    place = device_of(model)
    if batch.sequence == PATCHES:
        return {PIXELS: batch.inputs[PIXELS].to(place, model.dtype)}
    return {TOKENS: batch.tokens.to(place), "use_cache": False}


def image_arguments(
    model: Any, beside: Mapping[str, Tensor], place: torch.device
) -> dict[str, Tensor]:
    """What a vision-language model is called with beside tokens, as its processor gives it.

    Args:
        model: a transformers model.
        beside: images and what goes with them, by text; see :class:`headscope.base.batches.Batch`.
        place: where they go.
    """
    pixels = beside[PIXELS].to(place, model.dtype)
    found = {name: value.to(place) for name, value in beside.items() if name != PIXELS}
    if GRID in found:
        counts = found[GRID].prod(-1).sum(-1)
        kept = torch.arange(pixels.shape[1], device=place)[None] < counts[:, None]
        return {**found, PIXELS: pixels[kept], GRID: found[GRID].flatten(0, 1)}
    tiled = "pixel_attention_mask" in accepted(model) or hasattr(
        model.config, "image_grid_pinpoints"
    )
    if pixels.ndim > (5 if tiled else 4):
        pixels = pixels.flatten(0, 1)
    if "image_sizes" in found and found["image_sizes"].ndim > 2:
        found["image_sizes"] = found["image_sizes"].flatten(0, 1)
    return {**found, PIXELS: pixels}


@torch.no_grad()
def _grid(model: Any, block: nn.Module, shape: ModelShape) -> PatchGrid:
    """Where the patches of an image stand, measured: a change of one changes one position.

    Raises:
        UnsupportedModelError: if they do not stand row by row behind some special tokens.
    """
    size, patch = (
        _pair(getattr(_vision_config(model), n, None)) for n in ("image_size", "patch_size")
    )
    if size is None or patch is None:
        raise UnsupportedModelError("its config does not tell how images are cut into patches.")
    rows, columns = size[0] // patch[0], size[1] // patch[1]
    positions = shape.n_ctx or 0
    first = positions - rows * columns
    places = sorted({0, 1, columns, rows * columns - 1} & set(range(rows * columns)))
    base = tiny_images(model).inputs[PIXELS][:1].repeat(len(places) + 1, 1, 1, 1)
    for number, place in enumerate(places, 1):
        top, left = place // columns * patch[0], place % columns * patch[1]
        base[number, :, top : top + patch[0], left : left + patch[1]] += 1.0
    entered: list[Tensor] = []

    def stop(stream: Tensor) -> None:
        entered.append(stream)
        raise Finished

    with pass_over(model), hooked([entering(block, stop)]), suppress(Finished):
        model(**arguments(model, Batch({PIXELS: base}, {})))
    changed = (entered[0][1:] != entered[0][:1]).any(-1)
    expected = torch.zeros_like(changed)
    if first >= 0:
        expected[range(len(places)), [first + place for place in places]] = True
    if first < 0 or not torch.equal(changed, expected):
        raise UnsupportedModelError(
            f"its {positions} positions are not the {rows} x {columns} patches of an image, row by "
            "row behind special tokens, so that none can be said to be a place in the image."
        )
    channels = base.shape[1]
    return PatchGrid(rows, columns, *patch, channels=channels, specials=_specials(model, first))


def _specials(model: Any, count: int) -> tuple[str, ...]:
    """What the tokens in front of the patches are called."""
    registers = int(getattr(_vision_config(model), "num_register_tokens", None) or 0)
    named = ["class", *(f"register {number}" for number in range(1, registers + 1))]
    if count == 2 and not registers:
        named.append("distillation")
    named += [f"special {number}" for number in range(len(named), count)]
    return tuple(named[:count])


def _classifier(watch: Watch, logits: tuple[Tensor, Tensor] | None) -> Any:
    """Matrix whose outputs are the logits of classes; None if there is none."""
    if logits is None:
        return None
    found = [
        module
        for module, output in watch.outputs.items()
        if getattr(getattr(module, "weight", None), "ndim", 0) == 2 and _same(output, logits[1])
    ]
    return found[-1] if found else None


def tiny_batch(model: Any) -> Batch:
    """Two small examples of what a model reads, on its device."""
    if getattr(model, "main_input_name", TOKENS) == PIXELS:
        return tiny_images(model)
    return Batch({TOKENS: tiny_tokens(model)}, {})


def tiny_tokens(model: Any) -> Tensor:
    """Return a small batch of distinct valid token ids on the model's input device."""
    module = model.get_input_embeddings()
    embedding: Tensor = module.weight
    return Batch.tiny(embedding.shape[0]).inputs[TOKENS].to(runs_on(module, embedding))


@contextmanager
def watching(model: nn.Module, configs: tuple[Any, ...]) -> Iterator[Watch]:
    """Scope in which a pass without gradients notes what the modules of a model do."""
    watch = Watch()
    open_calls: list[nn.Module] = []

    def handler(module: nn.Module, call: AttentionCall) -> Tensor:
        watch.calls.append((module, call))
        open_calls.append(module)
        return fused(call)

    def note(module: nn.Module, call: Call, output: Any) -> None:
        weight = getattr(module, "weight", None)
        is_matrix = isinstance(weight, Tensor) and weight.ndim == 2
        if is_matrix and open_calls and isinstance(output, Tensor):
            watch.inside.setdefault(open_calls[-1], []).append(module)
        watch.note(module, call, output)
        if open_calls and module is open_calls[-1] and module in watch.inside:
            open_calls.pop()

    notes = hooked(after(module, note) for module in model.modules())
    with pass_over(model), notes, routed(configs, handler), torch.no_grad():
        yield watch


def _watch(
    model: Any, configs: tuple[Any, ...], tiny: Batch
) -> tuple[Watch, tuple[Tensor, Tensor] | None, bool]:
    """One pass of two small examples: what modules did, logits of known unembedding outputs.

    Returns:
        Also whether the module gives logits of tokens at all.
    """
    unembedding, entered = _unembedding(model) if tiny.sequence == TEXT else None, []

    def known(_module: nn.Module, _call: Call, output: Any) -> Any:
        entered.append(ramp(output))
        return entered[-1]

    ramped = [unembedding] if isinstance(unembedding, nn.Module) else []
    with watching(model, configs) as watch, hooked(after(one, known, first=True) for one in ramped):
        output = model(**arguments(model, tiny))
    logits = answer(output)
    if tiny.sequence != TEXT:
        classes = getattr(output, "logits", None)
        told = isinstance(classes, Tensor) and classes.ndim == 2 and len(classes) == TINY[0]
        return watch, (logits, logits) if told else None, told
    told = isinstance(unembedding, nn.Module) and logits.shape[:-1] == TINY
    return watch, (entered[0], logits) if told and len(entered) == 1 else None, told


def _unembedding(model: Any) -> Any:
    """Module that computes logits; None in a model without an LM head."""
    try:
        return model.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        return None


def choose_projections(watch: Watch, names: Mapping[nn.Module, str]) -> None:
    """Of the matrices after each attention call, the one that makes what the layer writes.

    With everything that is wrapped around it: a module that is given the same tensor and nothing
    else (an adapter beside a matrix) is the projection, and not the matrix in it.

    Raises:
        UnsupportedModelError: if two layers share one.
    """
    by_name = {name: module for module, name in names.items()}
    for attention, matrices in watch.inside.items():
        made = watch.outputs.get(attention)
        chosen = next(
            (m for m in reversed(matrices) if made is not None and _same(watch.outputs[m], made)),
            matrices[0],
        )
        given, parent = watch.inputs.get(chosen), names[chosen].rpartition(".")[0]
        while (around := by_name[parent]) is not attention and around in watch.single:
            if watch.inputs.get(around) is not given:
                break
            chosen, parent = around, parent.rpartition(".")[0]
        watch.projections[attention], watch.writes[attention] = chosen, watch.outputs[chosen]
    if len(set(watch.projections.values())) != len(watch.projections):
        raise UnsupportedModelError("several of its layers share one output projection.")


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a, b)


def number_layers(
    model: Any,
    attentions: list[nn.Module],
    names: dict[nn.Module, str],
    uses: Mapping[nn.Module, int],
) -> tuple[nn.ModuleList, list[int]]:
    """Layer numbers from the positions of attention modules in the list of blocks."""
    numbers, lists = [], []
    for module in attentions:
        path = names[module].split(".")
        place = next(i for i, part in enumerate(path) if part.isdigit())
        lists.append(".".join(path[:place]))
        numbers.append(int(path[place]))
    if any(uses[module] > 1 for module in attentions if attentions.count(module) > 1):
        raise UnsupportedModelError(
            "its layers share one set of weights, which it runs more than once in a pass "
            "(recurrent depth), so a head has more than one row for a query."
        )
    if any(one is other for one, other in pairwise(attentions)):
        raise UnsupportedModelError(
            "its layers call attention more than once (as differential attention does), so a head "
            "has more than one row for a query."
        )
    if len(set(attentions)) != len(attentions):
        raise UnsupportedModelError(
            "it runs the same layers more than once in a pass (recurrent depth), so a head has "
            "more than one row for a query."
        )
    if len(set(lists)) != 1 or len(set(numbers)) != len(numbers):
        found = ", ".join(sorted(set(lists)))
        raise UnsupportedModelError(
            f"its attention stands in more than one list of layers ({found}), so its heads cannot "
            "be numbered by layer."
        )
    blocks = model.get_submodule(lists[0])
    return blocks, numbers


# Below this, what is added to scores hides keys.
_HIDES = -1e4


def _refuse_biases(calls: list[AttentionCall], own_code: bool) -> None:
    """Refuse a bias that hides keys, or, in code of a family's own, that depends on the text.

    Raises:
        UnsupportedModelError: where it does.
    """
    for bias in (call.bias for call in calls if call.bias is not None):
        if not bool((bias > _HIDES).all()):
            raise UnsupportedModelError(
                "it builds an attention mask of its own, in what it adds to its scores."
            )
        if own_code and not bool((bias == bias[:1]).all()):
            raise UnsupportedModelError(
                "what it adds to its scores depends on the text and not on positions alone (as "
                "disentangled attention does), so no product of queries and keys gives its rows."
            )


def _mask_rule(calls: list[AttentionCall]) -> MaskRule:
    """Rule of all layers, windows apart.

    Raises:
        UnsupportedModelError: if some layers see later keys and others do not.
    """
    kinds = {call.mask.kind for call in calls}
    if len(kinds) != 1:
        raise UnsupportedModelError(
            "some of its layers see later tokens and others do not, so that it has no mask rule "
            "by which its heads could be compared."
        )
    return MaskRule(kinds.pop())


def _shape(
    model: Any,
    watch: Watch,
    blocks: nn.ModuleList,
    numbers: list[int],
    logits: tuple[Tensor, Tensor] | None,
) -> ModelShape:
    calls = [call for _, call in watch.calls]
    head_shapes = {(c.query.shape[1], c.key.shape[1], c.value.shape[3]) for c in calls}
    if len(head_shapes) != 1:
        raise UnsupportedModelError("its layers differ in their number or size of heads.")
    if any(call.query.shape[3] != call.value.shape[3] for call in calls):
        raise UnsupportedModelError(
            "it uses multi-head latent attention, whose queries and values differ in size."
        )
    n_heads, n_kv_heads, d_head = next(iter(head_shapes))
    windows: list[int | None] = [None] * len(blocks)
    for number, call in zip(numbers, calls, strict=True):
        windows[number] = call.mask.window
    width = None if logits is None else logits[1].shape[-1]
    if getattr(model, "main_input_name", TOKENS) == PIXELS:
        n_ctx: int | None = calls[0].n_queries
        d_vocab, stack = width or 0, "vision"
    else:
        config = model.config.get_text_config()
        n_ctx, stack = getattr(config, "max_position_embeddings", None), ""
        if n_ctx is not None:
            n_ctx -= _first_place(watch, n_ctx)
        d_vocab = model.get_input_embeddings().weight.shape[0]
    return ModelShape(
        n_layers=len(blocks),
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        d_model=watch.inputs[blocks[numbers[0]]].shape[-1],
        d_head=d_head,
        d_vocab=d_vocab,
        n_ctx=n_ctx,
        turns_at=turning_length(model.config.get_text_config()),
        d_vocab_out=None if width == d_vocab else width,
        stack=stack,
        attention_layers=tuple(numbers),
        windows=tuple(windows),
        removed=frozenset(
            HeadIndex(number, head, stack)
            for (module, _), number in zip(watch.calls, numbers, strict=True)
            if (kept := heads_left(module)) is not None
            for head in set(range(n_heads)) - set(kept.heads)
        ),
    )


def _first_place(watch: Watch, size: int) -> int:
    """Row of a table of positions that the first token takes; some begin with padding (roberta)."""
    counted = torch.arange(TINY[1])
    for table, rows in watch.looked_up.items():
        if table.num_embeddings == size and rows.shape[-1] == TINY[1]:
            first = int(rows.min())
            if torch.equal(rows.cpu() - first, counted.expand(rows.shape)):
                return first
    return 0


def _input_norm(
    watch: Watch, block: nn.Module, attention: nn.Module
) -> tuple[nn.Module | None, bool]:
    """Module between the block's input and attention's, and whether they are the same."""
    read, entering = watch.inputs.get(attention), watch.inputs.get(block)
    if read is None or entering is None:
        return None, False
    if torch.equal(read, entering):
        return None, True
    for module in block.modules():
        given, output = watch.inputs.get(module), watch.outputs.get(module)
        if (
            given is not None
            and output is not None
            and module not in (block, attention)
            and output.shape == read.shape
            and torch.equal(output, read)
            and torch.equal(given, entering)
        ):
            return module, False
    return None, False


def find_final_norm(head: Any, watch: Watch, blocks: nn.ModuleList) -> nn.Module | None:
    """Norm between the last block and the unembedding ``head``; None if there is no plain norm."""
    read = watch.inputs.get(head)
    if read is None:
        return None
    norms = [
        module
        for module, output in watch.outputs.items()
        if _may_be_norm(module, watch)
        and output.ndim in (read.ndim, read.ndim + 1)
        # A classifier of images reads the first position alone.
        and _same(output if read.ndim == output.ndim else output[:, 0], read)
    ]
    if not norms or not _reads_stream(watch, norms[-1], blocks):
        return None
    return norms[-1]


def _reads_stream(watch: Watch, norm: nn.Module, blocks: nn.ModuleList) -> bool:
    """Whether the norm reads what the last block returns.

    Not so where a prediction head comes first (bert), or several streams are joined (gemma3n).
    """
    given, made = watch.inputs.get(norm), watch.outputs.get(blocks[-1])
    if given is None or made is None or given.numel() != made.numel():
        return False
    return torch.equal(given, made.reshape(given.shape))


def _may_be_norm(module: nn.Module, watch: Watch) -> bool:
    """Whether it has one number per direction, or (olmo's norm) none, but changes its input."""
    weight = getattr(module, "weight", None)
    if weight is not None:
        return isinstance(weight, Tensor) and weight.ndim == 1
    bare = not any(module.children()) and not any(True for _ in module.parameters())
    given, made = watch.inputs.get(module), watch.outputs[module]
    return bare and given is not None and given.shape == made.shape and not torch.equal(given, made)
