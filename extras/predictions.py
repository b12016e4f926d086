"""
Draw what a model answers: twelve held-out records, green where the answer is right.

$ python extras/predictions.py out        # train.py does so at its end; writes out/predictions.png
"""

import argparse
import sys
import textwrap
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).parents[1]))
from ask import answer

import data
from llava_mini import LlavaMini

WIDTH, HEIGHT = 250, 190  # pixels of a cell


def held_out_records(settings):
    """-> up to twelve records that the run evaluates on; of its training data, if it has none."""
    if not settings["data"]:
        return list(data.ToyRecords("test", 12, settings["seed"]))
    records = data.read_records(settings["val"] or settings["data"], settings["images"])
    return records[:: max(1, len(records) // 12)][:12]


def draw_cell(page, corner, record, model, tokenizer):
    turns = record["conversations"]
    first = next(i for i, turn in enumerate(turns) if turn["from"] == "gpt")
    question, reference = turns[first - 1]["value"], turns[first]["value"]
    images = data.images_of(record)[: question.count(data.IMAGE_TOKEN)]
    prompt = {"image": images, "conversations": turns[:first]}
    longest = max(128, len(tokenizer.encode(reference).ids) + 1)
    given = "".join(answer(model, tokenizer, prompt, longest))

    x, y = corner
    pen = ImageDraw.Draw(page)
    pen.font = ImageFont.load_default(14)
    for i, image in enumerate(images):
        page.paste(data.letterbox(image, 80), (x + 90 * i, y))
    if not images:
        pen.text((x, y + 30), "no image: a slot of zeros", "#777777")
    question = question.replace(data.IMAGE_TOKEN, "").strip()
    pen.text((x, y + 86), textwrap.fill(question, 30), "black")
    right = given == reference
    verdict = given if right else f"{given} (wrong: {reference})"
    colour = "#177a2f" if right else "#c02020"
    lines = textwrap.wrap(verdict, 28)[:3]  # an untrained model talks on and on
    pen.text((x, y + 122), "\n".join(lines), colour)


def main():
    parser = argparse.ArgumentParser(description="Draw twelve held-out records with answers.")
    parser.add_argument("out", type=Path, help="the folder that train.py wrote")
    out = parser.parse_args().out

    model = LlavaMini.load(out)
    tokenizer = data.load_tokenizer(out / "tokenizer.json")
    settings = torch.load(out / "resume.pt", weights_only=True, mmap=True)["settings"]
    page = Image.new("RGB", (4 * WIDTH, 3 * HEIGHT), "white")
    for i, record in enumerate(held_out_records(settings)):
        corner = (20 + i % 4 * WIDTH, 20 + i // 4 * HEIGHT)
        draw_cell(page, corner, record, model, tokenizer)
    page.save(out / "predictions.png")
    shown = settings["val"] or settings["data"] or "held-out toys"
    print(f"{out / 'predictions.png'} shows {shown}")


if __name__ == "__main__":
    main()
