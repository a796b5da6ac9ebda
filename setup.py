"""Adds the C++ sources to the package, from which the kernels are compiled at their first use.

With MASKED_OPS_PREBUILD=1 the compiled library is added too. That needs torch while building, and so
``pip install --no-build-isolation .``; the wheel then fits this torch, this Python and this kind of machine.
"""

import os
import shutil
import sys
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
PREBUILD = os.environ.get("MASKED_OPS_PREBUILD", "0") not in ("", "0")


class BuildPackage(build_py):
    def run(self) -> None:
        super().run()
        if self.editable_mode:  # the package is used from the source tree, which has csrc
            return
        package = Path(self.build_lib) / "masked_ops"
        for folder in ("csrc", "_prebuilt"):  # a former build's, whose files may be gone from the source
            shutil.rmtree(package / folder, ignore_errors=True)
        shutil.copytree(ROOT / "csrc", package / "csrc", ignore=lambda folder, names: [n for n in names if n[0] == "."])
        if PREBUILD:
            sys.path.insert(0, str(ROOT))
            from masked_ops import _build

            _build.build_ahead(package / "_prebuilt")


class PackageDistribution(Distribution):
    def has_ext_modules(self) -> bool:
        return PREBUILD


setup(cmdclass={"build_py": BuildPackage}, distclass=PackageDistribution)
