"""Modules of pruned models: smaller matrices in the model's own modules.

The model and its attention modules keep their classes and only see fewer heads. Four parts are
replaced: the output projection, which also accepts the outputs of all heads and reads the remaining
ones (headscope shows a pruned model with the original head numbers); the key/value projection,
which repeats heads if groups were pruned unevenly; the layer's view of the config; and the
attention module of layers without heads.
"""

import inspect
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from headscope.models.attention import AttentionCall

# Attribute of attention modules with pruned heads.
MARK = "headscope_kept"


class Kept:
    """Remaining heads of a layer, by their original numbers.

    Attributes:
        heads: query heads, in order.
        kv_heads: number of every key/value head passed to attention, repeated if grouped query
            heads were pruned unevenly.
        n_heads, n_kv_heads: numbers of heads before pruning.
    """

    def __init__(
        self, heads: tuple[int, ...], kv_heads: tuple[int, ...], n_heads: int, n_kv_heads: int
    ) -> None:
        self.heads, self.kv_heads = heads, kv_heads
        self.n_heads, self.n_kv_heads = n_heads, n_kv_heads

    def spread(self, value: Tensor, axis: int, *, kv: bool = False) -> Tensor:
        """Place values of the remaining heads at their original numbers, zeros elsewhere."""
        index = torch.tensor(self.kv_heads if kv else self.heads, device=value.device)
        shape = list(value.shape)
        shape[axis] = self.n_kv_heads if kv else self.n_heads
        return value.new_zeros(shape).index_copy(axis, index, value)

    def spread_call(self, call: AttentionCall) -> AttentionCall:
        """The call in the form of the unpruned layer, with zeros for removed heads."""
        return replace(
            call,
            query=self.spread(call.query, 1),
            key=self.spread(call.key, 1, kv=True),
            value=self.spread(call.value, 1, kv=True),
            sinks=None if call.sinks is None else self.spread(call.sinks, 0),
        )


def heads_left(module: nn.Module) -> Kept | None:
    """Remaining heads of an attention module or its output projection; None: all."""
    kept: Kept | None = getattr(module, MARK, None)
    return kept


class ReadsKept(nn.Module):
    """Mixin for the output projection of the remaining heads, placed before the projection's class.

    Attributes:
        headscope_kept: indices of the kept outputs.
        headscope_width: number of outputs in total.
    """

    headscope_kept: Kept
    headscope_width: int

    def forward(self, x: Tensor) -> Tensor:
        """Read the remaining heads' outputs, also from among all heads' outputs."""
        kept = self.headscope_kept
        if x.shape[-1] != self.headscope_width:
            index = torch.tensor(kept.heads, device=x.device)
            x = x.unflatten(-1, (kept.n_heads, -1)).index_select(-2, index).flatten(-2)
        output: Tensor = super().forward(x)  # the projection's own
        return output


def reading_kept(projection: type[nn.Module]) -> type[nn.Module]:
    """Class of an output projection with pruned heads (``Linear``, or gpt2's ``Conv1D``)."""
    return type(f"Kept{projection.__name__}", (ReadsKept, projection), {})


class RepeatingLinear(nn.Linear):
    """Projection that repeats key/value heads, once for each remaining group of query heads.

    Attributes:
        headscope_blocks: index of the block of d_head outputs at each place.
        headscope_d_head: size of a block.
    """

    headscope_blocks: tuple[int, ...]
    headscope_d_head: int

    def forward(self, input: Tensor) -> Tensor:  # torch's name
        """Project, then repeat."""
        blocks = super().forward(input).unflatten(-1, (-1, self.headscope_d_head))
        index = torch.tensor(self.headscope_blocks, device=blocks.device)
        repeated: Tensor = blocks.index_select(-2, index).flatten(-2)
        return repeated


class LayerConfig:
    """The model's config with this layer's number of heads."""

    def __init__(self, config: Any, own: dict[str, int]) -> None:
        self.__dict__.update(_config=config, _own=own)

    def __getattr__(self, name: str) -> Any:
        """Look it up here, then in the model's config."""
        if name.startswith("__") or "_config" not in self.__dict__:
            raise AttributeError(name)
        return self._own[name] if name in self._own else getattr(self._config, name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set it in the model's config."""
        setattr(self._config, name, value)


class NoHeads(nn.Module):
    """Attention of a layer without heads, which writes only the output projection's bias."""

    def __init__(self, attention: nn.Module, projection: str, returns: int | None) -> None:
        """Store the bias under its name, and how the module is called and what it returns."""
        super().__init__()
        holder: nn.Module = self
        for part in projection.split("."):
            holder.add_module(part, nn.Module())
            holder = holder.get_submodule(part)
        bias = getattr(attention.get_submodule(projection), "bias", None)
        if bias is not None:
            holder.register_parameter("bias", nn.Parameter(bias.detach().clone()))
        self.projection, self.returns = projection, returns
        self.layer_idx = getattr(attention, "layer_idx", None)
        self.names = tuple(inspect.signature(type(attention).forward).parameters)[1:]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the bias; add a dummy key to the cache, which counts positions by its keys."""
        given = dict(zip(self.names, args, strict=False)) | kwargs
        hidden: Float[Tensor, "batch pos d_model"] = given["hidden_states"]
        # Not by truth value: an empty cache is falsy, and its first layer must be added too.
        names = ("past_key_values", "layer_past")
        cache = next((given[name] for name in names if given.get(name) is not None), None)
        if cache is not None and self.layer_idx is not None:
            nothing = hidden.new_zeros(hidden.shape[0], 1, hidden.shape[1], 1)
            cache.update(nothing, nothing, self.layer_idx)
        bias = getattr(self.get_submodule(self.projection), "bias", None)
        write = torch.zeros_like(hidden) if bias is None else torch.zeros_like(hidden) + bias
        return write if self.returns is None else (write, *[None] * (self.returns - 1))
