"""Train stage 1: the image tokenizer, and what follows it (ViT-VQGAN §3.3, §5.1; Parti §2.1).

    python train_vqgan.py                                  # built-in scenes, preset tiny, on a CPU
    python train_vqgan.py --data ffhq/                     # a folder or .tar of pictures, one GPU
    torchrun --nproc-per-node 8 train_vqgan.py --data ffhq/ --preset base

--stage tokenizer  encoder, codebook and decoder together                    -> out/vqgan.pt
--stage decoder    a larger decoder for the frozen encoder and codebook      -> out/decoder.pt
--stage upsampler  super-resolution of the frozen tokenizer's pictures       -> out/upsampler.pt

Each also writes a log (.csv) and originals above reconstructions (.png) under the same name. The
same command again continues. decoder.pt is a whole tokenizer with the token ids of vqgan.pt.
"""
import math
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data
import vqgan


@dataclass
class Options:
    """What a run does and where, beside the sizes of the model and the recipe."""
    stage: str = field(default="tokenizer",
                       metadata={"choices": ("tokenizer", "decoder", "upsampler")})
    data: str = field(default="", metadata={"help": "folder or .tar; empty: built-in scenes"})
    preset: str = field(default="", metadata={"help": f"one of {', '.join(vqgan.PRESETS)}"})
    out: str = field(default="out/", metadata={"help": "folder of checkpoints, logs and pictures"})
    vqgan: str = field(default="", metadata={"help": "tokenizer of the later stages; OUT/vqgan.pt"})
    scale: int = field(default=2, metadata={"help": "of the upsampler: 2 or 4"})
    vgg: str = field(default="", metadata={"help": "VGG16 weights; empty: fetched"})
    lpips: str = field(default="", metadata={"help": "LPIPS weights; empty: fetched"})
    seed: int = 0
    workers: int = field(default=0, metadata={"help": "processes that load data"})
    device: str = "auto"
    dtype: str = field(default="auto", metadata={"help": "auto, float32 or bfloat16"})
    compile: bool = False
    fresh: bool = field(default=False, metadata={"help": "start over"})
    wandb: bool = False


@dataclass
class Recipe:
    """How to train; the defaults are the papers' (ViT-VQGAN §3.3, §5.1; StyleGAN2). What is marked
    "ours" is for short runs; the papers' presets have it off."""
    steps: int = 500_000
    batch: int = field(default=256, metadata={"help": "pictures per step, over all processes"})
    accumulate: int = field(default=1, metadata={"help": "parts that a batch is computed in"})
    lr: float = 1e-4
    warmup: int = 50_000
    schedule: str = "cosine"
    decay_from: int = 0
    final: float = field(default=0.5, metadata={"help": "last rate as a fraction of lr"})
    weight_decay: float = 1e-4
    codebook: float = field(default=1.0, metadata={"help": "weight of this loss, 0: off"})
    l2: float = 1.0
    l1: float = 0.0                 # ours
    laplace: float = 0.1
    perceptual: float = 0.1
    adversarial: float = 0.1
    r1: float = 10.0                # gamma of the discriminator's penalty, every 16th step
    channels: int = 16384           # base of the discriminator's widths
    up_width: int = 128             # the upsampler (Parti Fig. 4)
    up_blocks: int = 12
    save_every: int = field(default=5000, metadata={"help": "steps; evaluates, too"})
    autoencoder: float = field(default=0.0, metadata={"help": "share of the steps before k-means "
                                                      "starts the codebook"})            # ours
    quantised_rate: float = field(default=1.0, metadata={"help": "factor of lr after it"})  # ours
    mosaic: float = field(default=0.0, metadata={"help": "share of mosaics after it"})      # ours


RECIPES = dict.fromkeys(vqgan.PRESETS, Recipe())
RECIPES["tiny"] = Recipe(
    steps=1800, batch=4, lr=2e-3, warmup=20, final=0.02, l1=0.2, laplace=0.0, perceptual=0.0,
    adversarial=0.0, channels=1024, up_width=24, up_blocks=3, save_every=450, autoencoder=0.5,
    quantised_rate=0.5, mosaic=0.5)


def build(options, config, recipe):
    """-> the network that --stage trains, its config as a dict, the frozen tokenizer or None."""
    if options.stage == "tokenizer":
        return vqgan.VQGAN(config), asdict(config), None
    if config != vqgan.PRESETS[options.preset]:
        raise SystemExit(f"--stage {options.stage} takes the sizes from the tokenizer's file: "
                         "leave out the options that set them")
    tokenizer = vqgan.load(options.vqgan or Path(options.out, "vqgan.pt")).requires_grad_(False)
    if options.stage == "upsampler":
        sizes = {"scale": options.scale, "width": recipe.up_width, "blocks": recipe.up_blocks}
        return vqgan.Upsampler(**sizes), sizes, tokenizer
    config = vqgan.larger_decoder(tokenizer.config)
    model = vqgan.VQGAN(config)
    model.encoder, model.codebook = tokenizer.encoder, tokenizer.codebook     # these stay frozen
    return model, asdict(config), None


def predict(net, images, tokenizer=None, **how):
    """Pictures (B, 3, H, W) -> (decoder's maps, codebook loss, tokens). With a frozen tokenizer,
    net is the upsampler and sees its reconstructions of the reduced pictures (Parti Fig. 4)."""
    if tokenizer is None:
        return net(images, raw=True, **how)
    with torch.no_grad():
        small = F.interpolate(images, tokenizer.config.image_size, mode="nearest")
        tokens = tokenizer.encode(small)
        small = tokenizer.decode(tokens).clamp(0, 1)
    return net(small), images.new_zeros(()), tokens


def generator_step(net, critic, lpips, images, recipe, **how):
    """-> total loss, reconstructions (B, 3, H, W) without gradient, {name in the recipe: loss}."""
    maps, codebook_loss, _ = predict(net, images, **how)
    pictures = vqgan.view(maps)
    losses = {"codebook": codebook_loss, "l2": F.mse_loss(pictures, images),
              "l1": F.l1_loss(pictures, images)}
    if recipe.laplace and maps.shape[1] == 6:
        losses["laplace"] = vqgan.logit_laplace_loss(maps, images)
    if lpips:
        losses["perceptual"] = lpips(images, pictures)
    if critic:
        losses["adversarial"] = vqgan.generator_loss(critic(pictures))
    total = sum(getattr(recipe, name) * loss for name, loss in losses.items())
    return total, pictures.detach(), losses


def discriminator_step(critic, images, fakes, recipe, penalise):
    """Pictures and reconstructions without gradient -> loss, {kind: mean score}."""
    images = images.clone().requires_grad_(penalise)
    real, fake = critic(images), critic(fakes)
    loss = vqgan.discriminator_loss(real, fake)
    if penalise:
        loss = loss + vqgan.r1_penalty(real, images, recipe.r1)
    return loss, {"real": real.mean(), "fake": fake.mean()}


def distinct_patches(images, config):
    """Pictures (B, 3, H, W) -> their patches without repetitions (M, 3 * p * p): background, which
    is most of a scene, counts once. The first are repeated to make M a multiple of N."""
    patches = F.pixel_unshuffle(images, config.patch).flatten(2).transpose(1, 2)
    patches = patches.flatten(0, 1).unique(dim=0)
    count = math.ceil(len(patches) / config.grid ** 2) * config.grid ** 2
    return patches[torch.arange(count) % len(patches)]


def mosaics(patches, config):
    """Patches (n * N, 3 * p * p) in reading order -> pictures (n, 3, H, W)."""
    grid = patches.unflatten(0, (-1, config.grid, config.grid))            # (n, G, G, 3*p*p)
    return F.pixel_shuffle(grid.permute(0, 3, 1, 2), config.patch)


@torch.no_grad()
def start_codebook(model, pool, generator, surroundings=8):
    """K-means on one latent per patch of pool (M, 3 * p * p), its mean in several surroundings:
    what is rare needs a code as much as what is common, and no patch needs two."""
    config, device = model.config, model.codebook.device
    z = 0
    for _ in range(surroundings):
        order = torch.randperm(len(pool), generator=generator)
        parts = mosaics(pool[order], config).split(32)
        latents = torch.cat([model.latents(part.to(device)) for part in parts]).flatten(0, 1)
        z = z + latents[order.argsort()]                                   # (M, code_dim)
    model.init_codebook(z.repeat(math.ceil(config.codes / len(z)), 1))


@torch.no_grad()
def evaluate(net, images, captions, codes, path, **how):
    """PSNR, codebook usage and perplexity on held-out pictures (B, 3, H, W); of built-in scenes
    also the share that still shows its caption. Draws originals above reconstructions."""
    results = [predict(net, part, **how) for part in images.split(32)]
    pictures = torch.cat([vqgan.view(maps) for maps, _, _ in results]).clamp(0, 1)
    usage, perplexity = vqgan.codebook_usage(torch.cat([tokens for *_, tokens in results]), codes)
    right = [data.check(*pair) for pair in zip(pictures, captions)]
    data.save_grid(path, [images[:8], pictures[:8]], ["originals", "reconstructions"])
    return {"psnr": vqgan.psnr(images, pictures).mean().item(), "usage": usage,
            "perplexity": perplexity, "right": sum(right) / len(right) if right else None}


def main():
    options, config, recipe = data.parse(__doc__, Options(), vqgan.PRESETS, RECIPES, "small")
    name = "vqgan" if options.stage == "tokenizer" else options.stage
    run = data.Run(options.out, name, options.device, options.dtype, options.fresh, options.wandb)
    if recipe.batch % (run.world * recipe.accumulate):
        raise SystemExit(f"--batch {recipe.batch}: expected a multiple of {run.world} processes "
                         f"times --accumulate {recipe.accumulate}")

    # The networks and their optimizers, new or from the checkpoint.
    torch.manual_seed(options.seed)
    model, sizes, tokenizer = build(options, config, recipe)
    config = tokenizer.config if tokenizer else model.config
    size = config.image_size * (options.scale if tokenizer else 1)
    how = {"tokenizer": tokenizer.to(run.device)} if tokenizer else {}
    critic = vqgan.Discriminator(size, recipe.channels) if recipe.adversarial else None
    lpips = None
    if recipe.perceptual:
        lpips = vqgan.Perceptual(options.vgg, options.lpips).to(run.device)
    networks = [network.to(run.device) for network in (model, critic) if network]
    learned = [[p for p in network.parameters() if p.requires_grad] for network in networks]
    optimizers = [torch.optim.AdamW(parameters, recipe.lr, (0.9, 0.99), fused=True,
                                    weight_decay=recipe.weight_decay) for parameters in learned]
    parts = dict(zip(("model", "discriminator"), networks))
    parts |= dict(zip(("optimizer", "discriminator_optimizer"), optimizers))
    state = run.resume(sizes, asdict(recipe))
    start = state["step"] if state else 0
    for key, part in parts.items():
        if state:
            part.load_state_dict(state[key])
    nets = [torch.compile(network) if options.compile else network for network in networks]
    if run.world > 1:
        nets = [DistributedDataParallel(net) for net in nets]
    count = sum(p.numel() for p in model.parameters())
    data.say(f"{options.stage}, preset {options.preset}: {count / 1e6:.1f} M parameters, "
             f"{run.world} x {run.device}, {run.dtype}")

    # Data: a stream of training pictures from here on, and 256 fixed ones that are held out.
    train, held = (data.open_data(options.data, "", size, crop, split, options.seed)
                   for split, crop in (("train", data.tokenizer_crop), ("seen", data.centre_crop)))
    stream = data.batches(train, recipe.batch, options.seed, start, recipe.steps, run.rank,
                          run.world, options.workers)
    held, captions = next(data.batches(held, min(256, len(held)), 0, 0, 1))
    held, captions = held.to(run.device) / 255, [] if options.data else captions
    first = round(recipe.autoencoder * recipe.steps) if options.stage == "tokenizer" else 0
    if first:
        pictures, _ = next(data.batches(train, 4096, options.seed, 0, 1))
        pool = distinct_patches(pictures, config) / 255
    autocast = torch.autocast(run.device.type, torch.bfloat16, run.dtype == torch.bfloat16)
    bar = tqdm(range(start, recipe.steps), options.stage, initial=start, total=recipe.steps,
               disable=not run.main)
    begin, shown = time.perf_counter(), {}
    for step in bar:
        generator = torch.Generator().manual_seed(options.seed + 1_000_003 * step)
        if step == first > 0:
            start_codebook(model, pool, generator)
        if options.stage == "tokenizer":
            how["quantise"] = step >= first
        rate = data.rate(step + 1, recipe) * (recipe.quantised_rate if step >= first else 1)
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = rate

        # Gradients of both networks, in parts; processes exchange them with the last part.
        images = next(stream)[0] / 255
        if first:
            share = recipe.mosaic if step >= first else 1.0
            chosen = torch.arange(recipe.batch) < share * recipe.batch
            drawn = (recipe.batch * config.grid ** 2,)
            drawn = mosaics(pool[torch.randint(len(pool), drawn, generator=generator)], config)
            chosen, drawn = (x.chunk(run.world)[run.rank] for x in (chosen, drawn))
            images[chosen] = drawn[chosen]
        images = images.to(run.device)
        totals = {}
        for i, part in enumerate(images.chunk(recipe.accumulate)):
            for net in nets:
                net.require_backward_grad_sync = i + 1 == recipe.accumulate    # as DDP's no_sync
            for parameter in learned[1] if critic else ():
                parameter.requires_grad_(False)
            with autocast:
                loss, fakes, losses = generator_step(nets[0], critic, lpips, part, recipe, **how)
            (loss / recipe.accumulate).backward()
            if critic:
                critic.requires_grad_(True)
                with autocast:
                    loss, scores = discriminator_step(nets[1], part, fakes, recipe, step % 16 == 0)
                (loss / recipe.accumulate).backward()
                losses |= scores
            for key, value in losses.items():
                totals[key] = totals.get(key, 0) + value.detach() / recipe.accumulate
        norms = [torch.nn.utils.get_total_norm([p.grad for p in group]) for group in learned]
        finite, stop = run.agree(torch.stack(norms).isfinite().all())
        for optimizer in optimizers:
            if finite:
                optimizer.step()
            optimizer.zero_grad()

        done = step + 1
        save = done % recipe.save_every == 0 or done == recipe.steps
        if run.device.type == "cpu" and done == start + 20:
            seconds = (time.perf_counter() - begin) / 20 * recipe.steps
            data.say(f"about {seconds / 60:.1f} minutes for {recipe.steps} steps on this CPU")
        if done % 10 == 0 or save:
            row = {key: run.mean(value) for key, value in totals.items()}
            row |= {"lr": rate, "norm": norms[0].item(), "skipped": run.skipped}
            health = dict.fromkeys(("psnr", "usage", "perplexity", "right"))
            if save and run.main:
                picture = run.path.with_suffix(".png")
                health = evaluate(model, held, captions, config.codes, picture, **how)
                shown = {key: f"{value:.3g}" for key, value in health.items() if value is not None}
            run.log(done, row | health)
            bar.set_postfix({"l2": f"{row['l2']:.2g}"} | shown)
        if save or stop:
            run.save({"config": sizes, "recipe": asdict(recipe), "step": done}
                     | {key: part.state_dict() for key, part in parts.items()})
        if stop:
            break
    run.finish()


if __name__ == "__main__":
    data.launch(main)
