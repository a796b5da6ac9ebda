"""What inductor has to be told of masks.

Whether a mask has changed is told by its version counter, and inductor's code moves none: it writes a buffer into the
memory of another one that is no longer needed, in the same tensor. A mask that a compiled function computes must keep
its memory to itself, or the next one that lies there would be taken for it.
"""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch

_MASKS = ("mask", "weight_bits")


@functools.cache
def _tell(operations: tuple[Any, ...]) -> None:
    try:
        from torch._inductor import lowering

        for op in operations:
            names = [argument.name for argument in op._schema.arguments]
            position = next((i for i, name in enumerate(names) if name in _MASKS), None)
            if position is not None and op not in lowering.lowerings:
                lowering.lowerings[op] = _keeping(lowering, op, position)
    except Exception as error:  # of a private interface
        warnings.warn(
            f"this torch's inductor cannot be told to leave masks alone ({type(error).__name__}: {error}): do not "
            "compute masks within compiled functions",
            stacklevel=2,
        )


def _keeping(lowering: Any, op: Any, position: int) -> Callable[..., Any]:
    """The lowering of ``op`` that inductor would make, after which the mask's memory is used for nothing else."""
    from torch._inductor import config, ir
    from torch._inductor.virtualized import V
    from torch._library.utils import get_layout_constraint_tag

    lowering.make_fallback(op, layout_constraint=lowering.tag_to_layout_constraint(get_layout_constraint_tag(op)))
    plain = lowering.lowerings[op]

    @functools.wraps(plain)
    def lower(*args: Any, **kwargs: Any) -> Any:
        mask = ir.ExternKernel.realize_input(args[position])
        if config.memory_planning and mask.get_name() not in V.graph.graph_inputs:
            # Its pools heed nothing, but what torch's own operations return is not from them.
            clone = lowering.fallback_handler(torch.ops.aten.clone.default, add_to_fallback_set=False)
            mask = ir.ExternKernel.realize_input(clone(mask))
        V.graph.never_reuse_buffers.add(mask.get_name())
        return plain(*args[:position], mask, *args[position + 1 :], **kwargs)

    return lower


def tell(operations: tuple[Any, ...]) -> None:
    """Tell inductor, if it is there, of the operations that take masks. Fakes call it: they run before any lowering."""
    if "torch._inductor.lowering" in sys.modules:
        _tell(operations)
