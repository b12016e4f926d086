"""
Out to transformers: a trained folder becomes one that LlavaForConditionalGeneration opens.

$ python extras/to_transformers.py out out-hf

The model is LLaVA with SigLIP and a GPT-2, Llama or Qwen2 as its parts. Logits agree up to
rounding. A model with other tensors than these is refused: transformers would begin what it misses
at random, and say so in a warning only.

The processor makes our input_ids, and our pixel_values for square pictures without transparency.
For the others the two differ: we lay the whole picture on a white square, SigLIP's processor
stretches it into the square and drops the transparency. Lay them on white yourself if it matters.

This file does not import transformers: it only writes what transformers reads.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
from extras import layouts, llava_configs
from llava_mini import LlavaMini


def tensors_of(model):
    """-> {name: tensor}, with the names that transformers itself gives them on disk."""
    parts = [
        ("vision_tower", model.vision, layouts.SIGLIP_NAMES),
        ("multi_modal_projector", model.projector, layouts.PROJECTOR_NAMES),
        ("language_model.model", model.decoder, layouts.decoder_names(model.config)),
    ]
    tensors = {}
    for prefix, part, names in parts:
        for name, tensor in layouts.in_their_layout(part, names):
            tensors[f"{prefix}.{name}"] = tensor

    head = tensors.pop("language_model.model.lm_head.weight", None)
    if not model.config.llama:  # LLaVA ties no GPT-2: it gets a copy
        head = model.decoder.wte.weight.detach()
    if head is not None:  # else it is tied, there as here
        tensors["language_model.lm_head.weight"] = head

    # SigLIP has a last norm, LLaVA takes the features before it. It must be there all the same.
    width = model.config.vision_width
    tensors["vision_tower.post_layernorm.weight"] = torch.ones(width)
    tensors["vision_tower.post_layernorm.bias"] = torch.zeros(width)

    # A file holds neither views nor one memory under two names.
    plain = torch.contiguous_format
    return {name: tensor.clone(memory_format=plain) for name, tensor in tensors.items()}


def export(model, tokenizer, folder):
    """Write the folder. Raises ValueError for a model that LLaVA is not, and writes nothing."""
    config, folder = model.config, Path(folder)
    layouts.check(model)
    if config.image_tokens != len(model.vision.pos_embed):
        raise ValueError("transformers' LLaVA has a token for each patch, this model has not")

    folder.mkdir(parents=True, exist_ok=True)
    for name, content in llava_configs.all_of(config, tokenizer).items():
        (folder / name).write_text(json.dumps(content, indent=2), encoding="utf-8")
    template = llava_configs.CHAT_TEMPLATE
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    llava_configs.without_begin(tokenizer).save(str(folder / "tokenizer.json"))
    save_file(tensors_of(model), folder / "model.safetensors", {"format": "pt"})


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="folder that train.py wrote")
    parser.add_argument("out", type=Path, help="folder to write")
    args = parser.parse_args()
    if args.out.exists() and any(args.out.iterdir()):
        raise ValueError(f"{args.out} is not empty: choose another folder")

    model = LlavaMini.load(args.model)
    tokenizer = data.load_tokenizer(f"{args.model}/tokenizer.json", model.config)
    export(model, tokenizer, args.out)
    print(f"{args.out}: open it with transformers' LlavaForConditionalGeneration")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"to_transformers.py: {error}")
