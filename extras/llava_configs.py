"""
The small files of a folder that transformers opens: config.json, and what prepares the input.
to_transformers.py writes them.
"""

from tokenizers import Tokenizer, processors

import data
from extras.llama import Sizes
from extras.their_configs import (
    GPT2_FIXED,
    GPT2_SIZES,
    LLAMA_MORE,
    LLAMA_SIZES,
    SIGLIP_FIXED,
    SIGLIP_SIZES,
)


def in_their_words(table, ours):
    """-> {their field: the value of ours}"""
    return {theirs: ours[name] for theirs, (name, _) in table.items()}


def vision_config(config):
    siglip = SIGLIP_FIXED | in_their_words(SIGLIP_SIZES, vars(config))
    if config.vision_mlp_width is None:
        siglip["intermediate_size"] = 4 * config.vision_width
    return siglip | {"vision_use_head": False}


def text_config(config):
    if not config.llama:
        return {
            **GPT2_FIXED,
            **in_their_words(GPT2_SIZES, vars(config)),
            "resid_pdrop": 0.0,  # no dropout, as here, also if somebody trains it there
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
            # LLaVA ties Llama's tables and finds none by that name in a GPT-2.
            "tie_word_embeddings": False,
        }
    sizes = Sizes(**config.llama)
    rope = {"rope_type": "default", "rope_theta": sizes.rope_theta}
    if sizes.rope_scaling:
        rope |= {"rope_type": "llama3"} | sizes.rope_scaling
    return {
        "model_type": "qwen2" if sizes.qkv_bias else "llama",
        "hidden_act": "silu",
        **in_their_words(LLAMA_SIZES, vars(config)),
        **in_their_words(LLAMA_MORE, vars(sizes)),
        "rms_norm_eps": sizes.norm_eps,
        "rope_parameters": rope,
        "tie_word_embeddings": sizes.tied,
    }


def llava_config(config, begin, end):
    """`begin` and `end` are ids of tokens, or None. There is no pad_token_id: transformers would
    take the gradient from that word."""
    text = text_config(config) | {"bos_token_id": begin, "eos_token_id": end}
    return {
        "model_type": "llava",
        "architectures": ["LlavaForConditionalGeneration"],
        "dtype": "float32",
        "image_token_index": config.image_token_id,
        "image_seq_length": config.image_tokens,
        "projector_hidden_act": "gelu",
        "tie_word_embeddings": text["tie_word_embeddings"],
        "vision_feature_layer": -1,  # hidden_states[-1], which is before the last norm
        "vision_feature_select_strategy": "full",  # SigLIP has no class token to cut off
        "vision_config": vision_config(config),
        "text_config": text,
    }


# ---- what prepares the input --------------------------------------------------------------------

# The ChatML of data.encode. Hyphens take away the white space around a tag.
CHAT_TEMPLATE = r"""
{{- bos_token -}}
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


def without_begin(tokenizer):
    """-> one that puts nothing before a text. The template does: transformers and servers add no
    token to what a template made, or a second one, as it comes."""
    if not tokenizer.encode("").ids:
        return tokenizer
    tokenizer = Tokenizer.from_str(tokenizer.to_str())
    tokenizer.post_processor = processors.TemplateProcessing("$A", None, [])
    return tokenizer


def tokenizer_config(config, begin):
    """`begin` is the word that begins a sample, or None."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config.block_size,
        "bos_token": begin,
        "eos_token": data.IM_END,
        # Prompts of a batch end together. And collators hide what is padding from the loss: that
        # may not be the end of an answer, and this token stands in no answer.
        "padding_side": "left",
        "pad_token": data.IM_START,
        "extra_special_tokens": {"image_token": data.IMAGE_TOKEN},
    }


def image_config(config):
    size = config.image_size
    return {
        "image_processor_type": "SiglipImageProcessor",
        "size": {"height": size, "width": size},
        "resample": 3,  # bicubic, as in data.letterbox
        "image_mean": [0.5, 0.5, 0.5],  # v / 127.5 - 1
        "image_std": [0.5, 0.5, 0.5],
    }


def processor_config(config):
    return {
        "processor_class": "LlavaProcessor",
        "image_token": data.IMAGE_TOKEN,
        "patch_size": config.patch_size,
        "vision_feature_select_strategy": "full",
        "num_additional_image_tokens": 0,
    }


def generation_config(config, end):
    return {
        "eos_token_id": end,
        # Rows that have ended go on with their end, as in `stream`. Another token here would be
        # taken for padding wherever it stands, if somebody generates without an attention mask.
        "pad_token_id": end,
        "suppress_tokens": [config.image_token_id],  # `stream` draws none either
    }


def all_of(config, tokenizer):
    """-> {file name: content}"""
    end = tokenizer.token_to_id(data.IM_END)
    begin = word = None
    for begin in tokenizer.encode("").ids:  # one at most
        word = tokenizer.id_to_token(begin)
    return {
        "config.json": llava_config(config, begin, end),
        "generation_config.json": generation_config(config, end),
        "tokenizer_config.json": tokenizer_config(config, word),
        "preprocessor_config.json": image_config(config),
        "processor_config.json": processor_config(config),
    }
