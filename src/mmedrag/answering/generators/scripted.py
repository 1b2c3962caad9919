"""A generator that follows a script: deterministic, instant, for tests and dry runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmedrag.records import Answer, Prompt, Request, parse_strict

Script = Callable[[Request], "str | Answer"] | Mapping[str, str] | str


class ScriptedGenerator:
    """Answers from ``script``.

    Args:
        script: a function of the request; a mapping from a piece of prompt text to the answer
            (the longest piece found wins, key ``""`` is the default); or one constant answer.
        model: only a name, kept in ``Answer.model``.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        adapter: str | Path | None = None,
        script: Script = "yes",
        image_size: int = 64,
        context: int = 4096,
        **_options: Any,
    ) -> None:
        self.name = str(model or "scripted")
        self.image_size = image_size
        self.context = context
        self.script = script
        self.calls = 0  # requests seen, for tests

    def generate(self, requests: Sequence[Request]) -> list[Answer]:
        return [self._answer(request) for request in requests]

    def logprobs(self, requests: Sequence[Request], texts: Sequence[str]) -> list[float]:
        """0 for the scripted answer, minus the number of its words for any other text."""
        return [
            0.0 if self._answer(request).text == text else -float(len(text.split()) or 1)
            for request, text in zip(requests, texts, strict=True)
        ]

    def count_tokens(self, prompt: Prompt, images: int = 1) -> int:
        """Whitespace words, 16 for each image."""
        return len(prompt.text.split()) + 16 * images

    def _answer(self, request: Request) -> Answer:
        self.calls += 1
        said = self._say(request)
        answer = said if isinstance(said, Answer) else Answer(text=said, model=self.name)
        if request.closed and answer.p_yes is None:
            label = parse_strict(answer.text)
            answer.p_yes = {"yes": 1.0, "no": 0.0, "unclear": 0.5}[label]
            answer.other_mass = 1.0 if label == "unclear" else 0.0
        return answer

    def _say(self, request: Request) -> str | Answer:
        if callable(self.script):
            return self.script(request)
        if isinstance(self.script, str):
            return self.script
        found = [key for key in self.script if key in request.prompt.text]
        return self.script[max(found, key=len)] if found else ""
