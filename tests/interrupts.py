"""KeyboardInterrupt at a chosen line, as Ctrl-C may come at any.

From Python 3.12 on, what a trace function raises in a comprehension (which is part of its function there) skips the end
of the ``with`` around it; what a signal raises does not. So a step that is tested here has no comprehension in a
``with`` that must be left in order.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import masked_ops

PACKAGE = str(Path(masked_ops.__file__).parent)


def interrupted(
    line: int, function: Callable[[], object], *, start: str | None = None, everywhere: bool = False
) -> bool:
    """Run ``function`` and raise KeyboardInterrupt at the ``line``-th line that it executes; False if it has fewer.

    Lines of the package count, or with ``everywhere`` those of torch and Python too; with ``start``, from the first
    call of a function of this name on.
    """
    count = 0

    def trace(frame: Any, event: str, arg: Any) -> Any:
        nonlocal count, start
        if not everywhere and not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        if frame.f_code.co_name == start:
            start = None
        if event == "line" and start is None:
            count += 1
            if count == line:
                sys.settrace(None)
                raise KeyboardInterrupt
        return trace

    previous = sys.gettrace()
    gc.disable()  # what is raised in a callback of the collector is lost
    sys.settrace(trace)
    try:
        function()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(previous)
        gc.enable()
    return False
