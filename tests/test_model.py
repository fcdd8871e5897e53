"""model.py against stock diffusers, on a pipeline with random weights."""
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, CLIPTokenizer

from ddpo import denoise, draw_noise, rollout, step_log_prob, step_mean
from model import LORA_FILE, Policy, guidance_of, plain
from plumbing.options import UserError
from prompts import Prompt

KOHYA_FILE = LORA_FILE.replace(".", "_kohya.")


def random_lora(policy, targets="all", size=.2, seed=0):
    """A LoRA that is not zero, on the policy; its trained parameters."""
    trained = policy.make_trainable("lora", 4, targets)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in trained.values():
            p.copy_(torch.randn(p.shape, generator=generator) * size)
    return trained


@pytest.fixture(scope="module", params=["attention", "all"])
def tuned(pipeline, tmp_path_factory, request):
    """A policy whose LoRA is not zero, and the folder where it is saved."""
    folder = tmp_path_factory.mktemp("tuned")
    policy = Policy(pipeline, trainable=True)
    random_lora(policy, request.param)
    policy.save(str(folder), "card")
    return policy, folder


def stock_picture(pipeline, prompt, noise, steps, guidance, lora=None, weight_name=None):
    """The picture (H, W, 3) in 0..1 of diffusers' own pipeline at eta 0, from our noise."""
    pipe = StableDiffusionPipeline.from_pretrained(pipeline, safety_checker=None)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    if lora:
        pipe.load_lora_weights(str(lora), weight_name=weight_name)
    pipe.set_progress_bar_config(disable=True)
    return pipe(prompt, num_inference_steps=steps, guidance_scale=guidance, eta=0.,
                latents=noise, output_type="np").images[0]


def our_picture(policy, prompt, noise, steps, guidance):
    """The same by our own steps, before it is rounded to 8 bits."""
    schedule = policy.schedule(steps, 0.)
    no_noise = torch.zeros(1, steps, *noise.shape[1:])
    predict = plain(policy, [prompt], guidance)
    latents = denoise(predict, torch.cat([noise[:, None], no_noise], 1), schedule,
                      policy.prediction_type)
    with torch.no_grad():
        picture = policy.vae.decode(latents / policy.vae.config.scaling_factor).sample
    picture = (picture / 2 + .5).clamp(0, 1)[0].permute(1, 2, 0).numpy()
    rounded = policy.decode(latents)[0].numpy()
    assert np.abs(picture * 255 - rounded).max() <= .51
    return picture


# ---- LoRAs ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("weight_name", [LORA_FILE, KOHYA_FILE])
def test_a_saved_lora_draws_the_same_picture_in_stock_diffusers(pipeline, tuned, weight_name):
    policy, folder = tuned
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    ours = our_picture(policy, "a large peach", noise, 5, 4.)
    theirs = stock_picture(pipeline, "a large peach", noise, 5, 4., folder, weight_name)
    base = stock_picture(pipeline, "a large peach", noise, 5, 4.)
    assert np.abs(ours - theirs).max() < 1e-3
    assert np.abs(base - theirs).max() > .02            # and the LoRA does something


def output(policy, seed=0):
    """The network's output for two prompts at a random latent."""
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return policy.unet_output(x, torch.tensor(500), policy.encode(["a large peach", "a dog"]))


def test_within_base_the_lora_is_off(pipeline, tuned):
    policy, _ = tuned
    before, theirs = output(policy), output(Policy(pipeline))
    with policy.base():
        assert torch.equal(output(policy), theirs)
    assert torch.equal(output(policy), before) and not torch.equal(before, theirs)


def test_a_saved_lora_is_loaded_back_by_ours(pipeline, tuned):
    policy, folder = tuned
    for path in (folder, folder / KOHYA_FILE):
        again = Policy(pipeline, [(str(path), 1.)])
        assert torch.allclose(output(again), output(policy), atol=1e-5)


def test_loras_add_each_times_its_weight(pipeline, tmp_path):
    """Against the base's weights with the sum of the LoRAs' products added by hand."""
    products = {}
    for name, targets, seed in (("a", "attention", 1), ("b", "all", 2)):
        policy = Policy(pipeline, trainable=True)
        random_lora(policy, targets, seed=seed)
        (tmp_path / name).mkdir()
        policy.save(str(tmp_path / name), "card")
        products[name] = get_peft_model_state_dict(policy.unet)
    both = Policy(pipeline, [(str(tmp_path / "a"), 1.), (str(tmp_path / "b"), -.5)])
    by_hand = Policy(pipeline)
    with torch.no_grad():
        for name, weight in (("a", 1.), ("b", -.5)):
            for key, down in products[name].items():
                if ".lora_A." in key:
                    up = products[name][key.replace("lora_A", "lora_B")]
                    module = by_hand.unet.get_submodule(key.split(".lora_A.")[0])
                    delta = (up.flatten(1) @ down.flatten(1)).view_as(module.weight)
                    module.weight += weight * delta
    assert torch.allclose(output(both), output(by_hand), atol=1e-4)
    for other in ([(str(tmp_path / "a"), 1.)], [(str(tmp_path / "a"), 1.),
                                                (str(tmp_path / "b"), .5)]):
        policy = Policy(pipeline, other)
        assert not torch.allclose(output(both), output(policy), atol=1e-3)
        assert policy.fingerprint() != both.fingerprint()


def test_a_fully_trained_unet_is_saved_and_loaded_back_and_takes_a_lora(pipeline, tmp_path, tuned):
    policy = Policy(pipeline, trainable=True)
    trained = policy.make_trainable("weights")
    with torch.no_grad():
        trained["conv_in.weight"] *= 2
    policy.save(str(tmp_path), "card")
    again = Policy(pipeline, [(str(tmp_path), 1.)])
    assert torch.equal(again.unet.conv_in.weight, policy.unet.conv_in.weight)
    with_lora = Policy(pipeline, [(str(tmp_path), 1.), (str(tuned[1]), 1.)])
    assert not torch.allclose(output(with_lora), output(again), atol=1e-3)
    for parts in ([(str(tmp_path), .5)], [(str(tmp_path), 1.), (str(tmp_path), 1.)]):
        with pytest.raises(UserError, match="--checkpoint: .* whole UNets, which do not add"):
            Policy(pipeline, parts)


def test_a_lora_that_does_not_fit_is_refused(pipeline, tmp_path):
    for name, key, sentence in (
            ("a", "text_encoder.x.lora_A.weight", "no weights for a UNet"),
            ("b", "unet.nowhere.to_q.lora_A.weight", "does not fit")):
        path = str(tmp_path / f"{name}.safetensors")
        up = key.replace("lora_A", "lora_B")
        save_file({key: torch.zeros(4, 32), up: torch.zeros(32, 4)}, path)
        with pytest.raises(UserError, match=sentence):
            Policy(pipeline, [(path, 1.)])
    (tmp_path / "torn.safetensors").write_bytes(b"torn")
    with pytest.raises(UserError, match="does not fit"):
        Policy(pipeline, [(str(tmp_path / "torn.safetensors"), 1.)])
    with pytest.raises(UserError, match=f"nowhere has neither {LORA_FILE} nor unet/"):
        Policy(pipeline, [("nowhere", 1.)])


def test_a_loras_file_may_be_read_by_everybody(tuned):
    _, folder = tuned
    assert (folder / LORA_FILE).stat().st_mode & 0o777 == 0o644
    assert load_file(folder / LORA_FILE)


# ---- guidance and text ---------------------------------------------------------------------------

def test_guidance_is_one_call_for_both_halves_and_equals_the_formula(pipeline):
    policy, calls = Policy(pipeline), []
    policy.unet.register_forward_hook(lambda *a: calls.append(1))
    x, t = torch.randn(2, 4, 8, 8), torch.tensor(401)
    guided = plain(policy, ["a dog", "a cat"], 3.)(x, t)
    assert len(calls) == 1
    with_text = policy.unet_output(x, t, policy.encode(["a dog", "a cat"]))
    without = policy.unet_output(x, t, policy.encode(["", ""]))
    assert torch.allclose(guided, without + 3 * (with_text - without), atol=1e-5)
    per_prompt = plain(policy, ["a dog", "a cat"], torch.tensor([3., 1.]))(x, t)
    assert torch.allclose(per_prompt[1], with_text[1], atol=1e-5)
    calls.clear()
    assert torch.equal(plain(policy, ["a dog", "a cat"], 1)(x, t), with_text) and len(calls) == 1


def test_a_prompts_own_guidance_goes_before_the_default():
    assert guidance_of(["a", Prompt("b")], 5.) == 5.
    assert guidance_of(["a", Prompt("b", guidance=7.5)], 5.).tolist() == [5., 7.5]


def test_text_states_equal_transformers_and_are_encoded_once(pipeline):
    policy = Policy(pipeline)
    tokenizer = CLIPTokenizer.from_pretrained(f"{pipeline}/tokenizer")
    ids = tokenizer(["a dog"], padding="max_length", max_length=24, return_tensors="pt").input_ids
    with torch.no_grad():
        encoder = CLIPTextModel.from_pretrained(f"{pipeline}/text_encoder")
        theirs = encoder(ids).last_hidden_state
    assert torch.allclose(policy.encode(["a dog"]), theirs, atol=1e-5)
    policy.text_encoder = None
    policy.encode(["a dog"])


# ---- precision, training -------------------------------------------------------------------------

def test_in_bf16_the_lora_stays_fp32_and_the_first_ratio_is_near_one(pipeline):
    policy = Policy(pipeline, dtype=torch.bfloat16, trainable=True)
    trained = policy.make_trainable("lora", 4, "all")
    assert {p.dtype for p in trained.values()} == {torch.float32}
    assert policy.unet.conv_in.weight.dtype == torch.bfloat16
    schedule, predict = policy.schedule(4), plain(policy, ["a dog"] * 2, 3.)
    latents, log_probs = rollout(predict, draw_noise([1, 2], 4, (4, 8, 8)), schedule)
    assert latents.dtype == log_probs.dtype == torch.float32
    for k in range(4):
        again = step_log_prob(predict, latents[:, k], latents[:, k + 1], schedule, k)
        assert (again - log_probs[:, k]).abs().max() < 1e-3
    again.sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in trained.values() if p.grad is not None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_checkpointing_changes_no_gradient(pipeline, dtype):
    gradients = []
    for checkpointed in (False, True):
        policy = Policy(pipeline, dtype=dtype, trainable=True)
        trained = random_lora(policy)
        if checkpointed:
            policy.checkpoint_gradients()
        x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        plain(policy, ["a dog", "a cup"], 2.)(x, torch.tensor(500)).square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in trained.values()]))
    assert torch.allclose(*gradients, rtol=1e-3, atol=1e-4)


def test_the_pull_is_the_distance_from_the_base(pipeline):
    """Against the base loaded anew; nothing at all before the LoRA has learned."""
    policy, base = Policy(pipeline, trainable=True), Policy(pipeline)
    trained, texts = policy.make_trainable("lora", 4, "attention"), ["a dog", "a cup", "a cat"]
    k, schedule = torch.tensor([1, 0, 2]), policy.schedule(3)
    x = torch.randn(3, *policy.latent_shape(), generator=torch.Generator().manual_seed(0))
    predict = plain(policy, texts, 2.)
    assert (policy.distance_to_base(predict, x, schedule, k) == 0).all()
    generator, means = torch.Generator().manual_seed(0), []
    with torch.no_grad():
        for p in trained.values():
            p.copy_(torch.randn(p.shape, generator=generator) * .1)
        for one in (policy, base):
            rows = [step_mean(plain(one, [text], 2.), x[i:i + 1], schedule, int(k[i]))[0]
                    for i, text in enumerate(texts)]
            means.append(torch.cat(rows))
    pull = policy.distance_to_base(predict, x, schedule, k)
    by_hand = ((means[0] - means[1]) ** 2).flatten(1).mean(1)
    assert (by_hand > 0).all() and torch.allclose(pull, by_hand, rtol=1e-4)
    pull.sum().backward()
    assert all(p.grad is not None for p in trained.values())


@pytest.mark.parametrize("model, sentence", [
    ("nowhere/at/all", "--model: the folder nowhere/at/all does not exist"),
    ("someone/some-model", "--model: someone/some-model is not available from the hub")])
def test_a_model_that_is_not_there_is_named(model, sentence):
    with pytest.raises(UserError, match=sentence):
        Policy(model)


def test_a_folder_that_lacks_a_part_is_named(tmp_path):
    with pytest.raises(UserError, match="has no usable .*/ in Stable Diffusion's format"):
        Policy(str(tmp_path))


def test_steps_that_do_not_fit_the_scheduler_are_a_sentence(pipeline):
    with pytest.raises(UserError, match="--steps, --eta: 5 steps with eta 2"):
        Policy(pipeline).schedule(5, 2.)
