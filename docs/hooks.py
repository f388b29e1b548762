"""What pages of the documentation take from the code: settings, commands, errors, and the READMEs of deploy/.

A page says ``<!-- settings -->``, ``<!-- commands -->``, ``<!-- errors -->`` or ``<!-- readme FOLDER -->``.
"""

import ast
import itertools
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import click
import typer

from h2mv_dist import errors
from h2mv_dist.cli import app
from h2mv_dist.template import settings_template

ROOT = Path(__file__).parents[1]
_MARK = re.compile(r"<!-- (settings|commands|errors|readme) ?(\S*) -->")
_LINK = re.compile(r"\[([^]]+)\]\((?!https?:|#)[^)]+\)")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace the marks of a page; called by mkdocs."""
    return _MARK.sub(lambda mark: _MAKERS[mark[1]](mark[2]), markdown)


def _settings(_: str) -> str:
    return f"```toml\n{settings_template()}```\n"


def _readme(folder: str) -> str:
    """A README without its title; its links to files are shown as names."""
    _, _, text = (ROOT / folder / "README.md").read_text().partition("\n")
    return _LINK.sub(r"\1", text)


def _commands(_: str) -> str:
    return "\n".join(_described(typer.main.get_command(app), "h2mv-dist"))


def _described(command: click.Command, name: str) -> Iterator[str]:
    if isinstance(command, click.Group):
        for part in command.commands.values():
            yield from _described(part, f"{name} {part.name}")
        return
    context = click.Context(command, info_name=name)
    yield f"## `{name}`\n\n```text\n{command.get_help(context)}\n```\n"


class _Error(NamedTuple):
    what: str
    expected: str
    fix: str


def _errors(_: str) -> str:
    described = sorted(set(map(_described_error, _calls("describe", "_described"))))
    rows = (
        f"| {_cell(e.what)} | {_cell(e.expected)} | {_cell(e.fix)} |"
        for e in described
        if _says_something(e.what)
    )
    lines = sorted({f"- {_cell(text)}" for text in _one_line_errors() if _says_something(text)})
    table = ("| Message | Expected | What to do |", "|---|---|---|", *rows)
    return "\n".join((*table, "", "## In one line", "", *lines)) + "\n"


def _described_error(call: ast.Call) -> _Error:
    given = {word.arg: _text(word.value) for word in call.keywords}
    return _Error(_text(call.args[0]), given.get("expected", ""), given.get("fix", ""))


def _one_line_errors() -> Iterator[str]:
    """The texts of errors that are not described in five parts."""
    ours = [name for name, kind in vars(errors).items() if isinstance(kind, type)]
    for call in _calls(*ours):
        if isinstance(call.args[0], ast.Constant | ast.JoinedStr | ast.BinOp):
            yield _text(call.args[0])


def _says_something(text: str) -> bool:
    """Whether there are words beside what depends on the case."""
    return re.search(r"[a-z]{3}", re.sub(r"<[^>]*>", "", text)) is not None


def _calls(*names: str) -> Iterator[ast.Call]:
    """Every call of these functions or classes in the source, with what is known of its texts filled in."""
    for path in sorted((ROOT / "h2mv_dist").rglob("*.py")):
        module = ast.parse(path.read_text())
        for node in ast.walk(_Filled(module).visit(module)):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in names and node.args:
                yield node


class _Filled(ast.NodeTransformer):
    """Puts texts where names stand for them, of its module or function, and hints where they are made."""

    def __init__(self, module: ast.Module) -> None:
        self.texts = _texts_of(module.body)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        outer, self.texts = self.texts, self.texts | _texts_of(ast.walk(node))
        self.generic_visit(node)
        self.texts = outer
        return node

    def visit_Call(self, node: ast.Call) -> ast.expr:
        if getattr(node.func, "id", "") == "nearest":
            return ast.Constant("did you mean <another>?")
        self.generic_visit(node)
        return node

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return self.texts.get(node.id, node) if isinstance(node.ctx, ast.Load) else node


def _texts_of(nodes: Iterable[ast.AST]) -> dict[str, ast.expr]:
    """Names that stand for texts or numbers alone; for several in turn, all of them."""
    found: dict[str, ast.expr] = {}
    others = set()
    for name, value in itertools.chain.from_iterable(map(_assigned, nodes)):
        if isinstance(value, ast.JoinedStr | ast.Constant):
            found[name] = ast.IfExp(value, found[name], value) if name in found else value
        else:
            others.add(name)
    return {name: value for name, value in found.items() if name not in others}


def _assigned(node: ast.AST) -> Iterator[tuple[str, ast.expr]]:
    match node:
        case ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value):
            yield name, value
        case ast.Assign(targets=[ast.Name(id=name)], value=ast.IfExp(body=body, orelse=other)):
            yield from ((name, body), (name, other))
        case ast.Assign(targets=[ast.Name(id=name)], value=value):
            yield name, value
        case ast.Assign(targets=[ast.Tuple(elts=names)], value=ast.Tuple(elts=values)):
            pairs = zip(names, values, strict=False)
            yield from ((name.id, value) for name, value in pairs if isinstance(name, ast.Name))


def _text(node: ast.expr) -> str:
    match node:
        case ast.Constant(value=value):
            return str(value)
        case ast.JoinedStr(values=parts):
            return "".join(_text(part) for part in parts)
        case ast.FormattedValue(value=value):
            return _text(value)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return _text(left) + _text(right)
        case ast.IfExp(body=body, orelse=other):
            return " / ".join(filter(None, (_text(body), _text(other))))
        case _:
            return f"<{_named(node)}>"


def _named(node: ast.expr) -> str:
    """A name for what depends on the case: that of a variable, without what is done to it."""
    match node:
        case (
            ast.Attribute(attr=name) | ast.Name(id=name) | ast.Subscript(slice=ast.Constant(value=str(name)))
        ):
            return name.strip("_")
        case ast.Call(args=[first, *_]):
            return _named(first)
        case ast.Call(func=function):
            return _named(function)
        case ast.Subscript(value=value) | ast.Starred(value=value) | ast.BinOp(left=value):
            return _named(value)
        case ast.GeneratorExp(elt=value) | ast.ListComp(elt=value):
            return _text(value).strip("<>")
        case _:
            return "..."


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


_MAKERS = {"settings": _settings, "commands": _commands, "errors": _errors, "readme": _readme}
