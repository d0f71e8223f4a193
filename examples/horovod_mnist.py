"""A Horovod training script as they are written, for which only the import has to change: see docs/horovod.md.

    horovodrun -np 2 python examples/horovod_mnist.py                                   # with Horovod
    sed 's/horovod.torch/roundel.torch/' examples/horovod_mnist.py > train.py
    roundelrun -np 2 python train.py                                                    # with Roundel

The data is made up: ten shapes of 12x12 pixels, moved about and covered with noise, so that nothing is downloaded.
"""

import argparse
import os

import horovod.torch as hvd
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset
from torch.utils.data.distributed import DistributedSampler


def arguments():
    parser = argparse.ArgumentParser(description="Horovod with PyTorch")
    parser.add_argument("--batch-size", type=int, default=32, help="of each rank")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--base-lr", type=float, default=0.02, help="for one rank")
    parser.add_argument("--momentum", type=float, default=0.9)
    parser.add_argument("--samples", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--fp16-allreduce", action="store_true", help="compress gradients to 16 bits")
    parser.add_argument("--use-adasum", action="store_true", help="combine gradients by Adasum")
    parser.add_argument("--gradient-predivide-factor", type=float, default=1.0, help="divide by it before the sum, not after")
    parser.add_argument("--batches-per-allreduce", type=int, default=1, help="backward passes for one step")
    parser.add_argument("--checkpoint-format", default="checkpoint-{epoch}.pt")
    parser.add_argument("--log-dir", default=".")
    return parser.parse_args()


def make_data(samples, seed):
    """Images (n, 1, 12, 12) and labels (n,), the same on every rank."""
    draws = torch.Generator().manual_seed(seed)
    shapes = (torch.rand(10, 12, 12, generator=torch.Generator().manual_seed(7)) > 0.6).float()
    labels = torch.randint(0, 10, (samples,), generator=draws)
    shifts = torch.randint(-1, 2, (samples, 2), generator=draws)
    images = torch.stack([shapes[c].roll(s.tolist(), (0, 1)) for c, s in zip(labels, shifts, strict=True)])
    return TensorDataset((images + 0.5 * torch.randn(images.shape, generator=draws)).unsqueeze(1), labels)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 12, 3, padding=1)
        self.conv2 = nn.Conv2d(12, 24, 3, padding=1)
        self.fc = nn.Linear(24 * 3 * 3, 10)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        return self.fc(x.flatten(1))


class Metric:
    """A running mean over batches and ranks."""

    def __init__(self, name):
        self.name = name
        self.sum = torch.tensor(0.0)
        self.n = torch.tensor(0.0)

    def update(self, value):
        self.sum += hvd.allreduce(value.detach().cpu(), name=self.name)
        self.n += 1

    @property
    def avg(self):
        return (self.sum / self.n).item()


def train_epoch(epoch, model, optimizer, sampler, loader, args):
    model.train()
    sampler.set_epoch(epoch)  # another order in every epoch
    train_loss = Metric("train_loss")
    for data, target in loader:
        optimizer.zero_grad()
        parts = list(zip(data.split(args.batch_size), target.split(args.batch_size), strict=True))
        for part, labels in parts:  # gradients add up over the passes of one step
            loss = F.cross_entropy(model(part), labels)
            (loss / len(parts)).backward()
        optimizer.step()
        train_loss.update(loss)
    if hvd.rank() == 0:
        print(f"epoch {epoch}: train loss {train_loss.avg:.4f}", flush=True)


def finish_uneven(model, optimizer, dataset, args):
    """A last pass over files that are not equally long: whoever has read its own joins the others' steps with zeros."""
    model.train()
    mine = range(0, 2 * args.batch_size * (hvd.rank() + 1))
    for data, target in DataLoader(Subset(dataset, mine), batch_size=args.batch_size * args.batches_per_allreduce):
        optimizer.zero_grad()
        for part, labels in zip(data.split(args.batch_size), target.split(args.batch_size), strict=True):
            F.cross_entropy(model(part), labels).backward()
        optimizer.step()
    last = hvd.join()
    hvd.broadcast_parameters(model.state_dict(), root_rank=last)  # whoever joined early has missed the last steps
    return last


def validate(model, loader):
    model.eval()
    loss, accuracy = Metric("val_loss"), Metric("val_accuracy")
    with torch.no_grad():
        for data, target in loader:
            output = model(data)
            loss.update(F.cross_entropy(output, target))
            accuracy.update((output.argmax(dim=1) == target).float().mean())
    if hvd.rank() == 0:
        print(f"validation loss {loss.avg:.4f}, accuracy {accuracy.avg:.4f}", flush=True)
    return accuracy.avg


def save_checkpoint(model, optimizer, epoch, args):
    if hvd.rank() == 0:
        path = os.path.join(args.log_dir, args.checkpoint_format.format(epoch=epoch + 1))
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path)


def main():
    args = arguments()
    hvd.init()
    torch.manual_seed(args.seed + hvd.rank())  # ranks begin with different weights, until rank 0's are broadcast
    torch.set_num_threads(1)
    if torch.cuda.is_available():
        torch.cuda.set_device(hvd.local_rank())

    # Go on from the newest checkpoint, which rank 0 alone can see.
    resume_from_epoch = 0
    for epoch in range(args.epochs, 0, -1):
        if os.path.exists(os.path.join(args.log_dir, args.checkpoint_format.format(epoch=epoch))):
            resume_from_epoch = epoch
            break
    resume_from_epoch = hvd.broadcast(torch.tensor(resume_from_epoch), root_rank=0, name="resume_from_epoch").item()

    train_set, test_set = make_data(args.samples, seed=1), make_data(600, seed=2)
    sampler = DistributedSampler(train_set, num_replicas=hvd.size(), rank=hvd.rank())
    loader = DataLoader(train_set, batch_size=args.batch_size * args.batches_per_allreduce, sampler=sampler)
    test_sampler = DistributedSampler(test_set, num_replicas=hvd.size(), rank=hvd.rank(), shuffle=False)
    test_loader = DataLoader(test_set, batch_size=100, sampler=test_sampler)

    model = Net()
    # Adasum needs no scaling of the rate by the number of ranks.
    scale = args.batches_per_allreduce * (1 if args.use_adasum else hvd.size())
    optimizer = torch.optim.SGD(model.parameters(), lr=args.base_lr * scale, momentum=args.momentum)
    compression = hvd.Compression.fp16 if args.fp16_allreduce else hvd.Compression.none
    optimizer = hvd.DistributedOptimizer(
        optimizer,
        named_parameters=model.named_parameters(),
        compression=compression,
        backward_passes_per_step=args.batches_per_allreduce,
        op=hvd.Adasum if args.use_adasum else hvd.Average,
        gradient_predivide_factor=args.gradient_predivide_factor,
    )

    if resume_from_epoch > 0 and hvd.rank() == 0:
        path = os.path.join(args.log_dir, args.checkpoint_format.format(epoch=resume_from_epoch))
        checkpoint = torch.load(path)
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)

    for epoch in range(resume_from_epoch, args.epochs):
        train_epoch(epoch, model, optimizer, sampler, loader, args)
        validate(model, test_loader)
        save_checkpoint(model, optimizer, epoch, args)

    if args.batches_per_allreduce == 1:
        last = finish_uneven(model, optimizer, train_set, args)
        if hvd.rank() == 0:
            print(f"rank {last} read longest", flush=True)
    accuracy = validate(model, test_loader)
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    spread = hvd.allreduce(weights, op=hvd.Max, name="highest") - hvd.allreduce(weights, op=hvd.Min, name="lowest")
    settings = hvd.broadcast_object(vars(args), root_rank=0)
    if hvd.rank() == 0:
        print(f"{hvd.size()} ranks, {settings['epochs']} epochs: accuracy {accuracy:.4f}, ranks differ by {spread.max():g}")
    hvd.shutdown()


if __name__ == "__main__":
    main()
