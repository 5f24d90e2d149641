"""Operations in CUDA C++ by address, emulated on the CPU or on a device: the bits of a call, in
memory of its own. test_triton_replay.py has whole stages.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from unittest import mock

import pytest
import torch
from cuda_conv3x3 import KINDS, LAYERS, Kind, Layer, elsewhere, replay
from torch import Tensor

pytest.importorskip("triton")

from memdense import _extension
from memdense.backends.triton import cuda

LAYER = (1, 5, 6, 24, 12, (1, 1))
FORWARD = {"y": 0, "mean": 1, "var": 2, "gamma": 3, "beta": 4, "weight": 6, "keep": 11, "out": 13}
FORWARD |= {"moments": 14}
BACKWARD = {"dy": 0, "weight": 1, "y": 3, "mean": 4, "var": 5, "gamma": 6, "beta": 7, "dz": 12}
BACKWARD |= {"dbeta": 13, "dgamma": 14, "dweight": 15}


@pytest.fixture
def op(emulation) -> Iterator:
    """The emulated operations, which are recorded."""
    with mock.patch.dict(cuda.libraries):
        cuda.add(emulation.op, emulation.library)
        yield emulation.op


def arguments(shape: tuple, kind: Kind, aligned: bool, without: tuple = ()) -> list[tuple]:
    """Of both operations, with dropout; None for what is left out."""
    layer = Layer(shape, kind, "cpu", aligned)
    memory_format = (torch.contiguous_format, torch.channels_last)[aligned]
    both = [list(a) for a in layer.arguments(True, memory_format)[:2]]
    for args, positions in zip(both, (FORWARD, BACKWARD), strict=True):
        for name in without:
            if name in positions:
                args[positions[name]] = None
    return [tuple(args) for args in both]


def spoil(args: tuple) -> None:
    """What reads from these tensors, or writes into them, is found out."""
    for t in args:
        if isinstance(t, Tensor):
            t.fill_(False if t.dtype == torch.bool else torch.nan)


def check(function, recorded: tuple, args: tuple, positions: dict[str, int]) -> cuda.Launches:
    """Recorded on some arguments, replayed on others: what calling it on those writes, every bit,
    and only that.
    """
    expected, found = elsewhere(args), elsewhere(args)
    function(*expected)
    _, launches = cuda.call(function, recorded, {})
    spoil(recorded)
    before = elsewhere(recorded)
    replay(launches, 0, recorded, found)
    for name, at in positions.items():
        if args[at] is not None:
            whole = [a[at].untyped_storage() for a in (expected, found, before, recorded)]
            whole = [torch.tensor([], dtype=torch.uint8).set_(storage) for storage in whole]
            assert torch.equal(whole[0], whole[1]), name
            assert torch.equal(whole[2], whole[3]), name
    return launches


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("shape", LAYERS[:8], ids=str)
def test_other_memory(op, shape, kind):
    aligned = (LAYERS.index(shape) + KINDS.index(kind)) % 2 == 0
    recorded, others = (arguments(shape, kind, aligned) for _ in range(2))
    forward = op.bn_relu_conv3x3.default, recorded[0], others[0], FORWARD
    backward = op.bn_relu_conv3x3_backward.default, recorded[1], others[1], BACKWARD
    for case, pieces in ((forward, 1), (backward, 2)):
        launches = check(*case)
        # moments are two vectors; no address twice, and none that is not the operation's
        assert len(launches.scratch) == pieces
        assert len(launches.addresses) == len(case[3]) + pieces + (case[3] is FORWARD)


@pytest.mark.parametrize(
    ("without", "counts"),
    [
        (("keep", "moments"), (7, 13)),
        (("gamma", "beta", "dweight"), (9, 9)),
        (("gamma",), (10, 12)),
    ],
    ids=str,
)
def test_what_is_absent_stays_absent(op, without, counts):
    recorded, others = (arguments(LAYER, KINDS[1], True, without) for _ in range(2))
    functions = op.bn_relu_conv3x3.default, op.bn_relu_conv3x3_backward.default
    for case in zip(functions, recorded, others, (FORWARD, BACKWARD), counts, strict=True):
        assert len(check(*case[:4]).addresses) == case[4]


def test_only_this_threads_launches(op):
    """Another thread's go on meanwhile."""
    function, forward = op.bn_relu_conv3x3.default, arguments(LAYER, KINDS[0], True)[0]
    library = cuda.libraries[function]
    library.memdense_record()
    thread = threading.Thread(target=function, args=forward)
    thread.start()
    thread.join()
    assert not library.memdense_recorded()
    _, launches = cuda.call(function, forward, {})
    assert launches.addresses


def test_errors(op, emulation):
    """Of the operation, whose launches are forgotten, and of a replay."""
    function, forward = op.bn_relu_conv3x3.default, arguments(LAYER, KINDS[0], True)[0]
    _, launches = cuda.call(function, forward, {})
    with pytest.raises(RuntimeError, match="expected mean to be a contiguous vector"):
        cuda.call(function, (forward[0], torch.zeros(3), *forward[2:]), {})
    emulation.configure(shared=1000)
    with pytest.raises(RuntimeError, match="more shared memory than a block may have"):
        replay(launches, 0, forward, forward)
    with pytest.raises(Exception, match="expected 12 items"):
        launches(0)


def test_a_library_of_older_sources_is_called(op, emulation):
    with mock.patch.dict(cuda.libraries, clear=True):
        cuda.add(emulation.op, torch._C.__file__)
        assert not cuda.libraries
        forward = arguments(LAYER, KINDS[0], True)[0]
        _, launches = cuda.call(op.bn_relu_conv3x3.default, forward, {})
        assert launches is None and forward[FORWARD["out"]].isfinite().all()


@pytest.mark.skipif(not _extension.cuda_available(), reason=_extension.cuda_reason())
def test_the_library_records():
    names = {function._schema.name for function in cuda.libraries}
    assert names == {f"memdense::{name}" for name in cuda.OPERATIONS}
