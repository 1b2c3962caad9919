"""No folder's code is run: every loading call of a library says so, and adapters load nothing."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import mmedrag

SOURCES = sorted(Path(mmedrag.__file__).parent.rglob("*.py"))
# PEFT's take no such argument: which class is built follows from a fixed table of peft_type, and
# models.adapters lets none through whose configuration names something else to load
FREE = {"PeftModel", "PeftConfig"}


def says_no(call: ast.Call, module: ast.Module) -> bool:
    """``trust_remote_code=False`` in the call, or in the dict of the module that it unpacks."""

    def no(value: ast.expr) -> bool:
        return isinstance(value, ast.Constant) and value.value is False

    for word in call.keywords:
        if word.arg == "trust_remote_code":
            return no(word.value)
    unpacked = {w.value.id for w in call.keywords if not w.arg and isinstance(w.value, ast.Name)}
    for node in ast.walk(module):
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and isinstance(node.value, ast.Dict):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            named = {t.id for t in targets if isinstance(t, ast.Name)}
            for key, value in zip(node.value.keys, node.value.values, strict=True):
                known = isinstance(key, ast.Constant) and key.value == "trust_remote_code"
                if named & unpacked and known and no(value):
                    return True
    return False


def loading_calls(module: ast.Module) -> list[ast.Call]:
    return [
        node
        for node in ast.walk(module)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "from_pretrained"
    ]


def test_every_loading_call_refuses_code() -> None:
    seen, open_ = 0, []
    for path in SOURCES:
        module = ast.parse(path.read_text(encoding="utf-8"))
        for call in loading_calls(module):
            seen += 1
            assert isinstance(call.func, ast.Attribute)
            owner = call.func.value
            free = isinstance(owner, ast.Name) and owner.id in FREE
            if not free and not says_no(call, module):
                open_.append(f"{path.name}:{call.lineno}")
    assert seen >= 10 and not open_


@pytest.mark.parametrize(
    ("code", "right"),
    [
        ("A.from_pretrained(x)", False),
        ("A.from_pretrained(x, trust_remote_code=True)", False),
        ("A.from_pretrained(x, trust_remote_code=False)", True),
        ("how = {'a': 1}\nA.from_pretrained(x, **how)", False),
        ("safe = {'trust_remote_code': False}\nA.from_pretrained(x, **safe)", True),
        ("safe = {'trust_remote_code': y}\nA.from_pretrained(x, **safe)", False),
    ],
)
def test_the_search_finds_what_it_looks_for(code: str, right: bool) -> None:
    module = ast.parse(code)
    (call,) = loading_calls(module)
    assert says_no(call, module) is right


def test_no_switch_of_other_libraries_is_thrown() -> None:
    """``torch.load`` and ``np.load`` never unpickle objects."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            owner = ast.unparse(node.func)
            words = {w.arg: ast.unparse(w.value) for w in node.keywords}
            where = f"{path.name}:{node.lineno}"
            if owner == "torch.load":
                assert words.get("weights_only") == "True", where
            if owner in ("np.load", "numpy.load"):
                assert words.get("allow_pickle", "False") == "False", where
            assert words.get("trust_remote_code", "False") == "False", where
