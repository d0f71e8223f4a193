"""What the examples share: threads, printing, a progress bar, a learning-rate curve, and the check of equal bits.

Nothing here is needed to use Roundel; the training loops in digits.py and charlm.py are the part to read.
"""

import hashlib
import json
import math
import os
import sys

import roundel.torch as hvd
import torch
from tqdm import tqdm


def share_cores(at_most=None):
    """Divide this host's cores among its ranks, `at_most` so many for each, unless OMP_NUM_THREADS says otherwise."""
    # Every rank must make this call, so it comes before the look at the environment, which can differ between ranks.
    ranks_here = int(hvd.allreduce(torch.tensor([hvd.local_rank() + 1]), op=hvd.Max, name="ranks_here"))
    if "OMP_NUM_THREADS" not in os.environ:
        mine = max(1, torch.get_num_threads() // ranks_here)
        torch.set_num_threads(min(mine, at_most or mine))


def say(text, file=None):
    """Print on rank 0 only."""
    if hvd.rank() == 0:
        print(text, file=file, flush=True)


def processes():
    return "1 process" if hvd.size() == 1 else f"{hvd.size()} processes"


def progress_bar(total, unit):
    """A bar on rank 0's terminal; nothing on other ranks, nor in a file or a pipe (disable=None asks isatty)."""
    return tqdm(total=total, unit=unit, disable=None if hvd.rank() == 0 else True, leave=False, dynamic_ncols=True)


def set_learning_rate(optimizer, peak, step, steps):
    """A linear rise over the first tenth of the run, then half a cosine down to zero."""
    warmup = max(1, steps // 10)
    rate = (step + 1) / warmup if step < warmup else 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / (steps - warmup))
    for group in optimizer.param_groups:
        group["lr"] = peak * rate


def check_same_bits(model):
    """Compare all parameters and buffers between ranks, bit for bit. Returns (same, hash of this rank's bits).

    Ranks that began alike and applied the same averaged gradients are equal exactly, not just nearly. If they ever
    differ, something was not averaged, or not alike, and the ranks drift apart without any other sign.
    """
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    mine = torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8)
    everyones = hvd.allgather(mine.reshape(1, -1), name="model_bits")  # (ranks, 32): a row from every rank
    other = [rank for rank in range(hvd.size()) if not torch.equal(everyones[rank], everyones[0])]
    sha = digest.hexdigest()[:16]
    if other:
        say(f"the model's bits on rank(s) {', '.join(map(str, other))} differ from those on rank 0", file=sys.stderr)
    elif hvd.size() > 1:
        say(f"all {hvd.size()} ranks hold the same bits (sha256 {sha}...)")
    else:
        say(f"one rank, nothing to compare (sha256 {sha}...)")
    return not other, digest.hexdigest()


def write_json(path, figures):
    """Rank 0 writes the figures to a file, if one was asked for."""
    if path and hvd.rank() == 0:
        with open(path, "w") as file:
            json.dump(figures, file, indent=2)
            file.write("\n")
