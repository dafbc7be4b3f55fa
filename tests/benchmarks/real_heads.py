"""Real queries and keys for the selection benchmarks: both demo models, on a needle prompt, on prose and on code.

The texts come with Python, so that any machine recomputes the same tables: prose is the language reference that pydoc
shows, code is the source of argparse.
"""

from __future__ import annotations

import argparse
import inspect
import pydoc_data.topics
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from stream_lens.demo_models import DEMO_MODELS, demo_folder
from stream_lens.tasks.needle import needle_case

LAYERS = {"gemma-3-270m": (5, 11, 17), "smollm2-135m": (3, 10, 17, 24)}
"""Layers looked at: Gemma's global ones (the others see a window of 512 tokens), and some of SmolLM2's."""

TEXTS = ("needle", "prose", "code")

_PROSE = ("execmodel", "objects", "types", "customization", "import", "attribute-access", "naming", "debugger")
_CAPTURE = "stream_lens_benchmark_capture"


@dataclass(frozen=True)
class Heads:
    """One layer's queries and keys on one text, after rotary embedding and norms; `scale` multiplies their product."""

    model: str
    text: str
    layer: int
    q: Float[Tensor, "batch head query d_head"]
    k: Float[Tensor, "batch kv_head key d_head"]
    scale: float


def text_of(name: str, tokenizer: Any, tokens: int, *, depth: float = 0.4, seed: int = 0) -> str:
    """A text of at least `tokens` tokens; the needle prompt has at most as many."""
    if name == "needle":
        return needle_case("single_1", tokenizer, tokens=tokens, depth=depth, seed=seed).prompt
    if name == "prose":
        return "\n".join(pydoc_data.topics.topics[topic] for topic in _PROSE)
    return inspect.getsource(argparse)


@cache
def load_causal(name: str) -> tuple[Any, Any]:
    """The transformers model and tokenizer of a demo model."""
    folder = demo_folder(DEMO_MODELS[name])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder)


def captured(name: str, text: str, tokens: int, folder: Path | None) -> list[Heads]:
    """The heads of a demo model on a text, from `folder` where they are there already."""
    file = None if folder is None else folder / f"{name}_{text}_{tokens}.pt"
    if file is not None and file.exists():
        kept = torch.load(file)
        return [Heads(name, text, layer, q, k, scale) for layer, (q, k, scale) in kept.items()]
    model, tokenizer = load_causal(name)
    found = capture(name, model, tokenizer, text_of(text, tokenizer, tokens), text, tokens)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save({heads.layer: (heads.q, heads.k, heads.scale) for heads in found}, file)
    return found


@torch.no_grad()
def capture(name: str, model: Any, tokenizer: Any, text: str, text_name: str, tokens: int) -> list[Heads]:
    """One dense forward without logits; the queries and keys of the layers in `LAYERS`."""
    found: list[Heads] = []

    def keep(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any) -> Any:
        if module.layer_idx in LAYERS[name]:
            scale = options.get("scaling") or query.shape[-1] ** -0.5
            found.append(Heads(name, text_name, module.layer_idx, query.clone(), key.clone(), scale))
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)

    AttentionInterface.register(_CAPTURE, keep)
    model.set_attn_implementation(_CAPTURE)
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=True).input_ids[:, :tokens]
    if tokenizer.bos_token_id is not None and ids[0, 0] != tokenizer.bos_token_id:
        ids = torch.cat([torch.tensor([[tokenizer.bos_token_id]]), ids], 1)[:, :tokens]
    model.model(ids, use_cache=False)
    return found
