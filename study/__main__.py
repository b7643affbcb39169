"""`python -m study ROOT [PIECE ...]`: do the study's pieces, or what is left of them.

ROOT is an image folder with train/CLASS/* and test/CLASS/*. Each piece is a run of the workflow in
build/study for each of its seeds; its rows are kept in docs/results/rows/PIECE.jsonl, and what is
there is not done again.
"""

import argparse
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from permafrost.artifacts import load_record, write_atomically
from permafrost.runs.stored import StoredRuns

REPOSITORY = Path(__file__).parents[1]
PIECES: dict[str, dict[str, Any]] = yaml.safe_load(
    Path(__file__).with_name("pieces.yaml").read_text()
)
ROWS = REPOSITORY / "docs/results/rows"
PROJECT = REPOSITORY / "build/study"
# Where each target leaves its rows.
FOUND = {"sweep": "metrics/sweep.json", "tune": "metrics/trials.json"}
BIN = Path(sys.executable).parent


def main() -> None:
    """Do the pieces."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("root", type=Path)
    parser.add_argument("pieces", nargs="*", choices=[[], *PIECES])
    chosen = parser.parse_args()
    for name in chosen.pieces or PIECES:
        rows = read_rows(name)
        for seed in PIECES[name]["seeds"]:
            if any(row["seed"] == seed for row in rows):
                continue
            print(f"{name}, seed {seed}", flush=True)
            rows += run_piece(PIECES[name], seed, chosen.root.resolve())
            write_rows(name, rows)


def read_rows(name: str) -> list[dict[str, Any]]:
    """Return a piece's rows, as far as it is done."""
    path = ROWS / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def write_rows(name: str, rows: list[dict[str, Any]]) -> None:
    """Write a piece's rows, a line each."""
    ROWS.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(row, sort_keys=True) + "\n" for row in rows)
    write_atomically(ROWS / f"{name}.jsonl", "".join(lines).encode())


def run_piece(piece: dict[str, Any], seed: int, root: Path) -> list[dict[str, Any]]:
    """Run the workflow for one seed and return its rows, each with its seconds."""
    prepare_project()
    params = parameters(piece, seed, visible(root, piece.get("part")))
    (PROJECT / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    target = piece.get("target", "sweep")
    for command in (["permafrost", "check"], ["dvc", "repro", target]):
        subprocess.run([BIN / command[0], *command[1:]], cwd=PROJECT, check=True)
    stored, found = StoredRuns(PROJECT), load_record(PROJECT / FOUND[target])
    return [
        {name: value for name, value in row.items() if name != "key"}
        | {"seconds": stored.seconds(row["key"])}
        for row in (found["trials"] if target == "tune" else found)
    ]


def prepare_project() -> None:
    """Make the project in which all pieces run, if it is not there: they share first tasks."""
    if (PROJECT / "dvc.yaml").exists():
        return
    shutil.rmtree(PROJECT, ignore_errors=True)
    subprocess.run([BIN / "permafrost", "init", PROJECT], check=True, capture_output=True)
    for command in (["git", "init", "-q"], [str(BIN / "dvc"), "init", "-q"]):
        subprocess.run(command, cwd=PROJECT, check=True)


def visible(root: Path, part: str | None) -> Path:
    """Return the images that a piece may see, as a folder of the project."""
    (PROJECT / "data").mkdir(exist_ok=True)
    link = PROJECT / "data" / (f"{part}_only" if part else "images")
    if not link.exists():
        if part:
            link.mkdir()
            (link / part).symlink_to(root / part)
        else:
            link.symlink_to(root)
    return link


def parameters(piece: dict[str, Any], seed: int, images: Path) -> dict[str, Any]:
    """Return the parameters of a piece for one seed."""
    params: dict[str, Any] = yaml.safe_load((REPOSITORY / "profiles/study.yaml").read_text())
    folder = str(images.relative_to(PROJECT))
    params["seeds"] = [seed]
    params["split"]["root"] = folder
    for place, value in piece["changes"].items():
        section, name = place.split(".")
        params[section][name] = value
    if isinstance(params["split"]["tasks"], list):
        classes = sorted(path.name for path in (images / "train").iterdir())
        draw = random.Random(seed)
        params["split"]["tasks"] = [
            {
                "dataset": "image_folder",
                "root": folder,
                "classes": draw.sample(classes, task["draw"]),
            }
            if "draw" in task
            else task
            for task in params["split"]["tasks"]
        ]
    return params


if __name__ == "__main__":
    main()
