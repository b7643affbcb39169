"""No parameter becomes a part of a shell command or of a path outside the project."""

from ruamel.yaml import YAML

from project import REPOSITORY, Project

HOSTILE = [
    "0; touch {marker}",
    "$(touch {marker})",
    "`touch {marker}`",
    "0 && touch {marker}",
    "0\n touch {marker}",
    "../../../outside",
    "/outside",
]


def test_no_command_has_a_parameter_in_it():
    stages = YAML(typ="safe").load(REPOSITORY / "dvc.yaml")["stages"]
    commands = [stage["cmd"] for stage in stages.values()]
    assert commands
    assert not [command for command in commands if "$" in command]


def test_hostile_seeds(tally, rounds, tmp_path):
    """DVC reads the seeds before anything of the project can look at them."""
    project = Project(tmp_path / "project")
    marker, kept = tmp_path / "marker", tmp_path / "outside.safetensors"
    kept.write_text("kept")
    with tally("shell commands and paths as seeds") as fault:
        for seed in HOSTILE[: rounds(3, len(HOSTILE))]:
            with fault.trial(seed):
                project.change({"seeds": [seed.format(marker=marker)]})
                process = project.start("dvc", "repro")
                output, _ = process.communicate(timeout=120)
                assert process.returncode != 0
                assert "Traceback" not in output, output
                assert not marker.exists(), output
                assert kept.read_text() == "kept"
                assert sorted(path.name for path in tmp_path.iterdir()) == [
                    "outside.safetensors",
                    "project",
                ]
