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


def llava_onevision(folder):
    pytest.importorskip("torchvision", reason="LLaVA-OneVision's processor needs torchvision")
    from transformers import (
        LlavaOnevisionConfig,
        LlavaOnevisionForConditionalGeneration,
        LlavaOnevisionProcessor,
        LlavaOnevisionVideoProcessor,
        Qwen2Config,
        SiglipVisionConfig,
    )
    from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
        LlavaOnevisionImageProcessorPil,
    )

    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<video>"]})
    eye = SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
        vision_use_head=False,
    )
    grid = [[32, 32], [32, 64], [64, 32], [64, 64], [32, 96], [96, 32]]
    config = LlavaOnevisionConfig(
        vision_config=eye,
        text_config=Qwen2Config(**TEXT, **special(tokenizer)),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=grid,
        vision_feature_layer=-1,
    )
    LlavaOnevisionForConditionalGeneration(config).save_pretrained(folder)
    images = LlavaOnevisionImageProcessorPil(
        size={"height": 32, "width": 32}, image_grid_pinpoints=grid
    )
    LlavaOnevisionProcessor(
        images,
        tokenizer,
        LlavaOnevisionVideoProcessor(size={"height": 32, "width": 32}),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        chat_template=CHAT,
        image_token="<image>",
        video_token="<video>",
    ).save_pretrained(folder)


def smolvlm(folder):
    pytest.importorskip("torchvision", reason="SmolVLM's processor needs torchvision")
    pytest.importorskip("num2words", reason="SmolVLM's processor needs num2words")
    from transformers import SmolVLMVideoProcessor

    tiled(folder, "SmolVLM", SmolVLMVideoProcessor())


def idefics3(folder):
    """The model that SmolVLM comes from: tiles with rows and columns between them."""
    tiled(folder, "Idefics3")


def tiled(folder, family, *video):
    import transformers
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
    from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

    picture = {"SmolVLM": SmolVLMImageProcessorPil, "Idefics3": Idefics3ImageProcessorPil}[family]
    config_, model_, processor_ = (
        getattr(transformers, family + part)
        for part in ("Config", "ForConditionalGeneration", "Processor")
    )
    tokenizer = byte_tokenizer()
    tiles = [f"<row_{i}_col_{j}>" for i in range(1, 5) for j in range(1, 5)]
    marks = ["<fake_token_around_image>", "<end_of_utterance>", "<global-img>", *tiles]
    tokenizer.add_special_tokens({"additional_special_tokens": marks})
    tokenizer.fake_image_token, tokenizer.global_image_token = marks[0], "<global-img>"
    tokenizer.end_of_utterance_token = marks[1]
    config = config_(
        vision_config=dict(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=32,
            patch_size=8,
        ),
        text_config=transformers.LlamaConfig(**TEXT, **special(tokenizer)),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        pad_token_id=tokenizer.pad_token_id,
    )
    model_(config).save_pretrained(folder)
    images = picture(
        size={"longest_edge": 64}, max_image_size={"longest_edge": 32}, do_image_splitting=True
    )
    processor_(images, tokenizer, *video, image_seq_len=4, chat_template=CHAT).save_pretrained(
        folder
    )


def qwen3_vl(folder):
    pytest.importorskip("torchvision", reason="Qwen3-VL's processor needs torchvision")
    from transformers import (
        Qwen3VLConfig,
        Qwen3VLForConditionalGeneration,
        Qwen3VLProcessor,
        Qwen3VLVideoProcessor,
    )
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    tokenizer = byte_tokenizer(image_token="<|image_pad|>")
    names = ("vision_start", "vision_end", "image_pad", "video_pad")
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<|{n}|>" for n in names]})
    ids = {n: tokenizer.convert_tokens_to_ids(f"<|{n}|>") for n in names}
    config = Qwen3VLConfig(
        text_config={
            **TEXT,
            **special(tokenizer),
            "head_dim": 16,
            "rope_scaling": {"rope_type": "default", "mrope_section": [2, 3, 3]},
        },
        vision_config=dict(
            depth=2,
            hidden_size=32,
            intermediate_size=64,
            out_hidden_size=64,
            num_heads=4,
            patch_size=8,
            spatial_merge_size=2,
            temporal_patch_size=2,
            num_position_embeddings=64,
            deepstack_visual_indexes=[0],
        ),
        image_token_id=ids["image_pad"],
        video_token_id=ids["video_pad"],
        vision_start_token_id=ids["vision_start"],
        vision_end_token_id=ids["vision_end"],
    )
    Qwen3VLForConditionalGeneration(config).save_pretrained(folder)
    area = {"shortest_edge": 32 * 32, "longest_edge": 96 * 96}
    images = Qwen2VLImageProcessorPil(patch_size=8, merge_size=2, size=area)
    chat = CHAT.replace("<image>", "<|vision_start|><|image_pad|><|vision_end|>")
    video = Qwen3VLVideoProcessor(patch_size=8, merge_size=2)
    Qwen3VLProcessor(images, tokenizer, video, chat_template=chat).save_pretrained(folder)


MODELS = [llava_next, qwen2_vl, llava_onevision, idefics3, smolvlm, qwen3_vl]


@pytest.fixture(scope="module", params=MODELS, ids=lambda f: f.__name__)
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


def test_tokens_are_counted_as_the_processor_makes_them(generator, tmp_path):
    """For pictures of many shapes: what is counted before is the length of what is computed."""
    found = set()
    for width, height in ((20, 20), (64, 40), (40, 64), (130, 30), (30, 130), (200, 200)):
        path = tmp_path / f"{width}x{height}.png"
        Image.fromarray(np.full((height, width, 3), 90, np.uint8)).save(path)
        for noise in (None, Noise(kind="blank", seed=1)):
            prompt = Prompt(template="t", text="Is it so?")
            request = Request(prompt=prompt, images=(path,), noise=noise)
            length = plain(generator, request)["input_ids"].shape[1]
            assert generator.count_request(request) == length, (width, height, noise)
            found.add(length)
            if noise:
                assert generator.count_tokens(prompt, 1) == length
    assert len(found) > 1  # these models take more tokens for larger or longer pictures


def test_two_views_are_counted_together(generator, requests):
    """Some models cut a picture into tiles only where it is alone."""
    inputs = generator.inputs
    one = requests[1]
    request = Request(prompt=one.prompt, images=(*one.images, *requests[2].images))
    inputs.max_images = 2
    try:
        length = inputs([request])["input_ids"].shape[1]
        assert generator.count_request(request) == length
    finally:
        inputs.max_images = 1


def test_the_budget_drops_references_by_the_tokens_of_this_picture(generator, tmp_path):
    from mmedrag.answering.prompts import TemplateSet
    from mmedrag.records.records import Example, Hit, Trace

    text = "Seen."
    hits = [Hit(id=f"r{i}", text=text, score=1 - i / 10, rank=i) for i in range(30)]
    asked = {}
    for size in ((20, 20), (200, 30), (200, 200)):
        Image.new("RGB", size).save(tmp_path / f"{size}.png")
        trace = Trace.of(Example.of(tmp_path / f"{size}.png", "Is it so?", answer_type="closed"))
        bare = Request(prompt=Prompt(template="t", text="a"), images=tuple(trace.live.images))
        asked[generator.count_request(bare)] = trace
    kept, before = [], generator.context
    generator.context = min(asked) + 200
    for tokens in (min(asked), max(asked)):
        trace = asked[tokens]
        prompt = TemplateSet().render(trace, hits, generator)
        kept.append(len(prompt.references))
        whole = Request(prompt=prompt, images=tuple(trace.live.images))
        assert generator.count_request(whole) + 16 <= generator.context
    generator.context = before
    assert 0 < kept[0] < 30 and kept[1] < kept[0]
