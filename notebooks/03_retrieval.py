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
# # Retrieval: which heads fetch a fact from far back?
#
# A sentence is hidden in a long text, and the model is asked about it. A *retrieval head* (Wu et al.
# 2024) is one whose most attended token, while the answer is said, lies in that sentence and is the
# very token that is said. Finding such heads is a matter of looking; here we also take them away.

# %%
import headscope as hs

model = hs.load("tiny-llama")
probe = hs.probes.needle(model, lengths=[64, 128, 250], depths=5, per_cell=2)
print(model.tokenizer.decode(probe.tokens[0][probe.real[0]]))

# %% [markdown]
# Keys, values and places are random, so nothing but the text can answer. Keys like these never
# occurred in training.
#
# ## Who copies?
#
# The model answers every question, with keys and values kept; of each step only the newest query's
# row of attention is computed. No pattern is ever stored.

# %%
found = hs.retrieval.decoded(model, probe)
heads = found.heads()
print(found)
hs.plots.heatmap(found.by_set)

# %%
activity = hs.retrieval.activity(found.activation)
print(
    {
        word: sum(one == word for one in activity.values())
        for word in ("always", "sometimes", "never")
    }
)
hs.plots.recall_grid(found.recall_grid())

# %% [markdown]
# Few heads copy, and those that do copy nearly everywhere. In the null another needle stands in the
# text, so that the question has no answer there, and the same heads hit that needle's answer in a
# quarter of the examples at most: each of them copies beyond chance. Teacher-forced, one pass with
# the answer appended, they are the same heads:

# %%
print(hs.retrieval.agreement(found.by_set, hs.retrieval.forced(model, probe), k=len(heads)))
assert 1 <= len(heads) <= len(model.shape.heads) // 3
assert all(found.by_set.significant()[head] for head in heads)
assert all(found.by_set.null[head] < 0.25 < 0.9 < found.by_set.mean[head] for head in heads)

# %% [markdown]
# ## Does the answer rest on them?
#
# *Masking* makes a head attend to everything alike, from the last token of the prompt on. Other
# needles than those above; the heads that copy most go first, against random ones that do not copy.

# %%
held_out = hs.probes.needle(model, lengths=[100, 200], depths=4, per_cell=2, seed=1)
curve = hs.retrieval.masking_curve(
    model, held_out, found.by_set, counts=[0, 2, 4, len(heads), len(heads) + 3], random=6
)
hs.plots.curves(curve.effects, controls=curve.controls)

# %%
arms = dict(
    zip(curve.effects.labels[0], curve.mean[:, curve.counts.index(len(heads))], strict=True)
)
random = sum(arms[name] for name in curve.controls) / len(curve.controls)
print(f"{len(heads)} heads masked: retrieval heads {arms['top']:.2f}, as many others {random:.2f}")
assert arms["top"] < 0.1
assert random > 0.5

# %% [markdown]
# Without the retrieval heads hardly an answer is right; without as many others most are. With only some
# of them masked the rest stand in: no single head is indispensable.
#
# ## What is said instead?
#
# The same mask as a scope: whatever the model does inside, it does without these heads.

# %%
prompt = "The code of the red door is seven. The code of the blue bag is nine. The code of the red door is"
print("whole: ", hs.retrieval.generate(model, prompt, new_tokens=6).texts[0])
with hs.mask_heads(model, heads):
    print("masked:", hs.retrieval.generate(model, prompt, new_tokens=6).texts[0])

# %% [markdown]
# ## Passage against memory
#
# Every passage now names the value that the model, asked without a passage, holds least likely.
# DeCoRe (Gema et al. 2024) contrasts the model with itself without retrieval heads. A model at the end
# of training believes what it reads anyway, so here is one that is still learning.

# %%
young = hs.load("tiny-gpt2", revision="step-005000")
easy = hs.probes.needle(young, lengths=96, depths=4, per_cell=4)
copying = hs.retrieval.decoded(young, easy).heads()
against = hs.retrieval.contradictions(young, examples=32, length=150, distractors=5, seed=1)
said = hs.retrieval.faithfulness(young, against, copying)
print(copying)
print(said)

# %%
margin = dict(zip(said.arms, said.margin.mean(1), strict=True))
assert margin["masked"] < margin["base"] < margin["DeCoRe entropy"]

# %% [markdown]
# The margin is how much likelier the passage's answer is than the model's own, in nats: masking lowers
# it, the contrast raises it, most where the model is unsure. Whether the answer itself gets better is
# another matter; the shares above say what it came to here.
#
# ## In-context learning, token by token
#
# Random tokens said twice: in the second half a model that looks back knows what comes.

# %%
twice = hs.probes.repeated_tokens(model, length=48, batch=16)
losses = hs.retrieval.token_losses(model, twice, {"retrieval heads masked": heads})
hs.plots.token_losses(losses, window=4)

# %%
score = hs.retrieval.in_context_score(model, twice, early=(8, 40), late=(56, 88))
whole, masked = (losses.losses[..., 56:89].mean(2) - losses.losses[..., 8:41].mean(2)).mean(1)
print(f"late less early loss: {whole:.2f} nats, {masked:.2f} with retrieval heads masked")
print("single heads that matter most:", score.top(3))
assert masked > whole + 1

# %% [markdown]
# The heads that fetch facts also carry on repeated text: here retrieval is induction. For longer texts
# and the same on one page: `headscope retrieval MODEL --lengths 1k..32k --out runs/retrieval`.
