"""CommandTrainer: the Trainer with a method for each command that Lightning lacks."""

import copy
import re
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule, LightningModule

from ows_lightning.checkpoints.find import read_checkpoint
from ows_lightning.checkpoints.shards import load_weights
from ows_lightning.cli.preflight import check_writable
from ows_lightning.errors import UsageError
from ows_lightning.memory.planner import plan_from_config, plot_plan, write_config_for_card
from ows_lightning.models.causal_lm import CausalLM
from ows_lightning.models.delta import write_delta
from ows_lightning.models.export import save_huggingface
from ows_lightning.models.model_directory import check_replaceable
from ows_lightning.models.pretrained import allocate
from ows_lightning.module import DTYPES, CausalLMModule
from ows_lightning.report.model_card import model_card, upload
from ows_lightning.report.plots import plot_scores
from ows_lightning.report.run import RunRecord, run_containing
from ows_lightning.sampling.callback import LayerwiseSampling
from ows_lightning.sampling.distributions import score_name
from ows_lightning.sampling.scores import BlockScores
from ows_lightning.trainer import OWSTrainer


class CommandTrainer(OWSTrainer):
    """``OWSTrainer`` with a method for each command of this package, and tables of what ``validate`` and ``test`` find."""

    def validate(self, *args: Any, verbose: bool = True, **kwargs: Any) -> Any:
        """Evaluate on the validation set: loss, perplexity, exact match of generated answers.

        Args:
            verbose: Print the figures.
        """
        return self._print_metrics(super().validate(*args, verbose=False, **kwargs), verbose)  # type: ignore[misc]

    def test(
        self, *args: Any, verbose: bool = True, tasks: list[str] | None = None, include_path: Path | None = None, **kwargs: Any
    ) -> Any:
        """Evaluate on the test set: loss, perplexity, exact match of generated answers, accuracy where rows have choices.

        Args:
            verbose: Print the figures.
            tasks: Names of tasks of lm-evaluation-harness to run, too. Needs the extra ``eval``.
            include_path: A folder with YAML files of further tasks.
        """
        if tasks and not isinstance(model := kwargs.get("model", next(iter(args), None)), CausalLMModule):
            raise UsageError(f"tasks: {type(model).__name__} holds no model that lm-eval can run; use CausalLMModule")
        manager = _task_manager(tasks, include_path) if tasks else None  # before anything is evaluated
        metrics = self._print_metrics(super().test(*args, verbose=False, **kwargs), verbose)  # type: ignore[misc]
        module = self.lightning_module
        if manager is not None and isinstance(module, CausalLMModule):
            from lm_eval import simple_evaluate
            from lm_eval.models.huggingface import HFLM
            from lm_eval.utils import make_table

            module.to(self.strategy.root_device)  # Lightning moves it to the CPU when a loop ends
            lm = HFLM(pretrained=module.language_model, tokenizer=module.tokenizer)
            print(make_table(simple_evaluate(lm, tasks=tasks, task_manager=manager)))
        return metrics

    def _print_metrics(self, metrics: Any, verbose: bool) -> Any:
        """Prints an evaluation's figures, each once (Lightning repeats them for every data loader), and returns them."""
        merged = {name: value for part in metrics for name, value in part.items()}
        for name, value in merged.items():
            if verbose and self.is_global_zero and not name.endswith("_stderr"):
                error = merged.get(f"{name}_stderr")
                print(f"{name:<20} {value:.4g}" + ("" if error is None else f" ± {error:.3g}"))
        return metrics

    def score(self, model: LightningModule, datamodule: LightningDataModule, output: Path = Path(".")) -> BlockScores:
        """Compute the blocks' outlier scores; prints them, and writes them as JSON and as a bar chart.

        Args:
            model: The module with the model.
            datamodule: Where the calibration rows come from.
            output: The folder for ``outlier_scores.json`` (which ``sampling.scores`` takes) and ``outlier_scores.png``.
        """
        check_writable("output", output)
        sampling = copy.copy(LayerwiseSampling.of(self)) or LayerwiseSampling()
        sampling.scores = None
        if score_name(sampling.distribution) in (None, "gradient_norm"):
            print(f"sampling.distribution: {sampling.distribution} takes no scores of a model; these are outlier's")
            sampling.distribution = "outlier"
        self.strategy.connect(model)
        model.trainer = datamodule.trainer = self
        model.configure_model()
        datamodule.prepare_data()
        datamodule.setup("fit")
        self.accelerator.setup_device(self.strategy.root_device)  # the current one, where Triton's kernels run
        model.to(self.strategy.root_device)
        scores = sampling.compute_scores(model, datamodule.train_dataloader())
        scores.save(output / "outlier_scores.json")
        plot_scores(RunRecord(name=scores.model, path=output, scores=asdict(scores)))[0].savefig(output / "outlier_scores.png")
        print(f"{scores.table()}\nWritten: {output / 'outlier_scores.json'} and outlier_scores.png")
        return scores

    @staticmethod
    def plan(
        config: Any,
        method: str | list[str] | None = None,
        format: Literal["table", "json"] = "table",
        output: Path | None = None,
        card: str | None = None,
        fit: str | None = None,
    ) -> None:
        """Predict the memory and compute that a config needs, and what other methods would; loads nothing, needs no GPU.

        Args:
            config: The parsed config.
            method: Methods to predict, as ``ows,full`` or a list; all by default.
            format: ``table`` for people, ``json`` for programs.
            output: A folder for ``plan.png`` and ``plan.json``, and for the config of ``fit``.
            card: A card's name, such as ``RTX 4090``: estimate tokens a second on it, and what limits them.
            fit: A card's name: only write a config with which the run fits it.
        """
        if output is not None or fit is not None:
            check_writable("output", output or Path())
        if fit is not None:
            if method or card or format != "table":
                raise UsageError("fit: it only writes a config; leave out --card, --method and --format")
            print(write_config_for_card(config, fit, output or Path()))
            return
        plan = plan_from_config(config, re.split(r"[, ]+", method.strip()) if isinstance(method, str) else method, card)
        print(plan.to_json() if format == "json" else plan.to_table())
        if output is not None:
            (output / "plan.json").write_text(plan.to_json() + "\n")
            plot_plan(plan)[0].savefig(output / "plan.png")

    def export(
        self, model: LightningModule, datamodule: LightningDataModule,
        ckpt_path: str | Path, output: Path | None = None, push_to_hub: str | None = None, delta: bool = False,
    ) -> None:  # fmt: skip
        """Write a checkpoint's model as a Hugging Face directory.

        Args:
            model: The module that the checkpoint was saved from.
            datamodule: Not needed.
            ckpt_path: The checkpoint, or ``last`` for the newest run's.
            output: The directory to write; by default ``model-NAME`` in the run's folder, NAME being the checkpoint's.
            push_to_hub: Upload the directory to the hub under this name, ``owner/name``, too.
            delta: Write only the tensors that differ from the base model; `apply-delta` makes the model of both.
        """
        if not isinstance(model, CausalLMModule):
            raise UsageError(f"model: {type(model).__name__} holds no model that this package can export; use CausalLMModule")
        checkpoint, name = Path(ckpt_path), model.hparams["model_name_or_path"]
        run = run_containing(checkpoint) or checkpoint.absolute().parent
        output = output or run / f"{'delta' if delta else 'model'}-{checkpoint.name.removesuffix('.ckpt')}"
        target = check_replaceable(output, name)
        check_writable("output", target.parent)
        model.trainer = self  # the module reads the precision from it
        model.hparams.update(attn_implementation=None, kernels=None)  # nothing is computed, and a GPU's may be missing here
        model.causal_lm = CausalLM(allocate(model.build(empty=True)))
        if checkpoint.is_dir():  # a file is verified as it is read
            read_checkpoint(checkpoint)
        read_checkpoint(checkpoint, lambda path: load_weights(model, path))
        card = model_card(model.hparams, run, checkpoint.name)
        if delta:
            dtype = DTYPES.get(str(self.precision), torch.float32)
            with tempfile.TemporaryDirectory(dir=target.parent, prefix=".export-") as folder:
                whole = Path(folder, "model")
                save_huggingface(model.model, model.tokenizer, whole, card)
                model.causal_lm = None  # free its memory for the base
                sizes = write_delta(whole, target, name, dtype, model.hparams["trust_remote_code"])
            print(f"Written: {output} ({sizes})")
        else:
            save_huggingface(model.model, model.tokenizer, target, card)
            print(f"Written: {output}")
        if push_to_hub is not None:
            print(f"Uploaded: {upload(output, push_to_hub)}")


def _task_manager(tasks: list[str], include_path: Path | None) -> Any:
    """Returns lm-eval's task manager, also for YAML files in a folder; a UsageError names a task that it lacks."""
    from lm_eval.tasks import TaskManager

    if include_path is not None and not include_path.is_dir():
        raise UsageError(f"include_path: no folder '{include_path}'")
    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    if unknown := [task for task in tasks if task not in manager.all_tasks]:
        raise UsageError(f"tasks: lm-eval has no task '{unknown[0]}'; `lm_eval ls tasks` lists those that it has")
    return manager
