"""
What does the skip save? It counts operations, which are the same on any machine.

$ python extras/flops.py                   # 16 rows of 128 tokens, ViT and GPT 6 x 384
$ python extras/flops.py --large           # SigLIP-base and GPT-2 sizes
"""

import argparse
import sys
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[1]))
from extras.variants import ROWS, SHARES, SUPERVISED, TOKENS, LlavaMini, make_config


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
        with FlopCounterMode(display=False) as of_others:
            model.decoder.head(words[:, SUPERVISED:])  # as many as have no label
    per_image, text = of_image.get_total_flops() / 1e9, of_words.get_total_flops() / 1e9
    print("| text-only rows | ours, GFLOP | discard, GFLOP | discard / ours |")
    print("|---|---:|---:|---:|")
    for share in SHARES:
        ours = text + (ROWS - ROWS * share // 100) * per_image
        discard = text + ROWS * per_image
        print(f"| {share} % | {ours:.1f} | {discard:.1f} | {discard / ours:.2f} |")
    others = of_others.get_total_flops() / 1e9
    print(f"\nWith logits of all positions, as transformers has them: {others:.1f} GFLOP more")


def main():
    parser = argparse.ArgumentParser(description="Operations with and without the skip.")
    parser.add_argument("--large", action="store_true", help="SigLIP-base and GPT-2 sizes")
    print_flops(make_config(parser.parse_args().large))


if __name__ == "__main__":
    main()
