"""Loading by folder, by hub name (with fakes: no network) and, marked slow, the real demo weights."""

from __future__ import annotations

import logging

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from stream_lens.demo_models import DEMO_MODELS, DemoModelError, demo_folder
from stream_lens.models import load_demo_model, load_model

try:
    from transformer_lens import HookedTransformer
except ImportError:
    HookedTransformer = None

WORDS = ["<unk>", "<bos>", "<eos>", "the", "cat", "sat", "on", "a", "mat"]


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    # The variable is read when huggingface_hub is imported, so what it sets is set too.
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory) -> str:
    """A random two-layer Llama with a word-level tokenizer, as save_pretrained leaves it."""
    folder = str(tmp_path_factory.mktemp("tiny"))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", bos_token="<bos>", eos_token="<eos>", pad_token="<eos>"
    ).save_pretrained(folder)
    return folder


def test_folder_loads_as_a_bridge_with_the_same_logits(tiny_folder, capsys):
    model = load_model(tiny_folder, device="cpu")
    assert type(model).__name__ == "TransformerBridge"
    assert not model.training
    assert capsys.readouterr().out == ""
    tokens = model.to_tokens("the cat sat on a mat")
    assert tokens.tolist() == [[1, 3, 4, 5, 6, 7, 8]]
    plain = AutoModelForCausalLM.from_pretrained(tiny_folder)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), plain(tokens).logits, atol=1e-5, rtol=0)


def test_dtype_and_n_ctx_take_effect(tiny_folder):
    model = load_model(tiny_folder, n_ctx=16, dtype=torch.bfloat16, device="cpu")
    assert model.cfg.n_ctx == 16
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    assert load_model(tiny_folder, n_ctx=64, device="cpu").cfg.n_ctx == 64


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"n_ctx": 65}, ValueError, "n_ctx=65 is more than the 64 tokens that .* has: give at most 64"),
        ({"n_ctx": 0}, ValueError, "n_ctx=0 is not a number of tokens: give an integer of at least 1"),
        ({"n_ctx": True}, ValueError, "n_ctx=True is not a number of tokens"),
        ({"as_": "hooked"}, ValueError, 'cannot load as_="hooked" because .*: use as_="bridge"'),
        ({"as_": "transformer"}, ValueError, 'as_=\'transformer\' is not known: use "hooked", "bridge" or None'),
        ({"device": "nonsense"}, ValueError, "device='nonsense' cannot be used here"),
        ({"dtype": "float32"}, TypeError, "dtype='float32' is not a floating-point torch dtype"),
        ({"dtype": torch.int8}, TypeError, "not a floating-point torch dtype"),
    ],
)
def test_wrong_arguments_are_refused(tiny_folder, arguments, error, message):
    with pytest.raises(error, match=message):
        load_model(tiny_folder, **arguments)


@pytest.mark.parametrize("name", ["nobody/no-such-model", "./no-such-folder", "gpt2"])
@pytest.mark.parametrize("as_", [None, "bridge"])
def test_unreachable_name_lists_what_a_name_can_be(name, as_):
    with pytest.raises(ValueError, match=r"neither a demo model \(gemma-3-270m, smollm2-135m\), nor a model folder"):
        load_model(name, as_=as_)


def test_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"has no config\.json: give a folder written by save_pretrained"):
        load_model(tmp_path)


@pytest.mark.skipif(HookedTransformer is None, reason="TransformerLens 4 has no HookedTransformer")
def test_listed_hub_name_loads_hooked_by_default(monkeypatch):
    given = {}

    def load(name, **arguments):
        given.update(arguments, name=name)
        logging.warning("You are setting n_ctx=512 which is larger than ...")
        logging.warning("another warning")
        return torch.nn.Identity()

    monkeypatch.setattr(HookedTransformer, "from_pretrained_no_processing", load)
    load_model("gpt2", dtype=torch.bfloat16, device="cpu")
    assert given == {"name": "gpt2", "n_ctx": None, "dtype": torch.bfloat16, "device": "cpu"}


@pytest.mark.skipif(HookedTransformer is None, reason="TransformerLens 4 has no HookedTransformer")
def test_a_longer_context_than_the_table_of_transformer_lens(monkeypatch, caplog):
    def load(name, **arguments):
        logging.warning("You are setting n_ctx=%d which is larger than ...", arguments["n_ctx"])
        logging.warning("another warning")
        return torch.nn.Identity()

    monkeypatch.setattr(HookedTransformer, "from_pretrained_no_processing", load)
    config = LlamaConfig(max_position_embeddings=32_768)
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", lambda name: config)
    load_model("google/gemma-3-270m", n_ctx=32_768)  # the table says 8192, the model's own configuration more
    assert [record.getMessage() for record in caplog.records] == ["another warning"]
    with pytest.raises(ValueError, match="n_ctx=32769 is more than the 32768 tokens that google/gemma-3-270m has"):
        load_model("google/gemma-3-270m", n_ctx=32_769)


def test_hub_name_passes_everything_to_the_bridge(monkeypatch, capsys):
    from transformer_lens.model_bridge import TransformerBridge

    given = {}

    def boot(name, **arguments):
        print("Loaded")
        given.update(arguments, name=name)
        return torch.nn.Identity()

    monkeypatch.setattr(TransformerBridge, "boot_transformers", boot)
    load_model("nobody/unlisted", dtype=torch.float64, device="cpu")
    assert given == {"name": "nobody/unlisted", "n_ctx": None, "dtype": torch.float64, "device": "cpu"}
    assert capsys.readouterr() == ("", "Loaded\n")


def test_demo_models_are_refused_before_any_conversion(monkeypatch, tmp_path):
    monkeypatch.setenv("STREAM_LENS_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match="Unknown demo model 'gpt2': choose one of gemma-3-270m, smollm2-135m"):
        load_demo_model("gpt2")
    with pytest.raises(ValueError, match=r'smollm2-135m cannot load as_="hooked" because .*: use as_="bridge"'):
        load_demo_model("smollm2-135m", as_="hooked")
    with pytest.raises(ValueError, match="n_ctx=32769 is more than the 32768 tokens"):
        load_demo_model("gemma-3-270m", as_="bridge", n_ctx=32_769)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(HookedTransformer is not None, reason="TransformerLens 3 has HookedTransformer")
def test_hooked_is_refused_where_transformer_lens_has_none():
    with pytest.raises(ValueError, match=r'this TransformerLens has no HookedTransformer .*: use as_="bridge"'):
        load_demo_model("gemma-3-270m", as_="hooked")


def test_trouble_with_the_cache_is_not_blamed_on_the_name(monkeypatch):
    def full(demo):
        raise OSError("disk full")

    monkeypatch.setattr("stream_lens.models.demo_folder", full)
    with pytest.raises(OSError, match="disk full"):
        load_demo_model("smollm2-135m")


@pytest.fixture(scope="module")
def text() -> str:
    return "".join(f"The town number {i} lies {i * 7 % 31} miles from the sea. " for i in range(60))


def installed(name: str):
    try:
        return demo_folder(DEMO_MODELS[name])
    except DemoModelError as missing:
        return pytest.skip(str(missing))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["smollm2-135m", "gemma-3-270m"])
def test_real_bridge_matches_transformers(name, text):
    folder = installed(name)
    tokens = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt").input_ids[:, :600]
    assert tokens.shape[1] == 600  # longer than Gemma's window of 512
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(folder)(tokens, logits_to_keep=16).logits
        model = load_model(name, as_="bridge", device="cpu")
        torch.testing.assert_close(model(tokens, logits_to_keep=16), expected, atol=1e-4, rtol=0)
    assert model.cfg.n_ctx == DEMO_MODELS[name].n_ctx
    assert model.to_tokens("The")[0].tolist() == [model.tokenizer.bos_token_id, model.to_single_token("The")]


@pytest.mark.slow
@pytest.mark.skipif(HookedTransformer is None, reason="TransformerLens 4 has no HookedTransformer")
def test_real_hooked_matches_transformers(text):
    folder = installed("gemma-3-270m")
    tokens = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt").input_ids[:, :600]
    with torch.no_grad():
        plain = AutoModelForCausalLM.from_pretrained(folder)
        short, long = (plain(tokens[:, :n], logits_to_keep=16).logits for n in (200, 600))
        model = load_model("gemma-3-270m", as_="hooked", device="cpu")
        torch.testing.assert_close(model(tokens[:, :200])[:, -16:], short, atol=1e-4, rtol=0)
        # The two libraries round the rotary angles differently in float32, which grows with the position. With the
        # same tables, all else agrees past the window of 512 as well.
        for block in model.blocks:
            kind = "full_attention" if block.attn.attn_type == "global" else "sliding_attention"
            cos, sin = plain.model.rotary_emb(torch.zeros(()), torch.arange(600)[None], kind)
            block.attn.rotary_cos[:600], block.attn.rotary_sin[:600] = cos[0], sin[0]
        torch.testing.assert_close(model(tokens)[:, -16:], long, atol=1e-4, rtol=0)
    assert model.cfg.n_ctx == 32_768
    assert model.to_tokens("The")[0].tolist() == [model.tokenizer.bos_token_id, model.to_single_token("The")]
