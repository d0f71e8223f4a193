"""Handwritten digits, trained data-parallel. Takes some seconds; any number of processes trains the same model.

    pip install scikit-learn tqdm
    python examples/digits.py                       # one process
    roundelrun -np 2 python examples/digits.py      # two

The data is scikit-learn's load_digits: 1797 images of 8x8 pixels, a quarter of them held out and never trained on.
The numbered comments mark all that data-parallel training adds to an ordinary PyTorch script.
"""

import argparse
import sys
import time

import roundel.optim
import roundel.torch as hvd
import torch
import torch.nn.functional as F
from common import check_same_bits, processes, progress_bar, say, set_learning_rate, share_cores, write_json
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=64, help="of all ranks together")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--compression", choices=["none", "fp16", "bf16"], default="none", help="gradients on the wire")
    parser.add_argument("--precision", choices=PRECISIONS, default="float32", help="of the model and its gradients")
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    return parser.parse_args()


def load_data():
    """Images (n, 1, 8, 8) in 0..1 and labels (n,), to train on and held out: the same split in every run."""
    images, labels = load_digits(return_X_y=True)
    split = train_test_split(images, labels, test_size=0.25, stratify=labels, random_state=0)
    train_x, test_x, train_y, test_y = map(torch.from_numpy, split)
    return (*(x.float().reshape(-1, 1, 8, 8) / 16 for x in (train_x, test_x)), train_y, test_y)


def make_model():
    # GroupNorm, not BatchNorm: batch statistics would come from each rank's own shard, so its buffers would differ.
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.GroupNorm(4, 32), nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1), nn.GroupNorm(8, 64), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(64, 64, 3, padding=1), nn.GroupNorm(8, 64), nn.ReLU(),
        nn.Flatten(), nn.Linear(64 * 4 * 4, 10),
    )  # fmt: skip


def shifted(images, shifts):
    """Move every image by its own (down, right) in -1..1, filling with black: more digits than were written."""
    rows = (torch.arange(1, 9) - shifts[:, :1])[:, :, None]
    columns = (torch.arange(1, 9) - shifts[:, 1:])[:, None, :]
    which = torch.arange(len(images))[:, None, None]
    return F.pad(images, (1, 1, 1, 1))[which, 0, rows, columns].unsqueeze(1)


def accuracy(model, images, labels):
    """Each rank judges every size-th image; the sum over ranks is the whole."""
    model.eval()
    with torch.no_grad():
        images = images.to(next(model.parameters()).dtype)
        guesses = model(images[hvd.rank() :: hvd.size()]).argmax(dim=1)
    right = (guesses == labels[hvd.rank() :: hvd.size()]).sum()
    return hvd.allreduce(right.reshape(1), op=hvd.Sum, name="right").item() / len(labels)


def main():
    args = arguments()
    hvd.init()  # 1. find the other processes
    share_cores(at_most=1)  # for 8x8 images a second thread is idle, or in the way of others on a busy machine
    torch.manual_seed(args.seed)
    train_x, test_x, train_y, test_y = load_data()

    dtype = PRECISIONS[args.precision]
    model = make_model().to(dtype)
    # With 16-bit parameters the optimizer updates float32 copies, of which the model has the rounded ones. torch.optim.AdamW
    # works as well, in float32.
    optimizer = roundel.optim.AdamW(model.parameters(), weight_decay=0.01, master_weights=True)
    scaler = roundel.optim.LossScaler(enabled=dtype == torch.float16)  # float16 gradients would be too small without it
    optimizer = hvd.DistributedOptimizer(  # 2. step() now applies gradients averaged over ranks
        optimizer, named_parameters=model.named_parameters(), compression=getattr(hvd.Compression, args.compression)
    )
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)  # 3. all ranks begin with rank 0's weights ...
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)  # ... and optimizer state

    # The draws below come from one seed on all ranks: everyone knows the whole batch, and takes its own shard of it.
    draws = torch.Generator().manual_seed(args.seed)
    steps_per_epoch = len(train_x) // args.batch_size  # the same number on all ranks, or one would wait for ever
    steps = args.epochs * steps_per_epoch
    step = 0
    started = time.perf_counter()
    with progress_bar(steps, "step") as bar:
        for epoch in range(args.epochs):
            model.train()
            order = torch.randperm(len(train_x), generator=draws)
            epoch_loss = 0.0
            for batch in order[: steps_per_epoch * args.batch_size].split(args.batch_size):
                shifts = torch.randint(-1, 2, (len(batch), 2), generator=draws)
                shard = slice(hvd.rank(), None, hvd.size())  # 4. every size-th image of the batch is this rank's
                set_learning_rate(optimizer, args.lr, step, steps)
                optimizer.zero_grad()
                logits = model(shifted(train_x[batch[shard]], shifts[shard]).to(dtype)).float()
                # 5. Scaled so that the average over ranks is the mean over the whole batch, however evenly it divides.
                loss = F.cross_entropy(logits, train_y[batch[shard]], reduction="sum") * hvd.size() / len(batch)
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
                epoch_loss += loss.detach() / steps_per_epoch
                step += 1
                bar.update()
            epoch_loss = hvd.allreduce(epoch_loss.reshape(1), op=hvd.Average, name="loss").item()
            bar.set_postfix(epoch=epoch + 1, loss=f"{epoch_loss:.4f}")
    seconds = time.perf_counter() - started
    rate = steps * args.batch_size / seconds

    held_out = accuracy(model, test_x, test_y)
    say(f"loss {epoch_loss:.4f} after {args.epochs} epochs ({steps:,} steps of {args.batch_size} images)")
    say(f"{processes()}, {rate:,.0f} samples/s, {seconds:.1f} s")
    same, sha256 = check_same_bits(model)
    write_json(args.json, {
        "example": "digits", "processes": hvd.size(), "threads": torch.get_num_threads(), **vars(args), "steps": steps,
        "loss": epoch_loss, "held_out_accuracy": held_out, "seconds": seconds, "samples_per_s": rate,
        "same_bits": same, "sha256": sha256,
    })  # fmt: skip
    say(f"held-out accuracy: {100 * held_out:.1f} %")
    hvd.shutdown()
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
