"""Replaying a stage: what its engine and primitives do to memory is recorded once.

With the same shapes, modes and parameters a stage launches the same kernels on the same places of
memory, apart from where that memory begins. The second such call is recorded while it runs; later
ones allocate their results and one piece of scratch, add offsets, and launch. Nothing else changes:
kernels, their order and so every bit stay the same.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ... import _extension
from . import launch
from .cast import keep_if_captured
from .launch import ALIGNMENT, Plan

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
BLOCK = 512  # bytes that a piece of scratch is rounded up to, as PyTorch's allocator does


class Place(NamedTuple):
    """A tensor, as a place in one of the pieces of memory that a recording met."""

    piece: int  # NOWHERE: it has no values
    offset: int  # bytes behind the piece's beginning
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]


NOWHERE = -1
SCRATCH = -1  # of pieces: the one that all scratch lies in


class Piece:
    """Memory of its own: "fixed" and "moving" inputs, "constant", "scratch", "output" or the
    "result" of one of PyTorch's operations.
    """

    def __init__(self, kind: str, like: Tensor) -> None:
        self.kind = kind
        self.begin = like.data_ptr()
        self.bytes = _extent(like) * like.itemsize if like.numel() else 0
        self.dtype, self.size, self.stride = like.dtype, like.shape, like.stride()
        self.constant = like if kind == "constant" else None
        self.first: int | None = None  # of the steps that use it
        self.last = 0
        self.offset = 0  # in the scratch


def _extent(t: Tensor) -> int:
    """Values from a tensor's first to its last, both included."""
    return 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))


class Step(NamedTuple):
    """A launch, or one of PyTorch's operations, on places."""

    function: Any
    args: Any
    kwargs: dict[str, Any]
    results: tuple[int, ...]  # the pieces that its results are
    compiled: launch.Compiled | None = None


class Recorder(TorchDispatchMode):
    """Runs what is called inside, and writes down its steps.

    Views are no steps: an address tells which piece a tensor lies in. ``failure`` says why what ran
    cannot be replayed.
    """

    def __init__(self, moving: Tensors, fixed: Tensors) -> None:
        super().__init__()
        self.steps: list[Step] = []
        self.pieces: list[Piece] = []
        self.failure = ""
        self._at: dict[int, list[int]] = {}  # pieces, by the address of their storage
        self._paused = False
        for kind, tensors in (("moving", moving), ("fixed", fixed)):
            for t in tensors:
                self._add(kind, t if t is not None and t.numel() else None)

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
        out = function(*args, **kwargs)
        if self._paused or function.is_view or function is aten._unsafe_view.default:
            return out
        if function in ALLOCATIONS:
            self._new("scratch", out)
        elif function in ZEROS:
            self._new("scratch", out)
            if out.numel():
                self._step(aten.zero_.default, (out,), {}, ())
        else:
            found = out if isinstance(out, (tuple, list)) else () if out is None else (out,)
            if not all(isinstance(t, Tensor) for t in found):
                self.failure = f"{function} depends on values"
                return out
            # what it was given comes first, since a result's memory may have been another's
            step = self._places(args), self._places(kwargs)
            mutates = function._schema.is_mutable
            results = () if mutates else tuple(self._new("result", t) for t in found)
            self._step(function, *step, results, placed=True)
        return out

    def launch(self, plan: Plan, tensors: Tensors) -> None:
        self._paused = True
        compiled = plan.launch(tensors)
        self._paused = False
        self._step(plan, tensors, {}, (), compiled)

    def constant(self, make: Callable[[], Tensor]) -> Tensor:
        self._paused = True
        made = make()
        self._paused = False
        self._new("constant", made)
        return made

    def place(self, t: Tensor) -> Place:
        """Where t lies now."""
        if not t.numel():
            return Place(NOWHERE, 0, t.dtype, t.shape, t.stride())
        begin, end = t.data_ptr(), t.data_ptr() + _extent(t) * t.itemsize
        inside = [
            i
            for i in self._at.get(t.untyped_storage().data_ptr(), ())
            if self.pieces[i].begin <= begin and end <= self.pieces[i].begin + self.pieces[i].bytes
        ]
        kinds = {self.pieces[i].kind for i in inside}
        # where inputs overlap, fixed ones will do so at every replay
        if len(inside) != 1 and kinds != {"fixed"}:
            self.failure = "it uses memory from elsewhere, or inputs that overlap"
            return Place(NOWHERE, 0, t.dtype, t.shape, t.stride())
        piece = self.pieces[inside[0]]
        if piece.dtype != t.dtype:
            self.failure = "it reads memory as another dtype"
        return Place(inside[0], begin - piece.begin, t.dtype, t.shape, t.stride())

    def _add(self, kind: str, t: Tensor | None) -> int:
        if t is None:
            t = torch.empty(0)
        else:
            self._at.setdefault(t.untyped_storage().data_ptr(), []).append(len(self.pieces))
        self.pieces.append(Piece(kind, t))
        return len(self.pieces) - 1

    def _new(self, kind: str, t: Tensor) -> int:
        """Whatever had this memory before has given it back."""
        self._at.pop(t.untyped_storage().data_ptr(), None)
        return self._add(kind, t if t.numel() else None)

    def _places(self, values: Any) -> Any:
        """Tensors in an operation's arguments, as places."""
        if isinstance(values, Tensor):
            return self.place(values)
        if isinstance(values, dict):
            return {name: self._places(value) for name, value in values.items()}
        if isinstance(values, (tuple, list)):
            return type(values)(map(self._places, values))
        return values

    def _step(
        self,
        function: Any,
        args: Any,
        kwargs: dict[str, Any],
        results: tuple[int, ...],
        compiled: launch.Compiled | None = None,
        placed: bool = False,
    ) -> None:
        if not placed:
            args = self._places(args)
        for i in (*results, *_pieces_of((args, kwargs))):
            piece = self.pieces[i]
            piece.first = len(self.steps) if piece.first is None else piece.first
            piece.last = len(self.steps)
        self.steps.append(Step(function, args, kwargs, results, compiled))


def _pieces_of(values: Any) -> Iterator[int]:
    """The pieces that arguments lie in."""
    if isinstance(values, Place):
        if values.piece != NOWHERE:
            yield values.piece
    elif isinstance(values, dict):
        yield from _pieces_of(tuple(values.values()))
    elif isinstance(values, (tuple, list)):
        for value in values:
            yield from _pieces_of(value)


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


class Tape:
    """A recording, ready to be replayed on other inputs of the same kind.

    A launch is a function with an ``itemgetter`` of its arguments: all addresses, sizes and other
    values of the tape stand in one list, and only the addresses differ between replays.
    """

    def __init__(self, recorder: Recorder, outputs: Sequence[Place | None]) -> None:
        self.outputs = outputs
        self.pieces = recorder.pieces
        self._claim()
        scratch = [p for p in self.pieces if p.kind == "scratch" and p.first is not None]
        self.bytes = pack(scratch)
        self.constants = [p.constant for p in self.pieces if p.constant is not None]
        self.made = [(i, p) for i, p in enumerate(self.pieces) if p.kind == "output"]
        self.tensors = [p.constant for p in self.pieces]

        self.places: dict[tuple[int, int], int] = {}  # (piece, offset) to index in the values
        self.rest: list[Any] = []  # the values behind addresses
        self.known: dict[int, int] = {}  # id of a value to its index
        self.stream = object()
        for step in recorder.steps:
            if step.compiled is not None:
                for place in filter(None, step.args):
                    self._address(place)
        self.steps: list[tuple[Callable[..., Any], itemgetter | None]] = []
        for i, step in enumerate(recorder.steps):
            self.steps.append(self._launch(step) if step.compiled else (_Call(step), None))
            if over := self._over(i):
                self.steps.append((_Drop(over), None))
        # (piece or SCRATCH, offset) of each address
        self.addresses = [
            (SCRATCH, self.pieces[i].offset + offset)
            if self.pieces[i].kind == "scratch"
            else (i, offset)
            for i, offset in self.places
        ]

    def _claim(self) -> None:
        """Memory of outputs is their own; where one fills it, it has the output's shape."""
        claimed: set[int] = set()
        for place in filter(None, self.outputs):
            piece = self.pieces[place.piece]
            if place.piece == NOWHERE or piece.kind not in ("scratch", "output"):
                continue
            piece.kind = "output"
            fills = place.size.numel() * place.dtype.itemsize == piece.bytes
            if fills and place.piece not in claimed:
                piece.size, piece.stride = place.size, place.stride
            claimed.add(place.piece)

    def _over(self, step: int) -> list[int]:
        """Results that nobody needs behind a step."""
        returned = {place.piece for place in self.outputs if place is not None}
        over = [i for i, p in enumerate(self.pieces) if p.kind == "result" and p.last == step]
        return [i for i in over if i not in returned]

    def _address(self, place: Place) -> None:
        if place.piece != NOWHERE and self.pieces[place.piece].kind not in ("fixed", "constant"):
            self.places.setdefault((place.piece, place.offset), len(self.places))

    def _launch(self, step: Step) -> tuple[Callable[..., Any], itemgetter]:
        run, function, metadata = step.compiled
        plan: Plan = step.function
        arguments = (
            *map(self._value, (*plan.grid, self.stream, function, metadata, None, None, None)),
            *(self._value(None) if p is None else self._pointer(p) for p in step.args),
            *map(self._value, plan.arguments),
        )
        return run, itemgetter(*arguments)

    def _pointer(self, place: Place) -> int:
        if place.piece == NOWHERE:
            return self._value(0)
        piece = self.pieces[place.piece]
        if piece.kind in ("fixed", "constant"):
            return self._value(piece.begin + place.offset)
        return self.places[place.piece, place.offset]

    def _value(self, value: Any) -> int:
        """Its index."""
        index = self.known.get(id(value))
        if index is None:
            index = self.known[id(value)] = len(self.places) + len(self.rest)
            self.rest.append(value)
        return index

    def __call__(self, moving: Tensors, fixed: Tensors, device: torch.device) -> list:
        """The outputs for inputs like the recorded ones."""
        for table in self.constants:
            keep_if_captured(table)
        run = _Replay(self, (*moving, *fixed), device)
        values = run.values
        for step, get in self.steps:
            if get is None:
                step(run)
            else:
                step(*get(values))
        return [None if place is None else run.tensor(place) for place in self.outputs]


class _Replay:
    """The memory of one replay."""

    def __init__(self, tape: Tape, inputs: Tensors, device: torch.device) -> None:
        self.tape = tape
        self.device = device
        self.typed: dict[torch.dtype, Tensor] = {}
        self.scratch = torch.empty(tape.bytes, dtype=torch.uint8, device=device)
        self.tensors = [*inputs, *tape.tensors[len(inputs) :]]
        for i, p in tape.made:
            self.tensors[i] = torch.empty_strided(p.size, p.stride, dtype=p.dtype, device=device)
        # a result has no memory yet
        begins = [0 if t is None else t.data_ptr() for t in self.tensors]
        begins.append(self.scratch.data_ptr())
        self.values: list[Any] = [begins[i] + offset for i, offset in tape.addresses]
        self.values += tape.rest
        if tape.places:
            self.values[tape.known[id(tape.stream)]] = launch.current_stream(device.index)

    def bind(self, piece: int, result: Tensor) -> None:
        self.tensors[piece] = result
        begin = result.data_ptr()
        for (i, offset), at in self.tape.places.items():
            if i == piece:
                self.values[at] = begin + offset

    def tensor(self, place: Place) -> Tensor:
        index, offset, dtype, size, stride = place
        if index == NOWHERE:
            return torch.empty_strided(size, stride, dtype=dtype, device=self.device)
        tensor, at = self.tensors[index], offset // dtype.itemsize
        if tensor is None:
            scratch = self.typed.get(dtype)
            if scratch is None:
                scratch = self.typed[dtype] = self.scratch.view(dtype)
            start = self.tape.pieces[index].offset // dtype.itemsize
            return scratch.as_strided(size, stride, start + at)
        if not offset and tensor.shape == size and tensor.stride() == stride:
            return tensor
        return tensor.as_strided(size, stride, tensor.storage_offset() + at)

    def arguments(self, values: Any) -> Any:
        """Places in an operation's arguments, as tensors."""
        if isinstance(values, Place):
            return self.tensor(values)
        if isinstance(values, dict):
            return {name: self.arguments(value) for name, value in values.items()}
        if isinstance(values, (tuple, list)):
            return type(values)(map(self.arguments, values))
        return values


class _Call:
    """One of PyTorch's operations, or a launch in the interpreter."""

    def __init__(self, step: Step) -> None:
        self.step = step

    def __call__(self, run: _Replay) -> None:
        function, args, kwargs, results, _ = self.step
        found = function(*run.arguments(args), **run.arguments(kwargs))
        if results:
            each = found if isinstance(found, (tuple, list)) else (found,)
            for piece, result in zip(results, each, strict=True):
                run.bind(piece, result)


class _Drop:
    """Lets go of results."""

    def __init__(self, pieces: list[int]) -> None:
        self.pieces = pieces

    def __call__(self, run: _Replay) -> None:
        for i in self.pieces:
            run.tensors[i] = None


TAPES = 256  # a DenseNet of four blocks takes eight for a size and batch of images

_tapes: OrderedDict[Key, Tape | None] = OrderedDict()
_seen: set[int] = set()  # hashes of keys: one that is mistaken for another is recorded early
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
    if launch.observed() or launch.thread.recorder is not None:
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
        function: what it does must depend only on what its inputs look like and on ``rest``.
        moving: inputs that are new at every call.
        fixed: inputs that usually lie where they did: a stage's parameters.
        rest: hashable.
    """
    if not enabled():
        return function(backend, moving, fixed, *rest)
    device = fixed[0].device
    key = (
        function, device, _extension.tf32(), rest, tuple(map(_look, moving)),
        tuple([None if t is None else (t.data_ptr(), t.dtype, t.shape, t.stride()) for t in fixed]),
    )  # fmt: skip
    tape = _tapes.get(key)
    if tape is not None:
        _tapes.move_to_end(key)
        return tape(moving, fixed, device)
    if key in _tapes or hash(key) not in _seen:
        if len(_seen) > 16 * TAPES:
            _seen.clear()
        _seen.add(hash(key))
        return function(backend, moving, fixed, *rest)
    with Recorder(moving, fixed) as recorder:
        outputs = function(backend, moving, fixed, *rest)
    places = [None if t is None else recorder.place(t) for t in outputs]
    _tapes[key] = None if recorder.failure else Tape(recorder, places)
    while len(_tapes) > TAPES:
        _tapes.popitem(last=False)
    return outputs


def _look(t: Tensor | None) -> tuple | None:
    """What of an input that moves decides which kernels run."""
    if t is None:
        return None
    aligned = not t.data_ptr() % ALIGNMENT
    return t.dtype, t.shape, t.stride(), aligned, t.storage_offset() != 0
