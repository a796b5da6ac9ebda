"""The memory of large results on the CPU: kept for the next one, and never seen twice."""

from __future__ import annotations

import io
import os
import textwrap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from generators import FENCED, SANITIZED, run_each_in_a_process
from paths import RunPython
from torch import Tensor

import masked_ops

ROWS, COLS = 4096, 513
BYTES = ROWS * COLS * 4 if FENCED else -(-ROWS * COLS * 4 >> 21) << 21  # whole huge pages

pytestmark = pytest.mark.skipif(not masked_ops.is_available(), reason="plain torch has no memory of its own")


@pytest.fixture(autouse=True)
def nothing_kept() -> Iterator[None]:
    masked_ops.clear_cache()
    yield
    masked_ops.clear_cache()


@pytest.fixture(scope="module")
def weight() -> Tensor:
    return torch.arange(ROWS * COLS, dtype=torch.float32).remainder(8191).view(ROWS, COLS)


@pytest.fixture(scope="module")
def mask() -> Tensor:
    return torch.arange(ROWS * COLS).remainder(3).ne(0).view(ROWS, COLS)


@pytest.fixture
def succeeds(run_python: RunPython) -> Callable[[str], None]:
    """Runs code in an interpreter of its own, which must end well."""

    def run(code: str) -> None:
        done = run_python(textwrap.dedent(code))
        assert done.returncode == 0, done.stderr

    return run


def kept() -> int:
    return masked_ops.cache_info()["kept_result_bytes"]


def test_a_result_takes_the_memory_of_one_that_is_no_more(weight: Tensor, mask: Tensor) -> None:
    result = masked_ops.apply_mask(weight, mask)
    assert kept() == 0
    place = result.data_ptr()
    del result
    assert kept() == BYTES
    again = masked_ops.apply_mask(weight + 1, mask)
    assert again.data_ptr() == place and kept() == 0
    assert torch.equal(again, (weight + 1) * mask)


def test_a_living_result_is_left_alone(weight: Tensor, mask: Tensor) -> None:
    first = masked_ops.apply_mask(weight, mask)
    part = first[1:, 5:]
    del first
    second = masked_ops.apply_mask(-weight, mask)
    assert torch.equal(part, (weight * mask)[1:, 5:])
    assert torch.equal(second, -weight * mask)


def test_another_size_is_another_memory(weight: Tensor, mask: Tensor) -> None:
    del_me = masked_ops.apply_mask(weight, mask)
    del del_me
    rows = ROWS + 1024
    larger = masked_ops.apply_mask(torch.ones(rows, COLS), torch.ones(rows, COLS))
    assert kept() == BYTES and larger.sum(dtype=torch.float64) == rows * COLS


def test_small_results_are_not_kept() -> None:
    masked_ops.apply_mask(torch.ones(2048, 1023), torch.ones(2048, 1023))
    assert kept() == 0


def test_clear_cache_frees_what_is_kept(weight: Tensor, mask: Tensor) -> None:
    masked_ops.apply_mask(weight, mask)
    masked_ops.clear_cache()
    assert kept() == 0


def test_at_most_the_limit_is_kept(weight: Tensor, mask: Tensor) -> None:
    results = [masked_ops.apply_mask(weight, mask) for _ in range(32)]
    assert len({result.data_ptr() for result in results}) == 32
    del results
    assert kept() == (256 << 20) // BYTES * BYTES


def test_larger_than_the_limit_is_not_kept(run_python: RunPython, tmp_path: Path) -> None:
    code = {
        str(limit): f"""
            import os
            os.environ["MASKED_OPS_RESULT_BYTES"] = "{limit}"
            import torch, masked_ops
            w = torch.ones({ROWS}, {COLS})
            for _ in range(2):
                assert torch.equal(masked_ops.apply_mask(w, w), w)
                assert masked_ops.cache_info()["kept_result_bytes"] == 0
        """
        for limit in (BYTES - 1, 0, -1)
    }
    for limit, (status, output) in run_each_in_a_process(code, run_python, tmp_path).items():
        assert status == 0, (limit, output)


def test_results_are_tensors_like_others(weight: Tensor, mask: Tensor) -> None:
    expected = weight * mask
    result = masked_ops.apply_mask(weight, mask)
    file = io.BytesIO()
    torch.save(result, file)
    file.seek(0)
    assert torch.equal(torch.load(file), expected)
    assert torch.equal(result.clone(), expected)
    result.add_(1)
    assert torch.equal(result, expected + 1)
    result.resize_(2, ROWS, COLS)  # moves to memory of torch's
    assert torch.equal(result[0], expected + 1) and kept() == BYTES
    shared = masked_ops.apply_mask(weight, mask).share_memory_()
    assert torch.equal(shared, expected) and shared.is_shared() and kept() == BYTES
    with torch.inference_mode():
        inference = masked_ops.apply_mask(weight, mask)
    assert inference.is_inference() and torch.equal(inference, expected)


@pytest.mark.parametrize("path", ["fused", "sparse"])
@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
def test_images_lie_as_those_of_torch(path: str, format: torch.memory_format) -> None:
    x = torch.ones(5, 2, 1024, 1024).contiguous(memory_format=format)
    weight = torch.tensor([[2.0, 1.0], [3.0, 4.0]])[:, :, None, None]
    mask = torch.tensor([[1, 1], [0, 1]])[:, :, None, None]
    for _ in range(2):
        with masked_ops.use_path(path):
            y = masked_ops.masked_conv2d(x, weight, mask)
        assert y.stride() == torch.nn.functional.conv2d(x, weight).stride()
        assert y[:, 0].eq(3).all() and y[:, 1].eq(4).all()
        assert kept() == 0
        del y
        assert kept() == 5 * 2 << 22


def test_gradients_of_a_training_loop_are_right(weight: Tensor, mask: Tensor) -> None:
    layer = masked_ops.nn.MaskedLinear(COLS, ROWS)
    layer.set_mask(mask)
    x = torch.randint(-2, 3, (2, COLS)).float()
    grad_output = torch.randint(-2, 3, (2, ROWS)).float()
    places = set()
    for step in range(3):
        layer.weight_orig.grad = None
        layer(x).backward(grad_output * (step + 1))
        assert layer.weight_orig.grad is not None
        assert torch.equal(layer.weight_orig.grad, (grad_output.t() @ x) * (step + 1) * mask)
        places.add(layer.weight_orig.grad.data_ptr())
    assert len(places) == 1


def test_threads_never_share_a_result(weight: Tensor, mask: Tensor) -> None:
    wrong: list[int] = []

    def work(number: int) -> None:
        mine = torch.full((ROWS, COLS), float(number))
        for _ in range(4):
            if not torch.equal(masked_ops.apply_mask(mine, mask), mine * mask):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(1, 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert 0 < kept() <= 3 * BYTES and kept() % BYTES == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_child_has_its_own(succeeds: Callable[[str], None]) -> None:
    succeeds(
        f"""
        import os, torch, masked_ops
        torch.set_num_threads(1)
        w = torch.ones({ROWS}, {COLS})
        mask = torch.ones({ROWS}, {COLS})
        held = masked_ops.apply_mask(w, mask)
        del_me = masked_ops.apply_mask(w, mask)
        del del_me
        child = os.fork()
        if child == 0:
            w.mul_(2)
            a, b = masked_ops.apply_mask(w, mask), masked_ops.apply_mask(w, mask)
            os._exit(not (torch.equal(a, w) and torch.equal(b, w) and held.eq(1).all()))
        c = masked_ops.apply_mask(w * 3, mask)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert c.eq(3).all() and held.eq(1).all()
        """
    )


@pytest.mark.skipif(SANITIZED, reason="the sanitizer keeps memory that was freed")
@pytest.mark.skipif(FENCED, reason="the fence has taken its addresses before there is a limit")
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="limits memory as Linux does")
def test_no_memory_for_scratch(succeeds: Callable[[str], None]) -> None:
    succeeds(
        """
        import ctypes, resource, torch, masked_ops
        from pathlib import Path
        from masked_ops import _ops
        ctypes.CDLL(None).mallopt(-3, 1 << 16)  # what is freed goes back to the system
        torch.set_num_threads(1)
        layer = masked_ops.PackedLinear(1024, 512, mask=torch.rand(512, 1024) < 0.5)
        x = torch.randn(64, 1024)
        with masked_ops.use_path("fused"), torch.no_grad():
            before = layer(x)
            _ops._module.release_scratch()
            status = Path("/proc/self/status").read_text()
            size = int(status.split("VmSize:")[1].split()[0]) * 1024
            resource.setrlimit(resource.RLIMIT_AS, (size + (1 << 18), -1))
            for _ in range(2):
                try:
                    layer(x)
                except RuntimeError as error:
                    message = str(error)
            resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
            assert message.startswith("masked_ops: can't allocate memory: "), message
            assert message.endswith(" bytes for a weight laid out") or "operand" in message, message
            assert torch.equal(layer(x), before)
        """
    )


@pytest.mark.skipif(SANITIZED, reason="the sanitizer keeps memory that was freed")
@pytest.mark.skipif(FENCED, reason="the fence has taken its addresses before there is a limit")
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="limits memory as Linux does")
def test_what_is_kept_goes_before_memory_runs_out(succeeds: Callable[[str], None]) -> None:
    succeeds(
        f"""
        import resource, torch, masked_ops
        from pathlib import Path
        torch.set_num_threads(1)
        w, larger = torch.ones({ROWS}, {COLS}), torch.ones(16 * {ROWS}, {COLS})
        results = [masked_ops.apply_mask(w, w) for _ in range(20)]
        del results
        assert masked_ops.cache_info()["kept_result_bytes"] == 20 * {BYTES}
        size = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmSize"))
        resource.setrlimit(resource.RLIMIT_AS, (int(size.split()[1]) * 1024 + (16 << 20), -1))
        result = masked_ops.apply_mask(larger, larger)
        assert masked_ops.cache_info()["kept_result_bytes"] == 0
        assert torch.equal(result, larger)
        """
    )
