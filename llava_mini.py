"""LLaVA mini, the model: image -> ViT -> projector -> GPT, in which an empty image slot costs nothing.

    input_ids    (B, T) ---------------------------------> GPT.wte --> (B, T, C) --+
    pixel_values (B, M, 3, H, W) -> real slots -> ViT -> projector --> (n, P, C) --+--> GPT --> logits, loss

- The zero rule: a slot whose pixels are all exactly zero holds no image. `LlavaMini.real_slots` is its home.
- ViT and projector run on the real slots only. A text-only batch does not call them: their gradients stay None.
- One transformer block serves both; layers compute what CLIP's and GPT-2's do, so that real weights load.
- A checkpoint is a transformers LLaVA folder, in safetensors and JSON.

Shapes: B rows, T tokens, M image slots a row, n real images in the batch, P patches an image, H = W pixels, C channels
of the decoder, D of the vision encoder, V vocabulary, N supervised positions.
"""

import argparse
import json
import math
import os
import re
import sys
from dataclasses import astuple, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers.decoders import DecodeStream
from torch import nn

import data


@dataclass
class ViTConfig:
    image_size: int = 32  # pixels, height and width
    patch_size: int = 8  # pixels
    width: int = 96
    depth: int = 3
    heads: int = 4

    @property
    def n_patches(self):
        return (self.image_size // self.patch_size) ** 2


@dataclass
class GPTConfig:
    vocab_size: int
    block_size: int = 256  # longest sequence, in tokens
    width: int = 96
    depth: int = 3
    heads: int = 4
    tied_head: bool = True  # False only where a checkpoint's lm_head was trained apart from wte


@dataclass
class LlavaMiniConfig:
    vision: ViTConfig
    text: GPTConfig
    image_token_id: int


class Linear(nn.Linear):
    """nn.Linear, except that on a CPU one vector alone, as in generation, meets the weights in eight parts.

    Such a product is bound by reading the weights. PyTorch's for one matrix falls far short of the memory's bandwidth,
    its batched one comes closer: `python tests/bench.py` shows the tokens/s.
    """

    def forward(self, x):
        if x.numel() > self.in_features or x.device.type != "cpu" or torch.is_grad_enabled() or self.out_features % 8:
            return super().forward(x)
        # A row turned by .mT, not a column made by view, whose strides would lead to a much slower product.
        y = torch.bmm(self.weight.view(8, -1, self.in_features), x.expand(8, 1, -1).mT)  # (8, out / 8, 1)
        y = y.view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias


class Block(nn.Module):
    """Pre-norm transformer block, (B, T, C) -> (B, T, C): GPT-2's if causal (tanh-gelu), else CLIP's (quick-gelu).

    The two layers that write to the residual stream start at zero, so that a new block changes nothing at first.
    """

    def __init__(self, width, heads, causal):
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} does not divide by {heads} heads")
        self.heads, self.causal = heads, causal
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.attn_out = Linear(width, 3 * width), Linear(width, width)
        self.mlp_in, self.mlp_out = Linear(width, 4 * width), Linear(4 * width, width)
        for linear, std in ((self.qkv, width**-0.5), (self.mlp_in, width**-0.5), (self.attn_out, 0), (self.mlp_out, 0)):
            nn.init.normal_(linear.weight, std=std)
            nn.init.zeros_(linear.bias)

    def forward(self, x, cache=None, start=0, keep=...):
        """`keep` indexes (B, T), `...` takes all of it: what comes after the attention is computed only there."""
        B, T, C = x.shape
        # (B, T, 3C) -> (3, B, heads, T, C / heads)
        qkv = self.qkv(self.ln_1(x)).view(B, T, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv
        if cache is not None:  # (2, B, heads, longest T, C / heads)
            cache[..., start : start + T, :] = qkv[1:]
            k, v = cache[..., : start + T, :]
        # No mask: padding stands on the right, where causal attention hides it from every real token, and padded
        # positions carry no label. A single token (T = 1) sees all of the cache; several need an empty one (start = 0).
        h = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal and T > 1)
        x = x[keep] + self.attn_out(h.transpose(1, 2).reshape(B, T, C)[keep])
        h = self.mlp_in(self.ln_2(x))  # (B, T, 4C), or (N, 4C)
        # CLIP's quick-gelu is h * sigmoid(1.702 h); written as a silu it keeps one tensor less for the backward pass.
        h = F.gelu(h, approximate="tanh") if self.causal else F.silu(1.702 * h) / 1.702
        return x + self.mlp_out(h)


def sinusoids(n, width):
    """-> (n, width): how position embeddings start, rms 1: sines and cosines of wavelengths from 2 pi to about 20 pi n.

    They are trained as any others, but begin with near places alike and every shift the same turn anywhere, and so find
    "the word before" or "the patch above" early (arXiv 1706.03762; there the longest wavelength is fixed).
    """
    angles = torch.arange(n).unsqueeze(1) * (10 * n) ** -(torch.arange(0, width, 2) / width)  # (n, width / 2)
    return 2**0.5 * torch.cat([angles.sin(), angles.cos()], dim=1)[:, :width]


class ViT(nn.Module):
    """CLIP's vision transformer (arXiv 2103.00020) without its last LayerNorm: (n, 3, H, W) -> (n, P, D)."""

    def __init__(self, config):
        super().__init__()
        side, rest = divmod(config.image_size, config.patch_size)
        if rest:
            raise ValueError(f"image size {config.image_size} is no multiple of patch size {config.patch_size}")
        self.patch_embed = nn.Conv2d(3, config.width, config.patch_size, stride=config.patch_size, bias=False)
        self.class_embed = nn.Parameter(torch.randn(config.width))
        self.pos_embed = nn.Embedding(config.n_patches + 1, config.width)
        axis = sinusoids(side, (config.width + 1) // 2)  # half of the channels tell the row, half the column
        grid = torch.cat([axis.repeat_interleave(side, dim=0), axis.repeat(side, 1)], dim=1)  # (P, D)
        # As large as the patches: at the usual std of 0.02, where things are is learned late.
        self.pos_embed.weight.data[1:] = grid[:, : config.width]
        self.ln_pre = nn.LayerNorm(config.width)
        self.blocks = nn.Sequential(*(Block(config.width, config.heads, causal=False) for _ in range(config.depth)))

    def forward(self, images):
        x = self.patch_embed(images).flatten(2).transpose(1, 2)  # (n, P, D)
        x = torch.cat([self.class_embed.expand(len(x), 1, -1), x], dim=1) + self.pos_embed.weight  # (n, 1 + P, D)
        return self.blocks(self.ln_pre(x))[:, 1:]  # (n, P, D)


class Projector(nn.Module):
    """LLaVA-1.5's MLP (arXiv 2310.03744) into the space of word embeddings: (n, P, D) -> (n, P, C)."""

    def __init__(self, vision_width, text_width):
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(vision_width, text_width), nn.Linear(text_width, text_width)
        for linear in (self.linear_1, self.linear_2):  # std 1 / sqrt(fan in): patches arrive as large as they left
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)

    def forward(self, x):
        return self.linear_2(F.gelu(self.linear_1(x)))


class GPT(nn.Module):
    """GPT-2 from the embeddings on, so that patches can stand among words. For text: `gpt(gpt.wte(ids), labels)`."""

    def __init__(self, config):
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.width)
        self.wpe = nn.Embedding(config.block_size, config.width)
        self.blocks = nn.ModuleList(Block(config.width, config.heads, causal=True) for _ in range(config.depth))
        self.ln_f = nn.LayerNorm(config.width)
        self.lm_head = Linear(config.width, config.vocab_size, bias=False)
        nn.init.normal_(self.wte.weight, std=0.1)
        self.wpe.weight.data = 0.1 * sinusoids(config.block_size, config.width)
        if config.tied_head:
            self.lm_head.weight = self.wte.weight

    def hidden(self, x, cache=None, start=0, keep=...):
        """Embeddings (B, T, C) of positions from `start` on -> states for the head: (B, T, C), or (N, C) at `keep`."""
        x = x + self.wpe.weight[start : start + x.shape[1]]
        for i, block in enumerate(self.blocks):
            last = i == len(self.blocks) - 1  # it serves the head alone, earlier ones the attention to come
            x = block(x, None if cache is None else cache[i], start, keep if last else ...)
        return self.ln_f(x)

    def forward(self, x, labels=None):
        if labels is None:
            return self.lm_head(self.hidden(x)), None  # (B, T, V)
        rows, positions = (labels[:, 1:] != data.IGNORE_INDEX).nonzero(as_tuple=True)  # position t predicts token t + 1
        if not len(rows):
            raise ValueError("no position has a label: nothing to learn from")
        # Nobody reads the other positions, and with a large vocabulary the head is most of the cost.
        logits = self.lm_head(self.hidden(x, keep=(rows, positions)))  # (N, V)
        return logits, F.cross_entropy(logits, labels[rows, positions + 1])


class LlavaMini(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.vision = ViT(config.vision)
        self.projector = Projector(config.vision.width, config.text.width)
        self.decoder = GPT(config.text)

    def real_slots(self, input_ids, pixel_values):
        """THE ZERO RULE: a slot whose pixels are all exactly zero holds no image. -> indices (of B x M) of the others.

        All that the host must know comes over in one transfer. Raises ValueError for a row whose image tokens
        don't match its images, ids outside of the vocabulary, pixels that are not finite, and wrong shapes or types.
        """
        P, V, longest = self.config.vision.n_patches, self.config.text.vocab_size, self.config.text.block_size
        size, shape = self.config.vision.image_size, tuple(pixel_values.shape)
        ids, pixels = (f"{tensor.dtype} {tuple(tensor.shape)}" for tensor in (input_ids, pixel_values))
        if input_ids.ndim != 2 or input_ids.dtype != torch.long or 0 in input_ids.shape or input_ids.shape[1] > longest:
            raise ValueError(f"input_ids must be int64 (B, T), T at most {longest}, got {ids}")
        if shape != (len(input_ids), *shape[1:2], 3, size, size) or 0 in shape or not pixel_values.is_floating_point():
            raise ValueError(f"pixel_values must be floats ({len(input_ids)}, M >= 1, 3, {size}, {size}), got {pixels}")
        peaks = pixel_values.flatten(2).abs().amax(2)  # (B, M): not the sum, in which opposite pixels cancel
        image_tokens = (input_ids == self.config.image_token_id).sum(1)  # (B,)
        # .float() on one column lifts all: a table in bfloat16, as pixels may be, would round ids and counts.
        table = torch.column_stack([input_ids.amin(1).float(), input_ids.amax(1), image_tokens, peaks])  # (B, 3 + M)
        real = []
        for row, (low, high, tokens, *row_peaks) in enumerate(table.tolist()):
            slots = [slot for slot, peak in enumerate(row_peaks) if peak != 0]
            if low < 0 or high >= V:
                raise ValueError(f"row {row}: token ids from {low:.0f} to {high:.0f} leave the vocabulary of {V}")
            if not math.isfinite(sum(row_peaks)):
                raise ValueError(f"row {row}: pixel_values holds NaN or infinity")
            if tokens != P * len(slots):
                raise ValueError(f"row {row}: {tokens:.0f} image tokens, but {len(slots)} images need {P * len(slots)}")
            real += [row * len(row_peaks) + slot for slot in slots]
        return real

    def embed(self, input_ids, pixel_values):
        """-> (B, T, C): word embeddings, with patch features where the image tokens stand."""
        real = self.real_slots(input_ids, pixel_values)
        x = self.decoder.wte(input_ids)  # (B, T, C)
        if real:  # THE SKIP: empty slots are left out by [real]; without a real one, neither module is called at all
            real = torch.tensor(real).to(x.device, non_blocking=True)
            patches = self.projector(self.vision(pixel_values.flatten(0, 1)[real]))  # (n, 3, H, W) -> (n, P, C)
            # Where the image tokens stand: row by row, slot by slot. Sorting finds them without waiting for the device
            # to count them, as a mask would need, here and in the backward pass.
            is_image = (input_ids == self.config.image_token_id).flatten().int()  # (B x T,)
            places = is_image.argsort(descending=True, stable=True)[: patches.shape[:2].numel()]  # (n x P,)
            x = x.flatten(0, 1).index_copy(0, places, patches.flatten(0, 1).to(x.dtype)).view_as(x)
        return x

    def forward(self, input_ids, pixel_values, labels=None):
        """input_ids (B, T) int64, pixel_values (B, M, 3, H, W), labels (B, T) int64 or None -> (logits, loss).

        Without labels: logits (B, T, V) and None. With labels: logits (N, V) at the positions whose next token has a
        label other than -100, and the mean cross-entropy there. Raises ValueError as `real_slots`, and where N = 0.
        """
        return self.decoder(self.embed(input_ids, pixel_values), labels)

    @torch.inference_mode()
    def stream(self, input_ids, pixel_values, max_new_tokens, temperature=0.0, top_k=None, eos_token_id=None):
        """`generate` token by token: yields the next ids, (B,) at a time. Raises as it does, once iterated."""
        config, (B, T) = self.config.text, input_ids.shape
        room = config.block_size - T
        if not 0 <= max_new_tokens <= room:
            raise ValueError(f"max_new_tokens {max_new_tokens}: must be from 0 to {room}, as {T} tokens are there")
        if not temperature >= 0 or (top_k is not None and top_k < 1):
            raise ValueError(f"temperature {temperature} and top_k {top_k}: must be at least 0 and 1")
        x, start = self.embed(input_ids, pixel_values), 0
        ended = torch.zeros_like(input_ids[:, 0], dtype=torch.bool)
        # Keys and values of all positions to come, in one piece: nothing is concatenated or copied as it fills.
        cache = x.new_empty(config.depth, 2, B, config.heads, T + max_new_tokens, config.width // config.heads)
        for _ in range(max_new_tokens):
            logits = self.decoder.lm_head(self.decoder.hidden(x, cache, start, keep=(slice(None), -1)))  # (B, V)
            start += x.shape[1]
            if top_k is not None:
                logits[logits < logits.topk(min(top_k, config.vocab_size)).values[:, -1:]] = -math.inf
            token = torch.multinomial((logits / temperature).softmax(-1), 1)[:, 0] if temperature else logits.argmax(-1)
            if eos_token_id is not None:
                token = token.masked_fill(ended, eos_token_id)
                ended = token == eos_token_id
            yield token
            if ended.all():
                return
            x = self.decoder.wte(token).unsqueeze(1)  # (B, 1, C)

    def generate(self, input_ids, pixel_values, max_new_tokens, temperature=0.0, top_k=None, eos_token_id=None):
        """(B, T) without padding -> (B, T + at most max_new_tokens): the likeliest tokens at temperature 0, else drawn.

        A row that ended repeats eos_token_id until all have. Raises ValueError as `real_slots`, and for more new tokens
        than the block size has room for, a temperature below 0 or a top_k below 1.
        """
        tokens = self.stream(input_ids, pixel_values, max_new_tokens, temperature, top_k, eos_token_id)
        return torch.cat([input_ids, *(token.unsqueeze(1) for token in tokens)], dim=1)

    def save_pretrained(self, folder, tokenizer):
        """Write a folder that transformers opens too: LlavaForConditionalGeneration, AutoProcessor, pipeline."""
        folder, vision, text = Path(folder), self.config.vision, self.config.text
        folder.mkdir(parents=True, exist_ok=True)
        end, untied = tokenizer.token_to_id(data.IM_END), {"tie_word_embeddings": False}  # its LLaVA can't tie GPT-2's
        clip = CLIP | dict(zip(CLIP_SIZES, astuple(vision))) | {"intermediate_size": 4 * vision.width}
        gpt2 = GPT2 | dict(zip(GPT2_SIZES, astuple(text))) | untied | {"bos_token_id": end, "eos_token_id": end}
        config = LLAVA | untied | {"vision_config": clip, "text_config": gpt2, "vision_feature_layer": -1}
        config |= {"image_token_index": self.config.image_token_id, "image_seq_length": vision.n_patches}
        config["architectures"] = ["LlavaForConditionalGeneration"]
        files = data.processor_files(tokenizer, vision.image_size, vision.patch_size, text.block_size)
        for name, content in (files | {"config.json": json.dumps(config, indent=2)}).items():
            replace_file(folder / name, lambda path, content=content: path.write_text(content, encoding="utf-8"))
        tensors = {name: view.detach().clone(memory_format=torch.contiguous_format) for name, view in disk_views(self)}
        tensors["language_model.lm_head.weight"] = self.decoder.lm_head.weight.detach().clone()  # a tied one too
        tensors["vision_tower.post_layernorm.weight"] = torch.ones(vision.width)  # CLIP has it, LLaVA does not use it
        tensors["vision_tower.post_layernorm.bias"] = torch.zeros(vision.width)
        replace_file(folder / "model.safetensors", lambda path: save_file(tensors, path, {"format": "pt"}))

    @classmethod
    def from_pretrained(cls, folder):
        """Read a folder of ours, or of transformers with CLIP and GPT-2. Raises ValueError naming what does not fit."""
        config, tensors, source = read_folder(folder)
        config.setdefault("image_token_index", config.get("image_token_id"))  # it has two names
        (image_token_id,) = read_sizes(config, LLAVA, ["image_token_index"], source)
        vision = ViTConfig(*read_sizes(config.get("vision_config"), CLIP, CLIP_SIZES, source))
        text = GPTConfig(*read_sizes(config.get("text_config"), GPT2, GPT2_SIZES, source))
        cut_depth(vision, config, source)
        if image_token_id >= text.vocab_size:
            raise ValueError(f"{source}: image_token_index is {image_token_id}, no id of the vocabulary")
        head, wte = tensors.get("lm_head.weight"), tensors.get("wte.weight")
        text.tied_head = head is not None and wte is not None and torch.equal(head, wte)
        model = cls(LlavaMiniConfig(vision, text, image_token_id))
        read_tensors(disk_views(model), tensors, source)
        return model


# --- checkpoints -----------------------------------------------------------------------------------------------------
# What our layers compute, in transformers' words: a config that says otherwise is refused. Sizes in our configs' order.
LLAVA = {"model_type": "llava", "projector_hidden_act": "gelu", "vision_feature_select_strategy": "default"}
CLIP = {"model_type": "clip_vision_model", "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "num_channels": 3}
GPT2 = {"model_type": "gpt2", "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "scale_attn_weights": True}
GPT2 |= {"scale_attn_by_inverse_layer_idx": False}
CLIP_SIZES = ("image_size", "patch_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
GPT2_SIZES = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")
OTHER_NAMES = {"projector": "multi_modal_projector", "decoder": "language_model", "wte": "model.wte"}
OTHER_NAMES |= {"wpe": "model.wpe", "ln_f": "model.ln_f", "blocks": "model.h", "qkv": "attn.c_attn"}
OTHER_NAMES |= {"attn_out": "attn.c_proj", "mlp_in": "mlp.c_fc", "mlp_out": "mlp.c_proj"}
CLIP_NAMES = {"vision": "vision_tower", "class_embed": "embeddings.class_embedding", "ln_pre": "pre_layrnorm"}
CLIP_NAMES |= {"patch_embed": "embeddings.patch_embedding", "pos_embed": "embeddings.position_embedding"}
CLIP_NAMES |= {"blocks": "encoder.layers", "ln_1": "layer_norm1", "ln_2": "layer_norm2"}
CLIP_NAMES |= {"attn_out": "self_attn.out_proj", "mlp_in": "mlp.fc1", "mlp_out": "mlp.fc2"}


def plain(name):
    """A tensor's name without the wrappers that some folders and versions of transformers put around it."""
    return re.sub(r"\b(model|transformer|vision_model|vision_tower|language_model)\.", "", name)


def disk_views(module, part=""):
    """Yield (name on disk, view of our tensor) of a LlavaMini, or of its part "vision" or "decoder"."""
    for name, tensor in module.named_parameters(part):
        vision = name.startswith("vision.")
        names = CLIP_NAMES if vision else OTHER_NAMES
        disk = ".".join(names.get(word, word) for word in name.split("."))
        if vision and "qkv" in name:  # CLIP keeps the three apart
            for letter, view in zip("qkv", tensor.chunk(3)):
                yield disk.replace("qkv", f"self_attn.{letter}_proj"), view
        else:  # GPT-2's Conv1D keeps (in, out), the transpose of Linear
            yield disk, tensor.T if name.startswith("decoder.blocks.") and tensor.ndim == 2 else tensor


def read_safetensors(path):
    """-> ({name: tensor}, metadata). Raises ValueError for a damaged file."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    except SafetensorError as e:
        raise ValueError(f"{path}: damaged file ({e})") from e


def read_folder(folder):
    """-> (config, {plain name: tensor}, folder) of a checkpoint folder, or of the folder that holds the named file."""
    folder = Path(folder).parent if Path(folder).is_file() else Path(folder)
    whole = folder / "model.safetensors"  # else shards; pickled weights are never read
    files = [whole] if whole.is_file() else sorted(folder.glob("model-*.safetensors"))
    if not (folder / "config.json").is_file() or not files:
        raise ValueError(f"{folder}: no checkpoint here, needs config.json and model.safetensors")
    tensors = {plain(name): tensor for file in files for name, tensor in read_safetensors(file)[0].items()}
    return data.read_json(folder / "config.json", dict), tensors, folder


def read_sizes(config, expected, fields, source):
    """-> the fields of a transformers config, after a check that it describes what our layers compute."""
    config = config if isinstance(config, dict) else {}
    for field, value in expected.items():
        found = config.get(field, None if field == "model_type" else value)  # transformers leaves out its defaults
        if found != value:
            raise ValueError(f"{source}: {field} is {found!r}, only {value!r} is supported")
    for field in fields:
        if type(config.get(field)) is not int or config[field] < 1:
            raise ValueError(f"{source}: config.json has no whole number under {field!r}")
    return [config[field] for field in fields]


def cut_depth(vision, config, source):
    """A block whose output nobody reads is not built: LLaVA takes that of the last but one, if it says nothing else."""
    layer = config.get("vision_feature_layer", -2)
    if layer not in (-1, -2)[: vision.depth]:
        why = f"only -1 and -2 are supported, and {vision.depth} blocks are there"
        raise ValueError(f"{source}: vision_feature_layer is {layer!r}, {why}")
    vision.depth += layer + 1


@torch.no_grad()
def read_tensors(views, tensors, source):
    for name, view in views:
        tensor = tensors.get(name, tensors.get(plain(name)))  # a run file keeps whole names, read_folder plain ones
        if tensor is None or tensor.shape != view.shape:
            found = "missing" if tensor is None else f"of shape {tuple(tensor.shape)}, not {tuple(view.shape)}"
            raise ValueError(f"{source}: tensor {plain(name)} is {found}")
        view.copy_(tensor)


def load_vision(folder):
    """-> (ViTConfig, ViT) of a CLIP or LLaVA folder, up to the block whose output LLaVA takes: CLIP's last but one."""
    whole, tensors, source = read_folder(folder)
    config = ViTConfig(*read_sizes(whole.get("vision_config", whole), CLIP, CLIP_SIZES, source))
    cut_depth(config, whole, source)
    vit = ViT(config)
    read_tensors(disk_views(vit, "vision"), tensors, source)
    return config, vit


def load_decoder(folder, vocab_size):
    """-> (GPTConfig, GPT) from a GPT-2 folder; rows added to its vocabulary start at the mean of its own."""
    config, tensors, source = read_folder(folder)
    config = GPTConfig(*read_sizes(config, GPT2 | {"tie_word_embeddings": True}, GPT2_SIZES, source))
    added = max(0, vocab_size - config.vocab_size)
    config.vocab_size += added
    if (wte := tensors.get("wte.weight")) is not None:
        tensors["wte.weight"] = torch.cat([wte, wte.mean(0, keepdim=True).expand(added, -1)])
    gpt = GPT(config)
    read_tensors(disk_views(gpt, "decoder"), tensors, source)
    return config, gpt


def replace_file(path, write):
    """Let `write(temporary path)` make a file, then rename it into place: a crash leaves the old file whole."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # safetensors would leave a file that nobody else may read
        write(temporary)
        temporary.chmod(mode)
        with open(temporary, "rb+") as file:  # Windows flushes only what may be written
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, SafetensorError) as e:
        temporary.unlink(missing_ok=True)
        raise OSError(f"{path} can't be written, what was there is kept: {e}") from e


# --- command line ----------------------------------------------------------------------------------------------------
DEVICE = str(torch.accelerator.current_accelerator(check_available=True) or "cpu")


def run_command(main, parser):
    """Run main(args); what goes wrong is one line on stderr and a non-zero exit, with --debug the traceback too."""
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.error = lambda message: sys.exit(f"{parser.prog}: {message}")
    args = parser.parse_args()
    sys.stdout.reconfigure(errors="backslashreplace")  # some terminals can't show all that a record may hold
    try:
        main(args)
    except Exception as e:
        if args.debug:
            raise
        sys.exit(f"{parser.prog}: {(str(e).strip() or repr(e)).splitlines()[-1]}")


def answer(model, tokenizer, record, max_new_tokens=sys.maxsize, temperature=0.0, top_k=None):
    """Yield the answer to a record that ends with a question, piece by piece. ValueError without room for a token."""
    vision, block_size = model.config.vision, model.config.text.block_size
    sample = data.make_sample(record, tokenizer, vision.image_size, vision.patch_size, block_size - 1)
    ids, pixels = (sample[name][None].to(model.decoder.wte.weight.device) for name in ("input_ids", "images"))
    new = min(max_new_tokens, block_size - ids.shape[1])
    end, decode = tokenizer.token_to_id(data.IM_END), DecodeStream(skip_special_tokens=True)
    for token in model.stream(ids, pixels, new, temperature, top_k, end):
        yield decode.step(tokenizer, token.item()) or ""  # half a character waits for the rest


def ask(args):
    model = LlavaMini.from_pretrained(args.folder).to(args.device)
    tokenizer = data.load_tokenizer(Path(args.folder) / "tokenizer.json")
    prompt = [{"from": "human", "value": f"{data.IMAGE_TOKEN}\n" * len(args.image) + args.prompt}]
    record = {"image": args.image, "conversations": prompt}
    torch.manual_seed(args.seed)
    for text in answer(model, tokenizer, record, args.max_new_tokens, args.temperature, args.top_k):
        print(text, end="", flush=True)
    print()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Ask a trained model; the answer streams to the terminal.")
    parser.add_argument("folder", help="checkpoint, such as the folder that train.py writes")
    parser.add_argument("prompt")
    parser.add_argument("--image", nargs="+", default=[], metavar="FILE", help="pictures, in order")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the most likely token")
    parser.add_argument("--top-k", type=int, help="with a temperature above 0: sample among the k most likely")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default=DEVICE)
    run_command(ask, parser)
