"""What cannot be streamed is refused by name, with the reason, before anything is changed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import stream_lens as sl
from stream_lens import UnsupportedArchitectureError
from stream_lens.backend import architectures, bridge
from tests.backend.hooked_models import hooked_model, tokens_of
from tests.backend.tiny_models import _SIZES, tiny_bridge, tiny_tokenizer

SMALL = {"hidden_size": 64, "num_attention_heads": 4, "n_layer": 2, "num_hidden_layers": 2, "vocab_size": 96}
BOOTED: dict[str, tuple[str, dict[str, Any], str]] = {
    "bloom": ("bloom", {**SMALL, "n_head": 4}, "ALiBi"),
    "mpt": ("mpt", {"d_model": 64, "n_heads": 4, "n_layers": 2, "vocab_size": 96, "max_seq_len": 128}, "ALiBi"),
    "falcon-alibi": ("falcon", {**SMALL, "alibi": True, "new_decoder_architecture": False}, "ALiBi"),
    "codegen": (
        "codegen",
        {"n_embd": 64, "n_head": 4, "n_layer": 2, "vocab_size": 96, "rotary_dim": 8, "n_positions": 128, "n_ctx": 128},
        "CodeGen",
    ),
    "deepseek": (
        "deepseek_v3",
        {
            **_SIZES,
            "num_hidden_layers": 2,
            "num_key_value_heads": 4,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 16,
            "first_k_dense_replace": 2,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "moe_intermediate_size": 32,
        },
        "latent attention",
    ),
}


def booted(kind: str, sizes: dict[str, Any]) -> Any:
    from transformer_lens.model_bridge import TransformerBridge

    hf = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**sizes))
    hf.config.architectures = [type(hf).__name__]
    return TransformerBridge.boot_transformers(
        f"tiny-{kind}", hf_model=hf.eval(), tokenizer=tiny_tokenizer(), device="cpu"
    )


@pytest.mark.parametrize("allow_untested", [False, True])
@pytest.mark.parametrize("name", list(BOOTED))
def test_bridges_that_would_run_dense(name: str, allow_untested: bool) -> None:
    kind, sizes, reason = BOOTED[name]
    model = booted(kind, sizes)
    with pytest.raises(UnsupportedArchitectureError, match=reason) as refusal:
        sl.install(model, allow_untested=allow_untested)
    assert "cannot be streamed" in str(refusal.value)
    assert not sl.is_streamed(model)


def component(name: str, base: type = object, **attributes: Any) -> Any:
    return type(name, (base,), attributes)()


def model_with(attn: Any, **block: Any) -> Any:
    """What `bridge.attention_modules` reads of a model."""
    inner = type("LlamaForCausalLM", (), {})()
    return SimpleNamespace(original_model=inner, blocks=[SimpleNamespace(attn=attn, **block)], cfg=SimpleNamespace())


@pytest.mark.parametrize("name", list(architectures._REFUSED))
def test_every_refused_component_and_its_subclasses(name: str) -> None:
    base = type(name, (), {})
    for attn in (base(), component("Subclass", base)):
        with pytest.raises(UnsupportedArchitectureError, match="cannot be streamed"):
            bridge.attention_modules(model_with(attn), allow_untested=True)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (model_with(component("AttentionBridge", is_causal=False)), "not causal"),
        (model_with(component("AttentionBridge", is_cross_attention=True)), "cross-attention"),
        (model_with(component("AttentionBridge"), cross_attn=object()), "cross-attention"),
        (model_with(component("AttentionBridge", forward=1, original_component=None)), "no transformers module"),
        (model_with(component("NewAttentionBridge")), "NewAttentionBridge has a forward of its own"),
        (model_with(None), "none of its blocks"),
        (SimpleNamespace(original_model=None), "without a model"),
        (SimpleNamespace(original_model=object(), cfg=None), "no blocks"),
    ],
    ids=[
        "encoder",
        "cross-attention",
        "decoder with cross-attention",
        "empty",
        "unknown",
        "none",
        "remote",
        "no blocks",
    ],
)
def test_components_that_are_not_causal_self_attention(model: Any, reason: str) -> None:
    with pytest.raises(UnsupportedArchitectureError, match=reason):
        bridge.attention_modules(model, allow_untested=True)


def test_a_subclass_that_changes_the_attention_is_refused() -> None:
    served = type(tiny_bridge("LlamaForCausalLM").blocks[0].attn)
    changed = type("ChangedAttentionBridge", (served,), {"forward": lambda self: None})
    attn = changed.__new__(changed)
    torch.nn.Module.__init__(attn)
    assert "ChangedAttentionBridge" in (architectures.attention_kind(attn).reason or "")


def test_an_untested_architecture_runs_only_when_asked_for() -> None:
    kind, sizes = "olmo", {**_SIZES, "num_hidden_layers": 2}
    sizes.pop("head_dim")
    model, tokens = booted(kind, sizes), tokens_of(1, 40)
    with pytest.raises(UnsupportedArchitectureError, match="allow_untested=True"):
        sl.install(model)
    with torch.no_grad():
        dense = model(tokens)
        with sl.stream(model, q_block=8, k_block=8, k=8, allow_untested=True):
            assert torch.allclose(model(tokens), dense, atol=1e-5)


def test_plain_modules_are_no_models() -> None:
    with pytest.raises(TypeError, match="boot a bridge"):
        sl.install(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match="boot a bridge"):
        sl.install(tiny_bridge("LlamaForCausalLM").original_model)


@pytest.mark.parametrize("name", ["HookedEncoder", "HookedEncoderDecoder", "HookedAudioEncoder"])
def test_encoder_classes_of_transformer_lens(name: str) -> None:
    with pytest.raises(UnsupportedArchitectureError, match=f"{name} cannot be streamed"):
        sl.install(component(name, torch.nn.Module))


@pytest.mark.hooked
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"positional_embedding_type": "alibi"}, "ALiBi"),
        ({"positional_embedding_type": "relative_positional_bias"}, "relative position bias"),
        ({"attention_dir": "bidirectional"}, "not causal"),
    ],
)
def test_hooked_transformers_that_would_run_dense(changes: dict[str, Any], reason: str) -> None:
    model = hooked_model("gpt2")
    for name, value in changes.items():
        setattr(model.cfg, name, value)
    with pytest.raises(UnsupportedArchitectureError, match=reason):
        sl.install(model)


def test_masks_that_no_block_mask_expresses_are_refused() -> None:
    model, tokens = tiny_bridge("LlamaForCausalLM"), tokens_of(1, 40)
    custom = torch.ones(1, 1, 40, 40, dtype=torch.bool).tril()
    with torch.no_grad(), sl.stream(model), pytest.raises(NotImplementedError, match="mask"):
        model.original_model(tokens, attention_mask=custom)
    packed = torch.cat([torch.arange(20), torch.arange(20)])[None]
    with torch.no_grad(), sl.stream(model), pytest.raises(NotImplementedError, match="packed"):
        model.original_model(tokens, position_ids=packed, use_cache=False)
