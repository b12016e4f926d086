"""
All that is wrong with a data set, at once: every record, every picture, every length.
docs/data.md tells what each message means.

$ python data.py --data train.json --images photos      # hands its arguments to this file
$ python data.py --data train.json --images photos --write-good good.json
$ python data.py --data train.json --images photos --init out       # for this model
"""

import argparse
import json
import statistics
import sys
import warnings
from collections import defaultdict
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

import data
from extras.all_cores import spread
from extras.pictures import open_image
from extras.record_faults import find_images, note_equal_keys
from extras.token_counts import TokenCounts
from llava_mini import Config, LlavaMini

SIZES = ("block_size", "image_size", "patch_size")


def attempt(function, item):
    """-> (result, None) or (None, message)"""
    try:
        return function(item), None
    except ValueError as error:
        return None, str(error)


def fault_of_picture(path, decode):
    warnings.simplefilter("ignore")  # Pillow's, about metadata and size
    _, fault = attempt(partial(open_image, decode=decode), path)
    return fault


def length_of(record, counts, config):
    """-> (tokens, None), or (tokens or None, message) where there are too many or unknown words"""
    endless = replace(config, block_size=sys.maxsize)
    encoded, fault = attempt(partial(data.encode, tokenizer=counts, config=endless), record)
    if fault:
        return None, fault
    tokens = len(encoded[0])
    if tokens > config.block_size:
        _, fault = attempt(partial(data.encode, tokenizer=counts, config=config), record)
    return tokens, fault


# ---- the whole file -----------------------------------------------------------------------------


def sizes_of(args):
    """-> the fields of Config that are given"""
    return {name: getattr(args, name) for name in SIZES if getattr(args, name) is not None}


def given_model(args):
    """-> (tokenizer, config) of the model in --init's folder, or None for a new one. What is wrong
    with either is known before the long work on the data. Raises ValueError or OSError."""
    if args.init:
        config = LlavaMini.load(args.init).config
        if replace(config, **sizes_of(args)) != config:
            raise ValueError("--init brings its model's sizes, leave out those for a new one")
        return data.load_tokenizer(f"{args.init}/tokenizer.json", config), config
    try:
        with torch.device("meta"):
            LlavaMini(Config(1, 0, **sizes_of(args)))
    except (AssertionError, RuntimeError) as error:
        raise ValueError(str(error)) from error
    return None


def new_model(args, records):
    """-> (tokenizer, config), as train.py makes them"""
    tokenizer = data.train_tokenizer(records)
    image_token_id = tokenizer.token_to_id(data.IMAGE_TOKEN)
    return tokenizer, Config(tokenizer.get_vocab_size(), image_token_id, **sizes_of(args))


def check(records, args, given, learn_from=None):
    """-> ({index: image paths}, {index: message}, {index: tokens}, block size)

    Without a given model a tokenizer is learned from the good records, as in train.py, or others.
    """
    find = partial(attempt, partial(find_images, folder=args.images))
    paths, faults = {}, {}
    for i, (paths[i], faults[i]) in enumerate(spread(find, records, "records")):
        paths[i] = paths[i] or []
    pictures = list({path for some in paths.values() for path in some})
    look = partial(fault_of_picture, decode=not args.no_decode)
    broken = dict(zip(pictures, spread(look, pictures, "pictures")))
    for i in paths:
        faults[i] = next((broken[path] for path in paths[i] if broken[path]), faults[i])

    good = [i for i in paths if not faults[i]]
    lengths, block, new = {}, None, not (given or learn_from)
    while good:
        some = [records[i] for i in good]
        tokenizer, config = given or new_model(args, learn_from or some)
        block, counts = config.block_size, TokenCounts(tokenizer)
        length = partial(length_of, counts=counts, config=config)
        for i, found in zip(good, spread(length, some, "lengths")):
            lengths[i], faults[i] = found
        lengths = {i: tokens for i, tokens in lengths.items() if tokens}
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


def refuse_empty(args):
    """Raises ValueError for a flag without a value, as an unset variable leaves it."""
    for name, value in vars(args).items():
        if value == "":
            raise ValueError(f"--{name.replace('_', '-')} is empty: is a variable unset?")


def main():
    parser = argparse.ArgumentParser(description="All that is wrong with a data set, at once.")
    add = parser.add_argument
    add("--data", required=True, help="LLaVA's JSON or JSON Lines")
    add("--val", help="another file, with the tokenizer that is learned from --data")
    add("--images", default=".", help="folder of the pictures that it names")
    add("--init", help="check for the model in this folder, else for a new one")
    for name in SIZES:
        add(f"--{name.replace('_', '-')}", type=int, help="as in train.py")
    add("--no-decode", action="store_true", help="look at the head of each picture alone")
    add("--write-good", type=Path, help="a new file for the records of --data without a fault")
    try:
        args = parser.parse_args()
        refuse_empty(args)
        return int(count_bad(args) > 0)
    except KeyboardInterrupt:
        return "data.py: stopped"
    except (ValueError, OSError) as error:
        return f"data.py: {error}"


def count_bad(args, **others):
    """Check the files and print what is found; -> how many records are bad. The arguments are those
    of the command; train.py gives its own, and others that it has not."""
    args = argparse.Namespace(**vars(args) | others)
    if args.write_good and args.write_good.exists():
        raise ValueError(f"--write-good: {args.write_good} exists, choose another name")

    given = given_model(args)
    if hasattr(sys.stdout, "reconfigure"):  # Jupyter's has not
        sys.stdout.reconfigure(errors="backslashreplace")  # for half of a surrogate pair in a name
    good, bad = None, 0
    for file in filter(None, (args.data, args.val)):
        records = data.read_json(file, object_pairs_hook=note_equal_keys)
        if not records:
            raise ValueError(f"{file} holds no record")
        found = report(file, records, *check(records, args, given, good))
        bad += len(records) - len(found)
        good = found if good is None else good
    if args.write_good and not good:
        raise ValueError(f"{args.data} holds no good record, {args.write_good} is not written")
    if args.write_good:
        lines = ",\n".join(map(json.dumps, good))
        with open(args.write_good, "x", encoding="utf-8") as file:
            file.write(f"[\n{lines}\n]\n")
        print(f"{args.write_good}: {len(good):,} records")
    return bad
