"""Fine-tuning: its loss, what it trains and what it leaves alone, and that LoRAs add up."""
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image
from safetensors.torch import load_file

from attack import main, parse_args
from attacks.fine_tune import FINE_TUNE, square, step
from erase import choose_weights
from model import Policy
from plumbing.options import UserError
from prompts import read
from rivals import Job


@pytest.fixture
def task(tmp_path):
    """A prompt file with two pictures beside it."""
    rng = np.random.default_rng(0)
    for name, shape in (("a", (40, 60, 3)), ("b", (64, 64, 3))):
        Image.fromarray(rng.integers(256, size=shape, dtype=np.uint8)).save(
            tmp_path / f"{name}.png")
    (tmp_path / "task.csv").write_text("prompt,image\na cactus,a.png\na whale,b.png\n")
    return str(tmp_path / "task.csv")


def options(pipeline, *more):
    return parse_args(["fine-tune", "--model", pipeline, "--batch-size", "2", "--iterations", "2",
                       "--device", "cpu", "--dtype", "fp32", "--recipe", "embedded", *more])


@pytest.mark.parametrize("shape", ["sd1_pipeline", "sd2_pipeline"])
def test_the_loss_is_denoisings_with_diffusers_noise(shape, request, task):
    pipeline = request.getfixturevalue(shape)
    policy, (prompts, _) = Policy(pipeline), read(task)
    latents = torch.randn(2, *policy.latent_shape(), generator=torch.Generator().manual_seed(0))
    job = Job(policy, None, None, {}, {},
              data=dict(zip([prompt.image for prompt in prompts], latents, strict=True)))
    with torch.no_grad():
        loss = step(job, prompts, np.random.default_rng(1)).item()
    rng, by_hand = np.random.default_rng(1), 0
    seeds, times = rng.integers(2 ** 62, size=2), rng.integers(1000, size=2)
    scheduler = DDIMScheduler.from_config(policy.scheduler.config)
    for z, prompt, seed, time in zip(latents, prompts, seeds, times, strict=True):
        e = torch.randn(1, *z.shape, generator=torch.Generator().manual_seed(int(seed)))
        time = torch.tensor([time])
        is_epsilon = policy.prediction_type == "epsilon"
        target = e if is_epsilon else scheduler.get_velocity(z[None], e, time)
        with torch.no_grad():
            output = policy.unet(scheduler.add_noise(z[None], e, time), time,
                                 policy.text_states(prompt)[None]).sample
        by_hand += ((output - target) ** 2).mean().item() / 2
    assert loss == pytest.approx(by_hand, rel=1e-3)


def test_a_picture_is_cut_to_its_middle_and_resized():
    picture = np.zeros((10, 30, 3), np.uint8)
    picture[:, 10:20] = 255
    assert square(picture, 8).shape == (8, 8, 3) and (square(picture, 8) == 255).all()


def test_on_top_of_a_lora_that_stays_as_it_is_and_both_add_up(pipeline, task, tmp_path):
    first, second = str(tmp_path / "first"), str(tmp_path / "second")
    main(options(pipeline, "--prompts", task, "--lr", "1e-2", "--output", first))
    before = load_file(f"{first}/pytorch_lora_weights.safetensors")
    main(options(pipeline, "--prompts", task, "--lr", "1e-2", "--output", second, "--checkpoint",
                 f"{first}@0.5", "--seed", "1"))
    after = load_file(f"{first}/pytorch_lora_weights.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)

    # what was trained beside the first LoRA at half its weight is what both give when loaded
    policy = Policy(pipeline, [(first, .5)], trainable=True)
    args = options(pipeline, "--prompts", task, "--output", second)
    args.trainable = "lora"
    trained = choose_weights(policy, FINE_TUNE.weights, args)
    state = torch.load(f"{second}/checkpoints/epoch_0002.pt", weights_only=True)["weights"]
    assert set(trained) == set(state) and all("default" in name for name in trained)
    assert {name for name, p in policy.unet.named_parameters() if p.requires_grad} == set(trained)
    with torch.no_grad():
        for name, p in trained.items():
            p.copy_(state[name])
    loaded = Policy(pipeline, [(first, .5), (second, 1.)])
    x, t = torch.randn(1, *policy.latent_shape()), torch.tensor(500)
    text = policy.encode(["a cactus"])
    with torch.no_grad():
        both, base = loaded.unet_output(x, t, text), Policy(pipeline).unet_output(x, t, text)
        assert torch.allclose(policy.unet_output(x, t, text), both, atol=1e-5)
    assert not torch.allclose(both, base, atol=1e-4)


def test_it_resumes_to_the_same_weights(pipeline, task, tmp_path):
    whole, cut = str(tmp_path / "whole"), str(tmp_path / "cut")
    main(options(pipeline, "--prompts", task, "--iterations", "4", "--output", whole))
    main(options(pipeline, "--prompts", task, "--save-every", "2", "--output", cut))
    main(options(pipeline, "--prompts", task, "--save-every", "2", "--iterations", "4", "--output",
                 cut))
    one, two = (load_file(f"{folder}/pytorch_lora_weights.safetensors") for folder in (whole, cut))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_prompts_without_pictures_are_refused(pipeline, tmp_path, task):
    with pytest.raises(UserError, match="--prompts: none is given"):
        main(options(pipeline, "--output", str(tmp_path / "x")))
    with pytest.raises(UserError, match="'a dog' has no picture"):
        main(options(pipeline, "--prompts", "a dog", "--output", str(tmp_path / "y")))
    (tmp_path / "gone.csv").write_text("prompt,image\na cactus,gone.png\n")
    with pytest.raises(UserError, match="line 2: image .*gone.png is no file"):
        read(str(tmp_path / "gone.csv"))


@pytest.mark.parametrize("option", [["--count", "4"], ["--pairs", "x.csv"], ["--tries", "2"]])
def test_what_only_attacks_by_prompts_use_is_refused(pipeline, task, option, capsys):
    with pytest.raises(SystemExit):
        options(pipeline, "--prompts", task, *option)
    assert f"{option[0]}: fine-tune does not use it" in capsys.readouterr().err
