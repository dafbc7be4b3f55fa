"""A study's headline figures beside the same figures under its controls: other selectors at its budget, and dense.

Each function gives one row a run, the study's own first: `run` (its selector, a control's, or "dense"), the figures,
how like the dense run they are, the shares pruned, and how many texts or pairs stand behind them. A figure that
window_sinks or random give as well is no finding of the search; one that exhaustive gives too is not its fault.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import scipy.stats
from jaxtyping import Int
from torch import Tensor

from stream_lens.backend.sparse_cache import SparseActivationCache
from stream_lens.circuits.mask_diff import MaskDiff, mask_diff
from stream_lens.circuits.minimal_k import MinimalK, minimal_k
from stream_lens.circuits.receiver_heads import ReceiverHeads, rank_correlation, receiver_heads
from stream_lens.circuits.reruns import CONTROLS, DENSE, answers, noting_pruned, pruned, rerun, run_of
from stream_lens.circuits.route_results import Routes
from stream_lens.circuits.routes import Place, routes
from stream_lens.circuits.segments import Segments

Caches = Sequence[SparseActivationCache]
OnRun = Callable[[str], None]


def diff_controls(
    model: Any,
    success: SparseActivationCache | Caches,
    failure: SparseActivationCache | Caches,
    segments: Segments | Sequence[Segments] | None = None,
    failure_segments: Segments | Sequence[Segments] | None = None,
    *,
    answer_tokens: int = 0,
    on_run: OnRun = lambda run: None,
    **options: Any,
) -> pd.DataFrame:
    """`mask_diff` of the given pairs, of the same texts under every control, and of the dense model.

    Args:
        model: that made the caches, not streamed.
        success, failure: caches of streamed runs, which know their tokens and choices.
        segments, failure_segments, **options: as for `mask_diff`.
        answer_tokens: also let every run go on greedily from the first pair's texts by so many tokens.
        on_run: told which run begins.

    Returns:
        One row a run: added, removed and kept (cells of all heads, mean over pairs), moved (share of attention that
        went elsewhere, mean over heads, 0 to 1), control_moved (the same for random pairs of one group; NaN with one
        pair), like_dense (cosine of the difference of every cell with the dense run's; 1 is the same),
        pruned_causal, pruned_visible, pairs, control_pairs, and with answer_tokens success_answer and failure_answer.

    Raises:
        ValueError: what `mask_diff` and `rerun` raise.
    """
    groups = [_listed(success), _listed(failure)]
    own = _own_run([*groups[0], *groups[1]], model)

    def of(run: str) -> tuple[MaskDiff, dict[str, Any]]:
        on_run(run)
        ours, theirs = groups if run == own else ([rerun(model, each, run) for each in group] for group in groups)
        said: dict[str, Any] = {}
        if answer_tokens:
            for name, group in zip(("success", "failure"), groups, strict=True):
                said[f"{name}_answer"] = answers(model, group[0], run, answer_tokens)[0]
        found = mask_diff(ours, theirs, segments, failure_segments, **options)
        return found, {**pruned([*ours, *theirs]), **said}

    dense, about = of(DENSE)
    rows = []
    for run in (own, *_others(own)):
        found, known = (dense, about) if run == DENSE else of(run)
        rows.append({"run": run, **_diff_figures(found, dense), **known})
    return _with_counts(rows, pairs=dense.pairs, control_pairs=dense.control_pairs)


def route_controls(
    model: Any,
    cache: SparseActivationCache,
    source: Place | Sequence[Place],
    target: Place | Sequence[Place] = -1,
    segments: Segments | None = None,
    *,
    answer_tokens: int = 0,
    on_run: OnRun = lambda run: None,
    **options: Any,
) -> pd.DataFrame:
    """`routes` through the given cache, through the same text's under every control, and through the dense pattern.

    Args:
        model, cache, answer_tokens, on_run: as for `diff_controls`, for one cache.
        source, target, segments, **options: as for `routes`.

    Returns:
        One row a run: flow (how much of the target comes from the source by attention rollout, 0 to 1), edges (on some
        way from source to target), like_dense (Spearman's correlation over heads of the flow that each carries with the
        dense run's; NaN where no way leads there), pruned_causal, pruned_visible, texts (1), and with answer_tokens
        answer.

    Raises:
        ValueError: what `routes` and `rerun` raise.
    """
    own, row = _own_run([cache], model), options.get("batch", 0)

    def of(run: str) -> tuple[Routes, dict[str, Any]]:
        on_run(run)
        ours = cache if run == own else rerun(model, cache, run)
        said = {"answer": answers(model, cache, run, answer_tokens)[row]} if answer_tokens else {}
        return routes(ours, source, target, segments, **options), {**pruned([ours]), **said}

    dense, about = of(DENSE)
    rows = []
    for run in (own, *_others(own)):
        found, known = (dense, about) if run == DENSE else of(run)
        alike = _spearman(found.head_flow, dense.head_flow) if found.reachable and dense.reachable else np.nan
        rows.append({"run": run, "flow": found.flow, "edges": found.total_edges, "like_dense": alike, **known})
    return _with_counts(rows, texts=1)


def receiver_controls(
    model: Any,
    caches: SparseActivationCache | Caches,
    segments: Segments | Sequence[Segments],
    *,
    top_n: int = 20,
    on_run: OnRun = lambda run: None,
    **options: Any,
) -> pd.DataFrame:
    """The ranking by `receiver_heads`, the same texts' under every control, each against the dense ranking.

    Args:
        model, caches, on_run: as for `diff_controls`. Only one text's rerun is held at a time.
        segments, top_n, **options: as for `receiver_heads`.

    Returns:
        One row a run: spearman (of the kurtosis over heads with the dense run's), heads (compared), top_shared (of the
        receiver heads), split_half (Pearson's r between even and odd texts: what a ranking can be trusted with; NaN
        with one text), pruned_causal, pruned_visible, texts.

    Raises:
        ValueError: what `receiver_heads` and `rerun` raise.
    """
    given = _listed(caches)
    own = _own_run(given, model)

    def of(run: str) -> tuple[ReceiverHeads, dict[str, float]]:
        on_run(run)
        shares: list[dict[str, float]] = []
        runs = given if run == own else (rerun(model, cache, run) for cache in given)
        found = receiver_heads(noting_pruned(runs, shares), segments, top_n=top_n, **options)
        return found, {name: float(np.mean([each[name] for each in shares])) for name in shares[0]}

    dense, about = of(DENSE)
    rows = []
    for run in (own, *_others(own)):
        found, known = (dense, about) if run == DENSE else of(run)
        alike = rank_correlation(dense, found)
        half = np.nan if found.split_half is None else found.split_half
        same = {"spearman": alike.spearman, "heads": alike.heads, "top_shared": alike.top_shared}
        rows.append({"run": run, **same, "split_half": half, **known})
    return _with_counts(rows, texts=len(dense.by_text))


def minimal_k_controls(
    model: Any,
    tokens: Int[Tensor, "1 position"],
    result: MinimalK,
    *,
    high: int | None = None,
    linear: bool = False,
    on_run: OnRun = lambda run: None,
) -> pd.DataFrame:
    """The minimal k of `result` beside that of every control on the same text, for the same dense answer.

    Args:
        model, on_run: as for `diff_controls`.
        tokens: what `result` was found on.
        result: from `minimal_k`; its budgets of single heads are left out, so controls have one k for all.
        high, linear: as for `minimal_k`.

    Returns:
        One row a run: k (NA where none up to `high` keeps the answer), kept_fraction (of the last row's keys),
        fails_below (whether k - 1 was run and failed; NA where it was not run), kl (nats, at that k), passes (to find
        it), texts (1). The dense run is not among them: it is the answer that all are held to.
    """
    config = replace(result.config, overrides={} if result.budgets else result.config.overrides)
    rows = []
    for run in (config.selector, *(name for name in _others(config.selector) if name != DENSE)):
        found: MinimalK | None = result
        if run != config.selector:
            on_run(run)
            found = _minimal_or_none(
                model, tokens, replace(config, selector=run), n_match=len(result.answer), high=high, linear=linear
            )
        rows.append({"run": run, **_minimal_figures(found)})
    frame = _with_counts(rows, texts=1)
    return frame.astype({"k": "Int64", "fails_below": "boolean", "passes": "Int64"})


def _own_run(caches: Caches, model: Any) -> str:
    """The selector of the given runs, which must be one."""
    found = {run_of(cache, model)[1].selector for cache in caches}
    if len(found) != 1:
        raise ValueError(f"the caches are of the selectors {sorted(found)}: give runs of one.")
    return found.pop()


def _others(own: str) -> tuple[str, ...]:
    return (*(name for name in CONTROLS if name != own), DENSE)


def _listed(caches: SparseActivationCache | Caches) -> list[SparseActivationCache]:
    return [caches] if isinstance(caches, SparseActivationCache) else list(caches)


def _diff_figures(found: MaskDiff, dense: MaskDiff) -> dict[str, float]:
    heads = found.heads
    totals = {name: float(heads[name].sum()) for name in ("added", "removed", "kept")}
    moved = {name: float(heads[name].mean()) for name in ("moved", "control_moved")}
    cells = [each.cells.set_index(["layer", "head", "query", "key"])["difference"] for each in (found, dense)]
    ours, theirs = (side.to_numpy() for side in cells[0].align(cells[1], fill_value=0.0))
    length = np.linalg.norm(ours) * np.linalg.norm(theirs)
    return {**totals, **moved, "like_dense": float(ours @ theirs / length) if length else np.nan}


def _spearman(one: np.ndarray, other: np.ndarray) -> float:
    varied = min(np.ptp(one), np.ptp(other)) > 0
    return float(scipy.stats.spearmanr(one.ravel(), other.ravel()).statistic) if varied else np.nan


def _minimal_or_none(model: Any, tokens: Tensor, config: Any, *, high: int | None, **options: Any) -> MinimalK | None:
    try:
        return minimal_k(model, tokens, config, high=high, **options)
    except ValueError:
        if high is None:
            raise  # all blocks are kept there, so it is no lack of k
        return None


def _minimal_figures(found: MinimalK | None) -> dict[str, Any]:
    if found is None:
        return {"k": pd.NA, "kept_fraction": np.nan, "fails_below": pd.NA, "kl": np.nan, "passes": pd.NA}
    whole = [trial for trial in found.trials if trial.layer is None]  # the controls lower no layer or head after that
    kl = next(trial.kl for trial in whole if trial.k == found.k)
    passes = 2 + len(whole) * (found.passes - 2) // len(found.trials)
    fails = pd.NA if found.fails_below is None else found.fails_below
    return {
        "k": found.k,
        "kept_fraction": found.kept_fraction,
        "fails_below": fails,
        "kl": kl,
        "passes": passes,
    }


def _with_counts(rows: list[dict[str, Any]], **counts: int) -> pd.DataFrame:
    return pd.DataFrame(rows).assign(**counts)
