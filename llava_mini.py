"""
LLaVA mini, the model: image -> ViT -> projector -> GPT. What has no image costs the ViT nothing.

    input_ids    (B, T) -----------------------------> word embeddings (B, T, C) --+
    pixel_values (B, M, 3, H, W) -> real slots -> ViT -> projector -> (n, P, C) ---+--> GPT

THE ZERO RULE: an image slot whose pixels are all exactly zero holds no image.

A text-only sample carries one such slot, and rows with fewer images than others are filled up
with them. The model finds these slots and leaves them out. A batch of text alone runs neither
encoder nor projector: their gradients are None, and torch's optimizers pass them over.

Shapes: B rows, T tokens, M image slots a row, n real images in the batch, P tokens an image,
C channels of the decoder, D channels of the vision encoder, V words in the vocabulary.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn

import data


@dataclass
class Config:
    vocab_size: int
    image_token_id: int
    block_size: int = 256  # longest sequence, in tokens
    image_size: int = 32  # height and width, in pixels
    patch_size: int = 8  # pixels
    width: int = 128  # C
    depth: int = 2  # blocks
    heads: int = 4
    vision_width: int = 128  # D
    vision_depth: int = 2
    vision_heads: int = 4
    vision_mlp_width: int | None = None  # None is 4 D
    llama: dict | None = None  # sizes of extras/llama.py, which is the decoder then
    vocab_checksum: str = ""  # of the words that the model learns; "" is unknown

    @property
    def image_tokens(self):
        """P, one token a patch. A projector that merges patches needs a change here."""
        return (self.image_size // self.patch_size) ** 2


class Attention(nn.Module):
    def __init__(self, width, heads, causal):
        super().__init__()
        assert heads > 0 and width % heads == 0, f"width {width} does not divide by {heads} heads"
        self.heads, self.causal = heads, causal
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x, cache=None, start=0):
        B, T, C = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.heads, C // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, T, C / heads) each
        if cache is not None:  # in generation: (2, B, heads, length, C / heads)
            cache[:, :, :, start : start + T] = torch.stack([k, v])
            k, v = cache[:, :, :, : start + T]  # of all tokens so far
        # Padding needs no mask: it stands on the right, and causal attention looks to the left.
        # With a filled cache T is 1: the newest token, which sees all that the cache holds.
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal and T > 1)
        return self.out(y.transpose(1, 2).reshape(B, T, C))


class Block(nn.Module):
    """The same for words and patches, (B, T, C) -> (B, T, C): GPT-2's if causal, else SigLIP's."""

    def __init__(self, width, heads, causal, mlp_width=None):
        super().__init__()
        eps = 1e-5 if causal else 1e-6
        hidden = mlp_width or 4 * width
        self.ln_1 = nn.LayerNorm(width, eps)
        self.attention = Attention(width, heads, causal)
        self.ln_2 = nn.LayerNorm(width, eps)
        layers = nn.Linear(width, hidden), nn.GELU("tanh"), nn.Linear(hidden, width)
        self.mlp = nn.Sequential(*layers)

    def forward(self, x, cache=None, start=0):
        x = x + self.attention(self.ln_1(x), cache, start)
        return x + self.mlp(self.ln_2(x))


def init_weights(module):
    """Matrices of std 1 / sqrt(fan in): with GPT-2's 0.02 a model this small learns much later."""
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def positions_2d(side, width):
    """-> (side * side, width) of rms 1, so that neighbours begin alike: sines and cosines of a
    patch's row, then of its column, in width / 4 frequencies (the Transformer's, 1706.03762)."""
    rates = (10 * side) ** -(torch.arange(0, width, 4) / width)  # radians a patch
    angles = torch.arange(side)[:, None] * rates
    waves = torch.cat([angles.sin(), angles.cos()], dim=1) * 2**0.5  # (side, width / 2)
    rows = waves.repeat_interleave(side, dim=0)
    columns = waves.repeat(side, 1)
    return torch.cat([rows, columns], dim=1)[:, :width].contiguous()


class ViT(nn.Module):
    """SigLIP's encoder (arXiv 2303.15343) up to its last norm: (n, 3, H, W) -> (n, patches, D)."""

    def __init__(self, config):
        super().__init__()
        size, patch = config.image_size, config.patch_size
        D, heads, hidden = config.vision_width, config.vision_heads, config.vision_mlp_width
        assert patch > 0 and size % patch == 0, f"{size} is no multiple of patch size {patch}"
        self.patch_embed = nn.Conv2d(3, D, kernel_size=patch, stride=patch)
        self.pos_embed = nn.Parameter(positions_2d(size // patch, D))
        blocks = [Block(D, heads, False, hidden) for _ in range(config.vision_depth)]
        self.blocks = nn.Sequential(*blocks)
        self.apply(init_weights)

    def forward(self, images):
        x = self.patch_embed(images).flatten(2).transpose(1, 2)  # (n, patches, D), row by row
        return self.blocks(x + self.pos_embed)


class Projector(nn.Sequential):
    """LLaVA-1.5's (arXiv 2310.03744), from patches to words: (n, patches, D) -> (n, P, C)."""

    def __init__(self, config):
        D, C = config.vision_width, config.width
        super().__init__(nn.Linear(D, C), nn.GELU(), nn.Linear(C, C))
        self.apply(init_weights)
        self[-1].weight.data *= 0.5  # patches start near the scale of words


class GPT(nn.Module):
    """GPT-2. What a decoder has: `wte`, the embedding of words; `forward`, which takes embeddings
    and not ids, so that patches can stand among words; `head`, which makes logits of what comes
    out; `new_caches`, for keys and values, which generation hands to each `forward`."""

    def __init__(self, config):
        super().__init__()
        C, heads = config.width, config.heads
        self.wte = nn.Embedding(config.vocab_size, C)
        self.wpe = nn.Embedding(config.block_size, C)
        self.blocks = nn.ModuleList(Block(C, heads, causal=True) for _ in range(config.depth))
        self.ln_f = nn.LayerNorm(C)
        self.apply(init_weights)
        nn.init.normal_(self.wte.weight, std=0.5)
        nn.init.normal_(self.wpe.weight, std=0.6)

    def forward(self, x, caches=None, start=0):
        """(B, T, C), embeddings of the positions from `start` on -> (B, T, C) for the head."""
        x = x + self.wpe.weight[start : start + x.shape[1]]
        for i, block in enumerate(self.blocks):
            x = block(x, None if caches is None else caches[i], start)
        return self.ln_f(x)

    def head(self, x):
        """(..., C) -> logits (..., V): the table of word embeddings serves twice, as in GPT-2."""
        return x @ self.wte.weight.T

    def new_caches(self, x, length):
        """For x (B, T, C) and what follows it -> (depth, 2, B, heads, length, C / heads)"""
        heads = self.blocks[0].attention.heads
        return x.new_empty(len(self.blocks), 2, len(x), heads, length, x.shape[2] // heads)


class LlavaMini(nn.Module):
    """The whole, and the point of this project: the rule in `real_slots`, the skip in `embed`."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.vision = ViT(config)
        self.projector = Projector(config)
        decoder = GPT
        if config.llama:  # which lies beside the core
            from extras.llama import Llama as decoder
        self.decoder = decoder(config)

    def real_slots(self, pixel_values):
        """THE ZERO RULE: (B, M, 3, H, W) -> (B, M) bool, False where every pixel is zero."""
        # Not by the sum: there opposite pixels cancel, and a picture would be lost.
        return (pixel_values != 0).flatten(2).any(dim=2)

    def embed(self, input_ids, pixel_values):
        """-> (B, T, C): word embeddings, with patches where the image tokens stand."""
        is_image = input_ids == self.config.image_token_id  # (B, T) bool
        real = self.real_slots(pixel_values)  # (B, M) bool
        # The host needs some numbers and waits until a GPU gives them: here, before the first
        # layer, where the GPU has no work yet, and not between encoder and decoder.
        self.check_counts(is_image, real)
        images = pixel_values[real]  # (n, 3, H, W), real slots alone
        places = is_image.nonzero(as_tuple=True)  # rows and positions of n P tokens

        words = self.decoder.wte(input_ids)  # (B, T, C)
        if len(images) > 0:  # THE SKIP: without a real slot nothing runs
            patches = self.encode_images(images)  # (n, P, C)
            words[places] = patches.flatten(0, 1).to(words.dtype)  # the k-th place, the k-th patch
        return words

    def encode_images(self, images):
        """(n, 3, H, W) -> (n, P, C). Raises ValueError for a projector that gives another P."""
        patches, P = self.projector(self.vision(images)), self.config.image_tokens
        if patches.shape[1] != P:
            raise ValueError(f"Config.image_tokens is {P}, the projector gives {patches.shape[1]}")
        return patches

    def check_counts(self, is_image, real):
        """The safety net: no picture is lost in silence. Raises ValueError naming the row."""
        found, needed = is_image.sum(dim=1), self.config.image_tokens * real.sum(dim=1)
        if not torch.equal(found, needed):
            row = (found != needed).nonzero()[0].item()
            raise ValueError(f"row {row}: {found[row]} image tokens, its images need {needed[row]}")

    def forward(self, input_ids, pixel_values, labels=None):
        """-> (logits (B, T, V), None), or with labels (B, T) -> (logits (N, V), loss).

        The logits are then those of the N positions whose next token has a label, row by row, and
        the loss is the SUM of their cross-entropies: sums add up over micro-batches and ranks.
        """
        if labels is None:
            return self.decoder.head(self.decoder(self.embed(input_ids, pixel_values))), None

        targets = labels[:, 1:]  # position t predicts token t + 1
        supervised = (targets != data.IGNORE_INDEX).nonzero(as_tuple=True)  # waits, too
        x = self.decoder(self.embed(input_ids, pixel_values))  # (B, T, C)
        logits = self.decoder.head(x[supervised])  # nobody reads the other positions
        return logits, F.cross_entropy(logits, targets[supervised], reduction="sum")

    def generate(self, input_ids, pixel_values, max_new_tokens, **options):
        """(B, T) without padding -> (B, T + new). The options are those of `stream`."""
        tokens = self.stream(input_ids, pixel_values, max_new_tokens, **options)
        return torch.cat([input_ids, *tokens], dim=1)

    @torch.inference_mode()
    def stream(self, input_ids, pixel_values, new, temperature=0.0, top_k=None, eos_token_id=None):
        """Yield up to `new` tokens, (B, 1) at a time: the likeliest, or drawn at a temperature > 0.

        A row that has ended repeats its end token until all have. No image token is drawn.
        """
        T, config = input_ids.shape[1], self.config
        if T + new > config.block_size:
            raise ValueError(f"{T} + {new} tokens exceed the block of {config.block_size}")
        if not temperature >= 0 or (top_k is not None and top_k < 1):
            raise ValueError(f"temperature {temperature} must be >= 0, top_k {top_k} > 0 or None")
        padded = input_ids[:, -1] == data.PAD_TOKEN_ID
        if padded.any() and not padded.all():
            raise ValueError("prompts of unequal length: padding is no word, give them one by one")
        k = min(top_k or config.vocab_size, config.vocab_size)
        if temperature == 0:
            k, temperature = 1, 1.0  # greedy is a draw among one, the likeliest

        x, start = self.embed(input_ids, pixel_values), 0
        caches = self.decoder.new_caches(x, T + new)
        ended = torch.zeros_like(input_ids[:, :1], dtype=torch.bool)
        for _ in range(new):
            logits = self.decoder.head(self.decoder(x, caches, start)[:, -1])  # (B, V)
            logits[:, config.image_token_id] = -torch.inf
            logits, ids = logits.topk(k)
            choice = (logits / temperature).softmax(dim=-1).multinomial(1)
            token = ids.gather(1, choice)  # (B, 1)
            if eos_token_id is not None:
                token = token.masked_fill(ended, eos_token_id)
                ended = token == eos_token_id
            yield token
            if ended.all():
                return
            start += x.shape[1]
            x = self.decoder.wte(token)  # (B, 1, C)

    def save(self, folder):
        """Write config.json and model.safetensors. (Other users could not read save_file's.)"""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(asdict(self.config), indent=2))
        (folder / "model.safetensors").write_bytes(save(self.state_dict()))

    @classmethod
    def load(cls, folder):
        """Raises OSError or ValueError for a folder that holds no model of this project."""
        try:
            fields = json.loads(Path(folder, "config.json").read_text())
            model = cls(Config(**fields))
            model.load_state_dict(load_file(Path(folder, "model.safetensors")))
        except (TypeError, ValueError, AssertionError, RuntimeError, SafetensorError) as error:
            why = str(error).split("\t")[-1]  # the last of load_state_dict's complaints
            raise ValueError(f"{folder} holds no model of LLaVA mini: {why}") from error
        return model


if __name__ == "__main__":  # python llava_mini.py out "Describe the image." --image docs/scene.png
    from extras import ask

    ask.main()
