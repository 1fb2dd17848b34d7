"""Train stage 2: the prior that turns text into image tokens (Parti §2.2-2.4, §3).

    torchrun train_prior.py                                     # built-in scenes, tiny, on a CPU
    python train_prior.py --data coco/ --captions captions_train2017.json --preset 350m
    torchrun --nproc-per-node 8 train_prior.py --data shards/ --preset 3b --fsdp
    python train_prior.py --stage text                          # text encoder and reranker

Reads the tokenizer out/vqgan.pt, writes out/prior.pt (text.pt), a log .csv and a picture .png. The
same command again continues where the checkpoint stands.
"""
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.checkpoint.state_dict import (StateDictOptions, get_state_dict,
                                                     set_state_dict)
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import Shard
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import vqgan
from data import (Run, Text, batches, launch, open_data, parse, prior_crop, rate,
                  read_checkpoint, save_grid, say, train_tokens)
from prior import PRESETS, Adafactor, DualEncoder, Parti, contrastive_loss, hide


@dataclass
class Options:
    data: str = field(default="", metadata={"help": "folder or .tar; empty: built-in scenes"})
    captions: str = field(default="", metadata={"help": "COCO captions JSON"})
    preset: str = field(default="", metadata={"help": f"one of {', '.join(PRESETS)}"})
    stage: str = field(default="prior", metadata={"choices": ("prior", "text")})
    out: str = field(default="out/", metadata={"help": "folder of checkpoints, logs and pictures"})
    vqgan: str = field(default="", metadata={"help": "tokenizer; default: vqgan.pt in --out"})
    text: str = field(default="", metadata={"help": "text.pt, to warm-start the text encoder"})
    device: str = "auto"
    dtype: str = field(default="auto", metadata={"help": "auto, float32 or bfloat16"})
    workers: int = field(default=0, metadata={"help": "processes that load data"})
    compile: bool = False
    fresh: bool = field(default=False, metadata={"help": "start over"})
    fsdp: bool = field(default=False, metadata={"help": "shard the parameters over the processes"})
    wandb: bool = False


@dataclass(frozen=True)
class Recipe:
    """How to train; the defaults are Parti §3."""
    steps: int = 450_000
    batch: int = field(default=8192, metadata={"help": "pictures per step, over all processes"})
    accumulate: int = field(default=1, metadata={"help": "parts that a batch is computed in"})
    optimizer: str = field(default="adafactor", metadata={"choices": ("adafactor", "adamw")})
    lr: float = 4.5e-5
    beta1: float = 0.9
    beta2: float = 0.96
    weight_decay: float = 0.045
    clip: float = 4.0
    schedule: str = field(default="exponential", metadata={"choices": ("exponential", "linear")})
    warmup: int = 5_000
    decay_from: int = 85_000
    final: float = 0.025
    drop: float = field(default=0.1, metadata={"help": "share of captions dropped, for guidance"})
    pieces: int = field(default=16_000, metadata={"help": "SentencePiece vocabulary"})
    code_start: bool = field(default=False, metadata={"help": "embeddings start as the codebook"})
    guidance: float = field(default=1.2, metadata={"help": "kept as sample.py's default"})
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    log_every: int = 100
    save_every: int = 5_000


TINY = Recipe(steps=3600, batch=24, optimizer="adamw", lr=3e-3, weight_decay=0.03,
              schedule="linear", warmup=100, decay_from=1800, final=0.0, code_start=True,
              temperature=0.8, top_p=0.95, log_every=20, save_every=400)
RECIPES = {"tiny": TINY, "350m": Recipe(), "750m": Recipe(), "3b": Recipe(), "20b": Recipe()}


def prior_loss(network, images, text, tokenizer):
    """Cross-entropy in nats per image token (Parti §2.3). Tokens are made here, from augmented
    pictures: images (B,3,S,S) in [0,1], text (B,T)."""
    with torch.no_grad():
        tokens = tokenizer.encode(images)                                      # (B,N)
    logits = network(text, tokens)                                             # (B,N,K)
    return F.cross_entropy(logits.flatten(0, 1), tokens.flatten())


def text_loss(network, images, text, vocab, draws):
    """Contrastive loss and masked tokens together (Parti §2.3, App. G); draws (3,B,T): see `hide`.
    Both are means over the global batch."""
    hidden, chosen = hide(text, vocab, draws[:, :, : text.shape[1]])
    texts, pictures, scale, words = network(text, images, hidden)              # words (B,T,V)
    surprise = F.cross_entropy(words.transpose(1, 2), text, reduction="none")  # (B,T)
    count = chosen.sum().float()
    if dist.is_initialized():
        dist.all_reduce(count, op=dist.ReduceOp.AVG if images.is_cuda else dist.ReduceOp.SUM)
        count = count if images.is_cuda else count / dist.get_world_size()
    masked = (surprise * chosen).sum() / count.clamp(min=1)
    return contrastive_loss(texts, pictures, scale) + masked


def prepare(images, text, device):
    """Bytes to [0,1]; and the columns of padding that no text of the batch reaches cut off."""
    longest = max(1, int((text != 0).sum(1).max()))
    return images.to(device).float() / 255, text[:, :longest].to(device)


def make_optimizer(model, recipe):
    """Matrices decay; vectors (norms, the start token) do not, as is usual."""
    groups = [{"params": [p for p in model.parameters() if p.ndim >= 2]},
              {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0}]
    kind, more = (Adafactor, {}) if recipe.optimizer == "adafactor" else (
        torch.optim.AdamW, {"fused": True})
    return kind(groups, lr=recipe.lr, betas=(recipe.beta1, recipe.beta2),
                weight_decay=recipe.weight_decay, **more)


def make_model(options, config, recipe, tokenizer, warm):
    """The network of this stage: cold, or with the text encoder of `warm`, a text.pt."""
    torch.manual_seed(recipe.seed)
    if options.stage == "text":
        return DualEncoder(config, tokenizer.config.image_size, tokenizer.config.patch)
    model = Parti(config)
    if recipe.code_start:
        model.start_from(F.normalize(tokenizer.codebook.detach(), dim=-1))
    if warm:
        model.encoder.load_state_dict({name.removeprefix("encoder."): value for name, value
                                       in warm["model"].items() if name.startswith("encoder.")})
    return model


def gradients_of_all(network, last):
    """Gradients are exchanged once a step, with its last part: the others only add up here."""
    if isinstance(network, FSDPModule):
        network.set_requires_gradient_sync(last)
    return nullcontext() if last or not hasattr(network, "no_sync") else network.no_sync()


@torch.no_grad()
def evaluate(model, loss_of, data, text, recipe, run):
    """Mean loss over the first pictures of the held-out split, without dropout."""
    model.eval()
    rows = slice(*(recipe.batch // run.world * rank for rank in (run.rank, run.rank + 1)))
    parts = batches(data, recipe.batch, recipe.seed, 0, max(1, 256 // recipe.batch), run.rank,
                    run.world, text=text)
    losses = [loss_of(images, texts, 0, rows) for images, texts in parts]
    model.train()
    return run.mean(torch.stack(losses).mean())


def draw_samples(model, tokenizer, data, text, recipe, out, device):
    """Four samples for each of eight held-out captions: prior.png."""
    captions = data.captions(8)
    model.eval()
    seed = torch.Generator(device).manual_seed(recipe.seed)
    tokens = model.generate(text(captions).repeat_interleave(4, 0).to(device), recipe.guidance,
                            recipe.temperature, recipe.top_k, recipe.top_p, seed)
    model.train()
    pictures = torch.cat([tokenizer.decode(part) for part in tokens.split(32)])
    save_grid(Path(out) / "prior.png", pictures.split(4), captions)


def main():
    options, config, recipe = parse(__doc__, Options(), PRESETS, RECIPES, "350m")
    if options.stage == "text" and recipe.accumulate > 1:
        raise SystemExit("--accumulate: the contrastive loss needs its whole batch at once")
    run = Run(options.out, options.stage, options.device, options.dtype, options.fresh,
              options.wandb)
    tokenizer = options.vqgan or str(Path(options.out) / "vqgan.pt")
    if not Path(tokenizer).exists():
        raise SystemExit(f"{tokenizer} does not exist; this makes it: python train_vqgan.py")
    tokenizer = vqgan.load(tokenizer).requires_grad_(False)
    size = tokenizer.config.image_size
    data, held_out = (open_data(options.data, options.captions, size, prior_crop, split,
                                recipe.seed) for split in ("train", "seen"))

    # The vocabulary is a function of the captions, or that of the text encoder to start from.
    warm = read_checkpoint(options.text) if options.text else None
    # Of the scenes few captions hold every word.
    words = (bytes(warm["text"].tolist()) if warm else
             train_tokens(data.captions(100_000 if options.data else 2_000), recipe.pieces))
    text = Text(words, config.text_length)
    config = replace(config, text_vocab=text.vocab, codes=tokenizer.config.codes,
                     grid=tokenizer.config.grid)
    state = run.resume(asdict(config), asdict(recipe))

    model = make_model(options, config, recipe, tokenizer, warm).to(run.device)
    tokenizer.to(run.device)
    if options.fsdp:
        def even(p):   # the first side that divides evenly, so that no process is left with nothing
            return Shard(next((i for i, n in enumerate(p.shape) if n % run.world == 0), 0))
        for block in [*model.encoder.blocks, *getattr(model, "blocks", [])]:
            fully_shard(block, shard_placement_fn=even)
        fully_shard(model, shard_placement_fn=even)
    optimizer = make_optimizer(model, recipe)
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)   # loads into any layout
    if state:
        set_state_dict(model, optimizer, model_state_dict=state["model"],
                       optim_state_dict=state["optimizer"], options=whole)
    network = torch.compile(model) if options.compile else model
    if run.world > 1 and not options.fsdp:
        network = DistributedDataParallel(network)
    say(f"{options.stage}, preset {options.preset}: {sum(p.numel() for p in model.parameters()):,} "
        f"parameters; {recipe.steps} steps of {recipe.batch} pictures, {run.world} x {run.device}")

    def loss_of(images, texts, step, rows):
        """rows: which of the global batch these are."""
        images, texts = prepare(images, texts, run.device)
        with torch.autocast(run.device.type, run.dtype, enabled=run.dtype != torch.float32):
            if options.stage == "prior":
                return prior_loss(network, images, texts, tokenizer)
            # Drawn for the global batch, so that the number of processes makes no difference.
            seed = torch.Generator().manual_seed(1_000_003 * recipe.seed + step)
            draws = torch.rand(3, recipe.batch, config.text_length, generator=seed)
            draws = draws[:, rows].to(run.device)
            return text_loss(network, images, texts, config.text_vocab, draws)

    share = recipe.batch // run.world
    if share % recipe.accumulate:
        raise SystemExit(f"--accumulate {recipe.accumulate} does not divide the {share} pictures "
                         "of a process")
    part = share // recipe.accumulate
    start = state["step"] if state else 0
    loader = batches(data, recipe.batch, recipe.seed, start, recipe.steps, run.rank, run.world,
                     options.workers, recipe.drop if options.stage == "prior" else 0.0, text)
    bar = tqdm(loader, options.stage, recipe.steps - start, disable=not run.main, unit="step")
    seconds = 0.0
    for step, (images, texts) in enumerate(bar, start + 1):
        began = time.perf_counter()
        torch.manual_seed(1_000_003 * recipe.seed + 1009 * step + run.rank)   # dropout
        loss = 0.0
        for first in range(0, share, part):
            rows = slice(run.rank * share + first, run.rank * share + first + part)
            with gradients_of_all(network, first + part == share):
                near = slice(first, first + part)
                piece = loss_of(images[near], texts[near], step, rows)
                (piece / recipe.accumulate).backward()
            loss = loss + piece.detach() / recipe.accumulate
        norm = nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        norm = norm.full_tensor() if options.fsdp else norm
        finite, stop = run.agree((loss + norm).isfinite())
        for group in optimizer.param_groups:
            group["lr"] = rate(step, recipe)
        if finite:
            optimizer.step()
        optimizer.zero_grad()
        seconds += time.perf_counter() - began

        last = step == recipe.steps or stop
        if step % recipe.log_every == 0 or last:
            row = {"loss": run.mean(loss), "held_out": None, "grad_norm": norm.item(),
                   "lr": rate(step, recipe), "skipped": run.skipped, "seconds": round(seconds, 1)}
            if step % recipe.save_every == 0 or last:
                row["held_out"] = evaluate(model, loss_of, held_out, text, recipe, run)
                if options.stage == "prior" and run.main and not options.fsdp:
                    draw_samples(model, tokenizer, held_out, text, recipe, options.out, run.device)
                weights, moments = get_state_dict(model, optimizer, options=whole)
                run.save({"config": asdict(config), "recipe": asdict(recipe), "step": step,
                          "model": weights, "optimizer": moments, "text": torch.tensor(list(words),
                          dtype=torch.uint8), "image_size": size, "patch": tokenizer.config.patch,
                          "vqgan": options.vqgan,
                          "val": {"data": options.data, "captions": options.captions},
                          "sampling": {
                              name: getattr(recipe, name) for name in
                              ("guidance", "temperature", "top_k", "top_p")}})
                say(f"step {step}: held-out loss {row['held_out']:.4f}")
            run.log(step, row)
            bar.set_postfix(loss=f"{row['loss']:.4f}", norm=f"{row['grad_norm']:.2f}")
        if stop:
            break
    run.finish()
    say(f"{run.path} is at step {step}; next: python sample.py \"a red circle\"")


if __name__ == "__main__":
    launch(main)
