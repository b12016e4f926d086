"""
DeepSpeed ZeRO, stages 1, 2 and 3, with batches that mix pictures and text.

$ torchrun --standalone --nproc_per_node=2 extras/zero.py    # on CPUs, against one process

One flag is all-reduced. If a rank has an image, those without one run the encoder on an empty
batch, for the calls of all ranks must match. If none has, AdamW passes the vision weights over,
for ZeRO's flat gradients know no None. More in docs/none-or-zero.md.

    engine = initialize(model, stage=2, lr=1e-3, weight_decay=0.1)
    for micro_batches in steps:  # lists, equally long on all ranks
        before_step(engine, micro_batches)
        train.training_step(engine, micro_batches, dist.get_world_size())
        engine.step()  # once a step, not once a micro-batch
"""

import copy
import sys
from datetime import timedelta
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))
import train
from extras.fsdp2 import CONFIG, make_batches, mismatch, print_table
from llava_mini import LlavaMini

# Else DeepSpeed compiles an operator on a CPU. Behind the lock of a dead build it waits for ever.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def initialize(model, stage, lr, **adamw):
    """-> a DeepSpeed engine, stage 1, 2 or 3, with an AdamW of these arguments. torch.distributed
    must be initialised. In an engine.backward(loss) of your own the loss is a sum, divided by the
    tokens of the step and multiplied by the ranks, over which DeepSpeed averages."""
    params = {True: [], False: []}  # those of encoder and projector, all others
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            params[name.startswith(("vision.", "projector."))].append(weight)
    groups = [{"params": some, "vision": kind} for kind, some in params.items() if some]
    optimizer = torch.optim.AdamW(groups, lr, **adamw)

    zero = {"stage": stage, "overlap_comm": False, "stage3_param_persistence_threshold": 0}
    config = {
        "zero_optimization": zero,
        "managed_gradient_accumulation": False,  # any number before engine.step(), and no overlap
        "train_micro_batch_size_per_gpu": 1,  # must be there; only counters of samples read it
        "gradient_clipping": 0,  # its default is 1
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    engine.image_anywhere = None  # on any rank in this step; unknown before `before_step`
    encoded = []  # calls of the encoder since the decoder ran
    kept = []  # what was passed over, with its gradients: under offload DeepSpeed needs them again

    def run_on_nothing(decoder, args):
        x, *others = args  # (B, T, C)
        if engine.image_anywhere and not encoded:
            size = model.config.image_size
            empty = x.new_zeros(0, 3, size, size)
            x = x + model.encode_images(empty).sum()  # exactly 0, with a graph
        encoded.clear()
        return x, *others

    def pass_over(optimizer, args, options):
        for group in optimizer.param_groups:  # ZeRO-1 and 2 show one at a time: no index would do
            if group["vision"] and engine.image_anywhere is False:
                for flat in group["params"]:
                    kept.append((flat, flat.grad))
                    flat.grad = None

    def give_back(optimizer, args, options):
        for flat, gradient in kept:
            flat.grad = gradient
        kept.clear()

    model.vision.register_forward_pre_hook(lambda *_: encoded.append(True))
    # Before DeepSpeed's own hook, which gathers the decoder's weights: the encoder's come first.
    model.decoder.register_forward_pre_hook(run_on_nothing, prepend=True)
    optimizer.register_step_pre_hook(pass_over)
    optimizer.register_step_post_hook(give_back)
    return engine


def before_step(engine, micro_batches):
    """Every rank calls it with its micro-batches of a step: one flag serves them all. Under ZeRO-3
    also in an evaluation whose ranks differ in images, since a forward pass gathers weights."""
    mine = any(engine.module.real_slots(batch["pixel_values"]).any() for batch in micro_batches)
    anywhere = torch.tensor(int(mine), device=engine.device)
    dist.all_reduce(anywhere, op=dist.ReduceOp.MAX)
    engine.image_anywhere = bool(anywhere)


# ---- the demonstration --------------------------------------------------------------------------

STEPS = ["10 11", "00 00", "10 00", "00 00", "00 01", "01 00 + 00 00", "00 00 + 00 10"]
ADAMW = {"lr": 0.01, "weight_decay": 0.1, "betas": (0.9, 0.99)}


def weights(model):
    """-> {name: the whole weight}, copies, on every rank"""
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def run(stage, mode):
    """-> what came of each step, until one fails."""
    torch.manual_seed(0)
    alone = LlavaMini(CONFIG)
    optimizer = torch.optim.AdamW(alone.parameters(), **ADAMW)
    engine = initialize(copy.deepcopy(alone), stage, **ADAMW)
    cells = []
    for step in STEPS:
        batches = make_batches(step)
        train.training_step(alone, batches)
        optimizer.step()
        optimizer.zero_grad()

        mine, before = batches[dist.get_rank() :: 2], weights(engine.module)
        try:
            if mode != "naive":
                before_step(engine, mine)
            train.training_step(engine, mine, world_size=2)
            if mode == "flag only":
                engine.image_anywhere = None
            engine.step()
        except RuntimeError as error:
            return [*cells, mismatch(error)]
        after, expected = weights(engine.module), dict(alone.named_parameters())
        # Key biases are left out: their gradient is rounding, of which AdamW makes a whole step.
        names = [name for name in after if not name.endswith("qkv.bias")]
        worst = max((after[name] - expected[name]).abs().max() for name in names)
        same = [torch.equal(before[name], after[name]) for name in after if "decoder" not in name]
        cells.append(f"{worst:.0e}" + " moved" * (not all(same)))
    return cells


def main():
    dist.set_debug_level(dist.DebugLevel.DETAIL)  # an error where calls differ, not a hang
    dist.init_process_group("gloo", timeout=timedelta(seconds=600))
    for stage in (1, 2, 3):
        columns = [[mode, *run(stage, mode)] for mode in ("naive", "flag only", "recipe")]
        print_table([f"ZeRO-{stage}: rank 0, rank 1", *STEPS], *columns)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
