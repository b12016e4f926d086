"""
The same weights twice: as our parts name and shape them, and as transformers does.

pretrained.py reads with these tables, to_transformers.py writes with them. The names and shapes of
the lesson's own parts stand here, too: a fork with another part is not exported as what it is not.
"""

from extras.llama import Sizes

# In the names of our tensors, left becomes right, one line after the other.
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
LLAMA_NAMES = {  # Qwen2's, too
    "wte": "embed_tokens",
    "blocks": "layers",
    "ln_1": "input_layernorm",
    "ln_2": "post_attention_layernorm",
    "ln_f": "norm",
    "attention.q.": "self_attn.q_proj.",
    "attention.k.": "self_attn.k_proj.",
    "attention.v.": "self_attn.v_proj.",
    "attention.out": "self_attn.o_proj",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}
PROJECTOR_NAMES = {"0.": "linear_1.", "2.": "linear_2."}  # LLaVA's


def decoder_names(config):
    return LLAMA_NAMES if config.llama else GPT2_NAMES


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


# ---- what our parts hold ------------------------------------------------------------------------
# Written out, and not asked of the classes: those are what a fork changes.


def linear(name, n_in, n_out, bias=True):
    shapes = {f"{name}.weight": (n_out, n_in)}
    if bias:
        shapes[f"{name}.bias"] = (n_out,)
    return shapes


def layer_norm(name, width):
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def block(width, hidden):
    """Of ViT and GPT."""
    return {
        **layer_norm("ln_1", width),
        **linear("attention.qkv", width, 3 * width),
        **linear("attention.out", width, width),
        **layer_norm("ln_2", width),
        **linear("mlp.0", width, hidden),
        **linear("mlp.2", hidden, width),
    }


def llama_block(config):
    C, sizes = config.width, Sizes(**config.llama)
    hidden, bias = sizes.mlp_width, sizes.qkv_bias
    shared = C // config.heads * sizes.kv_heads
    return {
        "ln_1.weight": (C,),
        **linear("attention.q", C, C, bias),
        **linear("attention.k", C, shared, bias),
        **linear("attention.v", C, shared, bias),
        **linear("attention.out", C, C, bias=False),
        "ln_2.weight": (C,),
        **linear("mlp.gate", C, hidden, bias=False),
        **linear("mlp.up", C, hidden, bias=False),
        **linear("mlp.down", hidden, C, bias=False),
    }


def under(prefix, shapes):
    return {f"{prefix}.{name}": shape for name, shape in shapes.items()}


def blocks(depth, shapes):
    every = {}
    for i in range(depth):
        every |= under(f"blocks.{i}", shapes)
    return every


def vision_shapes(config):
    D, patch = config.vision_width, config.patch_size
    hidden = config.vision_mlp_width or 4 * D
    return {
        "pos_embed": ((config.image_size // patch) ** 2, D),
        "patch_embed.weight": (D, 3, patch, patch),
        "patch_embed.bias": (D,),
        **blocks(config.vision_depth, block(D, hidden)),
    }


def projector_shapes(config):
    D, C = config.vision_width, config.width
    return linear("0", D, C) | linear("2", C, C)


def decoder_shapes(config):
    C, V = config.width, config.vocab_size
    if not config.llama:
        return {
            "wte.weight": (V, C),
            "wpe.weight": (config.block_size, C),
            **blocks(config.depth, block(C, 4 * C)),
            **layer_norm("ln_f", C),
        }
    shapes = {
        "wte.weight": (V, C),
        **blocks(config.depth, llama_block(config)),
        "ln_f.weight": (C,),
    }
    if not Sizes(**config.llama).tied:
        shapes["lm_head.weight"] = (V, C)
    return shapes


def known_shapes(config):
    """-> {name: shape} of all that a LlavaMini with this Config holds, when no part is changed"""
    return {
        **under("vision", vision_shapes(config)),
        **under("projector", projector_shapes(config)),
        **under("decoder", decoder_shapes(config)),
    }


def check(model):
    """Raises ValueError that names the first tensor that transformers would not know."""
    known = known_shapes(model.config)
    for name, tensor in model.state_dict().items():
        shape, needed = tuple(tensor.shape), known.pop(name, None)
        if shape != needed:
            why = f"{name} is {shape}, but LLaVA has {needed or 'no such tensor'}"
            raise ValueError(f"a changed model needs an export of its own: {why}")
    for name, needed in known.items():
        why = f"{name} {needed} is missing"
        raise ValueError(f"a changed model needs an export of its own: {why}")
