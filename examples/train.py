"""Train a memory-efficient DenseNet-BC on images, alone or beside a plain one.

    python examples/train.py                               # on scikit-learn's digits, no download
    python examples/train.py --compare --plot demo.png     # beside efficient=False
    python examples/train.py --data cifar10 --data-dir data --download --arch bc100-12 --epochs 200
    torchrun --nproc-per-node 2 examples/train.py --data imagefolder --data-dir imagenet \\
        --arch densenet121 --batch-size 256 --workers 8 --amp --checkpoint run.pt

On the CPU a run repeats bit for bit, also where it was interrupted and resumed.
"""

import argparse
import gzip
import math
import os
import re
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import fmean, median
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Subset

import memdense
from memdense import DenseNet

try:
    import comparison
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split
    from torchvision import datasets, transforms
    from tqdm import tqdm
except ModuleNotFoundError as error:
    sys.exit(f"train.py: {error}; pip install 'memdense[examples]' brings what the examples need")


class Source(NamedTuple):
    """A data set's images, and how those for training are varied."""

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    shift: int = 0
    flip: bool = False


SOURCES = {
    "digits": Source(8, (0.305,), (0.376,), shift=1),
    "mnist": Source(28, (0.131,), (0.308,), shift=2),
    "fashion-mnist": Source(28, (0.286,), (0.353,), shift=2, flip=True),
    "cifar10": Source(32, (0.491, 0.482, 0.447), (0.247, 0.243, 0.262), shift=4, flip=True),
    "imagefolder": Source(224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), flip=True),
}
IMAGENET_ARCHS = ("densenet121", "densenet161", "densenet169", "densenet201", "densenet264")
# What a run must share with the one that it continues.
SETTINGS = (
    "data",
    "image_size",
    "batch_size",
    "arch",
    "epochs",
    "lr",
    "weight_decay",
    "seed",
    "amp",
)
STATEFUL = ("model", "optimizer", "schedule")


def fail(message: str) -> NoReturn:
    sys.exit(f"train.py: {message}")


def parse_options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="train.py",
        description="Train a memory-efficient DenseNet-BC on images, alone or beside a plain one.",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=26, width=96),
    )
    default = "(default: %(default)s)"
    add = parser.add_argument_group("data").add_argument
    add("--data", choices=SOURCES, default="digits", help=default)
    layout = "as torchvision lays them out; imagefolder: DIR/train/CLASS/ and DIR/val/CLASS/"
    add("--data-dir", metavar="DIR", type=Path, help=f"the files, {layout}")
    add("--download", action="store_true", help="let torchvision download them to DIR")
    add("--image-size", metavar="N", type=positive, default=224, help=f"for imagefolder {default}")
    add("--workers", metavar="N", type=int, default=0, help=f"processes that load images {default}")

    group = parser.add_argument_group("model")
    add, add_one = group.add_argument, group.add_mutually_exclusive_group().add_argument
    archs = f"bcL-k of depth L and growth rate k, {', '.join(IMAGENET_ARCHS)}"
    add("--arch", metavar="NAME", type=arch_name, default="bc40-12", help=f"{archs} {default}")
    add("--keep-bottlenecks", action="store_true", help="recompute less: more memory, less time")
    add_one("--plain", action="store_true", help="train the plain model (efficient=False)")
    add_one("--compare", action="store_true", help="train both, side by side, and measure them")

    add = parser.add_argument_group("training").add_argument
    add("--epochs", metavar="N", type=positive, default=10, help=default)
    add("--batch-size", metavar="N", type=positive, default=64, help=f"in all {default}")
    add("--lr", metavar="X", type=float, default=0.1, help=f"at the schedule's peak {default}")
    add("--weight-decay", metavar="X", type=float, default=5e-4, help=default)
    add("--seed", metavar="N", type=int, default=0, help=f"of all that is random {default}")
    add("--amp", action="store_true", help="autocast to bfloat16")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help=default)
    add("--threads", metavar="N", type=positive, help="on the CPU (default: as PyTorch chooses)")

    add = parser.add_argument_group("files").add_argument
    add("--checkpoint", metavar="FILE", type=Path, help="save the run to it after each epoch")
    add("--resume", metavar="FILE", type=Path, help="continue the run saved in it")
    add("--plot", metavar="FILE", type=Path, help="draw the run: .png, .svg or .pdf")

    options = parser.parse_args(argv)
    if options.data != "digits" and options.data_dir is None:
        parser.error(f"--data {options.data} needs --data-dir DIR")
    if options.compare and (options.checkpoint or options.resume or "RANK" in os.environ):
        parser.error("--compare goes with neither --checkpoint nor --resume nor torchrun")
    if options.seed >= 1 << 63:
        parser.error("--seed must be below 2^63")
    if min(options.seed, options.workers, options.lr, options.weight_decay) < 0:
        parser.error("--seed, --workers, --lr and --weight-decay must not be negative")
    if options.resume and not options.resume.is_file():
        parser.error(f"there is no file {options.resume} to resume from")
    if options.plot and options.plot.suffix not in (".png", ".svg", ".pdf"):
        parser.error(f"--plot draws .png, .svg or .pdf, not {options.plot.name}")
    for file in filter(None, (options.checkpoint, options.plot)):
        if not file.absolute().parent.is_dir():
            parser.error(f"there is no folder {file.parent} for {file.name}")
        if file.is_dir():
            parser.error(f"{file} is a folder")
    return options


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected a positive whole number, but got {text!r}")
    return int(text)


def arch_name(name: str) -> str:
    find_arch(name)
    return name


def find_arch(name: str) -> Callable[..., DenseNet]:
    """A named DenseNet or, for "bc100-12", the paper's BC with three blocks, L = 100 and k = 12."""
    if name in IMAGENET_ARCHS:
        return getattr(memdense, name)
    if numbers := re.fullmatch(r"bc(\d+)-(\d+)", name):
        depth, growth_rate = int(numbers[1]), int(numbers[2])
        # A layer has two convolutions; four more: the first, two transitions, the classifier.
        layers, rest = divmod(depth - 4, 6)
        if layers > 0 and rest == 0 and growth_rate > 0:
            return partial(DenseNet, growth_rate, (layers,) * 3, 2 * growth_rate)
    raise argparse.ArgumentTypeError(
        f"expected {', '.join(IMAGENET_ARCHS)} or bcL-k with L one of 10, 16, 22, ..., "
        f"but got {name!r}"
    )


class Arrays(Dataset):
    """Grey images from an array of bytes, (N, H, W)."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, transform: Callable) -> None:
        self.images, self.labels, self.transform = images, labels, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.images[index])), int(self.labels[index])


def load_data(options: argparse.Namespace, source: Source) -> tuple[Dataset, Dataset, int]:
    """Images to train with, images to test with, and the number of classes."""
    name, folder = options.data, options.data_dir
    if name == "imagefolder":
        vary = [transforms.RandomResizedCrop(source.size)]
        fit = [transforms.Resize(source.size * 8 // 7), transforms.CenterCrop(source.size)]
    else:
        vary = [transforms.RandomCrop(source.size, padding=source.shift)]
        fit = []
    if source.flip:
        vary.append(transforms.RandomHorizontalFlip())
    as_tensor = [transforms.ToTensor(), transforms.Normalize(source.mean, source.std)]
    vary, fit = transforms.Compose(vary + as_tensor), transforms.Compose(fit + as_tensor)

    if name == "digits":
        x, y = load_digits(return_X_y=True)
        x = (x.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
        x, test_x, y, test_y = train_test_split(x, y, test_size=360, stratify=y, random_state=0)
        return Arrays(x, y, vary), Arrays(test_x, test_y, fit), 10

    if name == "imagefolder":
        for part in (folder / "train", folder / "val"):
            if not any(part.glob("*/")):
                fail(f"expected images in {part}/CLASS/, but found no folders there")
        train = datasets.ImageFolder(folder / "train", vary)
        test = datasets.ImageFolder(folder / "val", fit)
        if train.classes != test.classes:
            odd = ", ".join(sorted(set(train.classes) ^ set(test.classes)))
            fail(f"expected the same classes in train and val of {folder}, but only one has {odd}")
        return train, test, len(train.classes)

    if name == "cifar10":
        batches = folder / "cifar-10-batches-py"
        if not options.download and not batches.is_dir():
            fail(f"expected the folder {batches}, but found none; --download gets it")
        train = datasets.CIFAR10(folder, transform=vary, download=options.download)
        return train, datasets.CIFAR10(folder, train=False, transform=fit), 10

    dataset = datasets.MNIST if name == "mnist" else datasets.FashionMNIST
    if options.download:
        dataset(folder, download=True)
    raw = folder / dataset.__name__ / "raw"
    return Arrays(*read_mnist(raw, "train"), vary), Arrays(*read_mnist(raw, "t10k"), fit), 10


def read_mnist(folder: Path, part: str) -> list[np.ndarray]:
    """Images and labels. Also of gzipped files, which torchvision does not read."""
    arrays = []
    for name in (f"{part}-images-idx3-ubyte", f"{part}-labels-idx1-ubyte"):
        file, zipped = folder / name, folder / f"{name}.gz"
        if not file.exists() and not zipped.exists():
            fail(f"expected {file} or {zipped.name}, but found neither; --download gets them")
        data = file.read_bytes() if file.exists() else gzip.decompress(zipped.read_bytes())
        shape = np.frombuffer(data, ">u4", count=data[3], offset=4)
        arrays.append(np.frombuffer(data, np.uint8, offset=4 + shape.nbytes).reshape(shape))
    return arrays


class Run:
    """A model in training, and how it goes."""

    def __init__(self, name: str, model: DenseNet, steps: int, options: argparse.Namespace) -> None:
        self.name, self.model, self.options = name, model, options
        self.device = next(model.parameters()).device
        self.net: nn.Module = DistributedDataParallel(model) if is_distributed() else model
        self.optimizer = torch.optim.SGD(
            model.parameters(), options.lr, 0.9, nesterov=True, weight_decay=options.weight_decay
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, partial(one_cycle, steps=steps)
        )
        self.losses: list[float] = []  # of each step
        self.hits: list[float] = []  # the share of each step's images that were right
        self.seconds: list[float] = []  # of each step
        self.accuracies: list[float] = []  # on the test images, after each epoch

    def step(self, images: Tensor, labels: Tensor) -> None:
        start = time.perf_counter()
        with autocast(self.device, self.options):
            logits = self.net(images)
            loss = F.cross_entropy(logits, labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        self.losses.append(loss.item())  # waits for the device
        self.seconds.append(time.perf_counter() - start)
        self.hits.append((logits.argmax(1) == labels).float().mean().item())
        if not math.isfinite(self.losses[-1]):
            fail(f"the loss is {self.losses[-1]} at step {len(self.losses)}; try a lower --lr")

    @torch.no_grad()
    def evaluate(self, loader: DataLoader) -> None:
        if is_distributed():  # the running statistics are each process's own
            for buffer in self.model.buffers():
                distributed.broadcast(buffer, 0)
        self.model.eval()
        counts = torch.zeros(2, dtype=torch.long, device=self.device)  # right, all
        for images, labels in loader:
            with autocast(self.device, self.options):
                answers = self.model(images.to(self.device)).argmax(1)
            counts[0] += (answers == labels.to(self.device)).sum()
            counts[1] += len(labels)
        self.model.train()
        if is_distributed():
            distributed.all_reduce(counts)
        self.accuracies.append(int(counts[0]) / int(counts[1]))

    def save(self, file: Path) -> None:
        state: dict[str, Any] = {name: getattr(self, name).state_dict() for name in STATEFUL}
        state["settings"] = {name: getattr(self.options, name) for name in SETTINGS}
        state |= {"losses": self.losses, "accuracies": self.accuracies}
        unfinished = file.with_name(f"{file.name}.part")
        torch.save(state, unfinished)
        unfinished.replace(file)  # at no moment is there half a checkpoint

    def load(self, file: Path) -> None:
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
            settings = state["settings"]
        except Exception as error:  # of many kinds, depending on what the file holds
            fail(f"{file} is no checkpoint of this script: {type(error).__name__}")
        for name in SETTINGS:
            here, there = getattr(self.options, name), settings[name]
            if here != there:
                option = f"--{name.replace('_', '-')}"
                fail(f"cannot resume from {file}: it has {option} {there}, this run {here}")
        for name in STATEFUL:
            getattr(self, name).load_state_dict(state[name])
        self.losses, self.accuracies = state["losses"], state["accuracies"]


def one_cycle(step: int, steps: int) -> float:
    """Share of the peak learning rate: a line up for a quarter of the steps, a cosine down."""
    up = max(1, steps // 4)
    if step < up:
        return (step + 1) / up
    return (1 + math.cos(math.pi * (step - up) / max(1, steps - up))) / 2


def autocast(device: torch.device, options: argparse.Namespace) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=options.amp)


def is_distributed() -> bool:
    return distributed.is_available() and distributed.is_initialized()


def train(runs: list[Run], loader: DataLoader, test_loader: DataLoader, rank: int) -> None:
    """Train all runs in turn on the same batches, up to the last epoch."""
    last, steps = runs[-1], len(loader)
    options, done = last.options, len(last.accuracies)
    bar = tqdm(total=options.epochs * steps, initial=done * steps, disable=rank > 0 or None)
    for epoch in range(done, options.epochs):
        # Order and augmentation follow from the epoch, so that resuming needs no random state.
        seeds = np.random.SeedSequence((options.seed, epoch, rank))
        torch.manual_seed(int(seeds.generate_state(1)[0]))
        if isinstance(loader.sampler, DistributedSampler):
            loader.sampler.set_epoch(epoch)
        for i, batch in enumerate(loader, 1):
            images, labels = (part.to(last.device) for part in batch)
            for run in runs[:: 1 if i % 2 else -1]:  # in turn the first
                run.step(images, labels)
            speed = options.batch_size / median(last.seconds[-20:])
            right = fmean(last.hits[-i:])
            bar.set_postfix_str(
                f"loss {last.losses[-1]:.3f}, {right:.1%} right, {speed:.0f} images/s",
                refresh=False,
            )
            bar.update()
        for run in runs:
            run.evaluate(test_loader)
        if rank == 0:
            line = "   ".join(
                f"{run.name}: loss {fmean(run.losses[-steps:]):.4f}, test {run.accuracies[-1]:.2%}"
                for run in runs
            )
            bar.write(f"epoch {epoch + 1:{len(str(options.epochs))}}   {line}")
            if options.checkpoint:
                last.save(options.checkpoint)
    bar.close()


def make_loaders(
    options: argparse.Namespace, source: Source, rank: int, world: int
) -> tuple[DataLoader, DataLoader, int]:
    """Loaders of this process's training and test images, and the number of classes."""
    try:
        train_set, test_set, classes = load_data(options, source)
    except (OSError, RuntimeError) as error:  # as torchvision raises them
        fail(f"cannot load {options.data}: {error}")
    if options.batch_size % world or options.batch_size > len(train_set):
        fail(
            f"expected a --batch-size that {world} processes can share and the {len(train_set)} "
            f"training images can fill, but got {options.batch_size}"
        )
    if rank == 0:
        print(f"{options.data}: {len(train_set):,} images to train, {len(test_set):,} to test")
    sampler = DistributedSampler(train_set, seed=options.seed) if world > 1 else None
    loader = partial(
        DataLoader, batch_size=options.batch_size // world, num_workers=options.workers
    )
    share = Subset(test_set, range(rank, len(test_set), world))
    return (
        loader(train_set, sampler=sampler, shuffle=sampler is None, drop_last=True),
        loader(share),
        classes,
    )


def main(argv: list[str] | None = None) -> list[Run]:
    options = parse_options(argv)
    on_cuda = options.device != "cpu" and torch.cuda.is_available()
    if options.device == "cuda" and not on_cuda:
        fail("--device cuda needs a CUDA device, but PyTorch finds none")
    device = torch.device("cpu")
    if on_cuda:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        torch.backends.cudnn.deterministic = True
    if options.threads:
        torch.set_num_threads(options.threads)
    rank, world = 0, 1
    if "RANK" in os.environ:  # as torchrun starts it
        distributed.init_process_group("nccl" if on_cuda else "gloo")
        rank, world = distributed.get_rank(), distributed.get_world_size()

    source = SOURCES[options.data]
    if options.data == "imagefolder":
        source = source._replace(size=options.image_size)
    loader, test_loader, classes = make_loaders(options, source, rank, world)
    torch.manual_seed(options.seed)
    model = find_arch(options.arch)(
        num_classes=classes,
        in_channels=len(source.mean),
        small_inputs=source.size <= 64,
        efficient=not options.plain,
        keep_bottlenecks=options.keep_bottlenecks,
    ).to(device)
    hardware = (
        torch.cuda.get_device_name() if on_cuda else f"CPU (threads: {torch.get_num_threads()})"
    )
    where = f"{hardware}, torch {torch.__version__}"
    if rank == 0:
        parameters = sum(p.numel() for p in model.parameters())
        print(f"{options.arch}: {parameters:,} parameters; {where}", flush=True)

    measured = None
    models = {"plain" if options.plain else "efficient": model}
    if options.compare:
        images, labels = (part.to(device) for part in next(iter(loader)))
        with autocast(device, options):
            measured = comparison.measure(options.arch, model, images, labels)
        models = comparison.plain_and_efficient(model)
    steps = options.epochs * len(loader)
    runs = [Run(name, twin, steps, options) for name, twin in models.items()]
    if options.resume:
        runs[0].load(options.resume)
        if len(runs[0].accuracies) == options.epochs and rank == 0:
            print(f"{options.resume}: all {options.epochs} epochs were trained already")
    train(runs, loader, test_loader, rank)

    if rank == 0 and measured:
        comparison.print_comparison(*runs, measured, f"{where}, batch {options.batch_size}")
    if rank == 0 and options.plot:
        comparison.draw(runs, measured, options.plot)
        print(f"plot: {options.plot.absolute()}")
    if is_distributed():
        distributed.destroy_process_group()
    return runs


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        fail("interrupted")
