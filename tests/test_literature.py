"""The papers' numbers, and which of ours may stand beside them."""

import pytest

from benchmarks.literature import counterpart, printed_rows


def printed(table: str, label: str) -> dict[str, float]:
    found: dict[str, float] = {}
    for row in printed_rows():
        if row.table.name == table and row.label == label:
            found |= row.numbers
    return found


@pytest.mark.parametrize(
    ("table", "label", "wanted"),
    [
        ("Table 1", "MoCo v1, IN-1M, 200 ep", [60.6, 81.5, 55.9, 62.6]),
        ("Table 1", "MoCo v1 R50w4x, IN-1M, 200 ep", [68.6]),
        ("Table 1", "MoCo v2, IN-1M, 200 ep", [67.5, 82.4, 57.0, 63.6]),
        ("Table 1", "MoCo v2, IN-1M, 800 ep", [71.1, 82.5, 57.4, 64.0]),
        ("Table 1", "MoCo v1 + aug+, IN-1M, 200 ep", [63.4, 82.2, 56.8, 63.2]),
        ("Table 1", "CMC R50w2x", [68.4]),
        ("Table 2", "SimCLR, IN-1M, 200 ep, batch 8192", [66.6]),
        ("Table 2a", "MoCo v1, IG-1B", [81.6, 55.5, 61.2]),
        ("Table 2b", "random init", [60.2, 33.8, 33.1]),
        ("Table 3a", "memory bank, IN-1M, 200 ep", [79.8, 52.9, 57.9]),
        ("Table 3b", "end-to-end, IN-1M, 200 ep", [80.4, 54.6, 60.3]),
        ("Table 4", "MoCo v1, IN-1M, 200 ep", [74.9, 46.6, 50.1]),
        ("Table 4", "Jigsaw, YFCC-100M", [66.6]),
        ("Table 5a", "MoCo v1, IN-1M, 200 ep", [38.5, 58.9, 42.0, 35.1, 55.9, 37.7]),
        ("Table 5b", "supervised, IN-1M", [40.6, 61.3, 44.4, 36.8, 58.1, 39.5]),
        ("Table 5c", "random init", [26.4, 44.0, 27.8, 29.3, 46.9, 30.8]),
        ("Table 5d", "MoCo v1, IG-1B", [41.1, 60.7, 44.8, 35.6, 57.4, 38.1]),
        ("Table A.1", "MoCo v1, IN-1M, 200 ep", [42.3, 62.7, 46.2, 38.3, 60.1, 41.2]),
        ("Table 6, keypoints", "supervised, IN-1M", [65.8, 86.9, 71.9]),
        ("Table 6, DensePose", "random init", [39.4, 78.5, 35.1]),
        ("Table 6, Cityscapes semantic", "MoCo v1, IN-1M, 200 ep", [75.3]),
        ("Table 6, VOC semantic", "supervised, IN-1M", [74.4]),
        ("Figure 3", "memory bank, IN-1M, 200 ep, K 4096", [56.5]),
        ("Section 4.1, momentum", "MoCo v1, IN-1M, 200 ep, K 4096, m 0.9", [55.2]),
        ("Section 3, temperature", "MoCo v1 + MLP, IN-1M, 200 ep, tau 0.07", [62.9]),
        ("Section 4.2, iNaturalist", "supervised, IN-1M", [66.1]),
    ],
)
def test_printed_numbers_are_the_papers(table, label, wanted):
    assert list(printed(table, label).values()) == wanted


def test_no_two_tables_disagree_on_a_number():
    """The same start, recipe and metric has one number, wherever it is printed."""
    seen: dict[tuple, set[float]] = {}
    for row in printed_rows():
        for metric, value in row.numbers.items():
            seen.setdefault((row.label, row.table.recipe or row.table.name, metric), set()).add(
                value
            )
    assert len(seen) > 250
    assert {key: values for key, values in seen.items() if len(values) > 1} == {}


def test_the_momentum_that_fails_has_no_number_but_a_mark():
    row = next(r for r in printed_rows() if r.label.endswith("m 0"))
    assert (dict(row.numbers), row.mark) == ({}, "fails to converge")


def test_marks_stand_beside_the_numbers_that_need_them():
    marks = {row.label: row.mark for row in printed_rows() if row.table.name == "Table 1"}
    assert "ImageNet labels" in marks["CMC"]
    assert "ImageNet labels" in marks["AMDIM large"]
    assert marks["BigBiGAN"] == ""


def test_a_start_finds_what_its_authors_printed():
    row = counterpart("voc_R50_C4_24k", "voc07/AP", "MoCo v2", 200, "resnet50")
    assert row is not None
    assert row.numbers["voc07/AP"] == 57.0
    row = counterpart("voc_R50_C4_24k", "voc07/AP", "random init", None, "resnet50")
    assert row is not None
    assert row.numbers["voc07/AP"] == 33.8


@pytest.mark.parametrize(
    "start",
    [
        ("voc_R50_C4_24k", "voc07/AP", "MoCo v2", 100, "resnet50"),  # no such budget
        ("voc_R50_C4_24k", "voc07/AP", "MoCo v2", 200, "resnet18"),
        ("embedded_voc_R50_C4", "voc07/AP", "MoCo v2", 200, "resnet50"),
        ("coco_R50_C4_1x", "coco/box_AP", "MoCo v2", 200, "resnet50"),  # v2 prints no COCO
        ("knn_imagenet", "knn20/top1", "MoCo v2", 200, "resnet50"),  # others measured that
    ],
)
def test_what_the_authors_did_not_print_has_no_counterpart(start):
    assert counterpart(*start) is None
