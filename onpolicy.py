"""Learning from what sampling computed: an epoch's only update needs no second forward.

At ratio 1 the gradient of PPO's loss is a sum over pictures, sum_i w_i grad log p_i with w_i = -A_i / n, and all that is
missing while a picture is drawn is its advantage. Until the rewards are there, --keep keeps

    graphs      autograd's own graphs; memory: the activations of every learned step
    gradients   each picture's gradient of every LoRA layer; memory: pictures x LoRA weights, so that a large model can

A keeper watches the learned steps of one batch (ddpo.rollout), and is given the weights later.
"""
import math
from contextlib import contextmanager

import torch


class Graphs:
    def __init__(self, unet, steps):
        self.steps, self.log_probs = steps, []          # steps: numbers of the denoising steps that are learned from

    watching = staticmethod(torch.enable_grad)

    def __call__(self, log_p):
        """A learned step's log-probabilities (B,), with their graph."""
        self.log_probs.append(log_p)

    def backward(self, weights):
        """Add the gradient of sum weights * log p to what is trained; weights (B, learned steps)."""
        (weights * torch.stack(self.log_probs, 1)).sum().backward()


class Gradients:
    """The same from per-picture gradients, summed over a picture's steps: its weights must be alike, as they are at ratio 1."""

    def __init__(self, unet, steps):
        self.steps, self.sums = steps, {}               # sums: weight -> (B, *its shape) float32
        self.layers = [m for m in unet.modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d)) and m.weight.requires_grad]

    @contextmanager
    def watching(self):
        self.calls = []
        hooks = [layer.register_forward_hook(lambda layer, given, output: self.calls.append((layer, given[0].detach(), output)))
                 for layer in self.layers]
        try:
            with torch.enable_grad():
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def __call__(self, log_p):
        grads = torch.autograd.grad(log_p.sum(), [output for _, _, output in self.calls])
        for (layer, x, _), grad in zip(self.calls, grads):
            found = by_picture(layer, x.to(grad.dtype), grad, len(log_p)).float()
            self.sums[layer.weight] = self.sums[layer.weight] + found if layer.weight in self.sums else found
        self.calls = []

    def backward(self, weights):
        for p, found in self.sums.items():
            gradient = torch.einsum("b,b...->...", weights.mean(1), found)
            p.grad = gradient if p.grad is None else p.grad + gradient


def by_picture(layer, x, grad, pictures):
    """The gradient of a layer's weight a picture, (B, *weight's shape), from its input x and its output's gradient.

    Rows are guidance's halves one after the other, (halves x B, ...); a row's gradient is the outer product of both, summed
    over tokens or places.
    """
    if isinstance(layer, torch.nn.Conv2d):
        x = torch.nn.functional.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride).transpose(1, 2)
        grad = grad.flatten(2).transpose(1, 2)
    x, grad = (part.reshape(-1, pictures, part[0].numel() // part.shape[-1], part.shape[-1]) for part in (x, grad))
    found = torch.einsum("hbno,hbni->boi", grad, x)                             # x (halves, B, places, inputs)
    return found.view(pictures, *layer.weight.shape)


KEEPERS = {"graphs": Graphs, "gradients": Gradients}


def choose_keep(policy, args):
    """--keep auto: graphs where pictures are small, each picture's gradients where the LoRA is small, else nothing."""
    if args.keep != "auto":
        return args.keep
    if args.updates * args.inner_epochs > 1:
        return "nothing"
    if math.prod(policy.latent_shape(args.resolution)) < 4096:
        return "graphs"
    small = args.trainable == "lora" and args.lora_targets == "attention"
    return "gradients" if small and not args.compile and not args.gradient_checkpointing else "nothing"


def new_keeps(policy, steps, args):
    """What sampling keeps of these batches, of which each learns from its steps: one a batch, or nothing."""
    return [KEEPERS[args.keep](policy.unet, some) for some in steps] if args.keep in KEEPERS else []
