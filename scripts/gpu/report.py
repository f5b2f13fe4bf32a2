"""The GPU kit's results as README's table, or two of them side by side.

    python scripts/gpu/report.py build/gpu/results            # Markdown: what was measured, on which GPU, by which command
    python scripts/gpu/report.py results/before results/after # what changed, row by row; exit code 1 where a row is over 5 % slower
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PARTS = ("tests", "sampling", "training", "bundled", "kernels")
SLOWER = 0.05
Row = dict[str, Any]


def read(folder: Path) -> dict[str, Row]:
    """The parts' results in a folder, by part. Raises SystemExit when there is none."""
    found = {part: json.loads((folder / f"{part}.json").read_text("utf-8")) for part in PARTS if (folder / f"{part}.json").exists()}
    if not found:
        raise SystemExit(f"no results in {folder}: bash scripts/gpu/kit.sh writes them, one {' or '.join(PARTS)}.json a part")
    return found


def title(results: dict[str, Row]) -> str:
    """The machine, in a line."""
    machine = next(iter(results.values()))["machine"]
    peak = next((part["rows"]["ceilings"] for part in results.values() if part["rows"].get("ceilings", {}).get("state") == "done"), None)
    ceilings = f"; bf16 products {peak['tflops']:.0f} TFLOP/s, copies {peak['gb_per_second']:.0f} GB/s" if peak else ""
    shrunk = "" if all(part["scale"] == "full" for part in results.values()) else ", IN MINIATURE: no figure means anything"
    return f"{machine['device']}, torch {machine['versions']['torch']}, diffusers {machine['versions']['diffusers']}{ceilings}{shrunk}"


def peers(row: Row) -> list[str]:
    """What of a row has figures of its own."""
    return [name for name, value in row.items() if isinstance(value, dict) and "seconds" in value]


def words(name: str, row: Row) -> str:
    """A row's figures in words."""
    if row["state"] != "done":
        return f"**{row['state']}**: {row.get('error', '')}"
    if own := peers(row):
        each = []
        for peer in own:
            value = row[peer]
            speed = f"{value['images_per_second']:.3g} images/s" if "images_per_second" in value else time_of(value["seconds"])
            memory = f", {value['memory_gib']:.1f} GiB" if value.get("memory_gib") else ""
            planned = f" (planned {value['planned_gib']:.1f})" if "planned_gib" in value else ""
            each.append(f"{peer} {speed}, {value['tflops']:.0f} TFLOP/s ({value['share']:.0%}){memory}{planned}")
        ratio = f"; **{row['ratio']:.2f} x**" if "ratio" in row else ""
        return "; ".join(each) + ratio
    if "passed" in row:
        failed = "".join(f"; **failed** {test}" for test in row["failed"])
        return f"{row['passed']} passed, {len(row['skipped'])} skipped{failed}"
    if "kinds" in row:
        kinds = ", ".join(f"{kind} {ms / row['busy_ms']:.0%}" for kind, ms in row["kinds"].items())
        return f"{row['wall_ms']:.0f} ms, busy {row['busy_ms']:.0f}: {kinds}; {row['waits']} waits, {row['launches']} launches"
    plain = {key: value for key, value in row.items() if key not in ("state", "took")}
    return ", ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in plain.items())


def time_of(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def table(results: dict[str, Row]) -> Iterator[str]:
    """The lines of the Markdown table."""
    yield f"{title(results)}.\n"
    yield "| what | measured | command |"
    yield "|---|---|---|"
    for part, found in results.items():
        for name, row in found["rows"].items():
            if name != "ceilings":
                yield f"| {name} | {words(name, row)} | `bash scripts/gpu/kit.sh {part}` |".replace("\n", " ")


def durations(row: Row) -> dict[str, float]:
    """What of a row took how long, by name."""
    found = {peer: row[peer]["seconds"] for peer in peers(row)}
    if "seconds" in row and isinstance(row["seconds"], float):
        found["seconds"] = row["seconds"]
    return found | ({"busy": row["busy_ms"] / 1e3} if "busy_ms" in row else {})


def compared(before: dict[str, Row], after: dict[str, Row]) -> tuple[list[str], bool]:
    """(lines that say what changed from `before` to `after`, whether something is slower)."""
    lines, slower = [f"before: {title(before)}", f"after:  {title(after)}", ""], False
    for part in PARTS:
        old, new = (results.get(part, {}).get("rows", {}) for results in (before, after))
        for name in dict.fromkeys([*old, *new]):
            states = [rows[name]["state"] if name in rows else "missing" for rows in (old, new)]
            if states != ["done", "done"]:
                lines.append(f"{part}, {name}: {states[0]} -> {states[1]}")
                continue
            was, now = durations(old[name]), durations(new[name])
            for key in was.keys() & now.keys():
                change = now[key] / was[key] - 1
                slower |= change > SLOWER and key in ("latentfm", "in a schedule", "seconds")
                mark = "  <-- slower" if change > SLOWER else "  <-- faster" if change < -SLOWER else ""
                lines.append(f"{part}, {name}, {key}: {time_of(was[key])} -> {time_of(now[key])} ({change:+.1%}){mark}")
            broke = set(new[name].get("failed", ())) - set(old[name].get("failed", ()))
            lines += [f"{part}, {name}: {test} fails now" for test in sorted(broke)]
            slower |= bool(broke)
    return lines, slower


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, metavar="RESULTS", help="one folder of results, or two to compare")
    folders = parser.parse_args().folders
    if len(folders) > 2:
        parser.error("give one folder, or two to compare")
    results = [read(folder) for folder in folders]
    if len(results) == 1:
        print("\n".join(table(results[0])))
        return
    lines, slower = compared(*results)
    print("\n".join(lines))
    raise SystemExit(1 if slower else 0)


if __name__ == "__main__":
    main()
