"""
FSDP2 (torch.distributed.fsdp.fully_shard) with batches that mix pictures and text.

$ torchrun --standalone --nproc_per_node=2 extras/fsdp2.py    # on CPUs, against one process

WHY IT HANGS. FSDP2 gathers the weights of a unit when its forward begins, and sums its gradients
when its backward ends. All ranks must make the same calls in the same order. A rank without an
image skips the encoder, and with it a call that the others wait for.

WHY THE USUAL CURES ARE WRONG. A dummy image keeps the ranks in step, and so does always adding
zeros for unused weights. But where no rank has an image, the gradients are then zero instead of
None, and AdamW moves the vision weights: by weight decay, and by the momentum of old steps.

THE RECIPE. The encoder is no unit of its own but a part of the root, which every rank gathers.
One all-reduced flag a step says whether any rank has an image. If so, ranks without one add zeros,
and the sum is exact. If not, nobody adds any, and the gradients stay None. The price: all
weights of the encoder are gathered while a step runs. More in docs/distributed.md.
"""

import copy
import re
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed import fsdp
from torch.distributed.device_mesh import init_device_mesh

sys.path.insert(0, str(Path(__file__).parents[1]))
import data
import train
from llava_mini import Config, LlavaMini

# ---- the recipe: shard(model) once; then before_step and train.training_step, in every step ------


def shard(model, apart=()):
    """In place, before the optimizer is made. `apart`: modules that become units of their own."""
    mesh = init_device_mesh(next(model.parameters()).device.type, (dist.get_world_size(),))
    for unit in (*model.decoder.blocks, *apart, model):
        fsdp.fully_shard(unit, mesh=mesh)
        unit.set_force_sum_reduction_for_comms(True)  # sum, then divide: gloo knows no mean
    model.register_forward_pre_hook(exchange_once)
    model.decoder.register_forward_pre_hook(start_graph)


def before_step(model, micro_batches):
    """One flag for all micro-batches: what the first one leaves is summed after the last."""
    mine = any(model.real_slots(batch["pixel_values"]).any() for batch in micro_batches)
    anywhere = torch.tensor(int(mine), device=micro_batches[0]["pixel_values"].device)
    dist.all_reduce(anywhere, op=dist.ReduceOp.MAX)
    model.set_reduce_scatter_unused_params(bool(anywhere))


def exchange_once(model, _):
    """Gradients are exchanged in the last micro-batch: hear training_step's switch for DDP."""
    model.set_requires_gradient_sync(getattr(model, "require_backward_grad_sync", True))


def start_graph(decoder, args):
    """The decoder's input (B, T, C) requires a gradient, on every rank.

    With frozen embeddings it would do so only on ranks with an image. FSDP2 sums the gradients of
    the first block when backward reaches its input, but else at the end, after those of the root:
    the ranks would make the same calls in another order.
    """
    if torch.is_grad_enabled():
        args[0].requires_grad_()


# ---- the demonstration --------------------------------------------------------------------------

# A step is what rank 0 and rank 1 get: "10" is two rows, an image in the first; "+" accumulates.
STEPS = ["10 11", "00 00", "10 00", "00 01", "01+00 00+00"]
CONFIG = Config(50, image_token_id=7, block_size=40, width=32, vision_width=24)


def make_batch(images, seed):
    torch.manual_seed(seed)
    ids, pixels = torch.randint(8, 50, (2, 40)), torch.zeros(2, 1, 3, 32, 32)
    for row in range(2):
        if images[row] == "1":
            ids[row, 4:20] = CONFIG.image_token_id
            pixels[row].normal_()
    unsupervised = torch.arange(40) < 25 + 3 * seed  # so each batch has its own number of labels
    labels = ids.masked_fill(unsupervised, data.IGNORE_INDEX)
    return {"input_ids": ids, "pixel_values": pixels, "labels": labels}


def largest_difference(model, alone):
    """Between gradients. Infinite where one side alone has None."""
    pairs = [(p.grad, q.grad) for p, q in zip(model.parameters(), alone.parameters())]
    if any((p is None) != (q is None) for p, q in pairs):
        return float("inf")
    return max((p.full_tensor() - q).abs().max().item() for p, q in pairs if q is not None)


def run(frozen=False, encoder_apart=False):
    """-> what came of each step, until one fails. AdamW steps both models, sharded and alone."""
    torch.manual_seed(0)
    alone = LlavaMini(CONFIG)
    for embedding in (alone.decoder.wte, alone.decoder.wpe):
        embedding.requires_grad_(not frozen)
    model = copy.deepcopy(alone)
    shard(model, apart=[model.vision] if encoder_apart else [])
    optimizers = [torch.optim.AdamW(m.parameters(), 1e-2, weight_decay=0.1) for m in (model, alone)]

    cells = []
    for step in STEPS:
        batches = [make_batch(images, seed) for seed, images in enumerate(re.split("[ +]", step))]
        train.training_step(alone, batches)
        half = len(batches) // 2
        mine = batches[:half] if dist.get_rank() == 0 else batches[half:]
        try:
            if not encoder_apart:
                before_step(model, mine)
            train.training_step(model, mine, dist.get_world_size())
            none = model.vision.pos_embed.grad is None
            cells.append(f"{largest_difference(model, alone):.0e}{' None' if none else ''}")
        except RuntimeError as error:
            calls = re.findall(r"OpType=_(\w+), TensorShape=\[(\d+)\]", str(error))
            return cells + [" but ".join(map(" ".join, calls)) or str(error)]
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return cells


def main():
    if torch.__version__ < (2, 13):
        sys.exit(f"fsdp2.py: before_step needs torch 2.13 or newer, this is {torch.__version__}")
    dist.set_debug_level(dist.DebugLevel.DETAIL)  # an error where calls differ, not a hang
    dist.init_process_group("gloo", timeout=timedelta(seconds=600))
    columns = [run(), run(frozen=True), run(encoder_apart=True)]
    if dist.get_rank() == 0:
        print("Largest difference of a gradient from one process; None: the encoder has none\n")
        print("rank 0, rank 1 | recipe | frozen embeddings | encoder wrapped apart")
        for i, step in enumerate(STEPS):
            print(step, *[cells[i] if i < len(cells) else "-" for cells in columns], sep=" | ")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
