"""What the tests of weights in slices and of weights whose columns are gathered share."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from cuda_library import Library, UnsupportedError
from test_cuda_decode import DTYPES, expected, small_integers
from test_cuda_passes import words_of
from torch import Tensor

HALVES = DTYPES[1:]
Form = tuple[Tensor, ...]  # the order of the rows, the pieces and the data
UNIT = 256  # bytes


class Kernel(NamedTuple):
    name: str
    passes: tuple[str, str]  # the first one writes the pieces, the second one the data
    rows: int  # of a piece
    columns: int

    def lay_out(self, cuda: Library, weight: Tensor, mask: Tensor, order: Tensor | None = None) -> Form:
        if order is None:
            order = mask.sum(1).argsort(descending=True)
        order = cuda.put(torch.cat([order, order.new_full((-len(mask) % self.rows,), -1)]).int())
        pieces = cuda.empty((order.numel() // self.rows * -(-mask.shape[1] // self.columns), 4), torch.int32)
        words, offsets = cuda.put(words_of(mask)), cuda.put(torch.tensor([0, *mask.sum(1).cumsum(0).tolist()]))
        cuda(self.passes[0], words, *mask.shape, order, pieces)
        sizes = pieces[:, 1].long()
        pieces[:, 0] = sizes.cumsum(0) - sizes
        data = cuda.empty(UNIT * int(sizes.sum()), torch.uint8)
        cuda(self.passes[1], words, *mask.shape, offsets, order, pieces, cuda.put(weight[mask]), data)
        return order, pieces, data

    def decode(self, cuda: Library, input: Tensor, form: Form, N: int, bias: Tensor | None) -> Tensor:
        M, K = input.shape
        output = cuda.empty((M, N), input.dtype)
        b = None if bias is None else cuda.put(bias)
        cuda(self.name, input.dtype, M, N, K, cuda.put(input), *form, b, output)
        return output.cpu()

    def is_exact(
        self, cuda: Library, input: Tensor, form: Form, weight: Tensor, mask: Tensor, bias: Tensor | None = None
    ) -> bool:
        """Of sums that round to themselves."""
        right = expected(input, weight, mask, bias).to(input.dtype)
        return torch.equal(self.decode(cuda, input, form, len(mask), bias), right)

    def check(self, cuda: Library, M: int, mask: Tensor, dtype: torch.dtype) -> None:
        """With and without a bias; the pruned weights are not read."""
        N, K = mask.shape
        input, weight, bias = (small_integers(shape, dtype) for shape in ((M, K), (N, K), (N,)))
        weight[~mask] = float("nan")
        form = self.lay_out(cuda, weight, mask)
        for b in (None, bias):
            assert self.is_exact(cuda, input, form, weight, mask, b), (N, K)

    def check_edges(self, cuda: Library, most_rows: int, unserved: int) -> None:
        """No weight, no input, and what is not served: so many columns among it."""
        empty = torch.zeros(5, 8, dtype=torch.bool)
        bias, weight = torch.randn(5).half(), torch.ones(5, 8).half()
        form = self.lay_out(cuda, weight, empty)
        assert form[-1].numel() == 0
        for M in (1, most_rows):
            assert torch.equal(self.decode(cuda, torch.randn(M, 8).half(), form, 5, bias), bias.expand(M, 5))
        assert self.decode(cuda, torch.empty(0, 8).half(), form, 5, None).shape == (0, 5)
        for input in (torch.ones(most_rows + 1, 8).half(), torch.ones(1, 8), torch.ones(1, unserved).half()):
            with pytest.raises(UnsupportedError):
                self.decode(cuda, input, form, 5, None)
