"""What a person sees of a training."""
import io
from types import SimpleNamespace

from card import model_card, save_curve


def test_a_model_card_has_the_hubs_metadata_and_says_how_the_weights_are_loaded():
    import yaml
    args = SimpleNamespace(model="some/base", output_dir="out/mine", trainable="lora", gate=None, lr=.001)
    text = model_card(args, "made safe.", "ddpo, shielddiff", {"epoch": 3, "reward": .5}, "| a table |")
    _, head, body = text.split("---\n", 2)
    assert yaml.safe_load(head) == {"base_model": "some/base", "library_name": "diffusers", "license": "other",
                                    "tags": ["text-to-image", "lora", "ddpo", "shielddiff", "safety"]}
    assert 'pipe.load_lora_weights("out/mine")' in body and "| a table |" in body and '"lr": 0.001' in body and "gate" not in body
    args.trainable = "full"
    assert 'UNet2DConditionModel.from_pretrained("out/mine", subfolder="unet")' in model_card(args, "", "", {})


def test_a_curve_is_drawn_of_a_reward_with_parts_or_without(tmp_path):
    from PIL import Image
    widths = []
    for names in (["reward"], ["reward", "clip", "nudity", "unsafe"]):
        rows = [{"epoch": e, **{name: e / 10 for name in names}, "benign_reward": .1} for e in (1, 2, 3)]
        save_curve(str(tmp_path / "curve.png"), rows)
        picture = Image.open(io.BytesIO((tmp_path / "curve.png").read_bytes()))
        widths.append(picture.width)
        assert len(picture.convert("L").getcolors(100000)) > 10
    assert widths[1] > 2 * widths[0]
