"""A delta and its base make the model again, to the bit, and nothing else does."""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from ows_lightning.cli.main import main
from ows_lightning.errors import UsageError
from ows_lightning.models import export
from ows_lightning.models.decoder import decoder_layers
from ows_lightning.models.delta import DeltaSize, apply_delta, load_delta, write_delta
from ows_lightning.models.export import save_huggingface
from ows_lightning.models.pretrained import load_model, load_tokenizer, resize_embeddings
from tests.cli.test_cli import config, run, whole_config  # noqa: F401
from tests.data.samples import tiny_tokenizer
from tests.models.architectures import tiny_config
from tests.models.architectures import tiny_model as tiny_architecture


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def train(model: PreTrainedModel, *blocks: int) -> None:
    """Changes some blocks, as training does."""
    layers = decoder_layers(model)
    with torch.no_grad():
        for block in blocks:
            for parameter in layers[block].parameters():
                parameter += 0.25


def make_delta(
    base: Path, change: Callable[[PreTrainedModel], nn.Module | None], dtype: torch.dtype = torch.float32
) -> DeltaSize:
    """Exports the changed base as ``whole`` and as ``delta``, beside the base."""
    model, tokenizer = load_model(str(base), dtype), load_tokenizer(str(base))
    changed = change(model)
    save_huggingface(model if changed is None else changed, tokenizer, base.parent / "whole", card="# Tuned\n")
    return write_delta(base.parent / "whole", base.parent / "delta", str(base), dtype)


def check_restored(base: Path, dtype: torch.dtype = torch.float32) -> None:
    """The delta's files are the export's, and the model in memory is that which the export loads as."""
    folder = base.parent
    sizes = apply_delta(str(base), folder / "delta", folder / "again")
    assert contents(folder / "again") == contents(folder / "whole")
    stored = [load_file(path) for path in (folder / "whole").glob("*.safetensors")]
    assert sizes.model == sum(value.nbytes for file in stored for value in file.values())
    model, expected = load_model(str(base), dtype), load_model(str(folder / "whole"), dtype)
    assert load_delta(model, folder / "delta") == sizes
    assert model.generation_config.to_dict() == expected.generation_config.to_dict()
    assert model.config.tie_word_embeddings == expected.config.tie_word_embeddings
    assert tensors(model).keys() == tensors(expected).keys()
    assert all(torch.equal(value, tensors(expected)[name]) for name, value in tensors(model).items())
    tied = [m.get_input_embeddings().weight is m.get_output_embeddings().weight for m in (model, expected)]
    assert tied[0] == tied[1]


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_what_trained_is_kept(model_dir: Callable[..., Path], tied: bool, dtype: torch.dtype) -> None:
    base = model_dir(tie_word_embeddings=tied)
    sizes = make_delta(base, lambda model: train(model, 1), dtype)
    kept = load_file(base.parent / "delta" / "delta-00001.safetensors")
    assert kept
    assert all(".layers.1." in name for name in kept)
    assert sizes.delta == sum(value.nbytes for value in kept.values()) < sizes.model / 3
    assert sizes == apply_delta(str(base), base.parent / "delta", base.parent / "again")
    check_restored(base, dtype)


def test_chat_templates_with_names_are_files_of_a_model(model_dir: Callable[..., Path]) -> None:
    base = model_dir()
    tokenizer = load_tokenizer(str(base))
    tokenizer.chat_template = {"default": tokenizer.chat_template, "tool_use": "{{ tools }}"}
    tokenizer.save_pretrained(base)
    for _ in range(2):  # an export and a delta are replaced by others
        make_delta(base, lambda model: train(model, 1))
        apply_delta(str(base), base.parent / "delta", base.parent / "again")
    for made in ("whole", "again"):
        assert load_tokenizer(str(base.parent / made)).chat_template == tokenizer.chat_template


def test_a_generation_config_that_was_changed(model_dir: Callable[..., Path]) -> None:
    base = model_dir()

    def change(model: PreTrainedModel) -> None:
        model.generation_config.max_new_tokens = 7

    make_delta(base, change)
    load_delta(model := load_model(str(base)), base.parent / "delta")
    assert model.generation_config.max_new_tokens == 7
    check_restored(base)


def test_small_updates_make_a_small_delta(model_dir: Callable[..., Path]) -> None:
    """What differs by the last bits of a bfloat16 takes less than half of its bytes."""
    base = model_dir()

    def change(model: PreTrainedModel) -> None:
        for parameter in model.parameters():
            parameter.data *= 1.01

    sizes = make_delta(base, change, torch.bfloat16)
    assert sizes.delta < 0.5 * sizes.model
    check_restored(base, torch.bfloat16)


def test_a_delta_whose_tensors_are_whole(model_dir: Callable[..., Path]) -> None:
    """As they were written before differences were compressed."""
    base = model_dir()
    make_delta(base, lambda model: train(model, 1))
    path, about = base.parent / "delta" / "delta-00001.safetensors", base.parent / "delta" / "delta.json"
    whole = load_file(base.parent / "whole" / "model.safetensors")
    save_file({name: whole[name] for name in load_file(path)}, path, metadata={"format": "pt"})
    contents_of = json.loads(about.read_text())
    del contents_of["packed"]
    about.write_text(json.dumps(contents_of))
    check_restored(base)


@pytest.mark.parametrize("architecture", ["gpt2", "mixtral", "qwen3_moe", "gemma2"])
def test_other_architectures(architecture: str, model_dir: Callable[..., Path]) -> None:
    base = model_dir(architecture)
    sizes = make_delta(base, lambda model: train(model, 0, 2))
    assert 0 < sizes.delta < 0.6 * sizes.model
    check_restored(base)


# transformers 5.17 has no sarvam_moe, whose weights in one tensor differ in size.
@pytest.mark.parametrize("kind", sorted({"hrm_text", "sarvam_moe"}.intersection(CONFIG_MAPPING)))
def test_several_weights_that_files_have_as_one(kind: str, tmp_path: Path) -> None:
    base = tmp_path / "base"
    tiny_architecture(tiny_config(kind)).save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    sizes = make_delta(base, lambda model: train(model, 1))
    assert 0 < sizes.delta < 0.5 * sizes.model
    check_restored(base)


def test_code_that_comes_with_a_model_goes_along(
    model_dir: Callable[..., Path], add_own_code: Callable[[Path], None], tmp_path: Path
) -> None:
    add_own_code(base := model_dir())
    whole, delta = tmp_path / "whole", tmp_path / "delta"
    for _ in range(2):  # the second replaces the first
        save_huggingface(load_model(str(base), trust_remote_code=True), load_tokenizer(str(base), True), whole)
        write_delta(whole, delta, str(base), torch.float32, trust_remote_code=True)
        apply_delta(str(base), delta, tmp_path / "again", trust_remote_code=True)
    assert contents(tmp_path / "again") == contents(whole)
    assert {"frob.py", "names.py"} <= contents(whole).keys()
    plan = "plan --model.trust_remote_code true --data.dataset rows.jsonl --sampling.activated_layers 2 --method ows"
    main([*plan.split(), "--model.model_name_or_path", str(whole)])


def test_names_of_the_base_without_a_prefix(model_dir: Callable[..., Path]) -> None:
    """As GPT-2 has them on the hub."""
    base = model_dir("gpt2")
    weights = load_file(base / "model.safetensors")
    bare = {name.removeprefix("transformer."): value for name, value in weights.items() if name != "lm_head.weight"}
    save_file(bare, base / "model.safetensors", metadata={"format": "pt"})
    whole = AutoModelForCausalLM.from_pretrained(base)
    train(whole, 1)
    model = AutoModelForCausalLM.from_config(whole.config)
    model.load_state_dict(whole.state_dict())
    model.generation_config = whole.generation_config
    save_huggingface(model, load_tokenizer(str(base)), base.parent / "whole")
    sizes = write_delta(base.parent / "whole", base.parent / "delta", str(base), torch.float32)
    assert sizes.delta < sizes.model / 2
    check_restored(base)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_rows_for_new_tokens(model_dir: Callable[..., Path], tied: bool) -> None:
    base = model_dir(tie_word_embeddings=tied)

    def change(model: PreTrainedModel) -> None:
        tokenizer = load_tokenizer(str(base))
        tokenizer.add_tokens([f"<{i}>" for i in range(5)])
        resize_embeddings(model, tokenizer)
        train(model, 3)

    make_delta(base, change)
    check_restored(base)


@pytest.mark.parametrize("part", ["q_proj", "embed_tokens"])
@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings.*", "ignore:.*tied.*")
def test_lora_is_merged(model_dir: Callable[..., Path], part: str) -> None:
    """Also where it parts tied embeddings from the head."""
    peft = pytest.importorskip("peft")
    base = model_dir(tie_word_embeddings=True)

    def change(model: PreTrainedModel) -> nn.Module:
        torch.manual_seed(1)
        return peft.get_peft_model(model, peft.LoraConfig(r=2, init_lora_weights=False, target_modules=[part]))

    sizes = make_delta(base, change)
    assert sizes.delta < sizes.model
    whole = load_file(base.parent / "whole" / "model.safetensors")
    changed = load_file(base.parent / "delta" / "delta-00001.safetensors")
    assert changed.keys() == {name for name in whole if part in name or (part, name) == ("embed_tokens", "lm_head.weight")}
    check_restored(base)


def test_files_of_many_shards(model_dir: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    base = model_dir()
    load_model(str(base)).save_pretrained(base, max_shard_size=40_000)
    (base / "model.safetensors").unlink(missing_ok=True)
    monkeypatch.setattr(export, "SHARD_BYTES", 50_000)
    make_delta(base, lambda model: train(model, 0, 1, 2))
    assert len([*(base.parent / "whole").glob("model-*.safetensors")]) > 2
    assert len([*(base.parent / "delta").glob("delta-*.safetensors")]) > 1
    check_restored(base)


def write_gguf(path: Path, blocks: int = 4, width: int = 32, inner: int = 64, vocabulary: int = 128) -> None:
    """Writes a tiny Llama with random weights of 8 bits."""
    gguf = pytest.importorskip("gguf")
    writer, draw = gguf.GGUFWriter(path, "llama"), np.random.default_rng(0)
    writer.add_context_length(64)
    writer.add_embedding_length(width)
    writer.add_block_count(blocks)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(vocabulary)
    shapes = {"token_embd": (vocabulary, width), "output": (vocabulary, width), "output_norm": (width,)}
    for block in range(blocks):
        shapes |= {f"blk.{block}.attn_{name}": (width, width) for name in ("q", "k", "v", "output")}
        shapes |= {f"blk.{block}.ffn_{name}": (inner, width) for name in ("gate", "up")}
        shapes |= {f"blk.{block}.ffn_down": (width, inner)}
        shapes |= {f"blk.{block}.{name}_norm": (width,) for name in ("attn", "ffn")}
    for name, shape in shapes.items():
        values = draw.normal(size=shape).astype(np.float32)
        if len(shape) == 1:
            writer.add_tensor(f"{name}.weight", values)
        else:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(f"{name}.weight", gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_base_from_gguf(tmp_path: Path) -> None:
    name = str(tmp_path / "base.gguf")
    write_gguf(Path(name))
    base = load_model(name, torch.bfloat16)
    tuned = copy.deepcopy(base)
    train(tuned, 2)
    save_huggingface(tuned, tiny_tokenizer(), tmp_path / "whole")
    sizes = write_delta(tmp_path / "whole", tmp_path / "delta", name, torch.bfloat16)
    assert 0 < sizes.delta < sizes.model / 3
    load_delta(base, tmp_path / "delta")
    assert all(torch.equal(value, tuned.state_dict()[name]) for name, value in base.state_dict().items())


def test_another_base_is_refused(model_dir: Callable[..., Path]) -> None:
    base = model_dir()
    make_delta(base, lambda model: train(model, 1))
    other = load_model(str(base))
    with torch.no_grad():  # one bit of a block that the delta replaces
        weight = decoder_layers(other)[1].mlp.up_proj.weight
        weight.view(-1).view(torch.int32)[0] ^= 1
    before = tensors(other)
    with pytest.raises(UsageError, match=f"delta: this base is not the one that .* give '{base.name}'"):
        load_delta(other, base.parent / "delta")
    assert all(torch.equal(value, before[name]) for name, value in tensors(other).items())
    save_huggingface(other, load_tokenizer(str(base)), base.parent / "other")
    with pytest.raises(UsageError, match="delta: this base is not the one"):
        apply_delta(str(base.parent / "other"), base.parent / "delta", base.parent / "again")
    assert not (base.parent / "again").exists()
    with pytest.raises(UsageError, match=r"delta: the base is in torch.bfloat16, and the delta was made in torch.float32"):
        load_delta(load_model(str(base), torch.bfloat16), base.parent / "delta")


def test_a_damaged_delta_is_refused(model_dir: Callable[..., Path]) -> None:
    base = model_dir()
    make_delta(base, lambda model: train(model, 1))
    (base.parent / "delta" / "README.md").write_text("# Mine\n")  # which may be edited
    load_delta(load_model(str(base)), base.parent / "delta")
    path = base.parent / "delta" / "delta-00001.safetensors"
    whole = path.read_bytes()
    for damaged in (whole[:-1] + bytes([whole[-1] ^ 1]), whole[:-100], b""):
        path.write_bytes(damaged)
        with pytest.raises(UsageError, match=r"delta: .* is damaged"):
            load_delta(load_model(str(base)), base.parent / "delta")
    path.rename(base.parent / "lost")
    with pytest.raises(UsageError, match=r"delta: .* is damaged \(tensors have changed since it was written, or are missing"):
        load_delta(load_model(str(base)), base.parent / "delta")
    path.write_bytes(whole)
    about = base.parent / "delta" / "delta.json"
    text = about.read_text()
    about.write_text(text.replace('"model.safetensors"', '"../model.safetensors"'))  # it would be written elsewhere
    with pytest.raises(UsageError, match=r"delta: .* is damaged"):
        apply_delta(str(base), base.parent / "delta", base.parent / "again")
    about.write_text(text)
    other = base.parent / "delta" / "config.json"
    other.write_text(other.read_text() + " ")
    with pytest.raises(UsageError, match=r"delta: .* is damaged \(config.json has changed"):
        load_delta(load_model(str(base)), base.parent / "delta")
    path.unlink()
    with pytest.raises(UsageError, match=r"delta: .* is damaged"):
        load_delta(load_model(str(base)), base.parent / "delta")
    with pytest.raises(UsageError, match=r"delta: .* is no delta"):
        load_delta(load_model(str(base)), base)


def test_the_base_is_never_replaced(model_dir: Callable[..., Path]) -> None:
    base = model_dir()
    make_delta(base, lambda model: train(model, 1))
    before = contents(base)
    for directory in (base, base.parent / "elsewhere" / ".." / base.name):
        with pytest.raises(UsageError, match="is what the result is made from"):
            write_delta(base.parent / "whole", directory, str(base), torch.float32)
        with pytest.raises(UsageError, match="is what the result is made from"):
            apply_delta(str(base), base.parent / "delta", directory)
    with pytest.raises(UsageError, match="is what the result is made from"):
        apply_delta(str(base), base.parent / "delta", base.parent / "delta")
    assert contents(base) == before


def test_links(model_dir: Callable[..., Path]) -> None:
    """The hub's cache has links to files, and what is written may be a link to a folder."""
    base = model_dir()
    make_delta(base, lambda model: train(model, 1))
    (snapshot := base.parent / "snapshot").mkdir()
    for path in (base.parent / "delta").iterdir():
        (snapshot / path.name).symlink_to(path)
    (base.parent / "real").mkdir()
    (link := base.parent / "link").symlink_to("real")
    for _ in range(3):
        apply_delta(str(base), snapshot, link)
        assert link.is_symlink()
        assert contents(base.parent / "real") == contents(base.parent / "whole")
    assert not [path for path in base.parent.iterdir() if path.name.startswith(".")]


@pytest.mark.slow
def test_on_the_command_line(
    config: Path,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run("fit", config, "--trainer.max_steps", "2", "--trainer.precision", "bf16-true")
    checkpoint = ["--trainer.precision", "bf16-true", "--ckpt_path", "runs/version_0/checkpoints/last.ckpt"]
    run("export", config, *checkpoint, "--output", "whole")
    capsys.readouterr()
    run("export", config, *checkpoint, "--output", "delta", "--delta", "true")
    assert "% of the model's" in capsys.readouterr().out
    assert json.loads(Path("delta/delta.json").read_text())["base"] == "llama-chatml"
    assert str(Path.cwd()) not in Path("delta/delta.json").read_text()
    assert not [*Path().glob(".export-*")]
    main(["apply-delta", "llama-chatml", "delta"])
    assert "% of the model's" in capsys.readouterr().out
    Path("delta-model").rename("again")
    assert contents(Path("again")) == contents(Path("whole"))

    answers = []
    for model in ("delta", "whole"):
        monkeypatch.setattr("sys.stdin", io.StringIO("is 3 odd?\n"))
        main(["chat", "--model", model, "--max_new_tokens", "4"])
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1]

    before = contents(Path("llama-chatml"))
    for extra in ([], ["--delta", "true"]):
        with pytest.raises(SystemExit, match="2"):
            run("export", config, *checkpoint, "--output", "llama-chatml", *extra)
        assert "is what the result is made from, and would be replaced" in capsys.readouterr().err
    assert contents(Path("llama-chatml")) == before

    for words in ("apply-delta again delta --output wrong", "apply-delta delta delta --output wrong", "apply-delta again"):
        with pytest.raises(SystemExit, match="2"):
            main(words.split())
    said = capsys.readouterr().err
    assert "error: delta: this base is not the one" in said
    assert "error: model.model_name_or_path: 'delta' is a delta" in said
    assert not Path("wrong").exists()
