"""Pictures and pages show the right volume under the right name: distinct known volumes through the whole of each, read
back from the PNG's pixels, the page's data and its elements, and in a browser from what is seen."""

from __future__ import annotations

import base64
import gzip
import html
import io
import json
import re
from pathlib import Path
from types import SimpleNamespace

import chromium
import numpy as np
import pytest
from PIL import Image
from report_results import make_known

from fastsrgan.core.files import write_json
from fastsrgan.demo import run as demo
from fastsrgan.infer import image as infer_image
from fastsrgan.io import any_image
from fastsrgan.io import nifti as images
from fastsrgan.model.purpose import Purpose
from fastsrgan.pictures import error_map as error_map_module
from fastsrgan.pictures import figure
from fastsrgan.report.page import NotShown, report
from fastsrgan.volume.geometry import Volume

SHAPE = (40, 44, 36)
THICK = (40, 44, 12)
AFFINE = np.diag([1.0, 1, 1, 1])
THICK_AFFINE = np.array([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 3, 1], [0, 0, 0, 1.0]])
LEVELS = {"low": 150.0, "spline": 250.0, "linear": 350.0, "sr": 450.0, "truth": 600.0}
TITLES = {"low": "Low resolution", "spline": "Cubic spline", "linear": "Best linear", "sr": "fastsrgan"}
TITLES |= {"truth": "Truth", "seg": "Segmentation"}
CYAN, AMBER = (34, 211, 238), (251, 191, 36)


def level(value: float, low: bool = False) -> Volume:
    shape, affine = (THICK, THICK_AFFINE) if low else (SHAPE, AFFINE)
    return Volume(np.full(shape, value, np.float32), affine)


def block(first: int, last: int) -> Volume:
    """A mask from front to back: seg and label lie apart."""
    data = np.zeros(SHAPE, np.uint8)
    data[6:34, first:last, 6:30] = 1
    return Volume(data, AFFINE)


SEG, LABEL = block(4, 18), block(26, 40)


@pytest.fixture
def pages(monkeypatch) -> list:
    """Every picture of ``figure`` that is written, as it was laid out."""
    found: list = []
    write = figure._Page.write
    monkeypatch.setattr(figure._Page, "write", lambda page, path: (found.append(page), write(page, path))[1])
    return found


def columns(page, path) -> dict[str, tuple[float, str, np.ndarray]]:
    """title -> (grey in the middle of every panel of its column, caption, its pixels), from the PNG."""
    with Image.open(path) as opened:
        pixels = np.asarray(opened.convert("RGB")).astype(int)
    height, width = pixels.shape[:2]
    texts = [(t.get_position()[0] * width, t.get_position()[1], t.get_text(), t) for t in page.figure.texts]
    found = {}
    for x, _, text, artist in texts:
        if text not in TITLES.values() or artist.get_weight() != "bold":
            continue
        caption = next(t for cx, _, t, other in texts if abs(cx - x) < 1 and other is not artist)
        greys, seen = [], []
        for axes in page.figure.axes:
            box = axes.get_position()
            if not box.x0 * width < x < box.x1 * width:
                continue
            rows = slice(round((1 - box.y1) * height), round((1 - box.y0) * height))
            part = pixels[rows, round(box.x0 * width) : round(box.x1 * width)]
            middle = part[part.shape[0] // 3 : -part.shape[0] // 3, part.shape[1] // 3 : -part.shape[1] // 3]
            greys.append(np.median(middle[middle.max(2) - middle.min(2) < 8]))
            seen.append(part.reshape(-1, 3))
        assert np.ptp(greys) <= 1, text
        found[text] = (float(greys[0]), caption, np.concatenate(seen))
    return found


def near(pixels: np.ndarray, colour: tuple[int, int, int]) -> int:
    return int((np.abs(pixels - colour).max(1) < 30).sum())


def assert_greys_under_titles(page, path, expected: dict[str, float], top: float) -> dict:
    found = columns(page, path)
    assert {title: grey for title, (grey, *_) in found.items()} == pytest.approx(
        {TITLES[name]: 255 * value / top for name, value in expected.items()},
        abs=1.5,  # found: 1.2
    )
    return found


def test_the_demos_picture_has_every_volume_under_its_title_and_figures(pages, tmp_path):
    volumes = {name: level(value, name == "low") for name, value in LEVELS.items()} | {"seg": SEG, "label": LABEL}

    def scored(psnr: float) -> dict:
        return {"image": {"whole": {"psnr_db": psnr, "ssim": None}}}

    scores = scored(33.0) | {"baseline": scored(21.0), "linear": scored(27.0), "segmentation": {"dice": 0.77}}
    scores["baseline"]["segmentation"] = {"dice": 0.66}
    scores["gain"], scores["linear"]["gain"] = scored(12.0), scored(6.0)
    path = demo.draw(tmp_path / "demo.png", volumes, scores, (1.0, 1.0, 3.0))
    (page,) = pages
    found = assert_greys_under_titles(page, path, LEVELS | {"seg": LEVELS["sr"]}, LEVELS["truth"])
    captions = {title: caption for title, (_, caption, _) in found.items()}
    assert captions == {
        "Low resolution": "1 × 1 × 3 mm\nvoxels as acquired",
        "Cubic spline": "PSNR 21.00 dB",
        "Best linear": "PSNR 27.00 dB  (+6.00 dB)",
        "fastsrgan": "PSNR 33.00 dB  (+12.00 dB)",
        "Truth": "1 × 1 × 1 mm",
        "Segmentation": "Dice 0.7700\ninterpolated labels: Dice 0.6600",
    }
    for title, (_, _, pixels) in found.items():
        assert (near(pixels, CYAN) > 40 and near(pixels, AMBER) > 40) == (title == "Segmentation"), title
    (legend,) = page.figure.legends
    told = {t.get_text(): line.get_color() for t, line in zip(legend.get_texts(), legend.get_lines(), strict=True)}
    assert told == {"segmentation": "#22d3ee", "truth": "#fbbf24"}


def test_the_outlines_have_the_colours_of_their_masks(pages, tmp_path):
    volumes = {"sr": level(450.0), "seg": SEG, "label": LABEL}
    path = figure.result_figure(tmp_path / "a.png", volumes, width_px=900, at_mm=(20, 22, 18))
    (page,) = pages
    axes = [a for a in page.figure.axes if a.collections or a.lines or len(a.get_children()) > 3]
    with Image.open(path) as opened:
        pixels = np.asarray(opened.convert("RGB")).astype(int)
    height, width = pixels.shape[:2]
    # The axial plane of the column with outlines: upwards is anterior, so the seg lies low and the label high.
    box = page.figure.axes[len(page.rows)].get_position()
    part = pixels[
        round((1 - box.y1) * height) : round((1 - box.y0) * height), round(box.x0 * width) : round(box.x1 * width)
    ]
    rows = {colour: np.argwhere(np.abs(part - colour).max(2) < 30)[:, 0].mean() / len(part) for colour in (CYAN, AMBER)}
    assert rows[CYAN] > 0.6 > 0.45 > rows[AMBER] and axes  # found: 0.72, 0.399


def test_the_picture_of_infer_has_scan_spline_and_result_under_their_titles(pages, tmp_path):
    low = Volume(np.full(THICK, 150, np.float32), THICK_AFFINE)
    model = SimpleNamespace(purpose=Purpose())
    image = SimpleNamespace(name="scan")
    loaded = SimpleNamespace(volume=low, image=image, mask=None, model=model)
    record = {"weights": {"path": "w"}, "threshold": 0.5, "region": None}
    sr = level(450.0)
    result = SimpleNamespace(sr=sr.data, affine=sr.affine, report={"region": None})
    infer_image._picture(tmp_path / "a.png", loaded, result, SEG.data, record)
    (page,) = pages
    found = assert_greys_under_titles(
        page, tmp_path / "a.png", {"low": 150.0, "spline": 150.0, "sr": 450.0, "seg": 450.0}, 450.0
    )
    assert list(found) == ["Low resolution", "Cubic spline", "fastsrgan", "Segmentation"]
    assert found["Low resolution"][1].startswith("1 × 1 × 3 mm") and found["fastsrgan"][1] == "1 × 1 × 1 mm"
    assert found["Cubic spline"][1] == "of the same scan" and found["Segmentation"][1] == "probability above 0.5"
    assert [near(pixels, CYAN) > 40 for _, _, pixels in found.values()] == [False, False, False, True]
    # Of what lies outside a mask the spline shows nothing where the network saw nothing of it.
    loaded.mask = low.data < 0
    for outside, told in (("scan", "of the same scan"), ("zero", "of the same scan, inside the mask")):
        result.report["region"] = {"outside": outside}
        words = record | {"region": {"outside": outside}, "threshold": 0.25}
        infer_image._picture(tmp_path / "b.png", loaded, result, SEG.data, words)
        texts = [text.get_text() for text in pages[-1].figure.texts]
        assert told in texts and "probability above 0.25" in texts


def test_the_picture_of_errors_has_every_difference_under_its_title(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **_: (drawn.append(self), path.write_bytes(b""))[1])
    sr, hr, baseline = level(450.0), level(600.0), level(250.0)
    error_map_module.error_map(tmp_path / "e.png", sr, hr, baseline, captions=("31.00 dB", "22.00 dB"))
    told = {}
    for i, axes in enumerate(drawn[0].axes[:12]):  # three rows of four columns
        inside = axes.images[0].get_array()
        told.setdefault(i % 4, []).append(float(inside[inside.shape[0] // 2, inside.shape[1] // 2]))
    titles = [axes.get_title() for axes in drawn[0].axes[:4]]
    expected = [450.0, 600.0, 450.0 - 600.0, 250.0 - 600.0]
    assert [values[0] for values in told.values()] == expected
    assert all(len(set(values)) == 1 for values in told.values())
    assert [t.split("\n")[0] for t in titles] == ["SR", "truth", "SR − truth", "baseline − truth"]
    assert "31.00 dB" in titles[2] and "22.00 dB" in titles[3]
    assert all(axes.images[0].get_cmap().name == "RdBu_r" for axes in drawn[0].axes[2:4])  # red: brighter


# --- the report -------------------------------------------------------------------------------------------------------

SR, TRUTH = 400.0, 250.0
BANDS = (60.0, 140.0)  # of the scan's slices, in turn: its spline has what lies between too
PANES = {
    "low": "Low resolution",
    "spline": "Cubic spline",
    "sr": "fastsrgan",
    "seg": "Segmentation",
    "change": "Difference",
    "truth": "Truth",
    "error": "Error",
    "spline_error": "Error of the spline",
}
SUBTITLES = {"change": "SR − spline", "error": "SR − truth", "spline_error": "spline − truth"}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A page about known volumes, made without a network."""
    folder = tmp_path_factory.mktemp("known")
    out = folder / "out"
    out.mkdir()
    bands = np.where(np.arange(THICK[2]) % 2, *BANDS[::-1]).astype(np.float32)
    low = images.save(folder / "scan.nii.gz", np.broadcast_to(bands, THICK).copy(), THICK_AFFINE)
    sr = images.save(out / "scan_sr.nii.gz", level(SR).data, AFFINE)
    seg = images.save(out / "scan_seg.nii.gz", SEG.data, AFFINE)
    hr = images.save(folder / "hr.nii.gz", level(TRUTH).data, AFFINE)
    label = images.save(folder / "label.nii.gz", LABEL.data, AFFINE)
    source = {"path": str(low), "sha256": any_image.sha256(low, None), "series": None, "volume": None}
    record = {"input": source, "outputs": {"sr": str(sr), "seg": str(seg)}, "weights": {"path": "w", "sha256": "0"}}
    write_json(out / "scan.json", record)
    (path,) = report(out / "scan.json", hr=hr, label=label)
    return path


def test_every_pane_of_the_page_shows_what_its_caption_says(written):
    text = written.read_text(encoding="utf8")
    plan = json.loads(re.search(r'id="plan">(.*?)</script>', text)[1])
    panes = {pane["id"]: pane for pane in plan["panes"]}
    found = re.findall(
        r'<figure class="pane[^"]*"><figcaption>(.*?)(?:<small>(.*?)</small>)?</figcaption>.*?id="canvas-(\w+)"', text
    )
    assert {name: html.unescape(title) for title, _, name in found} == PANES and set(panes) == set(PANES)
    for title, small, name in found:
        assert panes[name]["title"] == html.unescape(title)
        if name in SUBTITLES:
            assert html.unescape(small) == SUBTITLES[name]
    bases = {name: pane["base"] for name, pane in panes.items()}
    assert bases == {name: "sr" if name == "seg" else name for name in PANES}
    assert plan["differences"] == {
        "change": ["sr", "spline"],
        "error": ["sr", "truth"],
        "spline_error": ["spline", "truth"],
    }
    assert panes["seg"]["layers"] == ["seg", "label"] and panes["sr"]["layers"] == ["seg", "change"]
    keys = re.findall(r'class="key (\w+)"></span>([^<]*)', text)
    assert {layer: html.unescape(name).strip() for layer, name in keys} == {"seg": "fastsrgan", "label": "truth"}
    assert panes["low"]["nearest"] and not panes["spline"]["nearest"]
    nx, ny, nz = plan["shape"]
    volumes: dict = {}
    for one in plan["volumes"]:
        raw = re.search(rf'id="volume-{one["name"]}">(.*?)</script>', text)[1]
        data = np.frombuffer(gzip.decompress(base64.b64decode(raw)), np.uint8).reshape(nz, ny, nx).astype(int)
        data = data + volumes[one["minus"]] if one["minus"] else data.cumsum(2)
        volumes[one["name"]] = data % 256
    assert np.unique(volumes["sr"]).tolist() == [255] and np.unique(volumes["truth"]).tolist() == [
        round(255 * TRUTH / SR)
    ]
    bands = {round(255 * value / SR) for value in BANDS}
    assert set(np.unique(volumes["low"])) == bands and len(np.unique(volumes["spline"])) > 2
    assert abs(volumes["spline"].mean() - np.mean(list(bands))) < 6
    for name, mask in (("seg", SEG), ("label", LABEL)):
        assert np.array_equal(volumes[name].transpose(2, 1, 0), mask.data)
    # Across the slices, and the slices where they are.
    assert plan["plane"] in ("coronal", "sagittal") and plan["slices"]["axis"] == 2 and plan["slices"]["mm"] == 3
    row = plan["slices"]["row"]
    for i, j, k in ((0, 0, 0), (5, 6, 7), (39, 43, 35)):
        assert row[0] * i + row[1] * j + row[2] * k + row[3] == pytest.approx((k - 1) / 3)
    assert "slices: they are 3 mm apart, head-foot" in html.unescape(text)


def test_the_picture_of_the_page_shows_the_same(written, pages, tmp_path):
    folder = written.parent
    report(
        folder / "scan.json", tmp_path / "a.html", hr=folder.parent / "hr.nii.gz", label=folder.parent / "label.nii.gz"
    )
    (page,) = pages
    text = (tmp_path / "a.html").read_text(encoding="utf8")
    data = base64.b64decode(re.search(r'src="data:image/png;base64,([^"]+)"', text)[1])
    (tmp_path / "a.png").write_bytes(data)
    found = columns_of_bands(page, tmp_path / "a.png")
    assert found["fastsrgan"] == found["Segmentation"] == 255 and found["Truth"] == 255
    assert found["Low resolution"] < 150 and found["Cubic spline"] < 150


def columns_of_bands(page, path) -> dict[str, float]:
    """title -> mean grey of the column's first panel."""
    with Image.open(path) as opened:
        pixels = np.asarray(opened.convert("L")).astype(float)
    height, width = pixels.shape
    found = {}
    for text in page.figure.texts:
        x = text.get_position()[0] * width
        for axes in page.figure.axes:
            box = axes.get_position()
            if text.get_text() in TITLES.values() and box.x0 * width < x < box.x1 * width:
                middle, across = round((1 - (box.y0 + box.y1) / 2) * height), round((box.x0 + box.x1) / 2 * width)
                part = pixels[middle - 9 : middle + 9, across - 9 : across + 9]
                found.setdefault(text.get_text(), float(np.median(part)))
    return found


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    with chromium.page(tmp_path_factory.mktemp("browser")) as tab:
        tab.look(1240, 1500)
        yield tab


@pytest.mark.skipif(chromium.browser() is None, reason="no Chromium is installed: make test-extras")
@pytest.mark.parametrize("more", ["#niivue", "#canvas"])
def test_what_is_seen_under_a_caption_is_what_it_names(written, tab, more):
    tab.open(written.resolve().as_uri() + more)
    assert tab.wait("document.getElementById('viewer').dataset.viewer") == more[1:]
    assert tab.problems == []
    for switch in ("cross", "marks"):
        tab.ask(f"document.getElementById('{switch}').click()")
    tab.ask("document.querySelector('input[name=layout][value=side]').click()")
    tab.ask("document.querySelector('input[name=plane][value=coronal]').click()")
    tab.frames(4)
    seen = {}
    places = tab.ask(
        "[...document.querySelectorAll('.pane')].map(p => {"
        " const b = p.querySelector('canvas').getBoundingClientRect();"
        " const title = p.querySelector('figcaption').firstChild.textContent;"
        " return [title, b.x + scrollX, b.y + scrollY, b.width, b.height]; })"
    )
    for title, x, y, width, height in places:
        clip = {"x": x + 0.3 * width, "y": y + 0.3 * height, "width": 0.4 * width, "height": 0.4 * height}
        clip["scale"] = 1
        with Image.open(io.BytesIO(tab.shot(clip=clip, whole=True))) as image:
            seen[title] = np.asarray(image.convert("RGB")).astype(int).reshape(-1, 3)
    assert set(seen) == set(PANES.values())
    greys = {title: np.median(pixels, axis=0) for title, pixels in seen.items()}
    assert greys["fastsrgan"] == pytest.approx([255] * 3, abs=3)  # found: 0; other browsers may round
    assert greys["Truth"] == pytest.approx([255 * TRUTH / SR] * 3, abs=3)  # found: 0.38
    low, high = (255 * value / SR for value in BANDS)
    between = {
        title: np.mean((seen[title][:, 0] > low + 8) & (seen[title][:, 0] < high - 8))
        for title in ("Low resolution", "Cubic spline")
    }
    assert between["Low resolution"] < 0.15 < 0.3 < between["Cubic spline"], between  # found: 0.033, 0.55
    for title in ("Low resolution", "Cubic spline"):
        assert low - 6 <= greys[title][0] <= high + 6
    # SR is brighter than spline and truth: red; the spline is darker than the truth: blue.
    for title, sign in (("Difference", 1), ("Error", 1), ("Error of the spline", -1)):
        red, _, blue = seen[title].mean(0)
        assert sign * (red - blue) > 40, title
    tinted = seen["Segmentation"].max(1) - seen["Segmentation"].min(1) > 20
    assert tinted.any() and not (seen["fastsrgan"].max(1) - seen["fastsrgan"].min(1) > 20).any()


# --- doubt and structures ---------------------------------------------------------------------------------------------


def unpacked(text: str) -> tuple[dict, dict]:
    """A page's plan, and its volumes as [x, y, z]."""
    plan = json.loads(re.search(r'id="plan">(.*?)</script>', text)[1])
    volumes: dict = {}
    for one in plan["volumes"]:
        raw = re.search(rf'id="volume-{one["name"]}">(.*?)</script>', text)[1]
        data = np.frombuffer(gzip.decompress(base64.b64decode(raw)), np.uint8).reshape(plan["shape"][::-1]).astype(int)
        data = data.transpose(2, 1, 0)
        volumes[one["name"]] = (data + volumes[one["minus"]] if one["minus"] else data.cumsum(0)) % 256
    return plan, volumes


def choices(text: str) -> dict[str, str]:
    """What can be laid over the SR: value -> words."""
    found = re.findall(r'<input type="radio" name="layer" value="(\w+)"[^>]*>(.*?)</label>', text)
    return {value: html.unescape(words) for value, words in found}


@pytest.fixture(scope="module")
def known(tmp_path_factory) -> tuple[Path, str]:
    """The record of a result with doubt and structures, and the text of its page; tests change nothing of either."""
    record = make_known(tmp_path_factory.mktemp("doubt"))
    (path,) = report(record)
    return record, path.read_text(encoding="utf8")


def test_the_doubt_is_shown_on_its_own_scale_in_units_of_the_image(known):
    _, text = known
    plan, volumes = unpacked(text)
    assert plan["shape"] == list(SHAPE)
    expected = np.where(np.arange(SHAPE[0]) < 20, 85, 255)  # 20 and 60 of 60
    assert np.array_equal(volumes["doubt"], np.broadcast_to(expected[:, None, None], SHAPE))
    assert np.unique(volumes["sr"]).tolist() == [255]
    panes = {pane["id"]: pane for pane in plan["panes"]}
    assert panes["doubt"]["base"] == "doubt" and panes["sr"]["layers"] == ["seg", "mask", "change", "doubt"]
    assert panes["seg"]["layers"] == ["seg"] and panes["doubt"]["layers"] == []
    assert re.search(r'<figcaption>Doubt<small>of the SR</small></figcaption><div[^>]*><canvas id="canvas-doubt"', text)
    words = {"none": "None", "seg": "Segmentation", "mask": "Structures", "change": "SR − spline", "doubt": "Doubt"}
    assert choices(text) == words
    scale = re.search(r'<p[^>]*><span>Doubt: 0</span><span class="heat".*?<span class="end">(.*?)</span>', text)
    assert scale and float(scale[1]) == 60


def test_the_doubts_figures_are_those_of_the_record(known, tmp_path):
    record, text = known
    tile = re.search(r"<li><span>doubt</span>(.*?)</li>", text)
    at = "/results/0/record/doubt"
    found = re.findall(r'<data value="(.*?)" data-path="(.*?)">(.*?)</data>', tile[1])
    figures = {"mean": "41.25", "image_mean": "512.5", "p95": "60.5"}
    assert found == [(value, f"{at}/{key}", value) for key, value in figures.items()]
    # They stand beside the scores too.
    (path,) = report(record, tmp_path / "a.html", hr=record.parent / "scan_sr.nii.gz")
    text = path.read_text(encoding="utf8")
    assert tile[0] in text and text.count('class="tiles"') == 1 and "<span>SSIM" in text


def test_structures_have_their_names_beside_their_colours(known):
    record, text = known
    plan, volumes = unpacked(text)
    stored = images.load_label(record.parent / "scan_mask.nii.gz").data
    assert np.array_equal(np.array([0, 3, 41, 90])[volumes["mask"]], stored)
    legend = re.search(r'<ul class="legend" id="structures">(.*?)</ul>', text)[1]
    told = re.findall(r'<li><svg.*?fill="#(\w{6})".*?</svg>(.*?)</li>', legend)
    assert [html.unescape(name) for _, name in told] == ["cortex", "<white>", "class 90"]
    assert [list(bytes.fromhex(colour)) for colour, _ in told] == plan["colours"]
    colours = np.array([*plan["colours"], CYAN, AMBER])
    apart = np.abs(colours[:, None] - colours).max(2)[np.triu_indices(len(colours), 1)]
    assert apart.min() > 60, apart


def test_a_page_without_doubt_and_structures_has_nothing_of_them(tmp_path):
    record = make_known(tmp_path)
    known = json.loads(record.read_text(encoding="utf8"))
    for kind in ("doubt", "mask"):
        (tmp_path / "out" / f"scan_{kind}.nii.gz").unlink()
    with pytest.raises(NotShown, match="scan") as error:
        report(record, tmp_path / "gone.html")
    (path,) = error.value.written
    assert "the doubt is no longer there" in path.read_text(encoding="utf8")
    write_json(record, {k: v for k, v in known.items() if k != "doubt"} | {
        "outputs": {kind: known["outputs"][kind] for kind in ("sr", "seg")}
    })  # fmt: skip
    (path,) = report(record, tmp_path / "a.html")
    text = path.read_text(encoding="utf8")
    body = re.sub(r"<img[^>]*>", "", text[text.index("<main") : text.index(">Provenance<")])
    assert "oubt" not in body and 'id="structures"' not in body and "no longer there" not in body
    plan, volumes = unpacked(text)
    assert "colours" not in plan and list(volumes) == ["spline", "sr", "low", "seg"]
    assert choices(text) == {"none": "None", "seg": "Segmentation", "change": "SR − spline"}


def test_a_doubt_of_nothing_is_dark_and_too_many_values_are_no_structures(tmp_path):
    record = make_known(tmp_path)
    images.save(tmp_path / "out" / "scan_doubt.nii.gz", np.zeros(SHAPE, np.float32), AFFINE, overwrite=True)
    many = (np.arange(np.prod(SHAPE)) % 87).reshape(SHAPE).astype(np.uint16)
    images.save(tmp_path / "out" / "scan_mask.nii.gz", many, AFFINE, overwrite=True)
    (path,) = report(record)
    text = path.read_text(encoding="utf8")
    plan, volumes = unpacked(text)
    assert not volumes["doubt"].any() and "mask" not in volumes and "colours" not in plan
    assert "the map of structures is not shown: " in text and "holds more than 85 values" in text
