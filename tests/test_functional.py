"""bn_relu_conv1x1 on its own: as a function and as a module, on every backend."""

from __future__ import annotations

import copy
import math
import warnings
from contextlib import nullcontext
from unittest import mock

import pytest
import torch
from exactness import BACKENDS, Calls, assert_close
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.prune import l1_unstructured

import memdense
from memdense import _extension
from memdense.backends import Reference
from memdense.functional import bn_relu_conv1x1
from memdense.memory import saved_bytes


def arguments(
    n: int, c: int, b: int, h: int, w: int, dtype: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    weight = torch.randn(c, dtype=dtype)
    weight[0] = 0
    return {
        "input": 2 * torch.randn(n, c, h, w, dtype=dtype) + 1,
        "running_mean": torch.randn(c, dtype=dtype),
        "running_var": torch.rand(c, dtype=dtype) + 0.5,
        "weight": weight,
        "bias": torch.randn(c, dtype=dtype),
        "conv_weight": torch.randn(b, c, 1, 1, dtype=dtype),
    }


def separate(
    input, running_mean, running_var, weight, bias, conv_weight, training=False, momentum=0.1,
    eps=1e-5,
) -> Tensor:  # fmt: skip
    z = F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    return F.conv2d(F.relu(z), conv_weight)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(2, 7, 12, 5, 3), (1, 20, 48, 9, 11), (3, 1, 1, 2, 1)])
def test_agrees_with_separate_operations(backend, training, layout, shape) -> None:
    results = []
    for function in (bn_relu_conv1x1, separate):
        torch.manual_seed(0)
        given = arguments(*shape)
        given["input"] = given["input"].contiguous(memory_format=layout)
        leaves = [given[k].requires_grad_() for k in ("input", "weight", "bias", "conv_weight")]
        with memdense.use_backend(backend):
            out = function(**given, training=training, momentum=0.3, eps=1e-3)
            answer = torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view(out.shape)
            gradients = torch.autograd.grad(out, leaves, answer)
        results.append([out, *gradients, given["running_mean"], given["running_var"]])
    names = ("out", "dinput", "dweight", "dbias", "dconv", "running mean", "running var")
    for name, found, expected in zip(names, *results, strict=True):
        assert_close(name, found, expected, floor=expected.detach().square().mean().sqrt().item())


@pytest.mark.parametrize("left_out", ["weight", "bias"])
@pytest.mark.parametrize("context", [nullcontext, Calls], ids=["alone", "watched"])
def test_one_of_weight_and_bias(left_out, context) -> None:
    results = []
    for function in (bn_relu_conv1x1, separate):
        torch.manual_seed(0)
        given = arguments(2, 5, 4, 3, 2) | {left_out: None}
        names = [k for k in ("input", "weight", "bias", "conv_weight") if k != left_out]
        leaves = [given[k].requires_grad_() for k in names]
        with context():
            out = function(**given, training=True)
            results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    for name, found, expected in zip(["out", *names], *results, strict=True):
        assert_close(name, found, expected, floor=1.0)


def test_defaults_are_those_of_batch_norm() -> None:
    ours = arguments(2, 4, 3, 5, 3)
    theirs = copy.deepcopy(ours)
    running = [theirs.pop(name) for name in ("running_mean", "running_var")]
    found = bn_relu_conv1x1(**ours, training=True)
    z = F.batch_norm(theirs["input"], *running, theirs["weight"], theirs["bias"], training=True)
    assert_close("out", found, F.conv2d(F.relu(z), theirs["conv_weight"]), floor=1.0)
    assert_close("running mean", ours["running_mean"], running[0])
    assert_close("running var", ours["running_var"], running[1])


def test_one_value_per_channel_in_evaluation() -> None:
    given = arguments(1, 4, 3, 1, 1)
    assert_close("out", bn_relu_conv1x1(**given), separate(**given), floor=1.0)


@pytest.mark.parametrize(("training", "momentum"), [(False, None), (True, 0)])
def test_a_momentum_that_moves_nothing(training, momentum) -> None:
    given = arguments(2, 4, 3, 2, 2)
    expected = separate(**copy.deepcopy(given), training=training)
    kept = copy.deepcopy(given)
    found = bn_relu_conv1x1(**given, training=training, momentum=momentum)
    assert_close("out", found, expected, floor=1.0)
    assert all(torch.equal(given[name], kept[name]) for name in given)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_gradients_and_their_gradients(training, affine) -> None:
    given = arguments(2, 3, 4, 3, 2)
    if not affine:
        given["weight"] = given["bias"] = None
    names = [k for k in ("input", "weight", "bias", "conv_weight") if given[k] is not None]
    fixed = {k: v for k, v in given.items() if k not in names}

    def run(*leaves: Tensor) -> Tensor:
        moving = {k: v if v is None else v.clone() for k, v in fixed.items()}
        return bn_relu_conv1x1(**moving, **dict(zip(names, leaves, strict=True)), training=training)

    leaves = tuple(given[k].requires_grad_() for k in names)
    assert torch.autograd.gradcheck(run, leaves)
    assert torch.autograd.gradgradcheck(run, leaves)


def test_partial_gradients() -> None:
    given = arguments(2, 5, 4, 3, 3)
    given["conv_weight"].requires_grad_()
    bn_relu_conv1x1(**given, training=True).sum().backward()
    only = given["conv_weight"].grad
    given = {k: v.detach().clone() for k, v in given.items()}
    torch.manual_seed(0)
    full = given | {"conv_weight": given["conv_weight"].requires_grad_()}
    full["input"].requires_grad_()
    bn_relu_conv1x1(**full, training=True).sum().backward()
    assert torch.equal(only, full["conv_weight"].grad)


def test_keeps_only_its_input() -> None:
    given = arguments(4, 16, 64, 8, 8, torch.float32)
    given["input"] = given["input"].contiguous(memory_format=torch.channels_last)
    given["input"].requires_grad_()
    kept = saved_bytes(lambda: bn_relu_conv1x1(**given, training=True), exclude=given.values())
    assert kept == 2 * 16 * 4  # mean and variance


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("tracks", [True, False, "no more"])
def test_module_is_its_parts(momentum, tracks) -> None:
    torch.manual_seed(0)
    ours = memdense.BNReLUConv1x1(6, 10, 1e-5, momentum, track_running_stats=bool(tracks)).double()
    if tracks == "no more":
        ours.norm.track_running_stats = False
    parts = nn.Sequential(copy.deepcopy(ours.norm), nn.ReLU(), copy.deepcopy(ours.conv))
    for mode in (True, True, False):
        ours.train(mode), parts.train(mode)
        x = torch.randn(2, 6, 5, 4, dtype=torch.float64)
        assert_close("out", ours(x), parts(x), floor=1.0)
        for (name, a), b in zip(ours.norm.named_buffers(), parts[0].buffers(), strict=True):
            assert torch.allclose(a, b, rtol=1e-12), name


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("tracks", [True, False])
def test_module_makes_the_norm_that_it_is_asked_for(affine, tracks) -> None:
    module = memdense.BNReLUConv1x1(6, 10, 1e-3, 0.3, affine, tracks)
    expected = nn.BatchNorm2d(6, 1e-3, 0.3, affine, tracks)
    assert repr(module.norm) == repr(expected)
    assert module.norm.state_dict().keys() == expected.state_dict().keys()


def test_averages_in_forward_mode() -> None:
    """Over the steps, as of a BatchNorm, and in evaluation nothing moves."""
    ours = memdense.BNReLUConv1x1(6, 10, momentum=None).double()
    parts = nn.Sequential(copy.deepcopy(ours.norm), nn.ReLU(), copy.deepcopy(ours.conv))
    for mode in (True, True, True, False):
        x, tangent = torch.randn(2, 2, 6, 5, 4, dtype=torch.float64)
        results = []
        for module in (ours.train(mode), parts.train(mode)):
            with torch.autograd.forward_ad.dual_level(), torch.no_grad():
                out = module(torch.autograd.forward_ad.make_dual(x, tangent))
                results.append([*torch.autograd.forward_ad.unpack_dual(out), *module.buffers()])
        for found, expected in zip(*results, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_traced_module_is_its_parts() -> None:
    """In training, too, where buffers move whenever it runs."""
    ours = memdense.BNReLUConv1x1(6, 10).double()
    parts = nn.Sequential(copy.deepcopy(ours.norm), nn.ReLU(), copy.deepcopy(ours.conv))
    x = torch.randn(2, 6, 5, 4, dtype=torch.float64)
    traced = [torch.jit.trace(module, x) for module in (ours, parts)]
    for _ in range(3):
        assert_close("out", *(module(x) for module in traced), floor=1.0)
    for (name, a), b in zip(ours.norm.named_buffers(), parts[0].buffers(), strict=True):
        assert torch.allclose(a, b, rtol=1e-12), name


def test_what_fx_writes_down_follows_its_mode() -> None:
    module = memdense.BNReLUConv1x1(4, 5).double()
    with pytest.warns(memdense.MemdenseWarning, match="torch.fx writes down"):
        written = torch.fx.symbolic_trace(nn.Sequential(module))
    x, found = torch.randn(2, 4, 3, 3, dtype=torch.float64), []
    for training in (True, False):
        found.append(module.train(training)(x))
        torch.testing.assert_close(written.train(training)(x), found[-1])
    assert not torch.allclose(*found)


def test_autocast() -> None:
    given = arguments(2, 8, 16, 6, 6, torch.float32)
    expected = separate(**{k: v.double() for k, v in given.items()}, training=True)
    given["input"].requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = bn_relu_conv1x1(**given, training=True)
    out.float().sum().backward()
    assert out.dtype == torch.bfloat16 and given["input"].grad.dtype == torch.float32
    error = (out.double() - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert error < 5e-3


def test_autocast_leaves_a_norm_its_float32_input() -> None:
    """All digits of what is far from 0, and a warning by the module."""
    module = memdense.BNReLUConv1x1(8, 16)
    x = 10 + 1e-3 * torch.randn(2, 8, 6, 6)
    with torch.autocast("cpu", torch.bfloat16):
        expected = F.conv2d(F.relu(F.batch_norm(x, None, None, training=True)), module.conv.weight)
        found = bn_relu_conv1x1(x, None, None, None, None, module.conv.weight, True)
        assert torch.equal(found, expected)
        with pytest.warns(memdense.MemdenseWarning, match="what comes in is torch.float32"):
            assert torch.equal(module(x), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input": torch.zeros(2, 4)}, r"expected input of shape \(N, C, H, W\), got \(2, 4\)"),
        ({"input": torch.zeros(0, 4, 2, 2)}, "that is not empty, got torch.float32"),
        ({"conv_weight": torch.zeros(3, 5, 1, 1)}, r"shape \(B, 4, 1, 1\), got \(3, 5"),
        ({"conv_weight": torch.zeros(3, 4, 1, 1).double()}, "input's dtype torch.float32"),
        ({"running_mean": torch.zeros(4, dtype=torch.int64)}, "running_mean of .* torch.int64"),
        ({"weight": torch.zeros(4).double()}, r"weight of input's dtype torch.float32 .*float64"),
        ({"bias": torch.zeros(3)}, r"bias of shape \(4,\), got \(3,\)"),
        ({"running_var": None}, "both of running_mean and running_var, or neither"),
        ({"running_mean": None, "running_var": None}, "running statistics in evaluation"),
        ({"eps": -1.0}, "a finite eps of at least 0, got -1.0"),
        ({"eps": math.inf}, "a finite eps of at least 0, got inf"),
        (
            {"input": torch.zeros(1, 4, 1, 1), "training": True},
            "Expected more than 1 value per channel when training, got input size",
        ),
    ],
)  # fmt: skip
def test_bad_input(change, message) -> None:
    given = arguments(2, 4, 3, 2, 2, torch.float32) | change
    with pytest.raises(ValueError, match=message):
        bn_relu_conv1x1(**given)


def test_transforms() -> None:
    given = arguments(2, 5, 3, 4, 4)
    x = given.pop("input")
    tangent = torch.randn_like(x)
    results = []
    for function in (bn_relu_conv1x1, separate):

        def call(t: Tensor, function=function) -> Tensor:
            return function(t, **given)

        def loss(t: Tensor, call=call) -> Tensor:
            return call(t).square().sum()

        results.append((*torch.func.jvp(call, (x,), (tangent,)), torch.func.grad(loss)(x)))
        with torch.autograd.forward_ad.dual_level(), torch.no_grad():
            dual = torch.autograd.forward_ad.make_dual(x, tangent)
            results[-1] += (torch.autograd.forward_ad.unpack_dual(call(dual)).tangent,)
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)
        assert found.any()


def weight_norm(module: nn.Module) -> None:
    torch.nn.utils.parametrizations.weight_norm(module.conv)
    module.conv.parametrizations.weight.original0.data.mul_(10)


def prune(module: nn.Module) -> None:
    l1_unstructured(module.conv, "weight", 0.5)


def double(module: nn.Module) -> None:
    module.norm.register_forward_hook(lambda _, __, out: 2 * out)


def other_conv(module: nn.Module) -> None:
    module.conv = nn.Conv2d(6, 10, 1, stride=2)


def other_norm(module: nn.Module) -> None:
    module.norm = nn.GroupNorm(2, 6)


@pytest.mark.parametrize("change", [weight_norm, prune, double, other_conv, other_norm])
def test_module_with_unusual_children(change) -> None:
    """They run one by one, with one warning."""
    torch.manual_seed(0)
    module = memdense.BNReLUConv1x1(6, 10)
    change(module)
    x = torch.randn(2, 6, 5, 4)
    expected = module.conv(F.relu(module.norm(x)))
    with pytest.warns(memdense.MemdenseWarning, match="BNReLUConv1x1 as plain modules: "):
        assert torch.equal(module(x), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module(x)


def test_hooks_of_all_modules_see_the_children() -> None:
    module, seen = memdense.BNReLUConv1x1(6, 10), []
    hook = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(m))
    try:
        with pytest.warns(memdense.MemdenseWarning, match="BNReLUConv1x1 as plain modules: "):
            module(torch.randn(2, 6, 5, 4))
    finally:
        hook.remove()
    assert seen == [module.norm, module.conv, module]


@pytest.mark.skipif(not _extension.available(), reason=_extension.reason())
def test_one_image_is_read_where_it_is_not_strided() -> None:
    """Of one image NCHW, rows are a view with strided columns: kernels refuse those."""
    x = torch.randn(1, 6, 5, 4, requires_grad=True)
    with mock.patch.object(Reference, "bn_relu_conv1x1", None):
        bn_relu_conv1x1(x, None, None, None, None, torch.randn(10, 6, 1, 1), True)


def test_what_is_refused() -> None:
    x, conv, running = torch.randn(2, 4, 3, 3), torch.randn(5, 4, 1, 1), [torch.ones(4)] * 2
    for arguments, message in (
        ((None, None, None, None, conv[:0], True), "a conv_weight that is not empty"),
        ((None, None, None, None, conv.to("meta"), True), "conv_weight on cpu, got meta"),
        ((*running, running[0].to("meta"), None, conv), "weight on cpu, got meta"),
        ((*running, None, None, conv, True, None), "expected a momentum, got None"),
        ((*running, None, None, conv, True, -0.1), "expected a momentum of at least 0, got -0.1"),
        ((*running, None, None, conv, True, math.nan), "a momentum of at least 0, got nan"),
    ):
        with pytest.raises(ValueError, match=message):
            bn_relu_conv1x1(x, *arguments)


@pytest.mark.parametrize("name", arguments(1, 1, 1, 1, 1))
def test_what_is_no_tensor_is_named(name) -> None:
    given = arguments(2, 4, 3, 2, 2)
    with pytest.raises(TypeError, match=f"expected {name} as a Tensor, got ndarray"):
        bn_relu_conv1x1(**given | {name: given[name].numpy()})
