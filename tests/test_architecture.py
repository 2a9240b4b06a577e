"""The rules that hold the shape of the code: floors, cycles, light imports, sizes, config headers.

Each rule is a function of a source tree that returns its violations. It is applied to this project,
and to small trees that break it, so that a rule that notices nothing does not pass for a kept one.
"""

import ast
import graphlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
SOURCE = REPOSITORY / "src" / "fedsafe"

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60

# A module, or a package with all inside it; whatever is not named here is on ORDINARY_FLOOR.
FLOORS = {
    "cli": 1,
    "commands": 1,
    "__main__": 1,
    "table": 2,
    "table_checks": 2,
    "table_files": 2,
    "table_folders": 2,
    "table_report": 2,
    "table_runs": 2,
    "table_settings": 2,
    "table_summary": 2,
    "table_workers": 2,
    "page": 2,
    "report": 2,
    "results_report": 2,
    "guard_report": 2,
    "compare": 2,
    "compare_report": 2,
    "compare_settings": 2,
    "federated.rounds": 3,
    "federated.local_training": 3,
    "federated.server_steps": 3,
    "federated.server_visit": 3,
    "federated.constitutional_server": 3,
    "federated.round_evaluation": 3,
    "federated.progress": 3,
    "federated.planning": 3,
    "federated.run_files": 3,
    "federated.remote.rounds": 3,
    "federated.remote.remote_data": 3,
    "federated.remote.own_data": 3,
    "federated.remote.client_trainer": 3,
    "federated.flower.server_app": 1,
    "federated.flower.resident": 1,
    "model.module": 3,
    "data.datamodule": 3,
    "data.filtered": 4,
    "data.augmentation": 4,
    "evaluation": 3,
    "safety.filter": 4,
    "safety.filter_file": 4,
    "safety.model_speaker": 4,
    "safety.revision": 4,
    "safety.revision_file": 4,
    "types": 6,
    "": 6,  # fedsafe/__init__.py, which holds the version
}
ORDINARY_FLOOR = 5

PURE_MODULES = tuple(
    f"federated.{name}" for name in ("aggregation", "schedule", "partition", "server_optimizer")
)
FRAMEWORKS = frozenset({"lightning", "pytorch_lightning", "transformers", "peft"})
HEAVY = ("torch", "lightning", "transformers", "peft", "datasets", "matplotlib", "numpy")

CONFIG_COMMAND = re.compile(r"\bfedsafe [a-z]+")


class Module(NamedTuple):
    """What one file imports, anywhere in it: under TYPE_CHECKING and inside functions too."""

    internal: frozenset[str]
    """Modules of the package, as named in FLOORS."""
    external: frozenset[str]
    """Top-level names of other packages."""


def read_modules(package: Path) -> dict[str, Module]:
    """Read the imports of every file of a package, by module name relative to the package."""
    files = {module_name(package, file): file for file in sorted(package.rglob("*.py"))}
    return {
        name: read_imports(package.name, file, name, set(files)) for name, file in files.items()
    }


def module_name(package: Path, file: Path) -> str:
    parts = file.relative_to(package).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def read_imports(package_name: str, file: Path, name: str, known: set[str]) -> Module:
    inside = [package_name, *name.split(".")] if name else [package_name]
    if file.name != "__init__.py":
        inside.pop()
    internal: set[str] = set()
    external: set[str] = set()
    for target in imported_names(ast.parse(file.read_text(encoding="utf-8")), inside):
        top, *rest = target.split(".")
        if top == package_name:
            internal.add(longest_known(rest, known))
        else:
            external.add(top)
    return Module(frozenset(internal - {name}), frozenset(external))


def imported_names(tree: ast.Module, inside: list[str]) -> Iterator[str]:
    """Absolute dotted names of all imports; `from a import b` gives `a.b`, as b may be a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            origin = inside[: len(inside) - node.level + 1] if node.level else []
            origin = [*origin, *([node.module] if node.module else [])]
            yield from (".".join([*origin, alias.name]) for alias in node.names)


def longest_known(parts: list[str], known: set[str]) -> str:
    """Name of the module behind a dotted name whose last parts may be objects in that module."""
    while parts and ".".join(parts) not in known:
        parts = parts[:-1]
    return ".".join(parts)


def ancestors(name: str) -> list[str]:
    """The name itself and the packages around it, innermost first, without the root."""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(len(parts), 0, -1)]


def floor_of(name: str) -> int:
    return next((FLOORS[n] for n in ancestors(name) if n in FLOORS), ORDINARY_FLOOR)


def imports_from_higher_floors(modules: dict[str, Module]) -> list[str]:
    return [
        f"{name} (floor {floor_of(name)}) imports {target} (floor {floor_of(target)})"
        for name, module in modules.items()
        for target in sorted(module.internal)
        if floor_of(target) < floor_of(name)
    ]


def import_cycle(modules: dict[str, Module]) -> list[str]:
    """Modules of one import cycle, in order, or nothing where there is none."""
    try:
        graphlib.TopologicalSorter({n: m.internal for n, m in modules.items()}).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


def framework_imports(modules: dict[str, Module], start: str) -> list[str]:
    """Chains of imports from a module to a framework; importing runs the packages around too."""
    found = []
    seen: set[str] = set()
    pending = [(start,)]
    while pending:
        chain = pending.pop()
        name = chain[-1]
        if name in seen or name not in modules:
            continue
        seen.add(name)
        for framework in sorted(modules[name].external & FRAMEWORKS):
            found.append(" -> ".join((*chain, framework)))
        pending += [(*chain, n) for n in (*modules[name].internal, *ancestors(name)[1:])]
    return found


def long_files(package: Path) -> list[str]:
    counts = {f: len(f.read_text(encoding="utf-8").splitlines()) for f in package.rglob("*.py")}
    return [f"{file}: {count} lines" for file, count in counts.items() if count > MAX_FILE_LINES]


def long_functions(package: Path) -> list[str]:
    return [
        f"{file}:{node.lineno} {node.name}: {count} lines"
        for file in package.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (count := (node.end_lineno or node.lineno) - node.lineno + 1) > MAX_FUNCTION_LINES
    ]


def configs_without_command(folder: Path) -> list[str]:
    return [
        str(file)
        for file in sorted(folder.rglob("*.yaml"))
        if not CONFIG_COMMAND.search(opening_comment(file.read_text(encoding="utf-8")))
    ]


def opening_comment(text: str) -> str:
    lines = text.splitlines()
    end = next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))
    return "\n".join(lines[:end])


# ---- this project ----


@pytest.fixture(scope="module")
def modules() -> dict[str, Module]:
    return read_modules(SOURCE)


def test_a_floor_imports_only_itself_and_floors_below(modules: dict[str, Module]) -> None:
    assert imports_from_higher_floors(modules) == []


def test_no_module_is_in_an_import_cycle(modules: dict[str, Module]) -> None:
    assert import_cycle(modules) == []


@pytest.mark.parametrize("name", PURE_MODULES)
def test_the_federated_maths_reaches_no_framework(modules: dict[str, Module], name: str) -> None:
    assert framework_imports(modules, name) == []


def test_no_file_is_too_long() -> None:
    assert long_files(SOURCE) == []


def test_no_function_is_too_long() -> None:
    assert long_functions(SOURCE) == []


def test_every_config_opens_with_the_command_that_runs_it() -> None:
    assert configs_without_command(REPOSITORY / "configs") == []


@pytest.mark.parametrize("action", ["import", "help"])
def test_import_and_top_level_help_load_nothing_heavy(action: str) -> None:
    if not (SOURCE / "cli.py").exists():
        pytest.skip("fedsafe.cli does not exist yet")
    script = "import sys; import fedsafe, fedsafe.cli as cli\n"
    if action == "help":
        script += (
            "sys.argv = ['fedsafe', '--help']\n"
            "try: cli.main()\n"
            "except SystemExit as stop: assert not stop.code, stop.code\n"
        )
    script += f"heavy = [n for n in {HEAVY!r} if n in sys.modules]; assert not heavy, heavy"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


# ---- the rules themselves ----


def package_of(folder: Path, **sources: str) -> Path:
    """Write a package `fedsafe`; `a__b="..."` is the file a/b.py, `a="..."` is a.py."""
    package = folder / "fedsafe"
    package.mkdir()
    (package / "__init__.py").touch()
    for name, source in sources.items():
        file = package.joinpath(*name.split("__")).with_suffix(".py")
        file.parent.mkdir(exist_ok=True)
        (file.parent / "__init__.py").touch()
        file.write_text(source)
    return package


@pytest.mark.parametrize(
    ("name", "floor"),
    [
        ("cli", 1),
        ("report", 2),
        ("federated.rounds", 3),
        ("evaluation.judge", 3),
        ("safety.filter", 4),
        ("safety", 5),
        ("federated.schedule", 5),
        ("types", 6),
        ("", 6),
    ],
)
def test_floor_of_each_kind_of_module(name: str, floor: int) -> None:
    assert floor_of(name) == floor


@pytest.mark.parametrize(
    "statement",
    [
        "import fedsafe.federated.rounds",
        "from fedsafe.federated import rounds",
        "from fedsafe.federated.rounds import FederatedRounds",
        "from ..federated.rounds import FederatedRounds",
        "from .. import federated\nfrom ..federated import rounds as r",
        "def later():\n    from fedsafe.federated.rounds import FederatedRounds",
    ],
)
def test_an_import_from_a_higher_floor_is_found_in_every_spelling(
    tmp_path: Path, statement: str
) -> None:
    package = package_of(tmp_path, federated__rounds="", model__lora=statement)
    assert imports_from_higher_floors(read_modules(package)) == [
        "model.lora (floor 5) imports federated.rounds (floor 3)"
    ]


def test_imports_of_the_same_and_of_lower_floors_are_allowed(tmp_path: Path) -> None:
    package = package_of(
        tmp_path,
        cli="from fedsafe.table import run\nfrom fedsafe import __version__",
        table="from fedsafe.federated.rounds import x",
        federated__rounds="from fedsafe.model.module import y\nfrom fedsafe.types import Sample",
        model__module="import lightning",
        types="",
    )
    assert imports_from_higher_floors(read_modules(package)) == []


def test_a_cycle_is_found_across_packages_and_inside_functions(tmp_path: Path) -> None:
    package = package_of(
        tmp_path,
        data__chat="from fedsafe.model.lora import x",
        model__lora="def later():\n    from fedsafe.data import chat",
    )
    assert set(import_cycle(read_modules(package))) == {"data.chat", "model.lora"}


def test_importing_one_another_in_one_direction_is_no_cycle(tmp_path: Path) -> None:
    package = package_of(
        tmp_path, model__lora="from fedsafe.model import adapter", model__adapter=""
    )
    assert import_cycle(read_modules(package)) == []


def test_a_framework_is_found_directly_and_through_other_modules(tmp_path: Path) -> None:
    package = package_of(
        tmp_path,
        federated__aggregation="import peft.utils",
        federated__schedule="from fedsafe.data.chat import render",
        data__chat="from transformers import AutoTokenizer",
    )
    modules = read_modules(package)
    assert framework_imports(modules, "federated.aggregation") == ["federated.aggregation -> peft"]
    assert framework_imports(modules, "federated.schedule") == [
        "federated.schedule -> data.chat -> transformers"
    ]


def test_a_framework_is_found_in_the_package_that_holds_the_module(tmp_path: Path) -> None:
    package = package_of(tmp_path, federated__schedule="import torch")
    (package / "federated" / "__init__.py").write_text("import lightning")
    assert framework_imports(read_modules(package), "federated.schedule") == [
        "federated.schedule -> federated -> lightning"
    ]


def test_sizes_are_counted_to_the_line(tmp_path: Path) -> None:
    function = "def f():\n" + "    x = 1\n" * (MAX_FUNCTION_LINES - 1)
    package = package_of(tmp_path, a=function, b="x = 1\n" * MAX_FILE_LINES)
    assert long_functions(package) == []
    assert long_files(package) == []

    (package / "a.py").write_text(function + "    x = 1\n")
    (package / "b.py").write_text("x = 1\n" * (MAX_FILE_LINES + 1))
    assert [row.rpartition("/")[2] for row in long_functions(package)] == ["a.py:1 f: 61 lines"]
    assert [row.rpartition("/")[2] for row in long_files(package)] == ["b.py: 401 lines"]


@pytest.mark.parametrize(
    ("text", "opens_with_command"),
    [
        ("# The demo.\n#   fedsafe fit --config configs/demo.yaml\nseed: 1\n", True),
        ("# The demo.\nseed: 1\n# fedsafe fit\n", False),
        ("# fedsafe\nseed: 1\n", False),
        ("seed: 1\n", False),
        ("", False),
    ],
)
def test_a_config_is_judged_by_its_opening_comment(
    tmp_path: Path, text: str, opens_with_command: bool
) -> None:
    file = tmp_path / "algorithm" / "demo.yaml"
    file.parent.mkdir()
    file.write_text(text)
    assert configs_without_command(tmp_path) == ([] if opens_with_command else [str(file)])
