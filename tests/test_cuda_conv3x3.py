"""The CUDA kernels of the 3x3 convolution on a device. test_cuda_kernels.py has more, without one.

`make sanitize` runs the quick ones under compute-sanitizer: memcheck, racecheck, synccheck and
initcheck must all be clean.
"""

from __future__ import annotations

import copy

import pytest
import torch
from cuda_conv3x3 import KINDS, LAYERS, Kind, Layer, check_plain, elsewhere, replay
from test_conv3x3 import CASES, everything, rms_error
from torch import nn
from torch.nn import functional as F

from memdense import DilatedConv2d, _extension, convolution

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not _extension.cuda_available(), reason=_extension.cuda_reason()),
]
OP = torch.ops.memdense


def layer_results(layer: Layer, dropout: bool = False) -> list[torch.Tensor]:
    return layer.run(OP, dropout, torch.contiguous_format)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("shape", [*LAYERS, (3, 56, 56, 128, 32, (1, 1))], ids=str)
@pytest.mark.parametrize("aligned", [True, False])
def test_layer(shape, kind, aligned):
    layer = Layer(shape, kind, "cuda", aligned)
    found = layer_results(layer, dropout=aligned)
    layer.check(found, dropout=aligned)
    for a, b in zip(found, layer_results(layer, dropout=aligned), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("number", range(len(CASES)))
def test_plain(number):
    how = ("contiguous", "channels last", "slice")[number % 3]
    case, kind = CASES[number].values[0], KINDS[number // 3 % len(KINDS)]
    torch.manual_seed(0)
    first = check_plain(OP, "cuda", case, kind, how)
    torch.manual_seed(0)
    for a, b in zip(first, check_plain(OP, "cuda", case, kind, how), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("dilation", [1, 2, 4])
@pytest.mark.parametrize("kernels", [True, False])
def test_no_worse_than_cudnn(kind, dilation, kernels, float32_precision, monkeypatch):
    """The module, forward and every gradient, at a size that matters; in all dtypes on the
    extension's kernels, or as it chooses.

    In TF32 against exact products of rounded operands: cuDNN, allowed it, may do without. In
    float32 against oneDNN on the CPU too: either may cut sums into parts, and round less.
    """
    dtype = kind.dtype
    float32_precision("tf32" if kind.tf32 else "ieee")
    if kernels:
        monkeypatch.setitem(convolution._DTYPES, "cuda", (dtype,))
    ours = DilatedConv2d(128, 32, padding=dilation, dilation=dilation).cuda().to(dtype)
    x = torch.randn(4, 128, 28, 28, device="cuda").to(dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    dy = torch.randn(4, 32, 28, 28, device="cuda").to(dtype)
    geometry = (1, 1), (dilation, dilation), (dilation, dilation)

    def plain(*leaves):
        return F.conv2d(*leaves, *geometry)

    exact = everything(plain, *(t.double() for t in (x, ours.weight, ours.bias, dy)))
    given = x, ours.weight, ours.bias, dy
    if kind.tf32:
        rounded = [kind.operand(t.detach().double()) for t in given]
        rounded[2] = ours.bias.double()
        # the bias's gradient is a sum, of values as they are
        theirs = [[*everything(plain, *rounded)[:3], dy.sum((0, 2, 3))]]
    else:
        theirs = [everything(plain, *given)]
        if dtype == torch.float32:
            theirs.append([t.cuda() for t in everything(plain, *(t.cpu() for t in given))])
    leaves = [x.requires_grad_(), ours.weight, ours.bias]
    out = ours(x)
    found = [out.detach(), *torch.autograd.grad(out, leaves, dy)]
    again = torch.autograd.grad(ours(x), leaves, dy)
    assert all(torch.equal(a, b) for a, b in zip(found[1:], again, strict=True))
    for i, (a, c) in enumerate(zip(found, exact, strict=True)):
        floor = torch.finfo(dtype).eps * c.square().mean().sqrt().item()
        allowed = 1.5 * max(floor, *(rms_error(t[i], c) for t in theirs))
        assert rms_error(a, c) <= allowed, i


def test_tf32_is_asked_for(float32_precision):
    """float32 is multiplied as torch.backends says."""
    module = DilatedConv2d(64, 32, padding=1).cuda()
    x = torch.randn(2, 64, 20, 20, device="cuda")
    exact = copy.deepcopy(module).double()(x.double())
    errors = {}
    for precision in ("ieee", "tf32"):
        float32_precision(precision)
        errors[precision] = rms_error(module(x), exact) / exact.std().item()
    assert errors["ieee"] < 2e-6 < 5e-5 < errors["tf32"] < 2e-3


def test_a_side_stream_is_respected():
    layer = Layer((4, 28, 28, 128, 32, (1, 1)), Kind(torch.bfloat16), "cuda", True)
    expected = layer_results(layer)
    wide = torch.randn(2048, 2048, device="cuda")
    y, stream = layer.y.clone(), torch.cuda.Stream()
    layer.y.fill_(0)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(20):  # so that the copy comes late
            wide = wide @ wide
        layer.y.copy_(y)
        found = layer_results(layer)
    torch.cuda.current_stream().wait_stream(stream)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def test_a_graph_can_be_captured():
    layer = Layer((4, 14, 14, 128, 32, (2, 2)), Kind(torch.float16), "cuda", True)
    layer_results(layer)  # loads the kernels
    torch.cuda.synchronize()
    # layer.run makes tensors, which a graph may; what it reads must stay where it is
    y = torch.randn_like(layer.y)
    graph = torch.cuda.CUDAGraph()
    vectors = [v.cuda() for v in (layer.mean, layer.var, layer.gamma, layer.beta)]
    weight, out, dz = layer.weight.cuda(), layer.empty(32), layer.empty(128)
    moments = torch.empty(2, 32, device="cuda")
    dbeta, dgamma = torch.empty(2, 128, device="cuda")
    dweight = torch.empty(32, 128, 3, 3, device="cuda")

    def both() -> None:
        OP.bn_relu_conv3x3(
            layer.y, *vectors, layer.eps, weight, (2, 2), 4, 14, 14, None, 1.0, out, moments
        )
        OP.bn_relu_conv3x3_backward(
            layer.dy, weight, (2, 2), layer.y, *vectors, layer.eps, 4, 14, 14, dz, dbeta, dgamma,
            dweight,
        )  # fmt: skip

    with torch.cuda.graph(graph):
        both()
    layer.y.copy_(y)
    graph.replay()
    found = [t.clone() for t in (out, *moments, dz, dbeta, dgamma, dweight)]
    for a, b in zip(found, layer_results(layer), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("shape", [LAYERS[4], (3, 28, 28, 128, 32, (1, 1))], ids=str)
def test_launched_again(shape, kind):
    """By address, on other memory: at once on a side stream, and in a captured graph."""
    cuda = pytest.importorskip("memdense.backends.triton.cuda")
    layers = [Layer(shape, kind, "cuda", True) for _ in range(2)]
    recorded, args = (layer.arguments(True, torch.channels_last)[:2] for layer in layers)
    names = cuda.OPERATIONS
    expected, eager, captured = ([elsewhere(each) for each in args] for _ in range(3))
    for name, given in zip(names, expected, strict=True):
        getattr(OP, name)(*given)
    launches = [
        cuda.call(getattr(OP, name).default, given, {})[1]
        for name, given in zip(names, recorded, strict=True)
    ]

    def both(on: list[tuple]) -> None:
        stream = torch.cuda.current_stream().cuda_stream
        for each in zip(launches, recorded, on, strict=True):
            replay(each[0], stream, *each[1:])

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        both(eager)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        both(captured)
    graph.replay()
    for found in (eager, captured):
        for a, b in zip(sum(found, ()), sum(expected, ()), strict=True):
            assert not isinstance(a, torch.Tensor) or torch.equal(a.nan_to_num(7), b.nan_to_num(7))


def test_beyond_32_bits():
    """More than 2^31 values in a buffer: rows 3 and a half gigabytes apart are told apart."""
    if torch.cuda.mem_get_info()[0] < 12e9:
        pytest.skip("needs 12 GB of free memory")
    rows, columns = 64 * 56 * 56, 12288
    buffer = torch.zeros(rows, columns, dtype=torch.bfloat16, device="cuda")
    y = torch.randn(rows, 64, device="cuda").bfloat16()
    buffer[:, 8192 : 8192 + 64] = y
    weight = torch.randn(16, 64, 3, 3, device="cuda").bfloat16()
    ones, zeros = torch.ones(64, device="cuda"), torch.zeros(64, device="cuda")
    results = []
    for source, out in (
        (buffer[:, 8192 : 8192 + 64], buffer[:, 12000:12016]),
        (y, torch.empty(rows, 16, dtype=torch.bfloat16, device="cuda")),
    ):
        OP.bn_relu_conv3x3(
            source, zeros, ones, None, None, 0.0, weight, (1, 1), 64, 56, 56, None, 1.0, out, None,
        )  # fmt: skip
        results.append(out)
    assert torch.equal(*results)


def test_types_without_kernels_take_pytorch():
    module, plain = DilatedConv2d(5, 4, padding=1), nn.Conv2d(5, 4, 3, padding=1)
    plain.load_state_dict(module.state_dict())
    x = torch.randn(2, 5, 7, 6, dtype=torch.float64, device="cuda")
    torch.testing.assert_close(module.cuda().double()(x), plain.cuda().double()(x))
