"""A process on the fake device that tries single operations, and prints the error of each, or null, as JSON."""

import copy
import io
import json
import pickle
from collections.abc import Callable
from functools import cache

import torch
import torch.distributed as dist
import torch.nn.functional as F

CASES: dict[str, Callable[[], object]] = {}


def case(function: Callable[[], object]) -> Callable[[], object]:
    """Add a case under the function's name."""
    CASES[function.__name__] = function
    return function


@cache
def groups() -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    """Return an NCCL and a gloo group of this process alone."""
    dist.init_process_group("nccl", init_method="tcp://127.0.0.1:0", rank=0, world_size=1)
    assert dist.group.WORLD is not None
    return dist.group.WORLD, dist.new_group(backend="gloo")


def adam_step(step: torch.Tensor) -> None:
    weight, gradient, first, second = (torch.zeros(3, device="cuda") for _ in range(4))
    torch._fused_adamw_(
        [weight], [gradient], [first], [second], [], [step],
        amsgrad=False, lr=0.1, beta1=0.9, beta2=0.99, weight_decay=0.0, eps=1e-8, maximize=False,
    )  # fmt: skip


# ---- what a device refuses


@case
def add_host_matrix() -> None:
    torch.ones(2, 2, device="cuda") + torch.ones(2, 2)


@case
def multiply_host_matrix() -> None:
    torch.ones(2, 2, device="cuda") @ torch.ones(2, 2)


@case
def add_in_place_to_host() -> None:
    torch.ones(2).add_(torch.ones(2, device="cuda"))


@case
def embed_host_tokens() -> None:
    F.embedding(torch.tensor([0]), torch.ones(2, 2, device="cuda"))


@case
def concatenate_host_number() -> None:
    torch.stack([torch.tensor(1.0, device="cuda"), torch.tensor(1.0)])


@case
def fused_adam_with_host_step() -> None:
    adam_step(torch.tensor(1.0))


@case
def two_devices() -> None:
    torch.ones(2, device="cuda:0") + torch.ones(2, device="cuda:1")


@case
def host_values_by_index() -> None:
    torch.zeros(4, device="cuda").index_put_((torch.tensor([0, 1]),), torch.ones(2))


@case
def host_storage() -> None:
    torch.empty(0, device="cuda").set_(torch.ones(4).untyped_storage())


@case
def host_tensor_in_nccl_group() -> None:
    dist.all_reduce(torch.ones(2), group=groups()[0])


@case
def host_list_in_nccl_group() -> None:
    dist.all_gather([torch.ones(2)], torch.ones(2, device="cuda"), group=groups()[0])


@case
def device_tensor_in_gloo_group() -> None:
    dist.all_reduce(torch.ones(2, device="cuda"), group=groups()[1])


@case
def waiting_in_error_mode() -> None:
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.ones(2, device="cuda").sum().item()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@case
def plain_copy_in_error_mode() -> None:
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.ones(2).to("cuda", non_blocking=True)  # not page-locked
    finally:
        torch.cuda.set_sync_debug_mode("default")


@case
def copy_on_a_stream_is_read_too_early() -> None:
    with torch.cuda.stream(torch.cuda.Stream()):
        there = torch.ones(2).pin_memory().to("cuda", non_blocking=True)
    assert there.tolist() == [1, 1], there.tolist()


@case
def host_overwrites_what_is_being_copied() -> None:
    here, stream = torch.ones(2).pin_memory(), torch.cuda.Stream()
    with torch.cuda.stream(stream):
        there = here.to("cuda", non_blocking=True)
    here.zero_()
    torch.cuda.current_stream().wait_stream(stream)
    assert there.tolist() == [1, 1], there.tolist()


@case
def host_reads_too_early() -> None:
    here = torch.zeros(2).pin_memory()
    here.copy_(torch.ones(2, device="cuda"), non_blocking=True)
    assert here.tolist() == [1, 1], here.tolist()


# ---- what a device takes


@case
def takes_copies_that_are_waited_for() -> None:
    stream, source = torch.cuda.Stream(), torch.ones(2, device="cuda")
    with torch.cuda.stream(stream):
        there = torch.ones(2).pin_memory().to("cuda", non_blocking=True)
        arrived = stream.record_event()
    torch.cuda.current_stream().wait_event(arrived)
    here = torch.zeros(2).pin_memory()
    here.copy_(source, non_blocking=True)
    source.zero_()  # after the copy, in the order of the stream
    torch.cuda.synchronize()
    assert there.tolist() == here.tolist() == [1, 1]


@case
def takes_copies_to_the_host_and_back() -> None:
    for stream in (torch.cuda.current_stream(), torch.cuda.Stream()):
        here, source = torch.zeros(4).pin_memory(), torch.ones(2, device="cuda")
        with torch.cuda.stream(stream):
            here[2:].copy_(source, non_blocking=True)
            there = here[2:].to("cuda", non_blocking=True)  # the device has made the other copy first
        torch.cuda.current_stream().wait_stream(stream)
        assert there.tolist() == [1, 1], there.tolist()


@case
def takes_host_number() -> None:
    found = torch.ones(2, device="cuda") * torch.tensor(3.0)
    assert found.tolist() == [3, 3]
    assert found.is_cuda


@case
def takes_host_indices() -> None:
    assert torch.arange(4, device="cuda")[torch.tensor([2, 0])].tolist() == [2, 0]


@case
def takes_fused_adam() -> None:
    adam_step(torch.tensor(1.0, device="cuda"))


@case
def takes_page_locked_copy_in_error_mode() -> None:
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = torch.ones(2).pin_memory().to("cuda", non_blocking=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert found.tolist() == [1, 1]


@case
def poisons_fresh_memory() -> None:
    assert torch.empty(5, device="cuda").isnan().all()
    assert torch.empty(5, device="cuda", dtype=torch.bfloat16).isnan().all()


@case
def knows_page_locked_memory() -> None:
    assert torch.empty(3, pin_memory=True)[1:].is_pinned()
    assert not torch.empty(3).is_pinned()


@case
def differentiates() -> None:
    weight = torch.full((3, 3), 2.0, device="cuda", requires_grad=True)
    (weight * weight).sum().backward()
    assert weight.grad is not None
    assert weight.grad.is_cuda
    assert weight.grad.eq(4).all()


@case
def attends_as_on_the_host() -> None:
    query = torch.randn(1, 2, 8, 4)
    there = query.cuda()
    found = F.scaled_dot_product_attention(there, there, there, is_causal=True)
    expected = F.scaled_dot_product_attention(query, query, query, is_causal=True)
    torch.testing.assert_close(found.cpu(), expected)


@case
def views_share_memory() -> None:
    whole = torch.zeros(4, 4, device="cuda")
    whole.t()[1].view(2, 2).fill_(1.0)
    assert whole[:, 1].sum() == 4
    assert whole.sum() == 4


@case
def resizes() -> None:
    out = torch.empty(0, device="cuda")
    torch.cat([torch.ones(2, device="cuda")] * 2, out=out)
    assert out.tolist() == [1, 1, 1, 1]


@case
def pickles_and_copies() -> None:
    tensor = torch.arange(3, device="cuda")
    file = io.BytesIO()
    torch.save(tensor, file)
    file.seek(0)
    for found in (torch.load(file), pickle.loads(pickle.dumps(tensor)), copy.deepcopy(tensor)):
        assert found.is_cuda
        assert found.tolist() == [0, 1, 2]
    file.seek(0)
    assert not torch.load(file, map_location="cpu").is_cuda


@case
def sums_in_nccl_group() -> None:
    tensor = torch.ones(2, device="cuda")
    dist.all_reduce(tensor, group=groups()[0])
    gathered = torch.empty(2, device="cuda")
    dist.all_gather_into_tensor(gathered, tensor, group=groups()[0])
    assert gathered.tolist() == [1, 1]
    dist.barrier(group=groups()[0])
    assert dist.get_backend(groups()[0]) == "nccl"


@case
def sends_objects() -> None:
    for group in groups():
        found: list[object] = [None]
        dist.all_gather_object(found, "word", group=group)
        assert found == ["word"]


def error_of(function: Callable[[], object]) -> str | None:
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


if __name__ == "__main__":
    print(json.dumps({name: error_of(function) for name, function in CASES.items()}))
