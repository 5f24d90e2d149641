"""Which configuration runs: defaults, winners from the file, and how winners are found."""

from __future__ import annotations

import json

import pytest
import torch

from memdense.__main__ import main
from memdense.backends import triton_reason
from memdense.backends.triton import launch, tiles, tune, tuning
from memdense.backends.triton.tuning import Config, choose

A, B, C = Config(64, 64, 32, 4, 2), Config(128, 64, 32, 8, 2), Config(32, 64, 32, 4, 2)
HALF = torch.bfloat16


@pytest.fixture(autouse=True)
def file(tmp_path, monkeypatch):
    monkeypatch.setenv("MEMDENSE_TUNING", str(tmp_path / "folder" / "tuning.json"))
    tuning.winners.cache_clear()
    yield tmp_path / "folder" / "tuning.json"
    tuning.winners.cache_clear()


def test_the_default_comes_first():
    assert choose("kernel", HALF, (1000, 64), (A, B)) == A


def test_winners_hold_for_their_bucket_and_device(file):
    entry = tuning.bucket("kernel", HALF, 1000, 64)
    assert tuning.save({entry: B}) == file
    assert choose("kernel", HALF, (1000, 64), (A, B)) == B
    assert choose("kernel", HALF, (513, 33), (A, B)) == B
    for other in ((1025, 64), (1000, 65), (512, 64)):
        assert choose("kernel", HALF, other, (A, B)) == A
    assert choose("kernel", torch.float16, (1000, 64), (A, B)) == A
    assert choose("kernel", HALF, (1000, 64), (A, C)) == A  # no longer a candidate
    tuning.save({"more": C})
    kept = json.loads(file.read_text())
    assert kept == {tuning.device_name(): {entry: list(B), "more": list(C)}}
    file.write_text(json.dumps({"another device": kept[tuning.device_name()]}))
    tuning.winners.cache_clear()
    assert choose("kernel", HALF, (1000, 64), (A, B)) == A


@pytest.mark.parametrize("content", ["{", "[]", '{"%s": 3}', '{"%s": {"a": "b"}}'])
def test_a_broken_file_is_ignored_with_a_warning(file, content):
    file.parent.mkdir()
    file.write_text(content.replace("%s", tuning.device_name()))
    with pytest.warns(UserWarning, match="memdense ignores"):
        assert choose("kernel", HALF, (1000, 64), (A, B)) == A
    with pytest.warns(UserWarning, match="memdense ignores"):
        tuning.save({tuning.bucket("kernel", HALF, 1000, 64): B})
    assert choose("kernel", HALF, (1000, 64), (A, B)) == B


def test_forced_goes_before_all():
    tuning.save({tuning.bucket("kernel", HALF, 8): B})
    with tuning.forced("kernel", C):
        assert choose("kernel", HALF, (8,), (A, B)) == C
        assert choose("other", HALF, (8,), (A, B)) == A
    assert choose("kernel", HALF, (8,), (A, B)) == B


def test_large_tiles_are_for_large_shared_memory(monkeypatch):
    """Not for 12.x, where a program has 99 KB."""
    capabilities = {(8, 0): False, (8, 9): False, (9, 0): True, (10, 0): True, (12, 0): False}
    for capability, expected in capabilities.items():
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        assert tiles.hopper.__wrapped__(torch.device("cuda")) == expected, capability


@pytest.mark.skipif(not launch.INTERPRETED, reason="runs in Triton's interpreter")
def test_every_candidate_is_timed_in_its_own_configuration():
    """A timer that counts launches of the kernel by its grid finds the candidates apart."""
    size = (300, 16, 16)
    # the gradients have one candidate in float32: nothing to choose
    (problem,) = tune.problems(torch.float32, [size], torch.device("cpu"))
    assert problem.kernel == "forward_1x1"

    def programs(run) -> float:
        with launch.recorded(dry=True) as log:
            run()
        return float(next(e.plan.grid[0] for e in log if e.plan.name == problem.kernel))

    winner, times = tune.fastest(problem, programs)
    assert times == {c: -(-size[0] // c.rows) for c in problem.candidates}
    assert winner == max(problem.candidates, key=lambda c: c.rows)
    tuning.save({problem.entry: winner})
    with launch.recorded(dry=True) as log:
        problem.run()
    assert log[0].plan.constants[0] == winner.rows


@pytest.mark.skipif(torch.cuda.is_available(), reason="would tune")
def test_tuning_needs_a_device(capsys, monkeypatch):
    assert main(["tune"]) == 2
    assert "there is no CUDA device" in capsys.readouterr().err
    assert main(["tune", "--dtype", "int8"]) == 2
    assert "expected a dtype among bf16, fp16, fp32, got 'int8'" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, device.index))
    assert main(["tune"]) == 2
    assert "nothing to tune: its kernels need compute capability 8.0" in capsys.readouterr().err
    triton_reason.cache_clear()
