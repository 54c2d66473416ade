# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # From heads to a circuit
#
# A study from start to finish, in the manner of Wang et al. 2022 (arXiv 2211.00593): who is the
# indirect object? First ask whether the model can do the task at all, then which heads it needs, then
# which edges between them carry the answer, and last whether the circuit holds up.
#
# Put the path of a larger model in `HEADSCOPE_STUDY_MODEL`, for instance of SmolLM2-135M as a GGUF file,
# and run the same cells.

# %%
import os

import numpy as np

import headscope as hs

model = hs.load(os.environ.get("HEADSCOPE_STUDY_MODEL"))
prompts = int(os.environ.get("HEADSCOPE_STUDY_PROMPTS", "8"))
metric = hs.metrics.logit_difference
print(model)

# %% [markdown]
# ## 1. The probe, and whether the model does the task
#
# Names must be single tokens, and both texts of a pair must have the same length: the probe is built
# for this model's tokenizer, and says how often the model prefers the right name.

# %%
probe = hs.probes.pairs(model, "ioi", batch=prompts, seed=0)
accuracy = probe.settings["accuracy"]
print(f"{len(probe)} prompts of {probe.length} tokens, accuracy {accuracy:.2f} (guessing: 0.5)")

# %% [markdown]
# ## 2. Which heads matter
#
# Ablation takes a head out of all paths. Path patching takes it out of the direct path to the logits
# alone. A head that matters by the first and not by the second works through other heads.

# %%
ablation = hs.ablate_heads(model, probe, metric, progress=False)
direct = hs.path_patch(model, probe, metric, progress=False)
for name, effects in {"ablation": ablation, "direct to logits": direct}.items():
    largest = np.argsort(-np.abs(np.nan_to_num(effects.mean)), axis=None)[:4].tolist()
    heads = [divmod(at, model.shape.n_heads) for at in largest]
    print(
        name,
        {f"L{layer}H{head}": round(float(effects.mean[layer, head]), 3) for layer, head in heads},
    )

# %% [markdown]
# ## 3. Which edges matter, by three methods
#
# All three estimate what taking one edge out does. Where they disagree, exact patching decides, which
# costs a pass per edge; here we ask how far the three agree.

# %%
methods = ("eap", "eap_ig", "relp")
graphs = {name: hs.edges.attribute(model, probe, metric, name, progress=False) for name in methods}
for name, graph in graphs.items():
    print(name, [(str(edge), round(score, 3)) for edge, score in graph.top(3)])
sizes = np.stack([np.abs(graph.mean) for graph in graphs.values()])
ranks = sizes.argsort(1).argsort(1)
print(np.corrcoef(ranks).round(2))

# %% [markdown]
# ## 4. A circuit, and how faithful it is
#
# The curve says how much of the task circuits of each size do, beside circuits of random edges.

# %%
graph = graphs["eap_ig"]
count = max(10, len(graph.wiring) // 20)
circuit = hs.edges.circuit(model, probe, metric, graph, count)
print(circuit)

# %%
hs.plots.circuit_graph(circuit)

# %%
curve = hs.edges.faithfulness(
    model, probe, metric, graph, sizes=[0.02, 0.05, 0.1, 0.2, 0.5, 1.0], progress=False
)
print(curve)
assert abs(float(curve.faithfulness[-1]) - 1) < 1e-3

# %% [markdown]
# ## 5. Complete, minimal, and better than chance?
#
# Complete: take heads from the circuit and from the whole model, and both fall alike. Minimal: every
# head can matter. Matched: random heads of the same layers do worse.

# %%
gaps = hs.edges.completeness(model, probe, metric, circuit, draws=3, progress=False)
needed = hs.edges.minimality(model, probe, metric, circuit, draws=2, progress=False)
print(f"largest gap {gaps.gap.max():.3f} {metric.unit}, of a whole effect of "
      f"{abs(circuit.full - circuit.empty):.3f}")  # fmt: skip
most = sorted(needed.items(), key=lambda item: -item[1])[:3]
print("needed most:", {str(head): round(value, 2) for head, value in most})
print("faithfulness with matched random heads:", circuit.checks.matched.round(2))

# %% [markdown]
# ## 6. What its heads do
#
# Roles come from other texts: where a head looks when tokens repeat.

# %%
repeated = hs.probes.repeated_tokens(model, length=20, batch=8, seed=0)
names = ["previous_token", "duplicate_token", "induction", "attention_sink"]
roles = hs.score(model, repeated, [name for name in names if name in hs.scorers.CATALOGUE])
for head in circuit.heads[:6]:
    print(head, {name: round(float(roles[name][head]), 2) for name in roles})

# %% [markdown]
# ## What this says
#
# The bundled model does the task with one head: `L2H2` carries the name from the first MLP to the end,
# by ablation, path patching and all three ways to score edges, and the other head of the circuit hardly matters.
# The matched control is to be read draw by draw: with four heads in a layer, a random head often is
# `L2H2` itself.
#
# On another model, look at the accuracy first. Near one half there is no task to explain, however faithful
# a circuit is. The verdict of `circuit.checks` says whether another draw of prompts would give the same
# circuit; that takes 100 prompts.

# %%
print(f"accuracy {accuracy:.2f}, faithfulness {circuit.faithfulness:.2f}, {circuit.checks.verdict}")
