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
# The bundled model is small but trained: it has learned to attend to the previous token and to continue
# sequences it has already seen. We use headscope to find the heads responsible and verify the result.

# %%
import headscope as hs

model = hs.load()
model.shape

# %% [markdown]
# ## Score every head
#
# One forward pass per probe serves all scorers. Each score comes with a null (the same scorer on random
# tokens without repetition, or on uniform attention), so every role comes with an error rate.

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
# An induction head needs a previous-token head in an earlier layer, and that is where the two scores
# peak.

# %%
hs.plots.scatter(table["previous_token"], table["induction"])

# %% [markdown]
# ## One head on one example
#
# A sequence of random tokens, repeated once. In the second copy, the strongest induction head attends to
# the token that *followed* the current one in the first copy: the lower diagonal.

# %%
probe = hs.probes.repeated_tokens(model, length=20, batch=1, seed=1)
(head, score), *_ = table.top("induction", 1)
layer = hs.capture.collect(model, probe, layers=[head.layer], heads=[head.head])[head.layer]
hs.plots.attention_pattern(layer.pattern[0, 0].numpy(), title=f"{head}, induction {score:.2f}")

# %% [markdown]
# ## Write your own scorer
#
# Any function of attention rows can be a scorer. There is nothing to register.


# %%
@hs.row_scorer()
def two_back(rows, probe):
    """Attention to the token two back."""
    return rows.at((rows.query_pos - 2).expand(len(probe), -1))


hs.score(model, scorers=[two_back, "previous_token"]).to_pandas_wide().head()
