"""The plot is valid SVG, with one mark for each file and names that cannot break it."""

from __future__ import annotations

from xml.etree import ElementTree

from deepdistill.quantize.provenance.plot import Point, draw

SVG = "{http://www.w3.org/2000/svg}"


def test_ours_are_circles_and_the_mixtures_squares_within_the_picture() -> None:
    points = [Point("a<b>.gguf", 90_000_000, 0.02, True), Point("Q4_0", 100_000_000, 0.2, False)]
    root = ElementTree.fromstring(draw([*points, Point("F16", 200_000_000, 0.0, False)]))
    (circle,), (square,) = root.findall(f".//{SVG}circle"), root.findall(f".//{SVG}rect")
    assert float(circle.get("cx", "")) < float(square.get("x", "")), "smaller is to the left"
    assert float(circle.get("cy", "")) > float(square.get("y", "")), "less divergence is below"
    assert "a<b>.gguf" in {text.text for text in root.iter(f"{SVG}text")}
    width, height = map(float, root.get("viewBox", "").split()[2:])
    for line in root.iter(f"{SVG}line"):
        assert all(0 <= float(line.get(name, "")) <= width for name in ("x1", "x2"))
        assert all(0 <= float(line.get(name, "")) <= height for name in ("y1", "y2"))


def test_without_a_divergence_there_is_nothing_to_draw() -> None:
    assert draw([]) == draw([Point("F16", 10, 0.0, False)]) == ""
