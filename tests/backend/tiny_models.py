"""Tiny random models of every tested architecture, made in memory, for both classes of TransformerLens."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCAB = 96
WINDOW = 24
_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_WITHOUT_GROUPS = {name: value for name, value in _SIZES.items() if name not in ("num_key_value_heads", "head_dim")}

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "LlamaForCausalLM": ("llama", _SIZES),
    "MistralForCausalLM": ("mistral", {**_SIZES, "sliding_window": WINDOW}),
    "Qwen2ForCausalLM": ("qwen2", {n: v for n, v in _SIZES.items() if n != "head_dim"}),
    "Qwen3ForCausalLM": ("qwen3", _SIZES),
    "Gemma2ForCausalLM": (
        "gemma2",
        {**_SIZES, "sliding_window": WINDOW, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 5.0},
    ),
    "Gemma3ForCausalLM": (
        "gemma3_text",
        {**_SIZES, "sliding_window": WINDOW, "query_pre_attn_scalar": 16, "sliding_window_pattern": 2},
    ),
    "GPT2LMHeadModel": (
        "gpt2",
        {
            "vocab_size": VOCAB,
            "n_embd": 64,
            "n_layer": 3,
            "n_head": 4,
            "n_positions": 512,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "GPTNeoXForCausalLM": ("gpt_neox", _WITHOUT_GROUPS),
    "GptOssForCausalLM": (
        "gpt_oss",
        {**_SIZES, "sliding_window": WINDOW, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "OPTForCausalLM": (
        "opt",
        {
            "vocab_size": VOCAB,
            "hidden_size": 64,
            "ffn_dim": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "max_position_embeddings": 512,
            "word_embed_proj_dim": 64,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
}


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token a letter-like word, "t0" … "t95"; 0 is padding, 1 begins and 2 ends a text."""
    vocabulary = {"<pad>": 0, "<bos>": 1, "<eos>": 2, **{f"t{n}": n for n in range(3, VOCAB)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<eos>"
    )
    fast.init_kwargs.update(name_or_path="tiny", add_bos_token=True)
    return fast


def tiny_hf_model(architecture: str, seed: int = 0, **changes: Any) -> Any:
    """A random transformers model, float32, in eval mode."""
    kind, sizes = CONFIGS[architecture]
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**{**sizes, **changes}))
    for parameter in model.parameters():
        # Larger than the initialisation, so that attention is far from uniform and masks matter.
        parameter.data.copy_(torch.randn_like(parameter) * (0.25 if parameter.ndim > 1 else 0.1))
    model.config.architectures = [type(model).__name__]
    return model.eval()


def tiny_bridge(architecture: str, seed: int = 0, **changes: Any) -> Any:
    """The same as a TransformerBridge."""
    from transformer_lens.model_bridge import TransformerBridge

    model = tiny_hf_model(architecture, seed, **changes)
    name = f"tiny-{CONFIGS[architecture][0]}"
    return TransformerBridge.boot_transformers(name, hf_model=model, tokenizer=tiny_tokenizer(), device="cpu").eval()
