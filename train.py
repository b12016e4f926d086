"""
LLaVA mini, the training. It learns from pictures and from text at once.

$ python train.py                                       # toy data
$ python train.py --resume                              # go on where the last checkpoint stands
$ python train.py --data train.json --images photos     # your own records, in LLaVA's format
$ torchrun --nproc_per_node=2 train.py                  # the same steps, shared by two processes

The loss of a step is the mean over the supervised tokens of the WHOLE step, of all micro-batches
and ranks. However a step is cut, it is the same step, and parts without an image dilute nothing.
"""

import argparse
import json
import math
import os
import random
import subprocess
import sys
import time
import zlib
from datetime import timedelta
from itertools import count, islice
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

import data
from llava_mini import Config, LlavaMini

SIZES = {"width", "depth", "heads", "image_size", "patch_size", "block_size"}
MACHINE = {"out", "resume", "init", "device", "workers"}  # a run does not remember these
FREE = {"data", "images", "val", "accumulate", "log_every", "eval_every"}  # may change on resume


def parse_args():
    """-> (arguments, the checkpoint to resume or an empty one)"""
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    # input and output
    add("--out", type=Path, default="out", help="folder for all that the run writes")
    add("--resume", action="store_true", help="continue the run in --out, with its settings")
    add("--init", help="start from the model in this folder")
    add("--data", help="LLaVA's JSON to train on; without it toy data")
    add("--images", default=".", help="folder of the pictures that --data and --val name")
    add("--val", help="LLaVA's JSON to evaluate on")
    add("--text-fraction", type=float, default=0.4, help="share of text-only toy records")
    # a new model; None is Config's default
    add("--width", type=int, help="channels, of encoder and decoder")
    add("--depth", type=int, help="blocks, of encoder and decoder")
    add("--heads", type=int, help="attention heads, of encoder and decoder")
    add("--image-size", type=int, help="pixels")
    add("--patch-size", type=int, help="pixels")
    add("--block-size", type=int, help="longest sequence, in tokens")
    add("--freeze", nargs="+", default=[], choices=["vision", "projector", "decoder"])
    # optimisation
    add("--steps", type=int, default=900, help="of the optimizer")
    add("--batch-size", type=int, default=32, help="samples a step, over all ranks")
    add("--accumulate", type=int, default=1, help="micro-batches a step, on each rank")
    add("--lr", type=float, default=2e-3, help="at the end of the warm-up")
    add("--weight-decay", type=float, default=0.05, help="of AdamW, on every weight")
    add("--warmup", type=int, default=100, help="steps")
    add("--clip", type=float, default=1.0, help="largest gradient norm")
    add("--seed", type=int, default=0, help="of new weights, order and toy")
    # machine
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", choices=["float32", "bfloat16"], help="None is bfloat16 on cuda, else float32")
    add("--workers", type=int, default=1, help="processes that prepare batches")
    add("--log-every", type=int, default=20, help="steps")
    add("--eval-every", type=int, default=300, help="steps; an evaluation saves a checkpoint, too")

    args, checkpoint = parser.parse_args(), {"step": 0, "settings": {}}
    if args.resume:
        if args.init:
            raise ValueError("--resume goes on with the model in --out: leave out --init")
        checkpoint = torch.load(args.out / "resume.pt", map_location="cpu", weights_only=True)
        parser.set_defaults(**checkpoint["settings"])  # what is not given keeps its value
        args = parser.parse_args()
        args.init = args.out
    args.dtype = args.dtype or ("bfloat16" if "cuda" in args.device else "float32")
    args.data_checksum = zlib.crc32(Path(args.data).read_bytes()) if args.data else None
    return args, checkpoint


def check_args(args, checkpoint, rank, world_size):
    """Raises ValueError for arguments that do not go together."""
    for name in ("steps", "batch_size", "accumulate", "clip", "log_every", "eval_every", *SIZES):
        value = getattr(args, name)
        if value is not None and value <= 0:  # for no clipping: --clip inf
            raise ValueError(f"--{name.replace('_', '-')} must be above 0")
    if args.batch_size % (world_size * args.accumulate):
        raise ValueError("--batch-size must be a multiple of ranks x --accumulate")
    if args.init and not args.resume and any(getattr(args, name) for name in SIZES):
        raise ValueError(f"--init brings its model's sizes: leave out {', '.join(sorted(SIZES))}")
    if "decoder" in args.freeze and not args.init:
        raise ValueError("--freeze decoder goes with --init: a new decoder knows no words")
    if len(set(args.freeze)) == 3:
        raise ValueError("--freeze: with all three parts frozen there is nothing to train")
    if args.val and not args.data:
        raise ValueError("--val goes with --data")
    if not args.resume and rank == 0 and args.out.exists() and set(os.listdir(args.out)) - {"new"}:
        raise ValueError(f"{args.out} is not empty: --resume its run, or choose another --out")
    for name, before in checkpoint["settings"].items():
        if name not in FREE and getattr(args, name) != before:
            raise ValueError(f"--resume: {name} was {before}, now {getattr(args, name)}")


def join_ranks(args):
    """-> (rank, world size) of a process that torchrun started, of any other (0, 1)"""
    if "RANK" not in os.environ:
        return 0, 1
    if args.device == "cuda":
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(args.device)
    patience = timedelta(hours=2)  # of ranks that wait, for example for the check of the data
    dist.init_process_group("gloo" if args.device == "cpu" else "nccl", timeout=patience)
    return dist.get_rank(), dist.get_world_size()


def training_step(model, micro_batches, world_size=1, bf16=False):
    """Accumulate the gradient of one step; -> its loss. Every rank calls it.

    The model's loss is a sum over supervised tokens. Sums add up, so dividing each by the tokens
    of the whole step gives the exact mean, wherever the images and the long answers happen to be.
    """
    tokens = sum((batch["labels"][:, 1:] != data.IGNORE_INDEX).sum() for batch in micro_batches)
    if world_size > 1:
        dist.all_reduce(tokens)

    step_loss = torch.zeros((), device=tokens.device)
    for i, batch in enumerate(micro_batches):
        # DDP exchanges gradients in backward. Once a step is enough: in the last micro-batch. This
        # is what DDP's no_sync() sets; a bare model does not look.
        model.require_backward_grad_sync = i == len(micro_batches) - 1
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=bf16):
            _, loss_sum = model(**batch)
        (loss_sum * world_size / tokens).backward()  # DDP averages over ranks, we want the sum
        step_loss += loss_sum.detach() / tokens

    if world_size > 1:
        dist.all_reduce(step_loss)
    return step_loss


def data_parallel(model):
    """DDP has to look for unused weights: a rank without an image never makes the gradients that
    the others wait for. Where no rank has an image, these gradients stay None."""
    return DistributedDataParallel(model, find_unused_parameters=True)


def learning_rate(step, args):
    """Up in a straight line during the warm-up, then down to zero."""
    if step < args.warmup:
        return args.lr * (step + 1) / args.warmup
    return args.lr * (args.steps - step) / (args.steps - args.warmup)


@torch.no_grad()
def exact_match(model, samples, batch_size, rank=0, world_size=1, bf16=False):
    """-> the share of samples whose every answer is exact. The ranks share the work.

    One pass with the answers as input tells: greedy decoding gives them if every argmax is right.
    It takes the bare model, not DDP's: nothing is exchanged, and ranks may differ in images.
    """
    device = model.decoder.wte.weight.device
    right = torch.zeros((), device=device)
    mine = range(rank, len(samples), world_size)
    for batch in DataLoader(samples, batch_size, sampler=mine, collate_fn=data.collate):
        batch = to_device(batch, device)
        targets = batch["labels"][:, 1:]
        supervised = targets != data.IGNORE_INDEX
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            logits, _ = model(**batch)  # (N, V), row by row
        wrong = torch.zeros_like(supervised)
        wrong[supervised] = logits.argmax(dim=-1) != targets[supervised]
        right += (~wrong.any(dim=1)).sum()
    if world_size > 1:
        dist.all_reduce(right)
    return right.item() / len(samples)


def to_device(batch, device):
    return {name: tensor.to(device) for name, tensor in batch.items()}


def by_kind(records, tokenizer, config):
    """-> {score: samples}, those with an image and those without"""
    images = [record for record in records if data.images_of(record)]
    texts = [record for record in records if not data.images_of(record)]
    kinds = {"image_exact_match": images, "text_exact_match": texts}
    return {name: data.Samples(some, tokenizer, config) for name, some in kinds.items() if some}


def load_records(args, rank):
    """-> (training records, held-out records). Raises ValueError for faulty ones."""
    if not args.data:
        text_fraction = 0.0 if "decoder" in args.freeze else args.text_fraction
        size = args.steps * args.batch_size  # every record once
        training = data.ToyRecords("train", size, args.seed, text_fraction)
        return training, list(data.ToyRecords("test", 1000, args.seed))

    options = ["--no-decode"]
    for name in ("data", "val", "images", "init", "image_size", "patch_size", "block_size"):
        if getattr(args, name):
            options += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    if rank == 0 and run_extra("check_data.py", *options):
        raise ValueError("the check failed; python data.py --data .. --images .. shows all")
    if dist.is_initialized():
        dist.barrier()  # else another rank meets a fault first, and torchrun ends the check

    training = data.read_records(args.data, args.images)
    if "decoder" in args.freeze:  # then text has nothing to teach, and no gradient
        training = [record for record in training if data.images_of(record)]
        if rank == 0:
            print(f"{len(training):,} records to train on: text-only ones are dropped")
    if not training:
        raise ValueError(f"no record of {args.data} is left to train on")
    held_out = data.read_records(args.val, args.images) if args.val else []
    return training, held_out


def run_extra(script, *arguments):
    """Run a command of extras/, which holds what is no part of the lesson; -> its exit code."""
    path = Path(__file__).with_name("extras") / script
    return subprocess.call([sys.executable, str(path), *arguments])


def build(args, records):
    """-> (model, tokenizer), those in a folder or new ones."""
    if args.init:
        model = LlavaMini.load(args.init)
        tokenizer = data.load_tokenizer(f"{args.init}/tokenizer.json")
    else:
        tokenizer = data.train_tokenizer(records if args.data else data.ToyRecords("train", 500))
        image_token_id = tokenizer.token_to_id(data.IMAGE_TOKEN)
        sizes = {name: getattr(args, name) for name in SIZES if getattr(args, name)}
        for name in sizes.keys() & {"width", "depth", "heads"}:
            sizes[f"vision_{name}"] = sizes[name]
        torch.manual_seed(args.seed)
        model = LlavaMini(Config(tokenizer.get_vocab_size(), image_token_id, **sizes))
    for part in args.freeze:
        getattr(model, part).requires_grad_(False)
    return model.to(args.device), tokenizer


def shuffled_epochs(size, seed):
    for epoch in count():
        yield from random.Random(f"{seed}/{epoch}").sample(range(size), size)


def micro_batch_indices(args, size, first_step, rank, world_size):
    """Yield the indices of each micro-batch of this rank, from first_step on."""
    order = islice(shuffled_epochs(size, args.seed), first_step * args.batch_size, None)
    parts = world_size * args.accumulate
    for _ in range(first_step, args.steps):
        indices = list(islice(order, args.batch_size))
        for part in range(rank, parts, world_size):
            yield indices[part::parts]


def save_checkpoint(args, model, tokenizer, optimizer, step):
    """The model for its users, and resume.pt with all that --resume needs.

    Each is written in new/, then renamed: after a kill every file is whole, the old or the new.
    resume.pt has the weights, too: those beside it may be of another step after a kill.
    """
    new = args.out / "new"
    model.save(new)
    tokenizer.save(str(new / "tokenizer.json"))
    settings = {name: value for name, value in vars(args).items() if name not in MACHINE}
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save({**state, "step": step, "settings": settings}, new / "resume.pt")
    for file in new.iterdir():
        os.replace(file, args.out / file.name)


def report(args, entry):
    """One line on the terminal, the same in metrics.jsonl."""
    print("  ".join(f"{name} {round(value, 5)}" for name, value in entry.items()), flush=True)
    with open(args.out / "metrics.jsonl", "a") as file:
        file.write(json.dumps(entry) + "\n")


def main():
    args, checkpoint = parse_args()
    rank, world_size = join_ranks(args)
    check_args(args, checkpoint, rank, world_size)
    bf16 = args.dtype == "bfloat16"

    records, held_out = load_records(args, rank)
    model, tokenizer = build(args, records)
    adamw = {"betas": (0.9, 0.99), "weight_decay": args.weight_decay, "fused": True}
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, **adamw)
    first_step = checkpoint["step"]
    if args.resume:
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])

    training = data.Samples(records, tokenizer, model.config)
    tests = by_kind(held_out, tokenizer, model.config)
    rows = args.batch_size // (world_size * args.accumulate)
    indices = micro_batch_indices(args, len(training), first_step, rank, world_size)
    options = {"batch_sampler": indices, "collate_fn": data.collate, "num_workers": args.workers}
    batches = iter(DataLoader(training, **options))
    ddp_model = data_parallel(model) if world_size > 1 else model
    seen = {"images_encoded": 0, "slots": 0}  # since the last report
    encoded = []  # images, a number for each call of the encoder
    model.vision.register_forward_pre_hook(lambda _, inputs: encoded.append(len(inputs[0])))
    began = time.time()

    for step in range(first_step, args.steps + 1):
        if step % args.eval_every == 0 or step == args.steps:
            if rank == 0 and not (args.resume and step == first_step):  # just read
                save_checkpoint(args, model, tokenizer, optimizer, step)
            entry = {"step": step, "samples_seen": step * args.batch_size}
            for name, samples in tests.items():
                entry[name] = exact_match(model, samples, rows, rank, world_size, bf16)
            if rank == 0:
                report(args, entry)
        if step == args.steps:
            break

        micro_batches = [to_device(next(batches), args.device) for _ in range(args.accumulate)]
        encoded.clear()  # an evaluation does not count
        loss = training_step(ddp_model, micro_batches, world_size, bf16).item()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip).item()
        done = step + 1
        if not math.isfinite(loss + norm):
            why = f"loss {loss}, gradient norm {norm} in step {done}; the last checkpoint is kept"
            raise ValueError(f"{why}: start anew, --init {args.out}, a new --out, a lower --lr")
        optimizer.param_groups[0]["lr"] = learning_rate(step, args)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)  # AdamW passes None over, but decays zeros

        seen["images_encoded"] += sum(encoded)
        seen["slots"] += sum(batch["pixel_values"].shape[:2].numel() for batch in micro_batches)
        if rank == 0 and done % args.log_every == 0:
            pace = (done - first_step) / (time.time() - began)  # steps a second, evaluations too
            entry = {"step": done, "loss": loss, **seen}
            entry["samples_per_s"] = round(pace * args.batch_size, 1)
            entry["s_left"] = round((args.steps - done) / pace)
            report(args, entry)
            seen.update(images_encoded=0, slots=0)

    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    if rank == 0:
        run_extra("predictions.py", str(args.out))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, AssertionError, OSError) as error:
        lines = str(error).strip().splitlines() or [repr(error)]
        sys.exit(f"train.py: {lines[-1]}")  # a worker's error begins with its traceback
