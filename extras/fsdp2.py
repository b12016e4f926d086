"""
FSDP2 (torch.distributed.fsdp.fully_shard) with batches that mix pictures and text.

$ torchrun --standalone --nproc_per_node=2 extras/fsdp2.py    # on CPUs, against one process

WHY IT HANGS. FSDP2 gathers the weights of a unit when its forward begins. A rank without an image
skips the encoder, and with it a call that the others wait for.

THE RECIPE is `shard` once and `before_step` in every step. The encoder is part of the root, which
every rank gathers. One all-reduced flag says whether any rank has an image. If so, ranks without
one add zeros, and the sum is exact. If not, nobody adds any: gradients stay None, and AdamW moves
nothing. More in docs/distributed.md.
"""

import copy
import re
import sys
from datetime import timedelta
from itertools import zip_longest
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

sys.path.insert(0, str(Path(__file__).parents[1]))
import data
import train
from llava_mini import Config, LlavaMini


def shard(model, apart=()):
    """In place, before the optimizer is made. `apart`: modules that become units of their own."""
    mesh = dist.init_device_mesh(next(model.parameters()).device.type, (dist.get_world_size(),))
    for unit in (*model.decoder.blocks, *apart, model):
        fully_shard(unit, mesh=mesh)
        unit.set_force_sum_reduction_for_comms(True)  # sum, then divide: gloo knows no mean
    model.decoder.register_forward_pre_hook(start_graph)


def before_step(model, micro_batches):
    """Every rank calls it. One flag serves all micro-batches: where it is set in vain, zeros are
    added to the gradients of the others."""
    mine = any(model.real_slots(batch["pixel_values"]).any() for batch in micro_batches)
    anywhere = torch.tensor(int(mine), device=micro_batches[0]["pixel_values"].device)
    dist.all_reduce(anywhere, op=dist.ReduceOp.MAX)
    model.set_reduce_scatter_unused_params(bool(anywhere))


def start_graph(decoder, args):
    """The decoder's input (B, T, C) requires a gradient on every rank. With frozen embeddings it
    would not on ranks without an image, and FSDP2 would sum their units in another order."""
    if torch.is_grad_enabled():
        args[0].requires_grad_()


# ---- the demonstration --------------------------------------------------------------------------

# What rank 0 and rank 1 get: "10" is two rows, an image in the first; "+" adds a micro-batch.
STEPS = ["10 11", "00 00", "10 00", "00 01", "01 00 + 00 00"]
CONFIG = Config(50, image_token_id=7, block_size=40, width=32, vision_width=24)


def make_batch(images, seed):
    torch.manual_seed(seed)
    ids, pixels = torch.randint(8, 50, (2, 40)), torch.zeros(2, 1, 3, 32, 32)
    real = torch.tensor([digit == "1" for digit in images])
    ids[real, 4:20] = CONFIG.image_token_id
    pixels[real] = torch.randn(2, 1, 3, 32, 32)[real]
    labels = ids.clone()
    labels[:, : 25 + 3 * seed] = data.IGNORE_INDEX  # each batch has its own number of labels
    return {"input_ids": ids, "pixel_values": pixels, "labels": labels}


def make_batches(step):
    """-> rank 0's, rank 1's, and so on by turns"""
    return [make_batch(images, seed) for seed, images in enumerate(re.findall(r"\d+", step))]


def largest_difference(model, alone):
    """Between gradients. Infinite where one side alone has None."""
    pairs = [(p.grad, q.grad) for p, q in zip(model.parameters(), alone.parameters())]
    if any((p is None) != (q is None) for p, q in pairs):
        return float("inf")
    return max((p.full_tensor() - q).abs().max().item() for p, q in pairs if q is not None)


def mismatch(error):
    """The two calls that do not fit, in what torch says at debug level DETAIL."""
    calls = re.findall(r"OpType=_?(\w+), TensorShape=\[(\d+)\]", str(error))
    return " but ".join(map(" ".join, calls)) or str(error)


def print_table(*columns):
    """Each with its heading. The first one's length is that of the table."""
    if dist.get_rank() == 0:
        for row in zip_longest(*columns, fillvalue="-"):
            print(*row, sep=" | ")


def run(frozen=False, encoder_apart=False):
    """-> what came of each step, until one fails. AdamW steps both models, sharded and alone."""
    torch.manual_seed(0)
    alone = LlavaMini(CONFIG)
    for embedding in (alone.decoder.wte, alone.decoder.wpe):
        embedding.requires_grad_(not frozen)
    model = copy.deepcopy(alone)
    shard(model, apart=[model.vision] if encoder_apart else [])
    optimizer = torch.optim.AdamW([*model.parameters(), *alone.parameters()], lr=0.01)

    cells = []
    for step in STEPS:
        batches = make_batches(step)
        train.training_step(alone, batches)
        mine = batches[dist.get_rank() :: 2]
        try:
            before_step(model, mine)
            train.training_step(model, mine, world_size=2)
            none = " None" if model.vision.pos_embed.grad is None else ""
            cells.append(f"{largest_difference(model, alone):.0e}{none}")
        except RuntimeError as error:
            return cells + [mismatch(error)]
        optimizer.step()
        optimizer.zero_grad()
    return cells


def main():
    if torch.__version__ < (2, 13):
        sys.exit(f"fsdp2.py: before_step needs torch 2.13 or newer, this is {torch.__version__}")
    dist.set_debug_level(dist.DebugLevel.DETAIL)  # an error where calls differ, not a hang
    dist.init_process_group("gloo", timeout=timedelta(seconds=600))
    recipe = ["recipe", *run()]
    frozen = ["frozen embeddings", *run(frozen=True)]
    apart = ["encoder wrapped apart", *run(encoder_apart=True)]
    if dist.get_rank() == 0:
        print("Largest difference of a gradient from one process; None: the encoder has none\n")
    print_table(["rank 0, rank 1", *STEPS], recipe, frozen, apart)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
