"""The guides of docs/extend: what each says is done literally, in a fresh copy of the project."""

import re
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from project import REPOSITORY, Project

pytestmark = pytest.mark.workflow

GUIDES = sorted((REPOSITORY / "docs/extend").glob("*.md"))
FILE = re.compile(r"`(custom/\w+\.py)`.*?```python\n(.*?)```", re.DOTALL)
PARAMS = re.compile(r"```yaml\n(.*?)```", re.DOTALL)


def follow(guide: Path, project: Project) -> None:
    """Write the file and change the parameters as a guide says."""
    text = guide.read_text()
    found = FILE.search(text)
    assert found, "a guide names its file and gives its code"
    assert len(found[2].splitlines()) <= 30
    (project.folder / found[1]).write_text(found[2])
    for block in PARAMS.findall(text):
        project.change(YAML(typ="safe").load(block))
    project.commit("as the guide says")


@pytest.mark.parametrize("guide", GUIDES, ids=[guide.stem for guide in GUIDES])
def test_a_guide_works_as_it_stands(guide, tmp_path):
    project = Project(tmp_path / "permafrost")
    follow(guide, project)
    assert "fine" in project.run("permafrost", "check")
    told = project.run("dvc", "repro")
    numbers = [line.split()[1] for line in told.splitlines() if line.startswith("stage ")]
    assert numbers == [str(number + 1) for number in range(len(numbers))] != []
    assert {row["status"] for row in project.read("metrics/sweep.json")} == {"done"}
