"""A few SVG drawings in three packages, as `npm pack` packs them, and their emoji.csv."""
import io
import json
import os
import tarfile

from tiny.task import CODES

SHAPES = {                              # code: (name, concept, split, shape, colour)
    "1f351": ("peach", "nudity", "train", '<circle cx="16" cy="18" r="12" fill="{}"/>', "#f5a07a"),
    "1f95a": ("egg", "nudity", "train", '<ellipse cx="16" cy="16" rx="9" ry="13" fill="{}"/>',
              "#f0c8a0"),
    "1f954": ("potato", "nudity", "validation",
              '<ellipse cx="16" cy="16" rx="13" ry="9" fill="{}"/>', "#c89868"),
    "1f34a": ("tangerine", "nudity", "test", '<circle cx="16" cy="16" r="11" fill="{}"/>',
              "#ff9020"),
    "1f46e": ("police officer", "faces", "train",
              '<rect x="8" y="4" width="16" height="24" fill="{}"/>', "#ffcc44"),
    "1f477": ("builder", "faces", "validation",
              '<rect x="6" y="6" width="20" height="22" fill="{}"/>', "#ffbb33"),
    "1f9d1-200d-1f680": ("astronaut", "faces", "test",
                         '<rect x="4" y="8" width="24" height="16" fill="{}"/>', "#dddddd"),
    "1f31f": ("star", "", "train", '<path d="M16 2L20 12H30L22 19L25 30L16 23L7 30L10 19L2 12H12Z"'
                                   ' fill="{}"/>', "#3060e0"),
    "1f3e0": ("house", "", "train", '<path d="M16 3L30 16H26V29H6V16H2Z" fill="{}"/>', "#409060"),
    "2744": ("snowflake", "", "validation", '<path d="M2 13H30V19H2Z" fill="{}"/>', "#80c0ff"),
    "1f514": ("bell", "", "test", '<path d="M16 3L27 27H5Z" fill="{}"/>', "#7040a0"),
}
SQUARE = '<rect x="6" y="6" width="20" height="20" fill="{}"/>'      # the task's emoji
SHARES = {"nudity": (.6, 0, 0, .4), "faces": (.2, .2, .2, .4), "": (.3, .2, .2, .3)}


def write_icons(folder):
    """The three packages' archives in a folder."""
    os.makedirs(folder, exist_ok=True)
    for package, size, extra in (("noto", 128, '<circle cx="11" cy="12" r="3" fill="#fff8"/>'),
                                 ("twemoji", 36, ""),
                                 ("fluent-emoji-flat", 32,
                                  '<circle cx="20" cy="20" r="2" fill="#803020"/>')):
        icons, codes = {}, {}
        shapes = {**SHAPES, **{code: (name, "", "test", SQUARE, "#4090a0")
                               for name, code in CODES.items()}}
        for code, (name, _, _, shape, colour) in shapes.items():
            body = f'<g transform="scale({size / 32})">{shape.format(colour)}{extra}</g>'
            icons[name.replace(" ", "-")] = {"body": body}
            codes[code] = name.replace(" ", "-")
        files = {"icons.json": {"icons": icons, "width": size, "height": size},
                 "chars.json": codes}
        with tarfile.open(os.path.join(folder, f"iconify-json-{package}-1.0.0.tgz"), "w:gz") as tar:
            for name, content in files.items():
                data = json.dumps(content).encode()
                entry = tarfile.TarInfo(f"package/{name}")
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
    return str(folder)


def write_emoji(path):
    """emoji.csv of these drawings."""
    lines = ["name,code,concept,split,painted,twemoji,fluent,outlined"]
    for code, (name, concept, split, _, _) in SHAPES.items():
        lines.append(",".join(map(str, (name, code, concept, split, *SHARES[concept]))))
    with open(path, "w", encoding="utf-8") as file:
        file.write("\n".join(lines) + "\n")
    return str(path)


def build_small_world(folder):
    """All of tiny/build.py, a few steps a stage, NudeNet's part played: (options, out, work)."""
    import numpy as np
    import pytest
    from diffusers import UNet2DConditionModel

    from tiny import build, prompt_files

    def small_unet(**settings):
        return UNet2DConditionModel(**{**settings, "block_out_channels": (32, 64)})
    sources = ["--icons", write_icons(folder), "--emoji", write_emoji(folder / "emoji.csv")]
    options = [*sources, "--out", str(folder / "world"), "--work", str(folder / "work")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "UNet2DConditionModel", small_unet)
        patch.setattr(build, "STEPS", dict.fromkeys(build.STEPS, 3))
        patch.setattr(build, "BATCH", dict.fromkeys(build.BATCH, 4))
        patch.setattr(build, "PER_SCENE", 1)
        patch.setattr(prompt_files, "PICTURES", 1)
        patch.setattr(prompt_files, "Nudity", lambda device: (
            lambda pictures: np.full((len(pictures), 18), .9, np.float32)))
        build.main(build.parse_args(options))
        unet = folder / "world" / "unet" / "diffusion_pytorch_model.safetensors"
        before = unet.read_bytes()
        build.main(build.parse_args(["--stage", "unet", *options]))     # is finished: no change
        assert unet.read_bytes() == before
    return sources, folder / "world", folder / "work"
