"""Sample panels of a run: files that any reader opens, in the order of the epochs, and shown in the report."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image
from report_results import make_run

from fastsrgan.pictures.planes import cut_panels, find_panels, png, write_panel
from fastsrgan.report import curves
from fastsrgan.report.page import report
from fastsrgan.train.logs import contact_sheet


@pytest.mark.parametrize("shape", [(1, 1), (7, 13), (5, 9, 3)])
def test_a_reader_of_png_gets_the_pixels(shape):
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    with Image.open(io.BytesIO(png(pixels))) as image:
        assert np.array_equal(np.asarray(image), pixels)


def test_panels_are_written_found_in_order_and_cut(tmp_path):
    sheet = np.linspace(-0.5, 1.5, 12).reshape(3, 4)
    sheet[0, 1] = np.nan
    for epoch in (10000, 9, 2, 9):
        write_panel(tmp_path, epoch, sheet)
    (tmp_path / "panels" / "notes.png").touch()
    found = find_panels(tmp_path)
    assert [epoch for epoch, _ in found] == [2, 9, 10000] and len(list((tmp_path / "panels").iterdir())) == 4
    with Image.open(found[0][1]) as image:  # of four columns each pixel is 200 wide: large enough to look at
        assert image.size == (800, 600)
        shown = np.rint(np.clip(np.nan_to_num(sheet), 0, 1) * 255)
        assert np.array_equal(np.asarray(image), np.kron(shown, np.ones((200, 200))))
    write_panel(tmp_path, 2, np.zeros((3, 900)))
    with Image.open(found[0][1]) as image:
        assert image.size == (900, 3)
    cut_panels(tmp_path, 9)
    assert [epoch for epoch, _ in find_panels(tmp_path)] == [2]
    assert find_panels(tmp_path / "nothing") == []


def test_the_sheet_shows_each_volume_in_its_column():
    x = torch.rand(6, 6, 6)
    pred, y = torch.rand(2, 6, 6, 6), torch.rand(2, 6, 6, 6)
    sheet = contact_sheet(x, pred, y)
    assert sheet.shape == (3 * 6 + 4, 5 * 6 + 8)
    top = y[0].max()
    for column, volume in enumerate((x / top, pred[0] / top, y[0] / top, pred[1], y[1])):
        for row in range(3):
            tile = sheet[8 * row : 8 * row + 6, 8 * column : 8 * column + 6]
            assert torch.allclose(tile, volume.select(row, 3))
    assert (sheet[6:8] == 0.5).all() and (sheet[:, 6:8] == 0.5).all()


def test_the_report_shows_panels_from_the_first_to_the_last(tmp_path, monkeypatch):
    run = make_run(tmp_path / "run", updates=5)
    monkeypatch.setattr(curves.importlib, "import_module", None)  # TensorBoard is not asked
    for epoch in range(1, 11):
        write_panel(run, epoch, np.full((3, 5), epoch / 10))
    (path,) = report(run)
    page = path.read_text(encoding="utf8")
    assert [f">epoch {n}<" in page for n in (1, 2, 4, 7, 9, 10)] == [True, False, True, True, False, True]
    assert page.count("data:image/png;base64,") == 4
    (run / "panels" / "epoch-0010.png").write_bytes(b"cut short")
    assert len(curves.sample_panels(run)) == 3
