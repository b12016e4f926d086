"""
Draw what a model answers: twelve records, green where the answer is right. train.py ends with it.
"""

import textwrap

from PIL import Image, ImageDraw, ImageFont

import data
from extras.ask import answer

WIDTH, HEIGHT = 250, 190  # pixels of a cell


def draw(path, model, tokenizer, records):
    """Write a picture of twelve records, from all over the list."""
    page = Image.new("RGB", (4 * WIDTH, 3 * HEIGHT), "white")
    apart = max(1, len(records) // 12)
    for i in range(min(12, len(records))):
        corner = (20 + i % 4 * WIDTH, 20 + i // 4 * HEIGHT)
        draw_cell(page, corner, records[i * apart], model, tokenizer)
    page.save(path)
    print(path)


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
