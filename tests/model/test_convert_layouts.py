"""`model convert` on small random checkpoints in the official layouts.

The reference is an independent forward in plain torch, written from the published architectures
(CLIP: Radford 2021; LLaVA: Liu 2023; Mistral: Jiang 2023; RoPE: Su 2021), reading the official
tensor names.
"""

import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch")

from mmedrag.answering.generators.inputs import expand  # noqa: E402
from mmedrag.answering.generators.load import load_generator  # noqa: E402
from mmedrag.models.convert import convert_checkpoint  # noqa: E402
from mmedrag.models.llava_layout import TOWERS, load_tokenizer  # noqa: E402
from mmedrag.models.llava_tensors import rename  # noqa: E402
from mmedrag.records.protocols import Request  # noqa: E402
from mmedrag.records.records import Prompt, UserError  # noqa: E402
from mmedrag.runtime import torchvision_shim  # noqa: E402

torchvision_shim.ready()
from transformers import AutoTokenizer  # noqa: E402

pytestmark = pytest.mark.model

VISION = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    image_size=28,
    patch_size=7,
    projection_dim=16,
    hidden_act="quick_gelu",
)
TEXT = dict(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=8,
    num_key_value_heads=2,
    max_position_embeddings=512,
    rms_norm_eps=1e-5,
    rope_theta=1e6,
    sliding_window=None,
    bos_token_id=1,
    eos_token_id=2,
    tie_word_embeddings=False,
)
CASES = {
    "llava_mistral": dict(format="safetensors", vision="inside", mlp=True, theta=1e6, kv=2),
    "llava_llama": dict(format="bin", vision="named", mlp=True, theta=1e4, kv=8),
    "llava": dict(format="bin", vision="named", mlp=False, theta=1e4, kv=8, tags=True),
}


def tokenizer_files(folder, extra=()):
    """A LLaMA-style tokenizer: bytes, letters, and a few merges."""
    from transformers import LlamaTokenizer

    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁"]
    pieces += [chr(c) for c in range(33, 127)] + ["es", "yes", "▁yes", "no", "▁no", "is", "▁is"]
    merges = [("e", "s"), ("y", "es"), ("▁", "yes"), ("n", "o"), ("▁", "no"), ("i", "s")]
    merges += [("▁", "is")]
    tokenizer = LlamaTokenizer(
        vocab={p: i for i, p in enumerate(pieces)}, merges=merges, legacy=True
    )
    tokenizer.add_tokens(list(extra), special_tokens=True)
    tokenizer.save_pretrained(folder)
    return len(tokenizer)


def vision_tensors(g):
    width, inner, patch = 32, 48, 7
    count = (28 // patch) ** 2 + 1
    made = {
        "embeddings.class_embedding": (width,),
        "embeddings.patch_embedding.weight": (width, 3, patch, patch),
        "embeddings.position_embedding.weight": (count, width),
        "pre_layrnorm.weight": (width,),
        "pre_layrnorm.bias": (width,),
        "post_layernorm.weight": (width,),
        "post_layernorm.bias": (width,),
    }
    for i in range(4):
        at = f"encoder.layers.{i}."
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            made[f"{at}self_attn.{name}.weight"] = (width, width)
            made[f"{at}self_attn.{name}.bias"] = (width,)
        for name in ("layer_norm1", "layer_norm2"):
            made[f"{at}{name}.weight"] = made[f"{at}{name}.bias"] = (width,)
        made[f"{at}mlp.fc1.weight"], made[f"{at}mlp.fc1.bias"] = (inner, width), (inner,)
        made[f"{at}mlp.fc2.weight"], made[f"{at}mlp.fc2.bias"] = (width, inner), (width,)
    return {f"vision_model.{k}": torch.randn(v, generator=g) * 0.2 for k, v in made.items()}


def text_tensors(g, vocabulary, kv, mlp):
    width, inner, head = 64, 96, 8
    made = {
        "model.embed_tokens.weight": (vocabulary, width),
        "model.norm.weight": (width,),
        "lm_head.weight": (vocabulary, width),
    }
    for i in range(3):
        at = f"model.layers.{i}."
        made[f"{at}self_attn.q_proj.weight"] = made[f"{at}self_attn.o_proj.weight"] = (width, width)
        made[f"{at}self_attn.k_proj.weight"] = (kv * head, width)
        made[f"{at}self_attn.v_proj.weight"] = (kv * head, width)
        made[f"{at}mlp.gate_proj.weight"] = made[f"{at}mlp.up_proj.weight"] = (inner, width)
        made[f"{at}mlp.down_proj.weight"] = (width, inner)
        made[f"{at}input_layernorm.weight"] = (width,)
        made[f"{at}post_attention_layernorm.weight"] = (width,)
    if mlp:
        for i, inputs in ((0, 32), (2, 64)):
            made[f"model.mm_projector.{i}.weight"] = (64, inputs)
            made[f"model.mm_projector.{i}.bias"] = (64,)
    else:
        made["model.mm_projector.weight"], made["model.mm_projector.bias"] = (64, 32), (64,)
    return {k: torch.randn(v, generator=g) * 0.2 for k, v in made.items()}


def official(folder, kind, shard_count=3):
    """A random checkpoint in the official layout; returns all of its tensors."""
    from safetensors.torch import save_file

    case = CASES[kind]
    folder.mkdir()
    g = torch.Generator().manual_seed(7)
    tags = ["<im_patch>", "<im_start>", "<im_end>"] if case.get("tags") else []
    vocabulary = tokenizer_files(folder, tags)
    vision = vision_tensors(g)
    text = text_tensors(g, vocabulary, case["kv"], case["mlp"])
    if kind == "llava":  # old checkpoints carry the rotary buffers
        for i in range(3):
            freq = 1e4 ** -(torch.arange(0, 8, 2).float() / 8)
            text[f"model.layers.{i}.self_attn.rotary_emb.inv_freq"] = freq
    tower = folder / "clip"
    tower.mkdir()
    (tower / "config.json").write_text(json.dumps({"vision_config": VISION}))
    if case["vision"] == "named":
        whole = dict(vision)
        whole["vision_model.embeddings.position_ids"] = torch.arange(17)[None]
        whole["logit_scale"], whole["visual_projection.weight"] = torch.ones(()), torch.ones(16, 32)
        save_file(whole, tower / "model.safetensors")
        (tower / "preprocessor_config.json").write_text(
            json.dumps({"image_mean": [0.48145466, 0.4578275, 0.40821073]})
        )
        stored = dict(text)
    else:
        stored = {**text, **{f"model.vision_tower.vision_tower.{k}": v for k, v in vision.items()}}
    config = {
        **TEXT,
        "model_type": kind,
        "vocab_size": vocabulary,
        "rope_theta": case["theta"],
        "num_key_value_heads": case["kv"],
        "mm_vision_tower": "clip",
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_use_im_start_end": bool(tags),
        "mm_projector_type": "mlp2x_gelu" if case["mlp"] else "linear",
        "image_aspect_ratio": "pad",
        "torch_dtype": "float32",
    }
    if not case["mlp"]:
        del config["mm_projector_type"]  # LLaVA-1.0 configurations do not have it
    (folder / "config.json").write_text(json.dumps(config))
    keys = sorted(stored)
    parts = [keys[i::shard_count] for i in range(shard_count)]
    suffix = case["format"]
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    where = {}
    for i, part in enumerate(parts, 1):
        file = f"{stem}-{i:05d}-of-{shard_count:05d}.{suffix}"
        tensors = {k: stored[k].contiguous() for k in part}
        if suffix == "bin":
            torch.save(tensors, folder / file)
        else:
            save_file(tensors, folder / file)
        where.update(dict.fromkeys(part, file))
    index = f"{stem}.{suffix}.index.json"
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return {**text, **vision}, config


# --- the independent forward ---------------------------------------------------------------------


def layer_norm(x, w, name):
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
    return scaled * w[f"{name}.weight"] + w[f"{name}.bias"]


def clip_patches(w, pixels):
    """Hidden states after the second last of four layers, without the class token."""

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    at = "vision_model."
    kernel = w[at + "embeddings.patch_embedding.weight"]
    grid = pixels.unfold(1, 7, 7).unfold(2, 7, 7)  # 3, 4, 4, 7, 7
    patches = grid.permute(1, 2, 0, 3, 4).reshape(16, -1) @ kernel.reshape(32, -1).T
    x = torch.cat([w[at + "embeddings.class_embedding"][None], patches])
    x = layer_norm(x + w[at + "embeddings.position_embedding.weight"], w, at + "pre_layrnorm")
    for i in range(3):
        layer = f"{at}encoder.layers.{i}."
        y = layer_norm(x, w, layer + "layer_norm1")
        q, k, v = (
            linear(y, f"{layer}self_attn.{n}_proj").reshape(17, 4, 8).transpose(0, 1) for n in "qkv"
        )
        weights = (q @ k.transpose(1, 2) / math.sqrt(8)).softmax(-1)
        mixed = (weights @ v).transpose(0, 1).reshape(17, 32)
        x = x + linear(mixed, layer + "self_attn.out_proj")
        y = linear(layer_norm(x, w, layer + "layer_norm2"), layer + "mlp.fc1")
        x = x + linear(y * torch.sigmoid(1.702 * y), layer + "mlp.fc2")  # quick GELU
    return x[1:]


def rope(x, theta):
    """Rotates the halves of each head by position times theta^(-2i/d)."""
    length, width = x.shape[-2:]
    angle = torch.arange(length)[:, None] * theta ** -(torch.arange(0, width, 2) / width)
    first, second = x[..., : width // 2], x[..., width // 2 :]
    return torch.cat(
        [first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], -1
    )


def language_logits(w, x, kv, theta):
    def rms(x, name):
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * w[name]

    n = len(x)
    for i in range(3):
        at = f"model.layers.{i}."
        y = rms(x, at + "input_layernorm.weight")
        q = (y @ w[at + "self_attn.q_proj.weight"].T).reshape(n, 8, 8).transpose(0, 1)
        k = (y @ w[at + "self_attn.k_proj.weight"].T).reshape(n, kv, 8).transpose(0, 1)
        v = (y @ w[at + "self_attn.v_proj.weight"].T).reshape(n, kv, 8).transpose(0, 1)
        q, k = rope(q, theta), rope(k, theta)
        k, v = k.repeat_interleave(8 // kv, 0), v.repeat_interleave(8 // kv, 0)
        scores = q @ k.transpose(1, 2) / math.sqrt(8)
        scores = scores.masked_fill(torch.ones(n, n).triu(1).bool(), float("-inf"))
        mixed = (scores.softmax(-1) @ v).transpose(0, 1).reshape(n, 64)
        x = x + mixed @ w[at + "self_attn.o_proj.weight"].T
        y = rms(x, at + "post_attention_layernorm.weight")
        gate = y @ w[at + "mlp.gate_proj.weight"].T
        up = y @ w[at + "mlp.up_proj.weight"].T
        x = x + (gate * torch.sigmoid(gate) * up) @ w[at + "mlp.down_proj.weight"].T
    return rms(x, "model.norm.weight") @ w["lm_head.weight"].T


def llava_logits(w, config, pieces, pixels):
    """``pieces``: token ids before and after the image."""
    x = clip_patches(w, pixels)
    if config.get("mm_projector_type"):
        y = x @ w["model.mm_projector.0.weight"].T + w["model.mm_projector.0.bias"]
        y = 0.5 * y * (1 + torch.erf(y / math.sqrt(2)))
        x = y @ w["model.mm_projector.2.weight"].T + w["model.mm_projector.2.bias"]
    else:
        x = x @ w["model.mm_projector.weight"].T + w["model.mm_projector.bias"]
    before, after = (w["model.embed_tokens.weight"][torch.tensor(p)] for p in pieces)
    whole = torch.cat([before, x, after])
    return language_logits(w, whole, config["num_key_value_heads"], config["rope_theta"])


def padded_pixels(path):
    """LLaVA's expand2square with the CLIP mean, resize to 28, CLIP normalisation."""
    picture = Image.open(path).convert("RGB")
    side = max(picture.size)
    square = Image.new("RGB", (side, side), (122, 116, 104))
    square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    small = np.asarray(square.resize((28, 28), Image.Resampling.BICUBIC), dtype=np.float32) / 255
    mean = np.array([0.48145466, 0.4578275, 0.40821073], dtype=np.float32)
    std = np.array([0.26862954, 0.26130258, 0.27577711], dtype=np.float32)
    return torch.from_numpy(((small - mean) / std).transpose(2, 0, 1))


@pytest.fixture(scope="module", params=sorted(CASES))
def converted(request, tmp_path_factory):
    where = tmp_path_factory.mktemp(request.param)
    tensors, config = official(where / "official", request.param)
    report = convert_checkpoint(where / "official", where / "hf")
    return where, tensors, config, report


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("picture") / "wide.png"
    rng = np.random.default_rng(3)
    Image.fromarray(rng.integers(0, 255, (30, 50, 3), dtype=np.uint8)).save(path)
    return path


def test_logits_equal_the_independent_forward(converted, picture):
    where, tensors, config, _ = converted
    generator = load_generator("hf", where / "hf", device="cpu", dtype="float32")
    ids = generator.inputs.prompt_ids("Is it so? yes", "chat", 1)
    at = ids.index(generator.inputs.image_token_id)
    with torch.no_grad():
        want = llava_logits(tensors, config, (ids[:at], ids[at + 1 :]), padded_pixels(picture))
        pixels = generator.inputs.features.pixels([Image.open(picture)])
        assert torch.allclose(pixels[0], padded_pixels(picture), atol=1e-5)
        full = torch.tensor([expand(ids, ids[at], [16])])
        got = generator.model(input_ids=full, pixel_values=pixels).logits[0]
    assert got.shape[0] == want.shape[0] and got.shape[1] % 64 == 0
    assert (got[:, : want.shape[1]] - want).abs().max() < 1e-5 * max(1.0, want.abs().max())


def test_our_generator_says_what_the_forward_says(converted, picture):
    where, tensors, config, _ = converted
    generator = load_generator("hf", where / "hf", device="cpu", dtype="float32")
    ask = Request(prompt=Prompt(template="t", text="Is it so?"), images=(picture,), closed=True)
    answer = generator.generate([ask])[0]
    ids = generator.inputs.request_ids(ask)
    at = ids.index(generator.inputs.image_token_id)
    logits = llava_logits(tensors, config, (ids[:at], ids[at + 1 :]), padded_pixels(picture))[-1]
    vocabulary = generator.tokenizer.get_vocab()
    yes, no = ([vocabulary[t] for t in side] for side in (["yes", "▁yes"], ["no", "▁no"]))
    p = logits.double().softmax(-1)
    assert answer.p_yes == pytest.approx(float(p[yes].sum() / (p[yes].sum() + p[no].sum())), 1e-4)
    token = int(logits.argmax())
    first = generator.tokenizer.decode([token], skip_special_tokens=True).strip()
    assert answer.text.startswith(first)


def test_prompts_are_tokenised_as_llava_does(converted):
    """LLaVA splits at <image> and tokenises every piece as a text of its own."""
    where, _, config, _ = converted
    generator = load_generator("hf", where / "hf", device="cpu")
    tags = config["mm_use_im_start_end"]
    for text in ("Is it so?", "No.\nYes: is it?"):
        raw = Prompt(template="t", text=f"[INST] <image>\n{text} [/INST]", style="raw")
        whole = generator.inputs.text(raw, 1)
        assert ("<im_start><image><im_end>\n" in whole) == tags
        pieces = whole.split("<image>")
        official_ids = [generator.tokenizer(piece)["input_ids"] for piece in pieces]
        assert official_ids[1][0] == generator.tokenizer.bos_token_id
        want = (*official_ids[0], generator.inputs.image_token_id, *official_ids[1][1:])
        assert generator.inputs.prompt_ids(raw.text, "raw", 1) == want


def test_report_and_files(converted):
    where, tensors, config, report = converted
    files = {p.name for p in (where / "hf").iterdir()}
    assert {
        "config.json",
        "conversion.json",
        "processor_config.json",
        "tokenizer.json",
        "generation_config.json",
        "chat_template.jinja",
    } <= files
    linear = not config.get("mm_projector_type")
    buffers = sum("inv_freq" in name for name in tensors)
    assert report.tensors == len(tensors) - buffers + 2 * linear
    assert len(report.checked) == buffers
    assert sum("rows" in line for line in report.added) == 2
    assert any("identity" in line for line in report.added) == linear
    kept = json.loads((where / "hf" / "processor_config.json").read_text())
    assert kept["image_processor"]["do_pad"] is True
    # the source's dtype stays, and no tensor stands in two files
    from safetensors import safe_open

    names = []
    for file in sorted((where / "hf").glob("*.safetensors")):
        with safe_open(file, "pt") as handle:
            names += handle.keys()
            assert all(handle.get_slice(n).get_dtype() == "F32" for n in handle.keys())
    index = json.loads((where / "hf" / "model.safetensors.index.json").read_text())
    assert sorted(names) == sorted(index["weight_map"]) and len(set(names)) == len(names)


def test_filling_rows_are_never_said(converted, picture):
    where, _, config, _ = converted
    settings = json.loads((where / "hf" / "generation_config.json").read_text())
    assert settings["suppress_tokens"][0] == config["vocab_size"]
    generator = load_generator("hf", where / "hf", device="cpu")
    head = generator.model.lm_head.weight
    head.data[config["vocab_size"] :] = head.data[: config["vocab_size"]].mean(0) * 100
    ask = Request(prompt=Prompt(template="t", text="Is?"), images=(picture,), max_new_tokens=8)
    assert "<image>" not in generator.generate([ask])[0].text


# --- what must fail ------------------------------------------------------------------------------


def edited(tmp_path, edit, kind="llava_llama"):
    source = tmp_path / "official"
    official(source, kind, shard_count=1)
    edit(source)
    return source


def change_tensors(change):
    def edit(source):
        path = source / "pytorch_model-00001-of-00001.bin"
        tensors = torch.load(path, weights_only=True)
        change(tensors)
        torch.save(tensors, path)

    return edit


def change_config(**changes):
    def edit(source):
        path = source / "config.json"
        settings = json.loads(path.read_text())
        settings.update(changes)
        path.write_text(json.dumps({k: v for k, v in settings.items() if v != "DELETE"}))

    return edit


def evil(source):
    class Evil:
        def __reduce__(self):
            return (os.system, ("true",))

    torch.save({"model.norm.weight": Evil()}, source / "pytorch_model-00001-of-00001.bin")


FREQ = "model.layers.0.self_attn.rotary_emb.inv_freq"


BIN = "pytorch_model-00001-of-00001.bin"
UP, DOWN = "model.layers.1.mlp.up_proj.weight", "model.layers.9.mlp.up_proj.weight"
BIAS = "mm_projector.0.bias"


def put(name, value):
    return change_tensors(lambda tensors: tensors.update({name: value}))


def write(name, text):
    return lambda source: (source / name).write_text(text)


def remove(name):
    return lambda source: (source / name).unlink()


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (change_tensors(lambda t: t.pop(UP)), "1 tensors are missing"),
        (put("model.extra", torch.ones(2)), "not part of a known"),
        (put(DOWN, torch.ones(96, 64)), "which this model does not have"),
        (put(BIAS, torch.ones(64)), "gave already"),
        (put("model.norm.weight", torch.ones(63)), "shape \\(63,\\), expected \\(64,\\)"),
        (put(FREQ, torch.rand(4) + 2), "cannot be dropped"),
        (put("lm_head.weight", 3), "dictionary of tensors"),
        (evil, "only tensors are"),
        (write(BIN, "junk"), "cannot be loaded"),
        (remove(BIN), "missing, named by"),
        (remove("clip/config.json"), "not a folder and not in the local cache"),
        (remove("tokenizer.json"), "no tokenizer.json or tokenizer.model"),
        (write("adapter_config.json", "{}"), "a LoRA adapter"),
        (write("config.json", "{"), "config.json: cannot be read"),
        (change_config(model_type="bert"), "model_type 'bert', expected llava_mistral"),
        (change_config(mm_projector_type="mlp3x_gelu"), "mm_projector_type 'mlp3x_gelu'"),
        (change_config(mm_vision_select_feature="cls"), "mm_vision_select_feature 'cls'"),
        (change_config(vocab_size="DELETE"), "vocab_size or hidden_size is missing"),
        (change_config(text_config={}), "already a Hugging Face folder"),
        (change_config(mm_vision_tower=""), "mm_vision_tower is missing"),
        (remove("clip/model.safetensors"), "clip: no weights here"),
    ],
)
def test_what_does_not_fit_fails_and_leaves_nothing(tmp_path, monkeypatch, edit, said):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    source = edited(tmp_path, edit)
    with pytest.raises(UserError, match=said):
        convert_checkpoint(source, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["official"]


def test_a_tower_known_by_name_needs_its_weights(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setitem(TOWERS, "known/tower", VISION)
    source = edited(tmp_path, change_config(mm_vision_tower="known/tower"))
    with pytest.raises(UserError, match="no vision weights; name the folder of 'known/tower'"):
        convert_checkpoint(source, tmp_path / "out")
    convert_checkpoint(source, tmp_path / "out", vision_tower=source / "clip")


def test_an_existing_folder_is_not_touched(tmp_path):
    source = edited(tmp_path, lambda s: None)
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="exists already"):
        convert_checkpoint(source, tmp_path / "out")


def test_a_damaged_safetensors_file_is_refused(tmp_path):
    def cut(source):
        path = source / "model-00001-of-00001.safetensors"
        path.write_bytes(path.read_bytes()[:-100])

    with pytest.raises(UserError, match="not a sound safetensors file"):
        convert_checkpoint(edited(tmp_path, cut, "llava_mistral"), tmp_path / "out")


def test_names():
    assert rename("model.mm_projector.2.bias") == "multi_modal_projector.linear_2.bias"
    assert rename("lm_head.weight") == "language_model.lm_head.weight"
    assert rename(FREQ) is None
    with pytest.raises(UserError, match="not part of a known"):
        rename("model.image_newline")


MEASURE = """
import sys, json
from pathlib import Path
from mmedrag.runtime import torchvision_shim; torchvision_shim.ready()
import mmedrag.models.convert as c
from transformers import LlavaForConditionalGeneration, LlavaProcessor, LlamaTokenizer
def status(key):
    return next(int(l.split()[1]) for l in open('/proc/self/status') if l.startswith(key)) * 1024
def warm():
    c.convert_checkpoint(sys.argv[1], sys.argv[1] + '-warm')
warm()
Path('/proc/self/clear_refs').write_text('5')
before = status('VmRSS')
c.convert_checkpoint(sys.argv[2], sys.argv[2] + '-hf')
print(json.dumps([before, status('VmHWM')]))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="needs Linux /proc")
@pytest.mark.parametrize("kind", ["llava_mistral", "llava_llama"])
def test_peak_memory_is_bounded_by_the_largest_shard(tmp_path, kind):
    """Wide layers make shards of some 40 MB; the peak above the start stays ≤ 1.3 shards."""
    official(tmp_path / "small", kind)
    wide(tmp_path / "wide", kind)
    largest = max(p.stat().st_size for p in (tmp_path / "wide").iterdir())
    assert largest > 30e6
    out = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path / "small"), str(tmp_path / "wide")],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert out.returncode == 0, out.stderr[-2000:]
    before, peak = json.loads(out.stdout.splitlines()[-1])
    assert peak - before <= 1.3 * largest


def wide(folder, kind):
    """The official layout with an intermediate size that makes big shards."""
    inner = 50_000
    official(folder, kind, shard_count=1)
    from safetensors.torch import load_file, save_file

    stem = "model" if kind == "llava_mistral" else "pytorch_model"
    suffix = CASES[kind]["format"]
    path = folder / f"{stem}-00001-of-00001.{suffix}"
    tensors = load_file(path) if suffix == "safetensors" else torch.load(path, weights_only=True)
    for name in list(tensors):
        if "mlp.gate_proj" in name or "mlp.up_proj" in name:
            tensors[name] = torch.zeros(inner, 64)
        elif "mlp.down_proj" in name:
            tensors[name] = torch.zeros(64, inner)
    if suffix == "safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path)
    change_config(intermediate_size=inner)(folder)


def test_a_sentencepiece_tokenizer_gives_the_ids_of_the_original(tmp_path):
    """LLaVA used LLaMA's slow tokenizer, which is sentencepiece itself on every piece of text."""
    spm = pytest.importorskip("sentencepiece")
    pytest.importorskip("google.protobuf")
    words = "is there an effusion yes no the heart looks normal question answer please".split()
    rng = np.random.default_rng(0)
    lines = [" ".join(rng.choice(words, 8)) for _ in range(300)]
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=340,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=1.0,
        add_dummy_prefix=True,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    settings = {"tokenizer_class": "LlamaTokenizer", "legacy": True, "add_bos_token": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    original = spm.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    tokenizer = load_tokenizer(tmp_path)
    tokenizer.save_pretrained(tmp_path / "saved")
    again = AutoTokenizer.from_pretrained(tmp_path / "saved")
    image = again.convert_tokens_to_ids("<image>")
    assert image == original.get_piece_size() == 340
    for text in ("[INST] <image>\nIs there an effusion? [/INST]", "USER: <image>\nno ß ASSISTANT:"):
        before, after = text.split("<image>")
        want = [1, *original.encode(before), image, *original.encode(after)]
        assert again(text)["input_ids"] == want
    assert again.decode(again(" yes no")["input_ids"], skip_special_tokens=True).strip() == "yes no"
