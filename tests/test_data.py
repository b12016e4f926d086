"""The data: tokenizer, chat template, pictures, batches, toy data, LLaVA's JSON files, and the order of a run."""

import itertools
import json
import pickle
import random
import re
import struct

import pytest
import torch
from conftest import IMAGE_SIZE, PATCH_SIZE, P, picture, record, sample, spoken
from PIL import Image, ImageOps
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

import data

SPECIAL = (data.IM_START, data.IM_END, data.IMAGE_TOKEN)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
MEAN_COLOUR = (122, 116, 104)
PLACES = ("top left", "top right", "bottom left", "bottom right")


def talk(*values, image=None, system=None):
    """A record in which the human and the assistant take turns."""
    turns = [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]
    turns = [{"from": "system", "value": system}] * (system is not None) + turns
    return {"conversations": turns} if image is None else {"image": image, "conversations": turns}


def spelled(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=False)


def supervised(tokenizer, labels):
    return spelled(tokenizer, [label for label in labels if label != data.IGNORE_INDEX])


# --- tokenizer -------------------------------------------------------------------------------------------------------
def test_every_digit_is_a_token_of_its_own():
    tokenizer = data.train_tokenizer(spoken("1234567 1234567 99 99") * 20)
    tokens = tokenizer.encode("1234567 99 a1").tokens
    assert tokens == ["1", "2", "3", "4", "5", "6", "7", "Ġ", "9", "9", "Ġ", "a", "1"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        " two  spaces ",
        "two\nlines\r\n\ttab",
        "naïve café",
        "e\u0301 and \u200f\u202e",
        "العربية 日本語 हिन्दी",
        "👩‍👩‍👧‍👦 🇪🇺",
        "\0\x7f\ufffd\U0010ffff",
        "".join(map(chr, range(256))),
        "<|im_start|>user <image><|im_end|>",
    ],
)
def test_any_text_survives_the_tokenizer(tokenizer, text):
    assert tokenizer.decode(data.words(tokenizer, text)) == text


def test_the_vocabulary_has_the_size_asked_for():
    texts = [f"{a}{b}{c}" for a in "abcdefghijkl" for b in "mnopqrstu" for c in "vwxyzabcdefghijklmnop"]
    assert data.train_tokenizer(spoken(*texts), 300).get_vocab_size() == 300
    assert data.train_tokenizer(spoken(*texts)).get_vocab_size() == 2048


def test_the_roles_are_one_token_each_whatever_the_corpus_holds():
    tokenizer = data.train_tokenizer([])
    for role in ("system", "user", "assistant"):
        assert tokenizer.encode(f"{role}\n").tokens == [role, "Ċ"]


@pytest.fixture
def foreign(tmp_path):
    """A tokenizer.json from elsewhere: it truncates, pads, and adds a token at the start of every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(special_tokens=["<bos>"], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["some words of another corpus"], trainer)
    tokenizer.post_processor = processors.TemplateProcessing("<bos> $A", special_tokens=[("<bos>", 0)])
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=8)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


def test_loading_a_foreign_tokenizer_adds_the_special_tokens_behind_its_own(foreign):
    before, tokenizer = Tokenizer.from_file(str(foreign)).get_vocab(), data.load_tokenizer(foreign)
    assert sorted(tokenizer.token_to_id(token) for token in SPECIAL) == list(range(len(before), len(before) + 3))
    assert before.items() <= tokenizer.get_vocab().items()
    assert tokenizer.decode([tokenizer.token_to_id(token) for token in SPECIAL]) == ""


def test_a_foreign_tokenizer_neither_truncates_nor_pads_nor_adds_a_token(foreign):
    tokenizer = data.load_tokenizer(foreign)
    for text in ("a", "a text of more than four tokens"):
        assert "".join(tokenizer.id_to_token(i) for i in data.words(tokenizer, text)) == text.replace(" ", "Ġ")
        assert len(tokenizer.encode(text).ids) == 1 + len(data.words(tokenizer, text))


def test_special_tokens_typed_in_a_text_stay_text_with_a_foreign_tokenizer(foreign):
    tokenizer = data.load_tokenizer(foreign)
    assert not {tokenizer.token_to_id(token) for token in SPECIAL} & set(data.words(tokenizer, "".join(SPECIAL)))


def test_loading_our_own_tokenizer_changes_nothing(tokenizer, tmp_path):
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = data.load_tokenizer(tmp_path / "tokenizer.json")
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert loaded.encode("a red circle, 17").ids == tokenizer.encode("a red circle, 17").ids


@pytest.mark.parametrize("content", [None, "", "{}", "not JSON"])
def test_a_tokenizer_that_cannot_be_read_is_named(tmp_path, content):
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match=r"tokenizer\.json: no readable tokenizer\.json"):
        data.load_tokenizer(tmp_path / "tokenizer.json")


def test_a_tokenizer_learns_from_every_turn_and_from_nothing_that_is_no_record():
    odd = [None, 5, "text", [], {}, *({"conversations": turns} for turns in (None, 5, True, "text", [None], [{}]))]
    odd += [{"conversations": [{"from": "human", "value": 5}]}, talk("half a surrogate pair \ud83d")]
    found = data.train_tokenizer([talk("aaa", "bbb", system="sss"), *odd, talk("ccc")])
    assert found.get_vocab() == data.train_tokenizer(spoken("sss", "aaa", "bbb", "ccc")).get_vocab()
    assert {"sss", "aaa", "bbb", "ccc"} <= found.get_vocab().keys()


# --- chat template ---------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def word_tokenizer():
    """One token a word, so that an example can be written out."""
    return data.train_tokenizer(spoken("What colour?", "red", "Be brief."))


# A star marks what is learned; Ġ is a space and Ċ the end of a line, as byte-level tokenizers write them.
WRITTEN_OUT = """
    <|im_start|> system Ċ Be Ġbrief . <|im_end|> Ċ
    <|im_start|> user Ċ <image> <image> <image> <image> Ċ What Ġcolour ? <|im_end|> Ċ
    <|im_start|> assistant Ċ red* <|im_end|>* Ċ
"""


def test_the_chat_template_token_by_token(word_tokenizer):
    example = talk("<image>\nWhat colour?", "red", image="x.png", system="Be brief.")
    ids, labels, shown = data.encode(example, word_tokenizer, n_patches=4)
    written = WRITTEN_OUT.split()
    assert [word_tokenizer.id_to_token(i) for i in ids] == [token.rstrip("*") for token in written]
    learned = [token.endswith("*") for token in written]
    assert labels == [i if learns else data.IGNORE_INDEX for i, learns in zip(ids, learned, strict=True)]
    assert shown == ["x.png"]


def test_in_several_turns_each_answer_is_supervised_with_its_end_token(tokenizer):
    ids, labels, *_ = data.encode(talk("One?", "a red circle", "Two?", "two", "Three?", ""), tokenizer, P)
    turns = ("user\nOne?", "assistant\na red circle", "user\nTwo?", "assistant\ntwo", "user\nThree?", "assistant\n")
    assert spelled(tokenizer, ids) == "".join(f"<|im_start|>{turn}<|im_end|>\n" for turn in turns)
    assert supervised(tokenizer, labels) == "a red circle<|im_end|>two<|im_end|><|im_end|>"
    assert all(label in (i, data.IGNORE_INDEX) for i, label in zip(ids, labels, strict=True))


def test_a_system_turn_is_read_and_not_learned(tokenizer):
    plain, with_system = (data.encode(talk("a", "b", system=s), tokenizer, P) for s in (None, "Answer in one word."))
    head = len(with_system[0]) - len(plain[0])
    assert spelled(tokenizer, with_system[0][:head]) == "<|im_start|>system\nAnswer in one word.<|im_end|>\n"
    assert with_system[0][head:] == plain[0]
    assert with_system[1] == [data.IGNORE_INDEX] * head + plain[1]


def test_a_record_that_ends_with_the_human_becomes_a_prompt_for_the_assistant(tokenizer):
    whole, *_ = data.encode(talk("One?", "a red circle", "Two?", "blue"), tokenizer, P)
    ids, labels, *_ = data.encode(talk("One?", "a red circle", "Two?"), tokenizer, P)
    assert spelled(tokenizer, ids).endswith("Two?<|im_end|>\n<|im_start|>assistant\n")
    assert ids == whole[: len(ids)]
    assert supervised(tokenizer, labels) == "a red circle<|im_end|>"
    assert len(labels) == len(ids)


@pytest.mark.parametrize("n_patches", [1, 4, 9])
def test_every_marker_becomes_one_image_token_a_patch_where_it_stands(tokenizer, n_patches):
    ids, _, shown = data.encode(talk("a<image>b<image><image>", "c", image=["x", "y", "z"]), tokenizer, n_patches)
    image = "<image>" * n_patches
    assert f"user\na{image}b{image}{image}<|im_end|>" in spelled(tokenizer, ids)
    assert ids.count(tokenizer.token_to_id(data.IMAGE_TOKEN)) == 3 * n_patches
    assert shown == ["x", "y", "z"]


@pytest.mark.parametrize("images", [None, []])
def test_a_marker_in_a_text_only_record_stays_text(tokenizer, images):
    ids, _, shown = data.encode(talk("an <image> tag", "x", image=images), tokenizer, P)
    assert tokenizer.token_to_id(data.IMAGE_TOKEN) not in ids
    assert "user\nan <image> tag<|im_end|>" in spelled(tokenizer, ids)
    assert shown == []


@pytest.mark.parametrize("in_worker", [False, True])
@pytest.mark.parametrize("role", ["system", "human", "gpt"])
@pytest.mark.parametrize("token", SPECIAL)
def test_special_tokens_typed_in_a_turn_stay_text(tokenizer, token, role, in_worker):
    if in_worker:  # a tokenizer is pickled on its way to a worker process, and forgets that special tokens are text
        tokenizer = pickle.loads(pickle.dumps(tokenizer))
    image = None if (token, role) == (data.IMAGE_TOKEN, "human") else ["x.png"]
    values = {"system": "s", "human": "<image>h" if image else "h", "gpt": "g"}
    count = [
        data.encode(talk(v["human"], v["gpt"], image=image, system=v["system"]), tokenizer, P)[0].count(
            tokenizer.token_to_id(token)
        )
        for v in (values, values | {role: f"{values[role]} {token}"})
    ]
    assert count[0] == count[1]


def test_a_conversation_is_cut_after_the_last_answer_that_fits(tokenizer):
    values = ("<image>\nOne?", "a red circle", "Two?", "two", "<image><image> Three?", "a green cross", "Four?", "four")
    wholes = [
        data.encode(talk(*values[:n], image=["x"] * m), tokenizer, P) for n, m in ((2, 1), (4, 1), (6, 3), (8, 3))
    ]
    for block_size in range(1, len(wholes[-1][0]) + 2):
        fitting = [whole for whole in wholes if len(whole[0]) <= block_size]
        if fitting:
            assert data.encode(talk(*values, image=["x"] * 3), tokenizer, P, block_size) == fitting[-1]
        else:
            with pytest.raises(ValueError, match=f"^too long: .*the {block_size} tokens that the block size allows"):
                data.encode(talk(*values, image=["x"] * 3), tokenizer, P, block_size)


def test_without_a_block_size_nothing_is_cut(tokenizer):
    ids, _, _ = data.encode(talk(*["words and more words"] * 200), tokenizer, P)
    assert spelled(tokenizer, ids).count("words and more words") == 200


# --- records ---------------------------------------------------------------------------------------------------------
GOOD = [
    talk("a"),
    talk("a", "b"),
    talk("a", "b", "c"),
    talk("a", "b", "c", "d", system="s"),
    talk("a <image>", "b", image="x.png"),
    talk("<image>", "b", "<image>", "d", image=["x.png", picture(0)]),
    talk("no image for this <image>", "b"),
    talk("<image>", "an answer with <image>", image="x.png", system="<image>"),
]
BAD = [
    ("no conversation", None),
    ("no conversation", []),
    ("no conversation", "text"),
    ("no conversation", {}),
    ("no conversation", {"conversations": "text"}),
    ("no conversation", {"conversations": {"from": "human", "value": "a"}}),
    ("no conversation", {"conversations": ["a", "b"]}),
    ("no conversation", {"conversations": []}),
    ("wrong roles", {"conversations": [{"from": "system", "value": "s"}]}),
    ("wrong roles", {"conversations": [{"from": "gpt", "value": "a"}]}),
    ("no conversation", {"conversations": [{"value": "a"}]}),
    ("wrong roles", {"conversations": [{"from": ["human"], "value": "a"}]}),
    ("wrong roles", {"conversations": [{"from": "human", "value": "a"}, {"from": "human", "value": "b"}]}),
    ("wrong roles", {"conversations": [{"from": "human", "value": "a"}, {"from": "system", "value": "b"}]}),
    ("wrong roles", {"conversations": [{"from": "human", "value": "a"}, {"from": "assistant", "value": "b"}]}),
    ("no conversation", {"conversations": [{"from": "human"}]}),
    ("no conversation", talk("a", None)),
    ("no conversation", talk("a", ["b"])),
    ("wrong image", talk("<image>", "b", image=5)),
    ("wrong image", talk("<image>", "b", image={"path": "x.png"})),
    ("wrong image", talk("<image><image>", "b", image=["x.png", None])),
    ("wrong number of markers", talk("a", "b", image="x.png")),
    ("wrong number of markers", talk("<image><image>", "b", image="x.png")),
    ("wrong number of markers", talk("<image>", "b", image=["x.png", "y.png"])),
    ("wrong number of markers", talk("a", "<image>", image="x.png", system="<image>")),
    ("wrong number of markers", talk("a <ima", "b", "ge>", "d", image="x.png")),
]


@pytest.mark.parametrize("good", GOOD)
def test_a_good_record_passes_the_check(good):
    assert data.fault(good) is None


@pytest.mark.parametrize(("reason", "bad"), BAD)
def test_a_bad_record_is_refused_with_its_reason(tokenizer, reason, bad):
    assert data.fault(bad).startswith(f"{reason}: ")
    with pytest.raises(ValueError, match=f"^{reason}: "):
        data.encode(bad, tokenizer, P)


def test_a_wrong_number_of_markers_is_told_with_both_numbers():
    told = data.fault(talk("<image>", "a", "<image>", "b", image=["x", "y", "z"]))
    assert told.endswith("2 <image> in human turns for 3 images")


# --- samples and batches ---------------------------------------------------------------------------------------------
def test_a_text_only_sample_has_one_slot_of_zeros(tokenizer):
    assert torch.equal(sample(tokenizer)["images"], torch.zeros(1, 3, IMAGE_SIZE, IMAGE_SIZE))


def test_a_sample_holds_its_pictures_in_order(tokenizer):
    pictures = record(images=3, seed=7)["image"]
    slots = sample(tokenizer, images=3, seed=7)["images"]
    assert torch.equal(slots, torch.stack([data.to_tensor(image, IMAGE_SIZE) for image in pictures]))


def test_a_sample_is_its_encoding(tokenizer):
    ids, labels, *_ = data.encode(record(images=2), tokenizer, P)
    made = sample(tokenizer, images=2)
    assert made["input_ids"].tolist() == ids
    assert made["labels"].tolist() == labels
    assert made["input_ids"].dtype == made["labels"].dtype == torch.long


def test_cutting_a_sample_cuts_its_pictures_too(tokenizer):
    images = [picture(i) for i in range(3)]
    long = talk("<image>One?", "one", "<image><image>Two?", "two", image=images)
    n = len(data.encode(talk("<image>One?", "one", image=images[:1]), tokenizer, P)[0])
    made = data.make_sample(long, tokenizer, IMAGE_SIZE, PATCH_SIZE, block_size=n)
    assert len(made["input_ids"]) == n
    assert torch.equal(made["images"], data.to_tensor(images[0], IMAGE_SIZE)[None])


@pytest.mark.parametrize("images", [(0,), (1,), (3,), (0, 0), (1, 1), (0, 1), (2, 0), (0, 1, 2), (3, 0, 1, 0)])
def test_collate_gives_any_mixture_the_same_shape(tokenizer, images):
    samples = [sample(tokenizer, images=n, seed=i, answer="word " * (5 - i)) for i, n in enumerate(images)]
    made = data.collate(samples)
    T, M = max(len(s["input_ids"]) for s in samples), max(1, *images, 1)
    assert set(made) == {"input_ids", "labels", "pixel_values"}
    assert made["input_ids"].shape == made["labels"].shape == (len(images), T)
    assert made["pixel_values"].shape == (len(images), M, 3, IMAGE_SIZE, IMAGE_SIZE)
    assert (made["input_ids"].dtype, made["labels"].dtype) == (torch.long, torch.long)
    for row, (s, n) in enumerate(zip(samples, images, strict=True)):
        t = len(s["input_ids"])
        assert torch.equal(made["input_ids"][row, :t], s["input_ids"])
        assert torch.equal(made["labels"][row, :t], s["labels"])
        assert (made["input_ids"][row, t:] == 0).all()
        assert (made["labels"][row, t:] == data.IGNORE_INDEX).all()
        assert torch.equal(made["pixel_values"][row, :n], s["images"][:n])
        assert not made["pixel_values"][row, n:].any()


# --- pictures --------------------------------------------------------------------------------------------------------
def test_no_8_bit_value_of_any_channel_normalises_to_zero():
    every_value = Image.frombytes("RGB", (16, 16), bytes(v for value in range(256) for v in (value,) * 3))
    pixels = data.to_tensor(every_value, 16).flatten(1)
    assert pixels.shape == (3, 256)
    assert (pixels != 0).all()
    assert (pixels.bfloat16() != 0).all()


def test_pixels_are_normalised_as_clips():
    image = picture(1, 8)
    pixels = data.to_tensor(image, 8)
    for x, y in itertools.product(range(8), range(8)):
        wanted = [(v / 255 - m) / s for v, m, s in zip(image.getpixel((x, y)), CLIP_MEAN, CLIP_STD, strict=True)]
        assert pixels[:, y, x].tolist() == pytest.approx(wanted, abs=1e-5)


def to_image(pixels):
    """(3, H, W) normalised -> PIL image: `to_tensor` undone."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    pixels = ((pixels * std + mean) * 255).round().byte().permute(1, 2, 0)
    return Image.frombytes("RGB", pixels.shape[1::-1], bytes(pixels.flatten().tolist()))


def test_every_value_of_a_pixel_survives():
    every_value = Image.frombytes("RGB", (16, 16), bytes(v for i in range(256) for v in (i, 255 - i, i * 7 % 256)))
    assert to_image(data.to_tensor(every_value, 16)).tobytes() == every_value.tobytes()


def saved(folder, image, name="picture.png", **options):
    image.save(folder / name, **options)
    return folder / name


def test_a_picture_that_fits_is_left_as_it_is(tmp_path):
    image = picture(3)
    assert data.open_image(saved(tmp_path, image)).tobytes() == image.tobytes()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB", "L"])
def test_what_is_transparent_turns_white(tmp_path, mode):
    image, options = Image.new("RGBA", (2, 1), (0, 0, 0, 255)), {}
    image.putpixel((0, 0), (40, 40, 40, 0))
    if mode == "P":
        image = Image.new("P", (2, 1))
        image.putpalette([40, 40, 40, 0, 0, 0])
        image.putpixel((1, 0), 1)
        options = {"transparency": 0}
    elif mode in ("RGB", "L"):  # one colour stands for transparent
        image, options = image.convert(mode), {"transparency": (40, 40, 40) if mode == "RGB" else 40}
    else:
        image = image.convert(mode)
    opened = data.open_image(saved(tmp_path, image, **options))
    assert opened.mode == "RGB"
    assert [opened.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (0, 0, 0)]


def test_what_is_half_transparent_is_mixed_with_white():
    assert data.open_image(Image.new("RGBA", (1, 1), (255, 0, 55, 51))).getpixel((0, 0)) == (255, 204, 215)


# where the stored top left pixel belongs, and whether width and height swap
ORIENTATIONS = {1: (0, 0), 2: (1, 0), 3: (1, 1), 4: (0, 1), 5: (0, 0), 6: (1, 0), 7: (1, 1), 8: (0, 1)}


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_exif_rotation_is_applied(tmp_path, orientation):
    image, exif = Image.new("RGB", (4, 2)), Image.Exif()
    image.putpixel((0, 0), (255, 0, 0))
    exif[0x112] = orientation
    opened = data.open_image(saved(tmp_path, image, exif=exif))
    right, bottom = ORIENTATIONS[orientation]
    assert opened.size == ((4, 2) if orientation < 5 else (2, 4))
    assert opened.getpixel((right * (opened.width - 1), bottom * (opened.height - 1))) == (255, 0, 0)


@pytest.mark.parametrize("size", [(32, 8), (8, 32), (4, 1), (1, 4)])
def test_other_shapes_are_letterboxed_with_the_mean_colour(size):
    square = to_image(data.to_tensor(Image.new("RGB", size, "red"), 16))
    for along, across in itertools.product(range(16), range(16)):
        wanted = (255, 0, 0) if 6 <= across < 10 else MEAN_COLOUR
        assert square.getpixel((along, across) if size[0] > size[1] else (across, along)) == wanted


@pytest.mark.parametrize("size", [(1000, 3), (3, 1000)])
def test_a_picture_thinner_than_a_pixel_stays_a_line(size):
    square = to_image(data.to_tensor(Image.new("RGB", size, "red"), 16))
    assert sorted(square.getcolors(), reverse=True) == [(16 * 15, MEAN_COLOUR), (16, (255, 0, 0))]


def test_scaling_down_does_not_alias():
    stripes = Image.new("RGB", (64, 64), "white")
    stripes.paste("black", (0, 0, 64, 64), Image.frombytes("L", (64, 64), bytes([255, 0] * 2048)))
    small = to_image(data.to_tensor(stripes, 16))
    assert all(low > 110 and high < 145 for low, high in small.getextrema())


def test_scaling_up_is_smooth():
    edge = Image.new("RGB", (2, 2), "black")
    edge.paste("white", (1, 0, 2, 2))
    row = [to_image(data.to_tensor(edge, 8)).getpixel((x, 4))[0] for x in range(8)]
    assert row == sorted(row)
    assert len(set(row)) > 4


@pytest.mark.parametrize(
    ("name", "options"), [("a.jpg", {}), ("a.webp", {}), ("a.png", {}), ("a.gif", {}), ("a.bmp", {})]
)
def test_the_usual_formats_are_read(tmp_path, name, options):
    opened = data.open_image(saved(tmp_path, Image.new("RGB", (20, 10), (200, 80, 40)), name, **options))
    assert (opened.mode, opened.size) == ("RGB", (20, 10))
    assert opened.getpixel((10, 5)) == pytest.approx((200, 80, 40), abs=3)


@pytest.mark.parametrize("mode", ["1", "L", "CMYK", "YCbCr"])
def test_other_colour_modes_become_rgb(mode):
    opened = data.open_image(Image.new("RGB", (2, 2), "white").convert(mode))
    assert (opened.mode, opened.getpixel((0, 0))) == ("RGB", (255, 255, 255))


@pytest.mark.parametrize("folder", ["", ".", "pictures", "pictures/", "a/../pictures", "../pictures", "/data/pictures"])
@pytest.mark.parametrize("name", ["a.png", "sub/a.png", "sub/../a.png", "..a.png", "./a.png"])
def test_a_picture_inside_of_its_folder_is_found(tmp_path, monkeypatch, folder, name):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    wanted = (tmp_path / "work" / folder / name).resolve()
    assert (tmp_path / "work" / data.image_path(name, folder)).resolve() == wanted


@pytest.mark.parametrize("folder", [".", "pictures", "pictures/", "../pictures", "/data/pictures"])
@pytest.mark.parametrize(
    "name", ["../a.png", "..", ".", "", "sub/../../a.png", "../pictures2/a.png", "/etc/passwd", "/data/pictures2/a.png"]
)
def test_the_name_of_a_picture_cannot_leave_its_folder(folder, name):
    with pytest.raises(ValueError, match=f"^image outside of the folder: {re.escape(name)}"):
        data.image_path(name, folder)


@pytest.mark.parametrize(("size", "refused"), [((10, 10), False), ((201, 1), True), ((50, 50), True)])
def test_decompression_bombs_are_refused(tmp_path, monkeypatch, size, refused):
    path = saved(tmp_path, Image.new("RGB", size), "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    if refused:
        with pytest.raises(ValueError, match=r"image can't be read: .*bomb\.png.*decompression bomb"):
            data.open_image(path)
    else:
        assert data.open_image(path).size == size


def test_a_picture_that_cannot_be_read_is_named(tmp_path):
    """A missing file, a folder, no picture at all, every stage of truncation."""
    whole = saved(tmp_path, picture(1), "whole.jpg").read_bytes()
    pieces = {f"cut-{n}.jpg": whole[:n] for n in range(0, len(whole) // 2, 40)} | {"text.png": b"no picture"}
    (tmp_path / "folder.png").mkdir()
    for name, content in pieces.items():
        (tmp_path / name).write_bytes(content)
    for name in ("missing.png", "folder.png", *pieces):
        with pytest.raises(ValueError, match=f"^image can't be read: .*{re.escape(name)}"):
            data.open_image(tmp_path / name)


@pytest.mark.parametrize("error", [struct.error("exif"), SyntaxError("broken PNG"), EOFError(), IndexError("tile")])
def test_whatever_pillow_raises_on_a_damaged_file_is_named(tmp_path, monkeypatch, error):
    def fail(image):
        raise error

    saved(tmp_path, picture(1), "a.png")
    monkeypatch.setattr(ImageOps, "exif_transpose", fail)
    with pytest.raises(ValueError, match=r"^image can't be read: \S+a\.png: "):
        data.open_image(tmp_path / "a.png")


# --- toy data --------------------------------------------------------------------------------------------------------
SPLITS = ("train", "test", "pairs", "transfer")
CORNERS = {"circle": "none", "square": "four", "triangle": "three"}
PALETTE = {"red": (225, 50, 50), "green": (50, 170, 70), "blue": (70, 100, 235)}
PALETTE |= {"yellow": (245, 215, 60), "purple": (165, 80, 205), "grey": (130, 130, 130)}
PALETTE |= {"white": (240, 240, 240), "cyan": (60, 205, 225)}
# Every question of the toy data: the first group about a picture, the next about two, the last without one.
ABOUT_ONE = {
    "colour": r"What colour is the (\w+)\?",
    "place": r"Where is the (\w+)\?",
    "follow-up": r"Where is it\?",
    "content": r"What is at the (\w+ \w+)\?",
    "count": r"How many shapes are there\?",
    "corners": r"How many corners has the shape at the (\w+ \w+)\?",
    "describe": r"Describe the image\.",
}
ABOUT_TWO = {"which": r"Which picture holds the (\w+)\?", "show": r"What do the images show\?"}
WITHOUT = {
    "larger": r"Which is larger, (\d+) or (\d+)\?",
    "plus": r"What is (\d+) plus (\d+)\?",
    "reverse": r"Reverse: (.*)",
    "read": r"Picture this: (.*?)\. (.*)",
    "told corners": r"How many corners has an? (\w+)\?",
}


def kind_of(question):
    """-> (name of the question, what it asks for)."""
    patterns = ABOUT_ONE | ABOUT_TWO | WITHOUT
    (found,) = ((name, m.groups()) for name in patterns if (m := re.fullmatch(patterns[name], question)))
    return found


def phrase(colour, kind):
    return f"a {kind} in {colour}"


def told_scenes(text):
    """-> the scenes that a text tells of, as `solve` takes them."""
    if text.startswith("first"):
        return [{"": (colour, kind)} for kind, colour in re.findall(r"a (\w+) in (\w+)", text)]
    shapes = re.findall(r"at the (\w+ \w+) a (\w+) in (\w+)", text)
    return [{place: (colour, kind) for place, kind, colour in shapes}]


def solve(question, scenes, previous=""):
    """The answer to a toy question, worked out anew. A scene is {place: (colour, kind)}."""
    name, asked = kind_of(question)
    if name == "larger":
        return str(max(map(int, asked)))
    if name == "plus":
        return str(sum(map(int, asked)))
    if name == "reverse":
        return " ".join(asked[0].split()[::-1])
    if name == "read":
        return solve(asked[1], told_scenes(asked[0]))
    if name == "told corners":
        return f"a {asked[0]} has {CORNERS[asked[0]]}"
    if name == "which":
        held = [any(kind == asked[0] for _, kind in scene.values()) for scene in scenes]
        ((place, (colour, _)),) = scenes[held.index(True)].items()
        where = f"at the {place} of" if place else "in"
        return f"{phrase(colour, asked[0])} is {where} the {('first', 'second')[held.index(True)]}"
    if name == "show":
        return "first {}, second {}".format(*(phrase(*shape) for scene in scenes for shape in scene.values()))
    (scene,) = scenes
    by_kind = {kind: (place, colour) for place, (colour, kind) in scene.items()}
    if name == "describe":
        return ", ".join(f"at the {place} {phrase(*shape)}" for place, shape in scene.items())
    if name == "count":
        return ("zero", "one", "two", "three")[len(scene)]
    if name == "follow-up":
        return solve(f"Where is the {kind_of(previous)[1][0]}?", scenes)
    if name == "colour":
        return phrase(by_kind[asked[0]][1], asked[0])
    if name == "place":
        place, colour = by_kind[asked[0]]
        return f"{phrase(colour, asked[0])} is at the {place}"
    if name == "content":
        return f"at the {asked[0]} " + (phrase(*scene[asked[0]]) if asked[0] in scene else "nothing")
    assert name == "corners"
    kind = scene[asked[0]][1]
    return f"a {kind} has {CORNERS[kind]}"


@pytest.fixture(scope="module")
def toy():
    """-> {split: [(record, its scenes), ...]}: many records, and what their pictures were painted from."""
    painted, paint, made = [], data.paint, {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "paint", lambda rng, scene, size: painted.append(scene) or paint(rng, scene, size))
        for split in SPLITS:
            dataset, made[split] = data.ToyDataset(split, 2000, image_size=16), []
            for i in range(len(dataset)):
                painted.clear()
                made[split].append((dataset.record(i), list(painted)))
    return made


def exchanges(toy_record):
    values = [turn["value"] for turn in toy_record["conversations"]]
    return [
        (question.replace("<image>\n", ""), answer) for question, answer in zip(values[::2], values[1::2], strict=True)
    ]


def asks(toy, split, pictures):
    """Every (name of the question, what it asks for, answer) of a split's records with so many pictures."""
    asked = [pair for made, scenes in toy[split] if len(scenes) == pictures for pair in exchanges(made)]
    return [(*kind_of(question), answer) for question, answer in asked]


def scenes_of(toy, split):
    return {tuple(scene) for _, scenes in toy[split] for scene in scenes}


@pytest.mark.parametrize("split", SPLITS)
def test_the_answers_of_the_toy_data_are_right(toy, split):
    for made, scenes in toy[split]:
        scenes = [{PLACES[cell]: (colour, kind) for cell, colour, kind in scene} for scene in scenes]
        previous = ""
        for question, answer in exchanges(made):
            assert answer == solve(question, scenes, previous), (question, scenes)
            if kind_of(question)[0] == "read":  # the questions that follow are about the same scene
                scenes = told_scenes(kind_of(question)[1][0])
            previous = question


def test_a_picture_shows_its_scene():
    """Each shape lies in its own quarter, in its colour and its form."""
    rng = random.Random(0)
    for cell, colour, kind in itertools.product(range(4), data.COLOURS, data.KINDS):
        image = data.paint(rng, [(cell, colour, kind)], 128)
        background = image.getpixel((0, 0) if cell else (127, 127))
        assert max(background) < 50
        (found,) = (pixel for _, pixel in image.getcolors() if pixel != background)
        assert (
            min(PALETTE, key=lambda name: sum((a - b) ** 2 for a, b in zip(PALETTE[name], found, strict=True)))
            == colour
        )
        shape = image.convert("L").point(lambda v: 255 * (v > 50))
        left, top, right, bottom = shape.getbbox()
        assert {left // 64, (right - 1) // 64} == {cell % 2}
        assert {top // 64, (bottom - 1) // 64} == {cell // 2}
        corners = [shape.getpixel((x, y)) > 0 for y in (top, bottom - 1) for x in (left, right - 1)]
        assert corners == {"square": [True] * 4, "triangle": [False, False, True, True]}.get(kind, [False] * 4)
        full = shape.histogram()[255] / ((right - left) * (bottom - top))
        assert full == pytest.approx({"square": 1, "circle": 0.785, "triangle": 0.5}[kind], abs=0.05)


def test_a_picture_shows_all_shapes_of_its_scene():
    scene = [(0, "red", "square"), (1, "green", "circle"), (2, "blue", "triangle"), (3, "grey", "circle")]
    assert len(data.paint(random.Random(0), scene, 64).getcolors()) == 5


def test_the_shapes_of_a_picture_vary_in_place_size_and_shade():
    rng = random.Random(0)
    images = [data.paint(rng, [(3, "blue", "square")], 128) for _ in range(300)]
    boxes = [image.convert("L").point(lambda v: 255 * (v > 50)).getbbox() for image in images]
    widths = [right - left for left, _, right, _ in boxes]
    assert min(widths) == pytest.approx(0.32 * 128, abs=2)
    assert max(widths) == pytest.approx(0.45 * 128, abs=2)
    for start, end in ((0, 2), (1, 3)):
        assert min(box[start] for box in boxes) < 66
        assert max(box[end] for box in boxes) > 125
    shades = [max(image.getcolors(), key=lambda entry: entry[1][2])[1] for image in images]
    for channel, base in enumerate(PALETTE["blue"]):
        assert min(shade[channel] for shade in shades) == base - 20
        assert max(shade[channel] for shade in shades) == base + 10


def same(one, other):
    """Do two records agree in every word and pixel?"""
    pixels = [[image.tobytes() for image in made.get("image", [])] for made in (one, other)]
    return one["conversations"] == other["conversations"] and pixels[0] == pixels[1]


@pytest.mark.parametrize("split", SPLITS)
def test_a_toy_record_depends_on_seed_split_and_index_alone(split):
    small, large = data.ToyDataset(split, 20, seed=3), data.ToyDataset(split, 10**6, seed=3)
    backwards = [large.record(i) for i in reversed(range(20))][::-1]
    assert all(same(small.record(i), backwards[i]) for i in range(20))


def test_another_seed_split_or_index_gives_another_toy_record():
    first = data.ToyDataset("test", 50, seed=1)
    others = [
        data.ToyDataset("test", 50, seed=2),
        *(data.ToyDataset(split, 50, seed=1) for split in ("train", "pairs")),
    ]
    for other in others:
        assert sum(same(first.record(i), other.record(i)) for i in range(50)) < 5
    assert sum(same(first.record(i), first.record(i + 1)) for i in range(49)) < 5


def test_no_scene_of_the_held_out_splits_is_in_a_training_picture(toy):
    training = scenes_of(toy, "train")
    assert not training & scenes_of(toy, "test")
    assert not training & scenes_of(toy, "pairs")
    assert all(len(scenes_of(toy, split)) > 200 for split in ("train", "test", "pairs"))


def test_held_out_pairs_are_in_no_training_picture_and_in_every_record_of_their_split(toy):
    assert len(data.HELD_OUT_PAIRS) == 3
    for split in ("train", "test", "transfer"):
        assert not {shape[1:] for scene in scenes_of(toy, split) for shape in scene} & data.HELD_OUT_PAIRS
    shapes = [{shape[1:] for scene in scenes for shape in scene} for _, scenes in toy["pairs"] if scenes]
    shown = [pairs & data.HELD_OUT_PAIRS for pairs in shapes]
    assert all(shown)
    assert set.union(*shown) == data.HELD_OUT_PAIRS


def test_questions_of_the_pairs_split_are_about_held_out_pairs(toy):
    kinds = {(colour, kind) for _, colour, kind in {shape for scene in scenes_of(toy, "pairs") for shape in scene}}
    assert len(kinds) == len(data.COLOURS) * len(data.KINDS)
    for made, scenes in toy["pairs"]:
        for question, _ in exchanges(made) if scenes else ():
            name, asked = kind_of(question)
            if name in ("colour", "place", "which"):
                (pair,) = (shape[1:] for scene in scenes for shape in scene if shape[2] == asked[0])
                assert pair in data.HELD_OUT_PAIRS


def test_training_pictures_show_every_other_pair_in_every_place(toy):
    shapes = {shape for scene in scenes_of(toy, "train") for shape in scene}
    pairs = set(itertools.product(data.COLOURS, data.KINDS)) - data.HELD_OUT_PAIRS
    assert shapes == {(cell, *pair) for cell in range(4) for pair in pairs}
    assert len(data.KINDS) >= 3
    assert len(data.COLOURS) >= 6
    assert {len(scene) for scene in scenes_of(toy, "train")} == {1, 2, 3}


@pytest.mark.parametrize("split", SPLITS)
def test_the_shapes_of_a_scene_differ_in_place_and_kind(toy, split):
    for scene in scenes_of(toy, split):
        cells, _, kinds = zip(*scene, strict=True)
        assert list(cells) == sorted(set(cells))
        assert len(set(kinds)) == len(kinds)


def operands(toy, split):
    """-> {skill: set of operands} of the text-only records; a told scene is the operand of what is asked about it."""
    found = {}
    for name, asked, _ in asks(toy, split, 0):
        found.setdefault(name, set()).add(asked[:1] if name == "read" else asked)
    return found


@pytest.mark.parametrize("split", ["test", "pairs", "transfer"])
def test_operands_of_the_held_out_splits_are_in_no_training_exercise(toy, split):
    training, held_out = operands(toy, "train"), operands(toy, split)
    assert set(held_out) == {"larger", "plus", "reverse", "read"}
    for skill, values in held_out.items():
        assert len(values) > 50
        assert not values & training[skill], skill


def test_the_operands_cover_their_range(toy):
    training = operands(toy, "train")
    plus, larger = ([tuple(map(int, pair)) for pair in training[skill]] for skill in ("plus", "larger"))
    for numbers, top in (
        ([a for a, _ in plus], 99),
        ([b for _, b in plus], 9),
        ([n for pair in larger for n in pair], 99),
    ):
        assert (min(numbers), max(numbers)) == (0, top)
        assert len(set(numbers)) > 0.9 * top
    assert all(a != b for a, b in larger)
    lists = [asked[0].split() for asked in training["reverse"]]
    assert {len(words) for words in lists} == {2, 3, 4}
    assert {word for words in lists for word in words} == set(data.WORDS)
    assert all(len(set(words)) == len(words) for words in lists)
    assert training["told corners"] == {(kind,) for kind in data.KINDS}


def test_words_tell_of_pairs_that_no_training_picture_shows(toy):
    told = {shape for (text,) in operands(toy, "train")["read"] for shape in re.findall(r"a (\w+) in (\w+)", text)}
    assert told == set(itertools.product(data.KINDS, data.COLOURS))


def test_one_in_eight_is_held_out():
    keys = list(itertools.product(range(100), range(10)))
    assert sum(data.is_held_out(("plus", key)) for key in keys) == pytest.approx(len(keys) / 8, rel=0.1)


@pytest.mark.parametrize("fraction", [0.0, 0.3, 1.0])
def test_the_share_of_text_is_the_one_asked_for(fraction):
    dataset = data.ToyDataset("train", 1000, text_fraction=fraction, image_size=8)
    share = sum("image" not in dataset.record(i) for i in range(1000)) / 1000
    assert share == pytest.approx(fraction, abs=0.05 if 0 < fraction < 1 else 0)


@pytest.mark.parametrize("split", SPLITS)
def test_half_of_the_toy_data_is_text_if_nothing_else_is_asked_for(toy, split):
    assert sum(not scenes for _, scenes in toy[split]) / len(toy[split]) == pytest.approx(0.5, abs=0.04)


def test_corners_of_one_kind_are_told_in_training_and_never_asked_in_a_picture(toy):
    told_only = f"a {data.TOLD_ONLY} has {CORNERS[data.TOLD_ONLY]}"
    assert ("told corners", (data.TOLD_ONLY,), told_only) in asks(toy, "train", 0)
    for split in ("train", "test", "pairs"):
        asked = {answer for name, _, answer in asks(toy, split, 1) if name == "corners"}
        assert asked == {f"a {kind} has {n}" for kind, n in CORNERS.items() if kind != data.TOLD_ONLY}


def test_every_picture_of_the_transfer_split_asks_for_the_fact_that_was_told(toy):
    asked = asks(toy, "transfer", 1)
    assert len(asked) > 1000
    assert {(name, answer) for name, _, answer in asked} == {
        ("corners", f"a {data.TOLD_ONLY} has {CORNERS[data.TOLD_ONLY]}")
    }
    assert {place for _, (place,), _ in asked} == set(PLACES)


@pytest.mark.parametrize("split", ["train", "test", "pairs"])
def test_every_kind_of_question_and_exercise_is_asked(toy, split):
    about_one = asks(toy, split, 1)
    names = [name for name, *_ in about_one]
    assert set(names) == set(ABOUT_ONE)
    assert all(names.count(name) > 30 for name in ABOUT_ONE)
    assert "nothing" in {answer.split()[-1] for name, _, answer in about_one if name == "content"}
    texts = [kind_of(exchanges(made)[0][0])[0] for made, scenes in toy[split] if not scenes]
    skills = set(WITHOUT) - ({"told corners"} if split != "train" else set())
    assert set(texts) == skills
    assert all(texts.count(skill) > 30 for skill in skills)


def test_most_questions_about_a_place_are_about_one_that_holds_a_shape(toy):
    """A scene of one to three shapes leaves half of the places empty."""
    answers = [answer.split()[-1] for name, _, answer in asks(toy, "train", 1) if name == "content"]
    assert answers.count("nothing") / len(answers) == pytest.approx(0.25, abs=0.1)


def test_a_told_scene_is_asked_every_kind_of_question(toy):
    asked = [kind_of(question)[0] for name, (_, question), _ in (a for a in asks(toy, "train", 0) if a[0] == "read")]
    assert set(asked) == {"colour", "place", "content", "corners", "count", "which", "show"}


@pytest.mark.parametrize("split", ["train", "test", "pairs"])
def test_some_records_compare_two_pictures(toy, split):
    counts = [len(scenes) for _, scenes in toy[split] if scenes]
    assert set(counts) == {1, 2}
    assert counts.count(2) / len(counts) == pytest.approx(0.2, abs=0.04)
    which = [answer for name, _, answer in asks(toy, split, 2) if name == "which"]
    assert len(which) / counts.count(2) == (1 if split == "train" else pytest.approx(0.5, abs=0.1))
    assert sum("first" in answer for answer in which) / len(which) == pytest.approx(0.5, abs=0.15)


def test_the_transfer_split_shows_one_picture_at_a_time(toy):
    assert {len(scenes) for _, scenes in toy["transfer"]} == {0, 1}


@pytest.mark.parametrize("split", SPLITS)
def test_toy_records_are_good_records(toy, split):
    for index, (made, scenes) in enumerate(toy[split]):
        assert data.fault(made) is None
        assert made["id"] == f"{split}-{index}"
        assert len(made.get("image", [])) == len(scenes)
        first, *others = [turn["value"] for turn in made["conversations"]]
        assert first.startswith("<image>\n" * len(scenes))
        assert not any("<image>" in value for value in (first[len("<image>\n") * len(scenes) :], *others))


@pytest.mark.parametrize("split", ["test", "pairs", "transfer"])
def test_held_out_records_ask_one_thing(toy, split):
    for made, _ in toy[split]:
        names = [kind_of(question)[0] for question, _ in exchanges(made)]
        assert len(names) == 1 or names == ["colour", "follow-up"]


def test_a_training_picture_is_described_or_followed_up_or_asked_three_times(toy):
    asked = [[kind_of(q)[0] for q, _ in exchanges(made)] for made, scenes in toy["train"] if len(scenes) == 1]
    described, followed, looked_up = [], [], []
    for names in asked:
        (described if names == ["describe"] else followed if "follow-up" in names else looked_up).append(names)
    for lesson, share in ((described, 0.25), (followed, 0.25), (looked_up, 0.5)):
        assert len(lesson) / len(asked) == pytest.approx(share, abs=0.05)
    look_ups = {"colour": 2, "place": 2, "content": 2, "corners": 1, "count": 1}
    assert all(names[:2] == ["colour", "follow-up"] and len(names) == 3 for names in followed)
    assert {third for *_, third in followed} == set(look_ups)
    assert all(len(names) == 3 for names in looked_up)
    for i in range(3):  # in any order: a question that only ever came second is not answered when it comes first
        for name in ("colour", "place", "content"):
            assert sum(names[i] == name for names in looked_up) / len(looked_up) == pytest.approx(0.25, abs=0.06)
        assert {names[i] for names in looked_up} == set(look_ups)


@pytest.mark.parametrize("split", ["train", "test", "pairs"])
def test_two_pictures_hold_one_shape_each_of_different_kinds(toy, split):
    for _, scenes in toy[split]:
        if len(scenes) == 2:
            ((_, _, first),), ((_, _, second),) = scenes
            assert first != second


def test_training_asks_both_questions_of_two_pictures_in_either_order(toy):
    asked = [[kind_of(q)[0] for q, _ in exchanges(made)] for made, scenes in toy["train"] if len(scenes) == 2]
    assert sorted(map(sorted, asked)) == [["show", "which"]] * len(asked)
    assert asked.count(["show", "which"]) / len(asked) == pytest.approx(0.5, abs=0.15)


def test_training_texts_tell_of_a_picture_and_ask_twice_or_train_four_skills(toy):
    asked = [[kind_of(q)[0] for q, _ in exchanges(made)] for made, scenes in toy["train"] if not scenes]
    told = [names for names in asked if names[0] == "read"]
    others = [names for names in asked if names[0] != "read"]
    assert len(told) / len(asked) == pytest.approx(0.5, abs=0.06)
    assert {len(names) for names in told} == {2}
    assert {second for _, second in told} == {"colour", "place", "content", "corners", "count", "which", "show"}
    assert {len(names) for names in others} == {4}
    names = [name for names in others for name in names]
    shares = {"larger": 4, "plus": 4, "reverse": 1, "told corners": 1}
    assert set(names) == set(shares)
    for name, share in shares.items():
        assert names.count(name) / len(names) == pytest.approx(share / 10, abs=0.05)


def test_a_told_picture_is_not_asked_the_same_twice(toy):
    for made, _ in toy["train"]:
        first, *others = [kind_of(question) for question, _ in exchanges(made)]
        if first[0] == "read" and (about := kind_of(first[1][1])[0]) != "count":
            assert about not in [name for name, _ in others]


def test_a_toy_dataset_gives_samples_of_the_sizes_asked_for(tokenizer):
    image_token = tokenizer.token_to_id(data.IMAGE_TOKEN)
    small = {"image_size": 24, "patch_size": 6}
    for options, image_size, patches in ((small, 24, 16), ({"image_size": 24}, 24, 9), ({}, 32, 16)):
        dataset = data.ToyDataset("train", 12, tokenizer, text_fraction=0.0, **options)
        made = dataset[3]
        assert len(dataset) == 12
        assert made["images"].shape[1:] == (3, image_size, image_size)
        assert all(image.size == (image_size, image_size) for image in dataset.record(3)["image"])
        assert (made["input_ids"] == image_token).sum() == len(made["images"]) * patches
        assert made["input_ids"].tolist() == data.encode(dataset.record(3), tokenizer, patches)[0]


# --- LLaVA's data ----------------------------------------------------------------------------------------------------
@pytest.fixture
def llava(tmp_path, tokenizer):
    """Write records and pictures to files, and open them: llava(records, block_size) -> LlavaDataset."""
    (tmp_path / "pictures" / "sub").mkdir(parents=True)
    for i, name in enumerate(("a.png", "b.png", "sub/c.png")):
        saved(tmp_path / "pictures", picture(i), name)
    (tmp_path / "pictures" / "broken.png").write_bytes(b"no picture")
    saved(tmp_path, picture(9), "outside.png")

    def make(records, block_size=200, folder=tmp_path / "pictures"):
        (tmp_path / "data.json").write_text(json.dumps(records))
        return data.LlavaDataset(tmp_path / "data.json", folder, tokenizer, IMAGE_SIZE, PATCH_SIZE, block_size)

    return make


def sources(dataset):
    """What the records of a data set took over from their file."""
    return [{"conversations": made["conversations"]} for made in dataset.records]


def test_good_records_of_a_json_file_become_samples(llava, tokenizer, tmp_path):
    records = [
        talk("Hello", "a red circle"),
        talk("<image>\nWhat?", "b", image="a.png"),
        talk("<image> and <image>", "b", "More?", "no", image=["sub/c.png", "b.png"], system="s"),
    ]
    dataset = llava(records)
    assert (dataset.bad, dataset.n_cut) == ([], 0)
    assert [made["conversations"] for made in dataset.records] == [made["conversations"] for made in records]
    assert [(made["id"], made["n_images"]) for made in dataset.records] == [(0, 0), (1, 1), (2, 2)]
    files = [[], ["a.png"], ["sub/c.png", "b.png"]]
    assert [made["image"] for made in dataset.records] == [
        [str(tmp_path / "pictures" / name) for name in names] for names in files
    ]
    wanted = [torch.zeros(3, IMAGE_SIZE, IMAGE_SIZE)] + [data.to_tensor(picture(i), IMAGE_SIZE) for i in (0, 2, 1)]
    assert torch.equal(torch.cat([made["images"] for made in dataset]), torch.stack(wanted))
    for made, source, kept in zip(dataset, records, dataset.records, strict=True):
        assert made["input_ids"].tolist() == data.encode(source, tokenizer, P)[0]
        assert len(made["input_ids"]) == kept["n_tokens"]


@pytest.mark.parametrize(("reason", "bad"), BAD)
def test_a_bad_record_of_a_json_file_is_listed_with_its_reason(llava, reason, bad):
    bad = json.loads(json.dumps(bad, default=str))
    dataset = llava([talk("a", "b"), bad, talk("c", "d")])
    assert sources(dataset) == [talk("a", "b"), talk("c", "d")]
    ((name, told),) = dataset.bad
    assert name == 1
    assert told.startswith(f"{reason}: ")


@pytest.mark.parametrize(
    ("reason", "bad"),
    [
        ("no answer", talk("a")),
        ("no answer", talk("a", "b", "c")),
        ("image not found: missing.png", talk("<image>", "b", image="missing.png")),
        ("image not found: sub", talk("<image>", "b", image="sub")),
        ("image not found: \ud83d.png", talk("<image>", "b", image="\ud83d.png")),
        ("image not found: lost.png, sub", talk("<image>" * 3, "b", image=["lost.png", "a.png", "sub"])),
        ("image outside of the folder: ../outside.png", talk("<image>", "b", image="../outside.png")),
        ("image outside of the folder: /etc/passwd", talk("<image>", "b", image=["/etc/passwd"])),
        ("image outside of the folder: ", talk("<image>", "b", image="")),
        ("too long: ", talk("many words " * 200, "b")),
        ("too long: ", talk("<image>" * 50, "b", image=["a.png"] * 50)),
        ("", talk("half a surrogate pair \ud83d", "b")),
    ],
)
def test_a_record_that_nothing_can_be_learned_from_is_listed_with_its_id(llava, tmp_path, reason, bad):
    dataset = llava([{"id": "first", **bad}, talk("a", "b"), bad])
    assert sources(dataset) == [talk("a", "b")]
    assert [name for name, _ in dataset.bad] == ["first", 2]
    assert all(told.replace(f"{tmp_path / 'pictures'}/", "").startswith(reason) for _, told in dataset.bad)


def test_pictures_are_found_below_the_current_folder(llava, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path / "pictures")
    assert llava([talk("<image>", "b", image="a.png")], folder=".").bad == []


def test_long_conversations_are_cut_and_counted_and_need_no_picture_that_was_cut_away(llava, tokenizer):
    first = talk("<image>One?", "one", image=["a.png"])
    block_size = len(data.encode(first, tokenizer, P)[0])
    long = talk("<image>One?", "one", "<image>Two?", "two", image=["a.png", "missing.png"])
    dataset = llava([long, first, long], block_size)
    assert (dataset.bad, dataset.n_cut) == ([], 2)
    assert [(made["n_tokens"], made["n_images"]) for made in dataset.records] == [(block_size, 1)] * 3
    assert torch.equal(dataset[0]["input_ids"], dataset[1]["input_ids"])
    assert torch.equal(dataset[0]["images"], dataset[1]["images"])


def test_pictures_are_read_when_they_are_needed(llava, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Image, "open", lambda *_: pytest.fail("opened too early"))
        dataset = llava([talk("<image>", "b", image="a.png")])
    assert dataset[0]["images"].any()


@pytest.mark.parametrize(("name", "told"), [({"id": "record-7"}, "record-7"), ({}, "1")])
def test_a_picture_that_breaks_names_its_record_and_its_file(llava, name, told):
    dataset = llava([talk("a", "b"), {**name, **talk("<image>", "b", image="broken.png")}])
    assert len(dataset) == 2
    assert str(dataset.record(1)["id"]) == told
    with pytest.raises(ValueError, match=rf"^record {told}: image can't be read: .*broken\.png"):
        dataset[1]


def test_a_truncated_picture_names_its_record_and_its_file(llava, tmp_path):
    whole = (tmp_path / "pictures" / "a.png").read_bytes()
    (tmp_path / "pictures" / "b.png").write_bytes(whole[: len(whole) // 2])
    dataset = llava([{"id": "record-7", **talk("<image>", "b", image="b.png")}])
    with pytest.raises(ValueError, match=r"^record record-7: image can't be read: .*b\.png"):
        dataset[0]


def test_subsets_hold_the_records_with_and_without_images(llava):
    whole = llava([talk("a", "b" * n) if n % 2 else talk("<image>", "b" * n, image="a.png") for n in range(5)])
    for start, with_images in enumerate((True, False)):
        part = whole.subset(with_images)
        assert (part.records, len(part)) == (whole.records[start::2], 3 - start)
        assert [made["n_images"] for made in part.records] == [1 - start] * len(part)
        assert torch.equal(part[0]["input_ids"], whole[start]["input_ids"])
    assert len(whole) == 5
    assert part.subset(with_images=True).records == []


def test_a_record_whose_images_were_cut_away_counts_as_text(llava):
    whole = llava([talk("a", "b", "<image>" + " long" * 200, "d", image="a.png")])
    assert (whole.bad, whole.n_cut, whole.records[0]["n_images"]) == ([], 1, 0)
    assert len(whole.subset(with_images=False)) == 1


def test_a_dataset_reaches_a_worker_process_whole(llava):
    dataset = llava([talk("<image> <|im_end|>", "b", image="a.png")])
    copy = pickle.loads(pickle.dumps(dataset))
    assert all(torch.equal(copy[0][name], tensor) for name, tensor in dataset[0].items())


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "not valid JSON"),
        (b"[{]", "not valid JSON"),
        (b"\xff\xfe[]", "not valid JSON"),
        (b"{}", "needs a JSON list"),
        (b"null", "needs a JSON list"),
        (b"5", "needs a JSON list"),
        (b'"text"', "needs a JSON list"),
    ],
)
def test_a_file_that_is_no_json_list_is_refused(tmp_path, tokenizer, content, told):
    (tmp_path / "data.json").write_bytes(content)
    with pytest.raises(ValueError, match=rf"data\.json: {told}"):
        data.LlavaDataset(tmp_path / "data.json", tmp_path, tokenizer, IMAGE_SIZE, PATCH_SIZE, 100)


def test_json_is_read_as_utf_8(tmp_path):
    (tmp_path / "data.json").write_bytes('["é 日"]'.encode())
    assert data.read_json(tmp_path / "data.json", list) == ["é 日"]


# --- the order of a run ----------------------------------------------------------------------------------------------
def steps(first, last, *args, **options):
    return list(itertools.islice(data.batches(*args, **options), first, last))


LENGTHS = [(7 * i) % 50 + 1 for i in range(64)]


@pytest.mark.parametrize("size", [1, 3, 10, 64])
def test_each_sample_comes_once_an_epoch(size):
    indices = sum(steps(0, 3 * size, size, 4), [])
    assert len(indices) == 12 * size
    for epoch in range(12):
        assert sorted(indices[epoch * size : (epoch + 1) * size]) == list(range(size))


def test_each_sample_comes_once_an_epoch_when_grouped_by_length():
    for epoch in range(3):
        indices = sum(steps(16 * epoch, 16 * (epoch + 1), 64, 4, lengths=LENGTHS, window=4), [])
        assert sorted(indices) == list(range(64))


@pytest.mark.parametrize("options", [{}, {"lengths": LENGTHS}, {"lengths": LENGTHS, "window": 4}])
def test_the_order_follows_from_seed_and_step(options):
    wanted = steps(0, 300, 64, 4, 5, **options)
    assert steps(0, 300, 64, 4, 5, **options) == wanted
    assert steps(0, 300, 64, 4, 6, **options) != wanted
    assert all(len(batch) == 4 for batch in wanted)


def test_epochs_differ_in_their_order():
    epochs = [sum(steps(16 * epoch, 16 * epoch + 16, 64, 4), []) for epoch in range(4)]
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert list(range(64)) not in epochs


@pytest.mark.parametrize("batch_size", [4, 8])
def test_a_step_on_few_records_holds_each_once(batch_size):
    """However they differ in length: eight times one record would teach one record."""
    made = steps(0, 70, 8, batch_size, lengths=[10, 20, 30, 40, 50, 60, 70, 80])
    assert all(len(set(step)) == batch_size for step in made)


def padding(batches, lengths):
    return sum(max(lengths[i] for i in batch) - lengths[j] for batch in batches for j in batch)


def test_batches_of_records_of_one_length_are_shuffled_anew_in_every_window():
    """Sorted, they are 0 to 63 in each: only the order of the batches tells windows apart."""
    made = steps(0, 64, 64, 4, lengths=range(64))
    windows = [made[start : start + 16] for start in range(0, 64, 16)]
    assert all(sorted(window) == sorted(windows[0]) for window in windows)
    assert len({str(window) for window in windows}) == 4


def test_grouping_by_length_pads_less_and_keeps_the_batches_mixed():
    lengths = [(37 * i) % 101 for i in range(2048)]
    shuffled, grouped = (steps(0, 256, 2048, 8, lengths=n) for n in (None, lengths))
    assert padding(grouped, lengths) < padding(shuffled, lengths) / 8
    orders = []
    for window in (slice(0, 128), slice(128, 256)):
        assert sorted(sum(grouped[window], [])) == sorted(sum(shuffled[window], []))
        longest = [max(lengths[i] for i in batch) for batch in grouped[window]]
        orders.append([sorted(longest).index(n) for n in longest])
        assert orders[-1] not in (sorted(orders[-1]), sorted(orders[-1], reverse=True))
    assert orders[0] != orders[1]
