"""A ``TransformerBridge`` over a transformers model's own weights.

The only file that imports transformer_lens, and only inside a function.
"""

import copy
from contextlib import AbstractContextManager
from typing import Any

import torch

from headscope.errors import UnsupportedModelError
from headscope.models.bridge.layout import tiny_bridge_tokens
from headscope.models.hf.hooks import unhooked
from headscope.models.hf.transformers_api import make_eager
from headscope.models.loading.proof import gap
from headscope.models.parameters import all_weights
from headscope.models.running import pass_over

# Largest difference between logits of bridge and model, relative to the largest logit. Half
# precision rounds at other places on the two ways; a wrong layout gives differences near 1.
_SAME = {torch.float32: 1e-3, torch.float64: 1e-6}
_SAME_HALF = 0.1

# Attribute of a module tree that says which weights it had before a bridge added views of them.
OWN_NAMES = "_headscope_weight_names"


def without_own_hooks(bridge: Any) -> AbstractContextManager[None]:
    """Scope without the hooks that a bridge's owner added: they are edits, and not the model."""
    return unhooked(
        (point, handle.hook.id)
        for point in bridge.modules()
        for handle in getattr(point, "fwd_hooks", ())
        if not handle.is_permanent
    )


def bridge_over(module: Any) -> Any:
    """Build a ``TransformerBridge`` around a second module tree over the same parameter storage.

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
    """Refuse a bridge whose logits are not those of the model that it was built over."""
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
