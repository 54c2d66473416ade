"""All names inside transformers that headscope relies on but transformers does not guarantee.

When transformers changes, :func:`moved` lists in one line per name what has moved; a test checks
that the list is empty. No other file of headscope uses these names.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from headscope.base.stacks import CAUSAL, MaskRule

# Known layer types in ``config.layer_types``. Other types may hide keys in ways unknown to
# headscope, so their models are refused.
ATTENTION_LAYERS = frozenset({"full_attention", "sliding_attention"})
OTHER_LAYERS = frozenset(
    {
        "attention",  # for configs that name only the kind of block
        "conv",
        "dense",
        "hybrid",
        "hybrid_sliding",
        "linear_attention",
        "mamba",
        "mlp",
        "moe",
        "recurrent",
        "sparse",
    }
)

# Attribute of albert's encoder: groups of layers, each of which it runs several times in a pass.
SHARED_GROUPS = "albert_layer_groups"

MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def register_attention(name: str, attend: Callable[..., Any], mask: Callable[..., Any]) -> None:
    """Register an attention function and its mask builder. Idempotent."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, mask)


def takes_attention_functions(model: Any) -> bool:
    """Whether the attention of a ``PreTrainedModel`` goes through the registry."""
    return bool(model._can_set_attn_implementation())


class Switch:
    """Modules that look up no attention function; stands among the configs of a model.

    Attributes:
        named: the attention function that they are to call; None: they run as they are.
    """

    named: str | None = None

    def set_to(self, name: str | None) -> None:
        """Make the modules call another attention function from now on."""
        self.named = name


def attention_name(config: Any) -> str | None:
    """Name of the attention function that models with this config call."""
    name: str | None = config.named if isinstance(config, Switch) else config._attn_implementation
    return name


def set_attention_name(config: Any, name: str | None) -> None:
    """Make models with this config call another attention function from now on."""
    if isinstance(config, Switch):
        config.set_to(name)
    else:  # as a dict, so that configs inside this one keep their own
        config._attn_implementation = {"": name}


def names_attention(config: Any) -> bool:
    """Whether models with this config look up their attention function by a name in it."""
    return hasattr(config, "_attn_implementation")


def make_eager(config: Any) -> None:
    """Make models with this config, and those of all configs inside it, call eager attention."""
    config._attn_implementation = "eager"


# Method that computes attention from queries, keys and values, in families that bypass the
# registry.
ATTENTION_METHOD = "_attn"


@contextmanager
def attention_named(configs: Sequence[Any], name: str) -> Iterator[None]:
    """Scope in which models with these configs call another attention function."""
    before = [attention_name(config) for config in configs]
    try:
        for config in configs:
            set_attention_name(config, name)
        yield
    finally:
        for config, old in zip(configs, before, strict=True):
            set_attention_name(config, old)


def commit_hash(config: Any, place: str, revision: str | None) -> str | None:
    """Commit of the repository that a config was read from, as far as the cache knows it.

    Args:
        config: config that was read; before transformers 5.20, it contains the commit.
        place: name of the repository, or a folder.
        revision: requested revision, returned if no commit is known.
    """
    commit: str | None = getattr(config, "_commit_hash", None)
    if commit is None:
        from transformers.utils import hub

        resolve = getattr(hub, "resolve_revision", lambda *_, **__: revision)
        found = resolve(place, revision, local_files_only=True)
        commit = getattr(found, "resolved", found)
    return commit


def has_adapters(model: Any) -> bool:
    """Whether transformers added adapters (such as LoRA) to a model."""
    return bool(getattr(model, "_hf_peft_config_loaded", False))


def is_stateful(model: Any) -> bool:
    """Whether generation keeps a recurrent state besides keys and values."""
    return bool(getattr(model, "_is_stateful", False))


def eager_attention(module: nn.Module) -> Callable[..., Any] | None:
    """Eager attention function in a module's source file; None if it has none."""
    source = sys.modules.get(type(module).__module__)
    found: Callable[..., Any] | None = getattr(source, "eager_attention_forward", None)
    return found


def plain_rule(function: MaskFunction) -> MaskRule | None:
    """Rule of one of transformers' own mask functions without a window; None for others."""
    from transformers import masking_utils

    if function is masking_utils.causal_mask_function:
        return CAUSAL
    if function is masking_utils.bidirectional_mask_function:
        return MaskRule("bidirectional")
    return None


def padding_of_keys(
    attention_mask: Bool[Tensor, "batch pos"] | None, kv_length: int, kv_offset: int
) -> Bool[Tensor, "batch key"] | None:
    """Mask of a call's real keys, from a mask over all positions."""
    if attention_mask is None:
        return None
    whole = attention_mask
    if (
        kv_offset and whole.shape[-1] == kv_length
    ):  # too short for all keys: generate built it for these
        return whole
    if (missing := kv_length + kv_offset - whole.shape[-1]) > 0:
        whole = nn.functional.pad(whole, (0, missing))
    return whole[:, kv_offset : kv_offset + kv_length]


def visible_by(
    function: MaskFunction,
    batch: int,
    queries: Int[Tensor, " query"],
    keys: Int[Tensor, " key"],
    *,
    use_vmap: bool,
) -> Bool[Tensor, "batch query key"]:
    """Keys that a transformers mask function makes visible to some queries, without padding.

    Args:
        function: takes indices of example, head, query and key.
        batch: number of examples.
        queries: positions of queries in the text.
        keys: positions of keys in the text.
        use_vmap: the function takes single indices only.
    """
    examples = torch.arange(batch, device=queries.device)
    head = torch.zeros(1, dtype=torch.long, device=queries.device)
    if not use_vmap:
        shown = function(
            examples[:, None, None, None],
            head,
            queries[None, None, :, None],
            keys[None, None, None],
        )
        return shown.expand(batch, 1, len(queries), len(keys))[:, 0]
    from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

    mapped: Any = function
    for dims in ((None, None, None, 0), (None, None, 0, None), (0, None, None, None)):
        mapped = torch.vmap(mapped, in_dims=dims, out_dims=0)
    with TransformGetItemToIndex():
        result: Tensor = mapped(examples, head[0], queries, keys)
    return result


def moved() -> list[str]:
    """List names that have moved, one line each; empty if all are in place.

    Example:
        >>> moved()
        []
    """
    import transformers
    from transformers import PreTrainedModel, masking_utils

    found = []

    def want(there: bool, line: str) -> None:
        if not there:
            found.append(f"transformers {transformers.__version__}: {line}")

    want(
        hasattr(PreTrainedModel, "_can_set_attn_implementation"),
        "PreTrainedModel._can_set_attn_implementation is gone: it said whether attention goes "
        "through the registry",
    )
    want(
        hasattr(PreTrainedModel, "_is_stateful"),
        "PreTrainedModel._is_stateful is gone: it said that a cache holds recurrent states",
    )
    want(
        callable(getattr(masking_utils, "causal_mask_function", None)),
        "masking_utils.causal_mask_function is gone: it was the mask of plain causal attention",
    )
    want(
        callable(getattr(masking_utils, "bidirectional_mask_function", None)),
        "masking_utils.bidirectional_mask_function is gone: it was the mask of plain encoders",
    )
    want(
        "_global_mapping" in vars(masking_utils.AttentionMaskInterface),
        "AttentionMaskInterface._global_mapping is gone: models asked it for our masks",
    )
    from transformers.models.gpt_neo.modeling_gpt_neo import GPTNeoSelfAttention
    from transformers.models.gptj.modeling_gptj import GPTJAttention

    want(
        all(hasattr(one, ATTENTION_METHOD) for one in (GPTNeoSelfAttention, GPTJAttention)),
        f"{ATTENTION_METHOD} of gpt_neo and gptj is gone: it was the whole of their attention",
    )
    from transformers.models.albert.modeling_albert import AlbertTransformer

    one = transformers.AlbertConfig(
        hidden_size=8, intermediate_size=8, num_attention_heads=1, num_hidden_layers=2
    )
    groups = list(getattr(AlbertTransformer(one), SHARED_GROUPS, []))
    want(
        [len(getattr(group, "albert_layers", ())) for group in groups] == [1],
        f"{SHARED_GROUPS} of albert is gone: it held the layers that are run several times",
    )
    config = transformers.LlamaConfig(
        vocab_size=8,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        attn_implementation="eager",
    )
    model = transformers.LlamaForCausalLM(config)
    want(
        getattr(model.config, "_attn_implementation", None) == "eager",
        "config._attn_implementation is gone: it named the attention function",
    )
    want(
        callable(getattr(transformers.utils.hub, "resolve_revision", None)),
        "utils.hub.resolve_revision is gone: it named the commit that a repository was read at",
    )
    want(
        callable(eager_attention(model.model.layers[0].self_attn)),
        "eager_attention_forward is gone from the modeling files: it was the attention to match",
    )
    want(_mask_call(model) is None, f"masks are made otherwise: {_mask_call(model)}")
    kinds = getattr(transformers.configuration_utils, "ALLOWED_LAYER_TYPES", ())
    want(
        set(kinds) >= ATTENTION_LAYERS,
        "ALLOWED_LAYER_TYPES lacks full_attention or sliding_attention: layers have other names",
    )
    return found


def _mask_call(model: Any) -> str | None:
    """How the arguments with which masks are asked for differ from what is expected; None: not."""
    seen: dict[str, Any] = {}

    def mask(**arguments: Any) -> None:
        seen.update(arguments)

    def attend(
        _module: nn.Module, _query: Tensor, _key: Tensor, value: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, None]:
        return value.transpose(1, 2), None

    register_attention("headscope_canary", attend, mask)
    with attention_named((model.config,), "headscope_canary"), torch.no_grad():
        model(input_ids=torch.zeros(1, 3, dtype=torch.long), use_cache=False)
    wanted = {
        "batch_size", "q_length", "kv_length", "q_offset", "kv_offset", "mask_function",
        "attention_mask", "use_vmap", "device",
    }  # fmt: skip
    missing = sorted(wanted - seen.keys())
    return f"{', '.join(missing)} missing" if missing else None
