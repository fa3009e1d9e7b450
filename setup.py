"""The part of the build that setup.cfg cannot say: which commit a wheel is built from."""

from __future__ import annotations

import runpy
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
VERSION = runpy.run_path(str(ROOT / "unipool_jax" / "config" / "version.py"))


class BuildWithCommit(build_py):
    """Also records the commit in the package, for the metadata of runs."""

    def run(self) -> None:
        """Build the package; an editable one asks its checkout instead."""
        super().run()
        commit = VERSION["describe_commit"](ROOT) if (ROOT / ".git").exists() else None
        if commit is not None and not self.editable_mode:
            target = Path(self.build_lib) / "unipool_jax" / VERSION["RECORDED"]
            target.write_text(f"{commit}\n", encoding="utf-8")


setup(cmdclass={"build_py": BuildWithCommit})
