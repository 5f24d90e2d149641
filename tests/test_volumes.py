"""DenseNets of volumes (N, C, D, H, W): converted ones against their plain modules, and primitives
that are made of planes against the reference's.
"""

import copy
import pickle
from importlib.util import find_spec
from typing import Any

import peers
import pytest
import torch
from exactness import BACKENDS, assert_same_step, into_of, no_warnings, randomise, reader_of
from inputs import assert_errs_no_more, poisoned
from torch import Tensor, nn
from torch.library import opcheck
from torch.nn import functional as F

import memdense
from memdense import MemdenseWarning, ops
from memdense.backends import Native, Reference
from memdense.buffers import Geometry
from memdense.memory import training_step_memory
from memdense.structure import read_stage, read_stem

native = pytest.mark.skipif("native" not in BACKENDS, reason="the extension is not built")
last = torch.channels_last_3d


def pair(seed: int = 1, monai: dict[str, Any] | None = None, **switches: bool) -> list[nn.Module]:
    """A converted network, and a plain one."""
    plain = peers.monai(3, **monai or {}).double()
    randomise(plain, torch.Generator().manual_seed(seed))
    return [memdense.convert(copy.deepcopy(plain), verbose=False, **switches), plain]


def volumes(*size: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(size or (2, 3, 9, 17, 14), generator=generator, dtype=torch.float64)


@pytest.fixture(params=BACKENDS)
def backend(request):
    with memdense.use_backend(request.param):
        yield request.param


@pytest.mark.parametrize("size", [(2, 3, 9, 17, 14), (1, 3, 12, 8, 20), (3, 3, 8, 8, 8)], ids=str)
@pytest.mark.parametrize("mode", ["train", "eval", "frozen"])
def test_same_numbers(mode: str, size: tuple[int, ...], backend: str) -> None:
    nets = pair()
    for net in nets:
        net.train(mode != "eval")
        if mode == "frozen":
            for module in list(net.modules())[::3]:
                module.eval()
            for parameter in list(net.parameters())[::4]:
                parameter.requires_grad_(False)
    with no_warnings(MemdenseWarning):
        assert_same_step(*nets, volumes(*size))
    assert all(row.efficient for row in memdense.explain(nets[0]).rows)


@pytest.mark.parametrize(
    "switches",
    [{"keep_bottlenecks": True}, {"recompute_stem": False}, {"double_backward": True}],
    ids=str,
)
def test_switches(switches: dict[str, bool], backend: str) -> None:
    assert_same_step(*pair(**switches), volumes())


@pytest.mark.parametrize("last_axes", [False, True])
def test_other_convolutions(last_axes: bool, backend: str) -> None:
    """Dilated layers, a dilation beyond the depth among them, without pooling, layouts of both
    kinds.
    """
    nets = pair()
    for net in nets:
        layers = net.features.denseblock1.children()
        for layer, dilation in zip(layers, ((2, 1, 3), (7, 2, 1)), strict=True):
            layer.layers.conv2.dilation = layer.layers.conv2.padding = dilation
        net.features.transition1.pool = nn.Identity()
    x = volumes()
    with no_warnings(MemdenseWarning):
        assert_same_step(*nets, x.contiguous(memory_format=last) if last_axes else x)


@pytest.mark.parametrize("channels", [False, True])
def test_dropout(channels: bool) -> None:
    nets = pair(monai={"dropout_prob": 0.4})
    for net in nets:
        for module in net.modules():
            if not channels and isinstance(module, nn.Dropout3d):
                module.__class__ = nn.Dropout
    with no_warnings(MemdenseWarning):
        assert_same_step(*nets, volumes())


def test_one_channel_comes_out_channels_last() -> None:
    """A first convolution of one channel, whose images are both contiguous and channels last."""
    for axes in (2, 3):
        convolve = (F.conv2d, F.conv3d)[axes - 2]
        x = torch.randn(2, 1, *(9, 8, 7)[:axes], dtype=torch.float64, requires_grad=True)
        weight = torch.randn(6, 1, *[3] * axes, dtype=torch.float64, requires_grad=True)
        spec = memdense.spec.StemSpec(
            memdense.spec.NormSpec(1e-5, True, False), (1,) * axes, (1,) * axes, (1,) * axes, False
        )
        out, convolved, *rest = ops.stem(x, weight, None, None, None, None, spec.encode())
        torch.testing.assert_close(
            convolved, convolve(x, weight, padding=1), rtol=1e-12, atol=1e-12
        )
        assert convolved.stride(1) == out.stride(1) == 1
        out.sum().backward()
        assert x.grad.stride() == x.stride()
        opcheck(ops.stem, (x, weight, None, None, None, None, spec.encode()))
        leaves = x.detach(), weight.detach(), None, None
        answer = torch.randn_like(out), *leaves, convolved.detach(), *rest, spec.encode()
        need = [True, True, False, False]
        opcheck(ops.stem_backward, (*answer, need))
        assert ops.stem_backward(*answer, need)[0].stride(1) == 1


def test_pooled() -> None:
    """The last norm's mean over each volume, as one operation and by modules."""
    nets = pair()
    for net in nets:
        net.pooled = memdense.Features.pooled.__get__(net.features)
    expected = F.relu(nets[1].features(volumes())).mean((2, 3, 4))
    torch.testing.assert_close(nets[0].pooled(volumes()), expected, rtol=1e-10, atol=1e-10)
    nets[0].features.efficient = False
    torch.testing.assert_close(nets[0].pooled(volumes()), expected, rtol=1e-10, atol=1e-10)


def test_infinite_gradients_stay_where_they_belong(backend: str) -> None:
    """A maximum's gradient is its winner's alone."""
    net = nn.Sequential(*(pair()[1].features[i] for i in range(4))).eval()
    x, results = volumes(), []
    stem = memdense.Features(*net, pair()[1].features[4].eval())
    for run in (net, lambda x: stem[:4](x)):
        leaf = x.clone().requires_grad_()
        out = run(leaf)
        answer = torch.ones_like(out)
        answer[0, 0, 1, 1, 1] = torch.inf
        net[0].weight.grad = None
        out.backward(answer)
        results.append(net[1].bias.grad.clone())
        net.zero_grad()
    assert torch.equal(results[0].isinf(), results[1].isinf()) and results[0].isinf().sum() == 1
    assert not results[1].isnan().any()


def test_alone_they_are_for_images() -> None:
    module = memdense.BNReLUConv1x1(4, 5)
    module.norm, module.conv = nn.BatchNorm3d(4), nn.Conv3d(4, 5, 1, bias=False)
    with pytest.warns(MemdenseWarning, match="for volumes"):
        assert module(torch.randn(2, 4, 3, 4, 5)).shape == (2, 5, 3, 4, 5)


def test_geometry_is_copied() -> None:
    for geometry in (Geometry(2, 3, 4), Geometry(2, 3, 4, 5)):
        assert copy.deepcopy(geometry) == copy.copy(geometry) == geometry
        assert pickle.loads(pickle.dumps(geometry)).windows == geometry.windows


def test_double_backward() -> None:
    nets = pair(double_backward=True)
    grads = []
    for net in nets:
        x = volumes(2, 3, 8, 8, 9).requires_grad_()
        (g,) = torch.autograd.grad(net(x).square().sum(), x, create_graph=True)
        g.square().sum().backward()
        grads.append([x.grad, *(p.grad for p in net.features.parameters())])
    for mine, theirs in zip(*grads, strict=True):
        scale = max(theirs.abs().max().item(), 1e-3 * grads[1][0].abs().max().item())
        assert (mine - theirs).abs().max() <= 1e-9 * scale


def layer_of(geometry: Geometry, c: int, k: int, dtype: torch.dtype) -> list[Any]:
    """x, a reader, a weight, an answer and G, with x away from the kink."""
    draw = torch.Generator().manual_seed(5)

    def random(*size: int) -> Tensor:
        return torch.randn(size, generator=draw, dtype=torch.float64).to(dtype).double()

    read = reader_of(random(c), random(c) + 0.2, random(c), random(c).abs() + 0.5)
    x = random(geometry.rows, c)
    x[(x * read.scale + read.shift).abs() < 0.02] += 1
    assert (x * read.scale + read.shift).abs().min() > 1e-3
    return [x, read, random(k, c, 3, 3, 3), random(geometry.rows, k), random(geometry.rows, c)]


def as_reader(read: Any, dtype: torch.dtype) -> Any:
    tensors = (t.to(dtype) for t in (read.mean, read.var, read.weight, read.bias))
    return type(read)(*tensors, read.eps, read.batch)


def everything(
    backend: Reference, layer: list[Any], geometry: Geometry, dilation: tuple[int, ...],
    dtype: torch.dtype,
) -> dict[str, Tensor]:  # fmt: skip
    """All that the two primitives return or write, into slices of what is NaN around them."""
    x, read, weight, dy, g = layer
    acc = torch.promote_types(dtype, torch.float32)
    r, rows = as_reader(read, acc), poisoned(x.to(dtype))
    w, d, k = weight.to(dtype), poisoned(dy.to(dtype)), len(weight)
    keep = torch.arange(dy.numel()).view(dy.shape) % 5 > 1, 1.25
    found = {}
    for name, mask in (("", None), (" dropped", keep)):
        out = poisoned(torch.full((geometry.rows, k), torch.nan, dtype=dtype))
        moments = torch.full((2, k), torch.nan, dtype=acc)
        backend.bn_relu_conv3x3(rows, r, w, dilation, geometry, out, mask, moments)
        assert out._base.isnan().sum() == out._base.numel() - out.numel()
        found |= {f"out{name}": out, f"mean{name}": moments[0], f"var{name}": moments[1]}
    into = into_of(poisoned(g.to(dtype)))
    arguments = d, w, dilation, rows, r, geometry
    dz, sums, dweight = backend.bn_relu_conv3x3_backward(*arguments, None, True)
    none, again, unwanted = backend.bn_relu_conv3x3_backward(*arguments, into, False)
    assert none is None and unwanted is None
    found |= {"dz": dz, "dbeta": sums.dbeta, "dgamma": sums.dgamma, "dweight": dweight}
    return found | {"g": into.g, "dbeta again": again.dbeta, "dgamma again": again.dgamma}


@native
@pytest.mark.parametrize("dilation", [(1, 1, 1), (2, 1, 3), (5, 2, 2)], ids=str)
@pytest.mark.parametrize("size", [(2, 5, 7, 6), (1, 1, 4, 5), (3, 2, 1, 1)], ids=str)
@pytest.mark.parametrize("k", [12, 7])
def test_convolution_of_planes(size: tuple[int, ...], dilation: tuple[int, ...], k: int) -> None:
    """Forward and every gradient, in float64 and float32."""
    geometry = Geometry(*size)
    case = layer_of(geometry, 24, k, torch.float32), geometry, dilation
    exact = everything(Reference(), *case, torch.float64)
    for name, value in everything(Native(), *case, torch.float64).items():
        torch.testing.assert_close(value, exact[name], rtol=1e-12, atol=1e-12 * geometry.rows)
    found = everything(Native(), *case, torch.float32)
    # Winograd's sums round more often than PyTorch's, which convolves volumes directly
    assert_errs_no_more(found, everything(Reference(), *case, torch.float32), exact, 2.0)
    again = everything(Native(), *case, torch.float32)
    assert all(torch.equal(value, again[name]) for name, value in found.items())


@pytest.mark.skipif(not find_spec("triton"), reason="there is no Triton")
@pytest.mark.usefixtures("quick_interpreter")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_convolution_of_planes_in_triton(dtype: torch.dtype) -> None:
    from memdense.backends.triton import Triton, launch

    if not launch.INTERPRETED:
        pytest.skip("runs in Triton's interpreter")
    geometry = Geometry(2, 4, 5, 6)
    case = layer_of(geometry, 16, 7, dtype), geometry, (2, 1, 2)
    results = [everything(b, *case, dtype) for b in (Triton(), Reference())]
    assert_errs_no_more(*results, everything(Reference(), *case, torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_convolution_as_exact_as_pytorch(dtype: torch.dtype) -> None:
    """The reference against PyTorch's separate operations."""
    geometry, dilation = Geometry(2, 5, 7, 6), (1, 2, 1)
    x, read, weight, dy, _ = layer_of(geometry, 24, 12, dtype)
    acc = torch.promote_types(dtype, torch.float32)

    def separate(dtype: torch.dtype) -> list[Tensor]:
        r, leaf = as_reader(read, torch.promote_types(dtype, torch.float32)), x.to(dtype)
        leaf, w = leaf.requires_grad_(), weight.to(dtype).requires_grad_()
        z = F.relu(F.batch_norm(leaf, r.mean, r.var, r.weight, r.bias, False, 0.0, r.eps))
        out = F.conv3d(geometry.images(z), w, None, 1, dilation, dilation).movedim(1, -1)
        out = out.reshape(geometry.rows, -1)
        return [out.detach(), *torch.autograd.grad(out, (leaf, w), dy.to(dtype))]

    backend, r = Reference(), as_reader(read, acc)
    out = torch.full((geometry.rows, 12), torch.nan, dtype=dtype)
    w, rows = weight.to(dtype), x.to(dtype)
    backend.bn_relu_conv3x3(rows, r, w, dilation, geometry, out, None, None)
    into = into_of(torch.zeros(geometry.rows, 24, dtype=acc))
    dweight = backend.bn_relu_conv3x3_backward(
        dy.to(dtype), w, dilation, rows, r, geometry, into, True
    )[2]
    ours = [out, into.g, dweight]
    for mine, theirs, value in zip(ours, separate(dtype), separate(torch.float64), strict=True):
        error, other = ((t - value).square().mean().sqrt().item() for t in (mine, theirs))
        luck = 0.5 * torch.finfo(dtype).eps * value.abs().max().item()
        assert error <= 1.5 * max(other, luck)


def test_bands_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plane at a time, and several volumes."""
    plain, found = pair()[1], []
    for size in (1 << 9, 1 << 13, 1 << 24):
        monkeypatch.setattr(Reference, "CPU_BAND_BYTES", size)
        with memdense.use_backend("reference"):
            model = memdense.convert(copy.deepcopy(plain), verbose=False)
            assert_same_step(model, copy.deepcopy(plain), volumes())
            found.append([p.grad for p in model.parameters()])
    for values in zip(*found, strict=True):
        for other in values[1:]:
            torch.testing.assert_close(values[0], other, rtol=1e-9, atol=1e-9)


def test_operations() -> None:
    features = pair()[0].features
    read = read_stage(
        features.denseblock1, "block", features.transition1, "tail", "transition",
        features._switches.types, True,
    )  # fmt: skip
    x = volumes(2, 8, 4, 5, 6).requires_grad_()
    arguments = x, read.tensors, read.running, None, read.spec, False
    opcheck(ops.stage, arguments)
    out, kept, statistics, bottlenecks = (
        t.detach() if isinstance(t, Tensor) else t for t in ops.stage(*arguments)
    )
    tensors = [t.detach() for t in read.tensors]
    answers = torch.randn_like(out), torch.randn_like(kept), kept, statistics, bottlenecks
    opcheck(ops.stage_backward, (*answers, tensors, None, read.spec, True, [True] * len(tensors)))
    stem = read_stem(dict(list(features.named_children())[:4]))
    spec = memdense.spec.StemSpec(stem.norm.spec, *stem.geometry, True)
    x = volumes(2, 3, 9, 8, 7).requires_grad_()
    opcheck(ops.stem, (x, stem.weight, *stem.norm[1:], spec.encode()))


def test_compiled() -> None:
    nets = pair()
    nets[0].compile(fullgraph=True)
    assert_same_step(*nets, volumes())


def test_autocast_on_a_cpu_averages_in_float32() -> None:
    """Where plain modules keep digits that 16 bits have not, they run."""
    nets = [net.float() for net in pair()]
    x = volumes().float()
    with torch.autocast("cpu", torch.bfloat16):
        plain = nets[1].features(x)
        with pytest.warns(MemdenseWarning, match="averages volumes in float32"):
            found = nets[0].features(x)
    assert found.dtype == plain.dtype == torch.float32
    exact = nets[1].double().features(x.double())
    errors = [(out - exact).square().mean().sqrt() for out in (found, plain)]
    assert errors[0] <= 1.5 * errors[1], errors


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_on_a_cpu_takes_maxima_in_float32(dtype: torch.dtype) -> None:
    """A block behind it keeps them, in plain modules."""
    plain = peers.monai(3).features[:5]
    found = memdense.convert(copy.deepcopy(plain), verbose=False)
    seen = []
    for stack in (found, plain):
        stack.denseblock1.register_forward_hook(lambda _, x, out: seen.append((*x, out)))
    with torch.no_grad(), torch.autocast("cpu", dtype):
        with pytest.warns(MemdenseWarning, match="takes maxima of volumes in float32"):
            found(volumes().float())
        plain(volumes().float())
    assert [[t.dtype for t in pair] for pair in seen] == [[torch.float32] * 2] * 2


def test_other_inputs_raise_as_modules_do() -> None:
    flat = memdense.DenseNet(4, (2, 2), 8, 2, num_classes=3)
    deep = pair()[0].float()
    for model, x in ((flat, torch.randn(2, 3, 32, 32, 32)), (deep, torch.randn(2, 3, 32, 32))):
        plain = copy.deepcopy(model)
        plain.features.efficient = False
        with pytest.raises((RuntimeError, ValueError)) as expected:
            plain(x)
        with pytest.raises(expected.type) as found:
            model(x)
        assert str(found.value) == str(expected.value)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            lambda f: setattr(
                f.denseblock1.denselayer1.layers, "norm1", nn.BatchNorm2d(8).double()
            ),
            "of images and of",
        ),
        (lambda f: setattr(f.transition1, "pool", nn.AvgPool2d(2)), "not an AvgPool3d"),
        (lambda f: setattr(f.transition1.pool, "kernel_size", (1, 2, 2)), "not a 2x2x2 average"),
        (lambda f: setattr(f.pool0, "stride", (1, 2, 2)), "not a 3x3x3 maximum"),
        (lambda f: setattr(f.denseblock2.denselayer2.layers.conv2, "padding", (0, 1, 1)), "3x3x3"),
    ],
    ids=["norm", "pool", "window", "stem", "padding"],
)
def test_oddities_run_as_modules(change: Any, reason: str) -> None:
    model = pair()[0].features
    change(model)
    assert any(reason in row.why for row in memdense.explain(model).rows)


def test_takes_less_memory() -> None:
    nets = pytest.importorskip("monai.networks.nets")
    plain = nets.DenseNet(3, 1, 2, init_features=16, growth_rate=8, block_config=(6, 6, 6))
    x, y = torch.randn(2, 1, 32, 32, 32), torch.tensor([0, 1])
    before = training_step_memory(plain, x, y)
    after = training_step_memory(memdense.convert(plain, verbose=False), x, y)
    assert after.saved <= before.saved / 10 and after.peak <= before.peak / 3


def test_explanation() -> None:
    model = pair()[0]
    assert "kernels take their planes" in str(memdense.explain(model))
    assert "kernels take their planes" not in str(memdense.explain(memdense.DenseNet(4, (2,), 8)))
