"""Where the project lies, and what the fixture ``run_python`` is: a module that no folder's conftest can shadow."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

RunPython = Callable[..., "subprocess.CompletedProcess[str]"]
