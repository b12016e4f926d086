"""To be replaced: the checks of a record, which used to stand in data.py."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from data import IMAGE_TOKEN, images_of

UNREAD = {"system", "images", "video", "videos", "audio", "tools", "weight", "loss", "train"}


def check_record(record):
    """Raises ValueError "kind of fault: details" for what is no conversation as LLaVA has them."""
    try:
        turns = [(turn["from"], turn["value"]) for turn in record["conversations"]]
        "".join(text for _, text in turns).encode()  # JSON can hold half of a surrogate pair
    except (TypeError, KeyError, ValueError) as error:
        needed = "'conversations' must list turns, each with 'from' and a text as 'value'"
        raise ValueError(f"no conversation: {needed}") from error

    roles = [role for role, _ in turns]
    talk = roles[1:] if roles[:1] == ["system"] else roles
    if not talk or talk != (["human", "gpt"] * len(talk))[: len(talk)]:
        raise ValueError(f"wrong turns: {str(roles)[:80]}, needs human and gpt by turns")
    if any(role == "gpt" and not text.strip() for role, text in turns):
        raise ValueError("empty answer: a turn of gpt has no words")

    markers = sum(text.count(IMAGE_TOKEN) for role, text in turns if role == "human")
    images, keys = len(images_of(record)), str(list(record))[:80]
    if markers != images:
        raise ValueError(f"markers: {markers} {IMAGE_TOKEN}, but {images} under 'image' ({keys})")
    for part in (record, *record["conversations"]):
        for key in UNREAD & part.keys():
            if part[key] not in (None, "", [], {}):
                raise ValueError(f"unread key: '{key}' would change the meaning, nobody reads it")


def find_images(record, folder):
    """Check a record to train on, and make its images whole paths. Raises ValueError."""
    check_record(record)
    if record["conversations"][-1]["from"] != "gpt":
        raise ValueError("no answer: the last turn is the human's")
    folder = os.path.join(os.path.abspath(folder), "")
    record["image"] = [os.path.abspath(f"{folder}{name}") for name in images_of(record)]
    for path in record["image"]:
        if not path.startswith(folder) or not os.path.isfile(path):
            raise ValueError(f"no such image: {path[:80]} in the folder {folder}")
