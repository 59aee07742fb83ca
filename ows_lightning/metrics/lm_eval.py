"""Tasks of lm-evaluation-harness."""

from __future__ import annotations

from typing import Any

from ows_lightning.errors import UsageError


def run_tasks(model: Any, tokenizer: Any, tasks: list[str], include_path: str | None = None) -> dict[str, dict[str, Any]]:
    """Returns a model's figures in tasks of lm-evaluation-harness, also of YAML files in a folder, and prints their table."""
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
        from lm_eval.utils import make_table
    except ImportError as error:
        raise UsageError('tasks: needs lm-eval; pip install "ows_lightning[eval]"') from error
    manager = TaskManager(include_path=include_path)
    if unknown := [task for task in tasks if task not in manager.all_tasks]:
        raise UsageError(f"tasks: lm-eval has no task '{unknown[0]}'; `lm_eval ls tasks` lists those that it has")
    results = simple_evaluate(HFLM(pretrained=model, tokenizer=tokenizer), tasks=tasks, task_manager=manager)
    print(make_table(results))
    return dict(results["results"])
