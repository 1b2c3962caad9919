"""`model merge` equals the unmerged model; `model info` reads folders without loading them."""

import json

import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch")

from mmedrag.answering.generators.load import load_generator  # noqa: E402
from mmedrag.answering.generators.random_model import random_llava  # noqa: E402
from mmedrag.models.convert import merge_adapter, model_info  # noqa: E402
from mmedrag.records.protocols import Request  # noqa: E402
from mmedrag.records.records import Prompt, UserError  # noqa: E402

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return random_llava(tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="module")
def adapter(folder, tmp_path_factory):
    """LoRA on every linear layer of the language model, and a trained projector."""
    from peft import LoraConfig, get_peft_model

    names = "q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj"
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=rf".*language_model.*\.({names})",
        modules_to_save=["multi_modal_projector"],
        init_lora_weights=False,
    )
    torch.manual_seed(1)
    tuned = get_peft_model(load_generator("hf", folder).model, config)
    for name, parameter in tuned.named_parameters():
        if "modules_to_save" in name:
            parameter.data += 0.05 * torch.randn_like(parameter)
    path = tmp_path_factory.mktemp("tuned")
    tuned.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def requests(tmp_path_factory):
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("p") / "a.png"
    Image.fromarray(rng.integers(0, 255, (40, 64, 3), dtype=np.uint8)).save(path)
    texts = ["Is it so?", "Is there an effusion?", "Write."]
    return [
        Request(prompt=Prompt(template="t", text=t), images=(path,), closed=True) for t in texts
    ]


def logits(generator, requests):
    with generator.active() as model:
        return model(**generator.inputs(requests)).logits


def test_merged_equals_unmerged(folder, adapter, requests, tmp_path):
    facts = merge_adapter(folder, adapter, tmp_path / "merged")
    assert facts["adapter"] == adapter.name and facts["dtype"] == "float32"
    base = load_generator("hf", folder)
    tuned = load_generator("hf", folder, adapter=adapter)
    merged = load_generator("hf", tmp_path / "merged")
    want, got = logits(tuned, requests), logits(merged, requests)
    assert (want - got).abs().max() < 1e-4
    assert (want - logits(base, requests)).abs().max() > 0.01  # the adapter does something
    texts = ["yes", "no", "it may be"]
    assert merged.logprobs(requests, texts) == pytest.approx(
        tuned.logprobs(requests, texts), abs=1e-4
    )
    said = [[a.text for a in g.generate(requests)] for g in (tuned, merged)]
    assert said[0] == said[1]


def test_merging_keeps_the_number_type(folder, adapter, tmp_path):
    facts = merge_adapter(folder, adapter, tmp_path / "half", dtype="bfloat16")
    assert facts["dtype"] == "bfloat16" and model_info(tmp_path / "half")["dtype"] == "bfloat16"
    assert model_info(tmp_path / "half")["merge"]["adapter"] == adapter.name


def test_what_does_not_fit_is_refused(folder, adapter, tmp_path):
    with pytest.raises(UserError, match="no adapter here"):
        merge_adapter(folder, tmp_path, tmp_path / "out")
    with pytest.raises(UserError, match="dtype: 'int4' is not known"):
        merge_adapter(folder, adapter, tmp_path / "out", dtype="int4")
    other = tmp_path / "other"
    other.mkdir()
    for file in adapter.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    settings = json.loads((other / "adapter_config.json").read_text())
    settings["target_modules"] = ".*no_such_layer"
    (other / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="does not fit"):
        merge_adapter(folder, other, tmp_path / "out")
    settings["target_modules"] = r".*language_model.*\.q_proj"  # less than is stored
    (other / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=r"does not fit the model: \d+ tensors differ"):
        merge_adapter(folder, other, tmp_path / "out")
    with pytest.raises(UserError, match=r"does not fit the model: \d+ tensors differ"):
        load_generator("hf", folder, adapter=other)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.part").exists()
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="exists already"):
        merge_adapter(folder, adapter, tmp_path / "out")


def test_info(folder, adapter):
    facts = model_info(folder)
    model = load_generator("hf", folder)
    assert facts["parameters"] == model.parameters
    assert facts["bytes"] == 4 * model.parameters
    assert (facts["model_type"], facts["language_model"]) == ("llava", "mistral")
    assert (facts["image_size"], facts["context"], facts["dtype"]) == (32, 512, "float32")
    assert facts["chat_template"] is True
    tuned = model_info(adapter)
    assert tuned["adapter"] is True and tuned["r"] == 4
    assert tuned["modules_to_save"] == ["multi_modal_projector"]


def test_info_of_nothing(tmp_path):
    with pytest.raises(UserError, match="config.json: cannot be read"):
        model_info(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(UserError, match="expected a JSON object"):
        model_info(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="no weights here"):
        model_info(tmp_path)
