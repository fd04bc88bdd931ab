"""The table of costs: FLOPs by hand, the papers' differences, pairs that take turns."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from arena.plugins import registry

sys.path.insert(0, str(Path(__file__).parents[1]))
from loading import as_module

PATH = Path(__file__).parents[2] / "benchmarks" / "overheads.py"


@pytest.fixture(scope="module")
def overheads():
    return as_module(PATH)


def added(overheads, defense, backbone):
    before, after = overheads.size(overheads.twin(defense), backbone), overheads.size(defense, backbone)
    return after[0] - before[0], after[1] - before[1]


def test_sizes_by_hand(overheads):
    # DeepDefense's CNN: convolutions on 32x32 and 16x16 positions, three linear layers; two FLOPs a multiply-add.
    macs = 1024 * 3 * 9 * 32 + 256 * 32 * 9 * 32 + 2048 * 1000 + 1000 * 600 + 600 * 10
    assert overheads.size("rt", "deepdefense_cnn") == (2_664_144, 2 * macs)


@pytest.mark.parametrize(
    ("defense", "backbone", "parameters", "flops"),
    [
        ("ewas_sat", "resnet18", 81_930, 2 * 81_920),  # Table 12: 0.08 million multiply-adds
        ("fgaa_sat", "resnet18", 2 * 81_920, 4 * 81_920),
        # Table 7: 1.26 million, 0.0402 GFLOPs: two nets of three 3x3 convolutions on 16 positions; h sees three maps.
        (
            "fsr_sat",
            "resnet18",
            2 * (2 * 9 * 512 * 64 + 9 * 64 * 64 + 2 * 128) + 5130,
            4 * 16 * (2 * 9 * 512 * 64 + 9 * 64 * 64) + 6 * 5120,
        ),
        ("sap_sat", "resnet18", 0, 0),
    ],
)
def test_what_a_module_adds(overheads, defense, backbone, parameters, flops):
    assert added(overheads, defense, backbone) == (parameters, flops)


def test_the_papers_totals(overheads):
    for backbone, before, after, more in (("resnet18", 11.17, 12.43, 0.0402), ("vgg16", 15.25, 16.52, 0.0402)):
        sizes = [overheads.size(d, backbone) for d in ("sat", "fsr_sat")]
        assert [p / 1e6 for p, _ in sizes] == pytest.approx([before, after], abs=0.01)
        assert (sizes[1][1] - sizes[0][1]) / 1e9 == pytest.approx(more, abs=1e-4)
    assert overheads.size("sat", "resnet18")[1] / 1e9 == pytest.approx(1.1133, rel=3e-3)  # the paper counts more layers


def test_pairs_take_turns_and_the_ratio_is_of_the_changed_one(overheads, monkeypatch):
    clock, order = [0.0], []

    def work(name, seconds):
        def step():
            order.append(name)
            clock[0] += seconds

        return step

    monkeypatch.setattr(overheads.time, "perf_counter", lambda: clock[0])
    found = overheads.ratios(work("plain", 2.0), work("changed", 3.0), 3, lambda: None)
    assert found == pytest.approx([1.5] * 3)
    assert order == ["plain", "changed", "plain", "changed", "changed", "plain", "plain", "changed"]


def test_every_row_is_registered_and_counts(overheads):
    assert len(set(overheads.ROWS)) == len(overheads.ROWS)
    for row in overheads.ROWS:
        assert registry().has("defense", overheads.twin(row.defense))
        assert registry().has("backbone", row.backbone)
    modules = {r.spec.module for r in registry().all("defense") if r.distribution == "adversarial-arena"} - {""}
    assert modules <= {registry().get("defense", row.defense).spec.module for row in overheads.ROWS}


@pytest.mark.parametrize("defense", ["ewas_sat", "gfafirst_rt", "afa_sat"])
def test_a_training_step_trains(overheads, defense, monkeypatch):
    monkeypatch.setattr(overheads, "SHAPE", (3, 8, 8))
    backbone = "cnn"
    step, read = overheads.trainer(defense, backbone, 8, torch.device("cpu"))
    before = {k: v.clone() for k, v in read.model.named_parameters()}
    step()
    read.close()
    assert any(not torch.equal(before[k], v) for k, v in read.model.named_parameters())


def test_command_line(overheads, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(overheads, "ROWS", (overheads.Row("fgaa_sat", "cnn"), overheads.Row("sap_sat", "cnn")))
    monkeypatch.setattr(overheads, "SHAPE", (3, 8, 8))
    out = tmp_path / "table.md"
    assert overheads.main(["--steps", "1", "--batch", "8", "--only", "cnn", "-o", str(out)]) == 0
    text = out.read_text()
    parameters = f"{overheads.size('sat', 'cnn')[0] / 1e6:.3f}"
    assert f"| `sap_sat` | `cnn` | {parameters} to {parameters} |" in text
    assert "trains nothing" in text
    assert f"torch {torch.__version__}" in text
    capsys.readouterr()
    assert overheads.main(["--only", "fgaa_sta"]) == 2
    assert capsys.readouterr().err == "--only: no row is called 'fgaa_sta'; did you mean 'fgaa_sat'?\n"


def test_rows_are_chosen_by_either_name_or_both(overheads):
    def pairs(text):
        return {(row.defense, row.backbone) for row in overheads.chosen(text)}

    assert pairs("") == {(row.defense, row.backbone) for row in overheads.ROWS}
    assert {d for d, _ in pairs("vgg16")} == {"fsr_sat", "fgaa_sat", "cas_sat"}
    assert pairs("fsr_sat@vgg16,oat_sat") == {("fsr_sat", "vgg16"), ("oat_sat", "resnet34"), ("oat_sat", "wrn16_8")}
