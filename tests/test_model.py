"""The model: attention, generation, files, and whether it learns."""

import dataclasses
import itertools
import json

import pytest
import torch
import torch.nn.functional as F
from conftest import BLOCK, SIZE, P, both_decoders, close, is_ours, make_model, picture, record
from safetensors.torch import save
from tokenizers import Tokenizer, decoders, models

import data
from extras.ask import answer
from llava_mini import LlavaMini, positions_2d
from train import to_device

T = 2 + 2 * P + 2  # tokens of the prompt


@pytest.fixture
def prompt(config, device):
    """Two rows of random words with two random pictures each: (2, T), (2, 2, 3, SIZE, SIZE)."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, config.vocab_size, (2, T), generator=generator)
    ids[:, 2 : 2 + 2 * P] = config.image_token_id
    return ids.to(device), torch.randn(2, 2, 3, SIZE, SIZE, generator=generator).to(device)


@both_decoders
def test_words_and_patches_look_at_what_comes_before_them_alone(model, prompt):
    ids, pixels = prompt
    before = model(ids, pixels)[0]
    changed = ids.clone()
    changed[:, -2] = (ids[:, -2] + 1) % model.config.vocab_size
    pixels = pixels.clone()
    pixels[:, 1] *= 2  # the second picture begins at position 2 + P

    assert torch.equal(model(changed, pixels)[0][:, : 2 + P], before[:, : 2 + P])
    after = model(changed, prompt[1])[0] != before
    assert after.any(dim=2).tolist() == [[False] * (T - 2) + [True] * 2] * 2


def block_by_hand(block, x, heads, mask, eps):
    """A pre-norm transformer block, (T, C) -> (T, C), from its definition."""
    split = lambda y: y.unflatten(1, (heads, -1)).transpose(0, 1)  # noqa: E731
    norm = lambda ln: F.layer_norm(x, x.shape[1:], ln.weight, ln.bias, eps)  # noqa: E731
    q, k, v = map(split, block.attention.qkv(norm(block.ln_1)).chunk(3, dim=1))
    scores = q @ k.transpose(1, 2) / k.shape[2] ** 0.5 + mask
    x = x + block.attention.out((scores.softmax(dim=2) @ v).transpose(0, 1).flatten(1))
    h = block.mlp[0](norm(block.ln_2))
    return x + block.mlp[2](F.gelu(h, approximate="tanh"))


def test_blocks_are_gpt_2s_which_look_back_and_siglips_which_look_everywhere(exact_model):
    causal = torch.full((5, 5), -torch.inf).triu(1)
    for part, C, heads, mask, eps in (("decoder", 32, 4, causal, 1e-5), ("vision", 24, 2, 0, 1e-6)):
        if not is_ours(getattr(exact_model, part)):
            continue
        block = getattr(exact_model, part).blocks[0]
        x = torch.randn(5, C, dtype=torch.float64)
        block.cpu()
        close(block(x[None])[0], block_by_hand(block, x, heads, mask, eps))


def test_patch_positions_are_waves_of_the_row_and_then_of_the_column():
    waves = positions_2d(side=3, width=8).view(3, 3, 8) / 2**0.5
    for row, column in itertools.product(range(3), repeat=2):
        for place, wave in ((row, waves[row, column, :4]), (column, waves[row, column, 4:])):
            angles = torch.tensor([1, 30**-0.5]) * place
            torch.testing.assert_close(wave, torch.cat([angles.sin(), angles.cos()]))
    cut = positions_2d(side=3, width=18)  # 4 does not divide it
    assert cut.shape == (9, 18) and cut.is_contiguous()  # else no file takes it


def test_new_weights_have_the_scale_that_trains_the_toy(config):
    model = LlavaMini(config)
    if is_ours(model.projector):
        model.projector[-1].weight.data *= 2  # it begins half as large as the others
    for part in filter(is_ours, model.children()):
        for name, module in part.named_modules():
            if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)):
                fan_in = module.weight[0].numel()
                assert 0.85 < module.weight.std() * fan_in**0.5 < 1.15, name
                assert not module.bias.any(), name
    assert 0.45 < model.decoder.wte.weight.std() < 0.55
    assert 0.55 < model.decoder.wpe.weight.std() < 0.65


@pytest.mark.parametrize("image_size, patch_size", [(32, 8), (16, 4), (24, 12)])
def test_other_sizes_of_image_and_patch_work(tokenizer, config, image_size, patch_size):
    sizes = {"image_size": image_size, "patch_size": patch_size, "block_size": 256}
    other = dataclasses.replace(config, **sizes)
    question = record("<image>What is it?", "red", images=[picture(0)])
    batch = data.collate([data.make_sample(question, tokenizer, other)])
    loss = make_model(other)(**batch)[1]
    loss.backward()
    assert loss.isfinite()


@both_decoders
def test_generation_agrees_with_that_without_cache(exact_model, prompt, monkeypatch):
    ids, pixels = prompt[0], prompt[1].double()
    images, head, said = [], exact_model.decoder.head, []
    exact_model.vision.register_forward_hook(lambda *_: images.append(1))
    listen = lambda x: said.append(head(x)) or said[-1].clone()  # noqa: E731
    monkeypatch.setattr(exact_model.decoder, "head", listen)
    generated = exact_model.generate(ids, pixels, 12)
    monkeypatch.undo()
    assert len(images) == 1  # encoded once
    cached = torch.stack(said, dim=1)  # (2, 12, V)
    words = cached.index_fill(2, ids[0, 2], -torch.inf)  # the image token is never drawn
    assert torch.equal(words.argmax(dim=2), generated[:, T:])

    for t in range(12):
        close(exact_model(generated[:, : T + t], pixels)[0][:, -1], cached[:, t])
    close(exact_model(generated, pixels)[0][:, T - 1 : -1], cached)


def speak(model, monkeypatch, *steps):
    """Let the model say these tokens, (B,) a step."""
    device = model.decoder.wte.weight.device
    steps = iter([torch.tensor(step, device=device) for step in steps])
    says = lambda x: F.one_hot(next(steps), model.config.vocab_size).float()  # noqa: E731
    monkeypatch.setattr(model.decoder, "head", says)


def test_a_row_that_ended_repeats_its_end_and_the_last_end_stops_all(model, prompt, monkeypatch):
    speak(model, monkeypatch, (5, 6), (9, 5), (5, 8), (6, 9))  # and no fifth step
    generated = model.generate(*prompt, 20, eos_token_id=9)
    assert generated[:, T:].tolist() == [[5, 9, 9, 9], [6, 5, 8, 9]]


def test_sampling_draws_all_of_the_top_k_and_nothing_else_and_of_one_token_is_greedy(model, prompt):
    ids, pixels = prompt
    top = model(ids, pixels)[0][0, -1].topk(3).indices
    many = ids[:1].expand(100, -1), pixels[:1].expand(100, -1, -1, -1, -1)
    drawn = model.generate(*many, 1, temperature=100.0, top_k=3)[:, -1]
    assert drawn.unique().tolist() == top.sort().values.tolist()
    drawn = model.generate(ids, pixels, 8, temperature=5.0, top_k=1)
    assert torch.equal(drawn, model.generate(ids, pixels, 8))


def test_sampling_follows_the_softmax_of_logits_over_temperature(model, device, monkeypatch):
    shares = torch.zeros(model.config.vocab_size)
    shares[5:8] = torch.tensor([0.6, 0.3, 0.1])
    logits = 3 * shares.log().to(device).expand(4000, -1)
    monkeypatch.setattr(model.decoder, "head", lambda x: logits.clone())
    words, no_images = torch.full((4000, 1), 9), torch.zeros(4000, 1, 3, SIZE, SIZE)
    drawn = model.generate(words.to(device), no_images.to(device), 1, temperature=3.0)[:, -1]
    found = drawn.cpu().bincount(minlength=model.config.vocab_size) / 4000
    torch.testing.assert_close(found, shares, rtol=0, atol=0.04)


def test_an_image_token_is_never_said(model, prompt):
    said = model.generate(*prompt, BLOCK - T, temperature=100.0)[:, T:]
    assert model.config.image_token_id not in said
    model.decoder.head = lambda x: F.one_hot(prompt[0][:, 2], model.config.vocab_size).float()
    assert model.config.image_token_id not in model.generate(*prompt, 5)[:, T:]


def test_what_can_not_be_said_is_refused(model, prompt):
    (ids, pixels), new = prompt, BLOCK - T
    assert model.generate(ids, pixels, new).shape == (2, BLOCK)
    with pytest.raises(ValueError, match=rf"{T} \+ {new + 1} .*{BLOCK}"):
        model.generate(ids, pixels, new + 1)
    for options in ({"temperature": -0.1}, {"temperature": torch.nan}, {"top_k": 0}):
        with pytest.raises(ValueError, match="temperature .* top_k "):
            model.generate(ids, pixels, 1, **options)
    ids[1, -1] = data.PAD_TOKEN_ID
    with pytest.raises(ValueError, match="unequal length"):
        model.generate(ids, pixels, 1)


def test_an_answer_streams_also_characters_of_many_tokens(model, tokenizer, monkeypatch):
    text = "naïve 🙂 two\n"
    ids = tokenizer.encode(text).ids + [tokenizer.token_to_id(data.IM_END), 5]
    speak(model, monkeypatch, *[(token,) for token in ids])
    pieces = list(answer(model, tokenizer, record("What is it?")))
    assert "".join(pieces) == text == tokenizer.decode(ids[:-1])
    assert len(pieces) == len(ids) - 1


def test_an_answer_that_is_no_text_streams_all_the_same(model, monkeypatch):
    words = ["<unk>", "b", "c", "a", "<0x7E>", "<0x96>", "<0xC3>"]  # a tilde, and no letters
    words = {word: i for i, word in enumerate(words)}
    spelled = Tokenizer(models.BPE(words, [], unk_token="<unk>", byte_fallback=True))
    spelled.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    spelled.add_special_tokens(data.SPECIAL_TOKENS)
    said = [words[word] for word in ("<0x7E>", "<0x96>", "a", "<0xC3>")]
    speak(model, monkeypatch, *[(token,) for token in said])
    pieces = answer(model, spelled, record("a"), max_new_tokens=4)
    assert "".join(pieces) == "~\ufffda\ufffd"


def test_an_answer_that_the_block_cuts_says_so(model, tokenizer, monkeypatch, capsys):
    question = record("two " * 10)
    length = len(data.encode(question, tokenizer, model.config)[0])
    speak(model, monkeypatch, *BLOCK * [(5,)])
    assert len(list(answer(model, tokenizer, question, max_new_tokens=3))) == 3
    assert capsys.readouterr().err == ""
    assert len(list(answer(model, tokenizer, question))) == BLOCK - length
    assert capsys.readouterr().err == f"(cut: the block of {BLOCK} tokens is full)\n"


@both_decoders
def test_a_saved_model_comes_back_bit_for_bit(model, tmp_path):
    model.save(tmp_path / "new" / "folder")
    loaded = LlavaMini.load(tmp_path / "new" / "folder")
    assert loaded.config == model.config
    exactly = {"rtol": 0, "atol": 0, "check_device": False}
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), **exactly)


def test_a_folder_without_a_model_of_this_project_is_refused(model, tmp_path):
    def refused(file, content, message):
        model.save(tmp_path)
        (tmp_path / file).write_bytes(content)
        with pytest.raises(ValueError, match=f"holds no model of LLaVA mini: {message}"):
            LlavaMini.load(tmp_path)

    refused("config.json", b'{"model_type": "gpt2", "vocab_size": 50257}', ".*'model_type'")
    size = "patch_size" if is_ours(model.vision) else "heads"
    wrong = {"heads": 0}, {size: 0}, {"llama": {"experts": 8}}, {"llama": "mamba"}
    for change in (*wrong, {"vision_width": 48}):
        fields = dataclasses.asdict(model.config) | change
        words = "size mismatch for " if "vision_width" in change else ""
        refused("config.json", json.dumps(fields).encode(), words)
    refused("model.safetensors", save(model.state_dict())[:-9], "")

    for file in ("model.safetensors", "config.json"):
        (tmp_path / file).unlink()
        with pytest.raises(OSError, match=file):
            LlavaMini.load(tmp_path)


@both_decoders
def test_a_tiny_model_learns_eight_mixed_records_by_heart(model, tokenizer, config, device):
    a, b, c = map(picture, range(3))
    one, two = "<image>\nWhat is it?", "<image>\n<image>\nBoth?"
    records = [
        record("Reverse: apple bread", "bread apple"),
        record("Repeat: house kite", "house kite"),
        record("How many words? apple", "one 1"),
        record(one, "red", images=[a]),
        record(one, "blue", images=[b]),
        record(one, "two", images=[c]),
        record(two, "red, blue", images=[a, b]),
        record(two, "blue, red", images=[b, a]),
    ]
    batch = to_device(data.collate(data.Samples(records, tokenizer, config)), device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(50):
        optimizer.zero_grad()
        model(**batch)[1].backward()
        optimizer.step()

    for known in records:
        question, reference = known["conversations"]
        asked = {**known, "conversations": [question]}
        assert "".join(answer(model, tokenizer, asked)) == reference["value"]
