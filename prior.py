"""Stage 2, the prior: text tokens to image tokens, one after the other (Parti, arXiv 2206.10789).

    python prior.py                      # walk-through: shapes, sizes against the paper, speed
    torchrun train_prior.py              # train the tiny one on the built-in scenes

Top to bottom: configuration, the encoder-decoder transformer, sampling with a cache, the
contrastive text-image model, the optimiser, initial values, and the attention that all of them
share. Axes: B batch, T text tokens, N image tokens, H heads, D width, d head width, K codebook
entries, G grid side.
"""

import math
from dataclasses import dataclass, field, replace
from itertools import product
from timeit import timeit

import torch
import torch.nn.functional as F
from torch import distributed as dist, nn
from torch.distributed._functional_collectives import all_gather_single_autograd
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

from vqgan import Tower, VQGANConfig, patchify, restore

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
    # On residual, activation and attention outputs (§3, ViT-VQGAN §4.1). most, least: the bounds of
    # the command-line option, where they are not the usual ones.
    dropout: float = field(default=0.1, metadata={"most": 1})
    # Side of the conv-shaped attention mask (§2.2); 0: dense causal.
    kernel: int = field(default=11, metadata={"least": 0})

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
MASK = 1  # hides a token in pretraining: SentencePiece's "unknown", free as bytes spell all words

# --- the transformer -----------------------------------------------------------------------------


def split_heads(x, parts, heads):
    """(B, N, parts * D) -> (parts, B, H, N, d): queries, keys, values."""
    return x.unflatten(-1, (parts, heads, -1)).permute(2, 0, 3, 1, 4)


class Attention(nn.Module):
    """Multi-head attention without biases; queries from x, keys and values from a context (Parti
    §2.2, which takes the encoder-decoder of Vaswani et al.)."""

    def __init__(self, config):
        super().__init__()
        self.heads, D = config.heads, config.width
        self.q, self.kv, self.out = (nn.Linear(D, n * D, bias=False) for n in (1, 2, 1))

    def forward(self, x, context, **rule):
        """x (B, Nq, D), context (B, Nk, D) -> (B, Nq, D). rule: see `attention`."""
        [q] = split_heads(self.q(x), 1, self.heads)  # (B, H, Nq, d)
        k, v = split_heads(self.kv(context), 2, self.heads)  # (B, H, Nk, d)
        y = attention(q, k, v, **rule)  # (B, H, Nq, d)
        return self.out(y.transpose(1, 2).flatten(2))  # (B, Nq, D)


class Block(nn.Module):
    """Pre-norm block: self-attention, in the decoder cross-attention to the text, MLP (Parti §2.2;
    dropout §3)."""

    def __init__(self, config, cross=False):
        super().__init__()
        D, M = config.width, config.mlp
        self.norm1, self.attention = nn.LayerNorm(D), Attention(config)
        if cross:
            self.norm2, self.cross = nn.LayerNorm(D), Attention(config)
        self.norm3 = nn.LayerNorm(D)
        self.up, self.down = nn.Linear(D, M, bias=False), nn.Linear(M, D, bias=False)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x, text=None, text_lengths=None, **rule):
        """x (B, N, D) -> (B, N, D). text: features (B, T, D) with lengths (B,). rule: what the
        self-attention sees, see `attention`."""
        h = self.norm1(x)
        x = x + self.drop(self.attention(h, h, **rule))
        if text is not None:
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
    """Text tokens to image tokens: encoder, decoder, one distribution over codes at a time (Parti
    §2.2)."""

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

    def positions(self):
        """Learned row + column vectors, one sum per image token: (N, D)."""
        return (self.rows + self.columns).flatten(0, 1)

    def logits(self, x):
        """(B, N, D) -> (B, N, K) in float32, also under autocast (Parti §3)."""
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(self.norm(x.float()), self.head.weight.float())

    def start_from(self, codes):
        """Set the image embeddings and the output map to random projections of the tokenizer's
        codes (K, code_dim), so that codes that look alike start alike. Our addition."""
        seed = torch.Generator().manual_seed(0)
        mix = torch.randn(2, codes.shape[1], self.config.width, generator=seed)
        self.embed.weight.data.copy_(codes @ mix[0])
        self.head.weight.data.copy_(codes @ mix[1] * self.config.width**-0.5)

    def forward(self, text, tokens):
        """text (B, T), tokens (B, N) -> logits (B, N, K); those at i saw tokens before i only."""
        rule = {"causal": True, "kernel": self.config.kernel, "grid": self.config.grid}
        words, lengths = self.encoder(text)  # (B, T, D)
        x = torch.cat([self.start.expand(len(tokens), 1, -1), self.embed(tokens[:, :-1])], dim=1)
        x = self.drop(x + self.positions())  # (B, N, D)
        for block in self.blocks:
            x = block(x, words, lengths, **rule)
        return self.logits(x)

    @torch.no_grad()
    def generate(self, text, guidance=1.0, temperature=1.0, top_k=0, top_p=1.0, generator=None):
        """text (B, T) -> image tokens (B, N), drawn one after the other with a cache (Parti §2.4).

        guidance: lambda of Parti Eq. 1; 1 is plain conditional sampling and costs half as much.
        temperature, top_k (0: off), top_p (1: off) act after it. generator: on the same device."""
        guided = guidance != 1.0  # two streams in one batch: the second has no text
        step = CachedDecoder(self, text, guided)
        tokens = [text.new_full((len(text),), self.config.codes)]  # the start
        with torch.inference_mode():  # cheaper operations: what they make can never be trained
            for i in range(self.config.tokens):
                logits = step(i, tokens[-1].repeat(1 + guided))  # (B or 2B, K)
                if guided:
                    logits = guide(*logits.chunk(2), guidance)
                logits = truncate(logits / max(temperature, 1e-4), top_k, top_p)
                tokens.append(draw(logits, generator))
        return torch.stack(tokens[1:], dim=1)


class CachedDecoder:
    """The decoder one position at a time, in eval mode: keys and values of the past are kept,
    not computed again, and those of the text are computed once.

    With the conv-shaped mask no query sees further back than `conv_offsets` reach: the cache is
    a ring of that many positions and the cost of a token does not grow with its position. Under
    autocast weights are kept in half precision, on a GPU the cache, too; all else is float32.
    guided: the batch is doubled, and its second half has no text."""

    def __init__(self, prior, text, guided=False):
        self.prior, config, kind = prior, prior.config, text.device.type
        words, lengths = prior.encoder(text)  # (B, T, D)
        if guided:  # no text is one position, the same for all; the others are padding
            nothing, one = prior.encoder(torch.zeros_like(text[:1, :1]))
            words = torch.cat([words, nothing.expand_as(words)])  # (2B, T, D)
            lengths = torch.cat([lengths, one.expand_as(lengths)])
        half = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else words.dtype
        dtype = words.dtype if text.is_cpu else half  # of the cache
        self.embed = torch.cat([prior.embed.weight, prior.start[None]])  # token K is the start
        self.positions = prior.positions()
        behind, _ = span(True, config.kernel, config.grid, config.tokens)
        self.size = self.filled = min(behind + 1, config.tokens)
        self.slots = back = torch.arange(self.size, device=text.device)
        t = torch.arange(text.shape[1], device=text.device)
        # What is added to the scores is 0 = log 1 for the keys to see, and -inf = log 0.
        seen = allowed(back, 0, 1, True, config.kernel, config.grid)  # a function of i - j alone
        inside = t < lengths.repeat_interleave(config.heads)[:, None, None]
        self.seen, self.inside = (x.to(dtype).log() for x in (seen, inside))  # (size,), (B*H, 1, T)
        self.layers = []
        for block in prior.blocks:
            own, cross = block.attention, block.cross
            maps = (torch.cat([own.q.weight, own.kv.weight]), own.out.weight, cross.q.weight,
                    cross.out.weight, block.up.weight, block.down.weight)
            # Keys and values (2, B * H, T, d) of the text; room for those of the picture.
            pair = split_heads(cross.kv(words).to(dtype), 2, config.heads).flatten(1, 2)
            kept = pair.new_zeros(2, pair.shape[1], self.size, pair.shape[-1])
            maps = [multiplier(weight, half, len(words)) for weight in maps]
            self.layers.append((block, maps, pair, kept))
        self.head = multiplier(prior.head.weight, words.dtype, len(words))

    def __call__(self, i, tokens):
        """Position i and the tokens (B,) before it (K at position 0) -> logits (B, K)."""
        with torch.autocast(tokens.device.type, enabled=False):
            here = torch.tensor([i], device=tokens.device)
            if not tokens.is_cuda:
                self.filled = min(i + 1, self.size)  # slots worth reading
            elif i == 0:  # a graph of all kernels of a step, launched as one, over all slots
                self.step = torch.cuda.make_graphed_callables(self.step, (here, tokens))
            return self.step(here, tokens)

    def step(self, i, tokens):
        """The same; i is a tensor (1,), so that one CUDA graph serves every position."""
        slot, heads = i % self.size, self.prior.config.heads
        x = F.embedding(tokens, self.embed) + self.positions[i]  # (B, D)
        back = (i - self.slots[: self.filled]) % self.size  # how far back each slot's key lies
        seen = self.seen[back].masked_fill(back > i, -math.inf)  # (filled,); those are still empty
        for block, (qkv, out, query, mix, up, down), words, kept in self.layers:
            # Query, key and value of this position, each head a matrix: (3, B * H, 1, d).
            qkv = split_heads(qkv(block.norm1(x))[:, None], 3, heads).flatten(1, 2).to(kept)
            kept.index_copy_(2, slot, qkv[1:])
            y = attention(qkv[0], *kept[:, :, : self.filled], mask=seen)  # (B * H, 1, d)
            x += out(y.view(x.shape))
            q = query(block.norm2(x)).reshape(qkv[0].shape).to(kept)  # (B * H, 1, d)
            x += mix(attention(q, *words, mask=self.inside).view(x.shape))
            x += down(F.gelu(up(block.norm3(x))))
        return self.head(self.prior.norm(x))


def multiplier(weight, dtype, rows):
    """-> a function of x (rows, n_in) that gives weight (n_out, n_in) times each row, (rows, n_out)
    float32. Few rows take as long as reading the weight, kept in dtype; then a CPU has better ways.

    In float32 MKL multiplies W x^T faster than x W^T, for two rows up to four times; long columns
    come in blocks (n_in / 512, n_out, 512). Half precision is FBGEMM's: weights in float16, sums in
    float32."""
    if weight.is_cpu and dtype == torch.float32:
        part = math.gcd(512, weight.shape[1])
        blocks = weight.unflatten(1, (-1, part)).transpose(0, 1).contiguous()
        if len(blocks) == 1:
            return lambda x: (weight @ x.contiguous().t()).t()
        return lambda x: torch.bmm(  # x^T in as many blocks: (n_in / 512, 512, rows)
            blocks, x.contiguous().unflatten(1, (-1, part)).permute(1, 2, 0)).sum(0).t()
    if weight.is_cpu and rows <= 16 and torch.backends.quantized.engine in ("x86", "fbgemm"):
        packed = torch.ops.quantized.linear_prepack_fp16(weight.float(), None)
        return lambda x: torch.ops.quantized.linear_dynamic_fp16(x.float(), packed)
    weight = weight.to(dtype)
    return lambda x: F.linear(x.to(dtype), weight).float()


# --- sampling ------------------------------------------------------------------------------------


def guide(conditional, unconditional, scale):
    """Guided logits, Parti Eq. 1: scale 1 is conditional, 0 unconditional sampling."""
    return unconditional + scale * (conditional - unconditional)


def truncate(logits, top_k=0, top_p=1.0):
    """(B, K) with -inf outside the top_k likeliest codes and outside the smallest set of codes that
    holds top_p of the probability; the likeliest code always stays."""
    if not top_k and top_p >= 1:
        return logits
    values, order = logits.sort(descending=True)
    if top_k:
        values[:, top_k:] = -math.inf
    p = values.softmax(-1)
    before = p.cumsum(-1) - p  # what the likelier codes hold
    values[:, 1:] = values[:, 1:].masked_fill(before[:, 1:] >= top_p, -math.inf)
    return logits.scatter(1, order, values)


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
        sizes = config.width, config.encoder_layers, config.heads, config.mlp
        vit = VQGANConfig(image_size, patch, *sizes)
        self.image = Tower(vit, 3 * patch**2, config.width, *sizes)
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
        return F.normalize(self.image(patchify(images, self.patch)).mean(1).float(), dim=-1)

    def forward(self, text, images, hidden):
        """-> text vectors, image vectors, both (B, D), temperature factor (capped at 100), logits
        (B, T, V) of the masked-token objective for `hidden`, the text with hidden tokens."""
        words = self.head(self.encoder(hidden)[0]).float()
        scale = self.scale.exp().clamp(max=100)
        return self.embed_text(text), self.embed_images(images), scale, words


def hide(text, vocab, draws):
    """BERT's corruption (Parti §2.3) of text (B, T) by uniform numbers draws (3, B, T): 15 % of the
    tokens are to be predicted; of these 80 % become MASK, 10 % a random piece, 10 % stay. Returns
    the text so corrupted and the chosen places (B, T)."""
    chosen = (draws[0] < 0.15) & (text != 0)
    piece = (4 + draws[2] * (vocab - 4)).long()  # the first four are padding, MASK, start and end
    hidden = torch.where(draws[1] < 0.8, MASK, torch.where(draws[1] < 0.9, piece, text))
    return torch.where(chosen, hidden, text), chosen


def contrastive_loss(text, images, scale):
    """Vectors (B, D) of pairs -> mean of the two cross-entropies (CLIP §2.3) over the global batch:
    every process sees all vectors, and gradients flow back through the gathering."""
    if dist.is_initialized():  # backward adds up W equal losses; DDP divides by W
        text, images = (all_gather_single_autograd(x, 0, dist.group.WORLD) for x in (text, images))
    logits = scale * text @ images.T  # (B, B)
    pairs = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, pairs) + F.cross_entropy(logits.T, pairs)) / 2


# --- optimiser -----------------------------------------------------------------------------------


class Adafactor(torch.optim.Optimizer):
    """Adafactor as Parti used it (§3): factored second moment with constant, bias-corrected decay,
    update clipping, momentum kept in int8, decoupled weight decay, absolute learning rate.

    m, the momentum, is stored as round(m / s) with one s = max|m| / 127 a column; that of vectors,
    which weigh nothing, as it is. Where Parti is silent: m has no bias correction, as in Praxis,
    and the learning rate multiplies m, as in Adam, not the update that enters it."""

    def __init__(self, params, lr, betas=(0.9, 0.96), weight_decay=0.045, clip=1.0):
        super().__init__(params, dict(lr=lr, betas=betas, weight_decay=weight_decay, clip=clip))

    @torch.no_grad()
    def step(self, closure=None):  # torch passes one, None, when it loads a checkpoint
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.update(p, p.grad.float(), self.state[p], **group)

    def update(self, p, grad, state, lr, betas, weight_decay, clip, **_):
        """One step of one parameter. No state yet: its averages start at their first value."""
        t = state["step"] = state.get("step", 0) + 1
        fresh = (1 - betas[1]) / (1 - betas[1] ** t)  # 1 at first: then the average of all g^2
        square = grad.square() + 1e-30
        if p.ndim >= 2:  # only the mean of each row and of each column is kept
            rows, columns = square.mean(-1, keepdim=True), square.mean(-2, keepdim=True)
            rows = state["rows"] = state.get("rows", rows).lerp(rows, fresh)
            columns = state["columns"] = state.get("columns", columns).lerp(columns, fresh)
            # Two roots: the product of two tiny means would be 0, and the update NaN.
            update = grad * ((rows / rows.mean(-2, keepdim=True)).rsqrt() * columns.rsqrt())
        else:
            square = state["square"] = state.get("square", square).lerp(square, fresh)
            update = grad * square.rsqrt()
        update = update / (update.square().mean().sqrt() / clip).clamp(min=1)
        # Loading a checkpoint makes all state float32 (torch): the same numbers, int8 again below.
        momentum = state.get("momentum", torch.zeros_like(update)) * state.get("bucket", 1)
        momentum = state["momentum"] = momentum.lerp(update, 1 - betas[0])
        if p.ndim >= 2:
            state["bucket"] = (momentum.abs().amax(0, keepdim=True) / 127).clamp(min=1e-30)
            state["momentum"] = (momentum / state["bucket"]).round().to(torch.int8)
        p.mul_(1 - lr * weight_decay).add_(momentum, alpha=-lr)


# --- initial values ------------------------------------------------------------------------------


def initialise(model):
    """Every initial value of a prior or a dual encoder, but norms and biases, which keep torch's;
    the papers are silent on them."""
    for name, p in model.named_parameters():
        table = name.endswith(("embed.weight", "positions", "start", "rows", "columns"))
        table = table and name != "image.embed.weight"  # that is a linear map
        # Linear maps keep the variance of unit-scale inputs. Tables are as loud as what attention
        # adds, else words drown in early mixing.
        if name == "head.weight":
            nn.init.zeros_(p)  # all codes equally likely: the first loss is ln K
        elif table or p.ndim == 2:
            nn.init.normal_(p, std=1 if table else p.shape[1] ** -0.5)
        # GPT-2: the sum over all residual branches keeps the variance. Cross-attention is left as
        # loud as it is: pictures must not outshout the text.
        if name.endswith(("attention.out.weight", "down.weight")):
            stack = model.encoder if name.startswith("encoder") else model
            p.data.mul_((2 * len(stack.blocks)) ** -0.5)


# --- which key a query sees ----------------------------------------------------------------------
# The functions below are plain arithmetic on purpose: the same lines run on Python integers, on
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


def span(causal, kernel, grid, far):
    """How many positions before and after its own a query sees at most; `far` where it sees all."""
    return (grid + 1) * (kernel // 2) if kernel else far, 0 if causal else far


def tile_range(start, size, step, end, behind, ahead):
    """(first, last) of the tiles that the tile of positions start ... start + size - 1 meets: they
    begin at first, first + step, ... below last, and cover what lies up to `behind` before the
    tile and up to `ahead` after it, within 0 ... end - 1.

    With the sparse mask of grids up to 64 nothing else has to be skipped: a tile in between spans
    size + step - 1 values of i - j, more than the gap of grid - kernel between two rows.
    """
    first = max(start - behind, 0) // step * step
    return first, min(start + size + ahead, end)


def conv_offsets(kernel, grid):
    """The values of i - j that the conv-shaped mask allows, ascending: {0, 1, 3, 4, 5} for a 3 x 3
    kernel on a 4 x 4 grid, 61 values up to 165 for 11 x 11 on 32 x 32."""
    return [o for o in range(kernel * grid) if allowed(o, 0, 1, True, kernel, grid)]


# --- the hand-written path: flash attention in Triton --------------------------------------------
# With S = Q K^T / sqrt(d), masked, P = softmax(S) and O = P V, no N x N matrix is ever in memory:
# each program keeps one tile of rows and walks over the tiles of the other side. Exponentials are
# powers of 2 (what the hardware computes), hence S in units of log 2 wherever an exponent is taken.
# Programs are numbered (tile, head, picture). RULE is (causal, kernel, grid). Q, K, V and the like,
# also LSE and DELTA of width 1, are tuples: pointer, number of rows, strides of the four axes.

if triton is not None:
    _allowed, _tile_range = triton.jit(allowed), triton.jit(tile_range)
    INTERPRET = tl.constexpr(triton.knobs.runtime.interpret)  # TRITON_INTERPRET=1

    @triton.jit
    def _dot(a, b):
        """a @ b accumulated in float32; float32 inputs stay exact (no TF32)."""
        if INTERPRET:  # Triton's interpreter cannot multiply bfloat16
            a, b = a.to(tl.float32), b.to(tl.float32)
        return tl.dot(a, b, input_precision="ieee")

    @triton.jit
    def _at(x, rows, columns):
        """Pointers to these numbers of this program's head."""
        head = tl.program_id(2).to(tl.int64) * x[2] + tl.program_id(1) * x[3]
        return x[0] + head + rows * x[4] + columns * x[5]

    @triton.jit
    def _load(x, rows, end, D: tl.constexpr):
        """A tile (rows, D); zeros from the row `end` on."""
        return tl.load(_at(x, rows[:, None], tl.arange(0, D)), mask=rows[:, None] < end, other=0.0)

    @triton.jit
    def _scores(q, k, i, j, length, RULE: tl.constexpr):
        """S in units of log 2, -inf where `allowed` says no; unsigned: a cheaper remainder."""
        s = _dot(q, tl.trans(k)) * (1.4426950408889634 * q.shape[1] ** -0.5)
        seen = _allowed(i.to(tl.uint32), j.to(tl.uint32), length, *RULE)
        return tl.where(seen, s, float("-inf"))

    @triton.jit
    def _forward(Q, K, V, OUT, LSE, LENGTHS, behind, ahead, RULE: tl.constexpr, D: tl.constexpr,
                 OWN: tl.constexpr, STEP: tl.constexpr):
        """O and the log-sum-exp of one tile of queries."""
        n, length = Q[1], tl.load(LENGTHS + tl.program_id(2)).to(tl.int32)
        start = tl.program_id(0) * OWN
        i = start + tl.arange(0, OWN)
        q = _load(Q, i, n, D)
        # A finite floor for the maximum, not -inf: a row that sees no key then ends with l = 0.
        top = tl.full([OWN], -1e30, tl.float32)  # running maximum of S
        total = tl.zeros([OWN], tl.float32)  # l, running sum of exp(S - top)
        acc = tl.zeros([OWN, D], tl.float32)  # running sum of exp(S - top) V
        first, last = _tile_range(start, OWN, STEP, length, behind, ahead)
        for j0 in range(first, last, STEP):
            j = j0 + tl.arange(0, STEP)
            k, v = _load(K, j, length, D), _load(V, j, length, D)
            s = _scores(q, k, i[:, None], j[None, :], length, RULE)
            new = tl.maximum(top, tl.max(s, 1))
            p = tl.exp2(s - new[:, None])
            shrink = tl.exp2(top - new)  # what was summed so far was relative to the old maximum
            total = total * shrink + tl.sum(p, 1)
            acc = acc * shrink[:, None] + _dot(p.to(v.dtype), v)
            top = new
        total = tl.where(total > 0, total, 1.0)  # nothing visible: the output is 0
        tl.store(_at(LSE, i, 0), top + tl.log2(total), mask=i < n)
        tl.store(_at(OUT, i[:, None], tl.arange(0, D)), acc / total[:, None], mask=i[:, None] < n)

    @triton.jit
    def _backward(X, GX, Y, GY, DX, DGX, LSE, DELTA, LENGTHS, behind, ahead, RULE: tl.constexpr,
                  D: tl.constexpr, OWN: tl.constexpr, STEP: tl.constexpr, KEYS: tl.constexpr):
        """Gradients of one tile, over the tiles of the other side that see it or that it sees.

        Of queries (X, GX = Q, dO and Y, GY = K, V): DX = dQ = dS K / sqrt(d). Of KEYS (X, GX = K, V
        and Y, GY = Q, dO): DX = dK = dS^T Q / sqrt(d) and DGX = dV = P^T dO. Both compute again
        P = exp(S - lse), dP = dO V^T and dS = P * (dP - delta), here transposed for keys."""
        length = tl.load(LENGTHS + tl.program_id(2)).to(tl.int32)
        start = tl.program_id(0) * OWN
        own = start + tl.arange(0, OWN)
        x, gx = _load(X, own, X[1], D), _load(GX, own, X[1], D)
        dx, dgx = tl.zeros([OWN, D], tl.float32), tl.zeros([OWN, D], tl.float32)
        # Keys are seen from as far ahead as queries see behind; padding is seen from nowhere.
        behind, ahead = (ahead, behind) if KEYS else (behind, ahead)
        end = tl.where(start < length, LSE[1], 0) if KEYS else length
        first, last = _tile_range(start, OWN, STEP, end, behind, ahead)
        for y0 in range(first, last, STEP):
            other = y0 + tl.arange(0, STEP)
            y, gy = _load(Y, other, Y[1], D), _load(GY, other, Y[1], D)
            i, j = (other[None, :], own[:, None]) if KEYS else (own[:, None], other[None, :])
            lse = tl.load(_at(LSE, i, 0), mask=i < LSE[1], other=0.0)
            delta = tl.load(_at(DELTA, i, 0), mask=i < LSE[1], other=0.0)
            p = tl.exp2(_scores(x, y, i, j, length, RULE) - lse)
            ds = p * (_dot(gx, tl.trans(gy)) - delta)
            dx += _dot(ds.to(y.dtype), y)
            if KEYS:
                dgx += _dot(p.to(y.dtype), gy)
        tl.store(_at(DX, own[:, None], tl.arange(0, D)), dx * D**-0.5, mask=own[:, None] < X[1])
        if KEYS:
            tl.store(_at(DGX, own[:, None], tl.arange(0, D)), dgx, mask=own[:, None] < X[1])


def launch(kernel, own, step, rule, lengths, *tensors, **more):
    """Run a kernel on every tile of `own` rows of the first tensor, (B, H, rows, d)."""
    (B, H, rows, d), size = tensors[0].shape, tensors[0].element_size()
    own, step = (32, 32) if size == 4 else (own, step)  # smaller in float32, to fit
    warps, stages = (8, 2) if d * size > 128 else (4, 3)  # wide rows fill the registers
    tensors = [(x, x.shape[2], *x.stride()) for x in tensors]
    kernel[triton.cdiv(rows, own), H, B](*tensors, lengths, *span(*rule, 2**30), rule, d, own, step,
                                         num_warps=warps, num_stages=stages, **more)


class Fused(torch.autograd.Function):
    """The kernels above as one differentiable function; see `attention` for the arguments."""

    @staticmethod
    def forward(ctx, q, k, v, lengths, *rule):
        out, lse = torch.empty_like(q), q.new_empty(*q.shape[:3], 1, dtype=torch.float32)
        # A narrow tile follows the band of the mask more closely.
        launch(_forward, 64 if rule[1] else 128, 64, rule, lengths, q, k, v, out, lse)
        ctx.save_for_backward(q, k, v, out, lse, lengths)
        ctx.rule = rule
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, out, lse, lengths = ctx.saved_tensors
        dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
        # The derivative of softmax subtracts sum_j P dP, which is dO . O for each row.
        delta = (grad.float() * out.float()).sum(-1, keepdim=True)
        # Queries have one gradient: their second dq is not written.
        launch(_backward, 64, 32, ctx.rule, lengths, q, grad, k, v, dq, dq, lse, delta, KEYS=False)
        launch(_backward, 64, 32, ctx.rule, lengths, k, v, q, grad, dk, dv, lse, delta, KEYS=True)
        return dq, dk, dv, None, None, None, None


# --- the other path: torch's own attention -------------------------------------------------------

BLOCK = 64  # queries that share one window of keys under the sparse mask; the fastest measured


def by_blocks(q, k, v, kernel, grid):
    """The sparse mask with torch, without N x N work: each block of queries attends to the window
    of keys it can reach, its own block the last, through one small mask: the rule depends on i - j
    alone."""
    before = -(-span(True, kernel, grid, 0)[0] // BLOCK)  # blocks before its own that one sees
    window = torch.arange((before + 1) * BLOCK, device=q.device)
    seen = allowed(window[-BLOCK:, None], window, len(window), True, kernel, grid)
    (queries, keys, values), out = (x.split(BLOCK, dim=2) for x in (q, k, v)), []
    for b, rows in enumerate(queries):
        near, content = (torch.cat(x[max(b - before, 0) : b + 1], dim=2) for x in (keys, values))
        see = seen[-rows.shape[2] :, -near.shape[2] :]  # smaller at the picture's start and end
        out.append(F.scaled_dot_product_attention(rows, near, content, attn_mask=see))
    return torch.cat(out, dim=2)


# --- the door ------------------------------------------------------------------------------------


def attention(q, k, v, causal=False, kernel=0, grid=0, lengths=None, mask=None, fused=None):
    """softmax(Q K^T / sqrt(d), masked) V with statistics in float32, differentiable in q, k, v.

    q (B, H, Nq, d); k, v (B, H, Nk, d); any strides; returns (B, H, Nq, d) in q's dtype.
    causal: a query sees the keys at its own position and before it.
    kernel, grid: if kernel > 0 (odd), the conv-shaped sparse mask over a raster of `grid` columns,
      which is causal; see `allowed`.
    lengths: (B,) integers; keys at lengths[b] and after are padding and are not seen.
    mask: in place of all these, for decoding with a cache: numbers to add to the scores, 0 or -inf,
      in q's dtype. Then q is (B * H, Nq, d), and so on: the mask broadcasts to (B * H, Nq, Nk), and
      each query must see a key.
    fused: None takes the Triton kernels on a GPU (and on a CPU under TRITON_INTERPRET=1) for d of
      32, 64 or 128 and any type but float64, torch elsewhere; True or False insists.
    A query that sees no key gives zeros, and no gradient. Raises ValueError for a sparse mask
    whose kernel is even or that has no grid.
    """
    if kernel and (kernel % 2 == 0 or grid < 1):
        raise ValueError(f"a sparse mask needs an odd kernel and a grid, not {kernel} and {grid}")
    if mask is not None:  # as it is written: faster than blocks for one query
        scores = torch.baddbmm(mask, q, k.mT, alpha=q.shape[-1] ** -0.5)
        return torch.bmm(scores.softmax(-1), v)  # a softmax computes in float32 whatever the dtype
    if fused is None:
        fused = triton is not None and (q.is_cuda or INTERPRET.value)
        fused = fused and q.shape[-1] in (32, 64, 128) and q.dtype != torch.float64
    (n, m), rule = (q.shape[2], k.shape[2]), (causal or kernel > 0, kernel, grid)
    if not fused and lengths is None and not kernel:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    if not fused and lengths is None and n == m:
        return by_blocks(q, k, v, kernel, grid)
    whole = torch.full(q.shape[:1], m, device=q.device)
    lengths = whole if lengths is None else lengths.clamp(max=m)
    if fused:
        return Fused.apply(q, k, v, lengths, *rule)
    i, j = torch.arange(n, device=q.device)[:, None], torch.arange(m, device=q.device)
    seen = allowed(i, j, lengths[:, None, None, None], *rule)  # torch, too, gives 0 for no key
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen)


# --- files and walk-through ----------------------------------------------------------------------


def load(path):
    """A prior from the checkpoint of train_prior.py -> Parti on the CPU, in eval mode. A missing,
    damaged or misfitting file stops with one line (SystemExit)."""
    return restore(path, lambda saved: Parti(PriorConfig(**saved["config"])))[0]


def memory(config, batch, shards=1):
    """What one process needs to train a Parti with Adafactor under bfloat16 autocast, in bytes:
    {"weights", "gradients", "optimizer", "activations"}. DDP's buckets hold the gradients and cost
    nothing; on top come the block that FSDP gathers and whatever lives for one operation alone.

    batch: pictures of this process. shards: processes that share the first three (FSDP; gradients
    only without --accumulate, which holds them whole until the last part of a batch). The
    activations are what the backward pass needs, with dropout, as torch keeps it on a CPU (on a GPU
    masks take half); attention keeps no N x N matrix."""
    with torch.device("meta"):
        named = dict(Parti(config).named_parameters())
    count = sum(p.numel() for p in named.values())
    # A matrix has an int8 momentum and float32 rows, columns and buckets, a vector two moments.
    moments = sum(p.numel() + sum(4 * p.numel() // p.shape[i] for i in (-1, -2, 0))
                  if p.ndim > 1 else 8 * p.numel() for p in named.values())
    # The bfloat16 copies that autocast makes; under FSDP, too, they stay whole.
    copies = sum(2 * p.numel() for name, p in named.items() if "blocks" in name and p.ndim > 1)
    # Bytes of a token: 4 a number for what a norm receives, which is float32, 2 for all else.
    D = config.width
    # Around an attention: norm, its output, q, attention's output in two layouts, dropout.
    mix = (4 + 2 + 2 + 4 + 2) * D
    pair = (2 + 4) * D  # what keys and values come from, and they
    # The MLP: norm, its output, dropout; GELU's input, dropout and its output are mlp wide.
    block = mix + pair + (4 + 2 + 2) * D + (2 + 2 + 2) * config.mlp
    word = config.encoder_layers * block + config.decoder_layers * pair
    # After the blocks come dropout, norm and head, and log-probabilities.
    code = config.decoder_layers * (block + mix) + (4 + 4 + 4) * D + 4 * config.codes
    tokens = config.text_length * word + config.tokens * code
    return {"weights": 4 * count // shards, "gradients": 4 * count // shards,
            "optimizer": moments // shards, "activations": copies + batch * tokens}


def seconds(work):
    """The shortest time of one call of work(), called for at least 0.3 seconds."""
    timer = Timer("work()", globals={"work": work}, num_threads=torch.get_num_threads())
    return min(timer.blocked_autorange(min_run_time=0.3).times)


def walk_through():
    """Every step on a tiny example, and parameter counts against Parti's Table 1."""
    model = Parti(replace(PRESETS["tiny"], text_vocab=300, codes=1_024)).eval()
    text, tokens = torch.randint(4, 300, (2, 9)), torch.randint(1_024, (2, model.config.tokens))
    steps = {"text": text, "encoded text": model.encoder(text)[0], "image tokens": tokens,
             "logits": model(text, tokens), "sampled": model.generate(text, guidance=1.2)}
    for name, value in steps.items():
        print(f"{name:25}{tuple(value.shape)}")
    print("\nParameters: blocks (Parti Table 1), all. GB to train with 8 pictures a process:"
          "\nactivations alone; in all with nothing sharded (DDP), sharded over 8, over 64 (FSDP)")
    for name in ("350m", "750m", "3b", "20b"):
        with torch.device("meta"):
            model = Parti(PRESETS[name])
        blocks = sum(p.numel() for n, p in model.named_parameters() if "blocks" in n and p.ndim > 1)
        need = memory(model.config, 8)
        print(f"{name:8}{blocks:16,}{need['weights'] // 4:16,}", end=" ")
        own = need.pop("activations")  # the rest can be shared
        needs = own, *(own + sum(need.values()) / shards for shards in (1, 8, 64))
        print(*(f"{x / 1e9:9.1f}" for x in needs))


def benchmark(device):
    """Attention, training and sampling on this machine, against what the machine can do."""
    cuda, rates = device == "cuda", {}
    fast = cuda or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    for dtype in (torch.float32, torch.bfloat16)[: 1 + fast]:
        a = torch.randn(2_048, 2_048, device=device, dtype=dtype)
        rates[dtype] = 2 * 2_048**3 / seconds(lambda: a @ a)
        print(f"{device}, matmul {dtype}: {rates[dtype] / 1e9:,.0f} GFLOP/s")
    big = torch.ones(2**26, device=device)
    bandwidth = big.nbytes / seconds(big.sum)
    print(f"reading memory: {bandwidth / 1e9:,.1f} GB/s, {torch.get_num_threads()} threads")

    print("\nattention, ms, (B, H, N, d) = (2, 8, N, 64)         forward   forward + backward")
    rules = {"dense": {}, "causal": {"causal": True}, "sparse": {"kernel": 11}}
    paths = ("torch", "hand-written")[: 1 + cuda]
    for grid, name, path in product((16, 32, 64)[: 2 + cuda], rules, paths):
        q, k, v = torch.randn(3, 2, 8, grid**2, 64, device=device, dtype=dtype).requires_grad_()
        how = rules[name] | {"grid": grid, "fused": path != "torch"}
        forward = seconds(torch.no_grad()(lambda: attention(q, k, v, **how)))
        both = seconds(lambda: attention(q, k, v, **how).sum().backward())
        print(f"  N {grid**2:5}  {name:8}{path:14}{forward * 1e3:25.2f}{both * 1e3:20.2f}")

    print("\nwidth 512, 8 + 8 layers, 64 text tokens, 8,192 codes, guidance")
    config = PriorConfig(text_vocab=1_000, text_length=64, grid=16, width=512, heads=8, mlp=2_048,
                         encoder_layers=8, decoder_layers=8, dropout=0.0)
    text = torch.randint(4, 1_000, (16, 64), device=device)
    tokens = torch.randint(config.codes, (8, 256), device=device)
    for dtype in rates:
        cast = torch.autocast(device, dtype, enabled=dtype != torch.float32)
        network = cast(Parti(config).to(device).forward)

        def step():
            F.cross_entropy(network(text[:8], tokens).flatten(0, 1), tokens.flatten()).backward()

        with FlopCounterMode(display=False) as counter:
            step()
        spent = seconds(step)
        print(f"{dtype}, training, batch 8: {tokens.numel() / spent:,.0f} tokens/s, "
              f"{counter.get_total_flops() / spent / rates[dtype]:.0%} of the matmul rate")
        for batch, grid in ((1, 16), (1, 32), (16, 16)):
            sample = cast(Parti(replace(config, grid=grid)).to(device).eval().generate)
            taken = timeit(lambda: sample(text[:batch], guidance=1.2).cpu(), number=1)
            spent = taken / grid**2  # one step: a token of each picture
            # A step reads all maps but that of the text, keys and values of two streams, the head.
            kept = 64 + min(grid**2, span(True, config.kernel, grid, 0)[0] + 1)  # words, picture
            cache = 8 * 2 * 2 * batch * kept * 512 * (dtype.itemsize if cuda else 4)
            share = (8 * 14 * 512**2 * dtype.itemsize + cache + 8_192 * 512 * 4) / bandwidth / spent
            print(f"{dtype}, sampling, batch {batch:2}, {grid**2:4} tokens: {batch / spent:6,.0f} "
                  f"tokens/s, {spent * 1e3:.1f} ms a step, {share:.0%} of memory")


if __name__ == "__main__":
    walk_through()
    benchmark("cuda" if torch.cuda.is_available() else "cpu")
