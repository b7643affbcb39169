"""Figures for papers: three files, the same bytes each time."""

from permafrost.figures import save_for_papers, subplots


def test_a_figure_is_written_for_papers(tmp_path):
    contents = []
    for number in (1, 2):
        figure, axis = subplots(figsize=(2, 2))
        axis.plot([1, 2], [1, 2], label="$a$")
        axis.legend()
        path = tmp_path / str(number) / "figure.png"
        save_for_papers(figure, path)
        files = sorted(path.parent.iterdir())
        assert [file.suffix for file in files] == [".pdf", ".png", ".svg"]
        contents.append([file.read_bytes() for file in files])
    assert contents[0] == contents[1]
    pdf, png, svg = contents[0]
    assert pdf.startswith(b"%PDF")
    assert int.from_bytes(png[16:20]) == 600  # 2 inches
    assert b"<svg" in svg
