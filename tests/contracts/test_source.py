"""Rules that hold for every source file: size, documentation, and what must never appear."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = sorted([*(ROOT / "quantforge").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])
EVERYTHING = sorted([*LIBRARY, *(ROOT / "tests").rglob("*.py"), *(ROOT / "scripts").rglob("*.py")])
MAX_FILE_LINES = 500  # 400 is the aim
MAX_FUNCTION_LINES = 100  # 60 is the aim

# Call → why it is not allowed. Matched on the syntax tree, so prose may name them.
FORBIDDEN_CALLS = {
    "torch.load": "runs code from a file: use safetensors",
    "torch.save": "writes pickles: use safetensors",
    "eval": "runs text as code",
    "exec": "runs text as code",
    "yaml.load": "use quantforge.strict_yaml",
    "os.system": "goes through a shell: use subprocess with a list",
    "print": "the library returns results; the command line writes them",
}
FORBIDDEN_IMPORTS = {"pickle", "cloudpickle", "dill", "marshal", "shelve", "kernels", "recipes"}
PRINTING = ROOT / "quantforge" / "cli"


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=relative(path))


def dotted(node: ast.expr) -> str:
    """`torch.load` for the expression torch.load; empty for anything that is no plain name."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        owner = dotted(node.value)
        return f"{owner}.{node.attr}" if owner else ""
    return ""


def definitions(
    node: ast.AST, prefix: str = ""
) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]]:
    """Classes and functions with their dotted names, those inside functions left out."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            name = f"{prefix}{child.name}"
            yield name, child
            if isinstance(child, ast.ClassDef):
                yield from definitions(child, f"{name}.")


def forbidden(module: ast.Module) -> list[str]:
    """What of the forbidden a module does, with line numbers."""
    found = []
    for node in ast.walk(module):
        if isinstance(node, ast.Call):
            name = dotted(node.func)
            if name in FORBIDDEN_CALLS:
                found.append(f"{node.lineno}: {name}: {FORBIDDEN_CALLS[name]}")
            for word in node.keywords:
                is_true = isinstance(word.value, ast.Constant) and word.value.value is True
                if word.arg in ("shell", "trust_remote_code", "allow_pickle") and is_true:
                    found.append(f"{node.lineno}: {word.arg}=True")
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""] if node.level == 0 else []
            found += [
                f"{node.lineno}: import {name}"
                for name in names
                if name.partition(".")[0] in FORBIDDEN_IMPORTS
            ]
        elif isinstance(node, ast.ExceptHandler):
            caught = "everything" if node.type is None else dotted(node.type)
            if caught in ("everything", "BaseException"):
                found.append(f"{node.lineno}: except of {caught}")
        elif isinstance(node, ast.Global):
            found.append(f"{node.lineno}: global {', '.join(node.names)}")
    return found


def test_there_is_something_to_check() -> None:
    names = {relative(path) for path in LIBRARY}
    assert {"quantforge/types.py", "kernels/quantforge_kernels/__init__.py"} <= names


@pytest.mark.parametrize("path", EVERYTHING, ids=relative)
def test_files_and_functions_stay_readable(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_FILE_LINES, f"{relative(path)} has {lines} lines: it is two files"
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length <= MAX_FUNCTION_LINES, f"{node.name} has {length} lines"


@pytest.mark.parametrize("path", LIBRARY, ids=relative)
def test_public_names_are_documented(path: Path) -> None:
    module = tree(path)
    assert ast.get_docstring(module), "a module starts with the idea behind it"
    undocumented = [
        name
        for name, node in definitions(module)
        if not any(part.startswith("_") for part in name.split("."))
        and ast.get_docstring(node) is None
    ]
    assert undocumented == []


def test_hessians_are_named_where_the_loss_is_meant() -> None:
    """The inputs' second moment, which GPTQ's papers call Hessian, is the gram here."""
    about_the_loss = re.compile(r"curvature|landscape|spectra")
    named = {
        f"{relative(path)}: {name}"
        for path in LIBRARY
        if not about_the_loss.search(relative(path))
        for node in ast.walk(tree(path))
        for name in (
            getattr(node, "name", None),
            getattr(node, "id", None),
            getattr(node, "arg", None),
        )
        if isinstance(name, str) and "hessian" in name.lower() and name != "LossHessian"
    }
    assert not named


@pytest.mark.parametrize("path", LIBRARY, ids=relative)
def test_nothing_dangerous_is_called(path: Path) -> None:
    found = forbidden(tree(path))
    if PRINTING in path.parents:
        found = [line for line in found if ": print:" not in line]
    assert found == []


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("torch.load('x')", "torch.load"),
        ("eval('1')", "eval: runs text"),
        ("model.eval()", None),
        ("subprocess.run('x', shell=True)", "shell=True"),
        ("from_pretrained(x, trust_remote_code=True)", "trust_remote_code=True"),
        ("from_pretrained(x, trust_remote_code=flag)", None),
        ("import pickle", "import pickle"),
        ("from pickle import loads", "import pickle"),
        ("import kernels.x", "import kernels.x"),
        ("from quantforge_kernels import x", None),
        ("try: x\nexcept: pass", "2: except of everything"),
        ("try: x\nexcept BaseException: pass", "except of BaseException"),
        ("try: x\nexcept ValueError: pass", None),
        ("def f():\n global x", "global x"),
        ("print(1)", "print"),
        ('"""torch.load is forbidden"""', None),
    ],
)
def test_the_check_sees_what_it_must(code: str, expected: str | None) -> None:
    found = forbidden(ast.parse(code))
    assert len(found) == (expected is not None)
    assert all(expected in line for line in found if expected)


# Written in two halves, so that this file does not hold what it looks for.
FORBIDDEN_TEXT = {
    r"/(?:work|" + r"farm|opt/pypi|tmp/w)[/-]": "a path of one machine",
    r"files\.python" + r"hosted|download\.py" + r"torch": "the host of a registry",
    r"\b(?:TO" + r"DO|FIX" + r"ME|XX" + r"X)\b": "an unfinished thing",
}


@pytest.mark.parametrize("pattern", FORBIDDEN_TEXT, ids=list(FORBIDDEN_TEXT.values()))
def test_no_file_names_what_no_file_should(pattern: str) -> None:
    folders = ("quantforge", "kernels", "recipes", "scripts", "tests", "docs", ".ci")
    suffixes = {".py", ".md", ".yaml", ".toml", ".sh", ".svg", ".cpp", ".h", ""}
    files = [p for folder in folders for p in (ROOT / folder).rglob("*") if p.is_file()]
    files += [p for p in ROOT.iterdir() if p.is_file() and p.name not in ("LICENSE", ".git")]
    hits = [
        f"{relative(path)}:{number}"
        for path in files
        if path.suffix in suffixes and "__pycache__" not in path.parts
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if re.search(pattern, line)
    ]
    assert hits == []
