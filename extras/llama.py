"""
Another decoder: Llama's, which SmolLM2 is, too, and with three biases Qwen2.5.

    {"width": 576, "depth": 30, "heads": 9, "llama": {"kv_heads": 3, "mlp_width": 1536}, ...}

Where config.json has "llama", LlavaMini takes this decoder instead of its GPT. Such folders come
from extras/pretrained.py. Five things are not as in GPT-2:

- norms divide by the root mean square and subtract no mean (RMSNorm, arXiv 1910.07467)
- positions are no table: they turn queries and keys, by an angle a token (RoPE, arXiv 2104.09864)
- several heads share keys and values (grouped-query attention, arXiv 2305.13245)
- the MLP has a gate (SwiGLU, arXiv 2002.05202)
- layers have no biases, but for queries, keys and values in Qwen2

What is computed is that of transformers' modeling_llama.py and modeling_qwen2.py.

Shapes: B rows, T tokens, C channels, V words, d = C / heads channels a head.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from llava_mini import init_weights


@dataclass
class Sizes:
    """What Config.llama holds. Width, depth and heads are Config's own."""

    kv_heads: int
    mlp_width: int
    norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    rope_scaling: dict | None = None  # Llama 3's; None is plain RoPE
    qkv_bias: bool = False
    tied: bool = True  # the head is the table of words


# ---- positions ----------------------------------------------------------------------------------


def rates_of(sizes, d, device):
    """-> (d / 2,) radians a token, from fast to slow"""
    channels = torch.arange(0, d, 2, device=device)
    rates = 1 / sizes.rope_theta ** (channels / d)
    if sizes.rope_scaling:
        rates = stretch(rates, **sizes.rope_scaling)
    return rates


def stretch(rates, factor, low_freq_factor, high_freq_factor, original_max_position_embeddings):
    """Llama 3.1's way to longer texts: waves that turn often within the original length stay,
    slow ones get slower by the factor, and those between get both in part. As `llama3` in
    transformers' modeling_rope_utils.py."""
    turns = original_max_position_embeddings * rates / (2 * math.pi)
    keep = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor)
    keep = keep.clamp(0, 1)
    return keep * rates + (1 - keep) * rates / factor


def rotate(x, angles):
    """(B, heads, T, d) turned by (T, d / 2): channel i goes with channel i + d / 2."""
    cos, sin = angles.cos(), angles.sin()
    a, b = x.chunk(2, dim=-1)
    turned = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
    return turned.type_as(x)


# ---- layers -------------------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self, config, sizes):
        super().__init__()
        C, heads, groups = config.width, config.heads, sizes.kv_heads
        assert heads > 0 and C % heads == 0, f"width {C} does not divide by {heads} heads"
        assert groups > 0 and heads % groups == 0, f"{heads} heads do not share {groups} keys"
        self.d = C // heads
        self.q = nn.Linear(C, C, bias=sizes.qkv_bias)
        self.k = nn.Linear(C, groups * self.d, bias=sizes.qkv_bias)
        self.v = nn.Linear(C, groups * self.d, bias=sizes.qkv_bias)
        self.out = nn.Linear(C, C, bias=False)

    def forward(self, x, angles, cache, start):
        T = x.shape[1]
        q = rotate(self.split(self.q(x)), angles)  # (B, heads, T, d)
        k = rotate(self.split(self.k(x)), angles)  # (B, kv_heads, T, d)
        v = self.split(self.v(x))
        if cache is not None:  # in generation: (2, B, kv_heads, length, d)
            cache[:, :, :, start : start + T] = torch.stack([k, v])
            k, v = cache[:, :, :, : start + T]
        y = F.scaled_dot_product_attention(q, k, v, is_causal=T > 1, enable_gqa=True)
        return self.out(y.transpose(1, 2).flatten(2))

    def split(self, x):
        """(B, T, n * d) -> (B, n, T, d)"""
        return x.unflatten(2, (-1, self.d)).transpose(1, 2)


class MLP(nn.Module):
    def __init__(self, C, width):
        super().__init__()
        self.gate = nn.Linear(C, width, bias=False)
        self.up = nn.Linear(C, width, bias=False)
        self.down = nn.Linear(width, C, bias=False)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    def __init__(self, config, sizes):
        super().__init__()
        C = config.width
        self.ln_1 = nn.RMSNorm(C, sizes.norm_eps)
        self.attention = Attention(config, sizes)
        self.ln_2 = nn.RMSNorm(C, sizes.norm_eps)
        self.mlp = MLP(C, sizes.mlp_width)

    def forward(self, x, angles, cache, start):
        x = x + self.attention(self.ln_1(x), angles, cache, start)
        return x + self.mlp(self.ln_2(x))


class Llama(nn.Module):
    """What LlavaMini asks of a decoder, as in GPT: wte, forward, head and new_caches."""

    def __init__(self, config):
        super().__init__()
        C, V = config.width, config.vocab_size
        self.sizes = Sizes(**config.llama)
        self.d = C // config.heads
        self.wte = nn.Embedding(V, C)
        self.blocks = nn.ModuleList()
        for _ in range(config.depth):
            self.blocks.append(Block(config, self.sizes))
        self.ln_f = nn.RMSNorm(C, self.sizes.norm_eps)
        if not self.sizes.tied:
            self.lm_head = nn.Linear(C, V, bias=False)
        self.apply(init_weights)
        nn.init.normal_(self.wte.weight, std=0.5)

    def forward(self, x, caches=None, start=0):
        """(B, T, C), embeddings of the positions from `start` on -> (B, T, C) for the head."""
        positions = torch.arange(start, start + x.shape[1], device=x.device)
        angles = positions[:, None] * rates_of(self.sizes, self.d, x.device)  # (T, d / 2)
        for i, block in enumerate(self.blocks):
            x = block(x, angles, None if caches is None else caches[i], start)
        return self.ln_f(x)

    def head(self, x):
        """(..., C) -> logits (..., V)"""
        table = self.wte if self.sizes.tied else self.lm_head
        return x @ table.weight.T

    def new_caches(self, x, length):
        """For x (B, T, C) and what follows it -> (depth, 2, B, kv_heads, length, d)"""
        shape = len(x), self.sizes.kv_heads, length, self.d
        return x.new_empty(len(self.blocks), 2, *shape)
