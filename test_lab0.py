"""What lab0 promises, a test for each promise. `make test` runs them, without a network.

A test that names a fixture as an argument gets what it prepares. pytest's own: tmp_path is an empty
folder, capsys has what was printed, monkeypatch replaces something until the test ends.
"""

import json
import pickle
import re
import shutil
import socket
from copy import deepcopy
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
import torchvision.transforms as T
from matplotlib.figure import Figure
from torch import nn
from torch.optim import SGD, lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import DataLoader, TensorDataset
from torchvision.datasets import CIFAR10
from torchvision.datasets.utils import calculate_md5

import lab0


# ---- The tutorial's numbers ------------------------------------------------------------------
def test_features_and_logits_have_the_tutorials_shapes():
    model = lab0.VGG()
    images = torch.rand(2, 3, 32, 32)
    assert model.backbone(images).shape == (2, 512, 2, 2)
    assert model(images).shape == (2, 10)


def test_model_has_9_2_million_parameters():
    assert lab0.count_params(lab0.VGG()) == 9_228_362
    assert lab0.count_params(lab0.VGG().requires_grad_(False)) == 0  # only what is trained


def test_an_image_takes_606_million_multiply_accumulates():
    assert lab0.count_macs(lab0.VGG(), torch.zeros(1, 3, 32, 32)) == 606_164_480


def test_learning_rate_rises_to_0_4_at_step_588_of_1960_and_falls_to_0():
    lr_lambda = lab0.make_lr_lambda(steps_per_epoch=98, num_epochs=20)
    rates = [0.4 * lr_lambda(step) for step in range(1961)]
    assert rates[0] == rates[1960] == 0
    assert rates[588] == max(rates) == 0.4
    assert rates[294] == pytest.approx(0.2)  # halfway up
    assert rates[1274] == pytest.approx(0.2)  # halfway down


# ---- Fixtures: a small CIFAR-10, and runs of the lab with a small network ------------------------
README = "".join(page.read_text("utf-8") for page in Path(__file__).parent.glob("README.md"))
CLASSES = ["plane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
on_each_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=on_cuda)])


@pytest.fixture
def cifar10_root(tmp_path, monkeypatch):
    """A folder with a CIFAR-10 of 200 + 40 random images; only test_batch's MD5 sum is checked."""
    folder = tmp_path / "cifar10" / CIFAR10.base_folder
    folder.mkdir(parents=True)
    batches = [f"data_batch_{i}" for i in range(1, 6)]
    for name in [*batches, "batches.meta", "test_batch"]:
        content = {"labels": 4 * list(range(10)), "label_names": CLASSES}
        content["data"] = np.random.randint(256, size=(40, 3072), dtype=np.uint8)
        (folder / name).write_bytes(pickle.dumps(content))
    monkeypatch.setattr(CIFAR10, "train_list", [(name, None) for name in batches])
    md5 = calculate_md5(folder / "test_batch")
    monkeypatch.setattr(CIFAR10, "test_list", [("test_batch", md5)])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": None})
    monkeypatch.setattr(lab0, "SOURCES", ["nowhere"])
    timeout = socket.getdefaulttimeout()
    yield folder.parent
    socket.setdefaulttimeout(timeout)


@pytest.fixture
def small_vgg(monkeypatch):
    """Fewer channels. The last number stays 512, since the classifier has as many inputs."""
    monkeypatch.setattr(lab0.VGG, "ARCH", [8, "M", 8, "M", 8, "M", 512, "M"])


@pytest.fixture
def run(small_vgg, tmp_path, monkeypatch):
    """Run main into tmp_path, pictures empty; return records, calls of the network, checkpoint."""
    for plot in ["plot_samples", "plot_lr_schedule", "plot_history", "plot_predictions"]:
        monkeypatch.setattr(lab0, plot, lambda *args: Figure(figsize=(1, 1)))

    def run_main(*flags):
        def note_call(module, inputs, outputs):
            if isinstance(module, lab0.VGG):
                calls.append((module.training, inputs[0], outputs.detach()))

        calls = []
        with nn.modules.module.register_module_forward_hook(note_call):
            lab0.main(["--smoke", f"--output-dir={tmp_path}", *flags])
        records = json.loads((tmp_path / "metrics.json").read_text())["epochs"]
        return records, calls, (tmp_path / "checkpoint.pth").read_bytes()

    return run_main


def make_dataset(num_images, device="cpu"):
    """Random images, of which the i-th has the target i % 10."""
    images = torch.randint(256, (num_images, 3, 32, 32), dtype=torch.uint8, device=device)
    return TensorDataset(images, torch.arange(num_images, device=device) % 10)


def make_training(model, dataflow, dtype=torch.float32):
    """The arguments of lab0.train, with the tutorial's recipe."""
    optimizer = SGD(model.parameters(), lr=0.4, momentum=0.9, weight_decay=5e-4)
    scheduler = lr_scheduler.LambdaLR(optimizer, lab0.make_lr_lambda(98, 20))
    return model, dataflow, nn.CrossEntropyLoss(), optimizer, scheduler, dtype


# ---- The run ---------------------------------------------------------------------------------
@pytest.mark.parametrize("gpu, precision", [(None, "fp32"), ("T4", "fp32"), ("H100", "bf16")])
def test_defaults_are_the_tutorials_and_bf16_where_a_gpu_has_it(gpu, precision, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu is not None)
    # A T4 says yes, except for bf16 without emulation: then, kw is {"including_emulation": False}
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **kw: gpu == "H100" or not kw)
    args, folder = lab0.parse_args([]), f"outputs/{Path(lab0.__file__).stem}"
    assert (args.epochs, args.batch_size, args.lr, args.seed) == (20, 512, 0.4, 0)
    assert (args.precision, args.output_dir) == (precision, folder)
    assert lab0.parse_args(["--smoke"]).output_dir == f"{folder}-smoke"


def test_main_has_the_tutorials_optimizer_and_learning_rates(run):
    groups = []  # the optimizer's settings at each step
    with register_optimizer_step_post_hook(lambda opt, *_: groups.append({**opt.param_groups[0]})):
        run("--lr=0.4", "--epochs=20", "--batch-size=150")  # two steps an epoch
    rates = [0.4 * min(step / 12, (40 - step) / 28) for step in range(40)]  # 12 up, 28 down
    assert [group["lr"] for group in groups] == pytest.approx(rates)
    recipe = {"initial_lr": 0.4, "momentum": 0.9, "weight_decay": 5e-4, "nesterov": False}
    assert recipe.items() <= groups[-1].items()


def test_main_trains_by_cross_entropy_on_shuffled_crops_and_tests_on_plain_images(run, monkeypatch):
    # Image number i has brightness 100 + i everywhere, so that it is known after any crop and flip
    images = torch.arange(100, 200, dtype=torch.uint8).view(100, 1, 1, 1).repeat(1, 3, 32, 32)
    dataset = dict.fromkeys(["train", "test"], TensorDataset(images, torch.arange(100) % 10))
    monkeypatch.setattr(lab0, "generate_dataset", lambda device: (dataset, CLASSES))
    records, calls, _ = run("--device=cpu", "--precision=fp32", "--epochs=2", "--batch-size=30")
    trained = torch.cat([inputs for training, inputs, _ in calls if training])
    numbers = (255 * trained.amax((1, 2, 3))).round().long() - 100
    first, second = numbers[:100].tolist(), numbers[100:].tolist()
    assert sorted(first) == sorted(second) == list(range(100)) and first != second
    assert 50 < (trained[:, 0, 0, 16] == 0).sum() < 130  # 4 of 9 crops show the padding there: 89
    outputs = torch.cat([outputs for training, _, outputs in calls if training])
    loss = nn.functional.cross_entropy(outputs[100:], numbers[100:] % 10).item()
    assert records[1]["train_loss"] == pytest.approx(loss)
    tested = [inputs for training, inputs, _ in calls[1:] if not training]  # [0] is for the MACs
    assert torch.equal(torch.cat(tested), (images / 255).repeat(2, 1, 1, 1))


@on_each_device
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_main_learns_in_each_precision_and_saves_the_weights(precision, device, run, tmp_path):
    records, calls, _ = run(f"--precision={precision}", f"--device={device}")
    assert {outputs.dtype for _, _, outputs in calls[1:]} == {lab0.DTYPES[precision]}
    assert records[-1]["train_loss"] < records[0]["train_loss"]
    model = lab0.VGG().to(device)
    checkpoint = torch.load(tmp_path / "checkpoint.pth", weights_only=True)
    model.load_state_dict(checkpoint["state_dict"])
    assert all(weight.is_contiguous() for weight in checkpoint["state_dict"].values())
    test = lab0.generate_dataset(device)[0]["test"]
    dataflow = lab0.DeviceLoader(test, lab0.to_float, 10, shuffle=False)
    accuracy = lab0.evaluate(model, dataflow, lab0.DTYPES[precision])
    assert accuracy == records[-1]["test_accuracy"] > 60  # a guess is right for 10%


@on_each_device
def test_the_same_seed_gives_the_same_bits_and_another_seed_others(device, run):
    once, again, other = (run(f"--device={device}", f"--seed={s}")[2] for s in [5, 5, 6])
    assert once == again != other and torch.backends.cudnn.deterministic


def test_an_interrupted_run_keeps_the_results_of_the_run_before_it(run, tmp_path, monkeypatch):
    *_, checkpoint = run()
    names = ["checkpoint.pth", "metrics.json", "history.png", "predictions.png"]
    saved = {tmp_path / name: (tmp_path / name).stat().st_mtime_ns for name in names}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(lab0, "train", MagicMock(side_effect=[1.0, KeyboardInterrupt]))
        run("--seed=1")
    assert saved == {path: path.stat().st_mtime_ns for path in saved}
    assert run()[2] == checkpoint  # the same bits, as if nothing had happened


def test_main_prints_log_and_saves_6_files(small_vgg, cifar10_root, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))  # on Windows
    monkeypatch.setattr("sys.stdout", (tmp_path / "log").open("w"))
    lab0.main([f"--data-root={cifar10_root}", "--output-dir=~/run", "--epochs=1"])
    log = (tmp_path / "log").read_text()  # what is in it at once, before it is closed
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert list(metrics) == ["config", "torch", "device", "params", "macs", "epochs"]
    for line in [
        "[inputs] dtype: torch.float32, shape: torch.Size([200, 3, 32, 32])\n",
        "#Params: {params} (0.0M)\n#MACs: {macs} (1M)\n",
        "epoch 1: loss {train_loss:.4f}, accuracy {test_accuracy:.2f}%, trained in {seconds:.1f} s",
    ]:
        assert line.format(**metrics, **metrics["epochs"][0]) in log
    assert capsys.readouterr().err == ""  # no progress bars where there is no terminal
    names = "samples.png lr_schedule.png history.png predictions.png metrics.json checkpoint.pth"
    assert {path.name for path in (tmp_path / "run").iterdir()} == set(names.split())


@pytest.mark.parametrize("flag", ["--epochs=0", "--batch-size=0", "--lr=1e5"])
def test_a_bad_number_or_a_diverged_loss_ends_with_an_error(flag, run, monkeypatch, capsys):
    monkeypatch.setattr(lab0, "evaluate", None)  # mustn't be called after a loss that isn't finite
    with pytest.raises(SystemExit) as end:
        run(flag)
    printed = f"{capsys.readouterr().err}{end.value.code}"  # Python prints a code that is a text
    assert re.search(r"error: (the loss is (nan|inf); try .*|.* must be at least 1\n2)$", printed)


# ---- Data ------------------------------------------------------------------------------------
@pytest.mark.parametrize("channels, height, width, padding", [(3, 32, 32, 4), (1, 6, 9, 2)])
def test_augment_gives_each_crop_and_flip_equally_often(channels, height, width, padding):
    picture = np.random.randint(256, size=(height, width, channels), dtype=np.uint8)
    padded = T.functional.pad(T.ToPILImage()(picture), padding)
    numbers = {}  # one for each image that torchvision's crop, flip and ToTensor can make
    for place in range((2 * padding + 1) ** 2):
        crop = T.functional.crop(padded, *divmod(place, 2 * padding + 1), height, width)
        for image in [crop, T.functional.hflip(crop)]:
            numbers[T.ToTensor()(image).numpy().tobytes()] = len(numbers)
    lab0.set_seed(0)
    batch = torch.from_numpy(picture).permute(2, 0, 1).repeat(100 * len(numbers), 1, 1, 1)
    drawn = [numbers[image.numpy().tobytes()] for image in lab0.augment(batch, padding)]
    # 100 of each are expected. With fair draws, chi-square leaves these bounds 1 time in 1,000.
    chi_square = ((np.bincount(drawn, minlength=len(numbers)) - 100) ** 2 / 100).sum()
    assert abs(chi_square - len(numbers)) < 3.5 * (2 * len(numbers)) ** 0.5


def test_images_that_are_float_already_are_refused():
    for transform in [lab0.to_float, lab0.augment]:
        with pytest.raises(TypeError, match="torch.float32"):
            transform(torch.rand(2, 3, 8, 8))


@on_each_device
def test_images_equal_torchvisions_and_train_takes_torchs_dataloader_too(device, cifar10_root):
    augment = T.Compose([T.RandomCrop(32, padding=4), T.RandomHorizontalFlip(), T.ToTensor()])
    train = CIFAR10(root=cifar10_root, train=True, download=True, transform=augment)
    test = CIFAR10(root=cifar10_root, train=False, download=True, transform=T.ToTensor())
    dataset, classes = lab0.load_dataset(cifar10_root, device)
    images, targets = dataset["train"].tensors
    assert np.array_equal(images.permute(0, 2, 3, 1).cpu(), train.data)
    assert (targets.tolist(), classes) == (train.targets, train.classes)
    ours = lab0.DeviceLoader(dataset["test"], lab0.to_float, 30, shuffle=False)
    theirs = DataLoader(test, batch_size=30, shuffle=False)
    tolerance = 2e-7 if device == "cuda" else 0  # on a GPU, /255 may round the last bit otherwise
    for (images, targets), (their_images, their_targets) in zip(ours, theirs, strict=True):
        assert torch.allclose(images, their_images.to(images), rtol=tolerance, atol=0)
        assert images.device.type == device and targets.tolist() == their_targets.tolist()
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10)).to(device)
    assert lab0.train(*make_training(model, DataLoader(train, batch_size=30, shuffle=True))) > 2
    assert lab0.evaluate(model, theirs) == lab0.evaluate(model, ours)


# ---- The network and its training ------------------------------------------------------------
def test_train_and_evaluate_compute_what_the_tutorials_loops_do(small_vgg):
    # In float64, rounding errors stay too small for a ReLU to fall on the other side of 0
    lab0.set_seed(0)
    model = lab0.VGG().double()
    theirs = deepcopy(model)
    loader = lab0.DeviceLoader(make_dataset(59), lab0.augment, 3, shuffle=True)
    batches = [(inputs.double(), targets) for inputs, targets in loader]  # the last one has 2
    training = make_training(model, batches)  # [2:] is from the criterion on
    our_losses = [lab0.train(model, half, *training[2:]) for half in [batches[:10], batches[10:]]]
    _, _, criterion, optimizer, scheduler, _ = make_training(theirs, batches)
    losses = []
    for inputs, targets in batches:
        optimizer.zero_grad()
        loss = criterion(theirs(inputs), targets)
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses += [loss.item()] * len(targets)
    assert our_losses == pytest.approx([np.mean(losses[:30]), np.mean(losses[30:])], rel=1e-5)
    right = [theirs.eval()(inputs).argmax(dim=1) == targets for inputs, targets in batches]
    assert lab0.evaluate(model, batches) == pytest.approx(100 * torch.cat(right).double().mean())


def test_batches_and_weights_work_with_tensor_view_although_vgg_runs_in_channels_last():
    data, order = make_dataset(50), torch.randperm(50)
    training_set, validation_set = (TensorDataset(*data[i]) for i in [order[10:], order[:10]])
    dataflow = lab0.DeviceLoader(training_set, lab0.augment, 20, shuffle=True)
    for images, _ in [*dataflow, *lab0.DeviceLoader(validation_set, lab0.to_float, 20, False)]:
        images.view(len(images), -1)  # as in a LeNet or a perceptron; fails in channels_last
    vgg, strides = lab0.VGG(), []
    vgg.backbone.conv7.register_forward_pre_hook(lambda _, args: strides.append(args[0].stride(1)))
    lab0.train(*make_training(vgg, dataflow))
    assert strides == [1, 1]  # the channels of a pixel lie side by side
    assert all(w.is_contiguous() and w.grad.is_contiguous() for w in vgg.parameters())


def test_in_bf16_a_custom_loss_is_computed_and_summed_in_32_bits():
    def focal_loss(outputs, targets):
        log_p = outputs.log_softmax(dim=1).gather(1, targets[:, None])
        return -((1 - log_p.exp()) ** 2 * log_p).mean()

    data = TensorDataset(torch.randn(20_000, 48), torch.arange(20_000) % 10)
    model = nn.Linear(48, 10)
    optimizer = SGD(model.parameters(), lr=0)  # the weights stay the same
    training = [DataLoader(data, 64), focal_loss, optimizer, lr_scheduler.ConstantLR(optimizer)]
    exact, bf16 = (lab0.train(model, *training, dtype) for dtype in lab0.DTYPES.values())
    assert bf16 == pytest.approx(exact, rel=0.02)  # 313 batches: a bf16 sum stops growing


def test_train_and_evaluate_wait_for_the_gpu_only_at_an_epochs_end(monkeypatch):
    # Reading a value makes the CPU wait for the GPU. Tensors on torch's "meta" device have none to
    # read, so there it is an error: an epoch gets to its last line, which reads.
    monkeypatch.setattr(torch, "autocast", MagicMock())  # which doesn't know "meta"
    model, steps = lab0.VGG().to("meta"), []
    model.register_forward_hook(lambda *args: steps.append("step"))
    loader = lab0.DeviceLoader(make_dataset(30, device="meta"), lab0.augment, 10, shuffle=True)
    batches = [*loader, (torch.rand(9, 3, 32, 32), torch.arange(9))]  # one has to be moved there
    training = make_training(model, batches)
    for epoch in [lambda: lab0.train(*training), lambda: lab0.evaluate(model, batches)]:
        with pytest.raises(RuntimeError, match="meta"):
            epoch()
    assert steps == ["step"] * 8  # four each


# ---- Pictures, the download, the README and CUDA -----------------------------------------------
def test_samples_show_four_images_of_each_class_and_curves_show_lr_loss_and_accuracy():
    data = make_dataset(100)
    for index, ax in zip(range(40), lab0.plot_samples(data, CLASSES).axes, strict=True):
        label, row = divmod(index, 4)
        assert ax.get_title() == CLASSES[label] and ax.get_subplotspec().num1 == 10 * row + label
        assert np.array_equal(ax.images[0].get_array(), data[10 * row + label][0].permute(1, 2, 0))
    rates = lab0.plot_lr_schedule(lambda step: 1.0, num_steps=1, lr=0.4)
    history = lab0.plot_history([{"epoch": 1, "train_loss": 2.0, "test_accuracy": 3.0}])
    assert [list(ax.lines[0].get_ydata()) for ax in rates.axes + history.axes] == [[0.4], [2], [3]]


def test_predictions_get_transformed_images_and_show_the_original_ones_with_mistakes_in_red():
    normalize = T.Compose([lab0.to_float, T.Normalize([0.9, 0.1, 0.5], [0.2, 0.2, 0.2])])
    model = nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(3 * 32 * 32, 10))
    images, targets = make_dataset(50).tensors
    preds = model.eval()(normalize(images)).argmax(dim=1)
    targets[:20] = preds[:20]  # so that there are right ones
    dataflow = lab0.DeviceLoader(TensorDataset(images, targets), normalize, 10, shuffle=True)
    axes = lab0.plot_predictions(model.train(), dataflow, CLASSES).axes
    for ax, image, pred, label in zip(axes, images[:40], preds[:40], targets[:40], strict=True):
        assert ax.get_title() == f"pred: {CLASSES[pred]}\nlabel: {CLASSES[label]}"
        assert ax.title.get_color() == ("black" if pred == label else "red")
        assert np.array_equal(ax.images[0].get_array(), image.permute(1, 2, 0))


def test_data_come_from_a_good_host_or_local_archive(cifar10_root, tmp_path, monkeypatch, capsys):
    archive = Path(shutil.make_archive(tmp_path / "good", "gztar", cifar10_root))
    monkeypatch.setattr(CIFAR10, "tgz_md5", calculate_md5(archive))
    file = tmp_path / "by hand" / "cifar-10-python.tar.gz"
    with pytest.raises(SystemExit, match=f"^error: .* nowhere .*{re.escape(str(file))}.*--smoke$"):
        lab0.load_dataset(str(file.parent), "cpu")
    shutil.copy(archive, file)
    lab0.load_dataset(str(file.parent), "cpu")
    batch = file.parent / CIFAR10.base_folder / "test_batch"
    batch.write_bytes(batch.read_bytes()[:-9])  # is mended from the archive
    assert len(lab0.load_dataset(str(file.parent), "cpu")[0]["test"]) == 40
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("no_proxy", "*")
    with ThreadingHTTPServer(("127.0.0.1", 0), SimpleHTTPRequestHandler) as server:
        Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        names = ["missing", f"cifar10/{CIFAR10.base_folder}/test_batch", "good.tar.gz"]
        sources = [f"http://127.0.0.1:{server.server_port}/{name}" for name in names]
        monkeypatch.setattr(lab0, "SOURCES", sources)
        lab0.load_dataset("downloaded", "cpu")
        server.shutdown()
    errors = re.findall("(http.*) failed: .*(404|corrupted)", capsys.readouterr().err)
    assert errors == [(sources[0], "404"), (sources[1], "corrupted")]
    assert socket.getdefaulttimeout() == 20


@pytest.mark.parametrize("block", re.findall(r"(?ms)^```python\n(.*?)^```", README))
def test_readmes_code_runs(block, small_vgg, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for i in range(20):
        Path("images", f"class {i % 2}").mkdir(parents=True, exist_ok=True)
        T.ToPILImage()(torch.rand(3, 40, 50)).save(f"images/class {i % 2}/{i}.png")
    exec(block.replace("from lab0", f"from {lab0.__name__}"), {})  # noqa: S102, in a copy lab0 has another name


@on_cuda
@pytest.mark.parametrize("dtype", lab0.DTYPES.values())
def test_on_cuda_a_seed_gives_the_same_losses_and_only_an_epochs_end_waits(dtype):
    data, losses, steps = make_dataset(1100, device="cuda"), [], []
    for _ in range(2):
        lab0.set_seed(0)
        dataflow = lab0.DeviceLoader(data, lab0.augment, 512, shuffle=True)
        training = make_training(lab0.VGG().to("cuda"), dataflow, dtype)
        losses.append([lab0.train(*training), lab0.train(*training)])
    assert losses[0] == losses[1]
    training[3].register_step_post_hook(lambda *_: steps.append("step"))
    torch.cuda.set_sync_debug_mode("error")
    with pytest.raises(RuntimeError, match="synchronizing"):  # the epoch's last line reads
        lab0.train(*training)
    torch.cuda.set_sync_debug_mode("default")
    assert steps == ["step"] * 3
