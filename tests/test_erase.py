"""The rivals against their formulas written out, what each may touch, and a run that is cut."""
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel

from checkpoint import load_checkpoint
from ddpo import ddim_mean
from erase import METHODS, MOSAIC, Job, as_output, check, choose_weights, main, on_the_way, parse_args, safegen_loss, to_latents, triples
from model import LORA_FILE, Policy
from prompts import UserError, read
from sample import draw_noise, pixelate

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
MAY_LEARN = {"esd-x": lambda name: "attn2" in name, "esd-u": lambda name: "attn2" not in name,
             "sdd": lambda name: "attn2" in name, "safegen": lambda name: "attn1" in name}


def options(method, pipeline, *more):
    args = parse_args([method, "--model", pipeline, "--prompts", "a dog", "--benign", "a cup", "--steps", "4", "--batch-size", "2",
                       "--device", "cpu", "--dtype", "fp32", "--rank", "2", "--save-every", "6", *more])
    check(args)
    return args


@pytest.fixture
def one_thread():
    """Sums in one order, here and in the process that is killed."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def pictures_that_no_detector_sees(monkeypatch):
    """SafeGen's triples, where a test does not make them: the random pipeline draws nothing that trips NudeNet."""
    made = lambda *_: [torch.randn(5, 4, 8, 8, generator=torch.Generator().manual_seed(k)) for k in range(3)]
    monkeypatch.setitem(METHODS, "safegen", METHODS["safegen"]._replace(prepare=made))


@pytest.fixture
def job(pipeline):
    """job(method, options...): half-trained weights beside the frozen ones."""
    def make(method, *more):
        args = options(method, pipeline, *more)
        policy = Policy(pipeline, trainable=True)
        trained = choose_weights(policy, METHODS[method].weights, args)
        start = {name: p.detach().clone() for name, p in trained.items()}
        move = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for p in trained.values():
                p += torch.randn(p.shape, generator=move) * .05
        teacher = {name: p + torch.randn(p.shape, generator=move) * .05 for name, p in start.items()}
        return Job(policy, trained, start, teacher, policy.schedule(4, 1.), METHODS["safegen"].prepare(), args)
    return make


def test_the_way_to_x_t_is_the_rollouts_with_guidance_three(job):
    j, texts = job("esd-x"), ["a dog", "a cat"]
    for seed in range(6):
        rng = np.random.default_rng(seed)
        with torch.no_grad():
            x, t = on_the_way(j, texts, rng)
            rng = np.random.default_rng(seed)
            k = int(rng.integers(4))
            noise = draw_noise(rng.integers(2 ** 62, size=2), k, (4, 8, 8))
            mine = noise[:, 0]
            for i in range(k):
                e = [j.policy.unet_output(mine, j.schedule.t[i], j.policy.encode(c)) for c in (["", ""], texts)]
                a, b, sigma = (row[i] for row in j.schedule[1:])
                mine = ddim_mean(mine, e[0] + 3 * (e[1] - e[0]), a, b, sigma) + sigma * noise[:, i + 1]
        assert t == j.schedule.t[k] and torch.allclose(x, mine, atol=1e-4)


@pytest.mark.parametrize("eta", [0., 1.5])
def test_esds_target_is_its_formula_from_a_model_loaded_anew(job, pipeline, eta):
    """At eta 0 it is the frozen model's prediction without a prompt."""
    j, base, texts = job("esd-x", "--negative-guidance", str(eta)), Policy(pipeline), ["a dog", "a cat"]
    with torch.no_grad():
        loss = METHODS["esd-x"].step(j, texts, np.random.default_rng(0))
        x, t = on_the_way(j, texts, np.random.default_rng(0))
        empty, c = base.unet_output(x, t, base.encode(["", ""])), base.unet_output(x, t, base.encode(texts))
        target = empty if eta == 0 else (1 + eta) * empty - eta * c
        assert torch.allclose(loss, ((j.policy.unet_output(x, t, base.encode(texts)) - target) ** 2).mean(), rtol=1e-4)


def test_esds_gradient_reaches_what_learns_and_stops_at_the_target(job):
    j = job("esd-x")
    METHODS["esd-x"].step(j, ["a dog"], np.random.default_rng(0)).backward()
    grads = {name for name, p in j.policy.unet.named_parameters() if p.grad is not None}
    assert grads == set(j.trained) and grads == {n for n, _ in j.policy.unet.named_parameters() if "attn2" in n}


def test_sdd_samples_from_its_teacher_and_compares_the_student_with_itself(job):
    j, texts = job("sdd"), ["a dog", "a cat"]
    student = {name: p.detach().clone() for name, p in j.trained.items()}
    loss = METHODS["sdd"].step(j, texts, np.random.default_rng(3))          # seed 3: not the first step
    with torch.no_grad():
        for name, p in j.trained.items():
            p.copy_(j.teacher[name])
        x, t = on_the_way(j, texts, np.random.default_rng(3))
        for name, p in j.trained.items():
            p.copy_(student[name])
        e = [j.policy.unet_output(x, t, j.policy.encode(c)) for c in (["", ""], texts)]
    assert t != j.schedule.t[0] and torch.allclose(loss, ((e[0] - e[1]) ** 2).mean(), rtol=1e-4)


def test_sdds_teacher_is_the_average_of_the_students_and_is_what_is_saved(pipeline, tmp_path):
    folder, base = str(tmp_path / "run"), Policy(pipeline).unet.state_dict()
    args = options("sdd", pipeline, "--iterations", "2", "--save-every", "1", "--ema", ".9", "--lr", "1e-2", "--output-dir", folder)
    main(args)
    one, two = (torch.load(f"{folder}/checkpoints/epoch_000{n}.pt", weights_only=True) for n in (1, 2))
    saved = UNet2DConditionModel.from_pretrained(folder, subfolder="unet").state_dict()
    for name in one["weights"]:
        by_hand = .9 * base[name] + .1 * one["weights"][name]
        assert torch.allclose(one["teacher"][name], by_hand, atol=1e-6)
        by_hand = .9 * by_hand + .1 * two["weights"][name]
        assert torch.allclose(two["teacher"][name], by_hand, atol=1e-6) and torch.equal(saved[name], two["teacher"][name])


def test_safegens_loss_is_its_formula_written_out(job):
    j, rng = job("safegen", "--mosaic-weight", ".1"), np.random.default_rng(0)
    loss = METHODS["safegen"].step(j, ["unused"] * 2, np.random.default_rng(0))
    i, k, seeds, t = rng.integers(5, size=2), rng.integers(5, size=2), rng.integers(2 ** 62, size=4), rng.integers(1000, size=4)
    scheduler, by_hand = DDIMScheduler.from_config(j.policy.scheduler.config), 0
    for row in range(4):
        e, time_ = draw_noise(seeds[row:row + 1], 0, (4, 8, 8))[:, 0], torch.tensor([t[row]])
        if row < 2:
            z, mosaic = (scheduler.add_noise(part[i[row]][None], e, time_) for part in j.pictures[:2])
            target, weight = z - mosaic + e, .1
        else:
            z, target, weight = scheduler.add_noise(j.pictures[2][k[row - 2]][None], e, time_), e, .9
        with torch.no_grad():
            by_hand += weight * ((j.policy.unet_output(z, time_, j.policy.encode([""])) - target) ** 2).mean() / 2
    assert torch.allclose(loss, by_hand, rtol=1e-4)


def test_epsilon_turned_into_v_is_diffusers_velocity(pipeline):
    scheduler = DDIMScheduler.from_pretrained(pipeline, subfolder="scheduler")
    x0, eps = torch.randn(2, 5, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0, 10, 300, 700, 999])
    a, x = scheduler.alphas_cumprod[t].view(-1, 1, 1, 1), scheduler.add_noise(x0, eps, t)
    assert torch.allclose(as_output(eps, x, a, "v_prediction"), scheduler.get_velocity(x0, eps, t), atol=1e-4)
    assert as_output(eps, x, a, "epsilon") is eps


def test_safegens_weight_shares_one_between_mosaics_and_benign():
    zero, one, two = torch.zeros(1), torch.ones(1), torch.full((1,), 2.)
    assert safegen_loss(zero, one, zero, two, .25) == .25 * 1 + .75 * 4


def test_safegens_pictures_are_those_that_trip_their_mosaics_and_those_that_do_not(pipeline, tmp_path, monkeypatch):
    import reward
    seen = []

    class Half:                                         # every second picture trips
        def __call__(self, pictures):
            seen.append(pictures)
            return np.where(np.arange(len(pictures)) % 2, .9, .1)[:, None] * np.ones((1, 18))
    monkeypatch.setattr(reward, "Nudity", Half)
    monkeypatch.chdir(tmp_path)
    policy = Policy(pipeline)
    prompts = [read(text)[0] for text in ("a dog", "a cup")]
    nude, mosaic, benign = triples(policy, *prompts, reward.STRICT, options("safegen", pipeline, "--pictures", "5"))
    assert torch.equal(nude, to_latents(policy, seen[0][1::2])) and torch.equal(benign, to_latents(policy, seen[1][::2]))
    assert torch.equal(mosaic, to_latents(policy, pixelate(seen[0][1::2], [True, True], MOSAIC))) and not torch.equal(nude, mosaic)
    assert not os.listdir(tmp_path)                     # in memory alone


@pytest.mark.parametrize("method", list(METHODS))
def test_training_lowers_the_loss_and_touches_only_its_weights(pipeline, tmp_path, method):
    """Read back by stock diffusers and by our own loader."""
    folder = str(tmp_path / "run")
    main(options(method, pipeline, "--iterations", "24", "--lr", "2e-3", "--warm-up", "0", "--ema", ".5", "--mosaic-weight", ".1", "--output-dir", folder))
    losses = [json.loads(line)["loss"] for line in open(f"{folder}/metrics.jsonl")]
    assert len(losses) == 4 and losses[-1] < losses[0]
    before = UNet2DConditionModel.from_pretrained(pipeline, subfolder="unet").state_dict()
    after = UNet2DConditionModel.from_pretrained(folder, subfolder="unet").state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    allowed = {name for name in before if MAY_LEARN[method](name)}
    assert moved <= allowed and len(moved) > .9 * len(allowed)              # keys' biases and the like may rest
    ours = Policy(pipeline, folder).unet.state_dict()
    assert all(torch.equal(ours[name], after[name]) for name in after)
    assert json.load(open(f"{folder}/args.json"))["model"] == pipeline


@pytest.mark.parametrize("method", list(METHODS))
def test_a_lora_lies_on_the_methods_layers_alone_and_loads_in_diffusers(pipeline, tmp_path, method):
    folder = str(tmp_path / "run")
    main(options(method, pipeline, "--trainable", "lora", "--iterations", "4", "--lr", "2e-2", "--warm-up", "0", "--ema", "0",
                 "--output-dir", folder))
    from safetensors.torch import load_file
    names = load_file(f"{folder}/{LORA_FILE}")
    assert names and all(MAY_LEARN[method](name) for name in names)
    base, ours, stock = Policy(pipeline), Policy(pipeline, folder), UNet2DConditionModel.from_pretrained(pipeline, subfolder="unet")
    stock.load_lora_adapter(folder, weight_name=LORA_FILE, prefix="unet")
    x, t, text = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor(500), base.encode(["a dog", "a cup"])
    with torch.no_grad():
        plain, mine, theirs = base.unet_output(x, t, text), ours.unet_output(x, t, text), stock(x, t, text).sample
    assert torch.allclose(mine, theirs, atol=1e-5) and not torch.allclose(mine, plain, atol=1e-4)


def left_by(folder):
    return {name: open(f"{folder}/{name}", "rb").read() for name in ("metrics.jsonl", "unet/diffusion_pytorch_model.safetensors")}


def test_a_run_cut_by_sigkill_ends_bit_equal(pipeline, tmp_path, one_thread):
    whole, cut = str(tmp_path / "whole"), str(tmp_path / "cut")
    command = ["sdd", "--model", pipeline, "--prompts", "a dog", "--steps", "4", "--batch-size", "2", "--device", "cpu", "--dtype", "fp32",
               "--iterations", "40", "--save-every", "5", "--warm-up", "30", "--lr", "1e-3"]
    main(done := parse_args([*command, "--output-dir", whole]))
    assert done.benign is None
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen([sys.executable, f"{ROOT}/erase.py", *command, "--output-dir", cut], env=env, cwd=ROOT,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not os.path.exists(f"{cut}/checkpoints/epoch_0010.pt") and process.poll() is None:
        time.sleep(.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and 5 <= load_checkpoint(f"{cut}/checkpoints")["epoch"] < 40
    main(parse_args([*command, "--output-dir", cut]))
    assert left_by(cut) == left_by(whole)
    main(parse_args([*command, "--output-dir", cut]))                       # once more: nothing is left to do
    assert left_by(cut) == left_by(whole)


@pytest.mark.parametrize("more, said", [
    (["--lr", "0"], "--lr: 0 is given"),
    (["--iterations", "0"], "--iterations: 0 is given; at least 1"),
    (["--ema", "1"], "--ema is 0 to below 1"),
    (["--prompts", "nowhere.csv"], "--prompts: the file nowhere.csv does not exist"),
    (["--prompts", "a naked child"], "1 refused"),
    (["--benign", "nowhere.csv"], "--benign: the file nowhere.csv does not exist"),
    (["--unsafe-labels", "KNEES"], "KNEES is no label"),
    (["--model", "/nowhere"], "--model: the folder /nowhere does not exist"),
])
def test_a_users_mistake_is_one_sentence(pipeline, tmp_path, more, said):
    with pytest.raises(UserError, match=said):
        main(options("safegen", pipeline, "--output-dir", str(tmp_path / "run"), *more))


def test_what_is_erased_without_a_prompt_file_is_the_concepts_names(pipeline, tmp_path, capsys, monkeypatch):
    import erase
    asked = []
    monkeypatch.setattr(erase, "walk", lambda prompts, *rest: asked.append(prompts) or prompts[:1])
    main(parse_args(["esd-x", "--model", pipeline, "--concept", "a dog, cat", "--steps", "2", "--iterations", "1", "--output-dir", str(tmp_path / "run")]))
    assert asked == [["a dog", "cat"]]
    with pytest.raises(UserError, match="--concept: .a naked child. mentions minors"):
        main(parse_args(["esd-x", "--model", pipeline, "--concept", "a naked child", "--output-dir", str(tmp_path / "other")]))


def test_help_answers_within_a_second_and_another_runs_folder_is_refused(pipeline, tmp_path, capsys):
    began = time.time()
    subprocess.run([sys.executable, f"{ROOT}/erase.py", "--help"], check=True, capture_output=True)
    assert time.time() - began < 1
    folder = str(tmp_path / "run")
    main(options("esd-x", pipeline, "--iterations", "1", "--output-dir", folder))
    assert "1 to erase, 0 benign; 0 refused" in capsys.readouterr().out
    with pytest.raises(UserError, match="holds another run"):
        main(options("esd-u", pipeline, "--iterations", "1", "--output-dir", folder))
