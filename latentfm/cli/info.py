"""`latentfm info`: versions, processors, what is missing; a bug report's first lines."""

import json
from typing import Annotated

import typer


def info(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Tell what there is to work with: versions, processors, kernels of attention, and what is missing with the command that brings it."""
    from latentfm.cli.terminal import quiet_libraries
    from latentfm.system import describe

    quiet_libraries()
    found = describe()
    if as_json:
        print(json.dumps(found, indent=2))
        return
    for heading, content in found.items():
        rows = content.items() if isinstance(content, dict) else ((each["device"], ", ".join(list(each.values())[1:])) for each in content)
        print(heading)
        for name, value in rows:
            print(f"  {name:16} {', '.join(value) if isinstance(value, list) else value}")
        if not content:
            print("  none")
