"""What lab0 promises, a test for each promise. `make test` runs them, without a network.

A fixture is a function that prepares something: a test that names it as an argument gets what it
returns. pytest brings some: tmp_path is an empty folder, capsys has what was printed, and
monkeypatch.setattr replaces something until the test ends. pytest.raises expects an error, and
parametrize runs a test once for each of some values.

For a lab of your own, change what no longer holds: the numbers, `run`, cifar10_root, the recipe.
"""

import copy
import hashlib
import itertools
import json
import pickle
import random
import re
import runpy
import shutil
import socket
import sys
from collections import Counter
from contextlib import nullcontext
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread, Timer
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torchvision.transforms as T
from matplotlib.figure import Figure
from matplotlib.image import imsave
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parameters_to_vector, prune
from torch.optim import SGD
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import DataLoader, TensorDataset
from torchvision.datasets import CIFAR10

import lab0


# ---- The tutorial's numbers ------------------------------------------------------------------
def test_features_and_logits_have_the_tutorials_shapes():
    model = lab0.VGG()
    images = torch.rand(2, 3, 32, 32)
    assert model.backbone(images).shape == (2, 512, 2, 2)
    assert model(images).shape == (2, 10)


def test_model_has_9_2_million_parameters():
    assert lab0.count_params(lab0.VGG()) == 9_228_362


def test_an_image_takes_606_million_macs():
    assert lab0.count_macs(lab0.VGG(), torch.zeros(1, 3, 32, 32)) == 606_164_480


def test_learning_rate_rises_to_0_4_at_step_588_of_1960_and_falls_to_0():
    lr_lambda = lab0.make_lr_lambda(steps_per_epoch=98, num_epochs=20)
    rates = [0.4 * lr_lambda(step) for step in range(1961)]
    assert rates[0] == rates[1960] == 0
    assert rates[588] == max(rates) == 0.4
    assert rates[294] == pytest.approx(0.2)  # halfway up
    assert rates[1274] == pytest.approx(0.2)  # halfway down


# ---- Fixtures: a small CIFAR-10, and runs of the lab with a small network ------------------------
CLASSES = ["plane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
on_each_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=on_cuda)])


@pytest.fixture
def cifar10_root(tmp_path, monkeypatch):
    """A folder with a CIFAR-10 of 200 + 40 random images, whose MD5 sums torchvision accepts."""
    folder = tmp_path / "data" / "cifar10" / CIFAR10.base_folder
    folder.mkdir(parents=True)
    md5 = {}
    for name in ["batches.meta", *(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        images = np.random.default_rng(len(md5)).integers(256, size=(40, 3072), dtype=np.uint8)
        content = {"data": images, "labels": 4 * list(range(10)), "label_names": CLASSES}
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
        md5[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
    monkeypatch.setattr(CIFAR10, "train_list", [(n, md5[n]) for n in md5 if n.startswith("data")])
    monkeypatch.setattr(CIFAR10, "test_list", [("test_batch", md5["test_batch"])])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": md5["batches.meta"]})
    monkeypatch.setattr(lab0, "SOURCES", [])  # nothing is downloaded
    return folder.parent


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A function that runs the lab in a second; it returns metrics.json and the checkpoint."""
    # Fewer channels. The last number stays 512, since the classifier has as many inputs.
    monkeypatch.setattr(lab0.VGG, "ARCH", [8, "M", 8, "M", 8, "M", 512, "M"])

    def run_lab(*flags, output_dir=tmp_path / "run", pictures=False):
        with monkeypatch.context() as patch:
            for plot in ["plot_samples", "plot_lr_schedule", "plot_history", "plot_predictions"]:
                if not pictures:  # an empty one takes less time
                    patch.setattr(lab0, plot, lambda *args: Figure(figsize=(1, 1)))
            lab0.main(["--device=cpu", f"--output-dir={output_dir}", *flags])
        metrics = json.loads((output_dir / "metrics.json").read_text())
        return metrics, torch.load(output_dir / "checkpoint.pth", weights_only=True)

    return run_lab


def weights_and_losses(checkpoint):
    weights = [weight.tolist() for weight in checkpoint["state_dict"].values()]
    return weights, [record["train_loss"] for record in checkpoint["history"]]


# ---- Main's recipe ---------------------------------------------------------------------------
def test_main_trains_by_the_tutorials_recipe(run, cifar10_root):
    rates, batches, dtypes, losses = [], {True: [], False: []}, [], []

    def note_call(module, inputs, output):
        if isinstance(module, lab0.VGG):
            batches[module.training].append(inputs[0])
            dtypes.append(output.dtype)
        elif isinstance(module, nn.CrossEntropyLoss):
            losses.append((*inputs, output))  # logits, targets, loss

    steps = register_optimizer_step_post_hook(lambda o, *_: rates.append(o.param_groups[0]["lr"]))
    with steps, register_module_forward_hook(note_call):  # in a run of two steps an epoch
        _, checkpoint = run(f"--data-root={cifar10_root}", "--batch-size=100", "--precision=bf16")
    recipe = {"initial_lr": 0.4, "momentum": 0.9, "weight_decay": 5e-4, "nesterov": False}
    assert recipe.items() <= checkpoint["optimizer"]["param_groups"][0].items()
    assert rates == pytest.approx([0.4 * min(step / 12, (40 - step) / 28) for step in range(40)])
    assert all(loss == cross_entropy(logits.float(), targets) for logits, targets, loss in losses)
    orders = torch.cat([targets for _, targets, _ in losses]).reshape(20, 200).tolist()
    for order in orders:  # of the targets in an epoch: all of them, shuffled
        assert sorted(order) == sorted(20 * list(range(10))) != order
    assert len({tuple(order) for order in orders}) == 20 and len(batches[True]) == 40
    dataset = lab0.load_dataset(cifar10_root, "cpu")
    assert dataset["train"].transform is lab0.augment
    plain, evaluated = dataset["test"].images / 255, batches[False][1:]  # [0] was for the MACs
    assert [torch.equal(images, plain) for images in evaluated] == [True] * 20
    assert dtypes[1:] == [torch.bfloat16] * 60


def test_defaults_are_the_tutorials_and_each_script_has_folders_of_its_own(tmp_path):
    args = lab0.parse_args([])
    assert (args.epochs, args.batch_size, args.lr, args.seed) == (20, 512, 0.4, 0)
    assert (args.data_root, args.output_dir) == ("data/cifar10", "outputs/lab0")
    args = lab0.parse_args(["--smoke", "--lr=0.02"])
    assert (args.epochs, args.lr, args.output_dir) == (4, 0.02, "outputs/lab0-smoke")
    lab1 = runpy.run_path(shutil.copy(lab0.__file__, tmp_path / "lab1.py"))
    assert lab1["parse_args"]([]).output_dir == "outputs/lab1"
    assert lab0.parse_args(["--output-dir=~/x"]).output_dir == str(Path("~/x").expanduser())


@pytest.mark.parametrize("gpu, precision", [("H100", "bf16"), ("T4", "fp16")])
def test_auto_precision_is_bf16_on_a_gpu_that_has_it_else_fp16(gpu, precision, monkeypatch):
    def is_bf16_supported(including_emulation=True):
        return gpu == "H100" or including_emulation

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)
    assert lab0.parse_args([]).precision == precision


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_run_learns_in_each_precision(precision, run):
    metrics, checkpoint = run("--smoke", f"--precision={precision}")
    losses = [record["train_loss"] for record in metrics["epochs"]]
    assert losses == sorted(losses, reverse=True)
    assert metrics["test_accuracy"] > 60  # a guess is right for 10%
    data, model = lab0.generate_dataset("cpu")["test"], lab0.VGG()
    model.load_state_dict(checkpoint["state_dict"])
    accuracy = lab0.evaluate(model, lab0.DeviceLoader(data, 10, False), lab0.DTYPES[precision])
    assert accuracy == metrics["test_accuracy"] == metrics["epochs"][3]["test_accuracy"]


def test_a_seed_gives_the_same_bits_again_and_another_seed_others(run):
    (_, once), (_, again), (_, other) = run("--smoke"), run("--smoke"), run("--smoke", "--seed=1")
    assert weights_and_losses(once) == weights_and_losses(again)
    assert weights_and_losses(once)[1][0] != weights_and_losses(other)[1][0]
    assert torch.initial_seed() == 1004 and torch.backends.cudnn.deterministic  # seed 1, epoch 4
    lab0.set_seed(7)
    assert random.random() == random.Random(7).random()
    assert np.random.rand() == np.random.RandomState(7).rand()


def test_an_interrupted_run_resumes_to_the_same_bits(run, tmp_path, monkeypatch, capsys):
    _, whole = run("--smoke", "--precision=fp16")
    for precision in ["bf16", "fp32", "fp16"]:  # another GPU may have another precision
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(lab0, "evaluate", Mock(side_effect=[50.0, KeyboardInterrupt]))
            run("--smoke", "--resume", "--precision=fp16", output_dir=tmp_path / "first")
        folder = (tmp_path / "first").rename(tmp_path / precision)  # and in another folder
        _, resumed = run("--smoke", "--resume", f"--precision={precision}", output_dir=folder)
        printed = capsys.readouterr().out
        assert "starting anew" in printed and f"in {precision}: 1 of 4 epochs" in printed
        assert [record["epoch"] for record in resumed["history"]] == [1, 2, 3, 4]
    assert weights_and_losses(resumed) == weights_and_losses(whole)  # the last one, in fp16, too


def test_a_run_prints_the_tutorials_lines_and_leaves_six_files(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", (tmp_path / "log").open("w"))
    metrics, _ = run("--smoke", pictures=True)
    printed = (tmp_path / "log").read_text()  # what is there at once, before the log is closed
    for line in [
        "[inputs] dtype: torch.float32, shape: torch.Size([10, 3, 32, 32])\n",
        "[targets] dtype: torch.int64, shape: torch.Size([10])\n",
        "(conv3): Conv2d(8, 512, kernel_size=(3, 3)",
        f"#Params: {metrics['params']} (",
        f"#MACs: {metrics['macs']} (",
        f"epoch 4: loss {metrics['epochs'][3]['train_loss']:.4f}, accuracy ",
    ]:
        assert line in printed
    assert capsys.readouterr().err == ""  # no progress bars where there is no terminal
    names = "samples.png lr_schedule.png history.png predictions.png metrics.json checkpoint.pth"
    assert {path.name for path in (tmp_path / "run").iterdir()} == set(names.split())


# ---- Data ------------------------------------------------------------------------------------
@pytest.mark.parametrize("channels, height, width, padding", [(3, 32, 32, 4), (1, 6, 9, 2)])
def test_each_crop_and_flip_of_torchvisions_is_equally_likely(channels, height, width, padding):
    names = {}  # torchvision's, imported later, must not replace lab0's
    for module in ["lab0", "torchvision.transforms", "torchvision.datasets"]:
        exec(f"from {module} import *", names)  # noqa: S102
    picture = np.random.randint(256, size=(height, width, channels), dtype=np.uint8)
    padded = T.functional.pad(T.ToPILImage()(picture), padding)
    numbers = {}  # one for each image that torchvision's crop, flip and ToTensor can make
    for top, left in itertools.product(range(2 * padding + 1), repeat=2):
        crop = T.functional.crop(padded, top, left, height, width)
        for image in [crop, T.functional.hflip(crop)]:
            numbers[T.ToTensor()(image).numpy().tobytes()] = len(numbers)
    lab0.set_seed(0)
    batch = torch.from_numpy(picture).permute(2, 0, 1).repeat(100 * len(numbers), 1, 1, 1)
    images = names["augment"](batch, padding)
    counts = Counter(numbers[image.numpy().tobytes()] for image in images)
    # 100 of each are expected. With fair draws, chi-square leaves these bounds 1 time in 1,000.
    chi_square = sum((counts[number] - 100) ** 2 / 100 for number in range(len(numbers)))
    assert abs(chi_square - len(numbers)) < 3.5 * (2 * len(numbers)) ** 0.5


@on_each_device
@pytest.mark.parametrize("split", ["train", "test"])
def test_data_set_is_what_torchvision_reads_but_on_the_device(split, device, cifar10_root):
    ours = lab0.load_dataset(cifar10_root, device)[split]
    theirs = CIFAR10(cifar10_root, train=(split == "train"), transform=T.ToTensor())
    assert ours.images.device.type == ours.targets.device.type == device
    assert ours.targets.tolist() == theirs.targets and ours.classes == theirs.classes
    # The same bits on the CPU. CUDA multiplies by 1/255, which can round the last bit differently.
    tolerance = 0 if device == "cpu" else 2e-7
    expected = torch.stack([image for image, _ in theirs])
    assert torch.allclose(lab0.to_float(ours.images).cpu(), expected, rtol=tolerance, atol=0)
    assert [label for _, label in ours] == theirs.targets  # a loop, as in the tutorial
    ours.transform = lab0.to_float
    for i in [3, 3 - len(ours), np.int64(3), torch.tensor(3)]:
        assert torch.allclose(ours[i][0].cpu(), expected[3], rtol=tolerance, atol=0)


def test_data_of_another_shape_or_type_is_refused():
    images, targets = torch.zeros(6, 3, 8, 8, dtype=torch.uint8), torch.arange(6)
    for refused in [
        (images.float(), targets),  # would be divided by 255 again
        (images.long(), targets),
        (images[:, 0], targets),
        (images, targets[:, None]),  # compared with [6], all pairs: 600%
        (images, targets[:5]),
    ]:
        with pytest.raises(ValueError, match="images are|targets are"):
            lab0.DeviceDataset(*refused, CLASSES, lab0.to_float)


def make_split(num_images, num_classes=10, device="cpu"):
    """A DeviceDataset of random images, in which the i-th has the target i % num_classes."""
    images = torch.randint(256, (num_images, 3, 32, 32), dtype=torch.uint8, device=device)
    targets = torch.arange(num_images, device=device) % num_classes
    return lab0.DeviceDataset(images, targets, CLASSES[:num_classes], lab0.augment)


def test_a_loader_gives_every_image_once_an_epoch_shuffled_or_in_order():
    def epoch(loader):
        batches = list(loader)
        assert [len(targets) for _, targets in batches] == [12, 12, 12, 12, 2]
        assert all(images.is_contiguous(memory_format=torch.channels_last) for images, _ in batches)
        return [target for _, targets in batches for target in targets.tolist()]

    shuffled, in_order = (lab0.DeviceLoader(make_split(50, 50), 12, s) for s in [True, False])
    assert len(shuffled) == len(in_order) == 5
    first, second = epoch(shuffled), epoch(shuffled)
    assert sorted(first) == sorted(second) == epoch(in_order) == list(range(50))
    assert first != second and first != sorted(first)
    assert len(lab0.DeviceLoader(range(50_000), 512, True)) == 98  # a range has a length, too


# ---- The network and its training ------------------------------------------------------------
def make_training(model, data, batch_size, dtype=torch.float32):
    """The arguments of lab0.train, with the tutorial's recipe."""
    dataflow = lab0.DeviceLoader(data, batch_size, shuffle=True)
    optimizer = SGD(model.parameters(), lr=0.4, momentum=0.9, weight_decay=5e-4)
    scheduler = LambdaLR(optimizer, lab0.make_lr_lambda(98))
    return model, dataflow, nn.CrossEntropyLoss(), optimizer, scheduler, dtype


def test_later_labs_can_load_flatten_prune_and_narrow_the_weights(run):
    _, checkpoint = run("--smoke")
    model = lab0.VGG()
    model.load_state_dict(checkpoint["state_dict"])
    layers = dict(model.backbone.named_children())
    assert list(layers)[:5] == ["conv0", "bn0", "relu0", "pool0", "conv1"]
    lab0.train(*make_training(model, make_split(20), 10))
    for tensor in [*checkpoint["state_dict"].values(), *model.parameters()]:
        tensor.view(-1)  # fails on weights in channels_last
    parameters_to_vector(weight.grad for weight in model.parameters())
    prune.l1_unstructured(layers["conv1"], "weight", amount=0.5)
    model(torch.zeros(2, 3, 32, 32))
    lab0.count_macs(model, torch.zeros(1, 3, 32, 32))
    conv = nn.Conv2d(8, 4, 3, bias=False)
    with torch.no_grad():
        conv.weight.set_(conv.weight.detach()[:, :5])  # a part of another's memory
    conv(torch.rand(1, 5, 9, 9)).square().sum().backward()
    expected = conv.weight - 0.1 * (conv.weight.grad + 5e-4 * conv.weight)
    (sgd,) = checkpoint["optimizer"]["param_groups"]
    mains_own = {name: sgd[name] for name in ["momentum", "weight_decay", "foreach", "fused"]}
    SGD([conv.weight], lr=0.1, **mains_own).step()
    assert torch.allclose(conv.weight, expected)
    assert lab0.count_params(model.requires_grad_(False)) == 0


def test_train_has_the_losses_of_the_tutorials_loop_over_twenty_batches():
    # In float64, rounding errors stay too small for a ReLU to fall on the other side of 0
    lab0.set_seed(0)
    model = lab0.VGG().double()
    theirs = copy.deepcopy(model)
    _, dataflow, *ours, _ = make_training(model, make_split(40), 2)
    batches = [(inputs.double(), targets) for inputs, targets in dataflow]
    our_losses = [lab0.train(model, batches[:10], *ours), lab0.train(model, batches[10:], *ours)]
    # From here on, `theirs`, `optimizer` and `scheduler` are the tutorial's
    optimizer = SGD(theirs.parameters(), lr=0.4, momentum=0.9, weight_decay=5e-4)
    scheduler = LambdaLR(optimizer, lambda step: np.interp([step / 98], [0, 6, 20], [0, 1, 0])[0])
    losses = []
    for inputs, targets in batches:
        optimizer.zero_grad()
        loss = cross_entropy(theirs(inputs.contiguous()), targets)
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    assert our_losses == pytest.approx([np.mean(losses[:10]), np.mean(losses[10:])], rel=1e-9)


@on_each_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_train_and_evaluate_take_an_ordinary_dataloader_and_step_hooks(dtype, device):
    lab0.set_seed(0)
    images, targets = torch.rand(70, 3, 8, 8), torch.arange(70) % 10
    dataflow = DataLoader(TensorDataset(images, targets), 32, shuffle=True)  # of 32, 32 and 6
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 10)).to(device)
    optimizer = SGD(model.parameters(), lr=0)  # keeps the weights, so that the loss is known
    scheduler = LambdaLR(optimizer, lambda step: 1.0)
    steps, dtypes = [], []
    optimizer.register_step_post_hook(lambda *_: steps.append("step"))
    model.register_forward_hook(lambda module, inputs, outputs: dtypes.append(outputs.dtype))
    loss = lab0.train(model, dataflow, nn.CrossEntropyLoss(), optimizer, scheduler, dtype)
    accuracy = lab0.evaluate(model, dataflow, dtype)
    assert dtypes == [dtype] * 6  # three each
    outputs = model(images.to(device)).cpu()
    right = (outputs.argmax(dim=1) == targets).float().mean().item()
    assert len(steps) == scheduler.last_epoch == 3
    assert loss == pytest.approx(cross_entropy(outputs, targets).item(), rel=3e-4)
    assert accuracy == pytest.approx(100 * right, abs=1e-4 if dtype == torch.float32 else 3)
    without_parameters = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(3 * 8 * 8, affine=False))
    lab0.evaluate(without_parameters.to(device), dataflow)  # such are Lab 2's quantized networks


@on_each_device
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_16_bit_step_changes_the_weights_as_float32_does_at_a_tiny_loss(dtype, device, run):
    _, checkpoint = run("--smoke")
    batch = lab0.generate_dataset(device)["test"][:]

    def change(dtype):
        model = lab0.VGG().to(device)
        model.load_state_dict(checkpoint["state_dict"])
        before = parameters_to_vector(model.parameters()).detach().clone()
        sgd = SGD(model.parameters(), lr=1e3)  # makes up for a loss of only about 2e-5
        scheduler = LambdaLR(sgd, lambda step: 1.0)
        lab0.train(model, [batch], lambda o, t: 1e-4 * cross_entropy(o, t), sgd, scheduler, dtype)
        return parameters_to_vector(model.parameters()).detach() - before

    exact = change(torch.float32)
    relative_error = (change(dtype) - exact).norm() / exact.norm()
    assert 0 < relative_error < 0.1  # 0 would mean float32


def test_train_and_evaluate_read_no_value_before_the_end(monkeypatch):
    # Reading a value makes the CPU wait for the GPU. Tensors on torch's "meta" device have a shape
    # and no values, and reading one is an error: an epoch gets to its last line, which reads.
    monkeypatch.setattr(torch, "autocast", lambda *args, **options: nullcontext())  # has no "meta"
    split = make_split(30, device="meta")
    model, dataflow, *rest = make_training(lab0.VGG().to("meta"), split, 10)
    batches = [*dataflow, (torch.rand(9, 3, 32, 32), torch.arange(9))]  # one has to be moved there
    steps = []
    model.register_forward_hook(lambda *args: steps.append("step"))
    for epoch in [lambda: lab0.train(model, batches, *rest), lambda: lab0.evaluate(model, batches)]:
        with pytest.raises(RuntimeError, match="meta"):
            epoch()
    assert steps == ["step"] * 8  # four each


# ---- Pictures and errors ---------------------------------------------------------------------
def test_samples_are_in_their_class_columns_and_wrong_predictions_in_red():
    def drawn_places(figure):  # place = 10 * row + column
        return {ax.get_subplotspec().num1: ax for ax in figure.axes if ax.images}

    test = make_split(100)
    test.transform = lab0.to_float
    drawn = drawn_places(lab0.plot_samples(test))
    assert [drawn[place].get_title() for place in range(40)] == CLASSES * 4
    assert np.array_equal(drawn[23].images[0].get_array(), test[23][0].permute(1, 2, 0))
    drawn = drawn_places(lab0.plot_samples(make_split(7, num_classes=3)))  # what there is
    assert set(drawn) == {0, 1, 2, 10, 11, 12, 20}
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10))
    preds = model(test[:][0]).argmax(dim=1)
    test.targets[:20] = preds[:20]  # so that there are right ones
    drawn = drawn_places(lab0.plot_predictions(model, test))
    for place in range(40):
        pred, label, title = preds[place], test.targets[place], drawn[place].title
        assert title.get_text() == f"pred: {CLASSES[pred]}\nlabel: {CLASSES[label]}"
        assert title.get_color() == ("black" if pred == label else "red")


def test_curves_show_the_schedule_and_the_history_beside_the_goal():
    rates = lab0.plot_lr_schedule(lab0.make_lr_lambda(98), 1960, 0.4).axes[0].lines[0].get_ydata()
    assert len(rates) == 1960 and np.argmax(rates) == 588 and max(rates) == 0.4
    history = [{"epoch": n, "train_loss": 3.0 - n, "test_accuracy": 40.0 * n} for n in [1, 2]]
    loss_ax, accuracy_ax = lab0.plot_history(history, goal=lab0.GOAL).axes
    assert [list(line.get_ydata()) for line in loss_ax.lines] == [[2.0, 1.0]]
    assert [list(line.get_ydata()) for line in accuracy_ax.lines] == [[40.0, 80.0], [92.5, 92.5]]


def test_bad_settings_and_a_diverged_loss_end_in_one_line(run, cifar10_root, monkeypatch, capsys):
    monkeypatch.setattr(lab0, "evaluate", None)  # mustn't be called after a loss that isn't finite
    for flag, text in {
        "--batch-size=0": "--batch-size: must be between",
        "--lr=nan": "--lr: must be between",
        "--seed=1000000": "--seed: must be between 0 and 999999",
        f"--output-dir={__file__}/x": "test_lab0.py",
        f"--data-root={__file__}": "exists",  # and no host is asked
        "--lr=100000": "--precision fp32",
    }.items():
        with pytest.raises(SystemExit) as end:
            run(f"--data-root={cifar10_root}", "--batch-size=10", flag)
        # The argument parser prints its error. Python prints a code that is a text, as status 1.
        line = end.value.code if end.value.code != 2 else capsys.readouterr().err.splitlines()[-1]
        assert re.match("(.*: )?error: ", line) and text in line and "\n" not in line


@pytest.mark.parametrize("error, ending", [(KeyboardInterrupt, SystemExit), (OSError, OSError)])
def test_ctrl_c_ends_in_a_hint_and_a_bug_in_a_traceback(error, ending, monkeypatch, tmp_path):
    # The script is run as a fresh copy: patches of lab0 don't reach it, patches of torch do
    monkeypatch.setattr(sys, "argv", ["lab0.py", "--smoke", f"--output-dir={tmp_path}"])
    monkeypatch.setattr(torch, "manual_seed", Mock(side_effect=error("--resume continues")))
    with pytest.raises(ending, match="--resume continues"):
        runpy.run_path(lab0.__file__, run_name="__main__")


def test_resume_names_the_first_setting_that_differs_and_changes_no_file(run, tmp_path):
    _, checkpoint = run("--smoke")
    files = {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    for flags, message in [
        (["--smoke", "--lr=0.02"], "lr 0.01, not 0.02"),
        (["--smoke", "--seed=1", "--batch-size=9", "--epochs=5"], "epochs 4, not 5"),
        (["--epochs=4", "--batch-size=10", "--lr=0.01"], "smoke True, not False"),
    ]:
        with pytest.raises(SystemExit, match=f"^error: .*checkpoint.pth was saved with {message}$"):
            run("--resume", *flags)
    assert files == {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    config = {**checkpoint["config"], "device": "cuda", "warmup": 5}  # a flag that a copy has added
    with pytest.raises(SystemExit, match="warmup None, not 5"):
        lab0.load_checkpoint(tmp_path / "run" / "checkpoint.pth", config)


def test_resume_refuses_a_damaged_file_and_runs_no_code_in_it(tmp_path):
    path = tmp_path / "checkpoint.pth"
    for content, error in [(b"", "EOF"), (Path(), "Unpickling"), ({"state_dict": {}}, "Key")]:
        path.write_bytes(content) if content == b"" else torch.save(content, path)
        with pytest.raises(SystemExit, match=f"^error: cannot read .*pth .{error}Error.: .*dir$"):
            lab0.load_checkpoint(path, {})  # to load a Path is to run what makes one


def test_a_checkpoint_survives_a_failure_to_save_the_next_one(tmp_path):
    lab0.save_checkpoint(tmp_path / "checkpoint.pth", config={})
    with pytest.raises(Exception, match="pickle"):
        lab0.save_checkpoint(tmp_path / "checkpoint.pth", config=lambda: "which can't be saved")
    assert lab0.load_checkpoint(tmp_path / "checkpoint.pth", {}) == {"config": {}}


@pytest.fixture
def sources(cifar10_root, monkeypatch):
    """Addresses: one refuses, one says nothing, one has other data, and the last one is good."""
    archive = Path(shutil.make_archive(cifar10_root.parent / "archive", "gztar", cifar10_root))
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    monkeypatch.setenv("no_proxy", "*")
    set_timeout = socket.setdefaulttimeout  # the 20 seconds that lab0 waits become 0.2
    monkeypatch.setattr(socket, "setdefaulttimeout", lambda s: set_timeout(0.2 if s == 20 else s))
    here, handler = ("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=archive.parent)
    with socket.create_server(here) as silent, ThreadingHTTPServer(here, handler) as server:
        Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        timer = Timer(5, silent.close)  # so that nobody waits forever if lab0 sets no time-out
        timer.start()
        ports = [9, silent.getsockname()[1], server.server_port, server.server_port]
        names = ["refuses", "silent", "cifar10/cifar-10-batches-py/test_batch", archive.name]
        yield [f"http://127.0.0.1:{port}/{name}" for port, name in zip(ports, names)]
        timer.cancel()
        server.shutdown()


def test_failing_hosts_are_named_and_the_next_is_tried(sources, cifar10_root, monkeypatch, capsys):
    monkeypatch.setattr(lab0, "SOURCES", sources)
    file = cifar10_root / CIFAR10.base_folder / "batches.meta"
    file.write_bytes(file.read_bytes()[:-9])
    lab0.load_dataset(cifar10_root, "cpu")  # replaces the damaged file
    errors = capsys.readouterr().err
    assert [f"{source} failed" in errors for source in sources] == [True, True, True, False]
    assert "timed out" in errors and socket.getdefaulttimeout() is None


def test_if_hosts_fail_an_archive_saved_by_hand_works(sources, cifar10_root, tmp_path, monkeypatch):
    monkeypatch.setattr(lab0, "SOURCES", sources[:-1])
    file = tmp_path / "new" / "cifar-10-python.tar.gz"
    with pytest.raises(SystemExit) as end:
        lab0.main(["--device=cpu", f"--data-root={file.parent}", f"--output-dir={tmp_path}"])
    assert all(way_out in end.value.code for way_out in [sources[0], str(file), "--smoke"])
    shutil.copy(cifar10_root.parent / "archive.tar.gz", file)  # over what the last source left
    assert len(lab0.load_dataset(file.parent, "cpu")["train"]) == 200


# ---- The README and CUDA ---------------------------------------------------------------------
def code_blocks(language):
    readme = Path(__file__).with_name("README.md")
    text = readme.read_text(encoding="utf-8") if readme.exists() else ""  # a copy may have none
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("block", code_blocks("python"))
def test_readmes_code_runs_and_its_diff_fits(block, run, cifar10_root, monkeypatch):
    monkeypatch.chdir(cifar10_root.parent.parent)
    run("--smoke", output_dir=Path("outputs/lab0"))
    for i, name in itertools.product(range(10), ["cat", "dog"]):
        Path("images", name).mkdir(parents=True, exist_ok=True)
        imsave(f"images/{name}/{i}.png", np.random.default_rng(i).random((40, 40, 3)))
    exec(block, {})  # noqa: S102
    diff = "".join(code_blocks("diff")).splitlines()
    removed = {line[1:] for line in diff if line.startswith("-")}
    assert removed and removed <= set(Path(lab0.__file__).read_text().splitlines())


@on_cuda
@pytest.mark.parametrize("dtype", lab0.DTYPES.values())
def test_cuda_steps_have_the_same_bits_twice_and_dont_wait_for_the_device(dtype):
    split, weights, steps = make_split(1100, device="cuda"), [], []
    for _ in range(2):
        lab0.set_seed(0)
        training = make_training(lab0.VGG().to("cuda"), split, 512, dtype)
        lab0.train(*training)
        weights.append(parameters_to_vector(training[0].parameters()))
    assert torch.equal(*weights)
    if dtype != torch.float16:  # there, scaler.step reads whether a gradient is inf
        training[3].register_step_post_hook(lambda *_: steps.append("step"))
        torch.cuda.set_sync_debug_mode("error")
        try:
            with pytest.raises(RuntimeError, match="synchronizing"):  # the epoch's last line reads
                lab0.train(*training)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert steps == ["step"] * 3
