"""
Draw the curves of a run: loss and exact match against samples seen.

$ python extras/plot.py out               # writes out/curves.png from out/metrics.jsonl
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


def main():
    parser = argparse.ArgumentParser(description="Draw loss and exact match of a run.")
    parser.add_argument("out", type=Path, help="the folder that train.py wrote")
    out = parser.parse_args().out

    curves = read_curves(out / "metrics.jsonl")
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.5))
    left.semilogy(list(curves["loss"]), list(curves["loss"].values()))
    left.set_title("training loss")
    for name in ("image_exact_match", "text_exact_match"):
        if name in curves:
            shares = [100 * share for share in curves[name].values()]
            right.plot(list(curves[name]), shares, "o-", label=name.split("_")[0])
    right.set_title("exact match on held-out records, %")
    right.set_ylim(0, 102)
    right.legend()
    for axes in (left, right):
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(out / "curves.png", dpi=110)
    print(f"{out / 'curves.png'}")


if __name__ == "__main__":
    main()
