"""
Draw the curves of a run: training loss above, exact match on held-out records below.

$ python extras/plot.py out               # reads out/metrics.jsonl, writes out/curve.png
$ python extras/plot.py out curve.png
"""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt


def read_curves(path):
    """-> {name: {step: value}}. After a resume a step may occur twice: the later one counts."""
    curves = {}
    for line in path.read_text().splitlines():
        entry = json.loads(line)
        for name, value in entry.items():
            curves.setdefault(name, {})[entry["step"]] = value
    return curves


def draw(curves, path):
    figure, (above, below) = plt.subplots(2, figsize=(7, 4.5), sharex=True)
    losses = curves.get("loss", {})
    above.semilogy(list(losses), list(losses.values()), color="#555555")
    above.set_ylabel("training loss")
    for kind, style in (("image", "o-"), ("text", "s--")):
        scores = curves.get(f"{kind}_exact_match", {})
        shares = [100 * share for share in scores.values()]
        below.plot(list(scores), shares, style, label=f"{kind} records")
    below.set(xlabel="step", ylabel="exact match, %", ylim=(-3, 103))
    below.legend()
    for axes in (above, below):
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    print(path)


def main():
    parser = argparse.ArgumentParser(description="Draw loss and exact match of a run.")
    parser.add_argument("out", type=Path, help="the folder that train.py wrote")
    parser.add_argument("picture", nargs="?", help="where to draw, else into that folder")
    args = parser.parse_args()
    draw(read_curves(args.out / "metrics.jsonl"), args.picture or args.out / "curve.png")


if __name__ == "__main__":
    main()
