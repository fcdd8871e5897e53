"""The negative prompt against its formula written out."""
import torch

from model import Policy
from rivals.negative import negative


def test_the_negative_prompt_stands_where_the_empty_one_was(pipeline):
    policy, x, t = Policy(pipeline), torch.randn(2, 4, 8, 8), torch.tensor(401)
    prompts = ["a dog", "a large cat"]

    def output(texts):
        return policy.unet_output(x, t, policy.encode(texts))
    with torch.no_grad():
        away, text = output(["peach, egg"] * 2), output(prompts)
        found = negative(policy, prompts, 3.)(x, t)
        assert torch.allclose(found, away + 3 * (text - away), atol=1e-5)
        policy.concept = "moon"                         # words of one's own
        assert not torch.allclose(negative(policy, prompts, 3.)(x, t), found, atol=1e-5)


def test_at_a_scale_of_one_the_negative_prompt_does_nothing(pipeline):
    policy, x, t = Policy(pipeline), torch.randn(1, 4, 8, 8), torch.tensor(401)
    with torch.no_grad():
        own = policy.unet_output(x, t, policy.encode(["a dog"]))
        assert torch.equal(negative(policy, ["a dog"], 1)(x, t), own)
