"""Predicts what a training step needs: see `plan`."""

from ows_lightning.memory.cards import write_config_for_card
from ows_lightning.memory.planner import Plan, plan, plan_from_config, plot_plan

__all__ = ["Plan", "plan", "plan_from_config", "plot_plan", "write_config_for_card"]
