"""explain against what really runs."""

import copy
import math
import warnings
from collections import OrderedDict
from unittest import mock

import peers
import pytest
import torch
from exactness import no_warnings
from torch import nn

import memdense
from memdense import MemdenseWarning, _extension, ops
from memdense.convert import ONE_BY_ONE
from memdense.explain import Row, size_after


def converted() -> nn.Module:
    return memdense.convert(peers.torchvision(), verbose=False)


def parts(model: nn.Module) -> dict[str, object]:
    return {row.modules[0]: row for row in memdense.explain(model).rows}


def test_rows_of_an_efficient_model():
    model = converted()
    rows = memdense.explain(model).rows
    assert [row.modules for row in rows] == [
        ("conv0", "norm0", "relu0", "pool0"),
        ("denseblock1", "transition1"),
        ("denseblock2", "norm5"),
    ]
    assert [row.layers for row in rows] == [0, 2, 3]
    backend = ops.backend_for(torch.device("cpu")).name
    for row in (*rows, *memdense.explain(model.bfloat16()).rows):
        assert (row.stack, row.path, row.backend, row.why) == ("features", "efficient", backend, "")
    narrow = memdense.explain(model.half()).rows
    assert {row.backend for row in narrow} == {"reference"}


def test_rows_say_what_runs():
    """Each efficient row is one operation, each other none."""
    model = converted()
    model.features.denseblock1.denselayer1.conv1.register_forward_pre_hook(lambda *_: None)
    model.features.denseblock2.register_forward_hook(lambda *_: None)
    rows = parts(model)
    assert {name: row.efficient for name, row in rows.items()} == {
        "conv0": True,
        "denseblock1": False,
        "transition1": True,
        "denseblock2": True,
        "norm5": True,
    }
    with (
        mock.patch.object(ops, "run_stage", side_effect=ops.run_stage) as stages,
        mock.patch.object(ops, "run_stem", side_effect=ops.run_stem) as stems,
        pytest.warns(MemdenseWarning) as caught,
    ):
        model(torch.randn(2, 3, 32, 32))
    assert (stems.call_count, stages.call_count) == (1, 3)
    assert [str(w.message).endswith(rows["denseblock1"].why) for w in caught] == [True]


def spoil_hook(features: nn.Module) -> None:
    features.denseblock1.denselayer2.register_full_backward_hook(lambda *_: None)


def spoil_norm(features: nn.Module) -> None:
    features.denseblock1.denselayer2.norm2 = nn.GroupNorm(2, 16)


def spoil_forward(features: nn.Module) -> None:
    features.denseblock1.forward = features.denseblock1.forward


def spoil_tail(features: nn.Module) -> None:
    features.transition1.register_forward_hook(lambda *_: None)


def spoil_conv(features: nn.Module) -> None:
    features.denseblock1.denselayer1.conv1 = nn.utils.parametrizations.weight_norm(
        features.denseblock1.denselayer1.conv1
    )


def spoil_class(features: nn.Module) -> None:
    features.denseblock1 = peers.PrevBlock(2, 8, 4)


@pytest.mark.parametrize(
    "spoil", [spoil_hook, spoil_norm, spoil_forward, spoil_tail, spoil_conv, spoil_class]
)
def test_reason_is_the_warnings(spoil):
    model = converted()
    spoil(model.features)
    ((name, why),) = ((name, row.why) for name, row in parts(model).items() if row.why)
    assert name == ("transition1" if spoil is spoil_tail else "denseblock1")
    with pytest.warns(MemdenseWarning) as caught:
        model(torch.randn(2, 3, 32, 32))
    said = [str(w.message) for w in caught]
    assert said == [f"memdense runs {name} as plain modules: {why}"]


@pytest.mark.parametrize("eps", [-1.0, 0.0])
def test_an_eps_that_is_not_positive_is_left_to_the_modules(eps):
    model = converted()
    model.features.denseblock1.denselayer1.norm1.eps = eps
    why = f"denseblock1.denselayer1.norm1 has an eps that is not positive and finite, {eps}"
    assert parts(model)["denseblock1"].why == why
    with (
        pytest.warns(MemdenseWarning, match=why),
        pytest.raises(ValueError, match="batch_norm eps must be"),
    ):
        model(torch.randn(2, 3, 32, 32))


@pytest.mark.parametrize("eps", [math.inf, math.nan])
def test_an_eps_that_is_not_finite_is_left_to_the_modules(eps):
    model, x = converted().eval(), torch.randn(2, 3, 32, 32)
    model.features.denseblock1.denselayer1.norm1.eps = eps
    with pytest.warns(MemdenseWarning, match=f"an eps that is not positive and finite, {eps}"):
        found = model(x)
    model.features.efficient = False
    torch.testing.assert_close(found, model(x), equal_nan=True)


@pytest.mark.parametrize("momentum", [-0.5, math.nan])
def test_a_momentum_below_0_is_left_to_the_modules(momentum):
    model = converted()
    model.features.denseblock1.denselayer1.norm1.momentum = momentum
    why = f"denseblock1.denselayer1.norm1 has a momentum that is not 0 or more, {momentum}"
    assert parts(model)["denseblock1"].why == why
    assert not parts(model.eval())["denseblock1"].why


def test_global_hook_reaches_everything():
    model = converted()
    with nn.modules.module.register_module_forward_hook(lambda *_: None):
        rows = memdense.explain(model).rows
    assert {row.why for row in rows} == {"a global forward hook is registered"}


def test_unconverted_models():
    model = peers.torchvision()
    found = memdense.explain(model)
    assert {(row.path, row.why) for row in found.rows} == {("plain modules", "not converted")}
    assert "features: memdense.convert converts it, if its check passes" in found.notes
    assert type(model.features) is nn.Sequential
    found = memdense.explain(peers.monai(1))
    why = "denseblock1.denselayer1.layers.norm1 is a BatchNorm1d, not a BatchNorm2d or BatchNorm3d"
    assert why in [row.why for row in found.rows]
    assert f"features: memdense.convert leaves it alone: {why}" in found.notes


def test_container_of_another_kind():
    stack = nn.ModuleDict(OrderedDict(peers.GpleissStyle().features.named_children()))
    stack.register_module("nothing", None)
    model = memdense.explain(stack)
    assert all(not row.efficient for row in model.rows)
    assert any("it is a ModuleDict, not an nn.Sequential" in note for note in model.notes)


def test_switches_and_switched_off():
    model = memdense.DenseNet(4, (2, 2), 8, keep_bottlenecks=True, recompute_stem=True)
    assert [r.switches for r in memdense.explain(model).rows] == [
        ("recompute_stem",),
        ("keep_bottlenecks",),
        ("keep_bottlenecks",),
    ]
    model.features.efficient = False
    rows = memdense.explain(model).rows
    assert {(r.efficient, r.backend, r.switches, r.why) for r in rows} == {
        (False, "", (), "switched off: efficient is False")
    }


def test_table():
    model = converted()
    model.features.denseblock2.denselayer1.register_forward_hook(lambda *_: None)
    backend = ops.backend_for(torch.device("cpu")).name
    lines = str(memdense.explain(model)).splitlines()
    assert repr(memdense.explain(model)).splitlines() == lines
    assert lines[1].split() == [
        "conv0",
        "..",
        "pool0",
        "-",
        "efficient",
        backend,
        "recompute_stem",
        "-",
    ]
    assert lines[3].endswith("denseblock2.denselayer1 carries a forward hook")
    paths = "eff", "eff", "plain", "eff"
    columns = {line.find(word) for line, word in zip(lines[1:5], paths, strict=True)}
    assert columns == {lines[0].find("path")}
    assert lines[5] == "" and lines[6] == "features: training mode, cpu float32"
    assert not any(line != line.rstrip() for line in lines)


def test_several_stacks_are_told_apart():
    model = nn.ModuleDict({"a": converted(), "b": peers.GpleissStyle()})
    found = memdense.explain(model)
    assert [row.stack for row in found.rows] == ["a.features"] * 3 + ["b.features"] * 3
    assert "a.features: conv0 .. pool0" in str(found) and "b.features: conv0 " in str(found)


def test_notes_on_the_machine(monkeypatch):
    model = converted()
    instructions = _extension.instructions()
    extension = f"available, {instructions}" if instructions else _extension.reason()
    assert f"compiled extension: {extension}" in memdense.explain(model).notes
    monkeypatch.setattr(_extension, "_reason", "not built: no compiler")
    assert "compiled extension: not built: no compiler" in memdense.explain(model).notes


def test_notes_on_a_stack():
    """Its mode and its parameters, and what is the matter with volumes."""
    model = converted().eval()
    model.features.norm0.double()
    note = "features: evaluation mode, cpu float32 and cpu float64"
    assert note in memdense.explain(model).notes
    found = memdense.explain(memdense.convert(peers.monai(3), verbose=False))
    by_planes = any("of volumes: kernels take their planes" in note for note in found.notes)
    assert by_planes == (found.rows[0].backend != "reference")


def test_notes_on_an_input():
    model = converted()

    def notes(x: torch.Tensor) -> list[str]:
        without = memdense.explain(model).notes
        return [n for n in memdense.explain(model, x).notes if n not in without]

    assert notes(torch.randn(2, 3, 32, 32)) == []
    for x, why in (
        (torch.randn(0, 3, 32, 32), "torch.float32 of shape (0, 3, 32, 32)"),
        (torch.ones(1, 3, 32, 32).long(), "torch.int64 of shape (1, 3, 32, 32)"),
        (torch.ones(1, 3, 32, 32).to_sparse(), "a tensor of layout torch.sparse_coo"),
    ):
        assert notes(x) == [f"features: with this input all run as plain modules: {why}"]
    backend = ops.backend_for(torch.device("cpu")).name
    for dtype, name in ((torch.bfloat16, backend), (torch.float16, "reference")):
        with torch.autocast("cpu", dtype=dtype):
            (note,) = notes(torch.randn(2, 3, 32, 32))
        assert note == f"features: under autocast, in {dtype}, by the {name} backend"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        tail = memdense.explain(model.features[4:], torch.randn(2, 6, 8, 8))
        why = "denseblock1 and transition1 run as plain modules: autocast convolves"
        assert any(why in note for note in tail.notes)
        assert not any("denseblock2" in note for note in tail.notes)
    small = torch.randn(1, 3, 9, 12)
    assert notes(small) == [
        "features: denseblock2 gets one value per channel, which BatchNorm refuses in training"
    ]
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        model(small)
    model.eval()
    assert notes(small) == []
    model(small)


@pytest.mark.parametrize("name", ["volumes", "Identity", "convolution", "blocks"])
def test_what_autocast_has_run_as_modules(name):
    """All that the run warns of, and nothing else, as far as it is known what comes in."""
    block, x = memdense.DenseBlock(2, 6, 2, 4), torch.randn(2, 6, 8, 8)
    if name == "volumes":
        model = memdense.convert(peers.monai(3), verbose=False)
        x = torch.randn(2, 3, 32, 32, 32)
    elif name == "Identity":
        model = memdense.Features(nn.Identity(), block, memdense.Transition(14, 6))
    elif name == "blocks":
        model = memdense.Features(block, memdense.DenseBlock(2, 14, 2, 4))
    else:
        model = memdense.Features(nn.Conv2d(6, 6, 1), block, memdense.Transition(14, 6))
    with torch.autocast("cpu", torch.bfloat16), warnings.catch_warnings(record=True) as caught:
        notes = memdense.explain(model, x).notes
        model(x)
    said = {str(w.message).rpartition(": ")[2] for w in caught}
    assert {n.rpartition(": ")[2] for n in notes if "as plain modules: " in n} == said
    assert bool(said) == (name != "convolution")
    if name == "blocks":
        assert sum("as plain modules: " in n for n in notes) == 2


def test_modules_between_parts_are_one_row():
    block = memdense.DenseBlock(2, 6, 2, 4)
    found = memdense.explain(memdense.Features(nn.Conv2d(3, 6, 1), nn.ReLU(), block))
    between, efficient = found.rows
    assert between.modules == ("0", "1") and efficient.modules == ("2",)
    assert not between.efficient and efficient.efficient
    assert between.why == "neither a dense block nor a stem of one convolution"


def test_a_block_and_nothing_else_is_converted(capsys):
    found = memdense.explain(memdense.convert(peers.PrevBlock(2, 8, 4)))
    assert ONE_BY_ONE not in capsys.readouterr().err
    assert found.rows[0].efficient
    assert not any("memdense.convert" in note for note in found.notes)


def test_blocks_that_run_alone_are_parts_of_their_own():
    class Own(nn.Sequential):
        def forward(self, x):
            for child in self:
                x = child(x)
            return x

    model = memdense.convert(Own(*peers.torchvision().features), verbose=False)
    rows = [row for row in memdense.explain(model).rows if row.layers]
    assert rows and all(row.efficient and len(row.modules) == 1 for row in rows)
    block = next(child for child in model if hasattr(child, "_switches"))
    layer = next(block.children())
    layer.__class__ = type("Mine", (type(layer),), {})
    why = [row.why for row in memdense.explain(model).rows if row.layers]
    assert "Mine" in why[0] and not any(why[1:])


def test_notes_end_where_sizes_are_not_known():
    blocks = memdense.DenseBlock(2, 6, 2, 4), memdense.DenseBlock(2, 14, 2, 4)
    model = memdense.Features(blocks[0], nn.Upsample(scale_factor=2), blocks[1])
    notes = memdense.explain(model, torch.randn(1, 6, 1, 1)).notes
    assert sum("one value per channel" in n for n in notes) == 1
    model.efficient = False
    notes = memdense.explain(model, torch.randn(1, 6, 1, 1)).notes
    assert not any("one value" in n or "with this input" in n for n in notes)


@pytest.mark.parametrize("options", [{"dilation": 2}, {"padding": 2, "stride": (1, 3)}], ids=str)
def test_sizes_behind_a_convolution(options):
    conv = nn.Conv2d(3, 4, 3, **options)
    assert size_after(conv, (16, 15)) == conv(torch.randn(1, 3, 16, 15)).shape[2:]
    assert size_after(nn.Conv2d(3, 4, 3, padding="same"), (16, 15)) is None
    assert size_after(nn.MaxPool2d(3, 2, 1, ceil_mode=True), (16, 15)) is None


def test_a_transform_is_named_and_warned_of_later():
    model, x = converted().eval(), torch.randn(2, 3, 32, 32)
    with torch.autograd.forward_ad.dual_level():
        with no_warnings():
            notes = memdense.explain(model, x).notes
        assert any("torch.func's transforms and forward-mode AD" in note for note in notes)
        with pytest.warns(MemdenseWarning, match="forward-mode AD"):
            model(torch.autograd.forward_ad.make_dual(x, x))


def test_forward_replaced_on_the_stack():
    model = converted()
    model.features.forward = lambda x: x
    rows = memdense.explain(model).rows
    assert not any(row.efficient for row in rows)
    assert {row.why for row in rows} == {"the stack's forward was replaced on the instance"}


@pytest.mark.parametrize("build", [peers.torchvision, converted])
def test_changes_and_runs_nothing(build):
    model = build()
    state, rng = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    before = {name: (type(m), set(m.__dict__)) for name, m in model.named_modules()}
    model.features.denseblock1.register_forward_hook(lambda *_: pytest.fail("it ran"))
    with no_warnings():
        memdense.explain(model, torch.zeros(1, 3, 32, 32))
    assert {name: (type(m), set(m.__dict__)) for name, m in model.named_modules()} == before
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), rng)
    assert type(model.features) is nn.Sequential or not model.features._switches.said


def test_who_calls_children_one_by_one_is_told(capsys):
    memdense.convert(model := peers.torchvision())
    note = f"features: {ONE_BY_ONE}"
    assert note in memdense.explain(model).notes
    assert ONE_BY_ONE in capsys.readouterr().err
    assert note not in memdense.explain(memdense.DenseNet(4, (2, 2), 8)).notes


def test_errors():
    with pytest.raises(ValueError, match="found no DenseNet feature stack in Linear"):
        memdense.explain(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"expected an nn\.Module, but got str"):
        memdense.explain("densenet121")
    with pytest.raises(TypeError, match="expected input to be a Tensor, but got int"):
        memdense.explain(memdense.DenseNet(4, (2, 2), 8), 3)


def test_a_block_that_follows_other_switches():
    """One that was converted by itself runs in a stack that does not know its class."""
    model = memdense.DenseNet(4, (2, 2), 8, small_inputs=True)
    model.features.denseblock1 = memdense.convert(peers.GpleissStyle().features.denseblock1)
    block = model.features.denseblock1
    block._switches.keep_bottlenecks = True

    def row() -> Row:
        rows = {row.modules: row for row in memdense.explain(model).rows}
        return rows["denseblock1",]

    assert row().efficient and row().switches == ("keep_bottlenecks",)
    with no_warnings():
        model(torch.randn(2, 3, 8, 8))
    block._switches.efficient = False
    assert not row().efficient and row().why == "switched off: efficient is False"
