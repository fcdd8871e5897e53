"""model.py and sample.py against stock diffusers, on a pipeline with random weights."""
import numpy as np
import pytest
import torch

from guide import plain
from model import LORA_FILE, Policy
from prompts import UserError
from sample import draw_noise, generate, pixelate


@pytest.fixture(scope="module", params=["attention", "all"])
def tuned(pipeline, tmp_path_factory, request):
    """A policy whose LoRA is not zero, and the folder where it is saved."""
    folder = tmp_path_factory.mktemp("tuned")
    torch.manual_seed(0)
    policy = Policy(pipeline, trainable=True)
    trained = policy.train("lora", 4, request.param)
    with torch.no_grad():
        for p in trained.values():
            p.copy_(torch.randn_like(p) * .2)
    policy.save(str(folder), "card")
    return policy, folder


def stock_picture(pipeline, prompt, noise, steps, guidance, lora=None, weight_name=None):
    """The picture (H, W, 3) in 0..1 of diffusers' own pipeline, fed with our noise (eta 0: no step noise)."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline
    pipe = StableDiffusionPipeline.from_pretrained(pipeline, safety_checker=None)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    if lora:
        pipe.load_lora_weights(str(lora), weight_name=weight_name)
    pipe.set_progress_bar_config(disable=True)
    return pipe(prompt, num_inference_steps=steps, guidance_scale=guidance, eta=0., latents=noise, output_type="np").images[0]


def our_picture(policy, prompt, noise, steps, guidance):
    """The same through our own rollout, with so little step noise that it does not show."""
    from ddpo import rollout
    schedule = policy.schedule(steps, 1e-4)
    full = torch.cat([noise[:, None], torch.zeros(1, steps, *noise.shape[1:])], 1)
    latents, _ = rollout(plain(policy, [prompt], guidance), full, schedule, policy.prediction_type)
    with torch.no_grad():                               # policy.decode before it rounds to 8 bits
        picture = policy.vae.decode(latents[:, -1] / policy.vae.config.scaling_factor).sample
    assert np.abs((picture / 2 + .5).clamp(0, 1)[0].permute(1, 2, 0).numpy() * 255 - policy.decode(latents[:, -1])[0].numpy()).max() <= .51
    return (picture / 2 + .5).clamp(0, 1)[0].permute(1, 2, 0).numpy()


@pytest.mark.parametrize("weight_name", [LORA_FILE, LORA_FILE.replace(".", "_kohya.")])
def test_a_saved_lora_draws_the_same_picture_in_stock_diffusers(pipeline, tuned, weight_name):
    policy, folder = tuned
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    ours = our_picture(policy, "a large peach", noise, 5, 4.)
    theirs = stock_picture(pipeline, "a large peach", noise, 5, 4., folder, weight_name)
    base = stock_picture(pipeline, "a large peach", noise, 5, 4.)
    assert np.abs(ours - theirs).max() < 1e-3
    assert np.abs(base - theirs).max() > .02                            # and the LoRA does something


def test_within_base_the_lora_is_off(pipeline, tuned):
    policy, _ = tuned
    x, text = torch.randn(2, 4, 8, 8), policy.encode(["a large peach", "a dog"])
    with torch.no_grad():
        before, theirs = policy.unet_output(x, 500, text), Policy(pipeline).unet_output(x, 500, text)
        with policy.base():
            assert torch.equal(policy.unet_output(x, 500, text), theirs)
        assert torch.equal(policy.unet_output(x, 500, text), before) and not torch.equal(before, theirs)


def test_a_saved_lora_is_loaded_back_by_ours(pipeline, tuned):
    policy, folder = tuned
    for path in (folder, folder / LORA_FILE.replace(".", "_kohya.")):
        again = Policy(pipeline, str(path))
        draw = lambda p: generate(p, plain, ["a dog", "a cat"], [1, 2], 4, 1., 3.)
        assert np.abs(draw(policy).astype(int) - draw(again)).max() <= 1


def test_a_fully_trained_unet_is_saved_and_loaded_back(pipeline, tmp_path):
    policy = Policy(pipeline, trainable=True)
    trained = policy.train("full")
    with torch.no_grad():
        trained["conv_in.weight"] *= 2
    policy.save(str(tmp_path), "card")
    again = Policy(pipeline, str(tmp_path))
    assert torch.equal(again.unet.conv_in.weight, policy.unet.conv_in.weight)


def test_pictures_of_one_case_get_names_of_their_own():
    from prompts import Prompt
    from sample import file_names
    one, two = Prompt("a", case=7), Prompt("b", case=12)
    assert file_names([one, two]) == ["00007.png", "00012.png"]
    assert file_names([one, two, one, two]) == ["00007_0.png", "00012_0.png", "00007_1.png", "00012_1.png"]
    assert file_names([one, one, two]) == ["00007_0.png", "00007_1.png", "00012_0.png"]             # two rows of one case


def test_picture_seventeen_is_the_same_in_any_batch(pipeline):
    policy, prompts, seeds = Policy(pipeline), ["a dog", "a cat", "a peach"] * 3, list(range(9))
    whole = generate(policy, plain, prompts, seeds, 4, 1., 2., batch_size=9)
    for size in (1, 4):
        assert np.abs(whole.astype(int) - generate(policy, plain, prompts, seeds, 4, 1., 2., batch_size=size)).max() <= 1


def test_noise_is_a_function_of_the_seed_alone():
    assert torch.equal(draw_noise([5, 6], 3, (4, 8, 8))[1], draw_noise([6], 3, (4, 8, 8))[0])


def test_guidance_is_one_call_for_both_halves_and_equals_the_formula(pipeline):
    policy, calls = Policy(pipeline), []
    policy.unet.register_forward_hook(lambda *a: calls.append(1))
    x, t = torch.randn(2, 4, 8, 8), torch.tensor(401)
    guided = plain(policy, ["a dog", "a cat"], 3.)(x, t)
    assert len(calls) == 1
    with_text = policy.unet_output(x, t, policy.encode(["a dog", "a cat"]))
    without = policy.unet_output(x, t, policy.encode(["", ""]))
    assert torch.allclose(guided, without + 3 * (with_text - without), atol=1e-5)
    assert torch.allclose(plain(policy, ["a dog", "a cat"], torch.tensor([3., 1.]))(x, t)[1], with_text[1], atol=1e-5)
    calls.clear()
    assert torch.equal(plain(policy, ["a dog", "a cat"], 1)(x, t), with_text) and len(calls) == 1


def test_text_states_equal_transformers_and_are_encoded_once(pipeline):
    from transformers import CLIPTextModel, CLIPTokenizer
    policy = Policy(pipeline)
    ids = CLIPTokenizer.from_pretrained(f"{pipeline}/tokenizer")(["a dog"], padding="max_length", max_length=24, return_tensors="pt").input_ids
    with torch.no_grad():
        theirs = CLIPTextModel.from_pretrained(f"{pipeline}/text_encoder")(ids).last_hidden_state
    assert torch.allclose(policy.encode(["a dog"]), theirs, atol=1e-5)
    policy.text_encoder = None
    policy.encode(["a dog"])


@pytest.mark.parametrize("model, said", [("nowhere/at/all", "does not exist"), ("someone/some-model", "the hub does not give")])
def test_a_model_that_is_not_there_is_named(model, said):
    with pytest.raises(UserError, match=said):
        Policy(model)


def test_pixelation_flattens_what_is_flagged_and_nothing_else():
    pictures = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    shown = pixelate(pictures, np.array([True, False]))
    assert (shown[1] == pictures[1]).all() and (shown[0, :8, :8] == shown[0, 0, 0]).all()


def test_a_lora_that_does_not_fit_is_refused(pipeline, tmp_path):
    from safetensors.torch import save_file
    for name, key, said in (("a", "text_encoder.x.lora_A.weight", "no weights for a UNet"), ("b", "unet.nowhere.to_q.lora_A.weight", "does not fit")):
        save_file({key: torch.zeros(4, 32), key.replace("lora_A", "lora_B"): torch.zeros(32, 4)}, str(tmp_path / f"{name}.safetensors"))
        with pytest.raises(UserError, match=said):
            Policy(pipeline, str(tmp_path / f"{name}.safetensors"))
    (tmp_path / "torn.safetensors").write_bytes(b"torn")
    with pytest.raises(UserError, match="does not fit"):
        Policy(pipeline, str(tmp_path / "torn.safetensors"))


def test_in_bf16_the_lora_stays_fp32_and_the_first_ratio_is_near_one(pipeline):
    from ddpo import rollout, step_log_prob
    policy = Policy(pipeline, dtype=torch.bfloat16, trainable=True)
    trained = policy.train("lora", 4, "all")
    assert {p.dtype for p in trained.values()} == {torch.float32} and policy.unet.conv_in.weight.dtype == torch.bfloat16
    schedule, predict = policy.schedule(4, 1.), plain(policy, ["a dog"] * 2, 3.)
    latents, log_probs = rollout(predict, draw_noise([1, 2], 4, (4, 8, 8)), schedule)
    assert latents.dtype == log_probs.dtype == torch.float32
    for k in range(4):
        _, again = step_log_prob(predict, latents[:, k], latents[:, k + 1], schedule, k)
        assert (again - log_probs[:, k]).abs().max() < 1e-3
    again.sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in trained.values() if p.grad is not None)
