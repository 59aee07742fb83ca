"""A written model directory loads in transformers without a warning and computes the same."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from torch import distributed, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from ows_lightning.data.encoding import Encoder
from ows_lightning.errors import RunError, UsageError
from ows_lightning.models import export
from ows_lightning.models.export import save_huggingface
from ows_lightning.models.model_directory import check_replaceable
from ows_lightning.models.pretrained import check_model_name, load_config, load_model, load_tokenizer, resize_embeddings
from tests.distributed.launch import run
from tests.models.architectures import tiny_config
from tests.models.architectures import tiny_model as tiny_architecture
from tests.tiny import KINDS, tiny_batch, tiny_model

CHAT_TEMPLATE = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '</s>' }}{% endfor %}"


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character."""
    vocab = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", "<unk>", *map(chr, range(32, 127))])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=CHAT_TEMPLATE,
    )


@pytest.fixture
def reload(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], PreTrainedModel]:
    """Loads a directory as a user does, in the dtype it was saved in, and lets no warning pass."""
    messages: list[str] = []
    handler = logging.Handler(logging.WARNING)
    monkeypatch.setattr(handler, "emit", lambda record: messages.append(record.getMessage()))

    def load(directory: Path) -> PreTrainedModel:
        logger = transformers.utils.logging.get_logger("transformers")
        logger.addHandler(handler)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                model, report = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
                AutoTokenizer.from_pretrained(directory)
        finally:
            logger.removeHandler(handler)
        assert messages == []
        assert not any(report.values())
        return model

    return load


def logits(model: nn.Module) -> torch.Tensor:
    batch = tiny_batch()
    with torch.no_grad():
        return model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


def saved_names(directory: Path) -> list[str]:
    names = []
    for file in directory.glob("*.safetensors"):
        with safe_open(file, "pt") as weights:
            names += weights.keys()
    return sorted(names)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("architecture", KINDS)
def test_every_architecture_comes_back_equal(architecture: str, tied: bool, tmp_path: Path, reload: Callable) -> None:
    """And its files are those of transformers' own `save_pretrained`."""
    model = tiny_model(architecture, tie_word_embeddings=tied)
    save_huggingface(model, tiny_tokenizer(), tmp_path / "model")
    model.save_pretrained(tmp_path / "expected")

    again = reload(tmp_path / "model")
    assert torch.equal(logits(again), logits(model))
    assert (again.get_output_embeddings().weight is again.get_input_embeddings().weight) == tied
    assert again.config.architectures == [type(model).__name__]
    assert saved_names(tmp_path / "model") == saved_names(tmp_path / "expected")
    assert (tmp_path / "model" / "config.json").read_text() == (tmp_path / "expected" / "config.json").read_text()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_is_kept(dtype: torch.dtype, tmp_path: Path, reload: Callable) -> None:
    save_huggingface(tiny_model("llama", dtype=dtype), tiny_tokenizer(), tmp_path / "model")
    assert json.loads((tmp_path / "model/config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    assert {p.dtype for p in reload(tmp_path / "model").parameters()} == {dtype}


def test_directory_holds_all_that_a_user_needs(tmp_path: Path) -> None:
    save_huggingface(tiny_model("llama"), tiny_tokenizer(), tmp_path / "runs" / "model", card="# My model\n")
    files = {path.name for path in (tmp_path / "runs" / "model").iterdir()}
    assert files == {
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["model"]
    assert len({path.stat().st_mode for path in (tmp_path / "runs" / "model").iterdir()}) == 1
    assert (tmp_path / "runs/model/README.md").read_text() == "# My model\n"
    tokenizer = load_tokenizer(str(tmp_path / "runs" / "model"))
    assert tokenizer.chat_template == CHAT_TEMPLATE
    assert tokenizer("Hello").input_ids == tiny_tokenizer()("Hello").input_ids


def test_prompts_of_a_batch_are_padded_on_the_side_that_the_base_pads(tmp_path: Path) -> None:
    """Of Phi-3 on the left, where generation needs it."""
    tokenizer = tiny_tokenizer()
    tokenizer.init_kwargs["padding_side"] = tokenizer.padding_side = "left"
    tokenizer.save_pretrained(tmp_path / "base")
    save_huggingface(tiny_model("llama"), load_tokenizer(str(tmp_path / "base")), tmp_path / "model")
    batch = AutoTokenizer.from_pretrained(tmp_path / "model")(["a", "abc"], padding=True)
    assert batch["attention_mask"] == [[0, 0, 1], [1, 1, 1]]


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_new_tokens_are_kept(tied: bool, tmp_path: Path, reload: Callable) -> None:
    model, tokenizer = tiny_model("llama", vocab_size=99, tie_word_embeddings=tied), tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<{i}>" for i in range(29)]})
    resize_embeddings(model, tokenizer)
    save_huggingface(model, tokenizer, tmp_path / "model")
    assert torch.equal(logits(reload(tmp_path / "model")), logits(model))
    assert load_tokenizer(str(tmp_path / "model"))("a<28>").input_ids == [tokenizer("a").input_ids[0], 127]


def test_contradictory_generation_config_is_cleaned(tmp_path: Path, reload: Callable) -> None:
    model = tiny_model("llama")
    model.generation_config.do_sample = False
    model.generation_config.temperature = 0.6
    save_huggingface(model, tiny_tokenizer(), tmp_path / "model")
    generation = reload(tmp_path / "model").generation_config
    assert generation.temperature is None
    assert generation.eos_token_id == 2


def test_an_earlier_model_is_replaced(tmp_path: Path, reload: Callable) -> None:
    save_huggingface(tiny_model("gpt2"), tiny_tokenizer(), tmp_path / "model", card="old")
    model = tiny_model("llama")
    save_huggingface(model, tiny_tokenizer(), tmp_path / "model")
    assert torch.equal(logits(reload(tmp_path / "model")), logits(model))
    assert not (tmp_path / "model" / "README.md").exists()


def test_the_current_folder_is_not_pulled_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in (".", "/proc"):  # a volume is a mount point
        with pytest.raises(UsageError, match=rf"'{folder}' is the current folder or a mount point, which can't be replaced"):
            save_huggingface(tiny_model("llama"), tiny_tokenizer(), folder)
    with pytest.raises(UsageError, match="'s3://bucket/model' is an address; give a local folder"):
        save_huggingface(tiny_model("llama"), tiny_tokenizer(), "s3://bucket/model")


@pytest.mark.parametrize("foreign", ["thesis.tex", "train.py", "data.json", "checkpoints/last.ckpt", "old.model/notes"])
def test_a_directory_with_anything_else_is_left_alone(foreign: str, tmp_path: Path) -> None:
    save_huggingface(tiny_model("llama"), tiny_tokenizer(), tmp_path / "model")
    file = tmp_path / "model" / foreign
    file.parent.mkdir(exist_ok=True)
    file.write_text("precious")
    with pytest.raises(UsageError, match=f"holds '{Path(foreign).parts[0]}', which is no part of a model.*new dir"):
        save_huggingface(tiny_model("llama"), tiny_tokenizer(), tmp_path / "model")
    assert file.read_text() == "precious"


def test_what_is_no_model_is_left_alone(tmp_path: Path) -> None:
    (file := tmp_path / "file").write_text("precious")
    (project := tmp_path / "project").mkdir()
    (project / "README.md").write_text("precious")  # a model has one, too
    for path, said in ((file, "is a file; give a directory"), (project, "holds something else than a model")):
        with pytest.raises(UsageError, match=said):
            save_huggingface(tiny_model("llama"), tiny_tokenizer(), path)
    assert file.read_text() == (project / "README.md").read_text() == "precious"


def test_the_home_directory_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    save_huggingface(tiny_model("llama"), tiny_tokenizer(), "~/model")
    assert (tmp_path / "model" / "config.json").is_file()
    with pytest.raises(UsageError, match="is what the result is made from"):
        check_replaceable(tmp_path / "model", "~/model")


def test_buffers_that_training_has_changed_are_kept(tmp_path: Path, reload: Callable) -> None:
    model = tiny_architecture(tiny_config("deepseek_v3"))
    changed = {name: value.normal_() for name, value in model.named_buffers() if "e_score_correction_bias" in name}
    assert changed
    save_huggingface(model, tiny_tokenizer(), tmp_path / "model")
    again = dict(reload(tmp_path / "model").named_buffers())
    assert all(torch.equal(again[name], value) for name, value in changed.items())


def test_a_failed_export_leaves_the_earlier_model(tmp_path: Path, reload: Callable) -> None:
    model = tiny_model("llama")
    save_huggingface(model, tiny_tokenizer(), tmp_path / "model")

    class FullDisk(PreTrainedTokenizerFast):
        def save_pretrained(self, *_: object, **__: object) -> tuple[str, ...]:
            raise OSError("No space left on device")

    broken = FullDisk(tokenizer_object=tiny_tokenizer().backend_tokenizer)
    with pytest.raises(RunError, match=r"can't write the model to .*No space left on device"):
        save_huggingface(tiny_model("gpt2"), broken, tmp_path / "model")
    assert torch.equal(logits(reload(tmp_path / "model")), logits(model))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_large_models_are_written_in_shards(tmp_path: Path, reload: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "SHARD_BYTES", 50_000)
    model = tiny_model("llama")
    save_huggingface(model, tiny_tokenizer(), tmp_path / "model")
    files = sorted((tmp_path / "model").glob("*.safetensors"))
    assert len(files) > 2
    assert all(file.stat().st_size < 60_000 for file in files)
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    assert torch.equal(logits(reload(tmp_path / "model")), logits(model))


# peft


def with_adapters(model: PreTrainedModel, **config: object) -> nn.Module:
    """A peft model whose adapters do something."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, init_lora_weights=False, **config))
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return wrapped


@pytest.mark.parametrize("architecture", KINDS)
def test_lora_is_merged_into_a_plain_model(architecture: str, tmp_path: Path, reload: Callable) -> None:
    model = with_adapters(tiny_model(architecture), target_modules="all-linear")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    expected = logits(model)
    save_huggingface(model, tiny_tokenizer(), tmp_path / "model")

    assert not any("lora" in name or "base_layer" in name for name in saved_names(tmp_path / "model"))
    torch.testing.assert_close(logits(reload(tmp_path / "model")), expected, rtol=1e-4, atol=1e-4)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["q_proj"], "use_dora": True},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": [5, 6]},
        {"target_modules": ["q_proj"], "layer_replication": [[0, 2], [1, 2]]},
        {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
    ],
    ids=["dora", "modules_to_save", "embeddings", "tokens", "replicated", "experts"],
)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings.*", "ignore:.*tied.*")
def test_other_adapters_are_merged(config: dict, tied: bool, tmp_path: Path, reload: Callable) -> None:
    """Also where an adapter on tied embeddings parts them from the head."""
    architecture = "mixtral" if "target_parameters" in config else "llama"
    model = with_adapters(tiny_model(architecture, tie_word_embeddings=tied), **config)
    expected = logits(model)
    save_huggingface(model, tiny_tokenizer(), tmp_path / "model")
    torch.testing.assert_close(logits(reload(tmp_path / "model")), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(logits(model), expected)


def test_adapters_that_are_merged_or_deleted_already(tmp_path: Path, reload: Callable) -> None:
    model = with_adapters(tiny_model("llama"), target_modules=["q_proj"], modules_to_save=["lm_head"])
    model.merge_adapter()
    expected = logits(model)
    save_huggingface(model, tiny_tokenizer(), tmp_path / "merged")
    assert torch.equal(logits(reload(tmp_path / "merged")), expected)
    assert torch.equal(logits(model), expected)
    model.unmerge_adapter()
    model.delete_adapter("default")
    save_huggingface(model, tiny_tokenizer(), tmp_path / "deleted")
    torch.testing.assert_close(logits(reload(tmp_path / "deleted")), logits(tiny_model("llama")))


# FSDP2


def save_sharded(arguments: list[str]) -> None:
    """One of two processes: shards a tiny model and saves it."""
    from torch.distributed.fsdp import fully_shard

    directory, architecture, kind = arguments
    distributed.init_process_group("gloo")
    model: nn.Module = tiny_model(architecture, tie_word_embeddings=kind == "tied")
    if kind == "lora":
        model = with_adapters(model, target_modules="all-linear")
    for module in model.modules():
        if isinstance(module, nn.ModuleList):
            for block in module:
                fully_shard(block)
    fully_shard(model)
    before = {name: value.to_local().clone() for name, value in model.named_parameters()}
    expected = logits(model)
    save_huggingface(model, tiny_tokenizer(), Path(directory, "model"))
    assert Path(directory, "model", "config.json").is_file()  # on every rank, once the function is back
    assert all(torch.equal(value.to_local(), before[name]) for name, value in model.named_parameters())
    assert torch.equal(logits(model), expected)  # so that it can train on
    if distributed.get_rank() == 0:
        torch.save(expected, Path(directory, "expected.pt"))
    distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("architecture", "kind"),
    [("mixtral", "experts"), *(pytest.param("llama", kind, marks=pytest.mark.slow) for kind in ("tied", "lora"))],
)
def test_a_sharded_model_is_gathered(architecture: str, kind: str, tmp_path: Path, reload: Callable) -> None:
    run([str(tmp_path), architecture, kind], tmp_path / "output", ranks=2, target=save_sharded)
    model = reload(tmp_path / "model")
    expected = torch.load(tmp_path / "expected.pt")
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4 if kind == "lora" else 1e-6)
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == (kind == "tied")


@pytest.mark.slow
def test_a_model_from_gguf_becomes_an_ordinary_one(smollm2: str, tmp_path: Path, reload: Callable) -> None:
    check_model_name(smollm2)
    dtype = torch.bfloat16
    model, config = load_model(smollm2, dtype=dtype), load_config(smollm2)
    tokenizer = load_tokenizer(smollm2)
    assert (config.model_type, config.num_hidden_layers, config.tie_word_embeddings) == ("llama", 30, True)
    assert (tokenizer.eos_token_id, tokenizer.bos_token_id) == (config.eos_token_id, config.bos_token_id)
    assert model.training
    assert {p.dtype for p in model.parameters()} == {dtype}
    save_huggingface(model, tokenizer, tmp_path / "model")

    again = reload(tmp_path / "model")
    assert {p.dtype for p in again.parameters()} == {dtype}
    assert "quantization_config" not in json.loads((tmp_path / "model/config.json").read_text())
    assert "lm_head.weight" not in saved_names(tmp_path / "model")
    assert torch.equal(logits(again), logits(model))

    tokenizer_again = AutoTokenizer.from_pretrained(tmp_path / "model")
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    assert tokenizer_again.chat_template == tokenizer.chat_template
    assert tokenizer_again.apply_chat_template(chat) == tokenizer.apply_chat_template(chat)
    assert (tokenizer_again.eos_token, tokenizer_again.bos_token) == ("<|im_end|>", "<|im_start|>")
    prompt = tokenizer_again.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")
    answer = again.generate(**prompt, max_new_tokens=8, do_sample=False)
    assert "Paris" in tokenizer_again.decode(answer[0, prompt["input_ids"].size(1) :])

    messages = [{"role": "user", "content": "Où est 🙂?"}, {"role": "assistant", "content": "Ici: 🙂, çà et là."}]
    (row,) = Encoder(tokenizer, 512).encode({"messages": messages}, "row 1")
    assert row.input_ids == tokenizer.apply_chat_template(messages).input_ids
    assert tokenizer.decode([label for label in row.labels if label != -100]) == "Ici: 🙂, çà et là.<|im_end|>"
    text, ids = Encoder(tokenizer, 512).encode_prompt({"messages": messages}, "row 1")
    assert row.input_ids[: len(ids)] == ids
    assert text.endswith("<|im_start|>assistant\n")
