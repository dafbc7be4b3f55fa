# %% [markdown]
# # First steps: run a model, read its sparse patterns
#
# **Question.** What does each attention head of a model look at in a long text, and what does it cost to keep the
# answer for every head?
#
# TransformerLens answers with `run_with_cache`: one dense pattern of T × T numbers for each head. That is exact, and it
# grows with the square of the text. stream_lens puts a sparse backend under the same call: every *query block* (32
# tokens here) keeps `k` *key blocks*, chosen by a search, and the model really runs on those alone.

# %%
import os

import pandas as pd
import plotly.graph_objects as go
import torch

import stream_lens as sl
from stream_lens.plots import mask_figure
from stream_lens.tasks.answering import answer
from stream_lens.tasks.needle import needle_case

MODEL = "smollm2-135m"  # or any name that TransformerLens or transformers can load, with sl.load_model
SHORT = os.environ.get("STREAM_LENS_SHORT") == "1"  # set in CI: the same steps on less text
TOKENS = 512 if SHORT else 2048
K = 8

# %%
torch.set_grad_enabled(False)
load = sl.load_demo_model if MODEL in ("smollm2-135m", "gemma-3-270m") else sl.load_model
model = load(MODEL)
print(f"{MODEL}: {model.cfg.n_layers} layers × {model.cfg.n_heads} heads, context {model.cfg.n_ctx} tokens")

# %% [markdown]
# ## A text with something to find
#
# RULER's needle in a haystack: the same five sentences over and over, one odd sentence with a number in the middle, and
# a question at the end. We know where the needle is, so we can see whether a head looks at it.

# %%
case = needle_case("single_1", model.tokenizer, tokens=TOKENS, depth=0.5, seed=1)
tokens = model.to_tokens(case.prompt, prepend_bos=case.prepend_bos)
segments = case.segments(model.tokenizer)
spans = dict(zip(segments.labels, segments.token_spans))
print(f"{tokens.shape[1]} tokens; the answer is {case.answers[0]}")
print("where (tokens):", spans)
print("...", case.prompt[case.needle_spans[0][0] - 60 : case.needle_spans[0][1] + 40].replace("\n", " "), "...")

# %% [markdown]
# ## One `with` block makes the model sparse
#
# Inside it, every hook, name and weight is what it was; `hook_pattern` yields a `SparsePattern`. Outside it the model
# is dense again, bit for bit.


# %%
def patterns_only(name):
    return name.endswith("attn.hook_pattern")


dense_logits = model(tokens)[:, -1].clone()

with sl.stream(model, q_block=32, k_block=32, k=K):
    sparse_logits, cache = model.run_with_cache(tokens, names_filter=patterns_only)
    sparse_answer = answer(model, case)

assert torch.equal(model(tokens)[:, -1], dense_logits)  # dense again
print(cache)
print("dense answer: ", repr(answer(model, case)))
print("sparse answer:", repr(sparse_answer))

# %% [markdown]
# The answers are printed, not promised: a short text and a small model can fail either way. How far the whole
# distribution moved says more than one greedy answer:

# %%
log_dense, log_sparse = dense_logits.log_softmax(-1), sparse_logits[:, -1].log_softmax(-1)
kl = (log_dense.exp() * (log_dense - log_sparse)).sum().item()
print(f"KL(dense ‖ sparse) of the next token: {kl:.4f} nats")

# %% [markdown]
# ## Reading a `SparsePattern`
#
# It stands where the dense pattern stood and has its shape, but holds three small tables: which key blocks each query
# block keeps (`mask.indices`, −1 where a slot is empty), how much attention each of them got (`block_mass`, summed over
# the query block's rows), and a gate for edits.

# %%
pattern = cache["pattern", 5]
mask = pattern.mask
print(pattern)
print("indices:", tuple(mask.indices.shape), "= [batch, head, query block, slot]")
print(f"head 0, last query block keeps key blocks {mask.indices[0, 0, -1].tolist()}")

rows_of_last_block = tokens.shape[1] - (mask.q_blocks - 1) * mask.q_block
share = pattern.block_mass[0, 0, -1] / rows_of_last_block
print("with shares of attention ", [round(x, 3) for x in share.tolist()])
assert abs(share.sum().item() - 1) < 1e-3  # the softmax runs over kept keys only, so each row sums to 1

# %% [markdown]
# Some rows as dense numbers, when a detail is needed: memory is rows × T, so ask for few.

# %%
last_row = pattern.to_dense(rows=slice(tokens.shape[1] - 1, tokens.shape[1]), heads=[0])
values, places = last_row[0, 0, 0].topk(5)
pd.DataFrame(
    {
        "key": places.tolist(),
        "token": [model.tokenizer.decode([tokens[0, i].item()]) for i in places.tolist()],
        "probability": values.tolist(),
    }
)

# %% [markdown]
# ## Which heads look at the needle?
#
# For the last query block (the question), the share of attention on the needle's blocks, for every head. Then the masks
# of the four highest. Colour is attention; white was dropped.

# %%
start, stop = (place // 32 for place in (spans["needle"][0], spans["needle"][1] - 1))
on_needle = []
for layer, pattern in cache.patterns().items():
    blocks, mass = pattern.mask.indices[0, :, -1], pattern.block_mass[0, :, -1] / rows_of_last_block
    share = (mass * ((blocks >= start) & (blocks <= stop))).sum(-1)
    on_needle += [(share[head].item(), layer, head) for head in range(len(share))]
on_needle.sort(reverse=True)
top = [(layer, head) for _, layer, head in on_needle[:4]]

panels = []
for layer, head in top:
    pattern = cache["pattern", layer]
    panels.append((f"layer {layer}, head {head}", pattern.mask, pattern.block_mass, head))
pruned = sum(mask.sparsity("causal") for mask in cache.masks().values()) / len(cache.masks())
mask_figure(
    panels,
    f"{MODEL}, T = {tokens.shape[1]}, k = {K}: {pruned:.1%} of the causal half pruned",
    spans={"needle": spans["needle"], "question": spans["question"]},
).show()

# %% [markdown]
# **What to look at.** The column at the left edge is the attention sink: nearly every head keeps the first block, and
# `sink_blocks=1` makes sure of it. The diagonal is always kept. The needle's column shows in the last rows, where the
# question is.
#
# **What this does not show.** A kept block is not a cause. The search keeps blocks with large scores; whether the answer
# *depends* on them is another question (notebook 05 edits them and measures). And we picked the four heads with the
# most attention on the needle out of all of them, so of course they look at it. The needle's blocks are a share of the
# text: a head that attends evenly would give them about this much:

# %%
even = (stop - start + 1) / mask.k_blocks
above = sum(share > even for share, _, _ in on_needle)
print(f"an even spread would put {even:.1%} on the needle's {stop - start + 1} blocks")
print(f"{above} of {len(on_needle)} heads put more than that there; the highest {on_needle[0][0]:.1%}")

# %% [markdown]
# ## What it takes to keep
#
# `compression()` gives true bytes, indices and masses included, beside the dense patterns'. The paper's ratio (dense
# entries per kept block) counts no index and looks better than the bytes are; both are printed.

# %%
sizes = cache.compression()
print(f"dense patterns:  {sizes.dense_bytes / 1e6:9.1f} MB")
print(f"sparse patterns: {sizes.sparse_bytes / 1e6:9.1f} MB   ({sizes.by_bytes:,.0f} times fewer bytes)")
print(f"dense entries per kept block, the paper's ratio: {sizes.by_entries:,.0f}")
print(f"all that the cache holds, queries and keys for to_dense included: {cache.nbytes / 1e6:.1f} MB")
print(f"without them (cache.without_scores()): {cache.without_scores().nbytes / 1e6:.1f} MB")
assert sizes.by_bytes > 10

# %% [markdown]
# The same sum for longer texts, from `memory_estimate`. Nothing is run: this is arithmetic on the model's shape, and a
# model's own context may end sooner (the dotted line).

# %%
lengths = [1024 * 2**n for n in range(0, 11)]
estimates = [sl.memory_estimate(model, n, sl.StreamConfig(k=K)) for n in lengths]
figure = go.Figure()
for name, size, dash in (
    ("dense patterns", [e.dense_patterns for e in estimates], "solid"),
    ("sparse: masks", [e.masks for e in estimates], "solid"),
    ("sparse: masks, queries and keys", [e.masks + e.queries_keys for e in estimates], "dash"),
):
    figure.add_scatter(x=lengths, y=size, name=name, mode="lines+markers", line={"dash": dash})
figure.add_vline(x=model.cfg.n_ctx, line_dash="dot", annotation_text="the model's context")
figure.update_xaxes(type="log", title="tokens", tickvals=lengths[::2], ticktext=[f"{n // 1024}k" for n in lengths[::2]])
sizes = {1e6: "1 MB", 1e8: "100 MB", 1e10: "10 GB", 1e12: "1 TB", 1e14: "100 TB", 1e16: "10 PB"}
figure.update_yaxes(type="log", title="bytes", tickvals=list(sizes), ticktext=list(sizes.values()))
figure.update_layout(
    template="plotly_white", height=440, title=f"Memory of the patterns of {MODEL}, all layers and heads (estimate)"
)
figure.show()

# %% [markdown]
# **Reading.** On logarithmic axes dense rises two steps for each step of the others: T² against T. The estimate counts
# patterns, queries and keys only; weights and activations come on top and are the same for both.
#
# **Next.** How the blocks are chosen, and how good the choice is beside the best possible one: notebook 02. Much longer
# texts: notebook 06.
