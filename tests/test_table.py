"""Tables: what is read, and that every fault is told at once."""

import csv
import io
import logging
import os
import re
from pathlib import PurePosixPath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastsrgan.errors import InputError
from fastsrgan.evaluate import cohort
from fastsrgan.io import nifti as images
from fastsrgan.io import tables
from fastsrgan.io.tables import read_list, read_table, subject_ids

HEADER = "HR_image,Label_image,Base"


@pytest.fixture
def folder(tmp_path):
    """Images a to e with labels, as empty files: a table does not open them."""
    for name in "abcde":
        (tmp_path / f"{name}.nii.gz").touch()
        (tmp_path / f"{name}_seg.nii").touch()
    return tmp_path


def table(folder, *rows, header=HEADER, name="table.csv"):
    path = folder / name
    path.write_text("\n".join([header, *rows]) + "\n", encoding="utf8")
    return path


def faults_of(path, **options):
    with pytest.raises(InputError) as caught:
        read_table(path, **options)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    return str(caught.value)


def test_the_originals_table(folder):
    path = table(folder, "a.nii.gz,a_seg.nii,Train", f"{folder}/b.nii.gz,{folder}/b_seg.nii,Test")
    first, second = read_table(path)
    assert (first.line, first.base, first.subject) == (2, "Train", "a")
    assert (first.image, first.label, first.mask) == (folder / "a.nii.gz", folder / "a_seg.nii", None)
    assert (second.line, second.base, second.image) == (3, "Test", folder / "b.nii.gz")


PLAIN = f"{HEADER}\na.nii.gz,a_seg.nii,Train\nb.nii.gz,b_seg.nii,Test\n"


@pytest.mark.fault(14)
@pytest.mark.parametrize(
    "raw",
    [
        b"\xef\xbb\xbf" + PLAIN.encode(),
        PLAIN.replace("\n", "\r\n").encode(),
        PLAIN.replace("\n", "\r").encode(),
        PLAIN.replace(",", ";").encode(),
        PLAIN.replace(",", "\t").encode(),
        PLAIN.replace(",", " , ").encode(),
        PLAIN.encode("utf-16"),
        ("\ufeff" + PLAIN).encode("utf-8-sig"),
        ("\ufeff" + PLAIN).encode("utf-16"),
        PLAIN.rstrip("\n").encode(),
        "\n".join(line + ",x" for line in PLAIN.splitlines()).encode(),
        re.sub("[^,\n]+", lambda m: f'"{m.group()}"', PLAIN).encode(),
    ],
    ids=[
        "bom",
        "crlf",
        "cr",
        "semicolon",
        "tab",
        "blanks",
        "utf16",
        "two-boms",
        "utf16-two",
        "cut",
        "extra-column",
        "quoted",
    ],
)
def test_every_way_to_write_the_same_table(folder, raw):
    plain = read_table(table(folder, *PLAIN.splitlines()[1:]))
    (folder / "other.csv").write_bytes(raw)
    assert read_table(folder / "other.csv") == plain


def test_a_table_of_windows_finds_its_files(folder):
    (folder / "in").mkdir()
    for name in ("a.nii.gz", "a_seg.nii"):
        (folder / name).rename(folder / "in" / name)
    (row, _) = read_table(table(folder, r"in\a.nii.gz,in\a_seg.nii,Train", "b.nii.gz,b_seg.nii,Test"))
    assert (row.image, row.label) == (folder / "in" / "a.nii.gz", folder / "in" / "a_seg.nii")


def test_blank_lines_are_skipped_and_line_numbers_stay(folder):
    path = table(folder, "", "a.nii.gz,a_seg.nii,Train", " , , ", "b.nii.gz,b_seg.nii,Test")
    assert [row.line for row in read_table(path)] == [3, 5]


def test_commas_and_blanks_in_quoted_paths(folder):
    (folder / "a, b.nii.gz").touch()
    assert read_table(table(folder, '"a, b.nii.gz",a_seg.nii,Train'))[0].image == folder / "a, b.nii.gz"
    assert "line 2: 4 fields under 3 columns" in faults_of(table(folder, "a, b.nii.gz,a_seg.nii,Train"))


def test_column_order_and_masks(folder):
    rows = ["Test,c.nii.gz,a.nii.gz,a_seg.nii", "Train,,b.nii.gz,b_seg.nii"]
    path = table(folder, *rows, header="Base,Mask_image,HR_image,Label_image")
    assert [row.mask for row in read_table(path)] == [folder / "c.nii.gz", None]


@pytest.mark.parametrize("base", ["{}/data/", "{}/data", "{}/da"])
def test_base_path_is_put_before_every_path(folder, base):
    (folder / "data").mkdir()
    for name in ("x.nii.gz", "x_seg.nii"):
        (folder / "data" / name).touch()
    start = "ta/" if base.endswith("da") else "/" if base.endswith("data") else ""
    path = table(folder, f"{start}x.nii.gz,{start}x_seg.nii,Train")
    assert read_table(path, base_path=base.format(folder))[0].image == folder / "data" / "x.nii.gz"
    both = table(folder, f"x.nii.gz,{folder}/a_seg.nii,Train")
    assert read_table(both, base_path=f"{folder}/data")[0].label == folder / "a_seg.nii"


def test_a_base_path_leaves_out_the_folder_that_the_command_runs_in(folder, monkeypatch):
    monkeypatch.chdir(folder)
    found = read_table(table(folder, "a.nii.gz,a_seg.nii,Train"))
    assert found[0].image == folder / "a.nii.gz"
    with pytest.raises(InputError, match=r"HR_image a\.nii\.gz: no such file"):
        read_table(table(folder, "a.nii.gz,a_seg.nii,Train"), base_path=f"{folder}/data")


@pytest.mark.parametrize(
    ("base", "meant"), [("{}/data", "{}/data/x.nii"), ("{}/data/", "{}/data/x.nii"), ("{}/s-", "{}/s-x.nii")]
)
def test_a_missing_image_is_named_below_the_folder_that_is_put_before_it(folder, base, meant):
    """The first of the two is a folder; text that is none is put before as it stands."""
    (folder / "data").mkdir()
    (folder / "list.txt").write_text("x.nii\n", encoding="utf8")
    found = read_list(folder / "list.txt", base_path=base.format(folder))
    assert [str(path) for path in found] == [meant.format(folder)]


def test_relative_paths_beside_the_table_then_in_the_current_folder(folder, tmp_path, monkeypatch):
    inner = folder / "inner"
    inner.mkdir()
    (inner / "a.nii.gz").touch()
    monkeypatch.chdir(folder)
    row = read_table(table(inner, "a.nii.gz,a_seg.nii,Train"))[0]
    assert (row.image, row.label) == (inner / "a.nii.gz", folder / "a_seg.nii")


@pytest.mark.fault(14)
def test_all_faults_at_once(folder):
    path = table(
        folder,
        "missing.nii.gz,a_seg.nii,Train",
        ",b_seg.nii,Tets",
        "c.nii.gz,,",
        "d.nii.gz,d_seg.nii,Train,more",
        "e.nii.gz,e_seg.nii,Train",
        "./e.nii.gz,e_seg.nii,Train",
        "../" + folder.name + "/e.nii.gz,d_seg.nii,Test",
        "b.nii.gz,b_seg.nii,Validation",
    )
    told = faults_of(path)
    for expected in (
        "9 faults",
        "line 2: HR_image missing.nii.gz: no such file",
        "line 3: HR_image is empty",
        "line 3: Base is 'Tets', did you mean Test?",
        "line 4: Label_image is empty",
        "line 4: Base is ''",
        "line 5: 4 fields",
        "line 7: HR_image e.nii.gz is already named at line 6",
        "line 8: HR_image e.nii.gz is in Test, and in Train at line 6",
        "line 9: Base is 'Validation', Train or Test is allowed",
        "--base-path",
    ):
        assert expected in told


@pytest.mark.fault(14)
@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("HR_image,Label,Base", "no column Label_image"),
        ("hr_image,Label_image,Base", "no column HR_image, rename hr_image?"),
        ("HR_image,Label_image", "no column Base"),
        ("HR_image,Label_image,Base,Base", "column Base twice"),
        ("a.nii.gz,a_seg.nii,Train", "3 faults"),
    ],
)
def test_header_faults(folder, header, expected):
    assert expected in faults_of(table(folder, "a.nii.gz,a_seg.nii,Train", header=header))


@pytest.mark.fault(14)
@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (b"", "is empty"),
        (b"\n\n", "is empty"),
        (HEADER.encode(), "no row below the header"),
        (f"{HEADER}\né.nii,a_seg.nii,Train".encode("latin-1"), "not UTF-8"),
        (b"\x1f\x8b\x08\x00\x00", "is a gzip file, not text"),
        (b"HR_image\0", "not text"),
    ],
)
def test_what_is_no_table(folder, raw, expected):
    (folder / "t.csv").write_bytes(raw)
    assert expected in faults_of(folder / "t.csv")


@pytest.mark.fault(14)
def test_missing_table_or_a_folder(folder):
    assert "no such file" in faults_of(folder / "none.csv")
    assert "is a folder (a CSV file with the columns HR_image, Label_image and Base is expected" in faults_of(folder)


def test_labels_may_be_absent_where_they_are_not_needed(folder):
    path = table(folder, "a.nii.gz,Train", header="HR_image,Base")
    assert read_table(path, need_label=False)[0].label is None
    assert "no column Label_image" in faults_of(path)


@pytest.mark.fault(14)
def test_a_subject_in_train_and_test_is_found_under_other_names(folder):
    (folder / "link.nii.gz").symlink_to(folder / "a.nii.gz")
    linked = table(folder, "a.nii.gz,a_seg.nii,Train", "link.nii.gz,b_seg.nii,Test")
    assert "line 3: HR_image link.nii.gz is in Test, and in Train at line 2" in faults_of(linked)
    shared = table(folder, "a.nii.gz,a_seg.nii,Train", "b.nii.gz,a_seg.nii,Test")
    assert "line 3: Label_image a_seg.nii is in Test, and in Train at line 2" in faults_of(shared)
    both_contrasts = table(folder, "a.nii.gz,a_seg.nii,Train", "b.nii.gz,a_seg.nii,Train")
    assert len(read_table(both_contrasts)) == 2


def test_sessions_of_one_person_belong_together(folder):
    names = [
        "site1/sub-0+1/ses-1/sub-0+1_ses-1.nii",
        "site1/sub-0+1/ses-2/sub-0+1_ses-2.nii",
        "site2/sub-01.nii",
        "sub-x/q.nii",
        "sub-x/r.nii",
    ]
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()

    def rows(*bases):
        return table(folder, *(f"{n},{c}_seg.nii,{b}" for n, c, b in zip(names, "abcde", bases, strict=False)))

    assert len(read_table(rows("Train", "Train", "Test", "Train", "Test"))) == 5
    assert "line 3: subject sub-0+1 is in Test, and in Train at line 2" in faults_of(rows("Train", "Test"))


def test_subject_ids_by_example():
    ids, P = subject_ids, PurePosixPath

    assert ids([P("/d/sub-01_T2w.nii.gz"), P("/d/x.y.hdr")]) == ["sub-01_T2w", "x.y"]
    assert ids([P("/d/s1/T2.nii"), P("/d/s2/T2.nii"), P("/d/other.nii")]) == ["s1-T2", "s2-T2", "other"]
    assert ids([P("/a/s/T2.nii"), P("/b/s/T2.nii")]) == ["a-s-T2", "b-s-T2"]
    assert ids([P("/d/A.nii"), P("/d/a.nii")]) == ["d-A", "d-a-2"]
    assert ids([P("/d/Zoé le Gô (2).nii")]) == ["Zoe_le_Go_2"]
    assert ids([P("/d/...nii"), P("/d/zarr.json.nii"), P("/頭.nii")]) == ["d", "zarr.json_", "subject"]


parts = st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=120)


@given(st.lists(st.lists(parts, min_size=1, max_size=4), min_size=1, max_size=8))
def test_subject_ids_are_unique_safe_and_repeatable(names):
    images = [PurePosixPath("/", *name) for name in names]
    ids = subject_ids(images)
    assert len({name.casefold() for name in ids}) == len(images)
    assert all(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,130}", name) for name in ids)
    assert not {"zarr.json", "manifest.json", "c"} & {name.casefold() for name in ids}
    assert subject_ids(images) == ids
    assert all(os.path.basename(name) == name for name in ids)


def test_lists(folder):
    text = folder / "list.txt"
    text.write_text(f"# two\n\nb.nii.gz\n  {folder}/a.nii.gz \nsome, name.nii\nb.nii.gz\n")
    assert read_list(text) == [folder / "b.nii.gz", folder / "a.nii.gz", folder / "some, name.nii"]
    rows = folder / "list.csv"
    for sep in ",;\t":
        rows.write_text(f"b.nii.gz{sep}ignored\na.nii.gz\n", encoding="utf-8-sig")
        assert read_list(rows) == [folder / "b.nii.gz", folder / "a.nii.gz"]
    rows.write_text('"one, two.nii.gz"\n')
    assert read_list(rows) == [folder / "one, two.nii.gz"]
    rows.write_text("\n\n")
    with pytest.raises(InputError, match="names no image"):
        read_list(rows)
    text.write_text("x.nii\n")
    text.write_text("https://host/y.nii.gz\n")
    with pytest.raises(InputError, match=r"https://host/y\.nii\.gz: is a URL"):
        images.load(read_list(text)[0])
    with pytest.raises(InputError, match=r"HR_image https://host/y\.nii\.gz is a URL"):
        read_table(table(folder, "https://host/y.nii.gz,a.nii.gz,Train"))
    text.write_text("x.nii\n")
    assert read_list(text, base_path="/data/")[0].as_posix() == "/data/x.nii"


@pytest.mark.parametrize(
    "text",
    [
        "HR_image,Label\na.nii.gz,b.nii.gz\nc.nii,d.nii\n",
        "PATH\na.nii.gz\nc.nii\n",
        "\n Image ;sex\na.nii.gz;f\n\nc.nii;m\n",
        ",HR_image\n0,a.nii.gz\n1,c.nii\n",
        "file\tsex\na.nii.gz\tf\nc.nii\tm\n",
        'Base;"HR_image";Label_image\nTrain;a.nii.gz;b.nii.gz\nTest;c.nii;b.nii.gz\n',
    ],
)
def test_a_heading_of_a_list_is_no_image(tmp_path, text):
    """Was an image that is not there, and code 6."""
    (tmp_path / "list.csv").write_text(text, encoding="utf-8-sig")
    assert read_list(tmp_path / "list.csv") == [tmp_path / "a.nii.gz", tmp_path / "c.nii"]


def test_an_image_that_is_called_like_a_heading_is_one(tmp_path):
    (tmp_path / "path").mkdir()
    (tmp_path / "list.csv").write_text("path,x\na.nii.gz\n", encoding="utf8")
    assert read_list(tmp_path / "list.csv") == [tmp_path / "path", tmp_path / "a.nii.gz"]


def test_lists_with_a_heading_may_be_wrong_too(tmp_path):
    table = tmp_path / "list.csv"
    table.write_text("image,sex\n", encoding="utf8")
    with pytest.raises(InputError, match="names no image"):
        read_list(table)


@pytest.mark.parametrize(("raw", "words"), [(b"PK\x03\x04rest", "Excel workbook"), (b"\x1f\x8brest", "a gzip file")])
def test_a_file_of_another_kind_is_named(tmp_path, raw, words):
    (tmp_path / "t.csv").write_bytes(raw)
    with pytest.raises(InputError, match=rf"{words}.*CSV UTF-8"):
        read_table(tmp_path / "t.csv")


def test_a_header_of_a_million_columns_is_told_in_short_and_soon(tmp_path):
    """Took half a minute and 30 KB of message."""
    (tmp_path / "t.csv").write_text(",".join(f"c{i}" for i in range(10**5)) + "\na\n", encoding="utf8")
    with pytest.raises(InputError, match="and 99988 more") as caught:
        read_table(tmp_path / "t.csv")
    assert len(str(caught.value)) < 1500


@pytest.mark.parametrize("header", ["HR_image,Mask_image,Base", "HR_image,Label_image,size(mm)"])
def test_a_column_that_is_right_is_not_to_be_renamed(tmp_path, header):
    (tmp_path / "t.csv").write_text(f"{header}\na,b,c\n", encoding="utf8")
    with pytest.raises(InputError, match=r"line 1: no column \w+, found HR_image, .*\(correct it and run again\)$"):
        read_table(tmp_path / "t.csv")


def test_a_misspelt_base_is_no_leak_as_well(tmp_path):
    for name in ("a.nii", "b.nii", "l.nii"):
        (tmp_path / name).touch()
    (tmp_path / "t.csv").write_text(
        "HR_image,Label_image,Base\na.nii,l.nii,Train\nb.nii,l.nii,trian\n", encoding="utf8"
    )
    with pytest.raises(InputError) as caught:
        read_table(tmp_path / "t.csv")
    assert "did you mean Train" in str(caught.value) and "in Train at line" not in str(caught.value)


# --- properties ---------------------------------------------------------------------------------------------------

NAMES = st.text("abcXYZ09 _-.,;'\"é", min_size=1, max_size=12).map(str.strip).filter(lambda name: name.strip(". "))
ROWS = st.lists(st.tuples(NAMES, st.sampled_from(["Train", "Test"])), min_size=1, max_size=6, unique_by=lambda r: r[0])
WAYS = st.tuples(
    st.sampled_from([",", ";", "\t"]),
    st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
    st.sampled_from(["\n", "\r\n"]),
    st.sampled_from(["utf8", "utf-8-sig", "utf-16"]),
    st.permutations(HEADER.split(",")),
)


@pytest.mark.fault(14)
@given(ROWS, WAYS)
def test_a_table_reads_back_however_it_was_written(tmp_path_factory, rows, way):
    delimiter, quoting, end, encoding, columns = way
    folder = tmp_path_factory.mktemp("table")
    written = [{"HR_image": f"{name}.nii", "Label_image": f"{name}_l.nii", "Base": base} for name, base in rows]
    for row in written:
        (folder / row["HR_image"]).touch()
        (folder / row["Label_image"]).touch()
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, delimiter=delimiter, quoting=quoting, lineterminator=end)
    writer.writeheader()
    writer.writerows(written)
    (folder / "t.csv").write_bytes(text.getvalue().encode(encoding))
    found = read_table(folder / "t.csv")
    assert [(r.line, r.image.name, r.label.name, r.base) for r in found] == [
        (i, row["HR_image"], row["Label_image"], row["Base"]) for i, row in enumerate(written, 2)
    ]


@pytest.mark.fault(14)
@given(st.text(st.characters(codec="utf8"), max_size=200), st.booleans())
def test_any_text_is_a_table_or_one_clear_line(tmp_path_factory, text, headed):
    path = tmp_path_factory.mktemp("table") / "t.csv"
    path.write_bytes((f"{HEADER}\n{text}" if headed else text).encode())
    for read in (read_table, read_list):
        try:
            read(path)
        except InputError as error:
            assert "\n" not in str(error) and str(error).startswith(f"{path}: ") and str(error).endswith(")")


@pytest.mark.parametrize(
    ("above", "row"),
    [
        ("sep=;\n", "a.nii.gz;a_seg.nii;Train"),
        ('"sep=,"\n', "a.nii.gz,a_seg.nii,Train"),
        ("sep=|\n", "a.nii.gz|a_seg.nii|Train"),
        ("# the cohort of 2024\n\n#, second line\n", "a.nii.gz,a_seg.nii,Train"),
        ("", "a.nii.gz,a_seg.nii,Train,,"),
    ],
)
def test_what_spreadsheets_put_around_a_table_is_no_part_of_it(folder, above, row):
    """Was "no column HR_image, found sep=;", and "5 fields under 3 columns"."""
    mark = next(d for d in ",;|" if d in row)
    (folder / "t.csv").write_text(above + HEADER.replace(",", mark) + "\n" + row + "\n", encoding="utf8")
    (found,) = read_table(folder / "t.csv")
    assert (found.image, found.label) == (folder / "a.nii.gz", folder / "a_seg.nii")
    assert found.line == above.count("\n") + 2


@pytest.mark.parametrize("nothing", ["n/a", "NA", "nan", "NaN", "<NA>", "null"])
def test_an_empty_cell_as_bids_r_and_pandas_write_it_is_empty(folder, nothing):
    header = f"{HEADER},Mask_image,Label_classes"
    (row,) = read_table(table(folder, f"a.nii.gz,a_seg.nii,Train,{nothing},{nothing}", header=header))
    assert (row.mask, row.classes) == (None, "")
    assert "Label_image is empty" in faults_of(table(folder, f"a.nii.gz,{nothing},Train"))


@pytest.mark.parametrize(
    "column", ["mask_image", "Mask image", "MASK-IMAGE", "Mask_img", "Label_class", "Tissues_image"]
)
def test_a_column_that_is_nearly_one_is_not_passed_over(folder, column):
    """The masks were left out without a word."""
    path = table(folder, "a.nii.gz,a_seg.nii,Train,b.nii.gz", header=f"{HEADER},{column}")
    assert f"column {column} is not read, rename it" in faults_of(path)


def test_columns_that_nothing_reads_are_named(folder, caplog):
    with caplog.at_level("INFO", logger="fastsrgan"):
        read_table(table(folder, "a.nii.gz,a_seg.nii,Train,30,b.nii.gz", header=f"{HEADER},age,Brain"))
    assert "not read: age, Brain" in caplog.text


def test_a_table_of_another_separator_says_which_are_known(folder):
    assert "comma, semicolon or tab" in faults_of(table(folder, "a b c", header=HEADER.replace(",", " ")))


def test_a_file_url_says_that_its_path_is_wanted(folder):
    """Was told to download it."""
    assert "write the path alone" in faults_of(table(folder, f"file://{folder}/a.nii.gz,a_seg.nii,Train"))
    with pytest.raises(InputError, match="is a URL") as caught:
        images.load(f"file://{folder}/a.nii.gz")
    assert caught.value.hint == f"write the path alone, {folder}/a.nii.gz"


@pytest.mark.parametrize(
    ("text", "names", "told"),
    [
        ("sep=;\nimage;age\na.nii.gz;3\n", ["a"], ""),
        ("# mine\nimage\na.nii.gz\n", ["a"], ""),
        ("id,T1\ns1,a.nii.gz\ns2,\ns3,n/a\n", ["a"], "2 lines name no image: 3, 4"),
        ("image,id\na.nii.gz,s1\n,s2\n", ["a"], "1 line names no image: 3"),
        ("Base,HR_image\nTrain,a.nii.gz\nTest\nTest,n/a\n", ["a"], "2 lines name no image: 3, 4"),
        ("id,T1,T2\ns1,a.nii.gz,b.nii.gz\n", ["a"], "the images of column T1 are taken, those of T2 are not"),
        ("LR_image,HR_image\na.nii.gz,b.nii.gz\n", ["b"], "of column HR_image are taken, those of LR_image are not"),
        ("T1,T2\na.nii.gz,b.nii.gz\n", ["a"], "the images of column T1 are taken, those of T2 are not"),
        ("T1\na.nii.gz\n", ["a"], ""),
        ("a.nii.gz,b.nii.gz\n", ["a"], "the images of column 1 are taken, those of 2 are not"),
        ("a.nii.gz" + ",b.nii.gz" * 12, ["a"], f"1 are taken, those of {', '.join(map(str, range(2, 14)))} are not"),
        (
            "a.nii.gz" + ",b.nii.gz" * 13,
            ["a"],
            f"1 are taken, those of {', '.join(map(str, range(2, 14)))} and 1 more are not",
        ),
        ("a.nii.gz,x\n" + ",x\n" * 12, ["a"], f"12 lines name no image: {', '.join(map(str, range(2, 14)))}"),
        (
            "a.nii.gz,x\n" + ",x\n" * 13,
            ["a"],
            f"13 lines name no image: {', '.join(map(str, range(2, 14)))} and 1 more",
        ),
    ],
)
@pytest.mark.parametrize("ending", ["csv", "tsv"])
def test_what_a_list_leaves_out_is_told(folder, caplog, text, names, told, ending):
    """An image for which the cell was empty, and a second column of images, were dropped without a word."""
    path = folder / f"l.{ending}"
    path.write_text(text.replace(",", "\t") if ending == "tsv" else text, encoding="utf8")
    assert [images.stem(found) for found in read_list(path)] == names
    warned = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert bool(told) == bool(warned) and [m for m in warned if not m.endswith(told)] == []


def test_a_list_without_images_says_so_and_not_that_its_words_are_no_files(folder):
    path = folder / "l.csv"
    path.write_text("subject;age\n1;2\n", encoding="utf8")
    with pytest.raises(InputError, match="no column holds image files") as caught:
        read_list(path)
    assert "HR_image" in caught.value.hint
    (folder / "s1").mkdir()  # DICOM folders, of which one is missing: none of them is a heading
    path.write_text("s0\ns1\n", encoding="utf8")
    assert [found.name for found in read_list(path)] == ["s0", "s1"]


def test_many_faults_are_counted_and_the_first_fifty_told_in_order(folder):
    path = table(folder, *(f"a{i}.nii,b.nii.gz,Train" for i in range(60)))
    told = faults_of(path)
    assert told.startswith(f"{path}: 60 faults: line 2: HR_image a0.nii: no such file; line 3: ")
    assert "line 51: " in told and "line 52: " not in told and "; and 10 more (" in told
    assert f"(paths start at {folder}, see --base-path)" in told
    assert f"({folder}/in is put before every path, see --base-path)" in faults_of(path, base_path=f"{folder}/in")
    one, two = table(folder, "a.nii.gz,a_seg.nii,Tets"), table(folder, *["a.nii.gz,a_seg.nii,Tets"] * 2, name="b.csv")
    assert faults_of(one).endswith("(correct it and run again)") and " faults: " not in faults_of(one)
    assert faults_of(two).endswith("(correct them and run again)") and "2 faults: lines 2, 3: " in faults_of(two)


def test_a_split_is_read_in_any_case_of_its_letters(folder):
    path = table(folder, "a.nii.gz,a_seg.nii,train", "b.nii.gz,b_seg.nii,TEST", "c.nii.gz,c_seg.nii,tRAIN")
    assert [row.base for row in read_table(path)] == ["Train", "Test", "Train"]
    mixed = table(folder, "a.nii.gz,a_seg.nii,train", "a.nii.gz,b_seg.nii,TEST", name="mixed.csv")
    assert "line 3: HR_image a.nii.gz is in Test, and in Train at line 2" in faults_of(mixed)


def test_equal_faults_are_told_once_with_their_lines_and_others_each(folder):
    rows = [f"{name}.nii.gz,{name}_seg.nii,valid" for name in "abcd"]
    told = faults_of(table(folder, *rows[:2], "e.nii.gz,none.nii,Train", *rows[2:]))
    assert "5 faults: lines 2, 3, 5, 6: Base is 'valid', Train or Test is allowed; line 4: Label_image none" in told
    many = faults_of(table(folder, *[f"x{i}.nii,," for i in range(30)], name="many.csv"))
    assert many.count("Label_image is empty") == 1 and "30 lines, 2, 3, 4, " in many and many.count("no such file") > 20


def test_a_table_has_a_largest_size(folder, monkeypatch):
    path = table(folder, "a.nii.gz,a_seg.nii,Train")
    size = path.stat().st_size
    monkeypatch.setattr(tables, "_MAX_BYTES", size)
    assert len(read_table(path)) == 1
    monkeypatch.setattr(tables, "_MAX_BYTES", size - 1)
    assert f"is no table: {size} bytes" in faults_of(path)


def test_a_quote_that_is_left_open_is_told_with_its_line(folder):
    path = table(folder, "a.nii.gz,a_seg.nii,Train", '"' + "b" * 200000)
    assert "line 3: cannot be read as fields" in faults_of(path) and "quote left open" in faults_of(path)


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        (['"b.nii.gz,b_seg.nii,Test', "c.nii.gz,c_seg.nii,Test"], "line 3: a quote opens here and is never closed"),
        (
            ['b.nii.gz,b_seg.nii,Test,"poor', "c.nii.gz,c_seg.nii,Test"],
            "line 3: a quote opens here and is never closed",
        ),
        (['b.nii.gz,b_seg.nii,Test,"poor'], "line 3: a quote opens here and is never closed"),
        (["b.nii.gz,b_seg.nii,Test", '"'], "line 4: a quote opens here and is never closed"),
        (
            ['b.nii.gz,b_seg.nii,Test,"poor', 'c.nii.gz,c_seg.nii,Test,a "note"'],
            "line 3: a quote opens here and closes in a row below",
        ),
    ],
)
def test_rows_are_not_lost_in_a_cell_whose_quote_is_left_open(folder, rows, told):
    """Also of a column that nothing reads, where they would be gone without a word."""
    path = table(folder, "a.nii.gz,a_seg.nii,Train", *rows, header="HR_image,Label_image,Base,notes")
    assert told in faults_of(path) and "close it" in faults_of(path)


def test_a_cell_of_several_lines_and_quotes_within_cells_are_read(folder):
    rows = [
        'a.nii.gz,a_seg.nii,Train,"two',
        'lines"',
        '"b.nii.gz" ,b_seg.nii,Test,7" coil',
        'c.nii.gz,c_seg.nii,Test,""',
    ]
    path = table(folder, *rows, header="HR_image,Label_image,Base,notes")
    assert [(row.line, row.image.name) for row in read_table(path)] == [
        (2, "a.nii.gz"),
        (4, "b.nii.gz"),
        (5, "c.nii.gz"),
    ]


def test_an_empty_label_is_a_fault_only_where_labels_are_needed(folder):
    path = table(folder, "a.nii.gz,,Train", "b.nii.gz,b_seg.nii,Test")
    assert [row.label for row in read_table(path, need_label=False)] == [None, folder / "b_seg.nii"]
    assert "line 2: Label_image is empty" in faults_of(path)


def test_a_base_path_is_put_before_the_entries_of_every_list(folder):
    (folder / "in").mkdir()
    for name in "ab":
        (folder / "in" / f"{name}.nii").touch()
    for name in ("list.csv", "list.txt"):
        (folder / name).write_text("a.nii\nb.nii\n", encoding="utf8")
        found = read_list(folder / name, base_path=str(folder / "in"))
        assert found == [folder / "in" / "a.nii", folder / "in" / "b.nii"]


def test_of_a_long_name_the_end_is_kept_which_tells_images_apart():
    name = "x" * 90 + "0123456789" * 3
    assert subject_ids([PurePosixPath(f"/d/{name}.nii")]) == [name[-100:]]


def test_labels_that_are_their_images_are_no_leak(folder):
    """As where a map of tissues is both; images of one person under two names are."""
    path = table(folder, "a.nii.gz,a.nii.gz,Train", "b.nii.gz,a_seg.nii,Test")
    assert [row.base for row in read_table(path)] == ["Train", "Test"]


@pytest.mark.parametrize(
    "name", ["hr_image", "LR_image", "image", "Images", "path", "paths", "FILE", "files", "filename", "HR_image"]
)
def test_every_name_of_a_column_of_images_is_a_heading(tmp_path, name):
    (tmp_path / "list.csv").write_text(f"sex,{name}\nf,a.nii\n", encoding="utf8")
    assert read_list(tmp_path / "list.csv") == [tmp_path / "a.nii"]
    (tmp_path / "list.csv").write_text(f"{name}\na.nii\n", encoding="utf8")
    assert read_list(tmp_path / "list.csv") == [tmp_path / "a.nii"]


def test_names_with_a_meaning_in_a_store_are_no_subjects():
    assert subject_ids([PurePosixPath(f"/d/{name}.nii") for name in ("c", "C", "manifest.json", "zarr.json")]) == [
        "d-c", "d-C-2", "manifest.json_", "zarr.json_",
    ]  # fmt: skip
    assert subject_ids([PurePosixPath("/d/c.nii")]) == ["c_"]


def test_persons_and_labels_are_known_by_any_name_that_leads_to_them(folder):
    for name in ("sub-07.nii", "sub-07_ses-2.nii", "sub-08_ses-1.nii"):
        (folder / name).touch()
    told = faults_of(table(folder, "sub-07.nii,a_seg.nii,Train", "sub-07_ses-2.nii,b_seg.nii,Test"))
    assert "line 3: subject sub-07 is in Test, and in Train at line 2" in told
    (folder / "link.nii").symlink_to(folder / "a_seg.nii")
    told = faults_of(table(folder, "a.nii.gz,a_seg.nii,Train", "b.nii.gz,link.nii,Test"))
    assert "line 3: Label_image link.nii is in Test" in told
    one = table(
        folder, "sub-07.nii,a_seg.nii,Train", "sub-07_ses-2.nii,b_seg.nii,Train", "sub-08_ses-1.nii,c_seg.nii,Test"
    )
    assert len(read_table(one)) == 3


def test_of_several_columns_of_images_a_list_takes_hr_image(tmp_path):
    (tmp_path / "list.csv").write_text("image,HR_image,path\nx.nii,a.nii,y.nii\n", encoding="utf8")
    assert read_list(tmp_path / "list.csv") == [tmp_path / "a.nii"]
    (tmp_path / "list.csv").write_text("path,image\nx.nii,y.nii\n", encoding="utf8")
    assert read_list(tmp_path / "list.csv") == [tmp_path / "x.nii"]


@pytest.mark.parametrize("read", [read_table, cohort._read])
@pytest.mark.parametrize(
    "below",
    [
        "HR_image,HR_image,Label_image,Base,SR_image,SR_image",
        "a,b",
        "HR_image,Label_image,Base,SR_image,seg_image,mask_image",
    ],
)
def test_a_fault_of_the_header_has_the_headers_line(tmp_path, read, below):
    (tmp_path / "t.csv").write_text(f"# made by hand\nsep=,\n{below}\n", encoding="utf8")
    with pytest.raises(InputError) as caught:
        read(tmp_path / "t.csv")
    assert "line 3: " in str(caught.value) and "line 1" not in str(caught.value)
