"""What several guides share: how far the pictures have come, in the papers' 50 steps."""
STEPS = 50                              # the papers' warm-ups and switches count steps of 50


def steps_done(policy, t):
    """How many of 50 steps lie behind timestep t, one number or (B,): (1 or B, 1, 1, 1)."""
    times = policy.scheduler.timesteps.to(t.device)                             # (T,)
    done = (times > t.view(-1, 1)).sum(1)                                       # of T steps
    return (done * STEPS / len(times)).view(-1, 1, 1, 1)
