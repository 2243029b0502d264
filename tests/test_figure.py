"""The demo's picture: planes lie where they should in the world, left is left, files are whole and repeatable."""

from __future__ import annotations

import itertools
import sys

import numpy as np
import pytest
from matplotlib.text import Text
from PIL import Image

from fastsrgan.errors import InputError, ResourceError, UsageError
from fastsrgan.evaluate.figures import captions
from fastsrgan.pictures import bland_altman, error_map, figure, planes
from fastsrgan.study import plots
from fastsrgan.volume.geometry import Orientation, Volume

SHAPE = (30, 36, 24)
AFFINE = np.array([[1, 0, 0, -14], [0, 1, 0, -20], [0, 0, 1, -9], [0, 0, 0, 1.0]])


def _ball(centre=(15, 18, 12), radius=9.0, shape=SHAPE):
    index = np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij"))
    distance = np.sqrt(((index - np.reshape(centre, (3, 1, 1, 1))) ** 2).sum(0))
    return np.clip(radius + 1 - distance, 0, 1).astype(np.float32) * 800


@pytest.fixture
def truth():
    data = _ball()
    data[18:22, 18:22, 12:15] += 200  # to the right of the centre
    return Volume(data, AFFINE)


def _stored_otherwise(volume):
    turn = Orientation((2, 0, 1), (True, False, True))
    return Volume(np.ascontiguousarray(turn.apply(volume.data)), turn.affine(volume.affine, volume.data.shape))


def test_planes_along_the_grid_show_the_voxels_themselves(truth):
    axial, coronal, sagittal = planes.cuts(truth, at_mm=(2.2, -1.1, 3.4))
    i, j, k = 16, 19, 12  # the voxel that holds (2.2, -1.1, 3.4) mm
    assert (sagittal.at, coronal.at, axial.at) == (2, -1, 3)
    for cut, plane, (first, second) in (
        (axial, truth.data[:, :, k], (-14, -20)),
        (coronal, truth.data[:, j, :], (-14, -9)),
        (sagittal, truth.data[i, :, :], (-20, -9)),
    ):
        shown = cut.sample(truth)
        for row, v in enumerate(cut.v):
            for column, u in enumerate(cut.u):
                a, b = round(u - first), round(v - second)
                inside = 0 <= a < plane.shape[0] and 0 <= b < plane.shape[1]
                # Found: 0 (rounding), of 1000
                assert shown[row, column] == pytest.approx(plane[a, b] if inside else 0, abs=1e-3)


@pytest.mark.parametrize("nearest", [False, True])
def test_a_volume_stored_otherwise_looks_the_same(truth, nearest):
    other = _stored_otherwise(truth)
    for mine, its in zip(planes.cuts(truth, (1, 2, 3)), planes.cuts(other, (1, 2, 3)), strict=True):
        np.testing.assert_allclose(mine.u, its.u)
        np.testing.assert_allclose(mine.v, its.v)
        # Found: 0 (rounding), of 1000
        np.testing.assert_allclose(mine.sample(truth, nearest), its.sample(other, nearest), atol=1e-2)


def test_planes_are_equally_wide_and_hold_the_whole_object(truth):
    cuts = planes.cuts(truth)
    assert len({cut.size[0] for cut in cuts}) == 1
    for cut in cuts:
        left, right, bottom, top = cut.extent
        assert min(right - left, top - bottom) >= 20
        shown = cut.sample(truth)
        # Found: 0; a margin is all that is promised
        assert max(shown[0].max(), shown[-1].max(), shown[:, 0].max(), shown[:, -1].max()) < 0.05 * 800


def test_thick_slices_are_shown_as_they_are():
    data = np.arange(1, 9, dtype=np.float32).reshape(1, 1, 8) * np.ones((10, 10, 1), np.float32)
    thick = Volume(data, np.diag([1, 1, 3, 1.0]))
    reference = Volume(
        np.ones((10, 10, 24), np.float32), np.diag([1, 1, 1, 1.0]) + np.eye(4, k=1) * [[0], [0], [-1], [0]]
    )
    coronal = planes.cuts(reference)[1]
    shown = coronal.sample(thick, nearest=True)
    for v, row in zip(coronal.v, shown, strict=True):
        k = int(np.floor((v + 1.5) / 3))
        middle = row[(coronal.u > 1) & (coronal.u < 8)]
        assert (middle == (k + 1 if 0 <= k < 8 else 0)).all()


def test_the_detail_is_where_the_images_differ(truth):
    compared = truth.data.copy()
    compared[12:15, 22:24, 8:10] += 300
    cut = planes.cuts(truth, at_mm=(-1, 0, 0))[2]
    part = planes.detail(cut, 8, 6, truth, (truth, Volume(compared, AFFINE)))
    assert part.u[0] <= 22 - 20 <= 23 - 20 <= part.u[-1]
    assert part.v[0] <= 8 - 9 <= 9 - 9 <= part.v[-1]
    assert part.size == (8, 6)
    whole = planes.detail(cut, 1000, 1000, truth)
    assert whole.size == cut.size


def test_differences_outside_the_mask_do_not_count(truth):
    compared = truth.data.copy()
    compared[13, 22:24, 8:10] += 300
    compared[13, 14:16, 14:16] += 30
    within = np.zeros(SHAPE, np.uint8)
    within[:, 10:18, 12:18] = 1
    cut = planes.cuts(truth, at_mm=(-1, 0, 0))[2]
    part = planes.detail(cut, 8, 6, truth, (truth, Volume(compared, AFFINE)), Volume(within, AFFINE))
    assert part.u[0] <= 14 - 20 <= 15 - 20 <= part.u[-1]
    assert part.v[0] <= 14 - 9 <= 15 - 9 <= part.v[-1]


def _demo(path, truth, left_out=(), **options):
    low = Volume(
        truth.data[:, :, 1::3], truth.affine @ np.array([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 3, 1], [0, 0, 0, 1.0]])
    )
    blurred = Volume(truth.data * np.float32(0.9), truth.affine)
    label = Volume((truth.data > 400).astype(np.uint8), truth.affine)
    seg = Volume(_ball(radius=8) > 400, truth.affine)
    volumes = {"low": low, "spline": blurred, "sr": truth, "truth": truth, "seg": seg, "label": label}
    volumes = {name: volume for name, volume in volumes.items() if name not in left_out}
    return figure.result_figure(path, volumes, **{"width_px": 500, **options})


def _pixels(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def test_the_same_picture_is_the_same_bytes_and_nothing_else_is_left(truth, tmp_path):
    a, b = _demo(tmp_path / "a.png", truth), _demo(tmp_path / "b.png", truth)
    assert a.read_bytes() == b.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "b.png"]
    assert _pixels(a).shape[1] == 500


def test_storage_order_does_not_change_the_picture(truth, tmp_path):
    turned = _stored_otherwise(truth)
    label = Volume((truth.data > 400).astype(np.uint8), truth.affine)
    options = {"changed": None, "width_px": 400}
    columns = [figure.Column(truth, "a"), figure.Column(truth, "b", outlines=True)]
    a = figure.planes_figure(tmp_path / "a.png", columns, reference=truth, masks=(label, None), **options)
    columns = [figure.Column(turned, "a"), figure.Column(turned, "b", outlines=True)]
    masks = (_stored_otherwise(label), None)
    b = figure.planes_figure(tmp_path / "b.png", columns, reference=turned, masks=masks, **options)
    assert np.abs(_pixels(a) - _pixels(b)).mean() < 0.05  # found: 0; letters may differ


def _axial_panel(path, columns=1):
    """The rows of the first panel: from below the header down to the first gap."""
    picture = _pixels(path)
    unit = picture.shape[1] / 2000
    top = round(unit * (figure.PAGE_MARGIN + figure.HEADER))
    left = round(unit * (figure.PAGE_MARGIN + figure.GUTTER))
    right = picture.shape[1] - round(unit * figure.PAGE_MARGIN)
    height = round((right - left) * 0.5)
    return picture[top : top + height, left:right]


@pytest.mark.parametrize(("convention", "bright_side"), [("radiological", "left"), ("neurological", "right")])
def test_the_patients_right_is_on_the_side_of_the_convention(tmp_path, convention, bright_side):
    data = _ball() / 4
    data[18:24, 14:22, 8:16] = 800  # right of the centre at x = 15
    volume = Volume(data, AFFINE)
    path = figure.planes_figure(
        tmp_path / "a.png",
        [figure.Column(volume, "")],
        reference=volume,
        at_mm=(1, -2, 3),
        convention=convention,
        width_px=500,
    )
    panel = _axial_panel(path).sum(2)
    half = panel.shape[1] // 2
    left, right = panel[:, :half].sum(), panel[:, half:].sum()
    assert (left > 1.3 * right) if bright_side == "left" else (right > 1.3 * left)  # found: 1.9


@pytest.mark.parametrize("above", [True, False])
def test_what_is_in_front_or_on_top_is_shown_above(tmp_path, above):
    """In every plane, read back from the PNG: nothing is upside down."""
    data = _ball() / 4
    front, top = (slice(22, 27), slice(16, 21)) if above else (slice(10, 15), slice(4, 9))
    data[12:19, front, 9:16] = data[12:19, 15:22, top] = 800  # beside the centre at (15, 18, 12)
    volume = Volume(data, AFFINE)
    drawn = figure.planes([figure.Column(volume, "")], reference=volume, at_mm=(1, -2, 3), width_px=500)
    drawn.savefig(tmp_path / "a.png", dpi=100)
    pixels = _pixels(tmp_path / "a.png").sum(2)
    for axes in drawn.axes[:3]:  # axial, coronal, sagittal
        box, height = axes.get_position(), len(pixels)
        edges = [round((1 - y) * height) for y in (box.y1, (box.y0 + box.y1) / 2, box.y0)]
        upper, lower = (pixels[a:b].sum() for a, b in itertools.pairwise(edges))
        assert (upper > 1.3 * lower) if above else (lower > 1.3 * upper)  # found: 1.5 to 1.8


def test_outlines_appear_only_where_they_are_asked_for(truth, tmp_path):
    def coloured(path):
        picture = _pixels(path)
        return int((picture.max(2) - picture.min(2) > 60).sum())

    label = Volume((truth.data > 400).astype(np.uint8), truth.affine)
    columns = [figure.Column(truth, "")]
    options = {"reference": truth, "masks": (label, label), "width_px": 400}
    plain = figure.planes_figure(tmp_path / "a.png", columns, **options)
    assert coloured(plain) == 0
    columns = [figure.Column(truth, "", outlines=True)]
    assert coloured(figure.planes_figure(tmp_path / "b.png", columns, **options)) > 100


def test_an_outline_is_one_line_along_the_border_of_its_mask_and_thicker_in_the_detail(truth):
    inside = np.zeros(SHAPE, np.uint8)
    first, behind = np.array([9, 10, 7]), np.array([19, 26, 16])
    inside[tuple(map(slice, first, behind))] = 1
    low, high = first - 0.5 + AFFINE[:3, 3], behind - 0.5 + AFFINE[:3, 3]
    other = truth.data.copy()
    other[10, 18, 12] += 300  # the detail is there, across the border
    page = figure._drawn(
        [figure.Column(truth, "", outlines=True)], reference=truth, masks=(Volume(inside, AFFINE), None),
        changed=(truth, Volume(other, AFFINE)),
    )  # fmt: skip
    widths = []
    for axes, cut in zip(page.figure.axes, page.rows, strict=True):
        (drawn,) = axes.collections
        u, v = np.concatenate([path.vertices for path in drawn.get_paths()]).T
        beyond = [low[cut.right] - u, u - high[cut.right], low[cut.up] - v, v - high[cut.up]]
        assert np.abs(np.max(beyond, 0)).max() < 0.2  # mm; found: 0.076
        widths.append(drawn.get_linewidths()[0])
    assert widths[0] == widths[1] == widths[2] < widths[3]


def test_captions_hold_the_scores_and_the_gain():
    scores = {
        "image": {"whole": {"psnr_db": 31.256, "ssim": 0.9514}},
        "segmentation": {"dice": 0.8912},
        "baseline": {"image": {"whole": {"psnr_db": 29.1, "ssim": None}}, "segmentation": {"dice": 0.75}},
        "linear": {"image": {"whole": {"psnr_db": 30.0, "ssim": 0.9}}},
    }
    scores["gain"] = {"image": {"whole": {"psnr_db": 2.156, "ssim": None}}}
    scores["linear"]["gain"] = {"image": {"whole": {"psnr_db": 0.9}}}
    words = captions(scores)
    assert words["sr"] == "PSNR 31.26 dB  (+2.16 dB)\nSSIM 0.9514" and words["spline"] == "PSNR 29.10 dB"
    assert words["linear"] == "PSNR 30.00 dB  (+0.90 dB)\nSSIM 0.9000"
    assert words["seg"] == "Dice 0.8912\ninterpolated labels: Dice 0.7500"
    assert not any(captions({}).values())


def test_missing_parts_are_drawn_too(truth, tmp_path):
    for name, parts, words in (
        ("a", ("seg", "label"), {"title": "A title", "footer": "A note"}),
        ("b", ("label",), {}),
    ):
        assert (_pixels(_demo(tmp_path / f"{name}.png", truth, parts, **words))[:4] == 0).all()


@pytest.mark.parametrize("light", ("green", "yellow", "red"))
def test_a_picture_says_its_light_and_what_is_outlined(truth, tmp_path, light):
    """In the light's colour, whole and at one size whatever the length, above the footer, which is whole too."""
    seg = Volume((truth.data > 400).astype(np.uint8), truth.affine)
    columns = [figure.Column(truth, "", outlines=True)]
    options = {"reference": truth, "masks": (seg, None), "width_px": 900, "structure": "cortical grey matter"}
    for words, footer in itertools.product(
        ("short", "of 5 % and 35 mm; " * 40), ("patch 128", "many words, " * 12 + "end")
    ):
        page = figure._drawn(columns, **options, footer=footer, status=(light, words))
        coloured = [t for t in page.figure.texts if t.get_color() == figure.LIGHTS[light]]
        coloured.sort(key=lambda t: -t.get_position()[1])
        assert " ".join(t.get_text() for t in coloured) == words.strip()
        below = [t for t in page.figure.texts if t.get_position()[1] < min(t.get_position()[1] for t in coloured)]
        below.sort(key=lambda t: -t.get_position()[1])
        assert " ".join(t.get_text() for t in below) == f"{footer} · radiological: patient's left on the right"
        (legend,) = page.figure.legends
        assert [t.get_text() for t in legend.get_texts()] == ["cortical grey matter"]
        renderer = page.figure.canvas.get_renderer()
        boxes = [t.get_window_extent(renderer) for t in (*coloured, *below)]
        assert all(0 < box.x0 < box.x1 < 900 and box.y0 > 0 for box in boxes)
        assert all(upper.y0 >= lower.y1 - 2 for upper, lower in itertools.pairwise(boxes))  # none over another
        assert boxes[-1].x1 < legend.get_window_extent(renderer).x0
        assert boxes[0].y1 < min(axes.get_window_extent(renderer).y0 for axes in page.figure.axes)
        assert len({t.get_fontsize() for t in (*coloured, *below)}) == 1
        assert not any(t.get_text().startswith(("%", "mm")) for t in coloured)  # a number stands beside its unit


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ["a$b^{$c", "$x$", "日本 scan"])
def test_names_stand_in_every_picture_as_they_are(truth, tmp_path, name):
    """They are no formula, of which some cannot be drawn, and a letter that the font lacks is a box, without a word on
    the terminal."""
    seen = []

    def kept(drawn):
        figure_as_written(drawn)
        drawn.canvas.draw()
        seen.append({text.get_text() for text in drawn.findobj(Text)})

    figure_as_written = figure.as_written
    with pytest.MonkeyPatch.context() as patched:
        for module in (figure, error_map, bland_altman, plots):
            patched.setattr(module, "as_written", kept)
        figure.planes_figure(tmp_path / "a.png", [figure.Column(truth, name)], reference=truth, title=name)
        error_map.error_map(tmp_path / "b.png", truth, truth, baseline=truth, captions=(name, name), name=name)
        bland_altman.bland_altman(tmp_path / "c.png", [(name, [1.0, 2], [2.0, 4])], (name, name))
        panel = plots.Panel(name, "x", [plots.PlotLine(name, [1, 2], [1, 2])])
        plots.draw(tmp_path / "d", [[panel]], name)
    plain = name.replace("日本", "□□")
    assert len(seen) == 4 and all(any(plain in text for text in texts) for texts in seen)


def test_a_long_title_is_on_the_page(truth):
    page = figure._drawn([figure.Column(truth, "")], reference=truth, title="sub-01_acq-high_" * 9, width_px=900)
    (title,) = [text for text in page.figure.texts if text.get_text().startswith("sub-01")]
    assert title.get_window_extent(page.figure.canvas.get_renderer()).x1 < 900


def test_pyplot_is_not_touched(truth, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    assert _demo(tmp_path / "a.png", truth).is_file()


def test_faults_are_told(truth, tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="radiological, neurological"):
        _demo(tmp_path / "a.png", truth, convention="other")
    with pytest.raises(InputError, match="nothing above 0"):
        _demo(tmp_path / "a.png", Volume(truth.data * 0, truth.affine))
    with pytest.raises(ResourceError, match="folder is missing"):
        _demo(tmp_path / "none" / "a.png", truth)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ResourceError, match="pip install matplotlib"):
        _demo(tmp_path / "a.png", truth)
    assert list(tmp_path.iterdir()) == []


# --- where to look ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("axes", "flips"), [((0, 1, 2), (False,) * 3), ((2, 0, 1), (True, False, True))])
@pytest.mark.parametrize("thick", [0, 1, 2])
def test_the_slices_of_a_scan_are_found_however_it_is_stored(axes, flips, thick):
    sizes = [1.0, 1.1, 0.9]
    sizes[thick] = 3.0
    scan = Volume(np.zeros((7, 8, 9)), np.diag([*sizes, 1.0]) + np.array([[0, 0, 0, 5.0]] * 3 + [[0] * 4]))
    turn = Orientation(axes, flips)
    stored = Volume(turn.apply(scan.data), turn.affine(scan.affine, scan.data.shape))
    assert planes.slices_of(stored) == (thick, 3.0)
    n = scan.data.shape[thick]
    edges = planes.slice_edges(stored, thick, (5, 5, 5), -100, 100)
    np.testing.assert_allclose(edges, 5 - 1.5 + 3 * np.arange(n + 1))
    inner = planes.slice_edges(stored, thick, (5, 5, 5), 6, 100)
    assert inner[0] == pytest.approx(6.5) and len(inner) == n
    sizes[thick] = 1.2  # not thick beside 1.0
    assert planes.slices_of(Volume(scan.data, np.diag([*sizes, 1.0]))) is None


def test_the_place_of_largest_change_is_found_inside_the_mask(truth):
    other = truth.data.copy()
    other[13, 16, 13] += 90  # inside
    other[13:16, 16:19, 13] += 20
    other[2:5, 2:5, 2:5] += 900  # outside
    within = Volume((truth.data > 500).astype(np.uint8), AFFINE)
    inside = planes.inside_of(truth, within)
    # The voxel itself, not the middle of what changes around it.
    assert planes.largest_change(truth, Volume(other, AFFINE), inside) == (13 - 14, 16 - 20, 13 - 9)
    assert planes.largest_change(truth, truth, inside) is None
    away = Volume(other, AFFINE + np.eye(4, k=3) * 0.4)
    assert planes.largest_change(truth, away, inside) is None


def test_without_a_mask_the_rim_of_the_head_does_not_count():
    data = _ball((30, 30, 30), 25.0, (60, 60, 60))
    head = Volume(data, np.eye(4))
    inside = planes.inside_of(head, None, Volume(np.zeros_like(data), np.eye(4)))
    index = np.argwhere(inside.data)
    away = np.sqrt(((index - 30) ** 2).sum(1))
    assert 12 < away.max() < 23 and inside.data[30, 30, 30]
    other = data.copy()
    other[30, 30, 6:9] += 900  # the skin
    other[34, 30, 34] += 30
    place = planes.largest_change(head, Volume(other, np.eye(4)), inside)
    assert np.abs(np.subtract(place, (34, 30, 34))).max() <= planes.BLOCK_MM / 2


@pytest.mark.parametrize("thick", [0, 1, 2])
def test_what_is_said_of_slices_lies_beside_the_images(truth, thick):
    """On tissue the words could not be read."""
    low = Volume(np.take(truth.data, range(1, truth.data.shape[thick], 3), thick), truth.affine.copy())
    low.affine[:3, thick] *= 3
    low.affine[thick, 3] += 1
    volumes = {"low": low, "sr": truth, "seg": Volume((truth.data > 400).astype(np.uint8), truth.affine)}
    light = ("green", "of 3 mm " * 40)
    drawn = figure.planes(figure.result_columns(volumes), **figure.result_options(volumes), status=light, footer="f")
    renderer = drawn.canvas.get_renderer()
    panels = [axes.get_window_extent(renderer) for axes in drawn.axes]
    marks = [text for axes in drawn.axes for text in axes.texts if text.get_color() == figure.MARK]
    words = [text.get_window_extent(renderer) for text in marks]
    drawings = [line.get_window_extent(renderer) for axes in drawn.axes for line in axes.lines]
    others = [text.get_window_extent(renderer) for text in drawn.texts if text.get_text()]
    page = drawn.bbox
    assert len(words) == 3 and len(drawings) == 6  # two planes and the detail
    for box in (*words, *drawings):
        assert page.x0 < box.x0 and box.x1 < page.x1 and page.y0 < box.y0 and box.y1 < page.y1
    for box in words:
        assert not any(box.overlaps(other) for other in (*panels, *drawings, *others))
    for line in drawings:
        assert not any(line.overlaps(panel) for panel in panels)


def test_with_a_mask_the_rim_of_a_stripped_brain_does_not_count_either():
    """Its edge to exact zeros is sharp: what changes there is no anatomy. A mask that is nothing but rim counts."""
    data = np.where(_ball((30, 30, 30), 25.0, (60, 60, 60)) > 400, 500, 0).astype(np.float32)
    away = np.sqrt(((np.stack(np.indices(data.shape)) - 30) ** 2).sum(0))
    head, cortex = Volume(data, np.eye(4)), Volume(((away > 14) & (away < 26)).astype(np.uint8), np.eye(4))
    inside = planes.inside_of(head, cortex)
    # 4 mm below the surface, to a block of 2 mm and half its diagonal.
    assert away[inside.data].min() > 14 and 19 < away[inside.data].max() < 23
    other = data.copy()
    other[30, 30, 5:8] += 400  # at the surface
    other[34, 30, 46] += 30
    assert planes.largest_change(head, Volume(other, np.eye(4)), inside) == (34, 30, 46)
    rim = Volume((away > 23.5).astype(np.uint8) * (data > 0), np.eye(4))
    assert np.array_equal(planes.inside_of(head, rim).data, rim.data > 0)


@pytest.mark.parametrize("thick", [0, 1, 2])
def test_only_planes_across_the_slices_are_drawn_and_a_slice_is_as_long_as_it_is(truth, tmp_path, monkeypatch, thick):
    step = np.ones(3)
    step[thick] = 3
    low = Volume(truth.data[tuple(slice(1, None, int(n)) if n > 1 else slice(None) for n in step)], truth.affine.copy())
    low.affine[:3, :3] = np.diag(step)
    low.affine[thick, 3] += 1
    pages = []
    write = figure._Page.write
    monkeypatch.setattr(figure._Page, "write", lambda page, path: (pages.append(page), write(page, path))[1])
    spline = Volume(truth.data * np.float32(0.9), truth.affine)
    figure.result_figure(tmp_path / "a.png", {"low": low, "spline": spline, "sr": truth}, width_px=600)
    (page,) = pages
    assert [cut.axis for cut in page.rows[:-1]] == [axis for _, axis, *_ in planes.PLANES if axis != thick]
    assert all(thick in (cut.right, cut.up) for cut in page.rows)
    said = [(axes, text) for axes in page.figure.axes for text in axes.texts if "slice" in text.get_text()]
    assert [text.get_text() for _, text in said] == ["slice 3 mm"] * len(page.rows)
    for (axes, _), cut in zip(said, page.rows, strict=True):
        bar = axes.lines[-1]
        assert bar.get_color() == figure.MARK
        ends = np.sort(bar.get_xdata() if cut.right == thick else bar.get_ydata())
        assert ends[1] - ends[0] == pytest.approx(3)
        # The bar lies on a slice of the scan, not between two, and the borders of all slices are marked.
        number = (ends.mean() - low.affine[thick, 3]) / 3
        assert number == pytest.approx(round(number))
        borders = axes.lines[-2].get_xdata() if cut.right == thick else axes.lines[-2].get_ydata()
        assert np.diff(borders) == pytest.approx(3) and np.isin(ends, borders).all()
        first, last = cut.extent[:2] if cut.right == thick else cut.extent[2:]
        assert borders[0] - first < 3 > last - borders[-1]


@pytest.mark.parametrize("convention", figure.SIDES)
@pytest.mark.parametrize("thick", [0, 1, 2])
def test_the_mark_of_a_slice_stands_just_outside_the_left_or_lower_edge(truth, thick, convention):
    """Borders and bar 8 pixels from the panel, the words behind them, at the bar's middle."""
    step = np.where(np.arange(3) == thick, 3, 1)
    low = Volume(truth.data[tuple(slice(None, None, int(n)) for n in step)], truth.affine @ np.diag([*step, 1.0]))
    page = figure._drawn([figure.Column(low, "", nearest=True)], reference=truth, scan=low, convention=convention)
    renderer = page.figure.canvas.get_renderer()
    assert len(page.rows) == 3
    for axes, cut in zip(page.figure.axes, page.rows, strict=True):
        side = 1 if cut.right == thick else 0  # the axis of the panel that runs through its edge
        assert np.array_equal(axes.images[0].get_array(), cut.sample(low, nearest=True))
        panel = axes.get_window_extent(renderer).get_points()
        borders, bar = (axes.transData.transform(line.get_xydata()) for line in axes.lines)
        assert borders[:, side] == pytest.approx(panel[0, side] - 8) == bar[:, side]
        along = borders[:, 1 - side]
        assert len(borders) >= len(bar) == 2 and panel[0, 1 - side] <= along.min() <= along.max() <= panel[1, 1 - side]
        assert np.abs(borders - bar[0])[:, 1 - side].min() == pytest.approx(0)
        (words,) = [text for text in axes.texts if "slice" in text.get_text()]
        box = words.get_window_extent(renderer).get_points()
        assert 13 < panel[0, side] - box[1, side] < 17  # found: 15
        assert box[:, 1 - side].mean() == pytest.approx(bar[:, 1 - side].mean(), abs=1)  # found: 0.5


@pytest.mark.parametrize("title", ["", "A title"])
@pytest.mark.parametrize("status", [None, ("green", "fine")])
def test_rows_fill_the_page_between_its_header_and_its_footer(truth, title, status):
    """Of a page 1000 pixels wide; all but the detail, the last, at one scale in mm."""
    more = {"title": title, "status": status, "at_mm": (1, -2, 3), "width_px": 1000}
    page = figure._drawn([figure.Column(truth, "")], reference=truth, **more)
    boxes = [axes.get_position() for axes in page.figure.axes]
    height = 100 * page.figure.get_figheight()
    above = figure.PAGE_MARGIN + figure.HEADER + figure.TITLE * bool(title)
    below = figure.PAGE_MARGIN + figure.FOOTER + figure.STATUS * bool(status)
    assert height * (1 - boxes[0].y1) == pytest.approx(above / 2) and height * boxes[-1].y0 == pytest.approx(below / 2)
    for upper, lower in itertools.pairwise(boxes):
        assert height * (upper.y0 - lower.y1) == pytest.approx(figure.GAP / 2)
    scales = [height * box.height / cut.size[1] for box, cut in zip(boxes, page.rows, strict=True)]
    assert scales[:-1] == pytest.approx([scales[0]] * 3) and scales[-1] > 2 * scales[0]


@pytest.mark.parametrize("count", [1, 3])
def test_columns_fill_the_page_between_its_margins(truth, count):
    """Of a page 1000 pixels wide, half of what the lengths are given for."""
    columns = [figure.Column(truth, str(i)) for i in range(count)]
    drawn = figure.planes(columns, reference=truth, at_mm=(1, -2, 3), width_px=1000)
    boxes = [axes.get_position() for axes in drawn.axes]
    assert 1000 * min(box.x0 for box in boxes) == pytest.approx((figure.PAGE_MARGIN + figure.GUTTER) / 2)
    assert 1000 * max(box.x1 for box in boxes) == pytest.approx(1000 - figure.PAGE_MARGIN / 2)


def test_a_footer_gives_way_to_the_legend_alone(truth):
    """A line is as long as its page allows: the whole width where nothing is outlined."""
    label = Volume((truth.data > 400).astype(np.uint8), truth.affine)

    def filled(outlines):
        columns = [figure.Column(truth, "", outlines=outlines)]
        options = {"reference": truth, "at_mm": (1, -2, 3), "masks": (label, None), "width_px": 2000}
        drawn = figure.planes(columns, **options, footer="x " * 160)
        first = max((t for t in drawn.texts if t.get_text().startswith("x x")), key=lambda t: t.get_position()[1])
        room = 2000 - 2 * figure.PAGE_MARGIN - figure.GUTTER
        return first.get_fontsize() / 0.72 * figure.LETTER * len(first.get_text()) / room

    assert filled(True) < 0.9 and filled(False) > 0.97  # found: 0.81, 0.99


def test_the_place_of_largest_change_is_a_voxel_of_the_mask_however_much_changes_beside_it():
    a = Volume(np.zeros((24, 24, 24), np.float32), np.eye(4))
    b = Volume(a.data.copy(), np.eye(4))
    b.data[12, 12, 12], b.data[13, 12, 12] = 50, 900
    inside = Volume(np.arange(24)[:, None, None] < np.full((24, 24, 24), 13), np.eye(4))
    assert planes.largest_change(a, b, inside) == (12, 12, 12)
