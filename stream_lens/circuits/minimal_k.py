"""Minimal k: the fewest key blocks per query block that keep a model's dense answer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from stream_lens.backend.greedy import greedy_tokens
from stream_lens.backend.install import is_streamed, stream
from stream_lens.backend.long_inputs import last_logits_only, text_tokens_only, tokens_within_context
from stream_lens.blocks import StreamConfig
from stream_lens.circuits.edited_runs import forward, streamed_layers
from stream_lens.circuits.metrics import kl_divergence, log_probabilities
from stream_lens.circuits.results import json_of

Per = Literal["model", "layer", "head"]


@dataclass(frozen=True)
class Trial:
    """One sparse run.

    Attributes:
        k: key blocks per query block that were tried.
        layer, head: whose k it was; None for all.
        matched: how many of the answer's tokens came out, counted from the first until one did not.
        passed: whether all did.
        kl: KL(dense ‖ sparse) in nats at the first answer position.
        logit_difference: logit of the first answer token minus the largest other one, at the same position.
    """

    k: int
    layer: int | None
    head: int | None
    matched: int
    passed: bool
    kl: float
    logit_difference: float


@dataclass(frozen=True)
class MinimalK:
    """The smallest k that keeps the dense answer, and the runs that show it.

    Attributes:
        k: the smallest one found, for the whole model.
        fails_below: True when k - 1 was run and lost the answer; None when k is `low`, so that k - 1 was not tried.
        monotone: whether every k tried above `k` passed. Only with `linear` does it speak for all k below the one that
            bisection gave.
        budgets: {(layer, head): k} after `per="layer"` or "head"; empty otherwise.
        config: the configuration that passed, budgets included.
        answer: the dense model's next tokens that had to be kept.
        dense_logit_difference: as in `Trial`, of the dense run.
        trials: every sparse run, in order.
        passes: forwards of the whole input, the dense ones counted.
        n_tokens: T of the input.
        about: the model's name, for titles; empty where it has none.
    """

    k: int
    fails_below: bool | None
    monotone: bool
    budgets: dict[tuple[int, int], int]
    config: StreamConfig
    answer: tuple[int, ...]
    dense_logit_difference: float
    trials: tuple[Trial, ...]
    passes: int
    n_tokens: int
    about: str = ""

    @property
    def kept_fraction(self) -> float:
        """Share of the last query block's keys that k blocks are: k · k_block / T, at most 1 (the paper's s)."""
        return min(1.0, self.k * self.config.k_block / self.n_tokens)

    def to_frame(self) -> pd.DataFrame:
        """One row a trial, in order: k, layer, head, matched, passed, kl, logit_difference."""
        columns = list(Trial.__dataclass_fields__)
        frame = pd.DataFrame([[getattr(trial, name) for name in columns] for trial in self.trials], columns=columns)
        return frame.astype({"layer": "Int64", "head": "Int64"})

    def budgets_frame(self) -> pd.DataFrame:
        """One row a head after `per="layer"` or "head": layer, head, k."""
        rows = [(layer, head, k) for (layer, head), k in sorted(self.budgets.items())]
        return pd.DataFrame(rows, columns=["layer", "head", "k"])

    def plot(self, **options: Any) -> Any:
        """`stream_lens.plots.minimal_k` of this result."""
        from stream_lens import plots

        return plots.minimal_k(self, **options)

    def to_json(self) -> str:
        """All of it as a JSON object; the configuration as `StreamConfig.to_json` writes it."""
        budgets = [[layer, head, k] for (layer, head), k in sorted(self.budgets.items())]
        return json_of({**self.__dict__, "config": self.config.to_json(), "budgets": budgets})


def minimal_k(
    model: Any,
    tokens: Int[Tensor, "1 position"],
    config: StreamConfig | None = None,
    *,
    n_match: int = 2,
    low: int | None = None,
    high: int | None = None,
    linear: bool = False,
    per: Per = "model",
    by_generating: bool = False,
) -> MinimalK:
    """The smallest k whose sparse run gives the same `n_match` next tokens as the dense one (the paper's criterion).

    Bisection between `low` and `high`; what it gives passed, and k - 1 was run and failed. Keeping the answer need not
    be monotone in k, so a smaller k may pass too: `linear` runs them all. Two tokens are a weak criterion: read `kl`
    and `logit_difference` beside it.

    A trial is one forward over the input and the dense answer but for its last token; the answer is kept when the
    largest logits at the last `n_match` positions are its tokens. By induction that is greedy decoding, but for one
    thing: here the answer's rows take part in choosing the last query block's key blocks, while a model that generates
    chooses for every new row alone. `by_generating` decodes instead, at `n_match` small forwards more for each trial.

    The dense reference is the streamed model with `observe=True`: exact dense attention in O(T) memory.

    Args:
        model: HookedTransformer or TransformerBridge, not streamed.
        tokens: one text's token ids.
        config: everything but k; `overrides` stay in force where `per` is "model".
        n_match: tokens that must match.
        low, high: the smallest and largest k to try; by default the blocks that `config` always keeps, and all blocks.
        linear: also run every k from `low` to below the one found, and take the smallest that passes.
        per: "layer" or "head" goes on to lower one layer's (head's) k after the other as far as it goes alone, first
            layer first, by bisection: about log2(k) forwards for each. What was lowered stays lowered (greedy
            coordinate descent, one sweep), so the result is a configuration that passes, not the only such one.
        by_generating: decode with the KV cache instead of one forward.

    Raises:
        ValueError: the largest k fails; more than one text; a bound is out of range; overrides where `per` sets them.
        RuntimeError: the model is streamed already.
    """
    tokens = tokens_within_context(model, text_tokens_only(tokens, "minimal_k"))
    config = _checked(model, tokens, config or StreamConfig(), n_match, per)
    dense = _dense_run(model, tokens, config, n_match, by_generating)
    smallest, largest = _bounds(config, dense.sequence.shape[-1], low, high)
    search = _Search(model, dense, config, [], by_generating)
    if not search.passes(config.with_k(largest)):
        raise ValueError(_failure(search.trials[-1], largest, dense, high is not None))
    k = search.smallest(smallest, largest)
    if linear:
        k = min([k, *(n for n in range(smallest, k) if search.passes(config.with_k(n)))])
    failed = {trial.k for trial in search.trials if not trial.passed}
    budgets = search.lowered(k, smallest, per)
    return MinimalK(
        k=k,
        fails_below=True if k - 1 in failed else None,
        monotone=not any(n > k for n in failed),
        budgets=budgets,
        config=replace(config, k=k, overrides=budgets or config.overrides),
        answer=tuple(dense.answer[0].tolist()),
        dense_logit_difference=_margin(dense.logits, dense.answer),
        trials=tuple(search.trials),
        passes=2 + len(search.trials) * (1 + by_generating),
        n_tokens=tokens.shape[-1],
        about=model.cfg.model_name or "",
    )


@dataclass(frozen=True, eq=False)
class _Dense:
    """The dense model's answer, the input to run, and the logits at the first answer position."""

    prompt: Int[Tensor, "1 position"]
    sequence: Int[Tensor, "1 longer"]
    answer: Int[Tensor, "1 n"]
    logits: Float[Tensor, "1 vocab"]


@dataclass(frozen=True, eq=False)
class _Search:
    model: Any
    dense: _Dense
    config: StreamConfig
    trials: list[Trial]
    by_generating: bool

    def passes(
        self, config: StreamConfig, k: int | None = None, layer: int | None = None, head: int | None = None
    ) -> bool:
        """Whether one run with `config` keeps the answer; noted as a trial of `k` (the config's by default)."""
        dense, n = self.dense, self.dense.answer.shape[-1]
        with stream(self.model, config), torch.no_grad():
            with last_logits_only(self.model, 1 if self.by_generating else n):
                logits = forward(self.model, dense.prompt if self.by_generating else dense.sequence)
            best = greedy_tokens(self.model, dense.prompt, n) if self.by_generating else logits.argmax(-1)
        matched = int((best == dense.answer).int().cumprod(-1).sum())
        first = logits[:, 0]
        # Rounding can bring a KL of almost 0 below it.
        kl = max(0.0, float(kl_divergence(log_probabilities(dense.logits), log_probabilities(first))))
        tried = config.k if k is None else k
        assert isinstance(tried, int)
        self.trials.append(Trial(tried, layer, head, matched, matched == n, kl, _margin(first, dense.answer)))
        return matched == n

    def smallest(self, low: int, high: int) -> int:
        """Bisection for the smallest k of the whole model; `high` is known to pass."""
        while low < high:
            middle = (low + high) // 2
            if self.passes(self.config.with_k(middle)):
                high = middle
            else:
                low = middle + 1
        return high

    def lowered(self, k: int, low: int, per: Per) -> dict[tuple[int, int], int]:
        """k of every head after lowering one layer's or head's after the other."""
        if per == "model":
            return {}
        with stream(self.model, self.config):
            layers = streamed_layers(self.model)
        heads = range(self.model.cfg.n_heads)
        budgets = {(layer, head): k for layer in layers for head in heads}
        groups = (
            [(layer, None) for layer in layers]
            if per == "layer"
            else [(layer, head) for layer in layers for head in heads]
        )
        for layer, head in groups:
            own = [(layer, h) for h in heads if head is None or h == head]
            least, most = low, k
            while least < most:
                middle = (least + most) // 2
                trial = {**budgets, **dict.fromkeys(own, middle)}
                if self.passes(replace(self.config, k=k, overrides=trial), middle, layer, head):
                    most, budgets = middle, trial
                else:
                    least = middle + 1
        return budgets


def _checked(model: Any, tokens: Tensor, config: StreamConfig, n_match: int, per: str) -> StreamConfig:
    if is_streamed(model):
        raise RuntimeError("minimal_k streams the model at one k after the other: leave the `with` block first.")
    if tokens.shape[0] != 1:
        raise ValueError(f"minimal_k takes one text; got {tokens.shape[0]}: call it for each.")
    if not isinstance(n_match, int) or n_match < 1:
        raise ValueError(f"n_match={n_match!r} is not allowed: ask for at least 1 token.")
    if per not in ("model", "layer", "head"):
        raise ValueError(f"per={per!r} is not known: choose model, layer or head.")
    if per != "model" and config.overrides:
        raise ValueError(f"per={per!r} sets every head's k, so config.overrides cannot take effect: leave them out.")
    return config


def _bounds(config: StreamConfig, n_tokens: int, low: int | None, high: int | None) -> tuple[int, int]:
    blocks = -(-n_tokens // config.k_block)
    least = config.forced_blocks
    smallest = least if low is None else low
    largest = max(blocks, smallest) if high is None else high
    if not least <= smallest <= largest:
        raise ValueError(
            f"low={smallest} and high={largest} are not allowed: the config always keeps {least} blocks, so give "
            f"{least} ≤ low ≤ high ({blocks} blocks are all)."
        )
    return smallest, largest


def _dense_run(model: Any, tokens: Tensor, config: StreamConfig, n_match: int, by_generating: bool) -> _Dense:
    # Dense output flows on, so what the masks keep does not matter: choose them in the cheapest way.
    cheapest = replace(config, selector="window_sinks", k=config.forced_blocks, overrides={})
    with stream(model, cheapest, observe=True), torch.no_grad():
        answer = greedy_tokens(model, tokens, n_match)
        with last_logits_only(model, 1):
            logits = forward(model, tokens)
    sequence = torch.cat([tokens, answer[:, :-1]], 1)
    return _Dense(tokens, sequence, answer, logits[:, 0])


def _margin(logits: Float[Tensor, "1 vocab"], answer: Int[Tensor, "1 n"]) -> float:
    first = answer[:, :1]
    others = logits.scatter(-1, first, -torch.inf)
    return float(logits.gather(-1, first)[0, 0] - others.max())


def _failure(trial: Trial, largest: int, dense: _Dense, bounded: bool) -> str:
    answer = dense.answer[0].tolist()
    found = f"k={largest} keeps {trial.matched} of the dense answer's {len(answer)} tokens {answer}"
    if bounded:
        return f"{found}, so no smaller k was searched: raise high, or leave it out to allow all blocks."
    return (
        f"{found} although it keeps all blocks (KL {trial.kl:.2g} nats): the sparse and the dense run differ by "
        "rounding, or config limits them (layers, overrides). Try float32, or a prompt with a clearer next token."
    )
