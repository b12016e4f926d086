"""
All that is wrong with a data set, at once: every record, every picture, every length.
docs/data.md tells what each message means.

$ python data.py --data train.json --images photos      # hands its arguments to this file
$ python data.py --data train.json --images photos --write-good good.json
$ python data.py --data train.json --images photos --init out       # for this model
"""

import argparse
import json
import os
import re
import statistics
import sys
import time
import warnings
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parents[1]))
import data
from llava_mini import Config

UNREAD = ("system", "images", "video", "videos", "audio", "audios", "tools")
UNREAD += ("weight", "loss", "train")  # these stand beside the words of a turn
SIZES = ("block_size", "image_size", "patch_size")

# GPT-2's way to cut, which ours is too, cuts before every blank that follows a word: each of these
# pieces can be encoded alone. Blanks are Unicode's: Python's \s has four control characters more.
WORD, BLANK = r"[\S\x1c-\x1f]", r"[^\S\x1c-\x1f]"
WORDS = re.compile(f"{BLANK}*{WORD}+|{BLANK}+")


# ---- one record: every message is "kind of fault: details" --------------------------------------


def check_record(record):
    """Raises ValueError for what is no conversation as LLaVA has them."""
    try:
        turns = [(turn["from"], turn["value"]) for turn in record["conversations"]]
        "".join(text for _, text in turns).encode()  # JSON can hold half of a surrogate pair
    except (TypeError, KeyError, ValueError) as error:
        needed = "'conversations' must list turns, each with 'from' and a text as 'value'"
        why = f"{type(error).__name__} {str(error)[:80]}"
        raise ValueError(f"no conversation: {needed} ({why})") from error

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
        raise ValueError(f"markers: {counts}, the record has the keys {keys}")
    for part in (record, *record["conversations"]):
        for key in UNREAD:
            if part.get(key) not in (None, "", [], {}):
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
            raise ValueError(f"no such image: {name[:80]!r} in the folder {folder}, see --images")
    return paths


# ---- many records, in several processes ---------------------------------------------------------


def attempt(function, item):
    """-> (result, None) or (None, message)"""
    try:
        return function(item), None
    except ValueError as error:
        return None, str(error)


def fault_of_picture(path):
    warnings.simplefilter("ignore")  # Pillow's, about metadata
    _, fault = attempt(data.open_image, path)
    return fault


def cuts_like_gpt2(tokenizer):
    parts = json.loads(tokenizer.to_str())
    cut = json.dumps(parts["pre_tokenizer"])
    kinds = set(re.findall(r'"type": "(\w+)"', cut))
    plain = kinds <= {"Sequence", "Digits", "ByteLevel"} and '"add_prefix_space": true' not in cut
    return plain and '"use_regex": true' in cut and parts["normalizer"] is None


class TokenCounts(dict):
    """word -> its number of tokens. It stands in for the tokenizer in data.encode."""

    def __init__(self, tokenizer):
        self.tokenizer, self.token_to_id = tokenizer, tokenizer.token_to_id
        self.by_words = cuts_like_gpt2(tokenizer)

    def __missing__(self, word):
        self.tokenizer.encode_special_tokens = True  # not part of what a process is sent
        count = len(self.tokenizer.encode(word, add_special_tokens=False).ids)
        if len(word) < 40:  # most words come again, and are looked up
            self[word] = count
        return count

    def encode(self, text, add_special_tokens):
        words = WORDS.findall(text) if self.by_words else [text]
        return SimpleNamespace(ids=[0] * sum(map(self.__getitem__, words)))


def length_of(record, counts, config):
    """-> (tokens, None), or (tokens, message) where they exceed the block"""
    endless = replace(config, block_size=sys.maxsize)
    tokens, fault = len(data.encode(record, counts, endless)[0]), None
    if tokens > config.block_size:
        _, fault = attempt(partial(data.encode, tokenizer=counts, config=config), record)
    return tokens, fault


def begin(work, items):
    global WORK, ITEMS
    WORK, ITEMS = work, items


def work_on(index):
    return WORK(ITEMS[index])


def spread(work, items, what):
    """Yield work(item) of every item, in order. All cores share the work.

    Processes get all items when they begin, which costs a fork nothing, and then indices alone.
    """
    cores, began = os.cpu_count(), time.time()
    chunk = max(1, min(500, len(items) // (4 * cores)))
    with ProcessPoolExecutor(cores, initializer=begin, initargs=(work, items)) as pool:
        results = pool.map(work_on, range(len(items)), chunksize=chunk)
        for done, result in enumerate(results, 1):
            if done % chunk == 0 or done == len(items):
                left = (time.time() - began) / done * (len(items) - done)
                line = f"\r{done:,} of {len(items):,} {what}, {left:.0f} s left  "
                end = "\n" if done == len(items) else ""
                print(line, end=end, file=sys.stderr, flush=True)
            yield result


# ---- the whole file -----------------------------------------------------------------------------


def load_tokenizer(args, records):
    """-> (tokenizer, config): those of a model's folder, or new ones as in train.py"""
    sizes = {name: getattr(args, name) for name in SIZES if getattr(args, name)}
    if args.init:
        try:
            config = Config(**json.loads((args.init / "config.json").read_text()))
        except TypeError as error:
            raise ValueError(f"{args.init}/config.json is not of LLaVA mini: {error}") from error
        if replace(config, **sizes) != config:
            raise ValueError("--init brings its model's sizes, leave out those for a new one")
        return data.load_tokenizer(args.init / "tokenizer.json"), config
    tokenizer = data.train_tokenizer(records)
    image_token_id = tokenizer.token_to_id(data.IMAGE_TOKEN)
    return tokenizer, Config(tokenizer.get_vocab_size(), image_token_id, **sizes)


def check(records, args, learn_from=None):
    """-> ({index: image paths}, {index: message}, {index: tokens}, block size)

    A new tokenizer is learned from the good records, as in train.py, or from others.
    """
    find = partial(attempt, partial(find_images, folder=args.images))
    paths, faults = {}, {}
    for i, (paths[i], faults[i]) in enumerate(spread(find, records, "records")):
        paths[i] = paths[i] or []
    if not args.no_decode:
        pictures = list({path for some in paths.values() for path in some})
        broken = dict(zip(pictures, spread(fault_of_picture, pictures, "pictures")))
        for i in paths:
            faults[i] = next((broken[path] for path in paths[i] if broken[path]), faults[i])

    good = [i for i in paths if not faults[i]]
    lengths, block, new = {}, None, not (args.init or learn_from)
    while good:
        some = [records[i] for i in good]
        tokenizer, config = load_tokenizer(args, learn_from or some)
        block, counts = config.block_size, TokenCounts(tokenizer)
        length = partial(length_of, counts=counts, config=config)
        for i, found in zip(good, spread(length, some, "lengths")):
            lengths[i], faults[i] = found
        before, good = good, [i for i in good if not faults[i]]
        if not (args.write_good and new) or good == before:
            break  # else once more: train.py's tokenizer will learn from the good ones alone
    return paths, faults, lengths, block


def report(file, records, paths, faults, lengths, block):
    """Print what was found; -> the records without a fault."""
    good = [i for i in paths if not faults[i]]
    counts = [len(paths[i]) for i in good if paths[i]]
    line = f"{file}: {len(records):,} records: {len(counts):,} with {sum(counts):,} pictures, "
    line += f"{len(good) - len(counts):,} text-only"
    bad = len(records) - len(good)
    print(line + (f", {bad:,} bad" if bad else ""))
    if lengths:
        tokens = sorted(lengths.values())
        middle, high = statistics.median_low(tokens), tokens[int(0.95 * (len(tokens) - 1))]
        line = f"tokens: median {middle:,}, 95 % at most {high:,}, longest {tokens[-1]:,}"
        print(f"{line}, the block holds {block:,}")

    kinds = defaultdict(list)
    for i, fault in faults.items():
        if fault:
            kind, _, details = fault.partition(": ")
            name = records[i].get("id", i) if isinstance(records[i], dict) else i
            kinds[kind].append(f"record {str(name)[:80]}: {details}")
    for kind, found in sorted(kinds.items(), key=lambda item: -len(item[1])):
        print(f"{len(found):,} x {kind}", *found[:5], sep="\n    ")
        if len(found) > 5:
            print(f"    and {len(found) - 5:,} more")
    return [records[i] for i in good]


def main():
    parser = argparse.ArgumentParser(description="All that is wrong with a data set, at once.")
    add = parser.add_argument
    add("--data", required=True, help="LLaVA's JSON or JSON Lines")
    add("--val", help="another file, with the tokenizer that is learned from --data")
    add("--images", default=".", help="folder of the pictures that it names")
    add("--init", type=Path, help="check for the model in this folder, else for a new one")
    for name in SIZES:
        add(f"--{name.replace('_', '-')}", type=int, help="as in train.py")
    add("--no-decode", action="store_true", help="do not look into the pictures")
    add("--write-good", type=Path, help="a new file for the records of --data without a fault")
    args = parser.parse_args()
    if args.write_good and args.write_good.exists():
        raise ValueError(f"--write-good: {args.write_good} exists, choose another name")

    sys.stdout.reconfigure(errors="backslashreplace")  # for half of a surrogate pair in a name
    good, bad = None, 0
    for file in filter(None, (args.data, args.val)):
        records = data.read_json(file)
        if not records:
            raise ValueError(f"{file} holds no record")
        found = report(file, records, *check(records, args, good))
        bad += len(records) - len(found)
        good = good or found
    if args.write_good:
        lines = ",\n".join(map(json.dumps, good))
        with open(args.write_good, "x", encoding="utf-8") as file:
            file.write(f"[\n{lines}\n]\n")
        print(f"{args.write_good}: {len(good):,} records")
    return int(bad > 0)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    import check_data  # by this name other processes find the functions, however this one began

    try:
        sys.exit(check_data.main())
    except (ValueError, OSError) as error:
        sys.exit(f"check_data.py: {error}")
