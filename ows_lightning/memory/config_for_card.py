"""The config that makes a run fit a card, as a file."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import yaml

from ows_lightning.errors import UsageError, command_line
from ows_lightning.memory.advice import advise, changes_that_fit, sentence
from ows_lightning.memory.cards import find_card
from ows_lightning.memory.settings import settings_from_config

_SECTIONS = ("seed_everything", "model", "data", "trainer", "sampling", "checkpoint")


def write_config_for_card(config: Any, card: str, folder: Path) -> str:
    """Writes a config that differs from the given one by what makes it fit a card.

    Args:
        config: A parsed config of the command line, see `plan_from_config`.
        card: The card's name, see `cards.CARDS`.
        folder: Where the file goes; it is named after the card.

    Returns:
        What was changed, and how to start the run, in words.

    Raises:
        UsageError: There is no such card, or nothing makes the run fit it.
    """
    chosen, settings = find_card(card, "fit"), settings_from_config(config)
    changes = changes_that_fit(settings, chosen.memory)
    if changes is None:
        raise UsageError(f"fit: on {chosen.name} ({chosen.memory} GB) the run {advise(settings, chosen.memory)}")
    given = config.as_dict() if hasattr(config, "as_dict") else dict(config)
    values = {name: _plain(given[name]) for name in _SECTIONS if name in given}
    for key, value in changes.items():
        section, name = key.split(".")
        part = values[section]
        part.get("init_args", part)[name] = value
    path = folder / f"fit_{chosen.name.lower().replace(' ', '_')}.yaml"
    changed = f"with {sentence(changes)}" if changes else "as it is"
    path.write_text(f"# {settings.name} on {chosen.name}: fits {changed}\n{yaml.safe_dump(values, sort_keys=False)}")
    return f"{chosen.name}: fits {changed}\nWritten: {path}\nNext: {command_line(f'fit --config {shlex.quote(str(path))}')}"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)
