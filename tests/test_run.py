"""A run as its user sees it: its folder, its log, stopping, resuming, and what it refuses."""

import json
import multiprocessing
import os
import random
import runpy
import signal
import subprocess
import sys
from argparse import Namespace
from contextlib import nullcontext
from unittest.mock import Mock

import pytest
import torch
from conftest import ROOT, START, TORCHRUN, command, record
from PIL import Image

import data
import train
from extras import check_data, predictions, workers
from llava_mini import LlavaMini

SIZES = "--width 16 --depth 1 --heads 2 --image-size 16 --patch-size 8".split()
STEPS = "--steps 4 --batch-size 4 --eval-every 2 --log-every 1 --workers 0".split()


@pytest.fixture
def records(tmp_path):
    """-> flags for eight records, every second one with a picture."""
    entries = []
    for i in range(8):
        names = [f"{i}.png"] if i % 2 else []
        for name in names:
            Image.new("RGB", (20, 20), (30 * i, 0, 200)).save(tmp_path / name)
        question = "<image>\n" * len(names) + f"Number {i}?"
        entries.append(record(question, f"It is {i}.", images=names))
    (tmp_path / "train.json").write_text(json.dumps(entries))
    return ["--data", tmp_path / "train.json", "--images", tmp_path]


@pytest.fixture
def train_py(monkeypatch):
    """-> a function that runs train.py with flags, without the check of data and a real picture."""
    monkeypatch.setattr(check_data, "count_bad", lambda *arguments, **others: 0)
    monkeypatch.setattr(predictions, "draw", lambda path, *arguments: path.touch())

    def run_with(*flags):
        monkeypatch.setattr(sys, "argv", ["train.py", *map(str, flags)])
        train.main()

    return run_with


@pytest.fixture
def run(train_py, records):
    """-> a function that begins a run on the records in a new folder, with more flags."""

    def begin(out, *flags):
        sizes = [] if "--init" in flags else SIZES
        train_py("--out", out, *records, *sizes, *STEPS, *flags)

    return begin


@pytest.fixture
def new(tmp_path):
    return tmp_path / "new"


@pytest.fixture
def done(run, tmp_path):
    """The folder of a run that has ended."""
    run(tmp_path / "done")
    return tmp_path / "done"


def metrics(out, key):
    """-> those lines of the log that have this key"""
    entries = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [entry for entry in entries if key in entry]


def checkpoint(out):
    return torch.load(out / "resume.pt", weights_only=True)


def assert_same_run(*folders):
    """Step, weights and momentum are equal, bit for bit."""
    states = []
    for state in map(checkpoint, folders):
        states.append([state["step"], state["model"], state["optimizer"]["state"]])
    torch.testing.assert_close(*states, rtol=0, atol=0)


def test_a_run_writes_model_log_and_checkpoint(run, records, new, capsys):
    run(new, "--val", records[1])
    config = LlavaMini.load(new).config
    assert config.width == config.vision_width == 16
    assert data.load_tokenizer(new / "tokenizer.json").token_to_id("<image>") == 2
    assert checkpoint(new)["step"] == 4
    assert (new / "predictions.png").exists()

    steps, scores = metrics(new, "loss"), metrics(new, "image_exact_match")
    assert [entry["step"] for entry in steps] == [1, 2, 3, 4]
    assert [(entry["step"], entry["samples_seen"]) for entry in scores] == [(0, 0), (2, 8), (4, 16)]
    assert {"lr", "grad_norm", "samples_per_s", "s_left"} <= steps[0].keys()
    assert {"image_loss", "text_loss", "text_exact_match"} <= scores[0].keys()
    assert "--steps 4: 2 of them are warm-up" in capsys.readouterr().err


def test_the_curve_of_a_run_is_drawn(done):
    pytest.importorskip("matplotlib")
    assert command("extras/plot.py", done)[0] == 0
    assert Image.open(done / "curve.png").size == (700, 450)


def test_the_log_counts_the_images_that_the_encoder_got(run, records, new):
    often = ["--val", records[1], "--eval-every", 1]  # whose images do not count
    run(new, *often, "--batch-size", 8, "--log-every", 2)
    counts = [(entry["images_encoded"], entry["slots"]) for entry in metrics(new, "loss")]
    assert counts == 2 * [(8, 16)]


def adamw_by_hand(weight, gradient, state, lr, decay):
    """-> the new weight. The state is [first moment, second moment, steps]."""
    first, second, t = state[0], state[1], state[2] + 1
    first = 0.9 * first + 0.1 * gradient
    second = 0.99 * second + 0.01 * gradient**2
    state[:] = first, second, t
    size = (second / (1 - 0.99**t)).sqrt() + 1e-8
    return weight - lr * decay * weight - lr * (first / (1 - 0.9**t)) / size


def test_a_run_is_a_plain_loop_and_text_alone_moves_no_bit_of_the_encoder(run, new, monkeypatch):
    weights, parts = [], []  # after each step; what else the run is made of
    adamw = torch.optim.AdamW

    def remember(out, model, tokenizer, *rest):
        weights.append({name: p.detach().clone() for name, p in model.named_parameters()})
        parts[:] = tokenizer, model.config

    def in_more_groups(*options, **others):
        optimizer = adamw(*options, **others)
        optimizer.add_param_group({"params": [optimizer.param_groups[0]["params"].pop()]})
        return optimizer

    monkeypatch.setattr(train, "save_checkpoint", remember)
    monkeypatch.setattr(torch.optim, "AdamW", in_more_groups)
    flags = "--steps 8 --batch-size 2 --warmup 2 --lr 0.01 --weight-decay 0.3 --clip 2.6 --seed 5"
    run(new, *flags.split(), *"--eval-every 1 --dtype float32 --device cpu".split())

    tokenizer, config = parts
    torch.default_generator.manual_seed(5)
    model = LlavaMini(config)
    for name, p in model.named_parameters():
        assert torch.equal(p, weights[0][name]), name

    records, *_ = train.load_records(train.parse_args()[0], rank=0)
    samples = data.Samples(records, tokenizer, config)
    order = [random.Random(f"5/{epoch}").sample(range(8), 8) for epoch in (0, 1)]
    order = torch.tensor(order).view(8, 2).tolist()
    rates = [0.005, 0.01, *(0.01 * (8 - step) / 6 for step in range(2, 8))]
    states = {name: [0, 0, 0] for name in weights[0]}
    only_text, clipped = [], []
    for step, indices in enumerate(order):
        before, after = weights[step], weights[step + 1]
        batch = data.collate([samples[i] for i in indices])
        model.load_state_dict(before)
        model.zero_grad()
        tokens = (batch["labels"] != data.IGNORE_INDEX).sum()
        (model(**batch)[1] / tokens).backward()

        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        norm = sum((gradient**2).sum() for gradient in gradients.values()).sqrt()
        for name, state in states.items():
            if name in gradients:
                gradient = gradients[name] * min(1, 2.6 / norm)
                by_hand = adamw_by_hand(before[name], gradient, state, rates[step], 0.3)
                torch.testing.assert_close(after[name], by_hand, rtol=0, atol=1e-6)
            else:
                assert torch.equal(after[name], before[name]), name
        clipped.append(bool(norm > 2.6))
        only_text.append(not any(i % 2 for i in indices))
        assert (len(gradients) < len(states)) == only_text[-1]
    assert True in only_text[only_text.index(False) :]  # there was momentum to follow
    assert True in clipped and False in clipped


def test_bfloat16_shows_in_the_arithmetic_and_is_the_default_where_a_gpu_has_it(
    run, tmp_path, monkeypatch
):
    losses = []
    for dtype in ("float32", "bfloat16"):
        run(tmp_path / dtype, "--dtype", dtype)
        losses.append(metrics(tmp_path / dtype, "loss")[0]["loss"])
    assert 0 < abs(losses[0] - losses[1]) < 0.02 * losses[0]
    cases = ("cpu", True, "float32"), ("cuda", False, "float32"), ("cuda", True, "bfloat16")
    for device, has_it, dtype in cases:
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", Mock(return_value=has_it))
        monkeypatch.setattr(sys, "argv", ["train.py", "--device", device])
        assert train.parse_args()[0].dtype == dtype


def stop_at_a_rename(moment, kind, flags):
    """train.py in a process of its own, which gets the signal when it renames a file again."""
    replace, calls = os.replace, []

    def replace_or_stop(source, target):
        calls.append(target)
        if len(calls) == moment:
            os.kill(os.getpid(), kind)
        replace(source, target)

    os.replace = replace_or_stop
    check_data.count_bad = lambda *arguments, **others: 0
    sys.argv = ["train.py", *map(str, flags)]
    runpy.run_path(str(ROOT / "train.py"), run_name="__main__")


# The first rename is that of the settings, then come four a checkpoint. 3: in the first checkpoint;
# 6: at step 2, nothing is renamed yet; 8: half of the files; 10: at step 4, step 2's stands.
@pytest.mark.parametrize("moment, step", [(3, None), (6, 0), (8, 0), (10, 2)])
def test_a_run_that_was_stopped_in_a_save_ends_like_one_that_was_not(
    run, train_py, records, done, new, capfd, moment, step
):
    kind = signal.SIGTERM if moment == 10 else signal.SIGKILL
    flags = ["--out", new, *records, *SIZES, *STEPS]
    start = multiprocessing.get_context(START).Process
    process = start(target=stop_at_a_rename, args=(moment, kind, flags))
    process.start()
    process.join()
    assert process.exitcode != 0
    if moment == 10:
        cure = "--resume repeats the steps since the last checkpoint"
        assert capfd.readouterr().err.splitlines()[1:] == [f"train.py: stopped; {cure}"]

    if step is None:  # there is no checkpoint yet
        with pytest.raises(ValueError, match="start its run again, without --resume"):
            train_py("--resume", "--out", new)
        run(new)
    else:
        LlavaMini.load(new)  # whole
        assert checkpoint(new)["step"] == step
        train_py("--resume", "--out", new)
    assert_same_run(new, done)


def test_a_folder_belongs_to_one_run_at_a_time(run, new):
    hold = "import pathlib, sys; from extras import run_folder\n"
    hold += "run_folder.claim(pathlib.Path(sys.argv[1]), False)\nprint(); input()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    other = subprocess.Popen([sys.executable, "-c", hold, str(new)], cwd=ROOT, **pipes)
    other.stdout.readline()  # it has the folder
    with pytest.raises(ValueError, match="belongs to a run that is at work"):
        run(new)
    other.communicate(b"\n")
    run(new)


def test_the_folder_of_a_run_takes_no_other_run_settings_or_data(run, train_py, records, done):
    files = [path for path in done.iterdir() if path.is_file()]
    before = [path.read_bytes() for path in files]
    with pytest.raises(ValueError, match="is not empty: --resume its run, or choose another --out"):
        run(done)
    os.rename(done / "resume.pt", done / "new" / "resume.pt")  # the model is a result all the same
    with pytest.raises(ValueError, match="is not empty"):
        run(done)
    os.rename(done / "new" / "resume.pt", done / "resume.pt")
    for name, value, words in (
        ("--lr", 1, "lr was 0.002"),
        ("--init", done, "init was None, .* --init .*/done and a new --out"),
        ("--steps", 8, "steps was 4, now 8; to change it, .*--init"),
    ):
        with pytest.raises(ValueError, match=words):
            train_py("--resume", "--out", done, name, value)
    assert [path.read_bytes() for path in files] == before
    train_py("--resume", "--out", done, "--log-every", "2")

    records[1].write_text(records[1].read_text().replace("It is 3.", "It is 4."))
    with pytest.raises(ValueError, match="data_checksum was"):
        train_py("--resume", "--out", done)


def test_init_starts_from_the_weights_and_is_needed_no_more(run, train_py, done, new):
    with pytest.raises(ValueError, match="leave out .*width"):
        run(new, "--init", done, *SIZES)
    run(new, "--init", done, "--lr", "0")
    pairs = zip(LlavaMini.load(done).parameters(), LlavaMini.load(new).parameters())
    assert all(torch.equal(p, q) for p, q in pairs)
    done.rename(done.with_name("moved"))
    train_py("--resume", "--out", new)


def test_frozen_parts_stay_and_useless_text_is_dropped(run, records, done, new, capsys):
    run(new, "--init", done, "--freeze", "vision", "decoder")
    assert "4 records to train on: text-only ones are dropped" in capsys.readouterr().out
    before, after = LlavaMini.load(done), LlavaMini.load(new)
    for (name, p), q in zip(before.named_parameters(), after.parameters()):
        assert torch.equal(p, q) != name.startswith("projector"), name

    texts = [entry for entry in data.read_json(records[1]) if not entry["image"]]
    records[1].write_text(json.dumps(texts))
    with pytest.raises(ValueError, match="no record of .* is left to train on"):
        run(new.with_name("none"), "--init", done, "--freeze", "decoder")

    toy = Namespace(data=None, text_fraction=0.5, steps=1, batch_size=20, seed=0)
    for toy.freeze, kinds in (([], {True, False}), (["decoder"], {True})):
        training, *_ = train.load_records(toy, rank=0)
        assert {bool(made["image"]) for made in training} == kinds


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(run, new, monkeypatch):
    def poisoned(*arguments, step=train.training_step):
        return step(*arguments) * (torch.nan if checkpoint(new)["step"] == 2 else 1)

    monkeypatch.setattr(train, "training_step", poisoned)
    with pytest.raises(ValueError, match="loss nan.* in step 3; .* --init .*/new, .*a lower --lr"):
        run(new)
    assert checkpoint(new)["step"] == 2


def test_weights_that_are_not_finite_are_no_result(run, new):
    with pytest.raises(ValueError, match="weights are not finite after step 1; .*a lower --lr"):
        run(new, "--steps", 1, "--warmup", 0, "--lr", 1e38)
    assert checkpoint(new)["step"] == 0


def test_a_full_disk_leaves_the_last_checkpoint(run, new, monkeypatch):
    def save_or_fail(state, path, save=torch.save):
        if state["step"] == 2:
            raise RuntimeError("PytorchStreamWriter failed writing file data/1: file write failed")
        save(state, path)

    monkeypatch.setattr(torch, "save", save_or_fail)
    with pytest.raises(
        OSError,
        match="could not write to .*/new, .* MB are left there: .*; its last checkpoint stands",
    ):
        run(new)
    assert checkpoint(new)["step"] == 0


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\n", None])
def test_a_damaged_checkpoint_is_named_with_a_cure(train_py, done, content):
    file = done / "resume.pt"
    file.write_bytes(file.read_bytes()[:-1000] if content is None else content)
    with pytest.raises(ValueError, match="resume.pt is damaged: --init .*/done and a new --out"):
        train_py("--resume", "--out", done)


def test_a_batch_that_does_not_fit_into_shared_memory_is_one_line(samples_of, monkeypatch):
    monkeypatch.setattr(workers, "get_worker_info", lambda: Namespace(num_workers=100))
    monkeypatch.setattr(workers, "SHARED", "/")
    for free in (10**9, 10**5):  # a batch of 3,000 bytes fits a hundred times, or not
        monkeypatch.setattr(workers.shutil, "disk_usage", lambda _, n=free: Namespace(free=n))
        with pytest.raises(ValueError, match="--workers 0") if free < 10**6 else nullcontext():
            workers.collate_if_it_fits(data.collate, samples_of(1))


def test_a_run_does_not_start_on_data_that_the_check_refuses(run, records, new, monkeypatch):
    def count_bad(args, **others):
        assert (args.data, args.images) == (str(records[1]), str(records[3]))
        assert (args.image_size, others["no_decode"]) == (16, True)
        return 1

    monkeypatch.setattr(check_data, "count_bad", count_bad)
    with pytest.raises(ValueError, match="the check failed; python data.py --data"):
        run(new)


ABOVE_ZERO = ["--steps 0", "--clip 0", "--clip nan", "--depth -1"]
FROM_ZERO_ON = ["--lr nan", "--lr -1", "--weight-decay inf", "--workers -1", "--warmup -5"]
IMPOSSIBLE = {  # flags: what is said
    **{flags: "{} must be above 0, not {}" for flags in ABOVE_ZERO},
    **{flags: "{} must be a number from 0 on, not {}" for flags in FROM_ZERO_ON},
    "--warmup 100 --steps 100": "--warmup 100 must be below --steps 100",
    "--text-fraction 5": "a share from 0 to 1",
    "--device foo": "--device foo: ",
    "--data=": "--data is empty: is a variable unset",
    "--init=": "--init is empty",
    "--val val.json": "--val goes with --data",
    "--batch-size 4 --accumulate 3": "multiple of ranks x --accumulate",
    "--image-size 20 --patch-size 8": "no multiple of patch size",
    "--freeze decoder": "--freeze decoder goes with --init",
    "--freeze vision projector decoder --init out": "nothing to train",
}


@pytest.mark.parametrize("flags", IMPOSSIBLE)
def test_flags_that_can_not_be_are_refused_in_one_line(flags, train_py, new):
    words = IMPOSSIBLE[flags].format(*flags.split())
    with pytest.raises((ValueError, AssertionError), match=words):
        train_py("--out", new, *flags.split())


def test_torchrun_trains_like_one_process_and_draws_and_the_model_answers(train_py, new, tmp_path):
    toy = [*SIZES, *STEPS, *"--batch-size 64 --accumulate 2 --eval-every 4 --device cpu".split()]
    train_py(*toy, "--out", tmp_path / "alone")
    torchrun = [*TORCHRUN, str(ROOT / "train.py"), *toy, "--out", str(new)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(torchrun, check=True, env=environment, timeout=1800)
    for key in ("loss", "grad_norm", "image_loss", "text_loss"):
        alone = [entry[key] for entry in metrics(tmp_path / "alone", key)]
        assert [entry[key] for entry in metrics(new, key)] == pytest.approx(alone, rel=1e-4), key

    assert Image.open(new / "predictions.png").size == (1000, 570)
    picture = ROOT / "docs" / "scene.png"
    code, said = command("llava_mini.py", new, "What is it?", "--image", picture)
    assert code == 0 and said.endswith("\n")
