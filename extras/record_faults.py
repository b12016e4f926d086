"""
What can be wrong with one record. Every message is "kind of fault: details".
docs/data.md tells what each of them means; check_data.py asks here for all records of a file.
"""

import os
import unicodedata

import data

UNREAD = ("system", "images", "video", "videos", "audio", "audios", "tools")
UNREAD += ("weight", "loss", "train")  # these stand beside the words of a turn
EQUAL_KEYS = "\0equal keys"  # where note_equal_keys puts them
IMAGE_KEYS = ("image", "image_path", "image_url", "img")  # where we do not look for an image


def note_equal_keys(pairs):
    """What json.loads makes of an object; by itself it would keep the last of equal keys."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        found[EQUAL_KEYS] = sorted({key for key in keys if keys.count(key) > 1})
    return found


def check_record(record):
    """Raises ValueError for what is no conversation as LLaVA has them."""
    try:
        turns = [(turn["from"], turn["value"]) for turn in record["conversations"]]
        "".join(text for _, text in turns).encode()  # JSON can hold half of a surrogate pair
    except (TypeError, KeyError, ValueError) as error:
        needed = "'conversations' must list turns, each with 'from' and a text as 'value'"
        why = f"{type(error).__name__} {str(error)[:80]}"
        raise ValueError(f"no conversation: {needed} ({why})") from error

    for part in (record, *record["conversations"]):
        if EQUAL_KEYS in part:
            keys = str(part[EQUAL_KEYS])[:80]
            raise ValueError(f"equal keys: {keys} stand twice in one object, which one counts?")

    roles = [role for role, _ in turns]
    talk = roles[1:] if roles[:1] == ["system"] else roles
    if not talk or talk != (["human", "gpt"] * len(talk))[: len(talk)]:
        raise ValueError(f"wrong turns: {str(roles)[:80]}, needs human and gpt by turns")
    if any(role == "gpt" and not text.strip() for role, text in turns):
        raise ValueError("empty answer: a turn of gpt has no words, fill it or leave it out")

    markers = sum(text.count(data.IMAGE_TOKEN) for role, text in turns if role == "human")
    images, keys = len(data.images_of(record)), str(list(record))[:80]
    if markers != images:
        counts = f"{markers} {data.IMAGE_TOKEN} in human turns, {images} under 'image'"
        typed = "; one that is text is written <image >" if markers > images else ""
        raise ValueError(f"markers: {counts}, the record has the keys {keys}{typed}")
    for part in (record, *record["conversations"]):
        image_is_read = part is record and images > 0
        for key in UNREAD if image_is_read else UNREAD + IMAGE_KEYS:
            value = part.get(key)
            if value not in (None, "", [], {}) and value == value:  # NaN: pandas' nothing
                raise ValueError(f"unread key: '{key}' changes the meaning, convert or remove it")


def find_images(record, folder):
    """-> whole paths of the images of a record to train on. Raises ValueError."""
    check_record(record)
    if record["conversations"][-1]["from"] != "gpt":
        raise ValueError("no answer: the last turn is of human, and nothing follows to learn")
    folder = os.path.join(os.path.abspath(folder), "")
    names = [str(name) for name in data.images_of(record)]
    paths = [os.path.abspath(os.path.join(folder, name)) for name in names]
    for name, path in zip(names, paths):
        if not path.startswith(folder) or not os.path.isfile(path):
            what = f"{name[:80]!r} in the folder {folder}, see --images"
            raise ValueError(f"no such image: {what}{hint(name, folder)}")
    return paths


def hint(name, folder):
    """-> what may be wrong with the name of a file"""
    if "\\" in name:
        return "; write / for \\"
    for form in ("NFC", "NFD"):
        other = unicodedata.normalize(form, name)
        if other != name and os.path.isfile(os.path.join(folder, other)):
            return f"; there is one that looks the same, in Unicode's form {form}: write it so"
    return ""
