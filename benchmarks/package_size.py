"""Count the package: modules, lines, lengths of functions, long files. Run `python benchmarks/package_size.py`."""

from __future__ import annotations

import ast
import statistics
from pathlib import Path

ROOT = Path(__file__).parents[1] / "pldr_train"
LONG_FILE_LINES = 400


def function_lines(source: str) -> list[int]:
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    found = [node for node in ast.walk(ast.parse(source)) if isinstance(node, kinds)]
    return [(node.end_lineno or node.lineno) - node.lineno + 1 for node in found]


def main() -> None:
    modules = sorted(ROOT.rglob("*.py"))
    scripts = sorted(ROOT.rglob("*.js"))
    lines = {path: len(path.read_text().splitlines()) for path in (*modules, *scripts)}
    functions = sorted(length for path in modules for length in function_lines(path.read_text()))
    deciles = statistics.quantiles(functions, n=10)
    print(f"modules: {len(modules)} (and {len(scripts)} of JavaScript)")
    print(f"lines: {sum(lines.values()):,}, of which Python {sum(lines[path] for path in modules):,}")
    print(f"functions: {len(functions):,}, lines p50 {deciles[4]:.0f}, p90 {deciles[8]:.0f}, max {functions[-1]}")
    print(f"files over {LONG_FILE_LINES} lines:")
    for path, count in sorted(lines.items(), key=lambda pair: -pair[1]):
        if count > LONG_FILE_LINES:
            print(f"  {count:4} {path.relative_to(ROOT.parent)}")
    print("modules by folder:")
    for folder in sorted({path.parent for path in modules}):
        inside = [path for path in modules if path.parent == folder]
        print(f"  {len(inside):3} {sum(lines[path] for path in inside):6,} {folder.relative_to(ROOT.parent)}")


if __name__ == "__main__":
    main()
