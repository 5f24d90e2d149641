"""Batches that two processes hold together, against one process with the whole of them."""

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch
from exactness import assert_same_tensors, no_warnings, randomise
from torch import Tensor, distributed, nn

import memdense
from memdense import joint, ops

pytestmark = pytest.mark.skipif(not distributed.is_available(), reason="needs torch.distributed")

ARGS = dict(growth_rate=4, block_config=(2, 3), num_init_features=6, bn_size=2, num_classes=3)


def frozen(model: nn.Module) -> nn.Module:
    """Some of the norms read by running statistics."""
    features = model.train().features
    features.norm0.eval()
    features.denseblock1.denselayer2.norm2.eval()
    features.denseblock2.denselayer1.norm1.eval()
    return model


def averaging(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    return model


# how a model is made, images (N, 3, H, W), and how many of them the first process has
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "plain": (lambda: memdense.DenseNet(**ARGS), (5, 3, 32, 40), 3),
    "kept": (lambda: memdense.DenseNet(**ARGS, keep_bottlenecks=True), (2, 3, 32, 32), 1),
    "no bottleneck": (lambda: memdense.DenseNet(**ARGS | {"bn_size": None}), (4, 3, 32, 32), 1),
    "stem kept": (lambda: memdense.DenseNet(**ARGS, recompute_stem=False), (3, 3, 32, 32), 2),
    "frozen": (lambda: frozen(memdense.DenseNet(**ARGS)), (3, 3, 32, 32), 2),
    "averages": (lambda: averaging(memdense.DenseNet(**ARGS)), (3, 3, 32, 32), 2),
    "one pixel": (lambda: memdense.DenseNet(**ARGS), (3, 3, 8, 8), 2),
    "features": (lambda: memdense.DenseNet(**ARGS).features, (3, 3, 32, 32), 2),
    "a block": (lambda: memdense.DenseNet(**ARGS).features.denseblock1, (3, 6, 5, 7), 2),
    "a transition": (lambda: memdense.DenseNet(**ARGS).features[5:6], (3, 14, 5, 7), 2),
}


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = CASES[name][0]().double()
    randomise(model, torch.Generator().manual_seed(1))
    return model


def data(name: str) -> tuple[Tensor, Tensor]:
    """Images, and the weight of each output in a loss: a number for all places."""
    generator = torch.Generator().manual_seed(2)
    shape = CASES[name][1]
    x = torch.randn(shape, dtype=torch.float64, generator=generator)
    return x, torch.randn(shape[0], dtype=torch.float64, generator=generator)


def step(model: nn.Module, x: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """Outputs and gradients of images, and of parameters those and the buffers."""
    x = x.clone().requires_grad_()
    out = model(x)
    (out.sin().flatten(1).sum(1) * weights).sum().backward()
    images = {"images: output": out.detach(), "images: gradient": x.grad}
    parameters = {f"sum: {n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
    return images | parameters | {f"same: {n}": b.clone() for n, b in model.named_buffers()}


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = distributed.FileStore(f"{folder}/store", 2)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    results = {}
    for name, (_, _, first) in CASES.items():
        model = nn.SyncBatchNorm.convert_sync_batchnorm(build(name))
        part = slice(0, first) if rank == 0 else slice(first, None)
        x, weights = (t[part] for t in data(name))
        with (
            no_warnings(memdense.MemdenseWarning),
            mock.patch.object(joint, "gather", side_effect=joint.gather) as gathered,
            mock.patch.object(joint, "add_up", side_effect=joint.add_up) as added,
        ):
            results[name] = step(model, x, weights), gathered.call_count, added.call_count
        if name == "plain":
            results["converted"] = step(converted(name), x, weights)
            one = distributed.new_group([0])  # of which the other process is none
            apart = nn.SyncBatchNorm.convert_sync_batchnorm(build(name), one)
            results["apart"] = step(apart, x, weights), step(build(name), x, weights)
    results["refusals"] = refusals()
    results["merged"] = merged(rank)
    torch.save(results, f"{folder}/{rank}")
    distributed.destroy_process_group()


def converted(name: str) -> nn.Module:
    """A model that synchronises before it runs efficiently."""
    plain = memdense.DenseNet(**ARGS, efficient=False).double()
    plain.load_state_dict(build(name).state_dict())
    plain = nn.SyncBatchNorm.convert_sync_batchnorm(plain, distributed.new_group([0, 1]))
    plain.features = nn.Sequential(OrderedDict(plain.features._modules))
    return memdense.convert(plain, verbose=False)


def refusals() -> list[str]:
    """What is said of norms that do not all synchronise; of second gradients and of many, a stage's
    and the stem's.
    """
    model = build("plain")
    block = nn.SyncBatchNorm.convert_sync_batchnorm(model.features.denseblock1)
    block.denselayer1.norm2 = nn.BatchNorm2d(8).double()
    said = [str(memdense.explain(model).rows[1].why)]
    model = nn.SyncBatchNorm.convert_sync_batchnorm(build("plain"))
    model.features.double_backward = True
    parts = {"a block": model.features.denseblock1, "plain": model.features[:4]}
    for name, module in parts.items():
        x = data(name)[0].requires_grad_()
        for kwargs in (dict(create_graph=True), dict(is_grads_batched=True)):
            out = module(x)
            answer = torch.ones_like(out)[None] if "is_grads_batched" in kwargs else out
            try:
                torch.autograd.grad(out, x, answer, **kwargs)
            except RuntimeError as error:
                said.append(str(error))
    return said


def merged(rank: int) -> tuple[list[float], ...]:
    """What becomes of one row's mean, variance and sum: of both processes, and in a group alone."""
    both = joint.name_of(None)
    alone = [distributed.new_group([i]) for i in range(2)][rank]
    found = []
    for group in (both, alone.group_name):
        moments = torch.tensor([[2.0**14 + rank * 2.0**-9], [0.0]])
        share = joint.gather(moments, 1, group)
        sums = joint.add_up(torch.tensor([[1.0], [2.0 + rank]]), share[0], group)
        found += [moments.flatten().tolist(), share.tolist(), sums.flatten().tolist()]
    return tuple(found)


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> list[dict]:
    """Of each process."""
    folder: Path = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.spawn(work, (str(folder),), nprocs=2)
    return [torch.load(folder / str(rank)) for rank in range(2)]


def combined(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """What one process would have found."""
    found = {}
    for name, tensor in parts[0].items():
        both = [part[name] for part in parts]
        if name.startswith("images"):
            found[name] = torch.cat(both)
        elif name.startswith("sum"):
            found[name] = sum(both)
        else:
            assert torch.equal(*both), name
            found[name] = tensor
    return found


@pytest.mark.parametrize("name", CASES)
def test_as_one_process(name: str, results: list[dict]) -> None:
    expected = build(name)
    for module in expected.modules():
        if hasattr(module, "_switches"):
            module._switches.efficient = False
    found = combined([result[name][0] for result in results])
    assert_same_tensors(found, step(expected, *data(name)))


def test_converted_when_it_synchronises(results: list[dict]) -> None:
    expected = step(build("plain"), *data("plain"))
    assert_same_tensors(combined([result["converted"] for result in results]), expected)


def test_groups_of_one(results: list[dict]) -> None:
    for result in results:
        assert_same_tensors(*result["apart"])


def test_each_channel_is_talked_of_once(results: list[dict]) -> None:
    """Two norms a layer, what enters each block, and the stem's."""
    for result in results:
        assert result["plain"][1:] == (2 * 5 + 2 + 1, 2 * 5 + 2 + 1)
        assert result["no bottleneck"][1:] == (5 + 2 + 1, 5 + 2 + 1)
        # but for norms that read by running statistics alone, of which two are frozen
        assert result["frozen"][1:] == (2 * 5 + 2 + 1 - 2, 2 * 5 + 2 + 1 - 2)


def test_refusals(results: list[dict]) -> None:
    for result in results:
        mixed, *others = result["refusals"]
        assert mixed == "its norms do not all synchronise with the same processes"
        assert others == [ops._JOINT] * 4


def test_merged_in_their_group_and_in_float64(results: list[dict]) -> None:
    """Of means that are neighbours in float32; groups of one stay out of each other's way."""
    for rank, result in enumerate(results):
        (mean, variance), share, sums, *alone = result["merged"]
        assert mean - 2**14 in (0, 2**-9) and variance == 2**-20
        assert share == [0.5, 2] and sums == [1, 2.5]
        assert alone == [[2**14 + rank * 2**-9, 0], [1, 1], [1, 2 + rank]]
