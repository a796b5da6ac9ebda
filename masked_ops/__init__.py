"""Pruned PyTorch layers that run at the speed of their sparsity."""

from . import prune
from ._ops import cache_info, clear_cache, is_available, use_path
from ._report import report
from ._version import __version__
from .functional import (
    apply_mask,
    masked_conv1d,
    masked_conv2d,
    masked_conv3d,
    masked_conv_transpose1d,
    masked_conv_transpose2d,
    masked_conv_transpose3d,
    masked_linear,
    packed_linear,
)
from .nn import (
    MaskedConv1d,
    MaskedConv2d,
    MaskedConv3d,
    MaskedConvTranspose1d,
    MaskedConvTranspose2d,
    MaskedConvTranspose3d,
    MaskedLinear,
)
from .packed import PackedLinear, freeze, pack, unpack

__all__ = [
    "MaskedConv1d",
    "MaskedConv2d",
    "MaskedConv3d",
    "MaskedConvTranspose1d",
    "MaskedConvTranspose2d",
    "MaskedConvTranspose3d",
    "MaskedLinear",
    "PackedLinear",
    "__version__",
    "apply_mask",
    "cache_info",
    "clear_cache",
    "freeze",
    "is_available",
    "masked_conv1d",
    "masked_conv2d",
    "masked_conv3d",
    "masked_conv_transpose1d",
    "masked_conv_transpose2d",
    "masked_conv_transpose3d",
    "masked_linear",
    "pack",
    "packed_linear",
    "prune",
    "report",
    "unpack",
    "use_path",
]
