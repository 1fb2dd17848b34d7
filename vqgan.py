"""Stage 1, the image tokenizer: pictures to discrete tokens and back (Parti §2.1; ViT-VQGAN §3).

    python vqgan.py                      # walk-through: shapes, sizes against the papers, speed
    python train_vqgan.py                # train the tiny one on the built-in scenes

Top to bottom: configuration, the two Transformer towers, the tokenizer with its codebook, metrics,
then what only training needs (losses, perceptual loss, discriminator), the super-resolution
upsampler, and loading. Pictures are (B, 3, H, W) floats in [0, 1], tokens (B, N) int64, everywhere.
Axes: B batch, N image tokens, H heads, D width, K codebook entries, G grid side (N = G * G).
"""
import time
import zipfile
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn


# ---------------------------------------------------------------------------------------------
# Configuration

SIZES = ("width", "layers", "heads", "mlp")    # of a tower (ViT-VQGAN Table 2)


@dataclass(frozen=True)
class VQGANConfig:
    """All sizes of a tokenizer. A decoder_* field of 0 means "as the encoder" (ViT-VQGAN Table 2).

    Raises ValueError, one line naming the values, for sizes that do not fit together."""
    image_size: int = 256
    patch: int = 8              # a token is one 8x8 patch: 256 x 256 pixels are 32 x 32 tokens
    width: int = 512
    layers: int = 8
    heads: int = 8
    mlp: int = 2048
    decoder_width: int = 0
    decoder_layers: int = 0
    decoder_heads: int = 0
    decoder_mlp: int = 0
    codes: int = 8192           # K
    code_dim: int = 32          # width of the space in which codes are looked up
    code_scale: float = 1.0     # the decoder receives the unit-norm code times this
    beta: float = 0.25          # weight of the encoder's term in the codebook loss
    logit_laplace: bool = True  # decoder emits mu and ln b (ViT-VQGAN); False: plain RGB (Parti)
    public: bool = False        # the network of public checkpoints, see convert_public

    def __post_init__(self):
        if self.image_size % self.patch:
            raise ValueError(f"image_size {self.image_size} is not divisible by patch {self.patch}")
        for width, _, heads, _ in (self.sizes(), self.sizes("decoder_")):
            if width % heads and not self.public:
                raise ValueError(f"width {width} is not divisible by {heads} heads")

    @property
    def grid(self):
        """G: tokens along one side of the picture."""
        return self.image_size // self.patch

    def sizes(self, prefix=""):
        """(width, layers, heads, mlp) of the encoder; of the decoder with prefix "decoder_"."""
        return tuple(getattr(self, prefix + name) or getattr(self, name) for name in SIZES)


PRESETS = {  # ViT-VQGAN Table 2; tiny is for the built-in scenes on a laptop
    "tiny": VQGANConfig(image_size=64, width=128, layers=1, heads=4, mlp=512, decoder_layers=2,
                        codes=1088, code_scale=32 ** 0.5, logit_laplace=False),
    "small": VQGANConfig(),
    "base": VQGANConfig(width=768, layers=12, heads=12, mlp=3072),
    "large": VQGANConfig(width=1280, layers=32, heads=16, mlp=5120)}


def larger_decoder(config):
    """The config of Parti's second tokenizer stage (§2.1, App. H): the same encoder and codebook
    under a larger decoder that emits plain RGB. Large for the papers' sizes, 4 blocks for tiny; for
    a public tokenizer, with the blocks of public checkpoints."""
    large = PRESETS["large"].sizes() if config.width >= 512 else (192, 4, 6, 768)
    larger = {f"decoder_{name}": size for name, size in zip(SIZES, large)}
    return replace(config, logit_laplace=False, **larger)


# ---------------------------------------------------------------------------------------------
# The towers: encoder and decoder are the same Transformer (ViT-VQGAN §3.1)

class Block(nn.Module):
    """Pre-norm Transformer block, full attention: (B, N, D) -> (B, N, D) (ViT-VQGAN §3.1)."""

    def __init__(self, config, width, heads, mlp):
        super().__init__()
        self.heads = heads
        inner = 64 * heads if config.public else width
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * inner, bias=not config.public)
        self.out = nn.Linear(inner, width)
        activation = nn.Tanh() if config.public else nn.GELU()
        self.mlp = nn.Sequential(nn.Linear(width, mlp), activation, nn.Linear(mlp, width))

    def forward(self, x):
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1))   # (B, N, 3, H, d)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                               # 3 x (B, H, N, d)
        mixed = F.scaled_dot_product_attention(q, k, v)                    # (B, H, N, d)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))                 # (B, N, D)
        return x + self.mlp(self.norm2(x))


class Tower(nn.Module):
    """Linear map in, learned positions, blocks, norm, two-layer tanh head, linear map out:
    (B, N, n_in) -> (B, N, n_out). No activation follows the last map (ViT-VQGAN §3.1)."""

    def __init__(self, config, n_in, n_out, width, layers, heads, mlp):
        super().__init__()
        self.embed = nn.Linear(n_in, width)
        self.positions = nn.Parameter(torch.empty(1, config.grid ** 2, width))
        self.blocks = nn.Sequential(*[Block(config, width, heads, mlp) for _ in range(layers)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Identity() if config.public else nn.Sequential(
            nn.Linear(width, 4 * width), nn.Tanh(), nn.Linear(4 * width, width))
        self.project = nn.Linear(width, n_out)

    def forward(self, x):
        x = self.embed(x) + self.positions
        return self.project(self.head(self.norm(self.blocks(x))))


# ---------------------------------------------------------------------------------------------
# The tokenizer

def patchify(images, p):
    """(B, C, H, W) -> its p x p patches in reading order, (B, N, C*p*p)."""
    return F.pixel_unshuffle(images, p).flatten(2).transpose(1, 2)


def unpatchify(patches, p):
    """The inverse, for square pictures: (B, N, C*p*p) -> (B, C, H, W)."""
    grid = round(patches.shape[1] ** 0.5)
    return F.pixel_shuffle(patches.transpose(1, 2).unflatten(2, (grid, grid)), p)


class VQGAN(nn.Module):
    """ViT-VQGAN: ViT encoder, factorised l2-normalised codebook, ViT decoder (ViT-VQGAN §3). Token
    ids depend on `encoder` and `codebook` alone: freeze these two to train another `decoder`."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        pixels, maps = config.patch ** 2, 6 if config.logit_laplace else 3
        self.encoder = Tower(config, 3 * pixels, config.code_dim, *config.sizes())
        self.codebook = nn.Parameter(torch.empty(config.codes, config.code_dim))
        self.decoder = Tower(config, config.code_dim, maps * pixels, *config.sizes("decoder_"))
        self.initialise()

    @torch.no_grad()
    def initialise(self):
        """Every initial value of the tokenizer; norms keep torch's ones and zeros."""
        for name, weight in self.named_parameters():
            if weight.ndim == 2 and name != "codebook":
                nn.init.xavier_uniform_(weight)                # as ViT: keeps variance at any width
            # Every block starts by adding small constants: training leaves the mean colour behind
            # sooner.
            if name.endswith(("out.weight", "mlp.2.weight")):
                nn.init.zeros_(weight)
        for tower in (self.encoder, self.decoder):
            nn.init.normal_(tower.positions, std=0.02)         # as ViT: content first, place second
        # W(2x - 1): sees pixels in [-1, 1], or the brightness would drown the rest.
        self.encoder.embed.bias.copy_(-self.encoder.embed.weight.sum(1))
        self.encoder.embed.weight.mul_(2)
        nn.init.normal_(self.codebook)                         # ViT-VQGAN §3.2; direction counts
        # Start close to mid-grey, whether mu or RGB.
        nn.init.normal_(self.decoder.project.weight, std=0.02)
        self.decoder.project.bias.fill_(0.0 if self.config.logit_laplace else 0.5)

    def latents(self, images):
        """(B, 3, H, W) in [0, 1] -> (B, N, code_dim) float32 of unit norm: the encoder's side of
        the look-up (ViT-VQGAN §3.2). Raises ValueError for pictures of another size."""
        size = self.config.image_size
        if images.shape[1:] != (3, size, size):
            raise ValueError(f"expected images (B, 3, {size}, {size}), got {tuple(images.shape)}")
        z = self.encoder(patchify(images, self.config.patch))              # (B, N, code_dim)
        return F.normalize(z.float(), dim=-1)

    def quantise(self, z):
        """Unit latents (B, N, code_dim) -> nearest codes, codebook loss, tokens (ViT-VQGAN Eq. 1).

        The codes carry straight-through gradients. The loss is the squared norm of Eq. 1 summed
        over the code width, averaged over positions; its unit term moves the codebook, its beta
        term the encoder. Always float32, also under autocast."""
        with torch.autocast(z.device.type, enabled=False):
            codes = F.normalize(self.codebook.float(), dim=-1)             # (K, code_dim)
            tokens = nearest(z.detach().flatten(0, 1), codes.detach()).view(z.shape[:2])
            e = F.embedding(tokens, codes)                                 # (B, N, code_dim)
        loss = (z.detach() - e).square().sum(-1).mean()
        loss = loss + self.config.beta * (z - e.detach()).square().sum(-1).mean()
        return z + (e - z).detach(), loss, tokens

    def decoder_maps(self, z):
        """Codes (B, N, code_dim) -> what the decoder emits, float32: (B, 6, H, W) mu and ln b of
        the logit-Laplace density, or (B, 3, H, W) plain RGB."""
        patches = self.decoder(z * self.config.code_scale)                 # (B, N, maps*p*p)
        return unpatchify(patches.float(), self.config.patch)              # (B, maps, H, W)

    def encode(self, images):
        """Pictures (B, 3, H, W) in [0, 1] -> tokens (B, N) int64, row by row."""
        return self.quantise(self.latents(images))[2]

    def decode(self, tokens):
        """Tokens (B, N) int64 -> pictures (B, 3, H, W); clamp to [0, 1] for display."""
        return view(self.decoder_maps(F.normalize(self.codebook.float(), dim=-1)[tokens]))

    def fingerprint(self):
        """A number of the codebook, by which what was trained on its tokens knows it again."""
        return zlib.crc32(self.codebook.detach().cpu().numpy().tobytes())

    def forward(self, images, quantise=True, raw=False):
        """images (B, 3, H, W) -> (reconstruction (B, 3, H, W), codebook_loss, tokens (B, N)).

        raw: the decoder's maps in place of the reconstruction, for `logit_laplace_loss`; `view`
        turns them into the reconstruction. quantise=False: a plain autoencoder; the loss is then 0
        but still reaches the codebook, so that every parameter keeps a gradient under DDP."""
        z = self.latents(images)
        z_q, codebook_loss, tokens = self.quantise(z)
        maps = self.decoder_maps(z_q if quantise else z)
        return maps if raw else view(maps), codebook_loss * float(quantise), tokens

    @torch.no_grad()
    def init_codebook(self, latents, steps=10):
        """Set the codebook by spherical k-means on latents (..., code_dim); our addition, so that
        short runs start with every code in use.

        It starts from latents far apart, each the worst served by those before it: many equal
        background patches get one code. Deterministic. Of fewer latents than codes, each gets one;
        the codes beyond repeat them."""
        x = F.normalize(latents.float().reshape(-1, self.config.code_dim), dim=-1)   # (M, code_dim)
        codes, served = x[:1].repeat(self.config.codes, 1), x @ x[0]       # (K, code_dim), (M,)
        for k in range(1, len(codes)):
            codes[k] = x[served.argmin()]
            served = served.maximum(x @ codes[k])
        for _ in range(steps):
            sums = torch.zeros_like(codes).index_add_(0, nearest(x, codes), x)
            codes = F.normalize(torch.where(sums.any(-1, keepdim=True), sums, codes), dim=-1)
        self.codebook.copy_(codes)


def nearest(z, codes):
    """Unit rows z (M, d) and codes (K, d) -> index (M,) of the nearest code. For unit vectors
    |a - b|^2 = 2 - 2 a.b, so the largest dot product is the smallest distance. In slices, because
    M x K does not fit: 256 pictures against 8192 codes would be 8 GiB."""
    return torch.cat([(part @ codes.T).argmax(-1) for part in z.split(8192)])


# ---------------------------------------------------------------------------------------------
# Metrics

def psnr(images, reconstruction):
    """Peak signal-to-noise ratio in dB of each picture (B,), reconstruction clamped to [0, 1]."""
    return -10 * (images - reconstruction.clamp(0, 1)).square().mean((1, 2, 3)).log10()


def codebook_usage(tokens, codes, batch=256):
    """Tokens (B, N) of test pictures, K -> (usage, perplexity). Usage is the share of codes hit by
    256 pictures, averaged over such batches (ViT-VQGAN Table 4); perplexity is over all tokens."""
    usage = [len(part.unique()) / codes for part in tokens.split(batch)]
    p = torch.bincount(tokens.flatten(), minlength=codes) / tokens.numel()
    return sum(usage) / len(usage), torch.special.entr(p).sum().exp().item()


# ---------------------------------------------------------------------------------------------
# Losses: 1 codebook + 0.1 adversarial + 0.1 perceptual + 0.1 logit-Laplace + 1 l2 (ViT-VQGAN §3.3)

EPSILON = 0.1   # pixels are squeezed into [0.1, 0.9], where the logit is harmless (DALL-E A.3)


def view(maps):
    """Decoder maps -> picture: phi^-1(sigmoid(mu)) of 6 maps (DALL-E A.3), 3 maps as they are."""
    return maps if maps.shape[1] == 3 else (maps[:, :3].sigmoid() - EPSILON) / (1 - 2 * EPSILON)


def logit_laplace_loss(maps, images):
    """Mean negative log-likelihood of images (B, 3, H, W) under maps (B, 6, H, W) = mu, ln b:
    f(x) = exp(-|logit x - mu| / b) / (2 b x (1 - x)) (DALL-E A.3 Eq. 2); it can be negative.
    0.01, about one grey level, is added to b: the density of a flat area would have no bound."""
    x = (1 - 2 * EPSILON) * images + EPSILON
    mu, b = maps[:, :3], maps[:, 3:].exp() + 0.01
    return ((x.logit() - mu).abs() / b + (2 * b * x * (1 - x)).log()).mean()


def generator_loss(fake):
    """Scores (B,) of reconstructions -> non-saturating logistic loss (StyleGAN2)."""
    return F.softplus(-fake.float()).mean()


def discriminator_loss(real, fake):
    """Scores (B,) of originals and of detached reconstructions, of one call each (the minibatch
    stddev must not mix them) -> logistic loss (StyleGAN2)."""
    return F.softplus(-real.float()).mean() + F.softplus(fake.float()).mean()


def r1_penalty(real, images, gamma=10.0, every=16):
    """gamma / 2 * |dD/dx|^2 on originals (StyleGAN2), times `every` because it is lazy: add it to
    the loss of one step in 16. real = D(images), images requiring grad."""
    slope, = torch.autograd.grad(real.float().sum(), images, create_graph=True)
    # Half the slope: gamma is meant for pixels in [-1, 1], ours are in [0, 1].
    return every * gamma / 2 * (slope / 2).square().sum((1, 2, 3)).mean()


VGG = ("https://download.pytorch.org/models/vgg16-397923af.pth",
       "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0")
LPIPS = ("https://github.com/richzhang/PerceptualSimilarity/raw/master/lpips/weights/v0.1/vgg.pth",
         "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868")


def fetch(path, url, sha256):
    """Weights in a file, or for "" those under url, fetched once and checked."""
    if path:
        return torch.load(path, map_location="cpu", weights_only=True)
    return torch.hub.load_state_dict_from_url(url, map_location="cpu", weights_only=True,
                                              check_hash=True, file_name=f"lpips-{sha256}.pth")


class Perceptual(nn.Module):
    """LPIPS on VGG16 as VQGAN ships it (ViT-VQGAN §3.3): two (B, 3, H, W) in [0, 1] -> mean of B.

    vgg, lpips: files of torchvision's VGG16 and of the LPIPS v0.1 weights; "" fetches them once,
    checked by SHA-256. Raises whatever torch raises if they cannot be had or do not fit. Frozen.
    Pictures of at least 16 x 16 pixels."""

    def __init__(self, vgg="", lpips=""):
        super().__init__()
        for name, value in (fetch(vgg, *VGG) | fetch(lpips, *LPIPS)).items():
            if not name.startswith("classifier"):           # most of VGG16, unused
                self.register_buffer(name.replace("features.", "vgg").replace(".", "_"), value)
        self(*torch.zeros(2, 1, 3, 16, 16))                 # all tensors are there and fit

    def forward(self, images, reconstruction):
        # The shift and the scale of red, green and blue, (3, 1, 1) each.
        shift, scale = images.new_tensor([[-.03, -.088, -.188], [.458, .448, .45]])[..., None, None]
        x = (2 * torch.cat([images, reconstruction]) - 1 - shift) / scale  # (2B, 3, H, W)
        distance, w = 0, dict(self.named_buffers())
        for i, stage in enumerate([(0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28)]):
            x = F.max_pool2d(x, 2) if i else x
            for j in stage:                                                # VGG16's convolutions
                x = F.conv2d(x, w[f"vgg{j}_weight"], w[f"vgg{j}_bias"], padding=1).relu()
            a, b = F.normalize(x.float(), dim=1, eps=1e-10).chunk(2)       # (B, C, h, w) each
            distance += (w[f"lin{i}_model_1_weight"] * (a - b).square()).sum(1).mean()
        return distance


# ---------------------------------------------------------------------------------------------
# StyleGAN2's residual discriminator (ViT-VQGAN §3.3)

class EqualConv(nn.Conv2d):
    """Convolution with equalised learning rate: weights are N(0, 1), scaled by 1/sqrt(fan in) when
    used, so that Adam moves every layer at the same relative speed. Stride 2 low-passes first."""

    def reset_parameters(self):
        nn.init.normal_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x):
        if self.stride[0] == 2:
            for padding in (1, self.kernel_size[0] // 2, 0):    # [1, 1] three times over is the
                x = F.avg_pool2d(x, 2, 1, padding)              # filter [1, 3, 3, 1]
        weight = self.weight * self.weight[0].numel() ** -0.5
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


def leaky(x):
    """Leaky ReLU of slope 0.2 with gain sqrt(2), which keeps the variance (StyleGAN2)."""
    return F.leaky_relu(x, 0.2) * 2 ** 0.5


class Discriminator(nn.Module):
    """(B, 3, S, S) in [0, 1] -> scores (B,), positive for "real". S is a power of two from 8 to
    2 * base, else ValueError. Resolution r has min(2 * base / r, cap) channels; the defaults are
    those of config F."""

    def __init__(self, image_size, base=16384, cap=512):
        super().__init__()
        if image_size & (image_size - 1) or not 8 <= image_size <= 2 * base:
            raise ValueError(f"a discriminator of base {base} needs a side that is a power of two "
                             f"from 8 to {2 * base}, got {image_size}")
        sides = [image_size >> i for i in range(image_size.bit_length() - 2)]      # S, S/2 ... 4
        first, *_, last = widths = [min(2 * base // side, cap) for side in sides]
        self.rgb, self.blocks = EqualConv(3, first, 1), nn.ModuleList()
        for c, d in zip(widths, widths[1:]):
            convs = EqualConv(c, c, 3, padding=1), EqualConv(c, d, 3, stride=2)
            self.blocks.append(nn.ModuleList([*convs, EqualConv(c, d, 1, stride=2, bias=False)]))
        self.conv = EqualConv(last + 1, last, 3, padding=1)
        self.dense, self.score = EqualConv(last, last, 4), EqualConv(last, 1, 1)   # on a 4 x 4 map

    def forward(self, images):
        x = leaky(self.rgb(2 * images - 1))                                # (B, C, S, S)
        for conv, down, skip in self.blocks:
            x = (leaky(down(leaky(conv(x)))) + skip(x)) * 0.5 ** 0.5       # (B, C', S/2, S/2)
        # Minibatch stddev: how much the pictures of a group of 4 differ, as one extra map. A group
        # is 4 neighbours, so that processes and parts that share a batch form the groups of one
        # that does not. Other sizes use the largest group of at most 4 that divides them.
        group = max(g for g in (1, 2, 3, 4) if len(x) % g == 0)
        var = x.float().unflatten(0, (-1, group)).var(1, unbiased=False)   # (B/group, C, 4, 4)
        std = (var + 1e-8).sqrt().mean((1, 2, 3), keepdim=True).repeat_interleave(group, dim=0)
        x = torch.cat([x, std.expand(-1, 1, 4, 4)], dim=1)                 # (B, C+1, 4, 4)
        return self.score(leaky(self.dense(leaky(self.conv(x))))).flatten()


# ---------------------------------------------------------------------------------------------
# Super-resolution (Parti §2.1, Fig. 4), after WDSR

def normed_conv(c_in, c_out, kernel):
    """Convolution of the same size with weight normalisation, as everywhere in WDSR."""
    return nn.utils.parametrizations.weight_norm(nn.Conv2d(c_in, c_out, kernel, padding="same"))


class Doubler(nn.Module):
    """One x2 stage (B, 3, H, W) -> (B, 3, 2H, 2W): WDSR-A blocks, 4 times as wide before the ReLU,
    all at low resolution, and one 5x5 convolution past them."""

    def __init__(self, width, blocks):
        super().__init__()
        self.head, self.tail = normed_conv(3, width, 3), normed_conv(width, 12, 3)
        self.wide = nn.ModuleList(normed_conv(width, 4 * width, 3) for _ in range(blocks))
        self.narrow = nn.ModuleList(normed_conv(4 * width, width, 3) for _ in range(blocks))
        self.skip = normed_conv(3, 12, 5)
        # Start as nearest-neighbour enlargement: the skip copies pixels, the tail's gain is 0.
        self.skip.weight = nn.init.dirac_(torch.empty(3, 3, 5, 5)).repeat_interleave(4, dim=0)
        for start in (self.tail.parametrizations.weight.original0, self.tail.bias, self.skip.bias):
            nn.init.zeros_(start)

    def forward(self, images):
        images = 2 * images - 1                                            # (x - mean) / half-range
        x = self.head(images)                                              # (B, C, H, W)
        for wide, narrow in zip(self.wide, self.narrow):
            x = x + narrow(wide(x).relu())
        return (F.pixel_shuffle(self.tail(x) + self.skip(images), 2).float() + 1) / 2


class Upsampler(nn.Sequential):
    """(B, 3, H, W) in [0, 1] -> (B, 3, scale * H, scale * W); clamp for display. scale 2 (15M
    parameters in Parti) or 4: two stages in a row (30M). Raises ValueError for another scale."""

    def __init__(self, scale, width=128, blocks=12):
        if scale not in (2, 4):
            raise ValueError(f"the upsampler's scale is 2 or 4, got {scale}")
        super().__init__(*[Doubler(width, blocks) for _ in range(scale // 2)])


# ---------------------------------------------------------------------------------------------
# Files

MADE_BY = {"vqgan.pt": "train_vqgan.py", "prior.pt": "train_vqgan.py && python train_prior.py",
           "decoder.pt": "train_vqgan.py --stage decoder", "text.pt": "train_prior.py --stage text",
           "upsampler.pt": "train_vqgan.py --stage upsampler"}


def read(path, use=lambda saved: saved):
    """What `use` makes of a file of tensors and plain values, by default these themselves, on the
    CPU. Always weights_only=True. SystemExit, one line with the way out, if the file is missing,
    damaged, holds more than that, or is of a kind that `use` cannot use."""
    try:
        if zipfile.is_zipfile(path) and zipfile.ZipFile(path).testzip():    # torch compares none
            raise ValueError("a checksum is wrong")
        return use(torch.load(path, map_location="cpu", weights_only=True))
    except FileNotFoundError:
        command = MADE_BY.get(Path(path).name, "train_vqgan.py or train_prior.py")
        raise SystemExit(f"{path} does not exist; this makes it: python {command}")
    except Exception as error:    # torch raises half a dozen types, depending on the damage
        if "Unsupported global" in str(error):
            raise SystemExit(f"{path} holds more than tensors; if you trust it, keep these alone: "
                             "torch.save(torch.load(FILE, weights_only=False)['state_dict'], NEW)")
        says = f"{type(error).__name__}: {' '.join(str(error).split()).split('. ')[0][:200]}"
        raise SystemExit(f"{path} is damaged or of another kind ({says}). Damaged: fetch it again; "
                         "if trained here, take the .prev.pt beside it, or --fresh")


# enhancing-transformers -> here, applied in this order
PUBLIC_NAMES = {
    "transformer.layers.": "blocks.", ".0.norm.": ".norm1.", ".1.norm.": ".norm2.",
    ".0.fn.to_": ".", ".1.fn.net.": ".mlp.", "transformer.norm.": "norm.",
    "en_pos_embedding": "positions", "to_patch_embedding.0.": "embed.", "to_pixel.1.": "project.",
    "de_pos_embedding": "positions", "quantizer.embedding.weight": "codebook",
    "pre_quant.": "encoder.project.", "post_quant.": "decoder.embed."}


def convert_public(state):
    """Public ViT-VQGAN (enhancing-transformers) state dict -> a checkpoint like ours, all sizes
    read from the tensors. Unlike the paper it has tanh inside the MLPs, no tanh head, no biases on
    qkv, and heads always 64 wide."""
    names = "\n".join(state)
    for old, new in PUBLIC_NAMES.items():
        names = names.replace(old, new)
    ours = {n: v for n, v in zip(names.split("\n"), state.values()) if not n.startswith("loss.")}
    *_, patch = ours["encoder.embed.weight"].shape
    codes, code_dim = ours["codebook"].shape
    config = dict(image_size=patch * round(ours["encoder.positions"].shape[1] ** 0.5), patch=patch,
                  codes=codes, code_dim=code_dim, logit_laplace=False, public=True)
    for side, prefix in (("encoder", ""), ("decoder", "decoder_")):
        config[prefix + "width"], inner = ours[f"{side}.blocks.0.out.weight"].shape
        config[prefix + "heads"] = inner // 64
        config[prefix + "mlp"] = len(ours[f"{side}.blocks.0.mlp.0.weight"])
        config[prefix + "layers"] = sum(side in n and "norm1.bias" in n for n in ours)
    # Convolutions whose stride is their kernel are linear maps of patches: (c, y, x) flattened.
    ours["encoder.embed.weight"] = ours["encoder.embed.weight"].flatten(1)
    ours["decoder.project.weight"] = ours["decoder.project.weight"].flatten(1).T
    ours["decoder.project.bias"] = ours["decoder.project.bias"].repeat_interleave(patch ** 2)
    return {"config": config, "model": ours}


def restore(path, build):
    """A checkpoint -> the network build(checkpoint) with its weights, on the CPU in eval mode, and
    the checkpoint itself. SystemExit, one line, as `read`."""
    def network_of(saved):
        if "model" not in saved:
            saved = convert_public(saved.get("state_dict", saved))
        network = build(saved)
        network.load_state_dict(saved.pop("model"))
        saved.pop("optimizer", None)    # larger than all the rest
        return network.eval(), saved
    return read(path, network_of)


def load(path):
    """A tokenizer from our checkpoint or a public enhancing-transformers one -> VQGAN on the CPU,
    in eval mode. A missing, damaged or misfitting file stops with one line (SystemExit)."""
    return restore(path, lambda saved: VQGAN(VQGANConfig(**saved["config"])))[0]


# ---------------------------------------------------------------------------------------------
# Walk-through

@torch.no_grad()
def main():
    """Every step on a tiny example, its speed, parameter counts against the papers' tables."""
    model, images = VQGAN(PRESETS["tiny"]), torch.rand(16, 3, 64, 64)
    z = model.latents(images)
    z_q, _, tokens = model.quantise(z)
    steps = {"pictures": images, "latents of unit norm": z, "nearest codes": z_q, "tokens": tokens,
             "decoded": model.decode(tokens), "upsampled": Upsampler(2, width=16, blocks=2)(images),
             "discriminator's scores": Discriminator(64, cap=64)(images)}
    for step, value in steps.items():
        print(f"{step:24}{tuple(value.shape)}")
    start = time.perf_counter()
    model.decode(model.encode(images))
    print(f"tiny: {16 / (time.perf_counter() - start):.0f} pictures/s, to tokens and back")
    with torch.device("meta"):    # no memory, no arithmetic
        networks = {f"{name} encoder": VQGAN(config).encoder for name, config in PRESETS.items()}
        networks |= {"upsampler x2": Upsampler(2), "upsampler x4": Upsampler(4),
                     "discriminator at 256": Discriminator(256)}
    print("\nParameters; the papers: small 32M, base 91M, large 599M a tower, upsamplers 15M, 30M")
    for name, network in networks.items():
        print(f"{name:24}{sum(p.numel() for p in network.parameters()):13,}")


if __name__ == "__main__":
    main()
