"""apply_mask: where(mask == 0, 0, weight * mask) in the memory format of the weight."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from generators import (
    FLOATS,
    INTEGERS,
    LAYOUTS,
    MASK_DTYPES,
    PATTERNS,
    assert_exact,
    every_capability,
    every_float,
    integers,
    mask_of,
    masked,
    name_of,
    normal,
    poisoned,
    running_on,
    spoiled,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import masked_ops
from masked_ops import _ops, reference

pytestmark = pytest.mark.usefixtures("device")

# Around the words of 64 bits in which masks are packed, and enough for several tasks of the parallel pass.
SHAPES = [(n,) for n in (1, 7, 8, 63, 64, 65, 127, 128, 129)] + [
    (1, 1),
    (3, 63),
    (2, 64),
    (5, 65),
    (129, 1),
    (7, 3, 3),
    (4, 4, 3, 3),
    (2, 3, 4, 1, 5),
    (2, 1, 2, 1, 2, 3),
    (300, 700),
    (40, 64, 9, 9),
]


def bits_of(t: torch.Tensor) -> torch.Tensor:
    return t.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()])


@every_capability
@every_float
def test_binary_mask_copies_bit_for_bit(dtype: torch.dtype, capability: str) -> None:
    with running_on(capability=capability), poisoned():
        for shape, pattern in itertools.product(SHAPES, PATTERNS):
            mask = mask_of(pattern, *shape)
            weight = spoiled(normal(*shape, dtype=dtype), mask)
            weight[torch.rand(shape) < 0.1] = -0.0
            weight[torch.rand(shape) < 0.1] = float("nan")
            result = masked_ops.apply_mask(weight, mask)
            assert torch.equal(bits_of(result), torch.where(mask, bits_of(weight), 0)), (shape, pattern)


@every_capability
@every_float
@pytest.mark.parametrize("mask_dtype", MASK_DTYPES, ids=name_of)
def test_soft_mask_multiplies(mask_dtype: torch.dtype, dtype: torch.dtype, capability: str) -> None:
    if mask_dtype == torch.bool:
        values = [0, 1]
    elif mask_dtype.is_floating_point:
        values = [0, 1, 0.5, -2]
    else:
        values = [0, 1, 2, 100]
    with running_on(capability=capability), poisoned():
        for shape in SHAPES:
            mask = torch.tensor(values).to(mask_dtype)[torch.randint(len(values), shape)]
            weight = spoiled(normal(*shape, dtype=dtype), mask)
            assert_exact(masked_ops.apply_mask(weight, mask), masked(weight, mask), shape)


@pytest.mark.parametrize(
    "mask_dtype",
    [torch.uint16, torch.uint32, torch.uint64, torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2],
    ids=name_of,
)
@pytest.mark.filterwarnings("ignore:Casting complex values to real:UserWarning")
def test_mask_of_rare_dtypes(mask_dtype: torch.dtype) -> None:
    weight, mask = integers(5, 70), mask_of("half", 5, 70).float()
    assert_exact(masked_ops.apply_mask(weight, mask.to(mask_dtype)), weight * mask)
    assert_exact(masked_ops.apply_mask(weight, (mask * 2).to(mask_dtype)), weight * mask * 2)
    for of_weight, of_mask in itertools.product(LAYOUTS, LAYOUTS):
        w, m = LAYOUTS[of_weight](weight), LAYOUTS[of_mask](mask)
        result = masked_ops.apply_mask(w, m.to(mask_dtype))
        assert_exact(result, w * m, of_weight, of_mask)
        assert result.stride() == torch.empty_like(w).stride(), (of_weight, of_mask)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=name_of)
def test_complex_weight(dtype: torch.dtype) -> None:
    for shape in SHAPES:
        weight = torch.complex(normal(*shape, dtype=torch.float64), normal(*shape, dtype=torch.float64)).to(dtype)
        mask = mask_of("half", *shape)
        assert torch.equal(masked_ops.apply_mask(weight, mask), torch.where(mask, weight, 0))
        soft = mask * 2.0
        assert torch.equal(masked_ops.apply_mask(weight, soft), weight * soft)
        conjugate = weight.conj()
        assert torch.equal(masked_ops.apply_mask(conjugate, mask), torch.where(mask, conjugate.resolve_conj(), 0))


def test_negated_view() -> None:
    weight = torch.complex(normal(5, 70), normal(5, 70)).conj().imag
    mask = mask_of("half", 5, 70)
    assert weight.is_neg()
    assert torch.equal(masked_ops.apply_mask(weight, mask), torch.where(mask, weight.resolve_neg(), 0))
    assert torch.equal(masked_ops.apply_mask(weight, mask * 2.0), weight.resolve_neg() * mask * 2)


@every_float
@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (0, 3), (2, 0, 3)], ids=str)
def test_no_dimension_and_no_element(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    weight = torch.full(shape, 3, dtype=dtype)
    for value in (0, 1, 2):
        for mask_dtype in (*INTEGERS, *FLOATS):
            mask = torch.full(shape, value, dtype=mask_dtype)
            assert torch.equal(masked_ops.apply_mask(weight, mask), weight * value)


@every_float
@pytest.mark.parametrize("shape", [(9,), (5, 70), (4, 3, 5), (3, 4, 5, 6), (2, 3, 4, 3, 5)], ids=str)
def test_layouts(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    with poisoned():
        for of_weight, of_mask in itertools.product(LAYOUTS, LAYOUTS):
            for soft in (1, 2):
                mask = LAYOUTS[of_mask](mask_of("half", *shape, dtype=torch.float32) * soft)
                weight = LAYOUTS[of_weight](integers(*shape, dtype=dtype))
                result = masked_ops.apply_mask(weight, mask)
                assert_exact(result, weight * mask.to(dtype), of_weight, of_mask)
                assert result.stride() == torch.empty_like(weight).stride(), (of_weight, of_mask, soft)


def test_result_is_new_memory() -> None:
    """Even under a mask of ones: who writes to the result must not write to the weight."""
    weight = torch.ones(4, 4)
    for mask in (torch.ones(4, 4), torch.zeros(4, 4), torch.full((4, 4), 2.0)):
        masked_ops.apply_mask(weight, mask).fill_(7)
        assert (weight == 1).all()


def test_weight_and_mask_that_are_the_same_tensor() -> None:
    t = torch.tensor([[0.0, 1.0, 2.0, -3.0]])
    assert_exact(masked_ops.apply_mask(t, t), t * t)
    leaf = t.clone().requires_grad_()
    masked_ops.apply_mask(leaf, leaf).sum().backward()
    assert torch.equal(leaf.grad, t)  # as the weight; as a mask it gets none


def test_gradient_is_masked() -> None:
    for soft in (1, 3):
        mask = mask_of("half", 5, 7).double() * soft
        weight = spoiled(normal(5, 7, dtype=torch.float64), mask).requires_grad_()
        grad = normal(5, 7, dtype=torch.float64)
        (actual,) = torch.autograd.grad(masked_ops.apply_mask(weight, mask), weight, grad)
        assert torch.equal(actual, grad * mask)


@every_float
@pytest.mark.parametrize("to", FLOATS, ids=name_of)
@pytest.mark.parametrize("implementation", [_ops, reference], ids=["compiled", "reference"])
def test_cast(implementation: Any, to: torch.dtype, dtype: torch.dtype) -> None:
    """The masked weight is cast, and so is the masked gradient, back."""
    for soft, layout in itertools.product((1, 3), LAYOUTS):
        mask = mask_of("half", 5, 70) * soft
        weight = LAYOUTS[layout](integers(5, 70, dtype=dtype)).requires_grad_()
        grad = integers(5, 70, dtype=to)
        result = implementation.apply_mask(weight, mask, dtype=to)
        assert result.dtype is to
        assert_exact(result.detach(), (weight.detach() * mask).to(to), soft, layout)
        (actual,) = torch.autograd.grad(result, weight, grad)
        assert actual.dtype is dtype
        assert_exact(actual, (grad * mask).to(dtype), soft, layout)
    tangent = integers(5, 70, dtype=dtype)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(integers(5, 70, dtype=dtype), tangent)
        result = torch.autograd.forward_ad.unpack_dual(implementation.apply_mask(dual, mask, dtype=to)).tangent
    assert_exact(result, (tangent * mask).to(to))


@settings(max_examples=100)
@given(
    st.lists(st.integers(0, 9), max_size=5),
    st.sampled_from(FLOATS),
    st.sampled_from(MASK_DTYPES),
    st.sampled_from(list(LAYOUTS)),
    st.sampled_from(list(LAYOUTS)),
    st.floats(0, 1),
    st.integers(0, 2**32),
    st.sampled_from([_ops, reference]),
)
def test_any_shape(shape, dtype, mask_dtype, of_weight, of_mask, density, seed, implementation) -> None:
    torch.manual_seed(seed)
    mask = LAYOUTS[of_mask]((torch.rand(shape) < density).to(mask_dtype))
    weight = LAYOUTS[of_weight](integers(*shape, dtype=dtype))
    with poisoned():
        assert_exact(implementation.apply_mask(weight, mask), weight * mask.to(dtype))
