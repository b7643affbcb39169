"""`python -m study ROOT [PIECE ...]`: do the study's pieces, or what is left of them.

ROOT is an image folder with train/CLASS/* and test/CLASS/*. Each piece is a run of the workflow in
build/study for each of its seeds; its rows are kept in docs/results/rows/PIECE.jsonl, and what is
there of the same parameters is not done again.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml
from filelock import FileLock
from PIL import Image

from permafrost.artifacts import load_record, write_atomically
from permafrost.data import load_dataset
from permafrost.data.image_folder import list_images
from permafrost.params import Params
from permafrost.runs.stored import StoredRuns

REPOSITORY = Path(__file__).parents[1]
PIECES: dict[str, dict[str, Any]] = yaml.safe_load(
    Path(__file__).with_name("pieces.yaml").read_text()
)
ROWS = REPOSITORY / "docs/results/rows"
PROJECT = REPOSITORY / "build/study"
# Where each target leaves its rows.
FOUND = {
    "sweep": "metrics/sweep.json",
    "tune": "metrics/trials.json",
    "stability": "metrics/stability.json",
}
BIN = Path(sys.executable).parent
# A share of each class of the digits is tested on at the end, and seen by no piece that chooses.
_DIGITS_TEST = 0.25
_DRAWS = "custom.draws:"


def main() -> None:
    """Do the pieces."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("root", type=Path)
    parser.add_argument("pieces", nargs="*", choices=[[], *PIECES])
    chosen = parser.parse_args()
    PROJECT.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{PROJECT}.lock", timeout=0):  # the project has one params.yaml
        prepare_project()
        for name in chosen.pieces or PIECES:
            do_piece(name, chosen.root.resolve())


def do_piece(name: str, root: Path) -> None:
    """Run what is left of a piece; refuse to go on where its rows are of other parameters."""
    rows = read_rows(name)
    for seed in PIECES[name]["seeds"]:
        params = parameters(PIECES[name], seed, root)
        digest = digest_of(params)
        mine = [row for row in rows if row["seed"] == seed]
        if any(row["parameters"] != digest for row in mine):
            sys.exit(f"{ROWS / name}.jsonl: seed {seed} is of other parameters; remove the file")
        if mine:
            continue
        print(f"{name}, seed {seed}", flush=True)
        target = PIECES[name].get("target", "sweep")
        rows += [row | {"parameters": digest} for row in run_workflow(params, target)]
        write_rows(name, rows)


def digest_of(params: dict[str, Any]) -> str:
    """Return a hash of what of the parameters a piece can reach, but for values by default.

    Where the images lie is none of them.
    """
    plain = Params.model_validate(params).model_dump(exclude_defaults=True)
    methods = ["freeze", *plain["sweep"]["strategies"]]
    plain["tune"] = {name: tried for name, tried in plain["tune"].items() if name in methods}
    tasks = plain["split"].get("tasks")
    for part in [plain["split"], *(tasks if isinstance(tasks, list) else [])]:
        part["root"] = part["root"].rpartition("-")[2]  # which images, by their names
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:16]


def read_rows(name: str) -> list[dict[str, Any]]:
    """Return a piece's rows, as far as it is done."""
    path = ROWS / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def method(row: dict[str, Any]) -> str:
    """Return what a row is of, in words: method, criterion, share, length and twin."""
    parts = [row["strategy"], row["metric"], f"{row['pct']:.0%}" if row["pct"] else None]
    if row["strategy"] == "joint":
        parts += [f"x{row['hyper']['passes']:g}, head {row['head']}"]
    return " ".join(filter(None, [*parts, f"({row['twin']})" if row["twin"] else None]))


def write_rows(name: str, rows: list[dict[str, Any]]) -> None:
    """Write a piece's rows, a line each."""
    ROWS.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(row, sort_keys=True) + "\n" for row in rows)
    write_atomically(ROWS / f"{name}.jsonl", "".join(lines).encode())


def run_workflow(params: dict[str, Any], target: str) -> list[dict[str, Any]]:
    """Run the workflow up to a stage and return its rows; those of trainings with their facts."""
    (PROJECT / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"  # DVC looks for the stages' command there
    # By force: the project's stages do not depend on the code, but what is stored of runs does.
    for command in (["permafrost", "check"], ["dvc", "repro", "--force", target]):
        run = [str(BIN / command[0]), *command[1:]]
        subprocess.run(run, cwd=PROJECT, check=True, env=os.environ | {"PATH": path})
    found = load_record(PROJECT / FOUND[target])
    if target == "stability":
        about = found["criteria"].items()
        return [{"seed": found["seed"], "criterion": name} | checks for name, checks in about]
    return [with_facts(row) for row in (found["trials"] if target == "tune" else found)]


def with_facts(row: dict[str, Any]) -> dict[str, Any]:
    """Add a run's seconds and the drift of each layer; tell its draw by chance, if it is one."""
    stored = StoredRuns(PROJECT)
    record = (stored.result(row["key"]) or {}).get("record", {})
    facts = {"seconds": stored.seconds(row["key"]), "drift": _drift(record), "draw": row["metric"]}
    is_draw = str(row["metric"]).startswith(_DRAWS)
    return row | facts | ({"metric": "random"} if is_draw else {})


def _drift(record: dict[str, Any]) -> dict[str, float]:
    """Return the mean drift of each layer's responses, over all of its filters."""
    drift = {}
    for layer, parts in record.get("drift", {}).items():
        count = record["filters"][layer]
        frozen = record["frozen"].get(layer, 0)
        sums = (parts["frozen"] or 0.0) * frozen + (parts["live"] or 0.0) * (count - frozen)
        drift[layer] = sums / count
    return drift


def prepare_project() -> None:
    """Make the project in which all pieces run, if it is not there: they share first tasks."""
    if not (PROJECT / ".dvc/config").exists():
        shutil.rmtree(PROJECT, ignore_errors=True)
        subprocess.run([BIN / "permafrost", "init", PROJECT], check=True, capture_output=True)
        for command in (["git", "init", "-q"], [str(BIN / "dvc"), "init", "-q"]):
            subprocess.run(command, cwd=PROJECT, check=True)
    shutil.copy(Path(__file__).with_name("draws.py"), PROJECT / "custom")


def visible(root: Path, part: str | None) -> Path:
    """Return the images that a piece may see, in a folder of the project: all, or one part."""
    images = sorted(str(path.relative_to(root)) for path in root.glob("*/*/*"))
    name = hashlib.sha256("\n".join(images).encode()).hexdigest()[:8]
    folder = PROJECT / "data" / f"{root.name}-{part or 'whole'}-{name}"
    if not folder.exists():
        half = folder.with_suffix(".part")
        shutil.rmtree(half, ignore_errors=True)
        for each in [part] if part else ["train", "test"]:
            shutil.copytree(root / each, half / each)
        half.rename(folder)
    return folder


def digits() -> Path:
    """Return the digits as an image folder with a test part."""
    folder = PROJECT / "data" / "digits"
    if not folder.exists():
        half = folder.with_suffix(".part")
        shutil.rmtree(half, ignore_errors=True)
        data = load_dataset("digits", None, 32)
        for label, name in enumerate(data.class_names):
            images = data.train.images[data.train.labels == label]
            kept = round((1 - _DIGITS_TEST) * len(images))
            for number, image in enumerate(images):
                place = half / ("train" if number < kept else "test") / name / f"{number:03}.png"
                place.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(image.permute(1, 2, 0).numpy()).save(place)
        half.rename(folder)
    return folder


def parameters(piece: dict[str, Any], seed: int, root: Path) -> dict[str, Any]:
    """Return the parameters of a piece for one seed."""
    params: dict[str, Any] = yaml.safe_load((REPOSITORY / "profiles/study.yaml").read_text())
    images = visible(root, piece.get("part"))
    params["seeds"] = [seed]
    params["split"]["root"] = str(images.relative_to(PROJECT))
    for tuned in piece.get("tuned", []):
        params["tune"] |= best_hyperparameters(tuned)
    for place, value in piece["changes"].items():
        section, name = place.split(".")
        params[section][name] = value
    if "freeze" not in params["sweep"]["strategies"]:
        skip_pictures(params)
    if "tuned" in piece:
        params["tune"] = {
            name: _with_lwf(trials, params) for name, trials in params["tune"].items()
        }
    if isinstance(params["split"]["tasks"], list):
        tasks = params["split"]["tasks"]
        params["split"]["tasks"] = [_task(task, seed, images, piece.get("part")) for task in tasks]
    return params


def skip_pictures(params: dict[str, Any]) -> None:
    """Take the pictures of filters in one step where no criterion looks at them."""
    params["rank"]["metrics"] = params["sweep"]["metrics"] = ["attribution", "random"]
    params["visualize"]["steps"] = 1


def _with_lwf(trials: list[dict[str, Any]], params: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a method's trials, of one that contains LwF with LwF's tuned weight."""
    tuned = params["tune"]["lwf"][0]
    return [trial | tuned if tuned.keys() <= trial.keys() else trial for trial in trials]


def _task(task: dict[str, Any], seed: int, images: Path, part: str | None) -> dict[str, Any]:
    """Return a task of drawn classes, or of all digits."""
    folder = visible(digits(), part) if task.get("dataset") == "digits" else images
    classes = sorted(list_images(folder)["train"])
    drawn = random.Random(seed).sample(classes, task["draw"]) if "draw" in task else classes
    own = {name: value for name, value in task.items() if name not in ("draw", "dataset")}
    root = str(folder.relative_to(PROJECT))
    return {"dataset": "image_folder", "root": root, "classes": drawn, **own}


def is_done(piece: str) -> bool:
    """Return whether all seeds of a piece have rows."""
    return {row["seed"] for row in read_rows(piece)} == set(PIECES[piece]["seeds"])


def best_hyperparameters(piece: str) -> dict[str, list[dict[str, Any]]]:
    """Return for each method the trial with the highest mean accuracy over a piece's seeds."""
    rows = read_rows(piece)
    if not is_done(piece):
        sys.exit(f"{piece}: is to be done first")
    tried: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        value = row["acc_mean"] if row["status"] == "done" else 0.0
        hyper = json.dumps(row["hyper"], sort_keys=True)
        tried.setdefault(row["strategy"], {}).setdefault(hyper, []).append(value)
    best = {name: max(trials, key=lambda h: fmean(trials[h])) for name, trials in tried.items()}
    return {name: [json.loads(hyper)] for name, hyper in best.items()}


if __name__ == "__main__":
    main()
