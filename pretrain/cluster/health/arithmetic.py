"""A check that devices compute correctly: matrix products against float64, and twice, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from pretrain.errors import first_line

# Rows and columns of the matrices: on a GPU enough for a tile on every multiprocessor.
_SIZE = {"cpu": 512, "cuda": 2048}
# The largest error, as a share of the largest element. float32 sums round a few times, bfloat16 results once, to 8 bits.
_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-8}


def check_devices(gpus: int) -> Iterator[str]:
    """Yield what is wrong with the arithmetic of the CPU and of `gpus` GPUs."""
    yield from check_device(torch.device("cpu"))
    if torch.cuda.device_count() != gpus:
        yield (
            f"torch finds {torch.cuda.device_count()} GPUs and nvidia-smi {gpus}: is the driver too old for this torch, or "
            "nvidia-smi not there?"
        )
    for number in range(torch.cuda.device_count()):
        yield from check_device(torch.device("cuda", number))


def check_device(device: torch.device) -> Iterator[str]:
    """Yield what is wrong with the arithmetic of one device."""
    size, generator = _SIZE[device.type], torch.Generator().manual_seed(0)
    factors = torch.randn(2, size, size, generator=generator)
    for dtype, tolerance in _TOLERANCE.items():
        left, right = factors.to(dtype)
        expected = left.double() @ right.double()
        try:
            first, second = ((left.to(device) @ right.to(device)).cpu() for _ in range(2))
        except RuntimeError as error:
            yield f"{device} cannot multiply matrices of {dtype}: {first_line(error)}"
            continue
        deviation = float((first.double() - expected).abs().max() / expected.abs().max())
        if not deviation <= tolerance:  # NaN too
            yield f"{device} multiplies matrices of {dtype} wrongly: off by {deviation:.1e} of the largest element"
        if not torch.equal(first, second):
            yield f"{device} does not give the same product of two matrices of {dtype} twice"
