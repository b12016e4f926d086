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
import sys
import zlib
from functools import lru_cache
from itertools import chain, count, cycle, groupby, islice
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
def train_tokenizer(records, vocab_size=2048):
    """Byte-level BPE for the texts of the good records; a digit is a token of its own: numbers are spelled alike."""
    tokenizer, byte_level = Tokenizer(models.BPE()), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    options = {"special_tokens": [IM_END, IM_START, IMAGE_TOKEN], "initial_alphabet": byte_level.alphabet()}
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, show_progress=False, **options)
    texts = [turn["value"] for record in records if not fault(record) for turn in record["conversations"]]
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


def read_json(path, kind):
    """-> the list or dict, whichever `kind` is, in a JSON file. Raises ValueError for anything else."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{path}: not valid JSON ({e})") from e
    if not isinstance(content, kind):
        raise ValueError(f"{path}: needs a JSON {kind.__name__}")
    return content


def processor_files(tokenizer, image_size, patch_size, block_size):
    """-> {file name: text}: what transformers needs to prepare text and square pictures (it crops others) as we do."""
    ends = dict.fromkeys(("eos_token_id", "pad_token_id"), tokenizer.token_to_id(IM_END))
    text = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": block_size}
    text |= {"eos_token": IM_END, "pad_token": IM_END, "extra_special_tokens": {"image_token": IMAGE_TOKEN}}
    image = {"image_processor_type": "CLIPImageProcessor", "image_mean": IMAGE_MEAN, "image_std": IMAGE_STD}
    image |= {"size": {"shortest_edge": image_size}, "crop_size": {"height": image_size, "width": image_size}}
    both = {"processor_class": "LlavaProcessor", "image_token": IMAGE_TOKEN, "patch_size": patch_size}
    both |= {"vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}  # the class token
    configs = {"tokenizer": text, "preprocessor": image, "processor": both, "generation": ends}
    files = {f"{name}_config.json": json.dumps(config, indent=2) for name, config in configs.items()}
    return files | {"tokenizer.json": tokenizer.to_str(pretty=True), "chat_template.jinja": CHAT_TEMPLATE}


# --- record -> sample ------------------------------------------------------------------------------------------------
def images_of(record):
    image = record.get("image")
    return [] if image is None else image if isinstance(image, list) else [image]


def fault(record):
    """-> None for a LLaVA conversation whose markers match its images, else what is wrong: "reason: detail"."""
    try:
        roles, values = zip(*((turn["from"], turn["value"]) for turn in record["conversations"]))  # fails for no turns
        "".join(values).encode()  # fails for what is no text, and for half of a surrogate pair, which JSON can hold
    except (TypeError, KeyError, ValueError):
        return "no conversation: needs a list of turns under 'conversations', each with 'from' and a text as 'value'"
    talk = roles[1:] if roles[0] == "system" else roles
    if not talk or talk != (("human", "gpt") * len(talk))[: len(talk)]:
        return f"wrong roles: {list(roles)}, needs an optional system turn, then human and gpt in turns"
    images = images_of(record)
    if not all(isinstance(image, (str, os.PathLike, Image.Image)) for image in images):
        return "wrong image: needs a path, a list of paths, or nothing under 'image'"
    markers = sum(value.count(IMAGE_TOKEN) for role, value in zip(roles, values) if role == "human")
    if images and markers != len(images):
        return f"wrong number of markers: {markers} {IMAGE_TOKEN} in human turns for {len(images)} images"
    return None


@lru_cache(maxsize=2**16)
def words(tokenizer, text):
    # Special tokens typed in a text are text. Set here, since a tokenizer loses it on its way to a worker process.
    tokenizer.encode_special_tokens = True
    return tokenizer.encode(text, add_special_tokens=False).ids


def encode(record, tokenizer, n_patches, block_size=sys.maxsize):
    """The chat template, ChatML: -> (input_ids, labels, images shown).

    A record that ends with the human's turn becomes a prompt for the assistant. One longer than block_size is cut after
    the last turn of the assistant that fits, never inside a turn or an image; ValueError if not even the first fits.
    """
    if reason := fault(record):
        raise ValueError(reason)
    start, end, image_id = (tokenizer.token_to_id(token) for token in (IM_START, IM_END, IMAGE_TOKEN))
    header, newline = [start, *words(tokenizer, "assistant\n")], words(tokenizer, "\n")
    ids, labels, cut, images = [], [], 0, images_of(record)
    for turn in record["conversations"]:
        role, value = ROLES[turn["from"]], turn["value"]
        if role == "assistant":
            prompt, answer = header, [*words(tokenizer, value), end]
        else:
            # Role and text in one piece, as transformers tokenises them. A marker counts only where there is an image.
            first, *rest = f"{role}\n{value}".split(IMAGE_TOKEN, len(images) if role == "user" else 0)
            prompt, answer = [start, *words(tokenizer, first)], []
            for piece in rest:
                prompt += [image_id] * n_patches + words(tokenizer, piece)
            prompt.append(end)
        ids += prompt + answer + newline
        labels += [IGNORE_INDEX] * len(prompt) + answer + [IGNORE_INDEX] * len(newline)
        if role == "assistant" and len(ids) <= block_size:
            cut = len(ids)
    if role != "assistant":
        ids, labels = ids + header, labels + [IGNORE_INDEX] * len(header)
    if len(ids) > block_size:
        ids, labels = ids[:cut], labels[:cut]
    if not ids:
        raise ValueError(f"too long: its first exchange exceeds the {block_size} tokens that the block size allows")
    return ids, labels, images[: ids.count(image_id) // n_patches]


def make_sample(record, tokenizer, image_size, patch_size, block_size=sys.maxsize):
    """-> {"input_ids": (T,), "labels": (T,), "images": (m, 3, H, W)}; without an image m = 1 and the slot is zero."""
    ids, labels, images = encode(record, tokenizer, (image_size // patch_size) ** 2, block_size)
    slots = [to_tensor(open_image(image), image_size) for image in images]
    slots = torch.stack(slots or [torch.zeros(3, image_size, image_size)])
    return {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels), "images": slots}


def image_path(name, folder):
    """Where an image file lies. Raises ValueError for a name that leaves the folder, such as ../x or /x."""
    folder = os.path.join(os.path.abspath(folder), "")
    path = os.path.abspath(os.path.join(folder, name))
    if not path.startswith(folder):
        raise ValueError(f"image outside of the folder: {name}")
    return path


def open_image(image):
    """A PIL image, or a path, -> RGB PIL image. Raises ValueError naming the file."""
    try:
        opened = image if isinstance(image, Image.Image) else Image.open(image)  # refuses decompression bombs
        opened = ImageOps.exif_transpose(opened)
        if opened.mode.startswith("I;16"):  # convert() would clip 16-bit greys at 255
            opened = opened.convert("I").point(lambda grey: grey / 256).convert("L")
        if opened.has_transparency_data:  # convert("RGB") alone would show the colours hidden under transparent pixels
            opened = opened.convert("RGBA")
            opened = Image.alpha_composite(Image.new("RGBA", opened.size, "white"), opened)
        return opened.convert("RGB")
    except Exception as e:  # Pillow's decoders raise whatever they like on a damaged file
        raise ValueError(f"image can't be read: {image}: {e}") from e


def letterbox(image, size):
    """RGB PIL image -> one of size x size pixels that shows it whole, on the mean colour, as LLaVA-1.5 does."""
    w, h = (max(1, round(side / max(image.size) * size)) for side in image.size)  # a thin line keeps one pixel
    return ImageOps.pad(image.resize((w, h)), (size, size), color=tuple(int(255 * mean) for mean in IMAGE_MEAN))


def to_tensor(image, size):
    """RGB PIL image -> (3, size, size), letterboxed, and normalised as CLIP's."""
    pixels = torch.frombuffer(bytearray(letterbox(image, size).tobytes()), dtype=torch.uint8)
    pixels = pixels.view(size, size, 3).permute(2, 0, 1)
    return (pixels / 255 - MEAN) / STD


def collate(samples):
    """-> {input_ids and labels: (B, T), padded on the right, pixel_values: (B, M, 3, H, W), padded with zero slots}.

    Padding is token 0; which token does not matter, since it carries no label and nothing before it attends to it.
    """

    def pad(name, value=0):
        return torch.nn.utils.rnn.pad_sequence([s[name] for s in samples], batch_first=True, padding_value=value)

    return {"input_ids": pad("input_ids"), "labels": pad("labels", IGNORE_INDEX), "pixel_values": pad("images")}


# --- toy data --------------------------------------------------------------------------------------------------------
CORNERS = {"circle": "none", "square": "four", "triangle": "three"}
KINDS = tuple(CORNERS)
COLOURS = {"red": (225, 50, 50), "green": (50, 170, 70), "blue": (70, 100, 235), "yellow": (245, 215, 60)}
COLOURS |= {"purple": (165, 80, 205), "grey": (130, 130, 130), "white": (240, 240, 240), "cyan": (60, 205, 225)}
CELLS = ("top left", "top right", "bottom left", "bottom right")
HELD_OUT_PAIRS = {("yellow", "circle"), ("purple", "square"), ("cyan", "triangle")}
TOLD_ONLY = "triangle"  # training tells its corners in text only and never asks for them in a picture: split "transfer"
QUESTIONS = ("colour", "place", "follow-up", "content", "count", "corners", "describe")
LOOK_UPS = ("colour", "colour", "place", "place", "content", "content", "corners", "count")  # twice: twice as often
LESSONS = ((["describe"], 0), (["follow-up"], 1), ([], 3), ([], 3))  # (what is asked first, how many look-ups follow)
SKILLS = ("larger", "plus", "reverse", "read", "corners")
WORDS = ("apple", "bread", "chair", "dream", "eagle", "flame", "grape", "house", "island", "kite", "lemon", "moon")


def is_held_out(key):
    """One in eight scenes and operands, by a hash of what they are, is kept for the held-out splits."""
    return zlib.crc32(repr(key).encode()) % 8 == 0


def draw_scene(rng, split, most=3):
    """-> [(cell, colour, kind), ...], one to `most` shapes of different kinds; split "any": without restriction."""
    while True:
        n = rng.randint(1, most)
        scene = list(zip(sorted(rng.sample(range(4), n)), rng.choices(list(COLOURS), k=n), rng.sample(KINDS, n)))
        pair, held_out = any(shape[1:] in HELD_OUT_PAIRS for shape in scene), is_held_out(scene)
        fits = {"any": True, "pairs": pair, "train": not pair and not held_out, "test": not pair and held_out}
        fits["transfer"] = fits["test"] and any(kind == TOLD_ONLY for _, _, kind in scene)
        if fits[split]:
            return scene


def draw_scenes(rng, split):
    """-> one scene or, one time in five, two scenes of one shape each, of different kinds."""
    if split == "transfer" or rng.random() >= 0.2:
        return [draw_scene(rng, split)]
    while True:
        scenes = [draw_scene(rng, split, 1), draw_scene(rng, "test" if split == "pairs" else split, 1)]
        if scenes[0][0][2] != scenes[1][0][2]:
            return rng.sample(scenes, 2)


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


def describe(scenes):
    """The place comes first: a decoder that has said where it looks finds by attention what is there."""
    if len(scenes) == 2:
        return f"first {phrase(scenes[0][0])}, second {phrase(scenes[1][0])}"
    return ", ".join(f"at the {CELLS[shape[0]]} {phrase(shape)}" for shape in scenes[0])


def ask(rng, scenes, question, split):
    """-> [question, answer, ...] about one picture; about two, both questions that there are, in either order."""
    # Split "pairs" asks about what no training picture shows.
    subjects = [shape for scene in scenes for shape in scene if split != "pairs" or shape[1:] in HELD_OUT_PAIRS]
    if question == "corners":
        subjects = [shape for shape in subjects if (shape[2] == TOLD_ONLY) == (split == "transfer")]
    if not subjects:
        question, subjects = "count", scenes[0]
    cell, _, kind = subject = rng.choice(subjects)
    found, place = phrase(subject), f"at the {CELLS[cell]}"
    if len(scenes) == 2:
        where = "in" if split == "any" else f"{place} of"  # a pair told in words has no places
        which = f"{found} is {where} the {'first' if subject in scenes[0] else 'second'}"
        both = [f"Which picture holds the {kind}?", which], ["What do the images show?", describe(scenes)]
        return sum(rng.sample(both, 2), [])
    part, shown = rng.choice((cell, rng.randrange(4))), {shape[0]: phrase(shape) for shape in scenes[0]}
    return {
        "colour": [f"What colour is the {kind}?", found],
        "place": [f"Where is the {kind}?", f"{found} is {place}"],
        "follow-up": [f"What colour is the {kind}?", found, "Where is it?", f"{found} is {place}"],
        "content": [f"What is at the {CELLS[part]}?", f"at the {CELLS[part]} {shown.get(part, 'nothing')}"],
        "count": ["How many shapes are there?", ("one", "two", "three")[len(shown) - 1]],
        "corners": [f"How many corners has the shape {place}?", f"a {kind} has {CORNERS[kind]}"],
        "describe": ["Describe the image.", describe(scenes)],
    }[question]


def ask_all(rng, scenes, split, told=False):
    """-> [question, answer, ...]: what a record asks about the pictures that it shows, or that it tells in words."""
    if len(scenes) == 2:
        texts = ask(rng, scenes, "both", "any" if told else split)
        return texts if split == "train" else texts[:2]
    if told:
        questions = rng.sample(("colour", "place", "content", "corners"), 2)
    elif split == "train":
        first, look_ups = rng.choice(LESSONS)
        questions = [*first, *rng.sample(LOOK_UPS, look_ups)]
    else:
        questions = ["corners" if split == "transfer" else rng.choice(QUESTIONS)]
    return [text for question in questions for text in ask(rng, scenes, question, split)]


def exercise(rng, skill, split):
    """-> [question, answer, ...] without a picture; operands of the training split occur in no other."""
    while True:
        a, b = rng.sample(range(100), 2)
        if skill == "corners":  # a few facts: nothing to hold out
            kind = rng.choice(KINDS)
            return [f"How many corners has a {kind}?", f"a {kind} has {CORNERS[kind]}"]
        if skill == "larger":
            key, texts = (a, b), [f"Which is larger, {a} or {b}?", str(max(a, b))]
        elif skill == "plus":
            key, texts = (a, b % 10), [f"What is {a} plus {b % 10}?", str(a + b % 10)]
        elif skill == "reverse":
            key = rng.sample(WORDS, rng.randint(2, 4))
            texts = [f"Reverse: {' '.join(key)}", " ".join(reversed(key))]
        else:  # pictures told in words, of any pair: words may name what no training picture shows
            scenes = draw_scenes(rng, "any")
            key, texts = describe(scenes), ask_all(rng, scenes, split, told=True)
            texts[0] = f"Picture this: {key}. {texts[0]}"
        if is_held_out((skill, key)) == (split != "train"):
            return texts if split == "train" else texts[:2]


class ToyDataset(torch.utils.data.Dataset):
    """Pictures of shapes and exercises in text, made on demand: sample i depends on (seed, split, i) alone.

    Splits: "train"; "test", with scenes that no training picture shows and operands that no training text has; "pairs",
    whose scenes hold a (colour, kind) that no training picture shows; "transfer", pictures asked for a fact that only
    texts tell in training. A training record asks up to four questions, others one, or two for a follow-up.
    """

    def __init__(self, split, size, tokenizer=None, seed=0, text_fraction=0.5, image_size=32, patch_size=8):
        self.split, self.size, self.tokenizer, self.seed = split, size, tokenizer, seed
        self.text_fraction, self.image_size, self.patch_size = text_fraction, image_size, patch_size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        return make_sample(self.record(index), self.tokenizer, self.image_size, self.patch_size)

    def record(self, index):
        """-> LLaVA's conversation dictionary, with PIL images."""
        rng = random.Random(f"{self.seed}/{self.split}/{index}")
        if rng.random() < self.text_fraction:
            scenes, skills = [], [rng.choice(SKILLS[:-1])]
            if self.split == "train":
                skills = ["read"] if rng.random() < 0.5 else rng.choices(SKILLS, (6, 6, 1, 0, 1), k=4)
            texts = [text for skill in skills for text in exercise(rng, skill, self.split)]
        else:
            scenes = draw_scenes(rng, self.split)
            texts = ask_all(rng, scenes, self.split)
        texts[0] = f"{IMAGE_TOKEN}\n" * len(scenes) + texts[0]
        turns = [{"from": role, "value": text} for role, text in zip(cycle(("human", "gpt")), texts)]
        images = {"image": [paint(rng, scene, self.image_size) for scene in scenes]} if scenes else {}
        return {"id": f"{self.split}-{index}", **images, "conversations": turns}


# --- LLaVA's data ----------------------------------------------------------------------------------------------------
class LlavaDataset(torch.utils.data.Dataset):
    """LLaVA's JSON list of records. All are checked here, before the first step; images are read when they are needed.

    `records` holds the good ones, with whole paths, "n_tokens", "n_images", and "id" where it lacked; `bad` lists (id,
    "reason: detail") of the others; `n_cut` counts those cut at a turn to fit. ValueError for a file that is no list.
    """

    def __init__(self, json_path, image_folder, tokenizer, image_size, patch_size, block_size):
        self.how = tokenizer, image_size, patch_size, block_size
        self.records, self.bad, self.n_cut = [], [], 0
        for index, record in enumerate(read_json(json_path, list)):
            try:
                ids, _, shown = encode(record, tokenizer, (image_size // patch_size) ** 2, block_size)
                if record["conversations"][-1]["from"] != "gpt":
                    raise ValueError("no answer: the last turn is the human's")
                paths = [image_path(image, image_folder) for image in images_of(record)]
                if missing := [path for path in paths[: len(shown)] if not os.path.isfile(path)]:
                    raise ValueError(f"image not found: {', '.join(missing)}")
            except ValueError as e:
                self.bad.append((record.get("id", index) if isinstance(record, dict) else index, str(e)))
            else:
                counts = {"n_tokens": len(ids), "n_images": len(shown)}
                self.records.append({"id": index, **record, "image": paths, **counts})
                turns_kept = ids.count(tokenizer.token_to_id(IM_START))  # nothing but the start of a turn is this token
                self.n_cut += turns_kept < len(record["conversations"])

    def __len__(self):
        return len(self.records)

    def __getitem__(self, index):
        try:
            return make_sample(self.records[index], *self.how)
        except ValueError as e:
            raise ValueError(f"record {self.records[index]['id']}: {e}") from e

    def record(self, index):
        return self.records[index]

    def subset(self, with_images):
        """-> a data set of the records with images, or of those without."""
        part = copy.copy(self)
        part.records = [record for record in self.records if (record["n_images"] > 0) == with_images]
        return part


def batches(size, batch_size, seed=0, lengths=None, window=128):
    """Yield the indices of one step after another, without end; the same for the same arguments, so that a run resumes.

    Shuffled epochs follow one another, each with every sample once. With `lengths`, windows of batches are sorted by
    length, cut, and these shuffled: little padding. Unlike LLaVA's LengthGroupedSampler, text and images share batches.
    """
    epochs = (random.Random(f"{seed}/epoch/{epoch}").sample(range(size), size) for epoch in count())
    stream = chain.from_iterable(epochs)
    window = max(1, min(window, size // batch_size))  # no longer than an epoch, which holds a sample once
    for number in count():
        indices = list(islice(stream, window * batch_size))
        if lengths:  # where epochs meet in a window, a batch may then hold a sample twice
            indices.sort(key=lengths.__getitem__)
        cut = [indices[i : i + batch_size] for i in range(0, len(indices), batch_size)]
        if lengths:
            random.Random(f"{seed}/window/{number}").shuffle(cut)
        yield from cut


if __name__ == "__main__":  # the worked example: two records, their tokens with ids and labels, and their slots
    tokenizer = train_tokenizer(map(ToyDataset("train", 2000).record, range(2000)))
    for text_fraction in (0.0, 1.0):
        dataset, row = ToyDataset("test", 2, tokenizer, text_fraction=text_fraction), 0
        sample = dataset[1]
        print(json.dumps(dataset.record(1)["conversations"]) + "\nrow  token  label")
        for (token, label), run in groupby(zip(sample["input_ids"].tolist(), sample["labels"].tolist())):
            n, trained = len(list(run)), label != IGNORE_INDEX
            line = f"{row:4} {token:6} {label:6}  {tokenizer.decode([token], skip_special_tokens=False)!r}"
            line += f" x {n}" * (n > 1) + "  <- trained on" * trained
            print(f"\033[32m{line}\033[0m" if trained and sys.stdout.isatty() else line)
            row += n
        slots = ["an image" if slot.any() else "all zeros: no image" for slot in sample["images"]]
        print(f"images {tuple(sample['images'].shape)}: {', '.join(slots)}\n")
    sheet, toy = Image.new("RGB", (8 * 68, 4 * 68), "white"), ToyDataset("train", 32, text_fraction=0.0, image_size=64)
    for i in range(32):
        sheet.paste(toy.record(i)["image"][0], (68 * (i % 8) + 2, 68 * (i // 8) + 2))
    sheet.save("toy_data.png")
    print("toy_data.png shows training pictures")
