"""Checkpoints without transformers: what is written reads back, foreign folders load, the rest is refused."""

import ast
import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import IMAGE_SIZE, PATCH_SIZE, P, batch, load_file, random_model, record
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

import data
import llava_mini
import train
from llava_mini import GPTConfig, LlavaMini, LlavaMiniConfig, ViTConfig, load_decoder, load_vision, replace_file

ROOT = Path(llava_mini.__file__).parent
ABSENT = object()


# --- folders ---------------------------------------------------------------------------------------------------------
def uneven_model(tokenizer, tied_head=True):
    """Random weights, and no two sizes alike, so that nothing fits into another's place."""
    vision = ViTConfig(image_size=24, patch_size=8, width=20, depth=1, heads=5)
    text = GPTConfig(tokenizer.get_vocab_size(), block_size=48, width=18, depth=2, heads=3, tied_head=tied_head)
    model = LlavaMini(LlavaMiniConfig(vision, text, tokenizer.token_to_id(data.IMAGE_TOKEN)))
    return randomise(model)


def randomise(module):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    return module


@pytest.fixture
def saved(tokenizer, tmp_path):
    """(model, folder) of a saved random model."""
    model = random_model(tokenizer.get_vocab_size(), tokenizer.token_to_id(data.IMAGE_TOKEN))
    model.save_pretrained(tmp_path / "saved", tokenizer)
    return model, tmp_path / "saved"


def change_config(folder, field, value):
    """Set a field of config.json, as "text_config.n_head"; ABSENT removes it."""
    config = json.loads((folder / "config.json").read_text())
    *parents, name = field.split(".")
    place = config
    for parent in parents:
        place = place[parent]
    place[name] = value
    if value is ABSENT:
        del place[name]
    (folder / "config.json").write_text(json.dumps(config))


def change_tensors(folder, change):
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors")


def rename(folder, renamed):
    change_tensors(folder, lambda tensors: {renamed(name): tensor for name, tensor in tensors.items()})


def write_folder(folder, config, shapes):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors")
    return folder, tensors


def with_biases(shapes, out):
    """{"linear": shape} -> {"linear.weight": shape, "linear.bias": (shape[out],)}"""
    biases = {f"{name}.bias": (shape[out],) for name, shape in shapes.items()}
    return {f"{name}.weight": shape for name, shape in shapes.items()} | biases


def clip_folder(folder, width=24, depth=3):
    """A whole CLIP model as it lies on the hub: image and text tower, old position_ids buffers, a logit scale."""
    shapes = {
        "embeddings.class_embedding": (width,),
        "embeddings.patch_embedding.weight": (width, 3, PATCH_SIZE, PATCH_SIZE),
        "embeddings.position_embedding.weight": (P + 1, width),
        "embeddings.position_ids": (1, P + 1),
    }
    linears = {"pre_layrnorm": (width,), "post_layernorm": (width,)}
    for i in range(depth):
        attention = {f"self_attn.{name}_proj": (width, width) for name in ("q", "k", "v", "out")}
        mlp = {"mlp.fc1": (4 * width, width), "mlp.fc2": (width, 4 * width)}
        norms = {"layer_norm1": (width,), "layer_norm2": (width,)}
        linears |= {f"encoder.layers.{i}.{name}": shape for name, shape in (attention | mlp | norms).items()}
    shapes |= with_biases(linears, out=0)
    text_tower = {f"text_model.{name}": (7,) for name in shapes}
    vision = {"model_type": "clip_vision_model", "image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE}
    vision |= {"hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": 2}
    config = {"model_type": "clip", "hidden_size": 7, "vision_config": vision, "text_config": {"hidden_size": 7}}
    vision_tower = {f"vision_model.{name}": shape for name, shape in shapes.items()}
    return write_folder(folder, config, vision_tower | text_tower | {"logit_scale": ()})


def gpt2_folder(folder, vocab_size=257, width=32, depth=2, prefix=""):
    """A GPT-2 as it lies on the hub: no prefix, attention masks as buffers, no lm_head."""
    linears, masks = {"ln_f": (width,)}, {}
    for i in range(depth):
        attention = {"attn.c_attn": (width, 3 * width), "attn.c_proj": (width, width)}
        mlp = {"mlp.c_fc": (width, 4 * width), "mlp.c_proj": (4 * width, width)}
        norms = {"ln_1": (width,), "ln_2": (width,)}
        linears |= {f"h.{i}.{name}": shape for name, shape in (attention | mlp | norms).items()}
        masks |= {f"h.{i}.attn.bias": (1, 1, 128, 128), f"h.{i}.attn.masked_bias": ()}
    shapes = {"wte.weight": (vocab_size, width), "wpe.weight": (128, width)} | with_biases(linears, out=-1) | masks
    config = {"model_type": "gpt2", "vocab_size": vocab_size, "n_positions": 128, "n_ctx": 128}
    config |= {"n_embd": width, "n_layer": depth, "n_head": 4}
    return write_folder(folder, config, {prefix + name: shape for name, shape in shapes.items()})


def gpt2_tokenizer(path, texts=("user assistant system",)):
    """A byte-level BPE without our special tokens, with one of its own: 257 tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=257, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(path))
    return path


def same_weights(one, other):
    """The names of the parameters that are bit for bit alike."""
    others = dict(other.named_parameters())
    assert others.keys() == dict(one.named_parameters()).keys()
    return [name for name, p in one.named_parameters() if torch.equal(p, others[name])]


def assert_same_weights(one, other):
    assert same_weights(one, other) == [name for name, _ in one.named_parameters()]


def refused(read, *words):
    """Reading must raise a ValueError of one line that holds these words."""
    with pytest.raises(ValueError) as error:
        read()
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert str(word) in message


# --- our own folder --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("tied_head", [True, False])
def test_a_saved_model_reads_back_bit_for_bit(tokenizer, tmp_path, tied_head):
    model = uneven_model(tokenizer, tied_head)
    model.save_pretrained(tmp_path, tokenizer)
    loaded = LlavaMini.from_pretrained(tmp_path)
    assert loaded.config == model.config
    assert_same_weights(loaded, model)


def test_a_head_that_was_tied_is_tied_again(saved):
    decoder = LlavaMini.from_pretrained(saved[1]).decoder
    assert decoder.lm_head.weight is decoder.wte.weight


def test_saving_makes_the_folders_on_its_way_and_replaces_what_was_there(tokenizer, tmp_path):
    folder = tmp_path / "runs" / "first"
    uneven_model(tokenizer, tied_head=False).save_pretrained(folder, tokenizer)
    model = uneven_model(tokenizer)
    model.save_pretrained(folder, tokenizer)
    assert_same_weights(LlavaMini.from_pretrained(folder), model)


def test_saving_leaves_the_model_as_it_is(tokenizer, tmp_path):
    model, same = uneven_model(tokenizer), uneven_model(tokenizer)
    model.save_pretrained(tmp_path, tokenizer)
    assert_same_weights(model, same)
    assert all(p.requires_grad for p in model.parameters())
    assert model.decoder.lm_head.weight is model.decoder.wte.weight


def test_loaded_weights_can_be_trained(saved):
    assert all(p.requires_grad and p.is_leaf for p in LlavaMini.from_pretrained(saved[1]).parameters())


def test_the_folder_holds_these_files_and_no_others(saved):
    assert {path.name for path in saved[1].iterdir()} == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "preprocessor_config.json",
        "processor_config.json",
        "generation_config.json",
    }


def test_the_config_says_what_the_model_is(tokenizer, tmp_path):
    uneven_model(tokenizer).save_pretrained(tmp_path, tokenizer)
    config, end = json.loads((tmp_path / "config.json").read_text()), tokenizer.token_to_id(data.IM_END)
    vision, text = config.pop("vision_config"), config.pop("text_config")
    assert config == {
        "model_type": "llava",
        "architectures": ["LlavaForConditionalGeneration"],
        "projector_hidden_act": "gelu",
        "vision_feature_select_strategy": "default",
        "vision_feature_layer": -1,
        "image_token_index": tokenizer.token_to_id(data.IMAGE_TOKEN),
        "image_seq_length": 9,
        "tie_word_embeddings": False,
    }
    sizes = {"image_size": 24, "patch_size": 8, "hidden_size": 20, "num_hidden_layers": 1, "num_attention_heads": 5}
    kind = {"model_type": "clip_vision_model", "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "num_channels": 3}
    assert vision == sizes | kind | {"intermediate_size": 80}
    sizes = {"vocab_size": tokenizer.get_vocab_size(), "n_positions": 48, "n_embd": 18, "n_layer": 2, "n_head": 3}
    computed = {"model_type": "gpt2", "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5}
    # Fields that only say what transformers does anyway may come and go.
    assert (
        text.items()
        >= (sizes | computed | {"tie_word_embeddings": False, "bos_token_id": end, "eos_token_id": end}).items()
    )


def test_the_tokenizer_in_the_folder_is_the_models_own(tokenizer, saved):
    text = f"{data.IM_START}user\nHow many shapes?{data.IM_END}"
    loaded = data.load_tokenizer(saved[1] / "tokenizer.json")
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert data.words(loaded, text) == data.words(tokenizer, text)


def test_normalisation_and_image_token_are_written_and_not_left_to_defaults(saved):
    images = json.loads((saved[1] / "preprocessor_config.json").read_text())
    assert (images["image_mean"], images["image_std"]) == (list(data.IMAGE_MEAN), list(data.IMAGE_STD))
    assert json.loads((saved[1] / "processor_config.json").read_text())["image_token"] == data.IMAGE_TOKEN


def test_the_unused_last_norm_is_written_as_the_identity(saved):
    tensors = load_file(saved[1] / "model.safetensors")
    assert torch.equal(tensors["vision_tower.post_layernorm.weight"], torch.ones(24))
    assert torch.equal(tensors["vision_tower.post_layernorm.bias"], torch.zeros(24))


def test_the_weights_say_that_they_are_pytorchs(saved):
    with safe_open(saved[1] / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_everyone_may_read_the_files_whom_the_umask_lets(tokenizer, tmp_path):
    before = os.umask(0o022)
    try:
        uneven_model(tokenizer).save_pretrained(tmp_path, tokenizer)
    finally:
        os.umask(before)
    assert {path.name: oct(stat.S_IMODE(path.stat().st_mode)) for path in tmp_path.iterdir()} == {
        path.name: "0o644" for path in tmp_path.iterdir()
    }


# --- folders of others -----------------------------------------------------------------------------------------------
LAYOUTS = {
    "transformers 4": {
        "vision_tower.": "vision_tower.vision_model.",
        "language_model.model.": "language_model.transformer.",
    },
    "as in memory": {
        "vision_tower.": "model.vision_tower.vision_model.",
        "multi_modal_projector.": "model.multi_modal_projector.",
        "language_model.model.": "model.language_model.",
        "language_model.lm_head.": "lm_head.",
    },
}


@pytest.mark.parametrize("tied_head", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_names_that_other_versions_of_transformers_use_are_understood(tokenizer, tmp_path, layout, tied_head):
    model = uneven_model(tokenizer, tied_head)
    model.save_pretrained(tmp_path, tokenizer)

    def renamed(name):
        start = max((start for start in LAYOUTS[layout] if name.startswith(start)), key=len, default="")
        return LAYOUTS[layout].get(start, "") + name.removeprefix(start)

    rename(tmp_path, renamed)
    loaded = LlavaMini.from_pretrained(tmp_path)
    assert loaded.config == model.config
    assert_same_weights(loaded, model)


@pytest.mark.parametrize("layer", [-2, ABSENT], ids=["-2", "absent, which means -2"])
def test_a_block_behind_the_chosen_layer_is_not_built(saved, tokenizer, layer):
    model, folder = saved
    change_config(folder, "vision_feature_layer", layer)
    loaded = LlavaMini.from_pretrained(folder)
    assert loaded.config.vision.depth == len(loaded.vision.blocks) == 1
    assert loaded.config.text == model.config.text
    del model.vision.blocks[1]
    assert_same_weights(loaded, model)


def test_the_image_token_goes_by_two_names(saved):
    model, folder = saved
    change_config(folder, "image_token_index", ABSENT)
    change_config(folder, "image_token_id", 7)
    assert LlavaMini.from_pretrained(folder).config.image_token_id == 7
    change_config(folder, "image_token_index", 5)
    assert LlavaMini.from_pretrained(folder).config.image_token_id == 5


OPTIONAL = ["projector_hidden_act", "vision_feature_select_strategy", "vision_config.hidden_act"]
OPTIONAL += ["vision_config.layer_norm_eps", "vision_config.num_channels", "vision_config.intermediate_size"]
OPTIONAL += ["text_config.activation_function", "text_config.layer_norm_epsilon", "text_config.scale_attn_weights"]


def test_fields_that_older_files_leave_out_mean_what_transformers_takes_them_for(saved):
    model, folder = saved
    for field in OPTIONAL:
        change_config(folder, field, ABSENT)
    assert_same_weights(LlavaMini.from_pretrained(folder), model)


def test_a_width_of_the_mlp_that_is_spelled_out_is_accepted(saved):
    model, folder = saved
    change_config(folder, "text_config.n_inner", 4 * 32)
    assert_same_weights(LlavaMini.from_pretrained(folder), model)


def test_half_precision_weights_are_read_into_float32(saved):
    model, folder = saved
    change_tensors(folder, lambda tensors: {name: tensor.bfloat16() for name, tensor in tensors.items()})
    assert_same_weights(LlavaMini.from_pretrained(folder), model.bfloat16().float())


def test_weights_may_be_spread_over_several_files(saved):
    model, folder = saved
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    for i in range(3):
        shard = dict(list(tensors.items())[i::3])
        save_file(shard, folder / f"model-0000{i + 1}-of-00003.safetensors")
    assert_same_weights(LlavaMini.from_pretrained(folder), model)
    (folder / "model-00002-of-00003.safetensors").unlink()
    refused(lambda: LlavaMini.from_pretrained(folder), folder, "is missing")


def test_another_file_beside_the_weights_is_left_alone(saved):
    model, folder = saved[0], saved[1]
    tensors = {name: torch.full_like(tensor, 7.0) for name, tensor in load_file(folder / "model.safetensors").items()}
    for name in ("model_old.safetensors", "model-00001-of-00001.safetensors"):
        save_file(tensors, folder / name)
    assert_same_weights(LlavaMini.from_pretrained(folder), model)
    change_tensors(folder, lambda tensors: {name: tensors[name] for name in tensors if "wpe" not in name})
    refused(lambda: LlavaMini.from_pretrained(folder), folder, "tensor wpe.weight is missing")


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_a_file_of_the_folder_may_stand_for_the_folder(saved, file):
    model, folder = saved
    assert_same_weights(LlavaMini.from_pretrained(str(folder / file)), model)


# --- refusals --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("model_type", "llava_next", "model_type is 'llava_next', only 'llava' is supported"),
        ("model_type", ABSENT, "model_type is None, only 'llava' is supported"),
        ("projector_hidden_act", "relu", "projector_hidden_act is 'relu', only 'gelu' is supported"),
        ("vision_feature_select_strategy", "full", "vision_feature_select_strategy is 'full', only 'default'"),
        ("vision_feature_layer", 3, "vision_feature_layer is 3, only -1 and -2 are supported"),
        ("vision_feature_layer", 0, "vision_feature_layer is 0"),
        ("vision_feature_layer", 1, "vision_feature_layer is 1"),
        ("vision_feature_layer", -3, "vision_feature_layer is -3"),
        ("vision_feature_layer", [-2, -1], "vision_feature_layer is [-2, -1]"),
        ("image_token_index", ABSENT, "image_token_index"),
        ("vision_config", ABSENT, "model_type is None, only 'clip_vision_model' is supported"),
        ("vision_config.model_type", "siglip_vision_model", "model_type is 'siglip_vision_model'"),
        ("vision_config.hidden_act", "gelu", "hidden_act is 'gelu', only 'quick_gelu' is supported"),
        ("vision_config.layer_norm_eps", 1e-6, "layer_norm_eps is 1e-06, only 1e-05 is supported"),
        ("vision_config.num_channels", 1, "num_channels is 1, only 3 is supported"),
        ("text_config", ABSENT, "model_type is None, only 'gpt2' is supported"),
        ("text_config.model_type", "llama", "model_type is 'llama', only 'gpt2' is supported"),
        ("text_config.activation_function", "relu", "activation_function is 'relu', only 'gelu_new'"),
        ("text_config.layer_norm_epsilon", 1e-6, "layer_norm_epsilon is 1e-06, only 1e-05 is supported"),
        ("text_config.scale_attn_weights", False, "scale_attn_weights is False, only True is supported"),
        ("text_config.scale_attn_by_inverse_layer_idx", True, "scale_attn_by_inverse_layer_idx is True, only False"),
        ("text_config.n_head", 5, "width 32 does not divide by 5 heads"),
        ("text_config.n_layer", 3, "h.2.ln_1.weight is missing"),
        ("text_config.n_positions", 64, "wpe.weight is of shape (128, 32), not (64, 32)"),
    ],
)
def test_a_config_of_what_this_model_does_not_compute_is_refused(saved, field, value, message):
    change_config(saved[1], field, value)
    refused(lambda: LlavaMini.from_pretrained(saved[1]), message)


@pytest.mark.parametrize("value", [ABSENT, None, "24", 1.5], ids=["absent", "null", "text", "fraction"])
@pytest.mark.parametrize(
    "field",
    [
        f"vision_config.{n}"
        for n in ("image_size", "patch_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
    ]
    + [f"text_config.{n}" for n in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")],
)
def test_a_size_that_is_no_whole_number_is_named(saved, field, value):
    change_config(saved[1], field, value)
    refused(lambda: LlavaMini.from_pretrained(saved[1]), saved[1], f"'{field.split('.')[1]}'")


def test_every_tensor_is_needed_and_missed_by_its_name(tokenizer, tmp_path):
    uneven_model(tokenizer, tied_head=False).save_pretrained(tmp_path, tokenizer)
    tensors = load_file(tmp_path / "model.safetensors")
    needed = [name for name in tensors if "post_layernorm" not in name]
    for name in needed:
        save_file({n: t for n, t in tensors.items() if n != name}, tmp_path / "model.safetensors")
        refused(lambda: LlavaMini.from_pretrained(tmp_path), tmp_path, f"tensor {llava_mini.plain(name)} is missing")


@pytest.mark.parametrize(
    ("name", "change", "shapes"),
    [
        ("multi_modal_projector.linear_1.weight", lambda t: t.T, "(24, 32), not (32, 24)"),
        ("vision_tower.encoder.layers.0.mlp.fc1.weight", lambda t: t[:95], "(95, 24), not (96, 24)"),
        ("language_model.model.h.1.mlp.c_fc.weight", lambda t: t.T, "(128, 32), not (32, 128)"),
        ("vision_tower.encoder.layers.0.self_attn.k_proj.bias", lambda t: t[:1], "(1,), not (24,)"),
        ("vision_tower.embeddings.position_embedding.weight", lambda t: t[1:], "(4, 24), not (5, 24)"),
        ("language_model.model.wpe.weight", lambda t: t[:1], "(1, 32), not (128, 32)"),
    ],
)
def test_a_tensor_of_another_shape_is_refused_even_where_it_would_broadcast(saved, name, change, shapes):
    change_tensors(saved[1], lambda tensors: tensors | {name: change(tensors[name]).contiguous()})
    refused(
        lambda: LlavaMini.from_pretrained(saved[1]), saved[1], f"tensor {llava_mini.plain(name)} is of shape {shapes}"
    )


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_a_folder_without_a_checkpoint_is_refused(saved, file):
    (saved[1] / file).unlink()
    refused(lambda: LlavaMini.from_pretrained(saved[1]), saved[1], "needs config.json and model.safetensors")


def test_pickled_weights_are_not_weights(saved):
    (saved[1] / "model.safetensors").rename(saved[1] / "pytorch_model.bin")
    refused(lambda: LlavaMini.from_pretrained(saved[1]), saved[1], "needs config.json and model.safetensors")


@pytest.mark.parametrize(
    ("file", "message"), [("config.json", "not valid JSON"), ("model.safetensors", "damaged file")]
)
def test_a_damaged_file_is_named(saved, file, message):
    path = saved[1] / file
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    refused(lambda: LlavaMini.from_pretrained(saved[1]), path, message)


def test_each_loader_refuses_the_folders_of_the_others(saved, tmp_path):
    clip, gpt2 = clip_folder(tmp_path / "clip")[0], gpt2_folder(tmp_path / "gpt2")[0]
    refused(lambda: load_vision(gpt2), gpt2, "model_type is 'gpt2', only 'clip_vision_model' is supported")
    refused(lambda: load_decoder(clip, 257), clip, "model_type is 'clip', only 'gpt2' is supported")
    refused(lambda: load_decoder(saved[1], 257), saved[1], "model_type is 'llava', only 'gpt2' is supported")
    refused(lambda: LlavaMini.from_pretrained(gpt2), gpt2, "model_type is 'gpt2', only 'llava' is supported")


def test_a_pretrained_part_that_lacks_a_tensor_is_refused(tmp_path):
    for folder, name, load in (
        (clip_folder(tmp_path / "clip")[0], "encoder.layers.1.self_attn.v_proj.bias", load_vision),
        (gpt2_folder(tmp_path / "gpt2")[0], "h.1.attn.c_attn.bias", lambda folder: load_decoder(folder, 257)),
        (gpt2_folder(tmp_path / "no words")[0], "wte.weight", lambda folder: load_decoder(folder, 257)),
    ):
        change_tensors(folder, lambda tensors, name=name: {n: t for n, t in tensors.items() if not n.endswith(name)})
        refused(lambda load=load, folder=folder: load(folder), folder, f"tensor {name} is missing")


def test_a_decoder_whose_head_is_not_its_embedding_is_refused(tmp_path):
    folder, tensors = gpt2_folder(tmp_path / "gpt2")
    change_config(folder, "tie_word_embeddings", True)
    assert torch.equal(load_decoder(folder, 257)[1].lm_head.weight, tensors["wte.weight"])
    change_config(folder, "tie_word_embeddings", False)
    refused(lambda: load_decoder(folder, 257), folder, "tie_word_embeddings is False, only True is supported")


def test_a_tensor_is_found_by_its_whole_name_before_its_plain_one():
    """A fork may name a layer `transformer`: a run file holds names as they are."""
    view, found = torch.zeros(1), {"model/transformer.weight": torch.ones(1), "model/weight": torch.full((1,), 2.0)}
    llava_mini.read_tensors([("model/transformer.weight", view)], found, "here")
    assert view.item() == 1


# --- pretrained parts ------------------------------------------------------------------------------------------------
def test_clips_vision_tower_loads_without_its_last_block(tmp_path):
    folder, tensors = clip_folder(tmp_path / "clip", depth=3)
    config, vit = load_vision(folder)
    assert config == ViTConfig(IMAGE_SIZE, PATCH_SIZE, width=24, depth=2, heads=2)
    assert len(vit.blocks) == 2
    expected = {
        "class_embed": "embeddings.class_embedding",
        "patch_embed.weight": "embeddings.patch_embedding.weight",
        "pos_embed.weight": "embeddings.position_embedding.weight",
        "ln_pre.weight": "pre_layrnorm.weight",
        "ln_pre.bias": "pre_layrnorm.bias",
    }
    for i in range(2):
        for kind in ("weight", "bias"):
            names = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn_out": "self_attn.out_proj"}
            for ours, theirs in (names | {"mlp_in": "mlp.fc1", "mlp_out": "mlp.fc2"}).items():
                expected[f"blocks.{i}.{ours}.{kind}"] = f"encoder.layers.{i}.{theirs}.{kind}"
            parts = [tensors[f"vision_model.encoder.layers.{i}.self_attn.{x}_proj.{kind}"] for x in "qkv"]
            assert torch.equal(vit.get_parameter(f"blocks.{i}.qkv.{kind}"), torch.cat(parts))
    for ours, theirs in expected.items():
        assert torch.equal(vit.get_parameter(ours), tensors[f"vision_model.{theirs}"]), ours
    assert {n for n, _ in vit.named_parameters() if "qkv" not in n} == set(expected)


def test_the_folder_of_a_vision_tower_alone_loads_too(tmp_path):
    folder, _ = clip_folder(tmp_path / "clip")
    config, vit = load_vision(folder)
    (folder / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text())["vision_config"]))
    rename(folder, lambda name: name.removeprefix("vision_model."))
    alone, same = load_vision(folder / "model.safetensors")
    assert alone == config
    assert_same_weights(same, vit)


@pytest.mark.parametrize("load", [load_vision, LlavaMini.from_pretrained])
@pytest.mark.parametrize(("depth", "layer"), [(1, -2), (2, -3), (2, None), (2, "x")])
def test_a_layer_that_is_not_there_or_not_supported_is_refused(tokenizer, tmp_path, load, depth, layer):
    random_model(tokenizer.get_vocab_size(), 2, depth=depth).save_pretrained(tmp_path, tokenizer)
    change_config(tmp_path, "vision_feature_layer", layer)
    refused(lambda: load(tmp_path), tmp_path, f"vision_feature_layer is {layer!r}, only -1 and -2 are supported")


def test_a_llava_folder_gives_its_vision_tower_with_every_block_that_it_uses(saved):
    model, folder = saved
    config, vit = load_vision(folder)
    assert config == model.config.vision
    assert_same_weights(vit, model.vision)


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_gpt2_loads_with_its_matrices_turned_round(tmp_path, prefix):
    folder, tensors = gpt2_folder(tmp_path / "gpt2", prefix=prefix)
    config, gpt = load_decoder(folder, 257)
    assert config == GPTConfig(257, block_size=128, width=32, depth=2, heads=4, tied_head=True)
    expected = {n: n for n in ("wte.weight", "wpe.weight", "ln_f.weight", "ln_f.bias")}
    names = {"ln_1": "ln_1", "ln_2": "ln_2", "qkv": "attn.c_attn", "attn_out": "attn.c_proj"}
    for i in range(2):
        for ours, theirs in (names | {"mlp_in": "mlp.c_fc", "mlp_out": "mlp.c_proj"}).items():
            expected[f"blocks.{i}.{ours}.bias"] = f"h.{i}.{theirs}.bias"
            expected[f"blocks.{i}.{ours}.weight"] = f"h.{i}.{theirs}.weight"
    for ours, theirs in expected.items():
        theirs = tensors[prefix + theirs]
        turned = theirs.T if ".blocks." in f".{ours}" and theirs.ndim == 2 else theirs
        assert torch.equal(gpt.get_parameter(ours), turned), ours
    assert {n for n, _ in gpt.named_parameters()} == set(expected)
    assert gpt.lm_head.weight is gpt.wte.weight


def test_words_added_to_the_vocabulary_start_at_the_mean_of_the_old_ones(tmp_path):
    folder, tensors = gpt2_folder(tmp_path / "gpt2", vocab_size=257)
    config, gpt = load_decoder(folder, 260)
    assert config.vocab_size == 260
    assert torch.equal(gpt.wte.weight[:257], tensors["wte.weight"])
    assert torch.equal(gpt.wte.weight[257:], tensors["wte.weight"].mean(0).expand(3, 32))
    assert gpt.lm_head.weight is gpt.wte.weight


def test_a_vocabulary_larger_than_the_tokenizers_is_kept(tmp_path):
    folder, tensors = gpt2_folder(tmp_path / "gpt2", vocab_size=257)
    config, gpt = load_decoder(folder, 250)
    assert config.vocab_size == 257
    assert torch.equal(gpt.wte.weight, tensors["wte.weight"])


# --- replacing a file ------------------------------------------------------------------------------------------------
def full_disk(path):
    path.write_text("half")
    raise OSError(28, "No space left on device")


def full_disk_of_safetensors(path):
    path.write_text("half")
    raise SafetensorError("No space left on device")


def refuse_at_once(path):
    raise OSError("No space left on device")


@pytest.mark.parametrize("write", [full_disk, full_disk_of_safetensors, refuse_at_once])
def test_a_write_that_fails_leaves_the_old_file_whole_and_nothing_beside_it(tmp_path, write):
    path = tmp_path / "weights"
    path.write_text("the old ones")
    with pytest.raises(OSError) as error:
        replace_file(path, write)
    assert f"{path} can't be written" in str(error.value)
    assert "No space left on device" in str(error.value)
    assert path.read_text() == "the old ones"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_in_a_folder_that_does_not_exist_is_named(tmp_path):
    path = tmp_path / "nowhere" / "weights"
    with pytest.raises(OSError) as error:
        replace_file(path, lambda temporary: temporary.write_text("new"))
    assert f"{path} can't be written" in str(error.value)


def test_the_old_file_stays_until_the_new_one_lies_on_the_disk(tmp_path, monkeypatch):
    path, events = tmp_path / "weights", []
    path.write_text("old")

    def write(temporary):
        assert temporary.parent == tmp_path and temporary != path
        events.append("write")
        temporary.write_text("new")

    def fsync(number, original=os.fsync):
        assert path.read_text() == "old"
        events.append("fsync")
        original(number)

    def move(source, target, original=os.replace):
        assert path.read_text() == "old"
        events.append("replace")
        original(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", move)
    replace_file(path, write)
    assert events == ["write", "fsync", "replace"]
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_model_survives_a_disk_that_fills_up_while_another_is_saved(saved, tokenizer, monkeypatch):
    model, folder = saved
    monkeypatch.setattr(llava_mini, "save_file", lambda tensors, path, metadata: full_disk(path))
    with pytest.raises(OSError, match="model.safetensors can't be written"):
        random_model(tokenizer.get_vocab_size(), 2, seed=1).save_pretrained(folder, tokenizer)
    assert not list(folder.glob("*.tmp"))
    assert_same_weights(LlavaMini.from_pretrained(folder), model)


# --- no pickle -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("source", ["llava_mini.py", "data.py", "train.py"])
def test_the_sources_neither_pickle_nor_unpickle(source):
    nodes = list(ast.walk(ast.parse((ROOT / source).read_text(encoding="utf-8"))))
    imported = {alias.name for node in nodes if isinstance(node, (ast.Import, ast.ImportFrom)) for alias in node.names}
    imported |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    assert not imported & {"pickle", "dill", "joblib", "marshal", "shelve"}
    called = {
        f"{node.value.id}.{node.attr}"
        for node in nodes
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
    }
    assert "torch.tensor" in called or source == "train.py"
    assert not called & {"torch.load", "torch.save", "torch.package", "torch.jit"}


# --- training from folders -------------------------------------------------------------------------------------------
@pytest.fixture
def run_train(capsys):
    """Train in this process, in which importing torch's optimisers costs nothing any more; -> what was printed."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def run(*args):
        train.train(arguments(*args, "--device", "cpu", "--workers", 0))
        return capsys.readouterr().out

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Arguments of a short training from a CLIP and a GPT-2 folder, on two records with a picture and two without."""
    folder = tmp_path_factory.mktemp("parts")
    clip_folder(folder / "clip")
    gpt2_folder(folder / "gpt2")
    gpt2_tokenizer(folder / "tokenizer.json")
    # In bytes both kinds are equally long: sorting by length does not part them, each step sees all four.
    kinds = ({"question": "What is this text?"}, {"question": "What is this?", "images": 1})
    records = [record(**kinds[i % 2], seed=i) for i in range(4)]
    for r in records:
        for image in r.get("image", []):
            image.save(folder / f"{r['id']}.png")
            r["image"] = f"{r['id']}.png"
    (folder / "data.json").write_text(json.dumps(records))
    taught = ["--data", folder / "data.json", "--images", folder, "--steps", 2, "--batch-size", 4]
    pretrained = ["--vision", folder / "clip", "--decoder", folder / "gpt2", "--tokenizer", folder / "tokenizer.json"]
    return folder, taught, pretrained


def arguments(*args):
    return train.arguments().parse_args([str(arg) for arg in args])


def test_a_model_is_built_around_pretrained_parts(parts):
    folder, _, pretrained = parts
    model, tokenizer = train.build(arguments(*pretrained, "--width", 8, "--depth", 1))
    config, vit = load_vision(folder / "clip")
    assert model.config.vision == config
    assert_same_weights(model.vision, vit)
    config, gpt = load_decoder(folder / "gpt2", 260)
    assert model.config.text == config
    assert_same_weights(model.decoder, gpt)
    assert tokenizer.get_vocab_size() == 260
    assert model.config.image_token_id == tokenizer.token_to_id(data.IMAGE_TOKEN) >= 257
    assert torch.isfinite(model(**batch(tokenizer, 0, 1, 2))[1])


@pytest.mark.parametrize("part", ["vision", "decoder"])
def test_one_pretrained_part_is_joined_to_a_new_one(parts, part):
    _, _, pretrained = parts
    pretrained = pretrained[2:] if part == "decoder" else pretrained[:2] + pretrained[4:]
    new = ["--width", 8, "--depth", 1, "--heads", 2, "--image-size", IMAGE_SIZE, "--block-size", 64]
    model, tokenizer = train.build(arguments(*pretrained, *new))
    assert model.config.vision.width == (24 if part == "vision" else 8)
    assert model.config.text.width == (32 if part == "decoder" else 8)
    assert torch.isfinite(model(**batch(tokenizer, 0, 1, 2))[1])


def test_a_decoders_own_tokenizer_is_taken_where_no_other_is_named(parts, tmp_path):
    gpt2_folder(tmp_path / "gpt2")
    gpt2_tokenizer(tmp_path / "gpt2" / "tokenizer.json")
    _, tokenizer = train.build(arguments("--decoder", tmp_path / "gpt2"))
    assert tokenizer.get_vocab_size() == 260
    assert tokenizer.token_to_id("<|endoftext|>") is not None


def trained_parts(folder):
    return {name.split("/")[1].split(".")[0] for name in load_file(folder / "run.safetensors") if "optimizer/" in name}


def test_train_py_starts_from_pretrained_folders(parts, tmp_path):
    _, taught, pretrained = parts
    command = [sys.executable, ROOT / "train.py", "--out", tmp_path / "out", *taught, *pretrained]
    command = [str(word) for word in (*command, "--device", "cpu", "--workers", 0)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert "images encoded 4 of 8 slots" in done.stdout
    assert trained_parts(tmp_path / "out") == {"vision", "projector", "decoder"}
    config = LlavaMini.from_pretrained(tmp_path / "out").config
    assert (config.vision.depth, config.text.vocab_size) == (2, 260)
    assert {path.suffix for path in (tmp_path / "out").iterdir()} == {
        ".safetensors",
        ".json",
        ".jsonl",
        ".jinja",
        ".png",
    }


def test_stage_1_trains_the_projector_alone(parts, tmp_path, run_train):
    folder, taught, pretrained = parts
    said = run_train("--out", tmp_path, *taught, *pretrained, "--freeze", "vision", "decoder")
    assert "2 text-only records dropped: with a frozen decoder they have nothing to teach" in said
    assert trained_parts(tmp_path) == {"projector"}
    model, start = LlavaMini.from_pretrained(tmp_path), train.build(arguments(*taught, *pretrained))[0]
    assert_same_weights(model.vision, load_vision(folder / "clip")[1])
    assert_same_weights(model.decoder, load_decoder(folder / "gpt2", 260)[1])
    assert not same_weights(model.projector, start.projector)


def test_stage_2_goes_on_from_stage_1_and_leaves_the_vision_encoder_bit_for_bit(parts, tmp_path, run_train):
    _, taught, pretrained = parts
    start, tokenizer = train.build(arguments(*taught, *pretrained))
    start.save_pretrained(tmp_path / "one", tokenizer)
    said = run_train("--out", tmp_path / "two", *taught, "--init", tmp_path / "one", "--freeze", "vision")
    assert "dropped" not in said
    assert trained_parts(tmp_path / "two") == {"projector", "decoder"}
    model = LlavaMini.from_pretrained(tmp_path / "two")
    assert_same_weights(model.vision, start.vision)
    assert not same_weights(model.projector, start.projector)
    assert not same_weights(model.decoder, start.decoder)
    same = data.load_tokenizer(tmp_path / "two" / "tokenizer.json")
    assert same.get_vocab() == tokenizer.get_vocab()
