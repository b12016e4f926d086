"""Data parallel: two real processes, gloo on the CPU. They start once, write down what they saw, and the tests read it.

A hang is a failure: all have a time limit.
"""

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import batch, random_model
from test_train import CASES, answered, assert_same, copies, flags, log, run, tensors, write_records
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

import data
import train

ROOT, LIMIT = Path(train.__file__).parent, 100
# Which of the (rank, micro-batch) cells hold images: every placement, with one micro-batch a rank and with two.
PLACEMENTS = [p for accumulate in (1, 2) for p in itertools.product((0, 1), repeat=2 * accumulate)]


# --- what each of the two processes does -----------------------------------------------------------------------------
def micro_batches(tokenizer, placement, dtype=torch.float64):
    """-> {rank: its micro-batches of two rows}; a cell with images has one row with a picture and one without."""
    n = len(placement) // 2
    whole = batch(tokenizer, *(k for has in placement for k in (has, 0)), dtype=dtype)
    cells = [{name: tensor[2 * i : 2 * i + 2] for name, tensor in whole.items()} for i in range(2 * n)]
    return whole, {rank: cells[rank * n : rank * n + n] for rank in (0, 1)}


def parallel(model):
    return DistributedDataParallel(model, find_unused_parameters=True)


def gradient_errors(tokenizer, rank, placement):
    """-> the largest differences from the gradient of the joint batch in one process, and what has no gradient."""
    new = (tokenizer.get_vocab_size(), tokenizer.token_to_id(data.IMAGE_TOKEN))
    alone, shared = (random_model(*new, dtype=torch.float64) for _ in range(2))
    whole, parts = micro_batches(tokenizer, placement)
    joint_loss = train.backward(alone, [whole])
    loss = train.backward(parallel(shared), parts[rank], ranks=2)
    dist.all_reduce(loss)
    pairs = [(name, p.grad, q.grad) for (name, p), q in zip(alone.named_parameters(), shared.parameters(), strict=True)]
    assert all((p is None) == (q is None) for _, p, q in pairs)
    return {
        "loss": abs(loss - joint_loss).item(),
        "gradient": max((p - q).abs().max().item() for _, p, q in pairs if p is not None),
        "none": sorted({name.split(".")[0] for name, p, _ in pairs if p is None}),
    }


def exchanges(tokenizer, rank, accumulate):
    """-> how often the ranks exchanged gradients in one step."""
    calls, model = [], parallel(random_model(tokenizer.get_vocab_size(), tokenizer.token_to_id(data.IMAGE_TOKEN)))
    model.register_comm_hook(None, lambda state, bucket: calls.append(bucket) or allreduce_hook(state, bucket))
    for _ in range(2):  # buckets settle after the first step
        calls.clear()
        train.backward(model, micro_batches(tokenizer, (1,) * 2 * accumulate, torch.float32)[1][rank], ranks=2)
    return len(calls)


def text_only_step(tokenizer, rank, optimizer):
    """-> the weights that an optimiser with momentum and decay changed in a step in which no rank has an image."""
    model = random_model(tokenizer.get_vocab_size(), tokenizer.token_to_id(data.IMAGE_TOKEN))
    args = train.arguments().parse_args(["--optimizer", optimizer, "--weight-decay", "0.1"])
    optimizers, both = train.make_optimizers(args, model), parallel(model)
    for placement in ((0, 1), (0, 0)):
        before = copies(model)
        train.backward(both, micro_batches(tokenizer, placement, torch.float32)[1][rank], ranks=2)
        for o in optimizers:
            o.step()
            o.zero_grad()
        changed = [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]
        if any(placement):
            assert len(changed) == len(before)
    return changed


def evaluation(tokenizer, rank):
    """-> exact match over both ranks, in one process, and the samples that this rank looked at."""
    model = random_model(tokenizer.get_vocab_size(), tokenizer.token_to_id(data.IMAGE_TOKEN))
    dataset, seen = [answered(model, tokenizer, *case, seed=i)[0] for i, case in enumerate(CASES)], []

    class Watched(list):
        def __getitem__(self, index):
            seen.append(index)
            return super().__getitem__(index)

    shared = train.exact_match(model, Watched(dataset), 2, torch.device("cpu"), rank=rank, ranks=2)
    return shared, train.exact_match(model, dataset, 2, torch.device("cpu")), seen


def runs(folder, rank):
    """Train as train.py does: six steps at a stretch, and six with a signal that reaches rank 1 alone, and a resume."""
    train.dist.init_process_group = train.dist.destroy_process_group = lambda *_: None  # done around this
    seen, writes, getitem, backward, steps = [], [], data.LlavaDataset.__getitem__, train.backward, []
    data.LlavaDataset.__getitem__ = lambda self, index: seen.append(index) or getitem(self, index)

    def slow_draw(*_):
        time.sleep(0.5)
        writes.append("predictions.png")
        (folder / "drawn").touch()

    def note_writes(event, args):
        changes = event in ("os.rename", "os.remove") or (event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR))
        if changes and str(args[0]).startswith(str(folder / "straight")):
            writes.append(os.path.basename(args[0]))

    def signal_on_rank_1(*args):
        steps.append(args)
        if rank == 1 and len(steps) == 3:
            signal.raise_signal(signal.SIGINT)
        return backward(*args)

    sys.addaudithook(note_writes)
    train.draw = slow_draw
    run(folder, folder / "straight", "--batch-size", 4)
    drawn = (folder / "drawn").exists()

    def slow_save(*args):
        time.sleep(0.5)
        save(*args)

    indices, train.backward = list(seen), signal_on_rank_1
    save, train.save_run = train.save_run, slow_save
    with contextlib.suppress(SystemExit):
        run(folder, folder / "stopped", "--batch-size", 4)
    stopped_after, train.backward, train.save_run = len(steps), backward, save
    saved = train.llava_mini.read_safetensors(folder / "stopped" / "run.safetensors")[1]["step"]
    dist.barrier()
    run(folder, folder / "stopped", "--batch-size", 4, "--resume")
    return {"indices": indices, "writes": writes, "drawn": drawn, "stopped_after": stopped_after, "saved": saved}


def main(folder):
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2)
    tokenizer = data.load_tokenizer(folder / "tokenizer.json")
    seen = {
        "gradients": [gradient_errors(tokenizer, rank, placement) for placement in PLACEMENTS],
        "exchanges": [exchanges(tokenizer, rank, accumulate) for accumulate in (1, 3)],
        "text_only": {name: text_only_step(tokenizer, rank, name) for name in ("adamw", "muon")},
        "evaluation": evaluation(tokenizer, rank),
        "runs": runs(folder, rank),
    }
    (folder / f"rank-{rank}.json").write_text(json.dumps(seen))
    dist.destroy_process_group()


# --- the tests -------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def files(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("distributed")
    write_records(folder, (1, 0) * 64)  # a whole window of the sampler: none comes twice in it
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def wait(*processes):
    """-> what each wrote. A process that fails or hangs fails the test, and none is left behind."""
    try:
        outputs = [process.communicate(timeout=LIMIT) for process in processes]
    finally:
        for process in processes:
            process.terminate()  # torchrun then ends its workers
        for process in processes:
            process.wait(40)
    assert [process.returncode for process in processes] == [0] * len(processes), outputs
    return [shown for shown, _ in outputs]


def start(*argv, **environment):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen([sys.executable, *map(str, argv)], env=environment, **pipes)


TORCHRUN = "--batch-size", 8, "--accumulate", 2, "--optimizer", "adamw", "--eval-every", 3


@pytest.fixture(scope="module")
def both(files):
    """-> (what rank 0 saw, what rank 1 saw, what they printed, what torchrun train.py printed)."""
    ranks = [
        start(__file__, files, RANK=str(r), LOCAL_RANK=str(r), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2") for r in (0, 1)
    ]
    val = "--val", files / "data.json"
    launcher = "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", ROOT / "train.py"
    torchrun = start(*launcher, *flags(files, files / "torchrun", *TORCHRUN, *val))
    run(files, files / "alone", *TORCHRUN, *val)
    printed = wait(*ranks, torchrun)
    return *(json.loads((files / f"rank-{r}.json").read_text()) for r in (0, 1)), printed[:2], printed[2]


@pytest.mark.parametrize("case", range(len(PLACEMENTS)), ids=["".join(map(str, p)) for p in PLACEMENTS])
def test_two_ranks_have_the_gradient_of_the_joint_batch(both, case):
    for seen in both[:2]:
        found = seen["gradients"][case]
        assert found["loss"] < 1e-12 and found["gradient"] < 1e-12
        assert found["none"] == ([] if any(PLACEMENTS[case]) else ["projector", "vision"])


def test_gradients_are_exchanged_once_a_step_however_many_micro_batches_it_has(both):
    for seen in both[:2]:
        once, accumulated = seen["exchanges"]
        assert once == accumulated > 0


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_where_no_rank_has_an_image_vision_and_projector_stay_bit_identical(both, exact_model, optimizer):
    decoder = [name for name, _ in exact_model.named_parameters() if name.startswith("decoder.")]
    assert both[0]["text_only"][optimizer] == both[1]["text_only"][optimizer] == decoder


def test_ranks_share_an_evaluation_and_find_the_same_figure_as_one_process(both):
    (shared, alone, first), (other, _, second) = both[0]["evaluation"], both[1]["evaluation"]
    assert shared == other == alone == pytest.approx(3 / 7)
    assert (first, second) == ([0, 1, 4, 5], [2, 3, 6])


def test_ranks_see_different_samples_and_together_each_once(both, files, tokenizer):
    records = data.LlavaDataset(files / "data.json", files, tokenizer, 16, 8, 64).records
    steps, seen = data.batches(128, 4, 0, [made["n_tokens"] for made in records]), []
    for step in range(6):
        first, second = (rank["runs"]["indices"][2 * step : 2 * step + 2] for rank in both[:2])
        assert sorted(first + second) == sorted(next(steps))
        seen += first + second
    assert len(set(seen)) == len(seen) == sum(len(rank["runs"]["indices"]) for rank in both[:2])


def test_only_rank_0_writes_and_prints(both):
    first, second = both[2]
    assert "step 6/6" in first and second == ""
    assert {"metrics.jsonl", "run.safetensors.tmp", "predictions.png"} <= set(both[0]["runs"]["writes"])
    assert both[1]["runs"]["writes"] == []


def test_a_signal_to_one_rank_stops_all_after_the_same_step_and_resume_is_exact(both, files):
    assert both[0]["runs"]["stopped_after"] == both[1]["runs"]["stopped_after"] == 3
    assert "\nstopped after step 3: --resume continues\n" in both[2][0]
    assert both[1]["runs"]["saved"] == "3"  # no rank ends before rank 0 has saved: torchrun would then kill it
    assert_same(tensors(files / "stopped"), tensors(files / "straight"))
    assert log(files / "stopped") == log(files / "straight")


def test_torchrun_train_py_gives_the_run_of_one_process(both, files):
    found, expected = tensors(files / "torchrun"), tensors(files / "alone")
    assert found.keys() == expected.keys()
    for name in found:
        # Keys may shift all alike, so the gradient of their bias is rounding alone, which AdamW takes to full scale.
        limit = 1e-3 if "qkv.bias" in name or "k_proj.bias" in name or "c_attn.bias" in name else 2e-6
        assert (found[name] - expected[name]).abs().max() < limit, name
    for ours, theirs in zip(log(files / "torchrun"), log(files / "alone"), strict=True):
        assert ours.keys() == theirs.keys() and ours["step"] == theirs["step"]
        for key in ours.keys() - {"images_encoded", "slots"}:  # of rank 0's share
            assert ours[key] == pytest.approx(theirs[key], rel=1e-5), key


def test_torchrun_train_py_prints_once(both):
    lines = [line.split()[1] for line in both[3].splitlines() if line.startswith("step ")]
    assert lines == [f"{n}/6" for n in range(1, 7)] and both[3].count("done: see ") == 1


def test_no_rank_leaves_before_the_picture_is_drawn(both):
    assert [seen["runs"]["drawn"] for seen in both[:2]] == [True, True]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
