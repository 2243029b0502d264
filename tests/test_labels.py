"""Which values of a label map are the structure: one choice wherever a label enters, refused where none is made."""

import csv
import json

import nibabel as nib
import numpy as np
import pytest

from fastsrgan.cli.main import main
from fastsrgan.convert import convert
from fastsrgan.errors import FastsrganError, InputError, UsageError, alike
from fastsrgan.evaluate.cohort import Choice, evaluate_table
from fastsrgan.evaluate.pair import evaluate_files
from fastsrgan.io import labels
from fastsrgan.io import nifti as images
from fastsrgan.io.labels import check_given
from fastsrgan.store.reader import open_store
from fastsrgan.study import data as study_data

SHAPE = (24, 22, 20)
CORTEX, WHITE = (3, 42), (2, 41)
LUT = """#No. Label Name:   R G B A
0   Unknown                  0   0   0   0
2   Left-Cerebral-White-Matter 245 245 245 0
3   Left-Cerebral-Cortex     205  62  78  0
41  Right-Cerebral-White-Matter 0 225 0 0
42  Right-Cerebral-Cortex    205  62  78  0
1011 ctx-lh-lateraloccipital 20 30 140 0
"""
SNAP = '0 0 0 0 0 0 0 "Clear Label"\n3 255 0 0 1 1 1 "left cortex"\n42 0 255 0 1 1 1 "right cortex"\n'
TSV = "index\tname\tabbreviation\n3\tleft cortex\tL\n42\tright cortex\tR\n2\twhite\tW\n"


def save(path, data):
    nib.save(nib.Nifti1Image(data, np.diag([1.0, 1, 1, 1])), path)
    return path


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    aseg = rng.choice([0, 2, 3, 4, 41, 42, 1011], SHAPE).astype(np.int16)
    save(tmp_path / "aseg.nii.gz", aseg)
    save(tmp_path / "seg.nii.gz", np.isin(aseg, CORTEX).astype(np.uint8))
    save(tmp_path / "white.nii.gz", np.isin(aseg, WHITE).astype(np.uint8))
    save(tmp_path / "hr.nii.gz", rng.random(SHAPE).astype(np.float32))
    (tmp_path / "lut.txt").write_text(LUT)
    return tmp_path


def scores(folder, *classes, seg="seg", **more):
    files = {"sr": folder / "hr.nii.gz", "hr": folder / "hr.nii.gz", "seg": folder / f"{seg}.nii.gz"}
    return evaluate_files(**files, label=folder / "aseg.nii.gz", label_classes=classes, **more)


@pytest.mark.parametrize(
    ("choice", "told"),
    [
        ("0", "takes the value 0"),
        ("0,3", "takes the value 0"),
        ("rest=0", "takes the value 0"),
        ("Unknown", "takes the value 0"),
        ("n/a", "n/a stands for an empty cell"),
        ("n/a=3", "n/a stands for an empty cell"),
        ("3,NaN", "NaN stands for an empty cell"),
        ("=3", "has no name before ="),
    ],
)
def test_the_background_and_an_empty_cell_are_no_structure(folder, choice, told):
    with pytest.raises(UsageError, match=told):
        scores(folder, choice, label_names=folder / "lut.txt")


def test_a_name_that_a_table_leaves_open_is_none_and_NA_may_be_one(folder):
    (folder / "names.tsv").write_text("index\tname\n3\tn/a\n4\tNA\n")
    assert labels.read_names(folder / "names.tsv") == {"NA": [4]}
    assert labels.structure("NA", "", folder / "names.tsv").values == {4}


@pytest.mark.parametrize(("classes", "covers"), [(None, True), ((1, 2), True), ((1,), False)])
def test_a_label_that_covers_every_voxel_is_told(tmp_path, classes, covers):
    data = np.ones(SHAPE, np.uint8)
    data[0] = 1 if classes is None else 2
    read = images.load_label(save(tmp_path / "l.nii.gz", data), classes=classes)
    assert ("the label covers every voxel: nothing lies outside the structure" in read.warnings) is covers
    assert not images.load_label(save(tmp_path / "l.nii.gz", np.ones(SHAPE, np.uint8)), kind="mask").warnings


def test_the_hint_for_a_value_below_0_can_be_followed(tmp_path):
    """No choice can name it, and the others can be chosen without it."""
    path = save(tmp_path / "l.nii.gz", np.resize(np.array([-1, 0, 3], np.int16), SHAPE))
    with pytest.raises(InputError, match=r"value -1 .*another number, or choose other values") as error:
        images.load_label(path)
    assert "--label-classes" in error.value.hint
    with pytest.raises(UsageError, match="-1 is no value of a label"):
        labels.structure("-1", path)
    assert images.load_label(path, classes=(3,)).meta["values"] == [0, 1]


def test_a_chosen_structure_scores_one(folder):
    assert scores(folder, "3,42")["segmentation"]["dice"] == 1
    assert scores(folder, "2,41", seg="white")["segmentation"]["dice"] == 1
    assert scores(folder, "2,41")["segmentation"]["dice"] == 0


def test_names_of_every_kind_of_table_mean_their_values(folder):
    (folder / "snap.label").write_text(SNAP)
    (folder / "aseg.tsv").write_text(TSV)  # beside the map: found without being named
    whole = "Left-Cerebral-Cortex,right-cerebral-cortex"
    assert scores(folder, whole, label_names=folder / "lut.txt")["segmentation"]["dice"] == 1
    for table in (folder / "snap.label", None, folder / "aseg.tsv"):
        names = labels.read_names(table or folder / "aseg.tsv")
        assert [*names["left cortex"], *names["right cortex"]] == list(CORTEX)
        assert labels.structure("left cortex, Right Cortex", folder / "aseg.nii.gz", table).values == set(CORTEX)
        assert labels.structure("left cortex", folder / "aseg.nii.gz", table).values == {CORTEX[0]}
    (folder / "aseg.tsv").write_text(TSV.replace(" ", "-"))
    assert scores(folder, "left-cortex right-cortex")["segmentation"]["dice"] == 1


def test_a_map_of_several_structures_needs_a_choice(folder):
    small = images.load(folder / "aseg.nii.gz").data
    save(folder / "aseg.nii.gz", np.where(small > 255, 0, small).astype(np.uint8))
    with pytest.raises(InputError, match=r": holds several structures, the values 2, 3, 4, 41, 42 .*--label-classes"):
        scores(folder)
    save(folder / "aseg.nii.gz", (images.load(folder / "seg.nii.gz").data * 255).astype(np.uint8))
    assert scores(folder)["segmentation"]["dice"] == 1  # one value, whatever it is, is one structure


def test_several_structures_have_a_dice_each_of_a_map_of_several_values(folder):
    seg = np.where(images.load(folder / "aseg.nii.gz").data == 3, 0, images.load(folder / "aseg.nii.gz").data)
    save(folder / "map.nii.gz", seg.astype(np.int16))
    found = scores(folder, "cortex=3,42", "white=2,41", seg="map")
    assert found["structures"]["white"]["dice"] == 1
    aseg = images.load(folder / "aseg.nii.gz").data
    both = 2 * np.sum(aseg == 42) / (np.sum(aseg == 42) + np.sum(np.isin(aseg, CORTEX)))
    assert found["structures"]["cortex"]["dice"] == pytest.approx(both) == found["segmentation"]["dice"]
    with pytest.raises(InputError, match="several structures"):
        evaluate_files(folder / "hr.nii.gz", folder / "hr.nii.gz", folder / "map.nii.gz", folder / "seg.nii.gz")


@pytest.mark.parametrize(
    ("text", "reason"),
    (("", "names no class"), ("cortex", "no table says"), ("a=", "names no class"), ("a=1 b=2", "several structures")),
)
def test_choices_that_mean_nothing(folder, text, reason):
    with pytest.raises(UsageError, match=reason):
        labels.structure(text, folder / "aseg.nii.gz")


@pytest.mark.parametrize(
    "text", ["3,42", "3 , 42", "Left-Cerebral-Cortex", "gm=3,42", "gm = 3 , 42", "gm=Left-Cerebral-Cortex"]
)
def test_blanks_around_a_choice_and_its_name_mean_nothing(folder, text):
    """As cells of tables have them: the name is what a score, a file and a legend say."""
    plain, spaced = (labels.structure(t, folder / "aseg.nii.gz", folder / "lut.txt") for t in (text, f"\t {text}  "))
    assert spaced == plain and plain.name == ("gm" if "=" in text else text)
    with pytest.raises(UsageError, match="names a structure twice"):
        labels.structures([f" {text}", f"{text} "], folder / "aseg.nii.gz", folder / "lut.txt")


def test_an_unknown_name_is_answered_with_near_ones(folder):
    with pytest.raises(UsageError, match="there are Left-Cerebral-Cortex"):
        labels.structure("Left-Cerebral-Cortx", folder / "aseg.nii.gz", folder / "lut.txt")
    with pytest.raises(InputError, match="holds no names"):
        labels.structure("x", folder / "aseg.nii.gz", save(folder / "not_a_table.tsv.nii", np.zeros((2, 2, 2), "u1")))


def table(folder, *columns):
    with open(folder / "t.csv", "w", newline="", encoding="utf8") as file:
        writer = csv.writer(file)
        writer.writerow(["HR_image", "Label_image", "Base", *(["Label_classes"] if columns else [])])
        writer.writerow(["hr.nii.gz", "aseg.nii.gz", "Train", *columns])
    return folder / "t.csv"


@pytest.mark.parametrize("how", ("option", "column", "name"))
def test_stores_and_studies_hold_the_structure(folder, how):
    path = table(folder, *(["3,42"] if how == "column" else []))
    chosen = {
        "option": {"label_classes": "3,42"},
        "column": {},
        "name": {"label_classes": "Left-Cerebral-Cortex,Right-Cerebral-Cortex", "label_names": folder / "lut.txt"},
    }[how]
    convert(path, folder / "s.zarr", workers=1, **chosen)
    wanted = images.load(folder / "seg.nii.gz").data
    np.testing.assert_array_equal(open_store(folder / "s.zarr").read("hr").label, wanted)
    head = study_data.find_heads(path, "all", None, *chosen.values())[0]
    np.testing.assert_array_equal(head.load()["label"].data, wanted)


def test_another_choice_converts_again(folder):
    convert(table(folder), folder / "s.zarr", workers=1, label_classes="3,42")
    assert convert(table(folder), folder / "s.zarr", workers=1, label_classes="3,42", resume=True)["kept"] == 1
    assert convert(table(folder), folder / "s.zarr", workers=1, label_classes="2,41", resume=True)["converted"] == 1


def test_the_command_scores_a_table_with_a_column(folder, capsys):
    (folder / "e.csv").write_text(
        'SR_image,HR_image,Seg_image,Label_image,Label_classes\nhr.nii.gz,hr.nii.gz,seg.nii.gz,aseg.nii.gz,"3,42"\n'
    )
    assert main(["evaluate", "--table", str(folder / "e.csv"), "--json", str(folder / "e.json")]) == 0
    row = json.loads((folder / "e.json").read_text())["rows"][0]
    assert row["segmentation"]["dice"] == 1 and row["label_classes"] == {"3,42": [3, 42]}


def test_a_cell_of_several_structures_scores_each(folder):
    """The whole cell was taken for one choice, and its last structure scored as the first."""
    head = "SR_image,HR_image,Seg_image,Label_image,Label_classes\nhr.nii.gz,hr.nii.gz,seg.nii.gz,aseg.nii.gz,"
    (folder / "e.csv").write_text(head + "cortex=3+42|white=2+41\n")
    (row,) = evaluate_table(folder / "e.csv")["rows"]
    assert row["label_classes"] == {"cortex": [3, 42], "white": [2, 41]}
    assert row["segmentation"]["dice"] == row["structures"]["cortex"]["dice"] == 1 > row["structures"]["white"]["dice"]
    (folder / "e.csv").write_text(head + "cortex=3+42 white=2+41\n")
    with pytest.raises(FastsrganError, match="several structures"):
        evaluate_table(folder / "e.csv")


def test_the_command_takes_the_names_of_a_table_that_is_given(folder):
    pair = ["--sr", "hr.nii.gz", "--hr", "hr.nii.gz", "--seg", "seg.nii.gz", "--label", "aseg.nii.gz"]
    words = [str(folder / w) if w.endswith(".gz") else w for w in pair]
    words += ["--label-classes", "Left-Cerebral-Cortex,Right-Cerebral-Cortex"]
    assert main(["evaluate", *words]) != 0  # nothing says which values these are
    named = [*words, "--label-names", str(folder / "lut.txt"), "--json", str(folder / "e.json")]
    assert main(["evaluate", *named]) == 0
    assert json.loads((folder / "e.json").read_text())["segmentation"]["dice"] == 1


def test_a_rows_own_choice_comes_before_that_of_the_call(folder):
    lines = [
        "SR_image,HR_image,Seg_image,Label_image,Label_classes",
        'hr.nii.gz,hr.nii.gz,seg.nii.gz,aseg.nii.gz,"3,42"',
    ]
    (folder / "e.csv").write_text("\n".join([*lines, "hr.nii.gz,hr.nii.gz,white.nii.gz,aseg.nii.gz,"]) + "\n")
    own, other = evaluate_table(folder / "e.csv", choice=Choice(("white=2,41",)))["rows"]
    assert own["label_classes"] == {"3,42": [3, 42]} and other["label_classes"] == {"white": [2, 41]}
    assert own["segmentation"]["dice"] == other["segmentation"]["dice"] == 1


def test_a_lookup_table_is_read_up_to_four_mebibytes(tmp_path):
    """FreeSurfer's own has 60 kB."""
    table = tmp_path / "lut.txt"
    table.write_text("".join(f"{i}  Region-{i}  70 130 180 0\n" for i in range(1, 3000)))
    assert labels.read_names(table)["Region-2999"] == [2999]
    table.write_text(f"1  One  0 0 0 0\n# {'x' * (1 << 22)}\n")
    with pytest.raises(InputError, match="is no lookup table"):
        labels.read_names(table)


def test_a_value_with_a_point_as_tables_of_numbers_write_it_is_that_value(folder):
    """A column of whole numbers with empty cells comes out of pandas as 3.0."""
    found = labels.structure("3.0+42.00", folder / "aseg.nii.gz")
    assert (found.values, found.called) == ({3, 42}, "")
    for text in ("3.5", "-1", "3,-42", ".5"):
        with pytest.raises(UsageError, match="is no value of a label"):
            labels.structure(text, folder / "aseg.nii.gz")


def test_names_are_found_above_the_map_in_a_dataset(folder):
    """As fMRIPrep writes them: one table for all subjects."""
    anat = folder / "sub-01" / "anat"
    anat.mkdir(parents=True)
    label = anat / "sub-01_desc-aseg_dseg.nii.gz"
    (folder / "dataset_description.json").write_text("{}")
    (folder / "desc-aseg_dseg.tsv").write_text(TSV)
    (folder / "desc-aparc_dseg.tsv").write_text(TSV.replace("white", "other"))
    assert labels.structure("white", label).values == {2}
    (anat / "sub-01_desc-aseg_dseg.tsv").write_text(TSV.replace("2\twhite", "7\twhite"))
    assert labels.structure("white", label).values == {7}


@pytest.mark.parametrize(
    "text",
    [
        "index\tname\n3\tcortex\n42\tCortex\n2\twhite\n",
        "3 cortex 0 0 0 0\n42 cortex 0 0 0 0\n2 white 0 0 0 0\n",
        '3 1 2 3 1 1 1 "cortex"\n42 1 2 3 1 1 1 "cortex"\n2 1 2 3 1 1 1 "white"\n',
    ],
)
def test_a_name_of_several_values_means_all_of_them(folder, text):
    """Of left and right under one name the last alone was taken, without a word."""
    (folder / "both.tsv").write_text(text)
    assert labels.structure("cortex", folder / "aseg.nii.gz", folder / "both.tsv").values == set(CORTEX)


@pytest.mark.parametrize("text", ["3,left cortex,1\n42, right cortex\n", '3;"left cortex"\n42;right cortex;x\n'])
def test_names_with_blanks_in_a_table_of_commas_are_whole(folder, text):
    (folder / "names.csv").write_text(text)
    assert labels.read_names(folder / "names.csv") == {"left cortex": [3], "right cortex": [42]}


def test_numbers_and_names_may_be_mixed_and_the_choice_is_named_as_it_is_called(folder):
    lut, aseg = folder / "lut.txt", folder / "aseg.nii.gz"
    mixed = labels.structure("3+Right-Cerebral-Cortex", aseg, lut)
    assert mixed.values == set(CORTEX) and mixed.called == "3+Right-Cerebral-Cortex"
    named = labels.structure("cortex=3;42", aseg)
    assert (named.name, named.called, named.values) == ("cortex", "cortex", frozenset(CORTEX))
    plain = labels.structure(" 3, 42 ", aseg)
    assert (plain.name, plain.called, plain.values) == ("3, 42", "", frozenset(CORTEX))
    with pytest.raises(UsageError, match="names a structure twice"):
        labels.structures(["a=3", "a=42"], aseg)


@pytest.mark.parametrize("ending", (".nii", ".nii.gz", ".mgz", ".NRRD", ".mhd"))
def test_a_table_of_names_lies_beside_a_map_of_any_format(tmp_path, ending):
    (tmp_path / "seg.x.tsv").write_text(TSV)
    assert labels.structure("white", tmp_path / f"seg.x{ending}").values == {2}
    with pytest.raises(UsageError, match="no table says"):
        labels.structure("white", tmp_path / f"other{ending}")


def test_a_column_of_names_may_stand_anywhere_and_lines_that_are_none_are_passed_over(tmp_path):
    (tmp_path / "a.tsv").write_text("# made by hand\n\nabbr\tname\tindex\nL\tleft one\t3\nX\tno number\tx\nR\tright\n")
    assert labels.read_names(tmp_path / "a.tsv") == {"left one": [3]}
    (tmp_path / "b.txt").write_text("# 9 comment\n3, left\n  42 right 1 2 3\n")
    assert labels.read_names(tmp_path / "b.txt") == {"left": [3], "right": [42]}


def test_values_that_are_told_are_twelve_and_the_rest_is_counted():
    with pytest.raises(InputError) as error:
        labels.refuse_many([0, *range(1, 14)], "a.nii")
    assert error.value.reason.endswith("the values 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12 and 1 more")
    with pytest.raises(InputError, match="the values 1, 2") as error:
        labels.refuse_many([0, 1, 2], "a.nii")
    assert "more" not in error.value.reason
    labels.refuse_many([0, 7], "a.nii")


def test_a_rows_choices_come_before_those_given_and_empty_ones_are_none():
    assert labels.choices("a=1 | b=2|", "c") == ["a=1", "b=2"]
    assert labels.choices("", "c") == ["c"] and labels.choices("", ("c", "", "d")) == ["c", "d"]
    assert labels.choices("", None) == []
    for given, table, option in ((["3"], None, "--label-classes"), (None, "t.txt", "--label-names")):
        with pytest.raises(UsageError) as error:
            labels.refuse_for_store(given, table)
        assert error.value.what == option
    labels.refuse_for_store(None, None)


@pytest.mark.parametrize(
    "line", ["3  Left cortex", "3 Left cortex 205 62 78 0", "\t3\tLeft  cortex\t1 2 3", "3, Left cortex"]
)
def test_a_name_of_several_words_is_one_name(tmp_path, line):
    """Was the first word alone, in tables whose columns blanks separate."""
    (tmp_path / "lut.txt").write_text(f"# atlas\n{line}\r\n42 L.Bank ctx-lh-bank 25 5 25 255\n", encoding="utf8")
    names = labels.read_names(tmp_path / "lut.txt")
    assert names["Left cortex"] == [3] and names["L.Bank"] == [42]
    found = labels.structure("left cortex+L.Bank", tmp_path / "map.nii", tmp_path / "lut.txt")
    assert found.values == {3, 42}


@pytest.mark.parametrize("encoding", ("utf8", "utf-8-sig", "latin-1"))
def test_a_lookup_table_is_read_whatever_wrote_it(tmp_path, encoding):
    (tmp_path / "lut.txt").write_bytes("3  cortex\n4  é\n42  other\n".encode(encoding))
    names = labels.read_names(tmp_path / "lut.txt")
    assert (names["cortex"], names["other"], len(names)) == ([3], [42], 3)
    (tmp_path / "a.tsv").write_bytes("index\tname\n3\tcortex\n".encode(encoding))
    assert labels.read_names(tmp_path / "a.tsv") == {"cortex": [3]}


def test_a_choice_that_no_map_can_fit_is_told_before_any_is_looked_at():
    for wrong, told in (("3,-4", "-4 is no value"), ("a=", "names no class"), ("a=3=4", "several structures")):
        with pytest.raises(UsageError, match=told):
            check_given([wrong])
    with pytest.raises(UsageError, match="twice"):
        check_given(["a=3", "a=4"])
    check_given(["a=3", "b=3"])
    with pytest.raises(UsageError, match="both hold 3"):
        check_given(["a=3", "b=3"], apart=True)
    check_given(["Left-Cortex"])  # a table beside a map may know it


def test_a_bad_choice_is_one_line_in_every_command(tmp_path, capsys):
    for words in (("convert", "c.csv", "s.zarr"), ("evaluate", "a", "b"), ("study", "noise", "c.csv")):
        assert main(["--quiet", *words, "--label-classes", "3,-4"]) == 2
        assert capsys.readouterr().err.startswith("error: --label-classes: -4 is no value of a label")


def test_equal_warnings_of_subjects_are_one_line():
    told = {name: ["odd"] for name in "abcd"} | {"e": ["other", "odd"]}
    assert alike(told) == ["a, b, c and 2 more: odd", "e: other"]


@pytest.mark.parametrize(
    "words, whole",
    [
        (["3,", "42"], ["3,42"]),
        (["3", ",42"], ["3,42"]),
        (["cortex=3,", "42", "white=2,", "41"], ["cortex=3,42", "white=2,41"]),
        (["cortex=3", "white=2"], ["cortex=3", "white=2"]),
        (["3", "42"], ["3", "42"]),
    ],
)
def test_a_list_with_blanks_behind_its_commas_is_one_choice(words, whole):
    """3, 42 made two structures of it."""
    assert labels.rejoined(words) == whole


def test_the_command_takes_a_list_with_blanks(folder, tmp_path):
    path = table(folder)
    assert main(["--quiet", "convert", str(path), str(tmp_path / "s.zarr"), "--label", "3,", "42"]) == 0
    assert all(subject.attrs["label_classes"] == [3, 42] for subject in open_store(tmp_path / "s.zarr").subjects)
