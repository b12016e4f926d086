"""
What train.py looks at before a run begins: flags that do not go together, the folder, the data.
Whatever is wrong is one ValueError that names the flag and the cure.
"""

import math
import sys
from dataclasses import fields

import torch

from extras import check_data, run_folder
from llava_mini import Config

ABOVE_ZERO = ["steps", "batch_size", "accumulate", "clip", "log_every", "eval_every"]
NOT_BELOW_ZERO = ["lr", "weight_decay", "warmup", "workers"]

# A resumed run may have others of these. All else must be as it was.
FREE = {"device", "workers", "data", "images", "val", "accumulate", "log_every", "eval_every"}


def check(args, saved, source, rank, world_size):
    """Raises ValueError. `saved` are the settings of the run to resume, `source` is the folder of
    the model to start from, if any."""
    sizes = [field.name for field in fields(Config) if hasattr(args, field.name)]
    check_numbers(args, sizes)
    check_flags(args, sizes, world_size)
    if rank > 0:
        return

    now = run_folder.settings_of(args)
    for name in saved.keys() - FREE:
        if now.get(name) != saved[name]:
            cure = f"to change it, give --init {args.out} and a new --out"
            raise ValueError(f"--resume: {name} was {saved[name]}, now {now.get(name)}; {cure}")
    run_folder.claim(args.out, args.resume)
    if args.warmup == args.steps // 2 < 100:
        print(f"--steps {args.steps}: {args.warmup} of them are warm-up", file=sys.stderr)
    if args.resume:
        check_checkpoint(args.out)
    if args.data and check_data.count_bad(args, init=source, no_decode=True, write_good=None):
        raise ValueError("the check failed; python data.py --data .. --images .. shows all")
    run_folder.save_settings(args.out, now)


def check_checkpoint(out):
    try:
        state = torch.load(out / "resume.pt", mmap=True, weights_only=True)
        assert {"step", "model", "optimizer"} <= state.keys()
    except Exception as error:  # torch.load raises whatever it likes
        cure = f"--init {out} and a new --out start from the model beside it"
        raise ValueError(f"{out / 'resume.pt'} is damaged: {cure}") from error


def flag(name):
    return f"--{name.replace('_', '-')}"


def check_numbers(args, sizes):
    for name in ABOVE_ZERO + sizes:
        value = getattr(args, name)
        if value is not None and not value > 0:  # for no clipping: --clip inf
            raise ValueError(f"{flag(name)} must be above 0, not {value}")
    for name in NOT_BELOW_ZERO:
        value = getattr(args, name)
        if not 0 <= value < math.inf:
            raise ValueError(f"{flag(name)} must be a number from 0 on, not {value}")
    if not 0 <= args.text_fraction <= 1:
        raise ValueError(f"--text-fraction is a share from 0 to 1, not {args.text_fraction}")
    if args.warmup >= args.steps:
        raise ValueError(f"--warmup {args.warmup} must be below --steps {args.steps}")


def check_flags(args, sizes, world_size):
    check_data.refuse_empty(args)
    if args.batch_size % (world_size * args.accumulate):
        raise ValueError("--batch-size must be a multiple of ranks x --accumulate")
    if args.init and not args.resume and any(getattr(args, name) for name in sizes):
        raise ValueError(f"--init brings its model's sizes: leave out {', '.join(sizes)}")
    if "decoder" in args.freeze and not args.init:
        raise ValueError("--freeze decoder goes with --init: a new decoder knows no words")
    if len(set(args.freeze)) == 3:
        raise ValueError("--freeze: with all three parts frozen there is nothing to train")
    if args.val and not args.data:
        raise ValueError("--val goes with --data")
    if world_size > 1 and args.device not in ("cpu", "cuda"):
        raise ValueError("--device: several ranks take cpu, or cuda for a GPU each")
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as error:
        why = str(error).splitlines()[0]
        raise ValueError(f"--device {args.device}: {why}") from error
