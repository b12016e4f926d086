"""The zero rule: a slot whose pixels are all exactly zero holds no image, and costs nothing."""

import copy
from dataclasses import asdict

import pytest
import torch
import torch.nn.functional as F
from conftest import SIZE, P, both_decoders, close, make_model, same
from PIL import Image
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import data
from llava_mini import Config
from train import to_device

pytestmark = both_decoders
NOTHING = torch.zeros(3, SIZE, SIZE)
OPPOSITES = torch.ones(3, SIZE, SIZE)
OPPOSITES[:, ::2] = -1


def one_pixel(value):
    pixels = NOTHING.clone()
    pixels[2, -1, -1] = value
    return pixels


SLOTS = {
    "zeros are no image": (NOTHING, False),
    "negative zeros are none either": (-NOTHING, False),
    "the smallest number makes an image": (one_pixel(2.0**-149), True),
    "a negative number makes an image": (one_pixel(-1.0), True),
    "pixels that sum to zero make an image": (OPPOSITES, True),
    "what is no number makes an image": (one_pixel(torch.nan), True),
}


@pytest.mark.parametrize("words", SLOTS)
def test_a_slot_is_empty_only_if_every_pixel_is_zero(model, device, words):
    pixels, real = SLOTS[words]
    slots = torch.stack([NOTHING, pixels, NOTHING, OPPOSITES]).unflatten(0, (2, 2))
    assert model.real_slots(slots.to(device)).tolist() == [[False, real], [False, True]]


def test_no_grey_of_8_bits_has_a_pixel_of_zero_or_makes_an_empty_slot(model):
    greys = [Image.new("RGB", (SIZE, SIZE), (grey, grey, grey)) for grey in range(256)]
    pixels = torch.stack([data.load_pixels(grey, SIZE) for grey in greys])
    assert pixels.all()
    assert model.real_slots(pixels[:, None]).all()


def bare_gpt(model, input_ids):
    return model.decoder(model.decoder.wte(input_ids))


def loss_and_gradients(model, batch):
    model.zero_grad()
    loss = model(**batch)[1]
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


def test_encoder_and_projector_see_exactly_the_real_images_in_order(model, batch_of):
    seen = []
    for module in (model.vision, model.projector):
        module.register_forward_hook(lambda _, inputs, output: seen.extend([*inputs, output]))
    batch = batch_of(0, 2, 0, 1)
    model(**batch)
    images, patches, projected, _ = seen
    assert torch.equal(images, batch["pixel_values"][[1, 1, 3], [0, 1, 0]])
    assert torch.equal(projected, patches)


def test_a_batch_of_text_alone_calls_no_layer_of_encoder_and_projector(model, batch_of):
    calls = []
    for module in (*model.vision.modules(), *model.projector.modules()):
        module.register_forward_hook(lambda *call: calls.append(call))
    batch = batch_of(0, 0)
    batch["pixel_values"] = batch["pixel_values"].expand(-1, 3, -1, -1, -1)
    model(**batch)[1].backward()
    model.generate(batch["input_ids"][:1], batch["pixel_values"][:1], 2)
    assert not calls


def flops(run):
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("counts", [(0, 0), (0, 1, 0), (2, 0, 1)])
def test_a_step_costs_the_bare_gpt_plus_its_images_to_the_flop(model, batch_of, counts):
    batch = batch_of(*counts)
    ids, pixels = batch["input_ids"], batch["pixel_values"]
    whole = flops(lambda: model(ids, pixels)[0].sum().backward())
    text = flops(lambda: model.decoder.head(bare_gpt(model, ids)).sum().backward())
    images = OPPOSITES.expand(sum(counts), -1, -1, -1).to(ids.device)
    seen = flops(lambda: model.encode_images(images).sum().backward()) if any(counts) else 0
    assert whole == text + seen


def test_the_head_runs_on_supervised_positions_only(model, batch_of):
    batch = batch_of(0, 0)
    N = (batch["labels"][:, 1:] != data.IGNORE_INDEX).sum()
    head = flops(lambda: model(**batch)) - flops(lambda: bare_gpt(model, batch["input_ids"]))
    assert head == 2 * N * model.config.width * model.config.vocab_size


LAYERS = {"convolution", "addmm", "mm", "embedding"}
WAITS = {"nonzero", "equal", "masked_select", "_local_scalar_dense"}  # the host needs a number


class Trace(TorchDispatchMode):
    """Notes the operations. Indexing with a mask is nonzero, too: it asks how many are true."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = operation.overloadpacket.__name__
        indices = args[1] if name.startswith("index") else []
        by_mask = any(getattr(index, "dtype", None) == torch.bool for index in indices)
        self.names.append("nonzero" if by_mask else name)
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize("counts", [(0, 0), (0, 2, 1)])
def test_a_gpu_is_waited_for_before_the_first_layer_and_never_again(model, batch_of, counts):
    batch, trace = batch_of(*counts), Trace()
    trace.names = []
    with trace:
        model(**batch)[1].backward()
    first = min(trace.names.index(layer) for layer in LAYERS & {*trace.names})
    assert WAITS & {*trace.names[:first]}
    assert not WAITS & {*trace.names[first:]}


def test_text_alone_gives_the_encoder_no_gradient_and_moves_no_bit_of_it(model, batch_of):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)

    def step(*counts):
        _, gradients = loss_and_gradients(model, batch_of(*counts))
        optimizer.step()
        states = [[p, *optimizer.state[p].values()] for p in model.parameters()]  # momentum, too
        return gradients, copy.deepcopy(states)

    (with_image, before), (of_text, after) = step(0, 1, 0), step(0, 0)
    for name, old, new in zip(of_text, before, after):
        assert with_image[name].any(), name
        if name.startswith("decoder"):
            assert not torch.equal(old[0], new[0]), name
        else:
            assert of_text[name] is None, name
            assert all(map(torch.equal, old, new)), name


def test_text_gives_the_gradients_of_the_bare_gpt_bit_for_bit(model, batch_of):
    batch = batch_of(0, 0, 0)
    loss, gradients = loss_and_gradients(model, batch)
    model.zero_grad()

    targets = batch["labels"][:, 1:]
    supervised = targets != data.IGNORE_INDEX
    states = bare_gpt(model, batch["input_ids"])[:, :-1]
    logits = model.decoder.head(states[supervised])
    bare_loss = F.cross_entropy(logits, targets[supervised], reduction="sum")
    bare_loss.backward()
    same(loss, bare_loss)
    for name, p in model.decoder.named_parameters():
        same(gradients[f"decoder.{name}"], p.grad)


@pytest.fixture
def one_by_one(samples_of, device):
    """The samples of a mixed batch, each in a batch of its own."""
    samples = samples_of(0, 1, 2, 1, dtype=torch.float64)
    return [to_device(data.collate([sample]), device) for sample in samples]


@pytest.fixture
def mixed(batch_of):
    return batch_of(0, 1, 2, 1, dtype=torch.float64)


def test_a_mixed_batch_gives_the_sum_of_what_its_samples_give_alone(exact_model, mixed, one_by_one):
    loss, gradients = loss_and_gradients(exact_model, mixed)
    alone = [loss_and_gradients(exact_model, batch) for batch in one_by_one]
    close(loss, sum(loss for loss, _ in alone))
    for name, gradient in gradients.items():
        parts = [gradients[name] for _, gradients in alone if gradients[name] is not None]
        close(gradient, sum(parts))


def test_companions_order_padding_and_empty_slots_change_nothing(exact_model, mixed, one_by_one):
    ids, pixels = mixed["input_ids"], mixed["pixel_values"]
    together = exact_model(ids, pixels)[0]
    close(exact_model(ids.flip(0), pixels.flip(0))[0].flip(0), together)
    for row, batch in zip(together, one_by_one):
        alone = exact_model(batch["input_ids"], batch["pixel_values"])[0][0]
        close(row[: len(alone)], alone)

    empty, longer = torch.zeros_like(pixels[:, :1]), F.pad(ids, (0, 9), value=7)
    apart = torch.cat([empty, pixels[:, :1], empty, pixels[:, 1:]], dim=1)
    close(exact_model(longer, apart)[0][:, : ids.shape[1]], together)


def patches_by_hand(model, input_ids, pixel_values):
    """-> what `embed` should give, made image by image and token by token."""
    expected = model.decoder.wte(input_ids).clone()
    for row, ids in enumerate(input_ids):
        places = [t for t, token in enumerate(ids) if token == model.config.image_token_id]
        images = [image[None] for image in pixel_values[row] if image.any()]
        patches = [patch for x in images for patch in model.projector(model.vision(x))[0]]
        for t, patch in zip(places, patches, strict=True):
            expected[row, t] = patch
    return expected


def test_patches_stand_in_order_where_the_image_tokens_of_their_row_stand(exact_model, mixed):
    ids, pixels = mixed["input_ids"], mixed["pixel_values"]
    close(exact_model.embed(ids, pixels), patches_by_hand(exact_model, ids, pixels))


MISCOUNTED = [  # markers of two rows, their images, what is said
    ((1, 0), (0, 1), f"row 0: {P} .* 0$"),  # right in sum, and yet each row is wrong
    ((1, 1), (1, 2), f"row 1: {P} .* {2 * P}$"),
    ((0, 1), (0, 0), f"row 1: {P} .* 0$"),
    ((0, 0), (1, 0), f"row 0: 0 .* {P}$"),
]


@pytest.mark.parametrize("markers, images, words", MISCOUNTED)
def test_image_tokens_are_counted_in_every_row(model, batch_of, markers, images, words):
    with pytest.raises(ValueError, match=words):
        model(batch_of(*markers)["input_ids"], batch_of(*images)["pixel_values"])


def pooling(config, tokens):
    """A projector that makes so many tokens of an image, whatever the encoder gives."""
    pool = nn.AdaptiveAvgPool2d((tokens, None))
    return nn.Sequential(pool, nn.Linear(config.vision_width, config.width))


@pytest.mark.parametrize("counts", [(1,), (0, 1), (2, 1)])
@pytest.mark.parametrize("tokens", {1, P + 1} - {P})  # one would fit everywhere, by broadcasting
def test_another_number_of_tokens_is_refused(model, batch_of, device, tokens, counts):
    model.projector = pooling(model.config, tokens).to(device)
    with pytest.raises(ValueError, match=rf"image_tokens\b.*\b{P}\b.*\b{tokens}\b"):
        model(**batch_of(*counts))


@pytest.mark.parametrize("tokens", [1, 2])
def test_another_number_of_tokens_works_once_config_says_so(batch_of, config, device, tokens):
    class Pooled(Config):
        image_tokens = tokens

    pooled = Pooled(**asdict(config))
    model = make_model(pooled)
    model.projector = pooling(pooled, tokens)
    model.double().to(device)
    batch = batch_of(0, 2, dtype=torch.float64, config=pooled)
    ids, pixels = batch["input_ids"], batch["pixel_values"]
    assert (ids == pooled.image_token_id).sum() == 2 * tokens
    close(model.embed(ids, pixels), patches_by_hand(model, ids, pixels))
