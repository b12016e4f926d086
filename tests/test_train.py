"""train.py: exact accumulation, text-only steps, evaluation, settings, whole runs, resume, and every bad end."""

import errno
import functools
import itertools
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import batch, picture, random_model, record, sample, spoken
from PIL import Image
from safetensors.torch import save_file
from torch import nn

import data
import llava_mini
import train
from llava_mini import LlavaMini

ROOT = Path(train.__file__).parent
ANSWERS = ("red", "a blue square at the top left", "two", "a red circle", "12", "it is the second", "cross")


class Killed(BaseException):
    """In place of kill -9: nothing in the program catches it."""


@pytest.fixture(autouse=True)
def signals_as_before():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def write_records(folder, images, name="data.json"):
    """A LLaVA JSON file of records with these numbers of pictures, and the pictures beside it."""
    records = []
    for i, n in enumerate(images):
        made = record(f"Number {i}?", ANSWERS[i % len(ANSWERS)], n, seed=i)
        for j, drawn in enumerate(made.get("image", [])):
            drawn.save(folder / f"{i}-{j}.png")
            made["image"][j] = f"{i}-{j}.png"
        records.append(made)
    (folder / name).write_text(json.dumps(records))


def steps(dataset):
    """The indices of the six steps of a run."""
    return list(itertools.islice(data.batches(64, 2, 0, [made["n_tokens"] for made in dataset.records]), 6))


@pytest.fixture(scope="module")
def shared(tmp_path_factory, tokenizer):
    """What a short run reads: 64 records, half of them text alone, their pictures, and a tokenizer."""
    folder = tmp_path_factory.mktemp("records")
    write_records(folder, (1, 0, 1, 0, 2, 0, 1, 0) * 8)
    write_records(folder, (1, 0, 1, 0, 2, 0, 1, 0), "eight.json")
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def flags(files, out, *more):
    """The command line of a short run on `files`; what comes later in it wins."""
    given = f"--out|{out}|--data|{files / 'data.json'}|--images|{files}"
    if (files / "tokenizer.json").exists() and "--init" not in more:
        given += f"|--tokenizer|{files / 'tokenizer.json'}"
    given += "|--width|16|--depth|1|--heads|2|--image-size|16|--patch-size|8|--block-size|64|--steps|6|--batch-size|2"
    given += "|--warmup|2|--workers|0|--device|cpu|--log-every|1|--eval-every|2"
    return [*given.split("|"), *map(str, more)]


def parse(files, out, *more):
    return train.arguments().parse_args(flags(files, out, *more))


def run(files, out, *more):
    train.train(parse(files, out, *more))


def command(monkeypatch, *argv):
    """-> what `python train.py ARGV` would write to stderr as it fails."""
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, argv)])
    with pytest.raises(SystemExit) as e:
        llava_mini.run_command(train.train, train.arguments())
    return e.value.code


def log(out):
    """The lines of metrics.jsonl, without the speed, which no two runs share."""
    entries = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in entry.items() if key != "tokens_per_second"} for entry in entries]


def tensors(out):
    """{file/name: tensor} of the checkpoint and of the run file."""
    files = {file: llava_mini.read_safetensors(out / file)[0] for file in ("model.safetensors", "run.safetensors")}
    return {f"{file}/{name}": tensor for file, held in files.items() for name, tensor in held.items()}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name in found:
        assert found[name].dtype == expected[name].dtype and torch.equal(found[name], expected[name]), name


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def copies(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


# --- one step --------------------------------------------------------------------------------------------------------
def cut(whole, size):
    rows = len(whole["input_ids"])
    return [{name: tensor[i : i + size] for name, tensor in whole.items()} for i in range(0, rows, size)]


def assert_close(model, expected):
    for name, p in model.named_parameters():
        assert (p.grad - expected[name]).abs().max() < 1e-12, name


@pytest.mark.parametrize("size", [8, 4, 2, 1])
@pytest.mark.parametrize("images", [(0, 0, 1, 0, 0, 0, 0, 2), (1, 2, 0, 1, 0, 0, 0, 0), (0, 0, 0, 0, 0, 0, 0, 1)])
def test_a_step_does_not_depend_on_how_it_is_cut_into_micro_batches(exact_model, tokenizer, images, size):
    whole = batch(tokenizer, *images, dtype=torch.float64)
    whole["labels"][0, 0] = 7  # nothing predicts the first token, so its label must not count either
    loss = exact_model(**whole)[1]
    loss.backward()
    expected = {name: p.grad for name, p in exact_model.named_parameters()}
    exact_model.zero_grad()
    found = train.backward(exact_model, cut(whole, size))
    assert abs(found - loss) < 1e-12 and not found.requires_grad
    assert_close(exact_model, expected)


def test_a_mean_of_the_micro_batches_means_would_depend_on_it(exact_model, tokenizer):
    whole = batch(tokenizer, 0, 0, 1, 0, 0, 0, 0, 2, dtype=torch.float64)
    exact = train.backward(exact_model, [whole])
    naive = sum(exact_model(**part)[1] for part in cut(whole, 1)) / 8
    assert abs(naive - exact) > 1e-2


def test_a_step_adds_to_the_gradient_that_is_there(exact_model, tokenizer):
    whole = batch(tokenizer, 1, 0, dtype=torch.float64)
    train.backward(exact_model, [whole])
    once = {name: p.grad.clone() for name, p in exact_model.named_parameters()}
    train.backward(exact_model, [whole])
    assert_close(exact_model, {name: 2 * gradient for name, gradient in once.items()})


@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_text_only_step_leaves_vision_and_projector_bit_identical(tiny_model, tokenizer, device, optimizer, half):
    args = train.arguments().parse_args(["--optimizer", optimizer, "--weight-decay", "0.1"])
    optimizers = train.make_optimizers(args, tiny_model)
    autocast = functools.partial(torch.autocast, device.type, torch.bfloat16, enabled=half)

    def step(*images):
        train.backward(tiny_model, [batch(tokenizer, n, device=device) for n in images], autocast=autocast)
        gradients = {name: p.grad for name, p in tiny_model.named_parameters()}
        for o in optimizers:
            o.step()
            o.zero_grad()
        held = {name: tensor.clone() for name, tensor in train.run_tensors(tiny_model, optimizers).items()}
        state = {name: tensor for name, tensor in held.items() if name.startswith("optimizer/")}
        return gradients, copies(tiny_model), state

    fresh = copies(tiny_model)
    _, weights, state = step(1, 0)
    assert all(not torch.equal(weights[name], fresh[name]) for name in fresh)
    assert all(tensor.any() for tensor in state.values())  # every weight carries momentum, and would decay
    gradients, after, after_state = step(0, 0)
    for name in weights:
        is_text = name.startswith("decoder.")
        assert (gradients[name] is not None) == is_text
        assert torch.equal(after[name], weights[name]) != is_text, name
    for name in state:
        assert torch.equal(after_state[name], state[name]) != name.startswith("optimizer/decoder."), name


def test_a_step_draws_no_random_number(tiny_model, tokenizer, device):
    optimizers = train.make_optimizers(train.arguments().parse_args([]), tiny_model)
    torch_state, python_state = torch.get_rng_state(), random.getstate()
    train.backward(tiny_model, [batch(tokenizer, 1, 0, device=device)])
    for optimizer in optimizers:
        optimizer.step()
    assert torch.equal(torch.get_rng_state(), torch_state) and random.getstate() == python_state


# --- evaluation ------------------------------------------------------------------------------------------------------
def answered(model, tokenizer, images, wrong=(), length=4, turns=1, seed=0):
    """-> (sample whose answers are what the model says, except at the positions `wrong`; does generate say so?)"""
    made = sample(tokenizer, images=images, seed=seed)
    ids = made["input_ids"][: int((made["labels"] != data.IGNORE_INDEX).nonzero()[0])]
    device, labels = next(model.parameters()).device, torch.full((len(ids),), data.IGNORE_INDEX)
    slots, right = made["images"][None].to(device), True
    for turn in range(turns):
        said = model.generate(ids[None].to(device), slots, length)[0, len(ids) :].cpu()
        answer = said.clone()
        for position in wrong:
            if position // length == turn:
                answer[position % length] = (answer[position % length] + 1) % 50 + 10
        right = right and torch.equal(said, answer)
        ids, labels = torch.cat([ids, answer, ids[:3]]), torch.cat([labels, answer, torch.full((3,), -100)])
    return {"input_ids": ids, "labels": labels, "images": made["images"]}, right


CASES = [(1, ()), (0, ()), (0, (0,)), (1, (1,)), (2, (3,)), (0, (0, 1, 2, 3)), (2, ())]  # images, wrong tokens


@pytest.mark.parametrize("images, wrong", CASES)
def test_a_record_is_right_if_greedy_decoding_says_so(tiny_model, tokenizer, device, images, wrong):
    made, right = answered(tiny_model, tokenizer, images, wrong)
    assert right == (not wrong) and train.exact_match(tiny_model, [made], 1, device) == right


@pytest.mark.parametrize("wrong", [(), (0,), (7,), (3, 4)])
def test_a_conversation_is_right_if_every_answer_in_it_is(tiny_model, tokenizer, device, wrong):
    made, right = answered(tiny_model, tokenizer, 1, wrong, turns=2)
    assert right == (not wrong) and train.exact_match(tiny_model, [made], 1, device) == right


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7, 20])
def test_exact_match_is_the_share_of_records_that_are_right(tiny_model, tokenizer, device, batch_size):
    dataset = [answered(tiny_model, tokenizer, *case, seed=i)[0] for i, case in enumerate(CASES)]
    assert train.exact_match(tiny_model, dataset, batch_size, device) == pytest.approx(3 / 7)


def test_evaluation_builds_no_graph(tiny_model, tokenizer, device):
    seen = []
    tiny_model.register_forward_hook(lambda _, __, out: seen.append(out[0].requires_grad))
    train.exact_match(tiny_model, [sample(tokenizer, images=1), sample(tokenizer)], 2, device)
    assert seen == [False]


# --- settings --------------------------------------------------------------------------------------------------------
def check(*argv):
    train.check(train.arguments().parse_args(["--out", "nowhere", *argv]))


@pytest.mark.parametrize(
    "warmup, steps, shares",
    [
        (4, 10, [1 / 4, 2 / 4, 3 / 4, 1, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6, 0]),
        (1, 4, [1, 1, 2 / 3, 1 / 3, 0]),
        (2, 2, [1 / 2, 1, 0]),
        (8, 2, [1 / 8, 2 / 8, 0]),
    ],
)
def test_the_learning_rate_rises_in_a_line_and_falls_in_a_line_to_zero(warmup, steps, shares):
    args = train.arguments().parse_args(["--warmup", str(warmup), "--steps", str(steps)])
    assert [train.learning_rate(step, args) for step in range(steps + 1)] == pytest.approx(shares)


@pytest.mark.parametrize(
    "flag, good, bad",
    [
        *((flag, "1", "0") for flag in ("width", "depth", "heads", "image-size", "patch-size", "block-size", "steps")),
        *((flag, "1", "0") for flag in ("batch-size", "accumulate", "warmup", "log-every", "eval-every")),
        *((flag, "0", "-1") for flag in ("workers", "weight-decay", "seed")),
        *((flag, "1e-12", "0") for flag in ("lr", "muon-lr", "clip")),
        *((flag, "1e12", "inf") for flag in ("lr", "muon-lr", "clip", "weight-decay")),
        *((flag, "1", "nan") for flag in ("lr", "muon-lr", "clip", "weight-decay", "text-fraction")),
        ("text-fraction", "0", "-0.1"),
        ("text-fraction", "1", "1.1"),
        *((flag, ".", "nowhere") for flag in ("init", "vision", "decoder", "tokenizer", "data")),
    ],
)
def test_a_bad_value_is_refused_and_its_flag_named(flag, good, bad):
    check(f"--{flag}", good)
    with pytest.raises(ValueError, match=rf"^--{flag} {bad}(\.0)?: "):
        check(f"--{flag}", bad)


@pytest.mark.parametrize("flag", [("--images", "."), ("--val", "."), ("--skip-bad",)], ids=lambda flag: flag[0])
def test_what_says_more_about_json_data_is_refused_without_it(flag):
    check("--data", ".", *flag)
    with pytest.raises(ValueError, match=f"^{flag[0]} needs --data"):
        check(*flag)


@pytest.mark.parametrize("flag", ["--images", "--val"])
def test_files_of_json_data_must_exist(flag):
    with pytest.raises(ValueError, match=f"^{flag} nowhere: does not exist"):
        check("--data", ".", flag, "nowhere")


@pytest.mark.parametrize("flag", ["--vision", "--decoder", "--tokenizer"])
def test_init_brings_all_parts_and_takes_no_other(flag):
    with pytest.raises(ValueError, match="^--init brings its own parts"):
        check("--init", ".", flag, ".")


@pytest.mark.parametrize(
    "argv", ["--freeze heart", "--optimizer sgd", "--dtype int8", "--steps many", "--sprout 1", "--device gizmo"]
)
def test_a_word_that_means_nothing_gives_one_line_that_quotes_it(monkeypatch, tmp_path, argv):
    message = command(monkeypatch, "--out", tmp_path / "out", *argv.split())
    assert re.fullmatch(rf"train.py: .*\b{argv.split()[1]}\b.*", message) and not (tmp_path / "out").exists()


def test_help_explains_every_flag(capsys):
    parser = train.arguments()
    with pytest.raises(SystemExit) as e:
        parser.parse_args(["--help"])
    shown = capsys.readouterr().out
    assert e.value.code == 0 and all(action.help for action in parser._actions)
    assert all(f"--{name.replace('_', '-')}" in shown for name in vars(parser.parse_args([])))
    assert f"(default: {parser.get_default('steps')})" in shown and train.__doc__.splitlines()[0] in " ".join(
        shown.split()
    )


def test_a_run_that_names_no_setting_is_the_one_whose_figures_the_readme_shows():
    expected = dict(width=96, depth=3, heads=4, image_size=32, patch_size=8, block_size=256, seed=0, steps=2250)
    expected |= dict(batch_size=32, accumulate=1, optimizer="muon", lr=4e-3, muon_lr=6e-3, weight_decay=0.05, warmup=50)
    expected |= dict(
        clip=1.0, device=llava_mini.DEVICE, dtype="auto", workers=1, log_every=10, eval_every=450, text_fraction=0.5
    )
    expected |= dict(out=Path("out"), freeze=[], resume=False, skip_bad=False)
    expected |= dict.fromkeys(("init", "vision", "decoder", "tokenizer", "data", "images", "val"))
    assert vars(train.arguments().parse_args([])) == expected


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_batch_that_ranks_and_micro_batches_do_not_divide_is_refused(monkeypatch, ranks):
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    with pytest.raises(ValueError, match=f"--batch-size 7 does not divide by {3 * ranks}, which is ranks x"):
        train.set_up(train.arguments().parse_args(["--batch-size", "7", "--accumulate", "3"]))


@pytest.mark.parametrize(
    "kind, cores, rank, backend, threads",
    [("cpu", 8, 0, "gloo", 2), ("cpu", 2, 1, "gloo", 1), ("cuda", 8, 1, "nccl", None)],
)
def test_under_torchrun_a_process_takes_its_share_of_the_machine(monkeypatch, kind, cores, rank, backend, threads):
    """A second node of two, with four processes each: rank 5 is the second one there."""
    calls = {}
    for name, value in dict(RANK=4 * rank + rank, WORLD_SIZE=8, LOCAL_RANK=rank, LOCAL_WORLD_SIZE=4).items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    monkeypatch.setattr(torch, "set_num_threads", lambda n: calls.update(threads=n))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: calls.update(device=device))
    monkeypatch.setattr(train.dist, "init_process_group", lambda name: calls.update(backend=name))
    monkeypatch.setattr(sys, "stdout", terminal := sys.stdout)
    args = train.arguments().parse_args(["--batch-size", "32", "--accumulate", "4", "--device", kind])
    device = torch.device("cuda", rank) if kind == "cuda" else torch.device("cpu")
    assert train.set_up(args) == (5 * rank, 8, device)
    assert calls == {"backend": backend} | ({"device": device} if kind == "cuda" else {"threads": threads})
    assert (sys.stdout is terminal) == (rank == 0) and (rank == 0 or sys.stdout.name == os.devnull)


def test_one_process_needs_no_process_group(monkeypatch):
    monkeypatch.setattr(train.dist, "init_process_group", None)
    args = train.arguments().parse_args(["--device", "cpu", "--batch-size", "6", "--accumulate", "3"])
    assert train.set_up(args) == (0, 1, torch.device("cpu"))


# --- model, data and optimisers of a run -----------------------------------------------------------------------------
def test_a_new_model_has_the_sizes_and_the_seed_that_were_asked_for(shared):
    model, tokenizer = train.build(parse(shared, "out"))
    vision, text = model.config.vision, model.config.text
    assert (vision.image_size, vision.patch_size, vision.width, vision.depth, vision.heads) == (16, 8, 16, 1, 2)
    assert (text.block_size, text.width, text.depth, text.heads) == (64, 16, 1, 2)
    assert text.vocab_size == tokenizer.get_vocab_size()
    assert model.config.image_token_id == tokenizer.token_to_id(data.IMAGE_TOKEN)
    again, other = train.build(parse(shared, "out"))[0], train.build(parse(shared, "out", "--seed", 1))[0]
    assert_same(copies(again), copies(model))
    assert not torch.equal(other.decoder.wte.weight, model.decoder.wte.weight)
    assert not torch.equal(other.vision.pos_embed.weight, model.vision.pos_embed.weight)


def test_the_tokenizer_is_the_one_given_else_the_decoders_else_learned_from_the_data(shared, tmp_path, tokenizer):
    def vocabulary(*argv):
        return train.build(train.arguments().parse_args(["--width", "16", "--depth", "1", *map(str, argv)]))[
            1
        ].get_vocab()

    texts = ["zebra zebra zebra zebra"]
    (decoder := tmp_path / "decoder").mkdir()
    data.train_tokenizer(spoken(*texts), 300).save(str(decoder / "tokenizer.json"))
    write_decoder(decoder, 300)
    (tmp_path / "zebra.json").write_text(json.dumps([record(text) for text in texts]))
    assert vocabulary("--tokenizer", shared / "tokenizer.json") == tokenizer.get_vocab()
    assert "zebra" in vocabulary("--decoder", decoder)
    assert vocabulary("--decoder", decoder, "--tokenizer", shared / "tokenizer.json") == tokenizer.get_vocab()
    assert "zebra" in vocabulary("--data", tmp_path / "zebra.json")
    toy = data.train_tokenizer(map(data.ToyDataset("train", 2000).record, range(2000)))
    assert vocabulary() == toy.get_vocab()


def write_part(folder, config, module, part):
    views = llava_mini.disk_views(module, part)
    save_file({name: view.detach().contiguous().clone() for name, view in views}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))


def write_decoder(folder, vocab_size):
    """A GPT-2 folder as transformers writes it."""
    sizes = (vocab_size, 48, 32, 1, 4)
    gpt = llava_mini.GPT(llava_mini.GPTConfig(*sizes))
    write_part(folder, llava_mini.GPT2 | dict(zip(llava_mini.GPT2_SIZES, sizes, strict=True)), gpt, "decoder")
    return gpt


def test_pretrained_parts_take_the_place_of_new_ones(shared, tmp_path):
    (tmp_path / "clip").mkdir(), (tmp_path / "gpt2").mkdir()
    sizes = (32, 16, 24, 2, 2)
    vit = llava_mini.ViT(llava_mini.ViTConfig(*sizes))
    clip = llava_mini.CLIP | dict(zip(llava_mini.CLIP_SIZES, sizes, strict=True))
    write_part(tmp_path / "clip", clip, vit, "vision")
    gpt = write_decoder(tmp_path / "gpt2", 500)
    fresh, _ = train.build(parse(shared, "out"))
    model, _ = train.build(parse(shared, "out", "--vision", tmp_path / "clip"))
    assert model.config.vision == llava_mini.ViTConfig(32, 16, 24, 1, 2) and model.config.text == fresh.config.text
    assert torch.equal(model.vision.patch_embed.weight, vit.patch_embed.weight) and len(model.vision.blocks) == 1
    assert (model.projector.linear_1.in_features, model.projector.linear_1.out_features) == (24, 16)
    model, tokenizer = train.build(parse(shared, "out", "--decoder", tmp_path / "gpt2"))
    assert model.config.text == llava_mini.GPTConfig(500, 48, 32, 1, 4) and model.config.vision == fresh.config.vision
    assert_same(copies(model.decoder), copies(gpt))
    assert model.projector.linear_1.out_features == 32 and tokenizer.get_vocab_size() < 500


def test_a_run_starts_from_an_earlier_model_and_its_tokenizer(shared, tmp_path, tiny_model, tokenizer):
    tiny_model.save_pretrained(tmp_path, tokenizer)
    model, found = train.build(train.arguments().parse_args(["--init", str(tmp_path), "--out", "elsewhere"]))
    assert_same(copies(model), copies(tiny_model.cpu()))
    assert found.get_vocab() == tokenizer.get_vocab()


def test_the_toy_data_of_a_run(capsys, tokenizer, tiny_model):
    args = train.arguments().parse_args(["--seed", "5", "--steps", "7", "--batch-size", "6", "--text-fraction", "0.25"])
    training, evaluation = train.datasets(args, tiny_model.config, tokenizer)
    found = {name: (s.split, s.size, s.text_fraction) for name, s in {"training": training, **evaluation}.items()}
    assert found == {
        "training": ("train", 42, 0.25),
        "image": ("test", 500, 0.0),
        "text": ("test", 500, 1.0),
        "held_out_pairs": ("pairs", 500, 0.0),
        "transfer": ("transfer", 200, 0.0),
    }
    for dataset in (training, *evaluation.values()):
        assert (dataset.seed, dataset.image_size, dataset.patch_size) == (5, 16, 8) and dataset.tokenizer is tokenizer
    assert capsys.readouterr().out == ""


def test_with_a_frozen_decoder_the_toy_data_has_no_text_only_records(capsys, tokenizer, tiny_model):
    args = train.arguments().parse_args(["--freeze", "decoder"])
    training, evaluation = train.datasets(args, tiny_model.config, tokenizer)
    assert training.text_fraction == 0.0 and evaluation["text"].text_fraction == 1.0
    assert "no text-only records" in capsys.readouterr().out


def test_the_json_data_of_a_run(shared, tokenizer, tiny_model, capsys):
    write_records(shared, (0, 1, 0), "three.json")
    args = parse(shared, "out", "--val", shared / "three.json")
    training, evaluation = train.datasets(args, tiny_model.config, tokenizer)
    assert len(training) == 64 and {name: len(dataset) for name, dataset in evaluation.items()} == {
        "image": 1,
        "text": 2,
    }
    assert [evaluation["text"].record(i)["id"] for i in range(2)] == ["record-0", "record-2"]
    assert (
        f"{shared / 'data.json'}: 64 records, 0 of them cut at a turn to fit the block size\n"
        in capsys.readouterr().out
    )


def test_a_validation_file_without_pictures_gives_no_figure_for_them(shared, tmp_path, tokenizer, tiny_model):
    write_records(tmp_path, (0, 0), "val.json")
    args = parse(shared, "out", "--val", tmp_path / "val.json")
    assert list(train.datasets(args, tiny_model.config, tokenizer)[1]) == ["text"]
    assert train.datasets(parse(shared, "out"), tiny_model.config, tokenizer)[1] == {}


def test_with_a_frozen_decoder_text_only_json_records_are_dropped_and_counted(
    shared, tmp_path, tokenizer, tiny_model, capsys
):
    training, _ = train.datasets(parse(shared, "out", "--freeze", "vision", "decoder"), tiny_model.config, tokenizer)
    assert [made["id"] for made in training.records] == [f"record-{i}" for i in range(0, 64, 2)]
    assert "32 text-only records dropped" in capsys.readouterr().out
    write_records(tmp_path, (0, 0))
    with pytest.raises(ValueError, match="data.json: no record to train on"):
        args = parse(shared, "out", "--freeze", "decoder", "--data", tmp_path / "data.json")
        train.datasets(args, tiny_model.config, tokenizer)


def write_bad_records(folder):
    """Two good records, one of them too long for 64 tokens as a whole, and twelve bad ones of two kinds."""
    long = record("Short?", "yes")
    long["conversations"] += record("Long? " * 60, "yes")["conversations"]
    good = [long, record(seed=1)]
    bad = [record("<image> Where?", images=0, seed=n) | {"image": "missing.png"} for n in range(2, 13)]
    (folder / "data.json").write_text(json.dumps([*good, *bad, {"id": "empty"}]))


def test_bad_records_are_counted_and_shown_and_refused(tmp_path, tokenizer, tiny_model, capsys):
    write_bad_records(tmp_path)
    tiny_model.config.text.block_size = 64
    with pytest.raises(ValueError, match="data.json: 12 bad records: mend them, or leave them out with --skip-bad"):
        train.datasets(parse(tmp_path, "out"), tiny_model.config, tokenizer)
    first, second, *shown = capsys.readouterr().out.splitlines()
    assert first == f"{tmp_path / 'data.json'}: 2 records, 1 of them cut at a turn to fit the block size"
    assert second == "12 records are bad: image not found (11), no conversation (1)"
    assert shown == [f"  record record-{n}: image not found: {tmp_path / 'missing.png'}" for n in range(2, 12)]


def test_one_bad_record_is_enough(tmp_path, tokenizer, tiny_model, capsys):
    (tmp_path / "data.json").write_text(json.dumps([record(), {"id": "empty"}]))
    with pytest.raises(ValueError, match="data.json: 1 bad records"):
        train.datasets(parse(tmp_path, "out"), tiny_model.config, tokenizer)
    assert "  record empty: no conversation" in capsys.readouterr().out


def test_skip_bad_leaves_bad_records_out(tmp_path, tokenizer, tiny_model):
    write_bad_records(tmp_path)
    training, _ = train.datasets(parse(tmp_path, "out", "--skip-bad"), tiny_model.config, tokenizer)
    assert [made["id"] for made in training.records] == ["record-0", "record-1"]


def names_of(model, optimizer):
    names = {p: name for name, p in model.named_parameters()}
    return {names[p] for p in optimizer.param_groups[0]["params"]}


def test_muon_takes_the_matrices_of_patches_blocks_and_projector_and_adamw_the_rest(tiny_model):
    args = train.arguments().parse_args(["--lr", "0.5", "--muon-lr", "0.25", "--weight-decay", "0.125"])
    adamw, muon = train.make_optimizers(args, tiny_model)
    matrices = ("qkv.weight", "attn_out.weight", "mlp_in.weight", "mlp_out.weight")
    expected = {f"{part}.blocks.{i}.{name}" for part in ("vision", "decoder") for i in range(2) for name in matrices}
    expected |= {"vision.patch_embed.weight", "projector.linear_1.weight", "projector.linear_2.weight"}
    assert names_of(tiny_model, muon) == expected
    thrice = {name for name, p in tiny_model.named_parameters() if p.n_matrices == 3}
    assert thrice == {name for name in expected if "qkv" in name}
    assert names_of(tiny_model, adamw) == {name for name, _ in tiny_model.named_parameters()} - expected
    assert isinstance(adamw, torch.optim.AdamW) and isinstance(muon, train.Muon)
    found = [adamw.defaults[key] for key in ("lr", "betas", "weight_decay", "fused")]
    assert found == [0.5, (0.9, 0.95), 0.125, True]
    assert muon.defaults == {"lr": 0.25, "momentum": 0.8, "weight_decay": 0.125}


def test_a_head_of_its_own_is_no_hidden_matrix():
    model = random_model(50, 2, tied_head=False)
    adamw, muon = train.make_optimizers(train.arguments().parse_args([]), model)
    assert "decoder.lm_head.weight" in names_of(model, adamw) - names_of(model, muon)


@pytest.mark.parametrize("shape", [(2, 3, 5), (2, 5, 3)])
def test_orthogonal_keeps_the_directions_and_brings_the_singular_values_near_one(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for matrix, found in zip(x, train.orthogonal(x), strict=True):
        u, s, v = torch.linalg.svd(matrix, full_matrices=False)
        s = s / s.norm()
        for _ in range(5):  # the polynomial that the matrix products apply to each singular value
            s = 3.4445 * s - 4.775 * s**3 + 2.0315 * s**5
        assert (s - 1).abs().max() < 0.5
        torch.testing.assert_close(found, u @ torch.diag(s) @ v, rtol=1e-12, atol=1e-12)
    assert torch.equal(train.orthogonal(torch.zeros(shape)), torch.zeros(shape))


def test_muon_steps_as_if_each_matrix_were_alone_though_it_takes_those_of_one_shape_together():
    generator = torch.Generator().manual_seed(0)
    shapes = [(96, 96), (96, 288), (96, 96), (288, 96), (96, 96)]
    weights, gradients = ([torch.randn(shape, generator=generator) for shape in shapes] for _ in range(2))
    together, alone = ([nn.Parameter(weight.clone()) for weight in weights] for _ in range(2))
    options = {"lr": 0.1, "momentum": 0.8, "weight_decay": 0.5}
    for p, q, gradient in zip(together, alone, gradients):
        p.grad = q.grad = gradient
        train.Muon([q], **options).step()
    without = nn.Parameter(weights[0].clone())  # had no gradient
    train.Muon([without, *together], **options).step()
    assert torch.equal(without, weights[0]) and all(map(torch.equal, together, alone))


@pytest.mark.parametrize("part", ["vision", "decoder"])
def test_muon_steps_queries_keys_and_values_as_three_matrices(tiny_model, part):
    qkv = getattr(tiny_model, part).blocks[0].qkv.weight
    qkv.grad = torch.randn(qkv.shape, generator=torch.Generator().manual_seed(0))
    apart = [nn.Parameter(matrix.detach().clone()) for matrix in qkv.split(len(qkv) // 3)]
    for matrix, gradient in zip(apart, qkv.grad.split(len(qkv) // 3), strict=True):
        matrix.grad = gradient
    _, muon = train.make_optimizers(train.arguments().parse_args([]), tiny_model)
    for optimizer in (muon, train.Muon(apart, **muon.defaults)):
        optimizer.step()
    assert torch.equal(qkv, torch.cat(apart))


@pytest.mark.parametrize("shape", [(8, 24), (24, 8)])
def test_muon_takes_the_steps_of_torch_but_for_its_rounding_to_bfloat16(shape):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator)
    ours, theirs = nn.Parameter(weight.clone()), nn.Parameter(weight.clone())
    options = {"lr": 0.1, "momentum": 0.8, "weight_decay": 0.5}
    muon = train.Muon([ours], **options)
    reference = torch.optim.Muon([theirs], adjust_lr_fn="match_rms_adamw", **options)
    for _ in range(3):
        ours.grad = theirs.grad = torch.randn(shape, generator=generator)
        muon.step()
        reference.step()
        torch.testing.assert_close(muon.state[ours]["momentum_buffer"], reference.state[theirs]["momentum_buffer"])
        assert (ours - theirs).norm() < 0.02 * (ours - weight).norm()


@pytest.mark.parametrize("channels", [2, 20])
def test_muon_treats_a_convolution_as_a_matrix_of_one_row_a_filter(channels):
    generator = torch.Generator().manual_seed(0)
    weight, gradient = (torch.randn(channels, 3, 2, 2, generator=generator) for _ in range(2))
    filters, matrix = nn.Parameter(weight.clone()), nn.Parameter(weight.flatten(1).clone())
    filters.grad, matrix.grad = gradient, gradient.flatten(1)
    train.Muon([filters, matrix], lr=0.1, momentum=0.8, weight_decay=0.5).step()
    assert torch.equal(filters.flatten(1), matrix) and not torch.equal(filters, weight)


def test_adamw_can_take_all(tiny_model):
    (adamw,) = train.make_optimizers(train.arguments().parse_args(["--optimizer", "adamw"]), tiny_model)
    assert isinstance(adamw, torch.optim.AdamW)
    assert names_of(tiny_model, adamw) == {name for name, _ in tiny_model.named_parameters()}


def test_frozen_parts_are_in_no_optimiser_and_something_must_be_left(tiny_model):
    args = train.arguments().parse_args([])
    tiny_model.vision.requires_grad_(False)
    tiny_model.decoder.requires_grad_(False)
    optimizers = train.make_optimizers(args, tiny_model)
    names = set.union(*(names_of(tiny_model, optimizer) for optimizer in optimizers))
    assert names == {name for name, _ in tiny_model.named_parameters() if "projector" in name}
    tiny_model.projector.requires_grad_(False)
    with pytest.raises(ValueError, match="--freeze leaves nothing to train"):
        train.make_optimizers(args, tiny_model)


# --- a run -----------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def trained(shared, tmp_path_factory):
    """A run that learns eight records by heart, and is asked for them."""
    out = tmp_path_factory.mktemp("trained") / "new" / "out"
    eight = "--data", shared / "eight.json", "--val", shared / "eight.json", "--batch-size", 8, "--width", 32
    rates = "--steps", 100, "--warmup", 5, "--lr", 1e-2, "--muon-lr", 2e-2
    run(shared, out, *eight, *rates, "--eval-every", 1000, "--log-every", 1000)
    return out


def test_a_tiny_model_learns_eight_mixed_records_by_heart(trained):
    *_, scores = log(trained)
    assert scores == {"step": 100, "samples_seen": 800, "image_exact_match": 1.0, "text_exact_match": 1.0}


def test_a_run_leaves_a_model_that_answers(trained, shared):
    model = LlavaMini.from_pretrained(trained)
    tokenizer = data.load_tokenizer(trained / "tokenizer.json")
    dataset = train.json_dataset(parse(shared, trained), shared / "eight.json", model.config, tokenizer)
    assert train.exact_match(model, dataset, 8, torch.device("cpu")) == 1.0
    for i, answer in enumerate([*ANSWERS, ANSWERS[0]]):
        record = dataset.record(i)
        assert train.reply(model, tokenizer, record) == (f"Number {i}?", record["image"], answer, answer)


def test_a_reply_is_to_the_first_question_and_ends_where_the_sequence_may(tiny_model, tokenizer, device):
    made = record("First? <|im_start|>", "yes", images=1)
    made["conversations"] += record("Second?", "no")["conversations"]
    made["conversations"].insert(0, {"from": "system", "value": "Be brief."})
    question, images, answer, reference = train.reply(tiny_model, tokenizer, made)
    assert (question, images, reference) == ("First? <|im_start|>", made["image"], "yes")
    made = data.make_sample(made, tokenizer, 16, 8)
    start = int((made["labels"] != data.IGNORE_INDEX).nonzero()[0])
    ids, slots = made["input_ids"][None, :start].to(device), made["images"][None].to(device)
    end = tokenizer.token_to_id(data.IM_END)
    said = tiny_model.generate(ids, slots, 128 - start, eos_token_id=end)[0, start:].tolist()
    assert answer == tokenizer.decode(said).rstrip("\ufffd")  # half a character at the end is not streamed


def test_a_reply_to_the_first_question_sees_no_later_picture(tiny_model, tokenizer):
    turns = record("First?", "yes", images=1)["conversations"] + record("Second?", "no", images=1)["conversations"]
    red, blue = (Image.new("RGB", (16, 16), colour) for colour in ("red", "blue"))
    both, first = {"image": [red, blue], "conversations": turns}, {"image": [red], "conversations": turns[:2]}
    assert train.reply(tiny_model, tokenizer, both) == train.reply(tiny_model, tokenizer, first)
    assert both["image"] == [red, blue]  # the record is as it was


def test_python_train_py_from_end_to_end(tmp_path):
    out = tmp_path / "out"
    argv = (
        "--width 16 --depth 1 --heads 2 --image-size 16 --batch-size 4 --steps 4 --log-every 2 --workers 0 --device cpu"
    )
    done = subprocess.run(
        [sys.executable, ROOT / "train.py", "--out", out, *argv.split()],
        capture_output=True,
        text=True,
        timeout=100,
        cwd=tmp_path,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
    model = LlavaMini.from_pretrained(out)
    count = sum(p.numel() for p in model.parameters())
    assert (
        f"{count:,} parameters, 16 records, on cpu\n" in done.stdout
        and f"done: see {out / 'predictions.png'}\n" in done.stdout
    )
    line = r"step {}/4  loss \d\.\d{{3}}  images encoded \d+ of \d+ slots  [\d,]+ tokens/s  \d+ s left"
    lines = [text for text in done.stdout.splitlines() if text.startswith("step ")]
    assert len(lines) == 2 and re.fullmatch(line.format(2), lines[0]) and re.fullmatch(line.format(4), lines[1])
    scores = "image", "text", "held_out_pairs", "transfer"
    assert re.search(r"\n" + "  ".join(rf"{name}_exact_match \d+\.\d%" for name in scores) + r"\n", done.stdout)
    assert "\r" not in done.stdout and "\033" not in done.stdout
    first, second, evaluation = [json.loads(text) for text in (out / "metrics.jsonl").read_text().splitlines()]
    progress = {"step", "loss", "gradient_norm", "images_encoded", "slots", "tokens_per_second"}
    assert first.keys() == second.keys() == progress and (first["step"], second["step"]) == (2, 4)
    assert evaluation.keys() == {"step", "samples_seen", *(f"{name}_exact_match" for name in scores)}
    assert (evaluation["step"], evaluation["samples_seen"]) == (4, 16)
    assert data.load_tokenizer(out / "tokenizer.json").get_vocab_size() == model.config.text.vocab_size
    with Image.open(out / "predictions.png") as page:
        assert page.format == "PNG" and page.size == (1180, 810)
    assert not list(out.glob("*.tmp"))


@pytest.mark.parametrize("optimizer, accumulate", [("muon", 1), ("adamw", 2)])
def test_a_run_is_this_loop(shared, tmp_path, optimizer, accumulate):
    args = parse(
        shared, tmp_path / "out", "--optimizer", optimizer, "--accumulate", accumulate, "--clip", 0.5, "--seed", 3
    )
    train.train(args)
    model, tokenizer = train.build(args)
    training, _ = train.datasets(args, model.config, tokenizer)
    optimizers = train.make_optimizers(args, model)
    _, batches = train.make_batches(args, training, 0, 0, 1, torch.device("cpu"))
    seen = []
    for step in range(6):
        micro_batches = [next(batches) for _ in range(accumulate)]
        loss = train.backward(model, micro_batches)
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        for optimizer, peak in zip(optimizers, (args.lr, args.muon_lr), strict=False):
            optimizer.param_groups[0]["lr"] = peak * min((step + 1) / 2, (6 - step) / 4, 1)
            optimizer.step()
            optimizer.zero_grad()
        slots = [slot for part in micro_batches for slot in part["pixel_values"].flatten(0, 1)]
        seen.append((step + 1, loss.item(), norm.item(), sum(bool(slot.any()) for slot in slots), len(slots)))
    assert_same(copies(LlavaMini.from_pretrained(tmp_path / "out")), copies(model))
    keys = "step", "loss", "gradient_norm", "images_encoded", "slots"
    assert [tuple(e[k] for k in keys) for e in log(tmp_path / "out") if "loss" in e] == seen


@pytest.mark.parametrize("first", [0, 1, 5])
@pytest.mark.parametrize(("ranks", "accumulate"), [(1, 1), (2, 1), (1, 2), (2, 2), (4, 2), (1, 8)])
def test_ranks_and_micro_batches_share_out_each_step_from_the_first_on(monkeypatch, first, ranks, accumulate):
    monkeypatch.setattr(data, "collate", lambda indices: indices)
    argv = "--steps", "6", "--batch-size", "8", "--accumulate", str(accumulate), "--workers", "0"
    args, cpu, training = train.arguments().parse_args(argv), torch.device("cpu"), list(range(64))
    made = [train.make_batches(args, training, first, rank, ranks, cpu) for rank in range(ranks)]
    wanted, shares = list(itertools.islice(made[0][0](), 6)), [list(batches) for _, batches in made]
    assert all(len(share) == (6 - first) * accumulate for share in shares)
    assert all(len(part) == 8 // (ranks * accumulate) for share in shares for part in share)
    for i, step in enumerate(wanted[first:]):
        parts = [part for share in shares for part in share[i * accumulate : (i + 1) * accumulate]]
        assert sorted(sum(parts, [])) == sorted(step)


def test_toy_data_is_not_grouped_by_length(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(train.data, "batches", lambda *a: seen.append(a) or (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):
        argv = "--width 16 --depth 1 --heads 2 --steps 5 --batch-size 8 --accumulate 2 --seed 4 --device cpu"
        train.train(train.arguments().parse_args(["--out", str(tmp_path / "out"), *argv.split()]))
    assert seen == [(40, 8, 4, None)]


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_are_prepared_by_so_many_workers(shared, tmp_path, monkeypatch, workers):
    def collate(samples, collate=data.collate):
        with open(tmp_path / "processes", "a") as file:
            file.write(f"{os.getpid()}\n")
        return collate(samples)

    monkeypatch.setattr(data, "collate", collate)
    run(shared, tmp_path / "out", "--workers", workers)
    processes = (tmp_path / "processes").read_text().split()
    assert len(processes) == 6 and len(set(processes)) == 1 and (str(os.getpid()) in processes) == (workers == 0)


def test_metrics_come_every_so_many_steps_and_at_the_end(shared, tmp_path):
    run(shared, tmp_path / "out", "--steps", 5, "--log-every", 2, "--eval-every", 3, "--val", shared / "data.json")
    kinds = [(entry["step"], "loss" if "loss" in entry else entry["samples_seen"]) for entry in log(tmp_path / "out")]
    assert kinds == [(2, "loss"), (3, 6), (4, "loss"), (5, "loss"), (5, 10)]


def test_the_log_counts_the_images_encoded_in_training_alone(shared, tmp_path):
    """Every slot of these records holds an image, so both counts agree, whatever is evaluated in between."""
    write_records(tmp_path, (1, 1, 1, 1))
    more = "--data", tmp_path / "data.json", "--images", tmp_path, "--val", tmp_path / "data.json"
    run(shared, tmp_path / "out", *more, "--log-every", 3, "--eval-every", 2)
    counts = [(entry["images_encoded"], entry["slots"]) for entry in log(tmp_path / "out") if "slots" in entry]
    assert counts == [(6, 6), (6, 6)]


def test_speed_and_time_left_leave_out_pauses_and_what_was_before_a_resume(shared, tmp_path, monkeypatch, capsys):
    out, tokens = tmp_path / "out", []

    class Clock:
        now = 1000.0

        def time(self):
            return self.now

    interrupt(monkeypatch, shared, out, 2, "--val", shared / "data.json")
    capsys.readouterr()
    clock, backward, exact_match = Clock(), train.backward, train.exact_match

    def slow_backward(model, batches, *rest):
        clock.now += 2
        tokens.append(sum(part["input_ids"].numel() for part in batches))
        return backward(model, batches, *rest)

    def slow_exact_match(*rest):
        clock.now += 100
        return exact_match(*rest)

    monkeypatch.setattr(train, "time", clock)
    monkeypatch.setattr(train, "backward", slow_backward)
    monkeypatch.setattr(train, "exact_match", slow_exact_match)
    run(shared, out, "--val", shared / "data.json", "--resume")
    entries = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    speeds = [entry["tokens_per_second"] for entry in entries if "tokens_per_second" in entry][2:]
    assert speeds == pytest.approx([n / 2 for n in tokens])
    assert re.findall(r"(\d+) s left", capsys.readouterr().out) == ["6", "4", "2", "0"]


def test_on_a_terminal_one_line_is_written_over_and_over(shared, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    run(shared, tmp_path / "out", "--steps", 2)
    shown = capsys.readouterr().out
    assert re.search(r"\rstep 1/2  [^\n]* s left\033\[K\rstep 2/2  [^\n]* s left\033\[K\n", shown)


def test_on_a_terminal_the_word_of_a_stop_has_a_line_of_its_own(shared, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    interrupt(monkeypatch, shared, tmp_path / "out", 3)
    assert "s left\033[K\nstopped after step 3" in capsys.readouterr().out


@pytest.mark.parametrize("dtype, half", [("auto", None), ("float32", False), ("bfloat16", True)])
def test_auto_is_bfloat16_on_cuda_only(shared, tmp_path, monkeypatch, device, dtype, half):
    """In every forward pass, of training and of evaluation, and in no backward pass."""
    forward, backward, seen = llava_mini.GPT.forward, torch.Tensor.backward, {"forward": set(), "backward": set()}

    def watch(name, function):
        def watched(*args):
            seen[name].add(torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type))
            return function(*args)

        return watched

    monkeypatch.setattr(llava_mini.GPT, "forward", watch("forward", forward))
    monkeypatch.setattr(torch.Tensor, "backward", watch("backward", backward))
    run(shared, tmp_path / "out", "--dtype", dtype, "--device", device.type, "--val", shared / "eight.json")
    expected = device.type == "cuda" if half is None else half
    assert seen == {"forward": {torch.bfloat16 if expected else False}, "backward": {False}}


@pytest.mark.parametrize("frozen", [("vision",), ("projector",), ("decoder",), ("vision", "decoder")])
def test_frozen_parts_stay_as_they_are_and_the_others_learn(shared, tmp_path, tiny_model, tokenizer, frozen):
    tiny_model.save_pretrained(tmp_path / "init", tokenizer)
    run(shared, tmp_path / "out", "--init", tmp_path / "init", "--freeze", *frozen)
    after = LlavaMini.from_pretrained(tmp_path / "out")
    for part in ("vision", "projector", "decoder"):
        was, now = copies(getattr(tiny_model.cpu(), part)), copies(getattr(after, part))
        assert all(torch.equal(was[name], now[name]) == (part in frozen) for name in was), part


def test_a_run_draws_no_random_number_once_it_trains(shared, tmp_path, monkeypatch):
    states, learning_rate = [], train.learning_rate
    monkeypatch.setattr(train, "learning_rate", lambda *a: states.append(torch.get_rng_state()) or learning_rate(*a))
    run(shared, tmp_path / "out", "--val", shared / "data.json")
    assert len(states) == 6 and all(torch.equal(state, states[0]) for state in states)


@pytest.mark.parametrize("name", ["run.safetensors", "metrics.jsonl", "notes.txt"])
def test_a_folder_that_holds_anything_is_left_as_it_is(shared, tmp_path, name):
    (tmp_path / name).write_text("precious")
    how = "continue its run with --resume, or choose" if name == "run.safetensors" else "choose"
    with pytest.raises(ValueError, match=f"is not empty: {how} another --out"):
        run(shared, tmp_path)
    assert contents(tmp_path) == {Path(name): b"precious"}


def test_a_hidden_file_in_the_folder_does_not_matter(shared, tmp_path):
    (tmp_path / ".keep").touch()
    run(shared, tmp_path, "--steps", 1)


def test_a_mistake_in_the_data_leaves_no_folder_behind(tmp_path, monkeypatch, tokenizer):
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    write_bad_records(tmp_path)
    assert "12 bad records" in command(monkeypatch, *flags(tmp_path, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


# --- resume ----------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def straight(shared, tmp_path_factory):
    """Six steps without a break: what every broken and resumed run must equal."""
    out = tmp_path_factory.mktemp("straight")
    run(shared, out)
    return out


def assert_equal_runs(out, straight):
    assert_same(tensors(out), tensors(straight))
    assert log(out) == log(straight)
    assert not list(out.glob("*.tmp")) and (out / "predictions.png").exists()
    steps = {llava_mini.read_safetensors(folder / "run.safetensors")[1]["step"] for folder in (out, straight)}
    assert steps == {"6"}


def interrupt(monkeypatch, files, out, step, *more, number=signal.SIGINT, code=130):
    """Run until a signal comes in the middle of a step."""
    calls, backward = [], train.backward

    def with_signal(*args):
        calls.append(args)
        if len(calls) == step:
            signal.raise_signal(number)
        return backward(*args)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as e:
        patch.setattr(train, "backward", with_signal)
        run(files, out, *more)
    assert e.value.code == code and len(calls) == step


def killed_in_save(monkeypatch, files, out, name, nth, moment, *more):
    """Run until the nth time that file `name` is replaced, and die there."""
    replace, seen = os.replace, []

    def fatal(source, target):
        seen.append(Path(target).name)
        if seen.count(name) < nth:
            return replace(source, target)
        if moment == "half written":
            os.truncate(source, os.path.getsize(source) // 2)
        if moment == "after":
            replace(source, target)
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(os, "replace", fatal)
        run(files, out, *more)
    assert seen.count(name) == nth


@pytest.mark.parametrize(
    "name, nth, moment",
    [
        ("config.json", 2, "half written"),
        ("model.safetensors", 2, "half written"),
        ("model.safetensors", 3, "after"),
        ("run.safetensors", 2, "before"),
        ("run.safetensors", 3, "half written"),
        ("run.safetensors", 3, "after"),
    ],
)
def test_a_run_killed_in_a_save_goes_on_as_if_nothing_had_happened(
    shared, straight, tmp_path, monkeypatch, name, nth, moment
):
    killed_in_save(monkeypatch, shared, tmp_path, name, nth, moment)
    assert bool(list(tmp_path.glob("*.tmp"))) == (moment != "after")
    run(shared, tmp_path, "--resume")
    assert_equal_runs(tmp_path, straight)


def test_a_run_killed_twice_goes_on_too(shared, straight, tmp_path, monkeypatch):
    killed_in_save(monkeypatch, shared, tmp_path, "run.safetensors", 2, "before")
    killed_in_save(monkeypatch, shared, tmp_path, "run.safetensors", 2, "half written", "--resume")
    run(shared, tmp_path, "--resume")
    assert_equal_runs(tmp_path, straight)


def test_a_run_killed_before_its_first_step_goes_on_too(shared, straight, tmp_path, monkeypatch):
    killed_in_save(monkeypatch, shared, tmp_path, "run.safetensors", 1, "after")
    run(shared, tmp_path, "--resume")
    assert_equal_runs(tmp_path, straight)


def test_a_line_of_the_log_that_was_cut_off_does_not_stop_a_resume(shared, straight, tmp_path, monkeypatch):
    interrupt(monkeypatch, shared, tmp_path, 3)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')
    run(shared, tmp_path, "--resume")
    assert_equal_runs(tmp_path, straight)


KILL_9 = """
import os, signal, sys
name, nth = sys.argv.pop(1), int(sys.argv.pop(1))
import llava_mini, train
module, calls = (os if name == "replace" else train), []
real = getattr(module, name)
def fatal(*args):
    calls.append(args)
    if len(calls) == nth:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args)
setattr(module, name, fatal)
llava_mini.run_command(train.train, train.arguments())
"""


def test_kill_9_in_a_step_and_in_a_save_loses_nothing(shared, straight, tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    killed = {}
    for name, nth in (("backward", 4), ("replace", 28)):  # the 28th file is the last one of the third save
        argv = ["-c", KILL_9, name, str(nth), *flags(shared, tmp_path / name)]
        killed[name] = subprocess.Popen([sys.executable, *argv], env=environment, stdout=subprocess.DEVNULL)
    for name, process in killed.items():
        assert process.wait(timeout=100) == -signal.SIGKILL
        assert bool(list((tmp_path / name).glob("*.tmp"))) == (name == "replace")
        run(shared, tmp_path / name, "--resume")
        assert_equal_runs(tmp_path / name, straight)


def test_resuming_a_finished_run_changes_nothing(shared, straight, tmp_path):
    run(shared, tmp_path)
    (tmp_path / "predictions.png").unlink()
    run(shared, tmp_path, "--resume")
    assert_equal_runs(tmp_path, straight)


def test_resume_takes_other_values_of_the_settings_that_are_free(shared, straight, tmp_path, monkeypatch):
    interrupt(monkeypatch, shared, tmp_path / "a", 3)
    (tmp_path / "a").rename(tmp_path / "b")
    run(shared, tmp_path / "b", "--resume", "--log-every", 2, "--eval-every", 5, "--workers", 1)
    assert_same(tensors(tmp_path / "b"), tensors(straight))


def test_a_resumed_run_keeps_its_tokenizer_though_the_data_was_mended(tmp_path, monkeypatch):
    write_records(tmp_path, (1, 0, 1, 0))
    interrupt(monkeypatch, tmp_path, tmp_path / "out", 3)
    before = (tmp_path / "out" / "tokenizer.json").read_bytes()
    mended = (tmp_path / "data.json").read_text().replace("a blue square at the top left", "zebra zebra zebra")
    (tmp_path / "data.json").write_text(mended)
    run(tmp_path, tmp_path / "out", "--resume")
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == before


OTHER_VALUES = dict(
    init=".", vision=".", decoder=".", tokenizer=".", data=".", images="..", val=".", text_fraction="0.3"
)
OTHER_VALUES |= dict(freeze="vision", width="32", depth="2", heads="1", image_size="8", patch_size="4", block_size="32")
OTHER_VALUES |= dict(
    seed="1", steps="7", batch_size="4", optimizer="adamw", lr="0.1", muon_lr="0.1", weight_decay="0.1"
)
OTHER_VALUES |= dict(warmup="3", clip="2", dtype="float32", skip_bad=None)


def test_every_other_setting_is_fixed():
    assert train.settings(train.arguments().parse_args([])).keys() == OTHER_VALUES.keys()


@pytest.mark.parametrize("name", OTHER_VALUES)
def test_resume_with_a_changed_setting_is_refused_and_named(tiny_model, tokenizer, tmp_path, name):
    flag, value = f"--{name.replace('_', '-')}", OTHER_VALUES[name]
    args = train.arguments().parse_args(["--out", str(tmp_path)])
    optimizers = train.make_optimizers(args, tiny_model)
    train.save_run(args, tiny_model, optimizers, 4, tokenizer)
    assert train.load_run(args, tiny_model, optimizers) == 4
    changed = train.arguments().parse_args(["--out", str(tmp_path), flag] + ([value] if value else []))
    with pytest.raises(ValueError) as e:
        train.load_run(changed, tiny_model, optimizers)
    assert str(e.value) == f"--resume needs the settings of the run: {flag} was {getattr(args, name)}"


def test_a_refused_resume_leaves_the_run_as_it_is(shared, straight, monkeypatch):
    before = contents(straight)
    message = command(monkeypatch, *flags(shared, straight, "--resume", "--steps", 9, "--lr", 1))
    assert message == "train.py: --resume needs the settings of the run: --steps was 6, --lr was 0.004"
    assert contents(straight) == before


def test_resume_without_a_run_is_refused(shared, tmp_path, monkeypatch):
    message = command(monkeypatch, *flags(shared, tmp_path / "out", "--resume"))
    assert message == f"train.py: --resume: there is no run in {tmp_path / 'out'}" and not (tmp_path / "out").exists()


def rewrite(path, change):
    held, metadata = llava_mini.read_safetensors(path)
    held, metadata = change(held, dict(metadata))
    save_file(held, path, metadata)


TAMPERED = {
    "truncated": lambda path: os.truncate(path, path.stat().st_size - 9),
    "cut to nothing": lambda path: path.write_bytes(b""),
    "other bytes": lambda path: path.write_bytes(b"PK\3\4" * 100),
    "a weight is missing": lambda path: rewrite(path, lambda t, m: ({k: v for k, v in t.items() if "wte" not in k}, m)),
    "a weight of another shape": lambda path: rewrite(
        path, lambda t, m: (t | {"model/decoder.wpe.weight": torch.zeros(2)}, m)
    ),
    "half of a state is missing": lambda path: rewrite(
        path, lambda t, m: ({k: v for k, v in t.items() if k != "optimizer/decoder.wpe.weight/exp_avg_sq"}, m)
    ),
    "no metadata": lambda path: rewrite(path, lambda t, m: (t, None)),
    "no settings": lambda path: rewrite(path, lambda t, m: (t, {"step": m["step"]})),
    "no step": lambda path: rewrite(path, lambda t, m: (t, {name: m[name] for name in m if name != "step"})),
    "momentum of another shape": lambda path: rewrite(
        path, lambda t, m: (t | {"optimizer/decoder.wpe.weight/exp_avg": torch.zeros(2)}, m)
    ),
}


@pytest.mark.parametrize("case", TAMPERED)
def test_a_damaged_run_file_gives_one_line_and_changes_nothing(shared, straight, tmp_path, monkeypatch, case):
    for name, content in contents(straight).items():
        (tmp_path / name).write_bytes(content)
    TAMPERED[case](tmp_path / "run.safetensors")
    before = contents(tmp_path)
    message = command(monkeypatch, *flags(shared, tmp_path, "--resume"))
    assert message.startswith(f"train.py: {tmp_path}") and "\n" not in message
    assert contents(tmp_path) == before


def test_a_resume_does_not_write_again_what_it_has_just_read(shared, straight, tmp_path, monkeypatch):
    for name, content in contents(straight).items():
        (tmp_path / name).write_bytes(content)
    monkeypatch.setattr(train, "save_run", lambda *_: pytest.fail("there is no new step to save"))
    run(shared, tmp_path, "--resume")


# --- bad ends --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_step_saves_and_stops_and_resume_goes_on(
    shared, straight, tmp_path, monkeypatch, capsys, number
):
    interrupt(monkeypatch, shared, tmp_path, 3, number=number)
    assert capsys.readouterr().out.endswith("\nstopped after step 3: --resume continues\n")
    assert llava_mini.read_safetensors(tmp_path / "run.safetensors")[1]["step"] == "3"
    other = signal.SIGTERM if number == signal.SIGINT else signal.SIGINT
    assert signal.getsignal(number) == signal.SIG_DFL != signal.getsignal(other)  # a second one stops at once
    run(shared, tmp_path, "--resume")
    assert_equal_runs(tmp_path, straight)


def test_a_signal_does_not_wait_for_an_evaluation(shared, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "exact_match", None)
    interrupt(monkeypatch, shared, tmp_path, 2, "--val", shared / "data.json", "--eval-every", 2)
    assert [sorted(entry) for entry in log(tmp_path)] == [
        ["gradient_norm", "images_encoded", "loss", "slots", "step"]
    ] * 2


def test_a_run_that_gets_a_signal_in_its_last_step_ends_as_any(shared, straight, tmp_path, monkeypatch):
    calls, backward = [], train.backward

    def with_signal(*args):
        calls.append(args)
        if len(calls) == 6:
            signal.raise_signal(signal.SIGINT)
        return backward(*args)

    monkeypatch.setattr(train, "backward", with_signal)
    run(shared, tmp_path)
    assert_equal_runs(tmp_path, straight)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_whole_process_group_saves_and_stops(shared, tmp_path, number):
    """Ctrl-C reaches every process of the group, as torchrun's SIGTERM does: the workers that prepare batches too."""
    argv = [sys.executable, ROOT / "train.py", *flags(shared, tmp_path, "--workers", 2, "--steps", 9999)]
    argv += ["--eval-every", "9999"]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process = subprocess.Popen(argv, start_new_session=True, **pipes)
    assert any(line.startswith("step 9/") for line in process.stdout)
    os.killpg(process.pid, number)
    shown, errors = process.communicate(timeout=100)
    stopped = re.search(r"^stopped after step (\d+): --resume continues$", shown, re.MULTILINE)
    assert stopped and process.returncode == 130 and errors == ""
    assert llava_mini.read_safetensors(tmp_path / "run.safetensors")[1]["step"] == stopped[1]


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_stops_the_run_before_it_does_harm(shared, tmp_path, monkeypatch, what, value):
    calls, backward = [], train.backward

    def broken(model, *rest):
        calls.append(rest)
        loss = backward(model, *rest)
        if len(calls) == 4 and what == "gradient":
            model.decoder.wpe.weight.grad[0, 0] = value
        return loss * value if len(calls) == 4 and what == "loss" else loss

    monkeypatch.setattr(train, "backward", broken)
    message = command(monkeypatch, *flags(shared, tmp_path / "out"))
    training, _ = train.datasets(
        args := parse(shared, "out"), train.build(args)[0].config, data.load_tokenizer(args.tokenizer)
    )
    ids = [training.record(i)["id"] for i in steps(training)[3]]
    rate = 4e-3 * (6 - 3) / (6 - 2)
    assert (
        message.startswith(f"train.py: {'loss' if what == 'gradient' else 'loss ' + str(value)}")
        and "\n" not in message
    )
    assert message.endswith(f" at step 4, learning rate {rate:.3g}, records {ids}; the last checkpoint is kept")
    assert llava_mini.read_safetensors(tmp_path / "out" / "run.safetensors")[1]["step"] == "2"
    assert all(tensor.isfinite().all() for tensor in tensors(tmp_path / "out").values())


def test_a_learning_rate_that_is_far_too_high_ends_in_one_line(shared, tmp_path, monkeypatch):
    message = command(
        monkeypatch, *flags(shared, tmp_path, "--lr", "1e12", "--warmup", 1, "--steps", 20, "--eval-every", 99)
    )
    assert re.match(r"train.py: loss \S+, gradient norm \S+ at step \d+, learning rate \S+e\+\d\d, records \[", message)
    assert llava_mini.read_safetensors(tmp_path / "run.safetensors")[1]["step"] == "0"


def late_picture(files):
    """-> (record, picture) that a run of six steps first needs in its fourth step or after it."""
    training = data.LlavaDataset(files / "data.json", files, data.load_tokenizer(files / "tokenizer.json"), 16, 8, 64)
    early, late = (set(sum(part, [])) for part in (steps(training)[:3], steps(training)[3:]))
    index = next(i for i in sorted(late - early) if training.records[i].get("image"))
    return training.records[index]["id"], training.records[index]["image"][0]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_picture_stops_the_run_which_goes_on_once_it_is_mended(
    shared, straight, tmp_path, monkeypatch, workers
):
    name, file = late_picture(shared)
    whole = (shared / file).read_bytes()
    (shared / file).write_bytes(whole[: len(whole) // 2])
    try:
        argv = flags(shared, tmp_path, "--workers", workers, "--eval-every", 99)
        message = command(monkeypatch, *argv)
    finally:
        (shared / file).write_bytes(whole)
    assert message.startswith("train.py: ") and f"record {name}: image can't be read: " in message and file in message
    assert "\n" not in message
    assert int(llava_mini.read_safetensors(tmp_path / "run.safetensors")[1]["step"]) >= 3
    run(shared, tmp_path, "--resume", "--eval-every", 99)
    assert_same(tensors(tmp_path), tensors(straight))


def test_a_broken_picture_in_an_evaluation_costs_no_step(shared, tmp_path, monkeypatch):
    record = {"id": "torn", "image": "torn.png", "conversations": [{"from": "human", "value": "<image>\nWhat?"}]}
    record["conversations"].append({"from": "gpt", "value": "red"})
    (tmp_path / "torn.png").write_bytes(b"no picture")
    (tmp_path / "val.json").write_text(json.dumps([record]))
    argv = *flags(shared, tmp_path / "out", "--eval-every", 4), "--val", tmp_path / "val.json"
    with monkeypatch.context() as patch:
        patch.setattr(data, "image_path", lambda name, folder: str((tmp_path if name == "torn.png" else folder) / name))
        assert re.search(r"record torn: image can't be read: \S+torn\.png", command(patch, *argv))
        assert llava_mini.read_safetensors(tmp_path / "out" / "run.safetensors")[1]["step"] == "4"
        assert "image can't be read" in command(patch, *argv, "--resume")
        assert llava_mini.read_safetensors(tmp_path / "out" / "run.safetensors")[1]["step"] == "6"
        Image.new("RGB", (8, 8)).save(tmp_path / "torn.png")
        run(shared, tmp_path / "out", "--eval-every", 4, "--val", tmp_path / "val.json", "--resume")
    assert (tmp_path / "out" / "predictions.png").exists()


@pytest.mark.parametrize("accumulate", [1, 2])
def test_an_evaluation_takes_no_more_rows_at_once_than_a_micro_batch(shared, tmp_path, monkeypatch, accumulate):
    rows, to = [], train.to
    monkeypatch.setattr(train, "to", lambda device, made: rows.append(len(made["input_ids"])) or to(device, made))
    more = "--val", shared / "data.json", "--batch-size", 4, "--accumulate", accumulate, "--steps", 1
    run(shared, tmp_path, *more)
    assert max(rows) == 4 // accumulate


@pytest.mark.parametrize("name", ["model.safetensors", "run.safetensors"])
def test_a_full_disk_gives_one_line_and_the_old_checkpoint_stays(shared, straight, tmp_path, monkeypatch, name):
    real, calls = os.replace, []

    def full(temporary, path):
        calls.append(path.name)
        if calls.count(name) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(temporary, path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        message = command(monkeypatch, *flags(shared, tmp_path))
    assert re.fullmatch(
        r"train.py: \S+\.safetensors can't be written, what was there is kept: .*No space left.*", message
    )
    assert not list(tmp_path.glob("*.tmp"))
    run(shared, tmp_path, "--resume")
    assert_equal_runs(tmp_path, straight)


# --- the picture -----------------------------------------------------------------------------------------------------
class Pen:
    """In place of Pillow's: notes what is drawn."""

    def __init__(self, *_):
        self.calls = []

    def __getattr__(self, name):
        return lambda *args, **kwargs: self.calls.append((name, *args))

    def textlength(self, text):
        return 8 * len(text)

    def of(self, kind):
        return [rest for name, *rest in self.calls if name == kind]


def test_a_chart_draws_its_curves_on_common_axes_from_zero():
    pen = Pen()
    curves = {"first_curve": [(0, 0), (5, 2), (10, 4)], "other": [(20, 1)]}
    train.chart(pen, (100, 50, 300, 150), "Title", curves)
    assert pen.of("rectangle") == [[(100, 50, 300, 150)]]
    blue, red = "#1f5fb0", "#c02020"
    assert pen.of("line") == [[[(100, 150), (150, 100), (200, 50)], blue, 3], [[(300, 125)], red, 3]]
    title, top, end, first, other = pen.of("text")
    assert title[1:] == ["Title", "black"] and title[0][0] == 100 and title[0][1] < first[0][1] < 50
    assert top[0][0] < 100 and top[0][1] == 50 and top[1] == "4"
    assert end[0][0] == 300 and end[0][1] > 150 and end[1] == "step 20"
    assert first[1:] == ["first curve", blue] and first[0][0] == 100
    assert other[1:] == ["other", red] and other[0] == (100 + 8 * len("first curve") + 16, first[0][1])


def test_a_chart_of_zeros_is_a_line_at_the_bottom():
    pen = Pen()
    train.chart(pen, (0, 0, 10, 10), "", {"flat": [(0, 0)]})
    assert [points for points, *_ in pen.of("line")] == [[(0, 10)]]


class Listed(list):
    """A data set of given records."""

    record = list.__getitem__


@pytest.fixture
def drawn(tmp_path, tokenizer, tiny_model, monkeypatch):
    """Draw a page, -> (pen, {corner of a picture: its size})."""
    pen, pasted, answers = Pen(), {}, iter([("What?", "red", "red"), ("Why?", "one", "two")] * 20)
    entries = [{"step": 1, "loss": 4.0}, {"step": 2, "loss": 3.0}]
    scores = {"image": 0.5, "text": 0.25, "held_out_pairs": 0.0, "transfer": 0.0}
    entries.append({"step": 2, "samples_seen": 8} | {f"{name}_exact_match": score for name, score in scores.items()})
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(entry)}\n" for entry in entries))
    monkeypatch.setattr(train.ImageDraw, "Draw", lambda page: pen)
    monkeypatch.setattr(Image.Image, "paste", lambda self, image, at: pasted.update({at: image}))

    def reply(model, tokenizer, made):
        question, *rest = next(answers)
        return question, data.images_of(made), *rest

    monkeypatch.setattr(train, "reply", reply)

    def draw(training, evaluation):
        evaluation = {name: Listed(made) for name, made in evaluation.items()}
        train.draw(tmp_path, tiny_model, tokenizer, Listed(training), evaluation)
        return pen, pasted, Image.open(tmp_path / "predictions.png")

    return draw


def test_the_picture_shows_four_records_of_each_kind_beside_the_curves(drawn):
    pictures = [record(images=1, seed=i) for i in range(6)]
    pairs, texts = [record(images=2, seed=i) for i in range(5)], [record()] * 5
    pen, pasted, page = drawn([], {"image": pictures, "text": texts, "held_out_pairs": pairs, "transfer": texts})
    texts = pen.of("text")
    columns, rows = sorted({x for x, _ in pasted}), sorted({y for _, y in pasted})
    assert (
        len(pasted) == 4 + 2 * 4
        and len(rows) == 2
        and len(columns) == 8
        and {i.size for i in pasted.values()} == {(80, 80)}
    )
    assert (
        all(b - a >= 80 for a, b in itertools.pairwise(columns))
        and columns[-1] + 80 <= 830
        and rows[1] - rows[0] >= 200
    )
    assert [text for _, text, *_ in texts if text.startswith("no image")] == ["no image: zero slot"] * 4
    assert all(at[1] > rows[1] + 200 for at, text, *_ in texts if text.startswith("no image"))
    assert [text for _, text, *_ in texts if text in ("What?", "Why?")] == ["What?", "Why?"] * 6
    verdicts = [(text.replace("\n", " "), colour) for _, text, colour in texts if text.startswith(("red", "one"))]
    assert verdicts == [("red", "#177a2f"), ("one (wrong: two)", "#c02020")] * 6
    assert page.size == (1180, 810) and all(0 <= x < 1180 and 0 <= y < 810 for (x, y), *_ in texts)


def test_each_picture_stands_above_its_own_question(drawn):
    made = record(images=1, seed=3)
    pen, pasted, _ = drawn([], {"image": [made]})
    (x, y), image = next(iter(pasted.items()))
    assert image.tobytes() == picture(300).resize((80, 80)).tobytes()
    (question, *_), (verdict, *_) = pen.of("text")[:2]
    assert question[0] == verdict[0] == x and y + 80 < question[1] < verdict[1]


def test_a_picture_of_another_shape_is_drawn_whole(drawn):
    wide = Image.new("RGB", (40, 10), "red")
    _, pasted, _ = drawn([], {"image": [record(images=1) | {"image": [wide]}]})
    (image,) = (image for image in pasted.values() if image.size == (80, 80))  # not what letterbox pastes within it
    assert image.tobytes() == data.letterbox(wide, 80).tobytes()


def test_long_texts_are_wrapped_to_the_width_of_a_cell(drawn, monkeypatch):
    monkeypatch.setattr(train, "reply", lambda *_: ("why " * 20, [], "because " * 20, "so " * 20))
    pen, _, _ = drawn([], {"text": [record()]})
    (question_at, question, _), (verdict_at, verdict, _) = (
        text for text in pen.of("text") if text[1].startswith(("why", "because"))
    )
    assert max(map(len, f"{question}\n{verdict}".split("\n"))) <= 24
    assert verdict_at[1] - question_at[1] >= 15 * len(question.split("\n")) > 15


def test_the_curves_are_the_loss_and_the_exact_match_in_percent(drawn, monkeypatch):
    charts = []
    monkeypatch.setattr(train, "chart", lambda pen, box, title, curves: charts.append((box, title, curves)))
    drawn([], {"image": [record(images=1)], "text": [record()]})
    (loss_box, _, loss), (match_box, title, match) = charts
    assert list(loss.values()) == [[(1, 4.0), (2, 3.0)]]
    assert match == {"image": [(2, 50.0)], "text": [(2, 25.0)]} and "exact match" in title and "%" in title
    assert all(830 <= left < right < 1180 for left, _, right, _ in (loss_box, match_box)) and loss_box[3] < match_box[1]


def test_without_a_validation_set_training_records_are_shown_and_the_loss_alone(drawn, monkeypatch):
    charts = []
    monkeypatch.setattr(train, "chart", lambda *args: charts.append(args))
    pen, pasted, page = drawn([record(images=1, seed=i) for i in range(2)], {})
    assert len(pasted) == 2 and len(charts) == 1 and page.size == (1180, 560)
