"""Replaying a stage: what its engine and primitives do to memory is recorded once.

With the same shapes, modes and addresses of its parameters a stage launches the same kernels on the
same places of memory, apart from where that memory begins. The second such call is recorded while
it runs; later ones allocate their results and one piece of scratch, add offsets, and launch. Same
kernels in the same order, so every bit stays the same. What a recording cannot tell for certain,
float64 or a gradient expanded from one value for example, runs every time.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from ... import _extension
from . import cuda, launch, tuning
from .launch import ALIGNMENT, Plan, keep_while_read
from .tiles import extent, room

aten = torch.ops.aten
Tensors = Sequence[Tensor | None]
Key = tuple[Any, ...]

ALLOCATIONS = {
    aten.empty.memory_format,
    aten.empty_strided.default,
    aten.empty_like.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
}
ZEROS = {aten.zeros.default, aten.new_zeros.default}
# torch.empty_strided on the current device, in half its time
EMPTY = {
    "cpu": torch._C._dynamo.guards._empty_strided_cpu,
    "cuda": torch._C._dynamo.guards._empty_strided_cuda,
}
STREAM = object()  # among what a launch is given: the current one
BLOCK = 512  # bytes that a piece of scratch is rounded up to, as PyTorch's allocator does


class Place(NamedTuple):
    """A tensor, as a place in one of the pieces of memory that a recording met."""

    piece: int | None  # None: it has no values
    offset: int  # bytes behind the piece's beginning
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]


class Piece:
    """Memory of its own: a "moving" or "fixed" input, a "constant", "scratch", an "output" or the
    "result" of one of PyTorch's operations.
    """

    def __init__(self, kind: str, t: Tensor) -> None:
        self.kind = kind
        self.begin = t.data_ptr()
        self.bytes = _bytes(t)
        self.dtype, self.size, self.stride = t.dtype, t.shape, t.stride()
        self.constant = t if kind == "constant" else None
        self.first: int | None = None  # of the steps that use it
        self.last = 0
        self.offset = 0  # in the scratch


def _bytes(t: Tensor) -> int:
    """From a tensor's first value to its last, both included."""
    return extent(t.shape, t.stride()) * t.itemsize


class Around(NamedTuple):
    """What a launch is given before its addresses, and behind them."""

    before: tuple
    behind: tuple = ()
    kernel: Any = None  # whose code the launch knows by a number only


class Step(NamedTuple):
    """One of PyTorch's operations on places, or a launch by their addresses."""

    function: Callable[..., Any]
    args: tuple
    kwargs: dict[str, Any]
    results: tuple[int, ...] = ()  # the pieces that its results are
    around: Around | None = None  # of a launch


class Recorder(TorchDispatchMode):
    """Runs what is called inside, and writes down its steps.

    A tensor's storage, which lives as long as the recording knows it, tells which piece it lies in;
    so an operation is a view if its result has a storage that is known. ``replayable`` is False
    once something cannot be told.
    """

    def __init__(self, device: torch.device, moving: Tensors, fixed: Tensors) -> None:
        super().__init__()
        self.steps: list[Step] = []
        self.pieces: list[Piece] = []
        self.replayable = True
        self._device = device
        self._at: dict[int, list[int]] = {}  # pieces, by their storage
        self._storages: list[StorageWeakRef] = []  # keep addresses of storages, not their memory
        self._paused = False
        for kind, tensors in (("moving", moving), ("fixed", fixed)):
            for t in tensors:
                self._add(kind, torch.empty(0) if t is None else t)

    def __enter__(self) -> Recorder:
        launch.thread.recorder = self
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        launch.thread.recorder = None
        super().__exit__(*error)

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._paused:
            return function(*args, **kwargs)
        out, launches = cuda.call(function, args, kwargs)
        if launches is None or not self._launches(launches, [*args, *kwargs.values()]):
            self._operation(function, args, kwargs, out)
        return out

    def _launches(self, launches: cuda.Launches, values: Sequence[Any]) -> bool:
        """Write down an operation's launches, if its arguments tell where each address lies.

        Whether an address was a multiple of 16 bytes may have decided which they are: a tape's key
        says so of inputs, all other memory begins at such a multiple.
        """
        tensors = [t for t in values if isinstance(t, Tensor)]
        ranges = [(t.data_ptr(), _bytes(t), self.place(t)) for t in tensors]
        for address, size in launches.scratch:
            stand_in = torch.empty(size, dtype=torch.uint8, device="meta")
            place = Place(self._add("scratch", stand_in), 0, torch.uint8, stand_in.shape, (1,))
            ranges.append((address, size, place))
        places = []
        for address in launches.addresses:
            # slices of one buffer overlap, and agree
            found = {
                (place.piece, place.offset + address - begin): place
                for begin, size, place in ranges
                if begin <= address < begin + size
            }
            if len(found) != 1:
                return False
            [((_, offset), place)] = found.items()
            places.append(place._replace(offset=offset))
        self._step(Step(launches, tuple(places), {}, around=Around((STREAM,))))
        return True

    def _operation(self, function: Any, args: tuple, kwargs: dict[str, Any], out: Any) -> None:
        results = out if isinstance(out, (tuple, list)) else () if out is None else (out,)
        if not all(isinstance(t, Tensor) for t in results):
            self.replayable = False  # values decide
            return
        new = [t for t in results if t.numel() and not self._known(t)]
        if function in ALLOCATIONS or function in ZEROS:
            self.replayable &= out.device == self._device
            self._add("scratch", out)
            if function in ZEROS and out.numel():
                self._step(Step(aten.zero_.default, (self.place(out),), {}))
            return
        mutates = function._schema.is_mutable
        if new and (mutates or len(new) < len(results)):
            self.replayable = False
        elif new or mutates:
            places = self._places(args), self._places(kwargs)
            self._step(Step(function, *places, tuple(self._add("result", t) for t in new)))

    def launch(self, plan: Plan, tensors: Tensors) -> None:
        with self._pause():
            compiled = plan.launch(tensors)
        places = self._places(tuple(tensors))
        if compiled is None:
            self._step(Step(plan, places, {}))
            return
        before = *plan.grid, STREAM, compiled.function, compiled.metadata, None, None, None
        around = Around(before, plan.arguments, compiled.kernel)
        self._step(Step(compiled.run, places, {}, around=around))

    def constant(self, make: Callable[[], Tensor]) -> Tensor:
        with self._pause():
            made = make()
        self._add("constant", made)
        return made

    def place(self, t: Tensor) -> Place:
        """Where t lies."""
        if not t.numel():
            return Place(None, 0, t.dtype, t.shape, t.stride())
        begin, end = t.data_ptr(), t.data_ptr() + _bytes(t)
        inside = [
            i
            for i in self._at.get(t.untyped_storage()._cdata, ())
            if self.pieces[i].begin <= begin and end <= self.pieces[i].begin + self.pieces[i].bytes
        ]
        # where inputs overlap, fixed ones do so at every replay
        if len(inside) != 1 and {self.pieces[i].kind for i in inside} != {"fixed"}:
            self.replayable = False
            return Place(None, 0, t.dtype, t.shape, t.stride())
        piece = self.pieces[inside[0]]
        self.replayable &= piece.dtype == t.dtype
        return Place(inside[0], begin - piece.begin, t.dtype, t.shape, t.stride())

    @contextmanager
    def _pause(self) -> Iterator[None]:
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def _known(self, t: Tensor) -> bool:
        return t.untyped_storage()._cdata in self._at

    def _add(self, kind: str, t: Tensor) -> int:
        if t.numel():
            storage = t.untyped_storage()
            self._at.setdefault(storage._cdata, []).append(len(self.pieces))
            self._storages.append(StorageWeakRef(storage))
        self.pieces.append(Piece(kind, t))
        return len(self.pieces) - 1

    def _places(self, values: Any) -> Any:
        """Arguments, with places for tensors."""
        return _mapped(self.place, Tensor, values)

    def _step(self, step: Step) -> None:
        used = [*step.results]
        _mapped(lambda place: used.append(place.piece), Place, (step.args, step.kwargs))
        for piece in (self.pieces[i] for i in used if i is not None):
            piece.first = len(self.steps) if piece.first is None else piece.first
            piece.last = len(self.steps)
        self.steps.append(step)


def _mapped(function: Callable[[Any], Any], kind: type, values: Any) -> Any:
    """Arguments of an operation, with function(x) for every x of a kind in them."""
    if isinstance(values, kind):
        return function(values)
    if isinstance(values, dict):
        return {name: _mapped(function, kind, value) for name, value in values.items()}
    if isinstance(values, (tuple, list)) and not isinstance(values, torch.Size):
        return type(values)([_mapped(function, kind, value) for value in values])
    return values


def pack(pieces: Sequence[Piece]) -> int:
    """Give pieces of scratch their offsets, so that none shares memory with another that is in use
    at the same step; returns the bytes that takes.
    """
    placed: list[Piece] = []
    for piece in sorted(pieces, key=lambda p: -p.bytes):
        piece.offset = 0
        for other in placed:  # by offset
            if other.first <= piece.last and piece.first <= other.last:
                if piece.offset + piece.bytes <= other.offset:
                    break
                piece.offset = max(piece.offset, _rounded(other.offset + other.bytes))
        placed.append(piece)
        placed.sort(key=lambda p: p.offset)
    return max((_rounded(p.offset + p.bytes) for p in pieces), default=0)


def _rounded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


class _Values:
    """All that a tape's launches are given: addresses first, which differ between replays, then
    what does not.
    """

    def __init__(self, pieces: Sequence[Piece], steps: Sequence[Step]) -> None:
        self.pieces = pieces
        self.addresses: dict[tuple[int, int], int] = {}  # (piece, offset) to its index
        self.rest: list[Any] = []
        self._known: dict[int, int] = {}  # id of one of the rest to its index
        places = [p for step in steps if step.around for p in step.args if p is not None]
        for place in places:
            if place.piece is not None and pieces[place.piece].kind not in ("fixed", "constant"):
                self.addresses.setdefault((place.piece, place.offset), len(self.addresses))
        self.stream_index = self.index(STREAM)

    def index(self, value: Any) -> int:
        at = self._known.get(id(value))
        if at is None:
            at = self._known[id(value)] = len(self.addresses) + len(self.rest)
            self.rest.append(value)
        return at

    def index_of(self, place: Place | None) -> int:
        """Of an address."""
        if place is None or place.piece is None:
            return self.index(None if place is None else 0)
        piece = self.pieces[place.piece]
        if piece.kind in ("fixed", "constant"):
            return self.index(piece.begin + place.offset)
        return self.addresses[place.piece, place.offset]

    def launch(self, step: Step) -> tuple[Callable[..., None], itemgetter]:
        """A launch, as a function and what gets its arguments out of the list."""
        before, behind = (map(self.index, values) for values in step.around[:2])
        return step.function, itemgetter(*before, *map(self.index_of, step.args), *behind)


class Tape:
    """A recording, ready to be replayed on other inputs of the same kind."""

    def __init__(self, recorder: Recorder, outputs: Sequence[Place | None]) -> None:
        self.pieces = recorder.pieces
        returned = [place for place in outputs if place is not None and place.piece is not None]
        self._claim(returned)
        scratch = [p for p in self.pieces if p.kind == "scratch" and p.first is not None]
        self.scratch_bytes = pack(scratch)
        self.tensors = [p.constant for p in self.pieces]
        self.constants = [t for t in self.tensors if t is not None]
        self.made = [
            (i, tuple(p.size), p.stride, p.dtype)
            for i, p in enumerate(self.pieces)
            if p.kind == "output"
        ]
        # most are an output as it was made
        whole = {Place(i, 0, dtype, size, stride): i for i, size, stride, dtype in self.made}
        self.outputs = [whole.get(place, place) for place in outputs]

        values = _Values(self.pieces, recorder.steps)
        self.steps: list[tuple[Callable[..., Any], itemgetter | None]] = []
        dropped = self._dropped(recorder.steps, {place.piece for place in returned})
        for step, over in zip(recorder.steps, dropped, strict=True):
            self.steps.append(values.launch(step) if step.around else (_Call(step, over), None))
        self.kernels = [step.around.kernel for step in recorder.steps if step.around]
        self.rest, self.stream_index = values.rest, values.stream_index
        self.launches = any(get is not None for _, get in self.steps)
        # what has memory when a replay begins, beside its scratch, which comes behind it; where the
        # addresses of a result begin is told once there is one
        kinds = ("moving", "output")
        self.begun = [i for i, p in enumerate(self.pieces) if p.kind in kinds and p.bytes]
        places = {piece: at for at, piece in enumerate(self.begun)}
        self.addresses = [
            (len(places), self.pieces[i].offset + offset)
            if self.pieces[i].kind == "scratch"
            else (places.get(i, len(places)), offset)
            for i, offset in values.addresses
        ]
        self.of_results: dict[int, list[tuple[int, int]]] = {}  # (index, offset) of addresses
        for (i, offset), at in values.addresses.items():
            if self.pieces[i].kind == "result":
                self.of_results.setdefault(i, []).append((at, offset))

    def _claim(self, returned: Sequence[Place]) -> None:
        """Scratch that is returned becomes an output, in the output's shape where that fills it."""
        for place in returned:
            piece = self.pieces[place.piece]
            if piece.kind == "scratch":
                piece.kind = "output"
                if place.size.numel() * place.dtype.itemsize == piece.bytes:
                    piece.size, piece.stride = place.size, place.stride

    def _dropped(self, steps: Sequence[Step], returned: set[int | None]) -> list[list[int]]:
        """The results that each step lets go of: the first operation at or behind their last use,
        since launches let go of nothing.
        """
        dropped: list[list[int]] = [[] for _ in steps]
        for i, piece in enumerate(self.pieces):
            if piece.kind == "result" and i not in returned:
                later = range(piece.last, len(steps))
                at = next((j for j in later if not steps[j].around), None)
                if at is not None:
                    dropped[at].append(i)
        return dropped

    def __call__(self, moving: Tensors, fixed: Tensors, device: torch.device) -> list:
        """The outputs for inputs like the recorded ones."""
        for table in self.constants:
            keep_while_read(table)
        run = _Replay(self, (*moving, *fixed), device)
        values, tensors = run.values, run.tensors
        for step, get in self.steps:
            if get is None:
                step(run)
            else:
                step(*get(values))
        return [
            tensors[out] if type(out) is int else None if out is None else run.tensor(out)
            for out in self.outputs
        ]


class _Replay:
    """The memory of one replay."""

    def __init__(self, tape: Tape, inputs: Tensors, device: torch.device) -> None:
        self.tape = tape
        self.device = device
        self.typed: dict[torch.dtype, Tensor] = {}
        empty = EMPTY[device.type]
        self.scratch = empty((tape.scratch_bytes,), (1,), torch.uint8)
        self.tensors = tensors = [*inputs, *tape.tensors[len(inputs) :]]
        for i, size, stride, dtype in tape.made:
            tensors[i] = empty(size, stride, dtype)
        begins = [tensors[i].data_ptr() for i in tape.begun]
        begins.append(self.scratch.data_ptr())
        self.values: list[Any] = [begins[i] + offset for i, offset in tape.addresses]
        self.values += tape.rest
        if tape.launches:
            self.values[tape.stream_index] = launch.current_stream(device.index)

    def bind(self, piece: int, result: Tensor) -> None:
        self.tensors[piece] = result
        for at, offset in self.tape.of_results.get(piece, ()):
            self.values[at] = result.data_ptr() + offset

    def tensor(self, place: Place) -> Tensor:
        index, offset, dtype, size, stride = place
        if index is None:
            return torch.empty_strided(size, stride, dtype=dtype, device=self.device)
        piece, at = self.tape.pieces[index], offset // dtype.itemsize
        if piece.kind == "scratch":
            if dtype not in self.typed:
                self.typed[dtype] = self.scratch.view(dtype)
            start = piece.offset // dtype.itemsize + at
            return self.typed[dtype].as_strided(size, stride, start)
        tensor = self.tensors[index]
        if not offset and tensor.shape == size and tensor.stride() == stride:
            return tensor
        return tensor.as_strided(size, stride, tensor.storage_offset() + at)


class _Call:
    """One of PyTorch's operations, or a launch in the interpreter; behind it, some results are let
    go of.
    """

    def __init__(self, step: Step, dropped: list[int]) -> None:
        self.step = step
        self.dropped = dropped

    def __call__(self, run: _Replay) -> None:
        function, args, kwargs, results, _ = self.step
        args, kwargs = _mapped(run.tensor, Place, (args, kwargs))
        found = function(*args, **kwargs)
        if results:
            each = found if isinstance(found, (tuple, list)) else (found,)
            for piece, result in zip(results, each, strict=True):
                run.bind(piece, result)
        for piece in self.dropped:
            run.tensors[piece] = None


TAPES = 256  # a DenseNet of four blocks takes eight for a size and batch of images

_tapes: OrderedDict[Key, Tape | None] = OrderedDict()  # None: it cannot be replayed
_seen: set[int] = set()  # hashes of keys: one that is mistaken for another is recorded early
_lock = threading.Lock()
_chosen: bool | None = None


@contextmanager
def replaying(wanted: bool) -> Iterator[None]:
    """Replay, in the interpreter too, or never, inside."""
    global _chosen
    before, _chosen = _chosen, wanted
    try:
        yield
    finally:
        _chosen = before


def enabled() -> bool:
    """What :func:`replaying` says, else not in the interpreter and not with MEMDENSE_REPLAY=0."""
    if launch.observed() or launch.thread.recorder is not None or tuning.is_forced():
        return False
    if _chosen is not None:
        return _chosen
    return not launch.INTERPRETED and os.environ.get("MEMDENSE_REPLAY") != "0"


def call(
    backend: Any,
    function: Callable[..., list[Tensor | None]],
    moving: Tensors,
    fixed: Tensors,
    *rest: Any,
) -> list[Tensor | None]:
    """``function(backend, moving, fixed, *rest)``, by a replay where there is a tape.

    Args:
        backend: :class:`memdense.backends.triton.Triton`.
        function: what it does must depend only on ``rest`` and on what its inputs look like.
        moving: inputs that are new at every call; read only.
        fixed: inputs that usually lie where they did: a stage's parameters.
        rest: hashable.
    """
    # a tail alone, of a norm without parameters, has none that are fixed
    device = next(t.device for t in itertools.chain(fixed, moving) if t is not None)
    if not enabled():
        _expect_device(device, moving, fixed)
        return function(backend, moving, fixed, *rest)
    # without cuDNN convolutions of volumes give other strides
    key = (
        function, device, _extension.tf32(), torch.backends.cudnn.enabled, rest,
        tuple(map(_signature, moving)), *map(Tensor.data_ptr, fixed), *[t.dtype for t in fixed],
        *[t.shape for t in fixed], *map(Tensor.stride, fixed),
    )  # fmt: skip
    with _lock:
        tape = _tapes.get(key)
        if tape is not None:
            _tapes.move_to_end(key)
            record = False
        else:
            record = key not in _tapes and hash(key) in _seen
            if not record:
                if len(_seen) > 16 * TAPES:
                    _seen.clear()
                _seen.add(hash(key))
    if tape is not None:
        return tape(moving, fixed, device)
    _expect_device(device, moving, fixed)
    if not record:
        return function(backend, moving, fixed, *rest)
    with Recorder(device, moving, fixed) as recorder:
        outputs = function(backend, moving, fixed, *rest)
    places = [None if t is None else recorder.place(t) for t in outputs]
    tape = Tape(recorder, places) if recorder.replayable else None
    with _lock:
        _tapes[key] = tape
        while len(_tapes) > TAPES:
            _tapes.popitem(last=False)
    return outputs


def _expect_device(device: torch.device, *tensors: Tensors) -> None:
    """Kernels take addresses, which do not tell where they are."""
    found = {t.device for t in itertools.chain(*tensors) if t is not None}
    if len(found) > 1:
        raise RuntimeError(
            f"Expected all tensors to be on the same device {device}, but found "
            f"{', '.join(sorted(map(str, found)))}"
        )


def _signature(t: Tensor | None) -> tuple | None:
    """What of an input that moves decides which kernels run, where, and how far these read."""
    if t is None:
        return None
    return t.device, t.dtype, t.shape, t.stride(), t.data_ptr() % ALIGNMENT, room(t)
