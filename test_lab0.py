"""What lab0 promises, one test per promise. `make test` runs them, offline, in half a minute."""

import copy
import hashlib
import http.server
import inspect
import itertools
import json
import os
import pickle
import random
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.transforms as T
from matplotlib.image import imread
from torch import nn
from torch.nn.functional import cross_entropy, one_hot
from torch.optim import SGD
from torch.optim.lr_scheduler import LambdaLR
from torchvision.datasets import CIFAR10

import lab0
from lab0 import plot_history, plot_lr_schedule, plot_predictions, plot_samples

on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
CLASSES = "airplane automobile bird cat deer dog frog horse ship truck".split()


# ---- A CIFAR-10 of 200 + 40 images, and a small network that learns it in a moment --------------
# A pattern per class under noise; ten of the 40 test labels, one of each class, are wrong.
generator = np.random.default_rng(0)
patterns = generator.integers(256, size=(10, 3, 4, 4)).repeat(8, 2).repeat(8, 3)
FILES = {"batches.meta": pickle.dumps({"label_names": CLASSES})}
for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
    labels = generator.permutation(40) % 10
    noise = generator.integers(256, size=(40, 3, 32, 32))
    data = ((2 * patterns[labels] + noise) // 3).astype(np.uint8).reshape(40, 3072)
    if name == "test_batch":
        labels[np.unique(labels, return_index=True)[1]] = (np.arange(10) + 1) % 10
    FILES[name] = pickle.dumps({"data": data, "labels": labels.tolist()}, protocol=2)


def extract(root):
    (root / CIFAR10.base_folder).mkdir(parents=True)
    for name, data in FILES.items():
        (root / CIFAR10.base_folder / name).write_bytes(data)
    return root


TEMPORARY = tempfile.TemporaryDirectory()
ROOT = extract(Path(TEMPORARY.name, "data"))
ARCHIVE = Path(shutil.make_archive(f"{ROOT}-packed", "gztar", ROOT)).read_bytes()
MD5 = {name: hashlib.md5(data).hexdigest() for name, data in FILES.items()}
CIFAR10.train_list = [[name, MD5[name]] for name in FILES if "data" in name]
CIFAR10.test_list = [["test_batch", MD5["test_batch"]]]
CIFAR10.meta = {**CIFAR10.meta, "md5": MD5["batches.meta"]}
CIFAR10.tgz_md5 = hashlib.md5(ARCHIVE).hexdigest()
FULL_ARCH, lab0.VGG.ARCH = lab0.VGG.ARCH, [8, "M", 8, "M", 8, "M", 512, "M"]
lab0.SOURCES = []
DATA = ["--device=cpu", f"--data-root={ROOT}"]
QUICK = [*DATA, "--epochs=3", "--batch-size=12", "--lr=0.01"]
BLANK = type("Blank", (), {"savefig": print})  # a picture that takes no time


@pytest.fixture
def dataset():
    return lab0.load_dataset(ROOT, "cpu")


def run(*args, out):
    """Run lab0's main with `args`; return its metrics and checkpoint."""
    lab0.main([*args, f"--output-dir={out}"])
    metrics = json.loads((out / "metrics.json").read_text())
    return metrics, torch.load(out / "checkpoint.pth", weights_only=True)


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("finished") / "deep" / "outputs"
    run(*QUICK, out=out)
    return out


@pytest.fixture
def finished(finished_run, tmp_path):
    """The output folder of a run with the QUICK settings and real pictures, to do anything to."""
    return Path(shutil.copytree(finished_run, tmp_path / "outputs"))


@pytest.fixture(autouse=True)
def called(monkeypatch):
    """The arguments, by name, of lab0's last call of `train` and of its plots, left undrawn."""
    arguments = {}
    for name in ["plot_samples", "plot_lr_schedule", "plot_history", "plot_predictions", "train"]:

        def record(*args, _name=name, _function=getattr(lab0, name), **kwargs):
            arguments[_name] = inspect.signature(_function).bind(*args, **kwargs).arguments
            return _function(*args, **kwargs) if _name == "train" else BLANK

        monkeypatch.setattr(lab0, name, record)
    return arguments


def assert_same_run(*outs):
    """The output folders hold the same weights, losses and accuracies."""
    one, other = (torch.load(out / "checkpoint.pth") for out in outs)
    assert all(torch.equal(t, other["state_dict"][name]) for name, t in one["state_dict"].items())
    for key in ["epoch", "train_loss", "test_accuracy"]:
        assert [e[key] for e in one["history"]] == [e[key] for e in other["history"]]


def test_seeds_are_the_tutorials_and_neighbouring_epochs_share_nothing():
    draw = lambda: (random.random(), np.random.rand(), torch.rand(1).item())  # noqa: E731
    random.seed(7), np.random.seed(7), torch.manual_seed(7)
    expected = draw()
    lab0.set_seed(7)
    assert draw() == expected
    assert torch.backends.cudnn.deterministic and not torch.backends.cudnn.benchmark
    seen = set()
    for seed, epoch in itertools.product([*range(9), 2**32 - 1], [*range(1, 21), 1]):
        lab0.set_seed(seed, epoch)
        seen.update(draw())
    assert len(seen) == 10 * 20 * 3


def test_each_crop_and_flip_is_one_of_162_and_all_are_equally_likely():
    picture = np.random.default_rng(0).integers(256, size=(32, 32, 3), dtype=np.uint8)
    padded, crop = T.functional.pad(T.ToPILImage()(picture), 4), T.functional.crop
    windows = [crop(padded, i, j, 32, 32) for i, j in itertools.product(range(9), range(9))]
    possible = [w for window in windows for w in (window, T.functional.hflip(window))]
    known = {T.ToTensor()(p).numpy().tobytes(): k for k, p in enumerate(possible)}
    lab0.set_seed(0)
    counts = Counter()
    batch = torch.from_numpy(picture).permute(2, 0, 1).expand(1620, 3, 32, 32)
    for _ in range(10):
        outputs = lab0.transforms["train"](batch)
        # a KeyError here is an image that torchvision's crop, flip and ToTensor cannot make
        counts.update(known[image.contiguous().numpy().tobytes()] for image in outputs)
    chi_square = sum((counts[k] - 100) ** 2 / 100 for k in range(162))
    assert 110 < chi_square < 222  # 161 degrees of freedom: between the 0.1 % and 99.9 % points


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=on_cuda)])
def test_the_data_set_is_what_torchvision_reads_on_the_device_and_channels_last(device):
    dataset = lab0.load_dataset(ROOT, device)
    for split, data in dataset.items():
        theirs = CIFAR10(ROOT, train=(split == "train"), transform=T.ToTensor())
        assert np.array_equal(data.images.permute(0, 2, 3, 1).cpu().numpy(), theirs.data)
        assert data.targets.tolist() == theirs.targets and data.classes == CLASSES
        assert data[3][0].shape == (3, 32, 32) and data[3][1] == theirs[3][1]  # as in the tutorial
        for inputs, targets in lab0.make_dataflow(dataset, batch_size=32)[split]:
            assert inputs.device.type == targets.device.type == device
            assert inputs.dtype == torch.float32 and targets.dtype == torch.int64
            assert inputs.is_contiguous(memory_format=torch.channels_last)
    images, _ = dataset["test"][torch.arange(40)]
    expected = torch.stack([image for image, _ in theirs])
    # bit for bit on the CPU; CUDA multiplies by 1 / 255, which may round the last bit otherwise
    assert torch.allclose(images.cpu(), expected, rtol=0 if device == "cpu" else 2e-7, atol=0)


Indices = type("Indices", (list,), {"__getitems__": lambda self, indices: indices})


def test_loaders_give_98_and_20_steps_and_every_image_once_in_a_new_order_each_epoch():
    dataset = {"train": Indices(range(50_000)), "test": Indices(range(10_000))}
    dataflow = lab0.make_dataflow(dataset)
    for split, steps, last in [("train", 98, 336), ("test", 20, 272)]:
        sizes = [len(batch) for batch in dataflow[split]]
        assert sizes == [512] * (steps - 1) + [last] and len(dataflow[split]) == steps
    lab0.set_seed(5)
    first, second = ([*itertools.chain(*dataflow["train"])] for _ in range(2))
    assert sorted(first) == sorted(second) == dataset["train"]
    assert first != second and first != sorted(first)
    lab0.set_seed(5)
    assert [*itertools.chain(*dataflow["train"])] == first
    assert [*itertools.chain(*dataflow["test"])] == dataset["test"]


# ---- Model and schedule ----------------------------------------------------------------------
def test_vgg_has_the_tutorials_shapes_9_2_million_parameters_and_606_million_macs(monkeypatch):
    monkeypatch.setattr(lab0.VGG, "ARCH", FULL_ARCH)
    model = lab0.VGG()
    before = copy.deepcopy(model.state_dict())
    assert lab0.count_params(model) == 9_228_362
    assert lab0.count_macs(model) == 606_164_480
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert all(module.training for module in model.modules())
    model.classifier.requires_grad_(False)
    assert lab0.count_params(model) == 9_228_362 - 5_130
    bn = [f"bn{{}}.{name}" for name in nn.BatchNorm2d(1).state_dict()]
    keys = [f"backbone.{name}".format(i) for i in range(8) for name in ["conv{}.weight", *bn]]
    assert list(before) == [*keys, "classifier.weight", "classifier.bias"]
    layers = [name.rstrip("01234567") for name, _ in model.backbone.named_children()]
    assert layers == "conv bn relu conv bn relu pool".split() * 4
    inputs = torch.rand(2, 3, 32, 32)
    features, logits = model.eval().backbone(inputs), model(inputs)
    assert features.shape == (2, 512, 2, 2) and logits.shape == (2, 10)
    assert torch.equal(logits, model.classifier(features.mean([2, 3])))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make_copy", [lambda model: model, copy.deepcopy])
def test_low_precision_gives_any_optimizer_float32s_gradients(dtype, make_copy, finished, dataset):
    (inputs, targets), steps = dataset["test"][:40], []
    for model in [lab0.VGG(), lab0.VGG(dtype)]:
        model.load_state_dict(torch.load(finished / "checkpoint.pth")["state_dict"])
        model = make_copy(model).train()
        model.backbone.conv1.weight = nn.Parameter(model.backbone.conv1.weight.detach())  # pruned
        before = copy.deepcopy(model)
        optimizer = SGD(model.parameters(), lr=1e5)
        (1e-5 * cross_entropy(model(inputs), targets)).backward()  # a trained network's, so small
        optimizer.step()
        steps.append([a - b for a, b in zip(model.parameters(), before.parameters())])
    errors = [((ours - exact).norm() / exact.norm()).item() for exact, ours in zip(*steps)]
    assert np.mean(errors) < 0.1


def test_schedule_rises_to_0_4_at_step_588_of_1960_and_falls_to_0():
    optimizer = SGD([nn.Parameter(torch.zeros(1))], lr=0.4)
    scheduler = LambdaLR(optimizer, lab0.make_lr_lambda(98))
    rates = []
    for _ in range(1961):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert max(rates) == 0.4 and rates.index(0.4) == 588 and rates.count(0.4) == 1
    assert rates[:589] == pytest.approx([0.4 * step / 588 for step in range(589)])
    assert rates[588:] == pytest.approx([0.4 * (1960 - step) / 1372 for step in range(588, 1961)])
    assert rates[0] == rates[1960] == 0 and {type(rate) for rate in rates} == {float}


def make_training(dataset, batch_size):
    dataflow = lab0.make_dataflow(dataset, batch_size)["train"]
    model = lab0.VGG().to(dataset["train"].images.device, memory_format=torch.channels_last)
    optimizer = SGD(model.parameters(), lr=0.4, momentum=0.9, weight_decay=5e-4, fused=True)
    scheduler = LambdaLR(optimizer, lab0.make_lr_lambda(98))
    return model, dataflow, nn.CrossEntropyLoss(), optimizer, scheduler


def test_twenty_steps_lose_what_the_tutorials_loop_loses(monkeypatch):
    full = "FULL" in os.environ  # FULL=1 python -m pytest -s -k twenty_steps: the full-size VGG
    monkeypatch.setattr(lab0.VGG, "ARCH", FULL_ARCH if full else lab0.VGG.ARCH)
    lab0.set_seed(0)
    model, dataflow, criterion, *rest = make_training(lab0.generate_dataset("cpu"), 100)
    theirs = lab0.VGG()
    theirs.load_state_dict(model.state_dict())
    optimizer = SGD(theirs.parameters(), lr=0.4, momentum=0.9, weight_decay=5e-4)
    scheduler = LambdaLR(optimizer, lambda step: np.interp([step / 98], [0, 6, 20], [0, 1, 0])[0])
    differences = []
    for inputs, targets in itertools.chain(*[dataflow] * 10):
        ours = lab0.train(model, [(inputs, targets)], criterion, *rest)
        optimizer.zero_grad()
        outputs = theirs.classifier(theirs.backbone(inputs.contiguous()).mean([2, 3]))
        loss = criterion(outputs, targets)
        loss.backward()
        optimizer.step()
        scheduler.step()
        differences.append(abs(ours - loss.item()) / loss.item())
    print(f"largest relative difference of {len(differences)} losses: {max(differences):.1e}")
    assert len(differences) == 20 and max(differences) < (0.05 if full else 1e-3)


class Label(nn.Module):  # gives each image its own first pixel, as the logits of a known answer
    def __init__(self):
        super().__init__()
        self.scale, self.modes = nn.Parameter(torch.ones(())), []

    def forward(self, inputs):
        self.modes.append((self.training, torch.is_inference_mode_enabled()))
        return one_hot((inputs[:, 0, 0, 0] * 255).round().long(), 10) * self.scale


def test_train_and_evaluate_average_over_images_and_call_back_after_each_step():
    answers, targets = torch.arange(70) % 9, torch.arange(70) % 10
    inputs = (answers / 255)[:, None, None, None].expand(70, 3, 32, 32)
    batches = list(zip(inputs.split(32), targets.split(32)))  # of 32, 32 and 6
    model, calls, rates = Label().eval(), [], []
    optimizer = SGD(model.parameters(), lr=1e-12)
    optimizer.register_step_pre_hook(lambda o, *_: rates.append(o.param_groups[0]["lr"]))
    scheduler = LambdaLR(optimizer, lambda step: float(step))
    callbacks = [lambda: calls.append("a"), lambda: calls.append(scheduler.last_epoch)]
    loss = lab0.train(model, batches, nn.CrossEntropyLoss(), optimizer, scheduler, callbacks)
    expected = cross_entropy(one_hot(answers, 10).float(), targets).item()
    assert loss == pytest.approx(expected, rel=1e-6) and isinstance(loss, float)
    assert calls == ["a", 1, "a", 2, "a", 3] and rates == [0, 1e-12, 2e-12]  # after each step
    assert lab0.evaluate(model, batches) == pytest.approx(100 * 9 / 70)
    assert model.modes == [(True, False)] * 3 + [(False, True)] * 3  # training, inference


def test_steps_read_nothing_from_the_device(dataset, monkeypatch):
    counts = Counter()
    for name in ["item", "cpu", "tolist", "numpy", "__bool__", "__float__", "__int__", "nonzero"]:

        def counted(*args, _name=name, _method=getattr(torch.Tensor, name), **kwargs):
            counts[_name] += 1
            return _method(*args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, counted)

    reads = []
    for batch_size in [100, 10]:
        training = make_training(dataset, batch_size)
        counts.clear()
        lab0.train(*training)
        lab0.evaluate(*training[:2])
        reads.append(dict(counts))
    assert reads[0] == reads[1] != {}


# ---- The whole run ---------------------------------------------------------------------------
def test_a_run_from_start_to_end(called, tmp_path, capsys):
    metrics, checkpoint = run(*QUICK, "--seed=3", out=tmp_path)
    printed = capsys.readouterr()
    dataflow = lab0.make_dataflow(lab0.load_dataset(ROOT, "cpu"), 12)
    model, epochs = lab0.VGG(), metrics["epochs"]
    model.load_state_dict(checkpoint["state_dict"])

    # a guess is right for 10 % of the images, the whole truth for 75 % of the test images
    accuracy = lab0.evaluate(model, dataflow["test"])
    assert 60 < accuracy <= 75 and lab0.evaluate(model, dataflow["train"]) > 90
    assert metrics["test_accuracy"] == epochs[2]["test_accuracy"] == accuracy
    assert epochs[2]["train_loss"] < epochs[1]["train_loss"] < epochs[0]["train_loss"]
    for number, epoch in enumerate(epochs, 1):
        assert set(epoch) == {"epoch", "train_loss", "test_accuracy", "train_seconds", "seconds"}
        assert epoch["epoch"] == number and 0 < epoch["train_seconds"] < epoch["seconds"]
    config = vars(lab0.parse_args([*QUICK, "--seed=3", f"--output-dir={tmp_path}"]))
    environment = dict(metrics["environment"], torch=torch.__version__, device="cpu")
    assert metrics["config"] == config and metrics["environment"] == environment
    assert set(environment) == {"python", "torch", "torchvision", "device", "precision"}
    counts = (lab0.count_params(model), lab0.count_macs(model), 200, 40, None)
    names = ["params", "macs", "train_images", "test_images", "peak_memory_bytes"]
    assert tuple(metrics[name] for name in names) == counts and len(metrics) == 9
    states = {"state_dict", "optimizer", "scheduler"}
    rest = {name: checkpoint[name] for name in checkpoint.keys() - states}
    assert rest == {"epoch": 3, "history": epochs, "config": config}
    assert checkpoint["scheduler"]["last_epoch"] == 3 * 17
    (group,) = checkpoint["optimizer"]["param_groups"]
    assert (group["initial_lr"], group["momentum"], group["weight_decay"]) == (0.01, 0.9, 5e-4)
    assert group["fused"] and not group["nesterov"] and group["dampening"] == 0
    assert len(group["params"]) == len(list(model.parameters()))
    weight = checkpoint["state_dict"]["backbone.conv1.weight"]
    assert weight.is_contiguous(memory_format=torch.channels_last)
    outputs, targets = torch.randn(50, 10), torch.arange(50) % 10
    assert called["train"]["criterion"](outputs, targets) == cross_entropy(outputs, targets)
    assert (
        len(called["plot_samples"]["dataset"]) == len(called["plot_predictions"]["dataset"]) == 40
    )
    assert called["plot_history"]["history"] == epochs and not called["plot_history"].get("target")
    assert (called["plot_lr_schedule"]["num_steps"], called["plot_lr_schedule"]["lr"]) == (51, 0.01)
    seconds = sum(epoch["train_seconds"] for epoch in epochs)
    for line in [
        "[inputs] dtype: torch.float32, shape: torch.Size([12, 3, 32, 32])",
        "[targets] dtype: torch.int64, shape: torch.Size([12])",
        f"#Params: {counts[0]} ({counts[0] / 1e6:.1f}M)\n#MACs: {counts[1]} (",
        f"epoch 3/3: loss {epochs[2]['train_loss']:.4f}, accuracy {accuracy:.2f} %",
        f"Test accuracy {accuracy:.2f} %\n",
        f"Training took {seconds:.1f} s, {600 / seconds:,.0f} images/s",
    ]:
        assert line in printed.out
    assert str(tmp_path) in printed.out and "(conv3): Conv2d(8, 512" in printed.out
    assert "hours on a CPU" in printed.out.split("[inputs]")[0]
    assert printed.err == ""  # no progress bars where there is no terminal


def test_a_run_leaves_six_files_and_a_seed_the_same_bits(finished, tmp_path):
    sizes = {path.name: imread(path).shape[:2] for path in finished.glob("*.png")}
    assert sizes.pop("samples.png") == (900, 2000) and sizes.pop("lr_schedule.png") == (500, 800)
    assert sizes == {"history.png": (500, 1200), "predictions.png": (1000, 2000)}
    assert len(list(finished.iterdir())) == 6
    _, again = run(*QUICK, out=tmp_path / "again")
    assert_same_run(finished, tmp_path / "again")
    _, other = run(*QUICK, "--seed=1", out=tmp_path / "other")
    layers = [name for name in other["state_dict"] if name.endswith("weight") and "bn" not in name]
    assert not any(torch.equal(other["state_dict"][n], again["state_dict"][n]) for n in layers)


def test_a_full_run_is_held_against_the_tutorials_accuracy(called, tmp_path, capsys):
    run(*DATA, out=tmp_path)
    assert "bar: 92.5 %" in capsys.readouterr().out
    assert called["plot_history"]["target"] == 92.5
    assert called["plot_lr_schedule"]["lr_lambda"](6) == 1  # a step per epoch


@pytest.mark.parametrize("flags", ["fp32", "bf16 --compile", "fp16"])
def test_smoke_needs_no_data_and_flags_beat_its_defaults(flags, called, tmp_path, monkeypatch):
    compiled, dtypes, args = [], [], ["--smoke", "--device=cpu", "--epochs=2"]
    monkeypatch.setattr(torch, "compile", lambda f, *args, **kwargs: compiled.append(f) or f)
    metrics, checkpoint = run(*args, *f"--precision={flags}".split(), out=tmp_path)
    assert (metrics["config"]["lr"], metrics["config"]["batch_size"]) == (0.01, 10)
    assert metrics["train_images"] <= 500 and len(compiled) == ("--compile" in flags)
    assert metrics["epochs"][1]["train_loss"] < metrics["epochs"][0]["train_loss"]
    assert {t.dtype for t in checkpoint["state_dict"].values()} == {torch.float32, torch.int64}
    model = called["plot_predictions"]["model"]
    assert list(checkpoint["state_dict"]) == list(lab0.VGG().state_dict())
    model.backbone.register_forward_hook(lambda m, i, output: dtypes.append(output.dtype))
    model(torch.rand(2, 3, 32, 32))
    names = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
    assert metrics["environment"]["precision"] == names[dtypes[0]] == flags[:4]


@pytest.mark.parametrize("usable", ["cuda mps bf16", "cuda", "mps", ""])
def test_the_defaults_are_the_tutorials_recipe_on_the_best_device(usable, monkeypatch):
    bf16 = lambda including_emulation=True: including_emulation or "bf16" in usable  # noqa: E731
    monkeypatch.setattr(torch.cuda, "is_available", lambda: "cuda" in usable)
    monkeypatch.setattr(torch.mps, "is_available", lambda: "mps" in usable)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", bf16)  # a T4, which emulates it, says yes
    args = lab0.parse_args([])
    best = {"cuda mps bf16": ("cuda", "bf16"), "cuda": ("cuda", "fp16"), "mps": ("mps", "fp32")}
    assert (args.device, args.precision) == best.get(usable, ("cpu", "fp32"))
    assert lab0.parse_args(["--device=cpu"]).precision == "fp32"
    assert (args.epochs, args.batch_size, args.lr, args.seed) == (20, 512, 0.4, 0)
    assert (args.data_root, args.output_dir) == ("data/cifar10", "outputs")


def test_pictures_mark_the_peak_the_target_and_the_wrong_predictions(dataset):
    (axis,) = plot_lr_schedule(lab0.make_lr_lambda(98), 1960, 0.4).axes
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["peak: 0.4 at step 588"]
    epochs = [{"epoch": 1, "train_loss": 2.0, "test_accuracy": 40.0}]
    for axis in plot_history(epochs).axes:
        assert len(axis.lines) == 1 and all(tick == int(tick) for tick in axis.get_xticks())
    lines = [list(line.get_ydata()) for line in plot_history(epochs, 92.5).axes[1].lines]
    assert lines == [[40.0], [92.5, 92.5]]
    test = dataset["test"]
    axes = plot_samples(test).axes
    assert [axis.get_title() for axis in axes] == CLASSES * 4
    cat = test.images[(test.targets == 3).nonzero()[2]][0] / 255  # the third
    assert np.array_equal(axes[23].images[0].get_array(), cat.permute(1, 2, 0))
    test.images[:, 0, 0, 0] = test.targets
    test.images[7, 0, 0, 0] = (test.targets[7] + 1) % 10
    axes, names = plot_predictions(Label(), test).axes, [CLASSES[target] for target in test.targets]
    wrong = CLASSES[(test.targets[7] + 1) % 10]
    assert axes[7].get_title() == f"pred: {wrong}\nlabel: {names[7]}"
    assert axes[8].get_title() == f"pred: {names[8]}\nlabel: {names[8]}"
    assert [i for i, axis in enumerate(axes) if axis.get_frame_on()] == [7]


# ---- The data arrives ------------------------------------------------------------------------
class Source(http.server.BaseHTTPRequestHandler):  # serves ARCHIVE under /good, else fails
    def do_GET(self):
        if self.path == "/error":
            return self.send_error(503)
        if self.path == "/silent":
            return time.sleep(5)
        if self.path == "/garbage":
            return self.wfile.write(b"220 this is another protocol\r\n")
        self.send_response(200)
        self.send_header("Content-Length", str(len(ARCHIVE)))
        self.end_headers()
        if self.command == "GET":
            size = 1000 if self.path in {"/short", "/stalled"} else len(ARCHIVE)
            self.wfile.write(b"x" * size if self.path == "/wrong" else ARCHIVE[:size])
            self.wfile.flush()
            time.sleep(5 * (self.path == "/stalled"))

    do_HEAD = do_GET
    log_message = print


@pytest.fixture
def source(monkeypatch):
    """The address of a Source; lab0's 20 seconds become 0.2, another time-out stays as it is."""
    set_timeout = socket.setdefaulttimeout
    monkeypatch.setattr(socket, "setdefaulttimeout", lambda s: set_timeout(0.2 if s == 20 else s))
    monkeypatch.setenv("no_proxy", "*")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Source)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    set_timeout(77)
    end = time.monotonic() + 4
    yield f"http://127.0.0.1:{server.server_port}"
    assert socket.getdefaulttimeout() == 77 and time.monotonic() < end
    set_timeout(None)
    server.shutdown()


def assert_loads(root, dataset, *sources):
    for lab0.SOURCES in [list(sources), []]:  # then without any
        loaded = lab0.load_dataset(root, "cpu")
        for split in dataset:
            assert torch.equal(loaded[split].images, dataset[split].images)
            assert torch.equal(loaded[split].targets, dataset[split].targets)


@pytest.mark.parametrize("failure", "error silent stalled short wrong garbage refused".split())
def test_a_bad_source_is_named_and_the_next_asked(failure, source, dataset, tmp_path, capsys):
    bad = "http://127.0.0.1:9/cifar" if failure == "refused" else f"{source}/{failure}"
    lab0.SOURCES = [bad]
    with pytest.raises(OSError) as error:
        lab0.load_dataset(tmp_path, "cpu")
    assert all(way in str(error.value) for way in [bad, str(tmp_path), "--smoke"])
    assert_loads(tmp_path, dataset, bad, f"{source}/good")  # what is left is in nobody's way
    assert [bad in line for line in capsys.readouterr().err.splitlines()].count(True) == 2


@pytest.mark.parametrize("name", [None, "batches.meta", "data_batch_3", "test_batch"])
@pytest.mark.parametrize("damage", ["missing", "cut short", "changed", "none"])
def test_a_damaged_file_is_replaced_and_a_whole_one_used(name, damage, source, dataset, tmp_path):
    whole = FILES.get(name, ARCHIVE)
    file = extract(tmp_path) / CIFAR10.base_folder / name if name else tmp_path / CIFAR10.filename
    damaged = {"cut short": whole[:-9], "changed": whole[:-9] + b"123456789", "none": whole}
    file.write_bytes(damaged[damage]) if damage in damaged else file.unlink(missing_ok=True)
    assert_loads(tmp_path, dataset, f"{source}/{'error' if damage == 'none' else 'good'}")
    assert file.read_bytes() == whole


# ---- Errors that help ------------------------------------------------------------------------
def fails(capsys, *args):
    """Run the script, expect it to fail; return the last line on standard error."""
    with pytest.MonkeyPatch.context() as monkeypatch, pytest.raises(SystemExit) as exit_:
        monkeypatch.setattr(sys, "argv", ["lab0.py", *map(str, args)])
        runpy.run_path(lab0.__file__, run_name="__main__")
    code = exit_.value.code  # of a text, Python prints it and exits with status 1
    assert code != 0 and "\n" not in str(code)
    return code if isinstance(code, str) else capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    "flag, value",
    [
        *itertools.product(["--epochs", "--batch-size"], ["0", "-1", "1.5", "x", "9" * 30]),
        *itertools.product(["--lr"], ["0", "-0.1", "nan", "inf", "-inf", "fast"]),
        *itertools.product(["--seed"], ["-1", str(2**32), "1.5", "nan"]),
        *[("--device", "tpu"), ("--precision", "fp8"), ("--colour", "red")],
        pytest.param("--device", "cuda", marks=pytest.mark.skipif("torch.cuda.is_available()")),
        *itertools.product(["--data-root", "--output-dir"], [__file__, __file__ + "/folder"]),
    ],
)
def test_a_wrong_argument_is_named_with_its_value(flag, value, tmp_path, capsys):
    line = fails(capsys, *DATA[1:], "--output-dir", tmp_path, f"{flag}={value}")
    assert (flag in line and value in line) or (value.startswith("/") and __file__ in line)


Trap = type("Trap", (), {"__reduce__": lambda self: (Path.touch, (Path("trapped"),))})  # if loaded


def test_resume_refuses_all_but_its_own_and_executes_nothing(finished, monkeypatch, capsys):
    monkeypatch.chdir(finished)
    path = finished / "checkpoint.pth"
    whole = path.read_bytes()
    for flag, value in [("--epochs", "4"), ("--seed", "1"), ("--batch-size", "50")]:
        line = fails(capsys, *QUICK, flag, value, "--resume", "--output-dir", finished)
        assert "--resume" in line and flag[2:].replace("-", "_") in line and value in line
    damaged = [b"", b"text", whole[:-1000], whole[1000:], pickle.dumps(Trap(), 2)]
    objects = [Trap(), {"weights": torch.zeros(3)}]
    writers = [partial(path.write_bytes, bad) for bad in damaged]
    for write in [path.unlink, *writers, *(partial(torch.save, bad, path) for bad in objects)]:
        write()
        line = fails(capsys, *QUICK, "--resume", "--output-dir", finished)
        assert "--resume" in line and str(path) in line
    assert not (finished / "trapped").exists()


def test_a_diverged_run_and_a_full_disk_leave_the_last_good_checkpoint(finished):
    resource = pytest.importorskip("resource")  # as a full disk, a limit on the size of files
    before = (finished / "checkpoint.pth").read_bytes()
    with pytest.raises(SystemExit, match=r"error: .*lower --lr"):
        run(*QUICK, "--lr=1e9", out=finished)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        with pytest.raises(OSError):  # which ends the script in a line: see the next test
            run(*QUICK, "--seed=1", out=finished)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (finished / "checkpoint.pth").read_bytes() == before


@pytest.mark.parametrize(
    "error, text",
    [
        (OSError(28, "No space left on device", "some/file"), "some/file"),
        (torch.OutOfMemoryError("CUDA out of memory"), "out of memory"),
        (KeyboardInterrupt(), "--resume"),
        *[(bug, None) for bug in (ValueError("bug"), RuntimeError("bug"), KeyError("bug"))],
    ],
)
def test_a_bug_keeps_its_traceback_and_nothing_else(error, text, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch, "manual_seed", lambda seed: (_ for _ in ()).throw(error))
    if text:
        assert text in fails(capsys, "--smoke", "--output-dir", tmp_path)
    else:
        pytest.raises(type(error), fails, capsys, "--smoke", "--output-dir", tmp_path)


KILLED = """  # by the system, while it writes its second checkpoint
import resource, signal, sys, lab0, test_lab0
lab0.CHECKPOINT_SECONDS = 0
lab0.plot_samples = lab0.plot_lr_schedule = lambda *args, **kwargs: test_lab0.BLANK
def evaluate(*args, evaluate=lab0.evaluate, epochs=[]):
    epochs.append(args)
    if len(epochs) == 2:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
    return evaluate(*args)
lab0.evaluate = evaluate
lab0.main(sys.argv[1:])
"""


def test_a_killed_run_resumes_to_the_same_bits(finished, tmp_path, monkeypatch, capsys):
    pytest.importorskip("resource")
    first, out = tmp_path / "killed", tmp_path / "renamed"
    command = [sys.executable, "-c", KILLED, *QUICK, f"--output-dir={first}"]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, check=False)
    assert done.returncode == -signal.SIGXFSZ, done.stderr
    first.rename(out)
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(lab0, "plot_history", lambda *args: 1 / 0)
        run(*QUICK, "--resume", out=out)
    assert "1 of 3 epochs done" in capsys.readouterr().out
    before = (out / "checkpoint.pth").stat().st_mtime_ns  # the last one, before that picture
    metrics, checkpoint = run(*QUICK, "--resume", out=out)
    assert_same_run(finished, out)
    assert (out / "checkpoint.pth").stat().st_mtime_ns == before
    assert metrics["config"]["output_dir"] == checkpoint["config"]["output_dir"] == str(out)


@on_cuda
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_cuda_two_runs_agree_bit_for_bit(precision, tmp_path):
    args = [*QUICK, "--device=cuda", f"--precision={precision}"]
    metrics = [run(*args, out=tmp_path / name)[0] for name in "ab"]
    assert_same_run(tmp_path / "a", tmp_path / "b")
    assert all(m["peak_memory_bytes"] > 0 and m["test_accuracy"] > 50 for m in metrics)


@on_cuda
def test_cuda_steps_never_wait_for_the_device(monkeypatch):
    training, steps = make_training(lab0.load_dataset(ROOT, "cuda"), 64), []
    lab0.train(*training)  # cuDNN's first calls
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError):  # the epoch's last line reads the loss
            lab0.train(*training, callbacks=[lambda: steps.append(1)])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(steps) == len(training[1])
