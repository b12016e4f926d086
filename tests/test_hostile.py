"""Hostile input: whatever is wrong, the user reads one line, the exit code says so, and no file is touched.

Two tables: commands, which run in this process (a few for real), and tensors.
"""

import argparse
import json
import re
import runpy
import shutil
import signal
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import torch
from conftest import IMAGE_SIZE, PATCH_SIZE, batch, picture, random_model
from safetensors import safe_open
from safetensors.torch import save_file

import data
import llava_mini
import train

ROOT = Path(__file__).parent.parent


def ask(*options, folder="model", prompt="What is this?"):
    return ("llava_mini.py", folder, prompt, "--device", "cpu", "--max-new-tokens", "2", *options)


def learn(*options, out="out", tokenizer=("--tokenizer", "model/tokenizer.json")):
    """A short training run on good data; of an option given twice the last one counts."""
    data_options = f"--data good.json --images pictures --image-size {IMAGE_SIZE} --patch-size {PATCH_SIZE}"
    sizes = "--width 16 --depth 1 --heads 2 --block-size 64 --batch-size 2 --workers 0 --device cpu"
    pace = "--optimizer adamw --steps 2 --warmup 1 --log-every 1 --eval-every 1"
    return ("train.py", "--out", out, *tokenizer, *f"{data_options} {sizes} {pace}".split(), *options)


def resume(*options):
    return learn("--resume", *options, out="run")


def talk(question, answer, **fields):
    return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}], **fields}


def run(command):
    """Run a command line in this process; -> what it exits with: None, a number, or a line for stderr."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", list(command))
        try:
            runpy.run_path(str(ROOT / command[0]), run_name="__main__")
        except SystemExit as e:
            return e.code
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)


def contents():
    return {path: path.read_bytes() for path in sorted(Path().rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def original(tmp_path_factory, tokenizer):
    """A model, pictures, records and a finished run, all of them good."""
    folder = tmp_path_factory.mktemp("original")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        random_model(tokenizer.get_vocab_size(), tokenizer.token_to_id(data.IMAGE_TOKEN)).save_pretrained(
            "model", tokenizer
        )
        Path("pictures").mkdir()
        for i, name in enumerate(("a.png", "b.png")):
            picture(i).save(f"pictures/{name}")
        records = [talk("<image>\nWhat?", "red", image="a.png", id="red"), talk("2 plus 2?", "four", id="sum")]
        Path("good.json").write_text(json.dumps(records))
        assert run(learn(out="run")) is None
    return folder


@pytest.fixture
def world(original, tmp_path, monkeypatch):
    """A copy to do harm in, as the current folder."""
    shutil.copytree(original, tmp_path / "world")
    monkeypatch.chdir(tmp_path / "world")


# --- ways to do harm -------------------------------------------------------------------------------------------------
def write(path, content):
    return lambda: Path(path).write_bytes(content if isinstance(content, bytes) else content.encode())


def records(*content):
    return write("x.json", json.dumps(content))


def remove(path):
    return lambda: Path(path).unlink()


def cut(path, share=0.5):
    return lambda: Path(path).write_bytes(Path(path).read_bytes()[: int(share * Path(path).stat().st_size)])


def overwrite(path, start, content):
    def harm():
        before = Path(path).read_bytes()
        Path(path).write_bytes(before[:start] + content + before[start + len(content) :])

    return harm


def config(part=None, **fields):
    """Change fields of the model's config.json, or of a part of it; None removes a field."""

    def harm():
        content = json.loads(Path("model/config.json").read_text())
        place = content[part] if part else content
        place.update(fields)
        for name in [name for name, value in fields.items() if value is None]:
            del place[name]
        Path("model/config.json").write_text(json.dumps(content))

    return harm


def rewrite(path, change, **options):
    """Let `change` alter the dictionary of tensors in a file; metadata=... replaces the file's own."""
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        options = {"metadata": file.metadata()} | options
    save_file({name: t.contiguous() for name, t in change(tensors).items() if t is not None}, path, **options)


def tensor(path, pattern, change):
    """Replace the first tensor whose name matches by change(tensor), where None removes it."""

    def harm():
        rewrite(path, lambda tensors: tensors | {first(tensors): change(tensors[first(tensors)])})

    def first(tensors):
        return min(name for name in tensors if re.search(pattern, name))

    return harm


def png(width, height):
    """A PNG file that says how large it is, and holds next to nothing."""

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def nothing():
    pass


# --- commands: (what is wrong, harm done before, command, what the line says) ----------------------------------------
BAD = [{"id": f"bad-{i}", "conversations": [{"from": "gpt", "value": "a"}]} for i in range(12)]
MODEL, WEIGHTS, RUN = "model/config.json", "model/model.safetensors", "run/run.safetensors"
AT_LEAST_ONE = (
    "width depth heads image-size patch-size block-size steps batch-size accumulate warmup log-every eval-every"
)

ASKING = [
    ("no prompt", nothing, ask()[:2], "arguments are required: prompt"),
    ("unknown option", nothing, ask("--colour"), "unrecognized arguments: --colour"),
    ("a word for a number", nothing, ask("--top-k", "many"), "--top-k: invalid int value: 'many'"),
    ("top k of zero", nothing, ask("--top-k", "0"), "top_k 0: must be at least"),
    ("negative temperature", nothing, ask("--temperature", "-1"), "temperature -1.0 .*must be at least 0"),
    ("unknown device", nothing, ask("--device", "abacus"), "abacus"),
    ("missing picture", nothing, ask("--image", "none.png"), r"image can't be read: none\.png"),
    ("a folder as picture", nothing, ask("--image", "pictures"), "image can't be read: .*pictures"),
    ("a text as picture", nothing, ask("--image", "good.json"), r"image can't be read: .*good\.json"),
    ("an empty picture", write("x.png", ""), ask("--image", "x.png"), r"image can't be read: .*x\.png"),
    ("a cut picture", cut("pictures/a.png"), ask("--image", "pictures/a.png"), r"image can't be read: .*a\.png"),
    ("a bomb", write("x.png", png(30000, 30000)), ask("--image", "x.png"), r"x\.png.*decompression bomb"),
    ("a bad second picture", nothing, ask("--image", "pictures/a.png", "none.png"), r"can't be read: none\.png"),
    ("a typed marker", nothing, ask("--image", "pictures/a.png", prompt="<image>?"), "2 <image> .* for 1 image"),
    ("a long prompt", nothing, ask(prompt="word " * 200), "too long: .* the 127 tokens that"),
    ("many pictures", nothing, ask("--image", *["pictures/a.png"] * 40), "too long: .* the 127 tokens that"),
    ("missing folder", nothing, ask(folder="none"), "none: no checkpoint here"),
    ("no config", remove(MODEL), ask(), "model: no checkpoint here"),
    ("no weights", remove(WEIGHTS), ask(), "model: no checkpoint here"),
    ("config is no JSON", write(MODEL, "{"), ask(), r"config\.json: not valid JSON"),
    ("config is no UTF-8", write(MODEL, b"\xff"), ask(), r"config\.json: not valid JSON"),
    ("config is a list", write(MODEL, "[]"), ask(), r"model.*(config\.json|model_type)"),
    ("config is empty", write(MODEL, "{}"), ask(), "model: model_type is None, only 'llava'"),
    ("another model", config(model_type="bert"), ask(), "model: model_type is 'bert', only 'llava'"),
    ("another decoder", config("text_config", model_type="bert"), ask(), "model_type is 'bert', only 'gpt2'"),
    (
        "another encoder",
        config("vision_config", model_type="vit"),
        ask(),
        "model_type is 'vit', only 'clip_vision_model'",
    ),
    (
        "another activation",
        config("vision_config", hidden_act="gelu"),
        ask(),
        "hidden_act is 'gelu', only 'quick_gelu'",
    ),
    ("another layer", config(vision_feature_layer=-3), ask(), "vision_feature_layer is -3"),
    ("no decoder", config(text_config=None), ask(), "model: model_type is None, only 'gpt2'"),
    ("encoder is a list", config(vision_config=[]), ask(), r"model.*(config\.json|model_type|vision_config)"),
    ("no width", config("text_config", n_embd=None), ask(), "no whole number under 'n_embd'"),
    ("width is a word", config("vision_config", hidden_size="24"), ask(), "no whole number under 'hidden_size'"),
    ("zero heads", config("text_config", n_head=0), ask(), "n_head"),
    ("odd heads", config("text_config", n_head=3), ask(), "width 32 does not divide by 3 heads"),
    ("odd patches", config("vision_config", patch_size=7), ask(), "16 is no multiple of patch size 7"),
    ("fewer words", config("text_config", vocab_size=9), ask(), r"tensor \S*wte.weight is of shape .*, not \(9, 32\)"),
    ("more blocks", config("text_config", n_layer=3), ask(), r"tensor \S*h\.2\.\S* is missing"),
    *(
        (f"image token {value}", config(image_token_index=value), ask(), "no whole number under 'image_token_index'")
        for value in (None, True, -1, "7")
    ),
    ("image token 10**6", config(image_token_index=10**6), ask(), "image_token_index is 1000000, no id of the vocab"),
    ("temperature is no number", nothing, ask("--temperature", "nan"), "temperature nan .*must be at least 0"),
    ("deep config", write(MODEL, "[" * 10**5), ask(), r"config\.json: not valid JSON"),
    ("half the weights", cut(WEIGHTS), ask(), r"model\.safetensors: damaged file"),
    ("half a header", cut(WEIGHTS, 0.001), ask(), r"model\.safetensors: damaged file"),
    ("empty weights", cut(WEIGHTS, 0), ask(), r"model\.safetensors"),
    ("overwritten header", overwrite(WEIGHTS, 8, b"}{"), ask(), r"model\.safetensors: damaged file"),
    ("endless header", overwrite(WEIGHTS, 0, b"\xff" * 8), ask(), r"model\.safetensors: damaged file"),
    ("missing tensor", tensor(WEIGHTS, "wpe", lambda t: None), ask(), r"tensor \S*wpe.weight is missing"),
    (
        "cut tensor",
        tensor(WEIGHTS, "wpe", lambda t: t[1:]),
        ask(),
        r"wpe.weight is of shape \(127, 32\), not \(128, 32\)",
    ),
    (
        "turned tensor",
        tensor(WEIGHTS, "c_fc.w", lambda t: t.T),
        ask(),
        r"weight is of shape \(128, 32\), not \(32, 128\)",
    ),
    ("no tokenizer", remove("model/tokenizer.json"), ask(), r"no readable tokenizer\.json"),
    ("half a tokenizer", cut("model/tokenizer.json"), ask(), r"no readable tokenizer\.json"),
]

TRAINING = [
    *((f"{n} of zero", nothing, learn(f"--{n}", "0"), f"--{n} 0: must be from 1 to inf") for n in AT_LEAST_ONE.split()),
    ("unknown option", nothing, learn("--colour"), "unrecognized arguments: --colour"),
    ("a word for a number", nothing, learn("--steps", "ten"), "--steps: invalid int value: 'ten'"),
    ("unknown optimizer", nothing, learn("--optimizer", "sgd"), "--optimizer: invalid choice: 'sgd'"),
    ("unknown part", nothing, learn("--freeze", "eyes"), "--freeze: invalid choice: 'eyes'"),
    ("unknown device", nothing, learn("--device", "abacus"), "abacus"),
    ("negative workers", nothing, learn("--workers", "-1"), "--workers -1: must be from 0 to inf"),
    ("negative decay", nothing, learn("--weight-decay", "-1"), "--weight-decay -1.0: must be from 0 to"),
    ("negative seed", nothing, learn("--seed", "-1"), "--seed -1: must be from 0 to inf"),
    ("rate of zero", nothing, learn("--lr", "0"), "--lr 0.0: must be from"),
    ("rate is no number", nothing, learn("--lr", "nan"), "--lr nan: must be from"),
    ("endless rate", nothing, learn("--muon-lr", "inf"), "--muon-lr inf: must be from"),
    ("clip of zero", nothing, learn("--clip", "0"), "--clip 0.0: must be from"),
    ("more than all text", nothing, learn("--text-fraction", "1.5"), "--text-fraction 1.5: must be from 0 to 1"),
    ("less than no text", nothing, learn("--text-fraction", "-0.5"), "--text-fraction -0.5: must be from 0 to 1"),
    ("uneven shares", nothing, learn("--accumulate", "4"), "2 does not divide by 4, which is ranks x --accumulate"),
    ("odd heads", nothing, learn("--heads", "3"), "width 16 does not divide by 3 heads"),
    ("odd patches", nothing, learn("--patch-size", "7"), "16 is no multiple of patch size 7"),
    ("all frozen", nothing, learn("--freeze", "vision", "projector", "decoder"), "leaves nothing to train"),
    ("out is a run", nothing, learn(out="run"), "run is not empty: .*--resume"),
    ("out is a model", nothing, learn(out="model"), "model is not empty: .*another --out"),
    ("out is a file", nothing, learn(out="good.json"), r"good\.json"),
    ("out in a file", nothing, learn(out="good.json/out"), r"good\.json"),
    ("two tokenizers", nothing, learn("--init", "model"), "--init brings its own .*leave out .*--tokenizer"),
    ("missing init", nothing, learn("--init", "none"), "--init none: does not exist"),
    ("init is no model", nothing, learn("--init", "pictures", tokenizer=()), "pictures: no checkpoint here"),
    ("encoder is a list", write(MODEL, "[]"), learn("--vision", "model"), r"config\.json: needs a JSON dict"),
    ("missing encoder", nothing, learn("--vision", "none"), "--vision none: does not exist"),
    ("no encoder", nothing, learn("--vision", "pictures"), "pictures: no checkpoint here"),
    ("missing decoder", nothing, learn("--decoder", "none"), "--decoder none: does not exist"),
    ("another decoder", nothing, learn("--decoder", "model"), "model_type is 'llava', only 'gpt2'"),
    ("missing tokenizer", nothing, learn("--tokenizer", "none"), "--tokenizer none: does not exist"),
    ("no tokenizer", nothing, learn("--tokenizer", "good.json"), r"good\.json: no readable tokenizer\.json"),
    ("missing data", nothing, learn("--data", "none"), "--data none: does not exist"),
    ("missing pictures", nothing, learn("--images", "none"), "--images none: does not exist"),
    ("missing validation", nothing, learn("--val", "none"), "--val none: does not exist"),
    ("data is a folder", nothing, learn("--data", "pictures"), "pictures"),
    ("data is no JSON", write("x.json", "[{"), learn("--data", "x.json"), r"x\.json: not valid JSON"),
    ("data is no UTF-8", write("x.json", b"\xff"), learn("--data", "x.json"), r"x\.json: not valid JSON"),
    ("data is an object", write("x.json", "{}"), learn("--data", "x.json"), r"x\.json: needs a JSON list"),
    ("data is a number", write("x.json", "5"), learn("--data", "x.json", tokenizer=()), r"x\.json: needs a JSON list"),
    ("data is empty", write("x.json", "[]"), learn("--data", "x.json"), r"x\.json: no record to train on"),
    ("validation is an object", write("x.json", "{}"), learn("--val", "x.json"), r"x\.json: needs a JSON list"),
    ("bad validation", records(*BAD), learn("--val", "x.json"), r"x\.json: 12 bad records"),
    ("bad records", records(*BAD), learn("--data", "x.json"), r"x\.json: 12 bad records: .*--skip-bad"),
    ("only bad records", records(*BAD), learn("--data", "x.json", "--skip-bad"), r"x\.json: no record to train on"),
    ("picture outside", records(talk("<image>", "b", image="../x.png")), learn("--data", "x.json"), "1 bad records"),
    ("no turns", records({"conversations": 5}), learn("--data", "x.json", tokenizer=()), "1 bad records"),
    ("half a character", records(talk("\ud83d", "b")), learn("--data", "x.json", tokenizer=()), "1 bad records"),
    ("half a character's id", records(talk("a", 5, id="\ud83d")), learn("--data", "x.json"), "1 bad records"),
    ("half a character's picture", records(talk("<image>", "b", image="\ud83d")), learn("--data", "x.json"), "1 bad"),
    ("text alone", records(talk("a", "b")), learn("--data", "x.json", "--freeze", "decoder"), "no record to train on"),
    ("nothing to resume", nothing, learn("--resume"), "--resume: there is no run in out"),
    ("a model to resume", nothing, learn("--resume", out="model"), "--resume: there is no run in model"),
    (
        "other settings",
        nothing,
        resume("--lr", "1", "--seed", "3"),
        "settings of the run: --seed was 0, --lr was 0.004",
    ),
    ("half a run", cut(RUN), resume(), r"run\.safetensors: damaged file"),
    ("empty run", cut(RUN, 0), resume(), r"run\.safetensors"),
    ("overwritten header", overwrite(RUN, 8, b"}{"), resume(), r"run\.safetensors: damaged file"),
    ("no settings", lambda: rewrite(RUN, lambda tensors: tensors, metadata=None), resume(), r"\brun\b"),
    ("another version", lambda: rewrite(RUN, dict, metadata={"step": "2"}), resume(), "no run of this version"),
    ("missing weight", tensor(RUN, "^model/.*wpe", lambda t: None), resume(), "wpe.weight is missing"),
    ("cut weight", tensor(RUN, "^model/.*wpe", lambda t: t[1:]), resume(), r"wpe.weight is of shape \(63, 16\)"),
    ("missing momentum", tensor(RUN, "^optimizer/.*exp_avg$", lambda t: None), resume(), "optimizer/"),
    ("cut momentum", tensor(RUN, "^optimizer/.*wpe.*exp_avg$", lambda t: t[1:]), resume(), "optimizer/"),
    ("half a model", cut("run/model.safetensors"), resume(), r"model\.safetensors: damaged file"),
]
COMMANDS = ASKING + TRAINING


@pytest.mark.parametrize(
    ("harm", "command", "told"), [case[1:] for case in COMMANDS], ids=[f"{case[2][0]}-{case[0]}" for case in COMMANDS]
)
def test_a_command_refuses_in_one_line_and_touches_no_file(world, capsys, harm, command, told):
    harm()
    before = contents()
    line = run(command)
    assert isinstance(line, str)  # sys.exit prints a text on stderr, and exits with 1
    assert line.startswith(f"{command[0]}: ")
    assert len(line.splitlines()) == 1
    assert re.search(told, line), line
    assert capsys.readouterr().err == ""
    assert contents() == before


def test_without_harm_both_commands_work(world, capsys):
    assert run(ask("--image", "pictures/a.png", "pictures/b.png")) is None
    assert run(ask()) is None
    assert run(learn()) is None
    assert Path("out/predictions.png").exists()
    assert capsys.readouterr().err == ""


def test_the_smallest_values_are_allowed():
    smallest = [f"--{name}=1" for name in AT_LEAST_ONE.split()] + [
        f"--{name}=1e-12" for name in ("lr", "muon-lr", "clip")
    ]
    for fraction in (0, 1):
        least = [*smallest, f"--text-fraction={fraction}", "--workers=0", "--weight-decay=0", "--seed=0"]
        train.check(train.arguments().parse_args([*least, "--out=nowhere"]))


@pytest.mark.parametrize("command", [ask(folder="none"), learn("--steps", "0")])
def test_debug_lets_the_error_through(world, command):
    with pytest.raises(ValueError, match="no checkpoint here|--steps 0"):
        run((*command, "--debug"))


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("what is wrong"), "tool: what is wrong"),
        (RuntimeError("a long story\nwhat is wrong\n"), "tool: what is wrong"),
        (KeyError(), "tool: KeyError()"),
        (AssertionError(" \n"), "tool: AssertionError(' \\n')"),
    ],
)
def test_an_error_becomes_the_last_line_of_what_it_says(monkeypatch, error, line):
    def main(args):
        raise error

    monkeypatch.setattr(sys, "argv", ["tool"])
    with pytest.raises(SystemExit) as caught:
        llava_mini.run_command(main, argparse.ArgumentParser())
    assert caught.value.code == line


def test_real_processes_print_one_line_and_fail(world):
    """As users see it: one line on stderr, without so much as a warning; with --debug the traceback."""
    write("bomb.png", png(20000, 20000))()
    commands = {
        r"llava_mini\.py: .*bomb\.png.*decompression bomb": ask("--image", "bomb.png"),
        r"(?s)Traceback .*\nValueError: --steps 0: must be from 1 to inf": learn("--steps", "0", "--debug"),
    }
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    started = [
        subprocess.Popen([sys.executable, ROOT / script, *words], **pipes) for script, *words in commands.values()
    ]
    for told, process in zip(commands, started, strict=True):
        out, err = process.communicate(timeout=300)
        assert re.fullmatch(told + r"[^\n]*\n", err), err
        assert (process.returncode, out) == (1, "")


# --- what shows only after the start ---------------------------------------------------------------------------------
def saved_step():
    with safe_open("out/run.safetensors", framework="pt") as file:
        return int(file.metadata()["step"])


def test_bad_records_are_counted_by_reason_and_the_first_ten_named(world, capsys):
    records(talk("<image>", "b", image="none.png", id="lost"), *BAD, talk("a", "b"), {"id": "x"})()
    assert "x.json: 14 bad records" in run(learn("--data", "x.json"))
    lines = capsys.readouterr().out.splitlines()
    assert "x.json: 1 records, 0 of them cut at a turn to fit the block size" in lines
    assert "14 records are bad: wrong roles (12), image not found (1), no conversation (1)" in lines
    named = [line.split()[1] for line in lines if line.startswith("  record ")]
    assert named == ["lost:", *(f"bad-{i}:" for i in range(9))]


def test_skip_bad_trains_on_the_rest(world, capsys):
    records(*BAD, *json.loads(Path("good.json").read_text()))()
    assert run(learn("--data", "x.json", "--skip-bad")) is None
    assert "12 records are bad: wrong roles (12)" in capsys.readouterr().out
    assert saved_step() == 2


def test_a_picture_that_breaks_during_the_run_is_named_and_resume_goes_on(world, capsys):
    whole, before = Path("pictures/a.png").read_bytes(), contents()
    cut("pictures/a.png")()
    line = run(learn())
    assert re.fullmatch(r"train\.py: record red: image can't be read: .*a\.png.*", line), line
    assert saved_step() < 2
    Path("pictures/a.png").write_bytes(whole)
    assert before.items() <= contents().items()
    assert run(learn("--resume")) is None
    assert saved_step() == 2


def test_a_loss_that_is_no_number_stops_the_run_with_its_step_rate_and_records(world, capsys):
    tensor(WEIGHTS, "ln_f.weight", lambda t: t / 0)()
    before = contents()
    line = run(learn("--init", "model", tokenizer=()))
    told = r"loss nan, gradient norm \S+ at step 1, learning rate 0\.004, records \['(red|sum)', '(red|sum)'\]"
    assert re.fullmatch(rf"train\.py: {told}; the last checkpoint is kept", line), line
    assert saved_step() == 0
    assert before.items() <= contents().items()


def test_half_a_line_at_the_end_of_the_log_does_not_stop_resume(world):
    with open("run/metrics.jsonl", "a") as file:  # as a full disk leaves it
        file.write('{"step": 3, "lo')
    assert run(resume()) is None
    assert {json.loads(line)["step"] for line in Path("run/metrics.jsonl").read_text().splitlines()} == {1, 2}


# --- tensors: (what is wrong, call, what the error says) -------------------------------------------------------------
def put(**changes):
    """Call the model on a batch of 0, 1 and 2 images in which name=change(tensor) were changed."""
    return lambda model, made: model(**made | {name: change(made[name].clone()) for name, change in changes.items()})


def fill(*index, value):
    def change(tensor):
        tensor[index] = value
        return tensor

    return change


def end_with_an_image_token(input_ids):
    """The last token of the longest row, so that no padding stands in its place."""
    input_ids[2, -1] = IMAGE
    return input_ids


def make_longer(n):
    return lambda t: torch.cat([t, torch.zeros(len(t), n - t.shape[1], dtype=t.dtype, device=t.device)], dim=1)


IMAGE = 2
NAN, INFINITY = float("nan"), float("inf")
TENSORS = [
    ("ids of int32", put(input_ids=lambda t: t.int()), r"input_ids must be int64 \(B, T\), .*got torch.int32"),
    ("ids of float", put(input_ids=lambda t: t.float()), "input_ids must be int64"),
    ("ids of one row", put(input_ids=lambda t: t[0]), r"input_ids must be int64 \(B, T\)"),
    ("no tokens", put(input_ids=lambda t: t[:, :0]), r"got torch.int64 \(3, 0\)"),
    ("empty batch", put(input_ids=lambda t: t[:0], pixel_values=lambda t: t[:0]), r"input_ids .*\(0, "),
    ("negative id", put(input_ids=fill(1, -1, value=-1)), r"row 1: token ids from -1 to \d+ leave the vocabulary"),
    ("id behind the last", put(input_ids=fill(2, 0, value=10**6)), "row 2: token ids from 0 to 1000000 leave"),
    ("too long", put(input_ids=make_longer(129)), r"T at most 128, got torch.int64 \(3, 129\)"),
    ("pixels of bytes", put(pixel_values=lambda t: t.byte()), "pixel_values must be floats .*torch.uint8"),
    ("pixels without slots", put(pixel_values=lambda t: t[:, 0]), r"got torch.float32 \(3, 3, 16, 16\)"),
    ("no slots", put(pixel_values=lambda t: t[:, :0]), r"M >= 1.*got torch.float32 \(3, 0, 3, 16, 16\)"),
    ("one channel", put(pixel_values=lambda t: t[:, :, :1]), r"got torch.float32 \(3, 2, 1, 16, 16\)"),
    ("small pictures", put(pixel_values=lambda t: t[..., ::2, ::2]), r"16, 16\), got torch.float32 \(3, 2, 3, 8, 8\)"),
    ("flat pictures", put(pixel_values=lambda t: t[..., ::2, :]), r"got torch.float32 \(3, 2, 3, 8, 16\)"),
    ("another batch's pictures", put(pixel_values=lambda t: t[:2]), r"\(3, M >= 1, .*got torch.float32 \(2, "),
    ("NaN in a picture", put(pixel_values=fill(1, 0, 0, 0, 0, value=NAN)), "row 1: pixel_values holds NaN or infinity"),
    ("NaN in an empty slot", put(pixel_values=fill(0, 1, 2, 15, 15, value=NAN)), "row 0: pixel_values holds NaN"),
    ("infinity", put(pixel_values=fill(2, 1, 0, 0, 0, value=-INFINITY)), "row 2: pixel_values holds NaN or infinity"),
    ("a picture nobody asked for", put(pixel_values=fill(0, 0, value=1.0)), "row 0: 0 image tokens, but 1 .* need 4"),
    ("a picture lost", put(pixel_values=fill(2, 1, value=0.0)), "row 2: 8 image tokens, but 1 images need 4"),
    ("a token lost", put(input_ids=lambda t: t.where(t.cumsum(1) != t.cumsum(1), 0 * t)), "row 1: 0 image tokens"),
    ("one token too many, the last", put(input_ids=end_with_an_image_token), "row 2: 9 image tokens, but 2 .* need 8"),
    ("an image token without image", put(input_ids=fill(0, 1, value=IMAGE)), "row 0: 1 image tokens, but 0 .* need 0"),
    ("nothing to learn", put(labels=lambda t: torch.full_like(t, -100)), "no position has a label"),
    (
        "only the first label",
        put(labels=lambda t: torch.where(torch.arange(t.shape[1], device=t.device) == 0, 5, -100).expand(len(t), -1)),
        "no position has a label",
    ),
]


@pytest.mark.parametrize(("call", "told"), [case[1:] for case in TENSORS], ids=[case[0] for case in TENSORS])
def test_the_model_refuses_tensors_in_one_line(tiny_model, tokenizer, device, call, told):
    assert tokenizer.token_to_id(data.IMAGE_TOKEN) == IMAGE
    made = batch(tokenizer, 0, 1, 2, device=device)
    tiny_model(**made)
    with pytest.raises(ValueError, match=told) as error:
        call(tiny_model, made)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"max_new_tokens": 128}, r"max_new_tokens 128: must be from 0 to \d+, as \d+ tokens are there"),
        ({"max_new_tokens": 1, "temperature": -0.5}, "temperature -0.5 .*at least 0"),
        ({"max_new_tokens": 1, "top_k": 0}, "top_k 0: must be at least"),
        ({"max_new_tokens": 1, "top_k": -3}, "top_k -3: must be at least"),
    ],
)
def test_generate_refuses_in_one_line(tiny_model, tokenizer, device, options, told):
    made = batch(tokenizer, 1, device=device)
    with pytest.raises(ValueError, match=told):
        tiny_model.generate(made["input_ids"], made["pixel_values"], **options)
