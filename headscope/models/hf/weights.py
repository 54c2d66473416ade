"""Per-head attention weights: reading them from a model, and writing a new model."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from headscope.errors import UnsupportedModelError
from headscope.models.attention import AttentionCall, fused
from headscope.models.hf.hooks import Call, after, before, hooked
from headscope.models.hf.interface import routed
from headscope.models.hf.layout import LayerParts, arguments, body_of, tiny_batch
from headscope.models.hf.removed import ReadsKept, heads_left
from headscope.models.running import at_hand, need_gradients, parameter, pass_over
from headscope.views import HeadWeights

if TYPE_CHECKING:
    from headscope.models.hf.model import HFModel


Projection = Literal["query", "key", "value"]
Owner = tuple[Projection, int]
Owners = list[Owner | None]
SITES: tuple[Projection, ...] = ("query", "key", "value")

# How far the ratio of two signed sums may be from a sign. Where heads mix, it is far from both.
_TOLERANCE = 0.02
_HALF_TOLERANCE = 0.3


@dataclass
class _Watched:
    """Outputs of the matrices of each layer, what it read, and the call that they led to."""

    outputs: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    reads: dict[int, Tensor] = field(default_factory=dict)
    calls: dict[int, AttentionCall] = field(default_factory=dict)


def find_owners(model: "HFModel") -> dict[int, dict[str, list[Owner]]]:
    """Site and head (key/value head for keys and values) of every output, by layer and module.

    Raises:
        UnsupportedModelError: if an output serves several heads, or none.
    """
    need_gradients(model.module, model.name)
    with pass_over(model.module), torch.enable_grad():
        watched = _watch(model)
        try:
            return {
                layer: _whole(model, layer, outputs, watched.calls[layer])
                for layer, outputs in watched.outputs.items()
            }
        except _MixedError as error:
            raise UnsupportedModelError(
                f"{model.name} ({model.module.config.model_type}) cannot be pruned: {error}, so "
                "removing one would change the others. Ablate its heads instead."
            ) from error


def find_readers(model: "HFModel", layers: Sequence[int]) -> dict[int, dict[str, Owners] | str]:
    """The same of the maps that read attention's input, adapters and wrappers around them included.

    Norms of queries and keys, also those over all heads together, are held fixed, so that an
    output belongs to the head whose number it becomes.

    Returns:
        By layer, the owners of every output, by module (None: it becomes no query, key or value,
        like a gate); or, where they cannot be told, the reason.
    """
    need_gradients(model.module, model.name)
    with pass_over(model.module), torch.enable_grad():
        watched = _watch(model, readers=True)
        found: dict[int, dict[str, Owners] | str] = {}
        for layer in layers:
            try:
                found[layer] = _owners(model, layer, watched.outputs[layer], watched.calls[layer])
            except _MixedError as error:
                found[layer] = str(error)
        return found


def matrices(parts: LayerParts) -> Iterator[tuple[str, nn.Module]]:
    """Matrices of an attention module that work on its input, by name."""
    for name, module in parts.attention.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.ndim == 2 and module is not parts.projection:
            yield name, module


def _watch(model: "HFModel", readers: bool = False) -> _Watched:
    """One tiny pass whose graph starts at the outputs of matrices.

    Args:
        model: model to run.
        readers: take the modules that read attention's input instead of all that hold a matrix,
            and hold what norms divide by fixed.
    """
    watched = _Watched({layer: {} for layer in model.layout.layers})
    by_attention = model.layout.by_attention()

    def enter(module: nn.Module, call: Call) -> None:
        watched.reads[by_attention[module].layer] = call.stream

    def keep(layer: int, name: str) -> Callable[..., Tensor | None]:
        def hook(_module: nn.Module, call: Call, output: Any) -> Tensor | None:
            if readers and not _reads(watched.reads.get(layer), call, output):
                return _held_fixed(call, output)
            # A leaf, so that the derivative stops here.
            watched.outputs[layer][name] = output.detach().requires_grad_()
            return watched.outputs[layer][name].clone()  # some families write over it (clip_qkv)

        return hook

    def attend(module: nn.Module, call: AttentionCall) -> Tensor:
        watched.calls[by_attention[module].layer] = call
        return fused(call).detach()

    with ExitStack() as stack:
        for layer, parts in model.layout.layers.items():
            named = inside(parts) if readers else matrices(parts)
            hooks = [after(module, keep(layer, name)) for name, module in named]
            stack.enter_context(hooked([before(parts.attention, enter), *hooks]))
        stack.enter_context(routed(model.layout.configs, attend, by_attention))
        body_of(model.module)(**arguments(model.module, tiny_batch(model.module)))
    return watched


def inside(parts: LayerParts) -> Iterator[tuple[str, nn.Module]]:
    """Modules of an attention module but for its output projection, by name."""
    beside = set(parts.projection.modules())
    for name, module in parts.attention.named_modules():
        if module is not parts.attention and module not in beside:
            yield name, module


def only_tensor(call: Call) -> Tensor | None:
    """The one thing that a module was given, if it is a tensor; None is nothing."""
    given = [one for one in (*call.args, *call.kwargs.values()) if one is not None]
    return given[0] if len(given) == 1 and isinstance(given[0], Tensor) else None


def _reads(read: Tensor | None, call: Call, output: Any) -> bool:
    """Whether a module was given attention's input and nothing else, and makes vectors of it."""
    given = only_tensor(call)
    return (
        read is not None
        and given is not None
        and isinstance(output, Tensor)
        and given.numel() == read.numel()
        and output.shape[:-1] == given.shape[:-1]
        and torch.equal(given.reshape(read.shape), read)
        and not (output.shape == given.shape and torch.equal(output, given))
    )


def _held_fixed(call: Call, output: Any) -> Tensor | None:
    """The output of a module that keeps a shape, as its input times numbers that do not change."""
    given = only_tensor(call)
    if given is None or not isinstance(output, Tensor):
        return None
    if given.shape != output.shape or not given.requires_grad:
        return None
    made, x = output.detach(), given.detach()
    ratio = torch.where(x == 0, 1.0, made / torch.where(x == 0, 1.0, x))
    return made + (given - x) * ratio


def _whole(
    model: "HFModel", layer: int, outputs: dict[str, Tensor], call: AttentionCall
) -> dict[str, list[Owner]]:
    """Owners of matrices of which every output serves one head."""
    found = {}
    for name, owners in _owners(model, layer, outputs, call).items():
        found[name] = [owner for owner in owners if owner is not None]
        if len(found[name]) < len(owners):
            raise _MixedError(layer, name)
    return found


def _owners(
    model: "HFModel", layer: int, outputs: dict[str, Tensor], call: AttentionCall
) -> dict[str, Owners]:
    """Owners of every output of the matrices that make queries, keys or values."""
    owners: dict[str, Owners] = {name: [None] * out.shape[-1] for name, out in outputs.items()}
    given: tuple[tuple[Projection, Tensor], ...] = (
        ("query", call.query),
        ("key", call.key),
        ("value", call.value),
    )
    for site, value in given:
        numbers = _numbers(model, layer, value, outputs)
        for name, heads in numbers.items():
            for at, head in heads.items():
                if owners[name][at] is not None:
                    raise _MixedError(layer, name)
                owners[name][at] = (site, head)
        have = Counter(head for heads in numbers.values() for head in heads.values())
        whole = set(have.values()) == {value.shape[3]} and len(have) == value.shape[1]
        pruned = any(head.layer == layer for head in model.shape.removed)
        # What is left after pruning may be some heads, and a key/value head several times.
        if not (whole or (pruned and all(n % value.shape[3] == 0 for n in have.values()))):
            raise _MixedError(layer, site)
    return {name: one for name, one in owners.items() if any(one)}


def _numbers(
    model: "HFModel",
    layer: int,
    value: Float[Tensor, "batch head pos d_head"],
    outputs: Mapping[str, Float[Tensor, "*any out"]],
) -> dict[str, dict[int, int]]:
    """Head that each output reaches at one site, for those that reach any, by module."""
    heads = torch.arange(value.shape[1], device=value.device)
    weights = torch.randn(
        value.shape, generator=torch.Generator().manual_seed(layer), dtype=torch.float32
    )
    weighted = (value.float() * weights.to(value.device)).sum((0, 2, 3))
    if not outputs or not weighted.requires_grad:
        return {}

    def derivatives(signs: Tensor) -> dict[str, Tensor]:
        total = (weighted * signs).sum()
        found = torch.autograd.grad(
            total, list(outputs.values()), retain_graph=True, allow_unused=True
        )
        pairs = zip(outputs, found, strict=True)
        return {name: one.float().flatten(0, -2) for name, one in pairs if one is not None}

    every = derivatives(torch.ones_like(weighted))
    parts = [
        derivatives((heads >> bit & 1) * 2.0 - 1.0)
        for bit in range((value.shape[1] - 1).bit_length())
    ]
    exact = model.dtype in (torch.float32, torch.float64)
    tolerance = _TOLERANCE if exact else _HALF_TOLERANCE
    return {
        name: _spelled(layer, one, [part[name] for part in parts], tolerance)
        for name, one in every.items()
    }


def _spelled(
    layer: int,
    every: Float[Tensor, "row out"],
    parts: Sequence[Float[Tensor, "row out"]],
    tolerance: float,
) -> dict[int, int]:
    """Heads of the outputs of one module, whose bits are the signs of its derivatives."""
    reached = every.any(0)
    number = torch.zeros(every.shape[1], dtype=torch.long, device=every.device)
    furthest = torch.zeros((), device=every.device)
    for bit, part in enumerate(parts):
        ratio = (part * every).sum(0) / every.square().sum(0).clamp_min(1e-30)
        away = (part - ratio.sign() * every).norm(dim=0) / every.norm(dim=0).clamp_min(1e-30)
        furthest = torch.maximum(furthest, away.where(reached, 0.0).max())
        number += (ratio > 0).long() << bit
    if not float(furthest) <= tolerance:
        raise _MixedError(layer, "queries and keys")
    by_output = torch.where(reached, number, -1).tolist()
    return {at: head for at, head in enumerate(by_output) if head >= 0}


class _MixedError(Exception):
    """An output serves several heads, or a head lacks some of its numbers."""

    def __init__(self, layer: int, what: str) -> None:
        super().__init__(
            f"in layer {layer} what makes its {what} does not divide by heads (e.g. a norm over "
            "all heads together)"
        )


# Rows of the identity that pass a module at a time.
_ROWS = 1024


def projection_matrix(projection: nn.Module, width: int) -> Float[Tensor, "in out"]:
    """Matrix M of ``projection(z) = z @ M + bias``.

    A plain ``Linear`` or ``Conv1D`` shows its weight. Anything else (adapters beside a matrix,
    quantised weights with scales) is measured: the identity is sent through it.

    Args:
        projection: the module.
        width: length of its input.
    """
    weight = getattr(projection, "weight", None)
    if isinstance(projection, ReadsKept) or _is_plain(projection):
        stored = parameter(projection, "weight") if weight is None or weight.is_meta else weight
        return (stored.T if isinstance(projection, nn.Linear) else stored).detach()
    rows = torch.eye(width, dtype=_dtype(projection), device=_device(projection))
    return torch.cat([_through(projection, part) for part in rows.split(_ROWS)]) - _through(
        projection, torch.zeros_like(rows[:1])
    )


def bias(projection: nn.Module, width: int) -> Float[Tensor, " out"] | None:
    """What the module returns for a head output of zeros; None if it is plain and has no bias."""
    if isinstance(projection, ReadsKept) or _is_plain(projection):
        with at_hand(projection):
            given = getattr(projection, "bias", None)
            return given.detach() if isinstance(given, Tensor) else None
    zeros = torch.zeros(1, width, dtype=_dtype(projection), device=_device(projection))
    return _through(projection, zeros)[0]


def _is_plain(projection: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    weight = getattr(projection, "weight", None)
    own = type(projection).forward
    return (
        isinstance(weight, Tensor)
        and weight.is_floating_point()
        and (own is nn.Linear.forward or own is Conv1D.forward)
    )


@torch.no_grad()
def _through(projection: nn.Module, rows: Float[Tensor, "row in"]) -> Float[Tensor, "row out"]:
    """Send rows through a module past its hooks, which may be edits that run now.

    Raises:
        UnsupportedModelError: if it is something else than a map of each row.
    """
    try:
        found = projection.forward(rows[None])
    except Exception as error:  # code of any family
        raise _no_matrix(projection) from error
    if not isinstance(found, Tensor) or found.ndim != 3 or len(found[0]) != len(rows):
        raise _no_matrix(projection)
    return found[0]


def _no_matrix(projection: nn.Module) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"what reads its head outputs is a {type(projection).__name__} and not a matrix (e.g. a "
        "mixture of experts), so there is no W_O per head."
    )


def _dtype(projection: nn.Module) -> torch.dtype:
    """Floating type of the module, fp32 if it holds none."""
    tensors = [*projection.parameters(), *projection.buffers()]
    return next((t.dtype for t in tensors if t.is_floating_point()), torch.float32)


def _device(projection: nn.Module) -> torch.device:
    tensors = [*projection.parameters(), *projection.buffers()]
    return tensors[0].device if tensors else torch.device("cpu")


@dataclass(frozen=True, eq=False)
class InputSource:
    """Where one layer's queries, keys or values come from.

    Attributes:
        name: name of the module that reads attention's input, inside the attention module.
        outputs: its outputs that are each head's numbers, in order; -1 where a head was pruned.
    """

    name: str
    outputs: Int[Tensor, "head d_head"]

    def of_heads(self, values: Float[Tensor, "*any out"]) -> Float[Tensor, "*any head d_head"]:
        """Each head's share of something that has an entry for every output of the module."""
        places = self.outputs.flatten()
        first, count, shape = int(places[0]), len(places), tuple(self.outputs.shape)
        if first >= 0 and torch.equal(places, torch.arange(first, first + count)):
            run: Tensor = values[..., first : first + count].unflatten(-1, shape)
            return run
        chosen = places.to(values.device)
        picked: Tensor = values[..., chosen.clamp_min(0)].masked_fill(chosen < 0, 0.0)
        by_head: Tensor = picked.unflatten(-1, shape)
        return by_head


Sources = dict[Projection, InputSource]


def find_sources(model: "HFModel") -> dict[int, Sources | str]:
    """Sources of every attention layer's queries, keys and values; or why they cannot be told."""
    found: dict[int, Sources | str] = {}
    readers = find_readers(model, model.shape.attention_layers)
    for layer in model.layout.layers:
        owners = readers[layer]
        if isinstance(owners, str):
            found[layer] = owners
            continue
        found[layer] = _sources(model, layer, owners)
    return found


def _sources(model: "HFModel", layer: int, owners: Mapping[str, Owners]) -> Sources | str:
    shape = model.shape
    sources: Sources = {}
    for site in SITES:
        heads = shape.n_heads if site == "query" else shape.n_kv_heads
        making = [name for name, one in owners.items() if any(o and o[0] == site for o in one)]
        if len(making) != 1:
            return f"in layer {layer} several matrices make its {site} together"
        outputs = torch.full((heads, shape.d_head), -1)
        for head in range(heads):
            own = [at for at, owner in enumerate(owners[making[0]]) if owner == (site, head)]
            if own:
                outputs[head] = torch.tensor(own[: shape.d_head])
        sources[site] = InputSource(making[0], outputs)
    return sources


def read_weights(model: "HFModel", layer: int, sources: Sources, width: int) -> HeadWeights:
    """Current attention weights of one layer.

    Args:
        model: model that they belong to.
        layer: the model's layer number.
        sources: sources of the layer's queries, keys and values.
        width: length of the vectors that attention reads.
    """
    sides = {}
    for site, name in zip(SITES, "QKV", strict=True):
        source = sources[site]
        module = model.layout.layers[layer].attention.get_submodule(source.name)
        read, constant = source.of_heads(projection_matrix(module, width)), bias(module, width)
        sides[f"W_{name}"] = read.permute(1, 0, 2)
        sides[f"b_{name}"] = (
            read.new_zeros(source.outputs.shape) if constant is None else source.of_heads(constant)
        )
    return HeadWeights(**sides, **_output_side(model, layer))


def _output_side(model: "HFModel", layer: int) -> dict[str, Tensor]:
    """``W_O`` and ``b_O``: before a norm after attention, and before a residual multiplier."""
    projection, shape = model.layout.layers[layer].projection, model.shape
    weight = projection_matrix(projection, shape.n_heads * shape.d_head)
    by_head = weight.reshape(-1, shape.d_head, weight.shape[-1])
    kept = heads_left(projection)
    return {
        "W_O": by_head if kept is None else kept.spread(by_head, 0),
        "b_O": model.parts.projection_bias(layer),
    }


def not_by_head(model: "HFModel", reason: str) -> UnsupportedModelError:
    """Error for a layer whose weights cannot be separated by head."""
    return UnsupportedModelError(
        f"{model.name} has no weights per head that its activations confirm: {reason}."
    )


# Base of the rotary frequencies: so large that only the first quarter of the planes turns.
ROTARY_BASE = 1e30


@dataclass(frozen=True, eq=False)
class WrittenLayer:
    """Weights of one block. Keys and values are per key/value head; vectors are rows.

    Attributes:
        W_Q, W_K, W_V, W_O: attention weights.
        b_Q, b_K: biases of queries and keys (the rotary planes of Llama use them).
        W_in, b_in, W_out: a ReLU MLP, ``relu(x W_in + b_in) W_out``.
        norm_1, norm_2: multipliers of the norms before attention and before the MLP.
    """

    W_Q: Float[Tensor, "head d_model d_head"]
    W_K: Float[Tensor, "kv_head d_model d_head"]
    W_V: Float[Tensor, "kv_head d_model d_head"]
    W_O: Float[Tensor, "head d_head d_model"]
    b_Q: Float[Tensor, "head d_head"]
    b_K: Float[Tensor, "kv_head d_head"]
    W_in: Float[Tensor, "d_model d_mlp"]
    b_in: Float[Tensor, " d_mlp"]
    W_out: Float[Tensor, "d_mlp d_model"]
    norm_1: float
    norm_2: float


@dataclass(frozen=True, eq=False)
class WrittenModel:
    """Weights of a whole model; ``positions`` is None for a rotary one."""

    embedding: Float[Tensor, "d_vocab d_model"]
    positions: Float[Tensor, "pos d_model"] | None
    layers: Sequence[WrittenLayer]
    norm: float
    unembedding: Float[Tensor, "d_vocab d_model"]


def rotary_frequencies(d_head: int) -> Float[Tensor, " plane"]:
    """Return the angle by which one position turns each rotary plane of a written Llama."""
    return ROTARY_BASE ** (-2 * torch.arange(d_head // 2, dtype=torch.float64) / d_head)


def gpt2(weights: WrittenModel, length: int) -> Any:
    """Build a ``GPT2LMHeadModel`` with these weights; every layer has the same head size.

    Args:
        weights: with ``positions``; ``d_model = n_heads * d_head``.
        length: context length.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    first, d_mlp = weights.layers[0], _d_mlp(weights)
    config = GPT2Config(
        vocab_size=len(weights.embedding), n_positions=length, n_embd=weights.embedding.shape[1],
        n_layer=len(weights.layers), n_head=len(first.W_Q), n_inner=d_mlp,
        activation_function="relu", tie_word_embeddings=False, bos_token_id=0, eos_token_id=0,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    model = _zeros(GPT2LMHeadModel(config))
    body, unit = model.transformer, first.W_Q.shape[2] ** 0.5
    _put(body.wte.weight, weights.embedding)
    if weights.positions is not None:
        _put(body.wpe.weight, weights.positions)
    for block, layer in zip(body.h, weights.layers, strict=True):
        reads = [layer.W_Q * unit, layer.W_K, layer.W_V]
        fused = torch.cat([part.transpose(0, 1).flatten(1) for part in reads], 1)
        _put(block.attn.c_attn.weight, fused)
        biases = torch.cat([layer.b_Q.flatten() * unit, layer.b_K.flatten()])
        _put(block.attn.c_attn.bias[: len(biases)], biases)
        _put(block.attn.c_proj.weight, layer.W_O.flatten(0, 1))
        units = len(layer.b_in)
        _put(block.mlp.c_fc.weight[:, :units], layer.W_in)
        _put(block.mlp.c_fc.bias[:units], layer.b_in)
        _put(block.mlp.c_proj.weight[:units], layer.W_out)
        block.ln_1.weight.fill_(layer.norm_1)
        block.ln_2.weight.fill_(layer.norm_2)
    body.ln_f.weight.fill_(weights.norm)
    _put(model.lm_head.weight, weights.unembedding)
    return model


def llama(weights: WrittenModel, length: int) -> Any:
    """Build a ``LlamaForCausalLM`` with these weights; key/value heads may be fewer than heads.

    Args:
        weights: without ``positions``; the planes that turn are those of
            :func:`rotary_frequencies`.
        length: context length.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    first, d_mlp = weights.layers[0], _d_mlp(weights)
    d_model, d_head = first.W_Q.shape[1:]
    config = LlamaConfig(
        vocab_size=len(weights.embedding), hidden_size=d_model, head_dim=d_head,
        intermediate_size=d_mlp, num_hidden_layers=len(weights.layers),
        num_attention_heads=len(first.W_Q), num_key_value_heads=len(first.W_K),
        max_position_embeddings=length, attention_bias=True, mlp_bias=True, hidden_act="relu",
        tie_word_embeddings=False, bos_token_id=0, eos_token_id=0,
        rope_parameters={"rope_type": "default", "rope_theta": ROTARY_BASE},
    )  # fmt: skip
    model = _zeros(LlamaForCausalLM(config))
    body, unit = model.model, d_head**0.5
    _put(body.embed_tokens.weight, weights.embedding)
    for block, layer in zip(body.layers, weights.layers, strict=True):
        attention, mlp = block.self_attn, block.mlp
        _put(attention.q_proj.weight, _stacked(layer.W_Q) * unit)
        _put(attention.k_proj.weight, _stacked(layer.W_K))
        _put(attention.v_proj.weight, _stacked(layer.W_V))
        _put(attention.q_proj.bias, layer.b_Q.flatten() * unit)
        _put(attention.k_proj.bias, layer.b_K.flatten())
        _put(attention.o_proj.weight, layer.W_O.flatten(0, 1).T)
        units = len(layer.b_in)
        _put(mlp.gate_proj.weight[:units], layer.W_in.T)
        _put(mlp.gate_proj.bias[:units], layer.b_in)
        mlp.up_proj.bias.fill_(1.0)  # the gate alone decides
        _put(mlp.down_proj.weight[:, :units], layer.W_out.T)
        block.input_layernorm.weight.fill_(layer.norm_1)
        block.post_attention_layernorm.weight.fill_(layer.norm_2)
    body.norm.weight.fill_(weights.norm)
    _put(model.lm_head.weight, weights.unembedding)
    return model


def _d_mlp(weights: WrittenModel) -> int:
    """Units of the widest MLP; the others of a narrower one stay 0."""
    return max(len(layer.b_in) for layer in weights.layers)


def _zeros(model: Any) -> Any:
    for given in model.parameters():
        given.requires_grad_(False).zero_()
    return model.eval()


def _put(target: Tensor | nn.Parameter, values: Tensor) -> None:
    target.copy_(values.to(target.dtype))


def _stacked(weight: Float[Tensor, "head d_model d_head"]) -> Float[Tensor, "row d_model"]:
    """Return projection rows, head after head, as ``nn.Linear`` holds them."""
    return weight.mT.flatten(0, 1)
