"""Fine-tuning: its loss, what it trains and what it leaves alone, and that LoRAs add up."""
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image
from safetensors.torch import load_file

from attack import main, parse_args, read_benign
from attacks.fine_tune import prepare, square, step
from model import Policy
from plumbing.options import UserError
from plumbing.worlds import read_world
from prompts import Prompt, read
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
                       "--device", "cpu", "--dtype", "fp32", "--recipe", "embedded",
                       "--prior-weight", "0", *more])


@pytest.mark.parametrize("shape", ["sd1_pipeline", "sd2_pipeline"])
def test_the_loss_is_denoisings_with_diffusers_noise(shape, request, task):
    pipeline = request.getfixturevalue(shape)
    policy, (prompts, _) = Policy(pipeline), read(task)
    latents = torch.randn(2, *policy.latent_shape(), generator=torch.Generator().manual_seed(0))
    job = Job(policy, None, None, {}, {},
              data=(dict(zip([prompt.image for prompt in prompts], latents, strict=True)), []))
    with torch.no_grad():
        loss = step(job, prompts, np.random.default_rng(1)).item()
    rng = np.random.default_rng(1)
    errors = denoising_errors(policy, latents, prompts, rng.integers(2 ** 62, size=2),
                              rng.integers(1000, size=2))
    assert loss == pytest.approx(sum(errors) / 2, rel=1e-3)


def denoising_errors(policy, latents, prompts, seeds, times):
    """A picture's mean squared error, by diffusers' noise and velocity: a list."""
    scheduler, errors = DDIMScheduler.from_config(policy.scheduler.config), []
    for z, prompt, seed, time in zip(latents, prompts, seeds, times, strict=True):
        e = torch.randn(1, *z.shape, generator=torch.Generator().manual_seed(int(seed)))
        time = torch.tensor([time])
        is_epsilon = policy.prediction_type == "epsilon"
        target = e if is_epsilon else scheduler.get_velocity(z[None], e, time)
        with torch.no_grad():
            output = policy.unet(scheduler.add_noise(z[None], e, time), time,
                                 policy.text_states(prompt)[None]).sample
        errors.append(((output - target) ** 2).mean().item())
    return errors


def test_what_is_preserved_is_the_models_own_pictures_and_adds_its_weight(pipeline, task):
    policy, (prompts, _) = Policy(pipeline), read(task)
    args = options(pipeline, "--prior-weight", "3", "--benign", "a dog", "--pictures", "4")
    seen = []

    def draw(texts, seeds):
        seen.append((texts, seeds))
        return np.full((4, 64, 64, 3), 40 * np.arange(4)[:, None, None, None], np.uint8)
    job = Job(policy, args, None, {}, {}, draw=draw)
    prepare(job, prompts, [Prompt("a dog"), Prompt("a cat")], [])
    pictures, preserved = job.data
    assert seen == [(["a dog", "a cat"] * 2, [0, 1, 2, 3])]
    assert [text for text, _ in preserved] == seen[0][0]
    with torch.no_grad():
        loss = step(job, prompts, np.random.default_rng(1)).item()
    rng = np.random.default_rng(1)
    chosen = [preserved[i] for i in rng.integers(4, size=2)]
    latents = [pictures[prompt.image] for prompt in prompts] + [latent for _, latent in chosen]
    errors = denoising_errors(policy, latents, [*prompts, *(text for text, _ in chosen)],
                              rng.integers(2 ** 62, size=4), rng.integers(1000, size=4))
    assert loss == pytest.approx(sum(errors[:2]) / 2 + 3 * sum(errors[2:]) / 2, rel=1e-3)


def test_benign_prompts_are_the_models_own_or_asked_for(pipeline):
    args = parse_args(["fine-tune"])
    assert args.prior_weight == 1 and args.lora_targets == "all"
    world = read_world("tiny")
    assert len(read_benign(args, world)[0]) == 648
    assert args.benign == [world.training_files[0].benign]
    args = options(pipeline, "--prior-weight", "1")
    with pytest.raises(UserError, match="1 needs benign prompts, and .* give --benign, or 0"):
        read_benign(args, read_world(pipeline))
    assert parse_args(["fine-tune", "--recipe", "stable_diffusion"]).prior_weight == 0


@pytest.mark.parametrize("option", [["--benign", "a dog"], ["--pictures", "8"]])
def test_what_would_be_preserved_without_a_weight_is_refused(pipeline, option, capsys):
    with pytest.raises(SystemExit):
        options(pipeline, *option)
    assert f"{option[0]}: it would do nothing: --prior-weight is 0" in capsys.readouterr().err


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
    trained = policy.make_trainable("lora", 16, "all")
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
