"""The report: its figures are the JSON's, its voxels the images', and nothing in it can be run or loaded."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import os
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from commands import call, one_line
from report_results import make_model, make_results, make_run, make_scan, make_scores, make_truth, remembering

from fastsrgan.cli import main as cli
from fastsrgan.core.files import write_json
from fastsrgan.errors import InputError, ResourceError, UsageError
from fastsrgan.evaluate.figures import alone
from fastsrgan.evaluate.grids import READER, SPLINE, onto_grid
from fastsrgan.evaluate.pair import evaluate_files
from fastsrgan.infer.files import infer_files
from fastsrgan.io import nifti as images
from fastsrgan.model.purpose import MODELS
from fastsrgan.pictures import figure
from fastsrgan.pictures.planes import white
from fastsrgan.report import cohort, curves, viewer, volumes
from fastsrgan.report import show as show_module
from fastsrgan.report.collect import Result, find
from fastsrgan.report.html import Line, data_block, el, line_chart, pointer, shown, ticks
from fastsrgan.report.page import NotShown, report
from fastsrgan.report.show import show
from fastsrgan.volume.consistency import LINEAR_WEIGHTS, observation
from fastsrgan.volume.geometry import Orientation, Volume


class Parsed(HTMLParser):
    """A page taken apart by the standard library's parser: tags, figures, blocks of data, sources of scripts."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.figures: list[tuple[str, str, str]] = []  # pointer, full value, text shown
        self.empty: list[str] = []
        self.blocks: dict[str, str] = {}
        self.sources: list[str] = []
        self.words = ""
        self.inside: tuple[str, dict] = ("", {})
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        facts = dict(attrs)
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        self.inside = (tag, facts)
        if tag == "data":
            self.figures.append((facts["data-path"], facts["value"], ""))
        elif facts.get("class") == "none" and "data-path" in facts:
            self.empty.append(facts["data-path"])

    def handle_endtag(self, tag):
        self.inside = ("", {})

    def handle_data(self, data):
        tag, facts = self.inside
        if tag == "data":
            self.figures[-1] = (*self.figures[-1][:2], self.figures[-1][2] + data)
        elif tag in ("script", "style") and facts.get("id"):
            self.blocks[facts["id"]] = self.blocks.get(facts["id"], "") + data
        elif tag in ("script", "style"):
            self.sources.append(data)
        else:
            self.words += data

    @property
    def facts(self) -> dict:
        """What the page's figures point into."""
        return json.loads(self.blocks["facts"])


DRAW = viewer.picture


@pytest.fixture(scope="module", autouse=True)
def pictures():
    """Pages of the same volumes share their picture."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(viewer, "picture", remembering(DRAW))
        yield


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    out = make_results(tmp_path_factory.mktemp("one"))
    make_scores(out)
    return out


@pytest.fixture(scope="module")
def page(results) -> str:
    (path,) = report(results)
    return path.read_text(encoding="utf8")


@pytest.fixture(scope="module")
def parsed(page) -> Parsed:
    return Parsed(page)


def test_every_figure_is_the_one_of_the_json(results, parsed):
    scores = json.loads((results / "scores.json").read_text(encoding="utf8"))
    record = json.loads((results / "scan.json").read_text(encoding="utf8"))
    (one,) = parsed.facts["results"]
    assert one["scores"] == scores and one["record"] == record
    assert len(parsed.figures) > 20
    for path, value, text in parsed.figures:
        fact = cohort.at(parsed.facts, path)
        assert json.loads(value) == fact and text in (shown(fact), shown(fact, signed=True)), path
    assert all(cohort.at(parsed.facts, path) is None for path in parsed.empty)
    told = {path for path, _, _ in parsed.figures} | set(parsed.empty)
    for tree in ("", "/baseline", "/gain"):
        for region in ("whole", "label"):
            assert f"/results/0/scores{tree}/image/{region}/psnr_db" in told
        assert f"/results/0/scores{tree}/segmentation/dice" in told


def test_baseline_result_and_difference_stand_under_their_heads(page):
    table = next(t for t in re.findall(r"<table>.*?</table>", page, re.DOTALL) if "fastsrgan</th>" in t)
    heads = re.findall(r'<th class="n" scope="col">([^<]*)</th>', table)
    wanted = {"baseline": "/baseline", "fastsrgan": "", "difference": "/gain"}
    rows = [re.findall(r'data-path="/results/0/scores([^"]*)"', row) for row in table.split("</tr>")]
    full = [row for row in rows if len(row) == len(heads) == 3]
    assert len(full) > 10 and any("/segmentation/dice" in path for row in full for path in row)
    for row in full:
        own = row[heads.index("fastsrgan")]
        assert row == [wanted[head] + own for head in heads]


def decoded(parsed: Parsed) -> tuple[dict[str, np.ndarray], dict]:
    """The volumes as the page's script unpacks them: [x, y, z] uint8."""
    plan = json.loads(parsed.blocks["plan"])
    nx, ny, nz = plan["shape"]
    out: dict[str, np.ndarray] = {}
    for volume in plan["volumes"]:
        raw = np.frombuffer(gzip.decompress(base64.b64decode(parsed.blocks[f"volume-{volume['name']}"])), np.uint8)
        data = raw.astype(int).reshape(nz, ny, nx)
        data = data + out[volume["minus"]].transpose(2, 1, 0) if volume["minus"] else data.cumsum(2)
        out[volume["name"]] = (data % 256).astype(np.uint8).transpose(2, 1, 0)
    return out, plan


def test_the_voxels_are_those_of_the_images(results, parsed):
    shown_volumes, plan = decoded(parsed)
    assert set(shown_volumes) == {"sr", "low", "spline", "linear", "seg", "truth", "label"}
    sr, seg = images.load(results / "scan_sr.nii.gz"), images.load_label(results / "scan_seg.nii.gz")
    scan = images.load(results.parent / "scan.nii.gz")
    top = white(sr, seg)
    affine = np.array(plan["affine"])
    for i, j, k in np.random.default_rng(0).integers(0, plan["shape"], (300, 3)):
        world = affine @ [i, j, k, 1]
        voxel = np.rint(np.linalg.inv(sr.affine) @ world).astype(int)[:3]
        # Found: 0.49
        assert abs(shown_volumes["sr"][i, j, k] - np.clip(sr.data[tuple(voxel)] * 255 / top, 0, 255)) <= 0.51
        assert shown_volumes["seg"][i, j, k] == seg.data[tuple(voxel)]
        slot = np.rint(np.linalg.inv(scan.affine) @ world).astype(int)[:3]
        # Found: 0.5
        assert abs(shown_volumes["low"][i, j, k] - np.clip(scan.data[tuple(slot)] * 255 / top, 0, 255)) <= 0.51


def shown_linear(got: Parsed, sr: Volume, seg: Volume, wanted: np.ndarray) -> float:
    """Grey levels that the page's best linear estimate is from ``wanted`` at most, which lies on the grid of SR."""
    found, plan = decoded(got)
    top = white(sr, seg)
    first = np.rint(np.linalg.inv(sr.affine) @ np.array(plan["affine"]))[:3, 3].astype(int)
    box = tuple(slice(f, f + n) for f, n in zip(first, plan["shape"], strict=True))
    return float(np.abs(found["linear"] - np.clip(wanted[box] * 255 / top, 0, 255)).max())


def test_the_best_linear_estimate_lies_beside_spline_and_sr(results, parsed, tmp_path):
    """By the truth where there is one, else with the weight and slices of the record; said in one line."""
    sr, scan = images.load(results / "scan_sr.nii.gz"), images.load(results.parent / "scan.nii.gz")
    spline, seg = onto_grid(scan, sr, notes=[]).data, images.load_label(results / "scan_seg.nii.gz")
    told = json.loads((results / "scan.json").read_text(encoding="utf8"))["agree"]

    def estimate(w: float, **slices) -> np.ndarray:
        seen = observation(scan.data.shape, scan.spacing, sr.data.shape, sr.spacing, **slices)
        down = seen.down[2]
        back = np.linalg.solve(down @ down.T + w * np.eye(9), down)
        return np.maximum(spline + (scan.data - spline @ down.T) @ back, 0)

    truth = images.load(make_truth(tmp_path)[0]).data
    by_truth = [np.maximum(spline, 0), *(estimate(w) for w in LINEAR_WEIGHTS)]  # the first: of infinity
    best = min(by_truth, key=lambda made: ((made - truth) ** 2).sum())
    assert shown_linear(parsed, sr, seg, best) <= 0.52  # found: 0.5
    assert "w the best of eight and infinity by the truth" in parsed.words and {"spline", "linear"} <= panes_of(parsed)
    (path,) = report(results / "scan.json", tmp_path / "page.html")
    got = Parsed(path.read_text(encoding="utf8"))
    own = estimate(told["weight"], thickness_mm=told["width_mm"], profile=told["profile"])
    assert shown_linear(got, sr, seg, own) <= 0.52 and np.abs(own - best).max() > 1  # found: 0.5
    assert f"w = {told['weight']:.3g} as the record chose" in got.words


@pytest.mark.parametrize("change", [{"agree": None}, {"agree": {"weight": "0.1"}}, {"geometry": "segsrgan"}])
def test_a_record_without_a_weight_has_no_linear_estimate(results, tmp_path, change):
    record = json.loads((results / "scan.json").read_text(encoding="utf8")) | change
    for name in ("scan_sr.nii.gz", "scan_seg.nii.gz"):
        shutil.copyfile(results / name, tmp_path / name)
    write_json(tmp_path / "scan.json", record)
    got = Parsed(report(tmp_path / "scan.json")[0].read_text(encoding="utf8"))
    assert "linear" not in panes_of(got) and "spline" in panes_of(got) and "Best linear" not in got.words


def panes_of(got: Parsed) -> set[str]:
    return {pane["id"] for pane in json.loads(got.blocks["plan"])["panes"]}


@pytest.mark.parametrize(("axes", "flips"), [((2, 0, 1), (True, False, True)), ((1, 0, 2), (False, True, False))])
def test_storage_order_does_not_change_what_is_shown(results, axes, flips):
    sr = images.load(results / "scan_sr.nii.gz")
    turn = Orientation(axes, flips)
    other = Volume(np.ascontiguousarray(turn.apply(sr.data)), turn.affine(sr.affine, sr.data.shape))
    a = volumes.pack(volumes.images_of(sr, {}), 10**7)
    b = volumes.pack(volumes.images_of(other, {"copy": sr}), 10**7)
    assert np.array_equal(volumes.unpack(a)["sr"], volumes.unpack(b)["sr"]) and np.allclose(a.affine, b.affine)
    assert np.abs(volumes.unpack(b)["copy"].astype(int) - volumes.unpack(b)["sr"]).max() <= 1


def test_a_page_allows_its_own_scripts_and_nothing_else(page, parsed):
    (policy,) = [v for t, n, v in parsed.attributes if (t, n) == ("meta", "content") and "default-src" in v]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'" and rules["img-src"] == "data:" and "unsafe" not in policy
    allowed = set(rules["script-src"].split()) | set(rules["style-src"].split())
    hashes = {f"'sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}'" for s in parsed.sources}
    assert hashes == allowed and len(hashes) == 3
    assert not [a for a in parsed.attributes if a[1].startswith("on") or a[1] in ("style", "srcdoc")]
    loads = [v for _, n, v in parsed.attributes if n in ("src", "href", "data", "poster", "srcset")]
    assert loads and all(v.startswith(("#", "data:image/png;base64,")) for v in loads)
    assert not {"link", "iframe", "object", "embed", "base", "form"} & set(parsed.tags)
    assert "DOCTYPE" in page[:20].upper() and len(page.encode()) < 12e6  # found: 2.81e6


def test_the_same_results_give_the_same_bytes(results, page, tmp_path, monkeypatch):
    monkeypatch.setattr(viewer, "picture", DRAW)
    (again,) = report(results, tmp_path / "again.html")
    assert again.read_text(encoding="utf8") == page


HOSTILE = (
    '"><img src=x onerror=alert(1)></script><script>alert(2)</script><!--<script>&lt;\x00\x1b\u202e\ud800 javascript:'
)


def test_what_comes_from_files_stays_text(results, parsed, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    for kind in ("sr", "seg"):
        (out / f"scan_{kind}.nii.gz").write_bytes((results / f"scan_{kind}.nii.gz").read_bytes())
    record = json.loads((results / "scan.json").read_text(encoding="utf8"))
    scores = json.loads((results / "scores.json").read_text(encoding="utf8"))

    def poisoned(value):
        if isinstance(value, dict):
            return {k: poisoned(v) for k, v in value.items()} | {HOSTILE: HOSTILE, HOSTILE + "n": 1.5}
        if isinstance(value, list):
            return [poisoned(v) for v in value]
        return HOSTILE if isinstance(value, str) else value

    evil = poisoned(record)
    evil["outputs"] = {k: str(out / f"scan_{k}.nii.gz") for k in ("sr", "seg")}
    evil["warnings"] = [HOSTILE]
    worse = poisoned(scores)
    worse["files"] = {"sr": str(out / "scan_sr.nii.gz"), "hr": scores["files"]["hr"], "label": scores["files"]["label"]}
    worse["notes"] = [HOSTILE]
    name = HOSTILE.replace("/", "").replace("\x00", "").replace("\ud800", "")
    for where, value in ((name, evil), (name + "s", worse)):
        (out / f"{where}.json").write_text(json.dumps(value), encoding="utf8")
    (path,) = report(out, tmp_path / "page.html")
    got = Parsed(path.read_text(encoding="utf8"))
    assert got.facts["results"][0]["record"] == evil and got.facts["results"][0]["scores"]["notes"] == [HOSTILE]
    assert got.tags.count("script") == parsed.tags.count("script") - 3  # no input: no scan, spline or linear estimate
    assert set(got.tags) <= set(parsed.tags) | {"ul", "li"}
    assert not [a for a in got.attributes if a[1].startswith("on")]
    assert got.tags.count("img") == parsed.tags.count("img")
    assert "onerror=alert(1)" in got.words  # it is there, as text


def test_markup_escapes_all_but_markup():
    assert el("b", "<i>", el("u", "&"), None, title='"x"', hidden=True) == (
        '<b title="&quot;x&quot;" hidden>&lt;i&gt;<u>&amp;</u></b>'
    )
    assert "</script>" not in data_block("x", {"a": "</script>"})[:-9]
    assert pointer("a/b", "c~d", 0) == "/a~1b/c~0d/0"
    assert cohort.at({"a/b": {"c~d": [7]}}, pointer("a/b", "c~d", 0)) == 7


def noisy(shape, affine=None) -> Volume:
    data = np.random.default_rng(0).uniform(100, 1000, shape).astype(np.float32)
    return Volume(data, np.eye(4) if affine is None else affine)


def test_of_a_volume_too_large_for_its_page_a_part_is_shown_at_full_resolution():
    big = noisy((61, 67, 59))
    other = {"seg": Volume((big.data > 550).astype(np.uint8), big.affine)}
    images_ = volumes.images_of(big, other)
    whole = volumes.pack(images_, 10**7)
    assert whole.shape == whole.head == (61, 67, 59) and not whole.is_part and whole.spacing == (1, 1, 1)
    full = volumes.unpack(whole)
    for most, across in ((whole.size // 2, 0), (whole.size // 2, 1), (whole.size // 40, 2)):
        packed = volumes.pack(images_, most, (30.0, 40.0, 20.0), across)
        assert packed.size <= most and packed.size > 0.75 * most  # it uses what it is given; found: 0.93 at least
        assert packed.is_part and packed.spacing == (1, 1, 1) and packed.all_bytes == whole.size
        first = np.rint(packed.affine[:3, 3]).astype(int)
        box = tuple(slice(f, f + n) for f, n in zip(first, packed.shape, strict=True))
        for name, data in volumes.unpack(packed).items():
            assert np.array_equal(data, full[name][box]), name
        assert all(s.start <= at < s.stop for s, at in zip(box, (30, 40, 20), strict=True))
        if most == whole.size // 2:  # a slab: whole in the plane that is opened
            assert [n for d, n in enumerate(packed.shape) if d != across] == [
                n for d, n in enumerate((61, 67, 59)) if d != across
            ]
    with pytest.raises(ResourceError, match="--max-mb"):
        volumes.pack(images_, 50)


def test_pages_stay_below_the_limit_and_say_what_it_cost(results, page, tmp_path):
    whole = len(page.encode())
    parsed = Parsed(page)
    held = sum(len(text) for name, text in parsed.blocks.items() if name.startswith("volume-"))
    limit = (whole - held + 203_000) / 1e6
    sizes = []
    for most in (limit, 12):
        (path,) = report(results, tmp_path / "page.html", max_mb=most, overwrite=True)
        sizes.append(path.stat().st_size)
        assert sizes[-1] <= most * 1e6  # found: 9.56e5
    with pytest.raises(UsageError, match=r"--max-mb: 0.5 MB is too little: .* \(\d+ or more\)") as told:
        report(results, tmp_path / "page.html", max_mb=0.5, overwrite=True)
    report(results, tmp_path / "page.html", max_mb=float(told.value.hint.split()[0]), overwrite=True)
    with pytest.raises(UsageError, match="--max-mb: is of a result's page"):
        report(make_run(tmp_path / "run"), max_mb=0.5)


def in_part(*args, **options):
    """The pages of results of which something is not shown."""
    with pytest.raises(NotShown) as error:
        report(*args, **options)
    return error.value.written


@pytest.mark.parametrize("gone", ["input", "seg", "sr of one of two"])
def test_what_a_page_does_not_show_is_told_on_the_terminal_and_by_the_code(results, tmp_path, capsys, gone):
    """The scan need not lie where it lay; what the record says was made has to be there."""
    out = shutil.copytree(results, tmp_path / "out")
    record = json.loads((out / "scan.json").read_text(encoding="utf8"))
    if gone == "input":
        write_json(out / "scan.json", record | {"input": record["input"] | {"path": str(tmp_path / "scan.nii.gz")}})
        code, pages, told = 0, 1, "scan: the input is no longer there and is not shown"
    elif gone == "seg":
        (out / "scan_seg.nii.gz").unlink()
        code, pages, told = 6, 1, "scan: the segmentation is no longer there and is not shown"
    else:
        (out / "scores.json").unlink()
        write_json(out / "other.json", record | {"outputs": {"sr": "other_sr.nii.gz"}})
        code, pages, told = 6, 3, "other: the super-resolved image is no longer there and is not shown"
    assert cli.main(["report", str(out), "--json", "--overwrite"]) == code
    printed = capsys.readouterr()
    assert len(json.loads(printed.out)) == pages and f"warning: {told}" in printed.err
    of = "1 of 2 results is not shown whole: other" if pages > 1 else "1 of 1 result is not shown whole: scan"
    assert (f"error: {out / 'report.html'}: {of} (see the warnings; the pages hold the rest)" in printed.err) == bool(
        code
    )


def test_an_image_stands_for_the_result_whose_record_names_it(results, tmp_path):
    out = shutil.copytree(results, tmp_path / "out")
    for kind in ("sr", "seg"):
        image = out / f"scan_{kind}.nii.gz"
        assert find(image).results[0].record == find(out / "scan.json").results[0].record
    (page,) = report(out / "scan_sr.nii.gz", overwrite=True)
    assert Parsed(page.read_text(encoding="utf8")).facts["results"][0]["stem"] == "scan"
    (out / "scan.json").rename(out / "moved.json")
    assert find(out / "scan_seg.nii.gz").results[0].stem == "moved"
    stranger = images.save(out / "stranger_sr.nii.gz", np.ones((4, 4, 4), np.float32), np.eye(4))
    with pytest.raises(InputError, match=r"stranger_sr\.nii\.gz: is an image, and no record beside it names it"):
        find(stranger)


def test_what_is_missing_or_changed_is_said(results, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    for name in ("scan_sr.nii.gz", "scan.json"):
        (out / name).write_bytes((results / name).read_bytes())
    record = json.loads((out / "scan.json").read_text(encoding="utf8"))
    record["input"]["path"] = str(make_scan(tmp_path / "scan.nii.gz", edge=3.0))
    record["outputs"]["seg"] = str(out / "nowhere.nii.gz")
    write_json(out / "scan.json", record)
    (path,) = in_part(out)
    got = Parsed(path.read_text(encoding="utf8"))
    assert "is not the file that the result was made of" in got.words
    assert "the segmentation is no longer there" in got.words
    assert [b for b in got.blocks if b.startswith("volume-")] == ["volume-sr"]
    (out / "scan_sr.nii.gz").unlink()
    record["outputs"]["sr"] = str(out / "nowhere_sr.nii.gz")
    write_json(out / "scan.json", record)
    (path,) = in_part(out, overwrite=True)
    got = Parsed(path.read_text(encoding="utf8"))
    assert "the super-resolved image is no longer there" in got.words and "canvas" not in got.tags
    assert got.facts["results"][0]["record"]["seconds"] == record["seconds"]


SECRET = "root:x:0:0"


@pytest.mark.parametrize("way", ["outputs", "link", "input", "no checksum", "folder", "truth", "demo"])
def test_a_record_cannot_put_other_files_on_the_page(results, tmp_path, way):
    """The page of a stranger's record showed how /etc/passwd begins."""
    secret = tmp_path / "elsewhere" / "passwd"
    other = make_truth(tmp_path)[0].rename(tmp_path / "other.nii.gz")
    out = tmp_path / "demo" / "out"
    for folder in (secret.parent, out, tmp_path / "demo" / "cohort"):
        folder.mkdir(parents=True)
    secret.write_text(SECRET * 50, encoding="utf8")
    record = json.loads((results / "scan.json").read_text(encoding="utf8"))
    record["outputs"] = (
        dict.fromkeys(("sr", "seg", "doubt", "mask"), str(secret)) if way == "outputs" else {"sr": "scan_sr.nii.gz"}
    )
    record["input"] = {"path": str(secret.parent if way == "folder" else secret), "sha256": None}
    if way == "no checksum":
        record["input"] = {"path": str(other)}
    scores = {"image": {"whole": {}}, "files": {"sr": "scan_sr.nii.gz", "hr": str(secret), "label": str(secret)}}
    if way == "link":
        (out / "scan_sr.nii.gz").symlink_to(secret)
    elif way != "outputs":
        shutil.copyfile(results / "scan_sr.nii.gz", out / "scan_sr.nii.gz")
    if way == "truth":
        write_json(out / "scores.json", {"definitions": {}} | scores)
    if way == "demo":
        write_json(out.parent / "demo.json", {"scores": scores})
        rows = f"HR_image,Label_image,Base\n{secret},{secret},Test\n"
        (out.parent / "cohort" / "cohort.csv").write_text(rows, encoding="utf8")
    write_json(out / "scan.json", record)
    (path,) = (in_part if way in ("outputs", "link") else report)(out.parent if way == "demo" else out)
    got = Parsed(path.read_text(encoding="utf8"))
    assert SECRET[:6] not in path.read_text(encoding="utf8")
    shown = [name for name in got.blocks if name.startswith("volume-")]
    assert shown == ([] if way in ("outputs", "link") else ["volume-sr"])
    if way == "outputs":
        assert "the super-resolved image is no longer there" in got.words


def test_truth_given_to_the_report_is_evaluated(results, tmp_path):
    image, label = make_truth(tmp_path)
    (path,) = report(results / "scan.json", tmp_path / "page.html", hr=image, label=label)
    scores = Parsed(path.read_text(encoding="utf8")).facts["results"][0]["scores"]
    told = json.loads((results / "scores.json").read_text(encoding="utf8"))
    assert scores["image"]["whole"] == pytest.approx(told["image"]["whole"])
    assert scores["segmentation"]["dice"] == told["segmentation"]["dice"]


def test_a_truth_that_lost_its_header_is_refused_by_the_report_as_by_evaluate(tmp_path):
    """Before a page is written. One that was scored in earlier days is drawn where its header has it, also where the
    part that is shown has the truth's array: a head that fills its image, stored in world order."""
    data = np.random.default_rng(0).random((24, 24, 8)).astype(np.float32) + 1
    scan = images.save(tmp_path / "scan.nii.gz", data, np.diag([2.0, 2, 6, 1]) + np.eye(4)[:, [1, 2, 0, 3]] * 0)
    infer_files([scan], tmp_path / "out", make_model(tmp_path), patch=16, step=16, device="cpu")
    sr_file, record = tmp_path / "out" / "scan_sr.nii.gz", tmp_path / "out" / "scan.json"
    sr = images.load(sr_file)
    truth = images.save(tmp_path / "truth.nii.gz", sr.data, np.eye(4))
    lost = "the reference has the SR's array and no place of its own"
    with pytest.raises(InputError, match=lost):
        evaluate_files(sr_file, truth)
    with pytest.raises(InputError, match=lost):
        report(record, tmp_path / "page.html", hr=truth)
    assert not (tmp_path / "page.html").exists()
    scores = evaluate_files(sr_file, sr_file)
    write_json(tmp_path / "scores.json", scores | {"files": scores["files"] | {"hr": str(truth)}})
    (path,) = report(record, tmp_path / "page.html", scores=tmp_path / "scores.json")
    assert "volume-truth" in Parsed(path.read_text(encoding="utf8")).blocks


@pytest.mark.parametrize("outside", ["scan", "zero"])
def test_a_truths_baselines_are_those_of_evaluate_with_the_scan(results, tmp_path, outside):
    """Also of a result whose outside was set to zero: the page draws the spline cut there, figures are the scan's."""
    image, label = make_truth(tmp_path)
    out = shutil.copytree(results, tmp_path / "out")
    record = json.loads((out / "scan.json").read_text(encoding="utf8"))
    write_json(out / "scan.json", record | {"region": {"outside": outside}})
    (path,) = report(out / "scan.json", tmp_path / "page.html", hr=image, label=label)
    got = Parsed(path.read_text(encoding="utf8"))
    scores = got.facts["results"][0]["scores"]
    scan = results.parent / "scan.nii.gz"
    told = evaluate_files(out / "scan_sr.nii.gz", image, out / "scan_seg.nii.gz", label, lr=scan)
    for part in ("image", "segmentation", "baseline", "gain", "baselines", "grid", "notes", "definitions"):
        assert scores[part] == json.loads(json.dumps(told[part])), part
    assert {"dice", "components", "hausdorff95_mm"} <= set(scores["baseline"]["segmentation"])
    assert f"Baseline: image: {SPLINE}; segmentation: {READER}." in got.words


def test_a_mask_of_the_truth_is_a_region_of_the_figures(results, tmp_path):
    image, label = make_truth(tmp_path)
    (path,) = report(results / "scan.json", tmp_path / "page.html", hr=image, label=label, mask=label)
    scores = Parsed(path.read_text(encoding="utf8")).facts["results"][0]["scores"]["image"]
    assert scores["mask"] == scores["label"] and scores["mask"]["mae"] != scores["whole"]["mae"]


# --- cohort ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def several(tmp_path_factory) -> tuple[Path, list[Path]]:
    out = make_results(tmp_path_factory.mktemp("many"), count=3)
    return out, report(out, out / "index.html")


def test_a_volume_in_millilitres_takes_all_three_edges_of_a_voxel():
    seg = np.zeros((8, 9, 7), np.uint8)
    seg[1:4, 2:6, 1:3] = 1
    told = alone(Volume(seg, np.diag([-0.5, 2.0, 3.0, 1.0])))
    assert told["volume_ml"] == pytest.approx(24 * 0.5 * 2 * 3 / 1000) and told["components"] == 1


def test_a_cohort_is_a_table_whose_rows_open_pages(several):
    out, written = several
    assert [p.name for p in written] == ["index.html", *(f"{s}_index.html" for s in ("scan", "scan1", "scan2"))]
    got = Parsed(written[0].read_text(encoding="utf8"))
    links = [v for t, n, v in got.attributes if (t, n) == ("a", "href") and not v.startswith("#")]
    assert {(out / link).resolve() for link in links} == {p.resolve() for p in written[1:]}
    thumbnails = [v for t, n, v in got.attributes if (t, n) == ("img", "src")]
    assert len(thumbnails) == 3 and len(set(thumbnails)) == 3
    for path, value, _ in got.figures:
        assert json.loads(value) == cohort.at(got.facts, path)
    for i, row in enumerate(got.facts["rows"]):
        seg = images.load_label(out / f"{row['stem']}_seg.nii.gz")
        assert row["measured"]["volume_ml"] == pytest.approx(seg.data.sum() * np.prod(seg.spacing) / 1000)
        assert f"/rows/{i}/measured/volume_ml" in {path for path, _, _ in got.figures}
    single = Parsed(written[1].read_text(encoding="utf8"))
    assert "index.html" in [v for t, n, v in single.attributes if (t, n) == ("a", "href")]


def test_a_cohort_shows_each_light_its_reasons_and_what_is_segmented(several, tmp_path):
    """Of results that have one; mean and rule of outliers only where there is something of it."""
    out, _ = several
    shutil.copytree(out, tmp_path / "out")
    lights = {"scan": ("green", []), "scan1": ("red", ["the head is <small>"]), "scan2": ("yellow", ["a", "b"])}
    for stem, (light, reasons) in lights.items():
        path = tmp_path / "out" / f"{stem}.json"
        record = json.loads(path.read_text(encoding="utf8")) | {"plausibility": {"light": light, "reasons": reasons}}
        write_json(path, record | {"made_for": MODELS["adult"].purpose.to_dict()})
    page = report(tmp_path / "out", tmp_path / "all.html")[0].read_text(encoding="utf8")
    got = Parsed(page)
    file = Path(record["weights"]["path"]).name
    told = f"Segmented: cortical grey matter. Weights: {file}. Green is no proof that the segmentation is right"
    assert told in got.words
    assert [v for t, n, v in got.attributes if (t, n) == ("td", "data-sort")] == ["0", "2", "1"]
    assert "● redthe head is <small>" in got.words and "● yellowa; b" in got.words and "plausibility" in got.words
    assert "mean ± sd" not in got.words and "Iglewicz" not in got.words and "knows the truth" not in got.words
    old = tmp_path / "out" / "scan.json"
    record = json.loads(old.read_text(encoding="utf8"))
    record["weights"] |= {"path": f"elsewhere/{MODELS['perinatal'].file}", "chosen": "auto: head 81 mm long"}
    write_json(old, {k: v for k, v in record.items() if k != "plausibility"})
    got = Parsed(report(tmp_path / "out", tmp_path / "old.html")[0].read_text(encoding="utf8"))
    assert [v for t, n, v in got.attributes if (t, n) == ("td", "data-sort")] == ["2", "1"]
    assert f"Weights: {file}" not in got.words and "perinatal (auto: head 81 mm long)" in got.words, "a column"
    assert got.words.count(file) == 2, "of the two other rows"


def test_a_cohort_with_scores_shows_dice_beside_the_baselines(several, tmp_path):
    out, _ = several
    image, label = make_truth(tmp_path)
    rows = [
        evaluate_files(out / f"{s}_sr.nii.gz", image, out / f"{s}_seg.nii.gz", label, lr=out.parent / f"{s}.nii.gz")
        for s in ("scan", "scan1", "scan2")
    ]
    write_json(tmp_path / "table.json", {"rows": rows, "definitions": {}})
    got = Parsed(report(out, tmp_path / "all.html", scores=tmp_path / "table.json")[0].read_text(encoding="utf8"))
    heads = re.findall(r'<button type="button">([^<]*)</button>', (tmp_path / "all.html").read_text(encoding="utf8"))
    first = ["result", "plausibility", "PSNR, dB", "SSIM", "gain PSNR, dB", "Dice", "baseline Dice", "HD95, mm"]
    assert heads[:8] == first and "components" in heads and "largest component" not in heads
    told = {path: json.loads(value) for path, value, _ in got.figures}
    assert told["/rows/1/scores/baseline/segmentation/dice"] == rows[1]["baseline"]["segmentation"]["dice"]
    mean = sum(row["baseline"]["segmentation"]["dice"] for row in rows) / 3
    assert told["/summary/baseline.segmentation.dice/mean"] == pytest.approx(mean, abs=1e-12)  # found: 0
    assert "mean ± sd" in got.words and "interpolated: it knows the truth" in got.words


def test_outliers_follow_the_rule():
    assert cohort.outliers([1, 2, 3, 4, 5, 100]) == [5]
    # median 3.5, MAD 1.5: the limit is 3.5 * 1.5 / 0.6745 = 7.783 away
    assert cohort.outliers([1, 2, 3, 4, 5, 3.5 + 7.79]) == [5]
    assert cohort.outliers([1, 2, 3, 4, 5, 3.5 + 7.77]) == []
    assert cohort.outliers([1, 2, None, 3, 4, -90, "x"]) == [5]
    assert cohort.outliers([5, 5, 5, 5, 5, 90]) == []  # MAD 0
    assert cohort.outliers([1, 2, 3, 900]) == []  # too few
    assert cohort.outliers([1, 2, 3, 900, None, None, "x"]) == []  # as few, whatever results have no value


def test_scores_find_their_image(several, tmp_path):
    out, _ = several
    image, _ = make_truth(tmp_path)
    definitions = {"definitions": {"psnr_db": "words"}}
    row = {"image": {"whole": {"psnr_db": 31.5, "ssim": None}}, "files": {"sr": str(out / "scan1_sr.nii.gz")}}
    write_json(tmp_path / "table.json", {"rows": [row], "failed": [], "summary": {}} | definitions)
    written = report(out, tmp_path / "all.html", scores=tmp_path / "table.json")
    got = Parsed(written[0].read_text(encoding="utf8"))
    scored = {r["stem"]: r["scores"] for r in got.facts["rows"]}
    assert scored["scan1"]["image"]["whole"]["psnr_db"] == 31.5 and scored["scan"] is scored["scan2"] is None
    assert ("/rows/1/scores/image/whole/psnr_db", "31.5", "31.5") in got.figures
    row["files"]["sr"] = str(image)
    write_json(tmp_path / "table.json", {"rows": [row]} | definitions)
    with pytest.raises(UsageError, match="none of these results"):
        report(out, tmp_path / "all.html", scores=tmp_path / "table.json", overwrite=True)


def test_page_names_stay_in_their_folder():
    assert cohort.page_name("a/../b", Path("x/report.html")) == "a_.._b_report.html"
    assert cohort.page_name("a\\b\0", Path("report.html")) == "a_b__report.html"


# --- runs and studies -----------------------------------------------------------------------------------------------


def test_a_run_shows_its_curves(tmp_path):
    run = make_run(tmp_path / "run")
    (path,) = report(run)
    got = Parsed(path.read_text(encoding="utf8"))
    facts = got.facts["run"]
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf8").splitlines()[:-1]]
    updates = [row for row in rows if "update" in row]
    assert facts["updates"] == 700 and facts["updates_per_point"] == 3 and facts["unreadable_lines"] == 1
    assert facts["curves"]["g_reconstruction"][5] == pytest.approx(
        np.mean([r["g_reconstruction"] for r in updates[15:18]])
    )
    assert facts["validation"] == [{"epoch": r["epoch"], **r["validation"]} for r in rows if "validation" in r]
    assert ("/run/summary/best", "0.9375", "0.9375") in got.figures
    assert got.tags.count("svg") == 7 and "canvas" not in got.tags and got.tags.count("script") == 1
    assert "alert(1)" in got.words and "point is the mean of 3 updates" in got.words


def test_several_runs_are_laid_over_each_other(tmp_path, capsys):
    """Each run's own values, under its own name, in one colour in all charts."""
    one, two = make_run(tmp_path / "one", updates=200), make_run(tmp_path / "two", updates=300)
    config = (two / "config.yaml").read_text(encoding="utf8")
    (two / "config.yaml").write_text(config.replace("epochs: 7", "epochs: 9"), encoding="utf8")
    code, out, _ = call(capsys, "report", one, two, "-o", tmp_path / "both.html")
    assert code == 0 and out.strip() == str(tmp_path / "both.html")
    text = (tmp_path / "both.html").read_text(encoding="utf8")
    got = Parsed(text)
    assert [facts["updates"] for facts in got.facts["runs"]] == [200, 300]
    for path, value, _ in got.figures:
        assert json.loads(value) == cohort.at(got.facts, path)
    assert {("/runs/0/summary/updates", "200"), ("/runs/1/summary/updates", "300")} <= {f[:2] for f in got.figures}
    dice = re.search(r"<svg[^>]*><title>Dice.*?</svg>", text, re.DOTALL)[0]
    assert "Dice on the test subjects: one, two against epoch" in dice
    # Two points of the first run, three of the second, each in its colour, at its values.
    first, second = (
        re.findall(rf'<circle cx="([\d.]+)" cy="([\d.]+)" r="2.6" class="dot s{i}">', dice) for i in (0, 1)
    )
    assert len(first) == 2 and first == second[:2] and len(second) == 3
    assert "Settings that differ" in got.words and "epochs" in got.words and "9" in got.words
    assert "canvas" not in got.tags and "alert(1)" not in list(got.attributes)
    code, _, err = call(capsys, "report", one, two, "-o", tmp_path / "both.html")
    assert code == 2 and "exists already" in err
    code, _, err = call(capsys, "report", one, tmp_path)
    assert code == 2 and "is no training run" in err
    code, _, err = call(capsys, "report", one, one)
    assert code == 2 and "named twice" in err
    code, _, err = call(capsys, "report", one, two, "--hr", "x.nii.gz")
    assert code == 2 and "--hr" in err


def test_a_run_says_which_weights_it_began_with_and_runs_differ_by_them():
    start = {"path": "perinatal", "file": "/models/segsrgan-k12-perinatal.safetensors", "sha256": "a1" * 32}
    own = {"path": "old/best.safetensors", "file": "old/best.safetensors", "sha256": "b2" * 32}
    summaries = [{"updates": 1}, {"updates": 1, "start_weights": start}, {"updates": 1, "start_weights": own}, None]
    told = ["new", "perinatal (segsrgan-k12-perinatal.safetensors)", "old/best.safetensors", "–"]
    none = {"validation": [], "at": [], "curves": {}, "config": "", "updates_per_point": 1, "unreadable_lines": 0}

    def rows(page):
        return re.findall(r'<th scope="row">start weights</th>((?:<td>[^<]*</td>)+)', page)

    def cells(*texts):
        return "".join(f"<td>{text}</td>" for text in texts)

    facts = [none | {"warnings": [], "summary": summary} for summary in summaries]
    for one, text in zip(facts[:3], told[:3], strict=True):
        assert rows(curves.run_card(one, [])) == [cells(text)]
    together = curves.runs_card(facts, ["a", "b", "c", "d"])
    assert rows(together) == [cells(*told)] * 2  # in the summary, and among what differs
    assert rows(curves.runs_card([facts[1], facts[1]], ["a", "b"])) == [cells(told[1], told[1])]
    other = facts[1] | {"summary": {"start_weights": start | {"sha256": "c3" * 32}}}  # the same name, another file
    texts = [told[1].replace(")", f", SHA-256 {sha * 4})") for sha in ("a1", "c3")]
    assert rows(curves.runs_card([facts[1], other], ["a", "b"])) == [cells(*texts)] * 2


def test_runs_are_compared_by_every_score_each_with_its_like(monkeypatch):
    charts = {}

    def line_chart(title, lines, *labels, named):
        assert title not in charts
        charts[title] = lines

    monkeypatch.setattr(curves, "line_chart", line_chart)
    scored = {"PSNR": 20.0, "whole_PSNR": 30.0, "spline_PSNR": 25.0, "Dice": 0.1, "Dice_mask0": 0.9, "SSIM": 0.8}
    scored |= {"Dice_cortex": 0.3, "whole_Dice_cortex": 0.4}
    rows = (
        [{"epoch": 1} | scored],
        [{"epoch": 1, "PSNR": 21.0, "Dice": 0.2}],
        [{"epoch": 1, "Dice_label_1": 0.6, "Dice_mask1": 0.5}],
    )
    facts = [{"validation": row, "at": [], "curves": {}, "summary": None, "config": ""} for row in rows]
    curves.runs_card(facts, ["one", "other", "masked"])
    found = {title: [(line.name, line.y) for line in lines] for title, lines in charts.items()}
    assert {title: lines for title, lines in found.items() if lines} == {
        "PSNR on the test subjects, dB: patches": [("one", [20.0]), ("other", [21.0])],
        "PSNR on the test subjects, dB: whole volumes": [("one", [30.0])],
        "SSIM on the test subjects": [("one", [0.8])],
        "Dice on the test subjects, segmentation of the first structure": [
            ("one", [0.1]),
            ("other", [0.2]),
            ("masked", [0.6]),
        ],
        "Dice of each structure on the test subjects: cortex, patches": [("one", [0.3])],
        "Dice of each structure on the test subjects: cortex, whole volumes": [("one", [0.4])],
    }


def test_sample_panels_come_from_tensorboard(tmp_path):
    board = pytest.importorskip("fastsrgan.train.logs", reason="board")
    pytest.importorskip("tensorboard", reason="the extra tensorboard is not installed")
    torch = pytest.importorskip("torch")
    run = make_run(tmp_path / "run", updates=5)
    events = board.Board(run, 0)
    events.picture("test/sample", torch.rand(12, 20), 5)
    events.close()
    (path,) = report(run)
    got = Parsed(path.read_text(encoding="utf8"))
    assert got.tags.count("img") == 1 and "test/sample, update 5" in got.words


def study(steps) -> dict:
    def row(model, step, value):
        figures = {
            "dice": {"mean": value, "sd": 0.01, "n": 2},
            "seconds": {"mean": 64000 / (step or 9) ** 3, "sd": None, "n": 2},
        }
        return {"condition": "clean", "low_res": [1, 1, 3], "model": model, "step": step, "n": 2, "figures": figures}

    rows = [row("shipped", s, 0.9 - s / 1000) for s in steps] + [row("interpolation", None, 0.8)]
    fit = [{"condition": "clean", "model": "shipped", "intercept_s": 0.5, "slope_s": 64000.0, "r2": 1.0}]
    return {"study": "steps", "rows": rows, "fit": fit}


def test_a_study_adds_its_curve(results, tmp_path):
    write_json(tmp_path / "steps.json", study((16, 24, 32)))
    (path,) = report(results, tmp_path / "page.html", studies=[tmp_path / "steps.json"])
    got = Parsed(path.read_text(encoding="utf8"))
    assert "Step curve" in got.words and got.tags.count("svg") == 2
    assert ("/studies/0/rows/1/figures/dice/mean", "0.876", "0.876") in got.figures
    assert ("/studies/0/fit/0/intercept_s", "0.5", "0.5") in got.figures and "/ step³, R²" in got.words
    (path,) = report(tmp_path / "steps.json", tmp_path / "alone.html")
    assert Parsed(path.read_text(encoding="utf8")).tags.count("svg") == 2
    with pytest.raises(InputError, match="holds no study"):
        report(results, tmp_path / "other.html", studies=[results / "scores.json"])


def test_the_study_of_resolution_is_drawn_against_the_thickness(tmp_path):
    rows = [
        {"condition": f"{low} mm", "low_res": [1, 1, low], "model": model, "step": step, "n": 2,
         "figures": {"largest_component": {"mean": 296140.5 + low, "sd": 2501.25, "n": 2}}}
        for low in (2, 4, 3) for model, step in (("interpolation", None), ("shipped", 24))
    ]  # fmt: skip
    write_json(tmp_path / "resolution.json", {"study": "resolution", "rows": rows})
    (path,) = report(tmp_path / "resolution.json")
    page = path.read_text(encoding="utf8")
    assert "slice thickness, mm" in page and page.count("<polyline") == 2 and page.count('class="line s1 dashed ') == 1
    # A large mean has no exponent.
    assert "296\u202f142" in page and "e+05" not in page


def test_a_chart_puts_points_where_they_belong():
    drawn = line_chart("t", [Line("a", [0, 5, 10], [0, None, 10]), Line("b<", [0, 10], [10, 0], dashed=True)], "x")
    dots = re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', drawn)
    assert len(dots) == 2 and float(dots[0][0]) < float(dots[1][0]) and float(dots[0][1]) > float(dots[1][1])
    assert "b&lt;" in drawn and "b<" not in drawn
    assert line_chart("t", [Line("a", [1], [None])], "x") == ""
    many = line_chart("t", [Line(str(i), [0, 1], [i, i]) for i in range(8)], "x")
    assert many.count("<polyline") == 8 and many.count('class="line s1"') == 2 and "s6" not in many
    assert ticks(0, 10) == [0, 2, 4, 6, 8, 10] and ticks(0.13, 0.18) == [0.13, 0.14, 0.15, 0.16, 0.17, 0.18]
    assert ticks(3, 3) == [3]


# --- faults ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("most", ["nan", "inf", "0", "-3", "1e308"])
def test_a_limit_that_is_none_is_refused(results, tmp_path, capsys, most):
    assert cli.main(["--quiet", "report", str(results), "-o", str(tmp_path / "a.html"), "--max-mb", most]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: --max-mb: ") and told.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_faults_are_told_before_anything_is_written(results, page, several, tmp_path):
    with pytest.raises(UsageError, match="exists already"):
        report(results)
    with pytest.raises(UsageError, match="exists already"):
        report(several[0], several[0] / "index.html")
    with pytest.raises(InputError, match="no such file"):
        report(tmp_path / "none")
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "list.json").write_text("[1, 2", encoding="utf8")
    with pytest.raises(InputError, match="no result, run or study; damaged or no JSON object: list"):
        report(empty)
    with pytest.raises(InputError, match="no result, run or study: it is damaged"):
        report(empty / "list.json")
    with pytest.raises(UsageError, match="need --hr"):
        report(results, tmp_path / "a.html", label=results / "x.nii.gz")
    with pytest.raises(UsageError, match="3 results"):
        report(several[0], tmp_path / "a.html", hr=results / "scan_sr.nii.gz")
    with pytest.raises(InputError, match="no JSON object"):
        report(results, tmp_path / "a.html", scores=results / "scan_sr.nii.gz")
    with pytest.raises(InputError, match="holds no scores"):
        report(results, tmp_path / "a.html", scores=results / "scan.json")
    with pytest.raises(ResourceError, match="folder is missing"):
        report(results, tmp_path / "none" / "a.html")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty"]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{}", "holds no scores"),
        ("\ufeff{\r\n}\n", "holds no scores"),
        ('{"subjects": [{"dice": 1}]}', "holds no scores"),
        ('{"definitions": {}, "rows": 5}', "holds no scores"),
        ("[1]", "is no JSON object"),
        ('{"rows"', "is no JSON object"),
        ("", "is no JSON object"),
    ],
)
def test_files_that_are_no_scores_say_what_they_are(results, tmp_path, capsys, text, told):
    (tmp_path / "s.json").write_text(text, encoding="utf8")
    code, _, err = call(capsys, "report", results, "-o", tmp_path / "a.html", "--scores", tmp_path / "s.json")
    assert code == 3 and not (tmp_path / "a.html").exists()
    one_line(err, f"s.json: {told}")


def test_a_damaged_record_is_named_and_the_others_shown(tmp_path, capsys):
    run = make_run(tmp_path / "run", updates=3)
    (run / "scan.json").write_text('{"input": {"pa', encoding="utf8")
    (run / "empty.json").write_text("{ }", encoding="utf8")
    code, _, err = call(capsys, "report", run)
    assert code == 0 and err.startswith("warning: ") and err.count("\n") == 1
    assert "scan.json: is damaged or no JSON object" in err


@pytest.mark.fault(25)
def test_what_may_not_be_read_is_not_called_damaged_or_changed(results, tmp_path, capsys, monkeypatch):
    """A record was "damaged or no JSON object", and the input "not the file that the result was made of"."""
    shutil.copytree(results, tmp_path / "out")
    (tmp_path / "out" / "other.json").write_text('{"a": 1}', encoding="utf8")
    closed = {tmp_path / "out" / "other.json"}
    closed.add(Path(json.loads((results / "scan.json").read_text(encoding="utf8"))["input"]["path"]))
    access, read = os.access, Path.read_bytes
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) not in closed and access(path, mode))

    def refused(path):
        if path in closed:
            raise PermissionError(13, "Permission denied", str(path))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", refused)
    code, _, err = call(capsys, "report", tmp_path / "out", "-o", tmp_path / "page.html")
    assert code == 0 and "other.json: is damaged or closed by its permissions, left out" in err
    assert "may not be read, by its permissions, and is not shown" in err and "is not the file" not in err
    with pytest.raises(InputError, match="it is damaged or closed by its permissions"):
        find(tmp_path / "out" / "other.json")


def test_the_command_writes_and_names_the_page(several, tmp_path, capsys):
    assert cli.main(["report", str(several[0]), "-o", str(tmp_path / "a.html"), "--quiet"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == str(tmp_path / "a.html")
    assert cli.main(["report", str(several[0]), "-o", str(tmp_path / "a.html"), "--quiet"]) == 2
    assert cli.main(["report", str(tmp_path / "none"), "--quiet"]) == 3
    assert "error: " in capsys.readouterr().err


def test_of_a_masked_scan_spline_and_difference_end_at_the_mask(tmp_path, monkeypatch):
    """As of a fetus in its mother: on the page, in `show` and in the picture of `infer`, SR is compared with what the
    network saw; the scan itself is shown as it was acquired."""
    scan, model = make_scan(tmp_path / "scan.nii.gz"), make_model(tmp_path)
    whole = images.load(scan)
    ball = sum(((grid - n / 2) / (0.3 * n)) ** 2 for grid, n in zip(np.ogrid[:33, :39, :9], (33, 39, 9), strict=True))
    mask = images.save(tmp_path / "mask.nii.gz", (ball < 1).astype(np.uint8), whole.affine)
    drawn: list[dict[str, Volume]] = []
    told: list[dict] = []
    monkeypatch.setattr(
        figure, "result_figure", lambda path, volumes, *words, **more: (drawn.append(volumes), told.append(more))
    )
    asked = {"patch": 32, "step": 32, "device": "cpu", "mask": str(mask), "outside": "zero", "png": True}
    infer_files([scan], tmp_path / "out", model, **asked)
    monkeypatch.undo()
    verdict = json.loads((tmp_path / "out" / "scan.json").read_text(encoding="utf8"))["plausibility"]
    light, words = told[0]["status"]
    assert light == verdict["light"] and words.startswith(f"plausibility {light}: {'; '.join(verdict['reasons'])}")
    assert told[0]["structure"] == "segmentation" and told[0]["footer"].startswith("weights model.safetensors, patch")
    titled = lambda columns, **more: drawn.append({c.title: c.volume for c in columns})  # noqa: E731
    monkeypatch.setattr(show_module, "planes", titled)
    show(tmp_path / "out")
    sr = drawn[0]["sr"].data
    top = float(np.percentile(sr[sr > 0], 99.9))
    for spline in (drawn[0]["spline"], drawn[1]["Cubic spline"]):
        assert np.abs(spline.data - sr)[sr == 0].max() == 0
    assert np.abs(onto_grid(whole, drawn[0]["sr"], notes=[]).data - sr)[sr == 0].max() > 0.7 * top  # found: 0.83
    assert all(np.array_equal(low.data, whole.data) for low in (drawn[0]["low"], drawn[1]["Low resolution"]))
    got = Parsed(report(tmp_path / "out")[0].read_text(encoding="utf8"))
    shown_volumes, plan = decoded(got)
    apart = {n: np.abs(shown_volumes[n].astype(int) - shown_volumes["sr"]) for n in ("spline", "linear", "low")}
    outside = shown_volumes["sr"] == 0
    assert outside.mean() > 0.2 and apart["low"][outside].max() > 100  # found: 0.79, 206
    assert apart["spline"][outside].max() == 0 and apart["linear"][outside].max() == 0
    assert plan["limit"] < 30 and "saw the scan inside the mask alone" in got.words  # found: 16


def test_a_page_whose_name_holds_bytes_that_are_no_text_is_linked_by_its_bytes():
    """Was an internal error: UnicodeEncodeError."""
    names = [b"l\xe4n.html", "lön.html".encode()]
    rows = [cohort.Row(Result("a", {"weights": {"path": "w"}}, {}), os.fsdecode(name), None, {}) for name in names]
    markup = cohort.table(rows, cohort.facts(rows))
    assert 'href="./l%E4n.html"' in markup and 'href="./l%C3%B6n.html"' in markup
