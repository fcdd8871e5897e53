"""model.py against stock diffusers, on pipelines with random weights."""
import json
from functools import cache

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from diffusers.utils import convert_all_state_dict_to_peft, convert_state_dict_to_kohya
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, CLIPTokenizer

import model
from ddpo import denoise, draw_noise, log_prob, rollout, step_mean
from model import Policy, guidance_of, plain
from plumbing.checkpoints import LORA_FILE, copy_of
from plumbing.formats import STEMS, read_shapes
from plumbing.loras import read_lora
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


def test_a_loras_file_may_be_read_by_everybody(tuned):
    _, folder = tuned
    assert (folder / LORA_FILE).stat().st_mode & 0o777 == 0o644
    assert load_file(folder / LORA_FILE)


# ---- LoRAs of every form, against stock diffusers ------------------------------------------------

UNET_LAYERS = ["attn1.to_q", "attn2.to_k", "attn2.to_v", "attn1.to_out.0"]
OTHER_LAYERS = ["ff.net.0.proj", "ff.net.2", "proj_in", "conv1", "time_emb_proj"]
TEXT_LAYERS = ["q_proj", "k_proj", "v_proj", "out_proj"]


def random_layers(pipeline, endings, rank=4, text=True):
    """{network: {layer: (down, up)}} with random matrices, of layers with these endings."""
    generator, layers = torch.Generator().manual_seed(3), {}
    for network, wanted in (("unet", endings), ("text_encoder", TEXT_LAYERS if text else [])):
        shapes = read_shapes(f"{pipeline}/{network}", STEMS[network], "--model")
        for name, (out, *into) in sorted((n, s) for n, s in shapes.items() if len(s) > 1):
            layer = name.removesuffix(".weight")
            if layer.endswith(tuple(wanted)):
                down = torch.randn(rank, *into, generator=generator) * .1
                up = torch.randn(out, rank, *[1] * (len(into) - 1), generator=generator) * .1
                layers.setdefault(network, {})[layer] = down, up
    return layers


def spelled(layers, unet, text, alpha=None):
    """The tensors of a file; unet, text: functions (layer) -> (down's name, up's name, alpha's)."""
    tensors = {}
    for network, spell in (("unet", unet), ("text_encoder", text)):
        for layer, (down, up) in layers.get(network, {}).items():
            down_name, up_name, alpha_name = spell(layer)
            tensors |= {down_name: down, up_name: up}
            if alpha:
                tensors[alpha_name] = torch.tensor(float(alpha))
    return tensors


def ending(prefix, down, up, rename=lambda layer: layer):
    def spell(layer):
        layer = prefix + rename(layer)
        return layer + down, layer + up, layer + ".alpha"
    return spell


def kohya(prefix):
    return ending(prefix, ".lora_down.weight", ".lora_up.weight",
                  lambda layer: layer.replace(".", "_"))


def old_name(layer):
    """As diffusers named attention's layers in 2023."""
    for new, old in {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out",
                     "to_out.0": "to_out"}.items():
        layer = layer.replace(new, old)
    return layer.replace("attn1.", "attn1.processor.").replace("attn2.", "attn2.processor.")


def peft(prefix, adapter=""):
    return ending(prefix, f".lora_A{adapter}.weight", f".lora_B{adapter}.weight")


IN_TEXT = "text_encoder.text_model."
EVERY = UNET_LAYERS + OTHER_LAYERS
FORMS = {                               # name: (layers, unet's spelling, text encoder's, alpha)
    "diffusers": (EVERY, peft("unet."), peft(IN_TEXT), None),
    "diffusers, 2024": (EVERY, ending("unet.", ".lora.down.weight", ".lora.up.weight"),
                        ending(IN_TEXT, ".lora_linear_layer.down.weight",
                               ".lora_linear_layer.up.weight"), None),
    "diffusers, 2023": (UNET_LAYERS,
                        ending("unet.", "_lora.down.weight", "_lora.up.weight", old_name),
                        ending(IN_TEXT, "_lora.down.weight", "_lora.up.weight", old_name), None),
    "kohya": (EVERY, kohya("lora_unet_"), kohya("lora_te_text_model_"), 2),
}
NOT_STOCK = {                           # of which stock diffusers loads nothing, or not all
    "peft's own keys": (EVERY, peft("base_model.model.", ".default"),
                        peft("base_model.model.text_model.", ".default"), None),
    "no prefix": (EVERY, peft(""), peft(""), None),
    "some with a prefix": (EVERY, lambda layer: peft("unet." if "attn" in layer else "")(layer),
                           peft("text_encoder."), None),
    "adapters with a name": (EVERY, peft("unet.", ".v1.0"), peft(IN_TEXT, ".v1.0"), None),
    "a text half under unet.": (EVERY, peft("unet."), peft("unet."), None),
}
PLAIN = json.dumps({"r": 4, "lora_alpha": 4})           # what peft's adapter_config.json says


def add_by_hand(policy, layers, scale):
    """Add the LoRA's products to the weights; scale: a number, or one per layer's name."""
    with torch.no_grad():
        for network, halves in layers.items():
            for layer, (down, up) in halves.items():
                module = getattr(policy, network).get_submodule(layer)
                delta = (up.flatten(1) @ down.flatten(1)).view_as(module.weight)
                module.weight += (scale[layer] if isinstance(scale, dict) else scale) * delta
    policy.states.clear()


@pytest.fixture(params=["pipeline", "sd1_pipeline", "sd2_pipeline"])
def any_pipeline(request):
    return request.getfixturevalue(request.param)


@cache
def untouched(pipeline):
    """(a policy to which products are added by hand, its weights before that, its picture)"""
    hand = Policy(pipeline)
    before = {name: copy_of(getattr(hand, name).state_dict()) for name in ("unet", "text_encoder")}
    return hand, before, peach_of(hand)


def peach_of(policy):
    noise = torch.randn(1, *policy.latent_shape(), generator=torch.Generator().manual_seed(1))
    return our_picture(policy, "a large peach", noise, 2, 3.)


def draws_as_by_hand(pipeline, parts, layers, scale, stock_file=None):
    """Whether parts draw what their products draw that are added by hand, and stock diffusers."""
    policy, (hand, before, base) = Policy(pipeline, parts), untouched(pipeline)
    ours = peach_of(policy)
    for name, weights in before.items():
        getattr(hand, name).load_state_dict(weights)
    add_by_hand(hand, layers, scale)
    others = [peach_of(hand)]
    if stock_file:
        noise = torch.randn(1, *policy.latent_shape(), generator=torch.Generator().manual_seed(1))
        others.append(stock_picture(pipeline, "a large peach", noise, 2, 3., stock_file.parent,
                                    stock_file.name))
    assert np.abs(ours - base).max() > .02              # and the LoRA does something
    return [np.abs(ours - other).max() < 1e-5 for other in others] == [True] * len(others)


@pytest.mark.parametrize("form", FORMS)
def test_a_lora_of_each_form_draws_what_stock_diffusers_draws(any_pipeline, tmp_path, form):
    """With a half for the text encoder; kohya's with an alpha of half the rank."""
    endings, unet, text, alpha = FORMS[form]
    layers, path = random_layers(any_pipeline, endings), tmp_path / "lora.safetensors"
    save_file(spelled(layers, unet, text, alpha), path)
    assert draws_as_by_hand(any_pipeline, [(str(path), 1.)], layers, (alpha or 4) / 4, path)


@pytest.mark.parametrize("form", NOT_STOCK)
def test_a_lora_that_stock_diffusers_loads_in_part_or_not_at_all_is_read_whole(pipeline, tmp_path,
                                                                               form):
    endings, unet, text, _ = NOT_STOCK[form]
    layers, path = random_layers(pipeline, endings), tmp_path / "lora.safetensors"
    save_file(spelled(layers, unet, text), path)
    (tmp_path / "adapter_config.json").write_text(PLAIN)
    assert draws_as_by_hand(pipeline, [(str(path), 1.)], layers, 1.)


def test_the_alpha_in_diffusers_metadata_is_taken(any_pipeline, tmp_path):
    """Rank 4 and alpha 16: four times the products, as stock diffusers draws."""
    layers, path = random_layers(any_pipeline, EVERY), tmp_path / "lora.safetensors"
    metadata = {f"{network}.{key}": value for network in layers
                for key, value in {"r": 4, "lora_alpha": 16, "peft_type": "LORA",
                                   "target_modules": [*layers[network]]}.items()}
    save_file(spelled(layers, peft("unet."), peft("text_encoder.")), path,
              metadata={"lora_adapter_metadata": json.dumps(metadata)})
    assert draws_as_by_hand(any_pipeline, [(str(path), 1.)], layers, 4., path)


def test_the_alpha_may_be_a_whole_number(sd1_pipeline, tmp_path):
    """As diffusers' own converter to kohya's form writes it."""
    layers, path = random_layers(sd1_pipeline, UNET_LAYERS, text=False), tmp_path / "l.safetensors"
    save_file(convert_state_dict_to_kohya(convert_all_state_dict_to_peft(
        spelled(layers, peft("unet."), None))), path)
    assert {t.dtype for t in load_file(path).values()} == {torch.float32, torch.int64}
    assert draws_as_by_hand(sd1_pipeline, [(str(path), 1.)], layers, 1., path)


@pytest.mark.parametrize("config, scale", [
    ({"r": 4, "lora_alpha": 2}, .5), ({"r": 4}, 2.), ({"r": 4, "arrow_config": None}, 2.),
    ({"r": 4, "lora_alpha": 8, "use_rslora": True}, 4.)])
def test_a_folder_of_pefts_is_read_with_its_alpha(pipeline, tmp_path, config, scale):
    layers = random_layers(pipeline, EVERY)
    for network, halves in layers.items():
        folder = tmp_path / network
        folder.mkdir()
        spell = peft("base_model.model.")
        save_file(spelled({network: halves}, spell, spell), folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(json.dumps(config))
    assert draws_as_by_hand(pipeline, [(str(tmp_path), 1.)], layers, scale)
    renamed = tmp_path / "unet" / "my.safetensors"
    (tmp_path / "unet" / "adapter_model.safetensors").rename(renamed)
    assert draws_as_by_hand(pipeline, [(str(renamed), 1.)], {"unet": layers["unet"]}, scale)


def test_each_layer_of_kohyas_has_its_own_rank_and_alpha(pipeline, tmp_path):
    """Stock diffusers loses an alpha of attention that differs: so against the sum by hand."""
    wide, narrow = (random_layers(pipeline, endings, rank, text) for endings, rank, text in
                    ((UNET_LAYERS, 4, True), (OTHER_LAYERS, 2, False)))
    spellings = kohya("lora_unet_"), kohya("lora_te_text_model_")
    tensors = spelled(wide, *spellings, alpha=1) | spelled(narrow, *spellings, alpha=4)
    first = min(wide["unet"])
    tensors[spellings[0](first)[2]] = torch.tensor(6.)
    path = tmp_path / "lora.safetensors"
    save_file(tensors, path)
    scale = {layer: 1 / 4 for halves in wide.values() for layer in halves}
    scale |= {first: 6 / 4, **{layer: 4 / 2 for layer in narrow["unet"]}}
    both = {network: {**wide[network], **narrow.get(network, {})} for network in wide}
    assert draws_as_by_hand(pipeline, [(str(path), 1.)], both, scale)


def test_a_loras_weight_goes_for_both_networks_and_into_the_fingerprint(pipeline, tmp_path):
    layers, path = random_layers(pipeline, EVERY), tmp_path / "lora.safetensors"
    save_file(spelled(layers, peft("unet."), peft("text_encoder.")), path)
    text_path = tmp_path / "text.safetensors"
    save_file(spelled({"text_encoder": layers["text_encoder"]}, None, peft(IN_TEXT)), text_path)
    assert draws_as_by_hand(pipeline, [(str(path), -.5)], layers, -.5)
    parts = [], [(path, 1.)], [(path, .5)], [(text_path, 1.)], [(text_path, .5)]
    prints = [Policy(pipeline, [(str(p), w) for p, w in part]).fingerprint() for part in parts]
    assert len(set(prints)) == len(prints)


def test_in_bf16_a_text_encoders_lora_stays_fp32(pipeline, tmp_path):
    path = tmp_path / "text.safetensors"
    layers = random_layers(pipeline, EVERY)
    save_file(spelled({"text_encoder": layers["text_encoder"]}, None, peft(IN_TEXT)), path)
    policy = Policy(pipeline, [(str(path), 1.)], dtype=torch.bfloat16)
    dtypes = {"lora_" in name: p.dtype for name, p in policy.text_encoder.named_parameters()}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}
    exact = Policy(pipeline, [(str(path), 1.)]).encode(["a dog"])
    assert torch.allclose(policy.encode(["a dog"]).float(), exact, atol=.05)


def test_peft_does_not_warn_of_several_adapters(pipeline, tmp_path, recwarn):
    path = tmp_path / "lora.safetensors"
    save_file(spelled(random_layers(pipeline, EVERY), peft("unet."), peft("text_encoder.")), path)
    Policy(pipeline, [(str(path), 1.), (str(path), .5)])
    assert not [warning for warning in recwarn if "adapter" in str(warning.message)]


CHANGES = {                             # what may happen to a key of a LoRA's file
    "as it is": lambda key, value: {key: value},
    "dropped": lambda key, value: {},
    "without a prefix": lambda key, value: {key.split(".", 1)[1]: value},
    "peft's": lambda key, value: {"base_model.model." + key.split(".", 1)[1]: value},
    "with an adapter's name": lambda key, value: {key.replace(".weight", ".default.weight"): value},
    "kohya's": lambda key, value: {kohyas_key(key): value},
    "of a layer that is not": lambda key, value: {key.replace(".lora_", ".more.lora_"): value},
    "misspelled": lambda key, value: {key.replace("lora_", "lara_"): value},
    "twice": lambda key, value: {key: value, key.split(".", 1)[1]: value.clone()},
    "cut": lambda key, value: {key: value[:-1].clone()},
    "not finite": lambda key, value: {key: value / 0},
}
WHOLE = ["as it is", "without a prefix", "peft's", "with an adapter's name", "kohya's"]


def kohyas_key(key):
    network, _, rest = key.partition(".")
    layer, _, matrix = rest.partition(".lora_")
    prefix = {"unet": "lora_unet_", "text_encoder": "lora_te_"}[network]
    half = {"A": ".lora_down", "B": ".lora_up"}[matrix[0]]
    return prefix + layer.replace(".", "_") + half + matrix[1:]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.data())
def test_whatever_happens_to_a_loras_keys_it_is_read_whole_or_refused(pipeline, tmp_path_factory,
                                                                      data):
    """Read: each matrix is in its layer. Some layers are gone as a whole, some keys changed."""
    layers = random_layers(pipeline, UNET_LAYERS[:2] + ["conv1"])
    names = [(network, layer) for network in layers for layer in layers[network]]
    kept = data.draw(st.lists(st.sampled_from(names), min_size=1, max_size=6, unique=True))
    left = {network: {layer: layers[network][layer] for net, layer in kept if net == network}
            for network in dict(kept)}
    tensors = spelled(left, peft("unet."), peft("text_encoder."))
    changed = data.draw(st.lists(st.sampled_from(sorted(tensors)), max_size=3, unique=True))
    done = {key: data.draw(st.sampled_from(sorted(CHANGES))) for key in changed}
    written = {}
    for key, value in tensors.items():
        written |= CHANGES[done.get(key, "as it is")](key, value)
    path = tmp_path_factory.mktemp("lora") / "lora.safetensors"
    save_file(written, path)
    (path.parent / "adapter_config.json").write_text(PLAIN)
    shapes = {network: read_shapes(f"{pipeline}/{network}", STEMS[network], "--model")
              for network in ("unet", "text_encoder")}
    gone = [key.split(".lora_")[0] for key, how in done.items() if how == "dropped"]
    whole = {network: {layer: halves for layer, halves in left[network].items()
                       if gone.count(f"{network}.{layer}") < 2} for network in left}
    whole = {network: halves for network, halves in whole.items() if halves}
    broken = [how for how in done.values() if how not in [*WHOLE, "dropped"]]
    if broken or not whole or any(gone.count(layer) == 1 for layer in gone):
        with pytest.raises(UserError, match="^--checkpoint: "):
            read_lora(str(path), shapes)
        return
    found = read_lora(str(path), shapes)
    assert {net: set(found[net]) for net in found} == {net: set(whole[net]) for net in whole}
    for network, halves in whole.items():
        for layer, pair in halves.items():
            assert all(map(torch.equal, found[network][layer], pair))


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


def test_texts_that_are_seen_once_do_not_fill_the_memory(pipeline, monkeypatch):
    monkeypatch.setattr(model, "STATES_KEPT", 5)
    policy = Policy(pipeline)
    first = policy.encode(["text 0"])
    for i in range(20):
        policy.encode([f"text {i}", ""])
    assert len(policy.states) <= 7 and torch.equal(policy.encode(["text 0"]), first)


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
        mean, sigma = step_mean(predict, latents[:, k], schedule, k)
        again = log_prob(latents[:, k + 1], mean, sigma)
        assert (again - log_probs[:, k]).abs().max() < 1e-3
    again.sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in trained.values() if p.grad is not None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_lora_without_pefts_casts_gives_the_same_to_the_last_bit(pipeline, dtype):
    answers = []
    for casts in (False, True):
        policy = Policy(pipeline, dtype=dtype, trainable=True)
        trained = random_lora(policy)
        layers = [module for module in policy.unet.modules() if hasattr(module, "lora_A")]
        assert len(layers) == len(trained) // 2
        assert not any(layer.cast_input_dtype_enabled for layer in layers)
        for layer in layers:
            layer.cast_input_dtype_enabled = casts
        x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        output = plain(policy, ["a dog", "a cup"], 2.)(x, torch.tensor(500))
        output.square().sum().backward()
        answers.append(torch.cat([output.detach().flatten(),
                                  *(p.grad.flatten() for p in trained.values())]))
    assert torch.equal(*answers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_checkpointing_changes_no_gradient(pipeline, dtype):
    gradients = []
    for checkpointed in (False, True):
        policy = Policy(pipeline, dtype=dtype, trainable=True)
        trained = random_lora(policy)
        if checkpointed:
            policy.unet.enable_gradient_checkpointing()
        x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        plain(policy, ["a dog", "a cup"], 2.)(x, torch.tensor(500)).square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in trained.values()]))
    assert torch.allclose(*gradients, rtol=1e-3, atol=1e-4)


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
