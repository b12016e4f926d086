"""
Who turns None into zeros? How far a step of text alone moves an encoder that nobody ran.

$ python extras/none_or_zero.py                                      # optimizers
$ torchrun --standalone --nproc_per_node=2 extras/none_or_zero.py    # wrappers, too, on CPUs

Each row is a run: two steps with images, one of text alone, in which the largest move of a weight
of encoder and projector is measured, and two more. Columns: gradients of None, as `zero_grad()`
leaves them, and of zeros, `zero_grad(set_to_none=False)`. Why it is so: docs/none-or-zero.md.
"""

import inspect
import sys
from functools import partial
from pathlib import Path
from pkgutil import resolve_name

import torch
import torch.distributed as dist
from torch.distributed import fsdp, optim
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.nn.parallel import DistributedDataParallel as DDP

sys.path.insert(0, str(Path(__file__).parents[1]))
from extras import fsdp2
from llava_mini import LlavaMini, Projector, ViT

OPTIMIZERS = """
SGD Adam AdamW NAdam RAdam Adagrad RMSprop Adadelta Adamax ASGD Rprop Adafactor Muon LBFGS
transformers.optimization.Adafactor lion_pytorch.Lion bitsandbytes.optim.AdamW8bit
deepspeed.runtime.zero.muon.original_muon.SingleDeviceMuon
""".split()  # all of torch's that take dense gradients, and some that people add
ADAMW = {"lr": 0.01, "weight_decay": 0.1}
OPTIONS = {**ADAMW, "momentum": 0.9, "relative_step": False}  # for optimizers that know them
STEPS = ["11", "10", "00", "00", "01"]  # the rows of each rank; the third step is measured


def make_optimizer(name, weights):
    kind = resolve_name(name if "." in name else f"torch.optim.{name}")
    if "Muon" in name:
        weights = [weight for weight in weights if weight.ndim == 2]  # it takes no others
    known = inspect.signature(kind).parameters
    return kind(weights, **{key: value for key, value in OPTIONS.items() if key in known})


def wrappers():
    def fsdp2_always(model):
        fsdp2.shard(model)
        model.set_reduce_scatter_unused_params(True)

    def zero(model, stage, **adamw):  # as it comes, since nobody calls before_step
        return resolve_name("extras.zero:initialize")(model, stage, **adamw)

    adamw = partial(make_optimizer, "AdamW")
    sharded = partial(optim.ZeroRedundancyOptimizer, optimizer_class=torch.optim.AdamW, **ADAMW)
    unused = partial(DDP, find_unused_parameters=True)
    fsdp1 = partial(fsdp.FullyShardedDataParallel, device_id=torch.device("cpu"))
    apart = fsdp.wrap.ModuleWrapPolicy({ViT, Projector})
    forgetful = {"lr": 0.01, "weight_decay": 0, "betas": (0.0, 0.0)}  # zeros can move nothing
    return [  # name, model -> what runs it, its weights -> their optimizer
        ("DDP", DDP, adamw),
        ("DDP static_graph", partial(DDP, static_graph=True), adamw),
        ("DDP find_unused_parameters", unused, adamw),
        ("- gradient_as_bucket_view", partial(unused, gradient_as_bucket_view=True), adamw),
        ("- ZeroRedundancyOptimizer", unused, sharded),
        ("FSDP1, encoder in the root's unit", fsdp1, adamw),
        ("- use_orig_params", partial(fsdp1, use_orig_params=True), adamw),
        ("- encoder and projector apart", partial(fsdp1, auto_wrap_policy=apart), adamw),
        ("FSDP2, unused weights always summed", fsdp2_always, adamw),
        ("FSDP2, extras/fsdp2.py", fsdp2.shard, adamw),
        *((f"DeepSpeed ZeRO-{n}", partial(zero, stage=n, **ADAMW), None) for n in range(4)),
        *((f"- ZeRO-{n}, no memory", partial(zero, stage=n, **forgetful), None) for n in (2, 3)),
    ]


def vision_weights(module):
    if hasattr(module, "zero_optimization"):  # DeepSpeed's engine
        named = resolve_name("extras.zero:weights")(module.module)
    else:
        named = get_model_state_dict(module, options=StateDictOptions(full_state_dict=True))
    return torch.cat([w.flatten() for name, w in named.items() if not name.startswith("decoder.")])


def run(wrap, optimize, set_to_none):
    """-> the move in the third step; raises what the wrapper or the optimizer raises."""
    torch.manual_seed(0)
    model = LlavaMini(fsdp2.CONFIG)
    module = wrap(model) or model  # FSDP2 works in place
    optimizer = optimize(module.parameters()) if optimize else module.optimizer
    weights = []
    for seed, images in enumerate(STEPS):
        batch = fsdp2.make_batch(images, seed)
        weights.append(vision_weights(module))
        if wrap is fsdp2.shard:
            fsdp2.before_step(model, [batch])

        def gradients(batch=batch):
            optimizer.zero_grad(set_to_none=set_to_none)
            with torch.enable_grad():  # the Adafactor of transformers forgets it
                loss = module(**batch)[1] / 30
            getattr(module, "backward", torch.Tensor.backward)(loss)  # DeepSpeed's, or torch's
            return loss

        if optimize:
            optimizer.step(gradients)  # LBFGS calls it several times
        else:
            gradients()
            module.step()
    return (weights[3] - weights[2]).abs().max().item()


def main():
    rows = [(name, lambda model: model, partial(make_optimizer, name)) for name in OPTIMIZERS]
    if dist.is_torchelastic_launched():
        dist.init_process_group("gloo")
        rows += wrappers()
    rank = dist.get_rank() if dist.is_initialized() else 0
    if rank == 0:
        print("optimizer or wrapper | None | zeros")
    for name, wrap, optimize in rows:
        try:
            cells = [f"{run(wrap, optimize, none):.2g}" for none in (True, False)]
        except (RuntimeError, ImportError, AttributeError) as error:
            cells = [str(error).splitlines()[0][:63]]
        if rank == 0:
            print(name, *cells, sep=" | ", flush=True)


if __name__ == "__main__":
    main()
