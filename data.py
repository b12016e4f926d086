"""LLaVA mini, the data: record -> sample -> batch, with one shape for images and for text alone.

    {"conversations",    input_ids (T,)         input_ids    (B, T)
     "image"?}           labels    (T,)         labels       (B, T)
                         images (m, 3, H, W)    pixel_values (B, M, 3, H, W)    M >= 1 slots; an empty slot is all zeros

- A text-only sample gets one all-zero slot, and nothing else says that it has no image: the model looks for itself.
- One `<image>` marker becomes P image tokens here, so that the length is known before the forward pass.
- Labels cover the assistant's words and their end token, nothing else.
- Toy data is a pure function of (seed, split, index); held-out splits share no picture and no operands with training.
"""

import copy
import json
import os
import random
import re
import sys
import warnings
import zlib
from functools import lru_cache, partial
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads do not survive the fork of data workers
import torch
from PIL import Image, ImageDraw, ImageOps
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

IMAGE_TOKEN, IM_START, IM_END = "<image>", "<|im_start|>", "<|im_end|>"
IGNORE_INDEX = -100  # the label of a position that is not trained on
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's. Times 255 none is whole: no 8-bit pixel normalises to zero
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)
MEAN, STD = torch.tensor(IMAGE_MEAN).view(3, 1, 1), torch.tensor(IMAGE_STD).view(3, 1, 1)
ROLES = {"system": "system", "human": "user", "gpt": "assistant"}  # LLaVA's names -> ChatML's
CHAT_TEMPLATE = """{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}{% if part.type == 'image' %}<image>
{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


# --- tokenizer -------------------------------------------------------------------------------------------------------
def train_tokenizer(texts, vocab_size=2048):
    """Byte-level BPE, in which every digit is a token of its own, so that numbers are spelled alike everywhere."""
    tokenizer, byte_level = Tokenizer(models.BPE()), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    options = {"special_tokens": [IM_END, IM_START, IMAGE_TOKEN], "initial_alphabet": byte_level.alphabet()}
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, show_progress=False, **options)
    tokenizer.train_from_iterator(["user\n", "assistant\n", "system\n", *texts], trainer)
    return tokenizer


def load_tokenizer(path):
    """Read a tokenizer.json, ours or GPT-2's, and add our special tokens where they are missing."""
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as e:  # tokenizers raises nothing narrower
        raise ValueError(f"{path}: no readable tokenizer.json ({e})") from e
    tokenizer.add_special_tokens([IM_END, IM_START, IMAGE_TOKEN])
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def read_json(path):
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{path}: not valid JSON ({e})") from e


def read_records(path):
    records = read_json(path)
    if not isinstance(records, list):
        raise ValueError(f"{path}: needs a JSON list of records")
    return records


def texts_of(records):
    """Every text in a list of records, to train a tokenizer on; what is no record has none."""
    talks = [record.get("conversations") for record in records if isinstance(record, dict)]
    turns = [turn for talk in talks if isinstance(talk, list) for turn in talk if isinstance(turn, dict)]
    return [turn["value"] for turn in turns if is_text(turn.get("value"))]


def is_text(value):
    """Half a surrogate pair, which JSON can hold, is no text: no encoding knows it."""
    return isinstance(value, str) and not re.search("[\ud800-\udfff]", value)


def processor_files(tokenizer, image_size, patch_size, block_size):
    """-> {file name: text}: what transformers needs to prepare text and square pictures as this file does.

    Other pictures are letterboxed here, and cropped by CLIP's image processor.
    """
    end, square = tokenizer.token_to_id(IM_END), {"height": image_size, "width": image_size}
    text = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": block_size}
    text |= {"eos_token": IM_END, "pad_token": IM_END, "extra_special_tokens": {"image_token": IMAGE_TOKEN}}
    image = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": image_size}, "crop_size": square}
    image |= {"image_mean": IMAGE_MEAN, "image_std": IMAGE_STD}
    both = {"processor_class": "LlavaProcessor", "image_token": IMAGE_TOKEN, "patch_size": patch_size}
    both |= {"vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}  # the class token
    configs = {"tokenizer": text, "preprocessor": image, "processor": both}
    configs["generation"] = {"eos_token_id": end, "pad_token_id": end}
    files = {f"{name}_config.json": json.dumps(config, indent=2) for name, config in configs.items()}
    return files | {"tokenizer.json": tokenizer.to_str(pretty=True), "chat_template.jinja": CHAT_TEMPLATE}


# --- record -> sample ------------------------------------------------------------------------------------------------
def images_of(record):
    image = record.get("image")
    return [] if image is None else image if isinstance(image, list) else [image]


def check_record(record):
    """Raise ValueError, "reason: detail", unless record is a LLaVA conversation whose markers match its images."""
    turns = record.get("conversations") if isinstance(record, dict) else None
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError("no conversation: needs a list of turns under 'conversations'")
    roles, values = [turn.get("from") for turn in turns], [turn.get("value") for turn in turns]
    talk = roles[1:] if roles[:1] == ["system"] else roles
    if not talk or talk != ["human", "gpt"] * (len(talk) // 2) + ["human"] * (len(talk) % 2):
        raise ValueError(f"wrong roles: {roles}, needs an optional system turn, then human and gpt in turns")
    if not all(map(is_text, values)):
        raise ValueError("wrong value: every turn needs a text under 'value'")
    images = images_of(record)
    if not all(isinstance(image, (os.PathLike, Image.Image)) or is_text(image) for image in images):
        raise ValueError("wrong image: needs a path, a list of paths, or nothing under 'image'")
    markers = sum(value.count(IMAGE_TOKEN) for role, value in zip(roles, values) if role == "human")
    if images and markers != len(images):
        raise ValueError(f"wrong number of markers: {markers} {IMAGE_TOKEN} in human turns for {len(images)} images")


@lru_cache(maxsize=2**16)
def words(tokenizer, text):
    # Special tokens typed in a text are text. Set here, since a tokenizer loses it on its way to a worker process.
    tokenizer.encode_special_tokens = True
    return tokenizer.encode(text, add_special_tokens=False).ids


def encode(record, tokenizer, n_patches, block_size=None):
    """The chat template, ChatML: -> (input_ids, labels, number of images used, whether it was cut).

    A record that ends with the human's turn becomes a prompt for the assistant. One longer than block_size is cut after
    the last turn of the assistant that fits, never inside a turn or an image; ValueError if not even the first fits.
    """
    check_record(record)
    start, end, image = (tokenizer.token_to_id(token) for token in (IM_START, IM_END, IMAGE_TOKEN))
    ids, labels, used, whole = [], [], 0, None
    for turn in record["conversations"]:
        role, value = ROLES[turn["from"]], turn["value"]
        if role == "assistant":
            prompt, answer = [start, *words(tokenizer, "assistant\n")], [*words(tokenizer, value), end]
        else:
            # Role and text in one piece, as transformers tokenises them. A marker counts only where there is an image.
            text, marker = f"{role}\n{value}", IMAGE_TOKEN if role == "user" and images_of(record) else None
            first, *rest = text.split(marker) if marker else [text]
            prompt, answer = [start, *words(tokenizer, first)], []
            for piece in rest:
                prompt += [image] * n_patches + words(tokenizer, piece)
                used += 1
            prompt.append(end)
        newline = words(tokenizer, "\n")
        ids += prompt + answer + newline
        labels += [IGNORE_INDEX] * len(prompt) + answer + [IGNORE_INDEX] * len(newline)
        if block_size and len(ids) > block_size:
            if not whole:
                raise ValueError(f"too long: its first exchange exceeds the block size of {block_size} tokens")
            return ids[: whole[0]], labels[: whole[0]], whole[1], True
        if role == "assistant":
            whole = len(ids), used
    if role != "assistant":
        ids += [start, *words(tokenizer, "assistant\n")]
        labels += [IGNORE_INDEX] * (len(ids) - len(labels))
    return ids, labels, used, False


def make_sample(record, tokenizer, image_size, patch_size, block_size=None, image_folder=""):
    """-> {"input_ids": (T,), "labels": (T,), "images": (m, 3, H, W)}; without an image m = 1 and the slot is zero."""
    ids, labels, used, _ = encode(record, tokenizer, (image_size // patch_size) ** 2, block_size)
    images = [to_tensor(open_image(image, image_folder), image_size) for image in images_of(record)[:used]]
    slots = torch.stack(images) if images else torch.zeros(1, 3, image_size, image_size)
    return {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels), "images": slots}


def image_path(name, folder):
    """Where an image file lies. Raises ValueError for a name that leaves the folder, such as ../x or /x."""
    path = os.path.abspath(os.path.join(folder, name))
    if folder and not path.startswith(os.path.join(os.path.abspath(folder), "")):
        raise ValueError(f"image outside of the folder: {name}")
    return path


def open_image(image, folder=""):
    """A PIL image, or a path inside folder, -> RGB PIL image. Raises ValueError naming the file."""
    name = image
    try:
        if not isinstance(image, Image.Image):
            with warnings.catch_warnings():  # of a picture so large that it could be a decompression bomb
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                image = Image.open(image_path(image, folder))
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I;16"):  # convert() would clip 16-bit greys at 255
            image = image.convert("I").point(lambda grey: grey / 256).convert("L")
        if image.has_transparency_data:  # convert("RGB") alone would show the colours hidden under transparent pixels
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")
    except Exception as e:  # Pillow's decoders raise whatever they like on a damaged file
        raise ValueError(f"image can't be read: {name}: {e}") from e


def to_tensor(image, size):
    """RGB PIL image -> (3, size, size), normalised as CLIP's; letterboxed with the mean colour as LLaVA-1.5's."""
    if image.size != (size, size):
        mean_colour = tuple(int(255 * mean) for mean in IMAGE_MEAN)
        w, h = (max(1, round(side / max(image.size) * size)) for side in image.size)  # a thin line keeps one pixel
        page = Image.new("RGB", (size, size), mean_colour)
        page.paste(image.resize((w, h), Image.Resampling.BICUBIC), (round((size - w) / 2), round((size - h) / 2)))
        image = page
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(size, size, 3).permute(2, 0, 1)
    return (pixels / 255 - MEAN) / STD


def to_image(pixels):
    """(3, H, W) normalised -> RGB PIL image: `to_tensor` undone."""
    pixels = ((pixels * STD + MEAN) * 255).round().clamp(0, 255).byte().permute(1, 2, 0)
    return Image.frombytes("RGB", pixels.shape[1::-1], bytes(pixels.flatten().tolist()))


def collate(samples):
    """-> {input_ids and labels: (B, T), padded on the right, pixel_values: (B, M, 3, H, W), padded with zero slots}.

    Padding is token 0; which token does not matter, since it carries no label and nothing before it attends to it.
    """
    pad = partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
    return {
        "input_ids": pad([s["input_ids"] for s in samples]),
        "labels": pad([s["labels"] for s in samples], padding_value=IGNORE_INDEX),
        "pixel_values": pad([s["images"] for s in samples]),  # with zeros: slots without an image
    }


# --- toy data --------------------------------------------------------------------------------------------------------
KINDS = ("circle", "square", "triangle")
COLOURS = {"red": (225, 50, 50), "green": (50, 170, 70), "blue": (70, 100, 235)}
COLOURS |= {"yellow": (245, 215, 60), "purple": (165, 80, 205), "grey": (130, 130, 130)}
COLOURS |= {"white": (240, 240, 240), "cyan": (60, 205, 225)}
CELLS = ("top left", "top right", "bottom left", "bottom right")
HELD_OUT_PAIRS = {("yellow", "circle"), ("purple", "square"), ("cyan", "triangle")}
CORNERS = {"circle": "none", "square": "four", "triangle": "three"}
TOLD_ONLY = "triangle"  # training tells its corners in text only and never asks for them in a picture: split "transfer"
COUNTS = ("zero", "one", "two", "three")
WORDS = ("apple", "bread", "chair", "dream", "eagle", "flame", "grape", "house", "island", "kite", "lemon", "moon")
QUESTIONS = ("colour", "place", "follow-up", "content", "count", "corners", "describe")
LOOK_UPS = ("colour", "colour", "place", "place", "content", "content", "corners", "count")  # twice: twice as often
LESSONS = ((["describe"], 0), (["follow-up"], 1), ([], 3), ([], 3))  # (what is asked first, how many look-ups follow)
SKILLS = ("larger", "plus", "reverse", "read", "corners")


def is_held_out(key):
    """One in eight scenes and operands, by a hash of what they are, is kept for the held-out splits."""
    return zlib.crc32(repr(key).encode()) % 8 == 0


def draw_scene(rng, split, most=3):
    """-> [(cell, colour, kind), ...], one to `most` shapes of different kinds; split "any": without restriction."""
    while True:
        n = rng.randint(1, most)
        scene = list(zip(sorted(rng.sample(range(4), n)), rng.choices(list(COLOURS), k=n), rng.sample(KINDS, n)))
        held_out_pair = any(shape[1:] in HELD_OUT_PAIRS for shape in scene)
        allowed = {
            "any": True,
            "train": not held_out_pair and not is_held_out(scene),
            "test": not held_out_pair and is_held_out(scene),
            "pairs": held_out_pair,
            "transfer": not held_out_pair and is_held_out(scene) and any(kind == TOLD_ONLY for _, _, kind in scene),
        }
        if allowed[split]:
            return scene


def paint(rng, scene, size):
    """A scene on size x size pixels, with jitter in the place and the size of each shape."""
    image = Image.new("RGB", (size, size), "#18181c")
    draw, half = ImageDraw.Draw(image), size / 2
    for cell, colour, kind in scene:
        r = rng.uniform(0.32, 0.45) * half
        x = (cell % 2) * half + rng.uniform(r, half - r)
        y = (cell // 2) * half + rng.uniform(r, half - r)
        box = (x - r, y - r, x + r, y + r)
        colour = tuple(channel + rng.randint(-20, 10) for channel in COLOURS[colour])
        if kind == "circle":
            draw.ellipse(box, colour)
        elif kind == "square":
            draw.rectangle(box, colour)
        else:
            draw.polygon([(x, y - r), (x + r, y + r), (x - r, y + r)], colour)
    return image


def phrase(shape):
    return f"a {shape[2]} in {shape[1]}"


def describe(scene):
    """The place comes first: a decoder that has said where it looks finds by attention what is there."""
    return ", ".join(f"at the {CELLS[shape[0]]} {phrase(shape)}" for shape in scene)


def subjects_of(shapes, split):
    """-> the shapes that a question may be about: in split "pairs", those that no training picture shows."""
    return [shape for shape in shapes if split != "pairs" or shape[1:] in HELD_OUT_PAIRS]


def ask(rng, scene, question, split):
    """-> [(question, answer), ...] about a scene."""
    subjects = subjects_of(scene, split)
    if question == "corners":
        subjects = [shape for shape in subjects if (shape[2] == TOLD_ONLY) == (split == "transfer")]
    if not subjects:
        question, subjects = "count", scene
    cell, _, kind = subject = rng.choice(subjects)
    found, part = phrase(subject), rng.choice((cell, rng.randrange(4)))
    located = f"{found} is at the {CELLS[cell]}"
    (content,) = [phrase(shape) for shape in scene if shape[0] == part] or ["nothing"]
    return {
        "colour": [(f"What colour is the {kind}?", found)],
        "place": [(f"Where is the {kind}?", located)],
        "follow-up": [(f"What colour is the {kind}?", found), ("Where is it?", located)],
        "content": [(f"What is at the {CELLS[part]}?", f"at the {CELLS[part]} {content}")],
        "count": [("How many shapes are there?", COUNTS[len(scene)])],
        "corners": [(f"How many corners has the shape at the {CELLS[cell]}?", f"a {kind} has {CORNERS[kind]}")],
        "describe": [("Describe the image.", describe(scene))],
    }[question]


def draw_two_scenes(rng, split):
    """-> two scenes of one shape each, of different kinds; in split "pairs" one of them is of split "test"."""
    while True:
        first, second = draw_scene(rng, split, 1), draw_scene(rng, "test" if split == "pairs" else split, 1)
        if first[0][2] != second[0][2]:
            return rng.sample([first, second], 2)


def describe_two(scenes):
    return f"first {phrase(scenes[0][0])}, second {phrase(scenes[1][0])}"


def ask_two(rng, scenes, split):
    """-> [(question, answer), (question, answer)] about two pictures."""
    shapes = [scene[0] for scene in scenes]
    shape = rng.choice(subjects_of(shapes, split))
    where = "in" if split == "any" else f"at the {CELLS[shape[0]]} of"  # a pair told in words has no places
    place = "first" if shape == shapes[0] else "second"
    which = f"Which picture holds the {shape[2]}?", f"{phrase(shape)} is {where} the {place}"
    return rng.sample([which, ("What do the images show?", describe_two(scenes))], 2)


def exercise(rng, skill, split):
    """-> [(question, answer), ...] without a picture; operands of the training split occur in no other."""
    while True:
        a, b = rng.sample(range(100), 2)
        if skill == "corners":  # a few facts: nothing to hold out
            kind = rng.choice(KINDS)
            return [(f"How many corners has a {kind}?", f"a {kind} has {CORNERS[kind]}")]
        if skill == "larger":
            key, exchanges = (a, b), [(f"Which is larger, {a} or {b}?", str(max(a, b)))]
        elif skill == "plus":
            key, exchanges = (a, b % 10), [(f"What is {a} plus {b % 10}?", str(a + b % 10))]
        elif skill == "reverse":
            key = rng.sample(WORDS, rng.randint(2, 4))
            exchanges = [(f"Reverse: {' '.join(key)}", " ".join(reversed(key)))]
        else:  # pictures told in words, of any pair: words may name what no training picture shows
            if rng.random() < 0.2:
                scenes = draw_two_scenes(rng, "any")
                key, exchanges = describe_two(scenes), ask_two(rng, scenes, "any")
            else:
                scene, about = draw_scene(rng, "any"), rng.sample(("colour", "place", "content", "corners"), 2)
                key, exchanges = describe(scene), [exchange for a in about for exchange in ask(rng, scene, a, split)]
            exchanges[0] = f"Picture this: {key}. {exchanges[0][0]}", exchanges[0][1]
        if is_held_out((skill, key)) == (split != "train"):
            return exchanges if split == "train" else exchanges[:1]


def toy_records():
    """The records that the toy tokenizer is trained on."""
    return map(ToyDataset("train", 2000).record, range(2000))


class ToyDataset(torch.utils.data.Dataset):
    """Pictures of shapes and exercises in text, made on demand: sample i depends on (seed, split, i) alone.

    Splits: "train"; "test", with scenes that no training picture shows and operands that no training text has; "pairs",
    whose scenes hold a (colour, kind) that no training picture shows; "transfer", pictures asked for a fact that only
    texts tell in training. Training records hold up to four questions, the others hold one (a follow-up: two).
    """

    def __init__(self, split, size, tokenizer=None, seed=0, text_fraction=0.5, image_size=32, patch_size=8):
        self.split, self.size, self.tokenizer, self.seed = split, size, tokenizer, seed
        self.text_fraction, self.image_size, self.patch_size = text_fraction, image_size, patch_size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        return make_sample(self.record(index), self.tokenizer, self.image_size, self.patch_size)

    def name(self, index):
        return f"{self.split}-{index}"

    def record(self, index):
        """-> LLaVA's conversation dictionary, with PIL images."""
        rng = random.Random(f"{self.seed}/{self.split}/{index}")
        scenes = []
        if rng.random() < self.text_fraction:
            exchanges = self.exercises(rng)
        elif self.split != "transfer" and rng.random() < 0.2:
            scenes = draw_two_scenes(rng, self.split)
            exchanges = ask_two(rng, scenes, self.split)[: None if self.split == "train" else 1]
        else:
            scenes = [draw_scene(rng, self.split)]
            exchanges = self.questions(rng, scenes[0])
        turns = [{"from": role, "value": text} for pair in exchanges for role, text in zip(("human", "gpt"), pair)]
        turns[0]["value"] = f"{IMAGE_TOKEN}\n" * len(scenes) + turns[0]["value"]
        images = {"image": [paint(rng, scene, self.image_size) for scene in scenes]} if scenes else {}
        return {"id": self.name(index), **images, "conversations": turns}

    def exercises(self, rng):
        skills = [rng.choice(SKILLS[:-1])]
        if self.split == "train":
            skills = ["read"] if rng.random() < 0.5 else rng.choices(SKILLS, (6, 6, 1, 0, 1), k=4)
        return [exchange for skill in skills for exchange in exercise(rng, skill, self.split)]

    def questions(self, rng, scene):
        if self.split == "train":
            first, look_ups = rng.choice(LESSONS)
            questions = [*first, *rng.sample(LOOK_UPS, look_ups)]
        else:
            questions = ["corners" if self.split == "transfer" else rng.choice(QUESTIONS)]
        return [exchange for question in questions for exchange in ask(rng, scene, question, self.split)]


# --- LLaVA's data ----------------------------------------------------------------------------------------------------
class LlavaDataset(torch.utils.data.Dataset):
    """LLaVA's JSON list of records. All are checked here, before the first step; images are read when they are needed.

    `records` holds the good ones, `lengths` their tokens, `n_images` their images; `bad` lists (id, "reason: detail")
    of the others; `n_cut` counts those cut at a turn to fit block_size. Raises ValueError for a file that is no list.
    """

    def __init__(self, json_path, image_folder, tokenizer, image_size, patch_size, block_size):
        self.how = tokenizer, image_size, patch_size, block_size, image_folder
        self.records, self.lengths, self.n_images, self.bad, self.n_cut = [], [], [], [], 0
        for index, record in enumerate(read_records(json_path)):
            try:
                ids, _, used, cut = encode(record, tokenizer, (image_size // patch_size) ** 2, block_size)
                if record["conversations"][-1]["from"] != "gpt":
                    raise ValueError("no answer: the last turn is the human's")
                for image in images_of(record)[:used]:
                    if not os.path.isfile(image_path(image, image_folder)):
                        raise ValueError(f"image not found: {image}")
            except ValueError as e:
                self.bad.append((record.get("id", index) if isinstance(record, dict) else index, str(e)))
            else:
                self.records.append(record)
                self.lengths.append(len(ids))
                self.n_images.append(used)
                self.n_cut += cut

    def __len__(self):
        return len(self.records)

    def __getitem__(self, index):
        try:
            return make_sample(self.records[index], *self.how)
        except ValueError as e:
            raise ValueError(f"record {self.name(index)}: {e}") from e

    def name(self, index):
        return self.records[index].get("id", f"number {index}")

    def subset(self, with_images):
        """-> a data set of the records with images, or of those without."""
        part, kept = copy.copy(self), [i for i, n in enumerate(self.n_images) if (n > 0) == with_images]
        columns = self.records, self.lengths, self.n_images
        part.records, part.lengths, part.n_images = ([column[i] for i in kept] for column in columns)
        return part


class BatchSampler:
    """The indices of every step, a pure function of (seed, step), so that a run resumes anywhere.

    Shuffled epochs follow one another, each with every sample once. With `lengths`, windows of 128 batches are sorted
    by length, cut into batches, and these shuffled: little padding, as in LLaVA's LengthGroupedSampler, but modalities
    stay mixed. `share` is (rank, ranks); a rank takes `accumulate` micro-batches a step.
    """

    def __init__(self, size, batch_size, seed=0, lengths=None, share=(0, 1), accumulate=1, window=128):
        self.size, self.batch_size, self.seed, self.lengths = size, batch_size, seed, lengths
        self.window = max(1, min(window, size // batch_size))  # no longer than an epoch, which holds a sample once
        self.rank, self.parts, self.ranks = share[0], share[1] * accumulate, share[1]
        self.epoch, self.batches = lru_cache(2)(self.epoch), lru_cache(2)(self.batches)

    def epoch(self, epoch):
        return random.Random(f"{self.seed}/epoch/{epoch}").sample(range(self.size), self.size)

    def batches(self, window):
        n = self.window * self.batch_size
        indices = [self.epoch(i // self.size)[i % self.size] for i in range(window * n, (window + 1) * n)]
        if self.lengths:  # where epochs meet in a window, a batch may then hold a sample twice
            indices.sort(key=self.lengths.__getitem__)
        batches = [indices[i : i + self.batch_size] for i in range(0, n, self.batch_size)]
        if self.lengths:
            random.Random(f"{self.seed}/window/{window}").shuffle(batches)
        return batches

    def step(self, step):
        """-> the indices of a step, over all ranks and micro-batches."""
        return self.batches(step // self.window)[step % self.window]

    def between(self, first, last):
        """Yield this rank's micro-batches of the steps from `first` up to `last`."""
        for step in range(first, last):
            for part in range(self.rank, self.parts, self.ranks):
                yield self.step(step)[part :: self.parts]


def show(record, tokenizer, image_size=32, patch_size=8):
    """Print what becomes of a record: its tokens with ids and labels (image tokens in one line), then its slots."""
    sample, image_token = make_sample(record, tokenizer, image_size, patch_size), tokenizer.token_to_id(IMAGE_TOKEN)
    ids, labels, row = sample["input_ids"].tolist(), sample["labels"].tolist(), 0
    while row < len(ids):
        run = next((i for i, token in enumerate(ids[row:]) if token != image_token), len(ids) - row) or 1
        trained = labels[row] != IGNORE_INDEX
        line = f"{row:4} {ids[row]:6} {labels[row]:6}  {tokenizer.decode([ids[row]], skip_special_tokens=False)!r}"
        line += f" x {run}" if run > 1 else "  <- trained on" if trained else ""
        print(f"\033[32m{line}\033[0m" if trained and sys.stdout.isatty() else line)
        row += run
    slots = ["an image" if slot.any() else "all zeros: no image" for slot in sample["images"]]
    print(f"images {tuple(sample['images'].shape)}: {', '.join(slots)}\n")


if __name__ == "__main__":
    tokenizer = train_tokenizer(texts_of(toy_records()))
    for text_fraction in (0.0, 1.0):
        record = ToyDataset("test", 2, text_fraction=text_fraction).record(1)
        print(json.dumps(record["conversations"]) + "\nrow  token  label")
        show(record, tokenizer)
    records = map(ToyDataset("train", 32, text_fraction=0.0).record, range(32))
    pictures = [image for record in records for image in images_of(record)]
    sheet = Image.new("RGB", (8 * 68, 4 * 68), "white")
    for i in range(32):
        sheet.paste(pictures[i].resize((64, 64), Image.Resampling.NEAREST), (68 * (i % 8) + 2, 68 * (i // 8) + 2))
    sheet.save("toy_data.png")
    print("toy_data.png shows training pictures")
