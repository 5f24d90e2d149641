"""Blocks that a model's own forward calls, that carry hooks, or whose tails do, against plain
modules in float64.
"""

import copy
import gc
import inspect
import io
import pickle
import weakref
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import peers
import pytest
import torch
from exactness import answered, assert_same_step, no_warnings, randomise
from torch import Tensor, nn
from torch.nn import functional as F

import memdense
from memdense import MemdenseWarning, ops
from memdense.memory import saved_bytes

BUILDS = {**peers.PEERS, "memdense": lambda: memdense.DenseNet(4, (2, 3), 8, num_classes=5)}


def images(*shape: int) -> Tensor:
    return torch.randn(shape or (3, 3, 37, 40), dtype=torch.float64)


def pair(name: str, **kwargs: bool) -> tuple[nn.Module, nn.Module]:
    """An efficient model and a plain one with the same weights."""
    plain = BUILDS[name]().double()
    randomise(plain, torch.Generator().manual_seed(1))
    found = copy.deepcopy(plain)
    if name == "memdense":
        plain.features.efficient = False
        for switch, value in kwargs.items():
            setattr(found.features, switch, value)
        return found, plain
    return memdense.convert(found, verbose=False, **kwargs), plain


def stack_of(model: nn.Module) -> nn.Sequential:
    return getattr(model, "features", model)


def names_of(model: nn.Module) -> dict[str, str]:
    """What is what among a stack's children."""
    names = list(stack_of(model)._modules)
    first = names.index("denseblock1" if "denseblock1" in names else "block0")
    return dict(zip(("block1", "tail1", "block2", "tail2"), names[first:], strict=False))


def one_by_one(model: nn.Module, x: Tensor) -> Tensor:
    """The stack's children as a U-Net's encoder calls them; its answer takes all they give."""
    outputs = []
    for module in stack_of(model):
        x = module(x)
        outputs.append(x)
    torch.manual_seed(2)
    sum((out * torch.randn_like(out)).sum() for out in outputs).backward()
    return torch.cat([out.flatten(1) for out in outputs], 1)


def stages_run(model: nn.Module, x: Tensor) -> int:
    """How many operations a forward takes; a warning is an error."""
    with (
        no_warnings(MemdenseWarning),
        mock.patch.object(ops, "run_stage", side_effect=ops.run_stage) as stages,
        torch.no_grad(),
    ):
        copy.deepcopy(model)(x)
    return stages.call_count


named = pytest.mark.parametrize("name", BUILDS)


@named
@pytest.mark.parametrize("mode", ["train", "eval", "some frozen"])
def test_children_called_one_by_one(name: str, mode: str) -> None:
    found, plain = pair(name)
    for model in (found, plain):
        model.train(mode != "eval")
        if mode == "some frozen":
            block = stack_of(model).get_submodule(names_of(model)["block1"])
            block.eval().requires_grad_(False)
            next(block.parameters()).requires_grad_()
    with no_warnings(MemdenseWarning):
        assert_same_step(found, plain, images(), one_by_one)
    block = stack_of(found).get_submodule(names_of(found)["block1"])
    assert stages_run(block, images(3, 8, 7, 9)) == 1


@pytest.mark.parametrize("switch", ["keep_bottlenecks", "double_backward"])
def test_switches_reach_them(switch: str) -> None:
    found, plain = pair("torchvision", **{switch: True})
    assert_same_step(found, plain, images(), one_by_one)
    block, x = found.features.denseblock1, images(2, 8, 6, 6).requires_grad_()
    parts = ops.run_stage
    with mock.patch.object(ops, "run_stage", side_effect=parts) as stages:
        out = block(x)
    assert stages.call_args.args[5] is (switch == "double_backward")
    if switch == "double_backward":
        (first,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        first.square().sum().backward()
    found.features.efficient = False
    with mock.patch.object(ops, "run_stage", side_effect=parts) as stages:
        assert torch.equal(block(x), plain.features.denseblock1(x))
    assert not stages.called


def test_memory_of_children_called_one_by_one() -> None:
    found, plain = pair("torchvision")
    x = images(2, 3, 64, 64)
    kept = [
        saved_bytes(nn.Sequential(*model.features), x, exclude=(model, x))
        for model in (found, plain)
    ]
    assert kept[0] < 0.65 * kept[1], kept
    block, x = found.features.denseblock2, images(2, 8, 16, 16)
    growth = sum(layer.conv2.out_channels for layer in block.values())
    whole = (8 + growth) * 2 * 16 * 16 * 8
    x = x.to(memory_format=torch.channels_last)
    assert saved_bytes(block, x, exclude=(found, x)) < 1.1 * whole


HOOKS = (
    nn.Module.register_forward_pre_hook,
    nn.Module.register_forward_hook,
    nn.Module.register_full_backward_pre_hook,
    nn.Module.register_full_backward_hook,
)


@named
@pytest.mark.parametrize("which", ["block1", "block2"])
def test_hooks_on_a_block(name: str, which: str) -> None:
    """They see what they would see, and the block runs efficiently."""
    models, seen = pair(name), ([], [])
    for model, to in zip(models, seen, strict=True):

        def look(*given: object, to: list = to) -> None:
            to.extend(t.clone() for group in given[1:] for t in group if isinstance(t, Tensor))

        for register in HOOKS:
            register(stack_of(model).get_submodule(names_of(model)[which]), look)
    with no_warnings(MemdenseWarning):
        assert_same_step(*models, images())
    assert len(seen[0]) == len(seen[1]) >= 6
    for found, expected in zip(*seen, strict=True):
        assert found.stride() == expected.stride()
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    rows = memdense.explain(models[0]).rows
    assert all(row.efficient for row in rows if not row.why.startswith("neither"))


def test_hooks_may_change_what_a_block_takes_and_gives() -> None:
    models = pair("torchvision")
    for model in models:
        block = model.features.denseblock1
        block.register_forward_pre_hook(lambda _, x: (x[0] * 1.5 - 0.1,))
        block.register_forward_hook(lambda _, x, out: out.sin() + x[0].mean())
        model.features.denseblock2.register_forward_hook(lambda *given: 2 * given[2])
    assert_same_step(*models, images())


@pytest.mark.parametrize("name", ["torchvision", "timm", "monai", "gpleiss", "memdense"])
@pytest.mark.parametrize("where", ["block1", "tail1", "block2", "tail2"])
@pytest.mark.parametrize("form", ["stack", "model"])
def test_only_what_is_unusual_runs_as_modules(name: str, where: str, form: str) -> None:
    """Of a block and its tail; the warning and ``explain`` say so alike."""
    models = pair(name)
    where_named = names_of(models[0])[where]
    for model in models:
        module = stack_of(model).get_submodule(where_named)
        if where.startswith("block"):
            module = next(iter(module.children()))
        module.register_forward_hook(lambda *_: None)
    with pytest.warns(MemdenseWarning) as caught:
        assert_same_step(*(m if form == "model" else stack_of(m) for m in models), images())
    rows = memdense.explain(models[0]).rows
    ((modules, why),) = ((row.modules, row.why) for row in rows if "hook" in row.why)
    assert modules == (where_named,)
    said = [str(w.message) for w in caught]
    assert said == [f"memdense runs {where_named} as plain modules: {why}"]


@pytest.mark.parametrize("kind", ["norm", "pool"])
@pytest.mark.parametrize("double", [False, True])
def test_a_final_norm_alone(kind: str, double: bool) -> None:
    """As a hook on the last block leaves it."""
    found, plain = pair("memdense", double_backward=True)
    for model in (found, plain):
        model.features.denseblock2.register_forward_hook(lambda *_: None)

    def step(model: nn.Module, x: Tensor) -> Tensor:
        out = (model if kind == "pool" else model.features)(x)
        if double:
            (g,) = torch.autograd.grad(out.sin().sum(), x, create_graph=True)
            g.square().sum().backward()
            return out
        return answered(lambda _: out, x)

    with no_warnings(MemdenseWarning):
        assert_same_step(found, plain, images(), step)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(("channels", "dtype"), [(5, torch.float64), (20, torch.float32)])
def test_a_final_norm_that_does_not_fit(affine: bool, channels: int, dtype: torch.dtype) -> None:
    """The modules say so."""
    model = memdense.DenseNet(4, (2, 3), 8, num_classes=5).double()
    model.features.denseblock2.register_forward_hook(lambda *_: None)
    model.features.norm5 = nn.BatchNorm2d(channels, affine=affine, dtype=dtype)
    plain = copy.deepcopy(model)
    plain.features.efficient = False
    said = []
    for m in (plain, model):
        with pytest.raises(RuntimeError) as error:
            m.features(images())
        said.append(str(error.value))
    assert said[0] == said[1]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("weights", [torch.contiguous_format, torch.channels_last])
def test_layouts_and_dropout_are_the_modules(
    layout: torch.memory_format, weights: torch.memory_format
) -> None:
    plain = memdense.DenseNet(4, (2, 3), 8, drop_rate=0.4, efficient=False).double()
    found = copy.deepcopy(plain)
    found.features.efficient = True
    for model in (plain, found):
        model.to(memory_format=weights)
    x = images(2, 8, 6, 5).contiguous(memory_format=layout)
    outputs = []
    for model in (plain, found):
        torch.manual_seed(3)
        outputs.append(model.features.denseblock1(x))
    assert outputs[0].stride() == outputs[1].stride()
    torch.testing.assert_close(*outputs, rtol=1e-12, atol=1e-12)
    assert_same_step(found, plain, images(), one_by_one)
    for start, stop, channels in ((4, 5, 8), (4, 6, 8), (4, 8, 8), (5, 7, 16), (6, None, 8)):
        x = images(2, channels, 6, 5).contiguous(memory_format=layout)
        outputs = []
        for model in (plain, found):
            torch.manual_seed(3)
            outputs.append(model.features[start:stop](x))
        assert outputs[0].stride() == outputs[1].stride(), (start, stop)
        torch.testing.assert_close(*outputs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("way", ["deepcopy", "copy", "pickle", "torch.save"])
@pytest.mark.parametrize("name", ["torchvision", "monai", "gpleiss", "memdense"])
def test_copies_of_a_block(way: str, name: str) -> None:
    model, plain = pair(name)
    block = stack_of(model).denseblock1
    if way in ("deepcopy", "copy"):
        other = getattr(copy, way)(block)
    elif way == "pickle":
        other = pickle.loads(data := pickle.dumps(block))
        assert len(data) < 1.5 * len(pickle.dumps(stack_of(plain).denseblock1)) + 1000
    else:
        torch.save(block, file := io.BytesIO())
        file.seek(0)
        other = torch.load(file, weights_only=False)
    assert type(other) is type(block) and repr(other) == repr(stack_of(plain).denseblock1)
    assert isinstance(other, type(stack_of(plain).denseblock1))
    assert stages_run(other, images(2, 8, 6, 6)) == 1
    assert_same_step(other, stack_of(plain).denseblock1, images(2, 8, 6, 6))


class UNet(nn.Module):
    """As FC-DenseNets are written: blocks in lists, their inputs concatenations of skips."""

    def __init__(self, block: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.down = nn.ModuleList([block(8), block(20)])
        self.middle = block(32)
        self.up = nn.ModuleDict({"0": block(44 + 32), "1": block(76 + 12 + 20)})

    def forward(self, x: Tensor) -> Tensor:
        x, skips = self.first(x), []
        for block in self.down:
            x = block(x)
            skips.append(x)
            x = F.max_pool2d(x, 2)
        x = self.middle(x)
        for block in self.up.values():
            x = F.interpolate(x, scale_factor=2.0)
            x = block(torch.cat([x, skips.pop()], 1))
        return x


@pytest.mark.parametrize("bn_size", [None, 2])
def test_blocks_anywhere_in_a_model(bn_size: int | None, capsys: pytest.CaptureFixture) -> None:
    plain = UNet(lambda channels: memdense.DenseBlock(3, channels, bn_size, 4)).double()
    randomise(plain, torch.Generator().manual_seed(1))
    found = memdense.convert(copy.deepcopy(plain))
    said = capsys.readouterr().err
    assert "down: it is a ModuleList, not an nn.Sequential: only dense blocks can be" in said
    assert "down.1: converted\n" in said and "the model.middle: converted\n" in said
    assert list(found.state_dict()) == list(plain.state_dict())
    x = images(2, 3, 16, 12)
    assert_same_step(found, plain, x)
    assert stages_run(found, x) == 5
    kept = [saved_bytes(m, x, exclude=(m, x)) for m in (found, plain)]
    assert kept[0] < 0.6 * kept[1], kept
    rows = memdense.explain(found).rows
    assert sum(row.efficient for row in rows) == 5 == sum(row.layers > 0 for row in rows)
    memdense.convert(found, verbose=False, keep_bottlenecks=True)
    assert found.middle._switches.keep_bottlenecks and pickle.dumps(found)
    assert_same_step(found, plain, x)


def test_timms_feature_lists() -> None:
    timm = pytest.importorskip("timm")
    plain = timm.create_model("densenet121", features_only=True, block_config=(2, 2, 2, 2))
    plain = plain.double()
    randomise(plain, torch.Generator().manual_seed(1))
    found = memdense.convert(copy.deepcopy(plain), verbose=False)
    x = images(2, 3, 64, 64)

    def step(model: nn.Module, x: Tensor) -> Tensor:
        return answered(lambda x: torch.cat([out.flatten(1) for out in model(x)], 1), x)

    assert_same_step(found, plain, x, step)
    assert stages_run(found, x) == 4


def test_a_block_and_nothing_else() -> None:
    plain = peers.torchvision().double().features.denseblock1
    found = memdense.convert(copy.deepcopy(plain))
    x = images(2, 8, 6, 6)
    assert_same_step(found, plain, x)
    assert stages_run(found, x) == 1
    assert [row.efficient for row in memdense.explain(found).rows] == [True]


def test_slices_that_begin_with_a_transition() -> None:
    """As a U-Net cuts them."""
    found, plain = pair("torchvision")
    x = images(2, 20 - 4, 8, 6)
    assert found.features[5:7].steps("norm")[0].kind == "tail"
    assert_same_step(found.features[5:7], plain.features[5:7], x)
    assert stages_run(found.features[5:7], x) == 2
    # a class that nobody looked at may do anything
    other = memdense.Features(nn.Sequential(plain.features.transition1))
    assert [step.kind for step in other.steps("norm")] == ["module"]


def test_a_transition_whose_pool_was_taken_out() -> None:
    found, plain = pair("torchvision")
    for model in (found, plain):
        model.features.transition1.pool = nn.Identity()
    assert_same_step(found, plain, images())
    assert stages_run(found, images()) == 2


def test_dilated_convolutions_in_layers() -> None:
    found, plain = pair("torchvision")
    for model in (found, plain):
        layer = model.features.denseblock1.denselayer2
        weight = layer.conv2.weight
        kind = memdense.DilatedConv2d if model is found else nn.Conv2d
        layer.conv2 = kind(*weight.shape[1::-1], 3, padding=2, dilation=2, bias=False)
        layer.conv2.weight = nn.Parameter(weight.detach().clone())
    with no_warnings(MemdenseWarning):
        assert_same_step(found, plain, images())


def test_reasons_of_a_block_alone_are_told_once() -> None:
    found, plain = pair("torchvision")
    for model in (found, plain):
        model.features.denseblock1.denselayer2.norm2.register_forward_hook(lambda *_: None)
    x = images(2, 8, 6, 6)
    with pytest.warns(MemdenseWarning) as caught:
        for _ in range(2):
            assert torch.equal(
                found.features.denseblock1(x), plain.features.denseblock1(init_features=x)
            )
    assert [str(w.message) for w in caught] == [
        "memdense runs denseblock1 as plain modules: denseblock1.denselayer2.norm2 carries a "
        "forward hook"
    ]
    with pytest.raises(TypeError, match="positional argument"):
        found.features.denseblock1(x, x)
    with pytest.raises(RuntimeError, match="running_mean should contain"):
        found.features.denseblock2(x[:, :3])


@pytest.mark.parametrize("middle", ["norm", "nothing"])
def test_outputs_of_blocks_that_follow_each_other(middle: str) -> None:
    """A norm between two is no tail."""
    torch.manual_seed(0)
    between = nn.BatchNorm2d(14) if middle == "norm" else nn.Identity()
    blocks = memdense.DenseBlock(2, 6, 2, 4), memdense.DenseBlock(2, 14, 2, 4)
    net = memdense.Features(blocks[0], between, blocks[1], nn.BatchNorm2d(22)).double()
    x = torch.randn(2, 6, 8, 8).double()
    first = net[0](x)
    expected = first, net[2](net[1](first))
    for efficient in (True, False):
        net.efficient = efficient
        with no_warnings(MemdenseWarning):
            outputs = net.block_outputs(x)
        for a, b in zip(outputs, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_a_block_alone_by_keyword() -> None:
    found, plain = pair("torchvision")
    x = images(2, 8, 6, 6)
    with mock.patch.object(ops, "run_stage", side_effect=ops.run_stage) as stages:
        out = found.features.denseblock1(init_features=x)
    assert stages.called
    torch.testing.assert_close(out, plain.features.denseblock1(x), rtol=1e-12, atol=1e-12)
    with pytest.raises(TypeError, match="unexpected keyword argument 'images'"):
        found.features.denseblock1(images=x)


def test_a_class_of_ones_own_around_a_block() -> None:
    """What it adds stays."""
    found, plain = pair("torchvision")
    for model in (found, plain):
        block = model.features.denseblock1
        own = {"forward": lambda self, x: super(type(self), self).forward(x) * 2}
        block.__class__ = type("Own", (type(block),), own)
        assert type(copy.deepcopy(block)) is type(block)
    assert stages_run(found.features.denseblock1, images(2, 8, 6, 6)) == 1
    assert_same_step(found, plain, images())


def test_a_block_of_a_class_that_was_not_checked_stays_what_it_is() -> None:
    kind = type("Mine", (memdense.DenseBlock,), {})
    features = memdense.Features(kind(2, 6, 2, 4), memdense.DenseBlock(2, 14, 2, 4))
    features.let_blocks_run_alone()
    assert type(features[0]) is kind and type(features[1]) is not memdense.DenseBlock


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_blocks_sharded_by_fsdp2(tmp_path: Path) -> None:
    """It gives them classes and hooks of its own."""
    from torch.distributed.fsdp import fully_shard

    found, plain = pair("torchvision")
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        for block in (found.features.denseblock1, found.features.denseblock2):
            fully_shard(block, mesh=mesh)
        x = images()
        outputs = [answered(model.train(), x) for model in (plain, found)]
        rows = memdense.explain(found).rows
    finally:
        torch.distributed.destroy_process_group()
    torch.testing.assert_close(*outputs, rtol=1e-10, atol=1e-10)
    for (name, p), q in zip(plain.named_parameters(), found.parameters(), strict=True):
        gradient = q.grad.to_local() if hasattr(q.grad, "to_local") else q.grad
        torch.testing.assert_close(gradient, p.grad, rtol=1e-8, atol=1e-10, msg=name)
    assert all(row.efficient for row in rows) and {len(row.modules) for row in rows} == {1, 4}


def test_compiled_alone() -> None:
    found, plain = pair("torchvision")
    compiled = torch.compile(found.features.denseblock1, backend="aot_eager", fullgraph=True)
    with no_warnings(MemdenseWarning):
        for height in (6, 7):
            x = images(2, 8, height, 6)
            assert_same_step(
                found.features.denseblock1,
                plain.features.denseblock1,
                x,
                lambda m, x: answered(compiled if m is found.features.denseblock1 else m, x),
            )


def test_autocast_alone() -> None:
    found, plain = pair("torchvision")
    x = torch.randn(2, 8, 6, 6)
    for model in (found, plain):
        model.float().eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        with pytest.warns(MemdenseWarning, match="what comes in is torch.float32"):
            assert torch.equal(found.features.denseblock1(x), plain.features.denseblock1(x))
        out, expected = (m.features.denseblock1(x.bfloat16()) for m in (found, plain))
    assert out.dtype == expected.dtype == torch.bfloat16
    assert F.mse_loss(out.float(), expected.float()) < 1e-3 * expected.float().square().mean()


def test_blocks_that_ran_go_with_their_model() -> None:
    model, _ = pair("torchvision")
    handle = model.features.denseblock1.register_forward_hook(lambda *_: None)
    model(images()), one_by_one(model, images())
    blocks = [weakref.ref(model.features.denseblock1), weakref.ref(model.features.denseblock2)]
    del model, handle
    gc.collect()
    assert [block() for block in blocks] == [None, None]


def test_what_is_made_of_a_blocks_class_runs_as_modules() -> None:
    block = memdense.DenseNet(4, (2, 3), 8).features.denseblock1
    assert type(block)(2, 8, 4, 4)(torch.randn(2, 8, 6, 6)).shape == (2, 16, 6, 6)
    model, plain = pair("sequential")
    x = images(2, 8, 6, 6)
    torch.testing.assert_close(model.block0[:1](x), plain.block0[:1](x), rtol=1e-12, atol=1e-12)


def test_a_blocks_signature_stays() -> None:
    found, plain = pair("torchvision")
    signatures = [inspect.signature(m.features.denseblock1.forward) for m in (found, plain)]
    assert signatures[0] == signatures[1]
    assert torch.fx.symbolic_trace(found.features.denseblock1)
    given = {"init_features": images(2, 8, 6, 6)}
    program = torch.export.export(found.features.denseblock1, (), given)
    assert "memdense" not in program.graph_module.code


class Joining(peers.PrevBlock):
    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self.children():
            features.append(layer(*features))
        return self.join(features)

    def join(self, features: list[Tensor]) -> Tensor:
        return torch.cat(features, 1)


def test_changes_to_a_block_that_ran() -> None:
    """A switch, a layer less, a method of its own."""
    model = nn.Sequential(OrderedDict(block=Joining(3, 8, 4), norm=nn.BatchNorm2d(20))).double()
    block, x = memdense.convert(model, verbose=False).block, images(2, 8, 6, 6)
    kept = []
    for model.keep_bottlenecks in (False, True):
        kept.append(saved_bytes(block, x, exclude=(block, x)))
    assert kept[1] - kept[0] == 3 * 16 * 2 * 6 * 6 * 8
    whole = block(x)
    del block.denselayer3
    torch.testing.assert_close(block(x), whole[:, :16], rtol=1e-12, atol=1e-12)
    block.join = lambda features: torch.cat(features[::-1], 1)
    with pytest.warns(MemdenseWarning, match="the join of block was replaced on the instance"):
        out = block(x)
    torch.testing.assert_close(out[:, 8:], whole[:, :8], rtol=1e-12, atol=1e-12)


class Liar(peers.PrevLayer):
    def forward(self, *features: Tensor) -> Tensor:
        return 2 * super().forward(*features)


def test_blocks_that_run_alone_are_checked_again(capsys: pytest.CaptureFixture) -> None:
    model = nn.ModuleList([peers.GpleissStyle().features.denseblock1])
    memdense.convert(model)
    model[0].denselayer2.__class__ = Liar
    (row,) = memdense.explain(model).rows
    with pytest.warns(MemdenseWarning, match="0.denselayer2 is a Liar") as caught:
        model[0](torch.randn(2, 8, 6, 6))
    assert not row.efficient and str(caught[0].message).endswith(row.why)
    memdense.convert(model)
    assert "left alone: Liar, PrevBlock" in capsys.readouterr().err


def test_blocks_in_a_stack_and_in_a_list(capsys: pytest.CaptureFixture) -> None:
    model = peers.torchvision()
    model.blocks = nn.ModuleList([model.features.denseblock1, model.features.denseblock2])
    memdense.convert(model)
    assert "blocks.0: runs on memdense already, with features" in capsys.readouterr().err
    model.features.efficient = False
    assert stages_run(model, torch.randn(2, 3, 37, 40)) == 0
    model.features.efficient = True
    model.features.denseblock1 = peers.torchvision().features.denseblock1
    x = torch.randn(2, 8, 6, 6)
    assert stages_run(model.features.denseblock1, x) == 0
    memdense.convert(model, verbose=False)
    assert stages_run(model.features.denseblock1, x) == 1


def test_blocks_that_return_the_new_features_only(capsys: pytest.CaptureFixture) -> None:
    class Up(memdense.DenseBlock):
        def forward(self, init_features: Tensor) -> Tensor:
            return super().forward(init_features)[:, init_features.shape[1] :]

    memdense.convert(nn.ModuleList([Up(2, 8, 4, 4)]))
    said = capsys.readouterr().err
    assert "0: left alone: Up compute something else" in said and "has another shape" in said


def test_a_head_in_the_stack_and_images_in_channels_last() -> None:
    found, plain = pair("sequential")
    assert_same_step(found, plain, images().to(memory_format=torch.channels_last))
