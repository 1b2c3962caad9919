"""The Hugging Face generator on a small random LLaVA, against plain transformers calls."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch")

from mmedrag.answering.generators.decoding import Decoding, SeededSampler, Verbalizers  # noqa: E402
from mmedrag.answering.generators.inputs import expand  # noqa: E402
from mmedrag.answering.generators.load import load_generator  # noqa: E402
from mmedrag.answering.generators.random_model import byte_tokenizer, random_llava  # noqa: E402
from mmedrag.answering.prompts import TemplateSet  # noqa: E402
from mmedrag.images.files import load_image  # noqa: E402
from mmedrag.images.noise import apply_noise  # noqa: E402
from mmedrag.records.protocols import Request  # noqa: E402
from mmedrag.records.records import Hit, Noise, Prompt, Trace, UserError  # noqa: E402

pytestmark = pytest.mark.model
NOISE = Noise(kind="gaussian_clip", seed=5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return random_llava(tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    where = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for i in range(4):
        pixels = rng.integers(0, 255, (40 + 8 * i, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(where / f"{i}.png")
    return sorted(where.glob("*.png"))


@pytest.fixture(scope="module")
def generator(folder):
    return load_generator("hf", folder)


@pytest.fixture(scope="module")
def requests(pictures):
    return [
        Request(
            prompt=Prompt(template="t", text=f"Question: {'is it ' * (i % 5)}so?\nAnswer."),
            images=(pictures[i % 4],),
            noise=NOISE if i % 2 else None,
            closed=i % 3 != 0,
            max_new_tokens=8 if i % 3 else 12,
        )
        for i in range(14)
    ]


def bare_inputs(generator, request):
    """Processor and chat template as any user of transformers would call them."""
    processor = generator.inputs.processor
    picture = load_image(request.images[0])
    if request.noise:
        picture = apply_noise(picture, request.noise, generator.image_size)
    content = [{"type": "image"}, {"type": "text", "text": request.prompt.text}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    return processor(images=[picture], text=[text], return_tensors="pt")


def test_answers_equal_plain_generation_one_by_one(generator, requests):
    for request, answer in zip(requests, generator.generate(requests), strict=True):
        inputs = bare_inputs(generator, request)
        with torch.no_grad():
            out = generator.model.generate(
                **inputs, max_new_tokens=request.max_new_tokens, do_sample=False
            )
            logits = generator.model(**inputs).logits[0, -1]
        length = inputs["input_ids"].shape[1]
        assert generator.count_tokens(request.prompt, 1) == length
        said = generator.tokenizer.decode(out[0, length:], skip_special_tokens=True).strip()
        assert answer.text == said
        if request.closed:
            p = torch.softmax(logits.double(), -1)
            vocabulary = generator.tokenizer.get_vocab()
            words = {
                side: sum(
                    float(p[vocabulary[mark + word]])
                    for mark in ("", "Ġ")
                    for word in words
                    if mark + word in vocabulary
                )
                for side, words in {"yes": ("yes", "Yes", "YES"), "no": ("no", "No", "NO")}.items()
            }
            both = words["yes"] + words["no"]
            assert answer.p_yes == pytest.approx(words["yes"] / both, abs=2e-6)
            assert answer.other_mass == pytest.approx(1 - both, abs=2e-6)


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"temperature": 0.8, "top_p": 0.9}], ids=str
)
def test_same_answers_whatever_the_batch_size(folder, requests, options):
    found = []
    for size in (1, 3, 14):
        answers = load_generator("hf", folder, batch_size=size, **options).generate(requests)
        found.append([(a.text, a.p_yes) for a in answers])
    texts = [[text for text, _ in row] for row in found]
    assert texts[0] == texts[1] == texts[2]
    for row in found[1:]:
        for (_, p), (_, q) in zip(row, found[0], strict=True):
            assert p is q is None or p == pytest.approx(q, abs=2e-6)


def test_logprobs_equal_a_naive_loop(generator, requests):
    texts = ["yes", "no it is not", "it may be so, yes"] * 5
    found = generator.logprobs(requests, texts[: len(requests)])
    for request, text, value in zip(requests, texts, found, strict=False):
        inputs = bare_inputs(generator, request)
        tail = generator.tokenizer(text, add_special_tokens=False)["input_ids"]
        total = 0.0
        for token in [*tail, generator.tokenizer.eos_token_id]:
            with torch.no_grad():
                logits = generator.model(**inputs).logits[0, -1]
            total += float(torch.log_softmax(logits.double(), -1)[token])
            step = torch.tensor([[token]])
            inputs["input_ids"] = torch.cat([inputs["input_ids"], step], 1)
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        assert value == pytest.approx(total, abs=1e-4)


def test_each_image_and_noise_is_encoded_once(folder, requests):
    generator = load_generator("hf", folder, batch_size=4)
    distinct = {(request.images, request.noise is None) for request in requests}
    generator.generate(requests)
    assert generator.facts()["vision_encoded"] == len(distinct)
    generator.generate(requests)  # another condition, the same pictures
    assert generator.facts()["vision_encoded"] == len(distinct)


def test_a_changed_file_is_read_again(folder, pictures, tmp_path):
    generator = load_generator("hf", folder)
    path = tmp_path / "a.png"
    path.write_bytes(pictures[0].read_bytes())
    ask = Request(prompt=Prompt(template="t", text="so?"), images=(path,), closed=True)
    before = generator.generate([ask])[0]
    path.write_bytes(pictures[3].read_bytes())
    assert generator.generate([ask])[0].p_yes != before.p_yes


def test_memory_for_features_is_bounded(folder, pictures):
    generator = load_generator("hf", folder, cache_bytes=1)
    asks = [
        Request(prompt=Prompt(template="t", text="so?"), images=(p,), closed=True) for p in pictures
    ]
    first = [a.p_yes for a in generator.generate(asks)]
    assert len(generator.inputs.features._kept) == 1
    assert first == [a.p_yes for a in load_generator("hf", folder).generate(asks)]


def test_noise_is_seen_at_model_resolution(generator, pictures):
    """The same seed gives the same noise image whatever the file's size (B9)."""
    asks = [
        Request(prompt=Prompt(template="t", text="so?"), images=(p,), noise=NOISE, closed=True)
        for p in pictures
    ]
    assert len({a.p_yes for a in generator.generate(asks)}) == 1


def test_views(folder, pictures):
    text = Prompt(template="t", text="so?")
    two = Request(prompt=text, images=tuple(pictures[:2]), closed=True)
    one = Request(prompt=text, images=(pictures[0],), closed=True)
    first, both = load_generator("hf", folder), load_generator("hf", folder, max_images=2)
    assert first.generate([two])[0].p_yes == first.generate([one])[0].p_yes
    assert both.generate([two])[0].p_yes != both.generate([one])[0].p_yes
    assert both.count_tokens(text, 2) - both.count_tokens(text, 1) == 17  # 16 patches and "\n"


def test_raw_prompts_are_seen_exactly(generator, pictures):
    raw = Prompt(template="t", text="[INST] <image>\nIs it? [/INST]", style="raw")
    assert generator.inputs.text(raw, 1) == raw.text
    assert generator.inputs.text(raw, 0) == "[INST] Is it? [/INST]"
    ids = generator.inputs.request_ids(Request(prompt=raw, images=(pictures[0],)))
    assert ids.count(generator.inputs.image_token_id) == 1


def test_an_image_place_too_many_is_refused(generator, pictures):
    raw = Prompt(template="t", text="<image>\n<image>\nIs it?", style="raw")
    with pytest.raises(UserError, match="2 image places, expected 1"):
        generator.generate([Request(prompt=raw, images=(pictures[0],))])


def test_a_prompt_beyond_the_context_is_refused(generator):
    long = Prompt(template="t", text="word " * 400)
    with pytest.raises(UserError, match="do not fit the context of 512"):
        generator.generate([Request(prompt=long)])


def test_out_of_memory_halves_the_batch_and_says_so(folder, requests):
    generator = load_generator("hf", folder, batch_size=8)
    expected = [a.text for a in generator.generate(requests)]
    true = generator._answer

    def short_of_memory(part, begun):
        if len(part) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory (simulated)")
        return true(part, begun)

    generator._answer = short_of_memory
    assert [a.text for a in generator.generate(requests)] == expected
    assert generator.facts()["batch_size"] == 3
    assert generator.backoffs == [{"from": 5, "to": 3}]  # 14 requests of two kinds: 5 and 8 + 1

    def never(part, begun):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    generator._answer = never
    with pytest.raises(UserError, match="out of memory with a single request"):
        generator.generate(requests)


def test_another_runtime_error_is_not_swallowed(folder, requests):
    generator = load_generator("hf", folder)

    def broken(part, begun):
        raise RuntimeError("shape mismatch")

    generator._answer = broken
    with pytest.raises(RuntimeError, match="shape mismatch"):
        generator.generate(requests)


@pytest.fixture(scope="module")
def adapter(folder, tmp_path_factory):
    """LoRA on the language model, and a changed projector, as RAG-PT leaves them."""
    from peft import LoraConfig, get_peft_model

    model = load_generator("hf", folder).model
    config = LoraConfig(
        r=4,
        target_modules=r".*language_model.*\.(q_proj|v_proj)",
        modules_to_save=["multi_modal_projector"],
        init_lora_weights=False,
    )
    torch.manual_seed(1)
    tuned = get_peft_model(model, config)
    for name, parameter in tuned.named_parameters():
        if "modules_to_save" in name:
            parameter.data += 0.1
    path = tmp_path_factory.mktemp("adapter")
    tuned.save_pretrained(path)
    return path


def test_adapters_share_the_base_and_do_not_leak(folder, adapter, requests):
    base = load_generator("hf", folder)
    plain = [a.p_yes for a in base.generate(requests)]
    alone = load_generator("hf", folder, adapter=adapter)
    tuned = [a.p_yes for a in alone.generate(requests)]
    assert tuned != plain
    shared = base.with_adapter(adapter)
    assert shared.model is base.model
    assert [a.p_yes for a in shared.generate(requests)] == tuned
    assert [a.p_yes for a in base.generate(requests)] == plain
    assert [a.p_yes for a in shared.generate(requests)] == tuned
    assert shared.name.endswith("+" + adapter.name) and "+" not in base.name


def test_a_folder_without_an_adapter_is_refused(generator, tmp_path):
    with pytest.raises(UserError, match="no adapter here"):
        generator.with_adapter(tmp_path)


def test_a_model_that_is_none_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UserError, match="no weights here, expected"):
        load_generator("hf", tmp_path)


def test_sampling_draws_from_the_distribution():
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.2]])).repeat(4000, 1)
    sampler = SeededSampler(Decoding(temperature=1.0), [str(i) for i in range(4000)])
    drawn = torch.bincount(sampler(None, logits).argmax(-1), minlength=3) / 4000
    assert drawn.tolist() == pytest.approx([0.5, 0.3, 0.2], abs=0.03)
    cut = SeededSampler(Decoding(temperature=1.0, top_p=0.6), [str(i) for i in range(4000)])
    drawn = torch.bincount(cut(None, logits).argmax(-1), minlength=3) / 4000
    assert drawn.tolist() == pytest.approx([0.625, 0.375, 0.0], abs=0.03)


def test_decoding_that_makes_no_sense_is_refused():
    for wrong in ({"temperature": -1}, {"top_p": 0}, {"num_beams": 0}):
        with pytest.raises(UserError, match="decoding: "):
            Decoding(**wrong)
    with pytest.raises(UserError, match="exclude each other"):
        Decoding(temperature=1.0, num_beams=2)


def test_verbalizers_are_found_with_and_without_space():
    tokenizer = byte_tokenizer()
    found = Verbalizers.of(tokenizer)
    words = {tokenizer.decode([i]) for i in found.yes}
    assert {"yes", " yes", " Yes"} <= words
    assert {word.strip().lower() for word in words} == {"yes"}
    assert {tokenizer.decode([i]).strip().lower() for i in found.no} == {"no"}
    assert not set(found.yes) & set(found.no)


def test_a_tokenizer_without_whole_words_uses_first_tokens():
    tokenizer = byte_tokenizer(["abc"])
    found = Verbalizers.of(tokenizer)
    assert {tokenizer.decode([i]).strip() for i in found.yes} == {"y", "Y"}
    assert {tokenizer.decode([i]).strip() for i in found.no} == {"n", "N"}


def test_mass_outside_both_is_reported():
    found = Verbalizers((0,), (1,)).read(torch.log(torch.tensor([[0.3, 0.1, 0.6]])))
    assert found == [(0.75, 0.6)]
    assert Verbalizers((), (1,)).read(torch.zeros(2, 3)) == [None, None]


def test_image_places_are_expanded_as_the_processor_does():
    assert expand((5, 9, 6, 9), 9, [2, 3]) == (5, 9, 9, 6, 9, 9, 9)


# --- reasoning before the answer ------------------------------------------------------------------

THOUGHT = "no. not so. " * 12  # several times the tokens of an answer


def taught(folder, picture, prompt_end, replies, opens=False):
    """The model of a folder, its chat template's end changed, fitted to reply so: a real one that
    reasons. ``replies``: question -> the whole reply after the prompt."""
    template = folder / "chat_template.jinja"
    written = template.read_text()
    assert written.rstrip().endswith("ASSISTANT:{% endif %}")
    template.write_text(written.replace("ASSISTANT:{% endif %}", f"{prompt_end}{{% endif %}}"))
    generator = load_generator("hf", folder, dtype="float32", device="cpu")
    asked = [Request(prompt=Prompt(template="t", text=q), images=(picture,)) for q in replies]
    end = generator.tokenizer.eos_token_id
    tails = [
        (*generator.tokenizer(text, add_special_tokens=False)["input_ids"], end)
        for text in replies.values()
    ]
    with torch.no_grad():
        inputs = generator.inputs(asked, [(*tail,) for tail in tails])
    wanted = torch.full(inputs["attention_mask"].shape, -100)
    longest = wanted.shape[1]
    for row, tail in enumerate(tails):
        wanted[row, longest - len(tail) :] = torch.tensor(tail)
    learning = [
        value.requires_grad_(True)
        for name, value in generator.model.named_parameters()
        if "layers" in name or "lm_head" in name or name.endswith("language_model.norm.weight")
    ]
    optimiser = torch.optim.Adam(learning, lr=3e-3)
    places = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    for _ in range(400):
        logits = generator.model(**inputs, position_ids=places, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].reshape(-1, logits.shape[-1]), wanted[:, 1:].reshape(-1)
        )
        if float(loss.detach()) < 0.005:
            break
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert float(loss.detach()) < 0.02
    generator.model.requires_grad_(False).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def thinker(tmp_path_factory, pictures):
    """Its chat template opens the reasoning; one question is answered after much of it."""
    place = tmp_path_factory.mktemp("thinker")
    replies = {"Is it so?": f"{THOUGHT}</think>\nyes", "Is it long?": "no. " * 40}
    return taught(random_llava(place), pictures[0], "ASSISTANT:<think>", replies)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory, pictures):
    """Its template knows the tag but the model decides whether to reason."""
    place = tmp_path_factory.mktemp("mixed")
    hint = "{# <think> #}ASSISTANT:"
    replies = {"Is it so?": f"<think>{THOUGHT}</think>no", "Is it?": "yes " * 20}
    return taught(random_llava(place, seed=1), pictures[0], hint, replies)


def about(picture, question, **more):
    prompt = Prompt(template="t", text=question)
    return Request(prompt=prompt, images=(picture,), closed=True, max_new_tokens=16, **more)


@pytest.mark.parametrize("beams", [1, 2])
def test_reasoning_has_a_budget_of_its_own(thinker, pictures, beams, caplog):
    caplog.set_level("INFO", "mmedrag")
    model = load_generator("hf", thinker, num_beams=beams)
    assert model.reasoning_tokens == 2048 and "may reason before it answers" in caplog.text
    (found,) = model.generate([about(pictures[0], "Is it so?")])
    assert (found.text, found.raw) == ("yes", f"<think>{THOUGHT}</think>\nyes")
    assert found.p_yes > 0.9 and found.finish_reason is None  # read at "yes", not at "no."


def test_p_yes_is_that_of_the_model_fed_its_own_reasoning(thinker, pictures):
    model = load_generator("hf", thinker)
    request = about(pictures[0], "Is it so?")
    (found,) = model.generate([request])
    whole = bare_inputs(model, request)
    ids = model.tokenizer(f"{THOUGHT}</think>\n", add_special_tokens=False)["input_ids"]
    whole["input_ids"] = torch.cat([whole["input_ids"], torch.tensor([ids])], dim=1)
    whole["attention_mask"] = torch.ones_like(whole["input_ids"])
    with torch.inference_mode():
        logits = model.model(**whole).logits[:, -1]
    assert (found.p_yes, found.other_mass) == pytest.approx(
        model.verbalizers.read(logits)[0], abs=1e-4
    )


def test_reasoning_that_is_cut_off_is_unclear(thinker, pictures, caplog):
    model = load_generator("hf", thinker, reasoning_tokens=20)
    for _ in range(2):
        (found,) = model.generate([about(pictures[0], "Is it so?")])
        assert (found.text, found.p_yes, found.finish_reason) == ("", None, "length")
        assert found.raw.startswith("<think>no. not so. no. ")
    assert caplog.text.count("--set generator.reasoning_tokens=40") == 1


def test_a_model_that_knows_the_tag_may_answer_at_once(mixed, pictures):
    model = load_generator("hf", mixed)
    both = [about(pictures[0], "Is it so?"), about(pictures[0], "Is it?")]
    found = model.generate(both)
    assert [answer.text for answer in found] == ["no", ("yes " * 16).strip()]
    assert found[0].p_yes < 0.1 and found[1].p_yes > 0.9
    assert [model.generate([request])[0] for request in both] == found
    short = load_generator("hf", mixed, reasoning_tokens=0).generate(both)
    assert [answer.text for answer in short] == ["", found[1].text]
    assert short[1].p_yes == pytest.approx(found[1].p_yes, abs=2e-6)


def test_references_leave_room_for_reasoning(thinker):
    model = load_generator("hf", thinker)
    hits = [Hit(id=str(i), text="word " * 12, score=1.0, rank=i) for i in range(1, 9)]
    trace = Trace(example_id="x", task="vqa", question="Is it so?", answer_type="closed")
    kept = TemplateSet().render(trace, hits, model).references
    model.reasoning_tokens = 0
    assert len(kept) < len(TemplateSet().render(trace, hits, model).references)


# --- weights that are not the model's -------------------------------------------------------------


def changed(folder, tmp_path, change):
    """A copy of the model with other tensors."""
    from safetensors.torch import load_file, save_file

    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    weights = copy / "model.safetensors"
    save_file(change(load_file(weights)), weights, metadata={"format": "pt"})
    return copy


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda x: {k: v for k, v in x.items() if "linear_1.weight" not in k},
            r"1 tensors of the model are missing .*linear_1\.weight.*mm_projector\.bin",
        ),
        (
            lambda x: {f"module.{k}": v for k, v in x.items()},
            r"missing .* unknown names: module\..*a wrapper added 'module\.'",
        ),
        (
            lambda x: {k.replace("language_model.", "", 1): v for k, v in x.items()},
            r"converted with `mmedrag model convert`",
        ),
        (
            lambda x: {k: v * float("nan") if "linear_2.bias" in k else v for k, v in x.items()},
            r"linear_2\.bias holds NaN",
        ),
        (
            lambda x: {k: v[:5].clone() if "linear_2.bias" in k else v for k, v in x.items()},
            r"another shape .*linear_2\.bias: \(5,\), expected \(64,\)",
        ),
        (
            lambda x: {**x, "language_model.model.layers.0.q.lora_A.weight": torch.zeros(2, 2)},
            r"an adapter's tensors .*lora_A",
        ),
    ],
    ids=["missing", "prefix", "official", "nan", "shape", "lora"],
)
def test_weights_that_are_not_the_whole_model_are_refused(folder, tmp_path, change, said):
    with pytest.raises(UserError, match=said) as error:
        load_generator("hf", changed(folder, tmp_path, change))
    assert "\n" not in str(error.value)


def test_cut_weights_and_pointers_are_named(folder, tmp_path):
    for name, content, said in (
        ("model.safetensors", None, "cut or damaged"),
        ("model.safetensors", b"version https://git-lfs.github.com/spec/v1\noid", "Git LFS"),
        ("tokenizer.json", b"version https://git-lfs.github.com/spec/v1\noid", "Git LFS"),
    ):
        copy = tmp_path / f"{said}-{name}"
        shutil.copytree(folder, copy)
        whole = (copy / name).read_bytes()
        (copy / name).write_bytes(whole[: len(whole) // 2] if content is None else content)
        with pytest.raises(UserError, match=f"{name}.*{said}"):
            load_generator("hf", copy)


def test_a_model_without_its_projector_ends_the_command(folder, tmp_path, pictures, capsys):
    from mmedrag.cli.main import main

    copy = changed(
        folder, tmp_path, lambda x: {k: v for k, v in x.items() if "linear_1.weight" not in k}
    )
    with pytest.raises(SystemExit) as end:
        main(["ask", str(pictures[0]), "Is it so?", "--model", str(copy), "--domain", "radiology"])
    assert end.value.code == 2
    told = capsys.readouterr().err.strip().splitlines()
    assert "linear_1.weight" in told[-1] and "Traceback" not in "".join(told)


# --- adapters under other names -------------------------------------------------------------------

WRAP = "base_model.model."
HF_OLD = (f"{WRAP}model.language_model.", f"{WRAP}language_model.model.")
OFFICIAL = (f"{WRAP}model.language_model.layers", f"{WRAP}model.layers")


def official(key):
    for number, name in ((0, "linear_1"), (2, "linear_2")):
        key = key.replace(f"multi_modal_projector.{name}", f"mm_projector.{number}")
    return key


NAMINGS = {
    "before 4.52": lambda k: k.replace(*HF_OLD).replace(f"{WRAP}model.multi", f"{WRAP}multi"),
    "wrapped twice": lambda k: WRAP + k,
    "default": lambda k: k.replace("lora_A.", "lora_A.default.").replace(
        "lora_B.", "lora_B.default."
    ),
    "official": lambda k: k.replace(*OFFICIAL),
}


def renamed(adapter, tmp_path, naming, beside):
    """A copy of the adapter under other names; the projector beside it, as LLaVA keeps it."""
    from safetensors.torch import load_file, save_file

    copy = tmp_path / "renamed"
    shutil.copytree(adapter, copy)
    weights, settings = copy / "adapter_model.safetensors", copy / "adapter_config.json"
    tensors = load_file(weights)
    if beside:
        apart = {official(k): v for k, v in tensors.items() if "projector" in k}
        tensors = {k: v for k, v in tensors.items() if "projector" not in k}
        torch.save(apart, copy / "non_lora_trainables.bin")
        config = json.loads(settings.read_text())
        config |= {"modules_to_save": None}
        settings.write_text(json.dumps(config))
    save_file({naming(k): v for k, v in tensors.items()}, weights, metadata={"format": "pt"})
    return copy


@pytest.mark.parametrize("naming", NAMINGS)
@pytest.mark.parametrize("beside", [False, True], ids=["inside", "beside"])
def test_an_adapter_of_another_naming_answers_the_same(
    folder, adapter, requests, tmp_path, naming, beside
):
    copy = renamed(adapter, tmp_path, NAMINGS[naming], beside)
    wanted = [a.p_yes for a in load_generator("hf", folder, adapter=adapter).generate(requests)]
    assert [
        a.p_yes for a in load_generator("hf", folder, adapter=copy).generate(requests)
    ] == wanted
    first = load_generator("hf", folder, adapter=adapter)
    assert [a.p_yes for a in first.with_adapter(copy).generate(requests)] == wanted


def test_an_adapter_of_another_model_says_what_differs(folder, adapter, tmp_path):
    foreign = renamed(adapter, tmp_path, lambda k: k.replace("layers.", "blocks."), False)
    with pytest.raises(UserError, match=r"8 of its 12 tensors name a module .*blocks\.0"):
        load_generator("hf", folder, adapter=foreign)


def test_code_beside_an_adapter_never_runs(folder, adapter, tmp_path):
    copy = renamed(adapter, tmp_path, lambda k: k, True)
    mark = tmp_path / "ran"

    class Bad:
        def __reduce__(self):
            return (open, (str(mark), "w"))

    torch.save({"x": Bad()}, copy / "non_lora_trainables.bin")
    with pytest.raises(UserError, match=r"non_lora_trainables\.bin"):
        load_generator("hf", folder, adapter=copy)
    assert not mark.exists()
