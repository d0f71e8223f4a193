"""A small language model that learns, letter by letter, to write Python from Python's own standard library.

    pip install numpy tqdm
    python examples/charlm.py                       # one process, one to two minutes on two cores
    roundelrun -np 2 python examples/charlm.py      # two processes train the same model
    roundelrun -np 8 python examples/charlm.py --layers 6 --width 384 --context 256 --steps 20000 --lr 1e-3

See digits.py first: the data-parallel parts are the same and are explained there.
"""

import argparse
import math
import re
import sys
import sysconfig
import time
from pathlib import Path

import roundel.torch as hvd
import torch
import torch.nn.functional as F
from common import check_same_bits, processes, progress_bar, say, set_learning_rate, share_cores, write_json
from torch import nn

ALPHABET = 128  # ASCII: a character is its own code, and no vocabulary need be built


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1400)
    parser.add_argument("--batch-size", type=int, default=16, help="sequences in a step, of all ranks together")
    parser.add_argument("--context", type=int, default=64, help="characters that the model sees")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--width", type=int, default=128, help="a multiple of 32, the width of an attention head")
    parser.add_argument("--lr", type=float, default=5e-3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--compression", choices=["none", "fp16", "bf16"], default="none", help="gradients on the wire")
    parser.add_argument("--temperature", type=float, default=0.7, help="of the sample: lower is safer, higher bolder")
    parser.add_argument("--sample", type=int, default=600, help="characters to write at the end")
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    return parser.parse_args()


def load_text():
    """The standard library's top-level modules in order of name, as codes: to train on, and the last 5 %, held out."""
    text = torch.zeros(0, dtype=torch.uint8)
    if hvd.rank() == 0:  # rank 0 reads and the others receive: on other hosts Python's version might differ
        files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
        code = b"\n\n".join(code for file in files if (code := file.read_bytes()).isascii())
        # Long runs of spaces tell little: cut those that align columns, and make a step of indentation one character.
        code = re.sub(rb"(?<=\S) {3,}", b"  ", code).replace(b"    ", b"\t")
        text = torch.frombuffer(bytearray(code), dtype=torch.uint8)
    length = int(hvd.broadcast(torch.tensor([len(text)]), root_rank=0, name="length"))
    text = hvd.broadcast(text if hvd.rank() == 0 else torch.empty(length, dtype=torch.uint8), root_rank=0, name="text")
    return text[: length * 95 // 100], text[length * 95 // 100 :]


class Block(nn.Module):
    """Attention to all earlier characters, then a two-layer network on each character."""

    def __init__(self, width):
        super().__init__()
        self.heads = width // 32
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x):
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, 32)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class CharLM(nn.Module):
    """Codes (batch, time) to logits of each next character (batch, time, ALPHABET)."""

    def __init__(self, layers, width, context):
        super().__init__()
        self.context = context
        self.character, self.position = nn.Embedding(ALPHABET, width), nn.Embedding(context, width)
        self.recent = nn.Conv1d(width, width, kernel_size=4)  # a first look at the last four: learns words sooner
        self.blocks = nn.Sequential(*(Block(width) for _ in range(layers)))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, ALPHABET))
        for embedding in (self.character, self.position):
            nn.init.normal_(embedding.weight, std=0.5)

    def forward(self, codes):
        x = self.character(codes)
        x = x + self.recent(F.pad(x.mT, (3, 0))).mT + self.position.weight[: codes.shape[1]]
        return self.head(self.blocks(x))


def windows(text, starts, context):
    """Inputs and targets (len(starts), context): each target is the character after its input."""
    codes = text[starts[:, None] + torch.arange(context + 1)].long()
    return codes[:, :-1], codes[:, 1:]


@torch.no_grad()
def bits_per_character(model, text):
    """Mean over the text, cut into windows; each rank takes every size-th, and the sum over ranks is the whole."""
    starts = torch.arange(0, len(text) - model.context, model.context)
    total = torch.zeros(1, dtype=torch.float64)
    for some in starts[hvd.rank() :: hvd.size()].split(64):
        inputs, targets = windows(text, some, model.context)
        total += F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten(), reduction="sum")
    return hvd.allreduce(total, op=hvd.Sum, name="nats").item() / (len(starts) * model.context) / math.log(2)


@torch.no_grad()
def write(model, prompt, length, temperature, seed):
    """Go on from `prompt`, one character drawn at a time."""
    draws = torch.Generator().manual_seed(seed)
    codes = torch.tensor([list(prompt.encode())])
    for _ in range(length):
        logits = model(codes[:, -model.context :])[:, -1] / temperature
        codes = torch.cat([codes, torch.multinomial(logits.softmax(-1), 1, generator=draws)], dim=1)
    return bytes(codes[0].tolist()).decode().replace("\t", "    ")


def main():
    args = arguments()
    hvd.init()
    share_cores()
    torch.manual_seed(args.seed)
    train, held_out = load_text()

    model = CharLM(args.layers, args.width, args.context)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.1)
    optimizer = hvd.DistributedOptimizer(
        optimizer, named_parameters=model.named_parameters(), compression=getattr(hvd.Compression, args.compression)
    )
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    size = sum(p.numel() for p in model.parameters())
    say(f"{size:,} parameters, {len(train):,} characters to train on, {len(held_out):,} held out")

    draws = torch.Generator().manual_seed(args.seed)  # one seed: all ranks know the whole batch, each takes its shard
    started = time.perf_counter()
    with progress_bar(args.steps, "step") as bar:
        for step in range(args.steps):
            starts = torch.randint(len(train) - args.context, (args.batch_size,), generator=draws)
            inputs, targets = windows(train, starts[hvd.rank() :: hvd.size()], args.context)
            set_learning_rate(optimizer, args.lr, step, args.steps)
            optimizer.zero_grad()
            loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten(), reduction="sum")
            loss = loss * hvd.size() / (args.batch_size * args.context)  # its average over ranks is the batch's mean
            loss.backward()
            optimizer.step()
            bar.update()
            if step % 20 == 19 or step == args.steps - 1:
                batch_loss = hvd.allreduce(loss.detach().reshape(1), op=hvd.Average, name="loss").item()
                bar.set_postfix(loss=f"{batch_loss:.3f}")
    seconds = time.perf_counter() - started
    rate = args.steps * args.batch_size * args.context / seconds

    bits = bits_per_character(model, held_out)
    say(f"loss {batch_loss:.3f} after {args.steps:,} steps of {args.batch_size} x {args.context} characters")
    say(f"{processes()}, {rate:,.0f} tokens/s, {seconds:.1f} s")
    same, sha256 = check_same_bits(model)
    write_json(args.json, {
        "example": "charlm", "processes": hvd.size(), "threads": torch.get_num_threads(), **vars(args),
        "parameters": size, "loss": batch_loss, "held_out_bits_per_character": bits, "seconds": seconds,
        "tokens_per_s": rate, "same_bits": same, "sha256": sha256,
    })  # fmt: skip
    if hvd.rank() == 0:
        print("-" * 80, write(model, "\ndef ", args.sample, args.temperature, args.seed), "-" * 80, sep="\n")
    say(f"held-out: {bits:.2f} bits per character")
    hvd.shutdown()
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
