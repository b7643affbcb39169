"""What the images under ``split.root``, and other inputs outside of git, hold: known by a hash.

DVC watches no folder that a parameter names, may name none, and may lie outside of the project. It
reads the hash from ``images.yaml`` like a parameter: stage split writes there what it has read, and
``permafrost check`` what the images hold now.
"""

import hashlib
import json
import time
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from ruamel.yaml import YAML

from permafrost.artifacts import file_digest, load_json, save_json, write_atomically
from permafrost.data import DATASETS
from permafrost.data.datasets import require_root
from permafrost.errors import InputError
from permafrost.params import Params, Source
from permafrost.stopping import stop_if_requested

NOTE = Path("images.yaml")
_TEXT = """\
# What the images under split.root and the file of model.weights hold, as hashes: `permafrost check`
# and stage split write them, DVC reads them. Commit them beside dvc.lock. Data sets with fixed
# checksums need none.
sha256: {}
weights: {}
"""
_SETTLED = 2 * 10**9  # nanoseconds; a file that was written just now may be so again unseen


def images_root(source: Source, root: Path) -> Path | None:
    """Return the folder of a data set in the project with this root; None if it needs none.

    It is relative to the project, not to the copy that ``dvc exp run --temp`` works in.
    """
    return None if source.root is None else root / source.root


def images_digest(params: Params, root: Path) -> str | None:
    """Hash what the files of the data sets hold, in their order: those that its reader names.

    Of an image folder these are the images, with the names of their classes; of a user's own data
    set all files in its folder, with their places. What a user's own code makes without a folder
    has no hash: stage split watches ``custom`` for that. A file that has kept its name, place, size
    and times since it was read is not read again; the project's ``.permafrost/images.json``
    remembers these. They are no part of the hash.

    Parameters
    ----------
    params : Params
        Which data sets.
    root : Path
        The project's.

    Returns
    -------
    str or None
        None for data sets without a folder, or whose files have fixed checksums.

    Raises
    ------
    InputError
        If the folder is laid out otherwise than a data set.
    """
    notes = root / ".permafrost" / "images.json"
    known = _read_notes(notes)
    now: dict[str, str] = {}
    unsettled = set()
    digest = hashlib.sha256()
    watched = [source for source in params.split.sources if is_watched(source)]
    if not watched:
        return None
    for names, path in chain.from_iterable(_files(source, root) for source in watched):
        stop_if_requested()
        about = path.stat()
        times = (about.st_mtime_ns, about.st_ctime_ns)
        place = f"{path} {about.st_dev} {about.st_ino} {about.st_size} {times}"
        if time.time_ns() - max(times) < _SETTLED:
            unsettled.add(place)
        now[place] = known.get(place) or file_digest(path)
        digest.update(json.dumps([*names, now[place]]).encode())
    now = {place: content for place, content in now.items() if place not in unsettled}
    if now != known:
        save_json(notes, now)
    return digest.hexdigest()


def is_watched(source: Source) -> bool:
    """Return whether a data set has files in a folder, known by no fixed checksum."""
    return source.root is not None and DATASETS.find(source.dataset).files is not None


def _files(source: Source, root: Path) -> Iterator[tuple[list[str], Path]]:
    files, folder = DATASETS.find(source.dataset).files, images_root(source, root)
    assert files is not None
    return files(require_root(folder))


def _read_notes(path: Path) -> dict[str, str]:
    try:
        notes = load_json(path)
    except InputError:
        return {}
    return notes if isinstance(notes, dict) else {}


def note_inputs(images: str | None, weights: str | None) -> set[str]:
    """Write the hashes into ``images.yaml``; return which keys held another."""
    before = YAML(typ="safe", pure=True).load(NOTE.read_bytes()) if NOTE.exists() else {}
    now = {"sha256": images, "weights": weights}
    changed = {key for key, digest in now.items() if before.get(key, ...) != digest}
    if changed:
        write_atomically(NOTE, _TEXT.format(images or "null", weights or "null").encode())
    return changed
