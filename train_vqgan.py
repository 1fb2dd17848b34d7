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
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
import vqgan


@dataclass(frozen=True, kw_only=True)
class Options(data.Options):
    """Beside those that all training has."""
    stage: str = "tokenizer"        # or decoder, upsampler
    vqgan: str = ""                 # tokenizer of the later stages; empty: vqgan.pt in --out
    scale: int = 2                  # of the upsampler, or 4
    vgg: str = ""                   # weights of VGG16 and LPIPS; empty: fetched
    lpips: str = ""


@dataclass(frozen=True, kw_only=True)
class Recipe(data.Recipe):
    """How to train; the defaults are the papers' (ViT-VQGAN §3.3; StyleGAN2)."""
    codebook: float = 1.0           # weights of the losses, 0: off
    adversarial: float = 0.1
    perceptual: float = 0.1
    laplace: float = 0.1            # 0: the decoder emits plain RGB
    l2: float = 1.0
    channels: int = 16384           # base of the discriminator's widths
    up_width: int = 128             # the upsampler (Parti Fig. 4)
    up_blocks: int = 12
    # Ours, for short runs; the papers' presets have it off.
    l1: float = 0.0
    autoencoder: int = 0            # steps before k-means starts the codebook
    mosaic: float = 0.0             # share of mosaics among the built-in scenes, see Mosaics
    quantised_rate: float = 1.0     # factor of lr once there is a codebook


PAPER = Recipe(steps=500_000, batch=256, lr=1e-4, warmup=50_000, schedule="cosine", final=0.5,
               weight_decay=1e-4, save_every=200)    # ViT-VQGAN §5.1
TINY = Recipe(steps=1800, batch=4, micro=4, lr=2e-3, warmup=20, final=0.02, weight_decay=1e-4,
              l1=0.2, laplace=0.0, perceptual=0.0, adversarial=0.0, channels=1024, up_width=24,
              up_blocks=3, save_every=450, autoencoder=900, mosaic=0.5, quantised_rate=0.5)
MINI = replace(TINY, steps=3000, batch=6, micro=6, warmup=50, mosaic=0.0,
               autoencoder=600, quantised_rate=1.0, save_every=500)
TOKENIZER = {"tiny": TINY, "mini": MINI, "small": PAPER, "base": PAPER,
             "large": replace(PAPER, micro=8)}
RECIPES = dict.fromkeys(("tokenizer", "decoder", "upsampler"), TOKENIZER)


class Mosaics(data.Scenes):
    """Scenes of which a share gives way to mosaics: each patch is drawn from the distinct ones of
    4,096 scenes. Most of a scene is background; in mosaics all patches are equally frequent. While
    there is no codebook yet all are mosaics."""

    def __init__(self, scenes, patch, recipe):
        super().__init__(scenes.split, scenes.size, scenes.seed)
        self.patch, self.share = patch, recipe.mosaic
        self.all_before = recipe.autoencoder * recipe.batch                # position in the stream
        [(pictures, _)] = data.batches(scenes, 4096, scenes.seed, 0, 1)    # (4096, 3, S, S)
        patches = vqgan.patchify(pictures, patch)                          # (4096, N, 3 * p * p)
        self.patches = patches.flatten(0, 1).unique(dim=0)                 # (M, 3 * p * p)

    def sample(self, index, rng):
        """-> uint8 (size, size, 3), caption, which a mosaic has none of."""
        if index >= self.all_before and rng.random() >= self.share:
            return super().sample(index)
        places = rng.integers(len(self.patches), size=(1, (self.size // self.patch) ** 2))
        picture = vqgan.unpatchify(self.patches[places], self.patch)       # (1, 3, S, S)
        return data.pixels(picture[0]), ""


def build(options, recipe, config):
    """-> the network that --stage trains, its config as a dict, and the tokenizer that makes its
    tokens: itself, or the frozen one whose pictures the upsampler enlarges."""
    if options.stage == "tokenizer":
        model = vqgan.VQGAN(replace(config, logit_laplace=recipe.laplace > 0))    # maps of its own
        return model, vars(model.config), model
    path = Path(options.out, "decoder.pt")    # what sample.py will enlarge the pictures of
    if options.stage == "decoder" or not path.exists():
        path = Path(options.out, "vqgan.pt")
    tokenizer = vqgan.load(options.vqgan or path).requires_grad_(False)
    if options.stage == "decoder":
        model = vqgan.VQGAN(vqgan.larger_decoder(tokenizer.config))
        model.encoder, model.codebook = tokenizer.encoder, tokenizer.codebook    # stay frozen
        return model, vars(model.config), model
    sizes = {"scale": options.scale, "width": recipe.up_width, "blocks": recipe.up_blocks}
    return vqgan.Upsampler(**sizes), sizes, tokenizer


def predict(net, images, tokenizer, quantise):
    """Pictures (B, 3, H, W) -> decoder's maps, codebook loss, tokens. Larger ones than the
    tokenizer's are for the upsampler: net sees what the tokenizer makes of them at its own size
    (Parti Fig. 4)."""
    size = tokenizer.config.image_size
    if images.shape[-1] == size:
        return net(images, quantise, raw=True)
    with torch.no_grad():
        tokens = tokenizer.encode(F.interpolate(images, size, mode="nearest"))
        small = tokenizer.decode(tokens).clamp(0, 1)
    return net(small), images.new_zeros(()), tokens


def generator_step(maps, codebook_loss, images, critic, lpips, recipe):
    """What the generator emits for images (B, 3, H, W) -> {name: loss}; "loss" is the paper's sum
    (ViT-VQGAN §3.3). The discriminator is frozen here: it only passes gradients on."""
    pictures = vqgan.view(maps)
    zero = images.new_zeros(())
    perceptual = lpips(images, pictures) if lpips else zero
    laplace = vqgan.logit_laplace_loss(maps, images) if maps.shape[1] == 6 else zero
    adversarial = zero
    if critic:
        critic.requires_grad_(False)
        adversarial = vqgan.generator_loss(critic(pictures))
        critic.requires_grad_(True)
    l2, l1 = F.mse_loss(pictures, images), F.l1_loss(pictures, images)
    loss = (recipe.codebook * codebook_loss + recipe.adversarial * adversarial
            + recipe.perceptual * perceptual + recipe.laplace * laplace
            + recipe.l2 * l2 + recipe.l1 * l1)
    return {"loss": loss, "codebook": codebook_loss, "l2": l2, "l1": l1, "laplace": laplace,
            "perceptual": perceptual, "adversarial": adversarial}


def discriminator_step(critic, maps, images, penalised):
    """What the generator emitted for images, of which it learns nothing here -> {"critic": loss,
    and the mean scores}. penalised: add the lazy gradient penalty (StyleGAN2)."""
    images = images.clone().requires_grad_(penalised)
    real, fake = critic(images), critic(vqgan.view(maps).detach())
    loss = vqgan.discriminator_loss(real, fake)
    if penalised:
        loss = loss + vqgan.r1_penalty(real, images)
    return {"critic": loss, "real": real.mean(), "fake": fake.mean()}


def make_optimizer(network, recipe):
    """AdamW with the papers' moments for what is not frozen (ViT-VQGAN §5.1)."""
    weights = [p for p in network.parameters() if p.requires_grad]
    return torch.optim.AdamW(weights, recipe.lr, (0.9, 0.99), weight_decay=recipe.weight_decay,
                             fused=True)


@torch.no_grad()
def start_codebook(model, dataset, seed, device):
    """K-means on 64,000 latents: of the first 1,000 training samples in tiny, 250 in mini. On the
    CPU, where sums are the same each time and in each process."""
    pictures = 64_000 // model.config.grid ** 2
    parts = data.batches(dataset, pictures, seed, 0, 1, micro=50)
    latents = [model.latents(x.to(device) / 255).cpu() for x, _ in parts]
    model.init_codebook(torch.cat(latents))


@torch.no_grad()
def evaluate(net, images, tokenizer, quantise, path):
    """PSNR, codebook usage and perplexity on held-out pictures (B, 3, H, W). Draws originals above
    reconstructions."""
    results = [predict(net, part, tokenizer, quantise) for part in images.split(16)]
    maps, _, tokens = zip(*results)
    pictures = vqgan.view(torch.cat(maps)).clamp(0, 1)
    usage, perplexity = vqgan.codebook_usage(torch.cat(tokens), tokenizer.config.codes)
    data.save_grid(path, [images[:8], pictures[:8]], [["originals"], ["reconstructions"]])
    psnr = vqgan.psnr(images, pictures).mean().item()
    return {"psnr": psnr, "usage": usage, "perplexity": perplexity}


def main():
    options, config, recipe = data.parse(__doc__, Options(), vqgan.PRESETS, RECIPES, "small",
                                         derived=("logit_laplace", "public"))
    if options.init or options.stage != "tokenizer":
        recipe = replace(recipe, autoencoder=0)    # there is a codebook
    if recipe.steps <= recipe.autoencoder:
        raise ValueError(f"--steps {recipe.steps}: expected more than --autoencoder "
                         f"{recipe.autoencoder}, after which the codebook is made")
    rank, world, device, autocast = data.begin(options, config.width)
    path = Path(options.out, options.stage.replace("tokenizer", "vqgan") + ".pt")
    saved = vqgan.read(path) if path.exists() and not options.fresh else None
    source = vqgan.read(options.init) if options.init else None
    if source and options.stage == "tokenizer":
        config = vqgan.VQGANConfig(**source["config"])    # fine-tuning keeps the sizes

    # The networks; the discriminator judges pictures of the size that comes out.
    torch.manual_seed(recipe.seed)
    model, sizes, tokenizer = build(options, recipe, config)
    tokenizer.to(device)
    model.to(device)
    if source:    # a decoder keeps the encoder and the codebook of its tokenizer
        frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
        model.load_state_dict(source["model"] | frozen)
    parts = {"": (model, make_optimizer(model, recipe))}
    size = tokenizer.config.image_size * sizes.get("scale", 1)
    critic = judge = lpips = None
    if recipe.adversarial:
        critic = vqgan.Discriminator(size, recipe.channels).to(device)
        parts["discriminator_"] = critic, make_optimizer(critic, recipe)
        judge = data.parallel(critic, world)
    if recipe.perceptual:
        lpips = vqgan.Perceptual(options.vgg, options.lpips).to(device)

    # The data: training pictures, and up to 256 fixed ones that are held out.
    train = data.open_data(options.data, "", size, data.tokenizer_crop, "train", recipe.seed)
    held = data.open_data(options.data, "", size, data.centre_crop, "held-out", recipe.seed)
    [(held, _)] = data.batches(held, min(256, len(held)), 0, 0, 1)
    held = held.to(device) / 255
    data.say(train.summary)
    if recipe.mosaic and not options.data and model is tokenizer:
        train = Mosaics(train, tokenizer.config.patch, recipe)

    # Where it stood, if it was begun before.
    made_for = sizes | data.identity(options) | {
        "fingerprint": 0 if options.stage == "tokenizer" else tokenizer.fingerprint(),
        "autoencoder": recipe.autoencoder, "adversarial": recipe.adversarial > 0}
    content = {"config": sizes, "recipe": vars(recipe), "made_for": made_for}
    start, skipped = data.resume(path, saved, content, parts)
    del saved, source    # training needs the memory
    net = data.parallel(model, world, options.compile)

    share = recipe.batch // world    # of a batch, for this process, in parts of recipe.micro
    stream = data.batches(train, recipe.batch, recipe.seed, start, recipe.steps, rank, world,
                          recipe.micro, options.workers)
    bar = tqdm(range(start, recipe.steps), path.stem, recipe.steps, initial=start, disable=rank > 0)
    for step in bar:
        if step == recipe.autoencoder > 0:
            start_codebook(model, train, recipe.seed, device)
        quantise = step >= recipe.autoencoder
        for _ in range(0, share, recipe.micro):
            images = next(stream)[0].to(device, non_blocking=True) / 255
            weight = len(images) / share

            # The generator reconstructs, and wants to be taken for real.
            with autocast:
                maps, codebook_loss, _ = predict(net, images, tokenizer, quantise)
                losses = generator_step(maps, codebook_loss, images, critic, lpips, recipe)
            (weight * losses["loss"]).backward()

            # The discriminator learns to tell its pictures from the originals.
            if critic:
                with autocast:
                    losses |= discriminator_step(judge, maps, images, step % 16 == 0)
                (weight * losses["critic"]).backward()

        lr = data.rate(recipe, step + 1) * (recipe.quantised_rate if quantise else 1)
        norms = [data.update(*part, lr, recipe.clip, skipped[prefix])
                 for prefix, part in parts.items()]

        # Once in a while: evaluate, log (the losses are those of the last part), save.
        done = step + 1
        due = done == recipe.steps or done % recipe.save_every == 0 or done in data.EARLY
        if rank == 0 and (due or done % 10 == 0):
            row = {"step": done, "psnr": "", "usage": "", "perplexity": ""}
            if due:
                row |= evaluate(model, held, tokenizer, quantise, path.with_suffix(".png"))
                bar.set_postfix(psnr=row["psnr"])
            row |= {name: loss.item() for name, loss in losses.items()}
            row |= {"grad_norm": norms[0], "lr": lr, "skipped": skipped[""]["total"]}
            data.log(path.with_suffix(".csv"), row, options.wandb)
        if due:
            data.save(path, content | {"step": done, "skipped": skipped}, parts)


if __name__ == "__main__":
    main()
