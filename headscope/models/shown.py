"""How a model shows itself."""

from headscope.base.glance import Glance, sizes
from headscope.models.protocol import HeadModel


def glance_of(model: HeadModel) -> Glance:
    """Size, path and limits of a model, without reading its weights."""
    shape = model.shape
    heads = f"{shape.n_heads} heads"
    if shape.n_kv_heads != shape.n_heads:
        heads += f" on {shape.n_kv_heads} key/value heads"
    rows = [
        ("heads", f"{sizes(('layer',), (shape.n_layers,))} of {heads}, d_head {shape.d_head}"),
        ("width", f"d_model {shape.d_model}, vocabulary {shape.d_vocab:,}"),
        ("context", "no limit" if shape.n_ctx is None else f"{shape.n_ctx:,} tokens"),
    ]
    windows = sorted({one for one in shape.windows if one is not None})
    if windows:
        rows.append(("windows", ", ".join(f"{one:,} tokens" for one in windows)))
    if len(shape.attention_layers) < shape.n_layers:
        rows.append(("attention", f"in {len(shape.attention_layers)} of the layers"))
    if shape.removed:
        rows.append(("pruned", f"{len(shape.removed)} heads"))
    rows += [(f"no {name.replace('_', ' ')}", why) for name, why in model.limits.items()]
    kind = str(model.dtype).removeprefix("torch.")
    return Glance(
        f"model {model.name}",
        [f"{kind} on {model.device}", f"read through {model.path}"],
        ("what", ""),
        rows,
        hint="hs.score(model), hs.circuits.survey(model), hs.explain('L1H0', model)",
    )
