"""Why mix in text? Runs the README's experiment and prints its tables: `python tests/experiment.py --seeds 0 1 2`.

Forgetting: train on text alone; go on with pictures alone, or with the mixture. Transfer: the corners of a triangle are
told in text only; is a model that only ever saw pictures able to give them?
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import train  # noqa: E402

RUNS = {  # name: (run to go on from, share of text, multiple of --steps); the last three see as many pictures
    "text": (None, 1.0, 1),
    "text, then pictures": ("text", 0.0, 1),
    "text, then both": ("text", 0.5, 2),
    "pictures": (None, 0.0, 1),
}
SCORES = ("image", "text", "held_out_pairs", "transfer")


def folder(args, name, seed):
    return args.out / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}"


def run(args, name, seed):
    """Train once, unless it has been done; -> the lines of metrics.jsonl that hold scores."""
    init, text_fraction, multiple = RUNS[name]
    out, steps = folder(args, name, seed), multiple * args.steps
    if not (out / "predictions.png").exists():
        options = ["--out", out, "--seed", seed, "--steps", steps, "--text-fraction", text_fraction]
        options += ["--eval-every", max(1, args.steps // 4)]
        options += ["--init", folder(args, init, seed)] if init else []
        options += ["--resume"] if (out / "run.safetensors").exists() else []
        print("python train.py", *options, flush=True)
        subprocess.run([sys.executable, ROOT / "train.py", *map(str, options)], check=True, stdout=subprocess.DEVNULL)
    log = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    if log[-1]["step"] != steps:
        raise SystemExit(f"{out} holds a run of {log[-1]['step']} steps, not {steps}: choose another --out")
    return [entry for entry in log if "text_exact_match" in entry]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=500, help="of a stage")
    parser.add_argument("--out", type=Path, default=Path("out-experiment"))
    parser.add_argument("--plot", type=Path, help="where to draw text accuracy while training goes on")
    args = parser.parse_args()
    logs = {(name, seed): run(args, name, seed) for seed in args.seeds for name in RUNS}
    print(f"\n| exact match, %, mean of {len(args.seeds)} seeds (lowest to highest) | " + " | ".join(SCORES) + " |")
    print("|---|" + "---|" * len(SCORES))
    for name in RUNS:
        cells = []
        for score in SCORES:
            values = [100 * logs[name, seed][-1][f"{score}_exact_match"] for seed in args.seeds]
            cells.append(f"{statistics.mean(values):.1f} ({min(values):.1f} to {max(values):.1f})")
        print(f"| {name} | " + " | ".join(cells) + " |")
    if args.plot:
        page = Image.new("RGB", (640, 360), "white")
        pen = ImageDraw.Draw(page)
        pen.font = ImageFont.load_default(15)
        curves = {}
        for name in ("text, then both", "text, then pictures"):
            curves[name] = mean_curve(args, logs, name)
        train.chart(pen, (60, 70, 610, 320), "exact match on held-out text questions, %, mean of the seeds", curves)
        page.quantize(32).save(args.plot, optimize=True)


def mean_curve(args, logs, name):
    """Text accuracy over both stages: [(step, %), ...]."""
    stages = [(0, "text"), (args.steps, name)]
    points = [(0, 0.0)]
    for offset, stage in stages:
        for i, entry in enumerate(logs[stage, args.seeds[0]]):
            scores = [logs[stage, seed][i]["text_exact_match"] for seed in args.seeds]
            points.append((offset + entry["step"], 100 * statistics.mean(scores)))
    return points


if __name__ == "__main__":
    main()
