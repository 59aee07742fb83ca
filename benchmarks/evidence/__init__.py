"""Controlled studies of the method: ``python -m benchmarks.evidence STUDY``, see ``docs/evidence.md``."""
