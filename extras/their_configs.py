"""
Their config.json -> fields of our Config.

What would compute something else than our parts do is refused by the name of its field. What a
file leaves out, or has as null, is as transformers has it: configuration_siglip.py,
configuration_gpt2.py, configuration_llama.py, configuration_qwen2.py, and modeling_rope_utils.py
for positions that turn.
"""

import json
from pathlib import Path

# ---- what our parts compute, in their words -----------------------------------------------------

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
LLAMA_FIXED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "pretraining_tp": 1,
    "partial_rotary_factor": 1.0,
    "rope_interleaved": False,
    "qk_layer_norms": False,
}
QWEN2_FIXED = {
    "hidden_act": "silu",
    "partial_rotary_factor": 1.0,
    "use_mrope": False,
}

# ---- sizes: their field, ours, and what it is where the file leaves it out -----------------------

SIGLIP_SIZES = {
    "image_size": ("image_size", 224),
    "patch_size": ("patch_size", 16),
    "hidden_size": ("vision_width", 768),
    "intermediate_size": ("vision_mlp_width", 3072),
    "num_hidden_layers": ("vision_depth", 12),
    "num_attention_heads": ("vision_heads", 12),
}
GPT2_SIZES = {
    "vocab_size": ("vocab_size", 50257),
    "n_positions": ("block_size", 1024),
    "n_embd": ("width", 768),
    "n_layer": ("depth", 12),
    "n_head": ("heads", 12),
}
LLAMA_SIZES = {
    "vocab_size": ("vocab_size", 32000),
    "max_position_embeddings": ("block_size", 2048),
    "hidden_size": ("width", 4096),
    "num_hidden_layers": ("depth", 32),
    "num_attention_heads": ("heads", 32),
}
QWEN2_SIZES = LLAMA_SIZES | {
    "vocab_size": ("vocab_size", 151936),
    "max_position_embeddings": ("block_size", 32768),
}
LLAMA_MORE = {  # these go into Config.llama
    "num_key_value_heads": ("kv_heads", 32),
    "intermediate_size": ("mlp_width", 11008),
}
QWEN2_MORE = LLAMA_MORE | {"intermediate_size": ("mlp_width", 22016)}

# What `stretch` in llama.py takes.
LLAMA3_ROPE = {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}


# ---- reading ------------------------------------------------------------------------------------


def read(path):
    """A JSON object -> dict without what is null. Raises OSError or ValueError naming the file."""

    def without_null(pairs):
        return {name: value for name, value in pairs if value is not None}

    text = Path(path).read_text(encoding="utf-8")
    try:
        content = json.loads(text, object_pairs_hook=without_null)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object")
    return content


def check(folder, config, needed):
    for field, value in needed.items():
        found = config.get(field, value)
        if found != value:
            raise ValueError(f"{folder}/config.json: {field} is {found!r}, but we have {value!r}")


def sizes(folder, config, table):
    """-> {our field: whole number above 0}"""
    fields = {}
    for theirs, (ours, default) in table.items():
        value = fields[ours] = config.get(theirs, default)
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{folder}/config.json: {theirs} is {value!r}, no number from 1 on")
    return fields


def vision_fields(folder, config):
    """Of a whole SigLIP or of its vision part -> fields of our Config"""
    check(folder, config, {"quantization_config": None})
    if "vision_config" in config:
        check(folder, config, {"model_type": "siglip"})
        config = config["vision_config"]
    check(folder, config, SIGLIP_FIXED)
    fields = sizes(folder, config, SIGLIP_SIZES)
    # 384 pixels hold 27 patches of 14, and their convolution drops the rest: here they are 378.
    fields["image_size"] -= fields["image_size"] % fields["patch_size"]
    if fields["vision_mlp_width"] == 4 * fields["vision_width"]:
        fields["vision_mlp_width"] = None
    return fields


def decoder_fields(folder, config):
    """Of a GPT-2, Llama or Qwen2 -> fields of our Config"""
    check(folder, config, {"quantization_config": None})
    kind = config.get("model_type")
    if kind == "gpt2":
        check(folder, config, GPT2_FIXED | {"tie_word_embeddings": True})
        return sizes(folder, config, GPT2_SIZES)
    if kind == "llama":
        check(folder, config, LLAMA_FIXED)
        return llama_fields(folder, config, LLAMA_SIZES, LLAMA_MORE)
    if kind == "qwen2":
        check(folder, config, QWEN2_FIXED)
        if config.get("max_window_layers", 28) < config.get("num_hidden_layers", 32):
            check(folder, config, {"use_sliding_window": False})
        return llama_fields(folder, config, QWEN2_SIZES, QWEN2_MORE)
    known = "'gpt2', 'llama' and 'qwen2'"
    raise ValueError(f"{folder}/config.json: model_type is {kind!r}, but we have {known}")


def llama_fields(folder, config, table, more):
    """With those of extras/llama.py in the field `llama`"""
    fields = sizes(folder, config, table)
    check(folder, config, {"head_dim": fields["width"] // fields["heads"]})
    for kind in config.get("layer_types", []):
        check(folder, {"layer_types": kind}, {"layer_types": "full_attention"})

    is_qwen2 = table is QWEN2_SIZES
    if not is_qwen2:  # a Llama that says nothing shares no keys
        config = {"num_key_value_heads": fields["heads"]} | config
    theta, scaling = rope(folder, config, fields["block_size"])
    fields["llama"] = {
        **sizes(folder, config, more),
        "norm_eps": config.get("rms_norm_eps", 1e-6),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "qkv_bias": is_qwen2,
        "tied": config.get("tie_word_embeddings", False),
    }
    return fields


def rope(folder, config, block_size):
    """-> (theta, what Llama 3 changes or None). Older files have rope_theta, and all else in
    rope_scaling; newer ones have one field, rope_parameters."""
    field = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    found = {"rope_theta": config.get("rope_theta", 10_000.0)} | config.get(field, {})
    theta = found.pop("rope_theta")
    kind = found.pop("type", "default")  # the oldest name of the next
    kind = found.pop("rope_type", kind)
    check(folder, found, {"partial_rotary_factor": 1.0})
    found.pop("partial_rotary_factor", None)

    needed = set()
    if kind == "llama3":
        needed = LLAMA3_ROPE
        found.setdefault("original_max_position_embeddings", block_size)
    elif kind != "default":
        why = f"{field} is {kind!r}, but we have 'default' and 'llama3'"
        raise ValueError(f"{folder}/config.json: {why}")
    for name in sorted(found.keys() ^ needed):
        why = "is missing" if name in needed else "is nothing that we have"
        raise ValueError(f"{folder}/config.json: {field}.{name} {why}")
    return theta, found or None
