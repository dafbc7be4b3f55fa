"""Routes against matrix products of the definition, planted circuits, and a way too long for a T × T tensor."""

from __future__ import annotations

import json
from itertools import pairwise

import networkx as nx
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import stream_lens as sl
from stream_lens.circuits.route_results import route_diff
from stream_lens.circuits.routes import routes
from tests.backend.tiny_models import VOCAB, tiny_bridge
from tests.circuits.planted import NEEDLE, RELAY, TOKENS, induction_model, induction_tokens, planted_run
from tests.circuits.reference import cut_at, random_pattern, segments_at


def span_of(found, node: int) -> tuple[int, int]:
    return found.nodes.spans[node]


@pytest.mark.parametrize("heads", ["mean", "max"])
@pytest.mark.parametrize("segments", [None, segments_at([NEEDLE, (60, 80)], TOKENS, ["needle", "question"])])
def test_the_planted_path_is_the_strongest_that_leaves_the_needle(heads, segments):
    found = routes(planted_run(), NEEDLE if segments is None else "needle", segments=segments, heads=heads)
    best = found.paths[0]
    assert found.reachable
    assert [(hop.layer, hop.head) for hop in best.hops] == [(0, 1), (2, 2)]
    assert span_of(found, best.nodes[0]) == NEEDLE
    assert span_of(found, best.nodes[-1]) == (TOKENS - 1, TOKENS)
    start, stop = span_of(found, best.nodes[1])
    assert start <= RELAY[0]
    assert RELAY[1] <= stop
    carrying = found.by_head()
    assert set(zip(carrying["layer"][:2], carrying["head"][:2], strict=True)) == {(0, 1), (2, 2)}


def test_a_needle_that_nothing_reads_has_no_route():
    found = routes(planted_run(works=False, k=2), NEEDLE)
    assert not found.reachable
    assert (found.flow, found.paths, found.total_edges) == (0.0, (), 0)
    assert len(found.to_frame()) == 0
    assert found.graph().number_of_nodes() == 0


@pytest.mark.hooked
def test_the_induction_circuit_of_a_hooked_transformer():
    model, tokens = induction_model(), induction_tokens(at=13)
    with sl.stream(model, q_block=4, k_block=4, k=12):
        logits, cache = model.run_with_cache(tokens)
    assert int(logits[0, -1].argmax()) == 2
    segments = segments_at(cut_at(*range(tokens.shape[1] + 1)), tokens.shape[1])
    found = routes(cache, 13, segments=segments)
    best = found.paths[0]
    assert [span_of(found, node)[0] for node in best.nodes] == [13, 14, 47]
    assert [(hop.layer, hop.head) for hop in best.hops] == [(0, 1), (1, 0)]
    assert min(hop.share for hop in best.hops) > 0.99
    with sl.stream(model, q_block=4, k_block=4, k=12):  # the claim, tested by intervention
        cut = model.run_with_hooks(
            tokens, fwd_hooks=[("blocks.1.attn.hook_pattern", lambda p, hook: p.drop(heads=[0], keys=slice(12, 16)))]
        )
    assert int(cut[0, -1].argmax()) != 2


def rollout(run, spans, residual, heads):
    """W of each layer from the dense patterns, multiplied out."""
    total = np.eye(len(spans))
    for pattern in run.values():
        dense = pattern.to_dense()[0].numpy()
        shares = np.array([[dense[:, slice(*i), slice(*j)].sum(-1).mean(-1) for j in spans] for i in spans])
        weight = shares.mean(-1) if heads == "mean" else shares.max(-1)
        weight = weight / weight.sum(-1, keepdims=True)
        total = ((1 - residual) * weight + residual * np.eye(len(spans))) @ total
    return total


@given(st.integers(20, 60), st.sampled_from([0.0, 0.3, 0.5]), st.sampled_from(["mean", "max"]), st.integers(0, 9))
@settings(max_examples=15)
def test_flow_is_the_rollout_and_all_paths_add_up_to_it(tokens, residual, heads, seed):
    run = {at: random_pattern(tokens, q_block=8, k_block=8, k=3, seed=seed + at) for at in range(3)}
    source, target = (5, 9), (tokens - 3, tokens)
    found = routes(run, source, target, residual=residual, heads=heads, paths=5000, max_edges=10**6)
    want = rollout(run, found.nodes.spans, residual, heads)
    weights = np.array([stop - start for start, stop in (span_of(found, node) for node in found.target)])
    expected = (want[np.ix_(found.target, found.source)].sum(-1) * weights / weights.sum()).sum()
    np.testing.assert_allclose(found.flow, expected, atol=1e-12)
    if found.reachable:
        np.testing.assert_allclose(sum(path.weight for path in found.paths), found.flow, rtol=1e-9)
        assert [path.weight for path in found.paths] == sorted((path.weight for path in found.paths), reverse=True)
        np.testing.assert_allclose(found.edges.groupby("step")["flow"].sum(), 1.0)
        np.testing.assert_allclose(found.node_flow.sum(-1), 1.0)
        assert len(found.edges) == found.total_edges


def test_the_graph_has_the_same_paths_and_every_format_reads_back(tmp_path):
    run = {at: random_pattern(40, q_block=8, k_block=8, k=3, seed=at) for at in range(3)}
    found = routes(run, (3, 6), paths=4, max_edges=10**6)
    graph = found.graph()
    assert nx.is_directed_acyclic_graph(graph)
    longest = nx.shortest_path(
        graph, f"0:{found.source[0]}", f"3:{found.target[0]}", weight=lambda a, b, edge: -np.log(edge["weight"])
    )
    assert [int(name.split(":")[1]) for name in longest] == list(found.paths[0].nodes)
    found.write_graph(tmp_path / "routes.graphml")
    found.write_graph(tmp_path / "routes.json")
    for read in (
        nx.read_graphml(tmp_path / "routes.graphml"),
        nx.node_link_graph(json.loads((tmp_path / "routes.json").read_text()), edges="edges"),
    ):
        assert set(read.edges) == set(graph.edges)
        assert read.nodes[f"0:{found.source[0]}"]["role"] == "source"
    with pytest.raises(ValueError, match="graphml"):
        found.write_graph(tmp_path / "routes.txt")
    assert json.loads(found.to_json())["total_edges"] == found.total_edges
    assert list(found.paths_frame().columns)[:3] == ["path", "weight", "flow"]


def test_max_edges_keeps_the_largest_flow_and_all_of_the_paths():
    run = {at: random_pattern(60, q_block=4, k_block=4, k=4, seed=at) for at in range(3)}
    whole, part = (routes(run, (3, 6), max_edges=limit) for limit in (10**6, 5))
    assert len(part.edges) < len(whole.edges) == part.total_edges
    assert part.flow == whole.flow
    assert part.paths == whole.paths
    graph = part.graph()
    for path in part.paths:
        assert all(graph.has_edge(f"{s}:{a}", f"{s + 1}:{b}") for s, (a, b) in enumerate(pairwise(path.nodes)))


def test_success_and_failure_differ_along_the_planted_edges():
    segments = segments_at([NEEDLE, RELAY], TOKENS, ["needle", "relay"])
    runs = [routes(planted_run(works), "needle", segments=segments) for works in (True, False)]
    diff = route_diff(*runs)
    top = diff.to_frame().iloc[:2]
    assert diff.success > diff.failure
    assert ("needle", "relay") in set(zip(top["key_label"], top["query_label"], strict=True))
    heads = diff.heads.sort_values("difference", ascending=False).iloc[:2]
    assert set(zip(heads["layer"], heads["head"], strict=True)) == {(0, 1), (2, 2)}
    with pytest.raises(ValueError, match="residual"):
        route_diff(runs[0], routes(planted_run(), "needle", segments=segments, residual=0.1))


def test_a_bridge_s_cache_from_a_file(tmp_path):
    model = tiny_bridge("Gemma3ForCausalLM")
    with sl.stream(model, q_block=8, k_block=8, k=3):
        _, cache = model.run_with_cache(torch.randint(3, VOCAB, (2, 70)))
    cache.save(tmp_path / "cache.safetensors", scores=True)
    loaded = sl.SparseActivationCache.load(tmp_path / "cache.safetensors")
    one, other = routes(cache, (8, 12), batch=1), routes(loaded, (8, 12), batch=1)
    assert one.paths == other.paths
    light = routes(cache.without_scores(), (8, 12), batch=1)
    assert light.flow == pytest.approx(one.flow, rel=0.5)


def test_what_has_no_route_says_so():
    run = planted_run()
    segments = segments_at([NEEDLE], TOKENS, ["needle"])
    for arguments, options, message in [
        (("needle",), {}, "give the segments"),
        (("haystack",), {"segments": segments}, "no segment with a token is labelled 'haystack'"),
        ((200,), {}, "out of range"),
        (((9, 9),), {}, "at least one"),
        (([],), {}, "source is empty"),
        ((3,), {"heads": "sum"}, "heads='sum'"),
        ((3,), {"residual": 1.0}, "residual=1.0"),
        ((3,), {"batch": 1}, "batch=1"),
        ((3,), {"paths": 0}, "paths=0"),
    ]:
        with pytest.raises(ValueError, match=message):
            routes(run, *arguments, **options)
    with pytest.raises(TypeError, match="only masks were given"):
        routes({layer: pattern.mask for layer, pattern in run.items()}, 3)
    with pytest.raises(ValueError, match="give segments"):
        routes(torch.rand(1, 2, 8, 8), 3)
