"""Converted models of other projects against unconverted copies of themselves, in float64."""

import copy
import io
import math
import pickle
import random
from collections import OrderedDict
from collections.abc import Callable

import peers
import pytest
import torch
import torchvision
from exactness import answered, assert_close, assert_same_step, no_warnings, randomise
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune

import memdense
from memdense import Features, MemdenseWarning
from memdense.features import RunsAlone
from memdense.memory import saved_bytes


def images(*shape: int) -> Tensor:
    return torch.randn(shape or (3, 3, 17, 20), dtype=torch.float64)


def prepared(build: Callable[[], nn.Module]) -> nn.Module:
    model = build().double()
    randomise(model, torch.Generator().manual_seed(1))
    return model


def pair(build: Callable[[], nn.Module], **kwargs: bool) -> tuple[nn.Module, nn.Module]:
    """A converted model and an unconverted copy."""
    plain = prepared(build)
    return memdense.convert(copy.deepcopy(plain), verbose=False, **kwargs), plain


def freeze_some(model: nn.Module) -> None:
    chosen = random.Random(2)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and chosen.random() < 0.5:
            module.eval()
    for parameter in model.parameters():
        parameter.requires_grad_(chosen.random() < 0.7)


def stack_of(model: nn.Module) -> nn.Module:
    return getattr(model, "features", model)


def runs_efficiently(model: nn.Module) -> bool:
    """Whether all blocks run efficiently now."""
    rows = memdense.explain(model).rows
    return all(row.efficient for row in rows if row.layers)


def twice(model: nn.Module, x: Tensor) -> Tensor:
    first, second = model(x), model(0.5 * x.flip(0))
    (first.square().sum() + second.sin().sum()).backward()
    return torch.cat([first, second])


peer = pytest.mark.parametrize("build", peers.PEERS.values(), ids=peers.PEERS)


@peer
def test_parameters_and_names_stay(build):
    model = build()
    features, children = stack_of(model), dict(model.named_modules())
    before = {name: t.data_ptr() for name, t in model.state_dict(keep_vars=True).items()}
    assert memdense.convert(model, verbose=False) is model
    after = {name: t.data_ptr() for name, t in model.state_dict(keep_vars=True).items()}
    assert list(after) == list(before) and after == before
    assert dict(model.named_modules()) == children
    assert type(features) is Features and stack_of(model) is features
    assert runs_efficiently(model)


@peer
@pytest.mark.parametrize("mode", ["train", "eval", "frozen", "twice"])
def test_same_numbers(build, mode):
    converted, plain = pair(build)
    for model in (converted, plain):
        model.train(mode != "eval")
        if mode == "frozen":
            freeze_some(model)
    with no_warnings(MemdenseWarning):
        assert_same_step(converted, plain, images(), twice if mode == "twice" else answered)
    assert runs_efficiently(converted)


@pytest.mark.parametrize("switch", ["keep_bottlenecks", "recompute_stem", "double_backward"])
def test_switches(switch):
    converted, plain = pair(peers.torchvision, **{switch: True})
    assert getattr(converted.features, switch)
    assert_same_step(converted, plain, images())


@pytest.mark.parametrize("drop", [nn.Dropout(0.4), nn.Dropout2d(1.0), nn.Dropout2d(0)], ids=str)
def test_dropout_of_the_layers_own(drop):
    build = peers.PEERS["monai, dropout"]
    converted, plain = pair(lambda: replaced(nn.Dropout2d, lambda _: copy.copy(drop), build))
    assert_same_step(converted, plain, images())
    assert runs_efficiently(converted)


def test_dropout_alone_in_training():
    """Draws of a network whose predictions vary, as Monte Carlo dropout makes them."""
    converted, plain = pair(peers.PEERS["monai, dropout"])
    for model in (converted.eval(), plain.eval()):
        for module in model.modules():
            module.train(isinstance(module, nn.Dropout2d))
    assert_same_step(converted, plain, images())
    assert runs_efficiently(converted)
    next(m for m in converted.modules() if isinstance(m, nn.Dropout2d)).p = 0.5
    with pytest.warns(MemdenseWarning, match="layers of different dropout"):
        converted(images())
    for module in converted.modules():
        if isinstance(module, nn.Dropout2d):
            module.p = 1.5
    with (
        pytest.warns(MemdenseWarning, match=r"p that is no probability, 1\.5"),
        pytest.raises(ValueError, match="between 0 and 1"),
    ):
        converted(images())


def test_channels_last():
    converted, plain = pair(peers.torchvision)
    assert_same_step(converted, plain, images().to(memory_format=torch.channels_last))


@pytest.mark.parametrize(
    ("efficient", "plain"),
    [
        (lambda: peers.torchvision(memory_efficient=True), peers.torchvision),
        (lambda: peers.GpleissStyle(efficient=True), peers.GpleissStyle),
    ],
    ids=["torchvision", "gpleiss"],
)
def test_instead_of_checkpoints(efficient, plain):
    # checkpoints move running statistics twice a step: the plain model is the reference
    converted, expected = memdense.convert(efficient().double(), verbose=False), plain().double()
    expected.load_state_dict(converted.state_dict())
    assert_same_step(converted, expected, images())


def test_training_step_with_an_existing_optimizer():
    expected = prepared(peers.torchvision)
    model = copy.deepcopy(expected)
    optimizers = [torch.optim.SGD(m.parameters(), 0.1, momentum=0.9) for m in (model, expected)]
    memdense.convert(model, verbose=False)
    for _ in range(2):
        x, labels = images(), torch.tensor([0, 3, 1])
        for m, optimizer in zip((model, expected), optimizers, strict=True):
            optimizer.zero_grad()
            F.cross_entropy(m(x), labels).backward()
            optimizer.step()
    for name, tensor in expected.state_dict().items():
        assert_close(name, model.state_dict()[name].double(), tensor.double(), 1.0)


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("build", [peers.torchvision, peers.monai, peers.GpleissStyle])
def test_copies_are_converted_too(build, way):
    converted, plain = pair(build, keep_bottlenecks=True)
    if way == "deepcopy":
        other = copy.deepcopy(converted)
    elif way == "pickle":
        other = pickle.loads(pickle.dumps(converted))
    else:
        file = io.BytesIO()
        torch.save(converted, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    assert runs_efficiently(other) and other.features.keep_bottlenecks
    assert_same_step(other, plain, images())


def test_saves_memory():
    converted, plain = pair(peers.torchvision)
    x = images(2, 3, 48, 48)
    saved = [saved_bytes(m, x, exclude=(m, x)) for m in (converted, plain)]
    assert saved[0] < saved[1] / 2


# ---- hooks


def test_hook_inside_runs_that_block_as_modules_with_one_warning():
    converted, plain = pair(peers.torchvision)
    seen: list[int] = []
    for model in (converted, plain):
        layer = model.features.denseblock2.denselayer2
        layer.norm2.register_forward_hook(lambda *_: seen.append(1))
    with pytest.warns(MemdenseWarning) as caught:
        assert_same_step(converted, plain, images())
    assert len(caught) == 1
    said = str(caught[0].message)
    assert "denseblock2.denselayer2.norm2 carries a forward hook" in said
    assert len(seen) == 2
    with no_warnings():
        converted(images())
    reasons = [row.why for row in memdense.explain(converted).rows if row.why]
    assert len(reasons) == 1 and reasons[0] in said


def test_hooks_on_the_stack_stay():
    model = peers.torchvision()
    shapes = []
    handle = model.features.register_forward_hook(lambda *a: shapes.append(a[2].shape))
    model.eval()
    memdense.convert(model, verbose=False)
    model(torch.randn(1, 3, 32, 32))
    assert shapes == [(1, 20, 4, 4)] and not model.features.training
    handle.remove()
    model(torch.randn(1, 3, 32, 32))
    assert len(shapes) == 1


def test_conversion_tells_of_blocks_that_it_cannot_run(capsys):
    model = peers.torchvision()
    model.features.denseblock1.denselayer1.register_forward_hook(lambda *_: None)
    memdense.convert(model)
    report = capsys.readouterr().err
    assert "features: converted" in report
    why = "denseblock1 as plain modules for now: denseblock1.denselayer1 carries a"
    assert why in report
    memdense.convert(model)
    assert why in capsys.readouterr().err


def test_a_hook_inside_timms_norms_runs():
    model, calls = peers.timm(), []
    memdense.convert(model, verbose=False)
    for name, block in (("drop", 1), ("act", 2)):
        norm = model.features.get_submodule(f"denseblock{block}.denselayer1.norm1")
        getattr(norm, name).register_forward_hook(lambda *_: calls.append(1))
    with pytest.warns(MemdenseWarning, match=r"norm1\.(drop|act) carries a forward hook"):
        model(torch.randn(2, 3, 32, 32))
    assert len(calls) == 2


# ---- the check leaves no trace


def test_check_leaves_no_trace():
    model = peers.torchvision(drop_rate=0.3)
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    calls = []
    model.features.norm5.register_forward_hook(lambda *_: calls.append(1))
    model.features.norm0.eval()
    state = copy.deepcopy(model.state_dict())
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    modes = {name: m.training for name, m in model.named_modules()}
    rng = torch.get_rng_state()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16), torch.device("meta"):
        memdense.convert(model, verbose=False)
    assert type(model.features) is Features
    assert torch.equal(torch.get_rng_state(), rng) and not calls
    assert modes == {name: m.training for name, m in model.named_modules()}
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    assert all(torch.equal(p.grad, grads[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("change", ["bfloat16", "meta", "zeros"])
def test_check_looks_at_code_and_not_at_weights(change):
    model = peers.torchvision()
    if change == "zeros":
        for parameter in model.parameters():
            nn.init.zeros_(parameter)
    else:
        model.to("meta" if change == "meta" else torch.bfloat16)
    assert type(memdense.convert(model, verbose=False).features) is Features


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
def test_check_of_scripted_modules():
    """Copies of their own, as the others'."""
    model = peers.torchvision()
    layer = model.features.denseblock1.denselayer1
    layer.norm2, layer.conv2 = torch.jit.script(layer.norm2), torch.jit.script(layer.conv2)
    before = [t.clone() for t in (*model.parameters(), *model.buffers())]
    memdense.convert(model, verbose=False)
    assert type(model.features) is Features
    assert all(p.grad is None for p in model.parameters())
    assert all(map(torch.equal, before, (*model.parameters(), *model.buffers())))


def test_check_of_volumes_that_synchronise():
    model = nn.SyncBatchNorm.convert_sync_batchnorm(peers.monai(3))
    assert type(memdense.convert(model, verbose=False).features) is Features
    assert type(model.features.norm0) is nn.SyncBatchNorm


def test_check_needs_no_size_that_fits_the_head():
    model = nn.Sequential(*peers.torchvision().features, nn.Flatten(), nn.Linear(20 * 7 * 7, 2))
    memdense.convert(model, verbose=False)
    assert type(model) is Features and model(torch.randn(2, 3, 56, 56)).shape == (2, 2)


# ---- look-alikes


class Weaker(peers.PrevLayer):
    def forward(self, *features: Tensor) -> Tensor:
        return 0.5 * super().forward(*features)


class Scaled(peers.PrevLayer):
    def __init__(self, *args: object) -> None:
        super().__init__(*args)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, *features: Tensor) -> Tensor:
        return self.scale * super().forward(*features)


class Detached(peers.PrevLayer):
    def forward(self, *features: Tensor) -> Tensor:
        return super().forward(*features[:-1], features[-1].detach())


class OnlyInTraining(peers.PrevLayer):
    def forward(self, *features: Tensor) -> Tensor:
        new = super().forward(*features)
        return new if not self.training else new.clamp(max=1)


class OtherDropout(peers.PrevLayer):
    def forward(self, *features: Tensor) -> Tensor:
        return F.dropout(super().forward(*features), 0.2, self.training)


class NoDropout(peers.PrevLayer):
    def forward(self, *features: Tensor) -> Tensor:
        mode, self.drop_rate = self.drop_rate, 0
        new = super().forward(*features)
        self.drop_rate = mode
        return new


class OtherStatistics(peers.PrevLayer):
    def forward(self, *features: Tensor) -> Tensor:
        before = [(buffer, buffer.clone()) for buffer in self.buffers()]
        new = super().forward(*features)
        for buffer, value in before:
            buffer.data.copy_(value)
        return new


class NaN(peers.PrevLayer):
    def forward(self, *features: Tensor) -> Tensor:
        return math.nan * super().forward(*features)


class Remembers(peers.PrevLayer):
    def forward(self, *features: Tensor) -> Tensor:
        self.last = super().forward(*features)
        return self.last


class Collects(peers.PrevLayer):
    def __init__(self, *args: object) -> None:
        super().__init__(*args)
        self.seen: list[Tensor] = []

    def forward(self, *features: Tensor) -> Tensor:
        new = super().forward(*features)
        self.seen.append(new.detach())
        return new


class Reversed(peers.PrevBlock):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).flip(1)


class Failing(peers.PrevBlock):
    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == torch.float64:
            raise RuntimeError("no doubles here")
        return super().forward(x)


class ConvolvesFirst(peers.PrevTransition):
    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.relu(self.conv(self.norm(x))))


def alike(part: type[nn.Module]) -> nn.Module:
    if issubclass(part, peers.PrevLayer):
        block = type("Block", (peers.PrevBlock,), {"layer": part})
        model = type("Alike", (peers.GpleissStyle,), {"block": block})
    elif issubclass(part, peers.PrevBlock):
        model = type("Alike", (peers.GpleissStyle,), {"block": part})
    else:
        model = type("Alike", (peers.GpleissStyle,), {"transition": part})
    return model(drop_rate=0.3 if part is NoDropout else 0)


@pytest.mark.parametrize(
    ("part", "reason"),
    [
        (Weaker, "the output in evaluation mode differs by"),
        (Scaled, "the output in evaluation mode differs by"),
        (Detached, "the gradient of"),
        (OnlyInTraining, "the output in training mode differs by"),
        (OtherDropout, "the output in training mode differs by"),
        (NoDropout, "the output in training mode differs by"),
        (OtherStatistics, "the buffer denseblock1.denselayer1.norm1.running_mean differs by"),
        (NaN, "the output in evaluation mode differs by nan"),
        (Remembers, "denseblock1.denselayer1 changes its attribute last"),
        (Collects, "denseblock1.denselayer1 changes its attribute seen"),
        (Reversed, "the output in evaluation mode differs by"),
        (ConvolvesFirst, "the output in evaluation mode differs by"),
        (Failing, "checking it raised RuntimeError: no doubles here"),
    ],
)
def test_look_alikes_are_refused(part, reason, capsys):
    model = alike(part)
    assert memdense.convert(model) is model
    assert type(model.features) is nn.Sequential
    report = capsys.readouterr().err
    assert "features: left alone: " in report and reason in report
    assert part is Failing or part.__name__ in report
    with pytest.warns(MemdenseWarning, match=reason):
        memdense.convert(model, verbose=False)
    # without the check, looks decide
    memdense.convert(model, check=False)
    assert "unchecked" in capsys.readouterr().err and type(model.features) is Features


class Keeps(peers.PrevLayer):
    """Things of its own that do not change."""

    def __init__(self, *args: object) -> None:
        super().__init__(*args)
        self.gain, self.sizes, self.notes = torch.tensor(1.0), [1, 2], {"a": object()}


def test_attributes_that_stay():
    plain = alike(Keeps).double()
    converted = memdense.convert(copy.deepcopy(plain))
    assert type(converted.features) is Features and runs_efficiently(converted)
    assert_same_step(converted, plain, images())


def replaced(
    old: type[nn.Module],
    new: Callable[[nn.Module], nn.Module],
    build: Callable[[], nn.Module] = peers.torchvision,
) -> nn.Module:
    model = build()
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, old):
                setattr(parent, name, new(child))
    return model


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (
            lambda: replaced(nn.BatchNorm2d, lambda m: nn.GroupNorm(2, m.num_features)),
            "denseblock1.denselayer1.norm1 is a GroupNorm, not a BatchNorm2d",
        ),
        (
            lambda: replaced(nn.ReLU, lambda _: nn.ELU()),
            "denseblock1.denselayer1.relu1 is an ELU, not a ReLU",
        ),
        (
            lambda: peers.monai(1),
            "denseblock1.denselayer1.layers.norm1 is a BatchNorm1d, not a BatchNorm2d",
        ),
        (
            lambda: replaced(
                nn.Dropout2d, lambda _: nn.AlphaDropout(), peers.PEERS["monai, dropout"]
            ),
            "denseblock1.denselayer1.layers.dropout is an AlphaDropout, not a Dropout, Dropout2d",
        ),
        (lambda: peers.monai(act="prelu"), "relu1 is a PReLU, not a ReLU"),
    ],
    ids=["GroupNorm", "ELU", "1-D", "AlphaDropout", "PReLU"],
)
def test_other_architectures_are_left_alone(build, reason):
    model = build()
    before = dict(model.named_modules())
    with pytest.warns(MemdenseWarning, match=reason):
        memdense.convert(model, verbose=False)
    assert dict(model.named_modules()) == before and type(model.features) is nn.Sequential


def test_one_odd_block_does_not_keep_the_others_back(capsys):
    plain = prepared(peers.torchvision)
    plain.features.denseblock1.denselayer2.se = nn.Identity()
    converted = memdense.convert(copy.deepcopy(plain))
    assert "denseblock1 as plain modules for now" in capsys.readouterr().err
    with pytest.warns(MemdenseWarning, match="denseblock1.denselayer2 has the children"):
        assert_same_step(converted, plain, images())


@pytest.mark.parametrize(
    "change",
    [
        lambda conv: prune.l1_unstructured(conv, "weight", 0.3),
        nn.utils.weight_norm,
        nn.utils.parametrizations.weight_norm,
    ],
    ids=["pruned", "weight_norm", "parametrized"],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_computed_weights_keep_only_their_block_back(change, capsys):
    plain = prepared(peers.torchvision)
    converted = copy.deepcopy(plain)
    for model in (converted, plain):
        change(model.features.denseblock2.denselayer1.conv1)
    memdense.convert(converted)
    said = capsys.readouterr().err
    assert "features: converted;" in said and "denseblock2 as plain modules for now" in said
    with pytest.warns(MemdenseWarning, match="runs denseblock2 as plain"):
        assert_same_step(converted, plain, images())


def test_the_oddity_is_named_and_not_the_class(capsys):
    plain = prepared(peers.torchvision)
    for name in ("transition1", "transition2"):
        if hasattr(plain.features, name):
            getattr(plain.features, name).pool = nn.MaxPool2d(2)
    memdense.convert(plain)
    assert "transition1.pool is a MaxPool2d, not an AvgPool2d" in capsys.readouterr().err


def test_grey_images_by_the_weight():
    plain = prepared(peers.torchvision)
    conv = plain.features.conv0
    conv.weight = nn.Parameter(conv.weight.sum(1, keepdim=True))
    converted = memdense.convert(copy.deepcopy(plain), verbose=False)
    assert runs_efficiently(converted)
    assert_same_step(converted, plain, images(3, 1, 17, 20))


def test_class_that_never_ran_is_not_trusted_later():
    model = peers.GpleissStyle()
    other = model.features.denseblock2.denselayer2
    other.__class__ = Weaker
    other.relu2 = nn.ELU()
    memdense.convert(model, verbose=False)
    other.relu2 = nn.ReLU()
    with pytest.warns(MemdenseWarning, match="denseblock2.denselayer2 is a Weaker, not a dense"):
        model(torch.randn(2, 3, 8, 8))


# ---- where stacks are found


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left = nn.ModuleDict({"net": peers.torchvision()})
        self.right = peers.GpleissStyle()
        self.other = nn.Conv2d(3, 5, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.left["net"](x) * self.right(x) + self.other(x).mean((2, 3))


def test_several_inside_a_bigger_model(capsys):
    plain = prepared(Two)
    converted = memdense.convert(copy.deepcopy(plain))
    report = capsys.readouterr().err
    assert "left.net.features: converted" in report and "right.features: converted" in report
    assert_same_step(converted, plain, images())


@pytest.mark.parametrize("wrap", [lambda m: m, nn.Sequential], ids=["bare", "wrapped"])
def test_stack_without_a_model(wrap):
    plain = wrap(prepared(peers.torchvision).features)
    model = copy.deepcopy(plain)
    assert memdense.convert(model, verbose=False) is model
    assert runs_efficiently(model)
    assert_same_step(model, plain, images())


def test_stack_that_two_parents_share():
    model = nn.ModuleList([peers.torchvision(), peers.torchvision()])
    model[1].features = model[0].features
    memdense.convert(model, verbose=False)
    assert type(model[0].features) is Features and model[1].features is model[0].features


def test_data_parallel():
    model, plain = prepared(peers.torchvision), prepared(peers.torchvision)
    plain.load_state_dict(model.state_dict())
    wrapped = memdense.convert(nn.DataParallel(model), verbose=False)
    assert type(wrapped.module.features) is Features
    assert_same_step(wrapped.module, plain, images())


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_distributed(tmp_path):
    plain = prepared(peers.torchvision)
    inner = copy.deepcopy(plain)
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        wrapped = memdense.convert(nn.parallel.DistributedDataParallel(inner), verbose=False)
        assert type(inner.features) is Features
        assert_same_step(
            inner, plain, images(), lambda m, x: answered(m if m is plain else wrapped, x)
        )
    finally:
        torch.distributed.destroy_process_group()


def test_compiled_before():
    ran: set[str] = set()

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., object]:
        ran.update(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    plain = prepared(peers.torchvision)
    inner = copy.deepcopy(plain)
    model = torch.compile(inner, backend=backend)
    x = images(2, 3, 16, 16)
    answered(model, x)
    inner.load_state_dict(plain.state_dict())
    assert ran and not any("memdense" in name for name in ran)
    memdense.convert(model, verbose=False)
    assert type(inner.features) is Features
    assert_same_step(inner, plain, x, lambda m, x: answered(model if m is inner else m, x))
    assert any("memdense" in name for name in ran)


def test_twice_is_once(capsys):
    model = memdense.convert(peers.torchvision(), verbose=False, keep_bottlenecks=True)
    types, features = model.features._switches.types, model.features
    memdense.convert(model)
    assert "features: runs on memdense already" in capsys.readouterr().err
    assert (
        model.features is features
        and features._switches.types == types
        and features.keep_bottlenecks
    )
    memdense.convert(model, double_backward=True)
    assert "runs on memdense already, double_backward=True" in capsys.readouterr().err
    assert features.keep_bottlenecks and features.double_backward and features.recompute_stem


def test_new_blocks_run_alone_too():
    model = memdense.convert(peers.torchvision(), verbose=False)
    model.features.denseblock1 = peers.torchvision().features.denseblock1
    memdense.convert(model, verbose=False)
    assert isinstance(model.features.denseblock1, RunsAlone)


@pytest.mark.parametrize("own", [True, False])
def test_new_blocks_of_another_class(own, capsys):
    """In a stack that runs already they are checked, and run, or are left alone."""
    plain = memdense.DenseNet(4, (2, 2), 8, small_inputs=True, num_classes=3).double()
    given = peers.GpleissStyle() if own else alike(Weaker)
    plain.features.denseblock1 = given.features.denseblock1.double()
    converted = memdense.convert(copy.deepcopy(plain))
    said = "PrevBlock, PrevLayer converted" if own else "Block, Weaker left alone: "
    assert f"features: {said}" in capsys.readouterr().err
    assert runs_efficiently(converted) is own
    plain.features.efficient = False
    assert_same_step(converted, plain, images(2, 3, 8, 8))


def test_blocks_keep_their_switches():
    blocks = nn.ModuleList([peers.GpleissStyle().features.denseblock1])
    memdense.convert(blocks, verbose=False, keep_bottlenecks=True)
    memdense.convert(blocks, verbose=False, double_backward=True)
    assert blocks[0]._switches.keep_bottlenecks and blocks[0]._switches.double_backward


def test_own_model_is_returned_as_it_is(capsys):
    model = memdense.DenseNet(4, (2,), 8, efficient=False)
    assert memdense.convert(model) is model and not model.features.efficient
    assert "runs on memdense already, switched off" in capsys.readouterr().err


class OwnForward(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


def test_container_with_a_forward_of_its_own(capsys):
    """Only what is known of it, its blocks, is converted."""
    plain = OwnForward(OrderedDict(prepared(peers.torchvision).features.named_children()))
    stack = memdense.convert(copy.deepcopy(plain))
    said = capsys.readouterr().err
    assert "the model: it is an OwnForward, not an nn.Sequential: only dense blocks can" in said
    assert "the model.denseblock1: converted\n" in said and type(stack) is OwnForward
    assert_same_step(stack, plain, images())
    rows = {row.modules: row for row in memdense.explain(stack).rows}
    assert rows["denseblock1",].efficient and rows["denseblock2",].efficient
    assert rows["transition1",].why == rows["norm5",].why == "not converted"
    model = peers.torchvision()
    forward = model.features.forward = lambda x: x
    memdense.convert(model)
    assert "its forward was replaced on the instance: only" in capsys.readouterr().err
    assert model.features.forward is forward


def test_errors():
    with pytest.raises(ValueError, match="found no DenseNet feature stack in Conv2d"):
        memdense.convert(nn.Conv2d(3, 3, 1))
    with pytest.raises(TypeError, match=r"expected an nn\.Module, but got int"):
        memdense.convert(3)
    model = peers.torchvision().eval()
    traced = torch.jit.trace(model, torch.randn(1, 3, 32, 32))
    with pytest.raises(TypeError, match="convert it before"):
        memdense.convert(traced)
    with pytest.raises(ValueError, match="found no DenseNet feature stack in Sequential"):
        memdense.convert(nn.Sequential(traced))
    with pytest.warns(MemdenseWarning, match="the whole model as plain modules: torch.fx"):
        written = torch.fx.symbolic_trace(memdense.DenseNet(4, (2,), 8))
    with pytest.raises(TypeError, match=r"torch\.fx wrote down"):
        memdense.convert(written)


class Encoder(nn.Module):
    """A U-Net's: its forward takes what it wants from between the stack's children."""

    def __init__(self, features: nn.Sequential, sliced: bool) -> None:
        super().__init__()
        self.features, self.sliced = features, sliced

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for start, stop in ((0, 3), (3, 4), (4, 6), (6, 8), (8, 10), (10, None)):
            if self.sliced:
                x = self.features[start:stop](x)
            else:
                for module in list(self.features)[start:stop]:
                    x = module(x)
            skips.append(x.flatten(1))
        return torch.cat(skips, 1)


def test_slices_of_a_converted_stack_run_efficiently() -> None:
    plain = Encoder(
        prepared(lambda: torchvision.models.DenseNet(4, (2, 2, 2, 2), 8)).features, False
    )
    found = Encoder(memdense.convert(copy.deepcopy(plain.features), verbose=False), True)
    x = images(2, 3, 64, 64)
    assert_same_step(found, plain, x)
    kept = [saved_bytes(m, x, exclude=(m, x)) for m in (found, plain)]
    assert kept[0] < 0.4 * kept[1], kept
