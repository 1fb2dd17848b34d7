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
from dataclasses import asdict, dataclass, replace

import torch
import torch.nn.functional as F

import data
import vqgan
from data import option


@dataclass(frozen=True, kw_only=True)
class Options(data.Options):
    """Beside those that all training has."""
    stage: str = option("tokenizer", "what to train", choices=("tokenizer", "decoder", "upsampler"))
    vqgan: str = option("", "tokenizer of the later stages; empty: vqgan.pt in --out")
    scale: int = option(2, "of the upsampler stage", choices=(2, 4))
    vgg: str = option("", "VGG16 weights; empty: fetched")
    lpips: str = option("", "LPIPS weights; empty: fetched")


@dataclass(frozen=True, kw_only=True)
class Recipe(data.Recipe):
    """How to train; the defaults are the papers' (ViT-VQGAN §3.3; StyleGAN2). What is marked "ours"
    is for short runs; the papers' presets have it off."""
    codebook: float = option(1.0, "weight of this loss, 0: off")
    l2: float = 1.0
    l1: float = 0.0                 # ours
    laplace: float = option(0.1, "0: the decoder emits plain RGB")
    perceptual: float = 0.1
    adversarial: float = 0.1
    r1: float = 10.0                # gamma of the discriminator's penalty, every 16th step
    channels: int = option(16384, "base of the discriminator's widths", least=128)
    up_width: int = 128             # the upsampler (Parti Fig. 4)
    up_blocks: int = 12
    # Ours, too. The later stages have a codebook from their first step.
    autoencoder: float = option(0.0, "share of steps before k-means starts the codebook", most=1)
    quantised_rate: float = option(1.0, "factor of lr once there is a codebook")
    mosaic: float = option(0.0, "share of mosaics from then on", most=1)

    @property
    def first(self):
        """The steps before k-means starts the codebook."""
        return round(self.autoencoder * self.steps)

    def rate(self, step):
        return super().rate(step) * (self.quantised_rate if step > self.first else 1)


PAPER = Recipe(steps=500_000, batch=256, lr=1e-4, warmup=50_000, schedule="cosine", final=0.5,
               weight_decay=1e-4)    # ViT-VQGAN §5.1
RECIPES = dict.fromkeys(vqgan.PRESETS, PAPER)
RECIPES["tiny"] = Recipe(
    steps=1800, batch=4, lr=2e-3, warmup=20, final=0.02, weight_decay=1e-4, l1=0.2, laplace=0.0,
    perceptual=0.0, adversarial=0.0, channels=1024, up_width=24, up_blocks=3, save_every=450,
    autoencoder=0.5, quantised_rate=0.5, mosaic=0.5)


def build(run, config):
    """-> the network that --stage trains, its config as a dict, the frozen tokenizer or None."""
    options, recipe = run.options, run.recipe
    if options.stage == "tokenizer":
        config = replace(config, logit_laplace=recipe.laplace > 0)    # a loss of its own maps
        return vqgan.VQGAN(config), asdict(config), None
    if config != vqgan.PRESETS[options.preset]:
        raise SystemExit(f"--stage {options.stage} takes the sizes from the tokenizer's file: "
                         "leave out the options that set them")
    tokenizer = vqgan.load(options.vqgan or run.path.with_name("vqgan.pt")).requires_grad_(False)
    if options.stage == "upsampler":
        sizes = {"scale": options.scale, "width": recipe.up_width, "blocks": recipe.up_blocks}
        return vqgan.Upsampler(**sizes), sizes, tokenizer.to(run.device)
    config = vqgan.larger_decoder(tokenizer.config)
    model = vqgan.VQGAN(config)
    model.encoder, model.codebook = tokenizer.encoder, tokenizer.codebook     # these stay frozen
    return model, asdict(config), None


def make_optimizer(network, recipe):
    """AdamW with the papers' moments for what is not frozen (ViT-VQGAN §5.1)."""
    weights = [p for p in network.parameters() if p.requires_grad]
    return torch.optim.AdamW(weights, recipe.lr, (0.9, 0.99), weight_decay=recipe.weight_decay,
                             fused=True)


def predict(net, images, tokenizer=None, quantise=True):
    """Pictures (B, 3, H, W) -> (decoder's maps, codebook loss, tokens). With a frozen tokenizer,
    net is the upsampler and sees its reconstructions of the reduced pictures (Parti Fig. 4)."""
    if tokenizer is None:
        return net(images, quantise, raw=True)
    with torch.no_grad():
        small = F.interpolate(images, tokenizer.config.image_size, mode="nearest")
        tokens = tokenizer.encode(small)
        small = tokenizer.decode(tokens).clamp(0, 1)
    return net(small), images.new_zeros(()), tokens


def generator_step(net, critic, lpips, images, recipe, *how):
    """-> reconstructions (B, 3, H, W) without gradient, {name in the recipe: its loss; "loss": the
    weighted sum}. The discriminator is frozen: it only passes gradients on. Under a frozen codebook
    its loss is a constant, logged but without gradient."""
    maps, codebook_loss, _ = predict(net, images, *how)
    pictures = vqgan.view(maps)
    losses = {"codebook": codebook_loss, "l2": F.mse_loss(pictures, images),
              "l1": F.l1_loss(pictures, images)}
    if recipe.laplace and maps.shape[1] == 6:
        losses["laplace"] = vqgan.logit_laplace_loss(maps, images)
    if lpips:
        losses["perceptual"] = lpips(images, pictures)
    if critic:
        critic.requires_grad_(False)
        losses["adversarial"] = vqgan.generator_loss(critic(pictures))
    total = sum(getattr(recipe, name) * loss for name, loss in losses.items())
    return pictures.detach(), {"loss": total} | losses


def discriminator_step(critic, images, fakes, recipe, step):
    """Pictures and reconstructions without gradient -> {"critic": loss; kind: mean score}. The
    gradient penalty is lazy: every 16th step."""
    critic.requires_grad_(True)
    images = images.clone().requires_grad_(step % 16 == 1)
    real, fake = critic(images), critic(fakes)
    loss = vqgan.discriminator_loss(real, fake)
    if images.requires_grad:
        loss = loss + vqgan.r1_penalty(real, images, recipe.r1)
    return {"critic": loss, "real": real.mean(), "fake": fake.mean()}


def distinct_patches(images, config):
    """Pictures (B, 3, H, W) -> their patches without repetitions (M, 3 * p * p): background, which
    is most of a scene, counts once. The first are repeated to make M a multiple of N."""
    patches = vqgan.patchify(images, config.patch).flatten(0, 1).unique(dim=0)
    count = math.ceil(len(patches) / config.grid ** 2) * config.grid ** 2
    return patches[torch.arange(count) % len(patches)]


@torch.no_grad()
def start_codebook(model, pool, generator, surroundings=8):
    """K-means on one latent per patch of pool (M, 3 * p * p), its mean in several surroundings:
    what is rare needs a code as much as what is common, and no patch needs two."""
    z, config = 0, model.config
    for _ in range(surroundings):
        order = torch.randperm(len(pool), generator=generator)
        pictures = vqgan.unpatchify(pool[order.view(-1, config.grid ** 2)], config.patch)
        latents = torch.cat([model.latents(part) for part in pictures.split(32)]).flatten(0, 1)
        z = z + latents[order.argsort()]                                   # (M, code_dim)
    model.init_codebook(z)


def training_pictures(batches, model, pool, run):
    """Batches of bytes -> tuples of pictures (b, 3, H, W) in [0, 1]. With a pool of patches:
    mosaics alone (unless recipe.mosaic is 0) train the autoencoder, then k-means starts the
    codebook, then recipe.mosaic of a batch are mosaics, in the later decoder stage, too."""
    recipe = run.recipe
    for step, (images, _) in enumerate(batches, run.start):
        images = images.to(run.device) / 255
        if pool is not None:
            generator = torch.Generator().manual_seed(recipe.seed + 1_000_003 * step)
            if step == recipe.first > 0:
                data.say("k-means starts the codebook ...")
                start_codebook(model, pool, generator)
            share = recipe.mosaic if step >= recipe.first else float(recipe.mosaic > 0)
            # Drawn for all processes together: mosaics are the first pictures of the whole batch.
            places = recipe.batch, model.config.grid ** 2
            places = torch.randint(len(pool), places, generator=generator)
            rows = torch.arange(recipe.batch).chunk(run.world)[run.rank]
            rows = rows[rows < share * recipe.batch]
            images[:len(rows)] = vqgan.unpatchify(pool[places[rows]], model.config.patch)
        yield (images,)


MEASURES = "psnr", "usage", "perplexity", "right"


@torch.no_grad()
def evaluate(net, images, captions, codes, path, *how):
    """PSNR, codebook usage and perplexity on held-out pictures (B, 3, H, W); of built-in scenes
    also the share that still shows its caption. Draws originals above reconstructions."""
    results = [predict(net, part, *how) for part in images.split(32)]
    pictures = torch.cat([vqgan.view(maps) for maps, _, _ in results]).clamp(0, 1)
    usage = vqgan.codebook_usage(torch.cat([tokens for *_, tokens in results]), codes)
    right = [data.check(*pair) for pair in zip(pictures, captions)]
    data.save_grid(path, [images[:8], pictures[:8]], ["originals", "reconstructions"])
    decibels = vqgan.psnr(images, pictures).mean().item()
    return dict(zip(MEASURES, (decibels, *usage, sum(right) / len(right) if right else None)))


def main():
    options, config, recipe = data.parse(__doc__, Options(), vqgan.PRESETS, RECIPES, "small",
                                         derived=("logit_laplace", "public"))
    if options.stage != "tokenizer":
        recipe = replace(recipe, autoencoder=0.0)
    name = options.stage.replace("tokenizer", "vqgan")
    run = data.Run(options, recipe, name, config.width, vqgan.read)

    # The data, and the networks, new or from the checkpoint.
    torch.manual_seed(recipe.seed)
    model, sizes, tokenizer = build(run, config)
    config = (tokenizer or model).config
    size = config.image_size * (options.scale if tokenizer else 1)
    train, held = (data.open_data(options.data, "", size, crop, split, recipe.seed)
                   for split, crop in (("train", data.tokenizer_crop), ("seen", data.centre_crop)))
    with data.explain("the discriminator", "--image-size 8, 16, 32 ... and enough --channels, or "
                      "--adversarial 0"):
        critic = vqgan.Discriminator(size, recipe.channels) if recipe.adversarial else None
    with data.explain(f"--vgg '{options.vgg}' --lpips '{options.lpips}'",
                      f"downloads of {vqgan.VGG[0]} and {vqgan.LPIPS[0]}, or --perceptual 0"):
        lpips = recipe.perceptual and vqgan.Perceptual(options.vgg, options.lpips).to(run.device)
    frozen = 0 if options.stage == "tokenizer" else (tokenizer or model).fingerprint()
    run.resume(sizes, autoencoder_steps=recipe.first, tokenizer_fingerprint=frozen)
    networks = {"model": model, "discriminator": critic} if critic else {"model": model}
    nets = run.together(networks, make_optimizer)

    # A stream of training pictures from here on, and 256 fixed ones that are held out.
    stream = data.batches(train, recipe.batch, recipe.seed, run.start, recipe.steps, run.rank,
                          run.world, options.workers)
    held, captions = next(data.batches(held, min(256, len(held)), 0, 0, 1))
    held, captions = held.to(run.device) / 255, [] if options.data else captions
    pool = None
    if recipe.first or recipe.mosaic and not tokenizer:
        pictures, _ = next(data.batches(train, 4096, recipe.seed, 0, 1))
        pool = distinct_patches(pictures, config).to(run.device) / 255

    def losses_of(step, images):
        how = tokenizer, step > recipe.first
        fakes, losses = generator_step(nets[0], critic, lpips, images, recipe, *how)
        yield losses
        yield discriminator_step(nets[1], images, fakes, recipe, step)    # if there is one

    def health(step):
        how = config.codes, run.path.with_suffix(".png"), tokenizer, step > recipe.first
        return evaluate(model, held, captions, *how) if run.main else {}

    run.train(training_pictures(stream, model, pool, run), losses_of, health, MEASURES)


if __name__ == "__main__":
    data.launch(main)
