"""The model card of a trained model, from what its run left, and the upload to the hub."""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import HfApi, ModelCardData
from huggingface_hub.errors import HFValidationError, HTTPError

from ows_lightning.errors import RunError, UsageError, first_line, typed_path
from ows_lightning.report.run import RunRecord, is_run_folder
from ows_lightning.report.tables import LABELS, formatted, key_figures


def model_card(hparams: Mapping[str, Any], run_dir: Path, checkpoint: str = "") -> str:
    """A model card: what was trained, how, and how well, as far as known; `checkpoint` names whose weights these are."""
    name = str(hparams["model_name_or_path"])
    local = "://" in name or typed_path(name).exists()
    base = Path(name).name if local else name
    known: Any = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["ows_lightning"]}
    header = ModelCardData(base_model=None if local else name, **known)
    run = None
    with contextlib.suppress(UsageError):  # figures that can't be read must not keep the model from being saved
        run = RunRecord.read(run_dir) if is_run_folder(run_dir) else None
    method = _method(hparams, run)
    how = f"`{base}`, fine-tuned with {f'{method} in ' if method else ''}ows_lightning."
    how += f" Weights of the checkpoint `{checkpoint}`; the figures are those of the whole run." if checkpoint and run else ""
    parts = [f"---\n{header}\n---", f"# {Path(base).name}, fine-tuned", how, *(_from_run(run) if run else [])]
    return "\n\n".join(parts) + "\n"


def _method(settings: Mapping[str, Any], run: RunRecord | None) -> str:
    """The name of what was done, from the module's settings and those of the run; "" if it is not known."""
    if settings.get("lora") is not None:
        return "LoRA"
    galore = "GaLore" if settings.get("rank") is not None else None
    sampling = run.config.get("sampling") if run and run.config else None
    if not sampling and run and run.history:
        sampling = {"distribution": "of another callback"}
    if not sampling:
        return (galore or "full fine-tuning") if run and run.config else ""
    distribution = sampling.get("distribution", "outlier")
    if distribution == "outlier":
        name = "[OWS, Outlier-weighed Layerwise Sampling](https://arxiv.org/abs/2405.18380)"
        return name if galore else f"{name}, in full rank"
    name = f"layerwise sampling (distribution {distribution})"
    name = "LISA (uniform layerwise sampling)" if distribution == "uniform" else name
    return f"{name} and GaLore" if galore else name


def without_folders(value: Any) -> Any:
    """Returns settings with absolute paths reduced to file names: a published card should not show the machine's folders."""
    if isinstance(value, Mapping):
        names = [without_folders(key) for key in value]
        names = [f"{name} ({names[:at].count(name) + 1})" if name in names[:at] else name for at, name in enumerate(names)]
        return {name: without_folders(one) for name, one in zip(names, value.values(), strict=True)}
    if isinstance(value, (list, tuple)):
        return [without_folders(one) for one in value]
    if isinstance(value, (str, Path)) and (Path(value).is_absolute() or str(value).startswith("~")):
        return Path(value).name
    return value


def _from_run(run: RunRecord) -> list[str]:
    figures = key_figures(run)
    shown = {key: label for key, label in LABELS.items() if key not in ("run", "model") and figures[key] is not None}
    parts = ["\n".join(["| | |", "|---|---|", *(f"| {label} | {formatted(key, figures)} |" for key, label in shown.items())])]
    if run.config:
        settings = without_folders({key: run.config[key] for key in ("model", "data", "sampling") if key in run.config})
        parts += ["## Settings", f"```yaml\n{yaml.safe_dump(settings, sort_keys=False)}```"]
    return parts


def upload(directory: Path, name: str) -> str:
    """Uploads a model directory to the hub, into a private repository if there is none of that name; returns its address."""
    api = HfApi()
    try:
        url = api.create_repo(name, private=True, exist_ok=True)
        api.upload_folder(folder_path=directory, repo_id=name)
    except (OSError, HTTPError, HFValidationError) as error:
        hint = f"run 'hf auth login'; the model is in '{directory}'"
        raise RunError(f"push_to_hub: can't upload to '{name}' ({first_line(error)}); {hint}") from error
    return str(url)
