"""
Real weights: SigLIP and GPT-2, as they lie on the hub, become a folder for `train.py --init`.

$ python extras/pretrained.py --vision siglip-base-patch16-224 --decoder gpt2 --out start
$ python train.py --init start --freeze vision decoder --lr 1e-3 --data train.json --images photos

--vision wants config.json and model.safetensors, of a whole SigLIP or of its vision part alone.
--decoder wants tokenizer.json beside them. Both are folders on this machine: nothing is fetched.

Our blocks compute what SigLIP's and GPT-2's do, up to SigLIP's last norm. A config.json that says
otherwise is refused. The projector between the two is new.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
from llava_mini import Config, LlavaMini

# ---- two layouts of the same weights ------------------------------------------------------------

# In the names of our tensors, left becomes right. `to_transformers.py` reads the same tables.
SIGLIP_NAMES = {
    "patch_embed": "embeddings.patch_embedding",
    "pos_embed": "embeddings.position_embedding.weight",
    "blocks": "encoder.layers",
    "ln_": "layer_norm",
    "attention.qkv": "self_attn.{}_proj",
    "attention.out": "self_attn.out_proj",
    "mlp.0": "mlp.fc1",
    "mlp.2": "mlp.fc2",
}
GPT2_NAMES = {
    "blocks": "h",
    "attention.qkv": "attn.c_attn",
    "attention.out": "attn.c_proj",
    "mlp.0": "mlp.c_fc",
    "mlp.2": "mlp.c_proj",
}


def in_their_layout(part, names):
    """Yield (their name, our tensor as they shape it) for all tensors of a part of the model.

    The tensors are views: what is copied into them, our part has.
    """
    for name, tensor in part.state_dict().items():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)

        if names is GPT2_NAMES and name.startswith("h.") and tensor.ndim == 2:
            tensor = tensor.T  # GPT-2 stores its layers as (in, out)

        if "{}" in name:  # SigLIP stores queries, keys and values apart
            for letter, third in zip("qkv", tensor.chunk(3)):
                yield name.format(letter), third
        else:
            yield name, tensor


# ---- their config.json --------------------------------------------------------------------------

# What our blocks compute, in their words.
SIGLIP_FIXED = {
    "model_type": "siglip_vision_model",
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
    "num_channels": 3,
}
GPT2_FIXED = {
    "model_type": "gpt2",
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
}

# A config.json may leave out what is as in these, the base models.
SIGLIP_SIZES = {
    "image_size": 224,
    "patch_size": 16,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
}
GPT2_SIZES = {
    "vocab_size": 50257,
    "n_positions": 1024,
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
}


def check_config(folder, config, needed):
    for field, value in needed.items():
        found = config.get(field, value)
        if found != value:
            raise ValueError(f"{folder}/config.json: {field} is {found!r}, but we have {value!r}")


# ---- folders -> model ---------------------------------------------------------------------------


def read_folder(folder, prefix):
    """-> (config, {name without the prefix: tensor}). Raises OSError or ValueError."""
    folder = Path(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    file = folder / "model.safetensors"
    try:
        tensors = load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file}: is the download complete? {error}") from error
    return config, {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


def fill(part, names, tensors, folder, old_words=None):
    """Copy their tensors into a part of the model. Raises ValueError naming the tensor."""
    for name, ours in in_their_layout(part, names):
        if name == "wte.weight":
            ours = ours[:old_words]
        if name not in tensors:
            raise ValueError(f"{folder}: tensor {name} is missing")
        found, needed = tuple(tensors[name].shape), tuple(ours.shape)
        if found != needed:
            raise ValueError(f"{folder}: tensor {name} is {found}, but we need {needed}")
        ours.copy_(tensors[name])


def build(vision_folder, decoder_folder):
    """-> (model, tokenizer). Raises OSError or ValueError."""
    siglip, vision_tensors = read_folder(vision_folder, "vision_model.")
    if "vision_config" in siglip:
        check_config(vision_folder, siglip, {"model_type": "siglip"})
        siglip = siglip["vision_config"]
    check_config(vision_folder, siglip, SIGLIP_FIXED)
    siglip = SIGLIP_SIZES | siglip

    gpt2, decoder_tensors = read_folder(decoder_folder, "transformer.")
    check_config(decoder_folder, gpt2, GPT2_FIXED | {"tie_word_embeddings": True})
    gpt2 = GPT2_SIZES | gpt2

    tokenizer = data.load_tokenizer(f"{decoder_folder}/tokenizer.json")
    old_words = gpt2["vocab_size"]
    config = Config(
        vocab_size=max(old_words, tokenizer.get_vocab_size()),
        image_token_id=tokenizer.token_to_id(data.IMAGE_TOKEN),
        block_size=gpt2["n_positions"],
        image_size=siglip["image_size"],
        patch_size=siglip["patch_size"],
        width=gpt2["n_embd"],
        depth=gpt2["n_layer"],
        heads=gpt2["n_head"],
        vision_width=siglip["hidden_size"],
        vision_depth=siglip["num_hidden_layers"],
        vision_heads=siglip["num_attention_heads"],
    )
    model = LlavaMini(config)
    fill(model.vision, SIGLIP_NAMES, vision_tensors, vision_folder)
    fill(model.decoder, GPT2_NAMES, decoder_tensors, decoder_folder, old_words)

    # A new word begins as an average one: random rows could drown all others in the logits.
    words = model.decoder.wte.weight.data
    words[old_words:] = words[:old_words].mean(dim=0)
    return model, tokenizer


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vision", required=True, help="folder of a SigLIP")
    parser.add_argument("--decoder", required=True, help="folder of a GPT-2")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=0, help="of the new projector")
    args = parser.parse_args()
    if args.out.exists() and any(args.out.iterdir()):
        raise ValueError(f"{args.out} is not empty: choose another --out")

    torch.manual_seed(args.seed)
    model, tokenizer = build(args.vision, args.decoder)
    model.save(args.out)
    tokenizer.save(str(args.out / "tokenizer.json"))

    config = model.config
    print(f"{args.out}: an image takes {config.image_tokens} of {config.block_size} tokens")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"pretrained.py: {error}")
