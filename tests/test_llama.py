"""Decoders of today: what lies on the hub comes in, trains, answers and goes out as it is there."""

import json
import re
import string
from pathlib import Path
from unittest import mock

import pytest
import torch
from conftest import command, picture, record
from test_pretrained_and_export import as_messages, open_llava, randomise, talk
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import nn

import data
from extras import layouts, pretrained, their_configs, to_transformers, vocabulary
from llava_mini import Config, LlavaMini

hf = pytest.importorskip("transformers", reason="transformers is the judge here")

SIGLIP = {"hidden_size": 24, "intermediate_size": 96, "image_size": 16, "patch_size": 8}
SIGLIP |= {"num_hidden_layers": 2, "num_attention_heads": 2}
SIZES = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 6}
SIZES |= {"num_key_value_heads": 2, "intermediate_size": 40, "max_position_embeddings": 200}
SCALING = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SCALING |= {"original_max_position_embeddings": 64, "rope_theta": 5e5}
HUB = json.loads((Path(__file__).parent / "hub_configs.json").read_text())


def sentencepiece():
    """Of TinyLlama's kind: <s> in front, a blank before every text, bytes for unknown signs."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁"]
    words += [*string.ascii_letters, "Ye", "Yes", "▁Yes"]
    vocab = {word: i for i, word in enumerate(words)}
    merges = [("Y", "e"), ("Ye", "s"), ("▁", "Yes")]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.add_special_tokens(words[:3])
    blanks = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    tokenizer.normalizer = normalizers.Sequence(blanks)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 1)])
    return tokenizer


def byte_level():
    """Of SmolLM2's and Qwen2.5's kind: ChatML's words are there, <image> is not."""
    text = data.train_tokenizer([talk(0)], vocab_size=300).to_str()
    return Tokenizer.from_str(text.replace("<image>", "<|endoftext|>"))


@pytest.fixture(params=["llama", "qwen2"])
def saved(request, tmp_path):
    """-> (their decoder, the folder with its shards in 16 bits), and a SigLIP beside it"""
    torch.manual_seed(0)
    siglip = hf.SiglipVisionModel(hf.SiglipVisionConfig(**SIGLIP))
    randomise(siglip).save_pretrained(tmp_path / "siglip")
    folder = tmp_path / "decoder"
    if request.param == "llama":  # a head of its own, Llama 3's scaling, three words to add
        tokenizer = sentencepiece()
        sizes = SIZES | {"vocab_size": tokenizer.get_vocab_size(), "rope_parameters": SCALING}
        decoder = hf.LlamaForCausalLM(hf.LlamaConfig(**sizes))
    else:  # biases, a tied head, 20 rows to spare, a word to add
        tokenizer = byte_level()
        sizes = SIZES | {"vocab_size": tokenizer.get_vocab_size() + 20, "rope_theta": 500.0}
        decoder = hf.Qwen2ForCausalLM(hf.Qwen2Config(**sizes, tie_word_embeddings=True))
    for p in randomise(decoder).parameters():
        p.data = p.data.bfloat16()
    decoder.save_pretrained(folder, max_shard_size="15KB")
    for p in decoder.parameters():
        p.data = p.data.float()
    tokenizer.save(str(folder / "tokenizer.json"))
    assert len(list(folder.glob("*.safetensors"))) > 1
    if request.param == "qwen2":  # as older files say it
        change_config(folder, rope_parameters=None, rope_theta=500)
    return decoder, folder


def change_config(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def build(folder, edit=None):
    """After a change of its tokenizer"""
    if edit:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        edit(tokenizer)
        tokenizer.save(str(folder / "tokenizer.json"))
    return pretrained.build(folder.parent / "siglip", folder)


def test_logits_are_theirs_and_those_of_added_words_their_mean(saved):
    decoder, folder = saved
    known = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size()
    model, tokenizer = build(folder)
    ids = torch.randint(known, (2, 200), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, theirs = model(ids, torch.zeros(2, 1, 3, 16, 16))[0], decoder(ids).logits
    added = sorted(i for i in map(tokenizer.token_to_id, data.SPECIAL_TOKENS) if i >= known)
    wanted = theirs.new_zeros(ours.shape)
    wanted[..., : theirs.shape[2]] = theirs  # with the rows to spare
    wanted[..., added] = theirs[..., :known].mean(dim=2, keepdim=True)
    assert len(added) == (1 if model.config.llama["tied"] else 3)
    assert model.config.vocab_checksum == vocabulary.checksum(tokenizer)
    torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-5)


def metaspace(tokenizer):
    tokenizer.normalizer = None
    cut = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([cut])


def silent(tokenizer):
    tokenizer.post_processor = processors.TemplateProcessing("$A", None, [])


@pytest.mark.parametrize("saved", ["llama"], indirect=True)
@pytest.mark.parametrize("edit", [None, metaspace, silent])
def test_a_sample_begins_with_one_bos_and_no_piece_of_it_with_a_blank(saved, edit):
    settings = {"add_bos_token": True, "bos_token": {"content": "<s>"}}
    (saved[1] / "tokenizer_config.json").write_text(json.dumps(settings))
    model, tokenizer = build(saved[1], edit)
    ids, _ = data.encode(talk(0), tokenizer, model.config)
    text = "".join(map(tokenizer.id_to_token, ids))
    assert text.startswith("<s><|im_start|>user<0x0A>Is▁▁it<0x0A>red<0x3F><|im_end|><0x0A>")
    assert "<|im_start|>assistant<0x0A>Yes<0x2C>▁" in text and ids.count(1) == 1
    assert tokenizer.decode(tokenizer.encode(" Yes").ids) == " Yes"


def ending(tokenizer):
    tokenizer.post_processor = processors.TemplateProcessing("$A </s>", None, [("</s>", 2)])


def stripping(tokenizer):
    tokenizer.normalizer = normalizers.Strip()


OTHERS = {"model_type": "mistral", "hidden_act": "gelu", "attention_bias": True, "mlp_bias": True}
OTHERS |= {"head_dim": 16, "pretraining_tp": 2, "rope_interleaved": True, "hidden_size": "48"}
OTHERS |= {"partial_rotary_factor": 0.5, "quantization_config": {"bits": 4}, "qk_layer_norms": True}
REFUSED = [("llama", {field: value}, f"{field} is {value!r}") for field, value in OTHERS.items()]
REFUSED += [
    ("llama", ending, "adds ['</s>'] to a text: we need one token at most, and in front"),
    ("llama", stripping, "pieces of a text do not join"),
    ("llama", {"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters is 'yarn', but we"),
    ("llama", {"rope_parameters": {"full_attention": {}}}, "full_attention is nothing that we"),
    ("llama", {"rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling is 'linear'"),
    ("llama", {"rope_scaling": {"type": "llama3"}}, "rope_scaling.factor is missing"),
    ("llama", {"num_hidden_layers": 3}, "tensor layers.2.input_layernorm.weight is missing"),
    ("llama", {"num_key_value_heads": 3}, "layers.0.self_attn.k_proj.weight is (16, 48), but we"),
    ("llama", {"tie_word_embeddings": True}, "True, but lm_head.weight is another table"),
    ("llama", {"bos_token_id": 7}, "['<s>'], [1]: config.json has the bos_token_id 7"),
    ("qwen2", {"tie_word_embeddings": False}, "tensor lm_head.weight is missing"),
    ("qwen2", {"layer_types": ["sliding_attention"]}, "layer_types is 'sliding_attention'"),
    ("qwen2", {"use_sliding_window": True, "max_window_layers": 1}, "use_sliding_window is True"),
    ("qwen2", {"use_mrope": True}, "use_mrope is True"),
]


@pytest.mark.parametrize(("saved", "change", "message"), REFUSED, indirect=["saved"])
def test_what_we_do_not_compute_is_refused_by_the_name_of_its_field(saved, change, message):
    is_edit = callable(change)
    change_config(saved[1], **({} if is_edit else change))
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        build(saved[1], change if is_edit else None)
    assert str(saved[1]) in str(error.value)


def test_a_folder_trains_stops_resumes_answers_and_goes_out(saved, tmp_path):
    start, out, parts = tmp_path / "start", tmp_path / "out", ["--vision", tmp_path / "siglip"]
    parts += ["--decoder", saved[1], "--block-size", 100]
    error, _ = command("extras/pretrained.py", *parts, "--block-size", 201, "--out", start)
    assert error == f"pretrained.py: --block-size 201: {saved[1]} has 1 to 200"
    made = command("extras/pretrained.py", *parts, "--out", start)
    assert made == (0, f"{start}: an image takes 4 of 100 tokens\n")

    picture(0).save(tmp_path / "a.png")
    records = [record("<image>\nIs it red?", "Yes", images=["a.png"]), record("Is it?", "Yes, é!")]
    (tmp_path / "train.json").write_text(json.dumps(records))
    flags = ["--init", start, "--data", tmp_path / "train.json", "--images", tmp_path]
    assert command("data.py", *flags)[0] == 0
    flags += "--batch-size 2 --steps 4 --eval-every 2 --device cpu --workers 0".split()
    assert command("train.py", *flags, "--out", tmp_path / "straight")[0] == 0

    clip = torch.nn.utils.clip_grad_norm_
    stop = {"wraps": clip, "side_effect": [mock.DEFAULT, mock.DEFAULT, KeyboardInterrupt]}
    with mock.patch("torch.nn.utils.clip_grad_norm_", **stop):
        assert "stopped" in command("train.py", *flags, "--out", out)[0]
    assert command("train.py", "--resume", "--out", out)[0] == 0
    straight = LlavaMini.load(tmp_path / "straight").state_dict()
    resumed = LlavaMini.load(out)
    assert all(torch.equal(straight[name], tensor) for name, tensor in resumed.state_dict().items())

    code, said = command("llava_mini.py", out, "Is it?")
    assert code == 0 and said.endswith("\n")
    assert command("extras/to_transformers.py", out, tmp_path / "hf")[0] == 0
    check_ids_and_answers(resumed, tmp_path / "hf")


def check_ids_and_answers(model, folder):
    """Of unequal prompts, in a batch with padding and one by one without an attention mask."""
    tokenizer = data.load_tokenizer(folder.parent / "out" / "tokenizer.json", model.config)
    processor, theirs = hf.AutoProcessor.from_pretrained(folder), open_llava(folder)
    asked, end = [talk(1, turns=3), talk(2, turns=1)], tokenizer.token_to_id(data.IM_END)
    words = {"add_generation_prompt": True}
    text, _ = data.encode(talk(0), tokenizer, model.config)  # where no processor takes part
    made = processor.tokenizer.apply_chat_template(as_messages(talk(0)), return_dict=False)
    assert made == text
    texts = [processor.apply_chat_template(as_messages(one), **words) for one in asked]
    images = [one["image"] for one in asked]
    made = processor(text=texts, images=images, padding=True, return_tensors="pt")
    assert processor.tokenizer.pad_token_id != end  # collators hide padding from the loss
    answers = theirs.generate(**made, max_new_tokens=8, do_sample=False)
    for row, one in enumerate(asked):
        sample = data.make_sample(one, tokenizer, model.config)
        ids, pixels = sample["input_ids"][None], sample["pixel_values"]
        assert made["input_ids"][row][made["attention_mask"][row] == 1].equal(ids[0])
        ours = model.generate(ids, pixels[None], 8, eos_token_id=end)[0, ids.shape[1] :]
        alone = theirs.generate(input_ids=ids, pixel_values=pixels, max_new_tokens=8)
        assert alone[0, ids.shape[1] :].equal(ours) and answers[row, -8:].equal(ours)


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("vision", nn.Conv2d(3, 24, 8, 8), "vision.weight is (24, 3, 8, 8), but LLaVA has no such"),
        ("projector", nn.Linear(24, 32), "projector.weight is (32, 24), but LLaVA has no such"),
        ("decoder.wpe", None, "decoder.wpe.weight (256, 32) is missing"),
        ("decoder.wte", nn.Embedding(9, 32), "decoder.wte.weight is (9, 32), but LLaVA has (300, "),
    ],
)
def test_a_fork_is_not_exported_as_what_it_is_not(part, change, message, tmp_path):
    model = LlavaMini(Config(300, 2, width=32, vision_width=24, vision_heads=2))
    model.set_submodule(part, change) if change else delattr(model.decoder, "wpe")
    with pytest.raises(ValueError, match=re.escape(message)):
        to_transformers.export(model, byte_level(), tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def names_and_shapes(pairs):
    prefix = re.compile(r"(vision_model|model|transformer)\.")
    return {prefix.sub("", name, count=1): tuple(tensor.shape) for name, tensor in pairs}


@pytest.mark.parametrize("name", HUB)
def test_models_of_the_hub_fit_and_have_exactly_the_tensors_that_we_read(name):
    theirs, judge = HUB[name], hf.AutoConfig.for_model(**HUB[name])
    part, read, auto = "decoder", their_configs.decoder_fields, hf.AutoModelForCausalLM
    if "siglip" in name:
        part, read, auto = "vision", their_configs.vision_fields, hf.AutoModel
        judge = judge.vision_config
    config = Config(**{"vocab_size": 9, "image_token_id": 0} | read("hub", theirs))
    names = layouts.SIGLIP_NAMES if part == "vision" else layouts.decoder_names(config)
    with torch.device("meta"):  # shapes without memory
        ours, judge = LlavaMini(config), auto.from_config(judge)
    layouts.check(ours)
    needed = names_and_shapes(judge.named_parameters())
    unread = {name for name in needed if name.startswith(("post_layernorm", "head."))}
    found = names_and_shapes(layouts.in_their_layout(getattr(ours, part), names))
    assert found == {name: needed[name] for name in needed.keys() - unread}
