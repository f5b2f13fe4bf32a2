"""The room of the mathematics stands on torch alone."""

import ast
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import latentfm.flow

ROOM = Path(latentfm.flow.__file__).parent


def test_importing_flow_loads_no_heavy_library():
    program = "import sys, latentfm.flow; print(*{name.split('.')[0] for name in sys.modules})"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOM.parents[1], capture_output=True, text=True, check=True
    )
    libraries = set(done.stdout.split())
    assert "torch" in libraries
    assert not {"diffusers", "transformers", "accelerate", "PIL", "scipy", "torchdiffeq"} & libraries


def test_every_import_written_in_flow_is_torch_or_flow_or_standard_or_asked_for_where_it_is_used():
    always, inside_functions = {"torch", *sys.stdlib_module_names}, {"scipy", "torchdiffeq"}
    files = list(ROOM.glob("**/*.py"))
    assert len(files) >= 7
    for file in files:
        tree = ast.parse(file.read_text())
        within = {id(node) for function in ast.walk(tree) if isinstance(function, ast.FunctionDef) for node in ast.walk(function)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{file.name}: relative import"
                names = [node.module]
            else:
                continue
            for name in names:
                own = name == "latentfm.flow" or name.startswith("latentfm.flow.")
                allowed = always | inside_functions if id(node) in within else always
                assert own or name.split(".")[0] in allowed, f"{file.name} imports {name}"


def test_the_room_offers_what_its_files_define_and_nothing_else():
    offered = {name for name, value in vars(latentfm.flow).items() if not name.startswith("_") and not isinstance(value, ModuleType)}
    defined = set()
    for file in ROOM.glob("*.py"):
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                defined.add(node.name)
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                defined |= {target.id for target in targets if isinstance(target, ast.Name)}
    assert offered <= defined
    assert {"integrate", "sample_path", "draw_t", "cfm_loss", "classifier_free", "SOLVERS", "GRIDS", "RULES"} <= offered
