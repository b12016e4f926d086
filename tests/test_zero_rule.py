"""The zero rule: a slot whose pixels are all exactly zero holds no image, and costs nothing."""

import warnings
from functools import partial

import pytest
import torch
from conftest import IMAGE_SIZE, P, batch, picture, random_model, sample
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

import data

T = 14  # tokens a row in `filled`


@pytest.fixture(params=["float32", "bfloat16"])
def autocast(request, device):
    return partial(torch.autocast, device.type, torch.bfloat16, enabled=request.param == "bfloat16")


def filled(model, slots, seed=0):
    """Random words and pixels, (input_ids, pixel_values), with an image in slot m of row b where slots[b][m] is 1."""
    generator, device = torch.Generator().manual_seed(seed), next(model.parameters()).device
    slots = torch.tensor(slots)
    ids = torch.randint(3, model.config.text.vocab_size, (len(slots), T), generator=generator)
    for row, images in enumerate(slots.sum(1).tolist()):
        ids[row, 1 : 1 + images * P] = model.config.image_token_id
    pixels = torch.randn(*slots.shape, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator) * slots.view(
        *slots.shape, 1, 1, 1
    )
    return ids.to(device), pixels.to(device)


def inputs_of(module):
    """A list that grows by the input of every call of the module."""
    seen = []
    module.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach().clone()))
    return seen


def towers(model):
    return {f"{part}.{n}": p for part in ("vision", "projector") for n, p in getattr(model, part).named_parameters()}


def bare_gpt(model, made):
    return model.decoder(model.decoder.wte(made["input_ids"]), made["labels"])


def flops(step):
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def exact(samples):
    made = data.collate(samples)
    return made | {"pixel_values": made["pixel_values"].double()}


def exact_logits(model, samples):
    made = exact(samples)
    return model(made["input_ids"], made["pixel_values"])[0]


@pytest.fixture
def samples(tokenizer):
    """Four samples of different lengths, with 0, 1, 2 and 1 images."""
    return [
        sample(tokenizer, question="What" + " is it" * i, answer="red " * (3 * i + 1), images=images, seed=i)
        for i, images in enumerate((0, 1, 2, 1))
    ]


# --- which slots are real --------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "slots, real",
    [
        ([[0]], []),
        ([[0, 0], [0, 0]], []),
        ([[1]], [0]),
        ([[0], [1], [0], [1]], [1, 3]),
        ([[0, 1], [1, 0]], [1, 2]),
        ([[0, 0], [0, 1], [1, 1]], [3, 4, 5]),
        ([[1, 0, 1], [0, 1, 0]], [0, 2, 4]),
    ],
)
def test_real_slots_are_the_indices_of_the_images_among_all_slots(tiny_model, slots, real):
    assert tiny_model.real_slots(*filled(tiny_model, slots)) == real


@pytest.mark.parametrize("value", [1.0, -1.0, 2.0**-149, -(2.0**-149)])
@pytest.mark.parametrize("channel, y, x", [(0, 0, 0), (1, 7, 3), (2, IMAGE_SIZE - 1, IMAGE_SIZE - 1)])
def test_one_pixel_makes_an_image_however_small(tiny_model, value, channel, y, x):
    ids, pixels = filled(tiny_model, [[0], [1]])
    pixels[1] = 0
    pixels[1, 0, channel, y, x] = value
    assert tiny_model.real_slots(ids, pixels) == [1]


def test_the_rule_is_exact_in_double_precision_too(tiny_model):
    ids, pixels = filled(tiny_model, [[1], [1], [0]])
    pixels = pixels.double()
    pixels[:2] = 0
    pixels[0, 0, 0, 0, 0], pixels[1, 0, 0, 0, 0] = 1e-300, 1e300
    assert tiny_model.real_slots(ids, pixels) == [0, 1]


def test_negative_zeros_are_zeros(tiny_model):
    ids, pixels = filled(tiny_model, [[0], [1]])
    pixels[0] = -0.0
    assert tiny_model.real_slots(ids, pixels) == [1]


def test_a_picture_whose_pixels_sum_to_zero_is_an_image(tiny_model):
    ids, pixels = filled(tiny_model, [[0], [1]])
    pixels[1, 0, :, ::2], pixels[1, 0, :, 1::2] = 1, -1
    seen = inputs_of(tiny_model.vision)
    tiny_model(ids, pixels)
    assert pixels[1].sum() == 0
    assert torch.equal(seen[0], pixels[1])


def test_no_colour_is_zero_after_normalisation():
    ramp = Image.frombytes("RGB", (16, 16), bytes(value for value in range(256) for _ in range(3)))
    channels = data.to_tensor(ramp, 16).flatten(1)
    assert all(len(channel.unique()) == 256 for channel in channels)
    assert channels.all()


# --- the skip --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("images", [(1,), (0, 1, 2), (2, 0, 1), (1, 1), (3, 0, 3)])
def test_vision_encoder_and_projector_see_exactly_the_real_images_in_order(
    tokenizer, device, tiny_model, autocast, images
):
    seen, projected = inputs_of(tiny_model.vision), inputs_of(tiny_model.projector)
    with autocast():
        tiny_model(**batch(tokenizer, *images, device=device))
    pictures = [data.to_tensor(picture(100 * row + i), IMAGE_SIZE) for row, n in enumerate(images) for i in range(n)]
    assert len(seen) == len(projected) == 1
    assert torch.equal(seen[0].cpu(), torch.stack(pictures))
    assert projected[0].shape[:2] == (len(pictures), P)


@pytest.mark.parametrize("images", [(0,), (0, 0, 0)])
def test_a_text_only_batch_does_not_call_the_vision_encoder_nor_the_projector(
    tokenizer, device, tiny_model, autocast, images
):
    called = [inputs_of(module) for part in (tiny_model.vision, tiny_model.projector) for module in part.modules()]
    made = batch(tokenizer, *images, device=device)
    with autocast():
        tiny_model(**made)[1].backward()
        tiny_model.generate(made["input_ids"], made["pixel_values"], 2)
    assert not any(called)


def test_a_text_only_step_costs_the_flops_of_the_decoder_alone(tokenizer, device, tiny_model, autocast):
    made = batch(tokenizer, 0, 0, 0, device=device)
    with autocast():
        step, bare = (
            flops(lambda: tiny_model(**made)[1].backward()),
            flops(lambda: bare_gpt(tiny_model, made)[1].backward()),
        )
    assert step == bare > 0


def test_every_real_image_adds_the_flops_of_one_image(tiny_model):
    def step(*slots):
        ids, pixels = filled(tiny_model, slots)
        return flops(lambda: tiny_model(ids, pixels, labels=ids)[1].backward())

    image = torch.ones(1, 3, IMAGE_SIZE, IMAGE_SIZE, device=next(tiny_model.parameters()).device)
    one = flops(lambda: tiny_model.projector(tiny_model.vision(image)).sum().backward())
    none = step([0, 0], [0, 0], [0, 0])
    assert one > 0
    assert step([0, 0], [0, 1], [0, 0]) - none == one
    assert step([1, 0], [0, 0], [1, 1]) - none == 3 * one
    assert step([1, 1], [1, 1], [1, 1]) - none == 6 * one


def test_a_text_only_step_keeps_no_more_for_the_backward_pass_than_the_decoder_alone(tokenizer, device, tiny_model):
    def saved_bytes(step):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.nbytes) or t, lambda t: t):
            step()
        return sizes

    text, mixed = batch(tokenizer, 0, 0, device=device), batch(tokenizer, 0, 1, device=device)
    bare = saved_bytes(lambda: bare_gpt(tiny_model, text))
    assert saved_bytes(lambda: tiny_model(**text)) == bare
    assert sum(saved_bytes(lambda: tiny_model(**mixed))) > sum(bare)


# --- gradients -------------------------------------------------------------------------------------------------------
def test_a_text_only_step_leaves_every_vision_and_projector_gradient_none(tokenizer, device, tiny_model, autocast):
    with autocast():
        loss = tiny_model(**batch(tokenizer, 0, 0, device=device))[1]
    loss.backward()
    assert all(p.grad is None for p in towers(tiny_model).values())
    assert all(p.grad is not None for p in tiny_model.decoder.parameters())


def test_one_image_in_the_batch_gives_every_parameter_a_gradient(tokenizer, device, tiny_model, autocast):
    with autocast():
        loss = tiny_model(**batch(tokenizer, 0, 1, 0, device=device))[1]
    loss.backward()
    assert [name for name, p in tiny_model.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, partial(torch.optim.SGD, momentum=0.9)])
def test_a_text_only_step_changes_no_bit_of_weights_and_momentum_of_the_vision_branch(
    tokenizer, device, tiny_model, autocast, optimizer
):
    optimizer = optimizer(tiny_model.parameters(), lr=0.1, weight_decay=0.1)

    def step(*images):
        optimizer.zero_grad()
        with autocast():
            loss = tiny_model(**batch(tokenizer, *images, device=device))[1]
        loss.backward()
        optimizer.step()
        return [
            {"weight": p.detach().clone(), **{k: v.clone() for k, v in optimizer.state[p].items()}}
            for p in (*towers(tiny_model).values(), *tiny_model.decoder.parameters())
        ]

    before, after = step(0, 1, 2), step(0, 0)
    n_towers = len(towers(tiny_model))
    for old, new in zip(before[:n_towers], after[:n_towers], strict=True):
        assert len(old) > 1  # the optimiser did carry momentum
        assert all(torch.equal(old[key], new[key]) for key in old)
    for old, new in zip(before[n_towers:], after[n_towers:], strict=True):
        assert not torch.equal(old["weight"], new["weight"])


def test_a_text_only_batch_gives_the_decoder_the_gradients_of_the_bare_gpt_bit_for_bit(
    tokenizer, device, tiny_model, autocast
):
    made, gradients, outputs = batch(tokenizer, 0, 0, 0, device=device), [], []
    for forward in (lambda: tiny_model(**made), lambda: bare_gpt(tiny_model, made)):
        tiny_model.zero_grad()
        with autocast():
            outputs.append(forward())
        outputs[-1][1].backward()
        gradients.append([p.grad.clone() for p in tiny_model.decoder.parameters()])
    assert torch.equal(outputs[0][0], outputs[1][0])
    assert torch.equal(outputs[0][1], outputs[1][1])
    assert all(map(torch.equal, *gradients))


def test_a_mixed_batch_learns_what_its_samples_alone_teach_weighted_by_their_supervised_tokens(exact_model, samples):
    def loss_and_gradients(samples):
        exact_model.zero_grad()
        loss = exact_model(**exact(samples))[1]
        loss.backward()
        return loss.detach(), *(torch.zeros_like(p) if p.grad is None else p.grad for p in exact_model.parameters())

    counts = [int((s["labels"] != data.IGNORE_INDEX).sum()) for s in samples]
    assert len(set(counts)) == len(counts)  # or a plain mean of the samples would do
    alone = [
        [count / sum(counts) * part for part in loss_and_gradients([s])]
        for s, count in zip(samples, counts, strict=True)
    ]
    for mixed, parts in zip(loss_and_gradients(samples), zip(*alone, strict=True), strict=True):
        torch.testing.assert_close(mixed, sum(parts), rtol=1e-9, atol=1e-10)


# --- batch companions ------------------------------------------------------------------------------------------------
def test_batch_companions_change_no_logits(exact_model, samples):
    together = exact_logits(exact_model, samples)
    for row, s in enumerate(samples):
        alone = exact_logits(exact_model, [s])
        torch.testing.assert_close(together[row, : alone.shape[1]], alone[0], rtol=0, atol=1e-10)


def test_the_order_of_the_batch_changes_no_logits(exact_model, samples):
    forwards, backwards = exact_logits(exact_model, samples), exact_logits(exact_model, samples[::-1])
    torch.testing.assert_close(backwards.flip(0), forwards, rtol=0, atol=1e-10)


@pytest.mark.parametrize("padding", [0, 1, 2])  # an end token, a start token, and what could be mistaken for an image
def test_more_padding_changes_no_logits(exact_model, samples, padding):
    made = exact(samples)
    ids, pixels = made["input_ids"], made["pixel_values"]
    if padding == exact_model.config.image_token_id:
        padding = exact_model.config.text.vocab_size - 1
    longer = torch.nn.functional.pad(ids, (0, 9), value=padding)
    wider = torch.cat([pixels, torch.zeros_like(pixels)], dim=1)
    logits = exact_model(longer, wider)[0][:, : ids.shape[1]]
    torch.testing.assert_close(logits, exact_model(ids, pixels)[0], rtol=0, atol=1e-10)


def test_words_and_pictures_of_another_row_change_no_bit_of_a_row(tiny_model, autocast):
    slots = [[0, 0], [1, 0], [1, 1]]
    (ids, pixels), (other_ids, other_pixels) = filled(tiny_model, slots, seed=0), filled(tiny_model, slots, seed=1)
    other_ids[0], other_pixels[1] = ids[0], pixels[1]
    other_ids[1] = ids[1]
    with autocast():
        before, after = tiny_model(ids, pixels)[0], tiny_model(other_ids, other_pixels)[0]
    assert torch.equal(before[:2], after[:2])
    assert not torch.equal(before[2], after[2])


# --- each image feeds its own row and slot ---------------------------------------------------------------------------
def test_patch_features_stand_in_order_where_the_image_tokens_stand_and_words_elsewhere(exact_model):
    ids, pixels = filled(exact_model, [[0, 1], [0, 0], [1, 1]])
    pixels = pixels.double()
    expected = exact_model.decoder.wte(ids).clone()
    for row, slot, start in ((0, 1, 1), (2, 0, 1), (2, 1, 1 + P)):
        expected[row, start : start + P] = exact_model.projector(exact_model.vision(pixels[row, slot][None]))[0]
    torch.testing.assert_close(exact_model.embed(ids, pixels), expected, rtol=0, atol=1e-10)


def test_an_image_may_stand_in_any_slot_of_its_row(tiny_model, autocast):
    ids, pixels = filled(tiny_model, [[1, 0, 0], [0, 1, 0]])
    with autocast():
        assert torch.equal(tiny_model(ids, pixels)[0], tiny_model(ids, pixels.roll(1, dims=1))[0])


def test_image_tokens_of_one_image_may_stand_apart(exact_model):
    ids, pixels = filled(exact_model, [[1]])
    apart = ids.clone()
    apart[0, 1 + P - 1], apart[0, -1] = ids[0, -1], ids[0, 1 + P - 1]
    together, split = exact_model.embed(ids, pixels.double())[0], exact_model.embed(apart, pixels.double())[0]
    assert torch.equal(split[-1], together[1 + P - 1])


@pytest.mark.parametrize("low_precision", [False, True])
def test_swapping_the_pictures_of_two_rows_swaps_exactly_their_effects(exact_model, tiny_model, low_precision):
    model = tiny_model if low_precision else exact_model
    ids, pixels = filled(model, [[1], [1], [1]])
    ids, pixels = ids[:1].expand(3, -1), pixels.to(next(model.parameters()).dtype)  # three rows with the same words
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=low_precision):
        before, after = model(ids, pixels)[0], model(ids, pixels[[1, 0, 2]])[0]
    tolerance = 0.05 * before.abs().max().item() if low_precision else 1e-10
    torch.testing.assert_close(after, before[[1, 0, 2]], rtol=0, atol=tolerance)
    assert (before[0] - before[1]).abs().max() > 10 * tolerance


def test_swapping_the_pictures_of_one_row_swaps_their_patches(exact_model):
    ids, pixels = filled(exact_model, [[0, 0], [1, 1]])
    before, after = (exact_model.embed(ids, p.double()) for p in (pixels, pixels.flip(1)))
    first, second = slice(1, 1 + P), slice(1 + P, 1 + 2 * P)
    torch.testing.assert_close(after[1, first], before[1, second], rtol=0, atol=1e-10)
    torch.testing.assert_close(after[1, second], before[1, first], rtol=0, atol=1e-10)
    assert torch.equal(after[0], before[0])
    assert torch.equal(after[1, 1 + 2 * P :], before[1, 1 + 2 * P :])


def test_a_picture_reaches_its_own_row_only_from_its_first_token_on(tiny_model, autocast):
    ids, pixels = filled(tiny_model, [[1, 1], [1, 0]])
    changed = pixels.clone()
    changed[0, 1] += 1
    with autocast():
        before, after = tiny_model(ids, pixels)[0], tiny_model(ids, changed)[0]
    assert torch.equal(before[1], after[1])
    assert torch.equal(before[0, : 1 + P], after[0, : 1 + P])
    assert (before[0, 1 + P :] != after[0, 1 + P :]).any(1).all()


# --- what is refused -------------------------------------------------------------------------------------------------
def put(tensor, index, value):
    tensor = tensor.clone()
    tensor[index] = value
    return tensor


BAD = {  # name: (how to spoil a batch that is right, what the message says)
    "an image token too few": (lambda ids, x: (put(ids, (1, 1), 5), x), "row 1: 3 image tokens, but 1 .* 4"),
    "an image token too many": (lambda ids, x: (put(ids, (2, 0), 2), x), "row 2: 9 image tokens, but 2 .* 8"),
    "image tokens of another image": (lambda ids, x: (ids[[0, 2, 1]], x), "row 1: 8 image tokens, but 1 .* 4"),
    "image tokens with a zero slot": (lambda ids, x: (ids, put(x, 1, 0.0)), "row 1: 4 image tokens, but 0 .* 0$"),
    "an image without image tokens": (lambda ids, x: (ids, put(x, (0, 1), 1.0)), "row 0: 0 image tokens, but 1 .* 4"),
    "a negative id": (lambda ids, x: (put(ids, (1, -1), -1), x), "row 1: token ids from -1 to .*vocabulary of"),
    "an id beyond the vocabulary": (lambda ids, x: (put(ids, (2, -1), 483), x), "row 2: .* to 483 .*vocabulary of 483"),
    "NaN": (lambda ids, x: (ids, put(x, (1, 0, 2, 3, 4), float("nan"))), "row 1: .*NaN or infinity"),
    "NaN in the last slot": (lambda ids, x: (ids, put(x, (2, 1, 0, 0, 0), float("nan"))), "row 2: .*NaN or infinity"),
    "NaN in a zero slot": (lambda ids, x: (ids, put(x, (0, 0, 0, 0, 0), float("nan"))), "row 0: .*NaN or infinity"),
    "infinity": (lambda ids, x: (ids, put(x, (1, 0, 0, 0, 0), float("inf"))), "row 1: .*NaN or infinity"),
    "minus infinity": (lambda ids, x: (ids, put(x, (1, 0, 0, 0, 0), -float("inf"))), "row 1: .*NaN or infinity"),
    "32-bit ids": (lambda ids, x: (ids.int(), x), r"input_ids must be int64 \(B, T\), .*got torch.int32 \(3, 14\)"),
    "floating point ids": (lambda ids, x: (ids.float(), x), "input_ids must be int64"),
    "ids of one row without its dimension": (lambda ids, x: (ids[0], x[:1]), r"input_ids must be .* \(14,\)"),
    "ids of three dimensions": (lambda ids, x: (ids[..., None], x), r"input_ids must be .* \(3, 14, 1\)"),
    "no rows": (lambda ids, x: (ids[:0], x[:0]), r"input_ids must be .* \(0, 14\)"),
    "no tokens": (lambda ids, x: (ids[:, :0], x), r"input_ids must be .* \(3, 0\)"),
    "a row too long": (lambda ids, x: (ids.repeat(1, 10)[:, :129], x), r"T at most 128, got torch.int64 \(3, 129\)"),
    "pixels of another number of rows": (lambda ids, x: (ids, x[:2]), r"pixel_values must be .*\(3, M.* \(2, 2, 3"),
    "pixels without the slot dimension": (lambda ids, x: (ids, x[:, 0]), r"pixel_values must be .* \(3, 3, 16, 16\)"),
    "pixels with a dimension too many": (
        lambda ids, x: (ids, x[None]),
        r"pixel_values must be .* \(1, 3, 2, 3, 16, 16",
    ),
    "no slots": (lambda ids, x: (ids[:1], x[:1, :0]), r"pixel_values must be .*M >= 1.* \(1, 0, 3, 16, 16\)"),
    "grey pictures": (lambda ids, x: (ids, x[:, :, :1]), r"pixel_values must be .* \(3, 2, 1, 16, 16\)"),
    "a wrong height": (lambda ids, x: (ids, x[..., :8, :]), r"pixel_values must be .*3, 16, 16\), got .* 8, 16\)"),
    "a wrong width": (lambda ids, x: (ids, x[..., :8]), r"pixel_values must be .*3, 16, 16\), got .* 16, 8\)"),
    "bytes for pixels": (lambda ids, x: (ids, x.byte()), "pixel_values must be floats .*, got torch.uint8"),
    "booleans for pixels": (lambda ids, x: (ids, x.bool()), "pixel_values must be floats .*, got torch.bool"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_batch_is_refused_in_words_that_name_what_is_wrong(device, name):
    spoil, message = BAD[name]
    model = random_model(vocab_size=483, image_token_id=2).to(device)
    ids, pixels = filled(model, [[0, 0], [1, 0], [1, 1]])
    assert model.real_slots(ids, pixels) == [2, 4, 5]
    seen = inputs_of(model.vision)
    for refuses in (model.real_slots, model.embed, model.forward):
        with pytest.raises(ValueError, match=message):
            refuses(*spoil(ids, pixels))
    assert not seen


def test_a_surplus_of_image_tokens_in_one_row_does_not_make_up_for_a_lack_in_another(tiny_model):
    ids, pixels = filled(tiny_model, [[1, 1], [0, 0]])
    with pytest.raises(ValueError, match="row 0: 8 image tokens, but 1 .* 4"):
        tiny_model(ids, pixels.transpose(0, 1))


def test_ids_and_lengths_up_to_the_limits_are_accepted(tiny_model):
    text = tiny_model.config.text
    ids, pixels = filled(tiny_model, [[0]])
    ids = ids.repeat(1, 10)[:, : text.block_size]
    ids[0, 0], ids[0, 1] = 0, text.vocab_size - 1
    assert tiny_model(ids, pixels)[0].shape == (1, text.block_size, text.vocab_size)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_pixels_of_low_precision_serve_under_autocast(device, dtype):
    # The largest id, 1023, is no bfloat16: the check must not round ids to the type of the pixels.
    model = random_model(vocab_size=1024, image_token_id=2).to(device)
    ids, pixels = filled(model, [[0], [1]])
    ids[:, -1] = 1023
    assert model.real_slots(ids, pixels.to(dtype)) == [1]
    with torch.autocast(device.type, torch.bfloat16):
        assert model(ids, pixels.to(dtype), labels=ids)[1].dtype == torch.float32


@pytest.mark.parametrize("supervised", [[], [0]])
def test_labels_that_supervise_nothing_are_refused(tiny_model, supervised):
    ids, pixels = filled(tiny_model, [[1], [0]])
    labels = torch.full_like(ids, data.IGNORE_INDEX)
    labels[:, supervised] = 5  # nothing comes before the first token that could predict it
    with pytest.raises(ValueError, match="no position has a label"):
        tiny_model(ids, pixels, labels)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="only a GPU works apart from the host")
def test_a_step_waits_for_the_gpu_twice_to_learn_the_real_slots_and_to_count_the_labels(tiny_model, tokenizer, device):
    made = batch(tokenizer, 1, 0, 2, device=device)
    tiny_model(**made)[1].backward()  # the first use of a GPU has waits of its own
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            tiny_model(**made)[1].backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len([warning for warning in caught if "synchronizing" in str(warning.message)]) == 2, caught
