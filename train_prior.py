"""Train stage 2: the prior that turns text into image tokens (Parti §2.2-2.4, §3).

    torchrun train_prior.py                                     # built-in scenes, tiny, on a CPU
    python train_prior.py --data coco/ --captions captions_train2017.json --preset 350m
    torchrun --nproc-per-node 8 train_prior.py --data shards/ --preset 3b --fsdp
    python train_prior.py --stage text                          # text encoder and reranker

Reads the tokenizer out/vqgan.pt, writes out/prior.pt (text.pt), a log .csv and a picture .png. The
same command again continues where the checkpoint stands.
"""
from dataclasses import asdict, dataclass, replace

import torch
import torch.nn.functional as F
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard

import data
import vqgan
from data import option
from prior import PRESETS, Adafactor, DualEncoder, Parti, PriorConfig, contrastive_loss, hide


@dataclass(frozen=True, kw_only=True)
class Options(data.Options):
    """Beside those that all training has."""
    captions: str = option("", "COCO captions JSON")
    stage: str = option("prior", "what to train", choices=("prior", "text"))
    vqgan: str = option("", "tokenizer; empty: vqgan.pt in --out")
    text: str = option("", "text.pt, from which the text encoder starts")
    fsdp: bool = option(False, "shard the parameters over the processes")


@dataclass(frozen=True, kw_only=True)
class Recipe(data.Recipe):
    """How to train. What concerns captions dropped, codes and sampling is the prior's alone."""
    optimizer: str = option("adafactor", "", choices=("adafactor", "adamw"))
    drop: float = option(0.1, "share of captions dropped, for guidance", most=1)
    pieces: int = option(16_000, "SentencePiece vocabulary")
    code_start: bool = option(False, "embeddings start as the codebook")
    guidance: float = option(1.2, "kept as sample.py's default, as are the next three")
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0


PAPER = Recipe(steps=450_000, batch=8192, lr=4.5e-5, warmup=5_000, schedule="exponential",
               decay_from=85_000, final=0.025, weight_decay=0.045, clip=4.0, log_every=100)
RECIPES = dict.fromkeys(PRESETS, PAPER)
RECIPES["tiny"] = Recipe(
    steps=3200, batch=24, optimizer="adamw", lr=3e-3, weight_decay=0.03, clip=4.0, warmup=100,
    schedule="linear", decay_from=1800, final=0.0, code_start=True, temperature=0.8, top_p=0.95,
    log_every=20, save_every=400)


def prior_loss(network, images, text, tokenizer):
    """Cross-entropy in nats per image token (Parti §2.3). Tokens are made here, from augmented
    pictures: images (B,3,S,S) in [0,1], text (B,T)."""
    with torch.no_grad():
        tokens = tokenizer.encode(images)                                      # (B,N)
    logits = network(text, tokens)                                             # (B,N,K)
    return F.cross_entropy(logits.flatten(0, 1), tokens.flatten())


def text_loss(network, images, text, config, run, step):
    """Contrastive loss and masked tokens together (Parti §2.3, App. G), both means over the global
    batch. What is hidden is drawn for that batch: the number of processes makes no difference."""
    seed = torch.Generator().manual_seed(1_000_003 * run.recipe.seed + step)
    draws = torch.rand(3, run.recipe.batch, config.text_length, generator=seed)
    draws = draws.chunk(run.world, 1)[run.rank].to(run.device)                 # (3,B,T), see `hide`
    hidden, chosen = hide(text, config.text_vocab, draws[:, :, : text.shape[1]])
    texts, pictures, scale, words = network(text, images, hidden)              # words (B,T,V)
    surprise = F.cross_entropy(words.transpose(1, 2), text, reduction="none")  # (B,T)
    count = data.average(chosen.sum().float())
    masked = (surprise * chosen).sum() / count.clamp(min=1)
    return contrastive_loss(texts, pictures, scale) + masked


def prepare(images, text, device):
    """Bytes to [0,1]; and the columns of padding that no text of the batch reaches cut off."""
    longest = max(1, int((text != 0).sum(1).max()))
    return images.to(device).float() / 255, text[:, :longest].to(device)


def make_optimizer(model, recipe):
    """Adafactor or AdamW with the papers' moments (Parti §3). Matrices decay; vectors (norms, the
    start token) do not, as is usual."""
    groups = [{"params": [p for p in model.parameters() if p.ndim >= 2]},
              {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0}]
    how = {"lr": recipe.lr, "betas": (0.9, 0.96), "weight_decay": recipe.weight_decay}
    adam = recipe.optimizer == "adamw"
    return torch.optim.AdamW(groups, fused=True, **how) if adam else Adafactor(groups, **how)


def make_model(options, config, recipe, tokenizer, warm):
    """The network of this stage: cold, or with the text encoder of `warm`, a DualEncoder."""
    torch.manual_seed(recipe.seed)
    if options.stage == "text":
        model = DualEncoder(config, tokenizer.config.image_size, tokenizer.config.patch)
    else:
        model = Parti(config)
        if recipe.code_start:
            model.start_from(F.normalize(tokenizer.codebook.detach(), dim=-1))
    if warm:
        with data.explain(f"--text {options.text}", "a text.pt of the same sizes"):
            model.encoder.load_state_dict(warm.encoder.state_dict())
    return model


def shard(model, run):
    """FSDP2: every process keeps its share of each parameter, gradient and moment."""
    def even(p):   # the first side that divides evenly, so that no process is left with nothing
        return Shard(next((i for i, n in enumerate(p.shape) if n % run.world == 0), 0))

    for block in [*model.encoder.blocks, *getattr(model, "blocks", []), model]:
        fully_shard(block, shard_placement_fn=even)


def main():
    options, config, recipe = data.parse(__doc__, Options(), PRESETS, RECIPES, "350m",
                                         derived=("text_vocab", "codes", "grid"))
    if options.stage == "text" and recipe.accumulate > 1:
        raise SystemExit("--accumulate: the contrastive loss needs its whole batch at once")
    run = data.Run(options, recipe, options.stage, config.width, vqgan.read)
    if options.fsdp and (run.world == 1 or config.width % run.world):
        raise SystemExit(f"--fsdp shards over processes: start 2 or more with torchrun, a number "
                         f"that divides the width {config.width}")
    tokenizer = vqgan.load(options.vqgan or run.path.with_name("vqgan.pt"))
    tokenizer = tokenizer.requires_grad_(False).to(run.device)
    size, codes, grid = (getattr(tokenizer.config, x) for x in ("image_size", "codes", "grid"))
    train, held_out = (data.open_data(options.data, options.captions, size, data.prior_crop, split,
                                      recipe.seed) for split in ("train", "seen"))

    # The vocabulary is the checkpoint's, though the captions may have changed since, or that of the
    # text encoder to start from, or a function of the captions. Of scenes few hold every word.
    warm, there = None, run.saved or {}
    if options.text and not run.saved:
        warm, there = vqgan.restore(options.text, lambda saved: DualEncoder(
            PriorConfig(**saved["config"]), saved["image_size"], saved["patch"]))
    words = (there["text"].numpy().tobytes() if "text" in there else
             data.train_tokens(train.captions(100_000 if options.data else 2_000), recipe.pieces))
    text = data.Text(words, config.text_length)
    config = replace(config, text_vocab=text.vocab, codes=codes, grid=grid)
    sampling = {x: getattr(recipe, x) for x in ("guidance", "temperature", "top_k", "top_p")}
    fixed = {"image_size": size, "patch": tokenizer.config.patch}
    if options.stage == "prior":    # the other one sees no tokens
        fixed["tokenizer_fingerprint"] = tokenizer.fingerprint()
    run.resume(asdict(config), "optimizer", **fixed)
    run.content |= {"text": torch.tensor(list(words), dtype=torch.uint8), "sampling": sampling,
                    "vqgan": options.vqgan,
                    "val": {"data": options.data, "captions": options.captions}}
    model = make_model(options, config, recipe, tokenizer, warm).to(run.device)
    del there, warm    # training needs the memory
    if options.fsdp:
        shard(model, run)
    [network] = run.together({"model": model}, make_optimizer)

    def losses_of(step, *part):
        part = prepare(*part, run.device)
        yield {"loss": prior_loss(network, *part, tokenizer) if options.stage == "prior" else
               text_loss(network, *part, config, run, step)}

    @torch.no_grad()
    def evaluate(step):
        """Mean loss over the first pictures of the held-out split, and four samples for each of
        eight captions, prior.png. A sharded model draws none: `generate` does not gather its
        parameters; use sample.py."""
        model.eval()
        size = recipe.batch // recipe.accumulate    # what training holds at a time
        parts = data.batches(held_out, size, recipe.seed, 0, max(1, 256 // size), run.rank,
                             run.world, text=text)
        with run.autocast:
            losses = torch.stack([next(losses_of(0, *part))["loss"] for part in parts])
        if options.stage == "prior" and run.main and not options.fsdp:
            captions = held_out.captions(8)
            seed = torch.Generator(run.device).manual_seed(recipe.seed)
            prompts = text(captions).repeat_interleave(4, 0).to(run.device)
            tokens = model.generate(prompts, generator=seed, **sampling)
            pictures = tokenizer.decode(tokens).split(4)
            data.save_grid(run.path.with_suffix(".png"), pictures, captions)
        model.train()
        return {"held_out": data.average(losses.mean()).item()}

    stream = data.batches(train, recipe.batch, recipe.seed, run.start, recipe.steps, run.rank,
                          run.world, options.workers,
                          recipe.drop if options.stage == "prior" else 0.0, text)
    run.train(stream, losses_of, evaluate, ["held_out"])
    after = {"prior": 'sample.py "a red circle"', "text": f"train_prior.py --text {run.path}"}
    data.say(f"{run.path} is there; next: python {after[run.name]}")


if __name__ == "__main__":
    data.launch(main)
