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
# # Circuits: the induction circuit, from weights alone
#
# A model that continues repeated text needs two kinds of heads. A *previous-token head* writes the
# previous token's identity at every position. An *induction head* in a later layer reads that with its
# **keys**: it attends to the position whose previous token equals the current one. So the later head's
# keys must read what the earlier head writes, and that is a property of their weights.
#
# In this notebook we identify the circuit without running the model. Only then do we run it and ablate
# heads.

# %%
import headscope as hs

model = hs.load()
model.shape

# %% [markdown]
# ## Which directions were learned?
#
# Singular values of every head's OV circuit (what it writes, given what it reads), relative to those of
# random factors of the same shape and variance. The grey band is chance.

# %%
hs.plots.spectra(hs.circuits.spectra(model, "OV"))

# %% [markdown]
# The large singular values lie far above the band and the small ones below it: heads use only part of
# their rank.

# %%
table = hs.circuits.score(model)
for name in ("ov_outliers", "ov_effective_rank", "copying_eigenvalues_mlp"):
    print(name, table.top(name, 3))

# %% [markdown]
# ## Whose keys read what?
#
# K-composition of every pair of heads: how much of what the earlier head writes is read by the later
# head's keys. Unrelated heads score `chance`.

# %%
keys = hs.circuits.composition(model, "K")
chance = hs.circuits.random_composition(model)
print(f"chance {chance:.3f}, largest {keys.top(1)[0][2]:.3f}")
hs.plots.composition_matrix(keys)

# %%
hs.plots.composition_graph(keys, most=12, nodes=table["copying_eigenvalues_mlp"])

# %% [markdown]
# ## The circuit, named
#
# An induction head must raise the logit of the token it attends to: the eigenvalues of its
# token-to-logit matrix have positive real parts, and its copying score is near 1. Later layers do not see
# the raw embedding, so we apply the first MLP to it, as the model does.

# %%
copying = hs.circuits.eigenvalues(model, "OV", "mlp")
induction = [head for head in model.shape.heads if head.layer > 0 and copying.ratio[head] > 0.9]
print({str(head): round(float(copying.ratio[head]), 2) for head in induction})
hs.plots.eigenvalues(copying, induction)

# %% [markdown]
# Its keys must also read what previous-token heads write. Which three heads feed these keys most?

# %%
fed = {}
for first, second, value in keys.top(keys.values.size):
    if second in induction:
        fed[first] = max(fed.get(first, 0.0), value / chance)
previous = sorted(fed, key=fed.get, reverse=True)[:3]
print("times chance:", {str(head): round(fed[head], 1) for head in fed})
print(f"by weights alone: {previous} look one back, {induction} continue")

# %% [markdown]
# Chains of heads, strongest first. Not every strong link ends in a copying head. High composition alone
# does not identify a role, which is why we required both conditions.

# %%
for path in hs.circuits.strongest_paths(model, k=6, modes=["K"]):
    print(path)

# %% [markdown]
# ## Check the attention patterns
#
# Only now do we run the model, on a repeated sequence of random tokens.

# %%
probe = hs.probes.repeated_tokens(model, length=50, batch=8)
seen = hs.score(model, probe, ["previous_token", "induction"])
print("previous token:", {str(head): round(seen["previous_token"][head], 2) for head in previous})
print("induction:     ", {str(head): round(seen["induction"][head], 2) for head in induction})

assert min(seen["previous_token"][head] for head in previous) > 0.5
assert min(seen["induction"][head] for head in induction) > 0.5

# %% [markdown]
# The heads identified from the weights behave as predicted.
#
# ## Check by ablation
#
# We mean-ablate each set of heads and, as a control, the other heads of the same layers. Accuracy covers
# both copies; in the first one there is nothing to predict.

# %%


def others(heads):
    """The other heads of the same layers."""
    layers = {head.layer for head in heads}
    return [head for head in model.shape.heads if head.layer in layers and head not in heads]


sets = {"induction": induction, "others of their layers": others(induction)}
accuracy = hs.ablate_groups(model, probe, hs.metrics.accuracy, sets)
effect = dict(zip(sets, accuracy.mean.tolist(), strict=True))
for name, change in effect.items():
    print(f"{name:>24}: accuracy {change:+.2f}")

assert effect["induction"] < -0.3
assert effect["others of their layers"] > -0.1

# %% [markdown]
# Without the circuit's heads, the model can no longer continue the sequence; without their neighbours, it
# hardly changes. Ablated one at a time they may matter little, because they back each other up.
#
# ## Check the link between them
#
# If the induction heads' keys read what the previous-token heads write, then ablating the latter must
# disturb the former's *attention*, more than ablating their neighbours does.

# %%
means = hs.ablation.head_means(model, probe)


def induction_without(heads):
    """Mean induction score of the induction heads while some earlier heads are at their mean."""
    with model.edited([hs.edits.mean(heads, means)]):
        scores = hs.score(model, probe, ["induction"])["induction"]
    return sum(scores[head] for head in induction) / len(induction)


whole = sum(seen["induction"][head] for head in induction) / len(induction)
without, control = induction_without(previous), induction_without(others(previous))
print(
    f"induction {whole:.2f}; without {previous} {without:.2f}; without their neighbours {control:.2f}"
)

assert without < control - 0.1

# %% [markdown]
# So the model does use the circuit that we read off the weights: when the heads that feed them are
# mean-ablated, the induction heads no longer find the right position; when the neighbours are, they do.
# The weights could not tell us whether the circuit matters, or how much. That took the ablation.
# `headscope head` shows the same evidence for one head on one page.
