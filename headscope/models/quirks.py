"""How families differ from the plain decoder, and how headscope handles each difference.

One row per difference. ``exact``: rows, head outputs, ablations and weight-level analyses match the
model up to rounding; ``limited``: some analyses are refused, with the keys of ``model.limits`` or
the part that refuses them; ``refused``: the model does not load. Every reason for refusal has a row
here, except unreadable files.
"""

from dataclasses import dataclass
from typing import Literal

Support = Literal["exact", "limited", "refused"]


@dataclass(frozen=True)
class Quirk:
    """One way in which families differ.

    Attributes:
        name: name of the difference.
        families: model types of transformers that have it, as examples.
        answer: how headscope handles it.
        how: what is read, or why something is refused.
        instead: what to use instead of refused analyses; empty if none are refused.
        limits: keys of ``model.limits`` that such a model has.
    """

    name: str
    families: tuple[str, ...]
    answer: Support
    how: str
    instead: str = ""
    limits: tuple[str, ...] = ()


QUIRKS: tuple[Quirk, ...] = (
    Quirk(
        "gate after attention",
        ("afmoe", "qwen3_next"),
        "limited",
        "z is the gated output, so that z @ W_O is the head's write; values and OV circuits do not "
        "know the gate.",
        "scorers of rows and outputs, ablation, direct logit attribution",
        ("values", "ov"),
    ),
    Quirk(
        "norm before the output projection",
        ("bitnet",),
        "limited",
        "The norm mixes the heads; z is its output, and z @ W_O the head's write.",
        "scorers of rows and outputs, ablation of z, direct logit attribution",
        ("values", "ov"),
    ),
    Quirk(
        "norm after attention",
        ("gemma2", "olmo2"),
        "limited",
        "A head's write is not z @ W_O; decompositions of one pass hold the norm's scale.",
        "scorers of rows, ablation, hs.lens.attribute",
        ("linear_write",),
    ),
    Quirk(
        "learned sinks",
        ("gpt_oss",),
        "exact",
        "Rows sum to less than 1 and are never renormalised.",
    ),
    Quirk(
        "hybrid with a shifted attention index",
        ("lfm2", "bamba", "recurrent_gemma"),
        "exact",
        "Layers keep the model's own numbers; those without attention are absent.",
    ),
    Quirk(
        "keys and values shared between layers",
        ("gemma3n_text",),
        "limited",
        "Rows and head outputs are read where they are used. Streams beside the residual stream "
        "and norms make the write nonlinear.",
        "scorers of rows, ablation",
        ("linear_write",),
    ),
    Quirk(
        "positions dropped before layers that share keys and values",
        ("gemma4_text",),
        "refused",
        "With num_kv_shared_layers the model cuts its mask to the positions whose logits are "
        "asked for, so that not every row exists.",
        "a model of the family without shared layers",
    ),
    Quirk(
        "keys equal to values",
        ("gemma4_text",),
        "limited",
        "The values that attention was given are read, whatever made them.",
        "scorers of rows, ablation",
        ("linear_write",),
    ),
    Quirk(
        "latent attention",
        ("deepseek_v3", "minicpm3"),
        "refused",
        "Keys and values are made of a compressed vector, and queries differ from values in size, "
        "so that there are no W_K and W_V per head.",
        "a model with ordinary or grouped-query attention",
    ),
    Quirk(
        "head sizes that differ by layer",
        ("gemma4_text",),
        "refused",
        "A table of heads has one d_head.",
        "a model whose layers are alike",
    ),
    Quirk(
        "rotation that differs by layer",
        ("smollm3", "cohere2"),
        "exact",
        "Rotations are measured in every layer; some layers have none.",
    ),
    Quirk(
        "rotation that depends on the length of the text",
        ("phi3 with longrope",),
        "limited",
        "Rows are exact at any length; a product of query and key at an offset is not one number.",
        "scorers of queries and keys, which read queries and keys of the text itself",
        ("rotary",),
    ),
    Quirk(
        "queries and keys with a norm",
        ("qwen3", "gemma3_text"),
        "limited",
        "Rows are exact. QK circuits hold the norms' gains and lack their scales, so that their "
        "size says nothing; a norm that adds a bias (persimmon) or follows rotation (hunyuan) is "
        "refused when a circuit is asked for.",
        "hs.circuits.score_parts for the scores of a run, exact; scorers of queries and keys",
    ),
    Quirk("soft caps", ("gemma2",), "exact", "Caps act on the scores before the softmax."),
    Quirk(
        "sliding windows",
        ("mistral", "phimoe"),
        "exact",
        "Windows are those of the mask that the model builds, whatever the config says.",
    ),
    Quirk(
        "fused QKV side by side",
        ("phi3", "gpt2"),
        "exact",
        "Outputs are told apart by heads through gradients, and proved on activations; bloom and "
        "falcon, which only transformer-lens runs, are split by it.",
    ),
    Quirk("fused QKV in turns per head", ("gpt_neox", "bloom"), "exact", "As above."),
    Quirk("fused QKV with shared keys and values", ("falcon",), "exact", "As above."),
    Quirk(
        "several residual streams",
        ("gemma3n_text",),
        "limited",
        "Heads are exact; what they write does not enter one stream.",
        "scorers of rows, ablation",
        ("linear_write",),
    ),
    Quirk(
        "multipliers on residual, embedding and logits",
        ("granite", "cohere"),
        "exact",
        "Measured: of the write on one pass, of the logits on outputs of all sizes.",
    ),
    Quirk(
        "final norm used elsewhere too",
        ("nanochat",),
        "exact",
        "The last use in a pass is the one before the unembedding.",
    ),
    Quirk(
        "output projection that is more than a matrix",
        ("jetmoe",),
        "refused",
        "Experts read the head outputs, so that there is no W_O per head.",
        "a model with one output projection per layer",
    ),
    Quirk(
        "chunks and blocks of keys",
        ("llama4_text",),
        "refused",
        "Which keys a query sees cannot be told by a window.",
        "a model with causal masks or sliding windows",
    ),
    Quirk(
        "keys chosen by an indexer",
        ("deepseek_v32", "minimax_m3_vl"),
        "refused",
        "The choice reaches attention as a tensor of unknown meaning.",
        "a model that attends to all keys or to a window",
    ),
    Quirk(
        "several attention stacks",
        ("t5", "bart"),
        "refused",
        "An encoder-decoder has three of them.",
        "a decoder-only model",
    ),
)
