"""transformers judges us: real layouts come in, a LLaVA goes out, and both compute what it does."""

import copy
import json
from argparse import Namespace

import pytest
import torch
from conftest import command, picture
from safetensors.torch import load_file, save_file

import data
import train
from extras import pretrained, to_transformers, variants
from extras.ask import answer
from llava_mini import Config, LlavaMini

hf = pytest.importorskip("transformers", reason="transformers is the judge here")
EXACT = {"rtol": 1e-9, "atol": 1e-9}  # in float64


def randomise(module):
    """Every parameter away from where it starts: zeros and ones hide mistakes."""
    generator = torch.Generator().manual_seed(0)
    for p in module.parameters():
        p.data += 0.3 * torch.randn(p.shape, generator=generator)
    return module


def talk(n_images, turns=2):
    question = f"{data.IMAGE_TOKEN}\n" * n_images + "Is  it\nred?"
    talk = [("human", question), ("gpt", "Yes, é!"), ("human", "Why?")][:turns]
    talk = [{"from": role, "value": value} for role, value in talk]
    return {"image": [picture(i) for i in range(n_images)], "conversations": talk}


@pytest.fixture(scope="module")
def tokenizer():
    return data.train_tokenizer([talk(0)], vocab_size=300)


# ---- in: a SigLIP and a GPT-2, small and random, as transformers saves them ---------------------


@pytest.fixture(params=["whole models", "parts"])
def saved(request, tmp_path, tokenizer):
    """-> (SigLIP's vision part, GPT-2, the folder that holds both)"""
    whole = request.param == "whole models"
    # Like so400m: an MLP of another width, and pixels on the right and below that fill no patch.
    sizes = {"hidden_size": 24, "intermediate_size": 80, "image_size": 20, "patch_size": 8}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 2}
    words = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 9}
    config = hf.SiglipConfig(vision_config=sizes, text_config=words)
    siglip = randomise(hf.SiglipModel(config))
    (siglip if whole else siglip.vision_model).save_pretrained(tmp_path / "siglip")

    sizes = {"vocab_size": 280, "n_positions": 128, "n_embd": 32, "n_layer": 2, "n_head": 4}
    gpt2 = randomise(hf.GPT2LMHeadModel(hf.GPT2Config(**sizes))).eval()
    (gpt2 if whole else gpt2.transformer).save_pretrained(tmp_path / "gpt2")
    tokenizer.save(str(tmp_path / "gpt2" / "tokenizer.json"))

    # The hub's file also holds attention masks, under names that look like weights.
    masks = {"attn.bias": torch.ones(1, 1, 128, 128), "attn.masked_bias": torch.tensor(-1e4)}
    file, prefix = tmp_path / "gpt2" / "model.safetensors", "transformer." if whole else ""
    save_file(load_file(file) | {f"{prefix}h.0.{k}": mask for k, mask in masks.items()}, file)
    return siglip.vision_model, gpt2, tmp_path


def build(folder):
    return pretrained.build(folder / "siglip", folder / "gpt2")


def test_the_encoder_gives_siglips_features_before_the_last_norm(saved):
    siglip, _, folder = saved
    images = torch.stack([data.load_pixels(picture(i, 20), 20) for i in range(3)]).double()
    with torch.no_grad():
        features = build(folder)[0].double().vision(images[..., :16, :16])
        theirs = siglip.double()(images, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(features, theirs, **EXACT)


def test_the_decoder_gives_gpt2s_logits_and_their_mean_for_new_words(saved, tokenizer):
    _, gpt2, folder = saved
    ids = torch.randint(3, 280, (2, 128), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits, _ = build(folder)[0].double()(ids, torch.zeros(2, 1, 3, 16, 16))
        theirs = gpt2.double()(ids).logits
    torch.testing.assert_close(logits[..., :280], theirs, **EXACT)
    new = theirs.mean(dim=-1, keepdim=True).expand(-1, -1, tokenizer.get_vocab_size() - 280)
    torch.testing.assert_close(logits[..., 280:], new, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("saved", ["whole models"], indirect=True)
def test_the_command_writes_a_folder_for_training_to_start_from(saved):
    words = []
    for option, name in (("--vision", "siglip"), ("--decoder", "gpt2"), ("--out", "start")):
        words += [option, saved[-1] / name]
    assert command("extras/pretrained.py", *words)[0] == 0
    model, tokenizer = train.build(Namespace(freeze=[]), None, source=words[-1])
    _, loss = model(**data.collate([data.make_sample(talk(1), tokenizer, model.config)]))
    assert loss.isfinite()

    error, _ = command("extras/pretrained.py", *words)
    assert error == f"pretrained.py: {words[-1]} is not empty: choose another --out"


FC1 = "encoder.layers.1.mlp.fc1.weight"


@pytest.mark.parametrize("saved", ["parts"], indirect=True)
@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("siglip", {"model_type": "clip_vision_model"}, "model_type is 'clip_vision_model'"),
        ("siglip", {"hidden_act": "quick_gelu"}, "hidden_act is 'quick_gelu'"),
        ("siglip", {"layer_norm_eps": 1e-5}, "layer_norm_eps is 1e-05, but we have 1e-06"),
        ("siglip", {"num_hidden_layers": 3}, "encoder.layers.2.layer_norm1.weight is missing"),
        ("siglip", {FC1: torch.zeros(96, 24)}, f"tensor {FC1} is (96, 24), but we need (80, 24)"),
        ("gpt2", {"activation_function": "gelu"}, "activation_function is 'gelu'"),
        ("gpt2", {"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon is 1e-06, but we have 1e-05"),
        ("gpt2", {"tie_word_embeddings": False}, "tie_word_embeddings is False"),
        ("gpt2", {"vocab_size": 200}, "tensor wte.weight is (280, 32), but we need (200, 32)"),
    ],
)
def test_what_we_do_not_compute_is_refused_by_name(saved, part, change, message):
    folder = saved[-1] / part
    tensors = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    for name, value in change.items():
        (tensors if name in tensors else config)[name] = value
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError) as error:
        build(saved[-1])
    assert str(folder) in str(error.value) and message in str(error.value)


# ---- out: a LLaVA -------------------------------------------------------------------------------


LLAMA = {"kv_heads": 2, "mlp_width": 40, "tied": False, "norm_eps": 1e-6}
LLAMA |= {"rope_scaling": {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}}
LLAMA["rope_scaling"]["original_max_position_embeddings"] = 64
QWEN2 = {"kv_heads": 1, "mlp_width": 40, "qkv_bias": True, "rope_theta": 1e6}


@pytest.fixture(scope="module", params=[None, LLAMA, QWEN2], ids=["gpt2", "llama", "qwen2"])
def ours(request, tokenizer):
    sizes = {"width": 32, "vision_width": 24, "vision_depth": 3, "vision_heads": 2}
    sizes |= {"vision_mlp_width": 80, "llama": request.param}
    image_token_id = tokenizer.token_to_id(data.IMAGE_TOKEN)
    vocab_size = tokenizer.get_vocab_size()
    torch.manual_seed(0)
    model = randomise(LlavaMini(Config(vocab_size, image_token_id, 128, 16, **sizes)))
    tables = {model.decoder.wte, getattr(model.decoder, "lm_head", model.decoder.wte)}
    for i in range(vocab_size):
        if not tokenizer.decode([i]).isascii():  # halves of characters would blur an answer
            for table in tables:
                table.weight.data[i] = 0
    return model


@pytest.fixture(scope="module")
def folder(ours, tokenizer, tmp_path_factory):
    """What the command made of our model."""
    folder = tmp_path_factory.mktemp("model")
    ours.save(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    assert command("extras/to_transformers.py", folder, folder / "hf")[0] == 0
    return folder / "hf"


def open_llava(folder, **options):
    return hf.LlavaForConditionalGeneration.from_pretrained(folder, **options)


def batches(config, tokenizer, images, dtype=torch.float32):
    """-> (our batch, theirs), which holds the images alone or none"""
    batch = data.collate([data.make_sample(talk(n), tokenizer, config) for n in images])
    batch["pixel_values"] = batch["pixel_values"].to(dtype)
    slots = batch["pixel_values"].flatten(0, 1)
    real = slots[slots.flatten(1).any(dim=1)]
    return batch, batch | {"pixel_values": real if any(images) else None}


IMAGES = pytest.mark.parametrize("images", [[0], [1], [2], [0, 1, 2]], ids=str)


@IMAGES
def test_every_key_fits_and_logits_agree_to_a_ten_thousandth(ours, folder, tokenizer, images):
    theirs, info = open_llava(folder, output_loading_info=True)
    assert not any(info.values())
    batch, their_batch = batches(ours.config, tokenizer, images)
    with torch.no_grad():
        logits, _ = ours(batch["input_ids"], batch["pixel_values"])
        assert (logits - theirs(**their_batch).logits).abs().max() <= 1e-4


@IMAGES
def test_loss_and_gradients_are_llavas(ours, folder, tokenizer, tmp_path, images):
    batch, their_batch = batches(ours.config, tokenizer, images, torch.float64)
    ours, theirs = copy.deepcopy(ours).double(), open_llava(folder).double().train()
    logits, loss_sum = ours(**batch)
    loss, their_loss = loss_sum / len(logits), theirs(**their_batch).loss
    torch.testing.assert_close(loss.float(), their_loss.float())
    loss.backward()
    their_loss.backward()

    # Our gradients take the place of our weights, and then the weights' way to transformers.
    for p in ours.parameters():
        p.data = torch.zeros_like(p) if p.grad is None else p.grad
    to_transformers.export(ours, tokenizer, tmp_path)
    expected = open_llava(tmp_path)

    if not ours.config.llama:  # two tensors there, one here
        head, words = theirs.lm_head.weight, theirs.get_input_embeddings().weight
        head.grad = words.grad = head.grad + words.grad
    for name, p in theirs.named_parameters():
        if "post_layernorm" not in name:
            grad = torch.zeros_like(p) if p.grad is None else p.grad
            wanted = expected.get_parameter(name).data
            torch.testing.assert_close(grad.float(), wanted, rtol=1e-4, atol=1e-5)


def as_messages(record):
    """LLaVA's record in transformers' format: all images first, as in `talk`."""
    messages = [{"type": "image", "image": image} for image in record["image"]]
    texts = [turn["value"].replace(f"{data.IMAGE_TOKEN}\n", "") for turn in record["conversations"]]
    content = [[*messages, {"type": "text", "text": texts[0]}], *texts[1:]]
    roles = [data.ROLES[turn["from"]] for turn in record["conversations"]]
    return [{"role": role, "content": part} for role, part in zip(roles, content)]


@pytest.mark.parametrize("images", [0, 1, 2])
@pytest.mark.parametrize("turns", [2, 3])
def test_the_processor_prepares_our_input(ours, folder, tokenizer, images, turns):
    record = talk(images, turns)
    sample = data.make_sample(record, tokenizer, ours.config)
    processor = hf.AutoProcessor.from_pretrained(folder)
    text = processor.apply_chat_template(as_messages(record), add_generation_prompt=turns == 3)
    made = processor(text=text, images=record["image"] or None, return_tensors="pt")
    assert made["input_ids"].tolist() == [sample["input_ids"].tolist()]
    if images:
        torch.testing.assert_close(made["pixel_values"], sample["pixel_values"])


def test_the_processor_resizes_a_square_picture_within_one_level_of_ours(folder):
    processor = hf.AutoProcessor.from_pretrained(folder).image_processor
    made = processor(picture(0, size=50), return_tensors="pt")["pixel_values"][0]
    assert (made - data.load_pixels(picture(0, size=50), 16)).abs().max() <= 1.01 * 2 / 255


@pytest.mark.parametrize("images", [0, 1, 2])
def test_the_pipeline_gives_our_answer(ours, folder, tokenizer, images):
    record = talk(images, turns=1)
    pipe = hf.pipeline("image-text-to-text", str(folder))
    assert pipe.model.generation_config.eos_token_id == tokenizer.token_to_id(data.IM_END)
    options = {"max_new_tokens": 12, "do_sample": False, "return_full_text": False}
    theirs = pipe(text=as_messages(record), **options)[0]["generated_text"]
    assert theirs == "".join(answer(ours, tokenizer, record, 12)) != ""


def test_a_projector_that_merges_patches_is_refused(ours, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(Config, "image_tokens", 1)
    with pytest.raises(ValueError, match="a token for each patch"):
        to_transformers.export(ours, tokenizer, tmp_path)


def test_what_the_benchmark_compares_computes_the_same_loss():
    config = Config(512, 511, 256, 32, 16, 32, vision_width=24, vision_heads=2)
    batch = variants.make_batch(config, share=50, rows=4)
    models = variants.make_variants(config)
    losses = []
    for name in ("ours", "discard", "transformers"):
        losses.append(variants.loss_of(name, models[name], batch).item())
    assert losses == pytest.approx(3 * losses[:1], rel=1e-5)
