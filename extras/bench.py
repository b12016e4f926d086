"""
What does the skip buy? Step times, side by side, with the same weights and the same batches.

    ours          LlavaMini
    discard       encodes every slot and drops the features of the empty ones, as XTuner does
                  (xtuner/model/internvl.py) and as LLaVA does with an empty slice (llava_arch.py)
    floor         the bare parts: ViT and projector on the images, GPT on embeddings, nothing else
    transformers  its LlavaForConditionalGeneration, given pixels of the real images only

$ python extras/bench.py                   # 16 rows of 128 tokens, ViT and GPT 6 x 384
$ python extras/bench.py --large           # SigLIP-base and GPT-2 sizes
$ python extras/bench.py --plot bench.png
$ python extras/bench.py --flops           # counts operations instead: the same on any machine

A step is forward and backward, without an optimizer; in bfloat16 on a GPU. The variants take turns.
Times are medians, and ratios are medians of the ratios within a turn, so that a machine that is
slow for a while slows both sides. Memory is the peak of a step above the weights.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from itertools import accumulate
from pathlib import Path
from statistics import median

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import data
from llava_mini import Config, LlavaMini

SHARES = [0, 25, 50, 75, 100]  # text-only rows of a batch, in %
ROWS, TOKENS, SUPERVISED = 16, 128, 40
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Discard(LlavaMini):
    def embed(self, input_ids, pixel_values):
        words = self.decoder.wte(input_ids)
        is_image = input_ids == self.config.image_token_id
        real = self.real_slots(pixel_values).flatten()
        patches = self.projector(self.vision(pixel_values.flatten(0, 1)))  # all slots
        words[is_image] = patches[real].flatten(0, 1).to(words.dtype)  # of none, an empty slice
        return words


class Floor(LlavaMini):
    """Told where the images are: `real` slots and `places` of their tokens, as indices."""

    def embed(self, input_ids, pixel_values):
        words = self.decoder.wte(input_ids)
        if len(self.real) == 0:
            return words
        patches = self.projector(self.vision(pixel_values.flatten(0, 1)[self.real]))
        rows = words.flatten(0, 1).index_copy(0, self.places, patches.flatten(0, 1).to(words.dtype))
        return rows.view_as(words)


def sizes(args):
    vision = {"image_size": 112, "patch_size": 16, "width": 384, "depth": 6, "heads": 6}
    if args.large:
        vision = {"image_size": 224, "patch_size": 32, "width": 768, "depth": 12, "heads": 12}
    vocab = 50304 if args.large else 8192
    same = {f"vision_{name}": vision[name] for name in ("width", "depth", "heads")}
    return Config(vocab, image_token_id=vocab - 1, block_size=256, **vision, **same)


def make_batch(config, share):
    """The last rows are text: their slot is zero, and they hold no image token."""
    n_images = ROWS - ROWS * share // 100
    input_ids = torch.randint(config.image_token_id, (ROWS, TOKENS))
    input_ids[:n_images, 1 : 1 + config.image_tokens] = config.image_token_id
    labels = torch.full_like(input_ids, data.IGNORE_INDEX)
    labels[:, -SUPERVISED:] = input_ids[:, -SUPERVISED:]
    size = config.image_size
    pixel_values = torch.zeros(ROWS, 1, 3, size, size)
    pixel_values[:n_images] = torch.randn(n_images, 1, 3, size, size)
    batch = {"input_ids": input_ids, "pixel_values": pixel_values, "labels": labels}
    return {name: tensor.to(DEVICE) for name, tensor in batch.items()}


def in_transformers(model):
    """-> the same weights in transformers"""
    from transformers import LlavaForConditionalGeneration

    export = [sys.executable, str(ROOT / "extras" / "to_transformers.py")]
    with tempfile.TemporaryDirectory() as folder:
        model.save(folder)
        data.train_tokenizer([]).save(f"{folder}/tokenizer.json")
        folders = [folder, f"{folder}/hf"]
        subprocess.run(export + folders, check=True, stdout=subprocess.DEVNULL)
        return LlavaForConditionalGeneration.from_pretrained(folders[1]).eval().to(DEVICE)


def loss_of(name, model, batch):
    """The mean loss of a batch, so that all variants compute the same number."""
    if name == "transformers":
        real = batch["pixel_values"].flatten(1).any(dim=1)
        pixels = batch["pixel_values"][real, 0] if real.any() else None
        return model(input_ids=batch["input_ids"], pixel_values=pixels, labels=batch["labels"]).loss
    _, loss_sum = model(**batch)
    return loss_sum / (ROWS * SUPERVISED)


def step(name, model, batch):
    """-> (seconds of forward and backward, loss)"""
    model.zero_grad(set_to_none=True)
    began = time.perf_counter()
    with torch.autocast(DEVICE, torch.bfloat16, enabled=DEVICE == "cuda"):
        loss = loss_of(name, model, batch)
    loss.backward()
    loss = loss.item()  # waits for a GPU
    return time.perf_counter() - began, loss


def peak_memory(name, model, batch):
    """-> MiB that a step needs at most, above the weights"""
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


def measure_steps(models, config, turns):
    """-> ({share: {name: [seconds of each turn]}}, the same with MiB). ValueError: other losses."""
    table, memory = {}, {}
    for share in SHARES:
        batch = make_batch(config, share)
        models["floor"].real = batch["pixel_values"].flatten(1).any(dim=1).nonzero()[:, 0]
        is_image = (batch["input_ids"] == config.image_token_id).flatten()
        models["floor"].places = is_image.nonzero()[:, 0]
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
    return table, memory


@torch.no_grad()
def measure_decoding(models, config, new=64):
    """-> {name: tokens a second}, greedy, one row with an image. The caches of both are theirs."""
    batch = make_batch(config, 0)
    ids, pixels = batch["input_ids"][:1, :64], batch["pixel_values"][:1]
    speeds = {}
    for name in ("ours", "transformers"):
        model = models[name]
        for _ in range(3):  # the best of three
            began = time.perf_counter()
            if name == "ours":
                model.generate(ids, pixels, new)
            else:
                options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
                model.generate(input_ids=ids, pixel_values=pixels[0], **options)
            speeds[name] = max(speeds.get(name, 0), new / (time.perf_counter() - began))
    return speeds


def print_flops(config):
    """Multiplications and additions of a forward pass; a backward pass takes twice as many."""
    with torch.device("meta"):  # shapes without numbers: nothing is computed
        model = LlavaMini(config)
        image = torch.zeros(1, 3, config.image_size, config.image_size)
        words = torch.zeros(ROWS, TOKENS, config.width)
        with FlopCounterMode(display=False) as of_image:
            model.encode_images(image)
        with FlopCounterMode(display=False) as of_words:
            model.decoder.head(model.decoder(words)[:, -SUPERVISED:])
    per_image, text = of_image.get_total_flops() / 1e9, of_words.get_total_flops() / 1e9
    print("| text-only rows | ours, GFLOP | discard, GFLOP | discard / ours |")
    print("|---|---:|---:|---:|")
    for share in SHARES:
        ours = text + (ROWS - ROWS * share // 100) * per_image
        discard = text + ROWS * per_image
        print(f"| {share} % | {ours:.1f} | {discard:.1f} | {discard / ours:.2f} |")


def ratio(times, upper, lower):
    return median(a / b for a, b in zip(times[upper], times[lower]))


def print_tables(table, memory, speeds):
    names = list(table[0])
    print("| text-only rows | " + " | ".join(f"{share} %" for share in table) + " |")
    print("|---|" + "---:|" * len(table))
    for name in names:
        cells = [f"{1000 * median(times[name]):.0f}" for times in table.values()]
        print(f"| {name}, ms | " + " | ".join(cells) + " |")
    for name in names[1:]:
        pair = ("ours", "floor") if name == "floor" else (name, "ours")
        cells = [f"{ratio(times, *pair):.2f}" for times in table.values()]
        print(f"| {pair[0]} / {pair[1]} | " + " | ".join(cells) + " |")
    for name in names:
        cells = [f"{peaks[name]:.0f}" for peaks in memory.values()]
        print(f"| {name}, MiB | " + " | ".join(cells) + " |")
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
    parser.add_argument("--turns", type=int, default=3, help="measurements of each variant")
    parser.add_argument("--flops", action="store_true", help="count operations, measure nothing")
    parser.add_argument("--plot", help="draw the step times into this file")
    args = parser.parse_args()

    torch.manual_seed(0)
    config = sizes(args)
    if args.flops:
        return print_flops(config)
    models = {"ours": LlavaMini(config), "discard": Discard(config), "floor": Floor(config)}
    for model in models.values():
        model.load_state_dict(models["ours"].state_dict())
        model.to(DEVICE)
    models["transformers"] = in_transformers(models["ours"])
    table, memory = measure_steps(models, config, args.turns)
    print_tables(table, memory, measure_decoding(models, config))
    if args.plot:
        plot(table, args.plot)


if __name__ == "__main__":
    main()
