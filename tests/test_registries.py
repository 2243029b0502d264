"""Registries: an entry that is added while the program runs is in every command, table and output, and nowhere else
does a name have to be added."""

from __future__ import annotations

import ast
import collections
import re
from pathlib import Path

import numpy as np
import pytest

import fastsrgan
from fastsrgan.cli import evaluate as cli_evaluate
from fastsrgan.cli import main as cli
from fastsrgan.config import CHOICES, SETTINGS, TrainConfig
from fastsrgan.errors import ModelError, UsageError
from fastsrgan.evaluate import metrics
from fastsrgan.evaluate.figures import FIGURES, LOWER, Figure, captions, definitions
from fastsrgan.evaluate.pair import evaluate_pair, flat, summarise
from fastsrgan.infer import tiles, values
from fastsrgan.infer.settings import InferSettings, options
from fastsrgan.io import formats
from fastsrgan.model import weights
from fastsrgan.model.networks import NETWORKS, Architecture, Generator, GeneratorSpec, build_generator
from fastsrgan.observation.artefacts import ARTEFACTS, IMAGE, SCAN, SLICES, Artefact
from fastsrgan.observation.model import Degradation, degrade
from fastsrgan.report import sections
from fastsrgan.study import tables
from fastsrgan.study.data import figure_paths
from fastsrgan.train.run import artefact_amounts
from fastsrgan.volume.geometry import Volume
from tools import settings_page

# --- figures --------------------------------------------------------------------------------------------------------


@pytest.fixture
def pair() -> dict[str, Volume]:
    hr = np.random.default_rng(0).random((14, 13, 12)).astype(np.float32) + 1
    label = hr > 1.5
    volumes = {"hr": hr, "sr": hr + 0.1 * label, "seg": label & (hr < 1.9), "label": label, "baseline": hr + 0.2}
    return {
        name: Volume(np.asarray(v, np.uint8 if v.dtype == bool else v.dtype), np.eye(4)) for name, v in volumes.items()
    }


def test_a_new_figure_is_everywhere(pair, monkeypatch):
    def largest_error(compared, region):
        return float(np.abs(compared.sr - compared.hr.data).max())

    entry = Figure(
        "largest error", "the largest absolute difference", largest_error,
        image=True, unit="mV", digits=1, better=LOWER, short="LE", headline=True,
    )  # fmt: skip
    monkeypatch.setitem(FIGURES, "largest_error", entry)
    result = evaluate_pair(**pair)
    assert result["image"]["label"]["largest_error"] == pytest.approx(0.1, abs=1e-12)  # found: 8.3e-17 (rounding)
    # Found: 4.8e-8 (rounding)
    assert result["gain"]["image"]["whole"]["largest_error"] == pytest.approx(-0.1, abs=1e-6)
    assert result["definitions"]["largest_error"] == definitions()["largest_error"] == entry.definition
    # The command: a pair, a cohort's figures, a line per subject.
    row = next(r for r in cli_evaluate.figures(result) if r["figure"] == "largest_error")
    assert row["better"] == "yes" and row["value"] == "0.1"
    cohort = {"rows": [{"subject": "a"} | result], "summary": summarise([result])}
    assert any(r["figure"] == "largest_error" and r["better"] == "yes" for r in cli_evaluate.cohort_figures(cohort))
    assert {"LE mV", "baseline LE mV"} <= set(cli_evaluate.subjects(cohort)[0])
    # Studies: number of a cell, heading of the table.
    assert flat(result)[figure_paths()["largest_error"]] == result["image"]["whole"]["largest_error"]
    assert tables.headings()["largest_error"] == ("LE mV", 1)
    assert tables.headings()["largest_error_mask"] == ("LE mask mV", 1)
    # Reports, pictures, documentation.
    page = str(sections.scores_table(result, "/scores")) + str(sections.tiles(result, "/scores"))
    assert page.count("largest error, mV") >= 3
    assert "largest error 0.1 mV  (-0.1 mV)" in captions(result)["sr"]
    assert "| `largest_error` | largest error, mV | less | the largest absolute difference |" in settings_page.figures()


def test_the_error_in_the_segmented_structure_is_that_of_its_own_voxels(pair):
    result = evaluate_pair(**pair)
    inside = pair["seg"].data > 0
    assert result["segmentation"]["structure_mae"] == metrics.mae(pair["sr"].data, pair["hr"].data, inside)
    assert result["segmentation"]["structure_mae"] == pytest.approx(0.1, abs=1e-12)  # found: 8.3e-17 (rounding)
    empty = Volume(np.zeros_like(pair["seg"].data), np.eye(4))
    alone = evaluate_pair(pair["sr"], pair["hr"], seg=empty, label=pair["label"], baseline_seg=pair["label"])
    assert alone["segmentation"]["structure_mae"] is None  # no voxel
    assert alone["baseline"]["segmentation"]["structure_mae"] is None  # no image


def test_every_figure_of_a_result_is_in_the_table_and_the_other_way_round(pair):
    result = evaluate_pair(**pair)
    assert [*result["image"]["whole"], *result["segmentation"]] == list(FIGURES)
    assert set(FIGURES) <= set(result["definitions"])


# --- artefacts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [IMAGE, SLICES, SCAN])
def test_a_new_artefact_is_drawn_applied_and_set_by_its_name(stage, monkeypatch):
    """One that adds a constant, drawn from its key: it is on the truth only where it acts on the image itself."""
    entry = Artefact(
        stage,
        lambda key, amount, slices: np.full((slices, 1), amount) if stage == SLICES else amount,
        lambda part, amount, *where: part + float(np.max(amount)),
        "added to everything",
        below=60,
    )
    monkeypatch.setitem(ARTEFACTS, "offset", entry)
    hr = np.random.default_rng(0).random((12, 12, 12)).astype(np.float32) * 50 + 1
    plain, more = (degrade(hr, (1, 1, 1), (1, 1, 3), key=1, offset=amount) for amount in (0.0, 30.0))
    assert np.abs(more.low_res * more.scale - plain.low_res * plain.scale - 30).max() < 1e-4  # found: 1.5e-5
    on_truth = np.abs(more.hr * more.scale - plain.hr * plain.scale - (30 if stage == IMAGE else 0)).max()
    assert on_truth < 1e-4  # found: 1.1e-5
    # From the command line's text to the law.
    config = TrainConfig(new_low_res=((1.0, 1.0, 3.0),), artefacts="offset:30", motion=0.5)
    law = Degradation(config.new_low_res, 0.0, 0.0, artefacts=artefact_amounts(config))
    assert law.draw(0, 1, "a").artefacts["offset"] == 30 and law.artefacts["motion"] == 0.5
    assert "| `offset` |" in settings_page.artefacts()
    with pytest.raises(UsageError, match=r"offset.*60"):
        Degradation(config.new_low_res, artefacts={"offset": 61.0})
    with pytest.raises(UsageError, match=r"unheard.*one of bias_field, motion, gibbs, offset"):
        Degradation(config.new_low_res, artefacts={"unheard": 1.0})


def test_an_artefact_has_one_amount():
    with pytest.raises(ModelError, match="motion has an amount of its own too"):
        TrainConfig(new_low_res=((1.0, 1.0, 3.0),), artefacts="motion:1", motion=0.5)


# --- networks -------------------------------------------------------------------------------------------------------


def test_a_new_network_is_built_kept_and_read(tmp_path, monkeypatch):
    class Shallow(Generator):
        def _build(self, k):
            super()._build(k)
            self.blocks = self.blocks[:1]

    monkeypatch.setitem(NETWORKS, "shallow", Architecture(Shallow))
    network = build_generator(GeneratorSpec("shallow", 2))
    assert type(network) is Shallow
    kept = weights.save_generator(tmp_path / "a.safetensors", network)
    assert type(weights.load_generator(kept)) is Shallow
    with pytest.raises(ModelError, match=r"the original has no network 'shallow'.*safetensors"):
        weights.export_keras(kept, tmp_path / "a.h5")
    with pytest.raises(ModelError, match="one of plain, unet, shallow"):
        GeneratorSpec("unheard")


def test_the_settings_name_the_networks_there_are():
    assert CHOICES["network"] == tuple(NETWORKS)


# --- windows and formats --------------------------------------------------------------------------------------------


def test_a_new_window_is_allowed_and_weighs_tiles(monkeypatch):
    monkeypatch.setitem(values.WINDOWS, "triangle", lambda t: 1 - abs(t))
    assert InferSettings(window="triangle").window == "triangle"
    assert tiles.window_of("triangle", 5) == pytest.approx([0.2, 0.6, 1, 0.6, 0.2])


def test_every_choice_of_the_command_line_is_an_entry():
    commands = next(a for a in cli.build_parser()._actions if a.dest == "command").choices
    window = next(a for a in commands["infer"]._actions if a.dest == "window")
    assert tuple(window.choices) == tuple(values.WINDOWS)
    assert formats.NAMES.replace(" or ", ", ").split(", ") == [each.name for each in formats.FORMATS]


# --- one fact, one place --------------------------------------------------------------------------------------------

PACKAGE = Path(fastsrgan.__file__).parent
TREES = {str(p.relative_to(PACKAGE)): ast.parse(p.read_text(encoding="utf8")) for p in sorted(PACKAGE.rglob("*.py"))}
# What a name of an entry stands for besides the entry, file by file.
RATE, PADDING, PROFILE, LOSS = "a learning rate's course", "padding of SciPy", "profile of slices", "a loss, a score"
PAPER = "panels of studies, the paper's own values"
OTHER_MEANINGS = {
    "constant": dict.fromkeys(("config.py", "train/optimise.py"), RATE)
    | dict.fromkeys(("demo/template.py", "pictures/planes.py"), PADDING)
    | {"infer/sweep.py": "tiles of one value"},
    "gaussian": dict.fromkeys(
        ("demo/run.py", "infer/modes.py", "infer/settings.py", "observation/model.py", "volume/acquisition.py")
        + ("volume/adapt.py", "volume/consistency.py", "volume/profile.py", "volume/resample.py"),
        PROFILE,
    ),
    "dice": dict.fromkeys(("config.py", "losses.py", "report/curves.py", "train/loop.py", "train/objectives.py"), LOSS)
    | {"study/plots.py": PAPER, "model/purpose.py": "what a card says of a contrast"}
    | {"cli/train.py": "a word of the last line"},
    "components": {"volume/components.py": "before a filter", "study/plots.py": PAPER},
    "hausdorff95_mm": {"study/plots.py": PAPER},
    "plain": {"study/plots.py": PAPER},
}
# Settings that are read in more files than the one where they act, and why.
READ_IN = {
    "seed": ({"train/gan.py", "train/run.py"}, "of the networks, and of the feed, by which the loop draws too"),
    "lr_schedule": (
        {"train/loop.py", "train/snapshots.py"},
        "where it sets the rates, and where a resumed run says that other epochs change them",
    ),
    "flips": ({"train/loop.py", "train/snapshots.py"}, "where patches are mirrored, and where weights say so"),
    "ema": ({"train/gan.py", "train/loop.py"}, "where it averages, and where a run too short for it is warned of"),
}


def holder(node: ast.expr) -> str:
    """``run.config`` -> config."""
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


STUDY = "study/run.py"  # whose settings are its own
LITERALS, READ, ASKED = (collections.defaultdict(set) for _ in range(3))  # string, setting, option -> files
for _file, _tree in TREES.items():
    for _node in ast.walk(_tree):
        if isinstance(_node, ast.Constant) and isinstance(_node.value, str):
            LITERALS[_node.value].add(_file)
        elif isinstance(_node, ast.Attribute):
            _holder = holder(_node.value)
            if _holder in ("c", "config", "then", "now") and _file != "config.py":
                READ[_node.attr].add(_file)
            elif _holder in ("settings", "asked", "typed") and _file not in ("infer/settings.py", STUDY):
                ASKED[_node.attr].add(_file)

ENTRIES = (*FIGURES, *ARTEFACTS, *NETWORKS, *values.WINDOWS, *(each.name for each in formats.FORMATS))


@pytest.mark.parametrize("name", ENTRIES)
def test_an_entry_is_named_in_one_source_file_or_two(name):
    files, others = LITERALS[name], OTHER_MEANINGS.get(name, {})
    assert files, "an entry that nothing names"
    assert set(others) <= files, "it has no such other meaning"
    assert len(files - set(others)) <= 2, files


@pytest.mark.parametrize(
    ("files", "also"),
    [pytest.param(READ[name], READ_IN.get(name), id=name) for name in SETTINGS]
    + [pytest.param(ASKED[name], None, id=f"infer {name}") for name in options()],
)
def test_a_setting_or_an_option_is_read_where_it_acts_and_nowhere_else(files, also):
    """Beside its row: in two files it is named."""
    assert files == also[0] if also else len(files) <= 1, files


def test_the_holders_that_are_counted_are_those_there_are():
    """An object of settings under another name would not be counted."""
    for kind, counted in (
        ("TrainConfig", {"c", "config", "then", "now"}),
        ("InferSettings", {"settings", "asked", "typed"}),
    ):
        found = set()
        for tree in TREES.values():
            for node in ast.walk(tree):
                if isinstance(node, (ast.arg, ast.AnnAssign)) and node.annotation is not None:
                    name = node.arg if isinstance(node, ast.arg) else holder(node.target)
                    found |= {name} if kind in re.findall(r"\w+", ast.unparse(node.annotation)) else set()
        assert found and found <= counted, found - counted


def test_the_lists_of_exceptions_name_what_there_is():
    assert set(READ_IN) <= set(SETTINGS) and set(OTHER_MEANINGS) <= set(ENTRIES)
