"""The contrastive training loop: any pairs, any CLIP-like towers.

Place in the picture: inside ``train_retriever``; the small shipped encoders are trained by it
too. Large batches fit small memory by gradient caching; the schedule is computed from the steps
there really are and no partial batch is dropped (B2 of docs/differences.md); equal texts do not
push each other away. Every random choice of a step is drawn from (seed, step) alone, so a
resumed run repeats them. (Batch norm, where a tower has it, sees one chunk at a time.)
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from mmedrag.records import UserError
from mmedrag.retrieval.encoders.base import Towers, fastest_dtype
from mmedrag.retrieval.encoders.windows import windows
from mmedrag.retrieval.loss import MAX_LOG_SCALE, cached_backward, false_negatives, info_nce
from mmedrag.retrieval.settings import RetrieverTraining
from mmedrag.runtime import Processes

log = logging.getLogger(__name__)
Tracker = Callable[[dict[str, float], int], None]  # (metrics, step), e.g. to TensorBoard


@dataclass
class Pairs:
    """Training pairs: ``pixels`` is a tensor [n, 3, H, W] (float, normalised), or a function
    from picture numbers to such a batch. ``views``: picture numbers of each pair (None: pair i
    has picture i)."""

    texts: list[str]
    pixels: torch.Tensor | Callable[[list[int]], torch.Tensor]
    views: list[list[int]] | None = None

    def batch(self, numbers: list[int]) -> torch.Tensor:
        if isinstance(self.pixels, torch.Tensor):
            return self.pixels[numbers].float()
        return self.pixels(numbers)


@dataclass
class Step:
    """What one optimiser step looks at, drawn from (seed, number) alone."""

    number: int
    pairs: list[int]
    pictures: list[int]
    windows: torch.Tensor  # [b] in 0..1: which window of a long text
    crops: torch.Tensor  # [b, 3] in 0..1


def total_steps(count: int, s: RetrieverTraining) -> int:
    steps = math.ceil(count / s.batch_size) * s.epochs
    return min(steps, s.max_steps) if s.max_steps else steps


def learning_rate(step: int, total: int, s: RetrieverTraining) -> float:
    """Linear warm-up, then half a cosine down to 0 over the steps there really are."""
    warm = round(s.warmup * total) if s.warmup < 1 else int(s.warmup)
    if step < warm:
        return s.lr * (step + 1) / warm
    return s.lr * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, total - warm)))


def steps(pairs: Pairs, s: RetrieverTraining, start: int = 0) -> Iterator[Step]:
    """Every pair once per epoch; the last batch is as small as it comes out."""
    count = len(pairs.texts)
    per_epoch = math.ceil(count / s.batch_size)
    for number in range(start, total_steps(count, s)):
        epoch, at = divmod(number, per_epoch)
        order = torch.randperm(count, generator=_dice(s.seed, 0, epoch)).tolist()
        chosen = order[at * s.batch_size : (at + 1) * s.batch_size]
        draw = torch.rand(len(chosen), 5, generator=_dice(s.seed, 1, number))
        views = [[i] for i in chosen] if pairs.views is None else [pairs.views[i] for i in chosen]
        pick = draw[:, 0].tolist() if s.views == "random" else [0.0] * len(chosen)
        pictures = [v[int(r * len(v))] for v, r in zip(views, pick, strict=True)]
        yield Step(number, chosen, pictures, draw[:, 1], draw[:, 2:])


def _dice(seed: int, purpose: int, number: int) -> torch.Generator:
    return torch.Generator().manual_seed((seed * 2 + purpose) * 1_000_000_007 + number)


def crop(pixels: torch.Tensor, smallest: float, draw: torch.Tensor) -> torch.Tensor:
    """Random crop of ``smallest``..1 of the area, resized back (open_clip trains on 0.9..1).

    ``draw`` [b, 3] in 0..1: size, left-right, up-down.
    """
    if smallest >= 1:
        return pixels
    side = torch.sqrt(smallest + (1 - smallest) * draw[:, 0])
    theta = torch.zeros(len(pixels), 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = side
    theta[:, :, 2] = (1 - side)[:, None] * (2 * draw[:, 1:] - 1)
    grid = F.affine_grid(theta, list(pixels.shape), align_corners=False).to(pixels.device)
    return F.grid_sample(pixels, grid, padding_mode="reflection", align_corners=False)


# --- the loop ----------------------------------------------------------------------------------


class Trainer:
    """A running training: model, optimiser, position, best weights so far."""

    def __init__(
        self, towers: Towers, pairs: Pairs, s: RetrieverTraining, device: str | None = None
    ) -> None:
        self.towers, self.pairs, self.s = towers, pairs, s
        self.processes = Processes.of_launch()
        self.device = self.processes.device(device)
        self.model = towers.model.to(self.device)
        self.scale = scale_of(self.model)
        _freeze(self.model, s)
        if s.init_scale:
            self.scale.data.fill_(s.init_scale)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimiser = _optimiser(self.model, s)
        if 0 < len(pairs.texts) % s.batch_size < self.processes.size:
            raise UserError(
                f"train retriever: the last batch has {len(pairs.texts) % s.batch_size} pairs for "
                f"{self.processes.size} processes, choose another batch_size"
            )
        self.total, self.step = total_steps(len(pairs.texts), s), 0
        self.best: dict[str, Any] = {"value": -math.inf, "step": 0, "since": 0}
        self.best_weights: dict[str, torch.Tensor] | None = None
        self.history: list[dict[str, float]] = []
        self.losses: list[float] = []
        self.amp = self._amp()
        self.windows = [_windows(towers, text, s.long_text) for text in pairs.texts]

    def run_step(self, step: Step, pixels: torch.Tensor) -> float:
        """Forward, backward and update on one batch. Returns the loss over all devices.

        ``pixels``: this process's part of the batch (``processes.mine``).
        """
        s, mine = self.s, self.processes.mine(len(step.pairs))
        rate = learning_rate(step.number, self.total, s)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        masked = None
        if s.mask_identical:
            masked = false_negatives([self.pairs.texts[i] for i in step.pairs])
        shown = [
            self.windows[i][int(r * len(self.windows[i]))]
            for i, r in zip(step.pairs[mine], step.windows[mine].tolist(), strict=True)
        ]
        pixels = crop(pixels, s.crop, step.crops[mine]).to(self.device)
        images = list(pixels.split(s.chunk))
        texts = [shown[i : i + s.chunk] for i in range(0, len(shown), s.chunk)]

        def loss(v: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            both = [self.processes.gather(rows, len(step.pairs)) for rows in (v, t)]
            return info_nce(both[0], both[1], self.scale, masked)

        self.model.train()
        torch.manual_seed(s.seed * 1_000_003 + step.number)  # dropout, where there is any
        self.optimiser.zero_grad(set_to_none=True)
        if len(texts) == 1 and self.processes.size == 1:
            value = loss(self.encode_images(images[0]), self.encode_texts(texts[0]))
            value.backward()
            result = float(value.detach())
        else:
            result = cached_backward(self.encode_images, self.encode_texts, images, texts, loss)
        self.processes.sum_gradients(p for p in self.trained if p is not self.scale)
        if s.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(self.trained, s.max_grad_norm)
        self.optimiser.step()
        with torch.no_grad():
            self.scale.clamp_(0, MAX_LOG_SCALE)
        self.step = step.number + 1
        return result

    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        with self._cast(self.amp):
            return self.towers.image_features(pixels).float()

    def encode_texts(self, texts: list[str]) -> torch.Tensor:
        tokens = {k: v.to(self.device) for k, v in self.towers.tokenize(texts).items()}
        with self._cast(self.amp):
            return self.towers.text_features(tokens).float()

    def _cast(self, dtype: torch.dtype | None) -> torch.autocast:
        return torch.autocast(self.device.type, dtype or torch.bfloat16, enabled=dtype is not None)

    def _amp(self) -> torch.dtype | None:
        """The autocast type: the faster one by measurement when "auto"; None for plain fp32."""
        if self.s.dtype != "auto":
            return torch.bfloat16 if self.s.dtype == "bfloat16" else None
        sample = self.pairs.batch([0] * 16).to(self.device)

        def run(dtype: torch.dtype) -> None:
            with self._cast(None if dtype is torch.float32 else dtype):
                self.towers.image_features(sample).float().sum().backward()
            self.model.zero_grad(set_to_none=True)

        chosen = fastest_dtype(run, self.device)
        return None if chosen is torch.float32 else chosen

    # --- state ---------------------------------------------------------------------------------

    def note(self, metrics: dict[str, float]) -> None:
        """Remember a validation result, and the weights if they are the best so far."""
        self.history.append({"step": self.step, **metrics})
        if metrics["value"] > self.best["value"]:
            self.best = {"value": metrics["value"], "step": self.step, "since": 0}
            self.best_weights = {k: v.detach().cpu().clone() for k, v in _weights(self.model)}
        else:
            self.best["since"] += 1

    def save(self, folder: Path, identity: dict[str, Any]) -> None:
        """Write a checkpoint; it replaces the one before in two renames."""
        from safetensors.torch import save_file

        new = folder.with_name(folder.name + ".part")
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
        save_file(
            {k: v.detach().cpu().clone() for k, v in _weights(self.model)},
            new / "weights.safetensors",
        )
        if self.best_weights is not None:
            save_file(self.best_weights, new / "best.safetensors")
        torch.save(self.optimiser.state_dict(), new / "optimiser.pt")
        names = ("step", "best", "history", "losses")
        state = {**{name: getattr(self, name) for name in names}, **identity}
        (new / "state.json").write_text(json.dumps(state, indent=1), encoding="utf-8")
        for path in new.iterdir():
            with open(path, "rb") as handle:
                os.fsync(handle.fileno())
        old = folder.with_name(folder.name + ".old")
        if folder.exists():
            os.replace(folder, old)
        os.replace(new, folder)
        shutil.rmtree(old, ignore_errors=True)

    def load(self, folder: Path, identity: dict[str, Any]) -> bool:
        """Go on from a checkpoint, if there is one.

        Raises:
            UserError: it belongs to other settings or other data.
        """
        from safetensors.torch import load_file

        old = folder.with_name(folder.name + ".old")  # killed between the two renames
        source = folder if folder.exists() else old
        if not source.exists():
            return False
        state = json.loads((source / "state.json").read_text(encoding="utf-8"))
        for name, value in identity.items():
            if state.get(name) != value:
                raise UserError(
                    f"{folder}: an unfinished training with other {name}; finish it with the same "
                    "command, or remove the folder"
                )
        self.model.load_state_dict(load_file(source / "weights.safetensors"), strict=False)
        if (source / "best.safetensors").exists():
            self.best_weights = load_file(source / "best.safetensors")
        self.optimiser.load_state_dict(torch.load(source / "optimiser.pt", weights_only=True))
        for name in ("step", "best", "history", "losses"):
            setattr(self, name, state[name])
        log.info("resumed at step %d of %d", self.step, self.total)
        return True


def train_towers(
    towers: Towers,
    pairs: Pairs,
    settings: RetrieverTraining,
    checkpoint: Path | None = None,
    validate: Callable[[], dict[str, float]] | None = None,
    device: str | None = None,
    tracker: Tracker | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Train ``towers`` in place; afterwards they hold the best (or last) weights.

    Args:
        checkpoint: folder of the running state; training goes on from it and removes it at the
            end. validate: called after every ``settings.evaluate`` epochs with the model in
            eval mode; its ``value`` decides what is best.

    Returns:
        ``steps``, ``loss`` (last), ``best``, ``history``.
    """
    if not pairs.texts:
        raise UserError("train retriever: no pairs, expected corpus rows with image and text")
    run = Trainer(towers, pairs, settings, device)
    data = hashlib.sha256("\0".join(pairs.texts).encode()).hexdigest()
    identity = {"settings": asdict(settings), "data": data}
    if checkpoint:
        run.load(checkpoint, identity)
    per_epoch = math.ceil(len(pairs.texts) / settings.batch_size)
    losses = run.losses

    def load(step: Step | None) -> torch.Tensor | None:
        return (
            None
            if step is None
            else pairs.batch(step.pictures[run.processes.mine(len(step.pairs))])
        )

    plan = steps(pairs, settings, run.step)
    with ThreadPoolExecutor(max_workers=1) as pool:  # the next batch is read while one is used
        step = next(plan, None)
        waiting = pool.submit(load, step)
        while step is not None:
            pixels, current, step = waiting.result(), step, next(plan, None)
            waiting = pool.submit(load, step)
            assert pixels is not None
            losses.append(run.run_step(current, pixels))
            if tracker and run.processes.first:
                tracker({"loss": losses[-1], "scale": float(run.scale.detach().exp())}, run.step)
            if progress:
                progress(run.step, run.total)
            ends = run.step % per_epoch == 0 and run.step // per_epoch % settings.evaluate == 0
            if validate and (ends or run.step == run.total):
                run.model.eval()
                metrics = {"loss": sum(losses[-per_epoch:]) / len(losses[-per_epoch:])}
                run.note({**metrics, **validate()})
                log.info("step %d/%d: %s", run.step, run.total, run.history[-1])
                if tracker and run.processes.first:
                    tracker({f"val/{k}": v for k, v in run.history[-1].items()}, run.step)
            if settings.patience and run.best["since"] >= settings.patience:
                break
            if checkpoint and run.processes.first and run.step % settings.save_every == 0:
                run.save(checkpoint, identity)
    if settings.keep == "best" and run.best_weights is not None:
        run.model.load_state_dict(run.best_weights, strict=False)
    run.model.eval()
    run.processes.wait()
    return {
        "steps": run.step,
        "loss": losses[-1] if losses else None,
        "losses": losses,
        "best": run.best,
        "history": run.history,
        "dtype": str(run.amp or torch.float32).removeprefix("torch."),
    }


# --- parts -------------------------------------------------------------------------------------


def scale_of(model: torch.nn.Module) -> torch.nn.Parameter:
    """ln τ of the model; both libraries call it ``logit_scale``."""
    found = getattr(model, "logit_scale", None)
    if not isinstance(found, torch.nn.Parameter):
        raise UserError(f"train retriever: {type(model).__name__} has no logit_scale")
    return found


def _weights(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The state dict, tensors that share memory once."""
    seen: set[int] = set()
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() not in seen or tensor.numel() == 0:
            seen.add(tensor.data_ptr())
            yield name, tensor.contiguous()


def _freeze(model: torch.nn.Module, s: RetrieverTraining) -> None:
    """Towers are told apart by the names both libraries use: ``visual`` or ``vision_model``."""
    for name, parameter in model.named_parameters():
        image = name.split(".")[0].startswith("vis")
        if name == "logit_scale":
            parameter.requires_grad_(s.learn_scale)
        elif s.freeze != "none":
            parameter.requires_grad_(image != (s.freeze == "image"))


def _optimiser(model: torch.nn.Module, s: RetrieverTraining) -> torch.optim.AdamW:
    """AdamW without decay of gains, biases and τ, as open_clip's trainer does."""
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    decayed = [p for _, p in named if p.ndim >= 2]
    plain = [p for _, p in named if p.ndim < 2]
    groups = [
        {"params": decayed, "weight_decay": s.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=s.lr, betas=(s.beta1, s.beta2), eps=s.eps)


def _windows(towers: Towers, text: str, long_text: str) -> list[str]:
    if long_text == "truncate":
        return [text]
    return windows(text, lambda t: towers.lengths([t])[0], towers.context) or [text]
