# %% [markdown]
# # Patching: from "is kept" to "matters"
#
# **Question.** A kept block says where a head may look. Which blocks does the answer *depend* on? Three tools, from the
# plainest to the cheapest: take blocks out (ablation), move one run's pattern into another (patching), and score every
# block of every head in one backward pass (gate attribution), which then has to stand beside real ablations.

# %%
import os

import pandas as pd
import plotly.graph_objects as go
import torch

import stream_lens as sl
from stream_lens.circuits.ablation import ablate, drop_spans
from stream_lens.circuits.attribution import gate_attribution
from stream_lens.circuits.metrics import logit_difference
from stream_lens.circuits.segmentation import spans
from stream_lens.plots.theme import styled

MODEL = "smollm2-135m"
SHORT = os.environ.get("STREAM_LENS_SHORT") == "1"  # set in CI: the same steps on less text
REPEATS = 8 if SHORT else 16
ABLATIONS = 12 if SHORT else 60
CONFIG = sl.StreamConfig(q_block=16, k_block=16, k=8)
load = sl.load_demo_model if MODEL in ("smollm2-135m", "gemma-3-270m") else sl.load_model
model = load(MODEL)

# %% [markdown]
# ## Two prompts that differ in one word
#
# Two codes are hidden in the same text; the *clean* question asks for the red box, the *corrupted* one for the black
# box. Everything but that word, which stands twice in the question, is the same, and so are all positions.

# %%
HAY = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
RED, BLACK = "The code of the red box is 4821.", "The code of the black box is 7359."


def prompt(colour):
    lines = [HAY] * REPEATS
    lines.insert(REPEATS // 4, RED)
    lines.insert(REPEATS // 2 + 1, BLACK)
    question = f"What is the code of the {colour} box? The code of the {colour} box is "
    return "Memorize the codes.\n" + "\n".join(lines) + "\n" + question


clean_text, corrupted_text = prompt("red"), prompt("black")
clean, corrupted = model.to_tokens(clean_text), model.to_tokens(corrupted_text)
assert clean.shape == corrupted.shape
digit = {d: model.tokenizer.encode(d, add_special_tokens=False)[-1] for d in "47"}
metric = logit_difference(digit["4"], digit["7"])  # above 0: the red box's code
n_bos = clean.shape[1] - len(model.tokenizer(clean_text, add_special_tokens=False)["input_ids"])


def span_of(part):
    start = clean_text.index(part)
    found = spans(clean_text, model.tokenizer, [(start, start + len(part))], prepend_bos=n_bos > 0)
    return found.token_spans[0]


red, black = span_of(RED), span_of(BLACK)
print(f"{clean.shape[1]} tokens; red needle at {red}, black at {black}")

with torch.no_grad():
    dense = {name: metric(model(x)).item() for name, x in (("clean", clean), ("corrupted", corrupted))}
    with sl.stream(model, CONFIG):
        logits, clean_cache = model.run_with_cache(clean, names_filter=lambda name: name.endswith("attn.hook_pattern"))
        base = {"clean": metric(logits).item(), "corrupted": metric(model(corrupted)).item()}
print("logit(4) − logit(7), dense: ", {name: round(value, 2) for name, value in dense.items()})
print("logit(4) − logit(7), sparse:", {name: round(value, 2) for name, value in base.items()})
assert dense["clean"] > 0 > dense["corrupted"]  # the dense model answers both, or nothing below would mean anything
assert base["clean"] > 0 > base["corrupted"]

# %% [markdown]
# ## Ablation: what if nobody could look there?
#
# *Drop* takes blocks out before the softmax and the rest of each row renormalises (attention knock-out); *zero* takes
# them out after it, as `pattern[:, head] = 0` does in dense code. The control is what any ablation needs: spans of
# the same length elsewhere in the haystack.

# %%
length = red[1] - red[0]
starts = torch.linspace(32, clean.shape[1] - 64, 12).long().tolist()
away = [s for s in starts if all(s + length + 16 < a or s > b + 16 for a, b in (red, black))][:6]
what = [
    drop_spans("red needle", red),
    drop_spans("black needle", black),
    *(drop_spans(f"haystack at {s}", (s, s + length)) for s in away),
]
effects = {how: ablate(model, clean, what, metric, CONFIG, how=how).to_frame().assign(how=how) for how in ("drop", "zero")}
both = pd.concat(effects.values())
figure = go.Figure()
for how, part in effects.items():
    figure.add_bar(x=part.name, y=part.effect, name=how)
figure.update_yaxes(title="what the metric loses")
figure.update_layout(barmode="group")
styled(figure, f"{MODEL}: ablating attention to spans, all layers and heads (metric {base['clean']:.2f})", height=420)
figure.show()
control = effects["drop"][effects["drop"].name.str.startswith("haystack")].effect
print(f"drop: red needle {effects['drop'].effect.iloc[0]:+.2f}; {len(control)} haystack spans "
      f"{control.mean():+.2f} on average, from {control.min():+.2f} to {control.max():+.2f}")  # fmt: skip
assert effects["drop"].effect.iloc[0] > control.max()

# %% [markdown]
# **Reading.** Without the red needle the metric loses more than without any of the other spans. Without the black one it
# may well *rise*: the wrong answer's support is gone. This says the answer depends on attention to the needle's blocks; not which
# heads carry it, nor that nothing else is needed. A block holds 16 tokens, so its neighbours' words go with it.
#
# ## Patching: moving a pattern from one run into another
#
# Inside a hook, `corrupted[:, heads, rows] = clean[:, heads, rows]` puts the clean run's attention, blocks and
# probabilities, in place of the corrupted run's own. Values stay the corrupted run's. First whole layers, last
# query blocks only: the question.

# %%
question_rows = slice((clean.shape[1] - 1) // 16 * 16 - 16, None)  # the last two query blocks


def patched(layers, heads=slice(None)):
    """The corrupted run's metric with the clean run's patterns in some layers and heads."""

    def take_clean(pattern, hook):
        pattern[:, heads, question_rows] = clean_cache[hook.name][:, heads, question_rows]
        return pattern

    hooks = [(f"blocks.{layer}.attn.hook_pattern", take_clean) for layer in layers]
    with torch.no_grad():
        return metric(model.run_with_hooks(corrupted, fwd_hooks=hooks)).item()


def recovered(value):
    return (value - base["corrupted"]) / (base["clean"] - base["corrupted"])


layers = range(model.cfg.n_layers)
with sl.stream(model, CONFIG):
    by_layer = [recovered(patched([layer])) for layer in layers]
    everything = recovered(patched(layers))
    strongest = sorted(layers, key=lambda layer: -by_layer[layer])[: 1 if SHORT else 3]
    by_head = {
        (layer, head): recovered(patched([layer], head)) for layer in strongest for head in range(model.cfg.n_heads)
    }
figure = go.Figure(go.Bar(x=list(layers), y=by_layer, name="one layer"))
figure.add_hline(y=everything, line_dash="dot", annotation_text="all layers at once", annotation_position="top left")
figure.update_xaxes(title="layer")
figure.update_yaxes(title="share of clean − corrupted recovered")
styled(figure, f"{MODEL}: the clean run's patterns in the corrupted run", height=400)
figure.show()
print(f"all layers: {everything:.0%}; strongest single layers: {[(n, f'{by_layer[n]:.0%}') for n in strongest]}")
best = sorted(by_head, key=lambda where: -by_head[where])[:5]
print("strongest heads in them:", [(where, f"{by_head[where]:.0%}") for where in best])

# %% [markdown]
# **Reading.** Where the bar is high, *where to look* in that layer decides between the two answers. The dotted line is
# the ceiling of this question: what no pattern can recover travels in values and in the residual stream (the word in
# the question is itself another one). Shares of single layers need not add up, and a negative one means
# that the patch makes it worse. One pair of prompts: a hypothesis, not a law.
#
# ## Gate attribution: all blocks at once
#
# Every kept block has a gate on its probabilities. One backward pass gives the gradient in every gate: an estimate of
# what the metric would lose if that block's probabilities were zero. It is linear, so it must be checked.

# %%
attribution = gate_attribution(model, clean, metric, CONFIG)
print(f"{len(attribution.edges()[1]):,} kept blocks scored; metric {attribution.value:.2f}")
attribution.top_edges(8)

# %%
heads = attribution.per_head().pivot(index="layer", columns="head", values="magnitude")
figure = go.Figure(go.Heatmap(z=heads, x=heads.columns, y=heads.index, colorscale="Cividis", colorbar_title="Σ |score|"))
figure.update_xaxes(title="head", dtick=1)
figure.update_yaxes(title="layer", autorange="reversed")
styled(figure, f"{MODEL}: gate attribution by head", height=520, width=700)
figure.show()

# %% [markdown]
# Real ablations of single blocks, drawn by rank so that strong and weak ones both take part (nearly all blocks do next
# to nothing, and a uniform sample would only measure that).

# %%
check = attribution.check_by_ablation(ABLATIONS, seed=0, sample="by_rank")
largest = max(check.table.score.abs().max(), check.table.effect.abs().max())
figure = go.Figure(go.Scatter(x=check.table.score, y=check.table.effect, mode="markers", name="blocks"))
figure.add_scatter(x=[-largest, largest], y=[-largest, largest], mode="lines", line_dash="dot", name="score = effect")
figure.update_xaxes(title="score (gradient)")
figure.update_yaxes(title="effect (real ablation)")
styled(figure, f"{MODEL}: scores of blocks beside their ablations, n = {check.n}", height=480, width=700)
figure.show()
print(f"n = {check.n}: Pearson {check.pearson:.2f}, Spearman {check.spearman:.2f}")
assert check.pearson > 0.5

# %% [markdown]
# **Reading.** Near the middle the scores are right; points far from the line are blocks where the linear estimate fails,
# and strong blocks are among them. So attribution finds candidates, and ablation decides.
#
# **What this does not show.** The score is the gradient at the run as it is: two blocks that stand in for each other may
# both get little, and a block's own ablation says nothing about taking out many at once.
# `stream_lens.circuits.pruning.prune` does that, with random blocks beside it: it looks for the fewest blocks that give
# a metric back. Hold whatever it finds to new prompts before you believe in it.
