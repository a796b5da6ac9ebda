"""Documentation that is run: the examples of README.md and of the docstrings, and what README.md names."""

from __future__ import annotations

import ast
import contextlib
import doctest
import importlib
import inspect
import io
import linecache
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from paths import ROOT

import masked_ops
from masked_ops import _ops, prune

README = (ROOT / "README.md").read_text()


# --- README.md -------------------------------------------------------------------------------------------------------


def blocks(text: str) -> Iterator[tuple[int, str, str]]:
    """(line, language, content) of each fenced block."""
    for match in re.finditer(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        yield text.count("\n", 0, match.start(2)) + 1, match[1], match[2]


def without_paths(output: str) -> str:
    """A report without the paths and the reasons for them: they differ from one CPU to another."""
    lines = output.splitlines()
    for header in lines:
        if header.endswith("path"):
            column = header.index("path")
            lines = [line[:column].rstrip() for line in lines if not re.match(r"\[\d+\] ", line)]
    return "\n".join(lines).strip()


def test_readme_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each block runs in what the ones before it have left, and prints what the block after it says."""
    monkeypatch.chdir(tmp_path)
    # Compiled under a name of its own and cached for tracebacks, which then show README's lines.
    name = str(ROOT / "README.md")
    linecache.cache[name] = (len(README), None, README.splitlines(keepends=True), name)
    namespace: dict[str, Any] = {"__name__": "readme"}
    printed = None
    count = 0
    for line, language, content in blocks(README):
        if language == "python":
            output = io.StringIO()
            with contextlib.redirect_stdout(output):
                exec(compile("\n" * (line - 1) + content, name, "exec"), namespace)
            printed = without_paths(output.getvalue())
            count += 1
        elif language == "text":
            assert printed == without_paths(content), f"README.md, line {line}"
        else:
            raise AssertionError(f"README.md, line {line}: nothing checks a block of {language}")
    assert count > 5


def test_readme_names_each_environment_variable() -> None:
    used = set()
    for path in (ROOT / "masked_ops").glob("*.py"):
        strings = (node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant))
        used |= {text for text in strings if isinstance(text, str) and re.fullmatch(r"MASKED_OPS_[A-Z_]+", text)}
    for path in (ROOT / "csrc").rglob("*.cpp"):
        used |= set(re.findall(r'getenv\("(MASKED_OPS_\w+)"\)', path.read_text()))
    used |= set(re.findall(r'environ\.get\("(MASKED_OPS_\w+)"', (ROOT / "setup.py").read_text()))
    assert {"MASKED_OPS_CACHE_DIR", "MASKED_OPS_CACHE_BYTES", "MASKED_OPS_PREBUILD"} <= used
    assert set(re.findall(r"^\| `(MASKED_OPS_\w+)`", README, re.MULTILINE)) == used


def test_readme_names_what_exists() -> None:
    for target in re.findall(r"(?:^    |`)make (\w+)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), f"make {target}"
    for path in re.findall(r"`([\w./]+/[\w./]*|LICENSE|[A-Z]+\.md)`", README):
        assert (ROOT / path).exists(), path
    for path in _ops.paths():
        assert f"| `{path}` |" in README, path
    for module, name in re.findall(r"`(masked_ops|prune)\.(\w+)", README):
        assert hasattr({"masked_ops": masked_ops, "prune": prune}[module], name), f"{module}.{name}"


# --- docstrings ------------------------------------------------------------------------------------------------------


def modules() -> Iterator[ModuleType]:
    yield masked_ops
    for info in pkgutil.iter_modules(masked_ops.__path__, "masked_ops."):
        if info.name not in ("masked_ops._C", "masked_ops.__main__"):
            yield importlib.import_module(info.name)


def documented(owner: Any, prefix: str) -> Iterator[tuple[str, str]]:
    """(name, docstring) of a module or class and of all that it defines.

    doctest's own finder leaves out what a decorator has wrapped.
    """
    yield prefix, inspect.getdoc(owner) or ""
    for name, value in vars(owner).items():
        member = value.__func__ if isinstance(value, (classmethod, staticmethod)) else value
        home = getattr(member, "__module__", None) or ""
        if inspect.isclass(member) and inspect.ismodule(owner):
            if home.partition(".")[0] == "masked_ops":
                yield from documented(member, f"{prefix}.{name}")
        elif (inspect.isroutine(member) or isinstance(member, property)) and (
            inspect.isclass(owner) or home == owner.__name__
        ):
            yield f"{prefix}.{name}", inspect.getdoc(member) or ""


def examples() -> dict[str, doctest.DocTest]:
    parser = doctest.DocTestParser()
    found: dict[str, doctest.DocTest] = {}
    seen = set()
    for module in modules():
        for name, text in documented(module, module.__name__):
            if ">>>" in text and text not in seen:
                seen.add(text)
                globs = {**vars(module), "torch": torch, "masked_ops": masked_ops, "prune": prune}
                found[name] = parser.get_doctest(text, globs, name, module.__file__, None)
    return found


EXAMPLES = examples()


@pytest.mark.parametrize("name", EXAMPLES)
def test_docstring_example(name: str) -> None:
    output = io.StringIO()
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    failures, attempts = runner.run(EXAMPLES[name], out=output.write, clear_globs=False)
    assert attempts > 0
    assert failures == 0, output.getvalue()


@pytest.mark.parametrize("module", [masked_ops, masked_ops.functional, prune], ids=lambda module: module.__name__)
def test_public_functions_and_layers_have_examples(module: ModuleType) -> None:
    public = {name: getattr(module, name) for name in module.__all__}
    bare = [
        name
        for name, value in public.items()
        if (inspect.isroutine(value) or (inspect.isclass(value) and issubclass(value, torch.nn.Module)))
        and ">>>" not in (inspect.getdoc(value) or "")
    ]
    assert not bare
