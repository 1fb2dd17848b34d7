"""Stage 1, the image tokenizer: pictures to discrete tokens and back (Parti §2.1; ViT-VQGAN §3).

    python vqgan.py                      # walk-through: shapes, sizes against the papers, speed
    python train_vqgan.py                # train the tiny one on the built-in scenes

Top to bottom: configuration, the two Transformer towers, the tokenizer with its codebook, metrics,
then what only training needs (losses, perceptual loss, discriminator), the super-resolution
upsampler, and loading. Pictures are (B, 3, H, W) floats in [0, 1], tokens (B, N) int64, everywhere.
Axes: B batch, N image tokens, H heads, D width, K codebook entries, G grid side (N = G * G).
"""
import math
import time
import zlib
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn


# ---------------------------------------------------------------------------------------------
# Configuration

@dataclass(frozen=True)
class VQGANConfig:
    """All sizes of a tokenizer. Raises ValueError for sizes that do not fit together."""
    image_size: int = 256
    patch: int = 8              # a token is one 8x8 patch: 256 x 256 pixels are 32 x 32 tokens
    width: int = 512            # of the encoder, as the next three
    layers: int = 8
    heads: int = 8
    mlp: int = 2048
    decoder: tuple = ()         # width, layers, heads, mlp of the decoder; (): as the encoder
    codes: int = 8192           # K
    code_dim: int = 32          # width of the space in which codes are looked up
    code_scale: float = 1.0     # the decoder receives the unit-norm code times this
    beta: float = 0.25          # weight of the encoder's term in the codebook loss
    logit_laplace: bool = True  # decoder emits mu and ln b (ViT-VQGAN); False: plain RGB (Parti)
    public: bool = False        # the network of public checkpoints, see convert_public

    def __post_init__(self):
        for width, _, heads, _ in self.towers:
            if self.image_size % self.patch or width % heads:
                raise ValueError(f"expected image_size {self.image_size} to be a multiple of patch "
                                 f"{self.patch}, and width {width} of heads {heads}")

    @property
    def grid(self):
        """G: tokens along one side of the picture."""
        return self.image_size // self.patch

    @property
    def towers(self):
        """(width, layers, heads, mlp) of the encoder and of the decoder."""
        encoder = self.width, self.layers, self.heads, self.mlp
        return encoder, self.decoder or encoder


# The scale makes each number of a code about 1, as the decoder's first map expects.
TINY = VQGANConfig(image_size=64, width=128, layers=1, heads=4, mlp=512, decoder=(128, 2, 4, 512),
                   codes=1088, code_scale=32 ** 0.5, logit_laplace=False)
PRESETS = {  # ViT-VQGAN Table 2; tiny is for the built-in scenes, mini for a laptop's own pictures
    "tiny": TINY,
    "mini": replace(TINY, patch=4, layers=0, codes=8192),    # codes of a patch and its place
    "small": VQGANConfig(),
    "base": VQGANConfig(width=768, layers=12, heads=12, mlp=3072),
    "large": VQGANConfig(width=1280, layers=32, heads=16, mlp=5120)}


def larger_decoder(config):
    """The config of Parti's second tokenizer stage (§2.1, App. H): the same encoder and codebook
    under a larger decoder that emits plain RGB: Large, or for tiny and mini one of 4 blocks."""
    decoder = PRESETS["large"].towers[0] if config.width >= 512 else (192, 4, 6, 768)
    return replace(config, logit_laplace=False, decoder=decoder)


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
        x = self.embed(x) + self.positions                                 # (B, N, D)
        x = self.head(self.norm(self.blocks(x)))
        with torch.autocast(x.device.type, enabled=False):                 # output in float32
            return self.project(x.float())                                 # (B, N, n_out)


# ---------------------------------------------------------------------------------------------
# The tokenizer

def patchify(images, p):
    """(B, C, H, W) -> its p x p patches in reading order, (B, N, C*p*p)."""
    return F.pixel_unshuffle(images, p).flatten(2).mT


def unpatchify(patches, p):
    """The inverse, for square pictures: (B, N, C*p*p) -> (B, C, H, W)."""
    grid = round(patches.shape[1] ** 0.5)
    return F.pixel_shuffle(patches.mT.unflatten(2, (grid, grid)), p)


class VQGAN(nn.Module):
    """ViT-VQGAN: ViT encoder, factorised l2-normalised codebook, ViT decoder (ViT-VQGAN §3). Token
    ids depend on `encoder` and `codebook` alone: freeze these two to train another `decoder`."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        encoder, decoder = config.towers
        pixels, maps = config.patch ** 2, 6 if config.logit_laplace else 3
        self.encoder = Tower(config, 3 * pixels, config.code_dim, *encoder)
        self.codebook = nn.Parameter(torch.empty(config.codes, config.code_dim))
        self.decoder = Tower(config, config.code_dim, maps * pixels, *decoder)
        self.initialise()

    @torch.no_grad()
    def initialise(self):
        """Every initial value of the tokenizer; norms keep torch's ones and zeros."""
        for name, weight in self.named_parameters():
            if weight.ndim == 2 and name != "codebook":
                nn.init.xavier_uniform_(weight)                # as ViT: keeps variance at any width
            if name.endswith(("out.weight", "mlp.2.weight")):
                nn.init.zeros_(weight)                         # each block starts as a constant
        for tower in (self.encoder, self.decoder):
            nn.init.normal_(tower.positions, std=0.02)         # as ViT: content first, place second
        nn.init.normal_(self.codebook)                         # ViT-VQGAN §3.2; direction counts
        nn.init.normal_(self.decoder.project.weight, std=0.02)           # start near mid-grey,
        self.decoder.project.bias.fill_(0.0 if self.config.logit_laplace else 0.5)   # mu or RGB

    def latents(self, images):
        """(B, 3, H, W) in [0, 1] -> (B, N, code_dim) float32 of unit norm: the encoder's side of
        the look-up (ViT-VQGAN §3.2). Raises ValueError for pictures of another size."""
        size = self.config.image_size
        if images.shape[1:] != (3, size, size):
            raise ValueError(f"expected images (B, 3, {size}, {size}), got {tuple(images.shape)}")
        if not self.config.public:
            images = 2 * images - 1     # centred, or the brightness would drown the rest
        z = self.encoder(patchify(images, self.config.patch))              # (B, N, code_dim)
        return F.normalize(z, dim=-1)

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
        return unpatchify(self.decoder(z * self.config.code_scale), self.config.patch)

    def encode(self, images):
        """Pictures (B, 3, H, W) in [0, 1] -> tokens (B, N) int64, row by row."""
        return self.quantise(self.latents(images))[2]

    def decode(self, tokens):
        """Tokens (B, N) int64 -> pictures (B, 3, H, W); clamp to [0, 1] for display."""
        return view(self.decoder_maps(F.normalize(self.codebook, dim=-1)[tokens]))

    def fingerprint(self):
        """A number of the codebook, by which what was trained on its tokens knows it again."""
        return zlib.crc32(self.codebook.detach().cpu().numpy())

    def forward(self, images, quantise=True, raw=False):
        """images (B, 3, H, W) -> (reconstruction (B, 3, H, W), codebook_loss, tokens (B, N)).

        raw: the decoder's maps in place of the reconstruction, for `logit_laplace_loss`; `view`
        turns them into the reconstruction. quantise=False: a plain autoencoder; the loss is then 0
        but still reaches the codebook, so that every parameter keeps a gradient under DDP."""
        z = self.latents(images)
        z_q, codebook_loss, tokens = self.quantise(z)
        maps = self.decoder_maps(z_q if quantise else z)
        return maps if raw else view(maps), codebook_loss * quantise, tokens

    @torch.no_grad()
    def init_codebook(self, latents):
        """Set the codebook by spherical k-means on latents (..., code_dim); our addition, so that
        short runs start with every code in use.

        It starts from latents far apart, each the worst served by those before it: many equal
        background patches get one code. Deterministic. Of fewer latents than codes, each gets one;
        the codes beyond repeat them."""
        x = F.normalize(latents.reshape(-1, self.config.code_dim), dim=-1)   # (M, code_dim)
        codes, served = x[:1].repeat(self.config.codes, 1), x @ x[0]       # (K, code_dim), (M,)
        for k in range(1, len(codes)):
            codes[k] = x[served.argmin()]
            served = served.maximum(x @ codes[k])
        for _ in range(10):
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


def codebook_usage(tokens, codes):
    """Tokens (B, N) of test pictures, K -> (usage, perplexity). Usage is the share of codes hit by
    256 pictures, averaged over such batches (ViT-VQGAN Table 4); perplexity is over all tokens."""
    usage = [len(part.unique()) / codes for part in tokens.split(256)]
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
       "vgg16-397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0.pth")
LPIPS = ("https://github.com/richzhang/PerceptualSimilarity/raw/master/lpips/weights/v0.1/vgg.pth",
         "lpips-a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868.pth")


def fetch(path, url, name):
    """The weights in the file `path`; for "" those under url, fetched once to torch's cache, where
    torch compares their SHA-256 with the one in the file's name."""
    if path:
        return read(path)
    return torch.hub.load_state_dict_from_url(url, map_location="cpu", file_name=name,
                                              check_hash=True, weights_only=True)


class Perceptual(nn.Module):
    """LPIPS on VGG16 as VQGAN ships it (ViT-VQGAN §3.3): two (B, 3, H, W) in [0, 1] -> mean of B.

    vgg, lpips: files of torchvision's VGG16 and of the LPIPS v0.1 weights; "" fetches them once.
    Frozen. Pictures of at least 16 x 16 pixels. Raises what torch raises if they do not fit, and
    URLError without a network."""

    def __init__(self, vgg="", lpips=""):
        super().__init__()
        weights = fetch(vgg, *VGG)    # kernel and bias of 13 convolutions; then the classifier's
        self.vgg = nn.ParameterList(weights[name] for name in weights if "features" in name)
        weights = fetch(lpips, *LPIPS)
        self.lins = nn.ParameterList(weights[f"lin{i}.model.1.weight"] for i in range(5))
        self.requires_grad_(False)

    def forward(self, images, reconstruction):
        shift = images.new_tensor([-.030, -.088, -.188]).view(3, 1, 1)     # of red, green, blue
        scale = images.new_tensor([.458, .448, .450]).view(3, 1, 1)
        x = (2 * torch.cat([images, reconstruction]) - 1 - shift) / scale  # (2B, 3, H, W)
        distance, weights = 0, iter(self.vgg)
        for stage, convolutions in enumerate((2, 2, 3, 3, 3)):             # VGG16
            x = F.max_pool2d(x, 2) if stage else x
            for _ in range(convolutions):
                x = F.conv2d(x, next(weights), next(weights), padding=1).relu()
            a, b = F.normalize(x.float(), dim=1, eps=1e-10).chunk(2)       # (B, C, h, w) each
            distance = distance + (self.lins[stage] * (a - b).square()).sum(1).mean()
        return distance


# ---------------------------------------------------------------------------------------------
# StyleGAN2's residual discriminator (ViT-VQGAN §3.3)

class EqualConv(nn.Conv2d):
    """Convolution with equalised learning rate: weights are N(0, 1), scaled by 1/sqrt(fan in) when
    used, so that Adam moves every layer at the same relative speed. Stride 2 first low-passes
    (B, C, H, W) with [1, 3, 3, 1] along both sides."""

    def reset_parameters(self):
        nn.init.normal_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x):
        if self.stride[0] == 2:
            taps = x.new_tensor([1, 3, 3, 1]) / 8
            low_pass = taps.outer(taps).expand(x.shape[1], 1, 4, 4)
            x = F.conv2d(x, low_pass, padding=1 + self.kernel_size[0] // 2, groups=x.shape[1])
        weight = self.weight * self.weight[0].numel() ** -0.5
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


def leaky(x):
    """Leaky ReLU of slope 0.2 with gain sqrt(2), which keeps the variance (StyleGAN2)."""
    return F.leaky_relu(x, 0.2) * 2 ** 0.5


# Resolutions of the discriminator, from the largest picture's to that of its last map.
SIDES = 1024, 512, 256, 128, 64, 32, 16, 8, 4


class Discriminator(nn.Module):
    """(B, 3, S, S) in [0, 1] -> scores (B,), positive for "real". S is a power of two from 8 to
    1024, else ValueError. Resolution r has min(2 * base / r, cap) channels; the defaults are those
    of config F."""

    def __init__(self, image_size, base=16384, cap=512):
        super().__init__()
        if image_size not in SIDES[:-1]:
            raise ValueError(f"a discriminator sees pictures of {SIDES[:-1]} pixels a side, got "
                             f"{image_size}: without it, --adversarial 0, any size will do")
        widths = [min(2 * base // side, cap) for side in SIDES if side <= image_size]
        last = widths[-1]                                                  # of 4 x 4 maps
        self.rgb, self.blocks = EqualConv(3, widths[0], 1), nn.ModuleList()
        for c, d in zip(widths, widths[1:]):
            convs = EqualConv(c, c, 3, padding=1), EqualConv(c, d, 3, stride=2)
            self.blocks.append(nn.ModuleList([*convs, EqualConv(c, d, 1, stride=2, bias=False)]))
        self.conv = EqualConv(last + 1, last, 3, padding=1)
        self.dense, self.score = EqualConv(last, last, 4), EqualConv(last, 1, 1)

    def forward(self, images):
        x = leaky(self.rgb(2 * images - 1))                                # (B, C, S, S)
        for conv, down, skip in self.blocks:
            x = (leaky(down(leaky(conv(x)))) + skip(x)) * 0.5 ** 0.5       # (B, C', S/2, S/2)
        # Minibatch stddev: how much the pictures of a group of 4 differ, as one extra map. A group
        # is 4 neighbours, so that processes and parts that share a batch form the groups of one
        # that does not. Other sizes use groups of 2, or 1.
        group = math.gcd(len(x), 4)
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

def read(path):
    """A checkpoint, plain values and tensors, on the CPU; always weights_only=True. SystemExit with
    one line that says what to do if the file is missing, damaged or holds more than that."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise SystemExit(f"{path}: {error.strerror}; python train_vqgan.py && python train_prior.py"
                         " make vqgan.pt and prior.pt, and with --stage the others")
    except Exception as error:    # torch raises half a dozen types, depending on the damage
        raise SystemExit(f"{path} ({type(error).__name__}) is damaged: train again, --fresh; or it "
                         "holds more than tensors: save its 'state_dict' alone")


# enhancing-transformers -> here, applied in this order
PUBLIC_NAMES = {
    "transformer.layers.": "blocks.", ".0.norm.": ".norm1.", ".1.norm.": ".norm2.",
    ".0.fn.to_": ".", ".1.fn.net.": ".mlp.", "transformer.norm.": "norm.",
    "en_pos_embedding": "positions", "to_patch_embedding.0.": "embed.", "to_pixel.1.": "project.",
    "de_pos_embedding": "positions", "quantizer.embedding.weight": "codebook",
    "pre_quant.": "encoder.project.", "post_quant.": "decoder.embed."}


def convert_public(state):
    """Public ViT-VQGAN (enhancing-transformers) state dict -> config, state dict of `VQGAN`, all
    sizes read from the tensors. Unlike the paper it has tanh inside the MLPs, no tanh head, no
    biases on qkv, heads always 64 wide, and pixels in [0, 1]."""
    ours = {}
    for name, tensor in state.items():
        for old, new in PUBLIC_NAMES.items():
            name = name.replace(old, new)
        if not name.startswith("loss."):
            ours[name] = tensor

    def tower(side):
        width, inner = ours[f"{side}.blocks.0.out.weight"].shape
        layers = sum(name.startswith(side) and "norm1.bias" in name for name in ours)
        return width, layers, inner // 64, len(ours[f"{side}.blocks.0.mlp.0.weight"])

    patch = ours["encoder.embed.weight"].shape[-1]
    config = VQGANConfig(patch * round(ours["encoder.positions"].shape[1] ** 0.5), patch,
                         *tower("encoder"), tower("decoder"), *ours["codebook"].shape,
                         logit_laplace=False, public=True)
    # Convolutions whose stride is their kernel are linear maps of patches: (c, y, x) flattened.
    ours["encoder.embed.weight"] = ours["encoder.embed.weight"].flatten(1)
    ours["decoder.project.weight"] = ours["decoder.project.weight"].flatten(1).T
    ours["decoder.project.bias"] = ours["decoder.project.bias"].repeat_interleave(patch ** 2)
    return config, ours


def load(path):
    """A tokenizer from our checkpoint or a public enhancing-transformers one -> VQGAN on the CPU,
    in eval mode. SystemExit as `read`; what does not fit raises as torch does."""
    saved = read(path)
    if "model" in saved:
        config, state = VQGANConfig(**saved["config"]), saved["model"]
    else:
        config, state = convert_public(saved.get("state_dict", saved))
    model = VQGAN(config)
    model.load_state_dict(state)
    return model.eval()


# ---------------------------------------------------------------------------------------------
# Walk-through

@torch.no_grad()
def main():
    """Shapes and speed of a tiny example, and parameter counts against the papers' table."""
    model, images = VQGAN(PRESETS["tiny"]), torch.rand(16, 3, 64, 64)
    start = time.perf_counter()
    tokens = model.encode(images)
    pictures = model.decode(tokens)
    speed = len(images) / (time.perf_counter() - start)
    print(f"tiny: pictures {tuple(images.shape)} -> latents {tuple(model.latents(images).shape)} ->"
          f" tokens {tuple(tokens.shape)} -> pictures {tuple(pictures.shape)}, {speed:.0f}/s")
    for name, paper in {"small": "32M", "base": "91M", "large": "599M"}.items():
        with torch.device("meta"):    # no memory, no arithmetic
            encoder = VQGAN(PRESETS[name]).encoder
        print(f"{name} encoder {sum(p.numel() for p in encoder.parameters()):,}, paper {paper}")


if __name__ == "__main__":
    main()
