"""What lab0 promises, as short tests. `make test` runs them, without a network.

A fixture is a function that prepares something; a test that has its name as an argument gets what
it returns, or yields (then, the rest of it runs after the test). Three are pytest's own: tmp_path
is an empty folder, capsys has what was printed, monkeypatch replaces something until the test ends.
"""

import json
import pickle
import re
import shlex
import shutil
import socket
from contextlib import nullcontext, redirect_stdout
from copy import deepcopy
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision.transforms as T
from matplotlib.figure import Figure
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import TensorDataset
from torchvision.datasets import CIFAR10
from torchvision.datasets.utils import calculate_md5

import lab0


# ---- The tutorial's numbers ------------------------------------------------------------------
def test_shapes_are_the_tutorials():
    model = lab0.VGG()
    images = torch.rand(5, 3, 32, 32)
    assert model.backbone(images).shape == (5, 512, 2, 2)
    assert model(images).shape == (5, 10)


def test_model_has_9_2_million_trainable_parameters():
    assert lab0.count_params(lab0.VGG()) == 9_228_362
    assert lab0.count_params(lab0.VGG().requires_grad_(False)) == 0


def test_an_image_takes_606_million_multiply_accumulates():
    assert lab0.count_macs(lab0.VGG(), torch.zeros(1, 3, 32, 32)) == 606_164_480


def test_learning_rate_peaks_at_0_4_at_step_588_of_1960():
    lr_lambda = lab0.make_lr_lambda(steps_per_epoch=98, num_epochs=20)

    rates = [0.4 * lr_lambda(step) for step in range(1961)]

    assert rates[0] == 0
    assert rates[294] == pytest.approx(0.2)  # half-way up
    assert rates[588] == max(rates) == 0.4
    assert rates[1274] == pytest.approx(0.2)  # half-way down
    assert rates[1960] == 0


# ---- The network -----------------------------------------------------------------------------
def test_layers_are_the_tutorials():
    layers = list(lab0.VGG().backbone)
    conv_block = [nn.Conv2d, nn.BatchNorm2d, nn.ReLU]
    assert [type(layer) for layer in layers] == 4 * [*conv_block, *conv_block, nn.MaxPool2d]
    assert all(pool.kernel_size == 2 for pool in layers if isinstance(pool, nn.MaxPool2d))


def test_weights_have_the_names_that_later_labs_load():
    names = lab0.VGG().state_dict().keys()
    assert {"backbone.conv0.weight", "backbone.bn7.running_mean", "classifier.bias"} <= names


def test_logits_are_computed_from_the_mean_of_each_feature():
    model = lab0.VGG().eval()
    images = torch.rand(5, 3, 32, 32)
    means = model.backbone(images).flatten(2).mean(2)

    assert torch.allclose(model(images), model.classifier(means), atol=1e-6)


def test_network_can_have_another_number_of_classes():
    assert lab0.VGG(num_classes=3)(torch.rand(5, 3, 32, 32)).shape == (5, 3)


def test_counting_macs_leaves_batchnorms_stored_mean_as_it_is():
    model = lab0.VGG()

    lab0.count_macs(model, torch.ones(1, 3, 32, 32))

    assert not model.backbone.bn0.running_mean.any()  # all 0, as at first


# ---- The data --------------------------------------------------------------------------------
CLASSES = ["plane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


@pytest.fixture
def cifar10_root(tmp_path, monkeypatch):
    """A folder with a CIFAR-10 of 200 + 40 random images, and no host to download more from."""
    folder = tmp_path / "cifar10" / CIFAR10.base_folder
    folder.mkdir(parents=True)
    batches = [f"data_batch_{i}" for i in range(1, 6)]
    for name in [*batches, "batches.meta", "test_batch"]:
        content = {"labels": 4 * list(range(10)), "label_names": CLASSES}
        content["data"] = np.random.randint(256, size=(40, 3072), dtype=np.uint8)
        (folder / name).write_bytes(pickle.dumps(content))

    # None instead of CIFAR-10's MD5 sums: torchvision takes the files as they are
    monkeypatch.setattr(CIFAR10, "train_list", [(name, None) for name in batches])
    monkeypatch.setattr(CIFAR10, "test_list", [("test_batch", None)])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": None})

    monkeypatch.setattr(lab0, "SOURCES", ["nowhere"])
    monkeypatch.setattr(CIFAR10, "url", CIFAR10.url)  # lab0 changes it, as the time-out: put back
    timeout = socket.getdefaulttimeout()
    yield folder.parent
    socket.setdefaulttimeout(timeout)


@pytest.mark.parametrize("split", ["train", "test"])
def test_data_equal_torchvisions(split, cifar10_root):
    theirs = CIFAR10(cifar10_root, train=(split == "train"))

    dataset, classes = lab0.load_dataset(cifar10_root, "cpu")

    images, targets = dataset[split][:]
    assert np.array_equal(images.permute(0, 2, 3, 1), theirs.data)
    assert targets.tolist() == theirs.targets
    assert classes == theirs.classes


def test_test_images_are_transformed_as_by_totensor(cifar10_root):
    theirs = [image for image, _ in CIFAR10(cifar10_root, train=False, transform=T.ToTensor())]
    dataset, _ = lab0.load_dataset(cifar10_root, "cpu")
    images, _ = dataset["test"][:]
    assert torch.equal(lab0.transforms["test"](images), torch.stack(theirs))


@pytest.mark.parametrize("split", ["train", "test"])
def test_transformed_images_can_be_flattened_by_view(split, cifar10_root):
    dataset, _ = lab0.load_dataset(cifar10_root, "cpu")
    images, _ = dataset[split][:]
    lab0.transforms[split](images).view(len(images), -1)  # an error if pixels lie in another order


def test_augment_draws_each_crop_with_each_flip_equally_often():
    image = torch.arange(1, 37, dtype=torch.uint8).view(3, 3, 4)
    padded = T.functional.pad(image, 1)
    possible = []  # the 18 images that torchvision's crops and flips give
    for top, left in product(range(3), range(3)):
        crop = T.functional.crop(padded, top, left, 3, 4) / 255
        possible += [crop, T.functional.hflip(crop)]
    torch.manual_seed(0)

    drawn = lab0.augment(image.repeat(1800, 1, 1, 1), padding=1)

    counts = [(drawn == one).flatten(1).all(dim=1).sum() for one in possible]
    assert sum(counts) == 1800  # nothing else is drawn
    assert all(60 < count < 140 for count in counts)  # about 100 of each


@pytest.mark.parametrize("dimension", [1, 2])
def test_augment_moves_images_by_up_to_4_pixels(dimension):
    # Along a column or a row, a white image of 8 pixels with 4 black ones on each side has nine
    # places to crop: the first shows the four black pixels before it, and its first four.
    padded = 4 * [0] + 8 * [1] + 4 * [0]
    possible = {tuple(padded[place : place + 8]) for place in range(9)}

    white = torch.full((1000, 1, 8, 8), 255, dtype=torch.uint8)
    drawn = lab0.augment(white).squeeze(1)  # [1000, 8, 8]

    lines = drawn.amax(dimension)  # [1000, 8]: 1 for each column, or row, that has white
    assert {tuple(line) for line in lines.tolist()} == possible


def test_augment_mirrors_half_of_the_images():
    black_and_white = torch.tensor([0, 255], dtype=torch.uint8).repeat(10_000, 1, 1, 1)
    torch.manual_seed(0)

    drawn = lab0.augment(black_and_white, padding=0)

    mirrored = drawn[:, 0, 0, 0].sum()  # these have white on the left
    assert 4850 < mirrored < 5150  # about 5000


@pytest.mark.parametrize("transform", [lab0.to_float, lab0.augment])
def test_images_that_are_float_already_are_refused(transform):
    with pytest.raises(TypeError, match="float32"):
        transform(torch.rand(5, 3, 8, 8))


def make_dataset(num_images, device="cpu"):
    """Images of 8 x 8, of which number i has the brightness i everywhere and the target i."""
    numbers = torch.arange(num_images, device=device)
    return TensorDataset(numbers.byte().view(-1, 1, 1, 1).repeat(1, 3, 8, 8), numbers)


def read_targets(dataflow):
    """The targets of all batches, in the order in which they come."""
    return torch.cat([targets for _, targets in dataflow]).tolist()


def test_each_shuffled_epoch_has_every_image_once_in_a_new_order():
    loader = lab0.DeviceLoader(make_dataset(100), lab0.to_float, batch_size=40, shuffle=True)

    first, second = read_targets(loader), read_targets(loader)  # in batches of 40, 40 and 20

    assert sorted(first) == sorted(second) == list(range(100))
    assert first != second


# ---- The download ----------------------------------------------------------------------------
@pytest.mark.parametrize("error", [OSError("not found"), RuntimeError("corrupted")])
def test_hosts_are_tried_until_one_works(error, cifar10_root, monkeypatch, capsys):
    def download(cifar10):
        if cifar10.url != "good":
            raise error

    monkeypatch.setattr(CIFAR10, "download", download)
    monkeypatch.setattr(lab0, "SOURCES", ["first", "second", "good", "not needed"])
    lab0.open_cifar10(cifar10_root, train=True)

    assert capsys.readouterr().err == f"first failed: {error}\nsecond failed: {error}\n"


def test_without_a_host_an_error_tells_what_to_save_where(cifar10_root, tmp_path):
    file = tmp_path / "empty" / "cifar-10-python.tar.gz"
    with pytest.raises(RuntimeError, match=f"nowhere .* {re.escape(str(file))}"):
        lab0.load_dataset(tmp_path / "empty", "cpu")


def test_an_archive_that_was_saved_by_hand_needs_no_host(cifar10_root, tmp_path, monkeypatch):
    folder = tmp_path / "by hand"
    archive = shutil.make_archive(folder / "cifar-10-python", "gztar", cifar10_root)
    monkeypatch.setattr(CIFAR10, "tgz_md5", calculate_md5(archive))

    dataset, _ = lab0.load_dataset(folder, "cpu")

    assert len(dataset["train"]) == 200


# ---- Training --------------------------------------------------------------------------------
def make_network():
    """A small network for images of 3 x 8 x 8."""
    conv_block = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()]
    return nn.Sequential(*conv_block, nn.Flatten(), nn.Linear(4 * 6 * 6, 10))


def make_batches(*sizes):
    return [(torch.rand(size, 3, 8, 8), torch.randint(10, (size,))) for size in sizes]


def make_recipe(model):
    """Criterion, optimizer and scheduler for a model. The rate is a new one at each step."""
    optimizer = SGD(model.parameters(), lr=0.4, momentum=0.9, weight_decay=5e-4)
    return nn.CrossEntropyLoss(), optimizer, LambdaLR(optimizer, lambda step: 1 / (1 + step))


def are_equal(weights, others):
    """Whether two state_dicts have the same bits."""
    return all(torch.equal(weights[name], others[name]) for name in weights)


def test_train_does_what_the_tutorials_loop_does():
    ours = make_network().eval()  # which train has to change
    theirs = deepcopy(ours).train()
    batches = make_batches(20, 20, 7)

    mean_loss = lab0.train(ours, batches, *make_recipe(ours))

    criterion, optimizer, scheduler = make_recipe(theirs)
    losses = []
    for inputs, targets in batches:
        optimizer.zero_grad()
        loss = criterion(theirs(inputs), targets)
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses += [loss.item()] * len(targets)
    assert are_equal(ours.state_dict(), theirs.state_dict())
    assert mean_loss == pytest.approx(np.mean(losses))


def test_evaluate_gives_the_percentage_of_images_that_are_right():
    linear = nn.Linear(3, 3, bias=False)
    nn.init.eye_(linear.weight)  # so that outputs are the inputs
    model = nn.Sequential(linear, nn.Dropout(p=1.0))  # all 0, unless in eval mode
    images = torch.eye(3)
    batches = [(images, torch.tensor([0, 1, 2])), (images[:1], torch.tensor([2]))]

    accuracy = lab0.evaluate(model, batches)

    assert accuracy == 75  # three of four; the mean of the batches would be 50


def test_the_network_trains_in_16_bits_with_bf16_yet_is_evaluated_in_32():
    model, dtypes = make_network(), []
    model.register_forward_hook(lambda model, inputs, outputs: dtypes.append(outputs.dtype))

    lab0.train(model, make_batches(5), *make_recipe(model), bf16=True)
    lab0.evaluate(model, make_batches(5))

    of_train, of_evaluate = dtypes
    assert of_train == torch.bfloat16
    assert of_evaluate == torch.float32


def test_the_loss_is_computed_in_32_bits_with_bf16():
    model, dtypes = make_network(), []
    _, optimizer, scheduler = make_recipe(model)

    def criterion(outputs, targets):
        dtypes.append(outputs.dtype)
        return nn.functional.cross_entropy(outputs, targets)

    lab0.train(model, make_batches(5), criterion, optimizer, scheduler, bf16=True)

    assert dtypes == [torch.float32]


def test_train_reads_no_value_before_the_epochs_end(monkeypatch):
    # To read a value, such as the loss, the CPU must wait for the GPU. On torch's device "meta",
    # tensors have no values, and to read one is an error: so this epoch fails, but not before its
    # last line. (autocast is left out: it doesn't know "meta".)
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: nullcontext())
    model = make_network().to("meta")
    criterion, optimizer, scheduler = make_recipe(model)
    loader = lab0.DeviceLoader(make_dataset(10, "meta"), lab0.augment, batch_size=4, shuffle=True)
    batches = [*loader, *make_batches(5)]  # the last one is on the CPU, and has to be moved

    with pytest.raises(RuntimeError, match="item"):
        lab0.train(model, batches, criterion, optimizer, scheduler)

    assert scheduler.last_epoch == 4  # torch's name for its steps: one after each batch


# ---- The pictures ----------------------------------------------------------------------------
def test_samples_show_four_images_of_each_class_in_its_column():
    images, numbers = make_dataset(100)[:]  # image number i is of brightness i
    figure = lab0.plot_samples(TensorDataset(images, numbers % 10), CLASSES)

    shown = [ax.images[0].get_array().max() for ax in figure.axes]
    assert sorted(shown) == list(range(40))  # the first four of each class
    for ax, number in zip(figure.axes, shown):
        assert ax.get_title() == CLASSES[number % 10]
        assert ax.get_subplotspec().num1 == number  # cell 10 is below cell 0, of the same class


def invert(images):
    """A transform that changes what is predicted."""
    return 1 - lab0.to_float(images)


@pytest.fixture
def predictions():
    """A figure of predictions, of which the first 30 are right, and what it should show."""
    model = nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(3 * 32 * 32, 10))
    images = torch.randint(256, (50, 3, 32, 32), dtype=torch.uint8)
    preds = model.eval()(invert(images)).argmax(dim=1)
    labels = preds.clone()
    labels[30:] = (labels[30:] + 1) % 10
    figure = lab0.plot_predictions(model.train(), TensorDataset(images, labels), invert, CLASSES)
    return SimpleNamespace(axes=figure.axes, images=images[:40], preds=preds, labels=labels)


def test_predictions_are_of_transformed_images_in_eval_mode(predictions):
    for ax, pred, label in zip(predictions.axes, predictions.preds, predictions.labels):
        assert ax.get_title() == f"pred: {CLASSES[pred]}\nlabel: {CLASSES[label]}"


def test_predictions_show_the_first_40_images_as_they_are(predictions):
    for ax, image in zip(predictions.axes, predictions.images, strict=True):
        assert np.array_equal(ax.images[0].get_array(), image.permute(1, 2, 0))


def test_predictions_have_mistakes_in_red(predictions):
    colors = [ax.title.get_color() for ax in predictions.axes]
    assert colors == 30 * ["black"] + 10 * ["red"]


def test_the_schedules_curve_is_the_learning_rate_of_each_step():
    figure = lab0.plot_lr_schedule(lambda step: step / 4, num_steps=4, lr=0.4)
    curve = figure.axes[0].lines[0]
    assert list(curve.get_ydata()) == pytest.approx([0, 0.1, 0.2, 0.3])


def test_the_historys_curves_are_loss_then_accuracy_by_epoch():
    first = {"epoch": 1, "train_loss": 2.5, "test_accuracy": 40.0}
    second = {"epoch": 2, "train_loss": 1.5, "test_accuracy": 60.0}

    figure = lab0.plot_history([first, second])

    loss, accuracy = (ax.lines[0].get_xydata().tolist() for ax in figure.axes)
    assert loss == [[1, 2.5], [2, 1.5]]
    assert accuracy == [[1, 40], [2, 60]]


# ---- The run ---------------------------------------------------------------------------------
def test_defaults_are_the_tutorials():
    args = lab0.parse_args([])
    assert (args.epochs, args.batch_size, args.lr, args.seed) == (20, 512, 0.4, 0)


@pytest.mark.parametrize(
    "gpu, flags, bf16",
    [
        ("none", [], False),
        ("T4", [], False),
        ("H100", [], True),
        ("H100", ["--no-bf16"], False),
        ("H100", ["--device=cpu"], False),
    ],
)
def test_bf16_is_the_default_on_a_gpu_that_computes_in_it(gpu, flags, bf16, monkeypatch):
    def is_bf16_supported(including_emulation=True):
        return gpu == "H100" or including_emulation  # a T4 emulates it

    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu != "none")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)

    assert lab0.parse_args(flags).bf16 == bf16


@pytest.mark.parametrize("flag", ["--epochs=0", "--batch-size=0"])
def test_zero_epochs_or_images_a_batch_are_refused(flag, capsys):
    with pytest.raises(SystemExit):
        lab0.parse_args([flag])
    assert "must be at least 1" in capsys.readouterr().err


@pytest.mark.parametrize("flags, ending", [([], ""), (["--smoke"], "-smoke")])
def test_results_go_to_a_folder_named_after_the_script(flags, ending):
    script = Path(lab0.__file__).stem
    assert lab0.parse_args(flags).output_dir == f"outputs/{script}{ending}"


@pytest.fixture
def small_network(monkeypatch):
    """The network that main trains below, small. If you copy this for another one, return that."""
    for setting in ["deterministic", "benchmark"]:  # main changes these of cuDNN
        monkeypatch.setattr(torch.backends.cudnn, setting, False)
    monkeypatch.setattr(lab0.VGG, "ARCH", [8, "M", 8, "M", 8, "M", 16, "M"])
    return lab0.VGG


@pytest.fixture
def run(small_network, tmp_path, monkeypatch):
    """A function that runs main on generated images into tmp_path, with empty pictures."""
    for plot in ["plot_samples", "plot_lr_schedule", "plot_history", "plot_predictions"]:
        monkeypatch.setattr(lab0, plot, lambda *args: Figure(figsize=(1, 1)))

    def run_main(*flags):
        lab0.main(["--smoke", f"--output-dir={tmp_path}", *flags])

    return run_main


@pytest.fixture
def handed(monkeypatch):
    """Replaces train and evaluate, and notes what main hands to them, and the rate of each step."""
    notes = SimpleNamespace(rates=[])

    def train(model, dataflow, criterion, optimizer, scheduler, bf16=False):
        notes.model, notes.dataflow, notes.criterion = model, dataflow, criterion
        notes.optimizer, notes.bf16 = optimizer, bf16
        for _ in dataflow:
            notes.rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        return 1.0

    def evaluate(model, dataflow):
        notes.test_dataflow = dataflow
        return 10.0

    monkeypatch.setattr(lab0, "train", train)
    monkeypatch.setattr(lab0, "evaluate", evaluate)
    return notes


def test_main_trains_by_the_tutorials_recipe(run, handed):
    run()

    (group,) = handed.optimizer.param_groups
    assert type(handed.criterion) is nn.CrossEntropyLoss
    assert handed.criterion.label_smoothing == 0
    assert type(handed.optimizer) is SGD
    assert group["params"] == list(handed.model.parameters())
    assert (group["momentum"], group["weight_decay"], group["nesterov"]) == (0.9, 5e-4, False)


def test_main_trains_at_the_tutorials_learning_rates(run, handed):
    run("--lr=0.4", "--epochs=20", "--batch-size=150")  # 200 images, so 40 steps; 30% are 12
    up = [0.4 * step / 12 for step in range(12)]
    down = [0.4 * (40 - step) / 28 for step in range(12, 40)]
    assert handed.rates == pytest.approx(up + down)


def test_main_trains_on_augmented_images_in_a_random_order(run, handed):
    run()
    assert handed.dataflow.transform is lab0.augment
    assert read_targets(handed.dataflow) != read_targets(handed.dataflow)


def test_main_evaluates_the_plain_test_images_in_order(run, handed):
    dataset, _ = lab0.generate_dataset("cpu")
    images, _ = dataset["test"][:]

    run("--device=cpu")

    tested = torch.cat([inputs for inputs, _ in handed.test_dataflow])
    assert torch.equal(tested, lab0.to_float(images))


@pytest.mark.parametrize("flag, bf16", [("--bf16", True), ("--no-bf16", False)])
def test_main_trains_in_bf16_in_channels_last_if_told_to(flag, bf16, run, handed):
    run(flag)

    layout = torch.channels_last if bf16 else torch.contiguous_format
    kernels = [param for param in handed.model.parameters() if param.dim() == 4]
    assert handed.bf16 == bf16
    assert all(kernel.is_contiguous(memory_format=layout) for kernel in kernels)


on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
on_each_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=on_cuda)])


def read_metrics(folder):
    return json.loads((folder / "metrics.json").read_text())


def read_weights(folder):
    checkpoint = torch.load(folder / "checkpoint.pth", map_location="cpu", weights_only=True)
    return checkpoint["state_dict"]


@on_each_device
@pytest.mark.parametrize("flag", ["--bf16", "--no-bf16"])
def test_main_learns(flag, device, run, tmp_path):
    run(flag, f"--device={device}")
    assert read_metrics(tmp_path)["epochs"][-1]["test_accuracy"] > 60  # a guess reaches 10%


def test_the_saved_weights_have_the_reported_accuracy(run, small_network, tmp_path):
    run("--device=cpu", "--no-bf16")

    model = small_network(num_classes=10)
    model.load_state_dict(read_weights(tmp_path))
    dataset, _ = lab0.generate_dataset("cpu")
    dataflow = lab0.DeviceLoader(dataset["test"], lab0.to_float, batch_size=10, shuffle=False)
    assert lab0.evaluate(model, dataflow) == read_metrics(tmp_path)["epochs"][-1]["test_accuracy"]


@on_each_device
@pytest.mark.parametrize("flag", ["--bf16", "--no-bf16"])
def test_a_seed_decides_the_weights(flag, device, run, tmp_path):
    weights = []
    for seed in ["5", "5", "6"]:
        run(flag, f"--device={device}", f"--seed={seed}")
        weights.append(read_weights(tmp_path))

    once, again, other = weights
    assert are_equal(once, again)
    assert not are_equal(once, other)


def test_set_seed_makes_cudnn_repeatable(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)  # as a notebook may have done

    lab0.set_seed(0)

    assert torch.backends.cudnn.deterministic
    assert not torch.backends.cudnn.benchmark


def test_an_interrupted_run_leaves_its_last_finished_epoch(run, tmp_path, monkeypatch):
    accuracies = [90.0, 10.0]  # of two epochs; the third is interrupted
    weights = {}

    def evaluate(model, dataflow):
        if not accuracies:
            raise KeyboardInterrupt
        weights.update(deepcopy(model.state_dict()))
        return accuracies.pop(0)

    monkeypatch.setattr(lab0, "evaluate", evaluate)
    with pytest.raises(KeyboardInterrupt):
        run("--device=cpu")

    assert [record["epoch"] for record in read_metrics(tmp_path)["epochs"]] == [1, 2]
    assert are_equal(read_weights(tmp_path), weights)


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_diverged_loss_is_an_error_that_tells_what_to_do(loss, run, monkeypatch):
    monkeypatch.setattr(lab0, "train", lambda *args: loss)
    with pytest.raises(RuntimeError, match=f"the loss is {loss}; try a lower --lr"):
        run()


def test_a_run_leaves_six_files(small_network, cifar10_root, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))  # so that ~ is tmp_path
    monkeypatch.setenv("USERPROFILE", str(tmp_path))  # on Windows

    lab0.main([f"--data-root={cifar10_root}", "--output-dir=~/results", "--epochs=1"])

    names = {file.name for file in (tmp_path / "results").iterdir()}
    pictures = {"samples.png", "lr_schedule.png", "history.png", "predictions.png"}
    assert names == {*pictures, "metrics.json", "checkpoint.pth"}


def test_a_log_file_has_each_epochs_line_at_once(run, tmp_path, monkeypatch):
    log = tmp_path / "log"
    last_lines = []

    def train(*args):
        last_lines.append(log.read_text().splitlines()[-1])
        return 1.0

    monkeypatch.setattr(lab0, "train", train)
    with log.open("w") as file, redirect_stdout(file):
        run("--epochs=2")

    before_first_epoch, before_second_epoch = last_lines
    assert before_first_epoch.startswith("#MACs")
    assert before_second_epoch.startswith("epoch 1/2: loss 1.0000, accuracy")


def test_there_is_no_progress_bar_without_a_terminal(run, capsys):
    run("--epochs=1")
    assert capsys.readouterr().err == ""


# ---- The README ------------------------------------------------------------------------------
FOLDER = Path(__file__).parent
PAGES = [*FOLDER.glob("README.md"), *FOLDER.glob(".github/zh-CN.md")]
TEXT = "".join(page.read_text("utf-8") for page in PAGES)
BLOCKS = re.findall(r"(?ms)^```python\n(.*?)^```", TEXT)
COMMANDS = re.findall(r"(?m)^\S*python3? lab0\.py(.*)$", TEXT)
COMMANDS += re.findall(r'make \w+ ARGS="(.*?)"', TEXT)


@pytest.mark.skipif(not PAGES, reason="needs README.md")
def test_the_readme_has_code_for_the_tests_below():
    assert BLOCKS
    assert COMMANDS


@pytest.mark.parametrize("block", BLOCKS)
def test_the_readmes_python_code_runs(block, small_network, tmp_path, monkeypatch):
    for number in range(20):
        folder = tmp_path / "images" / f"class {number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        T.ToPILImage()(torch.rand(3, 40, 50)).save(folder / f"{number}.png")
    monkeypatch.chdir(tmp_path)

    code = block.replace("from lab0", f"from {lab0.__name__}")  # a copy may have another name
    exec(code, {})  # noqa: S102


@pytest.mark.parametrize("flags", COMMANDS)
def test_the_readmes_commands_have_flags_that_exist(flags, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)

    try:
        lab0.parse_args(shlex.split(flags))
    except SystemExit as end:  # after an error, or --help
        assert end.code == 0, "an unknown flag"


# ---- CUDA ------------------------------------------------------------------------------------
@on_cuda
def test_train_waits_for_the_gpu_only_at_the_epochs_end():
    dataset, _ = lab0.generate_dataset("cuda")
    dataflow = lab0.DeviceLoader(dataset["train"], lab0.augment, batch_size=80, shuffle=True)
    model = lab0.VGG().to("cuda")
    criterion, optimizer, scheduler = make_recipe(model)
    lab0.train(model, dataflow, criterion, optimizer, scheduler)  # cuDNN's start may wait

    torch.cuda.set_sync_debug_mode("error")  # to wait is an error: in the epoch's last line
    try:
        with pytest.raises(RuntimeError, match="synchronizing"):
            lab0.train(model, dataflow, criterion, optimizer, scheduler)
    finally:
        torch.cuda.set_sync_debug_mode("default")

    assert scheduler.last_epoch == 6  # three batches an epoch


@on_cuda
def test_main_runs_on_the_gpu_by_default(small_network, cifar10_root, tmp_path):
    lab0.main([f"--data-root={cifar10_root}", f"--output-dir={tmp_path}", "--epochs=1"])
    assert read_metrics(tmp_path)["device"] == torch.cuda.get_device_name()
