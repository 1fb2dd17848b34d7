"""Train stage 2: the prior that turns text into image tokens (Parti §2.2-2.4, §3).

    torchrun train_prior.py                                     # built-in scenes, tiny, on a CPU
    python train_prior.py --data coco/ --captions coco/annotations/captions_train2017.json
    torchrun --nproc-per-node 8 train_prior.py --data shards/ --preset 3b --fsdp

--stage prior  the encoder-decoder transformer                                -> out/prior.pt
--stage text   text encoder and reranker: masked tokens and contrast          -> out/text.pt

Reads the tokenizer out/vqgan.pt, and writes a log (.csv) and samples (.png), too. The same command
again continues. --init out/text.pt starts the prior's text encoder there.
"""
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard
from tqdm import tqdm

import data
import vqgan
from prior import PRESETS, Adafactor, Block, DualEncoder, Parti, PriorConfig
from prior import contrastive_loss, hide, restore


@dataclass(frozen=True, kw_only=True)
class Options(data.Options):
    """Beside those that all training has."""
    stage: str = "prior"            # or text
    captions: str = ""              # COCO captions JSON
    vqgan: str = ""                 # tokenizer; empty: vqgan.pt in --out
    fsdp: bool = False              # shard the parameters over the processes


@dataclass(frozen=True, kw_only=True)
class Recipe(data.Recipe):
    """How to train, beside what both stages share."""
    optimizer: str = "adafactor"    # or adamw
    drop: float = 0.1               # share of captions dropped, for guidance
    corrupt: float = 0.0            # share of image tokens replaced, see prior_loss
    pieces: int = 16_000            # SentencePiece vocabulary


PAPER = Recipe(steps=450_000, batch=8192, lr=4.5e-5, warmup=5_000, schedule="exponential",
               decay_from=85_000, final=0.025, weight_decay=0.045, clip=4.0,
               save_every=100)    # Parti §3
TINY = Recipe(steps=3200, batch=24, micro=24, optimizer="adamw", lr=3e-3, weight_decay=0.03,
              clip=4.0, warmup=100, schedule="linear", decay_from=1800, final=0.0, save_every=400)
MINI = replace(TINY, steps=7000, batch=8, micro=8, decay_from=1750, corrupt=0.5, save_every=1000)
PRIOR = {"tiny": TINY, "mini": MINI, "350m": PAPER, "750m": PAPER,
         "3b": replace(PAPER, micro=4), "20b": replace(PAPER, micro=1)}
# The contrast is among the pairs that all processes hold at a time: a batch of its own.
SMALL = replace(TINY, steps=600, batch=64, micro=64, lr=1e-3, decay_from=300, drop=0.0)
LARGE = replace(PAPER, batch=1024, micro=32, drop=0.0)
TEXT = dict.fromkeys(PRIOR, LARGE) | {"tiny": SMALL, "mini": SMALL}
RECIPES = {"prior": PRIOR, "text": TEXT}
# How sample.py draws if it is not told otherwise (Parti §2.4, Table 5).
SAMPLING = {"guidance": 1.2, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
SHARPER = SAMPLING | {"temperature": 0.8, "top_p": 0.95}    # for the small presets


def prior_loss(network, images, text, tokenizer, corrupt=0.0):
    """Cross-entropy in nats per image token (Parti §2.3). Tokens are made here, from augmented
    pictures: images (B,3,S,S) in [0,1], text (B,T).

    corrupt: the share of the tokens shown to the decoder that are random (our addition). In a small
    set the first tokens tell which picture it is; where they cannot be trusted, the text must."""
    with torch.no_grad():
        tokens = tokenizer.encode(images)                                      # (B,N)
    other = torch.randint_like(tokens, tokenizer.config.codes)
    wrong = torch.rand(tokens.shape, device=tokens.device) < corrupt
    logits = network(text, torch.where(wrong, other, tokens))                  # (B,N,K)
    return F.cross_entropy(logits.flatten(0, 1), tokens.flatten())


def text_loss(network, images, text, vocab):
    """Contrastive loss and masked tokens together (Parti §2.3, App. G), both means over what all
    processes hold at a time. vocab: V, the number of text tokens."""
    hidden, chosen = hide(text, vocab, torch.rand(3, *text.shape, device=text.device))
    texts, pictures, scale, words = network(text, images, hidden)              # words (B,T,V)
    surprise = F.cross_entropy(words.transpose(1, 2), text, reduction="none")  # (B,T)
    count = data.average(chosen.sum().float())
    masked = (surprise * chosen).sum() / count.clamp(min=1)
    return contrastive_loss(texts, pictures, scale) + masked


def make_optimizer(model, recipe):
    """Adafactor or AdamW with the papers' moments (Parti §3). Matrices decay; vectors (norms, the
    start token) do not, as is usual."""
    groups = [{"params": [p for p in model.parameters() if p.ndim >= 2]},
              {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0}]
    how = {"lr": recipe.lr, "betas": (0.9, 0.96), "weight_decay": recipe.weight_decay}
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(groups, fused=True, **how)
    if recipe.optimizer == "adafactor":
        return Adafactor(groups, **how)
    raise ValueError(f"--optimizer {recipe.optimizer}: expected adamw or adafactor")


def shard(model, world):
    """FSDP2: every process keeps its share of each parameter, gradient and moment."""
    def even(p):    # the side that divides evenly: Adafactor fails where a process has nothing
        return Shard(min(range(p.ndim), key=lambda side: p.shape[side] % world))

    for part in reversed([*model.modules()]):    # the whole last
        if isinstance(part, (Block, type(model))):
            fully_shard(part, shard_placement_fn=even)


def main():
    options, config, recipe = data.parse(__doc__, Options(), PRESETS, RECIPES, "350m",
                                         derived=("text_vocab", "codes", "grid"))
    rank, world, device, autocast = data.begin(options, config.width)
    path = Path(options.out, options.stage + ".pt")
    saved = vqgan.read(path) if path.exists() and not options.fresh else None
    source = vqgan.read(options.init) if options.init else None

    # The tokenizer, the pictures, and the vocabulary, which is the checkpoint's if there is one.
    tokenizer = vqgan.load(options.vqgan or Path(options.out, "vqgan.pt")).to(device)
    size, patch = tokenizer.config.image_size, tokenizer.config.patch
    train, held = (data.open_data(options.data, options.captions, size, data.prior_crop, split,
                                  recipe.seed) for split in ("train", "held-out"))
    data.say(train.summary)
    begun = saved or source
    words = begun["text"] if begun else data.train_tokens(train.captions(100_000), recipe.pieces)
    if source and source["stage"] == options.stage:
        # Fine-tuning keeps the sizes.
        config = replace(PriorConfig(**source["config"]), dropout=config.dropout)
    text = data.Text(words, config.text_length)
    config = replace(config, text_vocab=text.vocab, codes=tokenizer.config.codes,
                     grid=tokenizer.config.grid)

    # The network, and where it stood if it was begun before.
    torch.manual_seed(recipe.seed)
    prior = options.stage == "prior"
    model = Parti(config) if prior else DualEncoder(config, size, patch)
    if prior:
        model.start_from(F.normalize(tokenizer.codebook.detach().cpu(), dim=-1))
    if source and source["stage"] == options.stage:
        model.load_state_dict(source["model"])
    elif source:
        model.encoder.load_state_dict(restore(source).encoder.state_dict())
    if options.fsdp:
        shard(model, world)    # before it is moved: the whole may be too large
    model.to(device)
    parts = {"": (model, make_optimizer(model, recipe))}
    made_for = data.identity(options) | asdict(config) | {
        "captions": options.captions and os.path.abspath(options.captions),
        "fingerprint": tokenizer.fingerprint(), "optimizer": recipe.optimizer}
    content = made_for | {"made_for": made_for, "config": asdict(config), "text": words,
                          "vqgan": options.vqgan and os.path.abspath(options.vqgan),
                          "recipe": asdict(recipe), "image_size": size, "patch": patch,
                          "sampling": SAMPLING if config.width >= 1024 else SHARPER}
    start, skipped = data.resume(path, saved, content, parts)
    del saved, source, begun    # training needs the memory
    network = data.parallel(model, world, options.compile)

    def loss_of(images, captions):
        """Of bytes (b,3,S,S) and b captions, without the padding that none of them reaches."""
        images = images.to(device, non_blocking=True) / 255
        ids = text(captions)                                                   # (b,T)
        ids = ids[:, :(ids != 0).sum(1).max().clamp(min=1)].to(device)
        if prior:
            return prior_loss(network, images, ids, tokenizer, recipe.corrupt * model.training)
        return text_loss(network, images, ids, text.vocab)

    share = recipe.batch // world    # of a batch, for this process, in parts of recipe.micro
    stream = data.batches(train, recipe.batch, recipe.seed, start, recipe.steps, rank, world,
                          recipe.micro, options.workers, recipe.drop)
    bar = tqdm(range(start, recipe.steps), path.stem, recipe.steps, initial=start, disable=rank > 0)
    for step in bar:
        torch.manual_seed(1_000_003 * recipe.seed + 1009 * step + rank)    # dropout
        total = 0.0
        for _ in range(0, share, recipe.micro):
            images, captions = next(stream)
            with autocast:
                loss = len(images) / share * loss_of(images, captions)
            loss.backward()
            total += loss.detach()
        lr = data.rate(recipe, step + 1)
        norm = data.update(*parts[""], lr, recipe.clip, skipped[""])

        # Once in a while: evaluate, log, save.
        done = step + 1
        held_out = ""
        due = done == recipe.steps or done % recipe.save_every == 0 or done in data.EARLY
        if due:
            model.eval()
            torch.manual_seed(0)    # the same draws each time
            with torch.no_grad(), autocast:
                losses = [len(batch[1]) * loss_of(*batch) for batch in data.batches(
                    held, 256 // world * world, recipe.seed, 0, 1, rank, world, recipe.micro)]
                held_out = data.average(sum(losses) / (256 // world)).item()
                # A sharded model draws nothing here: `generate` does not gather its parameters.
                if prior and rank == 0 and not options.fsdp:
                    captions = held.captions(8)
                    prompts = text(captions).repeat_interleave(4, 0).to(device)
                    tokens = model.generate(prompts, **content["sampling"])
                    pictures = tokenizer.decode(tokens).split(4)
                    labels = [[caption] for caption in captions]
                    data.save_grid(path.with_suffix(".png"), pictures, labels)
            model.train()
        if due or done % 10 == 0:
            row = {"step": done, "held_out": held_out, "loss": data.average(total).item(),
                   "grad_norm": norm, "lr": lr, "skipped": skipped[""]["total"]}
            bar.set_postfix(loss=row["loss"])
            if rank == 0:
                data.log(path.with_suffix(".csv"), row, options.wandb)
        if due:
            data.save(path, content | {"step": done, "skipped": skipped}, parts)


if __name__ == "__main__":
    main()
