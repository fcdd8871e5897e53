"""SDD's step against its formula, and its teacher against the average by hand."""
import numpy as np
import torch
from diffusers import UNet2DConditionModel

from erase import choose_weights, main, parse_args
from model import Policy
from plumbing.checkpoints import copy_of
from rivals import Job
from rivals.editing import on_the_way
from rivals.sdd import SDD, sdd_loss, step

PROMPTS = ["a dog", "a cat"]


def options(pipeline, *more):
    return parse_args(["sdd", "--model", pipeline, "--prompts", "a dog", "--steps", "4",
                       "--batch-size", "2", "--device", "cpu", "--dtype", "fp32", *more])


def test_it_samples_from_its_teacher_and_compares_the_student_with_itself(pipeline):
    args, policy = options(pipeline), Policy(pipeline, trainable=True)
    trained = choose_weights(policy, SDD.weights, args)
    generator = torch.Generator().manual_seed(1)
    teacher = {name: p + torch.randn(p.shape, generator=generator) * .05
               for name, p in copy_of(trained).items()}
    job = Job(policy, args, policy.schedule(4, 1.), trained, copy_of(trained), teacher)
    with torch.no_grad():
        for p in trained.values():
            p += torch.randn(p.shape, generator=generator) * .05
    student = copy_of(trained)

    loss = step(job, PROMPTS, np.random.default_rng(3))             # seed 3: not the first step
    with torch.no_grad():
        for name, p in trained.items():
            p.copy_(teacher[name])
        x, t = on_the_way(job, PROMPTS, np.random.default_rng(3))
        for name, p in trained.items():
            p.copy_(student[name])
        empty = policy.unet_output(x, t, policy.encode(["", ""]))
        text = policy.unet_output(x, t, policy.encode(PROMPTS))
    assert t != job.schedule.t[0]
    assert torch.allclose(loss, ((empty - text) ** 2).mean(), rtol=1e-4)


def test_no_gradient_goes_through_the_empty_prompt():
    e_c, e_empty = torch.ones(2, requires_grad=True), torch.zeros(2, requires_grad=True)
    sdd_loss(e_c, e_empty).backward()
    assert torch.equal(e_c.grad, torch.ones(2)) and e_empty.grad is None


def test_the_teacher_is_the_average_of_the_students_and_is_what_is_saved(pipeline, tmp_path):
    folder, base = str(tmp_path / "run"), Policy(pipeline).unet.state_dict()
    main(options(pipeline, "--iterations", "2", "--save-every", "1", "--ema", ".9", "--lr", "1e-2",
                 "--output-dir", folder))
    one, two = (torch.load(f"{folder}/checkpoints/epoch_000{n}.pt", weights_only=True)
                for n in (1, 2))
    saved = UNet2DConditionModel.from_pretrained(folder, subfolder="unet").state_dict()
    for name in one["weights"]:
        by_hand = .9 * base[name] + .1 * one["weights"][name]
        assert torch.allclose(one["average"][name], by_hand, atol=1e-6)
        by_hand = .9 * by_hand + .1 * two["weights"][name]
        assert torch.allclose(two["average"][name], by_hand, atol=1e-6)
        assert torch.equal(saved[name], two["average"][name])
