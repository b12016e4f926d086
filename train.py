"""
LLaVA mini, the training. It learns from pictures and from text at once.

$ python train.py                                       # toy data, two minutes on two CPU cores
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
import sys
import textwrap
import time
import zlib
from collections import Counter
from pathlib import Path

import torch
import torch.distributed as dist
from PIL import Image, ImageDraw
from torch.nn.parallel import DistributedDataParallel

import data
from llava_mini import Config, LlavaMini, answer

SIZES = ("width", "depth", "heads", "image_size", "patch_size", "block_size")
MACHINE = ("out", "resume", "device", "workers")  # a run does not remember these
FREE = ("data", "images", "val", "accumulate", "log_every", "eval_every")  # may change on resume


def make_parser():
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    # input and output
    add("--out", type=Path, default="out", help="folder for all that the run writes")
    add("--resume", action="store_true", help="continue the run in --out, with its settings")
    add("--init", help="start from the model in this folder")
    add("--data", help="LLaVA's JSON to train on; without it toy data")
    add("--images", default=".", help="folder of the pictures that --data and --val name")
    add("--val", help="LLaVA's JSON to evaluate on")
    add("--text-fraction", type=float, default=0.5, help="text-only records in the toy data")
    # model, where it starts from nothing; None is Config's default
    add("--width", type=int, help="channels, of encoder and decoder")
    add("--depth", type=int, help="blocks, of encoder and decoder")
    add("--heads", type=int, help="attention heads, of encoder and decoder")
    add("--image-size", type=int, help="pixels")
    add("--patch-size", type=int, help="pixels")
    add("--block-size", type=int, help="longest sequence, in tokens")
    add("--freeze", nargs="+", default=[], choices=["vision", "projector", "decoder"])
    # optimisation
    add("--steps", type=int, default=900)
    add("--batch-size", type=int, default=32, help="samples a step, over all ranks")
    add("--accumulate", type=int, default=1, help="micro-batches a step, on each rank")
    add("--lr", type=float, default=2e-3)
    add("--weight-decay", type=float, default=0.05)
    add("--warmup", type=int, default=100, help="steps")
    add("--clip", type=float, default=1.0, help="largest gradient norm")
    add("--seed", type=int, default=0)
    # machine
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", choices=["float32", "bfloat16"], help="None is bfloat16 on cuda, else float32")
    add("--workers", type=int, default=1, help="processes that prepare batches")
    add("--log-every", type=int, default=20, help="steps")
    add("--eval-every", type=int, default=300, help="steps; an evaluation saves a checkpoint, too")
    return parser


# ---- one step -----------------------------------------------------------------------------------


def training_step(model, micro_batches, world_size=1, dtype=None):
    """Accumulate the gradient of one step; -> its loss. Every rank calls it.

    The model's loss is a sum over supervised tokens. Sums add up, so dividing each by the tokens
    of the whole step gives the exact mean, wherever the images and the long answers happen to be.
    """
    tokens = sum((batch["labels"][:, 1:] != data.IGNORE_INDEX).sum() for batch in micro_batches)
    if world_size > 1:
        dist.all_reduce(tokens)

    step_loss = torch.zeros((), device=tokens.device)
    for i, batch in enumerate(micro_batches):
        # DDP exchanges gradients in backward. Once a step is enough: in the last micro-batch.
        model.require_backward_grad_sync = i == len(micro_batches) - 1
        with autocast(tokens.device, dtype):
            _, loss_sum = model(**batch)
        loss = loss_sum / tokens
        (loss * world_size).backward()  # DDP averages over the ranks, we want the sum
        step_loss += loss.detach()

    if world_size > 1:
        dist.all_reduce(step_loss)
    return step_loss


def data_parallel(model):
    """DDP must look for unused weights: a rank without an image never makes the gradients that
    the others wait for. Where no rank has an image, these gradients stay None."""
    return DistributedDataParallel(model, find_unused_parameters=True)


def autocast(device, dtype):
    half = dtype == "bfloat16" or (dtype is None and device.type == "cuda")
    return torch.autocast(device.type, torch.bfloat16, enabled=half)


def learning_rate(step, args):
    """Up in a straight line during the warm-up, then down to zero."""
    if step < args.warmup:
        return args.lr * (step + 1) / args.warmup
    return args.lr * (args.steps - step) / (args.steps - args.warmup)


# ---- evaluation ---------------------------------------------------------------------------------


@torch.no_grad()
def exact_match(model, samples, args, rank=0, world_size=1):
    """-> the share of records whose every answer is exact. The ranks share the work.

    Greedy decoding gives the reference if and only if every argmax does, the reference as input.
    """
    device, n = torch.device(args.device), args.batch_size
    right = torch.zeros((), device=device)
    for start in range(rank * n, len(samples), world_size * n):
        stop = min(start + n, len(samples))
        batch = to_device(data.collate([samples[i] for i in range(start, stop)]), device)
        targets = batch["labels"][:, 1:]
        supervised = targets != data.IGNORE_INDEX
        with autocast(device, args.dtype):
            logits, _ = model(**batch)  # (N, V), row by row
        wrong = torch.zeros_like(supervised)
        wrong[supervised] = logits.argmax(dim=-1) != targets[supervised]
        right += (~wrong.any(dim=1)).sum()
    if world_size > 1:
        dist.all_reduce(right)
    return right.item() / len(samples)


def to_device(batch, device):
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


def draw_predictions(path, model, tokenizer, record_lists):
    """A picture of twelve records with the model's answers, green where they are right."""
    page = Image.new("RGB", (4 * 250, 3 * 190), "white")
    pen = ImageDraw.Draw(page)
    share = 12 // len(record_lists)
    records = [records[i] for records in record_lists for i in range(min(share, len(records)))]
    for i, record in enumerate(records):
        turns = record["conversations"]
        first = next(i for i, turn in enumerate(turns) if turn["from"] == "gpt")
        question, reference = turns[first - 1]["value"], turns[first]["value"]
        images = data.images_of(record)[: question.count(data.IMAGE_TOKEN)]
        prompt = {"image": images, "conversations": turns[:first]}
        given = "".join(answer(model, tokenizer, prompt))

        x, y = 20 + i % 4 * 250, 20 + i // 4 * 190
        for j, image in enumerate(images):
            page.paste(data.letterbox(image, 80), (x + 90 * j, y))
        question = question.replace(data.IMAGE_TOKEN, "").strip()
        pen.text((x, y + 86), textwrap.fill(question, 34), "black", font_size=13)
        right = given == reference
        verdict = given if right else f"{given} (wrong: {reference})"
        colour = "green" if right else "red"
        pen.text((x, y + 120), textwrap.fill(verdict, 34), colour, font_size=13)
    page.save(path)


# ---- a run and its folder -----------------------------------------------------------------------


def parse_args(rank=0):
    """-> (arguments, checkpoint to resume or None). Raises ValueError for what does not fit."""
    parser = make_parser()
    args, checkpoint = parser.parse_args(), None
    if args.resume:
        checkpoint = torch.load(args.out / "resume.pt", map_location="cpu", weights_only=True)
        parser.set_defaults(**checkpoint["settings"])  # what is not given again is as it was
        args = parser.parse_args()
    elif rank == 0 and args.out.exists() and any(args.out.iterdir()):
        raise ValueError(f"{args.out} is not empty: --resume its run, or choose another --out")

    for name, value in vars(args).items():
        least = 0 if name in ("workers", "warmup", "seed") else 1
        if type(value) is int and value < least:
            raise ValueError(f"--{name} must be at least {least}")
    sizes = [f"--{name}" for name in SIZES if getattr(args, name)]
    if args.init and sizes:
        raise ValueError(f"the model in --init has its own sizes: leave out {', '.join(sizes)}")
    if args.data and args.text_fraction != 0.5:
        raise ValueError("--text-fraction is of the toy data: leave it out beside --data")

    args.data_checksum = zlib.crc32(Path(args.data).read_bytes()) if args.data else None
    for name, before in checkpoint["settings"].items() if checkpoint else ():
        now = getattr(args, name)
        if now != before and name not in FREE:
            raise ValueError(f"--resume: {name} was {before} in this run, now it is {now}")
    return args, checkpoint


def save_checkpoint(args, model, tokenizer, optimizer, step):
    """The model for its users, and resume.pt with all that --resume needs.

    They are written beside, then renamed: a crash at any moment leaves the last ones whole.
    """
    new = args.out / "new"
    model.save(new)
    tokenizer.save(str(new / "tokenizer.json"))
    settings = {name: value for name, value in vars(args).items() if name not in MACHINE}
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save({**state, "step": step, "settings": settings}, new / "resume.pt")
    for file in new.iterdir():
        os.replace(file, args.out / file.name)


def load_data(args):
    """-> (training records, {name: evaluation records})"""
    frozen = "decoder" in args.freeze  # then a text has nothing to teach, and no gradient
    if not args.data:
        share = 0.0 if frozen else args.text_fraction
        training = data.ToyRecords("train", args.steps * args.batch_size, args.seed, share)
        images = data.ToyRecords("test", 500, args.seed, text_fraction=0.0)
        texts = data.ToyRecords("test", 500, args.seed, text_fraction=1.0)
        return training, {"image": images, "text": texts}

    training = data.read_records(args.data, args.images)
    if frozen:
        n, training = len(training), [record for record in training if record["image"]]
        print(f"{n - len(training)} text-only records dropped: the decoder is frozen")
    if not training:
        raise ValueError(f"{args.data}: no record to train on")
    val = data.read_records(args.val, args.images) if args.val else []
    images = [record for record in val if record["image"]]
    texts = [record for record in val if not record["image"]]
    return training, {k: v for k, v in {"image": images, "text": texts}.items() if v}


def build(args, records):
    """-> (model, tokenizer), those in a folder or new ones."""
    folder = args.out if args.resume else args.init
    if folder:
        return LlavaMini.load(folder), data.load_tokenizer(f"{folder}/tokenizer.json")
    tokenizer = data.train_tokenizer(records if args.data else data.ToyRecords("train", 2000))
    sizes = {name: getattr(args, name) for name in SIZES if getattr(args, name)}
    for name in ("width", "depth", "heads"):
        if name in sizes:
            sizes[f"vision_{name}"] = sizes[name]
    torch.manual_seed(args.seed)
    image_token_id = tokenizer.token_to_id(data.IMAGE_TOKEN)
    return LlavaMini(Config(tokenizer.get_vocab_size(), image_token_id, **sizes)), tokenizer


def micro_batch_indices(args, size, first_step, rank, world_size):
    """Yield the samples of each micro-batch of this rank. They follow from (seed, step) alone."""
    parts = world_size * args.accumulate
    for step in range(first_step, args.steps):
        indices = data.indices_of_step(step, args.batch_size, size, args.seed)
        for part in range(rank, parts, world_size):
            yield indices[part::parts]


# ---- the run ------------------------------------------------------------------------------------


def main():
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    args, checkpoint = parse_args(rank)
    if args.batch_size % (world_size * args.accumulate):
        raise ValueError("--batch-size must be a multiple of ranks x --accumulate")
    if world_size > 1:  # under torchrun
        if args.device == "cuda":
            args.device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(args.device)
        dist.init_process_group("gloo" if args.device == "cpu" else "nccl")

    records, evaluation = load_data(args)
    model, tokenizer = build(args, records)
    model.to(args.device)
    for part in args.freeze:
        getattr(model, part).requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    decay = args.weight_decay
    optimizer = torch.optim.AdamW(trained, args.lr, (0.9, 0.99), weight_decay=decay, fused=True)
    training = data.Samples(records, tokenizer, model.config)
    if args.data:
        training.check()
    evaluation = {k: data.Samples(v, tokenizer, model.config) for k, v in evaluation.items()}

    first_step = 0
    if checkpoint:
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        first_step = checkpoint["step"]
    elif rank == 0:
        save_checkpoint(args, model, tokenizer, optimizer, step=0)
    log = open(args.out / "metrics.jsonl" if rank == 0 else os.devnull, "a", buffering=1)
    if rank:
        sys.stdout = log

    indices = micro_batch_indices(args, len(training), first_step, rank, world_size)
    loader = torch.utils.data.DataLoader(
        training, batch_sampler=indices, collate_fn=data.collate, num_workers=args.workers
    )
    batches = iter(loader)
    ddp_model = data_parallel(model) if world_size > 1 else model
    seen = Counter()  # since the last line of the log
    model.vision.register_forward_hook(lambda _, __, output: seen.update(images=len(output)))
    size = sum(p.numel() for p in model.parameters())
    print(f"{size:,} parameters, {len(training):,} records, on {args.device}")

    began = time.time()
    for step in range(first_step, args.steps):
        micro_batches = [to_device(next(batches), args.device) for _ in range(args.accumulate)]
        loss = training_step(ddp_model, micro_batches, world_size, args.dtype).item()
        norm = torch.nn.utils.clip_grad_norm_(trained, args.clip).item()
        if not math.isfinite(loss + norm):
            raise ValueError(
                f"step {step + 1}: loss {loss}, gradient norm {norm}; the last checkpoint is kept"
            )
        optimizer.param_groups[0]["lr"] = learning_rate(step, args)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)  # zeros would still decay, and carry momentum

        done = step + 1
        slots = sum(batch["pixel_values"].shape[:2].numel() for batch in micro_batches)
        seen.update(slots=slots)
        if done % args.log_every == 0:
            speed = (done - first_step) / (time.time() - began)  # steps a second
            print(
                f"step {done}/{args.steps}  loss {loss:.3f}  "
                f"images encoded {seen['images']} of {seen['slots']} slots  "
                f"{speed * args.batch_size:.0f} samples/s  {(args.steps - done) / speed:.0f} s left",
                flush=True,
            )
            entry = {
                "step": done,
                "loss": loss,
                "images_encoded": seen["images"],
                "slots": seen["slots"],
            }
            print(json.dumps(entry), file=log)
            seen.clear()
        if done % args.eval_every == 0 or done == args.steps:
            scores = {}
            for name, samples in evaluation.items():
                scores[f"{name}_exact_match"] = exact_match(model, samples, args, rank, world_size)
            seen.clear()  # its images do not count
            print("  ".join(f"{name} {score:.1%}" for name, score in scores.items()))
            print(
                json.dumps({"step": done, "samples_seen": done * args.batch_size, **scores}),
                file=log,
            )
            if rank == 0:
                save_checkpoint(args, model, tokenizer, optimizer, done)

    if rank == 0:
        lists = [samples.records for samples in evaluation.values()] or [records]
        draw_predictions(args.out / "predictions.png", model, tokenizer, lists)
        print(f"done: see {args.out}/predictions.png")
    if world_size > 1:
        dist.barrier()  # torchrun ends the others once one is gone, and rank 0 may still be saving
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:  # the last line, where a worker process raised it
        sys.exit(f"train.py: {str(error).strip().splitlines()[-1]}")
