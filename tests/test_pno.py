"""PNO's penalty where it is known by hand, its judge, and that it searches no more than it must."""
import math

import numpy as np
import pytest
import torch

import rivals.pno
from ddpo import denoise, draw_noise
from model import Policy, plain
from reward import ClipScore
from rivals.pno import judge_of, log_typical, pno, unlikeliness

PROMPTS = ["a peach", "an egg"]


@pytest.fixture
def policy(pipeline):
    return Policy(pipeline)


def whitened(count):
    """A noise as `count` vectors of 4 whose mean is 0 and whose covariance is 1, exactly."""
    z = torch.randn(count, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    z = z - z.mean(0)
    return z @ torch.linalg.inv(torch.linalg.cholesky(z.T @ z / count)).T


def test_a_typical_noise_has_the_least_penalty_and_no_gradient():
    z = whitened(256)[None].requires_grad_()
    found = log_typical(z)
    assert found.item() == pytest.approx(-2 * math.log(2))
    found.sum().backward()
    assert z.grad.abs().max() == 0


def test_a_noise_that_is_twice_as_long_is_penalised_and_shrinks():
    z = (2 * whitened(256)).requires_grad_()
    loss = -log_typical(z[None]).sum()
    # the covariance is 4, so M2 = 3: n (sqrt(1 + 3) - 1 - sqrt(4 / n))^2 / 2, and log 2 of the mean
    assert loss.item() == pytest.approx(256 * (1 - math.sqrt(4 / 256)) ** 2 / 2 + math.log(2))
    loss.backward()
    assert (z.grad * z.detach()).sum() > 0


def test_a_noise_that_lies_beside_the_middle_is_pulled_back():
    z = (whitened(256) + .5).requires_grad_()
    loss = -log_typical(z[None]).sum()
    loss.backward()
    assert loss > 256 / 8 and (z.grad.mean(0) > 0).all()    # n M1^2 / 2K, M1^2 = 4 / 4


def by_hand(flat, orders):
    """The penalty written out, a permutation at a time."""
    def one(flat):
        z = flat.view(-1, 4)
        n = len(z)
        m1 = z.mean(0).norm()
        m2 = torch.linalg.eigvalsh(z.T @ z / n - torch.eye(4)).abs().max()
        first = min(-math.log(2), float(-n * m1 ** 2 / 8))
        second = min(-math.log(2),
                     float(-n * max(math.sqrt(1 + m2) - 1 - math.sqrt(4 / n), 0) ** 2 / 2))
        return first + second
    return -(one(flat) + np.mean([one(flat[order]) for order in orders]))


def test_the_penalty_is_its_formula_over_a_hundred_orders():
    noise = 1.3 * torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(3)) + .2
    generator = torch.Generator().manual_seed(5)
    orders = [torch.randperm(256, generator=generator) for _ in range(100)]
    found = unlikeliness(noise, torch.Generator().manual_seed(5))
    assert found.item() == pytest.approx(by_hand(noise.flatten(), orders), rel=1e-4)


def test_the_judge_is_clip_between_unsafe_and_safe_texts(policy):
    latents = torch.randn(2, *policy.latent_shape(), generator=torch.Generator().manual_seed(0))
    found = judge_of(policy)(latents)
    clip = ClipScore(policy.world.clip)
    pictures = policy.decode(latents).numpy()
    texts = ["a picture of peach", "a picture of egg", "a picture of something harmless"]
    logits = torch.tensor(np.stack([clip(pictures, [text] * 2) for text in texts], 1)
                          ) * clip.model.logit_scale.exp().item()
    unsafe = logits[:, :2].exp().mean(1)
    assert torch.allclose(found, unsafe / (unsafe + logits[:, 2].exp()), atol=.02)   # rounded there


@pytest.fixture
def told(monkeypatch):
    """told([p of the pictures, each time that the judge is asked]): the judge then says that."""
    def tell(answers):
        answers = [torch.tensor(answer) for answer in answers]
        monkeypatch.setattr(rivals.pno, "judge_of",
                            lambda policy: lambda latents: answers.pop(0) + 0 * latents.sum())
        return answers
    return tell


def test_a_safe_picture_is_the_bases_own_at_eta_0(policy, told):
    left = told([[0., 0.]])
    noise = draw_noise([1, 2], 5, policy.latent_shape())
    found = pno(policy, PROMPTS, noise, policy.schedule(5, 1.), 2.)
    base = denoise(plain(policy, PROMPTS, 2.), noise, policy.schedule(5, 0.),
                   policy.prediction_type)
    assert torch.allclose(found, base, atol=1e-5) and not left


def test_fresh_noises_are_tried_and_what_is_safe_stays(policy, told):
    left = told([[0., .9], [0., .2], [1., 1.]])
    noise = draw_noise([1, 2], 5, policy.latent_shape())
    found = pno(policy, PROMPTS, noise, policy.schedule(5, 1.), 2.)
    schedule = policy.schedule(5, 0.)
    for row, tried in ((0, 0), (1, 1)):
        start = torch.stack([noise[row:row + 1, tried]] * 6, 1)
        base = denoise(plain(policy, PROMPTS[row:row + 1], 2.), start, schedule,
                       policy.prediction_type)
        assert torch.allclose(found[row], base[0], atol=1e-5)
    assert len(left) == 1                               # the third noise was not drawn


@pytest.mark.parametrize("shape", ["pipeline", "sd1_pipeline", "sd2_pipeline"])
def test_noise_and_text_are_moved_where_no_noise_is_safe(shape, request, told):
    policy = Policy(request.getfixturevalue(shape))
    # five noises, then three looks at what is moved: the last is found safest
    left = told([[.9, 0.]] + [[.9, 0.]] * 4 + [[.9], [.8], [.1]])
    noise = draw_noise([1, 2], 4, policy.latent_shape())
    found = pno(policy, PROMPTS, noise, policy.schedule(4, 1.), 2., updates=2)
    assert not left and found.isfinite().all()
    first = denoise(plain(policy, PROMPTS, 2.), noise, policy.schedule(4, 0.),
                    policy.prediction_type)
    assert torch.allclose(found[1], first[1], atol=1e-5)
    assert not torch.allclose(found[0], first[0], atol=1e-2)


def test_the_search_lowers_the_judges_opinion(pipeline):
    """By CLIP's own gradient through the autoencoder and all steps, on a random pipeline."""
    policy = Policy(pipeline)
    judge, noise = judge_of(policy), draw_noise([1, 2], 3, policy.latent_shape())
    schedule = policy.schedule(3, 0.)
    text, away = policy.encode(PROMPTS), policy.encode(["", ""])
    first = denoise(plain(policy, PROMPTS, 2.), noise, schedule, policy.prediction_type)
    with torch.no_grad():
        before = judge(first)
    moved = rivals.pno.optimise(policy, judge, noise[:, 0], text, away, schedule, 2., 0, first,
                                torch.full((2,), -9.), 4, .07)
    with torch.no_grad():
        assert (judge(moved) <= before + 1e-6).all()
