"""
LLaVA mini, the data: record -> sample -> batch, in one layout for pictures and for text alone.

    record  {"image": "a.png", "conversations": [{"from": "human", "value": "<image>\\nWhat?"}, ..]}
    sample  input_ids (T,), labels (T,), pixel_values (M, 3, H, W)
    batch   input_ids (B, T), labels (B, T), pixel_values (B, M, 3, H, W)

Every sample has M >= 1 image slots. Without an image it has one slot of zeros, and nothing else
says that it is empty: the model looks for itself (LlavaMini.real_slots).

$ python data.py                                        # two records, token by token
$ python data.py --data train.json --images photos      # every fault in your own records
"""

import json
import os
import random
import sys
import zlib
from itertools import product
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads do not survive a fork
import torch
from PIL import Image, ImageDraw
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.utils.rnn import pad_sequence

IM_START, IM_END, IMAGE_TOKEN = "<|im_start|>", "<|im_end|>", "<image>"
SPECIAL_TOKENS = [IM_END, IM_START, IMAGE_TOKEN]  # 0, 1 and 2 in a tokenizer that is trained here
PAD_TOKEN_ID = 0  # on the right, where no word looks back at it and no label stands
IGNORE_INDEX = -100  # the label of a position that is not trained on
ROLES = {"system": "system", "human": "user", "gpt": "assistant"}  # LLaVA's names -> ChatML's


def train_tokenizer(records, vocab_size=2048):
    """Byte-level BPE. A digit is always a token of its own: all numbers are spelled alike."""
    digits = pre_tokenizers.Digits(individual_digits=True)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    options = {"initial_alphabet": byte_level.alphabet(), "show_progress": False}
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=SPECIAL_TOKENS, **options)
    texts = ["user\n", "assistant\n", "system\n"]
    for i in range(0, len(records), 1 + len(records) // 4000):  # enough for a small vocabulary
        texts += [turn["value"][:5000] for turn in records[i]["conversations"]]
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def load_tokenizer(path, config=None):
    """A tokenizer.json, for the model with this Config. Special tokens that it lacks are added.
    Raises ValueError for no tokenizer and for another model's."""
    from extras import vocabulary

    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library's errors have no class of their own
        raise ValueError(f"{path} holds no tokenizer: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    vocabulary.check(path, tokenizer, config)
    return tokenizer


def encode(record, tokenizer, config):
    """-> (input_ids, labels) in ChatML; labels cover the assistant's words and end tokens.

    Each <image> becomes P image tokens here, so that the length is known before the model runs.
    A record that ends with a question goes on with the assistant's header. Raises ValueError.
    """
    tokenizer.encode_special_tokens = True  # "<|im_end|>" typed in a text is text
    start, end, image = map(tokenizer.token_to_id, (IM_START, IM_END, IMAGE_TOKEN))
    P, n_markers, n_images = config.image_tokens, 0, len(images_of(record))
    input_ids, labels = [], []

    def tokens_of(text):
        return tokenizer.encode(text, add_special_tokens=False).ids

    def add(tokens, learn=False):
        input_ids.extend(tokens)
        labels.extend(tokens if learn else [IGNORE_INDEX] * len(tokens))

    add(tokenizer.encode("").ids)  # a beginning-of-sequence token, if the tokenizer has one
    for turn in record["conversations"]:
        role = ROLES[turn["from"]]
        if role == "assistant":
            add([start] + tokens_of("assistant\n"))
            add(tokens_of(turn["value"]) + [end], learn=True)
        else:
            text = f"{role}\n{turn['value']}"
            pieces = text.split(IMAGE_TOKEN) if role == "user" else [text]
            add([start] + tokens_of(pieces[0]))
            for piece in pieces[1:]:
                add([image] * P + tokens_of(piece))
            add([end])
            n_markers += len(pieces) - 1
        add(tokens_of("\n"))
    if record["conversations"][-1]["from"] == "human":
        add([start] + tokens_of("assistant\n"))

    if n_markers != n_images:
        raise ValueError(f"markers: {n_markers} {IMAGE_TOKEN} in human turns, {n_images} images")
    if len(input_ids) > config.block_size:
        why = f"{len(input_ids)} tokens, {P} for each image, the block holds {config.block_size}"
        cure = "try a larger --block-size or --patch-size, or a smaller --image-size"
        raise ValueError(f"too long: {why}: {cure}")
    return input_ids, labels


def make_sample(record, tokenizer, config):
    """-> {"input_ids": (T,), "labels": (T,), "pixel_values": (M, 3, H, W)}"""
    input_ids, labels = map(torch.tensor, encode(record, tokenizer, config))
    size = config.image_size
    slots = [load_pixels(image, size) for image in images_of(record)]
    if not slots:  # THE PLACEHOLDER: a text-only sample carries one slot of zeros
        slots = [torch.zeros(3, size, size)]
    return {"input_ids": input_ids, "labels": labels, "pixel_values": torch.stack(slots)}


def collate(samples):
    """Samples -> batch: rows are padded on the right, with words and with slots of zeros."""
    paddings = {"input_ids": PAD_TOKEN_ID, "labels": IGNORE_INDEX, "pixel_values": 0}
    batch = {}
    for name, padding in paddings.items():
        tensors = [sample[name] for sample in samples]
        batch[name] = pad_sequence(tensors, batch_first=True, padding_value=padding)
    return batch


class Samples(torch.utils.data.Dataset):
    """The samples of records: of a list, or of anything with a length and an index."""

    def __init__(self, records, tokenizer, config):
        self.records, self.tokenizer, self.config = records, tokenizer, config

    def __len__(self):
        return len(self.records)

    def __getitem__(self, index):
        record = {}
        try:
            record = self.records[index]
            return make_sample(record, self.tokenizer, self.config)
        except ValueError as error:
            raise ValueError(f"record {str(record.get('id', index))[:80]}: {error}") from error


# ---- images and records -------------------------------------------------------------------------


def open_image(image):
    """A path or PIL image -> RGB PIL image, upright, on white. ValueError for an unreadable one."""
    from extras import pictures  # which knows all that can stand beside the pixels

    return pictures.open_image(image)


def letterbox(image, size):
    """-> PIL image of size x size pixels that shows the whole picture, on white."""
    image = open_image(image)
    width, height = (max(1, round(side * size / max(image.size))) for side in image.size)
    square = Image.new("RGB", (size, size), "white")
    square.paste(image.resize((width, height)), ((size - width) // 2, (size - height) // 2))
    return square


def load_pixels(image, size):
    """A path or PIL image -> (3, size, size) from -1 to 1, as SigLIP has it.

    Zero would need a grey of 127.5, which 8 bits do not have: no picture looks like an empty slot.
    """
    pixels = torch.frombuffer(bytearray(letterbox(image, size).tobytes()), dtype=torch.uint8)
    return pixels.view(size, size, 3).permute(2, 0, 1) / 127.5 - 1


def images_of(record):
    image = record.get("image")
    if image is None or image == "" or image != image:  # NaN: what pandas writes for nothing
        return []
    return image if isinstance(image, list) else [image]


def read_json(path, **options):
    """-> the records of a JSON list or of JSON Lines, with or without a byte order mark."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig").strip()
        if not text.startswith("["):
            lines = filter(str.strip, text.split("\n"))
            text = "[" + ",\n".join(lines) + "]"
        return json.loads(text, **options)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: neither a JSON list nor JSON Lines: {error}") from error


def read_records(path, folder):
    """-> the records in a file, with whole image paths. extras/check_data.py checks them."""
    records = read_json(path)
    for record in records:
        names = images_of(record)
        record["image"] = [os.path.abspath(os.path.join(folder, str(name))) for name in names]
    return records


# ---- toy records: one or two pictures of a shape, or exercises with words -----------------------

CORNERS = {"triangle": 3, "square": 4, "ring": 60}
COLOURS = ["red", "cyan", "blue", "yellow", "magenta", "white"]
PLACES = ["top left", "top right", "bottom left", "bottom right"]
SCENES = list(product(CORNERS, COLOURS, PLACES))
WORDS = ["apple", "bread", "chair", "dream", "eagle", "flame", "grape", "house", "island", "kite"]


class ToyRecords:
    """Made on demand from (seed, split, index, text_fraction) alone. Splits: train and test."""

    def __init__(self, split, size, seed=0, text_fraction=0.5):
        self.split, self.size, self.seed, self.text_fraction = split, size, seed, text_fraction

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        if index >= self.size:
            raise IndexError(index)  # ends a for loop
        rng = random.Random(f"{self.seed}/{self.split}/{index}")
        scenes = []
        if rng.random() < self.text_fraction:
            dialogue = [self.exercise(rng) for _ in range(3)]
        else:
            scenes = [self.scene(rng) for _ in range(rng.choice([1, 1, 1, 2, 2]))]
            dialogue = questions(scenes)
        rng.shuffle(dialogue)
        if self.split == "test":
            dialogue = dialogue[:1]

        turns = []
        for question, answer in dialogue:
            turns += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        turns[0]["value"] = f"{IMAGE_TOKEN}\n" * len(scenes) + turns[0]["value"]
        images = [paint(rng, *scene) for scene in scenes]
        return {"id": f"{self.split}-{index}", "image": images, "conversations": turns}

    def is_mine(self, number):
        """Multiples of eleven are held out: what has such a number is in the test split alone."""
        return (number % 11 == 0) == (self.split == "test")

    def scene(self, rng):
        """-> (kind, colour, place). Of a kind and a colour at most one place is held out."""
        number = rng.randrange(len(SCENES))
        return SCENES[number] if self.is_mine(number) else self.scene(rng)

    def exercise(self, rng):
        """-> (question, answer)"""
        words = rng.sample(WORDS, rng.randint(2, 4))
        number = zlib.crc32(" ".join(sorted(words)).encode())  # of the set, the same in every run
        if not self.is_mine(number):
            return self.exercise(rng)
        text, count = " ".join(words), ["two", "three", "four"][len(words) - 2]
        copies = [(f"Repeat: {text}", text), (f"Reverse: {text}", " ".join(reversed(words)))]
        facts = [(f"Which word comes last? {text}", words[-1]), (f"How many words? {text}", count)]
        return rng.choice(copies + facts)


def paint(rng, kind, colour, place):
    size, half = 32, 16  # pixels
    radius = rng.uniform(0.4, 0.5) * half
    x = rng.uniform(radius, half - radius) + half * ("right" in place)
    y = rng.uniform(radius, half - radius) + half * ("bottom" in place)
    image = Image.new("RGB", (size, size), "#18181c")
    style = {"fill": None if kind == "ring" else colour, "outline": colour, "width": 3}
    ImageDraw.Draw(image).regular_polygon((x, y, radius), CORNERS[kind], **style)
    return image


def questions(scenes):
    """-> [(question, answer), ...]"""
    told = [f"a {colour} {kind} at the {place}" for kind, colour, place in scenes]
    if len(scenes) == 2:
        return [("Describe both images.", ", ".join(told))]
    kind, colour, place = scenes[0]
    parts = [("What colour is it?", colour), ("What shape is it?", kind)]
    return [*parts, ("Where is it?", f"at the {place}"), ("Describe the image.", told[0])]


if __name__ == "__main__":
    from extras import check_data, worked_example

    sys.exit(check_data.main() if len(sys.argv) > 1 else worked_example.main())
