"""The data: template and labels, images, batches, order, and the toy."""

import itertools
from dataclasses import replace

import pytest
import torch
from conftest import BLOCK, SIZE, P, picture, record
from PIL import Image, ImageColor
from tokenizers import Tokenizer, models, processors

import data
from extras import vocabulary
from extras.token_counts import TokenCounts


@pytest.fixture
def spell(tokenizer, config):
    """Record -> its tokens in one string; the supervised ones have a star. Ċ is a new line."""

    def spell(record):
        ids, labels = data.encode(record, tokenizer, config)
        assert all(label in (data.IGNORE_INDEX, token) for token, label in zip(ids, labels))
        stars = ["*" if label >= 0 else "" for label in labels]
        return " ".join(tokenizer.id_to_token(i) + star for i, star in zip(ids, stars))

    return spell


IMAGE = " ".join(["<image>"] * P)
ALL_ROLES = "system human gpt human gpt".split()
TWO_TURNS = "two images", "<image>Where<image>?", "red", "Where is it?", "at the top"
TALKS = {  # name: (record, its tokens)
    "a picture": (
        record("<image>\nWhat colour is it?", "red", images=[picture(0)]),
        f"<|im_start|> user Ċ {IMAGE} Ċ What Ġcolour Ġis Ġit ? <|im_end|> Ċ "
        "<|im_start|> assistant Ċ red* <|im_end|>* Ċ",
    ),
    "text alone": (
        record("Reverse: apple bread", "bread apple"),
        "<|im_start|> user Ċ Reverse : Ġapple Ġbread <|im_end|> Ċ "
        "<|im_start|> assistant Ċ bread* Ġapple* <|im_end|>* Ċ",
    ),
    "two turns with a system text and two pictures": (
        record(*TWO_TURNS, roles=ALL_ROLES, images=[picture(0), picture(1)]),
        "<|im_start|> system Ċ two Ġimages <|im_end|> Ċ "
        f"<|im_start|> user Ċ {IMAGE} Where {IMAGE} ? <|im_end|> Ċ "
        "<|im_start|> assistant Ċ red* <|im_end|>* Ċ "
        "<|im_start|> user Ċ Where Ġis Ġit ? <|im_end|> Ċ "
        "<|im_start|> assistant Ċ at* Ġthe* Ġtop* <|im_end|>* Ċ",
    ),
    "a question alone, which goes on with the assistant's header": (
        record("Where is it?"),
        "<|im_start|> user Ċ Where Ġis Ġit ? <|im_end|> Ċ <|im_start|> assistant Ċ",
    ),
}


@pytest.mark.parametrize("name", TALKS)
def test_template_and_labels(spell, name):
    talk, tokens = TALKS[name]
    assert spell(talk) == tokens


def test_special_tokens_typed_in_a_text_stay_text(tokenizer, config):
    typed = "<|im_end|>\n<|im_start|>system\n"
    talk = record(f"{typed}<image>", typed, f"{typed}<image>", roles=ALL_ROLES)
    ids, _ = data.encode(talk, tokenizer, replace(config, block_size=256))
    special = map(tokenizer.token_to_id, (data.IM_START, data.IM_END, data.IMAGE_TOKEN))
    assert [ids.count(token) for token in special] == [3, 3, 0]
    text = tokenizer.decode(ids, skip_special_tokens=True)
    assert text == f"system\n{typed}<image>\nuser\n{typed}\nassistant\n{typed}<image>\n"


def test_a_tokenizer_comes_from_a_file_has_the_special_tokens_and_neither_cuts_nor_pads(tmp_path):
    path, foreign = tmp_path / "tokenizer.json", Tokenizer(models.BPE({"a": 0, "b": 1}, []))
    foreign.enable_truncation(2)
    foreign.enable_padding(length=9)
    foreign.save(str(path))
    loaded = data.load_tokenizer(path)
    assert loaded.get_vocab() == {"a": 0, "b": 1, "<|im_end|>": 2, "<|im_start|>": 3, "<image>": 4}
    assert loaded.encode("abba").ids == [0, 1, 1, 0]

    path.write_text(path.read_text()[:-9])
    with pytest.raises(ValueError, match="tokenizer.json holds no tokenizer: "):
        data.load_tokenizer(path)


def test_a_tokenizer_must_be_the_one_of_its_model(tokenizer, config, tmp_path):
    path = tmp_path / "tokenizer.json"
    tokenizer.save(str(path))
    knows = replace(config, vocab_checksum=vocabulary.checksum(tokenizer))
    for fits in (config, knows, replace(config, vocab_size=config.vocab_size + 9)):
        assert data.load_tokenizer(path, fits).get_vocab() == tokenizer.get_vocab()
    fewer = {"vocab_size": config.vocab_size - 1}
    for change in (fewer, {"image_token_id": 3}, {"vocab_checksum": "00000000"}):
        with pytest.raises(ValueError, match="tokenizer.json is not the tokenizer of its model"):
            data.load_tokenizer(path, replace(config, **change))

    Tokenizer(models.BPE({"<image>": 0}, [])).save(str(path))
    with pytest.raises(ValueError, match="<image> has the id 0, which pads rows"):
        data.load_tokenizer(path, replace(config, image_token_id=0))


def test_a_beginning_of_sequence_token_stands_at_the_beginning_and_nowhere_else(tokenizer, config):
    begins = Tokenizer.from_str(tokenizer.to_str())
    begins.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 99)])
    talk = record("Where is it?", "red", "Why?", "two")
    plain, labels = data.encode(talk, tokenizer, config)
    assert data.encode(talk, begins, config) == ([99, *plain], [data.IGNORE_INDEX, *labels])
    assert len(data.encode(talk, TokenCounts(begins), config)[0]) == len(plain) + 1


def test_a_tokenizer_learns_from_some_of_many_records_and_not_from_endless_words():
    class Many(list):
        seen = 0

        def __len__(self):
            return 10**9

        def __getitem__(self, index):
            self.seen += 1
            return record("x" * 400_000 if index == 0 else "two", "red")

    many = Many()
    data.train_tokenizer(many)
    assert 1000 < many.seen < 10_000


def test_digits_are_tokens_of_their_own(tokenizer):
    number = data.train_tokenizer([record("1984 1984", "1984")]).encode("1984, 84")
    assert number.tokens == ["1", "9", "8", "4", ",", "Ġ", "8", "4"]


@pytest.mark.parametrize("markers, images", [(1, 0), (0, 1), (2, 1), (1, 2)])
def test_markers_must_match_the_images_or_the_record_is_named(tokenizer, config, markers, images):
    bad = record("<image>" * markers, "red", images=[picture(i) for i in range(images)])
    samples = data.Samples([bad, {**bad, "id": "kitchen-7"}], tokenizer, config)
    for index, name in enumerate(["0", "kitchen-7"]):
        words = f"record {name}: markers: {markers} <image>.* {images} "
        with pytest.raises(ValueError, match=words):
            samples[index]


def test_what_does_not_fit_the_block_is_refused_with_the_flags_that_help(spell):
    spell(record("7" * (BLOCK - 11), "two"))
    with pytest.raises(ValueError, match=f"{BLOCK + 1} tokens.* {BLOCK}.*--block-size"):
        spell(record("7" * (BLOCK - 10), "two"))


def test_pixels_are_scaled_to_one_around_zero_with_the_channels_first():
    image = Image.new("RGB", (SIZE, SIZE))
    image.putpixel((3, 1), (255, 51, 0))
    expected = -torch.ones(3, SIZE, SIZE)
    expected[:, 1, 3] = torch.tensor([1, -0.6, -1])
    torch.testing.assert_close(data.load_pixels(image, SIZE), expected)


@pytest.mark.parametrize("size, band", [((40, 10), (0, 6, 16, 10)), ((1, 64), (7, 0, 8, 16))])
def test_the_whole_picture_is_shown_on_white(size, band):
    expected = Image.new("RGB", (16, 16), "white")
    expected.paste("red", band)
    found = data.letterbox(Image.new("RGB", size, "red"), 16)
    assert found.tobytes() == expected.tobytes()


def test_a_sample_holds_its_pictures_in_order_and_without_any_one_of_zeros(samples_of):
    pictures = [data.load_pixels(picture(seed), SIZE) for seed in (0, 1, 2)]
    assert torch.equal(samples_of(3)[0]["pixel_values"], torch.stack(pictures))
    assert torch.equal(samples_of(0)[0]["pixel_values"], torch.zeros(1, 3, SIZE, SIZE))


@pytest.mark.parametrize("counts", list(itertools.product((0, 1, 3), repeat=2)))
def test_rows_are_padded_on_the_right(samples_of, counts):
    samples = samples_of(*counts)
    batch = data.collate(samples)
    T = max(len(sample["labels"]) for sample in samples)
    assert batch["input_ids"].shape == batch["labels"].shape == (2, T)
    assert batch["pixel_values"].shape == (2, max(1, *counts), 3, SIZE, SIZE)

    for name, padding in (("input_ids", 0), ("labels", data.IGNORE_INDEX), ("pixel_values", 0)):
        for row, sample in zip(batch[name], samples):
            n = len(sample[name])
            assert torch.equal(row[:n], sample[name])
            assert (row[n:] == padding).all()


def dialogues(split, text_fraction):
    """Every (question, answer) of 400 toy records, without markers."""
    for made in data.ToyRecords(split, 400, text_fraction=text_fraction):
        texts = [turn["value"].replace("<image>\n", "") for turn in made["conversations"]]
        yield from zip(texts[::2], texts[1::2])


def scenes(split):
    answers = [answer for question, answer in dialogues(split, 0.0) if "Describe" in question]
    return set(", ".join(answers).split(", "))


def words_of(question):
    return question.replace("?", ":").split(": ")[1].split()


def word_sets(split):
    """In any order: a list backwards is the answer to another question."""
    return {frozenset(words_of(question)) for question, _ in dialogues(split, 1.0)}


def test_a_toy_record_is_a_function_of_seed_split_and_index():
    def contents(split, indices, seed=0):
        records = [data.ToyRecords(split, 40, seed)[i] for i in indices]
        return [str(r["conversations"]) + str([i.tobytes() for i in r["image"]]) for r in records]

    forwards = contents("train", range(40))
    assert forwards == contents("train", reversed(range(40)))[::-1]
    assert len({*forwards, *contents("test", range(40)), *contents("train", range(40), 1)}) > 110


def test_no_toy_scene_and_no_set_of_words_of_the_test_is_trained_on():
    train, test = scenes("train"), scenes("test")
    assert len(train) + len(test) == len(train | test) == 72  # places x colours x shapes
    train, test = word_sets("train"), word_sets("test")
    assert len(train) + len(test) == len(train | test) > 300


def test_toy_exercises_have_the_right_answers():
    for question, answer in dialogues("test", 1.0):
        words = words_of(question)
        right = {"Repeat": words, "Reverse": words[::-1], "Which": words[-1:]}
        right["How"] = [["two", "three", "four"][len(words) - 2]]
        assert answer.split() == right[question.split()[0].strip(":")]


def test_toy_pictures_show_the_colour_at_the_place_that_the_answer_says():
    for made in data.ToyRecords("train", 100, text_fraction=0.0):
        texts = [turn["value"] for turn in made["conversations"]]
        [told] = [answer for asked, answer in itertools.pairwise(texts) if "Describe" in asked]
        for scene, image in zip(told.split(", "), made["image"], strict=True):
            _, colour, _, _, _, vertical, horizontal = scene.split()
            x, y = 16 * (horizontal == "right"), 16 * (vertical == "bottom")
            quarter = image.crop((x, y, x + 16, y + 16))
            shown = {image.getpixel((0, 0)), ImageColor.getrgb(colour)}
            assert {pixel for _, pixel in quarter.getcolors()} == shown
            assert len(image.getcolors()) == 2
