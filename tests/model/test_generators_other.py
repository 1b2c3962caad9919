"""Architectures other than LLaVA: the processor's own inputs, the same answers as plain calls."""

import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch")

from mmedrag.answering.generators.load import load_generator  # noqa: E402
from mmedrag.answering.generators.random_model import CHAT, byte_tokenizer  # noqa: E402
from mmedrag.images.files import load_image  # noqa: E402
from mmedrag.images.noise import apply_noise  # noqa: E402
from mmedrag.records.protocols import Request  # noqa: E402
from mmedrag.records.records import Noise, Prompt  # noqa: E402

pytestmark = pytest.mark.model
TEXT = dict(
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=1024,
)


def special(tokenizer):
    return dict(
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def llava_next(folder):
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaNextConfig,
        LlavaNextForConditionalGeneration,
        LlavaNextProcessor,
    )
    from transformers.models.llava_next.image_processing_pil_llava_next import (
        LlavaNextImageProcessorPil,
    )

    tokenizer = byte_tokenizer()
    eye = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
        projection_dim=32,
    )
    grid = [[32, 64], [64, 32], [64, 64]]
    config = LlavaNextConfig(
        vision_config=eye,
        text_config=LlamaConfig(**TEXT, **special(tokenizer)),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=grid,
    )
    LlavaNextForConditionalGeneration(config).save_pretrained(folder)
    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, image_grid_pinpoints=grid
    )
    LlavaNextProcessor(
        images,
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
        chat_template=CHAT,
    ).save_pretrained(folder)


def qwen2_vl(folder):
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen2VLProcessor
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    tokenizer = byte_tokenizer(image_token="<|image_pad|>")
    names = ("vision_start", "vision_end", "image_pad", "video_pad")
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<|{n}|>" for n in names]})
    ids = {n: tokenizer.convert_tokens_to_ids(f"<|{n}|>") for n in names}
    config = Qwen2VLConfig(
        text_config={
            **TEXT,
            **special(tokenizer),
            "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
        },
        vision_config=dict(
            depth=2,
            embed_dim=32,
            hidden_size=64,
            num_heads=4,
            mlp_ratio=2,
            patch_size=8,
            spatial_merge_size=2,
            temporal_patch_size=2,
        ),
        image_token_id=ids["image_pad"],
        video_token_id=ids["video_pad"],
        vision_start_token_id=ids["vision_start"],
        vision_end_token_id=ids["vision_end"],
    )
    Qwen2VLForConditionalGeneration(config).save_pretrained(folder)
    images = Qwen2VLImageProcessorPil(
        patch_size=8, merge_size=2, size={"shortest_edge": 32 * 32, "longest_edge": 64 * 64}
    )
    chat = CHAT.replace("<image>", "<|vision_start|><|image_pad|><|vision_end|>")
    pytest.importorskip("torchvision", reason="Qwen2-VL's processor needs torchvision")
    from transformers import Qwen2VLVideoProcessor

    video = Qwen2VLVideoProcessor(patch_size=8, merge_size=2)
    Qwen2VLProcessor(images, tokenizer, video, chat_template=chat).save_pretrained(folder)


@pytest.fixture(scope="module", params=[llava_next, qwen2_vl], ids=lambda f: f.__name__)
def generator(request, tmp_path_factory):
    from mmedrag.runtime import torchvision_shim

    torchvision_shim.ready()
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp(request.param.__name__)
    request.param(folder)
    return load_generator("hf", folder)


@pytest.fixture(scope="module")
def requests(tmp_path_factory):
    where = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    found = []
    for i in range(5):
        path = where / f"{i}.png"
        pixels = rng.integers(0, 255, (40 + 8 * i, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
        found.append(
            Request(
                prompt=Prompt(template="t", text=f"Is it {'so ' * (i % 3)}?"),
                images=(path,),
                noise=Noise(kind="gaussian_clip", seed=1) if i == 4 else None,
                closed=i % 2 == 0,
                max_new_tokens=6,
            )
        )
    return found


def plain(generator, request):
    processor = generator.inputs.processor
    picture = load_image(request.images[0])
    if request.noise:
        picture = apply_noise(picture, request.noise, generator.image_size)
    content = [{"type": "image"}, {"type": "text", "text": request.prompt.text}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    return processor(images=[picture], text=[text], return_tensors="pt")


def test_answers_equal_plain_generation_whatever_the_batch(generator, requests):
    answers = generator.generate(requests)
    for request, answer in zip(requests, answers, strict=True):
        inputs = plain(generator, request)
        with torch.no_grad():
            out = generator.model.generate(**inputs, max_new_tokens=6, do_sample=False)
        length = inputs["input_ids"].shape[1]
        said = generator.tokenizer.decode(out[0, length:], skip_special_tokens=True).strip()
        assert answer.text == said
        assert (answer.p_yes is not None) == request.closed
    for request, answer in zip(requests, answers, strict=True):
        assert generator.generate([request])[0].text == answer.text


def test_logprobs_equal_a_plain_forward(generator, requests):
    found = generator.logprobs(requests, ["yes", "no it is not", "a", "yes yes", "no"])
    for request, text, value in zip(
        requests, ["yes", "no it is not", "a", "yes yes", "no"], found, strict=True
    ):
        inputs = plain(generator, request)
        tail = generator.tokenizer(text, add_special_tokens=False)["input_ids"]
        tail = torch.tensor([[*tail, generator.tokenizer.eos_token_id]])
        inputs["input_ids"] = torch.cat([inputs["input_ids"], tail], 1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        if "mm_token_type_ids" in inputs:
            kinds = inputs["mm_token_type_ids"]
            inputs["mm_token_type_ids"] = torch.cat([kinds, torch.zeros_like(tail)], 1)
        with torch.no_grad():
            logits = generator.model(**inputs).logits[0, -tail.shape[1] - 1 : -1]
        logp = torch.log_softmax(logits.double(), -1).gather(-1, tail[0, :, None]).sum()
        assert value == pytest.approx(float(logp), abs=1e-3)


def test_tokens_are_counted(generator, requests):
    short = generator.count_tokens(Prompt(template="t", text="a"), 0)
    assert generator.count_tokens(Prompt(template="t", text="a"), 1) > short + 3
