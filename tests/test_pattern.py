"""The cache of mask patterns: a mask's new values count at once, memory is bounded, threads and forks do no harm."""

from __future__ import annotations

import copy
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from generators import (
    MASK_DTYPES,
    PACKED_LINEAR_PATHS,
    PATHS,
    SANITIZED,
    assert_exact,
    compiled_only,
    every_capability,
    integers,
    mask_of,
    name_of,
    normal,
    refuses,
    run_each_in_a_process,
    running_on,
)
from torch import Tensor
from torch.nn import functional as F

import masked_ops
from masked_ops import _ops
from masked_ops._packed_class import bits_of

pytestmark = compiled_only

N, K = 40, 70


@pytest.fixture(autouse=True)
def empty_cache() -> Iterator[None]:
    masked_ops.clear_cache()
    yield
    masked_ops.clear_cache()


def check(mask: Tensor, *, times: int = 2) -> None:
    """The operation over this mask gives what torch gives over the values that the mask holds now."""
    x, w = integers(3, mask.shape[1]), integers(*mask.shape)
    for _ in range(times):
        assert_exact(masked_ops.masked_linear(x, w, mask), F.linear(x, w * mask.to(w.dtype)))
        assert_exact(masked_ops.apply_mask(w, mask), w * mask.to(w.dtype))


# --- new values count at once ----------------------------------------------------------------------------------------

EDITS: dict[str, Callable[[Tensor], object]] = {
    "copy_": lambda m: m.copy_(mask_of("tenth", *m.shape)),
    "fill_": lambda m: m.fill_(1),
    "zero_": lambda m: m.zero_(),
    "index": lambda m: m.__setitem__((0, 0), 1 - m[0, 0].to(torch.uint8)),
    "last element": lambda m: m[-1:, -1:].copy_(1 - m[-1:, -1:].to(torch.uint8)),
    "row of a view": lambda m: m[3].zero_(),
    "view of a view": lambda m: m.view(-1)[7:90].view(-1).fill_(1),
    "transposed view": lambda m: m.t()[2].zero_(),
    "masked_fill_": lambda m: m.masked_fill_(torch.rand(m.shape) < 0.5, 0),
    "out=": lambda m: torch.mul(m, mask_of("half", *m.shape).to(m.dtype), out=m),
    "detach": lambda m: m.detach().zero_(),
    "soft": lambda m: m.copy_(m * 2) if m.dtype != torch.bool else m.logical_not_(),
    "foreach": lambda m: torch._foreach_zero_([m]),
}


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("dtype", MASK_DTYPES, ids=name_of)
def test_edit_in_place(dtype: torch.dtype, edit: str) -> None:
    mask = mask_of("half", N, K, dtype=dtype)
    check(mask)
    EDITS[edit](mask)
    check(mask)
    EDITS["copy_"](mask)
    check(mask)


@pytest.mark.parametrize("path", PATHS)
def test_every_path_sees_an_edit(path: str) -> None:
    """Including what a path derives from the bits: from the second use of a mask on, and after an edit."""
    x, w, g = integers(4, K), integers(N, K), integers(4, N)
    mask = mask_of("tenth", N, K)
    with running_on(path):
        for pattern in ("tenth", "few", "none", "one row", "all", "half", "tenth"):
            mask.copy_(mask_of(pattern, N, K))
            for _ in range(3):
                assert_exact(masked_ops.masked_linear(x, w, mask), F.linear(x, w * mask), pattern)
                assert_exact(_ops.linear_grad_input(g, w, mask), g @ (w * mask), pattern)
                assert_exact(_ops.linear_grad_weight(g, x, mask), (g.t() @ x) * mask, pattern)


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_edits_seen_by_convolutions(format: torch.memory_format, path: str, groups: int) -> None:
    x, w, mask = (
        t.to(memory_format=format)
        for t in (integers(2, 4, 6, 6), integers(8, 4 // groups, 3, 3), mask_of("half", 8, 4 // groups, 3, 3))
    )
    grad_output = integers(2, 8, 4, 4)
    geometry = ([1, 1], [0, 0], [1, 1], False, [0, 0], groups)
    for pattern in ("half", "tenth", "some rows", "none", "all"):
        mask.copy_(mask_of(pattern, 8, 4 // groups, 3, 3))
        leaf, dense = w.clone().requires_grad_(), w.clone().requires_grad_()
        expected = F.conv2d(x, dense * mask, groups=groups)
        expected.backward(grad_output)
        for _ in range(3):
            assert_exact(masked_ops.apply_mask(w, mask), w * mask, pattern)
            with running_on(path):
                try:
                    assert_exact(_ops.convolution(x, w, mask, None, *geometry), expected, pattern)
                    grad_weight = _ops.convolution_grad_weight(grad_output, x, mask, *geometry)
                    masked_ops.masked_conv2d(x, leaf, mask, groups=groups).backward(grad_output)
                except RuntimeError as error:
                    if not refuses(path, error):
                        raise
                    continue
            assert_exact(grad_weight, dense.grad, pattern)
            assert_exact(leaf.grad, dense.grad, pattern)
            leaf.grad = None


def test_edits_seen_through_a_transposed_weight() -> None:
    x, w, mask = integers(4, K), integers(K, N).t(), mask_of("half", K, N).t()
    for pattern in ("half", "tenth", "none", "all"):
        mask.copy_(mask_of(pattern, N, K))
        for _ in range(2):
            assert_exact(masked_ops.masked_linear(x, w, mask), F.linear(x, w * mask), pattern)
            assert_exact(masked_ops.apply_mask(w, mask), w * mask, pattern)


def test_binary_to_soft_and_back() -> None:
    mask = mask_of("half", N, K, dtype=torch.float32)
    for factor in (1, 2, 0.5, 2, 1):
        check(mask)
        mask.mul_(factor)
    check(mask)


def test_replaced_mask() -> None:
    """A new tensor at the address of one that is gone is another mask."""
    for _ in range(50):
        check(mask_of("half", N, K), times=1)
    mask = torch.zeros(N, K)
    check(mask)
    mask.data = mask_of("half", N, K, dtype=torch.float32)
    check(mask)
    mask.set_(mask_of("few", N, K, dtype=torch.float32))
    check(mask)
    mask.resize_(3, 5).fill_(1)
    check(mask)


def test_loaded_mask() -> None:
    module = torch.nn.Module()
    module.register_buffer("mask", mask_of("half", N, K))
    check(module.mask)
    for assign in (False, True):
        module.load_state_dict({"mask": mask_of("tenth", N, K)}, assign=assign)
        check(module.mask)
    check(copy.deepcopy(module).mask)
    check(module.double().mask)


def test_views_of_one_storage() -> None:
    """Masks that share memory are told apart by offset, sizes and strides, and all see each other's edits."""
    base = mask_of("half", 3 * N, K, dtype=torch.uint8)
    views = [base[:N], base[N : 2 * N], base[2 * N :], base[::3], base.view(N, 3, K)[:, 1], base[:N].flip(0)]
    square = base[:K, :K]
    for _ in range(3):
        for view in views:
            check(view)
        check(square)
        check(square.t())
        check(base[:N].t())
        check(base.view(3 * K, N))
        check(base.flatten()[None])
        check(base[:1].expand(N, K))
        check(base[:N, :1].expand(N, K))
        check(base[:N].view(torch.int8))
        check(base[:N].view(torch.bool))
        base.copy_(mask_of("half", 3 * N, K))


def test_mask_shared_by_two_layers() -> None:
    mask = mask_of("half", N, K)
    x, weights = integers(3, K), [integers(N, K), integers(N, K)]
    for pattern in ("half", "tenth"):
        mask.copy_(mask_of(pattern, N, K))
        for w in weights:
            assert_exact(masked_ops.masked_linear(x, w, mask), F.linear(x, w * mask))
    assert masked_ops.cache_info()["entries"] == 1


def test_one_mask_seen_as_matrix_and_kernel() -> None:
    mask = mask_of("half", 6, 4, 3, 3)
    x, w = integers(2, 4, 5, 5), integers(6, 4, 3, 3)
    for pattern in ("half", "tenth"):
        mask.copy_(mask_of(pattern, 6, 4, 3, 3))
        assert_exact(masked_ops.masked_conv2d(x, w, mask), F.conv2d(x, w * mask))
        check(mask.view(6, 36))
        assert_exact(masked_ops.masked_conv2d(x, w, mask), F.conv2d(x, w * mask))


def test_one_memory_seen_in_two_dtypes() -> None:
    """Of floats of 16 bits, the one of one kind is another number, or a soft mask, of the other."""
    mask = mask_of("half", N, K, dtype=torch.float16)
    for _ in range(2):
        for dtype in (torch.float16, torch.bfloat16, torch.int16):
            check(mask.view(dtype))
        mask.copy_(mask_of("half", N, K))


def test_the_same_bits_of_different_numbers_of_columns() -> None:
    mask = mask_of("half", 40, 9)
    bits, values = bits_of(mask), integers(int(mask.sum()))
    for cols in (9, 12, 16, 9, 12):
        x, weight = integers(5, cols), torch.zeros(40, cols)
        weight[:, :9][mask] = values
        for path in (None, *PACKED_LINEAR_PATHS):
            with running_on(path):
                assert_exact(masked_ops.packed_linear(x, values, bits, cols), F.linear(x, weight), cols, path)


@pytest.mark.parametrize("path", PATHS)
def test_one_kernel_in_different_convolutions(path: str) -> None:
    mask, w = mask_of("tenth", 8, 4, 3, 3), integers(8, 4, 3, 3)
    options = ({}, {"stride": 2}, {"stride": (2, 1)}, {"dilation": 2}, {"dilation": (1, 2)}, {"groups": 2})
    for option in (*options, *options):
        x, z = integers(2, 4 * option.get("groups", 1), 9, 8), integers(2, 8, 4, 5)
        with running_on(path):
            try:
                forward = masked_ops.masked_conv2d(x, w, mask, **option)
                back = masked_ops.masked_conv_transpose2d(z, w, mask, **option)
            except RuntimeError as error:
                if not refuses(path, error):
                    raise
                continue
        assert_exact(forward, F.conv2d(x, w * mask, **option), option)
        assert_exact(back, F.conv_transpose2d(z, w * mask, **option), option)


def test_inference_mode_masks() -> None:
    """Inference tensors count no versions: nothing of theirs is cached, and every edit counts."""
    with torch.inference_mode():
        mask = mask_of("half", N, K)
        check(mask)
        mask.copy_(mask_of("tenth", N, K))
        check(mask)
        mask.zero_()
        check(mask)
    assert masked_ops.cache_info()["entries"] == 0
    mask = mask_of("half", N, K)
    check(mask)
    with torch.inference_mode():
        mask.copy_(mask_of("tenth", N, K))
        check(mask)
    check(mask)


WRITES_BEHIND_TORCH: dict[str, Callable[[Tensor], object]] = {
    "data": lambda m: m.data.zero_(),
    "numpy": lambda m: m.numpy().fill(0),
}


@pytest.mark.parametrize("write", WRITES_BEHIND_TORCH)
def test_writes_that_torch_cannot_see_need_clear_cache(write: str) -> None:
    """Documented both ways: such a write is not seen, and clear_cache() makes it seen."""
    mask = mask_of("half", N, K)
    before = mask.clone()
    check(mask)
    WRITES_BEHIND_TORCH[write](mask)
    x, w = integers(3, K), integers(N, K)
    assert not mask.any()
    assert_exact(masked_ops.masked_linear(x, w, mask), F.linear(x, w * before))
    masked_ops.clear_cache()
    check(mask)


@pytest.mark.parametrize("family", ["linear", "linear, of the input", "convolution"])
def test_a_write_that_torch_cannot_see_between_forward_and_backward(family: str) -> None:
    """Backward takes the values that forward kept, which are then too many or too few for the mask as it is."""
    if family == "convolution":
        x, w, mask = integers(2, 16, 9, 9), integers(32, 16, 3, 3), mask_of("tenth", 32, 16, 3, 3)
        ours, torchs = masked_ops.masked_conv2d, F.conv2d
    else:
        x, w, mask = integers(40, 320), integers(512, 320), mask_of("tenth", 512, 320)
        ours, torchs = masked_ops.masked_linear, F.linear
    for before, after in ((mask, ~mask), (~mask, mask)):
        m = before.clone()
        leaves = [x.clone().requires_grad_(), w.clone().requires_grad_(family != "linear, of the input")]
        with running_on("sparse"):
            for _ in range(2):
                y = ours(*leaves, m)
            m.data.copy_(after)
            masked_ops.clear_cache()
            y.sum().backward()
        dense = [x.clone().requires_grad_(), w.clone().requires_grad_()]
        torchs(dense[0], dense[1] * after).sum().backward()
        for leaf, expected in zip(leaves, dense, strict=True):
            if leaf.requires_grad:
                assert_exact(leaf.grad, expected.grad)


# --- what is cached --------------------------------------------------------------------------------------------------


def test_counters() -> None:
    mask, w = mask_of("half", N, K, dtype=torch.uint8), integers(N, K)
    start = masked_ops.cache_info()

    def counts() -> tuple[int, int, int]:
        info = masked_ops.cache_info()
        return tuple(info[name] - start[name] for name in ("hits", "misses", "repacks"))

    masked_ops.apply_mask(w, mask)
    assert counts() == (0, 1, 0)
    masked_ops.apply_mask(w, mask)
    assert counts() == (1, 1, 0)
    mask.mul_(1)  # a new version with the same bits: packed again, and nothing else
    masked_ops.apply_mask(w, mask)
    assert counts() == (1, 1, 1)
    masked_ops.apply_mask(w, mask)
    assert counts() == (2, 1, 1)
    assert masked_ops.cache_info()["entries"] == 1
    masked_ops.clear_cache()
    assert masked_ops.cache_info()["entries"] == masked_ops.cache_info()["bytes"] == 0
    masked_ops.apply_mask(w, mask)
    assert counts() == (2, 2, 1)


def test_size_is_one_bit_a_weight() -> None:
    mask = mask_of("half", 512, 1024)
    masked_ops.apply_mask(integers(512, 1024), mask)
    info = masked_ops.cache_info()
    assert 512 * 1024 / 8 <= info["bytes"] <= 512 * 1024 / 8 + 4096


def test_pattern_dies_with_its_mask() -> None:
    masks = [mask_of("half", N, K) for _ in range(5)]
    for mask in masks:
        check(mask)
    assert masked_ops.cache_info()["entries"] == 5
    view = masks[0][:20]
    del masks, mask
    assert masked_ops.cache_info()["entries"] == 1  # its storage lives on in the view
    del view
    info = masked_ops.cache_info()
    assert info["entries"] == info["bytes"] == 0


@pytest.mark.skipif(SANITIZED, reason="the sanitizer keeps memory that was freed")
def test_cache_does_not_keep_memory_of_masks_alive() -> None:
    def resident() -> int:
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    w = torch.ones(512, 1024)
    for i in range(3):
        masked_ops.apply_mask(w, torch.ones(512, 1024))
        if i == 0:
            before = resident()
    for _ in range(100):
        masked_ops.apply_mask(w, torch.ones(512, 1024))
    assert resident() - before < 50 << 20  # 100 masks would be 200 MB


# Each in a process of its own, since the limit is read once.
LIMITS = {
    "bounded": """
        import os
        os.environ["MASKED_OPS_CACHE_BYTES"] = "20000"
        import torch, masked_ops
        from torch.nn import functional as F
        info = masked_ops.cache_info()
        assert info["limit_bytes"] == 20000, info
        masks = [torch.rand(100, 256) < .5 for _ in range(12)]
        w, x = torch.randint(-1, 2, (100, 256)).float(), torch.randint(-1, 2, (4, 256)).float()
        for _ in range(3):
            for mask in masks:
                assert torch.equal(masked_ops.apply_mask(w, mask), w * mask)
                assert torch.equal(masked_ops.masked_linear(x, w, mask), F.linear(x, w * mask))
                info = masked_ops.cache_info()
                assert 0 <= info["bytes"] <= 20000, info
        assert 1 <= info["entries"] < 12, info
    """,
    "least recently used goes first": """
        import os
        os.environ["MASKED_OPS_CACHE_BYTES"] = "20000"
        import torch, masked_ops
        masks, w = [torch.rand(100, 256) < .5 for _ in range(12)], torch.ones(100, 256)
        masked_ops.apply_mask(w, masks[0])
        for mask in masks[1:]:
            masked_ops.apply_mask(w, mask)
            hits = masked_ops.cache_info()["hits"]
            masked_ops.apply_mask(w, masks[0])
            assert masked_ops.cache_info()["hits"] == hits + 1
    """,
    "a pattern larger than all of the cache": """
        import os
        os.environ["MASKED_OPS_CACHE_BYTES"] = "20000"
        import torch, masked_ops
        big, w = torch.rand(1000, 512) < .5, torch.ones(1000, 512)
        for _ in range(3):
            assert torch.equal(masked_ops.apply_mask(w, big), w * big)
            assert torch.equal(masked_ops.masked_linear(w[:3], w, big), w[:3] @ (w * big).t())
        assert masked_ops.cache_info()["entries"] == 0
    """,
}
LIMITS |= {
    f"limit {limit!r}": f"""
        import os
        os.environ["MASKED_OPS_CACHE_BYTES"] = {limit!r}
        import torch, masked_ops
        w, m = torch.ones(9, 70), torch.rand(9, 70) < .5
        for _ in range(3):
            assert torch.equal(masked_ops.apply_mask(w, m), w * m)
            assert torch.equal(masked_ops.masked_linear(w, w, m), w @ (w * m).t())
        assert masked_ops.cache_info()["entries"] == 0
    """
    for limit in ("0", "-1")
}
LIMITS |= {
    f"{variable} {limit!r}": f"""
        import os
        os.environ[{variable!r}] = {limit!r}
        import torch, masked_ops
        for _ in range(2):  # not only the first call
            try:
                masked_ops.masked_linear(torch.ones(1, 3), torch.ones(4, 3), torch.ones(4, 3))
            except ValueError as error:
                assert str(error) == "{variable} takes a number of bytes, got {limit!r}", error
            else:
                raise AssertionError("no error")
    """
    for variable in ("MASKED_OPS_CACHE_BYTES", "MASKED_OPS_RESULT_BYTES")
    for limit in ("nonsense", "1G", "1e9")
}
LIMITS["no limit"] = """
        import os
        os.environ["MASKED_OPS_CACHE_BYTES"] = ""
        import masked_ops
        assert masked_ops.cache_info()["limit_bytes"] == 1 << 30
    """
LIMITS |= {
    f"MASKED_OPS_PATH={path}": f"""
        import os
        os.environ["MASKED_OPS_PATH"] = {path!r}
        import torch, masked_ops
        masked_ops.is_available()
        assert masked_ops._ops.explain_linear(torch.ones(4, 3), torch.ones(4, 3), 1)[0] == {path!r}
    """
    for path in ("copy", "fused")
}
LIMITS |= {
    "MASKED_OPS_PATH of no path": """
        import os
        os.environ["MASKED_OPS_PATH"] = "fastest"
        import torch, masked_ops
        for _ in range(2):  # not only the first call
            try:
                masked_ops.masked_linear(torch.ones(1, 3), torch.ones(4, 3), torch.ones(4, 3))
            except ValueError as error:
                assert "path must be one of copy, fused" in str(error) and "got 'fastest'" in str(error), error
            else:
                raise AssertionError("no error")
    """,
}


@pytest.fixture(scope="module")
def in_processes(request: pytest.FixtureRequest, tmp_path_factory: Any) -> dict[str, tuple[int, str]]:
    return run_each_in_a_process(LIMITS, request.getfixturevalue("run_python"), tmp_path_factory.mktemp("limits"))


@pytest.mark.parametrize("name", LIMITS)
def test_environment(name: str, in_processes: dict[str, tuple[int, str]]) -> None:
    status, output = in_processes[name]
    assert status == 0, output


# --- threads and forks -----------------------------------------------------------------------------------------------


def test_threads_share_masks() -> None:
    """Eight threads over the same masks, while others make, edit and drop their own, and one empties the cache."""
    shared = [mask_of("half", N, K) for _ in range(4)]
    x, w = integers(3, K), integers(N, K)
    expected = [F.linear(x, w * mask) for mask in shared]
    errors: list[BaseException] = []
    stop = threading.Event()

    def guarded(work: Callable[[int], None]) -> Callable[[int], None]:
        def run(seed: int) -> None:
            try:
                work(seed)
            except BaseException as error:
                errors.append(error)

        return run

    @guarded
    def read(seed: int) -> None:
        for i in range(150):
            which = (seed + i) % len(shared)
            assert_exact(masked_ops.masked_linear(x, w, shared[which]), expected[which])

    @guarded
    def edit(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(60):
            mask = torch.rand(N, K, generator=generator) < 0.5
            for _ in range(3):
                mask[0] = ~mask[0]
                assert_exact(masked_ops.masked_linear(x, w, mask), F.linear(x, w * mask))

    @guarded
    def clear(_: int) -> None:
        while not stop.is_set():
            masked_ops.clear_cache()
            masked_ops.cache_info()

    workers = [threading.Thread(target=target, args=(i,)) for i, target in enumerate([read] * 8 + [edit] * 2)]
    clearer = threading.Thread(target=clear, args=(0,))
    for thread in (*workers, clearer):
        thread.start()
    for thread in workers:
        thread.join()
    stop.set()
    clearer.join()
    assert not errors, errors[0]


def _in_child(mask: Tensor, x: Tensor, w: Tensor, expected: Tensor, edited: Tensor) -> None:
    torch.set_num_threads(1)
    for _ in range(2):
        assert torch.equal(masked_ops.masked_linear(x, w, mask), expected)
    mask.zero_()
    assert not masked_ops.masked_linear(x, w, mask).any()
    mask.copy_(edited)
    assert torch.equal(masked_ops.masked_linear(x, w, mask), F.linear(x, w * edited))
    if not torch.backends.cuda.is_built():  # a torch for CUDA may refuse to go backward in a child, whatever the layers
        v = w.clone().requires_grad_()
        masked_ops.masked_linear(x, v, mask).sum().backward()
        assert torch.equal(v.grad, x.sum(0).expand_as(w) * edited)
    assert masked_ops.cache_info()["entries"] >= 1


def fork_beside(
    work: Callable[[], object], threads: int, child: Callable[..., object], *arguments: object, times: int, seconds: int
) -> None:
    """Fork children while threads of the parent do ``work`` again and again; each ends in time, and well."""
    stop = threading.Event()

    def repeat() -> None:
        while not stop.is_set():
            work()

    workers = [threading.Thread(target=repeat) for _ in range(threads)]
    for worker in workers:
        worker.start()
    context = multiprocessing.get_context("fork")
    try:
        for _ in range(times):
            process = context.Process(target=child, args=arguments)
            process.start()
            process.join(seconds)
            if process.is_alive():
                process.kill()
                pytest.fail("a forked child hangs")
            assert process.exitcode == 0
    finally:
        stop.set()
        for worker in workers:
            worker.join()


@pytest.mark.skipif(SANITIZED, reason="the sanitizer's own locks do not survive a fork amid other threads")
def test_fork_after_use() -> None:
    """Data loaders and workers fork: also while other threads of the parent are inside the cache."""
    mask, x, w = mask_of("half", N, K), integers(3, K), integers(N, K)
    expected = masked_ops.masked_linear(x, w, mask)

    def work() -> None:
        masked_ops.apply_mask(w, mask_of("half", N, K))

    fork_beside(work, 2, _in_child, mask, x, w, expected, mask_of("tenth", N, K), times=5, seconds=60)
    assert_exact(masked_ops.masked_linear(x, w, mask), expected)


@pytest.mark.skipif(SANITIZED, reason="the sanitizer's own locks do not survive a fork amid other threads")
def test_fork_while_an_index_is_made() -> None:
    """By another thread, which for most of its time is within one mask's pattern; the child has a mask of its own."""
    large, x, w = mask_of("tenth", 2000, 1000), integers(3, 1000), integers(2000, 1000)
    small, v = mask_of("half", N, K), integers(N, K)

    def work() -> None:
        torch.set_num_threads(1)
        large[0].logical_not_()
        masked_ops.masked_linear(x, w, large)

    def child() -> None:
        torch.set_num_threads(1)
        assert torch.equal(masked_ops.masked_linear(v, v, small), F.linear(v, v * small))

    with running_on("sparse"):
        fork_beside(work, 1, child, times=10, seconds=20)


# --- the choice of a path --------------------------------------------------------------------------------------------


def test_use_path_nests_and_restores() -> None:
    mask = mask_of("half", 4, 3)
    with masked_ops.use_path("fused"):
        with masked_ops.use_path("copy"):
            assert _ops.explain_linear(torch.ones(4, 3), mask, 1)[0] == "copy"
            with masked_ops.use_path(None):
                assert _ops.explain_linear(torch.ones(4, 3).double(), mask, 1)[0] == "copy"
            assert _ops.explain_linear(torch.ones(4, 3), mask, 1)[0] == "copy"
        assert _ops.explain_linear(torch.ones(4, 3), mask, 1)[0] == "fused"
        with pytest.raises(RuntimeError, match="path 'fused' cannot serve"):
            masked_ops.masked_linear(torch.ones(1, 3).double(), torch.ones(4, 3).double(), mask)
    masked_ops.masked_linear(torch.ones(1, 3).double(), torch.ones(4, 3).double(), mask)
    with pytest.raises(ZeroDivisionError), masked_ops.use_path("fused"):
        raise ZeroDivisionError
    assert _ops.explain_linear(torch.ones(4, 3).double(), mask, 1)[0] == "copy"


def test_use_path_refuses_unknown_names() -> None:
    for name in ("fastest", "", 3):
        with pytest.raises(ValueError, match="path must be one of copy, fused"), masked_ops.use_path(name):
            pytest.fail("entered")


@pytest.mark.parametrize(
    ("dtype", "soft", "reason"),
    [
        (torch.float64, False, "float32, bfloat16 and float16"),
        (torch.float32, True, "the mask is soft"),
    ],
)
def test_forced_path_says_why_it_cannot_serve(dtype: torch.dtype, soft: bool, reason: str) -> None:
    mask = torch.ones(4, 3) * (2 if soft else 1)
    x, w, g = normal(2, 3, dtype=dtype), normal(4, 3, dtype=dtype), normal(2, 4, dtype=dtype)
    with running_on("fused"):
        for call in (
            lambda: masked_ops.masked_linear(x, w, mask),
            lambda: _ops.linear_grad_input(g, w, mask),
            lambda: _ops.linear_grad_weight(g, x, mask),
        ):
            with pytest.raises(RuntimeError, match=f"path 'fused' cannot serve.*{reason}"):
                call()
        with pytest.raises(RuntimeError, match="path 'fused' cannot serve this convolution"):
            masked_ops.masked_conv1d(x[..., None], w[..., None], mask[..., None])


def test_explanation_matches_what_runs() -> None:
    """explain_linear names a path that serves, for every dtype, density and number of rows."""
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        for pattern in ("none", "few", "half", "all"):
            mask = mask_of(pattern, 64, 96)
            w = integers(64, 96, dtype=dtype)
            for rows in (1, 8, 128):
                path, reason = _ops.explain_linear(w, mask, rows)
                assert path in _ops.paths() and reason
                x = integers(rows, 96, dtype=dtype)
                with running_on(path):
                    assert_exact(masked_ops.masked_linear(x, w, mask), x @ (w * mask).t())
    path, reason = _ops.explain_convolution(
        integers(4, 3, 3, 3), mask_of("half", 4, 3, 3, 3), (8, 3, 5, 5), False, [1], [0], [1], False, [0], 1
    )
    assert path in _ops.paths() and reason


@every_capability
def test_rows_that_share_their_columns_count_in_the_choice(capability: str) -> None:
    """Four of them are taken together, and so sparse kernels are worth it for a few more weights."""
    weight, chosen = torch.ones(256, 320), []
    with running_on(None, capability):
        for percent in range(20, 90):
            blocks = (torch.rand(64, 320) < percent / 100).float().repeat_interleave(4, 0)
            masks = blocks, blocks.view(64, 4, 320).transpose(0, 1).reshape(256, 320).contiguous()
            chosen.append([_ops.explain_linear(weight, mask, 128)[0] == "sparse" for mask in masks])
    assert all(together or not apart for together, apart in chosen)
    assert any(together and not apart for together, apart in chosen)


@pytest.fixture
def torch_rate() -> Iterator[Callable[[str, int], None]]:
    """Sets what is expected of torch's products: 0, it converts; 1, it has dot products; 2, matrix units."""
    before = {dtype: _ops._module.set_torch_rate(dtype, 0) for dtype in ("bfloat16", "float16")}
    yield lambda dtype, rate: _ops._module.set_torch_rate(dtype, rate)
    for dtype, rate in before.items():
        _ops._module.set_torch_rate(dtype, rate)


@pytest.mark.cpu_only("about a choice for the CPU")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_choice_where_torch_has_matrix_units(dtype: str, torch_rate: Callable[[str, int], None]) -> None:
    """There its product is left alone until few weights remain; of one row it is not faster for them."""
    if "AVX512" not in _ops._module.capabilities():
        pytest.skip("those CPUs have AVX-512")
    torch.set_num_threads(1)
    weight = torch.ones(1024, 1024, dtype=getattr(torch, dtype))
    most, few = (torch.rand(1024, 1024) < density for density in (0.9, 0.005))
    kernels = torch.ones(128, 128, 3, 3, dtype=weight.dtype)
    some = torch.rand(128, 128, 3, 3) < 0.15
    geometry = ([1, 1], [1, 1], [1, 1], False, [0, 0], 1)

    def chosen(mask: torch.Tensor, rows: int) -> tuple[str, str]:
        masked = _ops.explain_linear(weight, mask, rows)[0]
        packed = _ops.explain_packed_linear(weight[mask], bits_of(mask), 1024, rows)[0]
        return masked, packed

    def convolution() -> str:
        return _ops.explain_convolution(kernels, some, [8, 128, 28, 28], True, *geometry)[0]

    with running_on(None, "AVX512"):
        assert "copy" not in chosen(most, 512) + chosen(most, 1) and convolution() == "sparse"
        torch_rate(dtype, 2)
        assert chosen(most, 512) == ("copy", "copy") and convolution() == "copy"
        assert "matrix units" in _ops.explain_linear(weight, most, 512)[1]
        assert "copy" not in chosen(most, 1) and chosen(few, 64) == ("sparse", "sparse")
        torch_rate(dtype, 1)
        assert "matrix units" not in _ops.explain_linear(weight, most, 512)[1] and convolution() == "sparse"
        assert dtype == "bfloat16" or chosen(most, 512)[0] == "copy"  # float16 is converted for our kernels
    torch_rate(dtype, 2)
    with running_on(None, least := _ops._module.capabilities()[-1]):
        assert ("matrix units" in _ops.explain_linear(weight, most, 512)[1]) == (least == "AVX512")  # lesser CPUs
