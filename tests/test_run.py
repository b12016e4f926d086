"""A run as its user sees it: its folder, its log, stopping, resuming, and what it refuses."""

import json
import os
import random
import subprocess
import sys
from argparse import Namespace
from contextlib import nullcontext

import pytest
import torch
from conftest import ROOT, TORCHRUN, command
from PIL import Image

import data
import llava_mini
import train
from extras import check_data, predictions, workers

SIZES = "--width 16 --depth 1 --heads 2 --image-size 16 --patch-size 8".split()
STEPS = "--steps 4 --batch-size 4 --eval-every 2 --log-every 1 --warmup 1 --workers 0".split()


@pytest.fixture
def records(tmp_path):
    """-> flags for eight records, every second one with a picture."""
    return write_records(tmp_path)


def write_records(folder):
    entries = []
    for i in range(8):
        question, answer = f"Number {i}?", f"It is {i}."
        entry = {"id": f"r{i}", "conversations": []}
        if i % 2:
            Image.new("RGB", (20, 20), (30 * i, 0, 200)).save(folder / f"{i}.png")
            entry["image"], question = f"{i}.png", f"<image>\n{question}"
        entry["conversations"].append({"from": "human", "value": question})
        entry["conversations"].append({"from": "gpt", "value": answer})
        entries.append(entry)
    (folder / "train.json").write_text(json.dumps(entries))
    return ["--data", folder / "train.json", "--images", folder]


@pytest.fixture
def run(monkeypatch):
    """-> a function that runs train.py with flags, without the check of data and the picture."""
    monkeypatch.setattr(check_data, "count_bad", lambda *arguments, **others: 0)
    monkeypatch.setattr(predictions, "draw", lambda *arguments: None)

    def run_with(*flags):
        monkeypatch.setattr(sys, "argv", ["train.py", *map(str, flags)])
        train.main()

    return run_with


def metrics(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def checkpoint(out):
    return torch.load(out / "resume.pt", weights_only=True)


def assert_same_run(out, other):
    """Weights, momentum and step are equal, bit for bit."""
    a, b = checkpoint(out), checkpoint(other)
    assert a["step"] == b["step"]
    for name, tensor in a["model"].items():
        assert torch.equal(tensor, b["model"][name]), name
    for index, state in a["optimizer"]["state"].items():
        for name, tensor in state.items():
            assert torch.equal(tensor, b["optimizer"]["state"][index][name]), (index, name)


def test_a_run_writes_model_log_and_checkpoint(run, records, tmp_path):
    out = tmp_path / "out"
    run("--out", out, *records, "--val", records[1], *SIZES, *STEPS)

    model = llava_mini.LlavaMini.load(out)
    assert model.config.width == model.config.vision_width == 16
    assert data.load_tokenizer(out / "tokenizer.json").token_to_id("<image>") == 2
    entries = metrics(out)
    steps = [entry for entry in entries if "loss" in entry]
    scores = [entry for entry in entries if "image_exact_match" in entry]
    assert [entry["step"] for entry in steps] == [1, 2, 3, 4]
    assert [(entry["step"], entry["samples_seen"]) for entry in scores] == [(0, 0), (2, 8), (4, 16)]
    assert {"lr", "grad_norm"} <= steps[0].keys()
    assert {"image_loss", "text_loss", "text_exact_match"} <= scores[0].keys()


def test_the_log_counts_the_images_that_the_encoder_got(run, records, tmp_path):
    out = tmp_path / "out"
    often = ["--val", records[1], "--eval-every", 1]  # whose images do not count
    run("--out", out, *records, *SIZES, *STEPS, *often, "--batch-size", 8, "--log-every", 2)
    steps = [entry for entry in metrics(out) if "loss" in entry]
    assert [(entry["images_encoded"], entry["slots"]) for entry in steps] == 2 * [(8, 16)]


class InTwoGroups(torch.optim.AdamW):
    def __init__(self, weights, *options, **others):
        weights = list(weights)
        groups = [{"params": weights[:5]}, {"params": weights[5:]}]
        super().__init__(groups, *options, **others)


def adamw_by_hand(weight, gradient, state, lr, decay):
    """-> the new weight. The state is [first moment, second moment, steps]."""
    first, second, t = state[0], state[1], state[2] + 1
    first = 0.9 * first + 0.1 * gradient
    second = 0.99 * second + 0.01 * gradient**2
    state[:] = first, second, t
    size = (second / (1 - 0.99**t)).sqrt() + 1e-8
    return weight - lr * decay * weight - lr * (first / (1 - 0.9**t)) / size


def test_a_run_is_a_plain_loop_and_text_alone_moves_no_bit_of_the_encoder(
    run, records, tmp_path, monkeypatch
):
    weights = []  # after each step

    def remember(args, model, tokenizer, *rest):
        weights.append({name: p.detach().clone() for name, p in model.named_parameters()})
        weights[-1]["tokenizer"], weights[-1]["config"] = tokenizer, model.config

    monkeypatch.setattr(train, "save_checkpoint", remember)
    monkeypatch.setattr(torch.optim, "AdamW", InTwoGroups)
    flags = "--steps 8 --batch-size 2 --warmup 2 --lr 0.01 --weight-decay 0.3 --clip 4 --seed 5"
    often = "--eval-every 1 --log-every 1 --workers 0 --dtype float32 --device cpu".split()
    run("--out", tmp_path / "out", *records, *SIZES, *flags.split(), *often)

    tokenizer, config = weights[0].pop("tokenizer"), weights[0].pop("config")
    torch.default_generator.manual_seed(5)
    model = llava_mini.LlavaMini(config)
    for name, p in model.named_parameters():
        assert torch.equal(p, weights[0][name]), name

    samples = data.Samples(data.read_records(records[1], tmp_path), tokenizer, config)
    order = [random.Random(f"5/{epoch}").sample(range(8), 8) for epoch in (0, 1)]
    order = torch.tensor(order).view(8, 2).tolist()
    rates = [0.005, 0.01, *(0.01 * (8 - step) / 6 for step in range(2, 8))]
    states = {name: [0, 0, 0] for name in dict(model.named_parameters())}
    only_text, clipped = [], []
    for step, indices in enumerate(order):
        before, after = weights[step], weights[step + 1]
        batch = data.collate([samples[i] for i in indices])
        model.load_state_dict({name: before[name] for name in states})
        model.zero_grad()
        tokens = (batch["labels"] != data.IGNORE_INDEX).sum()
        (model(**batch)[1] / tokens).backward()

        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        norm = sum((gradient**2).sum() for gradient in gradients.values()).sqrt()
        clipped.append(bool(norm > 4))
        for name in states:
            if name in gradients:
                gradient = gradients[name] * min(1, 4 / norm)
                by_hand = adamw_by_hand(before[name], gradient, states[name], rates[step], 0.3)
                torch.testing.assert_close(after[name], by_hand, rtol=0, atol=1e-6)
            else:
                assert torch.equal(after[name], before[name]), name
        only_text.append(not any(i % 2 for i in indices))
        assert (len(gradients) < len(states)) == only_text[-1]
    assert True in only_text[only_text.index(False) :]  # there was momentum to follow
    assert True in clipped and False in clipped


def test_bfloat16_shows_in_the_arithmetic(run, records, tmp_path):
    losses = {}
    for dtype in ("float32", "bfloat16"):
        run("--out", tmp_path / dtype, *records, *SIZES, *STEPS, "--dtype", dtype)
        losses[dtype] = metrics(tmp_path / dtype)[1]["loss"]
    assert 0 < abs(losses["float32"] - losses["bfloat16"]) < 0.02 * losses["float32"]


def test_a_resumed_run_ends_like_one_that_never_stopped(run, records, tmp_path):
    run("--out", tmp_path / "whole", *records, *SIZES, *STEPS)

    out = tmp_path / "parts"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "learning_rate", stop_at_step_3)
        with pytest.raises(KeyboardInterrupt):
            run("--out", out, *records, *SIZES, *STEPS)
    assert checkpoint(out)["step"] == 2
    run("--resume", "--out", out)
    assert_same_run(out, tmp_path / "whole")


def stop_at_step_3(step, args, original=train.learning_rate):
    if step == 3:
        raise KeyboardInterrupt
    return original(step, args)


# Each run is stopped at a rename. The first is that of the settings, then come four a checkpoint:
# 3: in the first checkpoint; 6: at step 2, nothing is renamed yet; 8: half of the files; 10: at
# step 4, the checkpoint of step 2 stands.
MOMENTS = {3: "SIGKILL", 6: "SIGKILL", 8: "SIGKILL", 10: "SIGTERM"}
STOPPED = """
import os, runpy, signal, sys
import torch._dynamo  # slow, and the optimizer needs it: once for all
from extras import check_data
check_data.count_bad = lambda *arguments, **others: 0
replace, calls = os.replace, []
def replace_or_die(source, target):
    calls.append(target)
    if len(calls) == moment:
        os.kill(os.getpid(), getattr(signal, name))
    replace(source, target)
os.replace = replace_or_die
for moment, name in MOMENTS.items():
    if os.fork() == 0:
        sys.argv[2] = f"{sys.argv[2]}-{moment}"
        runpy.run_path("train.py", run_name="__main__")
    assert os.wait()[1] != 0
"""


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """-> a folder with the records and the runs, and what was said"""
    folder = tmp_path_factory.mktemp("stopped")
    script = STOPPED.replace("MOMENTS", str(MOMENTS))
    flags = ["--out", folder / "out", *write_records(folder), *SIZES, *STEPS]
    words = [sys.executable, "-c", script, *map(str, flags)]
    return folder, subprocess.run(words, cwd=ROOT, check=True, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_stop_in_a_save_loses_no_checkpoint(run, records, stopped, tmp_path, moment):
    run("--out", tmp_path / "whole", *records, *SIZES, *STEPS)
    out = stopped[0] / f"out-{moment}"
    if moment == 3:  # there is no checkpoint yet
        with pytest.raises(ValueError, match="start its run again, without --resume"):
            run("--out", out, "--resume")
        run("--out", out, *records, *SIZES, *STEPS)
    else:
        llava_mini.LlavaMini.load(out)  # whole
        run("--resume", "--out", out)
    assert_same_run(out, tmp_path / "whole")


def test_a_stop_is_one_line(stopped):
    cure = "--resume repeats the steps since the last checkpoint"
    assert stopped[1].stderr.splitlines() == [f"train.py: stopped; {cure}"]


def test_a_folder_belongs_to_one_run_at_a_time(run, records, tmp_path):
    out = tmp_path / "out"
    hold = "import pathlib, sys; from extras import run_folder\n"
    hold += "run_folder.claim(pathlib.Path(sys.argv[1]), False)\nprint(); input()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    other = subprocess.Popen([sys.executable, "-c", hold, str(out)], cwd=ROOT, **pipes)
    other.stdout.readline()  # it has the folder
    with pytest.raises(ValueError, match="belongs to a run that is at work"):
        run("--out", out, *records, *SIZES, *STEPS)
    other.communicate(b"\n")
    run("--out", out, *records, *SIZES, *STEPS)


def test_resume_refuses_other_settings_and_other_data(run, records, tmp_path):
    out = tmp_path / "out"
    run("--out", out, *records, *SIZES, *STEPS)
    with pytest.raises(ValueError, match="lr was 0.002"):
        run("--resume", "--out", out, "--lr", "1")
    with pytest.raises(ValueError, match="init was None, .* --init .*/out and a new --out"):
        run("--resume", "--out", out, "--init", out)
    with pytest.raises(ValueError, match="steps was 4, now 8; to change it, .*--init"):
        run("--resume", "--out", out, "--steps", "8")
    run("--resume", "--out", out, "--log-every", "2")

    path = records[1]
    path.write_text(path.read_text().replace("It is 3.", "It is 4."))
    with pytest.raises(ValueError, match="data_checksum was"):
        run("--resume", "--out", out)


def test_resume_does_not_need_the_init_folder(run, records, tmp_path):
    start, moved, out = tmp_path / "start", tmp_path / "moved", tmp_path / "out"
    run("--out", start, *records, *SIZES, *STEPS)
    run("--out", out, "--init", start, *records, *STEPS)
    start.rename(moved)
    run("--resume", "--out", out)


def test_a_folder_with_a_run_is_not_written_over(run, records, tmp_path):
    out = tmp_path / "out"
    run("--out", out, *records, *SIZES, *STEPS)
    before = {path: path.read_bytes() for path in out.iterdir() if path.is_file()}
    with pytest.raises(ValueError, match="is not empty: --resume its run, or choose another --out"):
        run("--out", out, *records, *SIZES, *STEPS)
    assert before == {path: path.read_bytes() for path in out.iterdir() if path.is_file()}


def test_init_starts_from_the_weights_and_refuses_sizes(run, records, tmp_path):
    start, out = tmp_path / "start", tmp_path / "out"
    run("--out", start, *records, *SIZES, *STEPS)
    with pytest.raises(ValueError, match="leave out .*width"):
        run("--out", out, "--init", start, *records, *SIZES, *STEPS)
    run("--out", out, "--init", start, *records, *STEPS, "--lr", "0")
    a, b = llava_mini.LlavaMini.load(start), llava_mini.LlavaMini.load(out)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))


def test_frozen_parts_stay_and_text_is_dropped_where_nothing_would_learn(
    run, records, tmp_path, capsys
):
    start, out = tmp_path / "start", tmp_path / "out"
    run("--out", start, *records, *SIZES, *STEPS)
    run("--out", out, "--init", start, *records, *STEPS, "--freeze", "vision", "decoder")
    assert "4 records to train on: text-only ones are dropped" in capsys.readouterr().out
    a, b = llava_mini.LlavaMini.load(start), llava_mini.LlavaMini.load(out)
    for (name, p), q in zip(a.named_parameters(), b.parameters()):
        assert torch.equal(p, q) != name.startswith("projector"), name

    texts = [entry for entry in data.read_json(records[1]) if "image" not in entry]
    records[1].write_text(json.dumps(texts))
    with pytest.raises(ValueError, match="no record of .* is left to train on"):
        run("--out", tmp_path / "none", *records, *STEPS, "--init", start, "--freeze", "decoder")


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(
    run, records, tmp_path, monkeypatch
):
    out = tmp_path / "out"
    step = train.training_step

    def poisoned(model, micro_batches, *rest):
        loss = step(model, micro_batches, *rest)
        return loss * float("nan") if checkpoint(out)["step"] == 2 else loss

    monkeypatch.setattr(train, "training_step", poisoned)
    with pytest.raises(ValueError, match="loss nan.* in step 3; .* --init .*/out, .*a lower --lr"):
        run("--out", out, *records, *SIZES, *STEPS)
    assert checkpoint(out)["step"] == 2


def test_weights_that_are_not_finite_are_no_result(run, records, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="weights are not finite after step 1; .*a lower --lr"):
        run("--out", out, *records, *SIZES, *STEPS, "--steps", 1, "--warmup", 0, "--lr", 1e38)
    assert checkpoint(out)["step"] == 0


def test_a_full_disk_leaves_the_last_checkpoint(run, records, tmp_path, monkeypatch):
    out, save = tmp_path / "out", torch.save

    def save_or_fail(state, path):
        if state["step"] == 2:
            raise RuntimeError("PytorchStreamWriter failed writing file data/1: file write failed")
        save(state, path)

    monkeypatch.setattr(torch, "save", save_or_fail)
    with pytest.raises(OSError, match="could not write to .*/out: .*; its last checkpoint stands"):
        run("--out", out, *records, *SIZES, *STEPS)
    assert checkpoint(out)["step"] == 0


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\n", None])
def test_a_damaged_checkpoint_is_named_with_a_cure(run, records, tmp_path, content):
    out = tmp_path / "out"
    run("--out", out, *records, *SIZES, *STEPS)
    whole = (out / "resume.pt").read_bytes()
    (out / "resume.pt").write_bytes(whole[:-1000] if content is None else content)
    with pytest.raises(ValueError, match="resume.pt is damaged: --init .*/out and a new --out"):
        run("--resume", "--out", out)


def test_a_batch_that_does_not_fit_into_shared_memory_is_one_line(samples_of, monkeypatch):
    monkeypatch.setattr(workers, "get_worker_info", lambda: Namespace(num_workers=100))
    monkeypatch.setattr(workers, "SHARED", "/")
    for free in (10**9, 10**5):  # a batch of 3,000 bytes fits a hundred times, or not
        monkeypatch.setattr(workers.shutil, "disk_usage", lambda _, n=free: Namespace(free=n))
        with pytest.raises(ValueError, match="--workers 0") if free < 10**6 else nullcontext():
            workers.collate_if_it_fits(data.collate, samples_of(1))


def test_a_frozen_decoder_gets_no_text_from_the_toy():
    args = Namespace(data=None, text_fraction=0.5, steps=1, batch_size=20, seed=0)
    for args.freeze, kinds in (([], {True, False}), (["decoder"], {True})):
        training, *_ = train.load_records(args, rank=0)
        assert {bool(record["image"]) for record in training} == kinds


def test_a_run_does_not_start_on_data_that_the_check_refuses(run, records, tmp_path, monkeypatch):
    def count_bad(args, **others):
        assert (args.data, args.images) == (str(records[1]), str(records[3]))
        assert (args.image_size, others["no_decode"]) == (16, True)
        return 1

    monkeypatch.setattr(check_data, "count_bad", count_bad)
    with pytest.raises(ValueError, match="the check failed; python data.py --data"):
        run("--out", tmp_path / "out", *records, "--image-size", 16)


IMPOSSIBLE = {  # flags: what is said
    "--steps 0": "--steps must be above 0",
    "--clip 0": "--clip must be above 0",
    "--clip nan": "--clip must be above 0, not nan",
    "--lr nan": "--lr must be a number from 0 on, not nan",
    "--lr -1": "--lr must be a number from 0 on",
    "--weight-decay inf": "--weight-decay must be a number from 0 on",
    "--workers -1": "--workers must be a number from 0 on",
    "--warmup -5": "--warmup must be a number from 0 on",
    "--warmup 100 --steps 100": "--warmup 100 must be below --steps 100",
    "--text-fraction 5": "a share from 0 to 1",
    "--depth -1": "--depth must be above 0",
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
def test_flags_that_can_not_be_are_refused_in_one_line(flags, run, tmp_path):
    with pytest.raises((ValueError, AssertionError), match=IMPOSSIBLE[flags]):
        run("--out", tmp_path / "out", *flags.split())


def test_a_short_run_says_that_its_warm_up_is_short(run, tmp_path, capsys):
    run("--out", tmp_path / "out", *SIZES, "--steps", 2, "--batch-size", 1, "--workers", 0)
    assert "--steps 2: 1 of them are warm-up" in capsys.readouterr().err


def test_torchrun_trains_as_one_process_draws_the_toy_and_the_model_answers(run, tmp_path):
    out = tmp_path / "out"
    flags = [*SIZES, *STEPS, "--accumulate", "2", "--device", "cpu"]
    run(*flags, "--out", tmp_path / "alone")
    torchrun = [*TORCHRUN, str(ROOT / "train.py"), *flags, "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(torchrun, check=True, env=environment, timeout=1800)
    assert Image.open(out / "predictions.png").size == (1000, 570)
    ours, theirs = checkpoint(out)["model"], checkpoint(tmp_path / "alone")["model"]
    for name, tensor in ours.items():
        difference = (tensor - theirs[name]).abs()
        if name.endswith("qkv.bias"):  # keys' have no gradient but rounding, and AdamW follows it
            difference = difference.view(3, -1)[[0, 2]]
        assert difference.max() < 1e-4, name

    picture = ["--image", ROOT / "docs" / "scene.png"]
    code, said = command("llava_mini.py", out, "What is it?", *picture)
    assert code == 0 and said.endswith("\n")
