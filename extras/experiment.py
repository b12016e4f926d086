"""
Why mix in text: a model learns text, then goes on with pictures alone (and forgets), or with both.

$ python extras/experiment.py                          # three seeds; the runs it has done it keeps
$ python extras/experiment.py --plot forgetting.png

Each run is a command `python train.py ...`, which is printed. Both second stages see as many
pictures: the mixture takes twice the steps, since half of its records are text.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
SCORES = ["image_exact_match", "text_exact_match"]


def stages(steps):
    """-> {name: (name of the stage before, flags)}"""
    return {
        "text": (None, ["--text-fraction", "1", "--steps", str(steps)]),
        "then pictures": ("text", ["--text-fraction", "0", "--steps", str(steps)]),
        "then both": ("text", ["--text-fraction", "0.5", "--steps", str(2 * steps)]),
    }


def folder(args, seed, name):
    return args.out / f"{name.replace(' ', '-')}-{args.steps}-{seed}"


def run(args, seed, name):
    """Train, unless it has been done; -> the evaluations in metrics.jsonl."""
    before, flags = stages(args.steps)[name]
    out = folder(args, seed, name)
    if not (out / "predictions.png").exists():
        flags += ["--seed", str(seed), "--eval-every", str(max(1, args.steps // 2))]
        if before:
            flags += ["--init", str(folder(args, seed, before))]
        if (out / "resume.pt").exists():  # it was stopped
            flags = ["--resume"]
        flags += ["--out", str(out)]
        print("python train.py", *flags, flush=True)
        command = [sys.executable, str(ROOT / "train.py"), *flags]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    entries = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [entry for entry in entries if SCORES[0] in entry]


def print_table(curves, seeds):
    print(f"\n| exact match, %, mean of {len(seeds)} seeds (lowest to highest) | image | text |")
    print("|---|---|---|")
    for name in stages(1):
        cells = []
        for score in SCORES:
            last = [100 * curves[name, seed][-1][score] for seed in seeds]
            mean = sum(last) / len(last)
            cells.append(f"{mean:.1f} ({min(last):.1f} to {max(last):.1f})")
        print(f"| {name} | {' | '.join(cells)} |")


def plot(curves, seeds, path):
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3.6))
    colours = {"text": "#777777", "then pictures": "#c02020", "then both": "#1f5fb0"}
    for (name, seed), entries in curves.items():
        start = curves["text", seed][-1]["step"] if name != "text" else 0
        steps = [start + entry["step"] for entry in entries]
        shares = [100 * entry["text_exact_match"] for entry in entries]
        label = name if seed == seeds[0] else None
        axes.plot(steps, shares, "o-", color=colours[name], label=label)
    axes.set(xlabel="step", ylabel="text, exact match, %", ylim=(0, 102))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(description="Text first, then pictures alone or both.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=150, help="of a stage")
    parser.add_argument("--out", type=Path, default=Path("out-experiment"))
    parser.add_argument("--plot", type=Path, help="draw text accuracy over the steps")
    args = parser.parse_args()

    curves = {}
    for seed in args.seeds:
        for name in stages(args.steps):
            curves[name, seed] = run(args, seed, name)
    print_table(curves, args.seeds)
    if args.plot:
        plot(curves, args.seeds, args.plot)


if __name__ == "__main__":
    main()
