"""What lab0 promises, one test for each promise. `make test` runs them, without a network.

First come the tutorial's numbers, which need nothing but lab0. Then fixtures, and the other tests
in the lab's order: data, model and precision, training, the whole run, interruptions and errors,
the download, the README, CUDA.

A fixture is a function that prepares something: a test that names it as an argument gets what it
returns. pytest brings some: tmp_path is an empty folder, capsys has what was printed, and
monkeypatch.setattr replaces something until the test ends, often by a Mock, which notes how it is
called. pytest.raises expects an error, and parametrize runs a test once for each of some values.

For a lab of your own, change what no longer holds. Another network: "The tutorial's numbers",
small_vgg, and the tests of VGG's layers. Other images or classes: cifar10_files and cifar10_root.
Another recipe: the schedule's numbers, make_training, and the tests of checkpoint and defaults.
"""

import copy
import hashlib
import io
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
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread, Timer
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torchvision
import torchvision.transforms as T
from matplotlib.figure import Figure
from matplotlib.image import imread
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.prune import l1_unstructured
from torch.optim import SGD
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import random_split
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
    assert lab0.count_macs(lab0.VGG()) == 606_164_480


def test_learning_rate_rises_to_0_4_at_step_588_of_1960_and_falls_to_0():
    lr_lambda = lab0.make_lr_lambda(steps_per_epoch=98, num_epochs=20)
    rates = [0.4 * lr_lambda(step) for step in range(1961)]
    assert rates[0] == rates[1960] == 0
    assert rates[588] == max(rates) == 0.4
    assert rates[294] == pytest.approx(0.2)  # halfway up
    assert rates[1274] == pytest.approx(0.2)  # halfway down


# ---- Fixtures: a small network, a small CIFAR-10, and runs with them ----------------------------
CLASSES = ["plane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
FULL_ARCH = lab0.VGG.ARCH
QUICK = ["--device=cpu", "--epochs=3", "--batch-size=12", "--lr=0.01"]
on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
on_each_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=on_cuda)])


@pytest.fixture(scope="session")
def cifar10_files():
    """The files of a CIFAR-10 with 200 + 40 images, as bytes by name, in CIFAR-10's own format.

    A class is a pattern under noise. One test image of each class has a wrong label: the best
    possible accuracy is 75%.
    """
    generator = np.random.default_rng(0)
    patterns = generator.integers(256, size=(10, 3, 4, 4)).repeat(8, 2).repeat(8, 3)
    files = {"batches.meta": pickle.dumps({"label_names": CLASSES})}
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        labels = generator.permutation(40) % 10
        noise = generator.integers(256, size=(40, 3, 32, 32))
        images = ((2 * patterns[labels] + noise) // 3).astype(np.uint8).reshape(40, 3072)
        if name == "test_batch":
            first_of_each_class = np.unique(labels, return_index=True)[1]
            labels[first_of_each_class] = (np.arange(10) + 1) % 10
        files[name] = pickle.dumps({"data": images, "labels": labels.tolist()}, protocol=2)
    return files


@pytest.fixture
def small_vgg(monkeypatch):
    """lab0.VGG gets fewer channels, and learns the small CIFAR-10 in a second."""
    # The last number stays 512, since the classifier has as many inputs
    monkeypatch.setattr(lab0.VGG, "ARCH", [8, "M", 8, "M", 8, "M", 512, "M"])


@pytest.fixture
def cifar10_root(cifar10_files, tmp_path, monkeypatch):
    """A folder with the small CIFAR-10, whose MD5 sums torchvision takes for the real ones."""
    md5 = {name: hashlib.md5(content).hexdigest() for name, content in cifar10_files.items()}
    batches = [[name, md5[name]] for name in md5 if name.startswith("data_batch")]
    monkeypatch.setattr(CIFAR10, "train_list", batches)
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", md5["test_batch"]]])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": md5["batches.meta"]})
    monkeypatch.setattr(lab0, "SOURCES", [])  # nothing is downloaded
    folder = tmp_path / "data" / "cifar10" / CIFAR10.base_folder
    folder.mkdir(parents=True)
    for name, content in cifar10_files.items():
        (folder / name).write_bytes(content)
    return folder.parent


@pytest.fixture
def dataset(cifar10_root):
    """The small CIFAR-10, loaded."""
    return lab0.load_dataset(cifar10_root, "cpu")


@pytest.fixture
def no_pictures(monkeypatch):
    """The plots become empty figures, which take no time, and remember how they were called."""
    for name in ["plot_samples", "plot_lr_schedule", "plot_history", "plot_predictions"]:
        monkeypatch.setattr(lab0, name, Mock(return_value=Figure(figsize=(1, 1))))


@pytest.fixture
def run(small_vgg, cifar10_root, no_pictures, tmp_path):
    """A function that runs the lab in a second and returns its metrics and its checkpoint."""

    def run_lab(*args, output_dir=tmp_path / "run"):
        lab0.main([*QUICK, f"--data-root={cifar10_root}", f"--output-dir={output_dir}", *args])
        metrics = json.loads((output_dir / "metrics.json").read_text())
        return metrics, torch.load(output_dir / "checkpoint.pth", weights_only=True)

    return run_lab


def assert_same_training(one, other):
    """Two checkpoints have the same weights, losses and accuracies, bit for bit."""
    for name, weight in one["state_dict"].items():
        assert torch.equal(weight, other["state_dict"][name])
    for key in ["epoch", "train_loss", "test_accuracy"]:
        assert [record[key] for record in one["history"]] == [r[key] for r in other["history"]]


# ---- Setup and data --------------------------------------------------------------------------
def draw_numbers():
    return random.random(), np.random.rand(), torch.rand(1).item()


def test_seeds_are_the_tutorials_and_no_two_epochs_draw_the_same_numbers():
    random.seed(7)
    np.random.seed(7)
    torch.manual_seed(7)
    expected = draw_numbers()
    lab0.set_seed(7)
    assert draw_numbers() == expected and torch.backends.cudnn.deterministic

    drawn = set()
    for seed, epoch in itertools.product([*range(9), 2**32 - 1], range(21)):
        lab0.set_seed(seed, epoch)
        drawn.update(draw_numbers())
    assert len(drawn) == 10 * 21 * 3


def test_each_crop_and_flip_is_one_of_162_and_all_are_equally_likely():
    picture = np.random.default_rng(0).integers(256, size=(32, 32, 3), dtype=np.uint8)
    padded = T.functional.pad(T.ToPILImage()(picture), 4)
    numbers = {}  # one for each image that torchvision's crop, flip and ToTensor can make
    for top, left in itertools.product(range(9), range(9)):
        crop = T.functional.crop(padded, top, left, 32, 32)
        for image in [crop, T.functional.hflip(crop)]:
            numbers[T.ToTensor()(image).numpy().tobytes()] = len(numbers)
    assert len(numbers) == 162

    lab0.set_seed(0)
    counts = Counter()
    batch = torch.from_numpy(picture).permute(2, 0, 1).expand(1620, 3, 32, 32)
    for _ in range(10):
        for image in lab0.transforms["train"](batch):
            counts[numbers[image.numpy().tobytes()]] += 1
    # 100 of each are expected. With fair draws chi-square leaves these bounds once in 500 times.
    chi_square = sum((counts[number] - 100) ** 2 / 100 for number in range(162))
    assert 110 < chi_square < 222


@on_each_device
@pytest.mark.parametrize("split", ["train", "test"])
def test_data_set_is_what_torchvision_reads_but_on_the_device(split, device, cifar10_root):
    ours = lab0.load_dataset(cifar10_root, device)[split]
    theirs = CIFAR10(cifar10_root, train=(split == "train"), transform=T.ToTensor())
    assert ours.images.device.type == ours.targets.device.type == device
    assert ours.images.dtype == torch.uint8 and ours.images.is_contiguous()
    assert ours.targets.tolist() == theirs.targets and ours.classes == CLASSES
    # The same bits on the CPU. CUDA multiplies by 1/255, which can round the last bit differently.
    tolerance = 0 if device == "cpu" else 2e-7
    expected = torch.stack([image for image, _ in theirs])
    assert torch.allclose(lab0.to_tensor(ours.images).cpu(), expected, rtol=tolerance, atol=0)


def test_a_split_has_single_images_at_any_integer_and_can_be_looped_over(dataset):
    for i in [3, -37, np.int64(3), torch.tensor(3)]:
        image, target = dataset["test"][i]
        assert torch.equal(image, dataset["test"].images[3] / 255)
        assert target == dataset["test"].targets[3]
        assert dataset["train"][i][0].shape == (3, 32, 32)
    samples = [[] for _ in range(10)]
    for image, label in dataset["test"]:  # as the tutorial does
        samples[label].append(image)
    assert [len(images) for images in samples] == [4] * 10


def make_split(num_images, num_classes):
    """A DeviceDataset of random images, in which the i-th has the target i % num_classes."""
    images = torch.randint(256, (num_images, 3, 32, 32), dtype=torch.uint8)
    targets = torch.arange(num_images) % num_classes
    return lab0.DeviceDataset(images, targets, CLASSES[:num_classes], lab0.transforms["test"])


def test_dataflow_has_98_and_20_batches_of_512_with_a_partial_last_one():
    dataflow = lab0.make_dataflow({"train": torch.arange(50_000), "test": torch.arange(10_000)})
    assert [len(batch) for batch in dataflow["train"]] == [512] * 97 + [336]
    assert [len(batch) for batch in dataflow["test"]] == [512] * 19 + [272]


def test_training_images_come_once_an_epoch_in_a_new_order_and_others_in_theirs():
    split = make_split(50, num_classes=50)
    _, valid_part = random_split(make_split(30, num_classes=30), [20, 10])
    dataflow = lab0.make_dataflow({"train": split, "test": split, "valid": valid_part}, 8)

    def order(name):
        return [target for _, targets in dataflow[name] for target in targets.tolist()]

    first, second = order("train"), order("train")
    assert sorted(first) == sorted(second) == order("test") == list(range(50))
    assert first != second and first != sorted(first)
    assert order("valid") == list(valid_part.indices)  # torch's random_split works, as a third


def drawn_places(figure):
    """The places in the grid that have an image: place = 10 * row + column."""
    return {axis.get_subplotspec().num1: axis for axis in figure.axes if axis.images}


def test_samples_are_the_first_four_of_each_class_in_its_column(dataset):
    test = dataset["test"]
    drawn = drawn_places(lab0.plot_samples(test))
    assert [drawn[place].get_title() for place in range(40)] == CLASSES * 4
    third_cat = test.images[test.targets == 3][2] / 255
    assert np.array_equal(drawn[23].images[0].get_array(), third_cat.permute(1, 2, 0))


def test_samples_of_fewer_classes_and_images_are_what_there_is():
    drawn = drawn_places(lab0.plot_samples(make_split(7, num_classes=3)))
    assert set(drawn) == {0, 1, 2, 10, 11, 12, 20}


# ---- Model and precision ---------------------------------------------------------------------
def test_layers_have_the_tutorials_order_and_names_for_later_labs_to_load():
    layers = [name for name, _ in lab0.VGG().backbone.named_children()]
    assert layers[:7] == ["conv0", "bn0", "relu0", "conv1", "bn1", "relu1", "pool0"]
    assert layers[21:] == ["conv6", "bn6", "relu6", "conv7", "bn7", "relu7", "pool3"]
    names = {"backbone.conv7.weight", "backbone.bn7.running_mean", "classifier.bias"}
    assert names < set(lab0.VGG().state_dict())


def test_counting_leaves_a_model_as_it_was_and_leaves_out_what_is_frozen(small_vgg):
    model = lab0.VGG()
    trainable = lab0.count_params(model)
    model.backbone.bn0.eval().requires_grad_(False)  # a frozen layer in a model that is trained
    assert lab0.count_params(model) == trainable - 2 * 8
    before = copy.deepcopy(model.state_dict())
    lab0.count_macs(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    in_eval_mode = [name for name, module in model.named_modules() if not module.training]
    assert in_eval_mode == ["backbone.bn0"]


def test_macs_are_counted_for_any_shape_and_for_a_pruned_model():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1))
    assert lab0.count_macs(model, (1, 3, 64, 64)) == 3 * 8 * 3 * 3 * 64 * 64
    l1_unstructured(model[0], "weight", amount=0.5)
    model(torch.rand(1, 3, 8, 8))  # from now on the pruned weight remembers its gradient's way
    masking = 3 * 8 * 3 * 3  # is a multiplication for each weight
    assert lab0.count_macs(model, (1, 3, 8, 8)) == 3 * 8 * 3 * 3 * 8 * 8 + masking


LOW = [torch.bfloat16, torch.float16]


def gradients(model, split, device):
    """The weights' gradients, of a loss as small as a well-trained network's, and the images'."""
    images, targets = (tensor.to(device) for tensor in split[:])
    model.zero_grad()
    (1e-5 * cross_entropy(model(images.requires_grad_()), targets)).backward()
    return [weight.grad.clone() for weight in model.parameters()], images.grad


def relative_error(ours, exact):
    return ((ours - exact).norm() / exact.norm()).item()


@on_each_device
@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("case", ["training", "frozen BatchNorm", "copied", "weight replaced"])
def test_low_precision_has_float32s_gradients(case, dtype, device, run, dataset):
    _, checkpoint = run()
    model = lab0.VGG().to(device)
    model.load_state_dict(checkpoint["state_dict"])
    fast_model = lab0.MixedPrecision(model, dtype)
    if case == "frozen BatchNorm":
        fast_model.eval()
    elif case == "weight replaced":  # as a lab that prunes does
        model.backbone.conv1.weight = nn.Parameter(0.9 * model.backbone.conv1.weight.detach())
    elif case == "copied":
        fast_model = copy.deepcopy(fast_model)
    exact, exact_of_images = gradients(model, dataset["test"], device)
    ours, ours_of_images = gradients(fast_model, dataset["test"], device)
    mean_error = np.mean([relative_error(a, b) for a, b in zip(ours, exact)])
    print(f"mean relative error of the gradients: {mean_error:.1%}")
    # Without its scale, float16 would be off by 0.9. An error of 0 would mean float32.
    assert 0 < mean_error < 0.1
    assert 0 < relative_error(ours_of_images, exact_of_images) < 0.3


@on_each_device
@pytest.mark.parametrize("dtype", [torch.float32, *LOW])
def test_precision_changes_how_a_model_computes_and_nothing_else(dtype, device, small_vgg):
    model = lab0.VGG().to(device).eval()
    fast_model = lab0.MixedPrecision(model, dtype)
    images = torch.rand(4, 3, 32, 32, device=device)
    outputs = fast_model(images)
    assert outputs.dtype == torch.float32
    assert torch.allclose(outputs, model(images), atol=0.05)
    assert torch.equal(outputs, model(images)) == (dtype == torch.float32)  # no bit differs there
    assert all(a is b for a, b in zip(fast_model.parameters(), model.parameters(), strict=True))
    assert {weight.dtype for weight in fast_model.parameters()} == {torch.float32}
    assert lab0.count_macs(fast_model) == lab0.count_macs(model)


# ---- Optimization and training ---------------------------------------------------------------
def make_training(model, split, batch_size, **sgd_options):
    """The arguments of lab0.train, with the tutorial's recipe."""
    dataflow = lab0.make_dataflow({"train": split}, batch_size)["train"]
    recipe = {"lr": 0.4, "momentum": 0.9, "weight_decay": 5e-4}
    optimizer = SGD(model.parameters(), **recipe, **sgd_options)
    scheduler = LambdaLR(optimizer, lab0.make_lr_lambda(98))
    return model, dataflow, nn.CrossEntropyLoss(), optimizer, scheduler


def test_twenty_losses_are_those_of_the_tutorials_loop():
    # This is about train(); main's own recipe is in the test of the checkpoint. In float64 rounding
    # errors stay too small for a ReLU to fall on the other side of 0.
    lab0.set_seed(0)
    split = lab0.generate_dataset("cpu")["train"]
    model = lab0.VGG().double().to(memory_format=torch.channels_last)
    theirs = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
    _, dataflow, *ours = make_training(model, split, 2, fused=True)
    # From here on, `theirs`, `optimizer` and `scheduler` are the tutorial's
    optimizer = SGD(theirs.parameters(), lr=0.4, momentum=0.9, weight_decay=5e-4)
    scheduler = LambdaLR(optimizer, lambda step: np.interp([step / 98], [0, 6, 20], [0, 1, 0])[0])
    differences = []
    for inputs, targets in itertools.islice(dataflow, 20):
        our_loss = lab0.train(model, [(inputs.double(), targets)], *ours)
        optimizer.zero_grad()
        outputs = theirs(inputs.double())
        loss = cross_entropy(outputs, targets)
        loss.backward()
        optimizer.step()
        scheduler.step()
        differences.append(abs(our_loss - loss.item()) / loss.item())
    print("relative differences of the losses:", *(f"{d:.0e}" for d in differences))
    assert len(differences) == 20 and max(differences) < 1e-9


def make_linear_model(calls):
    """A quick network that notes of each call: is it for training? is it without gradients?"""
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10))
    model.register_forward_hook(
        lambda *args: calls.append((model.training, torch.is_inference_mode_enabled()))
    )
    return model


def test_train_returns_the_mean_loss_over_images_and_calls_back_after_each_step():
    dataflow = lab0.make_dataflow({"test": make_split(70, 10)}, 32)["test"]  # of 32, 32 and 6
    calls, events = [], []
    model = make_linear_model(calls).eval()  # train() has to switch it
    optimizer = SGD(model.parameters(), lr=0)  # keeps the weights, so that the loss is known
    scheduler = LambdaLR(optimizer, lab0.make_lr_lambda(3))
    callbacks = [lambda: events.append("a"), lambda: events.append(scheduler.last_epoch)]
    loss = lab0.train(model, dataflow, nn.CrossEntropyLoss(), optimizer, scheduler, callbacks)
    images, targets = dataflow.dataset[:]
    assert loss == pytest.approx(cross_entropy(model(images), targets).item(), rel=1e-5)
    assert events == ["a", 1, "a", 2, "a", 3]
    assert calls[:3] == [(True, False)] * 3


def test_evaluate_returns_the_percentage_of_right_answers():
    dataflow = lab0.make_dataflow({"test": make_split(70, 10)}, 32)["test"]
    calls = []
    model = make_linear_model(calls)
    accuracy = lab0.evaluate(model, dataflow)
    images, targets = dataflow.dataset[:]
    right = (model(images).argmax(dim=1) == targets).sum().item()
    assert accuracy == pytest.approx(100 * right / 70)
    assert calls[:3] == [(False, True)] * 3


def test_no_step_reads_a_value_from_the_device(small_vgg):
    # Reading a value makes the CPU wait for the GPU. Tensors on torch's "meta" device have a shape
    # and no values, and reading one is an error: an epoch gets to its last line, which reads.
    images = torch.zeros(30, 3, 32, 32, dtype=torch.uint8, device="meta")
    targets = torch.zeros(30, dtype=torch.int64, device="meta")
    split = lab0.DeviceDataset(images, targets, CLASSES, lab0.transforms["train"])
    model, *training = make_training(lab0.VGG().to("meta"), split, 10)
    steps = []
    model.register_forward_hook(lambda *args: steps.append("step"))
    with pytest.raises(RuntimeError, match="meta"):
        lab0.train(model, *training)
    assert steps == ["step"] * 3
    with pytest.raises(RuntimeError, match="meta"):
        lab0.evaluate(model, training[0])
    assert steps == ["step"] * 6


def test_pictures_mark_the_peak_the_goal_and_whole_epochs():
    (axis,) = lab0.plot_lr_schedule(lab0.make_lr_lambda(98), 1960, 0.4).axes
    assert axis.get_legend().get_texts()[0].get_text() == "peak: 0.4 at step 588"
    history = [{"epoch": 1, "train_loss": 2.0, "test_accuracy": 40.0}]
    loss_axis, accuracy_axis = lab0.plot_history(history).axes
    assert [list(line.get_ydata()) for line in loss_axis.lines] == [[2.0]]
    assert [list(line.get_ydata()) for line in accuracy_axis.lines] == [[40.0]]
    assert all(tick == int(tick) for tick in accuracy_axis.get_xticks())
    _, accuracy_axis = lab0.plot_history(history, goal=92.5).axes
    assert [list(line.get_ydata()) for line in accuracy_axis.lines] == [[40.0], [92.5, 92.5]]


def test_predictions_picture_marks_the_mistakes():
    split = make_split(40, num_classes=10)
    model = make_linear_model([])
    preds = model(split[:][0]).argmax(dim=1)
    split.targets[:20] = preds[:20]  # so that there are right ones
    axes = lab0.plot_predictions(model, split).axes
    for axis, pred, label in zip(axes, preds, split.targets):
        assert axis.get_title() == f"pred: {CLASSES[pred]}\nlabel: {CLASSES[label]}"
        assert axis.get_frame_on() == (pred != label)


# ---- The whole run ---------------------------------------------------------------------------
def test_a_run_learns(run, dataset):
    metrics, checkpoint = run("--epochs=4")
    losses = [record["train_loss"] for record in metrics["epochs"]]
    assert losses == sorted(losses, reverse=True)
    # A guess is right for 10% of the test images, the whole truth for 75%
    assert 60 < metrics["test_accuracy"] <= 75
    model, dataflow = lab0.VGG(), lab0.make_dataflow(dataset)
    model.load_state_dict(checkpoint["state_dict"])
    assert lab0.evaluate(model, dataflow["test"]) == metrics["test_accuracy"]
    assert lab0.evaluate(model, dataflow["train"]) > 90


def test_metrics_json_tells_settings_environment_counts_and_epochs(run):
    metrics, checkpoint = run()
    assert metrics == {
        "config": checkpoint["config"],
        "environment": {
            "python": sys.version.split()[0],
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "device": "cpu",
            "precision": "fp32",
        },
        "params": lab0.count_params(lab0.VGG()),
        "macs": lab0.count_macs(lab0.VGG()),
        "train_images": 200,
        "test_images": 40,
        "epochs": checkpoint["history"],
        "test_accuracy": checkpoint["history"][2]["test_accuracy"],
        "peak_memory_bytes": None,
    }
    assert [record["epoch"] for record in metrics["epochs"]] == [1, 2, 3]
    assert all(0 < record["train_seconds"] < record["seconds"] for record in metrics["epochs"])


def test_checkpoint_holds_the_tutorials_optimizer_and_the_settings(run, cifar10_root, tmp_path):
    _, checkpoint = run()
    (group,) = checkpoint["optimizer"]["param_groups"]
    assert (group["initial_lr"], group["momentum"], group["weight_decay"]) == (0.01, 0.9, 5e-4)
    assert group["fused"] and not group["nesterov"] and group["dampening"] == 0
    weight = checkpoint["state_dict"]["backbone.conv1.weight"]
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert checkpoint["epoch"] == len(checkpoint["history"]) == 3
    folders = [f"--data-root={cifar10_root}", f"--output-dir={tmp_path / 'run'}"]
    assert checkpoint["config"] == vars(lab0.parse_args([*QUICK, *folders]))


def test_a_run_prints_what_the_tutorial_prints_and_a_summary(run, tmp_path, capsys):
    metrics, _ = run()
    printed, errors = capsys.readouterr()
    params, macs, last = metrics["params"], metrics["macs"], metrics["epochs"][-1]
    for line in [
        "On cpu in fp32: 0 of 3 epochs are done\nAn epoch takes minutes on a CPU",
        "[inputs] dtype: torch.float32, shape: torch.Size([12, 3, 32, 32])",
        "[targets] dtype: torch.int64, shape: torch.Size([12])",
        "(conv3): Conv2d(8, 512, kernel_size=(3, 3)",
        f"#Params: {params} ({params / 1e6:.1f}M)\n#MACs: {macs} ({macs / 1e6:.0f}M)\n",
        f"epoch 3/3: loss {last['train_loss']:.4f}, accuracy {last['test_accuracy']:.2f}%, 00:00",
        f"Test accuracy {last['test_accuracy']:.2f}%\n",
        "Training took ",
        f"checkpoint.pth are in {tmp_path / 'run'}\n",
    ]:
        assert line in printed
    assert errors == ""  # no progress bars where there is no terminal


def test_the_speed_is_that_of_the_median_epoch(tmp_path, capsys):
    args = lab0.parse_args(["--device=cpu", f"--output-dir={tmp_path}"])
    history = [{"train_seconds": s, "test_accuracy": 50.0} for s in [99.0, 2.0, 2.5]]
    lab0.report(args, {"train": range(500), "test": range(100)}, {}, history, None)
    expected = "Training took 103.5 s; median epoch 2.5 s, 200 images/s\n"
    assert expected in capsys.readouterr().out


def test_a_run_leaves_six_files(small_vgg, cifar10_root, tmp_path):
    lab0.main([*QUICK, f"--data-root={cifar10_root}", f"--output-dir={tmp_path / 'run'}"])
    sizes = {path.name: imread(path).shape[:2] for path in (tmp_path / "run").glob("*.png")}
    assert sizes == {
        "samples.png": (900, 2000),
        "lr_schedule.png": (500, 800),
        "history.png": (500, 1200),
        "predictions.png": (1000, 2000),
    }
    others = {path.name for path in (tmp_path / "run").iterdir()} - set(sizes)
    assert others == {"metrics.json", "checkpoint.pth"}


def test_the_pictures_are_of_the_test_images_and_of_the_runs_figures(run):
    metrics, _ = run()
    assert len(lab0.plot_samples.call_args.args[0]) == 40
    assert lab0.plot_lr_schedule.call_args.args[1:] == (51, 0.01)  # 3 epochs of 17 batches
    assert lab0.plot_history.call_args.args == (metrics["epochs"], None)
    assert len(lab0.plot_predictions.call_args.args[1]) == 40


def test_a_seed_gives_the_same_bits_again_and_another_seed_others(run):
    (_, once), (_, again), (_, other) = run(), run(), run("--seed=1")
    assert_same_training(once, again)
    weights = [name for name in again["state_dict"] if re.search("conv.*weight", name)]
    assert not any(torch.equal(other["state_dict"][n], again["state_dict"][n]) for n in weights)


@pytest.mark.parametrize("goal", [92.5, None])
def test_twenty_epochs_are_held_against_the_goal_if_there_is_one(goal, run, monkeypatch, capsys):
    assert lab0.GOAL == 92.5
    monkeypatch.setattr(lab0, "GOAL", goal)
    run("--epochs=20", "--batch-size=200")
    assert ("92.5%" in capsys.readouterr().out) == (goal is not None)
    assert lab0.plot_history.call_args.args[1] == goal
    assert lab0.plot_lr_schedule.call_args.args[0](6) == 1  # the peak, at one step an epoch


@pytest.mark.parametrize("precision, flags", [("fp32", []), ("bf16", ["--compile"]), ("fp16", [])])
def test_smoke_learns_without_data_and_obeys_other_flags(precision, flags, run, monkeypatch):
    compiled = []  # torch.compile itself takes too long here
    monkeypatch.setattr(nn.Module, "compile", lambda module: compiled.append(module))
    nowhere = ["--data-root=nowhere", f"--precision={precision}"]
    metrics, checkpoint = run("--smoke", *nowhere, *flags)
    assert metrics["test_images"] == 100 and metrics["environment"]["precision"] == precision
    assert metrics["epochs"][2]["train_loss"] < metrics["epochs"][0]["train_loss"]
    assert checkpoint["state_dict"]["classifier.weight"].dtype == torch.float32
    fast_model, _ = lab0.plot_predictions.call_args.args
    assert fast_model.dtype == lab0.DTYPES[precision]
    assert compiled == ([fast_model] if flags else [])


def test_defaults_are_the_tutorials_and_each_script_has_folders_of_its_own(tmp_path):
    args = lab0.parse_args([])
    assert (args.epochs, args.batch_size, args.lr, args.seed) == (20, 512, 0.4, 0)
    assert (args.data_root, args.output_dir) == ("data/cifar10", "outputs/lab0")
    args = lab0.parse_args(["--smoke", "--lr=0.02"])
    assert (args.epochs, args.batch_size, args.lr) == (4, 10, 0.02)
    assert args.output_dir == "outputs/lab0-smoke"
    lab1 = runpy.run_path(shutil.copy(lab0.__file__, tmp_path / "lab1.py"))
    assert lab1["parse_args"]([]).output_dir == "outputs/lab1"


@pytest.mark.parametrize("gpu", ["H100", "T4", "Apple", None])
def test_the_best_tested_device_is_the_default(gpu, monkeypatch):
    def is_bf16_supported(including_emulation=True):
        return gpu == "H100" or including_emulation

    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu in {"H100", "T4"})
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)
    monkeypatch.setattr(torch.mps, "is_available", lambda: gpu == "Apple")
    args = lab0.parse_args([])
    best = {"H100": ("cuda", "bf16"), "T4": ("cuda", "fp16")}
    assert (args.device, args.precision) == best.get(gpu, ("cpu", "fp32"))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", Mock(side_effect=AssertionError))
    assert lab0.parse_args(["--device=cpu"]).precision == "fp32"  # and CUDA is left alone


# ---- Interrupted runs and errors -------------------------------------------------------------
def test_an_interrupted_run_resumes_to_the_same_bits_even_in_a_moved_folder(
    run, tmp_path, monkeypatch, capsys
):
    _, whole = run()
    first_accuracy = whole["history"][0]["test_accuracy"]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(lab0, "evaluate", Mock(side_effect=[first_accuracy, KeyboardInterrupt]))
        patch.setattr(lab0, "CHECKPOINT_SECONDS", 0)  # a checkpoint after each epoch
        run(output_dir=tmp_path / "first")
    (tmp_path / "first").rename(tmp_path / "moved")
    _, resumed = run("--resume", output_dir=tmp_path / "moved")
    assert "1 of 3 epochs are done" in capsys.readouterr().out
    assert_same_training(whole, resumed)


def test_a_full_disk_is_an_os_error_and_leaves_the_last_checkpoint(tmp_path):
    resource = pytest.importorskip("resource")  # Windows doesn't have it
    path = tmp_path / "checkpoint.pth"
    lab0.save_checkpoint(path, {}, [], {"run": "first"})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))  # no file may get larger
    try:
        with pytest.raises(OSError):
            lab0.save_checkpoint(path, {"state_dict": nn.Linear(1000, 1000)}, [], {})  # 4 MB
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert torch.load(path)["config"] == {"run": "first"}


def test_the_last_checkpoint_is_written_before_the_last_pictures(run, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(lab0, "plot_history", Mock(side_effect=ZeroDivisionError))
        run()
    monkeypatch.setattr(lab0, "train", Mock(side_effect=AssertionError))  # nothing is left to train
    assert len(run("--resume")[0]["epochs"]) == 3


def test_resume_compares_every_setting_but_the_folders_and_names_what_differs(tmp_path):
    config = vars(lab0.parse_args(QUICK))
    path = tmp_path / "checkpoint.pth"
    lab0.save_checkpoint(path, {}, [], config)
    for name in config:
        changed = {**config, name: "another"}
        if name in {"data_root", "output_dir", "resume"}:
            assert lab0.load_checkpoint(path, changed)["config"] == config
        else:
            message = f"^error: --resume: {name} was {config[name]}, not another$"
            with pytest.raises(SystemExit, match=message):
                lab0.load_checkpoint(path, changed)
    with pytest.raises(SystemExit, match="^error: --resume: warmup is new"):
        lab0.load_checkpoint(path, {**config, "warmup": 5})


class Trap:
    """Loading a pickle of it runs code, which makes a file."""

    def __reduce__(self):
        return Path.touch, (Path("trapped"),)


@pytest.mark.parametrize("content", [None, b"", b"text", pickle.dumps(Trap(), protocol=2)])
def test_resume_refuses_a_damaged_checkpoint_and_runs_no_code_in_it(content, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path("checkpoint.pth").write_bytes(content)
    with pytest.raises(SystemExit, match="^error: --resume: cannot read checkpoint.pth"):
        lab0.load_checkpoint(Path("checkpoint.pth"), {})
    assert not Path("trapped").exists()


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_last_checkpoint(run, tmp_path):
    run()
    before = (tmp_path / "run" / "checkpoint.pth").read_bytes()
    with pytest.raises(SystemExit, match="^error: the loss is .*lower --lr.*--precision fp32"):
        run("--lr=1e9")
    assert (tmp_path / "run" / "checkpoint.pth").read_bytes() == before


@pytest.fixture
def script_error(monkeypatch, capsys):
    """A function that runs lab0.py as a script, which must exit; returns its last error line."""

    def run_script(*args):
        # The script is run as a fresh copy: patches of lab0 don't reach it, patches of torch do
        monkeypatch.setattr(sys, "argv", ["lab0.py", *map(str, args)])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(lab0.__file__, run_name="__main__")
        if end.value.code == 2:  # the argument parser has printed the error
            return capsys.readouterr().err.splitlines()[-1]
        return end.value.code  # a text, which Python prints before it exits with status 1

    return run_script


@pytest.mark.parametrize(
    "flag, value",
    [
        *itertools.product(["--epochs", "--batch-size"], ["0", "-1", "1.5", "x", "9" * 30]),
        *itertools.product(["--lr"], ["0", "-0.1", "nan", "inf", "fast"]),
        *itertools.product(["--seed"], ["-1", str(2**32), "1.5"]),
        *[("--device", "tpu"), ("--precision", "fp8"), ("--colour", "red")],
    ],
)
def test_a_wrong_argument_is_named_with_its_value(flag, value, script_error):
    line = script_error(f"{flag}={value}")
    assert "error: " in line and flag in line and value in line


@pytest.mark.parametrize(
    "error, text",
    [
        (OSError(28, "No space left on device", "some/file"), "some/file"),
        (torch.OutOfMemoryError("CUDA out of memory"), "out of memory"),
        (KeyboardInterrupt(), "--resume continues from the last checkpoint, if there is one"),
    ],
)
def test_what_a_user_can_cause_ends_in_one_line(error, text, script_error, monkeypatch, tmp_path):
    monkeypatch.setattr(torch, "manual_seed", Mock(side_effect=error))
    line = script_error("--smoke", "--output-dir", tmp_path)
    assert line.startswith("error: ") and text in line and "\n" not in line


def test_a_bug_keeps_its_traceback(script_error, monkeypatch, tmp_path):
    monkeypatch.setattr(torch, "manual_seed", Mock(side_effect=RuntimeError))
    with pytest.raises(RuntimeError):
        script_error("--smoke", "--output-dir", tmp_path)


def test_the_script_runs_in_a_notebook_whose_output_has_no_reconfigure(script_error, monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert script_error("--help") == 0 and "--smoke" in sys.stdout.getvalue()


# ---- The download ----------------------------------------------------------------------------
@pytest.fixture
def archive(cifar10_root, monkeypatch):
    """The small CIFAR-10 in one file. The 20 seconds that lab0 waits for a source become 0.2."""
    file = Path(shutil.make_archive(cifar10_root.parent / "packed", "gztar", cifar10_root))
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(file.read_bytes()).hexdigest())
    set_timeout = socket.setdefaulttimeout
    monkeypatch.setattr(socket, "setdefaulttimeout", lambda s: set_timeout(0.2 if s == 20 else s))
    monkeypatch.setenv("no_proxy", "*")
    return file


@pytest.fixture
def sources(archive):
    """Addresses: one refuses, one says nothing, one has other data, and the last one is good."""
    (archive.parent / "other").write_text("something else")
    handler = partial(SimpleHTTPRequestHandler, directory=archive.parent)
    with (
        socket.create_server(("127.0.0.1", 0)) as silent,
        ThreadingHTTPServer(("127.0.0.1", 0), handler) as server,
    ):
        Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        timer = Timer(5, silent.close)  # so that nobody waits forever if lab0 sets no time-out
        timer.start()
        ports = [9, silent.getsockname()[1], server.server_port, server.server_port]
        names = ["refuses", "silent", "other", archive.name]
        yield [f"http://127.0.0.1:{port}/{name}" for port, name in zip(ports, names)]
        timer.cancel()
        server.shutdown()


def test_sources_that_fail_are_named_and_the_next_one_asked(sources, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(lab0, "SOURCES", sources)
    assert len(lab0.load_dataset(tmp_path / "new", "cpu")["train"]) == 200
    errors = capsys.readouterr().err
    assert [f"{source} failed" in errors for source in sources] == [True, True, True, False]
    assert "timed out" in errors and socket.getdefaulttimeout() is None


def test_a_damaged_file_is_replaced(sources, cifar10_root, cifar10_files, monkeypatch):
    monkeypatch.setattr(lab0, "SOURCES", sources[-1:])
    file = cifar10_root / CIFAR10.base_folder / "data_batch_3"
    file.write_bytes(file.read_bytes()[:-9])
    lab0.load_dataset(cifar10_root, "cpu")
    assert file.read_bytes() == cifar10_files["data_batch_3"]


def test_if_all_sources_fail_the_archive_can_be_saved_by_hand(
    sources, archive, tmp_path, monkeypatch
):
    monkeypatch.setattr(lab0, "SOURCES", sources[:-1])
    file = tmp_path / "new" / "cifar-10-python.tar.gz"
    with pytest.raises(OSError) as error:
        lab0.load_dataset(tmp_path / "new", "cpu")
    assert all(way_out in str(error.value) for way_out in [sources[0], str(file), "--smoke"])
    shutil.copy(archive, file)  # over what the last source has left; now no source is needed
    assert len(lab0.load_dataset(tmp_path / "new", "cpu")["train"]) == 200


# ---- The README ------------------------------------------------------------------------------
def code_blocks(language):
    readme = Path(__file__).with_name("README.md")
    text = readme.read_text(encoding="utf-8") if readme.exists() else ""  # a copy may have none
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("block", code_blocks("python"))
def test_readmes_python_runs_as_it_stands(block, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where data/cifar10 is
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    run(output_dir=tmp_path / "outputs" / "lab0")
    exec(block, {})  # noqa: S102


def test_readmes_diffs_remove_lines_that_are_there():
    changed = "".join(code_blocks("diff")).splitlines()
    removed = {line[1:] for line in changed if line.startswith("-")}
    assert removed and removed <= set(Path(lab0.__file__).read_text().splitlines())


# ---- CUDA ------------------------------------------------------------------------------------
@on_cuda
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_cuda_runs_of_the_full_network_agree_bit_for_bit(precision, run, monkeypatch):
    monkeypatch.setattr(lab0.VGG, "ARCH", FULL_ARCH)  # `run` has made it small
    flags = ["--device=cuda", f"--precision={precision}"]
    (metrics, one), (_, other) = run(*flags), run(*flags)
    assert metrics["params"] == 9_228_362 and metrics["peak_memory_bytes"] > 0
    assert_same_training(one, other)


@on_cuda
@pytest.mark.parametrize("dtype", [torch.float32, *LOW])
def test_cuda_steps_never_wait_for_the_device(dtype, cifar10_root):
    split = lab0.load_dataset(cifar10_root, "cuda")["train"]
    model = lab0.VGG().to("cuda", memory_format=torch.channels_last)
    training = make_training(lab0.MixedPrecision(model, dtype), split, 50, fused=True)
    lab0.train(*training)  # the first calls set cuDNN up
    steps = []
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError):  # the epoch's last line reads the loss
            lab0.train(*training, callbacks=[lambda: steps.append("step")])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert steps == ["step"] * 4  # 200 images, 50 a step
