"""Data as people have it, after public bug reports: what is read, what is refused and in which
words, the command that shows all faults at once, and the converter in docs/data.md.
"""

import io
import json
import re
import struct
import zlib
from contextlib import nullcontext
from dataclasses import replace

import pytest
from conftest import ROOT, command, make_model, record, talk
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

import data
from extras import all_cores
from extras.pictures import open_image
from extras.record_faults import find_images, note_equal_keys
from extras.token_counts import TokenCounts

RED, BLUE, WHITE, GREY = (255, 0, 0), (0, 0, 255), (255, 255, 255), (128, 128, 128)
DARK, PALE, PINK = (0x34, 0x34, 0x34), (255, 0, 0, 51), (255, 204, 204)


def saved(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def flag(mode="RGB"):
    """Red on the left, blue on the right."""
    image = Image.new("RGB", (16, 8), RED)
    image.paste(BLUE, (8, 0, 16, 8))
    return image.convert(mode)


def on_its_side(*damaged_tag):
    exif = struct.pack("<HHII HHII", 0x112, 3, 1, 6, *damaged_tag)
    return saved(flag(), "PNG", exif=b"Exif\0\0II*\0\x08\0\0\0\2\0" + exif + bytes(12))


def with_chunk(kind, start):
    """A PNG with 5 MB of metadata before its pixels."""
    png, body = saved(flag(), "PNG"), kind + start + zlib.compress(b"a" * 5_000_000)
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    pixels = png.index(b"IDAT") - 4
    return png[:pixels] + chunk + png[pixels:]


def twelve_bits(grey):
    """A TIFF of 4 x 2 pixels, which Pillow can read but not write."""
    pixels = f"{grey:03x}" * 8
    tags = {256: 4, 257: 2, 258: 12, 259: 1, 262: 1, 273: 8, 277: 1, 278: 2, 279: 12}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    head = b"II*\0" + struct.pack("<I", 20) + bytes.fromhex(pixels)
    return head + struct.pack("<H", len(tags)) + entries + bytes(4)


ANOTHER_IS_CLEAR = saved(Image.new("I;16", (4, 2), 0x3400), "PNG", transparency=0x1234)
FRAMES = {"save_all": True, "append_images": [Image.new("RGB", (16, 8), BLUE)]}
GOOD_PICTURES = {  # name: (file, its size, its first and its last pixel once it is read)
    "EXIF, x / 0": (on_its_side(0x11A, 5, 1, 38), (8, 16), RED, BLUE),
    "EXIF, text for a number": (on_its_side(0x128, 2, 2, ord("2")), (8, 16), RED, BLUE),
    "EXIF, beyond the end": (on_its_side(0x10F, 2, 100, 60000), (8, 16), RED, BLUE),
    "EXIF that is none": (saved(flag(), "PNG", exif=b"Exif\0\0nothing"), (16, 8), RED, BLUE),
    "long zTXt": (with_chunk(b"zTXt", b"k\0\0"), (16, 8), RED, BLUE),
    "long iTXt": (with_chunk(b"iTXt", b"k\0\1\0\0\0"), (16, 8), RED, BLUE),
    "long iCCP": (with_chunk(b"iCCP", b"k\0\0"), (16, 8), RED, BLUE),
    "16 bits": (saved(Image.new("I;16", (4, 2), 32768), "PNG"), (4, 2), GREY, GREY),
    "12 bits": (twelve_bits(0x800), (4, 2), GREY, GREY),
    "16 bits, big-endian": (saved(Image.new("I;16B", (4, 2), 32768), "TIFF"), (4, 2), GREY, GREY),
    "16 bits, another is clear": (ANOTHER_IS_CLEAR, (4, 2), DARK, DARK),
    "red, transparent": (saved(Image.new("RGBA", (4, 2), PALE), "PNG"), (4, 2), PINK, PINK),
    "grey, transparent": (saved(Image.new("LA", (4, 2)), "PNG"), (4, 2), WHITE, WHITE),
    "CMYK": (saved(flag("CMYK"), "TIFF"), (16, 8), RED, BLUE),
    "animated": (saved(Image.new("RGB", (16, 8), RED), "GIF", **FRAMES), (16, 8), RED, RED),
}
BAD_PICTURES = {  # name: (file, what is said)
    "empty": (b"", "cannot identify"),
    "web page": (b"<!DOCTYPE html><title>404</title>", "cannot identify"),
    "cut off": (saved(flag(), "BMP")[:200], "truncated"),
    "integers": (saved(Image.new("I", (4, 4), 7), "TIFF"), "mode I .* 8 or 16 bits"),
    "bomb": (saved(Image.new("1", (20_000, 10_000)), "PNG"), "over 178,956,970 pixels.* scale it"),
    "floats": (saved(Image.new("F", (4, 4), 0.5), "TIFF"), "mode F .* 8 or 16 bits"),
}


@pytest.mark.parametrize("name", GOOD_PICTURES)
def test_a_picture_is_read_whatever_stands_beside_its_pixels(name):
    content, size, first, last = GOOD_PICTURES[name]
    image = data.open_image(io.BytesIO(content))
    corner = (image.width - 1, image.height - 1)
    assert (image.size, image.getpixel((0, 0)), image.getpixel(corner)) == (size, first, last)


@pytest.mark.parametrize("name", BAD_PICTURES)
def test_a_picture_that_cannot_be_read_says_why(name, tmp_path):
    content, message = BAD_PICTURES[name]
    (tmp_path / "a.png").write_bytes(content)
    refused = pytest.raises(ValueError, match=f"unreadable image: .*a.png: .*{message}")
    with refused:
        data.open_image(tmp_path / "a.png")
    with nullcontext() if name == "cut off" else refused:  # its head is good
        open_image(tmp_path / "a.png", decode=False)


TEXT, PICTURE = {"conversations": talk("Hello.", "Hi.")}, talk("<image>\nWhat?", "red")
LINE = json.dumps({"conversations": talk("a\u2028b", "c")}, ensure_ascii=False)
GOOD_FILES = [f"\n [{LINE},{LINE}]", f"\ufeff[{LINE},{LINE}]", f"{LINE}\n{LINE}"]
GOOD_FILES += [f"\ufeff{LINE}\r\n\r\n  \r\n{LINE}\r\n"]
BAD_FILES = ["[" * 100_000, LINE[:-5], f"[{LINE},]", "a,b\n1,2", json.dumps(TEXT, indent=1)]


@pytest.mark.parametrize("content", GOOD_FILES + BAD_FILES)
def test_a_file_is_read_or_named(content, tmp_path):
    (tmp_path / "a.json").write_bytes(content.encode())
    if content in GOOD_FILES:
        assert data.read_json(tmp_path / "a.json") == [json.loads(LINE)] * 2
    else:
        with pytest.raises(ValueError, match="a.json: neither a JSON list nor JSON Lines: "):
            data.read_json(tmp_path / "a.json")


@pytest.fixture
def photos(tmp_path):
    """A folder with pictures, and some beside it."""
    for name in ("photos/a.png", "photos/ü 漢/b c.png", "outside.png", "photos2/a.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        flag().save(tmp_path / name)
    (tmp_path / "photos/folder.png").mkdir()
    return tmp_path / "photos"


def write(path, records):
    path.write_text(json.dumps(records))
    return path


@pytest.mark.parametrize("nothing", [None, "", [], float("nan")])
def test_no_picture_may_be_written_in_several_ways(nothing, photos):
    assert data.images_of({"image": nothing}) == data.images_of({}) == []
    assert find_images({**TEXT, "image": nothing, "system": nothing}, photos) == []


def test_a_picture_is_found_in_its_folder(photos):
    (photos / "7").write_bytes((photos / "a.png").read_bytes())
    for name in ("a.png", ["ü 漢/b c.png"], "ü 漢/../a.png", str(photos / "a.png"), 7):
        good = {"image": name, "image_url": "where it is from", "conversations": PICTURE}
        (path,) = find_images(good, photos)
        assert Image.open(path).size == (16, 8)
        file = write(photos / "train.json", [good])
        assert data.read_records(file, photos)[0]["image"] == [path]


LEAVES = ["../outside.png", "../photos2/a.png", "ü 漢/../../outside.png", "/etc/hostname"]
MISSING = ["b.png", "", "folder.png", 5, None, {"x": "A" * 3_000_000}, "A" * 3_000_000, "\ud800"]
HOOK = {"object_pairs_hook": note_equal_keys}
THREE = ("system", "human", "gpt")
BAD_RECORDS = [  # (record, what is said)
    *[({"image": [x], "conversations": PICTURE}, "no such image: ") for x in LEAVES + MISSING],
    *[(x, "no conversation: ") for x in ([1], "text", None, {}, {"conversations": "text"})],
    ({"messages": [{"role": "user", "content": "a"}]}, "no conversation: .*'conversations'"),
    ({"conversations": talk("a", None)}, "no conversation: .*a text as 'value'"),
    ({"conversations": talk("\ud800", "b")}, "no conversation: .*surrogates"),
    ({"conversations": talk("a", "b", roles=("user", "assistant"))}, "wrong turns: .*assistant"),
    ({"conversations": talk("a", "b", "c", roles=THREE[::-1])}, "wrong turns: "),
    ({"conversations": talk("a", "b", "c", roles=("system", *THREE))}, "wrong turns: "),
    ({"conversations": talk("a", roles=["x" * 3_000_000])}, "wrong turns: "),
    ({"conversations": talk("a", " \n")}, "empty answer: "),
    ({"conversations": talk("a", "b", "c")}, "no answer: "),
    ({"conversations": talk("What is <image>?", "b")}, "text is written <image >"),
    ({"image": "ü 漢\\b c.png", "conversations": PICTURE}, "no such image: .*write / for"),
    ({"image": "u\u0308 漢/b c.png", "conversations": PICTURE}, "looks the same, in .* form NFC"),
    (json.loads('{"image": "a.png", "image": "a.png", "conversations": []}', **HOOK), "equal keys"),
    ({"images": ["a.png"], "conversations": PICTURE}, "markers: 1 .* 0 .*'images'"),
    ({**TEXT, "image": "a.png"}, "markers: 0 .* 1 .*'image'"),
    ({**TEXT, "system": "Be kind."}, "unread key: 'system'"),
    ({**TEXT, "videos": ["a.mp4"]}, "unread key: 'videos'"),
    ({**TEXT, "image_path": "a.png"}, "unread key: 'image_path'"),
    ({"conversations": [{**turn, "image": "a.png"} for turn in talk("a", "b")]}, "key: 'image'"),
    ({"conversations": [{**turn, "weight": 0} for turn in talk("a", "b")]}, "unread key: 'weight'"),
]


@pytest.mark.parametrize("bad, message", BAD_RECORDS, ids=range(len(BAD_RECORDS)))
def test_a_bad_record_is_refused_in_few_words(bad, message, photos):
    with pytest.raises(ValueError, match=message) as error:
        find_images(bad, photos)
    assert len(str(error.value).replace(str(photos), "")) < 250


def test_counting_by_words_is_exact_and_done_where_it_is():
    text = "  Two  blanks\n\n \t3 4.  What's\u3000 5\x1c. <image>\r\n\n end \n "
    learned = data.train_tokenizer([record(text)] * 9)  # with blanks in its words
    gpt2s = pre_tokenizers.ByteLevel(add_prefix_space=False)
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for cut, by_words in ((learned.pre_tokenizer, True), (gpt2s, True), (whole, False)):
        learned.pre_tokenizer = cut
        counts = TokenCounts(learned)
        assert counts.by_words == by_words
        words = counts.encode(text, add_special_tokens=False)
        assert len(words.ids) == len(learned.encode(text, add_special_tokens=False).ids)
    learned.pre_tokenizer = gpt2s
    learned.add_tokens(["5.  end"])  # a word with blanks, which is found first
    assert not TokenCounts(learned).by_words


VOCAB = {"<pad>": 0, "?": 1, "user": 2, "assistant": 3, "a": 4, "b": 5}
KNOWN = [kind(VOCAB, unk_token="?") for kind in (models.WordPiece, models.WordLevel)]
KNOWN += [models.BPE(VOCAB, [])]  # which loses what it does not know without a sign


@pytest.mark.parametrize("known", KNOWN)
def test_words_that_the_tokenizer_does_not_know_are_no_words_to_learn(known):
    tokenizer = Tokenizer(known)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(data.SPECIAL_TOKENS)
    counts = TokenCounts(tokenizer)
    assert len(counts.encode("a b\n", add_special_tokens=False).ids) == 2
    with pytest.raises(ValueError, match="unknown words: '紫' is no word"):
        counts.encode(" a 紫", add_special_tokens=False)


def test_the_check_shows_all_faults_at_once_and_keeps_the_good(photos):
    (photos / "broken.png").write_bytes(b"")
    good = {"id": "good", "image": "ü 漢/b c.png", "mine": 1, "conversations": PICTURE}
    broken = [{"id": i, "image": "broken.png", "conversations": PICTURE} for i in range(6)]
    long = {"id": "long", "conversations": talk("a", "b " * 500)}
    file = write(photos / "train.json", [good, *broken, TEXT, long, "text"])
    check = ["data.py", "--images", photos, "--write-good", photos / "good.json", "--data"]
    code, said = command(*check, file)
    assert code == 1
    assert "10 records: 1 with 1 pictures, 1 text-only, 8 bad" in said
    assert re.search(r"tokens: median \d+, .* longest [\d,]+, the block holds 256", said)
    assert re.search(r"6 x unreadable image\n( +record [0-4]: .*\n){5} +and 1 more", said)
    assert re.search(r"1 x too long\n +record long: .*--block-size", said)
    assert re.search(r"1 x no conversation\n +record 9: ", said)

    kept = (photos / "good.json").read_bytes()
    assert json.loads(kept) == [good, TEXT]
    assert "good.json exists" in command(*check, photos / "good.json")[0]
    assert (photos / "good.json").read_bytes() == kept
    assert command(*check[:3], "--data", photos / "good.json")[0] == 0


def test_the_model_to_check_for_brings_its_sizes(photos, tokenizer, config):
    make_model(replace(config, image_size=12, patch_size=6)).save(photos / "model")
    tokenizer.save(str(photos / "model" / "tokenizer.json"))
    (photos / "train.json").write_text(json.dumps([TEXT]))
    check = ["data.py", "--data", photos / "train.json", "--init", photos / "model"]
    assert command(*check, "--image-size", 12)[0] == 0  # of which Config's own patches are no part
    assert "leave out those" in command(*check, "--image-size", 16)[0]
    assert "no multiple of patch size" in command(*check[:3], "--image-size", 12)[0]


def test_held_out_records_are_never_written_as_good_ones(photos):
    bad = write(photos / "bad.json", [{"image": "gone.png", "conversations": PICTURE}])
    good, val = photos / "good.json", write(photos / "val.json", [TEXT])
    error, _ = command("data.py", "--data", bad, "--val", val, "--write-good", good)
    assert "holds no good record" in error
    assert not good.exists()


def test_a_picture_that_breaks_while_training_is_named_with_its_record(photos):
    # The check comes first, and finds nothing: it looks at the heads of pictures alone.
    (photos / "broken.png").write_bytes(BAD_PICTURES["cut off"][0])
    culprit = {"id": "culprit", "image": "broken.png", "conversations": PICTURE}
    file, out = write(photos / "train.json", [culprit]), photos / "out"
    flags = ["--images", photos, "--out", out, "--batch-size", 1, "--steps", 1]
    error, _ = command("train.py", "--data", file, *flags)
    assert re.match("train.py: .*record culprit: unreadable image: .*broken.png", error)
    assert (out / "resume.pt").exists()


def test_the_check_takes_no_more_processes_than_windows_waits_for(photos, monkeypatch):
    asked, pool = [], all_cores.ProcessPoolExecutor
    monkeypatch.setattr(all_cores.os, "sched_getaffinity", lambda _: range(200), raising=False)
    few = lambda n, **rest: asked.append(n) or pool(1, **rest)  # noqa: E731
    monkeypatch.setattr(all_cores, "ProcessPoolExecutor", few)
    assert command("data.py", "--data", write(photos / "train.json", [TEXT]))[0] == 0
    assert set(asked) == {61}


@pytest.mark.parametrize("name", ["data", "init", "val", "images"])
def test_an_unset_variable_is_not_taken_for_a_flag_left_out(name):
    assert command("data.py", "--data", "a.json", f"--{name}=")[0].startswith(f"data.py: --{name}")


def test_the_converter_in_the_docs_makes_records_of_ours(photos):
    (code,) = re.findall("```python\n(.*?)```", (ROOT / "docs/data.md").read_text(), re.DOTALL)
    assert len(code.splitlines()) <= 30
    (photos / "convert.py").write_text(code)

    told = [{"type": "image"}, {"type": "text", "text": "What?"}]
    named, url = {**told[0], "image": "a.png"}, {"type": "image_url", "image_url": {"url": "7.png"}}
    flag().save(photos / "7.png")
    contents = ["<image>What?", told, [named, told[1]], [url, named, told[1]], "What?"]
    theirs = [{"messages": [{"role": "user", "content": content}]} for content in contents]
    for entry in theirs:
        entry["messages"] += [{"role": "assistant", "content": "red"}]
    theirs[0]["image"], theirs[1]["images"] = "a.png", ["a.png"]
    theirs[4]["messages"].insert(0, {"role": "system", "content": "Be brief."})
    theirs += [{"system": "Be brief.", "images": ["a.png"], "conversations": PICTURE}]

    file = write(photos / "theirs.json", theirs)
    assert command(photos / "convert.py", file, photos / "ours.json")[0] == 0
    ours = json.loads((photos / "ours.json").read_text())
    assert [len(find_images(entry, photos)) for entry in ours] == [1, 1, 1, 2, 0, 1]
    assert ours[3]["image"] == ["7.png", "a.png"]
    for entry, system in zip(ours, (False, False, False, False, True, True)):
        *first, question, answer = entry["conversations"]
        assert first == [{"from": "system", "value": "Be brief."}] * system
        assert question["value"].replace("<image>", "").strip() == "What?"
        assert answer == {"from": "gpt", "value": "red"}
