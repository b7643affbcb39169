"""The documentation builds without a warning, and README links to what is there."""

import re
import subprocess
import sys

from project import REPOSITORY


def test_the_documentation_builds_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html"]
    folders = ["docs", str(tmp_path / "html"), "-d", str(tmp_path / "doctrees")]
    done = subprocess.run([*command, *folders], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    reference = (tmp_path / "html/reference.html").read_text()
    assert "permafrost.api.learn" in reference


def test_what_readme_and_the_guides_link_to_is_there():
    pages = [REPOSITORY / "README.md", *(REPOSITORY / "docs").rglob("*.md")]
    assert len(pages) > 20
    for page in pages:
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text()):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page}: {target}"
