"""Malformed params.yaml: `permafrost check` refuses each in one line that names key or file."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from typer.testing import CliRunner

from limits import check_with_little_memory, no_hang, no_rights, open_folder
from permafrost.cli import app
from permafrost.names import load_checked
from permafrost.params import MAX_BYTES, Params

FILE = Path("params.yaml")
LONGEST = 700  # characters of a refusal


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def assert_one_line(code: int, output: str, *words: str) -> None:
    assert code == 2, f"exit code {code}: {output[-300:]}"
    line = output.removesuffix("\n")
    assert line.startswith("permafrost: params.yaml: "), line
    assert line.isprintable(), repr(line)
    assert len(line) < LONGEST, len(line)
    for word in words:
        assert word in line, f"{word!r} not in {line!r}"


def refused(*words: str) -> None:
    with no_hang():
        result = CliRunner().invoke(app, ["check"])
    assert_one_line(result.exit_code, result.output or repr(result.exception), *words)


# Generated from the schema ----------------------------------------------------------------------

SCHEMA = Params.model_json_schema()
SECTIONS = {
    name: SCHEMA["$defs"][node["$ref"].rpartition("/")[2]]["properties"]
    for name, node in SCHEMA["properties"].items()
    if "$ref" in node
}
LEAVES = {(name,): node for name, node in SCHEMA["properties"].items() if name not in SECTIONS} | {
    (section, name): node for section, nodes in SECTIONS.items() for name, node in nodes.items()
}

TEXT = st.text(max_size=30) | st.sampled_from(
    ["", "x" * 5000, "fullgrаd", "１", "\x1b[31m", "a\0b"]
)
HUGE = st.sampled_from([10**30, -(10**30), 10**400, 16**5000])
ODD = st.sampled_from([float("nan"), float("inf"), -float("inf")]) | HUGE
WRONG: dict[str, SearchStrategy[Any]] = {
    "text": TEXT,
    "number": st.integers() | st.floats() | HUGE,
    "bool": st.booleans(),
    "null": st.none(),
    "list": st.lists(st.integers() | TEXT, max_size=3),
    "section": st.dictionaries(st.text(max_size=5), st.integers(), max_size=2),
}


def not_of(*kinds: str) -> SearchStrategy[Any]:
    return st.one_of([values for kind, values in WRONG.items() if kind not in kinds])


def wrong_number(node: dict[str, Any]) -> SearchStrategy[Any]:
    whole = node["type"] == "integer"
    numbers = st.integers if whole else st.floats
    choices = [not_of("number"), ODD]
    for name, side in (("minimum", "max_value"), ("maximum", "min_value")):
        strict = f"exclusive{name.title()}"
        if (bound := node.get(name, node.get(strict))) is not None:
            beyond = numbers(**{side: bound})
            choices.append(beyond.filter(lambda n, b=bound, s=strict: n != b or s in node))
    if whole:
        choices.append(st.floats())
    return st.one_of(choices)


def wrong_text(node: dict[str, Any]) -> SearchStrategy[Any]:
    if node.get("default") in ("custom", None):  # profile and root: almost any text is one
        return not_of("text", "null") | st.sampled_from(["", "a\0b"])
    return not_of("text") | TEXT


def wrong_list(node: dict[str, Any]) -> SearchStrategy[Any]:
    good = node.get("default") or []
    choices = [not_of("list"), wrong(node["items"]).map(lambda item: [*good, item])]
    if "uniqueItems" not in node and good and not isinstance(good[0], dict):
        choices.append(st.sampled_from(good).map(lambda item: [*good, item]))
    if "minItems" in node:
        choices.append(st.just([]))
    return st.one_of(choices)


def wrong_entry(node: dict[str, Any]) -> SearchStrategy[Any]:
    entries = st.dictionaries(st.sampled_from(["pct", "strength", "zzz", "é"]), ODD, min_size=1)
    if node["additionalProperties"]["type"] == "array":  # of grids, of which there may be none
        return not_of("section") | entries
    return not_of("section") | entries | st.just({})


def wrong(node: dict[str, Any]) -> SearchStrategy[Any]:
    if forms := node.get("anyOf") or node.get("oneOf"):
        first, *others = forms
        fine = [PYTHON[other["type"]] for other in others]
        return wrong(first | {"default": None}).filter(lambda value: type(value) not in fine)
    kinds = {
        "integer": wrong_number,
        "number": wrong_number,
        "string": wrong_text,
        "array": wrong_list,
        "object": wrong_entry,
        "boolean": lambda _: not_of("bool"),
    }
    return kinds[node["type"]](node)


PYTHON = {"null": type(None), "array": list}


def nested(keys: tuple[str, ...], value: Any) -> dict[str, Any]:
    for key in reversed(keys):
        value = {key: value}
    return value


def as_yaml(values: dict[str, Any]) -> str:
    yaml, text = YAML(typ="safe", pure=True), StringIO()
    # In hexadecimal, Python reads and writes integers of any length.
    yaml.representer.add_representer(
        int, lambda made, value: made.represent_scalar("tag:yaml.org,2002:int", hex(value))
    )
    yaml.dump(values, text)
    return text.getvalue()


@st.composite
def malformed(draw: Callable[..., Any]) -> tuple[dict[str, Any], str]:
    """Return a file's values with one thing that is wrong, and the key that a refusal names."""
    kind = draw(st.sampled_from(["leaf"] * 5 + ["unknown", "structure", "nesting"]))
    section = draw(st.sampled_from(sorted(SECTIONS)))
    if kind == "unknown":
        key = draw(st.text("abcdefgхеο_-#", min_size=1, max_size=9).filter(str.strip))
        place = draw(st.sampled_from([(), (section,)]))
        shown = ".".join([*place, key.encode("unicode_escape").decode()])
        return nested((*place, key), draw(st.integers(0, 3))), shown
    if kind == "structure":
        return {section: draw(not_of("section"))}, section
    if kind == "nesting":
        inner = draw(st.sampled_from(sorted(SECTIONS[section])))
        moved = draw(st.sampled_from([(inner, section), (section, section, inner)]))
        # Both are unknown keys: at the top, and within the section.
        return nested(moved, 1), ".".join(moved[: len(moved) - 1])
    leaf = draw(st.sampled_from(sorted(LEAVES)))
    return nested(leaf, draw(wrong(LEAVES[leaf]))), ".".join(leaf)


def is_yaml(text: str) -> bool:
    """Return whether the parser reads what the emitter wrote: not a question mark and a letter."""
    try:
        YAML(typ="safe", pure=True).load(text)
    except YAMLError:
        return False
    return True


def test_generated(tally, rounds):
    seen = set()
    with tally("malformed params.yaml, generated") as fault:

        @settings(
            max_examples=rounds(150, 2000),
            derandomize=True,
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(malformed())
        def try_one(case: tuple[dict[str, Any], str]) -> None:
            values, key = case
            text = as_yaml(values)
            if text in seen:
                return
            seen.add(text)
            with fault.trial(f"{text:.200}"):
                FILE.write_text(text)
                refused(" ".join(key.split()) if is_yaml(text) else FILE.name)

        try_one()
        assert fault.tried >= rounds(120, 1500)


def test_the_schemas_parts_are_all_reached():
    """A leaf whose type the generator does not know would go untested."""
    assert len(LEAVES) > 40
    for node in LEAVES.values():
        wrong(node)


# By hand ----------------------------------------------------------------------------------------


def laughs(levels: int, link: str = "[{}]") -> str:
    """Return YAML whose last anchor, &a<levels>, stands for 9**levels values."""
    lines = ["a0: &a0 {k: 1}"]
    for level in range(levels):
        many = ", ".join([f"*a{level}"] * 9)
        lines.append(f"a{level + 1}: &a{level + 1} {link.format(many)}")
    return "\n".join(lines) + "\n"


def deep(levels: int, opening: str, closing: str) -> str:
    return f"seeds: {opening * levels}1{closing * levels}"


# What each refusal must name.
BY_HAND: dict[str, tuple[str | bytes, list[str]]] = {
    # Anchors, aliases and merge keys
    "laughs in an unknown key": (laughs(9), ["a0: unknown key"]),
    "seeds that hold themselves": ("seeds: &a [1, &b [*a]]", ["seeds"]),
    "a list that holds itself": ("seeds: &a [*a]", ["seeds.0"]),
    "a section that holds itself": ("freeze: &a {pct: *a}", ["freeze.pct"]),
    "a file that is a list of itself": ("&a [*a]", ["must hold sections"]),
    "a key that is its own mapping": ("&a {*a : 1}", ["no valid YAML"]),
    "an alias of nothing": ("seeds: *nowhere", ["no valid YAML", "nowhere"]),
    "a merge of a list": ("freeze: {<<: [1, 2]}", ["no valid YAML"]),
    "a merge of a number": ("freeze: {<<: 1}", ["no valid YAML"]),
    "a merge of what is out of bounds": ("a: &a {pct: 2}\nfreeze: {<<: *a}", ["freeze.pct"]),
    "a merge of an unknown key": ("freeze: &a {pct: 2}\nsplit: {<<: *a}", ["split.pct"]),
    "a mapping as a key": ("? {a: b}\n: 1", ["no valid YAML"]),
    "a list as a key": ("? [a, b]\n: 1", ["strings"]),
    "null as a key": ("~: 1", ["None"]),
    "a date as a key": ("2001-01-01: 1", ["date"]),
    "NaN as a key": (".nan: 1", ["nan"]),
    # Keys
    "a section twice": ("freeze: {}\nfreeze: {}", ["no valid YAML", "freeze"]),
    "a key twice": ("freeze:\n  pct: 0.5\n  pct: 0.5", ["no valid YAML", "pct"]),
    "a Cyrillic letter in a section": ("frеeze: {pct: 0.5}", ["fr\\u0435eze", "freeze?"]),
    "a Cyrillic letter in a key": ("freeze: {рct: 0.5}", ["freeze.\\u0440ct", "pct?"]),
    "a zero-width space in a key": ("freeze: {p\u200bct: 0.5}", ["\\u200b", "pct?"]),
    "an escape sequence in a key": ('"\\e[31m": 1', ["\\x1b[31m"]),
    "a line break in a key": ('"a\\nb": 1', ["a\\nb"]),
    "half a surrogate pair in a key": ('"\\ud800": 1', ["unicode"]),
    "a key of 50,000 letters": ("? " + "x" * 50_000 + "\n: 1", ["unknown key"]),
    "an empty key": ('"": 1', ["unknown key"]),
    "a key with a dot": ("freeze.pct: 0.5", ["freeze.pct: unknown key"]),
    "another letter case": ("Freeze: {pct: 0.5}", ["Freeze: unknown key", "freeze?"]),
    "200 keys in a trial": (
        f"tune: {{ewc: [{{{', '.join(f'k{i}: 1' for i in range(200))}}}]}}",
        ["tune.ewc", "must name exactly strength"],
    ),
    # Numbers
    "1e400": ("train: {lr: 1e400}", ["train.lr", "finite"]),
    "an integer of 5000 digits": (f"seeds: [{'9' * 5000}]", ["digits"]),
    "the same in hexadecimal": (f"seeds: [0x{'f' * 5000}]", ["seeds.0", "digits"]),
    "the same for a fraction": (f"train: {{lr: 0x{'f' * 5000}}}", ["train.lr", "digits"]),
    "the same for a name": (f"profile: 0x{'f' * 5000}", ["profile", "digits"]),
    "an integer beyond every float": (f"train: {{lr: {'9' * 400}}}", ["train.lr"]),
    "a trial beyond every float": (f"tune: {{si: [{{strength: {'9' * 400}}}]}}", ["tune.si.0"]),
    "full-width digits": ("train: {epochs: １０}", ["train.epochs", "integer"]),
    "Arabic digits": ("train: {epochs: ١٠}", ["train.epochs", "integer"]),
    "a comma for a point": ("freeze: {pct: 0,5}", ["freeze"]),
    "a number with a unit": ("train: {epochs: 10 epochs}", ["train.epochs"]),
    "a percentage": ("freeze: {pct: 25%}", ["freeze.pct", "25%"]),
    "a fraction": ("freeze: {pct: 1/4}", ["freeze.pct", "1/4"]),
    "minutes and seconds": ("train: {epochs: 1:30}", ["train.epochs", "1:30"]),
    "a whole number with a point": ("train: {epochs: 10.0}", ["train.epochs", "integer"]),
    "a quoted number": ("train: {epochs: '10'}", ["train.epochs", "integer"]),
    "yes for a bool": ("train: {flip: yes}", ["train.flip", "boolean"]),
    "a minus zero of epochs": ("train: {epochs: -0}", ["train.epochs"]),
    "a seed beyond 2**31": ("seeds: [2147483649]", ["seeds.0", "2147483648"]),
    # Names and paths
    "a Cyrillic letter in a metric": ("rank: {metrics: [mѕe]}", ["rank.metrics.0", "mse"]),
    "a metric with a line break": ('rank: {metrics: ["a\\nb:c"]}', ["rank.metrics.0", "module"]),
    "a metric with a NUL": ('rank: {metrics: ["a\\0:b"]}', ["rank.metrics.0", "module"]),
    "half a surrogate pair": ('rank: {metrics: ["\\ud800:b"]}', ["rank.metrics.0", "module"]),
    "a metric of no name": ("rank: {metrics: [':']}", ["rank.metrics.0", "module"]),
    "a relative module": ("rank: {metrics: ['..x:y']}", ["rank.metrics.0", "module"]),
    "a metric of a path": ("rank: {metrics: ['../x.py:y']}", ["rank.metrics.0", "module"]),
    "a function that is no metric": ("rank: {metrics: ['os:system']}", ["metrics.0", "os:system"]),
    "a metric with markup": ("rank: {metrics: ['<b>:x']}", ["rank.metrics.0", "module"]),
    "a metric of 50,000 letters": (
        f"rank: {{metrics: ['{'x' * 50_000}:y']}}",
        ["rank.metrics.0", "allowed: ", "module:Name"],
    ),
    "a name of 50,000 letters": (f"model: {{arch: {'x' * 50_000}}}", ["model.arch", "allowed"]),
    "an unranked metric of 50,000": (f"freeze: {{metric: {'x' * 50_000}}}", ["freeze.metric"]),
    "a profile of two lines": ('profile: "a\\nb"', ["profile", "printable"]),
    "a profile with an escape sequence": ('profile: "\\e[31m"', ["profile", "printable"]),
    "half a pair in a path": ('split: {root: "\\ud800"}', ["split.root", "\\ud800"]),
    "an empty profile": ('profile: ""', ["params.yaml: profile: must be 1 to", "printable"]),
    "a profile of 50,000 letters": (f"profile: {'x' * 50_000}", ["profile", "200"]),
    "a root with a NUL": ('split: {dataset: cifar10, root: "a\\0"}', ["split.root", "path"]),
    "an empty root": ('split: {dataset: image_folder, root: ""}', ["split.root", "path"]),
    # Alone good, together not
    "crops beside the image": ("train: {padding: 32}", ["train.padding", "split.image_size, 32"]),
    "bn_gamma without BatchNorm": (
        "model: {batch_norm: false}\nrank: {metrics: [mse, bn_gamma]}",
        ["rank.metrics", "bn_gamma", "model.batch_norm"],
    ),
    # Tags
    "an object": ("seeds: !!python/object/apply:os.system ['touch ran']", ["python/object"]),
    "a new object": ("!!python/object/new:os.system ['touch ran']", ["python/object"]),
    "a Python name": ("seeds: !!python/name:os.system", ["python/name"]),
    "a Python module": ("seeds: !!python/module:os", ["python/module"]),
    "a Python tuple": ("seeds: !!python/tuple [0]", ["python/tuple"]),
    "an unknown tag": ("seeds: !mine [0]", ["!mine"]),
    "an integer that is none": ("profile: !!int x", ["no valid YAML"]),
    "an empty integer": ("profile: !!int ''", ["no valid YAML"]),
    "a bool that is none": ("profile: !!bool maybe", ["no valid YAML"]),
    "a float that is none": ("profile: !!float x", ["no valid YAML"]),
    "a time that is none": ("profile: !!timestamp x", ["no valid YAML"]),
    "an impossible date": ("profile: 2001-99-99", ["no valid YAML"]),
    "a date": ("profile: 2001-01-01", ["profile", "string"]),
    "bytes": ("profile: !!binary aGVsbG8=", ["profile", "string"]),
    "a set": ("seeds: !!set {0, 1}", ["seeds", "list"]),
    "pairs": ("freeze: !!pairs [pct: 0.5]", ["freeze"]),
    "an ordered map of nothing": ("freeze: !!omap [a]", ["no valid YAML"]),
    # The file
    "empty": ("", ["must hold sections"]),
    "only comments": ("# nothing\n# more of it\n", ["must hold sections"]),
    "only a document's start": ("---\n", ["must hold sections"]),
    "a scalar": ("42", ["must hold sections", "42"]),
    "a list": ("- freeze: {pct: 0.5}", ["must hold sections"]),
    "several documents": ("seeds: [0]\n---\nseeds: [1]\n", ["no valid YAML"]),
    "tabs": ("freeze:\n\tpct: 0.5", ["no valid YAML", "line 2"]),
    "uneven indentation": ("freeze:\n  pct: 0.5\n metric: mse", ["no valid YAML", "line 3"]),
    "an open quote": ("profile: 'demo", ["no valid YAML"]),
    "a closing bracket too many": ("seeds: [0]]", ["no valid YAML"]),
    "UTF-16": ("seeds: [0]".encode("utf-16"), ["no valid YAML", "utf-8"]),
    "UTF-32": ("seeds: [0]".encode("utf-32"), ["no valid YAML", "utf-8"]),
    "Latin-1": ("profile: größe".encode("latin-1"), ["no valid YAML", "utf-8"]),
    "zeros": (bytes(1000), ["no valid YAML"]),
    "a program": (b"\x7fELF\x02\x01\x01" + bytes(range(256)) * 20, ["no valid YAML"]),
    "an archive": (b"\x1f\x8b\x08\x00" + bytes(range(256)), ["no valid YAML"]),
    "JSON with a comment": ('{"seeds": [0] // mine\n}', ["no valid YAML"]),
    "TOML": ("[freeze]\npct = 0.5\n", ["no valid YAML"]),
    "Jinja": ("freeze: {pct: {{ pct }}}", ["no valid YAML"]),
    "a conflict of git": ("<<<<<<< ours\nseeds: [0]\n=======\n", ["no valid YAML"]),
    "lists 400 deep": (deep(400, "[", "]"), []),
    "lists 40,000 deep": (deep(40_000, "[", "]"), ["no valid YAML"]),
    "sections 300 deep": (deep(300, "{a: ", "}"), ["seeds", "list"]),
    "sections 10,000 deep": (deep(10_000, "{a: ", "}"), ["no valid YAML"]),
    "too large": ("# " + "x" * MAX_BYTES, ["too large", str(MAX_BYTES)]),
}


def test_by_hand(tally, folder):
    with tally("malformed params.yaml, by hand") as fault:
        for name, (content, words) in BY_HAND.items():
            with fault.trial(name):
                FILE.write_bytes(content if isinstance(content, bytes) else content.encode())
                refused(*words)
                assert [path.name for path in folder.iterdir()] == ["params.yaml"]


def make_pipe() -> None:
    os.mkfifo(FILE)


def make_socket() -> None:
    socket.socket(socket.AF_UNIX).bind(str(FILE))


NO_FILES: dict[str, tuple[Callable[[], None], str]] = {
    "a folder": (FILE.mkdir, "regular file"),
    "a pipe": (make_pipe, "regular file"),
    "a socket": (make_socket, "regular file"),
    "a link to endless zeros": (lambda: FILE.symlink_to("/dev/zero"), "regular file"),
    "a link to nothing": (lambda: FILE.symlink_to("nowhere"), "not found"),
    "a link to itself": (lambda: FILE.symlink_to(FILE), "cannot be read"),
    "no file": (lambda: None, "not found"),
}


def test_no_regular_file(tally, folder, monkeypatch):
    with tally("params.yaml that is no file") as fault:
        for name, (make, word) in NO_FILES.items():
            with fault.trial(name):
                (folder / name).mkdir()
                monkeypatch.chdir(folder / name)
                make()
                refused(word)


def test_unreadable_file(tally, monkeypatch):
    with tally("params.yaml that is no file") as fault, open_folder() as folder:
        monkeypatch.chdir(folder)
        FILE.write_text("seeds: [0]")
        with fault.trial("unreadable"), no_rights(FILE):
            refused("cannot be read", "Permission")
        monkeypatch.undo()


# Bombs name what is wrong, and do not run out of memory.
BOMBS = {
    "in the seeds": (laughs(12).replace("a12:", "seeds:"), ["seeds.0"]),
    "in a known key": (laughs(12).replace("a0:", "profile:", 1), ["profile"]),
    "within a section": (f"freeze:\n{laughs(12)}".replace("\na", "\n  a"), ["freeze"]),
    "at the top": (f"- {laughs(12)}".replace("\na", "\n  a"), ["must hold sections"]),
    "a gigabyte of zeros": ("", ["too large"]),
    "by merges": (laughs(6, "{{<<: [{}]}}"), ["a0: unknown key"]),
}


def test_bombs(tally, folder):
    folders = []
    for name, (text, _) in BOMBS.items():
        folders.append(folder / name)
        (folder / name).mkdir()
        (folder / name / FILE).write_text(text)
    os.truncate(folder / "a gigabyte of zeros" / FILE, 2**30)
    answers = check_with_little_memory(folders, megabytes=200)
    with tally("YAML bombs, 200 MB to spare") as fault:
        for (name, (_, words)), answer in zip(BOMBS.items(), answers, strict=True):
            with fault.trial(name):
                assert_one_line(*answer, *words)


def test_real_command(tally, rounds):
    with tally("malformed params.yaml, real command") as fault:
        names = ["an escape sequence in a key", "the same in hexadecimal", "a program", "tabs"]
        for name in names[: rounds(1, 4)]:
            content, words = BY_HAND[name]
            with fault.trial(name):
                FILE.write_bytes(content if isinstance(content, bytes) else content.encode())
                result = subprocess.run(
                    [Path(sys.executable).with_name("permafrost"), "check"],
                    capture_output=True,
                    text=True,
                    timeout=120,
                    env=os.environ | {"LC_ALL": "C"},
                )
                assert_one_line(result.returncode, result.stderr + result.stdout, *words)


# What looks odd and is good ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("\ufeffseeds: [3]", {"seeds": [3]}),
        ("seeds: [3]\r\n", {"seeds": [3]}),
        ("freeze: &a {pct: 0.5}\nrank: {}\n", {"freeze": {"pct": 0.5}}),
        ("split: {root: Größe/日本}", {"split": {"root": "Größe/日本"}}),
        ("profile: 'größer & <besser>'", {"profile": "größer & <besser>"}),
        ("train: {lr: 1}", {"train": {"lr": 1.0}}),
        ("seeds: [0x10, 0o17, 1_000]", {"seeds": [16, 15, 1000]}),
    ],
)
def test_good(text, values):
    FILE.write_bytes(text.encode())
    assert load_checked(FILE) == Params.model_validate(values)


def test_minus_zero_is_zero():
    FILE.write_text("{train: {weight_decay: -0.0}, sweep: {pcts: [-0.0]}, freeze: {pct: -0.0}}")
    assert "-0.0" not in repr(load_checked(FILE).model_dump())
