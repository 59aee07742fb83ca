"""Predicts what a training step needs: see `planner.plan`."""
