# %% [markdown]
# # Thought anchors: which sentences does later reasoning come back to?
#
# **Question.** In a chain of reasoning, some sentences are looked at again and again. Thought Anchors (arXiv 2506.19143)
# finds the *receiver heads* that do so, from dense attention. Does the picture survive when most blocks are pruned? This
# is the first case study of Stream (arXiv 2510.19875).
#
# The three traces here were written and labelled by hand for this project, and the model reads them (teacher forcing).
# So the page shows the method. It says nothing about how models reason.

# %%
import os

import pandas as pd
import plotly.graph_objects as go
import torch

import stream_lens as sl
from stream_lens.circuits.receiver_heads import rank_correlation, receiver_heads
from stream_lens.circuits.thought_anchors import thought_anchors
from stream_lens.circuits.vertical_scores import vertical_scores
from stream_lens.plots import mask_figure
from stream_lens.tasks.reasoning import example_traces

MODEL = "smollm2-135m"
SHORT = os.environ.get("STREAM_LENS_SHORT") == "1"  # set in CI: one trace instead of three
BLOCK, K, TOP = 16, 8, 20
torch.set_grad_enabled(False)
load = sl.load_demo_model if MODEL in ("smollm2-135m", "gemma-3-270m") else sl.load_model
model = load(MODEL)
traces = example_traces()[: 1 if SHORT else 3]

# %%
texts = [model.to_tokens(trace.text, prepend_bos=True) for trace in traces]
segments = [trace.segments(model.tokenizer) for trace in traces]
pd.DataFrame(
    {
        "trace": [trace.source for trace in traces],
        "tokens": [tokens.shape[1] for tokens in texts],
        "sentences": [len(each) for each in segments],
        "first sentence": [each.text_of(0)[:60] + "…" for each in segments],
    }
)

# %% [markdown]
# ## Dense and sparse runs of the same texts
#
# The dense side comes from the same machinery with every block kept (which *is* dense attention); the sparse side runs the model on
# `k` blocks a query block; the control keeps the nearest blocks at the same budget.


# %%
def runs(**choices):
    caches = []
    for tokens in texts:
        k = choices.get("k") or -(-tokens.shape[1] // BLOCK)
        _, cache = sl.run_with_masks(model, tokens, q_block=BLOCK, k_block=BLOCK, **{**choices, "k": k})
        caches.append(cache)
    return caches


caches = {"dense": runs(), "stream": runs(k=K), "window + sink": runs(k=K, selector="window_sinks")}
for name in ("stream", "window + sink"):
    masks = [mask for cache in caches[name] for mask in cache.masks().values()]
    causal, full = (sum(mask.sparsity(of) for mask in masks) / len(masks) for of in ("causal", "full"))
    print(f"{name}: {causal:.1%} of the causal half pruned, {full:.1%} of T²")

# %% [markdown]
# ## Receiver heads
#
# A sentence's *vertical score* is the mean attention that sentences at least four further on give to it. A head whose
# scores are peaked (large kurtosis over sentences) is a receiver head.

# %%
scores = {name: vertical_scores(each, segments) for name, each in caches.items()}
receivers = {name: receiver_heads(each, top_n=TOP) for name, each in scores.items()}
rows = []
for name in ("stream", "window + sink"):
    agreement = rank_correlation(receivers["dense"], receivers[name])
    rows.append((name, agreement.spearman, agreement.top_shared, agreement.heads, len(traces)))
agreement = pd.DataFrame(rows, columns=["run", "rank correlation with dense", f"of top {TOP} shared", "heads", "n texts"])
agreement.round(3)

# %%
figure = go.Figure()
for name, colour in (("stream", "#0072B2"), ("window + sink", "#E69F00")):
    figure.add_scatter(
        x=receivers["dense"].kurtosis.ravel(), y=receivers[name].kurtosis.ravel(), mode="markers", name=name,
        marker={"color": colour, "size": 6, "opacity": 0.7},
    )  # fmt: skip
largest = float(max(receivers["dense"].kurtosis.max(), receivers["stream"].kurtosis.max()))
figure.add_scatter(x=[-2, largest], y=[-2, largest], mode="lines", line_dash="dot", line_color="#8A8A8A", name="equal")
figure.update_xaxes(title="kurtosis, dense")
figure.update_yaxes(title="kurtosis, sparse")
figure.update_layout(
    template="plotly_white", height=480, width=800, title=f"{MODEL}: one point a head, k = {K} of {BLOCK} × {BLOCK}"
)
figure.show()

# %% [markdown]
# **What to look at.** Heads on the dotted line are as peaked in both runs; heads in the same *order* make a high rank correlation. A window drops most of what vertical scores
# are made of (anything four sentences back), so heads that it leaves alike are heads that the sink makes peaked.
# **What it does not show.** These texts are short; the harder test is a longer one.
#
# ## Panels: dense beside Stream
#
# The two heads that come first in the dense ranking. Left every block, right what was kept.

# %%
panels = []
for layer, head in receivers["dense"].heads[:2]:
    for name in ("dense", "stream"):
        pattern = caches[name][0]["pattern", layer]
        panels.append((f"{name}: layer {layer}, head {head}", pattern.mask, pattern.block_mass, head))
mask_figure(panels, f"{MODEL}, trace “{traces[0].source}”, T = {texts[0].shape[1]}, k = {K}").show()

# %% [markdown]
# ## Which sentences, and of which kind?
#
# The vertical scores averaged over the receiver heads (those of the dense run, so that both averages are of the same heads).

# %%
anchors = {name: thought_anchors(scores[name], heads=receivers["dense"]) for name in ("dense", "stream")}
first = anchors["stream"].to_frame().query("text == 0").dropna(subset=["score"])
for row in first.nlargest(4, "score").itertuples():
    print(f"{row.share:6.1%} {row.label} ({row.category}): {row.text_of_segment.strip()[:90]}")

# %%
figure = go.Figure()
order = anchors["dense"].by_category().category
for name, colour in (("dense", "#8A8A8A"), ("stream", "#0072B2")):
    by = anchors[name].by_category().set_index("category").loc[order]
    figure.add_bar(
        x=[f"{category}<br>n = {int(n)}" for category, n in by.segments.items()], y=by["mean"], name=name,
        marker_color=colour, error_y={"type": "data", "array": by["sem"]},
    )  # fmt: skip
figure.update_yaxes(title="mean vertical score")
figure.update_layout(
    template="plotly_white", height=480, margin_b=80, barmode="group",
    title=f"{MODEL}: attention of {TOP} receiver heads to later-visited sentences, by category",
)  # fmt: skip
figure.show()
both = pd.DataFrame({name: each.to_frame().score for name, each in anchors.items()}).dropna()
print(f"rank correlation of sentences, dense against stream: {both.corr('spearman').iloc[0, 1]:.2f} (n = {len(both)} sentences)")
assert both.corr("spearman").iloc[0, 1] > 0.5

# %% [markdown]
# **Reading.** `n` under each bar counts sentences: a bar of one or two is an example, not a mean, and has no error bar.
# Sentences early in a text have more of the text after them to be looked at from, and a problem statement stands early
# by nature: pass `control_depth=True` to score ranks instead.
#
# **What this does not show.** A sentence that is looked at need not be a cause. The causal companion takes attention to one
# sentence away and measures all later ones: `stream_lens.circuits.suppression.segment_suppression`.
