"""A script with some bodies taken out, to be written anew: signature, docstring and the first checks of shapes stay.

    python -m tests.course.blank micu.py fcmi_loss CUJP.forward -o my_micu.py

Names are those of functions, or of methods and functions inside others with dots. Nothing is overwritten.
"""
import argparse
import ast
import difflib
import sys
from pathlib import Path

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


class UnknownName(ValueError):
    """What was asked for is no function of the script. The message is one line."""


def functions(tree, prefix: str = "") -> dict:
    """{dotted name: node} of every function and class of a module, in order; of two of one name the first."""
    found = {}
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.expr):  # holds no definitions
            continue
        inside = prefix
        if isinstance(node, (*FUNCTIONS, ast.ClassDef)):
            found.setdefault(prefix + node.name, node)
            inside = f"{prefix}{node.name}."
        for name, deeper in functions(node, inside).items():
            found.setdefault(name, deeper)
    return found


def find(text: str, name: str):
    """The node of a function. Raises UnknownName if there is none, naming those most like it."""
    found = functions(ast.parse(text))
    node = found.get(name)
    if isinstance(node, ast.ClassDef):
        methods = [method for method in found if method.startswith(f"{name}.")]
        raise UnknownName(f"{name} is a class; give methods of it: {', '.join(methods)}")
    if node is None:
        near = difflib.get_close_matches(name, found, 3) or [n for n in found if n.endswith(f".{name}")]
        raise UnknownName(f"no function {name}{'; did you mean ' + ', '.join(near) + '?' if near else ''}")
    return node


def is_kept(statement, first: bool) -> bool:
    """A docstring, or a check of a shape, which says what comes in."""
    call = statement.value if isinstance(statement, ast.Expr) else None
    if isinstance(call, ast.Constant):
        return first and isinstance(call.value, str)
    return isinstance(call, ast.Call) and getattr(call.func, "id", "") == "require_shape"


def blank(text: str, name: str) -> str:
    """`text` with the body of the function replaced, from the first statement that is not kept to its end."""
    node = find(text, name)
    body = list(node.body)
    while len(body) > 1 and is_kept(body[0], len(body) == len(node.body)):
        body.pop(0)
    if is_kept(body[0], len(body) == len(node.body)):  # a docstring alone
        return text
    lines = text.splitlines(keepends=True)
    start = body[0].lineno - 1
    before = lines[start].encode()[:body[0].col_offset].decode()  # indentation, or a head on the same line
    while lines[start - 1].strip() == "" or lines[start - 1].lstrip().startswith("#"):
        start -= 1
    return "".join([*lines[:start], f"{before}raise NotImplementedError\n", *lines[node.end_lineno:]])


def main() -> None:
    parser = argparse.ArgumentParser(prog="blank", description="Take bodies of functions out of a script.")
    parser.add_argument("script", type=Path, help="micu.py, or any other Python file")
    parser.add_argument("names", nargs="+", help="functions such as fcmi_loss, methods such as CUJP.forward")
    parser.add_argument("-o", "--out", type=Path, required=True, help="the file to write; it must not exist")
    args = parser.parse_args()
    try:
        text = args.script.read_text()
        for name in sorted(args.names, key=lambda name: -name.count(".")):  # what lies inside comes first
            text = blank(text, name)
        with open(args.out, "x") as stream:
            stream.write(text)
    except UnknownName as error:
        sys.exit(f"error: {args.script}: {error}")
    except SyntaxError as error:
        sys.exit(f"error: {args.script} is no Python file: line {error.lineno}, {error.msg}")
    except FileExistsError:
        sys.exit(f"error: {args.out} is there already; name another file, or remove it")
    except OSError as error:
        sys.exit(f"error: {error.filename}: {error.strerror}")


if __name__ == "__main__":
    main()
