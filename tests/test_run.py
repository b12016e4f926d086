"""A run as its user sees it: its folder, its log, stopping, resuming, and what it refuses."""

import json
import os
import subprocess
import sys
from argparse import Namespace

import pytest
import torch
from conftest import ROOT, TORCHRUN, command
from PIL import Image

import data
import llava_mini
import train

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
    """-> a function that runs train.py with flags; the commands of extras/ are left out."""
    monkeypatch.setattr(train, "run_extra", lambda *arguments: 0)

    def run_with(*flags):
        monkeypatch.setattr(sys, "argv", ["train.py", *map(str, flags)])
        train.main()

    return run_with


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
    entries = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [entry for entry in entries if "loss" in entry]
    scores = [entry for entry in entries if "image_exact_match" in entry]
    assert [entry["step"] for entry in steps] == [1, 2, 3, 4]
    assert [(entry["step"], entry["samples_seen"]) for entry in scores] == [(0, 0), (2, 8), (4, 16)]
    assert "text_exact_match" in scores[0]


def test_the_log_counts_the_images_that_the_encoder_got(run, records, tmp_path):
    out = tmp_path / "out"
    often = ["--val", records[1], "--eval-every", 1]  # whose images do not count
    run("--out", out, *records, *SIZES, *STEPS, *often, "--batch-size", 8, "--log-every", 2)
    entries = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [entry for entry in entries if "loss" in entry]
    assert [(entry["images_encoded"], entry["slots"]) for entry in steps] == 2 * [(8, 16)]


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


# Three runs, each killed in a save, which renames four files. 5: at step 2, nothing is renamed yet;
# 7: half of the files; 9: at step 4, the checkpoint of step 2 stands.
MOMENTS = [5, 7, 9]
KILLED = """
import os, sys, train
import torch._dynamo  # slow, and the optimizer needs it: once for all three
train.run_extra = lambda *arguments: 0
replace, calls = os.replace, []
def replace_or_die(source, target):
    calls.append(target)
    if len(calls) == moment:
        os.kill(os.getpid(), 9)
    replace(source, target)
os.replace = replace_or_die
for moment in MOMENTS:
    if os.fork() == 0:
        sys.argv[2] = f"{sys.argv[2]}-{moment}"
        train.main()
    assert os.wait()[1] == 9
"""


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """-> a folder with the records and the three runs"""
    folder = tmp_path_factory.mktemp("killed")
    script = KILLED.replace("MOMENTS", str(MOMENTS))
    flags = ["--out", folder / "out", *write_records(folder), *SIZES, *STEPS]
    subprocess.run([sys.executable, "-c", script, *map(str, flags)], cwd=ROOT, check=True)
    return folder


@pytest.mark.parametrize("moment", MOMENTS)
def test_kill_9_in_a_save_loses_no_checkpoint(run, records, killed, tmp_path, moment):
    run("--out", tmp_path / "whole", *records, *SIZES, *STEPS)
    out = killed / f"out-{moment}"
    llava_mini.LlavaMini.load(out)  # whole
    run("--resume", "--out", out)
    assert_same_run(out, tmp_path / "whole")


def test_resume_refuses_other_settings_and_other_data(run, records, tmp_path):
    out = tmp_path / "out"
    run("--out", out, *records, *SIZES, *STEPS)
    with pytest.raises(ValueError, match="lr was 0.002"):
        run("--resume", "--out", out, "--lr", "1")
    with pytest.raises(ValueError, match="--resume goes on with the model in --out"):
        run("--resume", "--out", out, "--init", out)
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
    assert torch.equal(a.vision.pos_embed, b.vision.pos_embed)
    assert torch.equal(a.decoder.wte.weight, b.decoder.wte.weight)
    assert not torch.equal(a.projector[0].weight, b.projector[0].weight)

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


def test_a_frozen_decoder_gets_no_text_from_the_toy():
    args = Namespace(data=None, text_fraction=0.5, steps=1, batch_size=20, seed=0)
    for args.freeze, kinds in (([], {True, False}), (["decoder"], {True})):
        training, _ = train.load_records(args, rank=0)
        assert {bool(record["image"]) for record in training} == kinds


def test_a_run_does_not_start_on_data_that_the_check_refuses(run, records, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(train, "run_extra", lambda *command: asked.append(command) or 1)
    with pytest.raises(ValueError, match="the check failed; python data.py --data"):
        run("--out", tmp_path / "out", *records, "--image-size", 16)
    sizes = ["--image-size", "16"]
    flags = ["--data", str(records[1]), "--images", str(records[3])]
    assert asked == [("check_data.py", "--no-decode", *flags, *sizes)]


IMPOSSIBLE = {  # flags: what is said
    "--steps 0": "--steps must be above 0",
    "--clip 0": "--clip must be above 0",
    "--depth -1": "--depth must be above 0",
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


def test_torchrun_trains_on_two_ranks_and_draws_the_toy_and_the_model_answers(tmp_path):
    out = tmp_path / "out"
    flags = [*SIZES, *STEPS, "--device", "cpu", "--out", str(out)]
    torchrun = [*TORCHRUN, str(ROOT / "train.py"), *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(torchrun, check=True, env=environment, timeout=1800)
    assert Image.open(out / "predictions.png").size == (1000, 570)

    picture = ["--image", ROOT / "docs" / "scene.png"]
    code, said = command("llava_mini.py", out, "What is it?", *picture)
    assert code == 0 and said.endswith("\n")
