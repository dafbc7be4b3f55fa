"""Controls: each run's row is what the tool gives on that run made by hand; and the commands print them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import stream_lens as sl
from stream_lens.circuits.controls import diff_controls, minimal_k_controls, receiver_controls, route_controls
from stream_lens.circuits.minimal_k import minimal_k
from stream_lens.circuits.receiver_heads import rank_correlation, receiver_heads
from stream_lens.circuits.reruns import CONTROLS, DENSE, answers, rerun
from stream_lens.circuits.routes import routes
from stream_lens.circuits.segmentation import windows
from stream_lens.cli import app
from tests.backend.hooked_models import tokens_of
from tests.backend.tiny_models import tiny_bridge
from tests.circuits.reference import cut_at, segments_at

CONFIG = sl.StreamConfig(q_block=8, k_block=8, k=3)
RUNS = ["stream", *CONTROLS, DENSE]
SEGMENTS = segments_at(cut_at(*range(0, 97, 8)), 96)


@pytest.fixture(scope="module")
def model():
    return tiny_bridge("LlamaForCausalLM")


@pytest.fixture(scope="module")
def caches(model):
    return [sl.run_with_masks(model, tokens_of(1, 96, seed), CONFIG)[1] for seed in range(4)]


def by_hand(model, seed, selector):
    return sl.run_with_masks(model, tokens_of(1, 96, seed), replace(CONFIG, selector=selector))[1]


def test_a_rerun_is_the_same_text_with_another_selector_and_dense_keeps_all(model, caches):
    for selector in ("stream", *CONTROLS):
        again, wanted = rerun(model, caches[0], selector), by_hand(model, 0, selector)
        for layer, mask in wanted.masks().items():
            assert torch.equal(again.masks()[layer].indices, mask.indices)
    dense = rerun(model, caches[0], DENSE)
    _, whole = model.run_with_cache(tokens_of(1, 96, 0))
    torch.testing.assert_close(dense["pattern", 2].to_dense(), whole["pattern", 2], rtol=1e-4, atol=1e-5)
    assert not sl.is_streamed(model)


def test_rows_are_the_tools_on_runs_made_by_hand(model, caches):
    told: list[str] = []
    routed = route_controls(model, caches[0], (20, 28), on_run=told.append).set_index("run")
    ranked = receiver_controls(model, caches, SEGMENTS, top_n=4).set_index("run")
    assert list(routed.index) == list(ranked.index) == RUNS
    assert sorted(told) == sorted(RUNS)
    dense = receiver_heads([rerun(model, cache, DENSE) for cache in caches], SEGMENTS, top_n=4)
    for selector in ("stream", *CONTROLS):
        runs = [by_hand(model, seed, selector) for seed in range(4)]
        assert routed.loc[selector, "flow"] == pytest.approx(routes(runs[0], (20, 28)).flow)
        ranking = rank_correlation(dense, receiver_heads(runs, SEGMENTS, top_n=4))
        assert ranked.loc[selector, "spearman"] == pytest.approx(ranking.spearman)
        assert ranked.loc[selector, "top_shared"] == ranking.top_shared
    assert routed.loc[DENSE, "like_dense"] == ranked.loc[DENSE, "spearman"] == pytest.approx(1)
    assert routed["pruned_causal"][:4].nunique() == 1
    assert routed.loc[DENSE, "pruned_causal"] == 0
    assert set(ranked["texts"]) == {4}


def test_diffs_of_pairs_have_their_random_pairs_and_answers(model, caches):
    frame = diff_controls(model, caches[:2], caches[2:], answer_tokens=2).set_index("run")
    assert list(frame.index) == RUNS
    found = sl.mask_diff(
        [by_hand(model, seed, "random") for seed in (0, 1)], [by_hand(model, s, "random") for s in (2, 3)]
    )
    for name in ("moved", "control_moved"):
        assert frame.loc["random", name] == pytest.approx(found.heads[name].mean())
    assert frame.loc["random", "added"] == found.heads["added"].sum() == 0
    assert frame.loc[DENSE, "like_dense"] == pytest.approx(1)
    assert set(frame["pairs"]) == set(frame["control_pairs"]) == {2}
    assert frame.loc["stream", "failure_answer"] == answers(model, caches[2], "stream", 2)[0]
    assert diff_controls(model, caches[0], caches[1])["control_moved"].isna().all()


def test_minimal_k_of_every_control_and_none_where_there_is_none(model):
    tokens = tokens_of(1, 115, 0)
    result = minimal_k(model, tokens, CONFIG, n_match=5)
    frame = minimal_k_controls(model, tokens, result).set_index("run")
    assert list(frame.index) == ["stream", *CONTROLS]
    for selector in CONTROLS:
        assert frame.loc[selector, "k"] == minimal_k(model, tokens, replace(CONFIG, selector=selector), n_match=5).k
    by_layer = minimal_k(model, tokens, CONFIG, n_match=5, per="layer")
    assert by_layer.passes > result.passes
    lowered = minimal_k_controls(model, tokens, by_layer).set_index("run")
    assert lowered.loc["stream", "passes"] == frame.loc["stream", "passes"] == result.passes
    highest = int(frame["k"].max())
    least = int(frame["k"].min())
    assert least < highest
    bounded = minimal_k_controls(model, tokens, result, high=highest - 1).set_index("run")
    assert bounded["k"].isna().any()
    assert np.isnan(bounded.loc[bounded["k"].isna(), "kl"]).all()


def test_what_cannot_be_run_again_says_so(model, caches):
    with sl.stream(model, CONFIG), pytest.raises(RuntimeError, match="leave the `with` block"):
        rerun(model, caches[0], "random")
    bare = sl.SparseActivationCache(caches[0].cache_dict, None)
    with pytest.raises(ValueError, match="does not say which tokens"):
        rerun(model, bare, "random")
    with pytest.raises(ValueError, match="the cache's model"):
        rerun(tiny_bridge("LlamaForCausalLM", num_hidden_layers=2), caches[0], "random")
    with pytest.raises(ValueError, match="give runs of one"):
        diff_controls(model, caches[0], by_hand(model, 1, "random"))


def test_left_padding_is_refused_where_a_bridge_would_read_it(model, tmp_path: Path, monkeypatch):
    texts = [" ".join(f"t{3 + n % 90}" for n in range(count)) for count in (60, 40)]
    segments = [windows(text, model.tokenizer, tokens=8) for text in texts]
    found = {}
    for side in ("left", "right"):
        monkeypatch.setattr(model.tokenizer, "padding_side", side)
        found[side] = sl.run_with_masks(model, texts, CONFIG)[1]
        found[side].save(tmp_path / side)
    for cache in (found["left"], found["left"].without_scores(), sl.SparseActivationCache.load(tmp_path / "left")):
        with pytest.raises(ValueError, match="padded on the left"):
            rerun(model, cache, "random")
        with pytest.raises(ValueError, match="padded on the left"):
            receiver_heads(cache, segments)
    right = sl.SparseActivationCache.load(tmp_path / "right")
    assert rerun(model, right, "stream").masks()[1].indices.equal(right.masks()[1].indices)
    assert receiver_heads(right, segments).heads


@pytest.fixture
def files(caches, tmp_path: Path, model, monkeypatch):
    monkeypatch.setattr("stream_lens.cli.inputs.load", lambda *args, **kwargs: model)
    monkeypatch.setattr("stream_lens.cli.receivers.load", lambda *args, **kwargs: model)
    for number, cache in enumerate(caches):
        folder = tmp_path / ("success", "failure")[number % 2]
        folder.mkdir(exist_ok=True)
        cache.without_scores().save(folder / f"{number}.safetensors")
    return tmp_path


def said(*command: object) -> str:
    result = CliRunner().invoke(app, [str(word) for word in command], env={"COLUMNS": "160"})
    assert result.exit_code == 0, (result.output, result.exception)
    return result.output


def test_commands_print_controls_by_default_and_none_on_request(files: Path):
    both = (files / "success", files / "failure")
    one = (both[0] / "0.safetensors", "--source", "20:28")
    text = files / "text.txt"
    text.write_text(" ".join(f"t{3 + n % 90}" for n in range(100)))
    sizes = ("--text", text, "--q-block", 8, "--k-block", 8)
    for command, counted in (
        (("diff", *both), "n = 2 pairs"),
        (("routes", *one), "n = 1 text"),
        (("minimal-k", *sizes), "n = 1 text"),
    ):
        out = files / command[0]
        output = said(*command, "--out", out)
        assert all(name in output for name in ("stream", *CONTROLS)), output
        assert counted in output
        assert (out / "controls.csv").is_file()
        bare = said(*command, "--no-controls", "--out", files / "bare")
        assert "window_sinks" not in bare
    assert not (files / "bare" / "controls.csv").exists()
    assert "T = 96, stream, k = 3" in said("routes", *one, "--no-controls", "--out", files)


def test_receivers_are_ranked_against_dense_under_every_control(files: Path, model, monkeypatch):
    sentences = [" ".join(f"t{3 + (7 * n + m * m) % 90}" for m in range(9)) + " " for n in range(12)]
    traces = files / "traces.jsonl"
    rows = (
        {"problem": "t5 t6", "reasoning": "".join(sentences), "sentences": sentences, "number": n} for n in range(2)
    )
    traces.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ("--traces", traces, "--q-block", 8, "--k-block", 8, "--k", 3, "--top-n", 3, "--out", files)
    output = said("receivers", *options)
    assert "n = 2 texts" in output
    monkeypatch.setattr(model.cfg, "default_prepend_bos", False, raising=False)  # as Qwen's and GPT-NeoX's bridges
    assert "n = 2 texts" in said("receivers", *options, "--no-controls")
    assert all(name in output for name in ("stream", *CONTROLS, DENSE))
    assert "window_sinks" not in said("receivers", *options, "--no-controls")


def test_bad_arguments_get_a_sentence(files: Path):
    def error(*command: object) -> str:
        return str(CliRunner().invoke(app, [str(word) for word in command]).exception)

    one = files / "success" / "0.safetensors"
    assert "no cache file" in error("routes", files / "nothing", "--source", "1:2")
    assert "is no place" in error("routes", one, "--source", "needle")
    assert "holds 2 caches" in error("routes", files / "success", "--source", "1:2")
    (files / "empty").mkdir()
    assert "has no cache files" in error("diff", files / "empty", one)
    assert "2 successful and 1 failed" in error("diff", files / "success", one)
