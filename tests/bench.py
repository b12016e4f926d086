"""What does the skip buy? `python tests/bench.py` measures LLaVA mini beside the alternatives, in minutes.

    (a) ours          LlavaMini
    (b) encode all    what LLaVA and XTuner do: encode the placeholders too, then throw their features away
    (c) floor         the work that nobody can avoid: bare GPT on the same tokens, bare ViT and projector on the images
    (d) transformers  its LlavaForConditionalGeneration with the same weights, given no pixels where there is no image

A step is forward and backward, without optimiser. All get the same tokens and labels, and their losses are compared.
Repetitions are interleaved and shuffled; times are medians, ratios are medians of the ratios within a repetition.
"""

import argparse
import math
import os
import random
import sys
import tempfile
import time
from functools import partial
from itertools import accumulate, islice, product
from operator import truediv
from pathlib import Path
from statistics import median

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else the profiler logs each use
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
from PIL import Image, ImageDraw, ImageFont  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

import data  # noqa: E402
from llava_mini import GPTConfig, LlavaMini, LlavaMiniConfig, ViTConfig  # noqa: E402

try:
    import transformers
except ImportError:
    transformers = None

CUDA = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if CUDA else ("cpu", torch.float32)
SIZES = {
    "default": (ViTConfig(112, 16, 384, 6, 6), GPTConfig(8192, 256, 384, 6, 6)),
    "large": (ViTConfig(224, 32, 768, 12, 12), GPTConfig(50304, 1024, 768, 12, 12)),
    "quick": (ViTConfig(16, 8, 32, 2, 2), GPTConfig(512, 256, 32, 2, 2)),
}
TOKENS, SUPERVISED = 128, 40  # of a row; the last 40 are an answer
NEW = 128  # tokens to generate
SHARES = (0, 25, 50, 75, 100)  # % of the samples that are text-only
A, B, C, D = "(a) ours", "(b) encode all", "(c) floor", "(d) transformers"
COLOURS = {D: "#8a5a00", B: "#c02020", C: "#b0b0b0", A: "#1f5fb0"}


class EncodeAll(LlavaMini):
    """Encode every slot, then keep the features of the real ones: nothing is skipped, forward or backward."""

    def embed(self, input_ids, pixel_values):
        patches = self.projector(self.vision(pixel_values.flatten(0, 1)))  # (B x M, P, C)
        patches, x = patches[self.real_slots(input_ids, pixel_values)], self.decoder.wte(input_ids)
        return x.masked_scatter((input_ids == self.config.image_token_id).unsqueeze(-1), patches.to(x.dtype))


def build(vision, text):
    """-> {name: model} with the same random weights, none of them zero as some are before training."""
    config = LlavaMiniConfig(vision, text, image_token_id=text.vocab_size - 1)
    models = {A: LlavaMini(config), B: EncodeAll(config)}
    with torch.no_grad():
        for p in models[A].parameters():
            p += 0.02 * torch.randn_like(p)
    models[B].load_state_dict(models[A].state_dict())
    if transformers:
        transformers.utils.logging.disable_progress_bar()
        with tempfile.TemporaryDirectory() as folder:
            models[A].save_pretrained(folder, data.train_tokenizer([]))
            theirs = transformers.LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
        theirs.generation_config.eos_token_id = None  # generate to the full length
        models[D] = theirs.eval()  # without dropout, as ours
    return {name: model.to(DEVICE) for name, model in models.items()}


def make_batch(config, rows, tokens, n_text):
    """-> ids (B, T), labels (B, T), slots (B, 1, 3, H, W), the last n_text of them zero."""
    ids = torch.randint(config.image_token_id, (rows, tokens))
    ids[: rows - n_text, 1 : 1 + config.vision.n_patches] = config.image_token_id
    labels = torch.full_like(ids, data.IGNORE_INDEX)
    labels[:, -SUPERVISED:] = ids[:, -SUPERVISED:]
    slots = torch.zeros(rows, 1, 3, config.vision.image_size, config.vision.image_size)
    slots[: rows - n_text].normal_()
    return ids.to(DEVICE), labels.to(DEVICE), slots.to(DEVICE)


def make_passes(models, ids, labels, slots):
    """-> {name: (forward pass that ends in a scalar, *its inputs)}."""
    ours, images = models[A], slots[slots.flatten(2).any(2)]  # (n, 3, H, W)
    real = (images,) if len(images) else ()

    def floor(ids, labels, *real):
        patches = [ours.projector(ours.vision(images)).float().sum() for images in real]
        return sum(patches, ours.decoder(ours.decoder.wte(ids), labels)[1])

    return {
        A: (lambda ids, labels, slots: ours(ids, slots, labels)[1], ids, labels, slots),
        B: (lambda ids, labels, slots: models[B](ids, slots, labels)[1], ids, labels, slots),
        C: (floor, ids, labels, *real),
        D: (lambda ids, labels, *real: models[D](ids, *real, labels=labels).loss, ids, labels, *real),
    }


def step(forward, *inputs, half=CUDA):
    with torch.autocast(DEVICE, torch.bfloat16, enabled=half):
        loss = forward(*inputs)
    loss.backward()
    return loss.detach()


def seconds(run, *inputs):
    if not CUDA:
        start = time.perf_counter()
        run(*inputs)
        return time.perf_counter() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run(*inputs)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def memory(run, forward, *inputs):
    """-> (MiB that a step holds at most: its batch, activations and gradients, but no weights; its loss)."""
    if CUDA:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        loss = run(forward, *(tensor.clone() for tensor in inputs)).item()
        return (torch.cuda.max_memory_allocated() - before) / 2**20, loss
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        loss = run(forward, *(tensor.clone() for tensor in inputs)).item()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(accumulate(event.nbytes() for event in events)) / 2**20, loss  # freed bytes are negative


def gflop(run, *inputs):
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # it can't see into the fused kernel
        run(*inputs)
    return counter.get_total_flops() / 1e9


def bench_steps(models, rows, repeats):
    """-> (table as {share: {row: cell}}, {name: [median milliseconds for each share]})."""
    batches = {share: make_batch(models[A].config, rows, TOKENS, rows * share // 100) for share in SHARES}
    passes = {share: make_passes(models, *batches[share]) for share in SHARES}
    names = [name for name in (A, B, C, D) if name == C or name in models]

    def measure(tool, share, name):
        for model in models.values():
            model.zero_grad()  # to None
        return tool(step, *passes[share][name])

    counts, memories = {}, {}
    for share in SHARES:  # the warm-up; (b) does the same work everywhere, and (c) without images is the bare GPT
        last = share == 100
        counts[share] = {name: measure(gflop, share, name) for name in ([A, B] if last else [A])}
        memories[share] = {name: measure(memory, share, name) for name in (names if last else models)}
    for share, name in product(SHARES, models):
        if abs(memories[share][name][1] - memories[share][A][1]) > (0.05 if CUDA else 1e-3):
            raise ValueError(f"this compares unlike things, their losses differ: {memories[share]}")
    times = {share: {name: [] for name in names} for share in SHARES}
    side, peak = 8192 if CUDA else 2048, 0  # of a matrix product, in GFLOP/s
    matrix = torch.randn(side, side, device=DEVICE, dtype=DTYPE)
    for _ in range(repeats):
        for share in SHARES:
            peak = max(peak, 2 * side**3 / 1e9 / seconds(torch.mm, matrix, matrix))
            for name in random.sample(names, len(names)):  # who runs after whom matters: memory is warm or not
                times[share][name].append(1000 * measure(seconds, share, name))

    def column(share):
        cells = {f"{name}, ms": f"{median(times[share][name]):.4g}" for name in names}
        for name, other in ((A, C), (B, A), (D, A))[: len(models)]:
            ratios = sorted(map(truediv, times[share][name], times[share][other]))
            cells[f"{name[:3]} / {other[:3]}"] = f"{median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        rate = 1000 * counts[share][A] / median(times[share][A])
        cells |= {f"{name}, counted GFLOP": f"{count:.4g}" for name, count in counts[share].items()}
        cells[f"{A}, GFLOP/s"] = f"{rate:.4g}"
        cells[f"... of {peak:.4g} in matrix products"] = f"{rate / peak:.0%}"
        cells |= {f"{name}, peak MiB": f"{mib:.5g}" for name, (mib, _) in memories[share].items()}
        zeros = sum(slot.nbytes for slot in batches[share][2] if not slot.any())
        return cells | {"zero slots in the batch, MiB": f"{zeros / 2**20:.5g}"}

    print(f"Steps, {repeats} repetitions, by share of text-only samples:")
    medians = {name: [median(times[share][name]) for share in SHARES] for name in names}
    return {f"{share} %": column(share) for share in SHARES}, medians


def bench_generation(models, repeats):
    """-> table as {name: {row: cell}}: greedy decoding of one row that begins with an image."""
    ids, _, slots = make_batch(models[A].config, 1, TOKENS // 2, 0)
    slots, models = slots.to(DTYPE), {name: model.to(DTYPE) for name, model in models.items()}
    runs = {A: lambda new: models[A].generate(ids, slots, new)}
    if D in models:
        inputs = {"attention_mask": torch.ones_like(ids), "pixel_values": slots[0], "do_sample": False}
        runs[D] = lambda new: models[D].generate(ids, **inputs, max_new_tokens=new)
    answers = {name: run(NEW) for name, run in runs.items()}
    times = {pair: [] for pair in product(runs, (1, NEW))}
    matrix, bandwidth = torch.randn(8192, 8192, device=DEVICE, dtype=DTYPE), 0  # larger than any cache
    for _ in range(repeats):
        for name, new in times:
            bandwidth = max(bandwidth, matrix.nbytes / seconds(torch.sum, matrix))  # what reading alone can reach
            times[name, new].append(seconds(runs[name], new))
    weights = sum(p.nbytes for name, p in models[A].decoder.named_parameters() if name != "wpe.weight")
    bound = bandwidth / weights
    print(f"{NEW} new tokens after {ids.shape[1]} with an image, one row. At most {bound:.4g} tokens/s can follow the")
    print(f"first: {weights / 1e6:.4g} MB of decoder weights are read for each, at {bandwidth / 1e9:.3g} GB/s.")

    def column(name):
        whole, first = median(times[name, NEW]), median(times[name, 1])
        rate = (NEW - 1) / (whole - first)
        same = "yes" if torch.equal(answers[name], answers[A]) else "no"
        cells = {
            "tokens/s": f"{NEW / whole:.4g}",
            "after the first": f"{rate:.4g}",
            "of the bound": f"{rate / bound:.0%}",
        }
        return cells | {"same tokens as (a)": same}

    return {name: column(name) for name in runs}


def bench_modes(repeats):
    """-> table as {size: {row: cell}}: a step in bfloat16, and with encoder and decoder compiled apart.

    The number of images changes from batch to batch: what is compiled must not be compiled anew for each.
    """
    sizes = {
        "train.py's, 32 x 96 tokens": (ViTConfig(), GPTConfig(512), 32, 96),
        "default, 16 x 128 tokens": (*SIZES["default"], 16, TOKENS),
    }

    def column(vision, text, rows, tokens):
        config = LlavaMiniConfig(vision, text, image_token_id=text.vocab_size - 1)
        eager, compiled = LlavaMini(config).to(DEVICE), LlavaMini(config).to(DEVICE)
        compiled.vision.compile(dynamic=True)
        compiled.decoder.compile(dynamic=True)
        modes = {"float32": (eager, False), "bfloat16": (eager, True), "float32, compiled": (compiled, False)}
        batches = [make_batch(config, rows, tokens, n_text) for n_text in range(0, rows + 1, rows // 8)]

        def measure(mode):  # milliseconds a step, over all batches
            model, half = modes[mode]
            model.zero_grad()
            passes = [make_passes({A: model}, *batch)[A] for batch in batches]
            return 1000 / len(batches) * sum(seconds(partial(step, half=half), *inputs) for inputs in passes)

        first = {mode: measure(mode) for mode in modes}  # compiles
        times = {mode: [] for mode in modes}
        for mode in list(modes) * repeats:
            times[mode].append(measure(mode))
        cells = {f"{mode}, ms": f"{median(times[mode]):.4g}" for mode in modes}
        return cells | {"compiling, s": f"{first['float32, compiled'] * len(batches) / 1000:.3g}"}

    return {name: column(*size) for name, size in sizes.items()}


def bench_padding(json_path, image_folder):
    """Print the share of real tokens in the batches of a LLaVA JSON file."""
    tokenizer = data.train_tokenizer(data.read_json(json_path, list))
    dataset = data.LlavaDataset(json_path, image_folder, tokenizer, 32, 8, 256)
    tokens = [record["n_tokens"] for record in dataset.records]
    print(f"{len(dataset)} records of {min(tokens)} to {max(tokens)} tokens; real tokens in batches")
    for size, lengths in product((16, 32, 64), (tokens, None)):
        steps = islice(data.batches(len(dataset), size, lengths=lengths), 4 * len(dataset) // size)
        batches = [[tokens[i] for i in step] for step in steps]
        share = sum(map(sum, batches)) / sum(size * max(batch) for batch in batches)
        print(f"of {size}, {'grouped by length' if lengths else 'in random order'}: {share:.1%}")


def markdown(columns):
    rows = [["", *columns], ["---", *("---:" for _ in columns)]]
    rows += [[row, *(cells.get(row, "") for cells in columns.values())] for row in [*columns.values()][-1]]
    return "\n" + "".join(f"| {' | '.join(row)} |\n" for row in rows)


def plot(path, medians, title):
    """Step time against text share, on a white ground of its own."""
    page = Image.new("RGB", (1600, 1000), "white")  # twice as large as saved, for smooth lines
    pen, (left, top, right, bottom) = ImageDraw.Draw(page), (130, 190, 1530, 890)
    pen.font = ImageFont.load_default(30)
    highest = max(map(max, medians.values()))
    tick = next(t * 10**power for power in range(9) for t in (1, 2, 5) if highest <= 6 * t * 10**power)
    ticks = range(0, tick * math.ceil(highest / tick) + 1, tick)

    def place(share, ms):
        return left + (right - left) * share / 100, bottom - (bottom - top) * ms / ticks[-1]

    for ms in ticks:
        pen.line([place(0, ms), place(100, ms)], "#dddddd", 2)
        pen.text((left - 14, place(0, ms)[1]), f"{ms:,}", "#444444", anchor="rm")
    for share in SHARES:
        pen.text((place(share, 0)[0], bottom + 14), f"{share} %", "#444444", anchor="ma")
    pen.text(((left + right) / 2, bottom + 56), "text-only samples in a batch", "black", anchor="ma")
    pen.text((40, 20), f"Milliseconds a step: {title}", "black")
    x = 40
    for name in filter(medians.get, COLOURS):
        width = 20 if name == C else 6
        pen.line([*map(place, SHARES, medians[name])], COLOURS[name], width, joint="curve")
        pen.line([(x, 110), (x + 50, 110)], COLOURS[name], width)
        pen.text((x + 60, 110), name, "black", anchor="lm")
        x += 120 + pen.textlength(name)
    page.resize((800, 500), Image.Resampling.LANCZOS).quantize(64).save(path, optimize=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--large", action="store_true", help="sizes of GPT-2 and CLIP-B/32")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it run?")
    parser.add_argument("--rows", type=int, default=16, help="of a batch; more where 16 don't fill the device")
    parser.add_argument("--repeats", type=int, default=4, help="repetitions to take medians of")
    parser.add_argument("--plot", metavar="FILE", help="draw step time against text share into this PNG")
    parser.add_argument("--padding", nargs=2, metavar=("JSON", "IMAGES"), help="measure the padding of this data only")
    parser.add_argument("--modes", action="store_true", help="measure bfloat16 and torch.compile only")
    args, began = parser.parse_args(), time.time()
    if args.padding:
        return bench_padding(*args.padding)
    if args.modes:
        return print(markdown(bench_modes(args.repeats)))
    vision, text = SIZES["large" if args.large else "quick" if args.quick else "default"]
    torch.manual_seed(0)
    random.seed(0)
    models = build(vision, text)
    where = torch.cuda.get_device_name() if CUDA else f"CPU with {torch.get_num_threads()} threads"
    what = f"{args.rows} x {TOKENS} tokens, {'bfloat16' if CUDA else 'float32'}, {where}"
    print(f"{vision}\n{text}\n{what}, torch {torch.__version__}, {SUPERVISED} tokens of each row supervised\n")
    table, medians = bench_steps(models, args.rows, args.repeats)
    print(markdown(table))
    print(markdown(bench_generation(models, args.repeats)))
    print(f"{time.time() - began:.0f} s")
    if args.plot:
        plot(args.plot, medians, what)


if __name__ == "__main__":
    main()
