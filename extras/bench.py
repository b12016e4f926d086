"""
What does the skip buy? Step times, side by side, of the four variants in variants.py.

$ python extras/bench.py                   # 16 rows of 128 tokens, ViT and GPT 6 x 384
$ python extras/bench.py --large           # SigLIP-base and GPT-2 sizes
$ python extras/bench.py --plot bench.png

A step is forward and backward, without an optimizer; in bfloat16 on a GPU. The variants take turns.
Times are medians, and ratios are medians of the ratios within a turn, so that a machine that is
slow for a while slows both sides. On a noisy one take few rows and many turns. Times are wall time;
with OMP_NUM_THREADS=1 on a CPU they are CPU time. Memory is the peak of a step above the weights.

Rule, check and indices are all that ours does and the floor does not: milliseconds of a step of
seconds. So they are measured alone, too: `embed` with patches that cost nothing, best of many.
"""

import argparse
import math
import sys
import time
from itertools import accumulate
from pathlib import Path
from statistics import median

import torch
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).parents[1]))
from extras.variants import DEVICE, ROWS, SHARES, loss_of, make_batch, make_config, make_variants

ALONE = DEVICE == "cpu" and torch.get_num_threads() == 1
CLOCK = time.process_time if ALONE else time.perf_counter


def step(name, model, batch):
    """-> (seconds of forward and backward, loss)"""
    model.zero_grad(set_to_none=True)
    began = CLOCK()
    with torch.autocast(DEVICE, torch.bfloat16, enabled=DEVICE == "cuda"):
        loss = loss_of(name, model, batch)
    loss.backward()
    loss = loss.item()  # waits for a GPU
    return CLOCK() - began, loss


def peak_memory(name, model, batch):
    """-> MiB that a step needs at most, above the weights"""
    model.zero_grad(set_to_none=True)  # or its freeing would count as room
    if DEVICE == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step(name, model, batch)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step(name, model, batch)
    events = profiler.profiler.kineto_results.events()
    changes = [event for event in events if event.name() == "[memory]"]
    changes.sort(key=lambda event: event.start_ns())
    return max(accumulate(event.nbytes() for event in changes)) / 2**20


def embedding_time(model, batch, repeats=30):
    """-> seconds of `embed`, forward and backward, where patches are given: the best of many"""
    config = model.config
    shape = len(batch["input_ids"]), config.image_tokens, config.width
    patches = torch.randn(shape, device=DEVICE, requires_grad=True)
    model.encode_images = lambda images: patches[: len(images)]
    best = math.inf
    for _ in range(repeats):
        model.zero_grad(set_to_none=True)
        began = CLOCK()
        model.embed(batch["input_ids"], batch["pixel_values"]).sum().backward()
        model.decoder.wte.weight.grad[0, 0].item()  # waits for a GPU
        best = min(best, CLOCK() - began)
    del model.encode_images  # the method again
    return best


def measure_steps(models, config, turns, rows):
    """-> ({share: {name: [seconds of each turn]}}, {share: {name: MiB}}, {share: {name: seconds
    of `embed` alone}}). Raises ValueError where the losses differ."""
    table, memory, embedding = {}, {}, {}
    for share in SHARES:
        batch = make_batch(config, share, rows)
        models["floor"].real = batch["pixel_values"].flatten(1).any(dim=1).nonzero()[:, 0]
        is_image = (batch["input_ids"] == config.image_token_id).flatten()
        models["floor"].places = is_image.nonzero()[:, 0]
        embedding[share] = {name: embedding_time(models[name], batch) for name in ("ours", "floor")}
        times = {name: [] for name in models}
        for turn in range(turns + 1):
            losses = {}
            for name, model in models.items():
                seconds, losses[name] = step(name, model, batch)
                if turn > 0:  # the first one warms up
                    times[name].append(seconds)
            if max(losses.values()) - min(losses.values()) > 0.01:
                raise ValueError(f"the variants do not compute the same loss: {losses}")
        table[share] = times
        memory[share] = {name: peak_memory(name, models[name], batch) for name in models}
    return table, memory, embedding


@torch.no_grad()
def measure_decoding(models, config, new=64):
    """-> {name: tokens a second}, greedy, one row with an image. The caches of both are theirs."""
    batch = make_batch(config, share=0, rows=1)
    ids, pixels = batch["input_ids"][:, :64], batch["pixel_values"]
    speeds = {}
    for name in ("ours", "transformers"):
        model = models[name]
        for _ in range(3):  # the best of three
            began = CLOCK()
            if name == "ours":
                model.generate(ids, pixels, new)
            else:
                options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
                model.generate(input_ids=ids, pixel_values=pixels[0], **options)
            speeds[name] = max(speeds.get(name, 0), new / (CLOCK() - began))
    return speeds


def ratio(times, upper, lower):
    return median(a / b for a, b in zip(times[upper], times[lower]))


def print_row(name, cells):
    print(f"| {name} | " + " | ".join(cells) + " |")


def print_tables(table, memory, embedding, speeds):
    names = list(table[0])
    print_row("text-only rows", [f"{share} %" for share in table])
    print("|---|" + "---:|" * len(table))
    for name in names:
        cells = [f"{1000 * median(times[name]):.0f}" for times in table.values()]
        print_row(f"{name}, ms", cells)
    for name in names[1:]:
        pair = ("ours", "floor") if name == "floor" else (name, "ours")
        cells = [f"{ratio(times, *pair):.2f}" for times in table.values()]
        print_row(f"{pair[0]} / {pair[1]}", cells)
    extra = {share: times["ours"] - times["floor"] for share, times in embedding.items()}
    cells = [f"{1000 * seconds:.1f}" for seconds in extra.values()]
    print_row("rule, check and indices, ms", cells)
    cells = [f"{extra[share] / median(times['floor']):.3%}" for share, times in table.items()]
    print_row("of the floor's step", cells)
    for name in names:
        cells = [f"{peaks[name]:.0f}" for peaks in memory.values()]
        print_row(f"{name}, MiB", cells)
    for name, speed in speeds.items():
        print(f"\ndecoding, {name}: {speed:.0f} tokens/s")


def plot(table, path):
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3.6))
    for name in table[0]:
        medians = [1000 * median(times[name]) for times in table.values()]
        axes.plot(list(table), medians, "o-", label=name)
    axes.set(xlabel="text-only rows, %", ylabel="forward and backward, ms", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(description="Step times with and without the skip.")
    parser.add_argument("--large", action="store_true", help="SigLIP-base and GPT-2 sizes")
    parser.add_argument("--rows", type=int, default=ROWS, help="of a batch, a multiple of 4")
    parser.add_argument("--turns", type=int, default=3, help="measurements of each variant")
    parser.add_argument("--plot", help="draw the step times into this file")
    args = parser.parse_args()

    torch.manual_seed(0)
    config = make_config(args.large)
    models = make_variants(config)
    table, *others = measure_steps(models, config, args.turns, args.rows)
    print_tables(table, *others, measure_decoding(models, config))
    if args.plot:
        plot(table, args.plot)


if __name__ == "__main__":
    main()
