"""examples/train.py, run as a user would, on little."""

import gzip
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))

for extra in ("matplotlib", "rich", "sklearn", "torchvision", "tqdm"):  # or train.py exits
    pytest.importorskip(extra)

import comparison  # noqa: E402
import train  # noqa: E402

SMALL = ["--device", "cpu", "--arch", "bc10-12"]


def write_mnist(folder: Path, count: int, zipped: bool) -> tuple[np.ndarray, np.ndarray]:
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (count, 28, 28), np.uint8)
    labels = rng.integers(0, 10, count, np.uint8)
    for part in ("train", "t10k"):
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            data = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
            data += array.tobytes()
            file = raw / f"{part}-{kind}-ubyte{'.gz' if zipped else ''}"
            file.write_bytes(gzip.compress(data) if zipped else data)
    return images, labels


def test_it_learns_the_digits(capsys):
    (run,) = train.main([*SMALL, "--epochs", "5"])
    assert run.model.features.efficient
    assert run.accuracies[-1] > 0.9
    assert len(run.losses) == 5 * (1437 // 64)
    assert run.losses[-1] < 0.5 < run.losses[0]
    out = capsys.readouterr().out
    assert f"epoch 5   efficient: loss {np.mean(run.losses[-22:]):.4f}" in out
    assert f"test {run.accuracies[-1]:.2%}" in out


def test_the_same_seed_gives_the_same_run_and_another_another():
    first, again, other = (
        train.main([*SMALL, "--epochs", "1", "--batch-size", "256", "--seed", seed])[0].losses
        for seed in "001"
    )
    assert first == again
    assert first != other


def test_plain_and_efficient_take_the_same_way():
    (plain,), (efficient,) = (
        train.main([*SMALL, "--epochs", "1", "--batch-size", "128", "--lr", "0.01", *more])
        for more in (["--plain"], [])
    )
    assert not plain.model.features.efficient and efficient.model.features.efficient
    # Rounding grows from step to step: from 1e-7 to 1e-5 here, and to 1e-1 at ten times the rate.
    assert plain.losses[:8] == pytest.approx(efficient.losses[:8], rel=1e-3)
    assert plain.losses[:2] == pytest.approx(efficient.losses[:2], rel=1e-5)


@pytest.mark.parametrize("workers", ["0", "2"])
def test_resuming_is_as_if_never_interrupted(tmp_path, monkeypatch, workers):
    flags = [*SMALL, "--epochs", "2", "--batch-size", "256", "--workers", workers]
    (straight,) = train.main(flags)

    class Interrupt(Exception):
        pass

    def save_and_stop(run, file, save=train.Run.save):
        save(run, file)
        raise Interrupt

    file = tmp_path / "run.pt"
    with monkeypatch.context() as patch, pytest.raises(Interrupt):
        patch.setattr(train.Run, "save", save_and_stop)
        train.main([*flags, "--checkpoint", str(file)])
    (resumed,) = train.main([*flags, "--resume", str(file), "--checkpoint", str(file)])

    assert len(resumed.seconds) == 5  # only the second epoch's
    assert resumed.losses == straight.losses
    assert resumed.accuracies == straight.accuracies
    assert resumed.schedule.get_last_lr() == straight.schedule.get_last_lr()
    theirs = straight.model.state_dict()
    for name, tensor in resumed.model.state_dict().items():
        assert torch.equal(tensor, theirs[name]), name
    for mine, other in zip(resumed.model.parameters(), straight.model.parameters(), strict=True):
        mine, other = resumed.optimizer.state[mine], straight.optimizer.state[other]
        assert torch.equal(mine["momentum_buffer"], other["momentum_buffer"])
    # and a finished run has nothing left to do
    (finished,) = train.main([*flags, "--resume", str(file)])
    assert finished.losses == straight.losses and not finished.seconds


def test_a_checkpoint_is_whole_or_the_one_before(tmp_path, monkeypatch):
    file = tmp_path / "run.pt"
    (run,) = train.main(
        [*SMALL, "--epochs", "1", "--batch-size", "1024", "--checkpoint", str(file)]
    )
    before = file.read_bytes()

    def fail_halfway(state, target):
        Path(target).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail_halfway)
    with pytest.raises(OSError, match="disk full"):
        run.save(file)
    assert file.read_bytes() == before


def test_resuming_refuses_another_run(tmp_path):
    file = tmp_path / "run.pt"
    flags = [*SMALL, "--batch-size", "1024", "--epochs", "1"]
    train.main([*flags, "--checkpoint", str(file)])
    with pytest.raises(SystemExit, match=r"--lr 0\.1, this run 0\.5"):
        train.main([*flags, "--lr", "0.5", "--resume", str(file)])
    file.write_bytes(b"no checkpoint")
    with pytest.raises(SystemExit, match=r"run\.pt is no checkpoint"):
        train.main([*flags, "--resume", str(file)])


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ("mnist", "MNIST/raw/train-images-idx3-ubyte or train-images-idx3-ubyte.gz"),
        ("fashion-mnist", "FashionMNIST/raw/train-images-idx3-ubyte or train-images-idx3-ubyte.gz"),
        ("cifar10", "cifar-10-batches-py"),
        ("imagefolder", "train/CLASS/"),
    ],
)
def test_missing_files_are_named(tmp_path, data, expected):
    with pytest.raises(SystemExit, match=re.escape(f"{tmp_path}/{expected}")):
        train.main([*SMALL, "--data", data, "--data-dir", str(tmp_path)])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--data mnist", "--data mnist needs --data-dir DIR"),
        ("--arch bc12-12", "L one of 10, 16, 22, ..., but got 'bc12-12'"),
        ("--epochs 0", "expected a positive whole number, but got '0'"),
        ("--compare --resume run.pt", "--compare goes with neither"),
        ("--resume absent.pt", "there is no file absent.pt"),
        ("--plot run.jpeg2", "--plot draws .png, .svg or .pdf, not run.jpeg2"),
        ("--plot absent/run.png", "there is no folder absent"),
        ("--checkpoint tests", "tests is a folder"),
        ("--seed=9223372036854775808", "--seed must be below"),
        ("--lr=-1", "--lr and --weight-decay must not be negative"),
        ("--batch-size 2000", "expected a --batch-size"),
        ("--epochs 1 --lr 1e30", "the loss is nan at step"),
    ],
)
def test_errors_say_what_was_expected(capsys, flags, message):
    with pytest.raises(SystemExit) as stopped:
        train.main(SMALL + flags.split())
    assert stopped.value.code not in (0, None)
    assert message in f"{stopped.value.code} {capsys.readouterr().err}"


@pytest.mark.parametrize("zipped", [False, True])
def test_mnist_files_are_read(tmp_path, zipped):
    images, labels = write_mnist(tmp_path, 30, zipped)
    options = train.parse_options(["--data", "mnist", "--data-dir", str(tmp_path)])
    train_set, test_set, classes = train.load_data(options, train.SOURCES["mnist"])
    assert (len(train_set), len(test_set), classes) == (30, 30, 10)
    image, label = test_set[7]
    assert label == labels[7]
    pixels = (images[7].astype(np.float32) / 255 - 0.131) / 0.308
    torch.testing.assert_close(image[0], torch.from_numpy(pixels))


def test_it_trains_on_folders_of_images(tmp_path):
    for part in ("train", "val"):
        for label in ("dark", "light"):
            (tmp_path / part / label).mkdir(parents=True)
            for i in range(4):
                image = np.full((40, 50, 3), 20 + i + 200 * (label == "light"), np.uint8)
                Image.fromarray(image).save(tmp_path / part / label / f"{i}.png")
    flags = ["--data", "imagefolder", "--data-dir", str(tmp_path), "--image-size", "32"]
    (run,) = train.main([*SMALL, *flags, "--batch-size", "4", "--epochs", "2", "--amp"])
    assert run.model.classifier.out_features == 2
    assert len(run.losses) == 4


def test_bc100_12_is_the_paper_s():
    model = train.find_arch("bc100-12")(num_classes=10, small_inputs=True)
    assert sum(p.numel() for p in model.parameters()) == 769_162


def test_the_comparison_is_measured_and_drawn(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(comparison, "densenet121", lambda: train.DenseNet(8, (2, 2), 16))
    monkeypatch.setenv("COLUMNS", "100")
    file = tmp_path / "run.png"
    plain, efficient = train.main(
        [*SMALL, "--epochs", "1", "--batch-size", "128", "--compare", "--plot", str(file)]
    )
    assert (plain.name, efficient.name) == ("plain", "efficient")
    assert not plain.model.features.efficient and efficient.model.features.efficient
    assert plain.losses[0] == pytest.approx(efficient.losses[0], rel=1e-5)
    assert len(plain.seconds) == len(efficient.seconds) == 11

    out = capsys.readouterr().out
    rows = {line.split("  ")[0]: line.split() for line in map(str.strip, out.splitlines())}
    assert rows["test accuracy"][2:4] == [f"{run.accuracies[-1]:.2%}" for run in (plain, efficient)]
    for what in ("peak memory of a step", "kept for backward"):
        assert 0 < float(rows[what][-1]) < 1
    for what in ("logits", "gradients"):
        assert float(rows[f"{what}, relative to the largest"][-1]) < 1e-10
    assert f"torch {torch.__version__}" in out and "batch 128" in out
    assert str(file) in out
    assert Image.open(file).size[0] == 2000


def test_one_run_is_drawn(tmp_path):
    file = tmp_path / "run.svg"
    train.main([*SMALL, "--epochs", "1", "--batch-size", "1024", "--plot", str(file)])
    assert file.read_text().rstrip().endswith("</svg>")


def test_two_processes_keep_the_same_weights(tmp_path):
    script = tmp_path / "both.py"
    script.write_text(
        f"import os, sys\n"
        f"sys.path.insert(0, {str(EXAMPLES)!r})\n"
        f"import torch, train\n"
        f"(run,) = train.main()\n"
        f"result = {{'state': run.model.state_dict(), 'losses': run.losses,"
        f" 'accuracies': run.accuracies}}\n"
        f"torch.save(result, {str(tmp_path)!r} + f'/{{os.environ[\"RANK\"]}}.pt')\n"
    )
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    flags = [*SMALL, "--threads", "1", "--epochs", "1", "--batch-size", "128"]
    flags += ["--checkpoint", str(tmp_path / "run.pt")]
    done = subprocess.run(
        [*launcher, "--nproc-per-node", "2", str(script), *flags],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("epoch 1 ") == 1
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert len(first["losses"]) == 11
    assert first["losses"] != second["losses"], "both processes saw the same images"
    assert first["accuracies"] == second["accuracies"]
    saved = torch.load(tmp_path / "run.pt")["model"]
    for name, tensor in first["state"].items():
        assert torch.equal(tensor, second["state"][name]), name
        assert torch.equal(tensor, saved[name]), name
