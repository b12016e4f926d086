"""LLaVA mini, the training: `python train.py` learns from pictures and text at once, on toy data, in minutes.

Notable:
- the loss of a step is its mean over the supervised tokens of all micro-batches and ranks. However a step is cut, its
  gradient is the same, and ranks or micro-batches without an image dilute nothing.
- where nothing was learned the gradient is None, not zero, and optimisers leave weight and momentum alone.
- evaluation is exact match by teacher forcing: greedy decoding gives the reference if and only if every argmax does.
- batches follow from (seed, step) and no other random number is drawn: with weights, optimiser state and step in one
  file, replaced atomically, --resume continues bit for bit.
"""

import json
import math
import os
import signal
import sys
import textwrap
import time
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser
from collections import Counter, defaultdict
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import islice
from pathlib import Path

import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import save_file
from torch import nn

import data
import llava_mini
from llava_mini import GPTConfig, LlavaMini, LlavaMiniConfig, ViTConfig, replace_file


def arguments():
    parser = ArgumentParser(description=__doc__.splitlines()[0], formatter_class=ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, default=Path("out"), help="folder for checkpoint, metrics and picture")
    add("--resume", action="store_true", help="continue the run in --out, bit for bit")
    add("--init", type=Path, help="start from the model in this folder, which an earlier run wrote")
    add("--vision", type=Path, help="take the vision encoder from this CLIP folder")
    add("--decoder", type=Path, help="take the decoder from this GPT-2 folder, and its tokenizer.json")
    add("--tokenizer", type=Path, help="a tokenizer.json; special tokens are added")
    add("--data", type=Path, help="LLaVA JSON file to train on, instead of toy data")
    add("--images", type=Path, help="folder of the pictures that --data names; without it the current one")
    add("--val", type=Path, help="LLaVA JSON file to evaluate on")
    add("--skip-bad", action="store_true", help="leave out the records of a JSON file that fail the checks")
    add("--text-fraction", type=float, default=0.5, help="share of text-only records in the toy data")
    add("--freeze", nargs="+", choices=("vision", "projector", "decoder"), default=[], help="parts to keep as they are")
    add("--width", type=int, default=96, help="of parts that start from nothing, as the next five")
    add("--depth", type=int, default=3, help="blocks")
    add("--heads", type=int, default=4, help="attention heads")
    add("--image-size", type=int, default=32, help="pixels")
    add("--patch-size", type=int, default=8, help="pixels")
    add("--block-size", type=int, default=256, help="longest sequence, in tokens")
    add("--seed", type=int, default=0, help="of the initial weights, the toy data and the order of the data")
    add("--steps", type=int, default=2250, help="optimiser steps")
    add("--batch-size", type=int, default=32, help="samples a step, over all ranks and micro-batches")
    add("--accumulate", type=int, default=1, help="micro-batches a step on each rank, to save memory")
    add("--optimizer", choices=("muon", "adamw"), default="muon", help="muon: for hidden matrices, AdamW for the rest")
    add("--lr", type=float, default=4e-3, help="AdamW's peak learning rate")
    add("--muon-lr", type=float, default=6e-3, help="Muon's peak learning rate")
    add("--weight-decay", type=float, default=0.05, help="of both optimisers")
    add("--warmup", type=int, default=50, help="steps up to the peak; from there the rate falls to zero")
    add("--clip", type=float, default=1.0, help="largest gradient norm")
    add("--device", default=llava_mini.DEVICE, help="cpu, cuda or mps")
    add("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="auto: bfloat16 on cuda, else float32")
    add("--workers", type=int, default=1, help="processes that prepare batches")
    add("--log-every", type=int, default=10, help="steps between two lines of the log")
    add("--eval-every", type=int, default=450, help="steps between two evaluations, each with a checkpoint")
    return parser


def check(args):
    limits = {"workers": (0, math.inf), "seed": (0, math.inf), "weight_decay": (0, 1e12), "text_fraction": (0, 1)}
    for name, value in vars(args).items():
        flag, kind = f"--{name.replace('_', '-')}", type(value)
        low, high = limits.get(name, (1, math.inf) if kind is int else (1e-12, 1e12))
        if kind in (int, float) and not low <= value <= high:
            raise ValueError(f"{flag} {value}: must be from {low} to {high}")
        if isinstance(value, Path) and name != "out" and not value.exists():
            raise ValueError(f"{flag} {value}: does not exist")
        if name in ("images", "val", "skip_bad") and value and not args.data:
            raise ValueError(f"{flag} needs --data")
    if args.init and (args.vision or args.decoder or args.tokenizer):
        raise ValueError("--init brings its own parts and tokenizer: leave out --vision, --decoder and --tokenizer")
    resumable = (args.out / "run.safetensors").exists()
    if args.resume and not resumable:
        raise ValueError(f"--resume: there is no run in {args.out}")
    if not args.resume and any(args.out.glob("[!.]*")):
        how = "continue its run with --resume, or choose" if resumable else "choose"
        raise ValueError(f"{args.out} is not empty: {how} another --out")


def set_up(args):
    """-> (rank, ranks, device). Under torchrun every process calls this; only rank 0 prints."""
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device(args.device)
    if args.batch_size % (parts := ranks * args.accumulate):
        raise ValueError(f"--batch-size {args.batch_size} does not divide by {parts}, which is ranks x --accumulate")
    if ranks > 1:
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        else:  # torchrun leaves each process a single thread: share out the cores instead
            torch.set_num_threads(max(1, os.cpu_count() // int(os.environ["LOCAL_WORLD_SIZE"])))
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        if rank:
            sys.stdout = open(os.devnull, "w", errors="backslashreplace")  # noqa: SIM115
    return rank, ranks, device


def build(args):
    """-> (model, tokenizer): that of --init or, to resume, of --out; else pretrained parts, and new ones elsewhere."""
    folder = args.out if args.resume else args.init
    if folder:
        return LlavaMini.from_pretrained(folder), data.load_tokenizer(folder / "tokenizer.json")
    if args.tokenizer or args.decoder:
        tokenizer = data.load_tokenizer(args.tokenizer or args.decoder / "tokenizer.json")
    else:
        toy = data.ToyDataset("train", 2000)
        records = data.read_json(args.data, list) if args.data else map(toy.record, range(toy.size))
        tokenizer = data.train_tokenizer(records)
    torch.manual_seed(args.seed)
    size = {"width": args.width, "depth": args.depth, "heads": args.heads}
    vision, vit = ViTConfig(args.image_size, args.patch_size, **size), None
    text, gpt = GPTConfig(tokenizer.get_vocab_size(), args.block_size, **size), None
    if args.vision:
        vision, vit = llava_mini.load_vision(args.vision)
    if args.decoder:
        text, gpt = llava_mini.load_decoder(args.decoder, tokenizer.get_vocab_size())
    model = LlavaMini(LlavaMiniConfig(vision, text, tokenizer.token_to_id(data.IMAGE_TOKEN)))
    model.vision, model.decoder = vit or model.vision, gpt or model.decoder
    return model, tokenizer


def datasets(args, config, tokenizer):
    """-> (training set, {name: evaluation set})."""
    frozen, why = "decoder" in args.freeze, "with a frozen decoder they have nothing to teach"
    if args.data:
        training, evaluation = json_dataset(args, args.data, config, tokenizer), {}
        if frozen:
            n, training = len(training), training.subset(with_images=True)
            print(f"{n - len(training)} text-only records dropped: {why}")
        if not len(training):
            raise ValueError(f"{args.data}: no record to train on")
        if args.val:
            both = json_dataset(args, args.val, config, tokenizer)
            evaluation = {"image": both.subset(with_images=True), "text": both.subset(with_images=False)}
        return training, {name: dataset for name, dataset in evaluation.items() if len(dataset)}
    if frozen:
        print(f"no text-only records: {why}")
    sizes = {"image_size": config.vision.image_size, "patch_size": config.vision.patch_size}
    toy = partial(data.ToyDataset, tokenizer=tokenizer, seed=args.seed, **sizes)
    return toy("train", args.steps * args.batch_size, text_fraction=0.0 if frozen else args.text_fraction), {
        "image": toy("test", 500, text_fraction=0.0),
        "text": toy("test", 500, text_fraction=1.0),
        "held_out_pairs": toy("pairs", 500, text_fraction=0.0),
        "transfer": toy("transfer", 200, text_fraction=0.0),
    }


def json_dataset(args, path, config, tokenizer):
    sizes = config.vision.image_size, config.vision.patch_size, config.text.block_size
    dataset = data.LlavaDataset(path, args.images or Path(), tokenizer, *sizes)
    print(f"{path}: {len(dataset)} records, {dataset.n_cut} of them cut at a turn to fit the block size")
    if dataset.bad:
        reasons = Counter(reason.split(":")[0] for _, reason in dataset.bad).most_common()
        print(f"{len(dataset.bad)} records are bad: " + ", ".join(f"{reason} ({n})" for reason, n in reasons))
        print("\n".join(f"  record {name}: {reason}" for name, reason in dataset.bad[:10]))
        if not args.skip_bad:
            raise ValueError(f"{path}: {len(dataset.bad)} bad records: mend them, or leave them out with --skip-bad")
    return dataset


class Muon(torch.optim.Optimizer):
    """Muon (Keller Jordan, 2024, github.com/KellerJordan/Muon) with decoupled weight decay, for matrices.

    The filters of a convolution count as the rows of a matrix, (out, in x height x width). A weight that holds several
    matrices, one above the other, says so by its attribute `n_matrices`. README.md says why not torch.optim.Muon.
    """

    def __init__(self, params, lr, momentum, weight_decay):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        for p in self.param_groups[0]["params"]:
            self.state[p]["momentum_buffer"] = torch.zeros_like(p)

    @torch.no_grad()
    def step(self):
        (group,) = self.param_groups
        same_shape = defaultdict(list)  # small products are slow one by one: take those of one shape together
        for p in (p for p in group["params"] if p.grad is not None):
            momentum = self.state[p]["momentum_buffer"]
            momentum.lerp_(p.grad, 1 - group["momentum"])
            update = p.grad.lerp(momentum, group["momentum"]).flatten(1)  # Nesterov's look ahead
            update = update.unflatten(0, (getattr(p, "n_matrices", 1), -1))  # (n, rows, columns)
            same_shape[update.shape[1:]].append((p, update))
        for shape, pairs in same_shape.items():
            scale = 0.2 * max(shape) ** 0.5  # as large as AdamW's: arXiv 2502.16982
            weights, updates = zip(*pairs)
            for p, update in zip(weights, orthogonal(torch.cat(updates)).split([len(u) for u in updates])):
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update.reshape(p.shape), alpha=-group["lr"] * scale)


def orthogonal(x):
    """Matrices (n, rows, columns) -> about the nearest with all singular values 1, by five Newton-Schulz iterations."""
    if x.shape[1] > x.shape[2]:
        return orthogonal(x.mT).mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        square = x @ x.mT  # singular values s become 3.4445 s - 4.775 s^3 + 2.0315 s^5
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=-4.775, alpha=2.0315), x, beta=3.4445)
    return x


def make_optimizers(args, model):
    """Muon for the matrices of patches, blocks and projector, AdamW for the rest, nothing for the parts to --freeze."""
    for part in args.freeze:
        getattr(model, part).requires_grad_(False)
    tables = ("wte.weight", "wpe.weight", "pos_embed.weight", "lm_head.weight")  # embeddings and head are not hidden
    matrices, rest = [], []
    for name, p in model.named_parameters():
        p.n_matrices = 3 if name.endswith("qkv.weight") else 1  # q, k, v learn sooner apart, as Muon's author advises
        if p.requires_grad:
            muon = args.optimizer == "muon" and p.ndim > 1 and not name.endswith(tables)
            (matrices if muon else rest).append(p)
    if not rest:
        raise ValueError("--freeze leaves nothing to train")
    adamw = torch.optim.AdamW(rest, args.lr, (0.9, 0.95), weight_decay=args.weight_decay, fused=True)
    for p in rest:  # as its first step would, but now, so that --resume has tensors to read into
        adamw.state[p] = {"step": p.new_zeros(()), "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
    return [adamw, Muon(matrices, args.muon_lr, momentum=0.8, weight_decay=args.weight_decay)] if matrices else [adamw]


def learning_rate(step, args):
    """The share of the peak rate: up in a straight line during the warm-up, then down to zero."""
    return min((step + 1) / args.warmup, (args.steps - step) / max(1, args.steps - args.warmup), 1.0)


def backward(model, batches, ranks=1, autocast=nullcontext):
    """Accumulate the gradient of one step over its micro-batches; -> this rank's share of the step's loss, a tensor.

    Each micro-batch weighs as its supervised tokens do in the whole step. DDP averages over ranks, hence `ranks`.
    """
    counts = [(batch["labels"][:, 1:] != data.IGNORE_INDEX).sum() for batch in batches]
    total = sum(counts)
    if ranks > 1:
        dist.all_reduce(total)
    step_loss = 0.0
    for i, (batch, count) in enumerate(zip(batches, counts), 1):
        model.require_backward_grad_sync = i == len(batches)  # DDP's: exchange gradients once a step, in its last part
        with autocast():
            loss = model(**batch)[1] * count / total
        (loss * ranks).backward()
        step_loss += loss.detach()
    return step_loss


@torch.no_grad()
def exact_match(model, dataset, batch_size, device, autocast=nullcontext, rank=0, ranks=1):
    """-> share of the records in which greedy decoding would give every answer exactly; ranks share the work."""
    right = torch.zeros((), device=device)
    for start in range(rank * batch_size, len(dataset), ranks * batch_size):
        samples = [dataset[i] for i in range(start, min(start + batch_size, len(dataset)))]
        batch = to(device, data.collate(samples))
        targets = batch["labels"][:, 1:]
        supervised = targets != data.IGNORE_INDEX
        wrong = torch.zeros_like(supervised)
        with autocast():  # with labels, logits are (N, V), in the order in which a mask takes positions: row by row
            wrong[supervised] = model(**batch)[0].argmax(-1) != targets[supervised]
        right += (~wrong.any(1)).sum()
    if ranks > 1:
        dist.all_reduce(right)
    return right.item() / len(dataset)


def to(device, batch):
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


def settings(args):
    """-> {name: value as text} of the settings that may not change when a run resumes: it would be another run."""
    free = {"out", "resume", "debug", "device", "workers", "accumulate", "log_every", "eval_every"}
    return {name: str(value) for name, value in vars(args).items() if name not in free}


def run_tensors(model, optimizers):
    """-> {name on disk: tensor}, weights and optimiser state: what a save writes, and what a resume reads into."""
    names = {p: name for name, p in model.named_parameters()}
    tensors = {f"model/{name}": p.detach() for p, name in names.items()}
    for optimizer in optimizers:
        for p, state in optimizer.state.items():
            tensors |= {f"optimizer/{names[p]}/{key}": value for key, value in state.items()}
    return tensors


def save_run(args, model, optimizers, step, tokenizer):
    """The model for its users; then weights, optimiser state and step for --resume, in one file replaced atomically."""
    model.save_pretrained(args.out, tokenizer)
    tensors, metadata = run_tensors(model, optimizers), settings(args) | {"step": str(step)}
    replace_file(args.out / "run.safetensors", lambda path: save_file(tensors, path, metadata))


def load_run(args, model, optimizers):
    """Put back what `save_run` saved; -> the steps done. Raises ValueError for a damaged file or other settings."""
    path, now = args.out / "run.safetensors", settings(args)
    tensors, before = llava_mini.read_safetensors(path)
    if not before or before.keys() != now.keys() | {"step"}:
        raise ValueError(f"{path}: holds no run of this version of train.py")
    if changed := [name for name in now if now[name] != before[name]]:
        were = ", ".join(f"--{name.replace('_', '-')} was {before[name]}" for name in changed)
        raise ValueError(f"--resume needs the settings of the run: {were}")
    llava_mini.read_tensors(run_tensors(model, optimizers).items(), tensors, args.out)
    return int(before["step"])


def start(args, model, optimizers, tokenizer, rank):
    """-> the steps done before, and the file, open, that this rank logs to."""
    first = load_run(args, model, optimizers) if args.resume else 0
    if dist.is_initialized():
        dist.barrier()  # all have looked at the folder before rank 0 writes to it
    if rank:
        return first, sys.stdout  # which is nowhere, on this rank
    args.out.mkdir(parents=True, exist_ok=True)
    metrics = args.out / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True) if args.resume else []
    # The log goes on where the checkpoint stands; its last line may have been cut off.
    lines = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= first]
    replace_file(metrics, lambda path: path.write_text("".join(lines)))
    if not args.resume:
        save_run(args, model, optimizers, first, tokenizer)  # a folder that can't be written shows now
    return first, open(metrics, "a", buffering=1)  # each line is written at once


def catch_signals():
    """-> a list that Ctrl-C or SIGTERM makes non-empty; a second signal stops at once."""
    caught = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda n, _: (caught.append(n), signal.signal(n, signal.SIG_DFL)))
    return caught


def leave_group(_):
    """A data worker leaves the process group: a signal to all of it, such as torchrun's, must not end workers first."""
    if hasattr(os, "setpgrp"):  # not on Windows
        os.setpgrp()


def progress(args, log, done, seen, loss, norm):
    """Log what was `seen` since the last line: steps, seconds, tokens with their padding, slots, images encoded."""
    speed, left = seen["tokens"] / seen["seconds"], seen["seconds"] / seen["steps"] * (args.steps - done)
    counts = {"images_encoded": seen["images"], "slots": seen["slots"], "tokens_per_second": speed}
    print(json.dumps({"step": done, "loss": loss, "gradient_norm": norm, **counts}), file=log)
    line = f"step {done}/{args.steps}  loss {loss:.3f}  images encoded {seen['images']} of {seen['slots']} slots"
    line += f"  {speed:,.0f} tokens/s  {left:.0f} s left"
    seen.clear()
    live = sys.stdout.isatty()  # there one line renews itself
    print(f"\r{line}\033[K" if live else line, end="" if live else "\n", flush=True)


def make_batches(args, training, first, rank, ranks, device):
    """-> a function that yields the indices of all steps, an iterator over this rank's micro-batches after `first`."""
    lengths = [record["n_tokens"] for record in training.records] if args.data else None
    steps = partial(data.batches, len(training), args.batch_size, args.seed, lengths)
    parts = ranks * args.accumulate
    mine = (step[part::parts] for step in islice(steps(), first, args.steps) for part in range(rank, parts, ranks))
    options = {"num_workers": args.workers, "worker_init_fn": leave_group, "pin_memory": device.type == "cuda"}
    return steps, iter(torch.utils.data.DataLoader(training, batch_sampler=mine, collate_fn=data.collate, **options))


def train(args):
    check(args)
    rank, ranks, device = set_up(args)
    model, tokenizer = build(args)
    optimizers = make_optimizers(args, model.to(device))
    training, evaluation = datasets(args, model.config, tokenizer)
    first, log = start(args, model, optimizers, tokenizer, rank)
    half = args.dtype == "bfloat16" or (args.dtype == "auto" and device.type == "cuda")
    autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=half)
    # Else DDP waits for gradients that a rank without an image never makes. Unused on every rank, they stay None.
    parallel = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True) if ranks > 1 else model
    signals, stop, seen = catch_signals(), False, Counter()
    steps, batches = make_batches(args, training, first, rank, ranks, device)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(training):,} records, on {device}")
    model.vision.register_forward_pre_hook(lambda _, x: seen.update(images=len(x[0])))  # so that the log shows the skip

    @contextmanager
    def saving(step):
        """An error inside, such as an image that can't be read, costs no step, unless it is another rank's."""
        try:
            yield
        except Exception:
            if rank == 0:
                save_run(args, model, optimizers, step, tokenizer)
            raise

    for done in range(first + 1, args.steps + 1):
        began = time.time()
        with saving(done - 1):
            micro_batches = [to(device, next(batches)) for _ in range(args.accumulate)]
        loss = backward(parallel, micro_batches, ranks, autocast)
        norm = nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        report = torch.stack([loss, norm / ranks, torch.tensor(float(bool(signals)), device=device)])
        if ranks > 1:
            dist.all_reduce(report)  # sums: a rank has its share of the loss, all of the norm, and perhaps a signal
        loss, norm, signalled = report.tolist()  # the host waits here; else it would in the next zero test
        factor = learning_rate(done - 1, args)
        if not math.isfinite(loss + norm):
            names = [training.record(i)["id"] for i in next(islice(steps(), done - 1, None))]
            where = f"step {done}, learning rate {args.lr * factor:.3g}, records {names}; the last checkpoint is kept"
            raise ValueError(f"loss {loss}, gradient norm {norm} at {where}")
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = optimizer.defaults["lr"] * factor
            optimizer.step()
            optimizer.zero_grad()  # to None: a zero left from the last image would still decay and carry momentum
        slots = sum(batch["pixel_values"].shape[:2].numel() for batch in micro_batches)
        tokens = ranks * sum(batch["input_ids"].numel() for batch in micro_batches)
        seen.update(steps=1, seconds=time.time() - began, tokens=tokens, slots=slots)
        if done % args.log_every == 0 or done == args.steps:
            progress(args, log, done, seen, loss, norm)
        due = done % args.eval_every == 0 or done == args.steps
        stop = bool(signalled) and done < args.steps
        if (due or stop) and sys.stdout.isatty():
            print()  # leaves the line that renews itself
        if due and not stop:
            images, how = seen["images"], (args.batch_size // (ranks * args.accumulate), device, autocast, rank, ranks)
            with saving(done):
                scores = {f"{name}_exact_match": exact_match(model, d, *how) for name, d in evaluation.items()}
            seen["images"] = images  # those of an evaluation do not count
            print(json.dumps({"step": done, "samples_seen": done * args.batch_size, **scores}), file=log)
            print("  ".join(f"{name} {score:.1%}" for name, score in scores.items()) or "no records to evaluate on")
        if rank == 0 and (due or stop):
            save_run(args, model, optimizers, done, tokenizer)
        if stop:
            print(f"stopped after step {done}: --resume continues")
            break
    if rank == 0 and not stop:
        draw(args.out, model, tokenizer, training, evaluation)
        print(f"done: see {args.out / 'predictions.png'}")
    if ranks > 1:
        dist.barrier()  # torchrun ends the others once one is gone, and rank 0 may still be saving or drawing
        dist.destroy_process_group()
    if stop:
        sys.exit(130)


# --- the picture -----------------------------------------------------------------------------------------------------
def reply(model, tokenizer, record):
    """-> (question, its pictures, the model's greedy answer, reference) of the first exchange in a record."""
    turns = record["conversations"]
    first = next(i for i, turn in enumerate(turns) if turn["from"] == "gpt")
    question, reference = turns[first - 1]["value"], tokenizer.decode(data.words(tokenizer, turns[first]["value"]))
    images = data.images_of(record)[: question.count(data.IMAGE_TOKEN)]
    answer = "".join(llava_mini.answer(model, tokenizer, {"image": images, "conversations": turns[:first]}))
    return question.replace(data.IMAGE_TOKEN, "").strip(), images, answer, reference


def chart(pen, box, title, curves):
    """Line chart in a box of left, top, right, bottom; curves: {name: [(x, y), ...]}, both axes from 0."""
    left, top, right, bottom = box
    points = [point for line in curves.values() for point in line]
    x_max, y_max = max(x for x, _ in points) or 1, max(y for _, y in points) or 1
    pen.rectangle(box, outline="#999999")
    pen.text((left, top - 46), title, "black")
    pen.text((left - 6, top), f"{y_max:.3g}", "black", anchor="ra")
    pen.text((right, bottom + 6), f"step {x_max}", "black", anchor="ra")
    at = left
    for (name, line), colour in zip(curves.items(), ("#1f5fb0", "#c02020", "#177a2f", "#8a5a00")):
        pen.line([(left + (right - left) * x / x_max, bottom - (bottom - top) * y / y_max) for x, y in line], colour, 3)
        pen.text((at, top - 24), name := name.replace("_", " "), colour)
        at += pen.textlength(name) + 16


def draw(out, model, tokenizer, training, evaluation):
    """Write predictions.png: held-out records with question, answer, right or wrong, beside the curves of the run."""
    log = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    rows = [evaluation[name] for name in ("image", "held_out_pairs", "text") if name in evaluation] or [training]
    page = Image.new("RGB", (1180, max(560, 60 + 250 * len(rows))), "white")
    pen = ImageDraw.Draw(page)
    pen.font = ImageFont.load_default(15)
    for cell, record in enumerate(dataset.record(i) for dataset in rows for i in range(min(4, len(dataset)))):
        x, y = 20 + 190 * (cell % 4), 20 + 250 * (cell // 4)
        question, images, answer, reference = reply(model, tokenizer, record)
        for i, image in enumerate(images):
            page.paste(data.letterbox(data.open_image(image), 80), (x + 84 * i, y))
        if not images:
            pen.text((x, y), "no image: zero slot", "#777777")
        y += 86 if images else 24
        verdict, colour = (answer, "#177a2f") if answer == reference else (f"{answer} (wrong: {reference})", "#c02020")
        pen.text((x, y), textwrap.fill(question, 24), "black")
        pen.text((x, y + 2 + 19 * len(textwrap.wrap(question, 24))), textwrap.fill(verdict, 24), colour)
    chart(pen, (830, 70, 1150, 270), "", {"training loss": [(e["step"], e["loss"]) for e in log if "loss" in e]})
    curves = {}
    for name in evaluation:
        key = f"{name}_exact_match"
        curves[name] = [(e["step"], 100 * e[key]) for e in log if key in e]
    if any(curves.values()):
        chart(pen, (830, 350, 1150, 550), "exact match on held-out records, %", curves)
    page.quantize(64).save(out / "predictions.png", optimize=True)


if __name__ == "__main__":
    llava_mini.run_command(train, arguments())
