"""Stage 2, the prior: text tokens to image tokens, one after the other (Parti, arXiv 2206.10789).

    python prior.py                      # walk-through: shapes, sizes against the paper, speed
    torchrun train_prior.py              # train the tiny one on the built-in scenes

Top to bottom: configuration, the encoder-decoder transformer, sampling with a cache, the
contrastive text-image model, the optimiser, initial values, and the attention that all of them
share. Axes: B batch, T text tokens, N image tokens, H heads, D width, d head width, K codebook
entries, G grid side.
"""

import functools
import math
import os
import time
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.nn.functional import all_gather

from vqgan import Tower, VQGANConfig, read

try:
    import triton
    import triton.language as tl
except ImportError:  # no Triton: torch's own attention serves
    triton = None

# --- configuration -------------------------------------------------------------------------------


@dataclass(frozen=True)
class PriorConfig:
    """Sizes of the encoder-decoder transformer (Parti §2.2, Table 1).

    Raises ValueError, one line naming the values, for sizes that do not fit together."""

    text_vocab: int = 16_000  # SentencePiece pieces
    text_length: int = 128  # longest text, in tokens
    codes: int = 8_192  # K, entries of the tokenizer's codebook
    grid: int = 32  # G, image tokens along a side; N = G * G
    width: int = 1_024
    heads: int = 16
    mlp: int = 4_096
    encoder_layers: int = 12
    decoder_layers: int = 12
    dropout: float = 0.1  # on residual, activation and attention outputs (§3, ViT-VQGAN §4.1)
    kernel: int = 11  # side of the conv-shaped attention mask (§2.2); 0: dense causal

    def __post_init__(self):
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not divisible by {self.heads} heads")
        if self.kernel and self.kernel % 2 == 0:
            raise ValueError(f"kernel {self.kernel} is even: give an odd side, or 0 for dense")

    @property
    def tokens(self):
        """N: image tokens of one picture."""
        return self.grid**2


PRESETS = {  # Parti Table 1; tiny is for the built-in scenes on a laptop
    "tiny": PriorConfig(text_vocab=0, text_length=32, codes=0, grid=8, width=128, heads=8, mlp=512,
                        encoder_layers=2, decoder_layers=4, dropout=0.0),
    "350m": PriorConfig(),
    "750m": PriorConfig(decoder_layers=36),
    "3b": PriorConfig(width=2_048, heads=32, mlp=8_192, decoder_layers=36),
    "20b": PriorConfig(width=4_096, heads=64, mlp=16_384, encoder_layers=16, decoder_layers=64),
}
MASK = 1  # the id that hides a token in pretraining: SentencePiece's "unknown", unused by its bytes

# --- the transformer -----------------------------------------------------------------------------


class Attention(nn.Module):
    """Multi-head attention without biases; queries from x, keys and values from a context."""

    def __init__(self, config):
        super().__init__()
        self.heads = config.heads
        self.q = nn.Linear(config.width, config.width, bias=False)
        self.kv = nn.Linear(config.width, 2 * config.width, bias=False)
        self.out = nn.Linear(config.width, config.width, bias=False)

    def split(self, x):
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, N, D) -> (B, H, N, d)

    def keys_values(self, context):
        """(B, Nk, D) -> k, v, each (B, H, Nk, d)."""
        return [self.split(x) for x in self.kv(context).chunk(2, dim=-1)]

    def forward(self, x, keys_values, **rule):
        y = attention(self.split(self.q(x)), *keys_values, **rule)  # (B, H, Nq, d)
        return self.out(y.transpose(1, 2).flatten(2))  # (B, Nq, D)


class Block(nn.Module):
    """Pre-norm block: self-attention, in the decoder cross-attention to the text, MLP."""

    def __init__(self, config, cross=False):
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(config.width), Attention(config)
        if cross:
            self.norm2, self.cross = nn.LayerNorm(config.width), Attention(config)
        self.norm3 = nn.LayerNorm(config.width)
        self.up = nn.Linear(config.width, config.mlp, bias=False)
        self.down = nn.Linear(config.mlp, config.width, bias=False)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x, text=None, text_lengths=None, cache=None, **rule):
        """x (B, N, D) -> (B, N, D). text: features (B, T, D) or their keys and values, with lengths
        (B,). rule: what the self-attention sees, see `attention`.
        cache: a function that stores this step's keys and values and returns all kept ones."""
        h = self.norm1(x)
        keys_values = self.attention.keys_values(h)
        if cache:
            keys_values = cache(*keys_values)
        x = x + self.drop(self.attention(h, keys_values, **rule))
        if text is not None:
            # Inside the block, so that FSDP has gathered the weights by then.
            text = self.cross.keys_values(text) if torch.is_tensor(text) else text
            x = x + self.drop(self.cross(self.norm2(x), text, lengths=text_lengths))
        h = self.drop(F.gelu(self.up(self.norm3(x))))
        return x + self.drop(self.down(h))


class TextEncoder(nn.Module):
    """text (B, T) int64, 0 = padding -> features (B, T, D), lengths (B,) (Parti §2.2).

    A text of padding alone is the unconditional case: its first position stays visible, so that the
    embedding of the padding there is the learned stand-in for "no text" (§2.4)."""

    def __init__(self, config):
        super().__init__()
        self.embed = nn.Embedding(config.text_vocab, config.width)
        self.positions = nn.Parameter(torch.empty(config.text_length, config.width))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.encoder_layers))
        self.norm = nn.LayerNorm(config.width)  # the additional norm of Parti §3
        self.drop = nn.Dropout(config.dropout)

    def forward(self, text):
        lengths = (text != 0).sum(1).clamp(min=1)  # (B,)
        x = self.drop(self.embed(text) + self.positions[: text.shape[1]])  # (B, T, D)
        for block in self.blocks:
            x = block(x, lengths=lengths)
        return self.norm(x), lengths


class Parti(nn.Module):
    """Text tokens to image tokens: encoder, decoder, one distribution over codes at a time."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.encoder = TextEncoder(config)
        self.embed = nn.Embedding(config.codes, config.width)
        self.start = nn.Parameter(torch.empty(config.width))  # stands before the first image token
        self.rows = nn.Parameter(torch.empty(config.grid, 1, config.width))
        self.columns = nn.Parameter(torch.empty(1, config.grid, config.width))
        self.blocks = nn.ModuleList(Block(config, True) for _ in range(config.decoder_layers))
        self.norm = nn.LayerNorm(config.width)  # the additional norm of Parti §3
        self.head = nn.Linear(config.width, config.codes, bias=False)
        self.drop = nn.Dropout(config.dropout)
        initialise(self)

    @property
    def rule(self):
        """What a query of the decoder sees: the arguments of `attention`."""
        return dict(causal=True, kernel=self.config.kernel, grid=self.config.grid)

    def positions(self):
        """Learned row + column vectors, one sum per image token: (N, D)."""
        return (self.rows + self.columns).flatten(0, 1)

    def logits(self, x):
        """(B, N, D) -> (B, N, K) in float32, also under autocast (Parti §3)."""
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(self.norm(x.float()), self.head.weight.float())

    @torch.no_grad()
    def start_from(self, codes, seed=0):
        """Set the image embeddings and the output map to random projections of the tokenizer's
        codes (K, code_dim), so that codes that look alike start alike. Our addition."""
        mix = torch.randn(2, codes.shape[1], self.config.width,
                          generator=torch.Generator().manual_seed(seed))
        self.embed.weight.copy_(codes @ mix[0])
        self.head.weight.copy_(codes @ mix[1] * self.config.width**-0.5)

    def forward(self, text, tokens):
        """text (B, T), tokens (B, N) -> logits (B, N, K); those at i saw tokens before i only."""
        memory, lengths = self.encoder(text)  # (B, T, D)
        x = torch.cat([self.start.expand(len(tokens), 1, -1), self.embed(tokens[:, :-1])], dim=1)
        x = self.drop(x + self.positions())  # (B, N, D)
        for block in self.blocks:
            x = block(x, memory, lengths, **self.rule)
        return self.logits(x)

    @torch.no_grad()
    def generate(self, text, guidance=1.0, temperature=1.0, top_k=0, top_p=1.0, generator=None):
        """text (B, T) -> image tokens (B, N), drawn one after the other with a cache (Parti §2.4).

        guidance: lambda of Parti Eq. 1; 1 is plain conditional sampling and costs half as much.
        temperature, top_k (0: off), top_p (1: off) act after it. generator: on the same device."""
        guided = guidance != 1.0
        if guided:  # two streams in one batch: the second has no text
            text = torch.cat([text, torch.zeros_like(text)])
        step, tokens = CachedDecoder(self, text), []
        for i in range(self.config.tokens):
            logits = step(i, tokens[-1].repeat(1 + guided) if tokens else None)  # (B or 2B, K)
            if guided:
                logits = guide(*logits.chunk(2), guidance)
            tokens.append(draw(truncate(logits / temperature, top_k, top_p), generator))
        return torch.stack(tokens, dim=1)


class CachedDecoder:
    """The decoder one position at a time: keys and values of the past are kept, not computed again.

    With the conv-shaped mask no query sees further back than `conv_offsets` reach: the cache is
    a ring of that many positions and the cost of a token does not grow with its position."""

    def __init__(self, prior, text):
        self.prior, config = prior, prior.config
        memory, self.lengths = prior.encoder(text)
        self.text = [block.cross.keys_values(memory) for block in prior.blocks]
        size = conv_offsets(config.kernel, config.grid)[-1] + 1 if config.kernel else config.tokens
        self.size = min(size, config.tokens)
        head = config.width // config.heads
        shape = (len(prior.blocks), 2, len(text), config.heads, self.size, head)
        self.kept = memory.new_zeros(shape)  # keys and values of every layer
        self.held = torch.full((self.size,), -1, device=text.device)  # the position in each slot
        self.places = prior.positions()

    def __call__(self, i, tokens):
        """Position i and the tokens (B,) before it (None at 0) -> logits (B, K)."""
        prior, slot = self.prior, i % self.size
        x = prior.start.expand(len(self.lengths), -1) if i == 0 else prior.embed(tokens)
        x = (x + self.places[i])[:, None]  # (B, 1, D)
        self.held[slot] = i
        here = torch.tensor([i], device=x.device)
        for block, text, kept in zip(prior.blocks, self.text, self.kept):

            def cache(k, v):
                kept[0, :, :, slot], kept[1, :, :, slot] = k[:, :, 0], v[:, :, 0]
                return kept[0], kept[1]

            x = block(x, text, self.lengths, cache, query_positions=here,
                      key_positions=self.held, **prior.rule)  # fmt: skip
        return prior.logits(x)[:, 0]


# --- sampling ------------------------------------------------------------------------------------


def guide(conditional, unconditional, scale):
    """Guided logits, Parti Eq. 1: scale 1 is conditional, 0 unconditional sampling."""
    return unconditional + scale * (conditional - unconditional)


def truncate(logits, top_k=0, top_p=1.0):
    """(B, K) with -inf outside the top_k likeliest codes and outside the smallest set of codes that
    holds top_p of the probability; the likeliest code always stays."""
    if top_k:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -math.inf)
    if top_p < 1:
        values, order = logits.sort(descending=True)
        p = values.softmax(-1)
        outside = p.cumsum(-1) - p >= top_p  # the codes before this one hold top_p already
        outside[:, 0] = False
        logits = logits.masked_fill(torch.zeros_like(outside).scatter(1, order, outside), -math.inf)
    return logits


def draw(logits, generator=None):
    """One code (B,) from each row of logits (B, K)."""
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


# --- contrastive text-image model -----------------------------------------------------------------


class DualEncoder(nn.Module):
    """Text and image tower of the contrastive pretraining (Parti §2.3) and of the reranker (§2.4).

    The text tower is Parti's own encoder, so that its weights warm-start the prior; masked tokens
    train it too. The image tower, a ViT as the tokenizer's, is thrown away for the prior.
    image_size, patch: of the pictures (B, 3, S, S) in [0, 1]."""

    def __init__(self, config, image_size, patch=8):
        super().__init__()
        self.config = config
        self.encoder = TextEncoder(config)
        vit = VQGANConfig(image_size, patch, config.width, config.encoder_layers, config.heads,
                          config.mlp)  # fmt: skip
        self.image = Tower(vit, 3 * patch**2, config.width, *vit.sizes())
        self.text = nn.Linear(config.width, config.width, bias=False)  # into the common space
        self.head = nn.Linear(config.width, config.text_vocab, bias=False)  # hidden tokens
        self.scale = nn.Parameter(torch.tensor([math.log(1 / 0.07)]))  # log 1/temperature: CLIP
        self.patch = patch
        initialise(self)

    def embed_text(self, text):
        """text (B, T) -> unit vectors (B, D): mean of the features of its tokens."""
        features, lengths = self.encoder(text)  # (B, T, D)
        inside = torch.arange(text.shape[1], device=text.device) < lengths[:, None]  # (B, T)
        mean = (features * inside[..., None]).sum(1) / lengths[:, None]
        return F.normalize(self.text(mean).float(), dim=-1)

    def embed_images(self, images):
        """images (B, 3, S, S) in [0, 1] -> unit vectors (B, D)."""
        patches = F.pixel_unshuffle(images, self.patch).flatten(2).transpose(1, 2)
        return F.normalize(self.image(patches).mean(1).float(), dim=-1)

    def forward(self, text, images, hidden):
        """-> text vectors, image vectors, both (B, D), temperature factor (capped at 100), logits
        (B, T, V) of the masked-token objective for `hidden`, the text with hidden tokens."""
        words = self.head(self.encoder(hidden)[0]).float()
        scale = self.scale.exp().clamp(max=100)
        return self.embed_text(text), self.embed_images(images), scale, words


def hide(text, vocab, draws):
    """BERT's corruption of text (B, T) by uniform numbers draws (3, B, T): 15 % of the tokens are
    to be predicted; of these 80 % become MASK, 10 % a random piece, 10 % stay. Returns the text so
    corrupted and the chosen places (B, T)."""
    chosen = (draws[0] < 0.15) & (text != 0)
    piece = (4 + draws[2] * (vocab - 4)).long()  # the first four are padding, MASK, start and end
    hidden = torch.where(draws[1] < 0.8, MASK, torch.where(draws[1] < 0.9, piece, text))
    return torch.where(chosen, hidden, text), chosen


def contrastive_loss(text, images, scale):
    """Vectors (B, D) of pairs -> mean of the two cross-entropies (CLIP §2.3) over the global batch:
    every process sees all vectors, and gradients flow back through the gathering."""
    if torch.distributed.is_initialized():
        text, images = (torch.cat(all_gather(x)) for x in (text, images))
    logits = scale * text @ images.T  # (B, B)
    pairs = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, pairs) + F.cross_entropy(logits.T, pairs)) / 2


# --- optimiser -----------------------------------------------------------------------------------


class Adafactor(torch.optim.Optimizer):
    """Adafactor as Parti used it (§3): factored second moment with constant, bias-corrected decay,
    update clipping, momentum kept in int8, decoupled weight decay, absolute learning rate.

    m, the momentum, is stored as round(m / s) with one s = max|m| / 127 a column; that of vectors,
    which weigh nothing, as it is."""

    def __init__(self, params, lr, betas=(0.9, 0.96), weight_decay=0.045, clip=1.0):
        super().__init__(params, dict(lr=lr, betas=betas, weight_decay=weight_decay, clip=clip))

    @torch.no_grad()
    def step(self, closure=None):  # torch calls it with one, which is None
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.update(p, p.grad.float(), self.state[p], group)

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        for state in self.state.values():  # torch gives every state the type of its parameter
            if "bucket" in state:
                state["momentum"] = state["momentum"].to(torch.int8)

    def update(self, p, grad, state, group):
        beta1, beta2 = group["betas"]
        t = state["step"] = state.get("step", 0) + 1
        decay = beta2 * (1 - beta2 ** (t - 1)) / (1 - beta2**t)  # 0 at first: the average of g^2
        square = grad.square() + 1e-30
        if p.ndim >= 2:  # only the mean of each row and of each column is kept
            rows = average(state, "rows", square.mean(-1, keepdim=True), decay)
            columns = average(state, "columns", square.mean(-2, keepdim=True), decay)
            # Two roots: the product of two tiny means would be 0, and the update NaN.
            scale = (rows / rows.mean(-2, keepdim=True)).rsqrt() * columns.rsqrt()
        else:
            scale = average(state, "square", square, decay).rsqrt()
        update = grad * scale
        update = update / (update.square().mean().sqrt() / group["clip"]).clamp(min=1)
        momentum = state.get("momentum", torch.zeros_like(update)) * state.get("bucket", 1)
        momentum = state["momentum"] = momentum.lerp(update, 1 - beta1)
        if p.ndim >= 2:
            state["bucket"] = (momentum.abs().amax(0, keepdim=True) / 127).clamp(min=1e-30)
            state["momentum"] = (momentum / state["bucket"]).round().to(torch.int8)
        p.mul_(1 - group["lr"] * group["weight_decay"])
        p.add_(momentum.to(p.dtype), alpha=-group["lr"])


def average(state, name, value, decay):
    """Running mean state[name] = decay * state[name] + (1 - decay) * value; decay 0 starts it."""
    state[name] = value if name not in state else state[name].lerp(value, 1 - decay)
    return state[name]


# --- initial values ------------------------------------------------------------------------------


def initialise(model):
    """Every initial value of a prior or a dual encoder; the papers are silent on them."""
    for name, p in model.named_parameters():
        if name.endswith(("embed.weight", "positions", "start", "rows", "columns")):
            nn.init.normal_(p)  # as loud as what attention adds, else words drown in early mixing
        elif name == "head.weight":
            nn.init.zeros_(p)  # all codes equally likely: the first loss is ln K
        elif p.ndim == 2:
            nn.init.normal_(p, std=p.shape[1] ** -0.5)  # keeps the variance of unit-scale inputs
    for stack in (model.encoder.blocks, getattr(model, "blocks", [])):
        for block in stack:  # GPT-2: the sum over all residual branches keeps the variance
            for output in (block.attention.out, block.down):
                output.weight.data.mul_((2 * len(stack)) ** -0.5)


# --- which key a query sees ----------------------------------------------------------------------
# The two functions below are plain arithmetic on purpose: the same lines run on Python integers, on
# torch tensors (masks) and, compiled by Triton, inside every kernel, so that no two can disagree.


def allowed(i, j, length, causal, kernel, grid):
    """Whether the query at position i sees the key at position j; integers or tensors, broadcast.

    Keys at `length` and after are padding, negative positions are empty slots. `causal`: j <= i.
    `kernel` > 0 (with `causal`): the conv-shaped mask of Parti §2.2 (DALL-E, Fig. 11), a causal
    kernel x kernel convolution over a raster of `grid` columns, with wraparound: i - j must be
    grid * r - c with 0 <= r <= kernel // 2 and |c| <= kernel // 2. A function of i - j alone, so
    the start token is no exception: it is position 0, and only i in the set of offsets see it.
    """
    visible = (j >= 0) & (j < length)
    if causal:
        visible = visible & (j <= i)
    if kernel > 0:
        half = kernel // 2
        shifted = i + half - j  # grid * r + (half - c), where half - c lies in 0 ... 2 * half
        visible = visible & (shifted <= (grid + 2) * half) & (shifted % grid <= 2 * half)
    return visible


def tile_range(start, size, step, end, behind, ahead):
    """(first, last) of the tiles that the tile of positions start ... start + size - 1 meets: they
    begin at first, first + step, ... below last, and cover what lies up to `behind` before the
    tile and up to `ahead` after it, within 0 ... end - 1.

    With the sparse mask nothing else has to be skipped: a tile between the first and the last
    spans size + step - 1 values of i - j, more than the gap of grid - kernel between two rows.
    """
    first = max(start - behind, 0) // step * step
    return first, min(start + size + ahead, end)


@functools.cache
def conv_offsets(kernel, grid):
    """The values of i - j that the conv-shaped mask allows, ascending: {0, 1, 3, 4, 5} for a 3 x 3
    kernel on a 4 x 4 grid, 61 values up to 165 for 11 x 11 on 32 x 32."""
    reach = (grid + 1) * (kernel // 2)
    return [o for o in range(reach + 1) if allowed(o, 0, 1, True, kernel, grid)]


# --- the hand-written path: flash attention in Triton --------------------------------------------
# With S = Q K^T / sqrt(d), masked, P = softmax(S) and O = P V, no N x N matrix is ever in memory:
# each program keeps one tile of rows and walks over the tiles of the other side. Exponentials are
# powers of 2 (what the hardware computes), hence S in units of log 2 wherever an exponent is taken.

if triton is not None:
    _allowed, _tile_range = triton.jit(allowed), triton.jit(tile_range)
    LOG2E = tl.constexpr(1.4426950408889634)
    INTERPRET = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")

    @triton.jit
    def _dot(a, b):
        """a @ b accumulated in float32; float32 inputs stay exact (no TF32)."""
        if INTERPRET:  # Triton's interpreter cannot multiply bfloat16
            a, b = a.to(tl.float32), b.to(tl.float32)
        return tl.dot(a, b, input_precision="ieee")

    @triton.jit
    def _mask(s, i, j, length, CAUSAL: tl.constexpr, KERNEL: tl.constexpr, GRID: tl.constexpr):
        """S with -inf where `allowed` says no; unsigned, since its remainder is cheaper then."""
        i, j, length = i.to(tl.uint32), j.to(tl.uint32), length.to(tl.uint32)
        return tl.where(_allowed(i, j, length, CAUSAL, KERNEL, GRID), s, float("-inf"))

    @triton.jit
    def _place(heads, LENGTHS, m):
        """Batch row and head of this program, and the number of keys in that row."""
        b, h = (tl.program_id(1) // heads).to(tl.int64), tl.program_id(1) % heads
        length = tl.full([], m, tl.int32)
        if LENGTHS is not None:
            length = tl.minimum(tl.load(LENGTHS + b).to(tl.int32), length)
        return b, h, length

    @triton.jit
    def _load(X, strides, b, h, rows, n, D: tl.constexpr):
        """The tile of given rows of one head: (rows, D), zeros past the end."""
        at = b * strides[0] + h * strides[1] + rows[:, None] * strides[2] + tl.arange(0, D)[None]
        return tl.load(X + at, mask=rows[:, None] < n, other=0.0)

    @triton.jit
    def _store(X, strides, b, h, rows, n, value, D: tl.constexpr):
        at = b * strides[0] + h * strides[1] + rows[:, None] * strides[2] + tl.arange(0, D)[None]
        tl.store(X + at, value.to(X.dtype.element_ty), mask=rows[:, None] < n)

    @triton.jit
    def _forward(Q, K, V, OUT, LSE, LENGTHS, sq, sk, sv, so, heads, n, m, scale, behind, ahead,
                 CAUSAL: tl.constexpr, KERNEL: tl.constexpr, GRID: tl.constexpr, D: tl.constexpr,
                 OWN: tl.constexpr, STEP: tl.constexpr):  # fmt: skip
        """O and the log-sum-exp of one tile of queries."""
        b, h, length = _place(heads, LENGTHS, m)
        i0 = tl.program_id(0) * OWN
        i = i0 + tl.arange(0, OWN)
        q = _load(Q, sq, b, h, i, n, D)
        # A finite floor for the maximum, not -inf: a row that sees no key then ends with l = 0.
        top = tl.full([OWN], -1e30, tl.float32)  # running maximum of S
        total = tl.zeros([OWN], tl.float32)  # l, running sum of exp(S - top)
        acc = tl.zeros([OWN, D], tl.float32)  # running sum of exp(S - top) V
        first, last = _tile_range(i0, OWN, STEP, length, behind, ahead)
        for j0 in range(first, last, STEP):
            j = j0 + tl.arange(0, STEP)
            k, v = _load(K, sk, b, h, j, m, D), _load(V, sv, b, h, j, m, D)
            s = _dot(q, tl.trans(k)) * (scale * LOG2E)
            s = _mask(s, i[:, None], j[None, :], length, CAUSAL, KERNEL, GRID)
            new = tl.maximum(top, tl.max(s, 1))
            p = tl.exp2(s - new[:, None])
            shrink = tl.exp2(top - new)  # what was summed so far was relative to the old maximum
            total = total * shrink + tl.sum(p, 1)
            acc = acc * shrink[:, None] + _dot(p.to(v.dtype), v)
            top = new
        total = tl.where(total > 0, total, 1.0)  # nothing visible: the output is 0
        _store(OUT, so, b, h, i, n, acc / total[:, None], D)
        tl.store(LSE + tl.program_id(1) * n + i, top + tl.log2(total), mask=i < n)

    @triton.jit
    def _weights(x, y, gx, gy, lse, delta, i, j, length, scale,
                 CAUSAL: tl.constexpr, KERNEL: tl.constexpr, GRID: tl.constexpr):  # fmt: skip
        """P = exp(S - lse), computed again, and dS = P * (dP - delta) with dP = dO V^T, as tiles
        (queries, keys) for x, y = Q, K and gx, gy = dO, V, or transposed, both pairs swapped."""
        s = _dot(x, tl.trans(y)) * (scale * LOG2E) - lse
        p = tl.exp2(_mask(s, i, j, length, CAUSAL, KERNEL, GRID))
        dp = _dot(gx, tl.trans(gy))
        return p.to(x.dtype), (p * (dp - delta)).to(x.dtype)

    @triton.jit
    def _backward(Q, K, V, G, DQ, DK, DV, LSE, DELTA, LENGTHS, sq, sk, sv, sg, sdq, sdk, sdv,
                  heads, n, m, scale, behind, ahead, CAUSAL: tl.constexpr, KERNEL: tl.constexpr,
                  GRID: tl.constexpr, D: tl.constexpr, OWN: tl.constexpr,
                  STEP: tl.constexpr):  # fmt: skip
        """dK and dV of one tile of keys, then dQ of the tile of queries at the same positions."""
        b, h, length = _place(heads, LENGTHS, m)
        LSE, DELTA = LSE + tl.program_id(1) * n, DELTA + tl.program_id(1) * n
        start = tl.program_id(0) * OWN
        own = start + tl.arange(0, OWN)
        # dV = P^T dO and dK = dS^T Q / sqrt(d), over the queries that see these keys: those from
        # `ahead` before to `behind` after, or none at all if the keys are padding.
        key, value = _load(K, sk, b, h, own, m, D), _load(V, sv, b, h, own, m, D)
        dk, dv = tl.zeros([OWN, D], tl.float32), tl.zeros([OWN, D], tl.float32)
        end = n if start < length else 0
        first, last = _tile_range(start, OWN, STEP, end, ahead, behind)
        for i0 in range(first, last, STEP):
            i = i0 + tl.arange(0, STEP)
            q, g = _load(Q, sq, b, h, i, n, D), _load(G, sg, b, h, i, n, D)
            lse = tl.load(LSE + i, mask=i < n, other=0.0)[None, :]
            delta = tl.load(DELTA + i, mask=i < n, other=0.0)[None, :]
            p, ds = _weights(key, q, value, g, lse, delta, i[None, :], own[:, None], length,
                             scale, CAUSAL, KERNEL, GRID)  # fmt: skip  # (keys, queries)
            dv += _dot(p, g)
            dk += _dot(ds, q)
        _store(DK, sdk, b, h, own, m, dk * scale, D)
        _store(DV, sdv, b, h, own, m, dv, D)
        # dQ = dS K / sqrt(d), over the keys that these queries see, as in the forward pass.
        q, g = _load(Q, sq, b, h, own, n, D), _load(G, sg, b, h, own, n, D)
        lse = tl.load(LSE + own, mask=own < n, other=0.0)[:, None]
        delta = tl.load(DELTA + own, mask=own < n, other=0.0)[:, None]
        dq = tl.zeros([OWN, D], tl.float32)
        end = length if start < n else 0
        first, last = _tile_range(start, OWN, STEP, end, behind, ahead)
        for j0 in range(first, last, STEP):
            j = j0 + tl.arange(0, STEP)
            k, v = _load(K, sk, b, h, j, m, D), _load(V, sv, b, h, j, m, D)
            _, ds = _weights(q, k, g, v, lse, delta, own[:, None], j[None, :], length, scale,
                             CAUSAL, KERNEL, GRID)  # fmt: skip  # (queries, keys)
            dq += _dot(ds, k)
        _store(DQ, sdq, b, h, own, n, dq * scale, D)


class Fused(torch.autograd.Function):
    """The kernels above as one differentiable function; see `attention` for the arguments."""

    @staticmethod
    def launch(run, inputs, outputs, extra, causal, kernel, grid, own, step):
        """Run a kernel on every tile of `own` positions of every head."""
        (B, H, n, d), m = inputs[0].shape, inputs[1].shape[2]
        behind = (grid + 1) * (kernel // 2) if kernel else n + m  # query i sees key j only from
        ahead = 0 if causal else n + m  # i - behind to i + ahead
        size = inputs[0].element_size()
        own, step = (32, 32) if size == 4 else (own, step)  # float32 tiles are halved, to fit
        warps, stages = (8, 2) if d * size > 128 else (4, 3)  # wide rows fill the registers
        rows = n if len(outputs) == 1 else max(n, m)
        strides = [x.stride()[:3] for x in (*inputs, *outputs)]
        run[(triton.cdiv(rows, own), B * H)](
            *inputs, *outputs, *extra, *strides, H, n, m, d**-0.5, behind, ahead,
            causal, kernel, grid, d, own, step, num_warps=warps, num_stages=stages)  # fmt: skip

    @staticmethod
    def forward(ctx, q, k, v, lengths, causal, kernel, grid):
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        out, lse = torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
        own = 64 if kernel else 128  # a narrow tile follows the band of the mask more closely
        Fused.launch(_forward, (q, k, v), [out], (lse, lengths), causal, kernel, grid, own, 64)
        ctx.save_for_backward(q, k, v, out, lse, lengths)
        ctx.mask = causal, kernel, grid
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, out, lse, lengths = ctx.saved_tensors
        grad = grad if grad.stride(-1) == 1 else grad.contiguous()
        # The derivative of softmax subtracts sum_j P dP, which is dO . O for each row.
        delta = (grad.float() * out.float()).sum(-1).contiguous()
        grads, extra = [torch.empty_like(x) for x in (q, k, v)], (lse, delta, lengths)
        Fused.launch(_backward, (q, k, v, grad), grads, extra, *ctx.mask, 64, 32)
        return (*grads, None, None, None, None)


# --- the other path: torch's own attention -------------------------------------------------------

BLOCK = 64  # queries that share one window of keys under the sparse mask; the fastest measured


@functools.cache
@torch.inference_mode(False)  # the mask outlives this call and may be saved for a backward pass
def _window_mask(kernel, grid, device):
    """What BLOCK queries see of the whole blocks before them that the sparse mask can reach, and
    of their own: (BLOCK, window). The same for every block: the rule depends on i - j alone."""
    before = -(-(grid + 1) * (kernel // 2) // BLOCK) * BLOCK
    j = torch.arange(before + BLOCK, device=device)
    return allowed(j[before:, None], j, before + BLOCK, True, kernel, grid)


def _block_local(q, k, v, kernel, grid):
    """The sparse mask without N x N work: each block of queries attends to its own window."""
    mask = _window_mask(kernel, grid, q.device)
    reach = mask.shape[1] // BLOCK - 1  # blocks before its own that a block sees
    queries, keys, values = (x.split(BLOCK, 2) for x in (q, k, v))
    out = []
    for b, rows in enumerate(queries):
        start = max(b - reach, 0)
        window = torch.cat(keys[start : b + 1], 2)  # (B, H, up to BLOCK * (reach + 1), d)
        first = (reach - (b - start)) * BLOCK  # the first windows are cut by the picture's start
        near = mask[: rows.shape[2], first : first + window.shape[2]]
        content = torch.cat(values[start : b + 1], 2)
        out.append(F.scaled_dot_product_attention(rows, window, content, attn_mask=near))
    return torch.cat(out, 2)


def _masked(q, k, v, mask):
    """Attention with a boolean mask, True where visible; a row without any True gives zeros."""
    empty = ~mask.any(-1, keepdim=True)
    # A softmax over nothing is NaN, in the gradient too: such rows see all, then give 0.
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask | empty)
    return out.masked_fill(empty, 0)


# --- the door ------------------------------------------------------------------------------------


def attention(
    q, k, v, causal=False, kernel=0, grid=0, lengths=None, query_positions=None,
    key_positions=None, fused=None,
):  # fmt: skip
    """softmax(Q K^T / sqrt(d), masked) V with statistics in float32, differentiable in q, k, v.

    q (B, H, Nq, d); k, v (B, H, Nk, d); any strides; returns (B, H, Nq, d) in q's dtype.
    causal: a query sees the keys at its own position and before it.
    kernel, grid: if kernel > 0 (odd), the conv-shaped sparse mask over a raster of `grid` columns,
      which is causal; see `allowed`.
    lengths: (B,) integers; keys at lengths[b] and after are padding and are not seen.
    query_positions (Nq,), key_positions (Nk,): for decoding with a cache, the positions that the
      rows hold (by default 0, 1, 2 ...), in any order; -1 marks an empty slot of the cache.
    fused: None takes the Triton kernels on a GPU (and on a CPU under TRITON_INTERPRET=1) where
      they apply, torch elsewhere; True or False insists.
    A query that sees no key gives zeros, and no gradient. Raises ValueError for a sparse mask
    whose kernel is even or that has no grid.
    """
    if kernel and (kernel % 2 == 0 or grid < 1):
        raise ValueError(f"a sparse mask needs an odd kernel and a grid, not {kernel} and {grid}")
    causal, (n, m) = causal or kernel > 0, (q.shape[2], k.shape[2])
    decoding = query_positions is not None or key_positions is not None
    if fused is None:
        fused = triton is not None and (q.is_cuda or INTERPRET.value) and not decoding
        fused = fused and q.shape[-1] in (32, 64, 128) and q.dtype != torch.float64
    if fused:
        return Fused.apply(q, k, v, lengths, causal, kernel, grid)
    if not decoding and lengths is None:
        if kernel and n == m:
            return _block_local(q, k, v, kernel, grid)
        if not kernel:
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    i = torch.arange(n, device=q.device) if query_positions is None else query_positions
    j = torch.arange(m, device=q.device) if key_positions is None else key_positions
    length = float("inf") if lengths is None else lengths[:, None, None, None]
    return _masked(q, k, v, allowed(i[:, None], j, length, causal, kernel, grid))


# --- files and walk-through ----------------------------------------------------------------------


def load(path):
    """A prior from the checkpoint of train_prior.py -> Parti on the CPU, in eval mode. A missing,
    damaged or misfitting file stops with one line (SystemExit)."""
    saved = read(path)
    try:
        model = Parti(PriorConfig(**saved["config"]))
        model.load_state_dict(saved["model"])
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        raise SystemExit(f"{path} is not a prior: {' '.join(str(error).split())[:200]}")
    return model.eval()


def seconds(work, device, repeat=3):
    """The shortest time of one call of work()."""
    times = []
    for _ in range(repeat + 1):  # the first call warms up
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def walk_through():
    """Every step on a tiny example, and parameter counts against Parti's Table 1."""
    config = replace(PRESETS["tiny"], text_vocab=300, codes=1_024)
    model = Parti(config).eval()
    text, tokens = torch.randint(4, 300, (2, 9)), torch.randint(1_024, (2, config.tokens))
    memory, lengths = model.encoder(text)
    print(f"text                     {tuple(text.shape)}\nencoded text             "
          f"{tuple(memory.shape)}\nimage tokens             {tuple(tokens.shape)}\nlogits"
          f"                   {tuple(model(text, tokens).shape)}\nsampled, guidance 1.2    "
          f"{tuple(model.generate(text, 1.2).shape)}")
    print("\nParameters of the blocks, and in all (Parti Table 1)")
    for name in ("350m", "750m", "3b", "20b"):
        with torch.device("meta"):
            named = dict(Parti(PRESETS[name]).named_parameters())
        blocks = sum(p.numel() for n, p in named.items() if "blocks" in n and p.ndim == 2)
        print(f"{name:8}{blocks:16,}{sum(p.numel() for p in named.values()):16,}")


def benchmark(device):
    """Attention, a training step and sampling on this machine, against what the machine can do."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    how = {"device": device, "dtype": dtype}
    a = torch.randn(2_048, 2_048, **how)
    rate = 2 * 2_048**3 / seconds(lambda: a @ a, device)
    print(f"\n{device}, {torch.get_num_threads()} threads, {dtype}: "
          f"matmul {rate / 1e9:,.0f} GFLOP/s")  # fmt: skip

    print("attention, ms, (B, H, N, d) = (2, 8, N, 64)   forward   forward + backward")
    for n, grid in ((256, 16), (1_024, 32)):
        q, k, v = (torch.randn(2, 8, n, 64, **how, requires_grad=True) for _ in range(3))
        for name, rule in (("dense", {}), ("causal", {"causal": True}),
                           ("sparse", {"causal": True, "kernel": 11, "grid": grid})):  # fmt: skip
            with torch.no_grad():
                forward = seconds(lambda: attention(q, k, v, **rule), device)
            both = seconds(lambda: attention(q, k, v, **rule).sum().backward(), device)
            print(f"  N {n:5}  {name:8}{forward * 1e3:35.2f}{both * 1e3:21.2f}")

    config = PriorConfig(text_vocab=1_000, text_length=64, grid=16, width=512, heads=8, mlp=2_048,
                         encoder_layers=8, decoder_layers=8, dropout=0.0)  # fmt: skip
    model = Parti(config).to(device)
    text = torch.randint(4, 1_000, (8, 64), device=device)
    tokens = torch.randint(8_192, (8, 256), device=device)

    def step():
        model.zero_grad()
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            logits = model(text, tokens)
        F.cross_entropy(logits.flatten(0, 1), tokens.flatten()).backward()

    time_of = seconds(step, device, repeat=2)
    weights = {name: p.numel() for name, p in model.named_parameters() if p.ndim == 2}
    sides = [sum(n for name, n in weights.items() if ("encoder" in name) == side and "embed" not in
                 name and ".cross.kv" not in name) for side in (True, False)]  # fmt: skip
    keys = sum(n for name, n in weights.items() if ".cross.kv" in name)
    flops = 6 * 8 * (64 * (sides[0] + keys) + 256 * sides[1])
    print(f"training step of 8 x (64 text + 256 image tokens), width 512, 8 + 8 layers: "
          f"{8 * 256 / time_of:,.0f} tokens/s, {flops / time_of / rate:.0%} of the matmul rate")
    model.eval()
    for batch in (1, 16):
        start = time.perf_counter()
        model.generate(text[:1].expand(batch, -1), guidance=1.2)
        spent = time.perf_counter() - start
        print(f"sampling with guidance, batch {batch}: {256 * batch / spent:,.0f} tokens/s")


if __name__ == "__main__":
    walk_through()
    benchmark("cuda" if torch.cuda.is_available() else "cpu")
