"""What the tests share: a tokenizer, a tiny model, batches with chosen images, and commands."""

import contextlib
import io
import runpy
import signal
import sys
import traceback
from pathlib import Path

import pytest
import torch
from PIL import Image

import data
from llava_mini import Config, LlavaMini
from train import to_device

ROOT = Path(data.__file__).parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
SIZE = 16  # pixels a side, in the tiny model
TINY = {"image_size": SIZE, "patch_size": 8, "width": 32, "vision_width": 24, "vision_heads": 2}
P = Config(0, 0, **TINY).image_tokens  # a fork may have another
BLOCK = TINY["block_size"] = 48 + 4 * P
LLAMA = {"kv_heads": 2, "mlp_width": 40, "qkv_bias": True, "tied": False}
DECODERS = {"gpt": None, "llama": LLAMA}
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
ANSWERS = ["red", "a blue square at the top left", "two", "apple bread chair dream"]

# A forked process knows all that a plugin has replaced. But neither CUDA nor threads survive it.
START = "fork" if DEVICES == ["cpu"] and sys.platform == "linux" else "spawn"
torch.set_num_threads(1)  # which is enough for a tiny model


@pytest.fixture(scope="session")
def tokenizer():
    return data.train_tokenizer(data.ToyRecords("train", 300))


@pytest.fixture(scope="session", params=DEVICES)
def device(request):
    """Where model and batches are: every test that asks for them runs on a GPU, too."""
    return request.param


@pytest.fixture(scope="session")
def config(request, tokenizer):
    """With GPT as decoder; `both_decoders` asks for extras/llama.py's, too."""
    ids = tokenizer.get_vocab_size(), tokenizer.token_to_id(data.IMAGE_TOKEN)
    return Config(*ids, **TINY, llama=DECODERS[getattr(request, "param", "gpt")])


both_decoders = pytest.mark.parametrize("config", DECODERS, indirect=True)


def make_model(config, dtype=torch.float32):
    """A model whose biases and norms are random, too: zeros and ones would hide mistakes."""
    torch.manual_seed(0)
    model = LlavaMini(config)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model.to(dtype)


@pytest.fixture
def model(config, device):
    return make_model(config).to(device)


@pytest.fixture
def exact_model(config, device):
    """In float64, where what is equal but for rounding is equal within 1e-10."""
    return make_model(config, torch.float64).to(device)


def is_ours(module):
    """False for a fork's own encoder or projector, of which the tests know nothing."""
    return type(module).__module__ == "llava_mini"


def close(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def same(a, b):
    """Bit for bit; on a GPU, where sums may be in another order, within 1e-5."""
    if a.device.type == "cpu":
        assert torch.equal(a, b)
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def picture(seed, size=SIZE):
    """size x size random pixels."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (size * size * 3,), generator=generator)
    return Image.frombytes("RGB", (size, size), bytes(pixels.tolist()))


def talk(*texts, roles=("human", "gpt") * 2):
    return [{"from": role, "value": text} for role, text in zip(roles, texts)]


def record(*texts, images=(), **roles):
    """A conversation of human and gpt by turns."""
    return {"image": list(images), "conversations": talk(*texts, **roles)}


def command(script, *flags):
    """A script with flags as from a shell, but in this process, which has torch already.

    -> (exit code or the last words of an error, what it printed)
    """
    printed, code = io.TextIOWrapper(io.BytesIO(), encoding="utf-8"), 0
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(sys, "argv", [str(script), *map(str, flags)])
        patch.setattr(sys, "path", sys.path.copy())
        patch.setattr(signal, "signal", lambda *_: None)  # pytest has its own
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        except SystemExit as end:
            code = end.code
            if end.__context__:  # let go of what its frames hold, such as workers
                traceback.clear_frames(end.__context__.__traceback__)
    printed.seek(0)
    return code, printed.read()


@pytest.fixture(scope="session")
def samples_of(tokenizer, config):
    """samples_of(0, 2): a sample without image and one with two, of different lengths."""

    def make(*image_counts, dtype=torch.float32, config=config):
        samples = []
        for row, count in enumerate(image_counts):
            question = "<image>\n" * count + f"Number {row}?"
            images = [picture(10 * row + i) for i in range(count)]
            answered = record(question, ANSWERS[row % 4], images=images)
            samples.append(data.make_sample(answered, tokenizer, config))
            samples[-1]["pixel_values"] = samples[-1]["pixel_values"].to(dtype)
        return samples

    return make


@pytest.fixture(scope="session")
def batch_of(samples_of, device):
    """The same as a batch."""

    def make(*image_counts, **options):
        return to_device(data.collate(samples_of(*image_counts, **options)), device)

    return make
