"""Below float64: our error against float64 is at most 1.5 times that of PyTorch's separate
operations.
"""

from collections import defaultdict
from collections.abc import Callable

import pytest
import torch
from exactness import BACKENDS, into_of, randomise
from torch import Tensor, nn
from torch.nn import functional as F

import memdense
from memdense import _extension, engine
from memdense.backends import Native, Reference
from memdense.buffers import Geometry, NormGradient, Reader, reader
from memdense.modules import OWN_TYPES
from memdense.spec import LayerSpec, Norm, NormSpec, Stage, StageSpec, TailSpec, unflatten
from memdense.structure import read_stage

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KINDS = [Reference, Native] if _extension.available() else [Reference]
# float16 has kernels on a GPU only
EACH = [(k, d) for k in KINDS for d in DTYPES if k is Reference or d in k.dtypes]
each = pytest.mark.parametrize(
    ("kind", "dtype"), EACH, ids=[f"{k.name}-{str(d).removeprefix('torch.')}" for k, d in EACH]
)
EPS = 1e-5


def error(found: Tensor, exact: Tensor) -> float:
    return (found.double() - exact).square().mean().sqrt().item()


def assert_as_exact(name: str, ours: Tensor, theirs: Tensor, exact: Tensor) -> None:
    mine, other = error(ours, exact), error(theirs, exact)
    # where PyTorch is exact by luck: half a unit in the last place of the type
    floor = 0.5 * torch.finfo(ours.dtype).eps * exact.abs().max().item()
    assert mine <= 1.5 * max(other, floor), f"{name}: {mine:.3e} against PyTorch's {other:.3e}"


class Problem:
    """A norm in running mode before a convolution, with all pre-activations away from the kink."""

    def __init__(self, dtype: torch.dtype, channels: int, geometry: Geometry) -> None:
        g = torch.Generator().manual_seed(1)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=g, dtype=torch.float64)

        self.dtype, self.geometry, self.draw = dtype, geometry, draw
        self.gamma, self.beta, self.mean = (draw(channels).float() for _ in range(3))
        self.gamma[0], self.gamma[1] = 0, -1.5
        self.var = draw(channels).float().square() + 0.1
        # a slice of a wider buffer whose other columns would spoil everything
        self.buffer = torch.full((geometry.rows, channels + 9), torch.nan, dtype=dtype)
        self.x = self.buffer[:, 4 : 4 + channels]
        self.x.copy_(draw(geometry.rows, channels))
        z = self.norm(self.x.double(), torch.float64)
        step = torch.where(self.gamma == 0, torch.zeros(()), 0.25 * self.x.abs() + 0.25).to(dtype)
        self.x += torch.where(z.abs() < 0.02, step, torch.zeros((), dtype=dtype))
        self.beta[0] = 0.5

    def norm(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """F.batch_norm of rows (M, C), statistics and parameters in at least float32."""
        wide = torch.promote_types(dtype, torch.float32)
        vectors = (v.to(wide) for v in (self.mean, self.var, self.gamma, self.beta))
        return F.batch_norm(x.to(dtype), *vectors, False, 0.0, EPS)

    def reader(self) -> Reader:
        return reader(
            Norm(NormSpec(EPS, False, True), self.gamma, self.beta, None, None), self.mean, self.var
        )

    def separate(self, operation: Callable[..., Tensor], dy: Tensor, *weights: Tensor) -> Callable:
        """dtype -> (output, dx, dgamma, dbeta, *dweights) of PyTorch's operations in that dtype."""

        def run(dtype: torch.dtype) -> list[Tensor]:
            wide = torch.promote_types(dtype, torch.float32)
            x = self.x.to(dtype, copy=True).requires_grad_()
            gamma, beta = (v.to(wide, copy=True).requires_grad_() for v in (self.gamma, self.beta))
            leaves = [w.to(dtype, copy=True).requires_grad_() for w in weights]
            z = F.batch_norm(x, self.mean.to(wide), self.var.to(wide), gamma, beta, False, 0.0, EPS)
            out = operation(F.relu(z), *leaves)
            return [
                out.detach(),
                *torch.autograd.grad(out, [x, gamma, beta, *leaves], dy.to(dtype)),
            ]

        return run

    def images(self, rows: Tensor) -> Tensor:
        return self.geometry.images(rows.contiguous())


def compare(names: list[str], ours: list[Tensor], run: Callable, dtype: torch.dtype) -> None:
    for name, mine, theirs, exact in zip(names, ours, run(dtype), run(torch.float64), strict=True):
        assert_as_exact(name, mine, theirs, exact)


NAMES = ["output", "dx", "dgamma", "dbeta", "dweight"]


@each
@pytest.mark.parametrize("channels", [7, 96])
def test_bn_relu_conv1x1(kind: type[Reference], dtype: torch.dtype, channels: int) -> None:
    p = Problem(dtype, channels, Geometry(3, 9, 11))
    w, dy = p.draw(48, channels).to(dtype), p.draw(p.geometry.rows, 48).to(dtype)
    backend, read = kind(), p.reader()
    out = backend.bn_relu_conv1x1(p.x, read, w, None)
    g = torch.zeros_like(p.x)
    sums, dw = backend.bn_relu_conv1x1_backward(dy, None, None, w, p.x, read, into_of(g), True)
    ours = [out, g, sums.dgamma, sums.dbeta, dw.to(dtype)]
    compare(NAMES, ours, p.separate(lambda z, w: z @ w.t(), dy, w), dtype)


@each
@pytest.mark.parametrize("dilation", [(1, 1), (2, 3)])
def test_bn_relu_conv3x3(
    kind: type[Reference], dtype: torch.dtype, dilation: tuple[int, int]
) -> None:
    p = Problem(dtype, 24, Geometry(3, 9, 11))
    w, dy = p.draw(12, 24, 3, 3).to(dtype), p.draw(p.geometry.rows, 12).to(dtype)
    backend, read = kind(), p.reader()
    out = torch.empty(p.geometry.rows, 12, dtype=dtype)
    backend.bn_relu_conv3x3(p.x, read, w, dilation, p.geometry, out, None, None)
    g = torch.zeros_like(p.x)
    none, sums, dw = backend.bn_relu_conv3x3_backward(
        dy, w, dilation, p.x, read, p.geometry, into_of(g), True
    )
    dz, again, own_dw = backend.bn_relu_conv3x3_backward(
        dy, w, dilation, p.x, read, p.geometry, None, True
    )
    dx = (dz * read.scale).to(dtype)
    assert none is None
    if kind is Reference or dtype == torch.float32:  # a G that rounds is the reference's
        assert torch.equal(sums.dgamma, again.dgamma) and torch.equal(dx, g)

    def separate(z: Tensor, w: Tensor) -> Tensor:
        y = F.conv2d(p.images(z), w, padding=dilation, dilation=dilation)
        return y.permute(0, 2, 3, 1).reshape(-1, 12)

    for ours in (
        [out, g, sums.dgamma, sums.dbeta, dw.to(dtype)],
        [out, dx, again.dgamma, again.dbeta, own_dw.to(dtype)],
    ):
        compare(NAMES, ours, p.separate(separate, dy, w), dtype)


@each
def test_tails(kind: type[Reference], dtype: torch.dtype) -> None:
    p = Problem(dtype, 20, Geometry(4, 9, 6))
    backend, read, n = kind(), p.reader(), p.geometry.n

    w, dy = p.draw(10, 20).to(dtype), p.draw(n * 4 * 3, 10).to(dtype)
    g = torch.zeros_like(p.x)
    out = backend.bn_relu_pool_conv1x1(p.x, read, w, p.geometry)
    sums, dw = backend.bn_relu_pool_conv1x1_backward(dy, w, p.x, read, p.geometry, into_of(g), True)

    def pooled(z: Tensor, w: Tensor) -> Tensor:
        y = F.avg_pool2d(F.conv2d(p.images(z), w[:, :, None, None]), 2)
        return y.permute(0, 2, 3, 1).reshape(-1, 10)

    ours = [out, g, sums.dgamma, sums.dbeta, dw.to(dtype)]
    compare(NAMES, ours, p.separate(pooled, dy, w), dtype)
    frozen = torch.zeros_like(p.x)
    arguments = dy, w, p.x, read, p.geometry, into_of(frozen)
    again, none = backend.bn_relu_pool_conv1x1_backward(*arguments, False)
    assert none is None and torch.equal(frozen, g) and all(map(torch.equal, again, sums))

    dy = p.draw(n, 20).to(dtype)
    g = torch.zeros_like(p.x)
    out = backend.bn_relu_mean(p.x, read, p.geometry)
    sums = backend.bn_relu_mean_backward(dy, p.x, read, p.geometry, into_of(g))
    compare(
        NAMES[:4],
        [out, g, sums.dgamma, sums.dbeta],
        p.separate(lambda z: F.adaptive_avg_pool2d(p.images(z), 1).flatten(1), dy),
        dtype,
    )

    dy = p.draw(p.geometry.rows, 20).to(dtype)
    g = torch.zeros_like(p.x)
    out = backend.bn_relu(p.x, read, True)
    sums = backend.bn_relu_backward(dy, p.x, read, True, into_of(g))
    compare(NAMES[:4], [out, g, sums.dgamma, sums.dbeta], p.separate(lambda z: z * 1, dy), dtype)


@each
def test_means_round_once(kind: type[Reference], dtype: torch.dtype) -> None:
    """Of whole numbers, whose sums 16 bits do not hold."""
    geometry = Geometry(2, 20, 20)
    x = torch.randint(0, 8, (geometry.rows, 12)).to(dtype)
    read = Reader(torch.zeros(12), torch.ones(12), None, None, 0.0, False)
    expected = (x.float().view(2, 400, 12).sum(1) / 400).to(dtype)
    assert torch.equal(kind().bn_relu_mean(x, read, geometry), expected)


@each
def test_bn_relu_maxpool(kind: type[Reference], dtype: torch.dtype) -> None:
    p = Problem(dtype, 20, Geometry(2, 9, 12))
    backend, read = kind(), p.reader()
    dy = p.draw(2 * 5 * 6, 20).to(dtype)
    out, winner = backend.bn_relu_maxpool(p.x, read, p.geometry)
    assert winner.dtype == torch.uint8 and winner.max() <= 8
    sums = backend.bn_relu_maxpool_sums(dy, winner, p.x, read, p.geometry)
    dx, behind = torch.empty_like(p.x), NormGradient(read, sums, p.geometry.rows)
    backend.bn_relu_maxpool_backward(dy, winner, p.x, behind, p.geometry, dx)

    def separate(z: Tensor) -> Tensor:
        return F.max_pool2d(p.images(z), 3, 2, 1).permute(0, 2, 3, 1).reshape(-1, 20)

    compare(NAMES[:4], [out, dx, sums.dgamma, sums.dbeta], p.separate(separate, dy), dtype)


@each
def test_statistics_and_their_backward(kind: type[Reference], dtype: torch.dtype) -> None:
    """Mean, variance and dy = a*dz + b*y + c against F.batch_norm in training."""
    torch.manual_seed(2)
    y = (torch.randn(3000, 24) * 2 + 5 * torch.randn(24)).to(dtype)
    dz = torch.randn(3000, 24).to(dtype)
    gamma, beta = torch.randn(24), torch.randn(24)
    backend = kind()
    moments = torch.empty(2, 24, dtype=torch.promote_types(dtype, torch.float32))
    backend.statistics(y, moments)
    mean, var = moments
    read = reader(Norm(NormSpec(EPS, True, True), gamma, beta, None, None), mean, var)
    x_hat = (y.to(mean.dtype) - read.mean) * read.rstd
    sums = engine.Sums(dz.to(mean.dtype).sum(0), (dz * x_hat).sum(0))
    dy = backend._normalised(dz, y, NormGradient(read, sums, 3000))

    def separate(dtype: torch.dtype) -> list[Tensor]:
        wide = torch.promote_types(dtype, torch.float32)
        leaf = y.to(dtype, copy=True).requires_grad_()
        running = torch.zeros(24, dtype=wide), torch.zeros(24, dtype=wide)
        out = F.batch_norm(leaf, *running, gamma.to(wide), beta.to(wide), True, 1.0, EPS)
        out.backward(dz.to(dtype))
        return [running[0], running[1] * 2999 / 3000, leaf.grad]

    compare(["mean", "var", "dy"], [mean, var, dy], separate, dtype)


def gradient_errors(model: nn.Module, x: Tensor, exact: list[Tensor]) -> float:
    """RMS over parameters of the error relative to each parameter's own RMS."""
    model.zero_grad()
    out = model(x)
    (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    ratios = [
        error(p.grad, e) / e.square().mean().sqrt().item()
        for p, e in zip(model.parameters(), exact, strict=True)
    ]
    return sum(r * r for r in ratios) / len(ratios)


@pytest.mark.parametrize("backend", BACKENDS)
def test_whole_networks_in_float32(backend: str) -> None:
    """RMS error over parameters, batch permutations and networks, against the worse of plain NCHW
    and plain channels-last. Several networks, since a single flipped mask decides a single one's
    figure.
    """
    args = dict(growth_rate=8, block_config=(3, 4, 3), num_init_features=16, num_classes=5)
    totals = dict(ours=0.0, nchw=0.0, last=0.0)
    for seed in range(6):
        plain = memdense.DenseNet(**args, efficient=False)
        randomise(plain, torch.Generator().manual_seed(seed))
        ours = memdense.DenseNet(**args)
        last = memdense.DenseNet(**args, efficient=False).to(memory_format=torch.channels_last)
        wide = memdense.DenseNet(**args, efficient=False).double()
        for model in (ours, last, wide):
            model.load_state_dict(plain.state_dict())
        x = torch.randn(6, 3, 64, 64, generator=torch.Generator().manual_seed(seed))
        for i in range(6):
            images = x.roll(i, 0)
            wide.zero_grad()
            out = wide(images.double())
            (out * torch.linspace(-1, 1, out.numel()).double().view_as(out)).sum().backward()
            exact = [p.grad for p in wide.parameters()]
            with memdense.use_backend(backend):
                totals["ours"] += gradient_errors(ours, images, exact)
            totals["nchw"] += gradient_errors(plain, images, exact)
            images = images.contiguous(memory_format=torch.channels_last)
            totals["last"] += gradient_errors(last, images, exact)
    assert totals["ours"] <= 1.5**2 * max(totals["nchw"], totals["last"]), totals


def per_reader_backward(
    dout: Tensor,
    kept: engine.Forward,
    stage,
    dtype: torch.dtype,
) -> list[Tensor]:
    """dx and each parameter's gradient, BatchNorm's backward paid by every reader on its own in
    ``dtype``.
    """
    n, last, h, w = kept.features.shape
    rows, geometry = n * h * w, Geometry(n, h, w)
    x = kept.features.permute(0, 2, 3, 1).reshape(rows, last)
    channels = last - sum(layer.growth for layer in stage.layers)
    table = engine.StatisticsTable(stage, channels, table=kept.statistics)
    backend = Reference()
    g = torch.zeros_like(x)
    found: list[list[Tensor]] = []

    def answer(read: Reader, part: Tensor, dz: Tensor) -> engine.Sums:
        """Add a reader's whole dx to G, rounding twice as dtype does."""
        wide = dz.to(read.scale.dtype)
        x_hat = (part.to(wide.dtype) - read.mean) * read.rstd
        sums = engine.Sums(wide.sum(0), (wide * x_hat).sum(0))
        a, b, c = NormGradient(read, sums, rows).vectors
        dx = (a * wide + b * part + c).to(dtype)
        g[:, : part.shape[1]] += dx
        return sums

    tail = stage.tail
    read = table.reader(tail.norm, (len(stage.layers), 1))
    z = torch.relu(read.scale * x + read.shift)
    if tail.spec.kind == "pool":
        da = (
            (dout.to(z.dtype) / (h * w))
            .to(dtype)[:, None]
            .expand(n, h * w, last)
            .reshape(rows, last)
        )
    else:
        d = dout.permute(0, 2, 3, 1)
        da = (d.reshape(-1, d.shape[-1]) @ tail.conv.flatten(1).to(dtype)).view(
            n, h // 2, w // 2, last
        )
        da = (da / 4).repeat_interleave(2, 1).repeat_interleave(2, 2).reshape(rows, last)
    sums = answer(read, x, da * (z > 0))
    found.append([sums.dgamma, sums.dbeta])
    c = last
    for i in reversed(range(len(stage.layers))):
        layer = stage.layers[i]
        new = slice(c - layer.growth, c)
        c = new.start
        dy = g[:, new].contiguous()
        read1, read2 = (table.reader(m, (i, j)) for m, j in ((layer.norm1, 1), (layer.norm2, 2)))
        y = kept.bottlenecks[i]
        dz, sums2, dw2 = backend.bn_relu_conv3x3_backward(
            dy, layer.conv2.to(dtype), layer.dilation, y, read2, geometry, None, True
        )
        dy1 = backend._normalised(dz, y, NormGradient(read2, sums2, rows))
        z = torch.relu(read1.scale * x[:, :c] + read1.shift)
        dw1 = dy1.to(z.dtype).t() @ z.to(dtype).to(z.dtype)
        sums1 = answer(read1, x[:, :c], (dy1 @ layer.conv1.flatten(1).to(dtype)) * (z > 0))
        found.append([sums1.dgamma, sums1.dbeta, dw1, sums2.dgamma, sums2.dbeta, dw2])
    return [g[:, :channels], *(t for part in reversed(found) for t in part)]


def backward_in(
    dtype: torch.dtype,
    dout: Tensor | None,
    dfeatures: Tensor | None,
    kept: engine.Forward,
    stage: Stage,
    backend: Reference,
) -> engine.Backward:
    """All gradients of a stage, of what its forward kept, in ``dtype``."""
    wide = torch.promote_types(dtype, torch.float32)
    tensors = [t.detach().to(wide) for t in memdense.spec.flatten(stage)[0]]
    return engine.backward(
        dout if dout is None else dout.to(dtype),
        dfeatures if dfeatures is None else dfeatures.to(dtype),
        kept.features.to(dtype),
        kept.statistics.to(wide),
        [y.to(dtype) for y in kept.bottlenecks],
        unflatten(memdense.spec.spec_of(stage), tensors),
        None,
        True,
        [True] * len(tensors),
        backend,
    )


@torch.no_grad()
@pytest.mark.parametrize(
    ("backend", "dtype"), [(k, d) for k, d in EACH if d != torch.float32], ids=str
)
@pytest.mark.parametrize("loss", ["ordinary", "sum", "one class"])
@pytest.mark.parametrize("kind", ["transition", "pool"])
def test_backward_with_16_bit_gradients(
    backend: type[Reference], dtype: torch.dtype, loss: str, kind: str
) -> None:
    """On the same stored X, Y and masks, against float64: no worse than a backward that defers
    nothing.
    """
    block = memdense.DenseBlock(6, 16, 4, 8)
    tail = memdense.Transition(64, 32) if kind == "transition" else nn.BatchNorm2d(64)
    holder = nn.Sequential(block, tail)
    randomise(holder, torch.Generator().manual_seed(4))
    found = read_stage(block, "block", tail, "tail", kind, OWN_TYPES, keep_bottlenecks=True)
    stage = found.stage
    x = torch.randn(8, 16, 12, 12).to(dtype)
    kept = engine.forward(x, stage, None, Reference())
    if loss == "ordinary":
        dout = torch.randn(kept.out.shape)
    elif loss == "sum":
        dout = torch.ones(kept.out.shape)
    else:
        dout = torch.zeros(kept.out.shape)
        dout[:] = torch.randn(kept.out.shape[1]).view(1, -1, *[1] * (kept.out.dim() - 2)) / 8
    dout = dout.to(dtype)

    def ours(to: torch.dtype) -> list[Tensor]:
        result = backward_in(to, dout, None, kept, stage, backend())
        dx = result.x.permute(0, 2, 3, 1).reshape(-1, 16)
        return [dx, *result.tensors]

    exact = ours(torch.float64)
    mine = ours(dtype)
    theirs = per_reader_backward(dout, kept, stage, dtype)
    # a transition's convolution comes last and has nothing to differ by
    kinds = (
        ["dx"] + ["gamma1", "beta1", "conv1", "gamma2", "beta2", "conv2"] * 6 + ["gamma", "beta"]
    )
    squares: dict[str, Tensor] = defaultdict(lambda: torch.zeros(2))
    for name, m, t, e in zip(kinds, mine, theirs, exact, strict=False):
        scale = e.square().mean().sqrt().item()
        errors = torch.tensor([error(m, e), error(t.reshape(m.shape), e)]) / scale
        squares[name] += errors.square()
    ratios = {name: (a / b).sqrt().item() for name, (a, b) in squares.items()}
    assert max(ratios.values()) <= 1.5, ratios


@torch.no_grad()
@pytest.mark.parametrize(
    ("rows", "kind", "expected"),
    [(64, "transition", 258), (65, "transition", 256), (65, "norm", 258), (65, "pool", 258)],
)
@pytest.mark.parametrize("backend", KINDS)
def test_few_rows_and_a_last_block_sum_in_float32(
    backend: type[Reference], rows: int, kind: str, expected: int
) -> None:
    """256 + 1 + 1, of the features, the tail and a layer: in bfloat16 256 + 1 is 256 again."""
    spec = NormSpec(0.0, False, False)
    tensors = [torch.zeros(1, 1, 3, 3).bfloat16()]
    tensors[0][:, :, 1, 1] = 1
    if kind == "transition":
        tensors.append(torch.eye(2).bfloat16()[:, :, None, None])
    layers = (LayerSpec(spec, None, (1, 1)),)
    running = [torch.zeros(1), torch.ones(1), torch.zeros(2), torch.ones(2)]
    stage = unflatten(StageSpec(layers, TailSpec(kind, spec)), tensors, running)
    kept = engine.forward(torch.ones(1, 1, rows, 1).bfloat16(), stage, None, backend())
    dout = torch.full_like(kept.out, rows if kind == "pool" else 1)
    dfeatures = torch.zeros_like(kept.features)
    dfeatures[:, 0] = 256
    found = backward_in(torch.bfloat16, dout, dfeatures, kept, stage, backend())
    assert (found.x == expected).all()


@torch.no_grad()
@pytest.mark.parametrize("backend", KINDS[1:])
def test_a_constant_gradient_of_features(backend: type[Reference]) -> None:
    """What nobody settles rounds the same way at every pixel: a bottleneck's sums must be those of
    what was stored.
    """
    block = memdense.DenseBlock(3, 16, 4, 8)
    randomise(block, torch.Generator().manual_seed(4))
    stage = read_stage(block, "", None, "", "", OWN_TYPES, keep_bottlenecks=True, alone=True).stage
    x = torch.randn(8, 16, 48, 48).bfloat16()
    kept = engine.forward(x, stage, None, Reference())

    def run(dtype: torch.dtype, backend: Reference) -> list[Tensor]:
        ones = torch.ones_like(kept.features)
        return backward_in(dtype, None, ones, kept, stage, backend).tensors

    exact = run(torch.float64, Reference())
    results = run(torch.bfloat16, backend()), run(torch.bfloat16, Reference())
    for i, (mine, theirs, value) in enumerate(zip(*results, exact, strict=True)):
        assert_as_exact(f"tensor {i}", mine, theirs, value)
