"""The model as an object: constructor, weights, state_dict, copies, and what bad input raises."""

import copy
import io
import os
import pickle
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import nullcontext

import pytest
import torch
import torchvision.models as tv
from exactness import BACKENDS, assert_same_step, no_warnings, randomise
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import memdense

SMALL = dict(growth_rate=4, block_config=(2, 2), num_init_features=6, bn_size=2, num_classes=3)


def small(**kwargs) -> memdense.DenseNet:
    return memdense.DenseNet(**(SMALL | kwargs))


@pytest.mark.parametrize("arch", ["densenet121", "densenet161", "densenet169", "densenet201"])
def test_state_dict_round_trips_with_torchvision(arch: str) -> None:
    ours, theirs = getattr(memdense, arch)(), getattr(tv, arch)()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    for name, p in ours.named_parameters():
        assert torch.equal(p, theirs.get_parameter(name)), name


def test_parameters_of_the_published_sizes() -> None:
    def count(model: nn.Module) -> int:
        return sum(p.numel() for p in model.parameters())

    assert count(memdense.densenet121()) == 7_978_856
    assert count(memdense.densenet161()) == 28_681_000
    assert count(memdense.densenet169()) == 14_149_480
    assert count(memdense.densenet201()) == 20_013_928
    cifar = dict(num_classes=10, small_inputs=True)
    bc = memdense.DenseNet(12, (16, 16, 16), 24, **cifar)
    plain = memdense.DenseNet(12, (12, 12, 12), 16, None, compression=1.0, **cifar)
    assert round(count(bc) / 1e6, 1) == 0.8
    assert round(count(plain) / 1e6, 1) == 1.0


def test_torchvisions_positional_order_and_flag() -> None:
    model = memdense.DenseNet(4, (2, 2), 6, 2, 0.1, 3, False)
    assert model.features.efficient is False
    assert model.features.denseblock1.denselayer1.drop_rate == 0.1
    assert memdense.DenseNet(4, (2, 2), 6, 2, 0, 3, True, efficient=False).features.efficient
    assert small().features.efficient and not small(efficient=False).features.efficient


def test_old_and_foreign_keys_load() -> None:
    model = small()
    old = {}
    for key, value in small().state_dict().items():
        if key.endswith("num_batches_tracked"):
            continue
        for part in ("norm1", "norm2", "conv1", "conv2"):
            if "denselayer" in key:
                key = key.replace(part, f"{part[:-1]}.{part[-1]}")
        old[key.replace("norm5", "norm_final")] = value
    assert any("norm.1.weight" in k for k in old) and any("norm_final" in k for k in old)
    model.load_state_dict(old)
    key = "features.denseblock1.denselayer2.conv.2.weight"
    assert torch.equal(model.features.denseblock1.denselayer2.conv2.weight, old[key])
    nested = nn.ModuleDict({"encoder": small()})
    nested.load_state_dict({f"encoder.{k}": v for k, v in old.items()})


def test_strict_loading_stays_strict() -> None:
    with pytest.raises(RuntimeError, match=r"Unexpected key.*classifier.wrong"):
        small().load_state_dict(small().state_dict() | {"classifier.wrong": torch.ones(1)})
    with pytest.raises(RuntimeError, match=r"size mismatch for classifier.weight"):
        small().load_state_dict(small(num_classes=4).state_dict())


def test_weights_from_a_path_and_a_state_dict(tmp_path: os.PathLike) -> None:
    expected = memdense.densenet121(num_classes=2).state_dict()
    path = tmp_path / "weights.pth"
    torch.save(expected, path)
    for weights in (path, str(path), expected):
        model = memdense.densenet121(weights=weights, num_classes=2)
        assert all(torch.equal(v, expected[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    "weights",
    ["IMAGENET1K_V1", "DEFAULT", "DenseNet121_Weights.DEFAULT", tv.DenseNet121_Weights.DEFAULT],
    ids=str,
)
def test_weights_by_name_download_what_torchvision_does(
    weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loader is replaced: it must be asked for torchvision's file, with its hash checked."""
    expected = memdense.densenet121().state_dict()
    calls = []

    def load(url: str, **kwargs: object) -> dict:
        calls.append((url, kwargs))
        return expected

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", load)
    model = memdense.densenet121(weights=weights, progress=False)
    url = tv.DenseNet121_Weights.IMAGENET1K_V1.url
    assert calls == [(url, dict(progress=False, check_hash=True))]
    assert torch.equal(model.classifier.weight, expected["classifier.weight"])


def test_pretrained_is_another_name(monkeypatch: pytest.MonkeyPatch) -> None:
    urls = []
    state = memdense.densenet121().state_dict()
    monkeypatch.setattr(
        torch.hub, "load_state_dict_from_url", lambda url, **_: urls.append(url) or state
    )
    for pretrained in (False, True):
        with pytest.warns(UserWarning, match="pretrained is deprecated") as seen:
            memdense.densenet121(pretrained=pretrained)
        assert seen[0].filename == __file__
    assert urls == [tv.DenseNet121_Weights.IMAGENET1K_V1.url]


@pytest.mark.parametrize("arch", ["densenet121", "densenet161", "densenet169", "densenet201"])
def test_urls_are_torchvisions(arch: str) -> None:
    enum = getattr(tv, f"{arch.replace('densenet', 'DenseNet')}_Weights")
    assert memdense.densenet._URLS[arch] == enum.IMAGENET1K_V1.url


@pytest.mark.parametrize(
    ("arch", "weights"),
    [
        ("densenet121", "IMAGENET1K_V9"),
        ("densenet264", "DEFAULT"),
        ("densenet121", "no/such/file.pth"),
        ("densenet121", tv.DenseNet169_Weights.DEFAULT),
    ],
    ids=str,
)
def test_unknown_weights_are_named(arch: str, weights) -> None:
    with pytest.raises(ValueError, match=f"{arch}.*{getattr(weights, 'name', weights)}"):
        getattr(memdense, arch)(weights=weights)


def test_a_file_of_something_else_is_no_state_dict(tmp_path: os.PathLike) -> None:
    torch.save([1, 2], tmp_path / "list.pth")
    for path in (tmp_path / "list.pth", os.fsencode(tmp_path / "list.pth")):
        with pytest.raises(ValueError, match=r"list\.pth holds a list, not a state dict"):
            memdense.densenet121(weights=path)


def test_weights_for_other_classes_are_refused_before_the_download() -> None:
    with pytest.raises(ValueError, match=r"num_classes.*1000.*10"):
        memdense.densenet121(weights="DEFAULT", num_classes=10)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("used", [False, True])
def test_copies_work_and_are_apart(how: str, used: bool) -> None:
    model = small().double()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    if used:
        model(x).sum().backward()
    if how == "deepcopy":
        other = copy.deepcopy(model)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    assert_same_step(other, model, x)
    before = other.features.conv0.weight.clone()
    with torch.no_grad():
        model.features.conv0.weight.add_(1)
    assert torch.equal(other.features.conv0.weight, before)


def test_moving_averages_of_the_model() -> None:
    model = small()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    x = torch.randn(2, 3, 32, 32)
    model(x).sum().backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    average.update_parameters(model)
    assert average(x).shape == (2, 3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_to_dtype(dtype: torch.dtype) -> None:
    """Each dtype through and through: outputs and gradients stay near float64's."""
    exact = small().double()
    randomise(exact, torch.Generator().manual_seed(1))
    exact.eval()
    model = copy.deepcopy(exact).to(dtype)
    x = torch.randn(2, 3, 32, 32).to(dtype)
    out, expected = model(x), exact(x.double())
    assert out.dtype == dtype and model.features.conv0.weight.dtype == dtype
    assert (out.double() - expected).norm() <= 0.03 * expected.norm()
    out.sum().backward()
    expected.sum().backward()
    mine = torch.cat([p.grad.double().flatten() for p in model.parameters()])
    theirs = torch.cat([p.grad.flatten() for p in exact.parameters()])
    assert mine.isfinite().all() and (mine - theirs).norm() <= 0.1 * theirs.norm()


def test_to_channels_last() -> None:
    model = small().double()
    other = copy.deepcopy(model).to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 32, 40, dtype=torch.float64)
    assert_same_step(other, model, x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_near_float32_and_types_are_torchvisions(dtype: torch.dtype) -> None:
    ours = small()
    theirs = tv.DenseNet(4, (2, 2), 6, 2, 0, 3)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(4, 3, 48, 48)
    exact = copy.deepcopy(ours).double()
    exact(x.double()).square().sum().backward()
    for model in (ours, theirs):
        with torch.autocast("cpu", dtype):
            out = model(x)
        assert out.dtype == dtype
        out.float().square().sum().backward()
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert mine.grad.dtype == other.grad.dtype == torch.float32, name

    def distance(model: nn.Module) -> float:
        pairs = zip(model.parameters(), exact.parameters(), strict=True)
        return sum((p.grad - q.grad).square().sum().item() for p, q in pairs) ** 0.5

    assert distance(ours) <= 1.5 * distance(theirs)


def test_backward_outside_and_inside_autocast_agree() -> None:
    grads = []
    for inside in (True, False):
        torch.manual_seed(0)
        model, x = small(), torch.randn(2, 3, 32, 32)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(x).float().square().sum()
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        grads.append([p.grad for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


def test_freezing_any_subset() -> None:
    model = small().double()
    for i, p in enumerate(model.parameters()):
        p.requires_grad_(i % 3 == 0)
    plain = copy.deepcopy(model)
    plain.features.efficient = False
    assert_same_step(model, plain, torch.randn(2, 3, 32, 32, dtype=torch.float64))
    model.requires_grad_(False)
    assert not model(torch.randn(2, 3, 32, 32, dtype=torch.float64)).requires_grad


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("conv", [True, False])
@pytest.mark.parametrize("images", [True, False])
def test_stems_answer_twice(images: bool, conv: bool, recompute: bool) -> None:
    """Whatever of its images and its convolution learns."""
    model = small(recompute_stem=recompute).double()
    model.features.conv0.requires_grad_(conv)
    plain = copy.deepcopy(model)
    plain.features.efficient = False

    def step(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        out = model(x)
        loss = out.square().sum()
        loss.backward(retain_graph=True)
        loss.backward()
        return out

    x = torch.randn(2, 3, 24, 20, dtype=torch.float64)
    assert_same_step(model, plain, x, step, input_gradient=images)


def test_slices_of_features_stay_features() -> None:
    model = small().double()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    head, tail = model.features[:5], model.features[5:]
    model.eval()
    expected = model.features(x)
    assert torch.allclose(tail(head(x)), expected, rtol=1e-12, atol=1e-12)


def both_raise(x: torch.Tensor, error: type[Exception], match: str, **kwargs) -> None:
    """The efficient model and torchvision raise the same kind of error about x."""
    ours = small(**kwargs)
    for model in (ours, tv.DenseNet(4, (2, 2), 6, 2, 0, 3)):
        with pytest.raises(error, match=match):
            model(x)


def test_wrong_channels() -> None:
    both_raise(
        torch.randn(2, 4, 32, 32), RuntimeError, "to have 3 channels, but got 4 channels instead"
    )


def test_integer_images() -> None:
    both_raise(torch.ones(2, 3, 32, 32, dtype=torch.int64), RuntimeError, "(?i)long.*float|type")


def test_images_of_another_dtype() -> None:
    both_raise(torch.randn(2, 3, 32, 32).double(), RuntimeError, "(?i)double.*float|type")


def test_too_small_images() -> None:
    both_raise(torch.randn(2, 3, 4, 4), RuntimeError, r"Output size is too small|\(\d+x0x0\)")


def test_wrong_dimensions() -> None:
    both_raise(torch.randn(3, 32), RuntimeError, r"3D.*4D|Expected 3D")
    both_raise(torch.randn(2, 3, 32, 32, 32), RuntimeError, "Expected 3D")


def test_one_value_per_channel() -> None:
    both_raise(torch.randn(1, 3, 8, 8), ValueError, "more than 1 value per channel when training")


def test_mixed_devices() -> None:
    """The meta device stands for another one: every machine has it."""
    model = small()
    model.features.denseblock2.to("meta")
    with pytest.raises((RuntimeError, NotImplementedError), match=r"(?i)device|meta"):
        model(torch.randn(2, 3, 32, 32))


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        (dict(growth_rate=0), "growth_rate must be a positive integer, but got 0"),
        (dict(num_init_features=-3), "num_init_features must be a positive integer, but got -3"),
        (dict(block_config=(2, 0)), r"block_config\[1\] must be a positive integer, but got 0"),
        (dict(growth_rate=2.5), "growth_rate must be a positive integer, but got 2.5"),
        (dict(growth_rate="4"), "growth_rate must be a positive integer, but got '4'"),
        (dict(block_config=()), "block_config must name at least one dense block"),
        (dict(block_config=6), "block_config must name at least one dense block, but got 6"),
        (dict(bn_size=0), "bn_size must be a positive integer, but got 0"),
        (dict(in_channels=0), "in_channels must be a positive integer, but got 0"),
        (dict(num_classes=-1), "num_classes must be a positive integer, but got -1"),
        (dict(drop_rate=1.5), "dropout probability has to be between 0 and 1, but got 1.5"),
        (dict(compression=0.0), r"compression must be in \(0, 1\], but got 0.0"),
        (dict(compression=0.01), "compression=0.01 leaves none"),
        (dict(output_stride=4), r"output_stride must be one of \[8, 16, 32\], but got 4"),
        (dict(output_stride=[32]), r"output_stride must be one of \[8, 16, 32\], but got \[32\]"),
        (dict(output_stride=16), "output_stride=16 needs four blocks"),
    ],
    ids=str,
)
def test_sizes_that_make_no_network(kwargs: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        small(**kwargs)


@pytest.mark.parametrize("training", [True, False])
def test_an_empty_batch_does_what_torchvision_does(training: bool) -> None:
    x = torch.randn(0, 3, 32, 32)
    results = []
    for model in (small(), tv.DenseNet(4, (2, 2), 6, 2, 0, 3)):
        try:
            results.append(model.train(training)(x).shape)
        except Exception as error:
            results.append((type(error), str(error)))
    assert results[0] == results[1]


def test_drop_rates_of_zero_and_one() -> None:
    for rate in (0, 1):
        model = small(drop_rate=rate).double()
        plain = copy.deepcopy(model)
        plain.features.efficient = False
        assert_same_step(model, plain, torch.randn(2, 3, 32, 32, dtype=torch.float64))


NET = dict(growth_rate=4, block_config=(2, 2), num_init_features=6, num_classes=3, bn_size=2)


def layouts() -> dict[str, tuple]:
    """Formats of model and images, and images."""
    x = torch.randn(2, 3, 40, 40)
    last = torch.channels_last
    return {
        "contiguous": (None, x),
        "a model in channels last": (last, x),
        "images in channels last": (None, x.to(memory_format=last)),
        "a crop": (None, torch.randn(2, 3, 48, 48)[..., 4:44, 4:44]),
        "transposed": (None, x.transpose(2, 3)),
        "expanded": (None, x[:, :1].expand(-1, 3, -1, -1)),
        "one channel": (None, x[:, :1].contiguous()),
        "one channel in channels last": (None, x[:, :1].contiguous(memory_format=last)),
    }


@pytest.mark.parametrize("first", [1, 6])
@pytest.mark.parametrize("rate", [0.3, 1.0])
@pytest.mark.parametrize("name", layouts())
def test_dropout_and_format_are_torchvisions(name: str, rate: float, first: int) -> None:
    torch.manual_seed(0)
    memory_format, x = layouts()[name]
    x = x.double()
    theirs = tv.DenseNet(**NET | {"num_init_features": first}, drop_rate=rate).double()
    theirs.features.conv0 = nn.Conv2d(x.shape[1], first, 7, 2, 3, bias=False).double()
    if memory_format is not None:
        theirs.to(memory_format=memory_format)
    ours = memdense.convert(copy.deepcopy(theirs))
    assert type(ours.features) is not nn.Sequential
    found = []
    for model in (ours, theirs):
        torch.manual_seed(1)
        features = model.features(x)
        found.append((features.detach(), torch.rand(1).double()))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
        assert a.is_contiguous() == b.is_contiguous()


@pytest.mark.parametrize("model", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("images", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("ahead", [[], [nn.Identity()]], ids=str)
def test_dropout_before_a_convolution_of_one_channel(
    ahead: list[nn.Module], images: torch.memory_format, model: torch.memory_format
) -> None:
    """The mask of a block depends on what is ahead of it, not on a head behind."""
    torch.manual_seed(0)
    block, head = (
        memdense.DenseBlock(2, 6, 2, 4, drop_rate=0.3),
        memdense.Transition(14, 1, pool=False),
    )
    features = memdense.Features(*ahead, block, head).double()
    features.to(memory_format=model)
    x = torch.randn(2, 6, 5, 4, dtype=torch.float64).to(memory_format=images)
    found = []
    for features.efficient in (False, True):
        torch.manual_seed(1)
        found.append(features(x).detach())
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


class _Rows(nn.Module):
    """As what ends in a view of rows does, whatever came in."""

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


@pytest.mark.parametrize("last", ["neither", "images", "weights"])
@pytest.mark.parametrize(
    "name, module",
    [
        ("transition1.norm", nn.InstanceNorm2d(14)),  # contiguous, whatever came in
        ("transition1.relu", _Rows()),
        ("pool0", nn.Sequential(nn.MaxPool2d(2), _Rows())),
        ("pool0", nn.Sequential(nn.MaxPool2d(2), nn.InstanceNorm2d(6))),
        ("norm5", _Rows()),
        ("norm5", nn.InstanceNorm2d(15)),
    ],
)
def test_dropout_and_format_behind_a_module_that_chooses_one(
    name: str, module: nn.Module, last: str
) -> None:
    torch.manual_seed(0)
    model = memdense.DenseNet(**NET, drop_rate=0.3).double()
    model.features.set_submodule(name, module)
    x = torch.randn(2, 3, 40, 40, dtype=torch.float64)
    if last == "weights":
        model.to(memory_format=torch.channels_last)
    elif last == "images":
        x = x.to(memory_format=torch.channels_last)
    found = []
    for model.features.efficient in (False, True):
        torch.manual_seed(1)
        found.append(model.features(x).detach())
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)
    assert found[0].stride() == found[1].stride()


def _stop_early_on_request() -> tuple:
    return create_selective_checkpoint_contexts(lambda *_, **__: CheckpointPolicy.PREFER_RECOMPUTE)


@pytest.mark.parametrize("watched", ["", "a device by default", "a policy"])
def test_statistics_move_alike_where_recomputation_stops_early(watched: str) -> None:
    """As in the modules, twice, once a forward; all of them. Also where operations go through the
    dispatcher since something watches them.
    """
    model, x = memdense.DenseNet(**NET), torch.randn(2, 3, 40, 40)
    device = torch.device("cpu") if watched == "a device by default" else nullcontext()
    contexts = {"context_fn": _stop_early_on_request} if watched == "a policy" else {}
    with device:
        for part in (model.features[:5], model.features[5:]):
            x = checkpoint(part, x, use_reentrant=False, **contexts)
        x.square().sum().backward()
    counts = {int(b) for name, b in model.named_buffers() if name.endswith("num_batches_tracked")}
    assert counts == {2}


def test_numbers_of_numpy_and_short_lists() -> None:
    np = pytest.importorskip("numpy")
    torch.manual_seed(0)
    plain, x = memdense.DenseNet(**NET), torch.randn(2, 3, 40, 40)
    plain.features.norm0.eps = plain.features.norm5.eps = 1e-3
    model = copy.deepcopy(plain)
    features = model.features
    features.norm0.eps = features.norm5.eps = np.float64(1e-3)
    features.conv0.stride, features.conv0.padding = [2], [3]
    for block in (features.denseblock1, features.denseblock2):
        for layer in block.values():
            layer.drop_rate, layer.conv2.dilation = np.float32(0), (np.int64(1),) * 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(model(x), plain(x))


def test_slices_keep_switches_and_trust() -> None:
    model = memdense.DenseNet(**NET, double_backward=True, keep_bottlenecks=True)
    part = model.features[:-1]
    assert (part.efficient, part.keep_bottlenecks, part.double_backward) == (True, True, True)
    model.features.efficient = False
    assert not model.features[1:].efficient
    converted = memdense.convert(tv.DenseNet(**NET))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        converted.features[:-1](torch.randn(2, 3, 40, 40))
    first = model.features[0]
    assert isinstance(first, nn.Conv2d) and not hasattr(first, "_switches")


def test_slices_made_at_every_call_warn_once() -> None:
    model, x = memdense.DenseNet(**NET), torch.randn(2, 3, 40, 40)
    model.features.denseblock2.denselayer1.register_forward_hook(lambda *_: None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", memdense.MemdenseWarning)
        for _ in range(3):
            model.features[6:](model.features[:6](x))
    assert [str(w.message).split(" as")[0] for w in caught] == ["memdense runs denseblock2"]


def test_meta() -> None:
    out = memdense.DenseNet(**NET).to("meta")(torch.empty(2, 3, 40, 40, device="meta"))
    assert out.is_meta and out.shape == (2, 3)


def test_forward_mode() -> None:
    torch.manual_seed(0)
    theirs = tv.DenseNet(**NET).double().eval()
    ours = memdense.convert(copy.deepcopy(theirs))
    x = torch.randn(2, 3, 40, 40).double()
    with torch.autograd.forward_ad.dual_level(), torch.no_grad():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.warns(memdense.MemdenseWarning, match="forward-mode AD"):
            found = torch.autograd.forward_ad.unpack_dual(ours(dual)).tangent
        expected = torch.autograd.forward_ad.unpack_dual(theirs(dual)).tangent
    torch.testing.assert_close(found, expected)


def test_gradients_have_their_parameters_strides() -> None:
    """Of a channels-last model, as DDP and optimizers want them."""
    model = memdense.DenseNet(**NET).to(memory_format=torch.channels_last)
    model(torch.randn(2, 3, 40, 40)).sum().backward()
    for name, p in model.named_parameters():
        assert p.grad.stride() == p.stride(), name


@pytest.mark.parametrize("keep", [False, True])
def test_layers_of_both_kinds_in_a_block(keep: bool) -> None:
    """Of which some have no bottleneck to keep."""
    block = memdense.DenseBlock(4, 6, 2, 4)
    for i in (1, 3):
        block[f"denselayer{i}"] = memdense.modules.DenseLayer(6 + 4 * (i - 1), 4, None)
    ours = memdense.Features(OrderedDict(block=block), keep_bottlenecks=keep).double()
    plain = copy.deepcopy(ours)
    plain.efficient = False
    assert_same_step(ours, plain, torch.randn(2, 6, 5, 4).double())


def share_statistics(block: nn.Module) -> None:
    """A frozen norm's are those that another one moves."""
    moves, reads = (block[f"denselayer{i}"].norm2 for i in (1, 2))
    reads.running_mean, reads.running_var = moves.running_mean, moves.running_var
    reads.eval()


def share_count(block: nn.Module) -> None:
    first, second = (block[f"denselayer{i}"].norm2 for i in (1, 2))
    second.num_batches_tracked = first.num_batches_tracked
    first.momentum = second.momentum = None


@pytest.mark.parametrize("share", [share_statistics, share_count])
def test_norms_that_share_buffers(share: Callable[[nn.Module], None]) -> None:
    """Plain modules move them one after another, a stage all at once."""
    stacks = []
    for efficient in (True, False):
        torch.manual_seed(0)
        stack = memdense.Features(memdense.DenseBlock(2, 6, 2, 4), efficient=efficient).double()
        share(stack[0])
        stacks.append(stack)
    with pytest.warns(memdense.MemdenseWarning, match="reads running .* moves|share num_batches"):
        assert_same_step(*stacks, torch.randn(2, 6, 5, 4).double())


def test_an_empty_stack() -> None:
    x = torch.randn(2, 3, 5, 4)
    assert torch.equal(memdense.Features().pooled(x), x.relu().mean((2, 3)))


HOOKED = {
    "pre-hook": lambda f: f.register_forward_pre_hook(lambda m, args: (args[0].abs(),)),
    "hook": lambda f: f.register_forward_hook(lambda m, args, out: out - 0.5),
    "replaced forward": lambda f: setattr(f, "forward", lambda x: type(f).forward(f, x) + 0.5),
}


@pytest.mark.parametrize("efficient", [True, False])
@pytest.mark.parametrize("how", HOOKED)
def test_what_hangs_on_features_runs(how: str, efficient: bool) -> None:
    theirs = tv.DenseNet(**NET).double()
    ours = memdense.DenseNet(**NET, efficient=efficient).double()
    x = torch.randn(2, 3, 40, 40).double()
    before = theirs(x)
    for model in (ours, theirs):
        HOOKED[how](model.features)
    assert not torch.allclose(theirs(x), before)
    ours.load_state_dict(theirs.state_dict())
    assert_same_step(ours, theirs, x)


def written_networks() -> Iterator[tuple[nn.Module, Tensor]]:
    model = memdense.DenseNet(**NET)
    yield model, torch.randn(2, 3, 40, 40)
    layer = model.features.denseblock1.denselayer1
    layer.conv2 = memdense.DilatedConv2d(*layer.conv2.weight.shape[1::-1], padding=1, bias=False)
    yield model, torch.randn(2, 3, 40, 40)
    pieces = memdense.BNReLUConv1x1(3, 8), memdense.DilatedConv2d(8, 4, padding="same", dilation=2)
    yield nn.Sequential(*pieces), torch.randn(2, 3, 9, 8)


@pytest.mark.parametrize("how", ["exported", "exported strictly", "traced"])
def test_what_is_written_down_is_pytorchs(how: str) -> None:
    """It is loaded where memdense is not."""
    for model, x in written_networks():
        model.eval()
        if how == "traced":
            written = torch.jit.trace(model, x)
            text = str(written.inlined_graph)
        else:
            program = torch.export.export(model, (x,), strict=how == "exported strictly")
            written, text = program.module(), program.graph_module.code
        assert "memdense::" not in text and "ops.memdense" not in text
        assert "conv" in text
        torch.testing.assert_close(written(x), model(x))


def periodic(self: nn.Conv2d, x: torch.Tensor, weight: torch.Tensor, bias: None) -> torch.Tensor:
    wide = nn.functional.pad(x, (self.padding[1],) * 2 + (self.padding[0],) * 2, "circular")
    return nn.functional.conv2d(wide, weight, bias, self.stride)


@pytest.mark.parametrize("where", ["conv0", "denseblock1.denselayer2.conv2"])
def test_methods_replaced_on_an_instance(where: str) -> None:
    """As those who want periodic images do it."""
    model = memdense.DenseNet(**NET).double()
    plain = copy.deepcopy(model)
    plain.features.efficient = False
    x = torch.randn(2, 3, 40, 40).double()
    model(x), plain(x)
    for m in (model, plain):
        conv = m.features.get_submodule(where)
        conv._conv_forward = periodic.__get__(conv)
    with pytest.warns(memdense.MemdenseWarning, match=f"the _conv_forward of {where} was replaced"):
        assert_same_step(model, plain, x)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("part", ["stem", "stack"])
def test_gradients_that_come_in_are_left_as_they_are(part: str, backend: str) -> None:
    """And running statistics move unheard of by autograd, as F.batch_norm moves them."""
    features = memdense.DenseNet(**NET).features
    net = features[:4] if part == "stem" else features
    nn.init.constant_(features.norm0.bias, -1.0)  # so that some of it would become 0
    x = torch.randn(2, 3, 40, 40).contiguous(memory_format=torch.channels_last)
    version = features.norm0.running_mean._version
    with memdense.use_backend(backend):
        out = net(x)
        gradient = torch.randn_like(out)
        before = gradient.clone()
        out.backward(gradient)
    assert torch.equal(gradient, before)
    assert features.norm0.running_mean._version == version


def test_norms_kept_frozen_by_their_train_method() -> None:
    model = memdense.DenseNet(**NET).double()
    plain = copy.deepcopy(model)
    plain.features.efficient = False
    for m in (model, plain):
        for norm in (m.features.norm0, m.features.denseblock1.denselayer1.norm2):
            norm.eval()
            norm.train = lambda mode: None
        m.train()
    with no_warnings():
        assert_same_step(model, plain, torch.randn(2, 3, 40, 40).double())
    assert all(row.efficient for row in memdense.explain(model).rows)


def test_methods_replaced_in_pytorchs_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    """As guided backpropagation does it."""
    model = memdense.DenseNet(**NET).double()
    plain = copy.deepcopy(model)
    plain.features.efficient = False
    x = torch.randn(2, 3, 40, 40).double()
    assert_same_step(model, plain, x)
    monkeypatch.setattr(nn.ReLU, "forward", lambda self, x: nn.functional.softplus(x))
    assert {row.why for row in memdense.explain(model).rows} == {"ReLU.forward was replaced"}
    with pytest.warns(memdense.MemdenseWarning, match="ReLU.forward was replaced"):
        assert_same_step(model, plain, x)
    monkeypatch.undo()
    with no_warnings():
        assert_same_step(model, plain, x)


def test_what_concerns_the_whole_model_is_told_once_by_each_copy() -> None:
    model, x = memdense.DenseNet(**NET), torch.randn(2, 3, 40, 40)
    with nn.modules.module.register_module_forward_hook(lambda *_: None):
        for m in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            with pytest.warns(memdense.MemdenseWarning) as caught:
                m(x), m(x)
            (said,) = (
                str(w.message).removeprefix("memdense runs the whole model ") for w in caught
            )
            assert said == "as plain modules: a global forward hook is registered"


class Shard(torch.Tensor):
    """A tensor that carries out PyTorch's operations itself and knows no others, as DTensor."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> "Shard":
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner: torch.Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        assert func.namespace == "aten", func
        unwrap = torch.utils._pytree.tree_map_only
        out = func(*unwrap(cls, lambda t: t.inner, args), **unwrap(cls, lambda t: t.inner, kwargs))
        return unwrap(torch.Tensor, cls, out)


@pytest.mark.parametrize("parameters", [False, True])
def test_tensors_that_carry_out_operations_themselves(parameters: bool) -> None:
    model, x = memdense.DenseNet(**NET).eval(), torch.randn(2, 3, 40, 40)
    expected = model(x)
    if parameters:
        shards = {n: nn.Parameter(Shard(p.detach()), False) for n, p in model.named_parameters()}
        model.load_state_dict(shards, strict=False, assign=True)
    with torch.no_grad(), pytest.warns(memdense.MemdenseWarning, match="a Shard"):
        found = model(Shard(x))
    torch.testing.assert_close(found.inner, expected)
    assert ("a parameter is a Shard: plain modules" in str(memdense.explain(model))) == parameters


@pytest.mark.parametrize("name", ["conv0.weight", "norm0.bias", "transition1.conv.weight"])
def test_one_parameter_that_carries_out_operations_itself(name: str) -> None:
    model, x = memdense.DenseNet(**NET).eval(), torch.randn(2, 3, 40, 40)
    expected = model.features(x)
    shard = nn.Parameter(Shard(model.features.get_parameter(name).detach()), False)
    model.features.load_state_dict({name: shard}, strict=False, assign=True)
    with torch.no_grad(), pytest.warns(memdense.MemdenseWarning, match="a parameter is a Shard"):
        found = model.features(x)
    torch.testing.assert_close(found.inner, expected)


def test_features_take_their_input_by_name() -> None:
    features, x = memdense.DenseNet(**NET).features.eval(), torch.randn(2, 3, 40, 40)
    assert torch.equal(features(input=x), features(x))
    assert torch.equal(features[:0](x), x)


def test_compiled_features_are_called() -> None:
    model, graphs = memdense.DenseNet(**NET).eval(), []
    x = torch.randn(2, 3, 40, 40)
    expected = model(x)
    model.features.compile(backend=lambda graph, _: graphs.append(graph) or graph.forward)
    torch.testing.assert_close(model(x), expected)
    assert graphs


@pytest.mark.parametrize(
    "wrap",
    [lambda f: nn.Sequential(f, nn.Identity()), lambda f: nn.Sequential(*f), nn.DataParallel],
    ids=["Sequential of it", "its children", "DataParallel"],
)
def test_features_may_be_replaced(wrap) -> None:
    theirs, ours = tv.DenseNet(**NET).double(), memdense.DenseNet(**NET).double()
    ours.load_state_dict(theirs.state_dict())
    for model in (ours, theirs):
        model.features = wrap(model.features)
    assert_same_step(ours, theirs, torch.randn(2, 3, 40, 40).double())
    with pytest.raises(TypeError, match="extract_features needs features to be a Features"):
        ours.extract_features(torch.randn(2, 3, 40, 40))


MISFITS = {
    "size": (lambda n: setattr(n, "weight", nn.Parameter(torch.ones(3))), "should contain"),
    "dtype": (lambda n: n.double(), "dtype"),
}
NORMS = ["norm0", "denseblock1.denselayer2.norm1", "denseblock2.denselayer1.norm2"]


@pytest.mark.parametrize("where", [*NORMS, "transition1.norm", "norm5"])
@pytest.mark.parametrize("what", MISFITS)
def test_modules_say_what_does_not_fit(what: str, where: str) -> None:
    change, message = MISFITS[what]
    model = memdense.DenseNet(**NET)
    change(model.features.get_submodule(where))
    with (
        pytest.warns(memdense.MemdenseWarning, match=where),
        pytest.raises(RuntimeError, match=message),
    ):
        model(torch.randn(2, 3, 40, 40))


@pytest.mark.parametrize("efficient", [True, False])
def test_a_transition_of_another_dtype_is_refused(efficient: bool) -> None:
    model = memdense.DenseNet(**NET, efficient=efficient)
    model.features.transition1.conv.bfloat16()
    with pytest.raises(RuntimeError, match="type"):
        model(torch.randn(2, 3, 40, 40))


@pytest.mark.filterwarnings("ignore::memdense.MemdenseWarning")
@pytest.mark.parametrize("which", ["weight", "bias", "running_mean", "running_var"])
@pytest.mark.parametrize("where", [*NORMS, "transition1.norm", "norm5"])
def test_what_changes_behind_a_parameter_is_seen(where: str, which: str) -> None:
    model, x = memdense.DenseNet(**NET), torch.randn(2, 3, 40, 40)
    model(x)
    getattr(model.features.get_submodule(where), which).data = torch.ones(1)
    with pytest.raises(RuntimeError, match=f"{which} should contain"):
        model(x)


@pytest.mark.filterwarnings("ignore::memdense.MemdenseWarning")
@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("denseblock1.denselayer2.conv1", (8, 10, 3, 3)),
        ("denseblock1.denselayer2.conv1", (7, 10, 1, 1)),
        ("denseblock1.denselayer2.conv2", (4, 7, 3, 3)),
        ("denseblock1.denselayer2.conv2", (4, 8, 5, 5)),
        ("transition1.conv", (7, 13, 1, 1)),
        ("conv0", (5, 3, 7, 7)),
    ],
)
@pytest.mark.parametrize("behind", [False, True])
def test_modules_say_which_weights_do_not_fit(name: str, shape: tuple, behind: bool) -> None:
    messages = []
    for efficient in (False, True):
        model, x = memdense.DenseNet(**NET, efficient=efficient), torch.randn(2, 3, 40, 40)
        conv, weight = model.features.get_submodule(name), torch.ones(shape)
        model(x)
        if behind:
            conv.weight.data = weight
        else:
            conv.weight = nn.Parameter(weight)
        with pytest.raises(RuntimeError) as raised:
            model(x)
        messages.append(str(raised.value))
    assert messages[0] == messages[1]


def test_a_first_kernel_is_as_large_as_its_weight() -> None:
    theirs, ours = tv.DenseNet(**NET).double(), memdense.DenseNet(**NET).double()
    ours.load_state_dict(theirs.state_dict())
    for model in (ours, theirs):
        weight = model.features.conv0.weight
        weight.data = weight.data[:, :, 1:-1, 2:-2].clone()
    assert_same_step(ours, theirs, torch.randn(2, 3, 40, 40).double())


def test_geometry_as_numbers() -> None:
    theirs, ours = tv.DenseNet(**NET).double(), memdense.DenseNet(**NET).double()
    ours.load_state_dict(theirs.state_dict())
    for model in (ours, theirs):
        layer = model.features.denseblock1.denselayer1
        layer.conv2.dilation = layer.conv2.padding = 2
        layer.conv1.stride, layer.conv1.dilation, layer.conv1.padding = 1, [1, 1], [0, 0]
        model.features.denseblock1.denselayer2.conv1.padding = "valid"
        model.features.denseblock1.denselayer2.conv2.padding = "same"
    with no_warnings():
        assert_same_step(ours, theirs, torch.randn(2, 3, 40, 40).double())


def test_a_3x3_without_padding_is_left_to_the_modules() -> None:
    model = memdense.DenseNet(**NET)
    model.features.denseblock1.denselayer2.conv2.padding = "valid"
    with (
        pytest.warns(memdense.MemdenseWarning, match="conv2 is not a 3x3 convolution of stride 1"),
        pytest.raises(RuntimeError, match="Sizes of tensors must match"),
    ):
        model(torch.randn(2, 3, 40, 40))


def test_a_parametrization_of_the_first_convolution_is_computed_once() -> None:
    calls = []

    class Counted(nn.Module):
        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            calls.append(weight)
            return 2 * weight

    model, x = memdense.DenseNet(**NET), torch.randn(2, 3, 40, 40)
    nn.utils.parametrize.register_parametrization(model.features.conv0, "weight", Counted())
    calls.clear()
    with pytest.warns(memdense.MemdenseWarning, match="conv0 is a ParametrizedConv2d"):
        model(x)
    assert len(calls) == 1


def test_a_first_convolution_may_be_lazy() -> None:
    theirs, ours = tv.DenseNet(**NET).double(), memdense.DenseNet(**NET).double()
    x = torch.randn(2, 1, 40, 40).double()
    for model in (theirs, ours):
        conv = nn.LazyConv2d(6, 7, 2, 3, bias=False, dtype=torch.float64)
        model.features.conv0 = conv
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model(x)
    ours.load_state_dict(theirs.state_dict())
    assert_same_step(ours, theirs, x)


def test_images_of_a_class_with_rules_of_its_own() -> None:
    """As MONAI's MetaTensor, whose new_empty takes the size as a tuple."""

    class Images(torch.Tensor):
        def new_empty(self, size, dtype=None, device=None, requires_grad=False):
            return super().new_empty(size, dtype=dtype, device=device)

    model, x = memdense.DenseNet(**NET), torch.randn(2, 3, 40, 40)
    plain = memdense.DenseNet(**NET, efficient=False)
    plain.load_state_dict(model.state_dict())
    results = []
    for net in (plain, model):
        out = net(x.as_subclass(Images))
        assert type(out) is Images
        out.square().sum().backward()
        results.append([out.as_subclass(torch.Tensor), *(p.grad for p in net.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_autocast_leaves_a_block_its_float32_input() -> None:
    """What modules concatenate with it is promoted."""
    model = memdense.DenseNet(**NET).eval()
    plain = copy.deepcopy(model)
    plain.features.efficient = False
    x = torch.randn(2, 6, 10, 10) + 8
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        with pytest.warns(memdense.MemdenseWarning, match="what comes in is torch.float32"):
            found = model.features[4:5](x)
        expected = plain.features[4:5](x)
        assert torch.equal(found, expected) and found.dtype == torch.float32
        with no_warnings():
            assert model.features[4:5](x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("part", ["features.denseblock1", "features"])
@pytest.mark.parametrize("training", [True, False])
def test_autocast_beside_norms_of_another_narrow_dtype(part: str, training: bool) -> None:
    """Which PyTorch refuses."""
    model = memdense.DenseNet(**NET).train(training)
    model.get_submodule(part).bfloat16()
    plain = copy.deepcopy(model)
    plain.features.efficient = False
    x = torch.randn(2, 3, 40, 40)
    with torch.autocast("cpu", torch.float16):
        with pytest.raises(RuntimeError) as expected:
            plain(x)
        with (
            pytest.warns(memdense.MemdenseWarning, match="a parameter is torch.bfloat16"),
            pytest.raises(RuntimeError) as found,
        ):
            model(x)
    assert str(found.value) == str(expected.value)


@pytest.mark.parametrize("training", [True, False])
def test_norms_that_mix_dtypes_run(training: bool) -> None:
    """As FSDP2's mixed precision leaves running statistics in float32."""
    mixed = memdense.DenseNet(**NET).bfloat16().train(training)
    wide = copy.deepcopy(mixed)
    for found, expected in zip(mixed.modules(), wide.modules(), strict=True):
        if isinstance(found, nn.BatchNorm2d):
            found.running_mean, found.running_var = (b.float() for b in list(found.buffers())[:2])
            expected.float()
    x = torch.randn(2, 3, 40, 40, dtype=torch.bfloat16)
    with no_warnings(memdense.MemdenseWarning):
        assert torch.equal(mixed(x), wide(x))
    for found, expected in zip(mixed.buffers(), wide.buffers(), strict=True):
        assert torch.equal(found, expected)


def test_modules_say_that_a_drop_rate_is_none() -> None:
    model = memdense.DenseNet(**NET)
    model.features.denseblock1.denselayer2.drop_rate = 1.5
    with (
        pytest.warns(memdense.MemdenseWarning, match="no probability, 1.5"),
        pytest.raises(ValueError, match="between 0 and 1"),
    ):
        model(torch.randn(2, 3, 40, 40))


def test_forward_of_a_kind_of_features_runs() -> None:
    class Louder(memdense.Features):
        def forward(self, x):
            return 2 * super().forward(x)

    model = memdense.DenseNet(**NET).eval()
    x = torch.randn(2, 3, 40, 40)
    quiet = model(x) - model.classifier.bias
    model.features.__class__ = Louder
    torch.testing.assert_close(model(x) - model.classifier.bias, 2 * quiet)


def test_norm_with_plain_tensors() -> None:
    """As hand-written meta-learning leaves it."""
    theirs, ours = tv.DenseNet(**NET).double(), memdense.DenseNet(**NET).double()
    ours.load_state_dict(theirs.state_dict())
    for model in (ours, theirs):
        norm = model.features.denseblock2.denselayer2.norm1
        weight = norm.weight.detach() * 2
        del norm.weight
        norm.weight = weight
    with pytest.warns(memdense.MemdenseWarning, match="no 'weight' among"):
        assert_same_step(ours, theirs, torch.randn(2, 3, 40, 40).double())
