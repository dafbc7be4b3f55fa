"""Mask diffs: set differences of the dense masks, planted edges, tests over pairs, and the control."""

from __future__ import annotations

import json

import numpy as np
import pytest
import scipy.stats
import torch

import stream_lens as sl
from stream_lens.circuits.mask_diff import mask_diff
from stream_lens.circuits.nodes import segment_nodes
from stream_lens.circuits.significance import corrected, paired_p_values
from tests.backend.tiny_models import VOCAB, tiny_bridge
from tests.circuits.planted import BLOCK, NEEDLE, RELAY, planted_run
from tests.circuits.reference import cut_at, random_pattern, segments_at


def test_cells_are_the_set_differences_of_the_masks():
    one, other = (random_pattern(60, q_block=8, k_block=8, k=3, seed=seed) for seed in (0, 1))
    diff = mask_diff(one, other)
    for name, mask in (
        ("added", one.mask - other.mask),
        ("removed", other.mask - one.mask),
        ("kept", one.mask & other.mask),
    ):
        chosen = diff.cells[diff.cells[name] == 1]
        ours = set(zip(chosen["head"], chosen["query"], chosen["key"], strict=True))
        _, head, query, slot = mask.kept.nonzero(as_tuple=True)
        assert ours == set(zip(head.tolist(), query.tolist(), mask.indices[mask.kept].tolist(), strict=True))
        assert diff.heads[name].sum() == len(ours)
        assert len(slot) == len(ours)
    cell = diff.cells.iloc[3]
    rows, keys = (slice(int(at) * 8, int(at) * 8 + 8) for at in (cell["query"], cell["key"]))
    for name, pattern in (("success", one), ("failure", other)):
        want = float(pattern.to_dense()[0, int(cell["head"]), rows, keys].sum(-1).mean())
        assert cell[name] == pytest.approx(want, abs=1e-6)
    assert diff.cells["p_value"].isna().all()
    assert diff.heads["moved"].between(0, 1).all()


def test_masks_alone_compare_without_masses():
    one, other = (random_pattern(60, q_block=8, k_block=8, k=3, seed=seed).mask for seed in (0, 1))
    diff = mask_diff({2: one}, {2: other})
    assert diff.cells["success"].isna().all()
    assert set(diff.cells["difference"]) <= {-1.0, 0.0, 1.0}
    assert set(diff.cells["layer"]) == {2}


def test_planted_edges_are_what_is_added():
    diff = mask_diff(planted_run(), planted_run(works=False))
    top = diff.to_frame()
    added = top[(top["difference"] > 0.02) & (top["added"] == 1)]
    relay, needle = {at // BLOCK for at in range(*RELAY)}, {at // BLOCK for at in range(*NEEDLE)}
    found = set(zip(added["layer"], added["head"], added["query"], added["key"], strict=True))
    assert found == {(0, 1, i, j) for i in relay for j in needle}
    layers = diff.by_layer().set_index("layer")
    assert layers["jaccard"].idxmin() == 0
    assert layers.loc[1, "jaccard"] == 1.0


def test_runs_of_different_lengths_compare_by_segment():
    def case(tokens: int, at: int):
        pattern = random_pattern(tokens, q_block=8, k_block=8, k=4, seed=tokens)
        segments = segments_at([(at, at + 6), (tokens - 9, tokens)], tokens, ["needle", "question"])
        return pattern, segments

    (one, ours), (other, theirs) = case(70, 20), case(96, 0)
    diff = mask_diff(one, other, ours, theirs)
    assert diff.by == "segment"
    frame = diff.to_frame()
    cell = frame[(frame["query_label"] == "question") & (frame["key_label"] == "needle") & (frame["head"] == 1)].iloc[0]
    want = [
        float(pattern.to_dense()[0, 1, slice(*s.token_spans[1]), slice(*s.token_spans[0])].sum(-1).mean())
        for pattern, s in ((one, ours), (other, theirs))
    ]
    assert [cell["success"], cell["failure"]] == pytest.approx(want, abs=1e-6)
    with pytest.raises(ValueError, match="do not align"):
        mask_diff(one, other)
    with pytest.raises(ValueError, match="do not align"):
        mask_diff(one, other, ours, segments_at([(0, 5)], 96, ["needle"]))


def test_pairs_get_means_p_values_and_a_control():
    success = [planted_run() for _ in range(8)]
    failure = [planted_run(works=False) for _ in range(8)]
    diff = mask_diff(success, failure, test="sign")
    top = diff.to_frame().iloc[0]
    assert (diff.pairs, diff.control_pairs) == (8, 16)
    assert top["p_value"] == pytest.approx(2 / 2**8)
    assert top["q_value"] >= top["p_value"]
    assert (diff.heads["control_moved"] == 0).all()  # runs of one group are all alike here
    assert diff.heads.loc[(diff.heads["layer"] == 0) & (diff.heads["head"] == 1), "moved"].item() > 0
    assert json.loads(diff.to_json())["pairs"] == 8


def test_a_batch_is_as_many_pairs_as_it_has_rows():
    model = tiny_bridge("LlamaForCausalLM")
    with sl.stream(model, q_block=8, k_block=8, k=3):
        caches = [model.run_with_cache(torch.randint(3, VOCAB, (3, 50)))[1] for _ in range(2)]
    together = mask_diff(*caches)
    alone = mask_diff(*([{n: p[row : row + 1] for n, p in c.patterns().items()} for row in range(3)] for c in caches))
    assert together.pairs == alone.pairs == 3
    np.testing.assert_allclose(together.cells["difference"], alone.cells["difference"])


@pytest.mark.parametrize("test", ["wilcoxon", "sign", "permutation"])
def test_p_values_are_scipy_s(test):
    differences = np.random.default_rng(0).normal(0.4, 1, (9, 6))
    ours = paired_p_values(differences, test)
    for cell in range(6):
        x = differences[:, cell]
        if test == "wilcoxon":
            want = scipy.stats.wilcoxon(x).pvalue
        elif test == "sign":
            want = scipy.stats.binomtest(int((x > 0).sum()), len(x)).pvalue
        else:
            want = scipy.stats.permutation_test(
                (x, np.zeros_like(x)),
                lambda a, b, axis: (a - b).mean(axis),
                permutation_type="samples",
                vectorized=True,
            ).pvalue
        assert ours[cell] == pytest.approx(want, abs=1e-9)
    assert (paired_p_values(np.zeros((5, 3)), test) == 1).all()
    assert (corrected(ours) >= ours).all()
    many = paired_p_values(np.random.default_rng(1).normal(2, 1, (20, 2)), test)
    assert (many < 0.05).all()


@pytest.mark.parametrize("pairs", [5, 13, 14, 20])
def test_a_wilcoxon_test_does_not_depend_on_other_cells(pairs):
    random = np.random.default_rng(pairs)
    clean = random.random((pairs, 1)) + 0.1
    zero, tied = clean.copy(), clean.copy()
    zero[0], tied[0] = 0, tied[1]
    p_values = paired_p_values(np.hstack([clean, zero, tied, zero * 0]), "wilcoxon")
    np.testing.assert_allclose(p_values[:2], [2.0 ** (1 - pairs), 2.0 ** (2 - pairs)])  # exact: all of one sign
    for cell, alone in ((0, clean), (1, zero), (2, tied)):
        assert p_values[cell] == paired_p_values(alone, "wilcoxon")[0]
    assert p_values[3] == 1


def test_labels_that_look_numbered_stay_apart():
    nodes = segment_nodes(segments_at(cut_at(0, 8, 16, 24), 24, ["n", "n", "n 0"]))
    assert len(set(nodes.labels)) == len(nodes.labels)
    assert "n 0" in nodes.labels


def test_what_cannot_be_compared_says_so():
    one, other = (random_pattern(60, q_block=8, k_block=8, k=3, seed=seed) for seed in (0, 1))
    with pytest.raises(ValueError, match="2 successful and 1 failed"):
        mask_diff([one, other], [one])
    with pytest.raises(ValueError, match="test='t'"):
        mask_diff(one, other, test="t")
    with pytest.raises(ValueError, match="without segments"):
        mask_diff(one, other, None, segments_at([(0, 60)], 60))
    with pytest.raises(ValueError, match=r"layers \[0\]"):
        mask_diff(one, {1: other})
    with pytest.raises(TypeError, match="dense pattern"):
        mask_diff(one.to_dense(), other.to_dense())
