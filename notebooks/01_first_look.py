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
# # First look: what do the heads of a model do?
#
# The bundled model is small, but trained: it has learned to look one token back, and to continue
# what it has seen before. We let headscope find the heads that do this, and check that they do.

# %%
import headscope as hs

model = hs.load()
model.shape

# %% [markdown]
# ## Score every head
#
# One forward pass per probe serves all scorers. Each score comes with a null (the same scorer on
# random tokens without repetition, or attention spread evenly), so that a role is a statement with an
# error rate.

# %%
table = hs.score(model)
table

# %%
for finding in table.role_summary():
    print(finding)

# %% [markdown]
# ## Look at it

# %%
hs.plots.heatmaps(table, ["previous_token", "induction", "duplicate_token"])

# %%
hs.plots.ranking(table["induction"], k=10)

# %% [markdown]
# An induction head needs a previous-token head below it: the two scores live in different layers.

# %%
hs.plots.scatter(table["previous_token"], table["induction"])

# %% [markdown]
# ## One head on one example
#
# Random tokens said twice. In the second copy the strongest induction head looks at the token that
# *followed* the current one the first time: the lower diagonal.

# %%
probe = hs.probes.repeated_tokens(model, length=20, batch=1, seed=1)
(head, score), *_ = table.top("induction", 1)
layer = hs.capture.collect(model, probe, layers=[head.layer], heads=[head.head])[head.layer]
hs.plots.attention_pattern(layer.pattern[0, 0].numpy(), title=f"{head}, induction {score:.2f}")

# %% [markdown]
# ## A scorer of your own
#
# Any function of attention rows is a scorer; nothing has to be registered.


# %%
@hs.row_scorer()
def two_back(rows, probe):
    """Attention to the token two back."""
    return rows.at((rows.query_pos - 2).expand(len(probe), -1))


hs.score(model, scorers=[two_back, "previous_token"]).to_pandas_wide().head()
