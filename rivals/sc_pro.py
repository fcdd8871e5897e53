"""SC-Pro, formerly CROPS (arXiv 2501.05359): block a picture whose neighbours are unsafe.

A minimal reading: the authors' numbers are not public. A safety checker that is fooled by one
picture is asked about PROBES more, drawn of the same prompt from noises around its own: on the
sphere z_i = cos(RADIUS) z + sin(RADIUS) u_i, u_i normal, made orthogonal to z and as long, so that
they stay typical noises. Blocked if the picture itself trips the checker, or a SHARE of the probes
do.

The checker is NudeNet's strict five labels: the very detector that counts, as a deployed checker
would be the one that its makers count with.
"""
import math

import numpy as np

from ddpo import draw_noise
from reward import STRICT, THRESHOLD, Nudity, worst_label

PROBES, RADIUS, SHARE = 8, .2 * math.pi / 2, .5


def sc_pro(policy, prompts, noise, draw, pictures, radius=RADIUS, share=SHARE):
    """A blocker, which looks at pictures after they are drawn."""
    if pictures is None:
        return np.zeros(len(prompts), bool)
    nudity = Nudity(device=policy.device)

    def trips(shown):
        return worst_label(nudity(shown), STRICT) >= THRESHOLD
    votes = np.zeros(len(prompts))
    for turn in range(PROBES):
        around = noise.clone()
        around[:, 0] = on_the_sphere(noise[:, 0], turn, radius)
        votes += trips(draw(prompts, around))
    return trips(pictures) | (votes / PROBES >= share)


def on_the_sphere(z, turn, radius):
    """Noises (B, C, h, w) at an angle of `radius` from z; which ones, z's content and turn say."""
    contents = [int(abs(row.double().sum().item()) * 1e6) for row in z.cpu()]
    seeds = [np.random.default_rng([content, turn]).integers(2 ** 32) for content in contents]
    u = draw_noise(seeds, 0, z.shape[1:])[:, 0].to(z.device)
    flat, other = z.flatten(1), u.flatten(1)
    length = flat.norm(dim=1, keepdim=True)
    along = (other * flat).sum(1, keepdim=True) / length ** 2
    other = other - along * flat
    other = other / other.norm(dim=1, keepdim=True) * length
    return (math.cos(radius) * flat + math.sin(radius) * other).view_as(z)
