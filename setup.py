"""The rest is in pyproject.toml. Published models are folders of the source tree, which a wheel takes along."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class WithCheckpoints(build_py):
    """checkpoints/ into the package, where `zoo.list_pretrained` looks for it once installed."""

    def run(self) -> None:
        super().run()
        source = Path(__file__).resolve().parent / "checkpoints"
        if not self.editable_mode and source.is_dir():
            shutil.copytree(source, Path(self.build_lib, "zoo", "checkpoints"), dirs_exist_ok=True)


setup(cmdclass={"build_py": WithCheckpoints})
