"""
Out to transformers: a trained folder becomes one that LlavaForConditionalGeneration opens.

$ python extras/to_transformers.py out out-hf

The model is LLaVA with SigLIP and GPT-2 as its parts. Logits agree up to rounding. The processor
makes our input_ids, and our pixel_values for square pictures without transparency. For the others
the two differ: we lay the whole picture on a white square, SigLIP's processor stretches it into
the square and drops the transparency. Lay them on white yourself if it matters.

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
from extras.pretrained import GPT2_FIXED, GPT2_NAMES, SIGLIP_FIXED, SIGLIP_NAMES, in_their_layout
from llava_mini import LlavaMini

# ---- tensors ------------------------------------------------------------------------------------

PROJECTOR_NAMES = {"0.": "linear_1.", "2.": "linear_2."}


def tensors_of(model):
    """-> {name: tensor}, with the names that transformers itself gives them on disk."""
    parts = [
        ("vision_tower", model.vision, SIGLIP_NAMES),
        ("multi_modal_projector", model.projector, PROJECTOR_NAMES),
        ("language_model.model", model.decoder, GPT2_NAMES),
    ]
    tensors = {}
    for prefix, part, names in parts:
        for name, tensor in in_their_layout(part, names):
            tensors[f"{prefix}.{name}"] = tensor

    # LLaVA finds no word embeddings to tie in a GPT-2, so the head is a copy of ours.
    tensors["language_model.lm_head.weight"] = model.decoder.wte.weight.detach()

    # SigLIP has a last norm, LLaVA takes the features before it. It must be there all the same.
    width = model.config.vision_width
    tensors["vision_tower.post_layernorm.weight"] = torch.ones(width)
    tensors["vision_tower.post_layernorm.bias"] = torch.zeros(width)

    # A file holds neither views nor one memory under two names.
    plain = torch.contiguous_format
    return {name: tensor.clone(memory_format=plain) for name, tensor in tensors.items()}


# ---- config.json --------------------------------------------------------------------------------


def config_of(model, end):
    config = model.config
    vision_config = SIGLIP_FIXED | {
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "hidden_size": config.vision_width,
        "intermediate_size": 4 * config.vision_width,
        "num_hidden_layers": config.vision_depth,
        "num_attention_heads": config.vision_heads,
        "vision_use_head": False,
    }
    text_config = GPT2_FIXED | {
        "vocab_size": config.vocab_size,
        "n_positions": config.block_size,
        "n_embd": config.width,
        "n_layer": config.depth,
        "n_head": config.heads,
        "bos_token_id": end,
        "eos_token_id": end,
        "resid_pdrop": 0.0,  # no dropout, as here, also if somebody trains it there
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "tie_word_embeddings": False,
    }
    return {
        "model_type": "llava",
        "architectures": ["LlavaForConditionalGeneration"],
        "dtype": "float32",
        "image_token_index": config.image_token_id,
        "image_seq_length": config.image_tokens,
        "projector_hidden_act": "gelu",
        "tie_word_embeddings": False,
        "vision_feature_layer": -1,  # hidden_states[-1], which is before the last norm
        "vision_feature_select_strategy": "full",  # SigLIP has no class token to cut off
        "vision_config": vision_config,
        "text_config": text_config,
    }


# ---- what prepares the input --------------------------------------------------------------------

# The ChatML of data.encode. Hyphens take away the white space around a tag.
CHAT_TEMPLATE = r"""
{%- for message in messages -%}
    {{- '<|im_start|>' + message.role + '\n' -}}
    {%- if message.content is string -%}
        {{- message.content -}}
    {%- else -%}
        {%- for part in message.content -%}
            {{- '<image>\n' if part.type == 'image' else part.text -}}
        {%- endfor -%}
    {%- endif -%}
    {{- '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\n' -}}
{%- endif -%}
"""


def processor_configs(config):
    """-> {file name: content}"""
    size = config.image_size
    tokenizer = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config.block_size,
        "eos_token": data.IM_END,
        "pad_token": data.IM_END,
        "extra_special_tokens": {"image_token": data.IMAGE_TOKEN},
    }
    images = {
        "image_processor_type": "SiglipImageProcessor",
        "size": {"height": size, "width": size},
        "resample": 3,  # bicubic, as in data.letterbox
        "image_mean": [0.5, 0.5, 0.5],  # v / 127.5 - 1
        "image_std": [0.5, 0.5, 0.5],
    }
    processor = {
        "processor_class": "LlavaProcessor",
        "image_token": data.IMAGE_TOKEN,
        "patch_size": config.patch_size,
        "vision_feature_select_strategy": "full",
        "num_additional_image_tokens": 0,
    }
    return {
        "tokenizer_config.json": tokenizer,
        "preprocessor_config.json": images,
        "processor_config.json": processor,
    }


# ---- python extras/to_transformers.py out out-hf ------------------------------------------------


def export(model, tokenizer, folder):
    """Write the folder. Raises ValueError for a model that LLaVA is not."""
    config, folder = model.config, Path(folder)
    if config.image_tokens != len(model.vision.pos_embed):
        raise ValueError("transformers' LLaVA has a token for each patch, this model has not")

    folder.mkdir(parents=True, exist_ok=True)
    end = tokenizer.token_to_id(data.IM_END)
    files = processor_configs(config)
    files["config.json"] = config_of(model, end)
    files["generation_config.json"] = {"eos_token_id": end, "pad_token_id": end}
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2), encoding="utf-8")

    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    tokenizer.save(str(folder / "tokenizer.json"))
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
    tokenizer = data.load_tokenizer(f"{args.model}/tokenizer.json")
    export(model, tokenizer, args.out)
    print(f"{args.out}: open it with transformers' LlavaForConditionalGeneration")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"to_transformers.py: {error}")
