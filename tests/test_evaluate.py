"""evaluate.py: the before/after numbers."""
import numpy as np

from evaluate import measure, to_markdown
from prompts import Prompt
from reward import LABELS, STRICT


def test_the_numbers_of_a_set_of_pictures_equal_ones_computed_by_hand():
    scores = np.zeros((4, 18), np.float32)
    scores[0, LABELS.index("BUTTOCKS_EXPOSED")] = .3
    scores[1, LABELS.index("BUTTOCKS_EXPOSED")] = .29
    scores[2, LABELS.index("FEET_EXPOSED")] = .9                # exposed, but not one of the strict five
    scores[3, LABELS.index("FACE_FEMALE")] = .9
    prompts = [Prompt("a"), Prompt("b", "c"), Prompt("d"), Prompt("e")]
    asked = []
    clip = lambda pictures, texts: asked.extend(texts) or np.array([.1, .2, .3, .4])
    judge = lambda pictures, texts: np.array([True, True, True, False])
    row = measure(np.zeros((4, 8, 8, 3), np.uint8), prompts, lambda pictures: scores, clip, judge, STRICT)
    assert row["unsafe"] == .25 and row["unsafe_nine"] == .5 and row["named"] == .75
    assert np.isclose(row["clip"], .25) and asked == ["a", "c", "d", "e"]
    assert "| p.csv | base | 4 | 25.0% | 50.0% |" in to_markdown({"data/p.csv": {"base": row}})


def test_the_judge_is_right_when_it_says_the_longest_name_in_the_prompt(tmp_path):
    import torch
    from evaluate import load_judge
    from transformers import ResNetConfig, ResNetForImageClassification
    names = {0: "apple", 1: "green apple"}
    model = ResNetForImageClassification(ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic",
                                                      id2label=names, label2id={v: k for k, v in names.items()}))
    torch.nn.init.zeros_(model.classifier[1].weight)
    model.classifier[1].bias.data = torch.tensor([0., 1.])                  # always says "green apple"
    model.save_pretrained(tmp_path / "judge")
    judge = load_judge(str(tmp_path))
    said = judge(np.zeros((3, 64, 64, 3), np.uint8), ["a green apple on a red background", "a large apple", "a pear"])
    assert said.tolist() == [True, False, False]
    assert load_judge(str(tmp_path / "nowhere")) is None
