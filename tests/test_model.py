"""The model, layer by layer against plain arithmetic; generation; the command line that asks a trained model."""

import argparse
import math
import os
import re
import runpy
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
from conftest import IMAGE_SIZE, PATCH_SIZE, P, batch, picture, random_model, record

import data
import llava_mini
import train
from llava_mini import GPT, Block, GPTConfig, Linear, LlavaMini, LlavaMiniConfig, Projector, ViT, ViTConfig

V, IMAGE = 40, 3  # vocabulary and image token of `model`
close = dict(rtol=0, atol=1e-10)


@pytest.fixture
def model():
    """Random in every parameter, float64, on the CPU."""
    return random_model(V, IMAGE, dtype=torch.float64)


def prompt(*images, length=11, seed=0):
    """input_ids and pixel_values of rows of equal length, with so many images each."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(IMAGE + 1, V, (len(images), length), generator=generator)
    shape = (len(images), max(1, *images), 3, IMAGE_SIZE, IMAGE_SIZE)
    pixels = torch.zeros(shape, dtype=torch.float64)
    for row, n in enumerate(images):
        ids[row, 1 : 1 + n * P] = IMAGE
        pixels[row, :n] = torch.randn(n, *shape[2:], generator=generator)
    return ids, pixels


# --- the same layers, written out -------------------------------------------------------------------------------------
def plain_linear(linear, x):
    return x @ linear.weight.T + linear.bias


def plain_norm(norm, x):
    x = x - x.mean(-1, keepdim=True)
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-5) * norm.weight + norm.bias


def plain_block(block, x, heads, causal):
    T, head_width = x.shape[1], x.shape[2] // heads
    q, k, v = plain_linear(block.qkv, plain_norm(block.ln_1, x)).chunk(3, dim=-1)
    attended = []
    for head in range(heads):
        part = slice(head * head_width, (head + 1) * head_width)
        scores = q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(head_width)
        if causal:
            scores = scores.masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf)
        attended.append(scores.softmax(-1) @ v[..., part])
    x = x + plain_linear(block.attn_out, torch.cat(attended, dim=-1))
    h = plain_linear(block.mlp_in, plain_norm(block.ln_2, x))
    if causal:
        h = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
    else:
        h = h / (1 + torch.exp(-1.702 * h))
    return x + plain_linear(block.mlp_out, h)


def plain_vit(vit, images, heads):
    rows = []
    for image in images:
        patches = [
            image[:, y : y + PATCH_SIZE, x : x + PATCH_SIZE]
            for y in range(0, IMAGE_SIZE, PATCH_SIZE)
            for x in range(0, IMAGE_SIZE, PATCH_SIZE)
        ]
        embedded = [(vit.patch_embed.weight * patch).sum((1, 2, 3)) for patch in patches]
        rows.append(torch.stack([vit.class_embed, *embedded]) + vit.pos_embed.weight)
    x = plain_norm(vit.ln_pre, torch.stack(rows))
    for block in vit.blocks:
        x = plain_block(block, x, heads, causal=False)
    return x[:, 1:]


def plain_projector(projector, x):
    h = plain_linear(projector.linear_1, x)
    return plain_linear(projector.linear_2, 0.5 * h * (1 + torch.erf(h / math.sqrt(2))))


def plain_gpt(gpt, x, heads):
    x = x + gpt.wpe.weight[: x.shape[1]]
    for block in gpt.blocks:
        x = plain_block(block, x, heads, causal=True)
    return plain_norm(gpt.ln_f, x) @ gpt.lm_head.weight.T


def plain_loss(logits, labels):
    """Mean of -log p(label) over the labels from the second on, each told by the logits before it."""
    costs = [
        -logits[row, t - 1].log_softmax(-1)[label]
        for row in range(len(labels))
        for t, label in enumerate(labels[row].tolist())
        if t > 0 and label != -100
    ]
    return sum(costs) / len(costs)


# --- layers ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("shape", "wide", "gradient", "in_parts"),
    [
        ((1, 1, 12), 16, False, True),
        ((1, 12), 16, False, True),
        ((1, 1, 12), 20, False, False),  # 20 rows do not divide by 8
        ((1, 2, 12), 16, False, False),
        ((2, 1, 12), 16, False, False),
        ((1, 1, 12), 16, True, False),
    ],
)
@pytest.mark.parametrize("bias", [True, False])
def test_one_vector_without_gradient_is_multiplied_in_parts_to_the_same_result(
    shape, wide, gradient, in_parts, bias, monkeypatch
):
    generator = torch.Generator().manual_seed(0)
    linear, x = Linear(12, wide, bias=bias).double(), torch.randn(shape, generator=generator, dtype=torch.float64)
    calls = []
    monkeypatch.setattr(torch, "bmm", lambda *args, original=torch.bmm: calls.append(args) or original(*args))
    with torch.set_grad_enabled(gradient):
        y = linear(x)
    assert bool(calls) == in_parts
    torch.testing.assert_close(y, x @ linear.weight.T + (linear.bias if bias else 0), **close)
    if in_parts:
        assert calls[0][0].shape == (8, 2, 12)
    if gradient:
        y.sum().backward()
        assert linear.weight.grad is not None


@pytest.mark.parametrize("length", [1, 2, 7])
@pytest.mark.parametrize("causal", [False, True])
def test_a_block_computes_pre_norm_attention_and_mlp(model, causal, length):
    block, width, heads = (model.decoder.blocks[1], 32, 4) if causal else (model.vision.blocks[1], 24, 2)
    x = torch.randn(3, length, width, dtype=torch.float64)
    torch.testing.assert_close(block(x), plain_block(block, x, heads, causal), **close)


@pytest.mark.parametrize("length", [2, 6])
def test_the_gpts_blocks_look_back_only_and_the_vits_in_both_directions(model, length):
    for block, width, causal in ((model.decoder.blocks[0], 32, True), (model.vision.blocks[0], 24, False)):
        x = torch.randn(1, length, width, dtype=torch.float64)
        changed = x.clone()
        changed[0, -1] += 1
        assert torch.equal(block(x)[0, :-1], block(changed)[0, :-1]) == causal


def test_the_vit_gives_the_features_of_every_patch_in_reading_order(model):
    images = torch.randn(3, 3, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.float64)
    features = model.vision(images)
    assert features.shape == (3, P, 24)
    torch.testing.assert_close(features, plain_vit(model.vision, images, heads=2), **close)


def test_the_projector_is_two_linear_layers_with_gelu_between(model):
    x = torch.randn(2, P, 24, dtype=torch.float64)
    torch.testing.assert_close(model.projector(x), plain_projector(model.projector, x), **close)


def test_the_gpt_adds_positions_and_ends_in_norm_and_head(model):
    x = torch.randn(3, 9, 32, dtype=torch.float64)
    logits, loss = model.decoder(x)
    assert logits.shape == (3, 9, V)
    assert loss is None
    torch.testing.assert_close(logits, plain_gpt(model.decoder, x, heads=4), **close)


def test_the_whole_model_is_its_layers_one_after_the_other(model):
    ids, pixels = prompt(1, 0, 2)
    x = model.decoder.wte.weight[ids].clone()
    patches = plain_projector(model.projector, plain_vit(model.vision, pixels.flatten(0, 1)[[0, 4, 5]], heads=2))
    x[0, 1 : 1 + P], x[2, 1 : 1 + 2 * P] = patches[0], patches[1:].flatten(0, 1)
    logits, loss = model(ids, pixels)
    assert loss is None
    torch.testing.assert_close(logits, plain_gpt(model.decoder, x, heads=4), **close)


def test_a_tied_head_is_the_word_embeddings_themselves():
    tied, untied = GPT(GPTConfig(V, width=32)), GPT(GPTConfig(V, width=32, tied_head=False))
    assert tied.lm_head.weight is tied.wte.weight
    assert untied.lm_head.weight is not untied.wte.weight
    assert untied.lm_head.weight.shape == untied.wte.weight.shape == (V, 32)


def test_an_untied_head_predicts_with_its_own_weights():
    gpt = random_model(V, IMAGE, dtype=torch.float64, tied_head=False).decoder
    x = torch.randn(1, 5, 32, dtype=torch.float64)
    assert not torch.equal(gpt.lm_head.weight, gpt.wte.weight)
    torch.testing.assert_close(gpt(x)[0], plain_gpt(gpt, x, heads=4), **close)


# --- configs and first values ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("image_size, patch_size, patches", [(32, 8, 16), (16, 16, 1), (224, 14, 256)])
def test_an_image_has_as_many_patches_as_fit_in_rows_and_columns(image_size, patch_size, patches):
    config = ViTConfig(image_size, patch_size, width=8, depth=1, heads=1)
    assert config.n_patches == patches
    assert ViT(config).pos_embed.weight.shape == (patches + 1, 8)


def test_configs_take_their_fields_in_the_documented_order():
    vision, text = ViTConfig(16, 8, 24, 2, 3), GPTConfig(50, 64, 32, 5, 4)
    assert vars(vision) == dict(image_size=16, patch_size=8, width=24, depth=2, heads=3)
    assert vars(text) == dict(vocab_size=50, block_size=64, width=32, depth=5, heads=4, tied_head=True)
    assert vars(LlavaMiniConfig(vision, text, 7)) == dict(vision=vision, text=text, image_token_id=7)


def test_configs_default_to_the_sizes_that_train_py_builds():
    args = train.arguments().parse_args([])
    sizes = {"width": args.width, "depth": args.depth, "heads": args.heads}
    assert ViTConfig() == ViTConfig(image_size=args.image_size, patch_size=args.patch_size, **sizes)
    assert GPTConfig(V) == GPTConfig(V, block_size=args.block_size, **sizes)


def test_the_model_has_the_sizes_of_its_config():
    config = LlavaMiniConfig(ViTConfig(16, 8, 24, 3, 2), GPTConfig(V, 64, 32, 5, 4), IMAGE)
    model = LlavaMini(config)
    assert model.config is config
    assert (len(model.vision.blocks), len(model.decoder.blocks)) == (3, 5)
    assert {(block.heads, block.causal) for block in model.vision.blocks} == {(2, False)}
    assert {(block.heads, block.causal) for block in model.decoder.blocks} == {(4, True)}
    assert model.vision.patch_embed.weight.shape == (24, 3, 8, 8)
    assert model.decoder.wpe.weight.shape == (64, 32)
    assert model.projector(model.vision(torch.randn(1, 3, 16, 16))).shape == (1, 4, 32)
    # qkv, attn_out, mlp_in, mlp_out, their biases and two norms; neither the patches nor the head have a bias
    block = {C: 12 * C * C + 13 * C for C in (24, 32)}
    vision = 24 * 3 * 8 * 8 + 24 + 5 * 24 + 2 * 24 + 3 * block[24]
    projector = 24 * 32 + 32 + 32 * 32 + 32
    decoder = V * 32 + 64 * 32 + 2 * 32 + 5 * block[32]
    assert sum(p.numel() for p in model.parameters()) == vision + projector + decoder


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: Block(30, 4, causal=True), "width 30 does not divide by 4 heads"),
        (lambda: ViT(ViTConfig(16, 8, width=30, depth=1, heads=4)), "width 30 does not divide by 4 heads"),
        (lambda: GPT(GPTConfig(V, width=30, depth=1, heads=4)), "width 30 does not divide by 4 heads"),
        (lambda: ViT(ViTConfig(20, 8)), "image size 20 is no multiple of patch size 8"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize("causal", [False, True])
def test_a_new_block_changes_nothing(causal):
    x = torch.randn(2, 5, 32)
    assert torch.equal(Block(32, 4, causal)(x), x)


@pytest.mark.parametrize(
    "build, name, std",
    [
        (lambda: Block(256, 4, True), "qkv.weight", 1 / 16),
        (lambda: Block(256, 4, True), "mlp_in.weight", 1 / 16),
        (lambda: ViT(ViTConfig(8, 8, width=4096, depth=0)), "class_embed", 1),
        (lambda: Projector(64, 256), "linear_1.weight", 1 / 8),
        (lambda: Projector(64, 256), "linear_2.weight", 1 / 16),
        (lambda: GPT(GPTConfig(256, depth=0)), "wte.weight", 0.1),
    ],
)
def test_weights_start_at_random_with_the_documented_spread(build, name, std):
    torch.manual_seed(0)
    weight = build().get_parameter(name)
    assert weight.std().item() == pytest.approx(std, rel=0.05)
    assert abs(weight.mean().item()) < 0.05 * std


@pytest.mark.parametrize("width", [6, 5])
def test_positions_of_words_start_as_sines_then_cosines_of_ever_longer_waves(width):
    weight = GPT(GPTConfig(16, block_size=8, width=width, depth=0)).wpe.weight
    angles = [[position / 80 ** (i / width) for i in (0, 2, 4)] for position in range(8)]
    expected = [[*map(math.sin, row), *map(math.cos, row)][:width] for row in angles]
    assert torch.allclose(weight, 0.1 * 2**0.5 * torch.tensor(expected), atol=1e-6)


@pytest.mark.parametrize("width", [8, 7])
def test_positions_of_patches_start_with_the_row_in_one_half_of_the_channels_and_the_column_in_the_other(width):
    torch.manual_seed(0)
    first, *patches = ViT(ViTConfig(24, 8, width=width, depth=0)).pos_embed.weight
    waves = llava_mini.sinusoids(3, 4)
    for patch, (row, column) in zip(patches, product(range(3), repeat=2), strict=True):
        assert torch.equal(patch, torch.cat([waves[row], waves[column]])[:width])
    assert len(set(first.tolist())) == width  # the class token's is random


def test_sinusoids_are_on_average_as_large_as_patches():
    assert llava_mini.sinusoids(256, 96).square().mean() == pytest.approx(1)


def test_patches_leave_a_new_projector_about_as_large_as_they_came():
    torch.manual_seed(0)
    x = torch.randn(8, P, 128)
    assert 0.3 < Projector(128, 128)(x).std() < 1.2


# --- loss ------------------------------------------------------------------------------------------------------------
@pytest.fixture
def labelled():
    """A batch in which some labels stand at the first, at the last and at image positions, and one row has none."""
    ids, pixels = prompt(1, 0, 2, 0)
    labels = torch.full_like(ids, -100)
    for row, t in ((0, 0), (0, 7), (0, 8), (1, 10), (2, 0), (2, 3), (2, 10)):
        labels[row, t] = 5 + row + t
    return ids, pixels, labels


def test_the_loss_is_the_mean_cross_entropy_of_the_next_tokens(model, labelled):
    logits, _ = model(*labelled[:2])
    torch.testing.assert_close(
        model(*labelled)[1], plain_loss(logits, labelled[2]), rtol=1e-6, atol=0, check_dtype=False
    )


def test_a_label_at_the_first_position_counts_for_nothing(model, labelled):
    ids, pixels, labels = labelled
    without = labels.clone()
    without[:, 0] = -100
    assert torch.equal(model(ids, pixels, labels)[1], model(ids, pixels, without)[1])


def test_with_labels_there_are_logits_only_where_the_next_token_has_one(model, labelled):
    everywhere, logits = model(*labelled[:2])[0], model(*labelled)[0]
    expected = torch.stack([everywhere[row, t] for row, t in ((0, 6), (0, 7), (1, 9), (2, 2), (2, 9))])
    assert logits.shape == (5, V)
    torch.testing.assert_close(logits, expected, **close)


def shapes_seen(layers, run):
    """-> the shapes of the inputs of these layers, in the order in which they come while run()."""
    shapes = []
    for layer in layers:
        layer.register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape)))
    run()
    return shapes


def after_attention(block):
    return block.attn_out, block.ln_2, block.mlp_in, block.mlp_out


def test_the_head_runs_only_where_there_is_a_label(model, labelled):
    assert shapes_seen([model.decoder.lm_head], lambda: model(*labelled)) == [(5, 32)]


def test_what_only_the_head_reads_is_computed_only_where_there_is_a_label(model, labelled):
    first, last = model.decoder.blocks
    B, T = labelled[0].shape
    layers = *after_attention(first), last.ln_1, last.qkv, *after_attention(last), model.decoder.ln_f
    whole = [(B, T, 32)] * 3 + [(B, T, 128)] + [(B, T, 32)] * 2
    assert shapes_seen(layers, lambda: model(*labelled)) == [*whole, (5, 32), (5, 32), (5, 32), (5, 128), (5, 32)]


def test_the_gradients_are_those_of_the_loss_over_all_logits(model, labelled):
    model(*labelled)[1].backward()
    ours = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    plain_loss(model(*labelled[:2])[0], labelled[2]).backward()
    assert len(ours) > 50
    for name, p in model.named_parameters():
        torch.testing.assert_close(ours[name], p.grad, rtol=1e-5, atol=1e-9, msg=name)


@pytest.mark.parametrize("low_precision", [False, True])
def test_the_loss_is_no_coarser_than_float32(tokenizer, tiny_model, device, low_precision):
    with torch.autocast(device.type, torch.bfloat16, enabled=low_precision):
        logits, loss = tiny_model(**batch(tokenizer, 0, 1, device=device))
    assert logits.dtype == (torch.bfloat16 if low_precision else torch.float32)
    assert loss.dtype == torch.float32


def test_the_gpt_alone_learns_from_text(model):
    ids, pixels = prompt(0, 0)
    alone, whole = model.decoder(model.decoder.wte(ids), ids), model(ids, pixels, ids)
    assert torch.equal(alone[0], whole[0])
    assert torch.equal(alone[1], whole[1])


# --- generation ------------------------------------------------------------------------------------------------------
def foretell(model, steps):
    """Make the head favour these tokens, one list of a token a row for each step."""
    logits = iter([torch.nn.functional.one_hot(torch.tensor(step), V).double() for step in steps])
    model.decoder.lm_head.forward = lambda x: next(logits)


def generate_without_cache(model, ids, pixels, max_new_tokens):
    for _ in range(max_new_tokens):
        token = model(ids, pixels)[0][:, -1].argmax(-1)
        ids = torch.cat([ids, token[:, None]], dim=1)
    return ids


@pytest.mark.parametrize("images, length", [((0,), 1), ((0, 0), 2), ((1, 0, 2), 11)])
def test_generation_with_cache_equals_generation_without(model, images, length):
    ids, pixels = prompt(*images, length=length)
    out = model.generate(ids, pixels, 12)
    assert torch.equal(out, generate_without_cache(model, ids, pixels, 12))
    assert len(out[:, length:].unique()) > 1


def test_the_cache_gives_the_states_of_the_whole_sequence_however_it_is_cut(model):
    x = torch.randn(2, 8, 32, dtype=torch.float64)
    cache, start, states = torch.full((2, 2, 2, 4, 10, 8), math.nan, dtype=torch.float64), 0, []
    for part in x.split([5, 1, 1, 1], dim=1):
        states.append(model.decoder.hidden(part, cache, start))
        start += part.shape[1]
    torch.testing.assert_close(torch.cat(states, dim=1), model.decoder.hidden(x), **close)


def test_greedy_generation_agrees_with_teacher_forcing(tokenizer, tiny_model, device):
    made = batch(tokenizer, 1, device=device)
    ids, pixels = made["input_ids"], made["pixel_values"]
    out = tiny_model.generate(ids, pixels, 20)
    forced = tiny_model(out[:, :-1], pixels)[0].argmax(-1)
    assert torch.equal(out[:, : ids.shape[1]], ids)
    assert torch.equal(out[:, ids.shape[1] :], forced[:, ids.shape[1] - 1 :])


def test_generation_under_autocast_gives_tokens_of_the_vocabulary(tokenizer, tiny_model, device):
    made = batch(tokenizer, 1, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        out = tiny_model.generate(made["input_ids"], made["pixel_values"], 5)
    assert out.shape == (1, made["input_ids"].shape[1] + 5)
    assert out.min() >= 0 and out.max() < tokenizer.get_vocab_size()


def test_one_image_is_encoded_once_and_then_each_step_takes_one_token(model):
    ids, pixels = prompt(2, 1)
    encoded, steps = [], []
    model.vision.register_forward_pre_hook(lambda vit, args: encoded.append(len(args[0])))
    model.decoder.blocks[0].register_forward_pre_hook(lambda block, args: steps.append((args[0].shape[1], args[2])))
    model.generate(ids, pixels, 5)
    assert encoded == [3]
    assert steps == [(11, 0), (1, 11), (1, 12), (1, 13), (1, 14)]


def test_the_cache_is_one_tensor_of_fixed_size(model):
    caches, hidden = [], model.decoder.hidden
    model.decoder.hidden = lambda x, cache, *more, **keep: caches.append(cache) or hidden(x, cache, *more, **keep)
    model.generate(*prompt(1, 0), 5)
    assert len(caches) == 5
    assert all(cache is caches[0] for cache in caches)
    assert caches[0].shape == (2, 2, 2, 4, 11 + 5, 8)  # blocks, keys and values, rows, heads, positions, width a head


def test_generation_computes_what_only_the_head_reads_at_the_last_position_only(model):
    layers = *after_attention(model.decoder.blocks[1]), model.decoder.lm_head
    shapes = shapes_seen(layers, lambda: model.generate(*prompt(1, 0), 3))
    assert shapes == [(2, 32), (2, 32), (2, 32), (2, 128), (2, 32)] * 3


def test_generation_records_nothing_for_a_backward_pass(model):
    recorded = []
    model.decoder.ln_f.register_forward_hook(lambda norm, args, out: recorded.append(out.requires_grad))
    model.generate(*prompt(1), 3)
    assert recorded == [False] * 3


@pytest.mark.parametrize("new", [0, 1, 128 - 11])
def test_generation_gives_as_many_tokens_as_asked_up_to_the_block_size(model, new):
    ids, pixels = prompt(1, 0)
    out = model.generate(ids, pixels, new)
    assert out.shape == (2, 11 + new)
    assert torch.equal(out[:, :11], ids)


@pytest.mark.parametrize(
    "steps, expected",
    [
        ([[7, 8], [9, 1], [4, 9]], [[7, 9, 9], [8, 1, 9]]),  # the first row ended: end tokens in place of the 4
        ([[9, 8], [7, 9], [6, 6]], [[9, 9], [8, 9]]),  # both ended: no third step
        ([[9, 9], [7, 7]], [[9], [9]]),
        ([[7, 9], [7, 1], [7, 1]], [[7, 7, 7], [9, 9, 9]]),  # the first row never ends
    ],
)
def test_a_row_that_ended_repeats_the_end_token_until_all_have(model, steps, expected):
    foretell(model, steps)
    streamed = list(model.stream(*prompt(0, 0), 3, eos_token_id=9))
    assert torch.stack(streamed, dim=1).tolist() == expected
    foretell(model, steps)
    assert model.generate(*prompt(0, 0), 3, eos_token_id=9)[:, 11:].tolist() == expected


def test_without_an_end_token_nothing_ends_early(model):
    foretell(model, [[0, 0], [0, 1], [1, 0]])
    assert model.generate(*prompt(0, 0), 3)[:, 11:].tolist() == [[0, 0, 1], [0, 1, 0]]


def test_generation_stops_with_the_end_token_and_no_step_later(model):
    ids, pixels = prompt(1)
    free = model.generate(ids, pixels, 20)[0, 11:].tolist()
    end = free[7]
    steps = []
    model.decoder.ln_f.register_forward_pre_hook(lambda norm, args: steps.append(1))
    stopped = model.generate(ids, pixels, 20, eos_token_id=end)[0, 11:].tolist()
    assert stopped == free[: free.index(end) + 1]
    assert len(steps) == len(stopped)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("top_k", [None, 1, 4, V, 10 * V])
def test_sampling_draws_from_the_softmax_of_the_logits_over_the_temperature(model, temperature, top_k):
    ids, pixels = prompt(1)
    ids, pixels = ids.repeat(200, 1), pixels.repeat(200, 1, 1, 1, 1)
    logits = model(ids, pixels)[0][:, -1]
    if top_k is not None:
        best = logits.argsort(dim=-1, descending=True)[:, :top_k]
        logits = torch.full_like(logits, -math.inf).scatter(1, best, logits.gather(1, best))
    torch.manual_seed(1)
    expected = torch.multinomial((logits / temperature).exp(), 1)
    torch.manual_seed(1)
    drawn = model.generate(ids, pixels, 1, temperature, top_k)[:, 11:]
    assert torch.equal(drawn, expected)


def test_sampling_gives_all_of_the_top_k_tokens_and_no_other(model):
    ids, pixels = prompt(0)
    best = model(ids, pixels)[0][0, -1].topk(4).indices.tolist()
    torch.manual_seed(0)
    drawn = model.generate(ids.repeat(300, 1), pixels.repeat(300, 1, 1, 1, 1), 1, temperature=1000.0, top_k=4)[:, 11]
    assert set(drawn.tolist()) == set(best)


@pytest.mark.parametrize("temperature, top_k", [(0.0, None), (0.0, 5), (2.0, 1), (1e-4, None)])
def test_temperature_zero_and_top_k_one_are_greedy(model, temperature, top_k):
    ids, pixels = prompt(1, 0)
    assert torch.equal(
        model.generate(ids, pixels, 9, temperature, top_k), generate_without_cache(model, ids, pixels, 9)
    )


def test_sampling_follows_the_seed_and_differs_from_greedy(model):
    ids, pixels = prompt(1, 0)

    def sampled(seed):
        torch.manual_seed(seed)
        return model.generate(ids, pixels, 12, temperature=5.0)

    assert torch.equal(sampled(0), sampled(0))
    assert not torch.equal(sampled(0), sampled(1))
    assert not torch.equal(sampled(0), model.generate(ids, pixels, 12))


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(max_new_tokens=118), "max_new_tokens 118: must be from 0 to 117, as 11 tokens are there"),
        (dict(max_new_tokens=-1), "max_new_tokens -1: must be from 0 to 117"),
        (dict(max_new_tokens=1, temperature=-0.1), "temperature -0.1 and top_k None"),
        (dict(max_new_tokens=1, top_k=0), "temperature 0.0 and top_k 0"),
        (dict(max_new_tokens=1, temperature=1.0, top_k=-1), "temperature 1.0 and top_k -1"),
    ],
)
def test_generation_settings_that_make_no_sense_are_refused(model, settings, message):
    for refuses in (model.generate, lambda *args, **kwargs: next(model.stream(*args, **kwargs))):
        with pytest.raises(ValueError, match=message):
            refuses(*prompt(1), **settings)


def test_generation_refuses_what_forward_refuses(model):
    ids, pixels = prompt(1)
    with pytest.raises(ValueError, match="row 0: 4 image tokens, but 0 .* 0$"):
        model.generate(ids, torch.zeros_like(pixels), 1)


# --- command line ----------------------------------------------------------------------------------------------------
SCRIPT = Path(llava_mini.__file__)
QUESTION = "What is this?"


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    """A folder with a model, and two pictures."""
    folder = tmp_path_factory.mktemp("trained")
    model = random_model(tokenizer.get_vocab_size(), tokenizer.token_to_id(data.IMAGE_TOKEN))
    model.save_pretrained(folder / "out", tokenizer)
    for i in range(2):
        picture(i, size=20).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def processes(folder):
    """The command line as processes of their own: {name: (exit status, stdout, stderr)}. They start a second each."""
    arguments = {
        "pictures": [folder / "out", QUESTION, "--image", folder / "0.png", folder / "1.png", "--max-new-tokens", "6"],
        "missing picture": [folder / "out", QUESTION, "--image", folder / "missing.png"],
        "debug": [folder / "nowhere", QUESTION, "--debug"],
    }
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONUTF8": "1", "OMP_NUM_THREADS": "1"}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, cwd=folder, encoding="utf-8")
    running = {name: subprocess.Popen([sys.executable, SCRIPT, *words], **pipes) for name, words in arguments.items()}
    outputs = {name: process.communicate(timeout=100) for name, process in running.items()}
    return {name: (running[name].returncode, *output) for name, output in outputs.items()}


@pytest.fixture
def run_script(monkeypatch, capsys):
    """The script with these words on its command line, in this process; -> (exit status or message, stdout)."""

    def run_script(*words):
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, words)])
        status = 0
        try:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        except SystemExit as stopped:
            status = stopped.code  # Python prints a message on stderr and exits with 1
        return status, capsys.readouterr().out

    return run_script


def asked(folder, **changes):
    """The settings of the command line, for `ask`."""
    settings = dict(folder=folder / "out", prompt=QUESTION, image=[], max_new_tokens=8, temperature=0.0, top_k=None)
    return argparse.Namespace(**settings | dict(seed=0, device="cpu") | changes)


def shown(tokenizer, ids):
    """What the terminal shows of these tokens: the whole text, but for half a character at its end."""
    texts = [tokenizer.decode(ids[:n]) for n in range(len(ids) + 1)]
    return [text for text in texts if not text.endswith("\ufffd")][-1] + "\n"


def generated(folder, tokenizer, new=None, images=(), **settings):
    """What `generate` answers to the question, as the terminal should show it."""
    model = LlavaMini.from_pretrained(folder / "out")
    made = record(QUESTION, images=len(images))
    made = made | {"conversations": made["conversations"][:1]} | ({"image": list(images)} if images else {})
    made = data.collate([data.make_sample(made, tokenizer, IMAGE_SIZE, PATCH_SIZE)])
    ids, end = made["input_ids"], tokenizer.token_to_id(data.IM_END)
    torch.manual_seed(settings.pop("seed", 0))
    new = 128 - ids.shape[1] if new is None else new
    out = model.generate(ids, made["pixel_values"], new, eos_token_id=end, **settings)
    return shown(tokenizer, [token for token in out[0, ids.shape[1] :].tolist() if token != end])


def test_the_command_answers_as_generate_does_about_several_pictures_in_order(processes, folder, tokenizer):
    pictures = [folder / "0.png", folder / "1.png"]
    answer = generated(folder, tokenizer, new=6, images=pictures)
    assert processes["pictures"] == (0, answer, "")
    assert answer != generated(folder, tokenizer, new=6, images=pictures[::-1])


def test_the_command_answers_at_any_length_that_fits_without_a_picture(run_script, folder, tokenizer):
    answer = generated(folder, tokenizer)
    assert len(answer) > 20
    assert run_script(folder / "out", QUESTION, "--device", "cpu") == (0, answer)


@pytest.mark.parametrize("words, seed", [([], 0), (["--seed", "3"], 3)])
def test_sampling_is_set_on_the_command_line(run_script, folder, tokenizer, words, seed):
    words = ["--max-new-tokens", "7", "--temperature", "4", "--top-k", "9", "--device", "cpu", *words]
    answer = generated(folder, tokenizer, new=7, temperature=4.0, top_k=9, seed=seed)
    assert run_script(folder / "out", QUESTION, *words) == (0, answer)


def test_an_error_is_one_line_on_stderr_and_a_non_zero_exit(processes):
    status, out, error = processes["missing picture"]
    assert (status, out) == (1, "")
    assert error.startswith("llava_mini.py: image can't be read: ")
    assert "missing.png" in error
    assert error.count("\n") == 1 and error.endswith("\n")


def test_debug_shows_the_traceback(processes):
    status, out, error = processes["debug"]
    assert (status, out) == (1, "")
    assert error.startswith("Traceback") and "nowhere: no checkpoint here" in error


@pytest.mark.parametrize(
    "words, message",
    [
        (["nowhere", QUESTION], "nowhere: no checkpoint here"),
        (["out", QUESTION, "--image", "0.png", "missing.png"], "image can't be read: missing.png"),
        (["out", "7" * 200], "too long: its first exchange exceeds the 127 tokens that the block size allows"),
        (["out", QUESTION, "--temperature", "-1"], "temperature -1.0"),
        (["out", QUESTION, "--device", "abacus"], "abacus"),
        (["out", QUESTION, "--max-new-tokens", "many"], "argument --max-new-tokens: invalid int value: 'many'"),
        (["out"], "the following arguments are required: prompt"),
        (["out", QUESTION, "--image"], "argument --image: expected at least one argument"),
    ],
)
def test_the_command_says_in_one_line_what_is_wrong(run_script, folder, monkeypatch, words, message):
    monkeypatch.chdir(folder)
    status, out = run_script(*words)
    assert out == ""
    assert re.match("llava_mini.py: .*" + message, status)
    assert "\n" not in status


def test_help_names_every_option_and_ends_well(run_script):
    status, out = run_script("--help")
    assert status == 0
    options = ["--image", "--max-new-tokens", "--temperature", "--top-k", "--seed", "--device", "--debug"]
    assert all(option in out for option in ["folder", "prompt", *options])


def test_an_answer_streams_piece_by_piece(folder, tokenizer, monkeypatch):
    pieces = []

    def record_piece(*values, end="\n", flush=False):
        pieces.append(("".join(values) + end, flush))

    monkeypatch.setattr("builtins.print", record_piece)
    llava_mini.ask(asked(folder))
    assert "".join(text for text, _ in pieces) == generated(folder, tokenizer, new=8)
    assert len(pieces) > 4
    assert all(flush for _, flush in pieces[:-1])


@pytest.mark.parametrize(
    "text, pieces", [("né", ["n", "é"]), ("5€", ["5", "€"]), ("", []), ("a\ufffdb", ["a", "\ufffdb"])]
)
def test_a_character_of_several_tokens_is_shown_whole(folder, tokenizer, monkeypatch, text, pieces):
    tokens = [token for byte in text for token in tokenizer.encode(byte).ids]
    tokens.append(end := tokenizer.token_to_id(data.IM_END))

    def stream(*args):
        assert args[-1] == end  # after which nothing comes
        return (torch.tensor([token]) for token in tokens)

    monkeypatch.setattr(LlavaMini, "stream", stream)
    printed = []
    monkeypatch.setattr("builtins.print", lambda *values, **kwargs: printed.extend(values))
    llava_mini.ask(asked(folder))
    assert [piece for piece in printed if piece] == pieces


def test_sampling_settings_and_seed_reach_the_model(folder, tokenizer, capsys):
    answers = []
    for settings in (dict(temperature=4.0), dict(temperature=4.0, seed=1), dict(temperature=4.0, top_k=2)):
        llava_mini.ask(asked(folder, **settings))
        answers.append(capsys.readouterr().out)
        assert answers[-1] == generated(folder, tokenizer, new=8, **settings)
    assert len(set(answers)) == 3


@pytest.mark.parametrize("room", [1, 0])
def test_a_prompt_may_leave_a_single_token_for_the_answer_but_not_none(folder, tokenizer, capsys, room):
    used = len(data.encode({"conversations": [{"from": "human", "value": ""}]}, tokenizer, P)[0])
    longest = asked(folder, prompt="7" * (128 - room - used))  # every digit is one token
    if room:
        llava_mini.ask(longest)
        assert capsys.readouterr().out.endswith("\n")
    else:
        with pytest.raises(ValueError, match="exceeds the 127 tokens"):
            llava_mini.ask(longest)


def command(main, *words):
    """run_command(main) with these words on the command line of `tool`, which has one option, --steps N."""
    parser = argparse.ArgumentParser(prog="tool")
    parser.add_argument("--steps", type=int, default=3)
    before, sys.argv = sys.argv, ["tool", *words]
    try:
        llava_mini.run_command(main, parser)
    finally:
        sys.argv = before


def test_run_command_hands_the_arguments_over():
    seen = []
    command(seen.append, "--steps", "5")
    assert (seen[0].steps, seen[0].debug) == (5, False)


@pytest.mark.parametrize(
    "error, message",
    [
        (ValueError("no such thing"), "tool: no such thing"),
        (RuntimeError("a long story\nand its end\n"), "tool: and its end"),
        (KeyError(), "tool: KeyError()"),
    ],
)
def test_an_error_is_one_line_and_with_debug_itself(error, message):
    def main(args):
        raise error

    with pytest.raises(SystemExit) as stopped:
        command(main)
    assert stopped.value.code == message  # Python prints it on stderr and exits with 1
    with pytest.raises(type(error)):
        command(main, "--debug")


def test_a_wrong_argument_is_one_line():
    with pytest.raises(SystemExit) as stopped:
        command(print, "--steps", "many")
    assert stopped.value.code == "tool: argument --steps: invalid int value: 'many'"


@pytest.mark.parametrize("there", ["cuda", "mps", None])
def test_the_default_device_is_the_accelerator_if_there_is_one(monkeypatch, there):
    def current_accelerator(check_available):
        assert check_available  # a build for CUDA names it even where there is none
        return there and torch.device(there)

    monkeypatch.setattr(torch.accelerator, "current_accelerator", current_accelerator)
    assert runpy.run_path(str(SCRIPT))["DEVICE"] == (there or "cpu")
