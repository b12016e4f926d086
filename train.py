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
import os
import random
import signal
import sys
import time
from dataclasses import fields
from datetime import timedelta
from functools import lru_cache
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

import data
from llava_mini import Config, LlavaMini


def parse_args():
    """-> (arguments, the saved settings of the run to resume, else {})"""
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
    add("--steps", type=int, default=700, help="of the optimizer")
    add("--batch-size", type=int, default=32, help="samples a step, over all ranks")
    add("--accumulate", type=int, default=1, help="micro-batches a step, on each rank")
    add("--lr", type=float, default=2e-3, help="at the end of the warm-up")
    add("--weight-decay", type=float, default=0.05, help="of AdamW, on every weight")
    add("--warmup", type=int, help="steps; None is 100, but at most half of all")
    add("--clip", type=float, default=1.0, help="largest gradient norm")
    add("--seed", type=int, default=0, help="of new weights, order and toy")
    # machine
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", choices=["float32", "bfloat16"], help="None is bfloat16 where a GPU has it")
    add("--workers", type=int, default=1, help="processes that prepare batches")
    add("--log-every", type=int, default=20, help="steps")
    add("--eval-every", type=int, default=200, help="steps; an evaluation saves a checkpoint, too")

    args, saved = parser.parse_args(), {}
    if args.resume:
        from extras import run_folder

        saved = run_folder.load_settings(args.out)
        parser.set_defaults(**saved)
        args = parser.parse_args()  # again: what is not given is as it was
    if args.warmup is None:
        args.warmup = min(100, args.steps // 2)
    if args.dtype is None:
        fast = "cuda" in args.device and torch.cuda.is_bf16_supported(including_emulation=False)
        args.dtype = "bfloat16" if fast else "float32"
    return args, saved


def join_ranks(device):
    """Connect the processes that torchrun has started; -> the device of this one"""
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    patience = timedelta(hours=2)
    dist.init_process_group("gloo" if device == "cpu" else "nccl", timeout=patience)
    dist.barrier()  # rank 0 comes late: it checks the data first
    return device


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
        # DDP exchanges gradients in backward: once a step is enough. This is what no_sync() sets.
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
def evaluate(model, samples, batch_size, rank=0, world_size=1, bf16=False):
    """-> the share of samples whose every answer is exact, and the mean loss of a token.

    One forward pass tells: if each word of an answer is the likeliest, greedy decoding says it.
    The ranks share the work, with the bare model: DDP's would wait where they differ in images.
    """
    device = model.decoder.wte.weight.device
    totals = torch.zeros(3, device=device)  # right samples, loss, tokens
    mine = range(rank, len(samples), world_size)
    for batch in DataLoader(samples, batch_size, sampler=mine, collate_fn=data.collate):
        batch = to_device(batch, device)
        targets = batch["labels"][:, 1:]
        supervised = targets != data.IGNORE_INDEX
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            logits, loss_sum = model(**batch)  # (N, V), row by row
        wrong = torch.zeros_like(supervised)
        wrong[supervised] = logits.argmax(dim=-1) != targets[supervised]
        right = (~wrong.any(dim=1)).sum()
        totals += torch.stack([right, loss_sum, supervised.sum()])
    if world_size > 1:
        dist.all_reduce(totals)
    right, loss, tokens = totals.tolist()
    return right / len(samples), loss / tokens


def to_device(batch, device):
    return {name: tensor.to(device) for name, tensor in batch.items()}


def by_kind(records, tokenizer, config):
    """-> {"image": the samples with one, "text": those without}, unless there are none"""
    kinds = {"image": [], "text": []}
    for i in range(len(records)):
        record = records[i]
        kinds["image" if data.images_of(record) else "text"].append(record)
    return {kind: data.Samples(some, tokenizer, config) for kind, some in kinds.items() if some}


def load_records(args, rank):
    """-> the records to train on, the held-out ones, and those that a tokenizer learns from"""
    if not args.data:
        text_fraction = 0.0 if "decoder" in args.freeze else args.text_fraction
        size = args.steps * args.batch_size  # every record once
        training = data.ToyRecords("train", size, args.seed, text_fraction)
        return training, data.ToyRecords("test", 1000, args.seed), data.ToyRecords("train", 500)

    records = data.read_records(args.data, args.images)
    training = records
    if "decoder" in args.freeze:  # then text has nothing to teach, and no gradient
        training = [record for record in records if data.images_of(record)]
        if rank == 0:
            print(f"{len(training):,} records to train on: text-only ones are dropped")
    if not training:
        raise ValueError(f"no record of {args.data} is left to train on")
    held_out = data.read_records(args.val, args.images) if args.val else []
    return training, held_out, records


def build(args, records, source=None, device="cpu"):
    """-> (model, tokenizer), those in the folder `source` or new ones."""
    from extras import vocabulary

    if source:
        model = LlavaMini.load(source)
        tokenizer = data.load_tokenizer(f"{source}/tokenizer.json", model.config)
    else:
        tokenizer = data.train_tokenizer(records)
        known = {"vocab_checksum": vocabulary.checksum(tokenizer)}
        for field in fields(Config):  # --width is for both width and vision_width
            value = getattr(args, field.name.removeprefix("vision_"), None)
            if value is not None:
                known[field.name] = value
        image_token_id = tokenizer.token_to_id(data.IMAGE_TOKEN)
        torch.manual_seed(args.seed)
        model = LlavaMini(Config(tokenizer.get_vocab_size(), image_token_id, **known))
    for part in args.freeze:
        getattr(model, part).requires_grad_(False)
    return model.to(device), tokenizer


@lru_cache(maxsize=2)  # a batch may reach into the next epoch
def shuffled(size, seed, epoch):
    return random.Random(f"{seed}/{epoch}").sample(range(size), size)


def micro_batch_indices(args, size, first_step, rank, world_size):
    """Yield the indices of this rank's micro-batches. Those of a step follow from its number."""
    parts = world_size * args.accumulate
    for step in range(first_step, args.steps):
        numbers = range(step * args.batch_size, (step + 1) * args.batch_size)
        indices = [shuffled(size, args.seed, i // size)[i % size] for i in numbers]
        for part in range(rank, parts, world_size):
            yield indices[part::parts]


def save_checkpoint(folder, model, tokenizer, optimizer, step):
    """The model for its users, and resume.pt with all that load_checkpoint needs. That has the
    weights, too: after a kill those beside it may be of another step."""
    model.save(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    state = {"step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(state, folder / "resume.pt")


def load_checkpoint(args, model, optimizer):
    """-> the step where it stands"""
    state = torch.load(args.out / "resume.pt", map_location="cpu", weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"]


def report(args, entry):
    """One line on the terminal, the same in metrics.jsonl."""
    words = []
    for name, value in entry.items():
        words.append(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}")
    print("  ".join(words), flush=True)
    with open(args.out / "metrics.jsonl", "a") as file:
        file.write(json.dumps(entry) + "\n")


def main():
    from extras import predictions, preflight, run_folder, workers  # what is no part of the lesson

    args, saved = parse_args()
    rank = int(os.environ.get("RANK", 0))  # torchrun sets both
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    source = args.out if args.resume else args.init  # the model to start from, if any
    preflight.check(args, saved, source, rank, world_size)
    device = join_ranks(args.device) if world_size > 1 else args.device
    bf16 = args.dtype == "bfloat16"

    records, held_out, texts = load_records(args, rank)
    model, tokenizer = build(args, texts, source, device)
    adamw = {"betas": (0.9, 0.99), "weight_decay": args.weight_decay, "fused": True}
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, **adamw)
    first_step = load_checkpoint(args, model, optimizer) if args.resume else 0

    training = data.Samples(records, tokenizer, model.config)
    tests = by_kind(held_out, tokenizer, model.config)
    rows = args.batch_size // (world_size * args.accumulate)
    indices = micro_batch_indices(args, len(training), first_step, rank, world_size)
    options = {"batch_sampler": indices, "collate_fn": data.collate, "num_workers": args.workers}
    batches = workers.guard(DataLoader(training, **options))
    ddp_model = data_parallel(model) if world_size > 1 else model
    counts = {"images_encoded": 0, "slots": 0}  # since the last report
    encoded = []  # images, a number for each call of the encoder
    model.vision.register_forward_pre_hook(lambda _, inputs: encoded.append(len(inputs[0])))
    began = time.time()
    cure = f"the last checkpoint is kept: start anew, --init {args.out}, a new --out, a lower --lr"

    for step in range(first_step, args.steps + 1):
        if step % args.eval_every == 0 or step == args.steps:
            if not all(weight.isfinite().all() for weight in model.parameters()):
                raise ValueError(f"weights are not finite after step {step}; {cure}")
            if rank == 0 and not (args.resume and step == first_step):  # just read
                with run_folder.new_files(args.out) as folder:  # which replace the old ones
                    save_checkpoint(folder, model, tokenizer, optimizer, step)
            entry = {"step": step, "samples_seen": step * args.batch_size}
            for kind, samples in tests.items():
                scores = evaluate(model, samples, rows, rank, world_size, bf16)
                entry[f"{kind}_exact_match"], entry[f"{kind}_loss"] = scores
            if rank == 0:
                report(args, entry)
        if step == args.steps:
            break

        micro_batches = [to_device(next(batches), device) for _ in range(args.accumulate)]
        encoded.clear()  # an evaluation does not count
        loss = training_step(ddp_model, micro_batches, world_size, bf16)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        done = step + 1
        if not (loss + norm).isfinite():
            raise ValueError(f"loss {loss}, gradient norm {norm} in step {done}; {cure}")
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)  # AdamW passes None over, but decays zeros

        counts["images_encoded"] += sum(encoded)
        counts["slots"] += sum(batch["pixel_values"].shape[:2].numel() for batch in micro_batches)
        if rank == 0 and done % args.log_every == 0:
            pace = (done - first_step) / (time.time() - began)  # steps a second, evaluations too
            entry = {"step": done, "loss": loss.item(), "grad_norm": norm.item()}
            entry |= {"lr": learning_rate(step, args), **counts}
            entry["samples_per_s"] = round(pace * args.batch_size, 1)
            entry["s_left"] = round((args.steps - done) / pace)
            report(args, entry)
            counts.update(images_encoded=0, slots=0)

    if world_size > 1:
        dist.destroy_process_group()
    if rank == 0:
        predictions.draw(args.out / "predictions.png", model, tokenizer, held_out or records)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a stop, like Ctrl-C
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("train.py: stopped; --resume repeats the steps since the last checkpoint")
    except (ValueError, AssertionError, OSError) as error:
        lines = str(error).strip().splitlines() or [repr(error)]
        sys.exit(f"train.py: {lines[-1]}")  # a worker's error begins with its traceback
