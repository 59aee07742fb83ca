"""The build step that pyproject.toml can't express: the wheel carries the configs and the quickstart's data."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithConfigs(build_py):
    """Copies ``configs/`` and the quickstart's rows into the package; an editable install finds them in the checkout."""

    def run(self):
        """Builds, and copies."""
        super().run()
        if not self.editable_mode:
            for source, target in self._shipped().items():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, target)

    def get_outputs(self, include_bytecode=1):
        """Returns all files that are built."""
        return [*super().get_outputs(include_bytecode), *map(str, self._shipped().values())]

    def _shipped(self):
        files = [
            *Path("configs").rglob("*.yaml"),
            *Path("configs").rglob("*.json"),
            *Path("examples").glob("family_relationships/*.jsonl"),
        ]
        return {file: Path(self.build_lib, "ows_lightning", file) for file in files}


setup(cmdclass={"build_py": BuildWithConfigs})
