import pytest

from benchmarks.titles import metric_name, recipe_title, task_title


@pytest.mark.parametrize(
    ("recipe", "title"),
    [
        ("voc_R50_C4_24k", "Faster R-CNN R50-C4, VOC, 24k"),
        ("voc_R50_C4_24k [B]", "Faster R-CNN R50-C4, VOC, 24k [B]"),
        ("coco_R50_FPN_4conv1fc_1x", "Mask R-CNN R50-FPN 4conv1fc, COCO, 1x"),
        ("voc12_R50_FCN_30k", "FCN R50, VOC 2012, 30k"),
        ("coco_keypoints_R50_FPN_2x", "Keypoint R-CNN R50-FPN, COCO keypoints, 2x"),
        ("own_R50_C4_2x", "own_R50_C4_2x"),
        ("linear_imagenet", "Linear classifier, ImageNet-1k"),
        ("one_of_ones_own", "one_of_ones_own"),
    ],
)
def test_a_recipe_has_a_readers_name(recipe, title):
    assert recipe_title(recipe) == title


@pytest.mark.parametrize(
    ("metric", "task", "name"),
    [
        ("knn20/top1", "kNN", "k=20 top-1"),
        ("voc07/AP50", "Faster R-CNN", "AP50"),
        ("voc07_svm_k4/mAP", "own", "k=4 mAP"),
    ],
)
def test_a_metric_has_a_readers_name(metric, task, name):
    assert (task_title(metric, "own"), metric_name(metric)) == (task, name)
