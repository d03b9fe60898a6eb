"""What lab0 promises, one test per promise. `make test` runs them, offline."""

import hashlib
import http.server
import io
import itertools
import json
import pickle
import platform
import random
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
import torchvision.transforms as T
import torchvision.transforms.functional as TF
from matplotlib.image import imread
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import LambdaLR
from torchvision.datasets import CIFAR10

import lab0

HERE = Path(__file__).parent
CUDA = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA"))
on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
PNG_SIZES = {
    "samples.png": (900, 2000),
    "lr_schedule.png": (500, 800),
    "history.png": (500, 1200),
    "predictions.png": (1000, 2000),
}
FILES = {*PNG_SIZES, "metrics.json", "checkpoint.pth"}
# for runs whose network does not matter: a small one of the same kind
SMALL_ARCH = [8, "M", 8, "M", 8, "M", 512, "M"]


# ---- Helpers ---------------------------------------------------------------------------------
@pytest.fixture
def small_vgg(monkeypatch):
    monkeypatch.setattr(lab0.VGG, "ARCH", SMALL_ARCH)


def make_dataset(n_train, n_test, device="cpu", size=32):
    """Random images in the shape of lab0's data set."""
    generator = torch.Generator().manual_seed(1)
    dataset = {}
    for split, n in {"train": n_train, "test": n_test}.items():
        images = torch.randint(256, (n, 3, size, size), generator=generator, dtype=torch.uint8)
        classes = [f"class {i}" for i in range(10)]
        targets = torch.arange(n, device=device) % 10
        dataset[split] = lab0.DeviceDataset(images.to(device), targets, classes, split)
    return dataset


def md5(data):
    return hashlib.md5(data).hexdigest()


class MiniCifar10:
    """100 + 40 images in CIFAR-10's own files, with torchvision expecting their MD5 sums."""

    def __init__(self, root, monkeypatch):
        self.root, self.folder = root, root / CIFAR10.base_folder
        generator = np.random.default_rng(0)
        classes = "airplane automobile bird cat deer dog frog horse ship truck".split()
        self.files = {"batches.meta": pickle.dumps({"label_names": classes})}
        self.images, self.labels = {}, {}
        for name, size in {
            **{f"data_batch_{i}": 20 for i in range(1, 6)},
            "test_batch": 40,
        }.items():
            self.images[name] = generator.integers(256, size=(size, 3072), dtype=np.uint8)
            self.labels[name] = [int(label) for label in generator.permutation(size) % 10]
            entry = {"data": self.images[name], "labels": self.labels[name]}
            self.files[name] = pickle.dumps(entry, protocol=2)
        archive = io.BytesIO()
        with tarfile.open(fileobj=archive, mode="w:gz") as tar:
            for name, data in self.files.items():
                member = tarfile.TarInfo(f"{CIFAR10.base_folder}/{name}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
        self.archive = archive.getvalue()
        sums = {name: md5(data) for name, data in self.files.items()}
        monkeypatch.setattr(CIFAR10, "train_list", [[n, sums[n]] for n in sums if "data" in n])
        monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
        monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": sums["batches.meta"]})
        monkeypatch.setattr(CIFAR10, "tgz_md5", md5(self.archive))

    def extract(self):
        self.folder.mkdir(parents=True, exist_ok=True)
        for name, data in self.files.items():
            (self.folder / name).write_bytes(data)

    def pack(self):
        self.root.mkdir(parents=True, exist_ok=True)
        (self.root / CIFAR10.filename).write_bytes(self.archive)

    def load(self, **kwargs):
        """The data set, compared with what the files were made of."""
        dataset = lab0.load_dataset(self.root, "cpu", **kwargs)
        for split, names in {"train": list(self.images)[:5], "test": ["test_batch"]}.items():
            images = np.concatenate([self.images[name] for name in names])
            assert np.array_equal(dataset[split].images.flatten(1).numpy(), images)
            labels = [label for name in names for label in self.labels[name]]
            assert dataset[split].targets.tolist() == labels
            assert dataset[split].transform is lab0.transforms[split]
        return dataset


@pytest.fixture
def cifar10(tmp_path, monkeypatch):
    """A mini CIFAR-10 whose files are not there yet, and no source to get them from."""
    monkeypatch.setattr(lab0, "SOURCES", [])
    return MiniCifar10(tmp_path / "data", monkeypatch)


def run(*args, out):
    """Run lab0's main with `args`; return its metrics and checkpoint."""
    lab0.main([str(arg) for arg in (*args, "--output-dir", out)])
    metrics = json.loads((out / "metrics.json").read_text())
    return metrics, torch.load(out / "checkpoint.pth", weights_only=True)


def without_times(metrics):
    """A copy of metrics less what may differ between two runs of one seed."""
    epochs = [{k: v for k, v in e.items() if "seconds" not in k} for e in metrics["epochs"]]
    config = {k: v for k, v in metrics["config"].items() if k != "output_dir"}
    return {**metrics, "epochs": epochs, "config": config}


def assert_same_run(one, other):
    """The two output folders hold the same weights, metrics (times aside) and pictures."""
    metrics = [json.loads((out / "metrics.json").read_text()) for out in (one, other)]
    assert without_times(metrics[0]) == without_times(metrics[1])
    states = [torch.load(out / "checkpoint.pth")["state_dict"] for out in (one, other)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert {file.name for file in other.iterdir()} == FILES
    for name in PNG_SIZES:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


QUICK = ["--smoke", "--device", "cpu", "--epochs", "3", "--batch-size", "100"]


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("finished") / "outputs"
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(lab0.VGG, "ARCH", SMALL_ARCH)
        run(*QUICK, out=out)
    return out


@pytest.fixture
def finished(finished_run, small_vgg, tmp_path):
    """The outputs of a finished run with the QUICK settings and seed 0, to do anything to."""
    return Path(shutil.copytree(finished_run, tmp_path / "outputs"))


# ---- The package -----------------------------------------------------------------------------
def test_importing_lab0_does_nothing(tmp_path):
    code = """if True:
        import os, random, sys, matplotlib, numpy as np, torch
        def state():
            return str([random.getstate(), np.random.get_state(), torch.get_rng_state().tolist(),
                dict.__getitem__(matplotlib.rcParams, "backend"), torch.get_default_dtype(),
                torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark, os.listdir()])
        before = state()
        namespace = {}
        exec("from lab0 import *", namespace)
        assert state() == before, "import changed something"
        assert "matplotlib.pyplot" not in sys.modules
        assert {*namespace} - {"__builtins__"} == {*sys.modules["lab0"].__all__}
    """
    env = {"PYTHONPATH": str(HERE), "PYTHONDONTWRITEBYTECODE": "1", "PATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_public_names_are_the_designs():
    names = (
        "SOURCES VGG RandomCrop RandomHorizontalFlip ToFloat count_macs count_params evaluate "
        "fetch_archive load_checkpoint load_dataset main make_dataflow make_lr_lambda plot_history "
        "plot_lr_schedule plot_predictions plot_samples save_checkpoint set_seed train transforms"
    )
    assert sorted(lab0.__all__) == sorted(names.split())


def test_inline_script_metadata_agrees_with_requirements():
    head = (HERE / "lab0.py").read_text().split("# ///\n")[0]
    inline = re.findall(r'"([a-z]+>=[\d.]+)"', head)
    requirements = (HERE / "requirements.txt").read_text().split()
    assert sorted(inline) == sorted(r for r in requirements if not r.startswith("pytest"))
    names = "torch torchvision torchprofile numpy matplotlib tqdm pytest"
    assert [r.split(">=")[0] for r in requirements] == names.split()


# ---- Setup -----------------------------------------------------------------------------------
def draw():
    return random.random(), np.random.rand(), torch.rand(1).item()


def test_set_seed_seeds_python_numpy_and_torch_as_the_tutorial_does():
    random.seed(7), np.random.seed(7), torch.manual_seed(7)
    expected = draw()
    lab0.set_seed(7)
    assert draw() == expected
    assert torch.backends.cudnn.deterministic and not torch.backends.cudnn.benchmark


def test_neighbouring_seeds_and_epochs_share_nothing():
    seen = set()
    for seed, epoch in itertools.product(range(20), range(20)):
        lab0.set_seed(seed, epoch)
        seen.update(draw())
    assert len(seen) == 20 * 20 * 3
    lab0.set_seed(3, 4)
    first = draw()
    lab0.set_seed(3, 4)
    assert draw() == first


# ---- Data ------------------------------------------------------------------------------------
def test_each_crop_and_flip_is_one_of_162_and_all_are_equally_likely():
    rng = np.random.default_rng(0)
    picture = rng.integers(256, size=(32, 32, 3), dtype=np.uint8)
    padded = TF.pad(T.ToPILImage()(picture), 4)
    windows = [TF.crop(padded, i, j, 32, 32) for i, j in itertools.product(range(9), range(9))]
    possible = [w for window in windows for w in (window, TF.hflip(window))]
    known = {T.ToTensor()(p).numpy().tobytes(): k for k, p in enumerate(possible)}
    assert len(known) == 162

    lab0.set_seed(0)
    n, counts = 162 * 100, Counter()
    batch = torch.from_numpy(picture).permute(2, 0, 1).expand(n // 10, 3, 32, 32)
    for _ in range(10):
        outputs = lab0.transforms["train"](batch)
        assert outputs.shape == batch.shape and outputs.dtype == torch.float32
        # a KeyError here is an image that torchvision's crop, flip and ToTensor cannot make
        drawn = [known[image.contiguous().numpy().tobytes()] for image in outputs]
        assert len(set(drawn)) > 100  # the images of one batch get different draws
        counts.update(drawn)
    assert len(counts) == 162
    chi_square = sum((counts[k] - 100) ** 2 / 100 for k in range(162))
    assert 110 < chi_square < 222  # 161 degrees of freedom: between the 0.1 % and 99.9 % points


def test_neighbours_in_a_batch_are_cropped_independently():
    lab0.set_seed(0)
    ramp = torch.arange(1, 33, dtype=torch.uint8)
    images = (ramp[:, None] + 32 * (ramp[None, :] % 7)).expand(4000, 1, 32, 32)
    outputs = lab0.RandomCrop(32, padding=4)(images).flatten(1)
    same = (outputs[::2] == outputs[1::2]).all(dim=1).sum()
    assert 8 <= same <= 45  # 2000 / 81 = 25 expected


def test_test_transform_is_to_tensor_bit_for_bit():
    values = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)
    ours = lab0.transforms["test"](torch.from_numpy(values).permute(2, 0, 1)[None])
    assert torch.equal(ours[0], T.ToTensor()(T.ToPILImage()(values)))


@pytest.mark.parametrize("size, padding, shape", [(32, 4, (5, 3, 32, 32)), (24, 0, (2, 1, 32, 40))])
@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_transforms_keep_dtype_and_device_and_take_other_sizes(size, padding, shape, device):
    images = torch.randint(256, shape, dtype=torch.uint8, device=device)
    cropped = lab0.RandomCrop(size, padding)(images)
    assert cropped.shape == (*shape[:2], size, size)
    flipped = lab0.RandomHorizontalFlip()(images)
    assert flipped.shape == shape
    for images in [cropped, flipped]:
        assert images.dtype == torch.uint8 and images.device.type == device


def test_loaders_give_98_and_20_steps_and_keep_the_last_batch():
    dataset = make_dataset(50_000, 10_000, size=1)
    for split in dataset:
        dataset[split].transform = lambda images: images
    dataflow = lab0.make_dataflow(dataset)
    for split, steps, last in [("train", 98, 336), ("test", 20, 272)]:
        assert isinstance(dataflow[split], torch.utils.data.DataLoader)
        sizes = [len(targets) for _, targets in dataflow[split]]
        assert len(dataflow[split]) == len(sizes) == steps
        assert set(sizes[:-1]) == {512} and sizes[-1] == last


def test_loaders_give_every_image_once_in_a_new_order_each_epoch():
    dataset = make_dataset(100, 50)
    for split in dataset:
        dataset[split].targets = torch.arange(len(dataset[split]))
    dataflow = lab0.make_dataflow(dataset, batch_size=32)

    def order(split):
        return [index for _, targets in dataflow[split] for index in targets.tolist()]

    lab0.set_seed(5)
    first, second = order("train"), order("train")
    assert sorted(first) == sorted(second) == list(range(100))
    assert first != second and first != sorted(first)
    lab0.set_seed(5)
    assert order("train") == first
    assert order("test") == list(range(50))


def test_batches_carry_the_images_of_their_targets():
    dataset = make_dataset(100, 50)
    for inputs, targets in lab0.make_dataflow(dataset, batch_size=32)["test"]:
        assert inputs.dtype == torch.float32 and targets.dtype == torch.int64
        assert inputs.shape[1:] == (3, 32, 32)
    inputs, targets = dataset["test"][torch.tensor([3, 1])]
    assert torch.equal(inputs, dataset["test"].images[[3, 1]] / 255)
    assert torch.equal(targets, dataset["test"].targets[[3, 1]])


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_batches_are_on_the_device_and_channels_last(device):
    for dataflow in lab0.make_dataflow(make_dataset(100, 50, device), batch_size=32).values():
        for inputs, targets in dataflow:
            assert inputs.device.type == targets.device.type == device
            assert inputs.is_contiguous(memory_format=torch.channels_last)


# ---- Model -----------------------------------------------------------------------------------
def expected_state_dict_keys():
    keys = []
    for i in range(8):
        bn = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
        keys += [f"backbone.conv{i}.weight", *(f"backbone.bn{i}.{name}" for name in bn)]
    return [*keys, "classifier.weight", "classifier.bias"]


def test_vgg_has_the_tutorials_layers_and_state_dict_keys():
    model = lab0.VGG()
    layers = (
        "conv0 bn0 relu0 conv1 bn1 relu1 pool0 conv2 bn2 relu2 conv3 bn3 relu3 pool1 conv4 bn4 "
        "relu4 conv5 bn5 relu5 pool2 conv6 bn6 relu6 conv7 bn7 relu7 pool3"
    )
    assert [name for name, _ in model.backbone.named_children()] == layers.split()
    assert list(model.state_dict()) == expected_state_dict_keys()


def test_vgg_shapes_at_each_boundary():
    model = lab0.VGG().eval()
    inputs = torch.rand(2, 3, 32, 32)
    features = model.backbone(inputs)
    assert features.shape == (2, 512, 2, 2)
    logits = model(inputs)
    assert logits.shape == (2, 10) and logits.dtype == torch.float32
    assert torch.equal(logits, model.classifier(features.mean([2, 3])))


def test_vgg_has_9_2_million_parameters_and_606_million_macs():
    model = lab0.VGG()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert lab0.count_params(model) == 9_228_362
    assert lab0.count_macs(model) == 606_164_480
    assert model.training
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert lab0.count_macs(model.eval()) == 606_164_480 and not model.training
    model.classifier.requires_grad_(False)
    assert lab0.count_params(model) == 9_228_362 - 5_130


# ---- Optimization ----------------------------------------------------------------------------
def test_schedule_peaks_at_step_588_of_1960_and_nowhere_else():
    lr_lambda = lab0.make_lr_lambda(98)
    factors = [lr_lambda(step) for step in range(1961)]
    assert all(type(factor) is float for factor in factors)
    assert factors[0] == 0 and factors[1960] == 0
    assert factors[588] == 1 and sum(factor == 1 for factor in factors) == 1
    assert factors[:589] == pytest.approx([step / 588 for step in range(589)])
    assert factors[588:] == pytest.approx([(1960 - step) / 1372 for step in range(588, 1961)])


def test_schedule_reaches_0_4_through_a_real_lambda_lr():
    optimizer = SGD([nn.Parameter(torch.zeros(1))], lr=0.4)
    scheduler = LambdaLR(optimizer, lab0.make_lr_lambda(98, 20))
    rates = []
    for _ in range(1961):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert max(rates) == 0.4 and rates.index(0.4) == 588 and rates.count(0.4) == 1
    assert rates[0] == rates[1960] == 0


# ---- Training --------------------------------------------------------------------------------
def make_training(dataset, batch_size=32, lr=0.05, dtype=torch.float32, epochs=3):
    device = dataset["train"].images.device
    dataflow = lab0.make_dataflow(dataset, batch_size)
    model = lab0.VGG(dtype).to(device, memory_format=torch.channels_last)
    optimizer = SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4)
    scheduler = LambdaLR(optimizer, lab0.make_lr_lambda(len(dataflow["train"]), epochs))
    return model, dataflow["train"], nn.CrossEntropyLoss(), optimizer, scheduler


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_train_lowers_the_loss_in_every_precision_with_float32_weights(small_vgg, dtype):
    lab0.set_seed(0)
    training = make_training(lab0.generate_dataset("cpu"), 10, lr=0.01, dtype=dtype)
    scaler = torch.amp.GradScaler("cpu", enabled=(dtype == torch.float16))
    losses = [lab0.train(*training, scaler=scaler) for _ in range(3)]
    assert losses[2] < losses[1] < losses[0] and losses[2] < 0.5 * losses[0]
    assert {tensor.dtype for tensor in training[0].state_dict().values()} == {
        torch.float32,
        torch.int64,
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_computes_the_backbone_in_it_and_the_rest_in_float32(dtype):
    features = []
    model = lab0.VGG(dtype)
    model.backbone.register_forward_hook(lambda m, i, output: features.append(output))
    outputs = model(torch.rand(2, 3, 32, 32))
    assert features[0].dtype == dtype
    assert torch.equal(outputs, model.classifier(features[0].float().mean([2, 3])))


class Label(nn.Module):
    """Gives each image its own first pixel, as ten times the logits of a known answer."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.modes = []

    def forward(self, inputs):
        self.modes.append((self.training, torch.is_inference_mode_enabled()))
        classes = (inputs[:, 0, 0, 0] * 255).round().long()
        return nn.functional.one_hot(classes, 10) * self.scale


def test_train_returns_the_mean_over_images_and_steps_scheduler_and_callbacks():
    dataset = make_dataset(70, 10)  # batches of 32, 32 and 6
    dataset["train"].transform = lab0.ToFloat()
    dataset["train"].images[:, 0, 0, 0] = torch.arange(70) % 9  # some right, most wrong
    dataflow = lab0.make_dataflow(dataset, 32)["train"]
    model, calls = Label(), []
    optimizer = SGD(model.parameters(), lr=1e-12)
    scheduler = LambdaLR(optimizer, lambda step: float(step))
    rates = []
    optimizer.register_step_pre_hook(lambda o, *_: rates.append(o.param_groups[0]["lr"]))
    callbacks = [lambda: calls.append("a"), lambda: calls.append(scheduler.last_epoch)]
    model.eval()
    loss = lab0.train(model, dataflow, nn.CrossEntropyLoss(), optimizer, scheduler, callbacks)
    outputs = nn.functional.one_hot(torch.arange(70) % 9, 10).float()
    expected = nn.functional.cross_entropy(outputs, dataset["train"].targets).item()
    assert loss == pytest.approx(expected, rel=1e-6) and isinstance(loss, float)
    assert calls == ["a", 1, "a", 2, "a", 3]  # each once per step, after the scheduler's step
    assert rates == [0, 1e-12, 2e-12] and scheduler.last_epoch == 3
    assert model.training


def test_evaluate_is_exact_and_builds_no_graph():
    dataset = make_dataset(10, 70)
    dataset["test"].images[:, 0, 0, 0] = dataset["test"].targets.byte()
    dataset["test"].images[:21, 0, 0, 0] = (dataset["test"].targets[:21].byte() + 1) % 10
    dataflow = lab0.make_dataflow(dataset, 32)["test"]
    model = Label()
    accuracy = lab0.evaluate(model, dataflow)
    assert accuracy == pytest.approx(70.0) and isinstance(accuracy, float)
    assert model.modes == [(False, True)] * 3


def test_evaluate_uses_running_statistics_and_leaves_them(small_vgg):
    model = lab0.VGG()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    dataset = make_dataset(10, 40)
    accuracy = lab0.evaluate(model, lab0.make_dataflow(dataset, 40)["test"])
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    one_by_one = lab0.evaluate(model, lab0.make_dataflow(dataset, 1)["test"])
    assert accuracy == one_by_one  # batch statistics would differ


def test_steps_read_nothing_from_the_device(small_vgg, monkeypatch):
    counts = Counter()
    for name in ["item", "cpu", "tolist", "numpy", "__bool__", "__float__", "__int__", "nonzero"]:
        method = getattr(torch.Tensor, name)

        def counted(*args, _name=name, _method=method, **kwargs):
            counts[_name] += 1
            return _method(*args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, counted)

    def count(steps):
        training = make_training(make_dataset(steps * 4, steps * 4), batch_size=4)
        counts.clear()
        lab0.train(*training)
        lab0.evaluate(training[0], training[1])
        return dict(counts)

    assert count(2) == count(20) != {}


# ---- The whole run ---------------------------------------------------------------------------
def test_main_on_a_miniature_cifar10_from_start_to_end(cifar10, tmp_path, capsys):
    cifar10.extract()
    out = tmp_path / "deep" / "outputs"
    args = ["--data-root", cifar10.root, "--device", "cpu", "--epochs", 2, "--batch-size", 64]
    metrics, checkpoint = run(*args, "--lr", 0.01, "--seed", 3, out=out)

    assert {file.name for file in out.iterdir()} == FILES
    for name, size in PNG_SIZES.items():
        assert imread(out / name).shape[:2] == size, name

    assert metrics["config"] == {
        "data_root": str(cifar10.root), "data_url": None, "output_dir": str(out), "epochs": 2,
        "batch_size": 64, "lr": 0.01, "seed": 3, "device": "cpu", "precision": "fp32",
        "compile": False, "resume": False, "smoke": False,
    }  # fmt: skip
    assert metrics["environment"] == {
        "python": platform.python_version(), "torch": torch.__version__,
        "torchvision": torchvision.__version__, "device": "cpu", "precision": "fp32",
    }  # fmt: skip
    assert (metrics["params"], metrics["macs"]) == (9_228_362, 606_164_480)
    assert (metrics["train_images"], metrics["test_images"]) == (100, 40)
    assert metrics["peak_memory_bytes"] is None
    assert [epoch["epoch"] for epoch in metrics["epochs"]] == [1, 2]
    for epoch in metrics["epochs"]:
        assert set(epoch) == {"epoch", "train_loss", "test_accuracy", "train_seconds", "seconds"}
        assert 0 < epoch["train_seconds"] < epoch["seconds"]
    assert metrics["test_accuracy"] == metrics["epochs"][-1]["test_accuracy"]

    assert set(checkpoint) == {
        "state_dict", "epoch", "optimizer", "scheduler", "scaler", "history", "config",
    }  # fmt: skip
    assert checkpoint["epoch"] == 2 and checkpoint["history"] == metrics["epochs"]
    group = checkpoint["optimizer"]["param_groups"][0]
    assert (group["initial_lr"], group["momentum"], group["weight_decay"]) == (0.01, 0.9, 5e-4)
    assert group["fused"] and not group["nesterov"]
    assert checkpoint["scheduler"]["last_epoch"] == 4
    assert list(checkpoint["state_dict"]) == expected_state_dict_keys()
    model = lab0.VGG()
    model.load_state_dict(checkpoint["state_dict"])
    dataflow = lab0.make_dataflow(cifar10.load(), 64)
    assert lab0.evaluate(model, dataflow["test"]) == metrics["test_accuracy"]

    printed = capsys.readouterr()
    assert "hours on a CPU" in printed.out.split("[inputs]")[0]
    for line in [
        "[inputs] dtype: torch.float32, shape: torch.Size([64, 3, 32, 32])",
        "[targets] dtype: torch.int64, shape: torch.Size([64])",
        "(conv7): Conv2d(512, 512",
        "#Params: 9228362 (9.2M)",
        "#MACs: 606164480 (606M)",
        f"Test accuracy {metrics['test_accuracy']:.2f} %",
        str(out),
    ]:
        assert line in printed.out
    seconds = sum(epoch["train_seconds"] for epoch in metrics["epochs"])
    assert f"Training took {seconds:.1f} s, {2 * 100 / seconds:,.0f} images/s" in printed.out
    assert printed.err == ""  # no progress bars where there is no terminal


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_main_runs_the_tutorials_cells_in_their_order(precision, small_vgg, tmp_path):
    out = tmp_path / "outputs"
    args = ["--smoke", "--device", "cpu", "--epochs", 3, "--batch-size", 16, "--lr", 0.05]
    metrics, checkpoint = run(*args, "--precision", precision, "--seed", 1, out=out)
    fp16 = precision == "fp16"

    lab0.set_seed(1)
    dataset = lab0.generate_dataset("cpu")
    dataflow = lab0.make_dataflow(dataset, batch_size=16)
    next(iter(dataflow["train"]))
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    model = lab0.VGG(dtypes[precision]).to(memory_format=torch.channels_last)
    criterion = nn.CrossEntropyLoss()
    scaler = torch.amp.GradScaler("cpu", enabled=fp16)
    optimizer = SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=5e-4, fused=not fp16)
    lr_lambda = lab0.make_lr_lambda(steps_per_epoch=13, num_epochs=3)
    scheduler = LambdaLR(optimizer, lr_lambda)
    for epoch in metrics["epochs"]:
        lab0.set_seed(1, epoch["epoch"])
        loss = lab0.train(model, dataflow["train"], criterion, optimizer, scheduler, scaler=scaler)
        assert epoch["train_loss"] == loss
        assert epoch["test_accuracy"] == lab0.evaluate(model, dataflow["test"])
    for name, weight in model.state_dict().items():
        saved = checkpoint["state_dict"][name]
        assert torch.equal(saved, weight) and saved.stride() == weight.stride(), name
    assert checkpoint["scaler"] == scaler.state_dict()
    assert metrics["environment"]["precision"] == precision
    assert checkpoint["optimizer"]["param_groups"][0]["fused"] != fp16


def test_main_saves_the_tutorials_pictures(finished, tmp_path):
    checkpoint = torch.load(finished / "checkpoint.pth")
    dataset = lab0.generate_dataset("cpu")
    model = lab0.VGG().to(memory_format=torch.channels_last)
    model.load_state_dict(checkpoint["state_dict"])
    lr_lambda = lab0.make_lr_lambda(steps_per_epoch=2, num_epochs=3)
    for name, figure in {
        "samples.png": lab0.plot_samples(dataset["test"]),
        "lr_schedule.png": lab0.plot_lr_schedule(lr_lambda, num_steps=6, lr=0.01),
        "history.png": lab0.plot_history(checkpoint["history"]),
        "predictions.png": lab0.plot_predictions(model, dataset["test"]),
    }.items():
        figure.savefig(tmp_path / name)
        assert (finished / name).read_bytes() == (tmp_path / name).read_bytes(), name


def test_smoke_run_learns_far_beyond_chance(tmp_path, capsys):
    metrics, _ = run("--smoke", "--device", "cpu", out=tmp_path)
    assert metrics["test_accuracy"] > 60
    assert {file.name for file in tmp_path.iterdir()} == FILES
    assert metrics["train_images"] <= 500 and metrics["params"] == 9_228_362
    assert "images are generated" in capsys.readouterr().out


def test_smoke_images_are_learnable_but_not_repeated():
    dataset = lab0.generate_dataset("cpu")
    images = torch.cat([dataset[split].images for split in dataset]).flatten(1)
    assert len(images.unique(dim=0)) == len(images)
    for split in dataset:
        assert dataset[split].targets.bincount().unique().numel() == 1  # classes in equal parts
        assert dataset[split].transform is lab0.transforms[split]


def test_compile_keeps_the_names_and_the_counts(finished, tmp_path, monkeypatch):
    compiled = []

    def compile_eagerly(model):  # what --compile does, less the minutes of code generation
        compiled.append(lab0.count_macs(model))
        model._compiled_call_impl = torch.compile(model._call_impl, backend="eager")

    monkeypatch.setattr(lab0.VGG, "compile", compile_eagerly)
    metrics, checkpoint = run(*QUICK, "--compile", out=tmp_path / "compiled")
    assert compiled == [metrics["macs"]]
    plain = torch.load(finished / "checkpoint.pth", weights_only=True)
    assert list(checkpoint["state_dict"]) == list(plain["state_dict"])
    assert checkpoint["history"][0]["train_loss"] == pytest.approx(
        plain["history"][0]["train_loss"]
    )


@pytest.mark.parametrize(
    "usable, device, precision",
    [
        ({"cuda", "mps", "bf16"}, "cuda", "bf16"),
        ({"cuda"}, "cuda", "fp16"),
        ({"mps"}, "mps", "fp32"),
        (set(), "cpu", "fp32"),
    ],
)
def test_device_and_precision_auto(usable, device, precision, monkeypatch):
    def has_bf16(including_emulation=True):  # as a T4, which emulates it, answers
        return including_emulation or "bf16" in usable

    monkeypatch.setattr(torch.cuda, "is_available", lambda: "cuda" in usable)
    monkeypatch.setattr(torch.mps, "is_available", lambda: "mps" in usable)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", has_bf16)
    args = lab0.parse_args([])
    assert (args.device, args.precision) == (device, precision)
    assert lab0.parse_args(["--precision", "bf16"]).precision == "bf16"


def test_default_recipe_is_the_tutorials():
    args = lab0.parse_args([])
    assert (args.epochs, args.batch_size, args.lr, args.seed) == (20, 512, 0.4, 0)
    assert args.data_root == "data/cifar10" and args.output_dir == "outputs"


def test_same_seed_same_bits_and_another_seed_another_result(finished, tmp_path):
    _, again = run(*QUICK, out=tmp_path / "again")
    assert_same_run(finished, tmp_path / "again")
    _, other = run(*QUICK, "--seed", 1, out=tmp_path / "other")
    for name, weights in again["state_dict"].items():
        if name.endswith("weight") and "bn" not in name:
            assert not torch.equal(weights, other["state_dict"][name]), name


def test_full_run_is_held_against_the_tutorials_accuracy(cifar10, small_vgg, tmp_path, capsys):
    cifar10.extract()
    metrics, _ = run("--data-root", cifar10.root, "--device", "cpu", out=tmp_path)
    assert "bar: 92.5 %" in capsys.readouterr().out
    figure = lab0.plot_history(metrics["epochs"], 92.5)
    assert any(list(line.get_ydata()) == [92.5, 92.5] for line in figure.axes[1].lines)
    figure.savefig(tmp_path / "expected.png")
    assert (tmp_path / "history.png").read_bytes() == (tmp_path / "expected.png").read_bytes()
    assert len(lab0.plot_history(metrics["epochs"]).axes[1].lines) == 1


def test_schedule_picture_marks_its_peak():
    axis = lab0.plot_lr_schedule(lab0.make_lr_lambda(98), 1960, 0.4).axes[0]
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["peak: 0.4 at step 588"]
    assert axis.get_xlabel() == "Number of Steps" and axis.get_ylabel() == "Learning Rate"


@pytest.mark.parametrize("epochs", [1, 2, 20])
def test_history_picture_counts_whole_epochs(epochs):
    epoch = {"train_loss": 2.0, "test_accuracy": 40.0}
    history = [{"epoch": number, **epoch} for number in range(1, epochs + 1)]
    for axis in lab0.plot_history(history).axes:
        ticks = axis.get_xticks()
        assert 1 <= len(ticks) <= 12 and all(tick == int(tick) for tick in ticks)


def test_sample_grid_has_a_column_per_class():
    dataset = make_dataset(10, 100)["test"]
    axes = lab0.plot_samples(dataset).axes
    assert [axis.get_title() for axis in axes] == dataset.classes * 4
    for index, axis in enumerate(axes):
        shown = torch.as_tensor(axis.images[0].get_array())
        image = dataset.images[index].permute(1, 2, 0) / 255  # targets are 0 1 … 9 0 1 …
        assert torch.equal(shown, image)
        assert axis.images[0].get_interpolation() == "nearest"


def test_prediction_grid_frames_the_wrong_ones():
    dataset = make_dataset(10, 40)["test"]
    dataset.images[:, 0, 0, 0] = dataset.targets.byte()
    dataset.images[7, 0, 0, 0] = 2
    axes = lab0.plot_predictions(Label(), dataset).axes
    assert axes[7].get_title() == "pred: class 2\nlabel: class 7"
    assert axes[8].get_title() == "pred: class 8\nlabel: class 8"
    assert [i for i, axis in enumerate(axes) if axis.get_frame_on()] == [7]


# ---- The data arrives ------------------------------------------------------------------------
class Source(http.server.BaseHTTPRequestHandler):
    """Serves `archive` under /good, and every way to fail under other paths."""

    archive = b""

    def do_GET(self):
        if self.path.startswith("/error"):
            return self.send_error(503)
        if self.path.startswith("/silent"):
            return time.sleep(3)
        data = b"x" * len(self.archive) if self.path.startswith("/wrong") else self.archive
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        half = data[: len(data) // 2]
        if self.path.startswith("/short"):
            self.wfile.write(half)
        elif self.path.startswith("/stalled"):
            self.wfile.write(half)
            self.wfile.flush()
            time.sleep(3)
        else:
            self.wfile.write(data)

    def log_message(self, *args):
        pass


@pytest.fixture
def source(cifar10, monkeypatch):
    monkeypatch.setattr(lab0, "SOURCE_TIMEOUT", 0.5)
    monkeypatch.setattr(Source, "archive", cifar10.archive)
    monkeypatch.setenv("no_proxy", "*")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Source)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


FAILURES = {
    "error": "503",
    "silent": "timed out",
    "stalled": "timed out",
    "short": "MD5",
    "wrong": "MD5",
    "refused": "refused",
    "nonsense": "unknown url type",
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_failing_source_is_left_for_the_next(failure, source, cifar10, monkeypatch, capsys):
    closed = "http://127.0.0.1:9/cifar"  # nothing listens on the discard port
    bad = {"refused": closed, "nonsense": "cifar.tar.gz"}.get(failure, f"{source}/{failure}")
    monkeypatch.setattr(lab0, "SOURCES", [bad, f"{source}/good"])
    cifar10.load()
    lines = [line for line in capsys.readouterr().err.splitlines() if "failed" in line]
    assert len(lines) == 1 and FAILURES[failure] in lines[0]
    assert {path.name for path in cifar10.root.iterdir()} == {
        CIFAR10.filename,
        CIFAR10.base_folder,
    }
    monkeypatch.setattr(lab0, "SOURCES", [])
    cifar10.load()  # from now on without asking anyone


def test_data_url_goes_first_and_may_be_a_file(source, cifar10, monkeypatch, tmp_path):
    (tmp_path / "copy.tar.gz").write_bytes(cifar10.archive)
    monkeypatch.setattr(lab0, "SOURCES", [f"{source}/wrong"])
    cifar10.load(data_url=(tmp_path / "copy.tar.gz").as_uri())
    shutil.rmtree(cifar10.root)
    cifar10.load(data_url=f"{source}/good")


def test_data_url_that_is_a_known_source_is_asked_once(source, cifar10, monkeypatch, capsys):
    known = [f"{source}/wrong", f"{source}/error", f"{source}/good"]
    monkeypatch.setattr(lab0, "SOURCES", known)
    cifar10.load(data_url=known[1])
    first, second = [line for line in capsys.readouterr().err.splitlines() if "failed" in line]
    assert "503" in first and "MD5" in second


def test_an_archive_in_the_data_folder_is_used_without_asking_anyone(cifar10):
    cifar10.pack()
    cifar10.load()


@pytest.mark.parametrize("name", ["batches.meta", "data_batch_3", "test_batch"])
@pytest.mark.parametrize("damage", ["missing", "cut short", "changed"])
def test_a_damaged_extracted_file_is_noticed_and_replaced(name, damage, cifar10):
    cifar10.pack()
    cifar10.extract()
    file = cifar10.folder / name
    file.unlink()
    if damage != "missing":
        whole = cifar10.files[name]
        file.write_bytes(whole[:-9] if damage == "cut short" else whole[:-9] + b"123456789")
    cifar10.load()


def test_a_damaged_archive_is_noticed_and_fetched_again(source, cifar10, monkeypatch):
    cifar10.root.mkdir()
    (cifar10.root / CIFAR10.filename).write_bytes(cifar10.archive[:-100])
    monkeypatch.setattr(lab0, "SOURCES", [f"{source}/good"])
    cifar10.load()


def test_a_read_only_folder_with_the_archive_alone_will_do(cifar10, monkeypatch):
    cifar10.pack()
    monkeypatch.setattr(lab0.os, "access", lambda path, mode: False)  # root may write anywhere
    cifar10.load()
    assert {path.name for path in cifar10.root.iterdir()} == {CIFAR10.filename}


def test_when_every_source_fails_the_last_lines_name_the_ways_out(
    source, cifar10, monkeypatch, tmp_path, capsys
):
    monkeypatch.setattr(lab0, "SOURCES", [f"{source}/error", f"{source}/short"])
    with pytest.raises(SystemExit) as exit_:
        run("--data-root", cifar10.root, "--data-url", "nowhere", out=tmp_path / "out")
    assert exit_.value.code == 2 and not (tmp_path / "out").exists()
    tried = capsys.readouterr().err.splitlines()[-4:]
    assert "nowhere" in tried[0] and "503" in tried[1] and "MD5" in tried[2]
    for way in ["--data-url", CIFAR10.filename, str(cifar10.root), "--smoke"]:
        assert way in tried[3]
    assert list(cifar10.root.iterdir()) == []


def test_sources_are_four_and_the_official_one_is_last():
    assert len(lab0.SOURCES) == 4 and lab0.SOURCES[-1] == CIFAR10.url
    assert all(source.endswith("/" + CIFAR10.filename) for source in lab0.SOURCES)


# ---- Errors that help ------------------------------------------------------------------------
def fails(capsys, *args, status=2):
    """Run main, expect `status`, return the last line on standard error."""
    with pytest.raises(SystemExit) as exit_:
        lab0.main([str(arg) for arg in args])
    code = exit_.value.code
    if isinstance(code, str):  # what Python prints before it exits with status 1
        assert status == 1
        return code
    assert code == status
    return capsys.readouterr().err.splitlines()[-1]


USER_ERRORS = [
    *[(flag, value) for flag in ("--epochs", "--batch-size") for value in ("0", "-1", "1.5", "x")],
    *[("--lr", value) for value in ("0", "-0.1", "nan", "inf", "-inf", "fast")],
    *[("--seed", value) for value in ("-1", str(2**32), "1.5", "nan")],
    ("--device", "tpu"),
    ("--precision", "fp8"),
    ("--colour", "red"),
]


@pytest.mark.parametrize("flag, value", USER_ERRORS)
def test_a_wrong_argument_is_named_with_its_value(flag, value, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    line = fails(capsys, f"{flag}={value}")
    assert flag in line and value.replace("--", "") in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_device_cuda_without_cuda_says_so(capsys):
    line = fails(capsys, "--device", "cuda")
    assert "--device" in line and "cuda" in line and "cpu" in line


@pytest.mark.parametrize("flag", ["--data-root", "--output-dir"])
def test_a_file_in_place_of_a_folder_is_named(flag, cifar10, tmp_path, monkeypatch, capsys):
    if flag == "--output-dir":
        cifar10.extract()
    file = tmp_path / "file"
    file.write_text("mine")
    folders = {"--data-root": cifar10.root, "--output-dir": tmp_path / "out", flag: file}
    line = fails(capsys, *itertools.chain(*folders.items()))
    assert flag in line and str(file) in line
    assert file.read_text() == "mine" and not (tmp_path / "out").exists()


def test_resume_without_a_checkpoint_says_so(tmp_path, capsys):
    line = fails(capsys, "--resume", "--smoke", "--output-dir", tmp_path / "out")
    assert "--resume" in line and "checkpoint.pth" in line and "without" in line
    assert not (tmp_path / "out").exists()


class Trap:
    """Pickled, a command for whoever unpickles it."""

    def __reduce__(self):
        return (Path.touch, (Path("trapped"),))


def test_resume_refuses_what_is_no_checkpoint_and_executes_nothing(
    finished, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    path = finished / "checkpoint.pth"
    whole = path.read_bytes()
    trap, other = io.BytesIO(), io.BytesIO()
    torch.save(Trap(), trap)
    torch.save({"weights": torch.zeros(3)}, other)
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    damaged = [b"", b"text", whole[:-1000], whole[1000:], bytes(flipped)]
    for bad in [*damaged, trap.getvalue(), pickle.dumps(Trap()), other.getvalue()]:
        path.write_bytes(bad)
        line = fails(capsys, *QUICK, "--resume", "--output-dir", finished)
        assert "--resume" in line and str(path) in line
        assert path.read_bytes() == bad
    assert not (tmp_path / "trapped").exists()


@pytest.mark.parametrize("flag, value", [("--epochs", 4), ("--seed", 1), ("--batch-size", 50)])
def test_resume_names_a_setting_that_changed(flag, value, finished, capsys):
    line = fails(capsys, *QUICK, flag, value, "--resume", "--output-dir", finished)
    assert "--resume" in line and flag[2:].replace("-", "_") in line and str(value) in line


def test_a_loss_that_is_not_finite_ends_the_run_with_advice(finished, capsys):
    before = (finished / "checkpoint.pth").read_bytes()
    line = fails(capsys, *QUICK, "--lr", 1e8, "--output-dir", finished, status=1)
    assert "--lr" in line and "lower" in line
    assert (finished / "checkpoint.pth").read_bytes() == before


def test_a_full_disk_leaves_the_last_good_checkpoint(finished, capsys):
    resource = pytest.importorskip("resource")  # as a full disk, a limit on the size of files
    before = (finished / "checkpoint.pth").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) - 1000, limits[1]))
    try:
        line = fails(capsys, *QUICK, "--seed", 1, "--output-dir", finished)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "File too large" in line and "--output-dir" in line
    assert (finished / "checkpoint.pth").read_bytes() == before
    assert {file.name for file in finished.iterdir()} == FILES


def test_ctrl_c_says_how_to_resume(small_vgg, tmp_path, monkeypatch, capsys):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(lab0, "evaluate", interrupt)
    line = fails(capsys, *QUICK, "--output-dir", tmp_path, status=130)
    assert "--resume" in line


def test_a_device_out_of_memory_is_no_missing_file(cifar10, tmp_path, monkeypatch, capsys):
    def out_of_memory(*args):
        raise torch.OutOfMemoryError("out of memory")

    cifar10.extract()
    monkeypatch.setattr(lab0, "DeviceDataset", out_of_memory)
    line = fails(capsys, "--data-root", cifar10.root, "--output-dir", tmp_path / "out")
    assert "out of memory" in line and "--batch-size" in line


def test_a_programming_error_keeps_its_traceback(small_vgg, tmp_path, monkeypatch):
    monkeypatch.setattr(lab0, "evaluate", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(*QUICK, out=tmp_path)


# ---- Runs that survive -----------------------------------------------------------------------
# Run lab0 and die, as by kill -9, in the checkpoint or training step with this number.
KILLED = """
import os, signal, sys, lab0, torch
from pathlib import Path
out, moment, number = sys.argv[1], sys.argv[2], int(sys.argv[3])
lab0.VGG.ARCH, lab0.CHECKPOINT_SECONDS = {arch}, 0
count = 0
def dying(function):
    def wrapped(self, *args, **kwargs):
        global count
        count += moment == "step" or self.name == "checkpoint.pth.part"
        if count == number:
            if moment == "save":
                function(self, args[0][:1000])
            os.kill(os.getpid(), signal.SIGKILL)
        return function(self, *args, **kwargs)
    return wrapped
owner, name = (Path, "write_bytes") if moment == "save" else (torch.optim.SGD, "step")
setattr(owner, name, dying(getattr(owner, name)))
lab0.main([*{args}, "--output-dir", out, *sys.argv[4:]])
"""


def test_a_run_killed_twice_and_resumed_ends_with_the_same_bits(finished, tmp_path, capsys):
    out = tmp_path / "killed"
    code = KILLED.format(arch=SMALL_ARCH, args=QUICK)
    for moment in [("save", "2"), ("step", "2", "--resume")]:
        command = [sys.executable, "-c", code, str(out), *moment]
        done = subprocess.run(command, cwd=HERE, capture_output=True, check=False)
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert torch.load(out / "checkpoint.pth", weights_only=True)["epoch"] == 1
    assert (out / "checkpoint.pth.part").exists()  # it did die while saving
    lab0.main([*QUICK, "--resume", "--output-dir", str(out)])
    assert_same_run(finished, out)

    before = (out / "checkpoint.pth").stat().st_mtime_ns
    capsys.readouterr()
    assert lab0.main([*QUICK, "--resume", "--output-dir", str(out)]) is None
    assert "finished" in capsys.readouterr().out
    assert (out / "checkpoint.pth").stat().st_mtime_ns == before


def test_checkpoints_are_written_when_30_seconds_have_passed(small_vgg, tmp_path, monkeypatch):
    assert lab0.CHECKPOINT_SECONDS == 30
    clock, saved = itertools.count(step=8), []
    save_checkpoint = lab0.save_checkpoint

    def save(path, parts, history, config):
        saved.append(len(history))
        save_checkpoint(path, parts, history, config)

    monkeypatch.setattr(lab0, "save_checkpoint", save)
    monkeypatch.setattr(lab0.time, "perf_counter", lambda: next(clock))  # 24 seconds an epoch
    run(*QUICK[:-4], "--epochs", 6, "--batch-size", 200, out=tmp_path)
    assert saved == [2, 4, 6]


# ---- CUDA ------------------------------------------------------------------------------------
@on_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_cuda_trains_in_every_precision_to_the_same_accuracy(dtype):
    lab0.set_seed(0)
    dataset = lab0.generate_dataset("cuda")
    assert all(dataset[s].images.is_cuda and dataset[s].targets.is_cuda for s in dataset)
    training = make_training(dataset, 10, lr=0.01, dtype=dtype, epochs=6)
    scaler = torch.amp.GradScaler("cuda", enabled=(dtype == torch.float16))
    for _ in range(6):
        lab0.train(*training, scaler=scaler)
    accuracy = lab0.evaluate(training[0], lab0.make_dataflow(dataset)["test"])
    assert accuracy > 95
    assert next(training[0].parameters()).dtype == torch.float32


@on_cuda
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_cuda_two_runs_agree_bit_for_bit(precision, tmp_path):
    for name in "ab":
        run("--smoke", "--device", "cuda", "--precision", precision, out=tmp_path / name)
    metrics = [json.loads((tmp_path / name / "metrics.json").read_text()) for name in "ab"]
    for m in metrics:
        assert m.pop("peak_memory_bytes") > 0
    assert without_times(metrics[0]) == without_times(metrics[1])
    states = [torch.load(tmp_path / name / "checkpoint.pth")["state_dict"] for name in "ab"]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@on_cuda
def test_cuda_steps_never_wait_for_the_device():
    dataset = make_dataset(64, 64, "cuda")
    model, dataflow, criterion, _, _ = make_training(dataset, dtype=torch.bfloat16)
    optimizer = SGD(model.parameters(), lr=0.4, momentum=0.9, weight_decay=5e-4, fused=True)
    scheduler = LambdaLR(optimizer, lab0.make_lr_lambda(len(dataflow)))
    lab0.train(model, dataflow, criterion, optimizer, scheduler)  # cuDNN's first calls
    step = []

    class Steps:  # a training epoch up to its last line, which reads the loss
        def __iter__(self):
            for batch in dataflow:
                torch.cuda.set_sync_debug_mode("error")
                yield batch
                torch.cuda.set_sync_debug_mode("default")
                step.append(1)

    try:
        lab0.train(model, Steps(), criterion, optimizer, scheduler)
        torch.cuda.set_sync_debug_mode("error")
        assert len(dataset["train"][torch.arange(8, device="cuda")]) == 2
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(step) == 2


@on_cuda
def test_cuda_transforms_keep_to_tensors_bits():
    values = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    assert torch.equal(lab0.ToFloat()(values.cuda()).cpu(), lab0.ToFloat()(values))
